//! A loaded model, as the operators' importers see it.
//!
//! Plain data: every string is a name from the file, every tensor a checked reference to its bytes, every node knows
//! the opset version it was written in (a function body may differ from the model). Absent optional inputs and
//! outputs are empty names, as in ONNX; [`Node::input`] turns them into `None`.

use crate::attributes::AttributeReader;
use crate::error::{NodeSite, clip};
use crate::external::Storage;
use crate::proto::{DeviceConfigurationProto, NodeDeviceConfigurationProto};
use crate::tensor_data::TensorRef;
use bytes::Bytes;
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use tpshard_ir::DType;

/// A validated model.
#[derive(Clone, Debug)]
pub struct Model {
    /// The file it came from, as given.
    pub path: PathBuf,
    pub ir_version: i64,
    /// The imported version of each domain; the default domain is the empty string.
    pub opsets: BTreeMap<String, i64>,
    /// Name and version of the exporter.
    pub producer: String,
    pub graph: Graph,
    pub metadata: BTreeMap<String, String>,
    /// Device sets that the nodes' shardings refer to.
    pub device_configurations: Vec<DeviceConfigurationProto>,
    /// The bytes of all tensors.
    pub storage: Storage,
}

/// The main graph or the body of a control flow node.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Graph {
    pub name: String,
    /// In topological order after loading.
    pub nodes: Vec<Node>,
    /// What must be fed. Inputs that have an initializer are in `defaults`.
    pub inputs: Vec<ValueInfo>,
    /// Inputs that may be fed but have an initializer, which holds otherwise.
    pub defaults: Vec<ValueInfo>,
    pub outputs: Vec<ValueInfo>,
    pub initializers: BTreeMap<String, TensorRef>,
    /// What the exporter says about values in between; not to be relied upon.
    pub value_types: BTreeMap<String, ValueType>,
    pub metadata: BTreeMap<String, String>,
}

/// One operator call.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Node {
    /// May be empty and need not be unique.
    pub name: String,
    pub op_type: String,
    /// Empty for the default domain.
    pub domain: String,
    /// Selects one of several functions of the same name; empty for operators.
    pub overload: String,
    /// The version of `domain` that this node is written in.
    pub opset: i64,
    pub inputs: Vec<String>,
    pub outputs: Vec<String>,
    pub attributes: Vec<Attribute>,
    pub metadata: BTreeMap<String, String>,
    pub device_configurations: Vec<NodeDeviceConfigurationProto>,
}

/// A named attribute of a node.
#[derive(Clone, Debug, PartialEq)]
pub struct Attribute {
    pub name: String,
    pub value: AttributeValue,
}

/// The value of an attribute.
#[derive(Clone, Debug, PartialEq)]
pub enum AttributeValue {
    Float(f32),
    Int(i64),
    String(Bytes),
    Tensor(TensorRef),
    Graph(Box<Graph>),
    Floats(Vec<f32>),
    Ints(Vec<i64>),
    Strings(Vec<Bytes>),
    Tensors(Vec<TensorRef>),
    Graphs(Vec<Graph>),
    Type(ValueType),
    Types(Vec<ValueType>),
    /// Inside a function body: the value of the caller's attribute. Gone after loading.
    Reference {
        attribute: String,
        expected: AttributeType,
    },
}

/// The kinds of attribute values, as `AttributeProto.AttributeType` has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum AttributeType {
    Float,
    Int,
    String,
    Tensor,
    Graph,
    Floats,
    Ints,
    Strings,
    Tensors,
    Graphs,
    Type,
    Types,
}

/// A name with the type the file declares for it.
#[derive(Clone, Debug, PartialEq)]
pub struct ValueInfo {
    pub name: String,
    /// Absent where the file says nothing (allowed in subgraphs).
    pub value_type: Option<ValueType>,
    pub metadata: BTreeMap<String, String>,
}

/// The declared type of a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ValueType {
    Tensor(TensorType),
    /// A type that no program of ours holds (sequence, map, optional, sparse or string tensor), as ONNX writes it.
    Other(String),
}

/// Element type and declared shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorType {
    pub dtype: DType,
    /// `None`: not even the rank is known.
    pub shape: Option<Vec<Dim>>,
}

/// One declared dimension.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dim {
    Known(u64),
    /// Equal names are equal sizes.
    Symbol(String),
    Unknown,
}

