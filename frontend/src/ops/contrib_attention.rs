//! The attention operators of ONNX Runtime, version 1 of
//! [com.microsoft](https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md): MultiHeadAttention,
//! Attention and QAttention. GroupQueryAttention is in `grouped_query`.
//!
//! Both add biases to the projections, take masks in several integer forms, and may append to a past. A masked key gets
//! `mask_filter_value` (-10000) on its scores, not minus infinity, so a row that is masked as a whole stays finite.

use super::heads::{Scores, dims_of, head_count};
use super::quantized::centred;
use super::quantized_contrib::{scalar_of, scaled_product};
use crate::lower::{Call, Lowered, Lowering, Value, invalid, unsupported};
use tpshard_ir::op::EinsumSpec;
use tpshard_ir::{DType, Dim, Op, Scalar, ValueId};

struct Attributes {
    heads: usize,
    scale: Option<f64>,
    filter: f64,
    causal: bool,
}

fn read_attributes(call: &Call<'_>) -> Lowered<Attributes> {
    let read = &call.attributes;
    let heads = head_count(read.required_int("num_heads")?, "num_heads")?;
    let scale = f64::from(read.float("scale", 0.0)?);
    Ok(Attributes {
        heads,
        scale: (scale != 0.0).then_some(scale),
        filter: f64::from(read.float("mask_filter_value", -10_000.0)?),
        causal: read.bool("unidirectional", false)?,
    })
}

/// MultiHeadAttention: `(query, key, value, bias, key_padding_mask, attention_bias, past_key, past_value)`.
pub(crate) fn multi_head_attention(lowering: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let attributes = read_attributes(call)?;
    for (index, what) in [(8, "past_sequence_length"), (9, "cache_indirection")] {
        if call.optional(index).is_some() {
            return Err(unsupported(format!("{what}, the form with shared buffers")));
        }
    }
    let (past_key, past_value) = (call.optional(6), call.optional(7));
    if past_key.is_some() != past_value.is_some() {
        return Err(invalid("past_key and past_value are given together or not at all"));
    }
    let [q, k, v] = multi_head_operands(lowering, call, attributes.heads)?;
    let past = past_length(lowering, past_key, 2)?;
    let k = lowering.extend(past_key, k, 2)?;
    let v = lowering.extend(past_value, v, 2)?;
    let result =
        masked_attention(lowering, [q, k, v], past, call.optional(4), call.optional(5), &attributes)?;
    Ok(vec![Value::Data(result), Value::Data(k), Value::Data(v)])
}

/// Queries, keys and values as `[b, h, s, d]`, with the bias added.
fn multi_head_operands(lowering: &mut Lowering<'_>, call: &Call<'_>, heads: usize) -> Lowered<[ValueId; 3]> {
    let query = call.input(0)?;
    let bias = call.optional(3);
    let packed = match (lowering.shape(query).len(), call.optional(1), call.optional(2)) {
        (5, None, None) => unpack(lowering, query, 3, heads)?,
        (3, Some(key), None) if lowering.shape(key).len() == 5 => {
            let mut pieces = vec![query.clone()];
            pieces.extend(unpack(lowering, key, 2, heads)?);
            pieces
        }
        (3, Some(key), Some(value)) => vec![query.clone(), key.clone(), value.clone()],
        _ => return Err(invalid("query, key and value are in none of the forms the operator has")),
    };
    let mut parts = Vec::with_capacity(3);
    let mut start = Dim::constant(0);
    for (value, what) in packed.iter().zip(["query", "key", "value"]) {
        let ty = lowering.ty(value);
        let mut value = value.clone();
        // Keys of rank 4 are a past of another layer, which carries its bias already.
        if let (Some(bias), 3) = (bias, ty.rank()) {
            let part = lowering.slice_value(bias, 0, &start, &ty.shape[2], 1)?;
            start = &start + &ty.shape[2];
            value = add_bias(lowering, &value, &part)?;
        }
        parts.push(lowering.split_heads(&value, heads, what)?);
    }
    <[ValueId; 3]>::try_from(parts).map_err(|_| invalid("not a query, a key and a value"))
}

fn add_bias(lowering: &mut Lowering<'_>, value: &Value, bias: &Value) -> Lowered<Value> {
    let (value, bias) = (lowering.data(value)?, lowering.data(bias)?);
    Ok(Value::Data(lowering.map(Scalar::Add, &[value, bias])?))
}

