//! How much work a node is, by what the CPU executor does for it.

use super::{Family, Quantities, Work};
use std::collections::BTreeMap;
use tpshard_ir::op::{EinsumSpec, Window};
use tpshard_ir::program::Kernel;
use tpshard_ir::{Graph, Op, Scalar, ValueId};

/// Elements that the elementwise kernel takes at once.
const BLOCK: f64 = 512.0;
/// Positions that a convolution computes together.
const VECTOR: f64 = 16.0;
/// Functions that are called element by element take so many times what vectorised ones take.
const CALLED: f64 = 8.0;

/// What is known of the values of a graph before layouts are.
#[derive(Clone, Debug)]
pub struct Look {
    /// Computed once, when a session opens: it costs a step nothing.
    pub constant: Vec<bool>,
    /// Elements may lie apart in memory.
    strided: Vec<bool>,
    /// Computed inside the kernel of the one that uses it.
    pub fused: Vec<bool>,
    /// The interpreter has to do it.
    reference: Vec<bool>,
    /// Elements stay where they are.
    view: Vec<bool>,
    /// Weights, inputs and states, looked at one way or another: they lie in memory when a step begins.
    pub held: Vec<bool>,
}

impl Look {
    pub fn new(graph: &Graph) -> Look {
        let lowering = tpshard_ir::program::lower(graph);
        let constant = lowering.constant_values(graph);
        let users = graph.users();
        let mut strided: Vec<bool> = Vec::with_capacity(graph.len());
        let mut fused = vec![false; graph.len()];
        for (id, node) in graph.values() {
            let from = |strided: &[bool]| node.args.first().is_some_and(|a| strided[a.index()]);
            let apart = match &node.op {
                // A reshape that has to copy leaves elements side by side, others leave them as they are; those that
                // join dims are taken to copy.
                Op::Reshape { .. } => from(&strided) && !joins(graph, id),
                Op::Transpose { perm } => from(&strided) || moves(graph, id, perm),
                Op::Broadcast { .. } => true,
                Op::Slice { axis, .. } => from(&strided) || *axis > 0,
                Op::Einsum(spec) => out_of_order(spec),
                _ => false,
            };
            strided.push(apart);
            let same =
                |u: &ValueId| matches!(graph.node(*u).op, Op::Map(_)) && graph.ty(*u).shape == node.ty.shape;
            let users = &users[id.index()];
            let output = graph.outputs.iter().any(|o| o.value == id);
            fused[id.index()] =
                matches!(node.op, Op::Map(_)) && !users.is_empty() && !output && users.iter().all(same);
        }
        let mut reference = vec![false; graph.len()];
        for region in lowering.regions.iter().filter(|r| r.kernel == Kernel::Reference) {
            reference[region.result().index()] = true;
        }
        let view = graph.values().map(|(id, node)| match &node.op {
            Op::Reshape { .. } => !(node.args.iter().any(|a| strided[a.index()]) && joins(graph, id)),
            op => {
                let moved = matches!(op, Op::Broadcast { .. } | Op::Transpose { .. } | Op::Slice { .. });
                moved || op.is_leaf() || matches!(op, Op::Convert(_))
            }
        });
        let view = view.collect();
        let mut held = constant.clone();
        for (id, node) in graph.values() {
            held[id.index()] |= match &node.op {
                Op::Input { .. } | Op::Append { .. } => true,
                Op::Reshape { .. } | Op::Transpose { .. } | Op::Broadcast { .. } | Op::Slice { .. } => {
                    node.args.first().is_some_and(|a| held[a.index()])
                }
                _ => false,
            };
        }
        Look { constant, strided, fused, reference, view, held }
    }

    /// True if a value takes no pass over its elements of its own.
    pub fn is_view(&self, value: ValueId) -> bool {
        let at = value.index();
        self.constant[at] || self.fused[at] || self.view[at]
    }

