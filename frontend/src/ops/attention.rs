//! Attention of ONNX (23, 24; the softcap comes before the mask, rows without any key give zeros),
//! <https://onnx.ai/onnx/operators/onnx__Attention.html>, and ONNX Runtime's MultiHeadAttention and Attention,
//! <https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md>.

use super::rotary::{join_heads, split_heads};
use crate::lower::{Call, Lowered, Lowering, Value, invalid, unsupported};
use tpshard_ir::op::Real;
use tpshard_ir::{DType, Dim, Op, Scalar, ValueId};

/// What scores are made of.
pub(super) struct Scores {
    /// `1 / sqrt(d)` if absent.
    pub(super) scale: Option<f64>,
    pub(super) softcap: f64,
    pub(super) empty_rows_zero: bool,
}

/// `softmax(q kᵀ + bias) v` of `[b, h, s, d]` operands with fewer KV heads than query heads or as many.
pub(super) fn attend(
    l: &mut Lowering<'_>,
    q: ValueId,
    k: ValueId,
    v: ValueId,
    bias: Option<ValueId>,
    scores: &Scores,
) -> Lowered<ValueId> {
    for (a, b) in [((k, 2), (v, 2)), ((q, 0), (k, 0)), ((q, 0), (v, 0)), ((q, 3), (k, 3)), ((k, 1), (v, 1))] {
        let dim = |l: &Lowering<'_>, (id, axis): (ValueId, usize)| l.graph.ty(id).shape.get(axis).cloned();
        let (Some(a), Some(b)) = (dim(l, a), dim(l, b)) else {
            return Err(invalid("an operand is not of rank 4"));
        };
        l.unify(&a, &b)?;
    }
    let (query, key) = (l.graph.ty(q).clone(), l.graph.ty(k).clone());
    let heads = query.shape[1].as_size().ok_or_else(|| unsupported("a dynamic number of heads"))?;
    let groups = key.shape[1].as_size().ok_or_else(|| unsupported("a dynamic number of KV heads"))?;
    if groups == 0 || heads % groups != 0 || heads > 1 << 20 {
        return Err(invalid(format!("{heads} query heads over {groups} KV heads")));
    }
    let each = heads / groups;
    let scale = match scores.scale {
        Some(scale) => scale,
        None => {
            let width = query.shape[3].as_const().filter(|&width| width > 0);
            1.0 / (width.ok_or_else(|| unsupported("a dynamic head size"))? as f64).sqrt()
        }
    };
    let mut args = vec![q, k, v];
    if let Some(bias) = bias {
        let shape = [&query.shape[0], &query.shape[1], &query.shape[2], &key.shape[2]].map(Dim::clone);
        let own = l.graph.ty(bias).shape.clone();
        let joined = l.broadcast_shapes(&[shape.to_vec(), own])?;
        if joined != l.current_all(&shape) {
            return Err(invalid(format!("a mask of {} for scores {shape:?}", l.graph.ty(bias))));
        }
        args.push(l.cast(bias, query.dtype)?);
    }
    let op = Op::Attention {
        scale: Real(scale),
        softcap: (scores.softcap > 0.0).then_some(Real(scores.softcap)),
        kv_of_head: (0..heads).map(|head| u32::try_from(head / each).unwrap_or(0)).collect(),
        empty_rows_zero: scores.empty_rows_zero,
    };
    l.add(op, &args)
}

/// A condition as a bias: 0 where it holds, -inf where it does not.
pub(super) fn bias_of(l: &mut Lowering<'_>, allowed: ValueId, dtype: DType) -> Lowered<ValueId> {
    let (zero, masked) = (l.scalar(dtype, 0.0)?, l.scalar(dtype, f64::NEG_INFINITY)?);
    l.map(Scalar::Select, &[allowed, zero, masked])
}

/// Key positions `[1, 1, 1, t]` and query positions `[1, 1, s, 1]`, those of the queries starting at `offset`.
pub(super) fn positions(l: &mut Lowering<'_>, s: &Dim, t: &Dim, offset: &Dim) -> Lowered<(ValueId, ValueId)> {
    let one = || Dim::constant(1);
    let query = l.add(Op::Iota { start: offset.clone(), length: s.clone() }, &[])?;
    let query = l.reshape(query, &[one(), one(), s.clone(), one()])?;
    let key = l.add(Op::Iota { start: Dim::constant(0), length: t.clone() }, &[])?;
    let key = l.reshape(key, &[one(), one(), one(), t.clone()])?;
    Ok((query, key))
}

