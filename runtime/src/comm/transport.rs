//! What carries bytes between ranks: bounded slots that one rank posts and others take.
//!
//! A post does not wait for its readers, only for those of the post before the last; a take waits until all its
//! sources have posted. So rounds in which every rank first posts and then takes cannot deadlock.

use super::error::Brought;
use super::record::Kind;
use super::{CommError, Monitor, Monoid, Tag};
use std::sync::Arc;
use tpshard_ir::DType;

/// What a rank believes it is doing; sent along with every slot and compared by every reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    pub kind: Kind,
    pub tag: Tag,
    /// Counts the posts of one collective.
    pub part: u32,
    pub monoid: Option<Monoid>,
    pub dtype: Option<DType>,
    pub elements: u64,
    /// Digest of everything else that must agree: group, root, dims, extents.
    pub signature: u64,
}

/// A slot to take: whose, and how long it must be.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    pub rank: usize,
    pub len: usize,
}

/// One rank's end.
pub trait Transport: Send {
    fn rank(&self) -> usize;
    fn world_size(&self) -> usize;
    /// Most bytes in one post.
    fn slot_bytes(&self) -> usize;

    /// Offers `len` bytes, written by `fill`, to `readers` (without this rank).
    fn post(
        &self,
        step: &Step,
        readers: &[usize],
        len: usize,
        fill: &mut dyn FnMut(&mut [u8]),
    ) -> Result<(), CommError>;

    /// Waits for the next post of every source and shows them to `read`, in the order of `sources`. This rank's own
    /// number stands for its latest post.
    fn take(&self, step: &Step, sources: &[Source], read: &mut dyn FnMut(&[&[u8]])) -> Result<(), CommError>;

    /// Says that a collective begins, for the messages of waiting ranks.
    fn enter(&self, kind: Kind, tag: Tag);
    /// Says that this rank is at work.
    fn progress(&self);
    /// Fails all ranks.
    fn abort(&self, reason: &str);
    /// A look at the other ranks from any thread.
    fn monitor(&self) -> Arc<dyn Monitor>;
}

/// Bytes of an encoded [`Step`] with its length.
pub const STEP_BYTES: usize = 48;

impl Step {
    /// The step of a post of `len` bytes, for the slot's header.
    pub fn encode(&self, len: usize) -> [u8; STEP_BYTES] {
        let mut out = [0; STEP_BYTES];
        let dtype =
            self.dtype.and_then(|d| DType::ALL.iter().position(|&x| x == d)).map_or(0, |i| i as u8 + 1);
        out[0..8].copy_from_slice(&self.tag.sequence.to_le_bytes());
        out[8..12].copy_from_slice(&self.tag.node.to_le_bytes());
        out[12..16].copy_from_slice(&self.part.to_le_bytes());
        out[16..24].copy_from_slice(&self.elements.to_le_bytes());
        out[24..32].copy_from_slice(&self.signature.to_le_bytes());
        out[32..40].copy_from_slice(&(len as u64).to_le_bytes());
        out[40] = self.kind as u8;
        out[41] = self.monoid.map_or(0, |m| m as u8 + 1);
        out[42] = dtype;
        out
    }

    /// The disagreement between this step and what `rank` posted.
    pub fn mismatch(&self, own: usize, len: usize, rank: usize, header: &[u8; STEP_BYTES]) -> CommError {
        CommError::Mismatch {
            ours: Box::new(decode(own, &self.encode(len))),
            theirs: Box::new(decode(rank, header)),
        }
    }
}

fn decode(rank: usize, header: &[u8; STEP_BYTES]) -> Brought {
    let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| header[at + i]));
    let half = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| header[at + i]));
    let monoids = [Monoid::Sum, Monoid::Prod, Monoid::Max, Monoid::Min];
    Brought {
        rank,
        kind: Kind::from_code(header[40]),
        tag: Tag { sequence: word(0), node: half(8) },
        part: half(12),
        monoid: usize::from(header[41]).checked_sub(1).and_then(|i| monoids.get(i)).map(|m| m.name()),
        dtype: usize::from(header[42]).checked_sub(1).and_then(|i| DType::ALL.get(i)).copied(),
        elements: word(16),
        signature: word(24),
        bytes: word(32),
    }
}
