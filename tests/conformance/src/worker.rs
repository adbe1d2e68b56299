//! Workers: processes that run one test after the other, so that one that crashes or never ends takes nothing else
//! down.
//!
//! A worker is told the number of a test on standard input; it answers with one line per run and `done`.

use crate::data::{Pair, constantified, pairs};
use crate::outcome::{Form, Outcome, Verdict};
use crate::suite::Test;
use crate::treatment::{imported, panic_text, run};
use anyhow::{Context, Result};
use prost::Message;
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};
use tpshard_frontend::proto::ModelProto;

/// The numbers of ranks; a test goes on to the next only if it passes.
pub(crate) const RANKS: [usize; 3] = [1, 2, 3];
/// How long a test may take.
const PATIENCE: Duration = Duration::from_secs(120);
const DONE: &str = "done";

/// Answers until standard input ends.
pub(crate) fn serve(tests: &[Test], cuda: bool) -> Result<()> {
    std::panic::set_hook(Box::new(|_| {}));
    for line in io::stdin().lock().lines() {
        let line = line?;
        let test = line.parse::<usize>().ok().and_then(|index| tests.get(index)).context("no such test")?;
        attempt(test, cuda)?;
        say(&DONE)?;
    }
    Ok(())
}

fn say(line: &dyn std::fmt::Display) -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}

fn attempt(test: &Test, cuda: bool) -> Result<()> {
    let bytes = fs::read(&test.model)?;
    let proto = ModelProto::decode(bytes.as_slice())?;
    let read = pairs(test, &proto);
    for form in Form::ALL {
        let folder = tempfile::tempdir()?;
        let path = match form {
            Form::Plain => test.model.clone(),
            Form::Constant if test.kind != "node" => continue,
            Form::Constant => match constantified(test, &proto)? {
                Some(model) => {
                    let path = folder.path().join("model.onnx");
                    fs::write(&path, model.encode_to_vec())?;
                    path
                }
                None => continue,
            },
        };
        let mut attempt = || -> Result<()> {
            let model = match imported(&path) {
                Ok(model) => model,
                Err(obstacle) => return say(&obstacle.outcome(form, 1)),
            };
            let read = match &read {
                Ok(read) => read,
                Err(error) => return say(&Outcome::new(form, 1, Verdict::Failed, &format!("{error:#}"))),
            };
            for ranks in RANKS {
                let outcome =
                    guarded(form, ranks, || run(&model, test, &first(read, form), form, ranks, cuda));
                say(&outcome)?;
                if outcome.verdict != Verdict::Pass {
                    break;
                }
            }
            Ok(())
        };
        match catch_unwind(AssertUnwindSafe(&mut attempt)) {
            Ok(result) => result?,
            Err(panic) => say(&Outcome::new(form, 1, Verdict::Crash, &panic_text(&*panic)))?,
        }
    }
    Ok(())
}

/// The pairs that fit the form: constants are those of the only pair.
fn first(pairs: &[Pair], form: Form) -> Vec<Pair> {
    let inputs = |pair: &Pair| match form {
        Form::Plain => pair.inputs.clone(),
        Form::Constant => pair.inputs.iter().take(1).cloned().collect(),
    };
    pairs.iter().map(|pair| Pair { inputs: inputs(pair), outputs: pair.outputs.clone() }).collect()
}

fn guarded(form: Form, ranks: usize, run: impl FnOnce() -> Outcome) -> Outcome {
    catch_unwind(AssertUnwindSafe(run))
        .unwrap_or_else(|panic| Outcome::new(form, ranks, Verdict::Crash, &panic_text(&*panic)))
}

/// Runs all tests on `workers` processes of this executable with `arguments`.
pub(crate) fn sweep(tests: &[Test], workers: usize, arguments: &[String]) -> Result<Vec<Vec<Outcome>>> {
    let next = AtomicUsize::new(0);
    let found = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..workers)
            .map(|_| {
                scope.spawn(|| -> Result<Vec<(usize, Vec<Outcome>)>> {
                    let mut worker = None;
                    let mut found = Vec::new();
                    loop {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        if index >= tests.len() {
                            return Ok(found);
                        }
                        found.push((index, ask(&mut worker, index, arguments)?));
                    }
                })
            })
            .collect();
        let joined =
            handles.into_iter().map(|h| h.join().unwrap_or_else(|_| anyhow::bail!("a thread panicked")));
        joined.collect::<Result<Vec<_>>>()
    })?;
    let mut all = vec![Vec::new(); tests.len()];
    for (index, outcomes) in found.into_iter().flatten() {
        if let Some(slot) = all.get_mut(index) {
            *slot = outcomes;
        }
    }
    Ok(all)
}

/// A worker process; killed when it is given up.
struct Worker {
    child: Child,
    input: ChildStdin,
    lines: Receiver<String>,
}

impl Worker {
    fn start(arguments: &[String]) -> Result<Worker> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start a worker")?;
        let input = child.stdin.take().context("a worker without standard input")?;
        let output = child.stdout.take().context("a worker without standard output")?;
        let (send, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if send.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Worker { child, input, lines })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The outcomes of one test. A worker that dies or is late is the outcome of the run it was at.
fn ask(slot: &mut Option<Worker>, index: usize, arguments: &[String]) -> Result<Vec<Outcome>> {
    let mut worker = match slot.take() {
        Some(worker) => worker,
        None => Worker::start(arguments)?,
    };
    let mut outcomes = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    let sent = writeln!(worker.input, "{index}").and_then(|()| worker.input.flush());
    let mut crash = "the process ended".to_owned();
    while sent.is_ok() {
        match worker.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) if line == DONE => {
                *slot = Some(worker);
                return Ok(outcomes);
            }
            Ok(line) => {
                outcomes.push(Outcome::parse(&line).with_context(|| format!("a worker says {line:?}"))?)
            }
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {
                crash = format!("no end within {} s", PATIENCE.as_secs());
                break;
            }
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => break,
        }
    }
    let (form, ranks) = match outcomes.last() {
        Some(last) if last.verdict == Verdict::Pass && last.ranks < RANKS.len() => {
            (last.form, last.ranks + 1)
        }
        Some(last) if last.form == Form::Plain => (Form::Constant, 1),
        _ => (Form::Plain, 1),
    };
    outcomes.push(Outcome::new(form, ranks, Verdict::Crash, &crash));
    Ok(outcomes)
}
