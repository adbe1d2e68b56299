//! Recurrent layers: [RNN](https://onnx.ai/onnx/operators/onnx__RNN.html),
//! [GRU](https://onnx.ai/onnx/operators/onnx__GRU.html) and [LSTM](https://onnx.ai/onnx/operators/onnx__LSTM.html); opset 14
//! adds `layout`.
//!
//! The steps are written out one after the other, so their number must be one. What does not depend on the state is
//! computed for all steps at once.

use super::activation::named_activation;
use crate::lower::{Call, Lowered, Lowering, Value, invalid, undecided, unsupported};
use tpshard_ir::op::EinsumSpec;
use tpshard_ir::{DType, Dim, Op, Scalar, ValueId};

/// Most steps that are written out.
const STEPS: usize = 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cell {
    Rnn,
    Gru,
    Lstm,
}

/// A function of gates with its parameters.
struct Activation {
    name: String,
    alpha: Option<f64>,
    beta: Option<f64>,
}

/// What one direction needs at every step.
struct Direction {
    cell: Cell,
    activations: Vec<Activation>,
    clip: Option<f64>,
    linear_before_reset: bool,
    input_forget: bool,
    hidden: usize,
    /// `[G·H, H]`.
    recurrent: ValueId,
    /// `[G·H]`, of the recurrence.
    bias: Option<ValueId>,
    /// `[3·H]`: input, output, forget.
    peepholes: Option<ValueId>,
}

pub(super) fn rnn(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    layer(l, call, Cell::Rnn)
}

pub(super) fn gru(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    layer(l, call, Cell::Gru)
}

pub(super) fn lstm(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    layer(l, call, Cell::Lstm)
}

fn einsum(l: &mut Lowering<'_>, spec: &str, a: ValueId, b: ValueId) -> Lowered<ValueId> {
    let spec = EinsumSpec::parse(spec).ok_or_else(|| unsupported("a contraction"))?;
    l.add(Op::Einsum(spec), &[a, b])
}

/// `(X, W, R[, B, sequence_lens, initial_h, initial_c, P])` to `(Y, Y_h[, Y_c])`.
fn layer(l: &mut Lowering<'_>, call: &Call<'_>, cell: Cell) -> Lowered<Vec<Value>> {
    let batch_first = call.attributes.bool("layout", false)?;
    let mut x = l.data(call.input(0)?)?;
    if batch_first {
        x = l.transpose(x, &[1, 0, 2])?;
    }
    let ty = l.graph.ty(x).clone();
    let [steps, batch, _] = ty.shape.as_slice() else { return Err(invalid(format!("steps {ty}"))) };
    let count =
        steps.as_size().ok_or_else(|| undecided("a recurrent layer over a dynamic number of steps"))?;
    if count == 0 || count > STEPS {
        return Err(unsupported(format!("a recurrent layer of {count} steps; 1 to {STEPS} are")));
    }
    let names: &[&str] = match call.attributes.string("direction", "forward")? {
        "forward" => &["forward"],
        "reverse" => &["reverse"],
        "bidirectional" => &["forward", "reverse"],
        other => return Err(invalid(format!("the direction {}", crate::error::quote(other)))),
    };
    let lengths = match call.optional(4) {
        None => None,
        Some(lengths) => {
            let lengths = l.data(lengths)?;
            let lengths = l.cast(lengths, DType::I64)?;
            Some(l.reshape(lengths, &[Dim::constant(1), batch.clone(), Dim::constant(1)])?)
        }
    };
    let mut activations = activations(call, cell, names.len())?.into_iter();
    let per_direction = if cell == Cell::Rnn {
        1
    } else if cell == Cell::Gru {
        2
    } else {
        3
    };
    let (mut all, mut last, mut cells) = (Vec::new(), Vec::new(), Vec::new());
    for (index, name) in names.iter().enumerate() {
        let own: Vec<Activation> = activations.by_ref().take(per_direction).collect();
        let reverse = *name == "reverse";
        let x = if reverse { backwards(l, x, lengths)? } else { x };
        let (direction, inputs) = direction(l, call, cell, index, own, x)?;
        let state = |l: &mut Lowering<'_>, at: usize| {
            initial(l, call, at, index, batch_first, &direction, &ty.shape, ty.dtype)
        };
        let hidden = state(l, 5)?;
        let cell_state = if cell == Cell::Lstm { Some(state(l, 6)?) } else { None };
        let (ys, h, c) = unroll(l, &direction, inputs, count, hidden, cell_state, lengths)?;
        let y = l.joined(&ys, 0)?;
        let y = if reverse { backwards(l, y, lengths)? } else { y };
        all.push(along_directions(l, y, 1)?);
        last.push(along_directions(l, h, 0)?);
        if let Some(c) = c {
            cells.push(along_directions(l, c, 0)?);
        }
    }
    let mut outputs = vec![l.joined(&all, 1)?, l.joined(&last, 0)?];
    if cell == Cell::Lstm {
        outputs.push(l.joined(&cells, 0)?);
    }
    let mut values = Vec::with_capacity(outputs.len());
    for (index, value) in outputs.into_iter().enumerate() {
        let value = match (batch_first, index) {
            (false, _) => value,
            (true, 0) => l.transpose(value, &[2, 0, 1, 3])?,
            (true, _) => l.transpose(value, &[1, 0, 2])?,
        };
        values.push(Value::Data(value));
    }
    Ok(values)
}

