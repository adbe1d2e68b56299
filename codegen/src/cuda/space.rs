//! Iteration spaces: several dims walked by one linear index, and where the operands are at it.
//!
//! Neighbouring dims become one wherever every operand steps through them as through one, and dims of extent 1 vanish, so
//! that what lies densely is walked with one addition whatever its shape was.

use tpshard_ir::Dim;

/// Dims, outermost first, and for each operand its strides along them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Offsets {
    pub(super) extents: Vec<Dim>,
    pub(super) strides: Vec<Vec<Dim>>,
}

impl Offsets {
    /// `operands` walked over `extents`, with as few dims as will do.
    pub(super) fn new(extents: &[Dim], operands: &[&[Dim]]) -> Offsets {
        let stride =
            |operand: &[Dim], dim: usize| operand.get(dim).cloned().unwrap_or_else(|| Dim::constant(0));
        let mut merged = Offsets { extents: vec![], strides: vec![vec![]; operands.len()] };
        for (dim, extent) in extents.iter().enumerate() {
            if extent.is_one() {
                continue;
            }
            let joins = !merged.extents.is_empty()
                && merged.strides.iter().zip(operands).all(|(known, own)| {
                    known.last().is_some_and(|outer| *outer == stride(own, dim) * extent)
                });
            match merged.extents.last_mut() {
                Some(last) if joins => *last = &*last * extent,
                _ => merged.extents.push(extent.clone()),
            }
            for (known, own) in merged.strides.iter_mut().zip(operands) {
                if joins {
                    known.pop();
                }
                known.push(stride(own, dim));
            }
        }
        merged
    }

    pub(super) fn count(&self) -> Dim {
        Dim::product(&self.extents)
    }

    /// The one stride of every operand, if there is at most one dim.
    pub(super) fn line(&self) -> Option<Vec<Dim>> {
        let strides = self.strides.iter().map(|s| s.first().cloned().unwrap_or_else(|| Dim::constant(0)));
        (self.extents.len() <= 1).then(|| strides.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::views::dense;

    #[test]
    fn dims_join_where_all_operands_agree() {
        let shape = [Dim::symbol("b"), Dim::symbol("s"), Dim::constant(64)];
        let all = dense(&shape);
        let zero = [Dim::constant(0), Dim::constant(0), Dim::constant(1)];
        assert_eq!(Offsets::new(&shape, &[&all, &all]).extents, [Dim::product(&shape)]);
        let row = Offsets::new(&shape, &[&all, &zero]);
        assert_eq!(row.extents, [Dim::symbol("b") * Dim::symbol("s"), Dim::constant(64)]);
        assert_eq!(row.strides[1], [Dim::constant(0), Dim::constant(1)]);
        assert_eq!(Offsets::new(&[Dim::constant(1)], &[&[Dim::constant(7)]]).extents, []);
    }
}
