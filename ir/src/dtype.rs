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
