//! Whole graphs: one rank, N ranks in lockstep, and programs against their logical inputs and outputs.

use super::convert::convert;
use super::eval::{Context, WeightSource, check_limit, concrete_shape};
use super::family::{Split, decode, encode};
use super::{Array, Domain, OpError, Real, eval_op, eval_weight};
use crate::border;
use crate::deferred::{DeferredCall, Evaluator, bind_result, no_evaluator};
use crate::dim::{Bindings, Dim};
use crate::graph::{Graph, Guard, Node, Relation, Type, ValueId};
use crate::layout::Mesh;
use crate::op::Op;
use crate::spmd::{InstantiateError, Spmd, StepKind, instantiate};
use crate::tensor::Tensor;
use crate::verify::VerifyErrors;
use crate::weight::WeightExpr;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Arrays by input name.
pub type Inputs<E> = BTreeMap<Arc<str>, Array<E>>;
/// The results in the order of the graph's outputs.
pub type Outputs<E> = Vec<(Arc<str>, Array<E>)>;

/// Gives all results of a deferred call on operands, none larger than the limit.
pub type DeferredSource<'a, E> =
    dyn Fn(&DeferredCall, &[&Array<E>], usize) -> Result<Vec<Array<E>>, OpError> + 'a;

/// Gives the array of an input node of a rank, by rank, value and input name.
pub type RankInputs<'a, E> = dyn Fn(usize, ValueId, &str) -> Option<Array<E>> + 'a;
/// What every rank holds, by value.
type Families<E> = BTreeMap<ValueId, Vec<Array<E>>>;

/// Why a graph has no result.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum InterpError {
    #[error("input `{name}` is missing\nhelp: give a value of type {ty}")]
    MissingInput { name: String, ty: String },
    #[error("input `{name}` is {found}, the graph expects {expected}")]
    InputType { name: String, expected: String, found: String },
    #[error(
        "dim `{symbol}` is {first} by input `{first_input}`, but {second} by input `{second_input}`\n\
         help: give inputs whose shapes agree"
    )]
    Conflict { symbol: String, first: i64, first_input: String, second: i64, second_input: String },
    #[error("dim `{symbol}` of input `{input}` is {value}, allowed are {low} to {high}")]
    Range { symbol: String, input: String, value: i64, low: i64, high: i64 },
    #[error("`{fact}` does not hold: {left} and {right} ({reason})")]
    Guard { fact: String, left: String, right: String, reason: String },
    #[error("rank {rank}, {value} = {op}{origin}: {error}")]
    Node { rank: usize, value: ValueId, op: String, origin: String, error: OpError },
    #[error("output `{name}` names {value}, which does not exist")]
    MissingOutput { name: String, value: ValueId },
    #[error("the ranks' graphs do not run together: {0}")]
    Ranks(String),
    #[error("the program is not well formed:\n{0}")]
    Verify(#[from] VerifyErrors),
    #[error(transparent)]
    Instantiate(#[from] InstantiateError),
    #[error("input `{name}`: {error}")]
    Encode { name: String, error: OpError },
    #[error("output `{name}`: {error}")]
    Decode { name: String, error: OpError },
}

/// Runs graphs in a domain.
pub struct Interpreter<'a, D: Domain> {
    pub domain: &'a D,
    /// Values of weights.
    pub weights: &'a WeightSource<'a, D::Element>,
    /// Most elements alive at one time, over all ranks.
    pub element_limit: usize,
    /// Results of deferred calls; graphs that have some cannot be run without.
    pub deferred: Option<&'a DeferredSource<'a, D::Element>>,
}

