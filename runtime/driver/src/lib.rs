//! NVIDIA's libraries, opened while the program runs: the driver (`libcuda`), the compiler (`libnvrtc`), the matrix
//! library (`libcublasLt`) and the library of collectives (`libnccl`).
//!
//! Nothing of CUDA is needed to build this or to start it. A library that is not there, or that lacks a function, is an
//! error value which says where was looked ([`SearchPath`]); libraries that were opened stay open for the life of the
//! process, because their threads may outlive whoever uses them.
//!
//! What must not live here: programs, tensors, ranks; see `tpshard_runtime::cuda`.

pub mod cublaslt;
pub mod cuda;
mod error;
mod library;
pub mod nccl;
pub mod nvrtc;
mod search;

pub use error::DriverError;
pub use search::{LIBRARY_PATH_VARIABLE, SearchPath};
