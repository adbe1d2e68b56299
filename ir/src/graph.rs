//! Graphs: single-assignment lists of nodes in dependency order, with the facts about dims and state that the
//! importer found.

use crate::border::Border;
use crate::dim::{Bindings, Dim};
use crate::dtype::DType;
use crate::infer::{InferError, infer};
use crate::op::Op;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

/// The type of a value: element type and symbolic shape.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Type {
    pub dtype: DType,
    pub shape: Vec<Dim>,
}

impl Type {
    pub fn new(dtype: DType, shape: Vec<Dim>) -> Type {
        Type { dtype, shape }
    }

    pub fn rank(&self) -> usize {
        self.shape.len()
    }

    /// Number of elements.
    pub fn elements(&self) -> Dim {
        Dim::product(&self.shape)
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shape: Vec<String> = self.shape.iter().map(Dim::to_string).collect();
        write!(f, "{}[{}]", self.dtype, shape.join(", "))
    }
}

/// A value of a graph: the index of the node that makes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ValueId(pub u32);

impl ValueId {
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for ValueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "%{}", self.0)
    }
}

/// An operation applied to earlier values.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    pub op: Op,
    pub args: Vec<ValueId>,
    pub ty: Type,
    /// The ONNX node this came from, for messages; empty if none.
    pub origin: Arc<str>,
}

/// A named result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    pub name: Arc<str>,
    pub value: ValueId,
}

/// A fact about dims that the import relied on; checked against the inputs before every step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guard {
    pub left: Dim,
    pub relation: Relation,
    pub right: Dim,
    /// Where the fact comes from, naming the inputs or the node.
    pub reason: Arc<str>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Relation {
    Equal,
    LessEqual,
}

/// A `past` input and the `present` output that succeeds it: one object that stays on its rank in one layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatePair {
    pub input: Arc<str>,
    pub output: Arc<str>,
    /// The dim that grows.
    pub axis: usize,
}

/// A bool input for one value of which alone a graph is the model: what depends on it was folded away. The input stays
/// among the graph's inputs, and nothing reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    pub input: Arc<str>,
    /// One bool, with or without dims.
    pub ty: Type,
    pub value: bool,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.input, self.value)
    }
}

/// The values a symbol may take, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SymbolRange {
    pub low: i64,
    pub high: i64,
}

/// A graph. Nodes are in dependency order; a node's operands come before it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Graph {
    pub name: String,
    nodes: Vec<Node>,
    pub outputs: Vec<Output>,
    pub guards: Vec<Guard>,
    pub states: Vec<StatePair>,
    /// The inputs whose values the graph is for, in the order of the inputs; a model of one graph has none.
    pub cases: Vec<Case>,
    /// What may be given besides what the types of the inputs say.
    pub borders: Vec<Border>,
    /// Symbols of the inputs and their ranges.
    pub symbols: BTreeMap<Arc<str>, SymbolRange>,
}

impl Graph {
    pub fn new(name: &str) -> Graph {
        Graph { name: name.into(), ..Graph::default() }
    }

    /// Appends a node, inferring its type.
    ///
    /// # Errors
    /// The operation does not apply to operands of these types.
    pub fn add(&mut self, op: Op, args: &[ValueId]) -> Result<ValueId, InferError> {
        let types: Vec<&Type> = args.iter().map(|&a| self.ty(a)).collect();
        let ty = infer(&op, &types)?;
        Ok(self.add_typed(op, args, ty))
    }

    /// Appends a node whose type is known: inputs, and nodes copied from a verified graph.
    pub fn add_typed(&mut self, op: Op, args: &[ValueId], ty: Type) -> ValueId {
        self.push(Node { op, args: args.to_vec(), ty, origin: "".into() })
    }

    /// Appends a node.
    pub fn push(&mut self, node: Node) -> ValueId {
        let id = ValueId(u32::try_from(self.nodes.len()).unwrap_or(u32::MAX));
        self.nodes.push(node);
        id
    }

    /// Appends a graph input.
    pub fn input(&mut self, name: &str, ty: Type) -> ValueId {
        self.add_typed(Op::Input { name: name.into() }, &[], ty)
    }

    pub fn set_origin(&mut self, value: ValueId, origin: &str) {
        self.nodes[value.index()].origin = origin.into();
    }

    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    pub fn node(&self, value: ValueId) -> &Node {
        &self.nodes[value.index()]
    }

    pub fn ty(&self, value: ValueId) -> &Type {
        &self.nodes[value.index()].ty
    }

