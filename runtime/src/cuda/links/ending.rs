//! Ends the cliques of a rank, all at once.
//!
//! The library waits for the device while it ends one clique, and the device may wait for a collective of another. So
//! there is a thread for each, which is there before it is needed: when something is wrong, none may come about.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use tpshard_driver::nccl::Clique;

/// How long ending the collectives may take before it is left alone.
const PATIENCE: Duration = Duration::from_millis(300);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    StandBy,
    Abort,
    Leave,
}

#[derive(Debug)]
struct Shared {
    /// What is to be done, and by how many threads it is not done yet.
    state: Mutex<(Order, usize)>,
    changed: Condvar,
}

/// What can end something; a clique, except in tests.
pub(super) trait End: Send + Sync + 'static {
    /// Ends it, and may wait for others to end.
    fn end(&self);
}

impl End for Clique {
    fn end(&self) {
        self.abort();
    }
}

/// The threads that stand by.
#[derive(Debug)]
pub(super) struct Ending {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Ending {
    /// Starts the threads.
    ///
    /// # Errors
    /// The system has none left.
    pub(super) fn prepare<E: End>(cliques: impl IntoIterator<Item = Arc<E>>) -> io::Result<Ending> {
        let shared = Arc::new(Shared { state: Mutex::new((Order::StandBy, 0)), changed: Condvar::new() });
        let ending = Ending { shared, threads: Mutex::default() };
        for clique in cliques {
            let shared = ending.shared.clone();
            let thread = std::thread::Builder::new().name("tpshard-abort".into());
            shared.state().1 += 1;
            // What was started before leaves when this is dropped.
            let thread = thread.spawn(move || shared.stand_by(&*clique))?;
            ending.threads().push(thread);
        }
        Ok(ending)
    }

    fn threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends all cliques. Returns when they have ended, or soon: then the process ends without the library.
    pub(super) fn abort(&self) {
        self.shared.order(Order::Abort);
        let waited =
            self.shared.changed.wait_timeout_while(self.shared.state(), PATIENCE, |state| state.1 > 0);
        drop(waited);
    }

    /// Lets the threads go, because the cliques ended in peace.
    pub(super) fn dismiss(&self) {
        self.shared.order(Order::Leave);
        let threads = std::mem::take(&mut *self.threads());
        for thread in threads {
            let _ = thread.join();
        }
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.shared.order(Order::Leave);
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, (Order, usize)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first order counts.
    fn order(&self, order: Order) {
        let mut state = self.state();
        if state.0 == Order::StandBy {
            state.0 = order;
        }
        drop(state);
        self.changed.notify_all();
    }

    fn stand_by(&self, clique: &impl End) {
        let waited = self.changed.wait_while(self.state(), |state| state.0 == Order::StandBy);
        let order = waited.unwrap_or_else(PoisonError::into_inner).0;
        if order == Order::Abort {
            clique.end();
        }
        self.state().1 -= 1;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Instant;

    /// As a clique on a device that works on a collective of another: it ends when both are told to.
    struct Entangled {
        own: usize,
        told: Arc<[AtomicBool; 2]>,
        ended: AtomicBool,
    }

    impl End for Entangled {
        fn end(&self) {
            self.told[self.own].store(true, Ordering::SeqCst);
            while !self.told.iter().all(|told| told.load(Ordering::SeqCst)) {
                std::thread::sleep(Duration::from_millis(1));
            }
            self.ended.store(true, Ordering::SeqCst);
        }
    }

    fn entangled() -> [Arc<Entangled>; 2] {
        let told = Arc::new([AtomicBool::new(false), AtomicBool::new(false)]);
        [0, 1].map(|own| Arc::new(Entangled { own, told: told.clone(), ended: AtomicBool::new(false) }))
    }

    #[test]
    fn cliques_that_wait_for_each_other_end_together() {
        let both = entangled();
        let ending = Ending::prepare(both.iter().cloned()).unwrap();
        ending.abort();
        assert!(both.iter().all(|one| one.ended.load(Ordering::SeqCst)));
        // Once is enough, and who is let go then has nothing to do.
        ending.abort();
        ending.dismiss();
        assert!(both.iter().all(|one| Arc::strong_count(one) == 1));
    }

    #[test]
    fn who_is_not_needed_ends_nothing() {
        let both = entangled();
        let ending = Ending::prepare(both.iter().cloned()).unwrap();
        ending.dismiss();
        ending.abort();
        assert!(both.iter().all(|one| Arc::strong_count(one) == 1 && !one.ended.load(Ordering::SeqCst)));
    }

    #[test]
    fn what_does_not_end_is_left_alone() {
        let [one, _] = entangled();
        let ending = Ending::prepare([one.clone()]).unwrap();
        let started = Instant::now();
        ending.abort();
        assert!((PATIENCE..10 * PATIENCE).contains(&started.elapsed()), "{:?}", started.elapsed());
        assert!(!one.ended.load(Ordering::SeqCst));
        one.told.iter().for_each(|told| told.store(true, Ordering::SeqCst));
    }
}
