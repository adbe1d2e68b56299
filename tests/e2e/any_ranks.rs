//! Every pair of head counts on some number of ranks that does not suit it, from the ONNX file to running processes:
//! what the ranks make is what one rank makes, and the folder is what the checker says it has to be.

use crate::support::*;
use crate::words;
use prost::Message;
use std::path::Path;
use tpshard_frontend::proto::*;
use tpshard_ir::{Data, Tensor};
use tpshard_runtime::io::NamedTensors;

const HEADS: [usize; 8] = [5, 6, 12, 14, 25, 40, 52, 64];
const KV_HEADS: [usize; 5] = [1, 2, 3, 4, 8];
/// Taken in turn by the pairs.
const RANKS: [usize; 6] = [3, 2, 4, 5, 7, 8];
const WIDTH: usize = 10;
const PAST: usize = 3;

fn pairs() -> Vec<(usize, usize)> {
    let with = |heads: usize| {
        KV_HEADS.into_iter().filter(move |kv| heads.is_multiple_of(*kv)).map(move |kv| (heads, kv))
    };
    HEADS.into_iter().flat_map(with).collect()
}

/// Numbers between -1 and 1 that look like chance.
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1u32 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn tensor(shape: &[usize], seed: u32) -> Tensor {
    Tensor::new(shape.to_vec(), Data::F32(numbers(shape.iter().product(), seed))).unwrap()
}

fn weight(name: &str, shape: [usize; 2], seed: u32) -> TensorProto {
    TensorProto {
        name: name.into(),
        dims: shape.map(|extent| extent as i64).to_vec(),
        data_type: 1,
        raw_data: Some(tensor(&shape, seed).data().to_le_bytes().into()),
        ..TensorProto::default()
    }
}

