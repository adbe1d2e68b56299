//! Conversions between layouts, on the arrays of one group of ranks.

use super::{Array, Domain, OpError};
use crate::dim::{Bindings, Dim};
use crate::layout::{Monoid, deal};
use crate::op::Conversion;

type Result<T> = std::result::Result<T, OpError>;

/// What each member of a group holds after `conversion`. `parts` are the members' arrays in mesh order and `extents`
/// the extents of the conversion's axes, whose product is the number of members.
///
/// # Errors
/// The parts do not fit together, or a dim is not made of whole units.
pub fn convert<D: Domain>(
    domain: &D,
    conversion: &Conversion,
    extents: &[usize],
    parts: &[&Array<D::Element>],
    bindings: &Bindings,
) -> Result<Vec<Array<D::Element>>> {
    let everyone = |whole: Array<D::Element>| vec![whole; parts.len()];
    match conversion {
        Conversion::ShardSlice { dim, unit, .. } => {
            let shares = shares(parts.first(), *dim, unit, extents, bindings)?;
            let own = parts.iter().zip(shares);
            own.map(|(part, (start, length))| part.run(*dim, start, length)).collect()
        }
        Conversion::OnlyFirst { monoid, .. } => {
            let rest = parts.iter().skip(1).map(|part| identity_like(domain, *monoid, part));
            parts.iter().take(1).map(|&first| Ok(first.clone())).chain(rest).collect()
        }
        Conversion::AllGather { dim, unit, .. } => {
            let whole = gather(parts, *dim, unit, extents, bindings)?;
            Ok(everyone(whole))
        }
        Conversion::AllToAll { from, from_unit, to, to_unit, .. } => {
            deal_out(&gather(parts, *from, from_unit, extents, bindings)?, *to, to_unit, extents, bindings)
        }
        Conversion::AllReduce { monoid, .. } => Ok(everyone(combine(domain, *monoid, parts)?)),
        Conversion::ReduceScatter { monoid, dim, unit, .. } => {
            deal_out(&combine(domain, *monoid, parts)?, *dim, unit, extents, bindings)
        }
        Conversion::Redeal { dim, from_unit, to_unit, .. } => {
            deal_out(&gather(parts, *dim, from_unit, extents, bindings)?, *dim, to_unit, extents, bindings)
        }
        Conversion::Transfer => Ok(parts.iter().map(|&part| part.clone()).collect()),
        Conversion::TreeReduce { axis, unit, .. } => {
            let whole = gather(parts, *axis, unit, extents, bindings)?;
            Ok(everyone(tree_reduce(domain, &whole, *axis)?))
        }
    }
}

/// The runs that the members own of `dim`: every axis deals out what the one before left.
pub(super) fn shares<E: Clone>(
    whole: Option<&&Array<E>>,
    dim: usize,
    unit: &Dim,
    extents: &[usize],
    bindings: &Bindings,
) -> Result<Vec<(usize, usize)>> {
    let extent = whole
        .and_then(|array| array.shape().get(dim))
        .ok_or_else(|| OpError::other(format!("dim {dim} to deal out does not exist")))?;
    deals(*extent, unit.eval(bindings)?, extents)
}

fn deals(extent: usize, unit: i64, extents: &[usize]) -> Result<Vec<(usize, usize)>> {
    let members = extents.iter().product();
    if extent == 0 {
        return Ok(vec![(0, 0); members]);
    }
    let whole_units = usize::try_from(unit).is_ok_and(|unit| unit > 0 && extent.is_multiple_of(unit));
    if !whole_units {
        return Err(OpError::other(format!("{extent} entries are not made of units of {unit}")));
    }
    let mut runs = vec![(0, extent)];
    for &ranks in extents {
        let mut finer = Vec::with_capacity(runs.len() * ranks);
        for &(start, length) in &runs {
            for coordinate in 0..ranks {
                let run = deal(&length.into(), &unit.into(), ranks, coordinate);
                let (offset, part) =
                    run.start.as_size().zip(run.length.as_size()).ok_or(OpError::TooLarge)?;
                finer.push((start + offset, part));
            }
        }
        runs = finer;
    }
    Ok(runs)
}

