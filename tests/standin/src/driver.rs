//! The functions of `libcuda`.
#![allow(unsafe_code)] // What a C library exports.

use crate::graphs::{self, Work};
use crate::memory;
use crate::modules::{Kernel, Module};
use crate::settings::{launch_succeeds, settings, works};
use crate::streams;
use std::cell::Cell;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::Arc;

const SUCCESS: c_int = 0;
const INVALID_VALUE: c_int = 1;
const OUT_OF_MEMORY: c_int = 2;
const NO_DEVICE: c_int = 100;
const INVALID_DEVICE: c_int = 101;
const INVALID_IMAGE: c_int = 200;
const INVALID_CONTEXT: c_int = 201;
const NOT_FOUND: c_int = 500;
const NOT_READY: c_int = 600;
const LAUNCH_FAILED: c_int = 719;
const CAPTURE_UNSUPPORTED: c_int = 900;
const CAPTURE_INVALIDATED: c_int = 901;
const CAPTURED_EVENT: c_int = 907;

/// The context of the first device; those of others follow.
const CONTEXT: usize = 0x1000;

thread_local! {
    /// The device of this thread.
    static CURRENT: Cell<c_int> = const { Cell::new(0) };
}

/// The device that this thread works with.
pub(crate) fn current_device() -> c_int {
    CURRENT.get()
}

/// Writes through a pointer that may be null.
///
/// # Safety
/// It is null or points to a `T` that is not borrowed.
pub(crate) unsafe fn put<T>(to: *mut T, value: T) -> c_int {
    if to.is_null() {
        return INVALID_VALUE;
    }
    // SAFETY: by the caller.
    unsafe { to.write(value) };
    SUCCESS
}

/// Does work after what is in the stream, or takes it down where the stream is captured.
fn do_or_capture(stream: *mut c_void, work: impl Fn() -> c_int + Send + Sync + 'static) -> c_int {
    let work = Arc::new(work);
    match streams::capture(stream.addr(), || Work::Other(work.clone())) {
        Some(code) => code,
        None => streams::perform(stream.addr(), move || work()),
    }
}

fn is_device(device: c_int) -> bool {
    u64::try_from(device).is_ok_and(|device| device < settings().devices)
}

/// # Safety
/// Always safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuInit(_flags: c_uint) -> c_int {
    if settings().devices == 0 { NO_DEVICE } else { SUCCESS }
}

