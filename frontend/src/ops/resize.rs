//! [Resize](https://onnx.ai/onnx/operators/onnx__Resize.html) 10, 11, 13, 18 (`axes`, `antialias`,
//! `keep_aspect_ratio_policy`) and 19 (`half_pixel_symmetric`), and [Upsample](https://onnx.ai/onnx/operators/onnx__Upsample.html)
//! 7 and 9.
//!
//! Interpolation is separable. Along each axis every result is a weighted sum of a few source entries, whose places and
//! weights follow from the sizes: one gather by a constant table, one product, one sum. Nearest neighbours are a gather
//! alone. Dims that are not numbers can be repeated a whole number of times.

use crate::error::{Fault, quote};
use crate::lower::{
    Call, Element, Lowered, Lowering, Value, axis_of, data_dependent, invalid, undecided, unsupported,
};
use tpshard_ir::{DType, Dim, Monoid, Scalar, ValueId};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Nearest,
    Linear,
    Cubic,
}

/// What the attributes say for all axes.
struct Method<'a> {
    mode: Mode,
    coordinates: &'a str,
    nearest: &'a str,
    cubic: f64,
    exclude_outside: bool,
    antialias: bool,
    extrapolation: f64,
}

/// One axis: extents, how often the source goes into the result, and the part of the source that is looked at.
struct Along {
    axis: usize,
    from: Dim,
    to: Dim,
    scale: f64,
    region: (f64, f64),
}

pub(super) fn resize(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let read = &call.attributes;
    let old = call.opset() < 11;
    let method = Method {
        mode: mode(read.string("mode", "nearest")?)?,
        coordinates: read
            .string("coordinate_transformation_mode", if old { "asymmetric" } else { "half_pixel" })?,
        nearest: read.string("nearest_mode", if old { "floor" } else { "round_prefer_floor" })?,
        cubic: f64::from(read.float("cubic_coeff_a", -0.75)?),
        exclude_outside: read.bool("exclude_outside", false)?,
        antialias: read.bool("antialias", false)?,
        extrapolation: f64::from(read.float("extrapolation_value", 0.0)?),
    };
    let policy = read.string("keep_aspect_ratio_policy", "stretch")?;
    let x = l.data(call.input(0)?)?;
    let shape = l.graph.ty(x).shape.clone();
    let axes: Vec<usize> = match read.optional_ints("axes")? {
        None => (0..shape.len()).collect(),
        Some(axes) => axes.iter().map(|&axis| axis_of(axis, shape.len())).collect::<Lowered<_>>()?,
    };
    let (region, scales, sizes) = if old {
        (None, call.optional(1), None)
    } else {
        (call.optional(1), call.optional(2), call.optional(3))
    };
    let given = |value: Option<&Value>| value.cloned().filter(|value| l.shape(value) != [Dim::constant(0)]);
    let (region, scales, sizes) = (given(region), given(scales), given(sizes));
    let region = region.filter(|_| method.coordinates == "tf_crop_and_resize");
    let region = region.map(|region| floats(l, &region, "the region of a Resize")).transpose()?;
    let from: Vec<Dim> = axes.iter().map(|&axis| shape[axis].clone()).collect();
    let sized = match (&scales, &sizes) {
        (Some(_), Some(_)) => return Err(invalid("both scales and sizes")),
        (None, Some(sizes)) => by_sizes(&l.dims(sizes, "the sizes of a Resize")?, &from, policy)?,
        (Some(scales), None) => by_scales(&floats(l, scales, "the scales of a Resize")?, &from)?,
        (None, None) => return Err(invalid("neither scales nor sizes")),
    };
    let mut along = Vec::with_capacity(axes.len());
    for (at, (&axis, (to, scale))) in axes.iter().zip(sized).enumerate() {
        let region = match &region {
            None => (0.0, 1.0),
            Some(region) => match (region.get(at), region.get(at + axes.len())) {
                (Some(&start), Some(&end)) => (start, end),
                _ => return Err(invalid("the region has not two entries per axis")),
            },
        };
        along.push(Along { axis, from: shape[axis].clone(), to, scale, region });
    }
    Ok(vec![Value::Data(interpolated(l, x, &along, &method)?)])
}

