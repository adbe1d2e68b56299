//! Model-local functions are gone after loading, and cannot blow up.

mod common;

use common::*;
use tpshard_frontend::proto::*;
use tpshard_frontend::{AttributeValue, ErrorKind, Node};

fn with(functions: Vec<FunctionProto>, graph: GraphProto) -> ModelProto {
    ModelProto { functions, ..model(graph) }
}

/// `inputs → Op → outputs`, one line per node.
fn lines(nodes: &[Node]) -> Vec<String> {
    nodes
        .iter()
        .map(|node| format!("{} → {} → {}", node.inputs.join(" "), node.op_type, node.outputs.join(" ")))
        .collect()
}

#[test]
fn a_call_becomes_the_body_with_names_of_its_own() {
    let f = function("F", &["a"], vec![node("Neg", &["a"], &["t"]), node("Abs", &["t"], &["r"])], &["r"]);
    // `t` exists in the caller too, and so does the name that the first call's `t` would get.
    let nodes = vec![
        node("Relu", &["x"], &["t"]),
        node("Relu", &["t"], &["call_y/t"]),
        call("F", &["t"], &["y"]),
        call("F", &["call_y/t"], &["z"]),
    ];
    let model = load_proto(&with(vec![f], graph(&["x"], nodes, &["y", "z"]))).unwrap();
    assert_eq!(
        lines(&model.graph.nodes),
        [
            "x → Relu → t",
            "t → Relu → call_y/t",
            "t → Neg → call_y/t#2",
            "call_y/t#2 → Abs → y",
            "call_y/t → Neg → call_z/t",
            "call_z/t → Abs → z",
        ]
    );
    assert_eq!(model.graph.nodes[2].opset, 18, "the function's import holds in its body");
    assert_eq!(model.graph.nodes[0].opset, 20);
    assert_eq!(model.graph.nodes[2].name, "call_y/Neg");
}

#[test]
fn attributes_come_from_the_call_the_default_or_nowhere() {
    let mut op = node("Softmax", &["a"], &["r"]);
    op.attribute = vec![reference("axis", "p"), reference("other", "q"), reference("third", "absent")];
    let mut f = function("F", &["a"], vec![op], &["r"]);
    f.attribute = strings(&["p", "absent"]);
    f.attribute_proto = vec![int("q", 7)];
    let mut node = call("F", &["x"], &["y"]);
    node.attribute = vec![int("p", 3)];
    let loaded = load_proto(&with(vec![f.clone()], graph(&["x"], vec![node.clone()], &["y"]))).unwrap();
    let attributes: Vec<_> =
        loaded.graph.nodes[0].attributes.iter().map(|a| (a.name.as_str(), a.value.clone())).collect();
    assert_eq!(attributes, [("axis", AttributeValue::Int(3)), ("other", AttributeValue::Int(7))]);

    node.attribute = vec![int("unknown", 1)];
    let text = refused(&with(vec![f], graph(&["x"], vec![node], &["y"])));
    assert!(text.contains("call_y") && text.contains("no attribute `unknown`"), "{text}");
}

#[test]
fn nested_calls_and_bodies_in_functions() {
    let inner = function("Inner", &["a"], vec![node("Neg", &["a"], &["r"])], &["r"]);
    let then = graph(&[], vec![call("Inner", &["a"], &["b"])], &["b"]);
    let otherwise = graph(&[], vec![node("Abs", &["a"], &["b"])], &["b"]);
    let mut branch = node("If", &["c"], &["r"]);
    branch.attribute = vec![body("then_branch", then), body("else_branch", otherwise)];
    let outer = function("Outer", &["c", "a"], vec![branch], &["r"]);
    let nodes = vec![call("Outer", &["x", "x"], &["y"]), call("Outer", &["x", "y"], &["z"])];
    let model = load_proto(&with(vec![outer, inner], graph(&["x"], nodes, &["z"]))).unwrap();
    assert_eq!(lines(&model.graph.nodes), ["x → If → y", "x → If → z"]);
    let bodies: Vec<_> =
        model.graph.nodes.iter().flat_map(Node::subgraphs).flat_map(|graph| lines(&graph.nodes)).collect();
    assert_eq!(
        bodies,
        ["x → Neg → call_y/b", "x → Abs → call_y/b#2", "y → Neg → call_z/b", "y → Abs → call_z/b#5"]
    );
}

#[test]
fn outputs_that_are_inputs_are_forwarded() {
    let f = function("F", &["a"], vec![node("Neg", &["a"], &["r"])], &["a", "r", "r"]);
    let nodes = vec![call("F", &["x"], &["p", "q", "s"])];
    let model = load_proto(&with(vec![f], graph(&["x"], nodes, &["p", "q", "s"]))).unwrap();
    let mut found = lines(&model.graph.nodes);
    found.sort();
    assert_eq!(found, ["q → Identity → s", "x → Identity → p", "x → Neg → q"]);
}

