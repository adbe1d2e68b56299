//! Mixtures of experts, version 1 of
//! [com.microsoft](https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md): MoE, and QMoE, whose
//! weights have 4 or 8 bits.
//!
//! Every token goes through every expert, and those it is not routed to count 0: the experts are a batch dim, which can
//! be split. The two operators route differently in ONNX Runtime: MoE takes the softmax over all experts, QMoE over those
//! chosen. Its `gelu` is the one with `tanh`.

use super::activation::{gelu_tanh, swish_of};
use super::packed_weights::packed_matrix;
use crate::lower::{Call, Lowered, Lowering, Value, invalid, unsupported};
use tpshard_ir::op::EinsumSpec;
use tpshard_ir::{DType, Dim, Monoid, Op, Scalar, ValueId};

/// MoE: `(input, router_probs, fc1_weights[, fc1_bias], fc2_weights[, fc2_bias])`.
pub(super) fn moe(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    if call.optional(6).is_some() || call.optional(7).is_some() {
        return Err(unsupported("a third product per expert"));
    }
    let normalise = call.attributes.bool("normalize_routing_weights", false)?;
    let (up, down) = (l.data(call.input(2)?)?, l.data(call.input(4)?)?);
    experts(l, call, [up, down], [call.optional(3), call.optional(5)], normalise)
}

/// QMoE: `(input, router_probs, fc1_weights, fc1_scales, fc1_bias, fc2_weights, fc2_scales, fc2_bias)`.
pub(super) fn quantized_moe(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    for (range, what) in [
        (8..11, "a third product per expert"),
        (11..14, "zero points of experts"),
        (14..15, "router weights"),
    ] {
        if range.into_iter().any(|index| call.optional(index).is_some()) {
            return Err(unsupported(what));
        }
    }
    let bits = call.attributes.int("expert_weight_bits", 4)?;
    let block = call.attributes.int("block_size", 0)?;
    // ONNX Runtime normalises whether it is asked to or not.
    call.attributes.ignore("normalize_routing_weights");
    let up = packed_matrix(l, call.input(2)?, call.input(3)?, bits, block)?;
    let down = packed_matrix(l, call.input(5)?, call.input(6)?, bits, block)?;
    experts(l, call, [up, down], [call.optional(4), call.optional(7)], true)
}

fn einsum(l: &mut Lowering<'_>, spec: &str, a: ValueId, b: ValueId) -> Lowered<ValueId> {
    let spec = EinsumSpec::parse(spec).ok_or_else(|| unsupported("the product of the experts"))?;
    l.add(Op::Einsum(spec), &[a, b])
}

/// `sum over experts of gate · (down · f(up · x + bias) + bias)`.
fn experts(
    l: &mut Lowering<'_>,
    call: &Call<'_>,
    [up, down]: [ValueId; 2],
    [up_bias, down_bias]: [Option<&Value>; 2],
    normalise: bool,
) -> Lowered<Vec<Value>> {
    if call.attributes.bool("use_sparse_mixer", false)? {
        return Err(unsupported("use_sparse_mixer"));
    }
    let x = l.data(call.input(0)?)?;
    let ty = l.graph.ty(x).clone();
    let [lead @ .., width] = ty.shape.as_slice() else { return Err(invalid("tokens without entries")) };
    let tokens = Dim::product(lead);
    let x = l.reshape(x, &[tokens, width.clone()])?;
    let x = l.cast(x, DType::F32)?;
    let (up, down) = (l.cast(up, DType::F32)?, l.cast(down, DType::F32)?);
    let gates = gates(l, call, normalise)?;
    let hidden = einsum(l, "th,eih->eti", x, up)?;
    let hidden = with_bias(l, hidden, up_bias)?;
    let hidden = activated(l, call, hidden)?;
    let results = einsum(l, "eti,ehi->eth", hidden, down)?;
    let results = with_bias(l, results, down_bias)?;
    let y = einsum(l, "te,eth->th", gates, results)?;
    let y = l.cast(y, ty.dtype)?;
    let shape = l.current_all(&ty.shape);
    Ok(vec![Value::Data(l.reshape(y, &shape)?)])
}

