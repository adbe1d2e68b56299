//! Tying a child's life to its parent's.
#![allow(unsafe_code)] // Code between fork and exec has no safe form.

use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Makes the kernel kill the child when the thread that starts it ends, for whatever reason.
pub(super) fn die_with_parent(command: &mut Command) {
    let parent = Pid::from_raw(std::process::id() as i32);
    let prepare = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // The parent may have ended before the line above.
        if getppid() == parent {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(rustix::io::Errno::SRCH.raw_os_error()))
        }
    };
    // SAFETY: two system calls and a comparison; nothing allocates or takes a lock.
    unsafe { command.pre_exec(prepare) };
}
