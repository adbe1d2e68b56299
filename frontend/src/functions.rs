//! Inlining model-local functions.
//!
//! A node whose domain, name and overload are those of a function is replaced by the function's body: parameters
//! become the call's values, attribute references the call's attributes, and every other name of the body gets a
//! prefix that no name in the model has. The size of the result is computed before anything is expanded, because ten
//! small functions that call each other ten times each are ten billion nodes.

use crate::error::{Fault, Faults, domain_name, quote};
use crate::limits::Limits;
use crate::model::{Attribute, AttributeValue, Graph, Node};
use crate::tensor_data::TensorRef;
use std::collections::{BTreeMap, BTreeSet};

/// What identifies a function.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct FunctionKey {
    pub(crate) domain: String,
    pub(crate) name: String,
    pub(crate) overload: String,
}

/// A model-local function.
#[derive(Clone, Debug)]
pub(crate) struct Function {
    pub(crate) key: FunctionKey,
    pub(crate) inputs: Vec<String>,
    pub(crate) outputs: Vec<String>,
    /// Attributes without a default.
    pub(crate) attributes: Vec<String>,
    pub(crate) defaults: Vec<Attribute>,
    pub(crate) nodes: Vec<Node>,
    /// Version of the default domain in the body, for the `Identity` nodes that inlining adds.
    pub(crate) default_opset: i64,
}

type Functions = BTreeMap<FunctionKey, Function>;

impl FunctionKey {
    /// The key a node would call.
    pub(crate) fn of(node: &Node) -> FunctionKey {
        FunctionKey {
            domain: node.domain.clone(),
            name: node.op_type.clone(),
            overload: node.overload.clone(),
        }
    }

    fn text(&self) -> String {
        let overload = if self.overload.is_empty() { String::new() } else { format!(":{}", self.overload) };
        quote(&format!("{}.{}{overload}", domain_name(&self.domain), self.name))
    }
}

/// Sorts functions by key and refuses two of the same.
pub(crate) fn collect(functions: Vec<Function>, faults: &mut Faults) -> Functions {
    let mut out = Functions::new();
    for function in functions {
        check_signature(&function, faults);
        let text = function.key.text();
        if out.insert(function.key.clone(), function).is_some() {
            let message = format!("the function {text} is defined twice");
            faults.push(Fault::invalid(message, "keep one definition, or give them different overloads"));
        }
    }
    out
}

fn check_signature(function: &Function, faults: &mut Faults) {
    let mut refuse = |what: String| {
        let message = format!("the function {} {what}", function.key.text());
        faults.push(Fault::invalid(message, "export the model again"));
    };
    let mut seen = BTreeSet::new();
    for input in &function.inputs {
        if input.is_empty() || !seen.insert(input) {
            refuse(format!("has an empty or repeated input {}", quote(input)));
        }
    }
    if function.key.name.is_empty() || function.outputs.iter().any(String::is_empty) {
        refuse("lacks a name or has an output without one".into());
    }
    let mut seen = BTreeSet::new();
    let defaults = function.defaults.iter().map(|attribute| &attribute.name);
    for attribute in function.attributes.iter().chain(defaults) {
        if !seen.insert(attribute) {
            refuse(format!("declares the attribute {} twice", quote(attribute)));
        }
    }
}

/// Replaces every call in `graph` and its subgraphs. Afterwards no attribute reference is left either.
///
/// # Errors
/// Recursive functions and expansions beyond the limits; faults of single calls go to `faults`.
pub(crate) fn inline(
    graph: &mut Graph,
    functions: &Functions,
    limits: &Limits,
    heap: u64,
    faults: &mut Faults,
) -> Result<(), Fault> {
    check_expansion(graph, functions, limits, heap)?;
    let mut names = BTreeSet::new();
    if !functions.is_empty() {
        collect_names(graph, &mut names);
    }
    let mut inliner = Inliner { functions, names, counter: 0, copies: heap, limits, faults };
    inliner.graph(graph, 0)
}

/// Nodes and an estimate of the bytes of one body after expansion.
#[derive(Clone, Copy, Default)]
struct Size {
    nodes: u64,
    bytes: u64,
    /// Calls within calls below this point.
    depth: usize,
}

impl Size {
    fn add(&mut self, other: Size) {
        self.nodes = self.nodes.saturating_add(other.nodes);
        self.bytes = self.bytes.saturating_add(other.bytes);
        self.depth = self.depth.max(other.depth);
    }
}

