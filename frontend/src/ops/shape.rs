//! Shapes: Shape, Size, Reshape, Flatten, Squeeze, Unsqueeze, Expand, and what passes its operand through,
//! <https://onnx.ai/onnx/operators/>. Results of Shape and Size are never data-flow.

use crate::lower::{
    Call, Element, Known, Lowered, Lowering, Value, axes_of, invalid, undecided, unsupported,
};
use std::sync::Arc;
use tpshard_ir::{DType, Dim};

pub(super) fn identity(_: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    Ok(vec![call.input(0)?.clone()])
}

/// Inference only: `training_mode` must be off. The mask, if asked for, is all true.
pub(super) fn dropout(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    call.attributes.ignore("seed");
    call.attributes.ignore("is_test");
    let ratio = match call.optional(1) {
        Some(ratio) => l.known(ratio).and_then(|known| known.single().and_then(Element::number)),
        None => Some(f64::from(call.attributes.float("ratio", 0.5)?)),
    };
    if ratio.is_some_and(|ratio| !(0.0..1.0).contains(&ratio)) {
        return Err(invalid("the dropout ratio is not in [0, 1)"));
    }
    if let Some(training) = call.optional(2) {
        let off = l.known(training).is_some_and(|known| known.all_equal(0.0));
        if !off && ratio != Some(0.0) {
            return Err(unsupported("Dropout in training mode"));
        }
    }
    let x = call.input(0)?.clone();
    if !call.wants(1) {
        return Ok(vec![x]);
    }
    let dtype = if call.opset() >= 10 { DType::Bool } else { l.dtype(&x) };
    // Everything is kept. Before opset 12 the mask is not defined without training, and ONNX Runtime fills it with zeros.
    let kept = u8::from(call.opset() >= 12);
    let element =
        if dtype.is_float() { Element::Float(f64::from(kept)) } else { Element::int(i64::from(kept)) };
    let shape = l.shape(&x);
    let mask = l.filled(Known::scalar(dtype, element), &shape)?;
    Ok(vec![x, mask])
}

/// `start` and `end` cut the shape since opset 15.
pub(super) fn shape(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let dims = l.shape(call.input(0)?);
    let rank = i64::try_from(dims.len()).unwrap_or(i64::MAX);
    let at = |position: i64| {
        let position = if position < 0 { position.saturating_add(rank) } else { position };
        usize::try_from(position.clamp(0, rank)).unwrap_or(0)
    };
    let start = at(call.attributes.int("start", 0)?);
    let end = at(call.attributes.int("end", i64::MAX)?);
    Ok(vec![l.sizes_value(dims.get(start..end).unwrap_or(&[]))])
}

pub(super) fn size(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let count = l.ty(call.input(0)?).elements();
    Ok(vec![Value::Known(Arc::new(Known::scalar(DType::I64, Element::Int(count))))])
}

/// 0 copies a dim (unless `allowzero`), -1 takes what is left.
pub(super) fn reshape(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let allow_zero = call.attributes.bool("allowzero", false)?;
    let target = if call.opset() < 5 {
        call.attributes.ignore("consumed_inputs");
        let target = call.attributes.optional_ints("shape")?.unwrap_or(&[]);
        target.iter().copied().map(Dim::constant).collect()
    } else {
        l.dims(call.input(1)?, "the shape of a Reshape")?
    };
    let value = call.input(0)?;
    let from = l.shape(value);
    let mut shape = Vec::with_capacity(target.len());
    let mut rest = None;
    for (axis, dim) in target.iter().enumerate() {
        match dim.as_const() {
            Some(0) if !allow_zero => {
                let copied = from
                    .get(axis)
                    .ok_or_else(|| invalid(format!("0 at {axis} copies a dim that is not there")))?;
                shape.push(copied.clone());
            }
            Some(-1) if rest.is_some() => return Err(invalid("two dims of -1")),
            Some(-1) => {
                rest = Some(axis);
                shape.push(Dim::constant(1));
            }
            Some(value) if value < 0 => return Err(invalid(format!("the dim {value}"))),
            _ => shape.push(dim.clone()),
        }
    }
    if let Some(axis) = rest {
        shape[axis] = remaining(l, value, &shape)?;
    }
    Ok(vec![l.reshape_value(value, &shape)?])
}

