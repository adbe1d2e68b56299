//! What a name of the model stands for while it is lowered.
//!
//! Only [`Value::Data`] is data-flow. The other forms are known, fully or up to the sizes of the inputs, and stay out of
//! the graph until an operator needs them as data: weights as lazy expressions, small constants and shape arithmetic
//! element by element, and index grids (`Range` and what becomes of it) by offset and strides.

use crate::external::Storage;
use bytes::Bytes;
use std::collections::BTreeMap;
use std::sync::Arc;
use tpshard_ir::weight::{WeightExpr, WeightKind};
use tpshard_ir::{DType, DTypeClass, Data, Dim, Tensor, ValueId};

/// Most elements of a value that is known element by element. Literals in the graph are never larger.
pub(crate) const KNOWN_LIMIT: usize = 4096;

/// A value during lowering.
#[derive(Clone, Debug)]
pub(crate) enum Value {
    /// A value of the graph.
    Data(ValueId),
    /// Part of the model's weights, moved but not read.
    Weight(WeightExpr),
    /// Element by element: constants and shape arithmetic.
    Known(Arc<Known>),
    /// Integers that are linear in their index.
    Affine(Arc<Affine>),
    /// Affine integers side by side along a last axis, as `GatherND` takes them.
    Grid(Arc<Grid>),
    /// The result of a node that could not be lowered; silences the nodes after it.
    Poison,
}

/// One element of a known tensor.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Element {
    /// An integer, a bool as 0 or 1, or a float that holds a size.
    Int(Dim),
    /// A float, already rounded to the tensor's type.
    Float(f64),
}

/// A small tensor whose elements are constants or sizes.
#[derive(Clone, Debug)]
pub(crate) struct Known {
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    pub(crate) elements: Vec<Element>,
    /// The same value in the model's weights, if it comes from there unchanged.
    pub(crate) source: Option<WeightExpr>,
}

/// `offset + sum of strides[a] * index[a]`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Affine {
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<Dim>,
    pub(crate) offset: Dim,
    pub(crate) strides: Vec<Dim>,
}

/// `parts[i]` is entry `i` of the last axis; all have the shape of the grid without it.
#[derive(Clone, Debug)]
pub(crate) struct Grid {
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<Dim>,
    pub(crate) parts: Vec<Affine>,
}

impl Element {
    pub(crate) fn int(value: i64) -> Element {
        Element::Int(Dim::constant(value))
    }

    /// The constant, as a float.
    pub(crate) fn number(&self) -> Option<f64> {
        match self {
            Element::Int(dim) => dim.as_const().map(|value| value as f64),
            Element::Float(value) => Some(*value),
        }
    }

    /// The size, if the element is one.
    pub(crate) fn dim(&self) -> Option<&Dim> {
        match self {
            Element::Int(dim) => Some(dim),
            Element::Float(_) => None,
        }
    }

    /// True for a size that is not known before the run.
    pub(crate) fn is_open(&self) -> bool {
        self.dim().is_some_and(|dim| dim.as_const().is_none())
    }

    /// The constant, if it is an integer.
    pub(crate) fn integer(&self) -> Option<i64> {
        self.dim().and_then(Dim::as_const)
    }
}

/// `value` as `dtype` would hold it; `None` for types that are not computed with.
pub(crate) fn round_to(dtype: DType, value: f64) -> Option<f64> {
    match dtype {
        DType::F64 => Some(value),
        DType::F32 => Some(f64::from(value as f32)),
        DType::F16 => Some(half::f16::from_f64(value).to_f64()),
        DType::BF16 => Some(half::bf16::from_f64(value).to_f64()),
        _ => None,
    }
}

