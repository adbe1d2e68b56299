//! The planner: from a logical graph and a machine to the typed program of all ranks.

use crate::cost::price::{Entry, complete};
use crate::cost::{Cost, Pricer, Profile};
use crate::emit::{EmitError, Source, emit};
use crate::extended::Extended;
use crate::extract::{Budget, ExtractError, Extraction, Joint, Limits, extract_entries};
use crate::layout_graph::{
    BuildError, Classes, Kept, KeptError, LayoutGraph, Model, Pin, PinError, apply_kept, apply_pins, build,
};
use crate::logical::{Alternatives, alternatives, no_alternatives};
use crate::overlap::{Cuts, Overlap};
use crate::report::{OnMesh, PlanReport, Summary, program_cost, report};
use crate::sharding::{Units, candidate_units};
use crate::unplanned::least_cost;
use std::collections::BTreeSet;
use tpshard_ir::program::Determinism;
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
    /// The least possible, whatever time it takes.
    Fewest,
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
    /// Layouts that are not to be decided.
    pub pins: Vec<Pin>,
    /// What other graphs of the model have in memory.
    pub kept: Option<Kept>,
    /// Split every value that a rule can split, whatever time it takes: for tests of the rules.
    pub split_all: bool,
    /// At `Tp` no sum of floats is split over ranks, and every value is computed by the operations of the canonical graph:
    /// nothing that rounds depends on the number of ranks.
    pub determinism: Determinism,
    /// In how many pieces products are made that are summed over ranks.
    pub overlap: Overlap,
}

impl PlanOptions {
    pub fn new(ranks: usize, profile: Profile) -> PlanOptions {
        let entry = Entry::new("default", Default::default());
        PlanOptions {
            ranks,
            profile,
            entries: vec![entry],
            memory: MemoryGoal::Default,
            reserve: 0,
            limits: Limits::default(),
            pins: Vec::new(),
            kept: None,
            split_all: false,
            determinism: Determinism::default(),
            overlap: Overlap::default(),
        }
    }
}

impl PlanOptions {
    /// Where everything is to be split the first plan that does so is as good as any other.
    fn search(&self) -> Limits {
        let Limits { states, labels } = self.limits;
        if self.split_all { Limits { states: states.min(16), labels: labels.min(16) } } else { self.limits }
    }
}

/// The programs of all ranks, one per entry, and why they are those.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// By entry name. All hold weights and state in the same layouts.
    pub programs: Vec<(String, Spmd)>,
    pub report: PlanReport,
    /// By entry, the products that GPUs make in pieces; empty if nothing of that was decided.
    pub cuts: Vec<Cuts>,
}

