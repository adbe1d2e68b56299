//! Weight shards: each rank's slices of the model's weights, streamed into one safetensors file per rank.
//!
//! What a shard holds is a region of a lazy [`WeightExpr`]; [`region`] evaluates it chunk by chunk in row-major order
//! with a few megabytes of memory. [`stream`] goes through the initializers in the order they lie in the model file and
//! writes what every rank wants of one before it turns to the next, all ranks side by side, so that each page of the
//! model is read about once. [`safetensors`] lays the files out beforehand: all sizes are known.

mod cast;
pub mod hash;
mod packed;
pub mod region;
pub mod safetensors;
pub mod stream;
mod strided;

use bytes::Bytes;
use std::collections::BTreeMap;
use tpshard_ir::DType;
use tpshard_ir::weight::{WeightExpr, WeightExprError};

pub use region::Span;
pub use safetensors::ShardLayout;
pub use stream::{TensorRecord, WrittenWeights, write_shards};

/// Where the bytes of initializers come from, usually a mapped model file.
pub trait WeightSource {
    /// All bytes of an initializer: little-endian, row-major, packed types as ONNX packs them. Dropping them gives the
    /// memory behind them back.
    ///
    /// # Errors
    /// It does not exist or cannot be read.
    fn bytes(&self, initializer: &str) -> Result<Bytes, SourceError>;

    /// Says that an initializer's bytes were dropped; they may be asked for again.
    fn release(&self, initializer: &str) {
        let _ = initializer;
    }

    /// Where an initializer lies among the others, for reading them in order. Names break ties.
    fn position(&self, initializer: &str) -> u64 {
        let _ = initializer;
        0
    }
}

/// Why a source has no bytes; it names its file itself.
pub type SourceError = Box<dyn std::error::Error + Send + Sync>;

/// One tensor of one rank's shard file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardTensor {
    /// Its name in the file.
    pub name: String,
    /// The whole logical weight.
    pub weight: WeightExpr,
    /// What this rank holds of it: one span per dimension.
    pub region: Vec<Span>,
    /// More to say about it in the file's metadata.
    pub metadata: BTreeMap<String, String>,
}

impl ShardTensor {
    /// All of `weight`.
    pub fn whole(name: impl Into<String>, weight: WeightExpr) -> ShardTensor {
        let region = region::whole(weight.shape());
        ShardTensor { name: name.into(), weight, region, metadata: BTreeMap::new() }
    }

    /// Logical element type.
    pub fn dtype(&self) -> DType {
        self.weight.dtype()
    }

    /// Logical shape of this rank's part.
    pub fn shape(&self) -> Vec<usize> {
        self.region.iter().map(|span| span.length).collect()
    }
}

/// Why weights cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum WeightError {
    #[error("weight `{tensor}`: {error}")]
    Tensor { tensor: String, error: Box<WeightError> },
    #[error("initializer `{initializer}`: {error}")]
    Source { initializer: String, error: SourceError },
    #[error("initializer `{initializer}`: {shape:?} of {dtype} has {needed} bytes, the model holds {found}")]
    Length { initializer: String, dtype: DType, shape: Vec<usize>, needed: u64, found: u64 },
    #[error("{region:?} is not a region of shape {shape:?}")]
    Region { region: Vec<Span>, shape: Vec<usize> },
    #[error(
        "{what} does not fall on whole bytes of {dtype}, of which {per_byte} share a byte\n\
         help: split another dimension, or in units of {per_byte} (--pin)"
    )]
    Unaligned { what: String, dtype: DType, per_byte: usize },
    #[error(transparent)]
    Expression(#[from] WeightExprError),
    #[error("two tensors of rank {rank} are named `{name}`")]
    Duplicate { rank: usize, name: String },
    #[error("`{name}` cannot name a tensor of a safetensors file")]
    Name { name: String },
    #[error("rank {rank}: {what} is larger than a safetensors file may have\nhelp: use more ranks")]
    FileTooLarge { rank: usize, what: &'static str },
    #[error("{layouts} layouts and {files} files")]
    FileCount { layouts: usize, files: usize },
    #[error("rank {rank}: writing weights: {error}")]
    Write { rank: usize, error: std::io::Error },
}

impl WeightError {
    fn of(tensor: &str) -> impl FnOnce(WeightError) -> WeightError + use<'_> {
        move |error| WeightError::Tensor { tensor: tensor.into(), error: Box::new(error) }
    }
}
