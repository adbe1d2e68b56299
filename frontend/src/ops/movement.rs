//! Moving and cutting tensors: Transpose, Concat, Split, Slice, Pad, Tile, DepthToSpace, SpaceToDepth,
//! <https://onnx.ai/onnx/operators/>. Slice and Pad take attributes before opset 10 and 11, inputs since; Split before 13.

use crate::lower::{Call, Lowered, Lowering, Value, axis_of, invalid, undecided};
use tpshard_ir::op::{PadMode, Real};
use tpshard_ir::{Dim, Op};

pub(super) fn transpose(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let value = call.input(0)?;
    let rank = l.shape(value).len();
    let perm: Vec<usize> = match call.attributes.optional_ints("perm")? {
        None => (0..rank).rev().collect(),
        Some(perm) => perm.iter().map(|&axis| axis_of(axis, rank)).collect::<Lowered<_>>()?,
    };
    let mut sorted = perm.clone();
    sorted.sort_unstable();
    if sorted.iter().copied().ne(0..rank) {
        return Err(invalid(format!("{perm:?} is not an order of {rank} dims")));
    }
    Ok(vec![l.transpose_value(value, &perm)?])
}

/// A concatenation onto a state input is an append.
pub(super) fn concat(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let values = call.all()?;
    let first = values.first().ok_or_else(|| invalid("nothing to concatenate"))?;
    let default = if call.opset() < 4 { Some(1) } else { None };
    let axis = match call.attributes.optional_int("axis")?.or(default) {
        Some(axis) => axis_of(axis, l.shape(first).len())?,
        None => return Err(invalid("Concat without axis")),
    };
    if let [Value::Data(state), new] = values.as_slice()
        && l.is_state(*state)
    {
        let state = *state;
        return Ok(vec![Value::Data(append(l, state, new, axis)?)]);
    }
    Ok(vec![l.concat_values(&values, axis)?])
}

/// `append(state, new)` with the dims off the axis unified.
pub(super) fn append(
    l: &mut Lowering<'_>,
    state: tpshard_ir::ValueId,
    new: &Value,
    axis: usize,
) -> Lowered<tpshard_ir::ValueId> {
    let new = l.data(new)?;
    let rank = l.graph.ty(state).rank();
    if l.graph.ty(new).rank() != rank || axis >= rank {
        return Err(invalid("the state and what is appended differ in rank"));
    }
    for at in (0..rank).filter(|&at| at != axis) {
        let (a, b) = (l.graph.ty(state).shape[at].clone(), l.graph.ty(new).shape[at].clone());
        l.unify(&a, &b)?;
    }
    l.add(Op::Append { axis }, &[state, new])
}

pub(super) fn split(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let value = call.input(0)?;
    let shape = l.shape(value);
    let axis = axis_of(call.attributes.int("axis", 0)?, shape.len())?;
    let extent = shape[axis].clone();
    let given = match call.optional(1) {
        Some(lengths) => Some(l.dims(lengths, "the lengths of a Split")?),
        None if call.opset() < 13 => {
            let lengths = call.attributes.optional_ints("split")?;
            lengths.map(|lengths| lengths.iter().map(|&length| Dim::constant(length)).collect())
        }
        None => None,
    };
    let outputs = call.node.outputs.len();
    let lengths = match given {
        Some(lengths) => {
            let total = lengths.iter().fold(Dim::constant(0), |sum, length| &sum + length);
            if lengths.len() < outputs
                || lengths.iter().any(|length| length.as_const().is_some_and(|value| value < 0))
            {
                return Err(invalid(format!("{lengths:?} for {outputs} outputs")));
            }
            l.unify(&extent, &total)?;
            lengths
        }
        None => {
            let count = match call.attributes.optional_int("num_outputs")? {
                None if call.opset() >= 18 => return Err(invalid("neither lengths nor a number of outputs")),
                count => count.map_or(Ok(outputs), usize::try_from),
            };
            let count = count.ok().filter(|&count| count > 0 && count >= outputs);
            let count = count.ok_or_else(|| invalid("the number of outputs"))?;
            even_lengths(&extent, count, call.opset() >= 18)?
        }
    };
    let value = call.input(0)?;
    l.split_value(value, axis, &lengths)
}

