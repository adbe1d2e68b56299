//! Models that choose between several graphs by a bool input: which graph is meant where.

use super::planning::{binding_help, import_graphs};
use crate::arguments::ModelArguments;
use crate::failure::{Failure, Kind, Outcome};
use std::path::Path;
use tpshard_frontend::Imported;
use tpshard_ir::{Case, Data, Graph};
use tpshard_runtime::io::NamedTensors;

/// The cases of a graph, as they are told: `use_cache_branch=true`.
pub(crate) fn text(cases: &[Case]) -> String {
    cases.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Of what there is one for each graph, that of the graph for these cases.
pub(crate) fn of<'a, T>(all: &'a [T], graph: impl Fn(&T) -> &Graph, cases: &[Case]) -> Option<&'a T> {
    all.iter().find(|one| graph(one).cases == *cases)
}

/// The graph that these inputs choose.
pub(crate) fn chosen<'a>(graphs: &'a [Imported], inputs: &NamedTensors) -> Outcome<&'a Imported> {
    let fits = |case: &Case| {
        let given = inputs.get(&*case.input).map(|tensor| tensor.data());
        matches!(given, Some(Data::Bool(values)) if *values == [case.value])
    };
    if let Some(found) = graphs.iter().find(|imported| imported.graph.cases.iter().all(fits)) {
        return Ok(found);
    }
    let cases = graphs.first().map(|imported| imported.graph.cases.as_slice()).unwrap_or_default();
    let names: Vec<String> = cases.iter().map(|case| format!("`{}` ({})", case.input, case.ty)).collect();
    let message = format!(
        "the inputs do not choose a graph of the model: {} is missing or not one bool\nhelp: give true or false",
        names.join(" or ")
    );
    Err(Failure::new(Kind::Usage, message))
}

/// Imports a model of one graph.
pub(crate) fn import_one(path: &Path, arguments: &ModelArguments) -> Outcome<Imported> {
    let mut graphs = import_graphs(path, arguments, false)?;
    match (graphs.pop(), graphs.len()) {
        (Some(only), 0) => Ok(only),
        (last, _) => {
            let cases = last.map(|imported| imported.graph.cases).unwrap_or_default();
            let help = binding_help(&cases);
            let message = format!("{}: chooses between several graphs\n{help}", path.display());
            Err(Failure::new(Kind::Usage, message))
        }
    }
}
