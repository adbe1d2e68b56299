//! Models that choose between graphs by a bool input: decoders whose `If` takes one branch for the prompt and another
//! once there is a cache.
//!
//! The input is not data: it says which of two models is meant. The model is lowered once for each value of it, so that
//! both branches become graphs like any other, and nothing about them waits until the model runs. The graphs share
//! names of weights, and their state.

use super::{ImportError, ImportOptions, Imported, Manner, lower, lower_as, state};
use crate::load::load;
use crate::model::{Dim, Graph, Model, Node, ValueInfo};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use tpshard_ir::{Case, DType, Graph as Lowered, StatePair, Type};

/// Most inputs by which a model chooses between graphs; each doubles their number.
pub const MOST_CHOOSING: usize = 2;

/// Operators of one operand through which a choice may go on its way to the condition of an `If`.
const PASSING: [&str; 7] = ["Identity", "Not", "Cast", "Squeeze", "Unsqueeze", "Reshape", "Flatten"];
/// The same of several operands.
const COMBINING: [&str; 3] = ["And", "Or", "Xor"];

/// As [`import`](super::import), with a graph for each value of the inputs by which the model chooses between some;
/// the values are in [`Lowered::cases`], `true` first. One graph without cases if there are no such inputs.
///
/// # Errors
/// As [`import`](super::import).
pub fn import_cases(path: &Path, options: &ImportOptions) -> Result<Vec<Imported>, ImportError> {
    lower_cases(load(path, &options.limits)?, options)
}

/// As [`lower`], with a graph for each case like [`import_cases`].
///
/// # Errors
/// As [`lower`].
pub fn lower_cases(model: Model, options: &ImportOptions) -> Result<Vec<Imported>, ImportError> {
    let choosing = choosing_inputs(&model.graph, options);
    match choosing.len() {
        0 => return Ok(vec![lower(model, options)?]),
        1..=MOST_CHOOSING => {}
        count => {
            let mut imported = lower(model, options)?;
            imported.report.notes.push(format!(
                "{count} inputs choose between graphs, so the choice waits until the model runs; up to {MOST_CHOOSING} \
                 become a graph for each of their values (--bind fixes inputs)"
            ));
            return Ok(vec![imported]);
        }
    }
    let mut all: Vec<Imported> = Vec::new();
    for values in 0..1usize << choosing.len() {
        let value = |at: usize| values >> (choosing.len() - 1 - at) & 1 == 0;
        let cases = choosing.iter().enumerate().map(|(at, name)| (name.clone(), value(at))).collect();
        // A name stands for one tensor in all graphs.
        let tensors = all.last().map(|last| last.tensors.clone()).unwrap_or_default();
        match lower_as(model.clone(), options, Manner { may_defer: true, cases, tensors }) {
            Ok(imported) => all.push(imported),
            // One branch may be beyond what can be lowered, and still never be taken.
            Err(error) => return Ok(vec![waiting(model, options, &choosing, error)?]),
        }
    }
    finish(&mut all, &choosing, options);
    Ok(all)
}

/// The model as one graph whose choice waits until it runs, because a graph of its own cannot be made of some case.
fn waiting(
    model: Model,
    options: &ImportOptions,
    choosing: &[String],
    error: ImportError,
) -> Result<Imported, ImportError> {
    let Ok(mut imported) = lower(model, options) else { return Err(error) };
    let first = error.faults.first().map(ToString::to_string).unwrap_or_default();
    imported.report.notes.push(format!(
        "the choice by {} waits until the model runs, because one of its graphs cannot be made: {}",
        choosing.join(", ").escape_debug(),
        first.lines().next().unwrap_or_default()
    ));
    Ok(imported)
}

