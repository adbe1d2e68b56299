//! How a CPU executes a graph: in regions, each one kernel over one or more nodes.
//!
//! Runs of elementwise nodes become one region, so that what lies between them never reaches memory; [`Pass`] says what
//! else such a region may cover.
//! Nodes that depend on weights only run once, when a session opens. Transposes, slices, stretches and most reshapes
//! are views. A lowering is a suggestion that [`Lowering::check`] can refuse; the graph says what is computed.

use super::fused::Pass;
use super::memory::{self, Buffer, MemoryPlan, PlanError};
use crate::dim::Bindings;
use crate::dtype::DType;
use crate::graph::{Graph, Node, Type, ValueId};
use crate::op::{EinsumSpec, Op, PadMode, Scalar};
use std::collections::{BTreeMap, BTreeSet};

/// Most nodes of one elementwise region.
const MAX_REGION: usize = 64;
/// Most operands of one elementwise region.
const MAX_OPERANDS: usize = 12;

macro_rules! kernels {
    ($($(#[$doc:meta])* $variant:ident $name:literal;)*) => {
        /// What executes a region.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Kernel { $($(#[$doc])* $variant,)* }

        impl Kernel {
            pub const ALL: &'static [Kernel] = &[$(Kernel::$variant,)*];

            /// The text name.
            pub fn name(self) -> &'static str {
                match self { $(Kernel::$variant => $name,)* }
            }
        }
    };
}

kernels! {
    /// Inputs, weights, literals, sizes and iotas.
    Leaf "leaf";
    /// Another shape or order of the operand's elements; copies only where strides cannot say it.
    View "view";
    /// One pass over blocks of elements for a whole set of `Map` nodes, with what else a [`Pass`] covers.
    Pointwise "pointwise";
    /// A batched matrix product over strided operands.
    Einsum "einsum";
    Reduce "reduce";
    Softmax "softmax";
    Norm "norm";
    Attention "attention";
    Rotary "rotary";
    /// Concatenation, gathers and constant pads, for every element type.
    Move "move";
    /// Concatenation that grows its first operand in place where it can.
    Append "append";
    Conv "conv";
    Pool "pool";
    Dequant "dequant";
    /// A conversion between layouts.
    Convert "convert";
    /// The reference interpreter.
    Reference "reference";
}

/// When a region runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stage {
    /// Once, when the session opens: it depends on weights and literals only.
    Load,
    /// In every run.
    Step,
}

/// One kernel call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    pub kernel: Kernel,
    pub stage: Stage,
    /// The nodes it covers, ascending; the last one is its result, the others are used nowhere else.
    pub nodes: Vec<ValueId>,
}

impl Region {
    /// The value it makes.
    pub fn result(&self) -> ValueId {
        self.nodes.last().copied().unwrap_or(ValueId(0))
    }

    /// The values it reads, each once, in order of first use.
    pub fn operands(&self, graph: &Graph) -> Vec<ValueId> {
        let mut operands = Vec::new();
        for &node in &self.nodes {
            for &arg in &graph.node(node).args {
                if !self.nodes.contains(&arg) && !operands.contains(&arg) {
                    operands.push(arg);
                }
            }
        }
        operands
    }

    /// The same work in regions that are one node or elementwise nodes of one shape, in an order in which it can be done.
    pub fn plain(&self, graph: &Graph) -> Vec<Region> {
        let node = |value: ValueId| graph.node(value);
        let elementwise = |value: ValueId| matches!(node(value).op, Op::Map(_));
        // Whose region each node belongs to; users come before what they use.
        let mut root_of: BTreeMap<ValueId, ValueId> = BTreeMap::new();
        for &value in self.nodes.iter().rev() {
            let users = self.nodes.iter().filter(|&&user| node(user).args.contains(&value));
            let roots: BTreeSet<Option<&ValueId>> = users.map(|user| root_of.get(user)).collect();
            let joins = |&&root: &&ValueId| {
                elementwise(root) && elementwise(value) && node(root).ty.shape == node(value).ty.shape
            };
            let root = match roots.first() {
                Some(&Some(root)) if roots.len() == 1 => Some(root).filter(joins),
                _ => None,
            };
            root_of.insert(value, root.copied().unwrap_or(value));
        }
        let mut parts: BTreeMap<ValueId, Vec<ValueId>> = BTreeMap::new();
        for (value, root) in root_of {
            parts.entry(root).or_default().push(value);
        }
        let part = |(root, nodes)| Region { kernel: kernel_of(graph, node(root)), stage: self.stage, nodes };
        if parts.len() == 1 { vec![self.clone()] } else { parts.into_iter().map(part).collect() }
    }
}

/// The regions of a graph, in execution order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lowering {
    pub regions: Vec<Region>,
}

