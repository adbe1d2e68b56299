//! Nodes whose shapes or control flow depend on data, evaluated when their operands are known.
//!
//! The graph holds such a node as an [`ir::DeferredCall`](tpshard_ir::DeferredCall): the node itself with its subgraphs,
//! written down again as ONNX, and the outer values that subgraphs use as further operands. [`OnnxEvaluator`] reads it
//! and lowers it once more, now with known operands, by the same functions as at import: what operators mean is said
//! once. What cannot be lowered even then is evaluated here: selections whose number of results is data, and control
//! flow, whose bodies are lowered once per shapes of their inputs.
//!
//! What must not live here: what can be lowered at import.

mod body;
mod captures;
mod code;
mod control;
mod elements;
mod select;
mod suppress;
mod unique;

pub(crate) use captures::{captured, lift_initializers, operand_names};
pub(crate) use code::encode;

use crate::ImportOptions;
use crate::lower::{Manner, lower_as};
use crate::model::{Graph, Model, Node, TensorType, ValueInfo, ValueType};
use body::{Bodies, constant_bindings, run_imported, static_info};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use tpshard_ir::{DType, DeferredCall, Evaluator, Tensor};

/// Most decoded nodes that are kept.
const KEPT_NODES: usize = 1024;

/// The operators that are evaluated here.
const EVALUATED: &[&str] = &["Compress", "If", "Loop", "NonMaxSuppression", "NonZero", "Scan", "Unique"];

/// True for operators of which only the values of operands say what they make.
pub(crate) fn has_evaluator(node: &Node) -> bool {
    node.domain.is_empty() && EVALUATED.contains(&node.op_type.as_str())
}

/// Gives deferred ONNX nodes their meaning. It holds nothing but caches: results depend on call and operands alone.
#[derive(Default)]
pub struct OnnxEvaluator {
    nodes: Mutex<BTreeMap<Arc<[u8]>, Arc<Node>>>,
    bodies: Bodies,
}

impl std::fmt::Debug for OnnxEvaluator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OnnxEvaluator")
    }
}

/// Operands by name.
type Operands<'a> = BTreeMap<&'a str, &'a Tensor>;
type Evaluated<T> = Result<T, String>;

impl Evaluator for OnnxEvaluator {
    fn evaluate(
        &self,
        call: &DeferredCall,
        operands: &[&Tensor],
        element_limit: usize,
    ) -> Result<Vec<Tensor>, String> {
        let node = self.node(call)?;
        let names = operand_names(&node);
        if names.len() != operands.len() {
            return Err(format!("{} has {} operands, {} are given", call.name, names.len(), operands.len()));
        }
        let operands: Operands<'_> = names.iter().map(String::as_str).zip(operands.iter().copied()).collect();
        let results = self.node_results(&node, &operands, element_limit)?;
        let elements = results.iter().map(Tensor::len).fold(0, usize::saturating_add);
        if elements > element_limit {
            return Err(format!(
                "the results have {elements} elements, {element_limit} are allowed\n  help: give smaller inputs"
            ));
        }
        Ok(results)
    }
}

impl OnnxEvaluator {
    fn node(&self, call: &DeferredCall) -> Evaluated<Arc<Node>> {
        let mut nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(node) = nodes.get(&call.code) {
            return Ok(node.clone());
        }
        let node = code::decode(&call.code).map_err(|fault| format!("a deferred {}: {fault}", call.name))?;
        if nodes.len() >= KEPT_NODES {
            nodes.clear();
        }
        let node = Arc::new(node);
        nodes.insert(call.code.clone(), node.clone());
        Ok(node)
    }

    fn node_results(&self, node: &Node, operands: &Operands<'_>, limit: usize) -> Evaluated<Vec<Tensor>> {
        if !has_evaluator(node) {
            return self.lowered(node, operands, limit);
        }
        let input = |index: usize| node.input(index).and_then(|name| operands.get(name).copied());
        let result = match node.op_type.as_str() {
            "If" => self.branch(node, operands, limit),
            "Loop" => self.repeat(node, operands, limit),
            "Scan" => self.scan(node, operands, limit),
            "NonZero" => select::non_zero(input(0)).map(|tensor| vec![tensor]),
            "Compress" => select::compress(node, input(0), input(1)).map(|tensor| vec![tensor]),
            "Unique" => unique::unique(node, input(0)),
            _ => suppress::non_max_suppression(node, &input).map(|tensor| vec![tensor]),
        };
        result.map_err(|what| format!("{}: {what}", node.site()))
    }

    /// A node that can be lowered when operands are constants: integers are, as far as they are few; if that does not
    /// do, so are floats.
    fn lowered(&self, node: &Node, operands: &Operands<'_>, limit: usize) -> Evaluated<Vec<Tensor>> {
        let mut refused = String::new();
        for all in [false, true] {
            let bindings = constant_bindings(operands, |tensor| all || !tensor.dtype().is_float());
            let inputs = operands.iter().map(|(name, tensor)| static_info(name, tensor)).collect();
            let outputs = node.outputs.iter().filter(|name| !name.is_empty());
            let output =
                |name: &String| ValueInfo { name: name.clone(), value_type: None, metadata: BTreeMap::new() };
            let graph = Graph {
                nodes: vec![node.clone()],
                inputs,
                outputs: outputs.map(output).collect(),
                ..Graph::default()
            };
            let options = ImportOptions { bindings, ..ImportOptions::default() };
            let manner = Manner { may_defer: false, ..Manner::default() };
            match lower_as(bare_model(&node.op_type, graph), &options, manner) {
                Ok(imported) => {
                    let mut results = run_imported(&imported, operands, limit, self)?.into_iter();
                    let named = |name: &String| match name.is_empty() {
                        true => Tensor::zeros(DType::F32, vec![0]).map_err(|e| e.to_string()),
                        false => results.next().ok_or_else(|| "a result is missing".to_owned()),
                    };
                    return node.outputs.iter().map(named).collect();
                }
                Err(error) => refused = body::faults_text(&error),
            }
        }
        Err(refused)
    }
}

/// A model of one graph without files.
pub(crate) fn bare_model(name: &str, graph: Graph) -> Model {
    Model {
        path: name.into(),
        ir_version: *crate::IR_VERSIONS.end(),
        opsets: BTreeMap::new(),
        producer: String::new(),
        graph,
        metadata: BTreeMap::new(),
        device_configurations: Vec::new(),
        storage: crate::Storage::default(),
    }
}

/// A declared type with these dims.
pub(crate) fn tensor_info(name: &str, dtype: DType, shape: Vec<crate::model::Dim>) -> ValueInfo {
    ValueInfo {
        name: name.to_owned(),
        value_type: Some(ValueType::Tensor(TensorType { dtype, shape: Some(shape) })),
        metadata: BTreeMap::new(),
    }
}
