//! From a region to its kernel: everything but leaves, appends and conversions.

use super::attention::Attention;
use super::contraction::Contraction;
use super::convert::StepError;
use super::gemm::Packed;
use super::pointwise::Program;
use super::value::Value;
use super::{conv, dequant, movement, reference, rows};
use half::{bf16, f16};
use tpshard_ir::dim::{Bindings, Dim};
use tpshard_ir::op::PadMode;
use tpshard_ir::program::{Kernel, Region};
use tpshard_ir::tensor::element_count;
use tpshard_ir::{DType, Graph, Node, Op, Tensor, Type};

/// What kernels may look up.
pub(crate) struct Context<'a> {
    pub(crate) bindings: &'a Bindings,
    pub(crate) graph: &'a Graph,
}

impl Context<'_> {
    pub(crate) fn dim(&self, dim: &Dim) -> Result<i64, String> {
        dim.eval(self.bindings).map_err(|e| e.to_string())
    }

    pub(crate) fn size(&self, dim: &Dim) -> Result<usize, String> {
        let value = self.dim(dim)?;
        usize::try_from(value).map_err(|_| format!("dim `{dim}` is {value}"))
    }

    pub(crate) fn shape(&self, ty: &Type) -> Result<Vec<usize>, String> {
        let shape = ty.shape.iter().map(|d| self.size(d)).collect::<Result<Vec<_>, _>>()?;
        element_count(&shape).map(|_| shape).ok_or_else(|| "a shape beyond memory".into())
    }
}

/// What was made for a region when the session opened.
#[derive(Clone, Copy, Default)]
pub(crate) struct Made<'a> {
    pub(crate) program: Option<&'a Program>,
    /// With the operand that plays the columns, if it is constant.
    pub(crate) contraction: Option<(&'a Contraction, Option<&'a Packed>)>,
    /// The table of a gather whose rows are the columns of this; the operand then only has its shape.
    pub(crate) table: Option<&'a Packed>,
}

/// True if [`run_kernel`] makes its result in the memory that it is given.
pub(crate) fn takes_spare(region: &Region, node: &Node, args: &[Value], shape: &[usize]) -> bool {
    let takes = match region.kernel {
        Kernel::View => {
            matches!(node.op, Op::Reshape { .. }) && args.first().is_some_and(|x| !x.shows(shape))
        }
        Kernel::Pointwise
        | Kernel::Einsum
        | Kernel::Softmax
        | Kernel::Norm
        | Kernel::Rotary
        | Kernel::Attention
        | Kernel::Conv
        | Kernel::Pool => true,
        Kernel::Move => matches!(node.op, Op::Concat { .. } | Op::Gather { .. }),
        Kernel::Reduce | Kernel::Dequant | Kernel::Reference => false,
        // Not executed here, or in place.
        Kernel::Leaf | Kernel::Convert | Kernel::Append => false,
    };
    takes && node.ty.dtype == DType::F32
}

