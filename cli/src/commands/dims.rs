//! The values of the model's dims that an entry is planned for: what one `--dim` says, and the defaults of the roles
//! for the rest, as far as the model allows them.

use super::planning::{pair, twice};
use crate::failure::{Classify, Failure, Kind, Outcome};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use tpshard_frontend::{Imported, Role};
use tpshard_ir::graph::{Guard, SymbolRange};
use tpshard_ir::{Bindings, Dim, Graph, Op, Relation, StatePair};

/// What is given for one dim: a size, or the middle of a range of sizes.
#[derive(Clone, Copy, PartialEq)]
struct Given {
    at: i64,
    range: Option<SymbolRange>,
}

impl fmt::Display for Given {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.range {
            None => write!(f, "{}", self.at),
            Some(range) => write!(f, "{}..{}", range.low, range.high),
        }
    }
}

/// The sizes of one entry.
pub(super) struct Dims {
    /// Every symbol of the model.
    pub(super) bindings: Bindings,
    /// Those that were given as ranges.
    pub(super) ranges: BTreeMap<Arc<str>, SymbolRange>,
}

/// The sizes of the model's symbols to plan for, from the text of one `--dim`.
pub(super) fn dims(imported: &Imported, text: &str) -> Outcome<Dims> {
    let given = parse(text)?;
    let graph = &imported.graph;
    let mut ranges = BTreeMap::new();
    let mut bound = Bindings::new();
    let mut chosen: BTreeSet<Arc<str>> = BTreeSet::new();
    let mut used = inputs_named(imported, &given)?;
    for (symbol, range) in &graph.symbols {
        let keys = keys(imported, symbol, &given);
        let role = imported.report.roles.get(symbol);
        let value = match keys.as_slice() {
            [] => default_size(role, Use::of(graph)).clamp(range.low, range.high),
            [first, rest @ ..] => {
                if let Some(other) = rest.iter().find(|key| given[*key] != given[first]) {
                    let what = format!("{first}={} is the same dim", given[first]);
                    return Err(refuse(&format!("{other}={}", given[other]), &what, "give it once"));
                }
                let least = if role == Some(&Role::Past) { 0 } else { range.low.max(1) };
                let value = given[first];
                let (low, high) = value.range.map_or((value.at, value.at), |r| (r.low, r.high));
                if low < least || high > range.high {
                    let what = format!("not a size from {least} to {}", range.high);
                    return Err(refuse(&format!("{first}={value}"), &what, "e.g. --dim batch=1,seq=128"));
                }
                chosen.insert(symbol.clone());
                ranges.extend(value.range.map(|range| (symbol.clone(), range)));
                value.at
            }
        };
        used.extend(keys);
        bound.insert(symbol.clone(), value);
    }
    as_bounded(imported, &chosen, &mut bound);
    keep_guards(imported, &chosen, &mut bound)?;
    derived_by_guards(imported, &given, &mut used, &mut bound)?;
    match given.keys().find(|name| !used.contains(*name)) {
        Some(unknown) => Err(unknown_dim(imported, unknown)),
        None => Ok(Dims { bindings: bound, ranges }),
    }
}

/// Sizes that data decides are planned for, and memory counted, at their upper bounds, where nothing else is given.
fn as_bounded(imported: &Imported, chosen: &BTreeSet<Arc<str>>, bound: &mut Bindings) {
    for (symbol, most) in &imported.report.data_bounds {
        let range = imported.graph.symbols.get(symbol);
        if let (Some(most), Some(range), false) = (most, range, chosen.contains(symbol))
            && let Ok(most) = most.eval(bound)
        {
            bound.insert(symbol.clone(), most.clamp(range.low, range.high));
        }
    }
}

fn refuse(item: &str, what: &str, help: &str) -> Failure {
    Failure::new(Kind::Usage, format!("--dim {item}: {what}\nhelp: {help}"))
}

