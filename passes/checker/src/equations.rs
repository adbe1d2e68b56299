//! Justifying a ground equation by executing both sides.
//!
//! Both sides are followed back to values they share: those become variables, so an equation that holds for random
//! values of its variables holds for the values of the model (up to a chance of about 2^-50 per point: the two sides are
//! rational functions of low degree over a field of 2^61 elements). If a law needs to know more about a shared value, it
//! is opened and the sharing sought further back. Weights are variables too: each element is a function of where in the
//! model it comes from, so a slice of a weight agrees with the weight. Equal equations of other layers are executed once.

use crate::congruence::Classes;
use crate::field::Strict;
use crate::finding::TOO_LARGE;
use crate::symbols::{assignments, mix};
use crate::weights::{nameless, source, unflat};
use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::fmt::Write;
use std::sync::Arc;
use tpshard_ir::interp::{Array, Domain, Inputs, InterpError, Interpreter, MODULUS, Num, OpError, Real};
use tpshard_ir::op::Literal;
use tpshard_ir::weight::WeightExpr;
use tpshard_ir::{Bindings, DType, Data, Dim, Graph, Op, Output, Scalar, Tensor, Type, ValueId};

/// Most multiplications per execution: a few projections of a large model at short sequences.
const WORK_LIMIT: u64 = 1 << 31;
/// Most elements alive.
const ELEMENT_LIMIT: usize = 1 << 27;
/// How many shared values are opened, in the order this is tried.
const DEPTHS: [usize; 6] = [0, 1, 2, 4, 8, usize::MAX];
/// Relative error allowed in `f64`.
const TOLERANCE: f64 = 1e-12;

/// How an equation was justified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    Field,
    Reals,
    /// The same equation, up to names, was executed before.
    Before,
}

/// Executes equations of one graph.
pub(crate) struct Executor<'a> {
    graph: &'a Graph,
    points: Vec<Bindings>,
    justified: HashSet<String>,
}