pub(super) fn sum_biases(l: &mut Lowering<'_>, biases: &[ValueId]) -> Lowered<Option<ValueId>> {
    let mut sum = None;
    for &bias in biases {
        sum = Some(match sum {
            None => bias,
            Some(sum) => l.map(Scalar::Add, &[sum, bias])?,
        });
    }
    Ok(sum)
}

/// Past and new entries together; an append where the past is state.
pub(super) fn with_past(l: &mut Lowering<'_>, past: Option<&Value>, new: ValueId) -> Lowered<ValueId> {
    let Some(past) = past else { return Ok(new) };
    let past = l.data(past)?;
    if l.is_state(past) {
        return super::movement::append(l, past, &Value::Data(new), 2);
    }
    let joined = l.concat_values(&[Value::Data(past), Value::Data(new)], 2)?;
    l.data(&joined)
}

pub(super) fn attention(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let attributes = &call.attributes;
    let causal = attributes.bool("is_causal", false)?;
    let q_heads = attributes.optional_int("q_num_heads")?.map(Dim::constant);
    let kv_heads = attributes.optional_int("kv_num_heads")?.map(Dim::constant);
    let scale = attributes.optional_float("scale")?.map(f64::from);
    let softcap = f64::from(attributes.float("softcap", 0.0)?);
    attributes.ignore("softmax_precision");
    attributes.ignore("qk_matmul_output_mode");
    let windows = [attributes.int("left_window_size", -1)?, attributes.int("right_window_size", -1)?];
    if call.wants(3) {
        return Err(unsupported("the scores as an output (qk_matmul_output)"));
    }
    let q = l.data(call.input(0)?)?;
    let flat = l.graph.ty(q).rank() == 3;
    let mut heads = Vec::with_capacity(3);
    for (index, count) in [(0, &q_heads), (1, &kv_heads), (2, &kv_heads)] {
        let x = l.data(call.input(index)?)?;
        heads.push(match (l.graph.ty(x).rank(), count) {
            (3, Some(count)) => split_heads(l, x, count)?,
            (3, None) => return Err(invalid("3-D operands need the numbers of heads")),
            (4, _) => x,
            (rank, _) => return Err(invalid(format!("an operand of rank {rank}"))),
        });
    }
    let past = match call.optional(4) {
        Some(past) => l.shape(past).get(2).cloned().ok_or_else(|| invalid("a past of low rank"))?,
        None => Dim::constant(0),
    };
    let k = with_past(l, call.optional(4), heads[1])?;
    let v = with_past(l, call.optional(5), heads[2])?;
    let (s, t) = (l.graph.ty(heads[0]).shape[2].clone(), l.graph.ty(k).shape[2].clone());
    let dtype = l.graph.ty(heads[0]).dtype;
    let mut biases = Vec::new();
    if let Some(mask) = call.optional(3) {
        let mask = l.data(mask)?;
        biases.push(mask_bias(l, mask, &t, dtype)?);
    }
    let lengths = match call.optional(6) {
        None => None,
        Some(lengths) => {
            let lengths = l.data(lengths)?;
            let extent = l.graph.ty(lengths).elements();
            let one = || Dim::constant(1);
            Some(l.reshape(lengths, &[extent, one(), one(), one()])?)
        }
    };
    let (query, key) = positions(l, &s, &t, &l.current(&past))?;
    let query = match (lengths, call.optional(4)) {
        (Some(lengths), None) => {
            let size = l.size(&s)?;
            let offset = l.map(Scalar::Sub, &[lengths, size])?;
            l.map(Scalar::Add, &[query, offset])?
        }
        _ => query,
    };
    if causal {
        let allowed = l.map(Scalar::LessEqual, &[key, query])?;
        biases.push(bias_of(l, allowed, dtype)?);
    }
    for (window, sign) in windows.into_iter().zip([1, -1]) {
        if window >= 0 {
            let distance = if sign > 0 { [query, key] } else { [key, query] };
            let distance = l.map(Scalar::Sub, &distance)?;
            let allowed = l.map_number(Scalar::LessEqual, distance, window as f64)?;
            biases.push(bias_of(l, allowed, dtype)?);
        }
    }
    if let Some(lengths) = lengths {
        let allowed = l.map(Scalar::Less, &[key, lengths])?;
        biases.push(bias_of(l, allowed, dtype)?);
    }
    let bias = sum_biases(l, &biases)?;
    let result = attend(l, heads[0], k, v, bias, &Scores { scale, softcap, empty_rows_zero: true })?;
    let result = if flat { join_heads(l, result)? } else { result };
    Ok(vec![Value::Data(result), Value::Data(k), Value::Data(v)])
}

