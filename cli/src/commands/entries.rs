//! The entries of a program: one per `--dim` and graph, and which of them takes which sizes.
//!
//! Sizes given as ranges are limits. Sizes given as numbers are what time is predicted for; if several entries differ
//! in them, each takes the sizes next to its own on a logarithmic scale, so that together they take all. Beside a range
//! of another entry, a number means just that size.

use super::dims::{Dims, dims};
use crate::failure::{Failure, Kind, Outcome};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tpshard_frontend::{Imported, Role};
use tpshard_ir::graph::SymbolRange;
use tpshard_passes::Entry;

/// Most entries of a graph.
const MOST: usize = 16;
/// The entry of a graph that has only one, where nobody calls it otherwise.
const MAIN: &str = "main";

/// The entries of every graph of a model. Flags are for all graphs, unless they name the value of an input that chooses
/// between them. Entries of several graphs that are called the same get the values to their names.
pub(super) fn entries_of_graphs(graphs: &[Imported], flags: &[String]) -> Outcome<Vec<Vec<Entry>>> {
    let mut all = Vec::new();
    for imported in graphs {
        let own = flags.iter().map(|flag| of_case(imported, flag)).collect::<Outcome<Vec<_>>>()?;
        all.push(entries(imported, &own.into_iter().flatten().collect::<Vec<_>>())?);
    }
    let count = |name: &str| all.iter().flatten().filter(|entry: &&Entry| entry.name == name).count();
    let several: BTreeSet<String> =
        all.iter().flatten().map(|entry| entry.name.clone()).filter(|name| count(name) > 1).collect();
    for (imported, entries) in graphs.iter().zip(&mut all) {
        let values = suffix(imported);
        for entry in entries.iter_mut().filter(|entry| several.contains(&entry.name)) {
            entry.name = if entry.name == MAIN { values.clone() } else { format!("{}-{values}", entry.name) };
        }
    }
    Ok(all)
}

/// `with-use_cache_branch`.
fn suffix(imported: &Imported) -> String {
    let plain = |name: &str| -> String {
        let known = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        name.chars().take(48).map(|c| if known(c) { c } else { '_' }).collect()
    };
    let values = imported.graph.cases.iter().map(|case| {
        let how = if case.value { "with" } else { "without" };
        format!("{how}-{}", plain(&case.input))
    });
    values.collect::<Vec<_>>().join("-")
}

/// A flag without the values of inputs that choose; none if it is for another graph.
fn of_case(imported: &Imported, flag: &str) -> Outcome<Option<String>> {
    let (head, body) = match flag.split_once(':') {
        Some((head, body)) => (Some(head), body),
        None => (None, flag),
    };
    let mut rest: Vec<&str> = Vec::new();
    for item in body.split(',') {
        let named = item.split_once('=').and_then(|(name, value)| {
            let case = imported.graph.cases.iter().find(|case| *case.input == *name.trim())?;
            Some((case, value.trim()))
        });
        match named {
            None => rest.push(item),
            Some((case, value)) if value == case.value.to_string() => {}
            Some((_, "true" | "false")) => return Ok(None),
            Some(_) => {
                return Err(refuse(flag, &format!("{item} is neither true nor false"), "give one of them"));
            }
        }
    }
    let body = rest.join(",");
    Ok(Some(head.map_or(body.clone(), |head| format!("{head}:{body}"))))
}

/// The entries that the `--dim` flags ask for: one by default sizes if there is none.
fn entries(imported: &Imported, flags: &[String]) -> Outcome<Vec<Entry>> {
    if flags.len() > MOST {
        let message =
            format!("--dim is given {} times\nhelp: a program has at most {MOST} entries", flags.len());
        return Err(Failure::new(Kind::Usage, message));
    }
    let default = [String::new()];
    let flags = if flags.is_empty() { &default[..] } else { flags };
    let mut entries: Vec<Entry> = Vec::new();
    for flag in flags {
        let (head, body) = match flag.split_once(':') {
            Some((head, body)) => (Some(head.trim()), body),
            None => (None, flag.as_str()),
        };
        let (name, weight) = head.map_or(Ok((None, 1.0)), |head| name_and_weight(flag, head))?;
        let dims = dims(imported, body)?;
        let name = name.unwrap_or_else(|| free_name(&usual_name(imported, &dims, flags.len()), &entries));
        if entries.iter().any(|e| e.name == name) {
            return Err(refuse(flag, &format!("two entries are called `{name}`"), "give each its own name"));
        }
        let mut largest = dims.bindings.clone();
        largest.extend(dims.ranges.iter().map(|(symbol, range)| (symbol.clone(), range.high)));
        entries.push(Entry { name, bindings: dims.bindings, largest, ranges: dims.ranges, weight });
    }
    share_out(imported, &mut entries)?;
    Ok(entries)
}

fn refuse(flag: &str, what: &str, help: &str) -> Failure {
    Failure::new(Kind::Usage, format!("--dim {flag}: {what}\nhelp: {help}"))
}

