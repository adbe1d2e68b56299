//! Hashes by which ranks know that their weights belong together.

use super::stream::TensorRecord;
use sha2::{Digest, Sha256};

/// The hash of a set of shards: of how many ranks there are, and of every tensor's rank, name, dtype, slice and bytes.
///
/// Two builds with equal weights hashes can use each other's shards. Where a tensor lies in its file has no part in it.
pub fn weights_hash<'a>(
    ranks: usize,
    tensors: impl IntoIterator<Item = (usize, &'a TensorRecord)>,
) -> String {
    let mut ordered: Vec<(usize, &TensorRecord)> = tensors.into_iter().collect();
    ordered.sort_by(|a, b| (a.0, &a.1.name).cmp(&(b.0, &b.1.name)));
    let mut hash = Sha256::new();
    let mut field = |bytes: &[u8]| {
        // Lengths keep neighbouring fields apart.
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    field(b"tpshard weights 1");
    field(&(ranks as u64).to_le_bytes());
    for (rank, tensor) in ordered {
        field(&(rank as u64).to_le_bytes());
        field(tensor.name.as_bytes());
        field(tensor.dtype.name().as_bytes());
        field(format!("{:?} {:?}", tensor.global_shape, tensor.region).as_bytes());
        field(tensor.sha256.as_bytes());
    }
    hex(&hash.finalize())
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
