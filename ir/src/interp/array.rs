//! Dense row-major arrays of any element, made one element at a time from a function of the index.

use super::OpError;
use crate::dtype::DType;
use crate::tensor::element_count;
use std::sync::Arc;

/// A dense row-major array. Copies share their elements until one is changed.
#[derive(Clone, Debug, PartialEq)]
pub struct Array<E> {
    pub dtype: DType,
    shape: Vec<usize>,
    data: Arc<Vec<E>>,
}

impl<E: Clone> Array<E> {
    /// An array from its parts; `None` if `data` does not fill `shape`.
    pub fn new(dtype: DType, shape: Vec<usize>, data: Vec<E>) -> Option<Array<E>> {
        (element_count(&shape) == Some(data.len())).then(|| Array { dtype, shape, data: Arc::new(data) })
    }

    /// A rank-0 array.
    pub fn scalar(dtype: DType, value: E) -> Array<E> {
        Array { dtype, shape: vec![], data: Arc::new(vec![value]) }
    }

    /// Every element from its index.
    pub(crate) fn from_fn(
        dtype: DType,
        shape: &[usize],
        mut element: impl FnMut(&[usize]) -> Result<E, OpError>,
    ) -> Result<Array<E>, OpError> {
        let count = element_count(shape).ok_or(OpError::TooLarge)?;
        let mut data = Vec::with_capacity(count);
        let mut index = vec![0; shape.len()];
        for _ in 0..count {
            data.push(element(&index)?);
            advance(&mut index, shape);
        }
        Ok(Array { dtype, shape: shape.to_vec(), data: Arc::new(data) })
    }

    /// One element everywhere.
    pub(crate) fn filled(dtype: DType, shape: &[usize], value: E) -> Result<Array<E>, OpError> {
        Array::from_fn(dtype, shape, |_| Ok(value.clone()))
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub fn rank(&self) -> usize {
        self.shape.len()
    }

    /// The elements, row-major.
    pub fn elements(&self) -> &[E] {
        &self.data
    }

    pub(crate) fn elements_mut(&mut self) -> &mut [E] {
        Arc::make_mut(&mut self.data).as_mut_slice()
    }

    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    /// The element at `index`, which must lie within the shape.
    pub(crate) fn at(&self, index: &[usize]) -> &E {
        &self.data[self.offset(index)]
    }

    /// The position of `index` in row-major order.
    pub(crate) fn offset(&self, index: &[usize]) -> usize {
        index.iter().zip(&self.shape).fold(0, |offset, (&i, &extent)| offset * extent + i)
    }

    /// The element at an index of a result that this array broadcasts to.
    pub(crate) fn at_broadcast(&self, index: &[usize]) -> &E {
        let own = &index[index.len() - self.rank()..];
        let offset = own
            .iter()
            .zip(&self.shape)
            .fold(0, |offset, (&i, &extent)| offset * extent + if extent == 1 { 0 } else { i });
        &self.data[offset]
    }

    /// The same elements under another shape of as many.
    pub(crate) fn reshaped(self, shape: &[usize]) -> Array<E> {
        debug_assert_eq!(element_count(shape), Some(self.data.len()));
        Array { shape: shape.to_vec(), ..self }
    }

    pub(crate) fn map<F>(&self, dtype: DType, f: impl Fn(&E) -> F) -> Array<F> {
        Array { dtype, shape: self.shape.clone(), data: Arc::new(self.data.iter().map(f).collect()) }
    }

    /// `length` entries of `axis` from `start`, which must lie within.
    pub(crate) fn run(&self, axis: usize, start: usize, length: usize) -> Result<Array<E>, OpError> {
        let mut shape = self.shape.clone();
        shape[axis] = length;
        let count = element_count(&shape).ok_or(OpError::TooLarge)?;
        let inner: usize = shape[axis + 1..].iter().product();
        let mut data = Vec::with_capacity(count);
        for row in self.data.chunks((self.shape[axis] * inner).max(1)) {
            data.extend_from_slice(&row[start * inner..(start + length) * inner]);
        }
        Ok(Array { dtype: self.dtype, shape, data: Arc::new(data) })
    }

    /// `parts` one after another along `axis`; they must agree elsewhere.
    pub(crate) fn concat(parts: &[&Array<E>], axis: usize) -> Result<Array<E>, OpError> {
        let first = parts.first().ok_or_else(|| OpError::other("nothing to join"))?;
        let mut shape = first.shape.clone();
        let fits = |p: &&Array<E>| {
            p.dtype == first.dtype
                && p.rank() == shape.len()
                && (0..shape.len()).all(|d| d == axis || p.shape[d] == shape[d])
        };
        if axis >= shape.len() || !parts.iter().all(fits) {
            let shapes: Vec<&[usize]> = parts.iter().map(|p| p.shape()).collect();
            return Err(OpError::other(format!("parts of shapes {shapes:?} do not join along axis {axis}")));
        }
        shape[axis] = parts.iter().map(|p| p.shape[axis]).sum();
        let count = element_count(&shape).ok_or(OpError::TooLarge)?;
        let outer: usize = shape[..axis].iter().product();
        let mut data = Vec::with_capacity(count);
        for row in 0..outer {
            for part in parts {
                let length: usize = part.shape[axis..].iter().product();
                data.extend_from_slice(&part.data[row * length..(row + 1) * length]);
            }
        }
        Ok(Array { dtype: first.dtype, shape, data: Arc::new(data) })
    }
}

/// The next index in row-major order; wraps to zeros after the last.
pub(crate) fn advance(index: &mut [usize], shape: &[usize]) {
    for (i, &extent) in index.iter_mut().zip(shape).rev() {
        *i += 1;
        if *i < extent {
            return;
        }
        *i = 0;
    }
}

/// Calls `visit` for every index of `shape` in row-major order.
pub(crate) fn each_index(
    shape: &[usize],
    mut visit: impl FnMut(&[usize]) -> Result<(), OpError>,
) -> Result<(), OpError> {
    let mut index = vec![0; shape.len()];
    for _ in 0..element_count(shape).ok_or(OpError::TooLarge)? {
        visit(&index)?;
        advance(&mut index, shape);
    }
    Ok(())
}