/// Executes a region; `args` are the operands of its node (of the region, if it is elementwise), `shape` is that of its
/// result, for which it may use the memory of `spare`.
pub(crate) fn run_kernel(
    context: &Context<'_>,
    region: &Region,
    shape: &[usize],
    args: &[Value],
    spare: Vec<f32>,
    made: Made<'_>,
) -> Result<Value, StepError> {
    let node = context.graph.node(region.result());
    if shape.contains(&0) {
        // Nothing to compute; local forms on empty shards need not make sense otherwise.
        return Tensor::zeros(node.ty.dtype, shape.to_vec())
            .map(Value::new)
            .map_err(|e| e.to_string().into());
    }
    let value = match (region.kernel, &node.op) {
        (Kernel::Pointwise, _) => match made.program {
            Some(program) => program.run(args, shape, spare)?,
            None => Program::compile(context.graph, region, true)?.run(args, shape, spare)?,
        },
        (Kernel::View, op) => view(context, op, args, shape, spare)?,
        (Kernel::Einsum, Op::Einsum(spec)) => {
            let [a, b] = args else { return Err("a contraction of other than two operands".into()) };
            match made.contraction {
                Some((contraction, packed)) => contraction.run([a, b], packed, spare)?,
                None => Contraction::new(spec, [false; 2])?.run([a, b], None, spare)?,
            }
        }
        (Kernel::Reduce, Op::Reduce { monoid, axes }) => rows::reduce(first(args)?, *monoid, axes)?,
        (Kernel::Softmax, Op::Softmax { axis }) => rows::softmax(first(args)?, *axis, spare)?,
        (Kernel::Norm, Op::Norm { kind, axis, epsilon }) => rows::norm(*kind, *axis, epsilon.0, args, spare)?,
        (Kernel::Rotary, Op::Rotary { interleaved }) => rows::rotary(*interleaved, args, spare)?,
        (Kernel::Attention, Op::Attention { scale, softcap, kv_of_head, empty_rows_zero }) => Attention {
            scale: scale.0 as f32,
            softcap: softcap.map(|c| c.0 as f32),
            kv_of_head,
            empty_rows_zero: *empty_rows_zero,
        }
        .run(args, spare)?,
        (Kernel::Move | Kernel::Append, op) => movement(context, op, args, spare, made.table)?,
        (Kernel::Conv, Op::Conv { window, groups }) => {
            let [x, w] = args else { return Err("a convolution of other than two operands".into()) };
            conv::conv(window, *groups, [x, w], shape, spare)?
        }
        (Kernel::Pool, Op::Pool { kind, window }) => conv::pool(*kind, window, first(args)?, shape, spare)?,
        (Kernel::Dequant, Op::Dequant { axis, block }) => dequant::dequant(*axis, *block, args)?,
        (Kernel::Reference, _) => reference::evaluate(node, args, context.bindings, shape)?,
        (kernel, op) => {
            return Err(format!("the kernel {} does not execute {}", kernel.name(), op.name()).into());
        }
    };
    Ok(narrow(value, node.ty.dtype)?)
}

fn first(args: &[Value]) -> Result<&Value, String> {
    args.first().ok_or_else(|| "an operand is missing".into())
}

/// A result computed in `f32` as the type it has.
fn narrow(value: Value, dtype: DType) -> Result<Value, String> {
    if value.dtype() == dtype || value.dtype() != DType::F32 {
        return Ok(value);
    }
    let elements = value.slice::<f32>()?;
    match dtype {
        DType::F16 => Value::from_vec(value.shape(), elements.iter().map(|&x| f16::from_f32(x)).collect()),
        DType::BF16 => Value::from_vec(value.shape(), elements.iter().map(|&x| bf16::from_f32(x)).collect()),
        _ => Ok(value.clone()),
    }
}

fn view(
    context: &Context<'_>,
    op: &Op,
    args: &[Value],
    shape: &[usize],
    spare: Vec<f32>,
) -> Result<Value, String> {
    let x = first(args)?;
    match op {
        Op::Reshape { .. } => x.reshaped_in(shape, spare),
        Op::Broadcast { .. } => x.stretched(shape),
        Op::Transpose { perm } if perm.len() == x.shape().len() && perm.iter().all(|&p| p < perm.len()) => {
            Ok(x.permuted(perm))
        }
        Op::Slice { axis, start, length, step } => {
            x.sliced(*axis, context.size(start)?, context.size(length)?, *step)
        }
        other => Err(format!("{} is not a view", other.name())),
    }
}

fn movement(
    context: &Context<'_>,
    op: &Op,
    args: &[Value],
    spare: Vec<f32>,
    packed: Option<&Packed>,
) -> Result<Value, StepError> {
    match (op, args) {
        (Op::Concat { axis } | Op::Append { axis }, parts) => Ok(movement::concat(parts, *axis, spare)?),
        (Op::Gather { axis, window }, [table, indices]) => {
            let window = match window {
                Some(w) => Some((context.dim(&w.start)?, context.dim(&w.extent)?)),
                None => None,
            };
            match packed {
                Some(packed) => movement::gather_packed(packed, indices, window, spare),
                None => movement::gather(table, indices, *axis, window, spare),
            }
        }
        (Op::Pad { low, high, mode: PadMode::Constant(value) }, [x]) => {
            let dims = |dims: &[Dim]| dims.iter().map(|d| context.dim(d)).collect::<Result<Vec<_>, _>>();
            Ok(movement::pad(x, &dims(low)?, &dims(high)?, value.0 as f32)?)
        }
        (other, _) => Err(format!("{} does not only move elements", other.name()).into()),
    }
}
