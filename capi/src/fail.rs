//! Errors as C sees them: a code from the function, and a message that is kept for each thread.

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};
use tpshard_runtime::launch::LaunchError;
use tpshard_runtime::session::SessionError;

/// What kind of error; the numbers are the command's exit codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub(crate) enum Code {
    Internal = 1,
    Usage = 2,
    Mismatch = 4,
    Resources = 5,
    Rank = 6,
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Fail {
    pub(crate) code: Code,
    pub(crate) message: String,
}

pub(crate) type Outcome<T> = Result<T, Fail>;

impl Fail {
    pub(crate) fn new(code: Code, message: impl ToString) -> Fail {
        Fail { code, message: message.to_string() }
    }

    pub(crate) fn usage(message: impl ToString) -> Fail {
        Fail::new(Code::Usage, message)
    }

    /// What a thread that panicked has left behind cannot be trusted.
    pub(crate) fn panicked() -> Fail {
        Fail::new(
            Code::Internal,
            "internal error: an earlier call panicked\n  help: close the session; this is a mistake in tpshard, please report it",
        )
    }
}

fn of_exit_code(code: u8, message: String) -> Fail {
    let codes = [Code::Usage, Code::Mismatch, Code::Resources, Code::Rank];
    let code = codes.into_iter().find(|own| *own as i32 == i32::from(code)).unwrap_or(Code::Internal);
    Fail { code, message }
}

impl From<SessionError> for Fail {
    fn from(error: SessionError) -> Fail {
        of_exit_code(error.exit_code(), error.to_string())
    }
}

impl From<LaunchError> for Fail {
    fn from(error: LaunchError) -> Fail {
        of_exit_code(error.exit_code(), error.to_string())
    }
}

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

/// Text without what C takes for its end.
pub(crate) fn c_text(text: &str) -> CString {
    CString::new(text.replace('\0', "\u{fffd}")).unwrap_or_default()
}

fn remember(message: &str) {
    LAST.with(|last| *last.borrow_mut() = c_text(message));
}

/// Valid until the next call of this thread.
pub(crate) fn last_error() -> *const c_char {
    LAST.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

/// Does what a call is for: its code, with the message kept. A panic is an internal error.
pub(crate) fn guarded(body: impl FnOnce() -> Outcome<()>) -> i32 {
    remember("");
    // What a panic may have left half done is locked away by the session's mutex.
    let done = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().copied();
        let what = text.or(panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message");
        Err(Fail::new(
            Code::Internal,
            format!("internal error: {what}\n  help: this is a mistake in tpshard, please report it"),
        ))
    });
    match done {
        Ok(()) => 0,
        Err(fail) => {
            remember(&fail.message);
            fail.code as i32
        }
    }
}

/// The version as C text.
pub(crate) const VERSION: &CStr =
    match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
        Ok(version) => version,
        Err(_) => c"",
    };

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_stays_inside() {
        assert_eq!(guarded(|| panic!("on purpose")), Code::Internal as i32);
        LAST.with(|last| assert!(last.borrow().to_string_lossy().contains("on purpose")));
        assert_eq!(guarded(|| Ok(())), 0);
        LAST.with(|last| assert!(last.borrow().is_empty()));
    }

    #[test]
    fn errors_have_the_codes_of_the_command() {
        let state = Fail::from(SessionError::State { what: "full".into() });
        assert_eq!((state.code, &*state.message), (Code::Resources, "full"));
        assert_eq!(Fail::from(SessionError::Closed).code, Code::Rank);
        assert_eq!(Fail::from(LaunchError::NoJobKey).code, Code::Usage);
    }
}
