//! The functions of `libcuda` that are used, and what their statuses mean.
#![allow(unsafe_code)] // Calls into a C library.

use crate::error::DriverError;
use crate::library::functions;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

/// What the driver says if the device's memory is used up.
pub const OUT_OF_MEMORY: i32 = 2;

/// What the driver says of work that is not done yet.
const NOT_READY: i32 = 600;

/// An address of device memory.
pub(crate) type DevicePointer = u64;

/// NVIDIA's number for memory of the device.
pub(super) const DEVICE_MEMORY: c_uint = 2;

/// A copy of rows of bytes that lie apart: `CUDA_MEMCPY2D`.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct RowsCopy {
    pub(super) from_x: usize,
    pub(super) from_y: usize,
    pub(super) from_kind: c_uint,
    pub(super) from_host: *const c_void,
    pub(super) from_device: DevicePointer,
    pub(super) from_array: *mut c_void,
    pub(super) from_pitch: usize,
    pub(super) to_x: usize,
    pub(super) to_y: usize,
    pub(super) to_kind: c_uint,
    pub(super) to_host: *mut c_void,
    pub(super) to_device: DevicePointer,
    pub(super) to_array: *mut c_void,
    pub(super) to_pitch: usize,
    pub(super) bytes: usize,
    pub(super) rows: usize,
}

/// What a node of a graph calls: `CUDA_KERNEL_NODE_PARAMS_v2`.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct KernelCall {
    pub(super) function: *mut c_void,
    pub(super) blocks: [c_uint; 3],
    pub(super) threads: [c_uint; 3],
    pub(super) shared: c_uint,
    pub(super) arguments: *mut *mut c_void,
    pub(super) extra: *mut *mut c_void,
    /// Looked at if there is no function.
    pub(super) kernel: *mut c_void,
    pub(super) context: *mut c_void,
}

functions! {
    /// The functions of `libcuda` that are used.
    Functions {
        init "cuInit" (flags: c_uint);
        driver_version "cuDriverGetVersion" (version: *mut c_int);
        device_count "cuDeviceGetCount" (count: *mut c_int);
        device "cuDeviceGet" (device: *mut c_int, ordinal: c_int);
        device_name "cuDeviceGetName" (name: *mut c_char, length: c_int, device: c_int);
        bus_id "cuDeviceGetPCIBusId" (id: *mut c_char, length: c_int, device: c_int);
        device_attribute "cuDeviceGetAttribute" (value: *mut c_int, attribute: c_int, device: c_int);
        retain "cuDevicePrimaryCtxRetain" (context: *mut *mut c_void, device: c_int);
        release "cuDevicePrimaryCtxRelease_v2" (device: c_int);
        set_current "cuCtxSetCurrent" (context: *mut c_void);
        memory_info "cuMemGetInfo_v2" (free: *mut usize, total: *mut usize);
        allocate "cuMemAlloc_v2" (address: *mut DevicePointer, bytes: usize);
        free "cuMemFree_v2" (address: DevicePointer);
        allocate_on_host "cuMemHostAlloc" (address: *mut *mut c_void, bytes: usize, flags: c_uint);
        free_on_host "cuMemFreeHost" (address: *mut c_void);
        copy_to_device "cuMemcpyHtoDAsync_v2" (to: DevicePointer, from: *const c_void, bytes: usize, stream: *mut c_void);
        copy_to_host "cuMemcpyDtoHAsync_v2" (to: *mut c_void, from: DevicePointer, bytes: usize, stream: *mut c_void);
        copy_on_device "cuMemcpyDtoDAsync_v2" (to: DevicePointer, from: DevicePointer, bytes: usize, stream: *mut c_void);
        copy_rows "cuMemcpy2DAsync_v2" (copy: *const RowsCopy, stream: *mut c_void);
        fill "cuMemsetD8Async" (to: DevicePointer, byte: u8, bytes: usize, stream: *mut c_void);
        load_module "cuModuleLoadData" (module: *mut *mut c_void, image: *const c_void);
        module_function "cuModuleGetFunction" (function: *mut *mut c_void, module: *mut c_void, name: *const c_char);
        unload_module "cuModuleUnload" (module: *mut c_void);
        launch "cuLaunchKernel" (function: *mut c_void, blocks_x: c_uint, blocks_y: c_uint, blocks_z: c_uint,
            threads_x: c_uint, threads_y: c_uint, threads_z: c_uint, shared: c_uint, stream: *mut c_void,
            arguments: *mut *mut c_void, extra: *mut *mut c_void);
        create_stream "cuStreamCreate" (stream: *mut *mut c_void, flags: c_uint);
        create_urgent_stream "cuStreamCreateWithPriority" (stream: *mut *mut c_void, flags: c_uint, priority: c_int);
        priorities "cuCtxGetStreamPriorityRange" (least: *mut c_int, greatest: *mut c_int);
        synchronize "cuStreamSynchronize" (stream: *mut c_void);
        query_stream "cuStreamQuery" (stream: *mut c_void);
        destroy_stream "cuStreamDestroy_v2" (stream: *mut c_void);
        create_event "cuEventCreate" (event: *mut *mut c_void, flags: c_uint);
        record_event "cuEventRecord" (event: *mut c_void, stream: *mut c_void);
        query_event "cuEventQuery" (event: *mut c_void);
        destroy_event "cuEventDestroy_v2" (event: *mut c_void);
        wait_event "cuStreamWaitEvent" (stream: *mut c_void, event: *mut c_void, flags: c_uint);
        begin_capture "cuStreamBeginCapture_v2" (stream: *mut c_void, mode: c_uint);
        capture_info "cuStreamGetCaptureInfo_v2" (stream: *mut c_void, status: *mut c_uint, id: *mut u64,
            graph: *mut *mut c_void, last: *mut *const *mut c_void, count: *mut usize);
        end_capture "cuStreamEndCapture" (stream: *mut c_void, graph: *mut *mut c_void);
        instantiate "cuGraphInstantiateWithFlags" (executable: *mut *mut c_void, graph: *mut c_void, flags: u64);
        set_node "cuGraphExecKernelNodeSetParams_v2" (executable: *mut c_void, node: *mut c_void, call: *const KernelCall);
        launch_graph "cuGraphLaunch" (executable: *mut c_void, stream: *mut c_void);
        destroy_executable "cuGraphExecDestroy" (executable: *mut c_void);
        destroy_graph "cuGraphDestroy" (graph: *mut c_void);
        error_name "cuGetErrorName" (code: c_int, name: *mut *const c_char);
        error_text "cuGetErrorString" (code: c_int, text: *mut *const c_char);
    }
}