impl<'a> Executor<'a> {
    pub(crate) fn new(graph: &'a Graph) -> Executor<'a> {
        let mut points = assignments(graph, 2);
        // Without symbols there is one assignment, and other random values still make another point.
        if points.len() == 1 {
            points.push(points[0].clone());
        }
        Executor { graph, points, justified: HashSet::new() }
    }

    /// Checks `left = right`, given what `classes` holds already.
    pub(crate) fn justify(
        &mut self,
        classes: &Classes,
        rule: &str,
        left: ValueId,
        right: ValueId,
    ) -> Result<How, String> {
        let (a, b) = (self.graph.ty(left), self.graph.ty(right));
        if a != b {
            return Err(format!("the sides have types {a} and {b}"));
        }
        if self.points.is_empty() {
            return Err("no small values for the dims keep all guards, so it cannot be executed".into());
        }
        let reals = rule.starts_with("real:");
        let mut why = String::new();
        let mut tried = String::new();
        for depth in DEPTHS {
            let cone = Cone::of(self.graph, classes, left, right, depth);
            let text = format!("{reals} {}", cone.text());
            if text == tried {
                continue;
            }
            if self.justified.contains(&text) {
                return Ok(How::Before);
            }
            match self.execute(&cone, reals) {
                Ok(()) => {
                    self.justified.insert(text);
                    return Ok(if reals { How::Reals } else { How::Field });
                }
                Err(what) => why = what,
            }
            tried = text;
        }
        Err(why)
    }

    fn execute(&self, cone: &Cone, reals: bool) -> Result<(), String> {
        let attempt = |wide: bool| {
            self.points.iter().enumerate().try_for_each(|(number, point)| {
                let seed = mix(number as u64 + 1);
                if reals {
                    let draw = |seed: u64, dtype: DType| real_element(seed, dtype, wide);
                    run(cone, point, &Real, seed, true, &draw, &agree_in_reals)
                } else {
                    let draw = |seed: u64, dtype: DType| field_element(seed, dtype, wide);
                    run(cone, point, &Strict, seed, false, &draw, &agree_in_field)
                }
            })
        };
        // Integers may be indices: those are small, and then no more can be asked of them.
        attempt(true).or_else(|_| attempt(false))
    }
}

fn field_element(seed: u64, dtype: DType, wide: bool) -> u64 {
    match dtype {
        DType::Bool => mix(seed) % 2,
        _ if dtype.is_integer() && !wide => mix(seed) % 2,
        _ => mix(seed) % MODULUS,
    }
}

fn real_element(seed: u64, dtype: DType, wide: bool) -> Num {
    let random = mix(seed);
    match dtype {
        DType::Bool => Num::Int(i128::from(random % 2)),
        _ if dtype.is_integer() => Num::Int(i128::from(random % if wide { 100 } else { 2 })),
        _ => Num::Float((random >> 11) as f64 / (1u64 << 53) as f64 * 4.0 - 2.0),
    }
}

fn agree_in_field(a: &[u64], b: &[u64]) -> Result<(), String> {
    match a.iter().zip(b).position(|(x, y)| x != y) {
        None => Ok(()),
        Some(at) => Err(format!("the sides differ in element {at} at a random point")),
    }
}

fn agree_in_reals(a: &[Num], b: &[Num]) -> Result<(), String> {
    let value = |x: &Num| match *x {
        Num::Float(x) => x,
        Num::Int(x) => x as f64,
    };
    let largest =
        a.iter().chain(b).map(value).filter(|x| x.is_finite()).fold(0.0, |m: f64, x| m.max(x.abs()));
    let same = |x: f64, y: f64| x == y || (x.is_nan() && y.is_nan()) || (x - y).abs() <= TOLERANCE * largest;
    if !a.is_empty() && a.iter().all(|x| value(x).is_nan()) {
        return Err("no element is a number at a random point".into());
    }
    match a.iter().zip(b).position(|(x, y)| !same(value(x), value(y))) {
        None => Ok(()),
        Some(at) => {
            let (x, y) = (value(&a[at]), value(&b[at]));
            Err(format!("the sides differ in element {at} at a random point: {x:e} and {y:e}"))
        }
    }
}

/// The values two sides need, back to what they share.
struct Cone {
    /// Variables are inputs named by number; weights stay.
    graph: Graph,
}

impl Cone {
    fn of(graph: &Graph, classes: &Classes, left: ValueId, right: ValueId, depth: usize) -> Cone {
        let shared: BTreeSet<ValueId> = {
            let (a, b) = (ancestry(graph, classes, left), ancestry(graph, classes, right));
            a.intersection(&b).copied().collect()
        };
        let level = levels(graph, classes, [left, right], &shared);
        let is_variable = |value: ValueId| {
            let class = classes.find(value);
            let deep = level.get(&class).is_some_and(|&l| l >= depth);
            match &graph.node(value).op {
                Op::Input { .. } | Op::Deferred { .. } => true,
                op => !op.is_leaf() && shared.contains(&class) && deep,
            }
        };
        let mut needed = BTreeSet::new();
        let mut open = vec![left, right];
        while let Some(value) = open.pop() {
            if needed.insert(value) && !is_variable(value) {
                open.extend(&graph.node(value).args);
            }
        }
        let mut cone = Graph::new("cone");
        let mut made: BTreeMap<ValueId, ValueId> = BTreeMap::new();
        // Operands come before their users, and any member of a class may stand for it.
        for value in needed {
            let class = classes.find(value);
            if made.contains_key(&class) {
                continue;
            }
            let node = graph.node(value);
            let own = if is_variable(value) {
                let name = format!("v{}", made.len());
                cone.input(&name, node.ty.clone())
            } else {
                let args: Vec<ValueId> = node.args.iter().map(|a| made[&classes.find(*a)]).collect();
                cone.add_typed(node.op.clone(), &args, node.ty.clone())
            };
            made.insert(class, own);
        }
        cone.outputs = [("left", left), ("right", right)]
            .map(|(name, value)| Output { name: Arc::from(name), value: made[&classes.find(value)] })
            .to_vec();
        Cone { graph: cone }
    }