/// The values of symbols that inputs of these types give; checks element types, ranks, ranges and guards.
///
/// # Errors
/// An input is missing or of another type, two inputs disagree, a value is out of range or a guard does not hold.
pub fn bind_symbols(
    graph: &Graph,
    input_type: &dyn Fn(&str) -> Option<Type>,
) -> Result<Bindings, InterpError> {
    let mut dims: Vec<(&Dim, i64, &str)> = Vec::new();
    for (_, name, ty) in graph.inputs() {
        let found = input_type(name)
            .ok_or_else(|| InterpError::MissingInput { name: name.to_string(), ty: ty.to_string() })?;
        let extents: Option<Vec<i64>> = found.shape.iter().map(Dim::as_const).collect();
        let Some(extents) = extents.filter(|e| e.len() == ty.rank() && found.dtype == ty.dtype) else {
            return Err(input_type_error(name, ty, &found));
        };
        dims.extend(ty.shape.iter().zip(extents).map(|(dim, extent)| (dim, extent, &**name)));
    }
    let bindings = solve(&dims, graph)?;
    for (_, name, ty) in graph.inputs() {
        let found = input_type(name).unwrap_or_else(|| ty.clone());
        let fits = ty.shape.iter().zip(&found.shape).all(|(d, e)| d.eval(&bindings).ok() == e.as_const());
        if !fits {
            return Err(input_type_error(name, ty, &found));
        }
    }
    check_guards(graph, &bindings, &graph.data_symbols())?;
    Ok(bindings)
}

/// Checks the guards that mention none of the symbols of `later`.
///
/// # Errors
/// The first guard that does not hold.
pub fn check_guards(
    graph: &Graph,
    bindings: &Bindings,
    later: &BTreeSet<Arc<str>>,
) -> Result<(), InterpError> {
    let waits = |guard: &Guard| {
        let mut symbols = guard.left.symbols().into_iter().chain(guard.right.symbols());
        symbols.any(|symbol| later.contains(&symbol))
    };
    if let Some(guard) = graph.broken_guards(bindings).into_iter().find(|guard| !waits(guard)) {
        let relation = match guard.relation {
            Relation::Equal => "==",
            Relation::LessEqual => "<=",
        };
        let value = |dim: &Dim| dim.eval(bindings).map_or_else(|e| e.to_string(), |v| v.to_string());
        return Err(InterpError::Guard {
            fact: format!("{} {relation} {}", guard.left, guard.right),
            left: value(&guard.left),
            right: value(&guard.right),
            reason: guard.reason.to_string(),
        });
    }
    Ok(())
}

fn input_type_error(name: &str, expected: &Type, found: &Type) -> InterpError {
    InterpError::InputType { name: name.into(), expected: expected.to_string(), found: found.to_string() }
}

/// Plain symbols first, then dims that are linear in one symbol without value, until nothing is learnt.
pub(crate) fn solve(dims: &[(&Dim, i64, &str)], graph: &Graph) -> Result<Bindings, InterpError> {
    let mut bindings = Bindings::new();
    let mut sources: BTreeMap<Arc<str>, &str> = BTreeMap::new();
    let mut learn = |bindings: &mut Bindings, symbol: &Arc<str>, value: i64, input| {
        if let Some(&first) = bindings.get(symbol) {
            if first == value {
                return Ok(());
            }
            let first_input = sources.get(symbol).copied().unwrap_or_default().to_string();
            let (symbol, second_input) = (symbol.to_string(), String::from(input));
            return Err(InterpError::Conflict { symbol, first, first_input, second: value, second_input });
        }
        if let Some(range) = graph.symbols.get(symbol)
            && !(range.low..=range.high).contains(&value)
        {
            let (symbol, input) = (symbol.to_string(), String::from(input));
            return Err(InterpError::Range { symbol, input, value, low: range.low, high: range.high });
        }
        bindings.insert(symbol.clone(), value);
        sources.insert(symbol.clone(), input);
        Ok(())
    };
    for &(dim, extent, input) in dims {
        if let Some(symbol) = dim.as_symbol() {
            learn(&mut bindings, symbol, extent, input)?;
        }
    }
    loop {
        let before = bindings.len();
        for &(dim, extent, input) in dims {
            if let Some((symbol, value)) = solve_linear(dim, extent, &bindings) {
                learn(&mut bindings, &symbol, value, input)?;
            }
        }
        if bindings.len() == before {
            return Ok(bindings);
        }
    }
}

