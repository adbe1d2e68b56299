//! Which values are the same, in which order plans decide about them, and what there is to decide.

use super::GroupKind;
use crate::cost::Pricer;
use crate::cost::price::Entry;
use crate::sharding::Units;
use std::collections::{BTreeMap, BTreeSet};
use tpshard_ir::op::Op;
use tpshard_ir::{Dim, Graph, Layout, Mesh, StatePair, ValueId};

/// Vectors, and weights of a smaller share of all weights than 0.01 %, are set aside from planning: held whole.
const SMALL_SHARE: u64 = 10_000;
/// A contraction of inputs and constants that takes no longer than so many kernel launches is not worth planning.
const FREE_LAUNCHES: f64 = 2.0;

/// Values known to be equal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Class {
    /// The value of the graph first, then what it was found to equal.
    pub members: Vec<ValueId>,
    pub kind: GroupKind,
    /// Index into the graph's state pairs of which this is the past.
    pub state: Option<usize>,
}

/// The classes that outputs depend on, operands before users.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Classes {
    pub all: Vec<Class>,
    pub of: Vec<Option<u32>>,
    /// Bytes of the weights that were set aside.
    pub reserved: u64,
}

impl Classes {
    /// Sorts the values that `outputs` need, given pairs of equal values.
    pub fn new(
        graph: &Graph,
        outputs: &[ValueId],
        equal: &[(ValueId, ValueId)],
        pricer: &Pricer<'_>,
        mesh: &Mesh,
    ) -> Classes {
        let leader = leaders(graph, equal);
        let mut members: BTreeMap<ValueId, Vec<ValueId>> = BTreeMap::new();
        for (value, _) in graph.values() {
            members.entry(leader[value.index()]).or_default().push(value);
        }
        let mut classes = Classes { all: Vec::new(), of: vec![None; graph.len()], reserved: 0 };
        for value in order(graph, outputs, &leader, &members) {
            let group = u32::try_from(classes.all.len()).unwrap_or(u32::MAX);
            let found = members.get(&value).cloned().unwrap_or_default();
            found.iter().for_each(|m| classes.of[m.index()] = Some(group));
            classes.all.push(Class { members: found, kind: GroupKind::Computed, state: None });
        }
        classes.classify(graph, pricer, mesh);
        classes
    }

    fn classify(&mut self, graph: &Graph, pricer: &Pricer<'_>, mesh: &Mesh) {
        let replicated = Layout::replicated(mesh);
        let whole = |value| pricer.local_bytes(value, &replicated, mesh);
        let first = |class: &Class| class.members[0];
        let is_weight = |class: &Class| matches!(graph.node(first(class)).op, Op::Weight(_));
        let weights = || self.all.iter().filter(|c| is_weight(c)).map(first);
        let total: u64 = weights().map(whole).fold(0, u64::saturating_add);
        let small = |value: ValueId| match graph.ty(value).rank() {
            0 => true,
            _ if pricer.splits_all() => false,
            1 => true,
            _ => whole(value).saturating_mul(SMALL_SHARE) < total,
        };
        self.reserved = weights().filter(|&v| small(v)).map(whole).fold(0, u64::saturating_add);
        for index in 0..self.all.len() {
            let value = first(&self.all[index]);
            let node = graph.node(value);
            let free_operands = || {
                node.args
                    .iter()
                    .all(|a| self.of[a.index()].is_some_and(|c| self.all[c as usize].kind == GroupKind::Free))
            };
            let (kind, state) = match &node.op {
                Op::Input { name } => match graph.states.iter().position(|s| s.input == *name) {
                    Some(pair) => (GroupKind::Stored, Some(pair)),
                    None => (GroupKind::Free, None),
                },
                Op::Weight(_) if small(value) => (GroupKind::Free, None),
                Op::Weight(_) => (GroupKind::Stored, None),
                Op::Literal(_) | Op::Size(_) | Op::Iota { .. } => (GroupKind::Free, None),
                op if !pricer.splits_all()
                    && is_light(op, pricer, value, &replicated, mesh)
                    && free_operands() =>
                {
                    (GroupKind::Free, None)
                }
                _ => (GroupKind::Computed, None),
            };
            (self.all[index].kind, self.all[index].state) = (kind, state);
        }
    }
}

