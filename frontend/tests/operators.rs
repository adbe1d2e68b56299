//! Operators end to end: small models built in memory, lowered, and run in the reference interpreter.

use bytes::Bytes;
use std::collections::BTreeMap;
use std::sync::Arc;
use tpshard_frontend::{
    Attribute, AttributeValue, Dim as Extent, ErrorKind, Graph, ImportError, ImportOptions, Imported, Model,
    Node, Storage, TensorRef, TensorSource, TensorType, ValueInfo, ValueType, lower,
};
use tpshard_ir::interp::run_tensors;
use tpshard_ir::{DType, Data, Op, Tensor};

/// A model under construction.
struct Builder {
    opset: i64,
    graph: Graph,
}

fn builder(opset: i64) -> Builder {
    Builder { opset, graph: Graph { name: "test".into(), ..Graph::default() } }
}

/// `4`, `batch` or `?`.
fn extents(text: &str) -> Vec<Extent> {
    text.split(' ')
        .filter(|part| !part.is_empty())
        .map(|part| match part.parse() {
            Ok(size) => Extent::Known(size),
            Err(_) if part == "?" => Extent::Unknown,
            Err(_) => Extent::Symbol(part.into()),
        })
        .collect()
}

fn info(name: &str, dtype: DType, shape: Option<&str>) -> ValueInfo {
    let tensor = TensorType { dtype, shape: shape.map(extents) };
    ValueInfo { name: name.into(), value_type: Some(ValueType::Tensor(tensor)), metadata: BTreeMap::new() }
}

fn stored(tensor: &Tensor) -> TensorRef {
    TensorRef {
        name: String::new(),
        dtype: tensor.dtype(),
        dims: tensor.shape().iter().map(|&dim| dim as u64).collect(),
        source: TensorSource::Inline(Bytes::from(tensor.data().to_le_bytes())),
    }
}

fn f32s(shape: &[usize], values: &[f32]) -> Tensor {
    Tensor::from_vec(shape.to_vec(), values.to_vec()).unwrap()
}

fn i64s(values: &[i64]) -> Tensor {
    Tensor::from_vec(vec![values.len()], values.to_vec()).unwrap()
}

/// 0, 1, 2, … in a shape.
fn counting(shape: &[usize]) -> Tensor {
    let count: usize = shape.iter().product();
    f32s(shape, &(0..count).map(|i| i as f32).collect::<Vec<_>>())
}

impl Builder {
    fn input(mut self, name: &str, dtype: DType, shape: &str) -> Builder {
        self.graph.inputs.push(info(name, dtype, Some(shape)));
        self
    }

    fn weight(mut self, name: &str, tensor: &Tensor) -> Builder {
        self.graph.initializers.insert(name.into(), stored(tensor));
        self
    }

    fn node(
        self,
        op_type: &str,
        inputs: &str,
        outputs: &str,
        attributes: &[(&str, AttributeValue)],
    ) -> Builder {
        self.node_of("", op_type, inputs, outputs, attributes)
    }

    /// Names are separated by spaces; `_` is an absent input or output.
    fn node_of(
        mut self,
        domain: &str,
        op_type: &str,
        inputs: &str,
        outputs: &str,
        attributes: &[(&str, AttributeValue)],
    ) -> Builder {
        let names = |text: &str| -> Vec<String> {
            text.split(' ')
                .filter(|n| !n.is_empty())
                .map(|n| if n == "_" { String::new() } else { n.into() })
                .collect()
        };
        self.graph.nodes.push(Node {
            name: format!("node_{}", self.graph.nodes.len()),
            op_type: op_type.into(),
            domain: domain.into(),
            opset: if domain.is_empty() { self.opset } else { 1 },
            inputs: names(inputs),
            outputs: names(outputs),
            attributes: attributes
                .iter()
                .map(|(name, value)| Attribute { name: (*name).into(), value: value.clone() })
                .collect(),
            ..Node::default()
        });
        self
    }

    fn output(mut self, name: &str, dtype: DType) -> Builder {
        self.graph.outputs.push(info(name, dtype, None));
        self
    }

    fn import_with(self, options: &ImportOptions) -> Result<Imported, ImportError> {
        let model = Model {
            path: "test.onnx".into(),
            ir_version: 10,
            opsets: [(String::new(), self.opset)].into(),
            producer: String::new(),
            graph: self.graph,
            metadata: BTreeMap::new(),
            device_configurations: Vec::new(),
            storage: Storage::default(),
        };
        lower(model, options)
    }

    fn import(self) -> Result<Imported, ImportError> {
        self.import_with(&ImportOptions::default())
    }

    fn run(self, inputs: &[(&str, Tensor)]) -> Vec<Tensor> {
        run(&self.import().unwrap(), inputs)
    }
}

fn run(imported: &Imported, inputs: &[(&str, Tensor)]) -> Vec<Tensor> {
    let inputs: BTreeMap<Arc<str>, Tensor> =
        inputs.iter().map(|(name, tensor)| ((*name).into(), tensor.clone())).collect();
    let initializer = |name: &str| Ok(imported.model.storage.to_tensor(&imported.tensors[name]).unwrap());
    let outputs = run_tensors(&imported.graph, &inputs, &initializer, 1 << 20).unwrap();
    outputs.into_iter().map(|(_, tensor)| tensor).collect()
}