/// What -1 stands for: the elements of `value` divided by the other dims.
fn remaining(l: &mut Lowering<'_>, value: &Value, others: &[Dim]) -> Lowered<Dim> {
    let from = l.shape(value);
    let total = Dim::product(&from);
    let product = Dim::product(others);
    if product.is_zero() {
        return Err(invalid("-1 beside a dim of 0"));
    }
    if let Some(rest) = total.exact_div(&product) {
        return Ok(rest);
    }
    // Sizes that are one symbol each and in the same place are equal in every model that runs.
    for (a, b) in from.iter().zip(others) {
        let (a, b) = (l.current(a), l.current(b));
        if a != b && a.as_symbol().is_some() && b.as_symbol().is_some() {
            l.unify(&a, &b)?;
            let total = Dim::product(&l.shape(value));
            let product = Dim::product(&l.current_all(others));
            if let Some(rest) = total.exact_div(&product) {
                return Ok(rest);
            }
        }
    }
    if total.as_const().is_some() && product.as_const().is_some() {
        return Err(invalid(format!("{total} elements do not divide into dims of {product}")));
    }
    Err(undecided(format!("cannot show that {total} elements divide into dims of {product}")))
}

pub(super) fn flatten(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let value = call.input(0)?;
    let shape = l.shape(value);
    let rank = i64::try_from(shape.len()).unwrap_or(i64::MAX);
    let axis = call.attributes.int("axis", 1)?;
    let at = if axis < 0 { axis.saturating_add(rank) } else { axis };
    let at = usize::try_from(at).ok().filter(|&at| at <= shape.len());
    let at = at.ok_or_else(|| invalid(format!("axis {axis} of a tensor of rank {rank}")))?;
    let flat = [Dim::product(&shape[..at]), Dim::product(&shape[at..])];
    Ok(vec![l.reshape_value(value, &flat)?])
}

/// Axes are an attribute before opset 13, an input since.
fn axes(l: &Lowering<'_>, call: &Call<'_>) -> Lowered<Option<Vec<i64>>> {
    if call.opset() < 13 {
        return Ok(call.attributes.optional_ints("axes")?.map(<[i64]>::to_vec));
    }
    call.optional(1).map(|axes| l.ints(axes, "the axes")).transpose()
}

pub(super) fn squeeze(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    // ONNX Runtime reads an empty list as none.
    let axes = axes(l, call)?.filter(|axes| !axes.is_empty());
    let value = call.input(0)?;
    let shape = l.shape(value);
    let dropped = match axes {
        Some(axes) => axes_of(&axes, shape.len())?,
        None => {
            if shape.iter().any(|dim| dim.as_const().is_none()) {
                return Err(undecided("Squeeze without axes of a tensor with dynamic dims"));
            }
            (0..shape.len()).filter(|&axis| shape[axis].is_one()).collect()
        }
    };
    for &axis in &dropped {
        l.unify(&shape[axis], &Dim::constant(1))?;
    }
    let shape = l.shape(value);
    let kept: Vec<Dim> =
        (0..shape.len()).filter(|axis| !dropped.contains(axis)).map(|axis| shape[axis].clone()).collect();
    Ok(vec![l.reshape_value(value, &kept)?])
}

pub(super) fn unsqueeze(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let axes = axes(l, call)?.ok_or_else(|| invalid("Unsqueeze without axes"))?;
    let value = call.input(0)?;
    let shape = l.shape(value);
    let rank = shape.len() + axes.len();
    let added = axes_of(&axes, rank)?;
    let mut own = shape.into_iter();
    let expanded: Vec<Dim> = (0..rank)
        .map(|axis| {
            let next = if added.contains(&axis) { None } else { own.next() };
            next.unwrap_or_else(|| Dim::constant(1))
        })
        .collect();
    Ok(vec![l.reshape_value(value, &expanded)?])
}

/// NumPy broadcasting of both shapes, not only to the second.
pub(super) fn expand(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let target = l.dims(call.input(1)?, "the shape of an Expand")?;
    if target.iter().any(|dim| dim.as_const().is_some_and(|value| value < 0)) {
        return Err(invalid(format!("the shape {target:?}")));
    }
    Ok(vec![l.expand_value(call.input(0)?, &target)?])
}
