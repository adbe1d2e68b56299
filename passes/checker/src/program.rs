//! The program as a whole: the graph it speaks of, its equations, its steps, its outputs.

use crate::congruence::Classes;
use crate::conversion::conversion_fault;
use crate::equations::{Executor, How};
use crate::finding::{Finding, Report};
use crate::square::square_fault;
use std::collections::HashMap;
use std::sync::Arc;
use tpshard_ir::graph::SymbolRange;
use tpshard_ir::{
    AxisLayout, Conversion, Graph, Layout, Monoid, Node, Op, Spmd, Step, StepId, StepKind, Type, ValueId,
    infer,
};

/// Most ranks a program may have.
const MAX_RANKS: usize = 1024;

/// Checks that `program` computes `imported`.
///
/// # Errors
/// Everything that is wrong, in the order of the program.
pub fn check(program: &Spmd, imported: &Graph) -> Result<Report, Vec<Finding>> {
    let mut findings = structure(program);
    if !findings.is_empty() {
        // Nothing below can rely on indices.
        return Err(findings);
    }
    findings.extend(same_model(program, imported));
    findings.extend(types(&program.logical, program.imported));
    if !findings.is_empty() {
        return Err(findings);
    }
    let mut report = Report { values: program.logical.len(), ..Report::default() };
    let classes = equations(program, &mut report, &mut findings);
    steps(program, &classes, &mut report, &mut findings);
    outputs(program, &classes, &mut findings);
    if findings.is_empty() { Ok(report) } else { Err(findings) }
}

/// References that point nowhere or forwards.
fn structure(program: &Spmd) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut wrong = |what: String| findings.push(Finding::Program { what });
    let mesh = &program.mesh.0;
    let ranks = mesh.iter().try_fold(1usize, |n, &axis| n.checked_mul(axis));
    if mesh.is_empty() || ranks.is_none_or(|n| n == 0 || n > MAX_RANKS) {
        wrong(format!("a mesh of {}, 1 to {MAX_RANKS} ranks are supported", program.mesh));
    }
    if program.imported > program.logical.len() {
        wrong(format!("{} imported values of {}", program.imported, program.logical.len()));
    }
    for (id, node) in program.logical.values() {
        if let Some(arg) = node.args.iter().find(|a| **a >= id) {
            wrong(format!("{id} uses {arg}, which does not come before it"));
        }
    }
    let values = program.logical.len();
    for (i, equation) in program.equations.iter().enumerate() {
        if equation.left.index() >= values || equation.right.index() >= values {
            wrong(format!("equation {i} names a value that does not exist"));
        }
    }
    for (i, step) in program.steps.iter().enumerate() {
        if step.value.index() >= values {
            wrong(format!("${i} makes {}, which does not exist", step.value));
        }
        if let Some(arg) = step.args.iter().find(|a| a.index() >= i) {
            wrong(format!("${i} uses {arg}, which does not come before it"));
        }
    }
    let outputs = program.logical.outputs.iter().map(|o| o.value.index() >= values);
    if outputs.chain(program.outputs.iter().map(|o| o.step.index() >= program.steps.len())).any(|bad| bad) {
        wrong("an output names something that does not exist".into());
    }
    findings
}

/// The imported prefix is the imported graph.
fn same_model(program: &Spmd, imported: &Graph) -> Vec<Finding> {
    let logical = &program.logical;
    let mut findings = Vec::new();
    let mut wrong = |what: &str| findings.push(Finding::Program { what: what.into() });
    if program.imported != imported.len() {
        wrong("it was made from a model with another number of values");
        return findings;
    }
    if logical.outputs != imported.outputs {
        wrong("its outputs are not those of the model");
    }
    // An entry may be for some of the model's dims only.
    let within = |(name, range): (&Arc<str>, &SymbolRange)| {
        let whole = imported.symbols.get(name);
        whole.is_some_and(|w| w.low <= range.low && range.low <= range.high && range.high <= w.high)
    };
    let narrowed = logical.symbols.len() == imported.symbols.len() && logical.symbols.iter().all(within);
    if logical.guards != imported.guards || !narrowed {
        wrong("its dims are not those of the model");
    }
    if logical.states != imported.states {
        wrong("its state is not that of the model");
    }
    if logical.cases != imported.cases {
        wrong("it is for other values of the model's inputs");
    }
    if logical.borders != imported.borders {
        wrong("it takes other inputs for those of the model");
    }
    for ((value, own), other) in logical.values().zip(imported.nodes()) {
        if own != other {
            let what = "is not what the model has there".into();
            findings.push(Finding::Value { value, op: own.op.name().into(), what });
        }
    }
    findings
}

