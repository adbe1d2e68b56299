//! Cases as text: one value per line, named by its number.
//!
//! `x: f32[b, s, 4]` is an input, `i: i64[s] 0..9` one of integers in that range; `softmax {axis=2} (0)` is an operation on
//! the value of line 0. The last value is the result.

use std::collections::BTreeMap;
use tpshard_codegen::cuda::attach;
use tpshard_ir::dim::Bindings;
use tpshard_ir::graph::{Output, StatePair};
use tpshard_ir::interp::{Array, Domain, Num, Real, eval_tensors};
use tpshard_ir::layout::Layout;
use tpshard_ir::program::{Determinism, Entry, RankProgram};
use tpshard_ir::spmd::SpmdOutput;
use tpshard_ir::text::parse_graph;
use tpshard_ir::weight::WeightExpr;
use tpshard_ir::{DType, DTypeClass, Graph, Mesh, Op, Spmd, Step, StepId, StepKind, Tensor, Type, ValueId};

/// A graph with operands.
pub(crate) struct Case {
    pub(crate) text: String,
    pub(crate) graph: Graph,
    pub(crate) bindings: Bindings,
    pub(crate) inputs: BTreeMap<String, Tensor>,
}

/// Numbers that look random and are the same every time.
pub(crate) struct Noise(pub(crate) u64);

impl Noise {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    pub(crate) fn tensor(&mut self, dtype: DType, shape: &[usize], range: Option<(i64, i64)>) -> Tensor {
        let count = shape.iter().product();
        let (low, high) = range.unwrap_or(match dtype.class() {
            DTypeClass::Bool => (0, 2),
            DTypeClass::Uint => (0, 1 << dtype.bits().min(7)),
            DTypeClass::Int => (-(1 << (dtype.bits().min(7) - 1)), 1 << (dtype.bits().min(7) - 1)),
            DTypeClass::Float => (-2, 2),
        });
        let number = |noise: &mut Noise| match dtype.class() {
            DTypeClass::Float => {
                let share = (noise.next() >> 11) as f64 / (1u64 << 53) as f64;
                Num::Float(low as f64 + share * (high - low) as f64)
            }
            _ => Num::Int(i128::from(low + (noise.next() % (high - low) as u64) as i64)),
        };
        let numbers = (0..count).map(|_| number(self)).map(|x| Real.round(x, dtype)).collect();
        let rounded = Array::new(dtype, shape.to_vec(), numbers).unwrap();
        Real.export(&rounded).unwrap()
    }
}

fn operation(text: &str) -> Op {
    let parsed = parse_graph(&format!("graph \"\"\n%0 = {text} () : f32[]\n"));
    parsed.unwrap_or_else(|error| panic!("{text}: {error}")).nodes()[0].op.clone()
}

fn ty(text: &str) -> Type {
    let parsed = parse_graph(&format!("graph \"\"\n%0 = input \"x\" () : {text}\n"));
    parsed.unwrap_or_else(|error| panic!("{text}: {error}")).nodes()[0].ty.clone()
}

pub(crate) fn case(bindings: &str, text: &str) -> Case {
    let bindings: Bindings = bindings
        .split_whitespace()
        .map(|pair| {
            let (name, value) = pair.split_once('=').unwrap();
            (name.into(), value.parse().unwrap())
        })
        .collect();
    let mut noise = Noise(text.len() as u64 * 77 + bindings.values().sum::<i64>() as u64);
    let mut graph = Graph::new("case");
    let mut inputs = BTreeMap::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let head = line.split(['(', '{']).next().unwrap_or_default();
        if let Some((name, rest)) = head.split_once(": ") {
            let (type_text, range) = rest.rsplit_once("] ").map_or((rest, None), |(t, r)| (t, Some(r)));
            let ty = ty(&format!("{}]", type_text.trim_end_matches(']')));
            let range = range.map(|r| {
                let (low, high) = r.split_once("..").unwrap();
                (low.trim().parse().unwrap(), high.trim().parse().unwrap())
            });
            let shape: Vec<usize> = ty.shape.iter().map(|d| d.eval(&bindings).unwrap() as usize).collect();
            inputs.insert(name.to_string(), noise.tensor(ty.dtype, &shape, range));
            graph.input(name, ty);
            continue;
        }
        let (op, args) = line.rsplit_once('(').unwrap();
        let args: Vec<ValueId> = args
            .trim_end_matches(')')
            .split(',')
            .map(str::trim)
            .filter(|a| !a.is_empty())
            .map(|a| ValueId(a.parse().unwrap()))
            .collect();
        graph.add(operation(op.trim()), &args).unwrap_or_else(|error| panic!("{line}: {error}"));
    }
    let last = ValueId(graph.len() as u32 - 1);
    graph.outputs.push(Output { name: "result".into(), value: last });
    Case { text: text.into(), graph, bindings, inputs }
}

