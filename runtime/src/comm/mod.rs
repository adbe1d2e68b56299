//! Collectives between the ranks of one program.
//!
//! A [`Communicator`] moves host tensors between ranks. The algorithms are written once ([`collectives`]) above a
//! small [`transport::Transport`]: a rank *posts* a bounded slot of bytes for some readers, and *takes* the slots that
//! others posted for it. `threads` (ranks in one process) and `shm` (processes on one host) are the same transport on
//! different memory; `solo` is the group of one.
//!
//! Reductions combine the ranks' values in group order, element by element, whatever the chunking: every rank gets
//! the same bits, and so does every run. Every posted slot carries what its rank believes the step to be, so ranks
//! that disagree get [`CommError::Mismatch`] instead of garbage. After any error the communicator is poisoned: all
//! ranks fail, and say why.
//!
//! What must not live here: knowledge of programs, layouts or plans.

mod bytes;
mod collectives;
mod error;
mod record;
mod reduce;
mod shared;
mod shm;
mod solo;
mod strided;
mod threads;
pub mod transport;

pub(crate) use bytes::{Filled, bytes};
pub use collectives::Collectives;
pub use error::{Brought, CommError, Missing};
pub use record::{CommStats, History, Kind, KindStats, Record};
pub use shm::{ShmLink, shm};
pub use solo::solo;
pub use threads::threads;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tpshard_ir::Tensor;

/// Ranks above this are refused everywhere.
pub const MAX_RANKS: usize = 1024;

/// Which program step a collective belongs to. All ranks of a step pass the same tag.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tag {
    /// Counts the collectives of a run.
    pub sequence: u64,
    /// The program node, for messages.
    pub node: u32,
}

/// How the ranks' values are combined.
///
/// On `bool`, `Sum` and `Max` are *or*, `Prod` and `Min` are *and*. Integers wrap. `f16` and `bf16` are accumulated in
/// `f32` and rounded once, except by NCCL, which rounds at every step. `Max` and `Min` hand NaN on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Monoid {
    Sum,
    Prod,
    Max,
    Min,
}

impl Monoid {
    /// The text name, e.g. `sum`.
    pub fn name(self) -> &'static str {
        match self {
            Monoid::Sum => "sum",
            Monoid::Prod => "prod",
            Monoid::Max => "max",
            Monoid::Min => "min",
        }
    }
}

/// The ranks that take part in a collective, in the order in which shards are concatenated and values are combined.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Group {
    ranks: Vec<usize>,
}

impl Group {
    /// Ranks `0 … world_size - 1`.
    pub fn world(world_size: usize) -> Group {
        Group { ranks: (0..world_size).collect() }
    }

    /// A group of distinct ranks.
    ///
    /// # Errors
    /// [`CommError::Usage`] if `ranks` is empty or names a rank twice.
    pub fn new(ranks: Vec<usize>) -> Result<Group, CommError> {
        if ranks.is_empty() || ranks.iter().collect::<BTreeSet<_>>().len() != ranks.len() {
            return Err(CommError::Usage { what: format!("a group needs distinct ranks, found {ranks:?}") });
        }
        Ok(Group { ranks })
    }

    /// The ranks, in group order.
    pub fn ranks(&self) -> &[usize] {
        &self.ranks
    }

    /// Number of ranks.
    #[allow(clippy::len_without_is_empty, reason = "a group is never empty")]
    pub fn len(&self) -> usize {
        self.ranks.len()
    }

    /// Where `rank` stands in the group.
    pub fn position(&self, rank: usize) -> Option<usize> {
        self.ranks.iter().position(|&r| r == rank)
    }
}

/// Settings of a communicator; every rank uses the same.
#[derive(Clone, Debug)]
pub struct CommOptions {
    /// Without progress of a rank that others wait for, the run is given up after this time.
    pub stall: Duration,
    /// Bytes a rank can have in flight per slot; two slots per rank are kept. Larger tensors go in pieces.
    pub slot_bytes: usize,
    /// How long a wait polls before it sleeps. `None`: 50 microseconds, or none if there are more ranks than cores.
    pub spin: Option<Duration>,
}

impl Default for CommOptions {
    fn default() -> Self {
        CommOptions { stall: Duration::from_secs(30), slot_bytes: 1 << 20, spin: None }
    }
}

