//! Which part of a value a rank holds, worked out from the layout alone.
//!
//! This repeats the definition in `tpshard_ir::layout` on purpose: what the checker says of a rank must not come from
//! the code that made the rank.

use tpshard_ir::{AxisLayout, DType, DTypeClass, Dim, Layout, Mesh, Monoid, Type};

/// A run of a dim.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Part {
    pub(crate) start: Dim,
    pub(crate) length: Dim,
}

impl Part {
    pub(crate) fn whole(extent: &Dim) -> Part {
        Part { start: Dim::constant(0), length: extent.clone() }
    }

    pub(crate) fn is_whole(&self, extent: &Dim) -> bool {
        self.start.is_zero() && self.length == *extent
    }

    /// The run in units of `1 / factor`.
    pub(crate) fn times(&self, factor: &Dim) -> Part {
        Part { start: &self.start * factor, length: &self.length * factor }
    }

    /// Start and length, if constant.
    pub(crate) fn constant(&self) -> Option<(usize, usize)> {
        Some((self.start.as_size()?, self.length.as_size()?))
    }
}

/// One run per dim.
pub(crate) type Region = Vec<Part>;

/// The coordinate of `rank` on each axis, the last axis fastest.
pub(crate) fn coordinates(mesh: &Mesh, rank: usize) -> Vec<usize> {
    let mut below = mesh.0.iter().product::<usize>();
    let mut rest = rank;
    mesh.0
        .iter()
        .map(|&n| {
            below /= n.max(1);
            let own = rest / below.max(1);
            rest %= below.max(1);
            own
        })
        .collect()
}

/// What `rank` holds of a value of this shape; `None` if the layout does not fit the shape.
pub(crate) fn region(shape: &[Dim], layout: &Layout, mesh: &Mesh, rank: usize) -> Option<Region> {
    let own = coordinates(mesh, rank);
    let mut region: Region = shape.iter().map(Part::whole).collect();
    for ((axis, &n), &coordinate) in layout.0.iter().zip(&mesh.0).zip(&own) {
        let AxisLayout::Shard { dim, unit } = axis else { continue };
        let part = region.get_mut(*dim)?;
        let units = part.length.exact_div(unit)?;
        let ranks = Dim::from(n);
        let position = Dim::from(coordinate);
        // Ranks below `units mod n` hold one unit more, so the ranks before this one hold this many in all.
        let share = units.floor_div(&ranks);
        let left_over = &units - &(&share * &ranks);
        let before = &(&share * &position) + &left_over.minimum(&position);
        let held = (&units - &position).ceil_div(&ranks);
        *part = Part { start: &part.start + &(before * unit), length: held * unit };
    }
    Some(region)
}

/// True for types that partial values can be combined in.
pub(crate) fn combines(dtype: DType) -> bool {
    match dtype.class() {
        DTypeClass::Bool => false,
        DTypeClass::Float => matches!(dtype, DType::F64 | DType::F32 | DType::F16 | DType::BF16),
        DTypeClass::Int | DTypeClass::Uint => dtype.bits() >= 8,
    }
}

/// The monoid of a layout's partial axes.
pub(crate) fn monoid_of(axis: &AxisLayout) -> Option<Monoid> {
    match axis {
        AxisLayout::Partial(monoid) => Some(*monoid),
        AxisLayout::Replicated | AxisLayout::Shard { .. } => None,
    }
}

/// Why a value of this type cannot have this layout.
pub(crate) fn fault(ty: &Type, layout: &Layout, mesh: &Mesh) -> Option<String> {
    if layout.0.len() != mesh.axes() {
        return Some(format!("the layout {layout} is not for a mesh of {} axes", mesh.axes()));
    }
    let mut monoids: Vec<Monoid> = layout.0.iter().filter_map(monoid_of).collect();
    monoids.dedup();
    if monoids.len() > 1 {
        return Some(format!("the layout {layout} mixes partial values that do not commute"));
    }
    if !monoids.is_empty() && !combines(ty.dtype) {
        return Some(format!("{layout} of {}: these elements cannot be combined", ty.dtype));
    }
    for axis in &layout.0 {
        if let AxisLayout::Shard { dim, unit } = axis {
            if *dim >= ty.rank() {
                return Some(format!("the layout {layout} splits a dim that {ty} does not have"));
            }
            if unit.is_zero() || unit.as_const().is_some_and(|u| u < 1) {
                return Some(format!("the layout {layout} deals in units of {unit}"));
            }
        }
    }
    let fits = |rank| region(&ty.shape, layout, mesh, rank).is_some();
    (!(0..mesh.ranks()).all(fits))
        .then(|| format!("a unit of {layout} does not divide what a rank has of {ty}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_agrees_with_the_one_it_repeats() {
        let shape = [Dim::from(80usize), Dim::symbol("s"), Dim::from(7usize)];
        let layouts = [
            vec![AxisLayout::shard(0, 16usize), AxisLayout::shard(1, 1usize)],
            vec![AxisLayout::shard(1, 1usize), AxisLayout::shard(1, 1usize)],
            vec![AxisLayout::shard(2, 1usize), AxisLayout::shard(2, 1usize)],
            vec![AxisLayout::Replicated, AxisLayout::shard(2, 7usize)],
        ];
        for mesh in [Mesh(vec![2, 3]), Mesh(vec![4, 2])] {
            for layout in &layouts {
                let layout = Layout(layout.clone());
                for rank in 0..mesh.ranks() {
                    let theirs = tpshard_ir::layout::local_runs(&shape, &layout, &mesh, rank);
                    let ours = region(&shape, &layout, &mesh, rank).unwrap_or_default();
                    for (a, b) in ours.iter().zip(&theirs) {
                        assert_eq!((&a.start, &a.length), (&b.start, &b.length), "{layout} {mesh} {rank}");
                    }
                }
            }
        }
    }
}
