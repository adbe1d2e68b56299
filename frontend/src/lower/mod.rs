//! From a loaded model to the graph of `tpshard_ir`.
//!
//! Nodes are visited in order, each lowered by the function its operator has in [`crate::ops`]. Shape arithmetic never
//! becomes data-flow: sizes are symbolic, values that depend on them only are computed here, and where two sizes have to
//! agree a symbol is replaced. Weights stay unread: what moves them becomes part of their expression. Nodes that cannot
//! be lowered are collected, so that one run names them all.

mod bodies;
mod border;
mod cases;
mod context;
mod defer;
mod elementwise;
mod extents;
mod gather;
mod interface;
mod movement;
mod outputs;
mod sizes;
mod state;
mod stretch;
mod symbols;
mod tables;
mod value;

pub(crate) use context::{Lowered, Lowering, data_dependent, invalid, undecided, unsupported};
pub(crate) use movement::{axes_of, axis_of};
pub(crate) use value::{Affine, Element, KNOWN_LIMIT, Known, Value};

/// True if a tensor of few elements can be a constant of a graph.
pub(crate) fn can_be_known(tensor: &Tensor) -> bool {
    Known::from_tensor(tensor).is_some()
}

pub use cases::{MOST_CHOOSING, import_cases, lower_cases};
pub use outputs::{OutputRequest, OutputRequestError, Part, Selection};
pub use sizes::Equality;
pub use state::Role;

use crate::attributes::AttributeReader;
use crate::error::{ErrorKind, Fault, Faults, LoadError};
use crate::limits::Limits;
use crate::load::load;
use crate::model::{Graph as ModelGraph, Model, Node};
use crate::ops;
use crate::tensor_data::TensorRef;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use tpshard_ir::weight::WeightExpr;
use tpshard_ir::{Graph, Tensor, ValueId};

/// What is wrong with a model that cannot be imported; the same type that loading uses.
pub type ImportError = LoadError;

/// How to import.
#[derive(Clone, Debug, Default)]
pub struct ImportOptions {
    pub limits: Limits,
    /// Inputs with fixed values, which are folded into the graph.
    pub bindings: BTreeMap<String, Tensor>,
    /// What symbols mean, where the inferred meaning is wrong: symbol, role.
    pub roles: BTreeMap<String, Role>,
    /// Which outputs to make, and which part of each; empty for all of all.
    pub outputs: Vec<OutputRequest>,
}

/// An imported model.
#[derive(Debug)]
pub struct Imported {
    pub graph: Graph,
    /// The file: its storage holds the bytes of [`Imported::tensors`].
    pub model: Model,
    /// The tensors that the weight expressions of the graph name.
    pub tensors: BTreeMap<String, TensorRef>,
    pub report: ImportReport,
}

impl Imported {
    /// The bytes of an initializer that a weight expression of the graph names.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn initializer_bytes(&self, name: &str) -> Result<bytes::Bytes, Fault> {
        let tensor = self.tensors.get(name).ok_or_else(|| {
            Fault::invalid("no weight of this name", "use the names of the imported graph").at_value(name)
        })?;
        self.model.storage.bytes(tensor)
    }
}

/// What the import found out besides the graph.
#[derive(Clone, Debug, Default)]
pub struct ImportReport {
    /// Sizes that had to be equal, in the order they were found.
    pub equalities: Vec<Equality>,
    /// What each symbol of the inputs means, where that is known.
    pub roles: BTreeMap<Arc<str>, Role>,
    /// Things about the model a user may want to know.
    pub notes: Vec<String>,
    /// Sizes that data decides, with upper bounds where there are some.
    pub data_bounds: BTreeMap<Arc<str>, Option<tpshard_ir::Dim>>,
    /// Nodes lowered, after inlining.
    pub nodes: usize,
    /// What each named value of the model became: inputs, initializers and results of nodes.
    pub values: BTreeMap<String, Named>,
}

