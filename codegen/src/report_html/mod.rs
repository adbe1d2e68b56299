//! The plan as one page for browsers: where the time and the memory go, how every step is split, what ranks exchange.
//!
//! The page is one file without any reference to another: it opens from disk, and a policy in it forbids loading
//! anything. It can be read without scripts. Names come from models, which may be hostile, so every text is escaped and
//! cut, and whatever a model can make long is cut too, with the number of what was left out. Equal reports give equal
//! bytes.

mod bars;
mod fold;
mod graph;
mod tables;
mod text;

use std::fmt::Write;
use text::Text;
use tpshard_ir::wording::Seconds;
use tpshard_ir::{Layout, Mesh};

const STYLE: &str = include_str!("style.css");
const SCRIPT: &str = include_str!("script.js");
/// Nothing is loaded from anywhere; what is in the page may style and run.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'";

/// Everything the page says.
#[derive(Clone, Debug)]
pub struct Report {
    /// The model's file name.
    pub model: String,
    pub profile: String,
    pub mesh: Mesh,
    /// Weighted over the entries.
    pub seconds: f64,
    /// The same for one rank.
    pub seconds_alone: f64,
    /// What to make of the two, in a sentence.
    pub verdict: String,
    /// How far the plan may be above the optimum, as a share.
    pub gap: f64,
    pub warnings: Vec<String>,
    /// The plan beside plans for other numbers of ranks.
    pub scaling: Vec<Scaling>,
    /// Why numbers of ranks are missing there.
    pub scaling_note: Option<String>,
    pub memory: Memory,
    pub stored: Vec<Stored>,
    pub entries: Vec<Entry>,
}

/// Where seconds go.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Time {
    pub compute: f64,
    pub memory: f64,
    pub launch: f64,
    pub communication: f64,
}

impl Time {
    pub fn total(&self) -> f64 {
        self.compute + self.memory + self.launch + self.communication
    }
}

/// What a number of ranks takes.
#[derive(Clone, Debug)]
pub struct Scaling {
    pub ranks: usize,
    /// This is the plan of the folder.
    pub chosen: bool,
    /// The time of every entry, or why there is no plan.
    pub outcome: Result<Vec<Time>, String>,
}

/// What ranks hold.
#[derive(Clone, Debug)]
pub struct Memory {
    /// Rank 0 first.
    pub ranks: Vec<RankBytes>,
    pub budget: Option<u64>,
    /// What a device has.
    pub device: u64,
    /// The least any plan takes per rank.
    pub least: u64,
    /// Weights and state on one rank.
    pub alone: u64,
}

/// Bytes of one rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RankBytes {
    pub weights: u64,
    pub state: u64,
    pub activations: u64,
}

/// Stored tensors that are alike.
#[derive(Clone, Debug)]
pub struct Stored {
    pub name: String,
    pub is_state: bool,
    pub shape: String,
    pub layout: Layout,
    pub count: usize,
    /// Of all of them, on rank 0.
    pub bytes: u64,
}

/// One use of the model.
#[derive(Clone, Debug)]
pub struct Entry {
    pub name: String,
    /// The sizes that time is predicted for.
    pub dims: String,
    pub weight: f64,
    pub time: Time,
    pub steps: Vec<Step>,
    pub collectives: Vec<Collective>,
    pub outputs: Vec<(String, Layout)>,
}

/// What a step is, as far as it looks different.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// A weight or state.
    Stored,
    /// An input or a constant.
    Given,
    Computes,
    /// A change of layout without communication.
    Converts,
    Communicates,
}

/// One step of the program.
#[derive(Clone, Debug)]
pub struct Step {
    pub role: Role,
    pub operation: String,
    /// Of a weight, state or input; else empty.
    pub name: String,
    /// The node of the model it came from; empty if none.
    pub origin: String,
    pub ty: String,
    pub layout: Layout,
    /// Of the result on rank 0.
    pub bytes: u64,
    pub time: Time,
}

/// Collectives that are alike.
#[derive(Clone, Debug)]
pub struct Collective {
    pub kind: String,
    pub origin: String,
    /// How many ranks take part.
    pub ranks: usize,
    pub count: usize,
    /// Bytes per rank, of each.
    pub payload: u64,
    /// Of all of them.
    pub seconds: f64,
}

