//! How the processes of a job find out who they are and find each other.
//!
//! [`find_place`] reads rank and world size from flags or from the variables of the launcher that started the process
//! (pure, over a map). [`connect`] brings the ranks of one host together over a Unix socket named after the job,
//! makes sure that they are about to run the same thing, and returns their communicator. [`spawn_ranks`] is the
//! launcher for when there is none.

mod agreement;
mod child;
mod place;
mod rendezvous;
mod spawn;

pub use agreement::{Agreement, Difference};
pub use place::{Flags, JobKey, LaunchError, Place, Source, find_place, job_key};
pub use rendezvous::{Refusal, Rendezvous, connect, is_this_host};
pub use spawn::{SpawnError, spawn_ranks};

/// The variable that names the meeting point: any value that all ranks of a job share and no other job has.
pub const RENDEZVOUS_VARIABLE: &str = "TPSHARD_RENDEZVOUS";
/// The variable for the patience in seconds, at the rendezvous and in collectives.
pub const TIMEOUT_VARIABLE: &str = "TPSHARD_TIMEOUT";