fn close(found: &Tensor, shape: &[usize], wanted: &[f32]) {
    assert_eq!(found.shape(), shape);
    let Data::F32(found) = found.data() else { panic!("{found:?}") };
    for (a, b) in found.iter().zip(wanted) {
        assert!((a - b).abs() <= 1e-5 * (1.0 + b.abs()), "{found:?} is not {wanted:?}");
    }
    assert_eq!(found.len(), wanted.len());
}

fn int(value: i64) -> AttributeValue {
    AttributeValue::Int(value)
}

fn ints(values: &[i64]) -> AttributeValue {
    AttributeValue::Ints(values.to_vec())
}

fn first_fault(error: &ImportError) -> String {
    error.faults.first().map(ToString::to_string).unwrap_or_default()
}

#[test]
fn shape_arithmetic_never_becomes_data_flow() {
    let imported = builder(17)
        .input("x", DType::F32, "batch seq 8")
        .weight("zero", &Tensor::scalar(0i64))
        .weight("one", &Tensor::scalar(1i64))
        .weight("axes", &i64s(&[0]))
        .weight("rest", &i64s(&[-1]))
        .weight("width", &i64s(&[4]))
        .node("Shape", "x", "s", &[])
        .node("Gather", "s zero", "b", &[])
        .node("Gather", "s one", "n", &[])
        .node("Unsqueeze", "b axes", "b1", &[])
        .node("Mul", "n n", "nn", &[])
        .node("Div", "nn n", "n2", &[])
        .node("Unsqueeze", "n2 axes", "n1", &[])
        .node("Concat", "b1 n1 rest width", "target", &[("axis", int(0))])
        .node("Reshape", "x target", "y", &[])
        .output("y", DType::F32)
        .import()
        .unwrap();
    assert_eq!(imported.graph.len(), 2);
    let y = imported.graph.outputs[0].value;
    assert_eq!(imported.graph.ty(y).to_string(), "f32[batch, seq, 2, 4]");
    assert_eq!(&*imported.graph.node(y).origin, "node_8");
    assert_eq!(run(&imported, &[("x", counting(&[2, 3, 8]))])[0].shape(), [2, 3, 2, 4]);
}

#[test]
fn sizes_are_unified_and_reported_with_the_node() {
    let imported = builder(17)
        .input("x", DType::F32, "batch seq")
        .input("mask", DType::F32, "rows total")
        .node("Add", "x mask", "y", &[])
        .output("y", DType::F32)
        .import()
        .unwrap();
    let names: Vec<&str> = imported.graph.symbols.keys().map(|name| &**name).collect();
    assert_eq!(names, ["batch", "seq"]);
    let equality = &imported.report.equalities[1];
    assert_eq!((&*equality.symbol, equality.equals.to_string().as_str()), ("total", "seq"));
    assert!(equality.reason.contains("node_0"), "{}", equality.reason);

    let error = builder(17)
        .input("x", DType::F32, "n 3")
        .input("y", DType::F32, "n 4")
        .node("Add", "x y", "z", &[])
        .output("z", DType::F32)
        .import()
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(first_fault(&error).contains("3 and 4"), "{error}");
}

#[test]
fn movement_of_weights_stays_in_their_expression() {
    let imported = builder(13)
        .input("x", DType::F32, "n 2")
        .weight("w", &counting(&[3, 4]))
        .weight("starts", &i64s(&[1]))
        .weight("ends", &i64s(&[3]))
        .node("Transpose", "w", "t", &[("perm", ints(&[1, 0]))])
        .node("Slice", "t starts ends starts", "s", &[])
        .node("Transpose", "s", "m", &[])
        .node("MatMul", "x m", "y", &[])
        .output("y", DType::F32)
        .import()
        .unwrap();
    let weights: Vec<String> = imported
        .graph
        .nodes()
        .iter()
        .filter_map(|node| if let Op::Weight(expr) = &node.op { Some(expr.to_string()) } else { None })
        .collect();
    assert_eq!(weights.len(), 1);
    assert!(weights[0].contains("slice(1, 1, 2)"), "{weights:?}");
    let y = run(&imported, &[("x", f32s(&[1, 2], &[1.0, 10.0]))]);
    close(&y[0], &[1, 4], &[84.0, 95.0, 106.0, 117.0]);
}

#[test]
fn states_are_appended_to_and_total_is_past_plus_seq() {
    let mut model = builder(17)
        .input("mask", DType::F32, "batch total")
        .input("new", DType::F32, "batch 2 seq 4")
        .input("past_key_values.0.key", DType::F32, "batch 2 past 4")
        .node("Concat", "past_key_values.0.key new", "present.0.key", &[("axis", int(-2))])
        .node("Identity", "mask", "y", &[])
        .output("y", DType::F32);
    model.graph.outputs.push(info("present.0.key", DType::F32, Some("batch 2 total 4")));
    let imported = model.import().unwrap();
    let state = &imported.graph.states[0];
    assert_eq!((&*state.input, &*state.output, state.axis), ("past_key_values.0.key", "present.0.key", 2));
    let (_, _, mask) = imported.graph.inputs().next().unwrap();
    assert_eq!(mask.to_string(), "f32[batch, past + seq]");
    let roles: Vec<String> =
        imported.report.roles.iter().map(|(name, role)| format!("{name}={}", role.name())).collect();
    assert_eq!(roles, ["batch=batch", "past=past", "seq=seq"]);
}