/// What a named value of the model became.
#[derive(Clone, Debug, PartialEq)]
pub enum Named {
    /// A value of the graph.
    Data(ValueId),
    /// Data of the model, moved but not read.
    Weight(WeightExpr),
    /// Nothing that is computed when the model runs: sizes, small constants, what no output needs.
    Folded,
}

/// Loads and lowers the model at `path`.
///
/// # Errors
/// Everything that is wrong with the file, or every node that is not supported.
pub fn import(path: &Path, options: &ImportOptions) -> Result<Imported, ImportError> {
    lower(load(path, &options.limits)?, options)
}

/// Lowers a loaded model.
///
/// # Errors
/// Every node that is not supported or breaks its operator's rules.
pub fn lower(model: Model, options: &ImportOptions) -> Result<Imported, ImportError> {
    lower_as(model, options, Manner::default())
}

/// In what way a model is lowered.
pub(crate) struct Manner {
    /// Whether what depends on data may wait until the model runs; else it is refused.
    pub(crate) may_defer: bool,
    /// Inputs that are taken for these values and stay inputs.
    pub(crate) cases: BTreeMap<String, bool>,
    /// Names of tensors that stand for nothing else.
    pub(crate) tensors: BTreeMap<String, TensorRef>,
}

impl Default for Manner {
    fn default() -> Manner {
        Manner { may_defer: true, cases: BTreeMap::new(), tensors: BTreeMap::new() }
    }
}

/// As [`lower`], in another manner.
pub(crate) fn lower_as(
    model: Model,
    options: &ImportOptions,
    manner: Manner,
) -> Result<Imported, ImportError> {
    let file = model.path.clone();
    let (graph, tensors, report) = {
        let mut lowering = Lowering::new(&model);
        lowering.may_defer = manner.may_defer;
        lowering.cases = manner.cases;
        lowering.tensors = manner.tensors;
        let mut faults = Faults::default();
        let mut report = ImportReport::default();
        lowering.find_state();
        lowering.symbols.given_by_inputs(interface::plain_dims(&model));
        faults.keep(lowering.declare_initializers(&model.graph));
        faults.keep(lowering.declare_inputs(options, &mut report));
        if faults.is_empty() {
            report.nodes = lowering.nodes(&model.graph, &mut faults);
        }
        let mut outputs = None;
        if faults.is_empty() {
            outputs = faults.keep(lowering.outputs(&options.outputs, &mut report));
        }
        finish(faults, &file)?;
        let graph = lowering.finish(outputs.unwrap_or_default(), options, &mut report);
        check_roles(&graph, options).map_err(|fault| LoadError::new(&file, fault))?;
        (graph, lowering.tensors, report)
    };
    Ok(Imported { graph, model, tensors, report })
}

/// Refuses roles for symbols that the graph does not have.
fn check_roles(graph: &Graph, options: &ImportOptions) -> Result<(), Fault> {
    let Some(unknown) = options.roles.keys().find(|name| !graph.symbols.contains_key(name.as_str())) else {
        return Ok(());
    };
    let known: Vec<&str> = graph.symbols.keys().map(|symbol| &**symbol).collect();
    let help = match known.as_slice() {
        [] => "all its sizes are numbers".to_owned(),
        known => format!("its dims are {}", known.join(", ").escape_debug()),
    };
    Err(Fault::request("a role is given to a dim the model does not have", help).at_value(unknown))
}

fn finish(faults: Faults, file: &Path) -> Result<(), ImportError> {
    faults.finish(file).map_err(|mut error| {
        // A broken model is broken whatever else is missing.
        error.faults.sort_by_key(|fault| fault.kind != ErrorKind::Invalid);
        error
    })
}

/// One node with its operands, as an operator's lowering sees it.
pub(crate) struct Call<'a> {
    pub(crate) node: &'a Node,
    inputs: Vec<Option<Value>>,
    pub(crate) attributes: AttributeReader<'a>,
}

