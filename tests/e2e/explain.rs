//! Layouts that people fix, in files and in the model; why layouts are what they are; and what differs between plans.

use crate::support::*;
use crate::words;
use bytes::Bytes;
use prost::Message;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use tpshard_frontend::proto::*;

/// What the plans of the committed model are made for here.
const FLAGS: [&str; 2] = ["--dim", "batch=1,seq=1,past=128"];
/// Row-parallel weight of the first attention's output projection.
const OUT_PROJECTION: &str = "onnx::MatMul_1217";

/// `TPSHARD_BLESS=1` writes the texts instead of comparing with them.
#[test]
fn explanations_are_the_committed_ones() {
    let cases = [
        ("weight", "4", ["--tensor", OUT_PROJECTION]),
        ("node", "4", ["--node", "/model/model/layers.1/mlp/down_proj/MatMul"]),
        ("uneven-state", "3", ["--tensor", "past_key_values.0.key"]),
        ("input", "4", ["--tensor", "input_ids"]),
    ];
    for (name, ranks, words) in cases {
        let mut explain = tpshard(words!["explain", model(), "--tp", ranks]);
        let found = end(explain.args(words).args(FLAGS)).ok().stdout;
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../tests/e2e/golden/explain-{name}.txt"));
        if std::env::var_os("TPSHARD_BLESS").is_some() {
            fs::write(&path, &found).unwrap();
        }
        let expected = fs::read_to_string(&path).unwrap_or_default();
        assert!(found == expected, "{name}: TPSHARD_BLESS=1 accepts this text:\n{found}");
    }
}

#[test]
fn machines_get_every_layout_with_its_price() {
    let explain = words!["explain", model(), "--tp", "4", "--tensor", OUT_PROJECTION, "--json"];
    let found = end(&mut tpshard(explain)).ok().json();
    assert_eq!((&found["chosen"], &found["shape"]), (&"S(0)".into(), &serde_json::json!(["64", "64"])));
    let layouts = found["layouts"].as_array().unwrap();
    let names: Vec<&str> = layouts.iter().map(|l| l["layout"].as_str().unwrap()).collect();
    assert_eq!(names, ["R", "S(0)", "S(1)"]);
    assert_eq!(layouts[1]["seconds_more"], 0.0);
    assert!(layouts[2]["seconds_more"].as_f64().unwrap() > 0.0, "{found}");
    assert!(layouts[0]["bytes_over_budget"].as_u64().unwrap() > 0, "{found}");
    assert_eq!(layouts[2]["collectives_removed"][0]["kind"], "all_reduce");
    assert_eq!(found["why"].as_array().unwrap().len(), 2, "{found}");
}

#[test]
fn a_budget_that_no_plan_keeps_with_a_layout_is_named() {
    let least = end(&mut tpshard(words!["plan", model(), "--ranks", "4", "--json"])).ok().json();
    let plan = &least["plans"][0]["plan"];
    let bytes = |key: &str| plan[key].as_u64().unwrap();
    let needed = ["weight_bytes_per_rank", "state_bytes_per_rank", "activation_bytes_per_rank"];
    let budget: u64 = needed.iter().map(|key| bytes(key)).sum::<u64>() + 4096;
    let mut explain = tpshard(words!["explain", model(), "--tp", "4", "--tensor", OUT_PROJECTION]);
    let ended = end(explain.args(["--memory", &budget.to_string()])).ok();
    assert!(ended.stdout.contains("over the budget"), "{}", ended.stdout);
    assert!(ended.stdout.contains("does not allow R: it needs"), "{}", ended.stdout);
}

#[test]
fn what_cannot_be_explained_is_said() {
    let explain = |words: &[&str]| {
        let mut explain = tpshard(words!["explain", model()]);
        end(explain.args(words))
    };
    let tensor = |name| explain(&["--tp", "2", "--tensor", name]);
    tensor("logitz").fails(2, &["no such tensor (`logitz`)", "help: near: logits"]);
    tensor("/model/model/Constant_output_0").fails(2, &["was folded into others", "help: "]);
    explain(&["--tp", "2", "--node", "/lm_head"]).fails(2, &["no such node", "/model/lm_head/MatMul"]);
    explain(&["--tp", "1", "--tensor", "logits"]).fails(2, &["--tp 1", "help: "]);
    explain(&["--tp", "2"]).fails(2, &["--tensor"]);
    explain(&["--tp", "2", "--tensor", "logits", "--node", "x"]).fails(2, &["cannot be used with"]);
}

