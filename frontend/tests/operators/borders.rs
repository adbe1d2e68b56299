//! What may be given besides what the inputs' types say, and where it may not.

use crate::support::*;
use tpshard_ir::{Border, DType, Filling, Tensor};

/// Scores of new positions over all of them, which masks are applied to.
fn decoder() -> Builder {
    builder(17)
        .input("x", DType::F32, "b seq 4")
        .input("past", DType::F32, "b past 4")
        .input("mask", DType::F32, "b total")
        .weight("one", &i64s(&[1]))
        .weight("zero", &Tensor::scalar(0i64))
        .node("Concat", "past x", "present", &[("axis", int(1))])
        .node("Transpose", "present", "turned", &[("perm", ints(&[0, 2, 1]))])
        .node("MatMul", "x turned", "scores", &[])
        .output("present", DType::F32)
}

fn aligned() -> Builder {
    decoder().node("Unsqueeze", "mask one", "aligned", &[])
}

#[track_caller]
fn borders(model: Builder) -> Vec<Border> {
    let graph = model.import().unwrap().graph;
    assert_eq!(graph.to_string().parse::<tpshard_ir::Graph>().unwrap(), graph);
    tpshard_ir::verify(graph.clone()).unwrap();
    graph.borders
}

fn stretched(filling: Filling) -> Vec<Border> {
    vec![Border::Stretch { input: "mask".into(), axis: 1, filling }]
}

#[test]
fn masks_that_only_broadcast_may_have_one_entry() {
    let repeat = stretched(Filling::Repeat);
    assert_eq!(borders(aligned().node("Add", "scores aligned", "y", &[]).output("y", DType::F32)), repeat);
    // Through functions of one operand and of several, in another place, by an Expand, into a selection.
    let model = aligned()
        .node("Neg", "aligned", "negative", &[])
        .node("Transpose", "negative", "across", &[("perm", ints(&[0, 2, 1]))])
        .node("Transpose", "scores", "down", &[])
        .node("Transpose", "down", "back", &[])
        .node("Transpose", "across", "again", &[("perm", ints(&[0, 2, 1]))])
        .node("Mul", "again again", "square", &[])
        .node("Cast", "scores", "truth", &[("to", int(9))])
        .node("Where", "truth back square", "y", &[])
        .output("y", DType::F32);
    assert_eq!(borders(model), repeat);
    let model = aligned()
        .node("Shape", "scores", "size", &[])
        .node("Expand", "aligned size", "full", &[])
        .node("ReduceSum", "full", "y", &[])
        .output("y", DType::F32);
    assert_eq!(borders(model), repeat);
    // What is read of its shape is another dim.
    let model = aligned()
        .node("Shape", "mask", "size", &[])
        .node("Gather", "size zero", "batch", &[])
        .node("Cast", "batch", "real", &[("to", int(1))])
        .node("Mul", "aligned real", "scaled", &[])
        .node("Add", "scores scaled", "y", &[])
        .output("y", DType::F32);
    assert_eq!(borders(model), repeat);
}

#[test]
fn masks_that_are_used_otherwise_may_not() {
    let used =
        |model: Builder| borders(model.node("Add", "scores aligned", "y", &[]).output("y", DType::F32));
    let none: Vec<Border> = Vec::new();
    let summed = aligned().node("ReduceSum", "mask one", "s", &[]).output("s", DType::F32);
    assert_eq!(used(summed), none);
    let joined = aligned().node("Concat", "mask mask", "s", &[("axis", int(0))]).output("s", DType::F32);
    assert_eq!(used(joined), none);
    let given_back = aligned().node("Neg", "mask", "s", &[]).output("s", DType::F32);
    assert_eq!(used(given_back), none);
    let read = aligned()
        .node("Shape", "mask", "size", &[])
        .node("Gather", "size one", "total", &[])
        .output("total", DType::I64);
    assert_eq!(used(read), none);
    let counted = aligned().node("Size", "mask", "s", &[]).output("s", DType::I64);
    assert_eq!(used(counted), none);
    let softened = aligned().node("Softmax", "mask", "s", &[("axis", int(-1))]).output("s", DType::F32);
    assert_eq!(used(softened), none);
    // A size of its own is no sum.
    let free = builder(17)
        .input("x", DType::F32, "b n")
        .input("mask", DType::F32, "b total")
        .node("Add", "x mask", "y", &[])
        .output("y", DType::F32);
    assert_eq!(borders(free), none);
}

