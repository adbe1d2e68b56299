//! Casts, also to and from the types that tensors are only stored in: [Cast](https://onnx.ai/onnx/operators/onnx__Cast.html),
//! CastLike and BitCast.
//!
//! The IR's cast rounds to nearest and saturates, as ONNX does by default. `saturate = 0` (8-bit floats, opset 19) and
//! `round_mode` (`e8m0`, opset 24) are put together from the bits of the result.

use crate::error::quote;
use crate::lower::{Call, Lowered, Lowering, Value, invalid, unsupported};
use crate::tensor_data::dtype_from_onnx;
use tpshard_ir::{DType, DTypeClass, Scalar, ValueId};

/// The codes of infinity or NaN that overflow gives without saturation, and the greatest magnitude that does not overflow.
struct Overflow {
    code: f64,
    signed: bool,
    greatest: f64,
}

fn overflow(to: DType) -> Option<Overflow> {
    let (code, signed, greatest) = match to {
        DType::F8E4M3FN => (0x7f as f64, true, 464.0),
        DType::F8E4M3FNUZ => (0x80 as f64, false, 247.0),
        DType::F8E5M2 => (0x7c as f64, true, 61_439.0),
        DType::F8E5M2FNUZ => (0x80 as f64, false, 61_439.0),
        _ => return None,
    };
    Some(Overflow { code, signed, greatest })
}

fn is_narrow(dtype: DType) -> bool {
    dtype.is_packed() || (dtype.is_float() && dtype.bits() == 8)
}

/// Cast since opset 6; earlier ones name the type in text.
pub(super) fn cast(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let to = dtype_from_onnx(call.attributes.required_int("to")?)?;
    Ok(vec![cast_to(l, call, to)?])
}

pub(super) fn cast_like(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let to = l.dtype(call.input(1)?);
    Ok(vec![cast_to(l, call, to)?])
}

fn cast_to(l: &mut Lowering<'_>, call: &Call<'_>, to: DType) -> Lowered<Value> {
    let saturate = call.attributes.bool("saturate", true)?;
    let mode = call.attributes.string("round_mode", "up")?;
    let value = call.input(0)?;
    if l.dtype(value) == to {
        return Ok(value.clone());
    }
    if to == DType::F8E8M0 && mode != "up" {
        let x = l.data(value)?;
        return Ok(Value::Data(power_of_two(l, x, mode)?));
    }
    if !is_narrow(to) {
        return l.cast_value(value, to);
    }
    let x = l.data(value)?;
    Ok(Value::Data(narrow(l, x, to, saturate)?))
}

/// `x` in a storage type. Floats become packed integers without their fraction, and wrap.
pub(super) fn narrow(l: &mut Lowering<'_>, x: ValueId, to: DType, saturate: bool) -> Lowered<ValueId> {
    let from = l.graph.ty(x).dtype;
    if from == to {
        return Ok(x);
    }
    if to.class() != DTypeClass::Float && from.is_float() {
        let whole = l.cast(x, DType::I32)?;
        return l.cast(whole, to);
    }
    let Some(Overflow { code, signed, greatest }) = overflow(to).filter(|_| !saturate) else {
        return l.cast(x, to);
    };
    let wide = l.cast(x, DType::F32)?;
    let near = l.cast(wide, to)?;
    let bits = l.add(tpshard_ir::Op::Map(Scalar::Bits(DType::U8)), &[near])?;
    let size = l.map(Scalar::Abs, &[wide])?;
    let over = l.map_number(Scalar::Greater, size, greatest)?;
    let beyond = l.scalar(DType::U8, code)?;
    let beyond = if signed {
        let negative = l.map_number(Scalar::Less, wide, 0.0)?;
        let below = l.scalar(DType::U8, code + 128.0)?;
        l.map(Scalar::Select, &[negative, below, beyond])?
    } else {
        beyond
    };
    let bits = l.map(Scalar::Select, &[over, beyond, bits])?;
    l.add(tpshard_ir::Op::Map(Scalar::Bits(to)), &[bits])
}

/// `e8m0` by the exponent bits of the float: `down` drops the fraction, `nearest` rounds up from half on.
fn power_of_two(l: &mut Lowering<'_>, x: ValueId, mode: &str) -> Lowered<ValueId> {
    let wide = l.cast(x, DType::F32)?;
    let bits = l.add(tpshard_ir::Op::Map(Scalar::Bits(DType::I32)), &[wide])?;
    let magnitude = l.map_number(Scalar::BitAnd, bits, f64::from(0x7fff_ffff))?;
    let raised = match mode {
        "down" => magnitude,
        "nearest" => l.map_number(Scalar::Add, magnitude, f64::from(1 << 22))?,
        other => return Err(invalid(format!("the round_mode {}", quote(other)))),
    };
    let exponent = l.map_number(Scalar::ShiftRight, raised, 23.0)?;
    // Infinity saturates to the greatest power, NaN has a code of its own.
    let exponent = l.map_number(Scalar::Min, exponent, 254.0)?;
    let code = l.scalar(DType::I32, 255.0)?;
    let lost = l.map(Scalar::IsNan, &[wide])?;
    let exponent = l.map(Scalar::Select, &[lost, code, exponent])?;
    let code = l.cast(exponent, DType::U8)?;
    l.add(tpshard_ir::Op::Map(Scalar::Bits(DType::F8E8M0)), &[code])
}

/// BitCast 26: the same bits as a type of the same width.
pub(super) fn bit_cast(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let to = dtype_from_onnx(call.attributes.required_int("to")?)?;
    let x = l.data(call.input(0)?)?;
    let from = l.graph.ty(x).dtype;
    if from == to {
        return Ok(vec![Value::Data(x)]);
    }
    if from.bits() != to.bits() {
        return Err(unsupported(format!("the bits of {from} as {to}, which are of another width")));
    }
    if to == DType::Bool {
        // Any bit makes it true.
        let zero = l.map_number(Scalar::Equal, x, 0.0)?;
        return Ok(vec![Value::Data(l.map(Scalar::Not, &[zero])?)]);
    }
    Ok(vec![Value::Data(l.add(tpshard_ir::Op::Map(Scalar::Bits(to)), &[x])?)])
}
