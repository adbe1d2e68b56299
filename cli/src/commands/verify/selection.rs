//! Golden outputs are the model's own; a folder may have been built for parts of them (`logits[:, -1]`), or for what is
//! made of a part (`=argmax`, `=topk:K`). The same is made of the golden here, on plain tensors.
//!
//! Positions are not compared with positions: where two scores are as good as equal, either may come first. What is
//! compared are the reference's scores at the positions that came out, with those at its own.

use super::reference::LIMIT;
use crate::failure::{Classify, Kind, Outcome};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tpshard_frontend::{OutputRequest, Part, Selection};
use tpshard_ir::interp::{OpError, run_tensors};
use tpshard_ir::{Dim, Graph, Op, Output, Tensor, Type, ValueId};
use tpshard_runtime::io::NamedTensors;

type Made<T> = Result<T, String>;

/// The selections a folder was built with.
pub(super) struct Selections(Vec<OutputRequest>);

/// What came out and what should have, made comparable, and how.
pub(super) struct Comparable {
    pub(super) got: NamedTensors,
    pub(super) expected: NamedTensors,
    pub(super) notes: Vec<String>,
}

impl Selections {
    pub(super) fn parse(texts: &[String]) -> Outcome<Selections> {
        let requests = texts.iter().map(|text| text.parse::<OutputRequest>().or_fail(Kind::Mismatch));
        Ok(Selections(requests.collect::<Outcome<Vec<_>>>()?))
    }

    /// The model's outputs that the folder's are made of.
    pub(super) fn sources(&self) -> BTreeSet<&str> {
        self.0.iter().map(|request| request.name.as_str()).collect()
    }

    /// The request that makes the output `name`, and whether it makes positions of a `=topk`.
    fn request(&self, name: &str) -> Option<&OutputRequest> {
        self.0.iter().find(|request| match request.selection {
            Selection::TopK(_) => {
                name.strip_prefix(request.name.as_str()).is_some_and(|r| r == ".values" || r == ".indices")
            }
            Selection::Values | Selection::Sharded | Selection::ArgMax => request.name == name,
        })
    }

    /// Makes of the reference's outputs what the folder makes of the model's. What either side lacks of the outputs
    /// `built` stays away from it and is found missing by the comparison.
    pub(super) fn apply(&self, got: NamedTensors, reference: &NamedTensors, built: &[String]) -> Comparable {
        let mut made = Comparable { got: NamedTensors::new(), expected: NamedTensors::new(), notes: vec![] };
        for (name, tensor) in got {
            let pair = match self.request(&name) {
                Some(request) => chosen(request, &name, &tensor, reference, &mut made.notes),
                None => Ok(None),
            };
            let (own, expected) = match pair {
                Ok(Some((own, expected))) => (own, Some(expected)),
                Ok(None) => (tensor, reference.get(&name).cloned()),
                Err(what) => {
                    made.notes.push(format!("{name}: {what}"));
                    (tensor, None)
                }
            };
            if let Some(expected) = expected {
                made.expected.insert(name.clone(), expected);
            }
            made.got.insert(name, own);
        }
        for name in built.iter().filter(|name| !made.got.contains_key(*name)) {
            let source = self.request(name).map_or(name.as_str(), |request| request.name.as_str());
            if let Some(expected) = reference.get(name).or_else(|| reference.get(source)) {
                made.expected.insert(name.clone(), expected.clone());
            }
        }
        made
    }
}

/// What to compare for the output `name`; `None` if the reference has it as it is.
fn chosen(
    request: &OutputRequest,
    name: &str,
    got: &Tensor,
    reference: &NamedTensors,
    notes: &mut Vec<String>,
) -> Made<Option<(Tensor, Tensor)>> {
    let Some(whole) = reference.get(&request.name) else { return Ok(None) };
    let positions = matches!(request.selection, Selection::ArgMax) || name.ends_with(".indices");
    let recorded = whole.shape() == got.shape() && whole.dtype() == got.dtype();
    let part = match part_of(whole, &request.parts) {
        Ok(part) => part,
        // Recorded with the selection already made.
        Err(_) if recorded => return Ok(None),
        Err(what) => return Err(what),
    };
    match request.selection {
        Selection::Values | Selection::Sharded if part.shape() != got.shape() && recorded => Ok(None),
        Selection::Values | Selection::Sharded => Ok(Some((got.clone(), part))),
        Selection::ArgMax if whole.dtype().is_integer() && recorded => Ok(None),
        Selection::ArgMax => {
            let mut shape = got.shape().to_vec();
            shape.push(1);
            let own = got.clone().reshaped(shape).map_err(|e| e.to_string())?;
            notes.push(note(name));
            Ok(Some((at(&part, &own)?, top(&part, 1)?)))
        }
        Selection::TopK(_) if positions => {
            distinct(got)?;
            notes.push(note(name));
            Ok(Some((at(&part, got)?, top(&part, got.shape().last().copied().unwrap_or(0))?)))
        }
        Selection::TopK(count) => Ok(Some((got.clone(), top(&part, count as usize)?))),
    }
}

