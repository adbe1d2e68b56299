//! `tpshard verify`: a folder against golden outputs, or against one rank running the model.

use super::planning::import_model;
use super::{check_tolerances, comparison_json, tolerances};
use crate::arguments::{ModelArguments, VerifyArguments};
use crate::failure::{Classify, Failure, Kind, Outcome};
use crate::folder::Folder;
use crate::in_process::{observe, program_of};
use crate::output;
use crate::tensors::{self, GoldenPair};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use tpshard_frontend::Imported;
use tpshard_ir::graph::Output;
use tpshard_ir::interp::{OpError, run_tensors};
use tpshard_ir::{Spmd, StepId, StepKind, Tensor, ValueId};
use tpshard_runtime::io::{Comparison, NamedTensors, Tolerances, compare};

/// Most elements that the reference interpreter may hold.
const REFERENCE_LIMIT: usize = 1 << 30;

pub(crate) fn verify(arguments: &VerifyArguments, json: bool) -> Outcome<()> {
    let folder = Folder::open(&arguments.folder)?;
    let tolerances = tolerances(&arguments.tolerance)?;
    check_tolerances(&tolerances, folder.names("outputs").iter())?;
    if arguments.bisect {
        return bisect(arguments, &folder, &tolerances, json);
    }
    let mut results: Vec<(String, Comparison)> = Vec::new();
    match (&arguments.golden, &arguments.model) {
        (Some(golden), None) => {
            for pair in tensors::golden_pairs(golden)? {
                results.push((pair.label.clone(), golden_result(&folder, &pair, &tolerances)?));
            }
        }
        (_, Some(model)) => {
            let (label, inputs) = chosen_inputs(arguments, &folder)?;
            let imported = import_model(model, &as_built(&folder), true)?;
            let expected = reference(&imported, &inputs)?;
            let got = run_processes(&folder, &inputs)?;
            results.push((label, compare(&got, &expected, &tolerances)));
        }
        (None, None) => {
            let message =
                "nothing to compare with\nhelp: --golden FOLDER, or --model FILE with --inputs FILE";
            return Err(Failure::new(Kind::Usage, message));
        }
    }
    report(&results, json)
}

fn report(results: &[(String, Comparison)], json: bool) -> Outcome<()> {
    let passed = results.iter().all(|(_, c)| c.passed());
    let result = json.then(|| {
        let list: Vec<serde_json::Value> = results.iter().map(|(l, c)| comparison_json(l, c)).collect();
        serde_json::json!({ "passed": passed, "results": list })
    });
    if result.is_none() {
        for (label, comparison) in results {
            output::line(format_args!("{label}\n{comparison}"))?;
        }
    }
    if !passed {
        return Err(Failure::new(Kind::Mismatch, "outputs are out of tolerance").with_result(result));
    }
    result.map_or(Ok(()), output::line)
}

fn golden_result(folder: &Folder, pair: &GoldenPair, tolerances: &Tolerances) -> Outcome<Comparison> {
    let inputs = tensors::read(&pair.inputs, &folder.names("inputs"))?;
    let expected = tensors::read_expected(&pair.outputs, &folder.names("outputs"))?;
    let got = run_processes(folder, &only_inputs(folder, inputs))?;
    // A folder may have been built for some of the outputs only.
    let built = folder.names("outputs");
    let expected: NamedTensors = expected.into_iter().filter(|(name, _)| built.contains(name)).collect();
    Ok(compare(&got, &expected, tolerances))
}

/// Golden files may hold inputs that were fixed when the folder was built.
fn only_inputs(folder: &Folder, inputs: NamedTensors) -> NamedTensors {
    let known = folder.names("inputs");
    inputs.into_iter().filter(|(name, _)| known.contains(name)).collect()
}

