//! The extraction against every plan there is: small random layout graphs, with random costs, are searched
//! exhaustively.

#[path = "../common/mod.rs"]
mod common;
mod exhaustive;
mod joint;
mod random;
mod regressions;

use exhaustive::{Point, fastest, trade_offs};
use tpshard_passes::cost::Cost;
use tpshard_passes::extract::{Budget, ExtractError, Extraction, Limits, extract};
use tpshard_passes::layout_graph::LayoutGraph;

/// What many comparisons came to.
#[derive(Debug, Default)]
struct Tally {
    compared: usize,
    impossible: usize,
    refused: usize,
    cut_short: usize,
    suboptimal: usize,
}

/// The time and the bytes of what was chosen, worked out from the graph alone; what is wrong with it otherwise.
fn replay(graph: &LayoutGraph, found: &Extraction) -> Result<Point, String> {
    let mut demands = vec![0u64; graph.groups.len()];
    let (mut cost, mut bytes) = (Cost::ZERO, 0u64);
    for (index, group) in graph.groups.iter().enumerate().rev() {
        let wanted = demands[index];
        if !graph.is_planned(index as u32) || (wanted == 0 && group.exits.is_empty()) {
            continue;
        }
        let choice =
            found.choices.get(&(index as u32)).ok_or(format!("nothing is chosen for group {index}"))?;
        let mut wanted = wanted;
        let exit = choice.exit.map(|e| &group.exits[usize::from(e)]);
        if exit.is_some() == group.exits.is_empty() {
            return Err(format!("group {index} leaves by {:?}", choice.exit));
        }
        if let Some(exit) = exit {
            wanted |= 1 << exit.slot;
            cost = cost + exit.cost;
            exit.also.iter().for_each(|o| demands[o.group as usize] |= 1 << o.slot);
        }
        if group.single && choice.productions.len() > 1 {
            return Err(format!("group {index} lies in memory more than once"));
        }
        let mut have = 0u64;
        for &production in &choice.productions {
            let production = &group.productions[usize::from(production)];
            have |= 1 << production.out;
            cost = cost + production.cost;
            bytes += production.bytes;
            production.operands.iter().for_each(|o| demands[o.group as usize] |= 1 << o.slot);
        }
        for &edge in &choice.conversions {
            let edge = &group.conversions[usize::from(edge)];
            if have >> edge.from & 1 == 0 {
                return Err(format!("group {index} converts slot {}, which is not there", edge.from));
            }
            have |= 1 << edge.to;
            cost = cost + edge.cost;
        }
        if wanted & !have != 0 {
            return Err(format!("group {index} has slots {have:b}, {wanted:b} are wanted"));
        }
    }
    Ok((cost, bytes))
}

/// The budgets worth asking for.
fn budgets(points: &[Point], seed: u64) -> Vec<Budget> {
    let mut all = vec![Budget::Free, Budget::Least, Budget::Fewest];
    let mut random = random::Random(seed);
    for _ in 0..2 {
        if let Some(&(_, bytes)) = points.get(random.below(points.len() as u64) as usize) {
            all.extend([bytes.saturating_sub(1), bytes, bytes + 1].map(Budget::Bytes));
        }
    }
    if let [.., leaner] = points {
        all.push(Budget::Bytes(random.range(leaner.1, points[0].1)));
    }
    all
}

