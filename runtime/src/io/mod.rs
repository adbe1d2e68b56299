//! Tensors in files: reading and writing `.npz` and `.npy`, reading safetensors in place, and comparing sets of tensors.
//!
//! Files are hostile until read: every size is checked against the file and a limit before memory is taken.
//!
//! NumPy has no bfloat16: `bf16` tensors are written as `f32`, which is exact. Types narrower than a byte and the
//! 8-bit floats have no NumPy form and are refused.

mod compare;
mod error;
mod map;
mod npy;
mod npz;
mod safetensors;

pub use compare::{Comparison, OutputResult, Tolerance, Tolerances, Verdict, compare};
pub use error::IoError;
pub use npy::{read_npy, write_npy};
pub use npz::{read_npz, write_npz};
pub use safetensors::{KeyValues, SafeTensorsFile, TensorView, read_safetensors, write_safetensors};

use indexmap::IndexMap;
use std::path::Path;
use tpshard_ir::Tensor;

/// Tensors by name, in the order of the file.
pub type NamedTensors = IndexMap<String, Tensor>;

/// Bytes of tensors that one file may hold, unless the caller allows another number.
pub const DEFAULT_LIMIT: u64 = 16 << 30;

/// Reads `.npz`, or `.npy` as one tensor named after the file.
///
/// # Errors
/// [`IoError`] with the file, the entry and what is wrong with it.
pub fn read_tensors(path: &Path, limit: u64) -> Result<NamedTensors, IoError> {
    match path.extension().and_then(|e| e.to_str()) {
        Some("npz") => read_npz(path, limit),
        Some("npy") => {
            let name = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
            Ok(NamedTensors::from_iter([(name, read_npy(path, limit)?)]))
        }
        _ => Err(IoError::unsupported(path.display(), "the name ends neither in .npz nor in .npy")),
    }
}
