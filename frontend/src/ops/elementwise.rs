//! Elementwise operators, <https://onnx.ai/onnx/operators/> (Add, Abs, Where, Cast, …).
//!
//! NumPy broadcasting since opset 7; opset 6 broadcasts only with the attributes `broadcast` and `axis`.

use crate::lower::{Call, Lowered, Lowering, Value, axis_of, invalid, unsupported};
use tpshard_ir::{DTypeClass, Dim, Scalar};

fn scalar_of(op_type: &str) -> Option<Scalar> {
    Some(match op_type {
        "Abs" => Scalar::Abs,
        "Acos" => Scalar::Acos,
        "Acosh" => Scalar::Acosh,
        "Add" | "Sum" => Scalar::Add,
        "And" => Scalar::And,
        "Asin" => Scalar::Asin,
        "Asinh" => Scalar::Asinh,
        "Atan" => Scalar::Atan,
        "Atanh" => Scalar::Atanh,
        "BitwiseAnd" => Scalar::BitAnd,
        "BitwiseNot" => Scalar::BitNot,
        "BitwiseOr" => Scalar::BitOr,
        "BitwiseXor" => Scalar::BitXor,
        "Ceil" => Scalar::Ceil,
        "Cos" => Scalar::Cos,
        "Cosh" => Scalar::Cosh,
        "Div" => Scalar::Div,
        "Equal" => Scalar::Equal,
        "Erf" => Scalar::Erf,
        "Exp" => Scalar::Exp,
        "Floor" => Scalar::Floor,
        "Greater" => Scalar::Greater,
        "GreaterOrEqual" => Scalar::GreaterEqual,
        "IsNaN" => Scalar::IsNan,
        "Less" => Scalar::Less,
        "LessOrEqual" => Scalar::LessEqual,
        "Log" => Scalar::Log,
        "Max" => Scalar::Max,
        "Min" => Scalar::Min,
        "Mul" => Scalar::Mul,
        "Neg" => Scalar::Neg,
        "Not" => Scalar::Not,
        "Or" => Scalar::Or,
        "Reciprocal" => Scalar::Reciprocal,
        "Round" => Scalar::Round,
        "Sigmoid" => Scalar::Sigmoid,
        "Sign" => Scalar::Sign,
        "Sin" => Scalar::Sin,
        "Sinh" => Scalar::Sinh,
        "Sqrt" => Scalar::Sqrt,
        "Sub" => Scalar::Sub,
        "Tan" => Scalar::Tan,
        "Tanh" => Scalar::Tanh,
        "Xor" => Scalar::Xor,
        _ => return None,
    })
}

fn scalar(call: &Call<'_>) -> Lowered<Scalar> {
    scalar_of(&call.node.op_type).ok_or_else(|| unsupported("not an elementwise operator"))
}

pub(super) fn unary(lowering: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    Ok(vec![lowering.elementwise(scalar(call)?, &[call.input(0)?.clone()])?])
}

pub(super) fn binary(lowering: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let (a, b) = operands(lowering, call)?;
    Ok(vec![lowering.elementwise(scalar(call)?, &[a, b])?])
}

