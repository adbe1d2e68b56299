//! Memory for weights that every step reads from one end to the other.
#![allow(unsafe_code, reason = "a mapping as elements, and advice about its pages")]

use super::super::vector::Lanes;
use memmap2::{Advice, MmapMut};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

/// What is smaller comes from the allocator: a mapping takes whole pages.
const LEAST: usize = 1 << 20;

/// Elements whose bytes may all be zero.
pub(super) trait Plain: Copy + Send + Sync + 'static {
    const ZERO: Self;
}

impl Plain for Lanes {
    const ZERO: Lanes = Lanes::ZERO;
}

macro_rules! plain {
    ($($ty:ty),*) => {$(
        impl<const N: usize> Plain for [$ty; N] {
            const ZERO: [$ty; N] = [0; N];
        }
    )*};
}
plain!(u8, u16, u32, u64);

/// A fixed number of elements, in large pages where the system has them: streams of weights then wait less for address
/// translation (measured: a token of GPT-2 small takes 0.88 times as long). Large ones are mappings of their own, as they
/// stay: in the allocator's memory they take the room that a weight had for a while when it was read, and the next one
/// takes more.
pub(super) struct Pages<T>(Memory<T>);

enum Memory<T> {
    Own(Vec<T>),
    Mapped { map: MmapMut, count: usize, of: PhantomData<T> },
}

impl<T: Plain> Pages<T> {
    /// Zeros.
    pub(super) fn zeros(count: usize) -> Pages<T> {
        let bytes = count.saturating_mul(size_of::<T>());
        let mapped = if bytes < LEAST { None } else { MmapMut::map_anon(bytes).ok() };
        Pages(match mapped {
            Some(map) => {
                // A wish: that a system does not grant it is no error.
                let _ = map.advise(Advice::HugePage);
                Memory::Mapped { map, count, of: PhantomData }
            }
            None => Memory::Own(vec![T::ZERO; count]),
        })
    }
}

impl<T: Plain> Deref for Pages<T> {
    type Target = [T];

    #[inline]
    fn deref(&self) -> &[T] {
        match &self.0 {
            Memory::Own(all) => all,
            // SAFETY: the mapping is as large as `count` elements, begins at a page, which is aligned for any of them, and
            // began as zeros, which are elements.
            Memory::Mapped { map, count, .. } => unsafe {
                std::slice::from_raw_parts(map.as_ptr().cast(), *count)
            },
        }
    }
}

impl<T: Plain> DerefMut for Pages<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        match &mut self.0 {
            Memory::Own(all) => all,
            // SAFETY: as above, and the mapping is borrowed mutably.
            Memory::Mapped { map, count, .. } => unsafe {
                std::slice::from_raw_parts_mut(map.as_mut_ptr().cast(), *count)
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_and_large_ones_hold_what_was_put_there() {
        for count in [0, 3, LEAST / 64 - 1, LEAST / 64 + 5] {
            let mut all: Pages<[u16; 32]> = Pages::zeros(count);
            assert_eq!(matches!(all.0, Memory::Mapped { .. }), count * 64 >= LEAST);
            assert!(all.len() == count && all.iter().all(|x| *x == [0; 32]));
            all.iter_mut().enumerate().for_each(|(i, x)| x[31] = i as u16);
            assert!(all.iter().enumerate().all(|(i, x)| x[31] == i as u16 && x[0] == 0));
        }
    }
}
