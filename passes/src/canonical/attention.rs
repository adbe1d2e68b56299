//! Attention written in contractions and softmax becomes the composite:
//! `softmax(scale · q kᵀ + bias) v`, with repeated KV heads traced back to the heads they repeat. Products of 16-bit
//! floats may have scores that are widened before and narrowed after the softmax, which attention does by itself.

use super::engine::{Rewriter, Rule};
use super::simplify::scalar_literal;
use tpshard_ir::op::{EinsumSpec, Real};
use tpshard_ir::{Op, Scalar, Type, ValueId};

pub(super) const RULES: [Rule; 5] = [
    Rule { name: "real:divide-scores", apply: divide_scores },
    Rule { name: "attention", apply: plain_attention },
    Rule { name: "real:attention-divided", apply: divided_attention },
    Rule { name: "real:attention-guarded", apply: guarded_attention },
    Rule { name: "attention-repeat", apply: unrepeat },
];

/// einsum(q, k) / c = einsum(q, k) · (1/c): one spelling of the scale
fn divide_scores(r: &mut Rewriter<'_>, v: ValueId) -> Option<ValueId> {
    let Op::Map(Scalar::Div) = r.op(v) else { return None };
    let (scores, divisor) = (r.arg(v, 0), r.arg(v, 1));
    let Op::Einsum(_) = r.op(scores) else { return None };
    let value = scalar_literal(r, divisor).filter(|c| *c != 0.0)?;
    if r.ty(scores).rank() != 4 {
        return None;
    }
    let inverse = 1.0 / value;
    // A reciprocal that the type does not hold would make another function of it.
    let exact = r.ty(divisor).dtype == tpshard_ir::DType::F64 || f64::from(inverse as f32) * value == 1.0;
    if !(inverse as f32).is_normal() || !exact {
        return None;
    }
    let factor = literal_like(r.ty(divisor), inverse)?;
    let factor = r.make(factor, &[]).ok()?;
    r.make(Op::Map(Scalar::Mul), &[scores, factor]).ok()
}

/// A literal of the same type as `ty` with every element `value`.
fn literal_like(ty: &Type, value: f64) -> Option<Op> {
    use tpshard_ir::tensor::{Data, Tensor};
    let data = match ty.dtype {
        tpshard_ir::DType::F32 => Data::F32(vec![value as f32]),
        tpshard_ir::DType::F64 => Data::F64(vec![value]),
        _ => return None,
    };
    let shape = ty.shape.iter().map(|d| d.as_size()).collect::<Option<Vec<usize>>>()?;
    Some(Op::Literal(tpshard_ir::op::Literal(std::sync::Arc::new(Tensor::new(shape, data).ok()?))))
}

/// Where the letters of a contraction of two operands of rank 4 stand.
struct Contraction {
    first: ValueId,
    second: ValueId,
    spec: EinsumSpec,
}

fn contraction(r: &Rewriter<'_>, v: ValueId) -> Option<Contraction> {
    let Op::Einsum(spec) = r.op(v) else { return None };
    let (first, second) = (r.arg(v, 0), r.arg(v, 1));
    let four = spec.inputs.iter().all(|l| l.len() == 4) && spec.output.len() == 4;
    four.then(|| Contraction { first, second, spec: spec.clone() })
}

/// The pieces of `softmax(cap(scale · q kᵀ) + bias)`.
struct Scores {
    q: ValueId,
    k: ValueId,
    scale: f64,
    softcap: Option<f64>,
    bias: Option<ValueId>,
    /// The scale is the reciprocal of what they are divided by.
    divided: bool,
}

/// einsum(softmax(scores), v) = attention(q, k, v, bias)
fn plain_attention(r: &mut Rewriter<'_>, v: ValueId) -> Option<ValueId> {
    attention(r, v, false, false)
}

/// The same with scores divided by a number whose reciprocal their type does not hold.
fn divided_attention(r: &mut Rewriter<'_>, v: ValueId) -> Option<ValueId> {
    attention(r, v, false, true)
}

/// The same where rows that are NaN because nothing may be attended to are replaced by zeros.
fn guarded_attention(r: &mut Rewriter<'_>, v: ValueId) -> Option<ValueId> {
    attention(r, v, true, false).or_else(|| attention(r, v, true, true))
}

