//! Cutting a layout graph into segments, and seeing which segments are alike.
//!
//! Between two neighbouring groups runs a frontier: the planned groups above it that something below it uses. A
//! *cut* is a place where the frontier is smallest for some distance around, in a transformer the residual stream
//! before and after each block. What happens between two cuts depends only on what is demanded at the upper one, so
//! segments that look alike, names of weights aside, are solved once.

mod pieces;

pub use pieces::Piece;

use crate::layout_graph::{GroupKind, LayoutGraph, Operand};
use std::collections::{BTreeMap, BTreeSet};

/// How far a frontier looks for smaller ones, in groups.
const REACH: usize = 24;
/// Fewest groups of a segment.
const SHORTEST: usize = 8;

/// Groups `low..high`, with the frontiers at both ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    pub low: u32,
    pub high: u32,
    /// Planned groups below `high` that something at or above it uses, ascending.
    pub top: Vec<u32>,
    /// Planned groups below `low` that something at or above it uses, ascending.
    pub bottom: Vec<u32>,
    /// The members of `bottom` that something in the segment uses.
    pub touched: Vec<u32>,
    /// Equal for segments that are alike.
    pub shape: usize,
    /// Its largest pieces, highest first.
    pub pieces: Vec<Piece>,
}

impl Segment {
    /// A name for `group` that is the same in all segments of one shape.
    pub fn relative(&self, group: u32) -> Option<u32> {
        self.range().relative(group)
    }

    /// The groups of the segment, for a search.
    pub(crate) fn range(&self) -> Range<'_> {
        let Segment { low, high, shape, touched, pieces, .. } = self;
        Range { low: *low, high: *high, name: (*shape, 0), touched, pieces }
    }
}

/// The shape of a segment and the number of a piece in it, 0 for the whole.
pub(crate) type RangeName = (usize, u32);

/// Groups that are solved together: a segment or a piece of one.
#[derive(Clone, Copy)]
pub(crate) struct Range<'a> {
    pub(crate) low: u32,
    pub(crate) high: u32,
    /// The same for all that are alike.
    pub(crate) name: RangeName,
    touched: &'a [u32],
    pub(crate) pieces: &'a [Piece],
}

