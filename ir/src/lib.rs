//! The intermediate representation of tpshard: what a model means, independent of files, planners and devices.

mod dtype;
pub mod tensor;

pub use dtype::{DType, DTypeClass, UnknownDType};
pub use tensor::{Data, Tensor, TensorError};
