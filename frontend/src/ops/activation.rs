//! Activations, written out in elementwise functions: <https://onnx.ai/onnx/operators/> (Relu, Gelu, Clip, …) and the
//! ones ONNX Runtime fuses (BiasGelu, FastGelu, QuickGelu).

use crate::lower::{Call, Lowered, Lowering, Value, invalid, unsupported};
use tpshard_ir::{DType, Scalar, ValueId};

/// The first operand as data and its type.
fn operand(lowering: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<(ValueId, DType)> {
    let x = lowering.data(call.input(0)?)?;
    Ok((x, lowering.graph.ty(x).dtype))
}

fn one(value: ValueId) -> Lowered<Vec<Value>> {
    Ok(vec![Value::Data(value)])
}

pub(super) fn relu(lowering: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let (x, _) = operand(lowering, call)?;
    one(lowering.map_number(Scalar::Max, x, 0.0)?)
}

/// `x` where `condition(x, bound)`, else `other`.
fn piecewise(
    l: &mut Lowering<'_>,
    condition: Scalar,
    x: ValueId,
    bound: f64,
    yes: ValueId,
    no: ValueId,
) -> Lowered<ValueId> {
    let test = l.map_number(condition, x, bound)?;
    l.map(Scalar::Select, &[test, yes, no])
}

pub(super) fn leaky_relu(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let alpha = f64::from(call.attributes.float("alpha", 0.01)?);
    let (x, _) = operand(l, call)?;
    let scaled = l.map_number(Scalar::Mul, x, alpha)?;
    one(piecewise(l, Scalar::Less, x, 0.0, scaled, x)?)
}

/// The slope is broadcast to the input from the right; before opset 7 it has one entry per channel.
pub(super) fn prelu(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let (x, _) = operand(l, call)?;
    let mut slope = call.input(1)?.clone();
    let (rank, shape) = (l.graph.ty(x).rank(), l.shape(&slope));
    if call.opset() < 7 && shape.len() == 1 && rank > 2 {
        let mut aligned = vec![tpshard_ir::Dim::constant(1); rank - 1];
        aligned[0] = shape[0].clone();
        slope = l.reshape_value(&slope, &aligned)?;
    }
    let slope = l.data(&slope)?;
    let scaled = l.map(Scalar::Mul, &[x, slope])?;
    one(piecewise(l, Scalar::Less, x, 0.0, scaled, x)?)
}

/// `alpha (exp(x / beta) - 1)` below zero.
fn exponential(l: &mut Lowering<'_>, x: ValueId, alpha: f64, beta: f64) -> Lowered<ValueId> {
    let low = l.map_number(Scalar::Min, x, 0.0)?;
    let low = if beta == 1.0 { low } else { l.map_number(Scalar::Div, low, beta)? };
    let exp = l.add(tpshard_ir::Op::Map(Scalar::Exp), &[low])?;
    let shifted = l.map_number(Scalar::Sub, exp, 1.0)?;
    let scaled = l.map_number(Scalar::Mul, shifted, alpha)?;
    piecewise(l, Scalar::Less, x, 0.0, scaled, x)
}

pub(super) fn elu(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let alpha = f64::from(call.attributes.float("alpha", 1.0)?);
    let (x, _) = operand(l, call)?;
    one(exponential(l, x, alpha, 1.0)?)
}

pub(super) fn celu(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let alpha = f64::from(call.attributes.float("alpha", 1.0)?);
    let (x, _) = operand(l, call)?;
    one(exponential(l, x, alpha, alpha)?)
}

pub(super) fn selu(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let alpha = f64::from(call.attributes.float("alpha", 1.673_263_2)?);
    let gamma = f64::from(call.attributes.float("gamma", 1.050_701)?);
    let (x, _) = operand(l, call)?;
    let elu = exponential(l, x, alpha, 1.0)?;
    one(l.map_number(Scalar::Mul, elu, gamma)?)
}

pub(super) fn thresholded_relu(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let alpha = f64::from(call.attributes.float("alpha", 1.0)?);
    let (x, dtype) = operand(l, call)?;
    let zero = l.scalar(dtype, 0.0)?;
    one(piecewise(l, Scalar::Greater, x, alpha, x, zero)?)
}

pub(super) fn shrink(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let lambda = f64::from(call.attributes.float("lambd", 0.5)?);
    let bias = f64::from(call.attributes.float("bias", 0.0)?);
    let (x, dtype) = operand(l, call)?;
    let zero = l.scalar(dtype, 0.0)?;
    let (up, down) = (l.map_number(Scalar::Add, x, bias)?, l.map_number(Scalar::Sub, x, bias)?);
    let above = piecewise(l, Scalar::Greater, x, lambda, down, zero)?;
    one(piecewise(l, Scalar::Less, x, -lambda, up, above)?)
}

/// `log(exp(x) + 1)` without overflow: `max(x, 0) + log(1 + exp(-|x|))`.
fn soft_plus(l: &mut Lowering<'_>, x: ValueId) -> Lowered<ValueId> {
    let high = l.map_number(Scalar::Max, x, 0.0)?;
    let size = l.map(Scalar::Abs, &[x])?;
    let negative = l.map(Scalar::Neg, &[size])?;
    let exp = l.map(Scalar::Exp, &[negative])?;
    let sum = l.map_number(Scalar::Add, exp, 1.0)?;
    let log = l.map(Scalar::Log, &[sum])?;
    l.map(Scalar::Add, &[high, log])
}

pub(super) fn softplus(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let (x, _) = operand(l, call)?;
    one(soft_plus(l, x)?)
}

pub(super) fn softsign(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let (x, _) = operand(l, call)?;
    let size = l.map(Scalar::Abs, &[x])?;
    let divisor = l.map_number(Scalar::Add, size, 1.0)?;
    one(l.map(Scalar::Div, &[x, divisor])?)
}

pub(super) fn mish(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let (x, _) = operand(l, call)?;
    let plus = soft_plus(l, x)?;
    let tanh = l.map(Scalar::Tanh, &[plus])?;
    one(l.map(Scalar::Mul, &[x, tanh])?)
}

fn clamp01(l: &mut Lowering<'_>, x: ValueId, alpha: f64, beta: f64) -> Lowered<ValueId> {
    let scaled = l.map_number(Scalar::Mul, x, alpha)?;
    let shifted = l.map_number(Scalar::Add, scaled, beta)?;
    let low = l.map_number(Scalar::Max, shifted, 0.0)?;
    l.map_number(Scalar::Min, low, 1.0)
}

pub(super) fn hard_sigmoid(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let alpha = f64::from(call.attributes.float("alpha", 0.2)?);
    let beta = f64::from(call.attributes.float("beta", 0.5)?);
    let (x, _) = operand(l, call)?;
    one(clamp01(l, x, alpha, beta)?)
}

pub(super) fn hard_swish(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let (x, _) = operand(l, call)?;
    let gate = clamp01(l, x, 1.0 / 6.0, 0.5)?;
    one(l.map(Scalar::Mul, &[x, gate])?)
}

/// `x * sigmoid(alpha x)`.
pub(super) fn swish_of(l: &mut Lowering<'_>, x: ValueId, alpha: f64) -> Lowered<ValueId> {
    let scaled = if alpha == 1.0 { x } else { l.map_number(Scalar::Mul, x, alpha)? };
    let gate = l.map(Scalar::Sigmoid, &[scaled])?;
    l.map(Scalar::Mul, &[x, gate])
}

pub(super) fn swish(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let alpha = f64::from(call.attributes.float("alpha", 1.0)?);
    let (x, _) = operand(l, call)?;
    one(swish_of(l, x, alpha)?)
}

pub(super) fn quick_gelu(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let alpha = f64::from(call.attributes.float("alpha", 1.702)?);
    let (x, _) = operand(l, call)?;
    one(swish_of(l, x, alpha)?)
}

/// `x/2 (1 + erf(x / √2))`.
fn gelu_erf(l: &mut Lowering<'_>, x: ValueId) -> Lowered<ValueId> {
    let scaled = l.map_number(Scalar::Mul, x, std::f64::consts::FRAC_1_SQRT_2)?;
    let erf = l.map(Scalar::Erf, &[scaled])?;
    half_gate(l, x, erf)
}

/// `x/2 (1 + tanh(√(2/π) (x + 0.044715 x³)))`.
pub(super) fn gelu_tanh(l: &mut Lowering<'_>, x: ValueId) -> Lowered<ValueId> {
    let square = l.map(Scalar::Mul, &[x, x])?;
    let cube = l.map(Scalar::Mul, &[square, x])?;
    let small = l.map_number(Scalar::Mul, cube, 0.044_715)?;
    let sum = l.map(Scalar::Add, &[x, small])?;
    let scaled = l.map_number(Scalar::Mul, sum, (2.0 / std::f64::consts::PI).sqrt())?;
    let tanh = l.map(Scalar::Tanh, &[scaled])?;
    half_gate(l, x, tanh)
}

fn half_gate(l: &mut Lowering<'_>, x: ValueId, gate: ValueId) -> Lowered<ValueId> {
    let gate = l.map_number(Scalar::Add, gate, 1.0)?;
    let half = l.map_number(Scalar::Mul, x, 0.5)?;
    l.map(Scalar::Mul, &[half, gate])
}

pub(super) fn gelu(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let (x, _) = operand(l, call)?;
    match call.attributes.string("approximate", "none")? {
        "none" => one(gelu_erf(l, x)?),
        "tanh" => one(gelu_tanh(l, x)?),
        other => Err(unsupported(format!("the approximation {}", crate::error::quote(other)))),
    }
}

pub(super) fn erf_gelu(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let (x, _) = operand(l, call)?;
    one(gelu_erf(l, x)?)
}

/// The operand plus the optional bias of the last axis.
fn biased(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<ValueId> {
    let (x, _) = operand(l, call)?;
    match call.optional(1) {
        None => Ok(x),
        Some(bias) => {
            let bias = l.data(bias)?;
            l.map(Scalar::Add, &[x, bias])
        }
    }
}

pub(super) fn bias_gelu(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let x = biased(l, call)?;
    one(gelu_erf(l, x)?)
}

pub(super) fn fast_gelu(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let x = biased(l, call)?;
    one(gelu_tanh(l, x)?)
}

/// Bounds are attributes before opset 11 and optional inputs since.
pub(super) fn clip(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let mut value = call.input(0)?.clone();
    let dtype = l.dtype(&value);
    if call.opset() < 11 {
        let low = call.attributes.optional_float("min")?;
        let high = call.attributes.optional_float("max")?;
        for (scalar, bound) in [(Scalar::Max, low), (Scalar::Min, high)] {
            if let Some(bound) = bound.filter(|bound| bound.abs() < f32::MAX) {
                let bound = l.number_value(dtype, f64::from(bound))?;
                value = l.elementwise(scalar, &[value, bound])?;
            }
        }
        return Ok(vec![value]);
    }
    for (scalar, at) in [(Scalar::Max, 1), (Scalar::Min, 2)] {
        let Some(bound) = call.optional(at).cloned() else { continue };
        if l.dtype(&bound) != dtype {
            return Err(invalid("the bounds are of another type than the input"));
        }
        // A bound of shape [1] does not stretch a scalar.
        let bound = l.reshape_value(&bound, &[])?;
        value = l.elementwise(scalar, &[value, bound])?;
    }
    Ok(vec![value])
}

/// An activation by the name that recurrent layers give it; names differ in case between exporters.
pub(super) fn named_activation(
    l: &mut Lowering<'_>,
    name: &str,
    x: ValueId,
    alpha: Option<f64>,
    beta: Option<f64>,
) -> Lowered<ValueId> {
    match name.to_ascii_lowercase().as_str() {
        "relu" => l.map_number(Scalar::Max, x, 0.0),
        "tanh" => l.map(Scalar::Tanh, &[x]),
        "sigmoid" => l.map(Scalar::Sigmoid, &[x]),
        "softplus" => soft_plus(l, x),
        "softsign" => {
            let size = l.map(Scalar::Abs, &[x])?;
            let divisor = l.map_number(Scalar::Add, size, 1.0)?;
            l.map(Scalar::Div, &[x, divisor])
        }
        "affine" => {
            let scaled = l.map_number(Scalar::Mul, x, alpha.unwrap_or(1.0))?;
            l.map_number(Scalar::Add, scaled, beta.unwrap_or(0.0))
        }
        "scaledtanh" => {
            let scaled = l.map_number(Scalar::Mul, x, beta.unwrap_or(1.0))?;
            let bent = l.map(Scalar::Tanh, &[scaled])?;
            l.map_number(Scalar::Mul, bent, alpha.unwrap_or(1.0))
        }
        "leakyrelu" => {
            let scaled = l.map_number(Scalar::Mul, x, alpha.unwrap_or(0.01))?;
            piecewise(l, Scalar::Less, x, 0.0, scaled, x)
        }
        "thresholdedrelu" => {
            let zero = l.scalar(l.graph.ty(x).dtype, 0.0)?;
            piecewise(l, Scalar::Greater, x, alpha.unwrap_or(1.0), x, zero)
        }
        "hardsigmoid" => clamp01(l, x, alpha.unwrap_or(0.2), beta.unwrap_or(0.5)),
        "elu" => exponential(l, x, alpha.unwrap_or(1.0), 1.0),
        _ => Err(unsupported(format!("the activation {}", crate::error::quote(name)))),
    }
}
