//! What an elementwise region may cover besides elementwise nodes of one shape.
//!
//! A region is one pass over the elements of a shape, its *pass*. The last dim of a pass may be cut into rows that are
//! short enough to be kept whole: then reductions of rows, and elementwise nodes with one element per row, take part, which
//! is how activations are rounded with a scale per block. As elements are passed in row-major order, nodes of the shape in
//! which the last two dims are joined take part as well, and so do reshapes from it or, at the end, to it.

use super::lowering::{Kernel, kernel_of};
use crate::dim::Dim;
use crate::dtype::DType;
use crate::graph::{Graph, ValueId};
use crate::op::Op;

/// Most elements of a row that is reduced within a region.
pub const MAX_ROW: usize = 512;

/// How the elements of a node, or of an operand, lie along a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Space {
    /// In the shape of the pass.
    Pass,
    /// In the shape of the pass with its last two dims joined.
    Joined,
    /// One for every row.
    Row,
}

/// The shape that an elementwise region passes over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pass<'a> {
    shape: &'a [Dim],
    /// The extents of the last two dims, if they are constant.
    last_two: Option<[usize; 2]>,
    /// The extent of the last dim, if it may be a row.
    row: Option<usize>,
}

impl<'a> Pass<'a> {
    /// The pass of a region with the result `root`.
    pub fn new(graph: &'a Graph, root: ValueId) -> Pass<'a> {
        let node = graph.node(root);
        let shape = match (&node.op, node.args.first()) {
            (Op::Reshape { .. }, Some(&arg)) => &graph.ty(arg).shape,
            _ => &node.ty.shape,
        };
        let last_two = match shape.as_slice() {
            [.., a, b] => a.as_size().zip(b.as_size()).map(<[usize; 2]>::from),
            _ => None,
        };
        let row = shape.last().and_then(Dim::as_size).filter(|row| (2..=MAX_ROW).contains(row));
        Pass { shape, last_two, row }
    }

    /// The extents of the last two dims, if they are constant.
    pub fn last_two(&self) -> Option<[usize; 2]> {
        self.last_two
    }

    /// The elements of a row, if the last dim may be one.
    pub fn row(&self) -> Option<usize> {
        self.row
    }

    /// Where the elements of a value of this shape lie, if anywhere.
    pub fn space(&self, shape: &[Dim]) -> Option<Space> {
        if shape == self.shape {
            return Some(Space::Pass);
        }
        let (_, outer) = self.shape.split_last()?;
        let like_rows = || shape.split_last().is_some_and(|(last, rest)| rest == outer && is(last, 1));
        if self.row.is_some() && like_rows() {
            return Some(Space::Row);
        }
        let ([a, b], (_, outer)) = (self.last_two?, outer.split_last()?);
        let joined = || {
            let (last, rest) = shape.split_last()?;
            (rest == outer && is(last, a.checked_mul(b)?)).then_some(Space::Joined)
        };
        joined()
    }

    /// Whether a region with the result `root` may cover `value`, and where its elements lie.
    pub fn place(&self, graph: &Graph, value: ValueId, root: ValueId) -> Option<Space> {
        let node = graph.node(value);
        let space = self.space(&node.ty.shape)?;
        let from = node.args.first().and_then(|&a| self.space(&graph.ty(a).shape));
        let fits = match &node.op {
            Op::Map(_) => kernel_of(graph, node) == Kernel::Pointwise,
            Op::Reduce { axes, .. } => {
                let floats = node.args.iter().all(|&a| graph.ty(a).dtype == DType::F32);
                let last = axes.as_slice() == [self.shape.len().wrapping_sub(1)];
                floats && last && space == Space::Row && from == Some(Space::Pass)
            }
            Op::Reshape { .. } if value == root => space == Space::Joined && from == Some(Space::Pass),
            Op::Reshape { .. } => space == Space::Pass && from == Some(Space::Joined),
            _ => false,
        };
        (fits && (value != root || space != Space::Row)).then_some(space)
    }

    /// Whether `user`, which the region covers, can take `value` from within it.
    pub fn takes(&self, graph: &Graph, user: ValueId, value: ValueId) -> bool {
        let [of_user, of_value] = [user, value].map(|v| self.space(&graph.ty(v).shape));
        match &graph.node(user).op {
            Op::Map(_) => of_user == of_value || [of_user, of_value] == [Some(Space::Pass), Some(Space::Row)],
            // The place of these says it.
            _ => true,
        }
    }
}

fn is(dim: &Dim, extent: usize) -> bool {
    dim.as_size() == Some(extent)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::{Output, Type};
    use crate::layout::Monoid;
    use crate::op::Scalar;
    use crate::program::lower;

    /// Rows of eight, divided by the largest of each, joined again.
    fn scaled(last: usize) -> Graph {
        let mut graph = Graph::new("scaled");
        let x = graph.input("x", Type::new(DType::F32, vec![Dim::symbol("s"), Dim::from(4 * last)]));
        let doubled = graph.add(Op::Map(Scalar::Neg), &[x]).unwrap();
        let shape = vec![Dim::symbol("s"), 4i64.into(), Dim::from(last)];
        let rows = graph.add(Op::Reshape { shape }, &[doubled]).unwrap();
        let most = graph.add(Op::Reduce { monoid: Monoid::Max, axes: vec![2] }, &[rows]).unwrap();
        let inverse = graph.add(Op::Map(Scalar::Neg), &[most]).unwrap();
        let divided = graph.add(Op::Map(Scalar::Mul), &[rows, inverse]).unwrap();
        let exp = graph.add(Op::Map(Scalar::Exp), &[divided]).unwrap();
        let shape = vec![Dim::symbol("s"), Dim::from(4 * last)];
        let joined = graph.add(Op::Reshape { shape }, &[exp]).unwrap();
        graph.outputs.push(Output { name: "y".into(), value: joined });
        graph
    }

    #[test]
    fn short_rows_are_reduced_within_a_region_and_long_ones_are_not() {
        let pointwise = |graph: &Graph| -> Vec<usize> {
            let lowering = lower(graph);
            lowering.check(graph).unwrap();
            let regions = lowering.regions.iter().filter(|r| r.kernel == Kernel::Pointwise);
            regions.map(|r| r.nodes.len()).collect()
        };
        assert_eq!(pointwise(&scaled(8)), [7]);
        assert!(pointwise(&scaled(2 * MAX_ROW)).iter().all(|&nodes| nodes < 4));
    }

    #[test]
    fn a_plain_region_is_one_node_or_elementwise_nodes_of_one_shape() {
        let graph = scaled(8);
        let lowering = lower(&graph);
        let region = lowering.regions.iter().find(|r| r.nodes.len() == 7).unwrap();
        let parts = region.plain(&graph);
        let covered: Vec<Vec<u32>> = parts.iter().map(|p| p.nodes.iter().map(|n| n.0).collect()).collect();
        assert_eq!(covered, [vec![1], vec![2], vec![3], vec![4], vec![5, 6], vec![7]]);
        let kernels: Vec<Kernel> = parts.iter().map(|p| p.kernel).collect();
        let expected =
            [Kernel::Pointwise, Kernel::View, Kernel::Reduce, Kernel::Pointwise, Kernel::Pointwise];
        assert_eq!(kernels[..5], expected);
        assert_eq!(kernels[5], Kernel::View);
        // What is plain stays as it is.
        assert!(parts.iter().all(|part| part.plain(&graph) == [part.clone()]));
    }
}