/// Scales are an attribute before opset 9.
pub(super) fn upsample(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let method = Method {
        mode: mode(call.attributes.string("mode", "nearest")?)?,
        coordinates: "asymmetric",
        nearest: "floor",
        cubic: -0.75,
        exclude_outside: false,
        antialias: false,
        extrapolation: 0.0,
    };
    let scales = match call.attributes.optional_floats("scales")? {
        Some(scales) => scales.iter().map(|&scale| f64::from(scale)).collect(),
        None => floats(l, call.input(1)?, "the scales of an Upsample")?,
    };
    let x = l.data(call.input(0)?)?;
    let from = l.graph.ty(x).shape.clone();
    let sized = by_scales(&scales, &from)?;
    let along = from.into_iter().zip(sized).enumerate();
    let along: Vec<Along> = along
        .map(|(axis, (from, (to, scale)))| Along { axis, from, to, scale, region: (0.0, 1.0) })
        .collect();
    Ok(vec![Value::Data(interpolated(l, x, &along, &method)?)])
}

fn mode(text: &str) -> Lowered<Mode> {
    match text {
        "nearest" => Ok(Mode::Nearest),
        "linear" => Ok(Mode::Linear),
        "cubic" => Ok(Mode::Cubic),
        other => Err(invalid(format!("the mode {}", quote(other)))),
    }
}

fn floats(l: &Lowering<'_>, value: &Value, what: &str) -> Lowered<Vec<f64>> {
    let known = l.known(value).ok_or_else(|| data_dependent(what))?;
    let numbers: Option<Vec<f64>> = known.elements.iter().map(Element::number).collect();
    numbers.ok_or_else(|| unsupported(format!("{what} depend on the sizes of the inputs")))
}

/// Extents and scales of the result by given scales.
fn by_scales(scales: &[f64], from: &[Dim]) -> Lowered<Vec<(Dim, f64)>> {
    if scales.len() != from.len() || scales.iter().any(|&scale| scale.is_nan() || scale <= 0.0) {
        return Err(invalid(format!("the scales {scales:?} for {} axes", from.len())));
    }
    let sized = |(from, &scale): (&Dim, &f64)| {
        let to = match from.as_const() {
            Some(extent) => Dim::constant((extent as f64 * scale).floor() as i64),
            None if scale.fract() == 0.0 && scale < 1e9 => from * &Dim::constant(scale as i64),
            None => return Err(unsupported(format!("{from} scaled by {scale}"))),
        };
        Ok((to, scale))
    };
    from.iter().zip(scales).map(sized).collect()
}

/// Extents and scales of the result by given extents; the aspect ratio may be kept.
fn by_sizes(sizes: &[Dim], from: &[Dim], policy: &str) -> Lowered<Vec<(Dim, f64)>> {
    if sizes.len() != from.len() {
        return Err(invalid(format!("{} sizes for {} axes", sizes.len(), from.len())));
    }
    let ratio = |(to, from): (&Dim, &Dim)| -> Lowered<f64> {
        match (to.as_const(), from.as_const()) {
            _ if to == from => Ok(1.0),
            (Some(to), Some(from)) if from > 0 => Ok(to as f64 / from as f64),
            _ => match to.exact_div(from).and_then(|whole| whole.as_const()) {
                Some(whole) => Ok(whole as f64),
                None => Err(undecided(format!("{from} resized to {to}"))),
            },
        }
    };
    let scales = sizes.iter().zip(from).map(ratio).collect::<Lowered<Vec<f64>>>()?;
    let kept = match policy {
        "stretch" => return Ok(sizes.iter().cloned().zip(scales).collect()),
        "not_larger" => scales.iter().copied().fold(f64::INFINITY, f64::min),
        "not_smaller" => scales.iter().copied().fold(0.0, f64::max),
        other => return Err(invalid(format!("the policy {}", quote(other)))),
    };
    let sized = |from: &Dim| {
        let extent = from.as_const().ok_or_else(|| undecided("an aspect ratio of dynamic sizes"))?;
        Ok((Dim::constant((extent as f64 * kept + 0.5).floor() as i64), kept))
    };
    from.iter().map(sized).collect()
}

