//! How long planning takes, and how much work it is.
//!
//! For each model: one entry that decodes, one that prefills, both at once; each with the least memory and with a
//! budget in bytes. Times are processor time, the median of several runs: planning is single-threaded, so on an idle
//! machine that is how long it takes. All other columns are counters, the same on every machine, and change only when
//! the planner does.

use anyhow::{Context, Result, bail};
use rustix::time::{ClockId, clock_gettime};
use std::path::Path;
use tpshard_frontend::{ImportOptions, Imported, Limits, Role, import};
use tpshard_ir::Bindings;
use tpshard_passes::canonical::canonicalise;
use tpshard_passes::cost::Profile;
use tpshard_passes::extended::Extended;
use tpshard_passes::{Entry, MemoryGoal, Plan, PlanOptions, plan};

const RANKS: usize = 8;
const RUNS: usize = 5;
const PROFILE: &str = "h100-sxm";
/// The budget in bytes: so much more than the least possible.
const BUDGET: f64 = 1.25;

fn main() -> Result<()> {
    let models: Vec<String> = std::env::args().skip(1).collect();
    if models.is_empty() {
        bail!(
            "usage: bench-planning MODEL.onnx…\nhelp: tests/models/make_graph_only.py writes models to plan"
        );
    }
    println!(
        "{:<18} {:<15} {:<8} {:>9} {:>9} {:>7} {:>6} {:>7} {:>7} {:>8} {:>13} {:>7} {:>8} {:>10} {:>9} {:>7}",
        "model",
        "entries",
        "memory",
        "import ms",
        "plan ms",
        "values",
        "groups",
        "classes",
        "nodes",
        "edges",
        "distinct c/n",
        "states",
        "labels",
        "searches",
        "segments",
        "gap %"
    );
    models.iter().try_for_each(|model| measure(Path::new(model)))
}

fn measure(path: &Path) -> Result<()> {
    let limits = Limits { allow_missing_data: true, ..Limits::default() };
    let start = milliseconds();
    let imported = import(path, &ImportOptions { limits, ..ImportOptions::default() })?;
    let import_ms = milliseconds() - start;
    let name = path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    let decode = entry(&imported, "decode", 1, 2048);
    let prefill = entry(&imported, "prefill", 512, 0);
    let cases = [
        ("decode", vec![decode.clone()]),
        ("prefill", vec![prefill.clone()]),
        ("prefill+decode", vec![prefill, decode]),
    ];
    for (case, entries) in cases {
        let mut options = PlanOptions::new(RANKS, Profile::built_in(PROFILE)?);
        options.entries = entries;
        options.memory = MemoryGoal::Least;
        let (milliseconds, least) = median(&imported, &options)?;
        print_row(&name, case, "min", import_ms, milliseconds, &least);
        let budget = (least.report.least_bytes as f64 * BUDGET) as u64;
        options.memory = MemoryGoal::Bytes(budget);
        let (milliseconds, found) = median(&imported, &options)?;
        print_row(&name, case, "bytes", import_ms, milliseconds, &found);
    }
    Ok(())
}

/// The symbols of a model by their roles: one sequence, `sequence` new tokens after `past` old ones.
fn entry(imported: &Imported, name: &str, sequence: i64, past: i64) -> Entry {
    let size = |symbol| match imported.report.roles.get(symbol) {
        Some(Role::Sequence) => sequence,
        Some(Role::Past) => past,
        Some(Role::Total) => past + sequence,
        Some(Role::Batch) | None => 1,
    };
    let bindings: Bindings = imported.graph.symbols.keys().map(|s| (s.clone(), size(s))).collect();
    Entry::new(name, bindings)
}

/// The processor time this thread has used.
fn milliseconds() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 * 1e3 + time.tv_nsec as f64 / 1e6
}

/// The median time of planning, canonicalisation included, and the plan.
fn median(imported: &Imported, options: &PlanOptions) -> Result<(f64, Plan)> {
    let mut times = Vec::new();
    let mut last = None;
    for _ in 0..RUNS {
        let mut extended = Extended::new(imported.graph.clone());
        let start = milliseconds();
        canonicalise(&mut extended);
        let found = plan(extended, options)?;
        times.push(milliseconds() - start);
        last = Some(found);
    }
    times.sort_by(f64::total_cmp);
    let middle = times.get(times.len() / 2).copied().context("no run")?;
    Ok((middle, last.context("no run")?))
}

fn print_row(model: &str, entries: &str, memory: &str, import_ms: f64, plan_ms: f64, plan: &Plan) {
    let report = &plan.report;
    let counters = &report.counters;
    println!(
        "{model:<18} {entries:<15} {memory:<8} {import_ms:>9.1} {plan_ms:>9.1} {:>7} {:>6} {:>7} {:>7} {:>8} {:>13} {:>7} \
         {:>8} {:>10} {:>5}/{:<3} {:>7.2}",
        counters.values,
        counters.sizes.groups,
        counters.sizes.classes,
        counters.sizes.productions,
        counters.sizes.conversions,
        format!("{}/{}", counters.distinct.classes, counters.distinct.productions),
        counters.effort.states,
        counters.effort.labels,
        counters.effort.searches,
        report.segments.0,
        report.segments.1,
        report.gap * 100.0,
    );
}
