//! Which values are equal: the least equivalence that holds the given equations and the rule that equal operations of
//! equal operands are equal.

use std::collections::{BTreeMap, HashMap};
use tpshard_ir::{Graph, Op, ValueId};

/// Equivalence classes of the values of one graph, closed under congruence.
pub(crate) struct Classes {
    /// Per value, its operation as a number, so that comparing is cheap.
    operations: Vec<usize>,
    arguments: Vec<Vec<usize>>,
    parent: Vec<usize>,
}

impl Classes {
    /// Only congruence so far.
    pub(crate) fn new(graph: &Graph) -> Classes {
        let mut numbers: HashMap<&Op, usize> = HashMap::new();
        let mut operations = Vec::with_capacity(graph.len());
        for node in graph.nodes() {
            let next = numbers.len();
            operations.push(*numbers.entry(&node.op).or_insert(next));
        }
        let arguments = graph.nodes().iter().map(|n| n.args.iter().map(|a| a.index()).collect()).collect();
        let mut classes = Classes { operations, arguments, parent: (0..graph.len()).collect() };
        classes.close();
        classes
    }

    /// The representative of a class: its first value.
    pub(crate) fn find(&self, value: ValueId) -> ValueId {
        ValueId(u32::try_from(self.root(value.index())).unwrap_or(u32::MAX))
    }

    pub(crate) fn equal(&self, a: ValueId, b: ValueId) -> bool {
        self.root(a.index()) == self.root(b.index())
    }

    /// Adds `a = b` and what follows.
    pub(crate) fn join(&mut self, a: ValueId, b: ValueId) {
        if self.unite(a.index(), b.index()) {
            self.close();
        }
    }

    fn root(&self, mut value: usize) -> usize {
        while self.parent[value] != value {
            value = self.parent[value];
        }
        value
    }

    /// True if they were not equal before. The earlier value represents both.
    fn unite(&mut self, a: usize, b: usize) -> bool {
        let (a, b) = (self.root(a), self.root(b));
        self.parent[a.max(b)] = a.min(b);
        a != b
    }

    /// Operands come before their users, so one pass sees the consequences of all but the equations that look
    /// backwards; passes repeat until one changes nothing.
    fn close(&mut self) {
        let mut changed = true;
        while changed {
            changed = false;
            let mut seen: BTreeMap<(usize, Vec<usize>), usize> = BTreeMap::new();
            for value in 0..self.parent.len() {
                self.parent[value] = self.root(value);
                let arguments = self.arguments[value].iter().map(|&a| self.root(a)).collect();
                let first = *seen.entry((self.operations[value], arguments)).or_insert(value);
                changed |= self.unite(first, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tpshard_ir::{DType, Scalar, Type};

    #[test]
    fn equal_operands_make_equal_results() {
        let mut graph = Graph::new("g");
        let [a, b] = ["a", "b"].map(|n| graph.input(n, Type::new(DType::F32, vec![Dim::from(2usize)])));
        let exp_a = graph.add(Op::Map(Scalar::Exp), &[a]).unwrap_or(a);
        let exp_b = graph.add(Op::Map(Scalar::Exp), &[b]).unwrap_or(a);
        let deep_a = graph.add(Op::Map(Scalar::Neg), &[exp_a]).unwrap_or(a);
        let deep_b = graph.add(Op::Map(Scalar::Neg), &[exp_b]).unwrap_or(a);
        let again = graph.add(Op::Map(Scalar::Neg), &[exp_a]).unwrap_or(a);
        let mut classes = Classes::new(&graph);
        assert!(classes.equal(deep_a, again) && !classes.equal(deep_a, deep_b));
        classes.join(b, a);
        assert!(classes.equal(deep_a, deep_b) && !classes.equal(exp_a, deep_b));
        assert_eq!(classes.find(deep_b), deep_a);
    }
    use tpshard_ir::Dim;
}