    /// The same text for cones that differ in names of weights only.
    fn text(&self) -> String {
        let mut names = Vec::new();
        let mut text = String::new();
        for node in self.graph.nodes() {
            let op = match &node.op {
                Op::Weight(expr) => nameless(expr, &mut names),
                Op::Input { .. } => "variable".into(),
                op => format!("{op:?}"),
            };
            let _ = write!(text, "{op} {:?} {};", node.args, node.ty);
        }
        let _ = write!(text, "{:?}", self.graph.outputs.iter().map(|o| o.value).collect::<Vec<_>>());
        text
    }
}

/// The classes of a value and of all it depends on.
fn ancestry(graph: &Graph, classes: &Classes, value: ValueId) -> BTreeSet<ValueId> {
    let (mut seen, mut found) = (BTreeSet::new(), BTreeSet::new());
    let mut open = vec![value];
    while let Some(value) = open.pop() {
        if seen.insert(value) {
            found.insert(classes.find(value));
            open.extend(&graph.node(value).args);
        }
    }
    found
}

/// How many shared values lie on the way from a side to each class, at least.
fn levels(
    graph: &Graph,
    classes: &Classes,
    sides: [ValueId; 2],
    shared: &BTreeSet<ValueId>,
) -> BTreeMap<ValueId, usize> {
    let mut found: BTreeMap<ValueId, usize> = BTreeMap::new();
    let mut seen = BTreeSet::new();
    let mut open: VecDeque<(ValueId, usize)> = sides.iter().map(|&v| (v, 0)).collect();
    while let Some((value, level)) = open.pop_front() {
        if !seen.insert(value) {
            continue;
        }
        let class = classes.find(value);
        let own = *found.entry(class).and_modify(|l| *l = level.min(*l)).or_insert(level);
        for &arg in &graph.node(value).args {
            if shared.contains(&class) {
                open.push_back((arg, own + 1));
            } else {
                open.push_front((arg, own));
            }
        }
    }
    found
}

/// What two results must fulfil.
type Agree<'a, E> = &'a dyn Fn(&[E], &[E]) -> Result<(), String>;

/// Executes both sides at one point and compares them.
fn run<D: Domain>(
    cone: &Cone,
    point: &Bindings,
    domain: &D,
    seed: u64,
    reals: bool,
    draw: &dyn Fn(u64, DType) -> D::Element,
    agree: Agree<'_, D::Element>,
) -> Result<(), String> {
    let mut graph = cone.graph.clone();
    graph.substitute(&|name| point.get(name).map(|&value| Dim::constant(value)));
    check_work(&graph)?;
    let mut concrete = Graph::new("point");
    let mut inputs: Inputs<D::Element> = Inputs::new();
    for (id, node) in graph.values() {
        let ty = Type::new(if reals { double(node.ty.dtype) } else { node.ty.dtype }, node.ty.shape.clone());
        let name: Arc<str> = id.to_string().into();
        match &node.op {
            Op::Input { .. } => {
                let base = mix(seed ^ mix(u64::from(id.0)));
                inputs.insert(name.clone(), array(&ty, |i| Ok(draw(base.wrapping_add(i as u64), ty.dtype)))?);
                concrete.input(&name, ty);
            }
            Op::Weight(expr) => {
                inputs.insert(name.clone(), weight(expr, &ty, seed, draw)?);
                concrete.input(&name, ty);
            }
            op => {
                let op = if reals { in_doubles(op) } else { op.clone() };
                concrete.add_typed(op, &node.args, ty);
            }
        }
    }
    concrete.outputs.clone_from(&graph.outputs);
    let no_weights = |_: &WeightExpr| Err(OpError::Other("weights are variables".into()));
    let interpreter =
        Interpreter { domain, weights: &no_weights, element_limit: ELEMENT_LIMIT, deferred: None };
    let outputs = interpreter.run(&concrete, &inputs).map_err(|e| match e {
        InterpError::Node { error: OpError::Limit { needed, .. }, .. } => {
            format!("a result of {needed} elements is {TOO_LARGE}")
        }
        e => format!("it cannot be executed: {e}"),
    })?;
    let [(_, left), (_, right)] = outputs.as_slice() else { return Err("it has no two sides".into()) };
    if left.shape() != right.shape() {
        return Err(format!("the sides have shapes {:?} and {:?}", left.shape(), right.shape()));
    }
    agree(left.elements(), right.elements())
}

fn array<E: Clone>(ty: &Type, element: impl FnMut(usize) -> Result<E, String>) -> Result<Array<E>, String> {
    let shape: Option<Vec<usize>> = ty.shape.iter().map(Dim::as_size).collect();
    let shape = shape.ok_or_else(|| format!("{ty} has no size"))?;
    let count = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).filter(|&n| n <= ELEMENT_LIMIT);
    let count = count.ok_or_else(|| format!("{ty} is {TOO_LARGE}"))?;
    let data = (0..count).map(element).collect::<Result<Vec<E>, String>>()?;
    Array::new(ty.dtype, shape, data).ok_or_else(|| format!("{ty} has no size"))
}

