//! Typed SPMD programs: one program for a family of ranks.
//!
//! A program refers to a logical graph. Every step makes the family of one logical value in one layout, either by
//! computing the value's operation on operand families, or by converting a family of the same value to another
//! layout. The layouts are types: a program is right if every step is a valid square or conversion, so the list of
//! steps is its own certificate. [`instantiate`] gives the graph that one rank executes.

use crate::dim::Dim;
use crate::graph::{Graph, Node, Output, Type, ValueId};
use crate::layout::{AxisLayout, Layout, Mesh, Run, local_runs};
use crate::op::{Conversion, Literal, Op, TableWindow};
use crate::tensor::Tensor;
use std::fmt;
use std::sync::Arc;

/// A step of a program: its index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StepId(pub u32);

impl StepId {
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for StepId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "${}", self.0)
    }
}

/// How a step makes its family.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum StepKind {
    /// The operation of the logical value, localised, on families of its operands.
    Compute,
    /// A conversion of an earlier family of the same value.
    Convert(Conversion),
}

/// Makes the family of `value` in `layout`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    pub value: ValueId,
    pub layout: Layout,
    pub kind: StepKind,
    pub args: Vec<StepId>,
}

/// `left = right`, by the rule of that name; both are values of the logical graph.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Equation {
    pub rule: Arc<str>,
    pub left: ValueId,
    pub right: ValueId,
}

/// A named result in the layout the program leaves it in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpmdOutput {
    pub name: Arc<str>,
    pub step: StepId,
}

/// A typed SPMD program over a mesh.
#[derive(Clone, Debug, PartialEq)]
pub struct Spmd {
    pub mesh: Mesh,
    /// The imported graph, its nodes first and unchanged, then the values that rewriting added. Its outputs are those
    /// of the imported graph.
    pub logical: Graph,
    /// How many nodes of `logical` were imported.
    pub imported: usize,
    /// Ground equations between values of `logical`, in the order they were derived.
    pub equations: Vec<Equation>,
    pub steps: Vec<Step>,
    pub outputs: Vec<SpmdOutput>,
}

/// A step has no local form on some rank.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
#[error("{step} ({op} in {layout}) on rank {rank}: {what}")]
pub struct InstantiateError {
    pub step: StepId,
    pub op: String,
    pub layout: String,
    pub rank: usize,
    pub what: String,
}

/// The graph that `rank` executes. Value `i` of the result is step `i` of the program.
///
/// # Errors
/// A step whose layouts admit no local operation, or one that names what does not exist; a verified and checked program
/// has none.
pub fn instantiate(program: &Spmd, rank: usize) -> Result<Graph, InstantiateError> {
    let mut local = Graph::new(&program.logical.name);
    local.symbols.clone_from(&program.logical.symbols);
    local.guards.clone_from(&program.logical.guards);
    local.states.clone_from(&program.logical.states);
    local.cases.clone_from(&program.logical.cases);
    local.borders.clone_from(&program.logical.borders);
    for (i, step) in program.steps.iter().enumerate() {
        let node = instantiate_step(program, i, step, rank).map_err(|what| InstantiateError {
            step: StepId(i as u32),
            op: program.logical.nodes().get(step.value.index()).map_or("?", |n| n.op.name()).into(),
            layout: step.layout.to_string(),
            rank,
            what,
        })?;
        local.push(node);
    }
    for output in &program.outputs {
        if output.step.index() >= program.steps.len() {
            return Err(InstantiateError {
                step: output.step,
                op: format!("result `{}`", output.name),
                layout: "?".into(),
                rank,
                what: "there is no such step".into(),
            });
        }
        local.outputs.push(Output { name: output.name.clone(), value: ValueId(output.step.0) });
    }
    Ok(local)
}

