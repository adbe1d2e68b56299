//! Reading a node's attributes.
//!
//! An importer asks for each attribute it knows, by type, and then calls [`AttributeReader::finish`], which refuses
//! attributes nobody asked for: a silently ignored attribute is a wrong result.
//!
//! ```text
//! let attributes = node.attributes();
//! let axis = attributes.int("axis", -1)?;
//! let pads = attributes.optional_ints("pads")?;
//! attributes.finish()?;
//! ```

use crate::error::{Fault, NodeSite, quote};
use crate::model::{Attribute, AttributeType, AttributeValue, Graph, Node, ValueType};
use crate::tensor_data::TensorRef;
use std::cell::Cell;

/// An attribute is not what its operator asks for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{node}: {problem}")]
pub struct AttributeError {
    pub node: Box<NodeSite>,
    pub problem: AttributeProblem,
}

/// What is wrong with an attribute.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AttributeProblem {
    #[error("the attribute {} is missing", quote(.0))]
    Missing(String),
    #[error("the attribute {} is of type {found}, the operator wants {expected}", quote(.name))]
    Type { name: String, expected: AttributeType, found: AttributeType },
    #[error("the attribute {} is not UTF-8 text", quote(.0))]
    NotText(String),
    #[error("the attribute {} is {value}, the operator wants 0 or 1", quote(.name))]
    NotBool { name: String, value: i64 },
    #[error("the attribute {} is not one this operator has at this opset", quote(.0))]
    Unknown(String),
}

impl From<AttributeError> for Fault {
    fn from(error: AttributeError) -> Fault {
        let help = match &error.problem {
            AttributeProblem::Unknown(_) => {
                "export again with an opset that has it, or remove the attribute if it has no effect"
            }
            _ => "the model breaks the operator's specification; export it again",
        };
        let name = match &error.problem {
            AttributeProblem::Missing(name)
            | AttributeProblem::NotText(name)
            | AttributeProblem::Unknown(name)
            | AttributeProblem::Type { name, .. }
            | AttributeProblem::NotBool { name, .. } => name,
        };
        Fault::invalid(error.problem.to_string(), help).at_value(name).at_node(*error.node)
    }
}

/// Typed access to one node's attributes.
#[derive(Debug)]
pub struct AttributeReader<'a> {
    node: &'a Node,
    used: Vec<Cell<bool>>,
}

type Read<T> = Result<T, AttributeError>;

/// The three forms of access to one type: with a default, optional, required.
macro_rules! accessors {
    ($($kind:ident($pattern:pat => $value:expr): $ty:ty, $with_default:ident $optional:ident $required:ident;)*) => {$(
        #[doc = concat!("The ", stringify!($with_default), " attribute `name`, or `default` where it is absent.")]
        ///
        /// # Errors
        /// If it has another type.
        pub fn $with_default(&self, name: &str, default: $ty) -> Read<$ty> {
            Ok(self.$optional(name)?.unwrap_or(default))
        }

        #[doc = concat!("The ", stringify!($with_default), " attribute `name`, if there is one.")]
        ///
        /// # Errors
        /// If it has another type.
        pub fn $optional(&self, name: &str) -> Read<Option<$ty>> {
            match self.get(name) {
                None => Ok(None),
                Some($pattern) => Ok(Some($value)),
                Some(other) => Err(self.wrong_type(name, AttributeType::$kind, other)),
            }
        }

        #[doc = concat!("The ", stringify!($with_default), " attribute `name`, which the operator cannot do without.")]
        ///
        /// # Errors
        /// If it is absent or has another type.
        pub fn $required(&self, name: &str) -> Read<$ty> {
            self.$optional(name)?.ok_or_else(|| self.missing(name))
        }
    )*};
}

impl<'a> AttributeReader<'a> {
    pub(crate) fn new(node: &'a Node) -> AttributeReader<'a> {
        AttributeReader { node, used: vec![Cell::new(false); node.attributes.len()] }
    }

    accessors! {
        Int(AttributeValue::Int(value) => *value): i64, int optional_int required_int;
        Float(AttributeValue::Float(value) => *value): f32, float optional_float required_float;
        Ints(AttributeValue::Ints(value) => value.as_slice()): &'a [i64], ints optional_ints required_ints;
        Floats(AttributeValue::Floats(value) => value.as_slice()): &'a [f32], floats optional_floats required_floats;
        Tensor(AttributeValue::Tensor(value) => value): &'a TensorRef, tensor optional_tensor required_tensor;
        Graph(AttributeValue::Graph(value) => value.as_ref()): &'a Graph, graph optional_graph required_graph;
        Type(AttributeValue::Type(value) => value): &'a ValueType, value_type optional_value_type required_value_type;
    }

    /// The text attribute `name`, or `default` where it is absent.
    ///
    /// # Errors
    /// If it has another type or is not UTF-8.
    pub fn string<'b>(&self, name: &str, default: &'b str) -> Read<&'b str>
    where
        'a: 'b,
    {
        Ok(self.optional_string(name)?.unwrap_or(default))
    }

