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
use clap::{CommandFactory, Parser};
use failure::{Classify, Failure, Kind, Outcome};
use std::process::ExitCode;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("error: {failure}");
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
    let Arguments { command, shard, json, quiet } = Arguments::parse();
    match (command, shard) {
        (Some(Command::Run(arguments)), _) => commands::run::run(&arguments, json),
        (Some(Command::Check(arguments)), _) => commands::check::check(&arguments, json),
        (Some(Command::Verify(arguments)), _) => commands::verify::verify(&arguments, json),
        (Some(Command::Plan(arguments)), _) => commands::plan::plan(&arguments, json),
        (Some(Command::Inspect(arguments)), _) => commands::inspect::inspect(&arguments, json),
        (Some(Command::Exec(arguments)), _) => commands::exec::exec(&arguments, json),
        (Some(Command::Compare(arguments)), _) => commands::compare::compare(&arguments, json),
        (None, Some(arguments)) => commands::shard::shard(&arguments, json, quiet),
        (None, None) => {
            let help = Arguments::command().render_help();
            Err(Failure::new(Kind::Usage, format!("nothing to do\n{help}")))
        }
    }
}
