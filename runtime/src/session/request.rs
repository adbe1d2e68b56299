//! What rank 0 tells the other ranks to do.

use crate::state::{Change, SlotId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use tpshard_ir::Tensor;
use tpshard_ir::dim::Bindings;

/// What rank 0 asks all ranks to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Request {
    /// Rank 0 found an error before anything was done.
    Refuse(String),
    Run {
        /// One, unless slots of different lengths step together.
        parts: Vec<RunPart>,
        taps: Vec<u32>,
    },
    Truncate {
        slot: u64,
        length: usize,
    },
    Fork {
        from: u64,
        to: u64,
    },
    Drop {
        slot: u64,
    },
    Save {
        slot: u64,
    },
    Load {
        slot: u64,
        length: usize,
    },
    Close,
}

/// One run of an entry.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct RunPart {
    pub(super) entry: usize,
    pub(super) bindings: BTreeMap<String, i64>,
    pub(super) inputs: Vec<InputHeader>,
    /// The slots of a step with state, and where they stand among all slots of the step.
    pub(super) slots: Option<Vec<u64>>,
    pub(super) rows: Vec<usize>,
}

/// An input that will be broadcast.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct InputHeader {
    pub(super) name: String,
    pub(super) dtype: String,
    pub(super) shape: Vec<usize>,
}

/// The part of a request that concerns state only.
pub(super) fn request_of(request: &Request) -> Change {
    match request {
        Request::Truncate { slot, length } => Change::Truncate { slot: SlotId(*slot), length: *length },
        Request::Fork { from, to } => Change::Fork { from: SlotId(*from), to: SlotId(*to) },
        Request::Drop { slot } => Change::Drop { slot: SlotId(*slot) },
        Request::Load { slot, length } => Change::Load { slot: SlotId(*slot), length: *length },
        Request::Refuse(_) | Request::Run { .. } | Request::Save { .. } | Request::Close => Change::None,
    }
}

pub(super) fn run_part(
    entry: usize,
    bindings: &Bindings,
    inputs: &BTreeMap<String, Tensor>,
    takes: &dyn Fn(&str) -> bool,
    slots: Option<(Vec<u64>, Vec<usize>)>,
) -> RunPart {
    let header = |(name, tensor): (&String, &Tensor)| InputHeader {
        name: name.clone(),
        dtype: tensor.dtype().name().into(),
        shape: tensor.shape().to_vec(),
    };
    let (slots, rows) = slots.map_or((None, Vec::new()), |(slots, rows)| (Some(slots), rows));
    RunPart {
        entry,
        bindings: bindings.iter().map(|(name, value)| (name.to_string(), *value)).collect(),
        inputs: inputs.iter().filter(|(name, _)| takes(name)).map(header).collect(),
        slots,
        rows,
    }
}