/// The value of the only symbol of `dim` that has none, if `dim` grows evenly with it.
pub(crate) fn solve_linear(dim: &Dim, extent: i64, bindings: &Bindings) -> Option<(Arc<str>, i64)> {
    let mut unbound = dim.symbols().into_iter().filter(|s| !bindings.contains_key(s));
    let symbol = unbound.next()?;
    if unbound.next().is_some() {
        return None;
    }
    let at = |value: i64| {
        let mut with = bindings.clone();
        with.insert(symbol.clone(), value);
        dim.eval(&with).ok()
    };
    let (offset, slope) = (at(0)?, at(1)?.checked_sub(at(0)?)?);
    let value = extent.checked_sub(offset)?.checked_div(slope)?;
    (value >= 0 && at(value)? == extent).then_some((symbol, value))
}

impl<D: Domain> Interpreter<'_, D> {
    /// Runs a graph on one rank.
    ///
    /// # Errors
    /// As [`bind_symbols`], or a node that cannot be computed.
    pub fn run(
        &self,
        graph: &Graph,
        inputs: &Inputs<D::Element>,
    ) -> Result<Outputs<D::Element>, InterpError> {
        let bindings = bind_symbols(graph, &|name| inputs.get(name).map(Array::ty))?;
        let lookup = |_, _, name: &str| inputs.get(name).cloned();
        let graphs = std::slice::from_ref(graph);
        let mut outputs = self.run_ranks(graphs, &Mesh::flat(1), &bindings, &lookup)?;
        Ok(outputs.pop().unwrap_or_default())
    }

    /// Runs one graph per rank of `mesh` in lockstep. `input` gives the array of an input node of a rank; `bindings`
    /// are those of the logical graph, since local shapes do not determine them.
    ///
    /// # Errors
    /// The graphs differ in length or in their conversions, or a node cannot be computed.
    pub fn run_ranks(
        &self,
        graphs: &[Graph],
        mesh: &Mesh,
        bindings: &Bindings,
        input: &RankInputs<'_, D::Element>,
    ) -> Result<Vec<Outputs<D::Element>>, InterpError> {
        let first = check_ranks(graphs, mesh)?;
        let mut state = State {
            interpreter: self,
            graphs,
            mesh,
            bindings: bindings.clone(),
            input,
            values: vec![vec![None; first.len()]; graphs.len()],
            alive: 0,
            open: first.data_symbols().into_iter().filter(|s| !bindings.contains_key(s)).collect(),
            results: BTreeMap::new(),
        };
        for (at, done) in last_used_by(graphs).into_iter().enumerate() {
            state.step(at)?;
            state.forget(&done);
        }
        (0..graphs.len()).map(|rank| state.outputs(rank)).collect()
    }

    /// Runs all ranks of a program on logical inputs and decodes its outputs.
    ///
    /// # Errors
    /// The program is not well formed, as [`Interpreter::run_ranks`], or outputs that do not decode.
    pub fn run_program(
        &self,
        program: &Spmd,
        inputs: &Inputs<D::Element>,
        split: Split,
    ) -> Result<Outputs<D::Element>, InterpError> {
        crate::verify::check(program)?;
        let bindings = bind_symbols(&program.logical, &|name| inputs.get(name).map(Array::ty))?;
        let ranks = program.mesh.ranks();
        let graphs = (0..ranks).map(|rank| instantiate(program, rank)).collect::<Result<Vec<_>, _>>()?;
        let families = self.input_families(program, inputs, &bindings, split)?;
        let lookup = |rank: usize, value: ValueId, _: &str| families.get(&value)?.get(rank).cloned();
        let mut results = self.run_ranks(&graphs, &program.mesh, &bindings, &lookup)?;
        let mut decoded = Vec::with_capacity(program.outputs.len());
        for output in program.outputs.iter().rev() {
            let name = &output.name;
            let family: Vec<_> = results.iter_mut().filter_map(|r| r.pop()).map(|(_, array)| array).collect();
            let step = program.steps.get(output.step.index()).ok_or_else(|| InterpError::MissingOutput {
                name: name.to_string(),
                value: ValueId(output.step.0),
            })?;
            let logical = decode(self.domain, &family, &step.layout, &program.mesh)
                .map_err(|error| InterpError::Decode { name: name.to_string(), error })?;
            decoded.push((name.clone(), logical));
        }
        decoded.reverse();
        Ok(decoded)
    }

    /// What every rank holds of each input step.
    fn input_families(
        &self,
        program: &Spmd,
        inputs: &Inputs<D::Element>,
        bindings: &Bindings,
        split: Split,
    ) -> Result<Families<D::Element>, InterpError> {
        let mut families = BTreeMap::new();
        for (i, step) in program.steps.iter().enumerate() {
            let Some(Node { op: Op::Input { name }, ty, .. }) =
                program.logical.nodes().get(step.value.index())
            else {
                continue;
            };
            if step.kind != StepKind::Compute {
                continue;
            }
            let missing = || InterpError::MissingInput { name: name.to_string(), ty: ty.to_string() };
            let logical = inputs.get(name).ok_or_else(missing)?;
            let family = encode(self.domain, logical, &step.layout, &program.mesh, bindings, split)
                .map_err(|error| InterpError::Encode { name: name.to_string(), error })?;
            families.insert(ValueId(i as u32), family);
        }
        Ok(families)
    }
}

