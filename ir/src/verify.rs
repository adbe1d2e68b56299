//! Verified is a type: a [`Verified<Graph>`] can only be made by [`verify`], so code that takes one need not ask again.
//!
//! Verification collects all errors. Operands come earlier, every type is the inferred one (inputs and conversions
//! declare theirs), names are unique and symbols declared, states name an input and an output that fit, cases an input that nothing
//! reads, borders an axis of an input. For programs [`verify_program`] checks structure only; whether a step's layouts are right is the checker's judgement.

use crate::border::Border;
use crate::dim::Dim;
use crate::dtype::DType;
use crate::graph::{Case, Graph, Node, StatePair, Type, ValueId};
use crate::infer::infer;
use crate::layout::{AxisLayout, Layout, Mesh};
use crate::op::{Conversion, Op};
use crate::spmd::{Spmd, Step, StepKind};
use std::collections::BTreeSet;
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

/// Most ranks of a mesh.
pub const MAX_RANKS: usize = 1024;

/// Something that passed verification.
#[derive(Clone, Debug, PartialEq)]
pub struct Verified<T>(T);

impl<T> Verified<T> {
    pub fn into_inner(self) -> T {
        self.0
    }
}

impl<T> Deref for Verified<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

/// What is wrong, and with what.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
#[error("{place}: {what}")]
pub struct VerifyError {
    /// A node with its operation and origin, a step, or a part of the header.
    pub place: String,
    pub what: String,
}

/// All that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifyErrors(pub Vec<VerifyError>);

impl fmt::Display for VerifyErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, error) in self.0.iter().enumerate() {
            write!(f, "{}{error}", if i == 0 { "" } else { "\n" })?;
        }
        Ok(())
    }
}

impl std::error::Error for VerifyErrors {}

#[derive(Default)]
struct Errors(Vec<VerifyError>);

impl Errors {
    fn add(&mut self, place: impl fmt::Display, what: impl fmt::Display) {
        self.0.push(VerifyError { place: place.to_string(), what: what.to_string() });
    }

    fn finish<T>(self, value: T) -> Result<Verified<T>, VerifyErrors> {
        if self.0.is_empty() { Ok(Verified(value)) } else { Err(VerifyErrors(self.0)) }
    }
}

/// Checks a graph.
///
/// # Errors
/// Everything that is wrong with it.
pub fn verify(graph: Graph) -> Result<Verified<Graph>, VerifyErrors> {
    let mut errors = Errors::default();
    check_graph(&graph, &mut errors);
    errors.finish(graph)
}

/// Checks the structure of a program: its logical graph, that every id exists and comes earlier, operand counts, and that
/// layouts and conversions fit the mesh and the values' ranks.
///
/// # Errors
/// Everything that is wrong with it.
pub fn verify_program(program: Spmd) -> Result<Verified<Spmd>, VerifyErrors> {
    let errors = check_program(&program);
    errors.finish(program)
}

/// As [`verify_program`], of a program that stays where it is.
pub(crate) fn check(program: &Spmd) -> Result<(), VerifyErrors> {
    check_program(program).finish(()).map(|_| ())
}

fn check_program(program: &Spmd) -> Errors {
    let mut errors = Errors::default();
    check_graph(&program.logical, &mut errors);
    let ranks = program.mesh.0.iter().try_fold(1usize, |n, &extent| n.checked_mul(extent));
    if ranks.is_none_or(|n| n == 0 || n > MAX_RANKS) {
        errors.add("mesh", format!("{} has not 1 to {MAX_RANKS} ranks", program.mesh));
    }
    if program.imported > program.logical.len() {
        errors.add("imported", format!("{} of {} nodes", program.imported, program.logical.len()));
    }
    for equation in &program.equations {
        for value in [equation.left, equation.right] {
            if value.index() >= program.logical.len() {
                errors.add(format!("equation `{}`", equation.rule), format!("{value} does not exist"));
            }
        }
    }
    for (i, step) in program.steps.iter().enumerate() {
        check_step(program, i, step, &mut errors);
    }
    check_definitions(program, &mut errors);
    let mut names = BTreeSet::new();
    for output in &program.outputs {
        let place = format!("result `{}`", output.name);
        if output.step.index() >= program.steps.len() {
            errors.add(&place, format!("{} does not exist", output.step));
        }
        if !names.insert(&output.name) {
            errors.add(&place, "is named twice");
        }
    }
    errors
}

