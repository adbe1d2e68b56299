//! Memory of a device, and what is copied to, from and within it.
#![allow(unsafe_code)] // Calls into a C library.

use super::Queue;
use super::functions::{DEVICE_MEMORY, DevicePointer, RowsCopy};
use crate::error::DriverError;
use std::sync::Arc;

/// What the driver says of an argument that it does not take.
const INVALID_VALUE: i32 = 1;
/// Uploads beyond this may wait for the queue in the driver.
const SMALL_UPLOAD: usize = 64 << 10;

/// Rows of bytes that lie apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rows {
    pub count: u64,
    /// Bytes of a row.
    pub bytes: u64,
    /// Bytes from the beginning of one row to that of the next, where they are written.
    pub to_stride: u64,
    /// The same where they are read.
    pub from_stride: u64,
}

impl Rows {
    /// Bytes from the beginning of the first row to the end of the last.
    fn extent(&self, stride: u64) -> Option<u64> {
        self.count.checked_sub(1)?.checked_mul(stride)?.checked_add(self.bytes)
    }
}

/// Device memory, freed when dropped.
#[derive(Debug)]
pub struct Memory {
    queue: Arc<Queue>,
    address: DevicePointer,
    bytes: u64,
}

impl Memory {
    /// Memory that `allocate` gave.
    pub(super) fn new(queue: Arc<Queue>, address: DevicePointer, bytes: u64) -> Memory {
        Memory { queue, address, bytes }
    }

    #[allow(clippy::len_without_is_empty, reason = "a number of bytes")]
    pub fn len(&self) -> u64 {
        self.bytes
    }

    /// The address of byte `offset`, of which `bytes` lie within.
    pub(crate) fn at(&self, offset: u64, bytes: u64) -> Result<DevicePointer, DriverError> {
        match offset.checked_add(bytes) {
            Some(end) if end <= self.bytes => Ok(self.address + offset),
            _ => Err(DriverError::Bounds { offset, bytes, size: self.bytes }),
        }
    }

    /// Writes bytes of the host; they may be changed when this returns.
    ///
    /// # Errors
    /// They do not lie within, or the driver fails.
    pub fn upload(&self, offset: u64, from: &[u8]) -> Result<(), DriverError> {
        let to = self.at(offset, from.len() as u64)?;
        if from.is_empty() {
            return Ok(());
        }
        self.queue.enter()?;
        if from.len() > SMALL_UPLOAD && self.queue.is_watched() {
            self.queue.wait()?;
        }
        let f = &self.queue.functions;
        // SAFETY: source and target have this many bytes. From memory that is not pinned, the driver has taken the
        // bytes when the call returns.
        f.checked(unsafe { f.copy_to_device(to, from.as_ptr().cast(), from.len(), self.queue.stream()) })
    }

    /// Reads bytes after all work before is done.
    ///
    /// # Errors
    /// They do not lie within, or some work failed.
    pub fn download(&self, offset: u64, to: &mut [u8]) -> Result<(), DriverError> {
        let from = self.at(offset, to.len() as u64)?;
        if to.is_empty() {
            return Ok(());
        }
        self.queue.enter()?;
        if self.queue.is_watched() {
            // To memory that is not pinned, the driver waits in the copy, where nobody watches.
            self.queue.wait()?;
        }
        let f = &self.queue.functions;
        let stream = self.queue.stream();
        // SAFETY: source and target have this many bytes; the target is borrowed until the copy is waited for.
        let copied = f.checked(unsafe { f.copy_to_host(to.as_mut_ptr().cast(), from, to.len(), stream) });
        // SAFETY: the stream lives as long as the queue. Waited for in any case, since the target ends with this.
        let done = f.checked(unsafe { f.synchronize(stream) });
        copied.and(done)
    }

    /// Copies from other memory of the device.
    ///
    /// # Errors
    /// The bytes do not lie within, or the driver fails.
    pub fn copy(&self, offset: u64, from: &Memory, from_offset: u64, bytes: u64) -> Result<(), DriverError> {
        let (to, source) = (self.at(offset, bytes)?, from.at(from_offset, bytes)?);
        let Ok(count) = usize::try_from(bytes) else {
            return Err(DriverError::Bounds { offset, bytes, size: self.bytes });
        };
        if count == 0 {
            return Ok(());
        }
        self.queue.enter()?;
        let f = &self.queue.functions;
        // SAFETY: both have this many bytes, and live until the stream is destroyed or they are freed, which waits.
        f.checked(unsafe { f.copy_on_device(to, source, count, self.queue.stream()) })
    }

    /// Copies rows from other memory of the device.
    ///
    /// # Errors
    /// The bytes do not lie within, or the driver fails.
    pub fn copy_rows(
        &self,
        offset: u64,
        from: &Memory,
        from_offset: u64,
        rows: Rows,
    ) -> Result<(), DriverError> {
        if rows.count == 0 || rows.bytes == 0 {
            return Ok(());
        }
        let whole = |stride: u64| rows.extent(stride).unwrap_or(u64::MAX);
        let to = self.at(offset, whole(rows.to_stride))?;
        let source = from.at(from_offset, whole(rows.from_stride))?;
        if rows.count == 1 || (rows.bytes == rows.to_stride && rows.bytes == rows.from_stride) {
            return self.copy(offset, from, from_offset, rows.count * rows.bytes);
        }
        let size = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
        let copy = RowsCopy {
            from_x: 0,
            from_y: 0,
            from_kind: DEVICE_MEMORY,
            from_host: std::ptr::null(),
            from_device: source,
            from_array: std::ptr::null_mut(),
            from_pitch: size(rows.from_stride),
            to_x: 0,
            to_y: 0,
            to_kind: DEVICE_MEMORY,
            to_host: std::ptr::null_mut(),
            to_device: to,
            to_array: std::ptr::null_mut(),
            to_pitch: size(rows.to_stride),
            bytes: size(rows.bytes),
            rows: size(rows.count),
        };
        self.queue.enter()?;
        let f = &self.queue.functions;
        // SAFETY: all rows lie within memory that lives as in `copy`; the description lives through the call.
        match f.checked(unsafe { f.copy_rows(&copy, self.queue.stream()) }) {
            // Rows may lie further apart than the driver can say.
            Err(DriverError::Call { code: INVALID_VALUE, .. }) => (0..rows.count).try_for_each(|row| {
                let (to, source) = (offset + row * rows.to_stride, from_offset + row * rows.from_stride);
                self.copy(to, from, source, rows.bytes)
            }),
            copied => copied,
        }
    }

    /// Sets bytes to zero.
    ///
    /// # Errors
    /// They do not lie within, or the driver fails.
    pub fn clear(&self, offset: u64, bytes: u64) -> Result<(), DriverError> {
        let to = self.at(offset, bytes)?;
        let Ok(count) = usize::try_from(bytes) else {
            return Err(DriverError::Bounds { offset, bytes, size: self.bytes });
        };
        if count == 0 {
            return Ok(());
        }
        self.queue.enter()?;
        let f = &self.queue.functions;
        // SAFETY: the memory has this many bytes.
        f.checked(unsafe { f.fill(to, 0, count, self.queue.stream()) })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.queue.enter().is_ok() {
            let f = &self.queue.functions;
            // Work that uses the memory is waited for. Memory of an abandoned queue is left to the end of the process.
            if !matches!(self.queue.wait(), Err(DriverError::Abandoned { .. })) {
                // SAFETY: freed once; nothing can be done about failures.
                let _ = unsafe { f.free(self.address) };
            }
        }
    }
}
