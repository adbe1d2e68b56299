//! Which collectives travel while the device computes, decided when a run's memory is planned.
//!
//! A collective between devices goes into the side queue if something that does not touch it is computed before it is
//! first used; the main queue waits for it there, and until then what it reads and writes is left alone. Where nothing
//! is computed in between, it stays in the main queue and nothing has to be waited for. A product whose only use is a
//! sum over ranks may be cut into [`Pieces`], each of which is summed while the next is computed.
//!
//! All collectives of a rank keep their order: one that begins while another is in the side queue goes there too, or
//! the main queue waits first.

use super::calls::Calls;
use super::prepared::{Origin, Prepared};
use crate::session::SessionError;
use std::collections::{BTreeMap, BTreeSet};
use tpshard_ir::dim::{Bindings, Dim};
use tpshard_ir::program::device::pieces::summed;
use tpshard_ir::program::device::{DeviceLowering, DeviceStep, How, Pieces};
use tpshard_ir::{Graph, ValueId};

/// Says `off` where nothing is to travel beside what is computed.
pub(super) const VARIABLE: &str = "TPSHARD_CUDA_OVERLAP";

/// Whether that is wanted, as [`VARIABLE`] says it.
pub(super) fn is_wanted(variable: Option<&str>) -> Result<bool, SessionError> {
    match variable {
        None | Some("" | "on") => Ok(true),
        Some("off") => Ok(false),
        Some(other) => {
            let what = format!("{VARIABLE}={other} is not known\n  help: say on or off");
            Err(SessionError::Usage { what })
        }
    }
}

/// A product that may be made in pieces, made ready.
pub(super) struct Cut {
    pub(super) pieces: Pieces,
    /// The calls of a piece.
    pub(super) calls: Calls,
    /// What they read.
    reads: Vec<ValueId>,
}

/// The products that may be made in pieces, by the step of the sum that follows.
pub(super) fn cuts(steps: &[DeviceStep], lowering: &DeviceLowering, graph: &Graph) -> BTreeMap<usize, Cut> {
    let mut cuts = BTreeMap::new();
    for (index, pair) in steps.windows(2).enumerate() {
        let [product, sum] = pair else { continue };
        if let Some(pieces) = lowering.pieces.get(&product.value)
            && sum.how == How::Convert
            && summed(graph, sum.value) == Some(product.value)
        {
            let step = DeviceStep { how: pieces.how.clone(), scratch: Dim::constant(0), ..product.clone() };
            let reads = product.reads(graph);
            let cut = Cut { pieces: pieces.clone(), calls: Calls::new(&[step]), reads };
            cuts.insert(index + 1, cut);
        }
    }
    cuts
}

/// A change of layout among the steps, and what follows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Change {
    step: usize,
    /// The memory of what it reads and of what it makes.
    own: [Option<Origin>; 2],
    /// The next step that the host computes, or that reads what it makes or writes what it reads; else the number of steps.
    used: usize,
    /// The next step that calls kernels.
    next_call: usize,
}

/// All changes of layout, in order. A value in another shape is no use: whoever reads it is.
pub(super) fn changes(prepared: &Prepared, graph: &Graph) -> Vec<Change> {
    let steps = &prepared.steps;
    let mut readers: BTreeMap<usize, BTreeSet<usize>> = BTreeMap::new();
    let mut growing: BTreeMap<usize, BTreeSet<usize>> = BTreeMap::new();
    let (mut hosts, mut calls) = (BTreeSet::new(), BTreeSet::new());
    for (index, step) in steps.iter().enumerate() {
        match step.how {
            How::Host => {
                hosts.insert(index);
            }
            How::Append { .. } => {
                if let Some(Origin::Step(of)) = prepared.origin_of(step.value) {
                    growing.entry(of).or_default().insert(index);
                }
            }
            _ => {}
        }
        if !step.how.launches().is_empty() {
            calls.insert(index);
        }
        for read in step.reads(graph).iter().filter(|_| !matches!(step.how, How::Alias(_))) {
            if let Some(Origin::Step(of)) = prepared.origin_of(*read) {
                readers.entry(of).or_default().insert(index);
            }
        }
    }
    let after = |set: &BTreeSet<usize>, step: usize| set.range(step + 1..).next().copied();
    let change = |(step, made): (usize, &DeviceStep)| {
        let from = graph.node(made.value).args.first().copied();
        let own = [from, Some(made.value)].map(|value| value.and_then(|value| prepared.origin_of(value)));
        let of = |sets: &BTreeMap<usize, BTreeSet<usize>>, origin: Option<Origin>| match origin {
            Some(Origin::Step(of)) => sets.get(&of).and_then(|set| after(set, step)),
            _ => None,
        };
        let uses = [of(&readers, own[1]), of(&growing, own[0]), of(&growing, own[1]), after(&hosts, step)];
        let used = uses.into_iter().flatten().min().unwrap_or(steps.len());
        Change { step, own, used, next_call: after(&calls, step).unwrap_or(steps.len()) }
    };
    steps.iter().enumerate().filter(|(_, step)| step.how == How::Convert).map(change).collect()
}

