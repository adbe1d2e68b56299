//! The state of one lowering: the graph so far, the names and what they stand for, and the sizes found equal.
//!
//! Operators build through this: [`Lowering::add`] appends an operation whose type `tpshard_ir::infer` decides, and the
//! helpers around it broadcast, fold and unify sizes first. Equal operations on equal operands are one node.

use super::sizes::Finding;
use super::symbols::Symbols;
use super::value::{Affine, Element, Known, Value, read_weight};
use crate::error::Fault;
use crate::model::Model;
use crate::tensor_data::TensorRef;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use tpshard_ir::op::Literal;
use tpshard_ir::weight::WeightExpr;
use tpshard_ir::{DType, Dim, Graph, Guard, Op, Scalar, Tensor, Type, ValueId};

/// Most elements computed while folding constants, over the whole import.
const FOLD_BUDGET: usize = 1 << 22;

/// Most subgraphs looked into for the types of their results, over the whole import.
const PROBE_LIMIT: usize = 10_000;

/// Most nodes of the imported graph.
const NODE_LIMIT: usize = 4_000_000;

pub(crate) type Lowered<T> = Result<T, Fault>;

/// The model breaks its operator's rules.
pub(crate) fn invalid(message: impl Into<String>) -> Fault {
    Fault::invalid(message, "the model breaks the operator's specification; export it again")
}

/// The operator or form is not supported.
pub(crate) fn unsupported(message: impl Into<String>) -> Fault {
    Fault::unsupported(message, "export the model without it, or with another exporter or opset")
}

/// A value that decides shapes is only known at run time.
pub(crate) fn data_dependent(what: &str) -> Fault {
    Fault::data_dependent(
        format!("{what} depends on data, not only on the sizes of the inputs"),
        "fix the input that decides it with --bind input=value, or export the model so that it is constant",
    )
}

/// Only the sizes of a run decide it.
pub(crate) fn undecided(message: impl Into<String>) -> Fault {
    Fault::data_dependent(message, "export the model without it, or with another exporter or opset")
}

/// Everything an operator's lowering may use.
pub(crate) struct Lowering<'m> {
    pub(crate) model: &'m Model,
    pub(crate) graph: Graph,
    pub(crate) symbols: Symbols,
    pub(super) findings: Vec<Finding>,
    pub(super) guards: Vec<Guard>,
    /// Innermost last.
    pub(super) scopes: Vec<HashMap<String, Value>>,
    /// Names of scopes that were left.
    inner: Vec<(String, Value)>,
    /// Tensors that weight expressions name: initializers, and constants lifted out of nodes.
    pub(crate) tensors: BTreeMap<String, TensorRef>,
    /// Equal operations on equal operands.
    pub(super) seen: HashMap<(Op, Vec<ValueId>), ValueId>,
    fold_budget: usize,
    /// Whether what depends on data may wait until the model runs.
    pub(crate) may_defer: bool,
    /// Inputs that are taken for these values and stay inputs.
    pub(super) cases: BTreeMap<String, bool>,
    /// How many more subgraphs may be looked into.
    pub(crate) probes: usize,
    /// How many extents were found that change from round to round of a loop.
    pub(crate) changing: usize,
    /// What kept the last subgraph from saying the types of its results.
    pub(crate) probe_fault: Option<Fault>,
    /// Upper bounds of sizes that data decides, where there are some.
    pub(crate) data_bounds: BTreeMap<Arc<str>, Option<Dim>>,
    /// The node being lowered, for the reasons of guards.
    pub(crate) site: String,
    /// Graph inputs that are state by name; a concatenation onto one is an append.
    pub(crate) state_inputs: BTreeMap<String, String>,
    /// Operands rounded to 8 bits in blocks of a size, for the products that share them.
    pub(crate) rounded: HashMap<(ValueId, usize), ValueId>,
}

