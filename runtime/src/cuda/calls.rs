//! The calls of an entry, with each distinct size once: a run evaluates as many dims as there are different ones, and not
//! those of every layer anew.

use std::collections::BTreeMap;
use tpshard_ir::ValueId;
use tpshard_ir::dim::{Bindings, Dim};
use tpshard_ir::program::device::{Argument, DeviceStep, Launch};

/// The number of a dim among those of all calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SizeId(usize);

/// A call of a kernel.
pub(super) struct Call {
    pub(super) kernel: usize,
    pub(super) blocks: [SizeId; 3],
    pub(super) threads: u32,
    pub(super) shared: u32,
    pub(super) arguments: Vec<CallArgument>,
}

pub(super) enum CallArgument {
    /// The memory of a value, from an element on.
    Value {
        value: ValueId,
        offset: SizeId,
    },
    /// Scratch memory of the step, from a byte on.
    Scratch {
        offset: SizeId,
    },
    Size(SizeId),
    Real(f32),
    Fault,
}

/// The calls of every step.
pub(super) struct Calls {
    of_step: Vec<Vec<Call>>,
    dims: Vec<Dim>,
}

/// What the dims of all calls are.
pub(super) struct Sizes(Vec<Option<i64>>);

/// Dims by the order in which they were first met.
#[derive(Default)]
struct Known(BTreeMap<Dim, usize>);

impl Known {
    fn id(&mut self, dim: &Dim) -> SizeId {
        if let Some(&id) = self.0.get(dim) {
            return SizeId(id);
        }
        let id = self.0.len();
        self.0.insert(dim.clone(), id);
        SizeId(id)
    }

    fn call(&mut self, launch: &Launch) -> Call {
        let argument = |argument: &Argument| match argument {
            Argument::Value { value, offset } => {
                CallArgument::Value { value: *value, offset: self.id(offset) }
            }
            Argument::Scratch { offset } => CallArgument::Scratch { offset: self.id(offset) },
            Argument::Size(dim) => CallArgument::Size(self.id(dim)),
            Argument::Real(bits) => CallArgument::Real(f32::from_bits(*bits)),
            Argument::Fault => CallArgument::Fault,
        };
        let arguments = launch.arguments.iter().map(argument).collect();
        let blocks = launch.blocks.each_ref().map(|dim| self.id(dim));
        Call { kernel: launch.kernel, blocks, threads: launch.threads, shared: launch.shared, arguments }
    }
}

impl Calls {
    pub(super) fn new(steps: &[DeviceStep]) -> Calls {
        let mut known = Known::default();
        let calls = |step: &DeviceStep| step.how.launches().iter().map(|l| known.call(l)).collect();
        let of_step = steps.iter().map(calls).collect();
        let mut dims: Vec<(usize, Dim)> = known.0.into_iter().map(|(dim, id)| (id, dim)).collect();
        dims.sort_by_key(|(id, _)| *id);
        Calls { of_step, dims: dims.into_iter().map(|(_, dim)| dim).collect() }
    }

    /// The calls of the step of this index.
    pub(super) fn of(&self, step: usize) -> &[Call] {
        self.of_step.get(step).map_or(&[], Vec::as_slice)
    }

    /// All dims; those that data decides may have no value yet.
    pub(super) fn sizes(&self, bindings: &Bindings) -> Sizes {
        Sizes(self.dims.iter().map(|dim| dim.eval(bindings).ok()).collect())
    }

    /// What a dim is.
    ///
    /// # Errors
    /// It has no value.
    pub(super) fn size(&self, sizes: &Sizes, id: SizeId) -> Result<i64, String> {
        let value = sizes.0.get(id.0).copied().flatten();
        value.ok_or_else(|| match self.dims.get(id.0) {
            Some(dim) => format!("the dim `{dim}` has no value"),
            None => "a dim that does not exist".into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tpshard_ir::program::Stage;
    use tpshard_ir::program::device::How;

    #[test]
    fn equal_dims_are_evaluated_once() {
        let size = |text: &str| Argument::Size(Dim::symbol(text));
        let launch = |arguments: Vec<Argument>| Launch {
            kernel: 0,
            blocks: [Dim::symbol("s"), Dim::constant(1), Dim::constant(1)],
            threads: 32,
            shared: 0,
            arguments,
        };
        let step = |value, launches| DeviceStep {
            value: ValueId(value),
            stage: Stage::Step,
            scratch: Dim::constant(0),
            how: How::Launch(launches),
        };
        let steps =
            [step(0, vec![launch(vec![size("s"), size("t")])]), step(1, vec![launch(vec![size("t"); 2])])];
        let calls = Calls::new(&steps);
        assert_eq!(calls.dims.len(), 3);
        let sizes = calls.sizes(&[("s".into(), 5)].into());
        let CallArgument::Size(last) = calls.of(1)[0].arguments[1] else { panic!("another argument") };
        assert_eq!(calls.size(&sizes, calls.of(1)[0].blocks[0]), Ok(5));
        assert!(calls.size(&sizes, last).unwrap_err().contains("`t`"));
        assert!(calls.of(2).is_empty());
    }
}
