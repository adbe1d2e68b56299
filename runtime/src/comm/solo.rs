//! The group of one: every collective is a copy.

use super::collectives::Collectives;
use super::record::Kind;
use super::transport::{Source, Step, Transport};
use super::{CommError, Communicator, Missing, Monitor, Tag};
use std::sync::Arc;
use std::time::Duration;

/// A communicator for a program of one rank.
pub fn solo() -> Box<dyn Communicator> {
    Box::new(Collectives::new(Solo))
}

/// Collectives never ask it for anything, because a group of one has nobody to talk to.
struct Solo;

fn alone() -> CommError {
    CommError::Usage { what: "a program of one rank has nobody to communicate with".into() }
}

impl Transport for Solo {
    fn rank(&self) -> usize {
        0
    }
    fn world_size(&self) -> usize {
        1
    }
    fn slot_bytes(&self) -> usize {
        64
    }
    fn post(&self, _: &Step, _: &[usize], _: usize, _: &mut dyn FnMut(&mut [u8])) -> Result<(), CommError> {
        Err(alone())
    }
    fn take(&self, _: &Step, _: &[Source], _: &mut dyn FnMut(&[&[u8]])) -> Result<(), CommError> {
        Err(alone())
    }
    fn enter(&self, _: Kind, _: Tag) {}
    fn progress(&self) {}
    fn abort(&self, _: &str) {}
    fn monitor(&self) -> Arc<dyn Monitor> {
        Arc::new(Solo)
    }
}

impl Monitor for Solo {
    fn failure(&self, _: &[usize]) -> Option<CommError> {
        None
    }
    fn heartbeat(&self, _: usize) -> u64 {
        0
    }
    fn whereabouts(&self, rank: usize) -> Missing {
        Missing { rank, last: None }
    }
    fn progress(&self) {}
    fn abort(&self, _: &str) {}
    fn stall(&self) -> Duration {
        Duration::MAX
    }
}
