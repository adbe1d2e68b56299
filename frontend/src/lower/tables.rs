//! Constant tensors that an operator's lowering makes: index tables, interpolation weights, transform matrices. Small ones
//! are literals of the graph; larger ones become weights, so that the graph stays small and ranks hold parts of them.

use super::context::{Lowered, Lowering, invalid};
use super::value::{Element, KNOWN_LIMIT, Known};
use crate::error::Fault;
use crate::tensor_data::{TensorRef, TensorSource};
use bytes::Bytes;
use tpshard_ir::tensor::element_count;
use tpshard_ir::{DType, Dim, Op, Scalar, ValueId};

/// Most elements of a table.
const TABLE_LIMIT: usize = 1 << 26;

impl Lowering<'_> {
    /// A tensor of `shape` whose elements `element` gives by their position, rounded to `dtype`.
    pub(crate) fn table(
        &mut self,
        dtype: DType,
        shape: &[usize],
        element: impl FnMut(usize) -> f64,
    ) -> Lowered<ValueId> {
        let count = element_count(shape).filter(|&count| count <= TABLE_LIMIT).ok_or_else(|| {
            let message = format!("a constant of shape {shape:?} that the operator needs is too large");
            Fault::resource(message, "use smaller fixed sizes")
        })?;
        let elements: Vec<f64> = (0..count).map(element).collect();
        let element = |value: f64| match dtype.is_float() {
            true => Element::Float(value),
            false => Element::int(value as i64),
        };
        let known = Known::new(dtype, shape.to_vec(), elements.into_iter().map(element).collect());
        let tensor = known.to_tensor().ok_or_else(|| invalid(format!("constants of type {dtype}")))?;
        if count <= KNOWN_LIMIT {
            return self.literal(tensor);
        }
        let bytes = Bytes::from(tensor.data().to_le_bytes());
        let reference = TensorRef {
            name: String::new(),
            dtype,
            dims: shape.iter().map(|&extent| extent as u64).collect(),
            source: TensorSource::Inline(bytes),
        };
        let value = self.stored(&format!("constant of {}", self.site.clone()), &reference)?;
        self.data(&value)
    }

    /// Integers as a rank-1 `i64`, or of any other shape.
    pub(crate) fn indices_table(&mut self, shape: &[usize], values: &[i64]) -> Lowered<ValueId> {
        self.table(DType::I64, shape, |at| values.get(at).map_or(0.0, |&value| value as f64))
    }

    /// The extents of a value, which must be numbers.
    pub(crate) fn fixed_shape(&self, value: ValueId, what: &str) -> Lowered<Vec<usize>> {
        let shape = &self.graph.ty(value).shape;
        let fixed: Option<Vec<usize>> = shape.iter().map(Dim::as_size).collect();
        fixed.ok_or_else(|| {
            let message = format!("{what} of dynamic size ({})", self.graph.ty(value));
            super::context::undecided(message)
        })
    }

    /// The value under a shape of numbers.
    pub(crate) fn shaped(&mut self, value: ValueId, shape: &[usize]) -> Lowered<ValueId> {
        let shape: Vec<Dim> = shape.iter().map(|&extent| Dim::from(extent)).collect();
        self.reshape(value, &shape)
    }

    /// The value stretched to a shape of numbers.
    pub(crate) fn stretched(&mut self, value: ValueId, shape: &[usize]) -> Lowered<ValueId> {
        let shape: Vec<Dim> = shape.iter().map(|&extent| Dim::from(extent)).collect();
        self.broadcast(value, &shape)
    }

    /// `0, 1, …` along `axis` of a value of rank `rank`.
    pub(crate) fn positions(&mut self, length: &Dim, axis: usize, rank: usize) -> Lowered<ValueId> {
        let length = self.current(length);
        let iota = self.add(Op::Iota { start: Dim::constant(0), length: length.clone() }, &[])?;
        let mut along = vec![Dim::constant(1); rank];
        along[axis] = length;
        self.reshape(iota, &along)
    }

    /// `low <= x <= high`, by moving what is outside.
    pub(crate) fn clamp(&mut self, x: ValueId, low: f64, high: f64) -> Lowered<ValueId> {
        let x = self.map_number(Scalar::Max, x, low)?;
        self.map_number(Scalar::Min, x, high)
    }

    /// Entries `index` of `axis`, one index per entry of the result.
    pub(crate) fn take(&mut self, x: ValueId, axis: usize, index: ValueId) -> Lowered<ValueId> {
        self.add(Op::Gather { axis, window: None }, &[x, index])
    }

    /// `length` entries of `axis` from `start`.
    pub(crate) fn cut(&mut self, x: ValueId, axis: usize, start: usize, length: usize) -> Lowered<ValueId> {
        self.slice(x, axis, Dim::from(start), Dim::from(length), 1)
    }

    /// The entries of `axis` from the last to the first.
    pub(crate) fn reversed(&mut self, x: ValueId, axis: usize) -> Lowered<ValueId> {
        let extent = self.graph.ty(x).shape[axis].clone();
        if extent.is_one() || extent.is_zero() {
            return Ok(x);
        }
        let last = &extent - &Dim::constant(1);
        self.slice(x, axis, last, extent, -1)
    }

    /// One value after the other along `axis`.
    pub(crate) fn joined(&mut self, parts: &[ValueId], axis: usize) -> Lowered<ValueId> {
        match parts {
            [one] => Ok(*one),
            parts => self.add(Op::Concat { axis }, parts),
        }
    }
}
