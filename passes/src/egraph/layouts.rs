//! The layouts of a model as an e-graph, saturated.
//!
//! Nodes are of four sorts: a value's operation, `Lay(l)(x)` for the families of `x` in layout `l`, typed local
//! operations, and conversions. The schemas are *square*, `Lay(l)(op(x…)) = op'(Lay(l1)(x1)…)`, and *conversion*,
//! `Lay(t)(x) = c(Lay(f)(x))`. A partial family is not determined by its value: the class `Lay(P)(x)` is a coset, a sort
//! of its own, and because local operations carry their layout no congruence leads out of it.
//!
//! Planning uses the direct construction, which is an order of magnitude faster and gives the same classes,
//! productions and conversions.

use crate::layout_graph::{GroupKind, LayoutGraph, Model};
use crate::sharding::{MeshSquare, conversions, squares_on_mesh};
use egg::{
    Analysis, Applier, DidMerge, EGraph, Id, Language, PatternAst, Rewrite, Runner, SearchMatches, Searcher,
    SimpleScheduler, StopReason, Subst, Symbol, Var,
};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tpshard_ir::{Conversion, Layout, Type, ValueId};

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Head {
    /// A value of the logical graph, with its operands below.
    Value(ValueId),
    /// The families of a value in a layout.
    Lay(Layout),
    /// A value's operation on a rank, and the layout of what it makes.
    Local(ValueId, Layout),
    Convert(Conversion, Layout),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Node {
    head: Arc<Head>,
    children: Vec<Id>,
}

impl Node {
    fn new(head: Head, children: Vec<Id>) -> Node {
        Node { head: Arc::new(head), children }
    }
}

impl Language for Node {
    type Discriminant = Arc<Head>;

    fn discriminant(&self) -> Arc<Head> {
        self.head.clone()
    }

    fn matches(&self, other: &Node) -> bool {
        self.head == other.head && self.children.len() == other.children.len()
    }

    fn children(&self) -> &[Id] {
        &self.children
    }

    fn children_mut(&mut self) -> &mut [Id] {
        &mut self.children
    }
}

/// What is known of a class of values. Families know nothing, and never merge with values.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Known {
    group: Option<u32>,
    /// Layouts in which the value can be had.
    layouts: BTreeSet<Layout>,
}

#[derive(Clone, Default)]
struct Facts {
    groups: BTreeMap<ValueId, u32>,
}

impl Analysis<Node> for Facts {
    type Data = Known;

    fn make(graph: &mut EGraph<Node, Facts>, node: &Node, _: Id) -> Known {
        let group = match &*node.head {
            Head::Value(value) => graph.analysis.groups.get(value).copied(),
            Head::Lay(_) | Head::Local(..) | Head::Convert(..) => None,
        };
        Known { group, layouts: BTreeSet::new() }
    }

    fn merge(&mut self, known: &mut Known, other: Known) -> DidMerge {
        debug_assert_eq!(known.group.is_some(), other.group.is_some(), "a family was equated with a value");
        let before = known.layouts.len();
        let others = other.layouts.len();
        known.layouts.extend(other.layouts);
        DidMerge(known.layouts.len() != before, known.layouts.len() != others)
    }

    fn modify(_: &mut EGraph<Node, Facts>, _: Id) {}
}

type Families = EGraph<Node, Facts>;

/// What the rules read of the model.
struct Table {
    kinds: Vec<GroupKind>,
    homes: Vec<bool>,
    types: Vec<Type>,
    squares: BTreeMap<ValueId, Arc<Vec<MeshSquare>>>,
    mesh: tpshard_ir::Mesh,
}

#[derive(Clone, Copy, PartialEq)]
enum Schema {
    Square,
    Conversion,
}

#[derive(Clone)]
struct Rule {
    schema: Schema,
    table: Arc<Table>,
}

impl Searcher<Node, Facts> for Rule {
    fn search_eclass_with_limit(
        &self,
        graph: &Families,
        class: Id,
        _: usize,
    ) -> Option<SearchMatches<'_, Node>> {
        let group = graph[class].data.group?;
        let planned = self.table.kinds.get(group as usize) != Some(&GroupKind::Free);
        planned.then(|| SearchMatches { eclass: class, substs: vec![Subst::default()], ast: None })
    }

    fn vars(&self) -> Vec<Var> {
        vec![]
    }
}

impl Applier<Node, Facts> for Rule {
    fn apply_one(
        &self,
        graph: &mut Families,
        class: Id,
        _: &Subst,
        _: Option<&PatternAst<Node>>,
        rule: Symbol,
    ) -> Vec<Id> {
        match self.schema {
            Schema::Square => self.squares(graph, class, rule),
            Schema::Conversion => self.conversions(graph, class, rule),
        }
    }
}

