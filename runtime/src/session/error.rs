//! What can go wrong in a session.

use crate::comm::CommError;
use tpshard_ir::interp::InterpError;
use tpshard_ir::program::{LoweringError, PlanError};

/// Why a session did not open, or a request has no result.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error("the program does not hold together: {what}\n  help: build it again")]
    Program { what: String },
    #[error("entry `{entry}`: {error}")]
    Lowering { entry: String, error: LoweringError },
    #[error("{what}")]
    Weights { what: String },
    #[error(transparent)]
    Inputs(#[from] InterpError),
    #[error("there is no input `{name}`; the inputs are {known}\n  help: rename it or leave it out")]
    UnknownInput { name: String, known: String },
    #[error("input `{input}` is {value}, for which the program has no entry\n  help: build it again")]
    Case { input: String, value: bool },
    #[error(
        "no entry of the program takes these inputs:\n{reasons}\nhelp: give inputs within these limits, or shard the model for others (--dim)"
    )]
    NoEntry { reasons: String },
    #[error("the memory for these dims: {0}")]
    Plan(#[from] PlanError),
    #[error(
        "these dims need {needed} bytes on rank {rank}, the limit is {limit}\n  \
         help: use smaller dims, raise the memory limit, or build for more ranks"
    )]
    Memory { rank: usize, needed: u64, limit: u64 },
    #[error("{what}")]
    State { what: String },
    #[error("{what}")]
    Usage { what: String },
    /// An index computed from the inputs, such as a token id, is outside of its table.
    #[error(
        "{node}: index {index} is outside of a table of {extent}\n  \
         help: the inputs hold indices such as token ids; here they may be 0 to {}", extent - 1
    )]
    Index { node: String, index: i64, extent: i64 },
    #[error("{what}")]
    Resources { what: String },
    /// A GPU is missing or does not do what it should.
    #[error("{what}")]
    Device { what: String },
    /// Another rank could not do its part; nothing is broken.
    #[error("rank {rank}: {message}")]
    Refused { rank: usize, message: String },
    #[error(transparent)]
    Collective(#[from] CommError),
    /// A failed collective, and where in the program.
    #[error("{place}: {error}")]
    Broken { place: String, error: CommError },
    #[error("the session ended with an earlier error: {reason}\n  help: open it again")]
    Poisoned { reason: String },
    #[error("the session is closed")]
    Closed,
}

impl SessionError {
    /// The number by which the tool and the C interface tell this kind of error from others: 2 usage, 4 mismatch,
    /// 5 resources, 6 a rank or a collective failed.
    pub fn exit_code(&self) -> u8 {
        match self {
            SessionError::Inputs(_)
            | SessionError::UnknownInput { .. }
            | SessionError::NoEntry { .. }
            | SessionError::Case { .. }
            | SessionError::Index { .. }
            | SessionError::Usage { .. } => 2,
            SessionError::Program { .. } | SessionError::Lowering { .. } | SessionError::Weights { .. } => 4,
            SessionError::Plan(_)
            | SessionError::Memory { .. }
            | SessionError::Resources { .. }
            | SessionError::Device { .. }
            | SessionError::State { .. } => 5,
            SessionError::Refused { .. }
            | SessionError::Collective(_)
            | SessionError::Broken { .. }
            | SessionError::Poisoned { .. }
            | SessionError::Closed => 6,
        }
    }

    /// True if the session cannot be used any more.
    pub fn is_fatal(&self) -> bool {
        matches!(
            self,
            SessionError::Collective(_)
                | SessionError::Broken { .. }
                | SessionError::Poisoned { .. }
                | SessionError::Closed
        )
    }
}
