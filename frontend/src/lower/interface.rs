//! The graph's inputs, and what becomes of the lowered nodes at the end: only what the outputs need is kept.

use super::context::{Lowered, Lowering, invalid};
use super::state;
use super::value::{KNOWN_LIMIT, Known, Value};
use super::{ImportOptions, ImportReport, Named};
use crate::error::Fault;
use crate::model::{self, Model, ValueInfo};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tpshard_ir::{Dim, Graph, Op, Output, SymbolRange, Tensor, Type, ValueId};

/// The largest size a symbol may have; products of a few of them stay inside 64 bits.
pub(super) const LARGEST: i64 = i32::MAX as i64;

const EXPORT_TYPES: &str = "export the model with the types of its inputs";

impl Lowering<'_> {
    /// Defines the graph inputs, bound ones as constants.
    pub(super) fn declare_inputs(
        &mut self,
        options: &ImportOptions,
        report: &mut ImportReport,
    ) -> Lowered<()> {
        let model = self.model;
        let known: Vec<&str> =
            model.graph.inputs.iter().chain(&model.graph.defaults).map(|input| input.name.as_str()).collect();
        if let Some(name) = options.bindings.keys().find(|name| !known.contains(&name.as_str())) {
            let help = format!("the inputs are {}", known.join(", ").escape_debug());
            return Err(
                Fault::request("a value is bound to an input the model does not have", help).at_value(name)
            );
        }
        for input in &model.graph.inputs {
            let ty = self.input_type(input)?;
            let value = match options.bindings.get(&input.name) {
                None => self.given(&input.name, ty),
                Some(tensor) => self.bound(&ty, tensor).map_err(|fault| fault.at_value(&input.name))?,
            };
            self.define(&input.name, value);
        }
        for input in &model.graph.defaults {
            if let Some(tensor) = options.bindings.get(&input.name) {
                let ty = self.input_type(input)?;
                let value = self.bound(&ty, tensor).map_err(|fault| fault.at_value(&input.name))?;
                self.define(&input.name, value);
            } else {
                report.notes.push(format!(
                    "input {} has a default value and is treated as a constant",
                    crate::error::quote(&input.name)
                ));
            }
        }
        Ok(())
    }

    /// An input that is given when the model runs. One that chooses between graphs is known in each of them.
    fn given(&mut self, name: &str, ty: Type) -> Value {
        let shape = vec![1; ty.rank()];
        let known = self.cases.get(name).and_then(|&value| {
            let tensor = Tensor::new(shape, tpshard_ir::Data::Bool(vec![value])).ok()?;
            Known::from_tensor(&tensor)
        });
        let input = self.graph.input(name, ty);
        known.map_or(Value::Data(input), |known| Value::Known(Arc::new(known)))
    }

    fn input_type(&mut self, input: &ValueInfo) -> Lowered<Type> {
        let declared = match &input.value_type {
            Some(model::ValueType::Tensor(tensor)) => tensor,
            Some(model::ValueType::Other(what)) => {
                let message = format!("the input is a {what}, not a tensor");
                return Err(
                    Fault::unsupported(message, "keep such values outside the model").at_value(&input.name)
                );
            }
            None => return Err(Fault::invalid("the input has no type", EXPORT_TYPES).at_value(&input.name)),
        };
        let Some(dims) = &declared.shape else {
            let message = "the rank of the input is not declared";
            return Err(Fault::unsupported(message, EXPORT_TYPES).at_value(&input.name));
        };
        let mut shape = Vec::with_capacity(dims.len());
        for (axis, dim) in dims.iter().enumerate() {
            let fallback = format!("{}_dim{axis}", plain(&input.name));
            shape.push(match dim {
                model::Dim::Known(size) => {
                    let size = i64::try_from(*size).ok().filter(|&size| size <= LARGEST);
                    let size = size.ok_or_else(|| {
                        let message = format!("dim {axis} of the input is larger than {LARGEST}");
                        Fault::unsupported(message, "no such tensor can be computed with")
                            .at_value(&input.name)
                    })?;
                    Dim::constant(size)
                }
                model::Dim::Symbol(name) => self.symbols.declared(name, &fallback),
                model::Dim::Unknown => self.symbols.symbol(&fallback),
            });
        }
        Ok(Type::new(declared.dtype, shape))
    }

    fn bound(&mut self, ty: &Type, tensor: &Tensor) -> Lowered<Value> {
        // One value is meant for an input of one element, however many dims that has.
        let one = tensor.shape().is_empty() && ty.shape.iter().all(|dim| dim.as_const() == Some(1));
        let reshaped = one.then(|| Tensor::new(vec![1; ty.rank()], tensor.data().clone()).ok()).flatten();
        let tensor = reshaped.as_ref().unwrap_or(tensor);
        let shape: Vec<Dim> = tensor.shape().iter().map(|&extent| Dim::from(extent)).collect();
        if tensor.dtype() != ty.dtype || shape.len() != ty.rank() {
            let found = Type::new(tensor.dtype(), shape);
            return Err(Fault::request(
                format!("the bound value is {found}, the input {ty}"),
                "bind a value of its type",
            ));
        }
        for (own, bound) in ty.shape.iter().zip(&shape) {
            let own = self.current(own);
            self.unify(&own, bound)?;
        }
        let known = Known::from_tensor(tensor).filter(|known| known.elements.len() <= KNOWN_LIMIT);
        let known = known.ok_or_else(|| {
            Fault::request(
                format!("values of more than {KNOWN_LIMIT} elements cannot be bound"),
                "feed it as an input",
            )
        })?;
        Ok(Value::Known(Arc::new(known)))
    }

    /// The finished graph: inputs in their order, then what the outputs need.
    pub(super) fn finish(
        &mut self,
        outputs: Vec<Output>,
        options: &ImportOptions,
        report: &mut ImportReport,
    ) -> Graph {
        self.graph.outputs = outputs;
        let (mut graph, moved) = prune(&self.graph);
        graph.guards = self.take_guards();
        graph.states = self.state_pairs(&graph);
        graph.borders = self.borders(&graph);
        self.graph = Graph::default();
        report.values =
            self.take_names().into_iter().map(|(name, value)| (name, named(&value, &moved))).collect();
        let inputs: Vec<Type> = graph.inputs().map(|(_, _, ty)| ty.clone()).collect();
        for name in self.symbols.names() {
            let used = inputs.iter().flat_map(|ty| &ty.shape).any(|dim| dim.symbols().contains(&name));
            if used {
                graph.symbols.insert(name, SymbolRange { low: 0, high: LARGEST });
            }
        }
        self.declare_data_symbols(&mut graph, report);
        report.equalities = self.take_equalities();
        report.roles = state::roles(&graph, &options.roles);
        graph
    }

    /// Makes sure that the declared element type is that of `value`, unifying sizes that inputs declare too. Declared
    /// dims that contradict what is computed are noted and not believed: nothing is computed from them, tools that edit
    /// models leave old ones behind, and ONNX Runtime does the same.
    pub(super) fn check_declared(
        &mut self,
        name: &str,
        value: ValueId,
        report: &mut ImportReport,
    ) -> Lowered<()> {
        let declared = self.model.graph.outputs.iter().find(|output| output.name == name);
        let Some(declared) = declared.and_then(ValueInfo::tensor_type).cloned() else { return Ok(()) };
        let found = self.graph.ty(value).clone();
        let made_by =
            self.model.graph.nodes.iter().find(|node| node.outputs.iter().any(|output| output == name));
        let constant = made_by.is_none_or(|node| node.op_type == "Constant")
            && matches!(self.graph.node(value).op, Op::Literal(_) | Op::Weight(_));
        if declared.dtype != found.dtype && constant {
            // ONNX Runtime goes by the constant.
            let name = crate::error::quote(name);
            report.notes.push(format!("output {name} is declared as {declared} and is {found}"));
            return Ok(());
        }
        if declared.dtype != found.dtype {
            let message = format!("the output is declared as {declared} and computed as {found}");
            return Err(invalid(message).at_value(name));
        }
        let Some(shape) = declared.shape.as_ref() else { return Ok(()) };
        if shape.len() != found.rank() {
            // Exporters write no dims where they know none, and seldom know those of control flow.
            let name = crate::error::quote(name);
            report.notes.push(format!("output {name} is declared as {declared} and is {found}"));
            return Ok(());
        }
        let of_inputs = self.symbols.names();
        for (axis, dim) in shape.iter().enumerate() {
            let found = self.graph.ty(value).shape[axis].clone();
            match dim {
                model::Dim::Known(size) => {
                    let size = Dim::constant(i64::try_from(*size).unwrap_or(i64::MAX));
                    if found.as_const().is_some() && found != size {
                        report.notes.push(format!(
                            "dim {axis} of output {} is declared as {size} and is {found}",
                            crate::error::quote(name)
                        ));
                    }
                }
                model::Dim::Symbol(symbol) if of_inputs.iter().any(|known| **known == **symbol) => {
                    let declared = self.current(&Dim::symbol(symbol));
                    let solvable = declared.as_symbol().is_some_and(|own| !found.symbols().contains(own));
                    if declared == found {
                        continue;
                    }
                    // A name on an output is no reason to take two dims of inputs for one.
                    let other = found.as_symbol().is_some();
                    if !solvable
                        || other
                        || found.as_const().is_some()
                        || self.symbols.depends_on_data(&found)
                    {
                        report.notes.push(format!(
                            "dim {axis} of output {} is declared as {declared} and is {found}",
                            crate::error::quote(name)
                        ));
                        continue;
                    }
                    self.site = format!("output {}", crate::error::quote(name));
                    self.unify(&declared, &found)?;
                }
                model::Dim::Symbol(_) | model::Dim::Unknown => {}
            }
        }
        Ok(())
    }
}

