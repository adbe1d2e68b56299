//! Host tensors: the values that enter and leave programs, and what the executors compute on.
//!
//! Dense, row-major, owned. Storage types narrower than a byte, and the 8-bit floats, are kept as raw bytes in ONNX's
//! packing; everything else is a typed vector, so that no code needs to reinterpret memory.

use crate::dim::Dim;
use crate::{DType, Type};
use half::{bf16, f16};

/// The elements of a tensor, row-major.
#[derive(Clone, Debug, PartialEq)]
pub enum Data {
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
    F64(Vec<f64>),
    I8(Vec<i8>),
    I16(Vec<i16>),
    I32(Vec<i32>),
    I64(Vec<i64>),
    U8(Vec<u8>),
    U16(Vec<u16>),
    U32(Vec<u32>),
    U64(Vec<u64>),
    Bool(Vec<bool>),
    /// Storage types, in ONNX's packing.
    Raw(DType, Vec<u8>),
}

/// A dense row-major tensor on the host.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    shape: Vec<usize>,
    data: Data,
}

/// Why a tensor could not be made or read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TensorError {
    #[error("shape {shape:?} needs {needed} elements of {dtype}, found {found}")]
    Length { shape: Vec<usize>, dtype: DType, needed: u64, found: u64 },
    #[error("shape {shape:?} holds more elements than can be addressed")]
    TooLarge { shape: Vec<usize> },
    #[error("expected {expected}, found {found}")]
    DType { expected: DType, found: DType },
}

macro_rules! for_each_typed {
    ($mac:ident) => {
        $mac! {
            F32 f32, F64 f64, I8 i8, I16 i16, I32 i32, I64 i64, U8 u8, U16 u16, U32 u32, U64 u64
        }
    };
}

/// A Rust type that is the element of one [`DType`].
pub trait Element: Copy + Send + Sync + 'static {
    const DTYPE: DType;
    fn wrap(values: Vec<Self>) -> Data;
    fn slice(data: &Data) -> Option<&[Self]>;
    fn slice_mut(data: &mut Data) -> Option<&mut [Self]>;
}

macro_rules! impl_element {
    ($($variant:ident $ty:ty),*) => {$(
        impl Element for $ty {
            const DTYPE: DType = DType::$variant;
            fn wrap(values: Vec<Self>) -> Data { Data::$variant(values) }
            fn slice(data: &Data) -> Option<&[Self]> {
                if let Data::$variant(v) = data { Some(v) } else { None }
            }
            fn slice_mut(data: &mut Data) -> Option<&mut [Self]> {
                if let Data::$variant(v) = data { Some(v) } else { None }
            }
        }
    )*};
}

for_each_typed!(impl_element);
impl_element!(F16 f16, BF16 bf16, Bool bool);

impl Data {
    /// The element type.
    pub fn dtype(&self) -> DType {
        match self {
            Data::F32(_) => DType::F32,
            Data::F16(_) => DType::F16,
            Data::BF16(_) => DType::BF16,
            Data::F64(_) => DType::F64,
            Data::I8(_) => DType::I8,
            Data::I16(_) => DType::I16,
            Data::I32(_) => DType::I32,
            Data::I64(_) => DType::I64,
            Data::U8(_) => DType::U8,
            Data::U16(_) => DType::U16,
            Data::U32(_) => DType::U32,
            Data::U64(_) => DType::U64,
            Data::Bool(_) => DType::Bool,
            Data::Raw(dtype, _) => *dtype,
        }
    }

    /// Number of stored units: elements, or bytes for storage types.
    fn stored_len(&self) -> usize {
        match self {
            Data::F32(v) => v.len(),
            Data::F16(v) => v.len(),
            Data::BF16(v) => v.len(),
            Data::F64(v) => v.len(),
            Data::I8(v) => v.len(),
            Data::I16(v) => v.len(),
            Data::I32(v) => v.len(),
            Data::I64(v) => v.len(),
            Data::U8(v) => v.len(),
            Data::U16(v) => v.len(),
            Data::U32(v) => v.len(),
            Data::U64(v) => v.len(),
            Data::Bool(v) => v.len(),
            Data::Raw(_, v) => v.len(),
        }
    }

