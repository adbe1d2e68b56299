//! The rewriting: operands first, every value in its home, casts where they are needed.

use super::facts::{Facts, Source, adds, pads_alike, preserves};
use super::{Narrowed, PrecisionError, is_product, moves};
use half::{bf16, f16};
use std::collections::BTreeMap;
use std::sync::Arc;
use tpshard_ir::border::Border;
use tpshard_ir::graph::{Node, Output};
use tpshard_ir::layout::Monoid;
use tpshard_ir::op::Literal;
use tpshard_ir::{DType, Data, Graph, Op, Scalar, Tensor, Type, ValueId};

/// How deep a constant is made narrow at its weights; what is made of weights in more steps is cast as a whole.
const DEPTH: usize = 64;

/// In which type a value of `f32` is made and stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Home {
    Wide,
    /// Made narrow, of narrow operands.
    Narrow,
    /// Made wide, and stored narrow.
    Rounded,
}

/// A value of the old graph in the new one.
#[derive(Clone, Copy, Debug, Default)]
struct Forms {
    /// With the type it had.
    wide: Option<ValueId>,
    narrow: Option<ValueId>,
}

struct Rewriting<'a> {
    old: &'a Graph,
    new: Graph,
    to: DType,
    facts: Facts,
    forms: Vec<Forms>,
    homes: Vec<Home>,
    products: usize,
}

pub(super) fn rewrite(old: &Graph, to: DType) -> Result<Narrowed, PrecisionError> {
    let mut rewriting = Rewriting {
        old,
        new: Graph::new(&old.name),
        to,
        facts: Facts::of(old, to),
        forms: Vec::with_capacity(old.len()),
        homes: Vec::with_capacity(old.len()),
        products: 0,
    };
    for (value, node) in old.values() {
        rewriting.value(value, node)?;
    }
    rewriting.finish()
}

