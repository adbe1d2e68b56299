//! Prices of a machine that was calibrated: the work of a node times the rates that were measured.

use super::kernels::{Family, Look, Measured, Quantities, Sizes, Work, work};
use super::price::{Extents, Parts, bytes, look, product};
use super::profile::Profile;
use tpshard_ir::{Graph, Op, ValueId};

/// The rates of a profile, and what they need to know of a graph.
pub(super) struct MeasuredKernels {
    rates: Measured,
    look: Look,
    /// The weights and inputs of a step are larger than the caches.
    cold: bool,
    /// Ranks that share the caches.
    ranks: f64,
    /// Inputs and outputs, per entry. States stay where they are.
    exchanged: Vec<Quantities>,
}

impl MeasuredKernels {
    /// None if the profile knows its machine from data sheets.
    pub(super) fn of(profile: &Profile, graph: &Graph, extents: &[Extents]) -> Option<MeasuredKernels> {
        let rates = profile.kernels.values().next()?.clone();
        let of = |value: ValueId, entry: usize| extents.get(value.index()).and_then(|e| e.get(entry));
        let elements = |value: ValueId, entry: usize| of(value, entry).map_or(0.0, |e| product(e));
        let size = |value: ValueId, entry: usize| -> f64 {
            of(value, entry).map_or(0.0, |e| bytes(graph.ty(value).dtype, e) as f64)
        };
        let held = |entry: usize| -> f64 {
            let held = graph.values().filter(|(_, n)| matches!(n.op, Op::Weight(_) | Op::Input { .. }));
            held.map(|(value, _)| size(value, entry)).sum()
        };
        let exchanged = |entry: usize| {
            let inputs =
                || graph.inputs().filter(|(_, name, _)| graph.states.iter().all(|s| s.input != **name));
            let outputs = graph.outputs.iter().filter(|o| graph.states.iter().all(|s| s.output != o.name));
            Quantities {
                call: 1.0,
                task: inputs().count() as f64,
                byte: inputs().map(|(value, ..)| size(value, entry)).sum(),
                element: outputs.map(|o| elements(o.value, entry)).sum(),
                operation: 0.0,
            }
        };
        let entries = extents.iter().map(Vec::len).max().unwrap_or(0);
        let most = (0..entries).map(held).fold(0.0, f64::max);
        Some(MeasuredKernels {
            rates,
            look: Look::new(graph),
            cold: profile.cache_bytes.is_none_or(|cache| most > cache),
            ranks: profile.shared_ranks.unwrap_or(1) as f64,
            exchanged: (0..entries).map(exchanged).collect(),
        })
    }

    /// Where the time of a step goes that computes nothing.
    pub(super) fn step(&self, entry: usize) -> Option<Parts> {
        let rates = self.rates.get(&Family::Step)?;
        Some(parts_of(self.exchanged.get(entry).copied().unwrap_or_default(), *rates))
    }

    pub(super) fn traits(&self, graph: &Graph, value: ValueId) -> impl Iterator<Item = u64> + use<> {
        self.look.traits(graph, value)
    }

    /// Where the time of a node goes.
    pub(super) fn parts(&self, profile: &Profile, graph: &Graph, value: ValueId, sizes: &Sizes<'_>) -> Parts {
        let mut total = Parts::default();
        for Work { family, amounts } in work(graph, &self.look, value, sizes) {
            let Some(&rates) = self.rates.get(&family) else {
                // Not measured: taken to be moved.
                let moved = 4.0 * amounts.element.max(amounts.byte / 4.0) / profile.bandwidth();
                total.add(&Parts { memory: moved, launch: profile.kernel_launch, ..Parts::default() }, 1.0);
                continue;
            };
            let mut parts = parts_of(amounts, rates);
            if self.cold && matches!(family, Family::Product | Family::Vector) {
                // The weight comes from memory while the product is computed.
                parts.memory += (amounts.byte / profile.bandwidth() - parts.total()).max(0.0);
            }
            total.add(&parts, 1.0);
        }
        // What the caches do not hold comes from memory.
        let streamed = streamed(graph, value, sizes);
        if profile.cache_bytes.is_some_and(|most| streamed * self.ranks > most) && !self.look.is_view(value) {
            total.memory += (streamed / profile.bandwidth() - total.total()).max(0.0);
        }
        // Nothing is free, so that of equal plans the shorter one wins.
        let op = &graph.node(value).op;
        if total == Parts::default() && !matches!(op, Op::Input { .. } | Op::Weight(_) | Op::Literal(_)) {
            return look();
        }
        total
    }
}

/// Bytes that a kernel reads and writes.
fn streamed(graph: &Graph, value: ValueId, sizes: &Sizes<'_>) -> f64 {
    let node = graph.node(value);
    let write = product(sizes.out) * node.ty.dtype.bits() as f64 / 8.0;
    let read = sizes.operands.iter().zip(sizes.bits).map(|(e, bits)| product(e) * bits / 8.0);
    match node.op {
        Op::Gather { .. } => 2.0 * write,
        Op::Append { .. } => 0.0,
        _ => read.sum::<f64>() + write,
    }
}

/// Where the time of measured work goes.
fn parts_of(amounts: Quantities, rates: Quantities) -> Parts {
    Parts {
        compute: amounts.operation * rates.operation,
        memory: amounts.element * rates.element + amounts.byte * rates.byte,
        launch: amounts.call * rates.call + amounts.task * rates.task,
        communication: 0.0,
    }
}