/// A rank's end of the communication between all ranks.
///
/// Calls block until the collective is complete on this rank. Ranks issue the same collectives in the same order for
/// every group they share. `extents` give the size along the sharded dim of every member, in group order; they may
/// differ and may be zero.
pub trait Communicator: Send {
    fn rank(&self) -> usize;
    fn world_size(&self) -> usize;

    /// Replaces `data` by the combination of all members' `data`.
    fn all_reduce(&self, group: &Group, tag: Tag, monoid: Monoid, data: &mut Tensor)
    -> Result<(), CommError>;

    /// The members' tensors concatenated along `dim` in group order.
    fn all_gather(
        &self,
        group: &Group,
        tag: Tag,
        dim: usize,
        extents: &[usize],
        local: &Tensor,
    ) -> Result<Tensor, CommError>;

    /// Combines all members' `data` and returns this rank's run of `extents` along `dim`.
    fn reduce_scatter(
        &self,
        group: &Group,
        tag: Tag,
        monoid: Monoid,
        dim: usize,
        extents: &[usize],
        data: &Tensor,
    ) -> Result<Tensor, CommError>;

    /// Cuts `local` along `split.dim` into one piece per member, and concatenates the pieces received along
    /// `concat.dim`: a tensor sharded along `concat.dim` becomes one sharded along `split.dim`.
    fn all_to_all(
        &self,
        group: &Group,
        tag: Tag,
        split: Sharding<'_>,
        concat: Sharding<'_>,
        local: &Tensor,
    ) -> Result<Tensor, CommError>;

    /// Replaces `data` on all members by the root's; shape and type are the same everywhere.
    fn broadcast(&self, group: &Group, tag: Tag, root: usize, data: &mut Tensor) -> Result<(), CommError>;

    /// The root's bytes on every member; only the root's `data` is read.
    fn broadcast_bytes(
        &self,
        group: &Group,
        tag: Tag,
        root: usize,
        data: &[u8],
    ) -> Result<Vec<u8>, CommError>;

    /// The root's `blobs[i]` on the member at position `i`; others pass `None`.
    fn scatter_bytes(
        &self,
        group: &Group,
        tag: Tag,
        root: usize,
        blobs: Option<&[Vec<u8>]>,
    ) -> Result<Vec<u8>, CommError>;

    /// Every member's bytes in group order on the root, `None` elsewhere.
    fn gather_bytes(
        &self,
        group: &Group,
        tag: Tag,
        root: usize,
        data: &[u8],
    ) -> Result<Option<Vec<Vec<u8>>>, CommError>;

    /// Returns when every member has called it.
    fn barrier(&self, group: &Group, tag: Tag) -> Result<(), CommError>;

    /// Says that this rank is alive and at work, so that ranks waiting for it do not give up.
    fn progress(&self);

    /// Ends the run on all ranks with `reason`.
    fn abort(&self, reason: &str);

    /// Counts a collective that was carried by other means, such as between the memories of GPUs, as if it had been
    /// carried here: it has begun and counts, without the time it takes, and [`Communicator::settled`] says that it is done.
    fn carried(&self, record: Record);

    /// Says that the carried collective of this sequence number is done.
    fn settled(&self, sequence: u64);

    /// A look at the other ranks from any thread.
    fn monitor(&self) -> Arc<dyn Monitor>;

    /// What was communicated so far.
    fn stats(&self) -> CommStats;

    /// The last collectives, oldest first.
    fn history(&self) -> History;
}

/// How the other ranks are doing, for threads that wait for something which the communicator does not carry. Nothing
/// here waits.
pub trait Monitor: Send + Sync {
    /// What ended the run, or keeps one of the ranks `needed` from ever coming.
    fn failure(&self, needed: &[usize]) -> Option<CommError>;

    /// A number that changes whenever the rank does something.
    fn heartbeat(&self, rank: usize) -> u64;

    /// The rank and the collective it entered last, for messages.
    fn whereabouts(&self, rank: usize) -> Missing;

    /// Says that this rank is alive and at work.
    fn progress(&self);

    /// Ends the run on all ranks with `reason`.
    fn abort(&self, reason: &str);

    /// Without progress of a rank that others wait for, the run is given up after this time.
    fn stall(&self) -> Duration;
}

/// A dim cut into one run per member of a group.
#[derive(Clone, Copy, Debug)]
pub struct Sharding<'a> {
    pub dim: usize,
    /// Size of every member's run, in group order.
    pub extents: &'a [usize],
}
