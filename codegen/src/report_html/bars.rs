//! Time and memory as bars: stacked parts to one scale, each with its numbers in words beside it.

use super::text::Text;
use super::{RankBytes, Report, Time, put, ranks_text};
use std::fmt::Write;
use tpshard_ir::wording::{Bytes, Seconds};

/// Most bars of ranks; further ones are counted.
const MOST_BARS: usize = 64;
/// Up to so many ranks each has its bar.
const EACH: usize = 8;
/// From this share of a device on, memory is drawn to the device's scale.
const VISIBLE: f64 = 0.05;

/// A part of a bar: class, name, size.
type Part = (&'static str, &'static str, f64);

fn parts_of(time: &Time) -> [Part; 4] {
    [
        ("compute", "compute", time.compute),
        ("traffic", "memory", time.memory),
        ("launch", "launch", time.launch),
        ("communication", "communication", time.communication),
    ]
}

fn legend(page: &mut String, parts: &[Part]) {
    page.push_str("<ul class=\"legend\" aria-label=\"Legend\">");
    for (class, name, _) in parts {
        put!(page, "<li><i class=\"{class}\"></i>{name}</li>");
    }
    page.push_str("</ul>\n");
}

/// A bar of parts; `whole` is the length of the scale, `mark` a place on it.
fn bar(page: &mut String, parts: &[Part], whole: f64, mark: Option<f64>) {
    let percent = |part: f64| if whole > 0.0 { (part / whole * 100.0).clamp(0.0, 100.0) } else { 0.0 };
    page.push_str("<div class=\"bar\" aria-hidden=\"true\">");
    for (class, _, size) in parts.iter().filter(|(_, _, size)| *size > 0.0) {
        put!(page, "<i class=\"{class}\" style=\"width:{:.3}%\"></i>", percent(*size));
    }
    if let Some(mark) = mark {
        put!(page, "<b style=\"left:{:.3}%\"></b>", percent(mark));
    }
    page.push_str("</div>\n");
}

/// Where the time goes, for this and other numbers of ranks.
pub(super) fn times(page: &mut String, report: &Report) {
    page.push_str("<section id=\"time\">\n<h2>Time</h2>\n");
    legend(page, &parts_of(&Time::default()));
    for (index, entry) in report.entries.iter().enumerate() {
        let of = |scaling: &super::Scaling| scaling.outcome.as_ref().ok()?.get(index).copied();
        let longest = report.scaling.iter().filter_map(of).map(|t| t.total()).fold(0.0, f64::max);
        let alone = report.scaling.iter().find(|s| s.ranks == 1).and_then(of).map(|t| t.total());
        let weight = if report.entries.len() > 1 {
            format!(" <small>weight {}</small>", entry.weight)
        } else {
            String::new()
        };
        put!(
            page,
            "<h3><bdi>{}</bdi>{weight} <small>{}</small></h3>\n<ol class=\"bars\">\n",
            Text(&entry.name),
            Text(&entry.dims)
        );
        for scaling in &report.scaling {
            let class = if scaling.chosen { " class=\"chosen\"" } else { "" };
            let chosen = if scaling.chosen { " <em>this plan</em>" } else { "" };
            put!(page, "<li{class}><p class=\"label\"><span>{}{chosen}</span> ", ranks_text(scaling.ranks));
            match &scaling.outcome {
                Ok(times) => {
                    let time = times.get(index).copied().unwrap_or_default();
                    let against = match alone {
                        Some(alone) if scaling.ranks > 1 && time.total() > 0.0 => {
                            format!(" <small>{:.2}x as fast as one</small>", alone / time.total())
                        }
                        _ => String::new(),
                    };
                    put!(page, "<strong>{}</strong>{against}</p>\n", Seconds(time.total()));
                    bar(page, &parts_of(&time), longest, None);
                    put!(page, "<p class=\"parts\">");
                    let texts = parts_of(&time).map(|(_, name, size)| format!("{name} {}", Seconds(size)));
                    put!(page, "{}</p></li>\n", texts.join(" · "));
                }
                Err(why) => {
                    put!(page, "<small>{}</small></p></li>\n", Text(why));
                }
            }
        }
        page.push_str("</ol>\n");
    }
    if let Some(note) = &report.scaling_note {
        put!(page, "<p class=\"note\">{}</p>\n", Text(note));
    }
    page.push_str("</section>\n");
}

