//! Quantised values: QuantizeLinear, DequantizeLinear, DynamicQuantizeLinear, MatMulInteger,
//! <https://onnx.ai/onnx/operators/>, and ONNX Runtime's MatMulNBits and GatherBlockQuantized,
//! <https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md>.
//!
//! Packed weights keep their bytes: `[N, blocks, bytes]` of 2-, 4- or 8-bit codes is the tensor `[N, K]` of that type.

use crate::lower::{Call, Lowered, Lowering, Value, axis_of, invalid, unsupported};
use tpshard_ir::weight::{WeightExpr, WeightKind};
use tpshard_ir::{DType, Dim, Monoid, Op, Scalar, ValueId};

fn code_type(bits: i64) -> Lowered<DType> {
    match bits {
        2 => Ok(DType::U2),
        4 => Ok(DType::U4),
        8 => Ok(DType::U8),
        _ => Err(unsupported(format!("codes of {bits} bits"))),
    }
}

/// An untouched byte initializer, seen as codes of another type and shape over the same bytes.
fn repacked(l: &Lowering<'_>, value: &Value, dtype: DType, shape: Vec<usize>) -> Lowered<WeightExpr> {
    let expr = match value {
        Value::Weight(expr) => Some(expr.clone()),
        Value::Known(known) => known.source.clone(),
        _ => None,
    };
    let mut expr = expr.ok_or_else(|| unsupported("packed codes that are computed, not stored"))?;
    // Another shape over the same bytes changes nothing.
    while let WeightKind::Reshape { source } = expr.kind() {
        expr = source.clone();
    }
    let WeightKind::Initializer { name } = expr.kind() else {
        return Err(unsupported("packed codes that are moved before they are used"));
    };
    let stored = l.tensors.get(name).map_or(0, crate::TensorRef::byte_len);
    let count = tpshard_ir::tensor::element_count(&shape).and_then(|count| dtype.byte_len(count as u64));
    if count != Some(stored) {
        return Err(invalid(format!("{stored} bytes of codes for {shape:?} of {dtype}")));
    }
    WeightExpr::initializer(name.clone(), dtype, shape).map_err(|error| invalid(error.to_string()))
}

fn sliced(expr: &WeightExpr, axis: usize, length: usize) -> Lowered<WeightExpr> {
    if expr.shape().get(axis) == Some(&length) {
        return Ok(expr.clone());
    }
    expr.slice(axis, 0, length).map_err(|error| invalid(error.to_string()))
}

fn count(call: &Call<'_>, name: &str) -> Lowered<usize> {
    let value = call.attributes.required_int(name)?;
    usize::try_from(value)
        .ok()
        .filter(|&value| (1..1 << 31).contains(&value))
        .ok_or_else(|| invalid(format!("{name} is {value}")))
}

/// `x · dequant(codes)ᵀ + bias` with codes `[N, K]` in blocks along K.
pub(super) fn matmul_n_bits(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let (k, n, block) = (count(call, "K")?, count(call, "N")?, count(call, "block_size")?);
    let bits = call.attributes.int("bits", 4)?;
    call.attributes.ignore("accuracy_level");
    call.attributes.ignore("weight_prepacked");
    if call.optional(4).is_some() {
        return Err(unsupported("reordered columns (g_idx)"));
    }
    let dtype = code_type(bits)?;
    let blocks = k.div_ceil(block);
    let codes = repacked(l, call.input(1)?, dtype, vec![n, blocks * block])?;
    let codes = sliced(&codes, 1, k)?;
    let codes = l.add(Op::Weight(codes), &[])?;
    let x = l.data(call.input(0)?)?;
    let x_type = l.graph.ty(x).dtype;
    let shape = [Dim::from(n), Dim::from(blocks)];
    let scales = l.reshape_value(call.input(2)?, &shape)?;
    let scales = l.cast_value(&scales, x_type)?;
    let scales = l.data(&scales)?;
    let zeros = zero_points(l, call.optional(3), dtype, n, blocks)?;
    let weight = l.add(Op::Dequant { axis: 1, block }, &[codes, scales, zeros])?;
    let mut result = super::contraction::product(l, x, weight, false, true)?;
    if let Some(bias) = call.optional(5) {
        let bias = l.data(bias)?;
        result = l.map(Scalar::Add, &[result, bias])?;
    }
    Ok(vec![Value::Data(result)])
}

