//! Sizes that have to agree. Where two are not the same dim, a symbol is replaced everywhere, or a condition is kept that
//! is checked before every step.

use super::context::{Lowered, Lowering, invalid, undecided};
use super::symbols::never_equal;
use super::value::Value;
use crate::error::{ErrorKind, Fault};
use std::collections::HashMap;
use std::sync::Arc;
use tpshard_ir::{Dim, Guard, Op, Relation, ValueId};

/// Two sizes that an operator needs to agree, found equal by replacing a symbol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Equality {
    /// The symbol that was replaced.
    pub symbol: Arc<str>,
    pub equals: Dim,
    /// The node that needs it.
    pub reason: String,
}

/// What was found out of sizes, and is relied upon.
pub(super) enum Finding {
    Equal(Equality),
    /// At least zero, so that nothing needs to be clamped to that.
    NotNegative(Dim),
}

impl Finding {
    fn apply(&self, dim: &Dim) -> Dim {
        match self {
            Finding::Equal(Equality { symbol, .. }) if !dim.symbols().contains(symbol) => dim.clone(),
            Finding::Equal(Equality { symbol, equals, .. }) => {
                dim.substitute(&|name| (*name == **symbol).then(|| equals.clone()))
            }
            Finding::NotNegative(inner) => dim.unclamped(inner),
        }
    }
}

