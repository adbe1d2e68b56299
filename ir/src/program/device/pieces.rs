//! Products in pieces of their rows, so that what is summed over ranks travels while the next piece is computed.
//!
//! The pieces of a result follow one another in memory, every element is computed by the same calls as in the whole, and
//! into how many pieces a product is cut follows from its rows and a table that all ranks have alike.

use super::{DeviceStep, How};
use crate::dim::{Bindings, Dim, EvalError};
use crate::graph::Graph;
use crate::{Conversion, Monoid, Op, ValueId};

/// The symbols of a piece: its first row, and its number of rows.
pub const PIECE_START: &str = "@row";
pub const PIECE_ROWS: &str = "@rows";

/// Fewest rows of a piece: products of fewer are made by other kernels.
pub const LEAST_PIECE: u64 = 16;
/// Rows that large pieces begin at multiples of, since products are made in tiles of as many.
pub const TILE_ROWS: u64 = 128;
/// Most pieces of a product.
pub const MOST_PIECES: u32 = 64;

/// From how many rows on a product is made in how many pieces, ascending.
pub type PieceCounts = Vec<(u64, u32)>;

/// A product in pieces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pieces {
    /// All rows.
    pub rows: Dim,
    /// Elements of a row of the result, which has no others.
    pub row: Dim,
    pub counts: PieceCounts,
    /// The calls of one piece, in terms of [`PIECE_START`] and [`PIECE_ROWS`]: [`How::Launch`] or [`How::Product`].
    pub how: How,
}

/// The rows of every piece if `rows` are cut into `count`; fewer pieces where there are too few rows.
pub fn row_pieces(rows: u64, count: u32) -> Vec<u64> {
    let count = u64::from(count.min(MOST_PIECES)).min(rows / LEAST_PIECE);
    if count < 2 {
        return vec![rows];
    }
    let unit = if rows / count >= TILE_ROWS { TILE_ROWS } else { LEAST_PIECE };
    // Sizes beyond memory are refused elsewhere.
    let start =
        |piece: u64| if piece == count { rows } else { rows.saturating_mul(piece) / count / unit * unit };
    (0..count).map(|piece| start(piece + 1) - start(piece)).collect()
}

/// The rows of every piece of a product of so many rows; one if `counts` has none for it.
pub fn pieces_of(counts: &[(u64, u32)], rows: u64) -> Vec<u64> {
    let count = counts.iter().take_while(|(from, _)| *from <= rows).last().map_or(1, |(_, count)| *count);
    row_pieces(rows, count)
}

/// The operand of a conversion that sums all of a value over ranks.
pub fn summed(graph: &Graph, value: ValueId) -> Option<ValueId> {
    let node = graph.node(value);
    match (&node.op, node.args.first()) {
        (Op::Convert(Conversion::AllReduce { monoid: Monoid::Sum, .. }), Some(&from)) => Some(from),
        _ => None,
    }
}

impl Pieces {
    /// The rows of every piece under these bindings.
    ///
    /// # Errors
    /// The number of rows has no value.
    pub fn cut(&self, bindings: &Bindings) -> Result<Vec<u64>, EvalError> {
        let rows = self.rows.eval(bindings)?;
        Ok(pieces_of(&self.counts, u64::try_from(rows).unwrap_or(0)))
    }

    /// What is wrong with pieces of the value that `step` makes, besides their calls.
    pub(super) fn fault(&self, step: &DeviceStep, graph: &Graph) -> Option<String> {
        let counts = &self.counts;
        let ascending = counts.windows(2).all(|pair| pair[0].0 < pair[1].0);
        let possible = |&(_, count): &(u64, u32)| (1..=MOST_PIECES).contains(&count);
        if counts.is_empty() || !ascending || !counts.iter().all(possible) {
            return Some("the table of its pieces is not in order".into());
        }
        let alike = matches!(
            (&step.how, &self.how),
            (How::Launch(_) | How::Product(_), How::Launch(_) | How::Product(_))
        );
        if !alike || self.how.launches().is_empty() {
            return Some("nothing makes its pieces".into());
        }
        let piece = DeviceStep { how: self.how.clone(), ..step.clone() };
        let known = step.reads(graph);
        let stranger = piece.reads(graph).into_iter().find(|read| known.binary_search(read).is_err());
        stranger.map(|read| format!("its pieces read {read}, which the whole does not"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_all_rows_and_none_is_small() {
        for rows in [0, 1, 15, 31, 32, 33, 100, 127, 255, 256, 257, 300, 1000, 2048, 5000] {
            for count in [0, 1, 2, 3, 4, 7, 64, 1000] {
                let pieces = row_pieces(rows, count);
                assert_eq!(pieces.iter().sum::<u64>(), rows, "{rows} in {count}: {pieces:?}");
                let small = pieces.len() > 1 && pieces.iter().any(|&piece| piece < LEAST_PIECE);
                assert!(!small && pieces.len() <= count.max(1) as usize, "{rows} in {count}: {pieces:?}");
            }
        }
        assert_eq!(row_pieces(2048, 4), [512; 4]);
        // Where pieces are large, they begin where tiles do.
        assert_eq!(row_pieces(1000, 3), [256, 384, 360]);
        assert_eq!(row_pieces(40, 2), [16, 24]);
        assert_eq!(row_pieces(31, 2), [31]);
    }

    #[test]
    fn the_last_line_that_fits_counts() {
        let counts = [(256, 2), (1024, 4), (4096, 1)];
        for (rows, pieces) in [(255, 1), (256, 2), (1023, 2), (1024, 4), (4096, 1)] {
            assert_eq!(pieces_of(&counts, rows).len(), pieces, "{rows}");
        }
        assert_eq!(pieces_of(&[], 4096), [4096]);
    }
}
