//! Files as [`Bytes`], without reading them.
//!
//! Holds the frontend's only `unsafe`: a memory map is sound only while nobody shortens or rewrites the file.

#![allow(unsafe_code)] // memmap2 cannot promise that the file stays as it is; see the SAFETY line.

use bytes::Bytes;
use memmap2::Mmap;
use std::fs::File;
use std::io::{self, Read};

/// Files up to this size are read instead of mapped: cheaper, and immune to later changes.
const READ_BELOW: u64 = 64 << 10;

/// The content of a regular file of `len` bytes.
pub(crate) fn file_bytes(file: &File, len: u64) -> io::Result<Bytes> {
    if len <= READ_BELOW {
        let mut content = Vec::with_capacity(len as usize);
        file.take(len).read_to_end(&mut content)?;
        if content.len() as u64 != len {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file shrank while it was read"));
        }
        return Ok(Bytes::from(content));
    }
    // SAFETY: the map is private and read-only, and lives as long as the `Bytes` that owns it. What remains is another
    // process that truncates or rewrites the file meanwhile: the contract of every tool that maps weights is that
    // model files are not modified in place while in use.
    let map = unsafe { Mmap::map(file)? };
    Ok(Bytes::from_owner(map))
}
