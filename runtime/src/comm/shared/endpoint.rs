//! One rank's end of a shared region: posting, taking, and waiting without hanging.
#![allow(unsafe_code)] // Slots are shared memory; the protocol of the module decides who may touch them when.

use super::region::{Presence, Region, SLOT_HEADER};
use crate::comm::record::Kind;
use crate::comm::transport::{STEP_BYTES, Source, Step, Transport};
use crate::comm::{CommError, CommOptions, Missing, Monitor, Tag};
use rustix::thread::futex::Timespec;
use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::time::{Duration, Instant};

/// A sleeping rank looks around this often even if nobody rings.
const NAP: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };

/// A wait gives up the core this often before it sleeps.
const YIELDS: u32 = 4;

/// One rank's end.
pub(crate) struct Endpoint {
    region: Arc<Region>,
    rank: usize,
    stall: Duration,
    spin: Duration,
    /// Posts so far, of any readers; the next one goes into slot `posts % 2`.
    posts: Cell<u64>,
    /// Per rank: posts for it.
    sent: RefCell<Vec<u32>>,
    /// Per rank: posts taken from it.
    received: RefCell<Vec<u32>>,
    /// Per slot: the readers of its last post, and their count once they have taken it.
    readers: RefCell<[Vec<(usize, u32)>; 2]>,
}

impl Endpoint {
    pub(crate) fn new(region: Arc<Region>, rank: usize, options: &CommOptions) -> Endpoint {
        let world = region.world;
        let crowded = std::thread::available_parallelism().map_or(1, usize::from) < world;
        let default = if crowded { Duration::ZERO } else { Duration::from_micros(50) };
        Endpoint {
            region,
            rank,
            stall: options.stall,
            spin: options.spin.unwrap_or(default),
            posts: Cell::new(0),
            sent: RefCell::new(vec![0; world]),
            received: RefCell::new(vec![0; world]),
            readers: RefCell::default(),
        }
    }

    fn beat(&self) {
        self.region.heartbeat(self.rank).fetch_add(1, Relaxed);
    }

    /// Returns once `ready`; `missing` are the ranks that keep it from being so.
    fn wait(
        &self,
        step: &Step,
        ready: &dyn Fn() -> bool,
        missing: &dyn Fn() -> Vec<usize>,
    ) -> Result<(), CommError> {
        if self.poll(ready) {
            return Ok(());
        }
        let mut watch = Watch::new(&self.region, &missing());
        loop {
            if ready() {
                return Ok(());
            }
            if let Some(failure) = self.region.failure() {
                return Err(failure);
            }
            let absent = missing();
            if let Some(&rank) = absent.iter().find(|&&r| self.region.presence(r) != Presence::Here) {
                // Whoever leaves may have done its part just before.
                if ready() {
                    return Ok(());
                }
                self.region.bury(rank);
                return Err(CommError::PeerDied { rank });
            }
            if watch.stalled(&self.region, &absent) >= self.stall && !absent.is_empty() {
                let missing = absent.iter().map(|&rank| self.region.missing(rank)).collect();
                let seconds = self.stall.as_secs_f64();
                return Err(CommError::Stalled { kind: step.kind, tag: step.tag, seconds, missing });
            }
            self.region.sleep(self.rank, NAP, &|| ready() || self.region.failure().is_some());
        }
    }

    /// Waits without sleeping, for as long as that can be faster.
    fn poll(&self, ready: &dyn Fn() -> bool) -> bool {
        if ready() {
            return true;
        }
        let start = Instant::now();
        // A microsecond or so; then the core goes to whoever wants it, which may be the rank we wait for. With more
        // ranks than cores it almost always is.
        let looks = if self.spin.is_zero() { 1 } else { 50 };
        for turn in 1.. {
            for _ in 0..looks {
                if ready() {
                    return true;
                }
                std::hint::spin_loop();
            }
            std::thread::yield_now();
            if turn >= YIELDS && start.elapsed() >= self.spin {
                break;
            }
        }
        ready()
    }

    fn wait_for_readers(&self, step: &Step, readers: &[(usize, u32)]) -> Result<(), CommError> {
        // Counts wrap; at most two posts are under way, so equality or being ahead by a little means taken.
        let done = |&(rank, count): &(usize, u32)| {
            self.region.taken(self.rank, rank).load(Acquire).wrapping_sub(count) < u32::MAX / 2
        };
        self.wait(step, &|| readers.iter().all(done), &|| {
            readers.iter().filter(|r| !done(r)).map(|r| r.0).collect()
        })
    }

    fn wait_for_posts(&self, step: &Step, sources: &[Source]) -> Result<(), CommError> {
        let received = self.received.borrow();
        let posted = |source: &Source| {
            let count = received[source.rank];
            let mail = self.region.mail(source.rank, self.rank, count).load(Acquire);
            source.rank == self.rank || (mail >> 32) as u32 == count.wrapping_add(1)
        };
        self.wait(step, &|| sources.iter().all(posted), &|| {
            sources.iter().filter(|s| !posted(s)).map(|s| s.rank).collect()
        })
    }

    /// The slot that holds the next post of `source`; it is there.
    fn next_slot(&self, source: usize) -> usize {
        if source == self.rank {
            return (self.posts.get() + 1) as usize % 2;
        }
        let count = self.received.borrow()[source];
        (self.region.mail(source, self.rank, count).load(Acquire) & 1) as usize
    }
}

