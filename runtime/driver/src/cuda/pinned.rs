//! Copies of much data from files or ordinary memory to a device, through two pieces of memory that the driver can copy from
//! by itself: while it copies one, the other is filled.
#![allow(unsafe_code)] // Calls into a C library, and memory that it gives.

use super::{Device, Event, Memory, Queue};
use crate::error::DriverError;
use std::sync::Arc;

/// Bytes of each piece.
const PIECE: usize = 8 << 20;
/// Less than this is left to the driver, which copies it as fast.
const LEAST: usize = 1 << 20;
/// How often is looked whether a piece is free.
const NAP: std::time::Duration = std::time::Duration::from_micros(50);

/// Memory of the host that the driver may copy from at any time.
#[derive(Debug)]
struct Piece {
    queue: Arc<Queue>,
    address: usize,
    /// Passed once the driver has copied what it was last filled with.
    copied: Event,
}

impl Piece {
    fn new(device: &Device) -> Result<Piece, DriverError> {
        device.enter()?;
        let queue = device.0.clone();
        let copied = device.event()?;
        let f = &queue.functions;
        let mut address = std::ptr::null_mut();
        // SAFETY: the pointer lives through the call; no flags.
        f.checked(unsafe { f.allocate_on_host(&mut address, PIECE, 0) })?;
        Ok(Piece { address: address as usize, copied, queue: queue.clone() })
    }

    /// Waits until the driver has copied it, for as long as that makes sense.
    fn wait(&self) -> Result<(), DriverError> {
        while !self.copied.has_passed()? {
            std::thread::sleep(NAP);
        }
        Ok(())
    }

    /// Puts a copy of at most [`PIECE`] bytes into the queue.
    fn upload(&self, to: &Memory, offset: u64, from: &[u8]) -> Result<(), DriverError> {
        let target = to.at(offset, from.len() as u64)?;
        self.wait()?;
        let bytes = from.len().min(PIECE);
        // SAFETY: the piece is as large, and the driver does not read it.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.address as *mut u8, bytes) };
        self.queue.enter()?;
        let f = &self.queue.functions;
        // SAFETY: source and target have this many bytes, and stay until the copy has passed.
        f.checked(unsafe { f.copy_to_device(target, self.address as *const _, bytes, self.queue.stream()) })?;
        self.copied.record()
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        if self.queue.enter().is_ok() && self.wait().is_ok() {
            let f = &self.queue.functions;
            // SAFETY: freed once, and the driver does not read it any more.
            let _ = unsafe { f.free_on_host(self.address as *mut _) };
        }
    }
}

/// Two pieces, in turn.
#[derive(Debug)]
pub struct Uploader {
    /// Nothing where the driver has no such memory left.
    pieces: Option<[Piece; 2]>,
    next: usize,
}

impl Uploader {
    pub(super) fn new(device: &Device) -> Uploader {
        let pieces = Piece::new(device).and_then(|first| Ok([first, Piece::new(device)?])).ok();
        Uploader { pieces, next: 0 }
    }

    /// Writes bytes; they may be changed when this returns. `progress` is called now and then.
    ///
    /// # Errors
    /// They do not lie within, or the driver fails.
    pub fn upload(&mut self, to: &Memory, from: &[u8], progress: &dyn Fn()) -> Result<(), DriverError> {
        let Some(pieces) = self.pieces.as_ref().filter(|_| from.len() >= LEAST) else {
            return to.upload(0, from);
        };
        let mut offset = 0;
        for part in from.chunks(PIECE) {
            let piece = pieces.get(self.next % pieces.len());
            piece.map_or_else(|| to.upload(offset, part), |piece| piece.upload(to, offset, part))?;
            self.next += 1;
            offset += part.len() as u64;
            progress();
        }
        Ok(())
    }
}
