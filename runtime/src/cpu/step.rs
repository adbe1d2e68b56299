//! What all executors do alike for one step of a program: leaves, checks of what was made, and what stands in for a value
//! that could not be made.

use super::convert::StepError;
use super::kernels::Context;
use super::value::Value;
use tpshard_ir::dim::Bindings;
use tpshard_ir::{Graph, Op, Tensor, ValueId};

/// A step that failed.
pub(crate) enum Failed {
    Step(String),
    /// The inputs hold an index that is not below `extent`.
    Index {
        node: String,
        index: i64,
        extent: i64,
    },
}

impl std::fmt::Display for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Failed::Step(what) => f.write_str(what),
            Failed::Index { node, index, extent } => {
                write!(f, "{node}: index {index} is outside of a table of {extent}")
            }
        }
    }
}

/// An output of a run, as this rank holds it.
pub(crate) enum Held {
    Here(Value),
    /// In the memory of the state that the run was given, which now has so many entries.
    InState {
        length: usize,
    },
}

/// A value that needs no operands and no input.
pub(crate) fn leaf(context: &Context<'_>, op: &Op) -> Result<Value, String> {
    match op {
        Op::Literal(literal) => Ok(Value::shared(literal.0.clone())),
        Op::Size(dim) => Ok(Value::new(Tensor::scalar(context.dim(dim)?))),
        Op::Iota { start, length } => {
            let (start, length) = (context.dim(start)?, context.size(length)?);
            let elements: Vec<i64> = (0..length as i64).map(|i| start.wrapping_add(i)).collect();
            Value::from_vec(&[length], elements)
        }
        other => Err(format!("{} is not there", other.name())),
    }
}

/// What is said of a step that failed.
pub(crate) fn describe(graph: &Graph, value: ValueId, error: StepError) -> Failed {
    let name = name(graph, value);
    match error {
        StepError::Index { index, extent } => Failed::Index { node: name, index, extent },
        StepError::Local(what) => Failed::Step(format!("{name}: {what}")),
        StepError::Collective(error) => Failed::Step(format!("{name}: {error}")),
    }
}

/// A step as messages name it.
pub(crate) fn name(graph: &Graph, value: ValueId) -> String {
    let node = graph.node(value);
    let origin = if node.origin.is_empty() { String::new() } else { format!(" ({})", node.origin) };
    format!("{value} = {}{origin}", node.op.name())
}

/// Zeros in place of a value that could not be computed; nothing if even that is impossible.
pub(crate) fn zeros(graph: &Graph, bindings: &Bindings, value: ValueId) -> Value {
    let ty = graph.ty(value);
    let context = Context { bindings, graph };
    let shape = context.shape(ty).unwrap_or_else(|_| vec![0; ty.rank()]);
    let empty = || Value::from_vec::<f32>(&[0], Vec::new());
    match Tensor::zeros(ty.dtype, shape).map(Value::new) {
        Ok(value) => value,
        Err(_) => empty().unwrap_or_else(|_| Value::new(Tensor::scalar(0f32))),
    }
}

/// Refuses a value that is not of the type its node has, or not of this shape.
pub(crate) fn of_shape(
    graph: &Graph,
    shape: &[usize],
    id: ValueId,
    value: Value,
) -> Result<Value, StepError> {
    let ty = graph.ty(id);
    if value.dtype() == ty.dtype && value.shape() == shape {
        return Ok(value);
    }
    Err(StepError::Local(format!("made {}{:?} instead of {ty}", value.dtype(), value.shape())))
}

/// Refuses a value that is not of the type its node has.
pub(crate) fn checked(
    graph: &Graph,
    bindings: &Bindings,
    id: ValueId,
    value: Value,
) -> Result<Value, StepError> {
    let shape = Context { bindings, graph }.shape(graph.ty(id))?;
    of_shape(graph, &shape, id, value)
}
