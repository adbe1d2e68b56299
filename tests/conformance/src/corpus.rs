//! A folder of real models with the outputs they should have: `manifest.json` lists them, and each lies beside its
//! `test_data_set_*` folders, as ONNX's backend tests do.
//!
//! Their outputs are ONNX Runtime's, so the tolerance is a share of the largest expected element, and where ONNX Runtime
//! itself moves when it optimises the model, a multiple of how far. Outputs in 16 bits may be off by two spacings of their
//! type, which is as far as ONNX Runtime's own results are from exact ones.

use crate::document::Ran;
use crate::outcome::{Outcome, Verdict};
use crate::suite::{self, Test};
use crate::worker::RANKS;
use anyhow::{Context, Result};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;

/// The share of the largest expected element that an element may be off.
const SHARE: f64 = 1e-3;
/// What single precision leaves where everything cancels: the least absolute tolerance.
const CANCELLED: f64 = 1e-6;
/// The multiple of the oracle's own noise.
const NOISES: f64 = 3.0;

/// The models of a corpus whose outputs are to be trusted, in the manifest's order.
pub(crate) fn tests(folder: &Path) -> Result<Vec<Test>> {
    let path = folder.join("manifest.json");
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let manifest: Value = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
    let entries =
        manifest.get("entries").and_then(Value::as_array).context("the manifest has no `entries`")?;
    let mut tests = Vec::new();
    for entry in entries {
        if entry.get("reference_usable").and_then(Value::as_bool) == Some(true) {
            let test =
                test(folder, entry).with_context(|| format!("an entry of {}: {entry}", path.display()))?;
            tests.extend(test);
        }
    }
    Ok(tests)
}

fn test(folder: &Path, entry: &Value) -> Result<Option<Test>> {
    let text = |key: &str| entry.get(key).and_then(Value::as_str).with_context(|| format!("no `{key}`"));
    let model = folder.join(text("file")?);
    let beside = model.parent().context("a model without folder")?;
    let sets = suite::sorted(beside)?.into_iter().filter(|path| path.is_dir()).collect();
    let noise = entry.get("opt_noise_rel_to_max").and_then(Value::as_array);
    let noise = noise.into_iter().flatten().filter_map(Value::as_f64).fold(0.0, f64::max);
    let test = suite::test("corpus", text("category")?, text("id")?.to_owned(), model, sets)?;
    Ok(test.map(|test| Test { share: Some(SHARE.max(NOISES * noise)), rtol: 0.0, atol: CANCELLED, ..test }))
}

/// True for a corpus of which everything passes or is refused.
pub(crate) fn sound(ran: &[Ran<'_>]) -> bool {
    let mut outcomes = ran.iter().flat_map(|(_, outcomes)| *outcomes);
    outcomes.all(|outcome| matches!(outcome.verdict, Verdict::Pass | Verdict::Refused))
}

/// What passes per category and number of ranks, then everything that does not.
pub(crate) fn report(ran: &[Ran<'_>]) -> String {
    let mut passes: BTreeMap<&str, [usize; RANKS.len()]> = BTreeMap::new();
    let mut models: BTreeMap<&str, usize> = BTreeMap::new();
    for (test, outcomes) in ran {
        for category in [test.kind.as_str(), "~ all"] {
            *models.entry(category).or_default() += 1;
            let passes = passes.entry(category).or_default();
            for outcome in outcomes.iter().filter(|outcome| outcome.verdict == Verdict::Pass) {
                if let Some(slot) = outcome.ranks.checked_sub(1).and_then(|index| passes.get_mut(index)) {
                    *slot += 1;
                }
            }
        }
    }
    let mut text = String::new();
    for (category, passes) in passes {
        let of = models.get(category).copied().unwrap_or_default();
        let _ = write!(text, "{category:<12} {of:>4} models;");
        for (ranks, passed) in RANKS.iter().zip(passes) {
            let _ = write!(text, " N={ranks}: {passed}");
        }
        text.push('\n');
    }
    for (test, outcomes) in ran {
        for Outcome { ranks, verdict, reason, .. } in
            outcomes.iter().filter(|outcome| outcome.verdict != Verdict::Pass)
        {
            let _ = writeln!(text, "{} {}/{} N={ranks}: {reason}", verdict.name(), test.kind, test.name);
        }
    }
    text
}