    /// What the work for a value depends on besides its operation, types and layouts.
    pub fn traits(&self, graph: &Graph, value: ValueId) -> impl Iterator<Item = u64> + use<> {
        let bits = |v: ValueId| {
            let at = v.index();
            let flags =
                [self.constant[at], self.strided[at], self.fused[at], self.reference[at], self.held[at]];
            flags.iter().fold(0, |bits, &flag| bits << 1 | u64::from(flag))
        };
        graph.node(value).args.iter().map(|&a| bits(a)).chain([bits(value)]).collect::<Vec<_>>().into_iter()
    }
}

/// True if a transpose changes the order of elements in memory.
fn moves(graph: &Graph, value: ValueId, perm: &[usize]) -> bool {
    let Some(&arg) = graph.node(value).args.first() else { return false };
    let shape = &graph.ty(arg).shape;
    let long = perm.iter().filter(|&&p| shape.get(p).and_then(tpshard_ir::Dim::as_size) != Some(1));
    !long.is_sorted()
}

/// True if a reshape makes fewer dims of several.
fn joins(graph: &Graph, value: ValueId) -> bool {
    let node = graph.node(value);
    let long = |v: ValueId| graph.ty(v).shape.iter().filter(|d| d.as_size() != Some(1)).count();
    node.args.first().is_some_and(|&a| long(value) < long(a))
}

/// True if the result of a product, made in the order batch, rows, columns, is handed on in another one.
fn out_of_order(spec: &EinsumSpec) -> bool {
    let [a, b] = spec.inputs.as_slice() else { return false };
    let group = |l: &u8| match (a.contains(l), b.contains(l)) {
        (true, true) => 0,
        (true, false) => 1,
        _ => 2,
    };
    let groups: Vec<i32> = spec.output.iter().map(group).collect();
    let mut swapped = groups.clone();
    swapped.iter_mut().for_each(|g| *g = if *g == 0 { 0 } else { 3 - *g });
    !groups.is_sorted() && !swapped.is_sorted()
}

/// The local extents of a node's operands and result.
pub struct Sizes<'a> {
    pub operands: &'a [Vec<u64>],
    pub out: &'a [u64],
    /// Bits read per element of every operand.
    pub bits: &'a [f64],
}

fn product(extents: &[u64]) -> f64 {
    extents.iter().map(|&e| e as f64).product()
}

fn copy(elements: f64) -> Work {
    Work {
        family: Family::Copy,
        amounts: Quantities { call: 1.0, element: elements, ..Quantities::default() },
    }
}

/// Moved bytes, read and written.
fn moved(task: f64, written: f64) -> Vec<Work> {
    let amounts = Quantities { call: 1.0, task, byte: 2.0 * written, ..Quantities::default() };
    vec![Work { family: Family::Move, amounts }]
}

