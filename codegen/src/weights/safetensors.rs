//! The layout of one rank's safetensors file, decided before a byte of weights is read.
//!
//! The format wants tensors without gaps between them, so alignment comes from order: the data starts at a multiple of
//! 64 (the header is padded with spaces), tensors whose length is a multiple of 64 come first, then those of 32, 16 and
//! so on, by name within each. Every tensor thus starts at least at a multiple of the largest power of two, up to 64,
//! that divides its own length: all weights of any size worth mapping at 64, and every element aligned.
//!
//! Packed types are stored as `U8` (the last dimension in bytes, or flat where it does not fill whole bytes); the
//! logical dtype is in the metadata. Hashes are known only after the data, but have a fixed length, so the header is laid
//! out with zeros in their place and written last.

use super::hash::hex;
use super::stream::TensorRecord;
use super::{ShardTensor, WeightError};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use tpshard_ir::DType;
use tpshard_ir::weight::{logical_dtype_key, logical_shape_key};

/// The data and as many tensors as possible start at multiples of this.
pub const ALIGNMENT: u64 = 64;
/// Readers refuse longer headers.
const MAX_HEADER: u64 = 100_000_000;
/// Version of what the metadata says.
const METADATA_VERSION: u32 = 1;
const PREFIX: u64 = 8;

/// Where everything goes in one rank's file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardLayout {
    rank: usize,
    ranks: usize,
    tensors: Vec<Placed>,
    header_length: u64,
    data_length: u64,
}

/// A tensor and its place, counted from the start of the data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Placed {
    pub(crate) tensor: ShardTensor,
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Entry {
    Metadata(BTreeMap<String, String>),
    Tensor { dtype: &'static str, shape: Vec<usize>, data_offsets: [u64; 2] },
}

#[derive(Serialize)]
struct TensorMetadata<'a> {
    dtype: &'static str,
    global_shape: &'a [usize],
    /// Start and length in each dimension of the global shape.
    slice: Vec<[usize; 2]>,
    source: String,
    sha256: String,
    #[serde(flatten)]
    more: BTreeMap<&'a str, &'a str>,
}

impl ShardLayout {
    /// Places `tensors` in the file of `rank` of `ranks`.
    ///
    /// # Errors
    /// A region outside its weight, a name that is taken or reserved, or more than the format can hold.
    pub fn new(rank: usize, ranks: usize, tensors: Vec<ShardTensor>) -> Result<ShardLayout, WeightError> {
        let mut names = BTreeSet::new();
        let mut placed = Vec::with_capacity(tensors.len());
        for tensor in tensors {
            if tensor.name.is_empty() || tensor.name == "__metadata__" {
                return Err(WeightError::Name { name: tensor.name });
            }
            if !names.insert(tensor.name.clone()) {
                return Err(WeightError::Duplicate { rank, name: tensor.name });
            }
            super::region::check(&tensor.region, tensor.weight.shape())
                .map_err(WeightError::of(&tensor.name))?;
            // The region lies in a weight whose size was checked when it was made.
            let elements = tensor.shape().iter().product::<usize>() as u64;
            let length = tensor.dtype().byte_len(elements).unwrap_or(u64::MAX);
            placed.push(Placed { tensor, offset: 0, length });
        }
        let divisor = |length: u64| 1u64 << length.trailing_zeros().min(ALIGNMENT.trailing_zeros());
        placed.sort_by(|a, b| (divisor(b.length), &a.tensor.name).cmp(&(divisor(a.length), &b.tensor.name)));
        let mut data_length = 0u64;
        for tensor in &mut placed {
            tensor.offset = data_length;
            data_length = data_length
                .checked_add(tensor.length)
                .filter(|&end| end <= i64::MAX as u64 - 2 * MAX_HEADER)
                .ok_or(WeightError::FileTooLarge { rank, what: "the data" })?;
        }
        let mut layout = ShardLayout { rank, ranks, tensors: placed, header_length: 0, data_length };
        let text = layout.header_text(&BTreeMap::new(), &hex(&[0; 32]))?;
        layout.header_length = (PREFIX + text.len() as u64).next_multiple_of(ALIGNMENT) - PREFIX;
        if layout.header_length > MAX_HEADER {
            return Err(WeightError::FileTooLarge { rank, what: "the header" });
        }
        Ok(layout)
    }

    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How many ranks the weights are split over.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// Length of the whole file.
    pub fn file_length(&self) -> u64 {
        self.data_start() + self.data_length
    }

    /// What there is to say of the file's tensors, given the hash of each by name; one without a hash gets none.
    pub fn records(&self, hashes: &BTreeMap<String, String>) -> Vec<TensorRecord> {
        let hash = |placed: &Placed| hashes.get(&placed.tensor.name).cloned().unwrap_or_default();
        super::stream::records(self, self.tensors.iter().map(hash))
    }