#[test]
fn a_mask_that_nothing_reads_may_have_any_number_of_entries() {
    let model = || {
        let mut model = decoder();
        model.graph.outputs[0] = info("present", DType::F32, Some("b total 4"));
        model
    };
    assert_eq!(borders(model()), stretched(Filling::Any));
    let imported = model().import().unwrap();
    for entries in [0, 3, 8] {
        let mask = f32s(&[1, entries], &vec![1.0; entries]);
        let given = [("x", counting(&[1, 2, 4])), ("past", counting(&[1, 3, 4])), ("mask", mask)];
        assert_eq!(run(&imported, &given)[0].shape(), [1, 5, 4]);
    }
    // Read by a body alone, it is read all the same.
    let mut body = builder(17).node("Neg", "mask", "z", &[]).graph;
    body.outputs.push(info("z", DType::F32, None));
    let body = || tpshard_frontend::AttributeValue::Graph(Box::new(body.clone()));
    let model = model().input("flag", DType::Bool, "").node(
        "If",
        "flag",
        "s",
        &[("then_branch", body()), ("else_branch", body())],
    );
    assert_eq!(borders(model.output("s", DType::F32)), []);
}

#[test]
fn a_mask_of_one_entry_gives_what_a_full_one_does() {
    let imported =
        aligned().node("Add", "scores aligned", "y", &[]).output("y", DType::F32).import().unwrap();
    let given = |mask: Tensor| {
        run(&imported, &[("x", counting(&[2, 2, 4])), ("past", counting(&[2, 3, 4])), ("mask", mask)])
    };
    let one = given(f32s(&[2, 1], &[7.0, -1.0]));
    let full = given(f32s(&[2, 5], &[7.0, 7.0, 7.0, 7.0, 7.0, -1.0, -1.0, -1.0, -1.0, -1.0]));
    assert_eq!(one, full);
}

/// GroupQueryAttention that is told the number of keys by the mask.
fn grouped() -> Builder {
    builder(17)
        .input("q", DType::F32, "b seq 32")
        .input("k", DType::F32, "b seq 16")
        .input("v", DType::F32, "b seq 16")
        .input("mask", DType::I64, "b total")
        .input("past_key", DType::F32, "b 2 past 8")
        .input("past_value", DType::F32, "b 2 past 8")
        .weight("axis", &i64s(&[1]))
        .weight("index", &Tensor::scalar(1i64))
        .node("ReduceSum", "mask axis", "tokens", &[])
        .node("Sub", "tokens axis", "lengths", &[])
        .node("Shape", "mask", "dims", &[])
        .node("Gather", "dims index", "total", &[])
        .node_of(
            "com.microsoft",
            "GroupQueryAttention",
            "q k v past_key past_value lengths total",
            "y present_key present_value",
            &[("num_heads", int(4)), ("kv_num_heads", int(2))],
        )
        .output("y", DType::F32)
        .output("present_key", DType::F32)
        .output("present_value", DType::F32)
}

#[test]
fn pasts_of_grouped_queries_may_be_buffers() {
    let names: Vec<String> = borders(grouped()).iter().map(|border| border.input().to_string()).collect();
    assert_eq!(names, ["past_key", "past_value"]);
    assert!(borders(grouped()).iter().all(|border| matches!(border, Border::Buffer { axis: 2, .. })));
}

#[test]
fn pasts_whose_length_is_seen_elsewhere_are_no_buffers() {
    let none: Vec<Border> = Vec::new();
    let read = grouped().node("Shape", "past_key", "size", &[]).output("size", DType::I64);
    assert_eq!(borders(read), none);
    let continued = grouped().node("Neg", "present_key", "more", &[]).output("more", DType::F32);
    assert_eq!(borders(continued), none);
    let named = grouped().input("other", DType::F32, "past").node("Neg", "other", "more", &[]);
    assert_eq!(borders(named.output("more", DType::F32)), none);
    // Without a mask nothing says how much of the past is used.
    let untold = {
        let mut model = grouped();
        model.graph.inputs.retain(|input| input.name != "mask");
        model.graph.nodes.drain(..4);
        model = model.input("lengths", DType::I64, "b").input("total", DType::I64, "");
        model
    };
    assert_eq!(borders(untold), none);
}
