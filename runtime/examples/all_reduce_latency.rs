//! Measures all-reduce over shared memory: `all_reduce_latency [ranks] [bytes…]` starts its ranks and prints per size
//! the median of single rounds and the best mean of 50 rounds in a row (what a quiet machine does), as rank 0 sees them.

use std::collections::BTreeMap;
use std::error::Error;
use std::process::Command;
use std::time::{Duration, Instant};
use tpshard_ir::Tensor;
use tpshard_runtime::comm::{CommOptions, Group, Monoid, Tag};
use tpshard_runtime::launch::{Agreement, Flags, Rendezvous, connect, find_place, spawn_ranks};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<usize> = std::env::args().skip(1).map(|a| a.parse()).collect::<Result<_, _>>()?;
    let env: BTreeMap<String, String> = std::env::vars().collect();
    let (ranks, sizes) = arguments.split_first().map_or((2, &[][..]), |(ranks, sizes)| (*ranks, sizes));
    let sizes = if sizes.is_empty() { &[64, 4 << 10, 64 << 10, 1 << 20, 32 << 20][..] } else { sizes };
    let Some(place) = find_place(&Flags::default(), &env, None)? else {
        let program = std::env::current_exe()?;
        let command = |_| {
            let mut command = Command::new(&program);
            command.args(std::env::args().skip(1));
            command
        };
        return Ok(spawn_ranks((0..ranks).map(command).collect())?);
    };
    let meeting = Rendezvous::of_place(&place, &env, CommOptions::default())?;
    let same = || "same".to_owned();
    let agreement = Agreement {
        tool_version: same(),
        program_hash: same(),
        weights_hash: same(),
        device: same(),
        precision: same(),
    };
    let comm = connect(&meeting, &agreement)?;
    let group = Group::world(place.world_size);
    let mut sequence = 0;
    for &bytes in sizes {
        let mut data = Tensor::from_vec(vec![bytes / 4], vec![1f32; bytes / 4])?;
        let rounds = ((64 << 20) / bytes.max(1)).clamp(20, 5000);
        let mut times = Vec::with_capacity(rounds);
        for _ in 0..rounds {
            sequence += 1;
            let start = Instant::now();
            comm.all_reduce(&group, Tag { sequence, node: 0 }, Monoid::Max, &mut data)?;
            times.push(start.elapsed());
        }
        let mean = |batch: &[Duration]| batch.iter().sum::<Duration>() / batch.len() as u32;
        let best = times.chunks_exact(rounds.min(50)).map(mean).min().unwrap_or_default();
        times.sort();
        if place.rank == 0 {
            let median = times[rounds / 2];
            println!("{ranks} ranks {bytes:>9} B: median {median:>9.1?}, best mean {best:>9.1?}");
        }
    }
    Ok(())
}
