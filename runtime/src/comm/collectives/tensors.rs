//! Collectives on tensors: shapes are known to all ranks, so that every round's sizes are too.

use super::{Call, Collectives, Round, digest, rounds, window};
use crate::comm::bytes::{Filled, bytes};
use crate::comm::record::Kind;
use crate::comm::reduce::{reduce, reducible};
use crate::comm::strided::Strided;
use crate::comm::transport::Transport;
use crate::comm::{CommError, Group, Monoid, Sharding, Tag};
use tpshard_ir::{DType, Tensor, tensor::element_count};

/// From this size on, more than two ranks share the work of an all-reduce: each combines a part, and the parts are
/// gathered. Below, one exchange with everybody combining everything is faster.
const SHARED_REDUCTION: usize = 32 << 10;

fn usage(what: String) -> CommError {
    CommError::Usage { what }
}

fn reducible_or(dtype: DType, what: &str) -> Result<(), CommError> {
    if reducible(dtype) {
        Ok(())
    } else {
        Err(usage(format!("{what} of {dtype}: a storage type has no arithmetic")))
    }
}

fn with_dim(shape: &[usize], dim: usize, size: usize) -> Result<Vec<usize>, CommError> {
    let mut shape = shape.to_vec();
    let slot = shape.get_mut(dim);
    *slot.ok_or_else(|| usage(format!("dim {dim} does not exist in a tensor of lower rank")))? = size;
    element_count(&shape).ok_or_else(|| usage(format!("shape {shape:?} is too large")))?;
    Ok(shape)
}

impl Sharding<'_> {
    fn total(&self) -> Result<usize, CommError> {
        let total = self.extents.iter().try_fold(0usize, |sum, &e| sum.checked_add(e));
        total.ok_or_else(|| usage("extents overflow".into()))
    }

    fn check_members(&self, members: usize) -> Result<(), CommError> {
        if self.extents.len() == members {
            return Ok(());
        }
        Err(usage(format!("{} extents for a group of {members}", self.extents.len())))
    }

    fn check_size(&self, shape: &[usize], expected: usize) -> Result<(), CommError> {
        match shape.get(self.dim) {
            Some(&size) if size == expected => Ok(()),
            _ => Err(usage(format!("dim {} of shape {shape:?} should be {expected}", self.dim))),
        }
    }

    /// Every member's run in a tensor of this shape.
    fn runs(&self, dtype: DType, shape: &[usize]) -> Result<Vec<Strided>, CommError> {
        let mut start = 0;
        let mut runs = Vec::with_capacity(self.extents.len());
        for &extent in self.extents {
            runs.push(Strided::new(dtype, shape, self.dim, start, extent)?);
            start += extent;
        }
        Ok(runs)
    }
}

fn finish(filled: Filled, shape: Vec<usize>) -> Result<Tensor, CommError> {
    filled.finish(shape).map_err(|e| usage(e.to_string()))
}

fn zeros(dtype: DType, shape: &[usize]) -> Result<Filled, CommError> {
    let count = element_count(shape).ok_or_else(|| usage(format!("shape {shape:?} is too large")))?;
    Ok(Filled::zeros(dtype, count))
}

impl<T: Transport> Collectives<T> {
    pub(super) fn all_reduce(
        &self,
        group: &Group,
        tag: Tag,
        monoid: Monoid,
        data: &mut Tensor,
    ) -> Result<(), CommError> {
        let (dtype, shape) = (data.dtype(), data.shape().to_vec());
        let call = Call {
            monoid: Some(monoid),
            dtype: Some(dtype),
            elements: data.len(),
            signature: digest([shape.as_slice()]),
            ..Call::new(Kind::AllReduce, group, tag)
        };
        self.run(call, |round| {
            reducible_or(dtype, "all-reduce")?;
            if round.alone() {
                return Ok(());
            }
            let mut filled = Filled::from_tensor(std::mem::replace(data, Tensor::scalar(0u8)));
            round.count(filled.bytes_mut().len());
            let shared = round.others.len() > 1 && filled.bytes_mut().len() >= SHARED_REDUCTION;
            let result = if shared {
                reduce_shared(round, dtype, monoid, filled.bytes_mut())
            } else {
                reduce_directly(round, dtype, monoid, filled.bytes_mut())
            };
            *data = finish(filled, shape)?;
            result
        })
    }

