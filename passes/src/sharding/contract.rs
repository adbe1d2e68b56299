//! Operations that combine along dims: contractions, reductions, convolution, quantised weights, attention.

use super::pointwise::{aligned, all_but};
use super::{Factor, FactorDim, holds_partials};
use tpshard_ir::op::EinsumSpec;
use tpshard_ir::{Dim, Monoid, Type};

/// One factor per letter; a letter that the result lacks is summed over.
pub(super) fn einsum(spec: &EinsumSpec, args: &[&Type]) -> Vec<Factor> {
    let place = |letters: &[u8], letter: u8| letters.iter().position(|&l| l == letter);
    spec.letters()
        .into_iter()
        .filter_map(|letter| {
            let places: Vec<Option<usize>> = spec.inputs.iter().map(|l| place(l, letter)).collect();
            let (operand, dim) = places.iter().enumerate().find_map(|(i, p)| p.map(|p| (i, p)))?;
            let count = args.get(operand)?.shape.get(dim)?;
            let operands = places.into_iter().map(|p| p.map(FactorDim::whole)).collect();
            match place(&spec.output, letter) {
                Some(dim) => Some(Factor::pass(count, operands, FactorDim::whole(dim))),
                None => partials(args).then(|| Factor::reduced(count, operands, Monoid::Sum)),
            }
        })
        .collect()
}

fn partials(args: &[&Type]) -> bool {
    args.first().is_some_and(|ty| holds_partials(ty.dtype))
}

/// Dims that stay pass, `axes` are combined with the monoid.
pub(super) fn reduce(monoid: Monoid, axes: &[usize], args: &[&Type], result: &Type) -> Vec<Factor> {
    let mut all = all_but(axes, args, result);
    if partials(args) {
        let x = args[0];
        all.extend(axes.iter().filter_map(|&axis| {
            let operands = vec![Some(FactorDim::whole(axis))];
            Some(Factor::reduced(x.shape.get(axis)?, operands, monoid))
        }));
    }
    all
}

/// `y[n, m, …] = Σ_c x[n, c, …] · w[m, c, …]`. With several groups the channels of `x`, `w` and `y` fall into as many
/// runs, and only whole groups can be dealt out.
pub(super) fn conv(groups: usize, args: &[&Type], result: &Type) -> Vec<Factor> {
    let [x, w] = args else { return vec![] };
    let whole = |dim| Some(FactorDim::whole(dim));
    let mut all = vec![Factor::pass(&x.shape[0], vec![whole(0), None], FactorDim::whole(0))];
    if groups == 1 {
        all.push(Factor::pass(&w.shape[0], vec![None, whole(0)], FactorDim::whole(1)));
        all.push(Factor::reduced(&x.shape[1], vec![whole(1), whole(1)], Monoid::Sum));
        return all;
    }
    let count = Dim::from(groups);
    if let Some(channels) = result.shape[1].exact_div(&count) {
        let operands =
            vec![Some(FactorDim::of(1, w.shape[1].clone())), Some(FactorDim::of(0, channels.clone()))];
        all.push(Factor::pass(&count, operands, FactorDim::of(1, channels)));
    }
    all
}

/// Batch and channels.
pub(super) fn pool(args: &[&Type], result: &Type) -> Vec<Factor> {
    let spatial: Vec<usize> = (2..result.rank()).collect();
    all_but(&spatial, args, result)
}

/// `y[i, …] = (q[i, …] - zero[i / block, …]) · scale[i / block, …]`: `axis` is dealt out in whole blocks, or, if it is
/// one block, anyhow, as all of it has the same scale.
pub(super) fn dequant(axis: usize, block: usize, args: &[&Type], result: &Type) -> Vec<Factor> {
    let mut all = all_but(&[axis], args, result);
    let Some(count) = args.get(1).and_then(|scale| scale.shape.get(axis)) else { return all };
    let mut operands = vec![None; args.len()];
    if count.is_one() {
        operands[0] = Some(FactorDim::whole(axis));
        all.push(Factor::pass(&result.shape[axis], operands, FactorDim::whole(axis)));
    } else {
        operands.fill(Some(FactorDim::whole(axis)));
        operands[0] = Some(FactorDim::of(axis, Dim::from(block)));
        all.push(Factor::pass(count, operands, FactorDim::of(axis, Dim::from(block))));
    }
    all
}

/// Batch, query positions and the value dim pass. Heads pass with their KV heads where the map is regular, and always
/// alone over replicated keys and values. Key positions are reduced inside a softmax: only its decomposition splits
/// them.
pub(super) fn attention(kv_of_head: &[u32], args: &[&Type]) -> Vec<Factor> {
    let [q, k, v, rest @ ..] = args else { return vec![] };
    let whole = |dim| Some(FactorDim::whole(dim));
    let with_bias = |dim: usize, inner: &Dim, operands: [Option<FactorDim>; 3]| {
        let mut operands = operands.to_vec();
        operands.extend(
            rest.iter()
                .map(|bias| aligned(bias, 4, dim).map(|found| FactorDim::of(found.dim, inner.clone()))),
        );
        operands
    };
    let one = Dim::constant(1);
    let mut all = vec![Factor::pass(
        &q.shape[0],
        with_bias(0, &one, [whole(0), whole(0), whole(0)]),
        FactorDim::whole(0),
    )];
    if let Some(repeat) = regular_repeat(kv_of_head, &k.shape[1]) {
        let repeat = Dim::from(repeat);
        let heads = FactorDim::of(1, repeat.clone());
        let operands = with_bias(1, &repeat, [Some(heads.clone()), whole(1), whole(1)]);
        all.push(Factor::pass(&k.shape[1], operands, heads));
    }
    let alone = with_bias(1, &one, [whole(1), None, None]);
    all.push(Factor::pass(&q.shape[1], alone, FactorDim::whole(1)));
    all.push(Factor::pass(&q.shape[2], with_bias(2, &one, [whole(2), None, None]), FactorDim::whole(2)));
    let mut value = vec![None; args.len()];
    value[2] = whole(3);
    all.push(Factor::pass(&v.shape[3], value, FactorDim::whole(3)));
    all
}

/// How many query heads share a KV head, if head `i` uses KV head `i / repeat` for all heads.
fn regular_repeat(kv_of_head: &[u32], kv_heads: &Dim) -> Option<usize> {
    let kv_heads = kv_heads.as_size().filter(|&g| g > 0 && kv_of_head.len().is_multiple_of(g))?;
    let repeat = kv_of_head.len() / kv_heads;
    let regular = repeat > 0 && kv_of_head.iter().enumerate().all(|(i, &kv)| kv as usize == i / repeat);
    regular.then_some(repeat)
}
