//! Sliding windows: Conv, MaxPool, AveragePool and the global pools, <https://onnx.ai/onnx/operators/>.
//!
//! `auto_pad` is resolved here: SAME needs constant spatial dims, or a stride of 1.

use super::activation::{named_activation, swish_of};
use super::heads::dims_of;
use super::pooling::max_pool_indices;
use crate::lower::{Call, Lowered, Lowering, Value, invalid, undecided, unsupported};
use tpshard_ir::op::{PoolKind, Window};
use tpshard_ir::{Dim, Monoid, Op, Scalar, ValueId};

pub(super) fn lengths(
    values: Option<&[i64]>,
    count: usize,
    default: usize,
    what: &str,
) -> Lowered<Vec<usize>> {
    let Some(values) = values else { return Ok(vec![default; count]) };
    let read: Option<Vec<usize>> = values.iter().map(|&value| usize::try_from(value).ok()).collect();
    read.filter(|read| read.len() == count && read.iter().all(|&value| value <= i32::MAX as usize))
        .ok_or_else(|| invalid(format!("{what} {values:?} for {count} spatial dims")))
}

pub(super) fn window(l: &Lowering<'_>, call: &Call<'_>, x: ValueId, kernel: Vec<usize>) -> Lowered<Window> {
    let spatial = l.graph.ty(x).shape.get(2..).unwrap_or(&[]).to_vec();
    let count = spatial.len();
    if count == 0 || kernel.len() != count {
        return Err(invalid(format!("a window {kernel:?} over {}", l.graph.ty(x))));
    }
    let strides = lengths(call.attributes.optional_ints("strides")?, count, 1, "strides")?;
    let dilations = lengths(call.attributes.optional_ints("dilations")?, count, 1, "dilations")?;
    if strides.contains(&0) || dilations.contains(&0) || kernel.contains(&0) {
        return Err(invalid("a kernel, stride or dilation of 0"));
    }
    let pads = call.attributes.optional_ints("pads")?;
    let mode = call.attributes.string("auto_pad", "NOTSET")?;
    let (pads_low, pads_high) = match mode {
        "NOTSET" | "" => {
            let pads = lengths(pads, 2 * count, 0, "pads")?;
            (pads[..count].to_vec(), pads[count..].to_vec())
        }
        "VALID" => (vec![0; count], vec![0; count]),
        "SAME_UPPER" | "SAME_LOWER" => {
            let mut total = Vec::with_capacity(count);
            for axis in 0..count {
                let reach = (kernel[axis] - 1).saturating_mul(dilations[axis]) + 1;
                total.push(same_pad(&spatial[axis], reach, strides[axis])?);
            }
            let half: Vec<usize> = total.iter().map(|total| total / 2).collect();
            let rest = total.iter().zip(&half).map(|(total, half)| total - half).collect();
            if mode == "SAME_UPPER" { (half, rest) } else { (rest, half) }
        }
        other => return Err(invalid(format!("auto_pad {}", crate::error::quote(other)))),
    };
    Ok(Window { kernel, strides, dilations, pads_low, pads_high, ceil: false })
}

/// Padding such that the result has `ceil(extent / stride)` windows.
fn same_pad(extent: &Dim, reach: usize, stride: usize) -> Lowered<usize> {
    match extent.as_size() {
        Some(extent) => {
            let windows = extent.div_ceil(stride);
            Ok((windows.saturating_sub(1).saturating_mul(stride) + reach).saturating_sub(extent))
        }
        None if stride == 1 => Ok(reach - 1),
        None => Err(undecided("auto_pad SAME with a stride over a dynamic dim")),
    }
}

pub(super) fn conv(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let (x, w) = (l.data(call.input(0)?)?, l.data(call.input(1)?)?);
    let result = convolve(l, call, x, w)?;
    let Some(bias) = call.optional(2) else { return Ok(vec![Value::Data(result)]) };
    let bias = l.data(bias)?;
    Ok(vec![Value::Data(per_channel(l, Scalar::Add, result, bias)?)])
}

