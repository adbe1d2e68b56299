//! ONNX Runtime's products and look-ups with weights of 2, 4 or 8 bits, version 1 of
//! [com.microsoft](https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md): MatMulNBits and
//! GatherBlockQuantized.
//!
//! Both files store packed numbers as bytes. A product declares the same bytes anew with their logical type and shape, so
//! that they stay unread and are sliced by block: `x · dequant(q, scales, zeros)ᵀ`. A look-up picks rows of bytes first
//! and unpacks only those.
//!
//! `accuracy_level` 4 lets a kernel round the other operand to 8 bits, and ONNX Runtime's does: [`rounded_to_bytes`] says how,
//! so that results agree with its.

use crate::lower::{Call, Lowered, Lowering, Value, axis_of, invalid, unsupported};
use crate::tensor_data::TensorRef;
use tpshard_ir::op::{EinsumSpec, PadMode, Real};
use tpshard_ir::weight::{WeightExpr, WeightKind};
use tpshard_ir::{DType, Dim, Monoid, Op, Scalar, ValueId};

/// The greatest code of a block that is rounded to 8 bits.
const BYTE_RANGE: f64 = 127.0;

/// The unsigned type of `bits` bits.
fn packed_type(bits: i64) -> Lowered<DType> {
    match bits {
        2 => Ok(DType::U2),
        4 => Ok(DType::U4),
        8 => Ok(DType::U8),
        _ => Err(unsupported(format!("weights of {bits} bits; 2, 4 and 8 are"))),
    }
}

fn size_attribute(value: i64, what: &str) -> Lowered<usize> {
    let size = usize::try_from(value).ok().filter(|size| (1..=1 << 40).contains(size));
    size.ok_or_else(|| invalid(format!("{what} is {value}")))
}

fn block_attribute(value: i64) -> Lowered<usize> {
    let block = size_attribute(value, "block_size")?;
    if block < 16 || !block.is_power_of_two() {
        return Err(invalid(format!("block_size is {block}, not a power of two of at least 16")));
    }
    Ok(block)
}

/// The stored tensor that a value is, whatever shape it was given since.
fn initializer<'a>(lowering: &'a Lowering<'_>, value: &'a Value) -> Option<(&'a str, &'a TensorRef)> {
    let mut expr: &WeightExpr = match value {
        Value::Weight(expr) => expr,
        Value::Known(known) => known.source.as_ref()?,
        _ => return None,
    };
    loop {
        match expr.kind() {
            WeightKind::Reshape { source } => expr = source,
            WeightKind::Initializer { name } => return Some((name, lowering.tensors.get(name)?)),
            _ => return None,
        }
    }
}

/// The bytes of a stored tensor under another type and shape.
fn redeclared(
    lowering: &mut Lowering<'_>,
    value: &Value,
    dtype: DType,
    shape: &[usize],
) -> Lowered<Option<Value>> {
    let Some((name, tensor)) = initializer(lowering, value) else { return Ok(None) };
    let (name, mut tensor) = (name.to_owned(), tensor.clone());
    let count = tpshard_ir::tensor::element_count(shape).map(|count| count as u64);
    let bytes = count.and_then(|count| dtype.byte_len(count));
    if bytes != Some(tensor.byte_len()) {
        let message = format!("{} bytes do not hold {shape:?} of {dtype}", tensor.byte_len());
        return Err(invalid(message).at_value(&name));
    }
    tensor.dtype = dtype;
    tensor.dims = shape.iter().map(|&dim| dim as u64).collect();
    lowering.stored(&name, &tensor).map(Some)
}

