//! The demand search: from the outputs to the inputs, what must be had of which group, at what price.
//!
//! A state maps each group that something above needs to the set of its slots that are needed; demands are sets, so
//! what is shared is paid once, and conversions grow out of what is produced, so nothing can depend on itself. A state
//! is useless if another one over the same groups, or some of them, is cheaper by at least the conversions that lead
//! from its demands to the other's: whoever holds the cheaper one can finish like the dearer and convert.

use super::choices::{Choices, Slots};
use crate::cost::Cost;
use crate::layout_graph::{GroupKind, LayoutGraph, Operand};
use crate::segment::{Range, RangeName, Segment};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// What the search minimises.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Aim {
    /// Time plus a price in picoseconds per byte.
    Time { price: f64 },
    /// Bytes, among equal bytes time.
    Bytes,
    /// Time and bytes both: every trade-off that is not dominated, within a budget of bytes.
    Both { budget: u64, most: Cost },
}

/// Bounds on the work of a search. Beyond them it keeps the most promising part and says that it did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// States after a group.
    pub states: usize,
    /// Trade-offs of a state.
    pub labels: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { states: 4096, labels: 8192 }
    }
}

/// States after which searches that are cut short anyway keep fewer.
const TIRED: usize = 500_000;

/// How many cheaper states a state is compared with.
const RIVALS: usize = 32;

/// Demanded slots per group, ascending by group.
type Demand = Vec<(u32, Slots)>;

/// What a segment leads to: demands at its lower end, and the labels there.
type Ends = Vec<(Demand, Vec<Label>)>;

/// The beginning of every trail.
const START: u32 = u32::MAX;

/// What a label did last.
#[derive(Clone, Copy, Debug)]
enum Deed {
    Nothing,
    /// A choice for a group.
    Chose {
        group: u32,
        choice: u32,
    },
    /// What a trail through an alike segment did, groups moved down by `shift`.
    Repeated {
        trail: u32,
        shift: u32,
    },
}

#[derive(Clone, Copy, Debug)]
struct Label {
    cost: Cost,
    bytes: u64,
    /// What labels are compared by; see [`Aim`].
    rank: u128,
    before: u32,
    deed: Deed,
}

/// A finished search: per group the choice that was made.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Found {
    pub cost: Cost,
    pub bytes: u64,
    pub choices: BTreeMap<u32, u32>,
    /// The minimum of the aim over all plans.
    pub rank: u128,
    /// False if limits cut anything off.
    pub complete: bool,
}

type Front = BTreeMap<Demand, Vec<Label>>;

/// One run of the search.
pub(super) struct Search<'a, 'c> {
    graph: &'a LayoutGraph,
    choices: &'c mut Choices<'a>,
    aim: Aim,
    limits: Limits,
    trails: Vec<(u32, Deed)>,
    /// Per name of a range and demand in relative names: where it was solved, and with what result.
    solved: BTreeMap<(RangeName, Demand), (u32, Rc<Ends>)>,
    /// Per group, the fewest bytes that all below it take in any plan.
    bytes_below: Vec<u64>,
    complete: bool,
}

impl<'a, 'c> Search<'a, 'c> {
    pub(super) fn new(
        graph: &'a LayoutGraph,
        choices: &'c mut Choices<'a>,
        aim: Aim,
        limits: Limits,
    ) -> Search<'a, 'c> {
        let mut below = 0u64;
        let mut bytes_below = vec![0];
        for (group, needed) in graph.groups.iter().zip(surely_needed(graph)) {
            if needed && group.kind == GroupKind::Stored {
                let least = group.productions.iter().map(|p| p.bytes).min().unwrap_or(0);
                below = below.saturating_add(least);
            }
            bytes_below.push(below);
        }
        Search {
            graph,
            choices,
            aim,
            limits,
            trails: Vec::new(),
            solved: BTreeMap::new(),
            bytes_below,
            complete: true,
        }
    }

    /// The best plan, or none if no plan exists (within the budget).
    pub(super) fn run(mut self, segments: &[Segment]) -> Option<Found> {
        self.choices.effort.searches += 1;
        let start = Label { cost: Cost::ZERO, bytes: 0, rank: 0, before: START, deed: Deed::Nothing };
        let mut front: Front = BTreeMap::from([(Vec::new(), vec![start])]);
        for segment in segments {
            front = self.cross(segment.range(), front);
            self.prune(&mut front, segment.low, true);
        }
        let best = front.remove(&Vec::new())?.into_iter().min_by_key(|l| (l.rank, l.cost, l.bytes))?;
        let last = self.remember(&best);
        let mut choices = BTreeMap::new();
        self.retrace(last, &mut choices);
        Some(Found {
            cost: best.cost,
            bytes: best.bytes,
            choices,
            rank: best.rank,
            complete: self.complete && self.choices.exact,
        })
    }

