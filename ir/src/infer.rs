//! Shape and type inference: the result type of every operation from its operand types. This is the authority the
//! importer builds with and the verifier checks against.

use crate::dim::Dim;
use crate::dtype::{DType, DTypeClass};
use crate::graph::Type;
use crate::op::{EinsumSpec, Op, PoolKind, Scalar, Window};

/// An operation does not apply to its operands.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
#[error("{op}: {what}")]
pub struct InferError {
    pub op: String,
    pub what: String,
}

type Inferred = Result<Type, String>;

/// The result type of `op` applied to operands of types `args`.
///
/// # Errors
/// Wrong operand count, element types or shapes, or an operation whose type the operands do not determine (inputs,
/// conversions): those nodes carry a declared type.
pub fn infer(op: &Op, args: &[&Type]) -> Result<Type, InferError> {
    arity(op, args.len())
        .and_then(|()| infer_type(op, args))
        .and_then(|ty| {
            if let Some(dim) = ty.shape.iter().find(|d| d.as_const().is_some_and(|c| c < 0)) {
                return Err(format!("the result would have the negative extent {dim}"));
            }
            Ok(ty)
        })
        .map_err(|what| InferError { op: op.name().into(), what })
}

fn arity(op: &Op, found: usize) -> Result<(), String> {
    let (low, high) = match op {
        Op::Input { .. } | Op::Weight(_) | Op::Literal(_) | Op::Size(_) | Op::Iota { .. } => (0, 0),
        Op::Map(scalar) => (scalar.arity(), scalar.arity()),
        Op::Einsum(spec) => (spec.inputs.len(), spec.inputs.len()),
        Op::Concat { .. } => (1, usize::MAX),
        Op::Deferred { .. } => (0, usize::MAX),
        Op::Conv { .. }
        | Op::Gather { .. }
        | Op::GatherElements { .. }
        | Op::GatherNd { .. }
        | Op::Append { .. } => (2, 2),
        Op::ScatterElements { .. } | Op::ScatterNd { .. } | Op::Rotary { .. } => (3, 3),
        Op::Dequant { .. } | Op::Norm { .. } => (2, 3),
        Op::Attention { .. } => (3, 4),
        Op::Reduce { .. }
        | Op::Scan { .. }
        | Op::Pool { .. }
        | Op::TopK { .. }
        | Op::Broadcast { .. }
        | Op::Reshape { .. }
        | Op::Transpose { .. }
        | Op::Slice { .. }
        | Op::Pad { .. }
        | Op::Softmax { .. }
        | Op::Convert(_) => (1, 1),
    };
    if (low..=high).contains(&found) { Ok(()) } else { Err(format!("takes {low} operands, found {found}")) }
}

