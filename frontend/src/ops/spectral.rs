//! Transforms of signals: [DFT](https://onnx.ai/onnx/operators/onnx__DFT.html) 17 (`axis` an attribute) and 20 (an input),
//! [STFT](https://onnx.ai/onnx/operators/onnx__STFT.html) 17, the windows (Hann, Hamming, Blackman) 17 and
//! [MelWeightMatrix](https://onnx.ai/onnx/operators/onnx__MelWeightMatrix.html) 17.
//!
//! A transform is one contraction with a constant matrix of cosines and sines, `[time, part, frequency, part]`, where the
//! parts are the real and the imaginary one.

use crate::lower::{
    Call, Element, Lowered, Lowering, Value, axis_of, data_dependent, invalid, undecided, unsupported,
};
use crate::tensor_data::dtype_from_onnx;
use std::f64::consts::PI;
use tpshard_ir::op::EinsumSpec;
use tpshard_ir::{DType, Dim, Op, Scalar, ValueId};

/// What is transformed and how.
struct Transform {
    /// Entries taken from the signal.
    taken: usize,
    length: usize,
    complex: bool,
    inverse: bool,
    onesided: bool,
}

impl Transform {
    /// Frequencies, or samples of the inverse.
    fn entries(&self) -> usize {
        if self.onesided && !self.inverse { self.length / 2 + 1 } else { self.length }
    }

    /// Parts of the result: that of a one-sided inverse is real.
    fn parts(&self) -> usize {
        if self.onesided && self.inverse { 1 } else { 2 }
    }

    /// `[taken, parts in, entries, parts out]`.
    fn matrix(&self, l: &mut Lowering<'_>, dtype: DType) -> Lowered<ValueId> {
        let (entries, parts, parts_in) = (self.entries(), self.parts(), 1 + usize::from(self.complex));
        let n = self.length;
        let sign = if self.inverse { 1.0 } else { -1.0 };
        let scale = if self.inverse { 1.0 / n as f64 } else { 1.0 };
        l.table(dtype, &[self.taken, parts_in, entries, parts], |flat| {
            let (rest, part) = (flat / parts, flat % parts);
            let (rest, entry) = (rest / entries, rest % entries);
            let (time, part_in) = (rest / parts_in, rest % parts_in);
            // Reduced before it becomes a float, so that large products lose nothing.
            let turn = (time as u64 * entry as u64 % n.max(1) as u64) as f64 / n as f64;
            let (sin, cos) = (2.0 * PI * turn).sin_cos();
            // (a + ib)(cos + i sign sin): what the other half of a one-sided spectrum would add is as much again.
            let twice = if self.onesided && self.inverse && time != 0 && 2 * time != n { 2.0 } else { 1.0 };
            let value = match (part_in, part) {
                (0, 0) => cos,
                (0, _) => sign * sin,
                (_, 0) => -sign * sin,
                (_, _) => cos,
            };
            scale * twice * value
        })
    }

    /// Of `[P, taken, parts]`: `[P, entries, parts]`.
    fn apply(&self, l: &mut Lowering<'_>, x: ValueId) -> Lowered<ValueId> {
        let matrix = self.matrix(l, l.graph.ty(x).dtype)?;
        let spec = EinsumSpec::parse("pnc,ncmk->pmk").ok_or_else(|| unsupported("a transform"))?;
        l.add(Op::Einsum(spec), &[x, matrix])
    }
}

fn count(l: &Lowering<'_>, value: &Value, what: &str) -> Lowered<usize> {
    let number = l.number(value, what)?;
    if number >= 0.0 && number.fract() == 0.0 && number <= f64::from(i32::MAX) {
        Ok(number as usize)
    } else {
        Err(invalid(format!("{what} is {number}")))
    }
}

