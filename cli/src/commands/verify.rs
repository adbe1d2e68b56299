//! `tpshard verify`: a folder against golden outputs, or against one rank running the model.

mod bisect;
mod reference;
mod selection;

use super::cases;
use super::planning::import_graphs;
use super::{check_tolerances, comparison_json, tolerances};
use crate::arguments::{MOST_NODES, ModelArguments, Precision, VerifyArguments};
use crate::failure::{Classify, Failure, Kind, Outcome};
use crate::folder::Folder;
use crate::in_process::{observe, program_for};
use crate::output;
use crate::tensors::{self, GoldenPair};
use selection::Selections;
use std::collections::BTreeSet;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use tpshard_frontend::Imported;
use tpshard_ir::{Data, StepId, StepKind, Tensor};
use tpshard_runtime::io::{Comparison, NamedTensors, Tolerance, Tolerances, compare};

pub(crate) fn verify(arguments: &VerifyArguments, json: bool) -> Outcome<()> {
    let folder = Folder::open(&arguments.folder)?.on(arguments.on.device);
    let given = tolerances(&arguments.tolerance)?;
    check_tolerances(&given, folder.names("outputs").iter())?;
    let asked = !(arguments.tolerance.atol.is_empty() && arguments.tolerance.rtol.is_empty());
    let of_range = as_built(&folder)?.dtype.filter(|_| !asked).map(Precision::tolerance);
    let tolerances = Allowed { given, of_range };
    if arguments.bisect {
        return bisect::bisect(arguments, &folder, &tolerances, json);
    }
    let mut report = Report::default();
    match (&arguments.golden, &arguments.model) {
        (Some(golden), None) => {
            for pair in tensors::golden_pairs(golden)? {
                report.add(pair.label.clone(), golden_result(&folder, &pair, &tolerances)?);
            }
        }
        (_, Some(model)) => {
            let pairs = chosen_inputs(arguments, &folder)?;
            let graphs = reference_model(&folder, model)?;
            for (label, inputs) in pairs {
                let imported = cases::chosen(&graphs, &inputs)?;
                let expected = reference::evaluate(imported, &imported.graph, &inputs)?;
                let inputs = only_inputs(&folder, inputs);
                report.add(label, Some(result(&folder, &inputs, &expected, &tolerances)?));
            }
        }
        (None, None) => {
            let message =
                "nothing to compare with\nhelp: --golden FOLDER, or --model FILE with --inputs FILE";
            return Err(Failure::new(Kind::Usage, message));
        }
    }
    report.finish(json)
}

/// By how much results may differ.
struct Allowed {
    given: Tolerances,
    /// The part of an output's range by which its elements may differ, for folders in another precision than the model:
    /// rounding is relative to the numbers that sums are made of, not to the sums.
    of_range: Option<f64>,
}

impl Allowed {
    fn compare(&self, got: &NamedTensors, expected: &NamedTensors) -> Comparison {
        let mut tolerances = self.given.clone();
        if let Some(part) = self.of_range {
            for (name, tensor) in expected {
                let value = (part * range(tensor)).max(self.given.of(name).0);
                tolerances.set_atol(Tolerance { output: Some(name.clone()), value });
            }
        }
        compare(got, expected, &tolerances)
    }
}

/// The largest finite size of an element; 0 for what holds no floats.
fn range(tensor: &Tensor) -> f64 {
    let largest = |sizes: &mut dyn Iterator<Item = f64>| sizes.filter(|x| x.is_finite()).fold(0.0, f64::max);
    match tensor.data() {
        Data::F32(values) => largest(&mut values.iter().map(|x| f64::from(x.abs()))),
        Data::F16(values) => largest(&mut values.iter().map(|x| x.to_f64().abs())),
        Data::BF16(values) => largest(&mut values.iter().map(|x| x.to_f64().abs())),
        _ => 0.0,
    }
}

/// A comparison, and remarks on what was compared.
type Compared = (Comparison, Vec<String>);

/// Comparisons by the name of their inputs, and inputs for which nothing says what should come out.
#[derive(Default)]
struct Report {
    results: Vec<(String, Compared)>,
    not_compared: Vec<String>,
}

impl Report {
    fn add(&mut self, label: String, result: Option<Compared>) {
        match result {
            Some(result) => self.results.push((label, result)),
            None => {
                output::say(format_args!(
                    "warning: {label}: there are no outputs to it, so nothing is compared"
                ));
                self.not_compared.push(label);
            }
        }
    }

    fn finish(self, json: bool) -> Outcome<()> {
        let passed = !self.results.is_empty() && self.results.iter().all(|(_, (c, _))| c.passed());
        let result = json.then(|| {
            let result = |(label, (comparison, notes)): &(String, Compared)| {
                let mut value = comparison_json(label, comparison);
                value["notes"] = notes.clone().into();
                value
            };
            let list: Vec<serde_json::Value> = self.results.iter().map(result).collect();
            serde_json::json!({ "passed": passed, "results": list, "not_compared": self.not_compared })
        });
        if result.is_none() {
            for (label, (comparison, notes)) in &self.results {
                output::line(format_args!("{label}\n{comparison}"))?;
                notes.iter().try_for_each(|note| output::line(format_args!("note: {note}")))?;
            }
        }
        if self.results.is_empty() {
            let message = "no pair was compared: there are inputs, but no outputs to any of them\n\
                           help: put outputs.npz beside inputs.npz, or output_0.pb into test_data_set_0";
            return Err(Failure::new(Kind::Usage, message).with_result(result));
        }
        if !passed {
            return Err(Failure::new(Kind::Mismatch, "outputs are out of tolerance").with_result(result));
        }
        result.map_or(Ok(()), output::line)
    }
}

