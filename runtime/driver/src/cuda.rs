//! The driver: devices, their memory, machine code, and calls of it in the order they are made.
//!
//! A [`Device`] is one GPU with one queue of work. Copies and launches are put into the queue; what the host reads is
//! there when the reading call returns. Every call first makes the device that of its thread, so that values may move
//! between threads.
#![allow(unsafe_code)] // Calls into a C library.

mod functions;

pub use functions::OUT_OF_MEMORY;

use crate::error::DriverError;
use crate::library::Library;
use crate::search::SearchPath;
pub(crate) use functions::DevicePointer;
use functions::Functions;
use std::ffi::{CString, c_int, c_void};
use std::path::Path;
use std::sync::Arc;

const NAMES: [&str; 2] = ["libcuda.so.1", "libcuda.so"];

/// Attributes of devices, by NVIDIA's numbers.
const CAPABILITY_MAJOR: c_int = 75;
const CAPABILITY_MINOR: c_int = 76;
/// Streams that do not wait for the default one.
const NON_BLOCKING: u32 = 1;

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
        };
        queue.enter()?;
        let mut stream = std::ptr::null_mut();
        // SAFETY: the pointer lives through the call.
        f.checked(unsafe { f.create_stream(&mut stream, NON_BLOCKING) })?;
        queue.stream = stream as usize;
        let capability = [queue.attribute(CAPABILITY_MAJOR)?, queue.attribute(CAPABILITY_MINOR)?];
        queue.arch = capability[0].saturating_mul(10).saturating_add(capability[1]);
        queue.name = queue.find_name()?;
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
}

impl Queue {
    fn stream(&self) -> *mut c_void {
        self.stream as *mut c_void
    }

    /// Makes the device that of this thread.
    fn enter(&self) -> Result<(), DriverError> {
        // SAFETY: the context is retained until this is dropped.
        self.functions.checked(unsafe { self.functions.set_current(self.context as *mut c_void) })
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
        let length = name.iter().position(|&b| b == 0).unwrap_or(name.len());
        Ok(String::from_utf8_lossy(name.get(..length).unwrap_or_default()).into_owned())
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // Nothing can be done about failures here.
        if self.enter().is_ok() && self.stream != 0 {
            // SAFETY: the stream was made by `create_stream`, and nothing that uses it is left.
            let _ = unsafe { self.functions.destroy_stream(self.stream()) };
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
        let f = &self.0.functions;
        // SAFETY: the stream lives as long as the queue.
        f.checked(unsafe { f.synchronize(self.0.stream()) })
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
            // SAFETY: work that uses the memory is waited for, then it is freed once; nothing can be done about failures.
            let _ = unsafe { (f.synchronize(self.queue.stream()), f.free(self.address)) };
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
            // SAFETY: work that uses the code is waited for, then it is unloaded once.
            let _ =
                unsafe { (f.synchronize(self.queue.stream()), f.unload_module(self.module as *mut c_void)) };
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
