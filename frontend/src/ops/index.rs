//! Reading and writing by index: Gather, GatherElements, GatherND, ScatterElements, ScatterND, OneHot, Trilu,
//! <https://onnx.ai/onnx/operators/>.

use crate::lower::{Call, Lowered, Lowering, Value, axis_of, data_dependent, invalid, unsupported};
use tpshard_ir::{DType, Dim, Monoid, Op, Scalar};

pub(super) fn gather(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let (table, indices) = (call.input(0)?, call.input(1)?);
    let axis = axis_of(call.attributes.int("axis", 0)?, l.shape(table).len())?;
    Ok(vec![l.gather_value(table, indices, axis)?])
}

pub(super) fn gather_elements(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let (x, indices) = (l.data(call.input(0)?)?, l.data(call.input(1)?)?);
    let axis = axis_of(call.attributes.int("axis", 0)?, l.graph.ty(x).rank())?;
    Ok(vec![Value::Data(l.add(Op::GatherElements { axis }, &[x, indices])?)])
}

pub(super) fn gather_nd(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let batch_dims =
        usize::try_from(call.attributes.int("batch_dims", 0)?).map_err(|_| invalid("batch_dims"))?;
    if let (0, Value::Grid(grid)) = (batch_dims, call.input(1)?) {
        let grid = grid.clone();
        if let Some(value) = l.gather_nd_grid(call.input(0)?, &grid)? {
            return Ok(vec![value]);
        }
    }
    let (x, indices) = (l.data(call.input(0)?)?, l.data(call.input(1)?)?);
    // One index per row is a gather of the first dim.
    let ty = l.graph.ty(indices).clone();
    if batch_dims == 0 && ty.shape.last().is_some_and(Dim::is_one) {
        let lead = ty.shape[..ty.rank() - 1].to_vec();
        let indices = l.reshape(indices, &lead)?;
        return Ok(vec![Value::Data(l.add(Op::Gather { axis: 0, window: None }, &[x, indices])?)]);
    }
    for axis in 0..batch_dims {
        let (a, b) = (l.graph.ty(x).shape.get(axis).cloned(), l.graph.ty(indices).shape.get(axis).cloned());
        let (Some(a), Some(b)) = (a, b) else { return Err(invalid("batch_dims")) };
        l.unify(&a, &b)?;
    }
    Ok(vec![Value::Data(l.add(Op::GatherNd { batch_dims }, &[x, indices])?)])
}

/// `reduction` exists since opset 16.
fn reduction(call: &Call<'_>) -> Lowered<Option<Monoid>> {
    match call.attributes.string("reduction", "none")? {
        "none" => Ok(None),
        "add" => Ok(Some(Monoid::Sum)),
        "mul" => Ok(Some(Monoid::Prod)),
        "max" => Ok(Some(Monoid::Max)),
        "min" => Ok(Some(Monoid::Min)),
        other => Err(invalid(format!("the reduction {}", crate::error::quote(other)))),
    }
}

pub(super) fn scatter_elements(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let monoid = reduction(call)?;
    let args = [l.data(call.input(0)?)?, l.data(call.input(1)?)?, l.data(call.input(2)?)?];
    let axis = axis_of(call.attributes.int("axis", 0)?, l.graph.ty(args[0]).rank())?;
    let (a, b) = (l.graph.ty(args[1]).shape.clone(), l.graph.ty(args[2]).shape.clone());
    unify_shapes(l, &a, &b)?;
    Ok(vec![Value::Data(l.add(Op::ScatterElements { axis, monoid }, &args)?)])
}

fn unify_shapes(l: &mut Lowering<'_>, a: &[Dim], b: &[Dim]) -> Lowered<()> {
    if a.len() != b.len() {
        return Err(invalid(format!("the shapes {a:?} and {b:?}")));
    }
    for (a, b) in a.iter().zip(b) {
        let (a, b) = (l.current(a), l.current(b));
        l.unify(&a, &b)?;
    }
    Ok(())
}

