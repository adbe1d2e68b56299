//! The first operand of a product with quantised weights, and rows of it that are bytes.
//!
//! Models with quantised weights may round the other operand to bytes, with a scale per block of the depth (`MatMulNBits`
//! with `accuracy_level` 4). What arrives here are floats again, but every block is then `scale * byte` with 127 as the
//! largest byte, so that both can be told from the block. Sums of bytes times codes are exact, in integers as in floats:
//! a row that is bytes is multiplied as such, with four multiplications to an instruction where the machine has that, and
//! has the same bits everywhere. Whether a row is taken for bytes hangs on nothing but the row.

use super::blocks::Blocks;
use super::{LANES, Matrix, SHARED_FROM, dot};
use crate::cpu::vector::{fold, sum, vectorised};
use crate::team;
use std::borrow::Cow;

/// The largest byte of every block.
const LARGEST: f32 = 127.0;
/// How far an element may be from a byte times the scale found: what made it, the largest element and the scale are
/// rounded once each.
const ROUNDED: f32 = 2.0 * f32::EPSILON;

/// The first operand.
pub(super) struct Factors<'a> {
    /// Elements; of rows that are bytes, the bytes. Empty if there are [`Self::bytes`].
    elements: Cow<'a, [f32]>,
    rows: usize,
    columns: usize,
    row_stride: usize,
    /// Per row and block; empty if no row is bytes.
    scales: Vec<f32>,
    /// Of elements, per row and chain; empty if they are not needed.
    sums: Vec<f32>,
    bytes: Option<Bytes>,
}

impl<'a> Factors<'a> {
    pub(super) fn new(left: Matrix<'a>, weights: &Blocks) -> Factors<'a> {
        Factors::with(left, weights, dot::is_there())
    }

    /// With integers where all rows are bytes, or without.
    pub(super) fn with(left: Matrix<'a>, weights: &Blocks, integers: bool) -> Factors<'a> {
        let Matrix { rows, columns, row_stride, .. } = left;
        let whole = Factors {
            elements: Cow::Borrowed(left.elements),
            rows,
            columns,
            row_stride,
            scales: Vec::new(),
            sums: Vec::new(),
            bytes: None,
        };
        let mut factors = match Found::within(&left, weights.block()) {
            None => whole,
            Some(found) if integers && found.is_bytes.iter().all(|&is| is) => Factors {
                elements: Cow::Borrowed(&[]),
                sums: found.sums(columns, weights.chain()),
                bytes: Some(Bytes::new(&found.bytes, columns)),
                scales: found.scales,
                ..whole
            },
            Some(found) => Factors {
                elements: Cow::Owned(found.elements(&left)),
                row_stride: columns,
                scales: found.scales,
                ..whole
            },
        };
        if factors.bytes.is_none() && weights.has_zeros() {
            factors.sums = factors.element_sums(weights.chain());
        }
        factors
    }

    pub(super) fn matrix(&self) -> Matrix<'_> {
        let Factors { rows, columns, row_stride, .. } = *self;
        Matrix { elements: &self.elements, rows, columns, row_stride, column_stride: 1 }
    }

    pub(super) fn row(&self, row: usize) -> &[f32] {
        &self.matrix().row_and_rest(row)[..self.columns]
    }

    pub(super) fn scales(&self) -> &[f32] {
        &self.scales
    }

    pub(super) fn sums(&self) -> &[f32] {
        &self.sums
    }

    /// All rows as bytes, if they are, and the machine can multiply them.
    pub(super) fn bytes(&self) -> Option<&Bytes> {
        self.bytes.as_ref()
    }

    fn element_sums(&self, chain: usize) -> Vec<f32> {
        let row = |row: usize| self.row(row).chunks(chain);
        (0..self.rows).flat_map(row).map(sum).collect()
    }
}

/// Rows of bytes, four steps of the depth to a word, in tiles of four, two or one row: within a tile the words of
/// a step lie next to each other.
pub(super) struct Bytes {
    words: Vec<i32>,
    per_row: usize,
}

impl Bytes {
    /// From rows of `columns` bytes, a multiple of four.
    fn new(bytes: &[i8], columns: usize) -> Bytes {
        let per_row = columns / 4;
        let mut words = vec![0; bytes.len() / 4];
        let (mut rest, mut rest_words) = (bytes, words.as_mut_slice());
        while !rest.is_empty() {
            let height = tile_height(rest.len() / columns);
            let (tile, tile_words);
            (tile, rest) = rest.split_at(height * columns);
            (tile_words, rest_words) = rest_words.split_at_mut(height * per_row);
            for (r, row) in tile.chunks_exact(columns).enumerate() {
                let to = tile_words.iter_mut().skip(r).step_by(height);
                for (to, bytes) in to.zip(row.as_chunks::<4>().0) {
                    *to = i32::from_le_bytes(bytes.map(|byte| byte as u8));
                }
            }
        }
        Bytes { words, per_row }
    }

