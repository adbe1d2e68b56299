//! Weights of 16 bits: they stay halves in memory and are widened to the floats they are where they are used.

use super::tile::Panel;
use super::{LANES, Lanes};

/// Which floats of 16 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Half {
    F16,
    Bf16,
}

/// Sixteen halves.
pub(super) type Halves = [u16; LANES];

impl Half {
    #[inline(always)]
    pub(super) fn widened(self, halves: &Halves) -> Lanes {
        let mut lanes = Lanes::ZERO;
        for (lane, &bits) in lanes.0.iter_mut().zip(halves) {
            *lane = match self {
                Half::F16 => from_f16(bits),
                Half::Bf16 => f32::from_bits(u32::from(bits) << 16),
            };
        }
        lanes
    }
}

/// Exact for all bits: exponent and fraction are put in place and scaled by a power of two, which is right for subnormal
/// numbers too; infinity and NaN have an exponent of their own.
#[inline(always)]
fn from_f16(bits: u16) -> f32 {
    const SCALE: f32 = f32::from_bits(0x7780_0000); // 2^112, the difference of the exponents' biases
    let bits = u32::from(bits);
    let scaled = f32::from_bits((bits & 0x7fff) << 13) * SCALE;
    let special = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(scaled.to_bits() | special | (bits & 0x8000) << 16)
}

/// A packed panel of halves.
#[derive(Clone, Copy)]
pub(super) struct InHalves<'a> {
    pub(super) panel: &'a [Halves],
    pub(super) vectors: usize,
    pub(super) half: Half,
}

impl Panel for InHalves<'_> {
    #[inline(always)]
    fn row<const C: usize>(&self, step: usize, first: usize) -> [Lanes; C] {
        let row = &self.panel[step * self.vectors + first..][..C];
        std::array::from_fn(
            #[inline(always)]
            |c| self.half.widened(&row[c]),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_halves_widen_exactly() {
        for bits in 0..=u16::MAX {
            let (found, expected) = (from_f16(bits), half::f16::from_bits(bits).to_f32());
            assert!(
                found == expected && found.is_sign_negative() == expected.is_sign_negative()
                    || expected.is_nan() && found.is_nan()
            );
            let widened = Half::Bf16.widened(&[bits; LANES]).0[3];
            assert!(widened.to_bits() == u32::from(bits) << 16);
        }
    }
}
