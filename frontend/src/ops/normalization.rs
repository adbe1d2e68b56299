//! Normalisations: LayerNormalization (17), RMSNormalization (23), Batch-, Instance-, GroupNormalization, Lp- and
//! MeanVarianceNormalization, <https://onnx.ai/onnx/operators/>, and ONNX Runtime's Skip and Simplified forms,
//! <https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md>.

use crate::lower::{Call, Lowered, Lowering, Value, axes_of, axis_of, invalid, unsupported};
use tpshard_ir::op::{NormKind, Real};
use tpshard_ir::{DType, Dim, Monoid, Op, Scalar, ValueId};

/// `Op::Norm` with parameters brought to the type and the normalised dims of `x`.
fn norm(
    l: &mut Lowering<'_>,
    kind: NormKind,
    x: ValueId,
    parameters: &[Option<Value>],
    axis: usize,
    epsilon: f64,
) -> Lowered<ValueId> {
    let ty = l.graph.ty(x).clone();
    let mut args = vec![x];
    // Parameters that do not fit into the normalised dims are applied afterwards.
    let fits = |l: &Lowering<'_>, value: &Value| {
        let own = l.shape(value);
        own.len() <= ty.rank() - axis || Dim::product(&own) == Dim::product(&ty.shape[axis..])
    };
    if parameters.iter().flatten().any(|value| !fits(l, value)) {
        let mut result = norm(l, kind, x, &[], axis, epsilon)?;
        for (parameter, scalar) in parameters.iter().zip([Scalar::Mul, Scalar::Add]) {
            if let Some(parameter) = parameter {
                let parameter = l.cast_value(parameter, ty.dtype)?;
                let parameter = l.data(&parameter)?;
                result = l.map(scalar, &[result, parameter])?;
            }
        }
        return Ok(result);
    }
    for (at, parameter) in parameters.iter().enumerate() {
        let value = match parameter {
            Some(value) => value.clone(),
            None if at == 0 && kind == NormKind::Layer => l.number_value(ty.dtype, 1.0)?,
            None => continue,
        };
        let shape = l.current_all(&ty.shape[axis..]);
        let own = l.shape(&value);
        let value = if Dim::product(&own) == Dim::product(&shape) && own != shape {
            l.reshape_value(&value, &shape)?
        } else {
            l.expand_value(&value, &shape)?
        };
        let value = l.cast_value(&value, ty.dtype)?;
        args.push(l.data(&value)?);
    }
    if args.len() == 1 {
        let one = l.number_value(ty.dtype, 1.0)?;
        let one = l.expand_value(&one, &ty.shape[axis..])?;
        args.push(l.data(&one)?);
    }
    l.add(Op::Norm { kind, axis, epsilon: Real(epsilon) }, &args)
}

pub(super) fn layer(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    if call.opset() < 17 {
        // Before ONNX had the operator, tools of ONNX Runtime wrote the attribute with this name, which had no effect.
        call.attributes.ignore("epsion");
    }
    call.attributes.ignore("stash_type");
    let epsilon = f64::from(call.attributes.float("epsilon", 1e-5)?);
    let x = l.data(call.input(0)?)?;
    let rank = l.graph.ty(x).rank();
    let axis = axis_of(call.attributes.int("axis", -1)?, rank)?;
    let parameters = [call.optional(1).cloned(), call.optional(2).cloned()];
    let mut values = vec![Value::Data(norm(l, NormKind::Layer, x, &parameters, axis, epsilon)?)];
    if call.wants(1) || call.wants(2) {
        let axes: Vec<usize> = (axis..rank).collect();
        let wide = l.cast(x, DType::F32)?;
        let (mean, deviation) = moments(l, wide, &axes, epsilon)?;
        let one = l.scalar(DType::F32, 1.0)?;
        let inverse = l.map(Scalar::Div, &[one, deviation])?;
        values.extend([Value::Data(mean), Value::Data(inverse)]);
    }
    Ok(values)
}

/// Mean and `sqrt(variance + epsilon)` over axes.
fn moments(l: &mut Lowering<'_>, x: ValueId, axes: &[usize], epsilon: f64) -> Lowered<(ValueId, ValueId)> {
    let mean = l.mean(x, axes)?;
    let centred = l.map(Scalar::Sub, &[x, mean])?;
    let square = l.map(Scalar::Mul, &[centred, centred])?;
    let variance = l.mean(square, axes)?;
    let shifted = if epsilon == 0.0 { variance } else { l.map_number(Scalar::Add, variance, epsilon)? };
    Ok((mean, l.map(Scalar::Sqrt, &[shifted])?))
}

