//! Contractions and reductions: everything that sums, with one rounding at the end.

use super::array::each_index;
use super::{Array, Domain, OpError};
use crate::dtype::DType;
use crate::layout::Monoid;
use crate::op::{EinsumSpec, PoolKind, Scalar, Window};
use std::cmp::Ordering;

type Result<E> = std::result::Result<Array<E>, OpError>;

/// `out[o…] = Σ a[…] · b[…]` over the letters missing from the result.
pub(super) fn einsum<D: Domain>(
    domain: &D,
    spec: &EinsumSpec,
    a: &Array<D::Element>,
    b: &Array<D::Element>,
    shape: &[usize],
) -> Result<D::Element> {
    let extent = |letter: &u8| {
        spec.inputs.iter().zip([a, b]).find_map(|(letters, operand)| {
            letters.iter().position(|l| l == letter).map(|at| operand.shape()[at])
        })
    };
    let summed: Vec<u8> = spec.letters().into_iter().filter(|l| !spec.output.contains(l)).collect();
    let summed_shape: Vec<usize> = summed.iter().filter_map(extent).collect();
    let letters: Vec<u8> = spec.output.iter().chain(&summed).copied().collect();
    let steps = [(&spec.inputs[0], a), (&spec.inputs[1], b)].map(|(own, operand)| {
        letters.iter().map(|letter| stride(own, operand.shape(), *letter)).collect::<Vec<usize>>()
    });
    let offset =
        |steps: &[usize], index: &[usize]| steps.iter().zip(index).map(|(s, i)| s * i).sum::<usize>();
    // The last of the summed dims is walked in a loop of its own.
    let (&last, outer) = summed_shape.split_last().unwrap_or((&1, &[]));
    let step = [0, 1].map(|i| if summed.is_empty() { 0 } else { steps[i][letters.len() - 1] });
    Array::from_fn(a.dtype, shape, |index| {
        let base = [0, 1].map(|i| offset(&steps[i], index));
        let inner = [0, 1].map(|i| &steps[i][index.len()..]);
        let mut sum = domain.integer(0, a.dtype);
        each_index(outer, |k| {
            let [mut x, mut y] = [0, 1].map(|i| base[i] + offset(inner[i], k));
            for _ in 0..last {
                sum = domain.multiply_add(sum, a.elements()[x], b.elements()[y]);
                (x, y) = (x + step[0], y + step[1]);
            }
            Ok(())
        })?;
        Ok(domain.round(sum, a.dtype))
    })
}

/// How far one step of `letter` moves in an operand; 0 if it has no such dim.
fn stride(letters: &[u8], shape: &[usize], letter: u8) -> usize {
    match letters.iter().position(|&l| l == letter) {
        Some(at) => shape[at + 1..].iter().product(),
        None => 0,
    }
}

pub(super) fn reduce<D: Domain>(
    domain: &D,
    monoid: Monoid,
    x: &Array<D::Element>,
    shape: &[usize],
) -> Result<D::Element> {
    let mut result = Array::filled(x.dtype, shape, domain.identity(monoid, x.dtype))?;
    each_index(x.shape(), |index| {
        let kept: Vec<usize> = index.iter().zip(shape).map(|(&i, &extent)| i.min(extent - 1)).collect();
        let at = result.offset(&kept);
        let sum = domain.combine(monoid, result.elements()[at], *x.at(index));
        result.elements_mut()[at] = sum;
        Ok(())
    })?;
    Ok(result.map(x.dtype, |&wide| domain.round(wide, x.dtype)))
}

pub(super) fn scan<D: Domain>(
    domain: &D,
    monoid: Monoid,
    axis: usize,
    exclusive: bool,
    reverse: bool,
    x: &Array<D::Element>,
) -> Result<D::Element> {
    let mut result = x.clone();
    let length = x.shape()[axis];
    let mut lines = x.shape().to_vec();
    lines[axis] = 1;
    each_index(&lines, |line| {
        let mut sum = domain.identity(monoid, x.dtype);
        for step in 0..length {
            let mut index = line.to_vec();
            index[axis] = if reverse { length - 1 - step } else { step };
            let before = sum;
            sum = domain.combine(monoid, sum, *x.at(&index));
            let at = x.offset(&index);
            result.elements_mut()[at] = domain.round(if exclusive { before } else { sum }, x.dtype);
        }
        Ok(())
    })?;
    Ok(result)
}