impl Call<'_> {
    /// Operand `index`, which the operator cannot do without.
    pub(crate) fn input(&self, index: usize) -> Lowered<&Value> {
        self.optional(index).ok_or_else(|| invalid(format!("input {index} is missing")))
    }

    /// Operand `index`, if it is given.
    pub(crate) fn optional(&self, index: usize) -> Option<&Value> {
        self.inputs.get(index).and_then(Option::as_ref)
    }

    /// All operands, none of which may be absent.
    pub(crate) fn all(&self) -> Lowered<Vec<Value>> {
        (0..self.inputs.len()).map(|index| self.input(index).cloned()).collect()
    }

    pub(crate) fn opset(&self) -> i64 {
        self.node.opset
    }

    /// True if output `index` has a name.
    pub(crate) fn wants(&self, index: usize) -> bool {
        self.node.output(index).is_some()
    }
}

impl Lowering<'_> {
    fn declare_initializers(&mut self, graph: &ModelGraph) -> Lowered<()> {
        for (name, tensor) in &graph.initializers {
            let value = self.stored(name, tensor).map_err(|fault| fault.at_value(name))?;
            self.define(name, value);
        }
        Ok(())
    }

    /// Lowers all nodes of a graph; how many there were.
    fn nodes(&mut self, graph: &ModelGraph, faults: &mut Faults) -> usize {
        let mut count = 0;
        for node in &graph.nodes {
            count += 1;
            // What a node without results does, nobody sees.
            if node.outputs.iter().all(String::is_empty) {
                continue;
            }
            if node.op_type == "If" && node.domain.is_empty() {
                count += self.branch(node, faults);
                continue;
            }
            let lowered = self.node(node);
            match self.or_deferred(node, lowered) {
                Ok(values) => self.define_outputs(node, values, faults),
                Err(fault) => {
                    if let Some(fault) = fault {
                        faults.push(at(node, fault));
                    }
                    self.define_outputs(node, Vec::new(), &mut Faults::default());
                }
            }
        }
        count
    }

    /// The values of one node's outputs; `Err(None)` if an operand failed before.
    fn node(&mut self, node: &Node) -> Result<Vec<Value>, Option<Fault>> {
        if crate::deferred::has_evaluator(node) {
            return Err(Some(data_dependent("the result")));
        }
        let row = ops::find(&node.domain, &node.op_type, node.opset).map_err(Some)?;
        let inputs = self.operands(node)?;
        if inputs.len() > row.inputs {
            let message = format!("{} inputs, the operator has {}", inputs.len(), row.inputs);
            return Err(Some(invalid(message)));
        }
        self.site = node.site().to_string();
        let first = self.graph.len();
        let call = Call { node, inputs, attributes: node.attributes() };
        let values = (row.lower)(self, &call).map_err(Some)?;
        call.attributes.finish().map_err(|error| Some(error.into()))?;
        self.name_origin(node, first);
        Ok(values)
    }

    /// What the inputs of a node stand for.
    fn operands(&self, node: &Node) -> Result<Vec<Option<Value>>, Option<Fault>> {
        let mut inputs = Vec::with_capacity(node.inputs.len());
        for index in 0..node.inputs.len() {
            inputs.push(match node.input(index) {
                None => None,
                Some(name) => match self.lookup(name) {
                    Some(Value::Poison) => return Err(None),
                    Some(value) => Some(value.clone()),
                    None => return Err(Some(invalid("an input is not defined").at_value(name))),
                },
            });
        }
        Ok(inputs)
    }

    /// Says of the values from `first` on that they come from `node`.
    fn name_origin(&mut self, node: &Node, first: usize) {
        let origin = if node.name.is_empty() {
            node.outputs.iter().find(|name| !name.is_empty())
        } else {
            Some(&node.name)
        };
        let origin: &str = origin.map_or("", String::as_str);
        for index in first..self.graph.len() {
            self.graph.set_origin(ValueId(u32::try_from(index).unwrap_or(u32::MAX)), origin);
        }
    }

    fn define_outputs(&mut self, node: &Node, values: Vec<Value>, faults: &mut Faults) {
        let mut values = values.into_iter();
        for index in 0..node.outputs.len() {
            let value = values.next().unwrap_or(Value::Poison);
            let Some(name) = node.output(index) else { continue };
            if matches!(value, Value::Poison) {
                let fault = unsupported(format!("output {index} of this operator is not supported"));
                faults.push(at(node, fault.at_value(name)));
            }
            self.define(name, value);
        }
    }

    /// An `If` whose condition is known: the nodes of the branch that is taken.
    fn branch(&mut self, node: &Node, faults: &mut Faults) -> usize {
        let taken = match self.taken_branch(node) {
            Ok(taken) => taken,
            Err(fault) => {
                match self.or_deferred(node, Err(fault)) {
                    Ok(values) => self.define_outputs(node, values, faults),
                    Err(fault) => {
                        if let Some(fault) = fault {
                            faults.push(at(node, fault));
                        }
                        self.define_outputs(node, Vec::new(), &mut Faults::default());
                    }
                }
                return 0;
            }
        };
        self.push_scope();
        faults.keep(self.declare_initializers(taken));
        let count = self.nodes(taken, faults);
        let values: Vec<Value> = taken
            .outputs
            .iter()
            .map(|output| self.lookup(&output.name).cloned().unwrap_or(Value::Poison))
            .collect();
        self.pop_scope();
        let mut ignored = Faults::default();
        let complete = values.iter().all(|value| !matches!(value, Value::Poison));
        self.define_outputs(node, values, if complete { faults } else { &mut ignored });
        count
    }

    /// The outputs of a graph inside a node, for these inputs: its nodes in the node's place.
    pub(crate) fn inlined(&mut self, graph: &ModelGraph, inputs: &[Value]) -> Lowered<Vec<Value>> {
        if graph.inputs.len() != inputs.len() {
            let message = format!("a graph of {} inputs is given {}", graph.inputs.len(), inputs.len());
            return Err(invalid(message));
        }
        let mut faults = Faults::default();
        self.push_scope();
        for (info, value) in graph.inputs.iter().zip(inputs) {
            self.define(&info.name, value.clone());
        }
        faults.keep(self.declare_initializers(graph));
        self.nodes(graph, &mut faults);
        let result =
            |output: &crate::model::ValueInfo| self.lookup(&output.name).cloned().unwrap_or(Value::Poison);
        let results: Vec<Value> = graph.outputs.iter().map(result).collect();
        self.pop_scope();
        let fault = faults.finish("").err().and_then(|error| error.faults.into_iter().next());
        match fault {
            Some(fault) => Err(fault),
            None if results.iter().any(|value| matches!(value, Value::Poison)) => {
                Err(invalid("an output of a graph is not defined"))
            }
            None => Ok(results),
        }
    }

    fn taken_branch<'a>(&self, node: &'a Node) -> Result<&'a ModelGraph, Option<Fault>> {
        let condition = node.input(0).and_then(|name| self.lookup(name));
        let condition = condition.ok_or_else(|| Some(invalid("an If without condition")))?;
        if matches!(condition, Value::Poison) {
            return Err(None);
        }
        let known = self.known(condition).and_then(|known| known.single().and_then(Element::integer));
        let Some(known) = known else { return Err(Some(data_dependent("the condition of an If"))) };
        let attributes = node.attributes();
        let name = if known != 0 { "then_branch" } else { "else_branch" };
        attributes.required_graph(name).map_err(|error| Some(error.into()))
    }
}

/// Says which node a fault is about, unless it says so already.
fn at(node: &Node, fault: Fault) -> Fault {
    if fault.site.node.is_some() { fault } else { fault.at_node(node.site()) }
}
