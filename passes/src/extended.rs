//! A logical graph while it is rewritten: the imported nodes stay as they are, rewriting only appends values and says
//! which earlier values they equal.
//!
//! A rewrite of one value needs one equation; its users are rebuilt over the new value without any, because equal
//! operands give equal results (the checker closes the equations under congruence).

use std::collections::BTreeSet;
use std::sync::Arc;
use tpshard_ir::graph::Output;
use tpshard_ir::spmd::Equation;
use tpshard_ir::{Dim, Graph, Type, ValueId};

/// An imported graph with the values and equations that rewriting has added.
#[derive(Clone, Debug, PartialEq)]
pub struct Extended {
    /// Imported nodes first and unchanged. `graph.outputs` are the imported ones.
    pub graph: Graph,
    /// How many nodes were imported.
    pub imported: usize,
    /// In the order they were derived.
    pub equations: Vec<Equation>,
    /// What the program is to compute now: first state that nothing reads, and the values that define sizes, since what
    /// has such a size depends on them without naming them; then what equals `graph.outputs`, name by name.
    pub outputs: Vec<Output>,
}

impl Extended {
    /// Nothing rewritten yet.
    pub fn new(graph: Graph) -> Extended {
        let defines = |value: ValueId| Output { name: format!("sizes of {value}").into(), value };
        let outputs =
            graph.definers().into_iter().map(defines).chain(graph.outputs.iter().cloned()).collect();
        let imported = graph.len();
        let mut extended = Extended { graph, imported, equations: Vec::new(), outputs };
        let sizes: Vec<Output> = extended.inputs_for_sizes().into_iter().map(defines).collect();
        extended.outputs.splice(0..0, sizes);
        let pasts = extended.unread_pasts();
        extended.outputs.splice(0..0, pasts);
        extended
    }

    /// The pasts that nothing reads, where a state begins anew instead of growing: each has to lie where the present
    /// that succeeds it does, and so is a part of the plan. It goes by the name of its present, like a past that is only
    /// read.
    fn unread_pasts(&self) -> Vec<Output> {
        let live: BTreeSet<ValueId> = self.live().into_iter().collect();
        let unread = |(value, name, _): (ValueId, &Arc<str>, &Type)| {
            let pair = self.graph.states.iter().find(|pair| pair.input == *name)?;
            (!live.contains(&value)).then(|| Output { name: pair.output.clone(), value })
        };
        self.graph.inputs().filter_map(unread).collect()
    }

    /// Inputs of which nothing but their sizes is needed, and no other input has those.
    fn inputs_for_sizes(&self) -> Vec<ValueId> {
        let sizes = |ty: &Type| ty.shape.iter().filter_map(Dim::as_symbol).cloned().collect::<BTreeSet<_>>();
        let live: BTreeSet<ValueId> = self.live().into_iter().collect();
        let mut used: BTreeSet<Arc<str>> =
            live.iter().flat_map(|&value| self.graph.node(value).symbols()).collect();
        used.extend(live.iter().flat_map(|&value| self.graph.ty(value).shape.iter().flat_map(Dim::symbols)));
        for (_, _, ty) in self.graph.inputs().filter(|(value, ..)| live.contains(value)) {
            used.retain(|symbol| !sizes(ty).contains(symbol));
        }
        let mut found = Vec::new();
        for (value, _, ty) in self.graph.inputs().filter(|(value, ..)| !live.contains(value)) {
            let own = sizes(ty);
            if own.iter().any(|symbol| used.contains(symbol)) {
                used.retain(|symbol| !own.contains(symbol));
                found.push(value);
            }
        }
        found
    }

    /// How many of `outputs` are none of the graph's; they are the first.
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

#[cfg(test)]
mod tests {
    use super::*;
    use tpshard_ir::{DType, Op};

    #[test]
    fn an_input_stays_for_its_size_alone_if_no_other_has_it() {
        let ty = |symbol: &str| Type::new(DType::F32, vec![Dim::symbol(symbol)]);
        let sized = |other: &str| {
            let mut graph = Graph::new("sizes");
            let kept = graph.input("kept", ty(other));
            let unread = graph.input("unread", ty("n"));
            let size = graph.add(Op::Size(Dim::symbol("n")), &[]).unwrap();
            for (name, value) in [("kept", kept), ("size", size)] {
                graph.outputs.push(Output { name: name.into(), value });
            }
            (unread, Extended::new(graph))
        };
        let (unread, extended) = sized("m");
        assert_eq!(extended.hidden(), 1);
        assert_eq!(extended.outputs[0].value, unread);
        assert!(extended.live().contains(&unread));
        let (unread, extended) = sized("n");
        assert_eq!(extended.hidden(), 0);
        assert!(!extended.live().contains(&unread));
    }
}
