//! Losses: [NegativeLogLikelihoodLoss](https://onnx.ai/onnx/operators/onnx__NegativeLogLikelihoodLoss.html) 12 and
//! [SoftmaxCrossEntropyLoss](https://onnx.ai/onnx/operators/onnx__SoftmaxCrossEntropyLoss.html) 12.
//!
//! The class is dim 1. A target that is `ignore_index` counts as nothing, in the mean as well.

use crate::error::quote;
use crate::lower::{Call, Lowered, Lowering, Value, invalid};
use tpshard_ir::{DType, Dim, Monoid, Op, Scalar, ValueId};

pub(super) fn negative_log_likelihood(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let x = l.data(call.input(0)?)?;
    Ok(vec![Value::Data(loss(l, call, x)?)])
}

/// The loss, and the logarithms of the softmax.
pub(super) fn softmax_cross_entropy(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let x = l.data(call.input(0)?)?;
    if l.graph.ty(x).rank() < 2 {
        return Err(invalid(format!("scores {}", l.graph.ty(x))));
    }
    let high = l.reduce(Monoid::Max, x, &[1])?;
    let low = l.map(Scalar::Sub, &[x, high])?;
    let exp = l.map(Scalar::Exp, &[low])?;
    let sum = l.reduce(Monoid::Sum, exp, &[1])?;
    let log = l.map(Scalar::Log, &[sum])?;
    let logarithms = l.map(Scalar::Sub, &[low, log])?;
    Ok(vec![Value::Data(loss(l, call, logarithms)?), Value::Data(logarithms)])
}

/// Of logarithms of probabilities `[N, C, …]`, targets `[N, …]` and optional weights `[C]`.
fn loss(l: &mut Lowering<'_>, call: &Call<'_>, x: ValueId) -> Lowered<ValueId> {
    let reduction = call.attributes.string("reduction", "mean")?;
    let ignored = call.attributes.optional_int("ignore_index")?;
    let target = l.data(call.input(1)?)?;
    let mut target = l.cast(target, DType::I64)?;
    let (ty, targets) = (l.graph.ty(x).clone(), l.graph.ty(target).clone());
    if ty.rank() < 2 || targets.rank() + 1 != ty.rank() {
        return Err(invalid(format!("targets {targets} of scores {ty}")));
    }
    let counted = match ignored {
        None => None,
        Some(ignored) => {
            let same = l.literal(tpshard_ir::Tensor::scalar(ignored))?;
            let same = l.map(Scalar::Equal, &[target, same])?;
            // Any class will do for a target that is not one.
            let zero = l.scalar(DType::I64, 0.0)?;
            target = l.map(Scalar::Select, &[same, zero, target])?;
            Some(l.map(Scalar::Not, &[same])?)
        }
    };
    let weight = weights(l, call, target, counted, ty.dtype)?;
    let mut column = targets.shape.clone();
    column.insert(1, Dim::constant(1));
    let index = l.reshape(target, &column)?;
    let picked = l.add(Op::GatherElements { axis: 1 }, &[x, index])?;
    let picked = l.reshape(picked, &targets.shape)?;
    let mut value = l.map(Scalar::Neg, &[picked])?;
    if let Some(weight) = weight {
        value = l.map(Scalar::Mul, &[value, weight])?;
    }
    if let Some(counted) = counted {
        // Not by a product with 0: the loss may be infinite.
        let zero = l.scalar(ty.dtype, 0.0)?;
        value = l.map(Scalar::Select, &[counted, value, zero])?;
    }
    let axes: Vec<usize> = (0..targets.rank()).collect();
    match reduction {
        "none" => Ok(value),
        "sum" => {
            let sum = l.reduce(Monoid::Sum, value, &axes)?;
            l.reshape(sum, &[])
        }
        "mean" => {
            let mean = match weight {
                None => l.mean(value, &axes)?,
                Some(weight) => {
                    let weight = l.broadcast(weight, &targets.shape)?;
                    let (sum, total) =
                        (l.reduce(Monoid::Sum, value, &axes)?, l.reduce(Monoid::Sum, weight, &axes)?);
                    l.map(Scalar::Div, &[sum, total])?
                }
            };
            l.reshape(mean, &[])
        }
        other => Err(invalid(format!("the reduction {}", quote(other)))),
    }
}

/// What each target counts; `None` if all count 1.
fn weights(
    l: &mut Lowering<'_>,
    call: &Call<'_>,
    target: ValueId,
    counted: Option<ValueId>,
    dtype: DType,
) -> Lowered<Option<ValueId>> {
    let own = match call.optional(2) {
        None => None,
        Some(weights) => {
            let weights = l.data(weights)?;
            Some(l.add(Op::Gather { axis: 0, window: None }, &[weights, target])?)
        }
    };
    let Some(counted) = counted else { return Ok(own) };
    let counted = l.cast(counted, dtype)?;
    match own {
        None => Ok(Some(counted)),
        Some(own) => Ok(Some(l.map(Scalar::Mul, &[own, counted])?)),
    }
}
