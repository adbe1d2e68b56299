//! Planning: from the logical graph to the typed SPMD program.
//!
//! What must not live here: protobuf, files, processes, devices.

pub mod extended;
pub mod sharding;
