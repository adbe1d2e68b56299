//! Transposes disappear into the index letters of einsums, and reshapes that merge dims move down past contractions
//! and maps until they meet the reshape that splits the dims again. What remains shows batch and sequence as dims of
//! their own, which is where activations are split.

use super::engine::{Rewriter, Rule};
use std::ops::Range;
use tpshard_ir::dim::Dim;
use tpshard_ir::op::EinsumSpec;
use tpshard_ir::weight::WeightKind;
use tpshard_ir::{Op, ValueId};

pub(super) const RULES: [Rule; 5] = [
    Rule { name: "einsum-transpose", apply: einsum_transpose },
    Rule { name: "einsum-weight-transpose", apply: einsum_weight_transpose },
    Rule { name: "transpose-einsum", apply: transpose_einsum },
    Rule { name: "einsum-merge", apply: einsum_merge },
    Rule { name: "map-merge", apply: map_merge },
];

/// einsum(transpose(x), y) = einsum'(x, y)
fn einsum_transpose(r: &mut Rewriter<'_>, v: ValueId) -> Option<ValueId> {
    let Op::Einsum(spec) = r.op(v) else { return None };
    let (mut spec, mut args) = (spec.clone(), r.args(v).to_vec());
    let i = args.iter().position(|&a| matches!(r.op(a), Op::Transpose { .. }))?;
    let Op::Transpose { perm } = r.op(args[i]) else { return None };
    spec.inputs[i] = untransposed(&spec.inputs[i], perm);
    args[i] = r.arg(args[i], 0);
    r.make(Op::Einsum(spec), &args).ok()
}

/// The letters of `x` if those of `transpose(x, perm)` are `letters`.
fn untransposed(letters: &[u8], perm: &[usize]) -> Vec<u8> {
    let mut result = letters.to_vec();
    perm.iter().zip(letters).for_each(|(&p, &letter)| result[p] = letter);
    result
}

/// The same for weights whose expression ends in a transpose, so that a tied weight is one leaf.
fn einsum_weight_transpose(r: &mut Rewriter<'_>, v: ValueId) -> Option<ValueId> {
    let Op::Einsum(spec) = r.op(v) else { return None };
    let (mut spec, mut args) = (spec.clone(), r.args(v).to_vec());
    for i in 0..args.len() {
        let Op::Weight(expr) = r.op(args[i]) else { continue };
        let WeightKind::Transpose { source, perm } = expr.kind() else { continue };
        spec.inputs[i] = untransposed(&spec.inputs[i], perm);
        args[i] = r.make(Op::Weight(source.clone()), &[]).ok()?;
        return r.make(Op::Einsum(spec), &args).ok();
    }
    None
}

/// transpose(einsum(x, y)) = einsum'(x, y), where nothing else needs the einsum
fn transpose_einsum(r: &mut Rewriter<'_>, v: ValueId) -> Option<ValueId> {
    let Op::Transpose { perm } = r.op(v) else { return None };
    let inner = r.arg(v, 0);
    let Op::Einsum(spec) = r.op(inner) else { return None };
    if !r.used_once(inner) {
        return None;
    }
    let mut spec = spec.clone();
    spec.output = perm.iter().map(|&p| spec.output[p]).collect();
    let args = r.args(inner).to_vec();
    r.make(Op::Einsum(spec), &args).ok()
}

/// Dims of a reshape that correspond: `from` of the operand against `to` of the result.
pub(super) struct DimGroup {
    pub(super) from: Range<usize>,
    pub(super) to: Range<usize>,
}

/// The finest correspondence between the dims of two shapes with equal element counts; `None` if symbols hide it.
pub(super) fn dim_groups(from: &[Dim], to: &[Dim]) -> Option<Vec<DimGroup>> {
    let mut groups = Vec::new();
    let (mut i, mut j) = (0, 0);
    while i < from.len() || j < to.len() {
        let (i0, j0) = (i, j);
        // A lone extent 1 stands for nothing on the other side.
        if i < from.len() && from[i].is_one() && to.get(j).is_none_or(|d| !d.is_one()) {
            i += 1;
        } else if j < to.len() && to[j].is_one() && from.get(i).is_none_or(|d| !d.is_one()) {
            j += 1;
        } else {
            let (mut left, mut right) = (from.get(i)?.clone(), to.get(j)?.clone());
            (i, j) = (i + 1, j + 1);
            while left != right {
                if right.exact_div(&left).is_some() && i < from.len() {
                    left = left * &from[i];
                    i += 1;
                } else if left.exact_div(&right).is_some() && j < to.len() {
                    right = right * &to[j];
                    j += 1;
                } else {
                    return None;
                }
            }
        }
        groups.push(DimGroup { from: i0..i, to: j0..j });
    }
    Some(groups)
}

