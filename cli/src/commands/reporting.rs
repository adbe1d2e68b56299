//! Plans as tables, lines and JSON.

use serde_json::{Value, json};
use std::fmt::Write;
use tpshard_passes::PlanReport;
use tpshard_passes::report::Verdict;

/// One line that says what was decided.
pub(crate) fn summary(report: &PlanReport) -> String {
    let counts: Vec<String> =
        report.collective_counts().iter().map(|(kind, count)| format!("{count} {kind}")).collect();
    let collectives = if counts.is_empty() { "no collectives".into() } else { counts.join(", ") };
    format!(
        "{} ranks (mesh {}): {} and {} state per rank, {collectives}, predicted {} against {} on one rank, gap {:.2} %",
        report.mesh.ranks(),
        report.mesh,
        bytes(report.weight_bytes),
        bytes(report.state_bytes),
        time(report.seconds),
        time(report.seconds_alone),
        report.gap * 100.0,
    )
}

/// Says once if the ranks do not pay.
pub(crate) fn warn(report: &PlanReport) {
    if report.verdict == Verdict::DoNotShard {
        eprintln!(
            "warning: on {} one rank is predicted to be as fast ({} against {}); do not shard for speed",
            report.profile,
            time(report.seconds_alone),
            time(report.seconds)
        );
    }
    if report.idle_ranks {
        eprintln!("warning: some ranks own no part of a split tensor; fewer ranks would do");
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

/// A table of plans for several numbers of ranks, and what follows from it.
pub(crate) fn table(reports: &[&PlanReport]) -> String {
    let mut text = String::new();
    if let Some(first) = reports.first() {
        let bindings = first.times.first().map(|t| &t.entry.bindings);
        let dims: Vec<String> = bindings.into_iter().flatten().map(|(k, v)| format!("{k}={v}")).collect();
        let _ = writeln!(text, "{} at {}", first.profile, dims.join(", "));
    }
    let header = [
        "ranks",
        "time",
        "compute",
        "memory",
        "launch",
        "comm",
        "weights/rank",
        "state/rank",
        "collectives",
        "verdict",
    ];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    for report in reports {
        let part = |get: fn(&tpshard_passes::cost::Parts) -> f64| {
            time(report.times.iter().map(|t| get(&t.parts) * t.entry.weight).sum())
        };
        rows.push(vec![
            report.mesh.ranks().to_string(),
            time(report.seconds),
            part(|p| p.compute),
            part(|p| p.memory),
            part(|p| p.launch),
            part(|p| p.communication),
            bytes(report.weight_bytes),
            bytes(report.state_bytes),
            report.collectives.len().to_string(),
            verdict_name(report.verdict).into(),
        ]);
    }
    let width = |column: usize| rows.iter().map(|r| r[column].len()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    for row in &rows {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, w)| format!("{cell:>w$}")).collect();
        let _ = writeln!(text, "{}", cells.join("  "));
    }
    let best = reports.iter().min_by(|a, b| a.seconds.total_cmp(&b.seconds));
    if let Some(best) = best {
        let ranks = best.mesh.ranks();
        let verdict = match ranks {
            1 => "one rank is predicted to be fastest: do not shard for speed".to_owned(),
            n => format!("{n} ranks are predicted to be fastest of these"),
        };
        let _ = writeln!(text, "{verdict}");
    }
    text
}

/// Everything a machine may want to know about a plan.
pub(crate) fn report_json(report: &PlanReport) -> Value {
    let times: Vec<Value> = report
        .times
        .iter()
        .map(|t| {
            let dims: Value =
                t.entry.bindings.iter().map(|(k, v)| (k.to_string(), Value::from(*v))).collect();
            json!({
                "entry": t.entry.name,
                "dims": dims,
                "weight": t.entry.weight,
                "compute_seconds": t.parts.compute,
                "memory_seconds": t.parts.memory,
                "launch_seconds": t.parts.launch,
                "communication_seconds": t.parts.communication,
            })
        })
        .collect();
    let collectives: Vec<Value> = report
        .collectives
        .iter()
        .map(|c| json!({ "step": c.step.0, "kind": c.kind, "node": c.origin, "ranks": c.ranks, "payload_bytes": c.payload }))
        .collect();
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
    let outputs: Value =
        report.outputs.iter().map(|(k, l)| (k.clone(), Value::from(l.to_string()))).collect();
    json!({
        "profile": report.profile,
        "mesh": report.mesh.0,
        "times": times,
        "seconds": report.seconds,
        "seconds_one_rank": report.seconds_alone,
        "verdict": verdict_name(report.verdict),
        "weight_bytes_per_rank": report.weight_bytes,
        "state_bytes_per_rank": report.state_bytes,
        "bytes_one_rank": report.bytes_alone,
        "budget_bytes": report.budget,
        "least_bytes": report.least_bytes,
        "collectives": collectives,
        "collective_counts": report.collective_counts(),
        "stored": stored,
        "outputs": outputs,
        "gap": report.gap,
        "segments": { "total": report.segments.0, "distinct": report.segments.1 },
        "idle_ranks": report.idle_ranks,
    })
}

fn time(seconds: f64) -> String {
    match seconds {
        s if s >= 1.0 => format!("{s:.2} s"),
        s if s >= 1e-3 => format!("{:.2} ms", s * 1e3),
        s => format!("{:.1} us", s * 1e6),
    }
}

/// Bytes with a binary unit.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.2} {}", UNITS[unit]) }
}