/// Zero points `[rows, blocks]`: packed codes padded to whole bytes per row, numbers, or the middle of the range.
fn zero_points(
    l: &mut Lowering<'_>,
    given: Option<&Value>,
    dtype: DType,
    rows: usize,
    blocks: usize,
) -> Lowered<ValueId> {
    let shape = [Dim::from(rows), Dim::from(blocks)];
    match given {
        None => {
            let middle = l.number_value(DType::U8, f64::from(1u32 << (dtype.bits() - 1)))?;
            let middle = l.data(&middle)?;
            l.broadcast(middle, &shape)
        }
        Some(zeros) if l.dtype(zeros) == DType::U8 => {
            let per_byte = 8 / dtype.bits();
            let padded = blocks.div_ceil(per_byte) * per_byte;
            let codes = repacked(l, zeros, dtype, vec![rows, padded])?;
            let codes = sliced(&codes, 1, blocks)?;
            l.add(Op::Weight(codes), &[])
        }
        Some(zeros) => {
            let zeros = l.reshape_value(zeros, &shape)?;
            l.data(&zeros)
        }
    }
}

/// `dequant(gather(codes))`: the rows of a quantised table, in blocks along the last axis.
pub(super) fn gather_block_quantized(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let block = usize::try_from(call.attributes.int("block_size", 128)?).ok().filter(|&block| block > 0);
    let block = block.ok_or_else(|| invalid("the block size"))?;
    let bits = call.attributes.int("bits", 4)?;
    let table = call.input(0)?;
    let mut shape: Vec<usize> = l
        .shape(table)
        .iter()
        .map(Dim::as_size)
        .collect::<Option<_>>()
        .ok_or_else(|| invalid("a table of dynamic shape"))?;
    let rank = shape.len();
    let gather_axis = axis_of(call.attributes.int("gather_axis", 0)?, rank)?;
    let quantize_axis = axis_of(call.attributes.int("quantize_axis", 1)?, rank)?;
    if gather_axis != 0 || quantize_axis + 1 != rank || rank < 2 {
        return Err(unsupported("a gather along another axis than 0, or blocks along another than the last"));
    }
    let stored = l.dtype(table);
    let codes = if stored == DType::U8 {
        let dtype = code_type(bits)?;
        shape[rank - 1] = shape[rank - 1].saturating_mul(8 / dtype.bits());
        Value::Weight(repacked(l, table, dtype, shape.clone())?)
    } else {
        table.clone()
    };
    let dtype = l.dtype(&codes);
    let indices = call.input(1)?.clone();
    let rows = l.gather_value(&codes, &indices, 0)?;
    let scales = l.gather_value(call.input(2)?, &indices, 0)?;
    let mut args = vec![l.data(&rows)?, l.data(&scales)?];
    let unsigned = dtype.class() == tpshard_ir::DTypeClass::Uint;
    let zeros = match call.optional(3) {
        Some(zeros) if l.dtype(zeros) == DType::U8 && dtype != DType::U8 => {
            let per_byte = 8 / dtype.bits();
            let blocks = shape[rank - 1].div_ceil(block);
            let mut packed = shape.clone();
            packed[rank - 1] = blocks.div_ceil(per_byte) * per_byte;
            let codes = repacked(l, zeros, dtype, packed)?;
            Some(l.gather_value(&Value::Weight(sliced(&codes, rank - 1, blocks)?), &indices, 0)?)
        }
        Some(zeros) => {
            let zeros = zeros.clone();
            Some(l.gather_value(&zeros, &indices, 0)?)
        }
        None if unsigned && stored == DType::U8 => {
            Some(l.number_value(DType::U8, f64::from(1u32 << (dtype.bits() - 1)))?)
        }
        None => None,
    };
    if let Some(zeros) = zeros {
        let zeros = l.data(&zeros)?;
        let shape = l.graph.ty(args[1]).shape.clone();
        args.push(l.broadcast(zeros, &shape)?);
    }
    let axis = l.graph.ty(args[0]).rank() - 1;
    Ok(vec![Value::Data(l.add(Op::Dequant { axis, block }, &args)?)])
}

