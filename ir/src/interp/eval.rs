//! One operation on concrete arrays.
//!
//! Before anything is computed the operation is made concrete and type inference runs on the operands' actual shapes, so
//! that the functions it dispatches to can rely on them.

use super::{Array, Domain, OpError, Real, movement, reduce};
use crate::decompose::decompose;
use crate::deferred::no_evaluator;
use crate::dim::{Bindings, Dim};
use crate::dtype::DType;
use crate::graph::{Graph, Type, ValueId};
use crate::infer::infer;
use crate::op::{Op, Scalar};
use crate::tensor::{Tensor, element_count};
use crate::weight::WeightExpr;

/// Gives the values of weights.
pub type WeightSource<'a, E> = dyn Fn(&WeightExpr) -> Result<Array<E>, OpError> + 'a;

/// What an operation may look up.
pub struct Context<'a, E> {
    /// Values of dim symbols.
    pub bindings: &'a Bindings,
    /// Values of weights.
    pub weights: &'a WeightSource<'a, E>,
    /// Most elements that the result may have.
    pub element_limit: usize,
}

impl<E: Clone> Array<E> {
    /// The type with constant dims.
    pub fn ty(&self) -> Type {
        Type::new(self.dtype, self.shape().iter().map(|&d| Dim::from(d)).collect())
    }
}

/// The extents of a type.
pub(super) fn concrete_shape(ty: &Type, bindings: &Bindings) -> Result<Vec<usize>, OpError> {
    ty.shape
        .iter()
        .map(|dim| {
            let value = dim.eval(bindings)?;
            usize::try_from(value).map_err(|_| OpError::other(format!("dim `{dim}` is {value}")))
        })
        .collect()
}

/// Refuses shapes of more than `limit` elements.
pub(super) fn check_limit(shape: &[usize], limit: usize) -> Result<usize, OpError> {
    let needed = element_count(shape).ok_or(OpError::TooLarge)?;
    if needed > limit { Err(OpError::Limit { needed: needed as u64, limit }) } else { Ok(needed) }
}

/// The operation with every dim a constant.
fn concrete_op(op: &Op, bindings: &Bindings) -> Op {
    let mut op = op.clone();
    op.for_each_dim_mut(&|dim| {
        *dim = dim.substitute(&|name| bindings.get(name).map(|&value| Dim::constant(value)));
    });
    op
}

/// `op`, whose declared result type is `ty`, applied to `args`.
///
/// # Errors
/// The operands do not fit, an index is out of range, a dim has no value, the result is too large, or the operation is
/// not computed from operands (inputs, conversions).
pub fn eval_op<D: Domain>(
    domain: &D,
    op: &Op,
    ty: &Type,
    args: &[&Array<D::Element>],
    context: &Context<'_, D::Element>,
) -> Result<Array<D::Element>, OpError> {
    let shape = concrete_shape(ty, context.bindings)?;
    if check_limit(&shape, context.element_limit)? == 0 {
        // Nothing to compute; local forms on empty shards need not make sense otherwise.
        return Array::new(ty.dtype, shape, vec![]).ok_or(OpError::TooLarge);
    }
    let op = concrete_op(op, context.bindings);
    let types: Vec<Type> = args.iter().map(|a| a.ty()).collect();
    let inferred = infer(&op, &types.iter().collect::<Vec<_>>())?;
    let declared = Type::new(ty.dtype, shape.iter().map(|&d| Dim::from(d)).collect());
    if inferred != declared {
        return Err(OpError::other(format!("computes {inferred}, but {declared} is declared")));
    }
    if op.is_composite() {
        return match domain.composite(&op, args) {
            Some(result) => result,
            None => through_decomposition(domain, &op, args, &types, context),
        };
    }
    primitive(domain, &op, &declared, &shape, args, context)
}