impl Node {
    /// The name of input `index`, if it is given.
    pub fn input(&self, index: usize) -> Option<&str> {
        self.inputs.get(index).map(String::as_str).filter(|name| !name.is_empty())
    }

    /// The name of output `index`, if it is wanted.
    pub fn output(&self, index: usize) -> Option<&str> {
        self.outputs.get(index).map(String::as_str).filter(|name| !name.is_empty())
    }

    /// Typed access to the attributes that remembers which were asked for.
    pub fn attributes(&self) -> AttributeReader<'_> {
        AttributeReader::new(self)
    }

    /// The graphs among the attributes, in file order.
    pub fn subgraphs(&self) -> impl Iterator<Item = &Graph> {
        self.attributes.iter().flat_map(|attribute| attribute.value.graphs())
    }

    /// As [`Node::subgraphs`], for changing them.
    pub fn subgraphs_mut(&mut self) -> impl Iterator<Item = &mut Graph> {
        self.attributes.iter_mut().flat_map(|attribute| attribute.value.graphs_mut())
    }

    /// How error messages name this node.
    pub fn site(&self) -> NodeSite {
        NodeSite {
            name: clip(&self.name),
            op_type: clip(&self.op_type),
            domain: clip(&self.domain),
            opset: (self.opset > 0).then_some(self.opset),
            output: self
                .outputs
                .iter()
                .find(|name| !name.is_empty())
                .map_or_else(String::new, |name| clip(name)),
        }
    }
}

impl AttributeValue {
    pub fn attribute_type(&self) -> AttributeType {
        match self {
            AttributeValue::Float(_) => AttributeType::Float,
            AttributeValue::Int(_) => AttributeType::Int,
            AttributeValue::String(_) => AttributeType::String,
            AttributeValue::Tensor(_) => AttributeType::Tensor,
            AttributeValue::Graph(_) => AttributeType::Graph,
            AttributeValue::Floats(_) => AttributeType::Floats,
            AttributeValue::Ints(_) => AttributeType::Ints,
            AttributeValue::Strings(_) => AttributeType::Strings,
            AttributeValue::Tensors(_) => AttributeType::Tensors,
            AttributeValue::Graphs(_) => AttributeType::Graphs,
            AttributeValue::Type(_) => AttributeType::Type,
            AttributeValue::Types(_) => AttributeType::Types,
            AttributeValue::Reference { expected, .. } => *expected,
        }
    }

    fn graphs(&self) -> &[Graph] {
        match self {
            AttributeValue::Graph(graph) => std::slice::from_ref(graph),
            AttributeValue::Graphs(graphs) => graphs,
            _ => &[],
        }
    }

    fn graphs_mut(&mut self) -> &mut [Graph] {
        match self {
            AttributeValue::Graph(graph) => std::slice::from_mut(graph),
            AttributeValue::Graphs(graphs) => graphs,
            _ => &mut [],
        }
    }
}

impl AttributeType {
    pub fn name(self) -> &'static str {
        match self {
            AttributeType::Float => "float",
            AttributeType::Int => "int",
            AttributeType::String => "string",
            AttributeType::Tensor => "tensor",
            AttributeType::Graph => "graph",
            AttributeType::Floats => "floats",
            AttributeType::Ints => "ints",
            AttributeType::Strings => "strings",
            AttributeType::Tensors => "tensors",
            AttributeType::Graphs => "graphs",
            AttributeType::Type => "type",
            AttributeType::Types => "types",
        }
    }
}

impl fmt::Display for AttributeType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl ValueInfo {
    /// The declared tensor type, if it is one.
    pub fn tensor_type(&self) -> Option<&TensorType> {
        match &self.value_type {
            Some(ValueType::Tensor(tensor)) => Some(tensor),
            _ => None,
        }
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Dim::Known(size) => write!(f, "{size}"),
            Dim::Symbol(name) => write!(f, "{}", name.escape_debug()),
            Dim::Unknown => f.write_str("?"),
        }
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.dtype)?;
        let Some(shape) = &self.shape else { return f.write_str("[…]") };
        f.write_str("[")?;
        for (i, dim) in shape.iter().enumerate() {
            write!(f, "{}{dim}", if i == 0 { "" } else { ", " })?;
        }
        f.write_str("]")
    }
}

impl fmt::Display for ValueType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ValueType::Tensor(tensor) => write!(f, "{tensor}"),
            ValueType::Other(text) => f.write_str(text),
        }
    }
}