fn infer_type(op: &Op, args: &[&Type]) -> Inferred {
    match op {
        Op::Input { .. } | Op::Convert(_) => Err("has a declared type".into()),
        Op::Weight(expr) => Ok(Type::new(expr.dtype(), expr.shape().iter().map(|&d| Dim::from(d)).collect())),
        Op::Literal(literal) => {
            Ok(Type::new(literal.0.dtype(), literal.0.shape().iter().map(|&d| Dim::from(d)).collect()))
        }
        Op::Size(_) => Ok(Type::new(DType::I64, vec![])),
        Op::Iota { length, .. } => Ok(Type::new(DType::I64, vec![length.clone()])),
        Op::Map(scalar) => map(*scalar, args),
        Op::Einsum(spec) => einsum(spec, args),
        Op::Reduce { axes, .. } => {
            let mut ty = args[0].clone();
            for &axis in axes {
                check_axis(&ty, axis)?;
                ty.shape[axis] = Dim::constant(1);
            }
            Ok(ty)
        }
        Op::Scan { axis, .. } | Op::Softmax { axis } => {
            check_axis(args[0], *axis)?;
            Ok(args[0].clone())
        }
        Op::Conv { window, groups } => conv(window, *groups, args[0], args[1]),
        Op::Pool { kind, window } => pool(*kind, window, args[0]),
        Op::TopK { axis, k, .. } => {
            check_axis(args[0], *axis)?;
            let mut shape = args[0].shape.clone();
            shape[*axis] = k.clone();
            Ok(Type::new(DType::I64, shape))
        }
        Op::Broadcast { shape } => {
            broadcast_to(&args[0].shape, shape)?;
            Ok(Type::new(args[0].dtype, shape.clone()))
        }
        Op::Reshape { shape } => {
            let (from, to) = (args[0].elements(), Dim::product(shape));
            if from != to {
                return Err(format!("{} has {from} elements, the new shape {to}", args[0]));
            }
            Ok(Type::new(args[0].dtype, shape.clone()))
        }
        Op::Transpose { perm } => transpose(args[0], perm),
        Op::Slice { axis, length, step, .. } => {
            check_axis(args[0], *axis)?;
            if *step == 0 {
                return Err("step 0".into());
            }
            let mut ty = args[0].clone();
            ty.shape[*axis] = length.clone();
            Ok(ty)
        }
        Op::Pad { low, high, .. } => {
            let ty = args[0];
            if low.len() != ty.rank() || high.len() != ty.rank() {
                return Err(format!("{ty} needs {} pads on either side", ty.rank()));
            }
            let shape = ty.shape.iter().zip(low).zip(high).map(|((d, l), h)| d + l + h).collect();
            Ok(Type::new(ty.dtype, shape))
        }
        Op::Concat { axis } => concat(args, *axis),
        Op::Append { axis } => concat(args, *axis),
        Op::Gather { axis, .. } => {
            check_axis(args[0], *axis)?;
            integer(args[1], "indices")?;
            let mut shape = args[0].shape.clone();
            shape.splice(*axis..=*axis, args[1].shape.iter().cloned());
            Ok(Type::new(args[0].dtype, shape))
        }
        Op::GatherElements { axis } => {
            check_axis(args[0], *axis)?;
            integer(args[1], "indices")?;
            same_rank(args[0], args[1])?;
            Ok(Type::new(args[0].dtype, args[1].shape.clone()))
        }
        Op::GatherNd { batch_dims } => gather_nd(*batch_dims, args[0], args[1]),
        Op::ScatterElements { axis, .. } => {
            check_axis(args[0], *axis)?;
            integer(args[1], "indices")?;
            same_rank(args[0], args[1])?;
            same(&args[1].shape, &args[2].shape, "indices and updates")?;
            same_dtype(args[0], args[2])?;
            Ok(args[0].clone())
        }
        Op::ScatterNd { .. } => {
            integer(args[1], "indices")?;
            same_dtype(args[0], args[2])?;
            let slice = gather_nd(0, args[0], args[1])?;
            same(&slice.shape, &args[2].shape, "updates")?;
            Ok(args[0].clone())
        }
        Op::Dequant { axis, block } => dequant(*axis, *block, args),
        Op::Norm { axis, .. } => norm(*axis, args),
        Op::Attention { kv_of_head, .. } => attention(kv_of_head, args),
        Op::Rotary { .. } => rotary(args),
        Op::Deferred { ty, .. } => Ok(ty.clone()),
    }
}

fn check_axis(ty: &Type, axis: usize) -> Result<(), String> {
    if axis < ty.rank() { Ok(()) } else { Err(format!("axis {axis} of {ty}")) }
}

fn same(a: &[Dim], b: &[Dim], what: &str) -> Result<(), String> {
    if a == b { Ok(()) } else { Err(format!("{what} have shapes {a:?} and {b:?}")) }
}

fn same_rank(a: &Type, b: &Type) -> Result<(), String> {
    if a.rank() == b.rank() { Ok(()) } else { Err(format!("{a} and {b} differ in rank")) }
}

fn same_dtype(a: &Type, b: &Type) -> Result<(), String> {
    if a.dtype == b.dtype { Ok(()) } else { Err(format!("operands are {a} and {b}")) }
}

/// Composites compute with `f32` where `x` has 16 bits, so what goes with it may have that type, too.
fn same_or_single(x: &Type, other: &Type) -> Result<(), String> {
    let widened = matches!(x.dtype, DType::F16 | DType::BF16) && other.dtype == DType::F32;
    if widened { Ok(()) } else { same_dtype(x, other) }
}

fn integer(ty: &Type, what: &str) -> Result<(), String> {
    if ty.dtype.is_integer() { Ok(()) } else { Err(format!("{what} are {ty}, not integers")) }
}

/// NumPy broadcasting of one dim pair: equal, or one of them the constant 1.
fn broadcast_dim(a: &Dim, b: &Dim) -> Option<Dim> {
    if a == b || b.is_one() {
        Some(a.clone())
    } else if a.is_one() {
        Some(b.clone())
    } else {
        None
    }
}

