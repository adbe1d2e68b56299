//! Picking by index where the indices are known or walk dims in order: a view instead of a gather.

use super::context::{Lowered, Lowering, invalid};
use super::value::{Affine, Grid, Known, Value};
use std::sync::Arc;
use tpshard_ir::{Dim, Op, ValueId};

impl Lowering<'_> {
    /// `value[…, indices, …]` along `axis`.
    pub(crate) fn gather_value(&mut self, value: &Value, indices: &Value, axis: usize) -> Lowered<Value> {
        if let Some(result) = self.gather_known(value, indices, axis)? {
            return Ok(result);
        }
        if axis == 0
            && let Some(result) = self.gather_grid(value, indices)?
        {
            return Ok(result);
        }
        let (data, indices) = (self.data(value)?, self.data(indices)?);
        Ok(Value::Data(self.add(Op::Gather { axis, window: None }, &[data, indices])?))
    }

    /// Gathers by indices that are known: from known values, and single or consecutive entries of anything.
    fn gather_known(&mut self, value: &Value, indices: &Value, axis: usize) -> Lowered<Option<Value>> {
        let (Value::Known(_) | Value::Affine(_)) = indices else { return Ok(None) };
        let extent = self.shape(value).get(axis).cloned().unwrap_or_else(|| Dim::constant(1));
        if let Value::Affine(affine) = indices
            && affine.shape.len() == 1
            && affine.strides[0].is_one()
            && affine.offset.is_nonnegative()
        {
            let end = &affine.offset + &affine.shape[0];
            self.assume_at_most(&end, &extent)?;
            return self.slice_value(value, axis, &affine.offset, &affine.shape[0], 1).map(Some);
        }
        let Some(known) = self.known(indices) else { return Ok(None) };
        let mut at = Vec::with_capacity(known.elements.len());
        for element in &known.elements {
            let Some(dim) = element.dim() else { return Err(invalid("indices are not integers")) };
            let from_end = dim.as_const().is_some_and(|value| value < 0);
            at.push(if from_end { &extent + dim } else { dim.clone() });
        }
        for dim in &at {
            let outside = (&extent - dim).as_const().is_some_and(|room| room <= 0);
            if outside || dim.as_const().is_some_and(|value| value < 0) {
                return Err(invalid(format!("index {dim} of an axis of {extent}")));
            }
        }
        let constant: Option<Vec<usize>> = at.iter().map(Dim::as_size).collect();
        if let (Value::Known(table), Some(constant)) = (value, &constant) {
            let moved = self.gather_table(table, constant, &known.shape, axis);
            if let Some(moved) = moved {
                return Ok(Some(Value::Known(Arc::new(moved))));
            }
        }
        if let ([one], true) = (at.as_slice(), known.shape.is_empty()) {
            if one.as_const().is_none() || extent.as_const().is_none() {
                self.assume_at_most(&(one + &Dim::constant(1)), &extent)?;
            }
            return self.pick(value, axis, one).map(Some);
        }
        let consecutive = at.windows(2).all(|pair| (&pair[1] - &pair[0]).is_one());
        if let (1, true, Some(first)) = (known.shape.len(), consecutive, at.first()) {
            return self.slice_value(value, axis, first, &Dim::from(at.len()), 1).map(Some);
        }
        Ok(None)
    }

    fn gather_table(
        &mut self,
        table: &Known,
        at: &[usize],
        index_shape: &[usize],
        axis: usize,
    ) -> Option<Known> {
        let outer: usize = table.shape.get(..axis)?.iter().product();
        let inner: usize = table.shape.get(axis + 1..)?.iter().product();
        let extent = *table.shape.get(axis)?;
        let count = outer.checked_mul(at.len())?.checked_mul(inner)?;
        if !self.may_fold(count) {
            return None;
        }
        let mut map = Vec::with_capacity(count);
        for o in 0..outer {
            for &i in at {
                map.extend((0..inner).map(|k| (o * extent + i) * inner + k));
            }
        }
        let mut shape = table.shape.clone();
        shape.splice(axis..=axis, index_shape.iter().copied());
        table.rearranged(shape, &map)
    }

    /// A gather from flattened leading dims whose indices walk those dims again: a view of the original.
    fn gather_grid(&mut self, value: &Value, indices: &Value) -> Lowered<Option<Value>> {
        let (Value::Data(id), Value::Affine(affine)) = (value, indices) else { return Ok(None) };
        let node = self.graph.node(*id);
        let (Op::Reshape { .. }, [source]) = (&node.op, node.args.as_slice()) else { return Ok(None) };
        let source = *source;
        let from = self.graph.ty(source).shape.clone();
        let flat = self.graph.ty(*id).shape.clone();
        if !affine.offset.is_zero() {
            return Ok(None);
        }
        // How many leading dims of the source were flattened into the first.
        let lead = (0..=from.len()).find(|&lead| {
            Dim::product(&from[..lead]) == flat[0] && Dim::product(&from[lead..]) == Dim::product(&flat[1..])
        });
        let own = lead.and_then(|lead| walked(&from[..lead], affine));
        // The dims that the indices walk may be other ones than those that were flattened.
        let factors = factors_of(&flat[0], affine);
        let other = factors.as_ref().and_then(|factors| walked(factors, affine));
        let (source, parts) = match (own, other, factors) {
            (Some((parts, Fit::Whole)), _, _) => (source, parts),
            (_, Some((parts, Fit::Whole)), Some(mut factors)) => {
                factors.extend(flat[1..].iter().cloned());
                (self.reshape(*id, &factors)?, parts)
            }
            (Some((parts, Fit::Open)), _, _) => (source, parts),
            _ => return Ok(None),
        };
        let picked = self.pick_grid(source, &parts, &affine.shape)?;
        let Some(picked) = picked else { return Ok(None) };
        let mut shape = self.current_all(&affine.shape);
        shape.extend(self.current_all(&flat[1..]));
        Ok(Some(Value::Data(self.reshape(picked, &shape)?)))
    }

    /// `GatherND` by an index grid, each part of which walks one dim.
    pub(crate) fn gather_nd_grid(&mut self, value: &Value, grid: &Grid) -> Lowered<Option<Value>> {
        let mut parts = Vec::with_capacity(grid.parts.len());
        for part in &grid.parts {
            let walked: Vec<usize> =
                (0..part.strides.len()).filter(|&axis| !part.strides[axis].is_zero()).collect();
            match walked.as_slice() {
                [] => parts.push((part.offset.clone(), None)),
                [axis] if part.strides[*axis].is_one() => parts.push((part.offset.clone(), Some(*axis))),
                _ => return Ok(None),
            }
        }
        let Some(first) = grid.parts.first() else { return Ok(None) };
        let data = self.data(value)?;
        Ok(self.pick_grid(data, &parts, &first.shape)?.map(Value::Data))
    }

    /// Slices dim `i` of `source` from `parts[i].0` along grid axis `parts[i].1`, and lays the result out over `shape`
    /// followed by the dims that are not indexed.
    fn pick_grid(
        &mut self,
        source: ValueId,
        parts: &[(Dim, Option<usize>)],
        shape: &[Dim],
    ) -> Lowered<Option<ValueId>> {
        let walked: Vec<usize> = parts.iter().filter_map(|(_, axis)| *axis).collect();
        // The dims must appear in the order of the grid axes; anything else stays a gather.
        if walked.windows(2).any(|pair| pair[0] >= pair[1])
            || parts.iter().any(|(offset, _)| !offset.is_nonnegative())
            || parts.len() > self.graph.ty(source).rank()
        {
            return Ok(None);
        }
        let mut data = source;
        for (dim, (offset, axis)) in parts.iter().enumerate() {
            let extent = self.graph.ty(data).shape[dim].clone();
            let length = axis.and_then(|axis| shape.get(axis)).cloned().unwrap_or_else(|| Dim::constant(1));
            let length = self.current(&length);
            if axis.is_some() && offset.is_zero() && extent != length && extent.as_symbol().is_some() {
                self.unify(&extent, &length)?;
            } else {
                self.assume_at_most(&(offset + &length), &extent)?;
            }
            let (offset, length) = (self.current(offset), self.current(&length));
            data = self.slice(data, dim, offset, length, 1)?;
        }
        let mut laid: Vec<Dim> = shape
            .iter()
            .enumerate()
            .map(|(axis, dim)| if walked.contains(&axis) { dim.clone() } else { Dim::constant(1) })
            .collect();
        let rest = self.graph.ty(data).shape[parts.len()..].to_vec();
        laid.extend(rest.iter().cloned());
        let data = self.reshape(data, &laid)?;
        let full: Vec<Dim> = shape.iter().chain(&rest).cloned().collect();
        self.broadcast(data, &full).map(Some)
    }
}