impl<'m> Lowering<'m> {
    pub(crate) fn new(model: &'m Model) -> Lowering<'m> {
        Lowering {
            model,
            graph: Graph::new(&model.graph.name),
            symbols: Symbols::default(),
            findings: Vec::new(),
            guards: Vec::new(),
            scopes: vec![HashMap::new()],
            inner: Vec::new(),
            tensors: BTreeMap::new(),
            seen: HashMap::new(),
            fold_budget: FOLD_BUDGET,
            may_defer: true,
            cases: BTreeMap::new(),
            probes: PROBE_LIMIT,
            changing: 0,
            probe_fault: None,
            data_bounds: BTreeMap::new(),
            site: String::new(),
            state_inputs: BTreeMap::new(),
            rounded: HashMap::new(),
        }
    }

    // Names.

    pub(crate) fn define(&mut self, name: &str, value: Value) {
        if let Some(scope) = self.scopes.last_mut() {
            scope.insert(name.to_owned(), value);
        }
    }

    pub(crate) fn lookup(&self, name: &str) -> Option<&Value> {
        self.scopes.iter().rev().find_map(|scope| scope.get(name))
    }

    pub(crate) fn push_scope(&mut self) {
        self.scopes.push(HashMap::new());
    }

    pub(crate) fn pop_scope(&mut self) {
        self.inner.extend(self.scopes.pop().into_iter().flatten());
    }

    /// What every name stood for; the outermost holds where scopes share one.
    pub(super) fn take_names(&mut self) -> BTreeMap<String, Value> {
        let scopes = std::mem::take(&mut self.scopes).into_iter().rev().flatten();
        std::mem::take(&mut self.inner).into_iter().chain(scopes).collect()
    }

    /// Makes a stored tensor available under a name no other has, as a value that is not read yet.
    pub(crate) fn stored(&mut self, name: &str, tensor: &TensorRef) -> Lowered<Value> {
        let mut unique = name.to_owned();
        while self.tensors.get(&unique).is_some_and(|other| other != tensor) {
            unique.push('\'');
        }
        let shape: Option<Vec<usize>> = tensor.dims.iter().map(|&dim| usize::try_from(dim).ok()).collect();
        let shape = shape
            .ok_or_else(|| Fault::invalid("a dim exceeds the address space", "export the model again"))?;
        let expr = WeightExpr::initializer(unique.clone(), tensor.dtype, shape)
            .map_err(|error| invalid(error.to_string()))?;
        self.tensors.insert(unique, tensor.clone());
        let value = Value::Weight(expr);
        let small_integer = tensor.dtype.class() != tpshard_ir::DTypeClass::Float;
        if (tensor.element_count() == 1 || small_integer)
            && let Some(known) = self.known(&value)
        {
            return Ok(Value::Known(known));
        }
        Ok(value)
    }

    // Types and forms.

    pub(crate) fn ty(&self, value: &Value) -> Type {
        match value {
            Value::Data(id) => self.graph.ty(*id).clone(),
            Value::Weight(expr) => {
                Type::new(expr.dtype(), expr.shape().iter().map(|&extent| Dim::from(extent)).collect())
            }
            Value::Known(known) => Type::new(known.dtype, known.dims()),
            Value::Affine(affine) => Type::new(affine.dtype, affine.shape.clone()),
            Value::Grid(grid) => Type::new(grid.dtype, grid.shape.clone()),
            Value::Poison => Type::new(DType::F32, Vec::new()),
        }
    }

    pub(crate) fn shape(&self, value: &Value) -> Vec<Dim> {
        self.ty(value).shape
    }

    pub(crate) fn dtype(&self, value: &Value) -> DType {
        self.ty(value).dtype
    }

    /// The elements of a value that is small and does not depend on data.
    pub(crate) fn known(&self, value: &Value) -> Option<Arc<Known>> {
        match value {
            Value::Known(known) => Some(known.clone()),
            Value::Affine(affine) => affine.to_known().map(Arc::new),
            Value::Weight(expr) => {
                let find = |name: &str| self.tensors.get(name).cloned();
                read_weight(expr, &find, &self.model.storage).map(Arc::new)
            }
            Value::Data(_) | Value::Grid(_) | Value::Poison => None,
        }
    }

    /// The integer elements of a value that must be known, for shapes, axes and counts.
    pub(crate) fn dims(&self, value: &Value, what: &str) -> Lowered<Vec<Dim>> {
        let Some(known) = self.known(value) else {
            let ty = self.ty(value);
            if !ty.dtype.is_integer() || ty.rank() > 1 {
                return Err(invalid(format!("{what} is {ty}, not integers in one dim")));
            }
            return Err(data_dependent(what));
        };
        if known.shape.len() > 1 {
            return Err(invalid(format!("{what} has the shape {:?}, not one dim", known.shape)));
        }
        let dims: Option<Vec<Dim>> = known.elements.iter().map(|element| element.dim().cloned()).collect();
        dims.ok_or_else(|| invalid(format!("{what} is of type {}, not an integer", known.dtype)))
    }

    /// As [`Lowering::dims`], for what must be constant.
    pub(crate) fn ints(&self, value: &Value, what: &str) -> Lowered<Vec<i64>> {
        let dims = self.dims(value, what)?;
        let ints: Option<Vec<i64>> = dims.iter().map(Dim::as_const).collect();
        ints.ok_or_else(|| undecided(format!("{what} depends on the sizes of the inputs: {dims:?}")))
    }

    /// A single constant number.
    pub(crate) fn number(&self, value: &Value, what: &str) -> Lowered<f64> {
        let known = self.known(value).ok_or_else(|| data_dependent(what))?;
        let single = known.single().and_then(Element::number);
        single.ok_or_else(|| undecided(format!("{what} is not one constant number")))
    }

    // Folding.

    /// Takes `count` elements from the budget for folding; false if it is spent.
    pub(crate) fn may_fold(&mut self, count: usize) -> bool {
        match self.fold_budget.checked_sub(count) {
            Some(rest) if count <= super::value::KNOWN_LIMIT => {
                self.fold_budget = rest;
                true
            }
            _ => false,
        }
    }

    // Building.

    /// Appends an operation, or finds the equal one.
    pub(crate) fn add(&mut self, mut op: Op, args: &[ValueId]) -> Lowered<ValueId> {
        if !self.findings.is_empty() {
            op.for_each_dim_mut(&|dim| *dim = self.current(dim));
        }
        let key = (op, args.to_vec());
        if let Some(&id) = self.seen.get(&key) {
            return Ok(id);
        }
        if self.graph.len() >= NODE_LIMIT {
            let message = format!("the imported graph has more than {NODE_LIMIT} nodes");
            return Err(Fault::resource(message, "split the model"));
        }
        let id = self.graph.add(key.0.clone(), args).map_err(|error| invalid(error.to_string()))?;
        self.seen.insert(key, id);
        Ok(id)
    }

    /// A constant of one element.
    pub(crate) fn scalar(&mut self, dtype: DType, value: f64) -> Lowered<ValueId> {
        let element = if dtype.is_float() { Element::Float(value) } else { Element::int(value as i64) };
        let known = Known::scalar(dtype, element);
        let tensor =
            known.to_tensor().ok_or_else(|| unsupported(format!("a constant {value} of {dtype}")))?;
        self.literal(tensor)
    }

    pub(crate) fn literal(&mut self, tensor: Tensor) -> Lowered<ValueId> {
        self.add(Op::Literal(Literal(Arc::new(tensor))), &[])
    }

    /// The value as data-flow.
    pub(crate) fn data(&mut self, value: &Value) -> Lowered<ValueId> {
        match value {
            Value::Data(id) => Ok(*id),
            Value::Weight(expr) => self.add(Op::Weight(expr.clone()), &[]),
            Value::Known(known) => self.known_data(known),
            Value::Affine(affine) => self.affine_data(affine),
            Value::Grid(grid) => {
                let mut parts = Vec::with_capacity(grid.parts.len());
                for part in &grid.parts {
                    let id = self.affine_data(part)?;
                    let mut shape = self.graph.ty(id).shape.clone();
                    shape.push(Dim::constant(1));
                    parts.push(self.add(Op::Reshape { shape }, &[id])?);
                }
                let axis = grid.shape.len().saturating_sub(1);
                self.add(Op::Concat { axis }, &parts)
            }
            Value::Poison => Err(invalid("an operand could not be made")),
        }
    }

    fn known_data(&mut self, known: &Known) -> Lowered<ValueId> {
        if let Some(source) = &known.source
            && known.elements.len() != 1
        {
            return self.add(Op::Weight(source.clone()), &[]);
        }
        if let Some(tensor) = known.to_tensor() {
            return self.literal(tensor);
        }
        // Sizes: one scalar each, joined.
        let mut parts = Vec::with_capacity(known.elements.len());
        for element in &known.elements {
            let scalar = match element {
                Element::Int(dim) => self.add(Op::Size(dim.clone()), &[])?,
                Element::Float(value) => self.scalar(known.dtype, *value)?,
            };
            let scalar = self.cast(scalar, known.dtype)?;
            parts.push(self.add(Op::Reshape { shape: vec![Dim::constant(1)] }, &[scalar])?);
        }
        let joined = match parts.as_slice() {
            [one] => *one,
            _ => self.add(Op::Concat { axis: 0 }, &parts)?,
        };
        self.reshape(joined, &known.dims())
    }

    fn affine_data(&mut self, affine: &Affine) -> Lowered<ValueId> {
        let shape = self.current_all(&affine.shape);
        let rank = shape.len();
        let mut sum: Option<ValueId> = None;
        let mut offset = self.current(&affine.offset);
        for axis in 0..rank {
            let stride = self.current(&affine.strides[axis]);
            if stride.is_zero() || shape[axis].is_one() {
                continue;
            }
            // The offset goes into the first index that counts by one.
            let start = if stride.is_one() {
                std::mem::replace(&mut offset, Dim::constant(0))
            } else {
                Dim::constant(0)
            };
            let mut term = self.add(Op::Iota { start, length: shape[axis].clone() }, &[])?;
            if !stride.is_one() {
                let factor = self.size(&stride)?;
                term = self.map(Scalar::Mul, &[term, factor])?;
            }
            let mut expanded = vec![Dim::constant(1); rank];
            expanded[axis] = shape[axis].clone();
            let term = self.reshape(term, &expanded)?;
            sum = Some(match sum {
                None => term,
                Some(sum) => self.map(Scalar::Add, &[sum, term])?,
            });
        }
        let total = match sum {
            None => self.size(&offset)?,
            Some(sum) if offset.is_zero() => sum,
            Some(sum) => {
                let offset = self.size(&offset)?;
                self.map(Scalar::Add, &[sum, offset])?
            }
        };
        let total = self.cast(total, affine.dtype)?;
        self.broadcast(total, &shape)
    }

    /// A size as a rank-0 `i64`.
    pub(crate) fn size(&mut self, dim: &Dim) -> Lowered<ValueId> {
        match dim.as_const() {
            Some(value) => self.literal(Tensor::scalar(value)),
            None => self.add(Op::Size(dim.clone()), &[]),
        }
    }

    /// A size as a scalar of any type.
    pub(crate) fn size_as(&mut self, dim: &Dim, dtype: DType) -> Lowered<ValueId> {
        match dim.as_const() {
            Some(value) => self.scalar(dtype, value as f64),
            None => {
                let size = self.size(dim)?;
                self.cast(size, dtype)
            }
        }
    }

    pub(crate) fn cast(&mut self, value: ValueId, dtype: DType) -> Lowered<ValueId> {
        if self.graph.ty(value).dtype == dtype {
            return Ok(value);
        }
        self.add(Op::Map(Scalar::Cast(dtype)), &[value])
    }

    /// An elementwise function of data; sizes are unified, nothing is folded.
    pub(crate) fn map(&mut self, scalar: Scalar, args: &[ValueId]) -> Lowered<ValueId> {
        let shapes: Vec<Vec<Dim>> = args.iter().map(|&arg| self.graph.ty(arg).shape.clone()).collect();
        match self.broadcast_shapes(&shapes) {
            Ok(_) => self.add(Op::Map(scalar), args),
            Err(fault) => {
                let held = self.held_operands(args, fault)?;
                self.add(Op::Map(scalar), &held)
            }
        }
    }

    /// `f(x, constant)` in the type of `x`.
    pub(crate) fn map_number(&mut self, scalar: Scalar, x: ValueId, number: f64) -> Lowered<ValueId> {
        let number = self.scalar(self.graph.ty(x).dtype, number)?;
        self.map(scalar, &[x, number])
    }

    pub(crate) fn reshape(&mut self, value: ValueId, shape: &[Dim]) -> Lowered<ValueId> {
        let shape = self.current_all(shape);
        if self.graph.ty(value).shape == shape {
            return Ok(value);
        }
        // A view of a view is a view of the first.
        let (value, node) = (value, self.graph.node(value));
        let value = match (&node.op, node.args.as_slice()) {
            (Op::Reshape { .. }, [source]) => *source,
            _ => value,
        };
        if self.graph.ty(value).shape == shape {
            return Ok(value);
        }
        self.add(Op::Reshape { shape }, &[value])
    }

    pub(crate) fn transpose(&mut self, value: ValueId, perm: &[usize]) -> Lowered<ValueId> {
        if perm.iter().enumerate().all(|(at, &axis)| at == axis) && perm.len() == self.graph.ty(value).rank()
        {
            return Ok(value);
        }
        self.add(Op::Transpose { perm: perm.to_vec() }, &[value])
    }

    pub(crate) fn broadcast(&mut self, value: ValueId, shape: &[Dim]) -> Lowered<ValueId> {
        let from = self.graph.ty(value).shape.clone();
        let target = self.broadcast_shapes(&[from.clone(), shape.to_vec()])?;
        if self.graph.ty(value).shape == target {
            return Ok(value);
        }
        self.add(Op::Broadcast { shape: target }, &[value])
    }

    pub(crate) fn slice(
        &mut self,
        value: ValueId,
        axis: usize,
        start: Dim,
        length: Dim,
        step: i64,
    ) -> Lowered<ValueId> {
        let whole = start.is_zero() && step == 1 && self.graph.ty(value).shape.get(axis) == Some(&length);
        if whole {
            return Ok(value);
        }
        self.add(Op::Slice { axis, start, length, step }, &[value])
    }

    pub(crate) fn reduce(
        &mut self,
        monoid: tpshard_ir::Monoid,
        value: ValueId,
        axes: &[usize],
    ) -> Lowered<ValueId> {
        if axes.is_empty() {
            return Ok(value);
        }
        self.add(Op::Reduce { monoid, axes: axes.to_vec() }, &[value])
    }

    /// Sum over `axes` divided by the number of elements.
    pub(crate) fn mean(&mut self, value: ValueId, axes: &[usize]) -> Lowered<ValueId> {
        let ty = self.graph.ty(value).clone();
        let count = Dim::product(axes.iter().filter_map(|&axis| ty.shape.get(axis)));
        let sum = self.reduce(tpshard_ir::Monoid::Sum, value, axes)?;
        let count = self.size_as(&count, ty.dtype)?;
        self.map(Scalar::Div, &[sum, count])
    }
}