/// `count` equal pieces; the last may be smaller since opset 18.
fn even_lengths(extent: &Dim, count: usize, uneven: bool) -> Lowered<Vec<Dim>> {
    let parts = Dim::from(count);
    if let Some(each) = extent.exact_div(&parts) {
        return Ok(vec![each; count]);
    }
    if !uneven {
        return Err(invalid(format!("{extent} does not divide into {count} pieces")));
    }
    let each = extent.ceil_div(&parts);
    let mut lengths = vec![each.clone(); count - 1];
    let last = extent - &(&each * &Dim::from(count - 1));
    if last.as_const().is_some_and(|last| last < 0) {
        return Err(invalid(format!("{extent} does not divide into {count} pieces")));
    }
    lengths.push(last);
    Ok(lengths)
}

pub(super) fn slice(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let constants = |values: &[i64]| values.iter().map(|&value| Dim::constant(value)).collect::<Vec<Dim>>();
    let (starts, ends, axes, steps) = if call.opset() < 10 {
        let starts = constants(call.attributes.required_ints("starts")?);
        let ends = constants(call.attributes.required_ints("ends")?);
        (starts, ends, call.attributes.optional_ints("axes")?.map(<[i64]>::to_vec), None)
    } else {
        let axes = call.optional(3).map(|axes| l.ints(axes, "the axes of a Slice")).transpose()?;
        let steps = call.optional(4).map(|steps| l.ints(steps, "the steps of a Slice")).transpose()?;
        let starts = l.dims(call.input(1)?, "the start of a Slice")?;
        (starts, l.dims(call.input(2)?, "the end of a Slice")?, axes, steps)
    };
    let mut value = call.input(0)?.clone();
    let rank = l.shape(&value).len();
    let count = starts.len();
    let axes = axes.unwrap_or_else(|| (0..i64::try_from(count).unwrap_or(0)).collect());
    let steps = steps.unwrap_or_else(|| vec![1; count]);
    if ends.len() != count || axes.len() != count || steps.len() != count {
        return Err(invalid("starts, ends, axes and steps differ in length"));
    }
    let mut seen = Vec::with_capacity(count);
    for (((start, end), axis), step) in starts.iter().zip(&ends).zip(&axes).zip(&steps) {
        let axis = axis_of(*axis, rank)?;
        if seen.contains(&axis) {
            return Err(invalid("an axis is cut twice"));
        }
        seen.push(axis);
        value = cut(l, &value, axis, start, end, *step)?;
    }
    Ok(vec![value])
}

fn cut(
    l: &mut Lowering<'_>,
    value: &Value,
    axis: usize,
    start: &Dim,
    end: &Dim,
    step: i64,
) -> Lowered<Value> {
    let extent = l.shape(value)[axis].clone();
    let zero = Dim::constant(0);
    if step == 0 {
        return Err(invalid("a step of 0"));
    }
    if step > 0 {
        let start = bound(l, start, &extent, true)?;
        let end = bound(l, end, &extent, false)?;
        let distance = &end - &start;
        let distance = if distance.is_nonnegative() { distance } else { nonnegative(l, &start, &end)? };
        let length = distance.ceil_div(&Dim::constant(step));
        return l.slice_value(value, axis, &start, &length, step);
    }
    // Downwards: positions are clamped to -1 ..= extent - 1.
    let (Some(start), Some(end)) = (start.as_const(), end.as_const()) else {
        return Err(undecided("a Slice with negative step and dynamic bounds"));
    };
    let last = &extent - &Dim::constant(1);
    let start = if start >= i64::from(i32::MAX) || start == -1 {
        last
    } else if let Some(extent) = extent.as_const() {
        let from = if start < 0 { start.saturating_add(extent) } else { start };
        Dim::constant(from.clamp(-1, extent - 1))
    } else {
        return Err(undecided("a Slice with negative step of a dynamic dim"));
    };
    let end = if end <= -i64::from(i32::MAX) {
        Dim::constant(-1)
    } else if let Some(extent) = extent.as_const() {
        let to = if end < 0 { end.saturating_add(extent) } else { end };
        Dim::constant(to.clamp(-1, extent - 1))
    } else if end >= 0 {
        Dim::constant(end)
    } else {
        return Err(undecided("a Slice with negative step of a dynamic dim"));
    };
    let distance = &start - &end;
    let distance = if distance.is_nonnegative() { distance } else { distance.maximum(&zero) };
    let length = distance.ceil_div(&Dim::constant(step.saturating_neg()));
    let start = if length.is_zero() { zero } else { start };
    l.slice_value(value, axis, &start, &length, step)
}

