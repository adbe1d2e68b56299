//! Rates of the kernels, from the steps of small programs that every rank runs whole.

use super::{Effort, Rounds, median};
use crate::failure::{Classify, Failure, Kind, Outcome};
use crate::runner::session_failure;
use std::collections::BTreeMap;
use std::time::Instant;
use tpshard_ir::op::EinsumSpec;
use tpshard_ir::program::RankProgram;
use tpshard_ir::weight::WeightExpr;
use tpshard_ir::{
    DType, Data, Dim, Graph, Layout, Mesh, Op, Output, Scalar, Spmd, SpmdOutput, Step, StepId, StepKind,
    Tensor, Type, ValueId,
};
use tpshard_runtime::comm::{CommOptions, Communicator, threads};
use tpshard_runtime::cpu::MemoryWeights;
use tpshard_runtime::session::{Session, SessionOptions};

pub(crate) const INPUT: &str = "x";
/// Rows and depth of the products that are bound by computing.
const PRODUCT: (usize, usize) = (256, 1024);
/// Depth of the products of one row, whose weights together are larger than caches.
const ROW: usize = 2048;
/// Depth of the products that are nearly nothing.
const TINY: usize = 32;
/// Kernels of a tiny product with a sum behind it.
const TINY_KERNELS: f64 = 2.0;

/// What the kernels of one of the ranks reach while all ranks are at work.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rates {
    pub(crate) operations_per_second: f64,
    pub(crate) bytes_per_second: f64,
    pub(crate) launch_seconds: f64,
    pub(crate) step_seconds: f64,
}

/// What one more product costs, and a step without any.
pub(crate) struct Slopes {
    product: Slope,
    row: Slope,
    tiny: Slope,
}

impl Default for Slopes {
    fn default() -> Slopes {
        let [product, row, tiny] = [[1, 9], [1, 9], [8, 136]].map(Slope::new);
        Slopes { product, row, tiny }
    }
}

impl Slopes {
    pub(crate) fn round(&mut self, ranks: usize, effort: Effort) -> Outcome<()> {
        let (rows, depth) = PRODUCT;
        self.product.time((rows, depth), false, ranks, effort)?;
        self.row.time((1, ROW), false, ranks, effort)?;
        self.tiny.time((1, TINY), true, ranks, effort)
    }

    pub(crate) fn rates(self) -> Outcome<Rates> {
        let (rows, depth) = PRODUCT;
        let step_seconds = self.tiny.rest().max(1e-9);
        let [product, row, tiny] = [&self.product, &self.row, &self.tiny].map(Slope::per_link);
        Ok(Rates {
            operations_per_second: 2.0 * (rows * depth * depth) as f64 / product?,
            bytes_per_second: 4.0 * (ROW * ROW) as f64 / row?,
            launch_seconds: tiny? / TINY_KERNELS,
            step_seconds,
        })
    }
}

/// A short and a long chain: how many links they have, and what they took.
struct Slope {
    lengths: [usize; 2],
    taken: [Rounds; 2],
}

impl Slope {
    fn new(lengths: [usize; 2]) -> Slope {
        Slope { lengths, taken: Default::default() }
    }

    fn time(
        &mut self,
        (rows, depth): (usize, usize),
        sums: bool,
        ranks: usize,
        effort: Effort,
    ) -> Outcome<()> {
        for (&length, taken) in self.lengths.iter().zip(&mut self.taken) {
            taken.add(step_time(rows, depth, length, sums, ranks, effort)?);
        }
        Ok(())
    }

    /// Seconds for one link of a chain.
    fn slope(&self) -> f64 {
        let ([short, long], [first, second]) = (self.lengths, [0, 1].map(|i: usize| self.taken[i].fastest()));
        (second - first) / (long - short) as f64
    }

    /// Seconds for none.
    fn rest(&self) -> f64 {
        self.taken[0].fastest() - self.slope() * self.lengths[0] as f64
    }

    fn per_link(&self) -> Outcome<f64> {
        let seconds = self.slope();
        if seconds.is_finite() && seconds > 0.0 {
            return Ok(seconds);
        }
        let message = "long chains of products take no longer than short ones\n\
                       help: the machine is too busy to be measured; try again when it is idle";
        Err(Failure::new(Kind::Resource, message))
    }
}

/// The median step of a chain of products, on all ranks at once.
fn step_time(
    rows: usize,
    depth: usize,
    length: usize,
    sums: bool,
    ranks: usize,
    effort: Effort,
) -> Outcome<f64> {
    let program = chain(rows, depth, length, sums, ranks)?;
    let inputs = BTreeMap::from([(INPUT.to_owned(), filled(DType::F32, vec![rows, depth])?)]);
    time_of(&program, &inputs, ranks, effort.samples)
}

/// A tensor of small numbers. Not zeros: untouched memory would be one page.
pub(crate) fn filled(dtype: DType, shape: Vec<usize>) -> Outcome<Tensor> {
    let count = shape.iter().product();
    let data = match dtype {
        DType::F64 => Data::F64(vec![1e-3; count]),
        _ => Data::F32(vec![1e-3; count]),
    };
    Tensor::new(shape, data).or_fail(Kind::Internal)
}

