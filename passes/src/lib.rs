//! Planning: from the logical graph to the typed SPMD program.
//!
//! What must not live here: protobuf, files, processes, devices.

pub mod cost;
pub mod extended;
pub mod extract;
pub mod layout_graph;
pub mod segment;
pub mod sharding;