/// A dim of 1 put in at `axis`.
fn along_directions(l: &mut Lowering<'_>, value: ValueId, axis: usize) -> Lowered<ValueId> {
    let mut shape = l.graph.ty(value).shape.clone();
    shape.insert(axis, Dim::constant(1));
    l.reshape(value, &shape)
}

/// The steps in reverse order, within the length of each sequence where those are given.
fn backwards(l: &mut Lowering<'_>, x: ValueId, lengths: Option<ValueId>) -> Lowered<ValueId> {
    match lengths {
        None => l.reversed(x, 0),
        Some(lengths) => super::movement_data::reversed_within(l, x, 0, lengths),
    }
}

fn activations(call: &Call<'_>, cell: Cell, directions: usize) -> Lowered<Vec<Activation>> {
    let usual: &[&str] = match cell {
        Cell::Rnn => &["Tanh"],
        Cell::Gru => &["Sigmoid", "Tanh"],
        Cell::Lstm => &["Sigmoid", "Tanh", "Tanh"],
    };
    let mut names: Vec<String> =
        call.attributes.strings("activations")?.into_iter().map(str::to_owned).collect();
    if names.is_empty() {
        names = usual.iter().cycle().take(usual.len() * directions).map(|&name| name.to_owned()).collect();
    }
    if names.len() != usual.len() * directions {
        return Err(invalid(format!("{} activations for {directions} directions", names.len())));
    }
    // Parameters are listed for the functions that have one, in order.
    let mut alphas = call.attributes.optional_floats("activation_alpha")?.unwrap_or(&[]).iter();
    let mut betas = call.attributes.optional_floats("activation_beta")?.unwrap_or(&[]).iter();
    let parameters = |name: String| {
        let (alpha, beta) = match name.to_ascii_lowercase().as_str() {
            "affine" | "scaledtanh" | "hardsigmoid" => (alphas.next(), betas.next()),
            "leakyrelu" | "thresholdedrelu" | "elu" => (alphas.next(), None),
            _ => (None, None),
        };
        Activation { name, alpha: alpha.map(|&a| f64::from(a)), beta: beta.map(|&b| f64::from(b)) }
    };
    Ok(names.into_iter().map(parameters).collect())
}

/// Entry `index` of the first dim of an operand.
fn entry(l: &mut Lowering<'_>, call: &Call<'_>, operand: usize, index: usize) -> Lowered<Option<ValueId>> {
    let Some(value) = call.optional(operand) else { return Ok(None) };
    let value = l.pick(&value.clone(), 0, &Dim::from(index))?;
    Ok(Some(l.data(&value)?))
}

/// The parameters of direction `index`, and `X Wᵀ` with the input's bias for all steps.
fn direction(
    l: &mut Lowering<'_>,
    call: &Call<'_>,
    cell: Cell,
    index: usize,
    activations: Vec<Activation>,
    x: ValueId,
) -> Lowered<(Direction, ValueId)> {
    let missing = || invalid("the weights are missing");
    let w = entry(l, call, 1, index)?.ok_or_else(missing)?;
    let recurrent = entry(l, call, 2, index)?.ok_or_else(missing)?;
    let shape = l.fixed_shape(recurrent, "recurrent weights")?;
    let gates = match cell {
        Cell::Rnn => 1,
        Cell::Gru => 3,
        Cell::Lstm => 4,
    };
    let [rows, hidden] = shape.as_slice() else { return Err(invalid(format!("weights {shape:?}"))) };
    if rows / gates != *hidden || rows % gates != 0 {
        return Err(invalid(format!("recurrent weights {shape:?} of {gates} gates")));
    }
    if call.attributes.optional_int("hidden_size")?.is_some_and(|size| usize::try_from(size) != Ok(*hidden)) {
        return Err(invalid("hidden_size is not that of the weights"));
    }
    let mut inputs = einsum(l, "tbi,gi->tbg", x, w)?;
    let mut bias = None;
    if let Some(both) = entry(l, call, 3, index)? {
        let own = l.cut(both, 0, 0, *rows)?;
        inputs = l.map(Scalar::Add, &[inputs, own])?;
        bias = Some(l.cut(both, 0, *rows, *rows)?);
    }
    let peepholes = if cell == Cell::Lstm { entry(l, call, 7, index)? } else { None };
    let direction = Direction {
        cell,
        activations,
        clip: call.attributes.optional_float("clip")?.map(f64::from),
        linear_before_reset: cell == Cell::Gru && call.attributes.bool("linear_before_reset", false)?,
        input_forget: cell == Cell::Lstm && call.attributes.bool("input_forget", false)?,
        hidden: *hidden,
        recurrent,
        bias,
        peepholes,
    };
    Ok((direction, inputs))
}

