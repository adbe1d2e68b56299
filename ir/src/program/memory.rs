//! The memory a lowering needs: buffers with lifetimes as size expressions, placed for concrete dims.
//!
//! A buffer lives from the region that writes it to the last region that reads it or a view of it. Buffers whose lives
//! do not overlap share a *slot* of the largest size; slots hold elements of one type. Placing is first come, smallest
//! slot that fits, so that equal dims give equal plans.

use super::lowering::{Kernel, Lowering, Region, Stage};
use crate::dim::{Bindings, Dim, EvalError};
use crate::dtype::DType;
use crate::graph::{Graph, ValueId};
use crate::op::{EinsumSpec, Op};
use std::collections::BTreeMap;

/// What one region writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Buffer {
    pub value: ValueId,
    pub dtype: DType,
    pub elements: Dim,
    /// The region that writes it.
    pub first: usize,
    /// The last region that reads it; the number of regions if it leaves the program.
    pub last: usize,
}

/// Buffers in slots, for concrete dims.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Bytes of every slot.
    pub slots: Vec<u64>,
    /// The slot of every value that has a buffer.
    pub slot_of: Vec<Option<usize>>,
    /// Sum of all slots.
    pub bytes: u64,
}

/// A plan for these dims does not exist.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum PlanError {
    #[error("the size of {value}: {error}")]
    Dim { value: ValueId, error: EvalError },
    #[error("{value} would have {elements} elements of {dtype}")]
    Size { value: ValueId, elements: i64, dtype: DType },
    #[error("the buffers together are larger than memory can be addressed")]
    Total,
}

/// For every value, the last region that reads it or a view of it.
pub(super) fn last_uses(lowering: &Lowering, graph: &Graph) -> Vec<usize> {
    let end = lowering.regions.len();
    let mut last = vec![0usize; graph.len()];
    for (index, region) in lowering.regions.iter().enumerate() {
        last[region.result().index()] = index;
        for operand in region.operands(graph) {
            last[operand.index()] = index;
        }
    }
    for output in &graph.outputs {
        last[output.value.index()] = end;
    }
    // A view, or an append in place, keeps what it shows alive.
    for region in lowering.regions.iter().rev() {
        if matches!(region.kernel, Kernel::View | Kernel::Append | Kernel::Convert)
            && let Some(&shown) = graph.node(region.result()).args.first()
        {
            last[shown.index()] = last[shown.index()].max(last[region.result().index()]);
        }
    }
    last
}

/// Buffers of a lowering, in the order they are written.
pub(super) fn buffers(lowering: &Lowering, graph: &Graph) -> Vec<Buffer> {
    let last = last_uses(lowering, graph);
    let row_major = row_major_values(lowering, graph);
    let written = |(index, region): (usize, &Region)| {
        // Inputs belong to the caller; views are not written at all unless strides cannot say them.
        let writes = region.stage == Stage::Step
            && region.kernel != Kernel::Leaf
            && !is_free(graph, region, &row_major);
        writes.then(|| {
            let value = region.result();
            let ty = graph.ty(value);
            let last = last[value.index()];
            Buffer { value, dtype: ty.dtype, elements: ty.elements(), first: index, last }
        })
    };
    lowering.regions.iter().enumerate().filter_map(written).collect()
}

/// True for views that never copy.
fn is_free(graph: &Graph, region: &Region, row_major: &[bool]) -> bool {
    let node = graph.node(region.result());
    let whole = node.args.first().is_some_and(|a| row_major[a.index()]);
    region.kernel == Kernel::View && (whole || !node.op.is_view())
}

/// Which values certainly lie in row-major order.
fn row_major_values(lowering: &Lowering, graph: &Graph) -> Vec<bool> {
    let mut is = vec![false; graph.len()];
    for region in &lowering.regions {
        let node = graph.node(region.result());
        is[region.result().index()] = match (region.kernel, &node.op) {
            // A reshape that cannot be a view makes a copy.
            (Kernel::View, Op::Reshape { .. }) => true,
            (Kernel::View | Kernel::Softmax | Kernel::Leaf, _) => false,
            (Kernel::Append, _) => false,
            (_, Op::Einsum(spec)) => is_ordered(spec),
            _ => true,
        };
    }
    is
}

/// True if the result's letters are those of the batch, then those of one operand, then those of the other.
fn is_ordered(spec: &EinsumSpec) -> bool {
    let [a, b] = spec.inputs.as_slice() else { return false };
    let group = |l: &u8| match (a.contains(l), b.contains(l)) {
        (true, true) => 0,
        (true, false) => 1,
        _ => 2,
    };
    let mut groups: Vec<u8> = spec.output.iter().map(group).collect();
    groups.dedup();
    matches!(groups.as_slice(), [] | [_] | [0, _] | [1, 2] | [2, 1] | [0, 1, 2] | [0, 2, 1])
}

