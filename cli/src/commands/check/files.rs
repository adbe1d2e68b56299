//! The files of a folder besides programs and weights: `config.json`, `run`, `plan.txt`,
//! `report.html`, and files that nobody wrote.

use crate::commands::shard::hex;
use crate::folder::Folder;
use crate::rank_program::payload;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use tpshard_codegen::build::{MAX_GRAPHS, PART_LAUNCHER, PLAN_TEXT, REPORT_PAGE, model_text, weight_file};
use tpshard_codegen::folder::CONFIG;
use tpshard_ir::container;

/// Keys of `config.json` whose values are compared where what they are the hash of is read.
const COMPARED_ELSEWHERE: [&str; 6] =
    ["payload_sha256", "program_hash", "weights_hash", "sha256", "plan_sha256", "report_sha256"];
/// Most other files that are named.
const NAMED: usize = 8;

/// `run` starts as many ranks as the folder has.
pub(super) fn check_launcher(folder: &Folder, findings: &mut Vec<String>) {
    let bytes = match payload(&folder.path.join("run")) {
        Ok(bytes) => bytes,
        Err(failure) => return findings.push(format!("run: {failure}")),
    };
    let parts = match container::decode(&bytes) {
        Ok(parts) => parts,
        Err(error) => return findings.push(format!("run: {error}")),
    };
    let Some(ranks) = parts.part(PART_LAUNCHER) else {
        return findings.push("run: is not the launcher: it holds no rank count".into());
    };
    let wanted = folder.ranks.to_string();
    if ranks != wanted.as_bytes() {
        let found = String::from_utf8_lossy(ranks);
        findings.push(format!("run: starts {found:?} ranks, the folder has {wanted}"));
    }
}

/// The plan cannot be derived from the programs alone, so hashes stand for what is told of it.
pub(super) fn check_plan(folder: &Folder, findings: &mut Vec<String>) {
    for (name, key) in [(PLAN_TEXT, "plan_sha256"), (REPORT_PAGE, "report_sha256")] {
        let text = match folder.text(name) {
            Ok(text) => text,
            Err(failure) => {
                findings.push(failure.to_string());
                continue;
            }
        };
        if text.trim().is_empty() {
            findings.push(format!("{name}: is empty"));
        }
        let hash = hex(&Sha256::digest(text.as_bytes()));
        if folder.config.get(key).and_then(Value::as_str) != Some(hash.as_str()) {
            findings.push(format!("{name}: is not the text whose hash {CONFIG} states"));
        }
    }
}

/// A file of a rank that there is not is a finding; what is not ours at all is only named, in the line returned.
pub(super) fn check_strays(folder: &Folder, findings: &mut Vec<String>) -> Option<String> {
    let mut known: BTreeSet<String> = [CONFIG, PLAN_TEXT, REPORT_PAGE, "run"].map(str::to_owned).into();
    let cases = folder.config.pointer("/entries/0/cases").and_then(Value::as_object);
    let graphs = cases.map_or(1, |cases| 1 << cases.len().min(MAX_GRAPHS));
    known.extend((0..MAX_GRAPHS.min(graphs)).map(model_text));
    for rank in 0..folder.ranks {
        known.extend([format!("rank{rank}"), weight_file(rank)]);
    }
    let names = match std::fs::read_dir(&folder.path) {
        Ok(entries) => entries.filter_map(Result::ok).map(|e| e.file_name().to_string_lossy().into_owned()),
        Err(error) => {
            findings.push(format!("{}: {error}", folder.path.display()));
            return None;
        }
    };
    let (ranks, others): (BTreeSet<String>, BTreeSet<String>) =
        names.filter(|name| !known.contains(name)).partition(|name| is_of_a_rank(name));
    findings.extend(ranks.iter().map(|name| {
        format!("{name}: does not belong to a folder of {} ranks, it is of another build", folder.ranks)
    }));
    let listed: Vec<&str> = others.iter().take(NAMED).map(String::as_str).collect();
    let more = if others.len() > NAMED { ", …" } else { "" };
    let count = others.len();
    (count > 0).then(|| format!("{count} other files, not looked at: {}{more}", listed.join(", ")))
}

fn is_of_a_rank(name: &str) -> bool {
    let number = name.strip_prefix("rank").map(|rest| rest.strip_suffix(".safetensors").unwrap_or(rest));
    number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

/// Says where two values differ, by JSON pointer.
pub(super) fn differences(found: &Value, derived: &Value, pointer: &str, findings: &mut Vec<String>) {
    match (found, derived) {
        (Value::Object(own), Value::Object(other)) => {
            let keys: BTreeSet<&String> = own.keys().chain(other.keys()).collect();
            for key in keys.into_iter().filter(|key| !COMPARED_ELSEWHERE.contains(&key.as_str())) {
                let below = format!("{pointer}/{}", key.replace('~', "~0").replace('/', "~1"));
                match (own.get(key), other.get(key)) {
                    (Some(a), Some(b)) => differences(a, b, &below, findings),
                    (Some(_), None) => findings.push(format!("{CONFIG}: {below} should not be there")),
                    (None, _) => findings.push(format!("{CONFIG}: {below} is missing")),
                }
            }
        }
        (Value::Array(own), Value::Array(other)) if own.len() == other.len() => {
            for (index, (a, b)) in own.iter().zip(other).enumerate() {
                differences(a, b, &format!("{pointer}/{index}"), findings);
            }
        }
        (Value::Array(own), Value::Array(other)) => findings.push(format!(
            "{CONFIG}: {pointer} has {} entries, by the certificate it has {}",
            own.len(),
            other.len()
        )),
        (own, other) if own == other => {}
        (own, other) => {
            findings.push(format!("{CONFIG}: {pointer} is {own}, by the certificate it is {other}"));
        }
    }
}
