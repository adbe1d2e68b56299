//! Tensors to arrays and back: the value of every element type, the narrow floats and packed integers included.
//!
//! A narrow float is described by its field widths and its special values; encoding rounds to nearest, ties to even, and
//! saturates as ONNX `Cast` does by default.

use super::real::Num;
use super::{Array, OpError};
use crate::dtype::{DType, DTypeClass};
use crate::tensor::{Data, Element, Tensor};
use half::{bf16, f16};

/// Where a narrow float keeps NaN and infinity.
#[derive(Clone, Copy, PartialEq)]
enum Specials {
    /// As IEEE: the top exponent.
    Ieee,
    /// NaN is all ones, there is no infinity.
    AllOnesNan,
    /// NaN is the negative zero, there is no infinity.
    NegativeZeroNan,
    /// Neither.
    None,
}

#[derive(Clone, Copy)]
struct Narrow {
    exponent: u32,
    mantissa: u32,
    bias: i32,
    specials: Specials,
}

fn narrow(dtype: DType) -> Option<Narrow> {
    let (exponent, mantissa, bias, specials) = match dtype {
        DType::F4E2M1 => (2, 1, 1, Specials::None),
        DType::F8E4M3FN => (4, 3, 7, Specials::AllOnesNan),
        DType::F8E4M3FNUZ => (4, 3, 8, Specials::NegativeZeroNan),
        DType::F8E5M2 => (5, 2, 15, Specials::Ieee),
        DType::F8E5M2FNUZ => (5, 2, 16, Specials::NegativeZeroNan),
        _ => return None,
    };
    Some(Narrow { exponent, mantissa, bias, specials })
}

impl Narrow {
    fn decode(self, bits: u8) -> f64 {
        let magnitude = bits & self.magnitude_mask();
        let sign = if bits != magnitude { -1.0 } else { 1.0 };
        let mantissa = f64::from(magnitude & ((1 << self.mantissa) - 1));
        let exponent = i32::from(magnitude >> self.mantissa);
        let scale = f64::from(1u32 << self.mantissa);
        match self.specials {
            Specials::AllOnesNan if magnitude == self.magnitude_mask() => return f64::NAN,
            Specials::NegativeZeroNan if magnitude == 0 && sign < 0.0 => return f64::NAN,
            Specials::Ieee if exponent == (1 << self.exponent) - 1 => {
                return if mantissa == 0.0 { sign * f64::INFINITY } else { f64::NAN };
            }
            _ => {}
        }
        let fraction = if exponent == 0 { mantissa / scale } else { 1.0 + mantissa / scale };
        sign * fraction * 2f64.powi(exponent.max(1) - self.bias)
    }

    fn magnitude_mask(self) -> u8 {
        ((1u32 << (self.exponent + self.mantissa)) - 1) as u8
    }

    /// The largest finite magnitude; all smaller ones are finite too.
    fn largest(self) -> u8 {
        let mask = self.magnitude_mask();
        match self.specials {
            Specials::Ieee => mask - (1 << self.mantissa),
            Specials::AllOnesNan => mask - 1,
            Specials::NegativeZeroNan | Specials::None => mask,
        }
    }

    fn encode(self, value: f64) -> u8 {
        let sign_bit = self.magnitude_mask() + 1;
        if value.is_nan() {
            return match self.specials {
                Specials::NegativeZeroNan => sign_bit,
                Specials::AllOnesNan => self.magnitude_mask(),
                // Quiet: the highest bit of the mantissa.
                Specials::Ieee => self.largest() + 1 + (1 << (self.mantissa - 1)),
                // There is none; NumPy's types write the negative zero.
                Specials::None => sign_bit,
            };
        }
        let infinite = self.specials == Specials::Ieee && value.is_infinite();
        let magnitude = if infinite { self.largest() + 1 } else { self.nearest(value.abs()) };
        let negative =
            value.is_sign_negative() && (magnitude != 0 || self.specials != Specials::NegativeZeroNan);
        if negative { magnitude | sign_bit } else { magnitude }
    }

