//! Operations without a kernel of their own: the reference interpreter, which is right and slow.

use super::value::Value;
use std::sync::Arc;
use tpshard_ir::Tensor;
use tpshard_ir::dim::Bindings;
use tpshard_ir::graph::Node;
use tpshard_ir::interp::{DEFAULT_ELEMENT_LIMIT, eval_tensors};
use tpshard_ir::tensor::element_count;

/// The node applied to `args`; its result has `shape`.
pub(crate) fn evaluate(
    node: &Node,
    args: &[Value],
    bindings: &Bindings,
    shape: &[usize],
) -> Result<Value, String> {
    let tensors = args.iter().map(Value::tensor).collect::<Result<Vec<Arc<Tensor>>, _>>()?;
    let operands: Vec<&Tensor> = tensors.iter().map(AsRef::as_ref).collect();
    // The memory plan has bounded the result already.
    let limit = element_count(shape).unwrap_or(0).max(DEFAULT_ELEMENT_LIMIT);
    eval_tensors(&node.op, &node.ty, &operands, bindings, limit).map(Value::new).map_err(|e| e.to_string())
}
