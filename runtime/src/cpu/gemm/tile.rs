//! Tiles of a product, kept in registers.
#![allow(clippy::needless_range_loop, reason = "loops over constant ranges become straight code")]

use super::super::vector::for_lanes;
use super::plane::Rectangle;
use super::{BLOCK, Chains, LANES, Lanes, Matrix};
use std::ops::Range;

/// Some columns of the second operand, over some steps of the depth.
pub(super) trait Panel: Copy {
    /// `C` vectors of step `step`, from vector `first` on.
    fn row<const C: usize>(&self, step: usize, first: usize) -> [Lanes; C];
}

/// A packed panel.
#[derive(Clone, Copy)]
pub(super) struct InPanel<'a> {
    pub(super) panel: &'a [Lanes],
    /// Vectors per step.
    pub(super) vectors: usize,
}

impl Panel for InPanel<'_> {
    #[inline(always)]
    fn row<const C: usize>(&self, step: usize, first: usize) -> [Lanes; C] {
        let row = &self.panel[step * self.vectors + first..][..C];
        std::array::from_fn(
            #[inline(always)]
            |c| row[c],
        )
    }
}

/// Columns that lie next to each other in a matrix, in whole vectors.
#[derive(Clone, Copy)]
pub(super) struct InPlace<'a> {
    pub(super) from: &'a [f32],
    pub(super) stride: usize,
}

impl Panel for InPlace<'_> {
    #[inline(always)]
    fn row<const C: usize>(&self, step: usize, first: usize) -> [Lanes; C] {
        let row = &self.from[step * self.stride + first * LANES..][..C * LANES];
        std::array::from_fn(
            #[inline(always)]
            |c| Lanes::load(&row[c * LANES..]),
        )
    }
}

/// Adds the product of all rows with a panel over some blocks of the depth, or begins with it at step 0. The result has
/// room for whole vectors.
#[inline(always)]
pub(super) fn multiply_rows<P: Panel>(
    wide: bool,
    out: &mut Rectangle<'_>,
    left: Matrix<'_>,
    steps: (usize, usize),
    column: usize,
    (vectors, panel): (usize, P),
    chains: Chains<'_>,
) {
    let work = Work { left, steps, column, panel, chains };
    if wide {
        match vectors {
            1 => work.blocks::<8, 1>(out, 0),
            2 => work.blocks::<8, 2>(out, 0),
            _ => work.blocks::<8, 3>(out, 0),
        }
    } else {
        // Fewer registers: one vector of columns at a time.
        for first in 0..vectors {
            work.blocks::<6, 1>(out, first);
        }
    }
}

/// As [`multiply_rows`] for one row and sixteen vectors of columns.
#[inline(always)]
pub(super) fn multiply_long_row(
    out: &mut Rectangle<'_>,
    row: &[f32],
    start: usize,
    column: usize,
    panel: InPlace<'_>,
) {
    let out = out.row(0, column..column + LANES * LANES);
    for (block, factors) in row.chunks(BLOCK).enumerate() {
        let mut sums = [Lanes::ZERO; LANES];
        for (step, &factor) in factors.iter().enumerate() {
            let right = &panel.from[(block * BLOCK + step) * panel.stride..][..LANES * LANES];
            for_lanes!(LANE => sums[LANE].add_scaled(factor, &Lanes::load(&right[LANE * LANES..][..LANES])));
        }
        let first = start + block * BLOCK == 0;
        for (sum, to) in sums.into_iter().zip(out.chunks_exact_mut(LANES)) {
            let before = if first { Lanes::ZERO } else { Lanes::load(to) };
            (before + sum).store(to);
        }
    }
}

struct Work<'a, P> {
    left: Matrix<'a>,
    /// The first step of the depth and how many.
    steps: (usize, usize),
    /// Where the panel starts in the result.
    column: usize,
    panel: P,
    chains: Chains<'a>,
}

impl<P: Panel> Work<'_, P> {
    /// All rows, `R` at a time, with `C` vectors of columns from `first` on.
    #[inline(always)]
    fn blocks<const R: usize, const C: usize>(&self, out: &mut Rectangle<'_>, first: usize) {
        let (mut start, end) = (0, self.left.rows);
        while end - start >= R {
            self.tile::<R, C>(out, start, first);
            start += R;
        }
        while end - start >= 4 {
            self.tile::<4, C>(out, start, first);
            start += 4;
        }
        while end - start >= 2 {
            self.tile::<2, C>(out, start, first);
            start += 2;
        }
        if end > start {
            self.tile::<1, C>(out, start, first);
        }
    }

    #[inline(always)]
    fn tile<const R: usize, const C: usize>(&self, out: &mut Rectangle<'_>, row: usize, first: usize) {
        let (start, count) = self.steps;
        let rows: [&[f32]; R] = std::array::from_fn(
            #[inline(always)]
            |r| &self.left.row_and_rest(row + r)[start..start + count],
        );
        let length = self.chains.length;
        for (chain, begin) in (0..count).step_by(length).enumerate() {
            let mut sums = [[Lanes::ZERO; C]; R];
            for step in begin..(begin + length).min(count) {
                let right = self.panel.row::<C>(step, first);
                for r in 0..R {
                    let factor = rows[r][step];
                    for c in 0..C {
                        sums[r][c].add_scaled(factor, &right[c]);
                    }
                }
            }
            // `sums` is only named by constants, so that it stays in registers: what loops over it goes over a copy.
            self.add(out, (row, first), chain, (start + begin == 0, sums));
        }
    }

    /// Adds sums of a chain to what is there, or puts them there if they are the first.
    #[inline(always)]
    fn add<const R: usize, const C: usize>(
        &self,
        out: &mut Rectangle<'_>,
        (row, first): (usize, usize),
        chain: usize,
        (is_first, sums): (bool, [[Lanes; C]; R]),
    ) {
        let columns = self.columns_from::<C>(first);
        match &self.chains.scaling {
            None => {
                for (r, sums) in sums.iter().enumerate() {
                    let to = out.row(row + r, columns.clone());
                    for (sum, to) in sums.iter().zip(to.chunks_exact_mut(LANES)) {
                        let before = if is_first { Lanes::ZERO } else { Lanes::load(to) };
                        (before + *sum).store(to);
                    }
                }
            }
            Some(scaling) => {
                let scale = scaling.of_chain::<C>(chain, first);
                for (r, sums) in sums.iter().enumerate() {
                    let of_row = scaling.of_row(row + r, chain);
                    let to = out.row(row + r, columns.clone());
                    let load = |c: usize| {
                        if is_first { Lanes::ZERO } else { Lanes::load(&to[c * LANES..][..LANES]) }
                    };
                    let after = scale.added(std::array::from_fn::<_, C, _>(load), *sums, of_row);
                    for c in 0..C {
                        after[c].store(&mut to[c * LANES..][..LANES]);
                    }
                }
            }
        }
    }

    /// The columns of `C` vectors.
    #[inline(always)]
    fn columns_from<const C: usize>(&self, first: usize) -> Range<usize> {
        let start = self.column + first * LANES;
        start..start + C * LANES
    }
}
