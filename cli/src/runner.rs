//! What a rank's executable does: the same binary, with a program in its section.
//!
//! Standard output belongs to results; everything said to people goes to standard error.

use crate::arguments::{RunnerArguments, TensorArguments, parsed};
use crate::commands::run::{add_flags, kind_of, spawn};
use crate::failure::{Classify, Failure, Kind, Outcome};
use crate::folder::Folder;
use crate::job::Job;
use crate::output;
use crate::rank_program::{RankFile, open_weights};
use crate::tensors;
use clap::Parser;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;
use tpshard_codegen::build::PART_LAUNCHER;
use tpshard_frontend::deferred::OnnxEvaluator;
use tpshard_ir::container;
use tpshard_ir::deferred::SharedEvaluator;
use tpshard_runtime::comm::{CommOptions, CommStats, History, Kind as Collective};
use tpshard_runtime::io::{IoError, NamedTensors, write_npz};
use tpshard_runtime::launch::{Agreement, Flags, LaunchError, Place, Rendezvous, connect, find_place};
use tpshard_runtime::session::{Session, SessionError, SessionOptions};

/// Collectives that are told of before the one that failed, and at most behind it.
const LAST_COLLECTIVES: usize = 8;

/// Runs the executable's own payload; `executable` says where it lies.
pub(crate) fn main(payload: &[u8], executable: &Path, words: Vec<OsString>) -> Outcome<()> {
    let Some(arguments) = parsed(RunnerArguments::try_parse_from(words))? else { return Ok(()) };
    let folder = executable.parent().map(Path::to_path_buf).unwrap_or_default();
    let parts = container::decode(payload).or_fail(Kind::Mismatch)?;
    if let Some(ranks) = parts.part(PART_LAUNCHER) {
        let ranks = std::str::from_utf8(ranks).ok().and_then(|t| t.parse::<usize>().ok());
        let ranks =
            ranks.ok_or_else(|| Failure::new(Kind::Mismatch, "the launcher does not know its ranks"))?;
        return launch(&folder, ranks, &arguments);
    }
    let file = RankFile::decode(payload)?;
    let place = match place(&arguments, file.ranks())? {
        Some(place) => place,
        None => alone(&file)?,
    };
    let job = arguments.job.as_deref().map(Job::read).transpose()?;
    run_rank(&folder, file, &place, &arguments.tensors, arguments.json, job.as_ref())
}

/// `out/run`: becomes the executable of this process's rank, or starts all of them.
fn launch(folder: &Path, ranks: usize, arguments: &RunnerArguments) -> Outcome<()> {
    match place(arguments, ranks)? {
        Some(place) => {
            let program = folder.join(format!("rank{}", place.rank));
            let error = Command::new(&program).args(std::env::args_os().skip(1)).exec();
            Err(Failure::new(
                Kind::Resource,
                format!(
                    "cannot start {}: {error}\nhelp: `tpshard exec DIR` runs folders whose files cannot be executed",
                    program.display()
                ),
            ))
        }
        None => {
            check_outputs(&arguments.tensors)?;
            let command = |rank| {
                let mut command = Command::new(folder.join(format!("rank{rank}")));
                add_flags(&mut command, &arguments.tensors, arguments.json);
                command
            };
            spawn((0..ranks).map(command).collect())
        }
    }
}

/// A program for one rank needs no launcher; others do.
fn alone(file: &RankFile) -> Outcome<Place> {
    if file.ranks() == 1 {
        let source = tpshard_runtime::launch::Source::Flags;
        return Ok(Place { rank: 0, world_size: 1, local_rank: None, local_world_size: None, source });
    }
    let message = format!(
        "this is rank {} of {}, and no launcher says which rank this process is\n\
         help: start `run` beside it, use torchrun, mpirun or srun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT",
        file.program.rank,
        file.ranks()
    );
    Err(Failure::new(Kind::Usage, message))
}

pub(crate) fn environment() -> BTreeMap<String, String> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect()
}

fn place(arguments: &RunnerArguments, ranks: usize) -> Outcome<Option<Place>> {
    let flags = Flags { rank: arguments.rank, world_size: arguments.world_size };
    find_place(&flags, &environment(), Some(ranks)).or_fail(Kind::Usage)
}

