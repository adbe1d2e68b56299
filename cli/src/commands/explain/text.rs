//! What is known about a layout, as a table and a paragraph, and for machines.

use super::{Exchange, Exchanged, Explained, Found, Held, How, Measure, Possibility};
use crate::commands::names::shown;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use tpshard_passes::cost::Parts;
use tpshard_passes::report::{Bytes, Seconds, without_numbers};

/// Most kinds of collectives that a sentence lists.
const LISTED: usize = 3;

impl Explained {
    pub(super) fn text(&self) -> String {
        let Explained { tensor, dtype, dims, mesh, profile, plan, .. } = self;
        let mut text = format!("tensor {}: {dtype}[{}]\n", shown(tensor), dims.join(", "));
        let _ = writeln!(
            text,
            "{} ranks (mesh {mesh}) on {profile}: a step takes {} ({})",
            mesh.ranks(),
            Seconds(plan.seconds),
            parts_text(&plan.parts)
        );
        text.push_str("\nin the plan\n");
        let several = self.held.iter().any(|held| held.entry != self.held[0].entry);
        for held in &self.held {
            let entry = if several { format!(" ({})", held.entry) } else { String::new() };
            let _ = writeln!(text, "  {}{entry}", held.text());
        }
        if self.held.is_empty() {
            text.push_str("  nowhere: what it is for is computed in another way\n");
        }
        text.push('\n');
        text.push_str(&self.table());
        text.push_str("\nwhy\n");
        self.why().iter().for_each(|line| {
            let _ = writeln!(text, "  {line}");
        });
        text
    }

    fn table(&self) -> String {
        let header = ["layout", "step", "difference", "weights+state/rank", "collectives", ""];
        let mut rows = vec![header.map(str::to_owned)];
        for option in &self.options {
            let mark = if option.chosen { format!("{} *", option.layout) } else { option.layout.clone() };
            let blank = String::new;
            rows.push(match &option.found {
                Found::Not(why) => [mark, "-".into(), blank(), blank(), blank(), why.clone()],
                Found::Plan { measure, over, free } => [
                    mark,
                    Seconds(measure.seconds).to_string(),
                    difference(self.plan.seconds, measure.seconds),
                    Bytes(measure.bytes).to_string(),
                    change(&self.plan, measure),
                    match (over, free) {
                        (Some((over, _)), false) => format!("{} over the budget", Bytes(*over)),
                        (Some((over, _)), true) => {
                            format!("{} over the budget; priced without one", Bytes(*over))
                        }
                        (None, _) => blank(),
                    },
                ],
            });
        }
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..header.len()).map(width).collect();
        let mut text = String::new();
        for row in &rows {
            let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, w)| format!("{cell:<w$}")).collect();
            let _ = writeln!(text, "  {}", cells.join("  ").trim_end());
        }
        text
    }

    /// How the layout of the plan is called.
    fn chosen(&self) -> String {
        if let Some(option) = self.options.iter().find(|option| option.chosen) {
            return option.layout.clone();
        }
        let layouts: BTreeSet<String> = self.held.iter().map(|held| held.layout.to_string()).collect();
        layouts.into_iter().collect::<Vec<_>>().join(" and ")
    }

    /// The reasons, a sentence each.
    fn why(&self) -> Vec<String> {
        let mut lines = Vec::new();
        let chosen = self.chosen();
        for pin in &self.pinned {
            lines.push(format!("{chosen} is not a decision of the planner: {pin} fixes it."));
        }
        let others: Vec<_> = self
            .options
            .iter()
            .filter(|option| !option.chosen)
            .filter_map(|option| match &option.found {
                Found::Plan { measure, over, .. } => Some((option, measure, *over)),
                Found::Not(_) => None,
            })
            .collect();
        let within = others.iter().filter(|(_, _, over)| over.is_none());
        let next = within.min_by(|a, b| a.1.seconds.total_cmp(&b.1.seconds));
        if let Some((option, measure, _)) = next {
            lines.push(self.comparison(&chosen, option, measure));
        }
        for (option, measure, over) in &others {
            let Some((over, budget)) = over else { continue };
            lines.push(format!(
                "The budget of {} per rank does not allow {}: it needs {} more. With that memory a step takes {}.",
                Bytes(*budget),
                option.layout,
                Bytes(*over),
                than(self.plan.seconds, measure.seconds)
            ));
        }
        if others.is_empty() {
            lines.push(format!("{chosen} is the only layout that is possible."));
        }
        lines
    }

    /// Against the next best layout.
    fn comparison(&self, chosen: &str, option: &Possibility, measure: &Measure) -> String {
        let other = &option.layout;
        let because = because(&self.plan, measure);
        let change = measure.seconds - self.plan.seconds;
        let than = than(self.plan.seconds, measure.seconds);
        match () {
            () if is_nothing(change) => {
                format!("{chosen} is one of several best: with {other} a step takes the same time.")
            }
            () if change > 0.0 => {
                format!("{chosen} is chosen: with {other}, the next best, a step takes {than}: {because}.")
            }
            () if !self.pinned.is_empty() => {
                format!("Left to the planner it might be {other}: a step takes {than}: {because}.")
            }
            () => format!(
                "With {other} a step takes {than}: {because}. The search, which leaves a gap of {:.2} %, has missed it; pin it to have it.",
                self.plan.gap * 100.0
            ),
        }
    }

    pub(super) fn json(&self) -> Value {
        let options: Vec<Value> = self.options.iter().map(|option| option.json(&self.plan)).collect();
        json!({
            "tensor": self.tensor,
            "dtype": self.dtype.name(),
            "shape": self.dims,
            "ranks": self.mesh.ranks(),
            "mesh": self.mesh.0,
            "profile": self.profile,
            "chosen": self.chosen(),
            "pinned_by": self.pinned,
            "plan": self.plan.json(),
            "held": self.held.iter().map(Held::json).collect::<Vec<_>>(),
            "layouts": options,
            "why": self.why(),
        })
    }
}

