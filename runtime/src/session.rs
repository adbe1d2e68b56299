//! Sessions: a rank's program, opened with its weights and its end of the communication, run as often as wanted.
//!
//! Rank 0 is given the inputs and returns the outputs; the other ranks follow what it asks for. Every request starts
//! with a broadcast of what is to be done, checked on rank 0 first; then all ranks agree that they can do it before any
//! of them enters a collective of the program, and agree at the end that they did. So an error on one rank is an error
//! value on all of them. Only a failed collective ends a session: it is *poisoned*, every later call says so.
//!
//! Nothing here exits the process, writes to standard output, or keeps global state.

mod agree;
mod bind;
mod error;
mod timeline;
mod worker;

pub use error::SessionError;
pub use timeline::{StepTime, now};

use crate::comm::Communicator;
use crate::cpu::WeightSource;
use crate::state::{SlotId, StateOptions};
use bind::Signature;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use tpshard_ir::deferred::SharedEvaluator;
use tpshard_ir::program::RankProgram;
use tpshard_ir::{Layout, StepId, Tensor, Type};
use worker::Worker;

/// Settings of a session.
#[derive(Clone, Debug, Default)]
pub struct SessionOptions {
    /// Threads that compute; default: the cores, shared between the ranks on this machine.
    pub threads: Option<usize>,
    /// Ranks on this machine; default: all.
    pub local_ranks: Option<usize>,
    /// Most bytes that one run may take besides the weights; default: this rank's share of the available memory.
    pub memory_limit: Option<u64>,
    /// Room for state that stays with the ranks between steps; default: none.
    pub state: Option<StateOptions>,
    /// Remember when the steps of runs start and end, for [`Session::take_timeline`].
    pub timeline: bool,
    /// What gives operations their meaning whose shape depends on data; default: programs with such are refused.
    pub evaluator: SharedEvaluator,
}

/// A result.
#[derive(Clone, Debug, PartialEq)]
pub struct Output {
    pub tensor: Tensor,
    /// The layout, if the tensor is only what this rank holds.
    pub sharded: Option<Layout>,
}

/// What this rank holds of a step's value.
#[derive(Clone, Debug, PartialEq)]
pub struct Tap {
    pub step: StepId,
    /// The logical type.
    pub ty: Type,
    pub layout: Layout,
    pub tensor: Tensor,
}

/// What a request gives back: outputs by name (on rank 0 all of them, elsewhere those that stay sharded) and taps.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Results {
    pub outputs: BTreeMap<String, Output>,
    pub taps: Vec<Tap>,
    /// What the collectives of the program carried on this rank, leaving out what sessions tell each other, inputs and
    /// outputs.
    pub traffic: crate::comm::CommStats,
}

/// What rank 0 asks all ranks to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
enum Request {
    /// Rank 0 found an error before anything was done.
    Refuse(String),
    Run {
        entry: usize,
        bindings: BTreeMap<String, i64>,
        inputs: Vec<InputHeader>,
        taps: Vec<u32>,
        /// The slots of a step with state.
        slots: Option<Vec<u64>>,
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
    Close,
}

/// An input that will be broadcast.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct InputHeader {
    name: String,
    dtype: String,
    shape: Vec<usize>,
}

/// The index of the entry of `program` that takes these inputs; state enters as plain tensors.
///
/// # Errors
/// No entry takes them.
pub fn entry_for(program: &RankProgram, inputs: &BTreeMap<String, Tensor>) -> Result<usize, SessionError> {
    let signatures: Vec<Signature> = program.entries.iter().map(Signature::new).collect();
    Ok(bind::choose(&signatures, inputs, None)?.0)
}

/// One rank's end of a running program.
pub struct Session {
    worker: Worker,
    pool: rayon::ThreadPool,
    signatures: Vec<Signature>,
    poisoned: Option<String>,
    closed: bool,
}

impl Session {
    /// Loads and packs the weights, and agrees with all ranks that they run the same program.
    ///
    /// # Errors
    /// A program that does not hold together, weights that are missing or of another program, ranks that disagree.
    pub fn open(
        program: RankProgram,
        weights: &mut (dyn WeightSource + Send),
        communicator: Box<dyn Communicator>,
        options: &SessionOptions,
    ) -> Result<Session, SessionError> {
        let world = communicator.world_size();
        let local = options.local_ranks.unwrap_or(world).max(1);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = options.threads.unwrap_or(cores / local).max(1);
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .map_err(|e| SessionError::Resources { what: format!("cannot start {threads} threads: {e}") })?;
        let signatures: Vec<Signature> = program.entries.iter().map(Signature::new).collect();
        let worker = pool.install(|| Worker::open(program, weights, communicator, options, local))?;
        Ok(Session { worker, pool, signatures, poisoned: None, closed: false })
    }

