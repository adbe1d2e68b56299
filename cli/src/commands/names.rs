//! The names by which people speak of a model: its tensors and nodes, patterns over them, and what was probably meant.

use crate::failure::{Failure, Kind};
use std::collections::BTreeMap;
use tpshard_frontend::{Imported, Model, Named, model};
use tpshard_ir::DType;

/// How many names a message suggests.
const SUGGESTED: usize = 3;
/// The longest name that a message shows whole.
const SHOWN: usize = 120;

/// The tensors and nodes of a model by name.
pub(crate) struct Names<'a> {
    pub(crate) tensors: &'a BTreeMap<String, Named>,
    /// Per node, or its first result if it has no name: its results.
    pub(crate) nodes: BTreeMap<&'a str, Vec<&'a str>>,
    imported: &'a Imported,
}

/// What a name is looked for among.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sort {
    Tensor,
    Node,
}

impl Sort {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Sort::Tensor => "tensor",
            Sort::Node => "node",
        }
    }
}

impl<'a> Names<'a> {
    pub(crate) fn new(imported: &'a Imported) -> Names<'a> {
        let mut nodes = BTreeMap::new();
        collect(&imported.model, &mut nodes);
        Names { tensors: &imported.report.values, nodes, imported }
    }

    /// The tensors that a pattern of this sort is about: of a node, its results.
    pub(crate) fn matching(&self, sort: Sort, pattern: &Pattern) -> Vec<&'a str> {
        match sort {
            Sort::Tensor => self.tensors.keys().map(String::as_str).filter(|n| pattern.matches(n)).collect(),
            Sort::Node => {
                let found = self.nodes.iter().filter(|(name, _)| pattern.matches(name));
                let mut results: Vec<&str> = found.flat_map(|(_, results)| results.iter().copied()).collect();
                results.sort_unstable();
                results.dedup();
                results
            }
        }
    }

    /// Element type and dims of a tensor as people write them; none if it is not computed.
    pub(crate) fn shape(&self, tensor: &str) -> Option<(DType, Vec<String>)> {
        match self.tensors.get(tensor)? {
            Named::Data(value) => {
                let ty = self.imported.graph.ty(*value);
                Some((ty.dtype, ty.shape.iter().map(ToString::to_string).collect()))
            }
            Named::Weight(expr) => Some((expr.dtype(), expr.shape().iter().map(usize::to_string).collect())),
            Named::Folded => None,
        }
    }

    /// A name that the model does not have.
    pub(crate) fn unknown(&self, place: &str, sort: Sort, pattern: &Pattern) -> Failure {
        let near = match sort {
            Sort::Tensor => near(&pattern.literal(), self.tensors.keys().map(String::as_str)),
            Sort::Node => near(&pattern.literal(), self.nodes.keys().copied()),
        };
        let what = if pattern.is_name() { "the model has no such" } else { "the pattern matches no" };
        let help = match near.as_slice() {
            [] => "a Netron view of the model shows its names".to_owned(),
            near => format!("near: {}", near.join(", ")),
        };
        let message = format!("{place}: {what} {} ({})\nhelp: {help}", sort.name(), shown(&pattern.text));
        Failure::new(Kind::Usage, message)
    }
}

fn collect<'a>(model: &'a Model, nodes: &mut BTreeMap<&'a str, Vec<&'a str>>) {
    let mut graphs: Vec<&model::Graph> = vec![&model.graph];
    while let Some(graph) = graphs.pop() {
        for node in &graph.nodes {
            let results: Vec<&str> =
                node.outputs.iter().map(String::as_str).filter(|o| !o.is_empty()).collect();
            let Some(first) = results.first() else { continue };
            let name = if node.name.is_empty() { first } else { node.name.as_str() };
            nodes.entry(name).or_default().extend(results);
            graphs.extend(node.subgraphs());
        }
    }
}

/// A name of a model, safe to print.
pub(crate) fn shown(name: &str) -> String {
    tpshard_frontend::error::quote(name)
}

