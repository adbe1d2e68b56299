//! Reductions and what is made of them: Reduce*, ArgMax, ArgMin, TopK, CumSum, Softmax, LogSoftmax, Hardmax, CDist,
//! <https://onnx.ai/onnx/operators/>.
//!
//! Axes of ReduceSum are an input since opset 13, of the others since 18. Softmax and its kin work on one axis since
//! opset 13; before, on all dims from the axis on together.

use super::heads::dims_of;
use crate::lower::{Call, Lowered, Lowering, Value, axes_of, axis_of, data_dependent, invalid, unsupported};
use tpshard_ir::{DType, Dim, Monoid, Op, Scalar, ValueId};

pub(super) fn reduce(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let op_type = call.node.op_type.as_str();
    let since = if op_type == "ReduceSum" { 13 } else { 18 };
    let value = call.input(0)?;
    let rank = l.shape(value).len();
    let keep = call.attributes.bool("keepdims", true)?;
    let mut no_op = false;
    let given = if call.opset() < since {
        call.attributes.optional_ints("axes")?.map(<[i64]>::to_vec)
    } else {
        no_op = call.attributes.bool("noop_with_empty_axes", false)?;
        call.optional(1).map(|axes| l.ints(axes, "the axes of a reduction")).transpose()?
    };
    let given = given.filter(|axes| !axes.is_empty());
    let axes = match given {
        Some(axes) => axes_of(&axes, rank)?,
        None if no_op => Vec::new(),
        None => (0..rank).collect(),
    };
    if let Some(folded) = fold(op_type, value, &axes, keep) {
        return Ok(vec![folded]);
    }
    let x = l.data(value)?;
    let reduced = reduce_data(l, op_type, x, &axes)?;
    if keep {
        return Ok(vec![Value::Data(reduced)]);
    }
    let shape = l.graph.ty(reduced).shape.clone();
    let kept: Vec<Dim> =
        (0..rank).filter(|axis| !axes.contains(axis)).map(|axis| shape[axis].clone()).collect();
    Ok(vec![Value::Data(l.reshape(reduced, &kept)?)])
}

/// CDist of ONNX Runtime: the distance of every row of `a[m, k]` to every row of `b[n, k]`, `[m, n]`; its square unless
/// `metric` is `euclidean`.
pub(super) fn pairwise_distance(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let root = match call.attributes.string("metric", "sqeuclidean")? {
        "euclidean" => true,
        "sqeuclidean" => false,
        other => return Err(invalid(format!("the metric {}", crate::error::quote(other)))),
    };
    let (a, b) = (l.data(call.input(0)?)?, l.data(call.input(1)?)?);
    let [rows, width] = dims_of(&l.type_of(a), "the first operand")?;
    let [columns, _] = dims_of(&l.type_of(b), "the second operand")?;
    l.unify_shape(b, &[columns.clone(), width.clone()], "the second operand")?;
    let a = l.reshape(a, &[rows.clone(), Dim::constant(1), width])?;
    let difference = l.map(Scalar::Sub, &[a, b])?;
    let square = l.map(Scalar::Mul, &[difference, difference])?;
    let sum = l.reduce(Monoid::Sum, square, &[2])?;
    let sum = l.reshape(sum, &[rows, columns])?;
    let distance = if root { l.map(Scalar::Sqrt, &[sum])? } else { sum };
    Ok(vec![Value::Data(distance)])
}

/// Sums and products of sizes.
fn fold(op_type: &str, value: &Value, axes: &[usize], keep: bool) -> Option<Value> {
    let Value::Known(known) = value else { return None };
    if known.shape.len() != 1 || axes != [0] {
        return None;
    }
    let dims: Option<Vec<&Dim>> = known.elements.iter().map(crate::lower::Element::dim).collect();
    let combine: fn(&Dim, &Dim) -> Dim = match op_type {
        "ReduceProd" => |a, b| a * b,
        "ReduceSum" => |a, b| a + b,
        "ReduceMax" => Dim::maximum,
        "ReduceMin" => Dim::minimum,
        _ => return None,
    };
    let result = dims?.into_iter().cloned().reduce(|a, b| combine(&a, &b))?;
    let shape = if keep { vec![1] } else { Vec::new() };
    let element = crate::lower::Element::Int(result);
    Some(Value::Known(std::sync::Arc::new(crate::lower::Known::new(known.dtype, shape, vec![element]))))
}