/// `[b, s, h, n, d]` as `n` tensors `[b, s, h·d]`.
fn unpack(lowering: &mut Lowering<'_>, value: &Value, count: usize, heads: usize) -> Lowered<Vec<Value>> {
    let [batch, sequence, found, parts, size] = dims_of(&lowering.ty(value), "the packed input")?;
    lowering.unify(&found, &Dim::from(heads))?;
    lowering.unify(&parts, &Dim::from(count))?;
    let mut pieces = Vec::with_capacity(count);
    for part in 0..count {
        let piece = lowering.pick(value, 3, &Dim::from(part))?;
        let hidden = Dim::from(heads) * size.clone();
        pieces.push(lowering.reshape_value(&piece, &[batch.clone(), sequence.clone(), hidden])?);
    }
    Ok(pieces)
}

fn past_length(lowering: &mut Lowering<'_>, past: Option<&Value>, axis: usize) -> Lowered<Dim> {
    let Some(past) = past else { return Ok(Dim::constant(0)) };
    let ty = lowering.ty(past);
    ty.shape.get(axis).cloned().ok_or_else(|| invalid(format!("the past is {ty}")))
}

/// Attention with masks, and its heads joined.
fn masked_attention(
    lowering: &mut Lowering<'_>,
    [q, k, v]: [ValueId; 3],
    past: Dim,
    mask: Option<&Value>,
    added: Option<&Value>,
    attributes: &Attributes,
) -> Lowered<ValueId> {
    lowering.fit_heads(q, k, v)?;
    let dtype = lowering.type_of(q).dtype;
    let mut bias = None;
    if let Some(mask) = mask {
        let allowed = mask_condition(lowering, mask, q, k, &past)?;
        bias = Some(lowering.bias_of(allowed, dtype, attributes.filter)?);
    }
    let past = lowering.current(&past);
    let sequence = lowering.type_of(q).shape[2].clone();
    let total = lowering.type_of(k).shape[2].clone();
    if attributes.causal && !(sequence.is_one() && &past + &sequence == total) {
        let queries = lowering.indices(past, sequence, 2)?;
        let keys = lowering.indices(Dim::constant(0), total, 3)?;
        let allowed = lowering.map(Scalar::LessEqual, &[keys, queries])?;
        let causal = lowering.bias_of(allowed, dtype, f64::NEG_INFINITY)?;
        bias = lowering.sum_of(bias, Some(causal))?;
    }
    let added = match added {
        Some(added) => Some(lowering.data(added)?),
        None => None,
    };
    let bias = lowering.sum_of(bias, added)?;
    let scores = Scores { scale: attributes.scale, softcap: None, empty_rows_zero: false };
    let result = lowering.attend([q, k, v], bias, scores)?;
    lowering.join_heads(result)
}

/// Which keys a query may look at, from an integer mask: `[b]` lengths, `[2b]` ends and starts, `[b, t]` or `[b, s, t]`
/// with 0 for masked keys, or `[b, 1, m, m]` for all positions there may be, of which those in use are cut.
fn mask_condition(
    lowering: &mut Lowering<'_>,
    mask: &Value,
    q: ValueId,
    k: ValueId,
    past: &Dim,
) -> Lowered<ValueId> {
    let ty = lowering.ty(mask);
    let [batch, _, sequence, _] = dims_of(&lowering.type_of(q), "the query")?;
    let total = lowering.type_of(k).shape[2].clone();
    let one = Dim::constant(1);
    let shape = match ty.shape.as_slice() {
        [entries] => return lengths_condition(lowering, mask, entries, &batch, &total),
        [_, _] => [batch, one.clone(), one, total],
        [_, _, _] => [batch, one, sequence, total],
        [_, one, rows, columns] if one.is_one() => {
            lowering.assume_at_most(&total, rows)?;
            lowering.assume_at_most(&total, columns)?;
            let mask = lowering.data(mask)?;
            let past = lowering.current(past);
            let mask = lowering.slice(mask, 2, past, sequence.clone(), 1)?;
            let mask = lowering.slice(mask, 3, Dim::constant(0), total.clone(), 1)?;
            lowering.unify_broadcast(mask, &[batch, one.clone(), sequence, total], "the mask")?;
            return lowering.cast(mask, DType::Bool);
        }
        _ => {
            let message = format!("a mask of type {ty}; lengths, [b, t], [b, s, t] or [b, 1, m, m] are");
            return Err(unsupported(message));
        }
    };
    let mask = lowering.data(mask)?;
    let mut aligned = ty.shape.clone();
    while aligned.len() < 4 {
        aligned.insert(1, Dim::constant(1));
    }
    let mask = lowering.reshape(mask, &aligned)?;
    lowering.unify_broadcast(mask, &shape, "the mask")?;
    lowering.cast(mask, DType::Bool)
}