#[test]
fn all_unsupported_nodes_are_named_at_once() {
    let error = builder(17)
        .input("x", DType::F32, "n")
        .node("TfIdfVectorizer", "x", "a", &[])
        .node("Neg", "a", "b", &[])
        .node_of("com.example", "Magic", "x", "c", &[])
        .output("b", DType::F32)
        .output("c", DType::F32)
        .import()
        .unwrap_err();
    assert_eq!((error.kind(), error.faults.len()), (ErrorKind::Unsupported, 2));
    let text = error.to_string();
    assert!(
        text.contains("node `node_0` (TfIdfVectorizer, ai.onnx 17)") && text.contains("Magic, com.example"),
        "{text}"
    );
}

#[test]
fn wrong_attributes_axes_and_counts_are_refused() {
    let refused = |op: &str, inputs: &str, attributes: &[(&str, AttributeValue)]| {
        let model = builder(17)
            .input("x", DType::F32, "2 3")
            .weight("k", &i64s(&[7]))
            .node(op, inputs, "y", attributes);
        first_fault(&model.output("y", DType::F32).import().unwrap_err())
    };
    assert!(refused("Softmax", "x", &[("axis", int(2))]).contains("axis 2 of a tensor of rank 2"));
    assert!(refused("Relu", "x", &[("alpha", int(2))]).contains("`alpha` is not one this operator has"));
    assert!(refused("Relu", "x x", &[]).contains("2 inputs"));
    assert!(refused("Transpose", "x", &[("perm", ints(&[0, 0]))]).contains("not an order"));
    assert!(refused("TopK", "x k", &[]).contains("7 exceeds 3"));
    assert!(refused("Reshape", "x k", &[]).contains("must be equal"));
    assert!(refused("Concat", "x x", &[("axis", int(5))]).contains("axis 5"));
    assert!(refused("Reshape", "x x", &[]).contains("not integers in one dim"));
}

#[test]
fn huge_constants_are_stretched_scalars_and_huge_ranges_index_grids() {
    let imported = builder(17)
        .input("x", DType::F32, "1")
        .weight("shape", &i64s(&[1 << 20, 1 << 20]))
        .weight("zero", &Tensor::scalar(0i64))
        .weight("limit", &Tensor::scalar(1i64 << 40))
        .weight("one", &Tensor::scalar(1i64))
        .node("ConstantOfShape", "shape", "c", &[])
        .node("Add", "x c", "y", &[])
        .node("Range", "zero limit one", "r", &[])
        .output("y", DType::F32)
        .output("r", DType::I64)
        .import()
        .unwrap();
    assert!(imported.graph.len() < 10);
}

#[test]
fn batched_products_broadcast_as_numpy_does() {
    let y = builder(13)
        .input("a", DType::F32, "2 1 2 3")
        .input("b", DType::F32, "2 3 1")
        .node("MatMul", "a b", "y", &[])
        .output("y", DType::F32)
        .run(&[("a", counting(&[2, 1, 2, 3])), ("b", counting(&[2, 3, 1]))]);
    close(&y[0], &[2, 2, 2, 1], &[5., 14., 14., 50., 23., 32., 86., 122.]);
    let y = builder(13)
        .input("a", DType::F32, "3")
        .input("b", DType::F32, "3")
        .node("MatMul", "a b", "y", &[])
        .output("y", DType::F32)
        .run(&[("a", counting(&[3])), ("b", counting(&[3]))]);
    close(&y[0], &[], &[5.0]);
}

#[test]
fn gemm_scales_transposes_and_adds() {
    let attributes =
        [("alpha", AttributeValue::Float(2.0)), ("beta", AttributeValue::Float(3.0)), ("transA", int(1))];
    let y = builder(13)
        .input("a", DType::F32, "2 1")
        .weight("b", &counting(&[2, 2]))
        .weight("c", &f32s(&[2], &[1.0, -1.0]))
        .node("Gemm", "a b c", "y", &attributes)
        .output("y", DType::F32)
        .run(&[("a", f32s(&[2, 1], &[1.0, 2.0]))]);
    close(&y[0], &[1, 2], &[11.0, 11.0]);
}

#[test]
fn einsum_takes_ellipses_diagonals_and_implicit_results() {
    let einsum = |equation: &str, a: Tensor| {
        let shape: Vec<String> = a.shape().iter().map(ToString::to_string).collect();
        builder(13)
            .input("a", DType::F32, &shape.join(" "))
            .node(
                "Einsum",
                "a",
                "y",
                &[("equation", AttributeValue::String(Bytes::from(equation.to_owned())))],
            )
            .output("y", DType::F32)
            .run(&[("a", a)])
            .remove(0)
    };
    close(&einsum("ii->i", counting(&[2, 2])), &[2], &[0.0, 3.0]);
    close(&einsum("...ij->...ji", counting(&[1, 2, 2])), &[1, 2, 2], &[0.0, 2.0, 1.0, 3.0]);
    close(&einsum("ba", counting(&[1, 2])), &[2, 1], &[0.0, 1.0]);
    close(&einsum("ij->", counting(&[2, 2])), &[], &[6.0]);
}