/// A folder with a pin file.
fn pin_file(text: &str) -> (TempDir, PathBuf) {
    let scratch = scratch();
    let path = scratch.path().join("pins.txt");
    fs::write(&path, text).unwrap();
    (scratch, path)
}

#[track_caller]
fn planned(model: &Path, ranks: &str, more: &[&str], pins: &[&Path]) -> Value {
    let mut plan = tpshard(words!["plan", model, "--ranks", ranks, "--json"]);
    pins.iter().for_each(|path| {
        plan.arg("--pin").arg(path);
    });
    end(plan.args(more)).ok().json()["plans"][0]["plan"].take()
}

/// The layouts of stored tensors by name, numbers left open.
fn stored(plan: &Value) -> Vec<(String, String)> {
    let text = |s: &Value, key: &str| s[key].as_str().unwrap().to_owned();
    plan["stored"].as_array().unwrap().iter().map(|s| (text(s, "name"), text(s, "layout"))).collect()
}

#[test]
fn pinned_plans_keep_the_pins_and_compute_the_same() {
    let text = format!(
        "# rows of one weight, and all layers at once\n\ntensor {OUT_PROJECTION} = S(-1)\n\
         node /model/model/layers.*/mlp/down_proj/MatMul = S(2)  # scattered\n"
    );
    let (scratch, pins) = pin_file(&text);
    let plan = planned(&model(), "4", &FLAGS, &[&pins]);
    let scattered = plan["entries"][0]["collectives"].as_array().unwrap().iter().filter(|c| {
        c["kind"] == "reduce_scatter" && c["node"].as_str().unwrap().contains("/mlp/down_proj/MatMul")
    });
    assert_eq!(scattered.count(), 4, "{plan}");
    let free = planned(&model(), "4", &FLAGS, &[]);
    assert!(plan["seconds"].as_f64() > free["seconds"].as_f64());
    let out = scratch.path().join("out");
    let mut shard = tpshard(words![model(), "--tp", "4", "-o", out, "--pin", pins]);
    end(&mut shard).ok();
    let config: Value = serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
    let record = &config["build"]["pins"];
    assert_eq!(record["files"][0]["text"], text);
    assert_eq!(
        (&record["files"][0]["file"], &record["ignore_annotations"]),
        (&"pins.txt".into(), &false.into())
    );
    end(&mut tpshard(words!["check", out, "--model", model()])).ok();
    end(&mut tpshard(words!["verify", out, "--golden", golden()])).ok();
    // What is pinned is explained by the pin.
    let explain = words!["explain", model(), "--tp", "4", "--tensor", OUT_PROJECTION, "--pin", pins];
    let found = end(&mut tpshard(explain)).ok().stdout;
    assert!(
        found.contains("S(1) is not a decision of the planner: ") && found.contains("pins.txt:3"),
        "{found}"
    );
}

#[test]
fn pins_that_cannot_be_kept_are_refused_with_their_line() {
    let cases: [(&str, &[&str]); 9] = [
        (
            "tensor onnx::MatMul_1218 = S(2)",
            &["`onnx::MatMul_1218` (", "pins.txt:2)", "f32[64, 176]", "S(-1)"],
        ),
        (
            "tensor onnx::MatMul_121 = S(1)",
            &["pins.txt:2: ", "no such tensor", "help: near: onnx::MatMul_12"],
        ),
        ("tensor *.q_proj.weight = S(1)", &["pins.txt:2: ", "the pattern matches no tensor"]),
        ("node /model/lm_head/Matmul = R", &["no such node", "/model/lm_head/MatMul"]),
        ("tensor input_ids = S(0)", &["pin of `input_ids` (", "pins.txt:2)", "held whole on every rank"]),
        ("tensor past_key_values.0.key = S(0)", &["pins.txt:2)", "as S(0): it can be had in ", "S(1)"]),
        (
            "tensor /model/model/Constant_output_0 = R",
            &["pins.txt:2)", "was folded into others", "pin an operand"],
        ),
        ("tensor logits = P(sum)", &["pins.txt:2: ", "not a layout", "write R or S(DIM)"]),
        (
            "tensor logits = R\nnode /model/lm_head/MatMul = S(2)",
            &["pins.txt:3) as S(2) contradicts `logits` (", "pins.txt:2) as R", "remove one"],
        ),
    ];
    for (line, words) in cases {
        let (_scratch, pins) = pin_file(&format!("# pins\n{line}\n"));
        let mut plan = tpshard(words!["plan", model(), "--ranks", "2", "--pin", pins]);
        let ended = end(&mut plan).fails(2, words);
        assert!(ended.stderr.contains("help: ") && ended.stdout.is_empty(), "{}", ended.stderr);
    }
    let missing = scratch().path().join("none.txt");
    let mut plan = tpshard(words!["plan", model(), "--pin", missing]);
    end(&mut plan).fails(5, &["none.txt", "docs/pins.md"]);
}

