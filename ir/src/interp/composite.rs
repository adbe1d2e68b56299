//! Composites from their definitions, in `f64` with one rounding at the end.

use super::array::each_index;
use super::codec::round_float;
use super::real::Num;
use super::{Array, OpError};
use crate::op::{NormKind, Op};

type Result = std::result::Result<Array<Num>, OpError>;

pub(super) fn evaluate(op: &Op, args: &[&Array<Num>]) -> Result {
    match (op, args) {
        (Op::Softmax { axis }, &[x]) => softmax(*axis, x),
        (Op::Norm { kind, axis, epsilon }, &[x, scale]) => norm(*kind, *axis, epsilon.0, x, scale, None),
        (Op::Norm { kind, axis, epsilon }, &[x, scale, bias]) => {
            norm(*kind, *axis, epsilon.0, x, scale, Some(bias))
        }
        (Op::Attention { .. }, &[q, k, v]) => attention(op, q, k, v, None),
        (Op::Attention { .. }, &[q, k, v, bias]) => attention(op, q, k, v, Some(bias)),
        (Op::Rotary { interleaved }, &[x, cos, sin]) => rotary(*interleaved, x, cos, sin),
        _ => Err(OpError::other("is not a composite of these operands")),
    }
}

fn rounded(x: f64, like: &Array<Num>) -> Num {
    Num::Float(round_float(x, like.dtype))
}

/// In place; a row of -inf only becomes NaN.
fn softmax_row(row: &mut [f64]) {
    let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = row
        .iter_mut()
        .map(|x| {
            *x = (*x - top).exp();
            *x
        })
        .sum();
    row.iter_mut().for_each(|x| *x /= sum);
}

fn softmax(axis: usize, x: &Array<Num>) -> Result {
    let mut result = x.clone();
    let mut lines = x.shape().to_vec();
    let length = std::mem::replace(&mut lines[axis], 1);
    each_index(&lines, |line| {
        let offset = |i| {
            let mut index = line.to_vec();
            index[axis] = i;
            x.offset(&index)
        };
        let mut row: Vec<f64> = (0..length).map(|i| x.elements()[offset(i)].float()).collect();
        softmax_row(&mut row);
        for (i, &y) in row.iter().enumerate() {
            result.elements_mut()[offset(i)] = rounded(y, x);
        }
        Ok(())
    })?;
    Ok(result)
}

fn norm(
    kind: NormKind,
    axis: usize,
    epsilon: f64,
    x: &Array<Num>,
    scale: &Array<Num>,
    bias: Option<&Array<Num>>,
) -> Result {
    let mut result = x.clone();
    let length: usize = x.shape()[axis..].iter().product();
    for (row, line) in x.elements().chunks(length.max(1)).enumerate() {
        let mean_of = |f: &dyn Fn(f64) -> f64| line.iter().map(|v| f(v.float())).sum::<f64>() / length as f64;
        let mean = if kind == NormKind::Layer { mean_of(&|v| v) } else { 0.0 };
        let deviation = (mean_of(&|v| (v - mean) * (v - mean)) + epsilon).sqrt();
        for (i, v) in line.iter().enumerate() {
            let shift = bias.map_or(0.0, |b| b.elements()[i].float());
            let y = (v.float() - mean) / deviation * scale.elements()[i].float() + shift;
            result.elements_mut()[row * length + i] = rounded(y, x);
        }
    }
    Ok(result)
}

fn attention(op: &Op, q: &Array<Num>, k: &Array<Num>, v: &Array<Num>, bias: Option<&Array<Num>>) -> Result {
    let Op::Attention { scale, softcap, kv_of_head, empty_rows_zero } = op else {
        return Err(OpError::other("is not attention"));
    };
    let &[batch, heads, queries, depth] = q.shape() else { return Err(OpError::other("operands of rank 4")) };
    let (keys, width) = (k.shape()[2], v.shape()[3]);
    let mut result = Array::filled(q.dtype, &[batch, heads, queries, width], Num::Float(0.0))?;
    each_index(&[batch, heads, queries], |row| {
        let &[b, h, s] = row else { return Ok(()) };
        let group = kv_of_head[h] as usize;
        let mut scores: Vec<f64> = (0..keys)
            .map(|t| {
                let dot: f64 =
                    (0..depth).map(|d| q.at(&[b, h, s, d]).float() * k.at(&[b, group, t, d]).float()).sum();
                let capped = match softcap {
                    Some(cap) => cap.0 * (dot * scale.0 / cap.0).tanh(),
                    None => dot * scale.0,
                };
                capped + bias.map_or(0.0, |bias| bias.at_broadcast(&[b, h, s, t]).float())
            })
            .collect();
        if *empty_rows_zero && scores.iter().all(|&x| x == f64::NEG_INFINITY) {
            return Ok(());
        }
        softmax_row(&mut scores);
        for e in 0..width {
            let sum: f64 = (0..keys).map(|t| scores[t] * v.at(&[b, group, t, e]).float()).sum();
            let at = result.offset(&[b, h, s, e]);
            result.elements_mut()[at] = rounded(sum, q);
        }
        Ok(())
    })?;
    Ok(result)
}

fn rotary(interleaved: bool, x: &Array<Num>, cos: &Array<Num>, sin: &Array<Num>) -> Result {
    let last = x.rank() - 1;
    let half = x.shape()[last] / 2;
    Array::from_fn(x.dtype, x.shape(), |index| {
        let (pair, second) = if interleaved {
            (index[last] / 2, index[last] % 2 == 1)
        } else {
            (index[last] % half.max(1), index[last] >= half)
        };
        let places = if interleaved { [2 * pair, 2 * pair + 1] } else { [pair, pair + half] };
        let with_last = |i: usize| {
            let mut at = index.to_vec();
            at[last] = i;
            at
        };
        let [first_x, second_x] = places.map(|i| x.at(&with_last(i)).float());
        let (c, s) = (cos.at_broadcast(&with_last(pair)).float(), sin.at_broadcast(&with_last(pair)).float());
        Ok(rounded(if second { first_x * s + second_x * c } else { first_x * c - second_x * s }, x))
    })
}
