//! One decision for several entries: weights and state lie in memory once, everything else is decided per entry.
//!
//! The layout graphs of the entries are the same but for prices. *Unfolding* lays them side by side: a stored group
//! becomes a group that only lies in memory, shared by all entries, and one group per entry that reads and converts
//! it; a computed group becomes one per entry. *Folding* takes the choices of the unfolded graph apart again.
//!
//! Within a segment the entries come one after the other, behind the memory they share. A search then carries, besides
//! the frontier of one entry, only what the other entries demand of the memory of one segment.

use super::{Edge, Exit, Group, GroupKind, LayoutGraph, Operand, Production};
use crate::cost::Cost;
use crate::extract::Choice;
use crate::segment::segments;
use std::collections::BTreeMap;

/// The layout graphs of several entries side by side.
pub struct Unfolded {
    pub graph: LayoutGraph,
    /// Per entry and group: the group that stands for it in the unfolded graph; of a stored group the reading one.
    places: Vec<Vec<u32>>,
}

impl Unfolded {
    /// Unfolds graphs that differ in prices only. There must be at least one; a single one stays as it is.
    pub fn new(graphs: &[LayoutGraph]) -> Unfolded {
        let Some(first) = graphs.first() else {
            let graph =
                LayoutGraph { mesh: tpshard_ir::Mesh(Vec::new()), groups: Vec::new(), group_of: Vec::new() };
            return Unfolded { graph, places: Vec::new() };
        };
        if graphs.len() == 1 {
            let places = vec![(0..first.groups.len() as u32).collect()];
            return Unfolded { graph: first.clone(), places };
        }
        let mut builder =
            Builder { shared: BTreeMap::new(), places: vec![Vec::new(); graphs.len()], groups: Vec::new() };
        for segment in segments(first).iter().rev() {
            let inside = segment.low as usize..segment.high as usize;
            inside.clone().for_each(|index| builder.share(&first.groups[index], index as u32));
            for (entry, graph) in graphs.iter().enumerate() {
                inside.clone().for_each(|index| builder.place(entry, &graph.groups[index], index as u32));
            }
        }
        let graph = LayoutGraph { mesh: first.mesh.clone(), groups: builder.groups, group_of: Vec::new() };
        Unfolded { graph, places: builder.places }
    }

    /// The choices for one entry, in terms of its own graph.
    pub fn fold(
        &self,
        entry: usize,
        graph: &LayoutGraph,
        choices: &BTreeMap<u32, Choice>,
    ) -> BTreeMap<u32, Choice> {
        if self.places.len() == 1 {
            return choices.clone();
        }
        let Some(places) = self.places.get(entry) else { return BTreeMap::new() };
        let mut folded = BTreeMap::new();
        for (index, (group, place)) in graph.groups.iter().zip(places).enumerate() {
            let Some(choice) = choices.get(place) else { continue };
            let choice = match group.kind {
                GroupKind::Stored => self.read(group, *place, choice),
                GroupKind::Free | GroupKind::Computed => choice.clone(),
            };
            folded.insert(index as u32, choice);
        }
        folded
    }

    /// Reading slots from memory, in terms of the group as it was.
    fn read(&self, group: &Group, place: u32, choice: &Choice) -> Choice {
        let reader = &self.graph.groups[place as usize];
        let slots: Vec<u8> = choice
            .productions
            .iter()
            .filter_map(|&p| reader.productions.get(usize::from(p)))
            .map(|p| p.out)
            .collect();
        let count = group.layouts.len() as u8;
        let position = |slot: u8| {
            let out = if group.homes { count + slot } else { slot };
            group.productions.iter().position(|p| p.out == out).map(|p| p as u16)
        };
        let arrive = |&slot: &u8| {
            let home = |e: &Edge| e.conversion.is_none() && e.to == slot;
            group.conversions.iter().position(home).map(|e| e as u16)
        };
        let arrivals = slots.iter().filter_map(arrive);
        Choice {
            productions: slots.iter().filter_map(|&s| position(s)).collect(),
            conversions: arrivals.chain(choice.conversions.iter().copied()).collect(),
            ..choice.clone()
        }
    }
}

struct Builder {
    /// Per group that all entries share: where it is.
    shared: BTreeMap<u32, u32>,
    places: Vec<Vec<u32>>,
    groups: Vec<Group>,
}

impl Builder {
    /// Adds what is there once for all entries.
    fn share(&mut self, group: &Group, index: u32) {
        let shared = match group.kind {
            GroupKind::Free => Group { productions: Vec::new(), exits: Vec::new(), ..group.clone() },
            GroupKind::Stored => in_memory(group),
            GroupKind::Computed => return,
        };
        let place = self.push(shared);
        self.shared.insert(index, place);
    }

    /// Adds what is there for one entry.
    fn place(&mut self, entry: usize, group: &Group, index: u32) {
        let place = match (group.kind, self.shared.get(&index)) {
            (GroupKind::Free, Some(&shared)) => shared,
            (GroupKind::Stored, Some(&memory)) => {
                let reader = self.reader(group, memory);
                self.push(reader)
            }
            _ => {
                let computed = self.computed(entry, group);
                self.push(computed)
            }
        };
        self.places[entry].push(place);
    }

    fn push(&mut self, group: Group) -> u32 {
        self.groups.push(group);
        self.groups.len() as u32 - 1
    }

    fn operand(&self, entry: usize, operand: Operand) -> Operand {
        Operand { group: self.places[entry][operand.group as usize], ..operand }
    }

    /// Demands that states lie somewhere: on the shared memory.
    fn at_home(&self, operand: &Operand) -> Operand {
        let Some(&memory) = self.shared.get(&operand.group) else { return *operand };
        let count = self.groups[memory as usize].layouts.len() as u8;
        Operand { group: memory, slot: operand.slot % count.max(1) }
    }

    fn computed(&self, entry: usize, group: &Group) -> Group {
        let mut group = group.clone();
        for production in &mut group.productions {
            production.operands.iter_mut().for_each(|o| *o = self.operand(entry, *o));
        }
        for exit in &mut group.exits {
            exit.also.iter_mut().for_each(|o| *o = self.at_home(o));
        }
        group
    }

    fn reader(&self, group: &Group, memory: u32) -> Group {
        let count = group.layouts.len() as u8;
        let stored = &self.groups[memory as usize];
        let read = |p: &Production| Production {
            out: p.out,
            operands: vec![Operand { group: memory, slot: p.out }],
            value: group.value,
            cost: Cost::ZERO,
            bytes: 0,
        };
        // A state that is only read leaves as it lies.
        let exit = |e: &Exit| {
            let home = (e.slot >= count).then_some(Operand { group: memory, slot: e.slot % count.max(1) });
            let also = e.also.iter().map(|o| self.at_home(o)).chain(home).collect();
            Exit { slot: e.slot % count.max(1), also, ..e.clone() }
        };
        Group {
            kind: GroupKind::Computed,
            homes: false,
            productions: stored.productions.iter().map(read).collect(),
            conversions: group.conversions.iter().filter(|e| e.conversion.is_some()).cloned().collect(),
            exits: group.exits.iter().map(exit).collect(),
            ..group.clone()
        }
    }
}

/// A stored group without its ways to be read.
fn in_memory(group: &Group) -> Group {
    let count = group.layouts.len() as u8;
    let at = |p: &Production| Production { out: p.out % count.max(1), ..p.clone() };
    Group {
        homes: false,
        productions: group.productions.iter().map(at).collect(),
        conversions: Vec::new(),
        exits: Vec::new(),
        ..group.clone()
    }
}
