//! Collectives between threads: every check of `support` for 1 to 5 ranks, and the ways to fail.

mod support;

use std::time::{Duration, Instant};
use tpshard_ir::Tensor;
use tpshard_runtime::comm::{
    CommError, CommOptions, Communicator, Group, Kind, Monoid, Sharding, Tag, solo, threads,
};

fn run<R: Send>(
    world: usize,
    options: &CommOptions,
    body: impl Fn(Box<dyn Communicator>) -> R + Sync,
) -> Vec<R> {
    let ends = threads(world, options).unwrap();
    std::thread::scope(|scope| {
        let body = &body;
        let handles: Vec<_> = ends.into_iter().map(|end| scope.spawn(move || body(end))).collect();
        handles.into_iter().map(|h| h.join().unwrap()).collect()
    })
}

fn tag(sequence: u64) -> Tag {
    Tag { sequence, node: 7 }
}

fn impatient() -> CommOptions {
    CommOptions { stall: Duration::from_millis(300), ..CommOptions::default() }
}

#[test]
fn collectives_match_the_computation_on_whole_tensors() {
    for world in 1..=5 {
        // Slots of a few hundred bytes, so that nearly every tensor goes in pieces.
        let options = CommOptions { slot_bytes: 64 * 5, ..CommOptions::default() };
        run(world, &options, |comm| support::check_all(&*comm, 700));
    }
}

#[test]
fn sums_are_in_rank_order_for_every_algorithm_and_chunking() {
    for slot_bytes in [1 << 10, 1 << 20] {
        for world in [2, 3, 5] {
            let options = CommOptions { slot_bytes, ..CommOptions::default() };
            run(world, &options, |comm| support::check_order(&*comm));
        }
    }
}

#[test]
fn solo_copies() {
    support::check_all(&*solo(), 100);
}

#[test]
fn eight_ranks_on_few_cores_get_on() {
    run(8, &CommOptions::default(), |comm| {
        let group = Group::world(8);
        for sequence in 0..500 {
            let mut data = Tensor::from_vec(vec![4], vec![1f32; 4]).unwrap();
            comm.all_reduce(&group, tag(sequence), Monoid::Sum, &mut data).unwrap();
            assert_eq!(data.as_slice::<f32>().unwrap(), [8.0; 4]);
        }
    });
}

