//! Convolution as a matrix product over gathered windows, and pooling by direct windows.

use super::gemm::{Matrix, Rectangle, Right, multiply, rectangles};
use super::value::Value;
use rayon::prelude::*;
use tpshard_ir::op::{PoolKind, Window};

/// Gathered elements per task, about.
const COLUMNS: usize = 256 * 1024;

/// The positions of a window's elements over a spatial plane.
struct Plane<'a> {
    window: &'a Window,
    input: &'a [usize],
    output: &'a [usize],
}

impl Plane<'_> {
    fn taps(&self) -> usize {
        self.window.kernel.iter().product()
    }

    /// The flat input position of kernel element `tap` at output position `at`; `None` in the padding.
    fn position(&self, at: usize, tap: usize) -> Option<usize> {
        let (mut at, mut tap) = (at, tap);
        let (mut flat, mut stride) = (0, 1);
        for d in (0..self.input.len()).rev() {
            let (o, k) = (at % self.output[d], tap % self.window.kernel[d]);
            at /= self.output[d];
            tap /= self.window.kernel[d];
            let i = (o * self.window.strides[d] + k * self.window.dilations[d])
                .checked_sub(self.window.pads_low[d])?;
            if i >= self.input[d] {
                return None;
            }
            flat += i * stride;
            stride *= self.input[d];
        }
        Some(flat)
    }

    /// True if kernel element `tap` at output position `at` lies within data or declared padding.
    fn is_padded_data(&self, at: usize, tap: usize) -> bool {
        let (mut at, mut tap) = (at, tap);
        (0..self.input.len()).rev().all(|d| {
            let (o, k) = (at % self.output[d], tap % self.window.kernel[d]);
            at /= self.output[d];
            tap /= self.window.kernel[d];
            let padded = self.window.pads_low[d] + self.input[d] + self.window.pads_high[d];
            o * self.window.strides[d] + k * self.window.dilations[d] < padded
        })
    }
}

