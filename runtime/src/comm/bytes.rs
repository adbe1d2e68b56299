//! Tensors seen as bytes, without copying.
#![allow(unsafe_code)] // Reinterpreting a slice of numbers as bytes has no safe form for all our element types.

use tpshard_ir::{DType, Data, Tensor, TensorError, tensor::Element};

#[cfg(target_endian = "big")]
compile_error!("tensors are exchanged as little-endian bytes; a big-endian target needs conversions here");

/// Types without padding and without invalid bit patterns.
trait Plain: Element {}
macro_rules! plain {
    ($($ty:ty)*) => { $(impl Plain for $ty {})* };
}
plain!(f32 f64 i8 i16 i32 i64 u8 u16 u32 u64 half::f16 half::bf16);

fn view<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: T is plain (initialised, no padding); the length in bytes is that of the slice; u8 needs no alignment.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

fn view_mut<T: Plain>(values: &mut [T]) -> &mut [u8] {
    // SAFETY: as in `view`; the borrow is exclusive, and any bytes are a valid T.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

/// The elements of `data` as little-endian bytes.
pub(crate) fn bytes(data: &Data) -> &[u8] {
    match data {
        Data::F32(v) => view(v),
        Data::F16(v) => view(v),
        Data::BF16(v) => view(v),
        Data::F64(v) => view(v),
        Data::I8(v) => view(v),
        Data::I16(v) => view(v),
        Data::I32(v) => view(v),
        Data::I64(v) => view(v),
        Data::U8(v) | Data::Raw(_, v) => v,
        Data::U16(v) => view(v),
        Data::U32(v) => view(v),
        Data::U64(v) => view(v),
        // SAFETY: a bool is one initialised byte.
        Data::Bool(v) => unsafe { std::slice::from_raw_parts(v.as_ptr().cast(), v.len()) },
    }
}

/// A tensor being filled with bytes. Bools are held as bytes until [`Filled::finish`], since not every byte is a bool.
pub(crate) struct Filled {
    dtype: DType,
    data: Data,
}

impl Filled {
    /// Room for `count` elements, all zero.
    pub(crate) fn zeros(dtype: DType, count: usize) -> Filled {
        let held = if dtype == DType::Bool { DType::U8 } else { dtype };
        Filled { dtype, data: Data::zeros(held, count) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.data {
            Data::F32(v) => view_mut(v),
            Data::F16(v) => view_mut(v),
            Data::BF16(v) => view_mut(v),
            Data::F64(v) => view_mut(v),
            Data::I8(v) => view_mut(v),
            Data::I16(v) => view_mut(v),
            Data::I32(v) => view_mut(v),
            Data::I64(v) => view_mut(v),
            Data::U8(v) | Data::Raw(_, v) => v,
            Data::U16(v) => view_mut(v),
            Data::U32(v) => view_mut(v),
            Data::U64(v) => view_mut(v),
            Data::Bool(_) => &mut [],
        }
    }

    pub(crate) fn finish(self, shape: Vec<usize>) -> Result<Tensor, TensorError> {
        match self.data {
            Data::U8(v) if self.dtype == DType::Bool => Tensor::from_le_bytes(DType::Bool, shape, &v),
            data => Tensor::new(shape, data),
        }
    }

    /// Takes a tensor's elements to overwrite them.
    pub(crate) fn from_tensor(tensor: Tensor) -> Filled {
        let dtype = tensor.dtype();
        let data = match tensor.into_data() {
            Data::Bool(v) => Data::U8(v.into_iter().map(u8::from).collect()),
            data => data,
        };
        Filled { dtype, data }
    }
}
