//! The collectives, written once over any [`Transport`].
//!
//! Each works in rounds: every rank that has something to say posts one slot, then takes what it needs. Sizes of all
//! rounds follow from the arguments, which are the same on all ranks, so nothing is negotiated. `tensors` holds the
//! collectives on tensors, `blobs` those on byte strings whose length only their owner knows.

mod blobs;
mod tensors;

use super::record::{History, Kind, Record};
use super::transport::{Source, Step, Transport};
use super::{CommError, CommStats, Communicator, Group, Monitor, Monoid, Sharding, Tag};
use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::time::Instant;
use tpshard_ir::{DType, Tensor};

/// A [`Communicator`] over a transport.
pub struct Collectives<T> {
    transport: T,
    stats: RefCell<CommStats>,
    history: RefCell<History>,
    failure: RefCell<Option<CommError>>,
}

/// The arguments of one collective, as far as all kinds share them.
#[derive(Clone, Copy)]
struct Call<'a> {
    kind: Kind,
    group: &'a Group,
    tag: Tag,
    monoid: Option<Monoid>,
    dtype: Option<DType>,
    /// Elements of the whole, logical tensor.
    elements: usize,
    /// Digest of what else must agree.
    signature: u64,
}

impl<'a> Call<'a> {
    fn new(kind: Kind, group: &'a Group, tag: Tag) -> Call<'a> {
        Call { kind, group, tag, monoid: None, dtype: None, elements: 0, signature: 0 }
    }
}

/// A running collective, seen from one member.
struct Round<'a, T> {
    transport: &'a T,
    step: Step,
    ranks: &'a [usize],
    /// This rank's position in the group.
    me: usize,
    others: Vec<usize>,
    /// Payload bytes, for the counters.
    bytes: Cell<u64>,
}

impl<T: Transport> Round<'_, T> {
    fn alone(&self) -> bool {
        self.others.is_empty()
    }

    fn count(&self, bytes: usize) {
        if !self.alone() {
            self.bytes.set(self.bytes.get() + bytes as u64);
        }
    }

    fn step(&self, part: usize) -> Step {
        Step { part: part as u32, ..self.step }
    }

    /// Posts for all other members.
    fn post(&self, part: usize, len: usize, mut fill: impl FnMut(&mut [u8])) -> Result<(), CommError> {
        self.transport.post(&self.step(part), &self.others, len, &mut fill)
    }

    /// Takes from the members at these positions.
    fn take(
        &self,
        part: usize,
        from: impl Iterator<Item = (usize, usize)>,
        mut read: impl FnMut(&[&[u8]]),
    ) -> Result<(), CommError> {
        let sources: Vec<Source> =
            from.map(|(member, len)| Source { rank: self.ranks[member], len }).collect();
        self.transport.take(&self.step(part), &sources, &mut read)
    }

    /// Positions of all members but this one.
    fn peers(&self) -> impl Iterator<Item = usize> + use<T> {
        let me = self.me;
        (0..self.ranks.len()).filter(move |&i| i != me)
    }
}

/// The part of `len` bytes that goes in round `round`, with at most `cap` bytes a round: start and length.
fn window(len: usize, cap: usize, round: usize) -> (usize, usize) {
    let at = len.min(round * cap);
    (at, (len - at).min(cap))
}

/// Rounds needed for the longest of `lens`; at least one, so that empty tensors are still checked against each other.
fn rounds(lens: impl Iterator<Item = usize>, cap: usize) -> usize {
    lens.map(|len| len.div_ceil(cap)).max().unwrap_or(0).max(1)
}

/// A digest (FNV-1a) of numbers that must be the same on all ranks.
fn digest<'a>(parts: impl IntoIterator<Item = &'a [usize]>) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for part in parts {
        let words = std::iter::once(part.len()).chain(part.iter().copied());
        for byte in words.flat_map(|word| (word as u64).to_le_bytes()) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    hash
}

impl<T: Transport> Collectives<T> {
    pub fn new(transport: T) -> Collectives<T> {
        let history = History { rank: transport.rank(), ..History::default() };
        Collectives {
            transport,
            stats: RefCell::default(),
            history: RefCell::new(history),
            failure: RefCell::default(),
        }
    }

