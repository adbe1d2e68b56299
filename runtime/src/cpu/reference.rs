//! Operations without a kernel of their own: the reference interpreter, which is right and slow.

use super::value::Value;
use tpshard_ir::dim::Bindings;
use tpshard_ir::graph::Node;

/// The node applied to `args`; its result has `shape`.
pub(crate) fn evaluate(
    node: &Node,
    _args: &[Value],
    _bindings: &Bindings,
    _shape: &[usize],
) -> Result<Value, String> {
    Err(format!("no kernel for {}", node.op.name()))
}
