//! Looking out for collectives that will never be done.
//!
//! A rank whose peer is gone would wait for its device for ever, and may do so inside the driver, where nothing can be
//! asked. So a thread of its own looks after the collectives that are in the queue: at what the other ranks and the
//! library say, and at the time. When something is wrong it says so, and ends the collectives, after which whoever waits
//! goes on.

use super::ending::Ending;
use crate::comm::{CommError, Kind, Missing, Monitor, Tag};
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tpshard_driver::DriverError;
use tpshard_driver::cuda::{Device, Event, Lane, Watch};
use tpshard_driver::nccl::Clique;

/// How often the thread looks while something is in the queue.
const ROUND: Duration = Duration::from_millis(5);
/// Most events that are kept for use again.
const MOST_SPARE: usize = 1024;

/// A collective in the queue.
struct Pending {
    kind: Kind,
    tag: Tag,
    ranks: Vec<usize>,
    /// What comes before it is done; nothing once that is known.
    begun: Option<Event>,
    passed: Event,
    /// Nothing of the collective comes after it.
    last: bool,
}

/// The beginning of a collective, or of a piece of one, in a queue.
pub(super) struct Begun {
    event: Event,
    lane: Lane,
}

#[derive(Default)]
struct State {
    pending: VecDeque<Pending>,
    spare: Vec<Event>,
    /// How many collectives and pieces have been taken out.
    done: u64,
    /// Sequence numbers of what is done and not yet told.
    settled: Vec<u64>,
    stop: bool,
}

struct Shared {
    monitor: Arc<dyn Monitor>,
    rank: usize,
    cliques: Vec<Arc<Clique>>,
    ending: Ending,
    state: Mutex<State>,
    changed: Condvar,
    failure: Failure,
    /// What failed on this rank before any collective did.
    first: Mutex<Option<String>>,
}

/// What ended the collectives, if anything has: all that a device knows of them, since it may outlive them.
#[derive(Clone, Debug, Default)]
struct Failure(Arc<OnceLock<CommError>>);

impl Watch for Failure {
    fn broken(&self) -> Option<String> {
        self.0.get().map(ToString::to_string)
    }
}

/// The thread that looks out, and what it looks after.
pub(super) struct Lookout {
    device: Device,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Lookout {
    pub(super) fn start(
        monitor: Arc<dyn Monitor>,
        rank: usize,
        device: Device,
        cliques: Vec<Arc<Clique>>,
    ) -> std::io::Result<Lookout> {
        let shared = Arc::new(Shared {
            monitor,
            rank,
            ending: Ending::prepare(cliques.iter().cloned())?,
            cliques,
            state: Mutex::default(),
            changed: Condvar::new(),
            failure: Failure::default(),
            first: Mutex::default(),
        });
        let looking = shared.clone();
        let thread = std::thread::Builder::new().name("tpshard-lookout".into());
        let thread = Some(thread.spawn(move || looking.look_out())?);
        Ok(Lookout { device, shared, thread })
    }

    pub(super) fn watch(&self) -> Arc<dyn Watch> {
        Arc::new(self.shared.failure.clone())
    }

    pub(super) fn failure(&self) -> Option<CommError> {
        self.shared.failure.0.get().cloned()
    }

    /// Says what failed first on this rank, before a collective; nothing when a run begins.
    pub(super) fn blame(&self, first: Option<String>) {
        *self.shared.first.lock().unwrap_or_else(PoisonError::into_inner) = first;
    }

    /// `what` keeps this rank from taking part.
    pub(super) fn because(&self, what: String) -> CommError {
        self.shared.because(what)
    }

    fn event(&self, lane: Lane) -> Result<Event, DriverError> {
        let spare = self.shared.state().spare.pop();
        let event = spare.map_or_else(|| self.device.event(), Ok)?;
        event.record_in(lane)?;
        Ok(event)
    }

    /// Marks the beginning of a collective, or of a piece of one, in a queue.
    pub(super) fn begin(&self, lane: Lane) -> Result<Begun, DriverError> {
        Ok(Begun { event: self.event(lane)?, lane })
    }

    /// Marks the end of what has begun. With `last`, the collective is done then.
    pub(super) fn mark(
        &self,
        (kind, tag): (Kind, Tag),
        ranks: &[usize],
        Begun { event, lane }: Begun,
        last: bool,
    ) -> Result<(), DriverError> {
        let passed = self.event(lane)?;
        let pending = Pending { kind, tag, ranks: ranks.to_vec(), begun: Some(event), passed, last };
        self.shared.state().pending.push_back(pending);
        self.shared.changed.notify_one();
        Ok(())
    }

    /// Sequence numbers of the collectives that are done since the last call.
    pub(super) fn take_settled(&self) -> Vec<u64> {
        let mut state = self.shared.state();
        // What was ended passes too, and is not done.
        if self.failure().is_none() {
            // What the driver has to say against it is said to whoever waits.
            let _ = state.reap();
        }
        std::mem::take(&mut state.settled)
    }

    /// Ends the collectives because of a failure that somebody else noticed.
    pub(super) fn end(&self, error: CommError) {
        if self.failure().is_none() {
            self.shared.fail(error);
        }
    }

    /// From now on, nobody waits for the device.
    pub(super) fn break_off(&self) {
        let what = "the session ended".into();
        let _ = self.shared.failure.0.set(CommError::Device { rank: self.shared.rank, what });
    }

    /// Ends all cliques, whatever they are at.
    pub(super) fn abort(&self) {
        self.shared.ending.abort();
    }

    /// Nothing is left that would have to be ended.
    pub(super) fn dismiss(&self) {
        self.shared.ending.dismiss();
    }

    /// Ends the thread; true if nothing was wrong and nothing is under way.
    pub(super) fn stop(&mut self) -> bool {
        self.shared.state().stop = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let mut state = self.shared.state();
        let quiet = state.reap().is_ok() && state.pending.is_empty();
        state.spare.clear();
        quiet && self.failure().is_none()
    }
}

impl State {
    /// Takes out what is done; true if the queue has got anywhere.
    fn reap(&mut self) -> Result<bool, DriverError> {
        let mut some = false;
        while let Some(front) = self.pending.front() {
            if !front.passed.has_passed()? {
                break;
            }
            if let Some(done) = self.pending.pop_front() {
                self.done += 1;
                if done.last {
                    self.settled.push(done.tag.sequence);
                }
                self.keep(done.passed);
                done.begun.into_iter().for_each(|begun| self.keep(begun));
                some = true;
            }
        }
        // The queue has come to the next.
        if let Some(front) = self.pending.front_mut()
            && let Some(begun) = &front.begun
            && begun.has_passed()?
        {
            let begun = front.begun.take();
            begun.into_iter().for_each(|begun| self.keep(begun));
            some = true;
        }
        Ok(some)
    }

