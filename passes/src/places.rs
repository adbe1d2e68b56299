//! Where the values of a model are in a canonical graph: what pins of a tensor, a weight or a view of either fix.
//!
//! Canonicalisation replaces values. A value that it rewrote is found through the equations, closed under congruence; one
//! that only exists in another shape is followed through reshapes and transposes; a weight is looked for inside the
//! expressions of the weights that are left. On each of these ways the split dim is followed as well, which works as
//! long as it stays a dim, or the leading part of one: rows of `[heads * width]` are heads of `[heads, width]`.

use crate::extended::Extended;
use rustc_hash::FxHashMap;
use std::collections::{BTreeMap, BTreeSet};
use tpshard_ir::spmd::Equation;
use tpshard_ir::weight::{WeightExpr, WeightKind};
use tpshard_ir::{Dim, Graph, Op, ValueId};

/// Most reshapes and transposes between a value and what the plan computes in its stead.
const MAX_VIEWS: usize = 8;

/// A value of the canonical graph and the dim of it that a split dim became; none for none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub value: ValueId,
    pub dim: Option<usize>,
}

/// Why something cannot be found.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlaceError {
    #[error("no value of the plan equals it: it was folded into others")]
    Folded,
    #[error("dim {dim} is merged with others in the form that the plan uses, {shape}")]
    Merged { dim: usize, shape: String },
    #[error("the plan joins it with others along dim {dim}")]
    Joined { dim: usize },
}

/// For each value, the first value that is known to equal it.
pub fn equal_values(graph: &Graph, equations: &[Equation]) -> Vec<ValueId> {
    let mut parent: Vec<ValueId> = graph.values().map(|(id, _)| id).collect();
    for equation in equations {
        unite(&mut parent, equation.left, equation.right);
    }
    loop {
        let mut changed = false;
        let mut known: FxHashMap<(&Op, Vec<ValueId>), ValueId> = FxHashMap::default();
        for (value, node) in graph.values() {
            let args = node.args.iter().map(|&a| root(&mut parent, a)).collect();
            match known.get(&(&node.op, args)) {
                Some(&first) => changed |= unite(&mut parent, first, value),
                None => {
                    let args = node.args.iter().map(|&a| root(&mut parent, a)).collect();
                    known.insert((&node.op, args), value);
                }
            }
        }
        if !changed {
            return graph.values().map(|(id, _)| root(&mut parent, id)).collect();
        }
    }
}

fn root(parent: &mut [ValueId], value: ValueId) -> ValueId {
    let mut at = value;
    while parent[at.index()] != at {
        parent[at.index()] = parent[parent[at.index()].index()];
        at = parent[at.index()];
    }
    at
}

/// True if the two were not known to be equal.
fn unite(parent: &mut [ValueId], a: ValueId, b: ValueId) -> bool {
    let (a, b) = (root(parent, a), root(parent, b));
    parent[a.max(b).index()] = a.min(b);
    a != b
}

/// What plans may compute, ascending: what the outputs depend on in any of the ways that equations offer.
fn reachable_values(extended: &Extended) -> Vec<ValueId> {
    let graph = &extended.graph;
    let mut equal: BTreeMap<ValueId, Vec<ValueId>> = BTreeMap::new();
    for equation in &extended.equations {
        equal.entry(equation.left).or_default().push(equation.right);
        equal.entry(equation.right).or_default().push(equation.left);
    }
    let mut seen = vec![false; graph.len()];
    let mut open: Vec<ValueId> = extended.outputs.iter().map(|output| output.value).collect();
    while let Some(value) = open.pop() {
        if !std::mem::replace(&mut seen[value.index()], true) {
            open.extend(&graph.node(value).args);
            open.extend(equal.get(&value).into_iter().flatten());
        }
    }
    graph.values().map(|(id, _)| id).filter(|id| seen[id.index()]).collect()
}

/// A canonical graph, prepared for looking values up.
pub struct Places<'a> {
    graph: &'a Graph,
    first: Vec<ValueId>,
    /// Per first value: the equal ones that plans may compute.
    reachable: BTreeMap<ValueId, Vec<ValueId>>,
    /// First values of what the canonical form computes.
    canonical: BTreeSet<ValueId>,
    /// Per first value: what looks at it or is looked at by it, and through which value.
    views: BTreeMap<ValueId, Vec<View>>,
    weights: Vec<(ValueId, &'a WeightExpr)>,
}

struct View {
    /// The node that reshapes or transposes.
    node: ValueId,
    to: ValueId,
    forward: bool,
}

