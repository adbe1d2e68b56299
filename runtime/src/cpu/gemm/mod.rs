//! Matrix products.
//!
//! The depth is cut into blocks of 128 steps. Every element of a product is one chain of fused multiply-adds per block, and
//! the blocks are added in order (which also rounds less than one long chain would). So its bits depend on its row, its
//! column and nothing else: not on the shape of the matrices, the number of threads or ranks, or the instructions of the
//! machine.
//!
//! The second operand is laid out in panels: 48 columns next to each other, one step of the depth after the other.
//! Weights are packed once; other operands are read in place if their columns lie next to each other, and packed panel by
//! panel if not. A tile of up to eight rows and one panel is kept in registers.

mod blocks;
mod bytes;
mod dot;
mod halves;
mod pack;
mod pages;
mod plane;
mod tile;

pub(crate) use blocks::{Quantised, QuantisedShape};
pub(crate) use halves::Half;
pub(crate) use pack::Packed;
pub(crate) use plane::{Rectangle, rectangles};

use super::vector::{Isa, LANES, Lanes, vectorised};
use crate::team;
use blocks::{Blocks, Scaling};
use bytes::Factors;
use halves::InHalves;
use pack::{Form, PANEL, VECTORS, pack_panel, vectors_of};
use std::ops::Range;
use tile::{InPanel, InPlace, multiply_long_row, multiply_rows};

/// Steps of the depth that are summed in one chain.
const BLOCK: usize = 128;
/// Steps of the depth that are done for a whole rectangle before the next, in whole blocks: a panel of them stays in a
/// core's second cache.
const DEPTH: usize = 16 * BLOCK;
/// Columns that a single row multiplies at once where they are read in place.
const LONG: usize = 16 * LANES;
/// Rows up to which narrow weights are widened anew for each; for more, a panel of them is widened once.
const FEW: usize = 3;
/// Multiplications from which on a product is worth a second thread.
const SHARED_FROM: usize = 32 * 1024;

/// A matrix over elements that may be strided.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix<'a> {
    elements: &'a [f32],
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// # Errors
    /// The matrix does not lie within its elements.
    pub(crate) fn new(
        elements: &'a [f32],
        [rows, columns]: [usize; 2],
        [row_stride, column_stride]: [usize; 2],
    ) -> Result<Matrix<'a>, String> {
        let last = rows.saturating_sub(1).checked_mul(row_stride).and_then(|r| {
            columns.saturating_sub(1).checked_mul(column_stride).and_then(|c| r.checked_add(c))
        });
        if rows > 0 && columns > 0 && last.is_none_or(|last| last >= elements.len()) {
            return Err("a matrix leaves its tensor".into());
        }
        Ok(Matrix { elements, rows, columns, row_stride, column_stride })
    }

    /// Elements from those of `row` on.
    #[inline(always)]
    fn row_and_rest(&self, row: usize) -> &'a [f32] {
        &self.elements[row * self.row_stride..]
    }

    /// Some of the rows.
    fn rows_within(&self, rows: Range<usize>) -> Matrix<'a> {
        Matrix { elements: self.row_and_rest(rows.start), rows: rows.len(), ..*self }
    }

    /// The elements of a matrix whose rows have to be walked one by one.
    fn row_major(&self) -> Vec<f32> {
        let mut copy = Vec::with_capacity(self.rows * self.columns);
        for row in 0..self.rows {
            let from = self.row_and_rest(row);
            copy.extend((0..self.columns).map(|column| from[column * self.column_stride]));
        }
        copy
    }
}

/// The second operand of a product.
#[derive(Clone, Copy)]
pub(crate) enum Right<'a> {
    Packed(&'a Packed),
    Matrix(Matrix<'a>),
}

impl Right<'_> {
    fn shape(&self) -> [usize; 2] {
        match self {
            Right::Packed(packed) => [packed.rows, packed.columns],
            Right::Matrix(matrix) => [matrix.rows, matrix.columns],
        }
    }
}