impl Rule {
    fn squares(&self, graph: &mut Families, class: Id, rule: Symbol) -> Vec<Id> {
        let mut changed = Vec::new();
        for node in graph[class].nodes.clone() {
            let Head::Value(value) = *node.head else { continue };
            let Some(squares) = self.table.squares.get(&value).cloned() else { continue };
            for square in squares.iter() {
                let offered = square.result.has_partial() || has(graph, class, &square.result);
                if !offered || !self.available(graph, &node.children, square) {
                    continue;
                }
                let pairs = node.children.iter().zip(&square.operands);
                let families = pairs.map(|(&x, l)| lay(graph, x, l)).collect();
                let local = graph.add(Node::new(Head::Local(value, square.result.clone()), families));
                let whole = lay(graph, class, &square.result);
                if graph.union_trusted(whole, local, rule) {
                    changed.push(whole);
                }
            }
        }
        changed
    }

    /// Partial operands have to be made by squares; of several that are taken jointly, one.
    fn available(&self, graph: &Families, operands: &[Id], square: &MeshSquare) -> bool {
        let pairs = || operands.iter().zip(&square.operands);
        let free = |x: Id| {
            let group = graph[x].data.group.unwrap_or_default();
            self.table.kinds.get(group as usize) == Some(&GroupKind::Free)
        };
        let whole = pairs().filter(|(_, l)| !l.has_partial()).all(|(&x, l)| free(x) || has(graph, x, l));
        let states = pairs().any(|(&x, l)| l.has_partial() && self.is_state(graph, x));
        let wanted = pairs().filter(|(_, l)| l.has_partial()).count();
        let native = pairs().filter(|(x, l)| l.has_partial() && is_made(graph, **x, l)).count();
        whole && !states && (wanted == native || (native > 0 && wanted > 1))
    }

    fn is_state(&self, graph: &Families, x: Id) -> bool {
        graph[x].data.group.is_some_and(|g| self.table.homes.get(g as usize) == Some(&true))
    }

    fn conversions(&self, graph: &mut Families, class: Id, rule: Symbol) -> Vec<Id> {
        let known = graph[class].data.clone();
        let Some(ty) = known.group.and_then(|g| self.table.types.get(g as usize)) else { return vec![] };
        let mut changed = Vec::new();
        for from in &known.layouts {
            for to in &known.layouts {
                let Some(conversion) = conversions(ty, from, to, &self.table.mesh) else { continue };
                let source = lay(graph, class, from);
                let made = graph.add(Node::new(Head::Convert(conversion, to.clone()), vec![source]));
                let target = lay(graph, class, to);
                if graph.union_trusted(target, made, rule) {
                    changed.push(target);
                }
            }
        }
        changed
    }
}

fn has(graph: &Families, x: Id, layout: &Layout) -> bool {
    graph[x].data.layouts.contains(layout)
}

/// True if a square makes `x` in `layout`.
fn is_made(graph: &Families, x: Id, layout: &Layout) -> bool {
    let node = Node::new(Head::Lay(layout.clone()), vec![graph.find(x)]);
    graph.lookup(node).is_some_and(|family| {
        graph[family].nodes.iter().any(|n| matches!(&*n.head, Head::Local(_, made) if made == layout))
    })
}

/// The class of families of `x` in `layout`, from now on known to exist.
fn lay(graph: &mut Families, x: Id, layout: &Layout) -> Id {
    let mut known = graph[x].data.clone();
    if known.layouts.insert(layout.clone()) {
        graph.set_analysis_data(x, known);
    }
    graph.add(Node::new(Head::Lay(layout.clone()), vec![x]))
}

/// Everything a layout graph says, in a form that can be compared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fixpoint {
    pub classes: BTreeSet<(u32, Layout)>,
    pub productions: BTreeSet<(u32, Layout, ValueId, Vec<Layout>)>,
    pub conversions: BTreeSet<(u32, Layout, Layout, Conversion)>,
}

/// The fixpoint that the direct construction gives. Stored values are made by no square.
pub fn constructed(layouts: &LayoutGraph) -> Fixpoint {
    let mut fixpoint = Fixpoint::default();
    for (index, group) in layouts.groups.iter().enumerate().filter(|(_, g)| g.kind != GroupKind::Free) {
        let index = index as u32;
        fixpoint.classes.extend(group.layouts.iter().map(|l| (index, l.clone())));
        for production in group.productions.iter().filter(|_| group.kind == GroupKind::Computed) {
            let operands = production.operands.iter();
            let operands =
                operands.map(|o| layouts.groups[o.group as usize].layout(o.slot).clone()).collect();
            let out = group.layout(production.out).clone();
            fixpoint.productions.insert((index, out, production.value, operands));
        }
        for edge in &group.conversions {
            if let Some(conversion) = &edge.conversion {
                let (from, to) = (group.layout(edge.from).clone(), group.layout(edge.to).clone());
                fixpoint.conversions.insert((index, from, to, conversion.clone()));
            }
        }
    }
    fixpoint
}