/// FusedConv of ONNX Runtime: a Conv, an optional summand of its result, and what is applied to each element of that.
pub(super) fn fused_conv(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let name = call.attributes.string("activation", "")?;
    let parameters = call.attributes.optional_floats("activation_params")?.unwrap_or(&[]);
    let mut values = conv(l, call)?;
    for value in &mut values {
        let mut y = l.data(value)?;
        if let Some(summand) = call.optional(3) {
            let summand = l.data(summand)?;
            y = l.map(Scalar::Add, &[y, summand])?;
        }
        let parameter = |index: usize| parameters.get(index).copied().map(f64::from);
        y = match name {
            "" => y,
            "Clip" => {
                let y = l.map_number(Scalar::Max, y, parameter(0).unwrap_or(f64::from(f32::MIN)))?;
                l.map_number(Scalar::Min, y, parameter(1).unwrap_or(f64::from(f32::MAX)))?
            }
            name => named_activation(l, name, y, parameter(0), parameter(1))?,
        };
        *value = Value::Data(y);
    }
    Ok(values)
}

/// `f(x, parameter)` with one entry of the parameter per channel.
pub(super) fn per_channel(
    l: &mut Lowering<'_>,
    function: Scalar,
    x: ValueId,
    parameter: ValueId,
) -> Lowered<ValueId> {
    let ty = l.graph.ty(x).clone();
    let mut shape = vec![Dim::constant(1); ty.rank()];
    shape[1] = ty.shape[1].clone();
    let parameter = l.reshape(parameter, &shape)?;
    l.map(function, &[x, parameter])
}

/// The convolution that the attributes of a Conv describe, without bias.
pub(super) fn convolve(l: &mut Lowering<'_>, call: &Call<'_>, x: ValueId, w: ValueId) -> Lowered<ValueId> {
    let weight = l.graph.ty(w).clone();
    let kernel: Option<Vec<usize>> = weight.shape.get(2..).unwrap_or(&[]).iter().map(Dim::as_size).collect();
    let kernel = kernel.ok_or_else(|| undecided("a kernel of dynamic size"))?;
    if let Some(declared) = call.attributes.optional_ints("kernel_shape")? {
        let declared = lengths(Some(declared), kernel.len(), 1, "kernel_shape")?;
        if declared != kernel {
            return Err(invalid(format!("kernel_shape {declared:?} and a weight of {weight}")));
        }
    }
    let groups = usize::try_from(call.attributes.int("group", 1)?).ok().filter(|&groups| groups > 0);
    let groups = groups.ok_or_else(|| invalid("the group count"))?;
    let window = window(l, call, x, kernel)?;
    let channels = l.graph.ty(x).shape[1].clone();
    let wanted = &weight.shape[1] * &Dim::from(groups);
    l.unify(&channels, &wanted)?;
    l.add(Op::Conv { window, groups }, &[x, w])
}

