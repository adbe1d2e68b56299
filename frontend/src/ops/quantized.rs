//! Linear quantisation: [QuantizeLinear](https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html) and
//! [DequantizeLinear](https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html) from opset 10 (per tensor), 13 (per
//! axis), 19 (8-bit floats), 21 (per block, 4 bits), 23 (`output_dtype`, `precision`), and of com.microsoft;
//! DynamicQuantizeLinear 11, MatMulInteger 10, QLinearMatMul 10 and 21.
//!
//! Weights become [`Op::Dequant`], which keeps them packed; what is computed at run time is written out in `f32`.

use super::contraction::product;
use super::storage::narrow;
use crate::lower::{Call, Lowered, Lowering, Value, axis_of, invalid, unsupported};
use crate::tensor_data::dtype_from_onnx;
use tpshard_ir::{DType, DTypeClass, Dim, Monoid, Op, Scalar, Type, ValueId};

/// Which elements share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Grain {
    Tensor,
    Axis(usize),
    Block { axis: usize, size: usize },
}

fn grain(x: &Type, scale: &Type, axis: i64, block: i64) -> Lowered<Grain> {
    if block > 0 {
        let size = usize::try_from(block).map_err(|_| invalid(format!("block_size is {block}")))?;
        let axis = axis_of(axis, x.rank())?;
        if scale.rank() != x.rank() {
            return Err(invalid(format!("scales {scale} of blocks of {x}")));
        }
        return Ok(Grain::Block { axis, size });
    }
    match scale.shape.as_slice() {
        [] => Ok(Grain::Tensor),
        [one] if one.is_one() && x.shape.get(axis_of(axis, x.rank()).unwrap_or(usize::MAX)) != Some(one) => {
            Ok(Grain::Tensor)
        }
        [_] => Ok(Grain::Axis(axis_of(axis, x.rank())?)),
        _ => Err(invalid(format!("scales {scale} of {x} without block_size"))),
    }
}

/// Scales or zero points in a shape that broadcasts to that of `x`.
fn spread(lowering: &mut Lowering<'_>, parameter: ValueId, x: ValueId, grain: Grain) -> Lowered<ValueId> {
    let shape = lowering.type_of(x).shape;
    let own = lowering.type_of(parameter);
    match grain {
        Grain::Tensor => lowering.reshape(parameter, &[]),
        Grain::Axis(axis) => {
            lowering.unify_shape(
                parameter,
                std::slice::from_ref(&shape[axis]),
                "the scales or zero points",
            )?;
            let mut aligned = vec![Dim::constant(1); shape.len()];
            aligned[axis] = lowering.current(&shape[axis]);
            lowering.reshape(parameter, &aligned)
        }
        Grain::Block { axis, size } => {
            let mut expected = shape.clone();
            expected[axis] = shape[axis].ceil_div(&Dim::from(size));
            lowering.unify_shape(parameter, &expected, "the scales or zero points")?;
            let own = lowering.current_all(&own.shape);
            let mut column = own.clone();
            column.insert(axis + 1, Dim::constant(1));
            let mut repeated = column.clone();
            repeated[axis + 1] = Dim::from(size);
            let parameter = lowering.reshape(parameter, &column)?;
            let parameter = lowering.broadcast(parameter, &repeated)?;
            let mut joined = own.clone();
            joined[axis] = &own[axis] * &Dim::from(size);
            let parameter = lowering.reshape(parameter, &joined)?;
            let length = lowering.current(&shape[axis]);
            lowering.slice(parameter, axis, Dim::constant(0), length, 1)
        }
    }
}