    /// The code of the nearest finite magnitude: codes are in the order of their values.
    fn nearest(self, value: f64) -> u8 {
        let (mut low, mut high) = (0, self.largest());
        if value >= self.decode(high) {
            return high;
        }
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if self.decode(middle) <= value { low = middle } else { high = middle }
        }
        let (below, above) = (value - self.decode(low), self.decode(high) - value);
        if below < above || (below == above && low % 2 == 0) { low } else { high }
    }
}

/// `value` rounded to the float type `dtype`.
pub(crate) fn round_float(value: f64, dtype: DType) -> f64 {
    match dtype {
        // One NaN: its bits differ between machines.
        _ if value.is_nan() => f64::NAN,
        DType::F64 => value,
        DType::F16 => f16::from_f64(value).to_f64(),
        DType::BF16 => bf16::from_f64(value).to_f64(),
        DType::F8E8M0 => decode_e8m0(encode_e8m0(value)),
        _ => match narrow(dtype) {
            Some(format) => {
                // Casts saturate, infinities too.
                let largest = format.decode(format.largest());
                format.decode(format.encode(value.clamp(-largest, largest)))
            }
            None => f64::from(value as f32),
        },
    }
}

/// `value` wrapped to the integer type `dtype`, `bool` to 0 or 1.
pub(crate) fn wrap_integer(value: i128, dtype: DType) -> i128 {
    let bits = dtype.bits() as u32;
    match dtype.class() {
        DTypeClass::Bool => i128::from(value != 0),
        DTypeClass::Uint => value & ((1 << bits) - 1),
        DTypeClass::Int | DTypeClass::Float => (value << (128 - bits)) >> (128 - bits),
    }
}

fn decode_e8m0(bits: u8) -> f64 {
    if bits == 255 { f64::NAN } else { 2f64.powi(i32::from(bits) - 127) }
}

/// Powers of two, rounded up and saturating, as ONNX casts do by default.
fn encode_e8m0(value: f64) -> u8 {
    if value.is_nan() {
        return 255;
    }
    (0..255).find(|&bits| decode_e8m0(bits) >= value.abs()).unwrap_or(254)
}

/// The code of element `i` of packed or single bytes.
fn raw_code(dtype: DType, bytes: &[u8], i: usize) -> u8 {
    let bits = dtype.bits();
    let per_byte = 8 / bits;
    let byte = bytes.get(i / per_byte).copied().unwrap_or(0);
    (byte >> ((i % per_byte) * bits)) & (u8::MAX >> (8 - bits))
}

fn decode_raw(dtype: DType, code: u8) -> Num {
    match dtype {
        DType::F8E8M0 => Num::Float(decode_e8m0(code)),
        _ => match narrow(dtype) {
            Some(format) => Num::Float(format.decode(code)),
            None => Num::Int(wrap_integer(i128::from(code), dtype)),
        },
    }
}

fn encode_raw(dtype: DType, value: Num) -> u8 {
    match dtype {
        DType::F8E8M0 => encode_e8m0(value.float()),
        _ => match narrow(dtype) {
            Some(format) => format.encode(value.float()),
            None => (value.int() & ((1 << dtype.bits()) - 1)) as u8,
        },
    }
}

fn pack(dtype: DType, codes: impl Iterator<Item = u8>, count: usize) -> Vec<u8> {
    let per_byte = 8 / dtype.bits();
    let mut bytes = vec![0u8; count.div_ceil(per_byte)];
    for (i, code) in codes.enumerate() {
        bytes[i / per_byte] |= code << ((i % per_byte) * dtype.bits());
    }
    bytes
}

