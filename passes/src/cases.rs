//! One plan for the several graphs of a model that chooses between them.
//!
//! The graphs run on one mesh and read one set of weights and one state. One of them is planned first and decides how
//! those lie in memory; the others are planned for what lies there. Each graph has its turn as the first, the heavier
//! ones before, and the plan that takes least is taken. What every graph takes when it is planned alone bounds them all
//! from below, so the gap says how much is lost by going one after the other.

use crate::balance::Balance;
use crate::cost::price::Entry;
use crate::counters::Counters;
use crate::extended::Extended;
use crate::extract::ExtractError;
use crate::layout_graph::{Kept, Pin, StoredName};
use crate::memory::{Dealt, Holdings, Part, stored};
use crate::overlap;
use crate::plan::{MemoryGoal, Plan, PlanError, PlanOptions, plan};
use crate::report::{EntryReport, GraphReport, OnMesh, PlanReport, StoredKind, Verdict};
use std::collections::{BTreeMap, BTreeSet};
use tpshard_ir::wording::without_numbers;
use tpshard_ir::{Layout, Mesh, Spmd};

/// A graph of the model, and what it is planned for.
#[derive(Clone, Debug)]
pub struct CasePlanning {
    pub extended: Extended,
    pub entries: Vec<Entry>,
    pub pins: Vec<Pin>,
}

impl CasePlanning {
    fn options(&self, options: &PlanOptions, kept: Option<Kept>) -> PlanOptions {
        let (entries, pins) = (self.entries.clone(), self.pins.clone());
        PlanOptions { entries, pins, kept, ..options.clone() }
    }

    fn weight(&self) -> f64 {
        self.entries.iter().map(|entry| entry.weight).sum()
    }

    /// Bytes on rank 0 of what is kept and this graph does not read: they are not available to it.
    fn unread(&self, kept: &[&Plan]) -> u64 {
        let graph = &self.extended.graph;
        let own: BTreeSet<StoredName> =
            graph.values().filter_map(|(value, _)| StoredName::of(graph, value)).collect();
        let parts: Vec<Part<'_>> = kept.iter().flat_map(|plan| parts(plan)).collect();
        let Some(mesh) = kept.first().map(|plan| &plan.report.mesh) else { return 0 };
        let bytes = on_first_rank(&parts, mesh);
        bytes.iter().filter(|((name, _), _)| !own.contains(name)).map(|(_, kind)| kind.bytes).sum()
    }
}

/// Plans all `cases` for the ranks and the machine of `options`, whose entries and pins are theirs, and what communication is
/// to hide behind computing.
///
/// # Errors
/// As [`plan`]; or no order of the graphs leaves every one of them a plan.
pub fn plan_cases(cases: &[CasePlanning], options: &PlanOptions) -> Result<Plan, PlanError> {
    let mut plan = one_after_another(cases, options)?;
    overlap::apply(&mut plan, options);
    Ok(plan)
}

fn one_after_another(cases: &[CasePlanning], options: &PlanOptions) -> Result<Plan, PlanError> {
    if let [only] = cases {
        return plan(only.extended.clone(), &only.options(options, None));
    }
    let mut order: Vec<usize> = (0..cases.len()).collect();
    order.sort_by(|&a, &b| cases[b].weight().total_cmp(&cases[a].weight()).then(a.cmp(&b)));
    let total: f64 = cases.iter().map(CasePlanning::weight).sum();
    let share = |case: usize| cases[case].weight() / total;
    let alone = cases
        .iter()
        .map(|case| plan(case.extended.clone(), &case.options(options, None)))
        .collect::<Result<Vec<_>, _>>()?;
    let bound: f64 = alone.iter().enumerate().map(|(i, p)| share(i) * bound_of(&p.report)).sum();
    let mut best: Option<Found> = None;
    let mut failure = PlanError::NoEntry;
    for &first in &order {
        let turn = std::iter::once(first).chain(order.iter().copied().filter(|&case| case != first));
        match in_turn(cases, options, &alone[first], turn) {
            Ok(plans) => {
                let seconds = plans.iter().enumerate().map(|(i, p)| share(i) * p.report.seconds).sum();
                let better = match options.memory {
                    MemoryGoal::Fewest => best.as_ref().is_none_or(|b| bytes(&plans) < bytes(&b.plans)),
                    _ => best.as_ref().is_none_or(|b| seconds < b.seconds),
                };
                if better {
                    best = Some(Found { plans, first, seconds });
                }
            }
            Err(error) => failure = error,
        }
        if best.as_ref().is_some_and(|b| b.seconds <= bound && options.memory != MemoryGoal::Fewest) {
            break;
        }
    }
    let Found { plans, first, seconds } = best.ok_or(failure)?;
    let seconds_alone = plans.iter().enumerate().map(|(i, p)| share(i) * p.report.seconds_alone).sum();
    let gap =
        if bound > 0.0 { (seconds - bound).max(0.0) / bound } else { f64::from(u8::from(seconds > 0.0)) };
    Ok(together(cases, plans, options, &Times { first, seconds, seconds_alone, gap }))
}