/// A scale or zero point laid out over `x`: one for all, one per entry of an axis, or one per block of it.
fn laid_out(l: &mut Lowering<'_>, parameter: &Value, x: ValueId, axis: i64, block: i64) -> Lowered<ValueId> {
    let ty = l.graph.ty(x).clone();
    let own = l.shape(parameter);
    if Dim::product(&own).is_one() && block == 0 {
        let parameter = l.reshape_value(parameter, &[])?;
        return l.data(&parameter);
    }
    let axis = axis_of(axis, ty.rank())?;
    if let ([extent], 0) = (own.as_slice(), block) {
        l.unify(extent, &ty.shape[axis])?;
        let mut shape = vec![Dim::constant(1); ty.rank()];
        shape[axis] = l.current(extent);
        let parameter = l.reshape_value(parameter, &shape)?;
        return l.data(&parameter);
    }
    if block <= 0 || own.len() != ty.rank() {
        return Err(invalid(format!("a parameter of shape {own:?} for {ty}")));
    }
    // Each entry repeated over its block; a last partial block is cut.
    let parameter = l.data(parameter)?;
    let mut apart = own.clone();
    apart.insert(axis + 1, Dim::constant(1));
    let apart_id = l.reshape(parameter, &apart)?;
    let mut stretched = apart.clone();
    stretched[axis + 1] = Dim::constant(block);
    let stretched = l.broadcast(apart_id, &stretched)?;
    let mut joined = own.clone();
    joined[axis] = &own[axis] * &Dim::constant(block);
    let joined = l.reshape(stretched, &joined)?;
    l.slice(joined, axis, Dim::constant(0), ty.shape[axis].clone(), 1)
}

pub(super) fn dequantize(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let axis = call.attributes.int("axis", 1)?;
    let block = call.attributes.int("block_size", 0)?;
    let scale = call.input(1)?.clone();
    let result = match call.attributes.optional_int("output_dtype")? {
        None | Some(0) => l.dtype(&scale),
        Some(code) => crate::tensor_data::dtype_from_onnx(code)?,
    };
    let x = l.data(call.input(0)?)?;
    let ty = l.graph.ty(x).clone();
    if ty.dtype.is_float() {
        return Err(unsupported(format!("codes of {}", ty.dtype)));
    }
    if let Some(value) = blocked(l, call, x, axis, block)? {
        return Ok(vec![Value::Data(l.cast(value, result)?)]);
    }
    let compute = l.dtype(&scale);
    let mut codes = l.cast(x, if ty.dtype == DType::I32 { compute } else { DType::I32 })?;
    if let Some(zero) = call.optional(2).cloned() {
        let zero = laid_out(l, &zero, x, axis, block)?;
        let zero = l.cast(zero, l.graph.ty(codes).dtype)?;
        codes = l.map(Scalar::Sub, &[codes, zero])?;
    }
    let codes = l.cast(codes, compute)?;
    let scale = laid_out(l, &scale, x, axis, block)?;
    let value = l.map(Scalar::Mul, &[codes, scale])?;
    Ok(vec![Value::Data(l.cast(value, result)?)])
}

/// Weights whose scales fit `Op::Dequant`: blocked ones, and matrices with one scale per row or column.
fn blocked(
    l: &mut Lowering<'_>,
    call: &Call<'_>,
    x: ValueId,
    axis: i64,
    block: i64,
) -> Lowered<Option<ValueId>> {
    let ty = l.graph.ty(x).clone();
    if !matches!(l.graph.node(x).op, Op::Weight(_)) || ty.rank() == 0 {
        return Ok(None);
    }
    let shape = l.shape(call.input(1)?);
    let scalar = Dim::product(&shape).is_one();
    let (along, size, target) = if block > 0 {
        (axis_of(axis, ty.rank())?, usize::try_from(block).unwrap_or(usize::MAX), shape.clone())
    } else if ty.rank() == 2 && shape.len() == 1 && !scalar {
        let other = 1 - axis_of(axis, 2)?;
        let mut target = ty.shape.clone();
        target[other] = Dim::constant(1);
        let Some(size) = ty.shape[other].as_size().filter(|&size| size > 0) else { return Ok(None) };
        (other, size, target)
    } else {
        return Ok(None);
    };
    let mut args = vec![x];
    for index in [1, 2] {
        if let Some(parameter) = call.optional(index) {
            let parameter = l.reshape_value(parameter, &target)?;
            args.push(l.data(&parameter)?);
        }
    }
    l.add(Op::Dequant { axis: along, block: size }, &args).map(Some)
}

fn range_of(dtype: DType) -> Lowered<(f64, f64)> {
    let bits = dtype.bits() as i32;
    match dtype.class() {
        tpshard_ir::DTypeClass::Uint if bits <= 32 => Ok((0.0, 2f64.powi(bits) - 1.0)),
        tpshard_ir::DTypeClass::Int if bits <= 32 => Ok((-(2f64.powi(bits - 1)), 2f64.powi(bits - 1) - 1.0)),
        _ => Err(unsupported(format!("quantisation to {dtype}"))),
    }
}

