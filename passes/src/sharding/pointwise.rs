//! Operations that treat positions along some dims independently: `y[i, …] = f(x[i, …], …)` for each such `i`.

use super::{Factor, FactorDim};
use tpshard_ir::Type;

/// The dim of `operand` that NumPy broadcasting aligns with dim `dim` of a result of rank `rank`, unless it is missing
/// or stretched: then every step needs the operand whole.
pub(super) fn aligned(operand: &Type, rank: usize, dim: usize) -> Option<FactorDim> {
    let own = (dim + operand.rank()).checked_sub(rank)?;
    let extent = operand.shape.get(own)?;
    (!extent.is_one()).then(|| FactorDim::whole(own))
}

/// `y[i] = f(x1[i], x2[i], …)`, operands broadcast.
pub(super) fn map(args: &[&Type], result: &Type) -> Vec<Factor> {
    let rank = result.rank();
    (0..rank)
        .map(|dim| {
            let operands = args.iter().map(|ty| aligned(ty, rank, dim)).collect();
            Factor::pass(&result.shape[dim], operands, FactorDim::whole(dim))
        })
        .collect()
}

/// All operands and the result share every dim but `axes`.
pub(super) fn all_but(axes: &[usize], args: &[&Type], result: &Type) -> Vec<Factor> {
    (0..result.rank())
        .filter(|dim| !axes.contains(dim))
        .map(|dim| {
            let operands = vec![Some(FactorDim::whole(dim)); args.len()];
            Factor::pass(&result.shape[dim], operands, FactorDim::whole(dim))
        })
        .collect()
}

/// The dims before `axis` of `x`; the parameters have none of them.
pub(super) fn norm(axis: usize, args: &[&Type], result: &Type) -> Vec<Factor> {
    (0..axis.min(result.rank()))
        .map(|dim| {
            let mut operands = vec![None; args.len()];
            operands[0] = Some(FactorDim::whole(dim));
            Factor::pass(&result.shape[dim], operands, FactorDim::whole(dim))
        })
        .collect()
}

/// All but the last dim, which holds the pairs. `cos` and `sin` broadcast.
pub(super) fn rotary(args: &[&Type], result: &Type) -> Vec<Factor> {
    let rank = result.rank();
    (0..rank.saturating_sub(1))
        .map(|dim| {
            let mut operands = vec![Some(FactorDim::whole(dim))];
            operands.extend(args.iter().skip(1).map(|ty| aligned(ty, rank, dim)));
            Factor::pass(&result.shape[dim], operands, FactorDim::whole(dim))
        })
        .collect()
}
