//! What outlives runs on a GPU: weights, kernels, the working memory, and the entries made ready.

use super::beside::{self, Beside};
use super::exec::{FAULT_BYTES, Run};
use super::gpu::{Gpu, Surroundings};
use super::graphs::{self, Graphs};
use super::links::{Links, carries, goes_aside, staged};
use super::plan::Plan;
use super::prepared::{Origin, Prepared};
use super::tensor::DeviceTensor;
use crate::comm::{CommError, Communicator, bytes};
use crate::cpu::WeightSource;
use crate::cpu::constants::Constants;
use crate::cpu::convert::Place;
use crate::cpu::deferred::Deferred;
use crate::cpu::exec::Finished;
use crate::cpu::value::Value;
use crate::session::{CommChoice, SessionError};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tpshard_driver::cuda::{Device, Function, Memory, Submitted};
use tpshard_driver::{DriverError, SearchPath};
use tpshard_ir::dim::Bindings;
use tpshard_ir::program::device::{DeviceCode, capacity_symbol};
use tpshard_ir::program::{Entry, RankProgram};
use tpshard_ir::{Op, ValueId};

pub(crate) struct Engine {
    /// What carries collectives between devices, if host memory does not; first, so that it ends before what it uses.
    links: Option<Links>,
    /// Nothing where the driver has none, or none are wanted.
    graphs: Option<Graphs>,
    /// Whether collectives may travel while the device computes.
    overlap: bool,
    description: String,
    gpu: Gpu,
    functions: Vec<Function>,
    entries: Vec<Ready>,
    /// Constants that are read on the host.
    host: Constants,
    arena: Arc<Memory>,
    fault: Memory,
}

/// An entry with its constants.
struct Ready {
    prepared: Prepared,
    constants: BTreeMap<ValueId, Arc<Memory>>,
    ids: Vec<Option<usize>>,
}

/// A run of an entry.
pub(crate) struct Request<'a> {
    pub(crate) index: usize,
    pub(crate) plan: &'a Plan,
    /// Whole inputs, by name.
    pub(crate) inputs: &'a BTreeMap<Arc<str>, Value>,
    /// State that stays on the device.
    pub(crate) states: &'a BTreeMap<Arc<str>, DeviceTensor>,
    pub(crate) timed: bool,
    pub(crate) taps: &'a [ValueId],
    pub(crate) deferred: Deferred<'a>,
}

fn failed(error: DriverError) -> SessionError {
    SessionError::Device { what: error.to_string() }
}

impl Engine {
    /// Chooses a device and brings kernels and weights there.
    ///
    /// # Errors
    /// No device can be used, tables that cannot be followed, weights that are missing or do not fit.
    pub(crate) fn open(
        program: &RankProgram,
        code: &DeviceCode,
        weights: &mut dyn WeightSource,
        host: &Surroundings<'_>,
    ) -> Result<Engine, SessionError> {
        let mut prepared = Vec::with_capacity(program.entries.len());
        for entry in &program.entries {
            let wrong =
                |what: String| SessionError::Program { what: format!("entry `{}`: {what}", entry.name) };
            let lowering = entry.device.as_ref().ok_or_else(|| wrong("it has no kernels".into()))?;
            lowering.check(code, entry).map_err(|error| wrong(error.to_string()))?;
            prepared.push(Prepared::new(entry, lowering, &program.states).map_err(wrong)?);
        }
        let wanted = graphs::are_wanted(std::env::var(graphs::VARIABLE).ok().as_deref())?;
        let overlap = beside::is_wanted(std::env::var(beside::VARIABLE).ok().as_deref())? && host.overlap;
        let gpu = Gpu::open(code, host)?;
        let graphs = (wanted && host.graphs && gpu.device.has_graphs()).then(Graphs::default);
        let functions = code.kernels.iter().map(|kernel| gpu.module.function(&kernel.name));
        let functions = functions.collect::<Result<Vec<Function>, _>>().map_err(failed)?;
        let (kept, uploaded) = constants(program, &prepared, &gpu.device, weights, host.progress)?;
        let entries = program.entries.iter().zip(prepared).map(|(entry, prepared)| {
            let ids = kept.of(&entry.graph, &entry.lowering);
            let memory = |&value: &ValueId| {
                let id = ids.get(value.index()).copied().flatten()?;
                Some((value, uploaded.get(&id)?.clone()))
            };
            let constants = prepared.on_device.iter().filter_map(memory).collect();
            Ready { prepared, constants, ids }
        });
        let entries = entries.collect();
        let arena = Arc::new(gpu.device.allocate(0).map_err(failed)?);
        let fault = gpu.device.allocate(FAULT_BYTES).map_err(failed)?;
        let mut description = gpu.description.clone();
        if graphs.is_none() {
            description.push_str(", without CUDA graphs");
        }
        Ok(Engine {
            links: None,
            graphs,
            overlap,
            description,
            functions,
            entries,
            host: kept,
            arena,
            fault,
            gpu,
        })
    }

