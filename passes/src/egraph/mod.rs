//! The e-graph: what equals what, by rules alone.
//!
//! Two uses. [`logical`] finds other ways to compute the values of a graph: composites opened into primitives, scales
//! moved through contractions. It runs once per distinct segment and is the only door through which such alternatives
//! come. [`layouts`] saturates the two layout schemas, squares and conversions; its fixpoint is known in closed form,
//! [`crate::layout_graph::build`] constructs it directly, and a test compares the two.
//!
//! Work is limited by nodes and iterations, never by time, so equal graphs give equal results.

pub mod layouts;
pub mod logical;