impl Functions {
    /// True if everything for graphs is there, which the driver has from CUDA 12 on.
    pub(super) fn has_graphs(&self) -> bool {
        self.begin_capture.is_some()
            && self.capture_info.is_some()
            && self.end_capture.is_some()
            && self.instantiate.is_some()
            && self.set_node.is_some()
            && self.launch_graph.is_some()
            && self.destroy_executable.is_some()
            && self.destroy_graph.is_some()
    }

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

impl Functions {
    /// Whether what was asked for is done.
    pub(super) fn is_done(
        &self,
        called: Result<(&'static str, i32), DriverError>,
    ) -> Result<bool, DriverError> {
        match called? {
            (_, NOT_READY) => Ok(false),
            called => self.checked(Ok(called)).map(|()| true),
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    #[test]
    fn copies_of_rows_are_laid_out_as_in_the_header_of_cuda_13() {
        assert_eq!(size_of::<RowsCopy>(), 128);
        let offsets = [
            offset_of!(RowsCopy, from_kind),
            offset_of!(RowsCopy, from_device),
            offset_of!(RowsCopy, from_pitch),
            offset_of!(RowsCopy, to_x),
            offset_of!(RowsCopy, to_kind),
            offset_of!(RowsCopy, to_device),
            offset_of!(RowsCopy, to_pitch),
            offset_of!(RowsCopy, bytes),
            offset_of!(RowsCopy, rows),
        ];
        assert_eq!(offsets, [16, 32, 48, 56, 72, 88, 104, 112, 120]);
    }

    #[test]
    fn calls_of_nodes_are_laid_out_as_in_the_header_of_cuda_13() {
        assert_eq!(size_of::<KernelCall>(), 72);
        let offsets = [
            offset_of!(KernelCall, function),
            offset_of!(KernelCall, blocks),
            offset_of!(KernelCall, threads),
            offset_of!(KernelCall, shared),
            offset_of!(KernelCall, arguments),
            offset_of!(KernelCall, extra),
            offset_of!(KernelCall, kernel),
            offset_of!(KernelCall, context),
        ];
        assert_eq!(offsets, [0, 8, 20, 32, 40, 48, 56, 64]);
    }
}
