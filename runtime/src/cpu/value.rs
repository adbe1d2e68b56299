//! Values at run time: strided views of shared tensors.
//!
//! Transposes, slices and stretches only change strides; a tensor is copied when a kernel or a collective needs its
//! elements in row-major order and the strides say otherwise.

use smallvec::{SmallVec, smallvec};
use std::borrow::Cow;
use std::sync::Arc;
use tpshard_ir::tensor::{Element, element_count};
use tpshard_ir::{DType, Data, Tensor};

/// Of as many dims as nearly all values have, in the value itself: a step makes hundreds of views.
type Extents = SmallVec<[usize; 6]>;
type Strides = SmallVec<[isize; 6]>;

/// A view of a tensor's elements; every index within `shape` lies in the tensor.
#[derive(Clone, Debug)]
pub(crate) struct Value {
    tensor: Arc<Tensor>,
    shape: Extents,
    strides: Strides,
    offset: usize,
}

/// Calls `$body` with `$v` bound to the typed elements of a tensor's data, and `$raw` for storage types.
macro_rules! with_elements {
    ($data:expr, $v:ident => $body:expr, $dtype:ident, $bytes:ident => $raw:expr) => {
        match $data {
            tpshard_ir::Data::F32($v) => $body,
            tpshard_ir::Data::F16($v) => $body,
            tpshard_ir::Data::BF16($v) => $body,
            tpshard_ir::Data::F64($v) => $body,
            tpshard_ir::Data::I8($v) => $body,
            tpshard_ir::Data::I16($v) => $body,
            tpshard_ir::Data::I32($v) => $body,
            tpshard_ir::Data::I64($v) => $body,
            tpshard_ir::Data::U8($v) => $body,
            tpshard_ir::Data::U16($v) => $body,
            tpshard_ir::Data::U32($v) => $body,
            tpshard_ir::Data::U64($v) => $body,
            tpshard_ir::Data::Bool($v) => $body,
            tpshard_ir::Data::Raw($dtype, $bytes) => $raw,
        }
    };
}
pub(crate) use with_elements;

/// Row-major strides of `shape`.
pub(crate) fn row_major(shape: &[usize]) -> Strides {
    let mut strides: Strides = smallvec![1; shape.len()];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i] * shape[i].max(1) as isize;
    }
    strides
}

/// The codes of packed elements, a byte each, the padding at the end included.
fn unpacked(dtype: DType, bytes: &[u8]) -> Vec<u8> {
    let (bits, mask) = (dtype.bits(), u8::MAX >> (8 - dtype.bits()));
    bytes.iter().flat_map(|byte| (0..8 / bits).map(move |i| byte >> (i * bits) & mask)).collect()
}

/// The inverse of [`unpacked`].
fn packed(dtype: DType, codes: &[u8]) -> Vec<u8> {
    let bits = dtype.bits();
    let join = |part: &[u8]| part.iter().enumerate().fold(0, |byte, (i, code)| byte | code << (i * bits));
    codes.chunks(8 / bits).map(join).collect()
}

impl Value {
    pub(crate) fn new(tensor: Tensor) -> Value {
        Value::shared(Arc::new(tensor))
    }

    pub(crate) fn shared(tensor: Arc<Tensor>) -> Value {
        let shape = Extents::from_slice(tensor.shape());
        Value { strides: row_major(&shape), tensor, shape, offset: 0 }
    }

    /// From elements in row-major order.
    pub(crate) fn from_vec<T: Element>(shape: &[usize], elements: Vec<T>) -> Result<Value, String> {
        Tensor::from_vec(shape.to_vec(), elements).map(Value::new).map_err(|e| e.to_string())
    }

    pub(crate) fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub(crate) fn strides(&self) -> &[isize] {
        &self.strides
    }

    pub(crate) fn offset(&self) -> usize {
        self.offset
    }

    pub(crate) fn dtype(&self) -> DType {
        self.tensor.dtype()
    }

