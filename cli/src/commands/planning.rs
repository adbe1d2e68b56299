//! From a model file to a checked plan: what `tpshard MODEL` and `tpshard plan` have in common.

use super::entries::entries_of_graphs;
use super::pins::{Wishes, annotation_help};
use super::precision;
use crate::arguments::{ModelArguments, PricingArguments};
use crate::failure::{Classify, Failure, Kind, Outcome};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use tpshard_frontend::error::ErrorKind;
use tpshard_frontend::{ImportOptions, Imported, Limits, OutputRequest, Role, import_cases};
use tpshard_ir::program::Determinism;
use tpshard_ir::{Case, Data, Tensor};
use tpshard_passes::cost::Profile;
use tpshard_passes::extended::Extended;
use tpshard_passes::extract::ExtractError;
use tpshard_passes::overlap::Overlap;
use tpshard_passes::{CasePlanning, Entry, MemoryGoal, Pin, Plan, PlanError, PlanOptions, fit, plan_cases};

/// Imports a model as the flags say: one graph, or one for each case of a model that chooses between several. Planning
/// alone needs no weights.
pub(crate) fn import_graphs(
    path: &Path,
    arguments: &ModelArguments,
    need_data: bool,
) -> Outcome<Vec<Imported>> {
    let nodes = arguments.max_nodes;
    let limits = Limits { nodes, allow_missing_data: !need_data, ..Limits::default() };
    let mut options = ImportOptions { limits, ..ImportOptions::default() };
    for text in &arguments.bind {
        let (name, value) = binding(text)?;
        if options.bindings.insert(name, value).is_some() {
            return Err(twice("--bind", text));
        }
    }
    for text in &arguments.role {
        let (symbol, role) = pair(text, "--role", "s70=seq")?;
        let role = Role::ALL.into_iter().find(|r| r.name() == role).ok_or_else(|| {
            let known = Role::ALL.map(Role::name).join(", ");
            Failure::new(Kind::Usage, format!("--role {text}: no such role\nhelp: the roles are {known}"))
        })?;
        if options.roles.insert(symbol.into(), role).is_some() {
            return Err(twice("--role", text));
        }
    }
    for text in &arguments.output {
        options.outputs.push(text.parse::<OutputRequest>().or_fail(Kind::Usage)?);
    }
    let mut graphs = import_cases(path, &options).map_err(|error| {
        let kind = match error.kind() {
            ErrorKind::Invalid | ErrorKind::Unsupported | ErrorKind::DataDependent => Kind::Model,
            ErrorKind::Resource | ErrorKind::Io => Kind::Resource,
            ErrorKind::Request => Kind::Usage,
        };
        Failure::new(kind, error)
    })?;
    if let Some(precision) = arguments.dtype {
        precision::convert(&mut graphs, precision)?;
    }
    Ok(graphs)
}

/// How to take one of several graphs.
pub(crate) fn binding_help(cases: &[Case]) -> String {
    let flags: Vec<String> = cases.iter().map(|case| format!("--bind {case}")).collect();
    format!("help: fix the inputs that choose, e.g. {}", flags.join(" "))
}

pub(super) fn twice(flag: &str, text: &str) -> Failure {
    let message = format!("{flag} {text}: a value for this is given already\nhelp: give one {flag} for each");
    Failure::new(Kind::Usage, message)
}

pub(super) fn pair<'a>(text: &'a str, flag: &str, example: &str) -> Outcome<(&'a str, &'a str)> {
    text.split_once('=').filter(|(name, value)| !name.is_empty() && !value.is_empty()).ok_or_else(|| {
        Failure::new(
            Kind::Usage,
            format!("{flag} {text}: not of the form NAME=VALUE\nhelp: e.g. {flag} {example}"),
        )
    })
}

/// `name=value` as a tensor: a bool, integer or float, or a comma-separated list of them. The importer converts it to
/// the input's type.
fn binding(text: &str) -> Outcome<(String, Tensor)> {
    let (name, value) = pair(text, "--bind", "use_cache=false")?;
    let parts: Vec<&str> = value.split(',').map(str::trim).collect();
    let data = if let Some(bools) = parse_all(&parts, |p| match p {
        "true" => Some(true),
        "false" => Some(false),
        _ => None,
    }) {
        Data::Bool(bools)
    } else if let Some(integers) = parse_all(&parts, |p| p.parse::<i64>().ok()) {
        Data::I64(integers)
    } else if let Some(floats) = parse_all(&parts, |p| p.parse::<f64>().ok()) {
        Data::F64(floats)
    } else {
        let message = format!(
            "--bind {text}: `{value}` is neither a bool nor a number nor a list of them\n\
             help: e.g. --bind use_cache=false or --bind position=3"
        );
        return Err(Failure::new(Kind::Usage, message));
    };
    let shape = if parts.len() == 1 { vec![] } else { vec![parts.len()] };
    Ok((name.into(), Tensor::new(shape, data).or_fail(Kind::Usage)?))
}

