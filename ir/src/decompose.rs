//! What composites mean in primitives.
//!
//! Softmax `e / Σe` with `e = exp(x - max x)`; layer norm `c · rsqrt(Σc²/n + ε) · scale + bias` with `c = x - Σx/n`; RMS
//! norm the same with `c = x`; attention two contractions around a softmax; rotary two products each of halves or
//! neighbours. Everything that has to be summed is summed first and scaled after, so that a split over a summed dim
//! becomes partial sums. 16-bit floats are widened to `f32` first and narrowed at the end.

use crate::dim::Dim;
use crate::dtype::DType;
use crate::graph::{Graph, ValueId};
use crate::infer::InferError;
use crate::layout::Monoid;
use crate::op::{EinsumSpec, Literal, NormKind, Op, Scalar};
use crate::tensor::Tensor;
use std::sync::Arc;

type Result<T> = std::result::Result<T, InferError>;

/// Appends the primitive form of a composite and returns its value; `None` if `value` is no composite. The form of
/// attention contains a softmax, itself a composite.
///
/// # Errors
/// The composite does not fit its operands; a verified graph holds none such.
pub fn decompose(graph: &mut Graph, value: ValueId) -> Result<Option<ValueId>> {
    let Some(node) = graph.nodes().get(value.index()).cloned() else { return Ok(None) };
    let first_new = graph.len();
    let narrow = node.ty.dtype;
    let mut builder = Builder { graph, dtype: if narrow == DType::F64 { narrow } else { DType::F32 } };
    let args: Vec<ValueId> = match &node.op {
        Op::Softmax { .. } | Op::Norm { .. } | Op::Attention { .. } | Op::Rotary { .. } => {
            let widened = node.args.iter().map(|&arg| builder.cast(arg, builder.dtype));
            widened.collect::<Result<_>>()?
        }
        _ => return Ok(None),
    };
    let wide = match (&node.op, args.as_slice()) {
        (Op::Softmax { axis }, &[x]) => builder.softmax(*axis, x)?,
        (Op::Norm { kind, axis, epsilon }, &[x, scale, ref bias @ ..]) => {
            builder.norm(*kind, *axis, epsilon.0, x, scale, bias.first().copied())?
        }
        (Op::Attention { .. }, &[q, k, v, ref bias @ ..]) => {
            builder.attention(&node.op, q, k, v, bias.first().copied())?
        }
        (Op::Rotary { interleaved }, &[x, cos, sin]) => builder.rotary(*interleaved, x, cos, sin)?,
        _ => return Err(error(&node.op, "has a wrong number of operands")),
    };
    let result = builder.cast(wide, narrow)?;
    for new in first_new..graph.len() {
        graph.set_origin(ValueId(new as u32), &node.origin);
    }
    Ok(Some(result))
}

fn error(op: &Op, what: &str) -> InferError {
    InferError { op: op.name().into(), what: what.into() }
}

/// Appends nodes that compute in `dtype`.
struct Builder<'a> {
    graph: &'a mut Graph,
    dtype: DType,
}