fn interpolated(l: &mut Lowering<'_>, x: ValueId, along: &[Along], method: &Method<'_>) -> Lowered<ValueId> {
    let own = l.graph.ty(x).dtype;
    let floats = own.is_float() || method.mode == Mode::Nearest;
    let mut x = if floats { x } else { l.cast(x, DType::F32)? };
    for axis in along {
        let whole = method.coordinates != "tf_crop_and_resize";
        if whole && axis.from == axis.to && axis.scale == 1.0 {
            continue;
        }
        x = match (axis.from.as_size(), axis.to.as_size()) {
            (Some(from), Some(to)) => one_axis(l, x, axis, from, to, method)?,
            _ => repeated(l, x, axis, method)?,
        };
    }
    if floats {
        return Ok(x);
    }
    let x = l.map(Scalar::Round, &[x])?;
    l.cast(x, own)
}

/// Every entry of a dim of unknown extent a whole number of times.
fn repeated(l: &mut Lowering<'_>, x: ValueId, along: &Along, method: &Method<'_>) -> Lowered<ValueId> {
    let plain = match method.coordinates {
        "asymmetric" => method.nearest == "floor",
        "half_pixel" | "pytorch_half_pixel" => method.nearest.starts_with("round"),
        _ => false,
    };
    if method.mode != Mode::Nearest || !plain || along.scale.fract() != 0.0 || along.scale < 1.0 {
        return Err(unsupported(format!("a Resize of {} by {} in this mode", along.from, along.scale)));
    }
    let mut shape = l.graph.ty(x).shape.clone();
    let factor = Dim::constant(along.scale as i64);
    shape.insert(along.axis + 1, Dim::constant(1));
    let x = l.reshape(x, &shape)?;
    shape[along.axis + 1] = factor.clone();
    let x = l.broadcast(x, &shape)?;
    shape.remove(along.axis + 1);
    shape[along.axis] = &shape[along.axis] * &factor;
    l.reshape(x, &shape)
}

/// Source places and their weights for one entry of the result.
struct Taps {
    places: Vec<(i64, f64)>,
    outside: bool,
}

/// Most entries of a resized dim: each has its places written out.
const LONGEST: usize = 1 << 20;

fn too_long(to: usize) -> Fault {
    let message = format!("a dim is resized to {to} entries, {LONGEST} are possible");
    Fault::resource(message, "resize to less, or repeat the entries with Expand")
}

fn one_axis(
    l: &mut Lowering<'_>,
    x: ValueId,
    along: &Along,
    from: usize,
    to: usize,
    method: &Method<'_>,
) -> Lowered<ValueId> {
    if from == 0 {
        return Err(invalid("an empty image"));
    }
    if to > LONGEST {
        return Err(too_long(to));
    }
    let taps = (0..to).map(|at| taps(at, along, from, to, method)).collect::<Lowered<Vec<Taps>>>()?;
    let count = taps.first().map_or(1, |taps| taps.places.len());
    let last = i64::try_from(from - 1).unwrap_or(i64::MAX);
    let index: Vec<i64> =
        taps.iter().flat_map(|taps| taps.places.iter().map(|(place, _)| (*place).clamp(0, last))).collect();
    let weights: Vec<f64> =
        taps.iter().flat_map(|taps| taps.places.iter().map(|(_, weight)| *weight)).collect();
    let axis = along.axis;
    let index = l.indices_table(&[index.len()], &index)?;
    let mut x = l.take(x, axis, index)?;
    let dtype = l.graph.ty(x).dtype;
    if method.mode != Mode::Nearest {
        let mut shape = l.graph.ty(x).shape.clone();
        shape[axis] = Dim::from(to);
        shape.insert(axis + 1, Dim::from(count));
        x = l.reshape(x, &shape)?;
        let mut aligned = vec![1; shape.len()];
        (aligned[axis], aligned[axis + 1]) = (to, count);
        let weights = l.table(dtype, &aligned, |at| weights.get(at).copied().unwrap_or(0.0))?;
        x = l.map(Scalar::Mul, &[x, weights])?;
        x = l.reduce(Monoid::Sum, x, &[axis + 1])?;
        shape.remove(axis + 1);
        x = l.reshape(x, &shape)?;
    }
    if taps.iter().any(|taps| taps.outside) {
        let mut aligned = vec![1; l.graph.ty(x).rank()];
        aligned[axis] = to;
        let outside = l.table(DType::Bool, &aligned, |at| f64::from(u8::from(taps[at].outside)))?;
        let fill = l.scalar(dtype, method.extrapolation)?;
        x = l.map(Scalar::Select, &[outside, fill, x])?;
    }
    Ok(x)
}