/// A bool or additive mask; keys beyond its end are masked out.
fn mask_bias(l: &mut Lowering<'_>, mask: ValueId, t: &Dim, dtype: DType) -> Lowered<ValueId> {
    let mut mask = mask;
    if l.graph.ty(mask).dtype == DType::Bool {
        mask = bias_of(l, mask, dtype)?;
    }
    let ty = l.graph.ty(mask).clone();
    let Some(last) = ty.rank().checked_sub(1) else { return Ok(mask) };
    let missing = t - &ty.shape[last];
    if ty.shape[last].is_one() || missing.as_const().is_none_or(|missing| missing <= 0) {
        return Ok(mask);
    }
    let low = vec![Dim::constant(0); ty.rank()];
    let mut high = low.clone();
    high[last] = missing;
    let mode = tpshard_ir::op::PadMode::Constant(Real(f64::NEG_INFINITY));
    l.add(Op::Pad { low, high, mode }, &[mask])
}

/// Operands `[b, s, hidden]`, an optional bias of all three, key padding as lengths or as a mask, and past state.
pub(super) fn multi_head(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let heads = Dim::constant(call.attributes.required_int("num_heads")?);
    let scale = call.attributes.optional_float("scale")?.filter(|&scale| scale != 0.0).map(f64::from);
    let filter = call.attributes.float("mask_filter_value", -10_000.0)?;
    let causal = call.attributes.bool("unidirectional", false)?;
    if call.optional(8).is_some() || call.optional(9).is_some() || call.wants(3) {
        return Err(unsupported("this form of MultiHeadAttention"));
    }
    let q = l.data(call.input(0)?)?;
    let parts = match (call.optional(1), call.optional(2)) {
        (Some(k), Some(v)) => [q, l.data(k)?, l.data(v)?],
        _ => return Err(unsupported("packed operands of a MultiHeadAttention")),
    };
    let mut offset = Dim::constant(0);
    let mut split = Vec::with_capacity(3);
    for part in parts {
        let ty = l.graph.ty(part).clone();
        if ty.rank() == 4 {
            split.push(part);
            continue;
        }
        let mut part = part;
        if let Some(bias) = call.optional(3) {
            let width = ty.shape.last().cloned().ok_or_else(|| invalid("an operand of rank 0"))?;
            let bias = l.slice_value(bias, 0, &offset, &width, 1)?;
            offset = &offset + &width;
            let bias = l.data(&bias)?;
            part = l.map(Scalar::Add, &[part, bias])?;
        }
        split.push(split_heads(l, part, &heads)?);
    }
    let past = call.optional(6).map(|past| l.shape(past)).and_then(|shape| shape.get(2).cloned());
    let k = with_past(l, call.optional(6), split[1])?;
    let v = with_past(l, call.optional(7), split[2])?;
    let mut biases = Vec::new();
    let (s, t) = (l.graph.ty(split[0]).shape[2].clone(), l.graph.ty(k).shape[2].clone());
    let dtype = l.graph.ty(split[0]).dtype;
    if let Some(mask) = call.optional(4) {
        let mask = l.data(mask)?;
        biases.push(padding_bias(l, mask, &t, filter, dtype)?);
    }
    if let Some(bias) = call.optional(5) {
        biases.push(l.data(bias)?);
    }
    if causal {
        let (query, key) = positions(l, &s, &t, &past.unwrap_or_else(|| Dim::constant(0)))?;
        let allowed = l.map(Scalar::LessEqual, &[key, query])?;
        biases.push(bias_of(l, allowed, dtype)?);
    }
    let bias = sum_biases(l, &biases)?;
    let result = attend(l, split[0], k, v, bias, &Scores { scale, softcap: 0.0, empty_rows_zero: false })?;
    Ok(vec![Value::Data(join_heads(l, result)?), Value::Data(k), Value::Data(v)])
}

