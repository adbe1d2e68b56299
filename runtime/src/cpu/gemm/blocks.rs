//! Quantised weights: codes of four or eight bits with one scale, and perhaps a zero point, per block of the depth and
//! column. They stay codes in memory.
//!
//! A product sums the codes of a block in chains of its own and scales each sum,
//! `sum over k of x[k] * (code[k] - zero) * scale = (sum of x[k] * code[k] - zero * sum of x[k]) * scale`, so that a weight
//! costs no more instructions than its code has to be unpacked. This is the one order of every such product, of one row
//! and of many. Where the `x[k]` are bytes times a scale of their own ([`Factors`]), the bytes take part in the sums, and
//! their scale afterwards.
#![allow(clippy::needless_range_loop, reason = "loops over constant ranges become straight code")]

use super::bytes::Factors;
use super::pages::{Pages, Plain};
use super::plane::Rectangle;
use super::tile::InPanel;
use super::{BLOCK, Chains, DEPTH, FEW, LANES, Lanes, PANEL, VECTORS, add_panel, dot, vectors_of};
use crate::cpu::vector::vectorised;
use crate::team;

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

/// For each of sixteen columns the codes of the next steps of the depth, all moved up so that they have no sign.
///
/// Four bytes, the first step in the lowest; or eight nibbles: the first four in the low halves of the bytes, the others in
/// the high halves. So a mask turns nibbles into the bytes of four steps.
pub(super) type Words = [u32; LANES];

/// How codes lie in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Width {
    Nibbles,
    Bytes,
}

impl Width {
    /// Steps of the depth per word.
    pub(super) const fn steps(self) -> usize {
        match self {
            Width::Nibbles => 8,
            Width::Bytes => 4,
        }
    }

    /// What is added to codes so that they have no sign.
    pub(super) const fn centre(self) -> u8 {
        match self {
            Width::Nibbles => 8,
            Width::Bytes => 128,
        }
    }

    /// The lowest bit of a step's code.
    const fn bit(self, step: usize) -> usize {
        step % 4 * 8 + step / 4 * 4
    }
}

/// Quantised weights in panels.
pub(super) struct Blocks {
    words: Pages<Words>,
    width: Width,
    scales: Pages<Lanes>,
    /// Absent if all are 0.
    zeros: Option<Pages<Lanes>>,
    shape: QuantisedShape,
    /// Steps of the depth that are summed in one chain; chains do not cross blocks.
    chain: usize,
}

impl Blocks {
    /// None if chains would not fit blocks, or steps the words.
    pub(super) fn new(shape: QuantisedShape, from: &impl Quantised) -> Option<Blocks> {
        let QuantisedShape { depth, columns, block, nibbles } = shape;
        let width = if nibbles { Width::Nibbles } else { Width::Bytes };
        let steps = width.steps();
        if !block.is_power_of_two() || block < LANES || !depth.is_multiple_of(steps) {
            return None;
        }
        let vectors = columns.div_ceil(LANES);
        let column = |vector: usize, lane: usize| {
            let column = vector * LANES + lane;
            (column < columns).then_some(column)
        };
        let words = in_panels(depth / steps, vectors, |word, vector| {
            std::array::from_fn(|lane| {
                let Some(column) = column(vector, lane) else { return 0 };
                let code = |step: usize| {
                    // Modulo the number of codes.
                    let code = from.code(word * steps + step, column) as u8;
                    let bits = code.wrapping_add(width.centre()) & (u8::MAX >> (8 - 32 / steps));
                    u32::from(bits) << width.bit(step)
                };
                (0..steps).map(code).sum()
            })
        });
        let of_blocks = |value: &(dyn Fn(usize, usize) -> f32 + Sync)| {
            in_panels(depth.div_ceil(block), vectors, |block, vector| {
                Lanes(std::array::from_fn(|lane| column(vector, lane).map_or(0.0, |c| value(block, c))))
            })
        };
        let scales = of_blocks(&|block, column| from.scale(block, column));
        let zeros = of_blocks(&|block, column| f32::from(from.zero(block, column)));
        let zeros = zeros.iter().any(|lanes| *lanes != Lanes::ZERO).then_some(zeros);
        Some(Blocks { words, width, scales, zeros, shape, chain: block.min(BLOCK) })
    }