/// A lowering does not execute its graph.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
#[error("region {region} of the lowering: {what}\n  help: build the program again")]
pub struct LoweringError {
    pub region: usize,
    pub what: String,
}

/// The regions for `graph`.
pub fn lower(graph: &Graph) -> Lowering {
    lower_keeping(graph, &BTreeSet::new())
}

/// As [`lower`], with every value of `keep` the result of a region, so that it can be looked at.
pub fn lower_keeping(graph: &Graph, keep: &BTreeSet<ValueId>) -> Lowering {
    let users = graph.users();
    let mut kept = keep.clone();
    kept.extend(graph.outputs.iter().map(|o| o.value));
    let constant = constants(graph);
    let mut covered = vec![false; graph.len()];
    let mut regions = Vec::new();
    for (root, node) in graph.values().rev() {
        if covered[root.index()] {
            continue;
        }
        let kernel = kernel_of(graph, node);
        let ends = kernel == Kernel::Pointwise || matches!(node.op, Op::Reshape { .. });
        let nodes = match ends && !constant[root.index()] {
            true => grow(graph, root, &users, &kept, &constant),
            false => vec![root],
        };
        let kernel = if nodes.len() > 1 { Kernel::Pointwise } else { kernel };
        for &node in &nodes {
            covered[node.index()] = true;
        }
        let stage = if constant[root.index()] { Stage::Load } else { Stage::Step };
        regions.push(Region { kernel, stage, nodes });
    }
    regions.reverse();
    Lowering { regions }
}

/// The elementwise region around `root`: itself and producers on its pass that only the region uses.
fn grow(
    graph: &Graph,
    root: ValueId,
    users: &[Vec<ValueId>],
    kept: &BTreeSet<ValueId>,
    constant: &[bool],
) -> Vec<ValueId> {
    let pass = Pass::new(graph, root);
    let mut region: BTreeSet<ValueId> = [root].into();
    let mut candidates: BTreeSet<ValueId> = graph.node(root).args.iter().copied().collect();
    let mut operands: BTreeSet<ValueId> = candidates.clone();
    // Later values first: when a value is looked at, all its users that could join have been.
    while let Some(value) = candidates.pop_last() {
        let node = graph.node(value);
        let joins = region.len() < MAX_REGION
            && pass.place(graph, root, root).is_some()
            && pass.place(graph, value, root).is_some()
            && constant[value.index()] == constant[root.index()]
            && !kept.contains(&value)
            && users[value.index()].iter().all(|&u| region.contains(&u) && pass.takes(graph, u, value));
        if !joins {
            continue;
        }
        let mut with: BTreeSet<ValueId> = operands.clone();
        with.remove(&value);
        with.extend(node.args.iter().copied().filter(|a| !region.contains(a)));
        if with.len() > MAX_OPERANDS {
            continue;
        }
        operands = with;
        region.insert(value);
        candidates.extend(node.args.iter().copied());
    }
    region.into_iter().collect()
}

/// Which values depend on weights and literals only, have constant shapes, and take no more memory than what they are made
/// of (dequantisation aside). What is stretched takes no memory of its own.
fn constants(graph: &Graph) -> Vec<bool> {
    // Elements in memory, of constants.
    let mut stored: Vec<Option<usize>> = Vec::with_capacity(graph.len());
    for node in graph.nodes() {
        let size = node.ty.elements().as_size();
        let of = |id: &ValueId| stored[id.index()];
        let held = match &node.op {
            Op::Weight(_) | Op::Literal(_) => size.or(Some(0)),
            Op::Input { .. } | Op::Size(_) | Op::Iota { .. } | Op::Convert(_) | Op::Append { .. } => None,
            // What evaluates it is at hand in steps only.
            Op::Deferred { .. } => None,
            // A product of sizes may be 0 whatever some of them are.
            _ if !node.symbols().is_empty() => None,
            Op::Broadcast { .. } => size.and(node.args.first().and_then(of)),
            _ => {
                let operands =
                    node.args.iter().map(of).try_fold(0usize, |sum, n| Some(sum.saturating_add(n?)));
                size.filter(|&n| operands.is_some_and(|operands| n <= operands.max(64)))
            }
        };
        stored.push(held);
    }
    stored.iter().map(Option::is_some).collect()
}