#[test]
fn softmax_joins_dims_before_opset_13() {
    let softmax = |opset: i64| {
        builder(opset)
            .input("x", DType::F32, "1 2 2")
            .node("Softmax", "x", "y", &[("axis", int(1))])
            .output("y", DType::F32)
            .run(&[("x", f32s(&[1, 2, 2], &[0.0; 4]))])
            .remove(0)
    };
    close(&softmax(11), &[1, 2, 2], &[0.25; 4]);
    close(&softmax(13), &[1, 2, 2], &[0.5; 4]);
}

#[test]
fn slices_clamp_count_from_the_end_and_walk_down() {
    let slice = |starts: &[i64], ends: &[i64], steps: &[i64]| {
        builder(13)
            .input("x", DType::F32, "n")
            .weight("starts", &i64s(starts))
            .weight("ends", &i64s(ends))
            .weight("axes", &i64s(&[0]))
            .weight("steps", &i64s(steps))
            .node("Slice", "x starts ends axes steps", "y", &[])
            .output("y", DType::F32)
            .run(&[("x", counting(&[5]))])
            .remove(0)
    };
    close(&slice(&[1], &[i64::MAX], &[2]), &[2], &[1.0, 3.0]);
    close(&slice(&[-2], &[i64::MAX], &[1]), &[2], &[3.0, 4.0]);
    close(&slice(&[-100], &[-3], &[1]), &[2], &[0.0, 1.0]);
    close(&slice(&[-1], &[i64::MIN], &[-2]), &[3], &[4.0, 2.0, 0.0]);
}

#[test]
fn pieces_tops_and_sums_along_axes() {
    let y = builder(18)
        .input("x", DType::F32, "5")
        .weight("k", &i64s(&[2]))
        .weight("axis", &Tensor::scalar(0i64))
        .node("Split", "x", "a b", &[("num_outputs", int(2))])
        .node("TopK", "x k", "v i", &[])
        .node("CumSum", "x axis", "c", &[("reverse", int(1))])
        .node("ReduceSum", "x", "s", &[("keepdims", int(0))])
        .node("ArgMax", "x", "m", &[("keepdims", int(0))])
        .output("a", DType::F32)
        .output("b", DType::F32)
        .output("v", DType::F32)
        .output("c", DType::F32)
        .output("s", DType::F32)
        .output("m", DType::I64)
        .run(&[("x", f32s(&[5], &[1.0, 5.0, 2.0, 4.0, 3.0]))]);
    close(&y[0], &[3], &[1.0, 5.0, 2.0]);
    close(&y[1], &[2], &[4.0, 3.0]);
    close(&y[2], &[2], &[5.0, 4.0]);
    close(&y[3], &[5], &[15.0, 14.0, 9.0, 7.0, 3.0]);
    close(&y[4], &[], &[15.0]);
    assert_eq!(y[5].as_slice::<i64>().unwrap(), [1]);
}

#[test]
fn gathers_over_index_grids_become_views() {
    let imported = builder(17)
        .input("mask", DType::F32, "rows keys")
        .input("x", DType::F32, "batch seq")
        .weight("zero", &Tensor::scalar(0i64))
        .weight("one", &Tensor::scalar(1i64))
        .weight("first", &i64s(&[0]))
        .weight("second", &i64s(&[1]))
        .weight("last", &i64s(&[-1]))
        .node("Shape", "x", "shape", &[])
        .node("Gather", "shape zero", "b", &[])
        .node("Gather", "shape one", "s", &[])
        .node("Range", "zero b one", "rb", &[])
        .node("Range", "zero s one", "rs", &[])
        .node("Unsqueeze", "rb second", "rb2", &[])
        .node("Unsqueeze", "rs first", "rs2", &[])
        .node("Expand", "rb2 shape", "eb", &[])
        .node("Expand", "rs2 shape", "es", &[])
        .node("Unsqueeze", "eb last", "ub", &[])
        .node("Unsqueeze", "es last", "us", &[])
        .node("Concat", "ub us", "grid", &[("axis", int(-1))])
        .node("GatherND", "mask grid", "y", &[])
        .output("y", DType::F32)
        .import()
        .unwrap();
    assert!(imported.graph.nodes().iter().all(|node| !matches!(node.op, Op::GatherNd { .. })));
    let mask = counting(&[2, 3]);
    close(
        &run(&imported, &[("mask", mask.clone()), ("x", counting(&[2, 3]))])[0],
        &[2, 3],
        &[0., 1., 2., 3., 4., 5.],
    );
}

#[test]
fn attention_masks_causally_after_the_past() {
    let heads = [("q_num_heads", int(2)), ("kv_num_heads", int(1)), ("is_causal", int(1))];
    let y = builder(23)
        .input("q", DType::F32, "1 2 2")
        .input("k", DType::F32, "1 2 1")
        .input("v", DType::F32, "1 2 1")
        .input("pk", DType::F32, "1 1 1 1")
        .input("pv", DType::F32, "1 1 1 1")
        .node("Attention", "q k v _ pk pv", "y present_k", &heads)
        .output("y", DType::F32)
        .output("present_k", DType::F32)
        .run(&[
            ("q", f32s(&[1, 2, 2], &[0.0; 4])),
            ("k", f32s(&[1, 2, 1], &[1.0; 2])),
            ("v", f32s(&[1, 2, 1], &[2.0, 6.0])),
            ("pk", f32s(&[1, 1, 1, 1], &[1.0])),
            ("pv", f32s(&[1, 1, 1, 1], &[4.0])),
        ]);
    // Queries of zero weigh all visible keys alike: first {4, 2}, then {4, 2, 6}.
    close(&y[0], &[1, 2, 2], &[3.0, 3.0, 4.0, 4.0]);
    assert_eq!(y[1].shape(), [1, 1, 3, 1]);
}

