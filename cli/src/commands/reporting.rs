//! Plans as tables, lines and JSON.

use crate::output;
use serde_json::{Value, json};
use std::fmt::Write;
use tpshard_passes::PlanReport;
use tpshard_passes::report::{Bytes, Collective, EntryReport, GraphReport, OnMesh, Seconds, Verdict};

/// One line that says what was decided.
pub(crate) fn summary(report: &PlanReport) -> String {
    let counts: Vec<String> =
        report.collective_counts().iter().map(|(kind, count)| format!("{count} {kind}")).collect();
    let collectives = if counts.is_empty() { "no collectives".into() } else { counts.join(", ") };
    format!(
        "{} ranks (mesh {}): {} and {} state per rank, {collectives}, predicted {} against {} on one rank, gap {:.2} %",
        report.mesh.ranks(),
        report.mesh,
        Bytes(report.weight_bytes),
        Bytes(report.state_bytes),
        Seconds(report.seconds),
        Seconds(report.seconds_alone),
        report.gap * 100.0,
    )
}

/// Says once if the ranks do not pay.
pub(crate) fn warn(report: &PlanReport) {
    if report.verdict == Verdict::DoNotShard {
        output::say(format_args!(
            "warning: on {} one rank is predicted to take {}, {} ranks {}; do not shard for speed",
            report.profile,
            Seconds(report.seconds_alone),
            report.mesh.ranks(),
            Seconds(report.seconds)
        ));
    }
    if report.balance.idle > 0 {
        output::say(format_args!(
            "warning: {} of {} ranks own no part of some split tensor; fewer ranks would do",
            report.balance.idle, report.balance.ranks
        ));
    }
}

fn verdict_name(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::OneRank => "one rank",
        Verdict::Faster => "faster",
        Verdict::DoNotShard => "do not shard",
        Verdict::ForMemory => "for memory",
    }
}

/// What planning for a number of ranks came to.
pub(crate) struct Row {
    pub(crate) ranks: usize,
    /// The plan, or the bytes that every plan needs if the budget is below them.
    pub(crate) outcome: Result<PlanReport, u64>,
    pub(crate) seconds: f64,
}

/// A table of plans for several numbers of ranks, and what follows from it.
pub(crate) fn table(found: &[Row]) -> String {
    let reports: Vec<&PlanReport> = found.iter().filter_map(|row| row.outcome.as_ref().ok()).collect();
    let mut text = String::new();
    if let Some(first) = reports.first() {
        for found in &first.entries {
            let dims: Vec<String> = found.entry.bindings.iter().map(|(k, v)| format!("{k}={v}")).collect();
            let _ = writeln!(text, "{}, {} at {}", first.profile, found.entry.name, dims.join(", "));
        }
    }
    let header = [
        "ranks",
        "time",
        "compute",
        "memory",
        "launch",
        "comm",
        "hidden",
        "weights/rank",
        "state/rank",
        "imbalance",
        "collectives",
        "gap",
        "verdict",
    ];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    for row in found {
        let report = match &row.outcome {
            Ok(report) => report,
            Err(least) => {
                let mut cells = vec![String::new(); header.len()];
                cells[0] = row.ranks.to_string();
                cells[header.len() - 1] = format!("needs {}", Bytes(*least));
                rows.push(cells);
                continue;
            }
        };
        let total: f64 = report.entries.iter().map(|e| e.entry.weight).sum();
        let part = |get: fn(&tpshard_passes::cost::Parts) -> f64| {
            let share = |e: &EntryReport| get(&e.parts) * e.entry.weight / total;
            Seconds(report.entries.iter().map(share).sum()).to_string()
        };
        rows.push(vec![
            report.mesh.ranks().to_string(),
            Seconds(report.seconds).to_string(),
            part(|p| p.compute),
            part(|p| p.memory),
            part(|p| p.launch),
            part(|p| p.communication),
            Seconds(report.entries.iter().map(|e| e.hidden * e.entry.weight / total).sum()).to_string(),
            Bytes(report.weight_bytes).to_string(),
            Bytes(report.state_bytes).to_string(),
            report.balance.to_string(),
            report.collectives().count().to_string(),
            format!("{:.2} %", report.gap * 100.0),
            verdict_name(report.verdict).into(),
        ]);
    }
    let width = |column: usize| rows.iter().map(|r| r[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    for row in &rows {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, w)| format!("{cell:>w$}")).collect();
        let _ = writeln!(text, "{}", cells.join("  "));
    }
    text.push_str(&conclusion(&reports));
    text
}