    fn rank(&self, cost: Cost, bytes: u64) -> u128 {
        match self.aim {
            // Rounding down keeps the sum a lower bound of what the price makes of all bytes.
            Aim::Time { price } => cost.raw() + ((((bytes as f64) * price).floor() as u128) << 64),
            Aim::Bytes => (u128::from(bytes) << 64) | u128::from(cost.picoseconds()),
            Aim::Both { .. } => cost.raw(),
        }
    }

    /// From the demands at the upper end of a segment or piece to those at its lower end.
    fn cross(&mut self, range: Range<'_>, front: Front) -> Front {
        let mut below: Front = BTreeMap::new();
        for (demand, labels) in front {
            // What only passes through is set aside, so that alike segments meet alike demands.
            let (inside, aside): (Demand, Demand) =
                demand.into_iter().partition(|(group, _)| range.relative(*group).is_some());
            let relative = rename(&inside, |g| range.relative(g));
            let key = (range.name, relative);
            if !self.solved.contains_key(&key) {
                let results = Rc::new(self.solve(range, inside));
                self.solved.insert(key.clone(), (range.high, results));
            }
            let Some((high, results)) = self.solved.get(&key) else { continue };
            let (shift, results) = (high.wrapping_sub(range.high), results.clone());
            let ends: Vec<u32> = labels.iter().map(|l| self.remember(l)).collect();
            for (result, steps) in results.iter() {
                let mut demand = rename(result, |name| range.absolute(name));
                demand.extend(&aside);
                demand.sort_unstable();
                let entry = below.entry(demand).or_default();
                for (label, &before) in labels.iter().zip(&ends) {
                    entry.extend(steps.iter().map(|step| Label {
                        cost: label.cost + step.cost,
                        bytes: label.bytes.saturating_add(step.bytes),
                        rank: label.rank + step.rank,
                        before,
                        deed: Deed::Repeated { trail: step.before, shift },
                    }));
                }
            }
        }
        below
    }

    /// Solves a segment or piece for one demand at its upper end. Labels of the result begin with nothing done, and their
    /// `before` is the end of their trail.
    fn solve(&mut self, range: Range<'_>, demand: Demand) -> Ends {
        let start = Label { cost: Cost::ZERO, bytes: 0, rank: 0, before: START, deed: Deed::Nothing };
        let mut front: Front = BTreeMap::from([(demand, vec![start])]);
        let mut pieces = range.pieces.iter().peekable();
        let mut at = range.high;
        while at > range.low {
            if let Some(piece) = pieces.next_if(|piece| piece.high == at) {
                front = self.cross(range.piece(piece), front);
                self.prune(&mut front, piece.low, false);
                at = piece.low;
                continue;
            }
            at -= 1;
            if self.graph.is_planned(at) {
                front = self.step(at, front);
            }
        }
        front
            .into_iter()
            .map(|(demand, mut labels)| {
                for label in &mut labels {
                    label.before = self.remember(label);
                }
                (rename(&demand, |g| range.relative(g)), labels)
            })
            .collect()
    }

    /// Decides about one group.
    fn step(&mut self, group: u32, front: Front) -> Front {
        let exits = !self.graph.groups[group as usize].exits.is_empty();
        let mut next: Front = BTreeMap::new();
        let mut touched = false;
        for (mut demand, labels) in front {
            let slots = match demand.binary_search_by_key(&group, |d| d.0) {
                Ok(at) => demand.remove(at).1,
                Err(_) => 0,
            };
            if slots == 0 && !exits {
                next.entry(demand).or_default().extend(labels);
                continue;
            }
            touched = true;
            let ends: Vec<u32> = labels.iter().map(|l| self.remember(l)).collect();
            for id in self.choices.of(group, slots) {
                let choice = &self.choices.all[id as usize];
                let rank = self.rank(choice.cost, choice.bytes);
                let entry = next.entry(merged(&demand, &choice.demands)).or_default();
                entry.extend(labels.iter().zip(&ends).map(|(label, &before)| Label {
                    cost: label.cost + choice.cost,
                    bytes: label.bytes.saturating_add(choice.bytes),
                    rank: label.rank + rank,
                    before,
                    deed: Deed::Chose { group, choice: id },
                }));
            }
        }
        if touched {
            self.prune(&mut next, group, false);
        }
        next
    }

