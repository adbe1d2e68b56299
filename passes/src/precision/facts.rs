//! What has to be known of the values of a graph before types can be chosen.

use super::moves;
use std::collections::BTreeSet;
use tpshard_ir::layout::Monoid;
use tpshard_ir::op::PadMode;
use tpshard_ir::{DType, Data, Graph, Node, Op, Scalar, Tensor, ValueId};

/// Where a value comes from; the last that holds for an operand holds for the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Source {
    /// Weights and literals only.
    Constant,
    /// Positions, sizes, masks of integers: no rounding is small to them.
    Exact,
    /// What the model computes: embeddings, features, products.
    Activation,
}

/// By value.
pub(super) struct Facts {
    pub(super) source: Vec<Source>,
    /// Quantised: constants made of such weights, and what only moves what was made of codes.
    pub(super) quantised: Vec<bool>,
    /// Constants whose finite elements stay finite in the narrow type, as far as the graph shows them.
    pub(super) fits: Vec<bool>,
    /// Products that are to be narrow.
    pub(super) product: Vec<bool>,
    /// What only sums, softmax or one elementwise function read: it is not stored.
    pub(super) passing: Vec<bool>,
    /// What such products read, perhaps moved before.
    pub(super) multiplied: Vec<bool>,
}

impl Facts {
    pub(super) fn of(graph: &Graph, to: DType) -> Facts {
        let users = graph.users();
        let first = sources(graph, &BTreeSet::new());
        let tables = angles(graph, &users, &first);
        let source = if tables.is_empty() { first } else { sources(graph, &tables) };
        let quantised = forward(graph, |node, of: &dyn Fn(ValueId) -> bool| {
            let constant = node.args.iter().all(|&arg| source.get(arg.index()) == Some(&Source::Constant));
            let made = (constant || moves(&node.op)) && node.args.iter().any(|&arg| of(arg));
            matches!(node.op, Op::Dequant { .. }) || made
        });
        let fits = forward(graph, |node, of: &dyn Fn(ValueId) -> bool| match &node.op {
            Op::Literal(literal) => stays_finite(&literal.0, to),
            _ => node.args.iter().all(|&arg| of(arg)),
        });
        let is = |facts: &[bool], value: ValueId| facts.get(value.index()) == Some(&true);
        let product = |(value, node): (ValueId, &Node)| match &node.op {
            _ if node.ty.dtype != DType::F32 || source.get(value.index()) != Some(&Source::Activation) => {
                false
            }
            Op::Attention { .. } => true,
            Op::Einsum(_) | Op::Conv { .. } => {
                let exact = |arg: &ValueId| source.get(arg.index()) == Some(&Source::Exact);
                !node.args.iter().any(|arg| exact(arg) || is(&quantised, *arg))
            }
            _ => false,
        };
        let product: Vec<bool> = graph.values().map(product).collect();
        let (passing, multiplied) = backward(graph, &users, &product);
        Facts { source, quantised, fits, product, passing, multiplied }
    }

    pub(super) fn is(&self, value: ValueId, source: Source) -> bool {
        self.source.get(value.index()) == Some(&source)
    }
}

/// A fact that follows from the same fact of operands.
fn forward(graph: &Graph, fact: impl Fn(&Node, &dyn Fn(ValueId) -> bool) -> bool) -> Vec<bool> {
    let mut found: Vec<bool> = Vec::with_capacity(graph.len());
    for node in graph.nodes() {
        let of = |value: ValueId| found.get(value.index()).copied().unwrap_or(false);
        let own = fact(node, &of);
        found.push(own);
    }
    found
}

/// `tables` are gathers from tables that hold no embeddings.
fn sources(graph: &Graph, tables: &BTreeSet<ValueId>) -> Vec<Source> {
    let mut found: Vec<Source> = Vec::with_capacity(graph.len());
    for (value, node) in graph.values() {
        let of = |arg: &ValueId| found.get(arg.index()).copied().unwrap_or(Source::Activation);
        let operands = node.args.iter().map(of).max();
        let float = node.ty.dtype.is_float();
        let own = match &node.op {
            Op::Input { .. } if float => Source::Activation,
            Op::Input { .. } | Op::Size(_) | Op::Iota { .. } => Source::Exact,
            Op::Weight(_) | Op::Literal(_) => Source::Constant,
            _ if !float => operands.map_or(Source::Exact, |source| source.min(Source::Exact)),
            Op::Gather { .. } if embeds(graph, node, &found) && !tables.contains(&value) => {
                Source::Activation
            }
            _ => operands.unwrap_or(Source::Exact),
        };
        found.push(own);
    }
    found
}

/// Rows of a constant table, chosen by data.
fn embeds(graph: &Graph, node: &Node, source: &[Source]) -> bool {
    let &[table, indices] = node.args.as_slice() else { return false };
    let constant = |value: ValueId| source.get(value.index()) == Some(&Source::Constant);
    constant(table) && !constant(indices) && graph.ty(table).rank() >= 2
}

/// How far it is looked for angles, over all tables of a graph.
struct Patience {
    /// Tables of which it is asked what depends on them.
    tables: usize,
    /// Uses of what is read from tables.
    uses: usize,
}

