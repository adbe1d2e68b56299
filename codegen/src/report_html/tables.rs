//! Collectives, stored tensors and outputs as tables that scroll on their own and can be sorted.

use super::graph::badge;
use super::text::Text;
use super::{Entry, Report, counted, entry_heading, put};
use std::fmt::Write;
use tpshard_ir::wording::{Bytes, Seconds};

/// Most rows of a table; further ones are counted in one.
const MOST_ROWS: usize = 400;

/// Opens a table; numeric columns end in `#`.
fn open(page: &mut String, caption: &str, columns: &[&str]) {
    put!(
        page,
        "<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"{caption}\"><table>\n\
         <caption>{caption}</caption>\n<thead><tr>"
    );
    for column in columns {
        match column.strip_suffix('#') {
            Some(name) => put!(page, "<th scope=\"col\" class=\"n\">{name}</th>"),
            None => put!(page, "<th scope=\"col\">{column}</th>"),
        }
    }
    page.push_str("</tr></thead>\n<tbody>\n");
}

fn close(page: &mut String, foot: &str) {
    page.push_str("</tbody>\n");
    if !foot.is_empty() {
        put!(page, "<tfoot>\n{foot}</tfoot>\n");
    }
    page.push_str("</table></div>\n");
}

/// A cell that sorts by `key`.
fn number(key: impl std::fmt::Display, shown: impl std::fmt::Display) -> String {
    format!("<td class=\"n\" data-key=\"{key}\">{shown}</td>")
}

pub(super) fn collectives(page: &mut String, report: &Report) {
    page.push_str("<section id=\"collectives\">\n<h2>Collectives</h2>\n");
    for entry in &report.entries {
        of_entry(page, report, entry);
    }
    page.push_str("</section>\n");
}

fn of_entry(page: &mut String, report: &Report, entry: &Entry) {
    let heading = entry_heading(report, entry);
    let carried: f64 = entry.collectives.iter().map(|c| c.seconds).sum();
    let count: usize = entry.collectives.iter().map(|c| c.count).sum();
    if count == 0 {
        put!(page, "<p>{heading}No collectives run.</p>\n");
        return;
    }
    let columns = ["Kind", "Node", "Ranks#", "Count#", "Bytes each#", "Time#", "Share of all time#"];
    open(page, &format!("{heading}{}", counted(count, "collective")), &columns);
    let share = |seconds: f64| {
        let whole = entry.time.total();
        if whole > 0.0 { seconds / whole * 100.0 } else { 0.0 }
    };
    for c in entry.collectives.iter().take(MOST_ROWS) {
        put!(
            page,
            "<tr><th scope=\"row\"><span class=\"exchange\">⇄ {}</span></th><td><bdi>{}</bdi></td>{}{}{}{}{}</tr>\n",
            Text(&c.kind),
            Text(&c.origin),
            number(c.ranks, c.ranks),
            number(c.count, c.count),
            number(c.payload, Bytes(c.payload)),
            number(c.seconds, Seconds(c.seconds)),
            number(c.seconds, format_args!("{:.1} %", share(c.seconds))),
        );
    }
    let mut foot = String::new();
    let mut line = |name: &str, count: usize, seconds: f64| {
        put!(
            foot,
            "<tr><th scope=\"row\" colspan=\"3\">{name}</th>{}<td></td>{}{}</tr>\n",
            number(count, count),
            number(seconds, Seconds(seconds)),
            number(seconds, format_args!("{:.1} %", share(seconds))),
        );
    };
    let rest = entry.collectives.get(MOST_ROWS..).unwrap_or_default();
    if !rest.is_empty() {
        let name = format!("{} further rows, not shown", rest.len());
        line(&name, rest.iter().map(|c| c.count).sum(), rest.iter().map(|c| c.seconds).sum());
    }
    line("all collectives", count, carried);
    let collecting = (entry.time.communication - carried).max(0.0);
    if collecting > 1e-12 {
        let split = entry.outputs.iter().filter(|(_, layout)| !layout.is_replicated()).count();
        line("collecting split outputs on rank 0", split, collecting);
    }
    close(page, &foot);
}

pub(super) fn stored(page: &mut String, report: &Report) {
    page.push_str("<section id=\"stored\">\n<h2>Weights and state</h2>\n");
    let columns = ["Name", "What", "Type", "Layout", "Count#", "Bytes on rank 0#"];
    open(page, "Weights and state, alike ones together", &columns);
    for kind in report.stored.iter().take(MOST_ROWS) {
        put!(
            page,
            "<tr><th scope=\"row\"><bdi>{}</bdi></th><td>{}</td><td><code>{}</code></td><td>{}</td>{}{}</tr>\n",
            Text(&kind.name),
            if kind.is_state { "state" } else { "weight" },
            Text(&kind.shape),
            badge(&kind.layout),
            number(kind.count, kind.count),
            number(kind.bytes, Bytes(kind.bytes)),
        );
    }
    let mut foot = String::new();
    let mut line = |name: &str, of: &[&super::Stored]| {
        let (count, bytes) =
            (of.iter().map(|k| k.count).sum::<usize>(), of.iter().map(|k| k.bytes).sum::<u64>());
        put!(
            foot,
            "<tr><th scope=\"row\" colspan=\"4\">{name}</th>{}{}</tr>\n",
            number(count, count),
            number(bytes, Bytes(bytes))
        );
    };
    let rest: Vec<&super::Stored> = report.stored.iter().skip(MOST_ROWS).collect();
    if !rest.is_empty() {
        line(&format!("{} further rows, not shown", rest.len()), &rest);
    }
    let (state, weights): (Vec<_>, Vec<_>) = report.stored.iter().partition(|k| k.is_state);
    line("all weights", &weights);
    line("all state", &state);
    close(page, &foot);
    page.push_str("</section>\n");
}

pub(super) fn outputs(page: &mut String, report: &Report) {
    page.push_str("<section id=\"outputs\">\n<h2>Outputs</h2>\n");
    for entry in &report.entries {
        open(
            page,
            &format!("{}outputs and where they are left", entry_heading(report, entry)),
            &["Name", "Layout"],
        );
        for (name, layout) in entry.outputs.iter().take(MOST_ROWS) {
            put!(
                page,
                "<tr><th scope=\"row\"><bdi>{}</bdi></th><td>{}</td></tr>\n",
                Text(name),
                badge(layout)
            );
        }
        let more = entry.outputs.len().saturating_sub(MOST_ROWS);
        let foot = if more > 0 {
            format!("<tr><th scope=\"row\" colspan=\"2\">{more} further outputs, not shown</th></tr>\n")
        } else {
            String::new()
        };
        close(page, &foot);
    }
    page.push_str("</section>\n");
}