/// Sizes that data decides are known before anything has them.
fn check_definitions(program: &Spmd, errors: &mut Errors) {
    let mut open = program.logical.data_symbols();
    if open.is_empty() {
        return;
    }
    for (index, step) in program.steps.iter().enumerate() {
        let Some(node) = program.logical.nodes().get(step.value.index()) else { continue };
        if matches!(node.op, Op::Deferred { .. }) {
            node.ty.shape.iter().flat_map(Dim::symbols).for_each(|symbol| {
                open.remove(&symbol);
            });
        }
        if let Some(symbol) = node.symbols().into_iter().find(|symbol| open.contains(symbol)) {
            let what = format!("has the size `{symbol}`, which no earlier step defines");
            errors.add(format!("${index} = {} {}", step.value, node.op.name()), what);
        }
    }
}

fn check_graph(graph: &Graph, errors: &mut Errors) {
    for (value, node) in graph.values() {
        check_node(graph, value, node, errors);
    }
    check_names(graph, errors);
    for guard in &graph.guards {
        for dim in [&guard.left, &guard.right] {
            check_symbols(graph, dim, &format!("guard `{}`", guard.reason), errors);
        }
    }
    for (name, range) in &graph.symbols {
        if range.low < 0 || range.low > range.high {
            errors.add(format!("symbol `{name}`"), format!("{}..{} holds no sizes", range.low, range.high));
        }
    }
    for state in &graph.states {
        check_state(graph, state, errors);
    }
    for (index, case) in graph.cases.iter().enumerate() {
        check_case(graph, index, case, errors);
    }
    for (index, border) in graph.borders.iter().enumerate() {
        check_border(graph, index, border, errors);
    }
}

fn place(value: ValueId, node: &Node) -> String {
    let origin = if node.origin.is_empty() { String::new() } else { format!(" ({})", node.origin) };
    format!("{value} = {}{origin}", node.op.name())
}

fn check_node(graph: &Graph, value: ValueId, node: &Node, errors: &mut Errors) {
    let place = place(value, node);
    let mut dims: Vec<Dim> = node.ty.shape.clone();
    dims.extend(attribute_dims(&node.op));
    for dim in &dims {
        check_symbols(graph, dim, &place, errors);
    }
    if let Some(dim) = node.ty.shape.iter().find(|d| d.as_const().is_some_and(|c| c < 0)) {
        errors.add(&place, format!("has the negative extent {dim}"));
    }
    if let Some(arg) = node.args.iter().find(|arg| arg.index() >= value.index()) {
        errors.add(&place, format!("operand {arg} does not come earlier"));
        return;
    }
    let types: Vec<&Type> = node.args.iter().map(|&arg| graph.ty(arg)).collect();
    match &node.op {
        Op::Input { .. } => {
            if !types.is_empty() {
                errors.add(&place, "takes no operands");
            }
        }
        Op::Convert(conversion) => {
            for what in conversion_faults(conversion, &types, &node.ty) {
                errors.add(&place, what);
            }
        }
        op => match infer(op, &types) {
            Ok(ty) if ty == node.ty => {}
            Ok(ty) => errors.add(&place, format!("is declared {}, but makes {ty}", node.ty)),
            Err(error) => errors.add(&place, error.what),
        },
    }
}

fn attribute_dims(op: &Op) -> Vec<Dim> {
    let seen = std::cell::RefCell::new(Vec::new());
    op.clone().for_each_dim_mut(&|dim| seen.borrow_mut().push(dim.clone()));
    seen.into_inner()
}

/// Why a conversion cannot turn its operand into a value of type `ty`: it keeps element type and rank.
pub(crate) fn conversion_faults(conversion: &Conversion, args: &[&Type], ty: &Type) -> Vec<String> {
    let &[x] = args else { return vec![format!("takes 1 operand, found {}", args.len())] };
    let kept = x.dtype == ty.dtype && x.rank() == ty.rank();
    let changed = (!kept).then(|| format!("turns {x} into {ty}"));
    let beyond = conversion_dims(conversion).into_iter().find(|&dim| dim >= ty.rank());
    changed.into_iter().chain(beyond.map(|dim| format!("dim {dim} of {ty}"))).collect()
}