fn attention(r: &mut Rewriter<'_>, v: ValueId, guarded: bool, divided: bool) -> Option<ValueId> {
    let outer = contraction(r, v)?;
    // softmax[b,h,s,t] · v[b,h,t,e] in any order of dims; bring both into standard order with transposes.
    let (weights, weights_letters, values, value_letters) = if probabilities(r, outer.first).is_some() {
        (outer.first, &outer.spec.inputs[0], outer.second, &outer.spec.inputs[1])
    } else {
        (outer.second, &outer.spec.inputs[1], outer.first, &outer.spec.inputs[0])
    };
    let (softmax, empty_rows_zero) = probabilities(r, weights)?;
    if empty_rows_zero != guarded {
        return None;
    }
    let [b, h, s, t] = weights_letters.as_slice() else { return None };
    let e = *value_letters.iter().find(|l| !weights_letters.contains(l))?;
    let out: Vec<u8> = vec![*b, *h, *s, e];
    let same_set = |a: &[u8], b: &[u8]| a.len() == b.len() && a.iter().all(|l| b.contains(l));
    if !same_set(value_letters, &[*b, *h, *t, e]) || !same_set(&outer.spec.output, &out) {
        return None;
    }
    let (value_perm, out_perm) =
        (permutation(value_letters, &[*b, *h, *t, e])?, permutation(&out, &outer.spec.output)?);
    let scores = scores(r, r.arg(softmax, 0)).filter(|found| found.divided == divided)?;
    let values = transposed(r, values, value_perm)?;
    let heads = r.ty(scores.q).shape[1].as_size()?;
    if r.ty(scores.k).shape[1] != r.ty(scores.q).shape[1] || r.ty(values).shape[1] != r.ty(scores.q).shape[1]
    {
        return None;
    }
    let op = Op::Attention {
        scale: Real(scores.scale),
        softcap: scores.softcap.map(Real),
        kv_of_head: (0..heads as u32).collect(),
        empty_rows_zero,
    };
    let mut args = vec![scores.q, scores.k, values];
    args.extend(scores.bias);
    let result = r.make(op, &args).ok()?;
    transposed(r, result, out_perm)
}

/// `perm` such that dim `i` of the transpose is the dim of `from` with letter `to[i]`.
fn permutation(from: &[u8], to: &[u8]) -> Option<Vec<usize>> {
    to.iter().map(|l| from.iter().position(|x| x == l)).collect()
}

fn transposed(r: &mut Rewriter<'_>, v: ValueId, perm: Vec<usize>) -> Option<ValueId> {
    if perm.iter().enumerate().all(|(i, &p)| i == p) {
        return Some(v);
    }
    if let Op::Transpose { perm: inner } = r.op(v) {
        let combined = perm.iter().map(|&p| inner[p]).collect();
        let source = r.arg(v, 0);
        return transposed(r, source, combined);
    }
    r.make(Op::Transpose { perm }, &[v]).ok()
}

/// The softmax behind attention weights, and whether NaN rows are zeroed.
fn probabilities(r: &Rewriter<'_>, v: ValueId) -> Option<(ValueId, bool)> {
    let v = super::narrowed(r, v).unwrap_or(v);
    match r.op(v) {
        Op::Softmax { axis: 3 } if r.ty(v).rank() == 4 => Some((v, false)),
        Op::Map(Scalar::Select) => {
            let (condition, zero, softmax) = (r.arg(v, 0), r.arg(v, 1), r.arg(v, 2));
            let guards = matches!(r.op(condition), Op::Map(Scalar::IsNan)) && r.arg(condition, 0) == softmax;
            let standard = matches!(r.op(softmax), Op::Softmax { axis: 3 }) && r.ty(softmax).rank() == 4;
            (guards && standard && scalar_literal(r, zero) == Some(0.0)).then_some((softmax, true))
        }
        _ => None,
    }
}

fn scores(r: &mut Rewriter<'_>, v: ValueId) -> Option<Scores> {
    if let Some(plain) = capped_scores(r, v) {
        return Some(plain);
    }
    let Op::Map(Scalar::Add) = r.op(v) else { return None };
    let (a, b) = (r.arg(v, 0), r.arg(v, 1));
    for (scores, bias) in [(a, b), (b, a)] {
        if r.ty(scores) == r.ty(v)
            && let Some(found) = capped_scores(r, scores)
        {
            return Some(Scores { bias: Some(bias), ..found });
        }
    }
    None
}

/// cap(scale · q kᵀ)
fn capped_scores(r: &mut Rewriter<'_>, v: ValueId) -> Option<Scores> {
    if let Some(found) = scaled_scores(r, v) {
        return Some(found);
    }
    let (tanh, cap) = with_factor(r, v)?;
    let Op::Map(Scalar::Tanh) = r.op(tanh) else { return None };
    let inner = r.arg(tanh, 0);
    let Op::Map(Scalar::Div) = r.op(inner) else { return None };
    let (scores, divisor) = (r.arg(inner, 0), r.arg(inner, 1));
    if scalar_literal(r, divisor) != Some(cap) {
        return None;
    }
    Some(Scores { softcap: Some(cap), ..scaled_scores(r, scores)? })
}

