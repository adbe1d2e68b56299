//! Graphs and programs from text.

use super::TextError;
use super::scan::{Parsed, Scanner};
use crate::border::{Border, Filling};
use crate::dim::Dim;
use crate::graph::{Case, Graph, Guard, Node, Output, Relation, StatePair, SymbolRange, ValueId};
use crate::layout::{AxisLayout, Layout, Mesh};
use crate::spmd::{Equation, Spmd, SpmdOutput, Step, StepId, StepKind};
use crate::tensor::Tensor;
use std::str::FromStr;
use std::sync::Arc;

/// A graph from its text.
///
/// # Errors
/// The first place where the text is not a graph.
pub fn parse_graph(text: &str) -> Result<Graph, TextError> {
    let mut scanner = Scanner::new(text);
    let graph = scanner.graph()?;
    if scanner.at_end() { Ok(graph) } else { Err(scanner.expected("a node, `output` or the end")) }
}

/// A program from its text.
///
/// # Errors
/// The first place where the text is not a program.
pub fn parse_program(text: &str) -> Result<Spmd, TextError> {
    let mut scanner = Scanner::new(text);
    let program = scanner.program()?;
    if scanner.at_end() { Ok(program) } else { Err(scanner.expected("a step, `result` or the end")) }
}

/// A tensor from text such as `f32[2] [1.0, -0.5]`.
///
/// # Errors
/// The first place where the text is not a tensor.
pub fn parse_literal(text: &str) -> Result<Tensor, TextError> {
    let mut scanner = Scanner::new(text);
    let tensor = scanner.literal()?;
    if scanner.at_end() { Ok(tensor) } else { Err(scanner.expected("the end")) }
}

/// A dim from text such as `4*seq + floordiv(past, 2)`.
///
/// # Errors
/// The first place where the text is not a dim.
pub fn parse_dim(text: &str) -> Result<Dim, TextError> {
    let mut scanner = Scanner::new(text);
    let dim = scanner.dim()?;
    if scanner.at_end() { Ok(dim) } else { Err(scanner.expected("the end")) }
}

impl FromStr for Graph {
    type Err = TextError;

    fn from_str(text: &str) -> Result<Graph, TextError> {
        parse_graph(text)
    }
}

impl FromStr for Spmd {
    type Err = TextError;

    fn from_str(text: &str) -> Result<Spmd, TextError> {
        parse_program(text)
    }
}