/// `relu(x[8, 64] @ up[64, 256]) @ down[256, 64]`, and beside it a fused projection `x @ fused[64, 192]` cut in three.
fn network() -> ModelProto {
    let node = |op: &str, name: &str, input: &[&str], output: &[&str]| NodeProto {
        op_type: op.into(),
        name: name.into(),
        input: input.iter().map(|s| (*s).to_owned()).collect(),
        output: output.iter().map(|s| (*s).to_owned()).collect(),
        ..NodeProto::default()
    };
    let value = |name: &str, dims: &[i64]| {
        let dim = dims.iter().map(|&d| DimensionProto { value: Some(DimensionValue::Value(d)) }).collect();
        let tensor = TensorTypeProto { elem_type: 1, shape: Some(TensorShapeProto { dim }) };
        let ty = TypeProto { value: Some(TypeValue::Tensor(tensor)), denotation: String::new() };
        ValueInfoProto { name: name.into(), r#type: Some(Box::new(ty)), metadata_props: vec![] }
    };
    let weight = |name: &str, dims: [i64; 2]| TensorProto {
        name: name.into(),
        dims: dims.to_vec(),
        data_type: 1,
        raw_data: Some(Bytes::from(vec![0; (dims[0] * dims[1] * 4) as usize])),
        ..TensorProto::default()
    };
    let graph = GraphProto {
        name: "network".into(),
        node: vec![
            node("MatMul", "up", &["x", "w.up"], &["u"]),
            node("Relu", "relu", &["u"], &["r"]),
            node("MatMul", "down", &["r", "w.down"], &["y"]),
            node("MatMul", "fused", &["x", "w.fused"], &["f"]),
            node("Split", "split", &["f"], &["a", "b", "c"]),
            node("Mul", "ab", &["a", "b"], &["m"]),
            node("Add", "abc", &["m", "c"], &["z"]),
        ]
        .into_iter()
        .map(|mut node| {
            if node.op_type == "Split" {
                let int = |name: &str, i: i64| AttributeProto {
                    name: name.into(),
                    i: Some(i),
                    r#type: 2,
                    ..AttributeProto::default()
                };
                node.attribute = vec![int("axis", 1), int("num_outputs", 3)];
            }
            node
        })
        .collect(),
        input: vec![value("x", &[8, 64])],
        output: vec![value("y", &[8, 64]), value("z", &[8, 64])],
        initializer: vec![
            weight("w.up", [64, 256]),
            weight("w.down", [256, 64]),
            weight("w.fused", [64, 192]),
        ],
        ..GraphProto::default()
    };
    ModelProto {
        ir_version: Some(11),
        opset_import: vec![OperatorSetIdProto { domain: String::new(), version: 18 }],
        graph: Some(Box::new(graph)),
        configuration: vec![DeviceConfigurationProto { name: "two".into(), num_devices: 2, device: vec![] }],
        ..ModelProto::default()
    }
}

/// A sharding of a tensor: pairs of axis and number of shards.
fn spec(tensor: &str, device: &[i64], splits: &[(i64, i64)]) -> ShardingSpecProto {
    let sharded = |&(axis, num_shards): &(i64, i64)| ShardedDimProto {
        axis,
        simple_sharding: vec![SimpleShardedDimProto { dim: None, num_shards }],
    };
    ShardingSpecProto {
        tensor_name: tensor.into(),
        device: device.to_vec(),
        index_to_device_group_map: vec![],
        sharded_dim: splits.iter().map(sharded).collect(),
    }
}

/// The network with annotations at these nodes.
fn annotated(annotations: Vec<(&str, ShardingSpecProto)>) -> (TempDir, PathBuf) {
    let mut model = network();
    for (name, spec) in annotations {
        let nodes = &mut model.graph.as_mut().unwrap().node;
        let node = nodes.iter_mut().find(|node| node.name == name).unwrap();
        node.device_configurations.push(NodeDeviceConfigurationProto {
            configuration_id: "two".into(),
            sharding_spec: vec![spec],
            pipeline_stage: None,
        });
    }
    let scratch = scratch();
    let path = scratch.path().join("network.onnx");
    fs::write(&path, model.encode_to_vec()).unwrap();
    (scratch, path)
}

fn pair(name: &str, layout: &str) -> (String, String) {
    (name.to_owned(), layout.to_owned())
}

#[test]
fn annotations_of_the_model_are_pins() {
    let (scratch, path) = annotated(vec![
        ("up", spec("w.up", &[0, 1], &[(1, 2)])),
        ("down", spec("w.down", &[], &[(-2, 2)])),
        ("down", spec("y", &[0, 1], &[])),
        ("up", spec("x", &[], &[(0, 1)])),
    ]);
    let free = ["--memory", "free"];
    let plan = planned(&path, "2", &free, &[]);
    let layouts = stored(&plan);
    assert!(
        layouts.contains(&pair("w.up", "S(1)")) && layouts.contains(&pair("w.down", "S(0)")),
        "{layouts:?}"
    );
    assert_eq!(plan["collective_counts"], serde_json::json!({ "all_reduce": 1 }));
    let ignored = planned(&path, "2", &["--memory", "free", "--ignore-annotations"], &[]);
    assert!(stored(&ignored).iter().all(|(_, layout)| layout == "R"), "{ignored}");
    // The same from here as from there.
    let pins = scratch.path().join("pins.txt");
    fs::write(&pins, "tensor w.up = S(1)\ntensor w.down = S(0)\ntensor y = R\n").unwrap();
    planned(&path, "2", &free, &[&pins]);
    // For another number of ranks they say nothing.
    let other = end(&mut tpshard(words!["plan", path, "--ranks", "3"])).ok();
    assert!(
        other.stderr.contains("warning: ") && other.stderr.contains("are for 2 devices"),
        "{}",
        other.stderr
    );
    let quiet = end(&mut tpshard(words!["plan", path, "--ranks", "3", "--ignore-annotations"])).ok();
    assert!(!quiet.stderr.contains("annotations"), "{}", quiet.stderr);
}

#[test]
fn pipeline_stages_are_not_left_out_in_silence() {
    let mut model = network();
    for (stage, node) in model.graph.as_mut().unwrap().node.iter_mut().enumerate() {
        node.device_configurations.push(NodeDeviceConfigurationProto {
            configuration_id: "two".into(),
            sharding_spec: vec![],
            pipeline_stage: Some(stage as i32 / 2),
        });
    }
    let scratch = scratch();
    let path = scratch.path().join("network.onnx");
    fs::write(&path, model.encode_to_vec()).unwrap();
    let said = end(&mut tpshard(words!["plan", path, "--ranks", "2"])).ok();
    assert!(said.stderr.contains("pipeline stages, which are not made"), "{}", said.stderr);
    let quiet = end(&mut tpshard(words!["plan", path, "--ranks", "2", "--ignore-annotations"])).ok();
    assert!(!quiet.stderr.contains("pipeline"), "{}", quiet.stderr);
}

#[test]
fn annotations_that_cannot_be_plans_are_refused() {
    let mut group = spec("w.up", &[0], &[]);
    group.index_to_device_group_map = vec![];
    let mut inside = spec("w.up", &[0, 1], &[(1, 1)]);
    inside.sharded_dim[0].simple_sharding.push(SimpleShardedDimProto { dim: None, num_shards: 2 });
    let cases: [(ShardingSpecProto, &str); 5] = [
        (group, "it is on 1 of 2 devices"),
        (spec("w.up", &[], &[(0, 4)]), "axis 0 is split into 4 parts for 2 devices"),
        (spec("w.up", &[], &[(0, 2), (1, 2)]), "axes 0, 1 are split at once"),
        (spec("w.up", &[1, 0], &[(0, 2)]), "axis 0 is dealt to devices in another order"),
        (inside, "axis 1 is split inside"),
    ];
    for (spec, words) in cases {
        let (_scratch, path) = annotated(vec![("up", spec)]);
        let node = "`w.up` in the annotation of node `up`";
        let plan = || words!["plan", path, "--ranks", "2"];
        end(&mut tpshard(plan())).fails(3, &[node, words, "--ignore-annotations"]);
        end(tpshard(plan()).arg("--ignore-annotations")).ok();
    }
}

#[test]
fn contradictions_name_both_sides() {
    let (scratch, path) =
        annotated(vec![("up", spec("u", &[], &[(1, 2)])), ("relu", spec("u", &[0, 1], &[]))]);
    let both =
        ["`u` in the annotation of node `relu`", "as R contradicts", "`u` in the annotation of node `up`"];
    end(&mut tpshard(words!["plan", path, "--ranks", "2"])).fails(2, &both);
    let (_other, path) = annotated(vec![("up", spec("w.up", &[], &[(1, 2)]))]);
    let pins = scratch.path().join("pins.txt");
    fs::write(&pins, "\ntensor w.* = S(0)\n").unwrap();
    let plan = || words!["plan", path, "--ranks", "2", "--pin", pins];
    let both =
        ["`w.up` in the annotation of node `up`", "as S(1) contradicts `w.up` (", "pins.txt:2) as S(0)"];
    let both = [&both[..], &["or leave the model's annotations aside with --ignore-annotations"]].concat();
    end(&mut tpshard(plan())).fails(2, &both);
    let mut ignoring = tpshard(plan());
    end(ignoring.arg("--ignore-annotations")).ok();
}

#[test]
fn pins_of_a_fused_weight_hold_for_its_cuts() {
    let (scratch, path) = annotated(vec![]);
    let pins = scratch.path().join("pins.txt");
    for (line, layout) in [("tensor w.fused = S(1)", "S(1)"), ("tensor w.fused = S(0)", "S(0)")] {
        fs::write(&pins, line).unwrap();
        let plan = planned(&path, "2", &["--memory", "free"], &[&pins]);
        let layouts = stored(&plan);
        let fused: Vec<&str> =
            layouts.iter().filter(|(name, _)| name == "w.fused").map(|(_, l)| l.as_str()).collect();
        assert!(!fused.is_empty() && fused.iter().all(|l| *l == layout), "{layouts:?}");
    }
}

#[test]
fn plans_are_compared() {
    let (scratch, pins) = pin_file(&format!("tensor {OUT_PROJECTION} = S(1)\n"));
    let write = |name: &str, more: &[&str]| {
        let plan = words!["plan", model(), "--ranks", "2,4", "--json"];
        let found = end(tpshard(plan).args(FLAGS).args(more)).ok().stdout;
        let path = scratch.path().join(name);
        fs::write(&path, found).unwrap();
        path
    };
    let before = write("before.json", &[]);
    let after = write("after.json", &["--pin", pins.to_str().unwrap()]);
    let diff = |words: &[&Path]| {
        let mut diff = tpshard(["plan", "--diff"]);
        diff.args(words);
        diff
    };
    let found = end(&mut diff(&[&before, &after])).ok().stdout;
    for words in [
        "2 ranks\n",
        "4 ranks\n",
        "predicted time: ",
        "onnx::MatMul_*",
        "+1x all_gather of ",
        "-1x all_reduce of ",
    ] {
        assert!(found.contains(words), "`{words}` is not in\n{found}");
    }
    end(diff(&[&before, &after]).arg("--exit-code")).fails(4, &["the plans differ", "help: "]);
    let same = end(diff(&[&before, &before]).arg("--exit-code")).ok().stdout;
    assert_eq!(same, "2 ranks: no difference\n4 ranks: no difference\n");
    let json = end(diff(&[&before, &after]).arg("--json")).ok().json();
    assert_eq!(json["differ"], true);
    assert!(json["plans"][1]["numbers"]["seconds"]["after"].as_f64().unwrap() > 0.0, "{json}");
    // Folders and their config.json hold one plan each.
    let (two, four) = (sharded(2), sharded(4));
    let folders = end(&mut diff(&[&two, &four.join("config.json")])).ok().stdout;
    assert!(folders.starts_with("2 -> 4 ranks\n") && folders.contains("weights per rank: "), "{folders}");
    end(diff(&[&two, &two]).arg("--exit-code")).ok();
    let other = scratch.path().join("other.json");
    fs::write(&other, "{}").unwrap();
    end(&mut diff(&[&before, &other])).fails(4, &["other.json", "holds no plan", "help: "]);
    fs::write(&other, "{\"plan\": {\"mesh\": [2]}}").unwrap();
    end(&mut diff(&[&before, &other])).fails(4, &["other.json", "a plan of another form"]);
    fs::write(&other, "plan").unwrap();
    end(&mut diff(&[&before, &other])).fails(4, &["other.json", "is not JSON"]);
    end(&mut diff(&[&before, &scratch.path().join("none")])).fails(5, &["none", "help: "]);
    end(&mut diff(&[&before])).fails(2, &["--diff"]);
    end(tpshard(words!["plan", model(), "--exit-code"]).args(FLAGS)).fails(2, &["--diff"]);
    end(&mut tpshard(["plan"])).fails(2, &["<MODEL>"]);
}
