//! Operators end to end: small models built in memory, lowered, and run in the reference interpreter.

mod borders;
mod refusals;
mod sizes;
mod support;
mod values;