/// A value; negative dims are symbols.
fn value(name: &str, elem_type: i32, dims: &[i64]) -> ValueInfoProto {
    let symbol = |dim: i64| if dim == -1 { "past" } else { "total" }.to_owned();
    let dim = |&d: &i64| {
        let value = if d < 0 { DimensionValue::Param(symbol(d)) } else { DimensionValue::Value(d) };
        DimensionProto { value: Some(value) }
    };
    let shape = TensorShapeProto { dim: dims.iter().map(dim).collect() };
    let tensor = TensorTypeProto { elem_type, shape: Some(shape) };
    let ty = TypeProto { value: Some(TypeValue::Tensor(tensor)), denotation: String::new() };
    ValueInfoProto { name: name.into(), r#type: Some(Box::new(ty)), metadata_props: vec![] }
}

fn node(op_type: &str, domain: &str, input: &[&str], output: &[&str]) -> NodeProto {
    let strings = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    NodeProto {
        op_type: op_type.into(),
        domain: domain.into(),
        name: output.first().copied().unwrap_or_default().into(),
        input: strings(input),
        output: strings(output),
        ..NodeProto::default()
    }
}

fn int(name: &str, value: usize) -> AttributeProto {
    AttributeProto { name: name.into(), i: Some(value as i64), r#type: 2, ..AttributeProto::default() }
}

/// One step of one layer: projections, attention over a cache, and the projection back with its residual.
fn layer(heads: usize, kv_heads: usize, head: usize) -> ModelProto {
    const CACHES: [&str; 2] = ["past_key_values.0.key", "past_key_values.0.value"];
    const GROWN: [&str; 2] = ["present.0.key", "present.0.value"];
    let operands = ["query", "key", "value", CACHES[0], CACHES[1], "seqlens_k", "total_sequence_length"];
    let mut attention =
        node("GroupQueryAttention", "com.microsoft", &operands, &["attention", GROWN[0], GROWN[1]]);
    attention.attribute = vec![int("num_heads", heads), int("kv_num_heads", kv_heads)];
    let (wide, narrow) = (heads * head, kv_heads * head);
    let cache = |past: i64| [1, kv_heads as i64, past, head as i64];
    let graph = GraphProto {
        name: "layer".into(),
        node: vec![
            node("MatMul", "", &["x", "q_proj"], &["query"]),
            node("MatMul", "", &["x", "k_proj"], &["key"]),
            node("MatMul", "", &["x", "v_proj"], &["value"]),
            attention,
            node("MatMul", "", &["attention", "o_proj"], &["projected"]),
            node("Add", "", &["x", "projected"], &["y"]),
        ],
        initializer: vec![
            weight("q_proj", [WIDTH, wide], 1),
            weight("k_proj", [WIDTH, narrow], 2),
            weight("v_proj", [WIDTH, narrow], 3),
            weight("o_proj", [wide, WIDTH], 4),
        ],
        input: vec![
            value("x", 1, &[1, 1, WIDTH as i64]),
            value(CACHES[0], 1, &cache(-1)),
            value(CACHES[1], 1, &cache(-1)),
            value("seqlens_k", 6, &[1]),
            value("total_sequence_length", 6, &[1]),
        ],
        output: vec![
            value("y", 1, &[1, 1, WIDTH as i64]),
            value(GROWN[0], 1, &cache(-2)),
            value(GROWN[1], 1, &cache(-2)),
        ],
        ..GraphProto::default()
    };
    let opset = |domain: &str, version| OperatorSetIdProto { domain: domain.into(), version };
    ModelProto {
        ir_version: Some(10),
        opset_import: vec![opset("", 20), opset("com.microsoft", 1)],
        graph: Some(Box::new(graph)),
        ..ModelProto::default()
    }
}

/// What the model takes: the total length follows from the rest, and no rank asks for it.
fn inputs(kv_heads: usize, head: usize) -> NamedTensors {
    let count = |value: usize| Tensor::new(vec![1], Data::I32(vec![value as i32])).unwrap();
    let cache = [1, kv_heads, PAST, head];
    [
        ("x", tensor(&[1, 1, WIDTH], 5)),
        ("past_key_values.0.key", tensor(&cache, 6)),
        ("past_key_values.0.value", tensor(&cache, 7)),
        ("seqlens_k", count(PAST)),
        ("total_sequence_length", count(PAST + 1)),
    ]
    .map(|(name, tensor)| (name.to_owned(), tensor))
    .into_iter()
    .collect()
}

fn run_end_to_end(folder: &Path, heads: usize, kv_heads: usize, ranks: usize) {
    let head = if heads > 14 { 2 } else { 4 };
    let (model, given, out) = (folder.join("model.onnx"), folder.join("inputs.npz"), folder.join("out"));
    std::fs::write(&model, layer(heads, kv_heads, head).encode_to_vec()).unwrap();
    write(&given, &inputs(kv_heads, head));
    let ranks = ranks.to_string();
    end(&mut tpshard(words![model, "--tp", ranks, "-o", out, "--memory", "min", "--overwrite"])).ok();
    end(&mut tpshard(words!["check", out])).ok();
    let verified =
        end(&mut tpshard(words!["verify", out, "--model", model, "--inputs", given, "--json"])).ok();
    assert_eq!(verified.json()["results"][0]["passed"], true, "{verified:?}");
    // All of the model's inputs may be given, those that no output needs as well.
    end(&mut tpshard(words!["run", out, "--inputs", given])).ok();
    let plan = std::fs::read_to_string(out.join("plan.txt")).unwrap();
    assert!(plan.contains("imbalance "), "{plan}");
}

#[test]
fn every_pair_of_head_counts_end_to_end() {
    let scratch = scratch();
    let pairs = pairs();
    assert_eq!(pairs.len(), 22);
    for (&(heads, kv_heads), ranks) in pairs.iter().zip(RANKS.into_iter().cycle()) {
        run_end_to_end(scratch.path(), heads, kv_heads, ranks);
        println!("{heads} heads over {kv_heads} on {ranks} ranks");
    }
}
