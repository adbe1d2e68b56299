//! What subgraphs use from outside.

use crate::model::{Graph, Node};
use crate::tensor_data::TensorRef;
use std::collections::BTreeSet;

/// Larger tensors of subgraphs become operands, so that calls stay small.
const LARGE: u64 = 1024;

/// The names of a node's operands, each once: its inputs, then what its subgraphs use from outside.
pub(crate) fn operand_names(node: &Node) -> Vec<String> {
    let mut names = Names::default();
    node.inputs.iter().for_each(|name| names.add(name));
    for graph in node.subgraphs() {
        free_names(graph, &mut names);
    }
    names.order
}

/// What a graph uses and does not define.
pub(crate) fn captured(graph: &Graph) -> Vec<String> {
    let mut names = Names::default();
    free_names(graph, &mut names);
    names.order
}

#[derive(Default)]
struct Names {
    order: Vec<String>,
    seen: BTreeSet<String>,
}

impl Names {
    fn add(&mut self, name: &str) {
        if !name.is_empty() && self.seen.insert(name.to_owned()) {
            self.order.push(name.to_owned());
        }
    }
}

fn defined(graph: &Graph) -> BTreeSet<&str> {
    let inputs = graph.inputs.iter().chain(&graph.defaults).map(|info| info.name.as_str());
    let nodes = graph.nodes.iter().flat_map(|node| &node.outputs).map(String::as_str);
    inputs.chain(graph.initializers.keys().map(String::as_str)).chain(nodes).collect()
}

fn free_names(graph: &Graph, names: &mut Names) {
    let own = defined(graph);
    let mut inner = Names::default();
    for node in &graph.nodes {
        node.inputs.iter().for_each(|name| inner.add(name));
        node.subgraphs().for_each(|graph| free_names(graph, &mut inner));
    }
    graph.outputs.iter().for_each(|output| inner.add(&output.name));
    inner.order.iter().filter(|name| !own.contains(name.as_str())).for_each(|name| names.add(name));
}

/// Takes large tensors out of the subgraphs of a node, which name them afterwards as outer values: those names, which
/// start with `prefix`, and the tensors.
pub(crate) fn lift_initializers(node: &mut Node, prefix: &str) -> Vec<(String, TensorRef)> {
    let mut lifted = Vec::new();
    for graph in node.subgraphs_mut() {
        lift(graph, prefix, &mut lifted);
    }
    lifted
}

fn lift(graph: &mut Graph, prefix: &str, lifted: &mut Vec<(String, TensorRef)>) {
    let large = graph.initializers.iter().filter(|(_, tensor)| tensor.byte_len() > LARGE);
    for name in large.map(|(name, _)| name.clone()).collect::<Vec<_>>() {
        let Some(tensor) = graph.initializers.remove(&name) else { continue };
        let outer = format!("{prefix}/{}/{name}", lifted.len());
        rename(graph, &name, &outer);
        graph.defaults.retain(|info| info.name != name);
        lifted.push((outer, tensor));
    }
    for inner in graph.nodes.iter_mut().flat_map(Node::subgraphs_mut) {
        lift(inner, prefix, lifted);
    }
}

/// Renames an outer value of `graph` where it is used.
fn rename(graph: &mut Graph, from: &str, to: &str) {
    let change = |name: &mut String| {
        if name == from {
            to.clone_into(name);
        }
    };
    for node in &mut graph.nodes {
        node.inputs.iter_mut().for_each(change);
        for inner in node.subgraphs_mut() {
            if !defined(inner).contains(from) {
                rename(inner, from, to);
            }
        }
    }
    graph.outputs.iter_mut().for_each(|output| change(&mut output.name));
}
