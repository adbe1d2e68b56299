//! State that stays with its rank between steps: the keys and values of a decoder.
//!
//! A *slot* is one sequence. Slots that step together form a group: one tensor per state pair with all slots along the
//! slot dim and room for `capacity` entries along the dim that grows. A step reads the filled prefix as its past and
//! appends behind it, so its cost is that of the new entries; only when other slots step together than before are rows
//! copied. A program runs on slots of one length, so a step of slots of different lengths is made of several *parts*,
//! one per length.
//!
//! Every rank keeps its own share, in the layout of the program, and changes it by the same requests.

mod parts;
mod saved;
mod stored;

pub(crate) use parts::{Batch, StepPart};
pub(crate) use stored::{Home, Stored};

use crate::cpu::convert::{Place, held};
use crate::cpu::step::Held;
use crate::cpu::value::Value;
use crate::cuda::DeviceTensor;
use crate::session::SessionError;
use std::collections::BTreeMap;
use std::sync::Arc;
use tpshard_ir::dim::{Bindings, Dim};
use tpshard_ir::layout::Mesh;
use tpshard_ir::program::{Entry, Family, RankProgram, StateSpec};
use tpshard_ir::{Tensor, Type};

/// A sequence whose state a session keeps; chosen by the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotId(pub u64);

/// How much state a session has room for.
#[derive(Clone, Debug)]
pub struct StateOptions {
    /// Entries per slot along the dim that grows.
    pub capacity: usize,
    /// Slots alive at one time.
    pub slots: usize,
}

/// The state inputs of a step, as the entry's signature needs them.
pub(crate) struct StateInputs {
    pub(crate) types: BTreeMap<Arc<str>, Type>,
}

/// A change of state without computation.
pub(crate) enum Change {
    None,
    Truncate {
        slot: SlotId,
        length: usize,
    },
    Fork {
        from: SlotId,
        to: SlotId,
    },
    Drop {
        slot: SlotId,
    },
    /// Something is about to be loaded.
    Load {
        slot: SlotId,
        length: usize,
    },
}

/// Slots that lie in one tensor per state pair.
pub(crate) struct SlotGroup {
    slots: Vec<SlotId>,
    length: usize,
    /// One per state pair, in the order of the program.
    tensors: Vec<Stored>,
    inputs: Vec<(Arc<str>, usize)>,
}

/// All state of one rank.
pub(crate) struct StateStore {
    specs: Vec<StateSpec>,
    mesh: Mesh,
    rank: usize,
    options: StateOptions,
    home: Home,
    groups: Vec<SlotGroup>,
}

fn refuse(what: impl Into<String>) -> SessionError {
    SessionError::State { what: what.into() }
}

impl SlotGroup {
    /// The filled prefixes of tensors on the host, handed out; they come back with [`StateStore::put_back`].
    pub(crate) fn values(&mut self) -> BTreeMap<Arc<str>, Value> {
        let prefix = |((name, axis), stored): (&(Arc<str>, usize), &mut Stored)| match stored {
            Stored::Host(tensor) => {
                let value = Value::new(std::mem::replace(tensor, Tensor::scalar(0f32)));
                // The length never exceeds the capacity the tensors were made with.
                Some((name.clone(), value.sliced(*axis, 0, self.length, 1).unwrap_or(value)))
            }
            Stored::Device(_) => None,
        };
        self.inputs.iter().zip(&mut self.tensors).filter_map(prefix).collect()
    }

    /// Tensors on a device, with room for the capacity.
    pub(crate) fn on_device(&self) -> BTreeMap<Arc<str>, DeviceTensor> {
        let tensor = |((name, _), stored): (&(Arc<str>, usize), &Stored)| match stored {
            Stored::Device(tensor) => Some((name.clone(), tensor.clone())),
            Stored::Host(_) => None,
        };
        self.inputs.iter().zip(&self.tensors).filter_map(tensor).collect()
    }
}