    /// All values with their nodes, in order.
    pub fn values(&self) -> impl DoubleEndedIterator<Item = (ValueId, &Node)> {
        self.nodes.iter().enumerate().map(|(i, n)| (ValueId(i as u32), n))
    }

    /// The inputs in order: value, name, type.
    pub fn inputs(&self) -> impl Iterator<Item = (ValueId, &Arc<str>, &Type)> {
        self.values().filter_map(|(id, n)| match &n.op {
            Op::Input { name } => Some((id, name, &n.ty)),
            _ => None,
        })
    }

    /// For each value, the nodes that use it, ascending, each once.
    pub fn users(&self) -> Vec<Vec<ValueId>> {
        let mut users = vec![Vec::new(); self.nodes.len()];
        for (id, node) in self.values() {
            for arg in &node.args {
                let list: &mut Vec<ValueId> = &mut users[arg.index()];
                if list.last() != Some(&id) {
                    list.push(id);
                }
            }
        }
        users
    }

    /// Replaces symbols everywhere: types, attributes, guards, ranges stay for symbols that remain.
    pub fn substitute(&mut self, replace: &dyn Fn(&str) -> Option<Dim>) {
        self.rewrite_dims(&|dim| dim.substitute(replace));
        self.symbols.retain(|name, _| replace(name).is_none());
    }

    /// Writes every dim anew: in types, attributes and guards.
    pub fn rewrite_dims(&mut self, rewrite: &dyn Fn(&Dim) -> Dim) {
        let sub = |d: &mut Dim| *d = rewrite(d);
        for node in &mut self.nodes {
            node.ty.shape.iter_mut().for_each(sub);
            node.op.for_each_dim_mut(&sub);
        }
        for guard in &mut self.guards {
            sub(&mut guard.left);
            sub(&mut guard.right);
        }
        for border in &mut self.borders {
            if let Border::Buffer { total, .. } = border {
                sub(total);
            }
        }
    }

    /// The guards that do not hold under `bindings`.
    pub fn broken_guards(&self, bindings: &Bindings) -> Vec<&Guard> {
        self.guards
            .iter()
            .filter(|g| match (g.left.eval(bindings), g.right.eval(bindings)) {
                (Ok(a), Ok(b)) => match g.relation {
                    Relation::Equal => a != b,
                    Relation::LessEqual => a > b,
                },
                _ => true,
            })
            .collect()
    }
}

impl Op {
    /// Visits every dim among the attributes.
    pub fn for_each_dim_mut(&mut self, visit: &dyn Fn(&mut Dim)) {
        use crate::op::Conversion as C;
        match self {
            Op::Size(dim) | Op::TopK { k: dim, .. } => visit(dim),
            Op::Iota { start, length } | Op::Slice { start, length, .. } => {
                visit(start);
                visit(length);
            }
            Op::Broadcast { shape } | Op::Reshape { shape } => shape.iter_mut().for_each(visit),
            Op::Pad { low, high, .. } => low.iter_mut().chain(high).for_each(visit),
            Op::Deferred { ty, .. } => ty.shape.iter_mut().for_each(visit),
            Op::Gather { window: Some(window), .. } => {
                visit(&mut window.start);
                visit(&mut window.extent);
            }
            Op::Convert(conversion) => match conversion {
                C::ShardSlice { unit, .. }
                | C::AllGather { unit, .. }
                | C::ReduceScatter { unit, .. }
                | C::TreeReduce { unit, .. } => visit(unit),
                C::AllToAll { from_unit, to_unit, .. } | C::Redeal { from_unit, to_unit, .. } => {
                    visit(from_unit);
                    visit(to_unit);
                }
                C::OnlyFirst { .. } | C::AllReduce { .. } | C::Transfer => {}
            },
            Op::Gather { window: None, .. }
            | Op::Input { .. }
            | Op::Weight(_)
            | Op::Literal(_)
            | Op::Map(_)
            | Op::Einsum(_)
            | Op::Reduce { .. }
            | Op::Scan { .. }
            | Op::Conv { .. }
            | Op::Pool { .. }
            | Op::Transpose { .. }
            | Op::Concat { .. }
            | Op::GatherElements { .. }
            | Op::GatherNd { .. }
            | Op::ScatterElements { .. }
            | Op::ScatterNd { .. }
            | Op::Dequant { .. }
            | Op::Append { .. }
            | Op::Softmax { .. }
            | Op::Norm { .. }
            | Op::Attention { .. }
            | Op::Rotary { .. } => {}
        }
    }
}
