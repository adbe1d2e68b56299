//! Typed SPMD programs: one program for a family of ranks.
//!
//! A program refers to a logical graph. Every step makes the family of one logical value in one layout, either by
//! computing the value's operation on operand families, or by converting a family of the same value to another
//! layout. The layouts are types: a program is right if every step is a valid square or conversion, so the list of
//! steps is its own certificate. [`instantiate`] gives the graph that one rank executes.

use crate::dim::Dim;
use crate::graph::{Graph, Node, Output, Type, ValueId};
use crate::layout::{Layout, Mesh, Run, local_runs};
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
/// A step whose layouts admit no local operation; a verified program has none.
pub fn instantiate(program: &Spmd, rank: usize) -> Result<Graph, InstantiateError> {
    let mut local = Graph::new(&program.logical.name);
    local.symbols.clone_from(&program.logical.symbols);
    local.guards.clone_from(&program.logical.guards);
    local.states.clone_from(&program.logical.states);
    for (i, step) in program.steps.iter().enumerate() {
        let node = program.logical.node(step.value);
        let error = |what: String| InstantiateError {
            step: StepId(i as u32),
            op: node.op.name().into(),
            layout: step.layout.to_string(),
            rank,
            what,
        };
        let op = match &step.kind {
            StepKind::Convert(conversion) => Op::Convert(conversion.clone()),
            StepKind::Compute => localise(program, step, rank).map_err(error)?,
        };
        let runs = local_runs(&node.ty.shape, &step.layout, &program.mesh, rank);
        let ty = Type::new(node.ty.dtype, runs.into_iter().map(|r| r.length).collect());
        let args = step.args.iter().map(|a| ValueId(a.0)).collect();
        local.push(Node { op, args, ty, origin: node.origin.clone() });
    }
    local.outputs =
        program.outputs.iter().map(|o| Output { name: o.name.clone(), value: ValueId(o.step.0) }).collect();
    Ok(local)
}

/// The operation of `step`'s value with the attributes that hold on `rank`.
fn localise(program: &Spmd, step: &Step, rank: usize) -> Result<Op, String> {
    let node = program.logical.node(step.value);
    let own = local_runs(&node.ty.shape, &step.layout, &program.mesh, rank);
    let operand_runs = |i: usize| -> Result<Vec<Run>, String> {
        let arg = step.args.get(i).ok_or("an operand is missing")?;
        let source = program.steps.get(arg.index()).ok_or("an operand is not a step")?;
        let ty = program.logical.ty(source.value);
        Ok(local_runs(&ty.shape, &source.layout, &program.mesh, rank))
    };
    let shape = || own.iter().map(|r| r.length.clone()).collect::<Vec<Dim>>();
    Ok(match &node.op {
        Op::Weight(expr) => {
            let mut slice = expr.clone();
            for (axis, (start, length)) in constant_runs(&own)?.into_iter().enumerate() {
                if (start, length) != (0, slice.shape()[axis]) {
                    slice = slice.slice(axis, start, length).map_err(|e| e.to_string())?;
                }
            }
            Op::Weight(slice)
        }
        Op::Literal(literal) => {
            Op::Literal(Literal(Arc::new(slice_literal(&literal.0, &constant_runs(&own)?)?)))
        }
        Op::Iota { start, .. } => Op::Iota { start: start + &own[0].start, length: own[0].length.clone() },
        Op::Broadcast { .. } => Op::Broadcast { shape: shape() },
        Op::Reshape { .. } => Op::Reshape { shape: shape() },
        Op::Gather { axis, window: None } => {
            let table = &operand_runs(0)?[*axis];
            let extent = &program.logical.ty(node.args[0]).shape[*axis];
            let whole = table.start.is_zero() && table.length == *extent;
            let window = TableWindow { start: table.start.clone(), extent: extent.clone() };
            Op::Gather { axis: *axis, window: (!whole).then_some(window) }
        }
        Op::Attention { scale, softcap, kv_of_head, empty_rows_zero } => {
            let heads = constant_run(&own[1])?;
            let keys = constant_run(&operand_runs(1)?[1])?;
            let kv_of_head = kv_of_head[heads.0..heads.0 + heads.1]
                .iter()
                .map(|&h| {
                    (h as usize)
                        .checked_sub(keys.0)
                        .filter(|&h| h < keys.1)
                        .map(|h| h as u32)
                        .ok_or_else(|| format!("KV head {h} is on another rank"))
                })
                .collect::<Result<Vec<u32>, String>>()?;
            Op::Attention { scale: *scale, softcap: *softcap, kv_of_head, empty_rows_zero: *empty_rows_zero }
        }
        Op::Conv { window, groups } => {
            let global = program.logical.ty(node.args[1]).shape[0].as_size().ok_or("symbolic channels")?;
            let (_, channels) = constant_run(&own[1])?;
            // Only whole groups are dealt out, so the share of channels is the share of groups.
            let groups = if *groups == 1 { 1 } else { groups * channels / global.max(1) };
            Op::Conv { window: window.clone(), groups: groups.max(1) }
        }
        op => op.clone(),
    })
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
        for axis in (0..runs.len()).rev() {
            offset += (runs[axis].0 + rest % shape[axis]) * stride;
            rest /= shape[axis];
            stride *= tensor.shape()[axis];
        }
        picked.extend_from_slice(&bytes[offset * width..(offset + 1) * width]);
    }
    Tensor::from_le_bytes(tensor.dtype(), shape, &picked).map_err(|e| e.to_string())
}
