//! From decoded messages to the [`model`](crate::model) types.
//!
//! Strings and numbers move, tensors are checked against their bytes, and each node gets the opset version of its
//! domain. Everything wrong is collected; what cannot be represented is left out, so that one pass finds many faults.

use crate::error::{Fault, Faults, NodeSite, clip, domain_name, quote};
use crate::external::Opener;
use crate::functions::{Function, FunctionKey};
use crate::limits::Limits;
use crate::model::{
    Attribute, AttributeType, AttributeValue, Dim, Graph, Node, TensorType, ValueInfo, ValueType,
};
use crate::proto::{
    AttributeProto, DimensionValue, FunctionProto, GraphProto, NodeProto, OperatorSetIdProto,
    StringStringEntryProto, TensorProto, TypeProto, TypeValue, ValueInfoProto,
};
use crate::tensor_data::{self, TensorRef, TensorSource};
use std::collections::{BTreeMap, BTreeSet};

/// State of one conversion.
pub(crate) struct Converter<'a> {
    pub(crate) opener: Opener<'a>,
    pub(crate) limits: &'a Limits,
    pub(crate) faults: Faults,
    /// Names of all model-local functions: calling one needs no opset import.
    pub(crate) local: BTreeSet<FunctionKey>,
}

/// `ai.onnx` is another name of the default domain.
pub(crate) fn normal_domain(domain: String) -> String {
    if domain == "ai.onnx" { String::new() } else { domain }
}

/// Domains that ONNX Runtime knows without an import, and their version then. Its own tools write such files.
const IMPLICIT: &[(&str, i64)] = &[("com.microsoft", 1), ("ai.onnx.ml", 1)];

/// The imports as a map; of several for one domain the last holds, as in ONNX Runtime.
pub(crate) fn opsets(imports: Vec<OperatorSetIdProto>) -> BTreeMap<String, i64> {
    imports.into_iter().map(|import| (normal_domain(import.domain), import.version)).collect()
}

/// The imports that hold for a node: a function's own come before the model's.
pub(crate) struct Imports<'a> {
    own: BTreeMap<String, i64>,
    model: &'a BTreeMap<String, i64>,
}

impl<'a> Imports<'a> {
    /// For the main graph.
    pub(crate) fn of_model(model: &'a BTreeMap<String, i64>) -> Imports<'a> {
        Imports { own: BTreeMap::new(), model }
    }

    /// The version a node of `domain` is written in.
    fn version(&self, domain: &str) -> Option<i64> {
        let implicit = || IMPLICIT.iter().find(|(name, _)| *name == domain).map(|(_, version)| *version);
        self.own.get(domain).or_else(|| self.model.get(domain)).copied().or_else(implicit)
    }
}

/// Key-value lists; the last of several equal keys holds.
pub(crate) fn metadata(entries: Vec<StringStringEntryProto>) -> BTreeMap<String, String> {
    entries.into_iter().map(|entry| (entry.key, entry.value)).collect()
}

impl Converter<'_> {
    pub(crate) fn function(&mut self, proto: FunctionProto, model: &BTreeMap<String, i64>) -> Function {
        let imports = Imports { own: opsets(proto.opset_import), model };
        let site = NodeSite {
            name: String::new(),
            op_type: clip(&proto.name),
            domain: normal_domain(proto.domain.clone()),
            opset: None,
            output: String::new(),
        };
        let defaults = self.attributes(proto.attribute_proto, &imports, &site);
        Function {
            key: FunctionKey { domain: site.domain, name: proto.name, overload: proto.overload },
            inputs: proto.input,
            outputs: proto.output,
            attributes: proto.attribute,
            defaults,
            nodes: proto.node.into_iter().map(|node| self.node(node, &imports)).collect(),
            default_opset: imports.version("").unwrap_or(0),
        }
    }