fn note(name: &str) -> String {
    format!(
        "{name}: compared are the reference's scores at these positions, so that ties may fall either way"
    )
}

/// Positions along the last axis are all different.
fn distinct(positions: &Tensor) -> Made<()> {
    let all = positions.as_slice::<i64>().map_err(|e| e.to_string())?;
    let row = positions.shape().last().copied().unwrap_or(0).max(1);
    for chosen in all.chunks(row) {
        let different: BTreeSet<&i64> = chosen.iter().collect();
        if different.len() != chosen.len() {
            return Err(format!("the same position came out twice: {chosen:?}"));
        }
    }
    Ok(())
}

/// A graph of concrete sizes, to be run at once.
struct Small {
    graph: Graph,
    inputs: BTreeMap<Arc<str>, Tensor>,
}

impl Small {
    fn new() -> Small {
        Small { graph: Graph::new("selection"), inputs: BTreeMap::new() }
    }

    fn input(&mut self, name: &str, tensor: &Tensor) -> ValueId {
        let shape = tensor.shape().iter().map(|&extent| Dim::from(extent)).collect();
        self.inputs.insert(name.into(), tensor.clone());
        self.graph.input(name, Type::new(tensor.dtype(), shape))
    }

    fn add(&mut self, op: Op, args: &[ValueId]) -> Made<ValueId> {
        self.graph.add(op, args).map_err(|e| e.to_string())
    }

    fn run(mut self, result: ValueId) -> Made<Tensor> {
        self.graph.outputs = vec![Output { name: "result".into(), value: result }];
        let no_weights = |_: &str| Err(OpError::Other("there are no weights".into()));
        let outputs =
            run_tensors(&self.graph, &self.inputs, &no_weights, LIMIT).map_err(|e| e.to_string())?;
        outputs.into_iter().next().map(|(_, tensor)| tensor).ok_or_else(|| "there is no result".into())
    }
}

/// `tensor[parts]`.
fn part_of(tensor: &Tensor, parts: &[Part]) -> Made<Tensor> {
    let mut small = Small::new();
    let mut value = small.input("x", tensor);
    let mut shape = tensor.shape().to_vec();
    let mut axis = 0;
    for part in parts {
        let extent = *shape.get(axis).ok_or_else(|| format!("has {} dims only", tensor.shape().len()))?;
        let size = i64::try_from(extent).map_err(|e| e.to_string())?;
        let place = |position: i64| if position < 0 { size.saturating_add(position) } else { position };
        let (start, end) = match *part {
            Part::At(position) => (place(position), place(position).saturating_add(1)),
            Part::Range { start, end } => (place(start.unwrap_or(0)), end.map_or(size, place)),
        };
        if !(0 <= start && start <= end && end <= size) {
            return Err(format!("{start}..{end} of an extent of {extent}"));
        }
        let (from, length) = (Dim::constant(start), Dim::constant(end - start));
        value = small.add(Op::Slice { axis, start: from, length, step: 1 }, &[value])?;
        match part {
            Part::At(_) => {
                shape.remove(axis);
                let shape = shape.iter().map(|&extent| Dim::from(extent)).collect();
                value = small.add(Op::Reshape { shape }, &[value])?;
            }
            Part::Range { .. } => {
                shape[axis] = usize::try_from(end - start).map_err(|e| e.to_string())?;
                axis += 1;
            }
        }
    }
    small.run(value)
}