/// True if every value of the integer type is inside `i64` and `value` is inside the type.
pub(crate) fn fits(dtype: DType, value: i64) -> bool {
    let bits = dtype.bits() as u32;
    match dtype.class() {
        DTypeClass::Bool => (0..=1).contains(&value),
        DTypeClass::Int if bits >= 64 => true,
        DTypeClass::Int => (-(1i64 << (bits - 1))..(1i64 << (bits - 1))).contains(&value),
        DTypeClass::Uint if bits >= 64 => value >= 0,
        DTypeClass::Uint => (0..(1i64 << bits)).contains(&value),
        DTypeClass::Float => false,
    }
}

impl Known {
    /// True if an element is not known before the run.
    pub(crate) fn is_open(&self) -> bool {
        self.elements.iter().any(Element::is_open)
    }

    pub(crate) fn new(dtype: DType, shape: Vec<usize>, elements: Vec<Element>) -> Known {
        Known { dtype, shape, elements, source: None }
    }

    pub(crate) fn scalar(dtype: DType, element: Element) -> Known {
        Known::new(dtype, Vec::new(), vec![element])
    }

    /// A rank-1 `i64` of sizes.
    pub(crate) fn sizes(dims: &[Dim]) -> Known {
        Known::new(DType::I64, vec![dims.len()], dims.iter().cloned().map(Element::Int).collect())
    }

    pub(crate) fn dims(&self) -> Vec<Dim> {
        self.shape.iter().map(|&extent| Dim::from(extent)).collect()
    }

    /// The value of `tensor`, if its type is one that is computed with.
    pub(crate) fn from_tensor(tensor: &Tensor) -> Option<Known> {
        macro_rules! ints {
            ($values:expr) => {
                $values
                    .iter()
                    .map(|&v| Some(Element::int(i64::try_from(v).ok()?)))
                    .collect::<Option<Vec<_>>>()?
            };
        }
        let elements = match tensor.data() {
            Data::F32(v) => v.iter().map(|&x| Element::Float(f64::from(x))).collect(),
            Data::F64(v) => v.iter().map(|&x| Element::Float(x)).collect(),
            Data::F16(v) => v.iter().map(|x| Element::Float(x.to_f64())).collect(),
            Data::BF16(v) => v.iter().map(|x| Element::Float(x.to_f64())).collect(),
            Data::I8(v) => ints!(v),
            Data::I16(v) => ints!(v),
            Data::I32(v) => ints!(v),
            Data::I64(v) => ints!(v),
            Data::U8(v) => ints!(v),
            Data::U16(v) => ints!(v),
            Data::U32(v) => ints!(v),
            Data::U64(v) => ints!(v),
            Data::Bool(v) => v.iter().map(|&b| Element::int(i64::from(b))).collect(),
            Data::Raw(..) => return None,
        };
        Some(Known::new(tensor.dtype(), tensor.shape().to_vec(), elements))
    }

    /// The tensor, if no element depends on an input's size.
    pub(crate) fn to_tensor(&self) -> Option<Tensor> {
        let numbers = || self.elements.iter().map(Element::number).collect::<Option<Vec<f64>>>();
        let integers = || self.elements.iter().map(Element::integer).collect::<Option<Vec<i64>>>();
        macro_rules! ints {
            ($variant:ident, $ty:ty) => {
                Data::$variant(
                    integers()?.into_iter().map(|v| <$ty>::try_from(v).ok()).collect::<Option<Vec<_>>>()?,
                )
            };
        }
        let data = match self.dtype {
            DType::F32 => Data::F32(numbers()?.into_iter().map(|v| v as f32).collect()),
            DType::F64 => Data::F64(numbers()?),
            DType::F16 => Data::F16(numbers()?.into_iter().map(half::f16::from_f64).collect()),
            DType::BF16 => Data::BF16(numbers()?.into_iter().map(half::bf16::from_f64).collect()),
            DType::I8 => ints!(I8, i8),
            DType::I16 => ints!(I16, i16),
            DType::I32 => ints!(I32, i32),
            DType::I64 => Data::I64(integers()?),
            DType::U8 => ints!(U8, u8),
            DType::U16 => ints!(U16, u16),
            DType::U32 => ints!(U32, u32),
            DType::U64 => ints!(U64, u64),
            DType::Bool => Data::Bool(integers()?.into_iter().map(|v| v != 0).collect()),
            _ => return None,
        };
        Tensor::new(self.shape.clone(), data).ok()
    }