/// Bytes that a body's values gain by their prefix.
const PREFIX: u64 = 256;

/// Computes the expanded size of everything, callees first, without recursion: call chains may be long.
fn check_expansion(graph: &Graph, functions: &Functions, limits: &Limits, heap: u64) -> Result<(), Fault> {
    let mut sizes: BTreeMap<&FunctionKey, Size> = BTreeMap::new();
    let mut entered: BTreeSet<&FunctionKey> = BTreeSet::new();
    for start in functions.keys() {
        let mut stack = vec![start];
        while let Some(&key) = stack.last() {
            let Some(function) = functions.get(key) else { break };
            if sizes.contains_key(key) {
                stack.pop();
                continue;
            }
            let calls = callees(&function.nodes, functions);
            let pending: Vec<_> = calls.iter().filter(|call| !sizes.contains_key(**call)).copied().collect();
            if pending.is_empty() {
                sizes.insert(key, size_of_function(function, &sizes));
                entered.remove(key);
                stack.pop();
                continue;
            }
            entered.insert(key);
            if let Some(cycle) = pending.iter().find(|call| entered.contains(**call)) {
                let message = format!("the function {} calls itself", cycle.text());
                return Err(Fault::invalid(message, "ONNX functions must not be recursive"));
            }
            stack.extend(pending);
        }
    }
    let total = size_of_nodes(&graph.nodes, &sizes);
    let too_large = if total.nodes > limits.nodes {
        format!("more than {} nodes", limits.nodes)
    } else if total.bytes > heap {
        format!("more than {} MiB", heap >> 20)
    } else if total.depth > limits.call_depth {
        format!("calls nested more than {} deep", limits.call_depth)
    } else {
        return Ok(());
    };
    let message = format!("inlining the model's functions gives {too_large}");
    Err(Fault::resource(
        message,
        "the functions multiply when they call each other; simplify the model first",
    ))
}

/// The functions called in these nodes and their subgraphs.
fn callees<'a>(nodes: &[Node], functions: &'a Functions) -> BTreeSet<&'a FunctionKey> {
    let mut out = BTreeSet::new();
    let mut work: Vec<&[Node]> = vec![nodes];
    while let Some(nodes) = work.pop() {
        for node in nodes {
            out.extend(functions.get_key_value(&FunctionKey::of(node)).map(|(key, _)| key));
            work.extend(node.subgraphs().map(|graph| graph.nodes.as_slice()));
        }
    }
    out
}

/// A body with everything it calls, and what binding its parameters takes.
fn size_of_function(function: &Function, sizes: &BTreeMap<&FunctionKey, Size>) -> Size {
    let mut size = size_of_nodes(&function.nodes, sizes);
    let attributes = function.attributes.len() + function.defaults.len();
    let names = function.inputs.iter().chain(&function.outputs).map(|name| name.len() as u64 + PREFIX);
    size.bytes = size.bytes.saturating_add(names.sum::<u64>() + 64 * attributes as u64);
    size
}

fn size_of_nodes(nodes: &[Node], sizes: &BTreeMap<&FunctionKey, Size>) -> Size {
    let mut total = Size::default();
    let mut work: Vec<&[Node]> = vec![nodes];
    while let Some(nodes) = work.pop() {
        for node in nodes {
            total.add(Size { nodes: 1, bytes: node_bytes(node), depth: 0 });
            if let Some(mut body) = sizes.get(&FunctionKey::of(node)).copied() {
                body.depth += 1;
                total.add(body);
            }
            work.extend(node.subgraphs().map(|graph| graph.nodes.as_slice()));
        }
    }
    total
}

/// About what a clone of the node takes; subgraphs' nodes are counted on their own.
fn node_bytes(node: &Node) -> u64 {
    let texts = node.inputs.iter().chain(&node.outputs).chain([&node.name, &node.op_type, &node.domain]);
    let texts: u64 = texts.map(|text| text.len() as u64 + 24 + PREFIX).sum();
    let metadata: u64 = node.metadata.iter().map(|(key, value)| (key.len() + value.len() + 64) as u64).sum();
    let attributes: u64 = node.attributes.iter().map(|attribute| attribute_bytes(&attribute.value)).sum();
    size_of::<Node>() as u64 + texts + metadata + attributes
}

