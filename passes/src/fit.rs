//! What would fit a budget that a plan does not: fewer bytes per rank by more ranks, or by shorter sequences.

use crate::extended::Extended;
use crate::plan::{MAX_RANKS, MemoryGoal, PlanError, PlanOptions, plan};
use std::sync::Arc;

/// The bytes a rank needs in the leanest plan: weights, state and the activations of that plan.
///
/// # Errors
/// There is no plan.
pub fn least_bytes(extended: &Extended, options: &PlanOptions) -> Result<u64, PlanError> {
    let options = PlanOptions { memory: MemoryGoal::Least, ..options.clone() };
    let report = plan(extended.clone(), &options)?.report;
    let parts = [report.weight_bytes, report.state_bytes, report.activation_bytes, options.reserve];
    Ok(parts.into_iter().fold(0, u64::saturating_add))
}

/// The smallest number of ranks above that of `options` whose leanest plan keeps `budget` bytes; none if no number does.
///
/// # Errors
/// As [`least_bytes`].
pub fn smallest_ranks(
    extended: &Extended,
    options: &PlanOptions,
    budget: u64,
) -> Result<Option<usize>, PlanError> {
    let fits = |ranks: usize| -> Result<bool, PlanError> {
        Ok(least_bytes(extended, &PlanOptions { ranks, ..options.clone() })? <= budget)
    };
    let mut low = options.ranks;
    let mut high = options.ranks.saturating_mul(2).min(MAX_RANKS);
    while !fits(high)? {
        if high == MAX_RANKS {
            return Ok(None);
        }
        (low, high) = (high, high.saturating_mul(2).min(MAX_RANKS));
    }
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if fits(middle)? { high = middle } else { low = middle }
    }
    Ok(Some(high))
}

/// The largest value of `symbol`, below those of the entries, with which the leanest plan keeps `budget` bytes; none if
/// not even 1 does.
///
/// # Errors
/// As [`least_bytes`].
pub fn largest_size(
    extended: &Extended,
    options: &PlanOptions,
    symbol: &Arc<str>,
    budget: u64,
) -> Result<Option<i64>, PlanError> {
    let fits = |size: i64| -> Result<bool, PlanError> {
        let mut options = options.clone();
        for value in options.entries.iter_mut().filter_map(|e| e.bindings.get_mut(symbol)) {
            *value = size.min(*value);
        }
        Ok(least_bytes(extended, &options)? <= budget)
    };
    let given = options.entries.iter().filter_map(|e| e.bindings.get(symbol)).max();
    let (mut low, mut high) = (1, given.copied().unwrap_or(1));
    if high <= 1 || !fits(low)? {
        return Ok(None);
    }
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if fits(middle)? { low = middle } else { high = middle }
    }
    Ok(Some(low))
}
