//! Element types.
//!
//! Arithmetic types are computed with directly; storage types (4-bit and 8-bit floats, 2- and 4-bit integers) only
//! live in weights and are widened by `Dequant` or `Cast` before anything is computed with them.

use std::fmt;
use std::str::FromStr;

macro_rules! dtypes {
    ($($(#[$doc:meta])* $variant:ident $name:literal $bits:literal $class:ident;)*) => {
        /// The element type of a tensor. The text name is the one `.tir` and error messages use.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum DType { $($(#[$doc])* $variant,)* }

        impl DType {
            /// Every element type, in declaration order.
            pub const ALL: &'static [DType] = &[$(DType::$variant,)*];

            /// The text name, e.g. `f32`.
            pub fn name(self) -> &'static str {
                match self { $(DType::$variant => $name,)* }
            }

            /// Width of one element in bits.
            pub fn bits(self) -> usize {
                match self { $(DType::$variant => $bits,)* }
            }

            /// What kind of number this is.
            pub fn class(self) -> DTypeClass {
                match self { $(DType::$variant => DTypeClass::$class,)* }
            }
        }
    };
}

/// What kind of number an element type holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DTypeClass {
    Float,
    Int,
    Uint,
    Bool,
}

dtypes! {
    F32 "f32" 32 Float;
    F16 "f16" 16 Float;
    BF16 "bf16" 16 Float;
    F64 "f64" 64 Float;
    I8 "i8" 8 Int;
    I16 "i16" 16 Int;
    I32 "i32" 32 Int;
    I64 "i64" 64 Int;
    U8 "u8" 8 Uint;
    U16 "u16" 16 Uint;
    U32 "u32" 32 Uint;
    U64 "u64" 64 Uint;
    Bool "bool" 8 Bool;
    /// Two values per byte, the first in the low nibble.
    I4 "i4" 4 Int;
    /// Two values per byte, the first in the low nibble.
    U4 "u4" 4 Uint;
    /// Four values per byte, the first in the lowest bits.
    I2 "i2" 2 Int;
    /// Four values per byte, the first in the lowest bits.
    U2 "u2" 2 Uint;
    F4E2M1 "f4e2m1" 4 Float;
    F8E4M3FN "f8e4m3fn" 8 Float;
    F8E4M3FNUZ "f8e4m3fnuz" 8 Float;
    F8E5M2 "f8e5m2" 8 Float;
    F8E5M2FNUZ "f8e5m2fnuz" 8 Float;
    F8E8M0 "f8e8m0" 8 Float;
}

impl DType {
    /// Bytes taken by `count` densely packed elements; sub-byte types round up to a whole byte.
    /// `None` if the size does not fit in `u64`.
    pub fn byte_len(self, count: u64) -> Option<u64> {
        count.checked_mul(self.bits() as u64).map(|bits| bits.div_ceil(8))
    }

    /// True for types whose elements are smaller than a byte.
    pub fn is_packed(self) -> bool {
        self.bits() < 8
    }

    /// True for floating-point types.
    pub fn is_float(self) -> bool {
        self.class() == DTypeClass::Float
    }

    /// True for signed and unsigned integers, not for `bool`.
    pub fn is_integer(self) -> bool {
        matches!(self.class(), DTypeClass::Int | DTypeClass::Uint)
    }
}

/// `x` without its fraction as an element of the integer type `to`. Where the value does not fit, ONNX leaves the result
/// open, and this is what ONNX Runtime makes of it on x86-64: the 32 bits (64 for `i64` and the unsigned types from 32
/// bits on) that the processor converts to, cut to the type. Values beyond those, infinities and NaN convert to the least
/// integer, which is 0 in narrower types. Packed types saturate.
pub fn float_to_integer(x: f64, to: DType) -> i128 {
    let bits = to.bits() as u32;
    let unsigned = to.class() == DTypeClass::Uint;
    let fits = |power: i32| x >= -(2f64.powi(power)) && x < 2f64.powi(power);
    match bits {
        ..8 if unsigned => (x as i128).clamp(0, (1 << bits) - 1),
        ..8 => (x as i128).clamp(-(1 << (bits - 1)), (1 << (bits - 1)) - 1),
        // Half of the range is taken away first; what is still too large comes out as 0.
        64 if unsigned && x >= 2f64.powi(63) => {
            if x < 2f64.powi(64) {
                x as i128
            } else {
                0
            }
        }
        64 => cut(if fits(63) { x as i128 } else { i128::from(i64::MIN) }, to),
        32 if unsigned => cut(if fits(63) { x as i128 } else { i128::from(i64::MIN) }, to),
        _ => {
            cut(if fits(31) || x.trunc() == -(2f64.powi(31)) { x as i128 } else { i128::from(i32::MIN) }, to)
        }
    }
}

/// The low bits of `value`, as an element of the integer type `to`.
fn cut(value: i128, to: DType) -> i128 {
    let bits = to.bits() as u32;
    match to.class() {
        DTypeClass::Uint => value & ((1 << bits) - 1),
        _ => (value << (128 - bits)) >> (128 - bits),
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The text is not the name of an element type.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{0}` is not an element type")]
pub struct UnknownDType(pub String);

impl FromStr for DType {
    type Err = UnknownDType;

    fn from_str(text: &str) -> Result<Self, UnknownDType> {
        DType::ALL.iter().copied().find(|d| d.name() == text).ok_or_else(|| UnknownDType(text.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What ONNX Runtime 1.31 gives on x86-64.
    #[test]
    fn floats_out_of_range_become_what_the_processor_makes_of_them() {
        let rows: [(f64, [i128; 8]); 10] = [
            (-2.9, [254, -2, 65534, -2, 4294967294, -2, 18446744073709551614, -2]),
            (300.7, [44, 44, 300, 300, 300, 300, 300, 300]),
            (70000.0, [112, 112, 4464, 4464, 70000, 70000, 70000, 70000]),
            (-32769.0, [255, -1, 32767, 32767, 4294934527, -32769, 18446744073709518847, -32769]),
            (3e9, [0, 0, 0, 0, 3000000000, -2147483648, 3000000000, 3000000000]),
            (-3e9, [0, 0, 0, 0, 1294967296, -2147483648, 18446744070709551616, -3000000000]),
            (9.3e18, [0, 0, 0, 0, 0, -2147483648, 9300000000000000000, i128::from(i64::MIN)]),
            (1e30, [0, 0, 0, 0, 0, -2147483648, 0, i128::from(i64::MIN)]),
            (f64::NEG_INFINITY, [0, 0, 0, 0, 0, -2147483648, 1 << 63, i128::from(i64::MIN)]),
            (f64::NAN, [0, 0, 0, 0, 0, -2147483648, 1 << 63, i128::from(i64::MIN)]),
        ];
        let types =
            [DType::U8, DType::I8, DType::U16, DType::I16, DType::U32, DType::I32, DType::U64, DType::I64];
        for (x, wanted) in rows {
            assert_eq!(types.map(|to| float_to_integer(x, to)), wanted, "{x}");
        }
        assert_eq!(float_to_integer(-2147483648.9, DType::I32), -2147483648);
        assert_eq!([DType::I4, DType::U4].map(|to| float_to_integer(-9.0, to)), [-8, 0]);
    }
}
