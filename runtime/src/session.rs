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
mod engine;
mod error;
mod parts;
mod request;
mod timeline;
mod worker;

pub use error::SessionError;
pub use timeline::{StepTime, now};

use crate::comm::{Communicator, History};
use crate::cpu::WeightSource;
use crate::placement;
use crate::state::{SlotId, StateOptions, StateStore, StepPart};
use crate::team::Team;
use bind::Signature;
use request::{InputHeader, Request, RunPart, request_of, run_part};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;
use tpshard_ir::border::{Present, handed_out};
use tpshard_ir::deferred::SharedEvaluator;
use tpshard_ir::program::RankProgram;
use tpshard_ir::{Layout, StepId, Tensor, Type};
use worker::Worker;

/// What executes a program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// What the program is for: a GPU if it has kernels for one, which then has to be there.
    #[default]
    Program,
    Cpu,
    /// A GPU, also where the program has no kernels, which is an error.
    Cuda,
}

impl DeviceChoice {
    /// What executes `program`, as ranks tell each other.
    pub fn name(self, program: &RankProgram) -> &'static str {
        match self {
            DeviceChoice::Cuda => "cuda",
            DeviceChoice::Program if program.device.is_some() => "cuda",
            DeviceChoice::Program | DeviceChoice::Cpu => "cpu",
        }
    }
}

/// What carries collectives between the GPUs of ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CommChoice {
    /// NCCL where every rank finds it and has a GPU of its own, else host memory.
    #[default]
    Auto,
    /// NCCL, also where ranks share a GPU; an error where it cannot be used.
    Nccl,
    /// Host memory, by the communicator of the session.
    Shm,
}

impl CommChoice {
    pub fn name(self) -> &'static str {
        match self {
            CommChoice::Auto => "auto",
            CommChoice::Nccl => "nccl",
            CommChoice::Shm => "shm",
        }
    }
}

/// Settings of a session.
#[derive(Clone, Debug, Default)]
pub struct SessionOptions {
    /// Threads that compute; default: the cores, shared between the ranks on this machine.
    pub threads: Option<usize>,
    /// Give every thread a processor of its own, which no other rank of this machine uses.
    pub own_processors: bool,
    /// Ranks on this machine; default: all.
    pub local_ranks: Option<usize>,
    pub device: DeviceChoice,
    /// What carries collectives between GPUs; ranks on processors have only host memory.
    pub comm: CommChoice,
    /// Make every call of a kernel on a GPU by itself, without CUDA graphs.
    pub no_graphs: bool,
    /// Let no collective between GPUs travel while they compute.
    pub no_overlap: bool,
    /// Folders that NVIDIA's libraries are looked for in before all others.
    pub libraries: Vec<PathBuf>,
    /// The number of this rank among those of this machine, which chooses its GPU; default: the rank.
    pub local_rank: Option<usize>,
    /// Most bytes that one run may take besides the weights; default: this rank's share of the available memory.
    pub memory_limit: Option<u64>,
    /// Room for state that stays with the ranks between steps; default: none.
    pub state: Option<StateOptions>,
    /// Remember when the steps of runs start and end, for [`Session::take_timeline`].
    pub timeline: bool,
    /// What gives operations their meaning whose shape depends on data; default: programs with such are refused.
    pub evaluator: SharedEvaluator,
}

/// What a rank asked its GPU to do since the session opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Submissions {
    /// Calls of kernels, one by one.
    pub launches: u64,
    /// Launches of CUDA graphs, each of many calls.
    pub graphs: u64,
    /// Calls in graphs that were given other arguments.
    pub updates: u64,
    /// Graphs that were made.
    pub captures: u64,
    /// Why graphs are not used any more, if something went wrong with them.
    pub trouble: Option<String>,
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

/// Threads of a rank look out for work so long before they sleep: longer than there is none within a step.
const LOOKOUT: Duration = Duration::from_micros(500);

