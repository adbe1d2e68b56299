//! Arithmetic over sixteen floats at a time whose bits depend on neither machine nor length of registers.
//!
//! Sums run in sixteen virtual lanes (element `i` in lane `i mod 16`) and the lanes are added as a balanced tree;
//! products are fused multiply-adds. `f32::mul_add` is one instruction where the machine has it and exact where it has
//! not, so results agree between all machines.

pub(crate) mod functions;
mod isa;

#[cfg(test)]
pub(crate) use isa::vectorised_for;
pub(crate) use isa::{Isa, vectorised};
use std::ops::Range;

/// Floats per vector.
pub(crate) const LANES: usize = 16;

/// Sixteen floats, a cache line.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C, align(64))]
pub(crate) struct Lanes(pub(crate) [f32; LANES]);

impl Lanes {
    pub(crate) const ZERO: Lanes = Lanes([0.0; LANES]);

    /// The first elements of `from`; zeros where it has less.
    #[inline(always)]
    pub(crate) fn load(from: &[f32]) -> Lanes {
        let mut lanes = Lanes::ZERO;
        match from.first_chunk::<LANES>() {
            Some(all) => lanes.0 = *all,
            None => lanes.0[..from.len()].copy_from_slice(from),
        }
        lanes
    }

    /// To the first elements of `to`, which has as many. Not more general on purpose: vectors of which a part is stored
    /// do not stay in registers.
    #[inline(always)]
    pub(crate) fn store(self, to: &mut [f32]) {
        to[..LANES].copy_from_slice(&self.0);
    }

    /// `self + factor * with`, rounded once.
    #[inline(always)]
    pub(crate) fn add_scaled(&mut self, factor: f32, with: &Lanes) {
        for (sum, &x) in self.0.iter_mut().zip(&with.0) {
            *sum = factor.mul_add(x, *sum);
        }
    }

    /// `self + a * b`, rounded once.
    #[inline(always)]
    fn add_product(&mut self, a: &Lanes, b: &Lanes) {
        for ((sum, &a), &b) in self.0.iter_mut().zip(&a.0).zip(&b.0) {
            *sum = a.mul_add(b, *sum);
        }
    }

    /// The lanes as a balanced tree: halves are combined until one is left.
    #[inline(always)]
    pub(crate) fn combined(mut self, with: impl Fn(f32, f32) -> f32) -> f32 {
        let mut width = LANES / 2;
        while width > 0 {
            for lane in 0..width {
                self.0[lane] = with(self.0[lane], self.0[lane + width]);
            }
            width /= 2;
        }
        self.0[0]
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        self.combined(|a, b| a + b)
    }
}

/// Combines `map` of all elements in lanes; lanes without an element keep `identity`.
#[inline(always)]
pub(crate) fn fold(
    row: &[f32],
    identity: f32,
    map: impl Fn(f32) -> f32,
    with: impl Fn(f32, f32) -> f32,
) -> f32 {
    let mut lanes = Lanes([identity; LANES]);
    let (whole, rest) = row.as_chunks::<LANES>();
    for chunk in whole {
        for (lane, &x) in lanes.0.iter_mut().zip(chunk) {
            *lane = with(*lane, map(x));
        }
    }
    for (lane, &x) in lanes.0.iter_mut().zip(rest) {
        *lane = with(*lane, map(x));
    }
    lanes.combined(with)
}

/// The sum of all elements.
#[inline(always)]
pub(crate) fn sum(row: &[f32]) -> f32 {
    fold(row, 0.0, |x| x, |a, b| a + b)
}

/// The sum of squares of all differences to `mean`.
#[inline(always)]
pub(crate) fn sum_squares(row: &[f32], mean: f32) -> f32 {
    let mut lanes = Lanes::ZERO;
    let (whole, rest) = row.as_chunks::<LANES>();
    for chunk in whole {
        for (lane, &x) in lanes.0.iter_mut().zip(chunk) {
            *lane = (x - mean).mul_add(x - mean, *lane);
        }
    }
    for (lane, &x) in lanes.0.iter_mut().zip(rest) {
        *lane = (x - mean).mul_add(x - mean, *lane);
    }
    lanes.sum()
}

/// The sums of products of several rows with several others, all of one length. Every sum has the same bits whatever it is
/// computed next to.
#[inline(always)]
pub(crate) fn dots<const A: usize, const B: usize>(left: [&[f32]; A], right: [&[f32]; B]) -> [[f32; B]; A] {
    let mut sums = [[Lanes::ZERO; B]; A];
    let length = left.first().map_or(0, |row| row.len());
    let whole = length / LANES * LANES;
    for at in (0..whole).step_by(LANES) {
        add_products(&mut sums, left, right, at..at + LANES);
    }
    if whole < length {
        add_products(&mut sums, left, right, whole..length);
    }
    let mut results = [[0.0; B]; A];
    for (results, sums) in results.iter_mut().zip(sums) {
        for (result, sum) in results.iter_mut().zip(sums) {
            *result = sum.sum();
        }
    }
    results
}

/// At most sixteen elements of each row.
#[inline(always)]
fn add_products<const A: usize, const B: usize>(
    sums: &mut [[Lanes; B]; A],
    left: [&[f32]; A],
    right: [&[f32]; B],
    range: Range<usize>,
) {
    let right: [Lanes; B] = std::array::from_fn(
        #[inline(always)]
        |b| Lanes::load(&right[b][range.clone()]),
    );
    for (sums, row) in sums.iter_mut().zip(left) {
        let left = Lanes::load(&row[range.clone()]);
        for (sum, right) in sums.iter_mut().zip(&right) {
            sum.add_product(&left, right);
        }
    }
}

/// The largest element, NaN if there is one; -inf of none.
#[inline(always)]
pub(crate) fn largest(row: &[f32]) -> f32 {
    fold(row, f32::NEG_INFINITY, |x| x, |a, b| if b > a || b.is_nan() { b } else { a })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_have_the_same_bits_for_all_instructions_and_next_to_others() {
        let row = |seed: usize| -> Vec<f32> {
            (0..77).map(|i| ((i * 37 + seed * 11) % 101) as f32 / 7.0).collect()
        };
        let (a, b, c) = (row(1), row(2), row(3));
        let all = |isa: Isa| {
            vectorised_for(
                isa,
                #[inline(always)]
                |_| {
                    let pair = dots([&a, &b], [&c, &a]);
                    [sum(&a), sum_squares(&a, 3.5), largest(&b), pair[0][0], pair[1][1]]
                },
            )
        };
        let expected = all(Isa::Portable);
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_there()) {
            assert_eq!(all(isa).map(f32::to_bits), expected.map(f32::to_bits), "{isa:?}");
        }
        assert_eq!(dots([&a[..]], [&c[..]])[0][0], expected[3]);
        let exact: f64 = a.iter().zip(&c).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum();
        assert!((f64::from(expected[3]) - exact).abs() < 1e-6 * exact);
        assert_eq!(largest(&[]), f32::NEG_INFINITY);
        assert!(largest(&[1.0, f32::NAN, 2.0]).is_nan());
    }
}
