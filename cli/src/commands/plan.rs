//! `tpshard plan`: what more ranks would bring, without writing anything.

use super::planning::{check_ranks, import_model, plan_model};
use super::reporting::{report_json, table};
use crate::arguments::PlanArguments;
use crate::failure::{Failure, Kind, Outcome};
use crate::output;
use serde_json::{Value, json};
use std::time::Instant;
use tpshard_passes::PlanReport;

pub(crate) fn plan(arguments: &PlanArguments, json: bool) -> Outcome<()> {
    let ranks = rank_list(&arguments.ranks)?;
    let imported = import_model(&arguments.model, &arguments.from, false)?;
    let mut plans = Vec::new();
    for &n in &ranks {
        let start = Instant::now();
        let plan = plan_model(&imported, n, &arguments.pricing)?;
        plans.push((n, plan.report, start.elapsed().as_secs_f64()));
    }
    if json {
        let rows: Vec<Value> = plans
            .iter()
            .map(|(n, report, seconds)| json!({ "ranks": n, "plan": report_json(report), "planning_seconds": seconds }))
            .collect();
        return output::line(json!({ "model": arguments.model.display().to_string(), "plans": rows }));
    }
    let reports: Vec<&PlanReport> = plans.iter().map(|(_, report, _)| report).collect();
    output::text(table(&reports))
}

/// `1,2,4,8` or `1-8` or a mixture.
fn rank_list(text: &str) -> Outcome<Vec<usize>> {
    let wrong = || {
        Failure::new(Kind::Usage, format!("--ranks {text}: not a list of numbers\nhelp: e.g. 1,2,4,8 or 1-8"))
    };
    let mut ranks = Vec::new();
    for part in text.split(',') {
        let (low, high) = part.split_once('-').unwrap_or((part, part));
        let low: usize = low.trim().parse().map_err(|_| wrong())?;
        let high: usize = high.trim().parse().map_err(|_| wrong())?;
        check_ranks(low)?;
        check_ranks(high)?;
        ranks.extend(low..=high);
    }
    if ranks.is_empty() { Err(wrong()) } else { Ok(ranks) }
}