fn parse(text: &str) -> Outcome<BTreeMap<String, Given>> {
    let mut given = BTreeMap::new();
    if text.trim().is_empty() {
        return Ok(given);
    }
    for item in text.split(',').map(str::trim) {
        let (name, value) = pair(item, "--dim", "batch=1,seq=128")?;
        let size = |text: &str| text.trim().parse::<i64>().ok().filter(|value| *value >= 0);
        let value = match value.split_once("..") {
            None => size(value).map(|at| Given { at, range: None }),
            Some((low, high)) => match (size(low), size(high)) {
                (Some(low), Some(high)) if low <= high => {
                    Some(Given { at: low + (high - low) / 2, range: Some(SymbolRange { low, high }) })
                }
                _ => None,
            },
        };
        let value = value.ok_or_else(|| {
            let help =
                "sizes are numbers from 0 to 2147483647, ranges LOW..HIGH, e.g. --dim batch=1,seq=2..512";
            refuse(item, "not a size", help)
        })?;
        if given.insert(name.trim().to_owned(), value).is_some() {
            return Err(twice("--dim", item));
        }
    }
    Ok(given)
}

/// What of `given` is about this symbol: its name, an input's dim, or its role.
fn keys(imported: &Imported, symbol: &Arc<str>, given: &BTreeMap<String, Given>) -> Vec<String> {
    let by_input = imported.graph.inputs().flat_map(|(_, name, ty)| {
        let own = ty.shape.iter().enumerate().filter(|(_, dim)| dim.as_symbol() == Some(symbol));
        own.map(|(axis, _)| format!("{name}[{axis}]")).collect::<Vec<_>>()
    });
    let by_role = imported.report.roles.get(symbol).map(|role| role.name().to_owned());
    let mut keys: Vec<String> = Vec::new();
    for key in std::iter::once(symbol.to_string()).chain(by_input).chain(by_role) {
        if given.contains_key(&key) && !keys.contains(&key) {
            keys.push(key);
        }
    }
    keys
}

/// The keys of the form `input[axis]`; refuses those whose dim is not one symbol.
fn inputs_named(imported: &Imported, given: &BTreeMap<String, Given>) -> Outcome<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for (key, &value) in given {
        let Some((name, axis)) = key.strip_suffix(']').and_then(|key| key.rsplit_once('[')) else { continue };
        let Some((_, _, ty)) = imported.graph.inputs().find(|(_, known, _)| ***known == *name) else {
            continue;
        };
        let dim = axis.trim().parse::<usize>().ok().and_then(|axis| ty.shape.get(axis));
        let Some(dim) = dim else {
            return Err(refuse(key, &format!("the input is {ty}"), "its first dim is 0"));
        };
        if dim.as_symbol().is_none() {
            let what = match dim.as_const() {
                Some(size) => format!("this dim of {ty} is always {size}"),
                None => format!("this dim of {ty} is {dim}, which follows from others"),
            };
            return Err(refuse(&format!("{key}={value}"), &what, "give the dims that are one name"));
        }
        found.insert(key.clone());
    }
    Ok(found)
}

fn unknown_dim(imported: &Imported, name: &str) -> Failure {
    let symbols: Vec<&str> = imported.graph.symbols.keys().map(|s| s.as_ref()).collect();
    if symbols.is_empty() {
        return refuse(name, "the model has no such dim", "all its sizes are numbers");
    }
    let roles: BTreeSet<&str> = imported.report.roles.values().map(|r| r.name()).collect();
    let help = format!(
        "its symbols are {}; roles {}; or write INPUT[AXIS]",
        symbols.join(", "),
        roles.into_iter().collect::<Vec<_>>().join(", ")
    );
    refuse(name, "the model has no such dim", &help)
}