impl StateStore {
    pub(crate) fn new(
        program: &RankProgram,
        options: &StateOptions,
        home: Home,
        memory_limit: u64,
    ) -> Result<StateStore, SessionError> {
        if program.states.is_empty() {
            return Err(refuse("the model has no state\n  help: open the session without a state capacity"));
        }
        for spec in &program.states {
            let fixed = (0..spec.ty.rank())
                .filter(|&d| d != spec.axis && Some(d) != spec.slot_axis)
                .all(|d| spec.ty.shape[d].as_size().is_some());
            let moves = |d: usize| d == spec.axis || Some(d) == spec.slot_axis;
            if !fixed || spec.axis >= spec.ty.rank() || spec.slot_axis.is_some_and(|d| d >= spec.ty.rank()) {
                return Err(refuse(format!(
                    "state `{}` of type {} has other open dims",
                    spec.input, spec.ty
                )));
            }
            if spec.layout.0.iter().any(|a| a.sharded_dim().is_some_and(moves)) || spec.layout.has_partial() {
                return Err(refuse(format!(
                    "state `{}` is split as {}, along a dim that grows",
                    spec.input, spec.layout
                )));
            }
        }
        let store = StateStore {
            specs: program.states.clone(),
            mesh: program.mesh.clone(),
            rank: program.rank,
            options: options.clone(),
            home,
            groups: Vec::new(),
        };
        let mut needed = 0u64;
        for spec in &store.specs {
            let shape = store.local_shape(spec, options.slots)?;
            let elements = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d as u64));
            let bytes = elements.and_then(|n| spec.ty.dtype.byte_len(n)).unwrap_or(u64::MAX);
            needed = needed.saturating_add(bytes);
        }
        if needed > memory_limit {
            return Err(SessionError::Memory { rank: program.rank, needed, limit: memory_limit });
        }
        Ok(store)
    }

    /// The shape of this rank's buffer for `slots` slots.
    fn local_shape(&self, spec: &StateSpec, slots: usize) -> Result<Vec<usize>, SessionError> {
        let ty = typed(spec, self.options.capacity, slots);
        let (family, bindings) = (Family { ty, layout: spec.layout.clone() }, Bindings::new());
        let place = Place { mesh: &self.mesh, rank: self.rank, bindings: &bindings };
        let runs = held(&family, &place, self.rank).map_err(refuse)?;
        Ok(runs.into_iter().map(|run| run.1).collect())
    }

    /// Entries that a slot has room for.
    pub(crate) fn capacity(&self) -> usize {
        self.options.capacity
    }

    fn find(&self, slot: SlotId) -> Option<(usize, usize)> {
        self.groups
            .iter()
            .enumerate()
            .find_map(|(g, group)| Some((g, group.slots.iter().position(|s| *s == slot)?)))
    }

    pub(crate) fn length(&self, slot: SlotId) -> Option<usize> {
        self.find(slot).map(|(group, _)| self.groups[group].length)
    }

    fn count(&self) -> usize {
        self.groups.iter().map(|g| g.slots.len()).sum()
    }

    /// Refuses a step whose new entries do not fit.
    pub(crate) fn check_capacity(
        &self,
        entry: &Entry,
        bindings: &Bindings,
        length: usize,
    ) -> Result<(), SessionError> {
        // Most states are alike.
        let mut found_fit = None;
        for spec in &self.specs {
            let port = entry.outputs.iter().find(|p| p.name == spec.output);
            let port = port.ok_or_else(|| refuse(format!("the entry has no output `{}`", spec.output)))?;
            let about = (&spec.ty.shape, spec.axis, &port.ty.shape);
            if found_fit == Some(about) {
                continue;
            }
            if length > 0 && !grows(spec, &port.ty) {
                return Err(refuse(format!(
                    "the step would begin state `{}` anew, whose slots hold {length} entries\n  \
                     help: drop the slots first, or choose the entry that continues them",
                    spec.input
                )));
            }
            let grown = port.ty.shape.get(spec.axis).map_or(Ok(0), |d| d.eval(bindings));
            let grown = grown.map_err(|e| refuse(e.to_string()))?;
            if grown > self.options.capacity as i64 {
                return Err(refuse(format!(
                    "the step would grow state `{}` from {length} to {grown} entries, the capacity is {}\n  \
                     help: truncate or drop slots, or open the session with a larger capacity",
                    spec.input, self.options.capacity
                )));
            }
            found_fit = Some(about);
        }
        Ok(())
    }

    /// The group that is exactly `slots`, all of one length, regrouped if need be.
    pub(crate) fn take(&mut self, slots: &[SlotId]) -> Result<SlotGroup, SessionError> {
        self.check_slots(slots)?;
        let length = slots.first().and_then(|&slot| self.length(slot)).unwrap_or(0);
        if let Some(other) = slots.iter().find(|&&slot| self.length(slot).unwrap_or(0) != length) {
            return Err(refuse(format!("slot {} does not hold {length} entries as the others do", other.0)));
        }
        if let Some(at) = self.groups.iter().position(|g| g.slots == slots) {
            return Ok(self.groups.swap_remove(at));
        }
        let tensors = self.copy_rows(slots)?;
        for &slot in slots {
            self.forget(slot)?;
        }
        Ok(SlotGroup { slots: slots.to_vec(), length, tensors, inputs: self.input_axes() })
    }

    /// Puts a group back that was taken and not stepped.
    pub(crate) fn untake(&mut self, group: SlotGroup) {
        self.groups.push(group);
    }

    /// How long the slots are, to go back to with [`StateStore::restore`].
    pub(crate) fn lengths(&self, slots: impl Iterator<Item = SlotId>) -> Vec<(SlotId, Option<usize>)> {
        slots.map(|slot| (slot, self.length(slot))).collect()
    }

    /// Undoes steps: slots are as long as they were, those that were not there are forgotten. Steps only append, so
    /// that what the slots held is still there.
    pub(crate) fn restore(&mut self, before: &[(SlotId, Option<usize>)]) -> Result<(), SessionError> {
        for &(slot, length) in before {
            if let Some((group, _)) = self.find(slot) {
                self.groups[group].length = length.unwrap_or(0);
            }
        }
        for (slot, _) in before.iter().filter(|(_, length)| length.is_none()) {
            self.forget(*slot)?;
        }
        Ok(())
    }

    fn input_axes(&self) -> Vec<(Arc<str>, usize)> {
        self.specs.iter().map(|s| (s.input.clone(), s.axis)).collect()
    }

    /// New buffers that hold the rows of `slots`; slots that are not there are zero.
    fn copy_rows(&self, slots: &[SlotId]) -> Result<Vec<Stored>, SessionError> {
        let mut tensors = Vec::with_capacity(self.specs.len());
        for (pair, spec) in self.specs.iter().enumerate() {
            let shape = self.local_shape(spec, slots.len())?;
            if slots.iter().all(|&slot| self.find(slot).is_none()) {
                tensors.push(self.home.zeros(spec.ty.dtype, shape).map_err(refuse)?);
                continue;
            }
            let mut tensor = Tensor::zeros(spec.ty.dtype, shape).map_err(|e| refuse(e.to_string()))?;
            for (row, &slot) in slots.iter().enumerate() {
                let Some((group, from)) = self.find(slot) else { continue };
                let group = &self.groups[group];
                let source = group.tensors[pair].value().map_err(refuse)?;
                let filled = source.sliced(spec.axis, 0, group.length, 1).map_err(refuse)?;
                match spec.slot_axis {
                    Some(axis) => {
                        let one = filled.sliced(axis, from, 1, 1).map_err(refuse)?;
                        crate::cpu::write_row(&mut tensor, axis, row, &one).map_err(refuse)?;
                    }
                    None => crate::cpu::write_row(&mut tensor, spec.axis, 0, &filled).map_err(refuse)?,
                }
            }
            tensors.push(self.home.keep(tensor).map_err(refuse)?);
        }
        Ok(tensors)
    }

    /// Takes the present outputs of a step as the group's tensors. After a failed step the group keeps its old length,
    /// whose entries a step never changes.
    pub(crate) fn put_back(
        &mut self,
        mut group: SlotGroup,
        entry: &Entry,
        outputs: &mut [Held],
        succeeded: bool,
    ) -> Result<(), SessionError> {
        // An output that looks at a state would keep it from being taken.
        for (output, value) in entry.graph.outputs.iter().zip(outputs.iter_mut()) {
            if self.specs.iter().all(|s| s.output != output.name)
                && let Held::Here(own) = std::mem::replace(value, Held::InState { length: 0 })
            {
                *value = Held::Here(Value::new(own.into_tensor().map_err(refuse)?));
            }
        }
        let mut grown = group.length;
        let mut tensors = Vec::with_capacity(self.specs.len());
        for (spec, own) in self.specs.iter().zip(std::mem::take(&mut group.tensors)) {
            let at = entry.graph.outputs.iter().position(|o| o.name == spec.output);
            let held = at
                .and_then(|at| outputs.get_mut(at))
                .ok_or_else(|| refuse(format!("the step has no output `{}`", spec.output)))?;
            let held = std::mem::replace(held, Held::InState { length: 0 });
            let length = match &held {
                Held::Here(present) => present.shape().get(spec.axis).copied().unwrap_or(0),
                Held::InState { length } => *length,
            };
            if length > self.options.capacity {
                return Err(refuse(format!("state `{}` grew to {length} entries", spec.input)));
            }
            grown = length;
            tensors.push(match held {
                // What a failed step made may not be a continuation of the state.
                Held::Here(_) if !succeeded && matches!(own, Stored::Device(_)) => own,
                Held::Here(present) => {
                    let shape = self.local_shape(spec, group.slots.len())?;
                    self.home.keep(self.buffer(present, spec, shape)?).map_err(refuse)?
                }
                Held::InState { .. } => own,
            });
        }
        group.tensors = tensors;
        if succeeded {
            group.length = grown;
        }
        self.groups.push(group);
        Ok(())
    }

    /// The buffer behind a present value, or a new one that holds it.
    fn buffer(&self, present: Value, spec: &StateSpec, shape: Vec<usize>) -> Result<Tensor, SessionError> {
        let present = if present.is_prefix(spec.axis, self.options.capacity) {
            match present.into_unique() {
                Ok(tensor) if tensor.shape() == shape => return Ok(tensor),
                Ok(tensor) => Value::new(tensor),
                Err(shared) => shared,
            }
        } else {
            present
        };
        let mut tensor = Tensor::zeros(spec.ty.dtype, shape).map_err(|e| refuse(e.to_string()))?;
        crate::cpu::write_row(&mut tensor, spec.axis, 0, &present).map_err(refuse)?;
        Ok(tensor)
    }

    /// Whether a change can be made.
    pub(crate) fn check(&self, change: &Change) -> Result<(), SessionError> {
        let there = |slot: &SlotId| {
            self.length(*slot).ok_or_else(|| refuse(format!("slot {} holds nothing", slot.0)))
        };
        match change {
            Change::None => Ok(()),
            Change::Drop { slot } => there(slot).map(|_| ()),
            Change::Truncate { slot, length } => {
                let held = there(slot)?;
                if *length > held {
                    return Err(refuse(format!("slot {} holds {held} entries, not {length}", slot.0)));
                }
                Ok(())
            }
            Change::Fork { from, to } => {
                there(from)?;
                self.check_free(*to)
            }
            Change::Load { slot, length } => {
                if *length > self.options.capacity {
                    return Err(refuse(format!(
                        "{length} entries were saved, the capacity is {}\n  \
                         help: open the session with a larger capacity",
                        self.options.capacity
                    )));
                }
                self.check_free(*slot)
            }
        }
    }

    /// Refuses a slot that is in use, or one too many.
    fn check_free(&self, slot: SlotId) -> Result<(), SessionError> {
        if self.find(slot).is_some() {
            return Err(refuse(format!("slot {} is in use\n  help: drop it first", slot.0)));
        }
        if self.count() >= self.options.slots {
            return Err(refuse(format!(
                "all {} declared slots are in use\n  help: drop slots or declare more",
                self.options.slots
            )));
        }
        Ok(())
    }

    pub(crate) fn change(&mut self, change: &Change) -> Result<(), SessionError> {
        self.check(change)?;
        match *change {
            Change::None | Change::Load { .. } => Ok(()),
            Change::Drop { slot } => self.forget(slot),
            Change::Truncate { slot, length } => {
                let alone = self.alone(slot)?;
                self.groups[alone].length = length;
                Ok(())
            }
            Change::Fork { from, to } => {
                let tensors = self.copy_rows(&[from])?;
                let length = self.length(from).unwrap_or(0);
                self.groups.push(SlotGroup { slots: vec![to], length, tensors, inputs: self.input_axes() });
                Ok(())
            }
        }
    }

    /// The group that holds only `slot`.
    fn alone(&mut self, slot: SlotId) -> Result<usize, SessionError> {
        let (group, _) = self.find(slot).ok_or_else(|| refuse(format!("slot {} holds nothing", slot.0)))?;
        if self.groups[group].slots.len() == 1 {
            return Ok(group);
        }
        let length = self.groups[group].length;
        let tensors = self.copy_rows(&[slot])?;
        self.forget(slot)?;
        self.groups.push(SlotGroup { slots: vec![slot], length, tensors, inputs: self.input_axes() });
        Ok(self.groups.len() - 1)
    }

    /// Removes a slot; the others of its group stay together.
    fn forget(&mut self, slot: SlotId) -> Result<(), SessionError> {
        let Some((at, _)) = self.find(slot) else { return Ok(()) };
        let rest: Vec<SlotId> = self.groups[at].slots.iter().copied().filter(|s| *s != slot).collect();
        let tensors = if rest.is_empty() { Vec::new() } else { self.copy_rows(&rest)? };
        let group = self.groups.swap_remove(at);
        if !rest.is_empty() {
            self.groups.push(SlotGroup { slots: rest, length: group.length, tensors, inputs: group.inputs });
        }
        Ok(())
    }
}

/// True if a present of this type is the past with something appended, and not a state that begins.
pub fn grows(spec: &StateSpec, present: &Type) -> bool {
    let extent = |ty: &Type| ty.shape.get(spec.axis).map(Dim::symbols).unwrap_or_default();
    let present = extent(present);
    extent(&spec.ty).iter().all(|symbol| present.contains(symbol))
}

/// The type of a state with `entries` entries for `slots` slots.
fn typed(spec: &StateSpec, entries: usize, slots: usize) -> Type {
    let mut ty = spec.ty.clone();
    if let Some(dim) = ty.shape.get_mut(spec.axis) {
        *dim = Dim::from(entries);
    }
    if let Some(dim) = spec.slot_axis.and_then(|axis| ty.shape.get_mut(axis)) {
        *dim = Dim::from(slots);
    }
    ty
}

#[cfg(test)]
mod tests;
