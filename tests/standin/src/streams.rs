//! Streams of the stand-in device: what is put into one is done in order, by a thread of its own.
//!
//! Only collectives and waits for other streams are put there, because they wait for other processes. Everything else is
//! done at once by whoever asks, after what is in the stream: as if the driver's queue had room for nothing more, which it
//! may say at any time. While a stream is captured, nothing is done at all (`graphs`).
//!
//! With `delay=N` everything is put into streams, and stream number N of a device does nothing until somebody waits for it:
//! a host, or another stream that was told to. All others are as fast as they can be. So what should have waited for
//! stream N and does not comes before it, and what stream N should have waited for has long passed when others are asked.

use crate::graphs::{Capture, Work};
use crate::settings::settings;
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What nobody waits for is done after this time all the same, as every device does it at last.
const LATEST: Duration = Duration::from_millis(300);

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    jobs: VecDeque<(Instant, Job)>,
    /// Jobs put in, and those done, since the stream was made.
    put: u64,
    done: u64,
    /// As much somebody waits for.
    wanted: u64,
    has_thread: bool,
    capture: Capture,
}

#[derive(Default)]
pub(crate) struct Stream {
    device: i32,
    /// It does nothing until somebody waits for it.
    is_late: bool,
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
        let mut all = streams();
        let number = all.iter().filter(|stream| stream.device == device).count() as u64 + 1;
        let is_late = settings().delay == Some(number);
        let stream: &'static Stream = Box::leak(Box::new(Stream { device, is_late, ..Stream::default() }));
        all.push(stream);
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
        state.jobs.push_back((Instant::now(), job));
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
            let since = state.jobs.front().map(|(since, _)| since.elapsed());
            let rests = self.is_late && state.done >= state.wanted;
            if let Some(left) = since.filter(|_| rests).and_then(|since| LATEST.checked_sub(since)) {
                state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            match state.jobs.pop_front() {
                Some((_, job)) => {
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
        self.wait_until(self.end());
    }

    /// Says that somebody waits for what was put in so far.
    pub(crate) fn want(&self) -> u64 {
        let mut state = self.state();
        state.wanted = state.put;
        self.changed.notify_all();
        state.put
    }

    /// Waits until so much is done.
    pub(crate) fn wait_until(&self, until: u64) {
        let mut state = self.state();
        state.wanted = until.max(state.wanted);
        self.changed.notify_all();
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

/// Does work after what is in the stream at an address: at once, or when its turn comes, where all work is put into
/// streams. Then its status is told by whatever comes later.
pub(crate) fn perform(address: usize, work: impl FnOnce() -> i32 + Send + 'static) -> i32 {
    let Some(stream) = Stream::at(address).filter(|_| settings().delay.is_some()) else {
        drain(address);
        return work();
    };
    if crate::graphs::is_lost() {
        return crate::graphs::LAUNCH_FAILED;
    }
    stream.put(Box::new(move || {
        if !crate::graphs::is_lost() && work() != 0 {
            crate::graphs::lose();
        }
    }));
    0
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
