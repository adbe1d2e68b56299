//! Windows backwards: [ConvTranspose](https://onnx.ai/onnx/operators/onnx__ConvTranspose.html),
//! [MaxUnpool](https://onnx.ai/onnx/operators/onnx__MaxUnpool.html) 9 and
//! [Col2Im](https://onnx.ai/onnx/operators/onnx__Col2Im.html) 18.
//!
//! A transposed convolution with stride `s` is a convolution of the input with `s - 1` zeros put between its elements, by
//! the kernel with its taps reversed and its channels exchanged.

use super::convolution::{lengths, per_channel};
use crate::lower::{Call, Lowered, Lowering, Value, invalid, undecided};
use tpshard_ir::op::{PadMode, Real, Window};
use tpshard_ir::{Dim, Monoid, Op, Scalar, ValueId};

const ZEROS: PadMode = PadMode::Constant(Real(0.0));

/// How a transposed convolution reaches over its result.
struct Reach {
    kernel: Vec<usize>,
    strides: Vec<usize>,
    dilations: Vec<usize>,
    /// What is cut off the full result on either side; negative ends are added.
    low: Vec<i64>,
    high: Vec<i64>,
}

pub(super) fn conv_transpose(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let (x, w) = (l.data(call.input(0)?)?, l.data(call.input(1)?)?);
    let rank = l.graph.ty(x).rank();
    if rank < 3 || l.graph.ty(w).rank() != rank {
        return Err(invalid(format!("{} by {}", l.graph.ty(x), l.graph.ty(w))));
    }
    let groups = usize::try_from(call.attributes.int("group", 1)?).ok().filter(|&groups| groups > 0);
    let groups = groups.ok_or_else(|| invalid("the group count"))?;
    let reach = reach(l, call, x, w)?;
    let (channels, weight) = (l.graph.ty(x).shape[1].clone(), l.graph.ty(w).shape[0].clone());
    l.unify(&channels, &weight)?;
    let w = exchanged(l, w, groups)?;
    let x = spaced(l, x, &reach)?;
    let count = rank - 2;
    let window = Window {
        kernel: reach.kernel,
        strides: vec![1; count],
        dilations: reach.dilations,
        pads_low: vec![0; count],
        pads_high: vec![0; count],
        ceil: false,
    };
    let result = l.add(Op::Conv { window, groups }, &[x, w])?;
    let Some(bias) = call.optional(2) else { return Ok(vec![Value::Data(result)]) };
    let bias = l.data(bias)?;
    Ok(vec![Value::Data(per_channel(l, Scalar::Add, result, bias)?)])
}