    /// The words of the tile of `R` rows that starts at a row.
    #[inline(always)]
    pub(super) fn tile<const R: usize>(&self, row: usize) -> &[[i32; R]] {
        self.words[row * self.per_row..][..R * self.per_row].as_chunks::<R>().0
    }
}

/// Rows that are done at once if so many are left.
pub(super) fn tile_height(rows: usize) -> usize {
    match rows {
        4.. => 4,
        2.. => 2,
        _ => 1,
    }
}

/// Rows taken for bytes.
struct Found {
    /// Per row and step; 0 in rows that are not bytes.
    bytes: Vec<i8>,
    /// Per row and block; 1 in rows that are not bytes.
    scales: Vec<f32>,
    is_bytes: Vec<bool>,
}

impl Found {
    /// None if no row is bytes.
    fn within(left: &Matrix<'_>, block: usize) -> Option<Found> {
        let columns = left.columns;
        let row = |row: usize| &left.row_and_rest(row)[..columns];
        let first = block.min(columns);
        let begins = |r: usize| bytes_of(&row(r)[..first], block, &mut vec![0; first], &mut [0.0]);
        if !(0..left.rows).any(begins) {
            return None;
        }
        let blocks = columns.div_ceil(block);
        let mut found = Found {
            bytes: vec![0; left.rows * columns],
            scales: vec![1.0; left.rows * blocks],
            is_bytes: vec![false; left.rows],
        };
        let fill = |r: usize, bytes: &mut [i8], scales: &mut [f32], is_bytes: &mut bool| {
            *is_bytes = bytes_of(row(r), block, bytes, scales);
            if !*is_bytes {
                bytes.fill(0);
                scales.fill(1.0);
            }
        };
        let rows = found.bytes.chunks_exact_mut(columns).zip(found.scales.chunks_exact_mut(blocks));
        let rows = rows.zip(&mut found.is_bytes).enumerate();
        if left.rows * columns < SHARED_FROM {
            rows.for_each(|(r, ((bytes, scales), is))| fill(r, bytes, scales, is));
        } else {
            team::for_each(rows, |(r, ((bytes, scales), is))| fill(r, bytes, scales, is));
        }
        found.is_bytes.contains(&true).then_some(found)
    }

    /// Of the bytes, per row and chain.
    fn sums(&self, columns: usize, chain: usize) -> Vec<f32> {
        let rows = self.bytes.chunks_exact(columns).flat_map(|row| row.chunks(chain));
        // Exact: a chain has at most 128 steps.
        rows.map(|bytes| bytes.iter().map(|&byte| i32::from(byte)).sum::<i32>() as f32).collect()
    }

