//! What would fit a budget that a plan does not: fewer bytes per rank by more ranks, or by shorter sequences.

use crate::extended::Extended;
use crate::plan::{MAX_RANKS, MemoryGoal, PlanError, PlanOptions, plan};
use std::sync::Arc;

/// The bytes a rank needs in the leanest plan: weights, state and the activations of that plan.
///
/// # Errors
/// There is no plan.
pub fn least_bytes(extended: &Extended, options: &PlanOptions) -> Result<u64, PlanError> {
    let options = PlanOptions { memory: MemoryGoal::Fewest, ..options.clone() };
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
    let bytes = |ranks: usize| least_bytes(extended, &PlanOptions { ranks, ..options.clone() });
    let mut low = (options.ranks, bytes(options.ranks)?);
    let high = loop {
        let ranks = low.0.saturating_mul(2).min(MAX_RANKS);
        let high = (ranks, bytes(ranks)?);
        if high.1 <= budget {
            break ranks;
        }
        // Where twice the ranks save next to nothing, what is left is held whole by every rank.
        if ranks == MAX_RANKS || high.1 >= low.1 - low.1 / 64 {
            return Ok(None);
        }
        low = high;
    };
    let (mut low, mut high) = (low.0, high);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if bytes(middle)? <= budget { high = middle } else { low = middle }
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
    let bytes = |size: i64| -> Result<u64, PlanError> {
        let mut options = options.clone();
        for entry in &mut options.entries {
            for bindings in [&mut entry.bindings, &mut entry.largest] {
                bindings.entry(symbol.clone()).and_modify(|value| *value = size.min(*value));
            }
        }
        least_bytes(extended, &options)
    };
    let given = options.entries.iter().filter_map(|e| e.largest.get(symbol)).max().copied();
    let Some(given) = given.filter(|&given| given > 1) else { return Ok(None) };
    let (mut low, mut high) = ((1, bytes(1)?), (given, bytes(given)?));
    if low.1 > budget {
        return Ok(None);
    }
    // Bytes grow nearly in proportion to the size: the proportional guess is right at once or next to it, and halving
    // in between keeps this short where they do not.
    for round in 0u32.. {
        if high.0 - low.0 <= 1 {
            break;
        }
        let share = (budget - low.1) as f64 / high.1.saturating_sub(low.1).max(1) as f64;
        let guess = match round % 4 {
            3 => low.0 + (high.0 - low.0) / 2,
            odd => low.0 + ((high.0 - low.0) as f64 * share) as i64 + i64::from(odd == 1),
        };
        let size = guess.clamp(low.0 + 1, high.0 - 1);
        let found = (size, bytes(size)?);
        if found.1 <= budget { low = found } else { high = found }
    }
    Ok(Some(low.0))
}