fn reach(l: &Lowering<'_>, call: &Call<'_>, x: ValueId, w: ValueId) -> Lowered<Reach> {
    let spatial = l.graph.ty(x).shape[2..].to_vec();
    let count = spatial.len();
    let read = &call.attributes;
    let kernel: Option<Vec<usize>> = l.graph.ty(w).shape[2..].iter().map(Dim::as_size).collect();
    let kernel = kernel.ok_or_else(|| undecided("a kernel of dynamic size"))?;
    if let Some(declared) = read.optional_ints("kernel_shape")?
        && lengths(Some(declared), count, 1, "kernel_shape")? != kernel
    {
        return Err(invalid(format!("kernel_shape {declared:?} and a weight of {}", l.graph.ty(w))));
    }
    let strides = lengths(read.optional_ints("strides")?, count, 1, "strides")?;
    let dilations = lengths(read.optional_ints("dilations")?, count, 1, "dilations")?;
    let extra = lengths(read.optional_ints("output_padding")?, count, 0, "output_padding")?;
    if strides.contains(&0) || dilations.contains(&0) || kernel.contains(&0) {
        return Err(invalid("a kernel, stride or dilation of 0"));
    }
    let given = read.optional_ints("pads")?;
    let mode = read.string("auto_pad", "NOTSET")?;
    let wanted = read.optional_ints("output_shape")?;
    let (mut low, mut high) = (vec![0i64; count], vec![0i64; count]);
    let signed = |value: usize| i64::try_from(value).unwrap_or(i64::MAX);
    if let ("NOTSET" | "", None) = (mode, wanted) {
        let pads = lengths(given, 2 * count, 0, "pads")?;
        for axis in 0..count {
            low[axis] = signed(pads[axis]);
            high[axis] = signed(pads[count + axis]) - signed(extra[axis]);
        }
        return Ok(Reach { kernel, strides, dilations, low, high });
    }
    // The shape is given, or follows from the mode; the pads are what is left over.
    let wanted = wanted.map(|shape| &shape[shape.len().saturating_sub(count)..]);
    for axis in 0..count {
        let extent = spatial[axis].as_size().ok_or_else(|| undecided("an output shape of dynamic sizes"))?;
        let (extent, stride) = (signed(extent), signed(strides[axis]));
        let span = (signed(kernel[axis]) - 1).saturating_mul(signed(dilations[axis])) + 1;
        let full = (extent - 1).saturating_mul(stride) + signed(extra[axis]) + span;
        let target = match wanted {
            Some(wanted) => *wanted.get(axis).ok_or_else(|| invalid("output_shape is too short"))?,
            None if mode == "VALID" => full,
            None => extent.saturating_mul(stride),
        };
        if target < 0 {
            return Err(invalid(format!("an output of {target}")));
        }
        // What is missing is added at the end.
        let total = full.saturating_sub(target).max(0);
        let short = target.saturating_sub(full).max(0);
        let (half, rest) = (total / 2, total - total / 2);
        // The larger half is at the end for SAME_UPPER only.
        (low[axis], high[axis]) = if mode == "SAME_UPPER" { (half, rest) } else { (rest, half) };
        high[axis] -= signed(extra[axis]) + short;
    }
    Ok(Reach { kernel, strides, dilations, low, high })
}

/// `[C, M/g, k…]` as `[M, C/g, k…]` with every kernel dim reversed.
fn exchanged(l: &mut Lowering<'_>, w: ValueId, groups: usize) -> Lowered<ValueId> {
    let mut w = w;
    let rank = l.graph.ty(w).rank();
    for axis in 2..rank {
        w = l.reversed(w, axis)?;
    }
    let shape = l.graph.ty(w).shape.clone();
    let g = Dim::from(groups);
    let per_group =
        shape[0].exact_div(&g).ok_or_else(|| invalid(format!("{groups} groups of {}", shape[0])))?;
    let mut cut = vec![g.clone(), per_group.clone()];
    cut.extend(shape[1..].iter().cloned());
    let w = l.reshape(w, &cut)?;
    let perm: Vec<usize> = [0, 2, 1].into_iter().chain(3..=rank).collect();
    let w = l.transpose(w, &perm)?;
    let mut joined = vec![&shape[1] * &g, per_group];
    joined.extend(shape[2..].iter().cloned());
    l.reshape(w, &joined)
}

/// `x` with zeros between its elements, padded so that a plain convolution gives the wanted result.
fn spaced(l: &mut Lowering<'_>, x: ValueId, reach: &Reach) -> Lowered<ValueId> {
    let mut x = x;
    let count = reach.kernel.len();
    for axis in 0..count {
        let stride = reach.strides[axis];
        if stride > 1 {
            x = apart(l, x, axis + 2, stride)?;
        }
    }
    let rank = count + 2;
    let (mut low, mut high) = (vec![Dim::constant(0); rank], vec![Dim::constant(0); rank]);
    for axis in 0..count {
        let span = (reach.kernel[axis] - 1).saturating_mul(reach.dilations[axis]);
        let span = i64::try_from(span).map_err(|_| invalid("a kernel beyond memory"))?;
        for (pads, cut) in [(&mut low, reach.low[axis]), (&mut high, reach.high[axis])] {
            pads[axis + 2] = Dim::constant(span.saturating_sub(cut));
        }
    }
    padded(l, x, low, high)
}

