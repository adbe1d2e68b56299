//! `tpshard plan --diff`: what differs between two plans that were written down earlier.

use crate::failure::{Failure, Kind, Outcome};
use crate::folder::Folder;
use crate::output;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::Path;
use tpshard_passes::report::{Bytes, Seconds, without_numbers};

/// Largest file with plans that is read.
const MAX_FILE: u64 = 256 << 20;

const HELP: &str = "help: name a folder that `tpshard MODEL --tp N` wrote, its config.json, or what `tpshard plan --json` printed";

/// Prints what differs; with `exit_code`, a difference is a mismatch.
pub(crate) fn diff(a: &Path, b: &Path, exit_code: bool, json: bool) -> Outcome<()> {
    let (old, new) = (plans(a)?, plans(b)?);
    let pairs = pairs(&old, &new);
    if pairs.is_empty() {
        let ranks =
            |plans: &BTreeMap<u64, Value>| plans.keys().map(u64::to_string).collect::<Vec<_>>().join(", ");
        let message = format!(
            "{} is for {} ranks, {} for {}: there is nothing to compare\nhelp: plan both for one number of ranks",
            a.display(),
            ranks(&old),
            b.display(),
            ranks(&new)
        );
        return Err(Failure::new(Kind::Usage, message));
    }
    let found: Vec<Difference> = pairs.into_iter().map(|(ranks, a, b)| Difference::of(ranks, a, b)).collect();
    let differ = found.iter().any(Difference::is_one);
    let result = json!({ "differ": differ, "plans": found.iter().map(Difference::json).collect::<Vec<_>>() });
    let text: String = found.iter().map(Difference::text).collect();
    if exit_code && differ {
        if !json {
            output::text(text)?;
        }
        let message = "the plans differ\nhelp: without --exit-code that is no error";
        return Err(Failure::new(Kind::Mismatch, message).with_result(Some(result)));
    }
    if json { output::line(result) } else { output::text(text) }
}

/// The plans of a folder or a file by number of ranks.
fn plans(path: &Path) -> Outcome<BTreeMap<u64, Value>> {
    let refuse = |kind, what: String| Failure::new(kind, format!("{}: {what}\n{HELP}", path.display()));
    let value = if path.is_dir() {
        Folder::open(path)?.config
    } else {
        let found = std::fs::metadata(path).map_err(|e| refuse(Kind::Resource, e.to_string()))?;
        if !found.is_file() || found.len() > MAX_FILE {
            return Err(refuse(Kind::Resource, format!("is not a file of at most {MAX_FILE} bytes")));
        }
        let text = std::fs::read_to_string(path).map_err(|e| refuse(Kind::Resource, e.to_string()))?;
        serde_json::from_str(&text).map_err(|e| refuse(Kind::Mismatch, format!("is not JSON: {e}")))?
    };
    let list: Vec<&Value> = match value.get("plans").and_then(Value::as_array) {
        Some(rows) => rows.iter().filter_map(|row| row.get("plan")).collect(),
        None => value.pointer("/build/plan").or_else(|| value.get("plan")).into_iter().collect(),
    };
    let mut plans = BTreeMap::new();
    for plan in list {
        let mesh = plan.get("mesh").and_then(Value::as_array);
        let axes: Option<Vec<u64>> = mesh.and_then(|axes| axes.iter().map(Value::as_u64).collect());
        let ranks = axes.map(|axes| axes.into_iter().fold(1, u64::saturating_mul));
        let complete = ["entries", "stored"].iter().all(|key| plan.get(key).is_some_and(Value::is_array));
        let Some(ranks) = ranks.filter(|_| complete) else {
            return Err(refuse(Kind::Mismatch, "holds a plan of another form".into()));
        };
        plans.insert(ranks, plan.clone());
    }
    if plans.is_empty() { Err(refuse(Kind::Mismatch, "holds no plan".into())) } else { Ok(plans) }
}

/// Plans for the same number of ranks; two single plans are compared whatever they are for.
fn pairs<'a>(
    a: &'a BTreeMap<u64, Value>,
    b: &'a BTreeMap<u64, Value>,
) -> Vec<(String, &'a Value, &'a Value)> {
    if let (1, 1) = (a.len(), b.len())
        && let (Some((old, a)), Some((new, b))) = (a.first_key_value(), b.first_key_value())
    {
        let ranks = if old == new { old.to_string() } else { format!("{old} -> {new}") };
        return vec![(ranks, a, b)];
    }
    a.iter().filter_map(|(ranks, a)| Some((ranks.to_string(), a, b.get(ranks)?))).collect()
}

/// What differs between two plans.
struct Difference {
    ranks: String,
    /// Tensors in layouts, and how many there are now and were before.
    layouts: BTreeMap<Stored, BTreeMap<String, (u64, u64)>>,
    /// Collectives whose number has changed: before and after.
    collectives: BTreeMap<Exchange, (u64, u64)>,
    /// What is measured: name, before and after.
    numbers: Vec<Number>,
}

/// Name with numbers left open, shape, and whether it is state.
type Stored = (bool, String, String);
/// Entry, kind, node with numbers left open, bytes.
type Exchange = (String, String, String, u64);

struct Number {
    key: &'static str,
    name: &'static str,
    bytes: bool,
    old: f64,
    new: f64,
}

const NUMBERS: [(&str, &str, bool); 6] = [
    ("seconds", "predicted time", false),
    ("seconds_one_rank", "on one rank", false),
    ("weight_bytes_per_rank", "weights per rank", true),
    ("state_bytes_per_rank", "state per rank", true),
    ("activation_bytes_per_rank", "activations per rank", true),
    ("budget_bytes", "budget", true),
];