/// Convolution of `x[N, C, …]` with `w[M, C/groups, …]`; `shape` is the result's.
pub(crate) fn conv(
    window: &Window,
    groups: usize,
    [x, w]: [&Value; 2],
    shape: &[usize],
    spare: Vec<f32>,
) -> Result<Value, String> {
    let ([_, channels, input @ ..], [_, filters, output @ ..]) = (x.shape(), shape) else {
        return Err("convolution of too few dims".into());
    };
    let (channels, filters) = (*channels, *filters);
    let plane = Plane { window, input, output };
    let (in_size, out_size) = (input.iter().product::<usize>(), output.iter().product::<usize>());
    let groups = groups.max(1);
    if !channels.is_multiple_of(groups) || !filters.is_multiple_of(groups) {
        return Err(format!("{groups} groups do not divide {channels} channels and {filters} filters"));
    }
    let (group_in, group_out) = (channels / groups, filters / groups);
    let depth = group_in * plane.taps();
    let (x, w) = (x.to_f32()?, w.to_f32()?);
    let mut out = spare;
    out.resize(shape.iter().product(), 0.0);
    if out.is_empty() || group_out == 0 {
        return Value::from_vec(shape, out);
    }
    if depth == 0 {
        out.fill(0.0);
        return Value::from_vec(shape, out);
    }
    // Where images and groups are fewer than threads, positions are shared out among them too.
    let chunks = out.len() / (group_out * out_size);
    let shares = (2 * rayon::current_num_threads()).div_ceil(chunks);
    let block = (COLUMNS / depth).clamp(1, out_size.div_ceil(shares));
    let tasks: Vec<(usize, Rectangle<'_>)> = out
        .chunks_mut(group_out * out_size)
        .enumerate()
        .flat_map(|(chunk, out)| {
            rectangles(out, out_size, group_out, block).into_iter().map(move |part| (chunk, part))
        })
        .collect();
    tasks.into_par_iter().try_for_each_init(
        || (Vec::new(), Vec::new()),
        |(columns, product), (chunk, mut out)| -> Result<(), String> {
            let (image, group) = (chunk / groups, chunk % groups);
            let first = (image * channels + group * group_in) * in_size;
            let source = x.get(first..first + group_in * in_size).ok_or("an image leaves its tensor")?;
            let from = group * group_out * depth;
            let weights = w.get(from..from + group_out * depth).ok_or("filters leave their tensor")?;
            let positions = out.columns.clone();
            let count = positions.len();
            columns.resize(depth * count, 0.0);
            gather_columns(&plane, source, positions.start, count, columns);
            product.resize(group_out * count, 0.0);
            let left = Matrix::new(weights, [group_out, depth], [depth, 1])?;
            let right = Right::Matrix(Matrix::new(columns, [depth, count], [count, 1])?);
            multiply(product, left, right)?;
            for (row, product) in product.chunks(count).enumerate() {
                out.row(row, positions.clone()).copy_from_slice(product);
            }
            Ok(())
        },
    )?;
    Value::from_vec(shape, out)
}

/// `columns[(channel, tap), position]` for `count` positions from `start`.
fn gather_columns(plane: &Plane<'_>, source: &[f32], start: usize, count: usize, columns: &mut [f32]) {
    let in_size: usize = plane.input.iter().product();
    let taps = plane.taps();
    let mut positions: Vec<Option<usize>> = Vec::with_capacity(count);
    for tap in 0..taps {
        positions.clear();
        positions.extend((start..start + count).map(|at| plane.position(at, tap)));
        for (channel, source) in source.chunks(in_size.max(1)).enumerate() {
            let at = (channel * taps + tap) * count;
            for (c, p) in columns[at..at + count].iter_mut().zip(&positions) {
                *c = p.map_or(0.0, |p| source[p]);
            }
        }
        if in_size == 0 {
            columns.fill(0.0);
        }
    }
}

/// Pooling of `x[N, C, …]`; `shape` is the result's.
pub(crate) fn pool(
    kind: PoolKind,
    window: &Window,
    x: &Value,
    shape: &[usize],
    spare: Vec<f32>,
) -> Result<Value, String> {
    let ([_, _, input @ ..], [_, _, output @ ..]) = (x.shape(), shape) else {
        return Err("pooling of too few dims".into());
    };
    let plane = Plane { window, input, output };
    let (in_size, out_size) = (input.iter().product::<usize>(), output.iter().product::<usize>());
    let x = x.to_f32()?;
    let mut out = spare;
    out.resize(shape.iter().product(), 0.0);
    if out.is_empty() {
        return Value::from_vec(shape, out);
    }
    out.par_chunks_mut(out_size).enumerate().for_each(|(channel, out)| {
        let source = x.get(channel * in_size..(channel + 1) * in_size).unwrap_or_default();
        for (at, out) in out.iter_mut().enumerate() {
            let values = (0..plane.taps()).filter_map(|tap| plane.position(at, tap)).map(|p| source[p]);
            *out = match kind {
                PoolKind::Max => values.fold(f32::NEG_INFINITY, |a, b| super::scalar::maximum(b, a)),
                PoolKind::Average { count_padding } => {
                    let (sum, data) = values.fold((0.0f32, 0usize), |(s, n), v| (s + v, n + 1));
                    let padded = || (0..plane.taps()).filter(|&tap| plane.is_padded_data(at, tap)).count();
                    sum / if count_padding { padded() } else { data } as f32
                }
                PoolKind::Lp { p: 1 } => values.map(f32::abs).sum(),
                PoolKind::Lp { p: 2 } => values.map(|v| v * v).sum::<f32>().sqrt(),
                PoolKind::Lp { p } => {
                    values.map(|v| v.abs().powi(p as i32)).sum::<f32>().powf(1.0 / p as f32)
                }
            };
        }
    });
    Value::from_vec(shape, out)
}
