//! `tpshard run`: all ranks of a folder on this machine, one process each.

use super::verify::tapped;
use crate::arguments::{RunArguments, TensorArguments};
use crate::failure::{Failure, Kind, Outcome};
use crate::folder::Folder;
use crate::runner::{check_outputs, write_outputs};
use crate::tensors;
use std::path::Path;
use std::process::Command;
use tpshard_runtime::launch::{SpawnError, spawn_ranks};

pub(crate) fn run(arguments: &RunArguments, json: bool) -> Outcome<()> {
    check_outputs(&arguments.tensors)?;
    let folder = Folder::open(&arguments.folder)?.on(arguments.tensors.ranks.on.device);
    if !arguments.tap.is_empty() {
        let path = arguments.tensors.inputs.as_deref();
        let path = path.ok_or_else(|| Failure::new(Kind::Usage, "--tap needs --inputs FILE"))?;
        let inputs = tensors::read(path, &folder.names("inputs"))?;
        let outputs = tapped(&folder, &inputs, &arguments.tap)?;
        return write_outputs(&outputs, &arguments.tensors, json, None);
    }
    let commands = (0..folder.ranks)
        .map(|rank| {
            let mut command = Command::new(folder.executable(rank));
            add_flags(&mut command, &arguments.tensors, json);
            command
        })
        .collect();
    spawn(commands)
}

/// The variable that tells a rank that the process that started it reports its end.
const WATCHED: &str = "TPSHARD_WATCHED";

/// True in a rank whose errors are reported by the process that started it.
pub(crate) fn is_watched() -> bool {
    std::env::var_os(WATCHED).is_some()
}

/// Starts the ranks and waits for them. A failed rank has said why on standard error; its exit code is ours.
pub(crate) fn spawn(commands: Vec<Command>) -> Outcome<()> {
    spawn_ranks(commands).map_err(|error| {
        let kind = match &error {
            SpawnError::Failed { code: Some(code), .. } => kind_of(*code),
            SpawnError::Start { .. } | SpawnError::System(_) => Kind::Resource,
            SpawnError::Failed { code: None, .. } | SpawnError::Interrupted { .. } => Kind::Rank,
        };
        let help = match &error {
            SpawnError::Start { .. } => {
                "\nhelp: `tpshard exec DIR` runs folders whose files cannot be executed"
            }
            _ => "",
        };
        let message = format!("{error}{help}");
        match error {
            // For machines, what the rank said; people have read it above.
            SpawnError::Failed { said, .. } if !said.is_empty() => {
                Failure { told: Some(said), ..Failure::new(kind, message) }
            }
            _ => Failure::new(kind, message),
        }
    })
}

/// The kind of failure that an exit code stands for.
pub(crate) fn kind_of(code: i32) -> Kind {
    [Kind::Internal, Kind::Usage, Kind::Model, Kind::Mismatch, Kind::Resource]
        .into_iter()
        .find(|&kind| kind as i32 == code)
        .unwrap_or(Kind::Rank)
}

/// Passes the flags of one command line on to the ranks.
pub(crate) fn add_flags(command: &mut Command, tensors: &TensorArguments, json: bool) {
    let mut path = |flag: &str, value: &Option<std::path::PathBuf>| {
        if let Some(value) = value {
            command.arg(flag).arg(absolute(value));
        }
    };
    path("--inputs", &tensors.inputs);
    path("--outputs", &tensors.outputs);
    if let Some(timeout) = tensors.ranks.timeout {
        command.args(["--timeout", &timeout.to_string()]);
    }
    if let Some(threads) = tensors.ranks.threads {
        command.args(["--threads", &threads.to_string()]);
    }
    if tensors.ranks.own_processors {
        command.arg("--own-processors");
    }
    command.args(["--device", tensors.ranks.on.device.name()]);
    command.args(["--comm", tensors.ranks.comm.choice().name()]);
    if json {
        command.arg("--json");
    }
    command.env(WATCHED, "1");
}

fn absolute(path: &Path) -> std::path::PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf())
}