/// Runs the program of one rank in this process.
pub(crate) fn run_rank(
    folder: &Path,
    file: RankFile,
    place: &Place,
    arguments: &TensorArguments,
    json: bool,
    job: Option<&Job>,
) -> Outcome<()> {
    if file.program.rank != place.rank {
        let message = format!(
            "this file holds the program of rank {}, but this process is rank {} ({})\n\
             help: start rank{} instead, or `run`, which picks the file itself",
            file.program.rank, place.rank, place.source, place.rank
        );
        return Err(Failure::new(Kind::Usage, message));
    }
    let inputs = if place.rank == 0 && job.is_none_or(Job::takes_inputs) {
        check_outputs(arguments)?;
        read_inputs(folder, &file, arguments)?
    } else {
        NamedTensors::new()
    };
    let agreement = Agreement {
        tool_version: env!("CARGO_PKG_VERSION").into(),
        program_hash: file.program.program_hash.clone(),
        weights_hash: file.program.weights_hash.clone(),
        device: arguments.ranks.on.device.choice().name(&file.program).into(),
        precision: file.program.determinism.name().into(),
    };
    let mut options = CommOptions::default();
    if let Some(seconds) = arguments.ranks.timeout {
        options.stall = Duration::from_secs(seconds);
    }
    let meeting = Rendezvous::of_place(place, &environment(), options).map_err(launch_failure)?;
    let communicator = connect(&meeting, &agreement).map_err(launch_failure)?;
    let mut weights = open_weights(folder, place.rank)?;
    let session_options = SessionOptions {
        threads: arguments.ranks.threads,
        own_processors: arguments.ranks.own_processors,
        local_ranks: place.local_world_size,
        device: arguments.ranks.on.device.choice(),
        comm: arguments.ranks.comm.choice(),
        local_rank: place.local_rank,
        evaluator: evaluator(),
        ..SessionOptions::default()
    };
    let session_options = job.map_or(session_options.clone(), |job| job.options(session_options));
    let RankFile { program, output_names, .. } = file;
    let mut session = Session::open(program, &mut weights, communicator, &session_options)
        .map_err(|e| session_failure(&e))?;
    drop(weights);
    if let Some(device) = session.device() {
        output::say(format_args!("rank {}: {device}", place.rank));
    }
    let inputs: BTreeMap<String, tpshard_ir::Tensor> = inputs.into_iter().collect();
    let done = match job {
        Some(job) => job.work(&mut session, &inputs),
        None => run_once(&mut session, &inputs, &output_names, arguments, json),
    };
    if let Some(trouble) = session.submitted().and_then(|submitted| submitted.trouble) {
        output::say(format_args!("rank {}: CUDA graphs were given up: {trouble}", place.rank));
    }
    if session.is_broken() {
        tell_history(&session.history());
    }
    done
}

/// Says what the last collectives were, after one of them failed.
fn tell_history(history: &History) {
    let first = history.records.iter().position(|record| !record.done).unwrap_or(history.records.len());
    let records = history.records.iter().skip(first.saturating_sub(LAST_COLLECTIVES)).cloned();
    let last = History { rank: history.rank, records: records.take(2 * LAST_COLLECTIVES).collect() };
    output::say(format_args!("the last collectives of rank {}:\n{}", last.rank, last.to_string().trim_end()));
}

fn run_once(
    session: &mut Session,
    inputs: &BTreeMap<String, tpshard_ir::Tensor>,
    output_names: &[String],
    arguments: &TensorArguments,
    json: bool,
) -> Outcome<()> {
    let rank = session.rank();
    let results = session.run(inputs).map_err(|e| step_failure(&e, rank))?;
    if rank == 0 {
        let mut outputs = NamedTensors::new();
        for name in output_names {
            if let Some(output) = results.outputs.get(name) {
                outputs.insert(name.clone(), output.tensor.clone());
            }
        }
        write_outputs(&outputs, arguments, json, Some(&results.traffic))?;
    }
    session.close().map_err(|e| session_failure(&e))
}

/// What gives operations their meaning that wait for their operands.
pub(crate) fn evaluator() -> SharedEvaluator {
    SharedEvaluator(Some(Arc::new(OnnxEvaluator::default())))
}

pub(crate) fn read_inputs(
    folder: &Path,
    file: &RankFile,
    arguments: &TensorArguments,
) -> Outcome<NamedTensors> {
    match &arguments.inputs {
        Some(path) => {
            let names: Vec<String> = file.input_names.clone();
            // The model may have inputs that no output needs: they count in numbered files, and are then left out.
            let of_model = Folder::open(folder).map(|folder| folder.names("inputs")).unwrap_or_default();
            let mut read = tensors::read(path, if of_model.is_empty() { &names } else { &of_model })?;
            read.retain(|name, _| names.contains(name) || !of_model.contains(name));
            // A single .npy file is the only input of a model with one input.
            if let ([name], 1) = (names.as_slice(), read.len())
                && !read.contains_key(name)
                && path.extension().is_some_and(|e| e == "npy")
                && let Some((_, tensor)) = read.pop()
            {
                read.insert(name.clone(), tensor);
            }
            Ok(read)
        }
        None if file.input_names.is_empty() => Ok(NamedTensors::new()),
        None => Err(Failure::new(
            Kind::Usage,
            format!("no inputs\nhelp: --inputs FILE; the inputs are {}", file.input_names.join(", ")),
        )),
    }
}

