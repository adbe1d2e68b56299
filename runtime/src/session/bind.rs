//! From inputs to an entry and the values of its dims.

use super::SessionError;
use crate::state::StateInputs;
use std::collections::BTreeMap;
use tpshard_ir::dim::{Bindings, Dim};
use tpshard_ir::interp::{InterpError, bind_symbols};
use tpshard_ir::program::Entry;
use tpshard_ir::{Graph, Tensor, Type};

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
        Signature { name: entry.name.clone(), graph }
    }

    fn bind(
        &self,
        inputs: &BTreeMap<String, Tensor>,
        state: Option<&StateInputs>,
    ) -> Result<Bindings, SessionError> {
        let is_state = |name: &str| state.is_some_and(|s| s.types.contains_key(name));
        if let Some(unknown) =
            inputs.keys().find(|name| is_state(name) || self.graph.inputs().all(|(_, n, _)| **n != ***name))
        {
            let known: Vec<&str> =
                self.graph.inputs().map(|(_, n, _)| &**n).filter(|n| !is_state(n)).collect();
            return Err(SessionError::UnknownInput { name: unknown.clone(), known: known.join(", ") });
        }
        let given = |name: &str| -> Option<Type> {
            if let Some(ty) = state.and_then(|s| s.types.get(name)) {
                return Some(ty.clone());
            }
            let tensor = inputs.get(name)?;
            Some(Type::new(tensor.dtype(), tensor.shape().iter().map(|&d| Dim::from(d)).collect()))
        };
        Ok(bind_symbols(&self.graph, &given)?)
    }
}

/// The first entry whose ranges and guards hold for the inputs.
///
/// # Errors
/// Why no entry takes them; an input that fits none is reported once.
pub(super) fn choose(
    signatures: &[Signature],
    inputs: &BTreeMap<String, Tensor>,
    state: Option<&StateInputs>,
) -> Result<(usize, Bindings), SessionError> {
    let mut errors: Vec<(&str, SessionError)> = Vec::new();
    for (index, signature) in signatures.iter().enumerate() {
        match signature.bind(inputs, state) {
            Ok(bindings) => return Ok((index, bindings)),
            Err(error) => errors.push((&signature.name, error)),
        }
    }
    let differ = |e: &SessionError| {
        matches!(e, SessionError::Inputs(InterpError::Range { .. } | InterpError::Guard { .. }))
    };
    match errors.as_slice() {
        [] => Err(SessionError::Program { what: "it has no entry".into() }),
        [_, _, ..] if errors.iter().all(|(_, e)| differ(e)) => {
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
