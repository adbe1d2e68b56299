//! `tpshard explain`: why a tensor is laid out as it is. The model is planned as it would be sharded, and then once
//! more for every other layout of the tensor, with the tensor pinned to it; what differs is the answer.

mod text;

use super::cases::import_one;
use super::names::{Names, Pattern, Sort, shown};
use super::pins::Resolver;
use super::planning::{Planning, check_ranks};
use crate::arguments::ExplainArguments;
use crate::failure::{Failure, Kind, Outcome};
use crate::output;
use std::collections::{BTreeMap, BTreeSet};
use tpshard_ir::layout::local_shape;
use tpshard_ir::{AxisLayout, Bindings, DType, Layout, Mesh, Op, Spmd, Step, StepKind, ValueId};
use tpshard_passes::cost::Parts;
use tpshard_passes::extract::ExtractError;
use tpshard_passes::places::{Place, equal_values};
use tpshard_passes::{MemoryGoal, Pin, PinError, Plan, PlanError, PlanOptions, PlanReport};

pub(crate) fn explain(arguments: &ExplainArguments, json: bool) -> Outcome<()> {
    check_ranks(arguments.tp)?;
    if arguments.tp == 1 {
        let help = "help: choose --tp 2 or more";
        return Err(Failure::new(Kind::Usage, format!("--tp 1: one rank holds everything whole\n{help}")));
    }
    let imported = import_one(&arguments.model, &arguments.from)?;
    let planning = Planning::new(std::slice::from_ref(&imported), &arguments.pricing, &[arguments.tp])?;
    let resolver = Resolver::new(&imported, planning.extended()?);
    let tensor = tensor(arguments, &resolver)?;
    let Some((dtype, dims)) = resolver.names.shape(&tensor) else {
        let help = "help: it is a constant, a size, or nothing that the outputs need";
        let message = format!("{}: nothing computes this tensor when the model runs\n{help}", shown(&tensor));
        return Err(Failure::new(Kind::Usage, message));
    };
    let explained = Explainer { planning: &planning, resolver: &resolver, ranks: arguments.tp }
        .explain(tensor, dtype, dims)?;
    if json { output::line(explained.json()) } else { output::text(explained.text()) }
}

/// The tensor that the flags name.
fn tensor(arguments: &ExplainArguments, resolver: &Resolver<'_>) -> Outcome<String> {
    let names: &Names<'_> = &resolver.names;
    let (flag, sort, name) = match (&arguments.tensor, &arguments.node) {
        (Some(name), _) => ("--tensor", Sort::Tensor, name),
        (None, Some(name)) => ("--node", Sort::Node, name),
        // Clap sees to it that there is one of them.
        (None, None) => return Err(Failure::new(Kind::Usage, "neither --tensor nor --node is given")),
    };
    let pattern = Pattern::name(name);
    let found = names.matching(sort, &pattern);
    let computed: Vec<&str> = found.iter().copied().filter(|t| names.shape(t).is_some()).collect();
    match (found.as_slice(), computed.as_slice()) {
        ([], _) => Err(names.unknown(flag, sort, &pattern)),
        ([first, ..], []) | (_, [first]) => Ok((*first).to_owned()),
        (_, several) => {
            let results: Vec<String> = several.iter().map(|name| shown(name)).collect();
            let message = format!(
                "{flag} {name}: has several results\nhelp: name one with --tensor: {}",
                results.join(", ")
            );
            Err(Failure::new(Kind::Usage, message))
        }
    }
}

/// What is known about the layout of a tensor.
struct Explained {
    tensor: String,
    dtype: DType,
    dims: Vec<String>,
    mesh: Mesh,
    profile: String,
    /// The plan as it would be sharded.
    plan: Measure,
    held: Vec<Held>,
    /// What fixes the layout already.
    pinned: Vec<String>,
    options: Vec<Possibility>,
}

/// What a plan takes.
struct Measure {
    seconds: f64,
    parts: Parts,
    /// Of weights and state, per rank.
    bytes: u64,
    budget: Option<u64>,
    gap: f64,
    collectives: BTreeMap<Exchange, Exchanged>,
}

