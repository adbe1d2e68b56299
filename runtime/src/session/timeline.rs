//! When each step of a run started on this rank, and how long it took.

use rustix::time::{ClockId, clock_gettime};
use std::collections::VecDeque;
use tpshard_ir::ValueId;

/// Most steps that are remembered; older ones are forgotten first.
const REMEMBERED: usize = 1 << 18;

/// One step of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepTime {
    /// Which run of the session, counted from 0.
    pub run: u64,
    pub entry: usize,
    /// The value of the entry's graph that the step made: the result, where several operations are one kernel.
    pub value: ValueId,
    /// Nanoseconds of the machine's monotonic clock, the same for all processes on it.
    pub start: u64,
    pub nanoseconds: u64,
}

/// The last steps that a session ran.
#[derive(Debug, Default)]
pub(crate) struct Timeline {
    steps: VecDeque<StepTime>,
    runs: u64,
}

impl Timeline {
    pub(crate) fn add(&mut self, entry: usize, steps: &[(ValueId, u64, u64)]) {
        for &(value, start, end) in steps {
            if self.steps.len() == REMEMBERED {
                self.steps.pop_front();
            }
            let nanoseconds = end.saturating_sub(start);
            self.steps.push_back(StepTime { run: self.runs, entry, value, start, nanoseconds });
        }
        self.runs += 1;
    }

    pub(crate) fn take(&mut self) -> Vec<StepTime> {
        std::mem::take(&mut self.steps).into()
    }
}

/// The machine's monotonic clock in nanoseconds.
pub fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(time.tv_nsec).unwrap_or(0))
}
