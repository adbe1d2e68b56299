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

/// The fields on which the ranks differ; `all` holds world size and agreement by rank.
pub(super) fn differences(all: &[(usize, Agreement)]) -> Vec<Difference> {
    let fields: [(&str, fn(&(usize, Agreement)) -> String); 6] = [
        ("world size", |(world, _)| world.to_string()),
        ("tool version", |(_, a)| a.tool_version.clone()),
        ("program hash", |(_, a)| a.program_hash.clone()),
        ("weights hash", |(_, a)| a.weights_hash.clone()),
        ("device", |(_, a)| a.device.clone()),
        ("precision", |(_, a)| a.precision.clone()),
    ];
    let mut differences = vec![];
    for (field, get) in fields {
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
