//! Which GPU a rank uses, and which machine code.
//!
//! One visible GPU is for all ranks of the machine; of several, each rank takes the one of its number among the ranks
//! here. Machine code comes with the program where it fits the device and the driver knows its form; otherwise the
//! program's text is compiled here.

use super::cache::{self, Key};
use crate::session::SessionError;
use std::fmt::Write;
use tpshard_driver::cublaslt::CublasLt;
use tpshard_driver::cuda::{Device, Driver, Module};
use tpshard_driver::nvrtc::Nvrtc;
use tpshard_driver::{DriverError, SearchPath};
use tpshard_ir::program::device::{Cubin, DeviceCode};

/// An open GPU with the program's kernels on it.
pub(super) struct Gpu {
    pub(super) device: Device,
    pub(super) module: Module,
    /// What multiplies matrices, if it is there.
    pub(super) library: Option<CublasLt>,
    /// GPUs that this process sees.
    pub(super) visible: usize,
    /// What was chosen, for people.
    pub(super) description: String,
}

/// Where a rank finds itself.
pub(crate) struct Surroundings<'a> {
    /// The rank's number among those of this machine.
    pub(crate) local_rank: usize,
    pub(crate) search: SearchPath,
    /// Whether calls may go into the device's queue as graphs.
    pub(crate) graphs: bool,
    /// Whether collectives may travel while the device computes.
    pub(crate) overlap: bool,
    /// Says that the rank is at work.
    pub(crate) progress: &'a dyn Fn(),
}

/// Why the program cannot run on a GPU here.
fn unusable(what: impl std::fmt::Display) -> SessionError {
    let what = format!(
        "the program is for GPUs, and none can be used: {what}\n  \
         help: run it where there is one, or with --device cpu"
    );
    SessionError::Device { what }
}

impl Gpu {
    pub(super) fn open(code: &DeviceCode, host: &Surroundings<'_>) -> Result<Gpu, SessionError> {
        let driver = Driver::load(&host.search).map_err(unusable)?;
        let visible = driver.devices().map_err(unusable)?;
        let ordinal = choose(visible, host.local_rank)?;
        let device = driver.device(ordinal).map_err(unusable)?;
        (host.progress)();
        let (module, origin) = machine_code(code, &driver, &device, &host.search)?;
        (host.progress)();
        // Without it, products are made by our own kernels.
        let library = CublasLt::load(&host.search, &device).ok();
        let products = if library.is_some() { ", products by cuBLASLt" } else { "" };
        let description =
            format!("GPU {ordinal} ({}, sm_{}), {origin}{products}", device.name(), device.arch());
        Ok(Gpu { device, module, library, visible, description })
    }
}

/// The GPU of the rank number `local_rank` among the ranks of a machine.
fn choose(visible: usize, local_rank: usize) -> Result<usize, SessionError> {
    match visible {
        0 => Err(unusable("the driver finds no GPU")),
        1 => Ok(0),
        _ if local_rank < visible => Ok(local_rank),
        _ => Err(SessionError::Device {
            what: format!(
                "this is rank number {local_rank} on this machine, counted from 0, and {visible} GPUs are visible\n  \
                 help: start at most one rank per GPU, or let all ranks share one with CUDA_VISIBLE_DEVICES=0"
            ),
        }),
    }
}

/// True if the driver knows the form of the code and the device can run it.
fn fits(cubin: &Cubin, arch: u32, driver: (u32, u32)) -> bool {
    cubin.arch / 10 == arch / 10 && cubin.arch <= arch && cubin.nvrtc.0 <= driver.0
}

/// The kernels on the device, and where they came from.
fn machine_code(
    code: &DeviceCode,
    driver: &Driver,
    device: &Device,
    search: &SearchPath,
) -> Result<(Module, String), SessionError> {
    let arch = device.arch();
    let mut reasons = String::new();
    let mut fitting: Vec<&Cubin> = code.cubins.iter().filter(|c| fits(c, arch, driver.version())).collect();
    fitting.sort_by_key(|cubin| std::cmp::Reverse(cubin.arch));
    for cubin in fitting {
        match device.load(&cubin.bytes) {
            Ok(module) => return Ok((module, format!("kernels of the program for sm_{}", cubin.arch))),
            Err(error) => {
                let _ = write!(reasons, "\n  its kernels for sm_{}: {error}", cubin.arch);
            }
        }
    }
    if reasons.is_empty() {
        let held: Vec<String> = code
            .cubins
            .iter()
            .map(|c| format!("sm_{} by NVRTC {}.{}", c.arch, c.nvrtc.0, c.nvrtc.1))
            .collect();
        let held = if held.is_empty() { "none".to_owned() } else { held.join(", ") };
        let (major, minor) = driver.version();
        let _ = write!(
            reasons,
            "\n  the program holds kernels for: {held}; the device is sm_{arch}, its driver is for CUDA {major}.{minor}"
        );
    }
    compiled(&code.source, device, search).map_err(|error| {
        let what =
            format!("this GPU has no kernels to run:{reasons}\n  and they cannot be compiled here: {error}");
        unusable(what)
    })
}

/// The kernels, compiled now or at an earlier start.
fn compiled(source: &str, device: &Device, search: &SearchPath) -> Result<(Module, String), DriverError> {
    let compiler = Nvrtc::load(search)?;
    let (major, minor) = compiler.version();
    let key = Key::new(source, device.arch(), compiler.version());
    let folder = cache::folder();
    if let Some(code) = folder.as_deref().and_then(|folder| key.read(folder)) {
        // Code that does not load any more is made again.
        if let Ok(module) = device.load(&code) {
            return Ok((module, format!("kernels compiled earlier by NVRTC {major}.{minor}")));
        }
    }
    let code = compiler.compile(source, device.arch(), &[])?;
    let module = device.load(&code)?;
    if let Some(folder) = &folder {
        key.write(folder, &code);
    }
    Ok((module, format!("kernels compiled by NVRTC {major}.{minor}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_gpu_is_for_all_ranks_and_several_are_dealt_out() {
        assert_eq!(choose(1, 3).unwrap(), 0);
        assert_eq!(choose(4, 3).unwrap(), 3);
        let error = choose(2, 2).unwrap_err();
        assert_eq!(error.exit_code(), 5);
        assert!(error.to_string().contains("2 GPUs are visible"), "{error}");
        assert!(choose(0, 0).unwrap_err().to_string().contains("--device cpu"));
    }

    #[test]
    fn code_is_taken_for_devices_and_drivers_that_know_it() {
        let cubin = |arch, major| Cubin { arch, nvrtc: (major, 9), bytes: Vec::new() };
        for (cubin, arch, driver, expected) in [
            (cubin(90, 12), 90, (12, 0), true),
            (cubin(90, 12), 90, (13, 0), true),
            (cubin(90, 13), 90, (12, 9), false),
            (cubin(80, 12), 86, (12, 0), true),
            (cubin(86, 12), 80, (12, 0), false),
            (cubin(80, 12), 90, (12, 0), false),
            (cubin(100, 12), 103, (12, 9), true),
        ] {
            assert_eq!(fits(&cubin, arch, driver), expected, "{cubin:?} on {arch} with {driver:?}");
        }
    }
}