/// `saturate(round(x / scale) + zero)`.
pub(super) fn quantize(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let axis = call.attributes.int("axis", 1)?;
    let block = call.attributes.int("block_size", 0)?;
    call.attributes.ignore("saturate");
    call.attributes.ignore("precision");
    let dtype = match (call.optional(2), call.attributes.optional_int("output_dtype")?) {
        (Some(zero), _) => l.dtype(zero),
        (None, None | Some(0)) => DType::U8,
        (None, Some(code)) => crate::tensor_data::dtype_from_onnx(code)?,
    };
    if dtype.is_packed() {
        return Err(unsupported(format!("quantisation to {dtype}, which is a storage type")));
    }
    let (low, high) = range_of(dtype)?;
    let x = l.data(call.input(0)?)?;
    let scale = call.input(1)?.clone();
    let scale = laid_out(l, &scale, x, axis, block)?;
    let x_data = l.cast(x, l.graph.ty(scale).dtype)?;
    let scaled = l.map(Scalar::Div, &[x_data, scale])?;
    let mut rounded = l.map(Scalar::Round, &[scaled])?;
    if let Some(zero) = call.optional(2).cloned() {
        let zero = laid_out(l, &zero, x, axis, block)?;
        let zero = l.cast(zero, l.graph.ty(rounded).dtype)?;
        rounded = l.map(Scalar::Add, &[rounded, zero])?;
    }
    let bounded = l.map_number(Scalar::Max, rounded, low)?;
    let bounded = l.map_number(Scalar::Min, bounded, high)?;
    Ok(vec![Value::Data(l.cast(bounded, dtype)?)])
}

/// To `u8` with the range of the data, which always holds zero.
pub(super) fn dynamic_quantize(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let x = l.data(call.input(0)?)?;
    let ty = l.graph.ty(x).clone();
    let axes: Vec<usize> = (0..ty.rank()).collect();
    let high = l.reduce(Monoid::Max, x, &axes)?;
    let high = l.map_number(Scalar::Max, high, 0.0)?;
    let low = l.reduce(Monoid::Min, x, &axes)?;
    let low = l.map_number(Scalar::Min, low, 0.0)?;
    let (high, low) = (l.reshape(high, &[])?, l.reshape(low, &[])?);
    let range = l.map(Scalar::Sub, &[high, low])?;
    let scale = l.map_number(Scalar::Div, range, 255.0)?;
    let negative = l.map(Scalar::Neg, &[low])?;
    let zero = l.map(Scalar::Div, &[negative, scale])?;
    let zero = l.map_number(Scalar::Max, zero, 0.0)?;
    let zero = l.map_number(Scalar::Min, zero, 255.0)?;
    let zero = l.map(Scalar::Round, &[zero])?;
    let scaled = l.map(Scalar::Div, &[x, scale])?;
    let rounded = l.map(Scalar::Round, &[scaled])?;
    let shifted = l.map(Scalar::Add, &[rounded, zero])?;
    let bounded = l.map_number(Scalar::Max, shifted, 0.0)?;
    let bounded = l.map_number(Scalar::Min, bounded, 255.0)?;
    let codes = l.cast(bounded, DType::U8)?;
    let zero = l.cast(zero, DType::U8)?;
    Ok(vec![Value::Data(codes), Value::Data(scale), Value::Data(zero)])
}

/// `(a - zero_a) · (b - zero_b)` in `i32`.
pub(super) fn matmul_integer(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let mut operands = Vec::with_capacity(2);
    for (index, zero) in [(0, 2), (1, 3)] {
        let x = l.data(call.input(index)?)?;
        let mut wide = l.cast(x, DType::I32)?;
        if let Some(zero) = call.optional(zero).cloned() {
            let rank = l.graph.ty(x).rank();
            let own = l.shape(&zero);
            // One per row of the first, per column of the second.
            let zero = if own.len() == 1 && !own[0].is_one() && index == 0 && rank >= 2 {
                l.reshape_value(&zero, &[own[0].clone(), Dim::constant(1)])?
            } else if own.len() == 1 && own[0].is_one() {
                l.reshape_value(&zero, &[])?
            } else {
                zero
            };
            let zero = l.data(&zero)?;
            let zero = l.cast(zero, DType::I32)?;
            wide = l.map(Scalar::Sub, &[wide, zero])?;
        }
        operands.push(wide);
    }
    Ok(vec![Value::Data(super::contraction::product(l, operands[0], operands[1], false, false)?)])
}
