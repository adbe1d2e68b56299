//! Bytes times quantised weights, with instructions that add four products at once to an integer.
#![allow(unsafe_code, reason = "instructions that the compiler does not choose by itself")]
#![allow(clippy::needless_range_loop, reason = "loops over constant ranges become straight code")]

use super::blocks::{Scaling, Width, Words};
use super::bytes::Bytes;
use super::plane::Rectangle;
use crate::cpu::vector::Isa;
use std::sync::OnceLock;

/// The weights of a panel.
#[derive(Clone, Copy)]
pub(super) struct Chains<'a> {
    pub(super) words: &'a [Words],
    pub(super) width: Width,
    /// Steps of the depth per chain.
    pub(super) length: usize,
    pub(super) scaling: Scaling<'a>,
}

/// Whether the machine has the instructions.
pub(super) fn is_there() -> bool {
    static THERE: OnceLock<bool> = OnceLock::new();
    *THERE.get_or_init(|| Isa::chosen() == Ok(Isa::Avx512) && found())
}

#[cfg(target_arch = "x86_64")]
fn found() -> bool {
    is_x86_feature_detected!("avx512vnni")
}

#[cfg(not(target_arch = "x86_64"))]
fn found() -> bool {
    false
}

/// Computes a panel of `vectors` for the rows of `out`, which start at row `first` of the bytes and at a tile, and puts it
/// at `column`. Only where the instructions are there.
pub(super) fn multiply(
    out: &mut Rectangle<'_>,
    column: usize,
    rows: (&Bytes, usize),
    vectors: usize,
    chains: Chains<'_>,
) {
    assert!(is_there(), "bytes are multiplied where the instructions are there");
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the instructions are there.
    unsafe {
        match (vectors, chains.width) {
            (1, Width::Nibbles) => x86::panel::<1, true>(out, column, rows, chains),
            (2, Width::Nibbles) => x86::panel::<2, true>(out, column, rows, chains),
            (_, Width::Nibbles) => x86::panel::<3, true>(out, column, rows, chains),
            (1, Width::Bytes) => x86::panel::<1, false>(out, column, rows, chains),
            (2, Width::Bytes) => x86::panel::<2, false>(out, column, rows, chains),
            (_, Width::Bytes) => x86::panel::<3, false>(out, column, rows, chains),
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (out, column, rows, vectors, chains);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::super::bytes::tile_height;
    use super::super::{LANES, Lanes};
    use super::{Bytes, Chains, Rectangle, Width, Words};
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512vnni,avx2,fma,f16c")]
    pub(super) fn panel<const C: usize, const NIBBLES: bool>(
        out: &mut Rectangle<'_>,
        column: usize,
        (bytes, first): (&Bytes, usize),
        chains: Chains<'_>,
    ) {
        let rows = out.rows.len();
        let mut row = 0;
        while row < rows {
            let height = tile_height(rows - row);
            match height {
                4 => tile::<4, C, NIBBLES>(out, (row, column), bytes.tile(first + row), chains),
                2 => tile::<2, C, NIBBLES>(out, (row, column), bytes.tile(first + row), chains),
                _ => tile::<1, C, NIBBLES>(out, (row, column), bytes.tile(first + row), chains),
            }
            row += height;
        }
    }

    /// The operations on floats are those of [`ChainScale`](super::super::blocks::ChainScale), in the same order.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512vnni,avx2,fma,f16c")]
    fn tile<const R: usize, const C: usize, const NIBBLES: bool>(
        out: &mut Rectangle<'_>,
        (row, column): (usize, usize),
        factors: &[[i32; R]],
        chains: Chains<'_>,
    ) {
        let width = if NIBBLES { Width::Nibbles } else { Width::Bytes };
        let words = chains.words.as_chunks::<C>().0;
        let words = words.chunks(chains.length / width.steps());
        let factors = factors.chunks(chains.length / Width::Bytes.steps());
        let centre = f32::from(width.centre());
        let mask = _mm512_set1_epi8(15);
        let mut totals = [[_mm512_setzero_ps(); C]; R];
        for (chain, (words, factors)) in words.zip(factors).enumerate() {
            let (mut row_sums, mut row_scales) = ([0f32; R], [0f32; R]);
            for r in 0..R {
                let of_row = chains.scaling.of_row(row + r, chain);
                (row_sums[r], row_scales[r]) = (of_row.sum, of_row.scale);
            }
            // Codes have the centre added, which the sums take off again.
            let mut sums = [[_mm512_setzero_si512(); C]; R];
            for r in 0..R {
                let start = _mm512_cvtps_epi32(_mm512_set1_ps(-centre * row_sums[r]));
                for c in 0..C {
                    sums[r][c] = start;
                }
            }
            if NIBBLES {
                for (words, [early, late]) in words.iter().zip(factors.as_chunks::<2>().0) {
                    for c in 0..C {
                        let both = load(&words[c]);
                        let low = _mm512_and_si512(both, mask);
                        let high = _mm512_and_si512(_mm512_srli_epi32::<4>(both), mask);
                        for r in 0..R {
                            sums[r][c] = _mm512_dpbusd_epi32(sums[r][c], low, _mm512_set1_epi32(early[r]));
                        }
                        for r in 0..R {
                            sums[r][c] = _mm512_dpbusd_epi32(sums[r][c], high, _mm512_set1_epi32(late[r]));
                        }
                    }
                }
            } else {
                for (words, factors) in words.iter().zip(factors) {
                    for c in 0..C {
                        let codes = load(&words[c]);
                        for r in 0..R {
                            sums[r][c] =
                                _mm512_dpbusd_epi32(sums[r][c], codes, _mm512_set1_epi32(factors[r]));
                        }
                    }
                }
            }
            let of_chain = chains.scaling.of_chain::<C>(chain, 0);
            for c in 0..C {
                let scale = floats(&of_chain.scales[c]);
                for r in 0..R {
                    let mut sum = _mm512_cvtepi32_ps(sums[r][c]);
                    if let Some(zeros) = of_chain.zeros {
                        sum = _mm512_fnmadd_ps(_mm512_set1_ps(row_sums[r]), floats(&zeros[c]), sum);
                    }
                    let scale = _mm512_mul_ps(scale, _mm512_set1_ps(row_scales[r]));
                    totals[r][c] = _mm512_fmadd_ps(sum, scale, totals[r][c]);
                }
            }
        }
        for r in 0..R {
            let to = out.row(row + r, column..column + C * LANES);
            for c in 0..C {
                store(totals[r][c], &mut to[c * LANES..][..LANES]);
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn load(words: &Words) -> __m512i {
        // SAFETY: sixteen words are as many bytes as are read.
        unsafe { _mm512_loadu_si512(words.as_ptr().cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn floats(lanes: &Lanes) -> __m512 {
        // SAFETY: sixteen floats are as many bytes as are read.
        unsafe { _mm512_loadu_ps(lanes.0.as_ptr()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn store(floats: __m512, to: &mut [f32]) {
        assert!(to.len() >= LANES);
        // SAFETY: there is room for sixteen floats.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), floats) }
    }
}
