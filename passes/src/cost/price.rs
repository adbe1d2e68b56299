//! What one step costs on rank 0, which holds at least as much of everything as any other rank.
//!
//! Contractions, convolutions and attention take as long as the slower of computing and moving their operands. The
//! rest is moved once. A chain of elementwise operations is one kernel: it is charged where the chain ends, at the
//! first value that something else needs. Reshapes, broadcasts, slices and transposes are read in place by their
//! users. A quantised weight is widened where it is used, so its users read the quantised bytes.

use super::Cost;
use super::kernels::Sizes;
use super::measured::MeasuredKernels;
use super::profile::{Collective, Profile};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;
use tpshard_ir::graph::SymbolRange;
use tpshard_ir::{AxisLayout, Bindings, Conversion, DType, Graph, Layout, Mesh, Op, Type, ValueId};

/// What an unbound symbol is taken for.
const UNBOUND: i64 = 128;
/// A step that only looks at memory another way still costs more than none.
const LOOK: f64 = 1e-9;
/// What it counts for to hold a value whole where everything is to be split: more than any time saved by it.
const WHOLE: f64 = 1.0;

/// A use of the model: sizes of the symbolic dims, and how much its time counts.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    pub name: String,
    /// The sizes that time is predicted for.
    pub bindings: Bindings,
    /// The sizes that memory is counted for.
    pub largest: Bindings,
    /// The sizes the entry is for; symbols without a range may have any.
    pub ranges: BTreeMap<Arc<str>, SymbolRange>,
    pub weight: f64,
}

impl Entry {
    /// An entry of weight 1 for these sizes, which takes all others as well.
    pub fn new(name: &str, bindings: Bindings) -> Entry {
        Entry { name: name.into(), largest: bindings.clone(), bindings, ranges: BTreeMap::new(), weight: 1.0 }
    }
}

/// Where the seconds of a step go.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Parts {
    pub compute: f64,
    pub memory: f64,
    pub launch: f64,
    pub communication: f64,
}

impl Parts {
    pub fn total(&self) -> f64 {
        // Computing and moving overlap; each step records only the slower of the two.
        self.compute + self.memory + self.launch + self.communication
    }

    pub fn add(&mut self, other: &Parts, weight: f64) {
        self.compute += weight * other.compute;
        self.memory += weight * other.memory;
        self.launch += weight * other.launch;
        self.communication += weight * other.communication;
    }
}

/// Extents under each entry.
pub(super) type Extents = Vec<Vec<u64>>;

/// Prices the steps of one graph on one kind of device.
#[derive(Clone)]
pub struct Pricer<'a> {
    profile: &'a Profile,
    graph: &'a Graph,
    entries: &'a [Entry],
    total_weight: f64,
    /// The entry whose share of the weighted time is asked for; all of them if none.
    focus: Option<usize>,
    /// Values held whole are priced out of all plans that can do without.
    split_all: bool,
    /// Per value.
    extents: Rc<Vec<Extents>>,
    /// Per value, at the upper ends of all ranges.
    largest: Rc<Vec<Extents>>,
    /// Per entry.
    largest_bindings: Vec<Bindings>,
    /// Rates of measured kernels and what they need to know of the graph, if the profile has any.
    measured: Option<Rc<MeasuredKernels>>,
    /// Per value: it is computed inside the kernel of its users.
    fused: Rc<Vec<bool>>,
    /// Per value: bits read per element.
    read_bits: Rc<Vec<f64>>,
}

/// A value for every symbol of `graph`: the given one, or 128 within the symbol's range.
pub fn complete(graph: &Graph, bindings: &Bindings) -> Bindings {
    let value = |(name, range): (&Arc<str>, &SymbolRange)| {
        let unbound = || UNBOUND.max(range.low).min(range.high.max(range.low));
        (name.clone(), bindings.get(name).copied().unwrap_or_else(unbound))
    };
    let mut all: Bindings = graph.symbols.iter().map(value).collect();
    for (name, &size) in bindings {
        all.entry(name.clone()).or_insert(size);
    }
    all
}