/// The first graph, if all can run in lockstep.
fn check_ranks<'a>(graphs: &'a [Graph], mesh: &Mesh) -> Result<&'a Graph, InterpError> {
    let Some(first) = graphs.first().filter(|_| graphs.len() == mesh.ranks()) else {
        return Err(InterpError::Ranks(format!("{} graphs on a mesh of {mesh}", graphs.len())));
    };
    for (rank, graph) in graphs.iter().enumerate() {
        if graph.len() != first.len() {
            let (found, expected) = (graph.len(), first.len());
            return Err(InterpError::Ranks(format!("rank {rank} has {found} nodes, rank 0 {expected}")));
        }
        for (i, (own, other)) in graph.nodes().iter().zip(first.nodes()).enumerate() {
            let (a, b) = (conversion(own), conversion(other));
            if a != b {
                let value = ValueId(i as u32);
                let what =
                    format!("{value} is {} on rank {rank}, {} on rank 0", own.op.name(), other.op.name());
                return Err(InterpError::Ranks(what));
            }
        }
    }
    Ok(first)
}

fn conversion(node: &Node) -> Option<&crate::op::Conversion> {
    if let Op::Convert(conversion) = &node.op { Some(conversion) } else { None }
}

/// For each node the values that no later node uses on any rank; outputs are in no list.
fn last_used_by(graphs: &[Graph]) -> Vec<Vec<usize>> {
    let length = graphs.first().map_or(0, Graph::len);
    let mut last: Vec<usize> = (0..length).collect();
    for graph in graphs {
        let uses =
            graph.nodes().iter().enumerate().flat_map(|(i, n)| n.args.iter().map(move |a| (a.index(), i)));
        let outputs = graph.outputs.iter().map(|output| (output.value.index(), usize::MAX));
        for (value, user) in uses.chain(outputs) {
            if let Some(latest) = last.get_mut(value) {
                *latest = user.max(*latest);
            }
        }
    }
    let mut done = vec![Vec::new(); length];
    for (value, user) in last.into_iter().enumerate() {
        if let Some(list) = done.get_mut(user) {
            list.push(value);
        }
    }
    done
}

/// Rank, call and operands.
type ResultKey = (usize, Arc<DeferredCall>, Vec<ValueId>);

