//! Bodies of control flow, lowered for the shapes of what they are given.
//!
//! What a body uses from outside does not change while it is repeated, so small integers from there are constants of it:
//! shapes and axes most of all. What is kept is bounded; a body that is not kept is lowered again.

use super::captures::captured;
use super::{Evaluated, OnnxEvaluator, Operands, bare_model, tensor_info};
use crate::ImportOptions;
use crate::error::LoadError;
use crate::lower::{Imported, Manner, lower_as};
use crate::model::{Dim, Graph, ValueInfo};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use tpshard_ir::interp::{Array, Domain, Num, OpError, Real, run_arrays_with};
use tpshard_ir::{DType, Tensor};

/// Most lowered bodies that are kept.
const KEPT: usize = 512;
/// Most elements of an outer value that is a constant of a body.
const CONSTANT_LIMIT: usize = 64;
/// Most elements that can be constants at all.
const KNOWN_LIMIT: usize = crate::lower::KNOWN_LIMIT;

/// A graph with types of its inputs, and constants.
type BodyKey = (Vec<u8>, Vec<(DType, Vec<usize>)>, Vec<(String, Vec<u8>)>);

/// Values of the interpreter by name.
type Arrays = BTreeMap<Arc<str>, Array<Num>>;

/// Bodies that were lowered.
#[derive(Default)]
pub(super) struct Bodies(Mutex<BTreeMap<BodyKey, Arc<Imported>>>);

/// A graph that is run again and again.
pub(super) struct Body<'a> {
    graph: &'a Graph,
    /// The graph as bytes, for the cache.
    identity: Vec<u8>,
    outer: BTreeMap<&'a str, &'a Tensor>,
    /// The outer values as the interpreter has them: they may be large, and are the same in every round.
    arrays: Arrays,
    constants: BTreeMap<String, Tensor>,
}

impl<'a> Body<'a> {
    /// `graph` amid outer values.
    pub(super) fn new(graph: &'a Graph, operands: &Operands<'a>) -> Evaluated<Body<'a>> {
        let mut outer = BTreeMap::new();
        for name in captured(graph) {
            let (name, tensor) = operands
                .get_key_value(name.as_str())
                .ok_or_else(|| format!("the outer value {} is missing", crate::error::quote(&name)))?;
            outer.insert(*name, *tensor);
        }
        let small = |tensor: &Tensor| !tensor.dtype().is_float() && tensor.len() <= CONSTANT_LIMIT;
        let constants = constant_bindings(&outer, small);
        let identity = super::code::graph_bytes(graph).map_err(|fault| fault.to_string())?;
        let arrays = outer.iter().map(|(&name, tensor)| (name.into(), Real.import(tensor))).collect();
        Ok(Body { graph, identity, outer, arrays, constants })
    }

    /// How many outputs the body has.
    pub(super) fn outputs(&self) -> usize {
        self.graph.outputs.len()
    }

    fn key(&self, inputs: &[Tensor]) -> BodyKey {
        let types = inputs.iter().chain(self.outer.values().copied());
        let types = types.map(|tensor| (tensor.dtype(), tensor.shape().to_vec())).collect();
        let constant = |(name, tensor): (&String, &Tensor)| (name.clone(), tensor.data().to_le_bytes());
        (self.identity.clone(), types, self.constants.iter().map(constant).collect())
    }
}

impl OnnxEvaluator {
    /// The body lowered for inputs of these types.
    pub(super) fn prepared(&self, body: &Body<'_>, inputs: &[Tensor]) -> Evaluated<Arc<Imported>> {
        let key = body.key(inputs);
        let kept = || self.bodies.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = kept().get(&key) {
            return Ok(known.clone());
        }
        if inputs.len() != body.graph.inputs.len() {
            return Err(format!(
                "the body has {} inputs, {} are given",
                body.graph.inputs.len(),
                inputs.len()
            ));
        }
        let own = body.graph.inputs.iter().zip(inputs).map(|(info, tensor)| static_info(&info.name, tensor));
        let outer = body.outer.iter().map(|(name, tensor)| static_info(name, tensor));
        let output = |info: &ValueInfo| ValueInfo { value_type: None, ..info.clone() };
        let graph = Graph {
            inputs: own.chain(outer).collect(),
            outputs: body.graph.outputs.iter().map(output).collect(),
            ..body.graph.clone()
        };
        let options = ImportOptions { bindings: body.constants.clone(), ..ImportOptions::default() };
        let lowered = lower_as(bare_model("body", graph), &options, Manner::default());
        let imported = Arc::new(lowered.map_err(|error| faults_text(&error))?);
        let mut kept = kept();
        if kept.len() >= KEPT {
            kept.clear();
        }
        kept.insert(key, imported.clone());
        Ok(imported)
    }

    /// The outputs of a body.
    pub(super) fn run_body(
        &self,
        body: &Body<'_>,
        inputs: &[Tensor],
        limit: usize,
    ) -> Evaluated<Vec<Tensor>> {
        let imported = self.prepared(body, inputs)?;
        let mut arrays = body.arrays.clone();
        let own = body.graph.inputs.iter().zip(inputs);
        arrays.extend(own.map(|(info, tensor)| (info.name.as_str().into(), Real.import(tensor))));
        run_on_arrays(&imported, &arrays, limit, self)
    }
}

/// The small ones of `operands` that are to be constants.
pub(super) fn constant_bindings(
    operands: &Operands<'_>,
    wanted: impl Fn(&Tensor) -> bool,
) -> BTreeMap<String, Tensor> {
    let can = |tensor: &Tensor| tensor.len() <= KNOWN_LIMIT && crate::lower::can_be_known(tensor);
    let chosen = operands.iter().filter(|(_, tensor)| can(tensor) && wanted(tensor));
    chosen.map(|(name, tensor)| ((*name).to_owned(), (*tensor).clone())).collect()
}

/// An input of just this type.
pub(super) fn static_info(name: &str, tensor: &Tensor) -> ValueInfo {
    let shape = tensor.shape().iter().map(|&extent| Dim::Known(extent as u64)).collect();
    tensor_info(name, tensor.dtype(), shape)
}

/// Runs what was lowered for these operands; its outputs in order.
pub(super) fn run_imported(
    imported: &Imported,
    operands: &Operands<'_>,
    limit: usize,
    evaluator: &OnnxEvaluator,
) -> Evaluated<Vec<Tensor>> {
    let find = |name: &Arc<str>| operands.get(&**name).map(|tensor| (name.clone(), Real.import(tensor)));
    let arrays = imported.graph.inputs().filter_map(|(_, name, _)| find(name)).collect();
    run_on_arrays(imported, &arrays, limit, evaluator)
}

fn run_on_arrays(
    imported: &Imported,
    arrays: &Arrays,
    limit: usize,
    evaluator: &OnnxEvaluator,
) -> Evaluated<Vec<Tensor>> {
    let initializer = |name: &str| -> Result<Tensor, OpError> {
        let tensor =
            imported.tensors.get(name).ok_or_else(|| OpError::Other(format!("no tensor `{name}`")))?;
        imported.model.storage.to_tensor(tensor).map_err(|fault| OpError::Other(fault.to_string()))
    };
    let outputs = run_arrays_with(&imported.graph, arrays, &initializer, limit, Some(evaluator));
    Ok(outputs.map_err(|error| error.to_string())?.into_iter().map(|(_, tensor)| tensor).collect())
}

/// What is wrong, without a file.
pub(super) fn faults_text(error: &LoadError) -> String {
    error.faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}
