//! Steps whose shape depends on data: evaluated on every rank alike, since operands and result are whole on all of them.
//!
//! A result gives the symbols it defines their values, so sizes, guards and memory that depend on them are looked at here
//! and not before the step. All of that is decided from what is equal on all ranks, so that they go on together also
//! where a step fails.

use super::convert::StepError;
use super::value::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tpshard_ir::deferred::{DeferredCall, Evaluator, bind_least, bind_result, no_evaluator};
use tpshard_ir::dim::{Bindings, Dim};
use tpshard_ir::interp::check_guards;
use tpshard_ir::program::{Entry, Lowering};
use tpshard_ir::{Graph, Op, Tensor, Type, ValueId};

/// Bytes of memory that an element may take while it is computed.
const BYTES_PER_ELEMENT: u64 = 32;

/// All results of one call, those that were taken left out.
type CallResults = Vec<Option<Tensor>>;

/// What a run knows about deferred calls.
pub(crate) struct Deferred<'a> {
    evaluator: Option<&'a dyn Evaluator>,
    /// Bytes that no rank may exceed.
    limit: u64,
    /// Symbols without value yet.
    open: BTreeSet<Arc<str>>,
    /// Results that later steps will ask for.
    results: BTreeMap<(Arc<DeferredCall>, Vec<ValueId>), CallResults>,
}

impl<'a> Deferred<'a> {
    pub(crate) fn new(
        graph: &Graph,
        bindings: &Bindings,
        evaluator: Option<&'a dyn Evaluator>,
        limit: u64,
    ) -> Deferred<'a> {
        let open = graph.data_symbols().into_iter().filter(|s| !bindings.contains_key(s)).collect();
        Deferred { evaluator, limit, open, results: BTreeMap::new() }
    }

    /// The value `at`, a result of a deferred call on `args`, and what follows from it. Ranks go on with the same sizes
    /// whether it can be made or not.
    pub(crate) fn run(
        &mut self,
        entry: &Entry,
        lowering: &Lowering,
        at: ValueId,
        args: Result<Vec<Value>, String>,
        bindings: &mut Bindings,
    ) -> Result<Value, StepError> {
        let graph = &entry.graph;
        let made = args
            .and_then(|args| self.step(graph, at, &args, bindings))
            .and_then(|value| self.learnt(entry, lowering, bindings).map(|()| value));
        if made.is_err() {
            self.give_up(graph.ty(at), graph, bindings);
        }
        Ok(made?)
    }

    fn step(
        &mut self,
        graph: &Graph,
        at: ValueId,
        args: &[Value],
        bindings: &mut Bindings,
    ) -> Result<Value, String> {
        let node = graph.node(at);
        let Op::Deferred { call, output, ty } = &node.op else { return Err("is not deferred".into()) };
        let key = (call.clone(), node.args.clone());
        let known = self.results.get_mut(&key).and_then(|all| all.get_mut(*output)).and_then(Option::take);
        let tensor = match known {
            Some(tensor) => tensor,
            None => {
                let mut all = self.call(call, args)?;
                let own = all.get_mut(*output).and_then(Option::take);
                let own = own.ok_or_else(|| format!("the call has no result {output}"))?;
                for (other, result) in all.iter_mut().enumerate() {
                    if !asked_later(graph, at, call, &node.args, other) {
                        *result = None;
                    }
                }
                if all.iter().any(Option::is_some) {
                    self.results.insert(key, all);
                }
                own
            }
        };
        let shape = tensor.shape().iter().map(|&extent| Dim::from(extent)).collect();
        bind_result(ty, &Type::new(tensor.dtype(), shape), &graph.symbols, bindings)?;
        Ok(Value::new(tensor))
    }

    fn call(&self, call: &DeferredCall, args: &[Value]) -> Result<CallResults, String> {
        let evaluator = self.evaluator.ok_or_else(|| no_evaluator(call))?;
        let tensors = args.iter().map(Value::tensor).collect::<Result<Vec<Arc<Tensor>>, _>>()?;
        let operands: Vec<&Tensor> = tensors.iter().map(AsRef::as_ref).collect();
        let most = usize::try_from(self.limit / BYTES_PER_ELEMENT).unwrap_or(usize::MAX).max(1 << 12);
        Ok(evaluator.evaluate(call, &operands, most)?.into_iter().map(Some).collect())
    }

    /// After a result: checks what has become known, which is the same on all ranks.
    fn learnt(&mut self, entry: &Entry, lowering: &Lowering, bindings: &Bindings) -> Result<(), String> {
        let open: BTreeSet<Arc<str>> =
            self.open.iter().filter(|symbol| !bindings.contains_key(*symbol)).cloned().collect();
        if open.len() == self.open.len() {
            return Ok(());
        }
        check_guards(&entry.graph, bindings, &open).map_err(|e| e.to_string())?;
        // Logical types: what ranks hold differs, and they must come to the same verdict.
        let whole = |value: ValueId| entry.families.get(value.index()).map(|family| family.ty.clone());
        let plan = lowering.plan_known(&entry.graph, bindings, &whole).map_err(|e| e.to_string())?;
        if plan.bytes > self.limit {
            let (needed, limit) = (plan.bytes, self.limit);
            return Err(format!(
                "the sizes that its result decides need {needed} bytes, {limit} are available\n  \
                 help: give smaller inputs, or use more memory"
            ));
        }
        self.open = open;
        Ok(())
    }

    /// Gives what a result that could not be made defines some values, so that all ranks go on alike.
    fn give_up(&mut self, ty: &Type, graph: &Graph, bindings: &mut Bindings) {
        // What was bound before it failed is no better.
        for symbol in ty.shape.iter().flat_map(Dim::symbols) {
            if self.open.remove(&symbol) {
                bindings.remove(&symbol);
            }
        }
        bind_least(ty, &graph.symbols, bindings);
    }
}

/// True if a step after `at` asks for result `output` of the same call.
fn asked_later(graph: &Graph, at: ValueId, call: &DeferredCall, args: &[ValueId], output: usize) -> bool {
    let same =
        |op: &Op| matches!(op, Op::Deferred { call: c, output: o, .. } if *o == output && **c == *call);
    graph.nodes().iter().skip(at.index() + 1).any(|node| same(&node.op) && node.args == args)
}