impl Rewriting<'_> {
    fn value(&mut self, value: ValueId, node: &Node) -> Result<(), PrecisionError> {
        let single = node.ty.dtype == DType::F32;
        let home = if single { self.home(value, node) } else { Home::Wide };
        let mut forms = Forms::default();
        match (&node.op, home) {
            (Op::Input { .. }, Home::Narrow) => {
                let ty = Type::new(self.to, node.ty.shape.clone());
                forms.narrow = Some(self.push(node.op.clone(), vec![], ty, node));
            }
            (Op::Map(Scalar::Cast(to)), _) => match self.cast_form(*to, node) {
                Some(known) => forms = known,
                None => forms.wide = Some(self.operation(node)?),
            },
            (op, Home::Narrow) => {
                forms.narrow = Some(self.narrow_operation(node)?);
                self.products += usize::from(is_product(op));
            }
            (_, Home::Wide) => forms.wide = Some(self.operation(node)?),
            (_, Home::Rounded) => {
                let wide = self.operation(node)?;
                forms.narrow = Some(self.cast(wide, self.to, node)?);
            }
        }
        self.forms.push(forms);
        self.homes.push(home);
        Ok(())
    }

    /// Casts between the two types that values have anyway.
    fn cast_form(&self, to: DType, node: &Node) -> Option<Forms> {
        let &[x] = node.args.as_slice() else { return None };
        let from = self.old.ty(x).dtype;
        if to == self.to && from == DType::F32 {
            // Narrow values of the model itself are of another type than those narrowed here, but no other number.
            let narrow = self.form(x).narrow?;
            return Some(Forms { wide: Some(narrow), narrow: None });
        }
        if to == DType::F32 && from == self.to && self.facts.is(x, Source::Activation) {
            let narrow = self.form(x).wide?;
            return Some(Forms { wide: None, narrow: Some(narrow) });
        }
        None
    }

    fn form(&self, value: ValueId) -> Forms {
        self.forms.get(value.index()).copied().unwrap_or_default()
    }

    fn is_narrow(&self, value: ValueId) -> bool {
        matches!(self.homes.get(value.index()), Some(Home::Narrow | Home::Rounded))
    }

    fn is_single(&self, value: ValueId) -> bool {
        self.old.ty(value).dtype == DType::F32
    }

    /// Constants that may be made narrow.
    fn yields(&self, value: ValueId) -> bool {
        self.facts.is(value, Source::Constant) && self.facts.fits.get(value.index()) == Some(&true)
    }

    /// The home of a value of `f32`.
    fn home(&self, value: ValueId, node: &Node) -> Home {
        let at = |facts: &[bool]| facts.get(value.index()) == Some(&true);
        let activation = self.facts.is(value, Source::Activation);
        let passing = at(&self.facts.passing);
        let first_is_narrow = node.args.first().is_some_and(|&x| self.is_narrow(x));
        let narrow = match &node.op {
            Op::Input { name } => self.old.states.iter().any(|state| state.input == *name),
            _ if !activation => false,
            op if is_product(op) => at(&self.facts.product),
            Op::Gather { .. } => match node.args.first() {
                Some(&table) if self.facts.is(table, Source::Constant) => {
                    self.yields(table) && self.facts.quantised.get(table.index()) != Some(&true)
                }
                _ => first_is_narrow,
            },
            Op::Map(scalar) if adds(*scalar) && !passing => self.is_sum_of_narrow(node),
            Op::Map(scalar) if preserves(*scalar) && !passing => self.chooses_narrow(node),
            Op::Pad { mode, .. } => first_is_narrow && pads_alike(*mode, self.to),
            op if moves(op) => first_is_narrow,
            Op::Concat { .. } => self.joins_narrow(node),
            Op::Reduce { monoid: Monoid::Max | Monoid::Min, .. } | Op::Pool { .. } => first_is_narrow,
            Op::Append { .. } | Op::Norm { .. } | Op::Rotary { .. } => first_is_narrow,
            _ => false,
        };
        let computed = match node.op {
            Op::Map(scalar) => !matches!(scalar, Scalar::Cast(_) | Scalar::Bits(_)),
            Op::Softmax { .. } | Op::Norm { .. } | Op::Rotary { .. } => true,
            _ => false,
        };
        match (narrow, activation && computed && at(&self.facts.multiplied)) {
            (true, _) => Home::Narrow,
            (false, true) => Home::Rounded,
            (false, false) => Home::Wide,
        }
    }

    /// Narrow values of the size of the result, with others of its size or constants.
    fn is_sum_of_narrow(&self, node: &Node) -> bool {
        let whole = |arg: ValueId| self.old.ty(arg).shape == node.ty.shape;
        let some = node.args.iter().any(|&arg| self.is_narrow(arg) && whole(arg));
        let fits = |arg: ValueId| {
            let wide = whole(arg) && self.facts.is(arg, Source::Activation);
            self.yields(arg) || self.is_narrow(arg) || wide
        };
        some && node.args.iter().all(|&arg| fits(arg))
    }

    /// Nothing but narrow values and constants to choose from.
    fn chooses_narrow(&self, node: &Node) -> bool {
        let floats = || node.args.iter().copied().filter(|&arg| self.is_single(arg));
        floats().any(|arg| self.is_narrow(arg)) && floats().all(|arg| self.is_narrow(arg) || self.yields(arg))
    }

    fn joins_narrow(&self, node: &Node) -> bool {
        let fits =
            |arg: ValueId| self.is_narrow(arg) || self.yields(arg) || self.facts.is(arg, Source::Activation);
        node.args.iter().any(|&arg| self.is_narrow(arg)) && node.args.iter().all(|&arg| fits(arg))
    }

    /// The operation on narrow operands; parameters, tables and masks of composites stay as they are.
    fn narrow_operation(&mut self, node: &Node) -> Result<ValueId, PrecisionError> {
        let narrow = |place: usize| match node.op {
            Op::Norm { .. } | Op::Rotary { .. } => place == 0,
            Op::Attention { .. } => place < 3,
            _ => true,
        };
        let mut args = Vec::with_capacity(node.args.len());
        for (place, &arg) in node.args.iter().enumerate() {
            let takes = self.is_single(arg) && narrow(place);
            args.push(if takes { self.narrow(arg, 0)? } else { self.wide(arg)? });
        }
        self.add(node.op.clone(), args, node)
    }

    /// The operation as it was.
    fn operation(&mut self, node: &Node) -> Result<ValueId, PrecisionError> {
        let args = node.args.iter().map(|&arg| self.wide(arg)).collect::<Result<Vec<_>, _>>()?;
        Ok(self.push(node.op.clone(), args, node.ty.clone(), node))
    }

    /// A value in the type it had.
    fn wide(&mut self, value: ValueId) -> Result<ValueId, PrecisionError> {
        let forms = self.form(value);
        let (None, Some(narrow)) = (forms.wide, forms.narrow) else { return Ok(forms.wide.unwrap_or(value)) };
        let wide = self.cast(narrow, DType::F32, self.old.node(value))?;
        if let Some(forms) = self.forms.get_mut(value.index()) {
            forms.wide = Some(wide);
        }
        Ok(wide)
    }

    /// A value of `f32` in the narrow type. Constants are made narrow where they are stored.
    fn narrow(&mut self, value: ValueId, depth: usize) -> Result<ValueId, PrecisionError> {
        if let Some(narrow) = self.form(value).narrow {
            return Ok(narrow);
        }
        let old = self.old;
        let node = old.node(value);
        let constant = self.facts.is(value, Source::Constant) && depth < DEPTH;
        let stored = match &node.op {
            Op::Weight(expr) => expr.cast(self.to).ok().map(Op::Weight),
            Op::Literal(literal) => narrow_literal(&literal.0, self.to).map(Op::Literal),
            _ => None,
        };
        let narrow = match (stored, &node.op) {
            (Some(stored), _) => self.add(stored, vec![], node)?,
            (None, op) if constant && (moves(op) || matches!(op, Op::Concat { .. })) => {
                let mut args = Vec::with_capacity(node.args.len());
                for &arg in &node.args {
                    args.push(if self.is_single(arg) {
                        self.narrow(arg, depth + 1)?
                    } else {
                        self.wide(arg)?
                    });
                }
                self.add(op.clone(), args, node)?
            }
            (None, _) => {
                let wide = self.wide(value)?;
                self.cast(wide, self.to, node)?
            }
        };
        if let Some(forms) = self.forms.get_mut(value.index()) {
            forms.narrow = Some(narrow);
        }
        Ok(narrow)
    }

    fn cast(&mut self, value: ValueId, to: DType, of: &Node) -> Result<ValueId, PrecisionError> {
        self.add(Op::Map(Scalar::Cast(to)), vec![value], of)
    }

    fn add(&mut self, op: Op, args: Vec<ValueId>, of: &Node) -> Result<ValueId, PrecisionError> {
        let origin = || if of.origin.is_empty() { of.op.name().to_owned() } else { of.origin.to_string() };
        let value =
            self.new.add(op, &args).map_err(|error| PrecisionError::Infer { origin: origin(), error })?;
        self.new.set_origin(value, &of.origin);
        Ok(value)
    }

    fn push(&mut self, op: Op, args: Vec<ValueId>, ty: Type, of: &Node) -> ValueId {
        self.new.push(Node { op, args, ty, origin: of.origin.clone() })
    }

    fn finish(mut self) -> Result<Narrowed, PrecisionError> {
        let old = self.old;
        for output in &old.outputs {
            let held = old.states.iter().any(|state| state.output == output.name);
            let value = match held && self.is_single(output.value) {
                true => self.narrow(output.value, 0)?,
                false => self.wide(output.value)?,
            };
            self.new.outputs.push(Output { name: output.name.clone(), value });
        }
        self.new.guards.clone_from(&old.guards);
        self.new.states.clone_from(&old.states);
        self.new.cases.clone_from(&old.cases);
        self.new.borders.clone_from(&old.borders);
        self.new.symbols.clone_from(&old.symbols);
        let declared: BTreeMap<&str, DType> = old.inputs().map(|(_, name, ty)| (&**name, ty.dtype)).collect();
        for state in &old.states {
            if declared.get(&*state.input) == Some(&DType::F32) {
                let (input, output) = (state.input.clone(), state.output.clone());
                self.new.borders.push(Border::Rounded { input, output, given: DType::F32 });
            }
        }
        let homes = self.forms.iter().zip(&self.homes).map(|(forms, home)| match home {
            Home::Narrow | Home::Rounded => forms.narrow.or(forms.wide),
            Home::Wide => forms.wide.or(forms.narrow),
        });
        let kept = needed(&self.new);
        let place = |value: ValueId| kept.get(value.index()).copied().flatten();
        let either = |forms: &Forms| forms.narrow.and_then(place).or(forms.wide.and_then(place));
        let values = homes
            .zip(&self.forms)
            .map(|(home, forms)| home.and_then(place).or_else(|| either(forms)))
            .collect();
        Ok(Narrowed { graph: without(self.new, &kept), values, products: self.products })
    }
}

