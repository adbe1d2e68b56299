//! Graphs and programs as text.

use super::{literal, op, quote};
use crate::border::{Border, Filling};
use crate::dim::Dim;
use crate::graph::{Graph, Relation};
use crate::spmd::{Spmd, StepKind};
use crate::tensor::Tensor;
use std::fmt::{self, Display};

/// The text of a graph.
pub fn print_graph(graph: &Graph) -> String {
    let mut text = format!("graph {}\n", quote(&graph.name));
    for (name, range) in &graph.symbols {
        text.push_str(&format!("symbol {} {}..{}\n", Dim::symbol(name), range.low, range.high));
    }
    for guard in &graph.guards {
        let relation = match guard.relation {
            Relation::Equal => "==",
            Relation::LessEqual => "<=",
        };
        let reason = quote(&guard.reason);
        text.push_str(&format!("guard {} {relation} {} {reason}\n", guard.left, guard.right));
    }
    for state in &graph.states {
        let (input, output) = (quote(&state.input), quote(&state.output));
        text.push_str(&format!("state {input} -> {output} axis {}\n", state.axis));
    }
    for case in &graph.cases {
        text.push_str(&format!("case {} : {} = {}\n", quote(&case.input), case.ty, case.value));
    }
    for border in &graph.borders {
        let line = match border {
            Border::Stretch { input, axis, filling } => {
                let filling = match filling {
                    Filling::Repeat => "",
                    Filling::Ones => " ones",
                    Filling::Any => " any",
                };
                format!("stretch {} axis {axis}{filling}\n", quote(input))
            }
            Border::Buffer { input, output, axis, total } => {
                format!("buffer {} -> {} axis {axis} total {total}\n", quote(input), quote(output))
            }
            Border::Rounded { input, output, given } => {
                format!("rounded {} -> {} from {given}\n", quote(input), quote(output))
            }
        };
        text.push_str(&line);
    }
    for (value, node) in graph.values() {
        text.push_str(&format!("{value} = {}{} : {}", op::print(&node.op), operands(&node.args), node.ty));
        if !node.origin.is_empty() {
            text.push_str(&format!(" @{}", quote(&node.origin)));
        }
        text.push('\n');
    }
    for output in &graph.outputs {
        text.push_str(&format!("output {} {}\n", quote(&output.name), output.value));
    }
    text
}

/// The text of a tensor, such as `f32[2] [1.0, -0.5]`; every bit of it can be read back.
pub fn print_literal(tensor: &Tensor) -> String {
    literal::print(tensor)
}

/// Nothing for leaves, ` (%1, %2)` otherwise.
fn operands<T: Display>(args: &[T]) -> String {
    if args.is_empty() {
        return String::new();
    }
    let text: Vec<String> = args.iter().map(T::to_string).collect();
    format!(" ({})", text.join(", "))
}

/// The text of a program.
pub fn print_program(program: &Spmd) -> String {
    let mut text = print_graph(&program.logical);
    text.push_str(&format!("mesh {:?}\nimported {}\n", program.mesh.0, program.imported));
    for equation in &program.equations {
        let rule = quote(&equation.rule);
        text.push_str(&format!("equation {rule} {} = {}\n", equation.left, equation.right));
    }
    for (i, step) in program.steps.iter().enumerate() {
        let kind = match &step.kind {
            StepKind::Compute => "compute".into(),
            StepKind::Convert(conversion) => op::print_conversion(conversion),
        };
        let (value, layout, args) = (step.value, &step.layout, operands(&step.args));
        text.push_str(&format!("${i} = {value} : {layout} {kind}{args}\n"));
    }
    for output in &program.outputs {
        text.push_str(&format!("result {} {}\n", quote(&output.name), output.step));
    }
    text
}

impl Display for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&print_graph(self))
    }
}

impl Display for Spmd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&print_program(self))
    }
}
