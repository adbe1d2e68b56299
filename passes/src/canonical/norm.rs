//! Norms written out in primitives become the composite: `x · rsqrt(mean(x²) + ε) · w`, and the same of `x - mean(x)`
//! with a bias. The equations hold for real numbers: exporters write the same quotient and square in many ways.

use super::engine::{Rewriter, Rule};
use super::simplify::scalar_literal;
use tpshard_ir::layout::Monoid;
use tpshard_ir::op::{NormKind, Real};
use tpshard_ir::{Op, Scalar, ValueId};

pub(super) const RULES: [Rule; 3] = [
    Rule { name: "real:norm-scale", apply: norm_scale },
    Rule { name: "norm-bias", apply: norm_bias },
    Rule { name: "norm-narrow", apply: norm_narrow },
];

fn map_args(r: &Rewriter<'_>, v: ValueId, scalar: Scalar) -> Option<Vec<ValueId>> {
    matches!(r.op(v), Op::Map(s) if *s == scalar).then(|| r.args(v).to_vec())
}

/// Both ways round of a commutative map.
fn either_way(r: &Rewriter<'_>, v: ValueId, scalar: Scalar) -> Vec<(ValueId, ValueId)> {
    map_args(r, v, scalar).map_or(vec![], |a| vec![(a[0], a[1]), (a[1], a[0])])
}

/// normalised · w = norm(x, w)
fn norm_scale(r: &mut Rewriter<'_>, v: ValueId) -> Option<ValueId> {
    for (normalised, scale) in either_way(r, v, Scalar::Mul) {
        let Some((x, kind, epsilon)) = normalisation(r, normalised) else { continue };
        let axis = r.ty(x).rank() - 1;
        let Some(scale) = parameter(r, scale, x) else { continue };
        return r.make(Op::Norm { kind, axis, epsilon: Real(epsilon) }, &[x, scale]).ok();
    }
    None
}

/// norm(x, w) + b = norm(x, w, b)
fn norm_bias(r: &mut Rewriter<'_>, v: ValueId) -> Option<ValueId> {
    for (norm, bias) in either_way(r, v, Scalar::Add) {
        let Op::Norm { kind, axis, epsilon } = *r.op(norm) else { continue };
        let &[x, scale] = r.args(norm) else { continue };
        let Some(bias) = parameter(r, bias, x) else { continue };
        return r.make(Op::Norm { kind, axis, epsilon }, &[x, scale, bias]).ok();
    }
    None
}

/// narrow(norm(wide(x), w, b)) = norm(x, w, b), where `x` is of the narrow type: a norm computes wide in any case
fn norm_narrow(r: &mut Rewriter<'_>, v: ValueId) -> Option<ValueId> {
    let Op::Map(Scalar::Cast(to)) = *r.op(v) else { return None };
    let norm = r.arg(v, 0);
    let Op::Norm { kind, axis, epsilon } = *r.op(norm) else { return None };
    let mut args = r.args(norm).to_vec();
    let x = super::widened(r, *args.first()?).filter(|&x| r.ty(x).dtype == to)?;
    *args.first_mut()? = x;
    r.make(Op::Norm { kind, axis, epsilon }, &args).ok()
}

/// A vector over the last dim of `x`, reshaped if it has leading ones.
fn parameter(r: &mut Rewriter<'_>, v: ValueId, x: ValueId) -> Option<ValueId> {
    let last = r.ty(x).shape.last()?.clone();
    let (lead, own) = match r.ty(v).shape.split_last() {
        Some((own, lead)) => (lead, own),
        None => return None,
    };
    if *own != last || !lead.iter().all(|d| d.is_one()) || last.is_one() {
        return None;
    }
    if lead.is_empty() { Some(v) } else { r.make(Op::Reshape { shape: vec![last] }, &[v]).ok() }
}

/// `x · rsqrt(mean(x²) + ε)` over the last dim; for layer norm of `x - mean(x)`.
fn normalisation(r: &Rewriter<'_>, v: ValueId) -> Option<(ValueId, NormKind, f64)> {
    let candidates = either_way(r, v, Scalar::Mul)
        .into_iter()
        .filter_map(|(x, factor)| inverse_root(r, factor).map(|e| (x, e)))
        .chain(map_args(r, v, Scalar::Div).and_then(|a| root(r, a[1]).map(|e| (a[0], e))));
    for (x, radicand) in candidates.collect::<Vec<_>>() {
        for (mean, epsilon) in either_way(r, radicand, Scalar::Add) {
            let Some(epsilon) = scalar_literal(r, epsilon) else { continue };
            let Some(square) = mean_over_last(r, mean) else { continue };
            if square_of(r, square) != Some(x) {
                continue;
            }
            if let Some(a) = map_args(r, x, Scalar::Sub)
                && mean_over_last(r, a[1]) == Some(a[0])
            {
                return Some((a[0], NormKind::Layer, epsilon));
            }
            return Some((x, NormKind::Rms, epsilon));
        }
    }
    None
}

/// `e` of `1 / sqrt(e)`.
fn inverse_root(r: &Rewriter<'_>, v: ValueId) -> Option<ValueId> {
    if let Some(a) = map_args(r, v, Scalar::Rsqrt) {
        return Some(a[0]);
    }
    if let Some(a) = map_args(r, v, Scalar::Reciprocal) {
        return root(r, a[0]);
    }
    if let Some(a) = map_args(r, v, Scalar::Div) {
        return (scalar_literal(r, a[0]) == Some(1.0)).then(|| root(r, a[1])).flatten();
    }
    let a = map_args(r, v, Scalar::Pow)?;
    (scalar_literal(r, a[1]) == Some(-0.5)).then_some(a[0])
}

/// `e` of `sqrt(e)`.
fn root(r: &Rewriter<'_>, v: ValueId) -> Option<ValueId> {
    if let Some(a) = map_args(r, v, Scalar::Sqrt) {
        return Some(a[0]);
    }
    let a = map_args(r, v, Scalar::Pow)?;
    (scalar_literal(r, a[1]) == Some(0.5)).then_some(a[0])
}

/// `x` of `x²`.
fn square_of(r: &Rewriter<'_>, v: ValueId) -> Option<ValueId> {
    if let Some(a) = map_args(r, v, Scalar::Mul) {
        return (a[0] == a[1]).then_some(a[0]);
    }
    let a = map_args(r, v, Scalar::Pow)?;
    (scalar_literal(r, a[1]) == Some(2.0)).then_some(a[0])
}

/// `x` of the mean of `x` over its last dim, kept as extent 1.
fn mean_over_last(r: &Rewriter<'_>, v: ValueId) -> Option<ValueId> {
    let (sum, factor) = either_way(r, v, Scalar::Mul)
        .into_iter()
        .find_map(|(sum, f)| scalar_literal(r, f).map(|f| (sum, f)))
        .or_else(|| {
            let a = map_args(r, v, Scalar::Div)?;
            scalar_literal(r, a[1]).map(|n| (a[0], 1.0 / n))
        })?;
    let Op::Reduce { monoid: Monoid::Sum, axes } = r.op(sum) else { return None };
    let x = r.arg(sum, 0);
    let count = r.ty(x).shape.last()?.as_size()? as f64;
    let over_last = axes.as_slice() == [r.ty(x).rank() - 1];
    // The reciprocal may have been rounded to f32.
    (over_last && (factor * count - 1.0).abs() < 1e-6).then_some(x)
}
