//! Programs, random tensors and comparisons for the executor's tests.
#![allow(dead_code, unreachable_pub, reason = "each test file uses a part")]

use std::collections::BTreeMap;
use std::sync::Arc;
use tpshard_ir::interp::{DEFAULT_ELEMENT_LIMIT, run_tensors};
use tpshard_ir::layout::{AxisLayout, Layout, Mesh};
use tpshard_ir::op::Op;
use tpshard_ir::program::RankProgram;
use tpshard_ir::weight::{WeightExpr, WeightKind};
use tpshard_ir::{
    Conversion, DType, Data, Dim, Graph, Output, Spmd, SpmdOutput, Step, StepId, StepKind, Tensor, Type,
    ValueId,
};
use tpshard_runtime::comm::{CommOptions, Communicator, threads};
use tpshard_runtime::cpu::MemoryWeights;
use tpshard_runtime::session::{Results, Session, SessionError, SessionOptions};

/// A small deterministic generator.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// Between -2 and 2.
    pub fn float(&mut self) -> f32 {
        (self.next() % 4001) as f32 / 1000.0 - 2.0
    }

    pub fn tensor(&mut self, dtype: DType, shape: &[usize]) -> Tensor {
        let n: usize = shape.iter().product();
        let data = match dtype {
            DType::F32 => Data::F32((0..n).map(|_| self.float()).collect()),
            DType::F16 => Data::F16((0..n).map(|_| half::f16::from_f32(self.float())).collect()),
            DType::BF16 => Data::BF16((0..n).map(|_| half::bf16::from_f32(self.float())).collect()),
            DType::F64 => Data::F64((0..n).map(|_| f64::from(self.float())).collect()),
            DType::I64 => Data::I64((0..n).map(|_| self.below(7) as i64 - 3).collect()),
            DType::I32 => Data::I32((0..n).map(|_| self.below(7) as i32 - 3).collect()),
            DType::I8 => Data::I8((0..n).map(|_| self.below(256) as u8 as i8).collect()),
            DType::U8 => Data::U8((0..n).map(|_| self.below(256) as u8).collect()),
            DType::Bool => Data::Bool((0..n).map(|_| self.below(2) == 1).collect()),
            other => {
                let bytes = other.byte_len(n as u64).unwrap() as usize;
                Data::Raw(other, (0..bytes).map(|_| self.below(256) as u8).collect())
            }
        };
        Tensor::new(shape.to_vec(), data).unwrap()
    }
}

pub fn ty(dtype: DType, shape: &[usize]) -> Type {
    Type::new(dtype, shape.iter().map(|&d| Dim::from(d)).collect())
}

pub fn dim(name: &str) -> Dim {
    Dim::symbol(name)
}

pub fn weight(graph: &mut Graph, name: &str, dtype: DType, shape: &[usize]) -> ValueId {
    let expr = WeightExpr::initializer(name, dtype, shape.to_vec()).unwrap();
    graph.add(Op::Weight(expr), &[]).unwrap()
}

pub fn output(graph: &mut Graph, name: &str, value: ValueId) {
    graph.outputs.push(Output { name: name.into(), value });
}

/// A program written step by step; unless said otherwise steps compute replicated values.
pub struct Builder {
    pub spmd: Spmd,
    /// The latest step of every value.
    pub of: BTreeMap<ValueId, StepId>,
}

impl Builder {
    pub fn new(logical: Graph, mesh: Mesh) -> Builder {
        let imported = logical.len();
        let spmd = Spmd { mesh, logical, imported, equations: vec![], steps: vec![], outputs: vec![] };
        Builder { spmd, of: BTreeMap::new() }
    }

    pub fn compute(&mut self, value: ValueId, layout: Layout) -> StepId {
        let args = self.spmd.logical.node(value).args.iter().map(|a| self.of[a]).collect();
        self.push(value, Step { value, layout, kind: StepKind::Compute, args })
    }

    pub fn convert(&mut self, value: ValueId, layout: Layout, conversion: Conversion) -> StepId {
        let args = vec![self.of[&value]];
        self.push(value, Step { value, layout, kind: StepKind::Convert(conversion), args })
    }

