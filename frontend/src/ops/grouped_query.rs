//! [GroupQueryAttention](https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention)
//! 1 of com.microsoft: the attention of decoders exported for ONNX Runtime, with rotation, past and padding inside.
//!
//! Row `b` of a batch has `seqlens_k[b] + 1` tokens, the new ones included, so `valid = max(seqlens_k + 1 - s, 0)` entries
//! of its past hold tokens. New keys are appended after the whole past; the key at `j` then stands at position `j` if it
//! is of the past, and at `valid + j - past` if it is new. Rows of the past that hold no token are masked. Where all rows
//! are equally long this is exactly what the operator does; where they differ, the result is the same, but `present`
//! holds the new tokens after the longest row's, not after their own row's, and cannot be fed back with the operator's
//! lengths. Results at positions after a row's end are unspecified, as they are in ONNX Runtime.

use super::heads::{Scores, dims_of, head_count, positive};
use super::rotary::{rotate, table_rows, with_heads_axis};
use crate::lower::{Call, Lowered, Lowering, Value, invalid, unsupported};
use tpshard_ir::op::{NormKind, Real};
use tpshard_ir::{DType, Dim, Op, Scalar, ValueId};

struct Attributes {
    heads: usize,
    kv_heads: usize,
    scores: Scores,
    causal: bool,
    /// How many keys a query sees, itself included.
    window: Option<i64>,
    rotary: bool,
    interleaved: bool,
    norm_epsilon: f64,
}

/// `(query, key, value, past_key, past_value, seqlens_k, total_sequence_length, cos_cache, sin_cache, position_ids,
/// attention_bias, head_sink, k_scale, v_scale, q_norm_weight, k_norm_weight)` to `(output, present_key, present_value)`.
pub(crate) fn group_query_attention(lowering: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let attributes = read_attributes(call)?;
    refuse_inputs(call)?;
    let [q, k, v] = operands(lowering, call, &attributes)?;
    let q = head_norm(lowering, q, call.optional(14), attributes.norm_epsilon)?;
    let k = head_norm(lowering, k, call.optional(15), attributes.norm_epsilon)?;
    let [batch, _, sequence, _] = dims_of(&lowering.type_of(q), "the query")?;
    let new = lowering.type_of(k).shape[2].clone();
    lowering.unify(&new, &sequence)?;
    let lengths = lowering.per_batch(call.input(5)?, &batch, "seqlens_k")?;
    let valid = valid_past(lowering, lengths, &sequence)?;
    let (q, k) =
        if attributes.rotary { turn(lowering, call, q, k, valid, attributes.interleaved)? } else { (q, k) };
    let (past_key, past_value) = (call.optional(3), call.optional(4));
    if past_key.is_some() != past_value.is_some() {
        return Err(invalid("past_key and past_value are given together or not at all"));
    }
    let past = match past_key {
        Some(past) => dims_of::<4>(&lowering.ty(past), "past_key")?[2].clone(),
        None => Dim::constant(0),
    };
    let k = lowering.extend(past_key, k, 2)?;
    let v = lowering.extend(past_value, v, 2)?;
    lowering.fit_heads(q, k, v)?;
    agree_on_total(lowering, call, k)?;
    let past = lowering.current(&past);
    let allowed = allowed(lowering, q, past, lengths, valid, &attributes)?;
    let dtype = lowering.type_of(q).dtype;
    let masked = lowering.bias_of(allowed, dtype, f64::NEG_INFINITY)?;
    let added = match call.optional(10) {
        Some(added) => Some(lowering.data(added)?),
        None => None,
    };
    let bias = lowering.sum_of(Some(masked), added)?;
    let result = lowering.attend([q, k, v], bias, attributes.scores)?;
    let result = lowering.join_heads(result)?;
    Ok(vec![Value::Data(result), Value::Data(k), Value::Data(v)])
}

