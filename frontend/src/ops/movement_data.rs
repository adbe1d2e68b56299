//! Movement by places that data gives: [ReverseSequence](https://onnx.ai/onnx/operators/onnx__ReverseSequence.html) 10 and
//! [TensorScatter](https://onnx.ai/onnx/operators/onnx__TensorScatter.html) 24; and
//! [CenterCropPad](https://onnx.ai/onnx/operators/onnx__CenterCropPad.html) 18, which moves by sizes.

use super::transposed::padded;
use crate::error::quote;
use crate::lower::{Call, Lowered, Lowering, Value, axis_of, invalid};
use tpshard_ir::{DType, Dim, Op, Scalar, ValueId};

/// The first `lengths` entries of `axis` in reverse order, the rest as they are. `lengths` broadcasts against `x`.
pub(super) fn reversed_within(
    l: &mut Lowering<'_>,
    x: ValueId,
    axis: usize,
    lengths: ValueId,
) -> Lowered<ValueId> {
    let shape = l.graph.ty(x).shape.clone();
    let place = l.positions(&shape[axis], axis, shape.len())?;
    let last = l.map_number(Scalar::Sub, lengths, 1.0)?;
    let mirrored = l.map(Scalar::Sub, &[last, place])?;
    let inside = l.map(Scalar::Less, &[place, lengths])?;
    let index = l.map(Scalar::Select, &[inside, mirrored, place])?;
    let index = l.broadcast(index, &shape)?;
    l.add(Op::GatherElements { axis }, &[x, index])
}

/// `(x, sequence_lens[batch])`.
pub(super) fn reverse_sequence(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let x = l.data(call.input(0)?)?;
    let rank = l.graph.ty(x).rank();
    let batch = axis_of(call.attributes.int("batch_axis", 1)?, rank)?;
    let time = axis_of(call.attributes.int("time_axis", 0)?, rank)?;
    let lengths = l.data(call.input(1)?)?;
    let lengths = l.cast(lengths, DType::I64)?;
    let mut aligned = vec![Dim::constant(1); rank];
    aligned[batch] = l.graph.ty(x).shape[batch].clone();
    let lengths = l.reshape(lengths, &aligned)?;
    Ok(vec![Value::Data(reversed_within(l, x, time, lengths)?)])
}

/// `(past_cache, update[, write_indices[batch]])`: the cache with the update written from the given places on.
pub(super) fn tensor_scatter(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let circular = match call.attributes.string("mode", "linear")? {
        "linear" => false,
        "circular" => true,
        other => return Err(invalid(format!("the mode {}", quote(other)))),
    };
    let (cache, update) = (l.data(call.input(0)?)?, l.data(call.input(1)?)?);
    let (whole, part) = (l.graph.ty(cache).clone(), l.graph.ty(update).clone());
    let axis = axis_of(call.attributes.int("axis", -2)?, whole.rank())?;
    if part.rank() != whole.rank() || axis == 0 {
        return Err(invalid(format!("an update {part} of {whole} along axis {axis}")));
    }
    let mut place = l.positions(&part.shape[axis], axis, part.rank())?;
    if let Some(first) = call.optional(2) {
        let first = l.data(first)?;
        let first = l.cast(first, DType::I64)?;
        let mut aligned = vec![Dim::constant(1); part.rank()];
        aligned[0] = part.shape[0].clone();
        let first = l.reshape(first, &aligned)?;
        place = l.map(Scalar::Add, &[place, first])?;
    }
    if circular {
        let extent = l.size(&whole.shape[axis])?;
        place = l.map(Scalar::Mod, &[place, extent])?;
    }
    let place = l.broadcast(place, &part.shape)?;
    let scatter = Op::ScatterElements { axis, monoid: None };
    Ok(vec![Value::Data(l.add(scatter, &[cache, place, update])?)])
}

/// `(x, shape)`: cut or padded with zeros around the middle.
pub(super) fn center_crop_pad(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let mut x = l.data(call.input(0)?)?;
    let from = l.graph.ty(x).shape.clone();
    let target = l.dims(call.input(1)?, "the shape of a CenterCropPad")?;
    let axes: Vec<usize> = match call.attributes.optional_ints("axes")? {
        None => (0..from.len()).collect(),
        Some(axes) => axes.iter().map(|&axis| axis_of(axis, from.len())).collect::<Lowered<_>>()?,
    };
    if axes.len() != target.len() {
        return Err(invalid(format!("{} extents for {} axes", target.len(), axes.len())));
    }
    let (mut low, mut high) = (vec![Dim::constant(0); from.len()], vec![Dim::constant(0); from.len()]);
    for (&axis, to) in axes.iter().zip(&target) {
        let (more, two) = (to - &from[axis], Dim::constant(2));
        if more.is_nonnegative() {
            low[axis] = more.floor_div(&two);
            high[axis] = &more - &low[axis];
        } else {
            let less = -&more;
            x = l.slice(x, axis, less.floor_div(&two), to.clone(), 1)?;
        }
    }
    Ok(vec![Value::Data(padded(l, x, low, high)?)])
}