/// A plan for every graph, in the order of the graphs.
struct Found {
    plans: Vec<Plan>,
    first: usize,
    seconds: f64,
}

/// What no plan of this graph is below.
fn bound_of(report: &PlanReport) -> f64 {
    report.seconds / (1.0 + report.gap)
}

/// The plans of all graphs, one after the other; the first one is there already.
fn in_turn(
    cases: &[CasePlanning],
    options: &PlanOptions,
    master: &Plan,
    turn: impl Iterator<Item = usize>,
) -> Result<Vec<Plan>, PlanError> {
    let mut plans: BTreeMap<usize, Plan> = BTreeMap::new();
    let mut kept = Kept::on(master.report.mesh.clone());
    for (at, case) in turn.enumerate() {
        let found = if at == 0 {
            master.clone()
        } else {
            let done: Vec<&Plan> = plans.values().collect();
            let reserve = options.reserve.saturating_add(cases[case].unread(&done));
            let with = |only: bool| {
                let options = cases[case].options(options, Some(Kept { only, ..kept.clone() }));
                plan(cases[case].extended.clone(), &PlanOptions { reserve, ..options })
            };
            // A graph may need another form of a weight, which then is stored besides.
            with(true).or_else(|_| with(false))?
        };
        found.programs.iter().for_each(|(_, program)| kept.add(program));
        plans.insert(case, found);
    }
    let plans: Vec<Plan> = plans.into_values().collect();
    if let MemoryGoal::Bytes(budget) = options.memory {
        let needed = bytes(&plans).saturating_add(options.reserve);
        if needed > budget {
            return Err(ExtractError::Budget { least: needed, budget }.into());
        }
    }
    Ok(plans)
}

fn parts(plan: &Plan) -> Vec<Part<'_>> {
    Part::of_programs(&plan.programs, &plan.report.entries)
}

/// What rank 0 needs for all plans: weights and state once, and the buffers of the graph that has most.
fn bytes(plans: &[Plan]) -> u64 {
    let Some(mesh) = plans.first().map(|plan| &plan.report.mesh) else { return 0 };
    let parts: Vec<Part<'_>> = plans.iter().flat_map(parts).collect();
    let kept = on_first_rank(&parts, mesh).values().map(|kind| kind.bytes).fold(0, u64::saturating_add);
    let buffers = plans.iter().map(|plan| plan.report.activation_bytes).max().unwrap_or(0);
    kept.saturating_add(buffers)
}

/// A stored tensor on rank 0.
struct OnRank {
    shape: String,
    bytes: u64,
    /// On a rank that is alone.
    whole: u64,
}

/// Every stored tensor in every layout it lies in, once for all parts.
fn on_first_rank<'a>(parts: &[Part<'a>], mesh: &Mesh) -> BTreeMap<(StoredName, &'a Layout), OnRank> {
    let coordinates = mesh.coordinates(0);
    let one = Mesh::flat(1);
    let mut found = BTreeMap::new();
    for Part { graph, steps, sizes } in parts {
        for ((name, layout), value) in stored(graph, steps.iter().copied()) {
            let ty = graph.ty(value);
            let most = |layout: &Layout, mesh: &Mesh, at: &[usize]| {
                sizes.iter().map(|s| Dealt::new(graph, ty, layout, s).bytes(mesh, at)).max().unwrap_or(0)
            };
            let kind = found.entry((name, layout)).or_insert_with(|| OnRank {
                shape: ty.to_string(),
                bytes: 0,
                whole: 0,
            });
            kind.bytes = kind.bytes.max(most(layout, mesh, &coordinates));
            kind.whole = kind.whole.max(most(&Layout::replicated(&one), &one, &[0]));
        }
    }
    found
}

