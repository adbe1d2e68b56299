//! Rotary position embeddings:
//! [RotaryEmbedding](https://onnx.ai/onnx/operators/onnx__RotaryEmbedding.html) 23 of the default domain, and
//! [com.microsoft.RotaryEmbedding](https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.RotaryEmbedding) 1.
//!
//! Rows of the cosine and sine tables are picked by position, then pairs of entries are rotated. If the tables are
//! narrower than half a head, only the first entries of a head turn. The contrib operator has the operands in another
//! order, and may give one position, that of the first token of every row.

use super::heads::{dims_of, head_count};
use crate::lower::{Call, Lowered, Lowering, Value, invalid, unsupported};
use tpshard_ir::{DType, Dim, Op, Scalar, ValueId};

/// RotaryEmbedding 23: `(X, cos_cache, sin_cache[, position_ids])`.
pub(crate) fn rotary_embedding(lowering: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let interleaved = call.attributes.bool("interleaved", false)?;
    let heads = call.attributes.int("num_heads", 0)?;
    let turned = call.attributes.int("rotary_embedding_dim", 0)?;
    let (x, heads_axis) = input(lowering, call.input(0)?, heads, None)?;
    let (cos, sin) = match call.optional(3) {
        Some(positions) => {
            let positions = lowering.data(positions)?;
            (
                table_rows(lowering, call.input(1)?, positions)?,
                table_rows(lowering, call.input(2)?, positions)?,
            )
        }
        None => (lowering.data(call.input(1)?)?, lowering.data(call.input(2)?)?),
    };
    let [cos, sin] = [cos, sin].map(|table| with_heads_axis(lowering, table, heads_axis));
    let (cos, sin) = (cos?, sin?);
    check_width(lowering, cos, turned)?;
    let rotated = rotate(lowering, x, cos, sin, interleaved)?;
    restore(lowering, rotated, heads_axis)
}

/// com.microsoft RotaryEmbedding 1: `(input, position_ids, cos_cache, sin_cache)`.
pub(crate) fn rotary_embedding_contrib(lowering: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let interleaved = call.attributes.bool("interleaved", false)?;
    let heads = call.attributes.int("num_heads", 0)?;
    let turned = call.attributes.int("rotary_embedding_dim", 0)?;
    if call.attributes.float("scale", 1.0)? != 1.0 {
        return Err(unsupported("a scale other than 1"));
    }
    if call.attributes.bool("is_packed_batching", false)? {
        return Err(unsupported("is_packed_batching"));
    }
    let table = dims_of::<2>(&lowering.ty(call.input(2)?), "cos_cache")?;
    let (x, heads_axis) = input(lowering, call.input(0)?, heads, Some(&table[1] * &Dim::constant(2)))?;
    let sequence = lowering.type_of(x).shape[if heads_axis == 2 { 1 } else { 2 }].clone();
    let positions = positions(lowering, call.input(1)?, &sequence)?;
    let cos = table_rows(lowering, call.input(2)?, positions)?;
    let sin = table_rows(lowering, call.input(3)?, positions)?;
    let cos = with_heads_axis(lowering, cos, heads_axis)?;
    let sin = with_heads_axis(lowering, sin, heads_axis)?;
    check_width(lowering, cos, turned)?;
    let rotated = rotate(lowering, x, cos, sin, interleaved)?;
    restore(lowering, rotated, heads_axis)
}

/// The input with heads apart, and which axis they are: 2 of `[b, s, h, d]` made from rank 3, 1 of `[b, h, s, d]`.
fn input(
    lowering: &mut Lowering<'_>,
    x: &Value,
    heads: i64,
    head_size: Option<Dim>,
) -> Lowered<(ValueId, usize)> {
    let ty = lowering.ty(x);
    match (ty.rank(), heads, head_size) {
        (4, _, _) => Ok((lowering.data(x)?, 1)),
        (3, 1.., _) => {
            let cut = lowering.cut_heads(x, head_count(heads, "num_heads")?, "the input")?;
            Ok((lowering.data(&cut)?, 2))
        }
        (3, 0, Some(size)) => {
            let heads = ty.shape[2].exact_div(&size);
            let heads = heads.ok_or_else(|| invalid(format!("{ty} does not divide into heads of {size}")))?;
            let cut = lowering.reshape_value(x, &[ty.shape[0].clone(), ty.shape[1].clone(), heads, size])?;
            Ok((lowering.data(&cut)?, 2))
        }
        (3, _, _) => Err(invalid("an input of rank 3 needs num_heads")),
        _ => Err(invalid(format!("the input is {ty}, not of rank 3 or 4"))),
    }
}