/// The inputs that decide which branch an `If` takes, in their order.
fn choosing_inputs(graph: &Graph, options: &ImportOptions) -> Vec<String> {
    let mut nodes = BTreeMap::new();
    let mut open: Vec<&str> = Vec::new();
    let mut graphs = vec![graph];
    while let Some(graph) = graphs.pop() {
        for node in &graph.nodes {
            nodes.extend((0..node.outputs.len()).filter_map(|at| Some((node.output(at)?, node))));
            if node.op_type == "If" && node.domain.is_empty() {
                open.extend(node.input(0));
                graphs.extend(node.subgraphs());
            }
        }
    }
    let mut seen: BTreeSet<&str> = open.iter().copied().collect();
    while let Some(name) = open.pop() {
        let Some(node) = nodes.get(name) else { continue };
        open.extend(passed(node).into_iter().filter(|name| seen.insert(name)));
    }
    let chooses = |input: &&ValueInfo| {
        let free = !options.bindings.contains_key(&input.name);
        free && is_one_bool(input) && seen.contains(input.name.as_str())
    };
    graph.inputs.iter().filter(chooses).map(|input| input.name.clone()).collect()
}

/// The operands that decide the result of a node, if they do so alone.
fn passed(node: &Node) -> Vec<&str> {
    let op = node.op_type.as_str();
    match () {
        () if !node.domain.is_empty() => Vec::new(),
        () if PASSING.contains(&op) => node.input(0).into_iter().collect(),
        () if COMBINING.contains(&op) => (0..node.inputs.len()).filter_map(|at| node.input(at)).collect(),
        () => Vec::new(),
    }
}

fn is_one_bool(input: &ValueInfo) -> bool {
    let Some(ty) = input.tensor_type() else { return false };
    let Some(shape) = &ty.shape else { return false };
    ty.dtype == DType::Bool && shape.len() <= 1 && shape.iter().all(|dim| *dim == Dim::Known(1))
}

/// Says of every graph which case it is, and gives all of them the state that all of them can keep.
fn finish(all: &mut [Imported], choosing: &[String], options: &ImportOptions) {
    let tensors = all.last().map(|last| last.tensors.clone()).unwrap_or_default();
    let states = common_states(all);
    for (index, imported) in all.iter_mut().enumerate() {
        let graph = &mut imported.graph;
        let cases = graph.inputs().filter_map(|(_, name, ty)| {
            let at = choosing.iter().position(|choosing| **choosing == **name)?;
            let value = index >> (choosing.len() - 1 - at) & 1 == 0;
            Some(Case { input: name.clone(), ty: ty.clone(), value })
        });
        graph.cases = cases.collect();
        graph.states.clone_from(&states);
        imported.report.roles = state::roles(graph, &options.roles);
        imported.tensors.clone_from(&tensors);
    }
}

/// The pairs that some graph has found to be state and all can take for state: where nothing is appended to the past,
/// the present begins anew.
fn common_states(all: &[Imported]) -> Vec<StatePair> {
    let mut pairs: Vec<StatePair> = Vec::new();
    for pair in all.iter().flat_map(|imported| &imported.graph.states) {
        if !pairs.iter().any(|known| known.input == pair.input || known.output == pair.output) {
            pairs.push(pair.clone());
        }
    }
    let past = |graph: &Lowered, pair: &StatePair| -> Option<Type> {
        graph.inputs().find(|(_, name, _)| **name == pair.input).map(|(_, _, ty)| ty.clone())
    };
    let fits = |graph: &Lowered, pair: &StatePair| {
        let first = all.first().and_then(|imported| past(&imported.graph, pair));
        let present = graph.outputs.iter().find(|output| output.name == pair.output);
        let (Some(past), Some(present)) = (past(graph, pair), present.map(|o| graph.ty(o.value))) else {
            return false;
        };
        let kept = |axis: usize| axis == pair.axis || past.shape.get(axis) == present.shape.get(axis);
        let contradicts = graph
            .states
            .iter()
            .any(|own| (own.input == pair.input || own.output == pair.output) && own != pair);
        !contradicts
            && first.as_ref() == Some(&past)
            && past.dtype == present.dtype
            && past.rank() == present.rank()
            && (0..past.rank()).all(kept)
    };
    pairs.retain(|pair| all.iter().all(|imported| fits(&imported.graph, pair)));
    let place = |pair: &StatePair| {
        let graph = all.first().map(|imported| &imported.graph);
        graph.and_then(|graph| graph.inputs().position(|(_, name, _)| *name == pair.input))
    };
    pairs.sort_by_key(place);
    pairs
}
