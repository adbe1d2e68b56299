//! Elements of tensors as numbers, and tensors cut and joined along an axis.

use super::Evaluated;
use std::cmp::Ordering;
use tpshard_ir::tensor::element_count;
use tpshard_ir::{DType, Data, Tensor};

/// A number, exactly.
#[derive(Clone, Copy, Debug)]
pub(super) enum Number {
    Int(i128),
    Float(f64),
}

impl Number {
    /// A total order of numbers of one type; zeros are equal, NaN comes last and equals itself.
    pub(super) fn order(&self, other: &Number) -> Ordering {
        match (self, other) {
            (Number::Int(a), Number::Int(b)) => a.cmp(b),
            (Number::Float(a), Number::Float(b)) => {
                a.partial_cmp(b).unwrap_or_else(|| a.is_nan().cmp(&b.is_nan()))
            }
            (Number::Int(_), Number::Float(_)) => Ordering::Less,
            (Number::Float(_), Number::Int(_)) => Ordering::Greater,
        }
    }

    pub(super) fn is_zero(&self) -> bool {
        match self {
            Number::Int(value) => *value == 0,
            Number::Float(value) => *value == 0.0,
        }
    }

    pub(super) fn float(&self) -> f64 {
        match self {
            Number::Int(value) => *value as f64,
            Number::Float(value) => *value,
        }
    }
}

/// All elements.
pub(super) fn numbers(tensor: &Tensor) -> Evaluated<Vec<Number>> {
    macro_rules! ints {
        ($values:expr) => {
            $values.iter().map(|&value| Number::Int(i128::from(value))).collect()
        };
    }
    Ok(match tensor.data() {
        Data::F32(v) => v.iter().map(|&x| Number::Float(f64::from(x))).collect(),
        Data::F64(v) => v.iter().map(|&x| Number::Float(x)).collect(),
        Data::F16(v) => v.iter().map(|x| Number::Float(x.to_f64())).collect(),
        Data::BF16(v) => v.iter().map(|x| Number::Float(x.to_f64())).collect(),
        Data::I8(v) => ints!(v),
        Data::I16(v) => ints!(v),
        Data::I32(v) => ints!(v),
        Data::I64(v) => ints!(v),
        Data::U8(v) => ints!(v),
        Data::U16(v) => ints!(v),
        Data::U32(v) => ints!(v),
        Data::U64(v) => ints!(v),
        Data::Bool(v) => ints!(v),
        Data::Raw(dtype, _) => return Err(format!("elements of type {dtype} have no values here")),
    })
}

/// The only element of a tensor.
pub(super) fn single(tensor: &Tensor, what: &str) -> Evaluated<Number> {
    match numbers(tensor)?.as_slice() {
        [one] => Ok(*one),
        _ => Err(format!("{what} has the shape {:?}, not one element", tensor.shape())),
    }
}

/// The only element of a tensor, as an integer.
pub(super) fn integer(tensor: &Tensor, what: &str) -> Evaluated<i64> {
    match single(tensor, what)? {
        Number::Int(value) => i64::try_from(value).map_err(|_| format!("{what} is {value}")),
        Number::Float(value) => Err(format!("{what} is {value}, not an integer")),
    }
}

/// `axis` of a tensor of `rank`; negative ones count from the end.
pub(super) fn axis_of(axis: i64, rank: usize) -> Evaluated<usize> {
    let length = i64::try_from(rank).unwrap_or(i64::MAX);
    let at = if axis < 0 { axis.saturating_add(length) } else { axis };
    let at = usize::try_from(at).ok().filter(|&at| at < rank);
    at.ok_or_else(|| format!("axis {axis} of a tensor of rank {rank}"))
}

/// Bytes of one element.
fn width(dtype: DType) -> Evaluated<usize> {
    if dtype.is_packed() {
        return Err(format!("tensors of {dtype} cannot be cut"));
    }
    Ok(dtype.bits() / 8)
}

fn from_bytes(dtype: DType, shape: Vec<usize>, bytes: &[u8]) -> Evaluated<Tensor> {
    Tensor::from_le_bytes(dtype, shape, bytes).map_err(|error| error.to_string())
}

fn product(shape: &[usize]) -> Evaluated<usize> {
    element_count(shape).ok_or_else(|| format!("a shape of {shape:?} is too large"))
}

/// Entries `positions` of `axis`.
pub(super) fn take(tensor: &Tensor, axis: usize, positions: &[usize]) -> Evaluated<Tensor> {
    let shape = tensor.shape();
    let extent = *shape.get(axis).ok_or_else(|| format!("axis {axis} of a tensor of shape {shape:?}"))?;
    let inner = product(&shape[axis + 1..])?.saturating_mul(width(tensor.dtype())?);
    let outer = product(&shape[..axis])?;
    let bytes = tensor.data().to_le_bytes();
    let mut taken = Vec::new();
    for block in 0..outer {
        for &position in positions {
            let start = (block * extent + position) * inner;
            let entry = bytes.get(start..start + inner).filter(|_| position < extent);
            taken.extend_from_slice(entry.ok_or_else(|| format!("entry {position} of {extent}"))?);
        }
    }
    let mut result = shape.to_vec();
    result[axis] = positions.len();
    from_bytes(tensor.dtype(), result, &taken)
}

/// Entry `position` of `axis`, without that axis.
pub(super) fn entry(tensor: &Tensor, axis: usize, position: usize) -> Evaluated<Tensor> {
    let one = take(tensor, axis, &[position])?;
    let mut shape = one.shape().to_vec();
    shape.remove(axis);
    one.reshaped(shape).map_err(|error| error.to_string())
}

/// Tensors of one type side by side along a new `axis`.
pub(super) fn stack(parts: &[Tensor], axis: usize) -> Evaluated<Tensor> {
    let first = parts.first().ok_or("nothing to stack")?;
    if let Some(other) = parts.iter().find(|p| p.shape() != first.shape() || p.dtype() != first.dtype()) {
        let (a, b) = (first.shape(), other.shape());
        return Err(format!("results of shapes {a:?} and {b:?} cannot be joined"));
    }
    let shape = first.shape();
    let inner = product(&shape[axis.min(shape.len())..])?.saturating_mul(width(first.dtype())?);
    let outer = product(&shape[..axis.min(shape.len())])?;
    let bytes: Vec<Vec<u8>> = parts.iter().map(|part| part.data().to_le_bytes()).collect();
    let mut joined = Vec::new();
    for block in 0..outer {
        for part in &bytes {
            let entry = part.get(block * inner..(block + 1) * inner);
            joined.extend_from_slice(entry.ok_or("a tensor is shorter than its shape")?);
        }
    }
    let mut result = shape.to_vec();
    result.insert(axis.min(shape.len()), parts.len());
    from_bytes(first.dtype(), result, &joined)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cutting_and_joining_are_inverse() {
        let x = Tensor::from_vec(vec![2, 3, 2], (0..12i32).collect()).unwrap();
        for axis in 0..3 {
            let parts: Vec<Tensor> = (0..x.shape()[axis]).map(|at| entry(&x, axis, at).unwrap()).collect();
            assert_eq!(stack(&parts, axis).unwrap(), x);
        }
        let picked = take(&x, 1, &[2, 0]).unwrap();
        assert_eq!(picked, Tensor::from_vec(vec![2, 2, 2], vec![4, 5, 0, 1, 10, 11, 6, 7]).unwrap());
        assert!(take(&x, 1, &[3]).is_err());
        assert!(stack(&[x.clone(), Tensor::scalar(1i32)], 0).is_err());
    }
}
