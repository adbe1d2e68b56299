//! Whether device tables hold together: what follows them may then rely on every index and count in them.
//!
//! Not decided here: whether a kernel stays within the memory it is given. Its text comes with the program, as machine
//! code does.

use super::{Argument, DeviceCode, DeviceLowering, DeviceStep, How, Launch, MAX_SHARED, MAX_THREADS};
use super::{Matrix, Parameter, Pieces, Product};
use crate::dtype::DType;
use crate::graph::{Graph, ValueId};
use crate::op::Op;
use crate::program::Entry;
use crate::program::lowering::Stage;
use std::collections::BTreeSet;

/// Device tables do not execute their graph.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
#[error("device step {step}: {what}\n  help: build the program again")]
pub struct DeviceError {
    pub step: usize,
    pub what: String,
}

impl DeviceCode {
    /// What is wrong with the table of kernels, if anything is.
    pub(super) fn check(&self) -> Result<(), String> {
        let mut names = BTreeSet::new();
        for kernel in &self.kernels {
            let mut chars = kernel.name.chars();
            let plain = chars.next().is_some_and(|c| c.is_ascii_alphabetic())
                && chars.all(|c| c.is_ascii_alphanumeric() || c == '_');
            if !plain || !names.insert(&kernel.name) {
                return Err(format!("`{}` is no name for a kernel, or that of two", kernel.name));
            }
            if !(1..=MAX_THREADS).contains(&kernel.threads) {
                return Err(format!("kernel `{}` has blocks of {} threads", kernel.name, kernel.threads));
            }
        }
        let mut architectures = BTreeSet::new();
        match self.cubins.iter().find(|cubin| !architectures.insert(cubin.arch)) {
            Some(twice) => Err(format!("two cubins for sm_{}", twice.arch)),
            None => Ok(()),
        }
    }
}

impl DeviceLowering {
    /// Checks that the steps execute the graph of `entry` with the kernels of `code`.
    ///
    /// # Errors
    /// The first step that does not.
    pub fn check(&self, code: &DeviceCode, entry: &Entry) -> Result<(), DeviceError> {
        let graph = &entry.graph;
        let constant = entry.lowering.constant_values(graph);
        let mut checker = Checker { code, graph, constant, made: vec![None; graph.len()] };
        for (index, step) in self.steps.iter().enumerate() {
            checker.step(step).map_err(|what| DeviceError { step: index, what })?;
        }
        for (value, pieces) in &self.pieces {
            checker.pieces(*value, pieces, &self.steps)?;
        }
        let missing = graph.outputs.iter().find(|o| checker.stage_of(o.value).is_none());
        match missing {
            Some(output) => Err(DeviceError {
                step: self.steps.len(),
                what: format!("nothing makes the output `{}`", output.name),
            }),
            None => Ok(()),
        }
    }
}

struct Checker<'a> {
    code: &'a DeviceCode,
    graph: &'a Graph,
    constant: Vec<bool>,
    /// The stage in which a value is made, once it is.
    made: Vec<Option<Stage>>,
}

