//! Times of collectives, over threads of this process and over processes of this machine.

use super::{Effort, median};
use crate::commands::run::spawn;
use crate::failure::{Classify, Failure, Kind, Outcome};
use crate::runner::environment;
use serde_json::{Value, json};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;
use tpshard_ir::{DType, Tensor};
use tpshard_passes::cost::profile::Collective;
use tpshard_runtime::comm::{CommError, CommOptions, Communicator, Group, Monoid, Sharding, Tag, threads};
use tpshard_runtime::launch::{Agreement, Flags, Rendezvous, connect, find_place};

const SMALLEST: usize = 1 << 10;
/// Small collectives are repeated until they have carried this much, or so often.
const CARRIED: usize = 1 << 20;
const MOST_REPEATS: usize = 32;
/// Columns cut between the ranks in an all-to-all have so many rows.
const ROWS: usize = 8;

const MEASURED: [Collective; 4] =
    [Collective::AllReduce, Collective::AllGather, Collective::ReduceScatter, Collective::AllToAll];

/// Over what the ranks talk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Carrier {
    Threads,
    Processes,
}

impl Carrier {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Carrier::Threads => "threads",
            Carrier::Processes => "shm",
        }
    }
}

/// The time of one collective.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Point {
    pub(crate) carrier: Carrier,
    pub(crate) collective: Collective,
    pub(crate) ranks: usize,
    /// As `Profile::collective_time` counts.
    pub(crate) bytes: f64,
    pub(crate) seconds: f64,
}

/// Every point as it was in its fastest round.
pub(crate) fn fastest(rounds: &[Vec<Point>]) -> Vec<Point> {
    let first = rounds.first().map_or(&[][..], Vec::as_slice);
    let seconds =
        |at: usize| rounds.iter().filter_map(|r| r.get(at)).map(|p| p.seconds).fold(f64::NAN, f64::min);
    first.iter().enumerate().map(|(at, p)| Point { seconds: seconds(at), ..p.clone() }).collect()
}

/// What rank 0 saw of the collectives between threads.
pub(crate) fn between_threads(ranks: usize, effort: Effort) -> Outcome<Vec<Point>> {
    let ends = threads(ranks, &CommOptions::default()).or_fail(Kind::Resource)?;
    let measured: Vec<Result<Vec<Point>, CommError>> = std::thread::scope(|scope| {
        let handles: Vec<_> = ends
            .into_iter()
            .map(|end| scope.spawn(move || measure(&*end, Carrier::Threads, effort)))
            .collect();
        let panicked = |_| Err(CommError::Usage { what: "a rank's thread panicked".into() });
        handles.into_iter().map(|handle| handle.join().unwrap_or_else(panicked)).collect()
    });
    let mut first = Vec::new();
    for (rank, points) in measured.into_iter().enumerate() {
        let points = points.or_fail(Kind::Rank)?;
        if rank == 0 {
            first = points;
        }
    }
    Ok(first)
}

/// What rank 0 saw of the collectives between processes, which are this executable again.
pub(crate) fn between_processes(ranks: usize, quick: bool, effort: Effort) -> Outcome<Vec<Point>> {
    let file = Scratch::new()?;
    let executable = std::env::current_exe().or_fail(Kind::Resource)?;
    let command = |_| {
        let mut command = Command::new(&executable);
        command.arg("calibrate").arg("--worker").arg(&file.path);
        if quick {
            command.arg("--quick");
        }
        command
    };
    spawn((0..ranks).map(command).collect())?;
    let text = std::fs::read_to_string(&file.path).or_fail(Kind::Resource)?;
    let seconds: Option<Vec<f64>> = serde_json::from_str::<Value>(&text)
        .ok()
        .and_then(|v| v.as_array()?.iter().map(Value::as_f64).collect());
    let seconds = seconds.filter(|s| s.len() == cases(ranks, effort).count());
    let seconds = seconds.ok_or_else(|| {
        Failure::new(Kind::Internal, format!("{}: not what a rank measured", file.path.display()))
    })?;
    let point = |((collective, case), seconds): ((Collective, Case), f64)| Point {
        carrier: Carrier::Processes,
        collective,
        ranks,
        bytes: case.bytes(),
        seconds,
    };
    Ok(cases(ranks, effort).zip(seconds).map(point).collect())
}

/// One of the processes that [`between_processes`] starts. Rank 0 writes what it saw.
pub(crate) fn work(file: &Path, effort: Effort) -> Outcome<()> {
    let environment = environment();
    let flags = Flags { rank: None, world_size: None };
    let place = find_place(&flags, &environment, None).or_fail(Kind::Usage)?;
    let place = place.ok_or_else(|| {
        Failure::new(Kind::Usage, "--worker is for the ranks that `tpshard calibrate` starts itself")
    })?;
    let agreement = Agreement {
        tool_version: env!("CARGO_PKG_VERSION").into(),
        program_hash: "calibrate".into(),
        weights_hash: String::new(),
        device: "cpu".into(),
        precision: String::new(),
    };
    let meeting = Rendezvous::of_place(&place, &environment, CommOptions::default()).or_fail(Kind::Rank)?;
    let communicator = connect(&meeting, &agreement).or_fail(Kind::Rank)?;
    let points = measure(&*communicator, Carrier::Processes, effort).or_fail(Kind::Rank)?;
    if place.rank == 0 {
        let seconds: Vec<f64> = points.iter().map(|p| p.seconds).collect();
        let open = std::fs::OpenOptions::new().write(true).truncate(true).open(file);
        let written = open.and_then(|mut f: File| f.write_all(json!(seconds).to_string().as_bytes()));
        written.map_err(|e| Failure::new(Kind::Resource, format!("{}: {e}", file.display())))?;
    }
    Ok(())
}

