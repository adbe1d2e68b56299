//! What can go wrong between ranks, said so that the rank, the collective and the program node can be found.

use super::Tag;
use super::record::Kind;
use std::fmt;
use tpshard_ir::DType;

/// Why a collective, and with it the run, failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CommError {
    #[error(
        "rank {rank} ended while others still needed it\n  help: its own message, above or in its log, says why"
    )]
    PeerDied { rank: usize },
    #[error(
        "no progress for {seconds:.1} s in {kind} (step {}, node {}): {}\n  help: raise TPSHARD_TIMEOUT if the \
         ranks are only slow",
        tag.sequence, tag.node, list(missing)
    )]
    Stalled { kind: Kind, tag: Tag, seconds: f64, missing: Vec<Missing> },
    #[error("ranks disagree on what to do next: {ours}; {theirs}\n  help: all ranks must run the same build")]
    Mismatch { ours: Box<Brought>, theirs: Box<Brought> },
    #[error("rank {by} gave up: {reason}")]
    Poisoned { by: usize, reason: String },
    /// A collective between devices, of which the other ranks were told.
    #[error(
        "the collectives between GPUs failed on rank {rank}: {what}\n  help: with NCCL_DEBUG=WARN the library says \
         more; --comm shm carries collectives through host memory"
    )]
    Device { rank: usize, what: String },
    #[error("{what}")]
    Usage { what: String },
    #[error("cannot set up communication: {what}: {cause}")]
    System { what: &'static str, cause: String },
}

impl CommError {
    pub(super) fn system(what: &'static str, cause: impl fmt::Display) -> CommError {
        CommError::System { what, cause: cause.to_string() }
    }
}

/// A rank that others waited for in vain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    pub rank: usize,
    /// The collective it entered last, if it entered any.
    pub last: Option<(Kind, Tag)>,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.last {
            Some((kind, tag)) => {
                write!(f, "rank {} (last in {kind}, step {}, node {})", self.rank, tag.sequence, tag.node)
            }
            None => write!(f, "rank {} (in no collective yet)", self.rank),
        }
    }
}

fn list(missing: &[Missing]) -> String {
    let ranks: Vec<String> = missing.iter().map(ToString::to_string).collect();
    format!("waiting for {}", ranks.join(", "))
}

/// What one rank brought to a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Brought {
    pub rank: usize,
    pub kind: Option<Kind>,
    pub tag: Tag,
    pub part: u32,
    pub monoid: Option<&'static str>,
    pub dtype: Option<DType>,
    pub elements: u64,
    /// Digest of group, dims and extents.
    pub signature: u64,
    pub bytes: u64,
}

impl fmt::Display for Brought {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} brought ", self.rank)?;
        match self.kind {
            Some(kind) => write!(f, "{kind}")?,
            None => f.write_str("an unknown collective")?,
        }
        if let Some(monoid) = self.monoid {
            write!(f, "({monoid})")?;
        }
        write!(f, " step {} node {}", self.tag.sequence, self.tag.node)?;
        if let Some(dtype) = self.dtype {
            write!(f, " of {} x {dtype}", self.elements)?;
        }
        write!(f, " (part {}, {} bytes, layout {:016x})", self.part, self.bytes, self.signature)
    }
}
