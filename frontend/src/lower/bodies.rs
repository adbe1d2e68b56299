//! What a loop gives its body: as many values as the body takes, of the ranks that it declares. Found at import, so that a
//! model which can never run does not wait until it does.

use super::symbols::never_equal;
use super::{Lowered, Lowering, Value, axis_of, invalid};
use crate::model::{Graph, Node, ValueInfo};
use tpshard_ir::Dim;

impl Lowering<'_> {
    /// Refuses a Loop or Scan whose body does not fit its operands.
    pub(super) fn check_body(&self, node: &Node, inputs: &[Option<Value>]) -> Lowered<()> {
        match (node.domain.as_str(), node.op_type.as_str()) {
            ("", "Loop") => {
                // The round and the condition come first in both.
                takes(node.attributes().required_graph("body")?, inputs.len().max(2), "Loop")
            }
            ("", "Scan") => self.check_scan(node, inputs),
            _ => Ok(()),
        }
    }

    fn check_scan(&self, node: &Node, inputs: &[Option<Value>]) -> Lowered<()> {
        let attributes = node.attributes();
        let body = attributes.required_graph("body")?;
        // Up to opset 8 the lengths of the sequences come first, and every operand has a dim for the batch.
        let batched = usize::from(node.opset < 9);
        let given = inputs.get(batched..).unwrap_or_default();
        takes(body, given.len(), "Scan")?;
        let scanned = attributes.required_int("num_scan_inputs")?;
        let states = usize::try_from(scanned).ok().and_then(|scanned| given.len().checked_sub(scanned));
        let states = states.ok_or_else(|| invalid(format!("num_scan_inputs is {scanned}")))?;
        let axes = attributes.optional_ints("scan_input_axes")?;
        let mut steps: Option<Dim> = None;
        for (index, (value, info)) in given.iter().zip(&body.inputs).enumerate() {
            let Some(value) = value else { continue };
            let mut shape = self.shape(value).split_off(batched.min(self.shape(value).len()));
            if let Some(sequence) = index.checked_sub(states) {
                let axis = axes.and_then(|axes| axes.get(sequence)).copied().unwrap_or(0);
                let own = shape.remove(axis_of(axis, shape.len())?);
                let first = steps.get_or_insert_with(|| own.clone());
                if never_equal(first, &own) {
                    let message = format!("scan input {sequence} has {own} steps, the first one {first}");
                    return Err(invalid(message));
                }
            }
            if let Some(rank) = declared_rank(info).filter(|&rank| rank != shape.len()) {
                let found = shape.len();
                let message =
                    format!("input {index} of the body is declared with rank {rank}, given {found}");
                return Err(invalid(message));
            }
        }
        Ok(())
    }
}

fn takes(body: &Graph, given: usize, what: &str) -> Lowered<()> {
    let found = body.inputs.len();
    if found == given {
        return Ok(());
    }
    Err(invalid(format!("the body takes {found} inputs, the {what} gives it {given}")))
}

/// Exporters write no dims where they know none.
fn declared_rank(info: &ValueInfo) -> Option<usize> {
    let rank = info.tensor_type()?.shape.as_ref()?.len();
    (rank > 0).then_some(rank)
}