impl Checker<'_> {
    fn stage_of(&self, value: ValueId) -> Option<Stage> {
        self.made.get(value.index()).copied().flatten()
    }

    fn step(&mut self, step: &DeviceStep) -> Result<(), String> {
        let value = step.value;
        match self.made.get(value.index()) {
            None => return Err(format!("{value} does not exist")),
            Some(Some(_)) => return Err(format!("{value} is made twice")),
            Some(None) => {}
        }
        let constant = self.constant.get(value.index()).copied().unwrap_or(false);
        if step.stage == Stage::Load && (!constant || step.how != How::Leaf) {
            return Err(format!("{value} is not there when a session opens"));
        }
        // Only of values that exist: the graph is looked at below.
        for argument in step.how.launches().iter().flat_map(|l| &l.arguments) {
            if let Argument::Value { value: read, .. } = argument {
                self.exists(*read)?;
            }
        }
        if let Some(missing) = step.reads(self.graph).into_iter().find(|&v| self.stage_of(v).is_none()) {
            return Err(format!("{value} reads {missing}, which is not there yet"));
        }
        self.way(step, constant)?;
        for launch in step.how.launches() {
            self.launch(value, launch)?;
        }
        if let Some(slot) = self.made.get_mut(value.index()) {
            *slot = Some(step.stage);
        }
        Ok(())
    }

    fn pieces(&self, value: ValueId, pieces: &Pieces, steps: &[DeviceStep]) -> Result<(), DeviceError> {
        let found = steps.iter().position(|step| step.value == value);
        let step = found.unwrap_or(steps.len());
        let fail = |what: String| DeviceError { step, what: format!("{value}: {what}") };
        let whole = steps.get(step).ok_or_else(|| fail("pieces of what is not made".into()))?;
        for argument in pieces.how.launches().iter().flat_map(|l| &l.arguments) {
            if let Argument::Value { value: read, .. } = argument {
                self.exists(*read).map_err(fail)?;
            }
        }
        if let How::Product(product) = &pieces.how {
            self.product(value, product).map_err(fail)?;
        }
        if let Some(fault) = pieces.fault(whole, self.graph) {
            return Err(fail(fault));
        }
        pieces.how.launches().iter().try_for_each(|launch| self.launch(value, launch)).map_err(fail)
    }

    fn exists(&self, value: ValueId) -> Result<(), String> {
        if value.index() < self.graph.len() { Ok(()) } else { Err(format!("{value} does not exist")) }
    }

    /// Whether the value can be made in this way at all.
    fn way(&self, step: &DeviceStep, constant: bool) -> Result<(), String> {
        let (value, node) = (step.value, self.graph.node(step.value));
        match &step.how {
            How::Leaf => match node.op {
                Op::Input { .. } | Op::Weight(_) | Op::Literal(_) | Op::Size(_) => Ok(()),
                _ if constant => Ok(()),
                _ => Err(format!("{value} ({}) is not a leaf", node.op.name())),
            },
            How::Alias(source) => {
                let from = self.graph.ty(*source);
                if from.dtype == node.ty.dtype && from.elements() == node.ty.elements() {
                    return Ok(());
                }
                Err(format!("{value} of {} cannot be the memory of {source}, {from}", node.ty))
            }
            How::Launch(launches) if launches.is_empty() => Err(format!("nothing makes {value}")),
            How::Launch(_) => Ok(()),
            How::Product(product) => self.product(value, product),
            How::Append { state, .. } => match node.op {
                Op::Append { .. } if node.args.first() == Some(state) => Ok(()),
                _ => Err(format!("{value} does not append to {state}")),
            },
            How::Convert => match node.op {
                Op::Convert(_) => Ok(()),
                _ => Err(format!("{value} ({}) is not a change of layout", node.op.name())),
            },
            How::Host if node.op.is_leaf() && !matches!(node.op, Op::Iota { .. }) => {
                Err(format!("{value} is a leaf"))
            }
            How::Host if matches!(node.op, Op::Convert(_)) => Err(format!("{value} is a change of layout")),
            How::Host => Ok(()),
        }
    }

    fn product(&self, value: ValueId, product: &Product) -> Result<(), String> {
        let types = [&product.left, &product.right, &product.result].map(|m: &Matrix| m.value);
        for of in types {
            self.exists(of)?;
        }
        let fits = types.iter().all(|&v| self.graph.ty(v).dtype == product.dtype)
            && product.result.value == value
            && matches!(product.dtype, DType::F32 | DType::F16 | DType::BF16 | DType::F64)
            && !product.fallback.is_empty();
        if fits { Ok(()) } else { Err(format!("{value} is not that product")) }
    }

    fn launch(&self, value: ValueId, launch: &Launch) -> Result<(), String> {
        let Some(kernel) = self.code.kernels.get(launch.kernel) else {
            return Err(format!("kernel {} does not exist", launch.kernel));
        };
        let fail = |what: String| Err(format!("`{}` for {value}: {what}", kernel.name));
        if launch.threads == 0 || launch.threads > kernel.threads || launch.shared > MAX_SHARED {
            return fail(format!("{} threads, {} bytes of shared memory", launch.threads, launch.shared));
        }
        if launch.arguments.len() != kernel.parameters.len() {
            let (found, wanted) = (launch.arguments.len(), kernel.parameters.len());
            return fail(format!("{found} arguments for {wanted} parameters"));
        }
        for (index, (argument, parameter)) in launch.arguments.iter().zip(&kernel.parameters).enumerate() {
            let fits = match (parameter, argument) {
                (Parameter::Read(dtype), Argument::Value { value: read, .. }) => {
                    self.graph.ty(*read).dtype == *dtype
                }
                (Parameter::Write(dtype), Argument::Value { value: written, .. }) => {
                    *written == value && self.graph.ty(value).dtype == *dtype
                }
                (Parameter::Read(_) | Parameter::Write(_), Argument::Scratch { .. })
                | (Parameter::Size, Argument::Size(_))
                | (Parameter::Real, Argument::Real(_))
                | (Parameter::Fault, Argument::Fault) => true,
                _ => false,
            };
            if !fits {
                return fail(format!("argument {index} is not what the parameter takes"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container;
    use crate::dim::Dim;
    use crate::program::codec::tests::sample;
    use crate::program::device::{Cubin, DeviceKernel};
    use crate::program::{ProgramError, RankProgram};
    use std::collections::BTreeMap;

    /// The sample's values: past, x, w, product, sum, present.
    fn with_tables() -> RankProgram {
        let mut program = sample();
        let f32 = DType::F32;
        let kernel = |name: &str, parameters| DeviceKernel { name: name.into(), parameters, threads: 256 };
        program.device = Some(DeviceCode {
            source: "extern \"C\" …\n".into(),
            kernels: vec![
                kernel(
                    "fused",
                    vec![Parameter::Read(f32), Parameter::Read(f32), Parameter::Write(f32), Parameter::Size],
                ),
                kernel(
                    "copy",
                    vec![Parameter::Fault, Parameter::Read(f32), Parameter::Write(f32), Parameter::Real],
                ),
            ],
            cubins: vec![Cubin { arch: 90, nvrtc: (12, 9), bytes: vec![0, 1, 255] }],
        });
        let one = || Dim::constant(1);
        let leaf =
            |value, stage| DeviceStep { value: ValueId(value), stage, scratch: 0i64.into(), how: How::Leaf };
        let at = |value| Argument::Value {
            value: ValueId(value),
            offset: Dim::symbol("@capacity0") * Dim::constant(4),
        };
        let launch = |kernel, arguments| Launch {
            kernel,
            blocks: [Dim::symbol("b s").ceil_div(&256i64.into()), one(), one()],
            threads: 256,
            shared: 128,
            arguments,
        };
        let fused = launch(0, vec![at(1), at(2), at(4), Argument::Size(Dim::symbol("s"))]);
        let copy = launch(
            1,
            vec![Argument::Fault, Argument::Scratch { offset: 4i64.into() }, at(5), Argument::Real(7)],
        );
        let step =
            |value, how| DeviceStep { value: ValueId(value), stage: Stage::Step, scratch: 64i64.into(), how };
        let steps = vec![
            leaf(0, Stage::Step),
            leaf(1, Stage::Step),
            leaf(2, Stage::Load),
            step(4, How::Launch(vec![fused])),
            step(5, How::Append { state: ValueId(0), launches: vec![copy] }),
        ];
        program.entries[0].device = Some(DeviceLowering { steps, pieces: BTreeMap::new() });
        program
    }

    #[test]
    fn tables_round_trip() {
        let program = with_tables();
        let bytes = program.encode(&[]).unwrap();
        assert_eq!(RankProgram::decode(&bytes).unwrap(), program);
    }

    #[test]
    fn products_round_trip() {
        let mut program = with_tables();
        let steps = &mut program.entries[0].device.as_mut().unwrap().steps;
        let How::Launch(fallback) = steps[3].how.clone() else { unreachable!("built so") };
        let dim = |n: i64| Dim::constant(n);
        let matrix = |value| Matrix {
            value: ValueId(value),
            offset: dim(0),
            batch: dim(1),
            row: dim(2),
            column: dim(3),
        };
        let (left, right, result) = (matrix(1), matrix(2), matrix(4));
        let (batch, rows, columns, depth) = (dim(4), dim(5), dim(6), dim(7));
        let dtype = DType::F32;
        let product = Product { batch, rows, columns, depth, left, right, result, dtype, fallback };
        steps[3].how = How::Product(Box::new(product));
        assert_eq!(RankProgram::decode(&program.encode(&[]).unwrap()).unwrap(), program);
    }

    /// The sample, whose value 4 may be made in pieces.
    fn in_pieces() -> RankProgram {
        let mut program = with_tables();
        let lowering = program.entries[0].device.as_mut().unwrap();
        let how = lowering.steps[3].how.clone();
        let (rows, row) = (Dim::symbol("s"), Dim::constant(4));
        let pieces = Pieces { rows, row, counts: vec![(256, 2), (1024, 4)], how };
        lowering.pieces.insert(ValueId(4), pieces);
        program
    }

    #[test]
    fn pieces_round_trip() {
        let program = in_pieces();
        assert_eq!(RankProgram::decode(&program.encode(&[]).unwrap()).unwrap(), program);
    }

    #[test]
    fn pieces_that_cannot_be_made_are_refused() {
        for (from, to, what) in [
            ("pieces 4", "pieces 5", "nothing makes its pieces"),
            ("pieces 4", "pieces 3", "pieces of what is not made"),
            ("256:2,1024:4", "1024:2,256:4", "not in order"),
            ("256:2,1024:4", "256:0", "not in order"),
            ("256:2,1024:4", "256:65", "not in order"),
            ("256:2,1024:4", "256;2", "`256;2` are no numbers of pieces"),
            (":4 launch\ncall 0", ":4 host\ncall 0", "`host` is no way to make pieces"),
            (":4 launch\ncall 0", ":4 launch\ncall 7", "kernel 7 does not exist"),
        ] {
            let said = changed_in(&in_pieces(), "0/cuda", from, to);
            assert!(said.contains(what), "{from} -> {to}: {said}");
        }
        // Lives of operands follow from what the whole reads.
        let mut program = in_pieces();
        let lowering = program.entries[0].device.as_mut().unwrap();
        let Some(Pieces { how: How::Launch(launches), .. }) = lowering.pieces.get_mut(&ValueId(4)) else {
            unreachable!("built so")
        };
        launches[0].arguments[0] = Argument::Value { value: ValueId(0), offset: Dim::constant(0) };
        let error = RankProgram::decode(&program.encode(&[]).unwrap()).unwrap_err().to_string();
        assert!(error.contains("its pieces read %0"), "{error}");
    }

    /// What is said of the sample with one part changed.
    fn changed(name: &str, from: &str, to: &str) -> String {
        changed_in(&with_tables(), name, from, to)
    }

    fn changed_in(program: &RankProgram, name: &str, from: &str, to: &str) -> String {
        let mut parts = program.to_parts();
        let part = parts.iter_mut().find(|(n, _)| n == name).unwrap();
        let text = String::from_utf8(part.1.clone()).unwrap();
        assert!(text.contains(from), "{text}");
        part.1 = text.replacen(from, to, 1).into_bytes();
        let list: Vec<(&str, &[u8])> = parts.iter().map(|(n, b)| (n.as_str(), b.as_slice())).collect();
        RankProgram::decode(&container::encode(&list).unwrap()).unwrap_err().to_string()
    }

    #[test]
    fn tables_that_do_not_hold_together_are_refused() {
        for (name, from, to, what) in [
            (
                "0/cuda",
                "step 4 step \"64\" launch",
                "step 3 step \"64\" launch",
                "%4, which is not there yet",
            ),
            ("cuda/kernels", "write:f32", "write:f64", "argument 2"),
            ("0/cuda", "step 1 step", "step 0 step", "made twice"),
            ("0/cuda", "step 1 step", "step 99 step", "%99 does not exist"),
            ("0/cuda", "step 1 step", "step 1 load", "not there when a session opens"),
            ("0/cuda", "step 4 step \"64\" launch", "step 4 step \"64\" host", "a call without a step"),
            ("0/cuda", "call 0", "call 7", "kernel 7 does not exist"),
            ("0/cuda", "call 0 256", "call 0 257", "257 threads"),
            ("0/cuda", "call 0 256 128", "call 0 256 99999", "99999 bytes"),
            ("0/cuda", "value 2", "value 77", "%77 does not exist"),
            ("0/cuda", "value 2", "value 3", "%3, which is not there yet"),
            ("0/cuda", " size \"s\"", "", "3 arguments for 4 parameters"),
            ("0/cuda", " size \"s\"", " real 3", "argument 3"),
            ("0/cuda", " size \"s\"", " size \"s +\"", "line 5: the dim"),
            ("0/cuda", "append 0", "append 1", "does not append to %1"),
            ("0/cuda", "append 0", "alias 1", "a call without a step"),
            ("0/cuda", "fault", "bolt", "`bolt` is not an argument"),
            ("cuda/kernels", "read:f32", "read:f16", "argument 0"),
            ("cuda/kernels", "read:f32", "read:f99", "unknown kind of parameter"),
            ("cuda/kernels", "\"copy\"", "\"fused\"", "or that of two"),
            ("cuda/kernels", "\"copy\"", "\"a b\"", "no name for a kernel"),
            ("cuda/kernels", "\"copy\" 256", "\"copy\" 0", "blocks of 0 threads"),
            ("cuda/kernels", "cubin 90", "cubin 80", "cuda/sm_80.cubin"),
        ] {
            let said = changed(name, from, to);
            assert!(said.contains(what), "{from} -> {to}: {said}");
        }
    }

    #[test]
    fn outputs_have_to_be_made() {
        let mut program = with_tables();
        program.entries[0].device.as_mut().unwrap().steps.pop();
        let error = RankProgram::decode(&program.encode(&[]).unwrap()).unwrap_err();
        assert!(matches!(&error, ProgramError::Device { entry: 0, .. }), "{error}");
        assert!(error.to_string().contains("`present`"), "{error}");
    }
}
