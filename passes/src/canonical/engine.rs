//! The rewriting engine: hash-consed construction with rules applied as values are made.
//!
//! `make(op, args)` interns the node, then offers it to the rules in order; the first that applies builds its
//! replacement through `make` again, and the equation between the two is recorded. Every interned value therefore
//! has one final form, found once. Rules must make progress under some measure; a chain longer than
//! [`CHAIN_LIMIT`] is cut, which costs quality, never correctness.

use crate::extended::Extended;
use rustc_hash::FxHashMap;
use std::sync::Arc;
use tpshard_ir::graph::{Node, Output};
use tpshard_ir::infer::{InferError, infer};
use tpshard_ir::{Graph, Op, Type, ValueId};

/// Longest chain of rewrites of one value.
const CHAIN_LIMIT: usize = 64;

/// A named directed equality. `apply` returns a value equal to its argument, or `None` if the rule does not apply.
pub(super) struct Rule {
    pub(super) name: &'static str,
    pub(super) apply: fn(&mut Rewriter<'_>, ValueId) -> Option<ValueId>,
}

/// The first value of each operation on the same operands.
pub(super) type Interned = FxHashMap<(Op, Vec<ValueId>, Type), ValueId>;

/// All operations of a graph.
pub(super) fn intern(graph: &Graph) -> Interned {
    let key = |node: &Node| (node.op.clone(), node.args.clone(), node.ty.clone());
    graph.values().rev().map(|(id, node)| (key(node), id)).collect()
}

/// A graph under rewriting by one set of rules.
pub(super) struct Rewriter<'a> {
    extended: &'a mut Extended,
    interned: &'a mut Interned,
    last_form: FxHashMap<ValueId, ValueId>,
    rules: &'a [Rule],
    depth: usize,
    /// Users of the values that were live when this pass began, one entry per operand slot.
    users: Vec<Vec<ValueId>>,
    outputs: Vec<ValueId>,
    origin: Arc<str>,
}

/// Rewrites the live part of `extended` with `rules`, operands first. `interned` holds all of its operations.
pub(super) fn rewrite(extended: &mut Extended, interned: &mut Interned, rules: &[Rule]) {
    let live = extended.live();
    let mut users = vec![Vec::new(); extended.graph.len()];
    for &id in &live {
        for arg in &extended.graph.node(id).args {
            users[arg.index()].push(id);
        }
    }
    let outputs = extended.outputs.iter().map(|o| o.value).collect();
    let mut rewriter = Rewriter {
        extended,
        interned,
        last_form: FxHashMap::default(),
        rules,
        depth: 0,
        users,
        outputs,
        origin: "".into(),
    };
    let mut form: FxHashMap<ValueId, ValueId> = FxHashMap::default();
    for id in live {
        let Node { op, args, ty, origin } = rewriter.graph().node(id).clone();
        rewriter.origin = origin;
        let args: Vec<ValueId> = args.iter().map(|a| form.get(a).copied().unwrap_or(*a)).collect();
        let made = rewriter.make_typed(op, &args, ty);
        form.insert(id, made);
    }
    let outputs = rewriter
        .extended
        .outputs
        .iter()
        .map(|o| Output { name: o.name.clone(), value: form.get(&o.value).copied().unwrap_or(o.value) });
    rewriter.extended.outputs = outputs.collect();
}

impl Rewriter<'_> {
    pub(super) fn graph(&self) -> &Graph {
        &self.extended.graph
    }

    pub(super) fn op(&self, value: ValueId) -> &Op {
        &self.extended.graph.node(value).op
    }

    pub(super) fn args(&self, value: ValueId) -> &[ValueId] {
        &self.extended.graph.node(value).args
    }

    pub(super) fn arg(&self, value: ValueId, index: usize) -> ValueId {
        self.extended.graph.node(value).args[index]
    }

    pub(super) fn ty(&self, value: ValueId) -> &Type {
        self.extended.graph.ty(value)
    }

    /// The values that used `value` when this pass began, one per operand slot; none for values made since.
    pub(super) fn users(&self, value: ValueId) -> &[ValueId] {
        self.users.get(value.index()).map_or(&[], Vec::as_slice)
    }

    /// True if at most one operand slot used `value` when this pass began.
    pub(super) fn used_once(&self, value: ValueId) -> bool {
        self.users(value).len() <= 1
    }

    /// True if `value` was an output of the graph when this pass began.
    pub(super) fn is_output(&self, value: ValueId) -> bool {
        self.outputs.contains(&value)
    }

    /// The final form of `op` applied to `args`.
    ///
    /// # Errors
    /// The operation does not apply; rules treat that as "does not match".
    pub(super) fn make(&mut self, op: Op, args: &[ValueId]) -> Result<ValueId, InferError> {
        let types: Vec<&Type> = args.iter().map(|&a| self.extended.graph.ty(a)).collect();
        let ty = infer(&op, &types)?;
        Ok(self.make_typed(op, args, ty))
    }

    fn make_typed(&mut self, op: Op, args: &[ValueId], ty: Type) -> ValueId {
        let key = (op, args.to_vec(), ty);
        let value = match self.interned.get(&key) {
            Some(&known) => known,
            None => {
                let (op, args, ty) = key.clone();
                let node = Node { op, args, ty, origin: self.origin.clone() };
                let value = self.extended.graph.push(node);
                self.interned.insert(key, value);
                value
            }
        };
        self.finish(value)
    }

    fn finish(&mut self, value: ValueId) -> ValueId {
        if let Some(&done) = self.last_form.get(&value) {
            return done;
        }
        let mut current = value;
        if self.depth < CHAIN_LIMIT {
            self.depth += 1;
            for rule in self.rules {
                if let Some(next) = (rule.apply)(self, value)
                    && next != value
                    && self.ty(next) == self.ty(value)
                {
                    self.extended.equate(rule.name, value, next);
                    current = next;
                    break;
                }
            }
            self.depth -= 1;
        }
        self.last_form.insert(value, current);
        current
    }
}
