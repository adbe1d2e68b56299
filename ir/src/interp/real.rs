//! The reference semantics: real numbers, rounded to the element type after every operation.
//!
//! Floats are computed in `f64` and rounded once; integers are computed wide and wrap as two's complement.

use super::codec::{numbers, reinterpret, round_float, tensor, wrap_integer};
use super::domain::mix;
use super::{Array, Domain, OpError, composite};
use crate::dtype::{DType, DTypeClass, float_to_integer};
use crate::layout::Monoid;
use crate::op::{Op, Scalar};
use crate::tensor::Tensor;
use std::cmp::Ordering;

/// A number: floats in `f64`, integers and `bool` in `i128`, which holds every one of them and their products.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Num {
    Float(f64),
    Int(i128),
}

impl Num {
    /// As a float, rounding large integers.
    pub fn float(self) -> f64 {
        match self {
            Num::Float(x) => x,
            Num::Int(x) => x as f64,
        }
    }

    /// As an integer, truncating and saturating floats; NaN is 0.
    pub fn int(self) -> i128 {
        match self {
            Num::Float(x) => x as i128,
            Num::Int(x) => x,
        }
    }
}

/// The reals.
#[derive(Clone, Copy, Debug, Default)]
pub struct Real;

impl Real {
    /// The tensor that holds an array.
    ///
    /// # Errors
    /// The array is too large.
    pub fn export(&self, array: &Array<Num>) -> Result<Tensor, OpError> {
        tensor(array)
    }
}

impl Domain for Real {
    type Element = Num;

    fn integer(&self, value: i64, dtype: DType) -> Num {
        cast(Num::Int(i128::from(value)), dtype)
    }

    fn real(&self, value: f64, dtype: DType) -> Num {
        cast(Num::Float(value), dtype)
    }

    fn index(&self, element: Num) -> Option<i64> {
        match element {
            Num::Int(x) => i64::try_from(x).ok(),
            Num::Float(_) => None,
        }
    }

    fn truth(&self, element: Num) -> bool {
        element != Num::Int(0)
    }

    fn scalar(&self, function: Scalar, from: DType, to: DType, args: &[Num]) -> Result<Num, OpError> {
        if let (Scalar::Bits(to), &[x]) = (function, args) {
            return reinterpret(x, from, to);
        }
        let wide = match (args, from.class()) {
            (&[x], DTypeClass::Float) => unary_float(function, x.float()),
            (&[x], _) => unary_int(function, x)?,
            (&[a, b], DTypeClass::Float) => binary_float(function, a.float(), b.float()),
            (&[a, b], _) => binary_int(function, from, a.int(), b.int())?,
            (&[condition, a, b], _) => Some(if self.truth(condition) { a } else { b }),
            _ => None,
        };
        wide.map(|x| cast(x, to)).ok_or_else(|| OpError::other(format!("{} of {from}", function.name())))
    }

    fn multiply_add(&self, sum: Num, a: Num, b: Num) -> Num {
        match (sum, a, b) {
            (Num::Int(sum), Num::Int(a), Num::Int(b)) => Num::Int(sum.wrapping_add(a.wrapping_mul(b))),
            _ => Num::Float(sum.float() + a.float() * b.float()),
        }
    }

    fn combine(&self, monoid: Monoid, a: Num, b: Num) -> Num {
        match (a, b) {
            (Num::Int(a), Num::Int(b)) => Num::Int(match monoid {
                Monoid::Sum => a.wrapping_add(b),
                Monoid::Prod => a.wrapping_mul(b),
                Monoid::Max => a.max(b),
                Monoid::Min => a.min(b),
            }),
            _ => {
                let (a, b) = (a.float(), b.float());
                Num::Float(match monoid {
                    Monoid::Sum => a + b,
                    Monoid::Prod => a * b,
                    Monoid::Max => pick(a, b, a >= b),
                    Monoid::Min => pick(a, b, a <= b),
                })
            }
        }
    }

    fn identity(&self, monoid: Monoid, dtype: DType) -> Num {
        let (least, greatest) = bounds(dtype);
        match monoid {
            Monoid::Sum => self.integer(0, dtype),
            Monoid::Prod => self.integer(1, dtype),
            Monoid::Max => least,
            Monoid::Min => greatest,
        }
    }

    fn round(&self, wide: Num, dtype: DType) -> Num {
        match wide {
            Num::Float(x) => Num::Float(round_float(x, dtype)),
            Num::Int(x) => Num::Int(wrap_integer(x, dtype)),
        }
    }