fn attribute_bytes(value: &AttributeValue) -> u64 {
    let len = match value {
        AttributeValue::Floats(list) => list.len() * 4,
        AttributeValue::Ints(list) => list.len() * 8,
        AttributeValue::Strings(list) => list.len() * 32,
        AttributeValue::Tensors(list) => list.len() * 256,
        AttributeValue::Types(list) => list.len() * 256,
        AttributeValue::Graph(graph) => graph_own_bytes(graph),
        AttributeValue::Graphs(graphs) => graphs.iter().map(graph_own_bytes).sum(),
        _ => 0,
    };
    (len + size_of::<Attribute>() + 64) as u64
}

fn graph_own_bytes(graph: &Graph) -> usize {
    let values =
        graph.inputs.len() + graph.outputs.len() + graph.initializers.len() + graph.value_types.len();
    size_of::<Graph>() + values * (256 + PREFIX as usize)
}

/// Every value name in the graph and its subgraphs.
fn collect_names(graph: &Graph, names: &mut BTreeSet<String>) {
    names.extend(graph.initializers.keys().cloned());
    names.extend(graph.inputs.iter().chain(&graph.outputs).map(|info| info.name.clone()));
    for node in &graph.nodes {
        names.extend(node.inputs.iter().chain(&node.outputs).cloned());
        for subgraph in node.subgraphs() {
            collect_names(subgraph, names);
        }
    }
}

struct Inliner<'a> {
    functions: &'a Functions,
    /// Every name used so far; new ones must differ.
    names: BTreeSet<String>,
    counter: u64,
    /// Bytes that copies of the calls' attributes and metadata may still take.
    copies: u64,
    limits: &'a Limits,
    faults: &'a mut Faults,
}

/// What the names of a body mean at one call.
struct Scope<'a> {
    prefix: String,
    /// Parameter or local name to name in the caller.
    values: BTreeMap<String, String>,
    attributes: BTreeMap<&'a str, &'a AttributeValue>,
}

