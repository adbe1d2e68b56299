//! Runs one entry on one rank: its regions in order, each value dropped after its last use, its memory handed to the
//! next value of the same slot.
//!
//! A step that fails here only (an index out of range, say) does not stop the rank: other ranks would wait in the next
//! collective. Its result is replaced by zeros, the error is kept, and the caller tells all ranks at the end.

use super::constants::{Constants, einsum_of};
use super::contraction::Contraction;
use super::convert::{Place, StepError, convert, held, identity};
use super::deferred::Deferred;
use super::gemm::Packed;
use super::kernels::{Context, Made, run_kernel, takes_spare};
use super::movement;
use super::pointwise::Program;
use super::step::{self, Failed, Held};
use super::value::Value;
use crate::comm::{CommError, Communicator, Tag};
use crate::session::now;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use tpshard_ir::dim::{Bindings, Dim};
use tpshard_ir::layout::Mesh;
use tpshard_ir::program::{Buffer, Entry, Family, Kernel, Lowering, MemoryPlan, Region, Stage};
use tpshard_ir::{AxisLayout, Data, Graph, Op, ValueId};

/// An entry made ready to run.
pub(crate) struct Prepared {
    regions: Vec<PreparedRegion>,
    /// The regions at which something is to be done, and their results.
    steps: Vec<(usize, ValueId)>,
    /// The lowering it was made from.
    pub(crate) lowering: Lowering,
    /// The last region that reads a value itself, views aside.
    last_read: Vec<usize>,
    constants: Vec<Option<usize>>,
    /// What its regions write.
    pub(crate) buffers: Vec<Buffer>,
    /// By value: the number of its shape. Many have the same.
    shape_of: Vec<usize>,
}

struct PreparedRegion {
    /// The values its kernel takes.
    args: Vec<ValueId>,
    program: Option<Program>,
    contraction: Option<(Contraction, Option<Arc<Packed>>)>,
    /// The table of a gather, if it is there packed only.
    table: Option<Arc<Packed>>,
    /// Values that nothing needs after this region, views before what they show.
    dropped: Vec<ValueId>,
}

/// What a run of one entry is given.
pub(crate) struct Run<'a> {
    pub(crate) entry: &'a Entry,
    pub(crate) prepared: &'a Prepared,
    pub(crate) constants: &'a Constants,
    pub(crate) mesh: &'a Mesh,
    pub(crate) rank: usize,
    /// The sizes of the inputs, and those that data has decided so far.
    pub(crate) bindings: Bindings,
    pub(crate) plan: &'a MemoryPlan,
    /// Whole inputs, by name.
    pub(crate) inputs: &'a BTreeMap<Arc<str>, Value>,
    /// Steps are to be timed.
    pub(crate) timed: bool,
    pub(crate) deferred: Deferred<'a>,
    pub(crate) shapes: Shapes,
}

/// The shapes of a run by their number, as far as somebody asked.
#[derive(Default)]
pub(crate) struct Shapes(RefCell<Vec<Option<Rc<[usize]>>>>);

impl Shapes {
    fn get(&self, number: usize) -> Option<Rc<[usize]>> {
        self.0.borrow().get(number).cloned().flatten()
    }

    fn put(&self, number: usize, shape: Rc<[usize]>) {
        let mut all = self.0.borrow_mut();
        if all.len() <= number {
            all.resize(number + 1, None);
        }
        all[number] = Some(shape);
    }
}

/// Memory that outlives runs: at most one vector per slot of the plan, no longer than the slot. Empty ones are in use, or
/// were never made.
#[derive(Default)]
pub(crate) struct Slots(Vec<Vec<f32>>);

impl Slots {
    /// Memory for so many elements in `slot` of the plan.
    fn take(&mut self, slot: usize, plan: &MemoryPlan, elements: usize) -> Vec<f32> {
        let held = self.0.get_mut(slot).map(std::mem::take).unwrap_or_default();
        if held.capacity() >= elements {
            return held;
        }
        // Not made longer, which would copy what is in it.
        drop(held);
        Vec::with_capacity(elements.max(length_of(plan, slot)))
    }

    /// Keeps the memory of a value that lay in `slot` of the plan.
    fn put(&mut self, slot: usize, plan: &MemoryPlan, value: Value) {
        let Ok(tensor) = value.into_unique() else { return };
        let Data::F32(elements) = tensor.into_data() else { return };
        self.0.resize_with(plan.slots.len(), Vec::new);
        // A value that was changed in place comes back to another slot than it was taken from; that one is empty.
        let fits = |&at: &usize| self.0[at].capacity() == 0 && elements.capacity() <= length_of(plan, at);
        let others = || (0..self.0.len()).filter(fits).min_by_key(|&at| plan.slots.get(at));
        let free =
            Some(slot).filter(|&at| self.0.get(at).is_some_and(|held| held.capacity() == 0)).or_else(others);
        if let Some(place) = free.and_then(|at| self.0.get_mut(at)) {
            *place = elements;
        }
    }
}

