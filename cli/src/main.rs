//! The command `tpshard`, and the runner in every rank's executable: the same binary. A program in the section
//! `.tpshard` makes it a runner.

mod arguments;
mod commands;
mod decoder;
mod failure;
mod folder;
mod in_process;
mod job;
mod output;
mod progress;
mod rank_program;
mod runner;
mod target;
mod tensors;

use arguments::{Arguments, Command};
use failure::{Classify, Failure, Kind, Outcome};
use std::ffi::OsString;
use std::process::ExitCode;

fn main() -> ExitCode {
    failure::say_panics();
    let words: Vec<OsString> = std::env::args_os().collect();
    // Words that cannot be parsed may still ask for JSON.
    let json = words.iter().any(|word| word == "--json");
    match failure::guarded(|| run(words)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            report(&failure, json);
            ExitCode::from(failure.kind as u8)
        }
    }
}

/// Tells people and, if they asked, machines.
fn report(failure: &Failure, json: bool) {
    if !failure.message.is_empty() {
        output::say(format_args!("error: {failure}"));
    }
    let silent = failure.message.is_empty() && failure.told.is_none();
    if json && !silent && !commands::run::is_watched() {
        // There is no third place to say that this failed as well.
        let _ = output::line(failure.to_json());
    }
}

fn run(words: Vec<OsString>) -> Outcome<()> {
    let payload = tpshard_runtime::elf::own_section(None).or_fail(Kind::Mismatch)?;
    if let Some(payload) = payload {
        let executable = std::env::current_exe().or_fail(Kind::Resource)?;
        return runner::main(&payload, &executable, words);
    }
    let arguments = arguments::parsed(Arguments::of(words))?;
    let Some(Arguments { command, json, quiet }) = arguments else { return Ok(()) };
    match command {
        Command::Shard(arguments) => commands::shard::shard(&arguments, json, quiet),
        Command::Run(arguments) => commands::run::run(&arguments, json),
        Command::Check(arguments) => commands::check::check(&arguments, json),
        Command::Verify(arguments) => commands::verify::verify(&arguments, json),
        Command::Plan(arguments) => commands::plan::plan(&arguments, json),
        Command::Explain(arguments) => commands::explain::explain(&arguments, json),
        Command::Inspect(arguments) => commands::inspect::inspect(&arguments, json),
        Command::Exec(arguments) => commands::exec::exec(&arguments, json),
        Command::Compare(arguments) => commands::compare::compare(&arguments, json),
        Command::Bench(arguments) => commands::bench::bench(&arguments, json),
        Command::Generate(arguments) => commands::generate::generate(&arguments, json, quiet),
        Command::Calibrate(arguments) => commands::calibrate::calibrate(&arguments, json, quiet),
    }
}
