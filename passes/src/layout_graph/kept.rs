//! Layouts that another graph of the model has chosen: both read the same bytes, so what lies in memory for one of them
//! lies there for the other. Everything that would store it once more is taken out of the layout graph.

use super::{GroupKind, LayoutGraph};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tpshard_ir::weight::WeightExpr;
use tpshard_ir::{Graph, Layout, Mesh, Op, Spmd, StepKind, ValueId};

/// What is stored, by a name that several graphs of one model have in common.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum StoredName {
    Weight(WeightExpr),
    State(Arc<str>),
}

impl StoredName {
    /// The name of `value`, if it is a weight or the past of a state.
    pub fn of(graph: &Graph, value: ValueId) -> Option<StoredName> {
        match &graph.node(value).op {
            Op::Weight(expression) => Some(StoredName::Weight(expression.clone())),
            Op::Input { name } if graph.states.iter().any(|s| s.input == *name) => {
                Some(StoredName::State(name.clone()))
            }
            _ => None,
        }
    }
}

impl std::fmt::Display for StoredName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            StoredName::Weight(expression) => {
                f.write_str(&expression.initializers().into_iter().collect::<Vec<_>>().join("+"))
            }
            StoredName::State(name) => f.write_str(name),
        }
    }
}

/// The layouts in which programs have weights and state in memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Kept {
    pub mesh: Mesh,
    pub layouts: BTreeMap<StoredName, BTreeSet<Layout>>,
    /// Initializers of which something is kept are read in no other form, such as whole where slices are kept.
    pub only: bool,
}

/// No layout in which a value lies in memory already serves the graph.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
#[error(
    "`{name}` lies in memory as {kept} for another graph of the model, and this one cannot use it so\n\
     help: bind the input that chooses between them (--bind), and shard the graphs one by one"
)]
pub struct KeptError {
    pub name: String,
    pub kept: String,
}

impl Kept {
    /// Nothing yet.
    pub fn on(mesh: Mesh) -> Kept {
        Kept { mesh, layouts: BTreeMap::new(), only: true }
    }

    fn initializers(&self) -> BTreeSet<&str> {
        let weights = self.layouts.keys().filter_map(|name| match name {
            StoredName::Weight(expression) => Some(expression.initializers()),
            StoredName::State(_) => None,
        });
        weights.flatten().collect()
    }

    /// Adds what `program` has in memory.
    pub fn add(&mut self, program: &Spmd) {
        for step in program.steps.iter().filter(|step| step.kind == StepKind::Compute) {
            if let Some(name) = StoredName::of(&program.logical, step.value) {
                self.layouts.entry(name).or_default().insert(step.layout.clone());
            }
        }
    }
}

/// Takes everything out of `layouts` that stores what is kept in another layout, or in another form.
///
/// # Errors
/// Nothing is left of some value that is kept.
pub(crate) fn apply(layouts: &mut LayoutGraph, graph: &Graph, kept: &Kept) -> Result<(), KeptError> {
    let read = kept.initializers();
    let other_form = |value: ValueId| match &graph.node(value).op {
        Op::Weight(expression) => {
            kept.only && expression.initializers().into_iter().any(|name| read.contains(name))
        }
        _ => false,
    };
    for group in layouts.groups.iter_mut().filter(|group| group.kind == GroupKind::Stored) {
        let known = |value: ValueId| {
            StoredName::of(graph, value).and_then(|name| Some((kept.layouts.get(&name)?, name)))
        };
        let Some((some, name)) = group.productions.iter().find_map(|p| known(p.value)) else {
            group.productions.retain(|p| !other_form(p.value));
            continue;
        };
        let own = group.layouts.clone();
        group.productions.retain(|p| {
            let layout = own.get(usize::from(p.out) % own.len().max(1));
            known(p.value).is_some_and(|(kept, _)| layout.is_some_and(|layout| kept.contains(layout)))
        });
        if group.productions.is_empty() {
            let kept = some.iter().map(Layout::to_string).collect::<Vec<_>>().join(" and ");
            return Err(KeptError { name: name.to_string(), kept });
        }
    }
    Ok(())
}