/// The tensor dims that a conversion names.
fn conversion_dims(conversion: &Conversion) -> Vec<usize> {
    match conversion {
        Conversion::ShardSlice { dim, .. }
        | Conversion::AllGather { dim, .. }
        | Conversion::ReduceScatter { dim, .. }
        | Conversion::Redeal { dim, .. } => vec![*dim],
        Conversion::AllToAll { from, to, .. } => vec![*from, *to],
        Conversion::TreeReduce { axis, .. } => vec![*axis],
        Conversion::OnlyFirst { .. } | Conversion::AllReduce { .. } | Conversion::Transfer => vec![],
    }
}

fn check_symbols(graph: &Graph, dim: &Dim, place: &str, errors: &mut Errors) {
    for symbol in dim.symbols() {
        if !graph.symbols.contains_key(&symbol) {
            errors.add(place, format!("symbol `{symbol}` of dim `{dim}` is not declared"));
        }
    }
}

fn check_names(graph: &Graph, errors: &mut Errors) {
    let mut inputs: BTreeSet<&Arc<str>> = BTreeSet::new();
    for (value, name, _) in graph.inputs() {
        if !inputs.insert(name) {
            errors.add(place(value, graph.node(value)), format!("a second input is named `{name}`"));
        }
    }
    let mut outputs: BTreeSet<&Arc<str>> = BTreeSet::new();
    for output in &graph.outputs {
        let place = format!("output `{}`", output.name);
        if output.value.index() >= graph.len() {
            errors.add(&place, format!("{} does not exist", output.value));
        }
        if !outputs.insert(&output.name) {
            errors.add(&place, "is named twice");
        }
    }
}

/// Past and present differ at most along the axis that grows.
fn check_state(graph: &Graph, state: &StatePair, errors: &mut Errors) {
    let place = format!("state `{}` -> `{}`", state.input, state.output);
    let past = graph.inputs().find(|(_, name, _)| **name == state.input).map(|(_, _, ty)| ty);
    let present = graph.outputs.iter().find(|output| output.name == state.output);
    let present = present.and_then(|output| graph.nodes().get(output.value.index())).map(|node| &node.ty);
    let (Some(past), Some(present)) = (past, present) else {
        errors.add(&place, "does not name an input and an output");
        return;
    };
    let fits = past.dtype == present.dtype
        && past.rank() == present.rank()
        && state.axis < past.rank()
        && (0..past.rank()).all(|d| d == state.axis || past.shape[d] == present.shape[d]);
    if !fits {
        errors.add(&place, format!("{past} cannot grow into {present} along axis {}", state.axis));
    }
}

/// A case names an input of its type that nothing reads.
fn check_case(graph: &Graph, index: usize, case: &Case, errors: &mut Errors) {
    let place = format!("case `{}`", case.input);
    let one = case.ty.shape.iter().all(|dim| dim.as_const() == Some(1));
    if case.ty.dtype != DType::Bool || !one {
        errors.add(&place, format!("{} is not one bool", case.ty));
    }
    if graph.cases.iter().take(index).any(|other| other.input == case.input) {
        errors.add(&place, "is named twice");
    }
    let Some((value, _, ty)) = graph.inputs().find(|(_, name, _)| **name == case.input) else {
        errors.add(&place, "does not name an input");
        return;
    };
    if *ty != case.ty {
        errors.add(&place, format!("the input is {ty}, not {}", case.ty));
    }
    if graph.values().any(|(_, node)| node.args.contains(&value)) {
        errors.add(&place, "is read, though it was folded");
    }
}