#[test]
fn grouped_query_attention_windows_and_appends() {
    let attributes = [("num_heads", int(1)), ("kv_num_heads", int(1)), ("local_window_size", int(2))];
    let imported = builder(17)
        .input("q", DType::F32, "1 seq 1")
        .input("k", DType::F32, "1 seq 1")
        .input("v", DType::F32, "1 seq 1")
        .input("past_key.0", DType::F32, "1 1 past 1")
        .input("past_value.0", DType::F32, "1 1 past 1")
        .input("len", DType::I32, "1")
        .weight("total", &Tensor::from_vec(vec![1], vec![3i32]).unwrap())
        .node_of(
            "com.microsoft",
            "GroupQueryAttention",
            "q k v past_key.0 past_value.0 len total",
            "y present_key.0 present_value.0",
            &attributes,
        )
        .output("y", DType::F32)
        .output("present_key.0", DType::F32)
        .output("present_value.0", DType::F32)
        .import()
        .unwrap();
    assert_eq!(imported.graph.states.len(), 2);
    let one = |values: &[f32]| f32s(&[1, values.len(), 1], values);
    let y = run(
        &imported,
        &[
            ("q", one(&[0.0])),
            ("k", one(&[1.0])),
            ("v", one(&[4.0])),
            ("past_key.0", f32s(&[1, 1, 2, 1], &[1.0, 1.0])),
            ("past_value.0", f32s(&[1, 1, 2, 1], &[100.0, 2.0])),
            ("len", Tensor::from_vec(vec![1], vec![2i32]).unwrap()),
        ],
    );
    // The window of two hides the first past entry.
    close(&y[0], &[1, 1, 1], &[3.0]);
}

#[test]
fn packed_codes_are_the_same_bytes_under_another_type() {
    // Codes 8..=15 and 0..=7 with the default zero 8, in blocks of 16 of which 8 are used twice.
    let bytes: Vec<u8> = vec![0x98, 0xba, 0xdc, 0xfe, 0x10, 0x32, 0x54, 0x76];
    let codes = Tensor::from_vec(vec![1, 1, 8], bytes).unwrap();
    let attributes = [("K", int(16)), ("N", int(1)), ("bits", int(4)), ("block_size", int(16))];
    let imported = builder(17)
        .input("x", DType::F32, "1 16")
        .weight("codes", &codes)
        .weight("scales", &f32s(&[1], &[0.5]))
        .node_of("com.microsoft", "MatMulNBits", "x codes scales", "y", &attributes)
        .output("y", DType::F32)
        .import()
        .unwrap();
    let weight = imported.graph.nodes().iter().find_map(|node| match &node.op {
        Op::Weight(expr) if expr.dtype() == DType::U4 => Some(expr.shape().to_vec()),
        _ => None,
    });
    assert_eq!(weight, Some(vec![1, 16]));
    let inputs: BTreeMap<Arc<str>, Tensor> = [("x".into(), counting(&[1, 16]))].into();
    let initializer = |name: &str| {
        let tensor = imported.model.storage.to_tensor(&imported.tensors[name]).unwrap();
        let bytes = tensor.data().to_le_bytes();
        Ok(if name == "codes" {
            Tensor::from_le_bytes(DType::U4, vec![1, 16], &bytes).unwrap()
        } else {
            tensor
        })
    };
    let y = run_tensors(&imported.graph, &inputs, &initializer, 1 << 20).unwrap();
    let wanted: f32 = (0..16).map(|i| i as f32 * 0.5 * ((i + 8) % 16 - 8) as f32).sum();
    close(&y[0].1, &[1, 1], &[wanted]);
}

#[test]
fn quantising_and_back_rounds_and_saturates() {
    let y = builder(13)
        .input("x", DType::F32, "4")
        .weight("scale", &Tensor::scalar(2.0f32))
        .weight("zero", &Tensor::scalar(10u8))
        .node("QuantizeLinear", "x scale zero", "q", &[])
        .node("DequantizeLinear", "q scale zero", "y", &[])
        .output("y", DType::F32)
        .run(&[("x", f32s(&[4], &[5.0, -100.0, 1000.0, 7.1]))]);
    close(&y[0], &[4], &[4.0, -20.0, 490.0, 8.0]);
}

#[test]
fn layer_norm_and_rotary_follow_their_formulas() {
    let y = builder(23)
        .input("x", DType::F32, "1 1 1 4")
        .weight("scale", &f32s(&[4], &[1.0, 1.0, 1.0, 2.0]))
        .weight("cos", &f32s(&[1, 1, 1], &[0.0]))
        .weight("sin", &f32s(&[1, 1, 1], &[1.0]))
        .node("LayerNormalization", "x scale", "n", &[("epsilon", AttributeValue::Float(0.0))])
        .node("RotaryEmbedding", "x cos sin", "r", &[("rotary_embedding_dim", int(2))])
        .output("n", DType::F32)
        .output("r", DType::F32)
        .run(&[("x", f32s(&[1, 1, 1, 4], &[-1.0, 1.0, -1.0, 1.0]))]);
    close(&y[0], &[1, 1, 1, 4], &[-1.0, 1.0, -1.0, 2.0]);
    close(&y[1], &[1, 1, 1, 4], &[-1.0, -1.0, -1.0, 1.0]);
}

