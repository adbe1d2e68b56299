//! What must hold before any operator is looked at: every name is defined once, every use has a definition, and the
//! nodes can be put in order.
//!
//! ONNX asks for sorted nodes; files that are not sorted but could be are accepted and sorted here, stably (of the nodes
//! that are ready the one that comes first in the file is next). A control flow node depends on what its bodies
//! capture. Nothing here recurses over the length of a graph, only over the nesting of bodies, which loading bounds.

use crate::error::{Fault, Faults, quote};
use crate::model::{Dim, Graph, Node, TensorType, ValueInfo, ValueType};
use crate::tensor_data::TensorRef;
use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, HashMap};

/// Nodes shown of a cycle.
const CYCLE_SHOWN: usize = 6;

const AGAIN: &str = "the model breaks the ONNX format; export it again";

/// Validates and sorts the main graph and everything in it.
pub(crate) fn check(graph: &mut Graph, faults: &mut Faults) {
    check_interface(graph, faults);
    check_graph(graph, None, faults);
}

/// Who makes a value.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Maker {
    Input,
    Initializer,
    Node(usize),
}

/// The names visible in the graphs around one.
struct Around<'a> {
    names: &'a HashMap<String, Maker>,
    parent: Option<&'a Around<'a>>,
}

impl Around<'_> {
    fn contains(&self, name: &str) -> bool {
        self.names.contains_key(name) || self.parent.is_some_and(|parent| parent.contains(name))
    }
}

/// What holds for the main graph only.
fn check_interface(graph: &Graph, faults: &mut Faults) {
    if graph.outputs.is_empty() {
        faults.push(Fault::invalid(
            "the graph has no outputs",
            "export the model again with its results as outputs",
        ));
    }
    let mut seen = BTreeSet::new();
    for output in &graph.outputs {
        if !seen.insert(&output.name) {
            let fault = Fault::invalid("the graph output is listed twice", "list each output once");
            faults.push(fault.at_value(&output.name));
        }
    }
    for input in graph.inputs.iter().chain(&graph.defaults) {
        match &input.value_type {
            None => {
                let fault =
                    Fault::invalid("the graph input has no type", "declare its element type and shape");
                faults.push(fault.at_value(&input.name));
            }
            Some(ValueType::Tensor(tensor)) if !addressable(tensor) => {
                let message = format!("the graph input {tensor} has more elements than can be addressed");
                faults.push(
                    Fault::invalid(message, "declare the sizes that are really used").at_value(&input.name),
                );
            }
            Some(_) => {}
        }
    }
    for input in &graph.defaults {
        if let (Some(declared), Some(tensor)) = (input.tensor_type(), graph.initializers.get(&input.name))
            && !declares(declared, tensor)
        {
            let message = format!(
                "the graph input is declared as {declared}, its initializer is {}{:?}",
                tensor.dtype, tensor.dims
            );
            faults.push(Fault::invalid(message, AGAIN).at_value(&input.name));
        }
    }
}

/// Whether the known dims give a count that fits; unknown ones count as one.
fn addressable(tensor: &TensorType) -> bool {
    let known = tensor.shape.iter().flatten().filter_map(|dim| match dim {
        Dim::Known(size) => Some(*size),
        Dim::Symbol(_) | Dim::Unknown => None,
    });
    let mut known = known.clone().any(|size| size == 0).then_some(0).into_iter().chain(known);
    let count = known.try_fold(1u64, |count, size| count.checked_mul(size));
    count.and_then(|count| tensor.dtype.byte_len(count)).is_some_and(|bytes| i64::try_from(bytes).is_ok())
}

fn declares(declared: &TensorType, tensor: &TensorRef) -> bool {
    let fits = |(declared, actual): (&Dim, &u64)| match declared {
        Dim::Known(size) => size == actual,
        Dim::Symbol(_) | Dim::Unknown => true,
    };
    declared.dtype == tensor.dtype
        && declared
            .shape
            .as_ref()
            .is_none_or(|shape| shape.len() == tensor.dims.len() && shape.iter().zip(&tensor.dims).all(fits))
}

/// Checks and sorts one graph; returns the names it takes from the graphs around it.
fn check_graph(graph: &mut Graph, around: Option<&Around<'_>>, faults: &mut Faults) -> BTreeSet<String> {
    keep_last_constants(graph);
    let makers = makers(graph, faults);
    let mut captured = BTreeSet::new();
    let mut needs = Vec::with_capacity(graph.nodes.len());
    for node in &mut graph.nodes {
        needs.push(node_needs(node, &makers, around, &mut captured, faults));
    }
    for output in &graph.outputs {
        if output.name.is_empty() || makers.contains_key(&output.name) {
            continue;
        }
        if around.is_some_and(|around| around.contains(&output.name)) {
            captured.insert(output.name.clone());
        } else {
            let fault = Fault::invalid("nothing makes this graph output", AGAIN);
            faults.push(fault.at_value(&output.name));
        }
    }
    match order(&needs) {
        Ok(order) => reorder(&mut graph.nodes, &order),
        Err(cycle) => faults.push(cycle_fault(graph, &cycle)),
    }
    captured
}

