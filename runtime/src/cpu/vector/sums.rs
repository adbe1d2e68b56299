//! Sixteen sums of lanes at once.
#![allow(clippy::needless_range_loop, reason = "loops over constant ranges become straight code")]
#![allow(unsafe_code, reason = "shuffles that the compiler makes gathers of")]

use super::{Isa, LANES, Lanes};

/// The sum of the lanes of each, by the tree of [`Lanes::sum`]. `isa` says for which instructions this is compiled.
///
/// A sum that directly follows what made its lanes has the compiler keep these two by two instead of in one register.
#[inline(always)]
pub(crate) fn sums(isa: Isa, of: &[Lanes; LANES]) -> Lanes {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: it is only ever chosen after its features were found.
        Isa::Avx512 => unsafe { x86::sums(of) },
        _ => one_by_one(of),
    }
}

#[inline(always)]
fn one_by_one(of: &[Lanes; LANES]) -> Lanes {
    let mut sums = Lanes::ZERO;
    for (to, lanes) in sums.0.iter_mut().zip(of) {
        *to = lanes.sum();
    }
    sums
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{LANES, Lanes};
    use std::arch::x86_64::*;

    /// Every step adds the upper halves of groups of lanes to the lower ones, of two registers into one.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c")]
    pub(super) fn sums(of: &[Lanes; LANES]) -> Lanes {
        // In the order that the steps turn into the right one.
        let mut all = [_mm512_setzero_ps(); LANES];
        for i in 0..LANES {
            // SAFETY: sixteen floats are as many bytes as are read.
            all[i] = unsafe { _mm512_loadu_ps(of[i % 4 * 4 + i / 4].0.as_ptr()) };
        }
        let mut eight = [_mm512_setzero_ps(); 8];
        for i in 0..8 {
            let (a, b) = (all[2 * i], all[2 * i + 1]);
            eight[i] = _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b));
        }
        let mut four = [_mm512_setzero_ps(); 4];
        for i in 0..4 {
            let (a, b) = (eight[2 * i], eight[2 * i + 1]);
            four[i] = _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
        }
        let mut two = [_mm512_setzero_ps(); 2];
        for i in 0..2 {
            let (a, b) = (four[2 * i], four[2 * i + 1]);
            two[i] = _mm512_add_ps(_mm512_shuffle_ps::<0x44>(a, b), _mm512_shuffle_ps::<0xee>(a, b));
        }
        let [a, b] = two;
        let sums = _mm512_add_ps(_mm512_shuffle_ps::<0x88>(a, b), _mm512_shuffle_ps::<0xdd>(a, b));
        let mut lanes = Lanes::ZERO;
        // SAFETY: there is room for sixteen floats.
        unsafe { _mm512_storeu_ps(lanes.0.as_mut_ptr(), sums) };
        lanes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::vector::vectorised_for;

    #[test]
    fn every_sum_is_the_tree_of_its_lanes_for_all_instructions() {
        let of: [Lanes; LANES] = std::array::from_fn(|k| {
            Lanes(std::array::from_fn(|i| ((k * 37 + i * 101) % 211) as f32 / 13.0 - 1e3 * (i % 3) as f32))
        });
        let expected: Vec<u32> = of.iter().map(|lanes| lanes.combined(|a, b| a + b).to_bits()).collect();
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_there()) {
            let found = vectorised_for(
                isa,
                #[inline(always)]
                |isa| sums(isa, &of),
            );
            assert_eq!(found.0.map(f32::to_bits).to_vec(), expected, "{isa:?}");
        }
    }
}