/// A file of this process that goes with it.
struct Scratch {
    path: PathBuf,
}

impl Scratch {
    fn new() -> Outcome<Scratch> {
        let name = format!("tpshard-calibrate-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        // Nobody else's file is taken, nor a link followed.
        let made = File::create_new(&path);
        made.map_err(|e| Failure::new(Kind::Resource, format!("{}: {e}", path.display())))?;
        Ok(Scratch { path })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A tensor to carry: `elements` f32 in [`ROWS`] rows.
#[derive(Clone, Copy)]
struct Case {
    elements: usize,
}

impl Case {
    fn bytes(self) -> f64 {
        (self.elements * 4) as f64
    }
}

fn cases(ranks: usize, effort: Effort) -> impl Iterator<Item = (Collective, Case)> {
    let sizes = std::iter::successors(Some(SMALLEST), move |size| Some(size * effort.growth));
    let sizes = sizes.take_while(move |&size| size <= effort.largest);
    // Whole columns for every rank.
    let case = move |size: usize| Case { elements: (size / 4).next_multiple_of(ROWS * ranks) };
    let sizes: Vec<Case> = sizes.map(case).collect();
    MEASURED.into_iter().flat_map(move |collective| {
        let sizes = sizes.clone();
        sizes.into_iter().map(move |case| (collective, case))
    })
}

/// The median time of every case, as this rank sees it.
fn measure(
    communicator: &dyn Communicator,
    carrier: Carrier,
    effort: Effort,
) -> Result<Vec<Point>, CommError> {
    let ranks = communicator.world_size();
    let group = Group::world(ranks);
    let mut sequence = 0;
    let mut next = || {
        sequence += 1;
        Tag { sequence, node: 0 }
    };
    let mut points = Vec::new();
    for (collective, case) in cases(ranks, effort) {
        let mut tensor = Operand::new(collective, ranks, case)?;
        let repeats = (CARRIED / (4 * case.elements)).clamp(1, MOST_REPEATS);
        let mut samples = Vec::with_capacity(effort.samples);
        // The first sample only warms up.
        for sample in 0..=effort.samples {
            communicator.barrier(&group, next())?;
            let start = Instant::now();
            for _ in 0..repeats {
                tensor.carry(communicator, &group, next())?;
            }
            if sample > 0 {
                samples.push(start.elapsed().as_secs_f64() / repeats as f64);
            }
        }
        points.push(Point { carrier, collective, ranks, bytes: case.bytes(), seconds: median(samples) });
    }
    Ok(points)
}

/// A rank's tensor, ready to be carried again and again.
struct Operand {
    collective: Collective,
    tensor: Tensor,
    /// Of the dim that is sharded, or sharded afterwards.
    extents: Vec<usize>,
    rows: Vec<usize>,
}

impl Operand {
    fn new(collective: Collective, ranks: usize, case: Case) -> Result<Operand, CommError> {
        let columns = case.elements / ROWS;
        let shape = match collective {
            Collective::AllGather => vec![ROWS, columns / ranks],
            _ => vec![ROWS, columns],
        };
        // Zeros stay zeros however often they are summed.
        let tensor =
            Tensor::zeros(DType::F32, shape).map_err(|e| CommError::Usage { what: e.to_string() })?;
        Ok(Operand { collective, tensor, extents: vec![columns / ranks; ranks], rows: vec![ROWS; ranks] })
    }

    fn carry(&mut self, communicator: &dyn Communicator, group: &Group, tag: Tag) -> Result<(), CommError> {
        let (tensor, extents) = (&mut self.tensor, &self.extents);
        match self.collective {
            Collective::AllReduce => communicator.all_reduce(group, tag, Monoid::Sum, tensor),
            Collective::AllGather => communicator.all_gather(group, tag, 1, extents, tensor).map(drop),
            Collective::ReduceScatter => {
                communicator.reduce_scatter(group, tag, Monoid::Sum, 1, extents, tensor).map(drop)
            }
            Collective::AllToAll => {
                let (split, concat) =
                    (Sharding { dim: 1, extents }, Sharding { dim: 0, extents: &self.rows });
                communicator.all_to_all(group, tag, split, concat, tensor).map(drop)
            }
            Collective::Transfer => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_collective_is_timed_at_every_size() {
        let effort = Effort { samples: 3, growth: 8, largest: 8 << 10 };
        for ranks in [2, 3] {
            let points = between_threads(ranks, effort).unwrap();
            assert_eq!(points.len(), 2 * MEASURED.len());
            for point in points {
                assert!(point.seconds > 0.0 && point.seconds < 1.0, "{point:?}");
                assert!(point.bytes >= 1024.0 && point.bytes < 10_000.0, "{point:?}");
            }
        }
    }
}
