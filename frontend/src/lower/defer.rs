//! Nodes that cannot be lowered because data decides a shape: they wait until the model runs.
//!
//! What the result's rank and element type are is said by the operator ([`super::extents`]), or by the model where it
//! declares the type of the value. Fixed dims that it declares are believed, and checked when the value is made. Extents
//! that nothing says are new symbols, defined by the value.

use super::extents::{Extent, Ranked};
use super::interface::{LARGEST, plain};
use super::{Faults, ImportOptions, ImportReport, Known, Lowering, Value, undecided};
use crate::deferred::{encode, has_evaluator, lift_initializers, operand_names, tensor_info};
use crate::error::{ErrorKind, Fault};
use crate::model::{self, Graph as ModelGraph, Model, Node};
use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};
use tpshard_ir::{DType, DeferredCall, Dim, Evaluator, Graph, Op, SymbolRange, Tensor, Type, ValueId};

/// Evaluates selections among constants at import.
static EVALUATOR: LazyLock<crate::deferred::OnnxEvaluator> = LazyLock::new(Default::default);
/// Most elements of a selection that is made at import.
const FOLDED: usize = super::KNOWN_LIMIT;

impl Lowering<'_> {
    /// What became of a node; if it could not be lowered because data decides a shape, values that wait for it.
    pub(super) fn or_deferred(
        &mut self,
        node: &Node,
        lowered: Result<Vec<Value>, Option<Fault>>,
    ) -> Result<Vec<Value>, Option<Fault>> {
        let fault = match lowered {
            Err(Some(fault)) if fault.kind == ErrorKind::DataDependent => fault,
            other => return other,
        };
        if !self.may_defer {
            return Err(Some(fault));
        }
        let first = self.graph.len();
        self.site = node.site().to_string();
        let values = self.deferred(node, &fault)?;
        self.name_origin(node, first);
        Ok(values)
    }

    fn deferred(&mut self, node: &Node, fault: &Fault) -> Result<Vec<Value>, Option<Fault>> {
        let inputs = self.operands(node)?;
        if node.op_type == "If" && node.subgraphs().any(|branch| !branch.inputs.is_empty()) {
            return Err(Some(super::invalid("a branch of an If has inputs")));
        }
        self.check_body(node, &inputs).map_err(Some)?;
        self.probe_fault = None;
        if let Some(values) = self.selected(node, &inputs) {
            return Ok(values);
        }
        let mut types = self.extents(node, &inputs);
        types.resize(node.outputs.len().max(types.len()), None);
        for (index, ranked) in types.iter_mut().enumerate() {
            let Some(name) = node.output(index) else { continue };
            *ranked = self.with_declared(name, ranked.take());
            if ranked.is_none() {
                return Err(Some(unknown_rank(fault, self.probe_fault.take())));
            }
        }
        let (call, args) = self.call(node)?;
        let mut values = Vec::with_capacity(node.outputs.len());
        for (index, ranked) in types.into_iter().enumerate().take(node.outputs.len()) {
            let (Some(name), Some(ranked)) = (node.output(index), ranked) else {
                values.push(Value::Poison);
                continue;
            };
            let ty = self.defined_type(name, ranked, counts(node));
            let op = Op::Deferred { call: call.clone(), output: index, ty };
            values.push(Value::Data(self.add(op, &args).map_err(Some)?));
        }
        Ok(values)
    }

    /// A selection among constants is one.
    fn selected(&mut self, node: &Node, inputs: &[Option<Value>]) -> Option<Vec<Value>> {
        if !has_evaluator(node) || node.subgraphs().next().is_some() {
            return None;
        }
        let mut tensors = Vec::new();
        for name in operand_names(node) {
            let at = node.inputs.iter().position(|input| *input == name)?;
            tensors.push(self.known(inputs.get(at)?.as_ref()?)?.to_tensor()?);
        }
        let call = DeferredCall {
            name: node.op_type.as_str().into(),
            code: encode(node, &self.model.storage).ok()?.into(),
        };
        let operands: Vec<&Tensor> = tensors.iter().collect();
        let results = EVALUATOR.evaluate(&call, &operands, FOLDED).ok()?;
        results.iter().map(|tensor| Some(Value::Known(Arc::new(Known::from_tensor(tensor)?)))).collect()
    }

    /// The node as a call, and its operands: inputs, then what its subgraphs use.
    fn call(&mut self, node: &Node) -> Result<(Arc<DeferredCall>, Vec<ValueId>), Option<Fault>> {
        let mut node = node.clone();
        node.metadata.clear();
        node.device_configurations.clear();
        let prefix = node.outputs.iter().find(|name| !name.is_empty()).cloned().unwrap_or_default();
        let mut lifted = BTreeMap::new();
        for (name, tensor) in lift_initializers(&mut node, &prefix) {
            let value = self.stored(&name, &tensor).map_err(Some)?;
            lifted.insert(name, value);
        }
        let mut args = Vec::new();
        for name in operand_names(&node) {
            let value = lifted.get(&name).or_else(|| self.lookup(&name)).cloned();
            let value =
                value.ok_or_else(|| Some(super::invalid("an outer value is not defined").at_value(&name)))?;
            if matches!(value, Value::Poison) {
                return Err(None);
            }
            args.push(self.data(&value).map_err(|fault| Some(fault.at_value(&name)))?);
        }
        let code = encode(&node, &self.model.storage).map_err(Some)?;
        let call = DeferredCall { name: node.op_type.as_str().into(), code: code.into() };
        Ok((Arc::new(call), args))
    }

    /// What the operator says of a result, completed by what the model says.
    fn with_declared(&self, name: &str, ranked: Option<Ranked>) -> Option<Ranked> {
        let declared = self.declared(name);
        let Some(mut ranked) = ranked else {
            let declared = declared?;
            let believed = !self.only_leaves(name);
            let extent = |dim| if believed { declared_extent(dim) } else { Extent::Open(None) };
            let extents = declared.shape.as_ref()?.iter().map(extent).collect();
            return Some(Ranked { dtype: declared.dtype, extents });
        };
        let believed = declared.filter(|_| !self.only_leaves(name));
        let shape = believed.and_then(|ty| ty.shape.as_ref()).filter(|s| s.len() == ranked.extents.len());
        for (extent, dim) in ranked.extents.iter_mut().zip(shape.into_iter().flatten()) {
            if matches!(extent, Extent::Open(_))
                && let Extent::Is(size) = declared_extent(dim)
            {
                *extent = Extent::Is(size);
            }
        }
        Some(ranked)
    }

    /// True for outputs of the model that no node reads. Nothing is computed from their declared dims, which tools that
    /// edit models leave behind.
    fn only_leaves(&self, name: &str) -> bool {
        let graph = &self.model.graph;
        let read = |node: &Node| operand_names(node).iter().any(|operand| operand == name);
        graph.outputs.iter().any(|output| output.name == name) && !graph.nodes.iter().any(read)
    }

    fn declared(&self, name: &str) -> Option<&model::TensorType> {
        let graph = &self.model.graph;
        let output = graph.outputs.iter().find(|output| output.name == name);
        if let Some(ty) = output.and_then(model::ValueInfo::tensor_type).filter(|ty| ty.shape.is_some()) {
            return Some(ty);
        }
        match graph.value_types.get(name) {
            Some(model::ValueType::Tensor(ty)) => Some(ty),
            _ => None,
        }
    }

    /// The type of a result, with new symbols for what data decides.
    fn defined_type(&mut self, name: &str, ranked: Ranked, counts: bool) -> Type {
        let shape = ranked.extents.into_iter().enumerate().map(|(axis, extent)| match extent {
            Extent::Is(dim) => dim,
            Extent::Open(most) => {
                let dim = self.symbols.defined_by_data(&format!("{}.{axis}", plain(name)), counts);
                if let Some(symbol) = dim.as_symbol() {
                    self.data_bounds.insert(symbol.clone(), most);
                }
                dim
            }
        });
        let shape = shape.collect();
        Type::new(ranked.dtype, shape)
    }

    /// Ranges of the sizes that data decides, as far as the graph has them.
    pub(super) fn declare_data_symbols(&mut self, graph: &mut Graph, report: &mut ImportReport) {
        let mut used = std::collections::BTreeSet::new();
        for node in graph.nodes() {
            used.extend(node.ty.shape.iter().flat_map(Dim::symbols));
        }
        for (symbol, most) in std::mem::take(&mut self.data_bounds) {
            if !used.contains(&symbol) || graph.symbols.contains_key(&symbol) {
                continue;
            }
            let most = most.map(|dim| self.current(&dim));
            let high = most.as_ref().and_then(Dim::as_const).unwrap_or(LARGEST).clamp(0, LARGEST);
            graph.symbols.insert(symbol.clone(), SymbolRange { low: 0, high });
            report.data_bounds.insert(symbol, most);
        }
    }

    /// The types that a subgraph gives for inputs of these types. Dims that data inside decides, or that are not those
    /// of the inputs, are none.
    pub(super) fn probe(
        &mut self,
        graph: &ModelGraph,
        inputs: &[Type],
    ) -> Option<Vec<(DType, Vec<Option<Dim>>)>> {
        self.probes = self.probes.checked_sub(1)?;
        let declare = |name: &str, ty: &Type| {
            let dim = |dim: &Dim| match dim.as_const() {
                Some(size) => u64::try_from(size).map_or(model::Dim::Unknown, model::Dim::Known),
                None => model::Dim::Symbol(dim.to_string()),
            };
            tensor_info(name, ty.dtype, ty.shape.iter().map(dim).collect())
        };
        let mut infos = Vec::new();
        let mut options = ImportOptions::default();
        for (info, ty) in graph.inputs.iter().zip(inputs) {
            infos.push(declare(&info.name, ty));
        }
        for name in crate::deferred::captured(graph) {
            let value = self.lookup(&name)?.clone();
            if matches!(value, Value::Poison) {
                return None;
            }
            infos.push(declare(&name, &self.ty(&value)));
            if let Some(tensor) = self.known(&value).and_then(|known| known.to_tensor()) {
                options.bindings.insert(name, tensor);
            }
        }
        let outer: Vec<Arc<str>> = self.symbols.names();
        let model = Model {
            graph: ModelGraph { inputs: infos, ..graph.clone() },
            opsets: self.model.opsets.clone(),
            storage: self.model.storage.clone(),
            ..crate::deferred::bare_model("subgraph", ModelGraph::default())
        };
        let mut inner = Lowering::new(&model);
        (inner.probes, inner.changing) = (self.probes, self.changing);
        let types = inner.probed(&options);
        (self.probes, self.changing) = (inner.probes, inner.changing);
        self.probe_fault = inner.probe_fault.take();
        let known = |dim: &Dim| {
            dim.symbols().iter().all(|s| outer.contains(s)) && !inner.symbols.depends_on_data(dim)
        };
        let shape = |ty: Type| {
            let shape = ty.shape.into_iter().map(|dim| Some(dim).filter(|dim| known(dim))).collect();
            (ty.dtype, shape)
        };
        types.map(|types| types.into_iter().map(shape).collect())
    }

    fn probed(&mut self, options: &ImportOptions) -> Option<Vec<Type>> {
        let graph = &self.model.graph;
        let (mut faults, mut report) = (Faults::default(), ImportReport::default());
        faults.keep(self.declare_initializers(graph));
        faults.keep(self.declare_inputs(options, &mut report));
        self.nodes(graph, &mut faults);
        if let Err(error) = faults.finish("") {
            self.probe_fault = error.faults.into_iter().next();
            return None;
        }
        let value = |output: &model::ValueInfo| match self.lookup(&output.name)? {
            Value::Poison => None,
            value => Some(self.ty(value)),
        };
        graph.outputs.iter().map(value).collect()
    }
}

