//! The checker: whether a typed SPMD program computes the model it was made from.
//!
//! A program is its own certificate: ground equations between logical values, and steps whose layouts are types. The
//! checker infers every type again, executes every distinct equation at random points of a prime field (or, where a rule
//! uses identities of the reals, in `f64`), closes the equations under congruence, and checks every step against a
//! table of its own. It depends on `tpshard-ir` only and shares no code with the planner.
//!
//! What must not live here: anything that chooses.

mod congruence;
mod conversion;
mod equations;
mod field;
mod finding;
mod holding;
mod program;
mod ranks;
mod square;
mod symbols;
mod table;
mod weights;

pub use finding::{Finding, Report};
pub use program::check;
pub use ranks::check_ranks;