    fn order(&self, a: Num, b: Num) -> Ordering {
        match (a, b) {
            (Num::Int(a), Num::Int(b)) => a.cmp(&b),
            _ => {
                let (a, b) = (a.float(), b.float());
                a.partial_cmp(&b).unwrap_or_else(|| a.is_nan().cmp(&b.is_nan()))
            }
        }
    }

    fn composite(&self, op: &Op, args: &[&Array<Num>]) -> Option<Result<Array<Num>, OpError>> {
        Some(composite::evaluate(op, args))
    }

    fn import(&self, tensor: &Tensor) -> Array<Num> {
        let data = numbers(tensor);
        Array::new(tensor.dtype(), tensor.shape().to_vec(), data)
            .unwrap_or_else(|| unreachable!("a number per element of a tensor"))
    }

    fn random(&self, seed: u64, dtype: DType) -> Num {
        let small = (mix(seed) % 17) as i64;
        self.integer(if dtype.class() == DTypeClass::Uint { small } else { small - 8 }, dtype)
    }
}

/// The least and the greatest element of a type.
fn bounds(dtype: DType) -> (Num, Num) {
    let bits = dtype.bits() as u32;
    match dtype.class() {
        DTypeClass::Float => (Num::Float(f64::NEG_INFINITY), Num::Float(f64::INFINITY)),
        DTypeClass::Int => (Num::Int(-(1 << (bits - 1))), Num::Int((1 << (bits - 1)) - 1)),
        DTypeClass::Uint => (Num::Int(0), Num::Int((1 << bits) - 1)),
        DTypeClass::Bool => (Num::Int(0), Num::Int(1)),
    }
}

/// To type `to`: floats round, floats to integers truncate as [`float_to_integer`] does, integers wrap, `bool` tests for non-zero.
fn cast(x: Num, to: DType) -> Num {
    match (x, to.class()) {
        (Num::Float(x), DTypeClass::Float) => Num::Float(round_float(x, to)),
        // Straight to `f32`: through `f64` it would round twice.
        (Num::Int(x), DTypeClass::Float) if to == DType::F32 => Num::Float(f64::from(x as f32)),
        (Num::Int(x), DTypeClass::Float) => Num::Float(round_float(x as f64, to)),
        (Num::Float(x), DTypeClass::Bool) => Num::Int(i128::from(x != 0.0)),
        (Num::Float(x), _) => Num::Int(float_to_integer(x, to)),
        (Num::Int(x), _) => Num::Int(wrap_integer(x, to)),
    }
}

/// NaN if either is, else `a` or `b`.
fn pick(a: f64, b: f64, first: bool) -> f64 {
    if a.is_nan() || b.is_nan() {
        f64::NAN
    } else if first {
        a
    } else {
        b
    }
}

fn flag(value: bool) -> Num {
    Num::Int(i128::from(value))
}

fn unary_float(function: Scalar, x: f64) -> Option<Num> {
    let y = match function {
        Scalar::Neg => -x,
        Scalar::Abs => x.abs(),
        Scalar::Sign if x == 0.0 => 0.0,
        Scalar::Sign => pick(x.signum(), x, true),
        Scalar::Reciprocal => 1.0 / x,
        Scalar::Sqrt => x.sqrt(),
        Scalar::Rsqrt => 1.0 / x.sqrt(),
        Scalar::Exp => x.exp(),
        Scalar::Log => x.ln(),
        Scalar::Sin => x.sin(),
        Scalar::Cos => x.cos(),
        Scalar::Tan => x.tan(),
        Scalar::Asin => x.asin(),
        Scalar::Acos => x.acos(),
        Scalar::Atan => x.atan(),
        Scalar::Sinh => x.sinh(),
        Scalar::Cosh => x.cosh(),
        Scalar::Asinh => x.asinh(),
        Scalar::Acosh => x.acosh(),
        Scalar::Atanh => x.atanh(),
        Scalar::Tanh => x.tanh(),
        Scalar::Sigmoid if x < 0.0 => x.exp() / (1.0 + x.exp()),
        Scalar::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        Scalar::Erf => erf(x),
        Scalar::Floor => x.floor(),
        Scalar::Ceil => x.ceil(),
        Scalar::Round => x.round_ties_even(),
        Scalar::Cast(_) => x,
        Scalar::IsNan => return Some(flag(x.is_nan())),
        Scalar::IsInf => return Some(flag(x.is_infinite())),
        _ => return None,
    };
    Some(Num::Float(y))
}

