//! The driver: devices, their memory, machine code, and calls of it in the order they are made.
//!
//! A [`Device`] is one GPU with one queue of work. Copies and launches are put into the queue; what the host reads is
//! there when the reading call returns. Beside it there may be a second queue ([`Lane::Side`]); what one of the two does
//! is only in order with the other where an [`Event`] of the other is [waited for](Device::wait_in). Every call first makes the device that of its thread, so that values may move
//! between threads.
//!
//! Work that needs other processes, such as a collective, may never be done. Whoever puts such work into the queue gives
//! the device a [`Watch`]: waiting then ends when the watch says that nothing will come of it. From then on the queue is
//! *abandoned*; every call fails, and nothing is waited for or freed any more, which would wait too.
#![allow(unsafe_code)] // Calls into a C library.

mod events;
mod functions;
mod graphs;
mod kernels;
mod memory;
mod pinned;

pub use events::{Event, Lane};
pub use functions::OUT_OF_MEMORY;
pub use graphs::{Capture, Graph, Node};
pub use kernels::{Argument, Call, Function, Module};
pub use memory::{Memory, Rows};
pub use pinned::Uploader;

use crate::error::DriverError;
use crate::library::Library;
use crate::search::SearchPath;
pub(crate) use functions::DevicePointer;
use functions::Functions;
use std::ffi::{c_int, c_void};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

const NAMES: [&str; 2] = ["libcuda.so.1", "libcuda.so"];

/// Attributes of devices, by NVIDIA's numbers.
const CAPABILITY_MAJOR: c_int = 75;
const CAPABILITY_MINOR: c_int = 76;
/// Streams that do not wait for the default one.
const NON_BLOCKING: u32 = 1;
/// Events that only say whether they have passed.
const NO_TIMES: u32 = 2;
/// A wait that is watched gives up the core until this is over, and then sleeps in between.
const LIVELY: Duration = Duration::from_millis(2);
const NAP: Duration = Duration::from_micros(100);

/// Says whether waiting for a device still makes sense.
pub trait Watch: Send + Sync + std::fmt::Debug {
    /// Why it makes none any more. Asked often, from any thread.
    fn broken(&self) -> Option<String>;
}

/// An open and initialised driver.
#[derive(Clone, Debug)]
pub struct Driver {
    functions: Arc<Functions>,
    version: (u32, u32),
}

impl Driver {
    /// Opens the driver.
    ///
    /// # Errors
    /// It is not there, or finds no device that works.
    pub fn load(search: &SearchPath) -> Result<Driver, DriverError> {
        let help = "install NVIDIA's driver";
        let library = Library::find("NVIDIA's driver libcuda", &NAMES, search, help)?;
        let functions = Functions::of(&library);
        // SAFETY: no flags are defined.
        functions.checked(unsafe { functions.init(0) })?;
        let mut version = 0;
        // SAFETY: the integer lives through the call.
        functions.checked(unsafe { functions.driver_version(&mut version) })?;
        let version = u32::try_from(version).unwrap_or(0);
        Ok(Driver { functions: Arc::new(functions), version: (version / 1000, version % 1000 / 10) })
    }

    /// The newest version of CUDA that the driver supports.
    pub fn version(&self) -> (u32, u32) {
        self.version
    }

    /// The file that was opened.
    pub fn path(&self) -> &Path {
        self.functions.path()
    }

    /// Number of devices that this process sees.
    ///
    /// # Errors
    /// The driver fails.
    pub fn devices(&self) -> Result<usize, DriverError> {
        let mut count = 0;
        // SAFETY: the integer lives through the call.
        self.functions.checked(unsafe { self.functions.device_count(&mut count) })?;
        Ok(usize::try_from(count).unwrap_or(0))
    }

    /// Device number `ordinal`, ready for work.
    ///
    /// # Errors
    /// There is no such device, or it cannot be used.
    pub fn device(&self, ordinal: usize) -> Result<Device, DriverError> {
        let f = &self.functions;
        let mut device = 0;
        // SAFETY: the integer lives through the call.
        f.checked(unsafe { f.device(&mut device, c_int::try_from(ordinal).unwrap_or(c_int::MAX)) })?;
        let mut context = std::ptr::null_mut();
        // SAFETY: the device exists, the pointer lives through the call.
        f.checked(unsafe { f.retain(&mut context, device) })?;
        let mut queue = Queue {
            functions: self.functions.clone(),
            device,
            context: context as usize,
            stream: 0,
            side: AtomicUsize::new(0),
            name: String::new(),
            arch: 0,
            bus: String::new(),
            watch: Mutex::default(),
            abandoned: AtomicBool::new(false),
            counts: Counts::default(),
        };
        queue.enter()?;
        let mut stream = std::ptr::null_mut();
        // SAFETY: the pointer lives through the call.
        f.checked(unsafe { f.create_stream(&mut stream, NON_BLOCKING) })?;
        queue.stream = stream as usize;
        let capability = [queue.attribute(CAPABILITY_MAJOR)?, queue.attribute(CAPABILITY_MINOR)?];
        queue.arch = capability[0].saturating_mul(10).saturating_add(capability[1]);
        queue.name = queue.find_name()?;
        // Only some decisions need it, and they can do without.
        queue.bus = queue.find_bus().unwrap_or_default();
        Ok(Device(Arc::new(queue)))
    }
}