    /// Little-endian bytes, as safetensors, npy and ONNX raw data hold them.
    pub fn to_le_bytes(&self) -> Vec<u8> {
        macro_rules! bytes {
            ($v:expr) => {
                $v.iter().flat_map(|x| x.to_le_bytes()).collect()
            };
        }
        match self {
            Data::F32(v) => bytes!(v),
            Data::F16(v) => bytes!(v),
            Data::BF16(v) => bytes!(v),
            Data::F64(v) => bytes!(v),
            Data::I8(v) => bytes!(v),
            Data::I16(v) => bytes!(v),
            Data::I32(v) => bytes!(v),
            Data::I64(v) => bytes!(v),
            Data::U8(v) => v.clone(),
            Data::U16(v) => bytes!(v),
            Data::U32(v) => bytes!(v),
            Data::U64(v) => bytes!(v),
            Data::Bool(v) => v.iter().map(|&b| u8::from(b)).collect(),
            Data::Raw(_, v) => v.clone(),
        }
    }

    /// The inverse of [`Data::to_le_bytes`]; a trailing partial element is dropped (callers check lengths).
    pub fn from_le_bytes(dtype: DType, bytes: &[u8]) -> Data {
        macro_rules! read {
            ($variant:ident, $ty:ty) => {
                Data::$variant(
                    bytes
                        .chunks_exact(size_of::<$ty>())
                        .map(|c| {
                            let mut raw = [0u8; size_of::<$ty>()];
                            raw.copy_from_slice(c);
                            <$ty>::from_le_bytes(raw)
                        })
                        .collect(),
                )
            };
        }
        match dtype {
            DType::F32 => read!(F32, f32),
            DType::F16 => read!(F16, f16),
            DType::BF16 => read!(BF16, bf16),
            DType::F64 => read!(F64, f64),
            DType::I8 => read!(I8, i8),
            DType::I16 => read!(I16, i16),
            DType::I32 => read!(I32, i32),
            DType::I64 => read!(I64, i64),
            DType::U8 => Data::U8(bytes.to_vec()),
            DType::U16 => read!(U16, u16),
            DType::U32 => read!(U32, u32),
            DType::U64 => read!(U64, u64),
            DType::Bool => Data::Bool(bytes.iter().map(|&b| b != 0).collect()),
            DType::I4
            | DType::U4
            | DType::I2
            | DType::U2
            | DType::F4E2M1
            | DType::F8E4M3FN
            | DType::F8E4M3FNUZ
            | DType::F8E5M2
            | DType::F8E5M2FNUZ
            | DType::F8E8M0 => Data::Raw(dtype, bytes.to_vec()),
        }
    }

    /// All elements zero (`false` for bool). `count` is the number of elements.
    pub fn zeros(dtype: DType, count: usize) -> Data {
        macro_rules! typed {
            ($($variant:ident $ty:ty),*) => {
                match dtype {
                    $(DType::$variant => return Data::$variant(vec![<$ty>::default(); count]),)*
                    DType::F16 => return Data::F16(vec![f16::ZERO; count]),
                    DType::BF16 => return Data::BF16(vec![bf16::ZERO; count]),
                    DType::Bool => return Data::Bool(vec![false; count]),
                    _ => {}
                }
            };
        }
        for_each_typed!(typed);
        Data::Raw(dtype, vec![0; (count * dtype.bits()).div_ceil(8)])
    }
}

/// Product of dimensions, `None` on overflow.
pub fn element_count(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))
}

impl Tensor {
    /// A tensor from its parts.
    ///
    /// # Errors
    /// [`TensorError::Length`] if `data` does not hold exactly the elements `shape` asks for.
    pub fn new(shape: Vec<usize>, data: Data) -> Result<Tensor, TensorError> {
        let Some(count) = element_count(&shape) else { return Err(TensorError::TooLarge { shape }) };
        let dtype = data.dtype();
        let needed = match &data {
            Data::Raw(..) => dtype.byte_len(count as u64).unwrap_or(u64::MAX),
            _ => count as u64,
        };
        let found = data.stored_len() as u64;
        if needed != found {
            return Err(TensorError::Length { shape, dtype, needed, found });
        }
        Ok(Tensor { shape, data })
    }

