//! Which values are equal: the least equivalence that holds the given equations and the rule that equal operations of
//! equal operands are equal.

use std::collections::HashMap;
use tpshard_ir::{Graph, Op, ValueId};

/// Equivalence classes of the values of one graph, closed under congruence.
pub(crate) struct Classes {
    /// Per value, its operation as a number, so that comparing is cheap.
    operations: Vec<usize>,
    arguments: Vec<Vec<usize>>,
    parent: Vec<usize>,
    /// Per representative, the values that have a member of the class as operand.
    users: Vec<Vec<usize>>,
    /// A value with this operation on operands of these classes.
    known: HashMap<(usize, Vec<usize>), usize>,
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
        let mut classes = Classes {
            operations,
            arguments,
            parent: (0..graph.len()).collect(),
            users: vec![Vec::new(); graph.len()],
            known: HashMap::new(),
        };
        for value in 0..graph.len() {
            for i in 0..classes.arguments[value].len() {
                let class = classes.root(classes.arguments[value][i]);
                classes.users[class].push(value);
            }
            // Operands come before their users, so a value met here has no users yet and nothing else follows.
            let first = *classes.known.entry(classes.signature(value)).or_insert(value);
            classes.parent[value] = classes.root(first);
        }
        classes
    }

    /// The representative of a class: its first value.
    pub(crate) fn find(&self, value: ValueId) -> ValueId {
        ValueId(u32::try_from(self.root(value.index())).unwrap_or(u32::MAX))
    }

    pub(crate) fn equal(&self, a: ValueId, b: ValueId) -> bool {
        self.root(a.index()) == self.root(b.index())
    }

    /// Adds `a = b` and what follows: values whose operands became equal may be equal themselves.
    pub(crate) fn join(&mut self, a: ValueId, b: ValueId) {
        let mut open = vec![(a.index(), b.index())];
        while let Some((a, b)) = open.pop() {
            let (a, b) = (self.root(a), self.root(b));
            if a == b {
                continue;
            }
            let (kept, left) = (a.min(b), a.max(b));
            self.parent[left] = kept;
            for user in std::mem::take(&mut self.users[left]) {
                let other = *self.known.entry(self.signature(user)).or_insert(user);
                open.push((user, other));
                self.users[kept].push(user);
            }
        }
    }

    fn signature(&self, value: usize) -> (usize, Vec<usize>) {
        (self.operations[value], self.arguments[value].iter().map(|&a| self.root(a)).collect())
    }

    fn root(&self, mut value: usize) -> usize {
        while self.parent[value] != value {
            value = self.parent[value];
        }
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tpshard_ir::{DType, Dim, Scalar, Type};

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
}
