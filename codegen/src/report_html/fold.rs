//! Folding a program's steps into layers, and layers that are alike into one.
//!
//! Most exporters name nodes after modules, `…/layers.3/mlp/…`: the path up to the first number is a layer. Steps
//! outside of all layers that run while one does, such as masks computed when first needed, are put in front of it.
//! Where names say nothing, stretches of steps that repeat themselves are layers.

use super::{Step, Time};
use std::collections::BTreeMap;
use tpshard_ir::wording::without_numbers;

/// Fewest steps of a stretch that counts as a layer, where names say nothing.
const SHORTEST: usize = 6;
/// How many later steps like the first one of a stretch are tried as its repetition.
const TRIED: usize = 64;

/// Steps that belong together, once for all repetitions.
#[derive(Debug, PartialEq)]
pub(super) struct Block {
    /// The first repetition's name and the last one's; empty for steps outside of layers.
    pub(super) names: (String, String),
    pub(super) count: usize,
    /// Of the first repetition.
    pub(super) steps: Vec<usize>,
    /// Of all repetitions.
    pub(super) time: Time,
}

/// Where every step comes from; states and what else has no origin stand where they are first used, in front of it.
pub(super) fn origins(steps: &[Step]) -> Vec<&str> {
    let mut next = "";
    let mut origins: Vec<&str> = steps.iter().map(|s| s.origin.as_str()).collect();
    for origin in origins.iter_mut().rev() {
        if origin.is_empty() { *origin = next } else { next = origin }
    }
    origins
}

/// The blocks of a program in the order they run.
pub(super) fn blocks(steps: &[Step]) -> Vec<Block> {
    let layers: Vec<Option<&str>> = origins(steps).into_iter().map(layer).collect();
    let kinds = kinds(steps);
    let parts = if layers.iter().any(Option::is_some) {
        by_name(&layers)
    } else {
        by_repetition(&kinds).into_iter().map(|steps| (String::new(), steps)).collect()
    };
    let mut blocks: Vec<(Block, Vec<usize>)> = Vec::new();
    for (name, members) in parts {
        let signature: Vec<usize> = members.iter().filter_map(|&s| kinds.get(s).copied()).collect();
        let mut time = Time::default();
        members.iter().filter_map(|&s| steps.get(s)).for_each(|s| add(&mut time, &s.time));
        match blocks.last_mut() {
            Some((last, known)) if *known == signature && signature.len() >= SHORTEST => {
                last.names.1 = name;
                last.count += 1;
                add(&mut last.time, &time);
            }
            _ => {
                let block = Block { names: (name.clone(), name), count: 1, steps: members, time };
                blocks.push((block, signature));
            }
        }
    }
    blocks.into_iter().map(|(block, _)| block).collect()
}

fn add(sum: &mut Time, time: &Time) {
    sum.compute += time.compute;
    sum.memory += time.memory;
    sum.launch += time.launch;
    sum.communication += time.communication;
}

/// A number for every kind of step; names that differ in numbers only are alike.
fn kinds(steps: &[Step]) -> Vec<usize> {
    let mut known = BTreeMap::new();
    let kind = |step: &Step| {
        let scope = scope(&step.origin).map(without_numbers);
        let key =
            (step.role, step.operation.clone(), scope, step.ty.clone(), step.layout.clone(), step.bytes);
        let next = known.len();
        *known.entry(key).or_insert(next)
    };
    steps.iter().map(kind).collect()
}

/// The path of a node down to its layer: `/model/layers.3` of `/model/layers.3/mlp/MatMul`.
fn layer(origin: &str) -> Option<&str> {
    let mut start = 0;
    while let Some(length) = origin.get(start..)?.find(['/', '.']) {
        let end = start + length;
        let token = origin.get(start..end)?;
        if !token.is_empty() && token.bytes().all(|b| b.is_ascii_digit()) {
            return origin.get(..end);
        }
        start = end + 1;
    }
    None
}

/// Where in its layer, or in the model, a node is: `mlp/gate` of `/model/layers.3/mlp/gate/MatMul`.
pub(super) fn scope(origin: &str) -> Option<&str> {
    let rest = origin.get(layer(origin).map_or(0, str::len)..)?;
    let (path, _) = rest.rsplit_once('/')?;
    Some(path.trim_matches(['/', '.'])).filter(|path| !path.is_empty())
}