#[test]
fn bound_inputs_decide_branches_and_shapes() {
    let branch = |op: &str| {
        let mut graph = builder(17).node(op, "x", "z", &[]).graph;
        graph.outputs.push(info("z", DType::F32, None));
        AttributeValue::Graph(Box::new(graph))
    };
    let model = || {
        builder(17)
            .input("x", DType::F32, "n")
            .input("flag", DType::Bool, "")
            .node("If", "flag", "y", &[("then_branch", branch("Neg")), ("else_branch", branch("Abs"))])
            .output("y", DType::F32)
    };
    let waiting = model().import().unwrap().graph;
    assert!(waiting.nodes().iter().any(|node| matches!(node.op, Op::Deferred { .. })));
    for (flag, wanted) in [(true, 2.0), (false, 2.0)] {
        let bindings = [("flag".to_owned(), Tensor::scalar(flag))].into();
        let imported = model().import_with(&ImportOptions { bindings, ..ImportOptions::default() }).unwrap();
        assert_eq!(imported.graph.inputs().count(), 1);
        assert_eq!(imported.graph.nodes()[1].op.name(), if flag { "neg" } else { "abs" });
        close(&run(&imported, &[("x", f32s(&[1], &[-2.0]))])[0], &[1], &[wanted]);
    }
    let bindings = [("nothing".to_owned(), Tensor::scalar(true))].into();
    let error = model().import_with(&ImportOptions { bindings, ..ImportOptions::default() }).unwrap_err();
    assert!(first_fault(&error).contains("flag"), "{error}");
}

#[test]
fn requested_parts_of_outputs_become_operations() {
    let requests = |texts: &[&str]| ImportOptions {
        outputs: texts.iter().map(|text| text.parse().unwrap()).collect(),
        ..ImportOptions::default()
    };
    let model = || {
        builder(17)
            .input("x", DType::F32, "batch seq 3")
            .node("Neg", "x", "logits", &[])
            .output("logits", DType::F32)
    };
    let imported = model().import_with(&requests(&["logits[:, -1]", "logits[:, -1]=topk:2"])).unwrap();
    let names: Vec<&str> = imported.graph.outputs.iter().map(|output| &*output.name).collect();
    assert_eq!(names, ["logits", "logits.values", "logits.indices"]);
    let y = run(&imported, &[("x", counting(&[1, 2, 3]))]);
    close(&y[0], &[1, 3], &[-3.0, -4.0, -5.0]);
    close(&y[1], &[1, 2], &[-3.0, -4.0]);
    let best = model().import_with(&requests(&["logits=argmax"])).unwrap();
    assert_eq!(run(&best, &[("x", counting(&[1, 2, 3]))])[0].as_slice::<i64>().unwrap(), [0, 0]);
    assert!(model().import_with(&requests(&["logits", "logits=argmax"])).is_err());
    assert!(model().import_with(&requests(&["nothing"])).is_err());
    assert!(model().import_with(&requests(&["logits[0, 0, 0, 0]"])).is_err());
}

#[test]
fn dropout_keeps_everything_and_its_mask_is_that_of_the_opset() {
    for (opset, kept) in [(10, false), (13, true)] {
        let y = builder(opset)
            .input("x", DType::F32, "2")
            .node("Dropout", "x", "y mask", &[])
            .output("y", DType::F32)
            .output("mask", DType::Bool)
            .run(&[("x", f32s(&[2], &[1.0, 2.0]))]);
        close(&y[0], &[2], &[1.0, 2.0]);
        assert_eq!(y[1].data(), &Data::Bool(vec![kept; 2]), "opset {opset}");
    }
}