fn instantiate_step(program: &Spmd, index: usize, step: &Step, rank: usize) -> Result<Node, String> {
    let node = program.logical.nodes().get(step.value.index());
    let node = node.ok_or_else(|| format!("{} does not exist", step.value))?;
    if let Some(arg) = step.args.iter().find(|arg| arg.index() >= index) {
        return Err(format!("operand {arg} does not come earlier"));
    }
    let own = held(program, step, rank)?;
    let op = match &step.kind {
        StepKind::Convert(conversion) => Op::Convert(conversion.clone()),
        StepKind::Compute => localise(program, node, step, &own, rank)?,
    };
    let ty = Type::new(node.ty.dtype, own.into_iter().map(|r| r.length).collect());
    let args = step.args.iter().map(|a| ValueId(a.0)).collect();
    Ok(Node { op, args, ty, origin: node.origin.clone() })
}

/// What `rank` holds of the value that a step makes.
fn held(program: &Spmd, step: &Step, rank: usize) -> Result<Vec<Run>, String> {
    let ty = program.logical.nodes().get(step.value.index()).map(|node| &node.ty);
    let ty = ty.ok_or_else(|| format!("{} does not exist", step.value))?;
    let (mesh, layout) = (&program.mesh, &step.layout);
    let ranks = mesh.0.iter().try_fold(1usize, |n, &axis| n.checked_mul(axis));
    if ranks.is_none_or(|ranks| rank >= ranks) {
        return Err(format!("mesh {mesh} has no rank {rank}"));
    }
    let dims = layout.0.iter().filter_map(AxisLayout::sharded_dim);
    if layout.0.len() != mesh.axes() || dims.into_iter().any(|dim| dim >= ty.rank()) {
        return Err(format!("layout {layout} does not fit {ty} on mesh {mesh}"));
    }
    Ok(local_runs(&ty.shape, layout, mesh, rank))
}

fn run_of(runs: &[Run], dim: usize) -> Result<&Run, String> {
    runs.get(dim).ok_or_else(|| format!("there is no dim {dim}"))
}

/// The extent of dim `dim` of a node's operand, in the logical graph.
fn extent<'a>(program: &'a Spmd, node: &Node, operand: usize, dim: usize) -> Result<&'a Dim, String> {
    let arg = node.args.get(operand).ok_or("an operand is missing")?;
    let source = program.logical.nodes().get(arg.index()).ok_or("an operand does not exist")?;
    source.ty.shape.get(dim).ok_or_else(|| format!("operand {operand} has no dim {dim}"))
}

/// The operation of `step`'s value with the attributes that hold on `rank`, which holds `own` of it.
fn localise(program: &Spmd, node: &Node, step: &Step, own: &[Run], rank: usize) -> Result<Op, String> {
    let operand_run = |operand: usize, dim: usize| -> Result<Run, String> {
        let arg = step.args.get(operand).ok_or("an operand is missing")?;
        let source = program.steps.get(arg.index()).ok_or("an operand is not a step")?;
        run_of(&held(program, source, rank)?, dim).cloned()
    };
    let shape = || own.iter().map(|r| r.length.clone()).collect::<Vec<Dim>>();
    Ok(match &node.op {
        Op::Weight(expr) => {
            let mut slice = expr.clone();
            for (axis, (start, length)) in constant_runs(own)?.into_iter().enumerate() {
                if slice.shape().get(axis) != Some(&length) || start != 0 {
                    slice = slice.slice(axis, start, length).map_err(|e| e.to_string())?;
                }
            }
            Op::Weight(slice)
        }
        Op::Literal(literal) => {
            Op::Literal(Literal(Arc::new(slice_literal(&literal.0, &constant_runs(own)?)?)))
        }
        Op::Iota { start, .. } => {
            let run = run_of(own, 0)?;
            Op::Iota { start: start + &run.start, length: run.length.clone() }
        }
        Op::Broadcast { .. } => Op::Broadcast { shape: shape() },
        Op::Reshape { .. } => Op::Reshape { shape: shape() },
        Op::Gather { axis, window: None } => {
            let table = operand_run(0, *axis)?;
            let extent = extent(program, node, 0, *axis)?;
            let whole = table.start.is_zero() && table.length == *extent;
            let window = TableWindow { start: table.start, extent: extent.clone() };
            Op::Gather { axis: *axis, window: (!whole).then_some(window) }
        }
        Op::Attention { scale, softcap, kv_of_head, empty_rows_zero } => {
            let kv_of_head = local_heads(kv_of_head, run_of(own, 1)?, &operand_run(1, 1)?)?;
            Op::Attention { scale: *scale, softcap: *softcap, kv_of_head, empty_rows_zero: *empty_rows_zero }
        }
        Op::Conv { groups: 1, .. } => node.op.clone(),
        Op::Conv { window, groups } => {
            let global = extent(program, node, 1, 0)?.as_size().ok_or("symbolic channels")?;
            let (_, channels) = constant_run(run_of(own, 1)?)?;
            // Whole groups are dealt out, so the share of channels is the share of groups; or parts of one group.
            let share = groups.checked_mul(channels).ok_or("too many channels")?;
            Op::Conv { window: window.clone(), groups: (share / global.max(1)).max(1) }
        }
        op => op.clone(),
    })
}