/// The NumPy broadcast of several shapes.
///
/// # Errors
/// Names the first pair of dims that neither agree nor are 1.
pub fn broadcast_shapes(shapes: &[&[Dim]]) -> Result<Vec<Dim>, String> {
    let rank = shapes.iter().map(|s| s.len()).max().unwrap_or(0);
    let mut result = vec![Dim::constant(1); rank];
    for shape in shapes {
        let offset = rank - shape.len();
        for (i, dim) in shape.iter().enumerate() {
            let merged = broadcast_dim(&result[offset + i], dim)
                .ok_or_else(|| format!("dims {} and {dim} do not broadcast", result[offset + i]))?;
            result[offset + i] = merged;
        }
    }
    Ok(result)
}

fn broadcast_to(from: &[Dim], to: &[Dim]) -> Result<(), String> {
    let result = broadcast_shapes(&[from, to])?;
    if result == to { Ok(()) } else { Err(format!("{from:?} does not stretch to {to:?}")) }
}

fn map(scalar: Scalar, args: &[&Type]) -> Inferred {
    let shapes: Vec<&[Dim]> = args.iter().map(|t| t.shape.as_slice()).collect();
    let shape = broadcast_shapes(&shapes)?;
    let first = args[0].dtype;
    let boolean = |ty: &Type| {
        if ty.dtype == DType::Bool { Ok(()) } else { Err(format!("operand {ty} is not bool")) }
    };
    let dtype = match scalar {
        Scalar::Cast(to) => to,
        Scalar::Bits(to) if to.bits() == first.bits() => to,
        Scalar::Bits(to) => return Err(format!("the bits of {first} as {to}")),
        Scalar::Select => {
            boolean(args[0])?;
            same_dtype(args[1], args[2])?;
            args[1].dtype
        }
        Scalar::IsNan | Scalar::IsInf => DType::Bool,
        Scalar::Not => {
            boolean(args[0])?;
            DType::Bool
        }
        Scalar::And | Scalar::Or | Scalar::Xor => {
            boolean(args[0])?;
            boolean(args[1])?;
            DType::Bool
        }
        Scalar::Equal | Scalar::Less | Scalar::LessEqual | Scalar::Greater | Scalar::GreaterEqual => {
            same_dtype(args[0], args[1])?;
            DType::Bool
        }
        Scalar::BitNot
        | Scalar::BitAnd
        | Scalar::BitOr
        | Scalar::BitXor
        | Scalar::ShiftLeft
        | Scalar::ShiftRight => {
            if args.iter().any(|t| !t.dtype.is_integer() || t.dtype != first) {
                let types: Vec<String> = args.iter().map(ToString::to_string).collect();
                return Err(format!("operands {} are not integers of one type", types.join(", ")));
            }
            first
        }
        Scalar::Neg
        | Scalar::Abs
        | Scalar::Sign
        | Scalar::Reciprocal
        | Scalar::Sqrt
        | Scalar::Rsqrt
        | Scalar::Exp
        | Scalar::Log
        | Scalar::Sin
        | Scalar::Cos
        | Scalar::Tan
        | Scalar::Asin
        | Scalar::Acos
        | Scalar::Atan
        | Scalar::Sinh
        | Scalar::Cosh
        | Scalar::Asinh
        | Scalar::Acosh
        | Scalar::Atanh
        | Scalar::Tanh
        | Scalar::Sigmoid
        | Scalar::Erf
        | Scalar::Floor
        | Scalar::Ceil
        | Scalar::Round
        | Scalar::Add
        | Scalar::Sub
        | Scalar::Mul
        | Scalar::Div
        | Scalar::Pow
        | Scalar::Min
        | Scalar::Max
        | Scalar::Mod
        | Scalar::Rem => {
            if let Some(other) = args.iter().find(|t| t.dtype != first) {
                return Err(format!("operands are {first} and {}", other.dtype));
            }
            if first.class() == DTypeClass::Bool {
                return Err("does not apply to bool".into());
            }
            first
        }
    };
    Ok(Type::new(dtype, shape))
}

