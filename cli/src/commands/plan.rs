//! `tpshard plan`: what more ranks would bring, without writing anything.

use super::diff::diff;
use super::planning::{Planning, check_ranks, import_graphs};
use super::reporting::{Row, report_json, table};
use crate::arguments::PlanArguments;
use crate::failure::{Failure, Kind, Outcome};
use crate::output;
use serde_json::{Value, json};
use std::path::Path;
use std::time::Instant;
use tpshard_passes::PlanError;
use tpshard_passes::extract::ExtractError;

pub(crate) fn plan(arguments: &PlanArguments, json: bool) -> Outcome<()> {
    if let Some([a, b]) = arguments.diff.as_deref() {
        return diff(a, b, arguments.exit_code, json);
    }
    if arguments.exit_code {
        // Clap does not see to it, because what is required conflicts with the model.
        let help = "help: --diff A B compares two plans";
        return Err(Failure::new(
            Kind::Usage,
            format!("--exit-code: nothing is compared without --diff\n{help}"),
        ));
    }
    // Clap sees to it that there is a model otherwise.
    let model = arguments.model.as_deref().unwrap_or(Path::new(""));
    let ranks = rank_list(&arguments.ranks)?;
    let graphs = import_graphs(model, &arguments.from, false)?;
    let planning = Planning::new(&graphs, &arguments.pricing, &ranks)?;
    let mut rows: Vec<Row> = Vec::new();
    let mut last = None;
    for &ranks in &ranks {
        let start = Instant::now();
        let outcome = match planning.plan(ranks) {
            Ok(plan) => Ok(plan.report),
            // Other numbers of ranks may fit.
            Err(PlanError::Extract(ExtractError::Budget { least, .. })) => Err(least),
            Err(error) => return Err(planning.failure(ranks, &error)),
        };
        let seconds = start.elapsed().as_secs_f64();
        last = outcome.is_err().then_some(ranks).or(last);
        rows.push(Row { ranks, outcome, seconds });
    }
    if let (true, Some(ranks)) = (rows.iter().all(|row| row.outcome.is_err()), last) {
        return planning.plan(ranks).map(|_| ()).map_err(|error| planning.failure(ranks, &error));
    }
    if json {
        let rows: Vec<Value> = rows
            .iter()
            .map(|Row { ranks, outcome, seconds }| match outcome {
                Ok(report) => {
                    json!({ "ranks": ranks, "plan": report_json(report), "planning_seconds": seconds })
                }
                Err(least) => json!({ "ranks": ranks, "needs_bytes": least, "planning_seconds": seconds }),
            })
            .collect();
        return output::line(json!({ "model": model.display().to_string(), "plans": rows }));
    }
    output::text(table(&rows))
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