/// How many elements of `f32` a slot has.
fn length_of(plan: &MemoryPlan, slot: usize) -> usize {
    plan.slots.get(slot).map_or(0, |bytes| usize::try_from(bytes / 4).unwrap_or(usize::MAX))
}

/// What a run leaves behind on this rank.
pub(crate) struct Finished {
    /// The outputs in graph order, local.
    pub(crate) outputs: Vec<Held>,
    /// The tapped values, local.
    pub(crate) taps: BTreeMap<ValueId, Value>,
    /// The first step that failed on this rank.
    pub(crate) failure: Option<Failed>,
    /// When steps started and ended, if they were to be timed.
    pub(crate) times: Vec<(ValueId, u64, u64)>,
    /// All sizes.
    pub(crate) bindings: Bindings,
}

impl Prepared {
    /// `round_each`: see [`Program`].
    pub(crate) fn new(
        entry: &Entry,
        lowering: Lowering,
        constants: &Constants,
        round_each: bool,
    ) -> Result<Prepared, String> {
        let graph = &entry.graph;
        let last_use = lowering.last_uses(graph);
        let mut last_read = vec![0; graph.len()];
        let known = lowering.constant_values(graph);
        let ids = constants.of(graph, &lowering);
        let mut regions = Vec::with_capacity(lowering.regions.len());
        for (index, region) in lowering.regions.iter().enumerate() {
            let program = match (region.kernel, region.stage) {
                (Kernel::Pointwise, Stage::Step) => Some(Program::compile(graph, region, round_each)?),
                _ => None,
            };
            let args: Vec<ValueId> = match &program {
                Some(program) => program.operands().collect(),
                None => graph.node(region.result()).args.clone(),
            };
            for arg in &args {
                last_read[arg.index()] = index;
            }
            let contraction = match region.stage {
                Stage::Step => einsum_of(graph, region.kernel, region.result(), &known)?,
                Stage::Load => None,
            };
            let contraction = contraction.map(|c| {
                let columns = args.get(c.column_operand()).and_then(|a| ids[a.index()]);
                let packed = columns.and_then(|id| constants.packed(id, &c));
                (c, packed)
            });
            let table = match (&graph.node(region.result()).op, args.first()) {
                (Op::Gather { .. }, Some(table)) => {
                    ids[table.index()].and_then(|id| constants.packed_table(id))
                }
                _ => None,
            };
            regions.push(PreparedRegion { args, program, contraction, table, dropped: Vec::new() });
        }
        for (value, &last) in last_use.iter().enumerate().rev() {
            if let Some(region) = regions.get_mut(last)
                && ids[value].is_none()
            {
                region.dropped.push(ValueId(value as u32));
            }
        }
        let idle = |index: usize, region: &Region| {
            region.stage == Stage::Load
                && regions.get(index).is_some_and(|r: &PreparedRegion| r.dropped.is_empty())
        };
        let all = lowering.regions.iter().enumerate();
        let steps =
            all.filter(|(i, region)| !idle(*i, region)).map(|(i, region)| (i, region.result())).collect();
        let buffers = lowering.buffers(graph);
        let mut shapes: BTreeMap<&[Dim], usize> = BTreeMap::new();
        let shape_of = graph.nodes().iter().map(|node| {
            let next = shapes.len();
            *shapes.entry(&node.ty.shape).or_insert(next)
        });
        let shape_of = shape_of.collect();
        Ok(Prepared { regions, steps, lowering, last_read, constants: ids, buffers, shape_of })
    }
}