/// Layers by name, with what runs between them.
fn by_name(layers: &[Option<&str>]) -> Vec<(String, Vec<usize>)> {
    let mut order: Vec<(&str, usize, usize)> = Vec::new();
    let mut place: BTreeMap<&str, usize> = BTreeMap::new();
    for (step, layer) in layers.iter().enumerate() {
        let Some(layer) = *layer else { continue };
        let at = *place.entry(layer).or_insert(order.len());
        match order.get_mut(at) {
            Some((_, _, last)) => *last = step,
            None => order.push((layer, step, step)),
        }
    }
    // Even places are what runs between layers, odd ones are layers.
    let mut parts: Vec<(String, Vec<usize>)> = vec![(String::new(), Vec::new())];
    for (name, _, _) in &order {
        parts.push(((*name).to_owned(), Vec::new()));
        parts.push((String::new(), Vec::new()));
    }
    for (step, layer) in layers.iter().enumerate() {
        let started = order.partition_point(|(_, first, _)| *first <= step);
        let part = match layer.and_then(|layer| place.get(layer)) {
            Some(at) => 2 * at + 1,
            // The layer that is running, if one is.
            None => match started.checked_sub(1).and_then(|at| order.get(at)) {
                Some((_, _, last)) if *last > step => 2 * (started - 1),
                _ => 2 * started,
            },
        };
        if let Some((_, members)) = parts.get_mut(part) {
            members.push(step);
        }
    }
    parts.retain(|(_, members)| !members.is_empty());
    parts
}

/// Stretches that repeat themselves, each repetition a part, and what is between them.
fn by_repetition(kinds: &[usize]) -> Vec<Vec<usize>> {
    let prefixes = Prefixes::new(kinds);
    let mut next_alike: Vec<usize> = vec![usize::MAX; kinds.len()];
    let mut latest: BTreeMap<usize, usize> = BTreeMap::new();
    for (step, &kind) in kinds.iter().enumerate().rev() {
        if let (Some(next), Some(later)) = (next_alike.get_mut(step), latest.insert(kind, step)) {
            *next = later;
        }
    }
    let (mut parts, mut rest, mut at) = (Vec::new(), Vec::new(), 0);
    while at < kinds.len() {
        let later = std::iter::successors(next_alike.get(at).copied(), |&n| next_alike.get(n).copied());
        let periods = later.take_while(|&n| n < kinds.len()).take(TRIED).map(|n| n - at);
        let found = periods
            .filter(|&period| period >= SHORTEST)
            .map(|period| (period, prefixes.repetitions(at, period)))
            .filter(|&(_, count)| count > 1)
            .max_by_key(|&(period, count)| (period * count, std::cmp::Reverse(period)));
        match found {
            Some((period, count)) => {
                if !rest.is_empty() {
                    parts.push(std::mem::take(&mut rest));
                }
                parts.extend((0..count).map(|n| (at + n * period..at + (n + 1) * period).collect()));
                at += period * count;
            }
            None => {
                rest.push(at);
                at += 1;
            }
        }
    }
    if !rest.is_empty() {
        parts.push(rest);
    }
    parts
}

/// Compares stretches by hashes of prefixes; a collision merely folds two unlike stretches that are then told apart.
struct Prefixes {
    hashes: Vec<u64>,
    powers: Vec<u64>,
}

const BASE: u64 = 0x9e37_79b9_7f4a_7c15;

impl Prefixes {
    fn new(kinds: &[usize]) -> Prefixes {
        let (mut hashes, mut powers) = (vec![0u64], vec![1u64]);
        for &kind in kinds {
            let (hash, power) = (hashes.last().copied().unwrap_or(0), powers.last().copied().unwrap_or(1));
            hashes.push(hash.wrapping_mul(BASE).wrapping_add(kind as u64 + 1));
            powers.push(power.wrapping_mul(BASE));
        }
        Prefixes { hashes, powers }
    }

    fn hash(&self, start: usize, length: usize) -> Option<u64> {
        let (before, after) = (self.hashes.get(start)?, self.hashes.get(start.checked_add(length)?)?);
        Some(after.wrapping_sub(before.wrapping_mul(*self.powers.get(length)?)))
    }

