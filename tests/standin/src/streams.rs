//! Streams of the stand-in device: what is put into one is done in order, by a thread of its own.
//!
//! Only collectives are put there, because they wait for other processes. Everything else is done at once by whoever asks,
//! after what is in the stream: as if the driver's queue had room for nothing more, which it may say at any time.

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

    /// How much was put in so far.
    pub(crate) fn end(&self) -> u64 {
        self.state().put
    }

    /// Whether as much is done.
    pub(crate) fn is_done(&self, end: u64) -> bool {
        self.state().done >= end
    }
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
