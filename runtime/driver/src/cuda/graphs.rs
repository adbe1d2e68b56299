//! Graphs: calls that the driver takes down instead of making them, and later makes all at once.
//!
//! Between [`Device::capture`] and [`Capture::finish`], what is put into the queue becomes a chain of nodes. A [`Graph`] of
//! them is put into the queue as one piece, as often as wanted; before, single nodes may be given other arguments.
//!
//! The driver is told not to mind what other threads do meanwhile (they look at marks in the queue), nor that libraries
//! load code; the thread that captures must not wait for the queue.
#![allow(unsafe_code)] // Calls into a C library.

use super::{Call, Device, Queue};
use crate::error::DriverError;
use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// NVIDIA's number for a capture during which any thread may call anything.
const RELAXED: u32 = 2;
/// NVIDIA's number for a queue that is taken down.
const ACTIVE: u32 = 1;
/// What the driver says of a capture that something has spoiled.
const INVALIDATED: i32 = 901;

/// A piece of work in a graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node(usize);

/// A queue that is taken down; if dropped, what was taken down is forgotten.
#[derive(Debug)]
pub struct Capture {
    queue: Arc<Queue>,
    is_open: bool,
}

/// Work that can be put into the queue as one piece.
#[derive(Debug)]
pub struct Graph {
    queue: Arc<Queue>,
    /// Its nodes are named by their handles in here.
    graph: usize,
    executable: usize,
}

impl Device {
    /// True if the driver has all functions that graphs need.
    pub fn has_graphs(&self) -> bool {
        self.0.functions.has_graphs()
    }

    /// From now on, work is taken down instead of being done.
    ///
    /// # Errors
    /// The driver has no graphs, or fails.
    pub fn capture(&self) -> Result<Capture, DriverError> {
        self.0.enter()?;
        let f = &self.0.functions;
        // SAFETY: the stream lives as long as the queue.
        f.checked(unsafe { f.begin_capture(self.0.stream(), RELAXED) })?;
        Ok(Capture { queue: self.0.clone(), is_open: true })
    }
}

impl Capture {
    /// The node of what was put into the queue last.
    ///
    /// # Errors
    /// Nothing was, or the capture was spoiled.
    pub fn last(&self) -> Result<Node, DriverError> {
        self.queue.enter()?;
        let f = &self.queue.functions;
        let (mut status, mut id, mut graph) = (0, 0, std::ptr::null_mut());
        let (mut last, mut count) = (std::ptr::null(), 0);
        // SAFETY: all places live through the call.
        f.checked(unsafe {
            f.capture_info(self.queue.stream(), &mut status, &mut id, &mut graph, &mut last, &mut count)
        })?;
        if status != ACTIVE || count != 1 || last.is_null() {
            return Err(spoiled("cuStreamGetCaptureInfo_v2", format!(": {count} nodes at its end")));
        }
        // SAFETY: the driver says that there is one, and keeps it until the queue or the graph changes.
        Ok(Node(unsafe { last.read() } as usize))
    }

    /// Ends the capture.
    ///
    /// # Errors
    /// It was spoiled, or the driver fails. The queue can be used as before in any case.
    pub fn finish(mut self) -> Result<Graph, DriverError> {
        let graph = self.end()?;
        if graph == 0 {
            return Err(spoiled("cuStreamEndCapture", String::new()));
        }
        let mut made = Graph { queue: self.queue.clone(), graph, executable: 0 };
        let f = &self.queue.functions;
        let mut executable = std::ptr::null_mut();
        // SAFETY: the graph is the one that was just made, the pointer lives through the call; no flags.
        f.checked(unsafe { f.instantiate(&mut executable, graph as *mut c_void, 0) })?;
        made.executable = executable as usize;
        self.queue.counts.captures.fetch_add(1, Ordering::Relaxed);
        Ok(made)
    }

    fn end(&mut self) -> Result<usize, DriverError> {
        self.is_open = false;
        self.queue.enter()?;
        let f = &self.queue.functions;
        let mut graph = std::ptr::null_mut();
        // SAFETY: the stream is alive and taken down since this was made, the pointer lives through the call.
        f.checked(unsafe { f.end_capture(self.queue.stream(), &mut graph) })?;
        Ok(graph as usize)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        if self.is_open
            && let Ok(graph) = self.end()
        {
            drop(Graph { queue: self.queue.clone(), graph, executable: 0 });
        }
    }
}

fn spoiled(function: &'static str, detail: String) -> DriverError {
    let name = "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED".into();
    DriverError::Call { function, code: INVALIDATED, name, detail }
}

impl Graph {
    /// Tells a node to make another call from the next launch on. It must be one that made a call of a kernel.
    ///
    /// # Errors
    /// The driver fails.
    pub fn set(&mut self, node: Node, call: &Call) -> Result<(), DriverError> {
        self.queue.enter()?;
        self.queue.counts.updates.fetch_add(1, Ordering::Relaxed);
        let f = &self.queue.functions;
        let executable = self.executable as *mut c_void;
        // SAFETY: the executable graph is alive; the driver looks for the node in the graph, which is too, and copies the
        // arguments as when it launches.
        call.as_node(|call| f.checked(unsafe { f.set_node(executable, node.0 as *mut c_void, call) }))
    }

    /// Puts everything into the queue.
    ///
    /// # Errors
    /// The driver fails.
    pub fn launch(&self) -> Result<(), DriverError> {
        self.queue.enter()?;
        self.queue.counts.graphs.fetch_add(1, Ordering::Relaxed);
        let f = &self.queue.functions;
        // SAFETY: the executable graph and the stream are alive.
        f.checked(unsafe { f.launch_graph(self.executable as *mut c_void, self.queue.stream()) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.queue.enter().is_err() {
            return;
        }
        let f = &self.queue.functions;
        // What is under way is not stopped: the driver frees it when it is done. Nothing can be done about failures.
        if self.executable != 0 {
            // SAFETY: made by `instantiate`, destroyed once.
            let _ = unsafe { f.destroy_executable(self.executable as *mut c_void) };
        }
        if self.graph != 0 {
            // SAFETY: made by `end_capture`, destroyed once.
            let _ = unsafe { f.destroy_graph(self.graph as *mut c_void) };
        }
    }
}
