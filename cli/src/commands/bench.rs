//! `tpshard bench`: how long a sharded model takes on this machine, and where the time goes.
//!
//! The ranks are the processes that `run` would start. Rank 0 measures whole runs, each rank its own steps.

pub(crate) mod lead;
mod summary;
mod trace;

use super::run::{add_flags, spawn};
use crate::arguments::BenchArguments;
use crate::decoder::Decoder;
use crate::failure::{Classify, Failure, Kind, Outcome};
use crate::folder::Folder;
use crate::job::{Job, JobKind, Results};
use crate::output;
use crate::rank_program::RankFile;
use lead::{RankLog, log_file};
use std::path::Path;
use summary::Summary;
use tpshard_runtime::session::DeviceChoice;

pub(crate) fn bench(arguments: &BenchArguments, json: bool) -> Outcome<()> {
    if arguments.tensors.outputs.is_some() {
        let message = "bench keeps no outputs\nhelp: leave --outputs away, or use `run`";
        return Err(Failure::new(Kind::Usage, message));
    }
    let folder = Folder::open(&arguments.folder)?;
    let results = Results::new()?;
    let state = match arguments.decode {
        None => None,
        Some(decode) => {
            let (sequences, tokens) = prompts(&folder, arguments)?;
            Some((sequences, tokens.saturating_add(decode)))
        }
    };
    let decode = arguments.decode.unwrap_or(0);
    let steps = times_steps(&folder, arguments)?;
    let kind = JobKind::Bench { warm_up: arguments.warm_up, samples: arguments.samples, decode, steps };
    let job = Job { kind, state, results: results.0.clone() };
    spawn(job.commands(&folder, |command| add_flags(command, &arguments.tensors, false))?)?;
    let logs = (0..folder.ranks).map(|rank| read(&results.0, rank)).collect::<Outcome<Vec<RankLog>>>()?;
    let measured = logs.iter().find_map(|log| log.measured.as_ref());
    let measured = measured.ok_or_else(|| Failure::new(Kind::Rank, "rank 0 measured nothing"))?;
    if let Some(path) = &arguments.trace {
        trace::write(path, &logs, measured.start)?;
    }
    let summary = Summary::of(&logs, measured, decode, arguments.tensors.ranks.threads);
    if json {
        return output::line(summary.to_json(arguments.by_op));
    }
    output::text(summary.to_text(arguments.by_op))
}

/// Whether ranks time every step. On a GPU only if somebody asks: the host then waits for the device after each of them,
/// which is no measure of the whole.
fn times_steps(folder: &Folder, arguments: &BenchArguments) -> Outcome<bool> {
    let asked = arguments.by_op || arguments.trace.is_some();
    if asked || arguments.tensors.ranks.on.device.choice() == DeviceChoice::Cpu {
        return Ok(true);
    }
    Ok(RankFile::read(&folder.executable(0))?.program.device.is_none())
}

/// The number of prompts in the inputs, and of the tokens in each.
fn prompts(folder: &Folder, arguments: &BenchArguments) -> Outcome<(usize, usize)> {
    let file = RankFile::read(&folder.executable(0))?;
    let decoder = Decoder::new(&file.program)?;
    let inputs = crate::runner::read_inputs(&folder.path, &file, &arguments.tensors)?;
    let rows = decoder.tokens_of(&inputs.into_iter().collect())?;
    Ok((rows.len(), rows.first().map_or(0, Vec::len)))
}

fn read(folder: &Path, rank: usize) -> Outcome<RankLog> {
    let path = log_file(folder, rank);
    let text = std::fs::read(&path)
        .map_err(|e| Failure::new(Kind::Rank, format!("rank {rank} left no measurements: {e}")))?;
    serde_json::from_slice(&text).or_fail(Kind::Internal)
}