/// Moves defaults to where the model's guards hold; refuses chosen dims that cannot be.
fn keep_guards(imported: &Imported, chosen: &BTreeSet<Arc<str>>, bound: &mut Bindings) -> Outcome<()> {
    let graph = &imported.graph;
    for _ in 0..4 {
        for guard in graph.guards.iter().filter(|guard| guard.relation == Relation::LessEqual) {
            move_default(imported, guard, chosen, bound);
        }
        for guard in graph.guards.iter().filter(|guard| guard.relation == Relation::Equal) {
            if let Some(symbol) = guard.left.as_symbol().filter(|symbol| !chosen.contains(*symbol))
                && let Ok(value) = guard.right.eval(bound)
            {
                bound.insert(symbol.clone(), value);
            }
        }
    }
    let broken = graph.broken_guards(bound);
    let symbols = |guard: &Guard| {
        let mut symbols = guard.left.symbols();
        symbols.extend(guard.right.symbols());
        symbols
    };
    let Some((guard, names)) = broken.iter().find_map(|guard| {
        let names: Vec<String> = symbols(guard)
            .iter()
            .filter(|name| chosen.contains(*name))
            .filter_map(|name| Some(format!("{name}={}", bound.get(name)?)))
            .collect();
        (!names.is_empty()).then_some((guard, names))
    }) else {
        return Ok(());
    };
    let relation = if guard.relation == Relation::Equal { "equal" } else { "at most" };
    let what = format!("the model needs {} to be {relation} {} ({})", guard.left, guard.right, guard.reason);
    Err(refuse(&names.join(","), &what, "choose dims for which this holds"))
}

/// Changes one dim that nobody chose so that `left <= right` holds.
fn move_default(imported: &Imported, guard: &Guard, chosen: &BTreeSet<Arc<str>>, bound: &mut Bindings) {
    let room = |bound: &Bindings| -> Option<i64> {
        let value = |dim: &Dim| dim.eval(bound).ok();
        value(&guard.right)?.checked_sub(value(&guard.left)?)
    };
    let Some(lack) = room(bound).filter(|&room| room < 0).and_then(i64::checked_neg) else { return };
    for (name, range) in imported.graph.symbols.iter().filter(|(name, _)| !chosen.contains(*name)) {
        let Some(&value) = bound.get(name) else { continue };
        let mut next = bound.clone();
        next.insert(name.clone(), value + 1);
        let Some(gain) = room(&next).and_then(|room| room.checked_add(lack)).filter(|&gain| gain != 0) else {
            continue;
        };
        let steps = lack / gain.abs() + i64::from(lack % gain.abs() != 0);
        let moved = if gain > 0 { value.saturating_add(steps) } else { value.saturating_sub(steps) };
        if (range.low.max(1)..=range.high).contains(&moved) {
            bound.insert(name.clone(), moved);
            return;
        }
    }
}

/// Dims that the import replaced (`total = past + seq`) may be given as well, if they agree.
fn derived_by_guards(
    imported: &Imported,
    given: &BTreeMap<String, Given>,
    used: &mut BTreeSet<String>,
    bound: &mut Bindings,
) -> Outcome<()> {
    for equality in &imported.report.equalities {
        let Some(&wanted) = given.get(equality.symbol.as_ref()) else { continue };
        used.insert(equality.symbol.to_string());
        let value = equality.equals.eval(bound).or_fail(Kind::Usage)?;
        let fits = wanted.range.map_or(value == wanted.at, |r| (r.low..=r.high).contains(&value));
        if !fits {
            let what = format!("the model makes it {} = {value} for the other dims", equality.equals);
            let help = "leave it out, or give dims that agree";
            return Err(refuse(&format!("{}={wanted}", equality.symbol), &what, help));
        }
    }
    Ok(())
}

/// What a graph is for, by its state.
#[derive(Clone, Copy, PartialEq)]
enum Use {
    /// It has no state.
    Whole,
    /// Its state begins.
    Prefill,
    /// Its state grows.
    Decode,
}

impl Use {
    fn of(graph: &Graph) -> Use {
        let appends = |pair: &StatePair| {
            let output = graph.outputs.iter().find(|output| output.name == pair.output);
            output.is_some_and(|output| matches!(graph.node(output.value).op, Op::Append { .. }))
        };
        match () {
            () if graph.states.is_empty() => Use::Whole,
            () if graph.states.iter().any(appends) => Use::Decode,
            () => Use::Prefill,
        }
    }
}

/// Decode with a filled cache for graphs whose state grows, a prompt where it begins, one sequence of 128 otherwise.
fn default_size(role: Option<&Role>, of: Use) -> i64 {
    match (role, of) {
        (Some(Role::Batch), _) => 1,
        (Some(Role::Sequence), Use::Decode) => 1,
        (Some(Role::Sequence), Use::Prefill) => 512,
        (Some(Role::Past), _) => 2048,
        (Some(Role::Sequence | Role::Total) | None, _) => 128,
    }
}
