//! The imported graphs that a folder has: one, or one for each case of the model.

use crate::failure::Outcome;
use crate::folder::Folder;
use std::collections::BTreeSet;
use tpshard_codegen::build::{MAX_GRAPHS, model_text};
use tpshard_ir::verify::verify;
use tpshard_ir::{Graph, Spmd};

/// The imported graphs with their texts: one, or one for each case. None if one of them cannot be read.
pub(super) fn read(folder: &Folder, findings: &mut Vec<String>) -> Outcome<Option<Vec<(Graph, String)>>> {
    let mut graphs: Vec<(Graph, String)> = Vec::new();
    let mut count = 1;
    while graphs.len() < count {
        let name = model_text(graphs.len());
        let text = folder.text(&name)?;
        let graph = tpshard_ir::text::parse_graph(&text).map_err(|e| e.to_string());
        match graph.and_then(|graph| Ok(verify(graph).map_err(|e| e.to_string())?.into_inner())) {
            // Every input that chooses has two values.
            Ok(graph) if graphs.is_empty() && graph.cases.len() >= usize::BITS as usize => {
                findings.push(format!("{name}: {} inputs choose between graphs", graph.cases.len()));
                return Ok(None);
            }
            Ok(graph) => {
                count = if graphs.is_empty() { (1 << graph.cases.len()).min(MAX_GRAPHS) } else { count };
                graphs.push((graph, text));
            }
            Err(error) => {
                findings.push(format!("{name}: {error}"));
                return Ok(None);
            }
        }
    }
    Ok(Some(graphs))
}

/// The graphs are for all values of the same inputs, and each of them has an entry.
pub(super) fn check_cases(
    graphs: &[(Graph, String)],
    entries: &[(String, Spmd)],
    findings: &mut Vec<String>,
) {
    let inputs =
        |graph: &Graph| graph.cases.iter().map(|case| (case.input.clone(), case.ty.clone())).collect();
    let first: Option<Vec<_>> = graphs.first().map(|(graph, _)| inputs(graph));
    let mut seen: BTreeSet<Vec<bool>> = BTreeSet::new();
    for (index, (graph, _)) in graphs.iter().enumerate() {
        let name = model_text(index);
        if Some(inputs(graph)) != first || !seen.insert(graph.cases.iter().map(|case| case.value).collect()) {
            findings.push(format!("{name}: is not for other values of the inputs that choose"));
        }
        if !entries.iter().any(|(_, program)| program.logical.cases == graph.cases) {
            findings.push(format!("{name}: has no entry"));
        }
    }
    if first.is_some_and(|inputs| 1 << inputs.len() != graphs.len()) {
        findings.push(format!("{}: the model has more graphs than {MAX_GRAPHS}", model_text(0)));
    }
}
