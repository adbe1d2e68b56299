//! Arithmetic over sixteen floats at a time whose bits depend on neither machine nor length of registers.
//!
//! Sums run in sixteen virtual lanes (element `i` in lane `i mod 16`) and the lanes are added as a balanced tree;
//! products are fused multiply-adds. `f32::mul_add` is one instruction where the machine has it and exact where it has
//! not, so results agree between all machines.

pub(crate) mod functions;
mod isa;
mod sums;

#[cfg(test)]
pub(crate) use isa::vectorised_for;
pub(crate) use isa::{Isa, vectorised};
pub(crate) use sums::sums;

/// Floats per vector.
pub(crate) const LANES: usize = 16;

/// Sixteen floats, a cache line.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C, align(64))]
pub(crate) struct Lanes(pub(crate) [f32; LANES]);

impl Lanes {
    pub(crate) const ZERO: Lanes = Lanes([0.0; LANES]);

    /// The first elements of `from`, which has as many. Not more general on purpose, as [`Lanes::store`].
    #[inline(always)]
    pub(crate) fn load(from: &[f32]) -> Lanes {
        let mut lanes = Lanes::ZERO;
        lanes.0.copy_from_slice(&from[..LANES]);
        lanes
    }

    /// At most sixteen elements, and zeros.
    #[inline(always)]
    pub(crate) fn load_part(from: &[f32]) -> Lanes {
        let mut lanes = Lanes::ZERO;
        lanes.0[..from.len()].copy_from_slice(from);
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
    pub(crate) fn add_product(&mut self, a: &Lanes, b: &Lanes) {
        for ((sum, &a), &b) in self.0.iter_mut().zip(&a.0).zip(&b.0) {
            *sum = a.mul_add(b, *sum);
        }
    }

    #[inline(always)]
    pub(crate) fn scaled(mut self, factor: f32) -> Lanes {
        self.0.iter_mut().for_each(|lane| *lane *= factor);
        self
    }

    /// The lanes as a balanced tree: halves are combined until one is left.
    #[inline(always)]
    pub(crate) fn combined(self, with: impl Fn(f32, f32) -> f32) -> f32 {
        let eight: [f32; 8] = halved(&self.0, &with);
        let four: [f32; 4] = halved(&eight, &with);
        let [a, b]: [f32; 2] = halved(&four, &with);
        with(a, b)
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        self.combined(|a, b| a + b)
    }
}

#[inline(always)]
fn halved<const N: usize>(all: &[f32], with: &impl Fn(f32, f32) -> f32) -> [f32; N] {
    std::array::from_fn(
        #[inline(always)]
        |i| with(all[i], all[i + N]),
    )
}

impl std::ops::Add for Lanes {
    type Output = Lanes;

    #[inline(always)]
    fn add(mut self, other: Lanes) -> Lanes {
        for (a, b) in self.0.iter_mut().zip(&other.0) {
            *a += b;
        }
        self
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

/// The sum of products of two rows of one length.
#[cfg(test)]
#[inline(always)]
pub(crate) fn dot(left: &[f32], right: &[f32]) -> f32 {
    dot_lanes(left, right).sum()
}

/// The lanes whose sum is a [`dot`].
#[inline(always)]
pub(crate) fn dot_lanes(left: &[f32], right: &[f32]) -> Lanes {
    let mut sum = Lanes::ZERO;
    let (left, left_rest) = left.as_chunks::<LANES>();
    let (right, right_rest) = right.as_chunks::<LANES>();
    for (a, b) in left.iter().zip(right) {
        sum.add_product(&Lanes(*a), &Lanes(*b));
    }
    if !left_rest.is_empty() {
        sum.add_product(&Lanes::load_part(left_rest), &Lanes::load_part(right_rest));
    }
    sum
}

/// Repeats a statement for every lane. Written out, as a loop over lanes inside of one over elements is turned around by
/// the compiler, into scattered stores.
macro_rules! for_lanes {
    ($lane:ident => $body:expr) => {
        for_lanes!(@ $lane $body, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    (@ $lane:ident $body:expr, $($number:literal)*) => {
        $({
            const $lane: usize = $number;
            $body;
        })*
    };
}
pub(crate) use for_lanes;

/// [`dot`] of a row with sixteen others, of which step `i` holds element `i` of each; the bits are the same.
#[inline(always)]
pub(crate) fn dots(left: &[f32], right: &[Lanes]) -> Lanes {
    // One sum per lane that `dot` would have, for all sixteen rows.
    let mut sums = [Lanes::ZERO; LANES];
    let (left, left_rest) = left.as_chunks::<LANES>();
    let (right, right_rest) = right.as_chunks::<LANES>();
    for (left, right) in left.iter().zip(right) {
        for_lanes!(LANE => sums[LANE].add_scaled(left[LANE], &right[LANE]));
    }
    for_lanes!(LANE => if let (Some(&left), Some(right)) = (left_rest.get(LANE), right_rest.get(LANE)) {
        sums[LANE].add_scaled(left, right);
    });
    let [s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15] = sums;
    let eight = [s0 + s8, s1 + s9, s2 + s10, s3 + s11, s4 + s12, s5 + s13, s6 + s14, s7 + s15];
    let [s0, s1, s2, s3, s4, s5, s6, s7] = eight;
    let [s0, s1, s2, s3] = [s0 + s4, s1 + s5, s2 + s6, s3 + s7];
    (s0 + s2) + (s1 + s3)
}

/// Sixteen rows of one length at most, turned: step `i` holds element `i` of each; zeros where there are fewer.
#[inline(always)]
pub(crate) fn turned<'a>(count: usize, row: impl Fn(usize) -> &'a [f32], to: &mut [Lanes]) {
    let mut chunks: [&[f32]; LANES] = [&[]; LANES];
    for (lane, chunk) in chunks.iter_mut().enumerate().take(count) {
        *chunk = row(lane);
    }
    for (step, to) in to.iter_mut().enumerate() {
        for_lanes!(LANE => to.0[LANE] = chunks[LANE].get(step).copied().unwrap_or(0.0));
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
                    let turned: Vec<Lanes> = (0..c.len()).map(|i| Lanes([c[i]; LANES])).collect();
                    [sum(&a), sum_squares(&a, 3.5), largest(&b), dot(&a, &c), dots(&a, &turned).0[7]]
                },
            )
        };
        let expected = all(Isa::Portable);
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_there()) {
            assert_eq!(all(isa).map(f32::to_bits), expected.map(f32::to_bits), "{isa:?}");
        }
        assert_eq!(expected[4], expected[3]);
        let exact: f64 = a.iter().zip(&c).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum();
        assert!((f64::from(expected[3]) - exact).abs() < 1e-6 * exact);
        assert_eq!(largest(&[]), f32::NEG_INFINITY);
        assert!(largest(&[1.0, f32::NAN, 2.0]).is_nan());
    }
}
