//! The bytes that plans say are communicated are those that the ranks count.

use crate::support::*;
use crate::words;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// A folder of models with golden pairs that are tried as well, e.g. one made with exporters nobody here wrote.
const MODELS: &str = "TPSHARD_MODELS";

fn sum(kinds: &Value, field: &str) -> u64 {
    kinds.as_object().unwrap().values().map(|kind| kind[field].as_u64().unwrap()).sum()
}

/// Shards for the very dims of the inputs, runs, and compares collectives and bytes of rank 0.
#[track_caller]
fn compare(model: &Path, inputs: &Path, dims: Option<&str>, ranks: usize, memory: &str) {
    let scratch = scratch();
    let out = scratch.path().join("out");
    let ranks = ranks.to_string();
    let mut shard = tpshard(words![model, "--tp", ranks, "-o", out, "--memory", memory]);
    if let Some(dims) = dims {
        shard.args(["--dim", dims]);
    }
    let planned = end(shard.arg("--json")).ok().json();
    let planned = &planned["plan"]["entries"][0]["collectives"];
    let planned: Vec<u64> =
        planned.as_array().unwrap().iter().map(|c| c["payload_bytes"].as_u64().unwrap()).collect();
    let counted = end(&mut tpshard(words!["run", out, "--inputs", inputs, "--json"])).ok().json();
    let counted = &counted["communication"];
    let place = format!("{} over {ranks} with {memory}: {counted}", model.display());
    assert_eq!(sum(counted, "bytes"), planned.iter().sum::<u64>(), "{place}");
    assert_eq!(sum(counted, "collectives"), planned.len() as u64, "{place}");
}

#[test]
fn ranks_count_the_bytes_that_were_planned() {
    for ranks in [1, 2, 3, 4, 5] {
        for memory in ["min", "free"] {
            compare(&model(), &prompt(), Some("batch=2,seq=7,past=0"), ranks, memory);
        }
    }
    compare(&model(), &golden().join("inputs_decode.npz"), Some("batch=2,seq=1,past=7"), 4, "min");
}

/// The dims that the inputs have, as `--dim` takes them.
fn dims_of(model: &Path, inputs: &Path) -> Option<String> {
    let inspected = end(&mut tpshard(words!["inspect", model, "--json"])).ok().json();
    let tensors = read(inputs);
    let mut dims = std::collections::BTreeMap::new();
    for input in inspected["inputs"].as_array()? {
        let tensor = tensors.get(input["name"].as_str()?)?;
        let text = input["type"].as_str()?;
        let shape = text.split_once('[')?.1.strip_suffix(']')?;
        for (dim, &size) in shape.split(", ").zip(tensor.shape()) {
            let symbol = |c: char| c.is_ascii_alphanumeric() || c == '_';
            if !dim.is_empty() && dim.chars().all(symbol) && !dim.starts_with(|c: char| c.is_ascii_digit()) {
                dims.insert(dim.to_owned(), size);
            }
        }
    }
    let list: Vec<String> = dims.into_iter().map(|(name, size)| format!("{name}={size}")).collect();
    (!list.is_empty()).then(|| list.join(","))
}

#[test]
fn ranks_count_the_bytes_that_were_planned_for_other_models() {
    let Some(folder) = std::env::var_os(MODELS).map(PathBuf::from) else {
        return println!("skipped: {MODELS} names no folder of models");
    };
    let mut compared = 0;
    for name in names(&folder) {
        let model = folder.join(&name).join("model.onnx");
        let inputs = folder.join(&name).join("inputs.npz");
        if !model.is_file() || !inputs.is_file() {
            continue;
        }
        let inspected = end(&mut tpshard(words!["inspect", model, "--json"]));
        if inspected.code == Some(3) {
            println!("skipped: {name} is not supported");
            continue;
        }
        for ranks in [2, 4] {
            compare(&model, &inputs, dims_of(&model, &inputs).as_deref(), ranks, "min");
            compared += 1;
        }
    }
    println!("{compared} folders compared");
}