impl Case {
    /// The same case with the first input the past that the result succeeds.
    pub(crate) fn with_state(mut self, axis: usize) -> Case {
        let input = self.graph.inputs().next().unwrap().1.clone();
        self.graph.states.push(StatePair { input, output: "result".into(), axis });
        self
    }

    /// The value of every node, by the interpreter.
    pub(crate) fn reference(&self) -> Vec<Tensor> {
        let mut values: Vec<Tensor> = Vec::new();
        for (_, node) in self.graph.values() {
            let value = match &node.op {
                Op::Input { name } => self.inputs[&**name].clone(),
                Op::Weight(expr) => weight(expr),
                op => {
                    let args: Vec<&Tensor> = node.args.iter().map(|a| &values[a.index()]).collect();
                    eval_tensors(op, &node.ty, &args, &self.bindings, 1 << 24)
                        .unwrap_or_else(|error| panic!("{}: {error}", self.text))
                }
            };
            values.push(value);
        }
        values
    }
}

pub(crate) fn weight(expr: &WeightExpr) -> Tensor {
    let seed = expr.to_string().bytes().fold(7u64, |h, b| h.wrapping_mul(31).wrapping_add(u64::from(b)));
    Noise(seed).tensor(expr.dtype(), expr.shape(), None)
}

/// A graph as one rank's entry.
pub(crate) fn entry(graph: &Graph) -> Entry {
    let mesh = Mesh::flat(1);
    let step = |(value, node): (ValueId, &tpshard_ir::Node)| Step {
        value,
        layout: Layout::replicated(&mesh),
        kind: StepKind::Compute,
        args: node.args.iter().map(|a| StepId(a.0)).collect(),
    };
    let steps = graph.values().map(step).collect();
    let outputs =
        graph.outputs.iter().map(|o| SpmdOutput { name: o.name.clone(), step: StepId(o.value.0) }).collect();
    let (logical, imported) = (graph.clone(), graph.len());
    let spmd = Spmd { mesh: mesh.clone(), logical, imported, equations: vec![], steps, outputs };
    Entry::from_spmd(&spmd, 0, "case").unwrap()
}

/// All cases as entries of one program, with kernels; what is written comes back, and holds together.
pub(crate) fn program(cases: &[Case]) -> RankProgram {
    let program = attached(cases);
    let bytes = program.encode(&[]).unwrap();
    assert_eq!(RankProgram::decode(&bytes).unwrap(), program);
    program
}

/// All cases as entries of one program, with kernels.
pub(crate) fn attached(cases: &[Case]) -> RankProgram {
    let entries: Vec<Entry> = cases.iter().map(|case| entry(&case.graph)).collect();
    let mut states = Vec::new();
    for state in entries.iter().flat_map(Entry::states) {
        if states.iter().all(|s: &tpshard_ir::program::StateSpec| s.input != state.input) {
            states.push(state);
        }
    }
    let mut program = RankProgram {
        rank: 0,
        mesh: Mesh::flat(1),
        determinism: Determinism::Fast,
        entries,
        states,
        weights: vec![],
        device: None,
        weights_hash: String::new(),
        program_hash: String::new(),
    };
    attach(&mut program, &[]);
    program
}
