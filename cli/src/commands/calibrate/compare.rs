//! Predictions held against measurements: a profile's collectives, and the steps of models sharded with it.

use super::steps::{Rates, Slopes};
use super::{Effort, ROUNDS, Rounds, links, median, report, steps};
use crate::arguments::CalibrateArguments;
use crate::commands::planning;
use crate::failure::{Classify, Failure, Kind, Outcome};
use crate::folder::Folder;
use crate::output;
use crate::rank_program::{RankFile, open_weights};
use crate::runner::session_failure;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;
use tpshard_ir::program::{Entry, Port};
use tpshard_ir::{Bindings, DType, DTypeClass, Data, Tensor};
use tpshard_passes::cost::{Parts, Profile};
use tpshard_runtime::comm::{CommOptions, Communicator, threads};
use tpshard_runtime::session::{Session, SessionOptions};
use tpshard_runtime::state::{SlotId, StateOptions};

/// A step as predicted and as it ran.
struct Compared {
    folder: String,
    ranks: usize,
    predicted: f64,
    /// In the fastest round.
    measured: f64,
    /// What the second fastest took more, as a share of it.
    noise: f64,
}

pub(crate) fn compare(arguments: &CalibrateArguments, effort: Effort, json: bool) -> Outcome<()> {
    let profile = planning::profile(arguments.profile.as_deref().unwrap_or_default())?;
    let folders: Vec<Folder> = arguments.against.iter().map(|f| Folder::open(f)).collect::<Outcome<_>>()?;
    let mut plans = Vec::new();
    for folder in &folders {
        let plan = Planned::of(folder)?;
        if plan.profile != profile.name {
            let path = folder.path.display();
            let message = format!("{path} was planned for `{}`, not for `{}`", plan.profile, profile.name);
            return Err(Failure::new(Kind::Usage, format!("{message}\nhelp: shard it with this profile")));
        }
        plans.push((folder, plan));
    }
    // Folders take turns, so that a burst of other work meets few of each one's rounds.
    let mut taken = vec![Rounds::default(); plans.len()];
    let ranks = profile.shared_ranks.unwrap_or(2).max(2);
    let (mut slopes, mut rounds) = (Slopes::default(), Vec::new());
    for _ in 0..ROUNDS {
        slopes.round(ranks, effort)?;
        rounds.push(links::between_processes(ranks, arguments.quick, effort)?);
        for ((folder, plan), taken) in plans.iter().zip(&mut taken) {
            taken.add(step(folder, &plan.dims, effort)?);
        }
    }
    let points = links::fastest(&rounds);
    let drift = Drift::of(&profile, &slopes.rates()?, &points);
    let compared: Vec<Compared> =
        plans.iter().zip(&taken).map(|((f, p), taken)| Compared::new(f, p, taken)).collect();
    print(&compared, &points, &profile, &drift, json)
}

/// How many times what a calibrated profile says things took while folders were measured, to be shown: far from one the
/// machine is another one than was calibrated, and no prediction can be blamed. All one for profiles that are made of data
/// sheets.
struct Drift(Parts);

impl Drift {
    fn of(profile: &Profile, now: &Rates, points: &[links::Point]) -> Drift {
        if profile.kernels.is_empty() {
            return Drift(Parts { compute: 1.0, memory: 1.0, launch: 1.0, communication: 1.0 });
        }
        let of_link = |p: &links::Point| p.seconds / profile.collective_time(p.collective, p.ranks, p.bytes);
        Drift(Parts {
            compute: profile.peak(DType::F32) / now.operations_per_second,
            memory: profile.bandwidth() / now.bytes_per_second,
            launch: now.launch_seconds / profile.kernel_launch,
            communication: median(points.iter().map(of_link).collect()),
        })
    }
}

fn print(
    compared: &[Compared],
    points: &[links::Point],
    profile: &Profile,
    Drift(drift): &Drift,
    json: bool,
) -> Outcome<()> {
    if json {
        let step = |c: &Compared| {
            json!({
                "folder": c.folder,
                "ranks": c.ranks,
                "predicted_seconds": c.predicted,
                "measured_seconds": c.measured,
                "noise": c.noise,
            })
        };
        let steps: Vec<Value> = compared.iter().map(step).collect();
        let links = report::links_json(points, profile);
        let drift = json!({
            "compute": drift.compute,
            "memory": drift.memory,
            "launch": drift.launch,
            "communication": drift.communication,
        });
        return output::line(json!({ "steps": steps, "collectives": links, "drift": drift }));
    }
    output::text(report::links_table(points, profile))?;
    output::line(format_args!(
        "now takes, times what was calibrated: products {:.2}, memory {:.2}, launches {:.2}, collectives {:.2}",
        drift.compute, drift.memory, drift.launch, drift.communication
    ))?;
    output::line(format_args!(
        "{:>6}{:>14}{:>14}{:>7}{:>8}  step of",
        "ranks", "predicted us", "measured us", "noise", "ratio"
    ))?;
    for c in compared {
        output::line(format_args!(
            "{:>6}{:>14.1}{:>14.1}{:>6.0}%{:>8.2}  {}",
            c.ranks,
            c.predicted * 1e6,
            c.measured * 1e6,
            c.noise * 100.0,
            c.predicted / c.measured,
            c.folder
        ))?;
    }
    let close = compared.iter().filter(|c| (c.predicted / c.measured - 1.0).abs() <= 0.25).count();
    output::line(format_args!("steps: {close} of {} within 25 %", compared.len()))
}

