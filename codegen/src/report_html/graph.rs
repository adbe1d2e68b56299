//! The graph by layers: every step a chip in the colour, and with the letters, of its layout.

use super::fold::{Block, blocks, origins, scope};
use super::text::Text;
use super::{Entry, Report, Role, Step, counted, entry_heading, put};
use std::collections::BTreeSet;
use std::fmt::Write;
use tpshard_ir::wording::{Bytes, Seconds};
use tpshard_ir::{AxisLayout, Layout};

/// Most steps shown of all entries together; further ones are counted.
const MOST_CHIPS: usize = 4000;
/// Colours for split dims; further dims use them again.
const COLOURS: usize = 6;
/// Steps that take less only look at memory another way.
const QUIET: f64 = 1e-8;

/// The class that colours a layout: by what is partial, else by the first dim that is split.
pub(super) fn colour(layout: &Layout) -> String {
    if layout.has_partial() {
        return "lp".into();
    }
    match layout.0.iter().find_map(AxisLayout::sharded_dim) {
        Some(dim) => format!("l{}", dim % COLOURS),
        None => "lr".into(),
    }
}

/// A layout in its colour.
pub(super) fn badge(layout: &Layout) -> String {
    format!("<b class=\"layout {}\">{layout}</b>", colour(layout))
}

pub(super) fn entries(page: &mut String, report: &Report) {
    page.push_str("<section id=\"graph\">\n<h2>Graph</h2>\n");
    legend(page, report);
    let mut left = MOST_CHIPS;
    for entry in &report.entries {
        if report.entries.len() > 1 {
            put!(page, "<h3><bdi>{}</bdi> <small>{}</small></h3>\n", Text(&entry.name), Text(&entry.dims));
        }
        one_entry(page, report, entry, &mut left);
    }
    page.push_str("</section>\n");
}

/// The layouts that occur, with what they mean.
fn legend(page: &mut String, report: &Report) {
    let layouts: BTreeSet<&Layout> =
        report.entries.iter().flat_map(|e| &e.steps).map(|s| &s.layout).collect();
    let parts: BTreeSet<&AxisLayout> = layouts.iter().flat_map(|l| &l.0).collect();
    let shards: BTreeSet<usize> = parts.iter().filter_map(|p| p.sharded_dim()).collect();
    page.push_str("<ul class=\"legend\" aria-label=\"Legend\">");
    if parts.iter().any(|p| p.is_replicated()) {
        page.push_str("<li><b class=\"layout lr\">R</b>whole on every rank</li>");
    }
    for dim in shards {
        put!(page, "<li><b class=\"layout l{}\">S({dim})</b>dim {dim} is split</li>", dim % COLOURS);
    }
    if parts.iter().any(|p| matches!(p, AxisLayout::Partial(_))) {
        page.push_str("<li><b class=\"layout lp\">P</b>the ranks' tensors are yet to be combined</li>");
    }
    if report.entries.iter().any(|e| e.steps.iter().any(|s| s.role == Role::Communicates)) {
        page.push_str("<li><span class=\"exchange\">⇄</span>ranks communicate</li>");
    }
    page.push_str("</ul>\n");
    if report.mesh.axes() > 1 {
        put!(
            page,
            "<p class=\"note\">A layout has one part for each axis of the mesh {}.</p>\n",
            report.mesh
        );
    }
    page.push_str("<p class=\"note\">Select a step for its shape, bytes and time on rank 0.</p>\n");
}

fn one_entry(page: &mut String, report: &Report, entry: &Entry, left: &mut usize) {
    let mut hidden = 0;
    let origins = origins(&entry.steps);
    for block in blocks(&entry.steps) {
        let shown = block.steps.len().min(*left);
        hidden += (block.steps.len() - shown) * block.count;
        *left -= shown;
        if shown > 0 {
            one_block(page, entry, &origins, &block, shown);
        }
    }
    if hidden > 0 {
        put!(
            page,
            "<p class=\"note\">{}{hidden} further steps are not shown.</p>\n",
            entry_heading(report, entry)
        );
    }
}