fn unary_int(function: Scalar, x: Num) -> Result<Option<Num>, OpError> {
    let value = x.int();
    Ok(Some(Num::Int(match function {
        Scalar::Neg => value.wrapping_neg(),
        Scalar::Abs => value.wrapping_abs(),
        Scalar::Sign => value.signum(),
        Scalar::BitNot => !value,
        Scalar::Not => i128::from(value == 0),
        Scalar::Reciprocal if value == 0 => return Err(OpError::other("division by zero")),
        Scalar::Reciprocal => 1 / value,
        Scalar::Cast(_) | Scalar::Floor | Scalar::Ceil | Scalar::Round => value,
        Scalar::IsNan | Scalar::IsInf => 0,
        _ => return Ok(unary_float(function, x.float())),
    })))
}

fn binary_float(function: Scalar, a: f64, b: f64) -> Option<Num> {
    let y = match function {
        Scalar::Add => a + b,
        Scalar::Sub => a - b,
        Scalar::Mul => a * b,
        Scalar::Div => a / b,
        Scalar::Pow => a.powf(b),
        Scalar::Min => pick(a, b, a <= b),
        Scalar::Max => pick(a, b, a >= b),
        Scalar::Rem => a % b,
        Scalar::Mod => {
            let rest = a % b;
            if rest != 0.0 && (rest < 0.0) != (b < 0.0) { rest + b } else { rest }
        }
        Scalar::Equal => return Some(flag(a == b)),
        Scalar::Less => return Some(flag(a < b)),
        Scalar::LessEqual => return Some(flag(a <= b)),
        Scalar::Greater => return Some(flag(a > b)),
        Scalar::GreaterEqual => return Some(flag(a >= b)),
        _ => return None,
    };
    Some(Num::Float(y))
}

fn binary_int(function: Scalar, dtype: DType, a: i128, b: i128) -> Result<Option<Num>, OpError> {
    if b == 0 && matches!(function, Scalar::Div | Scalar::Mod | Scalar::Rem) {
        return Err(OpError::other("division by zero"));
    }
    let in_width = (0..dtype.bits() as i128).contains(&b);
    Ok(Some(match function {
        Scalar::Add => Num::Int(a.wrapping_add(b)),
        Scalar::Sub => Num::Int(a.wrapping_sub(b)),
        Scalar::Mul => Num::Int(a.wrapping_mul(b)),
        Scalar::Div => Num::Int(a.wrapping_div(b)),
        Scalar::Pow => Num::Int(integer_power(a, b)?),
        Scalar::Min => Num::Int(a.min(b)),
        Scalar::Max => Num::Int(a.max(b)),
        Scalar::Rem => Num::Int(a.wrapping_rem(b)),
        Scalar::Mod => Num::Int(a.wrapping_rem(b).wrapping_add(b).wrapping_rem(b)),
        Scalar::And => flag(a != 0 && b != 0),
        Scalar::Or => flag(a != 0 || b != 0),
        Scalar::Xor => flag((a != 0) != (b != 0)),
        Scalar::BitAnd => Num::Int(a & b),
        Scalar::BitOr => Num::Int(a | b),
        Scalar::BitXor => Num::Int(a ^ b),
        Scalar::ShiftLeft => Num::Int(if in_width { a.wrapping_shl(b as u32) } else { 0 }),
        Scalar::ShiftRight => Num::Int(a >> if in_width { b } else { 127 }),
        Scalar::Equal => flag(a == b),
        Scalar::Less => flag(a < b),
        Scalar::LessEqual => flag(a <= b),
        Scalar::Greater => flag(a > b),
        Scalar::GreaterEqual => flag(a >= b),
        _ => return Ok(None),
    }))
}

/// Wraps modulo 2^128, so every narrower result is right. Negative exponents truncate `1 / base^n`.
fn integer_power(base: i128, exponent: i128) -> Result<i128, OpError> {
    if exponent < 0 {
        return match base {
            0 => Err(OpError::other("zero to a negative power")),
            1 => Ok(1),
            -1 => Ok(if exponent % 2 == 0 { 1 } else { -1 }),
            _ => Ok(0),
        };
    }
    let (mut result, mut square, mut rest) = (1i128, base, exponent);
    while rest > 0 {
        if rest % 2 == 1 {
            result = result.wrapping_mul(square);
        }
        square = square.wrapping_mul(square);
        rest /= 2;
    }
    Ok(result)
}

