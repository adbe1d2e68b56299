//! Packed types seen as bytes: several elements per byte become one `u8` along the last dimension.
//!
//! ONNX packs elements densely in row-major order. As long as every cut falls on whole bytes, moving such elements is
//! moving bytes, and an expression over them is the same expression over `u8` with a shorter last dimension.

use super::{Span, WeightError, region};
use tpshard_ir::DType;
use tpshard_ir::weight::{WeightExpr, WeightKind};

/// `weight` and `region` in bytes if the dtype is packed, unchanged otherwise.
///
/// # Errors
/// A cut through a byte.
pub(super) fn as_bytes(weight: &WeightExpr, region: &[Span]) -> Result<(WeightExpr, Vec<Span>), WeightError> {
    let dtype = weight.dtype();
    if !dtype.is_packed() {
        return Ok((weight.clone(), region.to_vec()));
    }
    let packing = Packing { dtype, per_byte: 8 / dtype.bits() };
    if region == region::whole(weight.shape())
        && let Some((name, shape)) = whole_initializer(weight)
    {
        // Nothing is cut, so that even a last byte that is not full is taken as it is.
        let bytes =
            tpshard_ir::tensor::element_count(shape).map_or(usize::MAX, |n| n.div_ceil(packing.per_byte));
        let flat = WeightExpr::initializer(name, DType::U8, vec![bytes])?;
        return Ok((flat, region::whole(&[bytes])));
    }
    let bytes = packing.expression(weight)?;
    let mut region = region.to_vec();
    if let Some(last) = region.last_mut() {
        last.start = packing.bytes(last.start, || format!("a slice {last:?} of the last dimension"))?;
        last.length =
            packing.bytes(last.length, || format!("a slice of {} of the last dimension", last.length))?;
    }
    Ok((bytes, region))
}

/// The initializer that `weight` is, apart from its shape.
fn whole_initializer(weight: &WeightExpr) -> Option<(&str, &[usize])> {
    match weight.kind() {
        WeightKind::Initializer { name } => Some((name, weight.shape())),
        WeightKind::Reshape { source } => whole_initializer(source),
        _ => None,
    }
}

struct Packing {
    dtype: DType,
    per_byte: usize,
}

impl Packing {
    fn bytes(&self, elements: usize, what: impl FnOnce() -> String) -> Result<usize, WeightError> {
        if elements.is_multiple_of(self.per_byte) {
            return Ok(elements / self.per_byte);
        }
        Err(WeightError::Unaligned { what: what(), dtype: self.dtype, per_byte: self.per_byte })
    }

    fn shape(&self, shape: &[usize]) -> Result<Vec<usize>, WeightError> {
        let mut bytes = shape.to_vec();
        let last = bytes.last_mut().ok_or_else(|| WeightError::Unaligned {
            what: "a part of a weight without dimensions".into(),
            dtype: self.dtype,
            per_byte: self.per_byte,
        })?;
        *last = self.bytes(*last, || format!("the last dimension of shape {shape:?}"))?;
        Ok(bytes)
    }

    fn expression(&self, expr: &WeightExpr) -> Result<WeightExpr, WeightError> {
        let last = expr.shape().len().saturating_sub(1);
        Ok(match expr.kind() {
            WeightKind::Initializer { name } => {
                WeightExpr::initializer(name.as_str(), DType::U8, self.shape(expr.shape())?)?
            }
            WeightKind::Slice { source, axis, start, length } if *axis == last => {
                let what = || format!("slice({axis}, {start}, {length})");
                let (start, length) = (self.bytes(*start, what)?, self.bytes(*length, what)?);
                self.expression(source)?.slice(*axis, start, length)?
            }
            WeightKind::Slice { source, axis, start, length } => {
                self.expression(source)?.slice(*axis, *start, *length)?
            }
            WeightKind::Concat { sources, axis } => {
                let sources = sources.iter().map(|source| self.expression(source));
                WeightExpr::concat(sources.collect::<Result<_, _>>()?, *axis)?
            }
            WeightKind::Transpose { source, perm } => {
                if perm.last().is_some_and(|&axis| axis != last) {
                    let what = format!("transpose({perm:?})");
                    return Err(WeightError::Unaligned { what, dtype: self.dtype, per_byte: self.per_byte });
                }
                self.expression(source)?.transpose(perm.clone())?
            }
            WeightKind::Reshape { source } => self.expression(source)?.reshape(self.shape(expr.shape())?)?,
            // Refused when built; building it again gives the reason.
            WeightKind::Cast { source } => source.cast(expr.dtype())?,
        })
    }
}
