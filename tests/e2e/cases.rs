//! Models that choose between graphs by a bool input: one folder with an entry for each value, over one set of weights.

use crate::support::*;
use crate::words;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use tpshard_ir::{Data, Tensor};

/// The committed decoder of two graphs with ONNX Runtime's outputs for both.
fn merged() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/merged-decoder")
}

fn merged_model() -> PathBuf {
    merged().join("model.onnx")
}

const SIZES: &str = "batch=1..4,seq=1..32,past=0..48";

#[track_caller]
fn shard_merged(ranks: usize, folder: &Path, more: &[&str]) {
    let words = words![merged_model(), "--tp", ranks.to_string(), "-o", folder, "--dim", SIZES];
    end(tpshard(words).args(more)).ok();
}

fn config(folder: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(folder.join("config.json")).unwrap()).unwrap()
}

fn bytes_of_weights(folder: &Path, ranks: usize) -> u64 {
    let tensors = |rank: usize| config(folder)["ranks"][rank]["tensors"].as_array().unwrap().clone();
    (0..ranks).flat_map(tensors).map(|tensor| tensor["length"].as_u64().unwrap()).sum()
}

#[test]
fn both_graphs_are_right_on_one_two_and_three_ranks() {
    for ranks in 1..=3 {
        let scratch = scratch();
        let out = scratch.path().join("out");
        shard_merged(ranks, &out, &[]);
        let config = config(&out);
        let cases: Vec<&Value> =
            config["entries"].as_array().unwrap().iter().map(|entry| &entry["cases"]).collect();
        assert_eq!(cases, [&json!({ "use_cache_branch": true }), &json!({ "use_cache_branch": false })]);
        let verified = end(&mut tpshard(words!["verify", out, "--golden", merged()])).ok();
        assert_eq!(verified.stdout.matches("PASSED logits").count(), 2, "{}", verified.stdout);
        let by_model = words!["verify", out, "--golden", merged(), "--model", merged_model(), "--bisect"];
        let bisected = end(&mut tpshard(by_model)).ok();
        assert!(bisected.stdout.contains("on 2 inputs"), "{}", bisected.stdout);
        let checked = end(&mut tpshard(words!["check", out, "--model", merged_model()])).ok();
        for entry in ["with-use_cache_branch", "without-use_cache_branch"] {
            assert!(checked.stdout.contains(&format!("certificate of entry {entry}")), "{}", checked.stdout);
        }
    }
}

#[test]
fn weights_of_both_graphs_lie_there_once() {
    let scratch = scratch();
    let folder = |name: &str| scratch.path().join(name);
    shard_merged(2, &folder("both"), &[]);
    shard_merged(2, &folder("one"), &["--bind", "use_cache_branch=true"]);
    assert_eq!(bytes_of_weights(&folder("both"), 2), bytes_of_weights(&folder("one"), 2));
    for rank in 0..2 {
        let name = format!("rank{rank}.safetensors");
        let size = |of: &str| fs::metadata(folder(of).join(&name)).unwrap().len();
        assert_eq!(size("both"), size("one"));
    }
    assert!(config(&folder("one"))["entries"][0].get("cases").is_none());
    let plan = fs::read_to_string(folder("both").join("plan.txt")).unwrap();
    assert!(plan.contains("use_cache_branch=true (with-use_cache_branch): gap 0.00 %"), "{plan}");
    assert!(plan.contains("use_cache_branch=false (without-use_cache_branch): gap 0.00 %"), "{plan}");
    let graphs = config(&folder("both"))["build"]["plan"]["graphs"].clone();
    assert_eq!(graphs.as_array().map(Vec::len), Some(2), "{graphs}");
    assert_eq!(graphs[0]["case"], "use_cache_branch=true");
}

/// Inputs of the prompt with `use_cache_branch` replaced.
fn prompt_with(scratch: &Path, value: Option<Tensor>) -> PathBuf {
    let mut inputs = read(&merged().join("inputs_prompt.npz"));
    inputs.shift_remove("use_cache_branch");
    inputs.extend(value.map(|value| ("use_cache_branch".to_owned(), value)));
    let path = scratch.join("inputs.npz");
    write(&path, &inputs);
    path
}

