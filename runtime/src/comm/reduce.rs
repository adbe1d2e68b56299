//! Combining the ranks' values: `out[i] = x0[i] ∘ x1[i] ∘ … ∘ xN-1[i]`, from left to right, for every element.
//!
//! The order depends on nothing but the group, so that chunking and algorithm never change a bit of the result.

use super::Monoid;
use half::{bf16, f16};
use tpshard_ir::DType;

/// True if values of this type can be combined.
pub(super) fn reducible(dtype: DType) -> bool {
    kernel(dtype).is_some()
}

type Kernel = fn(Monoid, &[&[u8]], &mut [u8]);

fn kernel(dtype: DType) -> Option<Kernel> {
    Some(match dtype {
        DType::F32 => typed::<f32, 4>,
        DType::F64 => typed::<f64, 8>,
        DType::F16 => widened::<f16>,
        DType::BF16 => widened::<bf16>,
        DType::I8 => typed::<i8, 1>,
        DType::I16 => typed::<i16, 2>,
        DType::I32 => typed::<i32, 4>,
        DType::I64 => typed::<i64, 8>,
        DType::U8 => typed::<u8, 1>,
        DType::U16 => typed::<u16, 2>,
        DType::U32 => typed::<u32, 4>,
        DType::U64 => typed::<u64, 8>,
        DType::Bool => bools,
        DType::I4
        | DType::U4
        | DType::I2
        | DType::U2
        | DType::F4E2M1
        | DType::F8E4M3FN
        | DType::F8E4M3FNUZ
        | DType::F8E5M2
        | DType::F8E5M2FNUZ
        | DType::F8E8M0 => return None,
    })
}

/// Combines equally long `sources` into `out`. Callers have checked [`reducible`].
pub(super) fn reduce(dtype: DType, monoid: Monoid, sources: &[&[u8]], out: &mut [u8]) {
    if let Some(kernel) = kernel(dtype) {
        kernel(monoid, sources, out);
    }
}

trait Number<const N: usize>: Copy {
    fn read(bytes: [u8; N]) -> Self;
    fn write(self) -> [u8; N];
    fn sum(self, other: Self) -> Self;
    fn prod(self, other: Self) -> Self;
    fn max(self, other: Self) -> Self;
    fn min(self, other: Self) -> Self;
}

macro_rules! integer {
    ($($ty:ident $size:literal)*) => {$(
        impl Number<$size> for $ty {
            fn read(bytes: [u8; $size]) -> Self { $ty::from_le_bytes(bytes) }
            fn write(self) -> [u8; $size] { self.to_le_bytes() }
            fn sum(self, other: Self) -> Self { self.wrapping_add(other) }
            fn prod(self, other: Self) -> Self { self.wrapping_mul(other) }
            fn max(self, other: Self) -> Self { Ord::max(self, other) }
            fn min(self, other: Self) -> Self { Ord::min(self, other) }
        }
    )*};
}
macro_rules! float {
    ($($ty:ident $size:literal)*) => {$(
        impl Number<$size> for $ty {
            fn read(bytes: [u8; $size]) -> Self { $ty::from_le_bytes(bytes) }
            fn write(self) -> [u8; $size] { self.to_le_bytes() }
            fn sum(self, other: Self) -> Self { self + other }
            fn prod(self, other: Self) -> Self { self * other }
            // `f32::max` drops NaN; a NaN on one rank must be seen on all.
            fn max(self, other: Self) -> Self { if other > self || other.is_nan() { other } else { self } }
            fn min(self, other: Self) -> Self { if other < self || other.is_nan() { other } else { self } }
        }
    )*};
}
integer!(i8 1 i16 2 i32 4 i64 8 u8 1 u16 2 u32 4 u64 8);
float!(f32 4 f64 8);

/// Elements combined at a time, so that the accumulator stays in the first-level cache.
const BLOCK: usize = 1024;

fn typed<T: Number<N>, const N: usize>(monoid: Monoid, sources: &[&[u8]], out: &mut [u8]) {
    match monoid {
        Monoid::Sum => fold(T::sum, sources, out),
        Monoid::Prod => fold(T::prod, sources, out),
        Monoid::Max => fold(T::max, sources, out),
        Monoid::Min => fold(T::min, sources, out),
    }
}