/// The state before the first step, `[B, H]`.
#[allow(clippy::too_many_arguments, reason = "what a state depends on")]
fn initial(
    l: &mut Lowering<'_>,
    call: &Call<'_>,
    operand: usize,
    index: usize,
    batch_first: bool,
    direction: &Direction,
    steps: &[Dim],
    dtype: DType,
) -> Lowered<ValueId> {
    match call.optional(operand) {
        None => {
            let zero = l.scalar(dtype, 0.0)?;
            l.broadcast(zero, &[steps[1].clone(), Dim::from(direction.hidden)])
        }
        Some(value) => {
            let value = l.pick(&value.clone(), usize::from(batch_first), &Dim::from(index))?;
            l.data(&value)
        }
    }
}

/// The state after every step as `[1, B, H]`, and the last ones.
type Unrolled = (Vec<ValueId>, ValueId, Option<ValueId>);

fn unroll(
    l: &mut Lowering<'_>,
    direction: &Direction,
    inputs: ValueId,
    count: usize,
    mut hidden: ValueId,
    mut cell: Option<ValueId>,
    lengths: Option<ValueId>,
) -> Lowered<Unrolled> {
    let mut all = Vec::with_capacity(count);
    for step in 0..count {
        let x = l.cut(inputs, 0, step, 1)?;
        let shape = l.graph.ty(x).shape[1..].to_vec();
        let x = l.reshape(x, &shape)?;
        let (next, next_cell) = match direction.cell {
            Cell::Rnn => (direction.rnn(l, x, hidden)?, None),
            Cell::Gru => (direction.gru(l, x, hidden)?, None),
            Cell::Lstm => {
                let before = cell.ok_or_else(|| invalid("no cell state"))?;
                let (next, after) = direction.lstm(l, x, hidden, before)?;
                (next, Some(after))
            }
        };
        let mut shown = next;
        match lengths {
            None => (hidden, cell) = (next, next_cell),
            Some(lengths) => {
                // Past its end a sequence keeps its state and shows zeros.
                let shape = l.graph.ty(lengths).shape[1..].to_vec();
                let lengths = l.reshape(lengths, &shape)?;
                let going = l.map_number(Scalar::Greater, lengths, step as f64)?;
                let zero = l.scalar(l.graph.ty(next).dtype, 0.0)?;
                shown = l.map(Scalar::Select, &[going, next, zero])?;
                hidden = l.map(Scalar::Select, &[going, next, hidden])?;
                if let (Some(before), Some(after)) = (cell, next_cell) {
                    cell = Some(l.map(Scalar::Select, &[going, after, before])?);
                }
            }
        }
        all.push(along_directions(l, shown, 0)?);
    }
    if let Some(lengths) = lengths {
        // What an empty sequence leaves is zeros in ONNX Runtime, not its initial state; the specification is silent.
        let shape = l.graph.ty(lengths).shape[1..].to_vec();
        let lengths = l.reshape(lengths, &shape)?;
        let some = l.map_number(Scalar::Greater, lengths, 0.0)?;
        let zero = l.scalar(l.graph.ty(hidden).dtype, 0.0)?;
        hidden = l.map(Scalar::Select, &[some, hidden, zero])?;
        if let Some(last) = cell {
            cell = Some(l.map(Scalar::Select, &[some, last, zero])?);
        }
    }
    Ok((all, hidden, cell))
}

