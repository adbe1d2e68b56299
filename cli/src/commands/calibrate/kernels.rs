//! Rates of the families of kernels: small programs of every kind are run by all ranks at once, and what they take is
//! laid to the amounts of work that the cost model counts in them.
//!
//! A program is a chain of equal links; the time of a link is the difference between a long and a short chain. What a
//! link needs besides the kernel in question belongs to families that were measured before, and is taken off.

use super::fit::least_squares;
use super::steps::{INPUT, filled, on_all, time_of};
use super::{Effort, Rounds};
use crate::failure::{Classify, Failure, Kind, Outcome};
use std::collections::BTreeMap;
use tpshard_ir::op::{EinsumSpec, Literal, NormKind, PoolKind, Real, Window};
use tpshard_ir::weight::WeightExpr;
use tpshard_ir::{DType, Data, Dim, Graph, InferError, Monoid, Op, Output, Scalar, Tensor, Type, ValueId};
use tpshard_passes::cost::kernels::{Family, Measured, Quantities, Rates, work_of};

/// The second input of a chain.
const TABLE: &str = "t";
/// A chain takes about so long at least, if it can: a step as such is far shorter.
const LONGEST: usize = 256;
/// Operations, elements and bytes of a chain, about: a few milliseconds.
const AMOUNT: f64 = 6e6;
/// Bytes of the weights of a chain: between what one core's caches and what the shared ones hold.
const WEIGHTS: usize = 6 << 20;

/// What a link adds to a chain.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Link {
    View,
    /// Two dims change places and are joined.
    Copy,
    /// `maps` functions of the value and a weight.
    Map {
        scalar: Scalar,
        maps: usize,
        with: With,
    },
    /// To so many columns and back.
    Product {
        columns: usize,
    },
    Batched,
    /// The value by a second input of so many rows, and the result by it again: all of it is read twice.
    Rows {
        keys: usize,
    },
    /// Queries are the value; if `keys` is not nothing, keys and values are weights of that length.
    Attention {
        keys: usize,
    },
    Convolution {
        kernel: usize,
    },
    Pool,
    Softmax,
    Norm(NormKind),
    Rotary,
    Reduce,
    Concat,
    Gather,
    Scan,
    /// A product in `f64`, for which there is no kernel.
    Interpreted,
}

/// What a weight holds an element for.
#[derive(Clone, Copy, Debug, PartialEq)]
enum With {
    All,
    /// Each place along the last dim.
    Columns,
    /// Each place along the first dim.
    Channels,
}

/// A link and the shape of the value that goes through the chain.
type Point = (Link, Vec<usize>);

