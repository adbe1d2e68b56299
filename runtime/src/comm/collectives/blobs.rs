//! Collectives on byte strings: the owner's first post says how long they are.

use super::{Call, Collectives, Round, digest, rounds, window};
use crate::comm::record::Kind;
use crate::comm::transport::Transport;
use crate::comm::{CommError, Group, Tag};

/// Bytes of a length on the wire.
const LENGTH: usize = 8;

fn read_lengths(bytes: &[u8]) -> Vec<usize> {
    bytes.as_chunks::<LENGTH>().0.iter().map(|&raw| u64::from_le_bytes(raw) as usize).collect()
}

fn write_lengths(slot: &mut [u8], lengths: &[usize]) {
    for (raw, &length) in slot.as_chunks_mut::<LENGTH>().0.iter_mut().zip(lengths) {
        *raw = (length as u64).to_le_bytes();
    }
}

fn rooted(kind: Kind, group: &Group, tag: Tag, root: usize) -> Call<'_> {
    Call { signature: digest([[root].as_slice()]), ..Call::new(kind, group, tag) }
}

impl<T: Transport> Collectives<T> {
    pub(super) fn broadcast_bytes(
        &self,
        group: &Group,
        tag: Tag,
        root: usize,
        data: &[u8],
    ) -> Result<Vec<u8>, CommError> {
        self.run(rooted(Kind::BroadcastBytes, group, tag, root), |round| {
            let source = round.member(root)?;
            if round.me != source {
                return receive_broadcast(round, source);
            }
            if !round.alone() {
                round.count(data.len());
                round.post(0, LENGTH, |slot| write_lengths(slot, &[data.len()]))?;
                for (part, chunk) in data.chunks(round.transport.slot_bytes()).enumerate() {
                    round.post(part + 1, chunk.len(), |slot| slot.copy_from_slice(chunk))?;
                }
            }
            Ok(data.to_vec())
        })
    }

    pub(super) fn scatter_bytes(
        &self,
        group: &Group,
        tag: Tag,
        root: usize,
        blobs: Option<&[Vec<u8>]>,
    ) -> Result<Vec<u8>, CommError> {
        self.run(rooted(Kind::ScatterBytes, group, tag, root), |round| {
            let source = round.member(root)?;
            if round.me != source {
                return receive_scattered(round, source);
            }
            let blobs =
                blobs.filter(|blobs| blobs.len() == round.ranks.len()).ok_or_else(|| CommError::Usage {
                    what: format!("scatter needs one blob for each of {} ranks", round.ranks.len()),
                })?;
            if !round.alone() {
                send_scattered(round, blobs)?;
            }
            Ok(blobs[round.me].clone())
        })
    }

    pub(super) fn gather_bytes(
        &self,
        group: &Group,
        tag: Tag,
        root: usize,
        data: &[u8],
    ) -> Result<Option<Vec<Vec<u8>>>, CommError> {
        self.run(rooted(Kind::GatherBytes, group, tag, root), |round| {
            let target = round.member(root)?;
            if round.me == target {
                return receive_gathered(round, data).map(Some);
            }
            let reader = [root];
            round.count(data.len());
            let post = |part, len, fill: &mut dyn FnMut(&mut [u8])| {
                round.transport.post(&round.step(part), &reader, len, fill)
            };
            post(0, LENGTH, &mut |slot| write_lengths(slot, &[data.len()]))?;
            for (part, chunk) in data.chunks(round.transport.slot_bytes()).enumerate() {
                post(part + 1, chunk.len(), &mut |slot| slot.copy_from_slice(chunk))?;
            }
            Ok(None)
        })
    }
}

fn receive_broadcast<T: Transport>(round: &Round<'_, T>, root: usize) -> Result<Vec<u8>, CommError> {
    let mut len = 0;
    round.take(0, std::iter::once((root, LENGTH)), |slots| {
        len = slots.iter().flat_map(|slot| read_lengths(slot)).sum();
    })?;
    let cap = round.transport.slot_bytes();
    let mut data = Vec::new();
    for part in 0..len.div_ceil(cap) {
        let source = (root, window(len, cap, part).1);
        round.take(part + 1, std::iter::once(source), |slots| {
            slots.iter().for_each(|slot| data.extend_from_slice(slot));
        })?;
    }
    round.count(data.len());
    Ok(data)
}

