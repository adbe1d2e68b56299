//! Errors of the command line: a message for people and the exit code that tells machines what kind it is.

use serde_json::{Value, json};
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

impl Kind {
    /// The name in `--json` output.
    fn name(self) -> &'static str {
        match self {
            Kind::Internal => "internal",
            Kind::Usage => "usage",
            Kind::Model => "model",
            Kind::Mismatch => "mismatch",
            Kind::Resource => "resource",
            Kind::Rank => "rank",
        }
    }
}

#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) kind: Kind,
    /// Empty if people have been told already.
    pub(crate) message: String,
    /// What people have been told already, for machines.
    pub(crate) told: Option<String>,
    /// What the command found before it failed, for machines.
    pub(crate) result: Option<Value>,
}

impl Failure {
    pub(crate) fn new(kind: Kind, message: impl fmt::Display) -> Failure {
        Failure { kind, message: message.to_string(), told: None, result: None }
    }

    /// A failure that people have read about already.
    pub(crate) fn told(kind: Kind, told: impl fmt::Display) -> Failure {
        Failure { told: Some(told.to_string()), ..Failure::new(kind, "") }
    }

    /// Gives machines the result besides the error.
    pub(crate) fn with_result(self, result: Option<Value>) -> Failure {
        Failure { result, ..self }
    }

    /// The result, if there is one, with the error in it.
    pub(crate) fn to_json(&self) -> Value {
        let message = self.told.as_ref().unwrap_or(&self.message);
        let error = json!({ "kind": self.kind.name(), "exit_code": self.kind as u8, "message": message });
        match &self.result {
            Some(Value::Object(result)) => {
                let mut whole = result.clone();
                whole.insert("error".into(), error);
                Value::Object(whole)
            }
            _ => json!({ "error": error }),
        }
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

/// Runs a command; a panic in it is an internal error. What panicked has been said by [`say_panics`].
pub(crate) fn guarded(command: impl FnOnce() -> Outcome<()>) -> Outcome<()> {
    // Nothing of the command is used after it has ended.
    let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(command));
    ended.unwrap_or_else(|_| {
        Err(Failure::told(Kind::Internal, "the program has a mistake; see standard error"))
    })
}

/// Makes panics, on whatever thread, say one paragraph that people can do something with.
pub(crate) fn say_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(|l| format!(" ({}:{})", l.file(), l.line())).unwrap_or_default();
        let what = panic.payload();
        let text = what.downcast_ref::<&str>().copied();
        let what = text.or(what.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message");
        crate::output::say(format_args!(
            "error: internal error: {what}{place}\n\
             help: this is a mistake in tpshard {}; please report it with the command line and the model",
            env!("CARGO_PKG_VERSION")
        ));
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_internal_error() {
        let failure = guarded(|| panic!("on purpose")).unwrap_err();
        assert_eq!(failure.kind as u8, 1);
        assert_eq!(failure.to_json()["error"]["kind"], "internal");
        assert!(guarded(|| Ok(())).is_ok());
    }

    #[test]
    fn machines_get_the_error_in_the_result() {
        let failure = Failure::new(Kind::Mismatch, "no").with_result(Some(json!({ "passed": false })));
        let expected = json!({
            "passed": false,
            "error": { "kind": "mismatch", "exit_code": 4, "message": "no" },
        });
        assert_eq!(failure.to_json(), expected);
    }
}
