//! How evenly ranks hold weights and state. Units that ranks do not divide leave the first ranks with more than the
//! last, and fewer units than ranks leave some with none.

use crate::cost::Pricer;
use crate::plan::Emitted;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use tpshard_ir::{Graph, Layout, Mesh, Op, StepKind, ValueId};

/// Bytes of weights and state over the ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Balance {
    pub ranks: usize,
    /// On the rank that holds most.
    pub largest: u64,
    /// Of all ranks together.
    pub total: u64,
    /// The ranks that own no part of some tensor that is split, for the tensor where they are most.
    pub idle: usize,
}

impl Balance {
    /// The largest rank's share against an even one.
    pub fn ratio(&self) -> f64 {
        if self.total == 0 { 1.0 } else { self.largest as f64 * self.ranks as f64 / self.total as f64 }
    }

    pub(crate) fn of(graph: &Graph, programs: &[Emitted], pricer: &Pricer<'_>, mesh: &Mesh) -> Balance {
        let ranks = mesh.ranks();
        let mut held = vec![0u64; ranks];
        let mut idle = 0;
        for ((_, layout), (value, count)) in kinds(graph, programs) {
            let bytes: Vec<u64> = (0..ranks).map(|r| pricer.bytes_on(value, layout, mesh, r)).collect();
            idle = idle.max(bytes.iter().filter(|&&b| b == 0).count() % ranks);
            for (all, own) in held.iter_mut().zip(bytes) {
                *all = all.saturating_add(own.saturating_mul(count));
            }
        }
        let total = held.iter().copied().fold(0, u64::saturating_add);
        Balance { ranks, largest: held.iter().copied().max().unwrap_or(0), total, idle }
    }
}

/// One of the stored values of each type and layout, and how many there are.
fn kinds<'a>(graph: &Graph, programs: &'a [Emitted]) -> BTreeMap<(String, &'a Layout), (ValueId, u64)> {
    let mut kinds: BTreeMap<(String, &Layout), (ValueId, u64)> = BTreeMap::new();
    // Entries share what they store.
    let mut seen: BTreeSet<(ValueId, &Layout)> = BTreeSet::new();
    for step in programs.iter().flat_map(|p| &p.steps).filter(|s| s.kind == StepKind::Compute) {
        let node = graph.node(step.value);
        let stored = match &node.op {
            Op::Weight(_) => true,
            Op::Input { name } => graph.states.iter().any(|s| s.input == *name),
            _ => false,
        };
        if stored && seen.insert((step.value, &step.layout)) {
            let kind = (node.ty.to_string(), &step.layout);
            kinds.entry(kind).or_insert((step.value, 0)).1 += 1;
        }
    }
    kinds
}

impl fmt::Display for Balance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self.idle {
            0 => format!("{:.2}x", self.ratio()),
            idle => format!("{:.2}x, {idle} idle", self.ratio()),
        };
        f.pad(&text)
    }
}