/// Runs the ranks and compares with `reference`, which holds outputs as the model has them.
fn result(
    folder: &Folder,
    inputs: &NamedTensors,
    reference: &NamedTensors,
    tolerances: &Allowed,
) -> Outcome<Compared> {
    let got = run_processes(folder, inputs)?;
    let selections = Selections::parse(&as_built(folder)?.output)?;
    let comparable = selections.apply(got, reference, &folder.names("outputs"));
    Ok((tolerances.compare(&comparable.got, &comparable.expected), comparable.notes))
}

fn golden_result(folder: &Folder, pair: &GoldenPair, tolerances: &Allowed) -> Outcome<Option<Compared>> {
    let Some(outputs) = &pair.outputs else { return Ok(None) };
    let inputs = tensors::read(&pair.inputs, &folder.names("inputs"))?;
    let mut expected = tensors::read_expected(outputs, &model_outputs(folder))?;
    // A folder may have been built for some of the outputs only.
    let selections = Selections::parse(&as_built(folder)?.output)?;
    let built = folder.names("outputs");
    expected.retain(|name, _| built.contains(name) || selections.sources().contains(name.as_str()));
    Ok(Some(result(folder, &only_inputs(folder, inputs), &expected, tolerances)?))
}

/// The names of the model's outputs, in order, by which numbered files are matched: a folder may have been built for
/// some of them.
fn model_outputs(folder: &Folder) -> Vec<String> {
    let names = folder.config.pointer("/build/model/outputs").and_then(serde_json::Value::as_array);
    let names = names.map(|list| list.iter().filter_map(|n| n.as_str().map(str::to_owned)).collect());
    names.unwrap_or_else(|| folder.names("outputs"))
}

/// The graphs of the model with its own outputs, as far as the folder's are made of them.
fn reference_model(folder: &Folder, model: &Path) -> Outcome<Vec<Imported>> {
    let built = as_built(folder)?;
    let selections = Selections::parse(&built.output)?;
    let mut graphs = import_graphs(model, &ModelArguments { output: vec![], ..built }, true)?;
    let names = folder.names("outputs");
    let mut wanted: BTreeSet<&str> = selections.sources();
    wanted.extend(names.iter().map(String::as_str));
    for imported in &mut graphs {
        imported.graph.outputs.retain(|output| wanted.contains(output.name.as_ref()));
        imported.graph.states.clear();
    }
    Ok(graphs)
}

/// Without inputs that the ranks do not take: they were fixed when the folder was built, or no output depends on them.
fn only_inputs(folder: &Folder, inputs: NamedTensors) -> NamedTensors {
    let entries = folder.config.get("entries").and_then(serde_json::Value::as_array);
    let listed: Vec<&serde_json::Value> =
        entries.into_iter().flatten().filter_map(|entry| entry["inputs"].as_array()).flatten().collect();
    // An input of the model that no step of the program reads is listed without a layout.
    let taken = |name: &str| listed.iter().any(|port| port["name"] == name && port["layout"].is_string());
    inputs.into_iter().filter(|(name, _)| taken(name)).collect()
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
            command.args(["--device", folder.device.name()]);
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
            match std::fs::DirBuilder::new().mode(0o700).create(&path) {
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

/// All inputs that the flags name; the model may have some that the ranks do not take.
fn chosen_inputs(arguments: &VerifyArguments, folder: &Folder) -> Outcome<Vec<(String, NamedTensors)>> {
    let names = folder.names("inputs");
    let read = |path: &Path| tensors::read(path, &names);
    if let Some(path) = &arguments.inputs {
        return Ok(vec![(path.display().to_string(), read(path)?)]);
    }
    let Some(golden) = &arguments.golden else {
        return Err(Failure::new(Kind::Usage, "no inputs\nhelp: --inputs FILE, or --golden FOLDER"));
    };
    tensors::golden_pairs(golden)?.into_iter().map(|pair| Ok((pair.label, read(&pair.inputs)?))).collect()
}

/// The import flags that the folder was built with.
pub(crate) fn as_built(folder: &Folder) -> Outcome<ModelArguments> {
    let list = |key: &str| {
        let found = folder.config.pointer(&format!("/build/{key}")).and_then(serde_json::Value::as_array);
        found.into_iter().flatten().filter_map(|v| v.as_str().map(str::to_owned)).collect()
    };
    let dtype = match folder.config.pointer("/build/dtype").and_then(serde_json::Value::as_str) {
        None => None,
        Some(name) => {
            let known = Precision::ALL.into_iter().find(|precision| precision.dtype().name() == name);
            Some(known.ok_or_else(|| {
                let path = folder.path.display();
                let help = "help: use the tpshard that wrote the folder, or shard the model again";
                Failure::new(
                    Kind::Mismatch,
                    format!("{path}: was built with --dtype {name}, which is not known\n{help}"),
                )
            })?)
        }
    };
    Ok(ModelArguments {
        bind: list("bind"),
        output: list("outputs"),
        role: list("roles"),
        dtype,
        max_nodes: MOST_NODES,
    })
}

/// Values of ONNX nodes decoded from the ranks, for `run --tap`.
pub(crate) fn tapped(folder: &Folder, inputs: &NamedTensors, nodes: &[String]) -> Outcome<NamedTensors> {
    let program = program_for(folder, inputs)?;
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
