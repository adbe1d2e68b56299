//! Fused projections: `slice_n(x · W + b) = x · slice_n W + slice_n b`. The slice of a weight is a lazy expression,
//! so each part of a fused projection becomes a projection of its own that can be split by its own heads.
//!
//! A slice is pushed only if it ends in weights and if the fused result is used by disjoint slices alone: then no
//! work is done twice.

use super::contraction::dim_groups;
use super::engine::{Rewriter, Rule};
use tpshard_ir::dim::Dim;
use tpshard_ir::weight::WeightExpr;
use tpshard_ir::{Op, ValueId};

pub(super) const RULES: [Rule; 1] = [Rule { name: "slice-into-weights", apply: slice_into_weights }];

/// A constant run of one axis.
#[derive(Clone, Copy)]
struct Cut {
    axis: usize,
    start: usize,
    length: usize,
}

fn cut_of(r: &Rewriter<'_>, v: ValueId) -> Option<Cut> {
    let Op::Slice { axis, start, length, step: 1 } = r.op(v) else { return None };
    Some(Cut { axis: *axis, start: start.as_size()?, length: length.as_size()? })
}

fn slice_into_weights(r: &mut Rewriter<'_>, v: ValueId) -> Option<ValueId> {
    let cut = cut_of(r, v)?;
    let x = r.arg(v, 0);
    if let Op::Weight(expr) = r.op(x) {
        let part = part_of(expr, cut)?;
        return r.make(Op::Weight(part), &[]).ok();
    }
    if !only_disjoint_slices(r, x, cut.axis) || !reaches_weights(r, x, cut.axis, 0) {
        return None;
    }
    push(r, x, cut)
}

/// Part of a weight, if it falls on whole bytes: several entries of a packed type share one.
fn part_of(expr: &WeightExpr, cut: Cut) -> Option<WeightExpr> {
    let per_byte = (8 / expr.dtype().bits().max(1)).max(1);
    let inner: usize = expr.shape().get(cut.axis + 1..)?.iter().product();
    let whole = |entries: usize| entries.saturating_mul(inner).is_multiple_of(per_byte);
    if !whole(cut.start) || !whole(cut.length) {
        return None;
    }
    expr.slice(cut.axis, cut.start, cut.length).ok()
}

/// True if every use of `x` is a slice along `axis`, and no two overlap.
fn only_disjoint_slices(r: &Rewriter<'_>, x: ValueId, axis: usize) -> bool {
    let Some(cuts) = r.users(x).iter().map(|&u| cut_of(r, u)).collect::<Option<Vec<Cut>>>() else {
        return false;
    };
    let mut runs: Vec<(usize, usize)> = cuts.iter().map(|c| (c.start, c.start + c.length)).collect();
    runs.sort_unstable();
    cuts.iter().all(|c| c.axis == axis) && runs.windows(2).all(|w| w[0].1 <= w[1].0) && !r.is_output(x)
}

/// How many operations lie between a slice and the weights at most.
const REACH: usize = 8;

/// True if a cut of `axis` of `x` can be pushed until it meets weights only.
fn reaches_weights(r: &Rewriter<'_>, x: ValueId, axis: usize, depth: usize) -> bool {
    if depth > REACH {
        return false;
    }
    let once = |a: ValueId| r.used_once(a) && !r.is_output(a);
    match r.op(x) {
        Op::Weight(_) | Op::Literal(_) => true,
        Op::Einsum(_) => einsum_operand(r, x, axis).is_some_and(|(i, axis)| {
            is_constant(r, r.arg(x, i)) && reaches_weights(r, r.arg(x, i), axis, depth + 1)
        }),
        Op::Dequant { axis: blocked, .. } => *blocked != axis && r.args(x).iter().all(|&a| is_constant(r, a)),
        Op::Map(_) => {
            let rank = r.ty(x).rank();
            r.args(x).iter().all(|&a| match operand_axis(r, a, rank, axis) {
                Some(inner) => (is_constant(r, a) || once(a)) && reaches_weights(r, a, inner, depth + 1),
                None => true,
            })
        }
        Op::Reshape { .. } => {
            let inner = r.arg(x, 0);
            once(inner)
                && reshape_axis(r, x, axis).is_some_and(|axis| reaches_weights(r, inner, axis, depth + 1))
        }
        _ => false,
    }
}