    /// Drops what cannot be part of a best plan. At a cut, bytes are those of the whole plan so far.
    fn prune(&mut self, front: &mut Front, low: u32, at_cut: bool) {
        self.choices.effort.states += front.len();
        self.choices.effort.labels += front.values().map(Vec::len).sum::<usize>();
        let below = self.bytes_below.get(low as usize).copied().unwrap_or(0);
        for labels in front.values_mut() {
            if let Aim::Both { budget, most } = self.aim {
                let needed = if at_cut { below } else { 0 };
                labels.retain(|l| l.cost <= most && l.bytes.saturating_add(needed) <= budget);
                frontier(labels);
                if labels.len() > self.limits.labels {
                    self.complete = false;
                    thin(labels, self.limits.labels);
                }
            } else if let Some(best) = labels.iter().min_by_key(|l| (l.rank, l.cost, l.bytes)).copied() {
                *labels = vec![best];
            }
        }
        front.retain(|_, labels| !labels.is_empty());
        self.drop_dominated(front);
        // Where much was cut off already, less is kept: what is lost is lost.
        let tired = !self.complete && self.choices.effort.states > TIRED;
        let most = if tired { self.limits.states / 16 + 1 } else { self.limits.states };
        if front.len() > most {
            self.complete = false;
            let mut order: Vec<(u128, Demand)> =
                front.iter().map(|(d, labels)| (lowest(labels), d.clone())).collect();
            order.sort();
            for (_, demand) in order.drain(most..) {
                front.remove(&demand);
            }
        }
    }

    /// Drops labels that a state which demands less, or can be converted to what it demands, beats.
    fn drop_dominated(&mut self, front: &mut Front) {
        if front.len() < 2 {
            return;
        }
        let mut order: Vec<(u128, Demand)> =
            front.iter().map(|(demand, labels)| (lowest(labels), demand.clone())).collect();
        order.sort();
        let mut kept = Kept::default();
        for (_, demand) in order {
            let Some(mut labels) = front.remove(&demand) else { continue };
            for rival in kept.rivals(&demand) {
                let rival = &kept.demands[rival];
                let Some(distance) = self.distance(&demand, rival) else { continue };
                let Some(others) = front.get(rival) else { continue };
                self.drop_beaten(&mut labels, others, distance);
                if labels.is_empty() {
                    break;
                }
            }
            if !labels.is_empty() {
                front.insert(demand.clone(), labels);
                kept.add(demand);
            }
        }
    }

    /// Drops the labels that some label of a rival beats although it has a distance to go.
    fn drop_beaten(&self, labels: &mut Vec<Label>, others: &[Label], distance: Cost) {
        let distance = self.rank(distance, 0);
        match self.aim {
            Aim::Time { .. } | Aim::Bytes => {
                let through = lowest(others).saturating_add(distance);
                labels.retain(|label| through > label.rank);
            }
            // Both lists ascend in time and descend in bytes, so of those that are in time the last is the leanest.
            Aim::Both { .. } => {
                let mut next = 0;
                labels.retain(|label| {
                    while others.get(next).is_some_and(|o| o.rank + distance <= label.rank) {
                        next += 1;
                    }
                    next == 0 || others[next - 1].bytes > label.bytes
                });
            }
        }
    }

    /// The conversions that lead from the demands `present` to `wanted`, which are of some of the same groups.
    fn distance(&mut self, present: &Demand, wanted: &Demand) -> Option<Cost> {
        let mut total = Cost::ZERO;
        let mut have = present.iter();
        for &(group, slots) in wanted {
            let &(_, held) = have.find(|(other, _)| *other == group)?;
            total = total + self.choices.distance(group, held, slots)?;
        }
        Some(total)
    }

    /// The end of the trail that `label` has gone.
    fn remember(&mut self, label: &Label) -> u32 {
        match label.deed {
            Deed::Nothing => label.before,
            deed => {
                self.trails.push((label.before, deed));
                (self.trails.len() - 1) as u32
            }
        }
    }