/// CausalConvWithState of ONNX Runtime, over one dim: `(input, weight, bias, past_state)`. Every channel has a window of
/// its own that ends where its result stands; what it sees before the input is the state, which is kept for the next step.
pub(super) fn causal_conv_with_state(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let read = &call.attributes;
    if read.int("ndim", 1)? != 1 || read.bool("channels_last", false)? || read.int("state_window", 0)? != 0 {
        return Err(unsupported(
            "a causal convolution over several dims, channels last, or with a window of states",
        ));
    }
    let dilation = usize::try_from(read.int("dilation", 1)?).ok().filter(|&dilation| dilation > 0);
    let dilation = dilation.ok_or_else(|| invalid("the dilation"))?;
    let (x, w) = (l.data(call.input(0)?)?, l.data(call.input(1)?)?);
    let ([batch, channels, steps], [groups, _, kernel]) =
        (dims_of(&l.graph.ty(x).clone(), "the input")?, dims_of(&l.graph.ty(w).clone(), "the weight")?);
    l.unify(&channels, &groups)?;
    let (Some(groups), Some(kernel)) = (groups.as_size(), kernel.as_size().filter(|&kernel| kernel > 0))
    else {
        return Err(undecided("a kernel of dynamic size"));
    };
    let reach = (kernel - 1).saturating_mul(dilation);
    let state = vec![batch, channels, Dim::from(reach)];
    let past = match call.optional(3) {
        Some(past) => {
            let (ty, wanted) = (l.ty(past), state.len());
            if ty.rank() != wanted {
                return Err(invalid(format!("a state of type {ty}")));
            }
            for (have, wanted) in ty.shape.iter().zip(&state) {
                let (have, wanted) = (l.current(have), l.current(wanted));
                l.unify(&have, &wanted)?;
            }
            past.clone()
        }
        None => {
            let zero = l.scalar(l.graph.ty(x).dtype, 0.0)?;
            let state = l.current_all(&state);
            Value::Data(l.broadcast(zero, &state)?)
        }
    };
    let all = l.concat_values(&[past, Value::Data(x)], 2)?;
    let all = l.data(&all)?;
    let window = Window {
        kernel: vec![kernel],
        strides: vec![1],
        dilations: vec![dilation],
        pads_low: vec![0],
        pads_high: vec![0],
        ceil: false,
    };
    let mut y = l.add(Op::Conv { window, groups }, &[all, w])?;
    if let Some(bias) = call.optional(2) {
        let bias = l.data(bias)?;
        y = per_channel(l, Scalar::Add, y, bias)?;
    }
    match read.string("activation", "none")? {
        "none" => {}
        "silu" | "swish" => y = swish_of(l, y, 1.0)?,
        other => return Err(invalid(format!("the activation {}", crate::error::quote(other)))),
    }
    let steps = l.current(&steps);
    let present = l.slice(all, 2, steps, Dim::from(reach), 1)?;
    Ok(vec![Value::Data(y), Value::Data(present)])
}

/// The operand, what is pooled from it, and by which window.
fn pooled(l: &mut Lowering<'_>, call: &Call<'_>, kind: PoolKind) -> Lowered<(ValueId, ValueId, Window)> {
    let x = l.data(call.input(0)?)?;
    let (pooled, window) = pool(l, call, kind, x)?;
    Ok((x, pooled, window))
}

fn pool(l: &mut Lowering<'_>, call: &Call<'_>, kind: PoolKind, x: ValueId) -> Lowered<(ValueId, Window)> {
    let count = l.graph.ty(x).rank().saturating_sub(2);
    let kernel = lengths(Some(call.attributes.required_ints("kernel_shape")?), count, 1, "kernel_shape")?;
    let mut window = window(l, call, x, kernel)?;
    window.ceil = call.attributes.bool("ceil_mode", false)?;
    let pooled = l.add(Op::Pool { kind, window: window.clone() }, &[x])?;
    Ok((pooled, window))
}

/// Values, and where they are in the input.
pub(super) fn max_pool(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let column_major = call.attributes.bool("storage_order", false)?;
    let (x, pooled, window) = pooled(l, call, PoolKind::Max)?;
    if !call.wants(1) {
        return Ok(vec![Value::Data(pooled)]);
    }
    let indices = max_pool_indices(l, x, pooled, &window, column_major)?;
    Ok(vec![Value::Data(pooled), Value::Data(indices)])
}

pub(super) fn average_pool(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let x = l.data(call.input(0)?)?;
    Ok(vec![Value::Data(average_pool_of(l, call, x)?)])
}

/// The pool that the attributes of an AveragePool describe.
pub(super) fn average_pool_of(l: &mut Lowering<'_>, call: &Call<'_>, x: ValueId) -> Lowered<ValueId> {
    let count_padding = call.attributes.bool("count_include_pad", false)?;
    Ok(pool(l, call, PoolKind::Average { count_padding }, x)?.0)
}

pub(super) fn global_average(l: &mut Lowering<'_>, x: ValueId) -> Lowered<ValueId> {
    let axes: Vec<usize> = (2..l.graph.ty(x).rank()).collect();
    l.mean(x, &axes)
}

pub(super) fn global_pool(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let x = l.data(call.input(0)?)?;
    let axes: Vec<usize> = (2..l.graph.ty(x).rank()).collect();
    let result = if call.node.op_type == "GlobalMaxPool" {
        l.reduce(Monoid::Max, x, &axes)?
    } else {
        l.mean(x, &axes)?
    };
    Ok(vec![Value::Data(result)])
}