#[test]
fn absent_inputs_stay_absent_and_bodies_do_not_capture() {
    let f = function("F", &["a", "b"], vec![node("Clip", &["a", "b"], &["r"])], &["r"]);
    let nodes = vec![call("F", &["x"], &["y"])];
    let model = load_proto(&with(vec![f], graph(&["x"], nodes.clone(), &["y"]))).unwrap();
    assert_eq!(model.graph.nodes[0].inputs, ["x", ""]);

    let greedy = function("F", &["a", "b"], vec![node("Add", &["a", "x"], &["r"])], &["r"]);
    let text = refused(&with(vec![greedy], graph(&["x"], nodes, &["y"])));
    assert!(text.contains("nothing makes the node's input `call_y/x`"), "{text}");
}

#[test]
fn overloads_select() {
    let mut f = function("F", &["a"], vec![node("Neg", &["a"], &["r"])], &["r"]);
    let g = FunctionProto { overload: "2".into(), node: vec![node("Abs", &["a"], &["r"])], ..f.clone() };
    let mut second = call("F", &["x"], &["z"]);
    second.overload = "2".into();
    let nodes = vec![call("F", &["x"], &["y"]), second];
    let loaded = load_proto(&with(vec![f.clone(), g], graph(&["x"], nodes.clone(), &["y", "z"]))).unwrap();
    assert_eq!(lines(&loaded.graph.nodes), ["x → Neg → y", "x → Abs → z"]);
    f.overload = "2".into();
    let text = refused(&with(vec![f.clone(), f], graph(&["x"], nodes, &["y", "z"])));
    assert!(text.contains("`local.F:2` is defined twice"), "{text}");
}

#[test]
fn wrong_arity_is_refused() {
    let f = function("F", &["a"], vec![node("Neg", &["a"], &["r"])], &["r"]);
    let text = refused(&with(vec![f], graph(&["x"], vec![call("F", &["x", "x"], &["y"])], &["y"])));
    assert!(text.contains("1 inputs, the call gives 2"), "{text}");
}

#[test]
fn recursion_is_refused() {
    let f = function("F", &["a"], vec![call("G", &["a"], &["r"])], &["r"]);
    let g = function("G", &["a"], vec![call("F", &["a"], &["r"])], &["r"]);
    let text = refused(&with(vec![f, g], graph(&["x"], vec![call("F", &["x"], &["y"])], &["y"])));
    assert!(text.contains("calls itself"), "{text}");
}

#[test]
fn expansion_is_computed_before_it_is_done() {
    let functions = (0..40)
        .map(|level| {
            let nodes = if level == 0 {
                vec![node("Neg", &["a"], &["r"])]
            } else {
                let callee = format!("F{}", level - 1);
                vec![call(&callee, &["a"], &["t"]), call(&callee, &["t"], &["r"])]
            };
            function(&format!("F{level}"), &["a"], nodes, &["r"])
        })
        .collect();
    let error =
        load_proto(&with(functions, graph(&["x"], vec![call("F39", &["x"], &["y"])], &["y"]))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Resource);
    let limit = format!("more than {} nodes", tpshard_frontend::Limits::default().nodes);
    assert!(error.to_string().contains(&limit), "{error}");
}

#[test]
fn long_call_chains_need_no_stack() {
    let functions = (0..20_000)
        .map(|level| {
            let callee = format!("F{}", level + 1);
            function(&format!("F{level}"), &["a"], vec![call(&callee, &["a"], &["r"])], &["r"])
        })
        .chain([function("F20000", &["a"], vec![node("Neg", &["a"], &["r"])], &["r"])])
        .collect();
    let error =
        load_proto(&with(functions, graph(&["x"], vec![call("F0", &["x"], &["y"])], &["y"]))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Resource);
    assert!(error.to_string().contains("nested more than 64 deep"), "{error}");
}

#[test]
fn copied_attributes_are_counted() {
    // A megabyte of attribute, referred to by two thousand nodes: two gigabytes.
    let mut nodes = Vec::new();
    for index in 0..2_000 {
        let mut op = node("Op", &["a"], &[]);
        op.output = vec![if index == 0 { "r".into() } else { format!("v{index}") }];
        op.attribute = vec![AttributeProto { r#type: 7, ..reference("list", "p") }];
        nodes.push(op);
    }
    let mut f = function("F", &["a"], nodes, &["r"]);
    f.attribute = strings(&["p"]);
    let mut site = call("F", &["x"], &["y"]);
    site.attribute = vec![AttributeProto {
        name: "p".into(),
        ints: vec![1; 1 << 17],
        r#type: 7,
        ..AttributeProto::default()
    }];
    let error = load_proto(&with(vec![f], graph(&["x"], vec![site], &["y"]))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Resource);
    assert!(error.to_string().contains("copies attributes"), "{error}");
}

#[test]
fn references_outside_functions_are_refused() {
    let mut op = node("Softmax", &["x"], &["y"]);
    op.attribute = vec![reference("axis", "p")];
    let text = refused(&model(graph(&["x"], vec![op], &["y"])));
    assert!(text.contains("outside any function"), "{text}");
}