/// `out = left · right`, row-major.
///
/// # Errors
/// The shapes do not fit.
pub(crate) fn multiply(out: &mut [f32], left: Matrix<'_>, right: Right<'_>) -> Result<(), String> {
    let [depth, columns] = right.shape();
    let rows = left.rows;
    if left.columns != depth || out.len() != rows * columns {
        return Err(format!(
            "a product of {rows}x{} with {depth}x{columns} into {}",
            left.columns,
            out.len()
        ));
    }
    if out.is_empty() {
        return Ok(());
    }
    if depth == 0 {
        out.fill(0.0);
        return Ok(());
    }
    let copy;
    let left = if left.column_stride == 1 || depth == 1 {
        left
    } else {
        copy = left.row_major();
        Matrix::new(&copy, [rows, depth], [depth, 1])?
    };
    match right {
        Right::Packed(Packed { form: Form::Blocks(blocks), .. }) => {
            multiply_blocks(out, [rows, depth, columns], &Factors::new(left, blocks), blocks);
        }
        _ => in_rectangles(out, [rows, depth, columns], |out| Task { left, right }.fill(out)),
    }
    Ok(())
}

/// A product with quantised weights.
fn multiply_blocks(out: &mut [f32], shape: [usize; 3], factors: &Factors<'_>, blocks: &Blocks) {
    in_rectangles(out, shape, |mut out| {
        let first = out.rows.start;
        for_panels(
            &mut out,
            |_| PANEL,
            |out, column, columns, scratch| {
                blocks.fill_panel(out, (column, columns.start / PANEL), (factors, first), scratch);
            },
        );
    });
}

