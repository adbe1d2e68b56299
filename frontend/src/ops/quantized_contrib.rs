//! ONNX Runtime's operators on quantised tensors, version 1 of
//! [com.microsoft](https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md): what its quantiser makes
//! of float operators in the QOperator form.
//!
//! All have scales and zero points per tensor. They compute on `scale · (x - zero)` in `f32` and quantise the result;
//! sums of products are `i32`, as in [`super::quantized`].

use super::contraction::product;
use super::convolution::{average_pool_of, global_average};
use super::quantized::{by_row, centred, dynamically, range, saturate};
use super::reduction::softmax_of;
use crate::lower::{Call, Lowered, Lowering, Value, axis_of, invalid, unsupported};
use tpshard_ir::{DType, Dim, Op, Scalar, ValueId};

/// One entry as a scalar; rows of entries stay.
pub(super) fn scalar_of(l: &mut Lowering<'_>, parameter: &Value) -> Lowered<ValueId> {
    let value = l.data(parameter)?;
    let value = l.cast(value, DType::F32)?;
    if l.graph.ty(value).shape.iter().all(Dim::is_one) { l.reshape(value, &[]) } else { Ok(value) }
}

/// `x - zero` in `f32`.
fn shifted(l: &mut Lowering<'_>, x: &Value, zero: Option<&Value>) -> Lowered<ValueId> {
    let x = l.data(x)?;
    let x = l.cast(x, DType::F32)?;
    let Some(zero) = zero else { return Ok(x) };
    let zero = scalar_of(l, zero)?;
    l.map(Scalar::Sub, &[x, zero])
}

/// `scale · (x - zero)` of the operand at `index`, followed by its scale and zero point.
fn operand(l: &mut Lowering<'_>, call: &Call<'_>, index: usize) -> Lowered<ValueId> {
    let x = shifted(l, call.input(index)?, call.optional(index + 2))?;
    let scale = scalar_of(l, call.input(index + 1)?)?;
    l.map(Scalar::Mul, &[x, scale])
}

/// `value / scale + zero` in the type `to`, with the scale at `index` and the zero point after it.
fn quantized(
    l: &mut Lowering<'_>,
    call: &Call<'_>,
    value: ValueId,
    index: usize,
    to: DType,
) -> Lowered<Vec<Value>> {
    let scale = scalar_of(l, call.input(index)?)?;
    let ratio = l.map(Scalar::Div, &[value, scale])?;
    Ok(vec![Value::Data(stored(l, ratio, call.optional(index + 1), to)?)])
}

fn stored(l: &mut Lowering<'_>, ratio: ValueId, zero: Option<&Value>, to: DType) -> Lowered<ValueId> {
    let zero = match zero {
        Some(zero) => Some(scalar_of(l, zero)?),
        None => None,
    };
    saturate(l, ratio, zero, range(to)?, to)
}

fn channels_first(call: &Call<'_>) -> Lowered<()> {
    if call.attributes.bool("channels_last", false)? {
        return Err(unsupported("channels_last"));
    }
    Ok(())
}

/// QLinearAdd and QLinearMul: `(a, a_scale, a_zero_point, b, b_scale, b_zero_point, c_scale, c_zero_point)`. The scales
/// are joined first, as ONNX Runtime does.
pub(super) fn qlinear_binary(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let to = l.dtype(call.input(0)?);
    let (a, b) =
        (shifted(l, call.input(0)?, call.optional(2))?, shifted(l, call.input(3)?, call.optional(5))?);
    let mut scales = Vec::with_capacity(3);
    for index in [1, 4, 6] {
        scales.push(scalar_of(l, call.input(index)?)?);
    }
    let [of_a, of_b, of_c] = scales.as_slice() else { return Err(invalid("not three scales")) };
    let ratio = if call.node.op_type == "QLinearAdd" {
        let (of_a, of_b) = (l.map(Scalar::Div, &[*of_a, *of_c])?, l.map(Scalar::Div, &[*of_b, *of_c])?);
        let (a, b) = (l.map(Scalar::Mul, &[a, of_a])?, l.map(Scalar::Mul, &[b, of_b])?);
        l.map(Scalar::Add, &[a, b])?
    } else {
        let scale = l.map(Scalar::Mul, &[*of_a, *of_b])?;
        let scale = l.map(Scalar::Div, &[scale, *of_c])?;
        let product = l.map(Scalar::Mul, &[a, b])?;
        l.map(Scalar::Mul, &[product, scale])?
    };
    Ok(vec![Value::Data(stored(l, ratio, call.optional(7), to)?)])
}

