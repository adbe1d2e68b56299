//! What ranks hold: their weights, once and as narrow as they were, and little else.

use crate::support::*;
use crate::words;
use prost::Message;
use std::fs::File;
use std::path::Path;
use tpshard_frontend::proto::*;
use tpshard_ir::{DType, Tensor};
use tpshard_runtime::io::NamedTensors;

const WIDTH: usize = 2048;

/// `x @ w0 @ w1 @ …`, with weights that lie in a file beside it.
fn chain(folder: &Path, dtype: DType, layers: usize) -> u64 {
    let data_type = if dtype == DType::F32 { 1 } else { 10 };
    let bytes = (WIDTH * WIDTH * dtype.bits() / 8) as u64;
    let value = |name: &str| {
        let dim = |&d: &usize| DimensionProto { value: Some(DimensionValue::Value(d as i64)) };
        let shape = TensorShapeProto { dim: [1, WIDTH].iter().map(dim).collect() };
        let tensor = TensorTypeProto { elem_type: data_type, shape: Some(shape) };
        let ty = TypeProto { value: Some(TypeValue::Tensor(tensor)), denotation: String::new() };
        ValueInfoProto { name: name.into(), r#type: Some(Box::new(ty)), metadata_props: vec![] }
    };
    let node = |i: usize| NodeProto {
        op_type: "MatMul".into(),
        name: format!("layer{i}"),
        input: vec![format!("x{i}"), format!("w{i}")],
        output: vec![format!("x{}", i + 1)],
        ..NodeProto::default()
    };
    let weight = |i: usize| {
        let entry = |key: &str, value: String| StringStringEntryProto { key: key.into(), value };
        TensorProto {
            name: format!("w{i}"),
            dims: vec![WIDTH as i64; 2],
            data_type,
            data_location: 1,
            external_data: vec![
                entry("location", "weights".into()),
                entry("offset", (i as u64 * bytes).to_string()),
                entry("length", bytes.to_string()),
            ],
            ..TensorProto::default()
        }
    };
    let graph = GraphProto {
        name: "chain".into(),
        node: (0..layers).map(node).collect(),
        input: vec![value("x0")],
        output: vec![value(&format!("x{layers}"))],
        initializer: (0..layers).map(weight).collect(),
        ..GraphProto::default()
    };
    let model = ModelProto {
        ir_version: Some(8),
        opset_import: vec![OperatorSetIdProto { domain: String::new(), version: 17 }],
        graph: Some(Box::new(graph)),
        ..ModelProto::default()
    };
    std::fs::write(folder.join("model.onnx"), model.encode_to_vec()).unwrap();
    File::create(folder.join("weights")).unwrap().set_len(layers as u64 * bytes).unwrap();
    layers as u64 * bytes
}

#[test]
fn ranks_hold_their_weights_once_and_as_narrow_as_they_are() {
    for (dtype, layers) in [(DType::F32, 20), (DType::F16, 40)] {
        let scratch = scratch();
        let bytes = chain(scratch.path(), dtype, layers);
        let inputs = scratch.path().join("x.npz");
        let mut tensors = NamedTensors::new();
        tensors.insert("x0".into(), Tensor::zeros(dtype, vec![1, WIDTH]).unwrap());
        tpshard_runtime::io::write_npz(&inputs, &tensors).unwrap();
        for ranks in [1, 2] {
            let folder = scratch.path().join(ranks.to_string());
            let model = scratch.path().join("model.onnx");
            end(&mut tpshard(words![model, "--tp", ranks.to_string(), "-o", folder, "--memory", "min"])).ok();
            let mut bench = tpshard(words!["bench", folder, "--inputs", inputs, "--json", "--samples", "3"]);
            let report = end(&mut bench).ok().json();
            for rank in report["ranks"].as_array().unwrap() {
                let peak = rank["peak_bytes"].as_u64().unwrap();
                let share = bytes / ranks as u64;
                // Activations are a few rows.
                assert!(peak > share, "{peak} bytes are less than the weights, {share}");
                assert!(peak as f64 <= 1.15 * share as f64, "{dtype}, {ranks} ranks: {peak} for {share}");
            }
        }
    }
}