fn reduce_data(l: &mut Lowering<'_>, op_type: &str, x: ValueId, axes: &[usize]) -> Lowered<ValueId> {
    let dtype = l.graph.ty(x).dtype;
    if dtype == DType::Bool {
        // Max and min of bools are or and and; computed as small integers.
        let wide = l.cast(x, DType::U8)?;
        let reduced = reduce_data(l, op_type, wide, axes)?;
        return l.cast(reduced, DType::Bool);
    }
    match op_type {
        "ReduceSum" => l.reduce(Monoid::Sum, x, axes),
        "ReduceProd" => l.reduce(Monoid::Prod, x, axes),
        "ReduceMax" => l.reduce(Monoid::Max, x, axes),
        "ReduceMin" => l.reduce(Monoid::Min, x, axes),
        "ReduceMean" if axes.is_empty() => Ok(x),
        "ReduceMean" => l.mean(x, axes),
        "ReduceL1" => {
            let size = l.map(Scalar::Abs, &[x])?;
            l.reduce(Monoid::Sum, size, axes)
        }
        "ReduceL2" => {
            let square = l.map(Scalar::Mul, &[x, x])?;
            let sum = l.reduce(Monoid::Sum, square, axes)?;
            if dtype.is_float() {
                return l.map(Scalar::Sqrt, &[sum]);
            }
            let wide = l.cast(sum, DType::F64)?;
            let root = l.map(Scalar::Sqrt, &[wide])?;
            l.cast(root, dtype)
        }
        "ReduceSumSquare" => {
            let square = l.map(Scalar::Mul, &[x, x])?;
            l.reduce(Monoid::Sum, square, axes)
        }
        "ReduceLogSum" => {
            let sum = l.reduce(Monoid::Sum, x, axes)?;
            l.map(Scalar::Log, &[sum])
        }
        "ReduceLogSumExp" => {
            let high = l.reduce(Monoid::Max, x, axes)?;
            // A row of infinities would give infinity minus infinity.
            let infinite = l.map(Scalar::IsInf, &[high])?;
            let zero = l.scalar(dtype, 0.0)?;
            let shift = l.map(Scalar::Select, &[infinite, zero, high])?;
            let low = l.map(Scalar::Sub, &[x, shift])?;
            let exp = l.map(Scalar::Exp, &[low])?;
            let sum = l.reduce(Monoid::Sum, exp, axes)?;
            let log = l.map(Scalar::Log, &[sum])?;
            l.map(Scalar::Add, &[log, shift])
        }
        other => Err(unsupported(format!("the reduction {}", crate::error::quote(other)))),
    }
}

pub(super) fn arg(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let mut x = l.data(call.input(0)?)?;
    let rank = l.graph.ty(x).rank();
    let axis = axis_of(call.attributes.int("axis", 0)?, rank)?;
    let keep = call.attributes.bool("keepdims", true)?;
    let last = call.attributes.bool("select_last_index", false)?;
    let extent = l.graph.ty(x).shape[axis].clone();
    if last {
        // The last of equals is the first when read backwards.
        let end = &extent - &Dim::constant(1);
        x = l.slice(x, axis, end, extent.clone(), -1)?;
    }
    let largest = call.node.op_type == "ArgMax";
    let mut best = l.add(Op::TopK { axis, k: Dim::constant(1), largest }, &[x])?;
    if last {
        let end = l.size(&(&extent - &Dim::constant(1)))?;
        best = l.map(Scalar::Sub, &[end, best])?;
    }
    if !keep {
        let mut shape = l.graph.ty(best).shape.clone();
        shape.remove(axis);
        best = l.reshape(best, &shape)?;
    }
    Ok(vec![Value::Data(best)])
}

/// Values and indices; `k` is an attribute before opset 10. The order of unsorted results is unspecified, so sorted.
pub(super) fn top_k(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let x = l.data(call.input(0)?)?;
    let rank = l.graph.ty(x).rank();
    let axis = axis_of(call.attributes.int("axis", -1)?, rank)?;
    let largest = call.attributes.bool("largest", true)?;
    call.attributes.bool("sorted", true)?;
    let k = if call.opset() < 10 {
        Dim::constant(call.attributes.required_int("k")?)
    } else {
        let k = l.known(call.input(1)?).ok_or_else(|| data_dependent("the count of a TopK"))?;
        let one = k.single().filter(|_| k.shape.len() == 1).and_then(|k| k.dim().cloned());
        one.ok_or_else(|| invalid("the count is not one integer in one dim"))?
    };
    let extent = l.graph.ty(x).shape[axis].clone();
    if k.as_const().is_some_and(|k| k < 0) {
        return Err(invalid(format!("the {k} largest")));
    }
    l.assume_at_most(&k, &extent)?;
    let indices = l.add(Op::TopK { axis, k, largest }, &[x])?;
    let values = l.add(Op::GatherElements { axis }, &[x, indices])?;
    Ok(vec![Value::Data(values), Value::Data(indices)])
}

