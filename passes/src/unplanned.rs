//! The time of what plans do not decide about: the same in every plan, up to which parts of it are needed.

use crate::cost::{Cost, Pricer};
use crate::layout_graph::{GroupKind, LayoutGraph};
use tpshard_ir::{Graph, Layout, Op, Output};

/// A set of groups outside the plan, a bit each.
type Set = Vec<u64>;

/// What every plan spends at least on values outside the plan: those without which no output can be made, however it
/// is made.
pub(crate) fn least_cost(
    graph: &Graph,
    layouts: &LayoutGraph,
    outputs: &[Output],
    pricer: &Pricer<'_>,
) -> Cost {
    let costs: Vec<Option<(usize, Cost)>> = priced(graph, layouts, pricer);
    let words = costs.iter().flatten().count().div_ceil(64);
    let mut needs: Vec<Set> = Vec::with_capacity(layouts.groups.len());
    for (index, group) in layouts.groups.iter().enumerate() {
        let mut set = match group.kind {
            GroupKind::Free => {
                let operands = graph.node(group.value).args.iter();
                union(words, &needs, operands.filter_map(|a| layouts.group_of[a.index()]))
            }
            // What all ways to make it have in common.
            _ => {
                let of = group.productions.iter();
                let of = of.map(|p| union(words, &needs, p.operands.iter().map(|o| o.group)));
                of.reduce(|a, b| a.iter().zip(&b).map(|(a, b)| a & b).collect()).unwrap_or(vec![0; words])
            }
        };
        if let Some((bit, _)) = costs[index] {
            set[bit / 64] |= 1 << (bit % 64);
        }
        needs.push(set);
    }
    let wanted = outputs.iter().filter_map(|output| layouts.group_of[output.value.index()]);
    let needed = union(words, &needs, wanted);
    let counts = |bit: usize| needed[bit / 64] & (1 << (bit % 64)) != 0;
    costs.into_iter().flatten().filter(|(bit, _)| counts(*bit)).map(|(_, cost)| cost).sum()
}

fn union(words: usize, needs: &[Set], groups: impl Iterator<Item = u32>) -> Set {
    let mut all = vec![0; words];
    for set in groups.filter_map(|group| needs.get(group as usize)) {
        all.iter_mut().zip(set).for_each(|(all, more)| *all |= more);
    }
    all
}

/// Per group outside the plan that costs something: its bit, and what it costs.
fn priced(graph: &Graph, layouts: &LayoutGraph, pricer: &Pricer<'_>) -> Vec<Option<(usize, Cost)>> {
    let whole = Layout::replicated(&layouts.mesh);
    let mut bits = 0..;
    let cost_of = |group: &crate::layout_graph::Group| {
        if group.kind != GroupKind::Free {
            return None;
        }
        let node = graph.node(group.value);
        let operands = vec![&whole; node.args.len()];
        // Positions are counted out in the layout that is wanted, all else is computed whole and cut.
        let made_in =
            if matches!(node.op, Op::Iota { .. }) { &group.layouts[..] } else { &group.layouts[..1] };
        let cost = made_in.iter().map(|l| pricer.compute(group.value, &operands, l, &layouts.mesh)).min()?;
        if cost == Cost::ZERO { None } else { bits.next().map(|bit| (bit, cost)) }
    };
    layouts.groups.iter().map(cost_of).collect()
}
