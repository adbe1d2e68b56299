//! [Attention](https://onnx.ai/onnx/operators/onnx__Attention.html) of the default domain.
//!
//! Opsets: 23 (3-D and 4-D inputs, masks, past, soft cap), 24 (`nonpad_kv_seqlen`; a mask may be shorter than the keys),
//! 25 (window sizes). The specification multiplies queries and keys by `sqrt(scale)` each, which is `scale` on the
//! scores. A query row that may look at nothing gives zeros. Query `i` may look at key `j` if `j <= i + offset`, where
//! the offset is the length of the past, or `nonpad_kv_seqlen - queries` when the cache is kept outside.

use super::heads::{Scores, dims_of, head_count, positive};
use crate::lower::{Call, Lowered, Lowering, Value, invalid, unsupported};
use tpshard_ir::op::{EinsumSpec, PadMode, Real};
use tpshard_ir::{DType, Dim, Op, Scalar, ValueId};

/// Where the queries stand among the keys.
enum Offset {
    /// The same for all of a batch: this many keys come before the first query.
    Known(Dim),
    /// `[b, 1, 1, 1]`: counted from the number of keys that are no padding.
    PerBatch { valid: ValueId, offset: ValueId },
}

struct Attributes {
    causal: bool,
    left_window: i64,
    right_window: i64,
    scores: Scores,
    output_mode: i64,
}

/// Attention 23, 24, 25.
pub(crate) fn attention(lowering: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let attributes = read_attributes(call)?;
    let (q, k, v, flat) = operands(lowering, call)?;
    let (past_key, past_value) = (call.optional(4), call.optional(5));
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
    let offset = match call.optional(6) {
        None => Offset::Known(lowering.current(&past)),
        Some(_) if past_key.is_some() => {
            return Err(invalid("nonpad_kv_seqlen and past_key exclude each other"));
        }
        Some(valid) => {
            let [batch, _, sequence, _] = dims_of(&lowering.type_of(q), "Q")?;
            let valid = lowering.per_batch(valid, &batch, "nonpad_kv_seqlen")?;
            let sequence = lowering.size(&lowering.current(&sequence))?;
            Offset::PerBatch { valid, offset: lowering.map(Scalar::Sub, &[valid, sequence])? }
        }
    };
    let bias = bias(lowering, call, q, k, &offset, &attributes)?;
    let result = lowering.attend([q, k, v], bias, attributes.scores)?;
    let result = if flat { lowering.join_heads(result)? } else { result };
    let mut outputs = vec![Value::Data(result), Value::Data(k), Value::Data(v)];
    if call.wants(3) {
        outputs.push(Value::Data(raw_scores(lowering, q, k, bias, &attributes)?));
    }
    Ok(outputs)
}

fn read_attributes(call: &Call<'_>) -> Lowered<Attributes> {
    let read = &call.attributes;
    let causal = read.bool("is_causal", false)?;
    let scale = read.optional_float("scale")?.map(f64::from);
    let softcap = positive(read.float("softcap", 0.0)?);
    // Softmax is computed in 32 bits or more whatever the element type is.
    match read.optional_int("softmax_precision")? {
        None | Some(1 | 10 | 11 | 16) => {}
        Some(other) => {
            return Err(invalid(format!("softmax_precision {other} is not a floating-point type")));
        }
    }
    let window = |name: &str| {
        let size = if call.opset() >= 25 { read.int(name, -1)? } else { -1 };
        if size < -1 { Err(invalid(format!("{name} is {size}"))) } else { Ok(size) }
    };
    let (left_window, right_window) = (window("left_window_size")?, window("right_window_size")?);
    let output_mode = read.int("qk_matmul_output_mode", 0)?;
    if !(0..=3).contains(&output_mode) {
        return Err(invalid(format!("qk_matmul_output_mode is {output_mode}, not 0 to 3")));
    }
    let scores = Scores { scale, softcap, empty_rows_zero: true };
    Ok(Attributes { causal, left_window, right_window, scores, output_mode })
}

