//! The functions of `libcuda` for streams and for marks in them.
#![allow(unsafe_code)] // What a C library exports.

use crate::driver::{current_device, put};
use crate::graphs::Work;
use crate::settings::{busy, works};
use crate::streams::{self, Stream};
use std::ffi::{c_int, c_uint, c_void};
use std::sync::Arc;

const SUCCESS: c_int = 0;
const INVALID_VALUE: c_int = 1;
const NOT_READY: c_int = 600;
const LAUNCH_FAILED: c_int = 719;
const CAPTURED_EVENT: c_int = 907;

/// A mark in a stream: the stream, and how much had been put into it; no such number if the stream was captured.
struct Event(std::sync::Mutex<Option<(&'static Stream, Option<u64>)>>);

/// # Safety
/// As NVIDIA documents it; so are all others.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreate(stream: *mut *mut c_void, _flags: c_uint) -> c_int {
    // SAFETY: by the caller, as in all functions.
    unsafe { put(stream, std::ptr::from_ref(Stream::make(current_device())).cast_mut().cast()) }
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreateWithPriority(
    stream: *mut *mut c_void,
    flags: c_uint,
    priority: c_int,
) -> c_int {
    if !(GREATEST..=0).contains(&priority) {
        return INVALID_VALUE;
    }
    // SAFETY: see above.
    unsafe { cuStreamCreate(stream, flags) }
}

/// Of priorities, the lower numbers come first.
const GREATEST: c_int = -5;

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetStreamPriorityRange(least: *mut c_int, greatest: *mut c_int) -> c_int {
    // SAFETY: see above.
    unsafe { put(least, 0).max(put(greatest, GREATEST)) }
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamSynchronize(stream: *mut c_void) -> c_int {
    if !works() {
        return LAUNCH_FAILED;
    }
    if let Some(code) = streams::forbid(stream.addr()) {
        return code;
    }
    streams::drain(stream.addr());
    SUCCESS
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamQuery(stream: *mut c_void) -> c_int {
    if !works() {
        return LAUNCH_FAILED;
    }
    if let Some(code) = streams::forbid(stream.addr()) {
        return code;
    }
    match Stream::at(stream.addr()) {
        Some(stream) if !stream.is_done(stream.want()) => NOT_READY,
        Some(_) => SUCCESS,
        None => INVALID_VALUE,
    }
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamWaitEvent(stream: *mut c_void, event: *mut c_void, flags: c_uint) -> c_int {
    if !works() {
        return LAUNCH_FAILED;
    }
    let Some(stream) = Stream::at(stream.addr()).filter(|_| flags == 0) else { return INVALID_VALUE };
    if let Some(code) = stream.with_capture(crate::graphs::Capture::spoil) {
        return code;
    }
    // SAFETY: see above.
    match *unsafe { event_state(event) } {
        // Nothing is waited for that was not recorded.
        None => SUCCESS,
        Some((_, None)) => CAPTURED_EVENT,
        Some((other, Some(end))) => {
            if !std::ptr::eq(other, stream) && !other.is_done(end) {
                stream.put(Box::new(move || other.wait_until(end)));
            }
            SUCCESS
        }
    }
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamDestroy_v2(_stream: *mut c_void) -> c_int {
    SUCCESS
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventCreate(event: *mut *mut c_void, _flags: c_uint) -> c_int {
    // SAFETY: see above.
    unsafe { put(event, Box::into_raw(Box::new(Event(std::sync::Mutex::default()))).cast()) }
}

/// The state of an event.
///
/// # Safety
/// The handle came from `cuEventCreate` and is not destroyed.
unsafe fn event_state<'a>(
    event: *mut c_void,
) -> std::sync::MutexGuard<'a, Option<(&'static Stream, Option<u64>)>> {
    // SAFETY: by the caller.
    let event = unsafe { &*event.cast::<Event>() };
    event.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventRecord(event: *mut c_void, stream: *mut c_void) -> c_int {
    if !works() {
        return LAUNCH_FAILED;
    }
    let Some(stream) = Stream::at(stream.addr()) else { return INVALID_VALUE };
    if let Some(time) = busy() {
        stream.put(Box::new(move || std::thread::sleep(time)));
    }
    let end = stream.end();
    let captured = stream.with_capture(|capture| capture.take(|| Work::Other(Arc::new(|| SUCCESS))));
    // SAFETY: see above.
    *unsafe { event_state(event) } = Some((stream, captured.is_none().then_some(end)));
    captured.unwrap_or(SUCCESS)
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventQuery(event: *mut c_void) -> c_int {
    if !works() {
        return LAUNCH_FAILED;
    }
    // SAFETY: see above.
    match *unsafe { event_state(event) } {
        Some((_, None)) => CAPTURED_EVENT,
        Some((stream, Some(end))) if !stream.is_done(end) => NOT_READY,
        _ => SUCCESS,
    }
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventDestroy_v2(event: *mut c_void) -> c_int {
    // SAFETY: made by `cuEventCreate`, destroyed once.
    drop(unsafe { Box::from_raw(event.cast::<Event>()) });
    SUCCESS
}