/// Key padding: `[b]` lengths, `[b, t]` or `[b, s, t]` with 1 where a key counts.
fn padding_bias(l: &mut Lowering<'_>, mask: ValueId, t: &Dim, filter: f32, dtype: DType) -> Lowered<ValueId> {
    let ty = l.graph.ty(mask).clone();
    let one = || Dim::constant(1);
    let allowed = match ty.shape.as_slice() {
        [b] => {
            let lengths = l.reshape(mask, &[b.clone(), one(), one(), one()])?;
            let lengths = l.cast(lengths, DType::I64)?;
            let (_, key) = positions(l, &one(), t, &Dim::constant(0))?;
            l.map(Scalar::Less, &[key, lengths])?
        }
        [b, keys] => {
            let mask = l.cast(mask, DType::Bool)?;
            l.reshape(mask, &[b.clone(), one(), one(), keys.clone()])?
        }
        [b, queries, keys] => {
            let mask = l.cast(mask, DType::Bool)?;
            l.reshape(mask, &[b.clone(), one(), queries.clone(), keys.clone()])?
        }
        _ => return Err(unsupported(format!("a mask of {ty}"))),
    };
    let (zero, masked) = (l.scalar(dtype, 0.0)?, l.scalar(dtype, f64::from(filter))?);
    l.map(Scalar::Select, &[allowed, zero, masked])
}

/// com.microsoft Attention: one weight makes query, key and value of `[b, s, hidden]`.
pub(super) fn packed(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let heads = Dim::constant(call.attributes.required_int("num_heads")?);
    let scale = call.attributes.optional_float("scale")?.filter(|&scale| scale != 0.0).map(f64::from);
    let filter = call.attributes.float("mask_filter_value", -10_000.0)?;
    let causal = call.attributes.bool("unidirectional", false)?;
    let sizes = call.attributes.optional_ints("qkv_hidden_sizes")?.filter(|sizes| !sizes.is_empty());
    call.attributes.ignore("past_present_share_buffer");
    if call.attributes.bool("do_rotary", false)? || call.optional(6).is_some() || call.optional(7).is_some() {
        return Err(unsupported("this form of Attention"));
    }
    if call.optional(4).is_some() || call.wants(1) {
        return Err(unsupported("Attention with past state in one tensor"));
    }
    let (x, weight) = (l.data(call.input(0)?)?, call.input(1)?.clone());
    let total = l.shape(&weight).get(1).cloned().ok_or_else(|| invalid("a weight of low rank"))?;
    let widths: Vec<Dim> = match sizes {
        Some(sizes) => sizes.iter().map(|&size| Dim::constant(size)).collect(),
        None => {
            let each = total
                .exact_div(&Dim::constant(3))
                .ok_or_else(|| invalid("the weight is not three in one"))?;
            vec![each; 3]
        }
    };
    if widths.len() != 3 {
        return Err(invalid("qkv_hidden_sizes"));
    }
    let weights = l.split_value(&weight, 1, &widths)?;
    let biases = match call.optional(2).cloned() {
        Some(bias) => Some(l.split_value(&bias, 0, &widths)?),
        None => None,
    };
    let mut parts = Vec::with_capacity(3);
    for (at, weight) in weights.iter().enumerate() {
        let weight = l.data(weight)?;
        let mut part = super::contraction::product(l, x, weight, false, false)?;
        if let Some(bias) = biases.as_ref().and_then(|biases| biases.get(at)) {
            let bias = l.data(bias)?;
            part = l.map(Scalar::Add, &[part, bias])?;
        }
        parts.push(split_heads(l, part, &heads)?);
    }
    let mut biases = Vec::new();
    let (s, dtype) = (l.graph.ty(parts[0]).shape[2].clone(), l.graph.ty(parts[0]).dtype);
    if let Some(mask) = call.optional(3) {
        let mask = l.data(mask)?;
        let batch = l.graph.ty(x).shape[0].clone();
        let ty = l.graph.ty(mask).clone();
        if ty.rank() == 1 && ty.shape[0] != batch {
            return Err(unsupported(format!("a mask of {ty}")));
        }
        biases.push(padding_bias(l, mask, &s, filter, dtype)?);
    }
    if let Some(bias) = call.optional(5) {
        biases.push(l.data(bias)?);
    }
    if causal {
        let (query, key) = positions(l, &s, &s, &Dim::constant(0))?;
        let allowed = l.map(Scalar::LessEqual, &[key, query])?;
        biases.push(bias_of(l, allowed, dtype)?);
    }
    let bias = sum_biases(l, &biases)?;
    let result = attend(
        l,
        parts[0],
        parts[1],
        parts[2],
        bias,
        &Scores { scale, softcap: 0.0, empty_rows_zero: false },
    )?;
    Ok(vec![Value::Data(join_heads(l, result)?)])
}