impl<'a> Run<'a> {
    fn graph(&self) -> &'a Graph {
        &self.entry.graph
    }

    fn place(&self) -> Place<'_> {
        Place { mesh: self.mesh, rank: self.rank, bindings: &self.bindings }
    }

    /// Runs all steps. `states` gives what this rank holds of state inputs; `taps` are values to hand back.
    pub(crate) fn run(
        mut self,
        states: &mut BTreeMap<Arc<str>, Value>,
        slots: &mut Slots,
        taps: &[ValueId],
        communicator: &dyn Communicator,
        sequence: &mut u64,
    ) -> Result<Finished, CommError> {
        let graph = self.graph();
        let mut values: Vec<Option<Value>> = vec![None; graph.len()];
        let mut finished = Finished {
            outputs: Vec::new(),
            taps: BTreeMap::new(),
            failure: None,
            times: Vec::new(),
            bindings: Bindings::new(),
        };
        let prepared = self.prepared;
        for &tap in taps {
            if let Some(constant) = self.constant(tap) {
                finished.taps.insert(tap, constant.clone());
            }
        }
        for &(index, result) in &prepared.steps {
            let region = &prepared.lowering.regions[index];
            if region.stage == Stage::Step {
                let start = if self.timed { now() } else { 0 };
                let made = match &graph.node(result).op {
                    Op::Deferred { .. } => self.deferred(index, result, &values),
                    _ => self.step(index, region, &mut values, states, slots, communicator, sequence),
                };
                if self.timed {
                    finished.times.push((result, start, now()));
                }
                let checked = |v| step::of_shape(graph, &self.shape(result)?, result, v);
                let value = match made.and_then(checked) {
                    Ok(value) => value,
                    Err(StepError::Collective(error)) => return Err(error),
                    Err(error) => {
                        finished.failure.get_or_insert_with(|| step::describe(graph, result, error));
                        step::zeros(graph, &self.bindings, result)
                    }
                };
                values[result.index()] = Some(value);
            }
            if taps.contains(&result)
                && let Some(value) = &values[result.index()]
            {
                finished.taps.insert(result, value.clone());
            }
            for &done in &prepared.regions[index].dropped {
                if let Some(value) = values[done.index()].take()
                    && let Some(slot) = self.slot(done)
                {
                    slots.put(slot, self.plan, value);
                }
            }
        }
        for output in &graph.outputs {
            let again = graph.outputs.iter().filter(|o| o.value == output.value).count() > 1;
            let place = &mut values[output.value.index()];
            let value = if again { place.clone() } else { place.take() };
            let value = value.or_else(|| self.constant(output.value).cloned());
            let value = value.unwrap_or_else(|| step::zeros(graph, &self.bindings, output.value));
            finished.outputs.push(Held::Here(value));
        }
        finished.bindings = self.bindings;
        Ok(finished)
    }

    /// A value whose shape depends on data. Ranks go on with the same sizes whether it can be made or not.
    fn deferred(
        &mut self,
        index: usize,
        result: ValueId,
        values: &[Option<Value>],
    ) -> Result<Value, StepError> {
        let prepared = self.prepared;
        let args: Result<Vec<Value>, String> = prepared.regions[index]
            .args
            .iter()
            .map(|&arg| self.get(values, arg).cloned().ok_or_else(|| format!("{arg} is not there")))
            .collect();
        // Sizes may be others from now on.
        self.shapes = Shapes::default();
        self.deferred.run(self.entry, &prepared.lowering, result, args, &mut self.bindings)
    }

    /// A value of this run, or what was made of weights.
    fn get<'v>(&'v self, values: &'v [Option<Value>], id: ValueId) -> Option<&'v Value> {
        values.get(id.index())?.as_ref().or_else(|| self.constant(id))
    }

    fn constant(&self, id: ValueId) -> Option<&Value> {
        let number = self.prepared.constants.get(id.index()).copied().flatten()?;
        self.constants.value(number)
    }

    fn slot(&self, value: ValueId) -> Option<usize> {
        self.plan.slot_of.get(value.index()).copied().flatten()
    }

    #[allow(clippy::too_many_arguments, reason = "the pieces of a run, borrowed apart")]
    fn step(
        &self,
        index: usize,
        region: &Region,
        values: &mut [Option<Value>],
        states: &mut BTreeMap<Arc<str>, Value>,
        slots: &mut Slots,
        communicator: &dyn Communicator,
        sequence: &mut u64,
    ) -> Result<Value, StepError> {
        let result = region.result();
        let node = self.graph().node(result);
        let context = Context { bindings: &self.bindings, graph: self.graph() };
        let prepared = &self.prepared.regions[index];
        let get = |values: &[Option<Value>], id: ValueId| -> Result<Value, String> {
            self.get(values, id).cloned().ok_or_else(|| format!("{id} is not there"))
        };
        match (&node.op, region.kernel) {
            (Op::Input { name }, _) => match states.remove(name) {
                Some(state) => Ok(state),
                None => {
                    let whole =
                        self.inputs.get(name).ok_or_else(|| format!("input `{name}` is not there"))?;
                    Ok(local_part(whole, self.family(result)?, &self.place())?)
                }
            },
            (Op::Literal(_) | Op::Size(_) | Op::Iota { .. }, _) => Ok(step::leaf(&context, &node.op)?),
            (Op::Convert(conversion), _) => {
                let Some(&from) = node.args.first() else {
                    return Err("a conversion of nothing".to_string().into());
                };
                let value = match self.owned(index, from, values) {
                    Some(value) => value,
                    None => get(values, from)?,
                };
                let families = [self.family(from)?, self.family(result)?];
                *sequence += 1;
                let tag = Tag { sequence: *sequence, node: result.0 };
                convert(conversion, value, families, &self.place(), communicator, tag)
            }
            (Op::Append { axis }, Kernel::Append) => {
                let &[state, new] = node.args.as_slice() else {
                    return Err("append takes two operands".to_string().into());
                };
                let new = get(values, new)?;
                let state = match self.owned(index, state, values) {
                    Some(value) => value,
                    None => get(values, state)?,
                };
                Ok(append(state, &new, *axis)?)
            }
            _ => {
                let args = prepared
                    .args
                    .iter()
                    .enumerate()
                    .map(|(i, &arg)| match (&prepared.contraction, self.get(values, arg)) {
                        // A packed operand need not be there itself; its shape is all that is asked for.
                        (Some((c, Some(_))), None) if c.column_operand() == i => Ok(self.shape_only(arg)?),
                        (_, None) if i == 0 && prepared.table.is_some() => Ok(self.shape_only(arg)?),
                        _ => get(values, arg),
                    })
                    .collect::<Result<Vec<Value>, String>>()?;
                let made = Made {
                    program: prepared.program.as_ref(),
                    contraction: prepared.contraction.as_ref().map(|(c, packed)| (c, packed.as_deref())),
                    table: prepared.table.as_deref(),
                };
                let shape = self.shape(result)?;
                let spare = match self.slot(result).filter(|_| takes_spare(region, node, &args, &shape)) {
                    Some(slot) => slots.take(slot, self.plan, shape.iter().product()),
                    None => Vec::new(),
                };
                Ok(run_kernel(&context, region, &shape, &args, spare, made)?)
            }
        }
    }

    /// The value itself, taken out, if this region is the last to use it.
    fn owned(&self, index: usize, value: ValueId, values: &mut [Option<Value>]) -> Option<Value> {
        let at = value.index();
        let outlives = self.graph().outputs.iter().any(|o| o.value == value)
            || self.prepared.constants[at].is_some()
            || self.prepared.last_read[at] > index;
        if outlives { None } else { values[at].take() }
    }

    fn family(&self, value: ValueId) -> Result<&Family, String> {
        self.entry.families.get(value.index()).ok_or_else(|| format!("{value} has no layout"))
    }

    /// A value of the right shape and no elements of its own.
    fn shape_only(&self, value: ValueId) -> Result<Value, String> {
        Value::from_vec(&[1], vec![0f32])?.reshaped(&[])?.stretched(&self.shape(value)?)
    }

    /// The shape that a value has in this run.
    fn shape(&self, value: ValueId) -> Result<Rc<[usize]>, String> {
        let number = self.prepared.shape_of.get(value.index()).copied();
        let number = number.ok_or_else(|| format!("{value} is not in the graph"))?;
        if let Some(shape) = self.shapes.get(number) {
            return Ok(shape);
        }
        let context = Context { bindings: &self.bindings, graph: self.graph() };
        let shape: Rc<[usize]> = context.shape(self.graph().ty(value))?.into();
        self.shapes.put(number, shape.clone());
        Ok(shape)
    }
}

