//! A logical graph while it is rewritten: the imported nodes stay as they are, rewriting only appends values and says
//! which earlier values they equal.
//!
//! A rewrite of one value needs one equation; its users are rebuilt over the new value without any, because equal
//! operands give equal results (the checker closes the equations under congruence).

use std::sync::Arc;
use tpshard_ir::graph::Output;
use tpshard_ir::spmd::Equation;
use tpshard_ir::{Graph, ValueId};

/// An imported graph with the values and equations that rewriting has added.
#[derive(Clone, Debug, PartialEq)]
pub struct Extended {
    /// Imported nodes first and unchanged. `graph.outputs` are the imported ones.
    pub graph: Graph,
    /// How many nodes were imported.
    pub imported: usize,
    /// In the order they were derived.
    pub equations: Vec<Equation>,
    /// What the program is to compute now: first the values that define sizes, since what has such a size depends on them
    /// without naming them; then what equals `graph.outputs`, name by name.
    pub outputs: Vec<Output>,
}

impl Extended {
    /// Nothing rewritten yet.
    pub fn new(graph: Graph) -> Extended {
        let defines = |value: ValueId| Output { name: format!("sizes of {value}").into(), value };
        let outputs =
            graph.definers().into_iter().map(defines).chain(graph.outputs.iter().cloned()).collect();
        let imported = graph.len();
        Extended { graph, imported, equations: Vec::new(), outputs }
    }

    /// How many of `outputs` only define sizes; they are the first.
    pub fn hidden(&self) -> usize {
        self.outputs.len().saturating_sub(self.graph.outputs.len())
    }

    /// Records `left = right`.
    pub fn equate(&mut self, rule: &str, left: ValueId, right: ValueId) {
        if left != right {
            self.equations.push(Equation { rule: Arc::from(rule), left, right });
        }
    }

    /// The values the outputs depend on, ascending.
    pub fn live(&self) -> Vec<ValueId> {
        let mut live = vec![false; self.graph.len()];
        for output in &self.outputs {
            live[output.value.index()] = true;
        }
        for (id, node) in self.graph.values().rev() {
            if live[id.index()] {
                node.args.iter().for_each(|a| live[a.index()] = true);
            }
        }
        self.graph.values().map(|(id, _)| id).filter(|id| live[id.index()]).collect()
    }
}
