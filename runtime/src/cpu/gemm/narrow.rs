//! Weights of fewer bits than a float: they stay as they are in memory and are widened where they are used.
//!
//! Halves (`f16`, `bf16`) widen to the floats they are. Quantised weights are codes with one scale, and perhaps a zero
//! point, per block of the depth and column: a product sums the codes of a block in chains of its own and scales each sum,
//! `sum over k of x[k] * (code[k] - zero) * scale = (sum of x[k] * code[k] - zero * sum of x[k]) * scale`, so that a weight
//! costs no more instructions than its code has to be unpacked. This is the one order of every such product, of one row
//! and of many.
#![allow(clippy::needless_range_loop, reason = "loops over constant ranges become straight code")]

use super::pages::filled;
use super::plane::Rectangle;
use super::tile::Panel;
use super::{BLOCK, LANES, Lanes, Matrix, PANEL, VECTORS, vectors_of};
use rayon::prelude::*;

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

/// What quantised weights are made of, by step of the depth (or block of steps) and column.
pub(crate) trait Quantised: Sync {
    fn code(&self, step: usize, column: usize) -> i8;
    fn scale(&self, block: usize, column: usize) -> f32;
    /// What code stands for 0.
    fn zero(&self, block: usize, column: usize) -> i16;
}

/// How quantised weights are laid out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QuantisedShape {
    pub(crate) depth: usize,
    pub(crate) columns: usize,
    /// Steps of the depth that share a scale.
    pub(crate) block: usize,
    /// Codes lie in -8..8.
    pub(crate) nibbles: bool,
}

/// Quantised weights in panels.
#[derive(Clone, Debug)]
pub(super) struct Blocks {
    codes: Codes,
    scales: Vec<Lanes>,
    /// Absent if all are 0.
    zeros: Option<Vec<Lanes>>,
    shape: QuantisedShape,
    /// Steps of the depth that are summed in one chain; chains do not cross blocks.
    pub(super) chain: usize,
}

#[derive(Clone, Debug)]
enum Codes {
    Bytes(Vec<[i8; LANES]>),
    /// Of two steps, the first in the low bits, 8 more than they are.
    Nibbles(Vec<[u8; LANES]>),
}

impl Blocks {
    /// None if chains would not fit blocks, or steps the bytes of nibbles.
    pub(super) fn new(shape: QuantisedShape, from: &impl Quantised) -> Option<Blocks> {
        let QuantisedShape { depth, columns, block, nibbles } = shape;
        let chain = block.min(BLOCK);
        if !block.is_power_of_two() || block < LANES || nibbles && !depth.is_multiple_of(2) {
            return None;
        }
        let vectors = columns.div_ceil(LANES);
        let column = |vector: usize, lane: usize| {
            let column = vector * LANES + lane;
            (column < columns).then_some(column)
        };
        let code = |step: usize, vector: usize, lane: usize| {
            column(vector, lane).map_or(0, |column| from.code(step, column))
        };
        let codes = if nibbles {
            Codes::Nibbles(in_panels(depth / 2, vectors, [0; LANES], |pair, vector| {
                std::array::from_fn(|lane| {
                    // Without a sign: 8 more.
                    let [low, high] = [2 * pair, 2 * pair + 1].map(|step| code(step, vector, lane) as u8 ^ 8);
                    low & 15 | high << 4
                })
            }))
        } else {
            Codes::Bytes(in_panels(depth, vectors, [0; LANES], |step, vector| {
                std::array::from_fn(|lane| code(step, vector, lane))
            }))
        };
        let of_blocks = |value: &(dyn Fn(usize, usize) -> f32 + Sync)| {
            in_panels(depth.div_ceil(block), vectors, Lanes::ZERO, |block, vector| {
                Lanes(std::array::from_fn(|lane| column(vector, lane).map_or(0.0, |c| value(block, c))))
            })
        };
        let scales = of_blocks(&|block, column| from.scale(block, column));
        let zeros = of_blocks(&|block, column| f32::from(from.zero(block, column)));
        let zeros = zeros.iter().any(|lanes| *lanes != Lanes::ZERO).then_some(zeros);
        Some(Blocks { codes, scales, zeros, shape, chain })
    }

    pub(super) fn columns(&self) -> usize {
        self.shape.columns
    }