fn einsum(spec: &EinsumSpec, args: &[&Type]) -> Inferred {
    if spec.inputs.len() != 2 {
        return Err(format!("{spec} has {} operands, not 2", spec.inputs.len()));
    }
    same_dtype(args[0], args[1])?;
    let mut extents: Vec<(u8, Dim)> = Vec::new();
    for (letters, ty) in spec.inputs.iter().zip(args) {
        if letters.len() != ty.rank() {
            return Err(format!("{spec} does not fit an operand {ty}"));
        }
        for (i, (&letter, dim)) in letters.iter().zip(&ty.shape).enumerate() {
            if letters[..i].contains(&letter) {
                return Err(format!("{spec} repeats `{}` in one operand", letter as char));
            }
            match extents.iter().find(|(l, _)| *l == letter) {
                Some((_, known)) if known != dim => {
                    return Err(format!("`{}` of {spec} is {known} and {dim}", letter as char));
                }
                Some(_) => {}
                None => extents.push((letter, dim.clone())),
            }
        }
    }
    let mut shape = Vec::new();
    for (i, letter) in spec.output.iter().enumerate() {
        let Some((_, dim)) = extents.iter().find(|(l, _)| l == letter) else {
            return Err(format!("`{}` of {spec} has no extent", *letter as char));
        };
        if spec.output[..i].contains(letter) {
            return Err(format!("{spec} repeats `{}` in the result", *letter as char));
        }
        shape.push(dim.clone());
    }
    Ok(Type::new(args[0].dtype, shape))
}

fn windows(window: &Window, spatial: &[Dim]) -> Result<Vec<Dim>, String> {
    let n = spatial.len();
    let lengths = [&window.kernel, &window.strides, &window.dilations, &window.pads_low, &window.pads_high];
    if lengths.iter().any(|v| v.len() != n) || window.strides.contains(&0) || window.dilations.contains(&0) {
        return Err(format!("the window does not fit {n} spatial dims"));
    }
    (0..n)
        .map(|i| {
            let Some(reach) =
                window.kernel[i].checked_sub(1).and_then(|k| k.checked_mul(window.dilations[i]))
            else {
                return Err("empty or too large kernel".into());
            };
            let padded = &spatial[i] + Dim::from(window.pads_low[i]) + Dim::from(window.pads_high[i]);
            let room = padded - Dim::from(reach) - Dim::constant(1);
            let stride = Dim::from(window.strides[i]);
            let last = if window.ceil {
                // The last window must start inside the data or the low padding; it may reach beyond the end.
                let starts = &spatial[i] + Dim::from(window.pads_low[i]) - Dim::constant(1);
                room.ceil_div(&stride).minimum(&starts.floor_div(&stride))
            } else {
                room.floor_div(&stride)
            };
            if last.as_const().is_some_and(|last| last < 0) {
                return Err(format!("a window of reach {} does not fit dim {}", reach + 1, spatial[i]));
            }
            Ok(last + Dim::constant(1))
        })
        .collect()
}

fn conv(window: &Window, groups: usize, x: &Type, w: &Type) -> Inferred {
    same_dtype(x, w)?;
    same_rank(x, w)?;
    if x.rank() < 3 || groups == 0 {
        return Err(format!("{x} with {groups} groups"));
    }
    let g = Dim::from(groups);
    if x.shape[1] != &w.shape[1] * &g || w.shape[0].exact_div(&g).is_none() {
        return Err(format!("{groups} groups of {x} and {w}"));
    }
    let kernel: Vec<Dim> = window.kernel.iter().map(|&k| Dim::from(k)).collect();
    if w.shape[2..] != kernel {
        return Err(format!("the kernel {kernel:?} is not that of {w}"));
    }
    let mut shape = vec![x.shape[0].clone(), w.shape[0].clone()];
    shape.extend(windows(window, &x.shape[2..])?);
    Ok(Type::new(x.dtype, shape))
}

fn pool(kind: PoolKind, window: &Window, x: &Type) -> Inferred {
    if x.rank() < 3 || matches!(kind, PoolKind::Lp { p: 0 }) {
        return Err(format!("of {x}"));
    }
    let mut shape = x.shape[..2].to_vec();
    shape.extend(windows(window, &x.shape[2..])?);
    Ok(Type::new(x.dtype, shape))
}

fn transpose(x: &Type, perm: &[usize]) -> Inferred {
    let mut seen = vec![false; x.rank()];
    for &p in perm {
        if p >= x.rank() || std::mem::replace(&mut seen[p], true) {
            return Err(format!("{perm:?} is not a permutation of the dims of {x}"));
        }
    }
    if perm.len() != x.rank() {
        return Err(format!("{perm:?} is not a permutation of the dims of {x}"));
    }
    Ok(Type::new(x.dtype, perm.iter().map(|&p| x.shape[p].clone()).collect()))
}

