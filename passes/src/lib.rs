//! Planning: from the logical graph to the typed SPMD program.
//!
//! What must not live here: protobuf, files, processes, devices.

mod balance;
pub mod canonical;
mod cases;
pub mod cost;
pub mod counters;
pub mod egraph;
mod emit;
pub mod extended;
pub mod extract;
pub mod fit;
pub mod layout_graph;
pub mod logical;
pub mod memory;
pub mod overlap;
pub mod places;
mod plan;
pub mod precision;
pub mod report;
pub mod segment;
pub mod sharding;
mod unplanned;

pub use balance::Balance;
pub use cases::{CasePlanning, plan_cases};
pub use cost::price::Entry;
pub use emit::EmitError;
pub use layout_graph::{Pin, PinError};
pub use plan::{MAX_RANKS, MemoryGoal, Plan, PlanError, PlanOptions, plan};
pub use report::PlanReport;