/// Real signals have a last dim of 1, complex ones of 2.
fn is_complex(l: &Lowering<'_>, x: ValueId) -> Lowered<bool> {
    match l.graph.ty(x).shape.last().and_then(Dim::as_size) {
        Some(1) => Ok(false),
        Some(2) => Ok(true),
        _ => Err(invalid(format!("a signal {}, whose last dim is neither 1 nor 2", l.graph.ty(x)))),
    }
}

/// `(x[, dft_length[, axis]])`.
pub(super) fn dft(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let inverse = call.attributes.bool("inverse", false)?;
    let onesided = call.attributes.bool("onesided", false)?;
    let mut x = l.data(call.input(0)?)?;
    let rank = l.graph.ty(x).rank();
    let axis = match call.optional(2) {
        _ if call.opset() < 20 => call.attributes.int("axis", 1)?,
        None => -2,
        Some(axis) => {
            let axis = l.ints(axis, "the axis of a DFT")?;
            axis.first().copied().ok_or_else(|| invalid("no axis"))?
        }
    };
    let axis = axis_of(axis, rank)?;
    if axis + 1 >= rank {
        return Err(invalid("the parts of a complex number are no axis"));
    }
    let complex = is_complex(l, x)?;
    let extent = l.graph.ty(x).shape[axis].as_size();
    let extent = extent.ok_or_else(|| undecided("DFT over a dynamic dim"))?;
    let default = if inverse && onesided { 2 * extent.saturating_sub(1) } else { extent };
    let length = match call.optional(1) {
        None => default,
        Some(length) => count(l, length, "the length of a DFT")?,
    };
    let wanted = if inverse && onesided { length / 2 + 1 } else { length };
    // Longer signals are cut; zeros beyond the end of shorter ones add nothing.
    let taken = extent.min(wanted);
    if taken == 0 {
        return Err(invalid("a DFT of no entries"));
    }
    x = l.cut(x, axis, 0, taken)?;
    let transform = Transform { taken, length, complex, inverse, onesided };
    let mut perm: Vec<usize> = (0..rank).filter(|&at| at != axis && at + 1 != rank).collect();
    perm.extend([axis, rank - 1]);
    let turned = l.transpose(x, &perm)?;
    let shape = l.graph.ty(turned).shape.clone();
    let lead = &shape[..rank - 2];
    let flat = l.reshape(turned, &[Dim::product(lead), shape[rank - 2].clone(), shape[rank - 1].clone()])?;
    let result = transform.apply(l, flat)?;
    let mut whole = lead.to_vec();
    whole.extend([Dim::from(transform.entries()), Dim::from(transform.parts())]);
    let result = l.reshape(result, &whole)?;
    let back: Vec<usize> = (0..rank).filter_map(|at| perm.iter().position(|&from| from == at)).collect();
    Ok(vec![Value::Data(l.transpose(result, &back)?)])
}

/// `(signal[B, T, parts], frame_step[, window[, frame_length]])`.
pub(super) fn stft(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let onesided = call.attributes.bool("onesided", true)?;
    let x = l.data(call.input(0)?)?;
    let shape = l.graph.ty(x).shape.clone();
    let [batch, time, parts] = shape.as_slice() else {
        return Err(invalid(format!("a signal {}", l.graph.ty(x))));
    };
    let complex = is_complex(l, x)?;
    let time = time.as_size().ok_or_else(|| undecided("STFT of a signal of dynamic length"))?;
    let step = count(l, call.input(1)?, "the step of a STFT")?;
    let window = call.optional(2).map(|window| l.data(window)).transpose()?;
    let length = match (call.optional(3), window) {
        (Some(length), _) => count(l, length, "the frame length of a STFT")?,
        (None, Some(window)) => l.graph.ty(window).shape.first().and_then(Dim::as_size).unwrap_or(0),
        (None, None) => time,
    };
    if step == 0 || length == 0 || length > time {
        return Err(invalid(format!("frames of {length} every {step} of {time}")));
    }
    let frames = (time - length) / step + 1;
    let index: Vec<i64> = (0..frames)
        .flat_map(|frame| (0..length).map(move |at| i64::try_from(frame * step + at).unwrap_or(i64::MAX)))
        .collect();
    let index = l.indices_table(&[frames * length], &index)?;
    let cut = l.take(x, 1, index)?;
    let mut cut = l.reshape(cut, &[batch * &Dim::from(frames), Dim::from(length), parts.clone()])?;
    if let Some(window) = window {
        let window = l.shaped(window, &[length, 1])?;
        cut = l.map(Scalar::Mul, &[cut, window])?;
    }
    let transform = Transform { taken: length, length, complex, inverse: false, onesided };
    let result = transform.apply(l, cut)?;
    let whole = [batch.clone(), Dim::from(frames), Dim::from(transform.entries()), Dim::constant(2)];
    Ok(vec![Value::Data(l.reshape(result, &whole)?)])
}

