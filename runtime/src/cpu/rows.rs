//! Kernels over rows: reductions, softmax, norms, rotary embeddings, quantised blocks.
//!
//! Every row is summed in an order that depends on its length only, so results do not change with the number of
//! threads.

use super::scalar::{maximum, minimum};
use super::value::Value;
use super::vector::{self, functions, vectorised};
use crate::team;
use tpshard_ir::layout::Monoid;
use tpshard_ir::op::NormKind;

/// Elements per task, at least.
const CHUNK: usize = 16 * 1024;

/// Runs `kernel` on every row of `out`, several rows per task.
fn for_each_row(out: &mut [f32], row: usize, kernel: impl Fn(usize, &mut [f32]) + Sync) {
    if out.is_empty() {
        return;
    }
    let rows = (CHUNK / row).max(1);
    team::for_each(out.chunks_mut(rows * row).enumerate(), |(task, chunk)| {
        vectorised(
            #[inline(always)]
            |_| {
                for (i, out) in chunk.chunks_mut(row).enumerate() {
                    kernel(task * rows + i, out);
                }
            },
        );
    });
}

/// Row `index` of rows of `length` elements.
fn row(all: &[f32], index: usize, length: usize) -> &[f32] {
    all.get(index * length..(index + 1) * length).unwrap_or_default()
}

/// `axis` moved to the end, as row-major elements, and the permutation that moves it back.
fn axis_last(x: &Value, axis: usize) -> (Value, Vec<usize>) {
    let rank = x.shape().len();
    let perm: Vec<usize> = (0..rank).filter(|&d| d != axis).chain([axis]).collect();
    let mut back = vec![0; rank];
    for (i, &p) in perm.iter().enumerate() {
        back[p] = i;
    }
    (x.permuted(&perm), back)
}

pub(crate) fn softmax(x: &Value, axis: usize, spare: Vec<f32>) -> Result<Value, String> {
    let (moved, back) = axis_last(x, axis);
    let length = *x.shape().get(axis).ok_or("softmax over a dim that does not exist")?;
    let rows = moved.to_f32()?;
    let mut out = spare;
    out.resize(rows.len(), 0.0);
    for_each_row(
        &mut out,
        length.max(1),
        #[inline(always)]
        |i, out| {
            out.copy_from_slice(row(&rows, i, length));
            normalise(out, false);
        },
    );
    Ok(Value::from_vec(moved.shape(), out)?.permuted(&back))
}

/// Softmax in place. A row of -inf gives NaN, or zeros if `empty_is_zero`.
pub(crate) fn softmax_row(row: &mut [f32], empty_is_zero: bool) {
    vectorised(
        #[inline(always)]
        |_| normalise(row, empty_is_zero),
    );
}

#[inline(always)]
fn normalise(row: &mut [f32], empty_is_zero: bool) {
    let largest = vector::largest(row);
    if largest == f32::NEG_INFINITY {
        row.fill(if empty_is_zero { 0.0 } else { f32::NAN });
        return;
    }
    row.iter_mut().for_each(|x| *x = functions::exp(*x - largest));
    let factor = 1.0 / vector::sum(row);
    row.iter_mut().for_each(|x| *x *= factor);
}

/// Normalises over the dims from `axis` on.
pub(crate) fn norm(
    kind: NormKind,
    axis: usize,
    epsilon: f64,
    operands: &[Value],
    spare: Vec<f32>,
) -> Result<Value, String> {
    let [x, scale, bias @ ..] = operands else { return Err("a norm without scale".into()) };
    let length: usize = x.shape().get(axis..).ok_or("a norm over dims that do not exist")?.iter().product();
    let (rows, scale) = (x.to_f32()?, scale.to_f32()?);
    let bias = bias.first().map(Value::to_f32).transpose()?;
    if scale.len() != length || bias.as_ref().is_some_and(|b| b.len() != length) {
        return Err("scale or bias of a norm do not fit".into());
    }
    let mut out = spare;
    out.resize(rows.len(), 0.0);
    let n = length as f32;
    for_each_row(
        &mut out,
        length.max(1),
        #[inline(always)]
        |i, out| {
            let x = row(&rows, i, length);
            let mean = match kind {
                NormKind::Layer => vector::sum(x) / n,
                NormKind::Rms => 0.0,
            };
            let deviation = (vector::sum_squares(x, mean) / n + epsilon as f32).sqrt();
            match &bias {
                Some(bias) => {
                    for (((o, &x), &s), &b) in out.iter_mut().zip(x).zip(scale.iter()).zip(bias.iter()) {
                        *o = (x - mean) / deviation * s + b;
                    }
                }
                None => {
                    for ((o, &x), &s) in out.iter_mut().zip(x).zip(scale.iter()) {
                        *o = (x - mean) / deviation * s;
                    }
                }
            }
        },
    );
    Value::from_vec(x.shape(), out)
}