impl Possibility {
    fn json(&self, plan: &Measure) -> Value {
        match &self.found {
            Found::Not(why) => {
                json!({ "layout": self.layout, "chosen": self.chosen, "possible": false, "reason": why })
            }
            Found::Plan { measure, over, free } => {
                let (added, removed) = exchanges(plan, measure);
                json!({
                    "layout": self.layout,
                    "chosen": self.chosen,
                    "possible": true,
                    "plan": measure.json(),
                    "seconds_more": measure.seconds - plan.seconds,
                    "collectives_added": group_json(&added),
                    "collectives_removed": group_json(&removed),
                    "bytes_over_budget": over.map(|(over, _)| over),
                    "without_budget": free,
                })
            }
        }
    }
}

impl Measure {
    fn json(&self) -> Value {
        json!({
            "seconds": self.seconds,
            "compute_seconds": self.parts.compute,
            "memory_seconds": self.parts.memory,
            "launch_seconds": self.parts.launch,
            "communication_seconds": self.parts.communication,
            "weight_and_state_bytes_per_rank": self.bytes,
            "budget_bytes": self.budget,
            "gap": self.gap,
            "collectives": self.collectives.values().map(|c| c.count).sum::<usize>(),
        })
    }
}

impl Held {
    fn text(&self) -> String {
        let Held { ty, layout, shares, .. } = self;
        match &self.how {
            How::Stored => format!("{ty} in memory in {layout}: {shares}"),
            How::Computed { node } if node.is_empty() => format!("{ty} in {layout}: {shares}"),
            How::Computed { node } => format!("{ty} made in {layout} by {}: {shares}", shown(node)),
            How::Converted { kind, from, exchange: None } => {
                format!("{ty} converted from {from} to {layout} by {kind}, on the rank alone: {shares}")
            }
            How::Converted { kind, from, exchange: Some((ranks, payload, seconds)) } => format!(
                "{ty} converted from {from} to {layout} by {kind} over {ranks} ranks, {}, {}: {shares}",
                Bytes(*payload),
                Seconds(*seconds)
            ),
        }
    }

    fn json(&self) -> Value {
        let how = match &self.how {
            How::Stored => json!({ "kind": "stored" }),
            How::Computed { node } => json!({ "kind": "computed", "node": node }),
            How::Converted { kind, from, exchange } => json!({
                "kind": kind,
                "from": from.to_string(),
                "ranks": exchange.map(|(ranks, ..)| ranks),
                "payload_bytes": exchange.map(|(_, payload, _)| payload),
                "seconds": exchange.map(|(.., seconds)| seconds),
            }),
        };
        json!({
            "entry": self.entry,
            "type": self.ty,
            "layout": self.layout.to_string(),
            "shares": self.shares,
            "how": how,
        })
    }
}

fn parts_text(parts: &Parts) -> String {
    format!(
        "compute {}, memory {}, launches {}, communication {}",
        Seconds(parts.compute),
        Seconds(parts.memory),
        Seconds(parts.launch),
        Seconds(parts.communication)
    )
}

/// True for what would be printed as nothing.
fn is_nothing(change: f64) -> bool {
    Seconds(change.abs()).to_string() == Seconds(0.0).to_string()
}