/// MatMulNBits: `(A[…, K], B[N, blocks, bytes], scales[, zero_points, g_idx, bias])`.
pub(crate) fn matmul_n_bits(lowering: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let read = &call.attributes;
    let inner = size_attribute(read.required_int("K")?, "K")?;
    let outer = size_attribute(read.required_int("N")?, "N")?;
    let bits = read.int("bits", 4)?;
    let block = block_attribute(read.required_int("block_size")?)?;
    let accuracy_level = read.int("accuracy_level", 0)?;
    if read.int("weight_prepacked", 0)? != 0 {
        return Err(unsupported("weight_prepacked: weights laid out for one kind of GPU"));
    }
    if call.optional(4).is_some() {
        return Err(unsupported("g_idx, rows in another order"));
    }
    let dtype = packed_type(bits)?;
    let blocks = inner.div_ceil(block);
    let padded = redeclared(lowering, call.input(1)?, dtype, &[outer, blocks * block])?;
    let padded = match padded {
        Some(padded) => padded,
        None => Value::Data(computed_bytes(lowering, call.input(1)?, dtype, [outer, blocks * block])?),
    };
    let weight = lowering.slice_value(&padded, 1, &Dim::constant(0), &Dim::from(inner), 1)?;
    let scales = lowering.reshape_value(call.input(2)?, &[Dim::from(outer), Dim::from(blocks)])?;
    let zeros = zero_points(lowering, call.optional(3), dtype, [outer, blocks])?;
    let x = lowering.data(call.input(0)?)?;
    let ty = lowering.type_of(x);
    let Some(last) = ty.shape.last() else { return Err(invalid("A is a scalar")) };
    lowering.unify(last, &Dim::from(inner))?;
    let float_zeros = call.optional(3).is_some_and(|zeros| lowering.dtype(zeros).is_float());
    let rounds = accuracy_level == 4 && rounds_to_bytes(dtype, block) && !float_zeros;
    let (x, scales) = if rounds {
        (rounded_to_bytes(lowering, x, block)?, lowering.cast_value(&scales, DType::F32)?)
    } else {
        (x, scales)
    };
    let computed = lowering.type_of(x).dtype;
    let (weight, scales) = (lowering.data(&weight)?, lowering.data(&scales)?);
    let dense = lowering.add(Op::Dequant { axis: 1, block }, &[weight, scales, zeros])?;
    let dense = lowering.cast(dense, computed)?;
    let mut y = lowering.add(Op::Einsum(rows_times_rows(ty.rank())?), &[x, dense])?;
    if let Some(bias) = call.optional(5) {
        let bias = lowering.data(bias)?;
        let bias = lowering.cast(bias, computed)?;
        y = lowering.map(Scalar::Add, &[y, bias])?;
    }
    Ok(vec![Value::Data(lowering.cast(y, ty.dtype)?)])
}

/// Weights that are computed, one number per byte.
fn computed_bytes(
    lowering: &mut Lowering<'_>,
    value: &Value,
    dtype: DType,
    [outer, padded]: [usize; 2],
) -> Lowered<ValueId> {
    if lowering.dtype(value) != DType::U8 {
        return Err(unsupported(format!("weights of {} that are no initializer", lowering.dtype(value))));
    }
    let bytes = padded * dtype.bits() / 8;
    let bytes = lowering.reshape_value(value, &[Dim::from(outer), Dim::from(bytes)])?;
    let bytes = lowering.data(&bytes)?;
    unpacked(lowering, bytes, dtype.bits())
}