fn concat(args: &[&Type], axis: usize) -> Inferred {
    let mut ty = args[0].clone();
    check_axis(&ty, axis)?;
    for other in &args[1..] {
        same_dtype(&ty, other)?;
        same_rank(&ty, other)?;
        for i in (0..ty.rank()).filter(|&i| i != axis) {
            if ty.shape[i] != other.shape[i] {
                return Err(format!("{} and {other} differ off axis {axis}", args[0]));
            }
        }
        ty.shape[axis] = &ty.shape[axis] + &other.shape[axis];
    }
    Ok(ty)
}

fn gather_nd(batch_dims: usize, x: &Type, indices: &Type) -> Inferred {
    integer(indices, "indices")?;
    let Some((last, lead)) = indices.shape.split_last() else { return Err("indices have rank 0".into()) };
    let Some(depth) = last.as_size() else { return Err(format!("index depth {last} is not constant")) };
    if batch_dims > lead.len() || batch_dims + depth > x.rank() {
        return Err(format!("{indices} indexes {x} with {batch_dims} batch dims"));
    }
    same(&x.shape[..batch_dims], &lead[..batch_dims], "batch dims")?;
    let mut shape = lead.to_vec();
    shape.extend_from_slice(&x.shape[batch_dims + depth..]);
    Ok(Type::new(x.dtype, shape))
}

fn dequant(axis: usize, block: usize, args: &[&Type]) -> Inferred {
    let (q, scale) = (args[0], args[1]);
    check_axis(q, axis)?;
    same_rank(q, scale)?;
    if block == 0 || !scale.dtype.is_float() {
        return Err(format!("blocks of {block} with scale {scale}"));
    }
    for i in 0..q.rank() {
        let expected = if i == axis { q.shape[i].ceil_div(&Dim::from(block)) } else { q.shape[i].clone() };
        if scale.shape[i] != expected {
            return Err(format!("{q} in blocks of {block} along {axis} needs other scales than {scale}"));
        }
    }
    if let Some(zero) = args.get(2) {
        same(&zero.shape, &scale.shape, "zero points and scales")?;
    }
    Ok(Type::new(scale.dtype, q.shape.clone()))
}

fn norm(axis: usize, args: &[&Type]) -> Inferred {
    let x = args[0];
    check_axis(x, axis)?;
    for parameter in &args[1..] {
        same(&x.shape[axis..], &parameter.shape, "normalised dims and parameters")?;
        same_or_single(x, parameter)?;
    }
    Ok(x.clone())
}

fn attention(kv_of_head: &[u32], args: &[&Type]) -> Inferred {
    let (q, k, v) = (args[0], args[1], args[2]);
    if args[..3].iter().any(|t| t.rank() != 4 || t.dtype != q.dtype) {
        return Err(format!("operands {q}, {k}, {v} are not of rank 4 and one type"));
    }
    if q.shape[1] != Dim::from(kv_of_head.len()) {
        return Err(format!("{} head entries for {q}", kv_of_head.len()));
    }
    let fits = k.shape[0] == q.shape[0]
        && v.shape[0] == q.shape[0]
        && k.shape[1] == v.shape[1]
        && k.shape[2] == v.shape[2]
        && k.shape[3] == q.shape[3];
    if !fits {
        return Err(format!("operands {q}, {k}, {v} do not fit"));
    }
    let kv_heads = k.shape[1].as_size().ok_or_else(|| format!("{k} has a symbolic head count"))?;
    if kv_of_head.iter().any(|&h| h as usize >= kv_heads) {
        return Err(format!("a query head uses a KV head beyond {kv_heads}"));
    }
    if let Some(bias) = args.get(3) {
        same_or_single(q, bias)?;
        let scores = [&q.shape[0], &q.shape[1], &q.shape[2], &k.shape[2]].map(Dim::clone);
        broadcast_to(&bias.shape, &scores)?;
    }
    let shape = vec![q.shape[0].clone(), q.shape[1].clone(), q.shape[2].clone(), v.shape[3].clone()];
    Ok(Type::new(q.dtype, shape))
}

fn rotary(args: &[&Type]) -> Inferred {
    let (x, cos, sin) = (args[0], args[1], args[2]);
    same(&cos.shape, &sin.shape, "cos and sin")?;
    let Some(half) = x.shape.last().and_then(|d| d.exact_div(&Dim::constant(2))) else {
        return Err(format!("{x} has no even last dim"));
    };
    let mut halves = x.shape.clone();
    halves[x.rank() - 1] = half;
    broadcast_to(&cos.shape, &halves)?;
    same_or_single(x, cos)?;
    same_or_single(x, sin)?;
    Ok(x.clone())
}