/// A position of a slice: from the end if negative, clamped to the extent. Where the order of a size and a bound is
/// unknown the model is taken to mean a bound that is inside, which is checked before every step; a minimum of a size and 1
/// is 1, as sizes of 0 are not meant.
fn bound(l: &mut Lowering<'_>, at: &Dim, extent: &Dim, start: bool) -> Lowered<Dim> {
    let at = l.current(at);
    let from_start = match at.as_const() {
        Some(value) if value >= i64::from(i32::MAX) => return Ok(extent.clone()),
        Some(value) if value < 0 => {
            let position = extent + &at;
            let clamped =
                if position.is_nonnegative() { position } else { position.maximum(&Dim::constant(0)) };
            return Ok(clamped);
        }
        Some(_) => true,
        None => at.is_nonnegative(),
    };
    if !from_start {
        if (-&at).is_nonnegative() {
            return Ok((extent + &at).maximum(&Dim::constant(0)));
        }
        l.assume_at_most(&Dim::constant(0), &at)?;
    }
    if (extent - &at).is_nonnegative() {
        return Ok(at);
    }
    if let Some((size, limit)) = size_and_limit(&at) {
        if limit == 1 {
            l.assume_at_most(&Dim::constant(1), &size)?;
            return bound(l, &Dim::constant(1), extent, start);
        }
        // What is clamped to the extent need not be clamped to more before.
        if extent.as_const().is_some_and(|extent| extent <= limit) {
            return bound(l, &size, extent, start);
        }
    }
    if let (Some(value), Some(extent)) = (at.as_const(), extent.as_const()) {
        return Ok(Dim::constant(value.min(extent)));
    }
    let constant_end = at.as_const().is_some_and(|value| value > 1) && !start;
    if constant_end {
        return Ok(at.minimum(extent));
    }
    l.assume_at_most(&at, extent)?;
    Ok(at)
}

/// A minimum of a size and a number.
fn size_and_limit(at: &Dim) -> Option<(Dim, i64)> {
    let (a, b) = at.as_minimum()?;
    let (size, limit) = if a.as_const().is_some() { (b, a) } else { (a, b) };
    Some((size.clone(), limit.as_const()?))
}

/// `end - start`, zero if that is known to be negative, assumed to be at least zero if it is not known.
fn nonnegative(l: &mut Lowering<'_>, start: &Dim, end: &Dim) -> Lowered<Dim> {
    let distance = end - start;
    if (-&distance).is_nonnegative() {
        return Ok(Dim::constant(0));
    }
    let involved = distance.to_string();
    if involved.contains("max(") || involved.contains("min(") {
        return Ok(distance.maximum(&Dim::constant(0)));
    }
    l.assume_at_most(start, end)?;
    Ok(distance)
}

pub(super) fn pad(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let x = l.data(call.input(0)?)?;
    let rank = l.graph.ty(x).rank();
    let mode = call.attributes.string("mode", "constant")?;
    let (pads, fill) = if call.opset() < 11 {
        let name = if call.opset() < 2 { "paddings" } else { "pads" };
        let pads = call.attributes.required_ints(name)?.iter().map(|&pad| Dim::constant(pad)).collect();
        (pads, f64::from(call.attributes.float("value", 0.0)?))
    } else {
        let pads = l.dims(call.input(1)?, "the pads")?;
        let fill = call.optional(2).map(|fill| l.number(fill, "the fill of a Pad")).transpose()?;
        (pads, fill.unwrap_or(0.0))
    };
    let axes: Vec<usize> = match call.optional(3) {
        None => (0..rank).collect(),
        Some(axes) => {
            let axes = l.ints(axes, "the axes of a Pad")?;
            axes.iter().map(|&axis| axis_of(axis, rank)).collect::<Lowered<_>>()?
        }
    };
    if pads.len() != axes.len() * 2 {
        return Err(invalid(format!("{} pads for {} axes", pads.len(), axes.len())));
    }
    let (mut low, mut high) = (vec![Dim::constant(0); rank], vec![Dim::constant(0); rank]);
    for (at, &axis) in axes.iter().enumerate() {
        low[axis] = pads[at].clone();
        high[axis] = pads[axes.len() + at].clone();
    }
    let mode = match mode {
        "constant" => PadMode::Constant(Real(fill)),
        "reflect" => PadMode::Reflect,
        "edge" => PadMode::Edge,
        "wrap" => PadMode::Wrap,
        other => return Err(invalid(format!("the mode {}", crate::error::quote(other)))),
    };
    // Negative pads cut.
    let mut x = x;
    for axis in 0..rank {
        let zero = Dim::constant(0);
        let cut = |pad: &Dim| if pad.as_const().is_some_and(|pad| pad < 0) { -pad } else { zero.clone() };
        let (from_low, from_high) = (cut(&low[axis]), cut(&high[axis]));
        if !from_low.is_zero() || !from_high.is_zero() {
            let length = &(&l.graph.ty(x).shape[axis] - &from_low) - &from_high;
            x = l.slice(x, axis, from_low.clone(), length, 1)?;
            low[axis] = &low[axis] + &from_low;
            high[axis] = &high[axis] + &from_high;
        }
    }
    if low.iter().chain(&high).all(Dim::is_zero) {
        return Ok(vec![Value::Data(x)]);
    }
    Ok(vec![Value::Data(l.add(Op::Pad { low, high, mode }, &[x])?)])
}

