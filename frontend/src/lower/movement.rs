//! Moving values without computing: reshape, transpose, slice, concatenate, broadcast, pick. Known values are moved here,
//! weights move inside their expression, and data becomes an operation of the graph.

use super::context::{Lowered, Lowering, invalid, unsupported};
use super::elementwise::broadcast_map;
use super::value::{Affine, Element, Grid, Known, Value, strides_of, unflatten};
use std::sync::Arc;
use tpshard_ir::weight::WeightExpr;
use tpshard_ir::{Dim, Op, ValueId};

/// An axis as ONNX gives it, counted from the end if negative.
pub(crate) fn axis_of(axis: i64, rank: usize) -> Lowered<usize> {
    let signed = if axis < 0 { axis.saturating_add(i64::try_from(rank).unwrap_or(i64::MAX)) } else { axis };
    usize::try_from(signed)
        .ok()
        .filter(|&at| at < rank)
        .ok_or_else(|| invalid(format!("axis {axis} of a tensor of rank {rank}")))
}

/// Several axes, each once, ascending.
pub(crate) fn axes_of(axes: &[i64], rank: usize) -> Lowered<Vec<usize>> {
    let mut found = axes.iter().map(|&axis| axis_of(axis, rank)).collect::<Lowered<Vec<usize>>>()?;
    found.sort_unstable();
    if found.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err(invalid(format!("the axes {axes:?} name one of {rank} twice")));
    }
    Ok(found)
}

fn sizes(dims: &[Dim]) -> Option<Vec<usize>> {
    dims.iter().map(Dim::as_size).collect()
}

