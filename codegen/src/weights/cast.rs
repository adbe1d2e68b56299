//! Elementwise conversion of little-endian bytes, as ONNX `Cast` does it.
//!
//! Floats become integers by cutting off the fraction, with ONNX Runtime's results where ONNX leaves them open; integers
//! become narrower integers by dropping high bits; anything but zero is true. Each conversion rounds once.

use half::{bf16, f16};
use tpshard_ir::{DType, float_to_integer};

/// A value on its way between two types; both ways hold every value of the types that use them exactly.
#[derive(Clone, Copy)]
enum Number {
    Float(f64),
    Integer(i128),
}

/// One element type: how it is read, written, and converted.
trait Lane: Sized {
    const BYTES: usize;
    fn read(bytes: &[u8]) -> Number;
    fn write(number: Number, bytes: &mut [u8]);
}

macro_rules! lanes {
    ($($ty:ty, $number:ident as $wide:ty, $float:expr;)*) => {$(
        impl Lane for $ty {
            const BYTES: usize = size_of::<$ty>();

            fn read(bytes: &[u8]) -> Number {
                let mut raw = [0; size_of::<$ty>()];
                raw.copy_from_slice(bytes);
                Number::$number(<$ty>::from_le_bytes(raw) as $wide)
            }

            fn write(number: Number, bytes: &mut [u8]) {
                let float: fn(f64) -> $ty = $float;
                let value = match number {
                    Number::Float(x) => float(x),
                    Number::Integer(x) => x as $ty,
                };
                bytes.copy_from_slice(&value.to_le_bytes());
            }
        }
    )*};
}

lanes! {
    f32, Float as f64, |x| x as f32;
    f64, Float as f64, |x| x;
    i8, Integer as i128, |x| float_to_integer(x, DType::I8) as i8;
    i16, Integer as i128, |x| float_to_integer(x, DType::I16) as i16;
    i32, Integer as i128, |x| float_to_integer(x, DType::I32) as i32;
    i64, Integer as i128, |x| float_to_integer(x, DType::I64) as i64;
    u8, Integer as i128, |x| float_to_integer(x, DType::U8) as u8;
    u16, Integer as i128, |x| float_to_integer(x, DType::U16) as u16;
    u32, Integer as i128, |x| float_to_integer(x, DType::U32) as u32;
    u64, Integer as i128, |x| float_to_integer(x, DType::U64) as u64;
}

macro_rules! half_lanes {
    ($($ty:ty)*) => {$(
        impl Lane for $ty {
            const BYTES: usize = 2;

            fn read(bytes: &[u8]) -> Number {
                let mut raw = [0; 2];
                raw.copy_from_slice(bytes);
                Number::Float(<$ty>::from_le_bytes(raw).to_f64())
            }

            fn write(number: Number, bytes: &mut [u8]) {
                let value = match number {
                    Number::Float(x) => x,
                    // Not every integer fits a double; a plain conversion would round twice.
                    Number::Integer(x) => to_odd(x),
                };
                bytes.copy_from_slice(&<$ty>::from_f32(narrow_to_odd(value)).to_le_bytes());
            }
        }
    )*};
}

half_lanes!(f16 bf16);

/// `x` as a double, cut towards zero with the last bit set if anything was cut off: rounding that once more to a
/// narrower type gives what rounding `x` itself would.
fn to_odd(x: i128) -> f64 {
    let magnitude = x.unsigned_abs();
    let excess = (128 - magnitude.leading_zeros()).saturating_sub(53);
    let cut = magnitude >> excess;
    let odd = cut | u128::from(cut << excess != magnitude);
    let value = (odd << excess) as f64;
    if x < 0 { -value } else { value }
}

/// As [`to_odd`], from double to single. The conversions of `half` from doubles round twice on some processors.
fn narrow_to_odd(x: f64) -> f32 {
    let near = x as f32;
    if f64::from(near) == x || x.is_nan() {
        return near;
    }
    let cut = if f64::from(near).abs() > x.abs() { near.to_bits() - 1 } else { near.to_bits() };
    f32::from_bits(cut | 1)
}

struct Bool;

impl Lane for Bool {
    const BYTES: usize = 1;

    fn read(bytes: &[u8]) -> Number {
        Number::Integer(i128::from(bytes.iter().any(|&byte| byte != 0)))
    }

    fn write(number: Number, bytes: &mut [u8]) {
        let value = match number {
            Number::Float(x) => x != 0.0,
            Number::Integer(x) => x != 0,
        };
        bytes.fill(u8::from(value));
    }
}

fn convert_all<F: Lane, T: Lane>(from: &[u8], to: &mut [u8]) -> bool {
    for (from, to) in from.chunks_exact(F::BYTES).zip(to.chunks_exact_mut(T::BYTES)) {
        T::write(F::read(from), to);
    }
    true
}

/// Runs `$body` with `$lane` standing for the lane type of `$dtype`; storage types give false.
macro_rules! with_lane {
    ($dtype:expr, |$lane:ident| $body:expr) => {
        with_lane!(@ $dtype, $lane, $body,
            F32 f32, F16 f16, BF16 bf16, F64 f64, I8 i8, I16 i16, I32 i32, I64 i64,
            U8 u8, U16 u16, U32 u32, U64 u64, Bool Bool)
    };
    (@ $dtype:expr, $lane:ident, $body:expr, $($variant:ident $ty:ty),*) => {
        match $dtype {
            $(DType::$variant => { type $lane = $ty; $body })*
            DType::I4 | DType::U4 | DType::I2 | DType::U2 | DType::F4E2M1 | DType::F8E4M3FN
            | DType::F8E4M3FNUZ | DType::F8E5M2 | DType::F8E5M2FNUZ | DType::F8E8M0 => false,
        }
    };
}