/// A border names an axis of an input that no other does, and the present of a buffer is an output of its type. What is
/// rounded is a float, and its output is one, too.
fn check_border(graph: &Graph, index: usize, border: &Border, errors: &mut Errors) {
    let (input, axis) = (border.input(), border.axis());
    let place = format!("border of input `{input}`");
    if graph.borders.iter().take(index).any(|other| other.input() == input && other.axis() == axis) {
        let what = axis.map_or("its type".into(), |axis| format!("axis {axis}"));
        errors.add(&place, format!("{what} is named twice"));
    }
    let Some((_, _, ty)) = graph.inputs().find(|(_, name, _)| *name == input) else {
        errors.add(&place, "does not name an input");
        return;
    };
    if let Some(axis) = axis.filter(|axis| *axis >= ty.rank()) {
        errors.add(&place, format!("{ty} has no axis {axis}"));
    }
    if let Border::Rounded { output, given, .. } = border {
        let single = |dtype: DType| matches!(dtype, DType::F32 | DType::F16 | DType::BF16);
        let made = graph.outputs.iter().find(|made| made.name == *output);
        let made = made.and_then(|made| graph.nodes().get(made.value.index())).map(|node| node.ty.dtype);
        if !single(*given) || !single(ty.dtype) || made != Some(ty.dtype) {
            errors.add(&place, format!("{ty} and `{output}` are not given as {given}"));
        }
    }
    if let Border::Buffer { output, total, .. } = border {
        check_symbols(graph, total, &place, errors);
        let made = graph.outputs.iter().find(|made| made.name == *output);
        let made = made.and_then(|made| graph.nodes().get(made.value.index())).map(|node| &node.ty);
        if made.is_none_or(|made| made.dtype != ty.dtype || made.rank() != ty.rank()) {
            errors.add(&place, format!("`{output}` is no output of its type"));
        }
    }
}

fn check_step(program: &Spmd, index: usize, step: &Step, errors: &mut Errors) {
    let Some(node) = program.logical.nodes().get(step.value.index()) else {
        errors.add(format!("${index}"), format!("{} does not exist", step.value));
        return;
    };
    let kind = match &step.kind {
        StepKind::Compute => node.op.name(),
        StepKind::Convert(conversion) => conversion.name(),
    };
    let place = format!("${index} = {} {kind}", step.value);
    check_layout(&step.layout, &program.mesh, &node.ty, &place, errors);
    let mut sources = Vec::with_capacity(step.args.len());
    for arg in &step.args {
        match program.steps.get(arg.index()).filter(|_| arg.index() < index) {
            Some(source) => sources.push(source.value),
            None => errors.add(&place, format!("operand {arg} does not come earlier")),
        }
    }
    if sources.len() != step.args.len() {
        return;
    }
    match &step.kind {
        StepKind::Compute if matches!(node.op, Op::Convert(_)) => {
            errors.add(&place, "computes a conversion");
        }
        StepKind::Compute if sources != node.args => {
            let (found, expected) = (list(&sources), list(&node.args));
            errors.add(&place, format!("computes from {found} instead of {expected}"));
        }
        StepKind::Compute => {}
        StepKind::Convert(conversion) => {
            if sources != [step.value] {
                let found = list(&sources);
                errors.add(&place, format!("converts {found} instead of one family of {}", step.value));
            }
            let axes = conversion.axes();
            let ascending = axes.windows(2).all(|pair| pair[0] < pair[1]);
            if !ascending || axes.iter().any(|&axis| axis >= program.mesh.axes()) {
                errors.add(&place, format!("mesh axes {axes:?} of mesh {}", program.mesh));
            }
            if let Some(dim) = conversion_dims(conversion).into_iter().find(|&dim| dim >= node.ty.rank()) {
                errors.add(&place, format!("dim {dim} of {}", node.ty));
            }
        }
    }
}

fn list(values: &[ValueId]) -> String {
    let text: Vec<String> = values.iter().map(ValueId::to_string).collect();
    format!("({})", text.join(", "))
}

fn check_layout(layout: &Layout, mesh: &Mesh, ty: &Type, place: &str, errors: &mut Errors) {
    if layout.0.len() != mesh.axes() {
        errors.add(place, format!("layout {layout} does not fit mesh {mesh}"));
    }
    for axis in &layout.0 {
        let AxisLayout::Shard { dim, unit } = axis else { continue };
        if *dim >= ty.rank() || unit.as_const().is_some_and(|unit| unit < 1) {
            errors.add(place, format!("layout {layout} of {ty}"));
        }
    }
}

impl fmt::Display for Verified<Graph> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
