//! Choosing the best plan: exact extraction from a layout graph under a budget of bytes.
//!
//! Without a binding budget one search for the least time is enough. With one, a price per byte is sought at which
//! the budget is just kept: each price gives a lower bound on every plan within the budget, and often the best plan
//! itself. What gap remains is closed by a search that keeps every trade-off between time and bytes.
//!
//! What must not live here: operations, layouts, hardware. The search sees costs, bytes and who needs what.

mod choices;
mod joint;
mod search;
mod trees;

pub use choices::{Choice, Choices, Slots};
pub use joint::{Joint, extract_entries};
pub use search::{Aim, Limits};

use crate::cost::Cost;
use crate::counters::Effort;
use crate::layout_graph::{LayoutGraph, Sizes};
use crate::segment::{Segment, segments};
use search::{Found, Search};
use std::collections::{BTreeMap, BTreeSet};

/// What the bytes of a plan are limited to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Budget {
    Free,
    /// The fewest possible, whatever time it takes: no search for time, and no bound on it.
    Fewest,
    /// At most 1.002 times the fewest possible.
    Least,
    Bytes(u64),
}

/// A plan in terms of the layout graph.
#[derive(Clone, Debug, PartialEq)]
pub struct Extraction {
    /// Per planned group that is needed, what was chosen.
    pub choices: BTreeMap<u32, Choice>,
    pub cost: Cost,
    pub bytes: u64,
    /// The fewest bytes any plan takes.
    pub least_bytes: u64,
    /// The budget that was kept, if any.
    pub budget: Option<u64>,
    /// No plan within the budget takes less time than this.
    pub bound: Cost,
    /// How many segments the graph has, and how many different ones.
    pub segments: (usize, usize),
    /// The sizes of the different ones: what is searched, however often they are repeated.
    pub distinct: Sizes,
    pub effort: Effort,
}

impl Extraction {
    /// How far above the lower bound the plan is, as a share of the bound.
    pub fn gap(&self) -> f64 {
        let (cost, bound) = (self.cost.picoseconds(), self.bound.picoseconds());
        if bound == 0 {
            f64::from(u8::from(cost > 0))
        } else {
            cost.saturating_sub(bound) as f64 / bound as f64
        }
    }
}

/// Why there is no plan.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum ExtractError {
    #[error(
        "a rank needs at least {least} bytes for weights and state, {budget} are allowed\n\
         help: use more ranks, a smaller state (--dim), or allow more (--memory)"
    )]
    Budget { least: u64, budget: u64 },
    #[error(
        "no combination of layouts computes all outputs\n\
         help: pins may contradict each other through what lies between them, remove one; without pins this is a \
         fault of the planner, please report it with the model"
    )]
    Impossible,
}

/// Most prices that are tried.
const PRICES: usize = 24;
/// The highest price: a second per byte.
const HIGHEST_PRICE: f64 = 1e12;
/// The most that all bytes of a plan may be worth, in picoseconds: what prices make of them is added up in 64 bits.
const HIGHEST_WORTH: f64 = 1e18;

/// The plan that takes the least time within `budget`.
///
/// # Errors
/// The budget is below what any plan takes.
pub fn extract(graph: &LayoutGraph, budget: Budget, limits: Limits) -> Result<Extraction, ExtractError> {
    let segments = segments(graph);
    let shapes = segments.iter().map(|s| s.shape + 1).max().unwrap_or(0);
    let distinct = distinct_sizes(graph, &segments);
    let mut choices = Choices::new(graph);
    let mut narrow = limits;
    let leanest = Search::new(graph, &mut choices, Aim::Bytes, limits)
        .run(&segments)
        .ok_or(ExtractError::Impossible)?;
    if budget == Budget::Fewest {
        let chosen = leanest.choices.iter().map(|(&g, &c)| (g, choices.all[c as usize].clone())).collect();
        return Ok(Extraction {
            choices: chosen,
            cost: leanest.cost,
            bytes: leanest.bytes,
            least_bytes: leanest.bytes,
            budget: None,
            bound: Cost::ZERO,
            segments: (segments.len(), shapes),
            distinct,
            effort: choices.effort,
        });
    }
    let budget = match budget {
        Budget::Free | Budget::Fewest => None,
        Budget::Least => Some(leanest.bytes.saturating_add(leanest.bytes / 500)),
        Budget::Bytes(bytes) => Some(bytes),
    };
    if let Some(budget) = budget.filter(|&b| b < leanest.bytes) {
        return Err(ExtractError::Budget { least: leanest.bytes, budget });
    }
    let aim = Aim::Time { price: 0.0 };
    let fastest =
        Search::new(graph, &mut choices, aim, limits).run(&segments).ok_or(ExtractError::Impossible)?;
    if !fastest.complete {
        // The rest would be cut short, too: less of it gives as good a plan sooner.
        narrow = Limits { states: limits.states / 8 + 1, labels: limits.labels / 8 + 1 };
    }
    let mut run = |aim: Aim| Search::new(graph, &mut choices, aim, narrow).run(&segments);
    let least_bytes = leanest.bytes;
    let mut outcome = match budget.filter(|&b| fastest.bytes > b) {
        None => Outcome { bound: lower_bound(&fastest, 0.0, 0), best: fastest },
        Some(bytes) => within(leanest, fastest, bytes, all_bytes(graph), &mut run),
    };
    if outcome.bound < outcome.best.cost {
        let (bound, effort) = without_conversions(graph, limits);
        choices.effort = choices.effort + effort;
        outcome.bound = outcome.bound.max(bound).min(outcome.best.cost);
    }
    let found = outcome.best;
    let chosen = found.choices.iter().map(|(&g, &c)| (g, choices.all[c as usize].clone())).collect();
    Ok(Extraction {
        choices: chosen,
        cost: found.cost,
        bytes: found.bytes,
        least_bytes,
        budget,
        bound: outcome.bound,
        segments: (segments.len(), shapes),
        distinct,
        effort: choices.effort,
    })
}

