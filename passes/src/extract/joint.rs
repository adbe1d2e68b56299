//! One decision about weights and state for several entries.
//!
//! Each entry alone gives a lower bound, and a proposal for what lies in memory. The other entries are solved again for
//! each proposal; most often one of them serves all entries as well as their own, which proves it best. Otherwise the
//! entries are searched side by side over what any of them proposed, and the gap to the bound remains in sight.

use super::{Budget, Choice, ExtractError, Extraction, Limits, extract};
use crate::cost::Cost;
use crate::counters::Effort;
use crate::layout_graph::{GroupKind, LayoutGraph, Unfolded};
use std::collections::{BTreeMap, BTreeSet};

/// How much less a search over several entries keeps than one over a single entry.
const BESIDE: usize = 64;

/// What is chosen for all entries.
#[derive(Clone, Debug, PartialEq)]
pub struct Joint {
    /// Per entry, the choices in terms of its graph.
    pub choices: Vec<BTreeMap<u32, Choice>>,
    /// The extraction of all together; its choices are those of the first entry.
    pub total: Extraction,
}

/// Per stored group, the productions that may be chosen.
type Stored = BTreeMap<u32, BTreeSet<u16>>;

/// The best plan for entries whose layout graphs differ in prices only.
///
/// # Errors
/// The budget is below what any plan takes.
pub fn extract_entries(
    graphs: &[LayoutGraph],
    budget: Budget,
    limits: Limits,
) -> Result<Joint, ExtractError> {
    let mut alone = graphs.iter().map(|g| extract(g, budget, limits)).collect::<Result<Vec<_>, _>>()?;
    if let [only] = alone.as_slice() {
        return Ok(Joint { choices: vec![only.choices.clone()], total: only.clone() });
    }
    let least_bytes = alone.iter().map(|e| e.least_bytes).max().unwrap_or(0);
    let fewest = budget == Budget::Fewest;
    let budget = alone.iter().filter_map(|e| e.budget).max();
    let bound: Cost = alone.iter().map(|e| e.bound).sum();
    let within = match budget {
        Some(bytes) => Budget::Bytes(bytes),
        None if fewest => Budget::Fewest,
        None => Budget::Free,
    };
    let mut effort: Effort = alone.iter_mut().map(|e| std::mem::take(&mut e.effort)).sum();
    let mut best: Option<Joint> = None;
    let mut consider = |found: Joint| {
        if best.as_ref().is_none_or(|b| found.total.cost < b.total.cost) {
            best = Some(found);
        }
    };
    let proposals: Vec<Stored> = graphs.iter().zip(&alone).map(|(g, e)| stored(g, &e.choices)).collect();
    for (master, proposal) in proposals.iter().enumerate() {
        let followed = graphs.iter().zip(&alone).enumerate().map(|(entry, (graph, own))| {
            if entry == master { Ok(own.clone()) } else { follow(graph, proposal, within, limits) }
        });
        // A proposal may leave no plan to another entry.
        let Ok(all) = followed.collect::<Result<Vec<_>, ExtractError>>() else { continue };
        effort = effort + all.iter().map(|e| e.effort).sum();
        consider(together(&all, bound, least_bytes, budget));
    }
    let settled = best.as_ref().is_some_and(|b| b.total.cost.picoseconds() <= bound.picoseconds());
    // What one entry needs at least is what all do, as they differ in prices only.
    if !settled && !fewest {
        let any = proposals.into_iter().fold(Stored::new(), |mut all, proposal| {
            proposal.into_iter().for_each(|(group, some)| all.entry(group).or_default().extend(some));
            all
        });
        if let Ok(mut found) = side_by_side(graphs, &any, within, limits, bound, least_bytes) {
            effort = effort + std::mem::take(&mut found.total.effort);
            let better = best.as_ref().is_none_or(|b| found.total.cost < b.total.cost);
            if better {
                best = Some(found);
            }
        }
    }
    let mut best = match best {
        Some(best) => best,
        None => side_by_side(graphs, &Stored::new(), within, limits, bound, least_bytes)?,
    };
    best.total.effort = effort + best.total.effort;
    Ok(best)
}

