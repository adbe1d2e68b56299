//! Whether a conversion takes families in one layout to families in another.

use crate::holding::{combines, fault};
use tpshard_ir::{AxisLayout, Conversion, Layout, Mesh, Monoid, Type};

/// Why `conversion` does not take `ty` in layout `from` to layout `to`.
pub(crate) fn conversion_fault(
    conversion: &Conversion,
    ty: &Type,
    from: &Layout,
    to: &Layout,
    mesh: &Mesh,
) -> Option<String> {
    if let Some(fault) = fault(ty, from, mesh).or_else(|| fault(ty, to, mesh)) {
        return Some(fault);
    }
    let (before, after) = match ends(conversion) {
        Some(ends) => ends,
        None => return Some(format!("{} is not used between layouts of one value", conversion.name())),
    };
    if !combines(ty.dtype) && [&before, &after].iter().any(|l| matches!(l, AxisLayout::Partial(_))) {
        return Some(format!("elements of {ty} cannot be combined"));
    }
    let axes = conversion.axes();
    if axes.is_empty() || axes.windows(2).any(|w| w[0] >= w[1]) || axes.iter().any(|&a| a >= mesh.axes()) {
        return Some(format!("{axes:?} are not ascending axes of the mesh {mesh}"));
    }
    for axis in 0..mesh.axes() {
        let (is, becomes) = (&from.0[axis], &to.0[axis]);
        if !axes.contains(&axis) && is != becomes {
            return Some(format!(
                "axis {axis} goes from {is} to {becomes}, which {} leaves",
                conversion.name()
            ));
        }
        if axes.contains(&axis) && (*is != before || *becomes != after) {
            return Some(format!(
                "axis {axis} goes from {is} to {becomes}, {} goes from {before} to {after}",
                conversion.name()
            ));
        }
    }
    // What the group exchanges along a dim must be consecutive, so no axis inside it may split that dim further.
    let outermost = axes[0];
    let inside = |dim: usize| {
        (outermost..mesh.axes()).find(|a| !axes.contains(a) && from.0[*a].sharded_dim() == Some(dim))
    };
    [&before, &after].iter().find_map(|end| {
        let axis = inside(end.sharded_dim()?)?;
        Some(format!("axis {axis} splits the same dim inside the group, so parts would interleave"))
    })
}

/// What a conversion starts from and arrives at, on each of its axes.
fn ends(conversion: &Conversion) -> Option<(AxisLayout, AxisLayout)> {
    let replicated = AxisLayout::Replicated;
    let shard = |dim: usize, unit: &tpshard_ir::Dim| AxisLayout::Shard { dim, unit: unit.clone() };
    let partial = |monoid: Monoid| AxisLayout::Partial(monoid);
    Some(match conversion {
        Conversion::ShardSlice { dim, unit, .. } => (replicated, shard(*dim, unit)),
        Conversion::OnlyFirst { monoid, .. } => (replicated, partial(*monoid)),
        Conversion::AllGather { dim, unit, .. } => (shard(*dim, unit), replicated),
        Conversion::AllToAll { from, from_unit, to, to_unit, .. } if from != to => {
            (shard(*from, from_unit), shard(*to, to_unit))
        }
        Conversion::AllReduce { monoid, .. } => (partial(*monoid), replicated),
        Conversion::ReduceScatter { monoid, dim, unit, .. } => (partial(*monoid), shard(*dim, unit)),
        Conversion::Redeal { dim, from_unit, to_unit, .. } if from_unit != to_unit => {
            (shard(*dim, from_unit), shard(*dim, to_unit))
        }
        Conversion::AllToAll { .. }
        | Conversion::Redeal { .. }
        | Conversion::Transfer
        | Conversion::TreeReduce { .. } => return None,
    })
}