/// QLinearLeakyRelu, QLinearSigmoid, QLinearAveragePool, QLinearGlobalAveragePool:
/// `(x, x_scale, x_zero_point, y_scale, y_zero_point)`.
pub(super) fn qlinear_unary(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let to = l.dtype(call.input(0)?);
    let x = operand(l, call, 0)?;
    let y = match call.node.op_type.as_str() {
        "QLinearLeakyRelu" => {
            let alpha = f64::from(call.attributes.float("alpha", 0.01)?);
            let scaled = l.map_number(Scalar::Mul, x, alpha)?;
            let below = l.map_number(Scalar::Less, x, 0.0)?;
            l.map(Scalar::Select, &[below, scaled, x])?
        }
        "QLinearSigmoid" => l.map(Scalar::Sigmoid, &[x])?,
        "QLinearAveragePool" => {
            channels_first(call)?;
            average_pool_of(l, call, x)?
        }
        _ => {
            channels_first(call)?;
            global_average(l, x)?
        }
    };
    quantized(l, call, y, 3, to)
}

/// QLinearSoftmax: `(x, x_scale, x_zero_point, y_scale, y_zero_point)`, as opset 13 or earlier ones have it by an attribute.
/// ONNX Runtime multiplies by the whole part of `1 / y_scale` instead of dividing by `y_scale`.
pub(super) fn qlinear_softmax(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let to = l.dtype(call.input(0)?);
    let joined = call.attributes.required_int("opset")? < 13;
    let axis = call.attributes.int("axis", if joined { 1 } else { -1 })?;
    let x = operand(l, call, 0)?;
    let y = softmax_of(l, x, axis, joined)?;
    let scale = scalar_of(l, call.input(3)?)?;
    let factor = l.map(Scalar::Reciprocal, &[scale])?;
    let factor = l.map(Scalar::Floor, &[factor])?;
    let ratio = l.map(Scalar::Mul, &[y, factor])?;
    Ok(vec![Value::Data(stored(l, ratio, call.optional(4), to)?)])
}

/// QLinearConcat: `(y_scale, y_zero_point, x, x_scale, x_zero_point, …)`.
pub(super) fn qlinear_concat(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let count = call.node.inputs.len().saturating_sub(2) / 3;
    if count == 0 || call.node.inputs.len() != 2 + 3 * count {
        return Err(invalid("the operands are not tensors with a scale and a zero point each"));
    }
    let to = l.dtype(call.input(2)?);
    let mut parts = Vec::with_capacity(count);
    for at in 0..count {
        parts.push(operand(l, call, 2 + 3 * at)?);
    }
    let rank = parts.first().map_or(0, |&part| l.graph.ty(part).rank());
    let axis = axis_of(call.attributes.required_int("axis")?, rank)?;
    let joined = l.joined(&parts, axis)?;
    quantized(l, call, joined, 0, to)
}

/// QLinearWhere: `(condition, x, x_scale, x_zero_point, y, y_scale, y_zero_point, z_scale, z_zero_point)`.
pub(super) fn qlinear_where(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let to = l.dtype(call.input(1)?);
    let condition = l.data(call.input(0)?)?;
    let (x, y) = (operand(l, call, 1)?, operand(l, call, 4)?);
    let z = l.map(Scalar::Select, &[condition, x, y])?;
    quantized(l, call, z, 7, to)
}