#[test]
fn a_value_that_chooses_nothing_is_refused_with_its_type() {
    let scratch = scratch();
    let out = scratch.path().join("out");
    shard_merged(2, &out, &[]);
    let refused = |value: Option<Tensor>, words: &[&str]| {
        let inputs = prompt_with(scratch.path(), value);
        let ended = end(&mut tpshard(words!["run", out, "--inputs", inputs])).fails(2, words);
        assert!(ended.stderr.contains("use_cache_branch") && ended.stderr.contains("help: "), "{ended:?}");
    };
    refused(Some(Tensor::new(vec![1], Data::I64(vec![1])).unwrap()), &["i64[1]", "bool[1]"]);
    refused(Some(Tensor::new(vec![1], Data::F32(vec![1.0])).unwrap()), &["f32[1]", "bool[1]"]);
    refused(Some(Tensor::new(vec![2], Data::Bool(vec![true; 2])).unwrap()), &["bool[2]", "bool[1]"]);
    refused(None, &["is missing", "bool[1]"]);
    // The prompt's mask is as long as the prompt, which is too short for a graph that has a past of one.
    let cached = Some(Tensor::new(vec![1], Data::Bool(vec![true])).unwrap());
    let inputs = prompt_with(scratch.path(), cached);
    end(&mut tpshard(words!["run", out, "--inputs", inputs])).fails(2, &["attention_mask", "help: "]);
    let model =
        words!["verify", out, "--model", merged_model(), "--inputs", prompt_with(scratch.path(), None)];
    end(&mut tpshard(model)).fails(2, &["use_cache_branch", "bool[1]", "help: "]);
}

/// The most probable token after `tokens`, by the graph without a cache.
fn next(folder: &Path, tokens: &[i64]) -> i64 {
    let scratch = scratch();
    let (inputs, outputs) = (scratch.path().join("in.npz"), scratch.path().join("out.npz"));
    let mut given = read(&merged().join("inputs_prompt.npz"));
    let row = |values: Vec<i64>| Tensor::new(vec![1, values.len()], Data::I64(values)).unwrap();
    given.insert("input_ids".into(), row(tokens.to_vec()));
    given.insert("attention_mask".into(), row(vec![1; tokens.len()]));
    given.insert("position_ids".into(), row((0..tokens.len() as i64).collect()));
    for (name, tensor) in given.iter_mut().filter(|(name, _)| name.starts_with("past")) {
        assert_eq!(tensor.shape(), [2, 6, 1, 4], "{name}");
        *tensor = Tensor::new(vec![1, 6, 0, 4], Data::F32(Vec::new())).unwrap();
    }
    write(&inputs, &given);
    end(&mut tpshard(words!["run", folder, "--inputs", inputs, "--outputs", outputs])).ok();
    let found = read(&outputs);
    let Data::F32(logits) = found["logits"].data() else { panic!("logits are not floats") };
    let last = &logits[logits.len() - 96..];
    last.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0 as i64
}

#[test]
fn generating_begins_without_a_cache_and_goes_on_with_it() {
    let scratch = scratch();
    let out = scratch.path().join("out");
    shard_merged(2, &out, &[]);
    let words = words!["generate", out, "--prompt-ids", "5,17,42", "--max-tokens", "5", "--json"];
    let found = end(&mut tpshard(words)).ok().json();
    let mut text = vec![5, 17, 42];
    for _ in 0..5 {
        text.push(next(&out, &text));
    }
    assert_eq!(found["tokens"], json!(text[3..]), "{found}");
    let words = words![
        "bench",
        out,
        "--inputs",
        merged().join("inputs_prompt.npz"),
        "--decode",
        "3",
        "--samples",
        "2",
        "--json"
    ];
    end(&mut tpshard(words)).ok();
}