    /// The bytes as floats, and rows that are none as they are; row-major.
    fn elements(&self, left: &Matrix<'_>) -> Vec<f32> {
        let mut elements: Vec<f32> = self.bytes.iter().map(|&byte| f32::from(byte)).collect();
        for (row, to) in elements.chunks_exact_mut(left.columns).enumerate() {
            if !self.is_bytes[row] {
                to.copy_from_slice(&left.row_and_rest(row)[..left.columns]);
            }
        }
        elements
    }
}

/// Whether every block of a row is bytes times a scale; fills in both as far as it is.
fn bytes_of(row: &[f32], block: usize, bytes: &mut [i8], scales: &mut [f32]) -> bool {
    vectorised(
        #[inline(always)]
        |_| {
            let parts = row.chunks(block).zip(bytes.chunks_mut(block)).zip(scales);
            for ((elements, bytes), scale) in parts {
                match bytes_of_block(elements, bytes) {
                    Some(found) => *scale = found,
                    None => return false,
                }
            }
            true
        },
    )
}

#[inline(always)]
fn bytes_of_block(elements: &[f32], bytes: &mut [i8]) -> Option<f32> {
    let largest = fold(elements, 0.0, f32::abs, |a, b| if b > a { b } else { a });
    let (scale, inverse) = (largest / LARGEST, LARGEST / largest);
    if !scale.is_normal() || !inverse.is_normal() {
        bytes.fill(0);
        return elements.iter().all(|&x| x == 0.0).then_some(0.0);
    }
    let mut strays = [false; LANES];
    let (chunks, rest) = elements.as_chunks::<LANES>();
    let (bytes, bytes_rest) = bytes.as_chunks_mut::<LANES>();
    for (chunk, bytes) in chunks.iter().zip(bytes) {
        for lane in 0..LANES {
            let stray;
            (bytes[lane], stray) = byte_of(chunk[lane], scale, inverse);
            strays[lane] |= stray;
        }
    }
    for (&x, byte) in rest.iter().zip(bytes_rest) {
        let stray;
        (*byte, stray) = byte_of(x, scale, inverse);
        strays[0] |= stray;
    }
    (!strays.contains(&true)).then_some(scale)
}

/// The nearest byte, half to even, and whether the element is something else.
#[inline(always)]
fn byte_of(x: f32, scale: f32, inverse: f32) -> (i8, bool) {
    // A float of this size has a last bit worth 1, and so the rounded number, in two's complement, as its last bits.
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23
    let rounded = x * inverse + MAGIC;
    let strays = (rounded - MAGIC).mul_add(-scale, x).abs() > x.abs() * ROUNDED || x.is_nan();
    (rounded.to_bits() as i8, strays)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounded(elements: &[f32]) -> Vec<f32> {
        let largest = elements.iter().fold(0f32, |most, x| most.max(x.abs()));
        let scale = largest / 127.0;
        elements.iter().map(|x| (x * (127.0 / largest)).round_ties_even() * scale).collect()
    }

    #[test]
    fn what_was_rounded_to_bytes_is_found_to_be() {
        for seed in 1..200u32 {
            let elements: Vec<f32> = (0..32u32)
                .map(|i| ((i * 97 + seed * 7919) % 1009) as f32 * 0.0371 * seed as f32 - 11.3)
                .collect();
            assert_eq!(one_block(&elements), None, "{elements:?}");
            let elements = rounded(&elements);
            let (scale, bytes) = one_block(&elements).unwrap();
            for (&x, &byte) in elements.iter().zip(&bytes) {
                assert!((x - f32::from(byte) * scale).abs() <= 2e-7 * x.abs(), "{x} {byte} {scale}");
            }
            assert_eq!(bytes.iter().map(|b| b.unsigned_abs()).max(), Some(127));
        }
        assert_eq!(one_block(&[0.0, -0.0]), Some((0.0, vec![0, 0])));
        for special in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, 1e-40] {
            for length in [3, 16, 19] {
                let mut elements = vec![special; length];
                assert_eq!(one_block(&elements).is_some(), special == f32::MAX, "{special}");
                elements[1] = 0.4;
                elements[length - 1] = 1.0;
                assert_eq!(one_block(&elements), None, "{special}");
            }
        }
    }

    fn one_block(elements: &[f32]) -> Option<(f32, Vec<i8>)> {
        let (mut bytes, mut scales) = (vec![0; elements.len()], [0.0]);
        let found = bytes_of(elements, elements.len(), &mut bytes, &mut scales);
        found.then_some((scales[0], bytes))
    }

    #[test]
    fn tiles_hold_the_words_of_their_rows_side_by_side() {
        let (rows, columns) = (15, 8);
        let bytes: Vec<i8> = (0..rows * columns).map(|i| i as i8).collect();
        let words = Bytes::new(&bytes, columns);
        let word = |row: usize, word: usize| {
            let at = row * columns + word * 4;
            i32::from_le_bytes([0, 1, 2, 3].map(|step| bytes[at + step] as u8))
        };
        assert_eq!(words.tile::<4>(4)[1], std::array::from_fn(|r| word(4 + r, 1)));
        assert_eq!(words.tile::<4>(8)[0], std::array::from_fn(|r| word(8 + r, 0)));
        assert_eq!(words.tile::<2>(12)[1], std::array::from_fn(|r| word(12 + r, 1)));
        assert_eq!(words.tile::<1>(14), [[word(14, 0)], [word(14, 1)]]);
    }
}