/// Ranks in a row that hold the same.
#[derive(Debug, PartialEq)]
struct Alike {
    first: usize,
    last: usize,
    bytes: RankBytes,
}

fn alike(ranks: &[RankBytes]) -> Vec<Alike> {
    let mut all: Vec<Alike> = Vec::new();
    for (rank, &bytes) in ranks.iter().enumerate() {
        match all.last_mut() {
            Some(last) if last.bytes == bytes && ranks.len() > EACH => last.last = rank,
            _ => all.push(Alike { first: rank, last: rank, bytes }),
        }
    }
    all
}

impl RankBytes {
    fn total(&self) -> u64 {
        self.weights.saturating_add(self.state).saturating_add(self.activations)
    }
}

/// What every rank holds.
pub(super) fn memory(page: &mut String, report: &Report) {
    let memory = &report.memory;
    let rows = alike(&memory.ranks);
    let most = memory.ranks.iter().map(RankBytes::total).max().unwrap_or(0);
    let scaled = most.max(memory.budget.unwrap_or(0));
    let to_device = scaled as f64 >= VISIBLE * memory.device as f64;
    let to_device = to_device && scaled <= memory.device;
    let whole = if to_device { memory.device } else { scaled };
    page.push_str("<section id=\"memory\">\n<h2>Memory per rank</h2>\n");
    let parts = |bytes: &RankBytes| -> [Part; 3] {
        [
            ("weights", "weights", bytes.weights as f64),
            ("state", "state", bytes.state as f64),
            ("activations", "activations", bytes.activations as f64),
        ]
    };
    legend(page, &parts(&RankBytes::default()));
    page.push_str("<ol class=\"bars\">\n");
    for row in rows.iter().take(MOST_BARS) {
        let Alike { first, last, bytes } = row;
        let name =
            if first == last { format!("rank {first}") } else { format!("ranks {first} to {last}, each") };
        put!(
            page,
            "<li><p class=\"label\"><span>{name}</span> <strong>{}</strong></p>\n",
            Bytes(bytes.total())
        );
        bar(page, &parts(bytes), whole as f64, memory.budget.map(|b| b as f64));
        put!(
            page,
            "<p class=\"parts\">weights {} · state {} · activations {}</p></li>\n",
            Bytes(bytes.weights),
            Bytes(bytes.state),
            Bytes(bytes.activations)
        );
    }
    page.push_str("</ol>\n");
    if let Some(more) = rows.len().checked_sub(MOST_BARS).filter(|more| *more > 0) {
        put!(page, "<p class=\"note\">and {more} more groups of ranks</p>\n");
    }
    let budget = match memory.budget {
        Some(budget) => {
            format!("The budget for weights and state, {}, is the line across the bars.", Bytes(budget))
        }
        None => "There is no budget: the fastest plan was wanted.".to_owned(),
    };
    let used = memory.ranks.first().map_or(0.0, |r| r.total() as f64 / memory.device.max(1) as f64 * 100.0);
    let scale = if to_device { " and full bars are that long" } else { "" };
    put!(
        page,
        "<p class=\"note\">{budget} A device has {}{scale}; rank 0 uses {used:.2} % of it. The least possible for \
         weights and state is {} per rank; one rank would hold {}.</p>\n</section>\n",
        Bytes(memory.device),
        Bytes(memory.least),
        Bytes(memory.alone)
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_ranks_stand_alone_and_many_alike_together() {
        let (large, small) = (RankBytes { weights: 2, ..Default::default() }, RankBytes::default());
        assert_eq!(alike(&[large, large, small]).len(), 3);
        let mut ranks = vec![large; 10];
        ranks.extend(vec![small; 1014]);
        let rows = alike(&ranks);
        assert_eq!(rows[0], Alike { first: 0, last: 9, bytes: large });
        assert_eq!(rows[1], Alike { first: 10, last: 1023, bytes: small });
    }

    #[test]
    fn bars_never_leave_their_scale() {
        let mut page = String::new();
        bar(&mut page, &[("weights", "weights", 3.0), ("state", "state", 0.0)], 2.0, Some(9.0));
        assert!(page.contains("width:100.000%") && page.contains("left:100.000%"), "{page}");
        assert!(!page.contains("state"), "{page}");
        bar(&mut page, &[("weights", "weights", 3.0)], 0.0, None);
        assert!(!page.contains("NaN") && !page.contains("inf"), "{page}");
    }
}
