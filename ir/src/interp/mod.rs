//! The reference interpreter: what every operation means, written to be read.
//!
//! One evaluator runs in any [`Domain`]: in [`Real`] it is the semantics that executors are tested against, in [`Field`]
//! it decides exactly whether two programs are equal. N simulated ranks run in lockstep ([`Interpreter::run_ranks`]),
//! so a sharded program is compared with its logical graph without any communicator. Bad graphs and inputs are error
//! values, and no array grows beyond the caller's limit.
//!
//! What must not live here: anything fast.

mod array;
mod codec;
mod composite;
mod convert;
mod domain;
mod eval;
mod family;
mod field;
mod movement;
mod real;
mod reduce;
mod run;
mod weights;

pub use array::Array;
pub use convert::{convert, tree_reduce};
pub use domain::Domain;
pub use eval::{Context, WeightSource, eval_op, eval_tensors};
pub use family::{Split, decode, encode, random_array, random_family};
pub use field::{Field, MODULUS};
pub use real::{Num, Real};
pub(crate) use run::solve;
pub(crate) use run::solve_linear;
pub use run::{
    DeferredSource, Inputs, InterpError, Interpreter, Outputs, RankInputs, bind_symbols, check_guards,
    run_arrays_with, run_tensors, run_tensors_with,
};
pub use weights::{InitializerSource, eval_weight, eval_weight_in, random_weight};

use crate::dim::EvalError;
use crate::infer::InferError;

/// Enough for the tests of every operation, far below what would exhaust a machine.
pub const DEFAULT_ELEMENT_LIMIT: usize = 1 << 26;

/// Why an operation has no result.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum OpError {
    #[error("{0}")]
    Infer(#[from] InferError),
    #[error("{0}")]
    Eval(#[from] EvalError),
    #[error(
        "a result of {needed} elements exceeds the limit of {limit}\nhelp: use smaller inputs or raise the limit"
    )]
    Limit { needed: u64, limit: usize },
    #[error("a shape holds more elements than can be addressed")]
    TooLarge,
    #[error("{0}")]
    Other(String),
}

impl OpError {
    pub(crate) fn other(what: impl ToString) -> OpError {
        OpError::Other(what.to_string())
    }
}