    pub(crate) fn data(&self) -> &Data {
        self.tensor.data()
    }

    pub(crate) fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// The tensor behind the view, if nothing else holds it.
    #[allow(clippy::result_large_err, reason = "the error is the value itself, to go on with")]
    pub(crate) fn into_unique(self) -> Result<Tensor, Value> {
        let Value { tensor, shape, strides, offset } = self;
        Arc::try_unwrap(tensor).map_err(|tensor| Value { tensor, shape, strides, offset })
    }

    /// True if this shows the first entries along `axis` of a tensor that has room for `needed` of them.
    pub(crate) fn is_prefix(&self, axis: usize, needed: usize) -> bool {
        let whole = self.tensor.shape();
        self.offset == 0
            && whole.len() == self.shape.len()
            && self.strides == row_major(whole)
            && (0..whole.len())
                .all(|d| if d == axis { whole[d] >= needed } else { whole[d] == self.shape[d] })
    }

    /// True if the elements lie one after another in row-major order.
    pub(crate) fn is_contiguous(&self) -> bool {
        let mut expected = 1isize;
        for (&extent, &stride) in self.shape.iter().zip(&self.strides).rev() {
            if extent != 1 {
                if stride != expected && self.len() > 0 {
                    return false;
                }
                expected *= extent as isize;
            }
        }
        true
    }

    /// The typed elements of the tensor behind the view.
    pub(crate) fn elements<T: Element>(&self) -> Result<&[T], String> {
        self.tensor.as_slice::<T>().map_err(|e| e.to_string())
    }

