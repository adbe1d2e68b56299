//! Weights as lazy expressions over the initializers of the model file.
//!
//! Import and planning move, cut and join weights without touching their bytes: a weight is an expression, evaluated one
//! region at a time when the shards are written. Everything in it is constant. Expressions are checked when they are
//! built, so dtype and shape of an existing one are always known and right, and they have a text form that round-trips:
//!
//! ```text
//! init("w", f32, [64, 192]) |> slice(1, 0, 64) |> transpose([1, 0])
//! concat(init("k", f16, [8, 64]), init("v", f16, [8, 64]); 0) |> reshape([2, 8, 64]) |> cast(f32)
//! ```
//!
//! `slice(axis, start, length)` and `concat(sources; axis)` name one axis, `transpose(p)` makes dimension `i` of the
//! result dimension `p[i]` of its source, `reshape` keeps the row-major order of elements.

mod text;

use crate::DType;
use std::collections::BTreeSet;
use std::sync::Arc;

pub use text::ParseWeightError;

/// Most operations between a result and an initializer. Evaluation, printing and dropping recurse this deep.
pub const MAX_DEPTH: usize = 128;
/// Most operations in one expression, shared ones counted as often as they are reached.
pub const MAX_NODES: usize = 1 << 16;
/// Most dimensions a weight may have.
pub const MAX_RANK: usize = 32;

/// Key in a weight file's metadata for the logical type of a tensor that the file stores as raw bytes, e.g. `u4`.
pub fn logical_dtype_key(tensor: &str) -> String {
    format!("dtype:{tensor}")
}

/// Key in a weight file's metadata for the logical shape of such a tensor, e.g. `4096,11008`.
pub fn logical_shape_key(tensor: &str) -> String {
    format!("shape:{tensor}")
}

/// A checked weight expression; copies share their nodes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WeightExpr(Arc<Node>);

#[derive(Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Node {
    kind: WeightKind,
    dtype: DType,
    shape: Vec<usize>,
    depth: usize,
    nodes: usize,
}

/// The outermost operation of a weight expression.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum WeightKind {
    /// The bytes of an initializer of the model.
    Initializer { name: String },
    /// `length` entries of `axis` from `start`.
    Slice { source: WeightExpr, axis: usize, start: usize, length: usize },
    /// The sources one after another along `axis`.
    Concat { sources: Vec<WeightExpr>, axis: usize },
    /// Dimension `i` of the result is dimension `perm[i]` of the source.
    Transpose { source: WeightExpr, perm: Vec<usize> },
    /// The same elements in the same order under the expression's own shape.
    Reshape { source: WeightExpr },
    /// Each element converted to the expression's own dtype, as ONNX `Cast` does.
    Cast { source: WeightExpr },
}

impl WeightKind {
    /// The expressions it is made of.
    pub fn sources(&self) -> &[WeightExpr] {
        match self {
            WeightKind::Initializer { .. } => &[],
            WeightKind::Concat { sources, .. } => sources,
            WeightKind::Slice { source, .. }
            | WeightKind::Transpose { source, .. }
            | WeightKind::Reshape { source }
            | WeightKind::Cast { source } => std::slice::from_ref(source),
        }
    }
}

/// Why a weight expression cannot be built.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum WeightExprError {
    #[error("shape {shape:?} of {dtype} does not fit into memory addresses")]
    TooLarge { dtype: DType, shape: Vec<usize> },
    #[error("a weight of {rank} dimensions, at most {MAX_RANK} are supported")]
    Rank { rank: usize },
    #[error("axis {axis} of a weight of shape {shape:?}")]
    Axis { axis: usize, shape: Vec<usize> },
    #[error("{length} entries from {start} of axis {axis} of a weight of shape {shape:?}")]
    Bounds { axis: usize, start: usize, length: usize, shape: Vec<usize> },
    #[error("nothing to concatenate")]
    Empty,
    #[error("cannot concatenate {first_dtype} {first:?} and {second_dtype} {second:?} along axis {axis}")]
    Mismatch { first_dtype: DType, first: Vec<usize>, second_dtype: DType, second: Vec<usize>, axis: usize },
    #[error("{perm:?} is not an order of the dimensions of {shape:?}")]
    Permutation { perm: Vec<usize>, shape: Vec<usize> },
    #[error("cannot reshape {from:?} to {to:?}: different numbers of elements")]
    Reshape { from: Vec<usize>, to: Vec<usize> },
    #[error(
        "cannot cast a weight from {from} to {to}: {storage} only stores values\n\
         help: keep the cast in the graph, where it is computed with its scales"
    )]
    Cast { from: DType, to: DType, storage: DType },
    #[error("a weight more than {MAX_DEPTH} operations away from its initializer")]
    TooDeep,
    #[error("a weight made by more than {MAX_NODES} operations")]
    TooComplex,
}

