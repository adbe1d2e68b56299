//! Values made from nothing: Constant, ConstantOfShape, Range, EyeLike, <https://onnx.ai/onnx/operators/>.
//!
//! Large ones are never written out: constant-filled tensors are a stretched scalar, ranges an index grid.

use crate::lower::{
    Affine, Call, Element, Known, Lowered, Lowering, Value, data_dependent, invalid, unsupported,
};
use crate::model::AttributeValue;
use crate::tensor_data::dtype_from_onnx;
use std::sync::Arc;
use tpshard_ir::{DType, Dim, Op, Scalar};

pub(super) fn constant(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let [attribute] = call.node.attributes.as_slice() else {
        return Err(invalid("a Constant has exactly one attribute"));
    };
    let ints = |values: &[i64], shape: Vec<usize>| {
        Known::new(DType::I64, shape, values.iter().map(|&value| Element::int(value)).collect())
    };
    let floats = |values: &[f32], shape: Vec<usize>| {
        Known::new(DType::F32, shape, values.iter().map(|&value| Element::Float(f64::from(value))).collect())
    };
    let value = call.attributes.get(&attribute.name);
    let known = match (attribute.name.as_str(), value) {
        ("value", Some(AttributeValue::Tensor(tensor))) => {
            let name = call.node.output(0).unwrap_or("constant").to_owned();
            return Ok(vec![l.stored(&name, tensor)?]);
        }
        ("value_int", Some(AttributeValue::Int(value))) => ints(&[*value], vec![]),
        ("value_float", Some(AttributeValue::Float(value))) => floats(&[*value], vec![]),
        ("value_ints", Some(AttributeValue::Ints(values))) => ints(values, vec![values.len()]),
        ("value_floats", Some(AttributeValue::Floats(values))) => floats(values, vec![values.len()]),
        (name, _) => {
            return Err(unsupported(format!("a constant in the attribute {}", crate::error::quote(name))));
        }
    };
    Ok(vec![Value::Known(Arc::new(known))])
}

pub(super) fn constant_of_shape(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let shape = l.dims(call.input(0)?, "the shape of a ConstantOfShape")?;
    let fill = match call.attributes.optional_tensor("value")? {
        None => Known::scalar(DType::F32, Element::Float(0.0)),
        Some(tensor) => {
            if tensor.element_count() != 1 {
                return Err(invalid("the fill value is not one element"));
            }
            let tensor = l.model.storage.to_tensor(tensor)?;
            let known = Known::from_tensor(&tensor)
                .ok_or_else(|| unsupported(format!("a fill of {}", tensor.dtype())))?;
            Known { shape: Vec::new(), ..known }
        }
    };
    Ok(vec![l.filled(fill, &shape)?])
}

/// `start, start + delta, … < limit`. Integers become an index grid; floats are computed from one.
pub(super) fn range(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let mut bounds = Vec::with_capacity(3);
    for index in 0..3 {
        let known = l.known(call.input(index)?).ok_or_else(|| data_dependent("the length of a Range"))?;
        let single = known.single().cloned().ok_or_else(|| invalid("a bound of Range is not one element"))?;
        bounds.push(single);
    }
    let dtype = l.dtype(call.input(0)?);
    let whole: Option<Vec<Dim>> = bounds.iter().map(whole_number).collect();
    let [start, limit, step] = match whole.as_deref() {
        Some([start, limit, step]) => [start.clone(), limit.clone(), step.clone()],
        _ => return fractional(l, &bounds, dtype),
    };
    let step_value = step.as_const().filter(|&step| step != 0);
    let step_value = step_value.ok_or_else(|| unsupported(format!("a Range with the step {step}")))?;
    let distance = if step_value > 0 { &limit - &start } else { &start - &limit };
    let length = distance.ceil_div(&Dim::constant(step_value.saturating_abs()));
    let length = if length.is_nonnegative() { length } else { length.maximum(&Dim::constant(0)) };
    let grid = Value::Affine(Arc::new(Affine::range(DType::I64, start, step, length)));
    Ok(vec![l.cast_value(&grid, dtype)?])
}

fn whole_number(element: &Element) -> Option<Dim> {
    match element {
        Element::Int(dim) => Some(dim.clone()),
        Element::Float(value) if value.fract() == 0.0 && value.abs() < 1e15 => {
            Some(Dim::constant(*value as i64))
        }
        Element::Float(_) => None,
    }
}

fn fractional(l: &mut Lowering<'_>, bounds: &[Element], dtype: DType) -> Lowered<Vec<Value>> {
    let numbers: Option<Vec<f64>> = bounds.iter().map(Element::number).collect();
    let Some([start, limit, step]) = numbers.as_deref() else {
        return Err(unsupported("a Range with fractions whose length depends on sizes"));
    };
    let length = ((limit - start) / step).ceil().max(0.0);
    if !length.is_finite() || length > f64::from(i32::MAX) {
        return Err(invalid(format!("a Range of {length} elements")));
    }
    let index = Affine::range(DType::I64, Dim::constant(0), Dim::constant(1), Dim::constant(length as i64));
    let index = l.cast_value(&Value::Affine(Arc::new(index)), dtype)?;
    let (step, start) = (l.number_value(dtype, *step)?, l.number_value(dtype, *start)?);
    let scaled = l.elementwise(Scalar::Mul, &[index, step])?;
    Ok(vec![l.elementwise(Scalar::Add, &[scaled, start])?])
}

pub(super) fn eye_like(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let ty = l.ty(call.input(0)?);
    let k = call.attributes.int("k", 0)?;
    let dtype = match call.attributes.optional_int("dtype")? {
        None => ty.dtype,
        Some(code) => dtype_from_onnx(code)?,
    };
    let [rows, columns] = ty.shape.as_slice() else { return Err(invalid(format!("EyeLike of {ty}"))) };
    let row = l.add(Op::Iota { start: Dim::constant(k), length: rows.clone() }, &[])?;
    let column = l.add(Op::Iota { start: Dim::constant(0), length: columns.clone() }, &[])?;
    let row = l.reshape(row, &[rows.clone(), Dim::constant(1)])?;
    let diagonal = l.map(Scalar::Equal, &[row, column])?;
    Ok(vec![Value::Data(l.cast(diagonal, dtype)?)])
}
