//! Logical equalities of one segment.
//!
//! * `decompose`: a composite equals its primitives (`tpshard_ir::decompose`).
//! * `scale-einsum`: `s · einsum(a, b) = einsum(s · a, b)` for a single number `s`, if `a` is smaller than the result.

use egg::{
    Analysis, Applier, DidMerge, EGraph, Id, Language, PatternAst, Rewrite, Runner, SearchMatches, Searcher,
    SimpleScheduler, Subst, Symbol, Var,
};
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tpshard_ir::{Graph, Op, Scalar, Type, ValueId, decompose};

/// Most e-nodes per segment.
const NODES: usize = 20_000;
/// Most rounds per segment.
const ROUNDS: usize = 12;

/// A logical operation, or a value from outside the segment.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Head {
    Outside(u32),
    Op(Op),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Node {
    head: Arc<Head>,
    ty: Type,
    children: Vec<Id>,
}

impl Language for Node {
    type Discriminant = Arc<Head>;

    fn discriminant(&self) -> Arc<Head> {
        self.head.clone()
    }

    fn matches(&self, other: &Node) -> bool {
        self.head == other.head && self.ty == other.ty && self.children.len() == other.children.len()
    }

    fn children(&self) -> &[Id] {
        &self.children
    }

    fn children_mut(&mut self) -> &mut [Id] {
        &mut self.children
    }
}

/// The type of a class; and a log of what rules did.
#[derive(Clone, Default)]
struct Types {
    /// Rule, class, and the node it was found to hold, too.
    applied: Vec<(&'static str, Id, Node)>,
}

impl Analysis<Node> for Types {
    type Data = Type;

    fn make(_: &mut EGraph<Node, Types>, node: &Node, _: Id) -> Type {
        node.ty.clone()
    }

    fn merge(&mut self, known: &mut Type, other: Type) -> DidMerge {
        debug_assert_eq!(*known, other, "a rule equated values of different types");
        DidMerge(false, false)
    }
}

type Logic = EGraph<Node, Types>;

/// What a rule says about one operation of a class: the other form, over the classes of its operands.
type Form = (Graph, Vec<ValueId>, ValueId);

/// Finds another form of an operation, and the classes its inputs stand for.
type Finding = fn(&Logic, &Node) -> Option<(Form, Vec<Id>)>;

struct Rule {
    name: &'static str,
    form: Finding,
}

const RULES: [Rule; 2] =
    [Rule { name: "decompose", form: opened }, Rule { name: "scale-einsum", form: scaled }];

/// The primitives of a composite.
fn opened(logic: &Logic, node: &Node) -> Option<(Form, Vec<Id>)> {
    let Head::Op(op) = &*node.head else { return None };
    // A rotation opened gives no layout that it does not have whole: its pairs cannot be parted.
    if !op.is_composite() || matches!(op, Op::Rotary { .. }) {
        return None;
    }
    let (mut graph, inputs) = operands(logic, &node.children);
    let whole = graph.add_typed(op.clone(), &inputs, node.ty.clone());
    let root = decompose(&mut graph, whole).ok().flatten()?;
    Some(((graph, inputs, root), node.children.clone()))
}

/// `s · einsum(a, b)` as `einsum(s · a, b)`.
fn scaled(logic: &Logic, node: &Node) -> Option<(Form, Vec<Id>)> {
    let Head::Op(Op::Map(Scalar::Mul)) = &*node.head else { return None };
    let &[left, right] = node.children.as_slice() else { return None };
    for (product, scale) in [(left, right), (right, left)] {
        let single = logic[scale].data.shape.iter().all(|d| d.is_one());
        if !single || logic[scale].data.rank() > 0 || logic[product].data.dtype != node.ty.dtype {
            continue;
        }
        for inner in &logic[product].nodes {
            let (Head::Op(Op::Einsum(spec)), &[a, b]) = (&*inner.head, inner.children.as_slice()) else {
                continue;
            };
            let smaller = logic[a].data.elements().compare(&node.ty.elements()) == Some(Ordering::Less);
            if !smaller {
                continue;
            }
            let children = vec![a, b, scale];
            let (mut graph, inputs) = operands(logic, &children);
            let moved = graph.add(Op::Map(Scalar::Mul), &[*inputs.first()?, *inputs.get(2)?]).ok()?;
            let root = graph.add(Op::Einsum(spec.clone()), &[moved, *inputs.get(1)?]).ok()?;
            return (*graph.ty(root) == node.ty).then_some(((graph, inputs, root), children));
        }
    }
    None
}

/// A graph whose inputs stand for classes.
fn operands(logic: &Logic, classes: &[Id]) -> (Graph, Vec<ValueId>) {
    let mut graph = Graph::new("form");
    let inputs = classes
        .iter()
        .enumerate()
        .map(|(i, &c)| graph.input(&i.to_string(), logic[c].data.clone()))
        .collect();
    (graph, inputs)
}

struct Finder(&'static Rule);
struct Adder(&'static Rule);

impl Searcher<Node, Types> for Finder {
    fn search_eclass_with_limit(
        &self,
        logic: &Logic,
        class: Id,
        _: usize,
    ) -> Option<SearchMatches<'_, Node>> {
        let found = logic[class].nodes.iter().any(|node| (self.0.form)(logic, node).is_some());
        found.then(|| SearchMatches { eclass: class, substs: vec![Subst::default()], ast: None })
    }

    fn vars(&self) -> Vec<Var> {
        vec![]
    }
}

impl Applier<Node, Types> for Adder {
    fn apply_one(
        &self,
        logic: &mut Logic,
        class: Id,
        _: &Subst,
        _: Option<&PatternAst<Node>>,
        rule: Symbol,
    ) -> Vec<Id> {
        let mut changed = Vec::new();
        for node in logic[class].nodes.clone() {
            let Some(((graph, inputs, root), classes)) = (self.0.form)(logic, &node) else { continue };
            let Some((root, node)) = add_form(logic, &graph, &inputs, root, &classes) else { continue };
            if logic.union_trusted(class, root, rule) {
                logic.analysis.applied.push((self.0.name, class, node));
                changed.push(root);
            }
        }
        changed
    }
}

fn add_form(
    logic: &mut Logic,
    graph: &Graph,
    inputs: &[ValueId],
    root: ValueId,
    classes: &[Id],
) -> Option<(Id, Node)> {
    let mut ids: BTreeMap<ValueId, Id> = inputs.iter().copied().zip(classes.iter().copied()).collect();
    let mut last = None;
    for value in needed(graph, root) {
        if ids.contains_key(&value) {
            continue;
        }
        let node = graph.node(value);
        let children: Option<Vec<Id>> = node.args.iter().map(|a| ids.get(a).copied()).collect();
        let node =
            Node { head: Arc::new(Head::Op(node.op.clone())), ty: node.ty.clone(), children: children? };
        let id = logic.add(node.clone());
        ids.insert(value, id);
        last = Some((id, node));
    }
    last
}

/// The values `root` depends on, ascending, itself included.
fn needed(graph: &Graph, root: ValueId) -> Vec<ValueId> {
    let mut live = BTreeSet::from([root]);
    for (value, node) in graph.values().rev() {
        if live.contains(&value) {
            live.extend(node.args.iter().copied());
        }
    }
    live.into_iter().collect()
}

/// An operand of a found operation: a value of the segment or from outside, or an earlier found one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Known(u32),
    Found(u32),
}

/// What saturation found, in terms of the segment's values in order: first those from outside, then its own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    pub operations: Vec<(Op, Vec<Source>)>,
    /// Rule, a value, and what equals it.
    pub equal: Vec<(&'static str, Source, Source)>,
    /// False if limits ended the search.
    pub saturated: bool,
}

/// An operation of a segment: its operands are places among the values from outside and the earlier operations.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Line {
    pub op: Op,
    pub ty: Type,
    pub operands: Vec<u32>,
}

