//! Attention, one block of query rows at a time: the scores of a block against all keys, softmax, and the product with
//! the values. Scores never leave a small buffer per task, and queries, keys and values are read where they lie.
//!
//! A score is summed along the depth in lanes, a result along the keys as every product is, so both have the same bits whatever
//! other queries and heads are computed with them.

use super::gemm::{Matrix, Right, multiply};
use super::rows::softmax_row;
use super::value::Value;
use super::vector::{Isa, LANES, Lanes, dot_lanes, dots, functions, sums, turned, vectorised};
use crate::team;

/// From so many rows on it pays to turn keys around.
const FEW: usize = 8;
/// Scores kept per task, about.
const SCORES: usize = 64 * 1024;

/// The attributes of the operation.
pub(crate) struct Attention<'a> {
    pub(crate) scale: f32,
    pub(crate) softcap: Option<f32>,
    pub(crate) kv_of_head: &'a [u32],
    pub(crate) empty_rows_zero: bool,
}

impl Attention<'_> {
    pub(crate) fn run(&self, operands: &[Value], spare: Vec<f32>) -> Result<Value, String> {
        let [q, k, v, bias @ ..] = operands else { return Err("attention takes three operands".into()) };
        let (q, k, v) = (walkable(q)?, walkable(k)?, walkable(v)?);
        let (&[batch, heads, queries, depth], &[_, kv_heads, keys, _], &[.., width]) =
            (q.shape(), k.shape(), v.shape())
        else {
            return Err("attention over other than four dims".into());
        };
        if self.kv_of_head.len() != heads || self.kv_of_head.iter().any(|&h| h as usize >= kv_heads) {
            return Err("the heads of attention do not fit its operands".into());
        }
        let scores = [batch, heads, queries, keys];
        let bias = bias.first().map(|b| b.as_f32()?.stretched(&scores)).transpose()?;
        let mut out = spare;
        out.resize(batch * heads * queries * width, 0.0);
        if out.is_empty() {
            return Value::from_vec(&[batch, heads, queries, width], out);
        }
        if keys == 0 {
            // A sum over nothing.
            out.fill(0.0);
            return Value::from_vec(&[batch, heads, queries, width], out);
        }
        // A task's rows are queries of one head, or heads that have one query each and read the same keys.
        let (along, rows, heads_of_task) = match queries {
            1 => {
                let together = self.heads_together(batch);
                (1, together, together)
            }
            _ => (2, (SCORES / keys).clamp(1, queries), 1),
        };
        let blocks = (heads_of_task * queries).div_ceil(rows);
        let tasks: Vec<(usize, &mut [f32])> = out
            .chunks_mut(heads_of_task * queries * width)
            .enumerate()
            .flat_map(|(heads, out)| {
                let blocked = out.chunks_mut(rows * width).enumerate();
                blocked.map(move |(block, out)| (heads * blocks + block, out))
            })
            .collect();
        team::try_for_each_init(tasks.into_iter(), Vec::new, |scores, (task, out)| {
            let (head, first) = (task / blocks * heads_of_task, task % blocks * rows);
            let (b, h) = (head / heads, head % heads);
            let kv = self.kv_of_head.get(h).map_or(0, |&h| h as usize);
            let count = out.len() / width;
            let part = |value: &Value, h: usize, first: usize| {
                value.offset() as isize
                    + b as isize * value.strides()[0]
                    + h as isize * value.strides()[1]
                    + first as isize * value.strides()[2]
            };
            scores.resize(count * keys, 0.0);
            let left = Rows::new(&q, part(&q, h, first), along, [count, depth])?;
            let right = Rows::new(&k, part(&k, kv, 0), 2, [keys, depth])?;
            vectorised(
                #[inline(always)]
                |isa| products(isa, &left, &right, scores),
            );
            for (i, row) in scores.chunks_mut(keys).enumerate() {
                let (h, query) = if along == 1 { (h + i, 0) } else { (h, first + i) };
                self.finish_row(row, bias.as_ref().map(|bias| (bias, part(bias, h, query))))?;
            }
            let left = Matrix::new(scores, [count, keys], [keys, 1])?;
            let right = sub_matrix(&v, part(&v, kv, 0), [keys, width], [2, 3])?;
            multiply(out, left, Right::Matrix(right))
        })?;
        Value::from_vec(&[batch, heads, queries, width], out)
    }

    /// How many neighbouring heads a task takes that all read the same keys: these come from memory once for all of them.
    fn heads_together(&self, batch: usize) -> usize {
        let heads = self.kv_of_head.len();
        let alike = |count: &usize| {
            let mut groups = self.kv_of_head.chunks(*count);
            heads.is_multiple_of(*count) && groups.all(|group| group.iter().all(|kv| kv == &group[0]))
        };
        let enough = |count: &usize| *count == 1 || batch * heads / count >= 2 * team::threads();
        (1..FEW).rev().filter(enough).find(alike).unwrap_or(1)
    }

    /// Scales, caps and biases a row of scores, then takes its softmax.
    fn finish_row(&self, row: &mut [f32], bias: Option<(&Value, isize)>) -> Result<(), String> {
        row.iter_mut().for_each(|x| *x *= self.scale);
        if let Some(cap) = self.softcap {
            row.iter_mut().for_each(|x| *x /= cap);
            vectorised(
                #[inline(always)]
                |_| row.iter_mut().for_each(|x| *x = functions::tanh(*x)),
            );
            row.iter_mut().for_each(|x| *x *= cap);
        }
        if let Some((bias, offset)) = bias {
            let elements = bias.elements::<f32>()?;
            let step = bias.strides()[3];
            match step {
                1 => row
                    .iter_mut()
                    .zip(elements.get(offset as usize..).unwrap_or_default())
                    .for_each(|(x, b)| *x += b),
                _ => {
                    for (i, x) in row.iter_mut().enumerate() {
                        *x += elements[(offset + i as isize * step) as usize];
                    }
                }
            }
        }
        softmax_row(row, self.empty_rows_zero);
        Ok(())
    }
}