/// Joins what the members hold of `dim` and checks that it had been dealt out in units of `unit`.
fn gather<E: Clone>(
    parts: &[&Array<E>],
    dim: usize,
    unit: &Dim,
    extents: &[usize],
    bindings: &Bindings,
) -> Result<Array<E>> {
    let whole = Array::concat(parts, dim)?;
    let expected = shares(Some(&&whole), dim, unit, extents, bindings)?;
    if let Some((part, run)) = parts.iter().zip(expected).find(|(part, run)| part.shape()[dim] != run.1) {
        let what =
            format!("a member holds {} entries of dim {dim}, its share is {}", part.shape()[dim], run.1);
        return Err(OpError::other(what));
    }
    Ok(whole)
}

fn deal_out<E: Clone>(
    whole: &Array<E>,
    dim: usize,
    unit: &Dim,
    extents: &[usize],
    bindings: &Bindings,
) -> Result<Vec<Array<E>>> {
    let shares = shares(Some(&whole), dim, unit, extents, bindings)?;
    shares.into_iter().map(|(start, length)| whole.run(dim, start, length)).collect()
}

/// The elementwise combination of all parts, rounded once.
pub(super) fn combine<D: Domain>(
    domain: &D,
    monoid: Monoid,
    parts: &[&Array<D::Element>],
) -> Result<Array<D::Element>> {
    let first = parts.first().ok_or_else(|| OpError::other("nothing to combine"))?;
    if let Some(other) = parts.iter().find(|p| p.shape() != first.shape() || p.dtype != first.dtype) {
        return Err(OpError::other(format!("{} and {} do not combine", first.ty(), other.ty())));
    }
    Array::from_fn(first.dtype, first.shape(), |index| {
        let elements = parts.iter().map(|part| *part.at(index));
        let wide = elements.reduce(|a, b| domain.combine(monoid, a, b)).ok_or(OpError::TooLarge)?;
        Ok(domain.round(wide, first.dtype))
    })
}

pub(super) fn identity_like<D: Domain>(
    domain: &D,
    monoid: Monoid,
    like: &Array<D::Element>,
) -> Result<Array<D::Element>> {
    Array::filled(like.dtype, like.shape(), domain.identity(monoid, like.dtype))
}

/// Sums the entries of `axis` in the canonical tree: `n > 1` entries are split at the largest power of two below `n`,
/// and every inner node rounds. The result keeps `axis` with extent 1; no entries sum to zero.
///
/// # Errors
/// There is no such axis.
pub fn tree_reduce<D: Domain>(domain: &D, x: &Array<D::Element>, axis: usize) -> Result<Array<D::Element>> {
    let Some(&extent) = x.shape().get(axis) else {
        return Err(OpError::other(format!("axis {axis} of {}", x.ty())));
    };
    let mut shape = x.shape().to_vec();
    shape[axis] = 1;
    Array::from_fn(x.dtype, &shape, |index| {
        let line: Vec<D::Element> = (0..extent)
            .map(|i| {
                let mut at = index.to_vec();
                at[axis] = i;
                *x.at(&at)
            })
            .collect();
        Ok(tree_sum(domain, &line, x.dtype))
    })
}

fn tree_sum<D: Domain>(domain: &D, line: &[D::Element], dtype: crate::dtype::DType) -> D::Element {
    match *line {
        [] => domain.identity(Monoid::Sum, dtype),
        [only] => only,
        _ => {
            let (left, right) = line.split_at(line.len().next_power_of_two() / 2);
            let (a, b) = (tree_sum(domain, left, dtype), tree_sum(domain, right, dtype));
            domain.round(domain.combine(Monoid::Sum, a, b), dtype)
        }
    }
}