pub(super) fn rms(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    call.attributes.ignore("stash_type");
    let epsilon = f64::from(call.attributes.float("epsilon", 1e-5)?);
    let x = l.data(call.input(0)?)?;
    let axis = axis_of(call.attributes.int("axis", -1)?, l.graph.ty(x).rank())?;
    Ok(vec![Value::Data(norm(l, NormKind::Rms, x, &[call.optional(1).cloned()], axis, epsilon)?)])
}

/// ONNX Runtime's name for RMSNormalization.
pub(super) fn simplified(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    if call.wants(1) {
        return Err(unsupported("the inverse deviation of a SimplifiedLayerNormalization"));
    }
    rms(l, call)
}

/// Outputs: the normalised sum, (mean, inverse deviation: unsupported), the sum.
fn skip(
    l: &mut Lowering<'_>,
    call: &Call<'_>,
    kind: NormKind,
    beta: Option<usize>,
    bias: usize,
) -> Lowered<Vec<Value>> {
    let epsilon = f64::from(call.attributes.float("epsilon", 1e-12)?);
    let (x, skip) = (l.data(call.input(0)?)?, l.data(call.input(1)?)?);
    let mut sum = l.map(Scalar::Add, &[x, skip])?;
    if let Some(bias) = call.optional(bias) {
        let bias = l.data(bias)?;
        sum = l.map(Scalar::Add, &[sum, bias])?;
    }
    let axis = axis_of(-1, l.graph.ty(sum).rank())?;
    let mut parameters = vec![call.optional(2).cloned()];
    if let Some(beta) = beta {
        parameters.push(call.optional(beta).cloned());
    }
    let result = norm(l, kind, sum, &parameters, axis, epsilon)?;
    Ok(vec![Value::Data(result), Value::Poison, Value::Poison, Value::Data(sum)])
}

pub(super) fn skip_layer(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    skip(l, call, NormKind::Layer, Some(3), 4)
}

pub(super) fn skip_simplified(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    skip(l, call, NormKind::Rms, None, 3)
}

/// A vector with one entry per channel, shaped to stretch over `x[N, C, …]`.
fn per_channel(l: &mut Lowering<'_>, value: &Value, x: ValueId) -> Lowered<ValueId> {
    let ty = l.graph.ty(x).clone();
    let channels = ty.shape.get(1).cloned().ok_or_else(|| invalid(format!("no channels in {ty}")))?;
    let own = l.shape(value);
    let [extent] = own.as_slice() else { return Err(invalid(format!("a parameter of shape {own:?}"))) };
    l.unify(extent, &channels)?;
    let mut shape = vec![Dim::constant(1); ty.rank()];
    shape[1] = l.current(&channels);
    let value = l.reshape_value(value, &shape)?;
    let value = l.cast_value(&value, ty.dtype)?;
    l.data(&value)
}

/// Inference: the running mean and variance. Training outputs are refused.
pub(super) fn batch(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    for name in ["momentum", "spatial", "is_test", "consumed_inputs"] {
        call.attributes.ignore(name);
    }
    if call.attributes.bool("training_mode", false)? {
        return Err(unsupported("BatchNormalization in training mode"));
    }
    if call
        .node
        .attributes
        .iter()
        .any(|a| a.name == "spatial" && a.value == crate::model::AttributeValue::Int(0))
    {
        return Err(unsupported("BatchNormalization with spatial = 0"));
    }
    let epsilon = f64::from(call.attributes.float("epsilon", 1e-5)?);
    let x = l.data(call.input(0)?)?;
    let mut parameters = Vec::with_capacity(4);
    for index in 1..5 {
        let value = call.input(index)?.clone();
        parameters.push(per_channel(l, &value, x)?);
    }
    let [scale, bias, mean, variance] = parameters.as_slice() else { return Err(invalid("parameters")) };
    let shifted = l.map_number(Scalar::Add, *variance, epsilon)?;
    let deviation = l.map(Scalar::Sqrt, &[shifted])?;
    let factor = l.map(Scalar::Div, &[*scale, deviation])?;
    let centred = l.map(Scalar::Sub, &[x, *mean])?;
    let scaled = l.map(Scalar::Mul, &[centred, factor])?;
    Ok(vec![Value::Data(l.map(Scalar::Add, &[scaled, *bias])?)])
}

