//! The integers modulo `p = 2^61 - 1`: an exact stand-in for the reals, in which equal programs give equal elements.
//!
//! Sums, products and quotients are those of the field. Every other function is a fixed pseudo-random function of its
//! name and operands, so that only equalities that hold for any such function survive. Finite floats `m · 2^e` stand for
//! themselves (2 has an inverse), infinities and NaN for pseudo-random elements, and integer `-k` for `p - k`, so that
//! indices keep their meaning; all numeric types are the same field and casts between them change nothing.

use super::domain::mix;
use super::{Array, Domain, OpError, codec};
use crate::dtype::{DType, DTypeClass};
use crate::interp::real::Num;
use crate::layout::Monoid;
use crate::op::{Op, Scalar};
use crate::tensor::Tensor;
use std::cmp::Ordering;

/// The number of elements.
pub const MODULUS: u64 = (1 << 61) - 1;

/// The integers modulo [`MODULUS`]; elements are canonical, below it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Field;

/// `value` modulo [`MODULUS`]: as 2^61 is 1, its digits of 61 bits add up.
fn reduce(value: u128) -> u64 {
    const MASK: u128 = MODULUS as u128;
    let once = (value & MASK) + (value >> 61);
    let twice = ((once & MASK) + (once >> 61)) as u64;
    if twice >= MODULUS { twice - MODULUS } else { twice }
}

fn add(a: u64, b: u64) -> u64 {
    reduce(u128::from(a) + u128::from(b))
}

fn negate(a: u64) -> u64 {
    reduce(u128::from(MODULUS - a % MODULUS))
}

fn multiply(a: u64, b: u64) -> u64 {
    reduce(u128::from(a) * u128::from(b))
}

fn power(base: u64, mut exponent: u64) -> u64 {
    let (mut result, mut square) = (1, base % MODULUS);
    while exponent > 0 {
        if exponent % 2 == 1 {
            result = multiply(result, square);
        }
        square = multiply(square, square);
        exponent /= 2;
    }
    result
}

/// By Fermat's little theorem; the inverse of 0 is 0.
fn inverse(a: u64) -> u64 {
    power(a, MODULUS - 2)
}

/// The integer of least magnitude that an element stands for.
fn signed(a: u64) -> i64 {
    if a <= MODULUS / 2 { a as i64 } else { -((MODULUS - a) as i64) }
}

fn from_integer(value: i128) -> u64 {
    value.rem_euclid(i128::from(MODULUS)) as u64
}

/// `m · 2^e` for a finite float, a pseudo-random element for the others.
fn from_float(value: f64) -> u64 {
    if !value.is_finite() {
        let name = if value.is_nan() { "nan" } else { "inf" };
        let element = scramble(name, &[]);
        return if value == f64::NEG_INFINITY { negate(element) } else { element };
    }
    let bits = value.to_bits();
    let exponent = ((bits >> 52) & 0x7ff) as i64;
    let fraction = bits & ((1 << 52) - 1);
    let mantissa = if exponent == 0 { fraction } else { fraction | 1 << 52 };
    // 2^61 = 1, so exponents count modulo 61.
    let scale = power(2, (exponent.max(1) - 1075).rem_euclid(61) as u64);
    let magnitude = multiply(mantissa, scale);
    if value < 0.0 { negate(magnitude) } else { magnitude }
}

/// A fixed pseudo-random function of a name and operands.
fn scramble(name: &str, args: &[u64]) -> u64 {
    let named = name.bytes().fold(0x7470_7368_6172_6421, |state, byte| mix(state ^ u64::from(byte)));
    args.iter().fold(named, |state, &arg| mix(state ^ mix(arg))) % MODULUS
}

impl Domain for Field {
    type Element = u64;

    fn integer(&self, value: i64, dtype: DType) -> u64 {
        if dtype == DType::Bool { u64::from(value != 0) } else { from_integer(i128::from(value)) }
    }

    fn real(&self, value: f64, dtype: DType) -> u64 {
        if dtype == DType::Bool { u64::from(value != 0.0) } else { from_float(value) }
    }

    fn index(&self, element: u64) -> Option<i64> {
        Some(signed(element))
    }

    fn truth(&self, element: u64) -> bool {
        element != 0
    }

    fn scalar(&self, function: Scalar, from: DType, _to: DType, args: &[u64]) -> Result<u64, OpError> {
        match *args {
            [x] => Ok(unary(function, x)),
            [a, b] => Ok(binary(function, from, a, b)),
            [condition, a, b] => Ok(if condition == 0 { b } else { a }),
            _ => Err(OpError::other(format!("{} of {} operands", function.name(), args.len()))),
        }
    }

    fn multiply_add(&self, sum: u64, a: u64, b: u64) -> u64 {
        add(sum, multiply(a, b))
    }

    fn combine(&self, monoid: Monoid, a: u64, b: u64) -> u64 {
        match monoid {
            Monoid::Sum => add(a, b),
            Monoid::Prod => multiply(a, b),
            Monoid::Max => a.max(b),
            Monoid::Min => a.min(b),
        }
    }

    fn identity(&self, monoid: Monoid, dtype: DType) -> u64 {
        match monoid {
            Monoid::Sum | Monoid::Max => 0,
            Monoid::Prod => 1,
            Monoid::Min => self.round(MODULUS - 1, dtype),
        }
    }

