//! The functions of `libcuda` that are used, and what their statuses mean.
#![allow(unsafe_code)] // Calls into a C library.

use crate::error::DriverError;
use crate::library::functions;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

/// What the driver says if the device's memory is used up.
pub const OUT_OF_MEMORY: i32 = 2;

/// An address of device memory.
pub(crate) type DevicePointer = u64;

functions! {
    /// The functions of `libcuda` that are used.
    Functions {
        init "cuInit" (flags: c_uint);
        driver_version "cuDriverGetVersion" (version: *mut c_int);
        device_count "cuDeviceGetCount" (count: *mut c_int);
        device "cuDeviceGet" (device: *mut c_int, ordinal: c_int);
        device_name "cuDeviceGetName" (name: *mut c_char, length: c_int, device: c_int);
        device_attribute "cuDeviceGetAttribute" (value: *mut c_int, attribute: c_int, device: c_int);
        retain "cuDevicePrimaryCtxRetain" (context: *mut *mut c_void, device: c_int);
        release "cuDevicePrimaryCtxRelease_v2" (device: c_int);
        set_current "cuCtxSetCurrent" (context: *mut c_void);
        memory_info "cuMemGetInfo_v2" (free: *mut usize, total: *mut usize);
        allocate "cuMemAlloc_v2" (address: *mut DevicePointer, bytes: usize);
        free "cuMemFree_v2" (address: DevicePointer);
        copy_to_device "cuMemcpyHtoDAsync_v2" (to: DevicePointer, from: *const c_void, bytes: usize, stream: *mut c_void);
        copy_to_host "cuMemcpyDtoHAsync_v2" (to: *mut c_void, from: DevicePointer, bytes: usize, stream: *mut c_void);
        copy_on_device "cuMemcpyDtoDAsync_v2" (to: DevicePointer, from: DevicePointer, bytes: usize, stream: *mut c_void);
        fill "cuMemsetD8Async" (to: DevicePointer, byte: u8, bytes: usize, stream: *mut c_void);
        load_module "cuModuleLoadData" (module: *mut *mut c_void, image: *const c_void);
        module_function "cuModuleGetFunction" (function: *mut *mut c_void, module: *mut c_void, name: *const c_char);
        unload_module "cuModuleUnload" (module: *mut c_void);
        launch "cuLaunchKernel" (function: *mut c_void, blocks_x: c_uint, blocks_y: c_uint, blocks_z: c_uint,
            threads_x: c_uint, threads_y: c_uint, threads_z: c_uint, shared: c_uint, stream: *mut c_void,
            arguments: *mut *mut c_void, extra: *mut *mut c_void);
        create_stream "cuStreamCreate" (stream: *mut *mut c_void, flags: c_uint);
        synchronize "cuStreamSynchronize" (stream: *mut c_void);
        destroy_stream "cuStreamDestroy_v2" (stream: *mut c_void);
        error_name "cuGetErrorName" (code: c_int, name: *mut *const c_char);
        error_text "cuGetErrorString" (code: c_int, text: *mut *const c_char);
    }
}

impl Functions {
    /// The result of a call, with the driver's own words if it failed.
    pub(super) fn checked(
        &self,
        called: Result<(&'static str, i32), DriverError>,
    ) -> Result<(), DriverError> {
        let (function, code) = called?;
        if code == 0 {
            return Ok(());
        }
        let (mut name, mut text) = (std::ptr::null(), std::ptr::null());
        // SAFETY: both point to pointers that live through the calls.
        let _ = unsafe { (self.error_name(code, &mut name), self.error_text(code, &mut text)) };
        let name = words(name).unwrap_or_else(|| "an unknown error".into());
        let detail = words(text).map(|text| format!(": {text}")).unwrap_or_default();
        Err(DriverError::Call { function, code, name, detail })
    }
}

/// A text that the driver keeps.
fn words(text: *const c_char) -> Option<String> {
    if text.is_null() {
        return None;
    }
    // SAFETY: the driver's texts are constants that end with zero.
    Some(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
}
