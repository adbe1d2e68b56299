//! The transport over memory that all ranks can reach: threads of a process, or processes of a host.
//!
//! Every rank owns two slots. A post fills one and leaves a note in the mailbox of each reader; a reader counts what
//! it has taken, and a slot is filled again only when all its readers have taken it. All counters are per pair of
//! ranks, so that any two groups work side by side. A rank sleeps on one futex of its own, its *doorbell*, which
//! whoever changes something it may wait for rings.

mod endpoint;
mod memory;
mod region;

pub(super) use endpoint::Endpoint;
pub(super) use region::{Presence, Region};
