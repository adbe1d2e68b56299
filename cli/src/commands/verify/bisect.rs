//! `verify --bisect`: which ONNX node first makes a value that differs from one rank's.
//!
//! The reference is the model as imported anew, never the certificate's own graph: a rewrite that was wrong would agree
//! with itself. The certificate only says which of the imported values a step's value is to be equal to, by its
//! equations and because equal operations on equal operands are equal; that claim is what is tested. Values that only the
//! rewritten graph has are compared with what the certificate says they are, and counted apart: that shows a rank that
//! does something else at its own node, and proves nothing of the rewrite.

use super::reference::evaluate;
use super::selection::{at, at_axis};
use super::{Allowed, as_built, chosen_inputs, only_inputs};
use crate::arguments::VerifyArguments;
use crate::commands::cases;
use crate::commands::planning::import_graphs;
use crate::failure::{Failure, Kind, Outcome};
use crate::folder::Folder;
use crate::in_process::{Observed, observe, program_for};
use crate::output;
use std::collections::{BTreeMap, HashMap};
use tpshard_codegen::build::model_text;
use tpshard_frontend::Imported;
use tpshard_ir::border::{Present, changes, handed_out};
use tpshard_ir::graph::Output;
use tpshard_ir::{Graph, Op, Spmd, StepId, StepKind, Tensor, ValueId};
use tpshard_runtime::io::NamedTensors;

/// A step and the value of the logical graph it is compared with: an imported one, if the certificate says which.
struct Point {
    step: StepId,
    equals: ValueId,
    of_model: bool,
}

/// How much was compared.
#[derive(Default)]
struct Tally {
    /// With the model's.
    values: usize,
    outputs: usize,
    /// With what the certificate says, for want of one of the model's.
    by_certificate: usize,
    /// Nothing came back to compare.
    not_compared: usize,
}

/// Something that differs.
struct Difference {
    origin: String,
    op: String,
    step: Option<StepId>,
    layout: String,
    /// The headline.
    place: String,
    detail: String,
}

pub(super) fn bisect(
    arguments: &VerifyArguments,
    folder: &Folder,
    tolerances: &Allowed,
    json: bool,
) -> Outcome<()> {
    let model = match (&arguments.model, &arguments.golden) {
        (Some(model), _) => model.clone(),
        (None, Some(golden)) if golden.join("model.onnx").is_file() => golden.join("model.onnx"),
        _ => {
            let message =
                "--bisect needs the model\nhelp: --model FILE, or --golden FOLDER with model.onnx in it";
            return Err(Failure::new(Kind::Usage, message));
        }
    };
    let graphs = import_graphs(&model, &as_built(folder)?, true)?;
    same_texts(folder, &graphs)?;
    let mut tally = Tally::default();
    let pairs = chosen_inputs(arguments, folder)?;
    for (label, inputs) in &pairs {
        let program = program_for(folder, &only_inputs(folder, inputs.clone()))?;
        let imported = cases::chosen(&graphs, inputs)?;
        same_graph(&program, imported)?;
        let points = points(&program);
        if let Some(found) = compare_all(folder, imported, &program, &points, inputs, tolerances, &mut tally)?
        {
            return Err(told(label, &found, json));
        }
    }
    if tally.values == 0 || tally.outputs == 0 {
        let message = format!(
            "nothing was compared: {} values and {} outputs have a reference\n\
             help: the program shares no value with the model; build the folder again",
            tally.values, tally.outputs
        );
        return Err(Failure::new(Kind::Mismatch, message));
    }
    if json {
        return output::line(serde_json::json!({
            "passed": true, "pairs": pairs.len(), "compared": tally.values, "outputs": tally.outputs,
            "by_certificate": tally.by_certificate, "not_compared": tally.not_compared,
        }));
    }
    output::line(format_args!(
        "{} values and {} outputs agree with one rank's on {} inputs; {} values that the model has not agree \
         with the certificate, {} were not compared",
        tally.values,
        tally.outputs,
        pairs.len(),
        tally.by_certificate,
        tally.not_compared
    ))
}

