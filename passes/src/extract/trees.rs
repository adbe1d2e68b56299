//! The cheapest conversions from slots that are made to slots that are wanted.
//!
//! From one slot they are a tree: it leads to some of the wanted slots, over others where that is cheaper. The
//! cheapest tree for a set of wanted slots goes either over an edge or apart into trees for two halves of the set, so
//! that trees for all sets and all roots follow from smaller ones (Dreyfus and Wagner).

use super::choices::Slots;
use crate::cost::Cost;
use crate::layout_graph::Group;

/// Most wanted slots that are solved together; every one of them doubles the sets.
pub(super) const MOST_WANTED: u32 = 8;

/// How a tree begins at its root.
#[derive(Clone, Copy)]
enum Step {
    Arrived,
    Over(u16),
    /// Two trees from here: for this set, and for the rest.
    Apart(usize),
}

/// The cheapest trees for every set of some wanted slots. Sets are masks over their positions.
pub(super) struct Trees<'a> {
    group: &'a Group,
    wanted: Vec<u8>,
    /// Per set and root.
    best: Vec<Vec<Option<(Cost, Step)>>>,
}

impl<'a> Trees<'a> {
    /// Of the wanted slots only the first [`MOST_WANTED`] are taken.
    pub(super) fn new(group: &'a Group, wanted: Slots) -> Trees<'a> {
        let wanted: Vec<u8> =
            (0..64).filter(|&slot| wanted >> slot & 1 == 1).take(MOST_WANTED as usize).collect();
        let mut into = vec![Vec::new(); group.slots()];
        for (index, edge) in group.conversions.iter().enumerate() {
            into[usize::from(edge.to)].push((index as u16, edge));
        }
        let mut best: Vec<Vec<Option<(Cost, Step)>>> = vec![vec![None; group.slots()]];
        for set in 1..1usize << wanted.len() {
            let mut found: Vec<Option<(Cost, Step)>> = if set.is_power_of_two() {
                let target = usize::from(wanted[set.trailing_zeros() as usize]);
                (0..group.slots()).map(|s| (s == target).then_some((Cost::ZERO, Step::Arrived))).collect()
            } else {
                (0..group.slots()).map(|slot| apart(&best, set, slot)).collect()
            };
            // Dijkstra against the edges, from everywhere at once.
            let mut open: Slots = slots_below(group.slots());
            let cost = |found: &[Option<(Cost, Step)>], slot: usize| found[slot].map(|b| b.0);
            while let Some((reached, slot)) = (0..group.slots())
                .filter(|&s| open >> s & 1 == 1)
                .filter_map(|s| Some((cost(&found, s)?, s)))
                .min()
            {
                open &= !(1 << slot);
                for &(index, edge) in &into[slot] {
                    let (from, total) = (usize::from(edge.from), reached + edge.cost);
                    if cost(&found, from).is_none_or(|known| total < known) {
                        found[from] = Some((total, Step::Over(index)));
                    }
                }
            }
            best.push(found);
        }
        Trees { group, wanted, best }
    }

    /// How many sets there are; the last is the whole.
    pub(super) fn sets(&self) -> usize {
        self.best.len()
    }

    pub(super) fn cost(&self, set: usize, root: u8) -> Option<Cost> {
        self.best.get(set)?.get(usize::from(root))?.map(|b| b.0)
    }

    /// The edges of the tree for `set`, each after what it starts from. Where trees meet, a slot is reached twice.
    pub(super) fn edges(&self, set: usize, root: u8, edges: &mut Vec<u16>) {
        let Some((_, step)) = self.best[set][usize::from(root)] else { return };
        match step {
            Step::Arrived => {}
            Step::Over(edge) => {
                edges.push(edge);
                self.edges(set, self.group.conversions[usize::from(edge)].to, edges);
            }
            Step::Apart(part) => {
                self.edges(part, root, edges);
                self.edges(set ^ part, root, edges);
            }
        }
    }

    /// What it costs to have all wanted slots once `present` are there.
    pub(super) fn from(&self, present: Slots) -> Option<Cost> {
        let mut forests: Vec<Option<Cost>> = vec![Some(Cost::ZERO)];
        for set in 1..self.sets() {
            let roots = (0..self.group.slots() as u8).filter(|&slot| present >> slot & 1 == 1);
            let one = roots.filter_map(|root| self.cost(set, root)).min();
            let two = halves(set).filter_map(|part| Some(forests[part]? + forests[set ^ part]?)).min();
            forests.push(one.into_iter().chain(two).min());
        }
        forests.last().copied().flatten()
    }

    pub(super) fn wanted(&self) -> Slots {
        self.wanted.iter().fold(0, |all, &slot| all | 1 << slot)
    }
}

fn slots_below(count: usize) -> Slots {
    if count >= 64 { Slots::MAX } else { (1 << count) - 1 }
}

fn apart(best: &[Vec<Option<(Cost, Step)>>], set: usize, slot: usize) -> Option<(Cost, Step)> {
    let cost = |part: usize| best[part][slot].map(|b| b.0);
    let ways = halves(set).filter_map(|part| Some((cost(part)? + cost(set ^ part)?, part)));
    ways.min().map(|(cost, part)| (cost, Step::Apart(part)))
}

/// The parts of `set` that hold its lowest member, but not all.
pub(super) fn halves(set: usize) -> impl Iterator<Item = usize> {
    let lowest = set & set.wrapping_neg();
    (1..set).filter(move |part| part & !set == 0 && part & lowest != 0)
}
