//! The planner: from a logical graph and a machine to the typed program of all ranks.

use crate::cost::price::Entry;
use crate::cost::{Pricer, Profile};
use crate::emit::{EmitError, Source, emit};
use crate::extended::Extended;
use crate::extract::{Budget, ExtractError, Extraction, Limits, extract};
use crate::layout_graph::{BuildError, Classes, LayoutGraph, Model, build};
use crate::logical::{Alternatives, alternatives};
use crate::report::{PlanReport, Summary, report};
use crate::sharding::{Units, candidate_units};
use std::collections::BTreeSet;
use tpshard_ir::{Graph, Mesh, Op, Spmd, ValueId};

/// Most ranks a program may have.
pub const MAX_RANKS: usize = 1024;
/// From this many bytes per rank on, memory is what ranks are for.
const LARGE: u64 = 1 << 30;

/// How much memory a rank may use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MemoryGoal {
    /// `Least` for models with state or at least a gibibyte per rank, else `Free`.
    #[default]
    Default,
    /// At most 1.002 times the least possible, vectors left out: they are held whole.
    Least,
    /// No limit: the fastest plan.
    Free,
    Bytes(u64),
}

/// What to plan for.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanOptions {
    pub ranks: usize,
    pub profile: Profile,
    /// Bindings of the symbolic dims, each with its weight. Symbols that none binds are taken for 128.
    pub entries: Vec<Entry>,
    pub memory: MemoryGoal,
    /// Bytes per rank that are not available to weights and state.
    pub reserve: u64,
    pub limits: Limits,
}

impl PlanOptions {
    pub fn new(ranks: usize, profile: Profile) -> PlanOptions {
        let entry = Entry { name: "default".into(), bindings: Default::default(), weight: 1.0 };
        PlanOptions {
            ranks,
            profile,
            entries: vec![entry],
            memory: MemoryGoal::Default,
            reserve: 0,
            limits: Limits::default(),
        }
    }
}

/// The program of all ranks, and why it is that one.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    pub program: Spmd,
    pub report: PlanReport,
}

/// Why there is no plan.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    #[error("{found} ranks\nhelp: 1 to {MAX_RANKS} ranks are possible")]
    Ranks { found: usize },
    #[error("no binding of the symbolic dims was given\nhelp: give at least one entry; it may be empty")]
    NoEntry,
    #[error("value {value} is a {op}, which stands for the work of a rank, in a logical graph")]
    NotLogical { value: ValueId, op: String },
    #[error(transparent)]
    Build(#[from] BuildError),
    #[error(transparent)]
    Extract(#[from] ExtractError),
    #[error(transparent)]
    Emit(#[from] EmitError),
    #[error(transparent)]
    Infer(#[from] tpshard_ir::InferError),
}

/// One mesh with its best plan.
struct Candidate {
    classes: Classes,
    layouts: LayoutGraph,
    extraction: Extraction,
}

/// Plans `extended` for the ranks and the machine of `options`.
///
/// # Errors
/// A rank count out of range, a budget that no plan keeps, or a graph that is not a logical one.
pub fn plan(extended: Extended, options: &PlanOptions) -> Result<Plan, PlanError> {
    if options.ranks == 0 || options.ranks > MAX_RANKS {
        return Err(PlanError::Ranks { found: options.ranks });
    }
    if options.entries.is_empty() {
        return Err(PlanError::NoEntry);
    }
    if let Some((value, node)) = extended.graph.values().find(|(_, n)| matches!(n.op, Op::Convert(_))) {
        return Err(PlanError::NotLogical { value, op: node.op.name().into() });
    }
    let found = alternatives(extended)?;
    let pricer = Pricer::new(&options.profile, &found.extended.graph, &options.entries);
    let live: Vec<ValueId> = found.live();
    let units = candidate_units(&found.extended.graph, &live);
    let mut best: Option<Candidate> = None;
    for mesh in meshes(&found.extended.graph, options.ranks) {
        let next = candidate(&found, &pricer, &units, &mesh, options)?;
        if best.as_ref().is_none_or(|b| next.extraction.cost < b.extraction.cost) {
            best = Some(next);
        }
    }
    let best = best.ok_or(PlanError::Ranks { found: options.ranks })?;
    let alone = if options.ranks == 1 {
        best.extraction.cost
    } else {
        let free = PlanOptions { memory: MemoryGoal::Free, ..options.clone() };
        candidate(&found, &pricer, &units, &Mesh::flat(1), &free)?.extraction.cost
    };
    let (steps, outputs) = emit(&Source {
        graph: &found.extended.graph,
        outputs: &found.extended.outputs,
        classes: &best.classes,
        layouts: &best.layouts,
        choices: &best.extraction.choices,
    })?;
    let summary = Summary {
        extraction: &best.extraction,
        layouts: &best.layouts,
        reserved: best.classes.reserved,
        alone,
        options,
    };
    let report = report(&found.extended.graph, &steps, &outputs, &pricer, &summary);
    let program = found.into_program(best.layouts.mesh, steps, outputs);
    Ok(Plan { program, report })
}

fn candidate(
    found: &Alternatives,
    pricer: &Pricer<'_>,
    units: &Units,
    mesh: &Mesh,
    options: &PlanOptions,
) -> Result<Candidate, PlanError> {
    let graph = &found.extended.graph;
    let outputs: Vec<ValueId> = found.extended.outputs.iter().map(|o| o.value).collect();
    let classes = Classes::new(graph, &outputs, &found.equal, pricer, mesh);
    let model = Model { graph, outputs: &found.extended.outputs, classes: &classes, units, pricer, mesh };
    let layouts = build(&model)?;
    let set_aside = classes.reserved.saturating_add(options.reserve);
    let budget = match options.memory {
        MemoryGoal::Free => Budget::Free,
        MemoryGoal::Least => Budget::Least,
        MemoryGoal::Bytes(bytes) => Budget::Bytes(bytes.saturating_sub(set_aside)),
        MemoryGoal::Default => {
            let weights = layouts.groups.iter().filter(|g| !g.homes);
            let whole = |g: &crate::layout_graph::Group| g.productions.first().map_or(0, |p| p.bytes);
            let total = weights.map(whole).fold(0, u64::saturating_add);
            let large = total / options.ranks as u64 >= LARGE;
            if large || !graph.states.is_empty() { Budget::Least } else { Budget::Free }
        }
    };
    let extraction =
        extract(&layouts, budget, options.limits).map_err(|error| match (error, options.memory) {
            // What was set aside counts for whoever named the budget.
            (ExtractError::Budget { least, .. }, MemoryGoal::Bytes(budget)) => {
                ExtractError::Budget { least: least.saturating_add(set_aside), budget }
            }
            (error, _) => error,
        })?;
    Ok(Candidate { classes, layouts, extraction })
}

/// The flat mesh, and meshes whose axes divide the KV head counts where the ranks do not.
fn meshes(graph: &Graph, ranks: usize) -> Vec<Mesh> {
    let mut all = vec![Mesh::flat(ranks)];
    let heads: BTreeSet<usize> = graph
        .values()
        .filter_map(|(_, node)| match &node.op {
            Op::Attention { .. } => graph.ty(*node.args.get(1)?).shape.get(1)?.as_size(),
            _ => None,
        })
        .collect();
    for heads in heads {
        let common = greatest_common_divisor(ranks, heads);
        let mesh = Mesh(vec![common, ranks / common]);
        if common > 1 && common < ranks && !all.contains(&mesh) {
            all.push(mesh);
        }
    }
    all
}

fn greatest_common_divisor(mut a: usize, mut b: usize) -> usize {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}