fn one_block(page: &mut String, entry: &Entry, origins: &[&str], block: &Block, shown: usize) {
    let steps: Vec<(&Step, &str)> =
        block.steps.iter().filter_map(|&s| Some((entry.steps.get(s)?, *origins.get(s)?))).collect();
    let exchanges = steps.iter().filter(|(s, _)| s.role == Role::Communicates).count();
    let (first, last) = (Text(&block.names.0), Text(&block.names.1));
    let name = match block.count {
        _ if block.names.0.is_empty() && block.count > 1 => "A layer".to_owned(),
        _ if block.names.0.is_empty() => "Outside of layers".to_owned(),
        1 => format!("<bdi>{first}</bdi>"),
        _ => format!("<bdi>{first}</bdi> to <bdi>{last}</bdi>"),
    };
    let (class, times) = if block.count > 1 {
        (" folded", format!(" <strong class=\"count\">{} times</strong>", block.count))
    } else {
        ("", String::new())
    };
    put!(page, "<article class=\"block{class}\">\n<h4>{name}{times}</h4>\n<p class=\"parts\">");
    let (each, together) = if block.count > 1 { (" each", " together") } else { ("", "") };
    put!(
        page,
        "{}, {}{each} · {}{together}, {} of it communication</p>\n",
        counted(steps.len(), "step"),
        counted(exchanges, "collective"),
        Seconds(block.time.total()),
        Seconds(block.time.communication)
    );
    let mut previous = None;
    for (step, origin) in steps.into_iter().take(shown) {
        let here = scope(origin).unwrap_or_default();
        if previous != Some(here) {
            close(page, previous);
            put!(
                page,
                "<div class=\"part\"><p class=\"scope\"><bdi>{}</bdi></p><div class=\"chips\">\n",
                Text(here)
            );
            previous = Some(here);
        }
        chip(page, step);
    }
    close(page, previous);
    page.push_str("</article>\n");
}

fn close(page: &mut String, open: Option<&str>) {
    if open.is_some() {
        page.push_str("</div></div>\n");
    }
}

fn chip(page: &mut String, step: &Step) {
    let role = match step.role {
        Role::Stored => " stored",
        Role::Given => " given",
        Role::Communicates => " exchange",
        Role::Converts => " quiet",
        Role::Computes if step.time.total() < QUIET => " quiet",
        Role::Computes => "",
    };
    let sign = if step.role == Role::Communicates { "⇄ " } else { "" };
    let operation = Text(&step.operation);
    put!(
        page,
        "<details class=\"chip {}{role}\"><summary>{sign}{operation} <b>{}</b></summary><dl>",
        colour(&step.layout),
        step.layout
    );
    let mut line = |name: &str, value: &dyn std::fmt::Display| {
        put!(page, "<dt>{name}</dt><dd>{value}</dd>");
    };
    if !step.name.is_empty() {
        line("name", &format_args!("<bdi>{}</bdi>", Text(&step.name)));
    }
    line("type", &Text(&step.ty));
    line("bytes", &Bytes(step.bytes));
    if matches!(step.role, Role::Computes | Role::Converts | Role::Communicates) {
        let parts = [
            ("compute", step.time.compute),
            ("memory", step.time.memory),
            ("launch", step.time.launch),
            ("communication", step.time.communication),
        ];
        let parts: Vec<String> = parts
            .iter()
            .filter(|(_, seconds)| *seconds >= QUIET)
            .map(|(name, seconds)| format!("{name} {}", Seconds(*seconds)))
            .collect();
        line("time", &if parts.is_empty() { "none".to_owned() } else { parts.join(", ") });
    }
    if !step.origin.is_empty() {
        line("node", &format_args!("<bdi>{}</bdi>", Text(&step.origin)));
    }
    page.push_str("</dl></details>\n");
}