    pub(super) fn block(&self) -> usize {
        self.shape.block
    }

    /// Whether products need the sums of rows.
    pub(super) fn has_zeros(&self) -> bool {
        self.zeros.is_some()
    }

    pub(super) fn chain(&self) -> usize {
        self.chain
    }

    /// A column, the first step of the depth first.
    pub(super) fn column(&self, index: usize) -> impl Iterator<Item = f32> + '_ {
        let (panel, within) = (index / PANEL, index % PANEL);
        let (vector, lane) = (within / LANES, within % LANES);
        let steps = self.width.steps();
        (0..self.shape.depth).map(move |step| {
            let at =
                |blocks: &[Lanes]| self.panel_of(blocks, panel, step / self.shape.block, 1)[vector].0[lane];
            let word = self.panel_of(&self.words, panel, step / steps, 1)[vector][lane];
            let bits = word >> self.width.bit(step % steps) & (u32::MAX >> (32 - 32 / steps));
            let code = bits as f32 - f32::from(self.width.centre());
            (code - self.zeros.as_deref().map_or(0.0, at)) * at(&self.scales)
        })
    }

    /// Of what is held per panel and step, some steps of a panel.
    fn panel_of<'a, T>(&self, all: &'a [T], panel: usize, start: usize, steps: usize) -> &'a [T] {
        let vectors = vectors_of(self.shape.columns, panel);
        let per_vector = all.len() / self.shape.columns.div_ceil(LANES).max(1);
        &all[panel * VECTORS * per_vector + start * vectors..][..steps * vectors]
    }

    /// Computes the columns of a panel for the rows of `out`, of which `factors` has all, and puts them at `column`.
    pub(super) fn fill_panel(
        &self,
        out: &mut Rectangle<'_>,
        (column, panel): (usize, usize),
        (factors, first): (&Factors<'_>, usize),
        scratch: &mut Vec<Lanes>,
    ) {
        let (rows, depth) = (out.rows.len(), self.shape.depth);
        let vectors = vectors_of(self.shape.columns, panel);
        if let Some(bytes) = factors.bytes() {
            let words = self.panel_of(&self.words, panel, 0, depth / self.width.steps());
            let chains = dot::Chains {
                words,
                width: self.width,
                length: self.chain,
                scaling: self.scaling(panel, 0, (factors, first)),
            };
            return dot::multiply(out, column, (bytes, first), vectors, chains);
        }
        if rows <= FEW {
            for row in 0..rows {
                let elements = factors.row(first + row);
                let scaling = self.scaling(panel, 0, (factors, first));
                vectorised(
                    #[inline(always)]
                    |_| match vectors {
                        1 => self.multiply_row::<1>(out, (row, column), elements, panel, scaling),
                        2 => self.multiply_row::<2>(out, (row, column), elements, panel, scaling),
                        _ => self.multiply_row::<3>(out, (row, column), elements, panel, scaling),
                    },
                );
            }
            return;
        }
        for start in (0..depth).step_by(DEPTH) {
            let steps = (start, DEPTH.min(depth - start));
            vectorised(
                #[inline(always)]
                |_| self.widen(panel, steps, scratch),
            );
            let scaling = Some(self.scaling(panel, start, (factors, first)));
            let chains = Chains { length: self.chain, scaling };
            let left = factors.matrix().rows_within(first..first + rows);
            add_panel(out, column, left, steps, InPanel { panel: scratch, vectors }, vectors, chains);
        }
    }

    /// The codes of some steps of a panel as floats.
    #[inline(always)]
    fn widen(&self, panel: usize, (start, steps): (usize, usize), scratch: &mut Vec<Lanes>) {
        let vectors = vectors_of(self.shape.columns, panel);
        scratch.resize(steps * vectors, Lanes::ZERO);
        let per_word = self.width.steps();
        let words = self.panel_of(&self.words, panel, start / per_word, steps / per_word);
        match self.width {
            Width::Nibbles => widen_words::<{ Width::Nibbles.steps() }>(words, vectors, scratch),
            Width::Bytes => widen_words::<{ Width::Bytes.steps() }>(words, vectors, scratch),
        }
    }

    /// How sums of the chains from step `start` on are scaled in a panel, for rows from `first` on.
    fn scaling<'a>(
        &'a self,
        panel: usize,
        start: usize,
        (factors, first): (&'a Factors<'_>, usize),
    ) -> Scaling<'a> {
        let first_block = start / self.shape.block;
        let blocks = self.shape.depth.div_ceil(self.shape.block);
        let rest = |all: &'a [Lanes]| self.panel_of(all, panel, first_block, blocks - first_block);
        let chains = self.shape.depth.div_ceil(self.chain);
        Scaling {
            scales: rest(&self.scales),
            zeros: self.zeros.as_deref().map(rest),
            vectors: vectors_of(self.shape.columns, panel),
            // Both are powers of two.
            chains_per_block_log2: (self.shape.block / self.chain).trailing_zeros(),
            sums: factors.sums().get(first * chains + start / self.chain..).unwrap_or_default(),
            sums_per_row: chains,
            of_rows: factors.scales().get(first * blocks + first_block..).unwrap_or_default(),
            blocks_per_row: blocks,
        }
    }

    /// The product of one row with a panel, at `column` of `out`.
    #[inline(always)]
    fn multiply_row<const C: usize>(
        &self,
        out: &mut Rectangle<'_>,
        (row, column): (usize, usize),
        factors: &[f32],
        panel: usize,
        scaling: Scaling<'_>,
    ) {
        let words = self.panel_of(&self.words, panel, 0, self.shape.depth / self.width.steps());
        let words = words.as_chunks::<C>().0;
        let total = match self.width {
            Width::Nibbles => {
                sum_row::<C, { Width::Nibbles.steps() }>(words, factors, self.chain, (row, scaling))
            }
            Width::Bytes => {
                sum_row::<C, { Width::Bytes.steps() }>(words, factors, self.chain, (row, scaling))
            }
        };
        let to = out.row(row, column..column + C * LANES);
        for c in 0..C {
            total[c].store(&mut to[c * LANES..][..LANES]);
        }
    }
}