fn told(label: &str, found: &Difference, json: bool) -> Failure {
    let result = json.then(|| {
        serde_json::json!({
            "passed": false, "input": label, "node": found.origin, "op": found.op,
            "step": found.step.map(|step| step.0), "layout": found.layout, "detail": found.detail,
        })
    });
    Failure::new(Kind::Mismatch, format!("{label}: {}\n{}", found.place, found.detail)).with_result(result)
}

/// The folder's imported graphs are the model's, or there is nothing to bisect.
fn same_texts(folder: &Folder, graphs: &[Imported]) -> Outcome<()> {
    graphs
        .iter()
        .enumerate()
        .try_for_each(|(index, imported)| same_text(folder, &model_text(index), imported))
}

fn same_text(folder: &Folder, name: &str, imported: &Imported) -> Outcome<()> {
    let (own, model) = (folder.text(name)?, tpshard_ir::text::print_graph(&imported.graph));
    if own == model {
        return Ok(());
    }
    let (mut ours, mut theirs) = (own.lines(), model.lines());
    let mut number = 0;
    let (a, b) = loop {
        number += 1;
        match (ours.next(), theirs.next()) {
            (Some(a), Some(b)) if a == b => {}
            (a, b) => break (a.unwrap_or("(the end)"), b.unwrap_or("(the end)")),
        }
    };
    Err(Failure::new(
        Kind::Mismatch,
        format!(
            "{name} is not what the model imports to; line {number} is the first that differs\n  \
             the folder: {a}\n  the model:  {b}\nhelp: name the model the folder was built from, or build it again"
        ),
    ))
}

/// The certificate starts from the imported graph.
fn same_graph(program: &Spmd, imported: &Imported) -> Outcome<()> {
    let own = program.logical.values().take(program.imported);
    let apart = own.zip(imported.graph.nodes()).find(|((_, a), b)| a != b).map(|((value, node), _)| {
        let origin = if node.origin.is_empty() { "(no ONNX node)" } else { node.origin.as_ref() };
        format!("{value} ({}), of node {origin}", node.op.name())
    });
    let apart = apart.or_else(|| {
        let (own, model) = (program.imported, imported.graph.len());
        (own != model).then(|| format!("it has {own} imported values, the model {model}"))
    });
    match apart {
        Some(what) => Err(Failure::new(
            Kind::Mismatch,
            format!("the certificate does not start from the model; the first difference: {what}"),
        )),
        None => Ok(()),
    }
}

/// The steps that make something of the inputs, in order: the first family of each value, and all its conversions.
fn points(program: &Spmd) -> Vec<Point> {
    let classes = classes(program);
    let mut seen = std::collections::BTreeSet::new();
    program
        .steps
        .iter()
        .enumerate()
        .filter(|(_, step)| program.logical.nodes().get(step.value.index()).is_some_and(|n| !n.op.is_leaf()))
        .filter(|(_, step)| step.kind != StepKind::Compute || seen.insert(step.value))
        .map(|(index, step)| {
            let least = classes.get(step.value.index()).copied().unwrap_or(usize::MAX);
            let of_model = least < program.imported;
            let equals = if of_model { ValueId(least as u32) } else { step.value };
            Point { step: StepId(index as u32), equals, of_model }
        })
        .collect()
}