impl WeightExpr {
    fn new(kind: WeightKind, dtype: DType, shape: Vec<usize>) -> Result<Self, WeightExprError> {
        let sources = kind.sources();
        let depth = sources.iter().map(|source| source.0.depth + 1).max().unwrap_or(0);
        let nodes = sources.iter().fold(1usize, |n, source| n.saturating_add(source.0.nodes));
        if shape.len() > MAX_RANK {
            return Err(WeightExprError::Rank { rank: shape.len() });
        }
        if depth > MAX_DEPTH {
            return Err(WeightExprError::TooDeep);
        }
        if nodes > MAX_NODES {
            return Err(WeightExprError::TooComplex);
        }
        // Zero dims are set aside, so that strides of empty weights do not overflow either.
        let count = shape.iter().filter(|&&dim| dim != 0).try_fold(1u64, |n, &dim| n.checked_mul(dim as u64));
        let bytes = count.and_then(|count| count.checked_mul(dtype.bits() as u64));
        if bytes.is_none_or(|bits| bits > isize::MAX as u64) {
            return Err(WeightExprError::TooLarge { dtype, shape });
        }
        Ok(WeightExpr(Arc::new(Node { kind, dtype, shape, depth, nodes })))
    }

    /// All of the initializer `name`.
    ///
    /// # Errors
    /// The shape is too large.
    pub fn initializer(
        name: impl Into<String>,
        dtype: DType,
        shape: Vec<usize>,
    ) -> Result<Self, WeightExprError> {
        WeightExpr::new(WeightKind::Initializer { name: name.into() }, dtype, shape)
    }

    /// `length` entries of `axis`, from `start`.
    ///
    /// # Errors
    /// They do not lie within the weight.
    pub fn slice(&self, axis: usize, start: usize, length: usize) -> Result<Self, WeightExprError> {
        let mut shape = self.shape().to_vec();
        let Some(dim) = shape.get_mut(axis) else { return Err(WeightExprError::Axis { axis, shape }) };
        if start.checked_add(length).is_none_or(|end| end > *dim) {
            return Err(WeightExprError::Bounds { axis, start, length, shape });
        }
        *dim = length;
        let kind = WeightKind::Slice { source: self.clone(), axis, start, length };
        WeightExpr::new(kind, self.dtype(), shape)
    }

    /// `sources` one after another along `axis`.
    ///
    /// # Errors
    /// There are none, or they differ in dtype or in another dimension.
    pub fn concat(sources: Vec<WeightExpr>, axis: usize) -> Result<Self, WeightExprError> {
        let Some(first) = sources.first() else { return Err(WeightExprError::Empty) };
        let dtype = first.dtype();
        let mut shape = first.shape().to_vec();
        if axis >= shape.len() {
            return Err(WeightExprError::Axis { axis, shape });
        }
        for source in sources.iter().skip(1) {
            let other = source.shape();
            let fits = other.len() == shape.len()
                && source.dtype() == dtype
                && (0..shape.len()).all(|d| d == axis || shape[d] == other[d]);
            if !fits {
                return Err(WeightExprError::Mismatch {
                    first_dtype: dtype,
                    first: shape,
                    second_dtype: source.dtype(),
                    second: other.to_vec(),
                    axis,
                });
            }
            let Some(total) = shape[axis].checked_add(other[axis]) else {
                return Err(WeightExprError::TooLarge { dtype, shape });
            };
            shape[axis] = total;
        }
        WeightExpr::new(WeightKind::Concat { sources, axis }, dtype, shape)
    }

    /// Dimension `i` of the result is dimension `perm[i]` of this weight.
    ///
    /// # Errors
    /// `perm` does not hold each dimension once.
    pub fn transpose(&self, perm: Vec<usize>) -> Result<Self, WeightExprError> {
        let shape = self.shape();
        let distinct: BTreeSet<usize> = perm.iter().copied().filter(|&axis| axis < shape.len()).collect();
        if perm.len() != shape.len() || distinct.len() != shape.len() {
            return Err(WeightExprError::Permutation { perm, shape: shape.to_vec() });
        }
        let permuted = perm.iter().map(|&axis| shape[axis]).collect();
        let kind = WeightKind::Transpose { source: self.clone(), perm };
        WeightExpr::new(kind, self.dtype(), permuted)
    }

    /// The same elements under another shape.
    ///
    /// # Errors
    /// The element counts differ.
    pub fn reshape(&self, shape: Vec<usize>) -> Result<Self, WeightExprError> {
        let count = crate::tensor::element_count(&shape);
        if count.is_none() || count != crate::tensor::element_count(self.shape()) {
            return Err(WeightExprError::Reshape { from: self.shape().to_vec(), to: shape });
        }
        let kind = WeightKind::Reshape { source: self.clone() };
        WeightExpr::new(kind, self.dtype(), shape)
    }

