//! What executes a rank's program: the processor, or a GPU. Requests, agreement and state are the same for both.

use super::{DeviceChoice, SessionError, SessionOptions, Submissions};
use crate::comm::{CommError, Communicator};
use crate::cpu::WeightSource;
use crate::cpu::constants::Constants;
use crate::cpu::deferred::Deferred;
use crate::cpu::exec::{Finished, Prepared, Run, Shapes, Slots};
use crate::cpu::value::Value;
use crate::cuda;
use crate::state::{Home, SlotGroup};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tpshard_driver::SearchPath;
use tpshard_driver::cuda::Submitted;
use tpshard_ir::ValueId;
use tpshard_ir::dim::Bindings;
use tpshard_ir::program::{Determinism, MemoryPlan, RankProgram, lower_keeping, plan_known};

pub(super) enum Engine {
    Cpu(Cpu),
    Cuda(Box<cuda::Engine>),
}

/// The processor.
pub(super) struct Cpu {
    constants: Constants,
    /// One per entry.
    prepared: Vec<Prepared>,
    slots: Slots,
}

/// A run that was found to be possible.
pub(super) enum Plan {
    /// Also an entry made ready to keep what is to be looked at, if anything is.
    Cpu(MemoryPlan, Option<Box<Prepared>>),
    Cuda(cuda::Plan),
}

/// A run of an entry.
pub(super) struct Job<'a> {
    pub(super) index: usize,
    pub(super) bindings: &'a Bindings,
    /// Whole inputs, by name.
    pub(super) inputs: &'a BTreeMap<Arc<str>, Value>,
    pub(super) state: Option<&'a mut SlotGroup>,
    pub(super) timed: bool,
    pub(super) taps: &'a [ValueId],
    pub(super) deferred: Deferred<'a>,
}

/// Whether 16-bit results are rounded after every operation: what is fused with what depends on the number of ranks.
fn round_each(program: &RankProgram) -> bool {
    program.determinism == Determinism::Tp
}

fn no_entry(index: usize) -> SessionError {
    SessionError::Program { what: format!("there is no entry {index}") }
}

impl Engine {
    /// Makes the program ready with its weights.
    pub(super) fn open(
        program: &RankProgram,
        weights: &mut dyn WeightSource,
        options: &SessionOptions,
        progress: &dyn Fn(),
    ) -> Result<Engine, SessionError> {
        let code = match (&program.device, options.device) {
            (Some(code), DeviceChoice::Program | DeviceChoice::Cuda) => code,
            (None, DeviceChoice::Cuda) => {
                let what = "the program has no kernels for a GPU\n  help: build it with --target cuda";
                return Err(SessionError::Usage { what: what.into() });
            }
            (_, DeviceChoice::Cpu) | (None, DeviceChoice::Program) => {
                return Cpu::open(program, weights, progress).map(Engine::Cpu);
            }
        };
        let host = cuda::Surroundings {
            local_rank: options.local_rank.unwrap_or(program.rank),
            search: SearchPath::from_environment().after(&options.libraries),
            graphs: !options.no_graphs,
            overlap: !options.no_overlap,
            progress,
        };
        let engine = cuda::Engine::open(program, code, weights, &host)?;
        Ok(Engine::Cuda(Box::new(engine)))
    }

    /// Decides with all ranks what carries collectives; all of them have made their programs ready.
    pub(super) fn link(
        &mut self,
        program: &RankProgram,
        options: &SessionOptions,
        communicator: &dyn Communicator,
        sequence: &mut u64,
    ) -> Result<(), SessionError> {
        match self {
            Engine::Cpu(_) => Ok(()),
            Engine::Cuda(engine) => {
                let search = SearchPath::from_environment().after(&options.libraries);
                engine.link(program, &search, options.comm, communicator, sequence)
            }
        }
    }

    /// What was chosen, for people.
    pub(super) fn description(&self) -> Option<&str> {
        match self {
            Engine::Cpu(_) => None,
            Engine::Cuda(engine) => Some(engine.description()),
        }
    }

    /// What the device was asked to do, if there is one.
    pub(super) fn submitted(&self) -> Option<Submissions> {
        match self {
            Engine::Cpu(_) => None,
            Engine::Cuda(engine) => {
                let (counts, trouble) = engine.submitted();
                let Submitted { launches, graphs, updates, captures } = counts;
                let trouble = trouble.map(str::to_owned);
                Some(Submissions { launches, graphs, updates, captures, trouble })
            }
        }
    }

    /// Bytes that this rank may use besides the weights, where `local_ranks` ranks share the machine.
    pub(super) fn memory_share(&self, local_ranks: usize) -> Result<u64, SessionError> {
        match self {
            Engine::Cpu(_) => Ok(available_memory().map_or(u64::MAX, |bytes| bytes / local_ranks as u64)),
            Engine::Cuda(engine) => engine.memory_share(local_ranks),
        }
    }

