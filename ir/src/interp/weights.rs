//! Weight expressions evaluated: moves keep every bit, casts are those of [`Real`] (or of the given domain).

use super::domain::mix;
use super::eval::check_limit;
use super::{Array, Domain, OpError, Real, codec, movement};
use crate::dtype::DType;
use crate::op::Scalar;
use crate::tensor::Tensor;
use crate::weight::{WeightExpr, WeightKind};

type Result<T> = std::result::Result<T, OpError>;

/// Gives the values of whole initializers, by their expression and name.
pub type InitializerSource<'a, E> = dyn Fn(&WeightExpr, &str) -> Result<Array<E>> + 'a;

/// The value of a weight expression from the tensors of its initializers. No intermediate exceeds `element_limit`.
///
/// # Errors
/// `initializer` fails or gives a tensor of another type, or the limit is exceeded.
pub fn eval_weight(
    expr: &WeightExpr,
    initializer: &dyn Fn(&str) -> Result<Tensor>,
    element_limit: usize,
) -> Result<Tensor> {
    let source = |_: &WeightExpr, name: &str| Ok(codec::codes(&initializer(name)?));
    let cast = |codes: Array<u64>, to: DType| {
        let from = Real.import(&codec::from_codes(&codes)?);
        Ok(codec::codes(&Real.export(&cast_array(&Real, &from, to)?)?))
    };
    codec::from_codes(&evaluate(expr, &source, &cast, element_limit)?)
}

/// As [`eval_weight`], in any domain. `initializer` gets the expression of the whole initializer and its name.
///
/// # Errors
/// As [`eval_weight`].
pub fn eval_weight_in<D: Domain>(
    domain: &D,
    expr: &WeightExpr,
    initializer: &InitializerSource<'_, D::Element>,
    element_limit: usize,
) -> Result<Array<D::Element>> {
    evaluate(expr, initializer, &|array, to| cast_array(domain, &array, to), element_limit)
}

/// A value for `expr` whose initializers are random, each a function of its name and `seed` alone.
///
/// # Errors
/// The limit is exceeded.
pub fn random_weight<D: Domain>(
    domain: &D,
    expr: &WeightExpr,
    seed: u64,
    element_limit: usize,
) -> Result<Array<D::Element>> {
    let initializer = |whole: &WeightExpr, name: &str| {
        check_limit(whole.shape(), element_limit)?;
        let seed = name.bytes().fold(mix(seed), |state, byte| mix(state ^ u64::from(byte)));
        super::random_array(domain, whole.dtype(), whole.shape(), seed)
    };
    eval_weight_in(domain, expr, &initializer, element_limit)
}

fn cast_array<D: Domain>(domain: &D, array: &Array<D::Element>, to: DType) -> Result<Array<D::Element>> {
    Array::from_fn(to, array.shape(), |index| {
        domain.scalar(Scalar::Cast(to), array.dtype, to, &[*array.at(index)])
    })
}

fn evaluate<E: Clone>(
    expr: &WeightExpr,
    initializer: &InitializerSource<'_, E>,
    cast: &dyn Fn(Array<E>, DType) -> Result<Array<E>>,
    limit: usize,
) -> Result<Array<E>> {
    check_limit(expr.shape(), limit)?;
    let inner = |source: &WeightExpr| evaluate(source, initializer, cast, limit);
    match expr.kind() {
        WeightKind::Initializer { name } => {
            let value = initializer(expr, name)?;
            if value.dtype != expr.dtype() || value.shape() != expr.shape() {
                let found = value.ty();
                return Err(OpError::other(format!("initializer `{name}` is {found}, expected {expr}")));
            }
            Ok(value)
        }
        WeightKind::Slice { source, axis, start, length } => inner(source)?.run(*axis, *start, *length),
        WeightKind::Concat { sources, axis } => {
            let parts = sources.iter().map(inner).collect::<Result<Vec<_>>>()?;
            Array::concat(&parts.iter().collect::<Vec<_>>(), *axis)
        }
        WeightKind::Transpose { source, perm } => movement::transpose(&inner(source)?, perm),
        WeightKind::Reshape { source } => Ok(inner(source)?.reshaped(expr.shape())),
        WeightKind::Cast { source } => cast(inner(source)?, expr.dtype()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_move_bits_and_cast_values() {
        let packed = Tensor::from_le_bytes(DType::U4, vec![2, 3], &[0x21, 0x43, 0x65]).unwrap();
        let floats = Tensor::from_vec(vec![3], vec![1.5f32, -2.5, 1e9]).unwrap();
        let initializer = |name: &str| match name {
            "q" => Ok(packed.clone()),
            "f" => Ok(floats.clone()),
            _ => Err(OpError::other("absent")),
        };
        let q = WeightExpr::initializer("q", DType::U4, vec![2, 3]).unwrap();
        let column = q.transpose(vec![1, 0]).unwrap().slice(0, 1, 2).unwrap();
        let value = eval_weight(&column, &initializer, 100).unwrap();
        assert_eq!(value.data().to_le_bytes(), [0x52, 0x63]);
        let f = WeightExpr::initializer("f", DType::F32, vec![3]).unwrap();
        let both = WeightExpr::concat(vec![f.clone(), f.clone()], 0).unwrap();
        let cast = eval_weight(&both.cast(DType::I16).unwrap(), &initializer, 100).unwrap();
        assert_eq!(cast.as_slice::<i16>().unwrap(), [1, -2, -13824, 1, -2, -13824]);
        assert!(matches!(eval_weight(&both, &initializer, 5), Err(OpError::Limit { needed: 6, limit: 5 })));
        let wrong = WeightExpr::initializer("f", DType::F32, vec![4]).unwrap();
        assert!(eval_weight(&wrong, &initializer, 100).unwrap_err().to_string().contains("f32[3]"));
    }
}