    fn keep(&mut self, event: Event) {
        if self.spare.len() < MOST_SPARE {
            self.spare.push(event);
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn look_out(&self) {
        let mut patience = Patience::new(&*self.monitor, &[]);
        // The collective that is looked at, and whether the queue has come to it.
        let mut looked_at = None;
        let mut state = self.state();
        while !state.stop {
            state = if state.pending.is_empty() {
                self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
            } else {
                self.changed.wait_timeout(state, ROUND).unwrap_or_else(PoisonError::into_inner).0
            };
            match state.reap() {
                Ok(true) => self.monitor.progress(),
                Ok(false) => {}
                Err(error) => {
                    drop(state);
                    return self.fail(self.because(error.to_string()));
                }
            }
            let Some(front) = state.pending.front() else { continue };
            let (kind, tag, ranks) = (front.kind, front.tag, front.ranks.clone());
            let done = state.done;
            // What this rank computes before may take as long as it likes.
            let waits = front.begun.is_none();
            drop(state);
            if looked_at != Some((done, waits)) {
                looked_at = Some((done, waits));
                patience = Patience::new(&*self.monitor, &[]);
            }
            if let Some(failure) = self.trouble(kind, tag, &ranks, waits.then_some(&mut patience)) {
                return self.fail(failure);
            }
            state = self.state();
        }
    }

    /// What keeps a collective from ever being done. Without `patience`, the others are not waited for yet.
    fn trouble(
        &self,
        kind: Kind,
        tag: Tag,
        ranks: &[usize],
        patience: Option<&mut Patience>,
    ) -> Option<CommError> {
        if let Some(failure) = self.monitor.failure(ranks) {
            return Some(failure);
        }
        if let Some(error) = self.cliques.iter().find_map(|clique| clique.settled().err()) {
            return Some(self.because(error.to_string()));
        }
        let others: Vec<usize> = ranks.iter().copied().filter(|&rank| rank != self.rank).collect();
        if others.is_empty() || !patience?.is_over(&*self.monitor, &others) {
            return None;
        }
        let found: Vec<Missing> = others.iter().map(|&rank| self.monitor.whereabouts(rank)).collect();
        // Who has come to this collective is not missing, if anybody is.
        let behind = |m: &&Missing| m.last.is_none_or(|(_, last)| last.sequence < tag.sequence);
        let behind: Vec<Missing> = found.iter().filter(behind).cloned().collect();
        let missing = if behind.is_empty() { found } else { behind };
        let seconds = self.monitor.stall().as_secs_f64();
        Some(CommError::Stalled { kind, tag, seconds, missing })
    }

    /// Says what is wrong, here and to the other ranks, and ends the collectives.
    fn fail(&self, error: CommError) {
        self.monitor.abort(&reason(&error));
        {
            // Nobody takes for done what is ended below.
            let _state = self.state();
            let _ = self.failure.0.set(error);
        }
        self.ending.abort();
    }

    /// What keeps this rank from taking part, and what it comes from.
    fn because(&self, what: String) -> CommError {
        let first = self.first.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let what = match first {
            Some(first) => format!("{first}; after that, {what}"),
            None => what,
        };
        CommError::Device { rank: self.rank, what }
    }
}

/// An error as it is told to other ranks, which say themselves whose it is.
pub(super) fn reason(error: &CommError) -> String {
    match error {
        CommError::Device { what, .. } => what.clone(),
        other => other.to_string(),
    }
}

/// How long other ranks have done nothing.
pub(super) struct Patience {
    since: Instant,
    beats: Vec<u64>,
}

impl Patience {
    pub(super) fn new(monitor: &dyn Monitor, ranks: &[usize]) -> Patience {
        Patience { since: Instant::now(), beats: beats(monitor, ranks) }
    }

    /// True once none of the ranks has done anything for as long as is waited.
    pub(super) fn is_over(&mut self, monitor: &dyn Monitor, ranks: &[usize]) -> bool {
        let now = beats(monitor, ranks);
        if now != self.beats {
            *self = Patience { since: Instant::now(), beats: now };
        }
        self.since.elapsed() >= monitor.stall()
    }
}

fn beats(monitor: &dyn Monitor, ranks: &[usize]) -> Vec<u64> {
    ranks.iter().map(|&rank| monitor.heartbeat(rank)).collect()
}
