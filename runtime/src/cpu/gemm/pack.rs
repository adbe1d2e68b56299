//! Second operands laid out for [`multiply`](super::multiply).

use super::blocks::{Blocks, Quantised, QuantisedShape, in_panels};
use super::halves::{Half, Halves};
use super::pages::Pages;
use super::{LANES, Lanes, Matrix};
use crate::team;
use std::ops::Range;

/// Columns per panel.
pub(super) const PANEL: usize = 3 * LANES;
pub(super) const VECTORS: usize = PANEL / LANES;

/// A matrix in panels: the columns of a panel lie next to each other, step by step of the depth; the last panel has only
/// as many vectors as it needs.
pub(crate) struct Packed {
    pub(super) form: Form,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
}

/// In how many bits.
pub(super) enum Form {
    Floats(Pages<Lanes>),
    Halves(Half, Pages<Halves>),
    Blocks(Blocks),
}

/// Vectors of a panel of a matrix of `columns`.
pub(super) fn vectors_of(columns: usize, panel: usize) -> usize {
    (columns - panel * PANEL).min(PANEL).div_ceil(LANES)
}

impl Packed {
    pub(crate) fn new(matrix: &Matrix<'_>) -> Packed {
        let (rows, columns) = (matrix.rows, matrix.columns);
        let mut panels = Pages::zeros(rows * columns.div_ceil(LANES));
        team::for_each(panels.chunks_mut((rows * VECTORS).max(1)).enumerate(), |(panel, to)| {
            let first = panel * PANEL;
            copy_panel(matrix, 0..rows, first..(first + PANEL).min(columns), to);
        });
        Packed { form: Form::Floats(panels), rows, columns }
    }

    /// A matrix of halves, given by their bits.
    pub(crate) fn halves(
        half: Half,
        [rows, columns]: [usize; 2],
        bits: impl Fn(usize, usize) -> u16 + Sync,
    ) -> Packed {
        let panels = in_panels(rows, columns.div_ceil(LANES), |row, vector| {
            std::array::from_fn(|lane| {
                let column = vector * LANES + lane;
                if column < columns { bits(row, column) } else { 0 }
            })
        });
        Packed { form: Form::Halves(half, panels), rows, columns }
    }

    /// Quantised weights as they are, if their blocks allow it.
    pub(crate) fn quantised(shape: QuantisedShape, from: &impl Quantised) -> Option<Packed> {
        let blocks = Blocks::new(shape, from)?;
        Some(Packed { form: Form::Blocks(blocks), rows: shape.depth, columns: shape.columns })
    }

    /// A column, the first step of the depth first.
    pub(crate) fn column(&self, index: usize) -> Box<dyn Iterator<Item = f32> + '_> {
        let within = index % PANEL;
        match &self.form {
            Form::Floats(panels) => {
                let of_panel = self.panel(panels, index / PANEL, (0, self.rows));
                let vectors = vectors_of(self.columns, index / PANEL);
                let vectors = of_panel.iter().skip(within / LANES).step_by(vectors);
                Box::new(vectors.map(move |vector| vector.0[within % LANES]))
            }
            Form::Halves(half, panels) => {
                let of_panel = self.panel(panels, index / PANEL, (0, self.rows));
                let vectors = vectors_of(self.columns, index / PANEL);
                let vectors = of_panel.iter().skip(within / LANES).step_by(vectors);
                Box::new(vectors.map(move |vector| half.widened(vector).0[within % LANES]))
            }
            Form::Blocks(blocks) => Box::new(blocks.column(index)),
        }
    }

    /// Some steps of the depth of a panel: the first, and how many.
    pub(super) fn panel<'a, T>(&self, panels: &'a [T], panel: usize, steps: (usize, usize)) -> &'a [T] {
        let (start, steps) = steps;
        let vectors = vectors_of(self.columns, panel);
        let first = panel * VECTORS * self.rows;
        &panels[first + start * vectors..first + (start + steps) * vectors]
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