/// The sizes of one segment of every shape, together.
fn distinct_sizes(graph: &LayoutGraph, segments: &[Segment]) -> Sizes {
    let mut seen = BTreeSet::new();
    let first = segments.iter().filter(|s| seen.insert(s.shape));
    first.map(|s| Sizes::of(graph.groups.get(s.low as usize..s.high as usize).unwrap_or_default())).sum()
}

struct Outcome {
    best: Found,
    bound: Cost,
}

/// More than any plan takes.
fn all_bytes(graph: &LayoutGraph) -> u64 {
    graph.groups.iter().flat_map(|g| &g.productions).fold(0, |all, p| all.saturating_add(p.bytes))
}

/// What a finished search at `price` says about every plan of at most `budget` bytes. A search that was cut short
/// says nothing.
fn lower_bound(found: &Found, price: f64, budget: u64) -> Cost {
    if !found.complete {
        return Cost::ZERO;
    }
    let allowance = ((budget as f64 * price).ceil() as u128) << 64;
    Cost::from_raw(found.rank.saturating_sub(allowance))
}

/// The time of the best plan if conversions cost nothing: then layouts hardly matter, and no search is cut short.
fn without_conversions(graph: &LayoutGraph, limits: Limits) -> (Cost, Effort) {
    let mut relaxed = graph.clone();
    for edge in relaxed.groups.iter_mut().flat_map(|g| &mut g.conversions) {
        edge.cost = Cost::ZERO;
    }
    let segments = segments(&relaxed);
    let mut choices = Choices::new(&relaxed);
    let found = Search::new(&relaxed, &mut choices, Aim::Time { price: 0.0 }, limits).run(&segments);
    (found.map_or(Cost::ZERO, |found| lower_bound(&found, 0.0, 0)), choices.effort)
}

fn within(
    leanest: Found,
    fastest: Found,
    budget: u64,
    all_bytes: u64,
    run: &mut impl FnMut(Aim) -> Option<Found>,
) -> Outcome {
    let mut bound = lower_bound(&fastest, 0.0, 0);
    let mut best = leanest;
    // The best price makes a plan above and a plan below the budget equally good, and no plan better. It is found by
    // moving to the plan that is better at the price at which the current two are equal.
    let mut above = (fastest.cost, fastest.bytes);
    for _ in 0..PRICES {
        let saved = best.cost.picoseconds().saturating_sub(above.0.picoseconds());
        let spent = above.1.saturating_sub(best.bytes).max(1);
        let most = HIGHEST_PRICE.min(HIGHEST_WORTH / all_bytes.max(1) as f64);
        let price = (saved as f64 / spent as f64).min(most);
        let Some(found) = run(Aim::Time { price }) else { break };
        bound = bound.max(lower_bound(&found, price, budget));
        if found.bytes > budget {
            if found.bytes >= above.1 {
                break;
            }
            above = (found.cost, found.bytes);
        } else if found.cost < best.cost {
            best = found;
        } else {
            break;
        }
        if bound >= best.cost {
            break;
        }
    }
    if bound >= best.cost {
        return Outcome { bound: best.cost, best };
    }
    if let Some(found) = run(Aim::Both { budget, most: best.cost }) {
        let complete = found.complete;
        if found.cost <= best.cost {
            best = found;
        }
        if complete {
            bound = best.cost;
        }
    }
    Outcome { bound, best }
}

/// The segments of a graph, for reports and tests.
pub fn segments_of(graph: &LayoutGraph) -> Vec<Segment> {
    segments(graph)
}