/// True for operators whose open extents are numbers of things found.
fn counts(node: &Node) -> bool {
    let finds = ["Range", "NonZero", "Compress", "Unique", "NonMaxSuppression"];
    node.domain.is_empty() && finds.contains(&node.op_type.as_str())
}

fn declared_extent(dim: &model::Dim) -> Extent {
    match dim {
        model::Dim::Known(size) => {
            i64::try_from(*size).map_or(Extent::Open(None), |size| Extent::Is(size.into()))
        }
        model::Dim::Symbol(_) | model::Dim::Unknown => Extent::Open(None),
    }
}

/// The refusal of a node whose result has no known rank.
fn unknown_rank(fault: &Fault, inside: Option<Fault>) -> Fault {
    if let Some(inside) = inside {
        let message = format!("{}, and inside {}: {}", fault.message, inside.site, inside.message);
        return Fault { site: fault.site.clone(), ..Fault::unsupported(message, inside.help) };
    }
    let cause = undecided("");
    let help = if fault.help == cause.help {
        "declare the shape of its result, e.g. with onnx.shape_inference".to_owned()
    } else {
        format!("{}; or declare the shape of its result, e.g. with onnx.shape_inference", fault.help)
    };
    let message = format!("{}, and nothing says the rank of the result", fault.message);
    Fault { site: fault.site.clone(), ..Fault::unsupported(message, help) }
}