/// `[d, …]` becomes `[1, d, …]`, is stretched to `[n, d, …]` and flattened, per dim.
pub(super) fn tile(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let value = call.input(0)?;
    let repeats = l.dims(call.input(1)?, "the repeats of a Tile")?;
    let shape = l.shape(value);
    if repeats.len() != shape.len()
        || repeats.iter().any(|count| count.as_const().is_some_and(|count| count < 0))
    {
        return Err(invalid(format!("repeats {repeats:?} of a tensor of rank {}", shape.len())));
    }
    if repeats.iter().all(Dim::is_one) {
        return Ok(vec![value.clone()]);
    }
    let (mut apart, mut stretched, mut joined) = (Vec::new(), Vec::new(), Vec::new());
    for (dim, count) in shape.iter().zip(&repeats) {
        if count.is_one() {
            apart.push(dim.clone());
            stretched.push(dim.clone());
        } else {
            apart.extend([Dim::constant(1), dim.clone()]);
            stretched.extend([count.clone(), dim.clone()]);
        }
        joined.push(dim * count);
    }
    let value = l.reshape_value(value, &apart)?;
    let value = l.expand_value(&value, &stretched)?;
    Ok(vec![l.reshape_value(&value, &joined)?])
}

fn block(call: &Call<'_>) -> Lowered<Dim> {
    let block = call.attributes.required_int("blocksize")?;
    if block < 1 {
        return Err(invalid(format!("blocks of {block}")));
    }
    Ok(Dim::constant(block))
}

fn image(l: &Lowering<'_>, value: &Value) -> Lowered<[Dim; 4]> {
    let shape = l.shape(value);
    <[Dim; 4]>::try_from(shape).map_err(|shape| invalid(format!("an image of shape {shape:?}")))
}

fn divided(dim: &Dim, by: &Dim) -> Lowered<Dim> {
    dim.exact_div(by).ok_or_else(|| invalid(format!("{dim} does not divide by {by}")))
}

pub(super) fn depth_to_space(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let b = block(call)?;
    let [n, c, h, w] = image(l, call.input(0)?)?;
    let depth = divided(&c, &(&b * &b))?;
    let (split, perm) = match call.attributes.string("mode", "DCR")? {
        "DCR" => ([n.clone(), b.clone(), b.clone(), depth.clone(), h.clone(), w.clone()], [0, 3, 4, 1, 5, 2]),
        "CRD" => ([n.clone(), depth.clone(), b.clone(), b.clone(), h.clone(), w.clone()], [0, 1, 4, 2, 5, 3]),
        other => return Err(invalid(format!("the mode {}", crate::error::quote(other)))),
    };
    let value = l.reshape_value(call.input(0)?, &split)?;
    let value = l.transpose_value(&value, &perm)?;
    Ok(vec![l.reshape_value(&value, &[n, depth, &h * &b, &w * &b])?])
}

pub(super) fn space_to_depth(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let b = block(call)?;
    let [n, c, h, w] = image(l, call.input(0)?)?;
    let (rows, columns) = (divided(&h, &b)?, divided(&w, &b)?);
    let split = [n.clone(), c.clone(), rows.clone(), b.clone(), columns.clone(), b.clone()];
    let value = l.reshape_value(call.input(0)?, &split)?;
    let value = l.transpose_value(&value, &[0, 3, 5, 1, 2, 4])?;
    Ok(vec![l.reshape_value(&value, &[n, &c * &(&b * &b), rows, columns])?])
}
