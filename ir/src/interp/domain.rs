//! What operations are interpreted in: a set of elements with arithmetic.
//!
//! Functions called *wide* do not round, so that sums and products are rounded to the element type once, at their end.

use super::{Array, OpError};
use crate::dtype::DType;
use crate::layout::Monoid;
use crate::op::{Op, Scalar};
use crate::tensor::Tensor;
use std::cmp::Ordering;
use std::fmt::Debug;

/// Elements and their arithmetic.
pub trait Domain {
    type Element: Copy + Debug;

    fn integer(&self, value: i64, dtype: DType) -> Self::Element;

    fn real(&self, value: f64, dtype: DType) -> Self::Element;

    /// The integer an index element stands for.
    fn index(&self, element: Self::Element) -> Option<i64>;

    /// True for every `bool` element but `false`.
    fn truth(&self, element: Self::Element) -> bool;

    /// `function` of operands of type `from` (`Select`: of its branches), as an element of type `to`.
    fn scalar(
        &self,
        function: Scalar,
        from: DType,
        to: DType,
        args: &[Self::Element],
    ) -> Result<Self::Element, OpError>;

    /// Wide `sum + a * b`.
    fn multiply_add(&self, sum: Self::Element, a: Self::Element, b: Self::Element) -> Self::Element;

    /// Wide combination.
    fn combine(&self, monoid: Monoid, a: Self::Element, b: Self::Element) -> Self::Element;

    /// The element that changes nothing.
    fn identity(&self, monoid: Monoid, dtype: DType) -> Self::Element;

    /// Ends a wide computation.
    fn round(&self, wide: Self::Element, dtype: DType) -> Self::Element;

    /// A total order; for floats NaN is the greatest.
    fn order(&self, a: Self::Element, b: Self::Element) -> Ordering;

    /// True if the elements cannot be told apart.
    fn same(&self, a: Self::Element, b: Self::Element) -> bool {
        self.order(a, b) == Ordering::Equal
    }

    /// A composite evaluated from its definition; `None` to go through its decomposition.
    fn composite(
        &self,
        op: &Op,
        args: &[&Array<Self::Element>],
    ) -> Option<Result<Array<Self::Element>, OpError>>;

    /// The elements of a tensor.
    fn import(&self, tensor: &Tensor) -> Array<Self::Element>;

    /// An element that depends on `seed` only: anything for `Field`, small integers for `Real`, so that sums are exact.
    fn random(&self, seed: u64, dtype: DType) -> Self::Element;
}

/// A well mixed function of `seed` (SplitMix64's finaliser).
pub(crate) fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