/// Every type is what inference gives, and nothing but the model brings inputs.
fn types(logical: &Graph, imported: usize) -> Vec<Finding> {
    let fault = |id: ValueId, node: &Node| match &node.op {
        Op::Convert(_) => Some("a conversion is not a logical value".to_string()),
        Op::Input { name } => {
            let known = logical.nodes().iter().take(imported);
            let same = |n: &Node| n.op == node.op && n.ty == node.ty;
            (id.index() >= imported && !known.clone().any(same))
                .then(|| format!("the model has no input `{name}` of type {}", node.ty))
        }
        op => {
            let args: Vec<&Type> = node.args.iter().map(|&a| logical.ty(a)).collect();
            match infer(op, &args) {
                Ok(ty) if ty == node.ty => None,
                Ok(ty) => Some(format!("has type {}, inference gives {ty}", node.ty)),
                Err(error) => Some(error.to_string()),
            }
        }
    };
    logical
        .values()
        .filter_map(|(value, node)| {
            fault(value, node).map(|what| Finding::Value { value, op: node.op.name().into(), what })
        })
        .collect()
}

/// The classes that the equations give, each equation justified by those before it.
fn equations(program: &Spmd, report: &mut Report, findings: &mut Vec<Finding>) -> Classes {
    let mut classes = Classes::new(&program.logical);
    let mut executor = Executor::new(&program.logical);
    for (index, equation) in program.equations.iter().enumerate() {
        let (left, right) = (equation.left, equation.right);
        report.equations += 1;
        if classes.equal(left, right) {
            report.implied_equations += 1;
            continue;
        }
        match executor.justify(&classes, &equation.rule, left, right) {
            Ok(How::Field) => report.executed_in_field += 1,
            Ok(How::Reals) => report.executed_in_reals += 1,
            Ok(How::Before) => {}
            Err(what) => {
                let rule = equation.rule.to_string();
                findings.push(Finding::Equation { index, rule, left, right, what });
                continue;
            }
        }
        classes.join(left, right);
    }
    classes
}

fn steps(program: &Spmd, classes: &Classes, report: &mut Report, findings: &mut Vec<Finding>) {
    let mut squares = Squares { program, known: HashMap::new() };
    for (i, step) in program.steps.iter().enumerate() {
        let found = match &step.kind {
            StepKind::Compute => {
                report.squares += 1;
                computes(program, classes, step, &mut squares)
            }
            StepKind::Convert(conversion) => {
                report.conversions += 1;
                converts(program, classes, step, conversion)
            }
        };
        if let Some(what) = found {
            let op = match &step.kind {
                StepKind::Compute => program.logical.node(step.value).op.name(),
                StepKind::Convert(conversion) => conversion.name(),
            };
            let step = StepId(u32::try_from(i).unwrap_or(u32::MAX));
            findings.push(Finding::Step { step, op: op.into(), what });
        }
    }
    report.distinct_squares = squares.known.len();
}

/// All that a verdict on a square depends on: operation, types, layouts of operands and result.
type SquareKey<'a> = (&'a Op, Vec<&'a Type>, Vec<&'a Layout>, &'a Layout);

/// Verdicts on squares.
struct Squares<'a> {
    program: &'a Spmd,
    known: HashMap<SquareKey<'a>, Option<String>>,
}

impl<'a> Squares<'a> {
    fn fault(&mut self, step: &'a Step, layouts: Vec<&'a Layout>) -> Option<String> {
        let node = self.program.logical.node(step.value);
        let mut types: Vec<&Type> = node.args.iter().map(|&a| self.program.logical.ty(a)).collect();
        types.push(&node.ty);
        let mesh = &self.program.mesh;
        let key = (&node.op, types.clone(), layouts.clone(), &step.layout);
        self.known
            .entry(key)
            .or_insert_with(|| {
                types.pop();
                square_fault(&node.op, &types, &layouts, &node.ty, &step.layout, mesh)
            })
            .clone()
    }
}