    /// The single element of a tensor of one element.
    pub(crate) fn single(&self) -> Option<&Element> {
        match self.elements.as_slice() {
            [element] => Some(element),
            _ => None,
        }
    }

    /// True if all elements are the constant `value`.
    pub(crate) fn all_equal(&self, value: f64) -> bool {
        self.elements.iter().all(|element| element.number() == Some(value))
    }

    /// Elements `map[i]` of this tensor under another shape.
    pub(crate) fn rearranged(&self, shape: Vec<usize>, map: &[usize]) -> Option<Known> {
        let elements = map.iter().map(|&at| self.elements.get(at).cloned()).collect::<Option<Vec<_>>>()?;
        Some(Known::new(self.dtype, shape, elements))
    }

    pub(crate) fn rewrite_dims(&mut self, rewrite: &dyn Fn(&Dim) -> Dim) {
        for element in &mut self.elements {
            if let Element::Int(dim) = element {
                *dim = rewrite(dim);
            }
        }
    }
}

impl Affine {
    /// `start, start + step, …`.
    pub(crate) fn range(dtype: DType, start: Dim, step: Dim, length: Dim) -> Affine {
        Affine { dtype, shape: vec![length], offset: start, strides: vec![step] }
    }

    pub(crate) fn rewrite_dims(&mut self, rewrite: &dyn Fn(&Dim) -> Dim) {
        self.offset = rewrite(&self.offset);
        for dim in self.shape.iter_mut().chain(&mut self.strides) {
            *dim = rewrite(dim);
        }
    }

    /// Element by element, if the shape is constant and small.
    pub(crate) fn to_known(&self) -> Option<Known> {
        let shape: Vec<usize> = self.shape.iter().map(Dim::as_size).collect::<Option<_>>()?;
        let count = tpshard_ir::tensor::element_count(&shape).filter(|&count| count <= KNOWN_LIMIT)?;
        let elements = (0..count).map(|flat| {
            let mut rest = flat;
            let mut sum = self.offset.clone();
            for (extent, stride) in shape.iter().zip(&self.strides).rev() {
                sum = sum + stride * &Dim::from(rest % extent);
                rest /= extent;
            }
            Element::Int(sum)
        });
        Some(Known::new(self.dtype, shape.clone(), elements.collect()))
    }

    /// The same integers with dims of extent 1 put in at, or dropped from, a shape; `None` if more changes.
    pub(crate) fn reshape(&self, shape: &[Dim]) -> Option<Affine> {
        let mut axes = (0..self.shape.len()).filter(|&axis| !self.shape[axis].is_one());
        let mut strides = Vec::with_capacity(shape.len());
        for dim in shape {
            if dim.is_one() {
                strides.push(Dim::constant(0));
            } else {
                let axis = axes.next().filter(|&axis| &self.shape[axis] == dim)?;
                strides.push(self.strides[axis].clone());
            }
        }
        axes.next().is_none().then(|| Affine { shape: shape.to_vec(), strides, ..self.clone() })
    }

    /// Stretched to `shape`, which NumPy broadcasting of this shape allows.
    pub(crate) fn broadcast(&self, shape: &[Dim]) -> Option<Affine> {
        let lead = shape.len().checked_sub(self.shape.len())?;
        let strides = (0..shape.len()).map(|axis| {
            let Some(own) = axis.checked_sub(lead) else { return Some(Dim::constant(0)) };
            match (&self.shape[own], &shape[axis]) {
                (from, to) if from == to => Some(self.strides[own].clone()),
                (from, _) if from.is_one() => Some(Dim::constant(0)),
                _ => None,
            }
        });
        let strides = strides.collect::<Option<Vec<_>>>()?;
        Some(Affine { shape: shape.to_vec(), strides, ..self.clone() })
    }