impl Scanner<'_> {
    fn graph(&mut self) -> Parsed<Graph> {
        self.need_word("graph")?;
        let mut graph = Graph::new(&self.string()?);
        while self.eat_word("symbol") {
            self.symbol(&mut graph)?;
        }
        while self.eat_word("guard") {
            graph.guards.push(self.guard()?);
        }
        while self.eat_word("state") {
            let input = self.string()?.into();
            self.need("->")?;
            let output = self.string()?.into();
            self.need_word("axis")?;
            graph.states.push(StatePair { input, output, axis: self.number()? });
        }
        while self.eat_word("case") {
            let input = self.string()?.into();
            self.need(":")?;
            let ty = self.ty()?;
            self.need("=")?;
            graph.cases.push(Case { input, ty, value: self.boolean()? });
        }
        while let Some(border) = self.border()? {
            graph.borders.push(border);
        }
        while self.peek("%") {
            let node = self.node(graph.len())?;
            graph.push(node);
        }
        while self.eat_word("output") {
            graph.outputs.push(Output { name: self.string()?.into(), value: self.value()? });
        }
        Ok(graph)
    }

    fn border(&mut self) -> Parsed<Option<Border>> {
        if self.eat_word("stretch") {
            let input = self.string()?.into();
            self.need_word("axis")?;
            let axis = self.number()?;
            let filling = match () {
                () if self.eat_word("ones") => Filling::Ones,
                () if self.eat_word("any") => Filling::Any,
                () => Filling::Repeat,
            };
            return Ok(Some(Border::Stretch { input, axis, filling }));
        }
        if self.eat_word("rounded") {
            let input = self.string()?.into();
            self.need("->")?;
            let output = self.string()?.into();
            self.need_word("from")?;
            return Ok(Some(Border::Rounded { input, output, given: self.dtype()? }));
        }
        if !self.eat_word("buffer") {
            return Ok(None);
        }
        let input = self.string()?.into();
        self.need("->")?;
        let output = self.string()?.into();
        self.need_word("axis")?;
        let axis = self.number()?;
        self.need_word("total")?;
        Ok(Some(Border::Buffer { input, output, axis, total: self.dim()? }))
    }

    fn symbol(&mut self, graph: &mut Graph) -> Parsed<()> {
        let start = self.place();
        // Not a dim: `-` after it starts the range.
        let name: Arc<str> = match self.peek("`") {
            true => self.quoted('`')?.into(),
            false => self.word("a symbol")?.into(),
        };
        let low = self.signed()?;
        self.need("..")?;
        let range = SymbolRange { low, high: self.signed()? };
        if graph.symbols.insert(name.clone(), range).is_some() {
            return Err(self.error_at(start, format!("expected a new symbol, `{name}` has a range already")));
        }
        Ok(())
    }

    fn guard(&mut self) -> Parsed<Guard> {
        let left = self.dim()?;
        let relation = if self.eat("==") {
            Relation::Equal
        } else if self.eat("<=") {
            Relation::LessEqual
        } else {
            return Err(self.expected("`==` or `<=`"));
        };
        Ok(Guard { left, relation, right: self.dim()?, reason: self.string()?.into() })
    }

    fn node(&mut self, index: usize) -> Parsed<Node> {
        self.index("%", index)?;
        let op = self.op()?;
        let args = if self.peek("(") { self.list("(", ")", Scanner::value)? } else { Vec::new() };
        self.need(":")?;
        let ty = self.ty()?;
        let origin = if self.eat("@") { self.string()? } else { String::new() };
        Ok(Node { op, args, ty, origin: origin.into() })
    }

    /// `%7 =` or `$7 =`, which must count up.
    fn index(&mut self, mark: &str, index: usize) -> Parsed<()> {
        let start = self.place();
        self.need(mark)?;
        if self.number::<usize>()? != index {
            return Err(self.error_at(start, format!("expected `{mark}{index}`")));
        }
        self.need("=")
    }

    fn value(&mut self) -> Parsed<ValueId> {
        self.need("%")?;
        self.number().map(ValueId)
    }

    fn step_id(&mut self) -> Parsed<StepId> {
        self.need("$")?;
        self.number().map(StepId)
    }

    fn program(&mut self) -> Parsed<Spmd> {
        let logical = self.graph()?;
        self.need_word("mesh")?;
        let mesh = Mesh(self.list("[", "]", Scanner::number)?);
        self.need_word("imported")?;
        let imported = self.number()?;
        let (equations, steps, outputs) = (Vec::new(), Vec::new(), Vec::new());
        let mut program = Spmd { mesh, logical, imported, equations, steps, outputs };
        while self.eat_word("equation") {
            let rule = self.string()?.into();
            let left = self.value()?;
            self.need("=")?;
            program.equations.push(Equation { rule, left, right: self.value()? });
        }
        while self.peek("$") {
            let step = self.step(program.steps.len())?;
            program.steps.push(step);
        }
        while self.eat_word("result") {
            program.outputs.push(SpmdOutput { name: self.string()?.into(), step: self.step_id()? });
        }
        Ok(program)
    }

    fn step(&mut self, index: usize) -> Parsed<Step> {
        self.index("$", index)?;
        let value = self.value()?;
        self.need(":")?;
        let layout = self.layout()?;
        let kind =
            if self.eat_word("compute") { StepKind::Compute } else { StepKind::Convert(self.conversion()?) };
        let args = if self.peek("(") { self.list("(", ")", Scanner::step_id)? } else { Vec::new() };
        Ok(Step { value, layout, kind, args })
    }

    /// Axis layouts with `·` between them; none for a mesh without axes.
    fn layout(&mut self) -> Parsed<Layout> {
        let mut axes = Vec::new();
        while matches!(self.peek_word(), "R" | "S" | "P") {
            axes.push(self.axis_layout()?);
            if !self.eat("·") {
                return Ok(Layout(axes));
            }
        }
        if axes.is_empty() { Ok(Layout(axes)) } else { Err(self.expected("`R`, `S(…)` or `P(…)`")) }
    }

    fn axis_layout(&mut self) -> Parsed<AxisLayout> {
        if self.eat_word("R") {
            return Ok(AxisLayout::Replicated);
        }
        let partial = self.eat_word("P");
        if !partial {
            self.need_word("S")?;
        }
        self.need("(")?;
        let layout = if partial {
            AxisLayout::Partial(self.monoid()?)
        } else {
            let dim = self.number()?;
            let unit = if self.eat(",") { self.dim()? } else { 1i64.into() };
            AxisLayout::Shard { dim, unit }
        };
        self.need(")")?;
        Ok(layout)
    }
}
