//! Other ways to compute the same values: what the planner may choose from besides the operations of the model.
//!
//! Alternatives are appended to the graph together with what they equal. Those that a plan uses stay in its program, as
//! equations that a checker can follow; all others are removed again.

use crate::extended::Extended;
use std::collections::BTreeSet;
use tpshard_ir::{InferError, Mesh, Spmd, SpmdOutput, Step, ValueId};

/// A graph with alternatives appended.
pub struct Alternatives {
    pub extended: Extended,
    /// How many nodes there were before.
    pub base: usize,
    /// Pairs of equal values: earlier equations, then one per alternative.
    pub equal: Vec<(ValueId, ValueId)>,
    /// Per alternative: its rule, and the pair it makes equal.
    rules: Vec<(&'static str, ValueId, ValueId)>,
}

/// The alternatives to the operations of `extended`.
///
/// # Errors
/// An operation does not fit its operands.
pub fn alternatives(extended: Extended) -> Result<Alternatives, InferError> {
    let base = extended.graph.len();
    Ok(Alternatives { extended, base, equal: Vec::new(), rules: Vec::new() })
}

impl Alternatives {
    /// The program of the chosen steps, with the alternatives they use and nothing else appended.
    pub fn into_program(self, mesh: Mesh, mut steps: Vec<Step>, outputs: Vec<SpmdOutput>) -> Spmd {
        let Alternatives { mut extended, base, rules, .. } = self;
        let mut used: BTreeSet<ValueId> = steps.iter().map(|s| s.value).filter(|v| v.index() >= base).collect();
        let needed: Vec<_> = rules.into_iter().filter(|(_, _, right)| used.contains(right)).collect();
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
        Spmd { mesh, logical: graph, imported: extended.imported, equations: extended.equations, steps, outputs }
    }
}