struct Slot {
    dtype: DType,
    bytes: u64,
    /// The region after which it is free.
    busy_until: usize,
}

/// Where the buffers lie whose sizes the bindings give; others have no slot.
///
/// # Errors
/// A size that cannot be addressed.
pub fn plan_known(buffers: &[Buffer], bindings: &Bindings) -> Result<MemoryPlan, PlanError> {
    match plan(buffers, bindings) {
        Err(PlanError::Dim { error: EvalError::Unbound(_), .. }) => {}
        all_known => return all_known,
    }
    let known = |b: &&Buffer| !matches!(b.elements.eval(bindings), Err(EvalError::Unbound(_)));
    let known: Vec<Buffer> = buffers.iter().filter(known).cloned().collect();
    plan(&known, bindings)
}

pub(super) fn plan(buffers: &[Buffer], bindings: &Bindings) -> Result<MemoryPlan, PlanError> {
    let mut slots: Vec<Slot> = Vec::new();
    let values = buffers.iter().map(|b| b.value.index() + 1).max().unwrap_or(0);
    let mut slot_of = vec![None; values];
    // Many have the same.
    let mut counts: BTreeMap<&Dim, i64> = BTreeMap::new();
    for buffer in buffers {
        let value = buffer.value;
        let elements = match counts.get(&buffer.elements) {
            Some(&elements) => elements,
            None => {
                let elements = buffer.elements.eval(bindings);
                let elements = elements.map_err(|error| PlanError::Dim { value, error })?;
                counts.insert(&buffer.elements, elements);
                elements
            }
        };
        let bytes = u64::try_from(elements)
            .ok()
            .and_then(|n| buffer.dtype.byte_len(n))
            .filter(|&b| b <= isize::MAX as u64)
            .ok_or(PlanError::Size { value, elements, dtype: buffer.dtype })?;
        let free = |s: &Slot| s.dtype == buffer.dtype && s.busy_until < buffer.first;
        let fits = (0..slots.len())
            .filter(|&i| free(&slots[i]) && slots[i].bytes >= bytes)
            .min_by_key(|&i| slots[i].bytes);
        let grows = || (0..slots.len()).filter(|&i| free(&slots[i])).max_by_key(|&i| slots[i].bytes);
        let at = match fits.or_else(grows) {
            Some(at) => at,
            None => {
                slots.push(Slot { dtype: buffer.dtype, bytes, busy_until: 0 });
                slots.len() - 1
            }
        };
        slots[at].bytes = slots[at].bytes.max(bytes);
        slots[at].busy_until = buffer.last;
        slot_of[value.index()] = Some(at);
    }
    let slots: Vec<u64> = slots.into_iter().map(|s| s.bytes).collect();
    let total = slots.iter().try_fold(0u64, |sum, &b| sum.checked_add(b)).ok_or(PlanError::Total)?;
    Ok(MemoryPlan { slots, slot_of, bytes: total })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::Type;
    use crate::op::Scalar;
    use crate::program::lower;

    #[test]
    fn a_chain_reuses_two_slots_and_scales_with_its_dims() {
        let mut g = Graph::new("chain");
        let mut x = g.input("x", Type::new(DType::F32, vec![Dim::symbol("s"), 4i64.into()]));
        for _ in 0..6 {
            x = g.add(Op::Softmax { axis: 1 }, &[x]).unwrap();
        }
        g.outputs.push(crate::Output { name: "y".into(), value: x });
        let lowering = lower(&g);
        for s in [0, 1, 10] {
            let plan = lowering.plan(&g, &[("s".into(), s)].into()).unwrap();
            assert_eq!(plan.slots.len(), 2);
            assert_eq!(plan.bytes, 2 * 4 * 4 * s as u64);
        }
        let huge = lowering.plan(&g, &[("s".into(), i64::MAX / 4)].into());
        assert!(matches!(huge, Err(PlanError::Size { .. })), "{huge:?}");
        assert!(matches!(lowering.plan(&g, &Bindings::new()), Err(PlanError::Dim { .. })));
    }

    #[test]
    fn a_view_keeps_its_buffer_alive() {
        let mut g = Graph::new("view");
        let x = g.input("x", Type::new(DType::F32, vec![4i64.into(), 4i64.into()]));
        let a = g.add(Op::Softmax { axis: 1 }, &[x]).unwrap();
        let t = g.add(Op::Transpose { perm: vec![1, 0] }, &[a]).unwrap();
        let b = g.add(Op::Softmax { axis: 0 }, &[x]).unwrap();
        let y = g.add(Op::Map(Scalar::Add), &[t, b]).unwrap();
        g.outputs.push(crate::Output { name: "y".into(), value: y });
        let plan = lower(&g).plan(&g, &Bindings::new()).unwrap();
        assert_ne!(plan.slot_of[a.index()], plan.slot_of[b.index()]);
        assert_eq!(plan.slot_of[t.index()], None);
    }
}
