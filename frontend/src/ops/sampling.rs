//! Reading images at places that data decides: [GridSample](https://onnx.ai/onnx/operators/onnx__GridSample.html) 16 and
//! 20, [RoiAlign](https://onnx.ai/onnx/operators/onnx__RoiAlign.html) 10 and 16,
//! [DeformConv](https://onnx.ai/onnx/operators/onnx__DeformConv.html) 19, and
//! [AffineGrid](https://onnx.ai/onnx/operators/onnx__AffineGrid.html) 20, which makes such places.
//!
//! Along each spatial dim a place becomes a few *taps*: an index and a weight. All products of taps are read in one gather
//! from the image as `[channel, batch · space]`, weighted and summed.

use crate::error::quote;
use crate::lower::{Call, Lowered, Lowering, Value, data_dependent, invalid, undecided, unsupported};
use tpshard_ir::op::EinsumSpec;
use tpshard_ir::{DType, Dim, Monoid, Op, Scalar, ValueId};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Padding {
    Zeros,
    Border,
    Reflection,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Interpolation {
    Nearest,
    Linear,
    Cubic,
}

/// One spatial dim.
struct Axis {
    extent: usize,
    padding: Padding,
    interpolation: Interpolation,
    /// The first and last entry are the borders, not the edges half an entry further out.
    align_corners: bool,
}

/// Entries of one dim, as `i64`, and what they count; of any shape.
#[derive(Clone, Copy)]
struct Tap {
    index: ValueId,
    weight: ValueId,
}

impl Axis {
    /// The taps of places given as floats.
    fn taps(&self, l: &mut Lowering<'_>, place: ValueId) -> Lowered<Vec<Tap>> {
        let last = self.extent.saturating_sub(1) as f64;
        let (low, high) = if self.align_corners { (0.0, last) } else { (-0.5, last + 0.5) };
        let mut place = place;
        if self.interpolation == Interpolation::Nearest {
            place = l.map(Scalar::Round, &[place])?;
        }
        place = match self.padding {
            Padding::Zeros => place,
            Padding::Border => {
                let (under, over) =
                    (l.map_number(Scalar::Less, place, low)?, l.map_number(Scalar::Greater, place, high)?);
                let outside = l.map(Scalar::Or, &[under, over])?;
                let inside = l.clamp(place, 0.0, last)?;
                l.map(Scalar::Select, &[outside, inside, place])?
            }
            Padding::Reflection => reflected(l, place, low, high)?,
        };
        if self.interpolation == Interpolation::Nearest {
            let one = l.map_number(Scalar::Mul, place, 0.0)?;
            let one = l.map_number(Scalar::Add, one, 1.0)?;
            return Ok(vec![self.tap(l, place, one, (low, high))?]);
        }
        let base = l.map(Scalar::Floor, &[place])?;
        let ratio = l.map(Scalar::Sub, &[place, base])?;
        let offsets = if self.interpolation == Interpolation::Linear { 0..2 } else { -1..3 };
        let mut taps = Vec::new();
        for offset in offsets {
            let index = l.map_number(Scalar::Add, base, f64::from(offset))?;
            let distance = l.map_number(Scalar::Sub, ratio, f64::from(offset))?;
            let distance = l.map(Scalar::Abs, &[distance])?;
            let weight = match self.interpolation {
                Interpolation::Cubic => keys(l, distance, offset == 0 || offset == 1)?,
                Interpolation::Linear | Interpolation::Nearest => {
                    let negative = l.map(Scalar::Neg, &[distance])?;
                    l.map_number(Scalar::Add, negative, 1.0)?
                }
            };
            taps.push(self.tap(l, index, weight, (low, high))?);
        }
        Ok(taps)
    }

    /// One tap; outside of the image it is moved in, or counts nothing.
    fn tap(&self, l: &mut Lowering<'_>, index: ValueId, weight: ValueId, border: (f64, f64)) -> Lowered<Tap> {
        let last = self.extent.saturating_sub(1) as f64;
        let (mut index, mut weight) = (index, weight);
        match self.padding {
            Padding::Zeros => {
                let (above, below) = (
                    l.map_number(Scalar::GreaterEqual, index, 0.0)?,
                    l.map_number(Scalar::LessEqual, index, last)?,
                );
                let inside = l.map(Scalar::And, &[above, below])?;
                let zero = l.scalar(l.graph.ty(weight).dtype, 0.0)?;
                weight = l.map(Scalar::Select, &[inside, weight, zero])?;
            }
            Padding::Border => {}
            Padding::Reflection => {
                index = reflected(l, index, border.0, border.1)?;
                index = l.map(Scalar::Floor, &[index])?;
            }
        }
        let index = l.clamp(index, 0.0, last)?;
        Ok(Tap { index: l.cast(index, DType::I64)?, weight })
    }
}

/// `x` thrown back at `low` and `high` until it is between them.
fn reflected(l: &mut Lowering<'_>, x: ValueId, low: f64, high: f64) -> Lowered<ValueId> {
    let span = high - low;
    if span <= 0.0 {
        let zero = l.map_number(Scalar::Mul, x, 0.0)?;
        return l.map_number(Scalar::Add, zero, low);
    }
    let shifted = l.map_number(Scalar::Sub, x, low)?;
    let far = l.map(Scalar::Abs, &[shifted])?;
    let phase = l.map_number(Scalar::Rem, far, 2.0 * span)?;
    let back = l.map(Scalar::Neg, &[phase])?;
    let back = l.map_number(Scalar::Add, back, 2.0 * span)?;
    let inside = l.map(Scalar::Min, &[phase, back])?;
    let result = l.map_number(Scalar::Add, inside, low)?;
    // What is inside stays as it is, to the last bit.
    let (above, below) =
        (l.map_number(Scalar::GreaterEqual, x, low)?, l.map_number(Scalar::LessEqual, x, high)?);
    let kept = l.map(Scalar::And, &[above, below])?;
    l.map(Scalar::Select, &[kept, x, result])
}

/// Keys' cubic kernel with parameter -0.75, on either of its two pieces.
fn keys(l: &mut Lowering<'_>, distance: ValueId, near: bool) -> Lowered<ValueId> {
    const A: f64 = -0.75;
    // Horner's scheme: ((c3 x + c2) x + c1) x + c0.
    let [c3, c2, c1, c0] =
        if near { [A + 2.0, -(A + 3.0), 0.0, 1.0] } else { [A, -5.0 * A, 8.0 * A, -4.0 * A] };
    let mut sum = l.map_number(Scalar::Mul, distance, c3)?;
    for coefficient in [c2, c1] {
        sum = l.map_number(Scalar::Add, sum, coefficient)?;
        sum = l.map(Scalar::Mul, &[sum, distance])?;
    }
    l.map_number(Scalar::Add, sum, c0)
}

/// All products of the taps of several dims, as flat indices and weights.
fn products(l: &mut Lowering<'_>, taps: &[(Vec<Tap>, usize)]) -> Lowered<Vec<Tap>> {
    let mut all: Vec<Tap> = Vec::new();
    for (own, extent) in taps {
        if all.is_empty() {
            all.clone_from(own);
            continue;
        }
        let mut next = Vec::with_capacity(all.len() * own.len());
        for outer in &all {
            let row = l.map_number(Scalar::Mul, outer.index, *extent as f64)?;
            for inner in own {
                let index = l.map(Scalar::Add, &[row, inner.index])?;
                let weight = l.map(Scalar::Mul, &[outer.weight, inner.weight])?;
                next.push(Tap { index, weight });
            }
        }
        all = next;
    }
    Ok(all)
}

/// `[N, C, spatial…]` as `[C, N · space]`, and the elements of space.
fn table(l: &mut Lowering<'_>, x: ValueId) -> Lowered<(ValueId, Dim)> {
    let shape = l.graph.ty(x).shape.clone();
    let perm: Vec<usize> = [1, 0].into_iter().chain(2..shape.len()).collect();
    let turned = l.transpose(x, &perm)?;
    let space = Dim::product(&shape[2..]);
    Ok((l.reshape(turned, &[shape[1].clone(), &shape[0] * &space])?, space))
}

/// Reads all taps, whose indices are into the columns of `table`, for places of `shape`: `[C, taps, shape…]`, weighted.
fn read(l: &mut Lowering<'_>, table: ValueId, taps: &[Tap], shape: &[Dim]) -> Lowered<ValueId> {
    let mut row = vec![Dim::constant(1)];
    row.extend(shape.iter().cloned());
    let (mut indices, mut weights) = (Vec::new(), Vec::new());
    for tap in taps {
        let (index, weight) = (l.broadcast(tap.index, shape)?, l.broadcast(tap.weight, shape)?);
        indices.push(l.reshape(index, &row)?);
        weights.push(l.reshape(weight, &row)?);
    }
    let (indices, weights) = (l.joined(&indices, 0)?, l.joined(&weights, 0)?);
    let found = l.take(table, 1, indices)?;
    let weights = l.cast(weights, l.graph.ty(found).dtype)?;
    l.map(Scalar::Mul, &[found, weights])
}

/// The type that places are computed in.
fn wide(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

fn interpolation(text: &str) -> Lowered<Interpolation> {
    match text {
        "linear" | "bilinear" => Ok(Interpolation::Linear),
        "cubic" | "bicubic" => Ok(Interpolation::Cubic),
        "nearest" => Ok(Interpolation::Nearest),
        other => Err(invalid(format!("the mode {}", quote(other)))),
    }
}

/// `(X[N, C, …], grid[N, …, d])`; places run from -1 to 1, the last dim of the image first.
pub(super) fn grid_sample(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let interpolation = interpolation(call.attributes.string("mode", "linear")?)?;
    let padding = match call.attributes.string("padding_mode", "zeros")? {
        "zeros" => Padding::Zeros,
        "border" => Padding::Border,
        "reflection" => Padding::Reflection,
        other => return Err(invalid(format!("the padding {}", quote(other)))),
    };
    let align_corners = call.attributes.bool("align_corners", false)?;
    let (x, grid) = (l.data(call.input(0)?)?, l.data(call.input(1)?)?);
    let (image, places) = (l.graph.ty(x).clone(), l.graph.ty(grid).clone());
    let spatial = image.rank().saturating_sub(2);
    if spatial == 0 || places.rank() != image.rank() || places.shape[places.rank() - 1] != Dim::from(spatial)
    {
        return Err(invalid(format!("a grid {places} for {image}")));
    }
    l.unify(&image.shape[0], &places.shape[0])?;
    let shape: Vec<Dim> = l.current_all(&places.shape[..places.rank() - 1]);
    let grid = l.cast(grid, wide(places.dtype))?;
    let mut taps = Vec::with_capacity(spatial);
    for dim in 0..spatial {
        let extent = image.shape[dim + 2].as_size();
        let extent = extent.ok_or_else(|| undecided("GridSample of an image of dynamic size"))?;
        let own = l.cut(grid, places.rank() - 1, spatial - 1 - dim, 1)?;
        let own = l.reshape(own, &shape)?;
        let shifted = l.map_number(Scalar::Add, own, 1.0)?;
        let place = if align_corners {
            let half = l.map_number(Scalar::Div, shifted, 2.0)?;
            l.map_number(Scalar::Mul, half, extent as f64 - 1.0)?
        } else {
            let scaled = l.map_number(Scalar::Mul, shifted, extent as f64)?;
            let shifted = l.map_number(Scalar::Sub, scaled, 1.0)?;
            l.map_number(Scalar::Div, shifted, 2.0)?
        };
        let axis = Axis { extent, padding, interpolation, align_corners };
        taps.push((axis.taps(l, place)?, extent));
    }
    let mut taps = products(l, &taps)?;
    let (table, space) = table(l, x)?;
    let first = batch_start(l, &shape, &space)?;
    for tap in &mut taps {
        tap.index = l.map(Scalar::Add, &[tap.index, first])?;
    }
    let found = read(l, table, &taps, &shape)?;
    let sum = l.reduce(Monoid::Sum, found, &[1])?;
    let mut whole = vec![l.graph.ty(sum).shape[0].clone()];
    whole.extend(shape);
    let sum = l.reshape(sum, &whole)?;
    let perm: Vec<usize> = [1, 0].into_iter().chain(2..whole.len()).collect();
    let result = l.transpose(sum, &perm)?;
    Ok(vec![Value::Data(l.cast(result, image.dtype)?)])
}

/// Where the space of each batch entry starts, along dim 0 of `shape`.
fn batch_start(l: &mut Lowering<'_>, shape: &[Dim], space: &Dim) -> Lowered<ValueId> {
    let batch = l.positions(&shape[0], 0, shape.len())?;
    let space = l.size(space)?;
    l.map(Scalar::Mul, &[batch, space])
}

/// `(X[N, C, H, W], rois[R, 4], batch_indices[R])`.
pub(super) fn roi_align(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let attributes = &call.attributes;
    let default = if call.opset() >= 16 { "half_pixel" } else { "output_half_pixel" };
    let half = attributes.string("coordinate_transformation_mode", default)? == "half_pixel";
    let monoid = match attributes.string("mode", "avg")? {
        "avg" => Monoid::Sum,
        "max" => Monoid::Max,
        other => return Err(invalid(format!("the mode {}", quote(other)))),
    };
    let positive = |name: &str| -> Lowered<usize> {
        let value = attributes.int(name, 1)?;
        usize::try_from(value)
            .ok()
            .filter(|&v| (1..=1 << 16).contains(&v))
            .ok_or_else(|| invalid(format!("{name} is {value}")))
    };
    let out = [positive("output_height")?, positive("output_width")?];
    let samples = attributes.int("sampling_ratio", 0)?;
    let samples = usize::try_from(samples).ok().filter(|&count| (1..=1 << 10).contains(&count));
    let samples =
        samples.ok_or_else(|| data_dependent("the number of samples of a RoiAlign (sampling_ratio 0)"))?;
    let scale = f64::from(attributes.float("spatial_scale", 1.0)?);
    let (x, rois, batch) = (l.data(call.input(0)?)?, l.data(call.input(1)?)?, l.data(call.input(2)?)?);
    let (image, regions) = (l.graph.ty(x).clone(), l.graph.ty(rois).clone());
    let [_, _, height, width] = image.shape.as_slice() else {
        return Err(invalid(format!("RoiAlign of {image}")));
    };
    let size = |dim: &Dim| dim.as_size().ok_or_else(|| undecided("RoiAlign of an image of dynamic size"));
    let extents = [size(height)?, size(width)?];
    let count = regions.shape.first().cloned().ok_or_else(|| invalid("regions of rank 0"))?;
    let rois = l.cast(rois, wide(regions.dtype))?;
    let rois = l.map_number(Scalar::Mul, rois, scale)?;
    let rois = l.map_number(Scalar::Sub, rois, if half { 0.5 } else { 0.0 })?;
    let column = |l: &mut Lowering<'_>, at: usize| -> Lowered<ValueId> {
        let column = l.cut(rois, 1, at, 1)?;
        l.reshape(column, &[count.clone(), Dim::constant(1)])
    };
    let mut taps = Vec::new();
    for (axis, (&extent, &bins)) in extents.iter().zip(&out).enumerate() {
        let (start, end) = (column(l, 1 - axis)?, column(l, 3 - axis)?);
        let mut span = l.map(Scalar::Sub, &[end, start])?;
        if !half {
            span = l.map_number(Scalar::Max, span, 1.0)?;
        }
        // Sample `s` of bin `b` lies at `start + span / bins · (b + (s + 1/2) / samples)`.
        let dtype = l.graph.ty(span).dtype;
        let steps = l.table(dtype, &[1, bins * samples], |at| {
            ((at / samples) as f64 + ((at % samples) as f64 + 0.5) / samples as f64) / bins as f64
        })?;
        let offset = l.map(Scalar::Mul, &[span, steps])?;
        let place = l.map(Scalar::Add, &[start, offset])?;
        taps.push((bounded_taps(l, place, extent)?, bins * samples));
    }
    let [(rows, height_samples), (columns, width_samples)] = taps.as_slice() else {
        return Err(invalid("not two dims"));
    };
    let shape = [count.clone(), Dim::from(*height_samples), Dim::from(*width_samples)];
    let mut align = |taps: &[Tap], down: bool| -> Lowered<Vec<Tap>> {
        let one = Dim::constant(1);
        let aligned = match down {
            true => [count.clone(), shape[1].clone(), one],
            false => [count.clone(), one, shape[2].clone()],
        };
        let mut turned = Vec::new();
        for tap in taps {
            let (index, weight) = (l.reshape(tap.index, &aligned)?, l.reshape(tap.weight, &aligned)?);
            turned.push(Tap { index, weight });
        }
        Ok(turned)
    };
    let (rows, columns) = (align(rows, true)?, align(columns, false)?);
    let mut corners = products(l, &[(rows, extents[0]), (columns, extents[1])])?;
    let (table, space) = table(l, x)?;
    let batch = l.cast(batch, DType::I64)?;
    let batch = l.reshape(batch, &[count.clone(), Dim::constant(1), Dim::constant(1)])?;
    let space = l.size(&space)?;
    let first = l.map(Scalar::Mul, &[batch, space])?;
    for corner in &mut corners {
        corner.index = l.map(Scalar::Add, &[corner.index, first])?;
    }
    let found = read(l, table, &corners, &shape)?;
    let channels = l.graph.ty(found).shape[0].clone();
    let apart = [
        channels.clone(),
        Dim::from(corners.len()),
        count.clone(),
        Dim::from(out[0]),
        Dim::from(samples),
        Dim::from(out[1]),
        Dim::from(samples),
    ];
    let found = l.reshape(found, &apart)?;
    let mut pooled = l.reduce(monoid, found, &[1, 4, 6])?;
    if monoid == Monoid::Sum {
        pooled = l.map_number(Scalar::Div, pooled, (samples * samples) as f64)?;
    }
    let pooled = l.reshape(pooled, &[channels, count, Dim::from(out[0]), Dim::from(out[1])])?;
    Ok(vec![Value::Data(l.transpose(pooled, &[1, 0, 2, 3])?)])
}

/// Linear taps of RoiAlign: places up to one entry outside are moved to the border, further ones count nothing.
fn bounded_taps(l: &mut Lowering<'_>, place: ValueId, extent: usize) -> Lowered<Vec<Tap>> {
    let (above, below) = (
        l.map_number(Scalar::GreaterEqual, place, -1.0)?,
        l.map_number(Scalar::LessEqual, place, extent as f64)?,
    );
    let counted = l.map(Scalar::And, &[above, below])?;
    let axis =
        Axis { extent, padding: Padding::Border, interpolation: Interpolation::Linear, align_corners: true };
    let mut taps = axis.taps(l, place)?;
    for tap in &mut taps {
        let zero = l.scalar(l.graph.ty(tap.weight).dtype, 0.0)?;
        tap.weight = l.map(Scalar::Select, &[counted, tap.weight, zero])?;
    }
    Ok(taps)
}

/// `(theta[N, d, d + 1], size)`: the places of a regular grid after an affine map.
pub(super) fn affine_grid(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let align_corners = call.attributes.bool("align_corners", false)?;
    let theta = l.data(call.input(0)?)?;
    let size = l.ints(call.input(1)?, "the size of an AffineGrid")?;
    let size: Option<Vec<usize>> = size.iter().map(|&extent| usize::try_from(extent).ok()).collect();
    let size = size.ok_or_else(|| invalid("a negative size"))?;
    let [_, _, spatial @ ..] = size.as_slice() else { return Err(invalid("a size of fewer than 3 dims")) };
    let dims = spatial.len();
    let ty = l.graph.ty(theta).clone();
    if ty.rank() != 3 || ty.shape[1] != Dim::from(dims) || ty.shape[2] != Dim::from(dims + 1) {
        return Err(invalid(format!("the map {ty} of a grid of {dims} dims")));
    }
    // Homogeneous coordinates, the last dim first.
    let count: usize = spatial.iter().product();
    let position = |at: usize, extent: usize| match (align_corners, extent) {
        (true, 0 | 1) => -1.0,
        (true, extent) => -1.0 + 2.0 * at as f64 / (extent - 1) as f64,
        (false, extent) => (2.0 * at as f64 + 1.0) / extent as f64 - 1.0,
    };
    let base = l.table(ty.dtype, &[count, dims + 1], |flat| {
        let (place, entry) = (flat / (dims + 1), flat % (dims + 1));
        if entry == dims {
            return 1.0;
        }
        let dim = dims - 1 - entry;
        position(super::transposed::unravel(place, spatial)[dim], spatial[dim])
    })?;
    let spec = EinsumSpec::parse("nij,pj->npi").ok_or_else(|| unsupported("the affine map"))?;
    let grid = l.add(Op::Einsum(spec), &[theta, base])?;
    let mut shape = vec![ty.shape[0].clone()];
    shape.extend(spatial.iter().map(|&extent| Dim::from(extent)));
    shape.push(Dim::from(dims));
    Ok(vec![Value::Data(l.reshape(grid, &shape)?)])
}

/// `(X, W, offset[, B[, mask]])`: a convolution whose taps are moved by data.
pub(super) fn deform_conv(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let (x, w, offset) = (l.data(call.input(0)?)?, l.data(call.input(1)?)?, l.data(call.input(2)?)?);
    let image = l.fixed_shape(x, "DeformConv of an image")?;
    let weight = l.fixed_shape(w, "DeformConv by a kernel")?;
    let moved = l.fixed_shape(offset, "offsets")?;
    let ([batch, channels, space @ ..], [maps, per_group, kernel @ ..]) =
        (image.as_slice(), weight.as_slice())
    else {
        return Err(invalid("an image without channels"));
    };
    let dims = space.len();
    let read_lengths = super::convolution::lengths;
    let strides = read_lengths(call.attributes.optional_ints("strides")?, dims, 1, "strides")?;
    let dilations = read_lengths(call.attributes.optional_ints("dilations")?, dims, 1, "dilations")?;
    let pads = read_lengths(call.attributes.optional_ints("pads")?, 2 * dims, 0, "pads")?;
    call.attributes.ignore("kernel_shape");
    let positive = |name: &str| -> Lowered<usize> {
        let value = call.attributes.int(name, 1)?;
        usize::try_from(value).ok().filter(|&v| v > 0).ok_or_else(|| invalid(format!("{name} is {value}")))
    };
    let (groups, offset_groups) = (positive("group")?, positive("offset_group")?);
    let taps_count: usize = kernel.iter().product();
    let out = moved.get(2..).unwrap_or(&[]).to_vec();
    let fits = dims > 0
        && kernel.len() == dims
        && out.len() == dims
        && channels % offset_groups == 0
        && maps % groups == 0
        && *channels == per_group * groups
        && moved[1] == offset_groups * taps_count * dims;
    if !fits {
        return Err(invalid(format!("offsets {moved:?} for {image:?} by {weight:?}")));
    }
    let places: usize = out.iter().product();
    let offset = l.shaped(offset, &[*batch, offset_groups, taps_count, dims, places])?;
    let offset = l.cast(offset, wide(l.graph.ty(x).dtype))?;
    let mask = match call.optional(4) {
        None => None,
        Some(mask) => {
            let mask = l.data(mask)?;
            Some(l.shaped(mask, &[*batch, offset_groups, taps_count, places])?)
        }
    };
    let (rows, space_size) = table(l, x)?;
    let shape = [*batch, taps_count, places].map(Dim::from);
    let first = batch_start(l, &shape, &space_size)?;
    let each = channels / offset_groups;
    let mut columns = Vec::with_capacity(offset_groups);
    for group in 0..offset_groups {
        let own = l.cut(offset, 1, group, 1)?;
        let mut taps = Vec::with_capacity(dims);
        for dim in 0..dims {
            let moved = l.cut(own, 3, dim, 1)?;
            let moved = l.shaped(moved, &[*batch, taps_count, places])?;
            let dtype = l.graph.ty(moved).dtype;
            let regular = l.table(dtype, &[1, taps_count, places], |flat| {
                let tap = super::transposed::unravel(flat / places.max(1), kernel)[dim];
                let place = super::transposed::unravel(flat % places.max(1), &out)[dim];
                (place * strides[dim] + tap * dilations[dim]) as f64 - pads[dim] as f64
            })?;
            let place = l.map(Scalar::Add, &[moved, regular])?;
            let axis = Axis {
                extent: space[dim],
                padding: Padding::Zeros,
                interpolation: Interpolation::Linear,
                align_corners: true,
            };
            taps.push((axis.taps(l, place)?, space[dim]));
        }
        let mut corners = products(l, &taps)?;
        for corner in &mut corners {
            corner.index = l.map(Scalar::Add, &[corner.index, first])?;
        }
        let own_rows = l.cut(rows, 0, group * each, each)?;
        let found = read(l, own_rows, &corners, &shape)?;
        let mut sum = l.reduce(Monoid::Sum, found, &[1])?;
        sum = l.shaped(sum, &[each, *batch, taps_count, places])?;
        if let Some(mask) = mask {
            let own = l.cut(mask, 1, group, 1)?;
            let own = l.shaped(own, &[1, *batch, taps_count, places])?;
            sum = l.map(Scalar::Mul, &[sum, own])?;
        }
        columns.push(sum);
    }
    let columns = l.joined(&columns, 0)?;
    let columns = l.shaped(columns, &[groups, *per_group, *batch, taps_count, places])?;
    let w = l.shaped(w, &[groups, maps / groups, *per_group, taps_count])?;
    let spec = EinsumSpec::parse("gcnkp,gmck->ngmp").ok_or_else(|| unsupported("the convolution"))?;
    let columns = l.cast(columns, l.graph.ty(w).dtype)?;
    let result = l.add(Op::Einsum(spec), &[columns, w])?;
    let whole: Vec<usize> = [*batch, *maps].into_iter().chain(out).collect();
    let result = l.shaped(result, &whole)?;
    let Some(bias) = call.optional(3) else { return Ok(vec![Value::Data(result)]) };
    let bias = l.data(bias)?;
    Ok(vec![Value::Data(super::convolution::per_channel(l, Scalar::Add, result, bias)?)])
}
