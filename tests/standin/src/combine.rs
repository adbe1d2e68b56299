//! How elements of several ranks become one, by the numbers that `libnccl` gives types and operations.

use std::ffi::c_int;

/// Bytes of an element.
pub(crate) fn size_of_element(element: c_int) -> Option<usize> {
    Some(match element {
        0 | 1 => 1,
        6 | 9 => 2,
        2 | 3 | 7 => 4,
        4 | 5 | 8 => 8,
        _ => return None,
    })
}

/// What arrives to be combined: all ranks' elements, this rank's own at its place.
pub(crate) struct Combining {
    pub(crate) parts: Vec<Vec<u8>>,
    pub(crate) to: u64,
    pub(crate) element: c_int,
    pub(crate) operation: c_int,
}

/// All parts combined, in the order of ranks.
pub(crate) fn combined(combining: &Combining) -> Vec<u8> {
    use half::{bf16, f16};
    macro_rules! fold {
        ($ty:ty, $sum:expr, $prod:expr, $max:expr, $min:expr) => {{
            let read = |part: &Vec<u8>| -> Vec<$ty> {
                let raw = part.chunks_exact(size_of::<$ty>());
                raw.map(|raw| <$ty>::from_le_bytes(raw.try_into().unwrap_or_default())).collect()
            };
            let combine: fn($ty, $ty) -> $ty = match combining.operation {
                0 => $sum,
                1 => $prod,
                2 => $max,
                _ => $min,
            };
            let mut parts = combining.parts.iter().map(read);
            let first = parts.next().unwrap_or_default();
            let all = parts.fold(first, |a, b| a.into_iter().zip(b).map(|(a, b)| combine(a, b)).collect());
            all.into_iter().flat_map(|x| x.to_le_bytes()).collect()
        }};
    }
    macro_rules! integers {
        ($ty:ty) => {
            fold!($ty, <$ty>::wrapping_add, <$ty>::wrapping_mul, Ord::max, Ord::min)
        };
    }
    match combining.element {
        0 => integers!(i8),
        1 => integers!(u8),
        2 => integers!(i32),
        3 => integers!(u32),
        4 => integers!(i64),
        5 => integers!(u64),
        6 => fold!(f16, |a, b| a + b, |a, b| a * b, f16::max, f16::min),
        7 => fold!(f32, |a, b| a + b, |a, b| a * b, f32::max, f32::min),
        8 => fold!(f64, |a, b| a + b, |a, b| a * b, f64::max, f64::min),
        _ => fold!(bf16, |a, b| a + b, |a, b| a * b, bf16::max, bf16::min),
    }
}
