//! Literals: every element printed so that it reads back as the same bits.
//!
//! Floats are shortest decimals, NaNs their bits in hexadecimal; storage types are the bytes of their packing.

use super::scan::{Parsed, Scanner};
use crate::dtype::DType;
use crate::tensor::{Data, Tensor};
use half::{bf16, f16};

/// `f32[2] [1.0, -0.5]`.
pub(super) fn print(tensor: &Tensor) -> String {
    fn all<T: Copy>(values: &[T], show: impl Fn(T) -> String) -> String {
        values.iter().map(|&x| show(x)).collect::<Vec<_>>().join(", ")
    }
    macro_rules! floats {
        ($v:expr, $wide:expr) => {
            all($v, |x| if x.is_nan() { format!("{:#x}", x.to_bits()) } else { format!("{:?}", $wide(x)) })
        };
    }
    let elements = match tensor.data() {
        Data::F32(v) => floats!(v, |x: f32| x),
        Data::F64(v) => floats!(v, |x: f64| x),
        Data::F16(v) => floats!(v, f16::to_f32),
        Data::BF16(v) => floats!(v, bf16::to_f32),
        Data::I8(v) => all(v, |x| x.to_string()),
        Data::I16(v) => all(v, |x| x.to_string()),
        Data::I32(v) => all(v, |x| x.to_string()),
        Data::I64(v) => all(v, |x| x.to_string()),
        Data::U8(v) | Data::Raw(_, v) => all(v, |x| x.to_string()),
        Data::U16(v) => all(v, |x| x.to_string()),
        Data::U32(v) => all(v, |x| x.to_string()),
        Data::U64(v) => all(v, |x| x.to_string()),
        Data::Bool(v) => all(v, |x| x.to_string()),
    };
    format!("{}{:?} [{elements}]", tensor.dtype(), tensor.shape())
}

impl Scanner<'_> {
    pub(super) fn literal(&mut self) -> Parsed<Tensor> {
        let start = self.place();
        let dtype = self.dtype()?;
        let shape = self.list("[", "]", Scanner::number::<usize>)?;
        let data = self.elements(dtype)?;
        Tensor::new(shape, data).map_err(|error| self.error_at(start, error.to_string()))
    }

    fn elements(&mut self, dtype: DType) -> Parsed<Data> {
        macro_rules! ints {
            ($variant:ident, $ty:ty) => {
                Data::$variant(self.items(dtype, |text| text.parse::<$ty>().ok())?)
            };
        }
        macro_rules! floats {
            ($variant:ident, $ty:ty, $bits:ty, $narrow:expr) => {
                Data::$variant(self.items(dtype, |text| match text.strip_prefix("0x") {
                    Some(bits) => <$bits>::from_str_radix(bits, 16).ok().map(<$ty>::from_bits),
                    None => text.parse().ok().map($narrow),
                })?)
            };
        }
        Ok(match dtype {
            DType::F32 => floats!(F32, f32, u32, |x: f32| x),
            DType::F64 => floats!(F64, f64, u64, |x: f64| x),
            DType::F16 => floats!(F16, f16, u16, f16::from_f32),
            DType::BF16 => floats!(BF16, bf16, u16, bf16::from_f32),
            DType::I8 => ints!(I8, i8),
            DType::I16 => ints!(I16, i16),
            DType::I32 => ints!(I32, i32),
            DType::I64 => ints!(I64, i64),
            DType::U8 => ints!(U8, u8),
            DType::U16 => ints!(U16, u16),
            DType::U32 => ints!(U32, u32),
            DType::U64 => ints!(U64, u64),
            DType::Bool => ints!(Bool, bool),
            DType::I4
            | DType::U4
            | DType::I2
            | DType::U2
            | DType::F4E2M1
            | DType::F8E4M3FN
            | DType::F8E4M3FNUZ
            | DType::F8E5M2
            | DType::F8E5M2FNUZ
            | DType::F8E8M0 => Data::Raw(dtype, self.items(DType::U8, |text| text.parse().ok())?),
        })
    }

    fn items<T>(&mut self, dtype: DType, parse: impl Fn(&str) -> Option<T>) -> Parsed<Vec<T>> {
        self.list("[", "]", |scanner| {
            let start = scanner.place();
            let text = scanner.numeral();
            parse(text).ok_or_else(|| scanner.error_at(start, format!("expected an element of type {dtype}")))
        })
    }
}