impl Lowering<'_> {
    /// The same elements under another shape of as many elements.
    pub(crate) fn reshape_value(&mut self, value: &Value, shape: &[Dim]) -> Lowered<Value> {
        let shape = self.current_all(shape);
        if self.shape(value) == shape {
            return Ok(value.clone());
        }
        let constant = sizes(&shape);
        if let (Value::Known(known), Some(to)) = (value, &constant)
            && tpshard_ir::tensor::element_count(to) == Some(known.elements.len())
        {
            let source = known.source.as_ref().and_then(|source| source.reshape(to.clone()).ok());
            return Ok(Value::Known(Arc::new(Known { shape: to.clone(), source, ..(**known).clone() })));
        }
        if let (Value::Weight(expr), Some(to)) = (value, &constant)
            && let Ok(expr) = expr.reshape(to.clone())
        {
            return Ok(Value::Weight(expr));
        }
        if let Value::Affine(affine) = value
            && let Some(affine) = affine.reshape(&shape)
        {
            return Ok(Value::Affine(Arc::new(affine)));
        }
        let data = self.data(value)?;
        self.equal_elements(data, &shape)?;
        Ok(Value::Data(self.reshape(data, &shape)?))
    }

    /// Makes the element counts of `value` and `shape` equal, unifying sizes where they differ.
    fn equal_elements(&mut self, value: ValueId, shape: &[Dim]) -> Lowered<()> {
        let from = self.graph.ty(value).shape.clone();
        let matching = from.iter().zip(shape).filter(|(a, b)| !a.is_one() && !b.is_one());
        let positions: Vec<(Dim, Dim)> = matching.map(|(a, b)| (a.clone(), b.clone())).collect();
        let mut left = Dim::product(&from);
        let mut right = Dim::product(shape);
        if left == right {
            return Ok(());
        }
        // Dims in the same place are equal, if each is one symbol; then what is left after common factors.
        for (a, b) in positions {
            let (a, b) = (self.current(&a), self.current(&b));
            if a != b && a.as_symbol().is_some() && b.as_symbol().is_some() {
                self.unify(&a, &b)?;
            }
            left = self.current(&left);
            right = self.current(&right);
            if left == right {
                return Ok(());
            }
        }
        for dim in self.current_all(shape) {
            if dim.is_zero() {
                continue;
            }
            if let (Some(a), Some(b)) = (left.exact_div(&dim), right.exact_div(&dim)) {
                (left, right) = (a, b);
            }
        }
        self.unify(&left, &right)
    }

    pub(crate) fn transpose_value(&mut self, value: &Value, perm: &[usize]) -> Lowered<Value> {
        if perm.iter().enumerate().all(|(at, &axis)| at == axis) {
            return Ok(value.clone());
        }
        match value {
            Value::Known(known) if perm.len() == known.shape.len() => {
                let shape: Vec<usize> =
                    perm.iter().filter_map(|&axis| known.shape.get(axis).copied()).collect();
                let strides = strides_of(&known.shape);
                let map: Vec<usize> = (0..known.elements.len())
                    .map(|flat| {
                        let index = unflatten(flat, &shape);
                        perm.iter()
                            .zip(index)
                            .map(|(&axis, i)| i * strides.get(axis).copied().unwrap_or(0))
                            .sum()
                    })
                    .collect();
                let moved = known.rearranged(shape, &map).ok_or_else(|| invalid("a wrong permutation"))?;
                let source = known.source.as_ref().and_then(|source| source.transpose(perm.to_vec()).ok());
                return Ok(Value::Known(Arc::new(Known { source, ..moved })));
            }
            Value::Weight(expr) => {
                if let Ok(expr) = expr.transpose(perm.to_vec()) {
                    return Ok(Value::Weight(expr));
                }
            }
            Value::Affine(affine) => {
                if let Some(affine) = affine.transpose(perm) {
                    return Ok(Value::Affine(Arc::new(affine)));
                }
            }
            _ => {}
        }
        let data = self.data(value)?;
        Ok(Value::Data(self.transpose(data, perm)?))
    }

    /// `length` entries of `axis` from `start` in steps.
    pub(crate) fn slice_value(
        &mut self,
        value: &Value,
        axis: usize,
        start: &Dim,
        length: &Dim,
        step: i64,
    ) -> Lowered<Value> {
        if start.is_zero() && step == 1 && self.shape(value).get(axis) == Some(length) {
            return Ok(value.clone());
        }
        match (value, start.as_size(), length.as_size()) {
            (Value::Known(known), Some(start), Some(length)) => {
                let moved = slice_known(known, axis, start, length, step);
                let moved = moved.ok_or_else(|| invalid(format!("a slice beyond {:?}", known.shape)))?;
                return Ok(Value::Known(Arc::new(moved)));
            }
            (Value::Weight(expr), Some(start), Some(length)) if step == 1 => {
                if let Ok(expr) = expr.slice(axis, start, length) {
                    return Ok(Value::Weight(expr));
                }
            }
            (Value::Affine(affine), _, _) if axis < affine.shape.len() => {
                let mut moved = (**affine).clone();
                moved.offset = &moved.offset + &(start * &moved.strides[axis]);
                moved.strides[axis] = &moved.strides[axis] * &Dim::constant(step);
                moved.shape[axis] = length.clone();
                return Ok(Value::Affine(Arc::new(moved)));
            }
            _ => {}
        }
        let data = self.data(value)?;
        Ok(Value::Data(self.slice(data, axis, start.clone(), length.clone(), step)?))
    }

    /// One entry of `axis`, which goes away.
    pub(crate) fn pick(&mut self, value: &Value, axis: usize, at: &Dim) -> Lowered<Value> {
        let one = self.slice_value(value, axis, at, &Dim::constant(1), 1)?;
        let mut shape = self.shape(&one);
        shape.remove(axis);
        self.reshape_value(&one, &shape)
    }

    pub(crate) fn concat_values(&mut self, values: &[Value], axis: usize) -> Lowered<Value> {
        if let [one] = values {
            return Ok(one.clone());
        }
        self.same_off_axis(values, axis)?;
        // Empty operands add nothing.
        let nonempty = |value: &&Value| !self.shape(value).get(axis).is_some_and(Dim::is_zero);
        let kept: Vec<Value> = values.iter().filter(nonempty).cloned().collect();
        if let [one] = kept.as_slice() {
            return Ok(one.clone());
        }
        if kept.iter().all(|value| matches!(value, Value::Known(_)))
            && let Some(known) = self.concat_known(&kept, axis)
        {
            return Ok(Value::Known(Arc::new(known)));
        }
        let weights: Option<Vec<WeightExpr>> = kept
            .iter()
            .map(|value| match value {
                Value::Weight(expr) => Some(expr.clone()),
                Value::Known(known) => known.source.clone(),
                _ => None,
            })
            .collect();
        if let Some(weights) = weights
            && let Ok(expr) = WeightExpr::concat(weights, axis)
        {
            return Ok(Value::Weight(expr));
        }
        if let Some(grid) = self.grid(&kept, axis) {
            return Ok(Value::Grid(Arc::new(grid)));
        }
        let mut data = Vec::with_capacity(kept.len());
        for value in if kept.is_empty() { values } else { &kept } {
            data.push(self.data(value)?);
        }
        Ok(Value::Data(self.add(Op::Concat { axis }, &data)?))
    }

    /// Unifies the dims off the axis of what is joined.
    fn same_off_axis(&mut self, values: &[Value], axis: usize) -> Lowered<()> {
        let Some(first) = values.first() else { return Err(invalid("nothing to concatenate")) };
        let rank = self.shape(first).len();
        if axis >= rank {
            return Err(invalid(format!("axis {axis} of a tensor of rank {rank}")));
        }
        for value in values {
            for at in (0..rank).filter(|&at| at != axis) {
                let (a, b) = (self.shape(first), self.shape(value));
                if b.len() != rank {
                    return Err(invalid(format!("tensors of rank {rank} and {} are joined", b.len())));
                }
                self.unify(&a[at], &b[at])?;
            }
        }
        Ok(())
    }

    fn concat_known(&mut self, values: &[Value], axis: usize) -> Option<Known> {
        let knowns: Vec<&Arc<Known>> = values
            .iter()
            .filter_map(|value| if let Value::Known(known) = value { Some(known) } else { None })
            .collect();
        let first = knowns.first()?;
        let total = knowns.iter().map(|known| known.elements.len()).sum();
        if knowns.iter().any(|known| known.dtype != first.dtype) || !self.may_fold(total) {
            return None;
        }
        let outer: usize = first.shape[..axis].iter().product();
        let mut elements = Vec::with_capacity(total);
        for row in 0..outer {
            for known in &knowns {
                let run: usize = known.shape[axis..].iter().product();
                elements.extend_from_slice(known.elements.get(row * run..(row + 1) * run)?);
            }
        }
        let mut shape = first.shape.clone();
        shape[axis] = knowns.iter().map(|known| known.shape[axis]).sum();
        let sources: Option<Vec<WeightExpr>> = knowns.iter().map(|known| known.source.clone()).collect();
        let source = sources.and_then(|sources| WeightExpr::concat(sources, axis).ok());
        Some(Known { source, ..Known::new(first.dtype, shape, elements) })
    }

    /// Index grids side by side along a last axis of extent 1 each.
    fn grid(&self, values: &[Value], axis: usize) -> Option<Grid> {
        let parts: Vec<Affine> = values
            .iter()
            .map(|value| match value {
                Value::Affine(affine) => {
                    let (last, lead) = affine.shape.split_last()?;
                    (last.is_one() && lead.len() == axis).then_some(())?;
                    let strides = affine.strides.get(..lead.len())?.to_vec();
                    Some(Affine { shape: lead.to_vec(), strides, ..(**affine).clone() })
                }
                _ => None,
            })
            .collect::<Option<_>>()?;
        let first = parts.first()?;
        if parts.iter().any(|part| part.dtype != first.dtype || part.shape != first.shape) {
            return None;
        }
        let mut shape = first.shape.clone();
        shape.push(Dim::from(parts.len()));
        Some(Grid { dtype: first.dtype, shape, parts })
    }

    /// Stretches to the NumPy broadcast of the value's shape and `shape`.
    pub(crate) fn expand_value(&mut self, value: &Value, shape: &[Dim]) -> Lowered<Value> {
        let (value, shape) = self.stretched_for(value, shape)?;
        let value = &value;
        let target = self.broadcast_shapes(&[self.shape(value), shape])?;
        let from = self.shape(value);
        if from == target {
            return Ok(value.clone());
        }
        if let Value::Affine(affine) = value {
            let current = Affine {
                shape: self.current_all(&affine.shape),
                offset: self.current(&affine.offset),
                strides: self.current_all(&affine.strides),
                dtype: affine.dtype,
            };
            if let Some(affine) = current.broadcast(&target) {
                return Ok(Value::Affine(Arc::new(affine)));
            }
        }
        if let (Value::Known(known), Some(to)) = (value, sizes(&target))
            && tpshard_ir::tensor::element_count(&to).is_some_and(|count| self.may_fold(count))
            && let Some(known) = known.rearranged(to.clone(), &broadcast_map(&known.shape, &to))
        {
            return Ok(Value::Known(Arc::new(known)));
        }
        let data = self.data(value)?;
        Ok(Value::Data(self.broadcast(data, &target)?))
    }

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
        // How many leading dims of the source were flattened into the first.
        let Some(lead) = (0..=from.len()).find(|&lead| {
            Dim::product(&from[..lead]) == flat[0] && Dim::product(&from[lead..]) == Dim::product(&flat[1..])
        }) else {
            return Ok(None);
        };
        if !affine.offset.is_zero() {
            return Ok(None);
        }
        let mut parts = Vec::with_capacity(lead);
        let mut used = 0;
        for dim in 0..lead {
            let stride = Dim::product(&from[dim + 1..lead]);
            let axis = affine.strides.iter().position(|own| *own == stride);
            used += usize::from(axis.is_some());
            parts.push((Dim::constant(0), axis));
        }
        if used != affine.strides.iter().filter(|stride| !stride.is_zero()).count() {
            return Ok(None);
        }
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
            if offset.is_zero() && extent != length && extent.as_symbol().is_some() {
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

fn slice_known(known: &Known, axis: usize, start: usize, length: usize, step: i64) -> Option<Known> {
    let extent = *known.shape.get(axis)?;
    let mut shape = known.shape.clone();
    shape[axis] = length;
    let count = tpshard_ir::tensor::element_count(&shape)?;
    if length > 0 {
        let last =
            i64::try_from(length - 1).ok()?.checked_mul(step)?.checked_add(i64::try_from(start).ok()?)?;
        (start < extent && (0..i64::try_from(extent).ok()?).contains(&last)).then_some(())?;
    }
    let strides = strides_of(&known.shape);
    let mut map = Vec::with_capacity(count);
    for flat in 0..count {
        let mut index = unflatten(flat, &shape);
        let moved =
            i64::try_from(index[axis]).ok()?.checked_mul(step)?.checked_add(i64::try_from(start).ok()?)?;
        index[axis] = usize::try_from(moved).ok()?;
        map.push(index.iter().zip(&strides).map(|(i, stride)| i * stride).sum());
    }
    let source =
        known.source.as_ref().filter(|_| step == 1).and_then(|source| source.slice(axis, start, length).ok());
    Some(Known { source, ..known.rearranged(shape, &map)? })
}

impl Lowering<'_> {
    /// A constant-filled tensor of any size: a stretched scalar.
    pub(crate) fn filled(&mut self, scalar: Known, shape: &[Dim]) -> Lowered<Value> {
        if shape.iter().any(|dim| dim.as_const().is_some_and(|value| value < 0)) {
            return Err(invalid(format!("a tensor of shape {shape:?}")));
        }
        self.expand_value(&Value::Known(Arc::new(scalar)), shape)
    }

    /// `axis` cut into consecutive pieces of the given lengths.
    pub(crate) fn split_value(&mut self, value: &Value, axis: usize, lengths: &[Dim]) -> Lowered<Vec<Value>> {
        let mut start = Dim::constant(0);
        let mut pieces = Vec::with_capacity(lengths.len());
        for length in lengths {
            pieces.push(self.slice_value(value, axis, &start, length, 1)?);
            start = &start + length;
        }
        Ok(pieces)
    }

    /// A known rank-1 value of sizes.
    pub(crate) fn sizes_value(&self, dims: &[Dim]) -> Value {
        Value::Known(Arc::new(Known::sizes(dims)))
    }

    /// A known scalar.
    pub(crate) fn number_value(&self, dtype: tpshard_ir::DType, value: f64) -> Lowered<Value> {
        let element = if dtype.is_float() {
            let rounded = super::value::round_to(dtype, value);
            Element::Float(rounded.ok_or_else(|| unsupported(format!("arithmetic on {dtype}")))?)
        } else {
            Element::int(value as i64)
        };
        Ok(Value::Known(Arc::new(Known::scalar(dtype, element))))
    }
}