/// Positions as `[b, s]` or `[1, s]`; a single one is that of the first token.
fn positions(lowering: &mut Lowering<'_>, value: &Value, sequence: &Dim) -> Lowered<ValueId> {
    let ty = lowering.ty(value);
    let given = lowering.data(value)?;
    if ty.rank() != 1 {
        return Ok(given);
    }
    lowering.unify(&ty.shape[0], &Dim::constant(1))?;
    let wide = lowering.cast(given, DType::I64)?;
    let length = lowering.current(sequence);
    let steps = lowering.add(Op::Iota { start: Dim::constant(0), length: length.clone() }, &[])?;
    let steps = lowering.map(Scalar::Add, &[wide, steps])?;
    lowering.reshape(steps, &[Dim::constant(1), length])
}

/// The rows of a table `[positions, m]` that `[b, s]` positions name.
pub(crate) fn table_rows(lowering: &mut Lowering<'_>, table: &Value, positions: ValueId) -> Lowered<ValueId> {
    dims_of::<2>(&lowering.ty(table), "the table of angles")?;
    dims_of::<2>(&lowering.type_of(positions), "position_ids")?;
    let rows = lowering.gather_value(table, &Value::Data(positions), 0)?;
    lowering.data(&rows)
}

/// `[b, s, m]` with an axis of extent 1 where the heads are.
pub(crate) fn with_heads_axis(lowering: &mut Lowering<'_>, rows: ValueId, axis: usize) -> Lowered<ValueId> {
    let mut shape = dims_of::<3>(&lowering.type_of(rows), "the table of angles")?.to_vec();
    shape.insert(axis, Dim::constant(1));
    lowering.reshape(rows, &shape)
}

fn check_width(lowering: &mut Lowering<'_>, cos: ValueId, turned: i64) -> Lowered<()> {
    if turned == 0 {
        return Ok(());
    }
    let half = lowering.type_of(cos).shape[3].clone();
    lowering.unify(&(half * Dim::constant(2)), &Dim::constant(turned))
}

/// Rotates the first `2m` entries of the last axis of `x` (rank 4) by `cos` and `sin` of last extent `m`.
pub(crate) fn rotate(
    lowering: &mut Lowering<'_>,
    x: ValueId,
    cos: ValueId,
    sin: ValueId,
    interleaved: bool,
) -> Lowered<ValueId> {
    let dtype = lowering.type_of(x).dtype;
    let (cos, sin) = (lowering.cast(cos, dtype)?, lowering.cast(sin, dtype)?);
    let angles = dims_of::<4>(&lowering.type_of(cos), "the table of angles")?;
    let mut halves = dims_of::<4>(&lowering.type_of(x), "the input")?;
    halves[3] = angles[3].clone();
    lowering.unify_broadcast(cos, &halves, "the table of cosines")?;
    lowering.unify_broadcast(sin, &halves, "the table of sines")?;
    let size = lowering.type_of(x).shape[3].clone();
    let turned = lowering.type_of(cos).shape[3].clone() * Dim::constant(2);
    let rest = &size - &turned;
    if rest.is_zero() {
        return lowering.add(Op::Rotary { interleaved }, &[x, cos, sin]);
    }
    if !rest.is_nonnegative() {
        return Err(invalid(format!("heads of {size} entries, {turned} of which would turn")));
    }
    let first = lowering.slice(x, 3, Dim::constant(0), turned.clone(), 1)?;
    let first = lowering.add(Op::Rotary { interleaved }, &[first, cos, sin])?;
    let still = lowering.slice(x, 3, turned, rest, 1)?;
    lowering.add(Op::Concat { axis: 3 }, &[first, still])
}

fn restore(lowering: &mut Lowering<'_>, x: ValueId, heads_axis: usize) -> Lowered<Vec<Value>> {
    if heads_axis == 1 {
        return Ok(vec![Value::Data(x)]);
    }
    let [batch, sequence, heads, size] = dims_of(&lowering.type_of(x), "the result")?;
    Ok(vec![Value::Data(lowering.reshape(x, &[batch, sequence, heads * size])?)])
}