/// The entries of the map from heads to KV heads for the heads a rank holds, counted from the first KV head it holds.
fn local_heads(kv_of_head: &[u32], heads: &Run, keys: &Run) -> Result<Vec<u32>, String> {
    let (heads, keys) = (constant_run(heads)?, constant_run(keys)?);
    let own = kv_of_head.get(heads.0..heads.0.saturating_add(heads.1));
    let own =
        own.ok_or_else(|| format!("there are {} heads, not {}", kv_of_head.len(), heads.0 + heads.1))?;
    own.iter()
        .map(|&head| {
            (head as usize)
                .checked_sub(keys.0)
                .filter(|&local| local < keys.1)
                .map(|local| local as u32)
                .ok_or_else(|| format!("KV head {head} is on another rank"))
        })
        .collect()
}

fn constant_run(run: &Run) -> Result<(usize, usize), String> {
    match (run.start.as_size(), run.length.as_size()) {
        (Some(start), Some(length)) => Ok((start, length)),
        _ => Err(format!("the symbolic run {} + {} of a constant", run.start, run.length)),
    }
}

fn constant_runs(runs: &[Run]) -> Result<Vec<(usize, usize)>, String> {
    runs.iter().map(constant_run).collect()
}

/// The hyper-rectangle `runs` of a literal.
fn slice_literal(tensor: &Tensor, runs: &[(usize, usize)]) -> Result<Tensor, String> {
    let inside =
        |(&extent, run): (&usize, &(usize, usize))| run.0.checked_add(run.1).is_some_and(|end| end <= extent);
    if tensor.shape().len() != runs.len() || !tensor.shape().iter().zip(runs).all(inside) {
        return Err(format!("{runs:?} is no part of a literal of shape {:?}", tensor.shape()));
    }
    if tensor.shape().iter().zip(runs).all(|(&extent, &run)| run == (0, extent)) {
        return Ok(tensor.clone());
    }
    if tensor.dtype().is_packed() {
        return Err(format!("a literal of the packed type {} cannot be split", tensor.dtype()));
    }
    let width = tensor.dtype().bits() / 8;
    let bytes = tensor.data().to_le_bytes();
    let shape: Vec<usize> = runs.iter().map(|r| r.1).collect();
    let count: usize = shape.iter().product();
    let mut picked = Vec::with_capacity(count * width);
    for flat in 0..count {
        let (mut rest, mut offset, mut stride) = (flat, 0, 1);
        for (&(start, length), &extent) in runs.iter().zip(tensor.shape()).rev() {
            offset += (start + rest % length) * stride;
            rest /= length;
            stride *= extent;
        }
        let element = bytes.get(offset * width..(offset + 1) * width);
        picked.extend_from_slice(element.ok_or("a literal is shorter than its shape")?);
    }
    Tensor::from_le_bytes(tensor.dtype(), shape, &picked).map_err(|e| e.to_string())
}
