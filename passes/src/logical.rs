//! Other ways to compute the same values: what the planner may choose from besides the operations of the model.
//!
//! Alternatives are appended to the graph together with what they equal. Those that a plan uses stay in its program, as
//! equations that a checker can follow; all others are removed again.

use crate::egraph::logical::{Found, Line, Source, saturate};
use crate::extended::Extended;
use std::collections::{BTreeMap, BTreeSet};
use tpshard_ir::{
    Graph, InferError, Mesh, Node, Op, Scalar, Spmd, SpmdOutput, Step, StepKind, Type, ValueId,
};

/// A graph with alternatives appended.
#[derive(Clone)]
pub struct Alternatives {
    pub extended: Extended,
    /// How many nodes there were before.
    pub base: usize,
    /// Pairs of equal values: earlier equations, then one per alternative.
    pub equal: Vec<(ValueId, ValueId)>,
    /// Per alternative: its rule, and the pair it makes equal.
    rules: Vec<(&'static str, ValueId, ValueId)>,
}

/// No alternatives: every value is computed as the graph says.
pub fn no_alternatives(extended: Extended) -> Alternatives {
    Alternatives { base: extended.graph.len(), extended, equal: Vec::new(), rules: Vec::new() }
}

/// The alternatives to the operations of `extended`, found once per distinct segment.
///
/// # Errors
/// An operation does not fit its operands.
pub fn alternatives(mut extended: Extended) -> Result<Alternatives, InferError> {
    let base = extended.graph.len();
    let mut equal: Vec<(ValueId, ValueId)> = extended.equations.iter().map(|e| (e.left, e.right)).collect();
    let mut rules = Vec::new();
    let mut known: BTreeMap<(Vec<Type>, Vec<Line>), Found> = BTreeMap::new();
    for segment in pieces(&extended) {
        let (outside, lines) = describe(&extended.graph, &segment);
        let types: Vec<Type> = outside.iter().map(|&v| extended.graph.ty(v).clone()).collect();
        let found = known.entry((types, lines)).or_insert_with_key(|(types, lines)| saturate(types, lines));
        let places: Vec<ValueId> = outside.iter().chain(&segment).copied().collect();
        let mut names: Vec<ValueId> = Vec::new();
        for (op, operands) in &found.operations {
            let args: Vec<ValueId> = operands.iter().filter_map(|o| place(*o, &places, &names)).collect();
            let name = extended.graph.add(op.clone(), &args)?;
            if let Some(last) = segment.last() {
                let origin = extended.graph.node(*last).origin.clone();
                extended.graph.set_origin(name, &origin);
            }
            names.push(name);
        }
        for &(rule, left, right) in &found.equal {
            if let (Some(left), Some(right)) = (place(left, &places, &names), place(right, &places, &names)) {
                equal.push((left, right));
                rules.push((rule, left, right));
            }
        }
    }
    Ok(Alternatives { extended, base, equal, rules })
}

fn place(source: Source, places: &[ValueId], names: &[ValueId]) -> Option<ValueId> {
    match source {
        Source::Known(at) => places.get(at as usize).copied(),
        Source::Found(at) => names.get(at as usize).copied(),
    }
}

/// The live operations of a graph in short runs: each ends with a composite or a product, which rules start from, and
/// holds what it is computed from as far as rules look.
fn pieces(extended: &Extended) -> Vec<Vec<ValueId>> {
    let graph = &extended.graph;
    let mut all = Vec::new();
    for value in extended.live() {
        let node = graph.node(value);
        let product = |a: &ValueId| matches!(graph.node(*a).op, Op::Einsum(_));
        if node.op.is_composite() {
            all.push(vec![value]);
        } else if matches!(node.op, Op::Map(Scalar::Mul))
            && node.args.iter().any(|a| graph.ty(*a).rank() == 0)
            && let Some(&inner) = node.args.iter().find(|a| product(a))
        {
            all.push(vec![inner, value]);
        }
    }
    all
}

/// A segment without names: what it reads from outside, and its operations.
fn describe(graph: &Graph, segment: &[ValueId]) -> (Vec<ValueId>, Vec<Line>) {
    let mut outside: Vec<ValueId> = Vec::new();
    for &value in segment {
        for &arg in &graph.node(value).args {
            if !segment.contains(&arg) && !outside.contains(&arg) {
                outside.push(arg);
            }
        }
    }
    let line = |&value: &ValueId| {
        let node = graph.node(value);
        let find = |a: &ValueId| {
            let inside = || segment.iter().position(|v| v == a).map(|p| p + outside.len());
            outside.iter().position(|v| v == a).or_else(inside)
        };
        let operands = node.args.iter().filter_map(find).map(|p| p as u32).collect();
        Line { op: node.op.clone(), ty: node.ty.clone(), operands }
    };
    let lines = segment.iter().map(line).collect();
    (outside, lines)
}

impl Alternatives {
    /// What the outputs and all alternatives depend on; ascending. An alternative may consist of imported values that
    /// canonicalisation had replaced.
    pub fn live(&self) -> Vec<ValueId> {
        let graph = &self.extended.graph;
        let mut live = vec![false; graph.len()];
        let outputs = self.extended.outputs.iter().map(|o| o.value);
        let alternatives = self.equal.iter().flat_map(|&(left, right)| [left, right]);
        for value in outputs.chain(alternatives) {
            live[value.index()] = true;
        }
        for (id, node) in graph.values().rev() {
            if live[id.index()] {
                node.args.iter().for_each(|a| live[a.index()] = true);
            }
        }
        graph.values().map(|(id, _)| id).filter(|id| live[id.index()]).collect()
    }

