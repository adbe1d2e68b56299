//! ONNX's own backend tests, run by worker processes: `conformance [--write] [--cuda] [--only TEXT] DOCUMENT VERSION=WHEEL…`.
//!
//! [`suite`] unpacks the tests that a wheel of the `onnx` package holds, [`worker`] runs each on 1, 2 and 3 ranks as it
//! stands and with constants in place of inputs, [`document`] writes down what passes. What is written must be what is
//! found; `--write` writes it anew.
//!
//! `cargo xtask conformance` fetches the wheels. `conformance --corpus DIR` runs a folder of real models instead, see
//! [`corpus`].

mod corpus;
mod data;
mod document;
mod outcome;
mod suite;
mod tier;
mod treatment;
mod worker;

use anyhow::{Context, Result, bail};
use outcome::{Form, Verdict};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;
use suite::Test;

const USAGE: &str = "usage: conformance [--write] [--cuda] [--only TEXT] [--workers N] DOCUMENT VERSION=WHEEL…\n\
                            conformance --corpus DIR [--cuda] [--only TEXT] [--workers N]\n\
                     \n\
                     --write      write the document instead of comparing it\n\
                     --cuda       run on a GPU, or what TPSHARD_CUDA_PATH names in place of one\n\
                     --only TEXT  run the tests whose name holds TEXT, print every run, compare no document";

/// What the command line asks for.
#[derive(Debug, Default)]
struct Arguments {
    write: bool,
    serve: bool,
    cuda: bool,
    only: Option<String>,
    workers: Option<usize>,
    corpus: Option<PathBuf>,
    document: PathBuf,
    wheels: Vec<(String, PathBuf)>,
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let Some(arguments) = Arguments::of(&words) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    match conformance(&arguments, &words) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("conformance: {error:#}");
            ExitCode::FAILURE
        }
    }
}

impl Arguments {
    fn of(words: &[String]) -> Option<Arguments> {
        let mut found = Arguments::default();
        let mut document = None;
        let mut words = words.iter();
        while let Some(word) = words.next() {
            match word.as_str() {
                "--write" => found.write = true,
                "--serve" => found.serve = true,
                "--cuda" => found.cuda = true,
                "--corpus" => found.corpus = Some(words.next()?.into()),
                "--only" => found.only = Some(words.next()?.clone()),
                "--workers" => found.workers = Some(words.next()?.parse().ok().filter(|n| *n > 0)?),
                word if word.starts_with("--") => return None,
                word if document.is_none() => document = Some(word.to_owned()),
                word => {
                    let (version, wheel) = word.split_once('=')?;
                    found.wheels.push((version.to_owned(), wheel.into()));
                }
            }
        }
        if found.corpus.is_some() {
            return (document.is_none() && !found.write).then_some(found);
        }
        found.document = document?.into();
        (!found.wheels.is_empty()).then_some(found)
    }
}

/// True if what is found is what is written.
fn conformance(arguments: &Arguments, words: &[String]) -> Result<bool> {
    let mut tests = Vec::new();
    let mut seen = BTreeSet::new();
    if let Some(folder) = &arguments.corpus {
        tests = corpus::tests(folder)?;
    }
    for (version, wheel) in &arguments.wheels {
        tests.extend(suite::tests(version, &suite::unpack(wheel)?, &mut seen)?);
    }
    if let Some(text) = &arguments.only {
        tests.retain(|test| test.name.contains(text.as_str()));
    }
    if arguments.serve {
        worker::serve(&tests, arguments.cuda)?;
        return Ok(true);
    }
    if tests.is_empty() {
        bail!("no tests\nhelp: the newest onnx wheels hold no test data, give 1.21.0 or older ones");
    }
    let start = Instant::now();
    let workers = arguments.workers.unwrap_or(std::thread::available_parallelism().map_or(1, usize::from));
    let serving: Vec<String> = words.iter().cloned().chain(["--serve".to_owned()]).collect();
    let outcomes = worker::sweep(&tests, workers, &serving)?;
    let ran: Vec<document::Ran<'_>> =
        tests.iter().zip(&outcomes).map(|(test, outcomes)| (test, outcomes.as_slice())).collect();
    summary(&ran);
    println!("conformance: {} tests in {:.0} s", tests.len(), start.elapsed().as_secs_f64());
    if arguments.corpus.is_some() {
        print!("{}", corpus::report(&ran));
        return Ok(corpus::sound(&ran));
    }
    if arguments.only.is_some() {
        each(&ran);
        return Ok(true);
    }
    settle(arguments, &document::document(&ran))
}

/// Compares with what is written, or writes it.
fn settle(arguments: &Arguments, text: &str) -> Result<bool> {
    let path: &Path = &arguments.document;
    if arguments.write {
        std::fs::write(path, text).with_context(|| path.display().to_string())?;
        println!("conformance: wrote {}", path.display());
        return Ok(true);
    }
    let committed = std::fs::read_to_string(path).unwrap_or_default();
    if committed == text {
        return Ok(true);
    }
    println!(
        "conformance: FAILED: {} says otherwise (-: written there, +: found)\n{}\n\
         help: mend what got worse; `cargo xtask conformance --write` writes down what got better",
        path.display(),
        document::differences(&committed, text)
    );
    Ok(false)
}

fn each(ran: &[document::Ran<'_>]) {
    for (Test { name, suite, .. }, outcomes) in ran {
        for o in *outcomes {
            println!("{} {name} ({suite}) {} N={}: {}", o.verdict.name(), o.form.name(), o.ranks, o.reason);
        }
    }
}

fn summary(ran: &[document::Ran<'_>]) {
    for form in Form::ALL {
        let mut line = String::new();
        for ranks in worker::RANKS {
            let verdicts = || {
                let all = ran.iter().flat_map(|(_, outcomes)| *outcomes);
                all.filter(move |o| o.form == form && o.ranks == ranks)
            };
            line.push_str(&format!("; N={ranks}:"));
            for verdict in Verdict::ALL {
                let count = verdicts().filter(|o| o.verdict == verdict).count();
                if count > 0 {
                    line.push_str(&format!(" {count} {}", verdict.name()));
                }
            }
        }
        println!("conformance: {}{line}", form.name());
    }
}
