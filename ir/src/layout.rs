//! Meshes and layouts: how the per-rank tensors of a *family* stand for one logical tensor.
//!
//! A mesh factors the group of ranks, axis 0 major. A layout says, per mesh axis, how the family decodes to the
//! logical value: `R` (every rank holds it), `S(dim, unit)` (the ranks hold consecutive runs of `dim`, dealt out in
//! whole units), `P(monoid)` (the value is the elementwise combination of what the ranks hold). Axes apply in order:
//! axis 1 splits what axis 0 left.
//!
//! Deals are never padded. Of `units = extent / unit` units, each rank owns `floor(units / n)`, and the first
//! `units mod n` ranks one more; shards may be empty.

use crate::dim::Dim;
use std::fmt;

/// A commutative, associative operation with an identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Monoid {
    Sum,
    Prod,
    Max,
    Min,
}

impl Monoid {
    pub const ALL: [Monoid; 4] = [Monoid::Sum, Monoid::Prod, Monoid::Max, Monoid::Min];

    pub fn name(self) -> &'static str {
        match self {
            Monoid::Sum => "sum",
            Monoid::Prod => "prod",
            Monoid::Max => "max",
            Monoid::Min => "min",
        }
    }
}

impl fmt::Display for Monoid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The ranks, factored into axes; axis 0 is major: rank = c0 * n1 * n2 … + c1 * n2 … + ….
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mesh(pub Vec<usize>);

impl Mesh {
    /// All ranks on one axis.
    pub fn flat(ranks: usize) -> Mesh {
        Mesh(vec![ranks])
    }

    pub fn ranks(&self) -> usize {
        self.0.iter().product()
    }

    pub fn axes(&self) -> usize {
        self.0.len()
    }

    /// The coordinate of `rank` on every axis.
    pub fn coordinates(&self, rank: usize) -> Vec<usize> {
        let mut rest = rank;
        let mut coordinates: Vec<usize> = self
            .0
            .iter()
            .rev()
            .map(|&n| {
                let c = rest % n;
                rest /= n;
                c
            })
            .collect();
        coordinates.reverse();
        coordinates
    }

    /// The ranks that differ from `rank` only on `axes`, in mesh order, `rank` included.
    pub fn group(&self, rank: usize, axes: &[usize]) -> Vec<usize> {
        let own = self.coordinates(rank);
        (0..self.ranks())
            .filter(|&other| {
                self.coordinates(other)
                    .iter()
                    .enumerate()
                    .all(|(axis, &c)| axes.contains(&axis) || c == own[axis])
            })
            .collect()
    }
}

impl fmt::Display for Mesh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text: Vec<String> = self.0.iter().map(usize::to_string).collect();
        write!(f, "{}", text.join("x"))
    }
}

/// What a layout says on one mesh axis.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum AxisLayout {
    /// Every rank of the axis holds the same.
    Replicated,
    /// `dim` is dealt out in units of `unit` elements; `unit` divides the extent.
    Shard { dim: usize, unit: Dim },
    /// The value is the combination of the ranks' tensors.
    Partial(Monoid),
}

impl AxisLayout {
    pub fn shard(dim: usize, unit: impl Into<Dim>) -> AxisLayout {
        AxisLayout::Shard { dim, unit: unit.into() }
    }

    pub fn is_replicated(&self) -> bool {
        matches!(self, AxisLayout::Replicated)
    }

    /// The sharded dim, if any.
    pub fn sharded_dim(&self) -> Option<usize> {
        if let AxisLayout::Shard { dim, .. } = self { Some(*dim) } else { None }
    }
}

impl fmt::Display for AxisLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AxisLayout::Replicated => f.write_str("R"),
            AxisLayout::Shard { dim, unit } if unit.is_one() => write!(f, "S({dim})"),
            AxisLayout::Shard { dim, unit } => write!(f, "S({dim}, {unit})"),
            AxisLayout::Partial(monoid) => write!(f, "P({monoid})"),
        }
    }
}

/// One [`AxisLayout`] per mesh axis.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Layout(pub Vec<AxisLayout>);

impl Layout {
    pub fn replicated(mesh: &Mesh) -> Layout {
        Layout(vec![AxisLayout::Replicated; mesh.axes()])
    }

