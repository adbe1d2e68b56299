//! Operations that move elements: where each element of the result comes from.

use super::array::each_index;
use super::{Array, Domain, OpError};
use crate::layout::Monoid;
use crate::op::PadMode;

type Result<E> = std::result::Result<Array<E>, OpError>;

pub(super) fn broadcast<E: Clone>(x: &Array<E>, shape: &[usize]) -> Result<E> {
    Array::from_fn(x.dtype, shape, |index| Ok(x.at_broadcast(index).clone()))
}

pub(super) fn transpose<E: Clone>(x: &Array<E>, perm: &[usize]) -> Result<E> {
    let shape: Vec<usize> = perm.iter().map(|&p| x.shape()[p]).collect();
    Array::from_fn(x.dtype, &shape, |index| {
        let mut from = vec![0; perm.len()];
        perm.iter().zip(index).for_each(|(&p, &i)| from[p] = i);
        Ok(x.at(&from).clone())
    })
}

pub(super) fn slice<E: Clone>(
    x: &Array<E>,
    axis: usize,
    start: i64,
    step: i64,
    shape: &[usize],
) -> Result<E> {
    Array::from_fn(x.dtype, shape, |index| {
        let mut from = index.to_vec();
        let place = i128::from(start) + index[axis] as i128 * i128::from(step);
        from[axis] = within(place, x.shape()[axis])?;
        Ok(x.at(&from).clone())
    })
}

/// `place` as an index into `extent` entries.
fn within(place: i128, extent: usize) -> std::result::Result<usize, OpError> {
    usize::try_from(place)
        .ok()
        .filter(|&at| at < extent)
        .ok_or_else(|| OpError::other(format!("index {place} of a dim of {extent}")))
}

pub(super) fn pad<D: Domain>(
    domain: &D,
    mode: PadMode,
    low: &[i64],
    x: &Array<D::Element>,
    shape: &[usize],
) -> Result<D::Element> {
    Array::from_fn(x.dtype, shape, |index| {
        let mut from = Vec::with_capacity(index.len());
        for (d, &i) in index.iter().enumerate() {
            let place = i as i128 - i128::from(low[d]);
            match (mode, pad_source(mode, place, x.shape()[d])) {
                (_, Some(at)) => from.push(at),
                (PadMode::Constant(value), None) => return Ok(domain.real(value.0, x.dtype)),
                (_, None) => return Err(OpError::other(format!("padding of the empty dim {d}"))),
            }
        }
        Ok(*x.at(&from))
    })
}

/// The entry that `place` of a padded dim shows.
fn pad_source(mode: PadMode, place: i128, extent: usize) -> Option<usize> {
    let last = extent as i128 - 1;
    let inside = match mode {
        _ if (0..=last).contains(&place) => place,
        _ if last < 0 => return None,
        PadMode::Constant(_) => return None,
        PadMode::Edge => place.clamp(0, last),
        PadMode::Wrap => place.rem_euclid(last + 1),
        PadMode::Reflect if last == 0 => 0,
        PadMode::Reflect => {
            let phase = place.rem_euclid(2 * last);
            phase.min(2 * last - phase)
        }
    };
    usize::try_from(inside).ok()
}

/// The index that an index element stands for; negative ones count from the end of `extent`.
fn resolve<D: Domain>(domain: &D, element: D::Element, extent: i64) -> std::result::Result<usize, OpError> {
    let out_of_range = |shown: String| OpError::other(format!("index {shown} of a dim of {extent}"));
    let index = domain.index(element).ok_or_else(|| out_of_range(format!("{element:?}")))?;
    let place = if index < 0 { index.saturating_add(extent) } else { index };
    usize::try_from(place).ok().filter(|_| place < extent).ok_or_else(|| out_of_range(index.to_string()))
}

