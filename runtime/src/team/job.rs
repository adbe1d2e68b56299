//! How one thread hands a job to others that may be asleep.
#![allow(unsafe_code)] // A job borrows from the stack of the thread that has it, and nobody may enter or stay in it once that goes on.

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// In the state: threads within the job.
const WITHIN: u64 = (1 << 16) - 1;
/// In the state: the job may be entered.
const OPEN: u64 = 1 << 16;
/// In the state: where the number of the job begins.
const NUMBER: u32 = 17;
/// Looks at the state between looks at the clock.
const LOOKS: u32 = 64;
/// Looks at the state before a thread that waits for others lets them run on its core.
const PATIENCE: u32 = 4096;

type Job = *const (dyn Fn() + Sync);

/// What a thread with jobs and its helpers share.
pub(super) struct Shared {
    threads: usize,
    lookout: Duration,
    /// The number of the last job, whether it is open, and how many helpers are within.
    state: AtomicU64,
    job: UnsafeCell<Option<Job>>,
    /// Somebody has a job: others do theirs alone.
    taken: AtomicBool,
    panicked: AtomicBool,
    ended: AtomicBool,
    sleeping: AtomicUsize,
    bed: Mutex<()>,
    alarm: Condvar,
}

// SAFETY: `job` is written by the one thread that holds `taken`, while no job is open and no helper within, and read by
// helpers within only. What it points to is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer is good in every thread.
unsafe impl Send for Shared {}

impl Shared {
    pub(super) fn new(threads: usize, lookout: Duration) -> Shared {
        Shared {
            threads,
            lookout,
            state: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            taken: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            sleeping: AtomicUsize::new(0),
            bed: Mutex::new(()),
            alarm: Condvar::new(),
        }
    }

    pub(super) fn threads(&self) -> usize {
        self.threads
    }

    /// Calls `job` here, and on every helper that comes before it has returned here; returns when all have.
    ///
    /// # Panics
    /// A helper panicked in it.
    pub(super) fn run(&self, job: &(dyn Fn() + Sync)) {
        if self.taken.swap(true, Acquire) {
            job();
            return;
        }
        // SAFETY: only the lifetime changes. `Closing` lets nobody enter and waits for who is within before this returns
        // or unwinds.
        let lasting = unsafe { std::mem::transmute::<&(dyn Fn() + Sync), &'static (dyn Fn() + Sync)>(job) };
        // SAFETY: `taken` is ours, no job is open, and the last was left by all.
        unsafe { *self.job.get() = Some(std::ptr::from_ref(lasting)) };
        {
            let _closing = Closing(self);
            let number = (self.state.load(Relaxed) >> NUMBER) + 1;
            self.state.store(number << NUMBER | OPEN, SeqCst);
            if self.sleeping.load(SeqCst) > 0 {
                self.wake();
            }
            job();
        }
        assert!(!self.panicked.swap(false, Relaxed), "a kernel panicked on another thread");
    }

    /// Helps with jobs until the team ends.
    pub(super) fn help(&self) {
        let mut last = 0;
        while self.next(&mut last) {
            // SAFETY: we are within, so that the job is there and stays until we leave.
            let job = unsafe { *self.job.get() };
            if let Some(job) = job {
                // SAFETY: as above; the pointer came from a reference that outlives the job.
                let job = unsafe { &*job };
                if catch_unwind(AssertUnwindSafe(job)).is_err() {
                    self.panicked.store(true, Relaxed);
                }
            }
            self.state.fetch_sub(1, Release);
        }
    }

    pub(super) fn end(&self) {
        self.ended.store(true, SeqCst);
        self.wake();
    }

    fn wake(&self) {
        // Whoever is about to sleep holds the lock until it does.
        drop(self.bed.lock().unwrap_or_else(PoisonError::into_inner));
        self.alarm.notify_all();
    }

    /// Waits for a job after number `last` and enters it; false if the team has ended.
    fn next(&self, last: &mut u64) -> bool {
        let mut start = Instant::now();
        loop {
            for _ in 0..LOOKS {
                if self.ended.load(Relaxed) {
                    return false;
                }
                if self.enter(last) {
                    return true;
                }
                std::hint::spin_loop();
            }
            if start.elapsed() >= self.lookout {
                self.sleep(last);
                start = Instant::now();
            }
        }
    }

    /// Enters a job after number `last`, if one is open.
    fn enter(&self, last: &mut u64) -> bool {
        let mut state = self.state.load(Relaxed);
        while state >> NUMBER != *last && state & OPEN != 0 {
            match self.state.compare_exchange_weak(state, state + 1, Acquire, Relaxed) {
                Ok(_) => {
                    *last = state >> NUMBER;
                    return true;
                }
                Err(now) => state = now,
            }
        }
        false
    }

    /// Returns once there may be a job after number `last`, or the team has ended.
    fn sleep(&self, last: &u64) {
        let mut bed = self.bed.lock().unwrap_or_else(PoisonError::into_inner);
        self.sleeping.fetch_add(1, SeqCst);
        loop {
            // After `sleeping` was raised: whoever opens a job sees that, or we see the job.
            let state = self.state.load(SeqCst);
            if self.ended.load(SeqCst) || (state & OPEN != 0 && state >> NUMBER != *last) {
                break;
            }
            bed = self.alarm.wait(bed).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleeping.fetch_sub(1, SeqCst);
    }
}

/// Closes the job and waits for those within, also if it panics here.
struct Closing<'a>(&'a Shared);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        let Closing(shared) = self;
        shared.state.fetch_and(!OPEN, AcqRel);
        let mut looks = 0;
        while shared.state.load(Acquire) & WITHIN != 0 {
            looks += 1;
            if looks < PATIENCE {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
        shared.taken.store(false, Release);
    }
}
