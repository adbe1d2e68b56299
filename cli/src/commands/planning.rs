//! From a model file to a checked plan: what `tpshard MODEL` and `tpshard plan` have in common.

use crate::arguments::{ModelArguments, PricingArguments};
use crate::failure::{Classify, Failure, Kind, Outcome};
use std::collections::BTreeMap;
use std::path::Path;
use tpshard_frontend::error::ErrorKind;
use tpshard_frontend::{ImportOptions, Imported, Limits, OutputRequest, Role, import};
use tpshard_ir::{Bindings, Data, Tensor};
use tpshard_passes::cost::Profile;
use tpshard_passes::extended::Extended;
use tpshard_passes::{Entry, MemoryGoal, Plan, PlanError, PlanOptions};

/// Imports a model as the flags say. Planning alone needs no weights.
pub(crate) fn import_model(path: &Path, arguments: &ModelArguments, need_data: bool) -> Outcome<Imported> {
    let limits = Limits { allow_missing_data: !need_data, ..Limits::default() };
    let mut options = ImportOptions { limits, ..ImportOptions::default() };
    for text in &arguments.bind {
        let (name, value) = binding(text)?;
        options.bindings.insert(name, value);
    }
    for text in &arguments.role {
        let (symbol, role) = pair(text, "--role", "s70=seq")?;
        let role = Role::ALL.into_iter().find(|r| r.name() == role).ok_or_else(|| {
            let known = Role::ALL.map(Role::name).join(", ");
            Failure::new(Kind::Usage, format!("--role {text}: no such role\nhelp: the roles are {known}"))
        })?;
        options.roles.insert(symbol.into(), role);
    }
    for text in &arguments.output {
        options.outputs.push(text.parse::<OutputRequest>().or_fail(Kind::Usage)?);
    }
    import(path, &options).map_err(|error| {
        let kind = match error.kind() {
            ErrorKind::Invalid | ErrorKind::Unsupported => Kind::Model,
            ErrorKind::Resource | ErrorKind::Io => Kind::Resource,
        };
        Failure::new(kind, error)
    })
}

