//! Calls that go into the device's queue as one: a step of decoding is hundreds of calls of a few microseconds, and to put
//! each of them into the queue takes the host about as long.
//!
//! The calls of a run form pieces, between which the host or other ranks have something to do. Whoever runs the same piece
//! a second time has it taken down as a graph; from then on it is one launch. What differs from the time before (lengths,
//! the place behind a state's last token) are arguments of a few of its calls, which are compared one by one, and those
//! nodes alone are told: a graph can never compute anything else than the calls would.
//!
//! Of every piece, a few graphs are kept, for the sizes of batches that take turns. A driver that has no graphs, or fails
//! to make or start one, is not asked again, and calls are made one by one as before.

use crate::session::SessionError;
use std::collections::BTreeMap;
use tpshard_driver::DriverError;
use tpshard_driver::cuda::{Call, Device, Graph, Node};

/// Says `off` where no graphs are wanted.
pub(crate) const VARIABLE: &str = "TPSHARD_CUDA_GRAPHS";

/// Fewer calls are put into the queue as fast by themselves.
const LEAST_CALLS: usize = 3;
/// Most that is kept of a piece.
const MOST_KEPT: usize = 4;

/// Calls that follow one another in every run of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Piece {
    pub(super) entry: usize,
    pub(super) number: usize,
}

/// The graphs of a rank.
#[derive(Default)]
pub(super) struct Graphs {
    /// What is kept of every piece, what was used last at the end.
    kept: BTreeMap<Piece, Vec<Kept>>,
    /// Why there are none any more.
    trouble: Option<String>,
}

/// A piece as it was last put into the queue.
struct Kept {
    calls: Vec<Call>,
    /// From the second time on, with the node of every call.
    graph: Option<(Graph, Vec<Node>)>,
}

/// Whether graphs are wanted, as [`VARIABLE`] says it.
pub(super) fn are_wanted(variable: Option<&str>) -> Result<bool, SessionError> {
    match variable {
        None | Some("" | "on") => Ok(true),
        Some("off") => Ok(false),
        Some(other) => {
            let what = format!("{VARIABLE}={other} is not known\n  help: say on or off");
            Err(SessionError::Usage { what })
        }
    }
}

impl Graphs {
    /// Why there are no graphs any more, if anything went wrong with them.
    pub(super) fn trouble(&self) -> Option<&str> {
        self.trouble.as_deref()
    }

    /// Puts the calls of a piece into the queue; false if they are to be made one by one, of which none is made yet.
    pub(super) fn put(&mut self, device: &Device, piece: Piece, calls: &[&Call]) -> bool {
        if self.trouble.is_some() || calls.len() < LEAST_CALLS {
            return false;
        }
        let kept = self.kept.entry(piece).or_default();
        let nearest = kept.iter().enumerate().filter_map(|(at, kept)| Some((kept.changes(calls)?, at))).min();
        // To tell most nodes costs as much as to make the calls; these may come again, and get a graph of their own.
        let Some((_, at)) = nearest.filter(|(changes, _)| 4 * changes <= 3 * calls.len()) else {
            if kept.len() >= MOST_KEPT {
                kept.remove(0);
            }
            kept.push(Kept { calls: calls.iter().map(|&call| call.clone()).collect(), graph: None });
            return false;
        };
        let mut known = kept.remove(at);
        match known.repeat(device, calls) {
            Ok(()) => {
                kept.push(known);
                true
            }
            Err(error) => {
                self.kept.clear();
                // A run that was given up is no fault of graphs.
                if !matches!(error, DriverError::Abandoned { .. }) {
                    self.trouble = Some(error.to_string());
                }
                false
            }
        }
    }
}

impl Kept {
    /// How many of these calls are others than last time; nothing if they are of other kernels.
    fn changes(&self, calls: &[&Call]) -> Option<usize> {
        let alike = self.calls.len() == calls.len()
            && self.calls.iter().zip(calls).all(|(known, call)| known.is_of_same_kernel(call));
        alike.then(|| self.calls.iter().zip(calls).filter(|(known, call)| known != *call).count())
    }

    /// Puts these calls, which are of the same kernels, into the queue as a graph.
    fn repeat(&mut self, device: &Device, calls: &[&Call]) -> Result<(), DriverError> {
        match &mut self.graph {
            Some((graph, nodes)) => {
                for ((known, &call), &node) in self.calls.iter_mut().zip(calls).zip(nodes.iter()) {
                    if known != call {
                        graph.set(node, call)?;
                        known.clone_from(call);
                    }
                }
                graph.launch()
            }
            None => {
                let (graph, nodes) = taken_down(device, calls)?;
                self.calls = calls.iter().map(|&call| call.clone()).collect();
                let launched = graph.launch();
                self.graph = Some((graph, nodes));
                launched
            }
        }
    }
}

/// The calls as a graph, with the node of each.
fn taken_down(device: &Device, calls: &[&Call]) -> Result<(Graph, Vec<Node>), DriverError> {
    let capture = device.capture()?;
    let mut nodes = Vec::with_capacity(calls.len());
    for call in calls {
        call.launch()?;
        nodes.push(capture.last()?);
    }
    Ok((capture.finish()?, nodes))
}

#[cfg(test)]
mod tests;
