//! The rule of thumb for compute-bound work: up to how many ranks tensor parallelism pays.
//!
//! A transformer layer of hidden size `h` computes `24 h²` operations per token and all-reduces `h` elements twice.
//! With `N` ranks, a peak of `P` operations and a link of `B` bytes per second, and elements of `w` bytes, a token costs
//! `24h²/(N P)` of computing and `2 · 2(N-1)/N · w h / B` of communication, so that communication stays below the share
//! `t` of computing up to `N = 1 + t · 6hB / (w P)`. docs/cost-model.md derives and compares.

use super::{Collective, Profile};
use tpshard_ir::DType;

/// A prefill of a dense transformer, large enough for matrix products to be bound by computing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prefill {
    pub hidden: f64,
    pub tokens: f64,
    pub dtype: DType,
    /// The largest share of the computing time that communication may take for a rank to pay. A third is an
    /// efficiency of three quarters.
    pub tolerance: f64,
}

impl Prefill {
    /// A long prompt in bf16, at three quarters of a linear speed-up.
    pub fn of_hidden(hidden: f64) -> Prefill {
        Prefill { hidden, tokens: 8192.0, dtype: DType::BF16, tolerance: 1.0 / 3.0 }
    }

    /// `1 + t · 6hB / (w P)` for a peak and a link.
    pub fn ranks(&self, peak: f64, link: f64) -> f64 {
        let width = self.dtype.bits() as f64 / 8.0;
        1.0 + self.tolerance * 6.0 * self.hidden * link / (width * peak)
    }
}

impl Profile {
    /// Seconds of computing and of communication of one layer on each of `ranks` ranks.
    pub fn prefill_layer(&self, prefill: &Prefill, ranks: usize) -> (f64, f64) {
        let bytes = prefill.tokens * prefill.hidden * prefill.dtype.bits() as f64 / 8.0;
        let operations = 24.0 * prefill.hidden.powi(2) * prefill.tokens;
        let compute = operations / ranks.max(1) as f64 / self.peak(prefill.dtype);
        (compute, 2.0 * self.collective_time(Collective::AllReduce, ranks, bytes))
    }

    /// Up to how many ranks tensor parallelism pays in a prefill, by this profile's own prices: the largest number of
    /// ranks, up to `most`, whose communication is within the tolerance, with a fraction of the way to the next.
    pub fn ranks_that_pay(&self, prefill: &Prefill, most: usize) -> f64 {
        let share = |ranks: usize| {
            let (compute, communication) = self.prefill_layer(prefill, ranks);
            communication / compute
        };
        let mut below = 0.0;
        for ranks in 2..=most.max(1) {
            let share = share(ranks);
            if share > prefill.tolerance {
                return (ranks - 1) as f64 + (prefill.tolerance - below) / (share - below);
            }
            below = share;
        }
        most.max(1) as f64
    }
}
