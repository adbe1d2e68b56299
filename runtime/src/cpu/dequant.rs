//! Widening quantised weights: `(q - zero) * scale` with one scale per block of an axis.

use super::value::Value;
use tpshard_ir::{DType, Data};

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
