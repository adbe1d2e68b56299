//! Device memory: allocations of the host, every use of which is checked.
#![allow(unsafe_code)] // Addresses are handed out as numbers and come back as such.

use crate::settings::settings;
use std::collections::BTreeMap;
use std::sync::Mutex;

/// What memory holds before it is written: as floats, it is no number.
const UNWRITTEN: u8 = 0xff;
/// Allocations begin at multiples of this, as those of a driver do.
const ALIGNMENT: usize = 256;

/// Allocations by address; the bytes of each are never moved.
static ALLOCATIONS: Mutex<BTreeMap<u64, Vec<u8>>> = Mutex::new(BTreeMap::new());

fn allocations() -> std::sync::MutexGuard<'static, BTreeMap<u64, Vec<u8>>> {
    ALLOCATIONS.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

pub(crate) fn used() -> u64 {
    allocations().values().map(|bytes| bytes.len() as u64).sum()
}

/// The address of new memory, if there is enough.
pub(crate) fn allocate(bytes: usize) -> Option<u64> {
    let size = bytes.checked_add(ALIGNMENT)?;
    if used().checked_add(size as u64)? > settings().memory {
        return None;
    }
    let memory = vec![UNWRITTEN; size];
    let start = memory.as_ptr().addr();
    let address = start.next_multiple_of(ALIGNMENT) as u64;
    allocations().insert(address, memory);
    Some(address)
}

/// False if nothing was allocated there.
pub(crate) fn free(address: u64) -> bool {
    allocations().remove(&address).is_some()
}

/// Pinned memory of the host, by address.
static PINNED: Mutex<BTreeMap<u64, Vec<u8>>> = Mutex::new(BTreeMap::new());

/// The address of new memory of the host.
pub(crate) fn allocate_on_host(bytes: usize) -> u64 {
    let memory = vec![UNWRITTEN; bytes];
    let address = memory.as_ptr().addr() as u64;
    PINNED.lock().unwrap_or_else(std::sync::PoisonError::into_inner).insert(address, memory);
    address
}

/// False if nothing was allocated there.
pub(crate) fn free_on_host(address: u64) -> bool {
    PINNED.lock().unwrap_or_else(std::sync::PoisonError::into_inner).remove(&address).is_some()
}

/// True if the bytes lie in one allocation.
pub(crate) fn holds(address: u64, bytes: usize) -> bool {
    let all = allocations();
    let Some((start, memory)) = all.range(..=address).next_back() else { return false };
    let end = memory.as_ptr().addr() as u64 + memory.len() as u64;
    *start <= address && address.checked_add(bytes as u64).is_some_and(|last| last <= end)
}

/// Copies bytes.
///
/// # Safety
/// Both are memory of this many bytes, the target is not borrowed.
pub(crate) unsafe fn copy(to: u64, from: u64, bytes: usize) {
    // SAFETY: by the caller; the two may overlap.
    unsafe { std::ptr::copy(from as usize as *const u8, to as usize as *mut u8, bytes) };
}

/// Sets bytes.
///
/// # Safety
/// It is memory of this many bytes that is not borrowed.
pub(crate) unsafe fn fill(to: u64, byte: u8, bytes: usize) {
    // SAFETY: by the caller.
    unsafe { std::ptr::write_bytes(to as usize as *mut u8, byte, bytes) };
}