    /// The elements in row-major order.
    pub(crate) fn slice<T: Element>(&self) -> Result<Cow<'_, [T]>, String> {
        let all = self.elements::<T>()?;
        if self.len() == 0 {
            return Ok(Cow::Borrowed(&[]));
        }
        if self.is_contiguous() {
            return all
                .get(self.offset..self.offset + self.len())
                .map(Cow::Borrowed)
                .ok_or_else(|| "a view leaves its tensor".into());
        }
        Ok(Cow::Owned(gather_elements(self, all)))
    }

    /// The elements in row-major order as `f32`; for the float types of up to 32 bits.
    pub(crate) fn to_f32(&self) -> Result<Cow<'_, [f32]>, String> {
        match self.data() {
            Data::F32(_) => self.slice::<f32>(),
            Data::F16(_) => Ok(Cow::Owned(self.slice::<half::f16>()?.iter().map(|x| x.to_f32()).collect())),
            Data::BF16(_) => Ok(Cow::Owned(self.slice::<half::bf16>()?.iter().map(|x| x.to_f32()).collect())),
            other => Err(format!("expected a float of up to 32 bits, found {}", other.dtype())),
        }
    }

    /// The same value as `f32`, shared if it is one already.
    pub(crate) fn as_f32(&self) -> Result<Value, String> {
        if self.dtype() == DType::F32 {
            return Ok(self.clone());
        }
        Value::from_vec(&self.shape, self.to_f32()?.into_owned())
    }

    /// A value whose elements are in row-major order; shares the tensor if they already are.
    pub(crate) fn contiguous(&self) -> Result<Value, String> {
        if self.is_contiguous() { Ok(self.clone()) } else { Ok(Value::new(self.copied()?)) }
    }

    /// The value as a tensor of its own shape; shares the storage where that is possible.
    pub(crate) fn tensor(&self) -> Result<Arc<Tensor>, String> {
        if self.offset == 0 && *self.shape == *self.tensor.shape() && self.is_contiguous() {
            return Ok(self.tensor.clone());
        }
        self.copied().map(Arc::new)
    }

    /// The value as an owned tensor.
    pub(crate) fn into_tensor(self) -> Result<Tensor, String> {
        let whole = self.offset == 0 && self.is_contiguous() && self.len() == self.tensor.len();
        if !whole {
            return self.copied();
        }
        let shape = self.shape.to_vec();
        match self.into_unique() {
            Ok(tensor) => tensor.reshaped(shape).map_err(|e| e.to_string()),
            Err(shared) => shared.copied(),
        }
    }

    fn copied(&self) -> Result<Tensor, String> {
        let data = with_elements!(self.data(),
            v => wrap(gather_elements(self, v)),
            dtype, bytes => self.copied_raw(*dtype, bytes)?);
        Tensor::new(self.shape.to_vec(), data).map_err(|e| e.to_string())
    }

    /// Elements that share bytes are taken apart to be moved.
    fn copied_raw(&self, dtype: DType, bytes: &[u8]) -> Result<Data, String> {
        if !dtype.is_packed() {
            return Ok(Data::Raw(dtype, gather_elements(self, bytes)));
        }
        if self.offset == 0 && self.is_contiguous() && self.len() == self.tensor.len() {
            return Ok(Data::Raw(dtype, bytes.to_vec()));
        }
        let codes = gather_elements(self, &unpacked(dtype, bytes));
        Ok(Data::Raw(dtype, packed(dtype, &codes)))
    }

    /// Dim `i` of the result is dim `perm[i]`.
    pub(crate) fn permuted(&self, perm: &[usize]) -> Value {
        Value {
            tensor: self.tensor.clone(),
            shape: perm.iter().map(|&p| self.shape[p]).collect(),
            strides: perm.iter().map(|&p| self.strides[p]).collect(),
            offset: self.offset,
        }
    }

    /// `length` entries of `axis` from `start` in steps of `step`.
    pub(crate) fn sliced(
        &self,
        axis: usize,
        start: usize,
        length: usize,
        step: i64,
    ) -> Result<Value, String> {
        let extent = *self.shape.get(axis).ok_or("a slice of a dim that does not exist")?;
        let mut view = self.clone();
        view.shape[axis] = length;
        if length == 0 {
            return Ok(view);
        }
        let last = (length as i64 - 1).checked_mul(step).and_then(|d| d.checked_add(start as i64));
        if start >= extent || last.is_none_or(|l| l < 0 || l >= extent as i64) {
            return Err(format!("{length} entries from {start} by {step} leave a dim of {extent}"));
        }
        view.offset = (view.offset as isize + start as isize * self.strides[axis]) as usize;
        view.strides[axis] *= step as isize;
        Ok(view)
    }

    /// Stretched to `shape`, aligned right.
    pub(crate) fn stretched(&self, shape: &[usize]) -> Result<Value, String> {
        let mismatch = || format!("{:?} does not stretch to {shape:?}", self.shape);
        let added = shape.len().checked_sub(self.shape.len()).ok_or_else(mismatch)?;
        let mut strides: Strides = smallvec![0; added];
        for (i, (&from, &to)) in self.shape.iter().zip(&shape[added..]).enumerate() {
            if from != to && from != 1 {
                return Err(mismatch());
            }
            strides.push(if from == to { self.strides[i] } else { 0 });
        }
        let shape = Extents::from_slice(shape);
        Ok(Value { tensor: self.tensor.clone(), shape, strides, offset: self.offset })
    }

    /// The same elements in the same order under another shape; a view where strides can say it.
    pub(crate) fn reshaped(&self, shape: &[usize]) -> Result<Value, String> {
        if element_count(shape) != Some(self.len()) {
            return Err(format!("{:?} does not reshape to {shape:?}", self.shape));
        }
        if let Some(strides) = reshaped_strides(&self.shape, &self.strides, shape) {
            let (tensor, offset) = (self.tensor.clone(), self.offset);
            return Ok(Value { tensor, shape: Extents::from_slice(shape), strides, offset });
        }
        let tensor = self.copied()?.reshaped(shape.to_vec()).map_err(|e| e.to_string())?;
        Ok(Value::new(tensor))
    }

    /// [`Value::reshaped`], with memory for the elements of `f32` if they have to be copied.
    pub(crate) fn reshaped_in(&self, shape: &[usize], spare: Vec<f32>) -> Result<Value, String> {
        match self.data() {
            Data::F32(elements) if element_count(shape) == Some(self.len()) && !self.shows(shape) => {
                Value::from_vec(shape, gather_elements_in(self, elements, spare))
            }
            _ => self.reshaped(shape),
        }
    }

    /// True if the elements lie so that `shape` is another view of them.
    pub(crate) fn shows(&self, shape: &[usize]) -> bool {
        reshaped_strides(&self.shape, &self.strides, shape).is_some()
    }
}