/// Of constants that share a name the last one stands, as in ONNX Runtime: tools that append constants to models leave
/// earlier ones of the same name in.
fn keep_last_constants(graph: &mut Graph) {
    let name = |node: &Node| match node.outputs.as_slice() {
        [name] if node.op_type == "Constant" && node.domain.is_empty() && !name.is_empty() => {
            Some(name.clone())
        }
        _ => None,
    };
    let mut seen = BTreeSet::new();
    let last: Vec<bool> =
        graph.nodes.iter().rev().map(|node| name(node).is_none_or(|name| seen.insert(name))).collect();
    let mut last = last.into_iter().rev();
    graph.nodes.retain(|_| last.next().unwrap_or(true));
}

/// Every name the graph defines, with its maker. Reports names that are empty or defined twice.
fn makers(graph: &Graph, faults: &mut Faults) -> HashMap<String, Maker> {
    let mut makers = HashMap::with_capacity(graph.nodes.len() + graph.initializers.len());
    makers.extend(graph.initializers.keys().map(|name| (name.clone(), Maker::Initializer)));
    // An input that is an initializer too is the initializer; two inputs of one name are a fault all the same.
    let mut defaults = BTreeSet::new();
    for ValueInfo { name, .. } in graph.inputs.iter().chain(&graph.defaults) {
        let again = match makers.get(name) {
            Some(Maker::Initializer) => !defaults.insert(name),
            Some(_) => true,
            None => makers.insert(name.clone(), Maker::Input).is_some(),
        };
        if again {
            faults.push(Fault::invalid("two graph inputs have this name", AGAIN).at_value(name));
        }
    }
    if graph.inputs.iter().chain(&graph.outputs).any(|info| info.name.is_empty()) {
        faults.push(Fault::invalid("a graph input or output has no name", AGAIN));
    }
    for (index, node) in graph.nodes.iter().enumerate() {
        for name in node.outputs.iter().filter(|name| !name.is_empty()) {
            if let Some(other) = makers.insert(name.clone(), Maker::Node(index)) {
                let what = match other {
                    Maker::Input => "is a graph input already",
                    Maker::Initializer => "is an initializer already",
                    Maker::Node(other) if other == index => "is given twice by this node",
                    Maker::Node(_) => "is made by another node already",
                };
                let fault = Fault::invalid(format!("the node's output {} {what}", quote(name)), AGAIN);
                faults.push(fault.at_node(node.site()));
            }
        }
    }
    makers
}

/// The nodes of this graph that `node` must come after. What its bodies need from further out goes to `captured`.
fn node_needs(
    node: &mut Node,
    makers: &HashMap<String, Maker>,
    around: Option<&Around<'_>>,
    captured: &mut BTreeSet<String>,
    faults: &mut Faults,
) -> Vec<usize> {
    let mut needs = Vec::new();
    let here = Around { names: makers, parent: around };
    for name in node.inputs.iter().filter(|name| !name.is_empty()) {
        match makers.get(name) {
            Some(Maker::Node(index)) => needs.push(*index),
            Some(_) => {}
            None if here.contains(name) => {
                captured.insert(name.clone());
            }
            None => {
                let message = format!("nothing makes the node's input {}", quote(name));
                faults.push(Fault::invalid(message, AGAIN).at_node(node.site()));
            }
        }
    }
    // What an If without outputs does, nobody sees.
    if node.op_type == "If"
        && node.domain.is_empty()
        && !node.outputs.is_empty()
        && let Some(branch) = node.subgraphs().find(|branch| branch.outputs.len() != node.outputs.len())
    {
        let (made, named) = (branch.outputs.len(), node.outputs.len());
        let message = format!("a branch makes {made} values, and the If names {named} outputs");
        faults.push(Fault::invalid(message, AGAIN).at_node(node.site()));
    }
    let mut inner = BTreeSet::new();
    for graph in node.subgraphs_mut() {
        inner.append(&mut check_graph(graph, Some(&here), faults));
    }
    for name in inner {
        match makers.get(&name) {
            Some(Maker::Node(index)) => needs.push(*index),
            Some(_) => {}
            None => {
                captured.insert(name);
            }
        }
    }
    needs
}

