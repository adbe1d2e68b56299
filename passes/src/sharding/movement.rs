//! Operations that move elements without computing.

use super::pointwise::{all_but, map};
use super::{Factor, FactorDim};
use tpshard_ir::{Dim, Type};

/// Dims the operand has pass; stretched and new dims belong to the result alone.
pub(super) fn broadcast(args: &[&Type], result: &Type) -> Vec<Factor> {
    map(args, result)
}

/// Result dim `i` is operand dim `perm[i]`.
pub(super) fn transpose(perm: &[usize], result: &Type) -> Vec<Factor> {
    perm.iter()
        .zip(&result.shape)
        .enumerate()
        .map(|(dim, (&from, count))| {
            Factor::pass(count, vec![Some(FactorDim::whole(from))], FactorDim::whole(dim))
        })
        .collect()
}

/// Dims without padding pass.
pub(super) fn pad(low: &[Dim], high: &[Dim], args: &[&Type], result: &Type) -> Vec<Factor> {
    let padded: Vec<usize> = (0..result.rank())
        .filter(|&i| !(low.get(i).is_some_and(Dim::is_zero) && high.get(i).is_some_and(Dim::is_zero)))
        .collect();
    all_but(&padded, args, result)
}

/// Dims fall into groups with equal products; of each group, the leading dims of both sides share the major factor.
/// Dims of extent 1 are skipped.
pub(super) fn reshape(args: &[&Type], result: &Type) -> Vec<Factor> {
    let [x] = args else { return vec![] };
    let (from, to) = (Prefixes::of(&x.shape), Prefixes::of(&result.shape));
    let (mut i, mut j) = (0, 0);
    let mut all = Vec::new();
    for end in 1..from.products.len() {
        let found = (j + 1..to.products.len()).find(|&other| to.products[other] == from.products[end]);
        if let Some(other) = found {
            let (a, b) = (from.dims[i], to.dims[j]);
            if let Some(count) = common_major(&x.shape[a], &result.shape[b])
                && let (Some(inner_a), Some(inner_b)) =
                    (x.shape[a].exact_div(&count), result.shape[b].exact_div(&count))
            {
                all.push(Factor::pass(
                    &count,
                    vec![Some(FactorDim::of(a, inner_a))],
                    FactorDim::of(b, inner_b),
                ));
            }
            (i, j) = (end, other);
        }
    }
    all
}

/// The dims of a shape that are not the constant 1, and the products of the first 0, 1, 2 … of them.
struct Prefixes {
    dims: Vec<usize>,
    products: Vec<Dim>,
}

impl Prefixes {
    fn of(shape: &[Dim]) -> Prefixes {
        let dims: Vec<usize> = (0..shape.len()).filter(|&i| !shape[i].is_one()).collect();
        let mut products = vec![Dim::constant(1)];
        for &dim in &dims {
            let next = &products[products.len() - 1] * &shape[dim];
            products.push(next);
        }
        // Products that contain a zero say nothing about where groups end.
        if products.iter().any(Dim::is_zero) {
            products.truncate(1);
        }
        Prefixes { dims, products }
    }
}

/// The largest known count that divides both dims.
fn common_major(a: &Dim, b: &Dim) -> Option<Dim> {
    if let (Some(a), Some(b)) = (a.as_size(), b.as_size()) {
        return Some(Dim::from(greatest_common_divisor(a, b)));
    }
    if b.exact_div(a).is_some() {
        return Some(a.clone());
    }
    a.exact_div(b).is_some().then(|| b.clone())
}

fn greatest_common_divisor(mut a: usize, mut b: usize) -> usize {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}
