//! What is wrong with a model, a flag or an input is said in one paragraph with a remedy, with the right exit code, and
//! leaves nothing behind.

use crate::support::*;
use crate::words;
use bytes::Bytes;
use prost::Message;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use tpshard_frontend::proto::*;
use tpshard_ir::{DType, Data, Tensor};
use tpshard_runtime::io::NamedTensors;

/// A folder with one model in it, to which nothing may be added.
struct Case {
    scratch: TempDir,
    model: PathBuf,
}

impl Case {
    fn bytes(bytes: &[u8]) -> Case {
        let scratch = scratch();
        let model = scratch.path().join("case.onnx");
        fs::write(&model, bytes).unwrap();
        Case { scratch, model }
    }

    fn model(model: &ModelProto) -> Case {
        Case::bytes(&model.encode_to_vec())
    }

    /// Expects sharding to fail with this code and these words, besides the remedy.
    #[track_caller]
    fn refused(&self, code: i32, words: &[&str]) {
        let before = names(self.scratch.path());
        let out = self.scratch.path().join("out");
        let mut shard = tpshard(words![self.model, "--tp", "2", "-o", out]);
        one_paragraph(end(&mut shard).fails(code, words));
        assert_eq!(names(self.scratch.path()), before);
        // Planning writes nothing in any case, and finds the same.
        let planned = end(&mut tpshard(words!["plan", self.model]));
        assert!(!planned.stderr.contains("panicked"), "{planned:?}");
        assert_eq!(names(self.scratch.path()), before);
    }
}

/// An error, what it is about, and a remedy; no empty lines, no backtrace.
#[track_caller]
fn one_paragraph(ended: Ended) -> Ended {
    let text = ended.stderr.trim_end();
    assert!(text.contains("error: ") && text.contains("help: "), "{text}");
    assert!(text.lines().all(|line| !line.trim().is_empty()), "{text}");
    assert!(ended.stdout.is_empty(), "{}", ended.stdout);
    ended
}

