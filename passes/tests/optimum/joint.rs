//! Entries that share memory, against every set of things that may lie in it.

use crate::exhaustive::{Point, fastest, trade_offs, undominated};
use crate::random::{Random, graph, repriced, text};
use tpshard_passes::cost::Cost;
use tpshard_passes::extract::{Budget, ExtractError, Limits, extract_entries};
use tpshard_passes::layout_graph::{GroupKind, LayoutGraph};

/// The trade-offs of all entries together: for each choice of what may lie in memory, every entry alone does best.
fn joint_trade_offs(graphs: &[LayoutGraph]) -> Vec<Point> {
    let stored: Vec<(usize, usize)> = (0..graphs[0].groups.len())
        .filter(|&g| graphs[0].groups[g].kind == GroupKind::Stored)
        .flat_map(|g| (0..graphs[0].groups[g].productions.len()).map(move |p| (g, p)))
        .collect();
    let mut points = Vec::new();
    for chosen in 0u32..1 << stored.len() {
        let lies = |group: usize, production: usize| {
            stored.iter().position(|&s| s == (group, production)).is_some_and(|at| chosen >> at & 1 == 1)
        };
        let twice = |g: usize| {
            let group = &graphs[0].groups[g];
            group.single && (0..group.productions.len()).filter(|&p| lies(g, p)).count() > 1
        };
        if (0..graphs[0].groups.len()).any(twice) {
            continue;
        }
        let bytes = stored
            .iter()
            .filter(|&&(g, p)| lies(g, p))
            .map(|&(g, p)| graphs[0].groups[g].productions[p].bytes)
            .sum();
        let alone = |graph: &LayoutGraph| {
            let mut graph = graph.clone();
            for (index, group) in graph.groups.iter_mut().enumerate() {
                if group.kind == GroupKind::Stored {
                    let mut number = 0..;
                    group.productions.retain(|_| number.next().is_some_and(|p| lies(index, p)));
                }
            }
            fastest(&trade_offs(&graph), u64::MAX)
        };
        if let Some(cost) = graphs.iter().map(alone).sum::<Option<Cost>>() {
            points.push((cost, bytes));
        }
    }
    undominated(points)
}

#[derive(Debug, Default)]
struct Tally {
    compared: usize,
    optimal: usize,
    optimal_with_gap: usize,
    suboptimal: usize,
    refused: usize,
}

fn check(seed: u64, tally: &mut Tally) -> Result<(), String> {
    let first = graph(seed);
    let productions =
        first.groups.iter().filter(|g| g.kind == GroupKind::Stored).map(|g| g.productions.len());
    if productions.sum::<usize>() > 9 {
        return Ok(());
    }
    let graphs = [repriced(&first, seed + 1), first];
    let points = joint_trade_offs(&graphs);
    let least = points.iter().map(|p| p.1).min();
    let mut random = Random(seed);
    let mut budgets = vec![Budget::Free, Budget::Least, Budget::Fewest];
    if let Some(&(_, bytes)) = points.get(random.below(points.len() as u64) as usize) {
        budgets.extend([Budget::Bytes(bytes), Budget::Bytes(bytes.saturating_sub(1))]);
    }
    for budget in budgets {
        tally.compared += 1;
        let fail = |what: String| Err(format!("{budget:?}: {what}\n{}", text(&graphs[0])));
        let found = match extract_entries(&graphs, budget, Limits::default()) {
            Ok(found) => found.total,
            Err(ExtractError::Impossible) if least.is_none() => continue,
            Err(ExtractError::Budget { least: said, budget: allowed })
                if least.is_some_and(|l| allowed < l) =>
            {
                if least.is_some_and(|l| said > l) {
                    return fail(format!("{said} bytes are said to be the least, not {least:?}"));
                }
                tally.refused += 1;
                continue;
            }
            Err(error) => return fail(format!("{error:?}, the least is {least:?}")),
        };
        let Some(least) = least else { return fail("found what cannot be".into()) };
        let allowed = match budget {
            Budget::Free => u64::MAX,
            Budget::Fewest => least,
            Budget::Least => least + least / 500,
            Budget::Bytes(bytes) => bytes,
        };
        if found.bytes > allowed {
            return fail(format!("{} bytes of {allowed}", found.bytes));
        }
        let Some(optimum) = fastest(&points, allowed) else { return fail("no plan".into()) };
        if found.cost < optimum {
            return fail(format!("{:?} is better than the best, {optimum:?}", found.cost));
        }
        if found.bound > optimum {
            return fail(format!("the bound {:?} is above the optimum {optimum:?}", found.bound));
        }
        if budget != Budget::Fewest {
            tally.optimal += usize::from(found.cost == optimum);
            tally.suboptimal += usize::from(found.cost != optimum);
            tally.optimal_with_gap += usize::from(found.cost == optimum && found.gap() > 0.0);
        }
    }
    Ok(())
}

#[test]
fn two_entries() {
    let mut tally = Tally::default();
    let failed: Vec<String> = (0..1500)
        .filter_map(|seed| check(seed, &mut tally).err().map(|e| format!("seed {seed}: {e}")))
        .collect();
    println!("{tally:?}");
    assert!(failed.is_empty(), "{} fail, the first:\n{}", failed.len(), failed[0]);
}