/// `(x - mean) / sqrt(variance + epsilon)` over axes.
fn standardised(l: &mut Lowering<'_>, x: ValueId, axes: &[usize], epsilon: f64) -> Lowered<ValueId> {
    let (mean, deviation) = moments(l, x, axes, epsilon)?;
    let centred = l.map(Scalar::Sub, &[x, mean])?;
    l.map(Scalar::Div, &[centred, deviation])
}

pub(super) fn instance(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    call.attributes.ignore("consumed_inputs");
    let epsilon = f64::from(call.attributes.float("epsilon", 1e-5)?);
    let x = l.data(call.input(0)?)?;
    let axes: Vec<usize> = (2..l.graph.ty(x).rank()).collect();
    let normal = standardised(l, x, &axes, epsilon)?;
    let (scale, bias) = (call.input(1)?.clone(), call.input(2)?.clone());
    let (scale, bias) = (per_channel(l, &scale, x)?, per_channel(l, &bias, x)?);
    let scaled = l.map(Scalar::Mul, &[normal, scale])?;
    Ok(vec![Value::Data(l.map(Scalar::Add, &[scaled, bias])?)])
}

/// Scale and bias have one entry per group at opset 18, per channel since 21.
pub(super) fn group(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    call.attributes.ignore("stash_type");
    let epsilon = f64::from(call.attributes.float("epsilon", 1e-5)?);
    let groups = Dim::constant(call.attributes.required_int("num_groups")?);
    let x = l.data(call.input(0)?)?;
    let ty = l.graph.ty(x).clone();
    let channels = ty.shape.get(1).cloned().ok_or_else(|| invalid(format!("no channels in {ty}")))?;
    if groups.as_const().is_none_or(|groups| groups < 1) {
        return Err(invalid("the number of groups"));
    }
    let each = channels
        .exact_div(&groups)
        .ok_or_else(|| invalid(format!("{channels} channels in {groups} groups")))?;
    let mut split = vec![ty.shape[0].clone(), groups.clone(), each];
    split.extend(ty.shape[2..].iter().cloned());
    let parted = l.reshape(x, &split)?;
    let axes: Vec<usize> = (2..split.len()).collect();
    let mut result = standardised(l, parted, &axes, epsilon)?;
    // Writers disagree before opset 21, so the parameters' extent decides.
    let extent = l.shape(call.input(1)?);
    let per_group = call.opset() < 21 && extent.first() == Some(&groups);
    if !per_group {
        result = l.reshape(result, &ty.shape)?;
    }
    for (index, scalar) in [(1, Scalar::Mul), (2, Scalar::Add)] {
        let parameter = call.input(index)?.clone();
        let parameter = per_channel(l, &parameter, result)?;
        result = l.map(scalar, &[result, parameter])?;
    }
    Ok(vec![Value::Data(l.reshape(result, &ty.shape)?)])
}

pub(super) fn mean_variance(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let x = l.data(call.input(0)?)?;
    let axes = axes_of(call.attributes.ints("axes", &[0, 2, 3])?, l.graph.ty(x).rank())?;
    let (mean, deviation) = moments(l, x, &axes, 0.0)?;
    let centred = l.map(Scalar::Sub, &[x, mean])?;
    let divisor = l.map_number(Scalar::Add, deviation, 1e-9)?;
    Ok(vec![Value::Data(l.map(Scalar::Div, &[centred, divisor])?)])
}

pub(super) fn lp(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let x = l.data(call.input(0)?)?;
    let axis = axis_of(call.attributes.int("axis", -1)?, l.graph.ty(x).rank())?;
    let size = match call.attributes.int("p", 2)? {
        1 => {
            let size = l.map(Scalar::Abs, &[x])?;
            l.reduce(Monoid::Sum, size, &[axis])?
        }
        2 => {
            let square = l.map(Scalar::Mul, &[x, x])?;
            let sum = l.reduce(Monoid::Sum, square, &[axis])?;
            l.map(Scalar::Sqrt, &[sum])?
        }
        p => return Err(invalid(format!("the norm of order {p}"))),
    };
    // A vector of zeros stays one.
    let empty = {
        let zero = l.scalar(l.graph.ty(x).dtype, 0.0)?;
        l.map(Scalar::Equal, &[size, zero])?
    };
    let one = l.scalar(l.graph.ty(x).dtype, 1.0)?;
    let divisor = l.map(Scalar::Select, &[empty, one, size])?;
    Ok(vec![Value::Data(l.map(Scalar::Div, &[x, divisor])?)])
}
