//! The tokens that end a text.

use crate::arguments::GenerateArguments;
use crate::failure::Outcome;
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::Path;

/// Files beside a tokenizer that name the token that ends a text, as Hugging Face's exporters write them.
const CONFIGS: [&str; 2] = ["generation_config.json", "config.json"];
/// Longest such file that is read.
const MAX_CONFIG: u64 = 16 << 20;

/// Those that were given, or else those that the files beside the tokenizer name.
pub(super) fn tokens(arguments: &GenerateArguments) -> Outcome<Vec<i64>> {
    if !arguments.stop_token.is_empty() || arguments.ignore_stop {
        return Ok(arguments.stop_token.clone());
    }
    let folder = arguments.tokenizer.as_deref().and_then(Path::parent);
    let of_file = |name: &str| folder.map(|folder| ends(&folder.join(name))).unwrap_or_default();
    let found: BTreeSet<i64> = CONFIGS.into_iter().flat_map(of_file).collect();
    Ok(found.into_iter().collect())
}

/// The `eos_token_id` of a file, which is a number or a list of numbers; nothing if there is no such file.
fn ends(path: &Path) -> Vec<i64> {
    if std::fs::metadata(path).map_or(true, |found| found.len() > MAX_CONFIG) {
        return Vec::new();
    }
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let config: Value = serde_json::from_str(&text).unwrap_or_default();
    match config.get("eos_token_id") {
        Some(Value::Array(list)) => list.iter().filter_map(Value::as_i64).collect(),
        Some(one) => one.as_i64().into_iter().collect(),
        None => Vec::new(),
    }
}
