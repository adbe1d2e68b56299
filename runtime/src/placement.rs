//! Which cores the threads of a rank run on.
//!
//! Left to the operating system, threads wander, and with them goes what their cores' caches held. A rank can have cores of
//! its own instead: the ranks of a machine, in order, take as many each as they have threads, of those that the process may
//! use; no two threads share a physical core as long as there are enough. That is wrong where something else is busy on
//! the machine, or two jobs do the same, so it is only done if asked for.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// A logical processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Processor {
    /// Package and core in it, as the kernel numbers them.
    core: (usize, usize),
    number: usize,
}

/// The processors for the threads of rank `local_rank` of the `local_ranks` on this machine.
///
/// # Errors
/// There are fewer processors than threads; why.
pub(crate) fn processors(
    local_rank: usize,
    local_ranks: usize,
    threads: usize,
) -> Result<Vec<usize>, String> {
    let allowed = sched_getaffinity(None).map_err(|error| format!("asking for the processors: {error}"))?;
    let there = (0..CpuSet::MAX_CPU).filter(|&number| allowed.is_set(number)).map(found).collect();
    share(there, local_rank, local_ranks, threads)
}

/// Has the calling thread run on this processor from now on. Nothing depends on it, so a refusal is none.
pub(crate) fn stay_on(processor: usize) {
    let mut only = CpuSet::new();
    only.set(processor);
    let _ = sched_setaffinity(None, &only);
}

/// Where the kernel does not say, every processor is a core.
fn found(number: usize) -> Processor {
    let read = |what: &str| {
        let file = format!("/sys/devices/system/cpu/cpu{number}/topology/{what}");
        std::fs::read_to_string(file).ok()?.trim().parse::<usize>().ok()
    };
    let core = read("physical_package_id").zip(read("core_id")).unwrap_or((0, number));
    Processor { core, number }
}

fn share(
    mut all: Vec<Processor>,
    local_rank: usize,
    local_ranks: usize,
    threads: usize,
) -> Result<Vec<usize>, String> {
    let wanted = local_ranks.saturating_mul(threads);
    if wanted > all.len() || local_rank >= local_ranks {
        return Err(format!(
            "{local_ranks} ranks of {threads} threads want {wanted} processors of their own, and there are {}\n  help: fewer --threads, or without --own-processors",
            all.len()
        ));
    }
    all.sort();
    // The first processor of every core before any second one.
    let mut seen = std::collections::BTreeMap::new();
    all.sort_by_cached_key(|processor| {
        let times: &mut usize = seen.entry(processor.core).or_default();
        *times += 1;
        (*times, *processor)
    });
    Ok(all[local_rank * threads..][..threads].iter().map(|processor| processor.number).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_have_cores_of_their_own_while_there_are_enough() {
        // Two packages of two cores of two processors each, numbered as the kernel does.
        let all = || -> Vec<Processor> {
            (0..8).map(|number| Processor { core: (number / 2 % 2, number % 2), number }).collect()
        };
        assert_eq!(share(all(), 0, 2, 2), Ok(vec![0, 1]));
        assert_eq!(share(all(), 1, 2, 2), Ok(vec![2, 3]));
        assert_eq!(share(all(), 1, 2, 4), Ok(vec![4, 5, 6, 7]));
        assert_eq!(share(all(), 3, 4, 1), Ok(vec![3]));
        assert!(
            share(all(), 0, 3, 3).unwrap_err().contains("want 9 processors of their own, and there are 8\n")
        );
        assert!(share(Vec::new(), 0, 1, 1).is_err());
    }

    #[test]
    fn threads_stay_where_they_are_put() {
        let mine = processors(0, 1, 1).unwrap()[0];
        std::thread::spawn(move || {
            stay_on(mine);
            let now = sched_getaffinity(None).unwrap();
            assert_eq!((0..CpuSet::MAX_CPU).filter(|&n| now.is_set(n)).collect::<Vec<_>>(), [mine]);
        })
        .join()
        .unwrap();
    }
}