/// `stride - 1` zeros between neighbours of `axis`.
fn apart(l: &mut Lowering<'_>, x: ValueId, axis: usize, stride: usize) -> Lowered<ValueId> {
    let shape = l.graph.ty(x).shape.clone();
    let mut column = shape.clone();
    column.insert(axis + 1, Dim::constant(1));
    let x = l.reshape(x, &column)?;
    let (low, mut high) = (vec![Dim::constant(0); column.len()], vec![Dim::constant(0); column.len()]);
    high[axis + 1] = Dim::from(stride - 1);
    let x = l.add(Op::Pad { low, high, mode: ZEROS }, &[x])?;
    let mut joined = shape.clone();
    joined[axis] = &shape[axis] * &Dim::from(stride);
    let x = l.reshape(x, &joined)?;
    let length = &joined[axis] - &Dim::from(stride - 1);
    l.slice(x, axis, Dim::constant(0), length, 1)
}

/// Zeros on either side; negative pads cut.
pub(super) fn padded(
    l: &mut Lowering<'_>,
    x: ValueId,
    mut low: Vec<Dim>,
    mut high: Vec<Dim>,
) -> Lowered<ValueId> {
    let mut x = x;
    for axis in 0..low.len() {
        let cut = |pad: &Dim| match pad.as_const() {
            Some(pad) if pad < 0 => Dim::constant(-pad),
            _ => Dim::constant(0),
        };
        let (first, last) = (cut(&low[axis]), cut(&high[axis]));
        if first.is_zero() && last.is_zero() {
            continue;
        }
        let length = &(&l.graph.ty(x).shape[axis] - &first) - &last;
        if length.as_const().is_some_and(|length| length < 0) {
            return Err(invalid("padding cuts off more than there is"));
        }
        x = l.slice(x, axis, first.clone(), length, 1)?;
        (low[axis], high[axis]) = (&low[axis] + &first, &high[axis] + &last);
    }
    if low.iter().chain(&high).all(Dim::is_zero) {
        return Ok(x);
    }
    l.add(Op::Pad { low, high, mode: ZEROS }, &[x])
}

/// `(x, indices[, output_shape])`: every element to the place its index names in the whole result.
pub(super) fn max_unpool(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let (x, indices) = (l.data(call.input(0)?)?, l.data(call.input(1)?)?);
    let shape = l.fixed_shape(x, "MaxUnpool of an image")?;
    let count = shape.len().saturating_sub(2);
    let kernel = lengths(Some(call.attributes.required_ints("kernel_shape")?), count, 1, "kernel_shape")?;
    let strides = lengths(call.attributes.optional_ints("strides")?, count, 1, "strides")?;
    let pads = lengths(call.attributes.optional_ints("pads")?, 2 * count, 0, "pads")?;
    let mut inferred = shape.get(..2).unwrap_or(&[]).to_vec();
    for axis in 0..count {
        let full = shape[axis + 2].saturating_sub(1).saturating_mul(strides[axis]) + kernel[axis];
        let cut = pads[axis] + pads[count + axis];
        let extent = full.checked_sub(cut).ok_or_else(|| invalid("pads beyond the result"))?;
        inferred.push(extent);
    }
    let target = match call.optional(2) {
        None => inferred.clone(),
        Some(given) => {
            let given = l.ints(given, "the output shape of a MaxUnpool")?;
            let given: Option<Vec<usize>> =
                given.iter().map(|&extent| usize::try_from(extent).ok()).collect();
            given.filter(|given| given.len() == inferred.len()).ok_or_else(|| invalid("the output shape"))?
        }
    };
    let dtype = l.graph.ty(x).dtype;
    let zero = l.scalar(dtype, 0.0)?;
    let empty = l.stretched(zero, &[inferred.iter().product()])?;
    let elements = [shape.iter().product::<usize>()];
    let (indices, updates) = (l.shaped(indices, &elements)?, l.shaped(x, &elements)?);
    let filled = l.add(Op::ScatterElements { axis: 0, monoid: None }, &[empty, indices, updates])?;
    let filled = l.shaped(filled, &inferred)?;
    let mut high = Vec::with_capacity(target.len());
    for (to, from) in target.iter().zip(&inferred) {
        high.push(&Dim::from(*to) - &Dim::from(*from));
    }
    let low = vec![Dim::constant(0); high.len()];
    Ok(vec![Value::Data(padded(l, filled, low, high)?)])
}

