//! RotaryEmbedding of ONNX (since 23), <https://onnx.ai/onnx/operators/onnx__RotaryEmbedding.html>, and of ONNX Runtime,
//! <https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.RotaryEmbedding>.

use crate::lower::{Call, Lowered, Lowering, Value, invalid, unsupported};
use tpshard_ir::{Dim, Op, ValueId};

/// Rotates the first `2 * width(cos)` entries of the last dim of `x[b, h, s, d]`; `cos` and `sin` broadcast to
/// `[b, h, s, width]`.
pub(super) fn rotate(
    l: &mut Lowering<'_>,
    x: ValueId,
    cos: ValueId,
    sin: ValueId,
    interleaved: bool,
) -> Lowered<ValueId> {
    let ty = l.graph.ty(x).clone();
    let last = ty.rank().saturating_sub(1);
    let width = l.graph.ty(cos).shape.last().cloned().ok_or_else(|| invalid("cos of rank 0"))?;
    let (head, rotated) = (ty.shape[last].clone(), &width * &Dim::constant(2));
    if head == rotated {
        return l.add(Op::Rotary { interleaved }, &[x, cos, sin]);
    }
    l.assume_at_most(&rotated, &head)?;
    let first = l.slice(x, last, Dim::constant(0), rotated.clone(), 1)?;
    let rest = l.slice(x, last, rotated.clone(), &head - &rotated, 1)?;
    let turned = l.add(Op::Rotary { interleaved }, &[first, cos, sin])?;
    l.add(Op::Concat { axis: last }, &[turned, rest])
}

/// `[b, s, h * d]` as `[b, h, s, d]`.
pub(super) fn split_heads(l: &mut Lowering<'_>, x: ValueId, heads: &Dim) -> Lowered<ValueId> {
    let ty = l.graph.ty(x).clone();
    let [b, s, hidden] = ty.shape.as_slice() else { return Err(invalid(format!("{ty} is not of rank 3"))) };
    if heads.as_const().is_none_or(|heads| heads < 1) {
        return Err(invalid("the number of heads"));
    }
    let each = hidden
        .exact_div(heads)
        .ok_or_else(|| invalid(format!("{hidden} does not divide into {heads} heads")))?;
    let split = l.reshape(x, &[b.clone(), s.clone(), heads.clone(), each])?;
    l.transpose(split, &[0, 2, 1, 3])
}

/// `[b, h, s, d]` as `[b, s, h * d]`.
pub(super) fn join_heads(l: &mut Lowering<'_>, x: ValueId) -> Lowered<ValueId> {
    let back = l.transpose(x, &[0, 2, 1, 3])?;
    let ty = l.graph.ty(back).clone();
    let [b, s, h, d] = ty.shape.as_slice() else { return Err(invalid(format!("{ty} is not of rank 4"))) };
    l.reshape(back, &[b.clone(), s.clone(), h * d])
}

/// Rows of a cache `[positions, width]` as `[b, 1, s, width]`.
pub(super) fn rows(l: &mut Lowering<'_>, cache: &Value, positions: &Value) -> Lowered<ValueId> {
    let picked = l.gather_value(cache, positions, 0)?;
    let picked = l.data(&picked)?;
    add_head_dim(l, picked)
}

fn add_head_dim(l: &mut Lowering<'_>, x: ValueId) -> Lowered<ValueId> {
    let ty = l.graph.ty(x).clone();
    let [b, s, width] = ty.shape.as_slice() else {
        return Err(invalid(format!("{ty} is not [batch, sequence, width]")));
    };
    l.reshape(x, &[b.clone(), Dim::constant(1), s.clone(), width.clone()])
}

pub(super) fn rotary_embedding(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let interleaved = call.attributes.bool("interleaved", false)?;
    let heads = Dim::constant(call.attributes.int("num_heads", 0)?);
    let width = call.attributes.int("rotary_embedding_dim", 0)?;
    let (cos, sin) = match call.optional(3) {
        Some(positions) => {
            let positions = positions.clone();
            (rows(l, call.input(1)?, &positions)?, rows(l, call.input(2)?, &positions)?)
        }
        None => {
            let (cos, sin) = (l.data(call.input(1)?)?, l.data(call.input(2)?)?);
            (add_head_dim(l, cos)?, add_head_dim(l, sin)?)
        }
    };
    let x = l.data(call.input(0)?)?;
    finish(l, x, cos, sin, &heads, width, interleaved)
}

/// Rotates a 3-D or 4-D operand and gives it its shape back.
fn finish(
    l: &mut Lowering<'_>,
    x: ValueId,
    cos: ValueId,
    sin: ValueId,
    heads: &Dim,
    width: i64,
    interleaved: bool,
) -> Lowered<Vec<Value>> {
    let rank = l.graph.ty(x).rank();
    let own = l.graph.ty(cos).shape.last().cloned().unwrap_or_else(|| Dim::constant(0));
    let flat = rank == 3;
    let x = if flat { split_heads(l, x, heads)? } else { x };
    let head = l.graph.ty(x).shape.last().cloned().ok_or_else(|| invalid("an operand of rank 0"))?;
    if own.as_symbol().is_some() {
        let expected = if width > 0 { Dim::constant(width) } else { head.clone() };
        let half = expected.exact_div(&Dim::constant(2)).ok_or_else(|| invalid("an odd rotary dim"))?;
        l.unify(&own, &half)?;
    } else if width > 0 && own != Dim::constant(width / 2) {
        return Err(invalid(format!("cos and sin are {own} wide, the rotary dim is {width}")));
    }
    let turned = rotate(l, x, cos, sin, interleaved)?;
    Ok(vec![Value::Data(if flat { join_heads(l, turned)? } else { turned })])
}

/// `position_ids` come before the caches, and may be one offset for all.
pub(super) fn microsoft(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let interleaved = call.attributes.bool("interleaved", false)?;
    let mut heads = Dim::constant(call.attributes.int("num_heads", 0)?);
    let width = call.attributes.int("rotary_embedding_dim", 0)?;
    call.attributes.ignore("is_packed_batching");
    let scale = call.attributes.float("scale", 1.0)?;
    if scale != 1.0 {
        return Err(unsupported("a rotary embedding with a scale"));
    }
    let x = l.data(call.input(0)?)?;
    let ty = l.graph.ty(x).clone();
    let (cos, sin) = (call.input(2)?.clone(), call.input(3)?.clone());
    if heads.is_zero() && ty.rank() == 3 {
        // Without a head count the caches say how wide a head is.
        let half = l.shape(&cos).last().cloned().ok_or_else(|| invalid("cos of rank 0"))?;
        heads = ty.shape[2]
            .exact_div(&(half * Dim::constant(2)))
            .ok_or_else(|| invalid("the hidden size does not divide into heads"))?;
    }
    let positions = call.input(1)?.clone();
    let sequence = ty.shape[ty.rank() - 2].clone();
    let positions = if l.shape(&positions).len() == 2 {
        positions
    } else {
        let offset = l.data(&positions)?;
        let offset = l.reshape(offset, &[Dim::constant(1), Dim::constant(1)])?;
        let offset = l.cast(offset, tpshard_ir::DType::I64)?;
        let index = l.add(Op::Iota { start: Dim::constant(0), length: sequence.clone() }, &[])?;
        let sum = l.map(tpshard_ir::Scalar::Add, &[offset, index])?;
        Value::Data(l.broadcast(sum, &[ty.shape[0].clone(), sequence])?)
    };
    let (cos, sin) = (rows(l, &cos, &positions)?, rows(l, &sin, &positions)?);
    finish(l, x, cos, sin, &heads, width, interleaved)
}