    pub(crate) fn graph(&mut self, proto: GraphProto, opsets: &Imports<'_>) -> Graph {
        if let Some(sparse) = proto.sparse_initializer.first() {
            let name = sparse.values.as_ref().map_or("", |values| values.name.as_str());
            self.faults.push(sparse_fault().at_value(name));
        }
        let mut initializers = BTreeMap::new();
        for mut tensor in proto.initializer {
            let name = std::mem::take(&mut tensor.name);
            if name.is_empty() {
                self.faults.push(Fault::invalid("an initializer has no name", "export the model again"));
                continue;
            }
            let Some(tensor) = self.tensor(tensor, &name, None) else { continue };
            if initializers.contains_key(&name) {
                let fault = Fault::invalid("the initializer is defined twice", "give each a name of its own");
                self.faults.push(fault.at_value(&name));
            }
            initializers.insert(name, tensor);
        }
        let (defaults, inputs) = proto
            .input
            .into_iter()
            .map(|info| self.value_info(info))
            .partition(|info| initializers.contains_key(&info.name));
        let value_types = proto
            .value_info
            .into_iter()
            .filter_map(|info| Some((info.name, self.hint(info.r#type.map(|boxed| *boxed)?)?)))
            .collect();
        Graph {
            name: proto.name,
            nodes: proto.node.into_iter().map(|node| self.node(node, opsets)).collect(),
            inputs,
            defaults,
            outputs: proto.output.into_iter().map(|info| self.value_info(info)).collect(),
            initializers,
            value_types,
            metadata: metadata(proto.metadata_props),
        }
    }

    pub(crate) fn node(&mut self, proto: NodeProto, opsets: &Imports<'_>) -> Node {
        let domain = normal_domain(proto.domain);
        let mut node = Node {
            name: proto.name,
            op_type: proto.op_type,
            opset: opsets.version(&domain).unwrap_or(0),
            domain,
            overload: proto.overload,
            inputs: proto.input,
            outputs: proto.output,
            attributes: Vec::new(),
            metadata: metadata(proto.metadata_props),
            device_configurations: proto.device_configurations,
        };
        let site = node.site();
        if node.op_type.is_empty() {
            self.faults.push(
                Fault::invalid("a node has no operator", "export the model again").at_node(site.clone()),
            );
        } else if opsets.version(&node.domain).is_none() && !self.local.contains(&FunctionKey::of(&node)) {
            let message = format!("the domain {} is used but not imported", quote(domain_name(&node.domain)));
            let help = "add the domain to the model's opset_import, or export again";
            self.faults.push(Fault::invalid(message, help).at_node(site.clone()));
        }
        if node.inputs.len() > self.limits.node_inputs {
            let message = format!("{} inputs, {} are possible", node.inputs.len(), self.limits.node_inputs);
            let help = "combine the inputs in several steps";
            self.faults.push(Fault::resource(message, help).at_node(site.clone()));
        }
        node.attributes = self.attributes(proto.attribute, opsets, &site);
        node
    }

    fn attributes(
        &mut self,
        protos: Vec<AttributeProto>,
        opsets: &Imports<'_>,
        site: &NodeSite,
    ) -> Vec<Attribute> {
        let mut seen = BTreeSet::new();
        let mut out = Vec::with_capacity(protos.len());
        for proto in protos {
            let name = proto.name.clone();
            if name.is_empty() || !seen.insert(name.clone()) {
                let what = if name.is_empty() { "has no name" } else { "is given twice" };
                let fault = Fault::invalid(format!("an attribute {what}"), "export the model again");
                self.faults.push(fault.at_value(&name).at_node(site.clone()));
                continue;
            }
            if let Some(value) = self.attribute_value(proto, opsets, site) {
                out.push(Attribute { name, value });
            }
        }
        out
    }

    /// `None` after pushing what is wrong with it.
    fn attribute_value(
        &mut self,
        mut proto: AttributeProto,
        opsets: &Imports<'_>,
        site: &NodeSite,
    ) -> Option<AttributeValue> {
        let name = std::mem::take(&mut proto.name);
        let at = |fault: Fault| fault.at_value(&name).at_node(site.clone());
        let kind = match attribute_type(&proto) {
            Ok(kind) => kind,
            Err(fault) => {
                self.faults.push(at(fault));
                return None;
            }
        };
        if !proto.ref_attr_name.is_empty() {
            return Some(AttributeValue::Reference { attribute: proto.ref_attr_name, expected: kind });
        }
        let missing =
            || at(Fault::invalid(format!("the attribute has no {kind} value"), "export the model again"));
        Some(match kind {
            AttributeType::Float => AttributeValue::Float(proto.f.unwrap_or(0.0)),
            AttributeType::Int => AttributeValue::Int(proto.i.unwrap_or(0)),
            AttributeType::String => AttributeValue::String(proto.s.unwrap_or_default()),
            AttributeType::Floats => AttributeValue::Floats(proto.floats),
            AttributeType::Ints => AttributeValue::Ints(proto.ints),
            AttributeType::Strings => AttributeValue::Strings(proto.strings),
            AttributeType::Tensor => {
                let Some(tensor) = proto.t else {
                    self.faults.push(missing());
                    return None;
                };
                AttributeValue::Tensor(self.tensor(*tensor, &name, Some(site))?)
            }
            AttributeType::Tensors => AttributeValue::Tensors(
                proto
                    .tensors
                    .into_iter()
                    .filter_map(|tensor| self.tensor(tensor, &name, Some(site)))
                    .collect(),
            ),
            AttributeType::Graph => {
                let Some(graph) = proto.g else {
                    self.faults.push(missing());
                    return None;
                };
                AttributeValue::Graph(Box::new(self.graph(*graph, opsets)))
            }
            AttributeType::Graphs => AttributeValue::Graphs(
                proto.graphs.into_iter().map(|graph| self.graph(graph, opsets)).collect(),
            ),
            AttributeType::Type => {
                let value = proto.tp.map(|tp| value_type(*tp));
                let value = value.unwrap_or_else(|| Err(missing()));
                AttributeValue::Type(self.faults.keep(value.map_err(at))?)
            }
            AttributeType::Types => AttributeValue::Types(
                proto
                    .type_protos
                    .into_iter()
                    .filter_map(|tp| self.faults.keep(value_type(tp).map_err(at)))
                    .collect(),
            ),
        })
    }

    /// `what` is the name to report: the initializer's or the attribute's.
    fn tensor(&mut self, mut proto: TensorProto, what: &str, site: Option<&NodeSite>) -> Option<TensorRef> {
        let checked = self.checked_tensor(&mut proto, what, site.is_some());
        self.faults.keep(checked.map_err(|fault| {
            let fault = fault.at_value(what);
            match site {
                Some(site) => fault.at_node(site.clone()),
                None => fault,
            }
        }))
    }

    fn checked_tensor(
        &mut self,
        proto: &mut TensorProto,
        what: &str,
        in_attribute: bool,
    ) -> Result<TensorRef, Fault> {
        let (dtype, dims, needed) = tensor_data::describe(proto, self.limits)?;
        let source = match proto.data_location {
            0 => TensorSource::Inline(tensor_data::inline_bytes(proto, dtype, needed)?),
            1 => {
                if proto.raw_data.as_ref().is_some_and(|raw| !raw.is_empty()) {
                    let message = "the tensor has data both in the model and outside";
                    return Err(Fault::invalid(message, "save the model again"));
                }
                self.opener.source(&proto.external_data, needed)?
            }
            other => {
                let message = format!("the tensor has the unknown data location {other}");
                return Err(Fault::invalid(message, "the model is damaged or newer than this tool"));
            }
        };
        let name = if in_attribute { std::mem::take(&mut proto.name) } else { what.to_owned() };
        Ok(TensorRef { name, dtype, dims, source })
    }

    fn value_info(&mut self, proto: ValueInfoProto) -> ValueInfo {
        let declared = proto.r#type.map(|declared| value_type(*declared));
        let declared =
            declared.and_then(|d| self.faults.keep(d.map_err(|fault| fault.at_value(&proto.name))));
        ValueInfo { name: proto.name, value_type: declared, metadata: metadata(proto.metadata_props) }
    }

    /// The type of an inner value. A hint that makes no sense is no hint.
    fn hint(&mut self, proto: TypeProto) -> Option<ValueType> {
        value_type(proto).ok()
    }
}

fn sparse_fault() -> Fault {
    Fault::unsupported(
        "sparse tensors are not supported",
        "store the tensor dense; onnx.helper and numpy can convert it",
    )
}

/// The declared type of an attribute, or, in files older than that field, the one its value has.
fn attribute_type(proto: &AttributeProto) -> Result<AttributeType, Fault> {
    let holds = [
        (1, AttributeType::Float, proto.f.is_some()),
        (2, AttributeType::Int, proto.i.is_some()),
        (3, AttributeType::String, proto.s.is_some()),
        (4, AttributeType::Tensor, proto.t.is_some()),
        (5, AttributeType::Graph, proto.g.is_some()),
        (6, AttributeType::Floats, !proto.floats.is_empty()),
        (7, AttributeType::Ints, !proto.ints.is_empty()),
        (8, AttributeType::Strings, !proto.strings.is_empty()),
        (9, AttributeType::Tensors, !proto.tensors.is_empty()),
        (10, AttributeType::Graphs, !proto.graphs.is_empty()),
        (13, AttributeType::Type, proto.tp.is_some()),
        (14, AttributeType::Types, !proto.type_protos.is_empty()),
    ];
    if matches!(proto.r#type, 11 | 12) || proto.sparse_tensor.is_some() || !proto.sparse_tensors.is_empty() {
        return Err(sparse_fault());
    }
    let held = holds.iter().filter(|(_, _, present)| *present).map(|(_, kind, _)| *kind);
    let again = "export the model again";
    let mut others = held.clone();
    let declared = match proto.r#type {
        0 => match (others.next(), others.next()) {
            (Some(only), None) => return Ok(only),
            (None, _) => return Err(Fault::invalid("the attribute has neither type nor value", again)),
            (Some(_), Some(_)) => {
                return Err(Fault::invalid("the attribute has no type and several values", again));
            }
        },
        code => holds.iter().find(|(number, ..)| *number == code).map(|(_, kind, _)| *kind),
    };
    let Some(declared) = declared else {
        let message = format!("the attribute has the unknown type {}", proto.r#type);
        return Err(Fault::invalid(message, "the model is damaged or newer than this tool"));
    };
    // Zero and empty values may be left out of the file, so no value is a value; a different one is not.
    if let Some(other) = held.clone().find(|kind| *kind != declared) {
        let message = format!("the attribute is declared as {declared} and holds {other}");
        return Err(Fault::invalid(message, again));
    }
    Ok(declared)
}

/// A declared type.
fn value_type(proto: TypeProto) -> Result<ValueType, Fault> {
    let Some(TypeValue::Tensor(tensor)) = proto.value else {
        return Ok(ValueType::Other(type_text(&proto)));
    };
    let name = tensor_data::data_type_name(tensor.elem_type);
    let dtype = match tensor_data::dtype_from_onnx(i64::from(tensor.elem_type)) {
        Ok(dtype) => dtype,
        Err(fault) => match name {
            Some(name) if name != "undefined" => return Ok(ValueType::Other(format!("tensor({name})"))),
            _ => return Err(fault),
        },
    };
    let shape = tensor.shape.map(|shape| {
        shape
            .dim
            .into_iter()
            .map(|dim| match dim.value {
                Some(DimensionValue::Value(size)) => u64::try_from(size).map_or(Dim::Unknown, Dim::Known),
                Some(DimensionValue::Param(name)) if !name.is_empty() => Dim::Symbol(name),
                _ => Dim::Unknown,
            })
            .collect()
    });
    Ok(ValueType::Tensor(TensorType { dtype, shape }))
}

/// A type as ONNX writes it, e.g. `seq(tensor(float))`.
fn type_text(proto: &TypeProto) -> String {
    let inner = |inner: &Option<Box<TypeProto>>| inner.as_ref().map_or_else(|| "?".into(), |t| type_text(t));
    let element = |code: i32| tensor_data::data_type_name(code).unwrap_or("?");
    match &proto.value {
        Some(TypeValue::Tensor(tensor)) => format!("tensor({})", element(tensor.elem_type)),
        Some(TypeValue::SparseTensor(tensor)) => format!("sparse_tensor({})", element(tensor.elem_type)),
        Some(TypeValue::Sequence(sequence)) => format!("seq({})", inner(&sequence.elem_type)),
        Some(TypeValue::Optional(optional)) => format!("optional({})", inner(&optional.elem_type)),
        Some(TypeValue::Map(map)) => format!("map({}, {})", element(map.key_type), inner(&map.value_type)),
        Some(TypeValue::Opaque(opaque)) => {
            format!("opaque({}, {})", opaque.domain.escape_debug(), opaque.name.escape_debug())
        }
        None => "?".into(),
    }
}