/// Points that rates are drawn through, in an order in which every link needs families before its own only.
fn programs() -> Vec<(Family, Vec<Point>)> {
    use Family as F;
    let map = |scalar, maps, with| Link::Map { scalar, maps, with };
    let product = |columns| Link::Product { columns };
    vec![
        (F::View, vec![(Link::View, vec![32, 32]), (Link::View, vec![128, 256])]),
        (
            F::Copy,
            vec![
                (Link::Copy, vec![8, 128, 64]),
                (Link::Copy, vec![4, 16, 32]),
                (Link::Copy, vec![8, 256, 16]),
                (Link::Copy, vec![128, 256, 1]),
            ],
        ),
        (
            F::Elementwise,
            vec![
                (map(Scalar::Add, 1, With::All), vec![128, 512]),
                (map(Scalar::Add, 1, With::All), vec![16, 64]),
                (map(Scalar::Mul, 3, With::All), vec![128, 512]),
                (map(Scalar::Add, 1, With::Columns), vec![128, 512]),
                (map(Scalar::Add, 1, With::Columns), vec![1024, 32]),
                (map(Scalar::Add, 1, With::Channels), vec![256, 4]),
                (map(Scalar::Add, 1, With::Channels), vec![128, 64]),
                (map(Scalar::Tanh, 1, With::All), vec![128, 512]),
                (map(Scalar::Erf, 1, With::All), vec![128, 256]),
                (map(Scalar::Sigmoid, 1, With::All), vec![16, 64]),
            ],
        ),
        (
            F::Product,
            vec![
                (product(512), vec![256, 512]),
                (product(512), vec![64, 512]),
                (product(256), vec![16, 256]),
                (product(512), vec![4, 512]),
                (product(1024), vec![128, 256]),
                (product(128), vec![128, 512]),
                (product(64), vec![128, 64]),
                (product(64), vec![16, 64]),
            ],
        ),
        (
            F::Vector,
            vec![
                (product(512), vec![1, 512]),
                (product(256), vec![1, 256]),
                (product(64), vec![1, 64]),
                (product(1024), vec![1, 512]),
            ],
        ),
        (
            F::Batched,
            vec![
                (Link::Batched, vec![8, 128, 128]),
                (Link::Batched, vec![8, 64, 64]),
                (Link::Batched, vec![32, 16, 16]),
                (Link::Batched, vec![2, 32, 32]),
                (Link::Rows { keys: 2048 }, vec![8, 1, 64]),
                (Link::Rows { keys: 256 }, vec![8, 1, 128]),
                (Link::Rows { keys: 64 }, vec![32, 1, 32]),
            ],
        ),
        (
            F::Attention,
            vec![
                (Link::Attention { keys: 0 }, vec![1, 8, 128, 64]),
                (Link::Attention { keys: 0 }, vec![1, 8, 128, 32]),
                (Link::Attention { keys: 0 }, vec![1, 4, 256, 64]),
                (Link::Attention { keys: 0 }, vec![2, 4, 16, 32]),
                (Link::Attention { keys: 64 }, vec![1, 8, 32, 64]),
            ],
        ),
        (
            F::Query,
            vec![
                (Link::Attention { keys: 2048 }, vec![1, 8, 1, 64]),
                (Link::Attention { keys: 512 }, vec![1, 8, 1, 64]),
                (Link::Attention { keys: 64 }, vec![1, 8, 1, 32]),
                (Link::Attention { keys: 256 }, vec![4, 4, 1, 32]),
            ],
        ),
        (
            F::Convolution,
            vec![
                (Link::Convolution { kernel: 3 }, vec![1, 32, 32, 32]),
                (Link::Convolution { kernel: 5 }, vec![1, 2, 32, 32]),
                (Link::Convolution { kernel: 3 }, vec![1, 64, 16, 16]),
                (Link::Convolution { kernel: 3 }, vec![2, 128, 8, 8]),
                (Link::Convolution { kernel: 1 }, vec![1, 64, 16, 16]),
                (Link::Convolution { kernel: 1 }, vec![2, 256, 4, 4]),
                (Link::Convolution { kernel: 1 }, vec![1, 32, 32, 32]),
                (Link::Convolution { kernel: 1 }, vec![1, 512, 1, 1]),
                (Link::Convolution { kernel: 3 }, vec![1, 256, 2, 2]),
                (Link::Convolution { kernel: 3 }, vec![1, 8, 8, 8]),
                (Link::Convolution { kernel: 3 }, vec![1, 16, 4, 4]),
                (Link::Convolution { kernel: 1 }, vec![1, 32, 4, 4]),
            ],
        ),
        (F::Pool, vec![(Link::Pool, vec![1, 32, 32, 32]), (Link::Pool, vec![1, 16, 8, 8])]),
        (
            F::Softmax,
            vec![
                (Link::Softmax, vec![512, 128]),
                (Link::Softmax, vec![2048, 16]),
                (Link::Softmax, vec![16, 64]),
            ],
        ),
        (
            F::Norm,
            vec![
                (Link::Norm(NormKind::Layer), vec![128, 512]),
                (Link::Norm(NormKind::Rms), vec![128, 512]),
                (Link::Norm(NormKind::Layer), vec![512, 64]),
                (Link::Norm(NormKind::Rms), vec![4, 256]),
            ],
        ),
        (
            F::Rotary,
            vec![
                (Link::Rotary, vec![8, 128, 64]),
                (Link::Rotary, vec![8, 256, 16]),
                (Link::Rotary, vec![4, 1, 64]),
            ],
        ),
        (
            F::Reduce,
            vec![(Link::Reduce, vec![128, 512]), (Link::Reduce, vec![1024, 32]), (Link::Reduce, vec![4, 64])],
        ),
        (
            F::Move,
            vec![
                (Link::Concat, vec![128, 512]),
                (Link::Concat, vec![1024, 32]),
                (Link::Concat, vec![8, 32]),
                (Link::Gather, vec![128, 512]),
                (Link::Gather, vec![512, 32]),
                (Link::Gather, vec![1024, 512]),
            ],
        ),
        (
            F::Reference,
            vec![
                (Link::Scan, vec![64, 64]),
                (Link::Scan, vec![4, 32]),
                (Link::Interpreted, vec![16, 32]),
                (Link::Interpreted, vec![4, 64]),
            ],
        ),
    ]
}

