//! Pooling with powers, over channels, and with places: [LpPool](https://onnx.ai/onnx/operators/onnx__LpPool.html),
//! GlobalLpPool, [LRN](https://onnx.ai/onnx/operators/onnx__LRN.html), and the indices of
//! [MaxPool](https://onnx.ai/onnx/operators/onnx__MaxPool.html).

use super::convolution::{lengths, window};
use super::transposed::unravel;
use crate::lower::{Call, Lowered, Lowering, Value, invalid};
use tpshard_ir::op::{PoolKind, Window};
use tpshard_ir::{DType, DTypeClass, Dim, Monoid, Op, Scalar, ValueId};

fn power(call: &Call<'_>) -> Lowered<u32> {
    // A float before opset 2.
    let p = if call.opset() < 2 {
        call.attributes.float("p", 2.0)? as i64
    } else {
        call.attributes.int("p", 2)?
    };
    u32::try_from(p).ok().filter(|p| (1..=64).contains(p)).ok_or_else(|| invalid(format!("the norm {p}")))
}

pub(super) fn lp_pool(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let p = power(call)?;
    let x = l.data(call.input(0)?)?;
    let count = l.graph.ty(x).rank().saturating_sub(2);
    let kernel = lengths(Some(call.attributes.required_ints("kernel_shape")?), count, 1, "kernel_shape")?;
    let mut window = window(l, call, x, kernel)?;
    window.ceil = call.attributes.bool("ceil_mode", false)?;
    Ok(vec![Value::Data(l.add(Op::Pool { kind: PoolKind::Lp { p }, window }, &[x])?)])
}

pub(super) fn global_lp_pool(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let p = power(call)?;
    let x = l.data(call.input(0)?)?;
    let axes: Vec<usize> = (2..l.graph.ty(x).rank()).collect();
    let size = l.map(Scalar::Abs, &[x])?;
    let powers = l.map_number(Scalar::Pow, size, f64::from(p))?;
    let sum = l.reduce(Monoid::Sum, powers, &axes)?;
    Ok(vec![Value::Data(l.map_number(Scalar::Pow, sum, 1.0 / f64::from(p))?)])
}

/// `x / (bias + alpha · mean of squares of neighbouring channels)^beta`; the mean is over `size` channels, those beyond
/// the first and last being 0.
pub(super) fn local_response_normalization(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let read = &call.attributes;
    let (alpha, beta) = (f64::from(read.float("alpha", 1e-4)?), f64::from(read.float("beta", 0.75)?));
    let bias = f64::from(read.float("bias", 1.0)?);
    let size = read.required_int("size")?;
    let size = usize::try_from(size).ok().filter(|&size| (1..=1 << 16).contains(&size));
    let size = size.ok_or_else(|| invalid("the size of a LRN"))?;
    let x = l.data(call.input(0)?)?;
    let shape = l.graph.ty(x).shape.clone();
    let [batch, channels, rest @ ..] = shape.as_slice() else {
        return Err(invalid(format!("LRN of {}", l.graph.ty(x))));
    };
    let square = l.map(Scalar::Mul, &[x, x])?;
    let flat = [batch.clone(), Dim::constant(1), channels.clone(), Dim::product(rest)];
    let square = l.reshape(square, &flat)?;
    let window = Window {
        kernel: vec![size, 1],
        strides: vec![1, 1],
        dilations: vec![1, 1],
        pads_low: vec![(size - 1) / 2, 0],
        pads_high: vec![size - 1 - (size - 1) / 2, 0],
        ceil: false,
    };
    let mean = l.add(Op::Pool { kind: PoolKind::Average { count_padding: true }, window }, &[square])?;
    let mean = l.reshape(mean, &shape)?;
    let scaled = l.map_number(Scalar::Mul, mean, alpha)?;
    let base = l.map_number(Scalar::Add, scaled, bias)?;
    let divisor = l.map_number(Scalar::Pow, base, beta)?;
    Ok(vec![Value::Data(l.map(Scalar::Div, &[x, divisor])?)])
}

/// Where in the flattened input each maximum is. Row-major, or column-major within an image.
pub(super) fn max_pool_indices(
    l: &mut Lowering<'_>,
    x: ValueId,
    pooled: ValueId,
    window: &Window,
    column_major: bool,
) -> Lowered<ValueId> {
    let shape = l.fixed_shape(x, "the indices of a MaxPool")?;
    let out = l.fixed_shape(pooled, "the indices of a MaxPool")?;
    let ([batch, channels, image @ ..], [_, _, places @ ..]) = (shape.as_slice(), out.as_slice()) else {
        return Err(invalid("an image without channels"));
    };
    let space: usize = image.iter().product();
    let (count, taps): (usize, usize) = (places.iter().product(), window.kernel.iter().product());
    // Per place and tap, where it reads; padding reads an entry of its own, the least there is.
    let (mut reads, mut shown) = (Vec::new(), Vec::new());
    for place in 0..count {
        let place = unravel(place, places);
        for tap in 0..taps {
            let tap = unravel(tap, &window.kernel);
            let at: Option<Vec<usize>> = (0..image.len())
                .map(|d| {
                    let at = place[d] * window.strides[d] + tap[d] * window.dilations[d];
                    at.checked_sub(window.pads_low[d]).filter(|&at| at < image[d])
                })
                .collect();
            let flat = |order: &mut dyn Iterator<Item = usize>, at: &[usize]| {
                order.fold(0, |flat, d| flat * image[d] + at[d])
            };
            let (read, index) = match at {
                None => (space, 0),
                Some(at) if column_major => {
                    (flat(&mut (0..image.len()), &at), flat(&mut (0..image.len()).rev(), &at))
                }
                Some(at) => (flat(&mut (0..image.len()), &at), flat(&mut (0..image.len()), &at)),
            };
            reads.push(i64::try_from(read).unwrap_or(i64::MAX));
            shown.push(i64::try_from(index).unwrap_or(i64::MAX));
        }
    }
    let rows = l.shaped(x, &[*batch, *channels, space])?;
    let lowest = lowest(l, l.graph.ty(x).dtype)?;
    let lowest = l.stretched(lowest, &[*batch, *channels, 1])?;
    let rows = l.joined(&[rows, lowest], 2)?;
    let reads = l.indices_table(&[reads.len()], &reads)?;
    let seen = l.take(rows, 2, reads)?;
    let seen = l.shaped(seen, &[*batch, *channels, count, taps])?;
    let best = l.add(Op::TopK { axis: 3, k: Dim::constant(1), largest: true }, &[seen])?;
    let table = l.indices_table(&[1, 1, count, taps], &shown)?;
    let table = l.stretched(table, &[*batch, *channels, count, taps])?;
    let index = l.add(Op::GatherElements { axis: 3 }, &[table, best])?;
    let first = l.table(DType::I64, &[*batch, *channels, 1, 1], |at| (at * space) as f64)?;
    let index = l.map(Scalar::Add, &[index, first])?;
    l.shaped(index, &out)
}

/// The least value of a type.
fn lowest(l: &mut Lowering<'_>, dtype: DType) -> Lowered<ValueId> {
    let least = match dtype.class() {
        DTypeClass::Float => f64::NEG_INFINITY,
        DTypeClass::Int => -(2f64.powi(dtype.bits() as i32 - 1)),
        DTypeClass::Uint | DTypeClass::Bool => 0.0,
    };
    l.scalar(dtype, least)
}
