//! What can go wrong with NVIDIA's libraries.

use std::path::PathBuf;

/// Why a library could not be used, or a call of it failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DriverError {
    #[error(
        "{library} was not found; looked for {names} in {places} and where the system's loader looks{reasons}\n  \
         help: {help}, or name its folder in TPSHARD_CUDA_PATH"
    )]
    NotFound { library: &'static str, names: String, places: String, reasons: String, help: &'static str },
    #[error("{} has no function `{symbol}`\n  help: install a newer version of it", library.display())]
    Symbol { library: PathBuf, symbol: &'static str },
    #[error("{} is of version {found}, needed is {needed} or newer\n  help: install a newer version of it", library.display())]
    Version { library: PathBuf, found: String, needed: String },
    #[error("{function} failed: {name} ({code}){detail}")]
    Call { function: &'static str, code: i32, name: String, detail: String },
    /// Kernel text that does not compile.
    #[error("the kernels do not compile for sm_{arch}: {log}")]
    Compile { arch: u32, log: String },
    /// A copy that does not lie within its memory.
    #[error("{bytes} bytes at {offset} do not lie in device memory of {size} bytes")]
    Bounds { offset: u64, bytes: u64, size: u64 },
    /// Work that will never be done.
    #[error("waiting for the GPU was given up: {why}")]
    Abandoned { why: String },
    #[error("`{name}` is not a name of a function")]
    Name { name: String },
}

impl DriverError {
    /// True if the device has too little memory left.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, DriverError::Call { code: crate::cuda::OUT_OF_MEMORY, .. })
    }
}