    pub(super) fn all_gather(
        &self,
        group: &Group,
        tag: Tag,
        shard: Sharding<'_>,
        local: &Tensor,
    ) -> Result<Tensor, CommError> {
        let dtype = local.dtype();
        let total = shard.total()?;
        let shape = with_dim(local.shape(), shard.dim, total);
        let shape = self.checked(group, tag, Kind::AllGather, shape)?;
        let call = Call {
            dtype: Some(dtype),
            elements: shape.iter().product(),
            signature: digest([shape.as_slice(), &[shard.dim], shard.extents]),
            ..Call::new(Kind::AllGather, group, tag)
        };
        self.run(call, |round| {
            shard.check_members(round.ranks.len())?;
            shard.check_size(local.shape(), shard.extents[round.me])?;
            let runs = shard.runs(dtype, &shape)?;
            let mut filled = zeros(dtype, &shape)?;
            gather(round, &runs, bytes(local.data()), filled.bytes_mut())?;
            finish(filled, shape)
        })
    }

    pub(super) fn reduce_scatter(
        &self,
        group: &Group,
        tag: Tag,
        monoid: Monoid,
        shard: Sharding<'_>,
        data: &Tensor,
    ) -> Result<Tensor, CommError> {
        let dtype = data.dtype();
        let call = Call {
            monoid: Some(monoid),
            dtype: Some(dtype),
            elements: data.len(),
            signature: digest([data.shape(), &[shard.dim], shard.extents]),
            ..Call::new(Kind::ReduceScatter, group, tag)
        };
        self.run(call, |round| {
            reducible_or(dtype, "reduce-scatter")?;
            shard.check_members(round.ranks.len())?;
            shard.check_size(data.shape(), shard.total()?)?;
            let shape = with_dim(data.shape(), shard.dim, shard.extents[round.me])?;
            let runs = shard.runs(dtype, data.shape())?;
            let mut filled = zeros(dtype, &shape)?;
            scatter_reduced(round, (dtype, monoid), &runs, bytes(data.data()), filled.bytes_mut())?;
            finish(filled, shape)
        })
    }

    pub(super) fn all_to_all(
        &self,
        group: &Group,
        tag: Tag,
        split: Sharding<'_>,
        concat: Sharding<'_>,
        local: &Tensor,
    ) -> Result<Tensor, CommError> {
        let dtype = local.dtype();
        let total = concat.total()?;
        let whole = with_dim(local.shape(), concat.dim, total);
        let whole = self.checked(group, tag, Kind::AllToAll, whole)?;
        let call = Call {
            dtype: Some(dtype),
            elements: whole.iter().product(),
            signature: digest([whole.as_slice(), &[split.dim, concat.dim], split.extents, concat.extents]),
            ..Call::new(Kind::AllToAll, group, tag)
        };
        self.run(call, |round| {
            if split.dim == concat.dim {
                return Err(usage(format!("all-to-all from dim {} to itself", split.dim)));
            }
            split.check_members(round.ranks.len())?;
            concat.check_members(round.ranks.len())?;
            split.check_size(local.shape(), split.total()?)?;
            concat.check_size(local.shape(), concat.extents[round.me])?;
            let shape = with_dim(&whole, split.dim, split.extents[round.me])?;
            let outgoing = split.runs(dtype, local.shape())?;
            let incoming = concat.runs(dtype, &shape)?;
            let sizes = PieceSizes::new(dtype, &whole, split, concat)?;
            let mut filled = zeros(dtype, &shape)?;
            exchange(round, &sizes, (&outgoing, bytes(local.data())), (&incoming, filled.bytes_mut()))?;
            finish(filled, shape)
        })
    }

    pub(super) fn broadcast(
        &self,
        group: &Group,
        tag: Tag,
        root: usize,
        data: &mut Tensor,
    ) -> Result<(), CommError> {
        let shape = data.shape().to_vec();
        let call = Call {
            dtype: Some(data.dtype()),
            elements: data.len(),
            signature: digest([shape.as_slice(), &[root]]),
            ..Call::new(Kind::Broadcast, group, tag)
        };
        self.run(call, |round| {
            let source = round.member(root)?;
            if round.alone() {
                return Ok(());
            }
            let mut filled = Filled::from_tensor(std::mem::replace(data, Tensor::scalar(0u8)));
            round.count(filled.bytes_mut().len());
            let result = spread(round, source, filled.bytes_mut());
            *data = finish(filled, shape)?;
            result
        })
    }

    /// A shape that could not be computed fails the collective like any other error.
    fn checked<R>(
        &self,
        group: &Group,
        tag: Tag,
        kind: Kind,
        value: Result<R, CommError>,
    ) -> Result<R, CommError> {
        match value {
            Ok(value) => Ok(value),
            Err(error) => self.run(Call::new(kind, group, tag), |_| Err(error)),
        }
    }
}

