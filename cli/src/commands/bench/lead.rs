//! The ranks' side: rank 0 runs the program again and again, and every rank says when its steps ran.

use crate::decoder::Decoder;
use crate::failure::{Classify, Failure, Kind, Outcome};
use crate::runner::session_failure;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use tpshard_ir::program::device::{DeviceStep, How};
use tpshard_ir::program::{Entry, RankProgram};
use tpshard_ir::{Op, Tensor, ValueId};
use tpshard_runtime::comm::CommStats;
use tpshard_runtime::session::{Session, StepTime, Submissions, now};
use tpshard_runtime::state::SlotId;

/// What rank 0 measured.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Measured {
    /// When the first measured run began, by the machine's monotonic clock.
    pub(crate) start: u64,
    /// Nanoseconds of the first run of all, which warms up.
    pub(crate) first: u64,
    /// Nanoseconds per run: of the prompt, if tokens are decoded after it.
    pub(crate) runs: Vec<u64>,
    /// Nanoseconds per decoded token.
    pub(crate) tokens: Vec<u64>,
    /// Sequences that are decoded at once, and the tokens of each prompt.
    pub(crate) prompt: Option<(usize, usize)>,
    /// Collectives and their payload bytes of one run, and of one decoded token.
    pub(crate) run_traffic: (u64, u64),
    pub(crate) token_traffic: (u64, u64),
    /// What rank 0 asked its GPU to do in the last run, and for the last decoded token.
    pub(crate) run_submitted: Option<Submitted>,
    pub(crate) token_submitted: Option<Submitted>,
}

/// See [`Submissions`].
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Submitted {
    pub(crate) launches: u64,
    pub(crate) graphs: u64,
    pub(crate) updates: u64,
}

/// What was asked for from one of the two moments to the other.
fn between(before: Option<&Submissions>, after: Option<&Submissions>) -> Option<Submitted> {
    let (before, after) = (before?, after?);
    Some(Submitted {
        launches: after.launches.saturating_sub(before.launches),
        graphs: after.graphs.saturating_sub(before.graphs),
        updates: after.updates.saturating_sub(before.updates),
    })
}

/// A step of the program, as tables and traces call it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct StepName {
    pub(crate) kernel: String,
    /// The node of the model, if the step comes from one.
    pub(crate) node: String,
    pub(crate) communicates: bool,
}

/// What one rank wrote down.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct RankLog {
    pub(crate) rank: usize,
    /// Most bytes this process ever had in memory.
    pub(crate) peak_bytes: u64,
    /// By entry and value.
    pub(crate) names: Vec<(usize, u32, StepName)>,
    /// Run, entry, value, start and length in nanoseconds.
    pub(crate) steps: Vec<(u64, usize, u32, u64, u64)>,
    /// Rank 0's.
    pub(crate) measured: Option<Measured>,
}

pub(crate) fn log_file(folder: &Path, rank: usize) -> PathBuf {
    folder.join(format!("rank{rank}.json"))
}

/// Measures on rank 0; every rank writes down what it saw. `counts` are runs that warm up, runs that are measured, and
/// tokens to decode after each.
pub(crate) fn work(
    session: &mut Session,
    inputs: &BTreeMap<String, Tensor>,
    counts: [usize; 3],
    results: &Path,
) -> Outcome<()> {
    let [warm_up, samples, decode] = counts;
    let mut measured = None;
    if session.rank() == 0 {
        measured = Some(match decode {
            0 => repeat(session, inputs, warm_up, samples)?,
            _ => decoding(session, inputs, warm_up, samples, decode)?,
        });
        session.close().map_err(|e| session_failure(&e))?;
    }
    let steps = session.take_timeline();
    let program = session.program();
    let log = RankLog {
        rank: program.rank,
        peak_bytes: peak_bytes().unwrap_or(0),
        names: names(program, session.device().is_some(), &steps),
        steps: steps.iter().map(|s| (s.run, s.entry, s.value.0, s.start, s.nanoseconds)).collect(),
        measured,
    };
    let path = log_file(results, program.rank);
    let text = serde_json::to_vec(&log).or_fail(Kind::Internal)?;
    std::fs::write(&path, text).map_err(|e| Failure::new(Kind::Resource, format!("{}: {e}", path.display())))
}

fn repeat(
    session: &mut Session,
    inputs: &BTreeMap<String, Tensor>,
    warm_up: usize,
    samples: usize,
) -> Outcome<Measured> {
    let mut measured = Measured { prompt: None, ..Measured::default() };
    for run in 0..warm_up + samples {
        let before = session.submitted();
        let start = now();
        let results = session.run(inputs).map_err(|e| session_failure(&e))?;
        measured.note(run, warm_up, start);
        measured.run_traffic = carried(&results.traffic);
        measured.run_submitted = between(before.as_ref(), session.submitted().as_ref());
    }
    Ok(measured)
}

