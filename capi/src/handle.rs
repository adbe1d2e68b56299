//! An open session and everything that C may look at while it is.

use crate::fail::{Fail, Outcome};
use crate::open::{Others, ended};
use crate::slots::Slots;
use crate::tensors::{PortView, Results};
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};
use tpshard_ir::Tensor;
use tpshard_runtime::session::Session;
use tpshard_runtime::state::SlotId;

pub(crate) struct Handle {
    pub(crate) rank: usize,
    pub(crate) world_size: usize,
    pub(crate) inputs: Vec<PortView>,
    pub(crate) outputs: Vec<PortView>,
    open: Mutex<Open>,
}

/// What one call at a time may use.
pub(crate) struct Open {
    pub(crate) session: Session,
    pub(crate) slots: Slots,
    others: Others,
}

impl Handle {
    pub(crate) fn new(session: Session, others: Others, stateful: bool) -> Handle {
        let program = session.program();
        let states = &program.states;
        let entry = program.entries.first();
        let inputs = entry.map(|entry| {
            let view = |port| PortView::new(port, states.iter().any(|s| s.input == *PortView::name_of(port)));
            entry.inputs.iter().map(view).collect()
        });
        let outputs = entry.map(|entry| {
            let view =
                |port| PortView::new(port, states.iter().any(|s| s.output == *PortView::name_of(port)));
            entry.outputs.iter().map(view).collect()
        });
        Handle {
            rank: session.rank(),
            world_size: program.mesh.ranks(),
            inputs: inputs.unwrap_or_default(),
            outputs: outputs.unwrap_or_default(),
            open: Mutex::new(Open { session, slots: Slots::new(stateful), others }),
        }
    }

    fn lock(&self) -> Outcome<MutexGuard<'_, Open>> {
        self.open.lock().map_err(|_| Fail::panicked())
    }

    /// Rank 0's end of the session.
    pub(crate) fn lead(&self) -> Outcome<MutexGuard<'_, Open>> {
        if self.rank != 0 {
            return Err(Fail::usage(format!(
                "this is rank {}, which does what rank 0 asks\n  help: call tpshard_follow",
                self.rank
            )));
        }
        self.lock()
    }

    pub(crate) fn run(&self, inputs: &BTreeMap<String, Tensor>) -> Outcome<Results> {
        let results = self.lead()?.session.run(inputs)?;
        Ok(Results::new(results, &self.outputs))
    }

    pub(crate) fn step(&self, slots: &[u64], inputs: &BTreeMap<String, Tensor>) -> Outcome<Results> {
        let mut open = self.lead()?;
        let open = &mut *open;
        open.slots.check(&open.session, slots)?;
        let ids: Vec<SlotId> = slots.iter().copied().map(SlotId).collect();
        let results = open.session.run_step(&ids, inputs)?;
        open.slots.stepped(slots);
        Ok(Results::new(results, &self.outputs))
    }

    pub(crate) fn follow(&self) -> Outcome<()> {
        if self.rank == 0 {
            return Err(Fail::usage(
                "this is rank 0, which the others follow\n  help: call tpshard_run or tpshard_step",
            ));
        }
        Ok(self.lock()?.session.follow()?)
    }

    /// Ends the session; the other ranks in this process have ended when it returns.
    pub(crate) fn close(self) -> Outcome<()> {
        let (open, panicked) = match self.open.into_inner() {
            Ok(open) => (open, false),
            Err(poisoned) => (poisoned.into_inner(), true),
        };
        let Open { mut session, others, .. } = open;
        let closed = if panicked { Err(Fail::panicked()) } else { session.close().map_err(Fail::from) };
        // Whoever still waits for this rank sees that it is gone.
        drop(session);
        let failures = ended(others);
        closed.and(failures.into_iter().next().map_or(Ok(()), Err))
    }
}