/// `+6.10 µs (+2.7 %)`.
fn difference(old: f64, new: f64) -> String {
    let change = new - old;
    if is_nothing(change) {
        return "same".into();
    }
    let sign = if change < 0.0 { "-" } else { "+" };
    format!("{sign}{} ({:+.2} %)", Seconds(change.abs()), change / old * 100.0)
}

/// `6.10 µs more (+2.7 %)`.
fn than(old: f64, new: f64) -> String {
    let change = new - old;
    if is_nothing(change) {
        return "the same time".into();
    }
    let word = if change < 0.0 { "less" } else { "more" };
    format!("{} {word} ({:+.2} %)", Seconds(change.abs()), change / old * 100.0)
}

/// How many collectives come and go: `+2 -1`.
fn change(plan: &Measure, other: &Measure) -> String {
    let (added, removed) = exchanges(plan, other);
    let count = |groups: &[Group]| groups.iter().map(|g| g.count).sum::<usize>();
    match (count(&added), count(&removed)) {
        (0, 0) => "same".into(),
        (added, 0) => format!("+{added}"),
        (0, removed) => format!("-{removed}"),
        (added, removed) => format!("+{added} -{removed}"),
    }
}

/// Collectives of one kind at like nodes.
struct Group {
    kind: &'static str,
    node: String,
    payload: u64,
    count: usize,
    seconds: f64,
}

/// The collectives that `other` has and `plan` has not, and the other way round; the dearest first.
fn exchanges(plan: &Measure, other: &Measure) -> (Vec<Group>, Vec<Group>) {
    (beyond(&other.collectives, &plan.collectives), beyond(&plan.collectives, &other.collectives))
}

fn beyond(more: &BTreeMap<Exchange, Exchanged>, less: &BTreeMap<Exchange, Exchanged>) -> Vec<Group> {
    let mut groups: BTreeMap<(&'static str, String, u64), Group> = BTreeMap::new();
    for (key, found) in more {
        let count = found.count.saturating_sub(less.get(key).map_or(0, |known| known.count));
        if count == 0 {
            continue;
        }
        let (_, kind, node, payload) = key;
        let pattern = without_numbers(node);
        let first = Group { kind, node: node.clone(), payload: *payload, count: 0, seconds: 0.0 };
        let group = groups.entry((kind, pattern.clone(), *payload)).or_insert(first);
        if group.node != *node {
            group.node = pattern;
        }
        group.count += count;
        group.seconds += found.seconds * count as f64;
    }
    let mut groups: Vec<Group> = groups.into_values().collect();
    groups.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    groups
}

fn group_json(groups: &[Group]) -> Vec<Value> {
    let one = |g: &Group| json!({ "kind": g.kind, "node": g.node, "payload_bytes": g.payload, "count": g.count, "seconds": g.seconds });
    groups.iter().map(one).collect()
}

/// `it adds 2 all_gather of … (4.00 KiB each, together 6.10 µs) (communication +6.10 µs)`.
fn because(plan: &Measure, other: &Measure) -> String {
    let (added, removed) = exchanges(plan, other);
    let list = |groups: &[Group]| {
        let one = |g: &Group| {
            let of = if g.node.is_empty() { String::new() } else { format!(" of {}", shown(&g.node)) };
            let each = if g.count > 1 { " each, together" } else { "," };
            format!("{} {}{of} ({}{each} {})", g.count, g.kind, Bytes(g.payload), Seconds(g.seconds))
        };
        let mut words: Vec<String> = groups.iter().take(LISTED).map(one).collect();
        let rest: usize = groups.iter().skip(LISTED).map(|g| g.count).sum();
        if rest > 0 {
            words.push(format!("{rest} more"));
        }
        words.join(", ")
    };
    let parts = [
        ("compute", other.parts.compute - plan.parts.compute),
        ("memory", other.parts.memory - plan.parts.memory),
        ("launches", other.parts.launch - plan.parts.launch),
        ("communication", other.parts.communication - plan.parts.communication),
    ];
    let sign = |change: f64| if change < 0.0 { "-" } else { "+" };
    let changed = parts.iter().filter(|(_, change)| !is_nothing(*change));
    let parts: Vec<String> =
        changed.map(|(name, change)| format!("{name} {}{}", sign(*change), Seconds(change.abs()))).collect();
    let parts = if parts.is_empty() { String::new() } else { format!(" ({})", parts.join(", ")) };
    match (added.is_empty(), removed.is_empty()) {
        (true, true) => format!("with the same collectives{parts}"),
        (false, true) => format!("it adds {}{parts}", list(&added)),
        (true, false) => format!("it saves {}{parts}", list(&removed)),
        (false, false) => format!("it adds {}, and saves {}{parts}", list(&added), list(&removed)),
    }
}