    fn push(&mut self, value: ValueId, step: Step) -> StepId {
        let id = StepId(self.spmd.steps.len() as u32);
        self.spmd.steps.push(step);
        self.of.insert(value, id);
        id
    }

    pub fn finish(mut self) -> Spmd {
        for output in &self.spmd.logical.outputs {
            let step = self.of[&output.value];
            self.spmd.outputs.push(SpmdOutput { name: output.name.clone(), step });
        }
        self.spmd
    }
}

/// Every rank computes everything.
pub fn replicated(logical: Graph, ranks: usize) -> Spmd {
    let mesh = Mesh::flat(ranks);
    let layout = Layout::replicated(&mesh);
    let values: Vec<ValueId> = logical.values().map(|(v, _)| v).collect();
    let mut builder = Builder::new(logical, mesh);
    for value in values {
        builder.compute(value, layout.clone());
    }
    builder.finish()
}

pub fn shard(dim: usize, unit: usize) -> Layout {
    Layout(vec![AxisLayout::shard(dim, unit)])
}

/// The part of `whole` that a weight expression asks for; only slices of initializers occur here.
fn evaluate(expr: &WeightExpr, weights: &BTreeMap<String, Tensor>) -> Tensor {
    tpshard_ir::interp::eval_weight(expr, &|name: &str| Ok(weights[name].clone()), DEFAULT_ELEMENT_LIMIT)
        .unwrap()
}

pub fn rank_weights(program: &RankProgram, weights: &BTreeMap<String, Tensor>) -> MemoryWeights {
    let tensors = program.weights.iter().map(|w| (w.name.clone(), evaluate(&w.expr, weights))).collect();
    MemoryWeights { tensors, hash: None }
}

pub fn random_weights(graph: &Graph, random: &mut Random) -> BTreeMap<String, Tensor> {
    let mut weights = BTreeMap::new();
    for node in graph.nodes() {
        if let Op::Weight(expr) = &node.op
            && let WeightKind::Initializer { name } = expr.kind()
        {
            weights.entry(name.clone()).or_insert_with(|| random.tensor(expr.dtype(), expr.shape()));
        }
    }
    weights
}

pub fn options() -> SessionOptions {
    SessionOptions { threads: Some(2), ..SessionOptions::default() }
}

pub fn open(
    spmd: &Spmd,
    rank: usize,
    weights: &BTreeMap<String, Tensor>,
    communicator: Box<dyn Communicator>,
    options: &SessionOptions,
) -> Result<Session, SessionError> {
    let program = RankProgram::from_spmd(spmd, rank).unwrap();
    let mut source = rank_weights(&program, weights);
    Session::open(program, &mut source, communicator, options)
}

/// Runs `body` as every rank, on threads, and returns what each returned.
pub fn on_ranks<T: Send>(
    spmd: &Spmd,
    weights: &BTreeMap<String, Tensor>,
    options: &SessionOptions,
    body: impl Fn(usize, Result<Session, SessionError>) -> T + Sync,
) -> Vec<T> {
    let ends = threads(spmd.mesh.ranks(), &CommOptions::default()).unwrap();
    std::thread::scope(|scope| {
        let handles: Vec<_> = ends
            .into_iter()
            .enumerate()
            .map(|(rank, end)| {
                let body = &body;
                scope.spawn(move || body(rank, open(spmd, rank, weights, end, options)))
            })
            .collect();
        handles.into_iter().map(|h| h.join().unwrap()).collect()
    })
}

/// Runs a program once on all ranks; the result of rank 0.
pub fn run(
    spmd: &Spmd,
    weights: &BTreeMap<String, Tensor>,
    inputs: &BTreeMap<String, Tensor>,
) -> Result<Results, SessionError> {
    let results = on_ranks(spmd, weights, &options(), |rank, session| {
        let mut session = session?;
        let none = BTreeMap::new();
        session.run(if rank == 0 { inputs } else { &none })
    });
    results.into_iter().next().unwrap()
}

