//! An entry made ready for a GPU: whose memory every value lies in, how much of it there is, and how long it is needed.
//!
//! A value in another shape lies where the first one does, and so does a state with something appended: its memory has
//! room behind what it holds. Everything else has memory of its own.

use super::beside::{self, Change, Cut};
use super::calls::Calls;
use std::collections::{BTreeMap, BTreeSet};
use tpshard_ir::dim::Dim;
use tpshard_ir::program::device::{DeviceLowering, DeviceStep, How, capacity_symbol};
use tpshard_ir::program::{Entry, Region, Stage, StateSpec, lower_keeping};
use tpshard_ir::{DType, Graph, Op, ValueId};

/// Where the memory of a value comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// Made when the session opened.
    Constant,
    /// The step of this index, in every run.
    Step(usize),
}

/// The room of a value that grows in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Spacing {
    /// The state pair of the program.
    pub(super) pair: usize,
    pub(super) axis: usize,
}

/// Memory that a step begins.
pub(super) struct Room {
    pub(super) dtype: DType,
    pub(super) elements: Dim,
    /// The last step that needs it; the number of steps if it leaves the program.
    pub(super) last: usize,
}

pub(crate) struct Prepared {
    /// The steps of every run, in order.
    pub(super) steps: Vec<DeviceStep>,
    /// The calls of each of them.
    pub(super) calls: Calls,
    /// Products that may be made in pieces, by the step of the sum that follows.
    pub(super) cuts: BTreeMap<usize, Cut>,
    /// The changes of layout.
    pub(super) changes: Vec<Change>,
    /// Of every value that has memory.
    pub(super) origin: Vec<Option<Origin>>,
    /// Of every value that grows in place.
    pub(super) spacing: BTreeMap<ValueId, Spacing>,
    /// Of every step that begins memory.
    pub(super) rooms: Vec<Option<Room>>,
    /// Each node alone, as the CPU executes it.
    regions: BTreeMap<ValueId, Region>,
    /// Constants that kernels read.
    pub(super) on_device: BTreeSet<ValueId>,
    /// Constants that are read on the host.
    pub(super) on_host: BTreeSet<ValueId>,
}

impl Prepared {
    /// # Errors
    /// Tables that cannot be followed.
    pub(super) fn new(
        entry: &Entry,
        lowering: &DeviceLowering,
        states: &[StateSpec],
    ) -> Result<Prepared, String> {
        let graph = &entry.graph;
        let constants: BTreeSet<ValueId> =
            lowering.steps.iter().filter(|s| s.stage == Stage::Load).map(|s| s.value).collect();
        let steps = in_order(graph, lowering);
        let mut prepared = Prepared {
            origin: vec![None; graph.len()],
            spacing: BTreeMap::new(),
            rooms: Vec::with_capacity(steps.len()),
            regions: BTreeMap::new(),
            on_device: BTreeSet::new(),
            on_host: BTreeSet::new(),
            calls: Calls::new(&steps),
            cuts: beside::cuts(&steps, lowering, graph),
            changes: Vec::new(),
            steps,
        };
        for value in &constants {
            prepared.set_origin(*value, Origin::Constant)?;
        }
        prepared.find_origins(entry, states)?;
        prepared.find_rooms(entry)?;
        prepared.changes = beside::changes(&prepared, graph);
        prepared.find_constants(entry, &constants);
        let all = graph.values().map(|(value, _)| value).collect();
        let alone = lower_keeping(graph, &all).regions;
        prepared.regions = alone.into_iter().map(|region| (region.result(), region)).collect();
        Ok(prepared)
    }

    /// The value's own node as a region.
    pub(super) fn alone(&self, value: ValueId) -> Option<&Region> {
        self.regions.get(&value)
    }

    pub(super) fn origin_of(&self, value: ValueId) -> Option<Origin> {
        self.origin.get(value.index()).copied().flatten()
    }

    /// The shape in which the value lies in memory.
    pub(super) fn spaced_shape(&self, entry: &Entry, value: ValueId) -> Vec<Dim> {
        let mut shape = entry.graph.ty(value).shape.clone();
        if let Some(Spacing { pair, axis }) = self.spacing.get(&value)
            && let Some(dim) = shape.get_mut(*axis)
        {
            *dim = Dim::symbol(&capacity_symbol(*pair));
        }
        shape
    }

