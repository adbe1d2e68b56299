//! From inputs to an entry and the values of its dims.

use super::SessionError;
use crate::state::StateInputs;
use std::collections::{BTreeMap, BTreeSet};
use tpshard_ir::dim::{Bindings, Dim};
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
                    let found = type_of(given).to_string();
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
    ) -> Result<Bindings, SessionError> {
        self.chosen(inputs)?;
        let is_state = |name: &str| state.is_some_and(|s| s.types.contains_key(name));
        if let Some(unknown) = inputs.keys().find(|name| is_state(name) || !known.contains(name.as_str())) {
            let known: Vec<&str> = known.iter().copied().filter(|n| !is_state(n)).collect();
            return Err(SessionError::UnknownInput { name: unknown.clone(), known: known.join(", ") });
        }
        let given = |name: &str| -> Option<Type> {
            if let Some(ty) = state.and_then(|s| s.types.get(name)) {
                return Some(ty.clone());
            }
            inputs.get(name).map(type_of)
        };
        Ok(bind_symbols(&self.graph, &given)?)
    }
}

fn type_of(tensor: &Tensor) -> Type {
    Type::new(tensor.dtype(), tensor.shape().iter().map(|&d| Dim::from(d)).collect())
}

/// The first entry whose cases, ranges and guards hold for the inputs.
///
/// # Errors
/// Why no entry takes them; an input that fits none is reported once.
pub(super) fn choose(
    signatures: &[Signature],
    inputs: &BTreeMap<String, Tensor>,
    state: Option<&StateInputs>,
) -> Result<(usize, Bindings), SessionError> {
    let known: BTreeSet<&str> =
        signatures.iter().flat_map(|s| s.graph.inputs().map(|(_, name, _)| &**name)).collect();
    let mut errors: Vec<(&str, SessionError)> = Vec::new();
    for (index, signature) in signatures.iter().enumerate() {
        match signature.bind(inputs, state, &known) {
            Ok(bindings) => return Ok((index, bindings)),
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