/// Where entry `at` of the result lies in the source.
fn coordinate(at: f64, along: &Along, from: f64, to: f64, coordinates: &str) -> Lowered<f64> {
    let (scale, extent) = (along.scale, along.scale * from);
    Ok(match coordinates {
        "half_pixel" => (at + 0.5) / scale - 0.5,
        "half_pixel_symmetric" => from / 2.0 * (1.0 - to / extent) + (at + 0.5) / scale - 0.5,
        "pytorch_half_pixel" if extent == 1.0 => -0.5,
        "pytorch_half_pixel" => (at + 0.5) / scale - 0.5,
        "align_corners" if extent == 1.0 => 0.0,
        "align_corners" => at * (from - 1.0) / (extent - 1.0),
        "asymmetric" => at / scale,
        "tf_half_pixel_for_nn" => (at + 0.5) / scale,
        "tf_crop_and_resize" => {
            let (start, end) = along.region;
            let inner = if extent == 1.0 { 0.5 } else { at / (extent - 1.0) };
            (start + inner * (end - start)) * (from - 1.0)
        }
        other => return Err(invalid(format!("the coordinates {}", quote(other)))),
    })
}

fn taps(at: usize, along: &Along, from: usize, to: usize, method: &Method<'_>) -> Lowered<Taps> {
    let place = coordinate(at as f64, along, from as f64, to as f64, method.coordinates)?;
    let outside = method.coordinates == "tf_crop_and_resize" && !(0.0..=(from - 1) as f64).contains(&place);
    if method.mode == Mode::Nearest {
        let nearest = match method.nearest {
            "round_prefer_floor" => (place - 0.5).ceil(),
            "round_prefer_ceil" => (place + 0.5).floor(),
            "floor" | "simple" => place.floor(),
            "ceil" => place.ceil(),
            other => return Err(invalid(format!("the nearest_mode {}", quote(other)))),
        };
        return Ok(Taps { places: vec![(nearest as i64, 1.0)], outside });
    }
    // A place that is an entry belongs to the interval that ends there.
    let (base, ratio) =
        if place.fract() == 0.0 { (place - 1.0, 1.0) } else { (place.floor(), place - place.floor()) };
    let shrink = if method.antialias { along.scale.min(1.0) } else { 1.0 };
    let reach = if method.mode == Mode::Linear { 1.0 } else { 2.0 };
    let first = (-reach / shrink).floor() as i64 + 1;
    let weight = |offset: i64| {
        let distance = ((offset as f64 - ratio) * shrink).abs();
        match method.mode {
            Mode::Cubic => cubic(distance, method.cubic),
            Mode::Linear | Mode::Nearest => (1.0 - distance).max(0.0),
        }
    };
    let mut places: Vec<(i64, f64)> =
        (first..2 - first).map(|offset| (base as i64 + offset, weight(offset))).collect();
    let inside = 0..i64::try_from(from).unwrap_or(i64::MAX);
    if method.exclude_outside {
        places.iter_mut().filter(|(place, _)| !inside.contains(place)).for_each(|(_, weight)| *weight = 0.0);
    }
    if method.exclude_outside || method.antialias {
        let total: f64 = places.iter().map(|(_, weight)| weight).sum();
        places.iter_mut().for_each(|(_, weight)| *weight /= total);
    }
    Ok(Taps { places, outside })
}

/// Keys' kernel with parameter `a`.
pub(super) fn cubic(distance: f64, a: f64) -> f64 {
    let (x, square) = (distance, distance * distance);
    if x <= 1.0 {
        (a + 2.0) * square * x - (a + 3.0) * square + 1.0
    } else if x < 2.0 {
        a * square * x - 5.0 * a * square + 8.0 * a * x - 4.0 * a
    } else {
        0.0
    }
}