/// The values of a tensor's elements.
pub(crate) fn numbers(tensor: &Tensor) -> Vec<Num> {
    macro_rules! ints {
        ($v:expr) => {
            $v.iter().map(|&x| Num::Int(i128::from(x))).collect()
        };
    }
    match tensor.data() {
        Data::F32(v) => v.iter().map(|&x| Num::Float(f64::from(x))).collect(),
        Data::F16(v) => v.iter().map(|&x| Num::Float(x.to_f64())).collect(),
        Data::BF16(v) => v.iter().map(|&x| Num::Float(x.to_f64())).collect(),
        Data::F64(v) => v.iter().map(|&x| Num::Float(x)).collect(),
        Data::I8(v) => ints!(v),
        Data::I16(v) => ints!(v),
        Data::I32(v) => ints!(v),
        Data::I64(v) => ints!(v),
        Data::U8(v) => ints!(v),
        Data::U16(v) => ints!(v),
        Data::U32(v) => ints!(v),
        Data::U64(v) => ints!(v),
        Data::Bool(v) => ints!(v),
        Data::Raw(dtype, bytes) => {
            (0..tensor.len()).map(|i| decode_raw(*dtype, raw_code(*dtype, bytes, i))).collect()
        }
    }
}

/// The tensor that holds an array's values, rounded or wrapped to its element type.
pub(crate) fn tensor(array: &Array<Num>) -> Result<Tensor, OpError> {
    fn typed<T: Element>(array: &Array<Num>, convert: impl Fn(Num) -> T) -> Data {
        T::wrap(array.elements().iter().map(|&x| convert(x)).collect())
    }
    let dtype = array.dtype;
    let data = match dtype {
        DType::F32 => typed(array, |x| x.float() as f32),
        DType::F16 => typed(array, |x| f16::from_f64(x.float())),
        DType::BF16 => typed(array, |x| bf16::from_f64(x.float())),
        DType::F64 => typed(array, Num::float),
        DType::I8 => typed(array, |x| x.int() as i8),
        DType::I16 => typed(array, |x| x.int() as i16),
        DType::I32 => typed(array, |x| x.int() as i32),
        DType::I64 => typed(array, |x| x.int() as i64),
        DType::U8 => typed(array, |x| x.int() as u8),
        DType::U16 => typed(array, |x| x.int() as u16),
        DType::U32 => typed(array, |x| x.int() as u32),
        DType::U64 => typed(array, |x| x.int() as u64),
        DType::Bool => typed(array, |x| x.int() != 0),
        DType::I4
        | DType::U4
        | DType::I2
        | DType::U2
        | DType::F4E2M1
        | DType::F8E4M3FN
        | DType::F8E4M3FNUZ
        | DType::F8E5M2
        | DType::F8E5M2FNUZ
        | DType::F8E8M0 => {
            let codes = array.elements().iter().map(|&x| encode_raw(dtype, x));
            Data::Raw(dtype, pack(dtype, codes, array.elements().len()))
        }
    };
    Tensor::new(array.shape().to_vec(), data).map_err(OpError::other)
}

/// The element of type `to` that has the bits of `value`, an element of type `from`.
pub(crate) fn reinterpret(value: Num, from: DType, to: DType) -> Result<Num, OpError> {
    let one = |dtype, element: Num| {
        Array::new(dtype, vec![], vec![element]).ok_or_else(|| OpError::other("an element of no array"))
    };
    let tensor_of = tensor(&one(from, value)?)?;
    let bytes = tensor_of.data().to_le_bytes();
    let read = Tensor::from_le_bytes(to, vec![], &bytes).map_err(OpError::other)?;
    numbers(&read).first().copied().ok_or_else(|| OpError::other("no element"))
}