struct State<'a, D: Domain> {
    interpreter: &'a Interpreter<'a, D>,
    graphs: &'a [Graph],
    mesh: &'a Mesh,
    /// Those of the inputs, and of what deferred results have defined so far.
    bindings: Bindings,
    input: &'a RankInputs<'a, D::Element>,
    /// By rank, then node.
    values: Vec<Vec<Option<Array<D::Element>>>>,
    alive: usize,
    /// Symbols without value yet.
    open: BTreeSet<Arc<str>>,
    /// Results of deferred calls that other nodes will ask for.
    results: BTreeMap<ResultKey, Vec<Option<Array<D::Element>>>>,
}

impl<D: Domain> State<'_, D> {
    fn step(&mut self, at: usize) -> Result<(), InterpError> {
        let converts =
            self.graphs.first().and_then(|g| g.nodes().get(at)).is_some_and(|n| conversion(n).is_some());
        for rank in 0..self.graphs.len() {
            if self.values[rank][at].is_some() {
                continue;
            }
            if converts {
                self.convert(rank, at)?;
            } else {
                let deferred = matches!(self.graphs[rank].nodes()[at].op, Op::Deferred { .. });
                let value = if deferred { self.deferred(rank, at)? } else { self.compute(rank, at)? };
                self.keep(rank, at, value)?;
            }
        }
        Ok(())
    }

    fn error(&self, rank: usize, at: usize, error: OpError) -> InterpError {
        let node = &self.graphs[rank].nodes()[at];
        let origin = if node.origin.is_empty() { String::new() } else { format!(" ({})", node.origin) };
        InterpError::Node { rank, value: ValueId(at as u32), op: node.op.name().into(), origin, error }
    }

    fn limit(&self) -> usize {
        self.interpreter.element_limit.saturating_sub(self.alive)
    }

    /// Operand `arg` of node `at`.
    fn operand(&self, rank: usize, at: usize, arg: ValueId) -> Result<&Array<D::Element>, InterpError> {
        let value = self.values[rank].get(arg.index()).and_then(Option::as_ref);
        value.ok_or_else(|| {
            let what = format!("operand {arg} is not an earlier value");
            self.error(rank, at, OpError::Other(what))
        })
    }

    fn compute(&self, rank: usize, at: usize) -> Result<Array<D::Element>, InterpError> {
        let node = &self.graphs[rank].nodes()[at];
        if let Op::Input { name } = &node.op {
            let value = (self.input)(rank, ValueId(at as u32), name);
            return value.ok_or_else(|| InterpError::MissingInput {
                name: name.to_string(),
                ty: node.ty.to_string(),
            });
        }
        let args = node
            .args
            .iter()
            .map(|&arg| self.operand(rank, at, arg))
            .collect::<Result<Vec<_>, InterpError>>()?;
        let context = Context {
            bindings: &self.bindings,
            weights: self.interpreter.weights,
            element_limit: self.limit(),
        };
        eval_op(self.interpreter.domain, &node.op, &node.ty, &args, &context)
            .map_err(|error| self.error(rank, at, error))
    }

    /// A result of a deferred call; the symbols it defines get their values.
    fn deferred(&mut self, rank: usize, at: usize) -> Result<Array<D::Element>, InterpError> {
        let graphs = self.graphs;
        let node = &graphs[rank].nodes()[at];
        let Op::Deferred { call, output, ty } = &node.op else { return self.compute(rank, at) };
        let key = (rank, call.clone(), node.args.clone());
        let known = self.results.get_mut(&key).and_then(|all| all.get_mut(*output)).and_then(Option::take);
        let value = match known {
            Some(value) => value,
            None => {
                let mut all = self.call(rank, at, call)?;
                let value = all.get_mut(*output).and_then(Option::take);
                let missing = || OpError::Other(format!("the call has no result {output}"));
                let value = value.ok_or_else(|| self.error(rank, at, missing()))?;
                let wanted = |other: usize| {
                    graphs[rank].nodes().iter().skip(at + 1).any(|n| {
                        matches!(&n.op, Op::Deferred { call: c, output: o, .. } if o == &other && c == call)
                            && n.args == node.args
                    })
                };
                for (other, result) in all.iter_mut().enumerate() {
                    if result.is_some() && !wanted(other) {
                        *result = None;
                    }
                }
                if all.iter().any(Option::is_some) {
                    self.results.insert(key, all);
                }
                value
            }
        };
        let symbols = &self.graphs[rank].symbols;
        bind_result(ty, &value.ty(), symbols, &mut self.bindings)
            .map_err(|what| self.error(rank, at, OpError::Other(what)))?;
        if !self.open.is_empty() {
            let before = self.open.len();
            let bindings = &self.bindings;
            self.open.retain(|symbol| !bindings.contains_key(symbol));
            if self.open.len() < before {
                check_guards(&self.graphs[rank], &self.bindings, &self.open)?;
            }
        }
        Ok(value)
    }

    fn call(
        &self,
        rank: usize,
        at: usize,
        call: &DeferredCall,
    ) -> Result<Vec<Option<Array<D::Element>>>, InterpError> {
        let source = self.interpreter.deferred;
        let source = source.ok_or_else(|| self.error(rank, at, OpError::Other(no_evaluator(call))))?;
        let args = self.graphs[rank].nodes()[at].args.iter();
        let args = args.map(|&arg| self.operand(rank, at, arg)).collect::<Result<Vec<_>, InterpError>>()?;
        let results = source(call, &args, self.limit()).map_err(|error| self.error(rank, at, error))?;
        Ok(results.into_iter().map(Some).collect())
    }

    /// Converts what the group of `rank` holds, for all of its members.
    fn convert(&mut self, rank: usize, at: usize) -> Result<(), InterpError> {
        let node = &self.graphs[rank].nodes()[at];
        let Some(conversion) = conversion(node) else { return Ok(()) };
        let axes = conversion.axes();
        let extents: Option<Vec<usize>> = axes.iter().map(|&axis| self.mesh.0.get(axis).copied()).collect();
        let ascending = axes.windows(2).all(|pair| pair[0] < pair[1]);
        let Some(extents) = extents.filter(|_| ascending) else {
            let what = format!("mesh axes {axes:?} of mesh {}", self.mesh);
            return Err(self.error(rank, at, OpError::Other(what)));
        };
        let group = self.mesh.group(rank, axes);
        let mut parts = Vec::with_capacity(group.len());
        for &member in &group {
            let Some(&arg) = self.graphs[member].nodes()[at].args.first() else {
                return Err(self.error(member, at, OpError::other("has no operand")));
            };
            parts.push(self.operand(member, at, arg)?);
        }
        let results = convert(self.interpreter.domain, conversion, &extents, &parts, &self.bindings)
            .map_err(|error| self.error(rank, at, error))?;
        for (member, value) in group.into_iter().zip(results) {
            self.keep(member, at, value)?;
        }
        Ok(())
    }

    /// Stores a value that is of its declared type and within the limit.
    fn keep(&mut self, rank: usize, at: usize, value: Array<D::Element>) -> Result<(), InterpError> {
        let declared = &self.graphs[rank].nodes()[at].ty;
        let shape = concrete_shape(declared, &self.bindings).map_err(|error| self.error(rank, at, error))?;
        if value.dtype != declared.dtype || value.shape() != shape {
            let what = format!("is {}, but {declared} = {shape:?} is declared", value.ty());
            return Err(self.error(rank, at, OpError::Other(what)));
        }
        self.alive += check_limit(&shape, self.limit()).map_err(|error| self.error(rank, at, error))?;
        self.values[rank][at] = Some(value);
        Ok(())
    }

    fn forget(&mut self, values: &[usize]) {
        for &value in values {
            for rank in &mut self.values {
                if let Some(array) = rank[value].take() {
                    self.alive -= array.elements().len();
                }
            }
        }
    }

    fn outputs(&self, rank: usize) -> Result<Outputs<D::Element>, InterpError> {
        let value = |output: &crate::graph::Output| {
            let found = self.values[rank].get(output.value.index()).cloned().flatten();
            found.map(|array| (output.name.clone(), array)).ok_or_else(|| InterpError::MissingOutput {
                name: output.name.to_string(),
                value: output.value,
            })
        };
        self.graphs[rank].outputs.iter().map(value).collect()
    }
}