impl Inliner<'_> {
    fn graph(&mut self, graph: &mut Graph, depth: usize) -> Result<(), Fault> {
        if depth > self.limits.subgraph_depth {
            let message = format!("graphs are nested more than {} deep", self.limits.subgraph_depth);
            return Err(Fault::resource(message, "flatten the nested If, Loop or Scan bodies"));
        }
        let nodes = std::mem::take(&mut graph.nodes);
        graph.nodes.reserve(nodes.len());
        for node in nodes {
            self.node(node, &mut graph.nodes, depth, 0)?;
        }
        Ok(())
    }

    /// Pushes the node, or the nodes it stands for.
    fn node(&mut self, mut node: Node, out: &mut Vec<Node>, depth: usize, calls: usize) -> Result<(), Fault> {
        let functions = self.functions;
        if functions.is_empty() || !functions.contains_key(&FunctionKey::of(&node)) {
            self.refuse_references(&node);
            for graph in node.subgraphs_mut() {
                self.graph(graph, depth + 1)?;
            }
            out.push(node);
            return Ok(());
        }
        let Some(function) = functions.get(&FunctionKey::of(&node)) else { return Ok(()) };
        if calls > self.limits.call_depth {
            return Err(Fault::resource("functions call each other too deeply", "simplify the model first"));
        }
        self.refuse_references(&node);
        self.check_call(&node, function);
        let mut scope = self.scope(&node, function);
        let mut forwards = self.bind_outputs(&node, function, &mut scope);
        for body in &function.nodes {
            let renamed = self.rename_node(body, &mut scope, &node)?;
            self.node(renamed, out, depth, calls + 1)?;
        }
        out.append(&mut forwards);
        Ok(())
    }

    /// References only make sense in a body, where they have been replaced by now.
    fn refuse_references(&mut self, node: &Node) {
        for attribute in &node.attributes {
            if let AttributeValue::Reference { .. } = attribute.value {
                let message = "the attribute refers to a function's attribute, outside any function";
                let fault = Fault::invalid(message, "give the attribute a value");
                self.faults.push(fault.at_value(&attribute.name).at_node(node.site()));
            }
        }
    }

    fn check_call(&mut self, node: &Node, function: &Function) {
        let arity = |what: &str, given: usize, taken: usize| {
            let message = format!("the function has {taken} {what}, the call gives {given}");
            Fault::invalid(message, "the call does not match the function's definition").at_node(node.site())
        };
        if node.inputs.len() > function.inputs.len() {
            self.faults.push(arity("inputs", node.inputs.len(), function.inputs.len()));
        }
        if node.outputs.len() > function.outputs.len() {
            self.faults.push(arity("outputs", node.outputs.len(), function.outputs.len()));
        }
        let defaults = function.defaults.iter().map(|default| &default.name);
        let declared: BTreeSet<&String> = function.attributes.iter().chain(defaults).collect();
        for attribute in &node.attributes {
            if !declared.contains(&attribute.name) {
                let message = format!("the function has no attribute {}", quote(&attribute.name));
                let help = "the call does not match the function's definition";
                self.faults
                    .push(Fault::invalid(message, help).at_value(&attribute.name).at_node(node.site()));
            }
        }
    }

    fn scope<'a>(&mut self, node: &'a Node, function: &'a Function) -> Scope<'a> {
        self.counter += 1;
        // The call's name reads best, but grows with each level.
        let base = if node.name.is_empty() { &function.key.name } else { &node.name };
        let prefix = if base.len() <= 160 {
            base.clone()
        } else {
            let name: String = function.key.name.chars().take(40).collect();
            format!("{name}#{}", self.counter)
        };
        let given = node.inputs.iter().cloned().chain(std::iter::repeat(String::new()));
        let values = function.inputs.iter().cloned().zip(given).collect();
        let attributes = function
            .defaults
            .iter()
            .chain(&node.attributes)
            .map(|attribute| (attribute.name.as_str(), &attribute.value))
            .collect();
        Scope { prefix, values, attributes }
    }

    /// Lets the body write straight to the call's outputs. Where it cannot (an output that is also an input, or twice
    /// an output), returns `Identity` nodes.
    fn bind_outputs(&mut self, node: &Node, function: &Function, scope: &mut Scope<'_>) -> Vec<Node> {
        let mut forwards = Vec::new();
        for (inner, outer) in function.outputs.iter().zip(&node.outputs) {
            if outer.is_empty() {
                continue;
            }
            match scope.values.get(inner) {
                None => {
                    scope.values.insert(inner.clone(), outer.clone());
                }
                Some(source) => forwards.push(Node {
                    name: format!("{}/{inner}", scope.prefix),
                    op_type: "Identity".into(),
                    opset: function.default_opset.max(1),
                    inputs: vec![source.clone()],
                    outputs: vec![outer.clone()],
                    ..Node::default()
                }),
            }
        }
        forwards
    }

    fn rename_node(&mut self, body: &Node, scope: &mut Scope<'_>, call: &Node) -> Result<Node, Fault> {
        let inherits = body.metadata.is_empty() && !call.metadata.is_empty();
        if inherits {
            self.charge(call.metadata.iter().map(|(key, value)| key.len() + value.len() + 64).sum())?;
        }
        let mut node = Node {
            name: format!(
                "{}/{}",
                scope.prefix,
                if body.name.is_empty() { &body.op_type } else { &body.name }
            ),
            op_type: body.op_type.clone(),
            domain: body.domain.clone(),
            overload: body.overload.clone(),
            opset: body.opset,
            inputs: body.inputs.iter().map(|name| self.local(name, scope)).collect(),
            outputs: body.outputs.iter().map(|name| self.local(name, scope)).collect(),
            attributes: Vec::with_capacity(body.attributes.len()),
            metadata: if inherits { call.metadata.clone() } else { body.metadata.clone() },
            device_configurations: body.device_configurations.clone(),
        };
        for spec in node.device_configurations.iter_mut().flat_map(|c| &mut c.sharding_spec) {
            spec.tensor_name = self.local(&spec.tensor_name, scope);
        }
        for attribute in &body.attributes {
            if let Some(value) = self.attribute(&attribute.name, &attribute.value, scope, call)? {
                node.attributes.push(Attribute { name: attribute.name.clone(), value });
            }
        }
        Ok(node)
    }

    /// Copies multiply along calls, so they are counted as they are made.
    fn charge(&mut self, bytes: usize) -> Result<(), Fault> {
        self.copies = self.copies.checked_sub(bytes as u64).ok_or_else(|| {
            let message = "inlining the model's functions copies attributes beyond the memory limit";
            Fault::resource(message, "simplify the model first")
        })?;
        Ok(())
    }

    /// The attribute as the call has it; a reference to an attribute that is not given is an attribute not given.
    fn attribute(
        &mut self,
        name: &str,
        value: &AttributeValue,
        scope: &mut Scope<'_>,
        call: &Node,
    ) -> Result<Option<AttributeValue>, Fault> {
        Ok(Some(match value {
            AttributeValue::Reference { attribute, expected } => {
                let Some(&given) = scope.attributes.get(attribute.as_str()) else { return Ok(None) };
                let found = given.attribute_type();
                if found != *expected {
                    let message =
                        format!("the function wants this attribute as {expected}, the call gives {found}");
                    let help = "the call does not match the function's definition";
                    self.faults.push(Fault::invalid(message, help).at_value(name).at_node(call.site()));
                }
                if matches!(given, AttributeValue::Graph(_) | AttributeValue::Graphs(_)) {
                    let fault = Fault::unsupported(
                        "functions that take a graph as an attribute are not supported",
                        "inline the function before exporting, e.g. with `onnx.inliner.inline_local_functions`",
                    );
                    return Err(fault.at_value(name).at_node(call.site()));
                }
                self.charge(attribute_bytes(given) as usize)?;
                given.clone()
            }
            AttributeValue::Graph(graph) => {
                AttributeValue::Graph(Box::new(self.rename_graph(graph, scope, call)?))
            }
            AttributeValue::Graphs(graphs) => AttributeValue::Graphs(
                graphs
                    .iter()
                    .map(|graph| self.rename_graph(graph, scope, call))
                    .collect::<Result<_, Fault>>()?,
            ),
            other => other.clone(),
        }))
    }

    /// Names in a subgraph live in a scope of their own on top of the body's.
    fn rename_graph(&mut self, graph: &Graph, outer: &mut Scope<'_>, call: &Node) -> Result<Graph, Fault> {
        let defined: Vec<String> = graph
            .inputs
            .iter()
            .chain(&graph.defaults)
            .map(|info| &info.name)
            .chain(graph.initializers.keys())
            .chain(graph.nodes.iter().flat_map(|node| &node.outputs))
            .filter(|name| !name.is_empty())
            .cloned()
            .collect();
        let mut hidden = Vec::new();
        for name in defined {
            let fresh = self.fresh(&outer.prefix, &name);
            let previous = outer.values.insert(name.clone(), fresh);
            hidden.push((name, previous));
        }
        let mut out = Graph {
            name: graph.name.clone(),
            nodes: Vec::with_capacity(graph.nodes.len()),
            inputs: graph.inputs.clone(),
            defaults: graph.defaults.clone(),
            outputs: graph.outputs.clone(),
            initializers: BTreeMap::new(),
            value_types: BTreeMap::new(),
            metadata: graph.metadata.clone(),
        };
        for info in out.inputs.iter_mut().chain(&mut out.defaults).chain(&mut out.outputs) {
            info.name = self.local(&info.name, outer);
        }
        for (name, tensor) in &graph.initializers {
            let name = self.local(name, outer);
            out.initializers.insert(name.clone(), TensorRef { name, ..tensor.clone() });
        }
        for (name, declared) in &graph.value_types {
            out.value_types.insert(self.local(name, outer), declared.clone());
        }
        for node in &graph.nodes {
            let renamed = self.rename_node(node, outer, call)?;
            out.nodes.push(renamed);
        }
        for (name, previous) in hidden.into_iter().rev() {
            match previous {
                Some(previous) => outer.values.insert(name, previous),
                None => outer.values.remove(&name),
            };
        }
        Ok(out)
    }

    /// What a name of the body is called in the caller. A name the body does not define gets a fresh one as well, so
    /// that it stays undefined instead of capturing a value of the caller.
    fn local(&mut self, name: &str, scope: &mut Scope<'_>) -> String {
        if name.is_empty() {
            return String::new();
        }
        if let Some(known) = scope.values.get(name) {
            return known.clone();
        }
        let fresh = self.fresh(&scope.prefix, name);
        scope.values.insert(name.to_owned(), fresh.clone());
        fresh
    }

    fn fresh(&mut self, prefix: &str, name: &str) -> String {
        let mut fresh = format!("{prefix}/{name}");
        while !self.names.insert(fresh.clone()) {
            self.counter += 1;
            fresh = format!("{prefix}/{name}#{}", self.counter);
        }
        fresh
    }
}