    /// Each element converted to `to`.
    ///
    /// # Errors
    /// One of the two only stores values (packed integers, 8-bit floats).
    pub fn cast(&self, to: DType) -> Result<Self, WeightExprError> {
        let from = self.dtype();
        if let Some(storage) = [from, to].into_iter().find(|&dtype| !is_arithmetic(dtype)) {
            return Err(WeightExprError::Cast { from, to, storage });
        }
        let kind = WeightKind::Cast { source: self.clone() };
        WeightExpr::new(kind, to, self.shape().to_vec())
    }

    /// The outermost operation.
    pub fn kind(&self) -> &WeightKind {
        &self.0.kind
    }

    /// Element type of the result.
    pub fn dtype(&self) -> DType {
        self.0.dtype
    }

    /// Shape of the result.
    pub fn shape(&self) -> &[usize] {
        &self.0.shape
    }

    /// Names of all initializers the expression reads.
    pub fn initializers(&self) -> BTreeSet<&str> {
        let mut names = BTreeSet::new();
        self.collect_initializers(&mut names);
        names
    }

    fn collect_initializers<'a>(&'a self, names: &mut BTreeSet<&'a str>) {
        if let WeightKind::Initializer { name } = self.kind() {
            names.insert(name);
        }
        self.kind().sources().iter().for_each(|source| source.collect_initializers(names));
    }
}

/// True for the types that are computed with, as opposed to those that only store values.
fn is_arithmetic(dtype: DType) -> bool {
    use DType::*;
    matches!(dtype, F32 | F16 | BF16 | F64 | I8 | I16 | I32 | I64 | U8 | U16 | U32 | U64 | Bool)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn w() -> WeightExpr {
        WeightExpr::initializer("w", DType::F32, vec![64, 192]).unwrap()
    }

    #[test]
    fn shapes_and_dtypes_follow_the_operations() {
        let q = w().slice(1, 64, 64).unwrap().transpose(vec![1, 0]).unwrap();
        assert_eq!(q.shape(), [64, 64]);
        let joined = WeightExpr::concat(vec![w(), w().slice(0, 0, 2).unwrap()], 0).unwrap();
        assert_eq!(joined.shape(), [66, 192]);
        let cast = joined.reshape(vec![66, 3, 64]).unwrap().cast(DType::F16).unwrap();
        assert_eq!((cast.dtype(), cast.shape()), (DType::F16, &[66, 3, 64][..]));
        assert_eq!(cast.initializers().into_iter().collect::<Vec<_>>(), ["w"]);
    }

    #[test]
    fn wrong_operations_are_refused() {
        use WeightExprError as E;
        assert!(matches!(w().slice(2, 0, 1), Err(E::Axis { axis: 2, .. })));
        assert!(matches!(w().slice(0, 60, 5), Err(E::Bounds { .. })));
        assert!(matches!(w().slice(0, 1, usize::MAX), Err(E::Bounds { .. })));
        assert!(matches!(w().transpose(vec![0, 0]), Err(E::Permutation { .. })));
        assert!(matches!(w().transpose(vec![0, 2]), Err(E::Permutation { .. })));
        assert!(matches!(w().transpose(vec![0]), Err(E::Permutation { .. })));
        assert!(matches!(w().reshape(vec![64, 191]), Err(E::Reshape { .. })));
        assert!(matches!(w().reshape(vec![usize::MAX, 2]), Err(E::Reshape { .. })));
        assert!(matches!(WeightExpr::concat(vec![], 0), Err(E::Empty)));
        assert!(matches!(
            WeightExpr::concat(vec![w(), w().cast(DType::F16).unwrap()], 0),
            Err(E::Mismatch { .. })
        ));
        let narrow = w().slice(1, 0, 3).unwrap();
        assert!(matches!(WeightExpr::concat(vec![w(), narrow], 0), Err(E::Mismatch { .. })));
        assert!(matches!(w().cast(DType::U4), Err(E::Cast { storage: DType::U4, .. })));
        let large = WeightExpr::initializer("w", DType::F32, vec![1 << 40, 1 << 40]);
        assert!(matches!(large, Err(E::TooLarge { .. })));
        let hidden = WeightExpr::initializer("w", DType::F32, vec![0, 1 << 40, 1 << 40]);
        assert!(matches!(hidden, Err(E::TooLarge { .. })));
        assert!(matches!(WeightExpr::initializer("w", DType::F32, vec![1; 33]), Err(E::Rank { rank: 33 })));
    }

    #[test]
    fn depth_is_capped() {
        let mut deep = w();
        for _ in 0..MAX_DEPTH {
            deep = deep.transpose(vec![1, 0]).unwrap();
        }
        assert_eq!(deep.transpose(vec![1, 0]), Err(WeightExprError::TooDeep));
    }

    #[test]
    fn shared_nodes_cannot_multiply_without_bound() {
        let double = |x: &WeightExpr| WeightExpr::concat(vec![x.clone(), x.clone()], 0)?.slice(0, 0, 64);
        let mut x = w();
        let error = loop {
            match double(&x) {
                Ok(next) => x = next,
                Err(error) => break error,
            }
        };
        assert_eq!(error, WeightExprError::TooComplex);
    }
}