/// A topological order of `0..needs.len()`, lowest index first among the ready; or one cycle.
fn order(needs: &[Vec<usize>]) -> Result<Vec<usize>, Vec<usize>> {
    let mut waiting: Vec<usize> = needs.iter().map(Vec::len).collect();
    let mut users: Vec<Vec<usize>> = vec![Vec::new(); needs.len()];
    for (node, needed) in needs.iter().enumerate() {
        for &need in needed {
            users[need].push(node);
        }
    }
    let mut ready: BinaryHeap<Reverse<usize>> =
        (0..needs.len()).filter(|&node| waiting[node] == 0).map(Reverse).collect();
    let mut order = Vec::with_capacity(needs.len());
    while let Some(Reverse(node)) = ready.pop() {
        order.push(node);
        for &user in &users[node] {
            waiting[user] -= 1;
            if waiting[user] == 0 {
                ready.push(Reverse(user));
            }
        }
    }
    if order.len() == needs.len() { Ok(order) } else { Err(find_cycle(needs, &waiting)) }
}

/// Follows unmet needs until a node comes again. Every node still waiting has one.
fn find_cycle(needs: &[Vec<usize>], waiting: &[usize]) -> Vec<usize> {
    let mut path = Vec::new();
    let mut position = HashMap::new();
    let mut at = waiting.iter().position(|&count| count > 0);
    while let Some(node) = at {
        if let Some(&start) = position.get(&node) {
            path.drain(..start);
            path.reverse();
            return path;
        }
        position.insert(node, path.len());
        path.push(node);
        at = needs[node].iter().copied().find(|&need| waiting[need] > 0);
    }
    path
}

fn cycle_fault(graph: &Graph, cycle: &[usize]) -> Fault {
    let names: Vec<String> = cycle
        .iter()
        .take(CYCLE_SHOWN)
        .filter_map(|&index| graph.nodes.get(index))
        .map(|node| quote(if node.name.is_empty() { node.output(0).unwrap_or("") } else { &node.name }))
        .collect();
    let more = if cycle.len() > CYCLE_SHOWN { " → …" } else { "" };
    let message = format!("the graph has a cycle of {} nodes: {}{more}", cycle.len(), names.join(" → "));
    Fault::invalid(message, AGAIN)
}