fn lengths_condition(
    lowering: &mut Lowering<'_>,
    mask: &Value,
    entries: &Dim,
    batch: &Dim,
    total: &Dim,
) -> Lowered<ValueId> {
    let keys = lowering.indices(Dim::constant(0), total.clone(), 3)?;
    if *entries == batch * &Dim::constant(2) {
        let pieces = lowering.split_value(mask, 0, &[batch.clone(), batch.clone()])?;
        let [ends, starts] = pieces.as_slice() else { return Err(invalid("a mask of two halves")) };
        let ends = lowering.per_batch(ends, batch, "the mask")?;
        let starts = lowering.per_batch(starts, batch, "the mask")?;
        let before = lowering.map(Scalar::Less, &[keys, ends])?;
        let after = lowering.map(Scalar::LessEqual, &[starts, keys])?;
        return lowering.map(Scalar::And, &[before, after]);
    }
    if *entries == batch * &Dim::constant(3) + Dim::constant(2) {
        return Err(unsupported("a mask of 3 b + 2 entries"));
    }
    let ends = lowering.per_batch(mask, batch, "the mask")?;
    lowering.map(Scalar::Less, &[keys, ends])
}

/// Attention: `(input, weights, bias, mask_index, past, attention_bias, past_sequence_length)`; weights and bias of
/// queries, keys and values lie side by side and are cut without being read.
pub(crate) fn packed_attention(lowering: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let attributes = read_attributes(call)?;
    let read = &call.attributes;
    let sizes = read.optional_ints("qkv_hidden_sizes")?;
    read.ignore("rotary_embedding_dim");
    if read.bool("do_rotary", false)? {
        return Err(unsupported("do_rotary without tables of angles"));
    }
    if read.bool("past_present_share_buffer", false)? || call.optional(6).is_some() {
        return Err(unsupported("past_present_share_buffer"));
    }
    let parts = project(lowering, call, sizes)?;
    attend_projected(lowering, call, parts, [3, 4, 5].map(|at| call.optional(at)), &attributes)
}

/// QAttention: `(input, weight, bias, input_scale, weight_scale, mask_index, input_zero_point, weight_zero_point, past)`,
/// an Attention on quantised input and weights.
pub(crate) fn quantized_attention(lowering: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let attributes = read_attributes(call)?;
    let read = &call.attributes;
    if read.bool("do_rotary", false)? || read.bool("past_present_share_buffer", false)? {
        return Err(unsupported("do_rotary or past_present_share_buffer"));
    }
    let x = centred(lowering, call.input(0)?, call.optional(6), true)?;
    let x_scale = scalar_of(lowering, call.input(3)?)?;
    let weights = call.input(1)?.clone();
    let [_, columns] = dims_of(&lowering.ty(&weights), "the weights")?;
    let third = columns.exact_div(&Dim::constant(3));
    let third = third.ok_or_else(|| invalid(format!("{columns} columns are not three times as many")))?;
    let sizes = vec![third; 3];
    let weights = lowering.split_value(&weights, 1, &sizes)?;
    let biases = lowering.split_value(call.input(2)?, 0, &sizes)?;
    // One for all columns, or one per column.
    let by_part = |lowering: &mut Lowering<'_>, value: &Value| match lowering.shape(value).as_slice() {
        [entries] if !entries.is_one() => lowering.split_value(value, 0, &sizes),
        _ => Ok(vec![value.clone(); 3]),
    };
    let scales = by_part(lowering, call.input(4)?)?;
    let zeros = match call.optional(7) {
        Some(zero) => by_part(lowering, zero)?.into_iter().map(Some).collect(),
        None => vec![None; 3],
    };
    let mut parts = Vec::with_capacity(3);
    for (((weight, bias), scale), zero) in weights.iter().zip(&biases).zip(&scales).zip(&zeros) {
        let weight = centred(lowering, weight, zero.as_ref(), false)?;
        let scale = scalar_of(lowering, scale)?;
        for value in scaled_product(lowering, [x, weight], [x_scale, scale], Some(bias))? {
            parts.push(lowering.data(&value)?);
        }
    }
    attend_projected(lowering, call, parts, [call.optional(5), call.optional(8), None], &attributes)
}