/// Cuts a product into rectangles that start at panels and, but for the first, at a multiple of eight rows, and has
/// threads compute them.
fn in_rectangles(
    out: &mut [f32],
    [rows, depth, columns]: [usize; 3],
    fill: impl Fn(Rectangle<'_>) + Send + Sync,
) {
    let threads = if rows * columns * depth < SHARED_FROM { 1 } else { team::threads() };
    if threads == 1 {
        rectangles(out, columns, rows, columns).into_iter().for_each(fill);
        return;
    }
    // Several rectangles per thread, so that a slow one does not hold up the others for long; rows are cut only where
    // there are few columns, as each cut reads the columns again.
    let panels = columns.div_ceil(PANEL);
    let width = panels.div_ceil(4 * threads).max(1) * PANEL;
    let across = columns.div_ceil(width);
    let height = if across >= 2 * threads { rows } else { rows.div_ceil(threads).next_multiple_of(8) };
    team::for_each(rectangles(out, columns, height, width).into_iter(), fill);
}

/// Computes a rectangle panel by panel, or what `width` of the rest says, with some scratch memory.
fn for_panels(
    out: &mut Rectangle<'_>,
    width: impl Fn(usize) -> usize,
    mut fill: impl FnMut(&mut Rectangle<'_>, usize, Range<usize>, &mut Vec<Lanes>),
) {
    let mut scratch: Vec<Lanes> = Vec::new();
    let rows = out.rows.len();
    let mut next = out.columns.start;
    while next < out.columns.end {
        let (column, end) = (next, (next + width(out.columns.end - next)).min(out.columns.end));
        next = end;
        if (end - column).is_multiple_of(LANES) {
            fill(out, column, column..end, &mut scratch);
            continue;
        }
        // Tiles write whole vectors.
        let width = (end - column).next_multiple_of(LANES);
        let mut edge = vec![0.0; rows * width];
        for mut edge in rectangles(&mut edge, width, rows, width) {
            fill(&mut edge, 0, column..end, &mut scratch);
        }
        for (row, edge) in edge.chunks(width).enumerate() {
            out.row(row, column..end).copy_from_slice(&edge[..end - column]);
        }
    }
}

/// A product but of quantised weights.
#[derive(Clone, Copy)]
struct Task<'a> {
    left: Matrix<'a>,
    right: Right<'a>,
}

impl Task<'_> {
    /// Computes a rectangle of the product, which starts at a panel.
    fn fill(&self, mut out: Rectangle<'_>) {
        let part = Task { left: self.left.rows_within(out.rows.clone()), ..*self };
        let in_place = matches!(self.right, Right::Matrix(matrix) if matrix.column_stride == 1);
        // A single row reads its columns once, so what matters is that they lie next to each other.
        let long = |rest: usize| in_place && part.left.rows == 1 && rest >= LONG;
        let width = |rest: usize| if long(rest) { LONG } else { PANEL };
        for_panels(&mut out, width, |out, column, columns, scratch| {
            part.fill_panel(out, column, columns, scratch);
        });
    }

    /// Computes the columns of a panel, and puts them at `column` of `out`.
    fn fill_panel(
        &self,
        out: &mut Rectangle<'_>,
        column: usize,
        columns: Range<usize>,
        scratch: &mut Vec<Lanes>,
    ) {
        let Task { left, right } = *self;
        let vectors = columns.len().div_ceil(LANES);
        for start in (0..left.columns).step_by(DEPTH) {
            let steps = (start, DEPTH.min(left.columns - start));
            let whole = Chains { length: BLOCK, scaling: None };
            match right {
                Right::Packed(packed) => {
                    let number = columns.start / PANEL;
                    match &packed.form {
                        Form::Floats(panels) => {
                            let panel = packed.panel(panels, number, steps);
                            add_panel(out, column, left, steps, InPanel { panel, vectors }, vectors, whole);
                        }
                        Form::Halves(half, panels) => {
                            let panel = packed.panel(panels, number, steps);
                            let panel = InHalves { panel, vectors, half: *half };
                            if left.rows <= FEW {
                                add_panel(out, column, left, steps, panel, vectors, whole);
                                continue;
                            }
                            widen(panel, scratch);
                            let panel = InPanel { panel: scratch, vectors };
                            add_panel(out, column, left, steps, panel, vectors, whole);
                        }
                        Form::Blocks(_) => unreachable!("quantised weights have products of their own"),
                    }
                }
                Right::Matrix(matrix) if matrix.column_stride == 1 && columns.len() == vectors * LANES => {
                    let from = &matrix.elements[start * matrix.row_stride + columns.start..];
                    let panel = InPlace { from, stride: matrix.row_stride };
                    if columns.len() == LONG {
                        let row = &left.row_and_rest(0)[start..start + steps.1];
                        vectorised(
                            #[inline(always)]
                            |_| multiply_long_row(out, row, start, column, panel),
                        );
                    } else {
                        add_panel(out, column, left, steps, panel, vectors, whole);
                    }
                }
                Right::Matrix(matrix) => {
                    pack_panel(&matrix, start..start + steps.1, columns.clone(), scratch);
                    let panel = InPanel { panel: scratch, vectors };
                    add_panel(out, column, left, steps, panel, vectors, whole);
                }
            }
        }
    }
}

/// How the depth is summed: in chains of a length, each of which may be scaled.
#[derive(Clone, Copy)]
struct Chains<'a> {
    length: usize,
    scaling: Option<Scaling<'a>>,
}

/// Adds some steps of the depth to all rows of a panel.
fn add_panel<P: tile::Panel>(
    out: &mut Rectangle<'_>,
    column: usize,
    left: Matrix<'_>,
    steps: (usize, usize),
    panel: P,
    vectors: usize,
    chains: Chains<'_>,
) {
    vectorised(
        #[inline(always)]
        |isa| multiply_rows(isa == Isa::Avx512, out, left, steps, column, (vectors, panel), chains),
    );
}

/// A panel of halves as floats.
fn widen(panel: InHalves<'_>, scratch: &mut Vec<Lanes>) {
    scratch.resize(panel.panel.len(), Lanes::ZERO);
    vectorised(
        #[inline(always)]
        |_| scratch.iter_mut().zip(panel.panel).for_each(|(to, from)| *to = panel.half.widened(from)),
    );
}

