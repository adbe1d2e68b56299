//! Where the elements of a value lie in the memory of another: an offset and one stride per dim, as dim expressions.
//!
//! Slices, transposes, stretches and most reshapes move no element, so they are never computed: whoever reads such a value
//! reads the memory it comes from, through a [`View`].

use tpshard_ir::{Dim, ValueId};

/// Element `(i, j, …)` lies at `offset + i * strides[0] + j * strides[1] + …` in the memory of `base`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct View {
    pub(super) base: ValueId,
    pub(super) offset: Dim,
    pub(super) strides: Vec<Dim>,
}

/// The strides of elements that lie row by row.
pub(super) fn dense(shape: &[Dim]) -> Vec<Dim> {
    let mut strides = Vec::with_capacity(shape.len());
    let mut step = Dim::constant(1);
    for extent in shape.iter().rev() {
        strides.push(step.clone());
        step = step * extent;
    }
    strides.reverse();
    strides
}

impl View {
    /// All of `base`, whose memory has room for `room`.
    pub(super) fn whole(base: ValueId, room: &[Dim]) -> View {
        View { base, offset: Dim::constant(0), strides: dense(room) }
    }

    /// True if the elements of `shape` lie row by row from the first element of the base on.
    pub(super) fn is_dense(&self, shape: &[Dim]) -> bool {
        self.offset.is_zero() && rows_are(shape, &self.strides)
    }

    pub(super) fn transposed(&self, perm: &[usize]) -> View {
        let strides = perm.iter().filter_map(|&p| self.strides.get(p).cloned()).collect();
        View { base: self.base, offset: self.offset.clone(), strides }
    }

    pub(super) fn sliced(&self, axis: usize, start: &Dim, step: i64) -> View {
        let mut view = self.clone();
        if let Some(stride) = view.strides.get_mut(axis) {
            view.offset = view.offset + start * &*stride;
            *stride = &*stride * Dim::constant(step);
        }
        view
    }

    /// As an operand of `shape` that was stretched to `to`, aligned right: dims of extent 1 and missing ones repeat.
    pub(super) fn stretched(&self, shape: &[Dim], to: &[Dim]) -> View {
        let missing = to.len().saturating_sub(shape.len());
        let stretched = |(i, extent): (usize, &Dim)| {
            let from = i.checked_sub(missing)?;
            (shape.get(from)? == extent || !shape.get(from)?.is_one())
                .then(|| self.strides.get(from).cloned())?
        };
        let strides =
            to.iter().enumerate().map(|at| stretched(at).unwrap_or_else(|| Dim::constant(0))).collect();
        View { base: self.base, offset: self.offset.clone(), strides }
    }

    /// The same elements in another shape; `None` if no strides say where they lie.
    pub(super) fn reshaped(&self, shape: &[Dim], to: &[Dim]) -> Option<View> {
        let strides = match rows_are(shape, &self.strides) {
            true => dense(to),
            false => regrouped(shape, &self.strides, to)?,
        };
        Some(View { base: self.base, offset: self.offset.clone(), strides })
    }
}

/// True if elements of `shape` lie next to each other row by row; strides of dims of extent 1 say nothing.
fn rows_are(shape: &[Dim], strides: &[Dim]) -> bool {
    shape
        .iter()
        .zip(strides)
        .zip(dense(shape))
        .all(|((extent, stride), dense)| extent.is_one() || *stride == dense)
}

