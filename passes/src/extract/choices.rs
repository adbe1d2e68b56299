//! What can be done to satisfy a set of demanded slots of one group: productions, and a cheapest forest of
//! conversions from what they make to what is demanded.

use crate::cost::Cost;
use crate::counters::Effort;
use crate::layout_graph::{Group, LayoutGraph, Operand};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// A set of slots.
pub type Slots = u64;

pub(super) fn bit(slot: u8) -> Slots {
    1 << slot
}

/// One way to satisfy a demand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    pub cost: Cost,
    pub bytes: u64,
    /// The demands it puts on planned groups, ascending by group.
    pub demands: Vec<(u32, Slots)>,
    /// Indices into the productions of the group.
    pub productions: Vec<u16>,
    /// Indices into the conversions of the group, in the order they are done.
    pub conversions: Vec<u16>,
    /// The exit that is taken, for outputs.
    pub exit: Option<u16>,
}

/// A conversion forest: what it costs, and its edges in order.
type Forest = Option<(Cost, Vec<u16>)>;

/// How a set of slots was reached: at what cost, from which set over which edge.
type Reached = (Cost, Option<(Slots, u16)>);

/// Choices and conversion distances, computed once per group and demand.
pub struct Choices<'a> {
    graph: &'a LayoutGraph,
    /// Every choice ever computed; others refer to them by index.
    pub all: Vec<Choice>,
    known: BTreeMap<(u32, Slots), Vec<u32>>,
    distances: HashMap<(u32, Slots, Slots), Option<Cost>>,
    /// Of the searches that used these choices.
    pub effort: Effort,
}