/// HannWindow, HammingWindow, BlackmanWindow.
pub(super) fn window(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let dtype = dtype_from_onnx(call.attributes.int("output_datatype", 1)?)?;
    let periodic = call.attributes.bool("periodic", true)?;
    let size = count(l, call.input(0)?, "the size of a window")?;
    let period = if periodic { size as f64 } else { size as f64 - 1.0 };
    let coefficients: [f64; 3] = match call.node.op_type.as_str() {
        "HannWindow" => [0.5, -0.5, 0.0],
        "HammingWindow" => [25.0 / 46.0, 25.0 / 46.0 - 1.0, 0.0],
        _ => [0.42, -0.5, 0.08],
    };
    let value = l.table(dtype, &[size], |at| {
        let turn = 2.0 * PI * at as f64 / period;
        coefficients[0] + coefficients[1] * turn.cos() + coefficients[2] * (2.0 * turn).cos()
    })?;
    Ok(vec![Value::Data(value)])
}

/// `(num_mel_bins, dft_length, sample_rate, lower_edge_hertz, upper_edge_hertz)`: triangles over the frequencies of a
/// spectrum, at even distances on the mel scale.
pub(super) fn mel_weight_matrix(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let dtype = dtype_from_onnx(call.attributes.int("output_datatype", 1)?)?;
    let mut numbers = [0.0; 5];
    for (index, number) in numbers.iter_mut().enumerate() {
        let known =
            l.known(call.input(index)?).ok_or_else(|| data_dependent("the shape of a MelWeightMatrix"))?;
        let single = known.single().and_then(Element::number);
        *number = single.ok_or_else(|| undecided("a MelWeightMatrix of dynamic size"))?;
    }
    let [bins, length, rate, lower, upper] = numbers;
    if !(bins >= 1.0 && length >= 1.0 && rate > 0.0 && bins < 1e6 && length < 1e9) {
        return Err(invalid(format!("{bins} mel bins of a spectrum of {length} at {rate}")));
    }
    let (bins, rows) = (bins as usize, length as usize / 2 + 1);
    let mel = |hertz: f64| 2595.0 * (1.0 + hertz / 700.0).log10();
    let step = (mel(upper) - mel(lower)) / (bins + 2) as f64;
    let edges: Vec<f64> = (0..bins + 2)
        .map(|at| {
            let hertz = 700.0 * (10f64.powf((at as f64 * step + mel(lower)) / 2595.0) - 1.0);
            ((length + 1.0) * hertz / rate).floor()
        })
        .collect();
    let value = l.table(dtype, &[rows, bins], |flat| {
        let (row, bin) = ((flat / bins) as f64, flat % bins);
        let (low, centre, high) = (edges[bin], edges[bin + 1], edges[bin + 2]);
        if (row >= centre && row < high) || (row == centre && low == centre) {
            if high > centre && row >= centre { (high - row) / (high - centre) } else { 1.0 }
        } else if row >= low && row <= centre && centre > low {
            (row - low) / (centre - low)
        } else {
            0.0
        }
    })?;
    Ok(vec![Value::Data(value)])
}