/// `x` and `c` of `x · c`.
fn with_factor(r: &Rewriter<'_>, v: ValueId) -> Option<(ValueId, f64)> {
    let Op::Map(Scalar::Mul) = r.op(v) else { return None };
    let (a, b) = (r.arg(v, 0), r.arg(v, 1));
    [(a, b), (b, a)].into_iter().find_map(|(x, c)| scalar_literal(r, c).map(|c| (x, c)))
}

/// `x` and `c` of `x / c`.
fn with_divisor(r: &Rewriter<'_>, v: ValueId) -> Option<(ValueId, f64)> {
    let Op::Map(Scalar::Div) = r.op(v) else { return None };
    let divisor = scalar_literal(r, r.arg(v, 1)).filter(|c| (1.0 / c).is_normal())?;
    Some((r.arg(v, 0), divisor))
}

/// scale · q kᵀ
fn scaled_scores(r: &mut Rewriter<'_>, v: ValueId) -> Option<Scores> {
    let (product, scale, divided) = match (with_factor(r, v), with_divisor(r, v)) {
        (Some((product, factor)), _) => (product, factor, false),
        (None, Some((product, divisor))) => (product, 1.0 / divisor, true),
        (None, None) => (v, 1.0, false),
    };
    let product = super::widened(r, product).unwrap_or(product);
    let inner = contraction(r, product)?;
    let [b, h, s, t] = inner.spec.output.as_slice() else { return None };
    let d = *inner.spec.inputs[0].iter().find(|l| !inner.spec.output.contains(l))?;
    let queries = if inner.spec.inputs[0].contains(s) { 0 } else { 1 };
    let letters = &inner.spec.inputs;
    let query_perm = permutation(&letters[queries], &[*b, *h, *s, d])?;
    let key_perm = permutation(&letters[1 - queries], &[*b, *h, *t, d])?;
    let operands = [inner.first, inner.second];
    let q = transposed(r, operands[queries], query_perm)?;
    let k = transposed(r, operands[1 - queries], key_perm)?;
    Some(Scores { q, k, scale, softcap: None, bias: None, divided })
}

/// attention(q, repeat(k), repeat(v)) = attention(q, k, v) with a head map
fn unrepeat(r: &mut Rewriter<'_>, v: ValueId) -> Option<ValueId> {
    let Op::Attention { scale, softcap, kv_of_head, empty_rows_zero } = r.op(v).clone() else { return None };
    let args = r.args(v).to_vec();
    let (k, repeat) = repeated(r, args[1])?;
    let (values, value_repeat) = repeated(r, args[2])?;
    if repeat != value_repeat {
        return None;
    }
    let kv_of_head = kv_of_head.iter().map(|&h| h / repeat).collect();
    let mut operands = args;
    (operands[1], operands[2]) = (k, values);
    r.make(Op::Attention { scale, softcap, kv_of_head, empty_rows_zero }, &operands).ok()
}

/// `x[b,g,t,d]` and `n` of `x` with each head repeated `n` times in place: reshape(broadcast(reshape(x))).
fn repeated(r: &mut Rewriter<'_>, v: ValueId) -> Option<(ValueId, u32)> {
    let Op::Reshape { shape } = r.op(v) else { return None };
    let [batch, heads, length, depth] = shape.as_slice() else { return None };
    let (batch, heads, length, depth) = (batch.clone(), heads.as_size()?, length.clone(), depth.clone());
    let wide = r.arg(v, 0);
    let Op::Broadcast { shape: wide_shape } = r.op(wide) else { return None };
    let [b, g, n, t, d] = wide_shape.as_slice() else { return None };
    let (groups, repeat) = (g.as_size()?, n.as_size()?);
    let narrow = r.arg(wide, 0);
    let matches = *b == batch && *t == length && *d == depth && groups.checked_mul(repeat) == Some(heads);
    let mut expected = wide_shape.clone();
    expected[2] = 1i64.into();
    if !matches || repeat == 0 || r.ty(narrow).shape != expected {
        return None;
    }
    let shape = vec![batch, groups.into(), length, depth];
    let x = r.make(Op::Reshape { shape }, &[narrow]).ok()?;
    let x = match r.op(x) {
        Op::Reshape { shape } if *shape == r.ty(r.arg(x, 0)).shape => r.arg(x, 0),
        Op::Reshape { .. } => {
            // reshape(reshape(k, [b,g,1,t,d]), [b,g,t,d]) = k
            let inner = r.arg(x, 0);
            match r.op(inner) {
                Op::Reshape { .. } if r.ty(r.arg(inner, 0)).shape == r.ty(x).shape => r.arg(inner, 0),
                _ => x,
            }
        }
        _ => x,
    };
    Some((x, u32::try_from(repeat).ok()?))
}
