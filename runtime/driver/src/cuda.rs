//! The driver: devices, their memory, machine code, and calls of it in the order they are made.
//!
//! A [`Device`] is one GPU with one queue of work. Copies and launches are put into the queue; what the host reads is
//! there when the reading call returns. Every call first makes the device that of its thread, so that values may move
//! between threads.
//!
//! Work that needs other processes, such as a collective, may never be done. Whoever puts such work into the queue gives
//! the device a [`Watch`]: waiting then ends when the watch says that nothing will come of it. From then on the queue is
//! *abandoned*; every call fails, and nothing is waited for or freed any more, which would wait too.
#![allow(unsafe_code)] // Calls into a C library.

mod functions;

pub use functions::OUT_OF_MEMORY;

use crate::error::DriverError;
use crate::library::Library;
use crate::search::SearchPath;
pub(crate) use functions::DevicePointer;
use functions::{DEVICE_MEMORY, Functions, RowsCopy};
use std::ffi::{CString, c_int, c_void};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

const NAMES: [&str; 2] = ["libcuda.so.1", "libcuda.so"];

/// Attributes of devices, by NVIDIA's numbers.
const CAPABILITY_MAJOR: c_int = 75;
const CAPABILITY_MINOR: c_int = 76;
/// What the driver says of an argument that it does not take.
const INVALID_VALUE: i32 = 1;
/// Streams that do not wait for the default one.
const NON_BLOCKING: u32 = 1;
/// Events that only say whether they have passed.
const NO_TIMES: u32 = 2;
/// A wait that is watched gives up the core until this is over, and then sleeps in between.
const LIVELY: Duration = Duration::from_millis(2);
const NAP: Duration = Duration::from_micros(100);
/// Uploads beyond this may wait for the queue in the driver.
const SMALL_UPLOAD: usize = 64 << 10;

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
            name: String::new(),
            arch: 0,
            bus: String::new(),
            watch: Mutex::default(),
            abandoned: AtomicBool::new(false),
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

/// A device's context and stream. Handles are kept as numbers, which any thread may hold.
#[derive(Debug)]
struct Queue {
    functions: Arc<Functions>,
    device: c_int,
    context: usize,
    stream: usize,
    name: String,
    arch: u32,
    bus: String,
    watch: Mutex<Option<Arc<dyn Watch>>>,
    abandoned: AtomicBool,
}

impl Queue {
    fn stream(&self) -> *mut c_void {
        self.stream as *mut c_void
    }

    /// Makes the device that of this thread.
    fn enter(&self) -> Result<(), DriverError> {
        if self.abandoned.load(Ordering::Acquire) {
            return Err(DriverError::Abandoned { why: "the run was given up".into() });
        }
        // SAFETY: the context is retained until this is dropped.
        self.functions.checked(unsafe { self.functions.set_current(self.context as *mut c_void) })
    }