/// The `count` largest along the last axis.
fn top(scores: &Tensor, count: usize) -> Made<Tensor> {
    let mut small = Small::new();
    let axis = scores.shape().len().checked_sub(1).ok_or("a scalar has no last axis")?;
    let x = small.input("x", scores);
    let best = small.add(Op::TopK { axis, k: Dim::from(count), largest: true }, &[x])?;
    let values = small.add(Op::GatherElements { axis }, &[x, best])?;
    small.run(values)
}

/// The scores at positions along the last axis.
pub(super) fn at(scores: &Tensor, positions: &Tensor) -> Made<Tensor> {
    at_axis(scores, positions, scores.shape().len().checked_sub(1).ok_or("a scalar has no last axis")?)
}

/// The scores at positions along an axis.
pub(super) fn at_axis(scores: &Tensor, positions: &Tensor, axis: usize) -> Made<Tensor> {
    let mut small = Small::new();
    let (x, i) = (small.input("x", scores), small.input("i", positions));
    let values = small.add(Op::GatherElements { axis }, &[x, i])?;
    small.run(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(shape: &[usize], values: &[f32]) -> Tensor {
        Tensor::from_vec(shape.to_vec(), values.to_vec()).unwrap()
    }

    fn named(name: &str, tensor: Tensor) -> NamedTensors {
        NamedTensors::from_iter([(name.to_owned(), tensor)])
    }

    fn selections(text: &str) -> Selections {
        Selections::parse(&[text.into()]).unwrap()
    }

    #[test]
    fn parts_are_taken_as_numpy_takes_them() {
        let x = tensor(&[2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let parts = |text: &str| text.parse::<OutputRequest>().unwrap().parts;
        assert_eq!(part_of(&x, &parts("x[:, -1]")).unwrap(), tensor(&[2], &[3.0, 6.0]));
        assert_eq!(part_of(&x, &parts("x[1, 1:]")).unwrap(), tensor(&[2], &[5.0, 6.0]));
        assert_eq!(part_of(&x, &parts("x[0:1, :-1]")).unwrap(), tensor(&[1, 2], &[1.0, 2.0]));
        for text in ["x[2]", "x[-3]", "x[:, 1:0]", "x[0, 0, 0]", "x[:, 0:4]"] {
            assert!(part_of(&x, &parts(text)).is_err(), "{text}");
        }
    }

    #[test]
    fn positions_are_compared_by_their_scores() {
        let x = named("x", tensor(&[2, 3], &[1.0, 3.0, 3.0, 4.0, 5.0, 6.0]));
        let of = |positions: [i64; 2]| named("x", Tensor::from_vec(vec![2], positions.to_vec()).unwrap());
        let argmax = selections("x=argmax");
        for (positions, scores) in [([1, 2], [3.0, 6.0]), ([2, 2], [3.0, 6.0]), ([0, 2], [1.0, 6.0])] {
            let made = argmax.apply(of(positions), &x, &[]);
            assert_eq!(made.got["x"], tensor(&[2, 1], &scores));
            assert_eq!(made.expected["x"], tensor(&[2, 1], &[3.0, 6.0]));
            assert_eq!(made.notes.len(), 1);
        }
        // A position that does not exist has no score, and is missing in what is expected.
        assert!(argmax.apply(of([1, 7]), &x, &[]).expected.is_empty());
        // Recorded positions are compared as they are.
        assert_eq!(argmax.apply(of([1, 2]), &of([1, 2]), &[]).expected, of([1, 2]));
    }

    #[test]
    fn the_largest_are_compared_by_value_and_may_not_repeat() {
        let x = named("x", tensor(&[1, 4], &[1.0, 4.0, 3.0, 2.0]));
        let selection = selections("x=topk:2");
        let got = |positions: [i64; 2]| {
            let mut got = named("x.values", tensor(&[1, 2], &[4.0, 3.0]));
            got.insert("x.indices".into(), Tensor::from_vec(vec![1, 2], positions.to_vec()).unwrap());
            got
        };
        let made = selection.apply(got([1, 2]), &x, &[]);
        assert_eq!(made.got, made.expected);
        assert_ne!(selection.apply(got([1, 3]), &x, &[]).got, made.expected);
        assert!(!selection.apply(got([1, 1]), &x, &[]).expected.contains_key("x.indices"));
        // What did not come out is missing, whatever it is made of.
        let built = ["x.values".to_owned(), "x.indices".to_owned()];
        let made = selection.apply(NamedTensors::new(), &x, &built);
        assert!(made.expected.keys().eq(&built));
    }
}