/// Gathers from tables that hold no embeddings: what is read from them is rotated with, multiplied with activations that do
/// not depend on it, the angle of a sine, or the scale of quantised numbers.
fn angles(graph: &Graph, users: &[Vec<ValueId>], source: &[Source]) -> BTreeSet<ValueId> {
    let gathers = graph.values().filter(|(value, node)| {
        matches!(node.op, Op::Gather { .. })
            && source.get(value.index()) == Some(&Source::Activation)
            && embeds(graph, node, source)
    });
    let mut patience = Patience { tables: 256, uses: 1 << 20 };
    gathers
        .map(|(value, _)| value)
        .filter(|&value| is_angle(graph, users, source, value, &mut patience))
        .collect()
}

/// What depends on a value.
fn dependent(graph: &Graph, on: ValueId) -> Vec<bool> {
    let mut found = vec![false; graph.len()];
    for (value, node) in graph.values() {
        found[value.index()] = value == on || node.args.iter().any(|arg| found[arg.index()]);
    }
    found
}

fn is_angle(
    graph: &Graph,
    users: &[Vec<ValueId>],
    source: &[Source],
    table: ValueId,
    patience: &mut Patience,
) -> bool {
    let (mut open, mut seen) = (vec![table], BTreeSet::from([table]));
    let mut of_table: Option<Vec<bool>> = None;
    while let Some(value) = open.pop() {
        for &user in users.get(value.index()).map_or(&[][..], Vec::as_slice) {
            let Some(left) = patience.uses.checked_sub(1) else { return false };
            patience.uses = left;
            let node = graph.node(user);
            let others = || node.args.iter().filter(|arg| **arg != value);
            let activation = |arg: &&ValueId| source.get(arg.index()) == Some(&Source::Activation);
            match &node.op {
                Op::Rotary { .. } if node.args.first() != Some(&value) => return true,
                Op::Map(Scalar::Cos | Scalar::Sin) | Op::Dequant { .. } => return true,
                Op::Map(Scalar::Mul) if of_table.is_some() || patience.tables > 0 => {
                    if others().any(|arg| activation(&arg)) {
                        let dependent = of_table.get_or_insert_with(|| {
                            patience.tables -= 1;
                            dependent(graph, table)
                        });
                        if others().filter(activation).any(|arg| !dependent[arg.index()]) {
                            return true;
                        }
                    }
                    continue;
                }
                Op::Map(Scalar::Neg) | Op::Concat { .. } => {}
                op if moves(op) => {}
                _ => continue,
            }
            if seen.insert(user) {
                open.push(user);
            }
        }
    }
    false
}

fn stays_finite(tensor: &Tensor, to: DType) -> bool {
    let largest = largest(to);
    match tensor.data() {
        Data::F32(values) => values.iter().all(|x| !x.is_finite() || x.abs() <= largest),
        _ => true,
    }
}

/// The largest finite number.
fn largest(dtype: DType) -> f32 {
    match dtype {
        DType::F16 => 65504.0,
        _ => f32::from_bits(0x7f7f_0000),
    }
}

/// True if a pad with this element can be made in the narrow type.
pub(super) fn pads_alike(mode: PadMode, to: DType) -> bool {
    match mode {
        PadMode::Constant(value) => !value.0.is_finite() || value.0.abs() <= f64::from(largest(to)),
        PadMode::Reflect | PadMode::Edge | PadMode::Wrap => true,
    }
}

/// Elementwise functions of a float that give back, but for the sign, what they are given.
pub(super) fn preserves(scalar: Scalar) -> bool {
    matches!(scalar, Scalar::Neg | Scalar::Abs | Scalar::Min | Scalar::Max | Scalar::Select)
}

pub(super) fn adds(scalar: Scalar) -> bool {
    matches!(scalar, Scalar::Add | Scalar::Sub)
}

/// What is passing, and what is multiplied.
fn backward(graph: &Graph, users: &[Vec<ValueId>], product: &[bool]) -> (Vec<bool>, Vec<bool>) {
    let outputs: BTreeSet<ValueId> = graph.outputs.iter().map(|output| output.value).collect();
    let (mut summed, mut multiplied) = (vec![false; graph.len()], vec![false; graph.len()]);
    let mut passing = vec![false; graph.len()];
    for (value, _) in graph.values().rev() {
        let own = users.get(value.index()).map_or(&[][..], Vec::as_slice);
        let sums = |user: &ValueId| match &graph.node(*user).op {
            Op::Softmax { .. } | Op::Scan { .. } => true,
            Op::Reduce { monoid: Monoid::Sum | Monoid::Prod, .. } => true,
            Op::Map(_) => summed[user.index()],
            op => moves(op) && summed[user.index()],
        };
        let at = value.index();
        summed[at] = !own.is_empty() && own.iter().all(sums);
        let computes = |user: &ValueId| match graph.node(*user).op {
            Op::Map(Scalar::Cast(_) | Scalar::Bits(_)) => false,
            Op::Map(scalar) => !adds(scalar) && !preserves(scalar),
            _ => false,
        };
        let chained = matches!(own, [only] if computes(only));
        passing[at] = (summed[at] || chained) && !outputs.contains(&value);
        multiplied[at] = own.iter().any(|user| {
            let node = graph.node(*user);
            match &node.op {
                // A mask is no operand of a product.
                Op::Attention { .. } => {
                    product[user.index()] && node.args.iter().take(3).any(|arg| *arg == value)
                }
                Op::Einsum(_) | Op::Conv { .. } => product[user.index()],
                op => (moves(op) || matches!(op, Op::Concat { .. })) && multiplied[user.index()],
            }
        });
    }
    (passing, multiplied)
}