/// Runs a graph on tensors, in [`Real`], with weights from initializers.
///
/// # Errors
/// As [`Interpreter::run`].
pub fn run_tensors(
    graph: &Graph,
    inputs: &BTreeMap<Arc<str>, Tensor>,
    initializer: &dyn Fn(&str) -> Result<Tensor, OpError>,
    element_limit: usize,
) -> Result<Vec<(Arc<str>, Tensor)>, InterpError> {
    run_tensors_with(graph, inputs, initializer, element_limit, None)
}

/// As [`run_tensors`], with what gives deferred calls their meaning.
///
/// # Errors
/// As [`Interpreter::run`].
pub fn run_tensors_with(
    graph: &Graph,
    inputs: &BTreeMap<Arc<str>, Tensor>,
    initializer: &dyn Fn(&str) -> Result<Tensor, OpError>,
    element_limit: usize,
    evaluator: Option<&dyn Evaluator>,
) -> Result<Vec<(Arc<str>, Tensor)>, InterpError> {
    let rounded = border::rounded(graph, inputs);
    let inputs = rounded.as_ref().unwrap_or(inputs);
    let changes = border::changes(graph, &|name| inputs.get(name).map(Tensor::ty));
    let (adapted, presents) = border::adapted(inputs, &changes).unzip();
    let inputs = adapted.as_ref().unwrap_or(inputs);
    let arrays = inputs.iter().map(|(name, tensor)| (name.clone(), Real.import(tensor))).collect();
    let mut outputs = run_arrays_with(graph, &arrays, initializer, element_limit, evaluator)?;
    for present in presents.into_iter().flatten() {
        for (name, tensor) in outputs.iter_mut().filter(|(name, _)| *name == present.output) {
            *tensor = present.filled(tensor).map_err(|what| InterpError::Decode {
                name: name.to_string(),
                error: OpError::Other(what),
            })?;
        }
    }
    for (name, tensor) in &mut outputs {
        if let Some(out) = border::handed_out(graph, name, tensor) {
            *tensor = out;
        }
    }
    Ok(outputs)
}