    pub(crate) fn data_start(&self) -> u64 {
        PREFIX + self.header_length
    }

    pub(crate) fn placed(&self) -> &[Placed] {
        &self.tensors
    }

    /// All that precedes the data. `hashes` are those of the tensors by name, in hexadecimal.
    pub(crate) fn header(
        &self,
        records: &[TensorRecord],
        weights_hash: &str,
    ) -> Result<Vec<u8>, WeightError> {
        let hashes = records.iter().map(|record| (record.name.as_str(), record.sha256.as_str())).collect();
        let mut bytes = self.header_length.to_le_bytes().to_vec();
        bytes.extend_from_slice(self.header_text(&hashes, weights_hash)?.as_bytes());
        bytes.resize(self.data_start() as usize, b' ');
        Ok(bytes)
    }

    fn header_text(&self, hashes: &BTreeMap<&str, &str>, weights_hash: &str) -> Result<String, WeightError> {
        let unknown = hex(&[0; 32]);
        let details: BTreeMap<&str, TensorMetadata<'_>> = self
            .tensors
            .iter()
            .map(|Placed { tensor, .. }| {
                let hash = hashes.get(tensor.name.as_str()).copied().unwrap_or(&unknown);
                (tensor.name.as_str(), metadata(tensor, hash))
            })
            .collect();
        let mut metadata: BTreeMap<String, String> = [
            ("format", "tpshard-weights".to_owned()),
            ("version", METADATA_VERSION.to_string()),
            ("rank", self.rank.to_string()),
            ("ranks", self.ranks.to_string()),
            ("weights_hash", weights_hash.to_owned()),
            ("tensors", self.json(&details)?),
        ]
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value))
        .collect();
        for Placed { tensor, length, .. } in &self.tensors {
            let (stored_as, _) = stored(tensor.dtype(), tensor.shape(), *length);
            if stored_as == "U8" && tensor.dtype() != DType::U8 {
                let shape: Vec<String> = tensor.shape().iter().map(usize::to_string).collect();
                metadata.insert(logical_dtype_key(&tensor.name), tensor.dtype().name().into());
                metadata.insert(logical_shape_key(&tensor.name), shape.join(","));
            }
        }
        let mut entries = BTreeMap::from([("__metadata__", Entry::Metadata(metadata))]);
        for Placed { tensor, offset, length } in &self.tensors {
            let (dtype, shape) = stored(tensor.dtype(), tensor.shape(), *length);
            let data_offsets = [*offset, offset + length];
            entries.insert(&tensor.name, Entry::Tensor { dtype, shape, data_offsets });
        }
        self.json(&entries)
    }

    fn json<T: Serialize>(&self, value: &T) -> Result<String, WeightError> {
        serde_json::to_string(value)
            .map_err(|error| WeightError::Write { rank: self.rank, error: error.into() })
    }
}

fn metadata<'a>(tensor: &'a ShardTensor, sha256: &str) -> TensorMetadata<'a> {
    // Extra entries never replace those the format itself defines.
    const OWN: [&str; 5] = ["dtype", "global_shape", "slice", "source", "sha256"];
    let more = tensor.metadata.iter().map(|(key, value)| (key.as_str(), value.as_str()));
    TensorMetadata {
        dtype: tensor.dtype().name(),
        global_shape: tensor.weight.shape(),
        slice: tensor.region.iter().map(|span| [span.start, span.length]).collect(),
        source: tensor.weight.to_string(),
        sha256: sha256.into(),
        more: more.filter(|(key, _)| !OWN.contains(key)).collect(),
    }
}

/// The dtype and shape a tensor has in the file.
fn stored(dtype: DType, mut shape: Vec<usize>, length: u64) -> (&'static str, Vec<usize>) {
    let name = match dtype {
        DType::F32 => "F32",
        DType::F16 => "F16",
        DType::BF16 => "BF16",
        DType::F64 => "F64",
        DType::I8 => "I8",
        DType::I16 => "I16",
        DType::I32 => "I32",
        DType::I64 => "I64",
        DType::U8 => "U8",
        DType::U16 => "U16",
        DType::U32 => "U32",
        DType::U64 => "U64",
        DType::Bool => "BOOL",
        DType::F8E4M3FN => "F8_E4M3",
        DType::F8E5M2 => "F8_E5M2",
        // Types that many readers of the format do not know: one byte each.
        DType::F8E4M3FNUZ | DType::F8E5M2FNUZ | DType::F8E8M0 => "U8",
        DType::I4 | DType::U4 | DType::I2 | DType::U2 | DType::F4E2M1 => {
            let per_byte = 8 / dtype.bits();
            match shape.last_mut() {
                Some(last) if last.is_multiple_of(per_byte) => *last /= per_byte,
                _ => shape = vec![length as usize],
            }
            "U8"
        }
    };
    (name, shape)
}
