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
