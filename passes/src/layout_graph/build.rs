//! Building the layout graph straight from the sharding table: operands first, one pass for slots and productions, one
//! for conversions.
//!
//! Partial slots need a rule of when they exist, as any value could be held partially in many ways. A partial layout is
//! *native* to a value if a square makes it. A square that takes partial operands is offered if all of them are native,
//! or if several are taken jointly and at least one is; the others then come from whole values kept by the first rank.

use super::classes::{Classes, grows, shards};
use super::{Edge, Exit, Group, GroupKind, LayoutGraph, MAX_SLOTS, Operand, Production};
use crate::cost::{Cost, Pricer};
use crate::sharding::{MeshSquare, Units, conversions, is_well_formed, squares_on_mesh};
use rustc_hash::FxHashMap;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;
use tpshard_ir::{AxisLayout, DType, Dim, Graph, Layout, Mesh, Monoid, Op, Output, Type, ValueId};

/// What a layout graph is made from.
pub struct Model<'a> {
    pub graph: &'a Graph,
    pub outputs: &'a [Output],
    pub classes: &'a Classes,
    pub units: &'a Units,
    pub pricer: &'a Pricer<'a>,
    pub mesh: &'a Mesh,
    /// Sums of floats are made on one rank, each in one order.
    pub one_order: bool,
}

/// The graph has no layout graph.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum BuildError {
    #[error("state `{state}`: the graph has no {what} of that name")]
    State { state: String, what: &'static str },
    #[error("output `{output}` depends on nothing the plan knows")]
    Output { output: String },
}

/// Per dim of a value, the units it may be dealt out in.
type DimUnits = Vec<BTreeSet<Dim>>;

/// A number for all values of one type that may be dealt out in the same units.
type Sort = u32;

/// All that the price of a square depends on besides the operation: the sorts of operands and result, and what the
/// pricer names.
type Shape = (Vec<Sort>, Vec<u64>);

/// The squares of one operation, with what each costs.
type Squares = Rc<Vec<(MeshSquare, Cost)>>;

/// The conversions between some layouts, with what each costs.
type Edges = Rc<Vec<Edge>>;

/// Answers that alike layers ask for again. Where a key would be dear to copy, the second part of it is searched for.
#[derive(Default)]
struct Memory {
    sorts: FxHashMap<Type, Vec<(DimUnits, Sort)>>,
    /// The sort of each value, once it was asked for.
    sort_of: Vec<Option<Sort>>,
    count: Sort,
    squares: FxHashMap<Shape, Vec<(Op, Squares)>>,
    conversions: FxHashMap<Sort, Vec<(Vec<Layout>, Edges)>>,
    shards: FxHashMap<Sort, Rc<Vec<Layout>>>,
}

impl Memory {
    fn sort(&mut self, model: &Model<'_>, value: ValueId) -> Sort {
        self.sort_of.resize(model.graph.len(), None);
        if let Some(known) = self.sort_of[value.index()] {
            return known;
        }
        let (ty, units) = (model.graph.ty(value), model.units.of(value));
        let next = self.count;
        let alike = self.sorts.entry(ty.clone()).or_default();
        let sort = match alike.iter().find(|(known, _)| known == units) {
            Some(&(_, sort)) => sort,
            None => {
                alike.push((units.to_vec(), next));
                self.count += 1;
                next
            }
        };
        self.sort_of[value.index()] = Some(sort);
        sort
    }
}

struct Builder<'a> {
    model: &'a Model<'a>,
    memory: Memory,
    /// Symbols that data decides.
    data: BTreeSet<Arc<str>>,
    groups: Vec<Group>,
    /// Per group, the partial slots that squares make.
    native: Vec<u64>,
    /// Per class, the mixed layouts it may have on a mesh of several axes.
    mixed: Vec<BTreeSet<Layout>>,
}