impl Lowering<'_> {
    /// Makes two sizes equal: they are, or a symbol is replaced everywhere.
    pub(crate) fn unify(&mut self, a: &Dim, b: &Dim) -> Lowered<()> {
        // The caller's may be older than what was found since.
        let (a, b) = (&self.current(a), &self.current(b));
        if a == b {
            return Ok(());
        }
        if never_equal(a, b) {
            return Err(invalid(format!("the sizes {a} and {b} differ and must be equal")));
        }
        let Some((symbol, equals)) = self.symbols.solve(a, b) else {
            return self.unify_unclamped(a, b);
        };
        if equals.as_const().is_some_and(|value| value < 0) {
            return Err(invalid(format!("the sizes {a} and {b} cannot be equal")));
        }
        let reason = self.site.clone();
        self.found(Finding::Equal(Equality { symbol, equals, reason }));
        Ok(())
    }

    /// Sizes that are equal if what is clamped to zero on the way to one of them is not negative: `s` and
    /// `1 + max(0, s - 1)` for `s` of at least 1. That is checked before every step.
    fn unify_unclamped(&mut self, a: &Dim, b: &Dim) -> Lowered<()> {
        let difference = a - b;
        let inner = difference.clamped().into_iter().find(|inner| {
            let rest = difference.unclamped(inner);
            !self.symbols.depends_on_data(inner)
                && (rest.is_zero() || self.symbols.solve(&rest, &Dim::constant(0)).is_some())
        });
        let Some(inner) = inner else {
            return Err(undecided(format!("cannot show that the sizes {a} and {b} are equal")));
        };
        self.assume_at_most(&Dim::constant(0), &inner)?;
        self.found(Finding::NotNegative(inner));
        self.unify(a, b)
    }

    /// Relies on a finding from now on, and in what there is.
    fn found(&mut self, finding: Finding) {
        let rewrite = |dim: &Dim| finding.apply(dim);
        self.graph.rewrite_dims(&rewrite);
        for guard in &mut self.guards {
            guard.left = rewrite(&guard.left);
            guard.right = rewrite(&guard.right);
        }
        for value in self.scopes.iter_mut().flat_map(HashMap::values_mut) {
            match value {
                Value::Known(known) => Arc::make_mut(known).rewrite_dims(&rewrite),
                Value::Affine(affine) => Arc::make_mut(affine).rewrite_dims(&rewrite),
                Value::Grid(grid) => {
                    let grid = Arc::make_mut(grid);
                    grid.shape.iter_mut().for_each(|dim| *dim = rewrite(dim));
                    grid.parts.iter_mut().for_each(|part| part.rewrite_dims(&rewrite));
                }
                Value::Data(_) | Value::Weight(_) | Value::Poison => {}
            }
        }
        if let Finding::Equal(Equality { symbol, .. }) = &finding {
            self.graph.symbols.remove(symbol);
        }
        self.seen.clear();
        self.findings.push(finding);
    }

    /// `dim` by all that was found so far: for dims an operator computed before it unified some.
    pub(crate) fn current(&self, dim: &Dim) -> Dim {
        self.findings.iter().fold(dim.clone(), |dim, finding| finding.apply(&dim))
    }

    pub(crate) fn current_all(&self, dims: &[Dim]) -> Vec<Dim> {
        dims.iter().map(|dim| self.current(dim)).collect()
    }

    /// The sizes that had to be equal, in the order they were found.
    pub(super) fn take_equalities(&mut self) -> Vec<Equality> {
        let equality = |finding| match finding {
            Finding::Equal(equality) => Some(equality),
            Finding::NotNegative(_) => None,
        };
        std::mem::take(&mut self.findings).into_iter().filter_map(equality).collect()
    }

    /// Relies on `low <= high` from now on.
    pub(crate) fn assume_at_most(&mut self, low: &Dim, high: &Dim) -> Lowered<()> {
        let room = high - low;
        if room.is_nonnegative() {
            return Ok(());
        }
        if room.as_const().is_some_and(|room| room < 0) {
            return Err(invalid(format!("{low} exceeds {high}")));
        }
        self.rely_on(low.clone(), Relation::LessEqual, high.clone());
        Ok(())
    }

    /// Has a condition checked before every step.
    fn rely_on(&mut self, left: Dim, relation: Relation, right: Dim) {
        let same = |g: &Guard| g.relation == relation && g.left == left && g.right == right;
        if !self.guards.iter().any(same) {
            self.guards.push(Guard { left, relation, right, reason: self.site.as_str().into() });
        }
    }

    /// The guards that say something.
    pub(crate) fn take_guards(&mut self) -> Vec<Guard> {
        let mut guards = std::mem::take(&mut self.guards);
        guards.retain(|guard| match guard.relation {
            Relation::Equal => guard.left != guard.right,
            Relation::LessEqual => !(&guard.right - &guard.left).is_nonnegative(),
        });
        guards
    }

    /// `value` in `wanted` entries of `axis`, where it cannot be shown that these are all that it has: that is checked
    /// before every step. The sizes of what convolutions shortened and resizing brought back agree for some sizes of the
    /// inputs only. `fault` is what is wrong if data decides one of the sizes.
    pub(super) fn held_to(
        &mut self,
        value: &Value,
        axis: usize,
        wanted: &Dim,
        fault: Fault,
    ) -> Lowered<Value> {
        let have = self.shape(value).get(axis).map_or_else(|| Dim::constant(1), |have| self.current(have));
        let wanted = &self.current(wanted);
        let by_data = self.symbols.depends_on_data(&have) || self.symbols.depends_on_data(wanted);
        if fault.kind != ErrorKind::DataDependent || by_data {
            return Err(fault);
        }
        self.rely_on(have, Relation::Equal, wanted.clone());
        let data = self.data(value)?;
        let cut = Op::Slice { axis, start: Dim::constant(0), length: wanted.clone(), step: 1 };
        Ok(Value::Data(self.add(cut, &[data])?))
    }

    /// The operands of an elementwise function, with dims that have to be equal held to that; an error as `fault` is if
    /// there are none.
    pub(super) fn held_operands(&mut self, args: &[ValueId], fault: Fault) -> Lowered<Vec<ValueId>> {
        let mut held = args.to_vec();
        let rank = args.iter().map(|&arg| self.graph.ty(arg).rank()).max().unwrap_or(0);
        for from_end in 1..=rank {
            let mut wanted: Option<Dim> = None;
            for arg in &mut held {
                let shape = self.graph.ty(*arg).shape.clone();
                let Some(axis) = shape.len().checked_sub(from_end) else { continue };
                match &wanted {
                    _ if shape[axis].is_one() => {}
                    None => wanted = Some(shape[axis].clone()),
                    Some(wanted) if self.symbols.count_meets_input(wanted, &shape[axis]) => {
                        return Err(fault);
                    }
                    Some(wanted) => {
                        if let Err(own) = self.unify(wanted, &shape[axis]) {
                            let value = self.held_to(&Value::Data(*arg), axis, wanted, own)?;
                            *arg = self.data(&value)?;
                        }
                    }
                }
                wanted = wanted.map(|wanted| self.current(&wanted));
            }
        }
        Ok(held)
    }

    /// Broadcasts shapes as NumPy does, unifying sizes that differ.
    pub(crate) fn broadcast_shapes(&mut self, shapes: &[Vec<Dim>]) -> Lowered<Vec<Dim>> {
        let rank = shapes.iter().map(Vec::len).max().unwrap_or(0);
        let mut result = vec![Dim::constant(1); rank];
        for shape in shapes {
            for (own, dim) in shape.iter().enumerate() {
                let axis = rank - shape.len() + own;
                let (have, dim) = (self.current(&result[axis]), self.current(dim));
                result[axis] = if have.is_one() {
                    dim
                } else if dim.is_one() {
                    have
                } else if self.symbols.count_meets_input(&have, &dim) {
                    return Err(undecided(format!(
                        "whether the sizes {have} and {dim} are equal or one stretches"
                    )));
                } else {
                    self.unify(&have, &dim)?;
                    self.current(&have)
                };
            }
        }
        Ok(self.current_all(&result))
    }
}
