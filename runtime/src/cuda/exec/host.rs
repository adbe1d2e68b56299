//! What a run does on the host: copies of values, steps that no kernel does, and values that nobody needed until they
//! were to be looked at.

use super::{Run, Spot};
use crate::comm::Communicator;
use crate::cpu::convert::{Place, StepError, convert_alone};
use crate::cpu::kernels::{Made, run_kernel};
use crate::cpu::step;
use crate::cpu::value::Value;
use crate::cuda::prepared::Spacing;
use crate::cuda::tensor::download;
use std::collections::{BTreeMap, BTreeSet};
use tpshard_ir::{Op, ValueId};

/// What failed in a step, in words.
fn described(error: StepError) -> String {
    match error {
        StepError::Local(what) => what,
        StepError::Index { index, extent } => format!("index {index} is outside of a table of {extent}"),
        StepError::Collective(error) => error.to_string(),
    }
}

impl<'a> Run<'a> {
    /// A copy of a value on the host. What has no memory is computed from what has, each value once.
    pub(super) fn fetch(&self, value: ValueId) -> Result<Value, String> {
        if let Some(held) = self.held(value) {
            return held;
        }
        let mut missing = BTreeSet::new();
        let mut open = vec![value];
        while let Some(next) = open.pop() {
            if !self.is_held(next) && missing.insert(next) {
                open.extend(&self.graph().node(next).args);
            }
        }
        let mut made: BTreeMap<ValueId, Value> = BTreeMap::new();
        // Operands come before what is made of them.
        for &next in &missing {
            if self.prepared.origin_of(next).is_some() {
                return Err(format!("{next} is not there"));
            }
            let operand = |arg: &ValueId| match made.get(arg) {
                Some(value) => Ok(value.clone()),
                None => self.held(*arg).unwrap_or_else(|| Err(format!("{arg} is not there"))),
            };
            let args = self.graph().node(next).args.iter().map(operand).collect::<Result<Vec<_>, _>>()?;
            made.insert(next, self.computed(next, &args).map_err(described)?);
        }
        made.remove(&value).ok_or_else(|| format!("{value} is not there"))
    }

    fn is_held(&self, value: ValueId) -> bool {
        self.on_host_already(value).is_some() || self.spot(value).is_ok()
    }

    fn on_host_already(&self, value: ValueId) -> Option<&'a Value> {
        self.host.value(self.ids.get(value.index()).copied().flatten()?)
    }

    /// A copy of a value that is in memory, if it is.
    fn held(&self, value: ValueId) -> Option<Result<Value, String>> {
        if let Some(constant) = self.on_host_already(value) {
            return Some(Ok(constant.clone()));
        }
        let spot = self.spot(value).ok()?;
        Some(self.downloaded(value, &spot))
    }

    fn downloaded(&self, value: ValueId, spot: &Spot) -> Result<Value, String> {
        let ty = self.graph().ty(value);
        let shape = self.spaced_shape(value)?;
        let held = Value::new(download(&spot.memory, spot.offset, ty.dtype, &shape)?);
        match self.prepared.spacing.get(&value) {
            Some(Spacing { axis, .. }) => {
                let length = ty.shape.get(*axis).map_or(Ok(0), |dim| self.context().size(dim))?;
                held.sliced(*axis, 0, length, 1)
            }
            None => Ok(held),
        }
    }

    /// A node alone, by the CPU's kernels.
    fn computed(&self, value: ValueId, args: &[Value]) -> Result<Value, StepError> {
        let node = self.graph().node(value);
        match (&node.op, node.args.first(), args.first()) {
            (Op::Input { .. } | Op::Weight(_) | Op::Deferred { .. }, _, _) => {
                Err(format!("{value} is not there").into())
            }
            (op, _, _) if op.is_leaf() => Ok(step::leaf(&self.context(), op)?),
            (Op::Convert(conversion), Some(&from), Some(arg)) => {
                let families = [self.family(from)?, self.family(value)?];
                let place = Place { mesh: self.mesh, rank: self.rank, bindings: &self.bindings };
                let converted = convert_alone(conversion, arg, families, &place)?;
                converted.ok_or_else(|| format!("{value} is not there").into())
            }
            _ => {
                let region = self.prepared.alone(value).ok_or_else(|| format!("{value} has no kernel"))?;
                let shape = self.context().shape(self.graph().ty(value))?;
                run_kernel(&self.context(), region, &shape, args, Vec::new(), Made::default())
            }
        }
    }

    pub(super) fn on_host(
        &mut self,
        value: ValueId,
        communicator: &dyn Communicator,
    ) -> Result<Value, StepError> {
        let node = self.graph().node(value);
        let args = node.args.iter().map(|&arg| self.fetch(arg)).collect::<Result<Vec<_>, _>>();
        if !matches!(node.op, Op::Deferred { .. }) {
            return self.computed(value, &args?);
        }
        if let Some(links) = self.links
            && (self.failure.is_some() || args.is_err())
        {
            // It may decide other sizes here than on other ranks, and collectives between devices do not compare them.
            let name = step::name(self.graph(), value);
            let what = match args {
                Ok(_) => format!("{name} has no operands that it could decide sizes from"),
                Err(what) => format!("{name}: {what}"),
            };
            return Err(links.give_up(communicator, what).into());
        }
        let made = self.deferred.run(self.entry, &self.entry.lowering, value, args, &mut self.bindings);
        // It may have decided sizes, also by failing.
        self.sizes = self.prepared.calls.sizes(&self.bindings);
        made
    }
}