/// The names that are a dim of an input by themselves.
pub(super) fn plain_dims(model: &Model) -> BTreeSet<String> {
    let shapes = model.graph.inputs.iter().filter_map(|input| input.tensor_type()?.shape.as_ref());
    let name = |dim: &model::Dim| match dim {
        model::Dim::Symbol(name) => Some(name.trim().to_owned()),
        model::Dim::Known(_) | model::Dim::Unknown => None,
    };
    shapes.flatten().filter_map(name).collect()
}

/// A name that can stand in dim expressions.
pub(super) fn plain(name: &str) -> String {
    let mut plain: String =
        name.chars().take(64).map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    if !plain.starts_with(|c: char| c.is_ascii_alphabetic()) {
        plain.insert(0, 'i');
    }
    plain
}

/// What became of a name's value.
fn named(value: &Value, moved: &[Option<ValueId>]) -> Named {
    match value {
        Value::Data(id) => moved.get(id.index()).copied().flatten().map_or(Named::Folded, Named::Data),
        Value::Weight(expr) => Named::Weight(expr.clone()),
        Value::Known(known) => known.source.clone().map_or(Named::Folded, Named::Weight),
        Value::Affine(_) | Value::Grid(_) | Value::Poison => Named::Folded,
    }
}

/// Adds what defines the sizes that needed values have, with what it is computed from.
fn need_definers(graph: &Graph, needed: &mut [bool]) {
    let mut known: BTreeSet<Arc<str>> = BTreeSet::new();
    for (_, _, ty) in graph.inputs() {
        known.extend(ty.shape.iter().flat_map(Dim::symbols));
    }
    let mut definer: BTreeMap<Arc<str>, ValueId> = BTreeMap::new();
    for (id, node) in graph.values().filter(|(_, node)| matches!(node.op, Op::Deferred { .. })) {
        for symbol in node.ty.shape.iter().flat_map(Dim::symbols).filter(|s| !known.contains(s)) {
            definer.entry(symbol).or_insert(id);
        }
    }
    if definer.is_empty() {
        return;
    }
    // What defines a size comes before what has it, so one pass from the end finds all.
    for (id, node) in graph.values().rev() {
        if !needed[id.index()] {
            continue;
        }
        node.args.iter().for_each(|arg| needed[arg.index()] = true);
        for symbol in node.symbols() {
            if let Some(&value) = definer.get(&symbol) {
                needed[value.index()] = true;
            }
        }
    }
}

/// The inputs and what the outputs depend on, in the same order, and where each value went.
fn prune(graph: &Graph) -> (Graph, Vec<Option<ValueId>>) {
    let mut needed = vec![false; graph.len()];
    for output in &graph.outputs {
        needed[output.value.index()] = true;
    }
    for (id, node) in graph.values().rev() {
        if needed[id.index()] {
            node.args.iter().for_each(|arg| needed[arg.index()] = true);
        }
    }
    need_definers(graph, &mut needed);
    let mut moved: Vec<Option<ValueId>> = vec![None; graph.len()];
    let place = |moved: &[Option<ValueId>], id: ValueId| moved[id.index()].unwrap_or(ValueId(0));
    let mut pruned = Graph::new(&graph.name);
    for (id, node) in graph.values() {
        if needed[id.index()] || matches!(node.op, Op::Input { .. }) {
            let mut node = node.clone();
            node.args.iter_mut().for_each(|arg| *arg = place(&moved, *arg));
            moved[id.index()] = Some(pruned.push(node));
        }
    }
    pruned.outputs = graph.outputs.clone();
    pruned.outputs.iter_mut().for_each(|output| output.value = place(&moved, output.value));
    (pruned, moved)
}