/// What a folder's plan says.
struct Planned {
    profile: String,
    seconds: f64,
    dims: Bindings,
}

impl Planned {
    fn of(folder: &Folder) -> Outcome<Planned> {
        let missing = || {
            let help = "help: shard the model again with this version";
            Failure::new(
                Kind::Mismatch,
                format!("{}: config.json holds no plan\n{help}", folder.path.display()),
            )
        };
        let plan = folder.config.pointer("/build/plan").ok_or_else(missing)?;
        let dims = plan.pointer("/entries/0/dims").and_then(Value::as_object).ok_or_else(missing)?;
        let dim = |(name, value): (&String, &Value)| Some((Arc::from(name.as_str()), value.as_i64()?));
        Ok(Planned {
            profile: plan.get("profile").and_then(Value::as_str).ok_or_else(missing)?.to_owned(),
            seconds: plan.pointer("/entries/0/seconds").and_then(Value::as_f64).ok_or_else(missing)?,
            dims: dims.iter().map(dim).collect::<Option<_>>().ok_or_else(missing)?,
        })
    }
}

impl Compared {
    fn new(folder: &Folder, plan: &Planned, taken: &Rounds) -> Compared {
        Compared {
            folder: folder.path.display().to_string(),
            ranks: folder.ranks,
            predicted: plan.seconds,
            measured: taken.fastest(),
            noise: taken.noise(),
        }
    }
}

/// The median time of a step at the dims that were planned for.
fn step(folder: &Folder, dims: &Bindings, effort: Effort) -> Outcome<f64> {
    let ends = threads(folder.ranks, &CommOptions::default()).or_fail(Kind::Resource)?;
    let times: Vec<Outcome<Vec<f64>>> = std::thread::scope(|scope| {
        let run = |(rank, end)| scope.spawn(move || run_rank(folder, rank, end, dims, effort));
        let handles: Vec<_> = ends.into_iter().enumerate().map(run).collect();
        let panicked = |_| Err(Failure::new(Kind::Internal, "a rank's thread panicked"));
        handles.into_iter().map(|handle| handle.join().unwrap_or_else(panicked)).collect()
    });
    let mut samples = Vec::new();
    for (rank, times) in times.into_iter().enumerate() {
        let times = times?;
        if rank == 0 {
            samples = times;
        }
    }
    Ok(median(samples))
}

fn run_rank(
    folder: &Folder,
    rank: usize,
    communicator: Box<dyn Communicator>,
    dims: &Bindings,
    effort: Effort,
) -> Outcome<Vec<f64>> {
    let file = RankFile::read(&folder.executable(rank))?;
    let steps = match file.program.entries.first() {
        Some(entry) => Steps::of(entry, dims, &folder.path)?,
        None => Steps::default(),
    };
    let mut weights = open_weights(&folder.path, rank)?;
    let options = SessionOptions { state: steps.state.clone(), ..SessionOptions::default() };
    let mut session =
        Session::open(file.program, &mut weights, communicator, &options).map_err(|e| session_failure(&e))?;
    drop(weights);
    steps.timed(&mut session, rank, effort)
}

/// The slot that all steps are for.
const SLOT: SlotId = SlotId(0);
/// So long is a folder measured in every round, if that is no more steps than [`MOST_STEPS`]: seconds.
const LONG: f64 = 0.06;
const MOST_STEPS: usize = 60;

/// What is run to time a step.
#[derive(Default)]
struct Steps {
    inputs: BTreeMap<String, Tensor>,
    state: Option<StateOptions>,
    /// What fills the state before, and its length then.
    filled: Option<(BTreeMap<String, Tensor>, usize)>,
}