/// The programs of all families, and what they took.
pub(crate) struct Kernels {
    chains: Vec<(Family, Vec<Chains>)>,
    steps: Vec<StepOnly>,
}

impl Kernels {
    pub(crate) fn new() -> Outcome<Kernels> {
        let of_family = |(family, points): (Family, Vec<Point>)| {
            let chains = points.iter().map(|(link, shape)| Chains::new(*link, shape));
            Ok((family, chains.collect::<Outcome<_>>()?))
        };
        let chains = programs().into_iter().map(of_family).collect::<Outcome<_>>()?;
        Ok(Kernels { chains, steps: StepOnly::all()? })
    }

    /// Times every program once by each number of ranks. The numbers take turns, so that a slow minute of the machine
    /// meets them alike.
    pub(crate) fn round(&mut self, counts: &[usize], effort: Effort) -> Outcome<()> {
        for chains in self.chains.iter_mut().flat_map(|(_, chains)| chains) {
            for &ranks in counts {
                chains.time(ranks, effort)?;
            }
        }
        for step in &mut self.steps {
            for &ranks in counts {
                step.time(ranks, effort)?;
            }
        }
        Ok(())
    }

    /// Of every program: the family it is for, what it is, what a link takes, and what the rates say it takes, while `ranks`
    /// run at once.
    pub(crate) fn programs(&self, ranks: usize) -> Vec<(Family, String, f64, f64)> {
        let rates = self.rates(ranks);
        let said = |work: &BTreeMap<Family, Quantities>| -> f64 {
            work.iter().map(|(family, amounts)| rates.get(family).map_or(0.0, |r| amounts.dot(*r))).sum()
        };
        let of_family = |(family, chains): &(Family, Vec<Chains>)| {
            let program = |c: &Chains| (*family, c.name.clone(), c.link(ranks), said(&c.work));
            chains.iter().map(program).collect::<Vec<_>>()
        };
        let steps =
            self.steps.iter().map(|s| (Family::Step, s.name.clone(), s.taken.of(ranks), said(&s.work)));
        self.chains.iter().flat_map(of_family).chain(steps).collect()
    }

    /// The rates of all families while `ranks` run at once.
    pub(crate) fn rates(&self, ranks: usize) -> Measured {
        let mut measured = Measured::new();
        for (family, chains) in &self.chains {
            let rows: Vec<_> =
                chains.iter().map(|c| row(*family, &c.work, c.link(ranks), &measured)).collect();
            measured.insert(*family, fitted(&rows));
        }
        let steps = self.steps.iter();
        let rows: Vec<_> = steps.map(|s| row(Family::Step, &s.work, s.taken.of(ranks), &measured)).collect();
        measured.insert(Family::Step, fitted(&rows));
        measured
    }
}

/// Seconds of every round, by number of ranks.
#[derive(Default)]
struct Taken(BTreeMap<usize, Rounds>);

impl Taken {
    fn add(&mut self, ranks: usize, seconds: f64) {
        self.0.entry(ranks).or_default().add(seconds);
    }

    fn of(&self, ranks: usize) -> f64 {
        self.0.get(&ranks).map_or(f64::NAN, Rounds::fastest)
    }
}

/// Work of one family, and what is left of the time of some work if that of families measured before is taken off.
fn row(
    family: Family,
    work: &BTreeMap<Family, Quantities>,
    seconds: f64,
    measured: &Measured,
) -> ([f64; 5], f64) {
    let amounts = |family: Family| work.get(&family).copied().unwrap_or_default();
    let others: f64 = measured.iter().map(|(&f, &rates)| amounts(f).dot(rates)).sum();
    // What is left of noise may be less than nothing.
    (amounts(family).to_array(), (seconds - others).max(0.02 * seconds).max(1e-9))
}

fn fitted(rows: &[([f64; 5], f64)]) -> Rates {
    let mut rates = Rates::from_array(least_squares(rows));
    // A rate of nothing cannot be written.
    rates.call = rates.call.max(1e-9);
    rates
}

/// A short and a long chain of a link.
struct Chains {
    name: String,
    graphs: [Graph; 2],
    /// By how many links they differ.
    links: f64,
    /// What one link is.
    work: BTreeMap<Family, Quantities>,
    taken: [Taken; 2],
}

