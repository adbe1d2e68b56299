//! A node as bytes: the `NodeProto` it came from, without what means nothing here, with its tensors inside.
//!
//! Every node says the opset it is written in, because bodies of functions were inlined and may differ from the model.

use crate::convert::{Converter, Imports};
use crate::error::{Fault, Faults};
use crate::external::{Opener, Storage};
use crate::limits::Limits;
use crate::model::{Attribute, AttributeValue, Dim, Graph, Node, ValueInfo, ValueType};
use crate::proto::{
    AttributeProto, DimensionProto, DimensionValue, GraphProto, NodeProto, StringStringEntryProto,
    TensorProto, TensorShapeProto, TensorTypeProto, TypeProto, TypeValue, ValueInfoProto,
};
use crate::tensor_data::{TensorRef, onnx_from_dtype};
use prost::Message;
use std::collections::{BTreeMap, BTreeSet};

/// The key under which a node says its opset.
const OPSET: &str = "opset";
/// Most bytes of one node.
const LARGEST: usize = 4 << 20;

/// The node as bytes; equal nodes are equal bytes.
///
/// # Errors
/// Tensors that cannot be read, or too many bytes.
pub(crate) fn encode(node: &Node, storage: &Storage) -> Result<Vec<u8>, Fault> {
    let bytes = node_proto(node, storage)?.encode_to_vec();
    if bytes.len() > LARGEST {
        let message =
            format!("the node and its subgraphs hold {} bytes, {LARGEST} are possible", bytes.len());
        return Err(Fault::resource(message, "store large constants of subgraphs as initializers"));
    }
    Ok(bytes)
}

/// A graph without files as bytes.
///
/// # Errors
/// Tensors that cannot be read.
pub(super) fn graph_bytes(graph: &Graph) -> Result<Vec<u8>, Fault> {
    Ok(graph_proto(graph, &Storage::default())?.encode_to_vec())
}

fn node_proto(node: &Node, storage: &Storage) -> Result<NodeProto, Fault> {
    let attribute = |attribute: &Attribute| attribute_proto(attribute, storage);
    let opset = StringStringEntryProto { key: OPSET.into(), value: node.opset.to_string() };
    Ok(NodeProto {
        input: node.inputs.clone(),
        output: node.outputs.clone(),
        name: node.name.clone(),
        op_type: node.op_type.clone(),
        attribute: node.attributes.iter().map(attribute).collect::<Result<_, Fault>>()?,
        domain: node.domain.clone(),
        overload: node.overload.clone(),
        metadata_props: vec![opset],
        device_configurations: Vec::new(),
    })
}

fn attribute_proto(attribute: &Attribute, storage: &Storage) -> Result<AttributeProto, Fault> {
    let mut proto = AttributeProto { name: attribute.name.clone(), ..AttributeProto::default() };
    let tensors = |tensors: &[TensorRef]| {
        tensors
            .iter()
            .map(|tensor| tensor_proto(&tensor.name, tensor, storage))
            .collect::<Result<Vec<_>, Fault>>()
    };
    proto.r#type = match &attribute.value {
        AttributeValue::Float(value) => {
            proto.f = Some(*value);
            1
        }
        AttributeValue::Int(value) => {
            proto.i = Some(*value);
            2
        }
        AttributeValue::String(value) => {
            proto.s = Some(value.clone());
            3
        }
        AttributeValue::Tensor(tensor) => {
            proto.t = Some(Box::new(tensor_proto(&tensor.name, tensor, storage)?));
            4
        }
        AttributeValue::Graph(graph) => {
            proto.g = Some(Box::new(graph_proto(graph, storage)?));
            5
        }
        AttributeValue::Floats(values) => {
            proto.floats.clone_from(values);
            6
        }
        AttributeValue::Ints(values) => {
            proto.ints.clone_from(values);
            7
        }
        AttributeValue::Strings(values) => {
            proto.strings.clone_from(values);
            8
        }
        AttributeValue::Tensors(values) => {
            proto.tensors = tensors(values)?;
            9
        }
        AttributeValue::Graphs(graphs) => {
            proto.graphs =
                graphs.iter().map(|graph| graph_proto(graph, storage)).collect::<Result<_, Fault>>()?;
            10
        }
        AttributeValue::Type(ty) => {
            proto.tp = Some(Box::new(type_proto(ty)?));
            13
        }
        AttributeValue::Types(types) => {
            proto.type_protos = types.iter().map(type_proto).collect::<Result<_, Fault>>()?;
            14
        }
        AttributeValue::Reference { attribute, .. } => {
            let message = format!("the attribute {} has no value", crate::error::quote(attribute));
            return Err(Fault::invalid(message, "export the model again"));
        }
    };
    Ok(proto)
}