/// The median step of a program, on all ranks at once.
pub(crate) fn time_of(
    program: &Spmd,
    inputs: &BTreeMap<String, Tensor>,
    ranks: usize,
    samples: usize,
) -> Outcome<f64> {
    let ends = threads(ranks, &CommOptions::default()).or_fail(Kind::Resource)?;
    let times: Vec<Outcome<Vec<f64>>> = std::thread::scope(|scope| {
        let run = |(rank, end)| scope.spawn(move || run_rank(program, rank, inputs, end, samples));
        let handles: Vec<_> = ends.into_iter().enumerate().map(run).collect();
        let panicked = |_| Err(Failure::new(Kind::Internal, "a rank's thread panicked"));
        handles.into_iter().map(|handle| handle.join().unwrap_or_else(panicked)).collect()
    });
    let mut first = Vec::new();
    for (rank, samples) in times.into_iter().enumerate() {
        let samples = samples?;
        if rank == 0 {
            first = samples;
        }
    }
    Ok(median(first))
}

fn run_rank(
    program: &Spmd,
    rank: usize,
    inputs: &BTreeMap<String, Tensor>,
    communicator: Box<dyn Communicator>,
    samples: usize,
) -> Outcome<Vec<f64>> {
    let program = RankProgram::from_spmd(program, rank).or_fail(Kind::Internal)?;
    let mut weights = MemoryWeights::default();
    for stored in &program.weights {
        weights.tensors.insert(stored.name.clone(), filled(stored.dtype, stored.shape.clone())?);
    }
    let options = SessionOptions::default();
    let mut session =
        Session::open(program, &mut weights, communicator, &options).map_err(|e| session_failure(&e))?;
    drop(weights);
    timed_steps(&mut session, rank, inputs, samples)
}

/// Steps that warm up.
pub(crate) const WARM: usize = 2;

/// The times of `samples` steps as rank 0 sees them, after two that warm up; other ranks follow.
pub(crate) fn timed_steps(
    session: &mut Session,
    rank: usize,
    inputs: &BTreeMap<String, Tensor>,
    samples: usize,
) -> Outcome<Vec<f64>> {
    let mut times = Vec::new();
    if rank == 0 {
        for sample in 0..WARM + samples {
            let start = Instant::now();
            session.run(inputs).map_err(|e| session_failure(&e))?;
            if sample >= WARM {
                times.push(start.elapsed().as_secs_f64());
            }
        }
    }
    session.close().map_err(|e| session_failure(&e))?;
    Ok(times)
}

/// `length` products with square weights of their own, each with a sum behind it if asked for; whole on every rank.
fn chain(rows: usize, depth: usize, length: usize, sums: bool, ranks: usize) -> Outcome<Spmd> {
    let mut graph = Graph::new("calibrate");
    let shape = |sizes: [usize; 2]| Type::new(DType::F32, sizes.into_iter().map(Dim::from).collect());
    let ty = shape([rows, depth]);
    let product = EinsumSpec::parse("mk,kn->mn").ok_or_else(|| Failure::new(Kind::Internal, "a spec"))?;
    let mut x = graph.input(INPUT, ty);
    for link in 0..length {
        let weight = WeightExpr::initializer(format!("w{link}"), DType::F32, vec![depth, depth]);
        let weight = graph.add(Op::Weight(weight.or_fail(Kind::Internal)?), &[]).or_fail(Kind::Internal)?;
        let y = graph.add(Op::Einsum(product.clone()), &[x, weight]).or_fail(Kind::Internal)?;
        x = if sums { graph.add(Op::Map(Scalar::Add), &[x, y]).or_fail(Kind::Internal)? } else { y };
    }
    graph.outputs.push(Output { name: "y".into(), value: x });
    Ok(on_all(graph, ranks))
}

/// Every rank runs all of `graph`.
pub(crate) fn on_all(graph: Graph, ranks: usize) -> Spmd {
    let mesh = Mesh::flat(ranks);
    let layout = Layout::replicated(&mesh);
    let step = |value: ValueId| Step {
        value,
        layout: layout.clone(),
        kind: StepKind::Compute,
        args: graph.node(value).args.iter().map(|a| StepId(a.0)).collect(),
    };
    let steps = graph.values().map(|(value, _)| step(value)).collect();
    let output = |o: &Output| SpmdOutput { name: o.name.clone(), step: StepId(o.value.0) };
    let outputs = graph.outputs.iter().map(output).collect();
    let imported = graph.len();
    Spmd { mesh, logical: graph, imported, equations: vec![], steps, outputs }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_run_on_all_ranks() {
        let effort = Effort { samples: 3, growth: 2, largest: 1024 };
        for sums in [false, true] {
            let seconds = step_time(2, 8, 3, sums, 2, effort).unwrap();
            assert!(seconds > 0.0 && seconds < 10.0, "{seconds}");
        }
    }
}