/// A kernel, and copies that it needs before.
pub fn work(graph: &Graph, look: &Look, value: ValueId, sizes: &Sizes<'_>) -> Vec<Work> {
    let node = graph.node(value);
    let at = value.index();
    if look.constant[at] {
        return vec![];
    }
    let elements = |i: usize| sizes.operands.get(i).map_or(0.0, |e| product(e));
    let bytes = |i: usize| elements(i) * sizes.bits.get(i).copied().unwrap_or(32.0) / 8.0;
    let all = (0..sizes.operands.len()).map(elements).sum::<f64>();
    let out = product(sizes.out);
    let wide = graph.ty(value).dtype.bits() as f64 / 8.0;
    let call = Quantities { call: 1.0, ..Quantities::default() };
    let one = |family: Family, amounts: Quantities| vec![Work { family, amounts }];
    let strided = |i: usize| node.args.get(i).is_some_and(|a| look.strided[a.index()]);
    let copied = |which: &[usize]| -> Vec<Work> {
        let apart = which.iter().filter(|&&i| strided(i));
        apart.map(|&i| copy(elements(i))).collect()
    };
    let rows = |family: Family| {
        let row = sizes.out.last().copied().unwrap_or(1).max(1) as f64;
        let mut all = copied(&[0]);
        all.push(Work { family, amounts: Quantities { task: out / row, element: out, ..call } });
        all
    };
    if look.reference[at] {
        let operations = match &node.op {
            Op::Einsum(spec) => loops(spec, sizes.operands),
            _ => 0.0,
        };
        return one(Family::Reference, Quantities { element: all + out, operation: operations, ..call });
    }
    match &node.op {
        Op::Input { .. } | Op::Weight(_) | Op::Literal(_) | Op::Size(_) | Op::Convert(_) => vec![],
        Op::Iota { .. } => one(Family::View, call),
        Op::Reshape { .. } if strided(0) && joins(graph, value) => copied(&[0]),
        Op::Reshape { .. } | Op::Broadcast { .. } | Op::Transpose { .. } | Op::Slice { .. } => {
            one(Family::View, call)
        }
        Op::Map(scalar) => one(Family::Elementwise, elementwise(graph, look, value, *scalar, sizes)),
        Op::Einsum(spec) => einsum(graph, look, value, spec, sizes),
        Op::Conv { window, .. } => {
            let images = sizes.out.first().copied().unwrap_or(1) as f64;
            let channels = sizes.operands.first().and_then(|x| x.get(1)).copied().unwrap_or(1) as f64;
            let row = sizes.out.get(2..).and_then(<[u64]>::last).copied().unwrap_or(1).max(1) as f64;
            let gathered =
                channels * taps(window) * out / sizes.out.get(1).copied().unwrap_or(1).max(1) as f64;
            let group_channels = sizes.operands.get(1).and_then(|w| w.get(1)).copied().unwrap_or(1) as f64;
            let positions = product(sizes.out.get(2..).unwrap_or(&[]));
            let filters = sizes.out.get(1).copied().unwrap_or(1) as f64;
            let computed = images * filters * (positions / VECTOR).ceil() * VECTOR;
            let operation = 2.0 * computed * group_channels * taps(window);
            // Along a row of the result a kernel element shows neighbours.
            let task = images * channels * positions / row * taps(window);
            let shown = if is_identity(window) {
                Quantities::default()
            } else {
                Quantities { task, element: gathered, ..Quantities::default() }
            };
            one(Family::Convolution, Quantities { operation, byte: bytes(1), ..call }.plus(shown, 1.0))
        }
        Op::Pool { window, .. } => {
            one(Family::Pool, Quantities { task: out, element: out * taps(window), ..call })
        }
        Op::Attention { .. } => {
            let keys = sizes.operands.get(1).and_then(|k| k.get(2)).copied().unwrap_or(0) as f64;
            let depth = sizes.operands.first().and_then(|q| q.get(3)).copied().unwrap_or(0)
                + sizes.out.get(3).copied().unwrap_or(0);
            let rows = product(sizes.out.get(..3).unwrap_or(&[]));
            let task = product(sizes.out.get(..2).unwrap_or(&[]));
            let (element, operation) = (rows * keys, 2.0 * rows * keys * depth as f64);
            let family = if sizes.out.get(2) == Some(&1) { Family::Query } else { Family::Attention };
            one(family, Quantities { task, element, operation, byte: bytes(1) + bytes(2), ..call })
        }
        Op::Softmax { axis } => {
            let mut all = rows(Family::Softmax);
            // Rows along another dim than the last are copied together first.
            if *axis + 1 != sizes.out.len() && !strided(0) {
                all.insert(0, copy(out));
            }
            all
        }
        Op::Norm { axis, .. } => {
            let outer = product(sizes.out.get(..*axis).unwrap_or(&[]));
            let mut all = copied(&[0]);
            all.push(Work {
                family: Family::Norm,
                amounts: Quantities { task: outer, element: out, ..call },
            });
            all
        }
        Op::Rotary { .. } => rows(Family::Rotary),
        Op::Reduce { axes, .. } => {
            let last =
                (sizes.out.len() - axes.len().min(sizes.out.len())..sizes.out.len()).collect::<Vec<_>>();
            let mut all = copied(&[0]);
            if all.is_empty() && *axes != last {
                all.push(copy(elements(0)));
            }
            all.push(Work {
                family: Family::Reduce,
                amounts: Quantities { task: out, element: elements(0), ..call },
            });
            all
        }
        Op::Concat { axis } => {
            let task = product(sizes.out.get(..*axis).unwrap_or(&[])) * node.args.len() as f64;
            moved(task, out * wide)
        }
        // In place: only what is new is written.
        Op::Append { axis } => moved(product(sizes.out.get(..*axis).unwrap_or(&[])), elements(1) * wide),
        Op::Gather { .. } => moved(elements(1).max(1.0), out * wide),
        Op::Pad { .. } => {
            let row = sizes.operands.first().and_then(|x| x.last()).copied().unwrap_or(1).max(1) as f64;
            moved(elements(0) / row, out * wide)
        }
        Op::Dequant { .. } => one(Family::Widen, Quantities { element: out, ..call }),
        Op::Scan { .. }
        | Op::TopK { .. }
        | Op::GatherElements { .. }
        | Op::GatherNd { .. }
        | Op::ScatterElements { .. }
        | Op::ScatterNd { .. }
        | Op::Deferred { .. } => one(Family::Reference, Quantities { element: all + out, ..call }),
    }
}

