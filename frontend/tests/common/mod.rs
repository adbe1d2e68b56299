//! Small models made in memory.

#![allow(dead_code, unreachable_pub)] // Each test file uses its part.

use prost::Message;
use tpshard_frontend::proto::*;
use tpshard_frontend::{Limits, LoadError, Model, load};

pub fn strings(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

pub fn node(op_type: &str, input: &[&str], output: &[&str]) -> NodeProto {
    NodeProto {
        op_type: op_type.into(),
        input: strings(input),
        output: strings(output),
        ..NodeProto::default()
    }
}

pub fn call(name: &str, input: &[&str], output: &[&str]) -> NodeProto {
    NodeProto {
        domain: "local".into(),
        name: format!("call_{}", output.join("_")),
        ..node(name, input, output)
    }
}

pub fn value(name: &str) -> ValueInfoProto {
    let dim = vec![DimensionProto { value: Some(DimensionValue::Value(2)) }];
    let tensor = TensorTypeProto { elem_type: 1, shape: Some(TensorShapeProto { dim }) };
    let tensor = TypeProto { value: Some(TypeValue::Tensor(tensor)), denotation: String::new() };
    ValueInfoProto { name: name.into(), r#type: Some(Box::new(tensor)), metadata_props: vec![] }
}

pub fn graph(input: &[&str], node: Vec<NodeProto>, output: &[&str]) -> GraphProto {
    GraphProto {
        node,
        input: input.iter().map(|name| value(name)).collect(),
        output: output.iter().map(|name| value(name)).collect(),
        ..GraphProto::default()
    }
}

pub fn opset(domain: &str, version: i64) -> OperatorSetIdProto {
    OperatorSetIdProto { domain: domain.into(), version }
}

pub fn model(graph: GraphProto) -> ModelProto {
    ModelProto {
        ir_version: Some(10),
        opset_import: vec![opset("", 20), opset("local", 1)],
        graph: Some(Box::new(graph)),
        ..ModelProto::default()
    }
}

pub fn function(name: &str, input: &[&str], node: Vec<NodeProto>, output: &[&str]) -> FunctionProto {
    FunctionProto {
        name: name.into(),
        domain: "local".into(),
        input: strings(input),
        output: strings(output),
        node,
        opset_import: vec![opset("", 18)],
        ..FunctionProto::default()
    }
}

pub fn int(name: &str, value: i64) -> AttributeProto {
    AttributeProto { name: name.into(), i: Some(value), r#type: 2, ..AttributeProto::default() }
}

pub fn reference(name: &str, to: &str) -> AttributeProto {
    AttributeProto { name: name.into(), ref_attr_name: to.into(), r#type: 2, ..AttributeProto::default() }
}

pub fn body(name: &str, graph: GraphProto) -> AttributeProto {
    AttributeProto { name: name.into(), g: Some(Box::new(graph)), r#type: 5, ..AttributeProto::default() }
}

pub fn load_bytes(content: &[u8]) -> Result<Model, LoadError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.onnx");
    std::fs::write(&path, content).unwrap();
    load(&path, &Limits::default())
}

pub fn load_proto(model: &ModelProto) -> Result<Model, LoadError> {
    load_bytes(&model.encode_to_vec())
}

/// The text of the error, with all its faults.
pub fn refused(model: &ModelProto) -> String {
    load_proto(model).unwrap_err().to_string()
}
