//! What a GPU executes: kernels as CUDA C++, and for each entry the calls of them in order.
//!
//! [`attach`] walks the regions of an entry. A value is read where it lies ([`views`]); what has to be computed becomes a
//! call of a kernel that is written for how its operands lie and takes all sizes as arguments, so that a model of many
//! layers has the kernels of one. What no kernel here computes is left to the CPU's executor.
//!
//! | module | writes |
//! |---|---|
//! | [`elementwise`] | fused elementwise functions, quantised blocks |
//! | [`movement`] | copies, concatenations, pads |
//! | [`indexed`] | gathers and scatters |
//! | [`rows`] | softmax, norms, reductions, scans, the best entries |
//! | [`product`] | contractions |
//! | [`attention`] | attention with softmax on the way, rotary embeddings |
//! | [`windows`] | convolution and pooling |
//!
//! [`host_source`] makes the same text a program for a CPU, by which kernels are tested where there is no GPU. No driver
//! and no compiler is known here.

mod attention;
mod elementwise;
mod emit;
mod host;
mod indexed;
mod movement;
mod product;
mod rows;
mod scalar;
mod space;
mod text;
mod views;
mod windows;

pub use emit::attach;
pub use host::host_source;

/// What all kernels share.
const PRELUDE: &str = include_str!("prelude.cu");
