//! What is known when a session opens: weights, and what follows from them alone.
//!
//! Values are interned across entries, so that a weight used by several entries is loaded and packed once. Each is
//! made in turn, packed for the matrix products that take it as their columns, and dropped again unless some step
//! reads it as it is.

use super::contraction::Contraction;
use super::convert::StepError;
use super::gemm::Packed;
use super::heap;
use super::kernels::{Context, Made, run_kernel};
use super::value::Value;
use super::weights::WeightSource;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tpshard_ir::dim::Bindings;
use tpshard_ir::program::{Kernel, Lowering, RankProgram, Stage, lower};
use tpshard_ir::{DType, Graph, Op, Type, ValueId};

/// How a constant is laid out for a matrix product: which of its dims are depth and columns, in order.
type PackKey = (usize, Vec<usize>, Vec<usize>);

/// Bytes of weights read and dropped after which the system gets their memory back.
const WORTH_GIVING_BACK: usize = 4 << 20;

struct Interned {
    op: Op,
    args: Vec<usize>,
    ty: Type,
    /// Some step reads it unpacked.
    retained: bool,
    /// It is handed on as soon as it is made.
    handed_on: bool,
    /// Some step takes rows from it, which columns of its packed form can be.
    table: bool,
    packs: BTreeMap<PackKey, Contraction>,
}

/// The constants of all entries of a program.
#[derive(Default)]
pub(crate) struct Constants {
    ids: BTreeMap<(Op, Vec<usize>), usize>,
    interned: Vec<Interned>,
    values: Vec<Option<Value>>,
    packed: BTreeMap<PackKey, Arc<Packed>>,
}

impl Constants {
    /// Loads, computes and packs the constants of `program`.
    pub(crate) fn load(
        program: &RankProgram,
        source: &mut dyn WeightSource,
        progress: &dyn Fn(),
    ) -> Result<Constants, String> {
        let mut constants = Constants::default();
        for entry in &program.entries {
            constants.intern(&entry.graph, &entry.lowering)?;
        }
        for (id, constant) in constants.interned.iter_mut().enumerate() {
            constant.retained |= constant.table && !constant.packs.contains_key(&rows_as_columns(id));
        }
        constants.evaluate(program, source, progress, &mut |_, _| Ok(()))?;
        Ok(constants)
    }

    /// Loads and computes constants and hands those on that `wanted` says of each entry, by their number; the others
    /// that are wanted, of `retained`, stay here. Nothing is packed.
    pub(crate) fn hand_on(
        program: &RankProgram,
        wanted: &[BTreeSet<ValueId>],
        retained: &[BTreeSet<ValueId>],
        source: &mut dyn WeightSource,
        progress: &dyn Fn(),
        take: &mut dyn FnMut(usize, &Value) -> Result<(), String>,
    ) -> Result<Constants, String> {
        let mut constants = Constants::default();
        for ((entry, wanted), retained) in program.entries.iter().zip(wanted).zip(retained) {
            let ids = constants.intern_nodes(&entry.graph, &entry.lowering)?;
            for (value, id) in ids.into_iter().enumerate() {
                let (value, Some(id)) = (ValueId(value as u32), id) else { continue };
                constants.interned[id].handed_on |= wanted.contains(&value);
                constants.interned[id].retained |= retained.contains(&value);
            }
        }
        constants.evaluate(program, source, progress, take)?;
        Ok(constants)
    }

    /// For every value of `graph`, its constant.
    pub(crate) fn of(&self, graph: &Graph, lowering: &Lowering) -> Vec<Option<usize>> {
        let constant = lowering.constant_values(graph);
        let mut ids: Vec<Option<usize>> = Vec::with_capacity(graph.len());
        for (value, node) in graph.values() {
            let args: Option<Vec<usize>> =
                node.args.iter().map(|a| ids.get(a.index()).copied().flatten()).collect();
            let id = args
                .filter(|_| constant[value.index()])
                .and_then(|args| self.ids.get(&(node.op.clone(), args)).copied());
            ids.push(id);
        }
        ids
    }

    pub(crate) fn value(&self, id: usize) -> Option<&Value> {
        self.values.get(id).and_then(Option::as_ref)
    }

    pub(crate) fn packed(&self, id: usize, contraction: &Contraction) -> Option<Arc<Packed>> {
        let (depth, columns) = contraction.column_dims()?;
        self.packed.get(&(id, depth, columns)).cloned()
    }

