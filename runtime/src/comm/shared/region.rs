//! The layout of the shared region and the words in it: who is there, who waits, who failed.
#![allow(unsafe_code)] // The reason for failing is text in shared memory, written once under a flag.

use super::memory::Memory;
use crate::comm::record::Kind;
use crate::comm::{CommError, MAX_RANKS, Missing, Tag};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, memfd_create};
use rustix::thread::futex;
use std::fs::File;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

const PAGE: usize = 4096;
/// Failure: state, cause, rank, text length, then the text.
const FAILURE: usize = 0;
const FAILURE_TEXT: usize = 64;
const RANK_BLOCK: usize = 128;
/// One cache line written by the sender, one by the receiver.
const PAIR_BLOCK: usize = 128;
pub(super) const SLOT_HEADER: usize = 64;

/// How a rank stands.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Presence {
    Here,
    /// It closed its communicator.
    Left,
    /// It ended without a word.
    Dead,
}

/// The shared region of one job.
pub(crate) struct Region {
    memory: Memory,
    pub(super) world: usize,
    pub(super) slot: usize,
    pairs: usize,
    slots: usize,
}

struct Shape {
    pairs: usize,
    slots: usize,
    total: usize,
}

fn shape(world: usize, slot: usize) -> Result<Shape, CommError> {
    if world == 0 || world > MAX_RANKS {
        return Err(CommError::Usage { what: format!("{world} ranks; supported are 1 to {MAX_RANKS}") });
    }
    if !slot.is_multiple_of(64) || slot < 64 * world || slot > 1 << 30 {
        let what = format!(
            "slots of {slot} bytes for {world} ranks; use a multiple of 64 from 64 per rank to 1 GiB"
        );
        return Err(CommError::Usage { what });
    }
    let pairs = (PAGE + world * RANK_BLOCK).next_multiple_of(PAGE);
    let slots = (pairs + world * world * PAIR_BLOCK).next_multiple_of(PAGE);
    Ok(Shape { pairs, slots, total: slots + world * 2 * (SLOT_HEADER + slot) })
}

impl Region {
    /// A region for the threads of this process.
    pub(crate) fn in_process(world: usize, slot: usize) -> Result<Region, CommError> {
        let shape = shape(world, slot)?;
        let memory = Memory::anonymous(shape.total).map_err(|e| CommError::system("shared memory", e))?;
        Ok(Region { memory, world, slot, pairs: shape.pairs, slots: shape.slots })
    }

