//! A shared mapping, and the raw access to it.
#![allow(unsafe_code)] // Memory shared between processes has no safe form.

use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use std::fs::File;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, AtomicU64};

/// A mapping of `len` bytes, zero at first, shared with whoever else maps it.
pub(super) struct Memory {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to no thread; shared access goes through atomics, or through the unsafe slices below.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Memory for the threads of this process.
    pub(super) fn anonymous(len: usize) -> rustix::io::Result<Memory> {
        // SAFETY: a fresh mapping at an address the kernel chooses.
        let base = unsafe {
            mmap_anonymous(ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED)
        }?;
        Memory::from_base(base.cast(), len)
    }

    /// The first `len` bytes of `file`, which must be that long and sealed against shrinking.
    pub(super) fn of_file(file: &File, len: usize) -> rustix::io::Result<Memory> {
        // SAFETY: a fresh mapping at an address the kernel chooses; the seal keeps its pages valid.
        let base = unsafe {
            mmap(ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, file, 0)
        }?;
        Memory::from_base(base.cast(), len)
    }

    fn from_base(base: *mut u8, len: usize) -> rustix::io::Result<Memory> {
        let base = NonNull::new(base).ok_or(rustix::io::Errno::NOMEM)?;
        Ok(Memory { base, len })
    }

    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(offset <= self.len && len <= self.len - offset, "access outside the shared region");
        // SAFETY: within the mapping, as just checked.
        unsafe { self.base.as_ptr().add(offset) }
    }

    /// The counter at `offset`, a multiple of 4.
    pub(super) fn word(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4));
        // SAFETY: in bounds, aligned (the mapping is page-aligned), never accessed except as an atomic.
        unsafe { &*self.at(offset, 4).cast() }
    }

    /// The counter at `offset`, a multiple of 8.
    pub(super) fn wide(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8));
        // SAFETY: as in `word`.
        unsafe { &*self.at(offset, 8).cast() }
    }

    /// Bytes to read.
    ///
    /// # Safety
    /// Nobody writes these bytes while the slice lives.
    pub(super) unsafe fn bytes(&self, offset: usize, len: usize) -> &[u8] {
        // SAFETY: in bounds and initialised (mappings start as zeros); the caller excludes writers.
        unsafe { std::slice::from_raw_parts(self.at(offset, len), len) }
    }

    /// Bytes to write.
    ///
    /// # Safety
    /// Nobody else reads or writes these bytes while the slice lives.
    #[allow(clippy::mut_from_ref, reason = "exclusiveness is the caller's promise")]
    pub(super) unsafe fn bytes_mut(&self, offset: usize, len: usize) -> &mut [u8] {
        // SAFETY: in bounds; the caller excludes all others.
        unsafe { std::slice::from_raw_parts_mut(self.at(offset, len), len) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by us, and no borrow outlives self.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
    }
}