impl Builder<'_> {
    fn map(&mut self, scalar: Scalar, args: &[ValueId]) -> Result<ValueId> {
        self.graph.add(Op::Map(scalar), args)
    }

    fn cast(&mut self, x: ValueId, to: DType) -> Result<ValueId> {
        if self.graph.ty(x).dtype == to { Ok(x) } else { self.map(Scalar::Cast(to), &[x]) }
    }

    fn reduce(&mut self, monoid: Monoid, axes: Vec<usize>, x: ValueId) -> Result<ValueId> {
        self.graph.add(Op::Reduce { monoid, axes }, &[x])
    }

    fn reshape(&mut self, x: ValueId, shape: Vec<Dim>) -> Result<ValueId> {
        if self.graph.ty(x).shape == shape { Ok(x) } else { self.graph.add(Op::Reshape { shape }, &[x]) }
    }

    fn literal(&mut self, value: f64) -> Result<ValueId> {
        let tensor = match self.dtype {
            DType::F64 => Tensor::scalar(value),
            _ => Tensor::scalar(value as f32),
        };
        self.graph.add(Op::Literal(Literal(Arc::new(tensor))), &[])
    }

    /// `1 / size`.
    fn reciprocal_of(&mut self, size: Dim) -> Result<ValueId> {
        let count = self.graph.add(Op::Size(size), &[])?;
        let count = self.cast(count, self.dtype)?;
        self.map(Scalar::Reciprocal, &[count])
    }

    fn einsum(&mut self, [a, b, out]: [&[u8]; 3], args: &[ValueId]) -> Result<ValueId> {
        let spec = EinsumSpec { inputs: vec![a.to_vec(), b.to_vec()], output: out.to_vec() };
        self.graph.add(Op::Einsum(spec), args)
    }

    fn softmax(&mut self, axis: usize, x: ValueId) -> Result<ValueId> {
        let top = self.reduce(Monoid::Max, vec![axis], x)?;
        let shifted = self.map(Scalar::Sub, &[x, top])?;
        let exponential = self.map(Scalar::Exp, &[shifted])?;
        let sum = self.reduce(Monoid::Sum, vec![axis], exponential)?;
        self.map(Scalar::Div, &[exponential, sum])
    }

    fn norm(
        &mut self,
        kind: NormKind,
        axis: usize,
        epsilon: f64,
        x: ValueId,
        scale: ValueId,
        bias: Option<ValueId>,
    ) -> Result<ValueId> {
        let shape = &self.graph.ty(x).shape;
        let axes: Vec<usize> = (axis..shape.len()).collect();
        let count = Dim::product(shape.iter().skip(axis));
        let per_element = self.reciprocal_of(count)?;
        let centred = match kind {
            NormKind::Layer => {
                let sum = self.reduce(Monoid::Sum, axes.clone(), x)?;
                let mean = self.map(Scalar::Mul, &[sum, per_element])?;
                self.map(Scalar::Sub, &[x, mean])?
            }
            NormKind::Rms => x,
        };
        let squares = self.map(Scalar::Mul, &[centred, centred])?;
        let sum = self.reduce(Monoid::Sum, axes, squares)?;
        let variance = self.map(Scalar::Mul, &[sum, per_element])?;
        let epsilon = self.literal(epsilon)?;
        let kept_positive = self.map(Scalar::Add, &[variance, epsilon])?;
        let factor = self.map(Scalar::Rsqrt, &[kept_positive])?;
        let normal = self.map(Scalar::Mul, &[centred, factor])?;
        let scaled = self.map(Scalar::Mul, &[normal, scale])?;
        match bias {
            Some(bias) => self.map(Scalar::Add, &[scaled, bias]),
            None => Ok(scaled),
        }
    }

    fn attention(
        &mut self,
        op: &Op,
        q: ValueId,
        k: ValueId,
        v: ValueId,
        bias: Option<ValueId>,
    ) -> Result<ValueId> {
        let Op::Attention { scale, softcap, kv_of_head, empty_rows_zero } = op else {
            return Err(error(op, "is not attention"));
        };
        let heads = Heads::new(self, kv_of_head, k)?;
        let (k, v) = (heads.expand(self, k)?, heads.expand(self, v)?);
        let mut scores = heads.scores(self, q, k)?;
        let scale = self.literal(scale.0)?;
        scores = self.map(Scalar::Mul, &[scores, scale])?;
        if let Some(cap) = softcap {
            let cap = self.literal(cap.0)?;
            let ratio = self.map(Scalar::Div, &[scores, cap])?;
            let bounded = self.map(Scalar::Tanh, &[ratio])?;
            scores = self.map(Scalar::Mul, &[bounded, cap])?;
        }
        if let Some(bias) = bias {
            scores = self.map(Scalar::Add, &[scores, bias])?;
        }
        let mut weights = self.graph.add(Op::Softmax { axis: 3 }, &[scores])?;
        if *empty_rows_zero {
            let top = self.reduce(Monoid::Max, vec![3], scores)?;
            let nothing = self.literal(f64::NEG_INFINITY)?;
            let empty = self.map(Scalar::Equal, &[top, nothing])?;
            let zero = self.literal(0.0)?;
            weights = self.map(Scalar::Select, &[empty, zero, weights])?;
        }
        heads.values(self, weights, v)
    }

    fn rotary(&mut self, interleaved: bool, x: ValueId, cos: ValueId, sin: ValueId) -> Result<ValueId> {
        let shape = self.graph.ty(x).shape.clone();
        let half = shape.last().and_then(|last| last.exact_div(&Dim::constant(2)));
        let (Some(last), Some(half)) = (shape.len().checked_sub(1), half) else {
            return Err(error(&Op::Rotary { interleaved }, "has no even last dim"));
        };
        let (second_start, step) = if interleaved { (Dim::constant(1), 2) } else { (half.clone(), 1) };
        let mut part =
            |start: Dim| self.graph.add(Op::Slice { axis: last, start, length: half.clone(), step }, &[x]);
        let (first, second) = (part(Dim::constant(0))?, part(second_start)?);
        let mut combine = |function, [a, b]: [ValueId; 2]| {
            let left = self.map(Scalar::Mul, &[first, a])?;
            let right = self.map(Scalar::Mul, &[second, b])?;
            self.map(function, &[left, right])
        };
        let rotated = [combine(Scalar::Sub, [cos, sin])?, combine(Scalar::Add, [sin, cos])?];
        if !interleaved {
            return self.graph.add(Op::Concat { axis: last }, &rotated);
        }
        let mut pairs = shape.clone();
        pairs.splice(last.., [half, Dim::constant(1)]);
        let columns = [self.reshape(rotated[0], pairs.clone())?, self.reshape(rotated[1], pairs)?];
        let joined = self.graph.add(Op::Concat { axis: last + 1 }, &columns)?;
        self.reshape(joined, shape)
    }
}

