//! A rank that loads slowly is at work: while it makes itself ready, a thread beside it says so for as long as it gets
//! anywhere.
//!
//! Reading a large weight from a slow disk, or compiling, may take longer than other ranks wait for one that does nothing.
//! Whether a thread gets anywhere is seen from the time that it has spent on a processor: it grows with every page that a
//! disk delivers, and stands still for a thread that waits for something that never comes.

use crate::comm::Monitor;
use rustix::thread::gettid;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

/// How often is looked.
const ROUND: Duration = Duration::from_millis(100);

/// Runs `body`, whose progress is told to the other ranks.
pub(super) fn at_work<T>(monitor: &dyn Monitor, body: impl FnOnce() -> T) -> T {
    let thread = gettid().as_raw_nonzero();
    let (working, over) = channel::<()>();
    std::thread::scope(|scope| {
        let look = move || {
            let mut before = spent(thread.get());
            while over.recv_timeout(ROUND) == Err(RecvTimeoutError::Timeout) {
                let now = spent(thread.get());
                if now != before {
                    monitor.progress();
                    before = now;
                }
            }
        };
        // Without it, a slow rank may be taken for one that hangs, which is no reason not to begin.
        let _ = std::thread::Builder::new().name("tpshard-loading".into()).spawn_scoped(scope, look);
        let done = body();
        drop(working);
        done
    })
}

/// What a thread has spent on a processor, in whatever unit the system tells.
fn spent(thread: i32) -> Option<String> {
    let read = |name: &str| std::fs::read_to_string(format!("/proc/self/task/{thread}/{name}")).ok();
    if let Some(times) = read("schedstat") {
        return times.split_whitespace().next().map(str::to_owned);
    }
    let stat = read("stat")?;
    // Behind the name, which may hold anything: user and system time are the twelfth and thirteenth.
    let (_, fields) = stat.rsplit_once(')')?;
    Some(fields.split_whitespace().skip(11).take(2).collect::<Vec<_>>().join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::{CommError, Missing};
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Instant;

    #[derive(Default)]
    struct Counting(AtomicU64);

    impl Monitor for Counting {
        fn failure(&self, _: &[usize]) -> Option<CommError> {
            None
        }
        fn heartbeat(&self, _: usize) -> u64 {
            self.0.load(Ordering::SeqCst)
        }
        fn whereabouts(&self, rank: usize) -> Missing {
            Missing { rank, last: None }
        }
        fn progress(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
        fn abort(&self, _: &str) {}
        fn stall(&self) -> Duration {
            Duration::MAX
        }
    }

    #[test]
    fn work_is_told_and_waiting_is_not() {
        let monitor = Counting::default();
        let found = at_work(&monitor, || {
            let start = Instant::now();
            while start.elapsed() < 5 * ROUND {
                std::hint::spin_loop();
            }
            7
        });
        assert_eq!(found, 7);
        assert!(monitor.heartbeat(0) > 0);
        let idle = Counting::default();
        at_work(&idle, || std::thread::sleep(8 * ROUND));
        // Going to sleep and waking up may be seen once.
        assert!(idle.heartbeat(0) <= 1, "{}", idle.heartbeat(0));
    }
}
