//! The planner: from a logical graph and a machine to the typed program of all ranks.

use crate::cost::price::Entry;
use crate::cost::{Cost, Pricer, Profile};
use crate::emit::{EmitError, Source, emit};
use crate::extended::Extended;
use crate::extract::{Budget, ExtractError, Extraction, Joint, Limits, extract_entries};
use crate::layout_graph::{BuildError, Classes, LayoutGraph, Model, build};
use crate::logical::{Alternatives, alternatives};
use crate::report::{PlanReport, Summary, program_cost, report};
use crate::sharding::{Units, candidate_units};
use crate::unplanned::least_cost;
use std::collections::BTreeSet;
use tpshard_ir::{Graph, Mesh, Op, Spmd, SpmdOutput, Step, ValueId};

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

/// The programs of all ranks, one per entry, and why they are those.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// By entry name. All hold weights and state in the same layouts.
    pub programs: Vec<(String, Spmd)>,
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
    /// Per entry, alike but for prices.
    layouts: Vec<LayoutGraph>,
    extraction: Extraction,
    /// Per entry.
    emitted: Vec<Emitted>,
    /// Of the programs, what no plan decides about included.
    cost: Cost,
    /// No plan's programs take less.
    bound: Cost,
}

/// The steps of one entry.
pub(crate) struct Emitted {
    pub(crate) steps: Vec<Step>,
    pub(crate) outputs: Vec<SpmdOutput>,
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
    let planner = Planner { found: &found, pricer: &pricer, units: &units, options };
    let best = planner.best()?;
    let alone = if options.ranks == 1 { best.cost } else { planner.alone()? };
    let summary = Summary {
        extraction: &best.extraction,
        layouts: &best.layouts[0],
        reserved: best.classes.reserved,
        cost: best.cost,
        bound: best.bound,
        alone,
        options,
    };
    let report = report(&found.extended.graph, &best.emitted, &pricer, &summary);
    let mesh = &best.layouts[0].mesh;
    let program = |(entry, emitted): (&Entry, Emitted)| {
        let program = found.clone().into_program(mesh.clone(), emitted.steps, emitted.outputs);
        (entry.name.clone(), program)
    };
    Ok(Plan { programs: options.entries.iter().zip(best.emitted).map(program).collect(), report })
}

struct Planner<'a> {
    found: &'a Alternatives,
    pricer: &'a Pricer<'a>,
    units: &'a Units,
    options: &'a PlanOptions,
}

impl Planner<'_> {
    /// The best plan over all meshes of the wanted number of ranks.
    fn best(&self) -> Result<Candidate, PlanError> {
        let mut best: Option<Candidate> = None;
        for mesh in meshes(&self.found.extended.graph, self.options.ranks) {
            let next = self.candidate(&mesh, self.options.memory)?;
            if best.as_ref().is_none_or(|b| next.cost < b.cost) {
                best = Some(next);
            }
        }
        best.ok_or(PlanError::Ranks { found: self.options.ranks })
    }

    /// What one rank takes that has room for everything.
    fn alone(&self) -> Result<Cost, PlanError> {
        Ok(self.candidate(&Mesh::flat(1), MemoryGoal::Free)?.cost)
    }

    fn candidate(&self, mesh: &Mesh, memory: MemoryGoal) -> Result<Candidate, PlanError> {
        let Planner { found, pricer, units, options } = *self;
        let graph = &found.extended.graph;
        let outputs: Vec<ValueId> = found.extended.outputs.iter().map(|o| o.value).collect();
        let classes = Classes::new(graph, &outputs, &found.equal, pricer, mesh);
        let model = Model { graph, outputs: &found.extended.outputs, classes: &classes, units, pricer, mesh };
        let built = build(&model)?;
        let focused: Vec<Pricer<'_>> = (0..options.entries.len()).map(|e| pricer.focused(e)).collect();
        let layouts = match focused.as_slice() {
            [_] => vec![built],
            several => several.iter().map(|p| built.priced(p)).collect(),
        };
        let Joint { choices, total: extraction } = self.extract(&layouts, &classes, memory)?;
        let mut emitted = Vec::new();
        let (mut cost, mut bound) = (Cost::ZERO, extraction.bound);
        for (entry, ((layouts, pricer), choices)) in layouts.iter().zip(&focused).zip(&choices).enumerate() {
            let outputs = &found.extended.outputs;
            let (steps, outputs) = emit(&Source { graph, outputs, classes: &classes, layouts, choices })?;
            cost = cost + program_cost(graph, &steps, &outputs, pricer, mesh, entry);
            bound = bound + least_cost(graph, layouts, &found.extended.outputs, pricer);
            emitted.push(Emitted { steps, outputs });
        }
        Ok(Candidate { classes, layouts, extraction, emitted, cost, bound: bound.min(cost) })
    }

    fn extract(
        &self,
        layouts: &[LayoutGraph],
        classes: &Classes,
        memory: MemoryGoal,
    ) -> Result<Joint, PlanError> {
        let options = self.options;
        let set_aside = classes.reserved.saturating_add(options.reserve);
        let budget = match memory {
            MemoryGoal::Free => Budget::Free,
            MemoryGoal::Least => Budget::Least,
            MemoryGoal::Bytes(bytes) => Budget::Bytes(bytes.saturating_sub(set_aside)),
            MemoryGoal::Default => {
                let weights = layouts.iter().take(1).flat_map(|l| &l.groups).filter(|g| !g.homes);
                let whole = |g: &crate::layout_graph::Group| g.productions.first().map_or(0, |p| p.bytes);
                let total = weights.map(whole).fold(0, u64::saturating_add);
                let large = total / options.ranks as u64 >= LARGE;
                let has_state = !self.found.extended.graph.states.is_empty();
                if large || has_state { Budget::Least } else { Budget::Free }
            }
        };
        extract_entries(layouts, budget, options.limits).map_err(|error| match (error, memory) {
            // What was set aside counts for whoever named the budget.
            (ExtractError::Budget { least, .. }, MemoryGoal::Bytes(budget)) => {
                ExtractError::Budget { least: least.saturating_add(set_aside), budget }.into()
            }
            (error, _) => error.into(),
        })
    }
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