    /// A column, the first step of the depth first.
    pub(super) fn column(&self, index: usize) -> impl Iterator<Item = f32> + '_ {
        let (panel, within) = (index / PANEL, index % PANEL);
        let (vector, lane) = (within / LANES, within % LANES);
        (0..self.shape.depth).map(move |step| {
            let at =
                |blocks: &[Lanes]| self.panel_of(blocks, panel, step / self.shape.block, 1)[vector].0[lane];
            let code = match &self.codes {
                Codes::Bytes(codes) => self.panel_of(codes, panel, step, 1)[vector][lane],
                Codes::Nibbles(codes) => {
                    let byte = self.panel_of(codes, panel, step / 2, 1)[vector][lane];
                    (byte >> (4 * (step % 2)) & 15) as i8 - 8
                }
            };
            (f32::from(code) - self.zeros.as_deref().map_or(0.0, at)) * at(&self.scales)
        })
    }

    /// Of what is held per panel and step, some steps of a panel.
    fn panel_of<'a, T>(&self, all: &'a [T], panel: usize, start: usize, steps: usize) -> &'a [T] {
        let vectors = vectors_of(self.shape.columns, panel);
        let per_vector = all.len() / self.shape.columns.div_ceil(LANES).max(1);
        &all[panel * VECTORS * per_vector + start * vectors..][..steps * vectors]
    }

    /// The codes of some steps of a panel as floats.
    pub(super) fn widen(&self, panel: usize, (start, steps): (usize, usize), scratch: &mut Vec<Lanes>) {
        let vectors = vectors_of(self.shape.columns, panel);
        scratch.resize(steps * vectors, Lanes::ZERO);
        match &self.codes {
            Codes::Bytes(codes) => {
                let codes = self.panel_of(codes, panel, start, steps);
                scratch.iter_mut().zip(codes).for_each(|(to, from)| *to = widened_bytes(from));
            }
            Codes::Nibbles(codes) => {
                let codes = self.panel_of(codes, panel, start / 2, steps / 2);
                for (to, from) in scratch.chunks_exact_mut(2 * vectors).zip(codes.chunks_exact(vectors)) {
                    let (low, high) = to.split_at_mut(vectors);
                    for ((low, high), from) in low.iter_mut().zip(high).zip(from) {
                        [*low, *high] = widened_nibbles(from);
                    }
                }
            }
        }
    }

    /// How sums of the chains from step `start` on are scaled in a panel.
    pub(super) fn scaling<'a>(&'a self, panel: usize, start: usize, sums: &'a [f32]) -> Scaling<'a> {
        let vectors = vectors_of(self.shape.columns, panel);
        let first = start / self.shape.block;
        let blocks = self.shape.depth.div_ceil(self.shape.block) - first;
        Scaling {
            scales: self.panel_of(&self.scales, panel, first, blocks),
            zeros: self.zeros.as_deref().map(|zeros| self.panel_of(zeros, panel, first, blocks)),
            vectors,
            // Both are powers of two.
            chains_per_block_log2: (self.shape.block / self.chain).trailing_zeros(),
            sums: sums.get(start / self.chain..).unwrap_or_default(),
            sums_per_row: self.shape.depth.div_ceil(self.chain),
        }
    }

    /// For every row and chain the sum of the row's elements, if zero points are to be taken off.
    pub(super) fn sums(&self, left: &Matrix<'_>) -> Vec<f32> {
        if self.zeros.is_none() {
            return Vec::new();
        }
        let row = |row: usize| left.row_and_rest(row)[..left.columns].chunks(self.chain);
        (0..left.rows).flat_map(row).map(super::super::vector::sum).collect()
    }

    /// The product of one row with a panel, at `column` of `out`.
    #[inline(always)]
    pub(super) fn multiply_row<const C: usize>(
        &self,
        out: &mut Rectangle<'_>,
        (row, column): (usize, usize),
        factors: &[f32],
        panel: usize,
        sums: &[f32],
    ) {
        let depth = self.shape.depth;
        let scaling = self.scaling(panel, 0, sums);
        let mut total = [Lanes::ZERO; C];
        match &self.codes {
            Codes::Bytes(codes) => {
                let codes = self.panel_of(codes, panel, 0, depth).as_chunks::<C>().0;
                let chains = factors.chunks(self.chain).zip(codes.chunks(self.chain));
                for (chain, (factors, codes)) in chains.enumerate() {
                    let mut sum = [Lanes::ZERO; C];
                    for (&factor, codes) in factors.iter().zip(codes) {
                        for c in 0..C {
                            sum[c].add_scaled(factor, &widened_bytes(&codes[c]));
                        }
                    }
                    total = scaling.of_chain::<C>(chain, 0).added(total, sum, scaling.sum(row, chain));
                }
            }
            Codes::Nibbles(codes) => {
                let codes = self.panel_of(codes, panel, 0, depth / 2).as_chunks::<C>().0;
                let factors = factors.as_chunks::<2>().0;
                let chains = factors.chunks(self.chain / 2).zip(codes.chunks(self.chain / 2));
                for (chain, (factors, codes)) in chains.enumerate() {
                    let mut sum = [Lanes::ZERO; C];
                    for (&[first, second], codes) in factors.iter().zip(codes) {
                        for c in 0..C {
                            let [low, high] = widened_nibbles(&codes[c]);
                            sum[c].add_scaled(first, &low);
                            sum[c].add_scaled(second, &high);
                        }
                    }
                    total = scaling.of_chain::<C>(chain, 0).added(total, sum, scaling.sum(row, chain));
                }
            }
        }
        let to = out.row(row, column..column + C * LANES);
        for c in 0..C {
            total[c].store(&mut to[c * LANES..][..LANES]);
        }
    }
}

