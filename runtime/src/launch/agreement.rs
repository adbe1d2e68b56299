//! What all ranks of a job must have in common before any of them starts.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// What a rank is about to run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agreement {
    pub tool_version: String,
    pub program_hash: String,
    pub weights_hash: String,
    pub device: String,
    pub precision: String,
}

/// A field that is not the same on all ranks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    pub field: String,
    /// The ranks behind every value.
    pub values: BTreeMap<String, Vec<usize>>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.field)?;
        for (i, (value, ranks)) in self.values.iter().enumerate() {
            let ranks: Vec<String> = ranks.iter().map(ToString::to_string).collect();
            let comma = if i == 0 { "" } else { "," };
            write!(f, "{comma} `{value}` on rank {}", ranks.join(", "))?;
        }
        Ok(())
    }
}

/// What a rank signs: its agreement, and how many ranks it believes there are.
#[derive(Clone, Debug)]
pub(super) struct Signed {
    pub(super) world_size: usize,
    pub(super) agreement: Agreement,
}

type Field = fn(&Signed) -> String;

const FIELDS: [(&str, Field); 6] = [
    ("world size", |s| s.world_size.to_string()),
    ("tool version", |s| s.agreement.tool_version.clone()),
    ("program hash", |s| s.agreement.program_hash.clone()),
    ("weights hash", |s| s.agreement.weights_hash.clone()),
    ("device", |s| s.agreement.device.clone()),
    ("precision", |s| s.agreement.precision.clone()),
];

/// The fields on which the ranks, whose records are in rank order, differ.
pub(super) fn differences(all: &[Signed]) -> Vec<Difference> {
    let mut differences = vec![];
    for (field, get) in FIELDS {
        let mut values: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (rank, record) in all.iter().enumerate() {
            values.entry(get(record)).or_default().push(rank);
        }
        if values.len() > 1 {
            differences.push(Difference { field: field.into(), values });
        }
    }
    differences
}