    /// A constant table whose rows are the columns of a packed matrix, if it is not there as it is.
    pub(crate) fn packed_table(&self, id: usize) -> Option<Arc<Packed>> {
        let packed = self.packed.get(&rows_as_columns(id))?;
        self.value(id).is_none().then(|| packed.clone())
    }

    /// The numbers of the constants of a graph, new ones for those that no graph before had.
    fn intern_nodes(&mut self, graph: &Graph, lowering: &Lowering) -> Result<Vec<Option<usize>>, String> {
        let constant = lowering.constant_values(graph);
        let mut ids: Vec<Option<usize>> = vec![None; graph.len()];
        for (value, node) in graph.values().filter(|(v, _)| constant[v.index()]) {
            let args: Option<Vec<usize>> = node.args.iter().map(|a| ids[a.index()]).collect();
            let args = args.ok_or("a constant of something that is none")?;
            let next = self.interned.len();
            let id = *self.ids.entry((node.op.clone(), args.clone())).or_insert(next);
            if id == next {
                let (op, ty) = (node.op.clone(), node.ty.clone());
                self.interned.push(Interned {
                    op,
                    args,
                    ty,
                    retained: false,
                    handed_on: false,
                    table: false,
                    packs: BTreeMap::new(),
                });
            }
            ids[value.index()] = Some(id);
        }
        Ok(ids)
    }

    fn intern(&mut self, graph: &Graph, lowering: &Lowering) -> Result<(), String> {
        let constant = lowering.constant_values(graph);
        let ids = self.intern_nodes(graph, lowering)?;
        for region in lowering.regions.iter().filter(|r| r.stage == Stage::Step) {
            let contraction = einsum_of(graph, region.kernel, region.result(), &constant)?;
            let columns = contraction
                .as_ref()
                .and_then(|c| graph.node(region.result()).args.get(c.column_operand()).copied());
            for operand in region.operands(graph) {
                let Some(id) = ids[operand.index()] else { continue };
                match (&contraction, contraction.as_ref().and_then(Contraction::column_dims)) {
                    (Some(c), Some((depth, dims)))
                        if columns == Some(operand)
                            && self.interned[id].ty.elements().as_size() != Some(0) =>
                    {
                        self.interned[id].packs.insert((id, depth, dims), c.clone());
                    }
                    _ if is_table(graph, region.result(), operand) => self.interned[id].table = true,
                    _ => self.interned[id].retained = true,
                }
            }
        }
        for output in &graph.outputs {
            if let Some(id) = ids[output.value.index()] {
                self.interned[id].retained = true;
            }
        }
        Ok(())
    }

    fn evaluate(
        &mut self,
        program: &RankProgram,
        source: &mut dyn WeightSource,
        progress: &dyn Fn(),
        take: &mut dyn FnMut(usize, &Value) -> Result<(), String>,
    ) -> Result<(), String> {
        let mut last: Vec<usize> = (0..self.interned.len()).collect();
        for (id, constant) in self.interned.iter().enumerate() {
            for &arg in &constant.args {
                last[arg] = id;
            }
        }
        let mut dropped_at: Vec<Vec<usize>> = vec![Vec::new(); self.interned.len()];
        for id in (0..self.interned.len()).filter(|&id| !self.interned[id].retained) {
            dropped_at[last[id]].push(id);
        }
        self.values = vec![None; self.interned.len()];
        // A constant nobody uses, directly or through others, is not even loaded.
        let mut needed: BTreeSet<usize> = BTreeSet::new();
        // What others are made of has to be there as it is, not only packed.
        let mut operand = vec![false; self.interned.len()];
        for (id, constant) in self.interned.iter().enumerate().rev() {
            if constant.retained || constant.handed_on || !constant.packs.is_empty() || needed.contains(&id) {
                needed.insert(id);
                needed.extend(constant.args.iter().copied());
                constant.args.iter().for_each(|&arg| operand[arg] = true);
            }
        }
        let mut freed = 0;
        for id in needed {
            let constant = &self.interned[id];
            let quantised = self.pack_quantised(constant)?;
            let whole = quantised.len() < constant.packs.len()
                || constant.retained
                || constant.handed_on
                || operand[id];
            self.packed.extend(quantised);
            if whole {
                let value = self.make(id, program, source)?;
                for (key, contraction) in &self.interned[id].packs {
                    if !self.packed.contains_key(key)
                        && let Some(packed) = contraction.pack(&value)?
                    {
                        self.packed.insert(key.clone(), Arc::new(packed));
                    }
                }
                if self.interned[id].handed_on {
                    take(id, &value)?;
                }
                self.values[id] = Some(value);
            }
            for &done in &dropped_at[id] {
                if let Some(value) = self.values[done].take() {
                    freed += value.len() * value.dtype().bits() / 8;
                }
            }
            if freed >= WORTH_GIVING_BACK {
                heap::give_back();
                freed = 0;
            }
            progress();
        }
        Ok(())
    }