/// QGemm: `(A, a_scale, a_zero_point, B, b_scale, b_zero_point[, C, y_scale, y_zero_point])`; without `y_scale` the
/// result is in `f32`.
pub(super) fn q_gemm(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let read = &call.attributes;
    let alpha = f64::from(read.float("alpha", 1.0)?);
    let (swap_a, swap_b) = (read.bool("transA", false)?, read.bool("transB", false)?);
    // Zero points of B belong to its columns, which are its rows if it is transposed.
    let a = centred(l, call.input(0)?, call.optional(2), true)?;
    let b = centred(l, call.input(3)?, call.optional(5), swap_b)?;
    let mut sum = product(l, a, b, swap_a, swap_b)?;
    if let Some(bias) = call.optional(6) {
        let bias = l.data(bias)?;
        let bias = l.cast(bias, DType::I32)?;
        sum = l.map(Scalar::Add, &[sum, bias])?;
    }
    let sum = l.cast(sum, DType::F32)?;
    let (of_a, of_b) = (scalar_of(l, call.input(1)?)?, scalar_of(l, call.input(4)?)?);
    let mut scale = l.map(Scalar::Mul, &[of_a, of_b])?;
    if alpha != 1.0 {
        scale = l.map_number(Scalar::Mul, scale, alpha)?;
    }
    if call.optional(7).is_none() {
        return Ok(vec![Value::Data(l.map(Scalar::Mul, &[sum, scale])?)]);
    }
    let to = call.optional(8).map_or(l.dtype(call.input(0)?), |zero| l.dtype(zero));
    let of_y = scalar_of(l, call.input(7)?)?;
    let scale = l.map(Scalar::Div, &[scale, of_y])?;
    let ratio = l.map(Scalar::Mul, &[sum, scale])?;
    Ok(vec![Value::Data(stored(l, ratio, call.optional(8), to)?)])
}

/// The product of integers times the scales, plus the bias.
pub(super) fn scaled_product(
    l: &mut Lowering<'_>,
    [a, b]: [ValueId; 2],
    [of_a, of_b]: [ValueId; 2],
    bias: Option<&Value>,
) -> Lowered<Vec<Value>> {
    let sum = product(l, a, b, false, false)?;
    let sum = l.cast(sum, DType::F32)?;
    let scale = l.map(Scalar::Mul, &[of_a, of_b])?;
    let mut y = l.map(Scalar::Mul, &[sum, scale])?;
    if let Some(bias) = bias {
        let bias = l.data(bias)?;
        y = l.map(Scalar::Add, &[y, bias])?;
    }
    Ok(vec![Value::Data(y)])
}

/// MatMulIntegerToFloat: `(A, B, a_scale, b_scale[, a_zero_point, b_zero_point, bias])`.
pub(super) fn matmul_integer_to_float(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let a = centred(l, call.input(0)?, call.optional(4), true)?;
    let b = centred(l, call.input(1)?, call.optional(5), false)?;
    let of_a = scalar_of(l, call.input(2)?)?;
    let of_a = by_row(l, of_a, true)?;
    let of_b = scalar_of(l, call.input(3)?)?;
    scaled_product(l, [a, b], [of_a, of_b], call.optional(6))
}

/// DynamicQuantizeMatMul: `(A, B, b_scale[, b_zero_point, bias])`; A is quantised by its range.
pub(super) fn dynamic_quantize_matmul(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let x = l.data(call.input(0)?)?;
    let [a, of_a, zero] = dynamically(l, x)?;
    let a = centred(l, &Value::Data(a), Some(&Value::Data(zero)), true)?;
    let b = centred(l, call.input(1)?, call.optional(3), false)?;
    let of_b = scalar_of(l, call.input(2)?)?;
    scaled_product(l, [a, b], [of_a, of_b], call.optional(4))
}

/// ImageScaler, which ONNX dropped before version 1.5: `scale · x + bias[channel]`.
pub(super) fn image_scaler(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let scale = f64::from(call.attributes.float("scale", 1.0)?);
    let bias = call.attributes.optional_floats("bias")?.unwrap_or(&[]).to_vec();
    let x = l.data(call.input(0)?)?;
    let ty = l.graph.ty(x).clone();
    let scaled = l.map_number(Scalar::Mul, x, scale)?;
    if bias.is_empty() {
        return Ok(vec![Value::Data(scaled)]);
    }
    let parts = bias.iter().map(|&entry| {
        let entry = l.scalar(ty.dtype, f64::from(entry))?;
        l.reshape(entry, &[Dim::constant(1), Dim::constant(1), Dim::constant(1)])
    });
    let parts = parts.collect::<Lowered<Vec<_>>>()?;
    let bias = match parts.as_slice() {
        [one] => *one,
        parts => l.add(Op::Concat { axis: 0 }, parts)?,
    };
    Ok(vec![Value::Data(l.map(Scalar::Add, &[scaled, bias])?)])
}
