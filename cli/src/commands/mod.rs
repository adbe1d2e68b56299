//! One file per command. A command takes its parsed flags, prints its result, and returns a classified failure.

pub(crate) mod bench;
pub(crate) mod calibrate;
pub(crate) mod cases;
pub(crate) mod check;
pub(crate) mod compare;
pub(crate) mod diff;
mod dims;
mod entries;
pub(crate) mod exec;
pub(crate) mod explain;
pub(crate) mod generate;
pub(crate) mod inspect;
mod names;
mod pins;
pub(crate) mod plan;
pub(crate) mod planning;
mod precision;
mod report_page;
pub(crate) mod reporting;
pub(crate) mod run;
pub(crate) mod shard;
pub(crate) mod verify;

use crate::arguments::ToleranceArguments;
use crate::failure::{Classify, Failure, Kind, Outcome};
use serde_json::{Value, json};
use tpshard_runtime::io::{Comparison, Tolerance, Tolerances, Verdict};

/// The default tolerances: `|got - reference| <= 1e-4 + 1e-4 · |reference|`.
const TOLERANCE: f64 = 1e-4;

/// The tolerances that the flags ask for.
pub(crate) fn tolerances(arguments: &ToleranceArguments) -> Outcome<Tolerances> {
    let mut tolerances = Tolerances::new(TOLERANCE, TOLERANCE);
    for text in &arguments.atol {
        tolerances.set_atol(text.parse::<Tolerance>().or_fail(Kind::Usage)?);
    }
    for text in &arguments.rtol {
        tolerances.set_rtol(text.parse::<Tolerance>().or_fail(Kind::Usage)?);
    }
    Ok(tolerances)
}

/// Refuses tolerances for outputs that are not compared.
pub(crate) fn check_tolerances<'a>(
    tolerances: &Tolerances,
    outputs: impl Iterator<Item = &'a String> + Clone,
) -> Outcome<()> {
    let Some(unknown) = tolerances.outputs().find(|name| outputs.clone().all(|known| known != name)) else {
        return Ok(());
    };
    let known: Vec<&str> = outputs.map(String::as_str).collect();
    let message = format!(
        "a tolerance is given for `{unknown}`, which is not compared\nhelp: the outputs are {}",
        known.join(", ")
    );
    Err(Failure::new(Kind::Usage, message))
}

pub(crate) fn comparison_json(label: &str, comparison: &Comparison) -> Value {
    let outputs: Vec<Value> = comparison
        .outputs
        .iter()
        .map(|output| {
            let (max_abs, max_rel) = match &output.verdict {
                Verdict::Compared { max_abs_error, max_rel_error, .. } => {
                    (Some(*max_abs_error), Some(*max_rel_error))
                }
                _ => (None, None),
            };
            json!({
                "name": output.name,
                "passed": output.passed(),
                "max_abs_error": max_abs,
                "max_rel_error": max_rel,
                "detail": output.to_string(),
            })
        })
        .collect();
    json!({ "label": label, "passed": comparison.passed(), "outputs": outputs })
}
