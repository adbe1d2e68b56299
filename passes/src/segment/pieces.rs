//! Pieces of a segment: runs of groups that only one group leads into and that use at most one group below them, such as
//! the way from a norm to the rotated queries. What a piece does depends on nothing that is demanded elsewhere, so it is
//! solved once per demand on its two ends, however many other demands pass it by. Pieces hold pieces.

use super::uses;
use crate::layout_graph::LayoutGraph;
use std::collections::BTreeSet;

/// Longest piece, in groups.
const LONGEST: u32 = 128;
/// Fewest groups of a piece.
const SHORTEST: u32 = 3;

/// Groups `low..high`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    pub low: u32,
    pub high: u32,
    /// The same for all alike pieces of alike segments, and for no others.
    pub number: u32,
    /// Planned groups below `low` that something in the piece uses, ascending.
    pub touched: Vec<u32>,
    /// Pieces within, highest first.
    pub inner: Vec<Piece>,
}

/// The largest pieces of groups `low..high` that are not the whole of it, highest first. `last_use` tells per group the
/// last one that uses it.
pub(super) fn pieces(graph: &LayoutGraph, last_use: &[u32], low: u32, high: u32) -> Vec<Piece> {
    find(graph, last_use, (low, high), &mut 0)
}

fn find(graph: &LayoutGraph, last_use: &[u32], (low, high): (u32, u32), count: &mut u32) -> Vec<Piece> {
    let mut found = Vec::new();
    let mut end = high;
    while end > low {
        let Some((start, touched)) = longest(graph, last_use, (low, high), end) else {
            end -= 1;
            continue;
        };
        *count += 1;
        let number = *count;
        let inner = find(graph, last_use, (start, end), count);
        found.push(Piece { low: start, high: end, number, touched, inner });
        end = start;
    }
    found
}

/// The longest piece that ends at `end`: where it starts, and what it uses below.
fn longest(
    graph: &LayoutGraph,
    last_use: &[u32],
    (low, high): (u32, u32),
    end: u32,
) -> Option<(u32, Vec<u32>)> {
    let mut best = None;
    let mut touched: BTreeSet<u32> = BTreeSet::new();
    let mut heads = 0;
    for start in (low.max(end.saturating_sub(LONGEST))..end).rev() {
        touched.remove(&start);
        if graph.is_planned(start) {
            touched.extend(uses(graph, start, start + 1));
            heads += u32::from(last_use[start as usize] >= end);
        }
        if heads > 1 {
            break;
        }
        let is_whole = (start, end) == (low, high);
        if heads == 1 && touched.len() <= 1 && end - start >= SHORTEST && !is_whole {
            best = Some((start, touched.iter().copied().collect()));
        }
    }
    best
}