#[test]
fn a_different_collective_is_named_on_both_sides() {
    let errors = run(2, &impatient(), |comm| {
        let group = Group::world(2);
        let mut data = Tensor::from_vec(vec![2], vec![1f32; 2]).unwrap();
        if comm.rank() == 0 {
            comm.all_reduce(&group, tag(3), Monoid::Sum, &mut data).unwrap_err()
        } else {
            comm.all_gather(&group, tag(3), 0, &[2, 2], &data).unwrap_err()
        }
    });
    for error in &errors {
        assert!(matches!(error, CommError::Mismatch { .. } | CommError::Poisoned { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("all_reduce(sum)") && text.contains("all_gather"), "{text}");
    }
}

#[test]
fn any_difference_in_the_arguments_is_a_mismatch() {
    type Attempt = fn(&dyn Communicator, bool) -> Result<(), CommError>;
    fn f32s(count: usize) -> Tensor {
        Tensor::from_vec(vec![count], vec![1f32; count]).unwrap()
    }
    let attempts: [(&str, Attempt); 7] = [
        ("monoid", |comm, odd| {
            let monoid = if odd { Monoid::Max } else { Monoid::Sum };
            comm.all_reduce(&Group::world(2), tag(1), monoid, &mut f32s(2))
        }),
        ("dtype", |comm, odd| {
            let mut data = if odd { Tensor::from_vec(vec![2], vec![1i32; 2]).unwrap() } else { f32s(2) };
            comm.all_reduce(&Group::world(2), tag(1), Monoid::Sum, &mut data)
        }),
        ("size", |comm, odd| {
            comm.all_reduce(&Group::world(2), tag(1), Monoid::Sum, &mut f32s(if odd { 3 } else { 2 }))
        }),
        ("node", |comm, odd| comm.barrier(&Group::world(2), Tag { sequence: 1, node: u32::from(odd) })),
        ("sequence", |comm, odd| comm.barrier(&Group::world(2), tag(u64::from(odd)))),
        ("extents", |comm, odd| {
            let extents = if odd { [1, 2] } else { [2, 1] };
            comm.all_gather(&Group::world(2), tag(1), 0, &extents, &f32s(2)).map(drop)
        }),
        ("group order", |comm, odd| {
            let group = Group::new(if odd { vec![1, 0] } else { vec![0, 1] })?;
            comm.barrier(&group, tag(1))
        }),
    ];
    for (what, attempt) in attempts {
        let results = run(2, &impatient(), |comm| attempt(&*comm, comm.rank() == 1));
        for result in results {
            let error = result.expect_err(what);
            let text = error.to_string();
            assert!(text.contains("ranks disagree"), "{what}: {text}");
        }
    }
}

#[test]
fn wrong_arguments_are_refused_and_end_the_run() {
    let group = Group::world(1);
    let data = Tensor::from_vec(vec![2, 3], vec![0f32; 6]).unwrap();
    let refused = |attempt: &dyn Fn(&dyn Communicator) -> Result<Tensor, CommError>, text: &str| {
        let comm = solo();
        let error = attempt(&*comm).unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
        assert!(comm.barrier(&Group::world(1), tag(2)).is_err(), "a failed communicator stays failed");
    };
    refused(&|c| c.all_gather(&group, tag(0), 2, &[1], &data), "dim 2 does not exist");
    refused(&|c| c.all_gather(&group, tag(0), 1, &[1], &data), "should be 1");
    refused(&|c| c.all_gather(&group, tag(0), 1, &[3, 0], &data), "2 extents for a group of 1");
    refused(&|c| c.reduce_scatter(&group, tag(0), Monoid::Sum, 1, &[9], &data), "should be 9");
    let same = Sharding { dim: 0, extents: &[2] };
    refused(&|c| c.all_to_all(&group, tag(0), same, same, &data), "to itself");
    let outside = Group::new(vec![0, 4]).unwrap();
    refused(&|c| c.all_gather(&outside, tag(0), 0, &[2, 2], &data), "leaves the world");
    refused(&|c| c.broadcast_bytes(&group, tag(0), 1, &[]).map(|_| data.clone()), "not in group");
    refused(&|c| c.scatter_bytes(&group, tag(0), 0, None).map(|_| data.clone()), "one blob for each");
    let packed = Tensor::zeros(tpshard_ir::DType::U4, vec![4]).unwrap();
    refused(
        &|c| c.all_reduce(&group, tag(0), Monoid::Sum, &mut packed.clone()).map(|()| data.clone()),
        "storage",
    );
    assert!(Group::new(vec![1, 1]).is_err() && Group::new(vec![]).is_err());
    assert!(threads(0, &CommOptions::default()).is_err());
    assert!(threads(4, &CommOptions { slot_bytes: 100, ..CommOptions::default() }).is_err());
}

#[test]
fn a_stall_names_rank_collective_and_node() {
    let errors = run(3, &impatient(), |comm| {
        let group = Group::world(3);
        comm.barrier(&group, tag(1)).unwrap();
        if comm.rank() == 2 {
            std::thread::sleep(Duration::from_millis(700));
        }
        comm.barrier(&group, Tag { sequence: 2, node: 42 }).unwrap_err().to_string()
    });
    for text in &errors[..2] {
        assert!(text.contains("no progress for 0.3 s in barrier (step 2, node 42)"), "{text}");
        assert!(text.contains("waiting for rank 2 (last in barrier, step 1, node 7)"), "{text}");
    }
    assert!(errors[2].contains("gave up"), "{}", errors[2]);
}

#[test]
fn progress_is_not_a_stall() {
    run(2, &impatient(), |comm| {
        if comm.rank() == 1 {
            for _ in 0..10 {
                std::thread::sleep(Duration::from_millis(80));
                comm.progress();
            }
        }
        comm.barrier(&Group::world(2), tag(1)).unwrap();
    });
}

#[test]
fn a_rank_that_leaves_panics_or_aborts_ends_the_others_at_once() {
    let start = Instant::now();
    let errors = run(3, &CommOptions::default(), |comm| {
        (comm.rank() != 1).then(|| comm.barrier(&Group::world(3), tag(1)).unwrap_err())
    });
    assert!(errors.iter().flatten().all(|e| matches!(e, CommError::PeerDied { rank: 1 })), "{errors:?}");

    let mut ends = threads(2, &CommOptions::default()).unwrap();
    let (other, mine) = (ends.pop().unwrap(), ends.pop().unwrap());
    std::thread::spawn(move || {
        let _held = other;
        panic!("expected by the test");
    });
    let error = mine.barrier(&Group::world(2), tag(1)).unwrap_err();
    assert!(matches!(error, CommError::PeerDied { rank: 1 }), "{error}");

    let errors = run(2, &CommOptions::default(), |comm| {
        if comm.rank() == 1 {
            comm.abort("out of memory in node 9");
        }
        comm.barrier(&Group::world(2), tag(1)).unwrap_err().to_string()
    });
    assert!(errors.iter().all(|e| e == "rank 1 gave up: out of memory in node 9"), "{errors:?}");
    assert!(start.elapsed() < Duration::from_secs(1));
}

#[test]
fn leaving_after_the_last_collective_hurts_nobody() {
    for _ in 0..50 {
        run(3, &CommOptions::default(), |comm| {
            for sequence in 0..3 {
                comm.gather_bytes(&Group::world(3), tag(sequence), 0, b"result").unwrap();
            }
        });
    }
}

#[test]
fn bytes_are_counted_as_payload_per_rank() {
    let stats = run(2, &CommOptions::default(), |comm| {
        let group = Group::world(2);
        let mut data = Tensor::from_vec(vec![6], vec![1f32; 6]).unwrap();
        comm.all_reduce(&group, tag(1), Monoid::Sum, &mut data).unwrap();
        let own = comm.reduce_scatter(&group, tag(2), Monoid::Sum, 0, &[4, 2], &data).unwrap();
        comm.all_gather(&group, tag(3), 0, &[4, 2], &own).unwrap();
        (comm.stats(), comm.history())
    });
    let bytes = |rank: usize, kind| stats[rank].0.of(kind).bytes;
    assert_eq!([bytes(0, Kind::AllReduce), bytes(1, Kind::AllReduce)], [24, 24]);
    assert_eq!([bytes(0, Kind::ReduceScatter), bytes(1, Kind::ReduceScatter)], [8, 16]);
    assert_eq!([bytes(0, Kind::AllGather), bytes(1, Kind::AllGather)], [8, 16]);
    assert_eq!(stats[0].0.total().collectives, 3);
    let history = &stats[1].1;
    let line = "rank 1 step 2 node 7 reduce_scatter(sum) f32 16 bytes, 2 ranks, done";
    assert_eq!(history.to_string().lines().nth(1), Some(line));
    assert_eq!(history.to_json()["collectives"][0]["monoid"], "sum");
}

#[test]
fn the_history_keeps_the_last_64() {
    let histories = run(2, &CommOptions::default(), |comm| {
        (0..100).for_each(|s| comm.barrier(&Group::world(2), tag(s)).unwrap());
        comm.history()
    });
    assert_eq!(histories[0].records.len(), 64);
    assert_eq!(histories[0].records[0].tag.sequence, 36);
}
