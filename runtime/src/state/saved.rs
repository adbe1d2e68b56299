//! Saved slots: whole logical tensors in the safetensors format, one per state pair under the name of its input, so
//! that what was saved on some number of ranks loads on any other.

use super::{Change, SlotGroup, SlotId, StateStore, Stored, refuse, typed};
use crate::cpu::convert::{Place, held};
use crate::cpu::value::Value;
use crate::io::{read_safetensors, write_safetensors};
use crate::session::SessionError;
use std::collections::BTreeMap;
use tpshard_ir::Tensor;
use tpshard_ir::dim::Bindings;
use tpshard_ir::program::Family;

/// The metadata key of the number of entries; its presence says what the file is.
const LENGTH: &str = "tpshard_state_length";

impl StateStore {
    /// This rank's share of a slot, pair by pair, with the family that the ranks' shares make.
    pub(crate) fn shares(&self, slot: SlotId) -> Result<Vec<(String, Value, Family)>, SessionError> {
        let (group, row) =
            self.find(slot).ok_or_else(|| refuse(format!("slot {} holds nothing to save", slot.0)))?;
        let group = &self.groups[group];
        let share = |(spec, tensor): (&tpshard_ir::program::StateSpec, &Stored)| {
            let filled = tensor.value()?.sliced(spec.axis, 0, group.length, 1)?;
            let own = match spec.slot_axis {
                Some(axis) => filled.sliced(axis, row, 1, 1)?,
                None => filled,
            };
            let family = Family { ty: typed(spec, group.length, 1), layout: spec.layout.clone() };
            Ok((spec.input.to_string(), own, family))
        };
        let all: Result<_, String> = self.specs.iter().zip(&group.tensors).map(share).collect();
        all.map_err(refuse)
    }

    /// The bytes of a file that holds the logical tensors of a slot.
    pub(crate) fn encode(tensors: &BTreeMap<String, Tensor>, length: usize) -> Result<Vec<u8>, SessionError> {
        let metadata = (LENGTH.to_owned(), length.to_string());
        write_safetensors(tensors, metadata)
            .map_err(|error| refuse(format!("the slot cannot be saved: {error}")))
    }

    /// What such a file holds, if it is of this model and has room here.
    pub(crate) fn decode(
        &self,
        slot: SlotId,
        bytes: &[u8],
    ) -> Result<(usize, BTreeMap<String, Tensor>), SessionError> {
        let wrong = |what: String| {
            refuse(format!(
                "the saved state cannot be loaded: {what}\n  help: give what a session of the same model has saved"
            ))
        };
        let (mut tensors, metadata) = read_safetensors(bytes).map_err(|error| wrong(error.to_string()))?;
        let length = metadata.get(LENGTH).ok_or_else(|| wrong("it is no saved slot".into()))?;
        let length: usize =
            length.parse().map_err(|_| wrong(format!("`{length}` is not a number of entries")))?;
        self.check(&Change::Load { slot, length })?;
        let mut found = BTreeMap::new();
        for spec in &self.specs {
            let tensor = tensors.remove(&*spec.input);
            let tensor = tensor.ok_or_else(|| wrong(format!("it lacks `{}`", spec.input)))?;
            let ty = typed(spec, length, 1);
            let shape: Option<Vec<usize>> = ty.shape.iter().map(tpshard_ir::Dim::as_size).collect();
            if tensor.dtype() != ty.dtype || shape.as_deref() != Some(tensor.shape()) {
                return Err(wrong(format!(
                    "`{}` is {}{:?}, the model's is {ty}",
                    spec.input,
                    tensor.dtype(),
                    tensor.shape()
                )));
            }
            found.insert(spec.input.to_string(), tensor);
        }
        match tensors.keys().next() {
            Some(other) => Err(wrong(format!("the model has no state `{other}`"))),
            None => Ok((length, found)),
        }
    }

    /// The shape of each logical tensor of a slot of this length, empty where it has none.
    pub(crate) fn logical_tensors(&self, length: usize) -> Result<Vec<(String, Tensor)>, SessionError> {
        let empty = |spec: &tpshard_ir::program::StateSpec| {
            let ty = typed(spec, length, 1);
            let shape: Option<Vec<usize>> = ty.shape.iter().map(tpshard_ir::Dim::as_size).collect();
            let shape =
                shape.ok_or_else(|| refuse(format!("state `{}` of type {ty} is open", spec.input)))?;
            let tensor = Tensor::zeros(ty.dtype, shape).map_err(|e| refuse(e.to_string()))?;
            Ok((spec.input.to_string(), tensor))
        };
        self.specs.iter().map(empty).collect()
    }

    /// Makes `slot` from its logical tensors, in the order of the pairs.
    pub(crate) fn load(
        &mut self,
        slot: SlotId,
        length: usize,
        whole: Vec<Tensor>,
    ) -> Result<(), SessionError> {
        self.check(&Change::Load { slot, length })?;
        let bindings = Bindings::new();
        let place = Place { mesh: &self.mesh, rank: self.rank, bindings: &bindings };
        let mut tensors = Vec::with_capacity(self.specs.len());
        for (spec, whole) in self.specs.iter().zip(whole) {
            let family = Family { ty: typed(spec, length, 1), layout: spec.layout.clone() };
            let mut own = Value::new(whole);
            for (axis, (start, extent)) in
                held(&family, &place, self.rank).map_err(refuse)?.into_iter().enumerate()
            {
                own = own.sliced(axis, start, extent, 1).map_err(refuse)?;
            }
            let shape = self.local_shape(spec, 1)?;
            let mut tensor = Tensor::zeros(spec.ty.dtype, shape).map_err(|e| refuse(e.to_string()))?;
            crate::cpu::write_row(&mut tensor, spec.axis, 0, &own).map_err(refuse)?;
            tensors.push(self.home.keep(tensor).map_err(refuse)?);
        }
        let inputs = self.input_axes();
        self.groups.push(SlotGroup { slots: vec![slot], length, tensors, inputs });
        Ok(())
    }
}