impl Chains {
    fn new(link: Link, shape: &[usize]) -> Outcome<Chains> {
        let [short, long] = lengths(link, shape)?;
        let graphs = [chain(link, shape, short)?, chain(link, shape, long)?];
        let [first, second] = [work_of(&graphs[0]), work_of(&graphs[1])];
        let links = (long - short) as f64;
        let per_link = |(family, amounts): (Family, Quantities)| {
            let before = first.get(&family).copied().unwrap_or_default();
            (family, amounts.plus(before, -1.0).over(links))
        };
        let work = second.into_iter().map(per_link).collect();
        Ok(Chains { name: format!("{link:?} {shape:?}"), graphs, links, work, taken: Default::default() })
    }

    fn time(&mut self, ranks: usize, effort: Effort) -> Outcome<()> {
        for (graph, taken) in self.graphs.iter().zip(&mut self.taken) {
            let mut given = BTreeMap::new();
            for (_, name, ty) in graph.inputs() {
                let shape = ty.shape.iter().map(|d| d.as_size().unwrap_or(0)).collect();
                given.insert(name.to_string(), filled(ty.dtype, shape)?);
            }
            taken.add(ranks, time_of(&on_all(graph.clone(), ranks), &given, ranks, effort.samples)?);
        }
        Ok(())
    }

    /// What a link takes while so many ranks run.
    fn link(&self, ranks: usize) -> f64 {
        let [short, long] = [&self.taken[0], &self.taken[1]].map(|taken| taken.of(ranks));
        (long - short) / self.links
    }
}

/// A step whose work is next to nothing.
struct StepOnly {
    name: String,
    graph: Graph,
    given: BTreeMap<String, Tensor>,
    work: BTreeMap<Family, Quantities>,
    taken: Taken,
}

impl StepOnly {
    /// Steps by number and size of their inputs; outputs are as large, or nearly nothing.
    fn all() -> Outcome<Vec<StepOnly>> {
        let cases = [
            (1, 16, false),
            (1, 1 << 16, false),
            (16, 16, false),
            (16, 1 << 14, false),
            (1, 1 << 20, false),
            (1, 1 << 16, true),
            (1, 1 << 20, true),
        ];
        cases.into_iter().map(|(inputs, elements, whole)| StepOnly::new(inputs, elements, whole)).collect()
    }

    fn new(inputs: usize, elements: usize, whole: bool) -> Outcome<StepOnly> {
        let mut graph = Graph::new("calibrate");
        let ty = Type::new(DType::F32, vec![Dim::from(elements)]);
        let mut given = BTreeMap::new();
        for input in 0..inputs {
            let name = format!("{INPUT}{input}");
            let x = graph.input(&name, ty.clone());
            let first = Op::Slice { axis: 0, start: Dim::from(0usize), length: Dim::from(1usize), step: 1 };
            let op = if whole { Op::Map(Scalar::Neg) } else { first };
            let first = graph.add(op, &[x]).or_fail(Kind::Internal)?;
            graph.outputs.push(Output { name: format!("y{input}").as_str().into(), value: first });
            given.insert(name, filled(DType::F32, vec![elements])?);
        }
        let mut work = work_of(&graph);
        let amounts = Quantities {
            call: 1.0,
            task: inputs as f64,
            byte: (4 * inputs * elements) as f64,
            element: (inputs * if whole { elements } else { 1 }) as f64,
            ..Rates::default()
        };
        work.insert(Family::Step, amounts);
        let name = format!("{inputs} inputs of {elements}{}", if whole { ", all handed on" } else { "" });
        Ok(StepOnly { name, graph, given, work, taken: Taken::default() })
    }

    fn time(&mut self, ranks: usize, effort: Effort) -> Outcome<()> {
        let program = on_all(self.graph.clone(), ranks);
        self.taken.add(ranks, time_of(&program, &self.given, ranks, effort.samples)?);
        Ok(())
    }
}

/// A short and a long chain.
fn lengths(link: Link, shape: &[usize]) -> Outcome<[usize; 2]> {
    let work = work_of(&chain(link, shape, 1)?);
    let amount = |q: &Quantities| q.element + q.operation / 16.0 + q.byte + 20.0 * q.task + 1000.0 * q.call;
    let slow = if matches!(link, Link::Scan | Link::Interpreted) { 20.0 } else { 1.0 };
    let amount: f64 = work.values().map(amount).sum::<f64>() * slow;
    let mut most = (AMOUNT / amount.max(1.0)) as usize;
    if let Link::Product { columns } = link {
        let depth = shape.last().copied().unwrap_or(1);
        most = most.min(WEIGHTS / (8 * columns * depth).max(1));
    }
    Ok([1, 1 + most.clamp(2, LONGEST)])
}