    fn retrace(&self, end: u32, choices: &mut BTreeMap<u32, u32>) {
        let mut open = vec![(end, 0u32)];
        while let Some((at, shift)) = open.pop() {
            let Some(&(before, deed)) = self.trails.get(at as usize) else { continue };
            open.push((before, shift));
            match deed {
                Deed::Nothing => {}
                Deed::Chose { group, choice } => {
                    choices.insert(group.wrapping_sub(shift), choice);
                }
                Deed::Repeated { trail, shift: more } => open.push((trail, shift.wrapping_add(more))),
            }
        }
    }
}

/// States that were not dropped, and which of them demand no group that another does not.
#[derive(Default)]
struct Kept {
    demands: Vec<Demand>,
    /// Per state, a bit for each of its groups; groups may share bits.
    signatures: Vec<u64>,
    /// States over the same groups.
    alike: BTreeMap<Vec<u32>, Vec<usize>>,
}

impl Kept {
    fn add(&mut self, demand: Demand) {
        let groups = demand.iter().map(|d| d.0).collect();
        self.alike.entry(groups).or_default().push(self.demands.len());
        self.signatures.push(signature(&demand));
        self.demands.push(demand);
    }

    /// The first states over the same groups, then the first over some of them.
    fn rivals(&self, demand: &Demand) -> Vec<usize> {
        let groups: Vec<u32> = demand.iter().map(|d| d.0).collect();
        let alike = self.alike.get(&groups).map_or(&[][..], Vec::as_slice);
        let own = signature(demand);
        let fewer = self.signatures.iter().enumerate().filter(|(_, other)| *other & !own == 0);
        let fewer = fewer.map(|(at, _)| at).filter(|&at| self.demands[at].len() < demand.len());
        alike.iter().copied().take(RIVALS).chain(fewer.take(RIVALS)).collect()
    }
}

fn signature(demand: &Demand) -> u64 {
    demand.iter().fold(0, |bits, (group, _)| bits | 1 << (group % 64))
}

/// Per group, true if no plan does without it as far as can be seen from one group at a time: outputs, and what all
/// productions of such a group use.
fn surely_needed(graph: &LayoutGraph) -> Vec<bool> {
    let mut needed: Vec<bool> = graph.groups.iter().map(|g| !g.exits.is_empty()).collect();
    for index in (0..graph.groups.len()).rev().filter(|&i| graph.is_planned(i as u32)) {
        let group = &graph.groups[index];
        if needed[index] {
            let production = in_all(group.productions.iter().map(|p| p.operands.as_slice()));
            let exit = in_all(group.exits.iter().map(|e| e.also.as_slice()));
            production.into_iter().chain(exit).for_each(|g| needed[g as usize] = true);
        }
    }
    needed
}

/// The groups that all of some lists of operands name.
fn in_all<'a>(mut lists: impl Iterator<Item = &'a [Operand]>) -> BTreeSet<u32> {
    let mut common: BTreeSet<u32> = lists.next().into_iter().flatten().map(|o| o.group).collect();
    for list in lists {
        common.retain(|&group| list.iter().any(|o| o.group == group));
    }
    common
}

fn lowest(labels: &[Label]) -> u128 {
    labels.iter().map(|l| l.rank).min().unwrap_or(u128::MAX)
}

fn rename(demand: &Demand, name: impl Fn(u32) -> Option<u32>) -> Demand {
    let mut renamed: Demand = demand.iter().filter_map(|&(g, slots)| Some((name(g)?, slots))).collect();
    renamed.sort_unstable();
    renamed
}

fn merged(demand: &Demand, more: &[(u32, Slots)]) -> Demand {
    let mut all = demand.clone();
    for &(group, slots) in more {
        match all.binary_search_by_key(&group, |d| d.0) {
            Ok(at) => all[at].1 |= slots,
            Err(at) => all.insert(at, (group, slots)),
        }
    }
    all
}

/// Keeps the labels that no other beats in both time and bytes, by ascending time.
fn frontier(labels: &mut Vec<Label>) {
    labels.sort_by_key(|l| (l.cost, l.bytes));
    let mut least = u64::MAX;
    let mut first = true;
    labels.retain(|label| {
        let better = first || label.bytes < least;
        if better {
            (least, first) = (label.bytes, false);
        }
        better
    });
}

/// Keeps `count` labels spread evenly, the first and the last among them.
fn thin(labels: &mut Vec<Label>, count: usize) {
    let (all, last) = (std::mem::take(labels), count.saturating_sub(1).max(1));
    labels.extend((0..=last).map(|i| all[i * (all.len() - 1) / last]));
}