/// How sums of chains become sums of weights.
#[derive(Clone, Copy)]
pub(super) struct Scaling<'a> {
    /// Per block and vector.
    scales: &'a [Lanes],
    zeros: Option<&'a [Lanes]>,
    vectors: usize,
    chains_per_block_log2: u32,
    /// Per row and chain, from the first chain on.
    sums: &'a [f32],
    sums_per_row: usize,
}

impl<'a> Scaling<'a> {
    /// What scales a chain, for `C` vectors of columns from `first` on.
    #[inline(always)]
    pub(super) fn of_chain<const C: usize>(&self, chain: usize, first: usize) -> ChainScale<'a> {
        let at = (chain >> self.chains_per_block_log2) * self.vectors + first;
        ChainScale { scales: &self.scales[at..][..C], zeros: self.zeros.map(|zeros| &zeros[at..][..C]) }
    }

    /// The sum of a row's elements over a chain; 0 if it is not needed.
    #[inline(always)]
    pub(super) fn sum(&self, row: usize, chain: usize) -> f32 {
        if self.zeros.is_some() { self.sums[row * self.sums_per_row + chain] } else { 0.0 }
    }
}

/// How the sum of a chain becomes one of weights, for some vectors of columns.
#[derive(Clone, Copy)]
pub(super) struct ChainScale<'a> {
    scales: &'a [Lanes],
    zeros: Option<&'a [Lanes]>,
}

impl ChainScale<'_> {
    /// `before + (sum - zero * factors) * scale` for the vectors; `factors` is the sum of the row's elements.
    #[inline(always)]
    pub(super) fn added<const C: usize>(
        &self,
        before: [Lanes; C],
        sum: [Lanes; C],
        factors: f32,
    ) -> [Lanes; C] {
        let (mut sum, mut added) = (sum, before);
        if let Some(zeros) = self.zeros {
            for c in 0..C {
                sum[c].add_scaled(-factors, &zeros[c]);
            }
        }
        for c in 0..C {
            added[c].add_product(&sum[c], &self.scales[c]);
        }
        added
    }
}

/// Both codes of every byte. A float whose last bit is worth 1 (or, for the high codes, bit 4) takes the code as its last
/// bits: without an instruction to convert it, and the compiler leaves it as it is.
#[inline(always)]
fn widened_nibbles(bytes: &[u8; LANES]) -> [Lanes; 2] {
    const LOW: f32 = 8_388_608.0; // 2^23
    const HIGH: f32 = 524_288.0; // 2^19
    let (mut low, mut high) = (Lanes::ZERO, Lanes::ZERO);
    for lane in 0..LANES {
        let byte = u32::from(bytes[lane]);
        low.0[lane] = f32::from_bits(LOW.to_bits() | byte & 0x0f) - (LOW + 8.0);
        high.0[lane] = f32::from_bits(HIGH.to_bits() | byte & 0xf0) - (HIGH + 8.0);
    }
    [low, high]
}

#[inline(always)]
fn widened_bytes(bytes: &[i8; LANES]) -> Lanes {
    let mut lanes = Lanes::ZERO;
    for (lane, &byte) in lanes.0.iter_mut().zip(bytes) {
        *lane = f32::from(byte);
    }
    lanes
}

/// Something per step and vector, panel by panel.
pub(super) fn in_panels<T: Copy + Send + Sync>(
    steps: usize,
    vectors: usize,
    empty: T,
    make: impl Fn(usize, usize) -> T + Sync,
) -> Vec<T> {
    let mut all = filled(empty, steps * vectors);
    all.par_chunks_mut((steps * VECTORS).max(1)).enumerate().for_each(|(panel, to)| {
        let first = panel * VECTORS;
        let count = (vectors - first).min(VECTORS);
        for (step, to) in to.chunks_exact_mut(count).enumerate() {
            for (vector, to) in to.iter_mut().enumerate() {
                *to = make(step, first + vector);
            }
        }
    });
    all
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