fn strings(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn node(op_type: &str, name: &str, input: &[&str], output: &[&str]) -> NodeProto {
    NodeProto {
        op_type: op_type.into(),
        name: name.into(),
        input: strings(input),
        output: strings(output),
        ..NodeProto::default()
    }
}

/// A value of f32.
fn value(name: &str, dims: &[i64]) -> ValueInfoProto {
    let dim = dims.iter().map(|&d| DimensionProto { value: Some(DimensionValue::Value(d)) }).collect();
    let tensor = TensorTypeProto { elem_type: 1, shape: Some(TensorShapeProto { dim }) };
    let ty = TypeProto { value: Some(TypeValue::Tensor(tensor)), denotation: String::new() };
    ValueInfoProto { name: name.into(), r#type: Some(Box::new(ty)), metadata_props: vec![] }
}

/// `x[2, 4] @ w[4, 4]`, with more nodes and another `w` as the case needs.
fn matmul(weight: TensorProto) -> ModelProto {
    let graph = GraphProto {
        name: "case".into(),
        node: vec![node("MatMul", "product", &["x", "w"], &["y"])],
        input: vec![value("x", &[2, 4])],
        output: vec![value("y", &[2, 4])],
        initializer: vec![weight],
        ..GraphProto::default()
    };
    ModelProto {
        ir_version: Some(10),
        opset_import: vec![OperatorSetIdProto { domain: String::new(), version: 17 }],
        graph: Some(Box::new(graph)),
        ..ModelProto::default()
    }
}

fn weight(dims: &[i64], bytes: usize) -> TensorProto {
    TensorProto {
        name: "w".into(),
        dims: dims.to_vec(),
        data_type: 1,
        raw_data: Some(Bytes::from(vec![0; bytes])),
        ..TensorProto::default()
    }
}

fn external(pairs: &[(&str, &str)]) -> TensorProto {
    let entry =
        |(key, value): &(&str, &str)| StringStringEntryProto { key: (*key).into(), value: (*value).into() };
    TensorProto {
        raw_data: None,
        data_location: 1,
        external_data: pairs.iter().map(entry).collect(),
        ..weight(&[4, 4], 0)
    }
}

fn graph_of(model: &mut ModelProto) -> &mut GraphProto {
    model.graph.as_mut().unwrap()
}

/// The cases below fail for the reason they name, and not because the model they start from is wrong.
#[test]
fn the_model_that_the_cases_break_is_right() {
    let case = Case::model(&matmul(weight(&[4, 4], 64)));
    let out = case.scratch.path().join("out");
    end(&mut tpshard(words![case.model, "--tp", "2", "-o", out])).ok();
    end(&mut tpshard(words!["check", out, "--model", case.model])).ok();
}

#[test]
fn impossible_numbers_of_ranks() {
    let scratch = scratch();
    let out = scratch.path().join("out");
    for ranks in ["0", "5000", "1025"] {
        let mut shard = tpshard(words![model(), "--tp", ranks, "-o", out]);
        one_paragraph(end(&mut shard).fails(2, &[ranks, "1024"]));
        let mut plan = tpshard(words!["plan", model(), "--ranks", ranks]);
        one_paragraph(end(&mut plan).fails(2, &[ranks, "1024"]));
    }
    for ranks in ["-1", "many", "99999999999999999999999"] {
        end(&mut tpshard(words![model(), "--tp", ranks, "-o", out])).fails(2, &[]);
    }
    for ranks in ["", "4-x", "1,,2"] {
        let mut plan = tpshard(words!["plan", model(), "--ranks", ranks]);
        one_paragraph(end(&mut plan).fails(2, &["--ranks"]));
    }
    assert!(names(scratch.path()).is_empty());
}

#[test]
fn models_that_are_not_there_or_not_models() {
    let scratch = scratch();
    let (missing, out) = (scratch.path().join("missing.onnx"), scratch.path().join("out"));
    one_paragraph(end(&mut tpshard(words![missing, "--tp", "2", "-o", out])).fails(5, &["missing.onnx"]));
    one_paragraph(end(&mut tpshard(words![scratch.path(), "--tp", "2", "-o", out])).fails(5, &[]));
    assert!(names(scratch.path()).is_empty());
    Case::bytes(b"").refused(3, &["case.onnx"]);
    Case::bytes(b"PK\x03\x04 some archive").refused(3, &["case.onnx"]);
    Case::bytes(&[0xff; 4096]).refused(3, &["case.onnx"]);
}

#[test]
fn models_that_were_cut_off() {
    let whole = fs::read(model()).unwrap();
    for numerator in [1, 5, 9] {
        Case::bytes(&whole[..whole.len() * numerator / 10]).refused(3, &["case.onnx"]);
    }
}

#[test]
fn a_cycle_is_named() {
    let mut model = matmul(weight(&[4, 4], 64));
    graph_of(&mut model).node = vec![
        node("Add", "first", &["x", "b"], &["a"]),
        node("Relu", "second", &["a"], &["b"]),
        node("MatMul", "product", &["b", "w"], &["y"]),
    ];
    Case::model(&model).refused(3, &["case.onnx", "first"]);
}

#[test]
fn an_input_of_a_node_that_nobody_makes_is_named() {
    let mut model = matmul(weight(&[4, 4], 64));
    graph_of(&mut model).node[0].input[0] = "nowhere".into();
    Case::model(&model).refused(3, &["case.onnx", "product", "nowhere"]);
}

#[test]
fn external_data_outside_the_folder_is_refused() {
    for location in ["../secret.bin", "/etc/hostname", "deeper/../../secret.bin", ""] {
        let case = Case::model(&matmul(external(&[("location", location)])));
        case.refused(3, &["case.onnx", "w"]);
    }
    // Nor by way of a link.
    let case = Case::model(&matmul(external(&[("location", "link.bin")])));
    std::os::unix::fs::symlink("/etc/hostname", case.scratch.path().join("link.bin")).unwrap();
    case.refused(3, &["case.onnx", "link.bin"]);
}

#[test]
fn external_data_past_the_end_is_refused() {
    for (offset, length) in
        [("0", "64"), ("1000", "64"), ("18446744073709551615", "64"), ("-8", "64"), ("0", "8")]
    {
        let pairs = [("location", "weights.bin"), ("offset", offset), ("length", length)];
        let case = Case::model(&matmul(external(&pairs)));
        fs::write(case.scratch.path().join("weights.bin"), [0; 32]).unwrap();
        case.refused(3, &["case.onnx", "w"]);
    }
    let case = Case::model(&matmul(external(&[("location", "missing.bin")])));
    case.refused(5, &["case.onnx", "missing.bin"]);
}

#[test]
fn dims_that_overflow_are_refused() {
    // More elements than any file holds: such a model is damaged.
    for dims in [[1 << 62, 4], [i64::MAX, i64::MAX], [1 << 33, 1 << 33]] {
        Case::model(&matmul(weight(&dims, 64))).refused(3, &["case.onnx", "w"]);
    }
    Case::model(&matmul(weight(&[-1, 4], 64))).refused(3, &["case.onnx", "w"]);
    Case::model(&matmul(weight(&[4, 4], 63))).refused(3, &["case.onnx", "w"]);
}

#[test]
fn shapes_that_do_not_fit_are_named_by_node() {
    Case::model(&matmul(weight(&[5, 4], 80))).refused(3, &["case.onnx", "product", "MatMul"]);
}

#[test]
fn all_operators_that_are_not_supported_are_listed() {
    let mut model = matmul(weight(&[4, 4], 64));
    let mut custom = node("Teleport", "beam", &["a"], &["b"]);
    custom.domain = "com.example".into();
    graph_of(&mut model).node = vec![
        node("FancyActivation", "fancy", &["x"], &["a"]),
        custom,
        node("MatMul", "product", &["b", "w"], &["y"]),
    ];
    model.opset_import.push(OperatorSetIdProto { domain: "com.example".into(), version: 1 });
    Case::model(&model).refused(3, &["case.onnx", "fancy", "FancyActivation", "beam", "Teleport"]);
}

#[test]
fn flags_that_mean_nothing_are_explained() {
    let scratch = scratch();
    let out = scratch.path().join("out");
    let cases: [(&[&str], &[&str]); 13] = [
        (&["--dim", "colour=3"], &["--dim colour", "batch"]),
        (&["--dim", "batch"], &["--dim batch"]),
        (&["--dim", "batch=-1"], &["--dim batch=-1"]),
        (&["--dim", "batch=x"], &["--dim batch=x"]),
        (&["--dim", "past=1,seq=1,total=9"], &["--dim total=9"]),
        (&["--profile", "abacus"], &["--profile abacus", "h100-sxm"]),
        (&["--memory", "lots"], &["--memory lots"]),
        (&["--memory", "12parsec"], &["--memory 12parsec"]),
        (&["--memory", "-1GiB"], &["-1"]),
        (&["--role", "batch=colour"], &["--role batch=colour"]),
        (&["--bind", "input_ids"], &["--bind input_ids"]),
        (&["--bind", "input_ids=red"], &["--bind input_ids=red"]),
        (&["--output", "logits=best"], &["logits=best"]),
    ];
    for (flags, words) in cases {
        let mut shard = tpshard(words![model(), "--tp", "2", "-o", out]);
        let ended = end(shard.args(flags));
        // clap explains flags that look like other flags.
        if ended.stderr.contains("For more information") {
            ended.fails(2, words);
        } else {
            one_paragraph(ended.fails(2, words));
        }
        assert!(names(scratch.path()).is_empty(), "{flags:?}");
    }
}

#[test]
fn memory_that_cannot_suffice_is_a_matter_of_resources() {
    let scratch = scratch();
    let out = scratch.path().join("out");
    let mut shard = tpshard(words![model(), "--tp", "2", "-o", out, "--memory", "1KiB"]);
    one_paragraph(end(&mut shard).fails(5, &[]));
    assert!(names(scratch.path()).is_empty());
}

#[test]
fn a_profile_file_that_is_broken_is_named() {
    let scratch = scratch();
    let profile = scratch.path().join("mine.profile");
    for text in ["", "nonsense", "{\"name\": 3}"] {
        fs::write(&profile, text).unwrap();
        let mut plan = tpshard(words!["plan", model(), "--profile", profile]);
        end(&mut plan).fails(2, &["mine.profile"]);
    }
}

/// Runs the model over 2 ranks with changed inputs.
fn run_with(change: impl FnOnce(&mut NamedTensors)) -> (TempDir, Ended) {
    let scratch = scratch();
    let mut inputs = read(&prompt());
    change(&mut inputs);
    let (given, got) = (scratch.path().join("in.npz"), scratch.path().join("got.npz"));
    write(&given, &inputs);
    let ended = end(&mut tpshard(words!["run", sharded(2), "--inputs", given, "--outputs", got]));
    assert_eq!(names(scratch.path()), ["in.npz"]);
    (scratch, ended)
}

fn zeros(dtype: DType, shape: &[usize]) -> Tensor {
    Tensor::zeros(dtype, shape.to_vec()).unwrap()
}

#[test]
fn inputs_that_do_not_fit_are_named() {
    let run = |words: &[&str], change: &dyn Fn(&mut NamedTensors)| {
        let (_scratch, ended) = run_with(change);
        one_paragraph(ended.fails(2, words));
    };
    run(&["position_ids"], &|inputs| drop(inputs.shift_remove("position_ids")));
    run(&["colour"], &|inputs| drop(inputs.insert("colour".into(), zeros(DType::F32, &[1]))));
    run(&["input_ids", "f32", "i64"], &|inputs| {
        inputs["input_ids"] = zeros(DType::F32, &[2, 7]);
    });
    run(&["input_ids"], &|inputs| inputs["input_ids"] = zeros(DType::I64, &[2, 7, 1]));
    // A dim that is a number in the model.
    run(&["past_key_values.0.key", "5", "4"], &|inputs| {
        inputs["past_key_values.0.key"] = zeros(DType::F32, &[2, 5, 0, 8]);
    });
    // `batch` is 2 by one input and 3 by another.
    run(&["input_ids", "position_ids", "batch"], &|inputs| {
        inputs["position_ids"] = zeros(DType::I64, &[3, 7]);
    });
    run(&["past_key_values.3.value", "batch"], &|inputs| {
        inputs["past_key_values.3.value"] = zeros(DType::F32, &[1, 4, 0, 8]);
    });
    // The mask spans past and new tokens.
    run(&["attention_mask"], &|inputs| inputs["attention_mask"] = zeros(DType::I64, &[2, 9]));
}

/// A token that is not in the vocabulary is an error, not a read outside the table.
#[test]
fn tokens_outside_the_vocabulary_are_refused() {
    let (_scratch, ended) = run_with(|inputs| {
        inputs["input_ids"] = Tensor::new(vec![2, 7], Data::I64(vec![512; 14])).unwrap();
    });
    let ended = ended.fails(2, &["/model/model/embed_tokens/Gather", "index 512", "0 to 511", "help: "]);
    // Rank 0 has the inputs; it says so once.
    assert_eq!(ended.stderr.matches("index 512").count(), 1, "{}", ended.stderr);
}

#[test]
fn inputs_that_cannot_be_read_are_named() {
    let scratch = scratch();
    let run = |path: &Path, code: i32, words: &[&str]| {
        one_paragraph(end(&mut tpshard(words!["run", sharded(2), "--inputs", path])).fails(code, words));
    };
    run(&scratch.path().join("missing.npz"), 5, &["missing.npz"]);
    let broken = scratch.path().join("broken.npz");
    let whole = fs::read(prompt()).unwrap();
    fs::write(&broken, &whole[..whole.len() / 2]).unwrap();
    run(&broken, 5, &["broken.npz"]);
    fs::write(&broken, "no archive").unwrap();
    run(&broken, 5, &["broken.npz"]);
    let empty = scratch.path().join("empty");
    fs::create_dir(&empty).unwrap();
    run(&empty, 2, &["empty"]);
    one_paragraph(
        end(&mut tpshard(words!["run", sharded(2)])).fails(2, &["no inputs", "input_ids", "--inputs"]),
    );
}

#[test]
fn folders_that_are_not_ours_are_refused() {
    let scratch = scratch();
    let foreign = scratch.path().join("foreign");
    fs::create_dir(&foreign).unwrap();
    for command in ["run", "check", "verify", "exec", "inspect"] {
        let refuse = |folder: &Path, code: i32| {
            let mut line = tpshard(words![command, folder]);
            if command == "verify" {
                line.arg("--golden").arg(golden());
            }
            one_paragraph(end(&mut line).fails(code, &[]));
        };
        refuse(&foreign, 5);
        if command != "inspect" {
            refuse(&scratch.path().join("missing"), 5);
            refuse(&prompt(), 5);
        }
        for text in ["", "[]", "{}", "{\"format\": \"other\"}"] {
            fs::write(foreign.join("config.json"), text).unwrap();
            refuse(&foreign, 4);
        }
        fs::remove_file(foreign.join("config.json")).unwrap();
    }
}