/// The kernel that can execute a node on its own.
pub(super) fn kernel_of(graph: &Graph, node: &Node) -> Kernel {
    let dtype = node.ty.dtype;
    let first = node.args.first().map(|&a| graph.ty(a).dtype);
    let float = |d: DType| matches!(d, DType::F32 | DType::F16 | DType::BF16);
    let all_float = float(dtype) && node.args.iter().all(|&a| float(graph.ty(a).dtype));
    let if_float = |kernel: Kernel| if all_float { kernel } else { Kernel::Reference };
    let unpacked = !dtype.is_packed();
    match &node.op {
        Op::Input { .. } | Op::Weight(_) | Op::Literal(_) | Op::Size(_) | Op::Iota { .. } => Kernel::Leaf,
        Op::Map(scalar) if is_pointwise(*scalar, graph, node) => Kernel::Pointwise,
        Op::Einsum(spec) if is_product(spec) => if_float(Kernel::Einsum),
        Op::Reduce { .. } => if_float(Kernel::Reduce),
        Op::Softmax { .. } => if_float(Kernel::Softmax),
        Op::Norm { .. } => if_float(Kernel::Norm),
        Op::Attention { .. } => if_float(Kernel::Attention),
        Op::Rotary { .. } => if_float(Kernel::Rotary),
        Op::Conv { window, .. } if (1..=3).contains(&window.kernel.len()) => if_float(Kernel::Conv),
        Op::Pool { .. } => if_float(Kernel::Pool),
        Op::Dequant { .. } if dtype != DType::F64 && dequantises(first) => Kernel::Dequant,
        Op::Broadcast { .. } | Op::Transpose { .. } | Op::Slice { .. } if unpacked => Kernel::View,
        Op::Reshape { .. } => Kernel::View,
        Op::Append { .. } if unpacked => Kernel::Append,
        Op::Concat { .. } if unpacked => Kernel::Move,
        Op::Gather { .. } if unpacked && is_index(graph, node) => Kernel::Move,
        Op::Pad { mode: PadMode::Constant(_), .. } if all_float => Kernel::Move,
        Op::Convert(_) => Kernel::Convert,
        Op::Map(_)
        | Op::Einsum(_)
        | Op::Scan { .. }
        | Op::Conv { .. }
        | Op::TopK { .. }
        | Op::Broadcast { .. }
        | Op::Transpose { .. }
        | Op::Slice { .. }
        | Op::Append { .. }
        | Op::Concat { .. }
        | Op::Gather { .. }
        | Op::Pad { .. }
        | Op::GatherElements { .. }
        | Op::GatherNd { .. }
        | Op::ScatterElements { .. }
        | Op::ScatterNd { .. }
        | Op::Dequant { .. }
        | Op::Deferred { .. } => Kernel::Reference,
    }
}

/// True if no letter is summed over within one operand.
fn is_product(spec: &EinsumSpec) -> bool {
    let [a, b] = spec.inputs.as_slice() else { return false };
    let lone = |a: &[u8], b: &[u8]| a.iter().any(|l| !b.contains(l) && !spec.output.contains(l));
    !lone(a, b) && !lone(b, a)
}

fn is_index(graph: &Graph, node: &Node) -> bool {
    node.args.get(1).is_some_and(|&a| matches!(graph.ty(a).dtype, DType::I64 | DType::I32))
}

fn dequantises(dtype: Option<DType>) -> bool {
    matches!(dtype, Some(DType::I8 | DType::U8 | DType::I4 | DType::U4 | DType::I2 | DType::U2))
}

/// True if the elementwise kernel knows `scalar` for these element types: 16- and 32-bit floats in `f32`, integers of
/// up to 63 bits in `i64`, and `bool`.
fn is_pointwise(scalar: Scalar, graph: &Graph, node: &Node) -> bool {
    let float = |d: DType| matches!(d, DType::F32 | DType::F16 | DType::BF16);
    let int = |d: DType| d.is_integer() && !d.is_packed() && d != DType::U64;
    let known = |d: DType| float(d) || int(d) || d == DType::Bool;
    let Some(first) = node.args.first().map(|&a| graph.ty(a).dtype) else { return false };
    if !known(node.ty.dtype) || node.args.iter().any(|&a| !known(graph.ty(a).dtype)) {
        return false;
    }
    use Scalar as S;
    match scalar {
        S::Cast(to) => float(first) && float(to) || !float(first),
        S::Bits(_) => false,
        S::Select | S::Not | S::And | S::Or | S::Xor => true,
        S::Equal => true,
        S::Less | S::LessEqual | S::Greater | S::GreaterEqual => first != DType::Bool,
        S::Neg | S::Abs | S::Add | S::Sub | S::Mul | S::Min | S::Max => first != DType::Bool,
        S::Sign
        | S::Reciprocal
        | S::Sqrt
        | S::Rsqrt
        | S::Exp
        | S::Log
        | S::Sin
        | S::Cos
        | S::Tanh
        | S::Sigmoid
        | S::Erf
        | S::Floor
        | S::Ceil
        | S::Round
        | S::IsNan
        | S::IsInf
        | S::Div
        | S::Pow => float(first),
        S::Tan
        | S::Asin
        | S::Acos
        | S::Atan
        | S::Sinh
        | S::Cosh
        | S::Asinh
        | S::Acosh
        | S::Atanh
        | S::BitNot
        | S::Mod
        | S::Rem
        | S::BitAnd
        | S::BitOr
        | S::BitXor
        | S::ShiftLeft
        | S::ShiftRight => false,
    }
}

