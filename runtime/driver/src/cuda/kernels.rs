//! Machine code on a device, and calls of it.
#![allow(unsafe_code)] // Calls into a C library.

use super::functions::KernelCall;
use super::{Memory, Queue};
use crate::error::DriverError;
use std::ffi::{CString, c_void};
use std::sync::Arc;
use std::sync::atomic::Ordering;

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
    /// A call of the kernel, to be made once or often. Kernels reach the memory of their device only, and that of other
    /// users of it not at all: text that is wrong, or a call that is made after its memory was freed, can spoil results
    /// and end the device's context, which the next call says, but no memory of this process.
    ///
    /// # Errors
    /// An offset outside of memory.
    pub fn call(
        &self,
        blocks: [u32; 3],
        threads: u32,
        shared: u32,
        arguments: &[Argument<'_>],
    ) -> Result<Call, DriverError> {
        // Every kind of argument fits into eight bytes, the low ones first.
        let word = |argument: &Argument<'_>| -> Result<u64, DriverError> {
            match *argument {
                Argument::Memory(memory, offset) => memory.at(offset, 0),
                Argument::Size(size) => Ok(size as u64),
                Argument::Real(real) => Ok(u64::from(real.to_bits())),
            }
        };
        let words = arguments.iter().map(word).collect::<Result<Vec<u64>, _>>()?;
        Ok(Call { function: self.clone(), blocks, threads, shared, words })
    }
}

/// A call of a kernel, with everything that the kernel is given.
#[derive(Clone, Debug)]
pub struct Call {
    function: Function,
    blocks: [u32; 3],
    threads: u32,
    shared: u32,
    words: Vec<u64>,
}

impl PartialEq for Call {
    fn eq(&self, other: &Call) -> bool {
        self.is_of_same_kernel(other)
            && (self.blocks, self.threads, self.shared) == (other.blocks, other.threads, other.shared)
            && self.words == other.words
    }
}

impl Eq for Call {}

impl Call {
    /// True if both call the same kernel, be it with other arguments or another number of blocks.
    pub fn is_of_same_kernel(&self, other: &Call) -> bool {
        Arc::ptr_eq(&self.function.module, &other.function.module)
            && self.function.handle == other.function.handle
    }

    /// Puts the call into the queue.
    ///
    /// # Errors
    /// The driver fails.
    pub fn launch(&self) -> Result<(), DriverError> {
        let queue = &self.function.module.queue;
        queue.enter()?;
        queue.counts.launches.fetch_add(1, Ordering::Relaxed);
        let [x, y, z] = self.blocks;
        let f = &queue.functions;
        self.with_arguments(|arguments| {
            // SAFETY: the function is of a loaded module; the arguments live through the call, in which the driver copies
            // as many of them, and as many bytes of each, as the kernel has, which the caller's table says.
            f.checked(unsafe {
                f.launch(
                    self.function.handle as *mut c_void,
                    x,
                    y,
                    z,
                    self.threads,
                    1,
                    1,
                    self.shared,
                    queue.stream(),
                    arguments,
                    std::ptr::null_mut(),
                )
            })
        })
    }

    /// What a node of a graph is told to call; valid within `body`.
    pub(super) fn as_node<T>(&self, body: impl FnOnce(&KernelCall) -> T) -> T {
        self.with_arguments(|arguments| {
            body(&KernelCall {
                function: self.function.handle as *mut c_void,
                blocks: self.blocks,
                threads: [self.threads, 1, 1],
                shared: self.shared,
                arguments,
                extra: std::ptr::null_mut(),
                kernel: std::ptr::null_mut(),
                context: std::ptr::null_mut(),
            })
        })
    }

    /// Gives `body` a pointer to each argument, which nobody writes through.
    fn with_arguments<T>(&self, body: impl FnOnce(*mut *mut c_void) -> T) -> T {
        let pointer = |word: &u64| std::ptr::from_ref(word).cast_mut().cast();
        let mut pointers: Vec<*mut c_void> = self.words.iter().map(pointer).collect();
        body(pointers.as_mut_ptr())
    }
}