    pub fn rank(&self) -> usize {
        self.worker.rank()
    }

    pub fn program(&self) -> &RankProgram {
        self.worker.program()
    }

    /// What was communicated so far.
    pub fn stats(&self) -> crate::comm::CommStats {
        self.worker.stats()
    }

    /// When the last steps ran on this rank, oldest first, if the session was opened to remember; they are forgotten.
    pub fn take_timeline(&mut self) -> Vec<StepTime> {
        self.worker.take_timeline()
    }

    /// Runs the entry that fits the inputs. State, if the model has any, enters and leaves as plain tensors. Ranks
    /// other than 0 pass no inputs and do what rank 0 asks, whatever that is.
    ///
    /// # Errors
    /// Inputs that do not fit (on all ranks), too little memory, a step that failed on some rank, a failed collective.
    pub fn run(&mut self, inputs: &BTreeMap<String, Tensor>) -> Result<Results, SessionError> {
        self.run_tapped(inputs, &[])
    }

    /// As [`Session::run`], and hands back what this rank holds of the values of `taps`.
    ///
    /// # Errors
    /// As [`Session::run`], and steps that do not exist.
    pub fn run_tapped(
        &mut self,
        inputs: &BTreeMap<String, Tensor>,
        taps: &[StepId],
    ) -> Result<Results, SessionError> {
        if self.rank() != 0 {
            return self.follow_one();
        }
        let request = self.prepare(inputs, taps, None);
        self.lead(request, inputs)
    }

    /// Runs one step for `slots`, whose state stays with the ranks: state inputs are not given, state outputs not
    /// returned. A slot that was never stepped starts empty. All slots of a step must have the same length; steps of
    /// the same slots in the same order copy no state.
    ///
    /// # Errors
    /// As [`Session::run`], and a full or ragged state, which is refused before the step.
    pub fn run_step(
        &mut self,
        slots: &[SlotId],
        inputs: &BTreeMap<String, Tensor>,
    ) -> Result<Results, SessionError> {
        if self.rank() != 0 {
            return self.follow_one();
        }
        let request = self.prepare(inputs, &[], Some(slots));
        self.lead(request, inputs)
    }

    /// Forgets all but the first `length` entries of a slot.
    ///
    /// # Errors
    /// The slot is not there or shorter, or the session is poisoned.
    pub fn truncate(&mut self, slot: SlotId, length: usize) -> Result<(), SessionError> {
        self.change_state(Request::Truncate { slot: slot.0, length })
    }

    /// Makes `to` a copy of `from`.
    ///
    /// # Errors
    /// `from` is not there, `to` is, or no slot is free.
    pub fn fork(&mut self, from: SlotId, to: SlotId) -> Result<(), SessionError> {
        self.change_state(Request::Fork { from: from.0, to: to.0 })
    }

    /// Forgets a slot.
    ///
    /// # Errors
    /// The slot is not there, or the session is poisoned.
    pub fn drop_slot(&mut self, slot: SlotId) -> Result<(), SessionError> {
        self.change_state(Request::Drop { slot: slot.0 })
    }

    /// Entries held by a slot.
    pub fn slot_length(&self, slot: SlotId) -> Option<usize> {
        self.worker.state().and_then(|s| s.length(slot))
    }

