//! Models in which data decides shapes or what is run: right on any number of ranks, checked, and refused by node.

use crate::cuda::has_compiler;
use crate::draft::Draft;
use crate::nccl::on;
use crate::support::*;
use crate::words;
use prost::Message;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::TempDir;
use tpshard_frontend::proto::*;
use tpshard_ir::{DType, DeferredCall, Op, Tensor, Type};
use tpshard_runtime::io::NamedTensors;

const FLOAT: i32 = 1;
const INT: i32 = 7;
const BOOL: i32 = 9;

fn value(name: &str, kind: i32, dims: &[i64]) -> ValueInfoProto {
    let dim = |&size: &i64| DimensionProto { value: (size >= 0).then_some(DimensionValue::Value(size)) };
    let shape = TensorShapeProto { dim: dims.iter().map(dim).collect() };
    let ty = TensorTypeProto { elem_type: kind, shape: Some(shape) };
    let ty = TypeProto { value: Some(TypeValue::Tensor(ty)), denotation: String::new() };
    ValueInfoProto { name: name.into(), r#type: Some(Box::new(ty)), metadata_props: vec![] }
}

fn untyped(name: &str) -> ValueInfoProto {
    ValueInfoProto { name: name.into(), r#type: None, metadata_props: vec![] }
}

fn node(op: &str, inputs: &[&str], outputs: &[&str], attributes: Vec<AttributeProto>) -> NodeProto {
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    NodeProto {
        name: format!("the_{op}"),
        op_type: op.into(),
        input: names(inputs),
        output: names(outputs),
        attribute: attributes,
        ..NodeProto::default()
    }
}

fn int(name: &str, value: i64) -> AttributeProto {
    AttributeProto { name: name.into(), i: Some(value), r#type: 2, ..AttributeProto::default() }
}

fn graph_attribute(name: &str, graph: GraphProto) -> AttributeProto {
    AttributeProto { name: name.into(), g: Some(Box::new(graph)), r#type: 5, ..AttributeProto::default() }
}

fn weight(name: &str, dims: &[i64], element: impl Fn(i64) -> f32) -> TensorProto {
    let count = dims.iter().product();
    TensorProto {
        name: name.into(),
        dims: dims.to_vec(),
        data_type: FLOAT,
        float_data: (0..count).map(element).collect(),
        ..TensorProto::default()
    }
}

fn ints(name: &str, dims: &[i64], values: &[i64]) -> TensorProto {
    TensorProto {
        name: name.into(),
        dims: dims.to_vec(),
        data_type: INT,
        int64_data: values.to_vec(),
        ..TensorProto::default()
    }
}

fn save(graph: GraphProto, folder: &TempDir) -> PathBuf {
    let model = ModelProto {
        ir_version: Some(9),
        graph: Some(Box::new(graph)),
        opset_import: vec![OperatorSetIdProto { domain: String::new(), version: 17 }],
        ..ModelProto::default()
    };
    let path = folder.path().join("model.onnx");
    std::fs::write(&path, model.encode_to_vec()).unwrap();
    path
}

/// Shards for `ranks`; the folder passes its checks.
#[track_caller]
fn sharded_for(model: &Path, ranks: usize, scratch: &TempDir) -> PathBuf {
    let folder = scratch.path().join(format!("tp{ranks}"));
    let words = words![model, "--tp", ranks.to_string(), "-o", folder, "--memory", "min", "--quiet"];
    end(&mut tpshard(words)).ok();
    end(&mut tpshard(words!["check", folder, "--model", model])).ok();
    folder
}

fn run(folder: &Path, inputs: &[(&str, Tensor)], scratch: &TempDir) -> (Ended, PathBuf) {
    let (given, made) = (scratch.path().join("in.npz"), scratch.path().join("out.npz"));
    let tensors: NamedTensors = inputs.iter().map(|(n, t)| ((*n).to_owned(), t.clone())).collect();
    write(&given, &tensors);
    (end(&mut tpshard(words!["run", folder, "--inputs", given, "--outputs", made])), made)
}

fn floats(shape: &[usize], element: impl Fn(usize) -> f32) -> Tensor {
    Tensor::from_vec(shape.to_vec(), (0..shape.iter().product()).map(element).collect()).unwrap()
}

/// Rows that a mask picks, through two products with weights, beside a constant of as many entries.
fn selection(declared: Option<i64>) -> GraphProto {
    GraphProto {
        name: "selection".into(),
        input: vec![value("x", FLOAT, &[6, 8]), value("mask", BOOL, &[6])],
        output: vec![value("y", FLOAT, &[-1, 8]), value("ones", INT, &[-1])],
        node: vec![
            node("NonZero", &["mask"], &["places"], vec![]),
            node("Squeeze", &["places", "first"], &["rows"], vec![]),
            node("Gather", &["x", "rows"], &["picked"], vec![int("axis", 0)]),
            node("MatMul", &["picked", "up"], &["wide"], vec![]),
            node("MatMul", &["wide", "down"], &["y"], vec![]),
            node("Shape", &["rows"], &["count"], vec![]),
            node("ConstantOfShape", &["count"], &["zeros"], vec![]),
            node("Cast", &["zeros"], &["ones"], vec![int("to", 7)]),
        ],
        initializer: vec![
            weight("up", &[8, 64], |i| (i % 5) as f32 - 2.0),
            weight("down", &[64, 8], |i| (i % 3) as f32 - 1.0),
            ints("first", &[1], &[0]),
        ],
        value_info: declared.map(|count| value("places", INT, &[1, count])).into_iter().collect(),
        ..GraphProto::default()
    }
}

fn selected(x: &Tensor, mask: &[bool]) -> Vec<f32> {
    let x = x.as_slice::<f32>().unwrap();
    let mut y = Vec::new();
    for row in (0..6).filter(|&row| mask[row]) {
        let wide: Vec<f32> = (0..64)
            .map(|n| (0..8).map(|k| x[row * 8 + k] * (((k * 64 + n) % 5) as f32 - 2.0)).sum())
            .collect();
        y.extend(
            (0..8).map(|n| -> f32 { (0..64).map(|k| wide[k] * (((k * 8 + n) % 3) as f32 - 1.0)).sum() }),
        );
    }
    y
}

#[test]
fn selected_rows_meet_sharded_weights() {
    let scratch = scratch();
    let model = save(selection(None), &scratch);
    let x = floats(&[6, 8], |i| (i % 7) as f32 - 3.0);
    for ranks in 1..=3 {
        let folder = sharded_for(&model, ranks, &scratch);
        if ranks > 1 {
            let certificate = Draft::open(&folder).certificate;
            let split = certificate.steps.iter().any(|step| {
                let weight = matches!(certificate.logical.node(step.value).op, Op::Weight(_));
                weight && !step.layout.is_replicated()
            });
            assert!(split, "no weight is split over {ranks} ranks");
        }
        for mask in [[true, false, true, true, false, false], [false; 6], [true; 6]] {
            let given = Tensor::from_vec(vec![6], mask.to_vec()).unwrap();
            let (ended, made) = run(&folder, &[("x", x.clone()), ("mask", given)], &scratch);
            ended.ok();
            let made = read(&made);
            let count = mask.iter().filter(|&&m| m).count();
            let expected = Tensor::from_vec(vec![count, 8], selected(&x, &mask)).unwrap();
            assert!(distance(&made["y"], &expected) < 1e-3, "{ranks} ranks, {mask:?}");
            assert_eq!(made["ones"].shape(), [count], "{ranks} ranks, {mask:?}");
        }
    }
}

/// Between GPUs nobody compares how much the ranks bring, so one that cannot know how much that is ends all of them.
#[test]
fn a_gpu_that_cannot_know_a_size_brings_nothing() {
    if !has_compiler() {
        return;
    }
    let scratch = scratch();
    let mut graph = selection(None);
    graph.input[1] = value("marks", FLOAT, &[6]);
    graph.node.insert(0, node("Mul", &["marks", "marks"], &["squares"], vec![]));
    graph.node.insert(1, node("Greater", &["squares", "half"], &["mask"], vec![]));
    graph.initializer.push(weight("half", &[1], |_| 0.5));
    let model = save(graph, &scratch);
    let folder = scratch.path().join("gpu");
    let words = words![model, "--tp", "2", "--target", "cuda:sm_90", "-o", folder, "--memory", "min"];
    end(on("devices=2", &mut tpshard(words))).ok();
    let (given, made) = (scratch.path().join("in.npz"), scratch.path().join("out.npz"));
    let marks = floats(&[6], |i| (i % 2) as f32);
    let inputs = [("x", floats(&[6, 8], |i| (i % 7) as f32)), ("marks", marks)];
    write(&given, &inputs.map(|(name, tensor)| (name.to_owned(), tensor)).into_iter().collect());
    let words = words!["run", folder, "--inputs", given, "--outputs", made, "--comm", "nccl"];
    end(on("devices=2", &mut tpshard(&words))).ok();
    assert_eq!(read(&made)["y"].shape(), [3, 8]);
    let ended = end(on("devices=2 fail=1 rank=1", &mut tpshard(words)));
    let said = "unspecified launch failure; after that, %";
    ended.fails(6, &["failed on rank 1", "the_Greater", said, "the_NonZero", "decide sizes"]);
}

/// What the model declares of a shape is relied upon, so it is held to it.
#[test]
fn a_wrong_claim_names_the_node() {
    let scratch = scratch();
    let model = save(selection(Some(3)), &scratch);
    let x = floats(&[6, 8], |i| i as f32);
    for ranks in 1..=2 {
        let folder = sharded_for(&model, ranks, &scratch);
        let mask = |count: usize| Tensor::from_vec(vec![6], (0..6).map(|i| i < count).collect()).unwrap();
        run(&folder, &[("x", x.clone()), ("mask", mask(3))], &scratch).0.ok();
        let (ended, _) = run(&folder, &[("x", x.clone()), ("mask", mask(2))], &scratch);
        ended.fails(6, &["the_NonZero", "dim 1 is 2, but the model relies on it to be 3"]);
    }
}

/// The certificate is about what runs: another call is another model.
#[test]
fn a_changed_call_is_found() {
    let scratch = scratch();
    let model = save(selection(None), &scratch);
    let folder = sharded_for(&model, 2, &scratch);
    let mut draft = Draft::open(&folder);
    let step = draft.step(|_, node| matches!(node.op, Op::Deferred { .. }));
    let value = draft.certificate.steps[step.index()].value;
    draft.edit_logical(value, |node| {
        if let Op::Deferred { call, .. } = &mut node.op {
            let mut code = call.code.to_vec();
            code.extend([0x1a, 1, b'z']);
            *call = Arc::new(DeferredCall { name: call.name.clone(), code: code.into() });
        }
    });
    draft.follow_certificate();
    draft.save();
    end(&mut tpshard(words!["check", folder, "--model", model])).fails(4, &["deferred"]);
    // One rank that runs another call than the certificate says.
    let folder = sharded_for(&model, 3, &scratch);
    let mut draft = Draft::open(&folder);
    let step = draft.step(|_, node| matches!(node.op, Op::Deferred { .. }));
    draft.edit(1, step, |node| {
        if let Op::Deferred { ty, .. } = &mut node.op {
            *ty = Type::new(DType::I32, ty.shape.clone());
        }
    });
    draft.save();
    end(&mut tpshard(words!["check", folder])).fails(4, &["rank"]);
}

#[test]
fn a_shape_may_be_an_input() {
    let scratch = scratch();
    let graph = GraphProto {
        name: "reshape".into(),
        input: vec![value("x", FLOAT, &[4, 6]), value("shape", INT, &[2])],
        output: vec![value("y", FLOAT, &[-1, 5])],
        node: vec![
            node("Reshape", &["x", "shape"], &["again"], vec![]),
            node("MatMul", &["again", "w"], &["y"], vec![]),
        ],
        initializer: vec![weight("w", &[8, 5], |i| i as f32)],
        ..GraphProto::default()
    };
    let model = save(graph, &scratch);
    let x = floats(&[4, 6], |i| i as f32);
    for ranks in 1..=3 {
        let folder = sharded_for(&model, ranks, &scratch);
        let shape = |a: i64, b: i64| ("shape", Tensor::from_vec(vec![2], vec![a, b]).unwrap());
        let (ended, made) = run(&folder, &[("x", x.clone()), shape(-1, 8)], &scratch);
        ended.ok();
        let expected =
            floats(&[3, 5], |i| (0..8).map(|k| (i / 5 * 8 + k) as f32 * (k * 5 + i % 5) as f32).sum());
        assert_eq!(read(&made)["y"], expected);
        // The weight says that there are 8 columns.
        run(&folder, &[("x", x.clone()), shape(6, 4)], &scratch).0.fails(6, &["the_Reshape", "dim 1 is 4"]);
        run(&folder, &[("x", x.clone()), shape(7, 8)], &scratch).0.fails(6, &["the_Reshape"]);
    }
}

/// A loop that adds, a scan of running sums, and a branch, all decided by data; one outer value is used inside.
fn control() -> GraphProto {
    let add = GraphProto {
        name: "body".into(),
        input: vec![untyped("round"), untyped("go"), untyped("sum")],
        output: vec![untyped("go_on"), untyped("next"), untyped("row")],
        node: vec![
            node("Add", &["sum", "x"], &["next"], vec![]),
            node("Identity", &["next"], &["row"], vec![]),
            node("ReduceMax", &["next"], &["most"], vec![int("keepdims", 0)]),
            node("Less", &["most", "limit"], &["go_on"], vec![]),
        ],
        ..GraphProto::default()
    };
    let scan = GraphProto {
        name: "scan".into(),
        input: vec![untyped("total"), untyped("one")],
        output: vec![untyped("total_next"), untyped("seen")],
        node: vec![
            node("Add", &["total", "one"], &["total_next"], vec![]),
            node("Identity", &["total_next"], &["seen"], vec![]),
        ],
        ..GraphProto::default()
    };
    let branch = |op: &str| GraphProto {
        name: op.into(),
        output: vec![untyped(&format!("by_{op}"))],
        node: vec![node(op, &["x", "x"], &[&format!("by_{op}")], vec![])],
        ..GraphProto::default()
    };
    GraphProto {
        name: "control".into(),
        input: vec![
            value("x", FLOAT, &[2, 4]),
            value("trips", INT, &[]),
            value("limit", FLOAT, &[]),
            // A number: a bool would choose between two graphs.
            value("flag", INT, &[]),
        ],
        output: vec![
            value("sum", FLOAT, &[2, 4]),
            value("rows", FLOAT, &[-1, 2, 4]),
            value("sums", FLOAT, &[2, 4]),
            value("z", FLOAT, &[2, 4]),
        ],
        node: vec![
            node("Loop", &["trips", "", "x"], &["sum", "rows"], vec![graph_attribute("body", add)]),
            node(
                "Scan",
                &["zeros", "x"],
                &["", "sums"],
                vec![graph_attribute("body", scan), int("num_scan_inputs", 1)],
            ),
            node("Cast", &["flag"], &["condition"], vec![int("to", i64::from(BOOL))]),
            node(
                "If",
                &["condition"],
                &["chosen"],
                vec![
                    graph_attribute("then_branch", branch("Add")),
                    graph_attribute("else_branch", branch("Mul")),
                ],
            ),
            node("MatMul", &["chosen", "w"], &["z"], vec![]),
        ],
        initializer: vec![
            weight("zeros", &[4], |_| 0.0),
            weight("w", &[4, 4], |i| if i % 5 == 0 { 1.0 } else { 0.0 }),
        ],
        ..GraphProto::default()
    }
}

#[test]
fn data_decides_what_is_run() {
    let scratch = scratch();
    let model = save(control(), &scratch);
    let x = floats(&[2, 4], |i| i as f32);
    for ranks in 1..=3 {
        let folder = sharded_for(&model, ranks, &scratch);
        for (trips, limit, flag, rounds) in [(3i64, 1000f32, true, 3), (9, 20.0, false, 2), (0, 1.0, true, 0)]
        {
            let inputs = [
                ("x", x.clone()),
                ("trips", Tensor::scalar(trips)),
                ("limit", Tensor::scalar(limit)),
                ("flag", Tensor::scalar(i64::from(flag))),
            ];
            let (ended, made) = run(&folder, &inputs, &scratch);
            ended.ok();
            let made = read(&made);
            assert_eq!(made["sum"], floats(&[2, 4], |i| (i * (rounds + 1)) as f32));
            assert_eq!(made["rows"], floats(&[rounds, 2, 4], |i| (i % 8 * (i / 8 + 2)) as f32));
            assert_eq!(made["sums"], floats(&[2, 4], |i| if i < 4 { i as f32 } else { (2 * i - 4) as f32 }));
            assert_eq!(made["z"], floats(&[2, 4], |i| if flag { 2.0 * i as f32 } else { (i * i) as f32 }));
        }
    }
}

#[test]
fn what_has_no_rank_is_refused_with_its_node() {
    let scratch = scratch();
    let graph = GraphProto {
        name: "rankless".into(),
        input: vec![value("x", FLOAT, &[4, 6]), value("shape", INT, &[-1])],
        output: vec![untyped("y")],
        node: vec![node("Reshape", &["x", "shape"], &["y"], vec![])],
        ..GraphProto::default()
    };
    let model = save(graph, &scratch);
    let folder = scratch.path().join("out");
    end(&mut tpshard(words![model, "--tp", "2", "-o", folder]))
        .fails(3, &["the_Reshape", "nothing says the rank", "--bind"]);
    let bound = words![model, "--tp", "2", "-o", folder, "--bind", "shape=3,8"];
    end(&mut tpshard(bound)).ok();
}

/// A size that only the inputs say, next to a number: that number or one, and nothing else.
#[test]
fn rows_that_stretch_are_as_many_as_the_number_they_meet() {
    let graph = GraphProto {
        name: "stretched".into(),
        input: vec![value("x", FLOAT, &[-1, 8])],
        output: vec![value("y", FLOAT, &[-1, 64])],
        node: vec![
            node("Add", &["x", "offsets"], &["moved"], vec![]),
            node("MatMul", &["moved", "up"], &["y"], vec![]),
        ],
        initializer: vec![
            weight("offsets", &[3, 8], |i| (i % 4) as f32),
            weight("up", &[8, 64], |i| (i % 5) as f32 - 2.0),
        ],
        ..GraphProto::default()
    };
    let scratch = scratch();
    let model = save(graph, &scratch);
    for ranks in 1..=2 {
        let folder = sharded_for(&model, ranks, &scratch);
        for rows in [1, 3] {
            let (ended, made) = run(&folder, &[("x", floats(&[rows, 8], |i| i as f32))], &scratch);
            ended.ok();
            let element = |i: usize| -> f32 {
                let (row, column) = (i / 64, i % 64);
                let x = |k: usize| (row.min(rows - 1) * 8 + k) as f32 + ((row * 8 + k) % 4) as f32;
                (0..8).map(|k| x(k) * (((k * 64 + column) % 5) as f32 - 2.0)).sum()
            };
            let distance = distance(&read(&made)["y"], &floats(&[3, 64], element));
            assert!(distance < 1e-3, "{ranks} ranks, {rows} rows: {distance}");
        }
        let (ended, _) = run(&folder, &[("x", floats(&[2, 8], |i| i as f32))], &scratch);
        ended.fails(2, &["the_Add", "x_dim0 stretches to 3, so it is 1 or 3"]);
    }
    let chosen = words!["plan", model, "--dim", "x_dim0=2"];
    end(&mut tpshard(chosen)).fails(2, &["x_dim0=2", "is 1 or 3"]);
}