/// Strides of `to` for elements of `shape` with `strides`. Both shapes are cut, from the right, into runs of dims with the
/// same number of elements; each run has to lie row by row in itself.
fn regrouped(shape: &[Dim], strides: &[Dim], to: &[Dim]) -> Option<Vec<Dim>> {
    let mut found: Vec<Dim> = Vec::with_capacity(to.len());
    let (mut from, mut into) = (shape.len(), to.len());
    while from > 0 || into > 0 {
        let (from_end, into_end) = (from, into);
        let (mut have, mut want) = (Dim::constant(1), Dim::constant(1));
        // At least one dim, then whichever side has fewer elements grows.
        loop {
            if from > 0 && (have == want && from == from_end || grows(&have, &want)) {
                from -= 1;
                have = have * shape.get(from)?;
            } else if into > 0 {
                into -= 1;
                want = want * to.get(into)?;
            } else if from > 0 {
                from -= 1;
                have = have * shape.get(from)?;
            } else {
                return None;
            }
            if have == want && (from, into) != (from_end, into_end) {
                break;
            }
        }
        let (extents, steps) = (shape.get(from..from_end)?, strides.get(from..from_end)?);
        let inner = extents.iter().zip(steps).rev().find(|(extent, _)| !extent.is_one());
        let inner = inner.map_or_else(|| Dim::constant(0), |(_, stride)| stride.clone());
        let mut step = inner.clone();
        for (extent, stride) in extents.iter().zip(steps).rev() {
            if !extent.is_one() && *stride != step {
                return None;
            }
            step = step * extent;
        }
        let mut step = inner;
        for extent in to.get(into..into_end)?.iter().rev() {
            found.push(step.clone());
            step = step * extent;
        }
    }
    found.reverse();
    Some(found)
}

/// True if `have` has fewer elements than `want`, as far as can be told: it divides it.
fn grows(have: &Dim, want: &Dim) -> bool {
    have != want && want.exact_div(have).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dims(text: &str) -> Vec<Dim> {
        text.split_whitespace()
            .map(|word| word.parse::<i64>().map_or_else(|_| Dim::symbol(word), Dim::constant))
            .collect()
    }

    fn view(strides: &[Dim]) -> View {
        View { base: ValueId(3), offset: Dim::constant(0), strides: strides.to_vec() }
    }

    #[test]
    fn dense_views_take_every_shape() {
        let shape = dims("b s 64");
        let whole = View::whole(ValueId(0), &shape);
        assert!(whole.is_dense(&shape));
        let split = whole.reshaped(&shape, &dims("b s 4 16")).unwrap();
        assert_eq!(split.strides, dense(&dims("b s 4 16")));
        assert!(!split.transposed(&[0, 2, 1, 3]).is_dense(&dims("b 4 s 16")));
    }

    #[test]
    fn reshapes_of_transposed_values_are_views_where_runs_stay_whole() {
        // [b, h, s, d] made of [b, s, h * d].
        let heads = View::whole(ValueId(0), &dims("b s 4 16")).transposed(&[0, 2, 1, 3]);
        let shape = dims("b 4 s 16");
        let split = heads.reshaped(&shape, &dims("b 2 2 s 16")).unwrap();
        assert_eq!(split.strides[1], Dim::constant(32));
        assert_eq!(split.strides[2], Dim::constant(16));
        assert_eq!(split.strides[3], Dim::constant(64));
        assert_eq!(heads.reshaped(&shape, &dims("b 4 1 s 16")).unwrap().strides[4], Dim::constant(1));
        // Joining the heads with the sequence needs a copy.
        let joined = vec![Dim::symbol("b"), Dim::constant(4) * Dim::symbol("s"), Dim::constant(16)];
        assert_eq!(heads.reshaped(&shape, &joined), None);
        let swapped = view(&dims("1 b"));
        assert_eq!(swapped.reshaped(&dims("b s"), &[Dim::symbol("b") * Dim::symbol("s")]), None);
        assert!(swapped.reshaped(&dims("b s"), &dims("1 b s 1")).is_some());
    }

    #[test]
    fn slices_and_stretches_move_no_element() {
        let x = View::whole(ValueId(0), &dims("b s 64"));
        let back = x.sliced(1, &(Dim::symbol("s") - Dim::constant(1)), -1);
        assert_eq!(back.strides[1], Dim::constant(-64));
        assert_eq!(back.offset, Dim::symbol("s") * Dim::constant(64) - Dim::constant(64));
        let row = View::whole(ValueId(0), &dims("1 64")).stretched(&dims("1 64"), &dims("b s 64"));
        assert_eq!(row.strides, dims("0 0 1"));
    }
}
