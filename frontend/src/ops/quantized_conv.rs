//! Convolutions of integers: [ConvInteger](https://onnx.ai/onnx/operators/onnx__ConvInteger.html) and
//! [QLinearConv](https://onnx.ai/onnx/operators/onnx__QLinearConv.html), both since opset 10.
//!
//! Zero points are subtracted first, so that padding is 0; the sums are `i32`, which no model overflows.

use super::convolution::{convolve, per_channel};
use super::quantized::{range, saturate};
use crate::lower::{Call, Lowered, Lowering, Value};
use tpshard_ir::{DType, Dim, Scalar, ValueId};

/// `x - zero` as `i32`, with one zero point or one per output channel of a kernel.
fn centred(l: &mut Lowering<'_>, x: &Value, zero: Option<&Value>) -> Lowered<ValueId> {
    let x = l.data(x)?;
    let x = l.cast(x, DType::I32)?;
    let Some(zero) = zero else { return Ok(x) };
    let zero = l.data(zero)?;
    let zero = l.cast(zero, DType::I32)?;
    let zero = leading(l, zero, x)?;
    l.map(Scalar::Sub, &[x, zero])
}

/// A parameter of the first dim of `x`, or of all of it.
fn leading(l: &mut Lowering<'_>, parameter: ValueId, x: ValueId) -> Lowered<ValueId> {
    let shape = l.graph.ty(parameter).shape.clone();
    match shape.as_slice() {
        [entries] if !entries.is_one() => {
            let mut aligned = vec![Dim::constant(1); l.graph.ty(x).rank()];
            aligned[0] = entries.clone();
            l.reshape(parameter, &aligned)
        }
        _ => l.reshape(parameter, &[]),
    }
}

/// `(x, w[, x_zero_point[, w_zero_point]])`.
pub(super) fn conv_integer(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let x = centred(l, call.input(0)?, call.optional(2))?;
    let w = centred(l, call.input(1)?, call.optional(3))?;
    Ok(vec![Value::Data(convolve(l, call, x, w)?)])
}

/// `(x, x_scale, x_zero_point, w, w_scale, w_zero_point, y_scale, y_zero_point[, bias])`; scales of `w` and `y` may be per
/// channel.
pub(super) fn qlinear_conv(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let x = centred(l, call.input(0)?, call.optional(2))?;
    let w = centred(l, call.input(3)?, call.optional(5))?;
    let mut sum = convolve(l, call, x, w)?;
    if let Some(bias) = call.optional(8) {
        let bias = l.data(bias)?;
        let bias = l.cast(bias, DType::I32)?;
        sum = per_channel(l, Scalar::Add, sum, bias)?;
    }
    let mut value = l.cast(sum, DType::F32)?;
    for (index, function) in [(1, Scalar::Mul), (4, Scalar::Mul), (6, Scalar::Div)] {
        let scale = l.data(call.input(index)?)?;
        let scale = l.cast(scale, DType::F32)?;
        value = spread(l, function, value, scale)?;
    }
    let zero = l.data(call.input(7)?)?;
    let to = l.graph.ty(zero).dtype;
    let value = l.map(Scalar::Round, &[value])?;
    let zero = l.cast(zero, DType::F32)?;
    let value = spread(l, Scalar::Add, value, zero)?;
    Ok(vec![Value::Data(saturate(l, value, None, range(to)?, to)?)])
}

/// `f(x, parameter)` with one entry for all or one per channel.
fn spread(l: &mut Lowering<'_>, function: Scalar, x: ValueId, parameter: ValueId) -> Lowered<ValueId> {
    let one = l.graph.ty(parameter).shape.iter().all(Dim::is_one);
    if !one {
        return per_channel(l, function, x, parameter);
    }
    let parameter = l.reshape(parameter, &[])?;
    l.map(function, &[x, parameter])
}
