//! Canonicalisation and recognition: directed equalities on the whole graph, before anything is split.
//!
//! Exporters spell the same computation in many ways. The passes here bring graphs to one spelling that shows what
//! can be split: no transposes or merged dims around contractions, fused projections cut into separate ones by
//! slicing their weights, norms and attention as composites. Each rewrite is an equation in the certificate. Rules
//! whose names begin with `real:` hold for real numbers only and are checked as such.

mod attention;
mod contraction;
mod engine;
mod norm;
mod simplify;
mod slices;

use crate::extended::Extended;
use engine::{Rewriter, Rule, intern, rewrite};
use tpshard_ir::{DType, Op, Scalar, ValueId};

/// Rewrites `extended` to the canonical form.
pub fn canonicalise(extended: &mut Extended) {
    let mut interned = intern(&extended.graph);
    let tidy: Vec<Rule> = simplify::RULES.into_iter().chain(contraction::RULES).collect();
    let cut: Vec<Rule> = simplify::RULES.into_iter().chain(contraction::RULES).chain(slices::RULES).collect();
    rewrite(extended, &mut interned, &tidy);
    rewrite(extended, &mut interned, &cut);
    rewrite(extended, &mut interned, &norm::RULES);
    rewrite(extended, &mut interned, &attention::RULES);
    rewrite(extended, &mut interned, &tidy);
}

/// The float of 16 bits that `v` is in `f32`.
fn widened(r: &Rewriter<'_>, v: ValueId) -> Option<ValueId> {
    let Op::Map(Scalar::Cast(DType::F32)) = r.op(v) else { return None };
    let x = r.arg(v, 0);
    matches!(r.ty(x).dtype, DType::F16 | DType::BF16).then_some(x)
}

/// The value in `f32` that `v` is in a float of 16 bits.
fn narrowed(r: &Rewriter<'_>, v: ValueId) -> Option<ValueId> {
    let Op::Map(Scalar::Cast(DType::F16 | DType::BF16)) = r.op(v) else { return None };
    let x = r.arg(v, 0);
    (r.ty(x).dtype == DType::F32).then_some(x)
}