/// Prompts, all at once, and then greedy tokens, again and again.
fn decoding(
    session: &mut Session,
    inputs: &BTreeMap<String, Tensor>,
    warm_up: usize,
    samples: usize,
    decode: usize,
) -> Outcome<Measured> {
    let decoder = Decoder::new(session.program())?;
    let prompts = decoder.tokens_of(inputs)?;
    let length = prompts.first().map_or(0, Vec::len);
    let mut measured = Measured { prompt: Some((prompts.len(), length)), ..Measured::default() };
    let slots: Vec<SlotId> = (0..prompts.len() as u64).map(SlotId).collect();
    for run in 0..warm_up + samples {
        let fed = decoder.inputs(&prompts, &vec![0; prompts.len()])?;
        let before = session.submitted();
        let start = now();
        let mut results = session.run_step(&slots, &fed).map_err(|e| session_failure(&e))?;
        measured.note(run, warm_up, start);
        measured.run_traffic = carried(&results.traffic);
        measured.run_submitted = between(before.as_ref(), session.submitted().as_ref());
        for past in length..length + decode {
            let next = decoder.next(&results, prompts.len())?;
            let tokens: Vec<Vec<i64>> = next.iter().map(|next| vec![next.greedy()]).collect();
            let fed = decoder.inputs(&tokens, &vec![past; tokens.len()])?;
            let before = session.submitted();
            let start = now();
            results = session.run_step(&slots, &fed).map_err(|e| session_failure(&e))?;
            if run >= warm_up {
                measured.tokens.push(now().saturating_sub(start));
            }
            measured.token_traffic = carried(&results.traffic);
            measured.token_submitted = between(before.as_ref(), session.submitted().as_ref());
        }
        for &slot in &slots {
            session.drop_slot(slot).map_err(|e| session_failure(&e))?;
        }
    }
    Ok(measured)
}

impl Measured {
    fn note(&mut self, run: usize, warm_up: usize, start: u64) {
        let nanoseconds = now().saturating_sub(start);
        if run == 0 {
            self.first = nanoseconds;
        }
        if run == warm_up {
            self.start = start;
        }
        if run >= warm_up {
            self.runs.push(nanoseconds);
        }
    }
}

fn carried(stats: &CommStats) -> (u64, u64) {
    (stats.total().collectives, stats.total().bytes)
}

/// What steps are called, by what executed them.
fn names(program: &RankProgram, on_gpu: bool, steps: &[StepTime]) -> Vec<(usize, u32, StepName)> {
    let seen: BTreeSet<(usize, u32)> = steps.iter().map(|s| (s.entry, s.value.0)).collect();
    let mut names = Vec::with_capacity(seen.len());
    for (index, entry) in program.entries.iter().enumerate() {
        let made = if on_gpu { by_gpu(program, entry) } else { by_processor(entry) };
        for (value, kernel) in made {
            if !seen.contains(&(index, value.0)) {
                continue;
            }
            let node = entry.graph.node(value);
            let (kernel, communicates) = match &node.op {
                Op::Convert(conversion) => (conversion.name().into(), conversion.communicates()),
                Op::Input { .. } => ("input".into(), false),
                _ => (kernel, false),
            };
            let name = StepName { kernel, node: node.origin.to_string(), communicates };
            names.push((index, value.0, name));
        }
    }
    names
}

fn by_processor(entry: &Entry) -> Vec<(ValueId, String)> {
    entry.lowering.regions.iter().map(|region| (region.result(), region.kernel.name().into())).collect()
}

/// By the kernel that completes each value.
fn by_gpu(program: &RankProgram, entry: &Entry) -> Vec<(ValueId, String)> {
    let kernels = program.device.as_ref().map_or(&[][..], |code| &code.kernels);
    let steps = entry.device.iter().flat_map(|device| &device.steps);
    let name = |step: &DeviceStep| match &step.how {
        How::Host => format!("host {}", entry.graph.node(step.value).op.name()),
        how => {
            let last = how.launches().last().and_then(|launch| kernels.get(launch.kernel));
            last.map_or_else(|| "view".into(), |kernel| kernel.name.clone())
        }
    };
    steps.map(|step| (step.value, name(step))).collect()
}

/// The most memory this process ever had, as Linux counts it.
fn peak_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find(|l| l.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok()?.checked_mul(1024)
}