#[test]
fn declared_dims_of_outputs_are_not_believed() {
    // `n` and `m` stay two sizes, although the output says the transposed has the shape of its operand.
    let mut declared = builder(17).input("x", DType::F32, "n m").node("Transpose", "x", "y", &[]);
    declared.graph.outputs.push(info("y", DType::F32, Some("n m")));
    let y = declared.run(&[("x", counting(&[2, 3]))]);
    close(&y[0], &[3, 2], &[0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);

    let mut stale = builder(17).input("x", DType::F32, "2 3").node("Relu", "x", "y", &[]);
    stale.graph.outputs.push(info("y", DType::F32, Some("2 7 3")));
    let imported = stale.import().unwrap();
    assert!(imported.report.notes[0].contains("declared as f32[2, 7, 3]"), "{:?}", imported.report.notes);

    let mut wrong = builder(17).input("x", DType::F32, "2").node("Relu", "x", "y", &[]);
    wrong.graph.outputs.push(info("y", DType::I64, Some("2")));
    assert!(first_fault(&wrong.import().unwrap_err()).contains("computed as f32[2]"));
}

#[test]
fn early_opsets_and_forms_only_onnx_runtime_takes() {
    let x = counting(&[2, 1, 3]);
    let reshaped = builder(1)
        .input("x", DType::F32, "2 1 3")
        .node("Reshape", "x", "y", &[("shape", ints(&[3, -1]))])
        .output("y", DType::F32)
        .run(&[("x", x.clone())]);
    assert_eq!(reshaped[0].shape(), [3, 2]);
    let error = builder(1)
        .input("x", DType::F32, "2")
        .node("Add", "x x", "y", &[])
        .output("y", DType::F32)
        .import()
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);

    let squeezed = builder(13)
        .input("x", DType::F32, "2 1 3")
        .weight("none", &i64s(&[]))
        .node("Squeeze", "x none", "y", &[])
        .output("y", DType::F32)
        .run(&[("x", x)]);
    assert_eq!(squeezed[0].shape(), [2, 3]);

    let scaled = builder(8)
        .input("x", DType::F32, "1 2 1 1")
        .node(
            "ImageScaler",
            "x",
            "y",
            &[("scale", AttributeValue::Float(0.5)), ("bias", AttributeValue::Floats(vec![1.0, 2.0]))],
        )
        .output("y", DType::F32)
        .run(&[("x", counting(&[1, 2, 1, 1]))]);
    close(&scaled[0], &[1, 2, 1, 1], &[1.0, 2.5]);
}

#[test]
fn sequences_without_steps_leave_zeros() {
    let outputs = builder(14)
        .input("x", DType::F32, "1 2 1")
        .input("lengths", DType::I32, "2")
        .weight("w", &f32s(&[1, 1, 1], &[1.0]))
        .weight("start", &f32s(&[1, 2, 1], &[9.0, 0.0]))
        .node("RNN", "x w w _ lengths start", "_ last", &[("hidden_size", int(1))])
        .output("last", DType::F32)
        .run(&[
            ("x", f32s(&[1, 2, 1], &[1.0, 1.0])),
            ("lengths", Tensor::from_vec(vec![2], vec![0i32, 1]).unwrap()),
        ]);
    close(&outputs[0], &[1, 2, 1], &[0.0, 1f32.tanh()]);
}

/// The size `s` of the input `x` that a guard refuses, or the result.
fn with_size(imported: &Imported, shape: &[usize]) -> Result<Vec<f32>, String> {
    let inputs = [("x".into(), counting(shape))].into_iter().collect();
    let initializer = |name: &str| Ok(imported.model.storage.to_tensor(&imported.tensors[name]).unwrap());
    let results = run_tensors(&imported.graph, &inputs, &initializer, 1 << 20).map_err(|e| e.to_string())?;
    Ok(results[0].1.as_slice::<f32>().unwrap().to_vec())
}

#[test]
fn a_named_size_that_meets_a_number_is_that_number_or_one() {
    let add = builder(17)
        .input("x", DType::F32, "s")
        .weight("w", &f32s(&[3], &[10.0, 20.0, 30.0]))
        .node("Add", "x w", "y", &[])
        .output("y", DType::F32)
        .import()
        .unwrap();
    assert_eq!(add.graph.ty(add.graph.outputs[0].value).to_string(), "f32[3]");
    assert_eq!(with_size(&add, &[1]).unwrap(), [10.0, 20.0, 30.0]);
    assert_eq!(with_size(&add, &[3]).unwrap(), [10.0, 21.0, 32.0]);
    for wrong in [0, 2, 4, 6, 7] {
        let error = with_size(&add, &[wrong]).unwrap_err();
        assert!(error.contains("node_0") && error.contains("s stretches to 3"), "{error}");
    }
    let expand = |shape: &[i64]| {
        builder(17)
            .input("x", DType::F32, "s 2")
            .weight("shape", &i64s(shape))
            .node("Expand", "x shape", "y", &[])
            .output("y", DType::F32)
            .import()
            .unwrap()
    };
    assert_eq!(with_size(&expand(&[2, 1]), &[1, 2]).unwrap(), [0.0, 1.0, 0.0, 1.0]);
    assert_eq!(with_size(&expand(&[2, 1]), &[2, 2]).unwrap(), [0.0, 1.0, 2.0, 3.0]);
    assert_eq!(with_size(&expand(&[1, 1]), &[3, 2]).unwrap().len(), 6);
    assert!(with_size(&expand(&[2, 1]), &[3, 2]).is_err());
}

#[test]
fn a_number_expanded_to_a_named_size_may_stay() {
    let imported = builder(17)
        .input("x", DType::F32, "s")
        .weight("w", &f32s(&[3], &[1.0, 2.0, 3.0]))
        .node("Shape", "x", "shape", &[])
        .node("Expand", "w shape", "y", &[])
        .output("y", DType::F32)
        .import()
        .unwrap();
    assert_eq!(with_size(&imported, &[1]).unwrap(), [1.0, 2.0, 3.0]);
    assert_eq!(with_size(&imported, &[3]).unwrap(), [1.0, 2.0, 3.0]);
    assert!(with_size(&imported, &[2]).is_err());
}