/// As [`run_tensors_with`], for inputs that are used more than once.
///
/// # Errors
/// As [`run_tensors_with`].
pub fn run_arrays_with(
    graph: &Graph,
    arrays: &BTreeMap<Arc<str>, Array<super::Num>>,
    initializer: &dyn Fn(&str) -> Result<Tensor, OpError>,
    element_limit: usize,
    evaluator: Option<&dyn Evaluator>,
) -> Result<Vec<(Arc<str>, Tensor)>, InterpError> {
    let weights = |expr: &WeightExpr| Ok(Real.import(&eval_weight(expr, initializer, element_limit)?));
    let deferred = |call: &DeferredCall, operands: &[&Array<super::Num>], limit: usize| {
        let evaluator = evaluator.ok_or_else(|| OpError::Other(no_evaluator(call)))?;
        let tensors = operands.iter().map(|array| Real.export(array)).collect::<Result<Vec<_>, OpError>>()?;
        let operands: Vec<&Tensor> = tensors.iter().collect();
        let results = evaluator.evaluate(call, &operands, limit).map_err(OpError::Other)?;
        Ok(results.iter().map(|tensor| Real.import(tensor)).collect())
    };
    let interpreter =
        Interpreter { domain: &Real, weights: &weights, element_limit, deferred: Some(&deferred) };
    let outputs = interpreter.run(graph, arrays)?;
    let export = |(name, array): (Arc<str>, Array<_>)| match Real.export(&array) {
        Ok(tensor) => Ok((name, tensor)),
        Err(error) => Err(InterpError::Decode { name: name.to_string(), error }),
    };
    outputs.into_iter().map(export).collect()
}