/// Reduces `axes` to extent 1.
pub(crate) fn reduce(x: &Value, monoid: Monoid, axes: &[usize]) -> Result<Value, String> {
    let rank = x.shape().len();
    let kept = (0..rank).filter(|d| !axes.contains(d));
    let perm: Vec<usize> = kept.chain((0..rank).filter(|d| axes.contains(d))).collect();
    let moved = x.permuted(&perm);
    let length: usize = axes.iter().map(|&a| x.shape().get(a).copied().unwrap_or(1)).product();
    let shape: Vec<usize> = (0..rank).map(|d| if axes.contains(&d) { 1 } else { x.shape()[d] }).collect();
    let rows = moved.to_f32()?;
    let mut out = vec![0.0f32; shape.iter().product()];
    let per_task = (CHUNK / length.max(1)).max(1);
    team::for_each(out.chunks_mut(per_task).enumerate(), |(task, chunk)| {
        vectorised(
            #[inline(always)]
            |_| {
                for (i, out) in chunk.iter_mut().enumerate() {
                    *out = fold(monoid, row(&rows, task * per_task + i, length));
                }
            },
        );
    });
    Value::from_vec(&shape, out)
}

/// The combination of all elements; the identity if there are none.
#[inline(always)]
pub(super) fn fold(monoid: Monoid, row: &[f32]) -> f32 {
    match monoid {
        Monoid::Sum => vector::sum(row),
        Monoid::Prod => vector::fold(row, 1.0, |x| x, |a, b| a * b),
        Monoid::Max => vector::fold(row, f32::NEG_INFINITY, |x| x, |a, b| maximum(b, a)),
        Monoid::Min => vector::fold(row, f32::INFINITY, |x| x, |a, b| minimum(b, a)),
    }
}

/// Rotates pairs of the last dim.
pub(crate) fn rotary(interleaved: bool, operands: &[Value], spare: Vec<f32>) -> Result<Value, String> {
    let [x, cos, sin] = operands else { return Err("rotary takes three operands".into()) };
    let Some((&width, outer)) = x.shape().split_last() else { return Err("rotary of a scalar".into()) };
    let half = width / 2;
    if width % 2 != 0 {
        return Err("rotary of an odd dim".into());
    }
    let angles = [outer, &[half]].concat();
    let (cos, sin) = (cos.as_f32()?.stretched(&angles)?, sin.as_f32()?.stretched(&angles)?);
    let rows = x.to_f32()?;
    let mut out = spare;
    out.resize(rows.len(), 0.0);
    let (all_cos, all_sin) = (cos.elements::<f32>()?, sin.elements::<f32>()?);
    for_each_row(&mut out, width.max(1), |i, out| {
        let x = row(&rows, i, width);
        let (c, s) = (offset_of(&cos, outer, i), offset_of(&sin, outer, i));
        let (c_step, s_step) = (cos.strides()[outer.len()], sin.strides()[outer.len()]);
        for j in 0..half {
            let (a, b) = if interleaved { (2 * j, 2 * j + 1) } else { (j, j + half) };
            let cos = all_cos[(c + j as isize * c_step) as usize];
            let sin = all_sin[(s + j as isize * s_step) as usize];
            out[a] = x[a] * cos - x[b] * sin;
            out[b] = x[a] * sin + x[b] * cos;
        }
    });
    Value::from_vec(x.shape(), out)
}

/// Where row `index` of the dims `outer` starts.
pub(crate) fn offset_of(view: &Value, outer: &[usize], index: usize) -> isize {
    let (mut rest, mut offset) = (index, view.offset() as isize);
    for (&extent, &stride) in outer.iter().zip(view.strides()).rev() {
        offset += (rest % extent.max(1)) as isize * stride;
        rest /= extent.max(1);
    }
    offset
}