fn parse_all<T>(parts: &[&str], parse: impl Fn(&str) -> Option<T>) -> Option<Vec<T>> {
    parts.iter().map(|p| parse(p)).collect()
}

/// The text of the hardware profile of the flags: a built-in name or a file.
pub(crate) fn profile_text(name: &str) -> Outcome<String> {
    if let Some(text) = Profile::built_in_text(name) {
        return Ok(text.to_owned());
    }
    let path = Path::new(name);
    if !path.exists() {
        let known = Profile::names().join(", ");
        let message =
            format!("--profile {name}: no such profile or file\nhelp: built-in profiles are {known}");
        return Err(Failure::new(Kind::Usage, message));
    }
    std::fs::read_to_string(path)
        .map_err(|e| Failure::new(Kind::Resource, format!("{}: {e}", path.display())))
}

/// The hardware profile of the flags.
pub(crate) fn profile(name: &str) -> Outcome<Profile> {
    Profile::parse(&profile_text(name)?).map_err(|e| Failure::new(Kind::Usage, format!("{name}: {e}")))
}

/// `80GiB`, `500MB`, `1024`, `min`, `free`.
fn memory(text: &Option<String>) -> Outcome<MemoryGoal> {
    let Some(text) = text else { return Ok(MemoryGoal::Default) };
    match text.as_str() {
        "min" => return Ok(MemoryGoal::Least),
        "free" => return Ok(MemoryGoal::Free),
        _ => {}
    }
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let scale = match unit.trim() {
        "" | "B" => 1.0,
        "KB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "TB" => 1e12,
        "KiB" => 1024.0,
        "MiB" => 1024f64.powi(2),
        "GiB" => 1024f64.powi(3),
        "TiB" => 1024f64.powi(4),
        _ => 0.0,
    };
    let refuse = |what: &str| {
        let help = "help: a number is in bytes unless B, KB, MB, GB, TB, KiB, MiB, GiB or TiB follows: 80GiB, min or free";
        Err(Failure::new(Kind::Usage, format!("--memory {text}: {what}\n{help}")))
    };
    match number.parse::<f64>().map(|number| number * scale) {
        Ok(bytes) if scale == 1.0 && bytes.fract() != 0.0 => refuse("not a whole number of bytes"),
        Ok(bytes) if bytes >= u64::MAX as f64 => refuse("more than can be addressed"),
        Ok(bytes) if bytes >= 1.0 => Ok(MemoryGoal::Bytes(bytes as u64)),
        _ => refuse("not a size"),
    }
}

/// In how many pieces products are made that are summed.
fn overlap(arguments: &PricingArguments) -> Outcome<Overlap> {
    match (arguments.overlap, arguments.determinism) {
        (Overlap::Pieces(count), level) if level != Determinism::Fast => {
            let message = format!(
                "--overlap {count}: with --determinism {level} no products are made in pieces, since libraries sum in an \
                 order that depends on them\nhelp: --determinism fast, or leave --overlap out"
            );
            Err(Failure::new(Kind::Usage, message))
        }
        (overlap, _) => Ok(overlap),
    }
}

/// An imported model ready to be planned for any number of ranks.
pub(crate) struct Planning {
    /// At least one.
    graphs: Vec<GraphPlanning>,
    options: PlanOptions,
}

/// A graph of the model.
struct GraphPlanning {
    extended: Extended,
    entries: Vec<Entry>,
    /// By number of ranks.
    pins: BTreeMap<usize, Vec<Pin>>,
    roles: BTreeMap<Arc<str>, Role>,
}

impl GraphPlanning {
    fn pins(&self, ranks: usize) -> Vec<Pin> {
        self.pins.get(&ranks).cloned().unwrap_or_default()
    }
}

impl Planning {
    /// Reads the flags, for these numbers of ranks, and brings the graphs to the planner's form.
    pub(crate) fn new(
        graphs: &[Imported],
        arguments: &PricingArguments,
        ranks: &[usize],
    ) -> Outcome<Planning> {
        let first = graphs.first().ok_or_else(|| Failure::new(Kind::Internal, "a model without a graph"))?;
        let wishes = Wishes::read(arguments, first)?;
        let mut options = PlanOptions::new(1, profile(&arguments.profile)?);
        options.memory = memory(&arguments.memory)?;
        options.split_all = arguments.split_all;
        options.determinism = arguments.determinism;
        options.overlap = overlap(arguments)?;
        let entries = entries_of_graphs(graphs, &arguments.dim)?;
        let extended: Vec<Extended> = graphs.iter().map(canonical).collect();
        let pins = wishes.pins(graphs, &extended, ranks)?;
        let parts = graphs.iter().zip(extended).zip(entries).zip(pins);
        let graph = |(((imported, extended), entries), pins): (((&Imported, _), _), _)| {
            let roles = imported.report.roles.clone();
            GraphPlanning { extended, entries, pins, roles }
        };
        Ok(Planning { graphs: parts.map(graph).collect(), options })
    }