/// The layout graph of a model.
///
/// # Errors
/// A state pair names an input or output that does not exist.
pub fn build(model: &Model<'_>) -> Result<LayoutGraph, BuildError> {
    let mut builder = Builder {
        model,
        memory: Memory::default(),
        data: model.graph.data_symbols(),
        groups: Vec::new(),
        native: Vec::new(),
        mixed: Vec::new(),
    };
    builder.mixed = builder.mixed_layouts();
    for index in 0..model.classes.all.len() {
        builder.add(index);
    }
    for index in 0..builder.groups.len() {
        builder.convert(index);
    }
    builder.exits()?;
    Ok(LayoutGraph { mesh: model.mesh.clone(), groups: builder.groups, group_of: model.classes.of.clone() })
}

/// True if `value` has elements smaller than a byte that ranks compute: parts of those do not end where bytes do, so
/// they are held whole.
fn packed_at_run_time(graph: &Graph, value: ValueId) -> bool {
    let node = graph.node(value);
    node.ty.dtype.is_packed()
        && (matches!(node.op, Op::Map(_)) || node.args.iter().any(|&a| packed_at_run_time(graph, a)))
}

/// True if ranks hold parts whose combination rounds, so that the result depends on how many parts there are.
fn is_rounded_apart(layout: &Layout, dtype: DType) -> bool {
    let rounds = |part: &AxisLayout| matches!(part, AxisLayout::Partial(Monoid::Sum | Monoid::Prod));
    dtype.is_float() && layout.0.iter().any(rounds)
}

/// True if a square with a result in parts has one rank hold each element, and the others zeros: rows gathered from a
/// table that is split by rows. Adding those does not round.
fn adds_zeros(op: &Op, operands: &[Layout]) -> bool {
    matches!(op, Op::Gather { .. }) && !operands.iter().any(Layout::has_partial)
}