/// Attention of three projections `[b, s, …]`, and the state if it is asked for.
fn attend_projected(
    lowering: &mut Lowering<'_>,
    call: &Call<'_>,
    parts: Vec<ValueId>,
    [mask, past, added]: [Option<&Value>; 3],
    attributes: &Attributes,
) -> Lowered<Vec<Value>> {
    let mut split = Vec::with_capacity(3);
    for (part, what) in parts.into_iter().zip(["query", "key", "value"]) {
        split.push(lowering.split_heads(&Value::Data(part), attributes.heads, what)?);
    }
    let [q, k, v] = <[ValueId; 3]>::try_from(split).map_err(|_| invalid("not a query, a key and a value"))?;
    let (k, v, length, present) = pair_state(lowering, past, call.wants(1), k, v)?;
    let result = masked_attention(lowering, [q, k, v], length, mask, added, attributes)?;
    let mut outputs = vec![Value::Data(result)];
    outputs.extend(present.map(Value::Data));
    Ok(outputs)
}

/// The three projections `x W + b`, `[b, s, …]`.
fn project(lowering: &mut Lowering<'_>, call: &Call<'_>, sizes: Option<&[i64]>) -> Lowered<Vec<ValueId>> {
    let x = lowering.data(call.input(0)?)?;
    let [_, _, entries] = dims_of(&lowering.type_of(x), "the input")?;
    let weights = call.input(1)?.clone();
    let [rows, columns] = dims_of(&lowering.ty(&weights), "the weights")?;
    lowering.unify(&entries, &rows)?;
    let sizes: Vec<Dim> = match sizes {
        Some(&[q, k, v]) if q > 0 && k > 0 && v > 0 => [q, k, v].map(Dim::constant).to_vec(),
        Some(other) => return Err(invalid(format!("qkv_hidden_sizes is {other:?}"))),
        None => {
            let third = columns.exact_div(&Dim::constant(3));
            vec![third.ok_or_else(|| invalid(format!("{columns} columns are not three times as many")))?; 3]
        }
    };
    let sum = sizes.iter().fold(Dim::constant(0), |sum, size| sum + size.clone());
    lowering.unify(&sum, &columns)?;
    let cut = lowering.split_value(&weights, 1, &sizes)?;
    let biases = match call.optional(2) {
        Some(bias) => {
            dims_of::<1>(&lowering.ty(bias), "the bias")?;
            lowering.split_value(bias, 0, &sizes)?
        }
        None => Vec::new(),
    };
    let mut projected = Vec::with_capacity(3);
    for (at, weight) in cut.iter().enumerate() {
        let weight = lowering.data(weight)?;
        let spec = EinsumSpec::parse("bsk,kn->bsn").ok_or_else(|| unsupported("the projection"))?;
        let mut product = lowering.add(Op::Einsum(spec), &[x, weight])?;
        if let Some(bias) = biases.get(at) {
            let bias = lowering.data(bias)?;
            product = lowering.map(Scalar::Add, &[product, bias])?;
        }
        projected.push(product);
    }
    Ok(projected)
}

/// Keys and values of all positions, the length of the past, and the state `[2, b, h, t, d]` if it is asked for.
fn pair_state(
    lowering: &mut Lowering<'_>,
    past: Option<&Value>,
    wanted: bool,
    k: ValueId,
    v: ValueId,
) -> Lowered<(ValueId, ValueId, Dim, Option<ValueId>)> {
    if past.is_none() && !wanted {
        return Ok((k, v, Dim::constant(0), None));
    }
    let length = past_length(lowering, past, 3)?;
    let mut halves = Vec::with_capacity(2);
    for half in [k, v] {
        let mut shape = lowering.type_of(half).shape;
        shape.insert(0, Dim::constant(1));
        halves.push(lowering.reshape(half, &shape)?);
    }
    let new = lowering.add(Op::Concat { axis: 0 }, &halves)?;
    let all = lowering.extend(past, new, 3)?;
    let mut cut = Vec::with_capacity(2);
    for at in 0..2usize {
        let half = lowering.slice(all, 0, Dim::from(at), Dim::constant(1), 1)?;
        let shape = lowering.type_of(half).shape.split_off(1);
        cut.push(lowering.reshape(half, &shape)?);
    }
    Ok((cut[0], cut[1], lowering.current(&length), Some(all)))
}