#[cfg(test)]
mod tests {
    use super::super::vector::vectorised_for;
    use super::*;

    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    /// What every element is by definition.
    fn by_definition(a: &[f32], b: &[f32], [rows, depth, columns]: [usize; 3]) -> Vec<f32> {
        let element = |i: usize| {
            let (row, column) = (i / columns, i % columns);
            let steps: Vec<usize> = (0..depth).collect();
            let one = |sum: f32, &k: &usize| a[row * depth + k].mul_add(b[k * columns + column], sum);
            steps.chunks(128).map(|block| block.iter().fold(0f32, one)).fold(0f32, |sum, block| sum + block)
        };
        (0..rows * columns).map(element).collect()
    }

    #[test]
    fn every_element_is_the_same_sum_whatever_the_shapes_and_strides() {
        let shapes =
            [[1, 1, 1], [1, 7, 16], [3, 33, 50], [9, 5, 48], [17, 64, 97], [2, 2100, 49], [40, 3, 200]];
        for shape @ [rows, depth, columns] in shapes {
            let (a, b) = (numbers(rows * depth, 1), numbers(depth * columns, 2));
            let expected = by_definition(&a, &b, shape);
            let left = Matrix::new(&a, [rows, depth], [depth, 1]).unwrap();
            let right = Matrix::new(&b, [depth, columns], [columns, 1]).unwrap();
            let turned: Vec<f32> = (0..columns * depth).map(|i| b[i % depth * columns + i / depth]).collect();
            let across = Matrix::new(&turned, [depth, columns], [1, depth]).unwrap();
            let packed = [Packed::new(&right), Packed::new(&across)];
            let rights = [Right::Matrix(right), Right::Matrix(across)];
            for right in rights.into_iter().chain(packed.iter().map(Right::Packed)) {
                let mut out = vec![f32::NAN; rows * columns];
                multiply(&mut out, left, right).unwrap();
                assert_eq!(out, expected, "{shape:?}");
            }
            let turned: Vec<f32> = (0..rows * depth).map(|i| a[i % rows * depth + i / rows]).collect();
            let mut out = vec![f32::NAN; rows * columns];
            let left = Matrix::new(&turned, [rows, depth], [1, rows]).unwrap();
            multiply(&mut out, left, Right::Packed(&packed[0])).unwrap();
            assert_eq!(out, expected, "{shape:?} with the first operand turned");
        }
    }