    fn set_origin(&mut self, value: ValueId, origin: Origin) -> Result<(), String> {
        let place = self.origin.get_mut(value.index()).ok_or_else(|| format!("{value} does not exist"))?;
        *place = Some(origin);
        Ok(())
    }

    fn find_origins(&mut self, entry: &Entry, states: &[StateSpec]) -> Result<(), String> {
        let mut grown: BTreeSet<usize> = BTreeSet::new();
        for index in 0..self.steps.len() {
            let value = self.steps[index].value;
            let known = |of: ValueId| self.origin_of(of).ok_or_else(|| format!("{of} is not there yet"));
            let origin = match self.steps[index].how {
                How::Alias(of) => {
                    if self.spacing.contains_key(&of) {
                        return Err(format!("{value} shows {of} in another shape, which grows in place"));
                    }
                    known(of)?
                }
                How::Append { state, .. } => {
                    let spacing = self.spacing.get(&state).copied();
                    let spacing =
                        spacing.ok_or_else(|| format!("{value} appends to {state}, which has no room"))?;
                    let origin = known(state)?;
                    match origin {
                        Origin::Step(from) if grown.insert(from) => {}
                        _ => return Err(format!("{value} appends to {state} a second time")),
                    }
                    self.spacing.insert(value, spacing);
                    origin
                }
                _ => Origin::Step(index),
            };
            if let (How::Leaf, Op::Input { name }) = (&self.steps[index].how, &entry.graph.node(value).op)
                && let Some(pair) = states.iter().position(|state| state.input == *name)
            {
                self.spacing.insert(value, Spacing { pair, axis: states[pair].axis });
            }
            self.set_origin(value, origin)?;
        }
        Ok(())
    }

    fn find_rooms(&mut self, entry: &Entry) -> Result<(), String> {
        let graph = &entry.graph;
        let mut last: Vec<usize> = (0..self.steps.len()).collect();
        let mut used = |origin: Option<Origin>, at: usize| {
            if let Some(Origin::Step(step)) = origin
                && let Some(last) = last.get_mut(step)
            {
                *last = at.max(*last);
            }
        };
        for (index, step) in self.steps.iter().enumerate() {
            for read in step.reads(graph) {
                used(self.origin_of(read), index);
            }
            used(self.origin_of(step.value), index);
        }
        for output in &graph.outputs {
            used(self.origin_of(output.value), self.steps.len());
        }
        let rooms = last.into_iter().enumerate().map(|(index, last)| {
            let value = self.steps[index].value;
            let own = self.origin_of(value) == Some(Origin::Step(index));
            own.then(|| Room {
                dtype: graph.ty(value).dtype,
                elements: Dim::product(&self.spaced_shape(entry, value)),
                last,
            })
        });
        self.rooms = rooms.collect();
        Ok(())
    }

    fn find_constants(&mut self, entry: &Entry, constants: &BTreeSet<ValueId>) {
        for step in &self.steps {
            let here = matches!(step.how, How::Host | How::Convert);
            let read = step.reads(&entry.graph).into_iter().filter(|value| constants.contains(value));
            if here { self.on_host.extend(read) } else { self.on_device.extend(read) }
        }
        let outputs = entry.graph.outputs.iter().map(|output| output.value);
        self.on_host.extend(outputs.filter(|value| constants.contains(value)));
    }
}

/// The steps of every run. What is copied to the device comes first, so that the calls behind it follow one another; but
/// not where data decides sizes, which may be those of what is copied.
fn in_order(graph: &Graph, lowering: &DeviceLowering) -> Vec<DeviceStep> {
    let steps = lowering.steps.iter().filter(|step| step.stage == Stage::Step).cloned();
    let by_data = !graph.data_symbols().is_empty();
    let (mut first, rest): (Vec<_>, Vec<_>) = steps.partition(|step| !by_data && step.how == How::Leaf);
    first.extend(rest);
    first
}

#[cfg(test)]
mod tests {
    use super::*;
    use tpshard_ir::layout::{Layout, Mesh};
    use tpshard_ir::program::RankProgram;
    use tpshard_ir::{Output, Spmd, SpmdOutput, StatePair, Step, StepId, StepKind, Type};