#[test]
fn sizes_are_for_all_graphs_or_for_one() {
    let table = |flags: &[&str]| end(tpshard(words!["plan", merged_model(), "--ranks", "2"]).args(flags));
    let both = table(&["--dim", "seq=4"]).ok().stdout;
    assert!(
        both.contains("with-use_cache_branch at") && both.contains("without-use_cache_branch at"),
        "{both}"
    );
    let one =
        ["--dim", "step*9:use_cache_branch=true,seq=1", "--dim", "prompt:use_cache_branch=false,seq=16"];
    let one = table(&one).ok().stdout;
    assert!(one.contains("step at batch=1, past=2048, sequence=1"), "{one}");
    assert!(one.contains("prompt at batch=1, past=2048, sequence=16"), "{one}");
    table(&["--dim", "use_cache_branch=maybe"]).fails(2, &["neither true nor false", "help: "]);
    let explain = words!["explain", merged_model(), "--tp", "2", "--tensor", "head.weight"];
    end(&mut tpshard(explain)).fails(2, &["--bind use_cache_branch=", "help: "]);
    let explain = words![
        "explain",
        merged_model(),
        "--tp",
        "2",
        "--tensor",
        "head.weight",
        "--bind",
        "use_cache_branch=false"
    ];
    end(&mut tpshard(explain)).ok();
}

#[test]
fn inspect_tells_both_graphs() {
    let text = end(&mut tpshard(words!["inspect", merged_model()])).ok().stdout;
    assert!(text.contains("graph for use_cache_branch=true"), "{text}");
    assert!(text.contains("graph for use_cache_branch=false"), "{text}");
    let json = end(&mut tpshard(words!["inspect", merged_model(), "--json"])).ok().json();
    assert_eq!(json["graphs"].as_array().unwrap().len(), 2);
    assert_eq!(json["graphs"][1]["cases"], json!({ "use_cache_branch": false }));
    assert_eq!(json["graphs"][0]["states"], json["graphs"][1]["states"]);
}

#[test]
fn a_graph_that_is_not_the_models_is_found() {
    let scratch = scratch();
    let out = scratch.path().join("out");
    shard_merged(2, &out, &[]);
    let file = out.join("model-1.tir");
    let text = fs::read_to_string(&file).unwrap();
    let check = || end(&mut tpshard(words!["check", out]));
    // The graph of the prompt, passed off as that with a cache.
    fs::write(&file, text.replace("bool[1] = false", "bool[1] = true")).unwrap();
    check().fails(4, &["model-1.tir: is not for other values", "without-use_cache_branch: is for"]);
    fs::write(&file, text.replacen("\"Softmax", "\"Hardmax", 1).replacen("Softmax", "Hardmax", 1)).unwrap();
    check().fails(4, &["without-use_cache_branch"]);
    fs::write(&file, text.replace("bool[1] = false", "bool[2] = false")).unwrap();
    check().fails(4, &["model-1.tir", "is not one bool"]);
    fs::remove_file(&file).unwrap();
    check().fails(5, &["model-1.tir"]);
}

/// What the encoder gave has a length of its own, and its keys and values are made by one graph and read by the other.
#[test]
fn a_decoder_that_looks_at_an_encoder_is_right_in_both_graphs() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/merged-encoder-decoder");
    let model = golden.join("model.onnx");
    for ranks in 1..=3 {
        let scratch = scratch();
        let out = scratch.path().join("out");
        let ranks = ranks.to_string();
        end(&mut tpshard(words![model, "--tp", ranks, "-o", out, "--memory", "min", "--quiet"])).ok();
        let verified = end(&mut tpshard(words!["verify", out, "--golden", golden])).ok();
        assert_eq!(verified.stdout.matches("PASSED logits").count(), 2, "{}", verified.stdout);
        end(&mut tpshard(words!["check", out, "--model", model])).ok();
    }
    let roles =
        end(&mut tpshard(words!["inspect", model, "--json"])).ok().json()["graphs"][0]["roles"].clone();
    assert_eq!(
        roles,
        json!({ "batch_size": "batch", "decoder_sequence_length": "seq", "past_decoder_sequence_length": "past" })
    );
}