    /// How often the stretch of `period` steps at `start` stands there in a row.
    fn repetitions(&self, start: usize, period: usize) -> usize {
        let Some(first) = self.hash(start, period) else { return 0 };
        (0..).take_while(|n| self.hash(start + n * period, period) == Some(first)).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report_html::tests::step;

    fn program(origins: &[(&str, &str)]) -> Vec<Step> {
        origins.iter().map(|(operation, origin)| step(operation, origin)).collect()
    }

    #[test]
    fn names_tell_layers_and_places() {
        assert_eq!(layer("/model/layers.3/mlp/MatMul"), Some("/model/layers.3"));
        assert_eq!(layer("model.layers.12.mlp.weight"), Some("model.layers.12"));
        assert_eq!(layer("/layer1/layer1.0/conv1/Conv"), Some("/layer1/layer1.0"));
        for plain in ["", "node_linear_7", "/lm_head/MatMul_3", "a/b", "12"] {
            assert_eq!(layer(plain), None, "{plain}");
        }
        assert_eq!(scope("/model/layers.3/mlp/gate/MatMul"), Some("mlp/gate"));
        assert_eq!(scope("/lm_head/MatMul"), Some("lm_head"));
        assert_eq!(scope("MatMul"), None);
    }

    #[test]
    fn layers_fold_and_shared_steps_stand_before_them() {
        let operations = ["norm", "einsum", "mul", "einsum", "add", "silu"];
        let mut steps = program(&[("gather", "/embed/Gather")]);
        for layer in 0..3 {
            for (at, operation) in operations.iter().enumerate() {
                steps.push(step(operation, &format!("/layers.{layer}/mlp/{operation}_{at}")));
                if (layer, at) == (0, 2) {
                    steps.push(step("cos", "/rotary/Cos"));
                }
            }
        }
        steps.push(step("einsum", "/lm_head/MatMul"));
        let blocks = blocks(&steps);
        let shown: Vec<(&str, &str, usize, usize)> =
            blocks.iter().map(|b| (&*b.names.0, &*b.names.1, b.count, b.steps.len())).collect();
        assert_eq!(shown, [("", "", 1, 2), ("/layers.0", "/layers.2", 3, 6), ("", "", 1, 1)]);
        assert_eq!(blocks[0].steps, [0, 4]);
        let seconds: f64 = steps.iter().map(|s| s.time.total()).sum();
        let told: f64 = blocks.iter().map(|b| b.time.total()).sum();
        assert!((seconds - told).abs() < 1e-12);
    }

    #[test]
    fn what_has_no_origin_stands_where_it_is_used() {
        let steps = program(&[
            ("state", ""),
            ("append", "/layers.0/attn/Concat"),
            ("state", ""),
            ("add", "/end/Add"),
            ("x", ""),
        ]);
        assert_eq!(
            origins(&steps),
            ["/layers.0/attn/Concat", "/layers.0/attn/Concat", "/end/Add", "/end/Add", ""]
        );
        let shown: Vec<Vec<usize>> = blocks(&steps).into_iter().map(|b| b.steps).collect();
        assert_eq!(shown, [vec![0, 1], vec![2, 3, 4]]);
    }

    #[test]
    fn a_layer_that_differs_stands_alone() {
        let mut steps = Vec::new();
        for layer in 0..4 {
            for at in 0..8 {
                let operation = if (layer, at) == (2, 5) { "gelu" } else { "mul" };
                steps.push(step(operation, &format!("/h.{layer}/x{at}/Mul")));
            }
        }
        let counts: Vec<usize> = blocks(&steps).iter().map(|b| b.count).collect();
        assert_eq!(counts, [2, 1, 1]);
    }

    #[test]
    fn without_names_repetition_tells_layers() {
        let layer = ["norm", "einsum", "mul", "add", "silu", "einsum", "add"];
        let mut operations = vec!["gather", "add"];
        (0..5).for_each(|_| operations.extend(layer));
        operations.push("softmax");
        let steps: Vec<Step> = operations.iter().map(|o| step(o, "")).collect();
        let blocks = blocks(&steps);
        let shown: Vec<(usize, usize)> = blocks.iter().map(|b| (b.count, b.steps.len())).collect();
        // The add before the first layer and the one that ends each are alike, so the layers start one step early.
        assert_eq!(shown, [(1, 1), (5, 7), (1, 2)]);
        let covered: usize = shown.iter().map(|(count, steps)| count * steps).sum();
        assert_eq!(covered, steps.len());
    }

    #[test]
    fn many_equal_steps_take_no_time() {
        let steps: Vec<Step> = (0..100_000).map(|_| step("mul", "")).collect();
        let blocks = blocks(&steps);
        assert!(blocks.len() <= 2, "{}", blocks.len());
        assert_eq!(blocks.iter().map(|b| b.count * b.steps.len()).sum::<usize>(), steps.len());
    }
}