/// `window` is the first row held and the global number of rows; rows not held read as zero.
pub(super) fn gather<D: Domain>(
    domain: &D,
    axis: usize,
    window: Option<(i64, i64)>,
    x: &Array<D::Element>,
    indices: &Array<D::Element>,
    shape: &[usize],
) -> Result<D::Element> {
    let held = x.shape()[axis];
    let (start, extent) = window.unwrap_or((0, held as i64));
    Array::from_fn(x.dtype, shape, |index| {
        let row = resolve(domain, *indices.at(&index[axis..axis + indices.rank()]), extent)?;
        let local = row as i64 - start;
        if !(0..held as i64).contains(&local) {
            return Ok(domain.integer(0, x.dtype));
        }
        let mut from = index[..axis].to_vec();
        from.push(local as usize);
        from.extend_from_slice(&index[axis + indices.rank()..]);
        Ok(*x.at(&from))
    })
}

pub(super) fn gather_elements<D: Domain>(
    domain: &D,
    axis: usize,
    x: &Array<D::Element>,
    indices: &Array<D::Element>,
) -> Result<D::Element> {
    check_smaller(x, indices, axis)?;
    Array::from_fn(x.dtype, indices.shape(), |index| {
        let mut from = index.to_vec();
        from[axis] = resolve(domain, *indices.at(index), x.shape()[axis] as i64)?;
        Ok(*x.at(&from))
    })
}

/// Off `axis`, every index lies within `x`.
fn check_smaller<E: Clone>(
    x: &Array<E>,
    indices: &Array<E>,
    axis: usize,
) -> std::result::Result<(), OpError> {
    let fits = (0..x.rank()).all(|d| d == axis || indices.shape()[d] <= x.shape()[d]);
    let what = || format!("indices of shape {:?} for shape {:?}", indices.shape(), x.shape());
    if fits || indices.is_empty() { Ok(()) } else { Err(OpError::other(what())) }
}

pub(super) fn gather_nd<D: Domain>(
    domain: &D,
    batch_dims: usize,
    x: &Array<D::Element>,
    indices: &Array<D::Element>,
    shape: &[usize],
) -> Result<D::Element> {
    let lead = indices.rank() - 1;
    Array::from_fn(x.dtype, shape, |index| {
        let mut from = index[..batch_dims].to_vec();
        from.extend(index_tuple(domain, indices, &index[..lead], &x.shape()[batch_dims..])?);
        from.extend_from_slice(&index[lead..]);
        Ok(*x.at(&from))
    })
}

/// The indices in the last dim of `indices` at `lead`, into dims of `extents`.
fn index_tuple<D: Domain>(
    domain: &D,
    indices: &Array<D::Element>,
    lead: &[usize],
    extents: &[usize],
) -> std::result::Result<Vec<usize>, OpError> {
    let depth = indices.shape().last().copied().unwrap_or(0);
    (0..depth)
        .map(|i| {
            let at: Vec<usize> = lead.iter().copied().chain([i]).collect();
            resolve(domain, *indices.at(&at), extents[i] as i64)
        })
        .collect()
}

fn merge<D: Domain>(
    domain: &D,
    monoid: Option<Monoid>,
    into: &mut Array<D::Element>,
    index: &[usize],
    update: D::Element,
) {
    let at = into.offset(index);
    into.elements_mut()[at] = match monoid {
        Some(monoid) => domain.round(domain.combine(monoid, into.elements()[at], update), into.dtype),
        None => update,
    };
}

pub(super) fn scatter_elements<D: Domain>(
    domain: &D,
    axis: usize,
    monoid: Option<Monoid>,
    [x, indices, updates]: [&Array<D::Element>; 3],
) -> Result<D::Element> {
    check_smaller(x, indices, axis)?;
    let mut result = x.clone();
    each_index(indices.shape(), |index| {
        let mut to = index.to_vec();
        to[axis] = resolve(domain, *indices.at(index), x.shape()[axis] as i64)?;
        merge(domain, monoid, &mut result, &to, *updates.at(index));
        Ok(())
    })?;
    Ok(result)
}

pub(super) fn scatter_nd<D: Domain>(
    domain: &D,
    monoid: Option<Monoid>,
    [x, indices, updates]: [&Array<D::Element>; 3],
) -> Result<D::Element> {
    let lead = indices.rank() - 1;
    let mut result = x.clone();
    each_index(updates.shape(), |index| {
        let mut to = index_tuple(domain, indices, &index[..lead], x.shape())?;
        to.extend_from_slice(&index[lead..]);
        merge(domain, monoid, &mut result, &to, *updates.at(index));
        Ok(())
    })?;
    Ok(result)
}