impl<'a> Choices<'a> {
    pub fn new(graph: &'a LayoutGraph) -> Choices<'a> {
        Choices {
            graph,
            all: Vec::new(),
            known: BTreeMap::new(),
            distances: HashMap::new(),
            effort: Effort::default(),
        }
    }

    /// The undominated choices for `demand` on `group`, cheapest first; empty if it cannot be satisfied.
    pub fn of(&mut self, group: u32, demand: Slots) -> Vec<u32> {
        if let Some(known) = self.known.get(&(group, demand)) {
            return known.clone();
        }
        let found = enumerate(self.graph, group, demand);
        let first = self.all.len() as u32;
        let ids: Vec<u32> = (first..first + found.len() as u32).collect();
        self.all.extend(found);
        self.known.insert((group, demand), ids.clone());
        ids
    }

    /// What it costs to have `wanted` of a group once `present` are there.
    pub fn distance(&mut self, group: u32, present: Slots, wanted: Slots) -> Option<Cost> {
        if wanted & !present == 0 {
            return Some(Cost::ZERO);
        }
        let graph = self.graph;
        *self
            .distances
            .entry((group, present, wanted))
            .or_insert_with(|| forest(&graph.groups[group as usize], present, wanted).map(|(cost, _)| cost))
    }
}

fn enumerate(graph: &LayoutGraph, index: u32, demand: Slots) -> Vec<Choice> {
    let group = &graph.groups[index as usize];
    if group.exits.is_empty() {
        return satisfy(graph, group, demand);
    }
    let mut found = Vec::new();
    for (number, exit) in group.exits.iter().enumerate() {
        for mut choice in satisfy(graph, group, demand | bit(exit.slot)) {
            choice.cost = choice.cost + exit.cost;
            choice.exit = Some(number as u16);
            for &also in &exit.also {
                add_demand(graph, &mut choice.demands, also);
            }
            found.push(choice);
        }
    }
    undominated(found)
}

fn add_demand(graph: &LayoutGraph, demands: &mut Vec<(u32, Slots)>, operand: Operand) {
    if graph.is_planned(operand.group) {
        match demands.binary_search_by_key(&operand.group, |d| d.0) {
            Ok(at) => demands[at].1 |= bit(operand.slot),
            Err(at) => demands.insert(at, (operand.group, bit(operand.slot))),
        }
    }
}

/// All undominated ways to have `demand` of a group: one production, or two with different results.
fn satisfy(graph: &LayoutGraph, group: &Group, demand: Slots) -> Vec<Choice> {
    let mut forests: BTreeMap<Slots, Forest> = BTreeMap::new();
    let mut found = Vec::new();
    let mut consider = |chosen: &[usize]| {
        let made = chosen.iter().fold(0, |made, &p| made | bit(group.productions[p].out));
        let forest = forests.entry(made).or_insert_with(|| forest(group, made, demand));
        let Some((cost, conversions)) = forest else { return };
        let mut choice = Choice {
            cost: *cost,
            bytes: 0,
            demands: Vec::new(),
            productions: chosen.iter().map(|&p| p as u16).collect(),
            conversions: conversions.clone(),
            exit: None,
        };
        for production in chosen.iter().map(|&p| &group.productions[p]) {
            choice.cost = choice.cost + production.cost;
            choice.bytes = choice.bytes.saturating_add(production.bytes);
            for &operand in &production.operands {
                add_demand(graph, &mut choice.demands, operand);
            }
        }
        found.push(choice);
    };
    let count = group.productions.len();
    (0..count).for_each(|p| consider(&[p]));
    // Two productions are considered if the results of both are wanted.
    if demand.count_ones() > 1 && !group.single {
        let wanted = |p: usize| demand & bit(group.productions[p].out) != 0;
        for a in 0..count {
            for b in a + 1..count {
                if group.productions[a].out != group.productions[b].out && wanted(a) && wanted(b) {
                    consider(&[a, b]);
                }
            }
        }
    }
    undominated(found)
}

/// Drops every choice that costs no less, takes no less memory and demands no less than another.
fn undominated(mut choices: Vec<Choice>) -> Vec<Choice> {
    // The sort is stable: among equals the first production wins, which has the smallest layout.
    choices.sort_by_key(|c| (c.cost, c.bytes));
    let mut kept: Vec<Choice> = Vec::new();
    for choice in choices {
        let dominated = |k: &Choice| k.bytes <= choice.bytes && covers(&choice.demands, &k.demands);
        if !kept.iter().any(dominated) {
            kept.push(choice);
        }
    }
    kept
}

/// True if `large` holds all of `small`.
fn covers(large: &[(u32, Slots)], small: &[(u32, Slots)]) -> bool {
    small.iter().all(|&(group, slots)| {
        large.binary_search_by_key(&group, |d| d.0).is_ok_and(|at| slots & !large[at].1 == 0)
    })
}

/// The cheapest conversions that lead from the slots `present` to all of `wanted`: Dijkstra over sets of slots.
fn forest(group: &Group, present: Slots, wanted: Slots) -> Forest {
    // Intermediate slots beyond one per wanted slot never pay.
    let most = wanted.count_ones() + 1;
    let mut queue = BTreeSet::from([(Cost::ZERO, present)]);
    let mut best: BTreeMap<Slots, Reached> = BTreeMap::from([(present, (Cost::ZERO, None))]);
    while let Some((cost, have)) = queue.pop_first() {
        if wanted & !have == 0 {
            return Some((cost, trace(&best, have)));
        }
        if (have & !present).count_ones() >= most {
            continue;
        }
        for (index, edge) in group.conversions.iter().enumerate() {
            if have & bit(edge.from) == 0 || have & bit(edge.to) != 0 {
                continue;
            }
            let (next, total) = (have | bit(edge.to), cost + edge.cost);
            let known = best.get(&next).map(|b| b.0);
            if known.is_none_or(|k| total < k) {
                if let Some(k) = known {
                    queue.remove(&(k, next));
                }
                best.insert(next, (total, Some((have, index as u16))));
                queue.insert((total, next));
            }
        }
    }
    None
}

fn trace(best: &BTreeMap<Slots, Reached>, end: Slots) -> Vec<u16> {
    let mut edges = Vec::new();
    let mut at = end;
    while let Some((_, Some((before, edge)))) = best.get(&at) {
        edges.push(*edge);
        at = *before;
    }
    edges.reverse();
    edges
}