/// The page.
pub fn render(report: &Report) -> String {
    let mut page = String::new();
    head(&mut page, report);
    summary(&mut page, report);
    page.push_str("<main>\n");
    bars::times(&mut page, report);
    bars::memory(&mut page, report);
    graph::entries(&mut page, report);
    tables::collectives(&mut page, report);
    tables::stored(&mut page, report);
    tables::outputs(&mut page, report);
    page.push_str("</main>\n");
    foot(&mut page, report);
    page
}

/// Adds formatted text; a string takes everything.
macro_rules! put {
    ($page:expr, $($text:tt)*) => {{ let _ = write!($page, $($text)*); }};
}
use put;

fn head(page: &mut String, report: &Report) {
    let (model, ranks) = (Text(&report.model), ranks_text(report.mesh.ranks()));
    put!(
        page,
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"{POLICY}\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <meta name=\"referrer\" content=\"no-referrer\">\n\
         <title>{model} over {ranks}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n"
    );
}

fn summary(page: &mut String, report: &Report) {
    let ranks = ranks_text(report.mesh.ranks());
    put!(page, "<header>\n<h1><bdi>{}</bdi> <span>over {ranks}</span></h1>\n", Text(&report.model));
    put!(page, "<p class=\"verdict\">{}</p>\n", Text(&report.verdict));
    for warning in &report.warnings {
        put!(page, "<p class=\"warning\" role=\"note\"><strong>Warning:</strong> {}</p>\n", Text(warning));
    }
    page.push_str("<dl class=\"facts\">\n");
    let mut fact = |name: &str, value: String| {
        put!(page, "<div><dt>{name}</dt><dd>{value}</dd></div>\n");
    };
    fact("predicted time", Seconds(report.seconds).to_string());
    fact("one rank", Seconds(report.seconds_alone).to_string());
    fact("ranks", report.mesh.ranks().to_string());
    fact("mesh", report.mesh.to_string());
    fact("profile", Text(&report.profile).to_string());
    fact("gap to the optimum", format!("≤ {:.2} %", report.gap * 100.0));
    let collectives: usize = report.entries.iter().flat_map(|e| &e.collectives).map(|c| c.count).sum();
    fact("collectives", collectives.to_string());
    page.push_str("</dl>\n<nav aria-label=\"Sections\">\n");
    let sections = [
        ("time", "Time"),
        ("memory", "Memory"),
        ("graph", "Graph"),
        ("collectives", "Collectives"),
        ("stored", "Weights"),
    ];
    for (id, name) in sections {
        put!(page, "<a href=\"#{id}\">{name}</a>\n");
    }
    page.push_str("</nav>\n</header>\n");
}

fn foot(page: &mut String, report: &Report) {
    put!(
        page,
        "<footer>\n<h2>How times are predicted</h2>\n<p>Times are predictions for the profile <bdi>{}</bdi>, not \
         measurements. A step that computes takes as long as the slower of computing and moving its operands, and is \
         counted under that one; each kernel adds a launch. A collective takes the time of the fastest way the profile \
         knows for its size and number of ranks. Times are those of rank 0, which holds no less of anything than another \
         rank. Communication includes collecting the outputs on rank 0. Bytes of a collective are per rank: of an \
         all-reduce the tensor, of an all-gather and an all-to-all what is received, of a reduce-scatter what is \
         sent.</p>\n<p><code>plan.txt</code> beside this page says the same as text.</p>\n</footer>\n\
         <script>\n{SCRIPT}</script>\n</body>\n</html>\n",
        Text(&report.profile)
    );
}

/// `1 rank`, `2 ranks`.
fn counted(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

fn ranks_text(ranks: usize) -> String {
    counted(ranks, "rank")
}

/// Names an entry where there are several.
fn entry_heading(report: &Report, entry: &Entry) -> String {
    if report.entries.len() > 1 { format!("{}: ", Text(&entry.name)) } else { String::new() }
}

#[cfg(test)]
mod tests;
