//! Errors of the command line: a message for people and the exit code that tells machines what kind it is.

use std::fmt;

/// Why a command failed; the numbers are the exit codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    Internal = 1,
    Usage = 2,
    /// The model is invalid or not supported.
    Model = 3,
    /// Results, shards or programs are not what they should be.
    Mismatch = 4,
    /// Files, memory, devices.
    Resource = 5,
    /// A rank or a collective failed.
    Rank = 6,
}

#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) kind: Kind,
    /// Empty if somebody else says it.
    pub(crate) message: String,
}

impl Failure {
    pub(crate) fn new(kind: Kind, message: impl fmt::Display) -> Failure {
        Failure { kind, message: message.to_string() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

pub(crate) type Outcome<T> = Result<T, Failure>;

/// Gives an error of any kind its exit code.
pub(crate) trait Classify<T> {
    fn or_fail(self, kind: Kind) -> Outcome<T>;
}

impl<T, E: fmt::Display> Classify<T> for Result<T, E> {
    fn or_fail(self, kind: Kind) -> Outcome<T> {
        self.map_err(|error| Failure::new(kind, error))
    }
}