/// What lies in memory in a plan.
fn stored(graph: &LayoutGraph, choices: &BTreeMap<u32, Choice>) -> Stored {
    let is_stored = |group: u32| graph.groups[group as usize].kind == GroupKind::Stored;
    choices
        .iter()
        .filter(|(group, _)| is_stored(**group))
        .map(|(&group, choice)| (group, choice.productions.iter().copied().collect()))
        .collect()
}

/// The graph with no other productions of stored groups than these, and per group those that were kept. Groups that
/// are not named keep all.
fn restricted(graph: &LayoutGraph, allowed: &Stored) -> (LayoutGraph, BTreeMap<u32, Vec<u16>>) {
    let mut graph = graph.clone();
    let mut kept = BTreeMap::new();
    for (&group, allowed) in allowed {
        let productions = std::mem::take(&mut graph.groups[group as usize].productions);
        let chosen = productions.into_iter().enumerate().filter(|(i, _)| allowed.contains(&(*i as u16)));
        let (names, chosen): (Vec<u16>, Vec<_>) = chosen.map(|(i, p)| (i as u16, p)).unzip();
        graph.groups[group as usize].productions = chosen;
        kept.insert(group, names);
    }
    (graph, kept)
}

/// What a plan has in memory, and nothing else.
fn complete(graph: &LayoutGraph, mut proposal: Stored) -> Stored {
    for (index, group) in graph.groups.iter().enumerate() {
        if group.kind == GroupKind::Stored {
            proposal.entry(index as u32).or_default();
        }
    }
    proposal
}

/// Names the productions of a restricted graph as in the whole one.
fn unrestricted(choices: &mut BTreeMap<u32, Choice>, kept: &BTreeMap<u32, Vec<u16>>) {
    for (group, choice) in choices {
        let Some(names) = kept.get(group) else { continue };
        for production in &mut choice.productions {
            *production = names.get(usize::from(*production)).copied().unwrap_or(*production);
        }
    }
}

fn follow(
    graph: &LayoutGraph,
    proposal: &Stored,
    budget: Budget,
    limits: Limits,
) -> Result<Extraction, ExtractError> {
    let (graph, kept) = restricted(graph, &complete(graph, proposal.clone()));
    let mut found = extract(&graph, budget, limits)?;
    unrestricted(&mut found.choices, &kept);
    Ok(found)
}

fn together(all: &[Extraction], bound: Cost, least_bytes: u64, budget: Option<u64>) -> Joint {
    let cost: Cost = all.iter().map(|e| e.cost).sum();
    let choices: Vec<BTreeMap<u32, Choice>> = all.iter().map(|e| e.choices.clone()).collect();
    let total = Extraction {
        choices: choices.first().cloned().unwrap_or_default(),
        cost,
        bytes: all.iter().map(|e| e.bytes).max().unwrap_or(0),
        least_bytes,
        budget,
        bound: bound.min(cost),
        segments: all.first().map_or((0, 0), |e| e.segments),
        distinct: all.first().map_or_else(Default::default, |e| e.distinct),
        effort: Effort::default(),
    };
    Joint { choices, total }
}

fn side_by_side(
    graphs: &[LayoutGraph],
    allowed: &Stored,
    budget: Budget,
    limits: Limits,
    bound: Cost,
    least_bytes: u64,
) -> Result<Joint, ExtractError> {
    // States multiply over the entries, and this only improves on a plan that is there already.
    let limits = if allowed.is_empty() {
        limits
    } else {
        Limits { states: limits.states / BESIDE + 1, labels: limits.labels / BESIDE + 1 }
    };
    let (graphs, kept): (Vec<LayoutGraph>, Vec<_>) = graphs.iter().map(|g| restricted(g, allowed)).unzip();
    let unfolded = Unfolded::new(&graphs);
    let mut total = extract(&unfolded.graph, budget, limits)?;
    let mut choices = Vec::new();
    for (entry, (graph, kept)) in graphs.iter().zip(&kept).enumerate() {
        let mut folded = unfolded.fold(entry, graph, &total.choices);
        unrestricted(&mut folded, kept);
        choices.push(folded);
    }
    // Its own bound is about the restricted choice only, unless nothing was restricted.
    total.bound = if allowed.is_empty() { total.bound.max(bound) } else { bound }.min(total.cost);
    total.least_bytes = least_bytes;
    total.choices = choices.first().cloned().unwrap_or_default();
    Ok(Joint { choices, total })
}