fn pair<'a>(text: &'a str, flag: &str, example: &str) -> Outcome<(&'a str, &'a str)> {
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

/// The hardware profile of the flags: a built-in name or a file.
pub(crate) fn profile(name: &str) -> Outcome<Profile> {
    if let Ok(profile) = Profile::built_in(name) {
        return Ok(profile);
    }
    let path = Path::new(name);
    if !path.exists() {
        let known = Profile::names().join(", ");
        let message =
            format!("--profile {name}: no such profile or file\nhelp: built-in profiles are {known}");
        return Err(Failure::new(Kind::Usage, message));
    }
    let text = std::fs::read_to_string(path)
        .map_err(|e| Failure::new(Kind::Resource, format!("{}: {e}", path.display())))?;
    Profile::parse(&text).map_err(|e| Failure::new(Kind::Usage, format!("{}: {e}", path.display())))
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
    match number.parse::<f64>() {
        Ok(number) if scale > 0.0 && number > 0.0 => Ok(MemoryGoal::Bytes((number * scale) as u64)),
        _ => Err(Failure::new(
            Kind::Usage,
            format!("--memory {text}: not a size\nhelp: e.g. 80GiB, min or free"),
        )),
    }
}

/// The values of the model's symbols to plan for: what `--dim` says, and the defaults of the roles for the rest.
fn bindings(imported: &Imported, arguments: &PricingArguments) -> Outcome<Bindings> {
    let mut given: BTreeMap<String, i64> = BTreeMap::new();
    for item in arguments.dim.iter().flat_map(|d| d.split(',')).filter(|d| !d.is_empty()) {
        let (name, value) = pair(item, "--dim", "batch=1,seq=128")?;
        let value = value.parse::<i64>().ok().filter(|v| *v >= 0);
        let value = value.ok_or_else(|| {
            let help = "help: sizes are numbers from 0, e.g. --dim batch=1,seq=128";
            Failure::new(Kind::Usage, format!("--dim {item}: not a size\n{help}"))
        })?;
        given.insert(name.into(), value);
    }
    let graph = &imported.graph;
    let mut bound = Bindings::new();
    let mut used = Vec::new();
    for symbol in graph.symbols.keys() {
        let role = imported.report.roles.get(symbol);
        let by_input = graph.inputs().find_map(|(_, name, ty)| {
            let axis = ty.shape.iter().position(|d| d.as_symbol() == Some(symbol))?;
            let key = format!("{name}[{axis}]");
            given.contains_key(&key).then_some(key)
        });
        let by_role = role.map(|r| r.name().to_owned());
        let key = [Some(symbol.to_string()), by_input, by_role]
            .into_iter()
            .flatten()
            .find(|k| given.contains_key(k));
        let value = match key {
            Some(key) => {
                let value = given[&key];
                used.push(key);
                value
            }
            None => default_size(role, !graph.states.is_empty()),
        };
        bound.insert(symbol.clone(), value);
    }
    derived_by_guards(imported, &given, &mut used, &mut bound)?;
    if let Some(unknown) = given.keys().find(|name| !used.contains(name)) {
        let symbols: Vec<&str> = graph.symbols.keys().map(|s| s.as_ref()).collect();
        let roles: Vec<&str> = imported.report.roles.values().map(|r| r.name()).collect();
        let message = format!(
            "--dim {unknown}: the model has no such dim\nhelp: its symbols are {}; roles {}; or write INPUT[AXIS]",
            symbols.join(", "),
            roles.join(", ")
        );
        return Err(Failure::new(Kind::Usage, message));
    }
    Ok(bound)
}

/// Dims that the import replaced (`total = past + seq`) may be given as well, if they agree.
fn derived_by_guards(
    imported: &Imported,
    given: &BTreeMap<String, i64>,
    used: &mut Vec<String>,
    bound: &mut Bindings,
) -> Outcome<()> {
    for equality in &imported.report.equalities {
        let Some(&wanted) = given.get(equality.symbol.as_ref()) else { continue };
        used.push(equality.symbol.to_string());
        let value = equality.equals.eval(bound).or_fail(Kind::Usage)?;
        if value != wanted {
            let message = format!(
                "--dim {}={wanted}: the model makes it {} = {value} for the other dims\n\
                 help: leave it out, or give dims that agree",
                equality.symbol, equality.equals
            );
            return Err(Failure::new(Kind::Usage, message));
        }
    }
    Ok(())
}

/// Decode with a filled cache for models with state, one sequence of 128 otherwise.
fn default_size(role: Option<&Role>, has_state: bool) -> i64 {
    match role {
        Some(Role::Batch) => 1,
        Some(Role::Sequence) if has_state => 1,
        Some(Role::Past) => 2048,
        Some(Role::Sequence | Role::Total) | None => 128,
    }
}

/// Plans an imported model for `ranks`.
pub(crate) fn plan_model(imported: &Imported, ranks: usize, arguments: &PricingArguments) -> Outcome<Plan> {
    let mut options = PlanOptions::new(ranks, profile(&arguments.profile)?);
    options.memory = memory(&arguments.memory)?;
    let bindings = bindings(imported, arguments)?;
    options.entries = vec![Entry::new("main", bindings)];
    let mut extended = Extended::new(imported.graph.clone());
    tpshard_passes::canonical::canonicalise(&mut extended);
    tpshard_passes::plan(extended, &options).map_err(|error| {
        let kind = match &error {
            PlanError::Ranks { .. } | PlanError::NoEntry | PlanError::Range { .. } | PlanError::Pin(_) => {
                Kind::Usage
            }
            PlanError::Extract(_) | PlanError::Memory(_) => Kind::Resource,
            PlanError::NotLogical { .. }
            | PlanError::Build(_)
            | PlanError::Emit(_)
            | PlanError::Infer(_)
            | PlanError::Instantiate(_) => Kind::Internal,
        };
        Failure::new(kind, error)
    })
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
