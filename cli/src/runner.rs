//! What a rank's executable does: the same binary, with a program in its section.
//!
//! Standard output belongs to results; everything said to people goes to standard error.

use crate::arguments::{RunnerArguments, TensorArguments};
use crate::commands::run::{add_flags, spawn};
use crate::failure::{Classify, Failure, Kind, Outcome};
use crate::rank_program::{RankFile, ShardFile};
use crate::tensors;
use clap::Parser;
use std::collections::BTreeMap;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tpshard_codegen::build::PART_LAUNCHER;
use tpshard_ir::container;
use tpshard_runtime::comm::CommOptions;
use tpshard_runtime::io::{NamedTensors, write_npz};
use tpshard_runtime::launch::{Agreement, Flags, LaunchError, Place, Rendezvous, connect, find_place};
use tpshard_runtime::session::{Session, SessionError, SessionOptions};

/// Runs the executable's own payload; `executable` says where it lies.
pub(crate) fn main(payload: &[u8], executable: &Path) -> Outcome<()> {
    let arguments = RunnerArguments::try_parse().unwrap_or_else(|error| error.exit());
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
    run_rank(&folder, file, &place, &arguments.tensors, arguments.json)
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
        None => spawn(
            (0..ranks)
                .map(|rank| {
                    let mut command = Command::new(folder.join(format!("rank{rank}")));
                    add_flags(&mut command, &arguments.tensors, arguments.json);
                    command
                })
                .collect(),
        ),
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
) -> Outcome<()> {
    if file.program.rank != place.rank {
        let message = format!(
            "this file holds the program of rank {}, but this process is rank {} ({:?})\n\
             help: start rank{} instead, or `run`, which picks the file itself",
            file.program.rank, place.rank, place.source, place.rank
        );
        return Err(Failure::new(Kind::Usage, message));
    }
    let inputs = if place.rank == 0 { read_inputs(&file, arguments)? } else { NamedTensors::new() };
    let agreement = Agreement {
        tool_version: env!("CARGO_PKG_VERSION").into(),
        program_hash: file.program.program_hash.clone(),
        weights_hash: file.program.weights_hash.clone(),
        device: arguments.device.clone(),
        precision: file.program.determinism.name().into(),
    };
    let mut options = CommOptions::default();
    if let Some(seconds) = arguments.timeout {
        options.stall = Duration::from_secs(seconds.max(1));
    }
    let meeting = Rendezvous::of_place(place, &environment(), options).map_err(launch_failure)?;
    let communicator = connect(&meeting, &agreement).map_err(launch_failure)?;
    let mut weights = ShardFile::open(folder, place.rank)?;
    let session_options = SessionOptions {
        threads: arguments.threads,
        local_ranks: place.local_world_size,
        ..SessionOptions::default()
    };
    let mut session = Session::open(file.program, &mut weights, communicator, &session_options)
        .map_err(|e| session_failure(&e))?;
    drop(weights);
    let inputs: BTreeMap<String, tpshard_ir::Tensor> = inputs.into_iter().collect();
    let results = session.run(&inputs).map_err(|e| step_failure(&e, place.rank))?;
    if place.rank == 0 {
        let mut outputs = NamedTensors::new();
        for name in &file.output_names {
            if let Some(output) = results.outputs.get(name) {
                outputs.insert(name.clone(), output.tensor.clone());
            }
        }
        write_outputs(&outputs, arguments, json)?;
    }
    session.close().map_err(|e| session_failure(&e))
}

fn read_inputs(file: &RankFile, arguments: &TensorArguments) -> Outcome<NamedTensors> {
    match &arguments.inputs {
        Some(path) => {
            let names: Vec<String> = file.input_names.clone();
            let mut read = tensors::read(path, &names)?;
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
pub(crate) fn write_outputs(outputs: &NamedTensors, arguments: &TensorArguments, json: bool) -> Outcome<()> {
    if let Some(path) = &arguments.outputs {
        let temporary = sibling(path);
        let written = write_npz(&temporary, outputs).map_err(|e| e.to_string());
        let written = written
            .and_then(|()| std::fs::rename(&temporary, path).map_err(|e| format!("{}: {e}", path.display())));
        if written.is_err() {
            let _ = std::fs::remove_file(&temporary);
        }
        written.map_err(|error| {
            let help = "help: --outputs names a file in a folder that exists and can be written";
            Failure::new(Kind::Resource, format!("{error}\n{help}"))
        })?;
    }
    if json {
        let list: Vec<serde_json::Value> = outputs
            .iter()
            .map(|(name, t)| serde_json::json!({ "name": name, "dtype": t.dtype().name(), "shape": t.shape() }))
            .collect();
        println!("{}", serde_json::json!({ "outputs": list }));
    } else if arguments.outputs.is_none() {
        for (name, tensor) in outputs {
            println!("{name}: {}{:?}", tensor.dtype(), tensor.shape());
        }
    }
    Ok(())
}

fn sibling(path: &Path) -> PathBuf {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    path.with_file_name(format!(".{name}.{}.tmp", std::process::id()))
}

fn launch_failure(error: LaunchError) -> Failure {
    let kind = match &error {
        LaunchError::Refused { .. } | LaunchError::Rendezvous { .. } => Kind::Rank,
        _ => Kind::Usage,
    };
    Failure::new(kind, error)
}

/// A step's error as this rank tells it: what another rank could not do is said by that rank and by rank 0.
fn step_failure(error: &SessionError, own_rank: usize) -> Failure {
    match error {
        SessionError::Refused { rank, .. } if own_rank != 0 && *rank != own_rank => {
            Failure::new(Kind::Rank, "")
        }
        _ => session_failure(error),
    }
}

/// The exit code that fits a session's error.
pub(crate) fn session_failure(error: &SessionError) -> Failure {
    let kind = match error {
        SessionError::Inputs(_)
        | SessionError::UnknownInput { .. }
        | SessionError::NoEntry { .. }
        | SessionError::Usage { .. } => Kind::Usage,
        SessionError::Program { .. } | SessionError::Lowering { .. } | SessionError::Weights { .. } => {
            Kind::Mismatch
        }
        SessionError::Plan(_)
        | SessionError::Memory { .. }
        | SessionError::Resources { .. }
        | SessionError::State { .. } => Kind::Resource,
        SessionError::Refused { .. }
        | SessionError::Collective(_)
        | SessionError::Poisoned { .. }
        | SessionError::Closed => Kind::Rank,
    };
    let text = error.to_string();
    let help = match error {
        SessionError::Inputs(_) if !text.contains("help: ") => {
            "\nhelp: `tpshard inspect DIR` lists the inputs with their types"
        }
        _ => "",
    };
    Failure::new(kind, format!("{text}{help}"))
}
