//! The steps of all ranks as a trace that Perfetto and Chrome's `about:tracing` read: one track per rank.

use super::lead::{RankLog, StepName};
use crate::failure::{Classify, Failure, Kind, Outcome};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// Writes the measured steps; times are in microseconds since the first.
pub(super) fn write(path: &Path, logs: &[RankLog], start: u64) -> Outcome<()> {
    let text = serde_json::to_vec(&events(logs, start)).or_fail(Kind::Internal)?;
    std::fs::write(path, text).map_err(|e| Failure::new(Kind::Resource, format!("{}: {e}", path.display())))
}

fn events(logs: &[RankLog], start: u64) -> Value {
    let microseconds = |nanoseconds: u64| nanoseconds as f64 / 1e3;
    let mut events =
        vec![json!({ "ph": "M", "name": "process_name", "pid": 0, "args": { "name": "tpshard" } })];
    for log in logs {
        let name = json!({ "name": format!("rank {}", log.rank) });
        events.push(json!({ "ph": "M", "name": "thread_name", "pid": 0, "tid": log.rank, "args": name }));
        let names: BTreeMap<(usize, u32), &StepName> =
            log.names.iter().map(|(entry, value, name)| ((*entry, *value), name)).collect();
        for &(run, entry, value, begun, length) in &log.steps {
            let Some(name) = names.get(&(entry, value)).filter(|_| begun >= start) else { continue };
            events.push(json!({
                "ph": "X",
                "name": name.kernel,
                "cat": if name.communicates { "communication" } else { "compute" },
                "pid": 0,
                "tid": log.rank,
                "ts": microseconds(begun - start),
                "dur": microseconds(length),
                "args": { "node": name.node, "step": format!("%{value}"), "run": run },
            }));
        }
    }
    json!({ "displayTimeUnit": "ms", "traceEvents": events })
}