#[test]
fn sizes_stay_sizes_on_their_way_through_floats() {
    // `x[:min(n, 1), :min(s, 9)]` with the ends computed in floating point, as old exporters do.
    let imported = builder(17)
        .input("x", DType::F32, "n s")
        .weight("table", &counting(&[1, 5]))
        .weight("most", &f32s(&[2], &[1.0, 9.0]))
        .weight("starts", &i64s(&[0, 0]))
        .node("Shape", "x", "shape", &[])
        .node("Cast", "shape", "floats", &[("to", int(1))])
        .node("Min", "floats most", "least", &[])
        .node("Cast", "least", "ends", &[("to", int(7))])
        .node("Slice", "table starts ends", "part", &[])
        .node("Expand", "part shape", "y", &[])
        .output("y", DType::F32)
        .import()
        .unwrap();
    assert!(imported.graph.nodes().iter().all(|node| !matches!(node.op, Op::Deferred { .. })));
    assert_eq!(imported.graph.ty(imported.graph.outputs[0].value).to_string(), "f32[n, s]");
    assert_eq!(with_size(&imported, &[2, 3]).unwrap(), [0.0, 1.0, 2.0, 0.0, 1.0, 2.0]);
    assert!(with_size(&imported, &[2, 6]).unwrap_err().contains("s <= 5"));
}

#[test]
fn a_count_that_meets_a_size_of_the_inputs_is_left_to_the_run() {
    let imported = builder(17)
        .input("limit", DType::F32, "")
        .input("x", DType::F32, "n")
        .weight("zero", &f32s(&[], &[0.0]))
        .weight("one", &f32s(&[], &[1.0]))
        .node("Range", "zero limit one", "steps", &[])
        .node("Add", "steps x", "y", &[])
        .output("y", DType::F32)
        .import()
        .unwrap();
    let deferred = imported.graph.nodes().iter().filter(|node| matches!(node.op, Op::Deferred { .. }));
    assert_eq!(deferred.count(), 2);
    // The input keeps its size.
    assert_eq!(imported.graph.inputs().nth(1).unwrap().2.to_string(), "f32[n]");
}

#[test]
fn parameters_of_a_batch_norm_share_the_types_their_opset_says() {
    let import = |opset: i64, statistics: DType| {
        let parameters = |builder: Builder, names: [&str; 2], dtype| {
            names.into_iter().fold(builder, |builder, name| builder.input(name, dtype, "3"))
        };
        let start = builder(opset).input("x", DType::F16, "2 3 4");
        let scaled = parameters(start, ["scale", "bias"], if opset < 15 { DType::F16 } else { DType::F32 });
        parameters(scaled, ["mean", "variance"], statistics)
            .node("BatchNormalization", "x scale bias mean variance", "y", &[])
            .output("y", DType::F16)
            .import()
    };
    assert!(import(13, DType::F16).is_ok());
    assert!(import(14, DType::F32).is_ok());
    assert!(import(15, DType::F16).is_ok());
    let error = import(13, DType::F32).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(first_fault(&error).contains("f16, f16, f16, f32, f32"), "{error}");
}

#[test]
fn loops_that_do_not_fit_their_bodies_are_invalid() {
    let scan = |inputs: &[(&str, &str)], second: &str| {
        let body = Graph {
            inputs: inputs.iter().map(|(name, shape)| info(name, DType::F32, Some(shape))).collect(),
            nodes: builder(17).node("Add", "state step", "next", &[]).graph.nodes,
            outputs: vec![info("next", DType::F32, None)],
            ..Graph::default()
        };
        let body = AttributeValue::Graph(Box::new(body));
        builder(17)
            .input("start", DType::F32, "2")
            .input("a", DType::F32, "3 2")
            .input("b", DType::F32, second)
            .node("Scan", "start a b", "y", &[("body", body), ("num_scan_inputs", int(2))])
            .output("y", DType::F32)
            .import()
    };
    let fitting = [("state", "2"), ("step", "2"), ("other", "2")];
    assert!(scan(&fitting, "3 2").is_ok());
    for (inputs, second, wanted) in [
        (&fitting[..2], "3 2", "takes 2 inputs, the Scan gives it 3"),
        (&fitting[..], "4 2", "scan input 1 has 4 steps, the first one 3"),
        (&fitting[..], "3", "input 2 of the body is declared with rank 1, given 0"),
    ] {
        let error = scan(inputs, second).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(first_fault(&error).contains(wanted), "{error}");
    }
}

#[test]
fn expressions_over_names_that_no_input_has_are_names() {
    // The mask's dim is written in names of another part of the exporter.
    let import = |mask: &str| {
        let mut model = builder(17)
            .input("x", DType::F32, "past seq")
            .node("Concat", "x x", "all", &[("axis", int(1))])
            .node("Add", "all mask", "y", &[])
            .output("y", DType::F32);
        let mut info = info("mask", DType::F32, Some(""));
        if let Some(ValueType::Tensor(ty)) = &mut info.value_type {
            ty.shape = Some(vec![Extent::Symbol(mask.into())]);
        }
        model.graph.inputs.push(info);
        model.import().unwrap()
    };
    for mask in ["past_len + seq_len", "2*seq"] {
        let imported = import(mask);
        assert_eq!(imported.graph.inputs().nth(1).unwrap().2.to_string(), "f32[2*seq]");
        let y = run(&imported, &[("x", counting(&[1, 2])), ("mask", counting(&[4]))]);
        close(&y[0], &[1, 4], &[0.0, 2.0, 2.0, 4.0]);
    }
}
