//! Unique: each different entry once, <https://onnx.ai/onnx/operators/onnx__Unique.html>.

use super::Evaluated;
use super::elements::{Number, axis_of, entry, numbers, take};
use crate::model::Node;
use std::cmp::Ordering;
use tpshard_ir::Tensor;

/// The different entries along `axis` (of the flat tensor, if there is none), sorted or in order of first appearance;
/// where each appears first, which one each entry is, and how often each appears.
pub(super) fn unique(node: &Node, x: Option<&Tensor>) -> Evaluated<Vec<Tensor>> {
    let x = x.ok_or("an operand is missing")?;
    let attributes = node.attributes();
    let sorted = attributes.bool("sorted", true).map_err(|error| error.to_string())?;
    let axis = attributes.optional_int("axis").map_err(|error| error.to_string())?;
    let (x, axis) = match axis {
        Some(axis) => (x.clone(), axis_of(axis, x.shape().len())?),
        None => (x.clone().reshaped(vec![x.len()]).map_err(|error| error.to_string())?, 0),
    };
    let extent = x.shape().get(axis).copied().unwrap_or(0);
    let keys: Vec<Vec<Number>> =
        (0..extent).map(|at| numbers(&entry(&x, axis, at)?)).collect::<Evaluated<_>>()?;
    let mut order: Vec<usize> = (0..extent).collect();
    order.sort_by(|&a, &b| compare(&keys[a], &keys[b]).then(a.cmp(&b)));
    // The first of each run of equal entries stands for it: sorting is stable.
    let mut first: Vec<usize> = Vec::new();
    let mut group = vec![0usize; extent];
    for (at, &position) in order.iter().enumerate() {
        let new = at == 0 || compare(&keys[order[at - 1]], &keys[position]) != Ordering::Equal;
        if new {
            first.push(position);
        }
        group[position] = first.len() - 1;
    }
    let mut ranked: Vec<usize> = (0..first.len()).collect();
    if !sorted {
        ranked.sort_by_key(|&own| first[own]);
    }
    let mut place = vec![0i64; first.len()];
    for (at, &own) in ranked.iter().enumerate() {
        place[own] = i64::try_from(at).unwrap_or(i64::MAX);
    }
    let mut counts = vec![0i64; first.len()];
    for &own in &group {
        counts[usize::try_from(place[own]).unwrap_or(0)] += 1;
    }
    let positions: Vec<usize> = ranked.iter().map(|&own| first[own]).collect();
    let indices = positions.iter().map(|&at| i64::try_from(at).unwrap_or(i64::MAX)).collect();
    let inverse = group.iter().map(|&own| place[own]).collect();
    let flat = |values: Vec<i64>| Tensor::from_vec(vec![values.len()], values).map_err(|e| e.to_string());
    Ok(vec![take(&x, axis, &positions)?, flat(indices)?, flat(inverse)?, flat(counts)?])
}

fn compare(a: &[Number], b: &[Number]) -> Ordering {
    a.iter().zip(b).map(|(a, b)| a.order(b)).find(|order| order.is_ne()).unwrap_or(Ordering::Equal)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Attribute, AttributeValue};

    fn node(attributes: &[(&str, i64)]) -> Node {
        let attribute =
            |&(name, value): &(&str, i64)| Attribute { name: name.into(), value: AttributeValue::Int(value) };
        Node {
            op_type: "Unique".into(),
            opset: 11,
            attributes: attributes.iter().map(attribute).collect(),
            ..Node::default()
        }
    }

    fn ints(values: &[i64]) -> Tensor {
        Tensor::from_vec(vec![values.len()], values.to_vec()).unwrap()
    }

    #[test]
    fn entries_are_sorted_or_in_order_of_appearance() {
        let x = Tensor::from_vec(vec![6], vec![2f32, 1.0, 1.0, 3.0, 4.0, 3.0]).unwrap();
        let floats = |v: &[f32]| Tensor::from_vec(vec![v.len()], v.to_vec()).unwrap();
        let sorted = unique(&node(&[]), Some(&x)).unwrap();
        assert_eq!(sorted[0], floats(&[1.0, 2.0, 3.0, 4.0]));
        assert_eq!(sorted[1..], [ints(&[1, 0, 3, 4]), ints(&[1, 0, 0, 2, 3, 2]), ints(&[2, 1, 2, 1])]);
        let unsorted = unique(&node(&[("sorted", 0)]), Some(&x)).unwrap();
        assert_eq!(unsorted[0], floats(&[2.0, 1.0, 3.0, 4.0]));
        assert_eq!(unsorted[1..], [ints(&[0, 1, 3, 4]), ints(&[0, 1, 1, 2, 3, 2]), ints(&[1, 2, 2, 1])]);
    }

    #[test]
    fn rows_are_entries_of_an_axis() {
        let x = Tensor::from_vec(vec![3, 2], vec![1i64, 0, 1, 0, 0, 5]).unwrap();
        let found = unique(&node(&[("axis", 0)]), Some(&x)).unwrap();
        assert_eq!(found[0], Tensor::from_vec(vec![2, 2], vec![0i64, 5, 1, 0]).unwrap());
        assert_eq!(found[3], ints(&[1, 2]));
        assert!(unique(&node(&[("axis", 2)]), Some(&x)).is_err());
    }
}
