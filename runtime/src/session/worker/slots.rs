//! What a rank does with the slots of its state besides stepping them, and how parts of a step become one.

use super::{Worker, agree, gather};
use crate::comm::Group;
use crate::cpu::convert::{Place, StepError};
use crate::session::parts::join_rows;
use crate::session::{Output, Results, RunPart, SessionError, no_state};
use crate::state::{Change, SlotGroup, SlotId, StateStore};
use std::collections::BTreeMap;
use tpshard_ir::Tensor;
use tpshard_ir::dim::Bindings;

impl Worker {
    pub(in crate::session) fn change_state(&mut self, change: &Change) -> Result<(), SessionError> {
        let own = match &mut self.state {
            Some(state) => state.change(change),
            None => Err(no_state()),
        };
        agree(&*self.communicator, &mut self.sequence, own)
    }

    /// The state of the slots of a part, on all ranks or on none.
    pub(super) fn take(&mut self, slots: Option<&[SlotId]>) -> Result<Option<SlotGroup>, SessionError> {
        let (Some(slots), Some(state)) = (slots, &mut self.state) else { return Ok(None) };
        let (group, verdict) = match state.take(slots) {
            Ok(group) => (Some(group), Ok(())),
            Err(error) => (None, Err(error)),
        };
        let verdict = agree(&*self.communicator, &mut self.sequence, verdict);
        match (verdict, group) {
            (Ok(()), group) => Ok(group),
            (Err(error), Some(group)) => {
                state.untake(group);
                Err(error)
            }
            (Err(error), None) => Err(error),
        }
    }

    /// The results of a step from those of its parts.
    pub(super) fn join(&self, parts: &[RunPart], results: Vec<Results>) -> Result<Results, SessionError> {
        let program = |what: &str| SessionError::Program { what: what.into() };
        let batch =
            self.state.as_ref().and_then(StateStore::batch).ok_or_else(|| program("it has no slot dim"))?;
        let mut joined = Results::default();
        let mut of_name: BTreeMap<String, Vec<(Output, &[usize])>> = BTreeMap::new();
        for (part, results) in parts.iter().zip(results) {
            joined.traffic.add(&results.traffic);
            for (name, output) in results.outputs {
                of_name.entry(name).or_default().push((output, &part.rows));
            }
        }
        let entry = parts.first().and_then(|part| self.program.entries.get(part.entry));
        for (name, outputs) in of_name {
            let port = entry.and_then(|entry| entry.outputs.iter().find(|port| *port.name == *name));
            let port = port.ok_or_else(|| program("its entries have different outputs"))?;
            let tensor = join_rows(port, &batch, &outputs)?;
            let sharded = outputs.into_iter().find_map(|(output, _)| output.sharded);
            joined.outputs.insert(name, Output { tensor, sharded });
        }
        Ok(joined)
    }

    /// The logical tensors of a slot, on rank 0.
    pub(in crate::session) fn save_slot(&mut self, slot: SlotId) -> Result<Results, SessionError> {
        let shares = self.state.as_ref().ok_or_else(no_state).and_then(|state| state.shares(slot));
        let shares = agree(&*self.communicator, &mut self.sequence, shares)?;
        let bindings = Bindings::new();
        let place = Place { mesh: &self.program.mesh, rank: self.program.rank, bindings: &bindings };
        let mut results = Results::default();
        let mut failure = Ok(());
        for (name, share, family) in shares {
            let whole = match gather(share, &family, &place, &*self.communicator, &mut self.sequence) {
                Err(StepError::Collective(error)) => return Err(error.into()),
                Err(StepError::Local(what)) => Err(what),
                Err(StepError::Index { index, extent }) => Err(format!("index {index} of {extent}")),
                Ok(_) if self.program.rank != 0 => continue,
                Ok(whole) => whole.into_tensor(),
            };
            match whole {
                Ok(tensor) => _ = results.outputs.insert(name, Output { tensor, sharded: None }),
                Err(what) => failure = Err(SessionError::State { what: format!("state `{name}`: {what}") }),
            }
        }
        agree(&*self.communicator, &mut self.sequence, failure.map(|()| results))
    }

    /// Makes a slot from its logical tensors, which rank 0 has.
    pub(in crate::session) fn load_slot(
        &mut self,
        slot: SlotId,
        length: usize,
        given: Option<BTreeMap<String, Tensor>>,
    ) -> Result<(), SessionError> {
        let found = self.state.as_ref().ok_or_else(no_state).and_then(|state| state.logical_tensors(length));
        let found = agree(&*self.communicator, &mut self.sequence, found)?;
        let group = Group::world(self.communicator.world_size());
        let mut given = given.unwrap_or_default();
        let mut whole = Vec::with_capacity(found.len());
        for (name, empty) in found {
            let mut tensor = given.remove(&name).unwrap_or(empty);
            if group.len() > 1 {
                let tag = self.tag();
                self.communicator.broadcast(&group, tag, 0, &mut tensor)?;
            }
            whole.push(tensor);
        }
        let loaded =
            self.state.as_mut().ok_or_else(no_state).and_then(|state| state.load(slot, length, whole));
        agree(&*self.communicator, &mut self.sequence, loaded)
    }
}