/// Entry, kind, node, bytes per rank.
type Exchange = (String, &'static str, String, u64);

#[derive(Clone, Copy, Default)]
struct Exchanged {
    count: usize,
    /// Of one, with the share of its entry.
    seconds: f64,
}

/// A family of the tensor in the plan.
struct Held {
    entry: String,
    ty: String,
    layout: Layout,
    /// What each rank has of it.
    shares: String,
    how: How,
}

enum How {
    Stored,
    Computed { node: String },
    Converted { kind: &'static str, from: Layout, exchange: Option<(usize, u64, f64)> },
}

/// A layout that the tensor may have.
struct Possibility {
    /// `R` or `S(dim)`, of the tensor as the model has it.
    layout: String,
    chosen: bool,
    found: Found,
}

enum Found {
    Plan {
        measure: Measure,
        /// Bytes per rank beyond a budget of so many.
        over: Option<(u64, u64)>,
        /// True if no budget held, because with this layout none could be kept.
        free: bool,
    },
    /// There is none, and why.
    Not(String),
}

struct Explainer<'a> {
    planning: &'a Planning,
    resolver: &'a Resolver<'a>,
    ranks: usize,
}

impl Explainer<'_> {
    fn explain(&self, tensor: String, dtype: DType, dims: Vec<String>) -> Outcome<Explained> {
        let options = self.planning.options(self.ranks);
        let plan = self.plan(&options)?.map_err(|error| self.planning.failure(self.ranks, &error))?;
        let places = self.resolver.places(&tensor, None).map_err(|error| {
            let help = "help: explain an operand of it, or what it is an operand of";
            Failure::new(Kind::Usage, format!("{}: {error}\n{help}", shown(&tensor)))
        })?;
        let values: BTreeSet<ValueId> = places.iter().map(|place| place.value).collect();
        let pinned = options.pins.iter().filter(|pin| values.contains(&pin.value));
        let pinned: BTreeSet<String> = pinned.map(|pin| pin.name.clone()).collect();
        let measure = Measure::of(&plan.report);
        let choices = std::iter::once(None).chain((0..dims.len()).map(Some));
        let mut found = Vec::new();
        for dim in choices {
            let layout = dim.map_or("R".to_owned(), |dim: usize| format!("S({dim})"));
            let places = match self.resolver.places(&tensor, dim) {
                Ok(places) => places,
                Err(error) => {
                    found.push(Possibility { layout, chosen: false, found: Found::Not(error.to_string()) });
                    continue;
                }
            };
            let chosen = keeps(&plan, &places);
            let result = self.pinned(&options, &values, &places, &tensor, &measure)?;
            found.push(Possibility { layout, chosen, found: result });
        }
        Ok(Explained {
            tensor,
            dtype,
            dims,
            mesh: plan.report.mesh.clone(),
            profile: plan.report.profile.clone(),
            held: held(&plan, &values),
            plan: measure,
            pinned: pinned.into_iter().collect(),
            options: found,
        })
    }

    fn plan(&self, options: &PlanOptions) -> Outcome<Result<Plan, PlanError>> {
        Ok(tpshard_passes::plan(self.planning.extended()?.clone(), options))
    }

    /// The best plan with the tensor at `places`, whatever else was wanted of its `values`.
    fn pinned(
        &self,
        options: &PlanOptions,
        values: &BTreeSet<ValueId>,
        places: &[Place],
        tensor: &str,
        plan: &Measure,
    ) -> Outcome<Found> {
        let mut options = options.clone();
        options.pins.retain(|pin| !values.contains(&pin.value));
        let pin = |place: &Place| Pin { value: place.value, dim: place.dim, name: shown(tensor) };
        options.pins.extend(places.iter().map(pin));
        match self.plan(&options)? {
            Ok(found) => {
                let measure = Measure::of(&found.report);
                let over = plan.budget.map(|budget| (measure.bytes.saturating_sub(budget), budget));
                Ok(Found::Plan { measure, over: over.filter(|(over, _)| *over > 0), free: false })
            }
            Err(PlanError::Pin(error)) => Ok(Found::Not(reason(&error))),
            Err(PlanError::Extract(ExtractError::Impossible)) => Ok(Found::Not("no plan holds it so".into())),
            Err(PlanError::Extract(ExtractError::Budget { least, budget })) => {
                options.memory = MemoryGoal::Free;
                let found = self.plan(&options)?;
                let found = found.map_err(|error| self.planning.failure(self.ranks, &error))?;
                let over = Some((least.saturating_sub(budget), budget));
                Ok(Found::Plan { measure: Measure::of(&found.report), over, free: true })
            }
            Err(error) => Err(self.planning.failure(self.ranks, &error)),
        }
    }
}

/// Why a value cannot be had in a layout.
fn reason(error: &PinError) -> String {
    match error {
        PinError::Unknown { .. } => "the plan does not compute it".into(),
        PinError::Whole { .. } => "inputs and small constants are held whole on every rank".into(),
        PinError::Layout { .. } => "the ranks cannot share this dim".into(),
        PinError::Operation { .. } => "no operation makes it so".into(),
        PinError::Contradiction { other, others, .. } => {
            format!("it is one value with {other}, pinned as {others}")
        }
    }
}

impl Measure {
    fn of(report: &PlanReport) -> Measure {
        let total: f64 = report.entries.iter().map(|e| e.entry.weight).sum();
        let mut parts = Parts::default();
        let mut collectives: BTreeMap<Exchange, Exchanged> = BTreeMap::new();
        for entry in &report.entries {
            let share = entry.entry.weight / total.max(f64::MIN_POSITIVE);
            parts.add(&entry.visible(), share);
            for c in &entry.collectives {
                let key = (entry.entry.name.clone(), c.kind, c.origin.clone(), c.payload);
                let found = collectives.entry(key).or_default();
                *found = Exchanged { count: found.count + 1, seconds: c.seconds * share };
            }
        }
        Measure {
            seconds: report.seconds,
            parts,
            bytes: report.weight_bytes.saturating_add(report.state_bytes),
            budget: report.budget,
            gap: report.gap,
            collectives,
        }
    }
}