/// A device's context and streams. Handles are kept as numbers, which any thread may hold.
#[derive(Debug)]
struct Queue {
    functions: Arc<Functions>,
    device: c_int,
    context: usize,
    stream: usize,
    /// Zero if there is none.
    side: AtomicUsize,
    name: String,
    arch: u32,
    bus: String,
    watch: Mutex<Option<Arc<dyn Watch>>>,
    abandoned: AtomicBool,
    counts: Counts,
}

/// See [`Submitted`].
#[derive(Debug, Default)]
struct Counts {
    launches: AtomicU64,
    graphs: AtomicU64,
    updates: AtomicU64,
    captures: AtomicU64,
}

/// How often the driver was asked to have a device do something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Submitted {
    /// Calls of our own kernels, one by one.
    pub launches: u64,
    /// Launches of graphs.
    pub graphs: u64,
    /// Nodes of graphs that were given other arguments.
    pub updates: u64,
    /// Graphs that were made.
    pub captures: u64,
}

impl Submitted {
    /// What was asked for since `before`.
    #[must_use]
    pub fn since(&self, before: &Submitted) -> Submitted {
        Submitted {
            launches: self.launches.saturating_sub(before.launches),
            graphs: self.graphs.saturating_sub(before.graphs),
            updates: self.updates.saturating_sub(before.updates),
            captures: self.captures.saturating_sub(before.captures),
        }
    }
}

impl Queue {
    fn stream(&self) -> *mut c_void {
        self.stream as *mut c_void
    }

    /// The second stream, if there is one.
    fn side(&self) -> Option<*mut c_void> {
        let side = self.side.load(Ordering::Acquire);
        (side != 0).then_some(side as *mut c_void)
    }

    fn stream_of(&self, lane: Lane) -> *mut c_void {
        match lane {
            Lane::Main => self.stream(),
            Lane::Side => self.side().unwrap_or(self.stream()),
        }
    }

    /// Makes the device that of this thread.
    fn enter(&self) -> Result<(), DriverError> {
        if self.abandoned.load(Ordering::Acquire) {
            return Err(DriverError::Abandoned { why: "the run was given up".into() });
        }
        // SAFETY: the context is retained until this is dropped.
        self.functions.checked(unsafe { self.functions.set_current(self.context as *mut c_void) })
    }

    /// Waits for all work of both queues to be done, as long as that makes sense.
    fn wait(&self) -> Result<(), DriverError> {
        let f = &self.functions;
        let watch = self.watch.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(watch) = watch else {
            // SAFETY: the stream lives as long as this.
            f.checked(unsafe { f.synchronize(self.stream()) })?;
            // SAFETY: as above.
            return self.side().map_or(Ok(()), |side| f.checked(unsafe { f.synchronize(side) }));
        };
        let start = Instant::now();
        loop {
            // SAFETY: as above.
            let is_done = |stream| f.is_done(unsafe { f.query_stream(stream) });
            if is_done(self.stream())? && self.side().map_or(Ok(true), is_done)? {
                return Ok(());
            }
            if let Some(why) = watch.broken() {
                self.abandoned.store(true, Ordering::Release);
                return Err(DriverError::Abandoned { why });
            }
            if start.elapsed() < LIVELY { std::thread::yield_now() } else { std::thread::sleep(NAP) }
        }
    }

    fn is_watched(&self) -> bool {
        self.watch.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    fn attribute(&self, attribute: c_int) -> Result<u32, DriverError> {
        let mut value = 0;
        // SAFETY: the integer lives through the call; unknown attributes are refused.
        let called = unsafe { self.functions.device_attribute(&mut value, attribute, self.device) };
        self.functions.checked(called)?;
        Ok(u32::try_from(value).unwrap_or(0))
    }

    fn find_name(&self) -> Result<String, DriverError> {
        let mut name = [0u8; 128];
        // SAFETY: there is room for as many bytes as is said, of which the last is not used.
        let called = unsafe {
            self.functions.device_name(name.as_mut_ptr().cast(), name.len() as c_int - 1, self.device)
        };
        self.functions.checked(called)?;
        Ok(text(&name))
    }

    fn find_bus(&self) -> Result<String, DriverError> {
        let mut id = [0u8; 32];
        let length = id.len() as c_int - 1;
        // SAFETY: there is room for as many bytes as is said.
        let called = unsafe { self.functions.bus_id(id.as_mut_ptr().cast(), length, self.device) };
        self.functions.checked(called)?;
        Ok(text(&id))
    }
}

/// What was written into a buffer, up to the first zero.
fn text(buffer: &[u8]) -> String {
    let length = buffer.iter().position(|&b| b == 0).unwrap_or(buffer.len());
    String::from_utf8_lossy(buffer.get(..length).unwrap_or_default()).into_owned()
}

impl Drop for Queue {
    fn drop(&mut self) {
        // Nothing can be done about failures here.
        if self.enter().is_ok() && self.stream != 0 {
            // SAFETY: the stream was made by `create_stream`, and nothing that uses it is left.
            let _ = unsafe { self.functions.destroy_stream(self.stream()) };
            if let Some(side) = self.side() {
                // SAFETY: as above.
                let _ = unsafe { self.functions.destroy_stream(side) };
            }
        }
        if self.abandoned.load(Ordering::Acquire) {
            return;
        }
        // SAFETY: retained once.
        let _ = unsafe { self.functions.release(self.device) };
    }
}

/// One GPU and a queue of work for it; clones share both.
#[derive(Clone, Debug)]
pub struct Device(Arc<Queue>);

impl Device {
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The compute capability: 90 for `sm_90`.
    pub fn arch(&self) -> u32 {
        self.0.arch
    }

