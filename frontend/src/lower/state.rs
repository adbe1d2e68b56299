//! Key-value caches and the meaning of symbols.
//!
//! A decoder takes `past…` inputs and gives `present…` outputs, each of which is the input with new entries appended.
//! Such a pair is one object that stays where it is between steps. Pairs are found by name and confirmed by what the
//! graph does.

use super::context::Lowering;
use std::collections::BTreeMap;
use std::sync::Arc;
use tpshard_ir::{DType, Graph, Op, StatePair, ValueId};

/// What a symbolic size counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Independent examples.
    Batch,
    /// Positions fed in this step.
    Sequence,
    /// Positions held in state.
    Past,
    /// Positions of state and step together.
    Total,
}

impl Role {
    pub const ALL: [Role; 4] = [Role::Batch, Role::Sequence, Role::Past, Role::Total];

    /// The name used on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Role::Batch => "batch",
            Role::Sequence => "seq",
            Role::Past => "past",
            Role::Total => "total",
        }
    }
}

const PAST: &[&str] = &["past_key_values", "past"];
const PRESENT: &[&str] = &["present_key_values", "present"];

/// What is left of a state's name without the word that says which side it is; `None` if no such word is in it.
fn stem(name: &str, words: &[&str]) -> Option<String> {
    let word = words.iter().find(|word| name.contains(**word))?;
    let rest = name.replacen(word, "", 1);
    Some(rest.chars().filter(char::is_ascii_alphanumeric).collect())
}

impl Lowering<'_> {
    /// Pairs inputs with outputs by name.
    pub(super) fn find_state(&mut self) {
        let outputs: BTreeMap<String, &str> = self
            .model
            .graph
            .outputs
            .iter()
            .filter_map(|output| Some((stem(&output.name, PRESENT)?, output.name.as_str())))
            .collect();
        for input in &self.model.graph.inputs {
            if let Some(output) = stem(&input.name, PAST).and_then(|stem| outputs.get(&stem)) {
                self.state_inputs.insert(input.name.clone(), (*output).to_owned());
            }
        }
    }

    /// True if the value is an input that an output continues.
    pub(crate) fn is_state(&self, value: ValueId) -> bool {
        match &self.graph.node(value).op {
            Op::Input { name } => self.state_inputs.contains_key(&**name),
            _ => false,
        }
    }

    /// The pairs that the finished graph confirms: the output is the input with something appended.
    pub(super) fn state_pairs(&self, graph: &Graph) -> Vec<StatePair> {
        let mut pairs = Vec::new();
        for (input, name, _) in graph.inputs() {
            let Some(output) = self.state_inputs.get(&**name) else { continue };
            let Some(made) = graph.outputs.iter().find(|made| *made.name == **output) else { continue };
            let node = graph.node(made.value);
            if let Op::Append { axis } = node.op
                && node.args.first() == Some(&input)
            {
                pairs.push(StatePair { input: name.clone(), output: made.name.clone(), axis });
            }
        }
        pairs
    }
}

/// What the symbols of the inputs mean: state first, then token inputs, then names.
pub(super) fn roles(graph: &Graph, overrides: &BTreeMap<String, Role>) -> BTreeMap<Arc<str>, Role> {
    let mut roles: BTreeMap<Arc<str>, Role> = BTreeMap::new();
    let note = |roles: &mut BTreeMap<Arc<str>, Role>, symbol: Option<&Arc<str>>, role: Role| {
        if let Some(symbol) = symbol {
            roles.entry(symbol.clone()).or_insert(role);
        }
    };
    for (name, role) in overrides {
        if graph.symbols.contains_key(name.as_str()) {
            note(&mut roles, Some(&name.as_str().into()), *role);
        }
    }
    for pair in &graph.states {
        if let Some((_, _, ty)) = graph.inputs().find(|(_, name, _)| **name == pair.input) {
            note(&mut roles, ty.shape.get(pair.axis).and_then(|dim| dim.as_symbol()), Role::Past);
            if pair.axis > 0 && ty.rank() == 4 {
                note(&mut roles, ty.shape.first().and_then(|dim| dim.as_symbol()), Role::Batch);
            }
        }
    }
    // A decoder looks at all of what an encoder made in every step, so that is neither what is fed nor what grows.
    let of_encoder = |name: &str| !graph.states.is_empty() && name.to_ascii_lowercase().contains("encoder");
    for (_, _, ty) in graph.inputs() {
        if let [batch, sequence] = ty.shape.as_slice()
            && matches!(ty.dtype, DType::I64 | DType::I32)
        {
            note(&mut roles, batch.as_symbol(), Role::Batch);
            note(&mut roles, sequence.as_symbol().filter(|name| !of_encoder(name)), Role::Sequence);
        }
    }
    for name in graph.symbols.keys() {
        let lower = name.to_ascii_lowercase();
        let by_name =
            [("batch", Role::Batch), ("past", Role::Past), ("total", Role::Total), ("seq", Role::Sequence)];
        let found = by_name.iter().find(|(word, _)| lower.contains(word));
        if let Some((_, role)) = found.filter(|(_, role)| *role == Role::Batch || !of_encoder(name)) {
            note(&mut roles, Some(name), *role);
        }
    }
    let first = graph.inputs().next().and_then(|(_, _, ty)| ty.shape.first().cloned());
    note(&mut roles, first.as_ref().and_then(|dim| dim.as_symbol()), Role::Batch);
    roles
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_both_sides_have_one_stem() {
        for (past, present) in [
            ("past_key_values.0.key", "present.0.key"),
            ("past_key_values.11.decoder.value", "present.11.decoder.value"),
            ("past_3", "present_3"),
            ("past_key_self_2", "present_key_self_2"),
            ("past_key_values.1.key", "present_key_values.1.key"),
        ] {
            assert_eq!(stem(past, PAST), stem(present, PRESENT), "{past}");
        }
        assert_ne!(stem("past_key_values.0.key", PAST), stem("present.0.value", PRESENT));
        assert_eq!(stem("input_ids", PAST), None);
    }
}