pub(crate) fn wrap<T: Element>(values: Vec<T>) -> Data {
    T::wrap(values)
}

/// Strides that show `from` elements as `shape`, if there are any.
fn reshaped_strides(from: &[usize], strides: &[isize], shape: &[usize]) -> Option<Strides> {
    if shape.contains(&0) {
        return Some(row_major(shape));
    }
    // Dims of the source that are walked in one run, outermost first.
    let mut runs: SmallVec<[(usize, isize); 6]> = SmallVec::new();
    for (&extent, &stride) in from.iter().zip(strides).filter(|(e, _)| **e != 1) {
        match runs.last_mut() {
            Some((run, inner)) if *inner == stride * extent as isize => {
                *run *= extent;
                *inner = stride;
            }
            _ => runs.push((extent, stride)),
        }
    }
    let mut result: Strides = smallvec![0; shape.len()];
    let (mut left, mut stride) = runs.pop().unwrap_or((1, 1));
    for (i, &extent) in shape.iter().enumerate().rev() {
        if extent == 1 {
            result[i] = stride;
            continue;
        }
        if left == 1 {
            (left, stride) = runs.pop()?;
        }
        if left % extent != 0 {
            return None;
        }
        result[i] = stride;
        left /= extent;
        stride *= extent as isize;
    }
    Some(result)
}

/// The elements of a view in row-major order.
fn gather_elements<T: Copy>(view: &Value, all: &[T]) -> Vec<T> {
    gather_elements_in(view, all, Vec::new())
}

/// [`gather_elements`] in memory that is there.
fn gather_elements_in<T: Copy>(view: &Value, all: &[T], spare: Vec<T>) -> Vec<T> {
    let (false, Some(&any)) = (view.len() == 0, all.get(view.offset)) else { return Vec::new() };
    let mut out = spare;
    out.resize(view.len(), any);
    let to = row_major(&view.shape);
    copy_strided(&view.shape, (all, view.offset, &view.strides), (&mut out, 0, &to));
    out
}

/// Copies `shape` elements between strided places; both lie within their slices.
pub(crate) fn copy_strided<T: Copy>(
    shape: &[usize],
    from: (&[T], usize, &[isize]),
    to: (&mut [T], usize, &[isize]),
) {
    if shape.contains(&0) {
        return;
    }
    let (source, from_offset, from_strides) = from;
    let (target, to_offset, to_strides) = to;
    let (dims, [from_strides, to_strides]) = merged(shape, [from_strides, to_strides]);
    let Some((&inner, outer)) = dims.split_last() else {
        target[to_offset] = source[from_offset];
        return;
    };
    let rank = outer.len();
    let (from_inner, to_inner) = (from_strides[rank], to_strides[rank]);
    for_each_offset(outer, [&from_strides[..rank], &to_strides[..rank]], |[f, t]| {
        let (f, t) = ((from_offset as isize + f) as usize, (to_offset as isize + t) as usize);
        match (from_inner, to_inner) {
            (1, 1) => target[t..t + inner].copy_from_slice(&source[f..f + inner]),
            (0, 1) => target[t..t + inner].fill(source[f]),
            _ => {
                for i in 0..inner as isize {
                    target[(t as isize + i * to_inner) as usize] =
                        source[(f as isize + i * from_inner) as usize];
                }
            }
        }
    });
}

