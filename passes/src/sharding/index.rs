//! Gathers and scatters: indices are global, so an indexed axis stays whole, or is windowed.

use super::{Factor, FactorDim, holds_partials};
use tpshard_ir::{Monoid, Type};

fn whole(dim: usize) -> Option<FactorDim> {
    Some(FactorDim::whole(dim))
}

/// `y[a…, i…, b…] = x[a…, indices[i…], b…]`. Each step of the table axis contributes its rows and zeros elsewhere, so
/// the table axis is summed over; `localise` adds the window.
pub(super) fn gather(axis: usize, windowed: bool, args: &[&Type], result: &Type) -> Vec<Factor> {
    let [x, indices] = args else { return vec![] };
    let mut all = Vec::new();
    for (dim, extent) in x.shape.iter().enumerate() {
        if dim != axis {
            let to = if dim < axis { dim } else { dim + indices.rank() - 1 };
            all.push(Factor::pass(extent, vec![whole(dim), None], FactorDim::whole(to)));
        } else if !windowed && holds_partials(result.dtype) {
            all.push(Factor::reduced(extent, vec![whole(axis), None], Monoid::Sum));
        }
    }
    for (dim, extent) in indices.shape.iter().enumerate() {
        all.push(Factor::pass(extent, vec![None, whole(dim)], FactorDim::whole(axis + dim)));
    }
    all
}

/// `y[i, j] = x[indices[i, j], j]` for axis 0. Off the axis, indices may cover only the start of `x`: those dims stay
/// whole.
pub(super) fn gather_elements(axis: usize, args: &[&Type], result: &Type) -> Vec<Factor> {
    let [x, _] = args else { return vec![] };
    (0..result.rank())
        .filter(|&dim| dim == axis || x.shape[dim] == result.shape[dim])
        .map(|dim| {
            let table = if dim == axis { None } else { whole(dim) };
            Factor::pass(&result.shape[dim], vec![table, whole(dim)], FactorDim::whole(dim))
        })
        .collect()
}

/// `y[b…, i…, c…] = x[b…, indices[b…, i…]…, c…]`.
pub(super) fn gather_nd(batch_dims: usize, args: &[&Type], result: &Type) -> Vec<Factor> {
    let [x, indices] = args else { return vec![] };
    let lead = indices.rank().saturating_sub(1);
    let depth = indices.shape.last().and_then(|d| d.as_size()).unwrap_or(0);
    (0..result.rank())
        .map(|dim| {
            let operands = if dim < batch_dims {
                vec![whole(dim), whole(dim)]
            } else if dim < lead {
                vec![None, whole(dim)]
            } else {
                vec![whole(dim - lead + batch_dims + depth), None]
            };
            Factor::pass(&result.shape[dim], operands, FactorDim::whole(dim))
        })
        .filter(|factor| factor.operands[0].as_ref().is_none_or(|f| f.dim < x.rank()))
        .collect()
}

/// `y = x; y[indices[i, j], j] ← updates[i, j]` for axis 0; dims off the axis that the indices cover wholly pass.
pub(super) fn scatter_elements(axis: usize, args: &[&Type], result: &Type) -> Vec<Factor> {
    let [_, indices, _] = args else { return vec![] };
    (0..result.rank())
        .filter(|&dim| dim != axis && indices.shape[dim] == result.shape[dim])
        .map(|dim| Factor::pass(&result.shape[dim], vec![whole(dim); 3], FactorDim::whole(dim)))
        .collect()
}

/// `y = x; y[indices[i…]…, c…] ← updates[i…, c…]`: the dims `c` pass.
pub(super) fn scatter_nd(args: &[&Type], result: &Type) -> Vec<Factor> {
    let [_, indices, _] = args else { return vec![] };
    let lead = indices.rank().saturating_sub(1);
    let depth = indices.shape.last().and_then(|d| d.as_size()).unwrap_or(0);
    (depth..result.rank())
        .map(|dim| {
            let operands = vec![whole(dim), None, whole(lead + dim - depth)];
            Factor::pass(&result.shape[dim], operands, FactorDim::whole(dim))
        })
        .collect()
}
