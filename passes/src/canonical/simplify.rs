//! Operations that do nothing, or that two of do what one does.

use super::engine::{Rewriter, Rule};
use tpshard_ir::dim::Dim;
use tpshard_ir::infer::broadcast_shapes;
use tpshard_ir::tensor::Data;
use tpshard_ir::{Op, Scalar, ValueId};

pub(super) const RULES: [Rule; 11] = [
    Rule { name: "reshape-same", apply: reshape_same },
    Rule { name: "reshape-reshape", apply: reshape_reshape },
    Rule { name: "reshape-weight", apply: reshape_weight },
    Rule { name: "transpose-same", apply: transpose_same },
    Rule { name: "transpose-transpose", apply: transpose_transpose },
    Rule { name: "transpose-is-reshape", apply: transpose_is_reshape },
    Rule { name: "slice-all", apply: slice_all },
    Rule { name: "broadcast-same", apply: broadcast_same },
    Rule { name: "map-broadcast", apply: map_broadcast },
    Rule { name: "cast-same", apply: cast_same },
    Rule { name: "unit", apply: unit },
];

/// reshape(x, shape of x) = x
fn reshape_same(r: &mut Rewriter<'_>, v: ValueId) -> Option<ValueId> {
    let Op::Reshape { shape } = r.op(v) else { return None };
    let x = r.arg(v, 0);
    (*shape == r.ty(x).shape).then_some(x)
}

/// reshape(reshape(x, _), shape) = reshape(x, shape)
fn reshape_reshape(r: &mut Rewriter<'_>, v: ValueId) -> Option<ValueId> {
    let Op::Reshape { shape } = r.op(v) else { return None };
    let inner = r.arg(v, 0);
    let Op::Reshape { .. } = r.op(inner) else { return None };
    let (shape, x) = (shape.clone(), r.arg(inner, 0));
    r.make(Op::Reshape { shape }, &[x]).ok()
}

/// reshape(weight) = the weight with that shape
fn reshape_weight(r: &mut Rewriter<'_>, v: ValueId) -> Option<ValueId> {
    let Op::Reshape { shape } = r.op(v) else { return None };
    let Op::Weight(expr) = r.op(r.arg(v, 0)) else { return None };
    let shape = shape.iter().map(Dim::as_size).collect::<Option<Vec<usize>>>()?;
    let reshaped = expr.reshape(shape).ok()?;
    r.make(Op::Weight(reshaped), &[]).ok()
}

/// transpose(x, identity) = x
fn transpose_same(r: &mut Rewriter<'_>, v: ValueId) -> Option<ValueId> {
    let Op::Transpose { perm } = r.op(v) else { return None };
    perm.iter().enumerate().all(|(i, &p)| i == p).then(|| r.arg(v, 0))
}

/// transpose(transpose(x, p), q) = transpose(x, p∘q)
fn transpose_transpose(r: &mut Rewriter<'_>, v: ValueId) -> Option<ValueId> {
    let Op::Transpose { perm: outer } = r.op(v) else { return None };
    let inner_value = r.arg(v, 0);
    let Op::Transpose { perm: inner } = r.op(inner_value) else { return None };
    let perm = outer.iter().map(|&i| inner[i]).collect();
    let x = r.arg(inner_value, 0);
    r.make(Op::Transpose { perm }, &[x]).ok()
}

/// A transpose that only moves dims of extent 1 is a reshape.
fn transpose_is_reshape(r: &mut Rewriter<'_>, v: ValueId) -> Option<ValueId> {
    let Op::Transpose { perm } = r.op(v) else { return None };
    let x = r.arg(v, 0);
    let moved: Vec<usize> = perm.iter().copied().filter(|&p| !r.ty(x).shape[p].is_one()).collect();
    if !moved.is_sorted() {
        return None;
    }
    let shape = r.ty(v).shape.clone();
    r.make(Op::Reshape { shape }, &[x]).ok()
}

/// A slice of everything is nothing.
fn slice_all(r: &mut Rewriter<'_>, v: ValueId) -> Option<ValueId> {
    let Op::Slice { axis, start, length, step: 1 } = r.op(v) else { return None };
    let x = r.arg(v, 0);
    (start.is_zero() && *length == r.ty(x).shape[*axis]).then_some(x)
}

/// broadcast(x, shape of x) = x
fn broadcast_same(r: &mut Rewriter<'_>, v: ValueId) -> Option<ValueId> {
    let Op::Broadcast { shape } = r.op(v) else { return None };
    let x = r.arg(v, 0);
    (*shape == r.ty(x).shape).then_some(x)
}

/// f(broadcast(x), y) = f(x, y) where y alone gives the result its shape
fn map_broadcast(r: &mut Rewriter<'_>, v: ValueId) -> Option<ValueId> {
    let Op::Map(scalar) = *r.op(v) else { return None };
    let mut args = r.args(v).to_vec();
    for i in 0..args.len() {
        let Op::Broadcast { .. } = r.op(args[i]) else { continue };
        let before = args[i];
        args[i] = r.arg(before, 0);
        let shapes: Vec<&[Dim]> = args.iter().map(|&a| r.ty(a).shape.as_slice()).collect();
        if broadcast_shapes(&shapes).is_ok_and(|s| s == r.ty(v).shape) {
            return r.make(Op::Map(scalar), &args).ok();
        }
        args[i] = before;
    }
    None
}

/// cast(x, type of x) = x
fn cast_same(r: &mut Rewriter<'_>, v: ValueId) -> Option<ValueId> {
    let Op::Map(Scalar::Cast(to)) = *r.op(v) else { return None };
    let x = r.arg(v, 0);
    (r.ty(x).dtype == to).then_some(x)
}

/// x + 0, x - 0, x * 1, x / 1 = x
fn unit(r: &mut Rewriter<'_>, v: ValueId) -> Option<ValueId> {
    let Op::Map(scalar) = *r.op(v) else { return None };
    let (left_unit, right_unit) = match scalar {
        Scalar::Add => (Some(0.0), 0.0),
        Scalar::Sub => (None, 0.0),
        Scalar::Mul => (Some(1.0), 1.0),
        Scalar::Div => (None, 1.0),
        _ => return None,
    };
    let (a, b) = (r.arg(v, 0), r.arg(v, 1));
    let keeps = |r: &Rewriter<'_>, x: ValueId| r.ty(x) == r.ty(v);
    if keeps(r, a) && scalar_literal(r, b) == Some(right_unit) {
        return Some(a);
    }
    (keeps(r, b) && left_unit.is_some() && scalar_literal(r, a) == left_unit).then_some(b)
}

/// The value of a literal with one element.
pub(super) fn scalar_literal(r: &Rewriter<'_>, v: ValueId) -> Option<f64> {
    let Op::Literal(literal) = r.op(v) else { return None };
    match literal.0.data() {
        Data::F32(v) => one(v).map(f64::from),
        Data::F64(v) => one(v),
        Data::F16(v) => one(v).map(f64::from),
        Data::BF16(v) => one(v).map(f64::from),
        Data::I64(v) => one(v).map(|x| x as f64),
        Data::I32(v) => one(v).map(f64::from),
        _ => None,
    }
}

fn one<T: Copy>(values: &[T]) -> Option<T> {
    if let [value] = values { Some(*value) } else { None }
}