/// For every logical value, the first that the certificate says it is equal to.
fn classes(program: &Spmd) -> Vec<usize> {
    let graph = &program.logical;
    let mut parent: Vec<usize> = (0..graph.len()).collect();
    fn root(parent: &[usize], mut value: usize) -> usize {
        while parent[value] != value {
            value = parent[value];
        }
        value
    }
    loop {
        let mut changed = false;
        let mut join = |parent: &mut Vec<usize>, a: usize, b: usize| {
            let (a, b) = (root(parent, a), root(parent, b));
            if a != b {
                parent[a.max(b)] = a.min(b);
                changed = true;
            }
        };
        for equation in &program.equations {
            join(&mut parent, equation.left.index(), equation.right.index());
        }
        let mut known: HashMap<(&Op, Vec<usize>), usize> = HashMap::new();
        for (value, node) in graph.values() {
            let args = node.args.iter().map(|arg| root(&parent, arg.index())).collect();
            let first = *known.entry((&node.op, args)).or_insert(value.index());
            join(&mut parent, first, value.index());
        }
        if !changed {
            return (0..graph.len()).map(|value| root(&parent, value)).collect();
        }
    }
}

/// Runs the ranks and the reference on one set of inputs; the first difference, in the order of the program.
fn compare_all(
    folder: &Folder,
    imported: &Imported,
    program: &Spmd,
    points: &[Point],
    inputs: &NamedTensors,
    tolerances: &Allowed,
    tally: &mut Tally,
) -> Outcome<Option<Difference>> {
    let reference = Reference::of(imported, program, points, inputs)?;
    let given = only_inputs(folder, inputs.clone());
    let observed = observe(folder, &given, &points.iter().map(|p| p.step).collect::<Vec<_>>())?;
    for point in points {
        let equals = point.equals;
        let detail = match observed.taps.get(&point.step) {
            Some(Ok(got)) => reference.difference(&equals.to_string(), equals, got, tolerances)?,
            Some(Err(error)) => Some(error.clone()),
            None => {
                tally.not_compared += 1;
                continue;
            }
        };
        if let Some(detail) = detail {
            return Ok(Some(at_step(program, point, detail)));
        }
        if point.of_model {
            tally.values += 1;
        } else {
            tally.by_certificate += 1;
        }
    }
    outputs(imported, &observed, &reference, tolerances, tally)
}

fn at_step(program: &Spmd, point: &Point, detail: String) -> Difference {
    let id = point.step;
    let step = &program.steps[id.index()];
    let node = program.logical.node(step.value);
    let own = if node.origin.is_empty() { &program.logical.node(point.equals).origin } else { &node.origin };
    let origin = if own.is_empty() { "(no ONNX node)".to_owned() } else { own.to_string() };
    let op = match &step.kind {
        StepKind::Compute => node.op.name(),
        StepKind::Convert(conversion) => conversion.name(),
    };
    let place = format!(
        "the first value that differs from one rank's: node {origin}, {id} = {} ({op}) in {}",
        step.value, step.layout
    );
    Difference { origin, op: op.into(), step: Some(id), layout: step.layout.to_string(), place, detail }
}

/// What left the program: all conversions and the way back to rank 0 included.
fn outputs(
    imported: &Imported,
    observed: &Observed,
    reference: &Reference<'_>,
    tolerances: &Allowed,
    tally: &mut Tally,
) -> Outcome<Option<Difference>> {
    for output in &imported.graph.outputs {
        let node = imported.graph.node(output.value);
        let detail = match observed.outputs.get(output.name.as_ref()) {
            Some(got) => reference.difference(&output.name, output.value, got, tolerances)?,
            None => Some("it did not come out".into()),
        };
        tally.outputs += 1;
        if let Some(detail) = detail {
            let origin = if node.origin.is_empty() { "(no ONNX node)" } else { node.origin.as_ref() };
            return Ok(Some(Difference {
                origin: origin.into(),
                op: node.op.name().into(),
                step: None,
                layout: String::new(),
                place: format!(
                    "output `{}` (node {origin}) differs from one rank's, although all compared values before it \
                     agree: it is lost on its way out of the ranks",
                    output.name
                ),
                detail,
            }));
        }
    }
    Ok(None)
}