impl<T: Transport> Round<'_, T> {
    /// Position of a rank that must be in the group.
    pub(super) fn member(&self, rank: usize) -> Result<usize, CommError> {
        let position = self.ranks.iter().position(|&r| r == rank);
        position.ok_or_else(|| usage(format!("root {rank} is not in group {:?}", self.ranks)))
    }
}

/// Everybody posts everything and combines everything.
fn reduce_directly<T: Transport>(
    round: &Round<'_, T>,
    dtype: DType,
    monoid: Monoid,
    data: &mut [u8],
) -> Result<(), CommError> {
    let cap = round.transport.slot_bytes();
    for part in 0..rounds(std::iter::once(data.len()), cap) {
        let (at, len) = window(data.len(), cap, part);
        let chunk = &mut data[at..at + len];
        round.post(part, len, |out| out.copy_from_slice(chunk))?;
        round.take(part, (0..round.ranks.len()).map(|i| (i, len)), |slots| {
            reduce(dtype, monoid, slots, chunk);
        })?;
    }
    Ok(())
}

/// Everybody posts everything, combines one part of it, and posts that.
fn reduce_shared<T: Transport>(
    round: &Round<'_, T>,
    dtype: DType,
    monoid: Monoid,
    data: &mut [u8],
) -> Result<(), CommError> {
    let (cap, members) = (round.transport.slot_bytes(), round.ranks.len());
    for part in 0..rounds(std::iter::once(data.len()), cap) {
        let (at, len) = window(data.len(), cap, part);
        let chunk = &mut data[at..at + len];
        // Whole cache lines, which are whole elements of every type.
        let share = len.div_ceil(members).next_multiple_of(64);
        let (own, own_len) = window(len, share, round.me);
        round.post(2 * part, len, |out| out.copy_from_slice(chunk))?;
        let own_part = &mut chunk[own..own + own_len];
        round.take(2 * part, (0..members).map(|i| (i, len)), |slots| {
            let parts: Vec<&[u8]> = slots.iter().map(|slot| &slot[own..own + own_len]).collect();
            reduce(dtype, monoid, &parts, own_part);
        })?;
        let parts: Vec<(usize, usize)> = (0..members).map(|i| window(len, share, i)).collect();
        round.post(2 * part + 1, own_len, |out| out.copy_from_slice(&chunk[own..own + own_len]))?;
        let sources = round.peers().map(|i| (i, parts[i].1));
        round.take(2 * part + 1, sources, |slots| {
            for (i, slot) in round.peers().zip(slots) {
                let (at, len) = parts[i];
                chunk[at..at + len].copy_from_slice(slot);
            }
        })?;
    }
    Ok(())
}

fn gather<T: Transport>(
    round: &Round<'_, T>,
    runs: &[Strided],
    local: &[u8],
    out: &mut [u8],
) -> Result<(), CommError> {
    runs[round.me].unpack(local, 0, out);
    if round.alone() {
        return Ok(());
    }
    round.count(out.len() - local.len());
    let cap = round.transport.slot_bytes();
    for part in 0..rounds(runs.iter().map(Strided::len), cap) {
        let (at, len) = window(local.len(), cap, part);
        round.post(part, len, |slot| slot.copy_from_slice(&local[at..at + len]))?;
        let sources = round.peers().map(|i| (i, window(runs[i].len(), cap, part).1));
        round.take(part, sources, |slots| {
            for (i, slot) in round.peers().zip(slots) {
                runs[i].unpack(slot, window(runs[i].len(), cap, part).0, out);
            }
        })?;
    }
    Ok(())
}

/// Every slot holds a block for each member; a member combines its blocks.
fn scatter_reduced<T: Transport>(
    round: &Round<'_, T>,
    (dtype, monoid): (DType, Monoid),
    runs: &[Strided],
    data: &[u8],
    out: &mut [u8],
) -> Result<(), CommError> {
    if round.alone() {
        runs[round.me].pack(data, 0, out);
        return Ok(());
    }
    round.count(data.len() - out.len());
    let members = round.ranks.len();
    let cap = block_cap(round.transport.slot_bytes(), members);
    for part in 0..rounds(runs.iter().map(Strided::len), cap) {
        let blocks: Vec<(usize, usize)> = runs.iter().map(|run| window(run.len(), cap, part)).collect();
        let total = blocks.iter().map(|b| b.1).sum();
        round.post(part, total, |slot| fill_blocks(slot, runs, &blocks, data))?;
        let (at, len) = blocks[round.me];
        let own: usize = blocks[..round.me].iter().map(|b| b.1).sum();
        round.take(part, (0..members).map(|i| (i, total)), |slots| {
            let parts: Vec<&[u8]> = slots.iter().map(|slot| &slot[own..own + len]).collect();
            reduce(dtype, monoid, &parts, &mut out[at..at + len]);
        })?;
    }
    Ok(())
}