pub(super) fn scatter_nd(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let monoid = reduction(call)?;
    let args = [l.data(call.input(0)?)?, l.data(call.input(1)?)?, l.data(call.input(2)?)?];
    let (x, indices) = (l.graph.ty(args[0]).clone(), l.graph.ty(args[1]).clone());
    let (depth, lead) = indices.shape.split_last().ok_or_else(|| invalid("indices of rank 0"))?;
    let depth =
        depth.as_size().filter(|&depth| depth <= x.rank()).ok_or_else(|| invalid("the index depth"))?;
    let expected: Vec<Dim> = lead.iter().chain(&x.shape[depth..]).cloned().collect();
    let updates = l.graph.ty(args[2]).shape.clone();
    unify_shapes(l, &expected, &updates)?;
    Ok(vec![Value::Data(l.add(Op::ScatterNd { monoid }, &args)?)])
}

/// `values` holds off and on; negative indices count from the depth.
pub(super) fn one_hot(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let depth = l.known(call.input(1)?).ok_or_else(|| data_dependent("the depth of a OneHot"))?;
    let depth = match depth.single() {
        Some(crate::lower::Element::Int(dim)) => dim.clone(),
        Some(crate::lower::Element::Float(value)) => Dim::constant(*value as i64),
        None => return Err(invalid("the depth is not one element")),
    };
    if depth.as_const().is_some_and(|depth| depth < 0) {
        return Err(invalid(format!("a depth of {depth}")));
    }
    let indices = l.data(call.input(0)?)?;
    let rank = l.graph.ty(indices).rank();
    let axis = axis_of(call.attributes.int("axis", -1)?, rank + 1)?;
    let indices = l.cast(indices, DType::I64)?;
    let size = l.size(&depth)?;
    let shifted = l.map(Scalar::Add, &[indices, size])?;
    let zero = l.scalar(DType::I64, 0.0)?;
    let negative = l.map(Scalar::Less, &[indices, zero])?;
    let indices = l.map(Scalar::Select, &[negative, shifted, indices])?;
    let mut shape = l.graph.ty(indices).shape.clone();
    shape.insert(axis, Dim::constant(1));
    let indices = l.reshape(indices, &shape)?;
    let positions = l.add(Op::Iota { start: Dim::constant(0), length: depth.clone() }, &[])?;
    let mut along = vec![Dim::constant(1); rank + 1];
    along[axis] = depth;
    let positions = l.reshape(positions, &along)?;
    let hit = l.map(Scalar::Equal, &[indices, positions])?;
    let values = call.input(2)?.clone();
    let off = l.pick(&values, 0, &Dim::constant(0))?;
    let on = l.pick(&values, 0, &Dim::constant(1))?;
    let (off, on) = (l.data(&off)?, l.data(&on)?);
    Ok(vec![Value::Data(l.map(Scalar::Select, &[hit, on, off])?)])
}

/// The upper or lower triangle; the diagonal may be an input.
pub(super) fn trilu(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let upper = call.attributes.bool("upper", true)?;
    let (k, moved) = match call.optional(1) {
        None => (Dim::constant(0), None),
        // Data may decide: only the elements depend on it.
        Some(Value::Data(k)) => (Dim::constant(0), Some(*k)),
        Some(k) => (l.dims(k, "the diagonal of a Trilu")?.pop().ok_or_else(|| invalid("no diagonal"))?, None),
    };
    let x = l.data(call.input(0)?)?;
    let ty = l.graph.ty(x).clone();
    let [.., rows, columns] = ty.shape.as_slice() else { return Err(invalid(format!("Trilu of {ty}"))) };
    if ty.dtype == DType::Bool || ty.dtype.is_float() || ty.dtype.is_integer() {
        let row = l.add(Op::Iota { start: k, length: rows.clone() }, &[])?;
        let mut row = l.reshape(row, &[rows.clone(), Dim::constant(1)])?;
        if let Some(k) = moved {
            let k = l.cast(k, DType::I64)?;
            let k = l.reshape(k, &[])?;
            row = l.map(Scalar::Add, &[row, k])?;
        }
        let column = l.add(Op::Iota { start: Dim::constant(0), length: columns.clone() }, &[])?;
        let test = if upper { Scalar::GreaterEqual } else { Scalar::LessEqual };
        let keep = l.map(test, &[column, row])?;
        let zero = l.scalar(ty.dtype, 0.0)?;
        return Ok(vec![Value::Data(l.map(Scalar::Select, &[keep, x, zero])?)]);
    }
    Err(unsupported(format!("Trilu of {ty}")))
}
