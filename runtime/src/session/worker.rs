//! What every rank does for a request.

mod loading;
mod opening;
mod slots;

use super::agree::agree;
use super::engine::{Engine, Job, Plan};
use super::timeline::{StepTime, Timeline};
use super::{InputHeader, Output, Request, Results, RunPart, SessionError, SessionOptions, Submissions, Tap};
use crate::comm::{CommStats, Communicator, Group, History, Record, Tag};
use crate::cpu::WeightSource;
use crate::cpu::convert::{Place, StepError, convert};
use crate::cpu::deferred::Deferred;
use crate::cpu::exec::Finished;
use crate::cpu::step::{self, Failed, Held};
use crate::cpu::value::Value;
use crate::state::{SlotId, StateStore};
use opening::{check, check_evaluator, least_limit, same_program};
use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;
use std::sync::Arc;
use tpshard_ir::deferred::SharedEvaluator;
use tpshard_ir::dim::{Bindings, Dim};
use tpshard_ir::program::{Entry, Family, Port, RankProgram};
use tpshard_ir::tensor::element_count;
use tpshard_ir::{AxisLayout, Conversion, DType, StepId, Tensor, ValueId};

pub(super) struct Worker {
    program: RankProgram,
    /// Before the communicator, so that its collectives end while the other ranks can still be seen.
    engine: Engine,
    communicator: Box<dyn Communicator>,
    state: Option<StateStore>,
    memory_limit: u64,
    /// The least memory limit of all ranks, where they have to decide alike.
    common_limit: u64,
    evaluator: SharedEvaluator,
    sequence: u64,
    timeline: Option<Timeline>,
    /// The entry that ran last.
    running: usize,
}

impl Worker {
    pub(super) fn open(
        program: RankProgram,
        weights: &mut dyn WeightSource,
        communicator: Box<dyn Communicator>,
        options: &SessionOptions,
        local_ranks: usize,
    ) -> Result<Worker, SessionError> {
        let mut sequence = 0;
        same_program(&program, &*communicator, &mut sequence)?;
        let load = || -> Result<_, SessionError> {
            crate::cpu::check_instructions().map_err(|what| SessionError::Usage { what })?;
            check(&program, weights, &*communicator)?;
            check_evaluator(&program, &options.evaluator)?;
            Engine::open(&program, weights, options, &|| communicator.progress())
        };
        let loaded = loading::at_work(&*communicator.monitor(), load);
        let mut engine = agree(&*communicator, &mut sequence, loaded)?;
        // It takes memory too, which is not there for anything else.
        engine.link(&program, options, &*communicator, &mut sequence)?;
        let make_room = || -> Result<_, SessionError> {
            let memory_limit = match options.memory_limit {
                Some(limit) => limit,
                None => engine.memory_share(local_ranks)?,
            };
            let state = match &options.state {
                Some(settings) => Some(StateStore::new(&program, settings, engine.home(), memory_limit)?),
                None => None,
            };
            Ok((memory_limit, state))
        };
        let made = loading::at_work(&*communicator.monitor(), make_room);
        let (memory_limit, state) = agree(&*communicator, &mut sequence, made)?;
        let common_limit = least_limit(&program, &*communicator, &mut sequence, memory_limit)?;
        let evaluator = options.evaluator.clone();
        let timeline = options.timeline.then(Timeline::default);
        Ok(Worker {
            program,
            communicator,
            engine,
            state,
            memory_limit,
            common_limit,
            evaluator,
            sequence,
            timeline,
            running: 0,
        })
    }

    pub(super) fn rank(&self) -> usize {
        self.communicator.rank()
    }

    pub(super) fn program(&self) -> &RankProgram {
        &self.program
    }

    pub(super) fn stats(&self) -> CommStats {
        self.communicator.stats()
    }

    pub(super) fn history(&self) -> History {
        self.communicator.history()
    }