    fn round(&self, wide: u64, dtype: DType) -> u64 {
        if dtype == DType::Bool { u64::from(wide != 0) } else { wide }
    }

    fn order(&self, a: u64, b: u64) -> Ordering {
        a.cmp(&b)
    }

    fn composite(&self, _op: &Op, _args: &[&Array<u64>]) -> Option<Result<Array<u64>, OpError>> {
        None
    }

    fn import(&self, tensor: &Tensor) -> Array<u64> {
        let element = |x: Num| match x {
            Num::Float(x) => from_float(x),
            Num::Int(x) => from_integer(x),
        };
        let data = codec::numbers(tensor).into_iter().map(element).collect();
        Array::new(tensor.dtype(), tensor.shape().to_vec(), data)
            .unwrap_or_else(|| unreachable!("an element per element of a tensor"))
    }

    fn random(&self, seed: u64, dtype: DType) -> u64 {
        match dtype.class() {
            DTypeClass::Bool => mix(seed) % 2,
            DTypeClass::Float | DTypeClass::Int | DTypeClass::Uint => mix(seed) % MODULUS,
        }
    }
}

fn unary(function: Scalar, x: u64) -> u64 {
    match function {
        Scalar::Neg => negate(x),
        Scalar::Reciprocal => inverse(x),
        Scalar::Cast(DType::Bool) => u64::from(x != 0),
        Scalar::Cast(_) => x,
        Scalar::Not => u64::from(x == 0),
        Scalar::IsNan | Scalar::IsInf => scramble(function.name(), &[x]) % 2,
        _ => scramble(function.name(), &[x]),
    }
}

fn binary(function: Scalar, from: DType, a: u64, b: u64) -> u64 {
    match function {
        Scalar::Add => add(a, b),
        Scalar::Sub => add(a, negate(b)),
        Scalar::Mul => multiply(a, b),
        // Integers divide as integers, because quotients become indices.
        Scalar::Div if from.is_integer() => {
            from_integer(i128::from(signed(a).checked_div(signed(b)).unwrap_or(0)))
        }
        Scalar::Div => multiply(a, inverse(b)),
        Scalar::Mod if from.is_integer() && b != 0 => {
            let (a, b) = (signed(a), signed(b));
            from_integer(i128::from(((a % b) + b) % b))
        }
        Scalar::Rem if from.is_integer() && b != 0 => from_integer(i128::from(signed(a) % signed(b))),
        // Small powers are products: x² = x · x has to hold.
        Scalar::Pow if signed(b).unsigned_abs() <= 64 => {
            let magnitude = power(a, signed(b).unsigned_abs());
            if signed(b) < 0 { inverse(magnitude) } else { magnitude }
        }
        Scalar::Min => a.min(b),
        Scalar::Max => a.max(b),
        Scalar::And => u64::from(a != 0 && b != 0),
        Scalar::Or => u64::from(a != 0 || b != 0),
        Scalar::Xor => u64::from((a != 0) != (b != 0)),
        Scalar::Equal => u64::from(a == b),
        Scalar::Less => u64::from(a < b),
        Scalar::LessEqual => u64::from(a <= b),
        Scalar::Greater => u64::from(a > b),
        Scalar::GreaterEqual => u64::from(a >= b),
        _ => scramble(function.name(), &[a, b]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_a_field() {
        for seed in 0..50 {
            let [a, b, c] = [1, 2, 3].map(|k| Field.random(seed * 3 + k, DType::F32));
            assert_eq!(multiply(a, inverse(a)), 1);
            assert_eq!(add(a, negate(a)), 0);
            assert_eq!(multiply(a, add(b, c)), add(multiply(a, b), multiply(a, c)));
            assert_eq!(binary(Scalar::Div, DType::F32, multiply(a, b), b), a);
        }
        assert_eq!(inverse(0), 0);
        assert_eq!(negate(0), 0);
    }

    #[test]
    fn floats_and_indices_stand_for_themselves() {
        assert_eq!(from_float(3.0), 3);
        assert_eq!(multiply(from_float(0.5), 2), 1);
        assert_eq!(add(from_float(0.25), from_float(0.5)), from_float(0.75));
        assert_eq!(from_float(-3.0), from_integer(-3));
        assert_eq!(from_float(-0.0), 0);
        assert_eq!(Field.index(from_integer(-7)), Some(-7));
        assert_eq!(unary(Scalar::Neg, from_float(f64::INFINITY)), from_float(f64::NEG_INFINITY));
    }

    #[test]
    fn functions_are_fixed_and_distinct() {
        assert_eq!(unary(Scalar::Exp, 5), unary(Scalar::Exp, 5));
        assert_ne!(unary(Scalar::Exp, 5), unary(Scalar::Exp, 6));
        assert_ne!(unary(Scalar::Exp, 5), unary(Scalar::Tanh, 5));
        assert_ne!(binary(Scalar::Pow, DType::F32, 5, 1000), binary(Scalar::Pow, DType::F32, 1000, 5));
        assert_eq!(binary(Scalar::Pow, DType::F32, 5, 2), 25);
    }
}