/// What the table says about how many ranks to take.
fn conclusion(reports: &[&PlanReport]) -> String {
    let Some(best) = reports.iter().min_by(|a, b| a.seconds.total_cmp(&b.seconds)) else {
        return String::new();
    };
    let pays = reports.iter().filter(|r| matches!(r.verdict, Verdict::Faster));
    let most = pays.map(|r| r.mesh.ranks()).max();
    let needs = reports.iter().filter(|r| r.verdict == Verdict::ForMemory).map(|r| r.mesh.ranks()).min();
    let alone = Seconds(best.seconds_alone);
    match (most, needs) {
        (Some(most), _) => format!(
            "up to {most} ranks pay: {} are fastest, {} against {alone} on one rank\n",
            best.mesh.ranks(),
            Seconds(best.seconds)
        ),
        (None, Some(ranks)) => {
            format!(
                "no more ranks are faster than one would be, but one has no room for the model: take {ranks}\n"
            )
        }
        (None, None) => format!("do not shard: one rank takes {alone}, and none of these takes less\n"),
    }
}

/// Everything a machine may want to know about a plan.
pub(crate) fn report_json(report: &PlanReport) -> Value {
    let entries: Vec<Value> = report.entries.iter().map(entry_json).collect();
    let stored: Vec<Value> = report
        .stored
        .iter()
        .map(|s| {
            json!({
                "name": s.name,
                "state": s.is_state,
                "shape": s.shape,
                "layout": s.layout.to_string(),
                "count": s.count,
                "bytes": s.bytes,
            })
        })
        .collect();
    let on_mesh = |m: &OnMesh| json!({ "mesh": m.mesh.0, "seconds": m.seconds, "bytes_per_rank": m.bytes });
    let meshes: Vec<Value> = report.meshes.iter().map(on_mesh).collect();
    let mut found = json!({
        "profile": report.profile,
        "mesh": report.mesh.0,
        "entries": entries,
        "seconds": report.seconds,
        "seconds_one_rank": report.seconds_alone,
        "verdict": verdict_name(report.verdict),
        "weight_bytes_per_rank": report.weight_bytes,
        "state_bytes_per_rank": report.state_bytes,
        "activation_bytes_per_rank": report.activation_bytes,
        "bytes_one_rank": report.bytes_alone,
        "budget_bytes": report.budget,
        "least_bytes": report.least_bytes,
        "collective_counts": report.collective_counts(),
        "stored": stored,
        "gap": report.gap,
        "segments": { "total": report.segments.0, "distinct": report.segments.1 },
        "imbalance": report.balance.ratio(),
        "idle_ranks": report.balance.idle,
        "meshes": meshes,
    });
    if !report.graphs.is_empty() {
        let graph =
            |g: &GraphReport| json!({ "case": g.case, "entries": g.entries, "gap": g.gap, "first": g.first });
        found["graphs"] = report.graphs.iter().map(graph).collect();
    }
    found
}

fn collective_json(collective: &Collective) -> Value {
    let Collective { step, kind, origin, ranks, payload, seconds, pieces, hidden } = collective;
    json!({
        "step": step.0,
        "kind": kind,
        "node": origin,
        "ranks": ranks,
        "payload_bytes": payload,
        "seconds": seconds,
        "pieces": pieces,
        "hidden_seconds": hidden,
    })
}

fn entry_json(found: &EntryReport) -> Value {
    let EntryReport { entry, parts, hidden, operations, collectives, outputs, .. } = found;
    let dims: Value = entry.bindings.iter().map(|(k, v)| (k.to_string(), Value::from(*v))).collect();
    let collectives: Vec<Value> = collectives.iter().map(collective_json).collect();
    let outputs: Value = outputs.iter().map(|(k, l)| (k.clone(), Value::from(l.to_string()))).collect();
    let spent = |(op, (count, seconds)): (&&str, &(usize, f64))| {
        ((*op).to_owned(), json!({ "count": count, "seconds": seconds }))
    };
    let operations: Value = operations.iter().map(spent).collect();
    json!({
        "entry": entry.name,
        "dims": dims,
        "weight": entry.weight,
        "seconds": found.seconds(),
        "compute_seconds": parts.compute,
        "memory_seconds": parts.memory,
        "launch_seconds": parts.launch,
        "communication_seconds": parts.communication,
        "hidden_seconds": hidden,
        "operations": operations,
        "collectives": collectives,
        "outputs": outputs,
    })
}
