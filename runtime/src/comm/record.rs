//! What a communicator remembers: counters per kind of collective, and the last collectives for the post-mortem.

use super::{Monoid, Tag};
use serde::Serialize;
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use tpshard_ir::DType;

/// The collectives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum Kind {
    AllReduce = 1,
    AllGather,
    ReduceScatter,
    AllToAll,
    Broadcast,
    BroadcastBytes,
    ScatterBytes,
    GatherBytes,
    Barrier,
}

impl Kind {
    const ALL: [Kind; 9] = [
        Kind::AllReduce,
        Kind::AllGather,
        Kind::ReduceScatter,
        Kind::AllToAll,
        Kind::Broadcast,
        Kind::BroadcastBytes,
        Kind::ScatterBytes,
        Kind::GatherBytes,
        Kind::Barrier,
    ];

    pub(super) fn from_code(code: u8) -> Option<Kind> {
        Kind::ALL.into_iter().find(|&kind| kind as u8 == code)
    }

    /// The text name, e.g. `all_reduce`.
    pub fn name(self) -> &'static str {
        match self {
            Kind::AllReduce => "all_reduce",
            Kind::AllGather => "all_gather",
            Kind::ReduceScatter => "reduce_scatter",
            Kind::AllToAll => "all_to_all",
            Kind::Broadcast => "broadcast",
            Kind::BroadcastBytes => "broadcast_bytes",
            Kind::ScatterBytes => "scatter_bytes",
            Kind::GatherBytes => "gather_bytes",
            Kind::Barrier => "barrier",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Counters of one kind of collective on one rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct KindStats {
    pub collectives: u64,
    /// Payload: all-reduce and broadcast B; all-gather and all-to-all the result minus the own part; reduce-scatter
    /// the input minus the own part. A group of one communicates nothing.
    pub bytes: u64,
    /// Time spent inside, waiting included.
    pub nanos: u64,
}

/// What one rank communicated, per kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CommStats {
    pub kinds: BTreeMap<Kind, KindStats>,
}

impl CommStats {
    /// The counters of one kind.
    pub fn of(&self, kind: Kind) -> KindStats {
        self.kinds.get(&kind).copied().unwrap_or_default()
    }

    /// What was added to the counters since they were `before`; times are left out, so that equal work counts equal.
    #[must_use]
    pub fn since(&self, before: &CommStats) -> CommStats {
        let added = |(&kind, now): (&Kind, &KindStats)| {
            let then = before.of(kind);
            let stats = KindStats {
                collectives: now.collectives.saturating_sub(then.collectives),
                bytes: now.bytes.saturating_sub(then.bytes),
                nanos: 0,
            };
            (kind, stats)
        };
        CommStats { kinds: self.kinds.iter().map(added).collect() }
    }

    /// Counts what other counters say besides.
    pub fn add(&mut self, other: &CommStats) {
        for (&kind, more) in &other.kinds {
            let stats = self.kinds.entry(kind).or_default();
            stats.collectives += more.collectives;
            stats.bytes += more.bytes;
            stats.nanos += more.nanos;
        }
    }

    /// All kinds together.
    pub fn total(&self) -> KindStats {
        self.kinds.values().fold(KindStats::default(), |a, b| KindStats {
            collectives: a.collectives + b.collectives,
            bytes: a.bytes + b.bytes,
            nanos: a.nanos + b.nanos,
        })
    }
}

/// One collective of the past.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    pub kind: Kind,
    pub tag: Tag,
    pub monoid: Option<Monoid>,
    pub dtype: Option<DType>,
    pub bytes: u64,
    /// Ranks that took part.
    pub ranks: usize,
    pub done: bool,
}

/// The last collectives of a rank, oldest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History {
    pub rank: usize,
    pub records: VecDeque<Record>,
}

impl History {
    const CAPACITY: usize = 64;

    pub(super) fn start(&mut self, record: Record) {
        if self.records.len() == Self::CAPACITY {
            // The first that is not done is what the others wait for.
            let first = usize::from(self.records.front().is_some_and(|first| !first.done));
            self.records.remove(first);
        }
        self.records.push_back(record);
    }

    pub(super) fn finish(&mut self, bytes: u64, done: bool) {
        if let Some(last) = self.records.back_mut() {
            last.bytes = bytes;
            last.done = done;
        }
    }

    /// Notes that a collective is done which was started some time ago.
    pub(super) fn settle(&mut self, sequence: u64) {
        if let Some(record) = self.records.iter_mut().rev().find(|r| r.tag.sequence == sequence) {
            record.done = true;
        }
    }

    /// The first collective that is not done.
    pub fn unfinished(&self) -> Option<&Record> {
        self.records.iter().find(|record| !record.done)
    }

    /// One JSON object, for tools.
    pub fn to_json(&self) -> serde_json::Value {
        let records: Vec<_> = self
            .records
            .iter()
            .map(|r| {
                serde_json::json!({
                    "kind": r.kind.name(),
                    "sequence": r.tag.sequence,
                    "node": r.tag.node,
                    "monoid": r.monoid.map(Monoid::name),
                    "dtype": r.dtype.map(DType::name),
                    "bytes": r.bytes,
                    "ranks": r.ranks,
                    "done": r.done,
                })
            })
            .collect();
        serde_json::json!({ "rank": self.rank, "collectives": records })
    }
}

impl fmt::Display for History {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for r in &self.records {
            write!(f, "rank {} step {} node {} {}", self.rank, r.tag.sequence, r.tag.node, r.kind)?;
            if let Some(monoid) = r.monoid {
                write!(f, "({})", monoid.name())?;
            }
            if let Some(dtype) = r.dtype {
                write!(f, " {dtype}")?;
            }
            let state = if r.done { "done" } else { "unfinished" };
            writeln!(f, " {} bytes, {} ranks, {state}", r.bytes, r.ranks)?;
        }
        Ok(())
    }
}