/// Of each dim where its index starts, and which axis of the indices walks it.
type Parts = Vec<(Dim, Option<usize>)>;

/// How indices that walk dims meet the extents of those.
#[derive(Clone, Copy, PartialEq)]
enum Fit {
    /// Every dim is walked to its end.
    Whole,
    /// Sizes decide whether all indices are inside.
    Open,
}

/// For each of `dims` where its index starts and which axis of `indices` walks it; `None` if that is not all that the
/// indices do, or if some are outside.
fn walked(dims: &[Dim], indices: &Affine) -> Option<(Parts, Fit)> {
    let mut parts = Vec::with_capacity(dims.len());
    let (mut used, mut fit) = (0, Fit::Whole);
    for (at, extent) in dims.iter().enumerate() {
        let stride = Dim::product(&dims[at + 1..]);
        let axis = indices.strides.iter().position(|own| *own == stride);
        if let Some(axis) = axis {
            let length = indices.shape.get(axis)?;
            if (length - extent - Dim::constant(1)).is_nonnegative() {
                return None;
            }
            if length != extent {
                fit = Fit::Open;
            }
            used += 1;
        }
        parts.push((Dim::constant(0), axis));
    }
    (used == indices.strides.iter().filter(|stride| !stride.is_zero()).count()).then_some((parts, fit))
}

/// Dims of the product `whole` whose row-major strides are those of the indices, if their axes are in that order.
fn factors_of(whole: &Dim, indices: &Affine) -> Option<Vec<Dim>> {
    let mut rest = whole.clone();
    let mut factors = Vec::new();
    for stride in indices.strides.iter().filter(|stride| !stride.is_zero()) {
        factors.push(rest.exact_div(stride)?);
        rest = stride.clone();
    }
    rest.is_one().then_some(factors)
}