impl Transport for Endpoint {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.region.world
    }

    fn slot_bytes(&self) -> usize {
        self.region.slot
    }

    fn post(
        &self,
        step: &Step,
        readers: &[usize],
        len: usize,
        fill: &mut dyn FnMut(&mut [u8]),
    ) -> Result<(), CommError> {
        assert!(len <= self.region.slot, "a post larger than a slot");
        if let Some(failure) = self.region.failure() {
            return Err(failure);
        }
        let slot = (self.posts.get() % 2) as usize;
        let mut last = self.readers.borrow_mut();
        self.wait_for_readers(step, &last[slot])?;
        last[slot].clear();
        // SAFETY: the slot is ours, and all readers of its last post have taken it.
        let bytes = unsafe { self.region.slot_mut(self.rank, slot) };
        bytes[..STEP_BYTES].copy_from_slice(&step.encode(len));
        fill(&mut bytes[SLOT_HEADER..SLOT_HEADER + len]);
        let mut sent = self.sent.borrow_mut();
        for &reader in readers {
            let count = sent[reader].wrapping_add(1);
            let note = (u64::from(count) << 32) | slot as u64;
            self.region.mail(self.rank, reader, sent[reader]).store(note, Release);
            sent[reader] = count;
            last[slot].push((reader, count));
        }
        self.posts.set(self.posts.get() + 1);
        self.beat();
        for &reader in readers {
            self.region.ring(reader);
        }
        Ok(())
    }

    fn take(&self, step: &Step, sources: &[Source], read: &mut dyn FnMut(&[&[u8]])) -> Result<(), CommError> {
        self.wait_for_posts(step, sources)?;
        let mut slices = Vec::with_capacity(sources.len());
        for source in sources {
            assert!(source.len <= self.region.slot, "a post larger than a slot");
            // SAFETY: the post is there (or is our own latest), and its rank leaves it alone until we say that we
            // have taken it (or until we post twice more), below.
            let bytes = unsafe { self.region.slot(source.rank, self.next_slot(source.rank)) };
            let mut header = [0; STEP_BYTES];
            header.copy_from_slice(&bytes[..STEP_BYTES]);
            if header != step.encode(source.len) {
                return Err(step.mismatch(self.rank, source.len, source.rank, &header));
            }
            slices.push(&bytes[SLOT_HEADER..SLOT_HEADER + source.len]);
        }
        read(&slices);
        drop(slices);
        let mut received = self.received.borrow_mut();
        for source in sources.iter().filter(|s| s.rank != self.rank) {
            received[source.rank] = received[source.rank].wrapping_add(1);
            self.region.taken(source.rank, self.rank).store(received[source.rank], Release);
        }
        drop(received);
        self.beat();
        for source in sources.iter().filter(|s| s.rank != self.rank) {
            self.region.ring(source.rank);
        }
        Ok(())
    }

    fn enter(&self, kind: Kind, tag: Tag) {
        self.region.enter(self.rank, kind, tag);
    }

    fn progress(&self) {
        self.beat();
    }

    fn abort(&self, reason: &str) {
        self.region.poison(self.rank, reason);
    }

    fn monitor(&self) -> Arc<dyn Monitor> {
        Arc::new(Lookout { region: self.region.clone(), rank: self.rank, stall: self.stall })
    }
}

/// What any thread of a rank may look at.
struct Lookout {
    region: Arc<Region>,
    rank: usize,
    stall: Duration,
}

impl Monitor for Lookout {
    fn failure(&self, needed: &[usize]) -> Option<CommError> {
        if let Some(failure) = self.region.failure() {
            return Some(failure);
        }
        let gone = |&&rank: &&usize| rank != self.rank && self.region.presence(rank) != Presence::Here;
        let &rank = needed.iter().find(gone)?;
        self.region.bury(rank);
        Some(CommError::PeerDied { rank })
    }

    fn heartbeat(&self, rank: usize) -> u64 {
        self.region.heartbeat(rank).load(SeqCst)
    }

    fn whereabouts(&self, rank: usize) -> Missing {
        self.region.missing(rank)
    }

    fn progress(&self) {
        self.region.heartbeat(self.rank).fetch_add(1, Relaxed);
    }

    fn abort(&self, reason: &str) {
        self.region.poison(self.rank, reason);
    }

    fn stall(&self) -> Duration {
        self.stall
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.region.bury(self.rank);
        } else {
            self.region.leave(self.rank);
        }
    }
}

/// How long the ranks that keep this one waiting have done nothing.
struct Watch {
    since: Instant,
    beats: Vec<(usize, u64)>,
}

impl Watch {
    fn new(region: &Region, ranks: &[usize]) -> Watch {
        Watch { since: Instant::now(), beats: beats(region, ranks) }
    }

    fn stalled(&mut self, region: &Region, ranks: &[usize]) -> Duration {
        let now = beats(region, ranks);
        if now != self.beats {
            *self = Watch { since: Instant::now(), beats: now };
        }
        self.since.elapsed()
    }
}

fn beats(region: &Region, ranks: &[usize]) -> Vec<(usize, u64)> {
    ranks.iter().map(|&rank| (rank, region.heartbeat(rank).load(SeqCst))).collect()
}