    /// Decides with all ranks what carries collectives.
    ///
    /// # Errors
    /// As [`Links::open`].
    pub(crate) fn link(
        &mut self,
        program: &RankProgram,
        search: &SearchPath,
        choice: CommChoice,
        communicator: &dyn Communicator,
        sequence: &mut u64,
    ) -> Result<(), SessionError> {
        let entries = program.entries.iter().zip(&self.entries).filter(|_| self.overlap);
        let pieces: String = entries.map(|(e, ready)| beside::described(&e.name, &ready.prepared)).collect();
        let choice = (choice, pieces.as_str());
        let carrier = Links::open(program, &self.gpu.device, search, choice, communicator, sequence)?;
        self.links = carrier.links;
        self.description.push_str(&carrier.description);
        if self.links.is_some() && !self.overlap {
            self.description.push_str(", which nothing is computed beside");
        }
        Ok(())
    }

    /// What was chosen, for people.
    pub(crate) fn description(&self) -> &str {
        &self.description
    }

    /// What the device was asked to do since the session opened, and why graphs are not used any more, if so.
    pub(crate) fn submitted(&self) -> (Submitted, Option<&str>) {
        (self.gpu.device.submitted(), self.graphs.as_ref().and_then(Graphs::trouble))
    }

    pub(crate) fn device(&self) -> &Device {
        &self.gpu.device
    }

    /// This rank's share of the free memory, where `local_ranks` ranks use the GPUs of the machine.
    ///
    /// # Errors
    /// The driver fails.
    pub(crate) fn memory_share(&self, local_ranks: usize) -> Result<u64, SessionError> {
        let (free, _) = self.gpu.device.memory().map_err(failed)?;
        Ok(free / local_ranks.div_ceil(self.gpu.visible.max(1)).max(1) as u64)
    }

    /// Where the values of a run lie. `capacity` is the room of state that stays; `keep` all values to the end.
    ///
    /// # Errors
    /// Sizes that cannot be addressed.
    pub(crate) fn plan(
        &self,
        program: &RankProgram,
        index: usize,
        bindings: &Bindings,
        capacity: Option<usize>,
        keep: bool,
    ) -> Result<Plan, SessionError> {
        let (Some(entry), Some(ready)) = (program.entries.get(index), self.entries.get(index)) else {
            return Err(SessionError::Program { what: format!("there is no entry {index}") });
        };
        let mut bindings = bindings.clone();
        for (pair, room) in rooms(program, entry, &bindings, capacity) {
            bindings.insert(capacity_symbol(pair).into(), room);
        }
        let names: BTreeSet<&str> = match capacity {
            Some(_) => program.states.iter().map(|state| &*state.input).collect(),
            None => BTreeSet::new(),
        };
        let given = |value: ValueId| match &entry.graph.node(value).op {
            Op::Input { name } => names.contains(&**name),
            _ => false,
        };
        let beside = self.beside(program, entry, &ready.prepared, &bindings);
        let mut plan = Plan::new(&ready.prepared, (bindings, beside), &given, keep)?;
        if self.links.is_some() {
            plan.staging = staging(program, entry, &plan.bindings);
        }
        Ok(plan)
    }

    /// Which collectives travel while the device computes.
    fn beside(
        &self,
        program: &RankProgram,
        entry: &Entry,
        prepared: &Prepared,
        bindings: &Bindings,
    ) -> Beside {
        let Some(links) = self.links.as_ref().filter(|_| self.overlap) else { return Beside::default() };
        let place = Place { mesh: &program.mesh, rank: program.rank, bindings };
        let aside = |index: usize| -> Option<bool> {
            let to = prepared.steps.get(index)?.value;
            let Op::Convert(conversion) = &entry.graph.node(to).op else { return None };
            let from = *entry.graph.node(to).args.first()?;
            let lies = |value: &ValueId| {
                let made = matches!(prepared.origin_of(*value), Some(Origin::Step(_)));
                made && !prepared.spacing.contains_key(value)
            };
            if !carries(conversion, entry.graph.ty(to).dtype) || ![from, to].iter().all(lies) {
                return None;
            }
            let families = [entry.families.get(from.index())?, entry.families.get(to.index())?];
            goes_aside(conversion, families, &place).ok()
        };
        let aside = |index: usize| aside(index).unwrap_or(false);
        Beside::new(prepared, bindings, &aside, links.has_pieces())
    }

    /// Makes sure of the memory of a plan; `limit` is said if there is too little.
    ///
    /// # Errors
    /// There is too little memory.
    pub(crate) fn make_room(&mut self, plan: &Plan, rank: usize) -> Result<(), SessionError> {
        let device = self.gpu.device.clone();
        let refused = |needed: u64, error: DriverError| {
            if !error.is_out_of_memory() {
                return failed(error);
            }
            let limit = device.memory().map_or(0, |(free, _)| free);
            SessionError::Memory { rank, needed, limit }
        };
        if plan.bytes > self.arena.len() {
            // What was there is given back first, so that the two need not fit together.
            self.arena = Arc::new(device.allocate(0).map_err(failed)?);
            let arena = device.allocate(plan.bytes).map_err(|error| refused(plan.bytes, error))?;
            self.arena = Arc::new(arena);
        }
        match &self.links {
            Some(links) => links.make_room(plan.staging).map_err(|error| refused(plan.staging, error)),
            None => Ok(()),
        }
    }