fn read_attributes(call: &Call<'_>) -> Lowered<Attributes> {
    let read = &call.attributes;
    for name in ["k_quant_type", "v_quant_type"] {
        if read.string(name, "NONE")? != "NONE" {
            return Err(unsupported(format!("{name}: a quantised cache")));
        }
    }
    read.ignore("kv_cache_bit_width");
    if read.int("smooth_softmax", 0)? > 0 {
        return Err(unsupported("smooth_softmax"));
    }
    if read.int("qk_output", 0)? != 0 {
        return Err(unsupported("qk_output"));
    }
    if read.int("sliding_window_cache", 0)? != 0 {
        return Err(unsupported("sliding_window_cache"));
    }
    let scale = f64::from(read.float("scale", 0.0)?);
    let scores = Scores {
        scale: (scale != 0.0).then_some(scale),
        softcap: positive(read.float("softcap", 0.0)?),
        // A row without tokens has no key to look at.
        empty_rows_zero: true,
    };
    let window = read.int("local_window_size", -1)?;
    Ok(Attributes {
        heads: head_count(read.required_int("num_heads")?, "num_heads")?,
        kv_heads: head_count(read.required_int("kv_num_heads")?, "kv_num_heads")?,
        scores,
        causal: read.bool("causal", true)?,
        window: (window > 0).then_some(window),
        rotary: read.bool("do_rotary", false)?,
        interleaved: read.bool("rotary_interleaved", false)?,
        norm_epsilon: f64::from(read.float("qk_norm_epsilon", 1e-6)?),
    })
}

fn refuse_inputs(call: &Call<'_>) -> Lowered<()> {
    for (index, what) in [(11, "head_sink"), (12, "k_scale"), (13, "v_scale")] {
        if call.optional(index).is_some() {
            return Err(unsupported(format!("the input {what}")));
        }
    }
    Ok(())
}

/// Queries, keys and values as `[b, h, s, d]`, cut out of one tensor if key and value are absent.
fn operands(lowering: &mut Lowering<'_>, call: &Call<'_>, attributes: &Attributes) -> Lowered<[ValueId; 3]> {
    let query = call.input(0)?;
    let (heads, kv_heads) = (attributes.heads, attributes.kv_heads);
    let parts = match (call.optional(1), call.optional(2)) {
        (Some(key), Some(value)) => vec![query.clone(), key.clone(), value.clone()],
        (None, None) => {
            let [_, _, width] = dims_of(&lowering.ty(query), "the packed query")?;
            let size = width.exact_div(&Dim::from(heads + 2 * kv_heads));
            let size = size.ok_or_else(|| {
                invalid(format!("{width} entries for {heads} query heads and twice {kv_heads} key heads"))
            })?;
            let widths = [heads, kv_heads, kv_heads].map(|count| Dim::from(count) * size.clone());
            lowering.split_value(query, 2, &widths)?
        }
        _ => return Err(invalid("key and value are given together or not at all")),
    };
    let mut split = Vec::with_capacity(3);
    for (part, count) in parts.iter().zip([heads, kv_heads, kv_heads]) {
        split.push(lowering.split_heads(part, count, "query, key or value")?);
    }
    <[ValueId; 3]>::try_from(split).map_err(|_| invalid("not a query, a key and a value"))
}

/// The RMS norm over each head that fused exports put inside.
fn head_norm(
    lowering: &mut Lowering<'_>,
    x: ValueId,
    weight: Option<&Value>,
    epsilon: f64,
) -> Lowered<ValueId> {
    let Some(weight) = weight else { return Ok(x) };
    let weight = lowering.data(weight)?;
    let ty = lowering.type_of(x);
    lowering.unify_shape(weight, &ty.shape[3..], "the norm's weight")?;
    let weight = lowering.cast(weight, ty.dtype)?;
    lowering.add(Op::Norm { kind: NormKind::Rms, axis: 3, epsilon: Real(epsilon) }, &[x, weight])
}