    /// Waits for all work to be done, as long as that makes sense.
    fn wait(&self) -> Result<(), DriverError> {
        let f = &self.functions;
        let watch = self.watch.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(watch) = watch else {
            // SAFETY: the stream lives as long as this.
            return f.checked(unsafe { f.synchronize(self.stream()) });
        };
        let start = Instant::now();
        loop {
            // SAFETY: as above.
            if f.is_done(unsafe { f.query_stream(self.stream()) })? {
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

    /// From now on, waits end when `watch` says so; `None`: they end when the work is done.
    pub fn set_watch(&self, watch: Option<Arc<dyn Watch>>) {
        *self.0.watch.lock().unwrap_or_else(PoisonError::into_inner) = watch;
    }

    /// A mark that can be put into the queue.
    ///
    /// # Errors
    /// The driver fails.
    pub fn event(&self) -> Result<Event, DriverError> {
        self.0.enter()?;
        let f = &self.0.functions;
        let mut handle = std::ptr::null_mut();
        // SAFETY: the pointer lives through the call.
        f.checked(unsafe { f.create_event(&mut handle, NO_TIMES) })?;
        Ok(Event { queue: self.0.clone(), handle: handle as usize })
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
        Ok(Memory { queue: self.0.clone(), address, bytes })
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
        Ok(Module(Arc::new(Loaded { queue: self.0.clone(), module: module as usize })))
    }

    /// Makes the device that of this thread.
    pub(crate) fn enter(&self) -> Result<(), DriverError> {
        self.0.enter()
    }

    pub(crate) fn stream(&self) -> *mut c_void {
        self.0.stream()
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

/// A mark in the queue, which has passed when all work before it is done.
#[derive(Debug)]
pub struct Event {
    queue: Arc<Queue>,
    handle: usize,
}

impl Event {
    /// Puts the mark at the end of the queue.
    ///
    /// # Errors
    /// The driver fails.
    pub fn record(&self) -> Result<(), DriverError> {
        self.queue.enter()?;
        let f = &self.queue.functions;
        // SAFETY: event and stream are alive.
        f.checked(unsafe { f.record_event(self.handle as *mut c_void, self.queue.stream()) })
    }

    /// Whether the mark has passed; does not wait.
    ///
    /// # Errors
    /// Some work failed.
    pub fn has_passed(&self) -> Result<bool, DriverError> {
        self.queue.enter()?;
        let f = &self.queue.functions;
        // SAFETY: the event is alive.
        f.is_done(unsafe { f.query_event(self.handle as *mut c_void) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.queue.enter().is_ok() {
            let f = &self.queue.functions;
            // SAFETY: made by `create_event`, destroyed once; the driver waits for nothing.
            let _ = unsafe { f.destroy_event(self.handle as *mut c_void) };
        }
    }
}

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

#[derive(Debug)]
struct Loaded {
    queue: Arc<Queue>,
    module: usize,
}

impl Drop for Loaded {
    fn drop(&mut self) {
        if self.queue.enter().is_ok() {
            let f = &self.queue.functions;
            // Work that uses the code is waited for, as above.
            if !matches!(self.queue.wait(), Err(DriverError::Abandoned { .. })) {
                // SAFETY: unloaded once.
                let _ = unsafe { f.unload_module(self.module as *mut c_void) };
            }
        }
    }
}

/// Machine code on a device.
#[derive(Clone, Debug)]
pub struct Module(Arc<Loaded>);

impl Module {
    /// The function `name`.
    ///
    /// # Errors
    /// There is none.
    pub fn function(&self, name: &str) -> Result<Function, DriverError> {
        let queue = &self.0.queue;
        queue.enter()?;
        let text = CString::new(name).map_err(|_| DriverError::Name { name: name.into() })?;
        let mut handle = std::ptr::null_mut();
        let f = &queue.functions;
        // SAFETY: the module is loaded, the name ends with zero, the pointer lives through the call.
        f.checked(unsafe { f.module_function(&mut handle, self.0.module as *mut c_void, text.as_ptr()) })?;
        Ok(Function { module: self.0.clone(), handle: handle as usize })
    }
}

/// A kernel.
#[derive(Clone, Debug)]
pub struct Function {
    module: Arc<Loaded>,
    handle: usize,
}

/// What a kernel is given for one parameter.
#[derive(Clone, Copy, Debug)]
pub enum Argument<'a> {
    /// Device memory from a byte on.
    Memory(&'a Memory, u64),
    Size(i64),
    Real(f32),
}

impl Function {
    /// Puts a call into the queue.
    ///
    /// Kernels reach the memory of their device only, and that of other users of it not at all: text that is wrong can
    /// spoil results and end the device's context, which the next call says, but no memory of this process.
    ///
    /// # Errors
    /// Memory of another device, an offset outside of memory, or the driver fails.
    pub fn launch(
        &self,
        blocks: [u32; 3],
        threads: u32,
        shared: u32,
        arguments: &[Argument<'_>],
    ) -> Result<(), DriverError> {
        let queue = &self.module.queue;
        queue.enter()?;
        // Every kind of argument fits into eight bytes, the low ones first.
        let word = |argument: &Argument<'_>| -> Result<u64, DriverError> {
            match *argument {
                Argument::Memory(memory, offset) => memory.at(offset, 0),
                Argument::Size(size) => Ok(size as u64),
                Argument::Real(real) => Ok(u64::from(real.to_bits())),
            }
        };
        let mut words = arguments.iter().map(word).collect::<Result<Vec<u64>, _>>()?;
        let mut pointers: Vec<*mut c_void> = words.iter_mut().map(|w| std::ptr::from_mut(w).cast()).collect();
        let [x, y, z] = blocks;
        let f = &queue.functions;
        // SAFETY: the function is of a loaded module; the arguments live through the call, in which the driver copies as
        // many of them, and as many bytes of each, as the kernel has, which the caller's table says.
        f.checked(unsafe {
            f.launch(
                self.handle as *mut c_void,
                x,
                y,
                z,
                threads,
                1,
                1,
                shared,
                queue.stream(),
                pointers.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        })
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