/// `out[n, m, o…] = Σ x[n, group(m)·c + c', o·stride + k·dilation - pad] · w[m, c', k…]`.
pub(super) fn conv<D: Domain>(
    domain: &D,
    window: &Window,
    groups: usize,
    x: &Array<D::Element>,
    w: &Array<D::Element>,
    shape: &[usize],
) -> Result<D::Element> {
    let per_group = (w.shape()[0] / groups).max(1);
    let channels = w.shape()[1];
    Array::from_fn(x.dtype, shape, |index| {
        let (n, m, out) = (index[0], index[1], &index[2..]);
        let first = m / per_group * channels;
        let mut sum = domain.integer(0, x.dtype);
        each_index(&w.shape()[1..], |tap| {
            if let Some(place) = position(window, out, &tap[1..], &x.shape()[2..]) {
                let from: Vec<usize> = [n, first + tap[0]].into_iter().chain(place).collect();
                let by: Vec<usize> = std::iter::once(m).chain(tap.iter().copied()).collect();
                sum = domain.multiply_add(sum, *x.at(&from), *w.at(&by));
            }
            Ok(())
        })?;
        Ok(domain.round(sum, x.dtype))
    })
}

/// Where tap `tap` of output place `out` reads; `None` in the padding.
fn position(window: &Window, out: &[usize], tap: &[usize], spatial: &[usize]) -> Option<Vec<usize>> {
    (0..spatial.len())
        .map(|d| {
            (out[d] * window.strides[d] + tap[d] * window.dilations[d])
                .checked_sub(window.pads_low[d])
                .filter(|&at| at < spatial[d])
        })
        .collect()
}

/// True if a tap lies in the data or the stated padding, as opposed to past it (rounding up may reach there).
fn in_padded(window: &Window, out: &[usize], tap: &[usize], spatial: &[usize]) -> bool {
    (0..spatial.len()).all(|d| {
        out[d] * window.strides[d] + tap[d] * window.dilations[d]
            < window.pads_low[d].saturating_add(spatial[d]).saturating_add(window.pads_high[d])
    })
}

pub(super) fn pool<D: Domain>(
    domain: &D,
    kind: PoolKind,
    window: &Window,
    x: &Array<D::Element>,
    shape: &[usize],
) -> Result<D::Element> {
    let dtype = x.dtype;
    let apply = |function, args: &[D::Element]| domain.scalar(function, dtype, dtype, args);
    let monoid = if kind == PoolKind::Max { Monoid::Max } else { Monoid::Sum };
    Array::from_fn(dtype, shape, |index| {
        let out = &index[2..];
        let (mut sum, mut count) = (domain.identity(monoid, dtype), 0i64);
        each_index(&window.kernel, |tap| {
            let place = position(window, out, tap, &x.shape()[2..]);
            let counted = kind == PoolKind::Average { count_padding: true };
            count += i64::from(place.is_some() || counted && in_padded(window, out, tap, &x.shape()[2..]));
            if let Some(place) = place {
                let from: Vec<usize> = index[..2].iter().copied().chain(place).collect();
                let mut element = *x.at(&from);
                if let PoolKind::Lp { p } = kind {
                    let exponent = domain.integer(i64::from(p), dtype);
                    element = apply(Scalar::Pow, &[apply(Scalar::Abs, &[element])?, exponent])?;
                }
                sum = domain.combine(monoid, sum, element);
            }
            Ok(())
        })?;
        match kind {
            PoolKind::Max => Ok(sum),
            PoolKind::Average { .. } => apply(Scalar::Div, &[sum, domain.integer(count, dtype)]),
            PoolKind::Lp { p } => {
                let root = domain.real(1.0 / f64::from(p), dtype);
                apply(Scalar::Pow, &[domain.round(sum, dtype), root])
            }
        }
    })
}

pub(super) fn top_k<D: Domain>(
    domain: &D,
    axis: usize,
    largest: bool,
    x: &Array<D::Element>,
    shape: &[usize],
) -> Result<D::Element> {
    let extent = x.shape()[axis];
    if shape[axis] > extent {
        return Err(OpError::other(format!("{} best of {extent}", shape[axis])));
    }
    let mut result = Array::filled(DType::I64, shape, domain.integer(0, DType::I64))?;
    let mut lines = x.shape().to_vec();
    lines[axis] = 1;
    each_index(&lines, |line| {
        let at = |i: usize| {
            let mut index = line.to_vec();
            index[axis] = i;
            index
        };
        let mut order: Vec<usize> = (0..extent).collect();
        // Stable: ties keep the lower index first.
        order.sort_by(|&i, &j| {
            let ascending: Ordering = domain.order(*x.at(&at(i)), *x.at(&at(j)));
            if largest { ascending.reverse() } else { ascending }
        });
        for (place, &i) in order.iter().take(shape[axis]).enumerate() {
            let offset = result.offset(&at(place));
            result.elements_mut()[offset] = domain.integer(i as i64, DType::I64);
        }
        Ok(())
    })
    .map(|()| result)
}