/// Why there is no plan.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    #[error("{found} ranks\nhelp: 1 to {MAX_RANKS} ranks are possible")]
    Ranks { found: usize },
    #[error(
        "entry `{entry}`: symbol `{symbol}` is to be {wanted}, the model allows {allowed}\nhelp: give sizes the model allows (--dim)"
    )]
    Range { entry: String, symbol: String, wanted: String, allowed: String },
    #[error("no binding of the symbolic dims was given\nhelp: give at least one entry; it may be empty")]
    NoEntry,
    #[error("value {value} is a {op}, which stands for the work of a rank, in a logical graph")]
    NotLogical { value: ValueId, op: String },
    #[error(transparent)]
    Build(#[from] BuildError),
    #[error(transparent)]
    Pin(#[from] PinError),
    #[error(transparent)]
    Kept(#[from] KeptError),
    #[error(transparent)]
    Extract(#[from] ExtractError),
    #[error(transparent)]
    Emit(#[from] EmitError),
    #[error(transparent)]
    Infer(#[from] tpshard_ir::InferError),
    #[error("{0}\nhelp: this is a fault of the planner, please report it with the model")]
    Instantiate(#[from] tpshard_ir::spmd::InstantiateError),
    #[error("planning the memory of a rank: {0}\nhelp: plan for smaller dims (--dim)")]
    Memory(#[from] tpshard_ir::program::PlanError),
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
    /// What the best plan on every mesh takes.
    considered: Vec<OnMesh>,
}

/// The steps of one entry.
#[derive(Clone)]
pub(crate) struct Emitted {
    pub(crate) steps: Vec<Step>,
    pub(crate) outputs: Vec<SpmdOutput>,
}

/// Plans `extended` for the ranks and the machine of `options`, as if nothing overlapped.
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
    check_ranges(&extended.graph, &options.entries)?;
    let found = match options.determinism {
        Determinism::Fast | Determinism::Run => alternatives(extended)?,
        Determinism::Tp => no_alternatives(extended),
    };
    let profile = options.profile.shared_between(options.ranks);
    let pricer = Pricer::new(&profile, &found.extended.graph, &options.entries).splitting(options.split_all);
    let live: Vec<ValueId> = found.live();
    let units = candidate_units(&found.extended.graph, &live);
    let planner = Planner { found: &found, pricer: &pricer, units: &units, options };
    let (best, programs, activations) = planner.within_budget()?;
    let alone = match (options.ranks, options.memory) {
        (1, _) | (_, MemoryGoal::Fewest) => best.cost,
        _ => planner.alone()?,
    };
    let summary = Summary {
        extraction: &best.extraction,
        layouts: &best.layouts[0],
        reserved: best.classes.reserved,
        activations,
        cost: best.cost,
        bound: best.bound,
        alone,
        meshes: &best.considered,
        options,
    };
    let report = report(&found.extended.graph, &best.emitted, &pricer, &summary);
    Ok(Plan { programs, report, cuts: Vec::new() })
}

struct Planner<'a> {
    found: &'a Alternatives,
    pricer: &'a Pricer<'a>,
    units: &'a Units,
    options: &'a PlanOptions,
}

/// Every range must hold a size that the model allows.
fn check_ranges(graph: &Graph, entries: &[Entry]) -> Result<(), PlanError> {
    for entry in entries {
        for (name, wanted) in &entry.ranges {
            let Some(allowed) = graph.symbols.get(name) else { continue };
            if wanted.low > wanted.high || wanted.low > allowed.high || wanted.high < allowed.low {
                return Err(PlanError::Range {
                    entry: entry.name.clone(),
                    symbol: name.to_string(),
                    wanted: format!("{}..{}", wanted.low, wanted.high),
                    allowed: format!("{}..{}", allowed.low, allowed.high),
                });
            }
        }
    }
    Ok(())
}

/// By entry name.
type Programs = Vec<(String, Spmd)>;

impl Planner<'_> {
    /// The best plan, its programs, and the bytes of their activations. Under a budget, what activations need is set
    /// aside and the plan made again until it holds.
    fn within_budget(&self) -> Result<(Candidate, Programs, u64), PlanError> {
        let mut reserve = 0;
        loop {
            let best = self.best(reserve)?;
            let programs = self.programs(&best);
            let activations = activation_bytes(&programs, &self.options.entries)?;
            let MemoryGoal::Bytes(budget) = self.options.memory else {
                return Ok((best, programs, activations));
            };
            let stored = best.extraction.bytes.saturating_add(best.classes.reserved);
            let needed = stored.saturating_add(activations).saturating_add(self.options.reserve);
            if needed <= budget {
                return Ok((best, programs, activations));
            }
            // A plan that needs no more than was set aside fits; so this grows every time, and ends when nothing fits.
            reserve = activations.max(reserve.saturating_add(1));
        }
    }

    fn programs(&self, candidate: &Candidate) -> Programs {
        let mesh = &candidate.layouts[0].mesh;
        let program = |(entry, emitted): (&Entry, &Emitted)| {
            let Emitted { steps, outputs } = emitted.clone();
            let mut program = self.found.clone().into_program(mesh.clone(), steps, outputs);
            for (name, range) in &mut program.logical.symbols {
                if let Some(wanted) = entry.ranges.get(name) {
                    range.low = range.low.max(wanted.low);
                    range.high = range.high.min(wanted.high);
                }
            }
            (entry.name.clone(), program)
        };
        self.options.entries.iter().zip(&candidate.emitted).map(program).collect()
    }

    /// The best plan over all meshes of the wanted number of ranks, with `reserve` bytes set aside.
    fn best(&self, reserve: u64) -> Result<Candidate, PlanError> {
        let mut best: Option<Candidate> = None;
        let mut considered = Vec::new();
        // A plan on another mesh may be better than the best one found there, too.
        let mut bound: Option<Cost> = None;
        let meshes = match &self.options.kept {
            Some(kept) => vec![kept.mesh.clone()],
            None => meshes(&self.found.extended.graph, self.options.ranks),
        };
        for mesh in meshes {
            let next = match self.candidate(&mesh, self.options.memory, reserve) {
                // The flat mesh comes first and has the message; a factored one need not allow every pin.
                Err(PlanError::Pin(_) | PlanError::Extract(ExtractError::Impossible)) if best.is_some() => {
                    continue;
                }
                other => other?,
            };
            bound = Some(bound.map_or(next.bound, |b| b.min(next.bound)));
            considered.push(OnMesh {
                mesh,
                seconds: next.cost.seconds(),
                bytes: next.extraction.bytes.saturating_add(next.classes.reserved),
            });
            let better = |b: &Candidate| match self.options.memory {
                MemoryGoal::Fewest => next.extraction.bytes < b.extraction.bytes,
                _ if self.options.split_all => next.extraction.cost < b.extraction.cost,
                _ => next.cost < b.cost,
            };
            if best.as_ref().is_none_or(better) {
                best = Some(next);
            }
        }
        let best = best.ok_or(PlanError::Ranks { found: self.options.ranks })?;
        let bound = bound.unwrap_or(best.bound);
        Ok(Candidate { considered, bound, ..best })
    }

    /// What one rank takes that has room for everything.
    fn alone(&self) -> Result<Cost, PlanError> {
        let profile = self.options.profile.shared_between(1);
        let pricer = Pricer::new(&profile, &self.found.extended.graph, &self.options.entries);
        let planner = Planner { pricer: &pricer, ..*self };
        Ok(planner.candidate(&Mesh::flat(1), MemoryGoal::Free, 0)?.cost)
    }

    fn candidate(&self, mesh: &Mesh, memory: MemoryGoal, reserve: u64) -> Result<Candidate, PlanError> {
        let Planner { found, pricer, units, options } = *self;
        let graph = &found.extended.graph;
        let outputs: Vec<ValueId> = found.extended.outputs.iter().map(|o| o.value).collect();
        let classes = Classes::new(graph, &outputs, &found.equal, pricer, mesh);
        let all = &found.extended.outputs;
        let one_order = options.determinism == Determinism::Tp;
        let model = Model { graph, outputs: all, classes: &classes, units, pricer, mesh, one_order };
        let focused: Vec<Pricer<'_>> = (0..options.entries.len()).map(|e| pricer.focused(e)).collect();
        let built = |pricer| {
            let mut built = build(&Model { pricer, ..model })?;
            if mesh.ranks() > 1 {
                apply_pins(&mut built, &options.pins)?;
            }
            if let Some(kept) = options.kept.as_ref().filter(|kept| kept.mesh == *mesh) {
                apply_kept(&mut built, graph, kept)?;
            }
            Ok(built)
        };
        let layouts = focused.iter().map(built).collect::<Result<Vec<_>, PlanError>>()?;
        let Joint { choices, total: extraction } = self.extract(&layouts, &classes, memory, reserve)?;
        let mut emitted = Vec::new();
        let (mut cost, mut bound) = (Cost::ZERO, extraction.bound);
        for (entry, ((layouts, pricer), choices)) in layouts.iter().zip(&focused).zip(&choices).enumerate() {
            let outputs = &found.extended.outputs;
            let (steps, mut outputs) = emit(&Source { graph, outputs, classes: &classes, layouts, choices })?;
            outputs.drain(..found.extended.hidden().min(outputs.len()));
            let overhead = pricer.step_overhead(entry);
            cost = cost + program_cost(graph, &steps, &outputs, pricer, mesh, entry) + overhead;
            bound = bound + least_cost(graph, layouts, &found.extended.outputs, pricer) + overhead;
            emitted.push(Emitted { steps, outputs });
        }
        Ok(Candidate {
            classes,
            layouts,
            extraction,
            emitted,
            cost,
            bound: bound.min(cost),
            considered: vec![],
        })
    }

    fn extract(
        &self,
        layouts: &[LayoutGraph],
        classes: &Classes,
        memory: MemoryGoal,
        reserve: u64,
    ) -> Result<Joint, PlanError> {
        let options = self.options;
        let set_aside = classes.reserved.saturating_add(options.reserve).saturating_add(reserve);
        let budget = match memory {
            MemoryGoal::Free => Budget::Free,
            MemoryGoal::Least => Budget::Least,
            MemoryGoal::Fewest => Budget::Fewest,
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
        extract_entries(layouts, budget, options.search()).map_err(|error| match (error, memory) {
            // What was set aside counts for whoever named the budget.
            (ExtractError::Budget { least, .. }, MemoryGoal::Bytes(budget)) => {
                ExtractError::Budget { least: least.saturating_add(set_aside), budget }.into()
            }
            (error, _) => error.into(),
        })
    }
}

/// What the buffers of rank 0 take, which holds no less than any other rank: the most over all entries.
fn activation_bytes(programs: &[(String, Spmd)], entries: &[Entry]) -> Result<u64, PlanError> {
    let mut most = 0;
    for ((_, program), entry) in programs.iter().zip(entries) {
        let local = tpshard_ir::spmd::instantiate(program, 0)?;
        let bindings = complete(&program.logical, &entry.largest);
        most = most.max(tpshard_ir::program::lower(&local).plan(&local, &bindings)?.bytes);
    }
    Ok(most)
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
