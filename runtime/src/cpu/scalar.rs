//! Scalar functions over blocks of elements.

use super::vector::functions;
use tpshard_ir::{DType, Scalar};

/// Functions of `f32` blocks.
pub(crate) struct FloatOp;

impl FloatOp {
    /// `block[i] = scalar(block[i])`.
    #[inline(always)]
    pub(crate) fn unary(scalar: Scalar, block: &mut [f32]) -> Result<(), String> {
        macro_rules! each {
            ($f:expr) => {
                block.iter_mut().for_each(|x| *x = $f(*x))
            };
        }
        match scalar {
            Scalar::Neg => each!(|x: f32| -x),
            Scalar::Abs => each!(f32::abs),
            Scalar::Sign => each!(|x: f32| if x > 0.0 {
                1.0
            } else if x < 0.0 {
                -1.0
            } else {
                x * 0.0 + if x.is_nan() { x } else { 0.0 }
            }),
            Scalar::Reciprocal => each!(|x: f32| 1.0 / x),
            Scalar::Sqrt => each!(f32::sqrt),
            Scalar::Rsqrt => each!(|x: f32| 1.0 / x.sqrt()),
            Scalar::Exp => each!(functions::exp),
            Scalar::Log => each!(functions::log),
            Scalar::Sin => each!(libm::sinf),
            Scalar::Cos => each!(libm::cosf),
            Scalar::Tanh => each!(functions::tanh),
            Scalar::Sigmoid => each!(functions::sigmoid),
            Scalar::Erf => each!(functions::erf),
            Scalar::Floor => each!(f32::floor),
            Scalar::Ceil => each!(f32::ceil),
            Scalar::Round => each!(f32::round_ties_even),
            other => return Err(format!("{} of floats", other.name())),
        }
        Ok(())
    }

    /// `to[i] = scalar(a[i], b[i])`.
    #[inline(always)]
    pub(crate) fn binary(scalar: Scalar, a: &[f32], b: &[f32], to: &mut [f32]) -> Result<(), String> {
        macro_rules! each {
            ($f:expr) => {
                to.iter_mut().zip(a).zip(b).for_each(|((t, &a), &b)| *t = $f(a, b))
            };
        }
        match scalar {
            Scalar::Add => each!(|a, b| a + b),
            Scalar::Sub => each!(|a, b| a - b),
            Scalar::Mul => each!(|a, b| a * b),
            Scalar::Div => each!(|a, b| a / b),
            Scalar::Min => each!(minimum),
            Scalar::Max => each!(maximum),
            Scalar::Pow => power(a, b, to),
            other => return Err(format!("{} of floats", other.name())),
        }
        Ok(())
    }
}

/// Small whole exponents are products: exact where `powf` rounds, and fast.
fn power(a: &[f32], b: &[f32], to: &mut [f32]) {
    let one = |a: f32, b: f32| match b {
        2.0 => a * a,
        3.0 => a * a * a,
        _ => libm::powf(a, b),
    };
    let uniform = b.first().copied().filter(|e| b.iter().all(|x| x.to_bits() == e.to_bits()));
    match uniform {
        Some(2.0) => to.iter_mut().zip(a).for_each(|(t, a)| *t = a * a),
        Some(3.0) => to.iter_mut().zip(a).for_each(|(t, a)| *t = a * a * a),
        _ => to.iter_mut().zip(a).zip(b).for_each(|((t, &a), &b)| *t = one(a, b)),
    }
}

/// NaN if either is.
#[inline(always)]
pub(crate) fn minimum(a: f32, b: f32) -> f32 {
    if a < b || a.is_nan() { a } else { b }
}

/// NaN if either is.
#[inline(always)]
pub(crate) fn maximum(a: f32, b: f32) -> f32 {
    if a > b || a.is_nan() { a } else { b }
}

/// `to[i] = scalar(a[i])`.
pub(crate) fn int_unary(scalar: Scalar, a: &[i64], to: &mut [i64]) -> Result<(), String> {
    let zipped = to.iter_mut().zip(a);
    match scalar {
        Scalar::Neg => zipped.for_each(|(t, a)| *t = a.wrapping_neg()),
        Scalar::Abs => zipped.for_each(|(t, a)| *t = a.wrapping_abs()),
        other => return Err(format!("{} of integers", other.name())),
    }
    Ok(())
}

/// `to[i] = scalar(a[i], b[i])`.
pub(crate) fn int_binary(scalar: Scalar, a: &[i64], b: &[i64], to: &mut [i64]) -> Result<(), String> {
    let zipped = to.iter_mut().zip(a).zip(b);
    match scalar {
        Scalar::Add => zipped.for_each(|((t, a), b)| *t = a.wrapping_add(*b)),
        Scalar::Sub => zipped.for_each(|((t, a), b)| *t = a.wrapping_sub(*b)),
        Scalar::Mul => zipped.for_each(|((t, a), b)| *t = a.wrapping_mul(*b)),
        Scalar::Min => zipped.for_each(|((t, a), b)| *t = *a.min(b)),
        Scalar::Max => zipped.for_each(|((t, a), b)| *t = *a.max(b)),
        other => return Err(format!("{} of integers", other.name())),
    }
    Ok(())
}

/// `to[i] = scalar(a[i], b[i])`.
pub(crate) fn bool_binary(scalar: Scalar, a: &[bool], b: &[bool], to: &mut [bool]) -> Result<(), String> {
    let zipped = to.iter_mut().zip(a).zip(b);
    match scalar {
        Scalar::And => zipped.for_each(|((t, a), b)| *t = a & b),
        Scalar::Or => zipped.for_each(|((t, a), b)| *t = a | b),
        Scalar::Xor => zipped.for_each(|((t, a), b)| *t = a ^ b),
        Scalar::Equal => zipped.for_each(|((t, a), b)| *t = a == b),
        other => return Err(format!("{} of bools", other.name())),
    }
    Ok(())
}

/// Wraps to the range of an integer type.
pub(crate) fn wrap_to(dtype: DType, values: &mut [i64]) {
    macro_rules! wrap {
        ($ty:ty) => {
            values.iter_mut().for_each(|x| *x = i64::from(*x as $ty))
        };
    }
    match dtype {
        DType::I8 => wrap!(i8),
        DType::I16 => wrap!(i16),
        DType::I32 => wrap!(i32),
        DType::U8 => wrap!(u8),
        DType::U16 => wrap!(u16),
        DType::U32 => wrap!(u32),
        _ => {}
    }
}
