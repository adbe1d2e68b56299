//! The runtime: what runs a rank's program.
//!
//! `comm` carries tensors between ranks, `launch` finds out which rank this process is and brings the ranks of a job
//! together, `io` reads and writes tensors in files and compares them. Nothing here exits the process, installs a
//! signal handler outside [`launch::spawn_ranks`], or writes to standard output.

pub mod comm;
pub mod cpu;
pub mod cuda;
pub mod elf;
pub mod io;
pub mod launch;
mod placement;
pub mod session;
pub mod state;
mod team;
