//! Mapping a file for reading.
#![allow(unsafe_code)] // A mapping's bytes change if another process writes the file.

use memmap2::Mmap;
use std::fs::File;
use std::io;

/// The file's bytes.
pub(super) fn map(file: &File) -> io::Result<Mmap> {
    // SAFETY: weight shards are written once, under another name, and renamed; nothing changes them in place. A process
    // that does so anyway can make us compute nonsense or stop with SIGBUS, but not write memory: the mapping is
    // read-only, and everything taken from it is numbers, or copied and checked first.
    unsafe { Mmap::map(file) }
}

/// Gives the pages that lie wholly within `range` back to the system; they are read again if they are needed again.
/// Advice only: a system that does not follow it keeps them.
pub(super) fn release(mapping: &Mmap, range: std::ops::Range<usize>) {
    if range.end > mapping.len() || range.start >= range.end {
        return;
    }
    // SAFETY: the mapping is of a file and read-only, so pages that were given back hold the file's bytes again when
    // they are next touched; no value in memory changes.
    let advised = unsafe {
        mapping.unchecked_advise_range(
            memmap2::UncheckedAdvice::DontNeed,
            range.start,
            range.end - range.start,
        )
    };
    // Without the advice the pages stay until memory is short.
    drop(advised);
}
