//! Leaves have no operands: every dim of the result is a factor of its own.

use super::{Factor, FactorDim};
use tpshard_ir::{Op, Type};

pub(super) fn factors(op: &Op, result: &Type) -> Vec<Factor> {
    // A packed literal has no element boundaries to cut at.
    if matches!(op, Op::Literal(literal) if literal.0.dtype().is_packed()) {
        return vec![];
    }
    result
        .shape
        .iter()
        .enumerate()
        .map(|(dim, extent)| Factor::pass(extent, vec![], FactorDim::whole(dim)))
        .collect()
}
