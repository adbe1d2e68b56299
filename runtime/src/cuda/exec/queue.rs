//! How calls of kernels come into the device's queue: they wait until something other than a call is to follow, or until
//! they are many, and then go there together, as one graph where that is possible.
//!
//! What is computed is the same in any case: a graph holds the very calls that would be made without it.

use super::{Run, Spot, local};
use crate::comm::{CommError, Communicator};
use crate::cpu::convert::StepError;
use crate::cuda::calls::{Call, CallArgument, Calls, SizeId, Sizes};
use crate::cuda::graphs::{self, Graphs};
use std::sync::Arc;
use tpshard_driver::cuda;
use tpshard_ir::program::device::{DeviceStep, How};
use tpshard_ir::{Op, ValueId};

/// Most blocks along x, y and z.
const MOST_BLOCKS: [i64; 3] = [(1 << 31) - 1, (1 << 16) - 1, (1 << 16) - 1];

/// Calls that go into the queue together at most: while the device is at work on some, the host gets the next ones ready.
const MOST_WAITING: usize = 64;

/// A call that is not in the queue yet.
pub(in crate::cuda) struct Waiting {
    /// The step.
    index: usize,
    value: ValueId,
    call: cuda::Call,
}

impl Run<'_> {
    /// True if the step leaves calls that wait as they are: it puts nothing else into the queue, and the calls find
    /// their memory also later.
    pub(super) fn may_wait(&self, index: usize, step: &DeviceStep) -> bool {
        match &step.how {
            How::Leaf => match &self.graph().node(step.value).op {
                Op::Input { name } => self.states.contains_key(name),
                _ => false,
            },
            How::Alias(_) => true,
            How::Launch(_) | How::Product(_) => self.plan.places.get(index).is_some_and(Option::is_some),
            How::Append { .. } => true,
            How::Convert | How::Host => false,
        }
    }

    /// True if the calls that wait are to wait no longer.
    pub(super) fn is_full(&self) -> bool {
        let in_graphs = self.graphs.as_ref().is_some_and(|graphs| graphs.trouble().is_none());
        !in_graphs || self.waiting.len() >= MOST_WAITING
    }

    /// Puts the calls that wait into the queue. What of them fails is noted.
    ///
    /// # Errors
    /// The run is over.
    pub(super) fn flush(&mut self, communicator: &dyn Communicator) -> Result<(), CommError> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let waiting = std::mem::take(&mut self.waiting);
        if let Some(graphs) = self.graphs.as_deref_mut() {
            let calls: Vec<&cuda::Call> = waiting.iter().map(|waiting| &waiting.call).collect();
            let piece = graphs::Piece { entry: self.number, number: self.pieces };
            self.pieces += 1;
            if Graphs::put(graphs, self.device, piece, &calls) {
                return Ok(());
            }
        }
        let mut broken = None;
        for Waiting { index, value, call } in waiting {
            // Of a step that failed, the rest is left out.
            if broken != Some(index)
                && let Err(error) = call.launch()
            {
                broken = Some(index);
                self.failed(index, value, local(error), communicator)?;
            }
        }
        Ok(())
    }

    /// Lets the calls of a step wait.
    pub(super) fn launch_all(
        &mut self,
        index: usize,
        step: &DeviceStep,
        communicator: &dyn Communicator,
    ) -> Result<(), StepError> {
        let own = match self.plan.scratch.get(index).copied().flatten() {
            Some(_) => None,
            None => {
                let bytes = step.scratch.eval(&self.bindings).map_err(local)?;
                let memory = u64::try_from(bytes).ok().filter(|&bytes| bytes > 0);
                memory.map(|bytes| self.device.allocate(bytes)).transpose().map_err(local)?
            }
        };
        let is_fixed = own.is_none() && self.may_wait(index, step);
        let planned = self.plan.scratch.get(index).copied().flatten();
        let planned = planned.map(|offset| Spot { memory: self.arena.clone(), offset });
        let scratch = planned.or_else(|| own.map(|memory| Spot { memory: Arc::new(memory), offset: 0 }));
        for call in self.prepared.calls.of(index) {
            if let Some(call) = self.call(call, (&self.prepared.calls, &self.sizes), scratch.as_ref())? {
                self.waiting.push(Waiting { index, value: step.value, call });
            }
        }
        // Memory that is not planned may be gone when others have waited with it.
        if is_fixed { Ok(()) } else { Ok(self.flush(communicator)?) }
    }

    /// Lets a call of a step wait.
    pub(super) fn wait_with(&mut self, index: usize, call: cuda::Call) {
        let value = self.prepared.steps.get(index).map_or(ValueId(u32::MAX), |step| step.value);
        self.waiting.push(Waiting { index, value, call });
    }

    /// A call with its arguments, of `calls` under their sizes; nothing if it has no blocks.
    pub(super) fn call(
        &self,
        call: &Call,
        (calls, sizes): (&Calls, &Sizes),
        scratch: Option<&Spot>,
    ) -> Result<Option<cuda::Call>, StepError> {
        let size = |id: SizeId| calls.size(sizes, id);
        let mut blocks = [0u32; 3];
        for ((count, &id), most) in blocks.iter_mut().zip(&call.blocks).zip(MOST_BLOCKS) {
            let wanted = size(id)?;
            if wanted > most {
                return Err(format!("a kernel of {wanted} blocks along one dim, possible are {most}").into());
            }
            // Of sizes that are not there, nothing is computed.
            *count = u32::try_from(wanted.max(0)).unwrap_or(0);
        }
        if blocks.contains(&0) {
            return Ok(None);
        }
        let function = self.functions.get(call.kernel);
        let function = function.ok_or_else(|| format!("kernel {} does not exist", call.kernel))?;
        let arguments = call.arguments.iter().map(|argument| self.argument(argument, &size, scratch));
        let arguments = arguments.collect::<Result<Vec<cuda::Argument<'_>>, String>>()?;
        function.call(blocks, call.threads, call.shared, &arguments).map(Some).map_err(local)
    }

    fn argument<'s>(
        &'s self,
        argument: &CallArgument,
        size: &dyn Fn(SizeId) -> Result<i64, String>,
        scratch: Option<&'s Spot>,
    ) -> Result<cuda::Argument<'s>, String> {
        let beyond = || "a place beyond memory".to_owned();
        let from = |spot: &'s Spot, bytes: i64| {
            let offset = u64::try_from(bytes).ok().and_then(|bytes| spot.offset.checked_add(bytes));
            offset.map(|offset| cuda::Argument::Memory(&spot.memory, offset)).ok_or_else(beyond)
        };
        match argument {
            CallArgument::Value { value, offset } => {
                let spot = self.spots.get(value.index()).and_then(Option::as_ref);
                let spot = spot.ok_or_else(|| format!("{value} is not there"))?;
                let bits = i64::try_from(self.graph().ty(*value).dtype.bits()).map_err(|_| beyond())?;
                from(spot, size(*offset)?.checked_mul(bits).ok_or_else(beyond)? / 8)
            }
            CallArgument::Scratch { offset } => {
                from(scratch.ok_or("scratch memory is not there")?, size(*offset)?)
            }
            CallArgument::Size(id) => Ok(cuda::Argument::Size(size(*id)?)),
            CallArgument::Real(real) => Ok(cuda::Argument::Real(*real)),
            CallArgument::Fault => Ok(cuda::Argument::Memory(self.fault, 0)),
        }
    }
}
