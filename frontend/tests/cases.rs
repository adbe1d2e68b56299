//! Models that choose between graphs by a bool input become one graph for each value.

use bytes::Bytes;
use std::collections::BTreeMap;
use std::sync::Arc;
use tpshard_frontend::{
    Attribute, AttributeValue, Dim, Graph, ImportOptions, Imported, MOST_CHOOSING, Model, Node, Role,
    Storage, TensorRef, TensorSource, TensorType, ValueInfo, ValueType, lower_cases,
};
use tpshard_ir::interp::run_tensors;
use tpshard_ir::{DType, Op, Tensor, verify};

fn info(name: &str, dtype: DType, shape: &[&str]) -> ValueInfo {
    let dim = |text: &&str| text.parse().map_or(Dim::Symbol((*text).into()), Dim::Known);
    let tensor = TensorType { dtype, shape: Some(shape.iter().map(dim).collect()) };
    ValueInfo { name: name.into(), value_type: Some(ValueType::Tensor(tensor)), metadata: BTreeMap::new() }
}

fn node(op: &str, inputs: &[&str], output: &str, attributes: &[(&str, AttributeValue)]) -> Node {
    let attribute =
        |(name, value): &(&str, AttributeValue)| Attribute { name: (*name).into(), value: value.clone() };
    Node {
        name: format!("make {output}"),
        op_type: op.into(),
        opset: 17,
        inputs: inputs.iter().map(|name| (*name).to_owned()).collect(),
        outputs: vec![output.into()],
        attributes: attributes.iter().map(attribute).collect(),
        ..Node::default()
    }
}

fn stored(values: &[f32]) -> TensorRef {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let source = TensorSource::Inline(Bytes::from(bytes));
    TensorRef { name: String::new(), dtype: DType::F32, dims: vec![values.len() as u64], source }
}

/// A branch of these nodes, the last of which makes its result.
fn branch(nodes: Vec<Node>, weights: &[(&str, TensorRef)]) -> AttributeValue {
    let last = nodes.last().map(|node| node.outputs[0].clone()).unwrap();
    let mut graph = Graph { nodes, outputs: vec![info(&last, DType::F32, &["n"])], ..Graph::default() };
    graph.initializers.extend(weights.iter().map(|(name, tensor)| ((*name).to_owned(), tensor.clone())));
    AttributeValue::Graph(Box::new(graph))
}

fn choice(condition: &str, output: &str, then: AttributeValue, otherwise: AttributeValue) -> Node {
    node("If", &[condition], output, &[("then_branch", then), ("else_branch", otherwise)])
}

fn lowered(inputs: Vec<ValueInfo>, nodes: Vec<Node>, bind: &[(&str, bool)]) -> Vec<Imported> {
    let graph = Graph { inputs, nodes, outputs: vec![info("y", DType::F32, &["n"])], ..Graph::default() };
    let bindings = bind.iter().map(|(name, value)| ((*name).to_owned(), Tensor::scalar(*value))).collect();
    lower_cases(model(graph), &ImportOptions { bindings, ..ImportOptions::default() }).unwrap()
}

fn model(graph: Graph) -> Model {
    Model {
        path: "test.onnx".into(),
        ir_version: 10,
        opsets: [(String::new(), 17)].into(),
        producer: String::new(),
        graph,
        metadata: BTreeMap::new(),
        device_configurations: Vec::new(),
        storage: Storage::default(),
    }
}

fn x() -> ValueInfo {
    info("x", DType::F32, &["n"])
}

fn flag(name: &str, shape: &[&str]) -> ValueInfo {
    info(name, DType::Bool, shape)
}

fn cases(imported: &Imported) -> String {
    let cases: Vec<String> = imported.graph.cases.iter().map(ToString::to_string).collect();
    cases.join(" ")
}

fn waits(imported: &Imported) -> bool {
    imported.graph.nodes().iter().any(|node| matches!(node.op, Op::Deferred { .. }))
}

