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
            let cut = Cut { pieces: pieces.clone(), calls: Calls::new(&[step]) };
            cuts.insert(index + 1, cut);
        }
    }
    cuts
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
    /// `goes_aside` says of which collectives are calls of the library and nothing besides; `cut` that products are made
    /// in pieces.
    pub(super) fn new(
        prepared: &Prepared,
        graph: &Graph,
        bindings: &Bindings,
        goes_aside: &dyn Fn(usize) -> bool,
        cut: bool,
    ) -> Beside {
        let steps = &prepared.steps;
        let mut beside = Beside::default();
        let reads: Vec<Vec<ValueId>> = steps.iter().map(|step| step.reads(graph)).collect();
        let eligible: Vec<bool> = (0..steps.len())
            .map(|index| steps.get(index).is_some_and(|s| s.how == How::Convert) && goes_aside(index))
            .collect();
        let is_eligible = |index: usize| eligible.get(index).copied().unwrap_or(false);
        // The step before which the open collectives are waited for.
        let mut open: Option<usize> = None;
        for (index, step) in steps.iter().enumerate() {
            if open == Some(index) {
                beside.joins.insert(index);
                open = None;
            }
            if !is_eligible(index) {
                continue;
            }
            let pieces = prepared.cuts.get(&index).filter(|_| cut);
            let pieces = pieces.and_then(|cut| cut.pieces.cut(bindings).ok()).filter(|p| p.len() > 1);
            let (from, to) = (graph.node(step.value).args.first().copied(), step.value);
            let own = [from.and_then(|from| prepared.origin_of(from)), prepared.origin_of(to)];
            let touches = |at: usize| {
                let Some(step) = steps.get(at) else { return true };
                let waits = match step.how {
                    How::Host => true,
                    How::Convert => !is_eligible(at),
                    _ => false,
                };
                let read = |value: &ValueId| prepared.origin_of(*value) == own[1];
                let grows =
                    matches!(step.how, How::Append { .. }) && own.contains(&prepared.origin_of(step.value));
                let is_view = matches!(step.how, How::Alias(_));
                waits || grows || (!is_view && reads.get(at).is_some_and(|reads| reads.iter().any(read)))
            };
            let join = (index + 1..steps.len()).find(|&at| touches(at)).unwrap_or(steps.len());
            let computes = |at: usize| steps.get(at).is_some_and(|step| !step.how.launches().is_empty());
            let alone = open.is_none() && pieces.is_none() && !(index + 1..join).any(computes);
            if alone {
                continue;
            }
            // The side queue keeps its order, so that who waits for its end waits for everything in it.
            let join = open.map_or(join, |open| open.min(join));
            open = Some(join);
            beside.aside.insert(index);
            if let Some(pieces) = pieces {
                for read in index.checked_sub(1).and_then(|product| reads.get(product)).into_iter().flatten()
                {
                    beside.keep(prepared.origin_of(*read), index);
                }
                beside.pieces.insert(index, pieces);
            }
            for origin in own {
                // What is open until the first of several is waited for may be open longer than that by itself.
                beside.keep(origin, join.saturating_sub(1));
            }
        }
        if open.is_some() {
            beside.joins.insert(steps.len());
        }
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