/// Moves each node to its place; files are sorted already more often than not.
fn reorder(nodes: &mut Vec<Node>, order: &[usize]) {
    if order.is_sorted() {
        return;
    }
    let mut old: Vec<Option<Node>> = std::mem::take(nodes).into_iter().map(Some).collect();
    nodes.extend(order.iter().filter_map(|&index| old.get_mut(index).and_then(Option::take)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Attribute, AttributeValue};
    use tpshard_ir::DType;

    fn node(name: &str, inputs: &[&str], outputs: &[&str]) -> Node {
        Node {
            name: name.into(),
            op_type: "Op".into(),
            opset: 20,
            inputs: inputs.iter().map(|s| (*s).into()).collect(),
            outputs: outputs.iter().map(|s| (*s).into()).collect(),
            ..Node::default()
        }
    }

    fn value(name: &str) -> ValueInfo {
        let tensor = TensorType { dtype: DType::F32, shape: Some(vec![Dim::Known(2)]) };
        ValueInfo {
            name: name.into(),
            value_type: Some(ValueType::Tensor(tensor)),
            metadata: Default::default(),
        }
    }

    fn graph(inputs: &[&str], nodes: Vec<Node>, outputs: &[&str]) -> Graph {
        Graph {
            nodes,
            inputs: inputs.iter().map(|name| value(name)).collect(),
            outputs: outputs.iter().map(|name| value(name)).collect(),
            ..Graph::default()
        }
    }

    fn checked(mut graph: Graph) -> Result<Vec<String>, String> {
        let mut faults = Faults::default();
        check(&mut graph, &mut faults);
        faults.finish("m").map_err(|error| error.to_string())?;
        Ok(graph.nodes.into_iter().map(|node| node.name).collect())
    }

    fn refused(graph: Graph) -> String {
        checked(graph).unwrap_err()
    }

    #[test]
    fn unsorted_nodes_are_sorted_stably() {
        let nodes = vec![
            node("c", &["b"], &["c"]),
            node("z", &["x"], &["z"]),
            node("b", &["a"], &["b"]),
            node("a", &["x"], &["a"]),
        ];
        assert_eq!(checked(graph(&["x"], nodes, &["c", "z"])).unwrap(), ["z", "a", "b", "c"]);
    }

    #[test]
    fn bodies_order_what_they_capture() {
        let inner = graph(&[], vec![node("i", &["late", "x"], &["o"])], &["o"]);
        let mut branch = node("if", &["x"], &["y"]);
        branch.attributes =
            vec![Attribute { name: "then_branch".into(), value: AttributeValue::Graph(Box::new(inner)) }];
        let nodes = vec![branch, node("late", &["x"], &["late"])];
        assert_eq!(checked(graph(&["x"], nodes, &["y"])).unwrap(), ["late", "if"]);
    }

    #[test]
    fn a_body_cannot_capture_what_its_own_node_makes() {
        let inner = graph(&[], vec![node("i", &["y"], &["o"])], &["o"]);
        let mut branch = node("if", &["x"], &["y"]);
        branch.attributes =
            vec![Attribute { name: "then_branch".into(), value: AttributeValue::Graph(Box::new(inner)) }];
        assert!(refused(graph(&["x"], vec![branch], &["y"])).contains("cycle of 1 nodes: `if`"));
    }

    #[test]
    fn an_if_names_as_many_outputs_as_its_branches_make() {
        let inner = graph(&[], vec![node("i", &["x"], &["o"])], &["o"]);
        let mut branch = node("if", &["x"], &["y", "z"]);
        branch.op_type = "If".into();
        branch.attributes =
            vec![Attribute { name: "then_branch".into(), value: AttributeValue::Graph(Box::new(inner)) }];
        let fault = refused(graph(&["x"], vec![branch], &["y"]));
        assert!(fault.contains("`if`") && fault.contains("makes 1 values"), "{fault}");
    }

    #[test]
    fn names_must_be_defined_once_and_exist() {
        let twice = vec![node("a", &["x"], &["y"]), node("b", &["x"], &["y"])];
        assert!(refused(graph(&["x"], twice, &["y"])).contains("made by another node already"));
        let input = vec![node("a", &["x"], &["x"])];
        assert!(refused(graph(&["x"], input, &["x"])).contains("is a graph input already"));
        let missing = vec![node("a", &["none"], &["y"])];
        assert!(refused(graph(&["x"], missing, &["y"])).contains("nothing makes the node's input `none`"));
        assert!(refused(graph(&["x", "x"], vec![], &["x"])).contains("two graph inputs"));
        assert!(refused(graph(&["x"], vec![], &["x", "x"])).contains("listed twice"));
        assert!(refused(graph(&["x"], vec![], &["y"])).contains("nothing makes this graph output"));
        assert!(refused(graph(&["x"], vec![], &[])).contains("no outputs"));
        assert!(refused(graph(&[""], vec![], &[""])).contains("has no name"));
    }

    #[test]
    fn several_faults_come_together() {
        let nodes = vec![node("a", &["p"], &["y"]), node("b", &["q"], &["y"])];
        let text = refused(graph(&["x"], nodes, &["z"]));
        for part in ["`p`", "`q`", "already", "graph output"] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn inputs_need_a_type_that_can_exist() {
        let mut untyped = graph(&["x"], vec![], &["x"]);
        untyped.inputs[0].value_type = None;
        assert!(refused(untyped).contains("no type"));
        let mut huge = graph(&["x"], vec![], &["x"]);
        let shape = |dims: &[u64]| {
            let dims = dims.iter().map(|&dim| Dim::Known(dim)).collect();
            Some(ValueType::Tensor(TensorType { dtype: DType::F32, shape: Some(dims) }))
        };
        huge.inputs[0].value_type = shape(&[1 << 40, 1 << 40]);
        assert!(refused(huge.clone()).contains("more elements than can be addressed"));
        huge.inputs[0].value_type = shape(&[1 << 40, 1 << 40, 0]);
        checked(huge).unwrap();
    }

    #[test]
    fn a_default_must_match_its_declaration() {
        let mut model = graph(&[], vec![], &["w"]);
        let source = crate::tensor_data::TensorSource::Inline(vec![0; 12].into());
        let tensor = TensorRef { name: "w".into(), dtype: DType::F32, dims: vec![3], source };
        model.initializers.insert("w".into(), tensor);
        model.defaults.push(value("w"));
        assert!(refused(model.clone()).contains("declared as f32[2], its initializer is f32[3]"));
        model.defaults.clear();
        checked(model).unwrap();
    }

    #[test]
    fn long_chains_and_long_cycles_need_no_stack() {
        let count = 200_000;
        let chain = |first: &str| {
            let mut nodes = vec![node("n0", &[first], &["v0"])];
            nodes.extend((1..count).map(|i| {
                let (from, to) = (format!("v{}", i - 1), format!("v{i}"));
                node(&format!("n{i}"), &[from.as_str()], &[to.as_str()])
            }));
            nodes.reverse();
            nodes
        };
        let last = format!("v{}", count - 1);
        assert_eq!(checked(graph(&["x"], chain("x"), &[&last])).unwrap().len(), count);
        let text = refused(graph(&["x"], chain(&last), &[&last]));
        assert!(text.contains("cycle of 200000 nodes") && text.contains('…'), "{text}");
    }
}