/// The sums of a row's chains, of words of `STEPS` steps.
#[inline(always)]
fn sum_row<const C: usize, const STEPS: usize>(
    words: &[[Words; C]],
    factors: &[f32],
    chain: usize,
    (row, scaling): (usize, Scaling<'_>),
) -> [Lanes; C] {
    let (factors, words_per_chain) = (factors.as_chunks::<STEPS>().0, chain / STEPS);
    let mut total = [Lanes::ZERO; C];
    let chains = factors.chunks(words_per_chain).zip(words.chunks(words_per_chain));
    for (chain, (factors, words)) in chains.enumerate() {
        let mut sum = [Lanes::ZERO; C];
        for (factors, words) in factors.iter().zip(words) {
            for step in 0..STEPS {
                for c in 0..C {
                    sum[c].add_scaled(factors[step], &widened::<STEPS>(&words[c], step));
                }
            }
        }
        total = scaling.of_chain::<C>(chain, 0).added(total, sum, scaling.of_row(row, chain));
    }
    total
}

/// The codes in words of `STEPS` steps as floats, a step after the other.
#[inline(always)]
fn widen_words<const STEPS: usize>(words: &[Words], vectors: usize, to: &mut [Lanes]) {
    for (to, words) in to.chunks_exact_mut(STEPS * vectors).zip(words.chunks_exact(vectors)) {
        for (vector, words) in words.iter().enumerate() {
            for step in 0..STEPS {
                to[step * vectors + vector] = widened::<STEPS>(words, step);
            }
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
    /// Per row and chain, from the first chain on; none if they are not needed.
    sums: &'a [f32],
    sums_per_row: usize,
    /// What scales a row, per row and block; none if nothing does.
    of_rows: &'a [f32],
    blocks_per_row: usize,
}

/// What of a row takes part in a chain besides its elements.
#[derive(Clone, Copy)]
pub(super) struct OfRow {
    /// Of the elements; 0 if it is not needed.
    pub(super) sum: f32,
    /// What the elements are to be multiplied with.
    pub(super) scale: f32,
}

impl<'a> Scaling<'a> {
    /// What scales a chain, for `C` vectors of columns from `first` on.
    #[inline(always)]
    pub(super) fn of_chain<const C: usize>(&self, chain: usize, first: usize) -> ChainScale<'a> {
        let at = (chain >> self.chains_per_block_log2) * self.vectors + first;
        ChainScale { scales: &self.scales[at..][..C], zeros: self.zeros.map(|zeros| &zeros[at..][..C]) }
    }

    #[inline(always)]
    pub(super) fn of_row(&self, row: usize, chain: usize) -> OfRow {
        let block = chain >> self.chains_per_block_log2;
        OfRow {
            sum: if self.sums.is_empty() { 0.0 } else { self.sums[row * self.sums_per_row + chain] },
            scale: if self.of_rows.is_empty() {
                1.0
            } else {
                self.of_rows[row * self.blocks_per_row + block]
            },
        }
    }
}

/// How the sum of a chain becomes one of weights, for some vectors of columns.
#[derive(Clone, Copy)]
pub(super) struct ChainScale<'a> {
    pub(super) scales: &'a [Lanes],
    pub(super) zeros: Option<&'a [Lanes]>,
}

impl ChainScale<'_> {
    /// `before + (sum - zero * row.sum) * (row.scale * scale)` for the vectors.
    #[inline(always)]
    pub(super) fn added<const C: usize>(
        &self,
        before: [Lanes; C],
        sum: [Lanes; C],
        row: OfRow,
    ) -> [Lanes; C] {
        let (mut sum, mut added) = (sum, before);
        if let Some(zeros) = self.zeros {
            for c in 0..C {
                sum[c].add_scaled(-row.sum, &zeros[c]);
            }
        }
        for c in 0..C {
            added[c].add_product(&sum[c], &self.scales[c].scaled(row.scale));
        }
        added
    }
}