/// Queries, keys and values of rank 4, and whether they came without a head axis.
fn operands(lowering: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<(ValueId, ValueId, ValueId, bool)> {
    let q_heads = call.attributes.optional_int("q_num_heads")?;
    let kv_heads = call.attributes.optional_int("kv_num_heads")?;
    let (q, k, v) = (call.input(0)?, call.input(1)?, call.input(2)?);
    let ranks = [q, k, v].map(|value| lowering.shape(value).len());
    match ranks {
        [3, 3, 3] => {
            let missing = || invalid("inputs of rank 3 need q_num_heads and kv_num_heads");
            let q_heads = head_count(q_heads.ok_or_else(missing)?, "q_num_heads")?;
            let kv_heads = head_count(kv_heads.ok_or_else(missing)?, "kv_num_heads")?;
            let q = lowering.split_heads(q, q_heads, "Q")?;
            let k = lowering.split_heads(k, kv_heads, "K")?;
            let v = lowering.split_heads(v, kv_heads, "V")?;
            Ok((q, k, v, true))
        }
        [4, 4, 4] => Ok((lowering.data(q)?, lowering.data(k)?, lowering.data(v)?, false)),
        _ => Err(invalid(format!("Q, K and V have the ranks {ranks:?}, not all 3 or all 4"))),
    }
}

/// Everything that is added to the scores.
fn bias(
    lowering: &mut Lowering<'_>,
    call: &Call<'_>,
    q: ValueId,
    k: ValueId,
    offset: &Offset,
    attributes: &Attributes,
) -> Lowered<Option<ValueId>> {
    let mut allowed = index_mask(lowering, q, k, offset, attributes)?;
    let dtype = lowering.type_of(q).dtype;
    let mut added = None;
    if let Some(mask) = call.optional(3) {
        let mask = lowering.data(mask)?;
        let mask = fit_mask(lowering, mask, q, k, call.opset())?;
        if lowering.type_of(mask).dtype == DType::Bool {
            allowed = Some(lowering.both(allowed, mask)?);
        } else {
            added = Some(lowering.cast(mask, dtype)?);
        }
    }
    let masked = match allowed {
        Some(allowed) => Some(lowering.bias_of(allowed, dtype, f64::NEG_INFINITY)?),
        None => None,
    };
    lowering.sum_of(masked, added)
}

/// Which keys a query may look at by their positions alone; `None` for all.
fn index_mask(
    lowering: &mut Lowering<'_>,
    q: ValueId,
    k: ValueId,
    offset: &Offset,
    attributes: &Attributes,
) -> Lowered<Option<ValueId>> {
    let sequence = lowering.type_of(q).shape[2].clone();
    let total = lowering.type_of(k).shape[2].clone();
    let mut allowed = None;
    let windows = attributes.left_window >= 0 || attributes.right_window >= 0;
    // One query at the end of the keys sees them all.
    let last = matches!(offset, Offset::Known(past) if sequence.is_one() && past + &sequence == total);
    if windows || (attributes.causal && !last) {
        let keys = lowering.indices(Dim::constant(0), total.clone(), 3)?;
        let queries = match offset {
            Offset::Known(past) => lowering.indices(past.clone(), sequence, 2)?,
            Offset::PerBatch { offset, .. } => {
                let queries = lowering.indices(Dim::constant(0), sequence, 2)?;
                lowering.map(Scalar::Add, &[queries, *offset])?
            }
        };
        if attributes.causal {
            allowed = Some(lowering.map(Scalar::LessEqual, &[keys, queries])?);
        }
        if attributes.left_window >= 0 {
            let oldest = lowering.map_number(Scalar::Sub, queries, attributes.left_window as f64)?;
            let inside = lowering.map(Scalar::LessEqual, &[oldest, keys])?;
            allowed = Some(lowering.both(allowed, inside)?);
        }
        if attributes.right_window >= 0 {
            let newest = lowering.map_number(Scalar::Add, queries, attributes.right_window as f64)?;
            let inside = lowering.map(Scalar::LessEqual, &[keys, newest])?;
            allowed = Some(lowering.both(allowed, inside)?);
        }
    }
    if let Offset::PerBatch { valid, .. } = offset {
        let keys = lowering.indices(Dim::constant(0), total, 3)?;
        let inside = lowering.map(Scalar::Less, &[keys, *valid])?;
        allowed = Some(lowering.both(allowed, inside)?);
    }
    Ok(allowed)
}

/// Makes the mask broadcast to `[b, h, s, t]`. From opset 24 one that ends early masks the keys after its end.
fn fit_mask(
    lowering: &mut Lowering<'_>,
    mask: ValueId,
    q: ValueId,
    k: ValueId,
    opset: i64,
) -> Lowered<ValueId> {
    let ty = lowering.type_of(mask);
    let [batch, heads, sequence, _] = dims_of(&lowering.type_of(q), "Q")?;
    let total = lowering.type_of(k).shape[2].clone();
    let Some(last) = ty.shape.last().filter(|_| ty.rank() <= 4) else {
        return Err(invalid(format!("attn_mask is {ty}, of rank 1 to 4 is wanted")));
    };
    let missing = &total - last;
    let shorter = missing.is_nonnegative() && !missing.is_zero();
    let mask = if opset >= 24 && shorter {
        let (low, mut high) = (vec![Dim::constant(0); ty.rank()], vec![Dim::constant(0); ty.rank()]);
        if let Some(dim) = high.last_mut() {
            *dim = missing;
        }
        let fill = if ty.dtype == DType::Bool { 0.0 } else { f64::NEG_INFINITY };
        lowering.add(Op::Pad { low, high, mode: PadMode::Constant(Real(fill)) }, &[mask])?
    } else {
        mask
    };
    lowering.unify_broadcast(mask, &[batch, heads, sequence, total], "attn_mask")?;
    Ok(mask)
}

/// The scores as the fourth output shows them: raw, capped, with the bias, or after the softmax.
fn raw_scores(
    lowering: &mut Lowering<'_>,
    q: ValueId,
    k: ValueId,
    bias: Option<ValueId>,
    attributes: &Attributes,
) -> Lowered<ValueId> {
    let [batch, heads, sequence, size] = dims_of(&lowering.type_of(q), "Q")?;
    let [_, kv_heads, total, _] = dims_of(&lowering.type_of(k), "K")?;
    let group =
        heads.exact_div(&kv_heads).ok_or_else(|| invalid(format!("{heads} heads over {kv_heads}")))?;
    let grouped = lowering.reshape(q, &[batch.clone(), kv_heads, group, sequence.clone(), size])?;
    let spec =
        EinsumSpec::parse("bgrsd,bgtd->bgrst").ok_or_else(|| unsupported("the scores of attention"))?;
    let scores = lowering.add(Op::Einsum(spec), &[grouped, k])?;
    let scores = lowering.reshape(scores, &[batch, heads, sequence, total])?;
    let scale = lowering.score_scale(q, attributes.scores.scale)?;
    let mut scores = lowering.map_number(Scalar::Mul, scores, scale)?;
    if let Some(cap) = attributes.scores.softcap.filter(|_| attributes.output_mode >= 1) {
        let inner = lowering.map_number(Scalar::Div, scores, cap)?;
        let bent = lowering.map(Scalar::Tanh, &[inner])?;
        scores = lowering.map_number(Scalar::Mul, bent, cap)?;
    }
    if let Some(bias) = bias.filter(|_| attributes.output_mode >= 2) {
        scores = lowering.map(Scalar::Add, &[scores, bias])?;
    }
    if attributes.output_mode < 3 {
        return Ok(scores);
    }
    let highest = lowering.reduce(tpshard_ir::Monoid::Max, scores, &[3])?;
    let weights = lowering.add(Op::Softmax { axis: 3 }, &[scores])?;
    // A row that is masked as a whole has no largest score, and no weights.
    let lowest = lowering.scalar(lowering.graph.ty(scores).dtype, f64::NEG_INFINITY)?;
    let empty = lowering.map(Scalar::Equal, &[highest, lowest])?;
    let zero = lowering.scalar(lowering.graph.ty(scores).dtype, 0.0)?;
    lowering.map(Scalar::Select, &[empty, zero, weights])
}