/// # Safety
/// As NVIDIA documents it; so are all others.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> c_int {
    // SAFETY: by the caller, as in all functions.
    unsafe { put(version, settings().driver as c_int) }
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> c_int {
    // SAFETY: see above.
    unsafe { put(count, settings().devices as c_int) }
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> c_int {
    if !is_device(ordinal) {
        return INVALID_DEVICE;
    }
    // SAFETY: see above.
    unsafe { put(device, ordinal) }
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, length: c_int, _device: c_int) -> c_int {
    let text = c"stand-in".to_bytes_with_nul();
    if usize::try_from(length).is_ok_and(|length| length < text.len()) {
        return INVALID_VALUE;
    }
    // SAFETY: there is room for `length` bytes.
    unsafe { memory::copy(name.addr() as u64, text.as_ptr().addr() as u64, text.len()) };
    SUCCESS
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, _device: c_int) -> c_int {
    let found = match attribute {
        75 => 9,
        76 => 0,
        97 => 227 << 10,
        _ => return INVALID_VALUE,
    };
    // SAFETY: see above.
    unsafe { put(value, found) }
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut *mut c_void, device: c_int) -> c_int {
    if !is_device(device) {
        return INVALID_DEVICE;
    }
    // SAFETY: see above.
    unsafe { put(context, (CONTEXT + device as usize) as *mut c_void) }
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRelease_v2(device: c_int) -> c_int {
    if is_device(device) { SUCCESS } else { INVALID_DEVICE }
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxSetCurrent(context: *mut c_void) -> c_int {
    let device = context.addr().checked_sub(CONTEXT).and_then(|device| c_int::try_from(device).ok());
    match device.filter(|&device| is_device(device)) {
        Some(device) => {
            CURRENT.set(device);
            SUCCESS
        }
        None => INVALID_CONTEXT,
    }
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> c_int {
    let all = settings().memory;
    let left = all.saturating_sub(memory::used());
    // SAFETY: see above.
    unsafe { put(free, left as usize).max(put(total, all as usize)) }
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAlloc_v2(address: *mut u64, bytes: usize) -> c_int {
    if !works() {
        return LAUNCH_FAILED;
    }
    match memory::allocate(bytes) {
        // SAFETY: see above.
        Some(found) => unsafe { put(address, found) },
        None => OUT_OF_MEMORY,
    }
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFree_v2(address: u64) -> c_int {
    if let Some(code) = streams::forbid_on_device(current_device()) {
        return code;
    }
    streams::drain_device(current_device());
    if memory::free(address) { SUCCESS } else { INVALID_VALUE }
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostAlloc(address: *mut *mut c_void, bytes: usize, _flags: c_uint) -> c_int {
    let held = memory::allocate_on_host(bytes);
    // SAFETY: see above.
    unsafe { put(address, held as usize as *mut c_void) }
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFreeHost(address: *mut c_void) -> c_int {
    if memory::free_on_host(address.addr() as u64) { SUCCESS } else { INVALID_VALUE }
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyHtoDAsync_v2(
    to: u64,
    from: *const c_void,
    bytes: usize,
    stream: *mut c_void,
) -> c_int {
    if !works() {
        return LAUNCH_FAILED;
    }
    if let Some(code) = streams::forbid(stream.addr()) {
        return code;
    }
    // Pinned memory is left alone by the caller until an event says that it was read; what is not pinned is taken here.
    let mut taken = vec![0u8; bytes];
    // SAFETY: the source is the caller's.
    unsafe { memory::copy(taken.as_mut_ptr().addr() as u64, from.addr() as u64, bytes) };
    streams::perform(stream.addr(), move || {
        if !memory::holds(to, taken.len()) {
            return INVALID_VALUE;
        }
        // SAFETY: the target was just found.
        unsafe { memory::copy(to, taken.as_ptr().addr() as u64, taken.len()) };
        SUCCESS
    })
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoHAsync_v2(
    to: *mut c_void,
    from: u64,
    bytes: usize,
    stream: *mut c_void,
) -> c_int {
    if !works() {
        return LAUNCH_FAILED;
    }
    if let Some(code) = streams::forbid(stream.addr()) {
        return code;
    }
    streams::drain(stream.addr());
    if !memory::holds(from, bytes) {
        return INVALID_VALUE;
    }
    // SAFETY: the target is the caller's, the source was just found.
    unsafe { memory::copy(to.addr() as u64, from, bytes) };
    SUCCESS
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoDAsync_v2(
    to: u64,
    from: u64,
    bytes: usize,
    stream: *mut c_void,
) -> c_int {
    if !works() {
        return LAUNCH_FAILED;
    }
    do_or_capture(stream, move || {
        if !memory::holds(to, bytes) || !memory::holds(from, bytes) {
            return INVALID_VALUE;
        }
        // SAFETY: both were just found.
        unsafe { memory::copy(to, from, bytes) };
        SUCCESS
    })
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemsetD8Async(to: u64, byte: u8, bytes: usize, stream: *mut c_void) -> c_int {
    if !works() {
        return LAUNCH_FAILED;
    }
    do_or_capture(stream, move || {
        if !memory::holds(to, bytes) {
            return INVALID_VALUE;
        }
        // SAFETY: it was just found.
        unsafe { memory::fill(to, byte, bytes) };
        SUCCESS
    })
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadData(module: *mut *mut c_void, image: *const c_void) -> c_int {
    if image.is_null() {
        return INVALID_VALUE;
    }
    // SAFETY: what the runtime loads ends with a zero byte, which the magic lacks.
    match unsafe { Module::open(image.cast()) } {
        // Modules are never closed. SAFETY: see above.
        Some(opened) => unsafe { put(module, std::ptr::from_mut(Box::leak(Box::new(opened))).cast()) },
        None => INVALID_IMAGE,
    }
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetFunction(
    function: *mut *mut c_void,
    module: *mut c_void,
    name: *const c_char,
) -> c_int {
    // SAFETY: handles are those of `cuModuleLoadData`, which live on, and names end with zero.
    let (module, name) = unsafe { (&*module.cast::<Module>(), CStr::from_ptr(name)) };
    match module.kernel(name) {
        // SAFETY: see above.
        Some(kernel) => unsafe { put(function, std::ptr::from_mut(Box::leak(Box::new(kernel))).cast()) },
        None => NOT_FOUND,
    }
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleUnload(_module: *mut c_void) -> c_int {
    SUCCESS
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFuncSetAttribute(
    _function: *mut c_void,
    _attribute: c_int,
    _value: c_int,
) -> c_int {
    SUCCESS
}

/// # Safety
/// See above.
#[allow(clippy::too_many_arguments, reason = "as many as the driver's function has")]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchKernel(
    function: *mut c_void,
    blocks_x: c_uint,
    blocks_y: c_uint,
    blocks_z: c_uint,
    threads_x: c_uint,
    threads_y: c_uint,
    threads_z: c_uint,
    shared: c_uint,
    stream: *mut c_void,
    arguments: *mut *mut c_void,
    _extra: *mut *mut c_void,
) -> c_int {
    let blocks = [blocks_x, blocks_y, blocks_z];
    let threads = [threads_x, threads_y, threads_z];
    let fits = blocks[0] < 1 << 31 && blocks[1] < 1 << 16 && blocks[2] < 1 << 16;
    if blocks.contains(&0) || !fits || threads.iter().product::<c_uint>() > 1024 || threads.contains(&0) {
        return INVALID_VALUE;
    }
    // SAFETY: handles are those of `cuModuleGetFunction`, which live on.
    let kernel = unsafe { &*function.cast::<Kernel>() };
    // SAFETY: by the caller.
    let call = || Work::Call(unsafe { graphs::Call::new(kernel, blocks, shared, arguments) });
    if let Some(code) = streams::capture(stream.addr(), call) {
        return code;
    }
    if settings().delay.is_some() {
        // SAFETY: by the caller.
        let call = unsafe { graphs::Call::new(kernel, blocks, shared, arguments) };
        return streams::perform(stream.addr(), move || call.run());
    }
    streams::drain(stream.addr());
    if graphs::is_lost() || !launch_succeeds() {
        return LAUNCH_FAILED;
    }
    // One thread does the work of a block: kernels are written so that this is right too.
    // SAFETY: by the caller.
    let done = unsafe { kernel.launch(blocks, [1, 1, 1], shared, arguments) };
    if done { SUCCESS } else { LAUNCH_FAILED }
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetPCIBusId(id: *mut c_char, length: c_int, device: c_int) -> c_int {
    let text = format!("0000:{device:02x}:00.0\0");
    if usize::try_from(length).is_ok_and(|length| length < text.len()) {
        return INVALID_VALUE;
    }
    // SAFETY: there is room for `length` bytes.
    unsafe { memory::copy(id.addr() as u64, text.as_ptr().addr() as u64, text.len()) };
    SUCCESS
}

/// `CUDA_MEMCPY2D`, as eight-byte words.
type RowsCopy = [u64; 16];

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpy2DAsync_v2(copy: *const RowsCopy, stream: *mut c_void) -> c_int {
    // SAFETY: see above.
    let words = unsafe { copy.read() };
    let [
        from_x,
        from_y,
        from_kind,
        _,
        from,
        _,
        from_pitch,
        to_x,
        to_y,
        to_kind,
        _,
        to,
        _,
        to_pitch,
        bytes,
        rows,
    ] = words;
    let starts_at_zero = [from_x, from_y, to_x, to_y] == [0; 4];
    // The kinds are of four bytes; device memory is 2.
    let on_device = [from_kind, to_kind].iter().all(|kind| kind & 0xffff_ffff == 2);
    let most = i32::MAX as u64;
    if !starts_at_zero || !on_device || from_pitch.max(to_pitch) > most || bytes > from_pitch.min(to_pitch) {
        return INVALID_VALUE;
    }
    do_or_capture(stream, move || {
        for row in 0..rows {
            let (to, from, bytes) = (to + row * to_pitch, from + row * from_pitch, bytes as usize);
            if !memory::holds(to, bytes) || !memory::holds(from, bytes) {
                return INVALID_VALUE;
            }
            // SAFETY: both were just found.
            unsafe { memory::copy(to, from, bytes) };
        }
        SUCCESS
    })
}

fn described(code: c_int) -> [&'static CStr; 2] {
    match code {
        SUCCESS => [c"CUDA_SUCCESS", c"no error"],
        INVALID_VALUE => [c"CUDA_ERROR_INVALID_VALUE", c"invalid argument"],
        OUT_OF_MEMORY => [c"CUDA_ERROR_OUT_OF_MEMORY", c"out of memory"],
        NO_DEVICE => [c"CUDA_ERROR_NO_DEVICE", c"no CUDA-capable device is detected"],
        INVALID_DEVICE => [c"CUDA_ERROR_INVALID_DEVICE", c"invalid device ordinal"],
        INVALID_IMAGE => [c"CUDA_ERROR_INVALID_IMAGE", c"device kernel image is invalid"],
        INVALID_CONTEXT => [c"CUDA_ERROR_INVALID_CONTEXT", c"invalid device context"],
        NOT_READY => [c"CUDA_ERROR_NOT_READY", c"device not ready"],
        NOT_FOUND => [c"CUDA_ERROR_NOT_FOUND", c"named symbol not found"],
        LAUNCH_FAILED => [c"CUDA_ERROR_LAUNCH_FAILED", c"unspecified launch failure"],
        CAPTURE_UNSUPPORTED => {
            [c"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", c"operation not permitted when stream is capturing"]
        }
        CAPTURE_INVALIDATED => [
            c"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
            c"operation failed due to a previous error during capture",
        ],
        CAPTURED_EVENT => [
            c"CUDA_ERROR_CAPTURED_EVENT",
            c"operation not permitted on an event last recorded in a capturing stream",
        ],
        _ => [c"CUDA_ERROR_UNKNOWN", c"unknown error"],
    }
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorName(code: c_int, name: *mut *const c_char) -> c_int {
    // SAFETY: see above.
    unsafe { put(name, described(code)[0].as_ptr()) }
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorString(code: c_int, text: *mut *const c_char) -> c_int {
    // SAFETY: see above.
    unsafe { put(text, described(code)[1].as_ptr()) }
}