/// `decode` or `decode*100`.
fn name_and_weight(flag: &str, head: &str) -> Outcome<(Option<String>, f64)> {
    let (name, weight) = head.split_once('*').unwrap_or((head, "1"));
    let name = name.trim();
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if name.len() > 64 || !name.chars().all(plain) {
        let help = "names are made of letters, digits, - and _, e.g. --dim decode*100:batch=1,seq=1";
        return Err(refuse(flag, "not the name of an entry", help));
    }
    let weight = weight.trim().parse::<f64>().ok().filter(|w| w.is_finite() && *w > 0.0 && *w <= 1e9);
    let weight = weight.ok_or_else(|| {
        refuse(flag, "not a weight", "weights are numbers above 0, e.g. --dim decode*100:batch=1,seq=1")
    })?;
    Ok(((!name.is_empty()).then(|| name.to_owned()), weight))
}

/// What people call a use of the model.
fn usual_name(imported: &Imported, dims: &Dims, count: usize) -> String {
    let sequence = dims.bindings.iter().find(|(s, _)| imported.report.roles.get(*s) == Some(&Role::Sequence));
    match sequence {
        _ if count == 1 => MAIN,
        Some((_, 1)) if !imported.graph.states.is_empty() => "decode",
        Some(_) if !imported.graph.states.is_empty() => "prefill",
        _ => "entry",
    }
    .to_owned()
}

fn free_name(base: &str, taken: &[Entry]) -> String {
    let numbered = (2..).map(|n| format!("{base}-{n}"));
    let free = |name: &String| !taken.iter().any(|e| e.name == *name);
    std::iter::once(base.to_owned()).chain(numbered).find(free).unwrap_or_default()
}

/// Gives entries that differ in numbers the sizes next to them.
fn share_out(imported: &Imported, entries: &mut [Entry]) -> Outcome<()> {
    let symbols = &imported.graph.symbols;
    // The length of a step tells uses apart better than anything else.
    let mut order: Vec<Arc<str>> = symbols.keys().cloned().collect();
    order.sort_by_key(|s| imported.report.roles.get(s) != Some(&Role::Sequence));
    let mut open: Vec<Vec<usize>> = vec![(0..entries.len()).collect()];
    while let Some(alike) = open.pop() {
        let all_apart = alike
            .iter()
            .enumerate()
            .all(|(at, &a)| alike[at + 1..].iter().all(|&b| apart(&entries[a].ranges, &entries[b].ranges)));
        if all_apart {
            continue;
        }
        let sizes = |symbol: &Arc<str>| -> BTreeSet<i64> {
            alike.iter().filter_map(|&e| entries[e].bindings.get(symbol).copied()).collect()
        };
        let limited =
            |symbol: &Arc<str>| alike.iter().filter(|&&e| entries[e].ranges.contains_key(symbol)).count();
        let tells_apart = |symbol: &&Arc<str>| match limited(symbol) {
            0 => sizes(symbol).len() > 1,
            some => some < alike.len(),
        };
        let Some(symbol) = order.iter().find(tells_apart).cloned() else {
            let names: Vec<&str> = alike.iter().map(|&e| entries[e].name.as_str()).collect();
            let what = format!("entries {} take the same sizes", names.join(" and "));
            let help = "let them differ in a size, or give ranges that do not overlap";
            return Err(Failure::new(Kind::Usage, format!("--dim: {what}\nhelp: {help}")));
        };
        if limited(&symbol) > 0 {
            // Beside a range, a number means just that size.
            for &entry in &alike {
                if let Some(&size) = entries[entry].bindings.get(&symbol) {
                    entries[entry]
                        .ranges
                        .entry(symbol.clone())
                        .or_insert(SymbolRange { low: size, high: size });
                }
            }
            open.push(alike);
            continue;
        }
        let whole = symbols.get(&symbol).copied().unwrap_or(SymbolRange { low: 0, high: i64::MAX });
        let sizes: Vec<i64> = sizes(&symbol).into_iter().collect();
        let mut low = whole.low;
        for (at, &size) in sizes.iter().enumerate() {
            let high = sizes.get(at + 1).map_or(whole.high, |&next| between(size, next));
            let here: Vec<usize> =
                alike.iter().copied().filter(|&e| entries[e].bindings.get(&symbol) == Some(&size)).collect();
            for &entry in &here {
                entries[entry].ranges.insert(symbol.clone(), SymbolRange { low, high });
            }
            open.push(here);
            low = high + 1;
        }
    }
    Ok(())
}

/// The last size that is nearer to `low` than to `high` in ratio.
fn between(low: i64, high: i64) -> i64 {
    let middle = (low.max(1) as f64 * high as f64).sqrt() as i64;
    middle.clamp(low, high - 1)
}

/// True if no size fits both.
fn apart(a: &BTreeMap<Arc<str>, SymbolRange>, b: &BTreeMap<Arc<str>, SymbolRange>) -> bool {
    a.iter().any(|(symbol, a)| b.get(symbol).is_some_and(|b| a.high < b.low || b.high < a.low))
}