/// Each element is a function of the initializer's element it comes from.
fn weight<E: Clone>(
    expr: &WeightExpr,
    ty: &Type,
    seed: u64,
    draw: &dyn Fn(u64, DType) -> E,
) -> Result<Array<E>, String> {
    let named = |name: &str| name.bytes().fold(mix(!seed), |state, byte| mix(state ^ u64::from(byte)));
    let mut last: (String, u64) = (String::new(), named(""));
    array(ty, |position| {
        let found = source(expr, &unflat(position, expr.shape())).ok_or("a weight without source")?;
        if last.0 != found.initializer {
            last = (found.initializer.into(), named(found.initializer));
        }
        Ok(draw(last.1.wrapping_add(found.position as u64), ty.dtype))
    })
}

fn double(dtype: DType) -> DType {
    if dtype.is_float() { DType::F64 } else { dtype }
}

/// The operation on `f64` where it was on another float.
fn in_doubles(op: &Op) -> Op {
    match op {
        Op::Map(Scalar::Cast(to)) => Op::Map(Scalar::Cast(double(*to))),
        Op::Literal(literal) => Op::Literal(Literal(Arc::new(literal_in_doubles(&literal.0)))),
        op => op.clone(),
    }
}

fn literal_in_doubles(tensor: &Tensor) -> Tensor {
    let values: Vec<f64> = match tensor.data() {
        Data::F32(v) => v.iter().map(|&x| f64::from(x)).collect(),
        Data::F16(v) => v.iter().map(|x| x.to_f64()).collect(),
        Data::BF16(v) => v.iter().map(|x| x.to_f64()).collect(),
        _ => return tensor.clone(),
    };
    Tensor::from_vec(tensor.shape().to_vec(), values).unwrap_or_else(|_| tensor.clone())
}

/// Refuses what would take minutes.
fn check_work(graph: &Graph) -> Result<(), String> {
    let size = |ty: &Type| {
        ty.shape.iter().fold(1u64, |n, d| n.saturating_mul(d.as_size().unwrap_or(usize::MAX) as u64))
    };
    let extent = |ty: &Type, dim: usize| ty.shape.get(dim).and_then(Dim::as_size).unwrap_or(1) as u64;
    let mut work = 0u64;
    for node in graph.nodes() {
        let args: Vec<&Type> = node.args.iter().map(|&a| graph.ty(a)).collect();
        let inner = match (&node.op, args.as_slice()) {
            (Op::Einsum(spec), args) => spec
                .letters()
                .into_iter()
                .filter(|letter| !spec.output.contains(letter))
                .filter_map(|letter| {
                    spec.inputs.iter().zip(args).find_map(|(letters, ty)| {
                        letters.iter().position(|l| *l == letter).map(|dim| extent(ty, dim))
                    })
                })
                .fold(1, u64::saturating_mul),
            (Op::Conv { .. }, [_, w]) => size(w) / extent(w, 0).max(1),
            (Op::Attention { .. }, [q, k, ..]) => extent(k, 2).saturating_mul(1 + extent(q, 3)),
            (Op::Pool { window, .. }, _) => {
                window.kernel.iter().fold(1u64, |n, &k| n.saturating_mul(k as u64))
            }
            (Op::Scan { axis, .. } | Op::Softmax { axis } | Op::TopK { axis, .. }, [x]) => extent(x, *axis),
            _ => 1,
        };
        let largest = args.iter().map(|ty| size(ty)).chain([size(&node.ty)]).max().unwrap_or(0);
        work = work.saturating_add(size(&node.ty).saturating_mul(inner).max(largest));
    }
    if work > WORK_LIMIT {
        return Err(format!("about {work} operations to execute it are too many: {TOO_LARGE}"));
    }
    Ok(())
}