/// The matrices of all experts, `[e, n, k]`, stored as bytes `[e, n, k · bits / 8]` with a scale per row, or per block of
/// a row. The middle of the range is 0.
pub(super) fn packed_matrix(
    lowering: &mut Lowering<'_>,
    bytes: &Value,
    scales: &Value,
    bits: i64,
    block: i64,
) -> Lowered<ValueId> {
    let dtype = packed_type(bits)?;
    let shape = lowering.shape(bytes);
    let sizes: Option<Vec<usize>> = shape.iter().map(Dim::as_size).collect();
    let Some([experts, rows, stored]) = sizes.as_deref() else {
        return Err(invalid(format!("weights {} of experts", lowering.ty(bytes))));
    };
    let inner = stored.saturating_mul(8 / dtype.bits());
    let outer = experts.checked_mul(*rows).ok_or_else(|| invalid("more rows than there can be"))?;
    let block = if block > 0 { block_attribute(block)? } else { inner.max(1) };
    let blocks = inner.div_ceil(block);
    let weight = match redeclared(lowering, bytes, dtype, &[outer, inner])? {
        Some(weight) => lowering.data(&weight)?,
        None => computed_bytes(lowering, bytes, dtype, [outer, inner])?,
    };
    let scales = lowering.reshape_value(scales, &[Dim::from(outer), Dim::from(blocks)])?;
    let scales = lowering.data(&scales)?;
    let zeros = zero_points(lowering, None, dtype, [outer, blocks])?;
    let dense = lowering.add(Op::Dequant { axis: 1, block }, &[weight, scales, zeros])?;
    lowering.reshape(dense, &[Dim::from(*experts), Dim::from(*rows), Dim::from(inner)])
}

/// Whether `accuracy_level` 4 makes ONNX Runtime's kernel for the CPU multiply bytes: for 2 bits it only knows some block
/// sizes, and computes in floating point with the others.
fn rounds_to_bytes(dtype: DType, block: usize) -> bool {
    dtype != DType::U2 || (32..=128).contains(&block)
}

/// `x` as the kernel that multiplies bytes sees it: each block of each row rounded to 8 bits with the block's own scale,
/// `round(x * (127 / max)) * (max / 127)`, half to even, where `max` is the block's greatest magnitude. In `f32`.
///
/// Products that share an operand share its rounded form.
fn rounded_to_bytes(lowering: &mut Lowering<'_>, x: ValueId, block: usize) -> Lowered<ValueId> {
    if let Some(&rounded) = lowering.rounded.get(&(x, block)) {
        return Ok(rounded);
    }
    let shape = lowering.type_of(x).shape;
    let last = shape.len().saturating_sub(1);
    let Some(inner) = shape.last() else { return Err(invalid("A is a scalar")) };
    let blocks = inner.ceil_div(&Dim::from(block));
    let padded = &blocks * &Dim::from(block);
    let mut value = lowering.cast(x, DType::F32)?;
    if padded != *inner {
        let low = vec![Dim::constant(0); shape.len()];
        let mut high = low.clone();
        high[last] = &padded - inner;
        value = lowering.add(Op::Pad { low, high, mode: PadMode::Constant(Real(0.0)) }, &[value])?;
    }
    let mut cut = shape[..last].to_vec();
    cut.extend([blocks, Dim::from(block)]);
    let value = lowering.reshape(value, &cut)?;
    let magnitude = lowering.map(Scalar::Abs, &[value])?;
    let greatest = lowering.reduce(Monoid::Max, magnitude, &[last + 1])?;
    let scale = lowering.map_number(Scalar::Div, greatest, BYTE_RANGE)?;
    let range = lowering.scalar(DType::F32, BYTE_RANGE)?;
    let inverse = lowering.map(Scalar::Div, &[range, greatest])?;
    let empty = lowering.map_number(Scalar::Equal, greatest, 0.0)?;
    let zero = lowering.scalar(DType::F32, 0.0)?;
    let inverse = lowering.map(Scalar::Select, &[empty, zero, inverse])?;
    let codes = lowering.map(Scalar::Mul, &[value, inverse])?;
    let codes = lowering.map(Scalar::Round, &[codes])?;
    let value = lowering.map(Scalar::Mul, &[codes, scale])?;
    let mut joined = shape.clone();
    joined[last] = padded;
    let value = lowering.reshape(value, &joined)?;
    let rounded = lowering.slice(value, last, Dim::constant(0), inner.clone(), 1)?;
    lowering.rounded.insert((x, block), rounded);
    Ok(rounded)
}

/// `[…, k] · [n, k]ᵀ`.
fn rows_times_rows(rank: usize) -> Lowered<EinsumSpec> {
    let lead = b"abcdefgh".get(..rank.saturating_sub(1));
    let mut input = lead.ok_or_else(|| unsupported(format!("a product of rank {rank}")))?.to_vec();
    let mut output = input.clone();
    input.push(b'k');
    output.push(b'n');
    Ok(EinsumSpec { inputs: vec![input, b"nk".to_vec()], output })
}