    /// A tensor from typed values.
    ///
    /// # Errors
    /// As [`Tensor::new`].
    pub fn from_vec<T: Element>(shape: Vec<usize>, values: Vec<T>) -> Result<Tensor, TensorError> {
        Tensor::new(shape, T::wrap(values))
    }

    /// A rank-0 tensor.
    pub fn scalar<T: Element>(value: T) -> Tensor {
        Tensor { shape: vec![], data: T::wrap(vec![value]) }
    }

    /// A tensor from little-endian bytes.
    ///
    /// # Errors
    /// As [`Tensor::new`].
    pub fn from_le_bytes(dtype: DType, shape: Vec<usize>, bytes: &[u8]) -> Result<Tensor, TensorError> {
        let Some(count) = element_count(&shape) else { return Err(TensorError::TooLarge { shape }) };
        let needed = dtype.byte_len(count as u64).unwrap_or(u64::MAX);
        if needed != bytes.len() as u64 {
            return Err(TensorError::Length { shape, dtype, needed, found: bytes.len() as u64 });
        }
        Ok(Tensor { shape, data: Data::from_le_bytes(dtype, bytes) })
    }

    /// All elements zero.
    ///
    /// # Errors
    /// [`TensorError::TooLarge`] if the element count overflows.
    pub fn zeros(dtype: DType, shape: Vec<usize>) -> Result<Tensor, TensorError> {
        let Some(count) = element_count(&shape) else { return Err(TensorError::TooLarge { shape }) };
        Ok(Tensor { shape, data: Data::zeros(dtype, count) })
    }

    pub fn dtype(&self) -> DType {
        self.data.dtype()
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The type, all sizes numbers.
    pub fn ty(&self) -> Type {
        Type::new(self.dtype(), self.shape.iter().map(|&extent| Dim::from(extent)).collect())
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// True if some dimension is zero.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn data(&self) -> &Data {
        &self.data
    }

    pub fn into_data(self) -> Data {
        self.data
    }

    /// The elements, if they are of type `T`.
    ///
    /// # Errors
    /// [`TensorError::DType`] naming both types.
    pub fn as_slice<T: Element>(&self) -> Result<&[T], TensorError> {
        T::slice(&self.data).ok_or(TensorError::DType { expected: T::DTYPE, found: self.dtype() })
    }

    /// As [`Tensor::as_slice`], for writing.
    ///
    /// # Errors
    /// [`TensorError::DType`] naming both types.
    pub fn as_mut_slice<T: Element>(&mut self) -> Result<&mut [T], TensorError> {
        let found = self.dtype();
        T::slice_mut(&mut self.data).ok_or(TensorError::DType { expected: T::DTYPE, found })
    }

    /// The same elements under another shape.
    ///
    /// # Errors
    /// [`TensorError::Length`] if the element counts differ.
    pub fn reshaped(self, shape: Vec<usize>) -> Result<Tensor, TensorError> {
        Tensor::new(shape, self.data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_round_trip_for_every_dtype() {
        for &dtype in DType::ALL {
            let bytes: Vec<u8> = (0..dtype.byte_len(6).unwrap() as usize).map(|i| (i % 2) as u8).collect();
            let tensor = Tensor::from_le_bytes(dtype, vec![2, 3], &bytes).unwrap();
            assert_eq!(tensor.dtype(), dtype);
            assert_eq!(tensor.data().to_le_bytes(), bytes, "{dtype}");
        }
    }

    #[test]
    fn wrong_length_is_refused_with_both_counts() {
        let error = Tensor::from_vec(vec![2, 3], vec![1f32; 5]).unwrap_err();
        assert_eq!(error.to_string(), "shape [2, 3] needs 6 elements of f32, found 5");
    }
}