/// Runs the ranks as processes, the way `tpshard run` does.
fn run_processes(folder: &Folder, inputs: &NamedTensors) -> Outcome<NamedTensors> {
    let scratch = Scratch::new()?;
    let (given, made) = (scratch.0.join("inputs.npz"), scratch.0.join("outputs.npz"));
    tpshard_runtime::io::write_npz(&given, inputs).or_fail(Kind::Resource)?;
    let commands = (0..folder.ranks)
        .map(|rank| {
            let mut command = Command::new(folder.executable(rank));
            command.arg("--inputs").arg(&given).arg("--outputs").arg(&made);
            command
        })
        .collect();
    super::run::spawn(commands)?;
    tensors::read(&made, &[])
}

/// A private folder that goes away.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Outcome<Scratch> {
        let base = std::env::temp_dir();
        for attempt in 0..100u32 {
            let path = base.join(format!("tpshard-verify-{}-{attempt}", std::process::id()));
            match std::fs::create_dir(&path) {
                Ok(()) => return Ok(Scratch(path)),
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(Failure::new(Kind::Resource, format!("{}: {e}", path.display()))),
            }
        }
        Err(Failure::new(Kind::Resource, format!("{}: no free name", base.display())))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn chosen_inputs(arguments: &VerifyArguments, folder: &Folder) -> Outcome<(String, NamedTensors)> {
    let names = folder.names("inputs");
    if let Some(path) = &arguments.inputs {
        return Ok((path.display().to_string(), only_inputs(folder, tensors::read(path, &names)?)));
    }
    let Some(golden) = &arguments.golden else {
        return Err(Failure::new(Kind::Usage, "no inputs\nhelp: --inputs FILE, or --golden FOLDER"));
    };
    let pairs = tensors::golden_pairs(golden)?;
    let pair = pairs.first().ok_or_else(|| Failure::new(Kind::Usage, "the golden folder is empty"))?;
    Ok((pair.label.clone(), only_inputs(folder, tensors::read(&pair.inputs, &names)?)))
}

/// The import flags that the folder was built with.
pub(crate) fn as_built(folder: &Folder) -> ModelArguments {
    let list = |key: &str| {
        let found = folder.config.pointer(&format!("/build/{key}")).and_then(serde_json::Value::as_array);
        found.into_iter().flatten().filter_map(|v| v.as_str().map(str::to_owned)).collect()
    };
    ModelArguments { bind: list("bind"), output: list("outputs"), role: list("roles") }
}

/// The model on one rank, by the reference interpreter.
fn reference(imported: &Imported, inputs: &NamedTensors) -> Outcome<NamedTensors> {
    evaluate(imported, &imported.graph, inputs)
}

fn evaluate(imported: &Imported, graph: &tpshard_ir::Graph, inputs: &NamedTensors) -> Outcome<NamedTensors> {
    let inputs: BTreeMap<Arc<str>, Tensor> =
        inputs.iter().map(|(name, t)| (Arc::from(name.as_str()), t.clone())).collect();
    let initializer = |name: &str| -> Result<Tensor, OpError> {
        let missing = |what: String| OpError::Other(what);
        let tensor = imported.tensors.get(name).ok_or_else(|| missing(format!("no initializer `{name}`")))?;
        imported.model.storage.to_tensor(tensor).map_err(|e| missing(e.to_string()))
    };
    let outputs = run_tensors(graph, &inputs, &initializer, REFERENCE_LIMIT).or_fail(Kind::Usage)?;
    Ok(outputs.into_iter().map(|(name, t)| (name.to_string(), t)).collect())
}

