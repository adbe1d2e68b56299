//! The threads of a rank.
//!
//! Kernels share their work out hundreds of times a step, some microseconds at a time. To wake a thread takes as long as
//! such a kernel, so the threads look out for the next job for a while before they sleep, and nobody waits for one that
//! overslept: the thread that has a job begins at once, and those that come in time help.

mod job;

use job::Shared;
use std::cell::RefCell;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// A thread that calls on others, and those; all end with this.
pub(crate) struct Team {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
}

thread_local! {
    /// Who helps this thread.
    static CURRENT: RefCell<Option<Arc<Shared>>> = const { RefCell::new(None) };
}

impl Team {
    /// `threads` counts the one that calls. The others look out for a job for so long before they sleep, and begin with
    /// `start`, which is given their number, from 1 on.
    ///
    /// # Errors
    /// The system starts no more threads.
    pub(crate) fn new(
        threads: usize,
        lookout: Duration,
        start: impl Fn(usize) + Clone + Send + 'static,
    ) -> std::io::Result<Team> {
        let shared = Arc::new(Shared::new(threads, lookout));
        let mut team = Team { shared, helpers: Vec::new() };
        for number in 1..threads {
            let (shared, start) = (team.shared.clone(), start.clone());
            let helper = move || {
                start(number);
                shared.help();
            };
            let name = format!("tpshard-{number}");
            team.helpers.push(std::thread::Builder::new().name(name).spawn(helper)?);
        }
        Ok(team)
    }

    /// Has the team share out what `work` gives to [`for_each`].
    pub(crate) fn install<R>(&self, work: impl FnOnce() -> R) -> R {
        /// Puts back who was there before, even if `work` panics.
        struct Before(Option<Arc<Shared>>);
        impl Drop for Before {
            fn drop(&mut self) {
                let before = self.0.take();
                CURRENT.with(|current| *current.borrow_mut() = before);
            }
        }
        let _before = Before(CURRENT.with(|current| current.borrow_mut().replace(self.shared.clone())));
        work()
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.end();
        for helper in self.helpers.drain(..) {
            let _ = helper.join();
        }
    }
}

/// The threads that share out what this one gives to [`for_each`].
pub(crate) fn threads() -> usize {
    CURRENT.with(|current| current.borrow().as_ref().map_or(1, |shared| shared.threads()))
}

/// Calls `work` with every item, on all threads of the team; in turn where there is none, or only one item.
pub(crate) fn for_each<I>(items: I, work: impl Fn(I::Item) + Sync)
where
    I: Iterator + Send,
    I::Item: Send,
{
    let done: Result<(), NoError> = try_for_each_init(
        items,
        || (),
        |(), item| {
            work(item);
            Ok(())
        },
    );
    match done {
        Ok(()) => {}
        Err(never) => match never {},
    }
}

enum NoError {}

/// As [`for_each`], with something of its own for every thread; ends early if an item fails.
///
/// # Errors
/// Of the items that were tried, the first that failed.
pub(crate) fn try_for_each_init<I, S, E>(
    items: I,
    init: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, I::Item) -> Result<(), E> + Sync,
) -> Result<(), E>
where
    I: Iterator + Send,
    I::Item: Send,
    E: Send,
{
    let one = items.size_hint().1.is_some_and(|most| most <= 1);
    let shared = if one { None } else { CURRENT.with(|current| current.borrow().clone()) };
    let mut items = items.enumerate();
    let Some(shared) = shared.filter(|shared| shared.threads() > 1) else {
        let mut own = init();
        return items.try_for_each(|(_, item)| work(&mut own, item));
    };
    let items = Mutex::new(items);
    let failed: Mutex<Option<(usize, E)>> = Mutex::new(None);
    shared.run(&|| {
        let mut own: Option<S> = None;
        loop {
            let next = locked(&items).next();
            let Some((number, item)) = next else { return };
            if let Err(error) = work(own.get_or_insert_with(&init), item) {
                let mut failed = locked(&failed);
                if failed.as_ref().is_none_or(|(before, _)| number < *before) {
                    *failed = Some((number, error));
                }
                // Nothing is left to do.
                locked(&items).by_ref().for_each(drop);
            }
        }
    });
    let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    failed.map_or(Ok(()), |(_, error)| Err(error))
}

/// A lock that a panicking thread held is as good as any: the panic goes on once all threads have ended.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread::ThreadId;

    fn team(threads: usize, lookout: Duration) -> Team {
        Team::new(threads, lookout, |_| ()).unwrap()
    }

    fn add(total: &AtomicUsize, more: usize) {
        total.fetch_add(more, Ordering::Relaxed);
    }

    #[test]
    fn every_item_is_done_once_whoever_does_it() {
        for threads in [1, 2, 5] {
            for lookout in [Duration::ZERO, Duration::from_micros(200)] {
                let team = team(threads, lookout);
                for count in [0, 1, 2, 7, 1000] {
                    let mut all = vec![0usize; count];
                    team.install(|| {
                        assert_eq!(super::threads(), threads);
                        for_each(all.iter_mut().enumerate(), |(i, to)| *to += i + 1);
                    });
                    assert!(all.iter().enumerate().all(|(i, &x)| x == i + 1), "{threads} threads, {count}");
                }
            }
        }
        assert_eq!(super::threads(), 1);
    }

    #[test]
    fn many_short_jobs_follow_one_another() {
        let team = team(3, Duration::from_micros(50));
        let total = AtomicUsize::new(0);
        team.install(|| {
            for job in 0..20_000 {
                for_each(0..4, |i| add(&total, i + 1));
                if job % 1000 == 0 {
                    // The helpers fall asleep.
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        });
        assert_eq!(total.into_inner(), 200_000);
    }

    #[test]
    fn helpers_help() {
        let team = team(2, Duration::ZERO);
        let seen: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
        let name = |id: ThreadId| format!("{id:?}");
        let start = std::time::Instant::now();
        team.install(|| {
            while locked(&seen).len() < 2 {
                assert!(start.elapsed() < Duration::from_secs(60), "nobody helped");
                for_each(0..2, |_| {
                    locked(&seen).insert(name(std::thread::current().id()));
                    std::thread::sleep(Duration::from_millis(5));
                });
            }
        });
        // What a helper calls for it does itself.
        team.install(|| {
            for_each(0..8, |_| {
                let inner = AtomicUsize::new(0);
                for_each(0..8, |i| add(&inner, i));
                assert_eq!(inner.into_inner(), 28);
            });
        });
    }

    #[test]
    fn the_first_error_of_those_tried_is_told_and_others_are_spared() {
        let team = team(3, Duration::from_micros(50));
        let tried = AtomicUsize::new(0);
        let result = team.install(|| {
            try_for_each_init(
                0..1_000_000usize,
                || (),
                |(), i| {
                    tried.fetch_add(1, Ordering::Relaxed);
                    if i >= 5 { Err(i) } else { Ok(()) }
                },
            )
        });
        assert_eq!(result, Err(5));
        assert!(tried.into_inner() < 100);
    }

    #[test]
    fn a_panic_of_any_thread_is_the_callers_and_the_team_goes_on() {
        let team = team(3, Duration::from_micros(50));
        for _ in 0..20 {
            let work = || for_each(0..16, |i| assert!(i != 9, "nine"));
            let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| team.install(work)));
            assert!(caught.is_err());
            assert_eq!(super::threads(), 1);
        }
        let count = AtomicUsize::new(0);
        team.install(|| for_each(0..16, |_| add(&count, 1)));
        assert_eq!(count.into_inner(), 16);
    }
}
