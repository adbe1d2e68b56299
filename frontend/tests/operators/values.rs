//! What operators compute.

use crate::support::*;
use bytes::Bytes;
use std::collections::BTreeMap;
use std::sync::Arc;
use tpshard_frontend::{AttributeValue, ErrorKind, ImportOptions};
use tpshard_ir::interp::run_tensors;
use tpshard_ir::{DType, Data, Op, Tensor};

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

#[test]
fn grids_over_flattened_dims_may_walk_several_of_them_at_once() {
    let imported = builder(17)
        .input("x", DType::F32, "b 2 2")
        .weight("zero", &Tensor::scalar(0i64))
        .weight("one", &Tensor::scalar(1i64))
        .weight("four", &Tensor::scalar(4i64))
        .weight("last", &i64s(&[-1]))
        .weight("flat", &i64s(&[-1]))
        .node("Shape", "x", "shape", &[])
        .node("Gather", "shape zero", "b", &[])
        .node("Range", "zero b one", "rows", &[])
        .node("Mul", "rows four", "starts", &[])
        .node("Unsqueeze", "starts last", "column", &[])
        .node("Range", "zero four one", "row", &[])
        .node("Add", "column row", "grid", &[])
        .node("Reshape", "x flat", "line", &[])
        .node("Gather", "line grid", "y", &[])
        .output("y", DType::F32)
        .import()
        .unwrap();
    assert!(imported.graph.nodes().iter().all(|node| !matches!(node.op, Op::Gather { .. })));
    let wanted: Vec<f32> = (0..12).map(|i| i as f32).collect();
    close(&run(&imported, &[("x", counting(&[3, 2, 2]))])[0], &[3, 4], &wanted);
}

/// As poolers of image models have them, whose kernel is meant to cover whatever there is.
#[test]
fn windows_that_are_rounded_up_may_be_larger_than_the_image() {
    let pool = |kernel: i64, rounded: i64| {
        builder(17)
            .input("x", DType::F32, "1 1 2 3")
            .node(
                "AveragePool",
                "x",
                "y",
                &[
                    ("kernel_shape", ints(&[kernel, kernel])),
                    ("strides", ints(&[kernel, kernel])),
                    ("ceil_mode", int(rounded)),
                ],
            )
            .output("y", DType::F32)
    };
    close(&pool(5, 1).run(&[("x", counting(&[1, 1, 2, 3]))])[0], &[1, 1, 1, 1], &[2.5]);
    assert!(first_fault(&pool(5, 0).import().unwrap_err()).contains("does not fit"));
}
