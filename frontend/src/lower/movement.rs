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
        let values = &*self.same_off_axis(values, axis)?;
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

    /// What is joined, with equal dims off the axis.
    fn same_off_axis(&mut self, values: &[Value], axis: usize) -> Lowered<Vec<Value>> {
        let Some(first) = values.first() else { return Err(invalid("nothing to concatenate")) };
        let rank = self.shape(first).len();
        if axis >= rank {
            return Err(invalid(format!("axis {axis} of a tensor of rank {rank}")));
        }
        let mut same = Vec::with_capacity(values.len());
        for value in values {
            let mut value = value.clone();
            for at in (0..rank).filter(|&at| at != axis) {
                let (a, b) = (self.shape(first), self.shape(&value));
                if b.len() != rank {
                    return Err(invalid(format!("tensors of rank {rank} and {} are joined", b.len())));
                }
                if let Err(fault) = self.unify(&a[at], &b[at]) {
                    value = self.held_to(&value, at, &a[at], fault)?;
                }
            }
            same.push(value);
        }
        Ok(same)
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