/// The type that is computed in.
fn wide(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

/// `1` for the default domain, the whole tensor for com.microsoft and before opset 13.
fn axis_attribute(call: &Call<'_>) -> Lowered<i64> {
    if call.node.domain.is_empty() && call.opset() < 13 {
        Ok(1)
    } else {
        Ok(call.attributes.int("axis", 1)?)
    }
}

fn block_attribute(call: &Call<'_>) -> Lowered<i64> {
    let blocked = call.node.domain.is_empty() && call.opset() >= 21;
    if blocked { Ok(call.attributes.int("block_size", 0)?) } else { Ok(0) }
}

fn type_attribute(call: &Call<'_>) -> Lowered<Option<DType>> {
    match call.attributes.int("output_dtype", 0)? {
        0 => Ok(None),
        code => Ok(Some(dtype_from_onnx(code)?)),
    }
}

/// DequantizeLinear: `(x, x_scale[, x_zero_point])`.
pub(crate) fn dequantize_linear(lowering: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let (axis, block) = (axis_attribute(call)?, block_attribute(call)?);
    let (x, scale) = (call.input(0)?, call.input(1)?);
    let to = type_attribute(call)?.unwrap_or(lowering.dtype(scale));
    let grain = grain(&lowering.ty(x), &lowering.ty(scale), axis, block)?;
    let constant = match x {
        Value::Weight(_) => Some(x.clone()),
        Value::Known(known) => known.source.clone().map(Value::Weight),
        _ => None,
    };
    if let Some(weight) = constant
        && let Some(dense) = dequantize_weight(lowering, &weight, scale, call.optional(2), grain)?
    {
        return Ok(vec![Value::Data(lowering.cast(dense, to)?)]);
    }
    let x = lowering.data(x)?;
    let scale = lowering.data(scale)?;
    let computed = wide(to);
    let mut y = lowering.cast(x, computed)?;
    if let Some(zero) = call.optional(2) {
        let zero = lowering.data(zero)?;
        let zero = lowering.cast(zero, computed)?;
        let zero = spread(lowering, zero, x, grain)?;
        y = lowering.map(Scalar::Sub, &[y, zero])?;
    }
    let scale = lowering.cast(scale, computed)?;
    let scale = spread(lowering, scale, x, grain)?;
    let y = lowering.map(Scalar::Mul, &[y, scale])?;
    Ok(vec![Value::Data(lowering.cast(y, to)?)])
}

/// A weight in one [`Op::Dequant`]: blocks as they are, and a scale per tensor or per outer axis as one block per row or
/// column of the weight as a matrix. `None` if it does not have that form.
fn dequantize_weight(
    lowering: &mut Lowering<'_>,
    weight: &Value,
    scale: &Value,
    zero: Option<&Value>,
    grain: Grain,
) -> Lowered<Option<ValueId>> {
    let shape = lowering.shape(weight);
    let Some(sizes) = shape.iter().map(Dim::as_size).collect::<Option<Vec<usize>>>() else { return Ok(None) };
    if sizes.is_empty() || sizes.contains(&0) {
        return Ok(None);
    }
    let (axis, block, matrix) = match grain {
        Grain::Block { axis, size } => (axis, size, sizes.clone()),
        Grain::Axis(axis) if axis + 1 == sizes.len() => {
            let rows: usize = sizes[..axis].iter().product();
            (0, rows.max(1), vec![rows.max(1), sizes[axis]])
        }
        Grain::Axis(0) | Grain::Tensor => {
            let columns: usize = sizes[1..].iter().product();
            (1, columns, vec![sizes[0], columns])
        }
        Grain::Axis(_) => return Ok(None),
    };
    let dims: Vec<Dim> = matrix.iter().map(|&size| Dim::from(size)).collect();
    let mut scales = dims.clone();
    scales[axis] = dims[axis].ceil_div(&Dim::from(block));
    let weight = lowering.reshape_value(weight, &dims)?;
    let mut args = vec![lowering.data(&weight)?];
    for (parameter, is_zero) in [(Some(scale), false), (zero, true)] {
        let Some(parameter) = parameter else { continue };
        let parameter = match grain {
            Grain::Tensor => lowering.reshape_value(parameter, &[])?,
            Grain::Axis(_) => lowering.reshape_value(parameter, &scales)?,
            Grain::Block { .. } => parameter.clone(),
        };
        let mut value = lowering.data(&parameter)?;
        let dtype = lowering.type_of(value).dtype;
        if is_zero && dtype.is_packed() && grain == Grain::Tensor {
            let signed = dtype.class() == DTypeClass::Int;
            value = lowering.cast(value, if signed { DType::I8 } else { DType::U8 })?;
        }
        if grain == Grain::Tensor {
            value = lowering.broadcast(value, &scales)?;
        } else {
            lowering.unify_shape(value, &scales, "the scales or zero points")?;
        }
        args.push(value);
    }
    let dense = lowering.add(Op::Dequant { axis, block }, &args)?;
    Ok(Some(lowering.reshape(dense, &shape)?))
}

/// QuantizeLinear: `saturate(round(x / y_scale) + y_zero_point)`.
pub(crate) fn quantize_linear(lowering: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let (axis, block) = (axis_attribute(call)?, block_attribute(call)?);
    let wanted = type_attribute(call)?;
    call.attributes.ignore("precision");
    let clips = call.attributes.bool("saturate", true)?;
    let zero = call.optional(2);
    let to = zero.map(|zero| lowering.dtype(zero)).or(wanted).unwrap_or(DType::U8);
    let x = lowering.data(call.input(0)?)?;
    let grain = grain(&lowering.type_of(x), &lowering.ty(call.input(1)?), axis, block)?;
    let computed = wide(lowering.type_of(x).dtype);
    let value = lowering.cast(x, computed)?;
    let scale = lowering.data(call.input(1)?)?;
    let scale = lowering.cast(scale, computed)?;
    let scale = spread(lowering, scale, x, grain)?;
    let ratio = lowering.map(Scalar::Div, &[value, scale])?;
    let zero = match zero {
        Some(zero) => {
            let zero = lowering.data(zero)?;
            let zero = lowering.cast(zero, computed)?;
            Some(spread(lowering, zero, x, grain)?)
        }
        None => None,
    };
    if to.is_float() {
        // The only zero point of these types is 0; it takes the sign off zeros.
        let ratio = match zero {
            Some(zero) => lowering.map(Scalar::Add, &[ratio, zero])?,
            None => ratio,
        };
        return Ok(vec![Value::Data(narrow(lowering, ratio, to, clips)?)]);
    }
    Ok(vec![Value::Data(saturate(lowering, ratio, zero, range(to)?, to)?)])
}

/// The least and greatest value of a type that results are stored in.
pub(super) fn range(to: DType) -> Lowered<(f64, f64)> {
    match to {
        DType::U8 => Ok((0.0, 255.0)),
        DType::I8 => Ok((-128.0, 127.0)),
        DType::U16 => Ok((0.0, 65_535.0)),
        DType::I16 => Ok((-32_768.0, 32_767.0)),
        DType::U4 => Ok((0.0, 15.0)),
        DType::I4 => Ok((-8.0, 7.0)),
        DType::U2 => Ok((0.0, 3.0)),
        DType::I2 => Ok((-2.0, 1.0)),
        other => Err(unsupported(format!("quantising to {other}, which is no integer of up to 16 bits"))),
    }
}

/// `clamp(round(ratio) + zero)` as integers.
pub(super) fn saturate(
    lowering: &mut Lowering<'_>,
    ratio: ValueId,
    zero: Option<ValueId>,
    (low, high): (f64, f64),
    to: DType,
) -> Lowered<ValueId> {
    let mut value = lowering.map(Scalar::Round, &[ratio])?;
    if let Some(zero) = zero {
        value = lowering.map(Scalar::Add, &[value, zero])?;
    }
    let value = lowering.map_number(Scalar::Max, value, low)?;
    let value = lowering.map_number(Scalar::Min, value, high)?;
    lowering.cast(value, to)
}

/// DynamicQuantizeLinear: quantises to `u8` by the range of the data; `(y, y_scale, y_zero_point)`.
pub(crate) fn dynamic_quantize_linear(lowering: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let x = lowering.data(call.input(0)?)?;
    Ok(dynamically(lowering, x)?.map(Value::Data).to_vec())
}

/// `x` as `u8` by its range, and the scale and the zero point.
pub(super) fn dynamically(lowering: &mut Lowering<'_>, x: ValueId) -> Lowered<[ValueId; 3]> {
    let axes: Vec<usize> = (0..lowering.type_of(x).rank()).collect();
    let mut ends = Vec::with_capacity(2);
    for (monoid, scalar) in [(Monoid::Min, Scalar::Min), (Monoid::Max, Scalar::Max)] {
        let end = lowering.reduce(monoid, x, &axes)?;
        let end = lowering.reshape(end, &[])?;
        ends.push(lowering.map_number(scalar, end, 0.0)?);
    }
    let [least, greatest] = ends.as_slice() else { return Err(invalid("no range")) };
    let extent = lowering.map(Scalar::Sub, &[*greatest, *least])?;
    let scale = lowering.map_number(Scalar::Div, extent, 255.0)?;
    // All zeros: any scale will do.
    let flat = lowering.map_number(Scalar::Equal, scale, 0.0)?;
    let one = lowering.scalar(lowering.graph.ty(scale).dtype, 1.0)?;
    let scale = lowering.map(Scalar::Select, &[flat, one, scale])?;
    let below = lowering.map(Scalar::Neg, &[*least])?;
    let zero = lowering.map(Scalar::Div, &[below, scale])?;
    let zero_point = saturate(lowering, zero, None, (0.0, 255.0), DType::U8)?;
    let shift = lowering.cast(zero_point, lowering.graph.ty(x).dtype)?;
    let ratio = lowering.map(Scalar::Div, &[x, scale])?;
    let y = saturate(lowering, ratio, Some(shift), (0.0, 255.0), DType::U8)?;
    Ok([y, scale, zero_point])
}

/// `x - zero` as `i32`; a zero point of rank 1 belongs to rows (`rows`) or columns.
pub(super) fn centred(
    lowering: &mut Lowering<'_>,
    x: &Value,
    zero: Option<&Value>,
    rows: bool,
) -> Lowered<ValueId> {
    let x = lowering.data(x)?;
    let x = lowering.cast(x, DType::I32)?;
    let Some(zero) = zero else { return Ok(x) };
    let zero = lowering.data(zero)?;
    let zero = lowering.cast(zero, DType::I32)?;
    let zero = by_row(lowering, zero, rows)?;
    lowering.map(Scalar::Sub, &[x, zero])
}

/// A parameter per row as a column; single entries as scalars.
pub(super) fn by_row(lowering: &mut Lowering<'_>, parameter: ValueId, rows: bool) -> Lowered<ValueId> {
    let mut shape = lowering.type_of(parameter).shape;
    match shape.as_slice() {
        [one] if one.is_one() => lowering.reshape(parameter, &[]),
        [_] if rows => {
            shape.push(Dim::constant(1));
            lowering.reshape(parameter, &shape)
        }
        _ => Ok(parameter),
    }
}

/// MatMulInteger: `(A - a_zero_point)(B - b_zero_point)` in `i32`.
pub(crate) fn matmul_integer(lowering: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let a = centred(lowering, call.input(0)?, call.optional(2), true)?;
    let b = centred(lowering, call.input(1)?, call.optional(3), false)?;
    Ok(vec![Value::Data(product(lowering, a, b, false, false)?)])
}

/// QLinearMatMul: `(a, a_scale, a_zero_point, b, b_scale, b_zero_point, y_scale, y_zero_point)`.
pub(crate) fn qlinear_matmul(lowering: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let a = centred(lowering, call.input(0)?, call.optional(2), true)?;
    let b = centred(lowering, call.input(3)?, call.optional(5), false)?;
    let sum = product(lowering, a, b, false, false)?;
    let mut scales = Vec::with_capacity(3);
    for (index, rows) in [(1, true), (4, false), (6, true)] {
        let scale = lowering.data(call.input(index)?)?;
        let scale = lowering.cast(scale, DType::F32)?;
        scales.push(by_row(lowering, scale, rows)?);
    }
    let [of_a, of_b, of_y] = scales.as_slice() else { return Err(invalid("not three scales")) };
    let factor = lowering.map(Scalar::Mul, &[*of_a, *of_b])?;
    let factor = lowering.map(Scalar::Div, &[factor, *of_y])?;
    let sum = lowering.cast(sum, DType::F32)?;
    let ratio = lowering.map(Scalar::Mul, &[sum, factor])?;
    let zero = lowering.data(call.input(7)?)?;
    let to = lowering.type_of(zero).dtype;
    let zero = lowering.cast(zero, DType::F32)?;
    let zero = by_row(lowering, zero, true)?;
    Ok(vec![Value::Data(saturate(lowering, ratio, Some(zero), range(to)?, to)?)])
}