impl Builder<'_> {
    fn add(&mut self, index: usize) {
        let class = &self.model.classes.all[index];
        let value = class.members[0];
        let mut group = Group {
            value,
            kind: class.kind,
            layouts: Vec::new(),
            homes: class.state.is_some(),
            single: class.state.is_some(),
            productions: Vec::new(),
            conversions: Vec::new(),
            exits: Vec::new(),
        };
        if class.kind == GroupKind::Free || packed_at_run_time(self.model.graph, value) {
            group.layouts = vec![Layout::replicated(self.model.mesh)];
        } else {
            group.layouts = self.universe(value).to_vec();
            group.layouts.extend(self.mixed[index].iter().cloned());
            group.layouts.truncate(MAX_SLOTS);
        }
        if let Some(state) = class.state.and_then(|s| self.model.graph.states.get(s)) {
            let stays = |layout: &Layout| {
                layout.0.iter().all(|part| match part {
                    AxisLayout::Shard { dim, unit } => !grows(self.model.graph, state, value, *dim, unit),
                    AxisLayout::Replicated => true,
                    AxisLayout::Partial(_) => false,
                })
            };
            group.layouts.retain(stays);
            group.layouts.truncate(MAX_SLOTS / 2);
        }
        self.groups.push(group);
        self.native.push(0);
        match class.kind {
            GroupKind::Free => {}
            GroupKind::Stored => self.store(index),
            GroupKind::Computed => {
                for &member in &class.members {
                    self.produce(index, member);
                }
            }
        }
    }

    /// The layouts in which the axes of a mesh may differ: those that key and value heads are forced to have where
    /// query heads are dealt out over all axes, and what follows for the values they are computed from. All others
    /// would only make the search longer.
    fn mixed_layouts(&mut self) -> Vec<BTreeSet<Layout>> {
        let Model { graph, classes, mesh, .. } = *self.model;
        let mut mixed = vec![BTreeSet::new(); classes.all.len()];
        if mesh.axes() < 2 {
            return mixed;
        }
        for index in (0..classes.all.len()).rev() {
            let class = &classes.all[index];
            if class.kind == GroupKind::Free {
                mixed[index].clear();
                continue;
            }
            for &member in &class.members {
                let node = graph.node(member);
                let wanted = mixed[index].clone();
                let heads = matches!(node.op, Op::Attention { .. });
                if !heads && wanted.is_empty() {
                    continue;
                }
                for (square, _) in self.squares(member).iter() {
                    let split = |part: &AxisLayout| part.sharded_dim() == Some(1);
                    let seed = heads && square.result.0.iter().all(split);
                    if !seed && !wanted.contains(&square.result) {
                        continue;
                    }
                    for (arg, layout) in node.args.iter().zip(&square.operands) {
                        let leading = layout.0.first().is_some_and(|part| part.sharded_dim().is_some());
                        if let Some(operand) = classes.of[arg.index()]
                            && leading
                            && !is_uniform(layout)
                            && !layout.has_partial()
                        {
                            mixed[operand as usize].insert(layout.clone());
                        }
                    }
                }
            }
        }
        mixed
    }

    /// Every layout without partial values in which all mesh axes agree on the dim.
    fn universe(&mut self, value: ValueId) -> Rc<Vec<Layout>> {
        let Model { graph, units, pricer, mesh, .. } = *self.model;
        let ty = graph.ty(value);
        let key = self.memory.sort(self.model, value);
        if let Some(known) = self.memory.shards.get(&key) {
            return known.clone();
        }
        let mut all = vec![Layout(Vec::new())];
        for &ranks in &mesh.0 {
            let mut parts = vec![AxisLayout::Replicated];
            let mut shards = if ranks == 1 { vec![] } else { shards(graph, units, pricer, value, ranks) };
            // Sizes that data decides are not dealt out: nothing says what that would gain.
            let decided = |dim: usize| {
                let extent = graph.ty(value).shape.get(dim);
                extent.is_some_and(|e| e.symbols().iter().any(|symbol| self.data.contains(symbol)))
            };
            if !self.data.is_empty() {
                shards.retain(|(dim, _)| !decided(*dim));
            }
            parts.extend(shards.into_iter().map(|(dim, unit)| AxisLayout::Shard { dim, unit }));
            all = all
                .iter()
                .flat_map(|layout| {
                    let then = |part: &AxisLayout| Layout(layout.0.iter().chain([part]).cloned().collect());
                    parts.iter().map(then).collect::<Vec<_>>()
                })
                .collect();
        }
        all.retain(|layout| is_uniform(layout) && is_well_formed(ty, layout, mesh));
        all.truncate(MAX_SLOTS);
        let all = Rc::new(all);
        self.memory.shards.insert(key, all.clone());
        all
    }

    fn store(&mut self, index: usize) {
        let Model { pricer, mesh, .. } = *self.model;
        let group = &mut self.groups[index];
        let count = group.layouts.len();
        for (slot, layout) in group.layouts.iter().enumerate() {
            group.productions.push(Production {
                out: if group.homes { count + slot } else { slot } as u8,
                operands: Vec::new(),
                value: group.value,
                cost: pricer.whole(layout),
                bytes: pricer.local_bytes(group.value, layout, mesh),
            });
        }
    }

    /// All squares of the operation that makes `member`, in terms of slots.
    fn produce(&mut self, index: usize, member: ValueId) {
        let Model { graph, classes, mesh, .. } = *self.model;
        let node = graph.node(member);
        let operands: Option<Vec<usize>> =
            node.args.iter().map(|a| classes.of[a.index()].map(|c| c as usize)).collect();
        // An operand that is decided later would close a circle.
        let Some(operands) = operands.filter(|all| all.iter().all(|&o| o < index)) else { return };
        // On one rank every layout is the same.
        let most = if mesh.ranks() == 1 { 1 } else { usize::MAX };
        for (square, cost) in self.squares(member).iter().take(most) {
            let Some(slots) = self.operand_slots(&operands, square) else { continue };
            let Some(out) = self.result_slot(index, &square.result) else { continue };
            let place = |(&group, slot): (&usize, u8)| Operand { group: group as u32, slot };
            self.groups[index].productions.push(Production {
                out,
                operands: operands.iter().zip(slots).map(place).collect(),
                value: member,
                cost: *cost,
                bytes: 0,
            });
        }
    }

    fn squares(&mut self, value: ValueId) -> Squares {
        let Model { graph, units, pricer, mesh, .. } = *self.model;
        let node = graph.node(value);
        let operands = node.args.iter().chain([&value]);
        let sorts = operands.map(|&v| self.memory.sort(self.model, v)).collect();
        let alike = self.memory.squares.entry((sorts, pricer.traits(value).collect())).or_default();
        if let Some((_, known)) = alike.iter().find(|(op, _)| *op == node.op) {
            return known.clone();
        }
        let args: Vec<&Type> = node.args.iter().map(|&a| graph.ty(a)).collect();
        let mut squares = squares_on_mesh(&node.op, &args, &node.ty, mesh, &units.deals(graph, value));
        if self.model.one_order {
            squares.retain(|square| {
                !is_rounded_apart(&square.result, node.ty.dtype) || adds_zeros(&node.op, &square.operands)
            });
        }
        let price = |square: MeshSquare| {
            let layouts: Vec<&Layout> = square.operands.iter().collect();
            let cost = pricer.compute(value, &layouts, &square.result, mesh);
            (square, cost)
        };
        let found = Rc::new(squares.into_iter().map(price).collect::<Vec<_>>());
        alike.push((node.op.clone(), found.clone()));
        found
    }

    /// The slots of a square's operands, if all of them can be had.
    fn operand_slots(&mut self, operands: &[usize], square: &MeshSquare) -> Option<Vec<u8>> {
        let partial: Vec<bool> = square.operands.iter().map(Layout::has_partial).collect();
        let native = |(&group, layout): (&usize, &Layout)| {
            layout.has_partial()
                && self.groups[group].slot(layout).is_some_and(|s| self.native[group] >> s & 1 == 1)
        };
        let wanted = partial.iter().filter(|&&p| p).count();
        let found = operands.iter().zip(&square.operands).filter(|&pair| native(pair)).count();
        if wanted > 0 && (found == 0 || (found < wanted && wanted < 2)) {
            return None;
        }
        // All must be there before any slot is added.
        let there = |(&group, layout): (&usize, &Layout)| {
            let group = &self.groups[group];
            let may_add =
                group.kind == GroupKind::Free || (layout.has_partial() && is_uniform(layout) && !group.homes);
            group.slot(layout).is_some() || (group.layouts.len() < MAX_SLOTS && may_add)
        };
        if !operands.iter().zip(&square.operands).all(there) {
            return None;
        }
        operands
            .iter()
            .zip(&square.operands)
            .map(|(&group, layout)| self.slot_or_add(group, layout))
            .collect()
    }

    fn result_slot(&mut self, index: usize, layout: &Layout) -> Option<u8> {
        if !layout.has_partial() {
            return self.groups[index].slot(layout);
        }
        if !is_uniform(layout) {
            return None;
        }
        let slot = self.slot_or_add(index, layout)?;
        self.native[index] |= 1 << slot;
        Some(slot)
    }

    fn slot_or_add(&mut self, index: usize, layout: &Layout) -> Option<u8> {
        let group = &mut self.groups[index];
        if group.slot(layout).is_none() {
            if group.layouts.len() >= MAX_SLOTS {
                return None;
            }
            group.layouts.push(layout.clone());
        }
        group.slot(layout)
    }

    /// All conversions between the slots of a group.
    fn convert(&mut self, index: usize) {
        let Model { graph, pricer, mesh, .. } = *self.model;
        let group = &self.groups[index];
        if group.kind == GroupKind::Free {
            return;
        }
        let sort = self.memory.sort(self.model, group.value);
        let alike = self.memory.conversions.entry(sort).or_default();
        let known =
            alike.iter().find(|(layouts, _)| *layouts == group.layouts).map(|(_, edges)| edges.clone());
        let found = known.unwrap_or_else(|| {
            let ty = graph.ty(group.value);
            let mut all = Vec::new();
            for (from, before) in group.layouts.iter().enumerate() {
                for (to, after) in group.layouts.iter().enumerate() {
                    if let Some(conversion) = conversions(ty, before, after, mesh) {
                        let cost = pricer.convert(group.value, &conversion, before, after, mesh);
                        let (from, to) = (from as u8, to as u8);
                        all.push(Edge { from, to, conversion: Some(conversion), cost });
                    }
                }
            }
            let all = Rc::new(all);
            alike.push((group.layouts.clone(), all.clone()));
            all
        });
        let mut edges: Vec<Edge> = found.to_vec();
        if group.homes {
            let count = group.layouts.len() as u8;
            let read = |slot| Edge { from: count + slot, to: slot, conversion: None, cost: Cost::ZERO };
            edges.extend((0..count).map(read));
        }
        self.groups[index].conversions = edges;
    }

    /// Lets every output be left in any layout without partial values; a present state only in the layout of its past.
    fn exits(&mut self) -> Result<(), BuildError> {
        let Model { graph, outputs, classes, pricer, mesh, .. } = *self.model;
        for output in outputs {
            let missing = || BuildError::Output { output: output.name.to_string() };
            let index = classes.of[output.value.index()].ok_or_else(missing)? as usize;
            let pair = graph.states.iter().find(|s| s.output == output.name);
            let past = match pair {
                None => None,
                Some(pair) => self.past(&pair.input)?,
            };
            if let Some(past) = past.filter(|_| self.groups[index].kind == GroupKind::Free) {
                // What plans do not decide about is there whole, so the past has to be, too.
                self.groups[past].productions.truncate(1);
            }
            let group = &self.groups[index];
            let mut exits = Vec::new();
            // What defines sizes is whole on every rank, and there is nothing to decide.
            let defines = matches!(graph.node(output.value).op, Op::Deferred { .. });
            let may_leave = |layout: &Layout| !layout.has_partial() && (!defines || layout.is_replicated());
            for (slot, layout) in group.layouts.iter().enumerate().filter(|(_, l)| may_leave(l)) {
                let home = match past {
                    None => None,
                    // A state that is only read.
                    Some(past) if past == index => {
                        let slot = (group.layouts.len() + slot) as u8;
                        exits.push(Exit { slot, cost: Cost::ZERO, collected: 0, also: Vec::new() });
                        continue;
                    }
                    Some(past) => {
                        let past_group = &self.groups[past];
                        let Some(found) = past_group.slot(layout) else { continue };
                        Some(Operand { group: past as u32, slot: past_group.layouts.len() as u8 + found })
                    }
                };
                let collected = u32::from(pair.is_none());
                let cost =
                    if pair.is_some() { Cost::ZERO } else { pricer.collect(output.value, layout, mesh) };
                exits.push(Exit { slot: slot as u8, cost, collected, also: home.into_iter().collect() });
            }
            self.groups[index].exits = join(std::mem::take(&mut self.groups[index].exits), exits);
        }
        Ok(())
    }

    /// The group of the input `name`; none if nothing needs it.
    fn past(&self, name: &str) -> Result<Option<usize>, BuildError> {
        let missing = || BuildError::State { state: name.to_owned(), what: "input" };
        let input = self.model.graph.inputs().find(|(_, n, _)| &***n == name).ok_or_else(missing)?;
        Ok(self.model.classes.of[input.0.index()].map(|c| c as usize))
    }
}

/// True if all mesh axes split the same dim, or none does anything, or all hold partial values.
fn is_uniform(layout: &Layout) -> bool {
    let Some((first, rest)) = layout.0.split_first() else { return true };
    rest.iter().all(|part| match (first, part) {
        (AxisLayout::Shard { dim: a, .. }, AxisLayout::Shard { dim: b, .. }) => a == b,
        (a, b) => a == b,
    })
}

/// The exits of a value that is an output twice: it leaves in one layout.
fn join(first: Vec<Exit>, second: Vec<Exit>) -> Vec<Exit> {
    if first.is_empty() {
        return second;
    }
    let with = |a: &Exit| {
        let b = second.iter().find(|b| b.slot == a.slot)?;
        let also = a.also.iter().chain(&b.also).copied().collect();
        Some(Exit { slot: a.slot, cost: a.cost + b.cost, collected: a.collected + b.collected, also })
    };
    first.iter().filter_map(with).collect()
}