/// The first value of each value's class. Weights read by the same expression are one value.
fn leaders(graph: &Graph, equal: &[(ValueId, ValueId)]) -> Vec<ValueId> {
    let mut parent: Vec<ValueId> = graph.values().map(|(id, _)| id).collect();
    fn root(parent: &mut [ValueId], value: ValueId) -> ValueId {
        let mut at = value;
        while parent[at.index()] != at {
            parent[at.index()] = parent[parent[at.index()].index()];
            at = parent[at.index()];
        }
        at
    }
    let mut weights = BTreeMap::new();
    let mut pairs: Vec<(ValueId, ValueId)> = equal.to_vec();
    for (value, node) in graph.values() {
        if let Op::Weight(expression) = &node.op {
            match weights.get(expression) {
                Some(&first) => pairs.push((first, value)),
                None => {
                    weights.insert(expression.clone(), value);
                }
            }
        }
    }
    for (a, b) in pairs {
        let (a, b) = (root(&mut parent, a), root(&mut parent, b));
        let (low, high) = (a.min(b), a.max(b));
        parent[high.index()] = low;
    }
    graph.values().map(|(id, _)| root(&mut parent, id)).collect()
}

/// The classes that `outputs` need, operands first, each as late as its first user allows. The first member of a class
/// is older than all others, so what first members are computed from never leads back to them: every class comes after
/// the operands of its first member. Operands of other members come before it unless they are computed from it; then
/// that member closes a circle and is not offered as a production. The past of a state comes before its present also
/// where nothing reads it, because the present is left where the past lies.
fn order(
    graph: &Graph,
    outputs: &[ValueId],
    leader: &[ValueId],
    members: &BTreeMap<ValueId, Vec<ValueId>>,
) -> Vec<ValueId> {
    let needed = |class: ValueId| graph.node(class).args.iter().map(|a| leader[a.index()]);
    let pasts = unread_pasts(graph, outputs, leader);
    // Operands, each with whether the first member has it.
    let operands = |class: ValueId| -> Vec<(ValueId, bool)> {
        let values = members.get(&class).map_or(&[][..], Vec::as_slice);
        let of = |&m: &ValueId| graph.node(m).args.iter().map(move |a| (leader[a.index()], m == class));
        let mut all: Vec<(ValueId, bool)> = values.iter().flat_map(of).collect();
        all.extend(pasts.get(&class).into_iter().flatten().map(|&past| (past, true)));
        all
    };
    let is_past = |output: &&ValueId| pasts.values().flatten().any(|past| *past == leader[output.index()]);
    let mut sorted = Vec::new();
    let mut states: BTreeMap<ValueId, Visit> = BTreeMap::new();
    let others = outputs.iter().filter(|output| !is_past(output));
    for output in others.chain(outputs.iter().filter(is_past)) {
        let class = leader[output.index()];
        if states.contains_key(&class) {
            continue;
        }
        states.insert(class, Visit::Open);
        let mut open = vec![(class, operands(class).into_iter())];
        while let Some((class, rest)) = open.last_mut() {
            match rest.next() {
                Some((next, first)) => {
                    if !states.contains_key(&next) && (first || !needs_open(next, &states, &needed)) {
                        states.insert(next, Visit::Open);
                        open.push((next, operands(next).into_iter()));
                    }
                }
                None => {
                    states.insert(*class, Visit::Sorted);
                    sorted.push(*class);
                    open.pop();
                }
            }
        }
    }
    sorted
}

