//! The field modulo 2^61 - 1, in which a cast from float to integer is not the identity.
//!
//! `tpshard_ir::interp::Field` lets all casts keep their element. An equation that drops a truncation would hold there;
//! here it does not, because truncation is a pseudo-random function like any other.

use crate::symbols::mix;
use std::cmp::Ordering;
use tpshard_ir::interp::{Array, Domain, Field, MODULUS, OpError};
use tpshard_ir::{DType, Monoid, Op, Scalar, Tensor};

#[derive(Clone, Copy, Debug)]
pub(crate) struct Strict;

impl Domain for Strict {
    type Element = u64;

    fn integer(&self, value: i64, dtype: DType) -> u64 {
        Field.integer(value, dtype)
    }

    fn real(&self, value: f64, dtype: DType) -> u64 {
        Field.real(value, dtype)
    }

    fn index(&self, element: u64) -> Option<i64> {
        Field.index(element)
    }

    fn truth(&self, element: u64) -> bool {
        Field.truth(element)
    }

    fn scalar(&self, function: Scalar, from: DType, to: DType, args: &[u64]) -> Result<u64, OpError> {
        if let (Scalar::Cast(_), [x]) = (function, args)
            && from.is_float()
            && to.is_integer()
        {
            return Ok(mix(x ^ 0x7472_756e_6361_7465) % MODULUS);
        }
        Field.scalar(function, from, to, args)
    }

    fn multiply_add(&self, sum: u64, a: u64, b: u64) -> u64 {
        Field.multiply_add(sum, a, b)
    }

    fn combine(&self, monoid: Monoid, a: u64, b: u64) -> u64 {
        Field.combine(monoid, a, b)
    }

    fn identity(&self, monoid: Monoid, dtype: DType) -> u64 {
        Field.identity(monoid, dtype)
    }

    fn round(&self, wide: u64, dtype: DType) -> u64 {
        Field.round(wide, dtype)
    }

    fn order(&self, a: u64, b: u64) -> Ordering {
        Field.order(a, b)
    }

    fn composite(&self, op: &Op, args: &[&Array<u64>]) -> Option<Result<Array<u64>, OpError>> {
        Field.composite(op, args)
    }

    fn import(&self, tensor: &Tensor) -> Array<u64> {
        Field.import(tensor)
    }

    fn random(&self, seed: u64, dtype: DType) -> u64 {
        Field.random(seed, dtype)
    }
}
