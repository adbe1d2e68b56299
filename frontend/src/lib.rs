//! Reading ONNX.
//!
//! The way of a file: [`load`] maps it, walks its wire format within the [`Limits`], decodes it, turns it into the
//! [`model`] types with every tensor checked against its bytes, inlines model-local functions and validates and sorts
//! the graph. What comes out is a [`Model`]: a graph of operators in topological order whose names all resolve, whose
//! weights are ranges of mapped files, and whose nodes know the opset version they are written in.
//!
//! [`import`] goes on from there to the graph of `tpshard_ir`: [`lower()`] visits the nodes, the operators' lowerings are
//! in `ops`, one file per family.
//!
//! No planner, device or rank is known here.

mod convert;
pub mod deferred;
mod devices;
mod external;
mod functions;
mod limits;
mod load;
mod lower;
mod map;
mod ops;
mod sniff;
mod structure;
mod wire;

pub mod attributes;
pub mod error;
pub mod model;
pub mod proto;
pub mod tensor_data;

pub use attributes::{AttributeError, AttributeReader};
pub use devices::{Annotation, Sharding, annotations, pipeline_stages};
pub use error::{ErrorKind, Fault, LoadError, NodeSite, Site};
pub use external::Storage;
pub use limits::Limits;
pub use load::{IR_VERSIONS, OPSETS, load};
pub use lower::{
    Equality, ImportError, ImportOptions, ImportReport, Imported, MOST_CHOOSING, Named, OutputRequest,
    OutputRequestError, Part, Role, Selection, import, import_cases, lower, lower_cases,
};
pub use model::{
    Attribute, AttributeType, AttributeValue, Dim, Graph, Model, Node, TensorType, ValueInfo, ValueType,
};
pub use ops::supported as supported_operators;
pub use tensor_data::{TensorRef, TensorSource, read_tensor};