/// Other ways to compute the values of a segment.
pub fn saturate(outside: &[Type], lines: &[Line]) -> Found {
    let mut logic = Logic::default();
    let mut ids: Vec<Id> = Vec::new();
    for (place, ty) in outside.iter().enumerate() {
        let head = Arc::new(Head::Outside(place as u32));
        ids.push(logic.add(Node { head, ty: ty.clone(), children: vec![] }));
    }
    for line in lines {
        let children = line.operands.iter().filter_map(|&o| ids.get(o as usize).copied()).collect();
        ids.push(logic.add(Node {
            head: Arc::new(Head::Op(line.op.clone())),
            ty: line.ty.clone(),
            children,
        }));
    }
    logic.rebuild();
    let rewrites: Vec<Rewrite<Node, Types>> =
        RULES.iter().filter_map(|rule| Rewrite::new(rule.name, Finder(rule), Adder(rule)).ok()).collect();
    let runner = Runner::default()
        .with_egraph(logic)
        .with_scheduler(SimpleScheduler)
        .with_node_limit(NODES)
        .with_iter_limit(ROUNDS)
        .with_time_limit(std::time::Duration::MAX)
        .run(&rewrites);
    let saturated = matches!(runner.stop_reason, Some(egg::StopReason::Saturated));
    read(&runner.egraph, &ids, saturated)
}

/// Writes down every operation of the e-graph that the segment does not have itself, operands first. What depends on
/// itself is left out.
fn read(logic: &Logic, ids: &[Id], saturated: bool) -> Found {
    let canonical = |node: &Node| node.clone().map_children(|c| logic.find(c));
    let mut found = Found { saturated, ..Found::default() };
    let mut sources: BTreeMap<Id, Source> = BTreeMap::new();
    let mut written: BTreeMap<Node, Source> = BTreeMap::new();
    for (place, &id) in ids.iter().enumerate() {
        let source = Source::Known(place as u32);
        sources.entry(logic.find(id)).or_insert(source);
        written.entry(canonical(logic.id_to_node(id))).or_insert(source);
    }
    let mut classes: Vec<Id> = logic.classes().map(|c| c.id).collect();
    classes.sort();
    loop {
        let before = written.len();
        for &class in &classes {
            for node in logic[class].nodes.iter().map(canonical) {
                let Head::Op(op) = &*node.head else { continue };
                if written.contains_key(&node) {
                    continue;
                }
                let operands: Option<Vec<Source>> =
                    node.children.iter().map(|c| sources.get(c).copied()).collect();
                let Some(operands) = operands else { continue };
                let place = Source::Found(found.operations.len() as u32);
                found.operations.push((op.clone(), operands));
                written.insert(node, place);
                sources.entry(class).or_insert(place);
            }
        }
        if written.len() == before {
            break;
        }
    }
    for (rule, class, node) in &logic.analysis.applied {
        let pair = (sources.get(&logic.find(*class)), written.get(&canonical(node)));
        if let (Some(&left), Some(&right)) = pair
            && left != right
        {
            found.equal.push((rule, left, right));
        }
    }
    found
}