    /// `present = append(past, x)`, `again = append(past, x)`, `flat = reshape(present)`.
    fn program() -> RankProgram {
        let mut g = Graph::new("state");
        let ty = |grows: &str| Type::new(DType::F32, vec![Dim::symbol(grows), 2i64.into()]);
        let past = g.input("past", ty("p"));
        let x = g.input("x", ty("s"));
        let present = g.add(Op::Append { axis: 0 }, &[past, x]).unwrap();
        let again = g.add(Op::Append { axis: 0 }, &[past, x]).unwrap();
        let shape = vec![Dim::product(&g.ty(present).shape.clone())];
        let flat = g.add(Op::Reshape { shape }, &[present]).unwrap();
        for (name, value) in [("present", present), ("again", again), ("flat", flat)] {
            g.outputs.push(Output { name: name.into(), value });
        }
        g.states.push(StatePair { input: "past".into(), output: "present".into(), axis: 0 });
        let mesh = Mesh::flat(1);
        let step = |value: u32, args: &[u32]| Step {
            value: ValueId(value),
            layout: Layout::replicated(&mesh),
            kind: StepKind::Compute,
            args: args.iter().map(|&a| StepId(a)).collect(),
        };
        let steps = vec![step(0, &[]), step(1, &[]), step(2, &[0, 1]), step(3, &[0, 1]), step(4, &[2])];
        let output = |(name, step): (&str, u32)| SpmdOutput { name: name.into(), step: StepId(step) };
        let outputs = [("present", 2), ("again", 3), ("flat", 4)].map(output).to_vec();
        let spmd = Spmd { mesh, imported: g.len(), logical: g, equations: vec![], steps, outputs };
        RankProgram::from_spmd(&spmd, 0).unwrap()
    }

    fn prepared(hows: [How; 5]) -> Result<Prepared, String> {
        let program = program();
        let step = |(value, how)| DeviceStep {
            value: ValueId(value),
            stage: Stage::Step,
            scratch: Dim::constant(0),
            how,
        };
        let steps = (0..).zip(hows).map(step).collect();
        let lowering = DeviceLowering { steps, ..DeviceLowering::default() };
        Prepared::new(&program.entries[0], &lowering, &program.states)
    }

    fn append() -> How {
        How::Append { state: ValueId(0), launches: vec![] }
    }

    #[test]
    fn a_state_and_what_is_appended_to_it_are_one_memory() {
        let prepared = prepared([How::Leaf, How::Leaf, append(), How::Host, How::Host]).unwrap();
        assert_eq!(prepared.origin_of(ValueId(2)), Some(Origin::Step(0)));
        assert_eq!(prepared.origin_of(ValueId(3)), Some(Origin::Step(3)));
        assert_eq!(prepared.spacing.get(&ValueId(2)), Some(&Spacing { pair: 0, axis: 0 }));
        assert_eq!(prepared.spacing.get(&ValueId(3)), None);
        let rooms: Vec<Option<usize>> = prepared.rooms.iter().map(|r| r.as_ref().map(|r| r.last)).collect();
        // The state leaves the program as its present; the input is last read by the second append.
        assert_eq!(rooms, [Some(5), Some(3), None, Some(5), Some(5)]);
        let state = prepared.rooms[0].as_ref().unwrap();
        let bindings = [(capacity_symbol(0).into(), 10), ("p".into(), 3), ("s".into(), 1)].into();
        assert_eq!(state.elements.eval(&bindings), Ok(20));
    }

    #[test]
    fn tables_that_would_spoil_a_state_are_refused() {
        let error = |hows| prepared(hows).err().unwrap_or_default();
        let twice = error([How::Leaf, How::Leaf, append(), append(), How::Host]);
        assert!(twice.contains("%3 appends to %0 a second time"), "{twice}");
        let shown = error([How::Leaf, How::Leaf, append(), How::Host, How::Alias(ValueId(2))]);
        assert!(shown.contains("%4 shows %2 in another shape"), "{shown}");
        let input = How::Append { state: ValueId(1), launches: vec![] };
        let roomless = error([How::Leaf, How::Leaf, input, How::Host, How::Host]);
        assert!(roomless.contains("%1, which has no room"), "{roomless}");
    }
}
