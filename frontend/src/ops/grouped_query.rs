//! GroupQueryAttention of ONNX Runtime,
//! <https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention>.
//!
//! Keys and values are appended to the past, queries sit at the end of it. All rows of a batch have the same number of
//! past entries here (the extent of the past); `seqlens_k` masks right padding.

use super::attention::{Scores, attend, bias_of, positions, sum_biases, with_past};
use super::rotary::{join_heads, rotate, split_heads};
use crate::lower::{Call, Lowered, Lowering, Value, invalid, unsupported};
use tpshard_ir::{DType, Dim, Op, Scalar, ValueId};

pub(super) fn grouped_query(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let attributes = &call.attributes;
    let heads = Dim::constant(attributes.required_int("num_heads")?);
    let kv_heads = Dim::constant(attributes.required_int("kv_num_heads")?);
    let scale = attributes.optional_float("scale")?.filter(|&scale| scale != 0.0).map(f64::from);
    let softcap = f64::from(attributes.float("softcap", 0.0)?);
    let window = attributes.int("local_window_size", -1)?;
    let do_rotary = attributes.bool("do_rotary", false)?;
    let interleaved = attributes.bool("rotary_interleaved", false)?;
    if attributes.int("smooth_softmax", 0)? > 0 || call.optional(11).is_some() {
        return Err(unsupported("smooth softmax or attention sinks"));
    }
    for name in ["k_quant_type", "v_quant_type", "kv_cache_bit_width"] {
        if let Some(value) = attributes.get(name)
            && !matches!(value, crate::model::AttributeValue::Int(0))
            && !matches!(value, crate::model::AttributeValue::String(text) if text.as_ref() == b"NONE")
        {
            return Err(unsupported("a quantised KV cache"));
        }
    }
    if call.optional(12).is_some() || call.optional(13).is_some() || call.wants(3) {
        return Err(unsupported("this form of GroupQueryAttention"));
    }
    attributes.ignore("qk_output");
    let [q, k, v] = operands(l, call, &heads, &kv_heads)?;
    let past = match call.optional(3) {
        Some(past) => l.shape(past).get(2).cloned().ok_or_else(|| invalid("a past of low rank"))?,
        None => Dim::constant(0),
    };
    let (q, k) = if do_rotary { rotated(l, call, q, k, &past, interleaved)? } else { (q, k) };
    let k = with_past(l, call.optional(3), k)?;
    let v = with_past(l, call.optional(4), v)?;
    let bias = mask(l, call, q, k, &l.current(&past), window)?;
    let result = attend(l, q, k, v, bias, &Scores { scale, softcap, empty_rows_zero: false })?;
    Ok(vec![Value::Data(join_heads(l, result)?), Value::Data(k), Value::Data(v)])
}

/// Query, key and value as `[b, h, s, d]`; packed in one operand if key and value are absent.
fn operands(l: &mut Lowering<'_>, call: &Call<'_>, heads: &Dim, kv_heads: &Dim) -> Lowered<[ValueId; 3]> {
    let q = l.data(call.input(0)?)?;
    if let (Some(k), Some(v)) = (call.optional(1), call.optional(2)) {
        let (k, v) = (l.data(k)?, l.data(v)?);
        return Ok([split_heads(l, q, heads)?, split_heads(l, k, kv_heads)?, split_heads(l, v, kv_heads)?]);
    }
    let ty = l.graph.ty(q).clone();
    let [_, _, hidden] = ty.shape.as_slice() else { return Err(invalid(format!("packed operands {ty}"))) };
    let total = heads + &(kv_heads * &Dim::constant(2));
    if total.as_const().is_none_or(|total| total < 1) {
        return Err(invalid("the numbers of heads"));
    }
    let each = hidden
        .exact_div(&total)
        .ok_or_else(|| invalid(format!("{hidden} does not divide into {total} heads")))?;
    let mut start = Dim::constant(0);
    let mut parts = Vec::with_capacity(3);
    for count in [heads, kv_heads, kv_heads] {
        let width = count * &each;
        let part = l.slice(q, 2, start.clone(), width.clone(), 1)?;
        start = start + width;
        parts.push(split_heads(l, part, count)?);
    }
    <[ValueId; 3]>::try_from(parts).map_err(|_| invalid("packed operands"))
}

/// Rotates queries and keys by the caches, at the given positions or those after the past.
fn rotated(
    l: &mut Lowering<'_>,
    call: &Call<'_>,
    q: ValueId,
    k: ValueId,
    past: &Dim,
    interleaved: bool,
) -> Lowered<(ValueId, ValueId)> {
    let (Some(cos), Some(sin)) = (call.optional(7).cloned(), call.optional(8).cloned()) else {
        return Err(invalid("rotation without cos and sin caches"));
    };
    let sequence = l.graph.ty(q).shape[2].clone();
    let (cos, sin) = match call.optional(9).cloned() {
        Some(positions) => {
            (super::rotary::rows(l, &cos, &positions)?, super::rotary::rows(l, &sin, &positions)?)
        }
        None => (consecutive(l, &cos, past, &sequence)?, consecutive(l, &sin, past, &sequence)?),
    };
    let cast = |l: &mut Lowering<'_>, x: ValueId| l.cast(x, l.graph.ty(q).dtype);
    let (cos, sin) = (cast(l, cos)?, cast(l, sin)?);
    Ok((rotate(l, q, cos, sin, interleaved)?, rotate(l, k, cos, sin, interleaved)?))
}

/// Rows `past..past + sequence` of a cache as `[1, 1, s, width]`.
fn consecutive(l: &mut Lowering<'_>, cache: &Value, past: &Dim, sequence: &Dim) -> Lowered<ValueId> {
    let shape = l.shape(cache);
    let [rows, width] = shape.as_slice() else { return Err(invalid(format!("a cache of shape {shape:?}"))) };
    l.assume_at_most(&(past + sequence), rows)?;
    let picked = l.slice_value(cache, 0, past, sequence, 1)?;
    let one = || Dim::constant(1);
    let picked = l.reshape_value(&picked, &[one(), one(), sequence.clone(), width.clone()])?;
    l.data(&picked)
}

/// Causal, windowed and padding masks, and the bias that is given.
fn mask(
    l: &mut Lowering<'_>,
    call: &Call<'_>,
    q: ValueId,
    k: ValueId,
    past: &Dim,
    window: i64,
) -> Lowered<Option<ValueId>> {
    let (query, keys) = (l.graph.ty(q).clone(), l.graph.ty(k).clone());
    let (at, key) = positions(l, &query.shape[2], &keys.shape[2], past)?;
    let mut allowed = l.map(Scalar::LessEqual, &[key, at])?;
    if window > 0 {
        let distance = l.map(Scalar::Sub, &[at, key])?;
        let near = l.map_number(Scalar::Less, distance, window as f64)?;
        allowed = l.map(Scalar::And, &[allowed, near])?;
    }
    if let Some(lengths) = call.optional(5) {
        let lengths = l.data(lengths)?;
        let extent = l.graph.ty(lengths).elements();
        let one = || Dim::constant(1);
        let lengths = l.reshape(lengths, &[extent, one(), one(), one()])?;
        let lengths = l.cast(lengths, DType::I64)?;
        // `seqlens_k` is the number of keys minus one.
        let filled = l.add(Op::Map(Scalar::LessEqual), &[key, lengths])?;
        allowed = l.map(Scalar::And, &[allowed, filled])?;
    }
    let mut biases = vec![bias_of(l, allowed, query.dtype)?];
    if let Some(bias) = call.optional(10) {
        biases.push(l.data(bias)?);
    }
    sum_biases(l, &biases)
}
