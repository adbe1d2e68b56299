//! Small values for dim symbols that keep all guards.

use std::collections::BTreeSet;
use std::sync::Arc;
use tpshard_ir::{Bindings, Dim, Graph, Relation};

/// A well mixed function of its argument (the finaliser of SplitMix64).
pub(crate) fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Up to `wanted` different assignments; fewer if they are hard to find, one without symbols.
pub(crate) fn assignments(graph: &Graph, wanted: usize) -> Vec<Bindings> {
    let mut symbols: BTreeSet<Arc<str>> = graph.symbols.keys().cloned().collect();
    for node in graph.nodes() {
        node.ty.shape.iter().for_each(|dim| symbols.extend(dim.symbols()));
    }
    for guard in &graph.guards {
        symbols.extend(guard.left.symbols());
        symbols.extend(guard.right.symbols());
    }
    let mut found: Vec<Bindings> = Vec::new();
    for attempt in 0..400 {
        let drawn = draw(graph, &symbols, attempt);
        let extents = graph.nodes().iter().flat_map(|n| &n.ty.shape);
        let positive = |dim: &Dim| dim.as_const().is_some() || dim.eval(&drawn).is_ok_and(|v| v >= 0);
        if graph.broken_guards(&drawn).is_empty()
            && in_range(graph, &drawn)
            && extents.clone().all(positive)
            && !found.contains(&drawn)
        {
            found.push(drawn);
            if found.len() == wanted || symbols.is_empty() {
                break;
            }
        }
    }
    found
}

fn draw(graph: &Graph, symbols: &BTreeSet<Arc<str>>, attempt: u64) -> Bindings {
    let mut drawn: Bindings = symbols
        .iter()
        .enumerate()
        .map(|(i, name)| {
            let (low, high) = graph.symbols.get(name).map_or((1, i64::MAX), |r| (r.low.max(1), r.high));
            let spread = 1 + (attempt / 100) as i64 * 4 + 3;
            let offset = (mix(attempt * 1009 + i as u64) % spread as u64) as i64;
            (name.clone(), low.saturating_add(offset).min(high.max(low)))
        })
        .collect();
    // What guards say equals something takes its value.
    for _ in 0..3 {
        for guard in graph.guards.iter().filter(|g| g.relation == Relation::Equal) {
            let (symbol, value) = match (guard.left.as_symbol(), guard.right.as_symbol()) {
                (Some(symbol), _) => (symbol, guard.right.eval(&drawn)),
                (None, Some(symbol)) => (symbol, guard.left.eval(&drawn)),
                (None, None) => continue,
            };
            if let Ok(value) = value {
                drawn.insert(symbol.clone(), value);
            }
        }
    }
    drawn
}

fn in_range(graph: &Graph, drawn: &Bindings) -> bool {
    graph
        .symbols
        .iter()
        .all(|(name, range)| drawn.get(name).is_none_or(|&value| (range.low..=range.high).contains(&value)))
}