/// What rank 0 asks for, with the tensors that go with it: one set for each part of a run.
type Asked = (Request, Vec<BTreeMap<String, Tensor>>);

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
    team: Team,
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
        let processors = if options.own_processors {
            let local_rank = options.local_rank.unwrap_or(communicator.rank());
            let refuse = |what| SessionError::Resources { what };
            placement::processors(local_rank, local, threads).map_err(refuse)?
        } else {
            Vec::new()
        };
        let own = move |thread: usize| {
            processors.get(thread).copied().into_iter().for_each(placement::stay_on);
        };
        own(0);
        // Where threads take turns on cores, one that looks out keeps another from working.
        let lookout = if threads.saturating_mul(local) <= cores { LOOKOUT } else { Duration::ZERO };
        let team = Team::new(threads, lookout, own)
            .map_err(|e| SessionError::Resources { what: format!("cannot start {threads} threads: {e}") })?;
        let signatures: Vec<Signature> = program.entries.iter().map(Signature::new).collect();
        let worker = team.install(|| Worker::open(program, weights, communicator, options, local))?;
        Ok(Session { worker, team, signatures, poisoned: None, closed: false })
    }

    pub fn rank(&self) -> usize {
        self.worker.rank()
    }

    pub fn program(&self) -> &RankProgram {
        self.worker.program()
    }

    /// The GPU that executes the program and where its kernels came from; nothing if it is the processor.
    pub fn device(&self) -> Option<&str> {
        self.worker.device()
    }

    /// What the GPU was asked to do so far; nothing if the processor executes the program.
    pub fn submitted(&self) -> Option<Submissions> {
        self.worker.submitted()
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
        let (asked, presents, entry) = match self.prepare(inputs, taps) {
            Ok((asked, presents, entry)) => (Ok(asked), presents, Some(entry)),
            Err(error) => (Err(error), Vec::new(), None),
        };
        let mut results = self.lead(asked)?;
        if let Some(entry) = entry.and_then(|entry| self.program().entries.get(entry)) {
            for (name, output) in results.outputs.iter_mut().filter(|(_, output)| output.sharded.is_none()) {
                if let Some(out) = handed_out(&entry.graph, name, &output.tensor) {
                    output.tensor = out;
                }
            }
        }
        for present in &presents {
            if let Some(output) = results.outputs.get_mut(&*present.output) {
                let filled = present.filled(&output.tensor);
                let name = &present.output;
                output.tensor = filled
                    .map_err(|what| SessionError::Usage { what: format!("output `{name}`: {what}") })?;
            }
        }
        Ok(results)
    }

    /// Runs one step for `slots`, whose state stays with the ranks: state inputs are not given, state outputs not
    /// returned. A slot that was never stepped starts empty. Steps of the same slots in the same order copy no state.
    ///
    /// Slots may have different lengths. Inputs and outputs have a row for every slot, in the order of `slots`, along
    /// the dim that is called as the slot dim of the state; inputs without such a dim are for all slots. Dims that
    /// depend on the lengths, such as that of an attention mask over past and new entries, are those of the longest
    /// slot: of an input, shorter slots take the leading entries, of an output, the others are zero. The program runs
    /// once for each length.
    ///
    /// # Errors
    /// As [`Session::run`], and a full state, which is refused before anything runs. After an error of a step that
    /// leaves the session usable, all slots are as before it.
    pub fn run_step(
        &mut self,
        slots: &[SlotId],
        inputs: &BTreeMap<String, Tensor>,
    ) -> Result<Results, SessionError> {
        if self.rank() != 0 {
            return self.follow_one();
        }
        let asked = self.prepare_step(inputs, slots);
        self.lead(asked)
    }

    /// True after a failed collective: every later call fails too.
    pub fn is_broken(&self) -> bool {
        self.poisoned.is_some()
    }

    /// The last collectives of this rank, oldest first.
    pub fn history(&self) -> History {
        self.worker.history()
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

    /// A slot as the bytes of a safetensors file, which holds whole logical tensors: a session of the same model on any
    /// number of ranks can load it. Empty on ranks other than 0.
    ///
    /// # Errors
    /// The slot is not there, or the session is poisoned.
    pub fn save_slot(&mut self, slot: SlotId) -> Result<Vec<u8>, SessionError> {
        if self.rank() != 0 {
            return self.follow_one().map(|_| Vec::new());
        }
        let nothing = || SessionError::State { what: format!("slot {} holds nothing to save", slot.0) };
        let known = self.worker.state().ok_or_else(no_state);
        let length = known.and_then(|state| state.length(slot).ok_or_else(nothing));
        let length_or_zero = *length.as_ref().unwrap_or(&0);
        let saved = self.lead(length.map(|_| (Request::Save { slot: slot.0 }, Vec::new())))?;
        let tensors = saved.outputs.into_iter().map(|(name, output)| (name, output.tensor)).collect();
        StateStore::encode(&tensors, length_or_zero)
    }

    /// Makes a slot from what [`Session::save_slot`] gave. Ranks other than 0 pass nothing.
    ///
    /// # Errors
    /// The bytes are not a saved slot of this model or longer than the capacity, the slot is in use, or no slot is free.
    pub fn load_slot(&mut self, slot: SlotId, bytes: &[u8]) -> Result<(), SessionError> {
        if self.rank() != 0 {
            return self.follow_one().map(|_| ());
        }
        let known = self.worker.state().ok_or_else(no_state);
        let asked = known.and_then(|state| state.decode(slot, bytes));
        let asked = asked.map(|(length, tensors)| (Request::Load { slot: slot.0, length }, vec![tensors]));
        self.lead(asked).map(|_| ())
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
        self.lead(Ok((Request::Close, Vec::new()))).map(|_| ())
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
            Some(state) => state.check(&request_of(&request)).map(|()| (request, Vec::new())),
            None => Err(no_state()),
        };
        self.lead(checked).map(|_| ())
    }

    /// Checks a run on rank 0; also the outputs that are filled up afterwards, and the entry.
    fn prepare(
        &self,
        inputs: &BTreeMap<String, Tensor>,
        taps: &[StepId],
    ) -> Result<(Asked, Vec<Present>, usize), SessionError> {
        let (entry, bindings, adapted) = bind::choose(&self.signatures, inputs, None)?;
        let (inputs, presents) = adapted.unwrap_or_else(|| (inputs.clone(), Vec::new()));
        self.presents_are_whole(entry, &presents)?;
        let steps = self.program().entries.get(entry).map_or(0, |e| e.graph.len());
        if let Some(tap) = taps.iter().find(|t| t.index() >= steps) {
            return Err(SessionError::Usage {
                what: format!("there is no step {tap}, the entry has {steps}"),
            });
        }
        let part = run_part(entry, &bindings, &inputs, &self.takes(entry), None);
        let taps = taps.iter().map(|t| t.0).collect();
        Ok(((Request::Run { parts: vec![part], taps }, vec![inputs]), presents, entry))
    }

    /// Refuses to fill up outputs of which every rank hands out its part.
    fn presents_are_whole(&self, entry: usize, presents: &[Present]) -> Result<(), SessionError> {
        let ports =
            self.program().entries.get(entry).map(|entry| entry.outputs.as_slice()).unwrap_or_default();
        let parted = |present: &&Present| {
            ports
                .iter()
                .any(|port| port.name == present.output && port.keep_sharded && !port.layout.is_replicated())
        };
        let Some(present) = presents.iter().find(parted) else { return Ok(()) };
        let name = &present.output;
        Err(SessionError::Usage {
            what: format!(
                "output `{name}` stays sharded, so that it cannot be as long as the buffer that was given\n  \
                 help: give no more entries of the past than are used"
            ),
        })
    }

    /// Whether an entry has an input of some name.
    fn takes(&self, entry: usize) -> impl Fn(&str) -> bool {
        move |name| self.signatures.get(entry).is_some_and(|signature| signature.takes(name))
    }

    /// Checks a step on rank 0, all parts of it before any runs.
    fn prepare_step(
        &self,
        inputs: &BTreeMap<String, Tensor>,
        slots: &[SlotId],
    ) -> Result<Asked, SessionError> {
        let state = self.worker.state().ok_or_else(no_state)?;
        let parts = state.parts(slots)?;
        let mut of_parts = self.split(state, inputs, &parts)?;
        let mut run_parts = Vec::with_capacity(parts.len());
        for (part, inputs) in parts.iter().zip(&mut of_parts) {
            let types = state.inputs(part.length, part.rows.len());
            let (entry, bindings, adapted) = bind::choose(&self.signatures, inputs, Some(&types))?;
            if let Some((adapted, _)) = adapted {
                *inputs = adapted;
            }
            if let Some(entry) = self.program().entries.get(entry) {
                state.check_capacity(entry, &bindings, part.length)?;
            }
            let own = part.rows.iter().filter_map(|&row| slots.get(row)).map(|slot| slot.0).collect();
            let slots = Some((own, part.rows.clone()));
            run_parts.push(run_part(entry, &bindings, inputs, &self.takes(entry), slots));
        }
        Ok((Request::Run { parts: run_parts, taps: Vec::new() }, of_parts))
    }

    /// The inputs of every part of a step.
    fn split(
        &self,
        state: &StateStore,
        inputs: &BTreeMap<String, Tensor>,
        parts: &[StepPart],
    ) -> Result<Vec<BTreeMap<String, Tensor>>, SessionError> {
        let (first, [.., longest], true) = (self.program().entries.first(), parts, parts.len() > 1) else {
            return Ok(vec![inputs.clone()]);
        };
        let (Some(first), Some(batch)) = (first, state.batch()) else { return Err(no_state()) };
        let mut of_parts = parts::split_rows(first, &batch, inputs, parts)?;
        let types = state.inputs(longest.length, longest.rows.len());
        let of_longest = of_parts.last().unwrap_or(inputs);
        let (entry, bindings, _) = bind::choose(&self.signatures, of_longest, Some(&types))?;
        let entry = self.program().entries.get(entry).unwrap_or(first);
        parts::check_outputs(entry, &batch)?;
        for (part, inputs) in
            parts.iter().zip(&mut of_parts).filter(|(part, _)| part.length != longest.length)
        {
            parts::cut_lengths(entry, &batch, &state.length_symbols()?, &bindings, part, inputs)?;
        }
        Ok(of_parts)
    }

    /// Rank 0: tells all ranks, then does it.
    fn lead(&mut self, asked: Result<Asked, SessionError>) -> Result<Results, SessionError> {
        self.usable()?;
        let told = match &asked {
            Ok((request, _)) => request.clone(),
            Err(error) => Request::Refuse(error.to_string()),
        };
        let sent = self.worker.announce(Some(&told)).map(|_| ());
        self.settle(sent)?;
        let (request, given) = asked?;
        self.execute(&request, given)
    }

    /// Other ranks: does what rank 0 asks next.
    fn follow_one(&mut self) -> Result<Results, SessionError> {
        self.usable()?;
        let heard = self.worker.announce(None);
        let request = self.settle(heard)?;
        self.execute(&request, Vec::new())
    }

    /// Does what was asked; the tensors that go with it are given on rank 0 only.
    fn execute(
        &mut self,
        request: &Request,
        given: Vec<BTreeMap<String, Tensor>>,
    ) -> Result<Results, SessionError> {
        let worker = &mut self.worker;
        let done = match request {
            Request::Refuse(message) => Err(SessionError::Refused { rank: 0, message: message.clone() }),
            Request::Run { parts, taps } => self.team.install(|| worker.run(parts, given, taps)),
            Request::Truncate { .. } | Request::Fork { .. } | Request::Drop { .. } => {
                worker.change_state(&request_of(request)).map(|()| Results::default())
            }
            Request::Save { slot } => worker.save_slot(SlotId(*slot)),
            Request::Load { slot, length } => worker
                .load_slot(SlotId(*slot), *length, given.into_iter().next())
                .map(|()| Results::default()),
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
        result.map_err(|error| match error {
            SessionError::Collective(error) => {
                self.poisoned = Some(error.to_string());
                match self.worker.whereabouts() {
                    Some(place) => SessionError::Broken { place, error },
                    None => SessionError::Collective(error),
                }
            }
            other => other,
        })
    }
}

fn no_state() -> SessionError {
    SessionError::Usage {
        what: "the session keeps no state\n  help: open it with a state capacity, or pass the past tensors to `run`".into(),
    }
}
