//! Conversions between layouts of one value. All mesh axes that change must change alike: then one operation does it.
//!
//! | from | to | operation |
//! |---|---|---|
//! | R | S | shard_slice |
//! | R | P | only_first |
//! | S(k) | R | all_gather |
//! | S(k) | S(j) | all_to_all, or redeal if j = k |
//! | P | R | all_reduce |
//! | P | S | reduce_scatter |
//!
//! An axis may change from or to S(k) only if no minor axis that stays is S(k): the parts would interleave.

use super::holds_partials;
use super::square::mixes_monoids;
use tpshard_ir::layout::deal;
use tpshard_ir::{AxisLayout, Conversion, Dim, Layout, Mesh, Type};

/// The conversion that turns families of a value of type `ty` in layout `from` into families in layout `to`, if one
/// operation does it.
pub fn conversions(ty: &Type, from: &Layout, to: &Layout, mesh: &Mesh) -> Option<Conversion> {
    if !is_well_formed(ty, from, mesh) || !is_well_formed(ty, to, mesh) {
        return None;
    }
    let axes: Vec<usize> = (0..mesh.axes()).filter(|&a| from.0[a] != to.0[a]).collect();
    let &first = axes.first()?;
    let (before, after) = (&from.0[first], &to.0[first]);
    if axes.iter().any(|&a| from.0[a] != *before || to.0[a] != *after) {
        return None;
    }
    let interleaves = |layout: &AxisLayout| {
        layout.sharded_dim().is_some_and(|dim| {
            (first..mesh.axes()).any(|a| !axes.contains(&a) && from.0[a].sharded_dim() == Some(dim))
        })
    };
    if interleaves(before) || interleaves(after) {
        return None;
    }
    use AxisLayout::{Partial, Replicated, Shard};
    Some(match (before.clone(), after.clone()) {
        (Replicated, Shard { dim, unit }) => Conversion::ShardSlice { axes, dim, unit },
        (Replicated, Partial(monoid)) => Conversion::OnlyFirst { axes, monoid },
        (Shard { dim, unit }, Replicated) => Conversion::AllGather { axes, dim, unit },
        (Shard { dim, unit: from_unit }, Shard { dim: to, unit: to_unit }) => {
            if dim == to {
                Conversion::Redeal { axes, dim, from_unit, to_unit }
            } else {
                Conversion::AllToAll { axes, from: dim, from_unit, to, to_unit }
            }
        }
        (Partial(monoid), Replicated) => Conversion::AllReduce { axes, monoid },
        (Partial(monoid), Shard { dim, unit }) => Conversion::ReduceScatter { axes, monoid, dim, unit },
        (Shard { .. }, Partial(_)) | (Partial(_), Partial(_)) | (Replicated, Replicated) => return None,
    })
}

/// True if values of type `ty` can have this layout: one entry per axis, dims that exist, units that divide what each
/// rank of the axes before holds, one monoid at most, and numbers to combine.
pub fn is_well_formed(ty: &Type, layout: &Layout, mesh: &Mesh) -> bool {
    if layout.0.len() != mesh.axes() || mixes_monoids(layout) {
        return false;
    }
    if layout.has_partial() && !holds_partials(ty.dtype) {
        return false;
    }
    let mut extents: Vec<Vec<Dim>> = ty.shape.iter().map(|d| vec![d.clone()]).collect();
    for (axis, part) in layout.0.iter().enumerate() {
        let AxisLayout::Shard { dim, unit } = part else { continue };
        let Some(found) = extents.get_mut(*dim) else { return false };
        if found.iter().any(|extent| extent.exact_div(unit).is_none()) {
            return false;
        }
        // What is left on each coordinate matters to later axes that split the same dim.
        if !layout.0[axis + 1..].iter().any(|later| later.sharded_dim() == Some(*dim)) {
            continue;
        }
        let mut next: Vec<Dim> = Vec::new();
        for extent in found.iter() {
            for coordinate in 0..mesh.0[axis] {
                let length = deal(extent, unit, mesh.0[axis], coordinate).length;
                if !next.contains(&length) {
                    next.push(length);
                }
            }
        }
        *found = next;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use tpshard_ir::{DType, Monoid};

    fn ty() -> Type {
        Type::new(DType::F32, vec![Dim::from(12usize), Dim::from(80usize)])
    }
    fn s(dim: usize, unit: usize) -> AxisLayout {
        AxisLayout::shard(dim, unit)
    }
    const R: AxisLayout = AxisLayout::Replicated;
    const P: AxisLayout = AxisLayout::Partial(Monoid::Sum);

    fn name(mesh: &[usize], from: &[AxisLayout], to: &[AxisLayout]) -> Option<&'static str> {
        let (from, to) = (Layout(from.to_vec()), Layout(to.to_vec()));
        conversions(&ty(), &from, &to, &Mesh(mesh.to_vec())).map(|c| c.name())
    }

    #[test]
    fn every_row_of_the_table() {
        assert_eq!(name(&[4], &[R], &[s(0, 1)]), Some("shard_slice"));
        assert_eq!(name(&[4], &[R], &[P]), Some("only_first"));
        assert_eq!(name(&[4], &[s(0, 1)], &[R]), Some("all_gather"));
        assert_eq!(name(&[4], &[s(0, 1)], &[s(1, 16)]), Some("all_to_all"));
        assert_eq!(name(&[4], &[s(1, 1)], &[s(1, 16)]), Some("redeal"));
        assert_eq!(name(&[4], &[P], &[R]), Some("all_reduce"));
        assert_eq!(name(&[4], &[P], &[s(1, 16)]), Some("reduce_scatter"));
        assert_eq!(name(&[4], &[s(0, 1)], &[P]), None);
        assert_eq!(name(&[4], &[P], &[AxisLayout::Partial(Monoid::Max)]), None);
        assert_eq!(name(&[4], &[P], &[P]), None);
    }

    #[test]
    fn parts_never_interleave() {
        assert_eq!(name(&[2, 2], &[s(0, 1), s(0, 1)], &[R, s(0, 1)]), None);
        assert_eq!(name(&[2, 2], &[s(0, 1), s(0, 1)], &[s(0, 1), R]), Some("all_gather"));
        assert_eq!(name(&[2, 2], &[s(0, 1), s(0, 1)], &[R, R]), Some("all_gather"));
        assert_eq!(name(&[2, 2], &[s(0, 1), s(1, 1)], &[R, s(1, 1)]), Some("all_gather"));
        assert_eq!(name(&[2, 2], &[P, s(0, 1)], &[s(0, 1), s(0, 1)]), None);
        assert_eq!(name(&[2, 2], &[s(1, 1), s(0, 1)], &[s(0, 1), s(0, 1)]), None);
    }

    #[test]
    fn axes_that_change_change_alike() {
        assert_eq!(name(&[2, 2], &[s(0, 1), P], &[R, R]), None);
        assert_eq!(name(&[2, 2], &[P, P], &[R, R]), Some("all_reduce"));
        assert_eq!(name(&[2, 2], &[P, AxisLayout::Partial(Monoid::Max)], &[P, R]), None);
    }

    #[test]
    fn units_must_divide() {
        assert_eq!(name(&[4], &[R], &[s(1, 32)]), None);
        assert_eq!(name(&[4], &[R], &[s(2, 1)]), None);
        assert_eq!(name(&[5, 2], &[R, R], &[s(1, 16), R]), Some("shard_slice"));
    }
}