impl Difference {
    fn of(ranks: String, old: &Value, new: &Value) -> Difference {
        let mut layouts: BTreeMap<Stored, BTreeMap<String, (u64, u64)>> = BTreeMap::new();
        for (plan, is_new) in [(old, false), (new, true)] {
            for ((key, layout), count) in stored(plan) {
                let counts = layouts.entry(key).or_default().entry(layout).or_default();
                *(if is_new { &mut counts.1 } else { &mut counts.0 }) += count;
            }
        }
        layouts.retain(|_, found| found.values().any(|(old, new)| old != new));
        let (before, after) = (exchanges(old), exchanges(new));
        let keys: BTreeSet<&Exchange> = before.keys().chain(after.keys()).collect();
        let count = |of: &BTreeMap<Exchange, u64>, key| of.get(key).copied().unwrap_or(0);
        let collectives = keys
            .into_iter()
            .map(|key| (key.clone(), (count(&before, key), count(&after, key))))
            .filter(|(_, (old, new))| old != new)
            .collect();
        let number = |plan: &Value, key: &str| plan.get(key).and_then(Value::as_f64);
        let numbers = NUMBERS
            .iter()
            .filter_map(|&(key, name, bytes)| {
                Some(Number { key, name, bytes, old: number(old, key)?, new: number(new, key)? })
            })
            .collect();
        Difference { ranks, layouts, collectives, numbers }
    }

    /// True if anything differs.
    fn is_one(&self) -> bool {
        let changed = self.numbers.iter().any(|n| n.old != n.new);
        changed || !self.layouts.is_empty() || !self.collectives.is_empty()
    }

    fn text(&self) -> String {
        let mut text =
            format!("{} ranks{}\n", self.ranks, if self.is_one() { "" } else { ": no difference" });
        for number in &self.numbers {
            let _ = match number.is_same() {
                true => continue,
                false => writeln!(text, "  {}", number.text()),
            };
        }
        for ((is_state, name, shape), found) in &self.layouts {
            let side = |get: fn(&(u64, u64)) -> u64| {
                let counts = found.iter().filter(|(_, counts)| get(counts) > 0);
                let words: Vec<String> = counts.map(|(l, counts)| format!("{}x {l}", get(counts))).collect();
                if words.is_empty() { "none".to_owned() } else { words.join(", ") }
            };
            let role = if *is_state { "state " } else { "" };
            let _ = writeln!(text, "  {role}{name} {shape}: {} -> {}", side(|c| c.0), side(|c| c.1));
        }
        for ((entry, kind, node, payload), (old, new)) in &self.collectives {
            let sign = if new > old { "+" } else { "-" };
            let _ = writeln!(
                text,
                "  {sign}{}x {kind} of {node}: {} ({entry})",
                new.abs_diff(*old),
                Bytes(*payload)
            );
        }
        text
    }

    fn json(&self) -> Value {
        let layouts: Vec<Value> = self
            .layouts
            .iter()
            .map(|((is_state, name, shape), found)| {
                let side = |get: fn(&(u64, u64)) -> u64| -> Value {
                    let counts = found.iter().filter(|(_, counts)| get(counts) > 0);
                    counts.map(|(layout, counts)| (layout.clone(), Value::from(get(counts)))).collect()
                };
                json!({ "name": name, "state": is_state, "shape": shape, "before": side(|c| c.0), "after": side(|c| c.1) })
            })
            .collect();
        let collectives: Vec<Value> = self
            .collectives
            .iter()
            .map(|((entry, kind, node, payload), (old, new))| {
                json!({ "entry": entry, "kind": kind, "node": node, "payload_bytes": payload, "before": old, "after": new })
            })
            .collect();
        let numbers: Value = self
            .numbers
            .iter()
            .map(|n| (n.key.to_owned(), json!({ "before": n.old, "after": n.new })))
            .collect();
        json!({
            "ranks": self.ranks,
            "differ": self.is_one(),
            "numbers": numbers,
            "layouts": layouts,
            "collectives": collectives,
        })
    }
}

impl Number {
    fn is_same(&self) -> bool {
        self.old == self.new
    }

    fn text(&self) -> String {
        let show = |x: f64| if self.bytes { Bytes(x as u64).to_string() } else { Seconds(x).to_string() };
        let share = (self.new - self.old) / self.old.abs().max(1e-300) * 100.0;
        let share = if self.old == 0.0 { String::new() } else { format!(" ({share:+.1} %)") };
        format!("{}: {} -> {}{share}", self.name, show(self.old), show(self.new))
    }
}

fn word(value: &Value, key: &str) -> String {
    value.get(key).and_then(Value::as_str).unwrap_or("?").to_owned()
}

fn list<'a>(value: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    value.get(key).and_then(Value::as_array).into_iter().flatten()
}

fn stored(plan: &Value) -> impl Iterator<Item = ((Stored, String), u64)> {
    list(plan, "stored").map(|s| {
        let is_state = s.get("state").and_then(Value::as_bool).unwrap_or(false);
        let key = (is_state, word(s, "name"), word(s, "shape"));
        ((key, word(s, "layout")), s.get("count").and_then(Value::as_u64).unwrap_or(0))
    })
}

fn exchanges(plan: &Value) -> BTreeMap<Exchange, u64> {
    let mut found = BTreeMap::new();
    for entry in list(plan, "entries") {
        for collective in list(entry, "collectives") {
            let payload = collective.get("payload_bytes").and_then(Value::as_u64).unwrap_or(0);
            let node = without_numbers(&word(collective, "node"));
            *found.entry((word(entry, "entry"), word(collective, "kind"), node, payload)).or_default() += 1;
        }
    }
    found
}