pub fn reference(
    graph: &Graph,
    weights: &BTreeMap<String, Tensor>,
    inputs: &BTreeMap<String, Tensor>,
) -> Vec<(Arc<str>, Tensor)> {
    let inputs = inputs.iter().map(|(k, v)| (Arc::from(k.as_str()), v.clone())).collect();
    run_tensors(graph, &inputs, &|name: &str| Ok(weights[name].clone()), DEFAULT_ELEMENT_LIMIT).unwrap()
}

fn floats(tensor: &Tensor) -> Option<Vec<f64>> {
    Some(match tensor.data() {
        Data::F32(v) => v.iter().map(|&x| x.into()).collect(),
        Data::F64(v) => v.clone(),
        Data::F16(v) => v.iter().map(|x| x.to_f64()).collect(),
        Data::BF16(v) => v.iter().map(|x| x.to_f64()).collect(),
        _ => return None,
    })
}

pub fn assert_close(found: &Tensor, expected: &Tensor, what: &str) {
    assert_eq!((found.dtype(), found.shape()), (expected.dtype(), expected.shape()), "{what}");
    let tolerance = match expected.dtype() {
        DType::F16 => 2e-2,
        DType::BF16 => 1e-1,
        _ => 1e-5,
    };
    let (Some(a), Some(b)) = (floats(found), floats(expected)) else {
        assert_eq!(found, expected, "{what}");
        return;
    };
    for (i, (a, b)) in a.iter().zip(&b).enumerate() {
        let close = (a.is_nan() && b.is_nan()) || a == b || (a - b).abs() <= tolerance * (1.0 + b.abs());
        assert!(close, "{what}: element {i} is {a}, expected {b}");
    }
}

/// One rank against the interpreter.
pub fn check(graph: Graph, inputs: &BTreeMap<String, Tensor>, what: &str) {
    let weights = random_weights(&graph, &mut Random::new(7));
    let expected = reference(&graph, &weights, inputs);
    let results = run(&replicated(graph, 1), &weights, inputs).unwrap_or_else(|e| panic!("{what}: {e}"));
    assert_eq!(results.outputs.len(), expected.len());
    for (name, tensor) in &expected {
        assert_close(&results.outputs[&**name].tensor, tensor, &format!("{what}, output `{name}`"));
    }
}

/// One operation on random operands against the interpreter.
pub fn check_op(op: Op, operands: &[(DType, &[usize])], random: &mut Random) {
    let mut graph = Graph::new("op");
    let mut inputs = BTreeMap::new();
    let mut values = Vec::new();
    for (i, (dtype, shape)) in operands.iter().enumerate() {
        let name = format!("x{i}");
        values.push(graph.input(&name, ty(*dtype, shape)));
        inputs.insert(name, random.tensor(*dtype, shape));
    }
    let what = format!("{op:?} of {operands:?}");
    let result = graph.add(op, &values).unwrap_or_else(|e| panic!("{what}: {e}"));
    output(&mut graph, "y", result);
    check(graph, &inputs, &what);
}

/// One rank, as it is lowered and with every value kept, so that nothing is fused: the same bits.
pub fn check_fusion(graph: Graph, inputs: &BTreeMap<String, Tensor>, what: &str) {
    let weights = random_weights(&graph, &mut Random::new(7));
    let spmd = replicated(graph, 1);
    let mut session = on_ranks(&spmd, &weights, &options(), |_, session| session.unwrap()).remove(0);
    let steps: Vec<StepId> = session.program().entries[0].graph.values().map(|(v, _)| StepId(v.0)).collect();
    let [fused, alone] = [&[][..], &steps].map(|taps| session.run_tapped(inputs, taps).unwrap().outputs);
    assert!(!fused.is_empty() && fused.len() == alone.len());
    for (name, output) in &fused {
        let bits = |tensor: &Tensor| match tensor.data() {
            Data::F32(v) => v.iter().map(|x| x.to_bits()).collect::<Vec<_>>(),
            other => panic!("{what}: an output of {}", other.dtype()),
        };
        assert_eq!(bits(&output.tensor), bits(&alone[name].tensor), "{what}, output `{name}`");
    }
}