/// Most bytes per member in a slot shared by all: whole cache lines, so whole elements.
fn block_cap(slot: usize, members: usize) -> usize {
    slot / members / 64 * 64
}

fn fill_blocks(slot: &mut [u8], runs: &[Strided], blocks: &[(usize, usize)], data: &[u8]) {
    let mut to = 0;
    for (run, &(at, len)) in runs.iter().zip(blocks) {
        run.pack(data, at, &mut slot[to..to + len]);
        to += len;
    }
}

/// Bytes of the piece that goes from one member to another in an all-to-all.
struct PieceSizes<'a> {
    /// Bytes of a piece of extent one in both dims, in bits to serve packed types.
    unit_bits: usize,
    split: &'a [usize],
    concat: &'a [usize],
}

impl<'a> PieceSizes<'a> {
    fn new(
        dtype: DType,
        whole: &[usize],
        split: Sharding<'a>,
        concat: Sharding<'a>,
    ) -> Result<PieceSizes<'a>, CommError> {
        let unit = with_dim(&with_dim(whole, split.dim, 1)?, concat.dim, 1)?;
        let unit_bits = unit.iter().product::<usize>().checked_mul(dtype.bits());
        let unit_bits = unit_bits.ok_or_else(|| usage(format!("shape {whole:?} is too large")))?;
        Ok(PieceSizes { unit_bits, split: split.extents, concat: concat.extents })
    }

    fn len(&self, from: usize, to: usize) -> usize {
        self.unit_bits * self.concat[from] * self.split[to] / 8
    }

    /// Blocks that `from` posts in a round, one per member, its own empty.
    fn blocks(&self, from: usize, cap: usize, round: usize) -> Vec<(usize, usize)> {
        let members = self.split.len();
        (0..members)
            .map(|to| if to == from { (0, 0) } else { window(self.len(from, to), cap, round) })
            .collect()
    }
}

fn exchange<T: Transport>(
    round: &Round<'_, T>,
    sizes: &PieceSizes<'_>,
    (outgoing, local): (&[Strided], &[u8]),
    (incoming, out): (&[Strided], &mut [u8]),
) -> Result<(), CommError> {
    let mut own = vec![0; outgoing[round.me].len()];
    outgoing[round.me].pack(local, 0, &mut own);
    incoming[round.me].unpack(&own, 0, out);
    if round.alone() {
        return Ok(());
    }
    round.count(out.len() - own.len());
    let members = round.ranks.len();
    let cap = block_cap(round.transport.slot_bytes(), members);
    let pairs = (0..members).flat_map(|i| (0..members).map(move |j| (i, j))).filter(|(i, j)| i != j);
    for part in 0..rounds(pairs.map(|(i, j)| sizes.len(i, j)), cap) {
        let blocks: Vec<_> = (0..members).map(|from| sizes.blocks(from, cap, part)).collect();
        let total = |from: usize| blocks[from].iter().map(|b| b.1).sum::<usize>();
        round.post(part, total(round.me), |slot| fill_blocks(slot, outgoing, &blocks[round.me], local))?;
        round.take(part, round.peers().map(|i| (i, total(i))), |slots| {
            for (from, slot) in round.peers().zip(slots) {
                let start: usize = blocks[from][..round.me].iter().map(|b| b.1).sum();
                let (at, len) = blocks[from][round.me];
                incoming[from].unpack(&slot[start..start + len], at, out);
            }
        })?;
    }
    Ok(())
}

fn spread<T: Transport>(round: &Round<'_, T>, root: usize, data: &mut [u8]) -> Result<(), CommError> {
    let cap = round.transport.slot_bytes();
    for part in 0..rounds(std::iter::once(data.len()), cap) {
        let (at, len) = window(data.len(), cap, part);
        let chunk = &mut data[at..at + len];
        if round.me == root {
            round.post(part, len, |slot| slot.copy_from_slice(chunk))?;
        } else {
            round.take(part, std::iter::once((root, len)), |slots| {
                slots.iter().for_each(|slot| chunk.copy_from_slice(slot));
            })?;
        }
    }
    Ok(())
}