/// Values on one rank. The logical graph begins with the imported one, as was checked before.
struct Reference<'a> {
    graph: &'a Graph,
    values: BTreeMap<String, Tensor>,
    /// Outputs that leave the ranks as long as the buffers that were given.
    presents: Vec<Present>,
}

impl Reference<'_> {
    fn of<'a>(
        imported: &Imported,
        program: &'a Spmd,
        points: &[Point],
        inputs: &NamedTensors,
    ) -> Outcome<Reference<'a>> {
        let mut wanted: Vec<ValueId> = points.iter().map(|point| point.equals).collect();
        wanted.extend(imported.graph.outputs.iter().map(|output| output.value));
        for value in wanted.clone() {
            wanted.extend(ranking(&program.logical, value).map(|(scores, _)| scores));
        }
        wanted.sort();
        wanted.dedup();
        let mut graph = program.logical.clone();
        graph.states.clear();
        graph.guards.clone_from(&imported.graph.guards);
        graph.symbols.clone_from(&imported.graph.symbols);
        graph.outputs =
            wanted.into_iter().map(|value| Output { name: value.to_string().into(), value }).collect();
        let values = evaluate(imported, &graph, inputs)?.into_iter().collect();
        let changes = changes(&imported.graph, &|name| inputs.get(name).map(Tensor::ty));
        let presents = changes.into_iter().filter_map(|change| change.present).collect();
        Ok(Reference { graph: &program.logical, values, presents })
    }

    fn value(&self, value: ValueId) -> Outcome<&Tensor> {
        let found = self.values.get(&value.to_string());
        found.ok_or_else(|| Failure::new(Kind::Internal, format!("the reference made no {value}")))
    }

    /// How `got` differs from a value. Positions that a sort makes are compared by what lies there, because
    /// equal scores may come in any order.
    fn difference(
        &self,
        name: &str,
        value: ValueId,
        got: &Tensor,
        tolerances: &Allowed,
    ) -> Outcome<Option<String>> {
        let expected = match self.presents.iter().find(|present| *present.output == *name) {
            Some(present) => {
                &present.filled(self.value(value)?).map_err(|what| Failure::new(Kind::Internal, what))?
            }
            None => self.value(value)?,
        };
        let given = handed_out(self.graph, name, expected);
        let expected = given.as_ref().unwrap_or(expected);
        let (got, expected) = match ranking(self.graph, value) {
            Some((scores, axis)) if got.shape() == expected.shape() && got.dtype() == expected.dtype() => {
                let scores = self.value(scores)?;
                match (lying_at(scores, got, axis), lying_at(scores, expected, axis)) {
                    (Ok(got), Ok(expected)) => (got, expected),
                    (Err(what), _) | (_, Err(what)) => return Ok(Some(format!("{name}: {what}"))),
                }
            }
            _ => (got.clone(), expected.clone()),
        };
        let named = |tensor: Tensor| NamedTensors::from_iter([(name.to_owned(), tensor)]);
        let comparison = tolerances.compare(&named(got), &named(expected));
        Ok((!comparison.passed()).then(|| comparison.to_string()))
    }
}

/// The scores and the axis whose sorted positions `value` is, possibly without its last dim of one.
fn ranking(graph: &Graph, value: ValueId) -> Option<(ValueId, usize)> {
    let node = graph.node(value);
    let sort = match &node.op {
        Op::Reshape { .. } => graph.node(*node.args.first()?),
        _ => node,
    };
    match (&sort.op, sort.args.first()) {
        (Op::TopK { axis, .. }, Some(&scores)) => Some((scores, *axis)),
        _ => None,
    }
}

fn lying_at(scores: &Tensor, positions: &Tensor, axis: usize) -> Result<Tensor, String> {
    if positions.shape().len() == scores.shape().len() {
        return at_axis(scores, positions, axis);
    }
    let mut shape = positions.shape().to_vec();
    shape.push(1);
    at(scores, &positions.clone().reshaped(shape).map_err(|e| e.to_string())?)
}
