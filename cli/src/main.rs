//! The command `tpshard`, and the runner in every rank's executable: the same binary. A program in the section
//! `.tpshard` makes it a runner.

mod arguments;
mod commands;
mod failure;
mod folder;
mod in_process;
mod progress;
mod rank_program;
mod runner;
mod tensors;

use arguments::{Arguments, Command};
use failure::{Classify, Kind, Outcome};
use std::process::ExitCode;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if !failure.message.is_empty() {
                eprintln!("error: {failure}");
            }
            ExitCode::from(failure.kind as u8)
        }
    }
}

fn run() -> Outcome<()> {
    let payload = tpshard_runtime::elf::own_section(None).or_fail(Kind::Mismatch)?;
    if let Some(payload) = payload {
        let executable = std::env::current_exe().or_fail(Kind::Resource)?;
        return runner::main(&payload, &executable);
    }
    let Arguments { command, json, quiet } = Arguments::of(std::env::args_os());
    match command {
        Command::Shard(arguments) => commands::shard::shard(&arguments, json, quiet),
        Command::Run(arguments) => commands::run::run(&arguments, json),
        Command::Check(arguments) => commands::check::check(&arguments, json),
        Command::Verify(arguments) => commands::verify::verify(&arguments, json),
        Command::Plan(arguments) => commands::plan::plan(&arguments, json),
        Command::Inspect(arguments) => commands::inspect::inspect(&arguments, json),
        Command::Exec(arguments) => commands::exec::exec(&arguments, json),
        Command::Compare(arguments) => commands::compare::compare(&arguments, json),
    }
}
