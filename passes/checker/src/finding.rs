//! What a check found wrong, and what a check that found nothing has covered.

use tpshard_ir::{StepId, ValueId};

/// One thing that is wrong with a program.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum Finding {
    #[error("{step} ({op}): {what}")]
    Step { step: StepId, op: String, what: String },
    #[error("{value} ({op}): {what}")]
    Value { value: ValueId, op: String, what: String },
    #[error("equation {index} ({rule}), {left} = {right}: {what}")]
    Equation { index: usize, rule: String, left: ValueId, right: ValueId, what: String },
    #[error("output `{name}`: {what}")]
    Output { name: String, what: String },
    #[error("rank {rank}, {step} ({op}): {what}")]
    Rank { rank: usize, step: StepId, op: String, what: String },
    #[error("the program: {what}")]
    Program { what: String },
}

impl Finding {
    /// True if nothing is known to be wrong: the dims that the guards demand are too large to execute an equation with.
    pub fn is_about_size(&self) -> bool {
        matches!(self, Finding::Equation { what, .. } if what.contains(TOO_LARGE))
    }
}

/// How errors end that say that something could not be executed within the limits.
pub(crate) const TOO_LARGE: &str = "too large to check";

/// What was checked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Values of the logical graph whose types were inferred again.
    pub values: usize,
    /// Steps that compute.
    pub squares: usize,
    /// Steps that compute, each kind of typing counted once.
    pub distinct_squares: usize,
    /// Steps that convert.
    pub conversions: usize,
    /// Ground equations.
    pub equations: usize,
    /// Equations that follow from earlier ones by congruence.
    pub implied_equations: usize,
    /// Equations executed over the field modulo 2^61 - 1, equal ones once.
    pub executed_in_field: usize,
    /// Equations executed in `f64`, equal ones once.
    pub executed_in_reals: usize,
    /// Rank graphs compared with the program.
    pub ranks: usize,
    /// Collectives that every rank issues.
    pub collectives: usize,
}