    /// Runs `body` as one collective: checks the group, keeps the books, and poisons everything if it fails.
    fn run<R>(
        &self,
        call: Call<'_>,
        body: impl FnOnce(&Round<'_, T>) -> Result<R, CommError>,
    ) -> Result<R, CommError> {
        if let Some(failure) = &*self.failure.borrow() {
            return Err(failure.clone());
        }
        let start = Instant::now();
        let result = self.round(&call).and_then(|round| {
            if !round.alone() {
                self.transport.enter(call.kind, call.tag);
            }
            self.history.borrow_mut().start(Record {
                kind: call.kind,
                tag: call.tag,
                monoid: call.monoid,
                dtype: call.dtype,
                bytes: 0,
                ranks: round.ranks.len(),
                done: false,
            });
            let result = body(&round);
            self.account(call.kind, round.bytes.get(), start, result.is_ok());
            result
        });
        if let Err(error) = &result {
            self.transport.abort(&error.to_string());
            *self.failure.borrow_mut() = Some(error.clone());
        }
        result
    }

    fn account(&self, kind: Kind, bytes: u64, start: Instant, done: bool) {
        self.history.borrow_mut().finish(bytes, done);
        let mut stats = self.stats.borrow_mut();
        let stats = stats.kinds.entry(kind).or_default();
        stats.collectives += u64::from(done);
        stats.bytes += bytes;
        stats.nanos += start.elapsed().as_nanos() as u64;
    }

    fn round<'a>(&'a self, call: &Call<'a>) -> Result<Round<'a, T>, CommError> {
        let (rank, world, ranks) = (self.transport.rank(), self.transport.world_size(), call.group.ranks());
        let usage = |what| CommError::Usage { what };
        if ranks.iter().any(|&r| r >= world) {
            return Err(usage(format!("group {ranks:?} leaves the world of {world} ranks")));
        }
        let me = call.group.position(rank);
        let me = me.ok_or_else(|| usage(format!("rank {rank} is not in group {ranks:?}")))?;
        let step = Step {
            kind: call.kind,
            tag: call.tag,
            part: 0,
            monoid: call.monoid,
            dtype: call.dtype,
            elements: call.elements as u64,
            signature: call.signature ^ digest([ranks]),
        };
        let others = ranks.iter().copied().filter(|&r| r != rank).collect();
        Ok(Round { transport: &self.transport, step, ranks, me, others, bytes: Cell::new(0) })
    }
}

impl<T: Transport> Communicator for Collectives<T> {
    fn rank(&self) -> usize {
        self.transport.rank()
    }

    fn world_size(&self) -> usize {
        self.transport.world_size()
    }

    fn all_reduce(
        &self,
        group: &Group,
        tag: Tag,
        monoid: Monoid,
        data: &mut Tensor,
    ) -> Result<(), CommError> {
        self.all_reduce(group, tag, monoid, data)
    }

    fn all_gather(
        &self,
        group: &Group,
        tag: Tag,
        dim: usize,
        extents: &[usize],
        local: &Tensor,
    ) -> Result<Tensor, CommError> {
        self.all_gather(group, tag, Sharding { dim, extents }, local)
    }

    fn reduce_scatter(
        &self,
        group: &Group,
        tag: Tag,
        monoid: Monoid,
        dim: usize,
        extents: &[usize],
        data: &Tensor,
    ) -> Result<Tensor, CommError> {
        self.reduce_scatter(group, tag, monoid, Sharding { dim, extents }, data)
    }

    fn all_to_all(
        &self,
        group: &Group,
        tag: Tag,
        split: Sharding<'_>,
        concat: Sharding<'_>,
        local: &Tensor,
    ) -> Result<Tensor, CommError> {
        self.all_to_all(group, tag, split, concat, local)
    }

    fn broadcast(&self, group: &Group, tag: Tag, root: usize, data: &mut Tensor) -> Result<(), CommError> {
        self.broadcast(group, tag, root, data)
    }

    fn broadcast_bytes(
        &self,
        group: &Group,
        tag: Tag,
        root: usize,
        data: &[u8],
    ) -> Result<Vec<u8>, CommError> {
        self.broadcast_bytes(group, tag, root, data)
    }

    fn scatter_bytes(
        &self,
        group: &Group,
        tag: Tag,
        root: usize,
        blobs: Option<&[Vec<u8>]>,
    ) -> Result<Vec<u8>, CommError> {
        self.scatter_bytes(group, tag, root, blobs)
    }

    fn gather_bytes(
        &self,
        group: &Group,
        tag: Tag,
        root: usize,
        data: &[u8],
    ) -> Result<Option<Vec<Vec<u8>>>, CommError> {
        self.gather_bytes(group, tag, root, data)
    }

    fn barrier(&self, group: &Group, tag: Tag) -> Result<(), CommError> {
        self.run(Call::new(Kind::Barrier, group, tag), |round| {
            if round.alone() {
                return Ok(());
            }
            round.post(0, 0, |_| {})?;
            round.take(0, round.peers().map(|i| (i, 0)), |_| {})
        })
    }

    fn progress(&self) {
        self.transport.progress();
    }

    fn abort(&self, reason: &str) {
        self.transport.abort(reason);
    }

    fn carried(&self, record: Record) {
        if record.ranks > 1 {
            self.transport.enter(record.kind, record.tag);
            self.transport.progress();
        }
        let mut stats = self.stats.borrow_mut();
        let stats = stats.kinds.entry(record.kind).or_default();
        stats.collectives += 1;
        stats.bytes += record.bytes;
        self.history.borrow_mut().start(record);
    }

    fn settled(&self, sequence: u64) {
        self.history.borrow_mut().settle(sequence);
    }

    fn monitor(&self) -> Arc<dyn Monitor> {
        self.transport.monitor()
    }

    fn stats(&self) -> CommStats {
        self.stats.borrow().clone()
    }

    fn history(&self) -> History {
        self.history.borrow().clone()
    }
}