    /// A constant whose operands are there.
    fn make(&self, id: usize, program: &RankProgram, source: &mut dyn WeightSource) -> Result<Value, String> {
        let constant = &self.interned[id];
        match &constant.op {
            Op::Weight(expr) => {
                let weight =
                    program.weight(expr).ok_or_else(|| format!("no weight of the program is {expr}"))?;
                Ok(Value::new(source.tensor(weight)?))
            }
            Op::Literal(literal) => Ok(Value::shared(literal.0.clone())),
            op => compute(op, &constant.ty, &self.operands(constant)?),
        }
    }

    fn operands(&self, constant: &Interned) -> Result<Vec<Value>, String> {
        let operands: Option<Vec<Value>> = constant.args.iter().map(|&a| self.values[a].clone()).collect();
        operands.ok_or_else(|| "a constant's operand was dropped too early".into())
    }

    /// Quantised weights packed as they are, for as many products as their layout allows.
    fn pack_quantised(&self, constant: &Interned) -> Result<BTreeMap<PackKey, Arc<Packed>>, String> {
        let mut packed = BTreeMap::new();
        let Op::Dequant { axis, block } = constant.op else { return Ok(packed) };
        let operands = self.operands(constant)?;
        for (key, contraction) in &constant.packs {
            if let Some(found) = contraction.pack_quantised(axis, block, &operands)? {
                packed.insert(key.clone(), Arc::new(found));
            }
        }
        Ok(packed)
    }
}

/// How a table of rows is packed for products with each of them.
fn rows_as_columns(id: usize) -> PackKey {
    (id, vec![1], vec![0])
}

/// True if `value` takes rows of `f32` from `operand`, and needs nothing else of it.
fn is_table(graph: &Graph, value: ValueId, operand: ValueId) -> bool {
    let (node, ty) = (graph.node(value), graph.ty(operand));
    matches!(node.op, Op::Gather { axis: 0, .. })
        && ty.dtype == DType::F32
        && ty.rank() == 2
        && node.args.first() == Some(&operand)
        && node.args.get(1) != Some(&operand)
}

/// The contraction of an einsum region that may take a packed operand.
pub(crate) fn einsum_of(
    graph: &Graph,
    kernel: Kernel,
    result: ValueId,
    constant: &[bool],
) -> Result<Option<Contraction>, String> {
    let node = graph.node(result);
    match (&node.op, node.args.as_slice()) {
        (Op::Einsum(spec), [a, b]) if kernel == Kernel::Einsum => {
            Contraction::new(spec, [constant[a.index()], constant[b.index()]]).map(Some)
        }
        _ => Ok(None),
    }
}

/// One node on its own, with constant operands.
fn compute(op: &Op, ty: &Type, args: &[Value]) -> Result<Value, String> {
    let mut graph = Graph::new("constant");
    let mut operands = Vec::new();
    for (i, arg) in args.iter().enumerate() {
        let shape = arg.shape().iter().map(|&d| d.into()).collect();
        operands.push(graph.input(&i.to_string(), Type::new(arg.dtype(), shape)));
    }
    let result = graph.add_typed(op.clone(), &operands, ty.clone());
    graph.outputs.push(tpshard_ir::Output { name: "constant".into(), value: result });
    let lowering = lower(&graph);
    let region = lowering.regions.last().ok_or("a constant without region")?;
    let bindings = Bindings::new();
    let context = Context { bindings: &bindings, graph: &graph };
    let shape = context.shape(ty)?;
    run_kernel(&context, region, &shape, args, Vec::new(), Made::default()).map_err(|error| match error {
        StepError::Local(what) => what,
        StepError::Index { index, extent } => format!("index {index} is outside of a table of {extent}"),
        StepError::Collective(error) => error.to_string(),
    })
}