/// Both operands; before opset 7 the second is aligned as the attributes say.
fn operands(lowering: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<(Value, Value)> {
    let (a, b) = (call.input(0)?.clone(), call.input(1)?.clone());
    if call.opset() >= 7 || !call.node.domain.is_empty() {
        return Ok((a, b));
    }
    let broadcast = call.attributes.bool("broadcast", false)?;
    let axis = call.attributes.optional_int("axis")?;
    let (Some(axis), true) = (axis, broadcast) else { return Ok((a, b)) };
    let (rank, mut shape) = (lowering.shape(&a).len(), lowering.shape(&b));
    let axis = axis_of(axis, rank)?;
    let trailing =
        rank.checked_sub(axis + shape.len()).ok_or_else(|| invalid("the second operand does not fit"))?;
    shape.extend(std::iter::repeat_n(Dim::constant(1), trailing));
    let b = lowering.reshape_value(&b, &shape)?;
    Ok((a, b))
}

/// Max, Min, Sum of any number of operands.
pub(super) fn variadic(lowering: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let scalar = scalar(call)?;
    let mut values = call.all()?.into_iter();
    let mut result = values.next().ok_or_else(|| invalid("no operands"))?;
    for value in values {
        result = lowering.elementwise(scalar, &[result, value])?;
    }
    Ok(vec![result])
}

pub(super) fn mean(lowering: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let values = call.all()?;
    let count = values.len();
    let mut values = values.into_iter();
    let mut sum = values.next().ok_or_else(|| invalid("no operands"))?;
    for value in values {
        sum = lowering.elementwise(Scalar::Add, &[sum, value])?;
    }
    let count = lowering.number_value(lowering.dtype(&sum), count as f64)?;
    Ok(vec![lowering.elementwise(Scalar::Div, &[sum, count])?])
}

/// The exponent may be of another type than the base since opset 12; the result has the base's.
pub(super) fn pow(lowering: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let (base, exponent) = operands(lowering, call)?;
    let dtype = lowering.dtype(&base);
    if let Some(known) = lowering
        .known(&exponent)
        .filter(|known| known.elements.len() == 1 && known.shape.len() <= lowering.shape(&base).len())
    {
        // Squares are products: exact, cheap, and every executor has them.
        if known.all_equal(1.0) {
            return Ok(vec![base]);
        }
        if known.all_equal(2.0) {
            return Ok(vec![lowering.elementwise(Scalar::Mul, &[base.clone(), base])?]);
        }
    }
    if lowering.dtype(&exponent).is_float() && !dtype.is_float() {
        let wide = tpshard_ir::DType::F64;
        let (a, b) = (lowering.cast_value(&base, wide)?, lowering.cast_value(&exponent, wide)?);
        let power = lowering.elementwise(Scalar::Pow, &[a, b])?;
        return Ok(vec![lowering.cast_value(&power, dtype)?]);
    }
    let exponent = lowering.cast_value(&exponent, dtype)?;
    Ok(vec![lowering.elementwise(Scalar::Pow, &[base, exponent])?])
}

/// `fmod = 1` takes the sign of the dividend, else that of the divisor.
pub(super) fn modulo(lowering: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let scalar = if call.attributes.bool("fmod", false)? { Scalar::Rem } else { Scalar::Mod };
    Ok(vec![lowering.elementwise(scalar, &[call.input(0)?.clone(), call.input(1)?.clone()])?])
}

pub(super) fn bit_shift(lowering: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let scalar = match call.attributes.required_string("direction")? {
        "LEFT" => Scalar::ShiftLeft,
        "RIGHT" => Scalar::ShiftRight,
        other => return Err(invalid(format!("direction {}", crate::error::quote(other)))),
    };
    Ok(vec![lowering.elementwise(scalar, &[call.input(0)?.clone(), call.input(1)?.clone()])?])
}

pub(super) fn select(lowering: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let args = [call.input(0)?.clone(), call.input(1)?.clone(), call.input(2)?.clone()];
    Ok(vec![lowering.elementwise(Scalar::Select, &args)?])
}

/// Either sign can be switched off.
pub(super) fn is_inf(lowering: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let negative = call.attributes.bool("detect_negative", true)?;
    let positive = call.attributes.bool("detect_positive", true)?;
    let x = call.input(0)?.clone();
    if lowering.dtype(&x).class() != DTypeClass::Float {
        return Err(invalid("IsInf of integers"));
    }
    let infinite = lowering.elementwise(Scalar::IsInf, std::slice::from_ref(&x))?;
    let zero = lowering.number_value(lowering.dtype(&x), 0.0)?;
    let side = match (negative, positive) {
        (true, true) => return Ok(vec![infinite]),
        (true, false) => lowering.elementwise(Scalar::Less, &[x, zero])?,
        (false, true) => lowering.elementwise(Scalar::Greater, &[x, zero])?,
        (false, false) => {
            let side = lowering.elementwise(Scalar::Less, &[x.clone(), zero.clone()])?;
            let other = lowering.elementwise(Scalar::GreaterEqual, &[x, zero])?;
            lowering.elementwise(Scalar::And, &[side, other])?
        }
    };
    Ok(vec![lowering.elementwise(Scalar::And, &[infinite, side])?])
}