    /// Where state that stays is kept.
    pub(super) fn home(&self) -> Home {
        match self {
            Engine::Cpu(_) => Home::Host,
            Engine::Cuda(engine) => Home::Device(engine.device().clone()),
        }
    }

    /// How a run goes, and how many bytes it takes besides inputs and outputs. `capacity` is the room of state that
    /// stays.
    pub(super) fn plan(
        &self,
        program: &RankProgram,
        index: usize,
        bindings: &Bindings,
        taps: &[u32],
        capacity: Option<usize>,
    ) -> Result<(Plan, u64), SessionError> {
        match self {
            Engine::Cpu(cpu) => cpu.plan(program, index, bindings, taps),
            Engine::Cuda(engine) => {
                let plan = engine.plan(program, index, bindings, capacity, !taps.is_empty())?;
                let bytes = plan.bytes.saturating_add(plan.staging);
                Ok((Plan::Cuda(plan), bytes))
            }
        }
    }

    /// Makes sure of memory for a run.
    pub(super) fn make_room(&mut self, plan: &Plan, rank: usize) -> Result<(), SessionError> {
        match (self, plan) {
            (Engine::Cuda(engine), Plan::Cuda(plan)) => engine.make_room(plan, rank),
            _ => Ok(()),
        }
    }

    pub(super) fn run(
        &mut self,
        program: &RankProgram,
        plan: &Plan,
        job: Job<'_>,
        communicator: &dyn Communicator,
        sequence: &mut u64,
    ) -> Result<Finished, CommError> {
        match (self, plan) {
            (Engine::Cpu(cpu), Plan::Cpu(plan, tapped)) => {
                cpu.run(program, plan, tapped.as_deref(), job, communicator, sequence)
            }
            (Engine::Cuda(engine), Plan::Cuda(plan)) => {
                let states = job.state.map(|state| state.on_device()).unwrap_or_default();
                let request = cuda::Request {
                    index: job.index,
                    plan,
                    inputs: job.inputs,
                    states: &states,
                    timed: job.timed,
                    taps: job.taps,
                    deferred: job.deferred,
                };
                engine.run(program, request, communicator, sequence)
            }
            _ => Err(CommError::Usage { what: "a plan for another device".into() }),
        }
    }
}

impl Cpu {
    fn open(
        program: &RankProgram,
        weights: &mut dyn WeightSource,
        progress: &dyn Fn(),
    ) -> Result<Cpu, SessionError> {
        let constants =
            Constants::load(program, weights, progress).map_err(|what| SessionError::Weights { what })?;
        let round_each = round_each(program);
        let prepared = program
            .entries
            .iter()
            .map(|entry| Prepared::new(entry, entry.lowering.clone(), &constants, round_each))
            .collect::<Result<Vec<_>, String>>()
            .map_err(|what| SessionError::Program { what })?;
        Ok(Cpu { constants, prepared, slots: Slots::default() })
    }

    fn plan(
        &self,
        program: &RankProgram,
        index: usize,
        bindings: &Bindings,
        taps: &[u32],
    ) -> Result<(Plan, u64), SessionError> {
        let (Some(entry), Some(prepared)) = (program.entries.get(index), self.prepared.get(index)) else {
            return Err(no_entry(index));
        };
        let tapped = if taps.is_empty() {
            None
        } else {
            let keep: BTreeSet<ValueId> = taps.iter().map(|&t| ValueId(t)).collect();
            let lowering = lower_keeping(&entry.graph, &keep);
            let prepared = Prepared::new(entry, lowering, &self.constants, round_each(program));
            Some(Box::new(prepared.map_err(|what| SessionError::Program { what })?))
        };
        let buffers = &tapped.as_deref().unwrap_or(prepared).buffers;
        // What data decides is counted when it is known.
        let plan = plan_known(buffers, bindings)?;
        let bytes = plan.bytes;
        Ok((Plan::Cpu(plan, tapped), bytes))
    }

    fn run(
        &mut self,
        program: &RankProgram,
        plan: &MemoryPlan,
        tapped: Option<&Prepared>,
        job: Job<'_>,
        communicator: &dyn Communicator,
        sequence: &mut u64,
    ) -> Result<Finished, CommError> {
        let (Some(entry), Some(prepared)) =
            (program.entries.get(job.index), tapped.or(self.prepared.get(job.index)))
        else {
            return Err(CommError::Usage { what: no_entry(job.index).to_string() });
        };
        let run = Run {
            entry,
            prepared,
            constants: &self.constants,
            mesh: &program.mesh,
            rank: program.rank,
            bindings: job.bindings.clone(),
            plan,
            inputs: job.inputs,
            timed: job.timed,
            deferred: job.deferred,
            shapes: Shapes::default(),
        };
        let mut states = job.state.map(SlotGroup::values).unwrap_or_default();
        run.run(&mut states, &mut self.slots, job.taps, communicator, sequence)
    }
}

/// Bytes that can be had without swapping, as Linux estimates them.
fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|l| l.starts_with("MemAvailable:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok()?.checked_mul(1024)
}