    /// On ranks other than 0: does what rank 0 asks until it closes the session. Requests that fail on all ranks are
    /// reported by rank 0 and do not end this.
    ///
    /// # Errors
    /// A failed collective.
    pub fn follow(&mut self) -> Result<(), SessionError> {
        while !self.closed {
            match self.follow_one() {
                Err(error) if error.is_fatal() => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Ends the session on all ranks; rank 0 calls this.
    ///
    /// # Errors
    /// A failed collective.
    pub fn close(&mut self) -> Result<(), SessionError> {
        if self.closed {
            return Ok(());
        }
        if self.rank() != 0 {
            return self.follow();
        }
        self.lead(Ok(Request::Close), &BTreeMap::new()).map(|_| ())
    }

    #[cfg(test)]
    pub(crate) fn state(&self) -> Option<&crate::state::StateStore> {
        self.worker.state()
    }

    fn change_state(&mut self, request: Request) -> Result<(), SessionError> {
        if self.rank() != 0 {
            return self.follow_one().map(|_| ());
        }
        let checked = match self.worker.state() {
            Some(state) => state.check(&request_of(&request)).map(|()| request),
            None => Err(no_state()),
        };
        self.lead(checked, &BTreeMap::new()).map(|_| ())
    }

    /// Checks a run on rank 0.
    fn prepare(
        &self,
        inputs: &BTreeMap<String, Tensor>,
        taps: &[StepId],
        slots: Option<&[SlotId]>,
    ) -> Result<Request, SessionError> {
        let state = match slots {
            Some(slots) => Some(self.worker.state().ok_or_else(no_state)?.inputs(slots)?),
            None => None,
        };
        let (entry, bindings) = bind::choose(&self.signatures, inputs, state.as_ref())?;
        let steps = self.program().entries.get(entry).map_or(0, |e| e.graph.len());
        if let Some(tap) = taps.iter().find(|t| t.index() >= steps) {
            return Err(SessionError::Usage {
                what: format!("there is no step {tap}, the entry has {steps}"),
            });
        }
        if let Some(slots) = slots {
            self.worker.check_capacity(entry, &bindings, slots)?;
        }
        let header = |(name, tensor): (&String, &Tensor)| InputHeader {
            name: name.clone(),
            dtype: tensor.dtype().name().into(),
            shape: tensor.shape().to_vec(),
        };
        Ok(Request::Run {
            entry,
            bindings: bindings.iter().map(|(name, value)| (name.to_string(), *value)).collect(),
            inputs: inputs.iter().map(header).collect(),
            taps: taps.iter().map(|t| t.0).collect(),
            slots: slots.map(|s| s.iter().map(|s| s.0).collect()),
        })
    }

    /// Rank 0: tells all ranks, then does it.
    fn lead(
        &mut self,
        request: Result<Request, SessionError>,
        inputs: &BTreeMap<String, Tensor>,
    ) -> Result<Results, SessionError> {
        self.usable()?;
        let told = match &request {
            Ok(request) => request.clone(),
            Err(error) => Request::Refuse(error.to_string()),
        };
        let sent = self.worker.announce(Some(&told)).map(|_| ());
        self.settle(sent)?;
        let request = request?;
        self.execute(&request, inputs)
    }

    /// Other ranks: does what rank 0 asks next.
    fn follow_one(&mut self) -> Result<Results, SessionError> {
        self.usable()?;
        let heard = self.worker.announce(None);
        let request = self.settle(heard)?;
        self.execute(&request, &BTreeMap::new())
    }

    fn execute(
        &mut self,
        request: &Request,
        inputs: &BTreeMap<String, Tensor>,
    ) -> Result<Results, SessionError> {
        let worker = &mut self.worker;
        let done = match request {
            Request::Refuse(message) => Err(SessionError::Refused { rank: 0, message: message.clone() }),
            Request::Run { entry, bindings, inputs: headers, taps, slots } => {
                let bindings =
                    bindings.iter().map(|(name, value)| (Arc::from(name.as_str()), *value)).collect();
                let slots: Option<Vec<SlotId>> =
                    slots.as_ref().map(|s| s.iter().copied().map(SlotId).collect());
                self.pool.install(|| worker.run(*entry, bindings, headers, inputs, taps, slots.as_deref()))
            }
            Request::Truncate { .. } | Request::Fork { .. } | Request::Drop { .. } => {
                worker.change_state(&request_of(request)).map(|()| Results::default())
            }
            Request::Close => {
                self.closed = true;
                Ok(Results::default())
            }
        };
        self.settle(done)
    }

    fn usable(&self) -> Result<(), SessionError> {
        match &self.poisoned {
            Some(reason) => Err(SessionError::Poisoned { reason: reason.clone() }),
            None if self.closed => Err(SessionError::Closed),
            None => Ok(()),
        }
    }

    fn settle<T>(&mut self, result: Result<T, SessionError>) -> Result<T, SessionError> {
        if let Err(SessionError::Collective(error)) = &result {
            self.poisoned = Some(error.to_string());
        }
        result
    }
}

fn no_state() -> SessionError {
    SessionError::Usage {
        what: "the session keeps no state\n  help: open it with a state capacity, or pass the past tensors to `run`".into(),
    }
}

/// The part of a request that concerns state only.
fn request_of(request: &Request) -> crate::state::Change {
    use crate::state::Change;
    match request {
        Request::Truncate { slot, length } => Change::Truncate { slot: SlotId(*slot), length: *length },
        Request::Fork { from, to } => Change::Fork { from: SlotId(*from), to: SlotId(*to) },
        Request::Drop { slot } => Change::Drop { slot: SlotId(*slot) },
        Request::Refuse(_) | Request::Run { .. } | Request::Close => Change::None,
    }
}