    /// Where the device is on the machine's bus, which tells it from all others of the machine.
    pub fn bus(&self) -> &str {
        &self.0.bus
    }

    /// How often the driver was asked for something since the device was opened.
    pub fn submitted(&self) -> Submitted {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let counts = &self.0.counts;
        Submitted {
            launches: read(&counts.launches),
            graphs: read(&counts.graphs),
            updates: read(&counts.updates),
            captures: read(&counts.captures),
        }
    }

    /// From now on, waits end when `watch` says so; `None`: they end when the work is done.
    pub fn set_watch(&self, watch: Option<Arc<dyn Watch>>) {
        *self.0.watch.lock().unwrap_or_else(PoisonError::into_inner) = watch;
    }

    /// Free and total bytes of memory.
    ///
    /// # Errors
    /// The driver fails.
    pub fn memory(&self) -> Result<(u64, u64), DriverError> {
        self.0.enter()?;
        let (mut free, mut total) = (0usize, 0usize);
        let f = &self.0.functions;
        // SAFETY: both integers live through the call.
        f.checked(unsafe { f.memory_info(&mut free, &mut total) })?;
        Ok((free as u64, total as u64))
    }

    /// Memory of `bytes` bytes, of any content.
    ///
    /// # Errors
    /// There is too little memory.
    pub fn allocate(&self, bytes: u64) -> Result<Memory, DriverError> {
        self.0.enter()?;
        let size = usize::try_from(bytes).unwrap_or(usize::MAX).max(1);
        let mut address = 0;
        let f = &self.0.functions;
        // SAFETY: the address lives through the call.
        f.checked(unsafe { f.allocate(&mut address, size) })?;
        Ok(Memory::new(self.0.clone(), address, bytes))
    }

    /// What copies much data to the device.
    pub fn uploader(&self) -> Uploader {
        Uploader::new(self)
    }

    /// The functions of a piece of machine code.
    ///
    /// # Errors
    /// Code for another device, or of a compiler that the driver is too old for.
    pub fn load(&self, cubin: &[u8]) -> Result<Module, DriverError> {
        self.0.enter()?;
        // The driver reads as far as the image itself says; what follows is at least defined.
        let mut image = cubin.to_vec();
        image.push(0);
        let mut module = std::ptr::null_mut();
        let f = &self.0.functions;
        // SAFETY: the image is machine code that our compiler made, and lives through the call.
        f.checked(unsafe { f.load_module(&mut module, image.as_ptr().cast()) })?;
        Ok(Module::new(self.0.clone(), module as usize))
    }

    /// Makes the device that of this thread.
    pub(crate) fn enter(&self) -> Result<(), DriverError> {
        self.0.enter()
    }

    pub(crate) fn stream(&self) -> *mut c_void {
        self.0.stream()
    }

    pub(crate) fn stream_of(&self, lane: Lane) -> *mut c_void {
        self.0.stream_of(lane)
    }

    /// Waits for all work to be done.
    ///
    /// # Errors
    /// Some work failed.
    pub fn synchronize(&self) -> Result<(), DriverError> {
        self.0.enter()?;
        self.0.wait()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_that_is_not_there_is_an_error_that_says_where_was_looked() {
        let empty = tempfile::tempdir().unwrap();
        std::fs::write(empty.path().join("libcuda.so.1"), "no library").unwrap();
        let search = SearchPath::of(vec![empty.path().to_path_buf()]);
        match Driver::load(&search) {
            Ok(driver) => eprintln!("SKIPPED: this machine has a driver, {}", driver.path().display()),
            // A machine with the library and no device.
            Err(DriverError::Call { .. }) => {}
            Err(error) => {
                let text = error.to_string();
                for word in ["libcuda.so.1", "TPSHARD_CUDA_PATH", &empty.path().display().to_string()] {
                    assert!(text.contains(word), "{text}");
                }
            }
        }
    }
}