/// The groups of a reshape that only merges dims: every result dim is made of one or more operand dims.
fn merging(r: &Rewriter<'_>, v: ValueId) -> Option<(ValueId, Vec<DimGroup>)> {
    let Op::Reshape { shape } = r.op(v) else { return None };
    let x = r.arg(v, 0);
    let groups = dim_groups(&r.ty(x).shape, shape)?;
    let merges = groups.iter().all(|g| g.to.len() == 1 && !g.from.is_empty());
    (merges && groups.iter().any(|g| g.from.len() > 1)).then_some((x, groups))
}

/// einsum(reshape(x), y) = reshape(einsum'(x, y)), where the reshape merges dims that stay free in the result
fn einsum_merge(r: &mut Rewriter<'_>, v: ValueId) -> Option<ValueId> {
    let Op::Einsum(spec) = r.op(v) else { return None };
    let spec = spec.clone();
    let args = r.args(v).to_vec();
    for i in 0..args.len() {
        let Some((x, groups)) = merging(r, args[i]) else { continue };
        let Some(split) = split_letters(&spec, i, &groups) else { continue };
        let shape = r.ty(v).shape.clone();
        let mut operands = args.clone();
        operands[i] = x;
        let inner = r.make(Op::Einsum(split), &operands).ok()?;
        return r.make(Op::Reshape { shape }, &[inner]).ok();
    }
    None
}

/// `spec` with the letters of merged dims of operand `operand` replaced by one letter per unmerged dim.
fn split_letters(spec: &EinsumSpec, operand: usize, groups: &[DimGroup]) -> Option<EinsumSpec> {
    let mut used = spec.letters();
    let mut split = spec.clone();
    let mut letters = Vec::new();
    for (group, &letter) in groups.iter().zip(&spec.inputs[operand]) {
        if group.from.len() == 1 {
            letters.push(letter);
            continue;
        }
        let elsewhere = spec.inputs.iter().enumerate().any(|(j, l)| j != operand && l.contains(&letter));
        let place = split.output.iter().position(|&l| l == letter)?;
        if elsewhere {
            return None;
        }
        let mut fresh = vec![letter];
        for _ in 1..group.from.len() {
            let letter = (b'a'..=b'z').chain(b'A'..=b'Z').find(|l| !used.contains(l))?;
            used.push(letter);
            fresh.push(letter);
        }
        split.output.splice(place..=place, fresh.iter().copied());
        letters.extend(fresh);
    }
    split.inputs[operand] = letters;
    Some(split)
}

/// f(reshape(x), y) = reshape(f(x, y')), where the reshape merges dims along which y does not vary, or y is reshaped
/// in the same way
fn map_merge(r: &mut Rewriter<'_>, v: ValueId) -> Option<ValueId> {
    let Op::Map(scalar) = *r.op(v) else { return None };
    let args = r.args(v).to_vec();
    let shape = r.ty(v).shape.clone();
    for &arg in &args {
        if r.ty(arg).shape != shape {
            continue;
        }
        let Some((x, groups)) = merging(r, arg) else { continue };
        let source = r.ty(x).shape.clone();
        let Some(operands) =
            args.iter().map(|&a| unmerged(r, a, &source, &shape, &groups)).collect::<Option<Vec<ValueId>>>()
        else {
            continue;
        };
        let inner = r.make(Op::Map(scalar), &operands).ok()?;
        return r.make(Op::Reshape { shape }, &[inner]).ok();
    }
    None
}

/// The operand that broadcasts against the unmerged shape `source` as `operand` does against `shape`.
fn unmerged(
    r: &mut Rewriter<'_>,
    operand: ValueId,
    source: &[Dim],
    shape: &[Dim],
    groups: &[DimGroup],
) -> Option<ValueId> {
    if let Op::Reshape { .. } = r.op(operand) {
        let inner = r.arg(operand, 0);
        if r.ty(operand).shape == shape && r.ty(inner).shape == source {
            return Some(inner);
        }
    }
    let own = r.ty(operand).shape.clone();
    let offset = shape.len() - own.len();
    let mut unmerged = Vec::new();
    for (group, dim) in groups.iter().zip(shape).skip(offset).map(|(g, _)| g).zip(&own) {
        if group.from.len() == 1 || dim.is_one() {
            unmerged.push(dim.clone());
            unmerged.extend((1..group.from.len()).map(|_| Dim::constant(1)));
        } else {
            return None;
        }
    }
    if unmerged == own { Some(operand) } else { r.make(Op::Reshape { shape: unmerged }, &[operand]).ok() }
}