/// Writes the results as asked, or says what they are. A file appears complete or not at all.
pub(crate) fn write_outputs(
    outputs: &NamedTensors,
    arguments: &TensorArguments,
    json: bool,
    stats: Option<&CommStats>,
) -> Outcome<()> {
    if let Some(path) = &arguments.outputs {
        let temporary = sibling(path);
        // The user knows nothing of the temporary file, so that errors are told of the file asked for.
        let written = write_npz(&temporary, outputs).map_err(|error| match error {
            IoError::System { cause, .. } => cause.to_string(),
            IoError::Invalid { what, .. } | IoError::Unsupported { what, .. } => what,
            other @ IoError::TooLarge { .. } => other.to_string(),
        });
        let written = written.and_then(|()| std::fs::rename(&temporary, path).map_err(|e| e.to_string()));
        if written.is_err() {
            let _ = std::fs::remove_file(&temporary);
        }
        written.map_err(|error| outputs_failure(path, &error))?;
    }
    if json {
        let list: Vec<serde_json::Value> = outputs
            .iter()
            .map(|(name, t)| serde_json::json!({ "name": name, "dtype": t.dtype().name(), "shape": t.shape() }))
            .collect();
        output::line(serde_json::json!({ "outputs": list, "communication": stats.map(communication) }))?;
    } else if arguments.outputs.is_none() {
        for (name, tensor) in outputs {
            output::line(format_args!("{name}: {}{:?}", tensor.dtype(), tensor.shape()))?;
        }
    }
    Ok(())
}

/// The collectives of the program that this rank took part in, with their payload in bytes as plans count it.
fn communication(stats: &CommStats) -> serde_json::Value {
    let kinds =
        [Collective::AllReduce, Collective::AllGather, Collective::ReduceScatter, Collective::AllToAll];
    kinds
        .into_iter()
        .map(|kind| {
            let found = stats.of(kind);
            (
                kind.name().to_owned(),
                serde_json::json!({ "collectives": found.collectives, "bytes": found.bytes }),
            )
        })
        .collect()
}

/// Refuses a file that the outputs cannot be written to, before any work.
pub(crate) fn check_outputs(arguments: &TensorArguments) -> Outcome<()> {
    let Some(path) = &arguments.outputs else { return Ok(()) };
    if path.is_dir() || path.file_name().is_none() {
        return Err(outputs_failure(path, "is a folder, not a file"));
    }
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Whether files can be made is found out by making the one that will be written first.
    let temporary = sibling(path);
    let made = std::fs::metadata(parent).and_then(|_| {
        let file = std::fs::OpenOptions::new().write(true).create(true).truncate(false).open(&temporary);
        file.and_then(|_| std::fs::remove_file(&temporary))
    });
    made.map_err(|error| outputs_failure(path, &error.to_string()))
}

fn outputs_failure(path: &Path, what: &str) -> Failure {
    let help = "help: --outputs names a file in a folder that exists and can be written";
    Failure::new(Kind::Resource, format!("{}: cannot be written: {what}\n{help}", path.display()))
}

fn sibling(path: &Path) -> PathBuf {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    path.with_file_name(format!(".{name}.{}.tmp", std::process::id()))
}

fn launch_failure(error: LaunchError) -> Failure {
    Failure::new(kind_of(error.exit_code().into()), error)
}

/// A step's error as this rank tells it: what another rank could not do is said by that rank and by rank 0, what the
/// inputs did is said by rank 0, which has them.
fn step_failure(error: &SessionError, own_rank: usize) -> Failure {
    match error {
        SessionError::Refused { rank, .. } if own_rank != 0 && *rank != own_rank => {
            Failure::new(Kind::Rank, "")
        }
        SessionError::Index { .. } if own_rank != 0 => Failure::new(Kind::Usage, ""),
        _ => session_failure(error),
    }
}

/// The exit code that fits a session's error.
pub(crate) fn session_failure(error: &SessionError) -> Failure {
    let kind = kind_of(error.exit_code().into());
    let text = error.to_string();
    let help = match error {
        SessionError::Inputs(_) if !text.contains("help: ") => {
            "\nhelp: `tpshard inspect DIR` lists the inputs with their types"
        }
        _ => "",
    };
    Failure::new(kind, format!("{text}{help}"))
}
