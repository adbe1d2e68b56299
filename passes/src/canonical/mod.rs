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
use engine::{Rule, intern, rewrite};

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
