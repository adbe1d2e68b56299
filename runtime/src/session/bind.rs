//! From inputs to an entry and the values of its dims.

use super::SessionError;
use crate::state::StateInputs;
use std::collections::{BTreeMap, BTreeSet};
use tpshard_ir::border::{Present, adapted, changes, rounded};
use tpshard_ir::dim::Bindings;
use tpshard_ir::interp::{InterpError, bind_symbols};
use tpshard_ir::program::Entry;
use tpshard_ir::{Case, Data, Graph, Tensor, Type};

/// The logical inputs of an entry, with ranges and guards, as a graph of inputs only.
pub(super) struct Signature {
    name: String,
    graph: Graph,
}

impl Signature {
    pub(super) fn new(entry: &Entry) -> Signature {
        let mut graph = Graph::new(&entry.name);
        for port in &entry.inputs {
            graph.input(&port.name, port.ty.clone());
        }
        graph.guards.clone_from(&entry.graph.guards);
        graph.symbols.clone_from(&entry.ranges);
        graph.cases.clone_from(&entry.graph.cases);
        graph.borders.clone_from(&entry.graph.borders);
        Signature { name: entry.name.clone(), graph }
    }

    /// True if the entry has an input of this name.
    pub(super) fn takes(&self, name: &str) -> bool {
        self.graph.inputs().any(|(_, own, _)| **own == *name)
    }

    /// Refuses inputs that choose another entry, or none because they are missing or no bool.
    fn chosen(&self, inputs: &BTreeMap<String, Tensor>) -> Result<(), SessionError> {
        for Case { input, ty, value } in &self.graph.cases {
            let name = || input.to_string();
            let given = inputs.get(&**input);
            let given =
                given.ok_or_else(|| InterpError::MissingInput { name: name(), ty: ty.to_string() })?;
            match given.data() {
                Data::Bool(values) if given.shape().len() == ty.rank() && values.len() == 1 => {
                    if values.as_slice() != [*value] {
                        return Err(SessionError::Case { input: name(), value: !value });
                    }
                }
                _ => {
                    let found = given.ty().to_string();
                    return Err(
                        InterpError::InputType { name: name(), expected: ty.to_string(), found }.into()
                    );
                }
            }
        }
        Ok(())
    }

    /// `known` are the inputs of all entries: what this one does not read is ignored if another one does.
    fn bind(
        &self,
        inputs: &BTreeMap<String, Tensor>,
        state: Option<&StateInputs>,
        known: &BTreeSet<&str>,
    ) -> Result<(Bindings, Option<Adapted>), SessionError> {
        self.chosen(inputs)?;
        let is_state = |name: &str| state.is_some_and(|s| s.types.contains_key(name));
        if let Some(unknown) = inputs.keys().find(|name| is_state(name) || !known.contains(name.as_str())) {
            let known: Vec<&str> = known.iter().copied().filter(|n| !is_state(n)).collect();
            return Err(SessionError::UnknownInput { name: unknown.clone(), known: known.join(", ") });
        }
        let rounded = rounded(&self.graph, inputs);
        let inputs = rounded.as_ref().unwrap_or(inputs);
        let held = |name: &str| state.and_then(|state| state.types.get(name)).cloned();
        let mut changes =
            changes(&self.graph, &|name| held(name).or_else(|| inputs.get(name).map(Tensor::ty)));
        // State that stays with the ranks holds nothing but entries.
        changes.retain(|change| !is_state(&change.input));
        let adapted = adapted(inputs, &changes);
        let inputs = adapted.as_ref().map_or(inputs, |(inputs, _)| inputs);
        let given = |name: &str| -> Option<Type> { held(name).or_else(|| inputs.get(name).map(Tensor::ty)) };
        let bindings = bind_symbols(&self.graph, &given)?;
        Ok((bindings, adapted.or(rounded.map(|inputs| (inputs, Vec::new())))))
    }
}

/// The inputs as an entry takes them, and the outputs that are filled up afterwards.
pub(super) type Adapted = (BTreeMap<String, Tensor>, Vec<Present>);

/// The first entry whose cases, ranges and guards hold for the inputs, and what becomes of them, if they change.
///
/// # Errors
/// Why no entry takes them; an input that fits none is reported once.
pub(super) fn choose(
    signatures: &[Signature],
    inputs: &BTreeMap<String, Tensor>,
    state: Option<&StateInputs>,
) -> Result<(usize, Bindings, Option<Adapted>), SessionError> {
    let known: BTreeSet<&str> =
        signatures.iter().flat_map(|s| s.graph.inputs().map(|(_, name, _)| &**name)).collect();
    let mut errors: Vec<(&str, SessionError)> = Vec::new();
    for (index, signature) in signatures.iter().enumerate() {
        match signature.bind(inputs, state, &known) {
            Ok((bindings, adapted)) => return Ok((index, bindings, adapted)),
            Err(error) => errors.push((&signature.name, error)),
        }
    }
    // Entries for other values say nothing about what is wrong with these inputs.
    let other = |e: &SessionError| matches!(e, SessionError::Case { .. });
    if errors.iter().any(|(_, e)| !other(e)) {
        errors.retain(|(_, e)| !other(e));
    }
    let differ = |e: &SessionError| {
        matches!(e, SessionError::Inputs(InterpError::Range { .. } | InterpError::Guard { .. }))
    };
    match errors.as_slice() {
        [] => Err(SessionError::Program { what: "it has no entry".into() }),
        [_, _, ..] if errors.iter().all(|(_, e)| differ(e) || other(e)) => {
            let lines: Vec<String> =
                errors.iter().map(|(name, e)| format!("  entry `{name}`: {e}")).collect();
            Err(SessionError::NoEntry { reasons: lines.join("\n") })
        }
        _ => {
            let at = errors.iter().position(|(_, e)| !differ(e)).unwrap_or(0);
            Err(errors.swap_remove(at).1)
        }
    }
}