    /// The program of the chosen steps, with the alternatives they use and nothing else appended.
    pub fn into_program(self, mesh: Mesh, mut steps: Vec<Step>, outputs: Vec<SpmdOutput>) -> Spmd {
        let Alternatives { mut extended, base, rules, .. } = self;
        let mut used: BTreeSet<ValueId> =
            steps.iter().map(|s| s.value).filter(|v| v.index() >= base).collect();
        let needed: Vec<_> = rules.into_iter().filter(|(_, _, right)| used.contains(right)).collect();
        let named = needed.iter().flat_map(|(_, left, right)| [*left, *right]);
        used.extend(named.filter(|v| v.index() >= base));
        rebuild(&mut extended.graph, &mut steps);
        used.extend(steps.iter().map(|s| s.value).filter(|v| v.index() >= base));
        for index in (base..extended.graph.len()).rev() {
            let value = ValueId(index as u32);
            if used.contains(&value) {
                let args = &extended.graph.node(value).args;
                used.extend(args.iter().filter(|a| a.index() >= base));
            }
        }
        let mut names: Vec<ValueId> = (0..base as u32).map(ValueId).collect();
        let mut graph = tpshard_ir::Graph::new(&extended.graph.name);
        graph.outputs = extended.graph.outputs.clone();
        graph.guards = extended.graph.guards.clone();
        graph.states = extended.graph.states.clone();
        graph.cases = extended.graph.cases.clone();
        graph.borders = extended.graph.borders.clone();
        graph.symbols = extended.graph.symbols.clone();
        for (value, node) in extended.graph.values() {
            if value.index() >= base && !used.contains(&value) {
                names.push(value);
                continue;
            }
            let mut node = node.clone();
            node.args.iter_mut().for_each(|a| *a = names[a.index()]);
            let name = graph.push(node);
            if value.index() >= base {
                names.push(name);
            }
        }
        steps.iter_mut().for_each(|s| s.value = names[s.value.index()]);
        for (rule, left, right) in needed {
            extended.equate(rule, names[left.index()], names[right.index()]);
        }
        Spmd {
            mesh,
            logical: graph,
            imported: extended.imported,
            equations: extended.equations,
            steps,
            outputs,
        }
    }
}

/// Lets every step name a value whose operands are exactly those that the step reads: users of an alternative are
/// rebuilt over it. Equal operands give equal results, so this needs no equations.
fn rebuild(graph: &mut Graph, steps: &mut [Step]) {
    let mut known: BTreeMap<(ValueId, Vec<ValueId>), ValueId> = BTreeMap::new();
    for index in 0..steps.len() {
        let operands: Vec<ValueId> = steps[index].args.iter().map(|a| steps[a.index()].value).collect();
        let value = steps[index].value;
        steps[index].value = match steps[index].kind {
            StepKind::Convert(_) => operands.first().copied().unwrap_or(value),
            StepKind::Compute if operands == graph.node(value).args => value,
            StepKind::Compute => *known.entry((value, operands)).or_insert_with_key(|(value, operands)| {
                graph.push(Node { args: operands.clone(), ..graph.node(*value).clone() })
            }),
        };
    }
}