fn tensor_proto(name: &str, tensor: &TensorRef, storage: &Storage) -> Result<TensorProto, Fault> {
    Ok(TensorProto {
        dims: tensor.dims.iter().map(|&dim| i64::try_from(dim).unwrap_or(i64::MAX)).collect(),
        data_type: onnx_from_dtype(tensor.dtype),
        name: name.to_owned(),
        raw_data: Some(storage.bytes(tensor)?),
        ..TensorProto::default()
    })
}

/// What the exporter says about inner values is left out: it is believed at most where the graph meets the outside.
fn graph_proto(graph: &Graph, storage: &Storage) -> Result<GraphProto, Fault> {
    let tensor = |(name, tensor): (&String, &TensorRef)| tensor_proto(name, tensor, storage);
    Ok(GraphProto {
        node: graph.nodes.iter().map(|node| node_proto(node, storage)).collect::<Result<_, Fault>>()?,
        name: graph.name.clone(),
        initializer: graph.initializers.iter().map(tensor).collect::<Result<_, Fault>>()?,
        input: graph.inputs.iter().map(info_proto).collect(),
        output: graph.outputs.iter().map(info_proto).collect(),
        ..GraphProto::default()
    })
}

fn info_proto(info: &ValueInfo) -> ValueInfoProto {
    let declared = info.value_type.as_ref().and_then(|ty| type_proto(ty).ok());
    ValueInfoProto { name: info.name.clone(), r#type: declared.map(Box::new), metadata_props: Vec::new() }
}

fn type_proto(ty: &ValueType) -> Result<TypeProto, Fault> {
    let ValueType::Tensor(tensor) = ty else {
        return Err(Fault::unsupported(
            format!("a value of type {ty}"),
            "keep values that are no tensors outside the model",
        ));
    };
    let dim = |dim: &Dim| DimensionProto {
        value: match dim {
            Dim::Known(size) => Some(DimensionValue::Value(i64::try_from(*size).unwrap_or(i64::MAX))),
            Dim::Symbol(name) => Some(DimensionValue::Param(name.clone())),
            Dim::Unknown => None,
        },
    };
    let shape = tensor.shape.as_ref().map(|dims| TensorShapeProto { dim: dims.iter().map(dim).collect() });
    let tensor = TensorTypeProto { elem_type: onnx_from_dtype(tensor.dtype), shape };
    Ok(TypeProto { value: Some(TypeValue::Tensor(tensor)), denotation: String::new() })
}

/// The inverse of [`encode`].
///
/// # Errors
/// Bytes that are no node.
pub(crate) fn decode(bytes: &[u8]) -> Result<Node, Fault> {
    let damaged = |what: String| Fault::invalid(what, "shard the model again");
    let limits = Limits::default();
    if bytes.len() > LARGEST {
        return Err(damaged(format!("{} bytes, {LARGEST} are possible", bytes.len())));
    }
    let proto = NodeProto::decode(bytes).map_err(|error| damaged(format!("not a node: {error}")))?;
    let mut opsets = BTreeMap::new();
    collect_opsets(&proto, &mut opsets);
    let versions = opsets_of(&proto);
    let mut converter = Converter {
        opener: Opener::detached(&limits),
        limits: &limits,
        faults: Faults::default(),
        local: BTreeSet::new(),
    };
    let mut node = converter.node(proto, &Imports::of_model(&opsets));
    converter.faults.finish("").map_err(|mut error| error.faults.swap_remove(0))?;
    let mut versions = versions.into_iter();
    set_opsets(&mut node, &mut versions);
    Ok(node)
}

/// A version for every domain, so that none is missing.
fn collect_opsets(node: &NodeProto, found: &mut BTreeMap<String, i64>) {
    found.insert(node.domain.clone(), opset_of(node));
    inner_nodes(node).for_each(|inner| collect_opsets(inner, found));
}

fn opset_of(node: &NodeProto) -> i64 {
    let entry = node.metadata_props.iter().find(|entry| entry.key == OPSET);
    entry.and_then(|entry| entry.value.parse().ok()).unwrap_or(0)
}

/// The opsets of a node and all inside, outside first.
fn opsets_of(node: &NodeProto) -> Vec<i64> {
    let mut all = vec![opset_of(node)];
    all.extend(inner_nodes(node).flat_map(opsets_of));
    all
}

fn inner_nodes(node: &NodeProto) -> impl Iterator<Item = &NodeProto> {
    let graphs = node
        .attribute
        .iter()
        .flat_map(|attribute| attribute.g.as_deref().into_iter().chain(&attribute.graphs));
    graphs.flat_map(|graph| &graph.node)
}

/// In the order of [`opsets_of`].
fn set_opsets(node: &mut Node, versions: &mut impl Iterator<Item = i64>) {
    node.opset = versions.next().unwrap_or(0);
    node.metadata.clear();
    for graph in node.subgraphs_mut() {
        for inner in &mut graph.nodes {
            set_opsets(inner, versions);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor_data::TensorSource;

    fn node() -> Node {
        let tensor = TensorRef {
            name: String::new(),
            dtype: tpshard_ir::DType::F32,
            dims: vec![2],
            source: TensorSource::Inline(vec![0, 0, 128, 63, 0, 0, 0, 64].into()),
        };
        let inner = Node {
            op_type: "Add".into(),
            opset: 7,
            inputs: vec!["x".into(), "w".into()],
            outputs: vec!["y".into()],
            ..Node::default()
        };
        let graph = Graph {
            name: "body".into(),
            nodes: vec![inner],
            outputs: vec![ValueInfo { name: "y".into(), value_type: None, metadata: BTreeMap::new() }],
            initializers: [("w".into(), tensor)].into(),
            ..Graph::default()
        };
        let attribute = |name: &str, value| Attribute { name: name.into(), value };
        Node {
            name: "n".into(),
            op_type: "If".into(),
            opset: 19,
            inputs: vec!["c".into()],
            outputs: vec!["z".into(), String::new()],
            attributes: vec![
                attribute("then_branch", AttributeValue::Graph(Box::new(graph.clone()))),
                attribute("else_branch", AttributeValue::Graph(Box::new(graph))),
                attribute("ints", AttributeValue::Ints(vec![1, -2])),
            ],
            ..Node::default()
        }
    }

    #[test]
    fn nodes_come_back_with_their_opsets() {
        let bytes = encode(&node(), &Storage::default()).unwrap();
        let mut back = decode(&bytes).unwrap();
        assert_eq!(bytes, encode(&back, &Storage::default()).unwrap());
        for graph in back.subgraphs_mut() {
            for tensor in graph.initializers.values_mut() {
                tensor.name.clear();
            }
        }
        assert_eq!(back, node());
        assert_eq!(super::super::operand_names(&back), ["c", "x"]);
    }

    #[test]
    fn what_is_no_node_is_an_error() {
        assert!(decode(&[0xff; 9]).is_err());
        assert!(decode(&[]).is_err(), "a node without operator");
        let bytes = encode(&node(), &Storage::default()).unwrap();
        for cut in 0..bytes.len() {
            let _ = decode(&bytes[..cut]);
        }
    }
}