    /// The text attribute `name`, if there is one.
    ///
    /// # Errors
    /// If it has another type or is not UTF-8.
    pub fn optional_string(&self, name: &str) -> Read<Option<&'a str>> {
        match self.get(name) {
            None => Ok(None),
            Some(AttributeValue::String(text)) => match std::str::from_utf8(text) {
                Ok(text) => Ok(Some(text)),
                Err(_) => Err(self.error(AttributeProblem::NotText(name.into()))),
            },
            Some(other) => Err(self.wrong_type(name, AttributeType::String, other)),
        }
    }

    /// The text attribute `name`, which the operator cannot do without.
    ///
    /// # Errors
    /// If it is absent, has another type or is not UTF-8.
    pub fn required_string(&self, name: &str) -> Read<&'a str> {
        self.optional_string(name)?.ok_or_else(|| self.missing(name))
    }

    /// The list of texts `name`, empty where it is absent.
    ///
    /// # Errors
    /// If it has another type or one of them is not UTF-8.
    pub fn strings(&self, name: &str) -> Read<Vec<&'a str>> {
        match self.get(name) {
            None => Ok(Vec::new()),
            Some(AttributeValue::Strings(texts)) => texts
                .iter()
                .map(|text| {
                    std::str::from_utf8(text).map_err(|_| self.error(AttributeProblem::NotText(name.into())))
                })
                .collect(),
            Some(other) => Err(self.wrong_type(name, AttributeType::Strings, other)),
        }
    }

    /// The integer attribute `name` as a flag.
    ///
    /// # Errors
    /// If it has another type or is neither 0 nor 1.
    pub fn bool(&self, name: &str, default: bool) -> Read<bool> {
        match self.int(name, i64::from(default))? {
            0 => Ok(false),
            1 => Ok(true),
            value => Err(self.error(AttributeProblem::NotBool { name: name.into(), value })),
        }
    }

    /// The value of `name` whatever its type; counts as asked for.
    pub fn get(&self, name: &str) -> Option<&'a AttributeValue> {
        let at = self.node.attributes.iter().position(|attribute| attribute.name == name)?;
        self.used.get(at)?.set(true);
        self.node.attributes.get(at).map(|attribute| &attribute.value)
    }

    /// Accepts `name` without looking at it, for attributes that do not matter here.
    pub fn ignore(&self, name: &str) {
        self.get(name);
    }

    /// Attributes nobody has asked for so far, in file order.
    pub fn unread(&self) -> impl Iterator<Item = &'a Attribute> {
        self.node
            .attributes
            .iter()
            .zip(&self.used)
            .filter(|(_, used)| !used.get())
            .map(|(attribute, _)| attribute)
    }

    /// Refuses attributes that nobody asked for.
    ///
    /// # Errors
    /// The first of them.
    pub fn finish(self) -> Read<()> {
        match self.unread().next() {
            None => Ok(()),
            Some(attribute) => Err(self.error(AttributeProblem::Unknown(attribute.name.clone()))),
        }
    }

    fn missing(&self, name: &str) -> AttributeError {
        self.error(AttributeProblem::Missing(name.into()))
    }

    fn wrong_type(&self, name: &str, expected: AttributeType, value: &AttributeValue) -> AttributeError {
        self.error(AttributeProblem::Type { name: name.into(), expected, found: value.attribute_type() })
    }

    fn error(&self, problem: AttributeProblem) -> AttributeError {
        AttributeError { node: Box::new(self.node.site()), problem }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node() -> Node {
        let attribute = |name: &str, value| Attribute { name: name.into(), value };
        Node {
            name: "n".into(),
            op_type: "Gemm".into(),
            opset: 13,
            attributes: vec![
                attribute("alpha", AttributeValue::Float(0.5)),
                attribute("transB", AttributeValue::Int(1)),
                attribute("pads", AttributeValue::Ints(vec![1, 2])),
                attribute("mode", AttributeValue::String("edge".into())),
                attribute("bad", AttributeValue::String(vec![0xff].into())),
                attribute("flag", AttributeValue::Int(2)),
            ],
            ..Node::default()
        }
    }

    #[test]
    fn values_defaults_and_absence() {
        let node = node();
        let read = node.attributes();
        assert_eq!(read.float("alpha", 1.0).unwrap(), 0.5);
        assert_eq!(read.float("beta", 1.0).unwrap(), 1.0);
        assert!(read.bool("transB", false).unwrap());
        assert!(!read.bool("transA", false).unwrap());
        assert_eq!(read.required_ints("pads").unwrap(), &[1, 2]);
        assert_eq!(read.optional_ints("strides").unwrap(), None);
        assert_eq!(read.string("mode", "constant").unwrap(), "edge");
        assert_eq!(read.string("other", "constant").unwrap(), "constant");
    }

    #[test]
    fn wrong_use_is_named() {
        let node = node();
        let read = node.attributes();
        let fault: Fault = read.int("alpha", 0).unwrap_err().into();
        assert_eq!(
            fault.to_string().lines().next().unwrap(),
            "node `n` (Gemm, ai.onnx 13), `alpha`: the attribute `alpha` is of type float, the operator wants int"
        );
        assert_eq!(read.required_int("axis").unwrap_err().problem, AttributeProblem::Missing("axis".into()));
        assert_eq!(read.string("bad", "").unwrap_err().problem, AttributeProblem::NotText("bad".into()));
        assert!(matches!(read.bool("flag", true).unwrap_err().problem, AttributeProblem::NotBool { .. }));
    }

    #[test]
    fn attributes_nobody_asked_for_are_refused() {
        let node = node();
        let read = node.attributes();
        for name in ["alpha", "transB", "pads", "mode", "flag"] {
            read.ignore(name);
        }
        assert_eq!(read.finish().unwrap_err().problem, AttributeProblem::Unknown("bad".into()));
    }
}