    pub(crate) fn transpose(&self, perm: &[usize]) -> Option<Affine> {
        let pick =
            |dims: &[Dim]| perm.iter().map(|&axis| dims.get(axis).cloned()).collect::<Option<Vec<_>>>();
        Some(Affine { shape: pick(&self.shape)?, strides: pick(&self.strides)?, ..self.clone() })
    }
}

/// Row-major strides of a constant shape.
pub(crate) fn strides_of(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1usize; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis].saturating_mul(shape[axis]);
    }
    strides
}

/// The index tuple of a flat position.
pub(crate) fn unflatten(mut flat: usize, shape: &[usize]) -> Vec<usize> {
    let mut index = vec![0; shape.len()];
    for axis in (0..shape.len()).rev() {
        let extent = shape[axis].max(1);
        index[axis] = flat % extent;
        flat /= extent;
    }
    index
}

/// Reads a small weight by walking its expression; `None` if it is too large or of a storage type.
pub(crate) fn read_weight(
    expr: &WeightExpr,
    find: &dyn Fn(&str) -> Option<crate::TensorRef>,
    storage: &Storage,
) -> Option<Known> {
    let count = tpshard_ir::tensor::element_count(expr.shape()).filter(|&count| count <= KNOWN_LIMIT)?;
    let mut open = BTreeMap::new();
    for name in expr.initializers() {
        let tensor = find(name)?;
        let bytes = storage.bytes(&tensor).ok()?;
        open.insert(name.to_owned(), (tensor.dtype, bytes));
    }
    let elements =
        (0..count).map(|flat| read_element(expr, flat, &open)).collect::<Option<Vec<Element>>>()?;
    Some(Known { source: Some(expr.clone()), ..Known::new(expr.dtype(), expr.shape().to_vec(), elements) })
}

/// The bytes of the initializers an expression reads.
type Open = BTreeMap<String, (DType, Bytes)>;

/// One element, found by following its position down to an initializer.
fn read_element(expr: &WeightExpr, flat: usize, open: &Open) -> Option<Element> {
    let index = unflatten(flat, expr.shape());
    let flatten = |index: &[usize], shape: &[usize]| {
        index.iter().zip(strides_of(shape)).map(|(i, stride)| i * stride).sum::<usize>()
    };
    match expr.kind() {
        WeightKind::Initializer { name } => {
            let (dtype, bytes) = open.get(name)?;
            let width = dtype.bits() / 8;
            if *dtype != expr.dtype() || width == 0 {
                return None;
            }
            let start = flat.checked_mul(width)?;
            let one = bytes.get(start..start.checked_add(width)?)?;
            let one = Tensor::from_le_bytes(*dtype, Vec::new(), one).ok()?;
            Known::from_tensor(&one)?.elements.pop()
        }
        WeightKind::Slice { source, axis, start, .. } => {
            let mut index = index;
            *index.get_mut(*axis)? += start;
            read_element(source, flatten(&index, source.shape()), open)
        }
        WeightKind::Concat { sources, axis } => {
            let mut index = index;
            for source in sources {
                let extent = *source.shape().get(*axis)?;
                if index[*axis] < extent {
                    return read_element(source, flatten(&index, source.shape()), open);
                }
                index[*axis] -= extent;
            }
            None
        }
        WeightKind::Transpose { source, perm } => {
            let mut original = vec![0; index.len()];
            for (at, &axis) in perm.iter().enumerate() {
                *original.get_mut(axis)? = index[at];
            }
            read_element(source, flatten(&original, source.shape()), open)
        }
        WeightKind::Reshape { source } => read_element(source, flat, open),
        WeightKind::Cast { source } => {
            super::elementwise::cast_element(&read_element(source, flat, open)?, source.dtype(), expr.dtype())
        }
    }
}