impl<'a> Places<'a> {
    pub fn new(extended: &'a Extended) -> Places<'a> {
        let graph = &extended.graph;
        let first = equal_values(graph, &extended.equations);
        let mut reachable: BTreeMap<ValueId, Vec<ValueId>> = BTreeMap::new();
        let mut weights = Vec::new();
        for value in reachable_values(extended) {
            reachable.entry(first[value.index()]).or_default().push(value);
            if let Op::Weight(expression) = &graph.node(value).op {
                weights.push((value, expression));
            }
        }
        let canonical = extended.live().into_iter().map(|value| first[value.index()]).collect();
        let mut views: BTreeMap<ValueId, Vec<View>> = BTreeMap::new();
        for (node, operation) in graph.values() {
            let (Op::Reshape { .. } | Op::Transpose { .. }, [arg]) =
                (&operation.op, operation.args.as_slice())
            else {
                continue;
            };
            let (from, to) = (first[arg.index()], first[node.index()]);
            views.entry(from).or_default().push(View { node, to, forward: true });
            views.entry(to).or_default().push(View { node, to: from, forward: false });
        }
        Places { graph, first, reachable, canonical, views, weights }
    }

    /// What holds `value`, and where its `dim` is there: the values that equal it, and if the canonical form has none
    /// of them, those that are the nearest view of it there.
    ///
    /// # Errors
    /// Nothing does, or the dim is no dim there.
    pub fn of_value(&self, value: ValueId, dim: Option<usize>) -> Result<Vec<Place>, PlaceError> {
        let Some(&start) = self.first.get(value.index()) else { return Err(PlaceError::Folded) };
        let all = |at: ValueId, dim| {
            let values = self.reachable.get(&at).into_iter().flatten();
            values.map(move |&value| Place { value, dim })
        };
        let mut error = PlaceError::Folded;
        let mut seen = BTreeSet::from([start]);
        let mut ring = vec![(start, dim)];
        for _ in 0..=MAX_VIEWS {
            // Of several equally near forms all hold the value; the first is enough.
            if let Some(&(at, there)) = ring.iter().find(|(at, _)| self.canonical.contains(at)) {
                let own = all(start, dim).filter(|_| at != start);
                return Ok(own.chain(all(at, there)).collect());
            }
            let mut next = Vec::new();
            for (at, dim) in ring {
                for view in self.views.get(&at).into_iter().flatten() {
                    match self.through(view, dim) {
                        Ok(dim) if seen.insert(view.to) => next.push((view.to, dim)),
                        Ok(_) => {}
                        Err(found) => error = found,
                    }
                }
            }
            ring = next;
        }
        Err(error)
    }

    fn through(&self, view: &View, dim: Option<usize>) -> Result<Option<usize>, PlaceError> {
        let Some(dim) = dim else { return Ok(None) };
        let node = self.graph.node(view.node);
        let arg = node.args.first().map_or(&[][..], |&arg| &self.graph.ty(arg).shape);
        let found = match (&node.op, view.forward) {
            (Op::Transpose { perm }, true) => perm.iter().position(|&p| p == dim),
            (Op::Transpose { perm }, false) => perm.get(dim).copied(),
            (_, true) => reshaped(arg, &node.ty.shape, dim),
            (_, false) => reshaped(&node.ty.shape, arg, dim),
        };
        let shape = || shape_text(if view.forward { &node.ty.shape } else { arg });
        found.map(Some).ok_or_else(|| PlaceError::Merged { dim, shape: shape() })
    }

    /// The weights that hold `weight` or a part of it, and where its `dim` is there.
    ///
    /// # Errors
    /// None does, or the dim is no dim of one that does.
    pub fn of_weight(&self, weight: &WeightExpr, dim: Option<usize>) -> Result<Vec<Place>, PlaceError> {
        let mut found = Vec::new();
        for &(value, expression) in &self.weights {
            if let Some(dim) = inside(expression, weight, dim)? {
                found.push(Place { value, dim });
            }
        }
        if found.is_empty() { Err(PlaceError::Folded) } else { Ok(found) }
    }
}

fn shape_text(shape: &[Dim]) -> String {
    let dims: Vec<String> = shape.iter().map(Dim::to_string).collect();
    format!("[{}]", dims.join(", "))
}

/// Where `dim` of `part` is in `whole`; none if `part` is not in it. Recurses as deep as expressions may be.
fn inside(
    whole: &WeightExpr,
    part: &WeightExpr,
    dim: Option<usize>,
) -> Result<Option<Option<usize>>, PlaceError> {
    if whole == part {
        return Ok(Some(dim));
    }
    if let (WeightKind::Initializer { name }, WeightKind::Initializer { name: own }) =
        (whole.kind(), part.kind())
        && name.trim_end_matches('\'') == own
        && let Some(shape) = unpacked(part, whole)
    {
        let Some(dim) = dim else { return Ok(Some(None)) };
        let to = sizes(whole.shape());
        let merged = || PlaceError::Merged { dim, shape: shape_text(&to) };
        return reshaped(&sizes(&shape), &to, dim).map(|dim| Some(Some(dim))).ok_or_else(merged);
    }
    let mut found: Option<Option<usize>> = None;
    for source in whole.kind().sources() {
        let Some(inner) = inside(source, part, dim)? else { continue };
        let outer = match inner {
            None => None,
            Some(at) => Some(outwards(whole, source, at)?),
        };
        match found {
            Some(other) if other != outer => return Err(PlaceError::Joined { dim: outer.unwrap_or(0) }),
            _ => found = Some(outer),
        }
    }
    Ok(found)
}

fn sizes(shape: &[usize]) -> Vec<Dim> {
    shape.iter().map(|&size| Dim::from(size)).collect()
}

/// The shape of `packed` in elements of `whole`, which the importer made of the same bytes: quantised weights are stored
/// in bytes along the last dim. None if they are not as many bits.
fn unpacked(packed: &WeightExpr, whole: &WeightExpr) -> Option<Vec<usize>> {
    let mut shape = packed.shape().to_vec();
    let last = shape.last_mut()?;
    let bits = last.checked_mul(packed.dtype().bits())?;
    (bits % whole.dtype().bits() == 0).then_some(())?;
    *last = bits / whole.dtype().bits();
    let count = |shape: &[usize]| shape.iter().try_fold(1usize, |n, &size| n.checked_mul(size));
    (count(&shape)? == count(whole.shape())?).then_some(shape)
}

/// Where dim `at` of `source`, which `whole` is made of, is in `whole`.
fn outwards(whole: &WeightExpr, source: &WeightExpr, at: usize) -> Result<usize, PlaceError> {
    match whole.kind() {
        WeightKind::Concat { sources, axis } if *axis == at && sources.len() > 1 => {
            Err(PlaceError::Joined { dim: at })
        }
        WeightKind::Transpose { perm, .. } => Ok(perm.iter().position(|&p| p == at).unwrap_or(at)),
        WeightKind::Reshape { .. } => {
            let (from, to) = (sizes(source.shape()), sizes(whole.shape()));
            let merged = || PlaceError::Merged { dim: at, shape: shape_text(&to) };
            reshaped(&from, &to, at).ok_or_else(merged)
        }
        WeightKind::Initializer { .. }
        | WeightKind::Slice { .. }
        | WeightKind::Concat { .. }
        | WeightKind::Cast { .. } => Ok(at),
    }
}

/// Where consecutive parts of `from[dim]` are consecutive parts of a dim of `to`, the same elements in the same order.
fn reshaped(from: &[Dim], to: &[Dim], dim: usize) -> Option<usize> {
    let (mut i, mut j) = (0, 0);
    loop {
        let (left, right) = (skip_ones(from, i)?, skip_ones(to, j)?);
        let (mut a, mut b) = (from[left].clone(), to[right].clone());
        (i, j) = (left + 1, right + 1);
        while a != b {
            // The smaller product takes the next dim.
            if a.compare(&b).is_some_and(|order| order.is_lt()) || b.exact_div(&a).is_some() {
                a = &a * from.get(i)?;
                i += 1;
            } else {
                b = &b * to.get(j)?;
                j += 1;
            }
        }
        let single = from[left..i].iter().filter(|d| !d.is_one()).count() == 1
            || to[right..j].iter().filter(|d| !d.is_one()).count() == 1;
        if (left..i).contains(&dim) {
            return (dim == left && single).then_some(right);
        }
    }
}

fn skip_ones(shape: &[Dim], from: usize) -> Option<usize> {
    (from..shape.len()).find(|&at| !shape[at].is_one())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tpshard_ir::{DType, Type};

    fn dims(text: &[i64]) -> Vec<Dim> {
        text.iter().map(|&d| Dim::constant(d)).collect()
    }

    #[test]
    fn a_split_survives_as_the_leading_part_of_a_dim() {
        let (merged, heads) = (dims(&[8, 64]), dims(&[8, 4, 16]));
        assert_eq!(reshaped(&merged, &heads, 0), Some(0));
        assert_eq!(reshaped(&merged, &heads, 1), Some(1));
        assert_eq!(reshaped(&heads, &merged, 1), Some(1));
        assert_eq!(reshaped(&heads, &merged, 2), None);
        assert_eq!(reshaped(&dims(&[4, 6]), &dims(&[6, 4]), 0), None);
        assert_eq!(reshaped(&dims(&[1, 4, 1]), &dims(&[4, 1]), 1), Some(0));
        assert_eq!(reshaped(&dims(&[1, 4]), &dims(&[4]), 0), None);
        assert_eq!(reshaped(&dims(&[0, 3]), &dims(&[3, 0]), 0), None);
        let (b, s) = (Dim::symbol("batch"), Dim::symbol("seq"));
        let split = [b.clone(), s.clone(), Dim::constant(4), Dim::constant(16)];
        assert_eq!(reshaped(&[b.clone(), s.clone(), Dim::constant(64)], &split, 2), Some(2));
        assert_eq!(reshaped(&[&b * &s, Dim::constant(64)], &split, 1), Some(2));
        assert_eq!(reshaped(&split, &[&b * &s, Dim::constant(64)], 1), None);
        assert_eq!(reshaped(&split, &[&b * &s, Dim::constant(64)], 0), Some(0));
    }

    #[test]
    fn weights_are_found_inside_what_is_made_of_them() {
        let w = WeightExpr::initializer("w", DType::F32, vec![64, 192]).unwrap();
        let key =
            w.slice(1, 64, 64).unwrap().transpose(vec![1, 0]).unwrap().reshape(vec![4, 16, 64]).unwrap();
        assert_eq!(inside(&key, &w, Some(1)), Ok(Some(Some(0))));
        assert_eq!(inside(&key, &w, Some(0)), Ok(Some(Some(2))));
        assert_eq!(inside(&key, &w, None), Ok(Some(None)));
        assert_eq!(inside(&w, &key, None), Ok(None));
        let other = WeightExpr::initializer("v", DType::F32, vec![64, 192]).unwrap();
        let joined = WeightExpr::concat(vec![other, w.clone()], 0).unwrap();
        assert_eq!(inside(&joined, &w, Some(1)), Ok(Some(Some(1))));
        assert_eq!(inside(&joined, &w, Some(0)), Err(PlaceError::Joined { dim: 0 }));
        let flat = w.reshape(vec![64 * 192]).unwrap();
        assert_eq!(inside(&flat, &w, Some(0)), Ok(Some(Some(0))));
        assert!(matches!(inside(&flat, &w, Some(1)), Err(PlaceError::Merged { dim: 1, .. })));
    }

    #[test]
    fn packed_weights_are_found_in_what_they_hold() {
        let packed = WeightExpr::initializer("w", DType::U8, vec![512, 8, 16]).unwrap();
        let held = WeightExpr::initializer("w'", DType::U4, vec![512, 256]).unwrap();
        assert_eq!(inside(&held, &packed, Some(0)), Ok(Some(Some(0))));
        assert_eq!(inside(&held, &packed, Some(1)), Ok(Some(Some(1))));
        assert!(matches!(inside(&held, &packed, Some(2)), Err(PlaceError::Merged { dim: 2, .. })));
        assert_eq!(inside(&held, &packed, None), Ok(Some(None)));
        let other = WeightExpr::initializer("w'", DType::U4, vec![512, 128]).unwrap();
        assert_eq!(inside(&other, &packed, Some(0)), Ok(None));
    }

    #[test]
    fn values_are_found_through_equations_congruence_and_views() {
        let mut graph = Graph::new("g");
        let x = graph.input("x", Type::new(DType::F32, dims(&[2, 64])));
        let doubled = graph.add(Op::Map(tpshard_ir::Scalar::Add), &[x, x]).unwrap();
        let user = graph.add(Op::Map(tpshard_ir::Scalar::Neg), &[doubled]).unwrap();
        let split = Op::Reshape { shape: dims(&[2, 4, 16]) };
        let lost = graph.add(split.clone(), &[user]).unwrap();
        graph.outputs = vec![tpshard_ir::graph::Output { name: "y".into(), value: lost }];
        let mut extended = Extended::new(graph);
        let view = extended.graph.add(split, &[x]).unwrap();
        let other = extended.graph.add(Op::Map(tpshard_ir::Scalar::Add), &[view, view]).unwrap();
        let end = extended.graph.add(Op::Map(tpshard_ir::Scalar::Neg), &[other]).unwrap();
        let merged = Op::Reshape { shape: dims(&[2, 64]) };
        let back = extended.graph.add(merged, &[other]).unwrap();
        extended.equate("test", doubled, back);
        extended.outputs[0].value = end;
        let places = Places::new(&extended);
        assert_eq!(places.of_value(doubled, Some(1)), Ok(vec![Place { value: other, dim: Some(1) }]));
        assert_eq!(places.of_value(back, None), Ok(vec![Place { value: other, dim: None }]));
        assert_eq!(places.of_value(user, Some(0)), Err(PlaceError::Folded));
        assert_eq!(places.of_value(x, Some(1)), Ok(vec![Place { value: x, dim: Some(1) }]));
    }
}