    /// Runs an entry.
    ///
    /// # Errors
    /// A failed collective; what fails on this rank alone is in the result.
    pub(crate) fn run(
        &mut self,
        program: &RankProgram,
        request: Request<'_>,
        communicator: &dyn Communicator,
        sequence: &mut u64,
    ) -> Result<Finished, CommError> {
        let (Some(entry), Some(ready)) =
            (program.entries.get(request.index), self.entries.get(request.index))
        else {
            return Err(CommError::Usage { what: format!("there is no entry {}", request.index) });
        };
        let run = Run {
            entry,
            number: request.index,
            prepared: &ready.prepared,
            device: &self.gpu.device,
            library: self.gpu.library.as_ref(),
            links: self.links.as_ref(),
            functions: &self.functions,
            constants: &ready.constants,
            host: &self.host,
            ids: &ready.ids,
            arena: &self.arena,
            fault: &self.fault,
            plan: request.plan,
            mesh: &program.mesh,
            rank: program.rank,
            bindings: request.plan.bindings.clone(),
            inputs: request.inputs,
            states: request.states,
            sizes: ready.prepared.calls.sizes(&request.plan.bindings),
            timed: request.timed,
            // Where every value is kept or timed, nothing comes again.
            graphs: self.graphs.as_mut().filter(|_| !request.timed && request.taps.is_empty()),
            // Nor does anything overlap where every step is waited for, or looked at.
            overlap: !request.timed && request.taps.is_empty(),
            open: false,
            waiting: Vec::new(),
            pieces: 0,
            deferred: request.deferred,
            spots: vec![None; entry.graph.len()],
            failure: None,
        };
        run.run(request.taps, communicator, sequence)
    }
}

/// The most bytes that any collective of an entry has on their way, as far as its sizes are known.
fn staging(program: &RankProgram, entry: &Entry, bindings: &Bindings) -> u64 {
    let place = Place { mesh: &program.mesh, rank: program.rank, bindings };
    let bytes = entry.graph.values().filter_map(|(to, node)| {
        let Op::Convert(conversion) = &node.op else { return None };
        let from = *node.args.first()?;
        carries(conversion, node.ty.dtype).then_some(())?;
        let families = [entry.families.get(from.index())?, entry.families.get(to.index())?];
        staged(conversion, families, &place).ok()
    });
    bytes.max().unwrap_or(0)
}

/// Constants that stay on the host, and those on the device by their number.
fn constants(
    program: &RankProgram,
    prepared: &[Prepared],
    device: &Device,
    weights: &mut dyn WeightSource,
    progress: &dyn Fn(),
) -> Result<(Constants, BTreeMap<usize, Arc<Memory>>), SessionError> {
    let wanted: Vec<BTreeSet<ValueId>> = prepared.iter().map(|p| p.on_device.clone()).collect();
    let retained: Vec<BTreeSet<ValueId>> = prepared.iter().map(|p| p.on_host.clone()).collect();
    let mut uploaded = BTreeMap::new();
    let mut on_device = true;
    let mut uploader = device.uploader();
    let mut take = |id: usize, value: &Value| -> Result<(), String> {
        let tensor = value.tensor()?;
        let data = bytes(tensor.data());
        let mut put = || -> Result<Memory, DriverError> {
            let memory = device.allocate(data.len() as u64)?;
            uploader.upload(&memory, data, progress)?;
            Ok(memory)
        };
        let memory = put().map_err(|error| error.to_string());
        on_device = memory.is_ok();
        uploaded.insert(id, Arc::new(memory?));
        Ok(())
    };
    let host = Constants::hand_on(program, &wanted, &retained, weights, progress, &mut take);
    match host {
        Ok(host) => Ok((host, uploaded)),
        Err(what) if on_device => Err(SessionError::Weights { what }),
        Err(what) => {
            let what = format!("the weights do not fit on the GPU: {what}\n  help: build for more ranks");
            Err(SessionError::Device { what })
        }
    }
}

/// The room along the growing dim of each state pair: the capacity, or what past and present need.
fn rooms(
    program: &RankProgram,
    entry: &Entry,
    bindings: &Bindings,
    capacity: Option<usize>,
) -> Vec<(usize, i64)> {
    let extent = |value: ValueId, axis: usize| entry.graph.ty(value).shape.get(axis)?.eval(bindings).ok();
    let room = |(pair, state): (usize, &tpshard_ir::program::StateSpec)| {
        let room = match capacity {
            Some(capacity) => i64::try_from(capacity).ok()?,
            None => {
                let past = entry.graph.inputs().find(|(_, name, _)| **name == state.input)?.0;
                let present = entry.graph.outputs.iter().find(|output| output.name == state.output)?.value;
                extent(past, state.axis)?.max(extent(present, state.axis)?)
            }
        };
        Some((pair, room))
    };
    program.states.iter().enumerate().filter_map(room).collect()
}