    /// The collective that was not done, as messages name it.
    pub(super) fn whereabouts(&self) -> Option<String> {
        let history = self.communicator.history();
        let Record { kind, tag, .. } = history.unfinished()?;
        let entry = self.program.entries.get(self.running);
        let node = entry.filter(|entry| (tag.node as usize) < entry.graph.len());
        let node = match node {
            Some(entry) => step::name(&entry.graph, ValueId(tag.node)),
            None => "none of the model".into(),
        };
        Some(format!("in {kind}, step {}, node {node}", tag.sequence))
    }

    /// What executes the program, if it is not the processor.
    pub(super) fn device(&self) -> Option<&str> {
        self.engine.description()
    }

    pub(super) fn submitted(&self) -> Option<Submissions> {
        self.engine.submitted()
    }

    pub(super) fn state(&self) -> Option<&StateStore> {
        self.state.as_ref()
    }

    pub(super) fn take_timeline(&mut self) -> Vec<StepTime> {
        self.timeline.as_mut().map(Timeline::take).unwrap_or_default()
    }

    /// Rank 0 sends its request, the others receive it.
    pub(super) fn announce(&mut self, request: Option<&Request>) -> Result<Request, SessionError> {
        if self.communicator.world_size() == 1 {
            return Ok(request.cloned().unwrap_or(Request::Close));
        }
        let unreadable = |e: serde_json::Error| SessionError::Program { what: format!("a request: {e}") };
        let bytes = request.map(serde_json::to_vec).transpose().map_err(unreadable)?.unwrap_or_default();
        let tag = self.tag();
        let group = Group::world(self.communicator.world_size());
        let heard = self.communicator.broadcast_bytes(&group, tag, 0, &bytes)?;
        serde_json::from_slice(&heard).map_err(unreadable)
    }

    fn tag(&mut self) -> Tag {
        self.sequence += 1;
        Tag { sequence: self.sequence, node: u32::MAX }
    }

    /// Runs the parts of a request one after another; all of them are found to be possible before the first runs. The
    /// tensors that go with them are given on rank 0 only.
    pub(super) fn run(
        &mut self,
        parts: &[RunPart],
        given: Vec<BTreeMap<String, Tensor>>,
        taps: &[u32],
    ) -> Result<Results, SessionError> {
        let ready = parts.iter().map(|part| self.ready(part, taps)).collect();
        let ready: Vec<_> = agree(&*self.communicator, &mut self.sequence, ready)?;
        let slots = parts.iter().flat_map(|part| part.slots.iter().flatten().copied().map(SlotId));
        let before = self.state.as_ref().map(|state| state.lengths(slots)).unwrap_or_default();
        let mut given = given.into_iter();
        let mut results = Vec::with_capacity(parts.len());
        for (part, ready) in parts.iter().zip(ready) {
            match self.run_part(part, ready, given.next().unwrap_or_default(), taps) {
                Ok(part) => results.push(part),
                Err(error) => {
                    if let Some(state) = &mut self.state {
                        state.restore(&before)?;
                    }
                    return Err(error);
                }
            }
        }
        if parts.len() == 1 {
            return Ok(results.pop().unwrap_or_default());
        }
        let joined = self.join(parts, results);
        agree(&*self.communicator, &mut self.sequence, joined)
    }

