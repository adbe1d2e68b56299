//! Stands in for NVIDIA's libraries where there is no GPU: the functions of `libcuda`, `libnvrtc`, `libcublasLt` and
//! `libnccl` that the runtime calls, on the memory and the processor of the host.
//!
//! The compiler turns kernel text into a shared object by `g++` and the host shim of `tpshard_codegen::cuda`, and wraps
//! it as if it were machine code; the driver opens it again and calls the kernels in it, at once and one thread per
//! block. Collectives go through memory that processes share, in the order of streams, and wait for ranks that do not
//! come for as long as nobody aborts them. One library is all four: tests give it their names. It is no part of what is
//! shipped.
//!
//! `TPSHARD_STANDIN` holds what is to go wrong: words such as `devices=0` (see [`settings`]).

mod combine;
pub mod compiler;
pub mod driver;
pub mod graphs;
pub mod marks;
pub mod matrices;
mod memory;
mod modules;
pub mod nccl;
mod settings;
mod streams;
mod wires;