/// The codes of a step of words of `STEPS`. A float whose last bit is worth what the code's lowest bit is takes the code as its last bits:
/// without an instruction to convert it, and the compiler leaves it as it is.
#[inline(always)]
fn widened<const STEPS: usize>(words: &Words, step: usize) -> Lanes {
    let width = if STEPS == Width::Nibbles.steps() { Width::Nibbles } else { Width::Bytes };
    let bit = width.bit(step);
    let (shift, within) = (bit / 16 * 16, bit % 16);
    let mask = (u32::MAX >> (32 - 32 / width.steps())) << within;
    let magic = f32::from_bits((127 + 23 - within as u32) << 23); // 2^(23 - within)
    let mut lanes = Lanes::ZERO;
    for lane in 0..LANES {
        let bits = magic.to_bits() | words[lane] >> shift & mask;
        lanes.0[lane] = f32::from_bits(bits) - (magic + f32::from(width.centre()));
    }
    lanes
}

/// Something per step and vector, panel by panel.
pub(super) fn in_panels<T: Plain>(
    steps: usize,
    vectors: usize,
    make: impl Fn(usize, usize) -> T + Sync,
) -> Pages<T> {
    let mut all = Pages::zeros(steps * vectors);
    team::for_each(all.chunks_mut((steps * VECTORS).max(1)).enumerate(), |(panel, to)| {
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