/// A bias `[experts, entries]` for every token.
fn with_bias(l: &mut Lowering<'_>, x: ValueId, bias: Option<&Value>) -> Lowered<ValueId> {
    let Some(bias) = bias else { return Ok(x) };
    let bias = l.data(bias)?;
    let bias = l.cast(bias, DType::F32)?;
    let mut shape = l.graph.ty(bias).shape.clone();
    if shape.len() != 2 {
        return Err(invalid(format!("a bias {} of experts", l.graph.ty(bias))));
    }
    shape.insert(1, Dim::constant(1));
    let bias = l.reshape(bias, &shape)?;
    l.map(Scalar::Add, &[x, bias])
}

/// How much each expert counts for each token, `[tokens, experts]`; 0 for those not among the first `k`.
fn gates(l: &mut Lowering<'_>, call: &Call<'_>, normalise: bool) -> Lowered<ValueId> {
    let chosen = call.attributes.int("k", 1)?;
    let logits = l.data(call.input(1)?)?;
    let logits = l.cast(logits, DType::F32)?;
    let [tokens, count] = super::heads::dims_of(&l.graph.ty(logits).clone(), "the routing")?;
    let most = count.as_const().ok_or_else(|| unsupported("a number of experts that is not constant"))?;
    if chosen < 1 || chosen > most {
        return Err(invalid(format!("{chosen} of {most} experts")));
    }
    // Of equal ones ONNX Runtime takes the last.
    let backwards = l.reversed(logits, 1)?;
    let first = l.add(Op::TopK { axis: 1, k: Dim::constant(chosen), largest: true }, &[backwards])?;
    let first = l.reshape(first, &[tokens.clone(), Dim::constant(chosen), Dim::constant(1)])?;
    let all = l.positions(&count, 2, 3)?;
    let all = l.cast(all, l.graph.ty(first).dtype)?;
    let is = l.map(Scalar::Equal, &[first, all])?;
    let is = l.cast(is, DType::F32)?;
    let is = l.reduce(Monoid::Max, is, &[1])?;
    let is = l.reshape(is, &[tokens, count])?;
    let is = l.reversed(is, 1)?;
    if !normalise {
        let shares = l.add(Op::Softmax { axis: 1 }, &[logits])?;
        return l.map(Scalar::Mul, &[shares, is]);
    }
    let is = l.map_number(Scalar::Greater, is, 0.0)?;
    let out = l.scalar(DType::F32, f64::NEG_INFINITY)?;
    let logits = l.map(Scalar::Select, &[is, logits, out])?;
    l.add(Op::Softmax { axis: 1 }, &[logits])
}

fn activated(l: &mut Lowering<'_>, call: &Call<'_>, x: ValueId) -> Lowered<ValueId> {
    let read = &call.attributes;
    let alpha = f64::from(read.float("activation_alpha", 1.0)?);
    let beta = f64::from(read.float("activation_beta", 0.0)?);
    let limit = read.optional_float("swiglu_limit")?.map(f64::from);
    let fusion = read.int("swiglu_fusion", 0)?;
    match read.string("activation_type", "relu")? {
        "relu" => l.map_number(Scalar::Max, x, 0.0),
        "gelu" => gelu_tanh(l, x),
        "silu" => swish_of(l, x, 1.0),
        "identity" => Ok(x),
        "swiglu" if fusion == 1 => {
            let width = l.graph.ty(x).shape.get(2).cloned().unwrap_or(Dim::constant(0));
            let half = width.exact_div(&Dim::constant(2)).ok_or_else(|| invalid("gates without partners"))?;
            let mut gate = l.slice(x, 2, Dim::constant(0), half.clone(), 2)?;
            let mut linear = l.slice(x, 2, Dim::constant(1), half, 2)?;
            if let Some(limit) = limit.filter(|limit| *limit > 0.0) {
                gate = l.map_number(Scalar::Min, gate, limit)?;
                linear = l.clamp(linear, -limit, limit)?;
            }
            let gate = swish_of(l, gate, alpha)?;
            let linear = l.map_number(Scalar::Add, linear, beta)?;
            l.map(Scalar::Mul, &[gate, linear])
        }
        "swiglu" => Err(unsupported(format!("swiglu_fusion {fusion}; 1 is"))),
        other => Err(invalid(format!("the activation {}", crate::error::quote(other)))),
    }
}