/// The extents of a type under a binding. Symbols without a value are taken for 128, within their range.
pub fn extents(graph: &Graph, ty: &Type, bindings: &Bindings) -> Vec<u64> {
    extents_complete(ty, &complete(graph, bindings))
}

fn extents_complete(ty: &Type, bindings: &Bindings) -> Vec<u64> {
    let size = |dim: &tpshard_ir::Dim| match dim.as_const() {
        Some(size) => size,
        None => dim.eval(bindings).unwrap_or_else(|_| {
            let value = |name: Arc<str>| {
                let value = bindings.get(&name).copied().unwrap_or(UNBOUND);
                (name, value)
            };
            dim.eval(&dim.symbols().into_iter().map(value).collect()).unwrap_or(0)
        }),
    };
    ty.shape.iter().map(|dim| size(dim).max(0).unsigned_abs()).collect()
}

/// What rank 0 holds of a tensor of these extents.
pub fn local_extents(extents: &[u64], layout: &Layout, mesh: &Mesh, bindings: &Bindings) -> Vec<u64> {
    let mut local = extents.to_vec();
    for (part, &ranks) in layout.0.iter().zip(&mesh.0) {
        if let AxisLayout::Shard { dim, unit } = part
            && let Some(extent) = local.get_mut(*dim)
        {
            let unit = unit.eval(bindings).ok().and_then(|u| u64::try_from(u).ok()).unwrap_or(1).max(1);
            *extent = (*extent / unit).div_ceil(ranks as u64) * unit;
        }
    }
    local
}

pub(super) fn product(extents: &[u64]) -> f64 {
    extents.iter().map(|&e| e as f64).product()
}

impl<'a> Pricer<'a> {
    pub fn new(profile: &'a Profile, graph: &'a Graph, entries: &'a [Entry]) -> Pricer<'a> {
        let bindings: Vec<Bindings> = entries.iter().map(|e| complete(graph, &e.bindings)).collect();
        let largest_bindings: Vec<Bindings> = entries.iter().map(|e| complete(graph, &e.largest)).collect();
        let all = |bindings: &[Bindings]| -> Vec<Extents> {
            let of = |ty: &Type| bindings.iter().map(|b| extents_complete(ty, b)).collect();
            graph.nodes().iter().map(|n| of(&n.ty)).collect()
        };
        let users = graph.users();
        let outputs: BTreeSet<ValueId> = graph.outputs.iter().map(|o| o.value).collect();
        let fused = graph
            .values()
            .map(|(id, node)| {
                let users = &users[id.index()];
                let all = |wanted: fn(&Op) -> bool| users.iter().all(|&u| wanted(&graph.node(u).op));
                !outputs.contains(&id)
                    && match node.op {
                        Op::Map(_) => all(|op| matches!(op, Op::Map(_))),
                        Op::Dequant { .. } => {
                            all(|op| matches!(op, Op::Einsum(_) | Op::Conv { .. } | Op::Gather { .. }))
                        }
                        _ => false,
                    }
                    && !users.is_empty()
            })
            .collect();
        let all_extents = all(&bindings);
        let measured = MeasuredKernels::of(profile, graph, &all_extents).map(Rc::new);
        let total: f64 = entries.iter().map(|e| e.weight).sum();
        Pricer {
            profile,
            graph,
            entries,
            total_weight: if total > 0.0 { total } else { 1.0 },
            focus: None,
            split_all: false,
            measured,
            extents: Rc::new(all_extents),
            largest: Rc::new(if largest_bindings == bindings { Vec::new() } else { all(&largest_bindings) }),
            largest_bindings,
            fused: Rc::new(fused),
            read_bits: Rc::new(graph.nodes().iter().map(|n| read_bits(graph, n)).collect()),
        }
    }

    /// The same prices, as far as they come from one entry: over all entries they add up to those of `self`.
    pub fn focused(&self, entry: usize) -> Pricer<'a> {
        Pricer { focus: Some(entry), ..self.clone() }
    }

