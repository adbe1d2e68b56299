//! Normalizations: [LayerNormalization](https://onnx.ai/onnx/operators/onnx__LayerNormalization.html) 17,
//! [RMSNormalization](https://onnx.ai/onnx/operators/onnx__RMSNormalization.html) 23,
//! [GroupNormalization](https://onnx.ai/onnx/operators/onnx__GroupNormalization.html) 18 (scale per group) and 21 (per
//! channel), BatchNormalization 6, InstanceNormalization 6, LpNormalization 1, MeanVarianceNormalization 9, and ONNX Runtime's
//! SimplifiedLayerNormalization, SkipLayerNormalization, SkipSimplifiedLayerNormalization, EmbedLayerNormalization.
//!
//! Those over trailing dims are the composite [`Op::Norm`]; the others are written out. 16-bit floats are computed with
//! in 32 bits, as `stash_type` 1 says. The statistics that training wants are extra nodes, dead where nobody asks.

use super::heads::dims_of;
use crate::lower::{Call, Lowered, Lowering, Value, axes_of, axis_of, invalid, unsupported};
use tpshard_ir::op::{NormKind, Real};
use tpshard_ir::{DType, Dim, Monoid, Op, Scalar, ValueId};

/// LayerNormalization: `(X, Scale[, B])` to `(Y[, Mean, InvStdDev])`.
pub(crate) fn layer_normalization(lowering: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    if call.opset() < 17 {
        // Before it was ONNX's the operator was ONNX Runtime's own, which passes over attributes it does not know: files
        // that misspell `epsilon` are about.
        call.node.attributes.iter().for_each(|attribute| call.attributes.ignore(&attribute.name));
    }
    over_trailing(lowering, call, NormKind::Layer, 1e-5)
}

/// RMSNormalization: `(X, scale)` to `Y`.
pub(crate) fn rms_normalization(lowering: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    over_trailing(lowering, call, NormKind::Rms, 1e-5)
}

/// SimplifiedLayerNormalization, which is RMS norm: `(X, scale)` to `(Y[, inv_std_var])`.
pub(crate) fn simplified_layer_normalization(
    lowering: &mut Lowering<'_>,
    call: &Call<'_>,
) -> Lowered<Vec<Value>> {
    over_trailing(lowering, call, NormKind::Rms, 1e-5)
}

fn over_trailing(
    lowering: &mut Lowering<'_>,
    call: &Call<'_>,
    kind: NormKind,
    epsilon: f32,
) -> Lowered<Vec<Value>> {
    let axis = call.attributes.int("axis", -1)?;
    let epsilon = f64::from(call.attributes.float("epsilon", epsilon)?);
    check_stash_type(call)?;
    let x = lowering.data(call.input(0)?)?;
    let axis = axis_of(axis, lowering.type_of(x).rank())?;
    let y = trailing(lowering, x, call.input(1)?, call.optional(2), kind, axis, epsilon)?;
    let mut outputs = vec![Value::Data(y)];
    if call.wants(1) || call.wants(2) {
        let (mean, deviation) = statistics(lowering, x, axis, kind, epsilon)?;
        match kind {
            NormKind::Layer => outputs.extend([Value::Data(mean), Value::Data(deviation)]),
            NormKind::Rms => outputs.push(Value::Data(deviation)),
        }
    }
    Ok(outputs)
}

/// The statistics are computed in 32 bits or more, also where none (0) or fewer bits are asked for, as ONNX Runtime does.
fn check_stash_type(call: &Call<'_>) -> Lowered<()> {
    match call.attributes.int("stash_type", 1)? {
        // undefined, float, float16, double, bfloat16
        0 | 1 | 10 | 11 | 16 => Ok(()),
        other => Err(invalid(format!("stash_type {other} is not a floating-point type"))),
    }
}