impl Lowering {
    /// Checks that the regions execute `graph`: every node once, operands before results, kernels that fit.
    ///
    /// # Errors
    /// The first region that does not.
    pub fn check(&self, graph: &Graph) -> Result<(), LoweringError> {
        let mut made = vec![false; graph.len()];
        let mut covered = vec![false; graph.len()];
        let constant = constants(graph);
        let users = graph.users();
        for (index, region) in self.regions.iter().enumerate() {
            let fail = |what: String| Err(LoweringError { region: index, what });
            if region.nodes.is_empty() || region.nodes.iter().any(|n| n.index() >= graph.len()) {
                return fail("covers no node or one that does not exist".into());
            }
            if !region.nodes.is_sorted_by(|a, b| a < b) {
                return fail("its nodes are not ascending".into());
            }
            let result = region.result();
            let alone = region.nodes.len() == 1;
            let pass = Pass::new(graph, result);
            for &node in &region.nodes {
                if std::mem::replace(&mut covered[node.index()], true) {
                    return fail(format!("{node} is in two regions"));
                }
                let own = kernel_of(graph, graph.node(node));
                let fits = match alone {
                    true => {
                        own == region.kernel || (region.kernel == Kernel::Reference && own != Kernel::Leaf)
                    }
                    false => region.kernel == Kernel::Pointwise && pass.place(graph, node, result).is_some(),
                };
                if !fits {
                    return fail(format!("{} does not execute {node}", region.kernel.name()));
                }
                let inner = node != result;
                if inner && graph.outputs.iter().any(|o| o.value == node) {
                    return fail(format!("the output {node} is inside"));
                }
                if inner && users[node.index()].iter().any(|u| !region.nodes.contains(u)) {
                    return fail(format!("{node} is inside but used outside"));
                }
                let taken = |&u: &ValueId| pass.takes(graph, u, node);
                if inner && !users[node.index()].iter().all(taken) {
                    return fail(format!("{node} lies elsewhere than what uses it"));
                }
                if region.stage == Stage::Load && (!constant[node.index()] || !alone) {
                    return fail(format!("{node} is not constant on its own"));
                }
            }
            if let Some(missing) = region.operands(graph).iter().find(|a| !made[a.index()]) {
                return fail(format!("{missing} is not there yet"));
            }
            made[result.index()] = true;
        }
        match covered.iter().position(|c| !c) {
            Some(node) => {
                Err(LoweringError { region: self.regions.len(), what: format!("no region covers %{node}") })
            }
            None => Ok(()),
        }
    }

    /// Which values are made when a session opens.
    pub fn constant_values(&self, graph: &Graph) -> Vec<bool> {
        let mut constant = vec![false; graph.len()];
        for region in self.regions.iter().filter(|r| r.stage == Stage::Load) {
            for node in &region.nodes {
                if let Some(known) = constant.get_mut(node.index()) {
                    *known = true;
                }
            }
        }
        constant
    }

    /// For every value, the last region that reads it or a view of it; the number of regions if it leaves the program.
    pub fn last_uses(&self, graph: &Graph) -> Vec<usize> {
        memory::last_uses(self, graph)
    }

    /// The buffers that the regions of [`Stage::Step`] write, with their lifetimes.
    pub fn buffers(&self, graph: &Graph) -> Vec<Buffer> {
        memory::buffers(self, graph)
    }

    /// Where every buffer lies for concrete dims, and how many bytes that takes.
    ///
    /// # Errors
    /// A dim without value, or a size that cannot be addressed.
    pub fn plan(&self, graph: &Graph, bindings: &Bindings) -> Result<MemoryPlan, PlanError> {
        memory::plan(&self.buffers(graph), bindings)
    }

    /// As [`Lowering::plan`], of the buffers whose sizes the bindings give: sizes that data decides are known later, and
    /// buffers of such sizes have no slot. `ty` says the type of each value.
    ///
    /// # Errors
    /// A size that cannot be addressed.
    pub fn plan_known(
        &self,
        graph: &Graph,
        bindings: &Bindings,
        ty: &dyn Fn(ValueId) -> Option<Type>,
    ) -> Result<MemoryPlan, PlanError> {
        let mut buffers = self.buffers(graph);
        for buffer in &mut buffers {
            if let Some(ty) = ty(buffer.value) {
                buffer.elements = ty.elements();
            }
        }
        memory::plan_known(&buffers, bindings)
    }
}