    fn run_part(
        &mut self,
        part: &RunPart,
        plan: Plan,
        given: BTreeMap<String, Tensor>,
        taps: &[u32],
    ) -> Result<Results, SessionError> {
        let bindings = part.bindings();
        let inputs = self.receive(&part.inputs, given)?;
        let slots: Option<Vec<SlotId>> =
            part.slots.as_ref().map(|slots| slots.iter().copied().map(SlotId).collect());
        let mut taken = self.take(slots.as_deref())?;
        let Some(program_entry) = self.program.entries.get(part.entry) else {
            return Err(SessionError::Program { what: format!("there is no entry {}", part.entry) });
        };
        let wanted: Vec<ValueId> = taps.iter().map(|&t| ValueId(t)).collect();
        let job = Job {
            index: part.entry,
            bindings: &bindings,
            inputs: &inputs,
            state: taken.as_mut(),
            timed: self.timeline.is_some(),
            taps: &wanted,
            deferred: Deferred::new(
                &program_entry.graph,
                &bindings,
                self.evaluator.0.as_deref(),
                self.common_limit,
            ),
        };
        let before = self.communicator.stats();
        self.running = part.entry;
        let mut finished =
            self.engine.run(&self.program, &plan, job, &*self.communicator, &mut self.sequence)?;
        let traffic = self.communicator.stats().since(&before);
        if let Some(timeline) = &mut self.timeline {
            timeline.add(part.entry, &finished.times);
        }
        let bindings = std::mem::take(&mut finished.bindings);
        let failure = finished.failure.take();
        let kept = match (&mut self.state, taken) {
            (Some(state), Some(taken)) => {
                state.put_back(taken, program_entry, &mut finished.outputs, failure.is_none())
            }
            _ => Ok(()),
        };
        let own = match failure {
            Some(Failed::Step(what)) => Err(SessionError::Refused { rank: self.program.rank, message: what }),
            Some(Failed::Index { node, index, extent }) => Err(SessionError::Index { node, index, extent }),
            None => kept,
        };
        agree(&*self.communicator, &mut self.sequence, own)?;
        let gathered = gather_outputs(
            program_entry,
            finished,
            &self.program,
            &bindings,
            slots.is_some(),
            &*self.communicator,
            &mut self.sequence,
        )?;
        let results = agree(&*self.communicator, &mut self.sequence, gathered)?;
        Ok(Results { traffic, ..results })
    }

    /// Everything a run needs that can fail on this rank alone.
    fn ready(&mut self, part: &RunPart, taps: &[u32]) -> Result<Plan, SessionError> {
        let program = |what: String| SessionError::Program { what };
        let Some(entry) = self.program.entries.get(part.entry) else {
            return Err(program(format!("there is no entry {}", part.entry)));
        };
        let bindings = &part.bindings();
        let capacity = self.state.as_ref().filter(|_| part.slots.is_some()).map(StateStore::capacity);
        let (plan, working) = self.engine.plan(&self.program, part.entry, bindings, taps, capacity)?;
        let open: BTreeSet<Arc<str>> =
            entry.graph.data_symbols().into_iter().filter(|s| !bindings.contains_key(s)).collect();
        let known = |p: &&Port| {
            open.is_empty() || !p.ty.shape.iter().flat_map(Dim::symbols).any(|s| open.contains(&s))
        };
        let bytes = |ports: &[Port]| -> u64 {
            ports.iter().filter(known).map(|p| port_bytes(p, bindings)).fold(0u64, u64::saturating_add)
        };
        let mut needed = working.saturating_add(bytes(&entry.inputs)).saturating_add(bytes(&entry.outputs));
        for header in &part.inputs {
            element_count(&header.shape)
                .ok_or_else(|| program(format!("input `{}` is too large", header.name)))?;
        }
        if !taps.is_empty() {
            needed = needed.saturating_mul(2);
        }
        if needed > self.memory_limit {
            let (rank, limit) = (self.program.rank, self.memory_limit);
            return Err(SessionError::Memory { rank, needed, limit });
        }
        self.engine.make_room(&plan, self.program.rank)?;
        Ok(plan)
    }

    /// Rank 0's inputs on every rank.
    fn receive(
        &mut self,
        headers: &[InputHeader],
        mut given: BTreeMap<String, Tensor>,
    ) -> Result<BTreeMap<Arc<str>, Value>, SessionError> {
        let group = Group::world(self.communicator.world_size());
        let mut inputs = BTreeMap::new();
        for header in headers {
            let mut tensor = match given.remove(&header.name) {
                Some(tensor) => tensor,
                None => DType::from_str(&header.dtype)
                    .map_err(|e| e.to_string())
                    .and_then(|d| Tensor::zeros(d, header.shape.clone()).map_err(|e| e.to_string()))
                    .map_err(|what| SessionError::Program { what })?,
            };
            if group.len() > 1 {
                let tag = self.tag();
                self.communicator.broadcast(&group, tag, 0, &mut tensor)?;
            }
            inputs.insert(Arc::from(header.name.as_str()), Value::new(tensor));
        }
        Ok(inputs)
    }
}

