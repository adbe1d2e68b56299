//! What can be done to satisfy a set of demanded slots of one group: productions, and a cheapest forest of
//! conversions from what they make to what is demanded.

use super::trees::{MOST_WANTED, Trees, halves};
use crate::cost::Cost;
use crate::counters::Effort;
use crate::layout_graph::{Group, LayoutGraph, Operand};
use rustc_hash::FxHashMap;
use std::collections::BTreeMap;

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

/// Choices and conversion distances, computed once per group and demand.
pub struct Choices<'a> {
    graph: &'a LayoutGraph,
    /// Every choice ever computed; others refer to them by index.
    pub all: Vec<Choice>,
    known: BTreeMap<(u32, Slots), Vec<u32>>,
    distances: FxHashMap<(u32, Slots, Slots), Option<Cost>>,
    trees: FxHashMap<(u32, Slots), Trees<'a>>,
    /// False once a demand was so large that not every way to satisfy it was considered.
    pub exact: bool,
    /// Of the searches that used these choices.
    pub effort: Effort,
}

impl<'a> Choices<'a> {
    pub fn new(graph: &'a LayoutGraph) -> Choices<'a> {
        Choices {
            graph,
            all: Vec::new(),
            known: BTreeMap::new(),
            distances: FxHashMap::default(),
            trees: FxHashMap::default(),
            exact: true,
            effort: Effort::default(),
        }
    }

    /// The undominated choices for `demand` on `group`, cheapest first; empty if it cannot be satisfied.
    pub fn of(&mut self, group: u32, demand: Slots) -> Vec<u32> {
        if let Some(known) = self.known.get(&(group, demand)) {
            return known.clone();
        }
        // An exit adds one slot to the demand.
        self.exact &= demand.count_ones() < MOST_WANTED;
        let found = enumerate(self.graph, group, demand);
        let first = self.all.len() as u32;
        let ids: Vec<u32> = (first..first + found.len() as u32).collect();
        self.all.extend(found);
        self.known.insert((group, demand), ids.clone());
        ids
    }

    /// What it costs to have `wanted` of a group once `present` are there; none also where that is not worked out.
    pub fn distance(&mut self, group: u32, present: Slots, wanted: Slots) -> Option<Cost> {
        let missing = wanted & !present;
        if missing == 0 {
            return Some(Cost::ZERO);
        }
        if missing.count_ones() > MOST_WANTED {
            return None;
        }
        let (graph, trees) = (self.graph, &mut self.trees);
        *self.distances.entry((group, present, missing)).or_insert_with(|| {
            let trees = trees.entry((group, missing));
            trees.or_insert_with(|| Trees::new(&graph.groups[group as usize], missing)).from(present)
        })
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

/// All undominated ways to have `demand` of a group: each wanted slot comes from one production, over conversions that
/// those from the same production share.
fn satisfy(graph: &LayoutGraph, group: &Group, demand: Slots) -> Vec<Choice> {
    let trees = Trees::new(group, demand);
    // Per set of wanted slots, the ways to have it from one production, and from any number of them.
    let (mut alone, mut ways): (Vec<Vec<Choice>>, Vec<Vec<Choice>>) = (vec![Vec::new()], vec![Vec::new()]);
    for set in 1..trees.sets() {
        let mut found = Vec::new();
        for (index, production) in group.productions.iter().enumerate() {
            if trees.cost(set, production.out).is_some() {
                let mut edges = Vec::new();
                trees.edges(set, production.out, &mut edges);
                found.push(assemble(graph, group, vec![index as u16], edges.into_iter()));
            }
        }
        let found = undominated(found);
        let mut all = found.clone();
        if !group.single {
            for part in halves(set) {
                for (a, b) in alone[part].iter().flat_map(|a| ways[set ^ part].iter().map(move |b| (a, b))) {
                    all.extend(joined(graph, group, a, b));
                }
            }
        }
        alone.push(found);
        ways.push(undominated(all));
    }
    let mut found = ways.pop().unwrap_or_default();
    let rest = demand & !trees.wanted();
    for slot in (0..64u8).filter(|slot| rest >> slot & 1 == 1) {
        let trees = Trees::new(group, bit(slot));
        found = found.iter().filter_map(|choice| extended(graph, group, choice, &trees)).collect();
    }
    undominated(found)
}

/// What comes of doing both; nothing if they start from the same slot, which one production alone does better.
fn joined(graph: &LayoutGraph, group: &Group, a: &Choice, b: &Choice) -> Option<Choice> {
    let out = |p: u16| group.productions[usize::from(p)].out;
    if b.productions.iter().any(|&q| a.productions.iter().any(|&p| out(p) == out(q))) {
        return None;
    }
    let mut productions: Vec<u16> = a.productions.iter().chain(&b.productions).copied().collect();
    productions.sort_unstable();
    let edges = a.conversions.iter().chain(&b.conversions).copied();
    Some(assemble(graph, group, productions, edges))
}

/// The choice with one more slot: converted from what it has, or else from the cheapest production.
fn extended(graph: &LayoutGraph, group: &Group, choice: &Choice, trees: &Trees<'_>) -> Option<Choice> {
    let made = choice.productions.iter().map(|&p| group.productions[usize::from(p)].out);
    let converted = choice.conversions.iter().map(|&e| group.conversions[usize::from(e)].to);
    let root = made.chain(converted).filter_map(|root| Some((trees.cost(1, root)?, root))).min();
    let more = || {
        let each = group.productions.iter().enumerate();
        each.filter_map(|(i, p)| Some((trees.cost(1, p.out)? + p.cost, p.bytes, i))).min()
    };
    let mut productions = choice.productions.clone();
    let root = match root {
        Some((_, root)) => root,
        None if group.single => return None,
        None => {
            let (.., index) = more()?;
            productions.push(index as u16);
            group.productions[index].out
        }
    };
    let mut edges = choice.conversions.clone();
    trees.edges(1, root, &mut edges);
    Some(assemble(graph, group, productions, edges.into_iter()))
}

/// The choice of these productions and those of the conversions that bring a new slot.
fn assemble(
    graph: &LayoutGraph,
    group: &Group,
    productions: Vec<u16>,
    edges: impl Iterator<Item = u16>,
) -> Choice {
    let mut choice = Choice {
        cost: Cost::ZERO,
        bytes: 0,
        demands: Vec::new(),
        productions,
        conversions: Vec::new(),
        exit: None,
    };
    let mut have: Slots = 0;
    for production in choice.productions.iter().map(|&p| &group.productions[usize::from(p)]) {
        have |= bit(production.out);
        choice.cost = choice.cost + production.cost;
        choice.bytes = choice.bytes.saturating_add(production.bytes);
        for &operand in &production.operands {
            add_demand(graph, &mut choice.demands, operand);
        }
    }
    for index in edges {
        let edge = &group.conversions[usize::from(index)];
        if have & bit(edge.to) == 0 {
            have |= bit(edge.to);
            choice.cost = choice.cost + edge.cost;
            choice.conversions.push(index);
        }
    }
    choice
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
