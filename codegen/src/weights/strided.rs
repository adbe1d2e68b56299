//! Copying between two arrays of any strides.

use std::convert::Infallible;

/// One dimension of a copy: its length and the distance, in elements, between neighbours on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Dim {
    pub(crate) length: usize,
    pub(crate) from: usize,
    pub(crate) to: usize,
}

/// Strides of a dense row-major array.
pub(crate) fn dense_strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for d in (1..shape.len()).rev() {
        strides[d - 1] = strides[d] * shape[d];
    }
    strides
}

/// Calls `visit` with both offsets of every index of `dims`, the last dimension fastest, until it fails.
pub(crate) fn odometer<E>(
    dims: &[Dim],
    mut visit: impl FnMut(usize, usize) -> Result<(), E>,
) -> Result<(), E> {
    if dims.iter().any(|dim| dim.length == 0) {
        return Ok(());
    }
    let mut index = vec![0; dims.len()];
    let (mut from, mut to) = (0, 0);
    loop {
        visit(from, to)?;
        let mut axis = dims.len();
        loop {
            let Some(outer) = axis.checked_sub(1) else { return Ok(()) };
            axis = outer;
            let dim = dims[axis];
            index[axis] += 1;
            from += dim.from;
            to += dim.to;
            if index[axis] < dim.length {
                break;
            }
            index[axis] = 0;
            from -= dim.length * dim.from;
            to -= dim.length * dim.to;
        }
    }
}

/// Copies elements of `width` bytes (1, 2, 4 or 8) between two arrays, each with the offset of its first element.
pub(crate) fn copy(width: usize, dims: &[Dim], source: (&[u8], usize), target: (&mut [u8], usize)) {
    match width {
        1 => copy_elements::<1>(dims, source, target),
        2 => copy_elements::<2>(dims, source, target),
        4 => copy_elements::<4>(dims, source, target),
        _ => copy_elements::<8>(dims, source, target),
    }
}

fn copy_elements<const W: usize>(
    dims: &[Dim],
    (source, source_at): (&[u8], usize),
    (target, target_at): (&mut [u8], usize),
) {
    let mut merged = merge(dims);
    let inner = merged.pop().unwrap_or(Dim { length: 1, from: 1, to: 1 });
    let Ok(()) = odometer(&merged, |from, to| -> Result<(), Infallible> {
        let source = &source[(source_at + from) * W..];
        let target = &mut target[(target_at + to) * W..];
        if inner.from == 1 && inner.to == 1 {
            target[..inner.length * W].copy_from_slice(&source[..inner.length * W]);
            return Ok(());
        }
        for i in 0..inner.length {
            let (from, to) = (i * inner.from * W, i * inner.to * W);
            target[to..to + W].copy_from_slice(&source[from..from + W]);
        }
        Ok(())
    });
}

/// The same copy with fewer dimensions: those of length one vanish, neighbours that lie dense on both sides join.
fn merge(dims: &[Dim]) -> Vec<Dim> {
    let mut merged: Vec<Dim> = Vec::with_capacity(dims.len());
    for &dim in dims.iter().filter(|dim| dim.length != 1) {
        match merged.last_mut() {
            Some(outer) if outer.from == dim.length * dim.from && outer.to == dim.length * dim.to => {
                *outer = Dim { length: outer.length * dim.length, ..dim };
            }
            _ => merged.push(dim),
        }
    }
    merged
}
