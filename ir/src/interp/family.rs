//! Families: the arrays of all ranks that stand for one logical array in a layout.

use super::convert::{combine, identity_like, shares};
use super::domain::mix;
use super::{Array, Domain, OpError};
use crate::dim::Bindings;
use crate::dtype::DType;
use crate::layout::{AxisLayout, Layout, Mesh, Monoid};

type Result<T> = std::result::Result<T, OpError>;

/// How a value becomes partial: many families decode to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// The first rank holds the value, the others the identity.
    First,
    /// Random parts that combine to the value; of this seed.
    Random(u64),
}

fn check(layout: &Layout, mesh: &Mesh) -> Result<()> {
    if layout.0.len() == mesh.axes() {
        return Ok(());
    }
    Err(OpError::other(format!("layout {layout} does not fit mesh {mesh}")))
}

/// What every rank holds of `logical`.
///
/// # Errors
/// The layout does not fit the array or the mesh.
pub fn encode<D: Domain>(
    domain: &D,
    logical: &Array<D::Element>,
    layout: &Layout,
    mesh: &Mesh,
    bindings: &Bindings,
    split: Split,
) -> Result<Vec<Array<D::Element>>> {
    check(layout, mesh)?;
    let mut parts = vec![logical.clone()];
    for (axis, (part_layout, &ranks)) in layout.0.iter().zip(&mesh.0).enumerate() {
        let mut finer = Vec::with_capacity(parts.len() * ranks);
        for (i, whole) in parts.iter().enumerate() {
            match part_layout {
                AxisLayout::Replicated => finer.extend(vec![whole.clone(); ranks]),
                AxisLayout::Shard { dim, unit } => {
                    for (start, length) in shares(Some(&whole), *dim, unit, &[ranks], bindings)? {
                        finer.push(whole.run(*dim, start, length)?);
                    }
                }
                AxisLayout::Partial(monoid) => {
                    let split = match split {
                        Split::First => Split::First,
                        Split::Random(seed) => Split::Random(mix(seed ^ ((axis as u64) << 32 | i as u64))),
                    };
                    finer.extend(split_partial(domain, *monoid, whole, ranks, split)?);
                }
            }
        }
        parts = finer;
    }
    Ok(parts)
}

/// As [`encode`], with partial values split at random.
///
/// # Errors
/// As [`encode`].
pub fn random_family<D: Domain>(
    domain: &D,
    logical: &Array<D::Element>,
    layout: &Layout,
    mesh: &Mesh,
    bindings: &Bindings,
    seed: u64,
) -> Result<Vec<Array<D::Element>>> {
    encode(domain, logical, layout, mesh, bindings, Split::Random(seed))
}

/// A random array; see [`Domain::random`].
///
/// # Errors
/// The shape is too large.
pub fn random_array<D: Domain>(
    domain: &D,
    dtype: DType,
    shape: &[usize],
    seed: u64,
) -> Result<Array<D::Element>> {
    let mut state = mix(seed);
    Array::from_fn(dtype, shape, |_| {
        state = mix(state);
        Ok(domain.random(state, dtype))
    })
}

fn split_partial<D: Domain>(
    domain: &D,
    monoid: Monoid,
    whole: &Array<D::Element>,
    ranks: usize,
    split: Split,
) -> Result<Vec<Array<D::Element>>> {
    let Split::Random(seed) = split else {
        let rest = (1..ranks).map(|_| identity_like(domain, monoid, whole));
        return std::iter::once(Ok(whole.clone())).take(ranks).chain(rest).collect();
    };
    // Who holds what is left once the others are drawn.
    let holder = (mix(seed) % ranks.max(1) as u64) as usize;
    let dtype = whole.dtype;
    let mut parts = Vec::with_capacity(ranks);
    let mut rest = whole.clone();
    for rank in (0..ranks).filter(|&r| r != holder) {
        let drawn = random_array(domain, dtype, whole.shape(), seed ^ mix(rank as u64))?;
        let part = match monoid {
            Monoid::Sum | Monoid::Prod => drawn,
            // Nothing drawn may win over the value itself.
            Monoid::Max => combine(domain, Monoid::Min, &[&drawn, whole])?,
            Monoid::Min => combine(domain, Monoid::Max, &[&drawn, whole])?,
        };
        rest = match monoid {
            Monoid::Sum => without(domain, crate::op::Scalar::Sub, &rest, &part)?,
            Monoid::Prod => without(domain, crate::op::Scalar::Div, &rest, &part)?,
            Monoid::Max | Monoid::Min => rest,
        };
        parts.push(part);
    }
    parts.insert(holder.min(parts.len()), rest);
    Ok(parts)
}

fn without<D: Domain>(
    domain: &D,
    function: crate::op::Scalar,
    whole: &Array<D::Element>,
    part: &Array<D::Element>,
) -> Result<Array<D::Element>> {
    Array::from_fn(whole.dtype, whole.shape(), |index| {
        domain.scalar(function, whole.dtype, whole.dtype, &[*whole.at(index), *part.at(index)])
    })
}

/// The logical array that a family stands for.
///
/// # Errors
/// Replicas differ, parts do not join, or the layout does not fit the mesh.
pub fn decode<D: Domain>(
    domain: &D,
    family: &[Array<D::Element>],
    layout: &Layout,
    mesh: &Mesh,
) -> Result<Array<D::Element>> {
    check(layout, mesh)?;
    if family.len() != mesh.ranks() {
        return Err(OpError::other(format!("{} arrays of a family on mesh {mesh}", family.len())));
    }
    let mut parts = family.to_vec();
    // The last axis varies fastest, and splits what the ones before left.
    for (axis_layout, &ranks) in layout.0.iter().zip(&mesh.0).rev() {
        let joined: Result<Vec<_>> = parts
            .chunks(ranks.max(1))
            .map(|group| {
                let group: Vec<&Array<D::Element>> = group.iter().collect();
                match axis_layout {
                    AxisLayout::Replicated => replicas(domain, &group),
                    AxisLayout::Shard { dim, .. } => Array::concat(&group, *dim),
                    AxisLayout::Partial(monoid) => combine(domain, *monoid, &group),
                }
            })
            .collect();
        parts = joined?;
    }
    parts.pop().ok_or_else(|| OpError::other("an empty mesh"))
}

fn replicas<D: Domain>(domain: &D, group: &[&Array<D::Element>]) -> Result<Array<D::Element>> {
    let first = group.first().ok_or_else(|| OpError::other("an empty group"))?;
    for (rank, other) in group.iter().enumerate().skip(1) {
        let same = other.dtype == first.dtype
            && other.shape() == first.shape()
            && first.elements().iter().zip(other.elements()).all(|(&a, &b)| domain.same(a, b));
        if !same {
            return Err(OpError::other(format!("replica {rank} of the group differs from the first")));
        }
    }
    Ok((*first).clone())
}
