//! Quantised weights, `(q - zero) * scale` with one scale per block of an axis: widened, or packed as they are.

use super::gemm::{Packed, Quantised, QuantisedShape};
use super::value::Value;
use std::borrow::Cow;
use std::sync::Arc;
use tpshard_ir::{DType, Data, Tensor};

/// The integers of a quantised tensor, row-major.
pub(crate) fn integers(x: &Value) -> Result<Vec<i32>, String> {
    let packed = |dtype: DType, bytes: &[u8]| -> Result<Vec<i32>, String> {
        let bits = dtype.bits();
        let signed = match dtype {
            DType::I4 | DType::I2 => true,
            DType::U4 | DType::U2 => false,
            other => return Err(format!("{other} is not an integer type")),
        };
        let (per_byte, mask) = (8 / bits, (1u32 << bits) - 1);
        let one = |i: usize| {
            let raw = (u32::from(bytes[i / per_byte]) >> (i % per_byte * bits)) & mask;
            let top = 1u32 << (bits - 1);
            if signed && raw & top != 0 { raw as i32 - (1 << bits) } else { raw as i32 }
        };
        Ok((0..x.len()).map(one).collect())
    };
    match x.data() {
        Data::I8(_) => Ok(x.slice::<i8>()?.iter().map(|&v| v.into()).collect()),
        Data::U8(_) => Ok(x.slice::<u8>()?.iter().map(|&v| v.into()).collect()),
        Data::Raw(dtype, _) => match x.tensor()?.data() {
            Data::Raw(_, bytes) => packed(*dtype, bytes),
            _ => Err("not a packed tensor".into()),
        },
        other => Err(format!("quantised values of type {}", other.dtype())),
    }
}

/// `(q - zero) * scale`, as `f32`.
pub(crate) fn dequant(axis: usize, block: usize, operands: &[Value]) -> Result<Value, String> {
    let [q, scale, zero @ ..] = operands else { return Err("dequantisation takes two operands".into()) };
    let extent = *q.shape().get(axis).ok_or("dequantisation along a dim that does not exist")?;
    let inner: usize = q.shape()[axis + 1..].iter().product();
    let blocks = extent.div_ceil(block.max(1));
    let (values, scales) = (integers(q)?, scale.to_f32()?);
    let zeros = zero.first().map(integers).transpose()?;
    if scales.len() * extent != values.len() * blocks {
        return Err("the scales do not fit the quantised values".into());
    }
    let mut out = Vec::with_capacity(values.len());
    for (i, &value) in values.iter().enumerate() {
        let (outer, along, in_row) = (i / inner / extent, i / inner % extent, i % inner);
        let at = (outer * blocks + along / block) * inner + in_row;
        let zero = zeros.as_ref().and_then(|z| z.get(at)).copied().unwrap_or(0);
        out.push((value - zero) as f32 * scales[at]);
    }
    Value::from_vec(q.shape(), out)
}

/// Packs quantised weights for products in which `axis` is the depth and the other dims, in order, are the columns; none if
/// their blocks do not allow it.
pub(crate) fn pack(axis: usize, block: usize, operands: &[Value]) -> Result<Option<Packed>, String> {
    let [q, scale, zero @ ..] = operands else { return Err("dequantisation takes two operands".into()) };
    let depth = *q.shape().get(axis).ok_or("dequantisation along a dim that does not exist")?;
    let Some(codes) = Codes::of(q)? else { return Ok(None) };
    let zeros = zero.first().map(Codes::of).transpose()?;
    if matches!(zeros, Some(None)) || depth == 0 || block == 0 || q.len() == 0 {
        return Ok(None);
    }
    let inner = q.shape()[axis + 1..].iter().product();
    let blocks = depth.div_ceil(block);
    let scales = scale.to_f32()?;
    let zeros = zeros.flatten();
    let expected = q.len() / depth * blocks;
    if scales.len() != expected || zeros.as_ref().is_some_and(|z| z.len != expected) {
        return Err("the scales do not fit the quantised values".into());
    }
    let shape = QuantisedShape { depth, columns: q.len() / depth, block, nibbles: codes.bits == 4 };
    Ok(Packed::quantised(shape, &Operands { codes, scales, zeros, inner, depth, blocks }))
}

/// The operands of a dequantisation as a matrix.
struct Operands<'a> {
    codes: Codes,
    scales: Cow<'a, [f32]>,
    zeros: Option<Codes>,
    /// Elements from one step of the depth to the next.
    inner: usize,
    depth: usize,
    blocks: usize,
}