/// Converts all elements of `from` into `to`, which holds as many. False, and nothing written, for types that only
/// store values: weight expressions refuse to cast those.
pub(crate) fn convert(from_dtype: DType, from: &[u8], to_dtype: DType, to: &mut [u8]) -> bool {
    // What whole models are narrowed by, without the way over wider numbers.
    match (from_dtype, to_dtype) {
        (DType::F32, DType::BF16) => return halve(from, to, |x| bf16::from_f32(x).to_le_bytes()),
        (DType::F32, DType::F16) => return halve(from, to, |x| f16::from_f32(x).to_le_bytes()),
        _ => {}
    }
    with_lane!(from_dtype, |From| convert_from::<From>(from, to_dtype, to))
}

#[inline(always)]
fn halve(from: &[u8], to: &mut [u8], narrow: impl Fn(f32) -> [u8; 2]) -> bool {
    let (singles, _) = from.as_chunks::<4>();
    let (halves, _) = to.as_chunks_mut::<2>();
    for (half, &single) in halves.iter_mut().zip(singles) {
        *half = narrow(f32::from_le_bytes(single));
    }
    true
}

fn convert_from<F: Lane>(from: &[u8], to_dtype: DType, to: &mut [u8]) -> bool {
    with_lane!(to_dtype, |To| convert_all::<F, To>(from, to))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tpshard_ir::tensor::Data;

    fn cast(values: Data, to: DType) -> Data {
        let count = values.to_le_bytes().len() * 8 / values.dtype().bits();
        let mut out = vec![0xaa; count * to.bits() / 8];
        assert!(convert(values.dtype(), &values.to_le_bytes(), to, &mut out));
        Data::from_le_bytes(to, &out)
    }

    #[test]
    fn floats_round_once_to_nearest_even() {
        let values = vec![1.0f32, 1.0 + 2f32.powi(-11), 1.0 + 3.0 * 2f32.powi(-11), 65520.0, -0.0, f32::NAN];
        let Data::F16(halves) = cast(Data::F32(values.clone()), DType::F16) else { panic!() };
        assert_eq!(halves[..5], values.iter().map(|&x| f16::from_f32(x)).collect::<Vec<_>>()[..5]);
        assert_eq!(halves[3], f16::INFINITY);
        assert!(halves[4].is_sign_negative() && halves[5].is_nan());
        // Rounding to f32 first would give a tie and then 1.
        let double = 1.0 + 2f64.powi(-11) + 2f64.powi(-40);
        assert_eq!(cast(Data::F64(vec![double]), DType::F16), Data::F16(vec![f16::from_bits(0x3c01)]));
        let (large, tiny) = (Data::F64(vec![1e300, -1e300]), Data::F64(vec![1e-300, -1e-300]));
        assert_eq!(cast(large, DType::BF16), Data::BF16(vec![bf16::INFINITY, bf16::NEG_INFINITY]));
        assert_eq!(cast(tiny, DType::F16), Data::F16(vec![f16::ZERO, f16::NEG_ZERO]));
    }

    #[test]
    fn halves_of_singles_are_what_every_conversion_makes_of_them() {
        let singles: Vec<f32> =
            (0..1 << 16).map(|i: u32| f32::from_bits(i.wrapping_mul(0x9e37_79b9))).collect();
        let bytes = Data::F32(singles.clone()).to_le_bytes();
        for to in [DType::F16, DType::BF16] {
            let (mut fast, mut plain) = (vec![0; 2 << 16], vec![0; 2 << 16]);
            assert!(convert(DType::F32, &bytes, to, &mut fast));
            assert!(convert_from::<f32>(&bytes, to, &mut plain));
            let numbers = fast.chunks(2).zip(plain.chunks(2)).zip(&singles).filter(|(_, x)| !x.is_nan());
            for ((fast, plain), x) in numbers {
                assert_eq!(fast, plain, "{x:e} as {to}");
            }
        }
    }

    #[test]
    fn integers_wrap_and_floats_too() {
        assert_eq!(cast(Data::I32(vec![300, -1]), DType::U8), Data::U8(vec![44, 255]));
        assert_eq!(cast(Data::F32(vec![-1.9, 300.0, f32::NAN]), DType::I8), Data::I8(vec![-1, 44, 0]));
        assert_eq!(cast(Data::F32(vec![-2.4, 1e30]), DType::U8), Data::U8(vec![254, 0]));
        assert_eq!(cast(Data::U64(vec![u64::MAX]), DType::F64), Data::F64(vec![2f64.powi(64)]));
        assert_eq!(cast(Data::I64(vec![i64::MIN, 5]), DType::I32), Data::I32(vec![0, 5]));
        assert_eq!(
            cast(Data::F32(vec![0.0, -0.5, f32::NAN]), DType::Bool),
            Data::Bool(vec![false, true, true])
        );
        assert_eq!(cast(Data::Bool(vec![true, false]), DType::BF16), Data::BF16(vec![bf16::ONE, bf16::ZERO]));
    }

    #[test]
    fn large_integers_round_once_to_bf16() {
        // Just above the tie between 2^62 and the next bf16; as a double it would be the tie itself.
        let x = (1i64 << 62) + (1 << 54) + 1;
        let expected = bf16::from_f32(2f32.powi(62) + 2f32.powi(55));
        assert_eq!(cast(Data::I64(vec![x, -x]), DType::BF16), Data::BF16(vec![expected, -expected]));
    }

    #[test]
    fn storage_types_are_refused() {
        assert!(!convert(DType::U4, &[0], DType::F32, &mut [0; 8]));
        assert!(!convert(DType::F32, &[0; 4], DType::F8E4M3FN, &mut [0]));
    }
}