/// The products of an entry that are made in pieces, in words that are equal if they are.
pub(super) fn described(entry: &str, prepared: &Prepared) -> String {
    let mut text = String::new();
    for (&index, cut) in &prepared.cuts {
        let value = prepared.steps.get(index).map_or(ValueId(u32::MAX), |step| step.value);
        text.push_str(&format!("{entry}/{value} {:?}\n", cut.pieces.counts));
    }
    text
}

/// What travels beside the rest in a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Beside {
    /// Steps of collectives in the side queue.
    aside: BTreeSet<usize>,
    /// Steps before which the main queue waits for the side one.
    joins: BTreeSet<usize>,
    /// The rows of the pieces of products, by the step of the sum that follows.
    pieces: BTreeMap<usize, Vec<u64>>,
    /// Until which step memory is in use at least that some step begins.
    lasts: BTreeMap<usize, usize>,
}

impl Beside {
    /// `goes_aside` says of which changes of layout are calls of the library and nothing besides; `cut` that products are made
    /// in pieces.
    pub(super) fn new(
        prepared: &Prepared,
        bindings: &Bindings,
        goes_aside: &dyn Fn(usize) -> bool,
        cut: bool,
    ) -> Beside {
        let mut beside = Beside::default();
        let eligible: Vec<bool> = prepared.changes.iter().map(|change| goes_aside(change.step)).collect();
        // The next that cannot go aside, for which the main queue waits since all keep their order.
        let mut barrier = prepared.steps.len();
        let mut barriers: Vec<usize> = Vec::with_capacity(eligible.len());
        for (change, eligible) in prepared.changes.iter().zip(&eligible).rev() {
            barriers.push(barrier);
            barrier = if *eligible { barrier } else { change.step };
        }
        // The step before which the open collectives are waited for.
        let mut open: Option<usize> = None;
        for ((change, eligible), barrier) in
            prepared.changes.iter().zip(eligible).zip(barriers.into_iter().rev())
        {
            if let Some(join) = open.filter(|&join| join <= change.step) {
                beside.joins.insert(join);
                open = None;
            }
            if !eligible {
                continue;
            }
            let cut = prepared.cuts.get(&change.step).filter(|_| cut);
            let pieces = cut.and_then(|cut| Some((cut, cut.pieces.cut(bindings).ok()?)));
            let pieces = pieces.filter(|(_, pieces)| pieces.len() > 1);
            let join = change.used.min(barrier);
            if open.is_none() && pieces.is_none() && change.next_call >= join {
                continue;
            }
            // The side queue keeps its order, so that who waits for its end waits for everything in it.
            let join = open.map_or(join, |open| open.min(join));
            open = Some(join);
            beside.aside.insert(change.step);
            if let Some((cut, pieces)) = pieces {
                cut.reads.iter().for_each(|read| beside.keep(prepared.origin_of(*read), change.step));
                beside.pieces.insert(change.step, pieces);
            }
            change.own.into_iter().for_each(|origin| beside.keep(origin, join.saturating_sub(1)));
        }
        beside.joins.extend(open);
        beside
    }

    fn keep(&mut self, origin: Option<Origin>, until: usize) {
        if let Some(Origin::Step(step)) = origin {
            let last = self.lasts.entry(step).or_default();
            *last = until.max(*last);
        }
    }

    pub(super) fn is_aside(&self, step: usize) -> bool {
        self.aside.contains(&step)
    }

    /// Whether the main queue waits for the side one before this step; the number of steps stands for the end.
    pub(super) fn joins(&self, step: usize) -> bool {
        self.joins.contains(&step)
    }

    /// The rows of the pieces that are summed in this step.
    pub(super) fn pieces(&self, step: usize) -> Option<&[u64]> {
        self.pieces.get(&step).map(Vec::as_slice)
    }

    /// The last step that needs the memory that a step begins, where `last` is the last that reads or writes it.
    pub(super) fn last(&self, step: usize, last: usize) -> usize {
        self.lasts.get(&step).map_or(last, |&kept| kept.max(last))
    }
}

#[cfg(test)]
mod tests;