/// Why a step that computes is wrong.
fn computes<'a>(
    program: &'a Spmd,
    classes: &Classes,
    step: &'a Step,
    squares: &mut Squares<'a>,
) -> Option<String> {
    let node = program.logical.node(step.value);
    if node.args.len() != step.args.len() {
        return Some(format!("has {} operands, {} has {}", step.args.len(), step.value, node.args.len()));
    }
    for (i, (arg, &needed)) in step.args.iter().zip(&node.args).enumerate() {
        let found = program.steps[arg.index()].value;
        if !classes.equal(found, needed) {
            return Some(format!("operand {i} is a family of {found}, not known to equal {needed}"));
        }
        if program.logical.ty(found) != program.logical.ty(needed) {
            return Some(format!("operand {i} has type {}", program.logical.ty(found)));
        }
    }
    let layouts = step.args.iter().map(|a| &program.steps[a.index()].layout).collect();
    squares.fault(step, layouts)
}

/// Why a step that converts is wrong.
fn converts(program: &Spmd, classes: &Classes, step: &Step, conversion: &Conversion) -> Option<String> {
    let [arg] = step.args.as_slice() else {
        return Some(format!("a conversion has one operand, not {}", step.args.len()));
    };
    let source = &program.steps[arg.index()];
    let (from, to) = (program.logical.ty(source.value), program.logical.ty(step.value));
    if let Conversion::TreeReduce { axes, axis, unit } = conversion {
        return tree_reduces(program, classes, step, source, axes, *axis, unit);
    }
    if !classes.equal(source.value, step.value) || from != to {
        return Some(format!("converts {}, which is not known to equal {}", source.value, step.value));
    }
    conversion_fault(conversion, to, &source.layout, &step.layout, &program.mesh)
}

/// A tree reduction computes a sum over a dim that its axes split; what other axes split stays.
fn tree_reduces(
    program: &Spmd,
    classes: &Classes,
    step: &Step,
    source: &Step,
    axes: &[usize],
    axis: usize,
    unit: &tpshard_ir::Dim,
) -> Option<String> {
    let node = program.logical.node(step.value);
    let sums = matches!(&node.op, Op::Reduce { monoid: Monoid::Sum, axes } if axes.as_slice() == [axis])
        && classes.equal(node.args[0], source.value);
    if !sums {
        return Some(format!("{} is not the sum of {} over dim {axis}", step.value, source.value));
    }
    // What is left is gathering the dim, and reducing what every rank then has.
    let gather = Conversion::AllGather { axes: axes.to_vec(), dim: axis, unit: unit.clone() };
    let ty = program.logical.ty(source.value);
    let gathered = step.layout.clone();
    conversion_fault(&gather, ty, &source.layout, &gathered, &program.mesh)
        .or_else(|| square_fault(&node.op, &[ty], &[&gathered], &node.ty, &step.layout, &program.mesh))
}

/// Every output of the model is there, decodes without arithmetic, and state comes back as it went in.
fn outputs(program: &Spmd, classes: &Classes, findings: &mut Vec<Finding>) {
    let mut wrong = |name: &str, what: String| findings.push(Finding::Output { name: name.into(), what });
    if program.outputs.len() != program.logical.outputs.len() {
        wrong("*", format!("{} of {} outputs", program.outputs.len(), program.logical.outputs.len()));
    }
    for (own, logical) in program.outputs.iter().zip(&program.logical.outputs) {
        let step = &program.steps[own.step.index()];
        if own.name != logical.name {
            wrong(&own.name, format!("is where `{}` should be", logical.name));
        } else if !classes.equal(step.value, logical.value) {
            wrong(&own.name, format!("is {}, not known to equal {}", step.value, logical.value));
        } else if step.layout.0.iter().any(|axis| matches!(axis, AxisLayout::Partial(_))) {
            wrong(&own.name, format!("is partial: {}", step.layout));
        }
    }
    for state in &program.logical.states {
        let is_input = |step: &&Step| {
            step.kind == StepKind::Compute
                && matches!(&program.logical.node(step.value).op, Op::Input { name } if *name == state.input)
        };
        let Some(output) = program.outputs.iter().find(|o| o.name == state.output) else { continue };
        let layout = &program.steps[output.step.index()].layout;
        if let Some(step) = program.steps.iter().filter(is_input).find(|s| s.layout != *layout) {
            wrong(
                &state.output,
                format!("leaves as {layout}, but `{}` enters as {}", state.input, step.layout),
            );
        }
    }
}
