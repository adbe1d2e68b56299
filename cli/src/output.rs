//! What the tool prints. Standard output belongs to results, standard error to people.
//!
//! A reader that stops reading (`| head -1`) ends the output, not the command: the exit code stays the command's own.
//! Output that cannot be written for any other reason is an error like any other file's.

use crate::failure::{Failure, Kind, Outcome};
use std::fmt::Display;
use std::io::{ErrorKind, Write, stderr, stdout};

/// Prints a result as it is.
pub(crate) fn text(text: impl Display) -> Outcome<()> {
    let mut out = stdout().lock();
    // One write, so that ranks that share a terminal do not interleave; flushed, so that no error is lost at exit.
    let written = out.write_all(text.to_string().as_bytes()).and_then(|()| out.flush());
    match written {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(Failure::new(
            Kind::Resource,
            format!("standard output: {error}\nhelp: make room, or send the output elsewhere"),
        )),
        _ => Ok(()),
    }
}

/// Prints a result and ends the line.
pub(crate) fn line(line: impl Display) -> Outcome<()> {
    text(format_args!("{line}\n"))
}

/// Says something to people; if nobody can read it, nobody misses it.
pub(crate) fn say(line: impl Display) {
    let _ = stderr().lock().write_all(format!("{line}\n").as_bytes());
}