/// Joins neighbouring dims that all operands walk in one run, and drops dims of one element.
pub(crate) fn merged<const N: usize>(
    shape: &[usize],
    strides: [&[isize]; N],
) -> (Vec<usize>, [Vec<isize>; N]) {
    let mut dims: Vec<usize> = Vec::new();
    let mut result: [Vec<isize>; N] = std::array::from_fn(|_| Vec::new());
    for (i, &extent) in shape.iter().enumerate() {
        if extent == 1 {
            continue;
        }
        let joins = !dims.is_empty()
            && (0..N)
                .all(|n| result[n].last().is_some_and(|&outer| outer == strides[n][i] * extent as isize));
        if joins {
            if let Some(last) = dims.last_mut() {
                *last *= extent;
            }
        } else {
            dims.push(extent);
        }
        for n in 0..N {
            if joins {
                result[n].pop();
            }
            result[n].push(strides[n][i]);
        }
    }
    (dims, result)
}

/// Calls `visit` with the offset of every index of `shape`, row-major, one offset per set of strides.
pub(crate) fn for_each_offset<const N: usize>(
    shape: &[usize],
    strides: [&[isize]; N],
    mut visit: impl FnMut([isize; N]),
) {
    if shape.contains(&0) {
        return;
    }
    let mut index = vec![0usize; shape.len()];
    let mut offsets = [0isize; N];
    loop {
        visit(offsets);
        let mut axis = shape.len();
        loop {
            if axis == 0 {
                return;
            }
            axis -= 1;
            index[axis] += 1;
            for n in 0..N {
                offsets[n] += strides[n][axis];
            }
            if index[axis] < shape[axis] {
                break;
            }
            for n in 0..N {
                offsets[n] -= strides[n][axis] * shape[axis] as isize;
            }
            index[axis] = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn iota(shape: &[usize]) -> Value {
        let n = shape.iter().product::<usize>();
        Value::from_vec(shape, (0..n as i32).collect()).unwrap()
    }

    fn list(value: &Value) -> Vec<i32> {
        value.slice::<i32>().unwrap().into_owned()
    }

    #[test]
    fn views_show_the_elements_that_copies_would_hold() {
        let x = iota(&[2, 3, 4]);
        let t = x.permuted(&[2, 0, 1]);
        assert_eq!((t.shape(), &list(&t)[..7]), (&[4, 2, 3][..], &[0, 4, 8, 12, 16, 20, 1][..]));
        let r = x.sliced(2, 3, 2, -2).unwrap();
        assert_eq!(list(&r), [3, 1, 7, 5, 11, 9, 15, 13, 19, 17, 23, 21]);
        let s = iota(&[3, 1]).stretched(&[2, 3, 2]).unwrap();
        assert_eq!(list(&s), [0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2]);
        assert_eq!(list(&t.reshaped(&[8, 3]).unwrap()), list(&t));
        assert!(x.sliced(1, 2, 2, 1).is_err());
        assert!(x.stretched(&[3, 4]).is_err());
        assert!(x.reshaped(&[5, 5]).is_err());
    }

    #[test]
    fn reshapes_copy_only_when_strides_cannot_say_it() {
        let x = iota(&[2, 6, 5]);
        let split = x.permuted(&[1, 0, 2]).reshaped(&[2, 3, 2, 5]).unwrap();
        assert!(Arc::ptr_eq(&split.tensor, &x.tensor));
        let joined = x.permuted(&[1, 0, 2]).reshaped(&[12, 5]).unwrap();
        assert!(!Arc::ptr_eq(&joined.tensor, &x.tensor));
        assert_eq!(list(&joined), list(&x.permuted(&[1, 0, 2])));
        assert_eq!(iota(&[0, 3]).reshaped(&[3, 0, 7]).unwrap().len(), 0);
        let one = iota(&[1]).reshaped(&[1, 1, 1]).unwrap();
        assert_eq!(list(&one), [0]);
    }
}