fn taps(window: &Window) -> f64 {
    window.kernel.iter().map(|&k| k as f64).product()
}

/// True if every result is of one element, the one at its place: nothing is gathered.
fn is_identity(window: &Window) -> bool {
    let all = |values: &[usize], wanted: usize| values.iter().all(|&value| value == wanted);
    all(&window.kernel, 1) && all(&window.strides, 1) && all(&window.pads_low, 0) && all(&window.pads_high, 0)
}

/// The product of the extents of some letters.
fn extent(spec: &EinsumSpec, operands: &[Vec<u64>], wanted: impl Fn(u8) -> bool) -> f64 {
    let of = |letter: u8| {
        spec.inputs.iter().zip(operands).find_map(|(letters, extents)| {
            letters.iter().zip(extents).find(|(l, _)| **l == letter).map(|(_, &e)| e)
        })
    };
    spec.letters().into_iter().filter(|&l| wanted(l)).map(|l| of(l).unwrap_or(1) as f64).product()
}

/// Operations of a contraction.
pub(crate) fn loops(spec: &EinsumSpec, operands: &[Vec<u64>]) -> f64 {
    2.0 * extent(spec, operands, |_| true)
}

fn einsum(graph: &Graph, look: &Look, value: ValueId, spec: &EinsumSpec, sizes: &Sizes<'_>) -> Vec<Work> {
    let node = graph.node(value);
    let [a, b] = spec.inputs.as_slice() else { return vec![] };
    let call = Quantities { call: 1.0, ..Quantities::default() };
    let (in_a, in_b) = (|l: u8| a.contains(&l), |l: u8| b.contains(&l));
    let in_out = |l: u8| spec.output.contains(&l);
    let sizes_of = |i: usize| sizes.operands.get(i).map_or(0.0, |e| product(e));
    let batch = extent(spec, sizes.operands, |l| in_a(l) && in_b(l) && in_out(l));
    let operation = loops(spec, sizes.operands);
    let constant = |i: usize| node.args.get(i).is_some_and(|v| look.constant[v.index()]);
    let mut all = Vec::new();
    let weight = match (constant(0), constant(1)) {
        (false, true) => Some(1),
        (true, false) => Some(0),
        _ => None,
    };
    let amounts = match weight {
        Some(weight) if batch <= 1.0 => {
            let row = 1 - weight;
            // Letters of the rows that do not stand together, or elements that do not: copied first, but only if there
            // is more than one dim to walk.
            let [depth_apart, several] = grouped(spec, row);
            let apart = node.args.get(row).is_some_and(|v| look.strided[v.index()]);
            if several && (depth_apart != apart) {
                all.push(copy(sizes_of(row)));
            }
            let rows =
                extent(spec, sizes.operands, |l| in_out(l) && if row == 0 { in_a(l) } else { in_b(l) });
            // Weights of fewer bits stay as they are.
            let byte = sizes_of(weight) * sizes.bits.get(weight).copied().unwrap_or(32.0) / 8.0;
            if rows <= 1.0 {
                Work { family: Family::Vector, amounts: Quantities { byte, ..call } }
            } else {
                let element = sizes_of(row) + product(sizes.out);
                Work { family: Family::Product, amounts: Quantities { element, operation, byte, ..call } }
            }
        }
        _ => {
            let element = sizes_of(0) + sizes_of(1) + product(sizes.out);
            Work { family: Family::Batched, amounts: Quantities { task: batch, element, operation, ..call } }
        }
    };
    all.push(amounts);
    all
}