/// Where values go when those that nothing needs are gone: what outputs and sizes come from, and all inputs, stay.
fn needed(graph: &Graph) -> Vec<Option<ValueId>> {
    let mut live = vec![false; graph.len()];
    let mut mark = |value: ValueId| live.get_mut(value.index()).map(|slot| *slot = true).unwrap_or_default();
    graph.outputs.iter().map(|output| output.value).for_each(&mut mark);
    graph.definers().into_iter().for_each(&mut mark);
    graph.inputs().map(|(value, ..)| value).for_each(&mut mark);
    for (value, node) in graph.values().rev() {
        if live.get(value.index()) == Some(&true) {
            for arg in &node.args {
                if let Some(slot) = live.get_mut(arg.index()) {
                    *slot = true;
                }
            }
        }
    }
    let mut next = 0;
    let place = |live: bool| {
        live.then(|| {
            next += 1;
            ValueId(next - 1)
        })
    };
    live.into_iter().map(place).collect()
}

/// The graph with only the values that have a place.
fn without(mut graph: Graph, places: &[Option<ValueId>]) -> Graph {
    let place = |value: ValueId| places.get(value.index()).copied().flatten().unwrap_or(value);
    let mut kept = Graph::new(&graph.name);
    for (value, node) in graph.values() {
        if places.get(value.index()).is_some_and(Option::is_some) {
            kept.push(Node { args: node.args.iter().map(|&arg| place(arg)).collect(), ..node.clone() });
        }
    }
    kept.outputs = std::mem::take(&mut graph.outputs);
    kept.outputs.iter_mut().for_each(|output| output.value = place(output.value));
    kept.guards = std::mem::take(&mut graph.guards);
    kept.states = std::mem::take(&mut graph.states);
    kept.cases = std::mem::take(&mut graph.cases);
    kept.borders = std::mem::take(&mut graph.borders);
    kept.symbols = std::mem::take(&mut graph.symbols);
    kept
}

fn narrow_literal(tensor: &Tensor, to: DType) -> Option<Literal> {
    let Data::F32(values) = tensor.data() else { return None };
    let data = match to {
        DType::F16 => Data::F16(values.iter().map(|&x| f16::from_f32(x)).collect()),
        DType::BF16 => Data::BF16(values.iter().map(|&x| bf16::from_f32(x)).collect()),
        _ => return None,
    };
    Some(Literal(Arc::new(Tensor::new(tensor.shape().to_vec(), data).ok()?)))
}
