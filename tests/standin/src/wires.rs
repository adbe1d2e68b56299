//! Bytes from process to process: for every pair of ranks a ring in a file that all of them map, found by a name that
//! only they know.
#![allow(unsafe_code)] // Memory that processes share has no safe form.

use rustix::mm::{MapFlags, ProtFlags, mmap};
use std::fs::OpenOptions;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

const PAGE: usize = 4096;
/// Most ranks: their devices stand in the first page.
pub(crate) const MOST_RANKS: usize = 512;
/// Bytes on their way between two ranks.
const RING: usize = 16 << 10;
/// Counters before a ring.
const HEADER: usize = 128;

/// The rings of some ranks, seen by one of them.
pub(crate) struct Wires {
    base: usize,
    ranks: usize,
    rank: usize,
    path: PathBuf,
}

impl Wires {
    /// Comes to the others; `device` is not zero.
    pub(crate) fn join(name: &str, ranks: usize, rank: usize, device: u32) -> std::io::Result<Wires> {
        let path = std::env::temp_dir().join(format!("tpshard-standin-{name}"));
        let bytes = PAGE + ranks * ranks * (HEADER + RING);
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path)?;
        file.set_len(bytes as u64)?;
        // SAFETY: a fresh mapping at an address the kernel chooses; nobody makes the file shorter. It is never unmapped,
        // because work in streams may outlive whoever asked for it.
        let base = unsafe {
            mmap(std::ptr::null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0)
        }?;
        let wires = Wires { base: base.addr(), ranks, rank, path };
        wires.device_word(rank).store(device, SeqCst);
        Ok(wires)
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: offsets are multiples of eight within the mapping, and only used as atomics.
        unsafe { &*((self.base + offset) as *const AtomicU64) }
    }

    fn device_word(&self, rank: usize) -> &AtomicU32 {
        // SAFETY: as above, of four.
        unsafe { &*((self.base + 8 * rank) as *const AtomicU32) }
    }

    /// The devices of all ranks once all have come; the name is forgotten then.
    pub(crate) fn devices(&self) -> Option<Vec<u32>> {
        let devices: Vec<u32> = (0..self.ranks).map(|rank| self.device_word(rank).load(SeqCst)).collect();
        if devices.contains(&0) {
            return None;
        }
        let _ = std::fs::remove_file(&self.path);
        Some(devices)
    }

    fn ring(&self, from: usize, to: usize) -> usize {
        assert!(from < self.ranks && to < self.ranks, "no such pair");
        PAGE + (from * self.ranks + to) * (HEADER + RING)
    }

    /// Sends as many bytes as there is room for.
    ///
    /// # Safety
    /// There are `bytes` bytes at the address.
    pub(crate) unsafe fn send(&self, to: usize, address: u64, bytes: usize) -> usize {
        let ring = self.ring(self.rank, to);
        let (written, taken) = (self.word(ring), self.word(ring + 64));
        let at = written.load(SeqCst);
        let room = RING - (at - taken.load(SeqCst)) as usize;
        let start = at as usize % RING;
        let count = bytes.min(room).min(RING - start);
        let target = self.base + ring + HEADER + start;
        // SAFETY: by the caller; this part of the ring is ours until it is counted as written.
        unsafe { std::ptr::copy_nonoverlapping(address as *const u8, target as *mut u8, count) };
        written.store(at + count as u64, SeqCst);
        count
    }

    /// Receives as many bytes as are there.
    ///
    /// # Safety
    /// There is room for `bytes` bytes at the address.
    pub(crate) unsafe fn receive(&self, from: usize, address: u64, bytes: usize) -> usize {
        let ring = self.ring(from, self.rank);
        let (written, taken) = (self.word(ring), self.word(ring + 64));
        let at = taken.load(SeqCst);
        let there = (written.load(SeqCst) - at) as usize;
        let start = at as usize % RING;
        let count = bytes.min(there).min(RING - start);
        let source = self.base + ring + HEADER + start;
        // SAFETY: by the caller; this part of the ring is left alone until it is counted as taken.
        unsafe { std::ptr::copy_nonoverlapping(source as *const u8, address as *mut u8, count) };
        taken.store(at + count as u64, SeqCst);
        count
    }
}