impl RunPart {
    fn bindings(&self) -> Bindings {
        self.bindings.iter().map(|(name, value)| (Arc::from(name.as_str()), *value)).collect()
    }
}

fn port_bytes(port: &Port, bindings: &Bindings) -> u64 {
    let extents = port.ty.shape.iter().map(|dim| dim.eval(bindings).unwrap_or(i64::MAX));
    let elements = extents.fold(1i64, i64::saturating_mul);
    port.ty.dtype.byte_len(u64::try_from(elements).unwrap_or(u64::MAX)).unwrap_or(u64::MAX)
}

/// Brings every output to all ranks, except those that stay sharded. The outer error is a failed collective, the inner
/// one happened on this rank only.
#[allow(clippy::too_many_arguments, reason = "the pieces of a worker, borrowed apart")]
fn gather_outputs(
    entry: &Entry,
    finished: Finished,
    program: &RankProgram,
    bindings: &Bindings,
    stateful: bool,
    communicator: &dyn Communicator,
    sequence: &mut u64,
) -> Result<Result<Results, SessionError>, SessionError> {
    let place = Place { mesh: &program.mesh, rank: program.rank, bindings };
    let mut results = Results::default();
    let mut failure = None;
    let local = |what: String| SessionError::Refused { rank: program.rank, message: what };
    for (output, held) in entry.graph.outputs.iter().zip(finished.outputs) {
        let port = entry.outputs.iter().find(|p| p.name == output.name);
        if stateful && program.states.iter().any(|s| s.output == output.name) {
            continue;
        }
        let Held::Here(value) = held else { continue };
        let (Some(port), Some(family)) = (port, entry.families.get(output.value.index())) else { continue };
        let keep = port.keep_sharded && !family.layout.is_replicated();
        let whole = if keep { Ok(value) } else { gather(value, family, &place, communicator, sequence) };
        let tensor = match whole {
            Ok(value) if keep || program.rank == 0 => value.into_tensor(),
            Ok(_) => continue,
            Err(StepError::Collective(error)) => return Err(error.into()),
            Err(StepError::Local(what)) => Err(what),
            Err(StepError::Index { index, extent }) => Err(format!("index {index} of {extent}")),
        };
        match tensor {
            Ok(tensor) => {
                let sharded = keep.then(|| family.layout.clone());
                results.outputs.insert(output.name.to_string(), Output { tensor, sharded });
            }
            Err(what) => failure = Some(local(format!("output `{}`: {what}", output.name))),
        }
    }
    for (value, tapped) in finished.taps {
        let Some(family) = entry.families.get(value.index()) else { continue };
        match tapped.into_tensor() {
            Ok(tensor) => results.taps.push(Tap {
                step: StepId(value.0),
                ty: family.ty.clone(),
                layout: family.layout.clone(),
                tensor,
            }),
            Err(what) => failure = Some(local(format!("tap {value}: {what}"))),
        }
    }
    Ok(failure.map_or(Ok(results), Err))
}

/// A family's logical value, the innermost mesh axis first.
fn gather(
    value: Value,
    family: &Family,
    place: &Place<'_>,
    communicator: &dyn Communicator,
    sequence: &mut u64,
) -> Result<Value, StepError> {
    let mut from = family.clone();
    let mut value = value;
    for axis in (0..family.layout.0.len()).rev() {
        let axes = vec![axis];
        let conversion = match &family.layout.0[axis] {
            AxisLayout::Replicated => continue,
            AxisLayout::Shard { dim, unit } => Conversion::AllGather { axes, dim: *dim, unit: unit.clone() },
            AxisLayout::Partial(monoid) => Conversion::AllReduce { axes, monoid: *monoid },
        };
        let mut to = from.clone();
        to.layout.0[axis] = AxisLayout::Replicated;
        *sequence += 1;
        let tag = Tag { sequence: *sequence, node: u32::MAX };
        value = convert(&conversion, value, [&from, &to], place, communicator, tag)?;
        from = to;
    }
    Ok(value)
}
