//! What steps cost: prices from a hardware profile, and the ordered quantity that plans are compared by.

pub mod kernels;
mod measured;
pub mod price;
pub mod profile;

pub use price::{Parts, Pricer};
pub use profile::{Profile, ProfileError};

use std::iter::Sum;
use std::ops::Add;

const COLLECTIVE: u128 = 1 << 48;
const MOST_BYTES: u64 = (1 << 48) - 1;

/// Time in whole picoseconds; among equal times the number of collectives, then the bytes they carry. Sums are exact
/// and do not depend on the order of adding, so equal plans compare equal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cost(u128);

impl Cost {
    pub const ZERO: Cost = Cost(0);

    /// `seconds` of local work.
    pub fn local(seconds: f64) -> Cost {
        Cost(u128::from(picoseconds(seconds)) << 64)
    }

    /// A collective of `seconds` with a payload of `bytes` per rank.
    pub fn collective(seconds: f64, bytes: u64) -> Cost {
        Cost(Cost::local(seconds).0 | COLLECTIVE | u128::from(bytes.min(MOST_BYTES)))
    }

    pub fn picoseconds(self) -> u64 {
        (self.0 >> 64) as u64
    }

    pub fn seconds(self) -> f64 {
        self.picoseconds() as f64 * 1e-12
    }

    pub(crate) fn from_raw(raw: u128) -> Cost {
        Cost(raw)
    }

    pub(crate) fn raw(self) -> u128 {
        self.0
    }
}

/// Whole picoseconds; times beyond a few months are all the same.
fn picoseconds(seconds: f64) -> u64 {
    // The cast saturates, and the limit leaves room for sums of a million steps.
    ((seconds * 1e12).round() as u64).min(1 << 44)
}

impl Add for Cost {
    type Output = Cost;
    fn add(self, other: Cost) -> Cost {
        Cost(self.0.saturating_add(other.0))
    }
}

impl Sum for Cost {
    fn sum<I: Iterator<Item = Cost>>(costs: I) -> Cost {
        costs.fold(Cost::ZERO, Add::add)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_decides_then_collectives_then_bytes() {
        let a = Cost::local(2e-6);
        let b = Cost::collective(1e-6, 100) + Cost::local(1e-6);
        let c = Cost::collective(0.5e-6, 20) + Cost::collective(0.5e-6, 20) + Cost::local(1e-6);
        let d = Cost::collective(1e-6, 101) + Cost::local(1e-6);
        assert!(a < b && b < d && d < c);
        assert!(c < Cost::local(2.000001e-6));
        assert_eq!(c.picoseconds(), 2_000_000);
    }

    #[test]
    fn absurd_times_stay_ordered() {
        assert!(Cost::local(f64::INFINITY) > Cost::local(1.0));
        assert_eq!(Cost::local(f64::NAN), Cost::ZERO);
    }
}
