//! Whether a step that computes is well typed: on every rank the operands hold what the rank's part of the result
//! needs, and on every mesh axis partial values arise and pass as the operation's algebra allows.

use crate::holding::{Region, fault, monoid_of, region};
use crate::table::{Reduced, View, distributes, restricts};
use tpshard_ir::{AxisLayout, Layout, Mesh, Monoid, Op, Type};

/// Why `op` does not take families in these layouts to a family in `layout`.
pub(crate) fn square_fault(
    op: &Op,
    args: &[&Type],
    layouts: &[&Layout],
    result: &Type,
    layout: &Layout,
    mesh: &Mesh,
) -> Option<String> {
    let all = args.iter().zip(layouts).map(|(ty, l)| (*ty, *l)).chain([(result, layout)]);
    if let Some(fault) = all.clone().find_map(|(ty, l)| fault(ty, l, mesh)) {
        return Some(fault);
    }
    let mut reduced: Vec<Reduced> = Vec::new();
    for rank in 0..mesh.ranks() {
        let held: Option<Vec<Region>> =
            args.iter().zip(layouts).map(|(ty, l)| region(&ty.shape, l, mesh, rank)).collect();
        let (Some(held), Some(made)) = (held, region(&result.shape, layout, mesh, rank)) else {
            return Some("a layout does not fit its value".into());
        };
        match restricts(op, &View { args, result, held: &held, made: &made }) {
            Ok(found) => {
                reduced.extend(found.into_iter().filter(|f| !reduced.contains(f)).collect::<Vec<_>>())
            }
            Err(what) => return Some(format!("on rank {rank}, {what}")),
        }
    }
    (0..mesh.axes()).find_map(|axis| {
        axis_fault(op, args, layouts, result, layout, axis, &reduced)
            .map(|what| format!("on mesh axis {axis}, {what}"))
    })
}

/// Why partial values are not what the operation makes of its operands on one axis.
fn axis_fault(
    op: &Op,
    args: &[&Type],
    layouts: &[&Layout],
    result: &Type,
    layout: &Layout,
    axis: usize,
    reduced: &[Reduced],
) -> Option<String> {
    let made = monoid_of(&layout.0[axis]);
    let members: Vec<bool> = layouts.iter().map(|l| monoid_of(&l.0[axis]).is_some()).collect();
    if members.contains(&true) {
        let Some(monoid) = made else {
            return Some("an operand is partial, the result is not".into());
        };
        let alike = layouts.iter().all(|l| match &l.0[axis] {
            AxisLayout::Partial(own) => *own == monoid,
            AxisLayout::Replicated => true,
            AxisLayout::Shard { .. } => false,
        });
        if !alike {
            return Some(format!("operands are partial and not all P({monoid}) or R"));
        }
        return (!distributes(op, monoid, &members, args, result))
            .then(|| format!("{} does not distribute over {monoid} in these operands", op.name()));
    }
    let combined: Vec<Monoid> = reduced
        .iter()
        .filter(|r| layouts.get(r.operand).and_then(|l| l.0[axis].sharded_dim()) == Some(r.dim))
        .map(|r| r.monoid)
        .collect();
    match (combined.first(), made) {
        (None, None) => None,
        (None, Some(monoid)) => Some(format!("nothing makes the result P({monoid})")),
        (Some(monoid), None) => Some(format!("the result is P({monoid}), not {}", layout.0[axis])),
        (Some(_), Some(monoid)) => combined
            .iter()
            .any(|&m| m != monoid)
            .then(|| format!("the result is P({}), not P({monoid})", combined[0])),
    }
}
