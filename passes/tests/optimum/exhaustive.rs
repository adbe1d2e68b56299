//! Every plan there is, without any cleverness: any set of productions per group, any forest of conversions.
//!
//! It shares nothing with the search but the layout graph. What makes it finish is only that equal demands below a
//! group are answered once, and that a plan that is worse in time and in bytes than another is forgotten.

use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;
use tpshard_passes::cost::Cost;
use tpshard_passes::layout_graph::{Group, GroupKind, LayoutGraph};

/// The time and the bytes of a plan.
pub(crate) type Point = (Cost, u64);

/// Demanded slots per group.
type Demand = BTreeMap<u32, u64>;

/// The trade-offs between time and bytes that no plan beats, by ascending time.
pub(crate) fn trade_offs(graph: &LayoutGraph) -> Vec<Point> {
    let tables = graph.groups.iter().map(|_| HashMap::new()).collect();
    let mut all = Exhaustive { graph, forests: tables, known: HashMap::new() };
    all.below(graph.groups.len(), &Demand::new()).to_vec()
}

/// The least time of a plan within `budget`.
pub(crate) fn fastest(points: &[Point], budget: u64) -> Option<Cost> {
    points.iter().filter(|p| p.1 <= budget).map(|p| p.0).min()
}

struct Exhaustive<'a> {
    graph: &'a LayoutGraph,
    /// Per group and slots that are made: what it costs to have each set of slots.
    forests: Vec<HashMap<u64, Rc<Vec<Option<Cost>>>>>,
    known: HashMap<(usize, Demand), Rc<Vec<Point>>>,
}

impl Exhaustive<'_> {
    /// What the groups below `count` add to a plan that demands this of them.
    fn below(&mut self, count: usize, demand: &Demand) -> Rc<Vec<Point>> {
        if count == 0 {
            return Rc::new(vec![(Cost::ZERO, 0)]);
        }
        let key = (count, demand.clone());
        if let Some(known) = self.known.get(&key) {
            return known.clone();
        }
        let graph = self.graph;
        let group = &graph.groups[count - 1];
        let mut rest = demand.clone();
        let slots = rest.remove(&(count as u32 - 1)).unwrap_or(0);
        let found = if group.kind == GroupKind::Free || (slots == 0 && group.exits.is_empty()) {
            self.below(count - 1, &rest)
        } else {
            let mut points = Vec::new();
            if group.exits.is_empty() {
                self.decide(count, &rest, slots, Cost::ZERO, &mut points);
            }
            for exit in &group.exits {
                let mut rest = rest.clone();
                exit.also.iter().for_each(|o| *rest.entry(o.group).or_default() |= 1 << o.slot);
                self.decide(count, &rest, slots | 1 << exit.slot, exit.cost, &mut points);
            }
            Rc::new(undominated(points))
        };
        self.known.insert(key, found.clone());
        found
    }

    /// Adds every way to have `slots` of the group before `count`.
    fn decide(&mut self, count: usize, rest: &Demand, slots: u64, paid: Cost, points: &mut Vec<Point>) {
        let graph = self.graph;
        let group = &graph.groups[count - 1];
        // Whatever is demanded comes from one production, so of more productions some serve nothing.
        let most = if group.single { 1 } else { slots.count_ones() };
        for chosen in 1u64..1 << group.productions.len() {
            if chosen.count_ones() > most {
                continue;
            }
            let chosen = group.productions.iter().enumerate().filter(|(i, _)| chosen >> i & 1 == 1);
            let (mut made, mut cost, mut bytes, mut demand) = (0, paid, 0u64, rest.clone());
            for (_, production) in chosen {
                made |= 1 << production.out;
                cost = cost + production.cost;
                bytes += production.bytes;
                for operand in production.operands.iter().filter(|o| graph.is_planned(o.group)) {
                    *demand.entry(operand.group).or_default() |= 1 << operand.slot;
                }
            }
            let table = self.forests[count - 1].entry(made).or_insert_with(|| Rc::new(forests(group, made)));
            let Some(conversions) = table[slots as usize] else { continue };
            let below = self.below(count - 1, &demand);
            points.extend(below.iter().map(|p| (p.0 + cost + conversions, p.1 + bytes)));
        }
    }
}

/// Per set of slots, what it costs to have all of them once `made` are there. Having more never costs less, so sets
/// are filled in ascending order, and then each takes the cheapest of those that hold it.
fn forests(group: &Group, made: u64) -> Vec<Option<Cost>> {
    let mut costs: Vec<Option<Cost>> = vec![None; 1 << group.slots()];
    costs[made as usize] = Some(Cost::ZERO);
    for set in 0..costs.len() {
        let Some(cost) = costs[set] else { continue };
        for edge in &group.conversions {
            let next = set | 1 << edge.to;
            if set >> edge.from & 1 == 1 && next != set {
                let total = cost + edge.cost;
                costs[next] = Some(costs[next].map_or(total, |c| c.min(total)));
            }
        }
    }
    let holding = |wanted: usize| {
        costs.iter().enumerate().filter(|(set, _)| set & wanted == wanted).filter_map(|(_, c)| *c).min()
    };
    (0..costs.len()).map(holding).collect()
}

pub(crate) fn undominated(mut points: Vec<Point>) -> Vec<Point> {
    points.sort_unstable();
    let mut kept: Vec<Point> = Vec::new();
    for point in points {
        if kept.last().is_none_or(|last| point.1 < last.1) {
            kept.push(point);
        }
    }
    kept
}