/// True for weights, literals and dequantised weights: cutting them twice costs nothing at run time.
fn is_constant(r: &Rewriter<'_>, x: ValueId) -> bool {
    match r.op(x) {
        Op::Weight(_) | Op::Literal(_) => true,
        Op::Dequant { .. } => r.args(x).iter().all(|&a| is_constant(r, a)),
        _ => false,
    }
}

/// The only operand of an einsum with the letter of result dim `axis`, and its dim.
fn einsum_operand(r: &Rewriter<'_>, x: ValueId, axis: usize) -> Option<(usize, usize)> {
    let Op::Einsum(spec) = r.op(x) else { return None };
    let letter = spec.output[axis];
    let mut holders = spec
        .inputs
        .iter()
        .enumerate()
        .filter_map(|(i, letters)| letters.iter().position(|&l| l == letter).map(|d| (i, d)));
    match (holders.next(), holders.next()) {
        (Some(only), None) => Some(only),
        _ => None,
    }
}

/// The dim of a broadcast operand that result dim `axis` runs along, if the operand varies along it.
fn operand_axis(r: &Rewriter<'_>, operand: ValueId, rank: usize, axis: usize) -> Option<usize> {
    let ty = r.ty(operand);
    let own = (axis + ty.rank()).checked_sub(rank)?;
    (!ty.shape[own].is_one()).then_some(own)
}

/// The operand dim that a reshape keeps as result dim `axis`.
fn reshape_axis(r: &Rewriter<'_>, x: ValueId, axis: usize) -> Option<usize> {
    let groups = dim_groups(&r.ty(r.arg(x, 0)).shape, &r.ty(x).shape)?;
    let group = groups.into_iter().find(|g| g.to.contains(&axis))?;
    (group.to.len() == 1 && group.from.len() == 1).then_some(group.from.start)
}

/// `x` cut along one axis, with the cut moved to the weights. Only called where [`reaches_weights`] holds.
fn push(r: &mut Rewriter<'_>, x: ValueId, cut: Cut) -> Option<ValueId> {
    let args = r.args(x).to_vec();
    match r.op(x).clone() {
        Op::Weight(expr) => r.make(Op::Weight(part_of(&expr, cut)?), &[]).ok(),
        Op::Literal(_) => {
            let Cut { axis, start, length } = cut;
            r.make(Op::Slice { axis, start: start.into(), length: length.into(), step: 1 }, &[x]).ok()
        }
        Op::Dequant { axis, block } => {
            let operands = args.iter().map(|&a| push(r, a, cut)).collect::<Option<Vec<ValueId>>>()?;
            r.make(Op::Dequant { axis, block }, &operands).ok()
        }
        Op::Einsum(spec) => {
            let (i, axis) = einsum_operand(r, x, cut.axis)?;
            let mut operands = args;
            operands[i] = push(r, operands[i], Cut { axis, ..cut })?;
            r.make(Op::Einsum(spec), &operands).ok()
        }
        Op::Map(scalar) => {
            let rank = r.ty(x).rank();
            let operands = args
                .iter()
                .map(|&a| match operand_axis(r, a, rank, cut.axis) {
                    Some(axis) => push(r, a, Cut { axis, ..cut }),
                    None => Some(a),
                })
                .collect::<Option<Vec<ValueId>>>()?;
            r.make(Op::Map(scalar), &operands).ok()
        }
        Op::Reshape { mut shape } => {
            let axis = reshape_axis(r, x, cut.axis)?;
            let inner = push(r, args[0], Cut { axis, ..cut })?;
            shape[cut.axis] = Dim::from(cut.length);
            r.make(Op::Reshape { shape }, &[inner]).ok()
        }
        _ => None,
    }
}
