//! The intermediate representation of tpshard: what a model means, independent of files, planners and devices.
//!
//! A [`Graph`] is a single-assignment list of [`Op`]s over symbolic [`Dim`]s. The same type holds the logical model,
//! and what one rank of a group executes; a [`layout::Layout`] says how per-rank values stand for a logical one.
//!
//! What must not live here: files, protobuf, e-graphs, devices.

pub mod algorithms;
pub mod border;
pub mod container;
pub mod decompose;
pub mod deferred;
pub mod dim;
mod dtype;
pub mod graph;
pub mod infer;
pub mod interp;
pub mod layout;
pub mod op;
pub mod program;
pub mod spmd;
pub mod tensor;
pub mod text;
pub mod verify;
pub mod weight;
pub mod wording;

pub use border::{Border, Filling};
pub use decompose::decompose;
pub use deferred::{DeferredCall, Evaluator};
pub use dim::{Bindings, Dim, EvalError};
pub use dtype::{DType, DTypeClass, UnknownDType, float_to_integer};
pub use graph::{Case, Graph, Guard, Node, Output, Relation, StatePair, SymbolRange, Type, ValueId};
pub use infer::{InferError, infer};
pub use layout::{AxisLayout, Layout, Mesh, Monoid};
pub use op::{Conversion, Op, Scalar};
pub use spmd::{Equation, Spmd, SpmdOutput, Step, StepId, StepKind};
pub use tensor::{Data, Tensor, TensorError};
pub use verify::{Verified, VerifyErrors, verify, verify_program};
