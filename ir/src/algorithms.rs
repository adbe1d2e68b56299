//! Graph algorithms over values, with petgraph's names: an edge runs from an operand to its user.

use crate::graph::{Graph, ValueId};
use crate::op::Op;
use crate::text::quote;
use petgraph::algo::dominators::{Dominators, simple_fast};
use petgraph::algo::toposort;
use petgraph::graph::{DiGraph, NodeIndex};
use std::collections::BTreeSet;

/// The graph as petgraph sees it; node `i` is value `i`. Operands that do not exist are left out.
pub fn flow(graph: &Graph) -> DiGraph<ValueId, ()> {
    let mut flow = DiGraph::with_capacity(graph.len(), graph.len() * 2);
    for (value, _) in graph.values() {
        flow.add_node(value);
    }
    for (value, node) in graph.values() {
        for arg in node.args.iter().filter(|arg| arg.index() < graph.len()) {
            flow.update_edge(NodeIndex::new(arg.index()), NodeIndex::new(value.index()), ());
        }
    }
    flow
}

/// The values in an order in which operands come before users, the earliest value first where there is a choice not made
/// by petgraph's depth-first search; `None` if the graph has a cycle.
pub fn topological_order(graph: &Graph) -> Option<Vec<ValueId>> {
    let order = toposort(&flow(graph), None).ok()?;
    Some(order.into_iter().map(|node| ValueId(node.index() as u32)).collect())
}

/// The values that `roots` depend on, `roots` included.
pub fn reachable_from_outputs(graph: &Graph, roots: impl IntoIterator<Item = ValueId>) -> BTreeSet<ValueId> {
    let mut seen = BTreeSet::new();
    let mut open: Vec<ValueId> = roots.into_iter().filter(|root| root.index() < graph.len()).collect();
    while let Some(value) = open.pop() {
        if seen.insert(value) {
            open.extend(graph.node(value).args.iter().filter(|arg| arg.index() < graph.len()));
        }
    }
    seen
}

/// Which values every path from the data to a value runs through: data flows from an added source (the last node) into
/// every leaf that holds data and is not `free`.
pub fn dominators(graph: &Graph, free: &BTreeSet<ValueId>) -> Dominators<NodeIndex> {
    let mut flow = live_flow(graph, free);
    let source = flow.add_node(ValueId(u32::MAX));
    add_sources(graph, free, &mut flow, source);
    simple_fast(&flow, source)
}

/// Without edges out of free values, and without what no output needs.
fn live_flow(graph: &Graph, free: &BTreeSet<ValueId>) -> DiGraph<ValueId, ()> {
    let live = reachable_from_outputs(graph, graph.outputs.iter().map(|output| output.value));
    let mut flow = flow(graph);
    flow.retain_edges(|flow, edge| {
        flow.edge_endpoints(edge).is_some_and(|(from, to)| {
            let [from, to] = [from, to].map(|node| ValueId(node.index() as u32));
            live.contains(&to) && !free.contains(&from)
        })
    });
    flow
}

/// Sizes and literals are known everywhere; inputs and weights are data.
fn add_sources(graph: &Graph, free: &BTreeSet<ValueId>, flow: &mut DiGraph<ValueId, ()>, source: NodeIndex) {
    let live = reachable_from_outputs(graph, graph.outputs.iter().map(|output| output.value));
    for value in live.difference(free) {
        if matches!(graph.node(*value).op, Op::Input { .. } | Op::Weight(_)) {
            flow.add_edge(source, NodeIndex::new(value.index()), ());
        }
    }
}

