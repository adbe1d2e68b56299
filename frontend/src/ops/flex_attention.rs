//! [FlexAttention](https://onnx.ai/onnx/operators/onnx_ai_onnx_preview_FlexAttention.html) of `ai.onnx.preview`.
//!
//! Attention whose scores and whose weights each go through a graph that the model gives. Without such graphs it is
//! plain attention; with them it is written out, in 32 bits or more, with their nodes in its middle.

use super::heads::{Scores, dims_of};
use crate::lower::{Call, Lowered, Lowering, Value, invalid, unsupported};
use crate::model::Graph;
use tpshard_ir::op::EinsumSpec;
use tpshard_ir::{DType, Op, Scalar, ValueId};

/// FlexAttention 1.
pub(crate) fn flex_attention(lowering: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let scale = call.attributes.optional_float("scale")?.map(f64::from);
    let precision = call.attributes.optional_int("softmax_precision")?;
    let on_scores = call.attributes.optional_graph("score_mod")?;
    let on_weights = call.attributes.optional_graph("prob_mod")?;
    let mut heads = [0, 1, 2].into_iter().map(|index| lowering.data(call.input(index)?));
    let (Some(q), Some(k), Some(v)) = (heads.next(), heads.next(), heads.next()) else {
        return Err(invalid("queries, keys and values are wanted"));
    };
    let (q, k, v) = (q?, k?, v?);
    if on_scores.is_none() && on_weights.is_none() {
        let scores = Scores { scale, softcap: None, empty_rows_zero: false };
        return Ok(vec![Value::Data(lowering.attend([q, k, v], None, scores)?)]);
    }
    lowering.fit_heads(q, k, v)?;
    let dtype = lowering.type_of(q).dtype;
    let wide = match precision {
        None | Some(1) if dtype != DType::F64 => DType::F32,
        None | Some(11) => DType::F64,
        Some(other) => return Err(unsupported(format!("softmax_precision {other} with graphs"))),
    };
    let scores = scores(lowering, q, k, wide, scale)?;
    let scores = through(lowering, on_scores, scores)?;
    let weights = lowering.add(Op::Softmax { axis: 3 }, &[scores])?;
    let weights = through(lowering, on_weights, weights)?;
    let result = mixed(lowering, weights, v, wide)?;
    Ok(vec![Value::Data(lowering.cast(result, dtype)?)])
}

fn spec(text: &str) -> Lowered<Op> {
    EinsumSpec::parse(text).map(Op::Einsum).ok_or_else(|| unsupported("this attention"))
}

/// `[b, h, s, t]`.
fn scores(
    lowering: &mut Lowering<'_>,
    q: ValueId,
    k: ValueId,
    wide: DType,
    scale: Option<f64>,
) -> Lowered<ValueId> {
    let scale = lowering.score_scale(q, scale)?;
    let [batch, heads, queries, size] = dims_of(&lowering.type_of(q), "Q")?;
    let [_, kv_heads, keys, _] = dims_of(&lowering.type_of(k), "K")?;
    let group = heads.exact_div(&kv_heads);
    let group = group.ok_or_else(|| invalid(format!("{heads} heads over {kv_heads}")))?;
    let (q, k) = (lowering.cast(q, wide)?, lowering.cast(k, wide)?);
    let grouped = lowering.reshape(q, &[batch.clone(), kv_heads, group, queries.clone(), size])?;
    let scores = lowering.add(spec("bgrsd,bgtd->bgrst")?, &[grouped, k])?;
    let scores = lowering.reshape(scores, &[batch, heads, queries, keys])?;
    lowering.map_number(Scalar::Mul, scores, scale)
}

/// The values with these weights, `[b, h, s, e]`.
fn mixed(lowering: &mut Lowering<'_>, weights: ValueId, v: ValueId, wide: DType) -> Lowered<ValueId> {
    let [batch, heads, queries, keys] = dims_of(&lowering.type_of(weights), "the weights")?;
    let [_, kv_heads, _, size] = dims_of(&lowering.type_of(v), "V")?;
    let group = heads.exact_div(&kv_heads);
    let group = group.ok_or_else(|| invalid(format!("{heads} heads over {kv_heads}")))?;
    let v = lowering.cast(v, wide)?;
    let grouped = lowering.reshape(weights, &[batch.clone(), kv_heads, group, queries.clone(), keys])?;
    let result = lowering.add(spec("bgrst,bgte->bgrse")?, &[grouped, v])?;
    lowering.reshape(result, &[batch, heads, queries, size])
}

/// What a graph of one input and one output of the same type makes of a value.
fn through(lowering: &mut Lowering<'_>, graph: Option<&Graph>, value: ValueId) -> Lowered<ValueId> {
    let Some(graph) = graph else { return Ok(value) };
    let wanted = lowering.type_of(value);
    let results = lowering.inlined(graph, &[Value::Data(value)])?;
    let [result] = results.as_slice() else { return Err(invalid("a modifier has one output")) };
    let result = lowering.data(result)?;
    if lowering.type_of(result).dtype != wanted.dtype {
        let found = lowering.type_of(result);
        return Err(invalid(format!("a modifier makes {found} of {wanted}")));
    }
    lowering.unify_shape(result, &wanted.shape, "the result of a modifier")?;
    Ok(result)
}
