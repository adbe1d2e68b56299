//! How much work a plan was: numbers that are the same on every machine.

use crate::layout_graph::Sizes;
use std::ops::Add;

/// The work of searches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Effort {
    /// Searches that were run.
    pub searches: usize,
    /// Sets of demands that were looked at.
    pub states: usize,
    /// Trade-offs between time and bytes that were looked at.
    pub labels: usize,
}

impl Add for Effort {
    type Output = Effort;

    fn add(self, other: Effort) -> Effort {
        Effort {
            searches: self.searches + other.searches,
            states: self.states + other.states,
            labels: self.labels + other.labels,
        }
    }
}

impl std::iter::Sum for Effort {
    fn sum<I: Iterator<Item = Effort>>(all: I) -> Effort {
        all.fold(Effort::default(), Add::add)
    }
}

/// What was planned, and the work it took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Values of the logical graph, alternatives included.
    pub values: usize,
    /// The layout graph of one entry.
    pub sizes: Sizes,
    /// What is left of it when repeated segments are collapsed.
    pub distinct: Sizes,
    /// The searches on the chosen mesh, of all entries.
    pub effort: Effort,
}

impl std::iter::Sum for Counters {
    fn sum<I: Iterator<Item = Counters>>(all: I) -> Counters {
        all.fold(Counters::default(), |a, b| Counters {
            values: a.values + b.values,
            sizes: a.sizes + b.sizes,
            distinct: a.distinct + b.distinct,
            effort: a.effort + b.effort,
        })
    }
}