impl Direction {
    /// `h Rᵀ + b` of the gates from `first` on.
    fn recurrence(&self, l: &mut Lowering<'_>, h: ValueId, first: usize, gates: usize) -> Lowered<ValueId> {
        let weights = l.cut(self.recurrent, 0, first * self.hidden, gates * self.hidden)?;
        let product = einsum(l, "bh,gh->bg", h, weights)?;
        let Some(bias) = self.bias else { return Ok(product) };
        let bias = l.cut(bias, 0, first * self.hidden, gates * self.hidden)?;
        l.map(Scalar::Add, &[product, bias])
    }

    fn gate(&self, l: &mut Lowering<'_>, gates: ValueId, index: usize) -> Lowered<ValueId> {
        l.cut(gates, 1, index * self.hidden, self.hidden)
    }

    fn activate(&self, l: &mut Lowering<'_>, x: ValueId, index: usize) -> Lowered<ValueId> {
        let activation = self.activations.get(index).ok_or_else(|| invalid("an activation is missing"))?;
        let x = match self.clip.filter(|clip| *clip > 0.0) {
            Some(clip) => l.clamp(x, -clip, clip)?,
            None => x,
        };
        named_activation(l, &activation.name, x, activation.alpha, activation.beta)
    }

    fn rnn(&self, l: &mut Lowering<'_>, x: ValueId, h: ValueId) -> Lowered<ValueId> {
        let again = self.recurrence(l, h, 0, 1)?;
        let sum = l.map(Scalar::Add, &[x, again])?;
        self.activate(l, sum, 0)
    }

    /// Gates: update, reset, hidden.
    fn gru(&self, l: &mut Lowering<'_>, x: ValueId, h: ValueId) -> Lowered<ValueId> {
        let again = self.recurrence(l, h, 0, 2)?;
        let own = l.cut(x, 1, 0, 2 * self.hidden)?;
        let both = l.map(Scalar::Add, &[own, again])?;
        let (update, reset) = (self.gate(l, both, 0)?, self.gate(l, both, 1)?);
        let (update, reset) = (self.activate(l, update, 0)?, self.activate(l, reset, 0)?);
        let again = if self.linear_before_reset {
            let again = self.recurrence(l, h, 2, 1)?;
            l.map(Scalar::Mul, &[reset, again])?
        } else {
            let kept = l.map(Scalar::Mul, &[reset, h])?;
            self.recurrence(l, kept, 2, 1)?
        };
        let own = self.gate(l, x, 2)?;
        let sum = l.map(Scalar::Add, &[own, again])?;
        let new = self.activate(l, sum, 1)?;
        let rest = l.map(Scalar::Neg, &[update])?;
        let rest = l.map_number(Scalar::Add, rest, 1.0)?;
        let new = l.map(Scalar::Mul, &[rest, new])?;
        let old = l.map(Scalar::Mul, &[update, h])?;
        l.map(Scalar::Add, &[new, old])
    }

    /// Gates: input, output, forget, cell. The state and the cell after the step.
    fn lstm(&self, l: &mut Lowering<'_>, x: ValueId, h: ValueId, c: ValueId) -> Lowered<(ValueId, ValueId)> {
        let again = self.recurrence(l, h, 0, 4)?;
        let gates = l.map(Scalar::Add, &[x, again])?;
        let peep = |l: &mut Lowering<'_>, gate: ValueId, index: usize, cell: ValueId| -> Lowered<ValueId> {
            let Some(all) = self.peepholes else { return Ok(gate) };
            let own = l.cut(all, 0, index * self.hidden, self.hidden)?;
            let seen = l.map(Scalar::Mul, &[own, cell])?;
            l.map(Scalar::Add, &[gate, seen])
        };
        let input = self.gate(l, gates, 0)?;
        let input = peep(l, input, 0, c)?;
        let input = self.activate(l, input, 0)?;
        let forget = if self.input_forget {
            let rest = l.map(Scalar::Neg, &[input])?;
            l.map_number(Scalar::Add, rest, 1.0)?
        } else {
            let forget = self.gate(l, gates, 2)?;
            let forget = peep(l, forget, 2, c)?;
            self.activate(l, forget, 0)?
        };
        let new = self.gate(l, gates, 3)?;
        let new = self.activate(l, new, 1)?;
        let (kept, added) = (l.map(Scalar::Mul, &[forget, c])?, l.map(Scalar::Mul, &[input, new])?);
        let cell = l.map(Scalar::Add, &[kept, added])?;
        let output = self.gate(l, gates, 1)?;
        let output = peep(l, output, 1, cell)?;
        let output = self.activate(l, output, 0)?;
        let shown = self.activate(l, cell, 2)?;
        Ok((l.map(Scalar::Mul, &[output, shown])?, cell))
    }
}