    pub fn is_replicated(&self) -> bool {
        self.0.iter().all(AxisLayout::is_replicated)
    }

    pub fn has_partial(&self) -> bool {
        self.0.iter().any(|a| matches!(a, AxisLayout::Partial(_)))
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text: Vec<String> = self.0.iter().map(AxisLayout::to_string).collect();
        f.write_str(&text.join("·"))
    }
}

/// A run of a dimension.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    pub start: Dim,
    pub length: Dim,
}

/// What rank `coordinate` of `ranks` owns of a dimension of `extent` elements dealt in units of `unit`.
pub fn deal(extent: &Dim, unit: &Dim, ranks: usize, coordinate: usize) -> Run {
    let units = extent.floor_div(unit);
    let (n, c) = (Dim::from(ranks), Dim::from(coordinate));
    // floor(units / n), one more where coordinate < units mod n.
    let length = (&units + Dim::from(ranks - 1 - coordinate)).floor_div(&n);
    // coordinate * floor(units / n) + min(coordinate, units mod n)
    let start = &c * &units.floor_div(&n) + c.minimum(&units.modulo(&n));
    Run { start: start * unit, length: length * unit }
}

/// The part of a logical tensor of `shape` that `rank` holds under `layout`: one run per dim. `P` holds all of it.
pub fn local_runs(shape: &[Dim], layout: &Layout, mesh: &Mesh, rank: usize) -> Vec<Run> {
    let coordinates = mesh.coordinates(rank);
    let mut runs: Vec<Run> =
        shape.iter().map(|d| Run { start: Dim::constant(0), length: d.clone() }).collect();
    for (axis, part) in layout.0.iter().enumerate() {
        if let AxisLayout::Shard { dim, unit } = part {
            let run = &mut runs[*dim];
            let inner = deal(&run.length, unit, mesh.0[axis], coordinates[axis]);
            *run = Run { start: &run.start + &inner.start, length: inner.length };
        }
    }
    runs
}

/// The local shape of `rank` under `layout`.
pub fn local_shape(shape: &[Dim], layout: &Layout, mesh: &Mesh, rank: usize) -> Vec<Dim> {
    local_runs(shape, layout, mesh, rank).into_iter().map(|run| run.length).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dim::Bindings;

    #[test]
    fn deals_cover_the_dim_in_order_and_give_the_first_ranks_more() {
        for (units, unit, n) in [(5, 16, 4), (4, 1, 4), (2, 8, 4), (0, 1, 3), (7, 2, 3)] {
            let mut next = 0;
            for rank in 0..n {
                let run = deal(&Dim::from(units * unit), &Dim::from(unit), n, rank);
                assert_eq!(run.start.as_size(), Some(next));
                next += run.length.as_size().unwrap();
            }
            assert_eq!(next, units * unit);
        }
        let lengths: Vec<_> = (0..4)
            .map(|r| deal(&Dim::from(80usize), &Dim::from(16usize), 4, r).length.as_size().unwrap())
            .collect();
        assert_eq!(lengths, [32, 16, 16, 16]);
    }

    #[test]
    fn symbolic_deals_agree_with_constant_ones() {
        let seq = Dim::symbol("seq");
        for value in 0..9i64 {
            let bindings: Bindings = [("seq".into(), value)].into();
            for rank in 0..4 {
                let (s, c) = (deal(&seq, &1i64.into(), 4, rank), deal(&value.into(), &1i64.into(), 4, rank));
                assert_eq!(s.start.eval(&bindings).unwrap(), c.start.as_const().unwrap());
                assert_eq!(s.length.eval(&bindings).unwrap(), c.length.as_const().unwrap());
            }
        }
    }

    #[test]
    fn groups_follow_the_mesh() {
        let mesh = Mesh(vec![2, 3]);
        assert_eq!(mesh.coordinates(4), [1, 1]);
        assert_eq!(mesh.group(4, &[0]), [1, 4]);
        assert_eq!(mesh.group(4, &[1]), [3, 4, 5]);
        assert_eq!(mesh.group(4, &[0, 1]), [0, 1, 2, 3, 4, 5]);
    }
}