/// The error function: `2/√π · exp(-x²) · Σ 2ⁿ x²ⁿ⁺¹ / (2n+1)!!`, whose terms all have one sign, and for large `x` the
/// continued fraction of its complement.
pub(crate) fn erf(x: f64) -> f64 {
    let magnitude = x.abs();
    if x.is_nan() || magnitude > 6.0 {
        return if x.is_nan() { x } else { x.signum() };
    }
    let square = x * x;
    if magnitude < 3.0 {
        let (mut term, mut sum, mut n) = (x, x, 0.0);
        while term.abs() > sum.abs() * 1e-18 {
            n += 1.0;
            term *= 2.0 * square / (2.0 * n + 1.0);
            sum += term;
        }
        return std::f64::consts::FRAC_2_SQRT_PI * (-square).exp() * sum;
    }
    let fraction = (1..=60).rev().fold(magnitude, |below, n| magnitude + f64::from(n) / 2.0 / below);
    let complement = (-square).exp() / fraction * std::f64::consts::FRAC_2_SQRT_PI / 2.0;
    x.signum() * (1.0 - complement)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn apply(function: Scalar, dtype: DType, args: &[Num]) -> Result<Num, OpError> {
        Real.scalar(function, dtype, dtype, args)
    }

    #[test]
    fn integers_wrap_and_divide_like_two_s_complement() {
        let i8s = |a, b| [Num::Int(a), Num::Int(b)];
        assert_eq!(apply(Scalar::Add, DType::I8, &i8s(127, 1)).unwrap(), Num::Int(-128));
        assert_eq!(apply(Scalar::Div, DType::I8, &i8s(-7, 2)).unwrap(), Num::Int(-3));
        assert_eq!(apply(Scalar::Div, DType::I8, &i8s(-128, -1)).unwrap(), Num::Int(-128));
        assert_eq!(apply(Scalar::Mod, DType::I8, &i8s(-7, 3)).unwrap(), Num::Int(2));
        assert_eq!(apply(Scalar::Mod, DType::I8, &i8s(7, -3)).unwrap(), Num::Int(-2));
        assert_eq!(apply(Scalar::Rem, DType::I8, &i8s(-7, 3)).unwrap(), Num::Int(-1));
        assert!(apply(Scalar::Div, DType::I8, &i8s(1, 0)).is_err());
        assert_eq!(apply(Scalar::Pow, DType::U8, &i8s(3, 6)).unwrap(), Num::Int(729 % 256));
        assert_eq!(apply(Scalar::ShiftLeft, DType::U8, &i8s(3, 200)).unwrap(), Num::Int(0));
        assert_eq!(apply(Scalar::BitNot, DType::U8, &[Num::Int(1)]).unwrap(), Num::Int(254));
        let cast = |x, to| Real.scalar(Scalar::Cast(to), DType::F32, to, &[Num::Float(x)]).unwrap();
        assert_eq!(cast(-1.9, DType::I32), Num::Int(-1));
        assert_eq!(cast(1e10, DType::I32), Num::Int(i128::from(i32::MIN)));
        assert_eq!(cast(-2.4, DType::U8), Num::Int(254));
        assert_eq!(cast(0.5, DType::Bool), Num::Int(1));
    }

    #[test]
    fn floats_round_to_their_type() {
        let sum = apply(Scalar::Add, DType::F32, &[Num::Float(1.0), Num::Float(1e-9)]).unwrap();
        assert_eq!(sum, Num::Float(1.0));
        let half = apply(Scalar::Mul, DType::F16, &[Num::Float(300.0), Num::Float(300.0)]).unwrap();
        assert_eq!(half, Num::Float(f64::INFINITY));
        let nan = apply(Scalar::Max, DType::F32, &[Num::Float(f64::NAN), Num::Float(1.0)]).unwrap();
        assert!(nan.float().is_nan());
    }

    #[test]
    fn erf_agrees_with_known_values() {
        for (x, y) in [
            (0.0, 0.0),
            (0.5, 0.520_499_877_813_046_5),
            (1.0, 0.842_700_792_949_714_9),
            (2.5, 0.999_593_047_982_555_1),
            (3.0, 0.999_977_909_503_001_4),
            (4.0, 0.999_999_984_582_742_1),
        ] {
            assert!((erf(x) - y).abs() < 1e-14 && (erf(-x) + y).abs() < 1e-14, "{x}: {}", erf(x));
        }
        assert_eq!(erf(f64::INFINITY), 1.0);
    }
}