/// By the class of a present, the pasts that are wanted for themselves. The last of `outputs` are the graph's, in order.
fn unread_pasts(graph: &Graph, outputs: &[ValueId], leader: &[ValueId]) -> BTreeMap<ValueId, Vec<ValueId>> {
    let mut pasts: BTreeMap<ValueId, Vec<ValueId>> = BTreeMap::new();
    for pair in &graph.states {
        let input = graph.inputs().find(|(_, name, _)| **name == pair.input).map(|(value, ..)| value);
        let place = graph.outputs.iter().position(|output| output.name == pair.output);
        let hidden = outputs.len().saturating_sub(graph.outputs.len());
        let present = place.and_then(|place| outputs.get(hidden + place));
        let wanted = input.filter(|value| outputs.get(..hidden).is_some_and(|o| o.contains(value)));
        if let (Some(input), Some(present)) = (wanted, present) {
            pasts.entry(leader[present.index()]).or_default().push(leader[input.index()]);
        }
    }
    pasts
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Visit {
    /// Its operands are being sorted.
    Open,
    Sorted,
}

/// True if a class cannot be computed without one that is open. What is sorted can be.
fn needs_open<I: Iterator<Item = ValueId>>(
    class: ValueId,
    states: &BTreeMap<ValueId, Visit>,
    needed: &impl Fn(ValueId) -> I,
) -> bool {
    let (mut seen, mut rest) = (BTreeSet::from([class]), vec![class]);
    while let Some(class) = rest.pop() {
        match states.get(&class) {
            Some(Visit::Open) => return true,
            Some(Visit::Sorted) => {}
            None => rest.extend(needed(class).filter(|&next| seen.insert(next))),
        }
    }
    false
}

/// True if the operation may be repeated on every rank without counting.
fn is_light(op: &Op, pricer: &Pricer<'_>, value: ValueId, replicated: &Layout, mesh: &Mesh) -> bool {
    match op {
        Op::Map(_)
        | Op::Reduce { .. }
        | Op::Scan { .. }
        | Op::Broadcast { .. }
        | Op::Reshape { .. }
        | Op::Transpose { .. }
        | Op::Slice { .. }
        | Op::Pad { .. }
        | Op::Concat { .. }
        | Op::Gather { .. }
        | Op::GatherElements { .. }
        | Op::GatherNd { .. }
        | Op::ScatterElements { .. }
        | Op::ScatterNd { .. } => true,
        Op::Einsum(_) => {
            let cost = pricer.compute(value, &[replicated, replicated], replicated, mesh);
            cost.seconds() <= FREE_LAUNCHES * pricer.kernel_launch()
        }
        Op::Input { .. }
        | Op::Weight(_)
        | Op::Literal(_)
        | Op::Size(_)
        | Op::Iota { .. }
        | Op::Conv { .. }
        | Op::Pool { .. }
        | Op::TopK { .. }
        | Op::Dequant { .. }
        | Op::Append { .. }
        | Op::Softmax { .. }
        | Op::Norm { .. }
        | Op::Attention { .. }
        | Op::Rotary { .. }
        | Op::Deferred { .. }
        | Op::Convert(_) => false,
    }
}

/// Per dim of `value`, the units it may be dealt out in over one axis of `ranks` ranks, leaving out dims of one unit.
pub(super) fn shards(
    graph: &Graph,
    units: &Units,
    pricer: &Pricer<'_>,
    value: ValueId,
    ranks: usize,
) -> Vec<(usize, Dim)> {
    let mut found = Vec::new();
    for (dim, names) in units.canonical(graph, value, ranks).into_iter().enumerate() {
        let several = |unit: &Dim| {
            pricer
                .extents_of(value)
                .iter()
                .zip(pricer.entries())
                .any(|(extents, entry)| units_in(extents.get(dim).copied().unwrap_or(0), unit, entry) > 1)
        };
        found.extend(names.into_iter().filter(several).map(|unit| (dim, unit)));
    }
    found
}

fn units_in(extent: u64, unit: &Dim, entry: &Entry) -> u64 {
    let unit = unit.eval(&entry.bindings).ok().and_then(|u| u64::try_from(u).ok()).unwrap_or(1);
    extent / unit.max(1)
}

/// True if how `dim` of a state is dealt out changes while the state grows.
pub(super) fn grows(graph: &Graph, state: &StatePair, value: ValueId, dim: usize, unit: &Dim) -> bool {
    let shape = &graph.ty(value).shape;
    let Some(growing) = shape.get(state.axis) else { return true };
    let moving = growing.symbols();
    let depends = |d: &Dim| d.symbols().iter().any(|s| moving.contains(s));
    dim == state.axis || depends(unit) || shape.get(dim).is_none_or(depends)
}