/// The type that is computed in.
fn wide(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

/// [`Op::Norm`] over dims `axis..` of `x`, in the wider of the types of `x` and the scale; the result has the scale's.
fn trailing(
    lowering: &mut Lowering<'_>,
    x: ValueId,
    scale: &Value,
    bias: Option<&Value>,
    kind: NormKind,
    axis: usize,
    epsilon: f64,
) -> Lowered<ValueId> {
    let result = lowering.dtype(scale);
    let own = lowering.type_of(x).dtype;
    let computed = if own == result { own } else { wide(own) };
    let x = lowering.cast(x, computed)?;
    let mut parameters = Vec::with_capacity(2);
    for parameter in [Some(scale), bias].into_iter().flatten() {
        let value = lowering.data(parameter)?;
        let value = lowering.cast(value, computed)?;
        parameters.push(without_leading_units(lowering, value, lowering.type_of(x).rank() - axis)?);
    }
    let dims = lowering.type_of(x).shape.split_off(axis);
    let norm = Op::Norm { kind, axis, epsilon: Real(epsilon) };
    let y = if parameters.iter().all(|&value| lowering.type_of(value).rank() <= dims.len()) {
        let mut args = vec![x];
        for value in parameters {
            let dims = lowering.current_all(&dims);
            lowering.unify_broadcast(value, &dims, "the scale or bias")?;
            let dims = lowering.current_all(&dims);
            args.push(lowering.broadcast(value, &dims)?);
        }
        lowering.add(norm, &args)?
    } else {
        // Parameters that differ between rows come after the norm.
        let one = lowering.scalar(computed, 1.0)?;
        let one = lowering.broadcast(one, &dims)?;
        let mut y = lowering.add(norm, &[x, one])?;
        for (function, value) in [Scalar::Mul, Scalar::Add].into_iter().zip(parameters) {
            let shape = lowering.type_of(y).shape;
            lowering.unify_broadcast(value, &shape, "the scale or bias")?;
            y = lowering.map(function, &[y, value])?;
        }
        y
    };
    lowering.cast(y, result)
}

/// A parameter without the leading dims of extent 1 that are more than `rank`.
fn without_leading_units(lowering: &mut Lowering<'_>, value: ValueId, rank: usize) -> Lowered<ValueId> {
    let shape = lowering.type_of(value).shape;
    let units = shape.iter().take_while(|dim| dim.is_one()).count();
    let drop = shape.len().saturating_sub(rank).min(units);
    lowering.reshape(value, &shape[drop..])
}

/// The mean over dims `axis..`, and one over the root of variance plus epsilon.
fn statistics(
    lowering: &mut Lowering<'_>,
    x: ValueId,
    axis: usize,
    kind: NormKind,
    epsilon: f64,
) -> Lowered<(ValueId, ValueId)> {
    let ty = lowering.type_of(x);
    let axes: Vec<usize> = (axis..ty.rank()).collect();
    let x = lowering.cast(x, wide(ty.dtype))?;
    let mean = lowering.mean(x, &axes)?;
    let centred = match kind {
        NormKind::Layer => lowering.map(Scalar::Sub, &[x, mean])?,
        NormKind::Rms => x,
    };
    Ok((mean, inverse_deviation(lowering, centred, &axes, epsilon)?))
}

fn inverse_deviation(
    lowering: &mut Lowering<'_>,
    centred: ValueId,
    axes: &[usize],
    epsilon: f64,
) -> Lowered<ValueId> {
    let square = lowering.map(Scalar::Mul, &[centred, centred])?;
    let variance = lowering.mean(square, axes)?;
    let shifted = lowering.map_number(Scalar::Add, variance, epsilon)?;
    lowering.map(Scalar::Rsqrt, &[shifted])
}

/// `(x - mean) / sqrt(variance + epsilon)` over any axes, in the type of `x`.
fn standardised(lowering: &mut Lowering<'_>, x: ValueId, axes: &[usize], epsilon: f64) -> Lowered<ValueId> {
    let mean = lowering.mean(x, axes)?;
    let centred = lowering.map(Scalar::Sub, &[x, mean])?;
    let factor = inverse_deviation(lowering, centred, axes, epsilon)?;
    lowering.map(Scalar::Mul, &[centred, factor])
}

/// com.microsoft SkipLayerNormalization: `(input, skip, gamma[, beta, bias])` to `(Y, mean, inv_std_var, sum)`.
pub(crate) fn skip_layer_normalization(lowering: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    with_skip(lowering, call, NormKind::Layer, call.optional(3), call.optional(4))
}

/// com.microsoft SkipSimplifiedLayerNormalization: `(input, skip, gamma[, bias])`.
pub(crate) fn skip_simplified_layer_normalization(
    lowering: &mut Lowering<'_>,
    call: &Call<'_>,
) -> Lowered<Vec<Value>> {
    with_skip(lowering, call, NormKind::Rms, None, call.optional(3))
}

fn with_skip(
    lowering: &mut Lowering<'_>,
    call: &Call<'_>,
    kind: NormKind,
    beta: Option<&Value>,
    bias: Option<&Value>,
) -> Lowered<Vec<Value>> {
    let epsilon = f64::from(call.attributes.float("epsilon", 1e-12)?);
    let input = lowering.data(call.input(0)?)?;
    let skip = lowering.data(call.input(1)?)?;
    let mut sum = lowering.map(Scalar::Add, &[input, skip])?;
    if let Some(bias) = bias {
        let bias = lowering.data(bias)?;
        sum = lowering.map(Scalar::Add, &[sum, bias])?;
    }
    let axis = axis_of(-1, lowering.type_of(sum).rank())?;
    let y = trailing(lowering, sum, call.input(2)?, beta, kind, axis, epsilon)?;
    let mut outputs = vec![Value::Data(y)];
    if call.wants(1) || call.wants(2) {
        let (mean, deviation) = statistics(lowering, sum, axis, kind, epsilon)?;
        outputs.extend([Value::Data(mean), Value::Data(deviation)]);
    } else {
        outputs.extend([Value::Poison, Value::Poison]);
    }
    outputs.push(Value::Data(sum));
    Ok(outputs)
}

/// com.microsoft EmbedLayerNormalization: the sum of word, position and segment embeddings, normalised.
pub(crate) fn embed_layer_normalization(lowering: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let epsilon = f64::from(call.attributes.float("epsilon", 1e-12)?);
    let mask_type = call.attributes.int("mask_index_type", 0)?;
    let words = call.input(0)?.clone();
    let [batch, sequence] = dims_of(&lowering.ty(&words), "input_ids")?;
    let word_rows = lowering.gather_value(call.input(2)?, &words, 0)?;
    let mut sum = lowering.data(&word_rows)?;
    let positions = match call.optional(8) {
        Some(positions) => lowering.gather_value(call.input(3)?, positions, 0)?,
        None => {
            dims_of::<2>(&lowering.ty(call.input(3)?), "position_embedding")?;
            lowering.slice_value(call.input(3)?, 0, &Dim::constant(0), &sequence, 1)?
        }
    };
    let positions = lowering.data(&positions)?;
    sum = lowering.map(Scalar::Add, &[sum, positions])?;
    if let Some(segments) = call.optional(1) {
        let rows = lowering.gather_value(call.input(4)?, segments, 0)?;
        let rows = lowering.data(&rows)?;
        sum = lowering.map(Scalar::Add, &[sum, rows])?;
    }
    let y = trailing(lowering, sum, call.input(5)?, call.optional(6), NormKind::Layer, 2, epsilon)?;
    let lengths = match call.optional(7) {
        // The number of positions that are not masked.
        Some(mask) if mask_type != 0 || call.wants(1) => {
            let mask = lowering.data(mask)?;
            let mask = lowering.cast(mask, DType::I32)?;
            let count = lowering.reduce(Monoid::Sum, mask, &[1])?;
            let batch = lowering.current(&batch);
            lowering.reshape(count, &[batch])?
        }
        _ => {
            let zero = lowering.scalar(DType::I32, 0.0)?;
            lowering.broadcast(zero, &[batch])?
        }
    };
    Ok(vec![Value::Data(y), Value::Data(lengths), Value::Data(sum)])
}

/// `x * scale + bias`, both with one entry per index of `axis` of `x`; computed in the type of `x`.
fn per_channel(
    lowering: &mut Lowering<'_>,
    x: ValueId,
    axis: usize,
    scale: &Value,
    bias: &Value,
) -> Lowered<ValueId> {
    let scale = along_channels(lowering, x, axis, scale)?;
    let scaled = lowering.map(Scalar::Mul, &[x, scale])?;
    let bias = along_channels(lowering, x, axis, bias)?;
    lowering.map(Scalar::Add, &[scaled, bias])
}

/// A parameter with one entry per index of `axis` of `x`, in the type of `x` and a shape that broadcasts to its.
fn along_channels(
    lowering: &mut Lowering<'_>,
    x: ValueId,
    axis: usize,
    parameter: &Value,
) -> Lowered<ValueId> {
    let value = lowering.data(parameter)?;
    let ty = lowering.type_of(x);
    let Some(extent) = ty.shape.get(axis) else { return Err(invalid(format!("{ty} has no channels"))) };
    lowering.unify_shape(value, std::slice::from_ref(extent), "a parameter per channel")?;
    let mut shape = vec![Dim::constant(1); ty.rank()];
    shape[axis] = lowering.current(extent);
    let value = lowering.cast(value, ty.dtype)?;
    lowering.reshape(value, &shape)
}

/// GroupNormalization: `(X[N, C, …], scale, bias)`.
pub(crate) fn group_normalization(lowering: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let epsilon = f64::from(call.attributes.float("epsilon", 1e-5)?);
    let groups = call.attributes.required_int("num_groups")?;
    let groups = usize::try_from(groups).ok().filter(|&groups| groups > 0);
    let groups = Dim::from(groups.ok_or_else(|| invalid("num_groups is not positive"))?);
    let per_group = call.opset() < 21;
    if !per_group {
        check_stash_type(call)?;
    }
    let x = lowering.data(call.input(0)?)?;
    let ty = lowering.type_of(x);
    let (Some(batch), Some(channels)) = (ty.shape.first(), ty.shape.get(1)) else {
        return Err(invalid(format!("{ty} has no channels")));
    };
    let size = channels.exact_div(&groups);
    let size =
        size.ok_or_else(|| invalid(format!("{channels} channels do not divide into {groups} groups")))?;
    let mut grouped = vec![batch.clone(), groups, size];
    grouped.extend_from_slice(&ty.shape[2..]);
    let x = lowering.cast(x, wide(ty.dtype))?;
    let x = lowering.reshape(x, &grouped)?;
    let axes: Vec<usize> = (2..grouped.len()).collect();
    let mut y = standardised(lowering, x, &axes, epsilon)?;
    if per_group {
        y = per_channel(lowering, y, 1, call.input(1)?, call.input(2)?)?;
    }
    y = lowering.reshape(y, &ty.shape)?;
    if !per_group {
        y = per_channel(lowering, y, 1, call.input(1)?, call.input(2)?)?;
    }
    Ok(vec![Value::Data(lowering.cast(y, ty.dtype)?)])
}

/// InstanceNormalization: `(X[N, C, …], scale, bias)`, each channel of each example by itself.
pub(crate) fn instance_normalization(lowering: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let epsilon = f64::from(call.attributes.float("epsilon", 1e-5)?);
    let x = lowering.data(call.input(0)?)?;
    let ty = lowering.type_of(x);
    if ty.rank() < 3 {
        return Err(invalid(format!("{ty} has no dims beside batch and channels")));
    }
    let x = lowering.cast(x, wide(ty.dtype))?;
    let axes: Vec<usize> = (2..ty.rank()).collect();
    let y = standardised(lowering, x, &axes, epsilon)?;
    let y = per_channel(lowering, y, 1, call.input(1)?, call.input(2)?)?;
    Ok(vec![Value::Data(lowering.cast(y, ty.dtype)?)])
}

/// LpNormalization: `x / |x|_p` along one axis; a row of zeros stays.
pub(crate) fn lp_normalization(lowering: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let p = call.attributes.int("p", 2)?;
    let axis = call.attributes.int("axis", -1)?;
    let x = lowering.data(call.input(0)?)?;
    let ty = lowering.type_of(x);
    let axis = axis_of(axis, ty.rank())?;
    let x = lowering.cast(x, wide(ty.dtype))?;
    let norm = match p {
        1 => {
            let magnitude = lowering.map(Scalar::Abs, &[x])?;
            lowering.reduce(Monoid::Sum, magnitude, &[axis])?
        }
        2 => {
            let square = lowering.map(Scalar::Mul, &[x, x])?;
            let sum = lowering.reduce(Monoid::Sum, square, &[axis])?;
            lowering.map(Scalar::Sqrt, &[sum])?
        }
        _ => return Err(unsupported(format!("p = {p}; only 1 and 2 are defined"))),
    };
    let empty = lowering.map_number(Scalar::Equal, norm, 0.0)?;
    let one = lowering.scalar(wide(ty.dtype), 1.0)?;
    let divisor = lowering.map(Scalar::Select, &[empty, one, norm])?;
    let y = lowering.map(Scalar::Div, &[x, divisor])?;
    Ok(vec![Value::Data(lowering.cast(y, ty.dtype)?)])
}

/// MeanVarianceNormalization: `(x - mean) / (sqrt(variance) + 1e-9)`.
pub(crate) fn mean_variance_normalization(
    lowering: &mut Lowering<'_>,
    call: &Call<'_>,
) -> Lowered<Vec<Value>> {
    let axes = call.attributes.ints("axes", &[0, 2, 3])?;
    let x = lowering.data(call.input(0)?)?;
    let ty = lowering.type_of(x);
    let axes = axes_of(axes, ty.rank())?;
    let x = lowering.cast(x, wide(ty.dtype))?;
    let mean = lowering.mean(x, &axes)?;
    let centred = lowering.map(Scalar::Sub, &[x, mean])?;
    let square = lowering.map(Scalar::Mul, &[centred, centred])?;
    let variance = lowering.mean(square, &axes)?;
    let deviation = lowering.map(Scalar::Sqrt, &[variance])?;
    let deviation = lowering.map_number(Scalar::Add, deviation, 1e-9)?;
    let y = lowering.map(Scalar::Div, &[centred, deviation])?;
    Ok(vec![Value::Data(lowering.cast(y, ty.dtype)?)])
}

/// BatchNormalization of inference: `(X[N, C, …], scale, bias, running mean, running variance)`.
pub(crate) fn batch_normalization(lowering: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let read = &call.attributes;
    for name in ["is_test", "consumed_inputs"] {
        read.ignore(name);
    }
    let momentum = f64::from(read.float("momentum", 0.9)?);
    let training = read.bool("training_mode", false)?;
    if !read.bool("spatial", true)? {
        return Err(unsupported("BatchNormalization with spatial = 0"));
    }
    let epsilon = f64::from(read.float("epsilon", 1e-5)?);
    one_type_per_parameter(lowering, call)?;
    let x = lowering.data(call.input(0)?)?;
    let own = lowering.type_of(x).dtype;
    let x = lowering.cast(x, wide(own))?;
    let mut parameters = Vec::with_capacity(4);
    for index in 1..5 {
        parameters.push(along_channels(lowering, x, 1, call.input(index)?)?);
    }
    let &[scale, bias, mut mean, mut variance] = parameters.as_slice() else {
        return Err(invalid("not four parameters"));
    };
    let mut running = Vec::new();
    if training {
        // The statistics of this batch, and the running ones moved towards them.
        let axes: Vec<usize> = (0..lowering.type_of(x).rank()).filter(|&axis| axis != 1).collect();
        let own_mean = lowering.mean(x, &axes)?;
        let centred = lowering.map(Scalar::Sub, &[x, own_mean])?;
        let square = lowering.map(Scalar::Mul, &[centred, centred])?;
        let own_variance = lowering.mean(square, &axes)?;
        for (before, now, input) in [(mean, own_mean, 3), (variance, own_variance, 4)] {
            let before = lowering.map_number(Scalar::Mul, before, momentum)?;
            let flat = lowering.shape(call.input(input)?);
            let dtype = lowering.dtype(call.input(input)?);
            let share = lowering.map_number(Scalar::Mul, now, 1.0 - momentum)?;
            let after = lowering.map(Scalar::Add, &[before, share])?;
            let after = lowering.reshape(after, &flat)?;
            running.push(Value::Data(lowering.cast(after, dtype)?));
        }
        (mean, variance) = (own_mean, own_variance);
    }
    let shifted = lowering.map_number(Scalar::Add, variance, epsilon)?;
    let deviation = lowering.map(Scalar::Sqrt, &[shifted])?;
    let factor = lowering.map(Scalar::Div, &[scale, deviation])?;
    let centred = lowering.map(Scalar::Sub, &[x, mean])?;
    let scaled = lowering.map(Scalar::Mul, &[centred, factor])?;
    let y = lowering.map(Scalar::Add, &[scaled, bias])?;
    let mut outputs = vec![Value::Data(lowering.cast(y, own)?)];
    outputs.extend(running);
    Ok(outputs)
}

/// Operands that share a type parameter: all of them before opset 14, then `(X, scale, B)` and the statistics, from opset
/// 15 on `X` alone, `(scale, B)` and the statistics.
fn one_type_per_parameter(lowering: &Lowering<'_>, call: &Call<'_>) -> Lowered<()> {
    let groups: &[&[usize]] = match call.opset() {
        ..14 => &[&[0, 1, 2, 3, 4]],
        14 => &[&[0, 1, 2], &[3, 4]],
        _ => &[&[1, 2], &[3, 4]],
    };
    for group in groups {
        let mut types = Vec::with_capacity(group.len());
        for &index in *group {
            types.push(lowering.dtype(call.input(index)?));
        }
        if types.windows(2).any(|pair| pair[0] != pair[1]) {
            let names: Vec<&str> = types.iter().map(|dtype| dtype.name()).collect();
            let opset = call.opset();
            return Err(invalid(format!(
                "inputs {group:?} are of types {}, and of one type in opset {opset}",
                names.join(", ")
            )));
        }
    }
    Ok(())
}