/// The values, ascending, through which every path from data to an output runs: cutting the graph there leaves two parts
/// that share this value and free values only. Leaves that hold data (inputs, weights) start paths unless they are in
/// `free`; so a caller that wants the residual stream of a model passes its weights as free.
pub fn cut_vertices(graph: &Graph, free: &BTreeSet<ValueId>) -> Vec<ValueId> {
    let mut flow = live_flow(graph, free);
    let (source, sink) = (flow.add_node(ValueId(u32::MAX)), flow.add_node(ValueId(u32::MAX)));
    add_sources(graph, free, &mut flow, source);
    for output in graph.outputs.iter().filter(|output| output.value.index() < graph.len()) {
        if !free.contains(&output.value) {
            flow.update_edge(NodeIndex::new(output.value.index()), sink, ());
        }
    }
    let dominators = simple_fast(&flow, source);
    let Some(path) = dominators.strict_dominators(sink) else { return Vec::new() };
    let mut cuts: Vec<ValueId> =
        path.filter(|&node| node != source).map(|node| ValueId(node.index() as u32)).collect();
    cuts.sort();
    cuts
}

/// The graph for Graphviz: one box per value with its operation and type.
pub fn dot(graph: &Graph) -> String {
    let mut text = format!("digraph {} {{\n  node [shape=box];\n", quote(&graph.name));
    for (value, node) in graph.values() {
        let label = quote(&format!("{value} {} : {}", node.op.name(), node.ty));
        text.push_str(&format!("  v{} [label={label}];\n", value.0));
        for arg in &node.args {
            text.push_str(&format!("  v{} -> v{};\n", arg.0, value.0));
        }
    }
    for (i, output) in graph.outputs.iter().enumerate() {
        text.push_str(&format!("  out{i} [label={}, shape=plaintext];\n", quote(&output.name)));
        text.push_str(&format!("  v{} -> out{i};\n", output.value.0));
    }
    text.push_str("}\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;
    use crate::graph::{Output, Type};
    use crate::op::Scalar;

    /// `y = tanh(h + exp(h))` with `h = neg(x * w)`, and a value nobody needs.
    fn diamond() -> (Graph, [ValueId; 7]) {
        let mut graph = Graph::new("d\"");
        let ty = Type::new(DType::F32, vec![4i64.into()]);
        let x = graph.input("x", ty.clone());
        let w = graph.input("w", ty);
        let product = graph.add(Op::Map(Scalar::Mul), &[x, w]).unwrap();
        let h = graph.add(Op::Map(Scalar::Neg), &[product]).unwrap();
        let exponential = graph.add(Op::Map(Scalar::Exp), &[h]).unwrap();
        graph.add(Op::Map(Scalar::Abs), &[x]).unwrap();
        let sum = graph.add(Op::Map(Scalar::Add), &[h, exponential]).unwrap();
        let y = graph.add(Op::Map(Scalar::Tanh), &[sum]).unwrap();
        graph.outputs.push(Output { name: "y".into(), value: y });
        (graph, [x, w, product, h, exponential, sum, y])
    }

    #[test]
    fn cuts_are_where_all_data_passes() {
        let (graph, [x, w, product, h, _, sum, y]) = diamond();
        assert_eq!(cut_vertices(&graph, &BTreeSet::new()), [product, h, sum, y]);
        assert_eq!(cut_vertices(&graph, &BTreeSet::from([w])), [x, product, h, sum, y]);
        assert_eq!(cut_vertices(&graph, &BTreeSet::from([x, w])), []);
        assert_eq!(cut_vertices(&Graph::new(""), &BTreeSet::new()), []);
        let found = dominators(&graph, &BTreeSet::new());
        let above = found.immediate_dominator(NodeIndex::new(sum.index()));
        assert_eq!(above, Some(NodeIndex::new(h.index())));
    }

    #[test]
    fn orders_and_reachability_follow_operands() {
        let (graph, [x, w, product, ..]) = diamond();
        let order = topological_order(&graph).unwrap();
        let at = |value: ValueId| order.iter().position(|&v| v == value).unwrap();
        assert_eq!(order.len(), graph.len());
        for (value, node) in graph.values() {
            assert!(node.args.iter().all(|&arg| at(arg) < at(value)));
        }
        assert_eq!(reachable_from_outputs(&graph, [product]), BTreeSet::from([x, w, product]));
        assert!(dot(&graph).contains("v3 [label=\"%3 neg : f32[4]\"];"));
        assert!(dot(&graph).starts_with("digraph \"d\\\"\" {"));
    }
}