/// The bit pattern of every element, so that moving elements cannot change them.
pub(crate) fn codes(tensor: &Tensor) -> Array<u64> {
    let dtype = tensor.dtype();
    let data: Vec<u64> = if let Data::Raw(_, bytes) = tensor.data() {
        (0..tensor.len()).map(|i| u64::from(raw_code(dtype, bytes, i))).collect()
    } else {
        let little_endian = |c: &[u8]| c.iter().rev().fold(0u64, |code, &byte| code << 8 | u64::from(byte));
        tensor.data().to_le_bytes().chunks_exact(dtype.bits() / 8).map(little_endian).collect()
    };
    let count = data.len();
    Array::new(dtype, tensor.shape().to_vec(), data)
        .unwrap_or_else(|| unreachable!("{count} codes of a tensor of that many elements"))
}

/// The inverse of [`codes`].
pub(crate) fn from_codes(array: &Array<u64>) -> Result<Tensor, OpError> {
    let dtype = array.dtype;
    let bytes: Vec<u8> = if dtype.is_packed() {
        pack(dtype, array.elements().iter().map(|&code| code as u8), array.elements().len())
    } else {
        let width = dtype.bits() / 8;
        array.elements().iter().flat_map(|code| code.to_le_bytes().into_iter().take(width)).collect()
    };
    Tensor::from_le_bytes(dtype, array.shape().to_vec(), &bytes).map_err(OpError::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_of_the_narrow_types_survives() {
        for &dtype in DType::ALL.iter().filter(|d| d.bits() <= 8 && **d != DType::Bool) {
            let count = 1usize << dtype.bits();
            let bytes = pack(dtype, (0..count).map(|c| c as u8), count);
            let tensor_in = Tensor::from_le_bytes(dtype, vec![count], &bytes).unwrap();
            let array = Array::new(dtype, vec![count], numbers(&tensor_in)).unwrap();
            let out = tensor(&array).unwrap();
            let (before, after) = (numbers(&tensor_in), numbers(&out));
            for (code, (a, b)) in before.iter().zip(&after).enumerate() {
                let same = a == b || (a.float().is_nan() && b.float().is_nan());
                assert!(same, "{dtype} code {code}: {a:?} {b:?}");
            }
            assert_eq!(from_codes(&codes(&tensor_in)).unwrap(), tensor_in);
        }
    }

    #[test]
    fn known_values_of_narrow_floats() {
        let value = |dtype, code| decode_raw(dtype, code).float();
        assert_eq!(value(DType::F8E4M3FN, 0x7e), 448.0);
        assert_eq!(value(DType::F8E4M3FN, 0x01), 2f64.powi(-9));
        assert!(value(DType::F8E4M3FN, 0xff).is_nan());
        assert_eq!(value(DType::F8E4M3FNUZ, 0x7f), 240.0);
        assert!(value(DType::F8E4M3FNUZ, 0x80).is_nan());
        assert_eq!(value(DType::F8E5M2, 0x7b), 57344.0);
        assert_eq!(value(DType::F8E5M2, 0xfc), f64::NEG_INFINITY);
        assert_eq!(value(DType::F8E5M2FNUZ, 0x7f), 57344.0);
        assert_eq!(value(DType::F4E2M1, 0x7), 6.0);
        assert_eq!(value(DType::F4E2M1, 0x9), -0.5);
        assert_eq!(value(DType::F8E8M0, 127), 1.0);
        assert_eq!(decode_raw(DType::I4, 0xf), Num::Int(-1));
        assert_eq!(round_float(1e9, DType::F8E4M3FN), 448.0);
        assert_eq!(round_float(1.0625, DType::F8E4M3FN), 1.0);
        assert_eq!(round_float(1.1875, DType::F8E4M3FN), 1.25);
        assert_eq!(round_float(3.0, DType::F8E8M0), 4.0);
    }

    #[test]
    fn nan_payloads_survive_moves() {
        let tensor = Tensor::from_vec(vec![1], vec![f32::from_bits(0x7fc0_1234)]).unwrap();
        let back = from_codes(&codes(&tensor)).unwrap();
        assert_eq!(back.as_slice::<f32>().unwrap()[0].to_bits(), 0x7fc0_1234);
    }
}