fn constant(dim: &Dim) -> Result<i64, OpError> {
    dim.as_const().ok_or_else(|| OpError::other(format!("dim `{dim}` has no value")))
}

fn constants(dims: &[Dim]) -> Result<Vec<i64>, OpError> {
    dims.iter().map(constant).collect()
}

/// Operands were counted and typed by inference, so indexing `args` is safe for each operation.
fn primitive<D: Domain>(
    domain: &D,
    op: &Op,
    ty: &Type,
    shape: &[usize],
    args: &[&Array<D::Element>],
    context: &Context<'_, D::Element>,
) -> Result<Array<D::Element>, OpError> {
    match op {
        Op::Input { .. } | Op::Convert(_) => Err(OpError::other("is not computed from operands alone")),
        Op::Weight(expr) => weight(expr, shape, context),
        Op::Literal(literal) => Ok(domain.import(&literal.0)),
        Op::Size(dim) => Ok(Array::scalar(DType::I64, domain.integer(constant(dim)?, DType::I64))),
        Op::Iota { start, .. } => {
            let start = constant(start)?;
            Array::from_fn(DType::I64, shape, |index| {
                Ok(domain.integer(start.wrapping_add(index[0] as i64), DType::I64))
            })
        }
        Op::Map(scalar) => map(domain, *scalar, ty.dtype, shape, args),
        Op::Einsum(spec) => reduce::einsum(domain, spec, args[0], args[1], shape),
        Op::Reduce { monoid, .. } => reduce::reduce(domain, *monoid, args[0], shape),
        Op::Scan { monoid, axis, exclusive, reverse } => {
            reduce::scan(domain, *monoid, *axis, *exclusive, *reverse, args[0])
        }
        Op::Conv { window, groups } => reduce::conv(domain, window, *groups, args[0], args[1], shape),
        Op::Pool { kind, window } => {
            check_limit(&window.kernel, context.element_limit)?;
            reduce::pool(domain, *kind, window, args[0], shape)
        }
        Op::TopK { axis, largest, .. } => reduce::top_k(domain, *axis, *largest, args[0], shape),
        Op::Broadcast { .. } => movement::broadcast(args[0], shape),
        Op::Reshape { .. } => Ok(args[0].clone().reshaped(shape)),
        Op::Transpose { perm } => movement::transpose(args[0], perm),
        Op::Slice { axis, start, step, .. } => {
            movement::slice(args[0], *axis, constant(start)?, *step, shape)
        }
        Op::Pad { low, mode, .. } => movement::pad(domain, *mode, &constants(low)?, args[0], shape),
        Op::Concat { axis } | Op::Append { axis } => Array::concat(args, *axis),
        Op::Gather { axis, window } => {
            let window = match window {
                Some(w) => Some((constant(&w.start)?, constant(&w.extent)?)),
                None => None,
            };
            movement::gather(domain, *axis, window, args[0], args[1], shape)
        }
        Op::GatherElements { axis } => movement::gather_elements(domain, *axis, args[0], args[1]),
        Op::GatherNd { batch_dims } => movement::gather_nd(domain, *batch_dims, args[0], args[1], shape),
        Op::ScatterElements { axis, monoid } => {
            movement::scatter_elements(domain, *axis, *monoid, [args[0], args[1], args[2]])
        }
        Op::ScatterNd { monoid } => movement::scatter_nd(domain, *monoid, [args[0], args[1], args[2]]),
        Op::Dequant { axis, block } => dequant(domain, *axis, *block, args),
        Op::Deferred { call, .. } => Err(OpError::Other(no_evaluator(call))),
        Op::Softmax { .. } | Op::Norm { .. } | Op::Attention { .. } | Op::Rotary { .. } => {
            Err(OpError::other("is a composite"))
        }
    }
}