/// One zero point per scale: packed like the weights with rows of whole bytes, plain, or the middle of the range.
fn zero_points(
    lowering: &mut Lowering<'_>,
    zeros: Option<&Value>,
    dtype: DType,
    [outer, blocks]: [usize; 2],
) -> Lowered<ValueId> {
    let shape = [Dim::from(outer), Dim::from(blocks)];
    let Some(zeros) = zeros else {
        let middle = lowering.scalar(DType::U8, f64::from(1u32 << (dtype.bits() - 1)))?;
        return lowering.broadcast(middle, &shape);
    };
    if lowering.dtype(zeros) != DType::U8 || dtype == DType::U8 {
        let zeros = lowering.reshape_value(zeros, &shape)?;
        return lowering.data(&zeros);
    }
    let per_byte = 8 / dtype.bits();
    let stored = blocks.div_ceil(per_byte) * per_byte;
    if let Some(packed) = redeclared(lowering, zeros, dtype, &[outer, stored])? {
        let packed = lowering.data(&packed)?;
        if stored == blocks {
            return Ok(packed);
        }
        // A row that ends inside a byte cannot be sliced packed.
        let wide = lowering.cast(packed, DType::U8)?;
        return lowering.slice(wide, 1, Dim::constant(0), Dim::from(blocks), 1);
    }
    let bytes = lowering.reshape_value(zeros, &[Dim::from(outer), Dim::from(stored / per_byte)])?;
    let bytes = lowering.data(&bytes)?;
    let wide = unpacked(lowering, bytes, dtype.bits())?;
    lowering.slice(wide, 1, Dim::constant(0), Dim::from(blocks), 1)
}

/// The numbers in bytes `[…, n]`, lowest bits first: `[…, n · 8 / bits]` of `u8`.
fn unpacked(lowering: &mut Lowering<'_>, bytes: ValueId, bits: usize) -> Lowered<ValueId> {
    if bits == 8 {
        return Ok(bytes);
    }
    let mut shape = lowering.type_of(bytes).shape;
    let rank = shape.len();
    let column = lowering.reshape(bytes, &[shape.clone(), vec![Dim::constant(1)]].concat())?;
    let mut parts = Vec::with_capacity(8 / bits);
    for shift in (0..8).step_by(bits) {
        let moved = if shift == 0 {
            column
        } else {
            lowering.map_number(Scalar::ShiftRight, column, shift as f64)?
        };
        parts.push(lowering.map_number(Scalar::BitAnd, moved, f64::from((1u32 << bits) - 1))?);
    }
    let joined = lowering.add(Op::Concat { axis: rank }, &parts)?;
    if let Some(last) = shape.last_mut() {
        *last = &*last * &Dim::from(8 / bits);
    }
    lowering.reshape(joined, &shape)
}

/// How a table of packed numbers is stored.
struct Packing {
    bits: usize,
    signed: bool,
}