/// Saturates the schemas from the layouts without partial values that `universe` lists per group. `None` if `nodes` or
/// `rounds` did not suffice.
pub fn saturated(
    model: &Model<'_>,
    universe: &[Vec<Layout>],
    nodes: usize,
    rounds: usize,
) -> Option<Fixpoint> {
    let (mut graph, ids) = load(model);
    for (index, class) in model.classes.all.iter().enumerate() {
        if class.kind != GroupKind::Free {
            let id = *ids.get(class.members.first()?)?;
            for layout in universe.get(index)? {
                lay(&mut graph, id, layout);
            }
        }
    }
    graph.rebuild();
    let table = Arc::new(table(model));
    let rewrite = |name: &str, schema: Schema| {
        let rule = Rule { schema, table: table.clone() };
        Rewrite::new(name, rule.clone(), rule).ok()
    };
    let rewrites = [rewrite("square", Schema::Square)?, rewrite("conversion", Schema::Conversion)?];
    let runner = Runner::default()
        .with_egraph(graph)
        .with_scheduler(SimpleScheduler)
        .with_node_limit(nodes)
        .with_iter_limit(rounds)
        .with_time_limit(std::time::Duration::MAX)
        .run(&rewrites);
    let done = matches!(runner.stop_reason, Some(StopReason::Saturated));
    done.then(|| read(&runner.egraph, &table))
}

fn load(model: &Model<'_>) -> (Families, BTreeMap<ValueId, Id>) {
    let mut groups = BTreeMap::new();
    for (index, class) in model.classes.all.iter().enumerate() {
        groups.extend(class.members.iter().map(|&m| (m, index as u32)));
    }
    let mut graph = Families::new(Facts { groups });
    let mut ids = BTreeMap::new();
    for class in &model.classes.all {
        let mut first = None;
        for &member in &class.members {
            let args = &model.graph.node(member).args;
            // As in the direct construction, what would close a circle is left out.
            let children: Option<Vec<Id>> = args.iter().map(|a| ids.get(a).copied()).collect();
            let Some(children) = children else { continue };
            let id = graph.add(Node::new(Head::Value(member), children));
            match first {
                None => first = Some(id),
                Some(first) => {
                    graph.union(first, id);
                }
            }
        }
        if let Some(first) = first {
            ids.extend(class.members.iter().map(|&m| (m, first)));
        }
    }
    graph.rebuild();
    (graph, ids)
}

fn table(model: &Model<'_>) -> Table {
    let mut squares = BTreeMap::new();
    for class in model.classes.all.iter().filter(|c| c.kind == GroupKind::Computed) {
        for &member in &class.members {
            let node = model.graph.node(member);
            let args: Vec<&Type> = node.args.iter().map(|&a| model.graph.ty(a)).collect();
            let deals = model.units.deals(model.graph, member);
            let found = squares_on_mesh(&node.op, &args, &node.ty, model.mesh, &deals);
            squares.insert(member, Arc::new(found));
        }
    }
    let classes = &model.classes.all;
    Table {
        kinds: classes.iter().map(|c| c.kind).collect(),
        homes: classes.iter().map(|c| c.state.is_some()).collect(),
        types: classes.iter().map(|c| model.graph.ty(c.members[0]).clone()).collect(),
        squares,
        mesh: model.mesh.clone(),
    }
}

fn read(graph: &Families, table: &Table) -> Fixpoint {
    let mut fixpoint = Fixpoint::default();
    // The value and layout that each class of families stands for.
    let mut meaning: BTreeMap<Id, (u32, Layout)> = BTreeMap::new();
    for class in graph.classes() {
        for node in &class.nodes {
            if let Head::Lay(layout) = &*node.head
                && let Some(group) = node.children.first().and_then(|&x| graph[x].data.group)
            {
                meaning.insert(graph.find(class.id), (group, layout.clone()));
            }
        }
    }
    let planned = |group: u32| table.kinds.get(group as usize) != Some(&GroupKind::Free);
    for (&id, (group, layout)) in meaning.iter().filter(|(_, (group, _))| planned(*group)) {
        fixpoint.classes.insert((*group, layout.clone()));
        for node in &graph[id].nodes {
            let sources = || node.children.iter().filter_map(|&c| meaning.get(&graph.find(c)));
            match &*node.head {
                Head::Local(value, _) => {
                    let operands = sources().map(|(_, l)| l.clone()).collect();
                    fixpoint.productions.insert((*group, layout.clone(), *value, operands));
                }
                Head::Convert(conversion, to) => {
                    if let Some((_, from)) = sources().next() {
                        let edge = (*group, from.clone(), to.clone(), conversion.clone());
                        fixpoint.conversions.insert(edge);
                    }
                }
                Head::Value(_) | Head::Lay(_) => {}
            }
        }
    }
    fixpoint
}