/// `(columns[N, C·∏block, L], image_shape, block_shape)`: overlapping blocks are added up.
pub(super) fn col2im(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let x = l.data(call.input(0)?)?;
    let columns = l.fixed_shape(x, "Col2Im of columns")?;
    let sizes = |l: &Lowering<'_>, at: usize, what: &str| -> Lowered<Vec<usize>> {
        let read = l.ints(call.input(at)?, what)?;
        lengths(Some(&read), read.len(), 1, what)
    };
    let image = sizes(l, 1, "the image shape of a Col2Im")?;
    let block = sizes(l, 2, "the block shape of a Col2Im")?;
    let count = image.len();
    let strides = lengths(call.attributes.optional_ints("strides")?, count, 1, "strides")?;
    let dilations = lengths(call.attributes.optional_ints("dilations")?, count, 1, "dilations")?;
    let pads = lengths(call.attributes.optional_ints("pads")?, 2 * count, 0, "pads")?;
    let [batch, rows, _] = columns.as_slice() else { return Err(invalid("columns are not of rank 3")) };
    let taps: usize = block.iter().product();
    if block.len() != count || count == 0 || taps == 0 || rows % taps != 0 || strides.contains(&0) {
        return Err(invalid(format!("blocks {block:?} of {columns:?} for an image {image:?}")));
    }
    let padded_image: Vec<usize> = (0..count).map(|d| image[d] + pads[d] + pads[count + d]).collect();
    let mut blocks = Vec::with_capacity(count);
    for axis in 0..count {
        let span = (block[axis] - 1).saturating_mul(dilations[axis]) + 1;
        let room = padded_image[axis].checked_sub(span).ok_or_else(|| invalid("a block beyond the image"))?;
        blocks.push(room / strides[axis] + 1);
    }
    let places: usize = blocks.iter().product();
    if places != columns[2] {
        return Err(invalid(format!("{} columns for {places} blocks", columns[2])));
    }
    // The place of every tap of every block in the padded image.
    let mut index = Vec::with_capacity(taps.saturating_mul(places));
    for tap in 0..taps {
        let tap = unravel(tap, &block);
        for place in 0..places {
            let place = unravel(place, &blocks);
            let flat = (0..count)
                .fold(0, |flat, d| flat * padded_image[d] + place[d] * strides[d] + tap[d] * dilations[d]);
            index.push(i64::try_from(flat).unwrap_or(i64::MAX));
        }
    }
    let channels = rows / taps;
    let index = l.indices_table(&[1, 1, taps * places], &index)?;
    let index = l.stretched(index, &[*batch, channels, taps * places])?;
    let updates = l.shaped(x, &[*batch, channels, taps * places])?;
    let zero = l.scalar(l.graph.ty(x).dtype, 0.0)?;
    let empty = l.stretched(zero, &[*batch, channels, padded_image.iter().product()])?;
    let scatter = Op::ScatterElements { axis: 2, monoid: Some(Monoid::Sum) };
    let summed = l.add(scatter, &[empty, index, updates])?;
    let whole: Vec<usize> = [*batch, channels].into_iter().chain(padded_image).collect();
    let mut result = l.shaped(summed, &whole)?;
    for axis in 0..count {
        result = l.cut(result, axis + 2, pads[axis], image[axis])?;
    }
    Ok(vec![Value::Data(result)])
}

/// The index tuple of a flat position, row-major.
pub(super) fn unravel(mut flat: usize, shape: &[usize]) -> Vec<usize> {
    let mut index = vec![0; shape.len()];
    for (at, extent) in shape.iter().enumerate().rev() {
        index[at] = flat % extent.max(&1);
        flat /= extent.max(&1);
    }
    index
}