/// What the graph of these values makes of `x`.
fn run(imported: &Imported, x: &[f32]) -> Vec<f32> {
    let mut inputs: BTreeMap<Arc<str>, Tensor> =
        [("x".into(), Tensor::from_vec(vec![x.len()], x.to_vec()).unwrap())].into();
    for case in &imported.graph.cases {
        let shape = vec![1; case.ty.rank()];
        let value = Tensor::new(shape, tpshard_ir::Data::Bool(vec![case.value])).unwrap();
        inputs.insert(case.input.clone(), value);
    }
    let initializer = |name: &str| Ok(imported.model.storage.to_tensor(&imported.tensors[name]).unwrap());
    verify(imported.graph.clone()).unwrap();
    let outputs = run_tensors(&imported.graph, &inputs, &initializer, 1 << 20).unwrap();
    outputs[0].1.as_slice::<f32>().unwrap().to_vec()
}

/// `w` is another tensor in each branch; both are called the same.
fn scaled(by: f32) -> AttributeValue {
    branch(vec![node("Mul", &["x", "w"], "z", &[])], &[("w", stored(&[by, 2.0 * by]))])
}

#[test]
fn each_value_has_its_graph_and_weights_their_own_names() {
    for shape in [&["1"][..], &[]] {
        let nodes = vec![choice("cached", "y", scaled(10.0), scaled(1.0))];
        let all = lowered(vec![x(), flag("cached", shape)], nodes, &[]);
        assert_eq!(all.iter().map(cases).collect::<Vec<_>>(), ["cached=true", "cached=false"]);
        assert_eq!(run(&all[0], &[1.0, 1.0]), [10.0, 20.0]);
        assert_eq!(run(&all[1], &[1.0, 1.0]), [1.0, 2.0]);
        for imported in &all {
            assert!(!waits(imported));
            assert_eq!(imported.tensors, all[0].tensors);
            let names: Vec<&str> = imported.graph.inputs().map(|(_, name, _)| &**name).collect();
            assert_eq!(names, ["x", "cached"]);
        }
        assert_eq!(all[0].tensors.keys().collect::<Vec<_>>(), ["w", "w'"]);
    }
}

#[test]
fn a_choice_may_pass_operators_and_two_inputs_make_four_graphs() {
    let nodes = vec![
        node("Not", &["a"], "not_a", &[]),
        node("And", &["not_a", "b"], "both", &[]),
        node("Identity", &["both"], "chosen", &[]),
        choice("chosen", "y", scaled(10.0), scaled(1.0)),
    ];
    let all = lowered(vec![flag("a", &[]), x(), flag("b", &["1"])], nodes, &[]);
    let told: Vec<String> = all.iter().map(cases).collect();
    assert_eq!(told, ["a=true b=true", "a=true b=false", "a=false b=true", "a=false b=false"]);
    let found: Vec<f32> = all.iter().map(|imported| run(imported, &[1.0, 0.0])[0]).collect();
    assert_eq!(found, [1.0, 1.0, 10.0, 1.0]);
}

#[test]
fn inputs_that_do_not_choose_or_are_bound_or_too_many_do_not_multiply_graphs() {
    let one = || vec![choice("cached", "y", scaled(10.0), scaled(1.0))];
    let bound = lowered(vec![x(), flag("cached", &[])], one(), &[("cached", true)]);
    assert_eq!((bound.len(), cases(&bound[0]).as_str()), (1, ""));
    assert_eq!(run(&bound[0], &[1.0, 1.0]), [10.0, 20.0]);
    // A value of an input with one element may be bound without dims.
    let bound = lowered(vec![x(), flag("cached", &["1"])], one(), &[("cached", false)]);
    assert_eq!(run(&bound[0], &[1.0, 1.0]), [1.0, 2.0]);
    // Nobody says that there is one value.
    let open = lowered(vec![x(), flag("cached", &["k"])], one(), &[]);
    assert!(open.len() == 1 && waits(&open[0]));
    let mixed = vec![node("Where", &["mask", "x", "x"], "y", &[])];
    assert_eq!(lowered(vec![x(), flag("mask", &["1"])], mixed, &[]).len(), 1);
    let names: Vec<String> = (0..=MOST_CHOOSING).map(|at| format!("flag{at}")).collect();
    let mut nodes = Vec::new();
    for (at, name) in names.iter().enumerate() {
        let (input, output) = (format!("x{at}"), format!("x{}", at + 1));
        let input = if at == 0 { "x" } else { &input };
        let output = if at == MOST_CHOOSING { "y" } else { &output };
        let part = |op: &str| branch(vec![node(op, &[input], "z", &[])], &[]);
        nodes.push(choice(name, output, part("Neg"), part("Abs")));
    }
    let inputs = std::iter::once(x()).chain(names.iter().map(|name| flag(name, &[]))).collect();
    let many = lowered(inputs, nodes, &[]);
    assert!(many.len() == 1 && waits(&many[0]));
    assert!(many[0].report.notes.iter().any(|note| note.contains("3 inputs choose")), "{:?}", many[0].report);
}