    /// The same prices, or those by which every value that can be split is.
    #[must_use]
    pub fn splitting(self, split_all: bool) -> Pricer<'a> {
        Pricer { split_all, ..self }
    }

    /// True if everything is to be split.
    pub(crate) fn splits_all(&self) -> bool {
        self.split_all
    }

    /// What holding a value in `layout` counts for besides its time.
    pub(crate) fn whole(&self, layout: &Layout) -> Cost {
        let whole = self.split_all && layout.is_replicated();
        if whole { Cost::local(self.weighted(|_| WHOLE)) } else { Cost::ZERO }
    }

    pub fn kernel_launch(&self) -> f64 {
        self.profile.kernel_launch
    }

    /// What a step takes besides its operations, as far as it counts.
    pub fn step_overhead(&self, entry: usize) -> Cost {
        Cost::local(self.share(entry) * self.overhead_parts(entry).total())
    }

    /// Where that time goes.
    pub fn overhead_parts(&self, entry: usize) -> Parts {
        if let Some(step) = self.measured.as_ref().and_then(|k| k.step(entry)) {
            return step;
        }
        Parts { launch: self.profile.step_overhead, ..Parts::default() }
    }

    pub fn entries(&self) -> &[Entry] {
        self.entries
    }

    pub fn extents_of(&self, value: ValueId) -> &[Vec<u64>] {
        &self.extents[value.index()]
    }

    /// Bytes of `value` on rank 0, the most over all entries and their ranges.
    pub fn local_bytes(&self, value: ValueId, layout: &Layout, mesh: &Mesh) -> u64 {
        let dtype = self.graph.ty(value).dtype;
        let extents = self.largest.get(value.index()).unwrap_or(&self.extents[value.index()]);
        let local = extents.iter().zip(&self.largest_bindings);
        local.map(|(e, b)| bytes(dtype, &local_extents(e, layout, mesh, b))).max().unwrap_or(0)
    }

    /// A value for every symbol at the upper ends of its ranges, per entry.
    pub(crate) fn largest_bindings(&self) -> &[Bindings] {
        &self.largest_bindings
    }

    fn local(&self, value: ValueId, layout: &Layout, mesh: &Mesh, entry: usize) -> Vec<u64> {
        local_extents(&self.extents[value.index()][entry], layout, mesh, &self.entries[entry].bindings)
    }

    /// Bytes of `value` on rank 0 under one entry.
    pub fn result_bytes(&self, value: ValueId, layout: &Layout, mesh: &Mesh, entry: usize) -> u64 {
        bytes(self.graph.ty(value).dtype, &self.local(value, layout, mesh, entry))
    }

    /// The weighted time of computing `value` in layout `result` from operands in `layouts`.
    pub fn compute(&self, value: ValueId, layouts: &[&Layout], result: &Layout, mesh: &Mesh) -> Cost {
        let seconds = self.weighted(|e| self.compute_parts(value, layouts, result, mesh, e).total());
        Cost::local(seconds) + self.whole(result)
    }

    /// What the price of computing `value` depends on besides its operation, types and layouts.
    pub(crate) fn traits(&self, value: ValueId) -> impl Iterator<Item = u64> {
        let args = &self.graph.node(value).args;
        let bits = args.iter().map(|a| self.read_bits[a.index()].to_bits());
        let measured = self.measured.iter().flat_map(move |k| k.traits(self.graph, value));
        std::iter::once(u64::from(self.fused[value.index()])).chain(bits).chain(measured)
    }

    /// The weighted time of a conversion of `value`.
    pub fn convert(
        &self,
        value: ValueId,
        conversion: &Conversion,
        from: &Layout,
        to: &Layout,
        mesh: &Mesh,
    ) -> Cost {
        let seconds = self.weighted(|e| self.convert_parts(value, conversion, from, to, mesh, e).0.total());
        if conversion.communicates() {
            let payload = |e| self.convert_parts(value, conversion, from, to, mesh, e).1;
            Cost::collective(seconds, self.counted().map(payload).max().unwrap_or(0))
        } else {
            Cost::local(seconds)
        }
    }

    /// The entries whose time counts.
    fn counted(&self) -> std::ops::Range<usize> {
        self.focus.map_or(0..self.entries.len(), |entry| entry..entry + 1)
    }

    fn weighted(&self, seconds: impl Fn(usize) -> f64) -> f64 {
        self.counted().map(|e| self.share(e) * seconds(e)).sum()
    }

    /// How much an entry's time counts; all shares add up to one.
    pub fn share(&self, entry: usize) -> f64 {
        self.entries.get(entry).map_or(0.0, |e| e.weight / self.total_weight)
    }

    /// Where the time of a computation goes under one entry.
    pub fn compute_parts(
        &self,
        value: ValueId,
        layouts: &[&Layout],
        result: &Layout,
        mesh: &Mesh,
        entry: usize,
    ) -> Parts {
        let node = self.graph.node(value);
        let out = self.local(value, result, mesh, entry);
        let operands: Vec<Vec<u64>> =
            node.args.iter().zip(layouts).map(|(&a, l)| self.local(a, l, mesh, entry)).collect();
        if let Some(kernels) = &self.measured {
            let bits: Vec<f64> = node.args.iter().map(|a| self.read_bits[a.index()]).collect();
            let sizes = Sizes { operands: &operands, out: &out, bits: &bits };
            return kernels.parts(self.profile, self.graph, value, &sizes);
        }
        let read = |i: usize| match (node.args.get(i), operands.get(i)) {
            (Some(arg), Some(extents)) => product(extents) * self.read_bits[arg.index()] / 8.0,
            _ => 0.0,
        };
        let reads = || (0..operands.len()).map(read).sum::<f64>();
        let write = product(&out) * node.ty.dtype.bits() as f64 / 8.0;
        let operand = |i: usize| operands.get(i).map_or(&[][..], Vec::as_slice);
        match &node.op {
            Op::Input { .. } | Op::Weight(_) | Op::Literal(_) | Op::Size(_) => Parts::default(),
            Op::Map(_) | Op::Dequant { .. } if self.fused[value.index()] => look(),
            Op::Reshape { .. } | Op::Broadcast { .. } | Op::Transpose { .. } | Op::Slice { .. } => look(),
            Op::Einsum(spec) => {
                let mut loops = 1.0;
                for letter in spec.letters() {
                    let extent = spec.inputs.iter().zip(&operands).find_map(|(letters, extents)| {
                        letters.iter().zip(extents).find(|(l, _)| **l == letter).map(|(_, &e)| e)
                    });
                    loops *= extent.unwrap_or(1) as f64;
                }
                self.roofline(node.ty.dtype, 2.0 * loops, reads() + write)
            }
            Op::Conv { .. } => {
                let (w, channels) = (operand(1), operand(1).first().copied().unwrap_or(1).max(1));
                let flops = 2.0 * product(&out) * product(w) / channels as f64;
                self.roofline(node.ty.dtype, flops, reads() + write)
            }
            Op::Attention { .. } => {
                let keys = operand(1).get(2).copied().unwrap_or(0) as f64;
                let depth = operand(0).get(3).copied().unwrap_or(0) + out.get(3).copied().unwrap_or(0);
                let rows = product(out.get(..3).unwrap_or(&[]));
                self.roofline(node.ty.dtype, 2.0 * rows * keys * depth as f64, reads() + write)
            }
            // In place: only what is new is written.
            Op::Append { .. } => self.moved(2.0 * read(1)),
            Op::Gather { .. } | Op::GatherElements { .. } | Op::GatherNd { .. } => self.moved(2.0 * write),
            Op::Map(_)
            | Op::Reduce { .. }
            | Op::Scan { .. }
            | Op::Pool { .. }
            | Op::TopK { .. }
            | Op::Pad { .. }
            | Op::Concat { .. }
            | Op::ScatterElements { .. }
            | Op::ScatterNd { .. }
            | Op::Dequant { .. }
            | Op::Softmax { .. }
            | Op::Norm { .. }
            | Op::Rotary { .. }
            | Op::Deferred { .. }
            | Op::Iota { .. } => self.moved(reads() + write),
            Op::Convert(_) => Parts::default(),
        }
    }

    fn roofline(&self, dtype: DType, operations: f64, bytes: f64) -> Parts {
        let (compute, memory) = (operations / self.profile.peak(dtype), bytes / self.profile.bandwidth());
        let launch = self.profile.kernel_launch;
        if compute > memory {
            Parts { compute, launch, ..Parts::default() }
        } else {
            Parts { memory, launch, ..Parts::default() }
        }
    }

    fn moved(&self, bytes: f64) -> Parts {
        let memory = bytes / self.profile.bandwidth();
        Parts { memory, launch: self.profile.kernel_launch, ..Parts::default() }
    }

    /// Where the time of a conversion goes under one entry, and the bytes it carries per rank: for an all-reduce the
    /// tensor, for an all-gather and an all-to-all what comes from others, for a reduce-scatter what goes to others.
    pub fn convert_parts(
        &self,
        value: ValueId,
        conversion: &Conversion,
        from: &Layout,
        to: &Layout,
        mesh: &Mesh,
        entry: usize,
    ) -> (Parts, u64) {
        let dtype = self.graph.ty(value).dtype;
        let before = bytes(dtype, &self.local(value, from, mesh, entry));
        let after = bytes(dtype, &self.local(value, to, mesh, entry));
        let span = match conversion {
            Conversion::Transfer => self.profile.span(2),
            _ => self.profile.span_of_axes(&mesh.0, conversion.axes()),
        };
        let ranks = span.ranks() as u64;
        // Uneven shards are padded to rank 0's, the largest.
        let padded = |shard: u64, whole: u64| shard.saturating_mul(ranks).max(whole);
        let (kind, tensor, payload) = match conversion {
            Conversion::ShardSlice { .. } | Conversion::OnlyFirst { .. } => return (look(), 0),
            Conversion::Transfer => (Collective::Transfer, after, after),
            Conversion::AllReduce { .. } | Conversion::TreeReduce { .. } => {
                (Collective::AllReduce, before, before)
            }
            Conversion::AllGather { .. } => {
                (Collective::AllGather, padded(before, after), after.saturating_sub(before))
            }
            Conversion::ReduceScatter { .. } => {
                (Collective::ReduceScatter, padded(after, before), before.saturating_sub(after))
            }
            Conversion::AllToAll { .. } | Conversion::Redeal { .. } => {
                (Collective::AllToAll, after, after - after / ranks)
            }
        };
        let meeting = self.measured.as_ref().map_or(0.0, |kernels| kernels.meeting());
        let communication = self.profile.collective_over(kind, span, tensor as f64) + meeting;
        (Parts { communication, ..Parts::default() }, payload)
    }

    /// The weighted time of collecting an output on rank 0.
    pub fn collect(&self, value: ValueId, layout: &Layout, mesh: &Mesh) -> Cost {
        Cost::local(self.weighted(|e| self.collect_parts(value, layout, mesh, e).total()))
    }

    /// Where the time of collecting an output goes under one entry.
    pub fn collect_parts(&self, value: ValueId, layout: &Layout, mesh: &Mesh, entry: usize) -> Parts {
        if layout.is_replicated() {
            return Parts::default();
        }
        let dtype = self.graph.ty(value).dtype;
        let whole = bytes(dtype, &self.extents[value.index()][entry]);
        let communication = self.profile.collective_time(Collective::AllGather, mesh.ranks(), whole as f64);
        Parts { communication, ..Parts::default() }
    }
}

pub(super) fn look() -> Parts {
    Parts { launch: LOOK, ..Parts::default() }
}

/// Bytes of a tensor; absurd sizes saturate.
pub(super) fn bytes(dtype: DType, extents: &[u64]) -> u64 {
    let count = extents.iter().try_fold(1u64, |n, &e| n.checked_mul(e));
    count.and_then(|n| dtype.byte_len(n)).unwrap_or(u64::MAX)
}

/// Bits read per element of a value by its users.
fn read_bits(graph: &Graph, node: &tpshard_ir::Node) -> f64 {
    let bits = |value: ValueId| graph.ty(value).dtype.bits() as f64;
    match (&node.op, node.args.as_slice()) {
        (Op::Dequant { block, .. }, [q, scales @ ..]) => {
            let shared: f64 = scales.iter().map(|&s| bits(s)).sum();
            bits(*q) + shared / (*block).max(1) as f64
        }
        (Op::Map(tpshard_ir::Scalar::Cast(_)), [x]) if matches!(graph.node(*x).op, Op::Weight(_)) => bits(*x),
        _ => node.ty.dtype.bits() as f64,
    }
}
