//! What every rank does for a request.

use super::agree::agree;
use super::timeline::{StepTime, Timeline};
use super::{InputHeader, Output, Request, Results, SessionError, SessionOptions, Tap};
use crate::comm::{CommStats, Communicator, Group, Tag};
use crate::cpu::WeightSource;
use crate::cpu::constants::Constants;
use crate::cpu::convert::{Place, StepError, convert};
use crate::cpu::deferred::Deferred;
use crate::cpu::exec::{Failed, Finished, Prepared, Run, Slots};
use crate::cpu::value::Value;
use crate::state::{Change, SlotId, StateStore};
use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;
use std::sync::Arc;
use tpshard_ir::deferred::{SharedEvaluator, no_evaluator};
use tpshard_ir::dim::{Bindings, Dim};
use tpshard_ir::layout::Monoid;
use tpshard_ir::program::{Determinism, Entry, Family, MemoryPlan, Port, RankProgram, lower_keeping};
use tpshard_ir::tensor::element_count;
use tpshard_ir::{AxisLayout, Conversion, DType, Op, StepId, Tensor, ValueId};

pub(super) struct Worker {
    program: RankProgram,
    communicator: Box<dyn Communicator>,
    constants: Constants,
    /// One per entry.
    prepared: Vec<Prepared>,
    slots: Slots,
    state: Option<StateStore>,
    memory_limit: u64,
    /// The least memory limit of all ranks, where they have to decide alike.
    common_limit: u64,
    evaluator: SharedEvaluator,
    sequence: u64,
    timeline: Option<Timeline>,
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
        let mut load = || -> Result<_, SessionError> {
            crate::cpu::check_instructions().map_err(|what| SessionError::Usage { what })?;
            check(&program, weights, &*communicator)?;
            check_evaluator(&program, &options.evaluator)?;
            let constants = Constants::load(&program, weights, &|| communicator.progress())
                .map_err(|what| SessionError::Weights { what })?;
            let round_each = round_each(&program);
            let prepared = program
                .entries
                .iter()
                .map(|entry| Prepared::new(entry, entry.lowering.clone(), &constants, round_each))
                .collect::<Result<Vec<_>, String>>()
                .map_err(|what| SessionError::Program { what })?;
            let share = || available_memory().map_or(u64::MAX, |bytes| bytes / local_ranks as u64);
            let memory_limit = options.memory_limit.unwrap_or_else(share);
            let state = match &options.state {
                Some(settings) => Some(StateStore::new(&program, settings, memory_limit)?),
                None => None,
            };
            Ok((constants, prepared, memory_limit, state))
        };
        let loaded = load();
        let (constants, prepared, memory_limit, state) = agree(&*communicator, &mut sequence, loaded)?;
        let common_limit = least_limit(&program, &*communicator, &mut sequence, memory_limit)?;
        let evaluator = options.evaluator.clone();
        let timeline = options.timeline.then(Timeline::default);
        Ok(Worker {
            program,
            communicator,
            constants,
            prepared,
            slots: Slots::default(),
            state,
            memory_limit,
            common_limit,
            evaluator,
            sequence,
            timeline,
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

    pub(super) fn state(&self) -> Option<&StateStore> {
        self.state.as_ref()
    }

    pub(super) fn take_timeline(&mut self) -> Vec<StepTime> {
        self.timeline.as_mut().map(Timeline::take).unwrap_or_default()
    }

    pub(super) fn change_state(&mut self, change: &Change) -> Result<(), SessionError> {
        let own = match &mut self.state {
            Some(state) => state.change(change),
            None => Err(SessionError::State { what: "the session keeps no state".into() }),
        };
        agree(&*self.communicator, &mut self.sequence, own)
    }

    /// Refuses a step that would overflow the state.
    pub(super) fn check_capacity(
        &self,
        entry: usize,
        bindings: &Bindings,
        slots: &[SlotId],
    ) -> Result<(), SessionError> {
        match (&self.state, self.program.entries.get(entry)) {
            (Some(state), Some(entry)) => state.check_capacity(entry, bindings, slots),
            _ => Ok(()),
        }
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

    pub(super) fn run(
        &mut self,
        entry: usize,
        bindings: Bindings,
        headers: &[InputHeader],
        given: &BTreeMap<String, Tensor>,
        taps: &[u32],
        slots: Option<&[SlotId]>,
    ) -> Result<Results, SessionError> {
        let ready = self.ready(entry, &bindings, headers, taps);
        let (plan, tapped) = agree(&*self.communicator, &mut self.sequence, ready)?;
        let inputs = self.receive(headers, given)?;
        let taken = match (slots, &mut self.state) {
            (Some(slots), Some(state)) => state.take(slots).map(Some),
            _ => Ok(None),
        };
        let mut taken = agree(&*self.communicator, &mut self.sequence, taken)?;
        let (Some(program_entry), Some(prepared)) =
            (self.program.entries.get(entry), tapped.as_ref().or(self.prepared.get(entry)))
        else {
            return Err(SessionError::Program { what: format!("there is no entry {entry}") });
        };
        let run = Run {
            entry: program_entry,
            prepared,
            constants: &self.constants,
            mesh: &self.program.mesh,
            rank: self.program.rank,
            bindings: bindings.clone(),
            plan: &plan,
            inputs: &inputs,
            timed: self.timeline.is_some(),
            deferred: Deferred::new(
                &program_entry.graph,
                &bindings,
                self.evaluator.0.as_deref(),
                self.common_limit,
            ),
        };
        let mut states = taken.as_mut().map(|t| t.values()).unwrap_or_default();
        let wanted: Vec<ValueId> = taps.iter().map(|&t| ValueId(t)).collect();
        let before = self.communicator.stats();
        let mut finished =
            run.run(&mut states, &mut self.slots, &wanted, &*self.communicator, &mut self.sequence)?;
        let traffic = self.communicator.stats().since(&before);
        if let Some(timeline) = &mut self.timeline {
            timeline.add(entry, &finished.times);
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
    fn ready(
        &self,
        entry: usize,
        bindings: &Bindings,
        headers: &[InputHeader],
        taps: &[u32],
    ) -> Result<(MemoryPlan, Option<Prepared>), SessionError> {
        let program = |what: String| SessionError::Program { what };
        let (Some(entry), Some(prepared)) = (self.program.entries.get(entry), self.prepared.get(entry))
        else {
            return Err(program(format!("there is no entry {entry}")));
        };
        let tapped = if taps.is_empty() {
            None
        } else {
            let keep: BTreeSet<ValueId> = taps.iter().map(|&t| ValueId(t)).collect();
            let lowering = lower_keeping(&entry.graph, &keep);
            Some(
                Prepared::new(entry, lowering, &self.constants, round_each(&self.program))
                    .map_err(program)?,
            )
        };
        let lowering = &tapped.as_ref().unwrap_or(prepared).lowering;
        // What data decides is counted when it is known.
        let plan = lowering.plan_known(&entry.graph, bindings, &|_| None)?;
        let open: BTreeSet<Arc<str>> =
            entry.graph.data_symbols().into_iter().filter(|s| !bindings.contains_key(s)).collect();
        let known = |p: &&Port| !p.ty.shape.iter().flat_map(Dim::symbols).any(|s| open.contains(&s));
        let bytes = |ports: &[Port]| -> u64 {
            ports.iter().filter(known).map(|p| port_bytes(p, bindings)).fold(0u64, u64::saturating_add)
        };
        let mut needed =
            plan.bytes.saturating_add(bytes(&entry.inputs)).saturating_add(bytes(&entry.outputs));
        for header in headers {
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
        Ok((plan, tapped))
    }

    /// Rank 0's inputs on every rank.
    fn receive(
        &mut self,
        headers: &[InputHeader],
        given: &BTreeMap<String, Tensor>,
    ) -> Result<BTreeMap<Arc<str>, Value>, SessionError> {
        let group = Group::world(self.communicator.world_size());
        let mut inputs = BTreeMap::new();
        for header in headers {
            let mut tensor = match given.get(&header.name) {
                Some(tensor) => tensor.clone(),
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

fn port_bytes(port: &Port, bindings: &Bindings) -> u64 {
    let elements = port.ty.elements().eval(bindings).unwrap_or(i64::MAX);
    port.ty.dtype.byte_len(u64::try_from(elements).unwrap_or(u64::MAX)).unwrap_or(u64::MAX)
}

/// All ranks hold rank 0's program and weights hashes against their own.
fn same_program(
    program: &RankProgram,
    communicator: &dyn Communicator,
    sequence: &mut u64,
) -> Result<(), SessionError> {
    let own = format!(
        "program {} weights {} mesh {} entries {}",
        program.program_hash,
        program.weights_hash,
        program.mesh,
        program.entries.len()
    );
    *sequence += 1;
    let tag = Tag { sequence: *sequence, node: u32::MAX };
    let group = Group::world(communicator.world_size());
    let root = communicator.broadcast_bytes(&group, tag, 0, own.as_bytes())?;
    let verdict = if root == own.as_bytes() {
        Ok(())
    } else {
        let what = format!(
            "rank {} runs {own}, rank 0 runs {}\n  help: start all ranks from one folder",
            communicator.rank(),
            String::from_utf8_lossy(&root)
        );
        Err(SessionError::Usage { what })
    };
    agree(communicator, sequence, verdict)
}

/// Refuses operations that wait for their operands where nothing can evaluate them.
fn check_evaluator(program: &RankProgram, evaluator: &SharedEvaluator) -> Result<(), SessionError> {
    let nodes = program.entries.iter().flat_map(|entry| entry.graph.nodes());
    let call = nodes.filter_map(|node| match &node.op {
        Op::Deferred { call, .. } => Some((call, &node.origin)),
        _ => None,
    });
    match call.into_iter().next() {
        Some((call, origin)) if evaluator.0.is_none() => {
            let what =
                format!("{} ({origin})\n  help: open the session with an evaluator", no_evaluator(call));
            Err(SessionError::Usage { what })
        }
        _ => Ok(()),
    }
}

/// The least memory limit of all ranks; each its own where no size depends on data.
fn least_limit(
    program: &RankProgram,
    communicator: &dyn Communicator,
    sequence: &mut u64,
    own: u64,
) -> Result<u64, SessionError> {
    let decides = program.entries.iter().any(|entry| !entry.graph.data_symbols().is_empty());
    if !decides || communicator.world_size() == 1 {
        return Ok(own);
    }
    let mut least = Tensor::scalar(i64::try_from(own).unwrap_or(i64::MAX));
    *sequence += 1;
    let tag = Tag { sequence: *sequence, node: u32::MAX };
    communicator.all_reduce(
        &Group::world(communicator.world_size()),
        tag,
        crate::comm::Monoid::Min,
        &mut least,
    )?;
    Ok(least.as_slice::<i64>().ok().and_then(|v| v.first()).map_or(own, |&limit| limit.unsigned_abs()))
}

/// Checks a program before anything of it is used.
fn check(
    program: &RankProgram,
    weights: &dyn WeightSource,
    communicator: &dyn Communicator,
) -> Result<(), SessionError> {
    let fail = |what: String| Err(SessionError::Program { what });
    let (rank, world) = (communicator.rank(), communicator.world_size());
    if program.rank != rank || program.mesh.ranks() != world {
        return Err(SessionError::Usage {
            what: format!(
                "this is the program of rank {} of {}, started as rank {rank} of {world}\n  \
                 help: start every rank with its own program",
                program.rank,
                program.mesh.ranks()
            ),
        });
    }
    if let Some(found) = weights.weights_hash().filter(|h| *h != program.weights_hash) {
        let place = weights.place();
        return Err(SessionError::Weights {
            what: format!(
                "{}the weights have hash {found}, the program expects {}\n  help: use the weights written with this program",
                place.map(|place| format!("{place}: ")).unwrap_or_default(),
                program.weights_hash
            ),
        });
    }
    for entry in &program.entries {
        let graph = &entry.graph;
        if let Some((value, _)) = graph.values().find(|(v, n)| n.args.iter().any(|a| a >= v)) {
            return fail(format!("entry `{}`: {value} uses a later value", entry.name));
        }
        if entry.families.len() != graph.len() || graph.outputs.iter().any(|o| o.value.index() >= graph.len())
        {
            return fail(format!("entry `{}`: layouts or outputs do not fit its graph", entry.name));
        }
        for (family, (value, node)) in entry.families.iter().zip(graph.values()) {
            let dims_exist =
                family.layout.0.iter().all(|a| a.sharded_dim().is_none_or(|d| d < family.ty.rank()));
            if family.layout.0.len() != program.mesh.axes()
                || !dims_exist
                || family.ty.rank() != node.ty.rank()
            {
                return fail(format!("entry `{}`: the layout of {value} does not fit", entry.name));
            }
        }
        if program.determinism == Determinism::Tp
            && let Some((step, _)) = entry.families.iter().enumerate().find(|(_, f)| is_rounded_apart(f))
        {
            return fail(format!(
                "entry `{}`: %{step} is summed over ranks, which rounds, but the program is to give the same bits for \
                 every number of ranks",
                entry.name
            ));
        }
        let checked = entry.lowering.check(graph);
        checked.map_err(|error| SessionError::Lowering { entry: entry.name.clone(), error })?;
    }
    Ok(())
}

/// What is fused with what depends on the number of ranks.
fn round_each(program: &RankProgram) -> bool {
    program.determinism == Determinism::Tp
}

/// True if ranks hold parts whose combination rounds.
fn is_rounded_apart(family: &Family) -> bool {
    let rounds = |part: &AxisLayout| matches!(part, AxisLayout::Partial(Monoid::Sum | Monoid::Prod));
    family.ty.dtype.is_float() && family.layout.0.iter().any(rounds)
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
    for (output, value) in entry.graph.outputs.iter().zip(finished.outputs) {
        let port = entry.outputs.iter().find(|p| p.name == output.name);
        if stateful && program.states.iter().any(|s| s.output == output.name) {
            continue;
        }
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

/// Bytes that can be had without swapping, as Linux estimates them.
fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|l| l.starts_with("MemAvailable:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok()?.checked_mul(1024)
}