/// `exact`: the limits leave nothing out, so that the optimum itself must be found.
fn compare(
    graph: &LayoutGraph,
    points: &[Point],
    budget: Budget,
    limits: Limits,
    exact: bool,
    tally: &mut Tally,
) -> Result<(), String> {
    tally.compared += 1;
    let least = points.iter().map(|p| p.1).min();
    let found = match (extract(graph, budget, limits), least) {
        (Ok(found), Some(_)) => found,
        (Err(ExtractError::Impossible), None) => {
            tally.impossible += 1;
            return Ok(());
        }
        (Err(ExtractError::Budget { least: said, budget }), Some(least))
            if budget < least && (said == least || !exact) =>
        {
            tally.refused += 1;
            return Ok(());
        }
        (Err(_), Some(_)) if !exact => {
            tally.cut_short += 1;
            return Ok(());
        }
        (other, _) => return Err(format!("the least is {least:?} bytes, but: {other:?}")),
    };
    let least = least.unwrap_or(0);
    let said = (found.cost, found.bytes);
    let is = replay(graph, &found)?;
    if is != said {
        return Err(format!("the plan says {said:?} and is {is:?}"));
    }
    if exact && found.least_bytes != least {
        return Err(format!("the least is {} bytes, not {least}", found.least_bytes));
    }
    let asked = budget;
    let budget = match asked {
        Budget::Free => u64::MAX,
        Budget::Fewest if exact => least,
        Budget::Fewest => u64::MAX,
        Budget::Least => found.least_bytes + found.least_bytes / 500,
        Budget::Bytes(bytes) => bytes,
    };
    if found.bytes > budget {
        return Err(format!("{} bytes of {budget}", found.bytes));
    }
    let optimum = fastest(points, budget).ok_or(format!("no plan keeps {budget} bytes"))?;
    if found.cost < optimum || found.bound > optimum {
        return Err(format!("{} >= {optimum:?} >= {:?} does not hold", ps(found.cost), found.bound));
    }
    tally.suboptimal += usize::from(found.cost > optimum);
    tally.cut_short += usize::from(found.bound < found.cost);
    if !exact {
        return Ok(());
    }
    // A search for memory compares times by picoseconds alone, and has no bound on them.
    let (same, bounded) = if asked == Budget::Fewest {
        (found.cost.picoseconds() == optimum.picoseconds(), true)
    } else {
        (found.cost == optimum, found.bound == optimum)
    };
    if !same || !bounded {
        return Err(format!(
            "{}, bound {}, for {} within {budget} bytes",
            ps(found.cost),
            ps(found.bound),
            ps(optimum)
        ));
    }
    Ok(())
}

fn ps(cost: Cost) -> String {
    format!("{} ps ({cost:?})", cost.picoseconds())
}

/// What is wrong for one of the budgets, if anything.
fn check(
    graph: &LayoutGraph,
    seed: u64,
    limits: Limits,
    exact: bool,
    tally: &mut Tally,
) -> Result<(), String> {
    let points = trade_offs(graph);
    for budget in budgets(&points, seed) {
        compare(graph, &points, budget, limits, exact, tally).map_err(|e| format!("{budget:?}: {e}"))?;
    }
    Ok(())
}

/// Checks the graphs of all seeds. The first that fails is made as small as it can be and still fail.
fn check_all(
    make: fn(u64) -> LayoutGraph,
    seeds: std::ops::Range<u64>,
    limits: Limits,
    exact: bool,
) -> Tally {
    let mut tally = Tally::default();
    for seed in seeds {
        let graph = make(seed);
        let Err(mut error) = check(&graph, seed, limits, exact, &mut tally) else { continue };
        let (first, mut graph) = (error.clone(), graph);
        let fails = |g: &LayoutGraph| check(g, seed, limits, exact, &mut Tally::default()).err();
        while let Some((next, why)) =
            random::smaller(&graph).into_iter().find_map(|g| fails(&g).map(|why| (g, why)))
        {
            (graph, error) = (next, why);
        }
        panic!("seed {seed}: {first}\nmade smaller: {error}\n{}", random::text(&graph));
    }
    tally
}

#[test]
fn small_graphs() {
    let tally = check_all(random::graph, 0..4000, Limits::default(), true);
    println!("{tally:?}");
    assert!(
        tally.compared > 20_000 && tally.refused > 500 && tally.impossible < tally.compared / 2,
        "{tally:?}"
    );
}

#[test]
fn graphs_with_layers() {
    let tally = check_all(random::layers, 0..400, Limits::default(), true);
    println!("{tally:?}");
}

/// A search that is cut short may miss the optimum, but never claims to know better than it does.
#[test]
fn bounds_hold_where_the_search_is_cut_short() {
    for (states, labels) in [(1, 1), (2, 1), (3, 2), (8, 3)] {
        let tally = check_all(random::graph, 10_000..10_500, Limits { states, labels }, false);
        println!("{states} states, {labels} labels: {tally:?}");
    }
}
