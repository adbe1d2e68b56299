//! Named sizes against numbers, where NumPy broadcasting lets one stretch: `s` against 4 may be 4 or 1, and only the
//! inputs of a run say which.
//!
//! The result has 4 entries in both cases, so nothing after it depends on the answer: entry `i` of it is entry
//! `min(i, s - 1)` of the operand, and a guard keeps all other `s` out.

use super::{Lowered, Lowering, Value};
use tpshard_ir::{Dim, Guard, Op, Relation, Scalar, ValueId};

impl Lowering<'_> {
    /// The operands of an elementwise function, with named dims that face a larger number stretched to it.
    pub(super) fn stretched_operands(&mut self, args: &[ValueId]) -> Lowered<Vec<ValueId>> {
        let shapes: Vec<Vec<Dim>> = args.iter().map(|&arg| self.graph.ty(arg).shape.clone()).collect();
        let rank = shapes.iter().map(Vec::len).max().unwrap_or(0);
        let mut args = args.to_vec();
        for from_end in 1..=rank {
            let facing = shapes.iter().filter_map(|shape| dim_from_end(shape, from_end)?.as_const());
            let Some(size) = facing.max().filter(|&size| size > 1) else { continue };
            for (arg, shape) in args.iter_mut().zip(&shapes) {
                if dim_from_end(shape, from_end).is_some_and(|dim| self.may_stretch(dim)) {
                    *arg = self.stretch(*arg, shape.len() - from_end, size)?;
                }
            }
        }
        Ok(args)
    }

    /// As [`Lowering::stretched`], of one value and the shape it is expanded to; the shape with the numbers that its named
    /// dims stand for.
    pub(super) fn stretched_for(&mut self, value: &Value, shape: &[Dim]) -> Lowered<(Value, Vec<Dim>)> {
        let (mut value, mut shape) = (value.clone(), self.current_all(shape));
        let own = self.shape(&value);
        for from_end in 1..=own.len().min(shape.len()) {
            let at = shape.len() - from_end;
            let Some(have) = dim_from_end(&own, from_end) else { continue };
            match (have.as_const(), shape[at].as_const()) {
                (None, Some(size)) if size > 1 && self.may_stretch(have) => {
                    if let Value::Data(id) = value {
                        value = Value::Data(self.stretch(id, own.len() - from_end, size)?);
                    }
                }
                (Some(size), None) if size > 1 && self.may_stretch(&shape[at]) => {
                    let dim = std::mem::replace(&mut shape[at], Dim::constant(size));
                    self.one_or(&dim, size);
                }
                _ => {}
            }
        }
        Ok((value, shape))
    }

    /// Sizes of inputs. What data decides is relied upon instead.
    fn may_stretch(&self, dim: &Dim) -> bool {
        dim.as_symbol().is_some() && !self.symbols.depends_on_data(dim)
    }

    /// `axis`, of a named size that is 1 or `size`, in `size` entries.
    fn stretch(&mut self, value: ValueId, axis: usize, size: i64) -> Lowered<ValueId> {
        let Some(dim) = self.graph.ty(value).shape.get(axis).cloned() else { return Ok(value) };
        self.one_or(&dim, size);
        let steps = self.add(Op::Iota { start: Dim::constant(0), length: Dim::constant(size) }, &[])?;
        let last = self.size(&(dim - Dim::constant(1)))?;
        let rows = self.map(Scalar::Min, &[steps, last])?;
        self.add(Op::Gather { axis, window: None }, &[value, rows])
    }

    /// Relies on `dim` being 1 or `size`: the only values that `min(size, 1 + (size - 1) * floordiv(dim, size))` leaves
    /// as they are.
    fn one_or(&mut self, dim: &Dim, size: i64) {
        let whole = Dim::constant(size);
        let steps = Dim::constant(1) + Dim::constant(size - 1) * dim.floor_div(&whole);
        let guard = Guard {
            left: dim.clone(),
            relation: Relation::Equal,
            right: whole.minimum(&steps),
            reason: format!("{}: {dim} stretches to {size}, so it is 1 or {size}", self.site).into(),
        };
        if !self.guards.iter().any(|other| other.left == guard.left && other.right == guard.right) {
            self.guards.push(guard);
        }
    }
}

/// The dim at a distance from the end that starts at one.
fn dim_from_end(shape: &[Dim], from_end: usize) -> Option<&Dim> {
    shape.get(shape.len().checked_sub(from_end)?)
}