    /// A file in memory, sealed at the region's size, to be handed to the other processes.
    pub(crate) fn file(world: usize, slot: usize) -> Result<File, CommError> {
        let shape = shape(world, slot)?;
        let system = |e: rustix::io::Errno| CommError::system("shared memory file", e);
        let fd = memfd_create("tpshard", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).map_err(system)?;
        rustix::fs::ftruncate(&fd, shape.total as u64).map_err(system)?;
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).map_err(system)?;
        Ok(File::from(fd))
    }

    /// The region in a file made by [`Region::file`], perhaps in another process.
    pub(crate) fn of_file(file: &File, world: usize, slot: usize) -> Result<Region, CommError> {
        let shape = shape(world, slot)?;
        let len = file.metadata().map_err(|e| CommError::system("shared memory file", e))?.len();
        let seals = fcntl_get_seals(file).map_err(|e| CommError::system("shared memory seals", e))?;
        if len != shape.total as u64 || !seals.contains(SealFlags::SHRINK) {
            return Err(CommError::system("shared memory file", "unexpected size or not sealed"));
        }
        let memory = Memory::of_file(file, shape.total).map_err(|e| CommError::system("shared memory", e))?;
        Ok(Region { memory, world, slot, pairs: shape.pairs, slots: shape.slots })
    }

    fn of_rank(&self, rank: usize, offset: usize) -> usize {
        assert!(rank < self.world, "no such rank");
        PAGE + rank * RANK_BLOCK + offset
    }

    fn doorbell(&self, rank: usize) -> &AtomicU32 {
        self.memory.word(self.of_rank(rank, 0))
    }

    fn sleeping(&self, rank: usize) -> &AtomicU32 {
        self.memory.word(self.of_rank(rank, 4))
    }

    fn presence_word(&self, rank: usize) -> &AtomicU32 {
        self.memory.word(self.of_rank(rank, 8))
    }

    fn entered_kind(&self, rank: usize) -> &AtomicU32 {
        self.memory.word(self.of_rank(rank, 64))
    }

    fn entered_node(&self, rank: usize) -> &AtomicU32 {
        self.memory.word(self.of_rank(rank, 68))
    }

    fn entered_sequence(&self, rank: usize) -> &AtomicU64 {
        self.memory.wide(self.of_rank(rank, 72))
    }

    /// Counts whatever a rank does.
    pub(super) fn heartbeat(&self, rank: usize) -> &AtomicU64 {
        self.memory.wide(self.of_rank(rank, 80))
    }

    fn pair(&self, from: usize, to: usize) -> usize {
        assert!(from < self.world && to < self.world, "no such pair");
        self.pairs + (from * self.world + to) * PAIR_BLOCK
    }

    /// The note for the pair's post number `count`: `count + 1` above, the slot below.
    pub(super) fn mail(&self, from: usize, to: usize, count: u32) -> &AtomicU64 {
        self.memory.wide(self.pair(from, to) + 8 * (count as usize % 2))
    }

    /// How many of the pair's posts the receiver has taken.
    pub(super) fn taken(&self, from: usize, to: usize) -> &AtomicU32 {
        self.memory.word(self.pair(from, to) + 64)
    }

    fn slot_at(&self, rank: usize, slot: usize) -> usize {
        assert!(rank < self.world && slot < 2, "no such slot");
        self.slots + (rank * 2 + slot) * (SLOT_HEADER + self.slot)
    }

    /// A slot's header and bytes.
    ///
    /// # Safety
    /// The slot's rank does not fill it while the slice lives: its latest post is not marked as taken.
    pub(super) unsafe fn slot(&self, rank: usize, slot: usize) -> &[u8] {
        // SAFETY: the caller excludes the only writer.
        unsafe { self.memory.bytes(self.slot_at(rank, slot), SLOT_HEADER + self.slot) }
    }

    /// A slot's header and bytes, to fill.
    ///
    /// # Safety
    /// The caller is the slot's rank, and all readers have taken its last post.
    #[allow(clippy::mut_from_ref, reason = "exclusiveness is the caller's promise")]
    pub(super) unsafe fn slot_mut(&self, rank: usize, slot: usize) -> &mut [u8] {
        // SAFETY: the caller excludes all others.
        unsafe { self.memory.bytes_mut(self.slot_at(rank, slot), SLOT_HEADER + self.slot) }
    }

    pub(crate) fn presence(&self, rank: usize) -> Presence {
        match self.presence_word(rank).load(SeqCst) {
            0 => Presence::Here,
            1 => Presence::Left,
            _ => Presence::Dead,
        }
    }

    pub(super) fn enter(&self, rank: usize, kind: Kind, tag: Tag) {
        self.entered_sequence(rank).store(tag.sequence, SeqCst);
        self.entered_node(rank).store(tag.node, SeqCst);
        self.entered_kind(rank).store(kind as u32, SeqCst);
    }

    pub(super) fn missing(&self, rank: usize) -> Missing {
        let kind = Kind::from_code(self.entered_kind(rank).load(SeqCst) as u8);
        let tag = Tag {
            sequence: self.entered_sequence(rank).load(SeqCst),
            node: self.entered_node(rank).load(SeqCst),
        };
        Missing { rank, last: kind.map(|kind| (kind, tag)) }
    }

    /// Notes that `rank` closed its communicator.
    pub(super) fn leave(&self, rank: usize) {
        let _ = self.presence_word(rank).compare_exchange(0, 1, SeqCst, SeqCst);
        self.ring_all();
    }

    /// Notes that `rank` ended without a word, which fails all.
    pub(crate) fn bury(&self, rank: usize) {
        self.presence_word(rank).store(2, SeqCst);
        self.fail(rank, CAUSE_DEATH, "");
    }

    /// Fails all ranks on behalf of `by`.
    pub(super) fn poison(&self, by: usize, reason: &str) {
        self.fail(by, CAUSE_REASON, reason);
    }

    fn fail(&self, rank: usize, cause: u32, text: &str) {
        let state = self.memory.word(FAILURE);
        // The first failure is the one to tell; later ones are its consequences.
        if state.compare_exchange(0, 1, SeqCst, SeqCst).is_ok() {
            let room = PAGE - FAILURE_TEXT;
            let mut end = text.len().min(room);
            while !text.is_char_boundary(end) {
                end -= 1;
            }
            // SAFETY: the exchange above lets one writer through, ever, and readers wait for state 2.
            let target = unsafe { self.memory.bytes_mut(FAILURE_TEXT, end) };
            target.copy_from_slice(&text.as_bytes()[..end]);
            self.memory.word(FAILURE + 4).store(cause, SeqCst);
            self.memory.word(FAILURE + 8).store(rank as u32, SeqCst);
            self.memory.word(FAILURE + 12).store(end as u32, SeqCst);
            state.store(2, SeqCst);
        }
        self.ring_all();
    }

    /// The failure that ended the run, if any.
    pub(super) fn failure(&self) -> Option<CommError> {
        if self.memory.word(FAILURE).load(SeqCst) != 2 {
            return None;
        }
        let rank = self.memory.word(FAILURE + 8).load(SeqCst) as usize;
        if self.memory.word(FAILURE + 4).load(SeqCst) == CAUSE_DEATH {
            return Some(CommError::PeerDied { rank });
        }
        let len = (self.memory.word(FAILURE + 12).load(SeqCst) as usize).min(PAGE - FAILURE_TEXT);
        // SAFETY: state 2 means that the only write is over.
        let text = unsafe { self.memory.bytes(FAILURE_TEXT, len) };
        Some(CommError::Poisoned { by: rank, reason: String::from_utf8_lossy(text).into_owned() })
    }

    /// Wakes `rank` if it sleeps.
    pub(super) fn ring(&self, rank: usize) {
        let bell = self.doorbell(rank);
        bell.fetch_add(1, SeqCst);
        if self.sleeping(rank).load(SeqCst) != 0 {
            // Waking fails only for bad addresses.
            let _ = futex::wake(bell, futex::Flags::empty(), 1);
        }
    }

    fn ring_all(&self) {
        for rank in 0..self.world {
            self.ring(rank);
        }
    }

    /// Sleeps until the doorbell rings or the time is over, unless `ready` turns true first.
    ///
    /// A ring between reading the bell and sleeping changes its value, which the futex notices; a ring after that
    /// sees `sleeping`. So no ring is lost.
    pub(super) fn sleep(&self, rank: usize, timeout: futex::Timespec, ready: &dyn Fn() -> bool) {
        let bell = self.doorbell(rank);
        let value = bell.load(SeqCst);
        self.sleeping(rank).store(1, SeqCst);
        if !ready() {
            // Returning early (a ring, a signal, the timeout) is fine: the caller looks again.
            let _ = futex::wait(bell, futex::Flags::empty(), value, Some(&timeout));
        }
        self.sleeping(rank).store(0, SeqCst);
    }
}

const CAUSE_DEATH: u32 = 1;
const CAUSE_REASON: u32 = 2;
