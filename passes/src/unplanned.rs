//! The time of what plans do not decide about: the same in every plan, up to which parts of it are needed.

use crate::cost::{Cost, Pricer};
use crate::layout_graph::{GroupKind, LayoutGraph};
use std::collections::BTreeSet;
use tpshard_ir::{Graph, Layout, Op, Output};

/// What every plan spends at least on values outside the plan. A value counts if an output is one, if everything that
/// makes a value that counts reads it, or if another one that counts does.
pub(crate) fn least_cost(
    graph: &Graph,
    layouts: &LayoutGraph,
    outputs: &[Output],
    pricer: &Pricer<'_>,
) -> Cost {
    let mut counts = vec![false; layouts.groups.len()];
    let count = |counts: &mut Vec<bool>, group: u32| counts[group as usize] = true;
    for output in outputs {
        if let Some(group) = layouts.group_of[output.value.index()] {
            count(&mut counts, group);
        }
    }
    let whole = Layout::replicated(&layouts.mesh);
    let mut total = Cost::ZERO;
    for index in (0..layouts.groups.len()).rev() {
        if !counts[index] {
            continue;
        }
        let group = &layouts.groups[index];
        if group.kind == GroupKind::Free {
            let node = graph.node(group.value);
            node.args
                .iter()
                .filter_map(|a| layouts.group_of[a.index()])
                .for_each(|operand| count(&mut counts, operand));
            let operands = vec![&whole; node.args.len()];
            // Positions are counted out in the layout that is wanted, all else is computed whole and cut.
            let made_in =
                if matches!(node.op, Op::Iota { .. }) { &group.layouts[..] } else { &group.layouts[..1] };
            let cost = made_in.iter().map(|l| pricer.compute(group.value, &operands, l, &layouts.mesh)).min();
            total = total + cost.unwrap_or_default();
            continue;
        }
        let reads = |p: &crate::layout_graph::Production| -> BTreeSet<u32> {
            p.operands.iter().map(|o| o.group).collect()
        };
        let always = group.productions.iter().map(reads).reduce(|a, b| &a & &b).unwrap_or_default();
        always.into_iter().for_each(|operand| count(&mut counts, operand));
    }
    total
}