/// How query heads meet KV heads.
enum Heads {
    /// One to one.
    Equal,
    /// Consecutive runs of that many query heads share one.
    Grouped { groups: usize, repeats: usize },
    /// Any map: KV heads are gathered.
    Mapped(Vec<i64>),
}

impl Heads {
    fn new(builder: &Builder<'_>, kv_of_head: &[u32], k: ValueId) -> Result<Heads> {
        let groups = builder.graph.ty(k).shape.get(1).and_then(Dim::as_size).unwrap_or(0);
        let repeats = kv_of_head.len().checked_div(groups).unwrap_or(0);
        let regular = repeats > 0
            && kv_of_head.len() == groups * repeats
            && kv_of_head.iter().enumerate().all(|(head, &kv)| head / repeats == kv as usize);
        Ok(match (regular, repeats) {
            (true, 1) => Heads::Equal,
            (true, _) => Heads::Grouped { groups, repeats },
            (false, _) => Heads::Mapped(kv_of_head.iter().map(|&kv| i64::from(kv)).collect()),
        })
    }

    fn expand(&self, builder: &mut Builder<'_>, x: ValueId) -> Result<ValueId> {
        let Heads::Mapped(map) = self else { return Ok(x) };
        let indices = Tensor::from_vec(vec![map.len()], map.clone())
            .map_err(|e| InferError { op: "attention".into(), what: e.to_string() })?;
        let indices = builder.graph.add(Op::Literal(Literal(Arc::new(indices))), &[])?;
        builder.graph.add(Op::Gather { axis: 1, window: None }, &[x, indices])
    }

    /// `[b, h, …]` as `[b, g, r, …]` where heads are grouped.
    fn split(&self, builder: &mut Builder<'_>, x: ValueId) -> Result<ValueId> {
        let Heads::Grouped { groups, repeats } = *self else { return Ok(x) };
        let mut shape = builder.graph.ty(x).shape.clone();
        shape.splice(1..2, [groups.into(), repeats.into()]);
        builder.reshape(x, shape)
    }

    fn join(&self, builder: &mut Builder<'_>, x: ValueId) -> Result<ValueId> {
        let Heads::Grouped { groups, repeats } = *self else { return Ok(x) };
        let mut shape = builder.graph.ty(x).shape.clone();
        shape.splice(1..3, [(groups * repeats).into()]);
        builder.reshape(x, shape)
    }

    fn scores(&self, builder: &mut Builder<'_>, q: ValueId, k: ValueId) -> Result<ValueId> {
        let q = self.split(builder, q)?;
        let letters: [&[u8]; 3] = match self {
            Heads::Grouped { .. } => [b"bgrsd", b"bgtd", b"bgrst"],
            Heads::Equal | Heads::Mapped(_) => [b"bhsd", b"bhtd", b"bhst"],
        };
        let scores = builder.einsum(letters, &[q, k])?;
        self.join(builder, scores)
    }

    fn values(&self, builder: &mut Builder<'_>, weights: ValueId, v: ValueId) -> Result<ValueId> {
        let weights = self.split(builder, weights)?;
        let letters: [&[u8]; 3] = match self {
            Heads::Grouped { .. } => [b"bgrst", b"bgte", b"bgrse"],
            Heads::Equal | Heads::Mapped(_) => [b"bhst", b"bhte", b"bhse"],
        };
        let mixed = builder.einsum(letters, &[weights, v])?;
        self.join(builder, mixed)
    }
}
