//! Convolution as a matrix product over gathered windows, and pooling by direct windows.

use super::gemm::{Matrix, Rectangle, Right, multiply, rectangles};
use super::scalar::maximum;
use super::value::Value;
use super::vector::{LANES, vectorised};
use crate::team;
use std::ops::Range;
use tpshard_ir::op::{PoolKind, Window};

/// Gathered elements per task, about.
const COLUMNS: usize = 256 * 1024;
/// Multiplications of an image and group below which they are one task.
const SHARED_FROM: usize = 1 << 15;

/// The positions of a window's elements over a spatial plane.
struct Plane<'a> {
    window: &'a Window,
    input: &'a [usize],
    output: &'a [usize],
}

/// Neighbouring output positions at which one kernel element shows padding, then input, then padding.
#[derive(Debug, PartialEq)]
struct Run {
    length: usize,
    before: usize,
    inside: usize,
    /// The flat input position that the first within the input shows.
    first: usize,
}

impl Plane<'_> {
    fn taps(&self) -> usize {
        self.window.kernel.iter().product()
    }

    /// The flat input position of kernel element `tap` at output position `at`; `None` in the padding.
    fn position(&self, at: usize, tap: usize) -> Option<usize> {
        self.position_of(at, tap, self.input.len())
    }

    /// As [`Plane::position`], of the first dims only.
    fn position_of(&self, at: usize, tap: usize, dims: usize) -> Option<usize> {
        let (mut at, mut tap) = (at, tap);
        let (mut flat, mut stride) = (0, 1);
        for d in (0..dims).rev() {
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

    /// True if every output position shows the same input position and no other.
    fn is_identity(&self) -> bool {
        let Window { kernel, strides, pads_low, pads_high, .. } = self.window;
        let all = |values: &[usize], wanted: usize| values.iter().all(|&value| value == wanted);
        all(kernel, 1)
            && all(strides, 1)
            && all(pads_low, 0)
            && all(pads_high, 0)
            && self.input == self.output
    }

    /// What kernel element `tap` shows at some output positions, in runs along the last dim.
    fn runs(&self, positions: Range<usize>, tap: usize) -> Vec<Run> {
        let Window { kernel, strides, dilations, pads_low, .. } = self.window;
        let Some(last) = self.input.len().checked_sub(1) else {
            return vec![Run { length: positions.len(), before: 0, inside: positions.len(), first: 0 }];
        };
        let (width, extent, stride) = (self.output[last], self.input[last], strides[last]);
        let (offset, pad) = (tap % kernel[last] * dilations[last], pads_low[last]);
        // Below `low` lies padding, and from `high` on.
        let low = pad.saturating_sub(offset).div_ceil(stride);
        let high = (extent + pad).saturating_sub(offset).div_ceil(stride);
        let mut runs = Vec::new();
        let mut at = positions.start;
        while at < positions.end {
            let from = at % width;
            let to = width.min(from + (positions.end - at));
            let (low, high) = (low.clamp(from, to), high.clamp(from, to));
            let row = self.position_of(at / width, tap / kernel[last], last);
            let run = match row {
                Some(row) if low < high => Run {
                    length: to - from,
                    before: low - from,
                    inside: high - low,
                    first: row * extent + low * stride + offset - pad,
                },
                _ => Run { length: to - from, before: to - from, inside: 0, first: 0 },
            };
            runs.push(run);
            at += to - from;
        }
        runs
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
    // Where images and groups are fewer than threads, positions are shared out among them too, a vector of them at least;
    // where these are too few as well, so are filters.
    let chunks = out.len() / (group_out * out_size);
    let shares = if group_out * depth * out_size < SHARED_FROM { 1 } else { 2 * team::threads() };
    let shares = shares.div_ceil(chunks);
    let block = (COLUMNS / depth).clamp(1, out_size.div_ceil(shares)).next_multiple_of(LANES);
    let height = group_out.div_ceil(shares.div_ceil(out_size.div_ceil(block))).next_multiple_of(8);
    let tasks: Vec<(usize, Rectangle<'_>)> = out
        .chunks_mut(group_out * out_size)
        .enumerate()
        .flat_map(|(chunk, out)| {
            rectangles(out, out_size, height, block).into_iter().map(move |part| (chunk, part))
        })
        .collect();
    team::try_for_each_init(
        tasks.into_iter(),
        || (Vec::new(), Vec::new()),
        |(columns, product), (chunk, mut out)| -> Result<(), String> {
            let (image, group) = (chunk / groups, chunk % groups);
            let first = (image * channels + group * group_in) * in_size;
            let source = x.get(first..first + group_in * in_size).ok_or("an image leaves its tensor")?;
            let (from, filters) = (group * group_out + out.rows.start, out.rows.len());
            let weights =
                w.get(from * depth..(from + filters) * depth).ok_or("filters leave their tensor")?;
            let positions = out.columns.clone();
            let count = positions.len();
            product.resize(filters * count, 0.0);
            let left = Matrix::new(weights, [filters, depth], [depth, 1])?;
            let right = if plane.is_identity() {
                let source = source.get(positions.start..).ok_or("an image leaves its tensor")?;
                Matrix::new(source, [depth, count], [in_size, 1])?
            } else {
                columns.resize(depth * count, 0.0);
                gather_columns(&plane, source, positions.clone(), columns);
                Matrix::new(columns, [depth, count], [count, 1])?
            };
            let right = Right::Matrix(right);
            multiply(product, left, right)?;
            for (row, product) in product.chunks(count).enumerate() {
                out.row(row, positions.clone()).copy_from_slice(product);
            }
            Ok(())
        },
    )?;
    Value::from_vec(shape, out)
}

/// `columns[(channel, tap), position]` for some positions, row-major.
fn gather_columns(plane: &Plane<'_>, source: &[f32], positions: Range<usize>, columns: &mut [f32]) {
    let (in_size, taps, count) = (plane.input.iter().product::<usize>(), plane.taps(), positions.len());
    if in_size == 0 || count == 0 {
        columns.fill(0.0);
        return;
    }
    let stride = plane.window.strides.last().copied().unwrap_or(1);
    let runs: Vec<Vec<Run>> = (0..taps).map(|tap| plane.runs(positions.clone(), tap)).collect();
    for (source, columns) in source.chunks(in_size).zip(columns.chunks_mut(taps * count)) {
        for (runs, column) in runs.iter().zip(columns.chunks_mut(count)) {
            let mut rest = column;
            for run in runs {
                let (to, after) = rest.split_at_mut(run.length);
                rest = after;
                let (before, to) = to.split_at_mut(run.before);
                let (inside, after) = to.split_at_mut(run.inside);
                before.fill(0.0);
                after.fill(0.0);
                let from = &source[run.first.min(in_size)..];
                if stride == 1 {
                    inside.copy_from_slice(&from[..run.inside]);
                } else {
                    inside.iter_mut().zip(from.iter().step_by(stride)).for_each(|(to, from)| *to = *from);
                }
            }
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
    let runs: Vec<Vec<Run>> = (0..plane.taps()).map(|tap| plane.runs(0..out_size, tap)).collect();
    // By how many elements a mean divides.
    let counts: Vec<f32> = match kind {
        PoolKind::Average { count_padding } => {
            let counted = |at: usize, tap: usize| match count_padding {
                true => plane.is_padded_data(at, tap),
                false => plane.position(at, tap).is_some(),
            };
            (0..out_size).map(|at| (0..plane.taps()).filter(|&tap| counted(at, tap)).count() as f32).collect()
        }
        PoolKind::Max | PoolKind::Lp { .. } => Vec::new(),
    };
    let stride = window.strides.last().copied().unwrap_or(1);
    team::for_each(out.chunks_mut(out_size).enumerate(), |(channel, out)| {
        let source = x.get(channel * in_size..(channel + 1) * in_size).unwrap_or_default();
        let combine = |runs: &[Run], out: &mut [f32]| match kind {
            PoolKind::Max => combined(runs, (source, stride), out, |old, x| maximum(x, old)),
            PoolKind::Average { .. } => combined(runs, (source, stride), out, |old, x| old + x),
            PoolKind::Lp { p: 1 } => combined(runs, (source, stride), out, |old, x| old + x.abs()),
            PoolKind::Lp { p: 2 } => combined(runs, (source, stride), out, |old, x| old + x * x),
            PoolKind::Lp { p } => {
                combined(runs, (source, stride), out, |old, x| old + x.abs().powi(p as i32));
            }
        };
        out.fill(if kind == PoolKind::Max { f32::NEG_INFINITY } else { 0.0 });
        runs.iter().for_each(|runs| combine(runs, out));
        match kind {
            PoolKind::Average { .. } => out.iter_mut().zip(&counts).for_each(|(sum, count)| *sum /= count),
            PoolKind::Lp { p: 2 } => out.iter_mut().for_each(|sum| *sum = sum.sqrt()),
            PoolKind::Lp { p } if p != 1 => out.iter_mut().for_each(|sum| *sum = sum.powf(1.0 / p as f32)),
            PoolKind::Max | PoolKind::Lp { .. } => {}
        }
    });
    Value::from_vec(shape, out)
}

/// Combines every position with what one kernel element shows there, padding left out.
fn combined(
    runs: &[Run],
    (source, stride): (&[f32], usize),
    out: &mut [f32],
    combine: impl Fn(f32, f32) -> f32,
) {
    vectorised(
        #[inline(always)]
        |_| {
            let mut rest = &mut *out;
            for run in runs {
                let (to, after) = std::mem::take(&mut rest).split_at_mut(run.length);
                rest = after;
                let inside = to[run.before..].iter_mut().take(run.inside);
                let from = &source[run.first.min(source.len())..];
                match stride {
                    1 => inside.zip(from).for_each(|(old, &x)| *old = combine(*old, x)),
                    _ => {
                        inside.zip(from.iter().step_by(stride)).for_each(|(old, &x)| *old = combine(*old, x))
                    }
                }
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every window over small planes, against the position of each element by definition.
    #[test]
    fn gathered_columns_are_the_elements_at_their_positions() {
        let mut seen = 0;
        for (kernel, stride, dilation) in [(1, 1, 1), (3, 1, 1), (3, 2, 1), (2, 3, 2), (5, 1, 1)] {
            for (low, high) in [(0, 0), (1, 1), (2, 0), (4, 3)] {
                for input in [vec![7], vec![5, 6], vec![3, 4, 5], vec![1, 9]] {
                    let dims = input.len();
                    let window = Window {
                        kernel: vec![kernel; dims],
                        strides: vec![stride; dims],
                        dilations: vec![dilation; dims],
                        pads_low: vec![low; dims],
                        pads_high: vec![high; dims],
                        ceil: false,
                    };
                    let reach = dilation * (kernel - 1);
                    let out = |extent: usize| {
                        (extent + low + high).checked_sub(reach + 1).map(|room| room / stride + 1)
                    };
                    let Some(output) = input.iter().map(|&extent| out(extent)).collect::<Option<Vec<_>>>()
                    else {
                        continue;
                    };
                    let plane = Plane { window: &window, input: &input, output: &output };
                    let (in_size, out_size) =
                        (input.iter().product::<usize>(), output.iter().product::<usize>());
                    let source: Vec<f32> = (1..=2 * in_size).map(|i| i as f32).collect();
                    for positions in [0..out_size, out_size / 3..out_size, out_size / 2..out_size / 2 + 1] {
                        let (taps, count) = (plane.taps(), positions.len());
                        let mut columns = vec![f32::NAN; 2 * taps * count];
                        gather_columns(&plane, &source, positions.clone(), &mut columns);
                        for (i, &found) in columns.iter().enumerate() {
                            let (channel, tap, at) = (i / count / taps, i / count % taps, i % count);
                            let position = plane.position(positions.start + at, tap);
                            let wanted = position.map_or(0.0, |p| source[channel * in_size + p]);
                            assert_eq!(found, wanted, "{window:?} over {input:?}, {tap} at {at}");
                            seen += usize::from(position.is_some());
                        }
                    }
                    assert_eq!(
                        plane.is_identity(),
                        (0..out_size).all(|at| plane.position(at, 0) == Some(at))
                            && kernel == 1
                            && input == output
                    );
                }
            }
        }
        assert!(seen > 10_000);
    }
}
