//! Streams of the stand-in device: what is put into one is done in order, by a thread of its own.
//!
//! Only collectives are put there, because they wait for other processes. Everything else is done at once by whoever asks,
//! after what is in the stream: as if the driver's queue had room for nothing more, which it may say at any time. While a
//! stream is captured, nothing is done at all (`graphs`).

use crate::graphs::{Capture, Work};
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    /// Jobs put in, and those done, since the stream was made.
    put: u64,
    done: u64,
    has_thread: bool,
    capture: Capture,
}

#[derive(Default)]
pub(crate) struct Stream {
    device: i32,
    state: Mutex<State>,
    changed: Condvar,
}

/// All streams, which live as long as the process.
static STREAMS: Mutex<Vec<&'static Stream>> = Mutex::new(Vec::new());

fn streams() -> MutexGuard<'static, Vec<&'static Stream>> {
    STREAMS.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Stream {
    pub(crate) fn make(device: i32) -> &'static Stream {
        let stream: &'static Stream = Box::leak(Box::new(Stream { device, ..Stream::default() }));
        streams().push(stream);
        stream
    }

    /// The stream at an address, if there is one.
    pub(crate) fn at(address: usize) -> Option<&'static Stream> {
        streams().iter().copied().find(|stream| std::ptr::from_ref(*stream).addr() == address)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts work into the stream.
    pub(crate) fn put(&'static self, job: Job) {
        let mut state = self.state();
        // Collectives are never captured here.
        if !matches!(state.capture, Capture::Not) {
            state.capture = Capture::Spoiled;
            return;
        }
        state.jobs.push_back(job);
        state.put += 1;
        if !state.has_thread {
            state.has_thread = true;
            std::thread::spawn(move || self.work());
        }
        self.changed.notify_all();
    }

    fn work(&self) {
        let mut state = self.state();
        loop {
            match state.jobs.pop_front() {
                Some(job) => {
                    drop(state);
                    job();
                    state = self.state();
                    state.done += 1;
                    self.changed.notify_all();
                }
                None => state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Waits for everything that was put in so far.
    pub(crate) fn drain(&self) {
        let mut state = self.state();
        let until = state.put;
        while state.done < until {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Does something with what is captured of the stream.
    pub(crate) fn with_capture<T>(&self, body: impl FnOnce(&mut Capture) -> T) -> T {
        body(&mut self.state().capture)
    }

    /// How much was put in so far.
    pub(crate) fn end(&self) -> u64 {
        self.state().put
    }

    /// Whether as much is done.
    pub(crate) fn is_done(&self, end: u64) -> bool {
        self.state().done >= end
    }
}

/// If the stream at an address is captured: takes work down, or says why that cannot be.
pub(crate) fn capture(address: usize, work: impl FnOnce() -> Work) -> Option<i32> {
    Stream::at(address).and_then(|stream| stream.with_capture(|capture| capture.take(work)))
}

/// If the stream at an address is captured: what it says of something that must not be done then.
pub(crate) fn forbid(address: usize) -> Option<i32> {
    Stream::at(address).and_then(|stream| stream.with_capture(Capture::spoil))
}

/// The same of all streams of a device.
pub(crate) fn forbid_on_device(device: i32) -> Option<i32> {
    let all = streams().clone();
    let of_device = all.into_iter().filter(|stream| stream.device == device);
    of_device.filter_map(|stream| stream.with_capture(Capture::spoil)).last()
}

/// Waits for the stream at an address; others hold nothing.
pub(crate) fn drain(address: usize) {
    if let Some(stream) = Stream::at(address) {
        stream.drain();
    }
}

/// Waits for all streams of a device.
pub(crate) fn drain_device(device: i32) {
    let all = streams().clone();
    all.into_iter().filter(|stream| stream.device == device).for_each(Stream::drain);
}
