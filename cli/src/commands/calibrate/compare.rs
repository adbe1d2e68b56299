//! Predictions held against measurements: a profile's collectives, and the steps of models sharded with it.

use super::{Effort, ROUNDS, links, median, report, steps};
use crate::arguments::CalibrateArguments;
use crate::commands::planning;
use crate::failure::{Classify, Failure, Kind, Outcome};
use crate::folder::Folder;
use crate::output;
use crate::rank_program::{RankFile, ShardFile};
use crate::runner::session_failure;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use tpshard_ir::program::Port;
use tpshard_ir::{Bindings, DType, DTypeClass, Data, Tensor};
use tpshard_passes::cost::Profile;
use tpshard_runtime::comm::{CommOptions, Communicator, threads};
use tpshard_runtime::session::{Session, SessionOptions};

/// A step as predicted and as it ran.
struct Compared {
    folder: String,
    ranks: usize,
    predicted: f64,
    measured: f64,
}

pub(crate) fn compare(arguments: &CalibrateArguments, effort: Effort, json: bool) -> Outcome<()> {
    let profile = planning::profile(arguments.profile.as_deref().unwrap_or_default())?;
    let folders: Vec<Folder> = arguments.against.iter().map(|f| Folder::open(f)).collect::<Outcome<_>>()?;
    let mut compared = Vec::new();
    for folder in &folders {
        let plan = Planned::of(folder)?;
        if plan.profile != profile.name {
            let path = folder.path.display();
            let message = format!("{path} was planned for `{}`, not for `{}`", plan.profile, profile.name);
            return Err(Failure::new(Kind::Usage, format!("{message}\nhelp: shard it with this profile")));
        }
        compared.push(Compared {
            folder: folder.path.display().to_string(),
            ranks: folder.ranks,
            predicted: plan.seconds,
            measured: least_step(folder, &plan.dims, effort)?,
        });
    }
    let ranks = profile.shared_ranks.unwrap_or(2).max(2);
    let points = links::between_processes(ranks, arguments.quick, effort)?;
    print(&compared, &points, &profile, json)
}

fn print(compared: &[Compared], points: &[links::Point], profile: &Profile, json: bool) -> Outcome<()> {
    if json {
        let step = |c: &Compared| {
            json!({
                "folder": c.folder,
                "ranks": c.ranks,
                "predicted_seconds": c.predicted,
                "measured_seconds": c.measured,
            })
        };
        let steps: Vec<Value> = compared.iter().map(step).collect();
        let links = report::links_json(points, profile);
        return output::line(json!({ "steps": steps, "collectives": links }));
    }
    output::text(report::links_table(points, profile))?;
    let header = ["ranks", "predicted us", "measured us", "ratio"];
    output::line(format_args!(
        "{:>6}{:>14}{:>14}{:>8}  step of",
        header[0], header[1], header[2], header[3]
    ))?;
    for c in compared {
        let (predicted, measured) = (c.predicted * 1e6, c.measured * 1e6);
        let ratio = c.predicted / c.measured;
        output::line(format_args!(
            "{:>6}{predicted:>14.1}{measured:>14.1}{ratio:>8.2}  {}",
            c.ranks, c.folder
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

fn least_step(folder: &Folder, dims: &Bindings, effort: Effort) -> Outcome<f64> {
    let mut least = f64::INFINITY;
    for _ in 0..ROUNDS {
        least = least.min(step(folder, dims, effort)?);
    }
    Ok(least)
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
    let inputs = match file.program.entries.first() {
        Some(entry) => inputs(&entry.inputs, dims, &folder.path)?,
        None => BTreeMap::new(),
    };
    let mut weights = ShardFile::open(&folder.path, rank)?;
    let options = SessionOptions::default();
    let mut session =
        Session::open(file.program, &mut weights, communicator, &options).map_err(|e| session_failure(&e))?;
    drop(weights);
    steps::timed_steps(&mut session, rank, &inputs, effort.samples)
}

/// Ones of the types and sizes that a program takes.
fn inputs(ports: &[Port], dims: &Bindings, folder: &Path) -> Outcome<BTreeMap<String, Tensor>> {
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
