//! Models that are refused, and what is said of them.

use crate::support::*;
use tpshard_frontend::{AttributeValue, ErrorKind, Graph};
use tpshard_ir::{DType, Tensor};

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

/// ONNX Runtime refuses them too, so nobody can have meant what one might make of them.
#[test]
fn what_the_inference_of_onnx_refuses_is_refused() {
    let refused = |op: &str, inputs: &str, attributes: &[(&str, AttributeValue)]| {
        let model = builder(18)
            .input("x", DType::F32, "2 3")
            .input("wide", DType::F32, "2 2 3 3")
            .weight("count", &Tensor::scalar(1i64))
            .weight("scales", &f32s(&[2], &[1.0, 2.0]))
            .weight("sizes", &i64s(&[2, 6]))
            .node(op, inputs, "y", attributes);
        first_fault(&model.output("y", DType::F32).import().unwrap_err())
    };
    let text = |text: &str| AttributeValue::String(text.to_owned().into());
    assert!(refused("TopK", "x count", &[]).contains("not one integer in one dim"));
    assert!(refused("Split", "x", &[("axis", int(1))]).contains("neither lengths nor a number"));
    assert!(refused("Resize", "x _ scales sizes", &[]).contains("both scales and sizes"));
    assert!(refused("Resize", "x _ scales", &[("mode", text("bilinear"))]).contains("the mode `bilinear`"));
    let equation = [("equation", text("...i,...ij->...j"))];
    assert!(refused("Einsum", "x wide", &equation).contains("different numbers of dims"));
    assert!(refused("Size", "x", &[]).contains("declared as f32"));
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