/// GatherBlockQuantized: `(data, indices, scales[, zero_points])`.
pub(crate) fn gather_block_quantized(lowering: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let read = &call.attributes;
    let bits = read.int("bits", 4)?;
    let block = block_attribute(read.int("block_size", 128)?)?;
    let (table, indices, scales) = (call.input(0)?, call.input(1)?, call.input(2)?);
    let rank = lowering.shape(table).len();
    let gather_axis = axis_of(read.int("gather_axis", 0)?, rank)?;
    let quantize_axis = axis_of(read.int("quantize_axis", 1)?, rank)?;
    if gather_axis == quantize_axis {
        return Err(invalid("gather_axis and quantize_axis are the same"));
    }
    let packing = match lowering.dtype(table) {
        DType::U8 => Packing { bits: packed_type(bits)?.bits(), signed: false },
        DType::U4 => Packing { bits: 4, signed: false },
        DType::I4 => Packing { bits: 4, signed: true },
        other => return Err(unsupported(format!("a table of {other}; uint8, uint4 and int4 are"))),
    };
    let bytes = lowering.dtype(table) == DType::U8;
    let numbers = rows(lowering, table, indices, gather_axis, &packing)?;
    let scale = lowering.gather_value(scales, indices, gather_axis)?;
    let scale = lowering.data(&scale)?;
    let at = lowering.shape(indices).len();
    let axis =
        if quantize_axis > gather_axis { (quantize_axis + at).saturating_sub(1) } else { quantize_axis };
    let mut args = vec![numbers, scale];
    if let Some(zeros) = call.optional(3) {
        let zeros = rows(lowering, zeros, indices, gather_axis, &packing)?;
        // Rows of zero points end inside a byte where the number of blocks is odd.
        let last = lowering.type_of(scale).rank().saturating_sub(1);
        let length = lowering.type_of(scale).shape[last].clone();
        args.push(lowering.slice(zeros, last, Dim::constant(0), length, 1)?);
    } else if bytes {
        let middle = lowering.scalar(DType::U8, f64::from(1u32 << (packing.bits - 1)))?;
        let shape = lowering.type_of(scale).shape;
        args.push(lowering.broadcast(middle, &shape)?);
    }
    Ok(vec![Value::Data(lowering.add(Op::Dequant { axis, block }, &args)?)])
}

/// The numbers of the rows that `indices` name, one per byte.
fn rows(
    lowering: &mut Lowering<'_>,
    table: &Value,
    indices: &Value,
    axis: usize,
    packing: &Packing,
) -> Lowered<ValueId> {
    let ty = lowering.ty(table);
    let last = ty.rank().saturating_sub(1);
    let mut table = table.clone();
    let mut packed = ty.dtype == DType::U8;
    if packed && packing.bits < 8 && axis == last {
        return Err(invalid("gather_axis is the axis along which numbers are packed"));
    }
    // Numbers of a packed type are picked as bytes where rows are whole bytes.
    let sizes: Option<Vec<usize>> = ty.shape.iter().map(Dim::as_size).collect();
    if let (false, Some(mut sizes)) = (packed, sizes)
        && axis != last
        && sizes.last().is_some_and(|size| size % 2 == 0)
    {
        if let Some(size) = sizes.last_mut() {
            *size /= 2;
        }
        if let Some(bytes) = redeclared(lowering, &table, DType::U8, &sizes)? {
            (table, packed) = (bytes, true);
        }
    }
    if !packed {
        let data = lowering.data(&table)?;
        table = Value::Data(lowering.cast(data, if packing.signed { DType::I8 } else { DType::U8 })?);
    }
    let picked = lowering.gather_value(&table, indices, axis)?;
    let picked = lowering.data(&picked)?;
    if !packed {
        return Ok(picked);
    }
    let numbers = unpacked(lowering, picked, packing.bits)?;
    if !packing.signed {
        return Ok(numbers);
    }
    // Sign extension: (n ^ 8) - 8.
    let numbers = lowering.cast(numbers, DType::I8)?;
    let flipped = lowering.map_number(Scalar::BitXor, numbers, 8.0)?;
    lowering.map_number(Scalar::Sub, flipped, 8.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_contract_the_last_dims() {
        assert_eq!(rows_times_rows(1).unwrap().to_string(), "k,nk->n");
        assert_eq!(rows_times_rows(3).unwrap().to_string(), "abk,nk->abn");
        assert!(rows_times_rows(12).is_err());
    }

    #[test]
    fn sizes_that_are_none_are_refused() {
        assert!(block_attribute(24).is_err() && block_attribute(8).is_err() && block_attribute(-32).is_err());
        assert_eq!(block_attribute(32).unwrap(), 32);
        assert!(packed_type(3).is_err() && size_attribute(0, "K").is_err());
    }
}