/// What was found about the time of all graphs together.
struct Times {
    first: usize,
    seconds: f64,
    seconds_alone: f64,
    gap: f64,
}

/// One plan of several.
fn together(cases: &[CasePlanning], plans: Vec<Plan>, options: &PlanOptions, times: &Times) -> Plan {
    let graphs =
        cases.iter().zip(&plans).enumerate().map(|(at, (case, plan))| graph(case, plan, at == times.first));
    let graphs: Vec<GraphReport> = graphs.collect();
    let reports: Vec<PlanReport> = plans.iter().map(|plan| plan.report.clone()).collect();
    let programs: Vec<(String, Spmd)> = plans.into_iter().flat_map(|plan| plan.programs).collect();
    let entries: Vec<EntryReport> = reports.iter().flat_map(|report| report.entries.clone()).collect();
    let mesh = reports.first().map_or_else(|| Mesh::flat(1), |report| report.mesh.clone());
    let parts = Part::of_programs(&programs, &entries);
    let kept = on_first_rank(&parts, &mesh);
    let sum = |state: bool| {
        let of = kept.iter().filter(|((name, _), _)| matches!(name, StoredName::State(_)) == state);
        of.map(|(_, kind)| kind.bytes).fold(0, u64::saturating_add)
    };
    let (weight_bytes, state_bytes) = (sum(false), sum(true));
    let whole: BTreeMap<&StoredName, u64> = kept.iter().map(|((name, _), kind)| (name, kind.whole)).collect();
    let bytes_alone = whole.values().copied().fold(0, u64::saturating_add);
    let most = |get: fn(&PlanReport) -> u64| reports.iter().map(get).max().unwrap_or(0);
    let balance = Balance::of(&Holdings::of(&parts), &mesh);
    let report = PlanReport {
        profile: options.profile.name.clone(),
        entries,
        seconds: times.seconds,
        seconds_alone: times.seconds_alone,
        verdict: Verdict::of(options, times.seconds, times.seconds_alone, bytes_alone),
        weight_bytes,
        state_bytes,
        activation_bytes: most(|report| report.activation_bytes),
        bytes_alone,
        budget: reports.iter().filter_map(|report| report.budget).max(),
        least_bytes: most(|report| report.least_bytes),
        stored: kinds(&kept),
        gap: times.gap,
        graphs,
        split_all: options.split_all,
        segments: reports.iter().fold((0, 0), |all, r| (all.0 + r.segments.0, all.1 + r.segments.1)),
        counters: reports.iter().map(|report| report.counters).sum::<Counters>(),
        balance,
        meshes: vec![OnMesh {
            mesh: mesh.clone(),
            seconds: times.seconds,
            bytes: weight_bytes.saturating_add(state_bytes),
        }],
        mesh,
    };
    Plan { programs, report, cuts: Vec::new() }
}

fn graph(case: &CasePlanning, plan: &Plan, first: bool) -> GraphReport {
    let values: Vec<String> = case.extended.graph.cases.iter().map(ToString::to_string).collect();
    GraphReport {
        case: values.join(", "),
        entries: plan.programs.iter().map(|(name, _)| name.clone()).collect(),
        gap: plan.report.gap,
        first,
    }
}

/// Alike tensors together.
fn kinds(kept: &BTreeMap<(StoredName, &Layout), OnRank>) -> Vec<StoredKind> {
    let mut kinds: BTreeMap<(bool, String, &str, &Layout), (usize, u64)> = BTreeMap::new();
    for ((name, layout), OnRank { shape, bytes, .. }) in kept {
        let is_state = matches!(name, StoredName::State(_));
        let key = (is_state, without_numbers(&name.to_string()), shape.as_str(), *layout);
        let (count, sum) = kinds.entry(key).or_default();
        *count += 1;
        *sum = sum.saturating_add(*bytes);
    }
    let kind = |((is_state, name, shape, layout), (count, bytes)): ((bool, String, &str, &Layout), _)| {
        StoredKind { name, is_state, shape: shape.to_owned(), layout: layout.clone(), count, bytes }
    };
    kinds.into_iter().map(kind).collect()
}
