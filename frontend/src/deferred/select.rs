//! NonZero and Compress: selections of as many elements as data says, <https://onnx.ai/onnx/operators/>.

use super::Evaluated;
use super::elements::{axis_of, numbers, take};
use crate::model::Node;
use tpshard_ir::Tensor;

/// The index of every element that is not zero, one column each, in row-major order. A scalar counts as one dim.
pub(super) fn non_zero(x: Option<&Tensor>) -> Evaluated<Tensor> {
    let x = x.ok_or("an operand is missing")?;
    let shape = if x.shape().is_empty() { &[1][..] } else { x.shape() };
    let places: Vec<usize> =
        numbers(x)?.iter().enumerate().filter(|(_, number)| !number.is_zero()).map(|(at, _)| at).collect();
    let mut stride: usize = shape.iter().product();
    let mut indices = Vec::with_capacity(places.len().saturating_mul(shape.len()));
    for &extent in shape {
        stride /= extent.max(1);
        let along = |at: &usize| i64::try_from(at / stride.max(1) % extent.max(1)).unwrap_or(i64::MAX);
        indices.extend(places.iter().map(along));
    }
    // As ONNX Runtime: the indices of a scalar have no rows.
    let rows = x.shape().len();
    if rows == 0 {
        return Tensor::from_vec(vec![0, places.len()], Vec::<i64>::new()).map_err(|error| error.to_string());
    }
    Tensor::from_vec(vec![rows, places.len()], indices).map_err(|error| error.to_string())
}

/// The entries of `axis` (of the flat tensor, if there is none) where the condition holds; it may be shorter.
pub(super) fn compress(node: &Node, x: Option<&Tensor>, condition: Option<&Tensor>) -> Evaluated<Tensor> {
    let (x, condition) = x.zip(condition).ok_or("an operand is missing")?;
    let chosen = condition.as_slice::<bool>().map_err(|error| format!("the condition: {error}"))?;
    let axis = node.attributes().optional_int("axis").map_err(|error| error.to_string())?;
    let (x, axis) = match axis {
        Some(axis) => (x.clone(), axis_of(axis, x.shape().len())?),
        None => (x.clone().reshaped(vec![x.len()]).map_err(|error| error.to_string())?, 0),
    };
    let extent = x.shape().get(axis).copied().unwrap_or(0);
    let positions: Vec<usize> =
        chosen.iter().enumerate().filter(|(_, chosen)| **chosen).map(|(at, _)| at).collect();
    if positions.last().is_some_and(|&last| last >= extent) {
        return Err(format!("the condition has {} entries for {extent}", chosen.len()));
    }
    take(&x, axis, &positions)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_of_non_zeros_come_in_row_major_order() {
        let x = Tensor::from_vec(vec![2, 3], vec![0f32, 1.0, -0.0, 2.0, f32::NAN, 0.0]).unwrap();
        let expected = Tensor::from_vec(vec![2, 3], vec![0i64, 1, 1, 1, 0, 1]).unwrap();
        assert_eq!(non_zero(Some(&x)).unwrap(), expected);
        let none = Tensor::from_vec(vec![0, 4], Vec::<bool>::new()).unwrap();
        assert_eq!(non_zero(Some(&none)).unwrap().shape(), [2, 0]);
        assert!(non_zero(None).is_err());
    }

    #[test]
    fn compress_takes_what_the_condition_says() {
        let node = Node { op_type: "Compress".into(), opset: 11, ..Node::default() };
        let x = Tensor::from_vec(vec![3, 2], (1..7i64).collect()).unwrap();
        let condition = Tensor::from_vec(vec![5], vec![false, true, false, false, true]).unwrap();
        let flat = compress(&node, Some(&x), Some(&condition)).unwrap();
        assert_eq!(flat, Tensor::from_vec(vec![2], vec![2i64, 5]).unwrap());
        let long = Tensor::from_vec(vec![7], vec![true; 7]).unwrap();
        assert!(compress(&node, Some(&x), Some(&long)).unwrap_err().contains("7 entries for 6"));
    }
}