impl Steps {
    fn of(entry: &Entry, dims: &Bindings, folder: &Path) -> Outcome<Steps> {
        let states = &entry.graph.states;
        let ports: Vec<&Port> =
            entry.inputs.iter().filter(|p| states.iter().all(|s| s.input != p.name)).collect();
        let Some(pair) = states.first() else {
            return Ok(Steps { inputs: inputs(&ports, dims, folder)?, ..Steps::default() });
        };
        let refuse = || {
            let message =
                format!("{}: state `{}`: the plan does not give its length", folder.display(), pair.input);
            Failure::new(Kind::Usage, message)
        };
        let grown = |ports: &[Port], name: &str| {
            let port = ports.iter().find(|p| *p.name == *name)?;
            port.ty.shape.get(pair.axis).cloned()
        };
        let past = grown(&entry.inputs, &pair.input).ok_or_else(refuse)?;
        let whole = grown(&entry.outputs, &pair.output).ok_or_else(refuse)?;
        let size = |dim: &tpshard_ir::Dim| dim.eval(dims).ok().and_then(|d| usize::try_from(d).ok());
        let (held, capacity) = (size(&past).ok_or_else(refuse)?, size(&whole).ok_or_else(refuse)?);
        let state = Some(StateOptions { capacity, slots: 1 });
        // One step as long as all that is held, from an empty state.
        let mut filling = dims.clone();
        for name in whole.symbols() {
            let length = if past.symbols().contains(&name) { 0 } else { held as i64 };
            filling.insert(name, length);
        }
        let filled = if held == 0 { None } else { Some((inputs(&ports, &filling, folder)?, held)) };
        Ok(Steps { inputs: inputs(&ports, dims, folder)?, state, filled })
    }

    /// The times of steps as rank 0 sees them, after some that warm up; other ranks follow.
    fn timed(&self, session: &mut Session, rank: usize, effort: Effort) -> Outcome<Vec<f64>> {
        let mut times: Vec<f64> = Vec::new();
        if rank == 0 {
            let failed = |e| session_failure(&e);
            if let Some((inputs, _)) = &self.filled {
                session.run_step(&[SLOT], inputs).map_err(failed)?;
            }
            let step = |session: &mut Session| -> Outcome<f64> {
                let start = Instant::now();
                if self.state.is_none() {
                    session.run(&self.inputs).map_err(failed)?;
                    return Ok(start.elapsed().as_secs_f64());
                }
                session.run_step(&[SLOT], &self.inputs).map_err(failed)?;
                let seconds = start.elapsed().as_secs_f64();
                // The next step is as long as this one.
                session.truncate(SLOT, self.filled.as_ref().map_or(0, |f| f.1)).map_err(failed)?;
                Ok(seconds)
            };
            for _ in 0..steps::WARM {
                step(session)?;
            }
            let done = |times: &[f64]| {
                times.len() >= effort.samples
                    && (times.len() >= MOST_STEPS || times.iter().sum::<f64>() >= LONG)
            };
            while !done(&times) {
                times.push(step(session)?);
            }
        }
        session.close().map_err(|e| session_failure(&e))?;
        Ok(times)
    }
}

/// Ones of the types and sizes that a program takes.
fn inputs(ports: &[&Port], dims: &Bindings, folder: &Path) -> Outcome<BTreeMap<String, Tensor>> {
    let mut inputs = BTreeMap::new();
    for port in ports {
        let refuse = |what: &str| {
            Failure::new(Kind::Usage, format!("{}: input `{}`: {what}", folder.display(), port.name))
        };
        let sizes = port.ty.shape.iter().map(|d| d.eval(dims).ok().and_then(|s| usize::try_from(s).ok()));
        let shape: Option<Vec<usize>> = sizes.collect();
        let shape = shape.ok_or_else(|| refuse("the plan does not give its size"))?;
        let tensor = ones(port.ty.dtype, shape).map_err(|e| refuse(&e))?;
        inputs.insert(port.name.to_string(), tensor);
    }
    Ok(inputs)
}

fn ones(dtype: DType, shape: Vec<usize>) -> Result<Tensor, String> {
    let zeros = Tensor::zeros(dtype, shape.clone()).map_err(|e| e.to_string())?;
    let count = zeros.len();
    let data = match dtype {
        DType::F32 => Data::F32(vec![1.0; count]),
        DType::F64 => Data::F64(vec![1.0; count]),
        DType::I64 => Data::I64(vec![1; count]),
        DType::I32 => Data::I32(vec![1; count]),
        DType::Bool => Data::Bool(vec![true; count]),
        other if other.class() == DTypeClass::Float => return Ok(zeros),
        other => return Err(format!("cannot be made up as {other}")),
    };
    Tensor::new(shape, data).map_err(|e| e.to_string())
}