/// `max(seqlens_k + 1 - s, 0)`: rows of the past that hold a token, `[b, 1, 1, 1]`.
fn valid_past(lowering: &mut Lowering<'_>, lengths: ValueId, sequence: &Dim) -> Lowered<ValueId> {
    let before = lowering.size(&(Dim::constant(1) - sequence.clone()))?;
    let valid = lowering.map(Scalar::Add, &[lengths, before])?;
    lowering.map_number(Scalar::Max, valid, 0.0)
}

/// Rotates queries and keys by their positions.
fn turn(
    lowering: &mut Lowering<'_>,
    call: &Call<'_>,
    q: ValueId,
    k: ValueId,
    valid: ValueId,
    interleaved: bool,
) -> Lowered<(ValueId, ValueId)> {
    let [batch, _, sequence, _] = dims_of(&lowering.type_of(q), "the query")?;
    let positions = match call.optional(9) {
        Some(positions) => lowering.data(positions)?,
        None => {
            let steps = lowering.indices(Dim::constant(0), sequence.clone(), 1)?;
            let positions = lowering.map(Scalar::Add, &[valid, steps])?;
            lowering.reshape(positions, &[batch, sequence])?
        }
    };
    let cos = table_rows(lowering, call.input(7)?, positions)?;
    let sin = table_rows(lowering, call.input(8)?, positions)?;
    let cos = with_heads_axis(lowering, cos, 1)?;
    let sin = with_heads_axis(lowering, sin, 1)?;
    Ok((rotate(lowering, q, cos, sin, interleaved)?, rotate(lowering, k, cos, sin, interleaved)?))
}

/// `total_sequence_length` is the number of keys, where it is known while importing.
fn agree_on_total(lowering: &mut Lowering<'_>, call: &Call<'_>, k: ValueId) -> Lowered<()> {
    let Some(total) = call.optional(6).and_then(|total| lowering.known(total)) else { return Ok(()) };
    let total = total.single().and_then(|element| element.dim().cloned());
    let total = total.ok_or_else(|| invalid("total_sequence_length is not one integer"))?;
    let found = lowering.type_of(k).shape[2].clone();
    let total = lowering.current(&total);
    lowering.unify(&found, &total)
}

/// Which keys a query may look at, `[b, 1, s, t]`.
fn allowed(
    lowering: &mut Lowering<'_>,
    q: ValueId,
    past: Dim,
    lengths: ValueId,
    valid: ValueId,
    attributes: &Attributes,
) -> Lowered<ValueId> {
    let sequence = lowering.type_of(q).shape[2].clone();
    let total = &past + &sequence;
    // Counted from the first new token: keys of the past are negative.
    let keys = lowering.indices(-&past, total.clone(), 3)?;
    let queries = lowering.indices(Dim::constant(0), sequence, 2)?;
    let zero = lowering.scalar(DType::I64, 0.0)?;
    let mut position = lowering.map(Scalar::Add, &[keys, valid])?;
    let mut allowed = if attributes.causal {
        lowering.map(Scalar::LessEqual, &[keys, queries])?
    } else {
        lowering.map(Scalar::LessEqual, &[position, lengths])?
    };
    if !past.is_zero() {
        let is_new = lowering.map(Scalar::LessEqual, &[zero, keys])?;
        let index = lowering.indices(Dim::constant(0), total, 3)?;
        let holds_token = lowering.map(Scalar::Less, &[index, valid])?;
        let exists = lowering.map(Scalar::Or, &[is_new, holds_token])?;
        allowed = lowering.map(Scalar::And, &[allowed, exists])?;
        position = lowering.map(Scalar::Select, &[is_new, position, index])?;
    }
    if let Some(window) = attributes.window {
        let query = lowering.map(Scalar::Add, &[queries, valid])?;
        let oldest = lowering.map_number(Scalar::Sub, query, window as f64)?;
        let inside = lowering.map(Scalar::Less, &[oldest, position])?;
        allowed = lowering.map(Scalar::And, &[allowed, inside])?;
    }
    Ok(allowed)
}