/// As `f32`, with rows whose elements lie next to each other.
fn walkable(x: &Value) -> Result<Value, String> {
    let x = x.as_f32()?;
    let rows = x.strides().iter().all(|&s| s >= 0)
        && (x.strides().last() == Some(&1) || x.shape().last() == Some(&1));
    if rows { Ok(x) } else { Ok(Value::new(x.into_tensor()?)) }
}

/// Rows of one length, one stride apart.
struct Rows<'a> {
    elements: &'a [f32],
    count: usize,
    length: usize,
    stride: usize,
}

impl<'a> Rows<'a> {
    /// Rows along a dim of a value.
    fn new(
        value: &'a Value,
        offset: isize,
        along: usize,
        [count, length]: [usize; 2],
    ) -> Result<Rows<'a>, String> {
        let elements = value.elements::<f32>()?.get(offset as usize..).ok_or("a head leaves its tensor")?;
        let stride = value.strides()[along].unsigned_abs();
        let end = count.saturating_sub(1).saturating_mul(stride).saturating_add(length);
        if count > 0 && end > elements.len() {
            return Err("a head leaves its tensor".into());
        }
        Ok(Rows { elements, count, length, stride })
    }

    #[inline(always)]
    fn row(&self, index: usize) -> &'a [f32] {
        &self.elements[index * self.stride..][..self.length]
    }
}

/// The product of every left row with every right one, row-major.
#[inline(always)]
fn products(isa: Isa, left: &Rows<'_>, right: &Rows<'_>, out: &mut [f32]) {
    if left.count < FEW {
        // Sixteen keys of every row, then their sums.
        let mut lanes = [[Lanes::ZERO; LANES]; FEW];
        for first in (0..right.count).step_by(LANES) {
            let count = LANES.min(right.count - first);
            for key in 0..count {
                let right_row = right.row(first + key);
                for (row, lanes) in lanes[..left.count].iter_mut().enumerate() {
                    lanes[key] = dot_lanes(left.row(row), right_row);
                }
            }
            for (row, lanes) in lanes[..left.count].iter().enumerate() {
                out[row * right.count + first..][..count].copy_from_slice(&sums(isa, lanes).0[..count]);
            }
        }
        return;
    }
    // Sixteen keys turned once serve all queries.
    let mut keys = vec![Lanes::ZERO; right.length];
    for first in (0..right.count).step_by(LANES) {
        let count = LANES.min(right.count - first);
        turned(
            count,
            #[inline(always)]
            |lane| right.row(first + lane),
            &mut keys,
        );
        for row in 0..left.count {
            let products = dots(left.row(row), &keys);
            out[row * right.count + first..][..count].copy_from_slice(&products.0[..count]);
        }
    }
}

fn sub_matrix(
    value: &Value,
    offset: isize,
    shape: [usize; 2],
    dims: [usize; 2],
) -> Result<Matrix<'_>, String> {
    let elements = value.elements::<f32>()?.get(offset as usize..).ok_or("a head leaves its tensor")?;
    Matrix::new(elements, shape, dims.map(|d| value.strides()[d].unsigned_abs()))
}
