//! Second operands laid out for [`multiply`](super::multiply).

use super::pages::zeros;
use super::{LANES, Lanes, Matrix};
use rayon::prelude::*;
use std::ops::Range;

/// Columns per panel.
pub(super) const PANEL: usize = 3 * LANES;
const VECTORS: usize = PANEL / LANES;

/// A matrix in panels: the columns of a panel lie next to each other, step by step of the depth; the last panel has only
/// as many vectors as it needs.
#[derive(Clone, Debug)]
pub(crate) struct Packed {
    panels: Vec<Lanes>,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
}

impl Packed {
    pub(crate) fn new(matrix: &Matrix<'_>) -> Packed {
        let (rows, columns) = (matrix.rows, matrix.columns);
        let mut panels = zeros(rows * columns.div_ceil(LANES));
        panels.par_chunks_mut((rows * VECTORS).max(1)).enumerate().for_each(|(panel, to)| {
            let first = panel * PANEL;
            copy_panel(matrix, 0..rows, first..(first + PANEL).min(columns), to);
        });
        Packed { panels, rows, columns }
    }

    /// A column, the first step of the depth first.
    pub(crate) fn column(&self, index: usize) -> impl Iterator<Item = f32> + '_ {
        let (panel, within) = (index / PANEL, index % PANEL);
        let vectors = (self.columns - panel * PANEL).min(PANEL).div_ceil(LANES);
        let from = &self.panels[panel * VECTORS * self.rows..][..self.rows * vectors];
        from.iter().skip(within / LANES).step_by(vectors).map(move |vector| vector.0[within % LANES])
    }

    /// Some steps of the depth of a panel: the first, and how many.
    pub(super) fn panel(&self, panel: usize, (start, steps): (usize, usize)) -> &[Lanes] {
        let vectors = (self.columns - panel * PANEL).min(PANEL).div_ceil(LANES);
        let first = panel * VECTORS * self.rows;
        &self.panels[first + start * vectors..first + (start + steps) * vectors]
    }
}

/// Packs `columns` of `steps` of the depth into `scratch`.
pub(super) fn pack_panel(
    matrix: &Matrix<'_>,
    steps: Range<usize>,
    columns: Range<usize>,
    scratch: &mut Vec<Lanes>,
) {
    scratch.resize(steps.len() * columns.len().div_ceil(LANES), Lanes::ZERO);
    copy_panel(matrix, steps, columns, scratch);
}

fn copy_panel(matrix: &Matrix<'_>, steps: Range<usize>, columns: Range<usize>, to: &mut [Lanes]) {
    let vectors = columns.len().div_ceil(LANES);
    for (step, to) in steps.zip(to.chunks_exact_mut(vectors.max(1))) {
        let from = &matrix.elements[step * matrix.row_stride..];
        for (vector, to) in to.iter_mut().enumerate() {
            let first = columns.start + vector * LANES;
            let count = LANES.min(columns.end - first);
            if matrix.column_stride == 1 {
                *to = Lanes::load_part(&from[first..first + count]);
            } else {
                let column = |lane: usize| from[(first + lane) * matrix.column_stride];
                *to = Lanes(std::array::from_fn(|lane| if lane < count { column(lane) } else { 0.0 }));
            }
        }
    }
}
