//! The AND-OR graph that plans are chosen from.
//!
//! A *group* stands for one logical value, with everything known to equal it. Its *slots* are the layouts the value can
//! be had in; a *production* makes one slot from slots of other groups (a square), a *conversion* makes one slot from
//! another slot of the same group. A plan picks productions and conversions until every output is there.
//!
//! A value that enters as state has two kinds of slot: the layouts themselves, and behind each of them a *home* slot:
//! being demanded at home in a layout means to lie in memory in that layout between steps. Only home slots are
//! produced, and a free edge leads from each to its layout. So that a past and its present agree, the exits of the
//! present demand the past at home.

mod build;
mod classes;
mod entries;
mod kept;
mod pins;

pub use entries::Unfolded;
pub use kept::{Kept, KeptError, StoredName};
pub use pins::{Pin, PinError};

pub(crate) use kept::apply as apply_kept;
pub(crate) use pins::apply as apply_pins;

pub use build::{BuildError, Model, build};
pub use classes::{Class, Classes};

use crate::cost::Cost;
use std::iter::Sum;
use std::ops::Add;
use tpshard_ir::{Conversion, Layout, Mesh, ValueId};

/// Most slots a group may have; demands are sets in one machine word.
pub const MAX_SLOTS: usize = 64;

/// A slot of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Operand {
    pub group: u32,
    pub slot: u8,
}

/// A square: the operation of `value` on families of its operands gives the family of the group in slot `out`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Production {
    pub out: u8,
    pub operands: Vec<Operand>,
    /// The logical value whose operation is executed; one of the values of the group.
    pub value: ValueId,
    pub cost: Cost,
    /// Bytes that stay in memory: of weights and state.
    pub bytes: u64,
}

/// A change of layout; `conversion` is absent where a home slot is read in its own layout.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Edge {
    pub from: u8,
    pub to: u8,
    pub conversion: Option<Conversion>,
    pub cost: Cost,
}

/// One way in which an output may be left: in `slot`, with the past states it succeeds at home in `also`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    pub slot: u8,
    pub cost: Cost,
    /// How many outputs are collected on rank 0; states stay where they are.
    pub collected: u32,
    pub also: Vec<Operand>,
}

/// What the values of a group are to the planner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GroupKind {
    /// Inputs, constants and what is computed from them alone with next to no work: to be had in all layouts at no
    /// cost worth counting, so no plan depends on them.
    Free,
    /// Data that lies in memory between steps: weights and state.
    Stored,
    Computed,
}

/// One logical value and the ways to have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// The value by which messages name the group.
    pub value: ValueId,
    pub kind: GroupKind,
    pub layouts: Vec<Layout>,
    /// True if slots `layouts.len()..` are the home slots of a state.
    pub homes: bool,
    /// True if at most one production may be chosen: a state lies in one layout.
    pub single: bool,
    pub productions: Vec<Production>,
    pub conversions: Vec<Edge>,
    /// Not empty for outputs: exactly one of them is chosen.
    pub exits: Vec<Exit>,
}

impl Group {
    pub fn slots(&self) -> usize {
        if self.homes { 2 * self.layouts.len() } else { self.layouts.len() }
    }

    /// The layout of `slot`.
    pub fn layout(&self, slot: u8) -> &Layout {
        &self.layouts[usize::from(slot) % self.layouts.len()]
    }

    /// The slot of `layout`, if the value can be had in it.
    pub fn slot(&self, layout: &Layout) -> Option<u8> {
        self.layouts.iter().position(|l| l == layout).and_then(|i| u8::try_from(i).ok())
    }
}

/// Groups in dependency order: operands come before users, stored ones right before their first user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayoutGraph {
    pub mesh: Mesh,
    pub groups: Vec<Group>,
    /// The group of each value of the logical graph; none for values that nothing needs.
    pub group_of: Vec<Option<u32>>,
}

/// Sizes of a layout graph.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sizes {
    pub groups: usize,
    pub classes: usize,
    pub productions: usize,
    pub conversions: usize,
}

impl Sizes {
    pub fn of(groups: &[Group]) -> Sizes {
        let mut sizes = Sizes { groups: groups.len(), ..Sizes::default() };
        for group in groups {
            sizes.classes += group.layouts.len();
            sizes.productions += group.productions.len();
            sizes.conversions += group.conversions.len();
        }
        sizes
    }
}

impl Add for Sizes {
    type Output = Sizes;

    fn add(self, other: Sizes) -> Sizes {
        Sizes {
            groups: self.groups + other.groups,
            classes: self.classes + other.classes,
            productions: self.productions + other.productions,
            conversions: self.conversions + other.conversions,
        }
    }
}

impl Sum for Sizes {
    fn sum<I: Iterator<Item = Sizes>>(all: I) -> Sizes {
        all.fold(Sizes::default(), Add::add)
    }
}

impl LayoutGraph {
    pub fn sizes(&self) -> Sizes {
        Sizes::of(&self.groups)
    }

    /// True if plans decide about the group.
    pub fn is_planned(&self, group: u32) -> bool {
        self.groups[group as usize].kind != GroupKind::Free
    }
}
