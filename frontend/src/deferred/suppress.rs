//! NonMaxSuppression, <https://onnx.ai/onnx/operators/onnx__NonMaxSuppression.html>: per batch and class, boxes by
//! falling score, as long as they overlap none that was taken by more than a threshold.

use super::Evaluated;
use super::elements::{Number, integer, numbers, single};
use crate::model::Node;
use tpshard_ir::Tensor;

/// Of `(boxes[batch, n, 4], scores[batch, class, n], most, overlap, score)`: rows of batch, class and box.
pub(super) fn non_max_suppression<'a>(
    node: &Node,
    input: &dyn Fn(usize) -> Option<&'a Tensor>,
) -> Evaluated<Tensor> {
    let (boxes, scores) = input(0).zip(input(1)).ok_or("an operand is missing")?;
    let by_center = node.attributes().bool("center_point_box", false).map_err(|error| error.to_string())?;
    let most = input(2).map(|most| integer(most, "the number of boxes")).transpose()?.unwrap_or(0);
    let number =
        |index: usize, what: &str| input(index).map(|t| single(t, what).map(|n| n.float())).transpose();
    let overlap = number(3, "the overlap")?.unwrap_or(0.0);
    let least = number(4, "the score")?;
    let (&[batches, count, 4], &[of_scores, classes, columns]) = (boxes.shape(), scores.shape()) else {
        return Err(format!("boxes of shape {:?} with scores of shape {:?}", boxes.shape(), scores.shape()));
    };
    if of_scores != batches || columns != count {
        return Err(format!("boxes of shape {:?} with scores of shape {:?}", boxes.shape(), scores.shape()));
    }
    let corners: Vec<[f64; 4]> = numbers(boxes)?.chunks_exact(4).map(|one| corners(one, by_center)).collect();
    let scores: Vec<f64> = numbers(scores)?.iter().map(Number::float).collect();
    let mut rows: Vec<i64> = Vec::new();
    let most = usize::try_from(most).unwrap_or(0);
    for batch in 0..batches {
        let boxes = &corners[batch * count..(batch + 1) * count];
        for class in 0..classes {
            let start = (batch * classes + class) * count;
            for taken in kept(boxes, &scores[start..start + count], most, overlap, least) {
                rows.extend([batch, class, taken].map(|at| i64::try_from(at).unwrap_or(i64::MAX)));
            }
        }
    }
    Tensor::from_vec(vec![rows.len() / 3, 3], rows).map_err(|error| error.to_string())
}

fn kept(boxes: &[[f64; 4]], scores: &[f64], most: usize, overlap: f64, least: Option<f64>) -> Vec<usize> {
    let mut order: Vec<usize> =
        (0..boxes.len()).filter(|&at| least.is_none_or(|least| scores[at] > least)).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    let mut taken: Vec<usize> = Vec::new();
    for at in order {
        if taken.len() >= most {
            break;
        }
        if taken.iter().all(|&other| !overlaps(&boxes[at], &boxes[other], overlap)) {
            taken.push(at);
        }
    }
    taken
}

/// Low and high corner.
fn corners(one: &[Number], by_center: bool) -> [f64; 4] {
    let [a, b, c, d] = [0, 1, 2, 3].map(|at| one.get(at).map_or(0.0, Number::float));
    if by_center {
        return [a - c / 2.0, b - d / 2.0, a + c / 2.0, b + d / 2.0];
    }
    [a.min(c), b.min(d), a.max(c), b.max(d)]
}

/// True if what both cover is more than `threshold` of what either covers.
fn overlaps(a: &[f64; 4], b: &[f64; 4], threshold: f64) -> bool {
    let area = |x: &[f64; 4]| (x[2] - x[0]) * (x[3] - x[1]);
    let width = a[2].min(b[2]) - a[0].max(b[0]);
    let height = a[3].min(b[3]) - a[1].max(b[1]);
    if width <= 0.0 || height <= 0.0 || area(a) <= 0.0 || area(b) <= 0.0 {
        return false;
    }
    let both = width * height;
    both / (area(a) + area(b) - both) > threshold
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boxes_that_overlap_a_better_one_are_left_out() {
        let node = Node { op_type: "NonMaxSuppression".into(), opset: 11, ..Node::default() };
        let rows = [[0.0, 0.0, 1.0, 1.0], [0.0, 0.1, 1.0, 1.1], [0.0, 10.0, 1.0, 11.0f32]];
        let boxes = Tensor::from_vec(vec![1, 3, 4], rows.concat()).unwrap();
        let scores = Tensor::from_vec(vec![1, 1, 3], vec![0.75f32, 0.9, 0.3]).unwrap();
        let most = Tensor::from_vec(vec![1], vec![3i64]).unwrap();
        let overlap = Tensor::from_vec(vec![1], vec![0.5f32]).unwrap();
        let least = Tensor::from_vec(vec![1], vec![0.4f32]).unwrap();
        let run = |inputs: &[&Tensor]| {
            let inputs: Vec<&Tensor> = inputs.to_vec();
            non_max_suppression(&node, &|at| inputs.get(at).copied()).unwrap()
        };
        let found = run(&[&boxes, &scores, &most, &overlap]);
        assert_eq!(found, Tensor::from_vec(vec![2, 3], vec![0i64, 0, 1, 0, 0, 2]).unwrap());
        assert_eq!(run(&[&boxes, &scores, &most, &overlap, &least]).shape(), [1, 3]);
        // Without a number of boxes there are none.
        assert_eq!(run(&[&boxes, &scores]).shape(), [0, 3]);
        assert!(non_max_suppression(&node, &|_| None).is_err());
    }
}