fn fold<T: Number<N>, const N: usize>(op: impl Fn(T, T) -> T, sources: &[&[u8]], out: &mut [u8]) {
    let Some((first, others)) = sources.split_first() else { return };
    for (index, block) in out.chunks_mut(BLOCK * N).enumerate() {
        let at = index * BLOCK * N;
        let range = at..at + block.len();
        let Some((second, others)) = others.split_first() else {
            block.copy_from_slice(&first[range]);
            continue;
        };
        let block = block.as_chunks_mut::<N>().0;
        let pairs =
            first[range.clone()].as_chunks::<N>().0.iter().zip(second[range.clone()].as_chunks::<N>().0);
        for (out, (&a, &b)) in block.iter_mut().zip(pairs) {
            *out = op(T::read(a), T::read(b)).write();
        }
        for other in others {
            for (out, &b) in block.iter_mut().zip(other[range.clone()].as_chunks::<N>().0) {
                *out = op(T::read(*out), T::read(b)).write();
            }
        }
    }
}

trait Half: Copy {
    fn widen(bytes: [u8; 2]) -> f32;
    fn narrow(value: f32) -> [u8; 2];
}

impl Half for f16 {
    fn widen(bytes: [u8; 2]) -> f32 {
        f16::from_le_bytes(bytes).to_f32()
    }
    fn narrow(value: f32) -> [u8; 2] {
        f16::from_f32(value).to_le_bytes()
    }
}

impl Half for bf16 {
    fn widen(bytes: [u8; 2]) -> f32 {
        bf16::from_le_bytes(bytes).to_f32()
    }
    fn narrow(value: f32) -> [u8; 2] {
        bf16::from_f32(value).to_le_bytes()
    }
}

fn widened<T: Half>(monoid: Monoid, sources: &[&[u8]], out: &mut [u8]) {
    match monoid {
        Monoid::Sum => fold_widened::<T>(|a, b| a + b, sources, out),
        Monoid::Prod => fold_widened::<T>(|a, b| a * b, sources, out),
        Monoid::Max => fold_widened::<T>(Number::max, sources, out),
        Monoid::Min => fold_widened::<T>(Number::min, sources, out),
    }
}

fn fold_widened<T: Half>(op: impl Fn(f32, f32) -> f32, sources: &[&[u8]], out: &mut [u8]) {
    let Some((first, others)) = sources.split_first() else { return };
    let mut sums = [0f32; BLOCK];
    for (index, block) in out.chunks_mut(BLOCK * 2).enumerate() {
        let at = index * BLOCK * 2;
        let range = at..at + block.len();
        for (sum, &a) in sums.iter_mut().zip(first[range.clone()].as_chunks::<2>().0) {
            *sum = T::widen(a);
        }
        for other in others {
            for (sum, &b) in sums.iter_mut().zip(other[range.clone()].as_chunks::<2>().0) {
                *sum = op(*sum, T::widen(b));
            }
        }
        for (out, &sum) in block.as_chunks_mut::<2>().0.iter_mut().zip(&sums) {
            *out = T::narrow(sum);
        }
    }
}

fn bools(monoid: Monoid, sources: &[&[u8]], out: &mut [u8]) {
    match monoid {
        Monoid::Sum | Monoid::Max => fold::<u8, 1>(|a, b| a | b, sources, out),
        Monoid::Prod | Monoid::Min => fold::<u8, 1>(|a, b| a & b, sources, out),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_sums_are_rounded_once() {
        // 2048 + 1 is not an f16: rounding after every addend would lose both ones.
        let values = [2048.0, 1.0, 1.0].map(|v| f16::from_f32(v).to_le_bytes());
        let sources: Vec<&[u8]> = values.iter().map(|v| v.as_slice()).collect();
        let mut out = [0; 2];
        reduce(DType::F16, Monoid::Sum, &sources, &mut out);
        assert_eq!(f16::from_le_bytes(out).to_f32(), 2050.0);
    }

    #[test]
    fn max_and_min_hand_nan_on_from_any_side() {
        for monoid in [Monoid::Max, Monoid::Min] {
            for pair in [[f32::NAN, 1.0], [1.0, f32::NAN]] {
                let bytes = pair.map(f32::to_le_bytes);
                let mut out = [0; 4];
                reduce(DType::F32, monoid, &[&bytes[0], &bytes[1]], &mut out);
                assert!(f32::from_le_bytes(out).is_nan(), "{monoid:?} of {pair:?}");
            }
        }
    }
}