/// Compares every computed value with one rank's and names the first that differs.
fn bisect(arguments: &VerifyArguments, folder: &Folder, tolerances: &Tolerances, json: bool) -> Outcome<()> {
    let model = match (&arguments.model, &arguments.golden) {
        (Some(model), _) => model.clone(),
        (None, Some(golden)) if golden.join("model.onnx").is_file() => golden.join("model.onnx"),
        _ => {
            let message =
                "--bisect needs the model\nhelp: --model FILE, or --golden FOLDER with model.onnx in it";
            return Err(Failure::new(Kind::Usage, message));
        }
    };
    let imported = import_model(&model, &as_built(folder), true)?;
    let program = program_of(folder)?;
    let (_, inputs) = chosen_inputs(arguments, folder)?;
    let steps = compared_steps(&program);
    let observed = observe(folder, &inputs, &steps.iter().map(|s| s.0).collect::<Vec<_>>())?;
    let expected = reference_values(&imported, &program, &steps, &inputs)?;
    for (step, value) in &steps {
        let node = program.logical.node(*value);
        let name = format!("{step} = {value}");
        let Some(reference) = expected.get(&value.to_string()) else { continue };
        let what = match observed.taps.get(step) {
            Some(Ok(got)) => {
                let pair = |t: &Tensor| NamedTensors::from_iter([(name.clone(), t.clone())]);
                let comparison = compare(&pair(got), &pair(reference), tolerances);
                if comparison.passed() {
                    continue;
                }
                comparison.to_string()
            }
            Some(Err(error)) => error.clone(),
            None => continue,
        };
        let layout = &program.steps[step.index()].layout;
        let origin = if node.origin.is_empty() { "(no ONNX node)" } else { node.origin.as_ref() };
        let result = json.then(|| {
            serde_json::json!({
                "passed": false, "node": origin, "op": node.op.name(), "step": step.0,
                "layout": layout.to_string(), "detail": what,
            })
        });
        return Err(Failure::new(
            Kind::Mismatch,
            format!(
                "the first value that differs from one rank's: node {origin}, {name} ({}) in {layout}\n{what}",
                node.op.name()
            ),
        )
        .with_result(result));
    }
    if json {
        output::line(serde_json::json!({ "passed": true, "compared": steps.len() }))
    } else {
        output::line(format_args!("{} values agree with one rank's", steps.len()))
    }
}

/// The first step of every value that is computed from something.
fn compared_steps(program: &Spmd) -> Vec<(StepId, ValueId)> {
    let mut seen = std::collections::BTreeSet::new();
    program
        .steps
        .iter()
        .enumerate()
        .filter(|(_, step)| step.kind == StepKind::Compute && !program.logical.node(step.value).op.is_leaf())
        .filter(|(_, step)| seen.insert(step.value))
        .map(|(i, step)| (StepId(i as u32), step.value))
        .collect()
}

/// The reference interpreter's values of the steps, by the text of the value.
fn reference_values(
    imported: &Imported,
    program: &Spmd,
    steps: &[(StepId, ValueId)],
    inputs: &NamedTensors,
) -> Outcome<BTreeMap<String, Tensor>> {
    let mut graph = program.logical.clone();
    graph.outputs = steps.iter().map(|(_, v)| Output { name: v.to_string().into(), value: *v }).collect();
    Ok(evaluate(imported, &graph, inputs)?.into_iter().collect())
}

/// Values of ONNX nodes decoded from the ranks, for `run --tap`.
pub(crate) fn tapped(folder: &Folder, inputs: &NamedTensors, nodes: &[String]) -> Outcome<NamedTensors> {
    let program = program_of(folder)?;
    let mut chosen: Vec<(StepId, String)> = Vec::new();
    for name in nodes {
        // The last value that a node became is the node's result.
        let found = program.steps.iter().enumerate().rev().find(|(_, step)| {
            let node = program.logical.node(step.value);
            step.kind == StepKind::Compute
                && (node.origin.as_ref() == name || step.value.to_string() == *name)
        });
        let (index, _) = found.ok_or_else(|| {
            let help = "help: `tpshard inspect DIR --tir` lists the nodes; nodes that were merged into others have no value";
            Failure::new(Kind::Usage, format!("--tap {name}: the program computes no value of that name\n{help}"))
        })?;
        chosen.push((StepId(index as u32), name.clone()));
    }
    let observed = observe(folder, inputs, &chosen.iter().map(|c| c.0).collect::<Vec<_>>())?;
    let mut tensors = observed.outputs;
    for (step, name) in chosen {
        match observed.taps.get(&step) {
            Some(Ok(tensor)) => drop(tensors.insert(format!("tap:{name}"), tensor.clone())),
            Some(Err(error)) => return Err(Failure::new(Kind::Mismatch, format!("--tap {name}: {error}"))),
            None => return Err(Failure::new(Kind::Internal, format!("--tap {name}: no value came back"))),
        }
    }
    Ok(tensors)
}