fn weight<E: Clone>(
    expr: &WeightExpr,
    shape: &[usize],
    context: &Context<'_, E>,
) -> Result<Array<E>, OpError> {
    let value = (context.weights)(expr)?;
    if value.dtype != expr.dtype() || value.shape() != shape {
        let (found, expected) =
            (value.ty(), Type::new(expr.dtype(), shape.iter().map(|&d| d.into()).collect()));
        return Err(OpError::other(format!("the weight is {found}, not {expected}")));
    }
    Ok(value)
}

fn map<D: Domain>(
    domain: &D,
    scalar: Scalar,
    dtype: DType,
    shape: &[usize],
    args: &[&Array<D::Element>],
) -> Result<Array<D::Element>, OpError> {
    let from = if scalar == Scalar::Select { dtype } else { args[0].dtype };
    let mut operands = Vec::with_capacity(args.len());
    Array::from_fn(dtype, shape, |index| {
        operands.clear();
        operands.extend(args.iter().map(|a| *a.at_broadcast(index)));
        domain.scalar(scalar, from, dtype, &operands)
    })
}

/// `(q - zero) * scale`, rounded once.
fn dequant<D: Domain>(
    domain: &D,
    axis: usize,
    block: usize,
    args: &[&Array<D::Element>],
) -> Result<Array<D::Element>, OpError> {
    let (q, scale) = (args[0], args[1]);
    let wide = |array: &Array<D::Element>, index: &[usize]| {
        domain.scalar(Scalar::Cast(DType::F64), array.dtype, DType::F64, &[*array.at(index)])
    };
    Array::from_fn(scale.dtype, q.shape(), |index| {
        let mut of_block = index.to_vec();
        of_block[axis] /= block;
        let mut value = wide(q, index)?;
        if let Some(zero) = args.get(2) {
            let operands = [value, wide(zero, &of_block)?];
            value = domain.scalar(Scalar::Sub, DType::F64, DType::F64, &operands)?;
        }
        let nothing = domain.integer(0, DType::F64);
        Ok(domain.round(domain.multiply_add(nothing, value, wide(scale, &of_block)?), scale.dtype))
    })
}

/// Evaluates a composite by evaluating what it decomposes to.
fn through_decomposition<D: Domain>(
    domain: &D,
    op: &Op,
    args: &[&Array<D::Element>],
    types: &[Type],
    context: &Context<'_, D::Element>,
) -> Result<Array<D::Element>, OpError> {
    let mut graph = Graph::new("");
    let inputs: Vec<ValueId> = types.iter().map(|ty| graph.input("operand", ty.clone())).collect();
    let whole = graph.add(op.clone(), &inputs)?;
    let Some(result) = decompose(&mut graph, whole)? else {
        return Err(OpError::other(format!("{} has no decomposition", op.name())));
    };
    let mut values: Vec<Array<D::Element>> = args.iter().map(|&a| a.clone()).collect();
    // Keeps numbering: nothing uses the composite itself.
    values.push(Array::scalar(DType::Bool, domain.integer(0, DType::Bool)));
    for node in graph.nodes().iter().skip(values.len()) {
        let operands: Vec<&Array<D::Element>> = node.args.iter().map(|a| &values[a.index()]).collect();
        values.push(eval_op(domain, &node.op, &node.ty, &operands, context)?);
    }
    Ok(values.swap_remove(result.index()))
}

/// One operation on tensors, in [`Real`].
///
/// # Errors
/// As [`eval_op`].
pub fn eval_tensors(
    op: &Op,
    ty: &Type,
    args: &[&Tensor],
    bindings: &Bindings,
    element_limit: usize,
) -> Result<Tensor, OpError> {
    let arrays: Vec<_> = args.iter().map(|t| Real.import(t)).collect();
    let operands: Vec<_> = arrays.iter().collect();
    let weights = |expr: &WeightExpr| Err(OpError::other(format!("the weight {expr} is not at hand")));
    Real.export(&eval_op(&Real, op, ty, &operands, &Context { bindings, weights: &weights, element_limit })?)
}