/// Most bytes per member in a slot that holds a block for each.
fn block_cap<T: Transport>(round: &Round<'_, T>) -> usize {
    round.transport.slot_bytes() / round.ranks.len()
}

/// The blocks of a scatter round; the root keeps its own blob.
fn blocks(lengths: &[usize], root: usize, cap: usize, part: usize) -> Vec<(usize, usize)> {
    let block = |(i, &len): (usize, &usize)| if i == root { (0, 0) } else { window(len, cap, part) };
    lengths.iter().enumerate().map(block).collect()
}

fn send_scattered<T: Transport>(round: &Round<'_, T>, blobs: &[Vec<u8>]) -> Result<(), CommError> {
    let lengths: Vec<usize> = blobs.iter().map(Vec::len).collect();
    round.post(0, LENGTH * lengths.len(), |slot| write_lengths(slot, &lengths))?;
    let cap = block_cap(round);
    let others = round.peers().map(|i| lengths[i]);
    for part in 0..rounds(others, cap) {
        let blocks = blocks(&lengths, round.me, cap, part);
        let total: usize = blocks.iter().map(|b| b.1).sum();
        round.post(part + 1, total, |slot| {
            let mut to = 0;
            for (blob, &(at, len)) in blobs.iter().zip(&blocks) {
                slot[to..to + len].copy_from_slice(&blob[at..at + len]);
                to += len;
            }
        })?;
        round.count(total);
    }
    Ok(())
}

fn receive_scattered<T: Transport>(round: &Round<'_, T>, root: usize) -> Result<Vec<u8>, CommError> {
    let members = round.ranks.len();
    let mut lengths = vec![];
    round.take(0, std::iter::once((root, LENGTH * members)), |slots| {
        lengths = slots.iter().flat_map(|slot| read_lengths(slot)).collect();
    })?;
    let cap = block_cap(round);
    let others = (0..members).filter(|&i| i != root).map(|i| lengths[i]);
    let mut data = Vec::new();
    for part in 0..rounds(others, cap) {
        let blocks = blocks(&lengths, root, cap, part);
        let total = blocks.iter().map(|b| b.1).sum();
        let start: usize = blocks[..round.me].iter().map(|b| b.1).sum();
        round.take(part + 1, std::iter::once((root, total)), |slots| {
            slots.iter().for_each(|slot| data.extend_from_slice(&slot[start..start + blocks[round.me].1]));
        })?;
    }
    round.count(data.len());
    Ok(data)
}

fn receive_gathered<T: Transport>(round: &Round<'_, T>, own: &[u8]) -> Result<Vec<Vec<u8>>, CommError> {
    let mut blobs = vec![Vec::new(); round.ranks.len()];
    blobs[round.me] = own.to_vec();
    if round.alone() {
        return Ok(blobs);
    }
    let mut lengths = vec![0; round.ranks.len()];
    round.take(0, round.peers().map(|i| (i, LENGTH)), |slots| {
        for (i, slot) in round.peers().zip(slots) {
            lengths[i] = read_lengths(slot).into_iter().sum();
        }
    })?;
    let cap = round.transport.slot_bytes();
    for part in 0..rounds(lengths.iter().copied(), cap) {
        let senders: Vec<usize> = round.peers().filter(|&i| window(lengths[i], cap, part).1 > 0).collect();
        let sources = senders.iter().map(|&i| (i, window(lengths[i], cap, part).1));
        round.take(part + 1, sources, |slots| {
            for (&i, slot) in senders.iter().zip(slots) {
                blobs[i].extend_from_slice(slot);
            }
        })?;
    }
    round.count(blobs.iter().map(Vec::len).sum::<usize>() - own.len());
    Ok(blobs)
}