/// Whether the letters of an operand's rows or depth stand apart, and whether there are several in a group.
fn grouped(spec: &EinsumSpec, operand: usize) -> [bool; 2] {
    let (Some(letters), Some(other)) = (spec.inputs.get(operand), spec.inputs.get(1 - operand)) else {
        return [false; 2];
    };
    let depth: Vec<bool> = letters.iter().map(|l| other.contains(l)).collect();
    let changes = depth.windows(2).filter(|w| w[0] != w[1]).count();
    let depths = depth.iter().filter(|d| **d).count();
    [changes > 1, depths > 1]
}

fn elementwise(graph: &Graph, look: &Look, value: ValueId, scalar: Scalar, sizes: &Sizes<'_>) -> Quantities {
    let node = graph.node(value);
    let out = product(sizes.out);
    let end = !look.fused[value.index()];
    let loaded = |v: &ValueId| !look.fused[v.index()] || graph.ty(*v).shape != node.ty.shape;
    let passes = 1.0 + node.args.iter().filter(|v| loaded(v)).count() as f64 + f64::from(u8::from(end));
    // Neighbours are walked together as far as they are neighbours in all operands.
    let operands: Vec<&[u64]> =
        node.args.iter().zip(sizes.operands).filter(|(v, _)| loaded(v)).map(|(_, e)| e.as_slice()).collect();
    let apart = node.args.iter().any(|v| loaded(v) && look.strided[v.index()]);
    let run = (neighbours(sizes.out, &operands, apart) as f64).min(BLOCK);
    Quantities {
        call: f64::from(u8::from(end)),
        task: (out / run).ceil() * passes,
        element: out * passes,
        operation: out * transcendental(scalar),
        byte: 0.0,
    }
}

/// How many elements of the result follow one another in all operands, or are all the same one there.
fn neighbours(out: &[u64], operands: &[&[u64]], apart: bool) -> u64 {
    let mut run = 1;
    let mut pattern: Option<Vec<bool>> = None;
    for (back, &extent) in out.iter().rev().enumerate().filter(|(_, e)| **e != 1) {
        // Aligned right; what is missing or 1 is stretched.
        let whole = |o: &&[u64]| o.len() > back && o[o.len() - 1 - back] != 1;
        let here: Vec<bool> = operands.iter().map(whole).collect();
        match &pattern {
            Some(pattern) if apart || *pattern != here => break,
            _ => pattern = Some(here),
        }
        run *= extent;
    }
    run.max(1)
}

fn transcendental(scalar: Scalar) -> f64 {
    use Scalar as S;
    match scalar {
        S::Exp | S::Tanh | S::Sigmoid | S::Erf => 1.0,
        S::Log | S::Sin | S::Cos => CALLED,
        _ => 0.0,
    }
}

/// The work of a whole graph of constant sizes, by family.
pub fn work_of(graph: &Graph) -> BTreeMap<Family, Quantities> {
    let look = Look::new(graph);
    let sizes = |v: ValueId| -> Vec<u64> {
        graph.ty(v).shape.iter().map(|d| d.as_size().unwrap_or(0) as u64).collect()
    };
    let mut all: BTreeMap<Family, Quantities> = BTreeMap::new();
    for (id, node) in graph.values() {
        let operands: Vec<Vec<u64>> = node.args.iter().map(|&a| sizes(a)).collect();
        let bits: Vec<f64> = node.args.iter().map(|&a| graph.ty(a).dtype.bits() as f64).collect();
        let sizes = Sizes { operands: &operands, out: &sizes(id), bits: &bits };
        for Work { family, amounts } in work(graph, &look, id, &sizes) {
            let sum = all.entry(family).or_default();
            *sum = sum.plus(amounts, 1.0);
        }
    }
    all
}
