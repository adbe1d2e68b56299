//! Cutting a row-major matrix into rectangles that threads write at the same time.
#![allow(unsafe_code, reason = "rectangles of one matrix share rows, which slices cannot say")]

use std::marker::PhantomData;
use std::ops::Range;

/// A rectangle of a matrix that nobody else writes.
pub(crate) struct Rectangle<'a> {
    first: *mut f32,
    /// From one row to the next.
    stride: usize,
    pub(crate) rows: Range<usize>,
    pub(crate) columns: Range<usize>,
    of: PhantomData<&'a mut [f32]>,
}

// SAFETY: the rectangles of a matrix are disjoint, so each is like a mutable borrow of its elements.
unsafe impl Send for Rectangle<'_> {}

impl Rectangle<'_> {
    /// Elements `columns` of the matrix in row `row` of the rectangle; they must lie within it.
    #[inline(always)]
    pub(crate) fn row(&mut self, row: usize, columns: Range<usize>) -> &mut [f32] {
        assert!(row < self.rows.len() && columns.start <= columns.end);
        assert!(self.columns.start <= columns.start && columns.end <= self.columns.end);
        // SAFETY: the elements lie within the matrix, which outlives `self`, and in no other rectangle; `self` is
        // borrowed as long as they are.
        unsafe {
            let first = self.first.add((self.rows.start + row) * self.stride + columns.start);
            std::slice::from_raw_parts_mut(first, columns.end - columns.start)
        }
    }
}

/// Cuts a matrix of `columns` columns into rectangles of at most `height` rows and `width` columns.
pub(crate) fn rectangles(
    matrix: &mut [f32],
    columns: usize,
    height: usize,
    width: usize,
) -> Vec<Rectangle<'_>> {
    let rows = matrix.len().checked_div(columns).unwrap_or(0);
    let first = matrix.as_mut_ptr();
    let mut all = Vec::new();
    for left in (0..columns).step_by(width.max(1)) {
        for top in (0..rows).step_by(height.max(1)) {
            all.push(Rectangle {
                first,
                stride: columns,
                rows: top..(top + height.max(1)).min(rows),
                columns: left..(left + width.max(1)).min(columns),
                of: PhantomData,
            });
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rectangles_cover_every_element_once() {
        for (rows, columns, height, width) in [(5, 7, 2, 3), (1, 4, 8, 8), (3, 3, 1, 1), (0, 4, 2, 2)] {
            let mut matrix = vec![0.0; rows * columns];
            for mut rectangle in rectangles(&mut matrix, columns, height, width) {
                for row in 0..rectangle.rows.len() {
                    let all = rectangle.columns.clone();
                    rectangle.row(row, all).iter_mut().for_each(|x| *x += 1.0);
                }
            }
            assert!(matrix.iter().all(|&x| x == 1.0));
        }
    }
}