impl<'a> Range<'a> {
    /// A piece of this range.
    pub(crate) fn piece(&self, piece: &'a Piece) -> Range<'a> {
        let Piece { low, high, number, touched, inner } = piece;
        Range { low: *low, high: *high, name: (self.name.0, *number), touched, pieces: inner }
    }

    /// A name for `group` that is the same in all ranges of one name.
    pub(crate) fn relative(&self, group: u32) -> Option<u32> {
        if (self.low..self.high).contains(&group) {
            return Some(self.high - 1 - group);
        }
        let place = self.touched.binary_search(&group).ok()?;
        u32::try_from(place).ok().and_then(|p| p.checked_add(1 << 31))
    }

    /// The group that [`Range::relative`] named.
    pub(crate) fn absolute(&self, name: u32) -> Option<u32> {
        match name.checked_sub(1 << 31) {
            Some(place) => self.touched.get(place as usize).copied(),
            None => (self.high - 1).checked_sub(name),
        }
    }
}

/// The segments of `graph`, last first, as plans are made from the outputs to the inputs.
pub fn segments(graph: &LayoutGraph) -> Vec<Segment> {
    let mut cuts = cuts(graph);
    cuts.push(0);
    let mut high = graph.groups.len() as u32;
    let mut shapes: BTreeMap<Vec<u64>, usize> = BTreeMap::new();
    let last_use = last_uses(graph);
    // The frontier changes by what comes and goes between two cuts only.
    let frontier = |above: &[u32], at: u32, high: u32| -> Vec<u32> {
        let passes = above.iter().copied().filter(|&g| g < at);
        let ends = uses(graph, at, high).filter(|&g| g < at);
        let all: BTreeSet<u32> = passes.chain(ends).collect();
        all.into_iter().collect()
    };
    let mut top = Vec::new();
    let mut all = Vec::new();
    for low in cuts {
        if low >= high {
            continue;
        }
        let bottom = frontier(&top, low, high);
        let mut touched: Vec<u32> = uses(graph, low, high).filter(|&g| g < low).collect();
        touched.sort_unstable();
        touched.dedup();
        let mut segment =
            Segment { low, high, top, bottom: bottom.clone(), touched, shape: 0, pieces: Vec::new() };
        let signature = signature(graph, &segment);
        let next = shapes.len();
        segment.shape = *shapes.entry(signature).or_insert(next);
        segment.pieces = pieces::pieces(graph, &last_use, low, high);
        all.push(segment);
        (top, high) = (bottom, low);
    }
    all
}

/// The planned groups that groups `low..high` use.
fn uses(graph: &LayoutGraph, low: u32, high: u32) -> impl Iterator<Item = u32> {
    let groups = &graph.groups[low as usize..high as usize];
    groups
        .iter()
        .filter(|g| g.kind != GroupKind::Free)
        .flat_map(|g| {
            let operands = g.productions.iter().flat_map(|p| &p.operands);
            operands.chain(g.exits.iter().flat_map(|e| &e.also))
        })
        .map(|o| o.group)
        .filter(|&g| graph.is_planned(g))
}

/// Per group the last group that uses it; itself if none does.
fn last_uses(graph: &LayoutGraph) -> Vec<u32> {
    let mut last: Vec<u32> = (0..graph.groups.len() as u32).collect();
    for group in 0..graph.groups.len() as u32 {
        for used in uses(graph, group, group + 1) {
            last[used as usize] = group;
        }
    }
    last
}

/// Where the frontier is smallest for some distance around; descending.
fn cuts(graph: &LayoutGraph) -> Vec<u32> {
    let count = graph.groups.len();
    // widths[i]: the frontier between groups i - 1 and i.
    let mut change = vec![0i64; count + 2];
    for (group, &last) in last_uses(graph).iter().enumerate() {
        if graph.is_planned(group as u32) && last as usize > group {
            change[group + 1] += 1;
            change[last as usize + 1] -= 1;
        }
    }
    let widths: Vec<i64> = change[..=count]
        .iter()
        .scan(0, |width, c| {
            *width += c;
            Some(*width)
        })
        .collect();
    let mut found: Vec<u32> = Vec::new();
    for at in (1..count).rev() {
        let near = &widths[at.saturating_sub(REACH).max(1)..(at + REACH + 1).min(count)];
        let far_enough = found.last().is_none_or(|&last| last as usize - at >= SHORTEST);
        if far_enough && widths[at] > 0 && near.iter().all(|&w| w <= 0 || w >= widths[at]) {
            found.push(at as u32);
        }
    }
    found
}

/// Everything about a segment that plans depend on, with groups named relative to it.
fn signature(graph: &LayoutGraph, segment: &Segment) -> Vec<u64> {
    const FREE: u64 = u64::MAX;
    let mut words = vec![u64::from(segment.high - segment.low)];
    let operand = |o: &Operand| {
        let name = segment.relative(o.group).filter(|_| graph.is_planned(o.group)).map_or(FREE, u64::from);
        [name, u64::from(o.slot)]
    };
    // Among what passes through, only those in use matter; the top lists what may be demanded from outside.
    words.extend(segment.top.iter().filter_map(|&g| segment.relative(g)).map(u64::from));
    let inside = segment.low..segment.high;
    for index in inside.chain(segment.touched.iter().copied()) {
        let group = &graph.groups[index as usize];
        words.extend([
            FREE,
            group.kind as u64,
            u64::from(group.homes),
            u64::from(group.single),
            group.slots() as u64,
        ]);
        for edge in &group.conversions {
            words.extend([u64::from(edge.from), u64::from(edge.to)]);
            words.extend(halves(edge.cost.raw()));
        }
        if index < segment.low {
            continue;
        }
        for production in &group.productions {
            words.extend([FREE, u64::from(production.out), production.bytes]);
            words.extend(halves(production.cost.raw()));
            words.extend(production.operands.iter().flat_map(operand));
        }
        for exit in &group.exits {
            words.extend([FREE, u64::from(exit.slot)]);
            words.extend(halves(exit.cost.raw()));
            words.extend(exit.also.iter().flat_map(operand));
        }
    }
    words
}

fn halves(raw: u128) -> [u64; 2] {
    [(raw >> 64) as u64, raw as u64]
}