/// What `place` holds of a whole input under its layout.
pub(crate) fn local_part(whole: &Value, family: &Family, place: &Place<'_>) -> Result<Value, String> {
    let mut part = whole.clone();
    for (axis, (start, length)) in held(family, place, place.rank)?.into_iter().enumerate() {
        part = part.sliced(axis, start, length, 1)?;
    }
    let coordinates = place.mesh.coordinates(place.rank);
    for (layout, &coordinate) in family.layout.0.iter().zip(&coordinates) {
        if let AxisLayout::Partial(monoid) = layout
            && coordinate != 0
        {
            part = Value::new(identity(*monoid, part.dtype(), part.shape())?);
        }
    }
    Ok(part)
}

/// `concat(state, new)` along `axis`; in place if `state` is the only view of a buffer with room behind it.
fn append(state: Value, new: &Value, axis: usize) -> Result<Value, String> {
    let mut shape = state.shape().to_vec();
    let held = *shape.get(axis).ok_or("an append along a dim that does not exist")?;
    let added = new.shape().get(axis).copied().unwrap_or(0);
    shape[axis] = held + added;
    if !state.is_prefix(axis, held + added) || state.dtype() != new.dtype() {
        return movement::concat(&[state, new.clone()], axis, Vec::new());
    }
    match state.into_unique() {
        Ok(mut buffer) => {
            movement::write_into(&mut buffer, axis, held, new)?;
            Value::new(buffer).sliced(axis, 0, held + added, 1)
        }
        Err(shared) => movement::concat(&[shared, new.clone()], axis, Vec::new()),
    }
}
