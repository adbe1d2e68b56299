//! Captured streams and graphs: work that is taken down with its arguments as they are, and done when its graph is launched.
//!
//! Stricter than NVIDIA's driver: copies from and to the host, collectives, products and freeing memory spoil a capture.
#![allow(unsafe_code)] // What a C library exports.

use crate::modules::Kernel;
use crate::settings::{capture_succeeds, graph_succeeds, launch_succeeds};
use crate::streams::{self, Stream};
use std::ffi::{c_int, c_uint, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const SUCCESS: c_int = 0;
const INVALID_VALUE: c_int = 1;
const OUT_OF_MEMORY: c_int = 2;
const ILLEGAL_STATE: c_int = 401;
pub(crate) const LAUNCH_FAILED: c_int = 719;
const UNSUPPORTED: c_int = 900;
const INVALIDATED: c_int = 901;
const UNMATCHED: c_int = 903;

/// A failure in a graph is known when it is too late for everything that follows.
static LOST: AtomicBool = AtomicBool::new(false);

/// A call of a kernel.
#[derive(Clone)]
pub(crate) struct Call {
    kernel: &'static Kernel,
    blocks: [c_uint; 3],
    shared: c_uint,
    words: Vec<u64>,
}

impl Call {
    /// A call with the arguments as they are now.
    ///
    /// # Safety
    /// There are as many arguments as the kernel has, each of eight bytes.
    pub(crate) unsafe fn new(
        kernel: &'static Kernel,
        blocks: [c_uint; 3],
        shared: c_uint,
        arguments: *mut *mut c_void,
    ) -> Call {
        // SAFETY: by the caller.
        let word = |i| unsafe { (*arguments.add(i)).cast::<u64>().read() };
        Call { kernel, blocks, shared, words: (0..kernel.parameters()).map(word).collect() }
    }

    pub(crate) fn run(&self) -> c_int {
        if !launch_succeeds() {
            return LAUNCH_FAILED;
        }
        let mut words = self.words.clone();
        let mut arguments: Vec<*mut c_void> =
            words.iter_mut().map(|w| std::ptr::from_mut(w).cast()).collect();
        // One thread does the work of a block: kernels are written so that this is right too.
        // SAFETY: the arguments are those of the kernel; what they name is memory if the caller of the driver has kept it.
        let done = unsafe { self.kernel.launch(self.blocks, [1, 1, 1], self.shared, arguments.as_mut_ptr()) };
        if done { SUCCESS } else { LAUNCH_FAILED }
    }
}

/// A piece of work.
#[derive(Clone)]
pub(crate) enum Work {
    Call(Call),
    /// A copy, or memory that is set.
    Other(Arc<dyn Fn() -> c_int + Send + Sync>),
}

/// Whether a stream is captured, and what of it.
#[derive(Default)]
pub(crate) enum Capture {
    #[default]
    Not,
    /// The nodes, whose addresses name them, and the address of the last one.
    Taken(Nodes, Box<usize>),
    Spoiled,
}

impl Capture {
    /// Takes work down, if the stream is captured.
    pub(crate) fn take(&mut self, work: impl FnOnce() -> Work) -> Option<c_int> {
        match self {
            Capture::Not => None,
            Capture::Spoiled => Some(INVALIDATED),
            Capture::Taken(nodes, last) => {
                nodes.push(Arc::new(work()));
                **last = nodes.last().map_or(0, |node| Arc::as_ptr(node).addr());
                Some(SUCCESS)
            }
        }
    }

    /// Something happens that must not, if the stream is captured.
    pub(crate) fn spoil(&mut self) -> Option<c_int> {
        match self {
            Capture::Not => None,
            Capture::Spoiled | Capture::Taken(..) => {
                *self = Capture::Spoiled;
                Some(UNSUPPORTED)
            }
        }
    }
}

/// Something failed when it was too late to say so.
pub(crate) fn lose() {
    LOST.store(true, Ordering::Relaxed);
}

/// True after a failure in a graph, or in what was put into a stream.
pub(crate) fn is_lost() -> bool {
    LOST.load(Ordering::Relaxed)
}

type Nodes = Vec<Arc<Work>>;
/// The address of every node, and its work as it is now.
type Executable = Vec<(usize, Work)>;

/// # Safety
/// As NVIDIA documents it; so are all others.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamBeginCapture_v2(stream: *mut c_void, mode: c_uint) -> c_int {
    let Some(stream) = Stream::at(stream.addr()).filter(|_| mode <= 2) else { return INVALID_VALUE };
    stream.with_capture(|capture| {
        if !matches!(capture, Capture::Not) {
            return ILLEGAL_STATE;
        }
        let sound = capture_succeeds();
        *capture = if sound { Capture::Taken(Vec::new(), Box::default()) } else { Capture::Spoiled };
        SUCCESS
    })
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamGetCaptureInfo_v2(
    stream: *mut c_void,
    status: *mut c_uint,
    _id: *mut u64,
    _graph: *mut *mut c_void,
    last: *mut *const *mut c_void,
    count: *mut usize,
) -> c_int {
    let Some(stream) = Stream::at(stream.addr()) else { return INVALID_VALUE };
    stream.with_capture(|capture| {
        let (found, nodes, at) = match capture {
            Capture::Not => (0, 0, std::ptr::null()),
            Capture::Taken(nodes, last) => (1, nodes.len().min(1), std::ptr::from_ref::<usize>(last).cast()),
            Capture::Spoiled => (2, 0, std::ptr::null()),
        };
        // SAFETY: by the caller.
        unsafe {
            status.write(found);
            last.write(at);
            count.write(nodes);
        }
    });
    SUCCESS
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamEndCapture(stream: *mut c_void, graph: *mut *mut c_void) -> c_int {
    let Some(stream) = Stream::at(stream.addr()) else { return INVALID_VALUE };
    let (made, code) = match stream.with_capture(std::mem::take) {
        Capture::Not => (std::ptr::null_mut(), UNMATCHED),
        Capture::Spoiled => (std::ptr::null_mut(), INVALIDATED),
        Capture::Taken(nodes, _) => (Box::into_raw(Box::<Nodes>::new(nodes)).cast(), SUCCESS),
    };
    // SAFETY: by the caller.
    unsafe { graph.write(made) };
    code
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphInstantiateWithFlags(
    executable: *mut *mut c_void,
    graph: *mut c_void,
    flags: u64,
) -> c_int {
    if flags != 0 {
        return INVALID_VALUE;
    }
    // SAFETY: by the caller, the handle is of a graph that is not destroyed.
    let nodes = unsafe { &*graph.cast::<Nodes>() };
    let copied = |node: &Arc<Work>| (Arc::as_ptr(node).addr(), (**node).clone());
    let made: Executable = nodes.iter().map(copied).collect();
    // SAFETY: by the caller.
    unsafe { executable.write(Box::into_raw(Box::new(made)).cast()) };
    SUCCESS
}

/// `CUDA_KERNEL_NODE_PARAMS_v2`.
#[repr(C)]
pub struct NodeCall {
    function: *mut c_void,
    blocks: [c_uint; 3],
    threads: [c_uint; 3],
    shared: c_uint,
    arguments: *mut *mut c_void,
    extra: *mut *mut c_void,
    kernel: *mut c_void,
    context: *mut c_void,
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphExecKernelNodeSetParams_v2(
    executable: *mut c_void,
    node: *mut c_void,
    call: *const NodeCall,
) -> c_int {
    // SAFETY: by the caller, who changes nothing of it meanwhile.
    let (executable, call) = unsafe { (&mut *executable.cast::<Executable>(), &*call) };
    let fits = call.blocks[1] < 1 << 16 && call.blocks[2] < 1 << 16;
    let threads = call.threads.iter().product::<c_uint>();
    let unused = call.extra.is_null() && call.kernel.is_null() && call.context.is_null();
    if !fits || call.blocks.contains(&0) || threads == 0 || threads > 1024 || !unused {
        return INVALID_VALUE;
    }
    // SAFETY: handles of functions live on; the arguments are those of the kernel.
    let told =
        unsafe { Call::new(&*call.function.cast::<Kernel>(), call.blocks, call.shared, call.arguments) };
    match executable.iter_mut().find(|(at, _)| *at == node.addr()) {
        Some((_, work @ Work::Call(_))) => {
            *work = Work::Call(told);
            SUCCESS
        }
        _ => INVALID_VALUE,
    }
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphLaunch(executable: *mut c_void, stream: *mut c_void) -> c_int {
    if let Some(code) = streams::forbid(stream.addr()) {
        return code;
    }
    if is_lost() {
        return LAUNCH_FAILED;
    }
    if !graph_succeeds() {
        return OUT_OF_MEMORY;
    }
    // SAFETY: by the caller, the handle is of an executable graph that is not destroyed.
    let executable = unsafe { &*executable.cast::<Executable>() };
    let all: Vec<Work> = executable.iter().map(|(_, work)| work.clone()).collect();
    streams::perform(stream.addr(), move || {
        for work in &all {
            let done = match work {
                Work::Call(call) => call.run(),
                Work::Other(work) => work(),
            };
            if done != SUCCESS {
                lose();
                return done;
            }
        }
        SUCCESS
    })
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphExecDestroy(executable: *mut c_void) -> c_int {
    // SAFETY: made by `cuGraphInstantiateWithFlags`, destroyed once.
    drop(unsafe { Box::from_raw(executable.cast::<Executable>()) });
    SUCCESS
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphDestroy(graph: *mut c_void) -> c_int {
    // SAFETY: made by `cuStreamEndCapture`, destroyed once.
    drop(unsafe { Box::from_raw(graph.cast::<Nodes>()) });
    SUCCESS
}