pub(super) fn cumulative(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let exclusive = call.attributes.bool("exclusive", false)?;
    let reverse = call.attributes.bool("reverse", false)?;
    let x = l.data(call.input(0)?)?;
    let monoid = if call.node.op_type == "CumProd" { Monoid::Prod } else { Monoid::Sum };
    let axis = l.ints(call.input(1)?, "the axis of a running sum")?;
    let [axis] = axis.as_slice() else { return Err(invalid("the axis is not one integer")) };
    let axis = axis_of(*axis, l.graph.ty(x).rank())?;
    Ok(vec![Value::Data(l.add(Op::Scan { monoid, axis, exclusive, reverse }, &[x])?)])
}

/// Softmax, LogSoftmax.
pub(super) fn softmax(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    on_axis(l, call, |l, x, axis| {
        if call.node.op_type == "Softmax" {
            return l.add(Op::Softmax { axis }, &[x]);
        }
        let high = l.reduce(Monoid::Max, x, &[axis])?;
        let low = l.map(Scalar::Sub, &[x, high])?;
        let exp = l.map(Scalar::Exp, &[low])?;
        let sum = l.reduce(Monoid::Sum, exp, &[axis])?;
        let log = l.map(Scalar::Log, &[sum])?;
        l.map(Scalar::Sub, &[low, log])
    })
}

/// One at the first largest element, zero elsewhere.
pub(super) fn hardmax(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    on_axis(l, call, |l, x, axis| {
        let ty = l.graph.ty(x).clone();
        let best = l.add(Op::TopK { axis, k: Dim::constant(1), largest: true }, &[x])?;
        let positions = l.add(Op::Iota { start: Dim::constant(0), length: ty.shape[axis].clone() }, &[])?;
        let mut along = vec![Dim::constant(1); ty.rank()];
        along[axis] = ty.shape[axis].clone();
        let positions = l.reshape(positions, &along)?;
        let hit = l.map(Scalar::Equal, &[positions, best])?;
        l.cast(hit, ty.dtype)
    })
}

/// `function` along the attribute `axis`; before opset 13, of all dims from there on as one.
fn on_axis(
    l: &mut Lowering<'_>,
    call: &Call<'_>,
    function: impl Fn(&mut Lowering<'_>, ValueId, usize) -> Lowered<ValueId>,
) -> Lowered<Vec<Value>> {
    let x = l.data(call.input(0)?)?;
    let joined = call.opset() < 13;
    let axis = call.attributes.int("axis", if joined { 1 } else { -1 })?;
    Ok(vec![Value::Data(along(l, x, axis, joined, function)?)])
}

/// A softmax as opset 13 defines it, or earlier ones (`joined`).
pub(super) fn softmax_of(l: &mut Lowering<'_>, x: ValueId, axis: i64, joined: bool) -> Lowered<ValueId> {
    along(l, x, axis, joined, |l, x, axis| l.add(Op::Softmax { axis }, &[x]))
}

fn along(
    l: &mut Lowering<'_>,
    x: ValueId,
    given: i64,
    joined: bool,
    function: impl Fn(&mut Lowering<'_>, ValueId, usize) -> Lowered<ValueId>,
) -> Lowered<ValueId> {
    let shape = l.graph.ty(x).shape.clone();
    if shape.is_empty() && matches!(given, -1..=1) {
        let row = l.reshape(x, &[Dim::constant(1)])?;
        let result = function(l, row, 0)?;
        return l.reshape(result, &[]);
    }
    if !joined {
        let axis = axis_of(given, shape.len())?;
        return function(l, x, axis);
    }
    let at = if given == i64::try_from(shape.len()).unwrap_or(-1) {
        shape.len()
    } else {
        axis_of(given, shape.len())?
    };
    if at + 1 == shape.len() {
        return function(l, x, at);
    }
    let flat = l.reshape(x, &[Dim::product(&shape[..at]), Dim::product(&shape[at..])])?;
    let result = function(l, flat, 1)?;
    l.reshape(result, &shape)
}
