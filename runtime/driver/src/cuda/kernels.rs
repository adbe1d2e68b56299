//! Machine code on a device, and calls of it.
#![allow(unsafe_code)] // Calls into a C library.

use super::{Memory, Queue};
use crate::error::DriverError;
use std::ffi::{CString, c_void};
use std::sync::Arc;

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
    /// Code that `load_module` loaded.
    pub(super) fn new(queue: Arc<Queue>, module: usize) -> Module {
        Module(Arc::new(Loaded { queue, module }))
    }

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