/// The steps of an entry's program that make one of `values` or what equals it.
fn steps_of<'p>(program: &'p Spmd, values: &BTreeSet<ValueId>) -> Vec<(usize, &'p Step)> {
    let first = equal_values(&program.logical, &program.equations);
    let of = |value: ValueId| first.get(value.index()).copied();
    let wanted: BTreeSet<Option<ValueId>> = values.iter().map(|&value| of(value)).collect();
    let steps = program.steps.iter().enumerate();
    steps.filter(|(_, step)| wanted.contains(&of(step.value))).collect()
}

/// True if the plan holds the tensor at `places` to begin with: stored so, or first made so out of partial values.
fn keeps(plan: &Plan, places: &[Place]) -> bool {
    let mut any = false;
    for (_, program) in &plan.programs {
        for place in places {
            for (_, step) in steps_of(program, &BTreeSet::from([place.value])) {
                let from_partial = step
                    .args
                    .first()
                    .and_then(|arg| program.steps.get(arg.index()))
                    .is_some_and(|arg| arg.layout.has_partial());
                let first = step.kind == StepKind::Compute || from_partial;
                if !first || step.layout.has_partial() {
                    continue;
                }
                any = true;
                if step.layout.0.iter().any(|part| part.sharded_dim() != place.dim) {
                    return false;
                }
            }
        }
    }
    any
}

/// In which forms the plan has the tensor.
fn held(plan: &Plan, values: &BTreeSet<ValueId>) -> Vec<Held> {
    let mut all: Vec<Held> = Vec::new();
    for ((name, program), entry) in plan.programs.iter().zip(&plan.report.entries) {
        for (index, step) in steps_of(program, values) {
            let node = program.logical.node(step.value);
            let stored = match &node.op {
                Op::Weight(_) => true,
                Op::Input { name } => program.logical.states.iter().any(|state| state.input == *name),
                _ => false,
            };
            let from = step.args.first().and_then(|arg| program.steps.get(arg.index()));
            let how = match (&step.kind, from) {
                (StepKind::Convert(conversion), Some(from)) => {
                    let exchange = entry.collectives.iter().find(|c| c.step.index() == index);
                    let exchange = exchange.map(|c| (c.ranks, c.payload, c.seconds));
                    How::Converted { kind: conversion.name(), from: from.layout.clone(), exchange }
                }
                _ if stored => How::Stored,
                _ => How::Computed { node: node.origin.to_string() },
            };
            // What is stored is the same for all entries.
            if matches!(how, How::Stored) && name != &plan.programs[0].0 {
                continue;
            }
            all.push(Held {
                entry: name.clone(),
                ty: node.ty.to_string(),
                layout: step.layout.clone(),
                shares: shares(program, step, &entry.entry.bindings),
                how,
            });
        }
    }
    all
}

/// What each rank has of a split dim: `dim 0: 2 on each rank`, or `dim 1: 32 on rank 0, 16 on ranks 1-3`.
fn shares(program: &Spmd, step: &Step, bindings: &Bindings) -> String {
    let shape = &program.logical.ty(step.value).shape;
    let mut dims: BTreeMap<usize, String> = BTreeMap::new();
    for part in &step.layout.0 {
        if let AxisLayout::Shard { dim, unit } = part {
            dims.insert(*dim, if unit.is_one() { String::new() } else { format!(", in units of {unit}") });
        }
    }
    let mut texts = Vec::new();
    for (dim, unit) in dims {
        let length = |rank| {
            let local = local_shape(shape, &step.layout, &program.mesh, rank);
            let length = local.get(dim);
            length.map_or_else(String::new, |d| {
                d.eval(bindings).map_or_else(|_| d.to_string(), |n| n.to_string())
            })
        };
        let mut runs: Vec<(String, usize, usize)> = Vec::new();
        for rank in 0..program.mesh.ranks() {
            let length = length(rank);
            match runs.last_mut() {
                Some((known, _, last)) if *known == length => *last = rank,
                _ => runs.push((length, rank, rank)),
            }
        }
        let run = |(length, first, last): &(String, usize, usize)| match first == last {
            true => format!("{length} on rank {first}"),
            false => format!("{length} on ranks {first}-{last}"),
        };
        let text = match runs.as_slice() {
            [(length, ..)] => format!("dim {dim}: {length} on each rank{unit}"),
            runs => format!("dim {dim}: {}{unit}", runs.iter().map(run).collect::<Vec<_>>().join(", ")),
        };
        texts.push(text);
    }
    if texts.is_empty() { "all of it on each rank".into() } else { texts.join("; ") }
}