/// The names most like `wanted`: those that share the longest beginning and end with it.
fn near<'n>(wanted: &str, names: impl Iterator<Item = &'n str>) -> Vec<String> {
    let score = |name: &str| {
        let begin = wanted.chars().zip(name.chars()).take_while(|(a, b)| a == b).count();
        let end = wanted.chars().rev().zip(name.chars().rev()).take_while(|(a, b)| a == b).count();
        let inside = if wanted.len() > 2 && name.contains(wanted) { wanted.chars().count() } else { 0 };
        (begin + end).max(inside)
    };
    let mut scored: Vec<(usize, &str)> = names.map(|name| (score(name), name)).collect();
    scored.retain(|(score, _)| 3 * score >= wanted.chars().count() && *score > 0);
    scored.sort_by(|a, b| b.0.cmp(&a.0).then(a.1.len().cmp(&b.1.len())).then(a.1.cmp(b.1)));
    scored.into_iter().take(SUGGESTED).map(|(_, name)| cut(name)).collect()
}

fn cut(name: &str) -> String {
    name.chars().take(SHOWN).flat_map(char::escape_debug).collect()
}

/// A name in which `*` stands for any characters, also none; `\*` and `\\` stand for themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pattern {
    pub(crate) text: String,
    /// What comes before, between and after the stars.
    parts: Vec<String>,
}

impl Pattern {
    pub(crate) fn new(text: &str) -> Pattern {
        let mut parts = vec![String::new()];
        let mut characters = text.chars().peekable();
        while let Some(c) = characters.next() {
            let escaped = c == '\\' && matches!(characters.peek(), Some('*' | '\\'));
            match (c, parts.last_mut()) {
                ('*', _) => parts.push(String::new()),
                (_, Some(part)) => part.push(if escaped { characters.next().unwrap_or(c) } else { c }),
                (_, None) => {}
            }
        }
        Pattern { text: text.to_owned(), parts }
    }

    /// A name as it is, without stars.
    pub(crate) fn name(text: &str) -> Pattern {
        Pattern { text: text.to_owned(), parts: vec![text.to_owned()] }
    }

    pub(crate) fn is_name(&self) -> bool {
        self.parts.len() == 1
    }

    fn literal(&self) -> String {
        self.parts.concat()
    }

    pub(crate) fn matches(&self, name: &str) -> bool {
        let [first, inner @ .., last] = self.parts.as_slice() else {
            return self.parts.iter().all(|part| part == name);
        };
        let Some(mut rest) = name.strip_prefix(first.as_str()) else { return false };
        // The earliest place is as good as any other, up to the end, which is fixed.
        for part in inner {
            let Some(at) = rest.find(part.as_str()) else { return false };
            rest = &rest[at + part.len()..];
        }
        rest.ends_with(last.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_stand_for_any_characters() {
        let matches = |pattern: &str, name: &str| Pattern::new(pattern).matches(name);
        assert!(matches("a", "a") && !matches("a", "ab") && !matches("a", ""));
        assert!(matches("*", "") && matches("*", "anything"));
        assert!(matches("layers.*.w", "layers.0.attention.w") && !matches("layers.*.w", "layers.w"));
        assert!(matches("*ab*ab", "abab") && !matches("*ab*ab", "ab") && matches("*ab*ab", "xabyabzab"));
        assert!(matches("a\\*b", "a*b") && !matches("a\\*b", "axb") && matches("a\\\\b", "a\\b"));
        assert!(!matches("ab*bc", "abc"));
        assert!(Pattern::name("a*").matches("a*") && !Pattern::name("a*").matches("ab"));
    }

    #[test]
    fn what_was_probably_meant_comes_first() {
        let names = ["layers.0.q.weight", "layers.0.k.weight", "embed", "layers.10.q.weight"];
        assert_eq!(near("layers.0.q.wieght", names.into_iter())[0], "layers.0.q.weight");
        assert!(near("zzz", names.into_iter()).is_empty());
    }
}
