//! The CPU executor: one rank's program on packed weights, fused elementwise kernels and strided values.
//!
//! `exec` walks the regions of a lowering; `constants` holds weights, packed where a matrix product takes them;
//! `convert` talks to the other ranks; everything else is kernels, each in a file of its own. What has no kernel goes to
//! the reference interpreter.
//!
//! What must not live here: inputs' names and checks, entries, state across runs; see [`crate::session`].

mod attention;
mod collect;
pub(crate) mod constants;
mod contraction;
mod conv;
pub(crate) mod convert;
pub(crate) mod deferred;
mod dequant;
pub(crate) mod exec;
mod gemm;
mod heap;
pub(crate) mod kernels;
mod movement;
mod pointwise;
mod reference;
mod rows;
mod scalar;
pub(crate) mod step;
pub(crate) mod value;
mod vector;
mod weights;

pub use weights::{FileWeights, MemoryWeights, WeightSource, check_weight};

pub(crate) use movement::write_into as write_row;

/// Whether the instructions that kernels are to use (`TPSHARD_ISA`) are there.
pub(crate) fn check_instructions() -> Result<(), String> {
    vector::Isa::chosen().map(drop)
}