    #[test]
    fn all_instructions_give_the_same_bits() {
        let [rows, depth, columns] = [13, 70, 112];
        let (a, b) = (numbers(rows * depth, 3), numbers(depth * columns, 4));
        let expected = by_definition(&a, &b, [rows, depth, columns]);
        let left = Matrix::new(&a, [rows, depth], [depth, 1]).unwrap();
        let packed = Packed::new(&Matrix::new(&b, [depth, columns], [columns, 1]).unwrap());
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_there()) {
            let mut out = vec![0.0; rows * columns];
            let mut whole = rectangles(&mut out, columns, rows, columns).remove(0);
            for (panel, column) in (0..columns / LANES * LANES).step_by(PANEL).enumerate() {
                let vectors = ((columns - column) / LANES).min(PANEL / LANES);
                let Form::Floats(panels) = &packed.form else { unreachable!("it was packed as floats") };
                let panel = InPanel { panel: packed.panel(panels, panel, (0, depth)), vectors };
                let chains = Chains { length: BLOCK, scaling: None };
                vectorised_for(
                    isa,
                    #[inline(always)]
                    |isa| {
                        multiply_rows(
                            isa == Isa::Avx512,
                            &mut whole,
                            left,
                            (0, depth),
                            column,
                            (vectors, panel),
                            chains,
                        )
                    },
                );
            }
            assert_eq!(out, expected, "{isa:?}");
        }
    }

    #[test]
    fn halves_multiply_as_the_floats_they_are() {
        for half in [Half::F16, Half::Bf16] {
            let bits = |x: f32| match half {
                Half::F16 => half::f16::from_f32(x).to_bits(),
                Half::Bf16 => half::bf16::from_f32(x).to_bits(),
            };
            let narrow = |x: f32| match half {
                Half::F16 => half::f16::from_f32(x).to_f32(),
                Half::Bf16 => half::bf16::from_f32(x).to_f32(),
            };
            for shape @ [rows, depth, columns] in [[1, 40, 50], [2, 7, 16], [9, 2100, 49]] {
                let b: Vec<f32> = numbers(depth * columns, 2).into_iter().map(narrow).collect();
                let a = numbers(rows * depth, 1);
                let left = Matrix::new(&a, [rows, depth], [depth, 1]).unwrap();
                let packed = Packed::halves(half, [depth, columns], |k, c| bits(b[k * columns + c]));
                let mut out = vec![f32::NAN; rows * columns];
                multiply(&mut out, left, Right::Packed(&packed)).unwrap();
                assert_eq!(out, by_definition(&a, &b, shape), "{half:?} {shape:?}");
                assert!(packed.column(columns - 1).eq((0..depth).map(|k| b[k * columns + columns - 1])));
            }
        }
    }

    struct Numbers {
        seed: usize,
        nibbles: bool,
        zero: fn(usize) -> i16,
    }

    impl Quantised for Numbers {
        fn code(&self, step: usize, column: usize) -> i8 {
            let code = ((step * 31 + column * 7 + self.seed) % 251) as u8 as i8;
            if self.nibbles { code << 4 >> 4 } else { code }
        }
        fn scale(&self, block: usize, column: usize) -> f32 {
            0.01 + ((block * 5 + column) % 17) as f32 / 64.0
        }
        fn zero(&self, block: usize, column: usize) -> i16 {
            (self.zero)(block * 3 + column)
        }
    }

    #[test]
    fn quantised_weights_multiply_as_the_weights_they_stand_for() {
        for zero in [|_| 0i16, |at| (at % 9) as i16 - 4] {
            for (nibbles, block) in [(true, 16), (true, 32), (true, 256), (false, 32), (false, 64)] {
                let from = Numbers { seed: 3, nibbles, zero };
                for [rows, depth, columns] in [[1, 64, 16], [2, 96, 50], [5, 2208, 97], [40, 80, 200]] {
                    let shape = QuantisedShape { depth, columns, block, nibbles };
                    let packed = Packed::quantised(shape, &from).unwrap();
                    let weight = |k: usize, c: usize| {
                        f32::from(i16::from(from.code(k, c)) - from.zero(k / block, c))
                            * from.scale(k / block, c)
                    };
                    let a = numbers(rows * depth, 1);
                    let left = Matrix::new(&a, [rows, depth], [depth, 1]).unwrap();
                    let mut out = vec![f32::NAN; rows * columns];
                    multiply(&mut out, left, Right::Packed(&packed)).unwrap();
                    for (i, &found) in out.iter().enumerate() {
                        let (row, c) = (i / columns, i % columns);
                        let terms =
                            (0..depth).map(|k| f64::from(a[row * depth + k]) * f64::from(weight(k, c)));
                        let (sum, size) = terms.fold((0.0, 0.0), |(s, n), t| (s + t, n + f64::abs(t)));
                        assert!(
                            (f64::from(found) - sum).abs() <= 2e-6 * size,
                            "{shape:?} {i}: {found} {sum}"
                        );
                    }
                    // A row has the bits it has alone.
                    let mut alone = vec![f32::NAN; columns];
                    let last = Matrix::new(&a[(rows - 1) * depth..], [1, depth], [depth, 1]).unwrap();
                    multiply(&mut alone, last, Right::Packed(&packed)).unwrap();
                    assert_eq!(alone, out[(rows - 1) * columns..], "{shape:?}");
                    let column: Vec<f32> = (0..depth).map(|k| weight(k, columns - 1)).collect();
                    assert!(packed.column(columns - 1).eq(column));
                }
            }
        }
    }

    /// Rounds every block of a row to bytes times a scale, as models do.
    fn round_to_bytes(row: &mut [f32], block: usize) {
        for block in row.chunks_mut(block) {
            let largest = block.iter().fold(0f32, |most, x| most.max(x.abs()));
            let scale = largest / 127.0;
            block.iter_mut().for_each(|x| *x = (*x * (127.0 / largest)).round_ties_even() * scale);
        }
    }

    #[test]
    fn rows_that_are_bytes_have_the_same_bits_in_integers_as_in_floats_and_next_to_others() {
        for zero in [|_| 0i16, |at| (at % 9) as i16 - 4] {
            for (nibbles, block) in [(true, 16), (true, 32), (true, 256), (false, 32), (false, 256)] {
                let from = Numbers { seed: 5, nibbles, zero };
                for [rows, depth, columns] in [[1, 64, 16], [3, 96, 50], [15, 2208, 97], [40, 320, 200]] {
                    let shape = QuantisedShape { depth, columns, block, nibbles };
                    let packed = Packed::quantised(shape, &from).unwrap();
                    let Form::Blocks(blocks) = &packed.form else { unreachable!("it was packed as blocks") };
                    let mut a = numbers(rows * depth, 1);
                    a.chunks_mut(depth).for_each(|row| round_to_bytes(row, block));
                    let left = Matrix::new(&a, [rows, depth], [depth, 1]).unwrap();
                    let product = |integers: bool| {
                        let mut out = vec![f32::NAN; rows * columns];
                        let factors = Factors::with(left, blocks, integers);
                        assert!(factors.bytes().is_some() == integers && !factors.scales().is_empty());
                        multiply_blocks(&mut out, [rows, depth, columns], &factors, blocks);
                        out
                    };
                    let in_floats = product(false);
                    for (i, &found) in in_floats.iter().enumerate() {
                        let (row, c) = (i / columns, i % columns);
                        let term = |k: usize| {
                            let code = i16::from(from.code(k, c)) - from.zero(k / block, c);
                            f64::from(a[row * depth + k])
                                * f64::from(code)
                                * f64::from(from.scale(k / block, c))
                        };
                        let (sum, size) =
                            (0..depth).fold((0.0, 0.0), |(s, n), k| (s + term(k), n + term(k).abs()));
                        assert!(
                            (f64::from(found) - sum).abs() <= 1e-6 * size,
                            "{shape:?} {i}: {found} {sum}"
                        );
                    }
                    if dot::is_there() {
                        assert!(product(true) == in_floats, "{shape:?}");
                    }
                    // Rows that are no bytes leave the others as they are.
                    let mut mixed = a.clone();
                    mixed[..depth].copy_from_slice(&numbers(depth, 9));
                    let left = Matrix::new(&mixed, [rows, depth], [depth, 1]).unwrap();
                    let mut out = vec![f32::NAN; rows * columns];
                    multiply(&mut out, left, Right::Packed(&packed)).unwrap();
                    assert!(out[columns..] == in_floats[columns..] && out[..columns] != in_floats[..columns]);
                }
            }
        }
    }

    #[test]
    fn blocks_that_chains_do_not_fit_are_not_packed() {
        let from = Numbers { seed: 1, nibbles: true, zero: |_| 0 };
        let shape = QuantisedShape { depth: 64, columns: 16, block: 32, nibbles: true };
        assert!(Packed::quantised(shape, &from).is_some());
        assert!(Packed::quantised(QuantisedShape { block: 24, ..shape }, &from).is_none());
        assert!(Packed::quantised(QuantisedShape { block: 8, ..shape }, &from).is_none());
        assert!(Packed::quantised(QuantisedShape { depth: 63, ..shape }, &from).is_none());
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() {
        let elements = [1.0; 6];
        assert!(Matrix::new(&elements, [2, 3], [4, 1]).is_err());
        let matrix = Matrix::new(&elements, [2, 3], [3, 1]).unwrap();
        assert!(multiply(&mut [0.0; 4], matrix, Right::Matrix(matrix)).is_err());
        let empty = Matrix::new(&[], [2, 0], [0, 1]).unwrap();
        let mut out = [f32::NAN; 4];
        multiply(&mut out, empty, Right::Matrix(Matrix::new(&[], [0, 2], [2, 1]).unwrap())).unwrap();
        assert_eq!(out, [0.0; 4]);
    }
}
