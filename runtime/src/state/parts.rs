//! Which slots of a step run together: a program takes slots of one length, and some programs always take so many.

use super::{SlotId, StateInputs, StateStore, refuse, typed};
use crate::session::SessionError;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tpshard_ir::dim::Dim;
use tpshard_ir::program::StateSpec;

/// How a model has room for several slots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Batch {
    /// As many as wanted: the extent that is called so.
    Symbol(Arc<str>),
    /// Always so many at once.
    Fixed(usize),
}

/// The slots of a step that run together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StepPart {
    pub(crate) length: usize,
    /// Where they stand among the slots of the step.
    pub(crate) rows: Vec<usize>,
}

impl StateStore {
    /// How the model has room for several slots; none if it has not.
    pub(crate) fn batch(&self) -> Option<Batch> {
        let of_spec = |spec: &StateSpec| {
            let dim = spec.ty.shape.get(spec.slot_axis?)?;
            dim.as_symbol().cloned().map(Batch::Symbol).or_else(|| dim.as_size().map(Batch::Fixed))
        };
        let first = self.specs.first().and_then(of_spec)?;
        self.specs.iter().all(|spec| of_spec(spec).as_ref() == Some(&first)).then_some(first)
    }

    /// The parts of a step of `slots`, shortest first. Slots that are not there yet are empty.
    pub(crate) fn parts(&self, slots: &[SlotId]) -> Result<Vec<StepPart>, SessionError> {
        self.check_slots(slots)?;
        let mut of_length: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (row, &slot) in slots.iter().enumerate() {
            of_length.entry(self.length(slot).unwrap_or(0)).or_default().push(row);
        }
        let most = match self.batch() {
            Some(Batch::Fixed(most)) => most.max(1),
            Some(Batch::Symbol(_)) | None => usize::MAX,
        };
        let mut parts = Vec::new();
        for (length, rows) in of_length {
            if most != usize::MAX && rows.len() % most != 0 {
                return Err(refuse(format!(
                    "the model always steps {most} slots at once, and {} of the step's hold {length} entries\n  \
                     help: name a multiple of {most} slots of each length",
                    rows.len()
                )));
            }
            parts.extend(rows.chunks(most).map(|rows| StepPart { length, rows: rows.to_vec() }));
        }
        Ok(parts)
    }

    /// Refuses slots that cannot step together, whatever their lengths.
    pub(super) fn check_slots(&self, slots: &[SlotId]) -> Result<(), SessionError> {
        if slots.is_empty() {
            return Err(refuse(
                "a step without slots\n  help: name the slots that the rows of the inputs are for",
            ));
        }
        let mut seen = BTreeSet::new();
        if let Some(slot) = slots.iter().find(|slot| !seen.insert(**slot)) {
            return Err(refuse(format!("slot {} is named twice\n  help: name every slot once", slot.0)));
        }
        if slots.len() > 1 && self.batch().is_none() {
            return Err(refuse(
                "the model's state has no dim for several slots\n  help: step them one after another",
            ));
        }
        let new = slots.iter().filter(|&&s| self.find(s).is_none()).count();
        if self.count() + new > self.options.slots {
            return Err(refuse(format!(
                "{} slots are in use, {new} more exceed the {} declared\n  help: drop slots or declare more",
                self.count(),
                self.options.slots
            )));
        }
        Ok(())
    }

    /// The types the state inputs have where `slots` slots of this length step.
    pub(crate) fn inputs(&self, length: usize, slots: usize) -> StateInputs {
        StateInputs { types: self.specs.iter().map(|s| (s.input.clone(), typed(s, length, slots))).collect() }
    }

    /// The symbols that stand for the length of the slots in the types of the state.
    pub(crate) fn length_symbols(&self) -> Result<BTreeSet<Arc<str>>, SessionError> {
        let symbol = |spec: &StateSpec| {
            let dim = spec.ty.shape.get(spec.axis);
            dim.and_then(Dim::as_symbol).cloned().ok_or_else(|| {
                refuse(format!(
                    "state `{}` of type {} does not name its length, so that slots of different lengths cannot step \
                     together\n  help: step them one after another",
                    spec.input, spec.ty
                ))
            })
        };
        self.specs.iter().map(symbol).collect()
    }
}