    /// What is asked of the planner for `ranks`, in a model of one graph.
    pub(crate) fn options(&self, ranks: usize) -> PlanOptions {
        let first = self.graphs.first();
        let pins = first.map(|graph| graph.pins(ranks)).unwrap_or_default();
        let entries = first.map(|graph| graph.entries.clone()).unwrap_or_default();
        PlanOptions { ranks, pins, entries, ..self.options.clone() }
    }

    /// The canonical graph of a model of one; the first of several.
    pub(crate) fn extended(&self) -> Outcome<&Extended> {
        let first = self.graphs.first().map(|graph| &graph.extended);
        first.ok_or_else(|| Failure::new(Kind::Internal, "a model without a graph"))
    }

    /// The plan for `ranks`.
    pub(crate) fn plan(&self, ranks: usize) -> Result<Plan, PlanError> {
        self.plan_with(ranks, self.options.clone())
    }

    /// As [`Planning::plan`], with less search: for comparisons only.
    pub(crate) fn sketch(&self, ranks: usize) -> Result<Plan, PlanError> {
        let limits = tpshard_passes::extract::Limits { states: 256, labels: 256 };
        self.plan_with(ranks, PlanOptions { limits, ..self.options.clone() })
    }

    fn plan_with(&self, ranks: usize, options: PlanOptions) -> Result<Plan, PlanError> {
        let case = |graph: &GraphPlanning| CasePlanning {
            extended: graph.extended.clone(),
            entries: graph.entries.clone(),
            pins: graph.pins(ranks),
        };
        let cases: Vec<CasePlanning> = self.graphs.iter().map(case).collect();
        plan_cases(&cases, &PlanOptions { ranks, ..options })
    }

    /// What a device of the profile has.
    pub(crate) fn device_bytes(&self) -> u64 {
        self.options.profile.memory_bytes as u64
    }

    /// Why there is no plan for `ranks`, with what would fit if memory is too small.
    pub(crate) fn failure(&self, ranks: usize, error: &PlanError) -> Failure {
        let kind = match error {
            PlanError::Ranks { .. }
            | PlanError::NoEntry
            | PlanError::Range { .. }
            | PlanError::Pin(_)
            | PlanError::Kept(_) => Kind::Usage,
            PlanError::Extract(_) | PlanError::Memory(_) => Kind::Resource,
            PlanError::NotLogical { .. }
            | PlanError::Build(_)
            | PlanError::Emit(_)
            | PlanError::Infer(_)
            | PlanError::Instantiate(_) => Kind::Internal,
        };
        match (error, self.options.memory) {
            (PlanError::Extract(ExtractError::Budget { .. }), MemoryGoal::Bytes(budget)) => {
                Failure::new(kind, format!("{error}\n{}", self.advice(ranks, budget)))
            }
            (PlanError::Pin(_), _) => {
                let text = error.to_string();
                Failure::new(kind, format!("{text}{}", annotation_help(&[&text])))
            }
            _ => Failure::new(kind, error),
        }
    }

    /// What fits a budget that `ranks` do not keep.
    fn advice(&self, ranks: usize, budget: u64) -> String {
        let [graph] = self.graphs.as_slice() else {
            return "help: take more ranks, or shorter sequences (--dim)".to_owned();
        };
        let options = self.options(ranks);
        let mut found = Vec::new();
        if let Ok(Some(ranks)) = fit::smallest_ranks(&graph.extended, &options, budget) {
            found.push(format!("{ranks} ranks are the fewest that fit"));
        }
        for wanted in [Role::Past, Role::Sequence, Role::Batch] {
            for (symbol, _) in graph.roles.iter().filter(|(_, role)| **role == wanted) {
                if let Ok(Some(size)) = fit::largest_size(&graph.extended, &options, symbol, budget) {
                    found.push(format!("with {ranks} ranks {symbol} up to {size} fits"));
                }
            }
        }
        match found.as_slice() {
            [] => "no number of ranks and no shorter sequence fits this budget".to_owned(),
            found => format!("what would fit: {}", found.join("; ")),
        }
    }
}

/// The graph in the planner's form.
fn canonical(imported: &Imported) -> Extended {
    let mut extended = Extended::new(imported.graph.clone());
    tpshard_passes::canonical::canonicalise(&mut extended);
    extended
}

/// A number of ranks that can be asked for.
pub(crate) fn check_ranks(ranks: usize) -> Outcome<()> {
    if (1..=tpshard_passes::MAX_RANKS).contains(&ranks) {
        return Ok(());
    }
    let most = tpshard_passes::MAX_RANKS;
    let message = format!("{ranks} ranks are not possible\nhelp: choose from 1 to {most}");
    Err(Failure::new(Kind::Usage, message))
}

/// Lists findings of the checker, a line each.
pub(crate) fn findings_text(findings: &[impl std::fmt::Display]) -> String {
    findings.iter().map(|f| format!("  {f}")).collect::<Vec<_>>().join("\n")
}
