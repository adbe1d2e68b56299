//! How evenly ranks hold weights and state. Units that ranks do not divide leave the first ranks with more than the
//! last, and fewer units than ranks leave some with none.

use crate::memory::Holdings;
use std::fmt;
use tpshard_ir::Mesh;

/// Bytes of weights and state over the ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Balance {
    pub ranks: usize,
    /// On the rank that holds most.
    pub largest: u64,
    /// Of all ranks together.
    pub total: u64,
    /// The ranks that own no part of some tensor that is split, for the tensor where they are most.
    pub idle: usize,
}

impl Balance {
    /// The largest rank's share against an even one.
    pub fn ratio(&self) -> f64 {
        if self.total == 0 { 1.0 } else { self.largest as f64 * self.ranks as f64 / self.total as f64 }
    }

    pub(crate) fn of(holdings: &Holdings, mesh: &Mesh) -> Balance {
        let ranks = mesh.ranks();
        let mut balance = Balance { ranks, largest: 0, total: 0, idle: 0 };
        // Per kind of tensor: the ranks that hold nothing of it.
        let mut without: Vec<usize> = Vec::new();
        for rank in 0..ranks {
            let mut held = 0u64;
            for (kind, (_, bytes, count)) in holdings.on(mesh, &mesh.coordinates(rank)).enumerate() {
                held = held.saturating_add(bytes.saturating_mul(count));
                without.resize(without.len().max(kind + 1), 0);
                without[kind] += usize::from(bytes == 0);
            }
            balance.largest = balance.largest.max(held);
            balance.total = balance.total.saturating_add(held);
        }
        // A tensor without elements is on no rank.
        balance.idle = without.into_iter().filter(|&idle| idle < ranks).max().unwrap_or(0);
        balance
    }
}

impl fmt::Display for Balance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self.idle {
            0 => format!("{:.2}x", self.ratio()),
            idle => format!("{:.2}x, {idle} idle", self.ratio()),
        };
        f.pad(&text)
    }
}