impl Quantised for Operands<'_> {
    fn code(&self, step: usize, column: usize) -> i8 {
        let (outer, within) = (column / self.inner, column % self.inner);
        self.codes.get((outer * self.depth + step) * self.inner + within)
    }

    fn scale(&self, block: usize, column: usize) -> f32 {
        self.scales[self.of_block(block, column)]
    }

    fn zero(&self, block: usize, column: usize) -> i16 {
        match &self.zeros {
            // The two may be of different types, and then have had different numbers taken off.
            Some(zeros) => {
                i16::from(zeros.get(self.of_block(block, column))) + zeros.centre - self.codes.centre
            }
            None => -self.codes.centre,
        }
    }
}

impl Operands<'_> {
    fn of_block(&self, block: usize, column: usize) -> usize {
        (column / self.inner * self.blocks + block) * self.inner + column % self.inner
    }
}

/// Integers of four or eight bits, those without a sign moved by half their range, so that all have one.
struct Codes {
    tensor: Arc<Tensor>,
    len: usize,
    bits: usize,
    /// What was taken off.
    centre: i16,
}

impl Codes {
    fn of(value: &Value) -> Result<Option<Codes>, String> {
        let (bits, centre) = match value.dtype() {
            DType::I4 => (4, 0),
            DType::U4 => (4, 8),
            DType::I8 => (8, 0),
            DType::U8 => (8, 128),
            _ => return Ok(None),
        };
        Ok(Some(Codes { tensor: value.tensor()?, len: value.len(), bits, centre }))
    }

    fn get(&self, index: usize) -> i8 {
        match self.tensor.data() {
            Data::I8(v) => v[index],
            Data::U8(v) => (v[index] ^ 0x80) as i8,
            Data::Raw(dtype, bytes) => {
                let bits = bytes[index / 2] >> (index % 2 * 4);
                // Taking 8 off turns the top bit around.
                let bits = if *dtype == DType::U4 { bits ^ 8 } else { bits };
                (bits << 4) as i8 >> 4
            }
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_weights_are_what_they_widen_to() {
        let (rows, depth, block) = (3, 64, 32);
        let count = rows * depth;
        let scale: Vec<f32> = (0..rows * 2).map(|i| 0.5 + i as f32).collect();
        let scale = Value::from_vec(&[rows, 2], scale).unwrap();
        let bytes = |count: usize| -> Vec<u8> { (0..count).map(|i| (i * 37 + 11) as u8).collect() };
        let raw = |dtype: DType, shape: &[usize]| {
            let count: usize = shape.iter().product();
            let data = match dtype {
                DType::I8 => Data::I8(bytes(count).into_iter().map(|b| b as i8).collect()),
                DType::U8 => Data::U8(bytes(count)),
                _ => Data::Raw(dtype, bytes(count / 2)),
            };
            Value::new(Tensor::new(shape.to_vec(), data).unwrap())
        };
        for dtype in [DType::I4, DType::U4, DType::I8, DType::U8] {
            let q = raw(dtype, &[rows, depth]);
            let zero = raw(dtype, &[rows, 2]);
            let other = raw(DType::U8, &[rows, 2]);
            let all = [
                vec![q.clone(), scale.clone()],
                vec![q.clone(), scale.clone(), zero],
                vec![q, scale.clone(), other],
            ];
            for operands in all {
                let wide = dequant(1, block, &operands).unwrap();
                let packed = pack(1, block, &operands).unwrap().unwrap();
                let found: Vec<f32> =
                    (0..rows).flat_map(|row| packed.column(row).collect::<Vec<_>>()).collect();
                assert_eq!(found, wide.slice::<f32>().unwrap().to_vec(), "{dtype}");
                assert_eq!(found.len(), count);
            }
            // The depth first, as in weights that are not transposed.
            let q = raw(dtype, &[depth, 4]);
            let scale = Value::from_vec(&[2, 4], (0..8).map(|i| 1.0 + i as f32).collect()).unwrap();
            let wide = dequant(0, block, &[q.clone(), scale.clone()]).unwrap();
            let packed = pack(0, block, &[q, scale]).unwrap().unwrap();
            let wide = wide.slice::<f32>().unwrap();
            for column in 0..4 {
                assert!(packed.column(column).eq(wide.iter().skip(column).step_by(4).copied()), "{dtype}");
            }
        }
        let floats = Value::from_vec(&[1, 32], vec![0f32; 32]).unwrap();
        assert!(pack(1, 32, &[floats.clone(), floats]).unwrap().is_none());
    }
}
