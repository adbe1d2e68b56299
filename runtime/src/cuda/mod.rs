//! The CUDA executor: one rank's program on one GPU, by the tables that came with it.
//!
//! `gpu` chooses the device and the machine code, `engine` holds what outlives runs (weights, kernels, working memory),
//! `prepared` and `plan` find out whose memory each value lies in and where, `exec` follows the steps of an entry in
//! their order, `graphs` puts many calls into the device's queue at once. What no kernel computes goes through the host: the CPU's kernels on copies of the operands. Collectives
//! go from device to device (`links`), or through the host by the same communicators; `beside` decides which of them travel
//! while the device computes.
//!
//! What must not live here: calls of NVIDIA's libraries, which are in `tpshard_driver`; inputs' names and checks,
//! entries, state across runs; see [`crate::session`].

mod beside;
mod cache;
mod calls;
mod engine;
mod exec;
mod gpu;
mod graphs;
mod links;
mod plan;
mod prepared;
mod tensor;

pub(crate) use engine::{Engine, Request};
pub(crate) use gpu::Surroundings;
pub(crate) use plan::Plan;
pub(crate) use tensor::DeviceTensor;