fn window(kernel: usize) -> Window {
    Window {
        kernel: vec![kernel; 2],
        strides: vec![1; 2],
        dilations: vec![1; 2],
        pads_low: vec![kernel / 2; 2],
        pads_high: vec![kernel / 2; 2],
        ceil: false,
    }
}

fn dims(shape: &[usize]) -> Vec<Dim> {
    shape.iter().map(|&s| Dim::from(s)).collect()
}

fn chain(link: Link, shape: &[usize], length: usize) -> Outcome<Graph> {
    let mut graph = Graph::new("calibrate");
    let dtype = if link == Link::Interpreted { DType::F64 } else { DType::F32 };
    let mut x = graph.input(INPUT, Type::new(dtype, dims(shape)));
    if let (Link::Rows { keys }, &[batch, _, width]) = (link, shape) {
        graph.input(TABLE, Type::new(dtype, dims(&[batch, keys, width])));
    }
    for index in 0..length {
        x = add_link(&mut graph, x, link, shape, index)?;
    }
    graph.outputs.push(Output { name: "y".into(), value: x });
    Ok(graph)
}

fn add_link(graph: &mut Graph, x: ValueId, link: Link, shape: &[usize], index: usize) -> Outcome<ValueId> {
    let dtype = graph.ty(x).dtype;
    let weight = |graph: &mut Graph, name: &str, shape: &[usize]| -> Outcome<ValueId> {
        let name = format!("{name}{index}");
        let expr = WeightExpr::initializer(name, dtype, shape.to_vec()).or_fail(Kind::Internal)?;
        graph.add(Op::Weight(expr), &[]).or_fail(Kind::Internal)
    };
    let spec = |text: &str| EinsumSpec::parse(text).ok_or_else(|| Failure::new(Kind::Internal, "a spec"));
    let flat: usize = shape.iter().product();
    let last = shape.last().copied().unwrap_or(1);
    let rank = shape.len();
    let add = |graph: &mut Graph, op: Op, args: &[ValueId]| -> Outcome<ValueId> {
        let added: Result<ValueId, InferError> = graph.add(op, args);
        added.or_fail(Kind::Internal)
    };
    let reshape = |shape: &[usize]| Op::Reshape { shape: dims(shape) };
    match link {
        Link::View => {
            let y = add(graph, reshape(&[flat]), &[x])?;
            add(graph, reshape(shape), &[y])
        }
        Link::Copy => {
            let y = add(graph, Op::Transpose { perm: vec![1, 0, 2] }, &[x])?;
            let y = add(graph, reshape(&[flat]), &[y])?;
            add(graph, reshape(shape), &[y])
        }
        Link::Map { scalar, maps, with } => {
            let mut y = x;
            for _ in 0..maps {
                let binary = matches!(scalar, Scalar::Add | Scalar::Mul);
                let w = match with {
                    With::All => shape.to_vec(),
                    With::Columns => vec![last],
                    With::Channels => vec![shape.first().copied().unwrap_or(1), 1],
                };
                let args = if binary { vec![y, weight(graph, "w", &w)?] } else { vec![y] };
                y = add(graph, Op::Map(scalar), &args)?;
            }
            let y = add(graph, reshape(&[flat]), &[y])?;
            add(graph, reshape(shape), &[y])
        }
        Link::Product { columns } => {
            let (up, down) = (weight(graph, "u", &[last, columns])?, weight(graph, "d", &[columns, last])?);
            let y = add(graph, Op::Einsum(spec("mk,kn->mn")?), &[x, up])?;
            add(graph, Op::Einsum(spec("mk,kn->mn")?), &[y, down])
        }
        Link::Interpreted => {
            let w = weight(graph, "w", &[last, last])?;
            add(graph, Op::Einsum(spec("mk,kn->mn")?), &[x, w])
        }
        Link::Rows { .. } => {
            let table = graph.inputs().find(|(_, name, _)| ***name == *TABLE).map(|(value, ..)| value);
            let table = table.ok_or_else(|| Failure::new(Kind::Internal, "a chain without its table"))?;
            let y = add(graph, Op::Einsum(spec("bmk,bnk->bmn")?), &[x, table])?;
            add(graph, Op::Einsum(spec("bmn,bnk->bmk")?), &[y, table])
        }
        Link::Batched => add(graph, Op::Einsum(spec("bmk,bnk->bmn")?), &[x, x]),
        Link::Attention { keys } => {
            let heads = shape.get(1).copied().unwrap_or(1);
            let op = Op::Attention {
                scale: Real(0.1),
                softcap: None,
                kv_of_head: (0..heads as u32).collect(),
                empty_rows_zero: false,
            };
            if keys == 0 {
                return add(graph, op, &[x, x, x]);
            }
            let held = [shape.first().copied().unwrap_or(1), heads, keys, last];
            let (k, v) = (weight(graph, "k", &held)?, weight(graph, "v", &held)?);
            add(graph, op, &[x, k, v])
        }
        Link::Convolution { kernel } => {
            let channels = shape.get(1).copied().unwrap_or(1);
            let w = weight(graph, "w", &[channels, channels, kernel, kernel])?;
            add(graph, Op::Conv { window: window(kernel), groups: 1 }, &[x, w])
        }
        Link::Pool => add(graph, Op::Pool { kind: PoolKind::Max, window: window(3) }, &[x]),
        Link::Softmax => add(graph, Op::Softmax { axis: rank - 1 }, &[x]),
        Link::Norm(kind) => {
            let scale = weight(graph, "s", &[last])?;
            let norm = Op::Norm { kind, axis: rank - 1, epsilon: Real(1e-5) };
            match kind {
                NormKind::Layer => {
                    let bias = weight(graph, "b", &[last])?;
                    add(graph, norm, &[x, scale, bias])
                }
                NormKind::Rms => add(graph, norm, &[x, scale]),
            }
        }
        Link::Rotary => {
            let angles = [shape.get(rank - 2).copied().unwrap_or(1), last / 2];
            let (cos, sin) = (weight(graph, "c", &angles)?, weight(graph, "s", &angles)?);
            add(graph, Op::Rotary { interleaved: false }, &[x, cos, sin])
        }
        Link::Reduce => {
            let sums = add(graph, Op::Reduce { monoid: Monoid::Sum, axes: vec![rank - 1] }, &[x])?;
            add(graph, Op::Map(Scalar::Add), &[x, sums])
        }
        Link::Concat => {
            let half = |at: usize| Op::Slice {
                axis: rank - 1,
                start: Dim::from(at),
                length: Dim::from(last / 2),
                step: 1,
            };
            let (low, high) = (add(graph, half(0), &[x])?, add(graph, half(last / 2), &[x])?);
            add(graph, Op::Concat { axis: rank - 1 }, &[high, low])
        }
        Link::Gather => {
            let rows = shape.first().copied().unwrap_or(1);
            let places = Data::I64((0..rows as i64).rev().collect());
            let places = Tensor::new(vec![rows], places).or_fail(Kind::Internal)?;
            let places = add(graph, Op::Literal(Literal(places.into())), &[])?;
            add(graph, Op::Gather { axis: 0, window: None }, &[x, places])
        }
        Link::Scan => {
            let scan = Op::Scan { monoid: Monoid::Sum, axis: rank - 1, exclusive: false, reverse: false };
            add(graph, scan, &[x])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_program_is_mostly_of_its_family_and_runs() {
        for (family, points) in programs() {
            for (link, shape) in points {
                let graph = chain(link, &shape, 2).unwrap();
                let found = work_of(&graph);
                assert!(found.contains_key(&family), "{link:?}: {found:?}");
                let [short, long] = lengths(link, &shape).unwrap();
                assert!(short < long);
            }
        }
        let effort = Effort { samples: 1, growth: 2, largest: 1024 };
        let mut chains = Chains::new(Link::Concat, &[4, 8]).unwrap();
        chains.time(2, effort).unwrap();
        assert!(chains.link(2).is_finite());
        assert!(chains.link(1).is_nan());
    }

    #[test]
    fn links_need_only_families_measured_before() {
        let mut before = vec![];
        for (family, points) in programs() {
            before.push(family);
            for (link, shape) in points {
                for needed in work_of(&chain(link, &shape, 2).unwrap()).keys() {
                    assert!(before.contains(needed), "{link:?} needs {needed:?}");
                }
            }
        }
    }
}