/// `present = past, x` or `x` alone; `y` is read from it.
fn with_state(grows: bool, batch: &str) -> AttributeValue {
    let made = if grows {
        node("Concat", &["past", "new"], "own", &[("axis", AttributeValue::Int(1))])
    } else {
        node("Identity", &["new"], "own", &[])
    };
    let outputs = vec![info("own", DType::F32, &[batch, "all", "2"])];
    AttributeValue::Graph(Box::new(Graph { nodes: vec![made], outputs, ..Graph::default() }))
}

fn decoder(past: &[&str], then: bool, otherwise: bool) -> Vec<Imported> {
    let inputs = vec![
        info("new", DType::F32, &["batch", "seq", "2"]),
        info("past", DType::F32, past),
        flag("cached", &["1"]),
    ];
    let nodes = vec![choice("cached", "present", with_state(then, "batch"), with_state(otherwise, "batch"))];
    let outputs = vec![info("present", DType::F32, &["batch", "all", "2"])];
    let graph = Graph { inputs, nodes, outputs, ..Graph::default() };
    lower_cases(model(graph), &ImportOptions::default()).unwrap()
}

#[test]
fn state_is_that_of_all_graphs_or_of_none() {
    let all = decoder(&["batch", "before", "2"], true, false);
    for imported in &all {
        let [pair] = imported.graph.states.as_slice() else { panic!("{:?}", imported.graph.states) };
        assert_eq!((&*pair.input, &*pair.output, pair.axis), ("past", "present", 1));
        assert_eq!(imported.report.roles.get("before"), Some(&Role::Past));
        verify(imported.graph.clone()).unwrap();
    }
    // Where no graph appends, nothing is known to be state.
    let none = decoder(&["batch", "before", "2"], false, false);
    assert!(none.iter().all(|imported| imported.graph.states.is_empty()));
    // The batch of the past is another one where nothing compares them.
    let apart = decoder(&["rows", "before", "2"], true, false);
    assert!(apart.iter().all(|imported| imported.graph.states.is_empty()));
}

#[test]
fn a_graph_that_cannot_be_made_leaves_the_choice_for_later() {
    let of = |otherwise: AttributeValue, op: &str| {
        let then = branch(vec![node("Neg", &["x"], "z", &[])], &[]);
        let nodes = vec![choice("cached", "y", then, otherwise), node(op, &["x"], "v", &[])];
        let outputs = vec![info("y", DType::F32, &["n"]), info("v", DType::F32, &["n"])];
        let graph = Graph { inputs: vec![x(), flag("cached", &[])], nodes, outputs, ..Graph::default() };
        lower_cases(model(graph), &ImportOptions::default())
    };
    // It may be that nobody ever takes this branch.
    let unknown = branch(vec![node("NoSuchOperator", &["x"], "z", &[])], &[]);
    let all = of(unknown, "Neg").unwrap();
    assert!(all.len() == 1 && waits(&all[0]) && all[0].graph.cases.is_empty());
    let notes = &all[0].report.notes;
    assert!(notes.iter().any(|n| n.contains("cached waits") && n.contains("NoSuchOperator")), "{notes:?}");
    // What both graphs need is refused by its name.
    let error = of(branch(vec![node("Abs", &["x"], "z", &[])], &[]), "NoSuchOperator").unwrap_err();
    assert!(error.to_string().contains("NoSuchOperator"), "{error}");
}
