//! Files as [`Bytes`], without reading them.
//!
//! Holds the frontend's only `unsafe`: a memory map is sound only while nobody shortens or rewrites the file.

#![allow(unsafe_code)] // memmap2 cannot promise that the file stays as it is; see the SAFETY line.

use bytes::Bytes;
use memmap2::MmapOptions;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Files up to this size are read instead of mapped: cheaper, and immune to later changes.
const READ_BELOW: u64 = 64 << 10;

/// The content of a regular file of `len` bytes.
pub(crate) fn file_bytes(file: &File, len: u64) -> io::Result<Bytes> {
    range_bytes(file, 0, len)
}

/// `length` bytes of a regular file, from `offset`.
pub(crate) fn range_bytes(file: &File, offset: u64, length: u64) -> io::Result<Bytes> {
    let size = usize::try_from(length).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
    if length <= READ_BELOW {
        let mut content = vec![0; size];
        file.read_exact_at(&mut content, offset)?;
        return Ok(Bytes::from(content));
    }
    let mut options = MmapOptions::new();
    options.offset(offset).len(size);
    // SAFETY: the map is private and read-only, and lives as long as the `Bytes` that owns it. What remains is another
    // process that truncates or rewrites the file meanwhile: the contract of every tool that maps weights is that
    // model files are not modified in place while in use.
    let map = unsafe { options.map(file)? };
    Ok(Bytes::from_owner(map))
}
