//! If, Loop and Scan over tensors, <https://onnx.ai/onnx/operators/>.

use super::body::Body;
use super::elements::{axis_of, entry, integer, single, stack};
use super::{Evaluated, OnnxEvaluator, Operands};
use crate::model::{Dim, Graph, Node};
use tpshard_ir::Tensor;

/// Most rounds of a loop: more would not end in any sensible time.
const MOST_ROUNDS: i64 = 1 << 28;

fn subgraph<'a>(node: &'a Node, name: &str) -> Evaluated<&'a Graph> {
    node.attributes().required_graph(name).map_err(|error| error.to_string())
}

fn truth(tensor: &Tensor, what: &str) -> Evaluated<bool> {
    Ok(!single(tensor, what)?.is_zero())
}

impl OnnxEvaluator {
    /// The branch that the condition takes.
    pub(super) fn branch(
        &self,
        node: &Node,
        operands: &Operands<'_>,
        limit: usize,
    ) -> Evaluated<Vec<Tensor>> {
        let condition =
            node.input(0).and_then(|name| operands.get(name)).ok_or("the condition is missing")?;
        let taken = if truth(condition, "the condition")? { "then_branch" } else { "else_branch" };
        let body = Body::new(subgraph(node, taken)?, operands)?;
        self.run_body(&body, &[], limit)
    }

    /// `while i < trips && condition`: the body takes round, condition and carried values, and gives condition, carried
    /// values and a row of each scan output.
    pub(super) fn repeat(
        &self,
        node: &Node,
        operands: &Operands<'_>,
        limit: usize,
    ) -> Evaluated<Vec<Tensor>> {
        let graph = subgraph(node, "body")?;
        let body = Body::new(graph, operands)?;
        let input = |index: usize| node.input(index).and_then(|name| operands.get(name).copied());
        let trips = input(0).map(|trips| integer(trips, "the trip count")).transpose()?;
        let mut condition = input(1).map(|start| truth(start, "the condition")).transpose()?.unwrap_or(true);
        let mut carried = (2..node.inputs.len())
            .map(|index| input(index).cloned().ok_or_else(|| format!("input {index} is missing")))
            .collect::<Evaluated<Vec<Tensor>>>()?;
        let Some(scans) = graph.outputs.len().checked_sub(1 + carried.len()) else {
            return Err(format!(
                "{} outputs of the body carry {} values",
                graph.outputs.len(),
                carried.len()
            ));
        };
        let mut rows: Vec<Vec<Tensor>> = vec![Vec::new(); scans];
        let (mut round, mut held) = (0i64, 0usize);
        while condition && trips.is_none_or(|trips| round < trips) {
            if round >= MOST_ROUNDS {
                return Err(format!("the loop does not end within {MOST_ROUNDS} rounds"));
            }
            let mut inputs =
                vec![shaped(graph, 0, Tensor::scalar(round))?, shaped(graph, 1, Tensor::scalar(true))?];
            inputs.append(&mut carried);
            let mut results = self.run_body(&body, &inputs, limit)?;
            let of_scans = results.split_off(inputs.len().saturating_sub(1).min(results.len()));
            condition =
                results.first().map(|next| truth(next, "the condition")).transpose()?.unwrap_or(false);
            carried = results.into_iter().skip(1).collect();
            held = of_scans.iter().map(Tensor::len).fold(held, usize::saturating_add);
            if held > limit {
                return Err(format!("what the loop collects exceeds the limit of {limit} elements"));
            }
            rows.iter_mut().zip(of_scans).for_each(|(rows, row)| rows.push(row));
            round += 1;
        }
        if round == 0 && scans > 0 {
            let mut inputs =
                vec![shaped(graph, 0, Tensor::scalar(0i64))?, shaped(graph, 1, Tensor::scalar(true))?];
            inputs.extend(carried.iter().cloned());
            let skip = inputs.len() - 1;
            carried.extend(self.no_rows(&body, &inputs, skip, &vec![0; scans])?);
            return Ok(carried);
        }
        for rows in &rows {
            carried.push(stack(rows, 0)?);
        }
        Ok(carried)
    }

    /// Scan outputs of a body that was never run: rows of the types it would make.
    fn no_rows(
        &self,
        body: &Body<'_>,
        inputs: &[Tensor],
        skip: usize,
        axes: &[usize],
    ) -> Evaluated<Vec<Tensor>> {
        let imported = self.prepared(body, inputs)?;
        let outputs = imported.graph.outputs.iter().skip(skip).zip(axes);
        outputs
            .map(|(output, &axis)| {
                let ty = imported.graph.ty(output.value);
                let mut shape: Vec<usize> = ty.shape.iter().map(|dim| dim.as_size().unwrap_or(0)).collect();
                shape.insert(axis.min(shape.len()), 0);
                Tensor::zeros(ty.dtype, shape).map_err(|error| error.to_string())
            })
            .collect()
    }

    /// Scan of opset 9 and later; that of opset 8 for every sequence of the batch.
    pub(super) fn scan(&self, node: &Node, operands: &Operands<'_>, limit: usize) -> Evaluated<Vec<Tensor>> {
        let body = Body::new(subgraph(node, "body")?, operands)?;
        let first = usize::from(node.opset < 9);
        let inputs = (first..node.inputs.len())
            .map(|index| {
                let tensor = node.input(index).and_then(|name| operands.get(name).copied());
                tensor.cloned().ok_or_else(|| format!("input {index} is missing"))
            })
            .collect::<Evaluated<Vec<Tensor>>>()?;
        let form = Form::of(node, &body, inputs.len())?;
        if node.opset >= 9 {
            return self.scan_one(&body, &form, inputs, limit);
        }
        let lengths = node.input(0).and_then(|name| operands.get(name).copied());
        self.scan_batch(&body, &form, &inputs, lengths, limit)
    }

    fn scan_one(
        &self,
        body: &Body<'_>,
        form: &Form,
        inputs: Vec<Tensor>,
        limit: usize,
    ) -> Evaluated<Vec<Tensor>> {
        let mut states = inputs;
        let sequences = states.split_off(form.states);
        let mut length: Option<usize> = None;
        let mut axes = Vec::with_capacity(sequences.len());
        for (sequence, &axis) in sequences.iter().zip(&form.input_axes) {
            let axis = axis_of(axis, sequence.shape().len())?;
            let own = sequence.shape()[axis];
            if length.is_some_and(|length| length != own) {
                return Err(format!("sequences of {own} and {} steps", length.unwrap_or(0)));
            }
            length = Some(own);
            axes.push(axis);
        }
        let length = length.ok_or("a Scan without sequences")?;
        let mut rows: Vec<Vec<Tensor>> = vec![Vec::new(); form.outputs];
        let mut held = 0usize;
        for step in 0..length {
            let mut given = states;
            for ((sequence, &axis), &backwards) in sequences.iter().zip(&axes).zip(&form.input_backwards) {
                let at = if backwards { length - 1 - step } else { step };
                given.push(entry(sequence, axis, at)?);
            }
            states = self.run_body(body, &given, limit)?;
            let made = states.split_off(form.states.min(states.len()));
            held = made.iter().map(Tensor::len).fold(held, usize::saturating_add);
            if held > limit {
                return Err(format!("what the scan collects exceeds the limit of {limit} elements"));
            }
            rows.iter_mut().zip(made).for_each(|(rows, row)| rows.push(row));
        }
        if length == 0 {
            return self.scan_nothing(body, form, states, &sequences, &axes);
        }
        for ((mut rows, &axis), &backwards) in
            rows.into_iter().zip(&form.output_axes).zip(&form.output_backwards)
        {
            if backwards {
                rows.reverse();
            }
            let rank = rows.first().map_or(0, |row| row.shape().len()) + 1;
            states.push(stack(&rows, axis_of(axis, rank)?)?);
        }
        Ok(states)
    }

    /// Sequences without steps.
    fn scan_nothing(
        &self,
        body: &Body<'_>,
        form: &Form,
        mut states: Vec<Tensor>,
        sequences: &[Tensor],
        axes: &[usize],
    ) -> Evaluated<Vec<Tensor>> {
        let mut inputs = states.clone();
        for (sequence, &axis) in sequences.iter().zip(axes) {
            let mut shape = sequence.shape().to_vec();
            shape.remove(axis);
            inputs.push(Tensor::zeros(sequence.dtype(), shape).map_err(|error| error.to_string())?);
        }
        let axes: Vec<usize> =
            form.output_axes.iter().map(|&axis| usize::try_from(axis).unwrap_or(0)).collect();
        states.extend(self.no_rows(body, &inputs, form.states, &axes)?);
        Ok(states)
    }

    /// Every sequence for itself, as long as it is; what is missing to the longest reads as zero.
    fn scan_batch(
        &self,
        body: &Body<'_>,
        form: &Form,
        inputs: &[Tensor],
        lengths: Option<&Tensor>,
        limit: usize,
    ) -> Evaluated<Vec<Tensor>> {
        let batch = inputs.first().and_then(|x| x.shape().first().copied()).ok_or("a Scan without batch")?;
        let steps = inputs.get(form.states).and_then(|x| x.shape().get(1).copied());
        let steps = steps.ok_or("a Scan without sequences")?;
        let mut all: Vec<Vec<Tensor>> = vec![Vec::new(); form.states + form.outputs];
        for at in 0..batch {
            let length = match lengths {
                None => steps,
                Some(lengths) => {
                    let own = integer(&entry(lengths, 0, at)?, "the length of a sequence")?;
                    let fits = usize::try_from(own).ok().filter(|&own| own <= steps);
                    fits.ok_or_else(|| format!("a sequence of {own} steps of {steps}"))?
                }
            };
            let mut own = Vec::with_capacity(inputs.len());
            for (index, input) in inputs.iter().enumerate() {
                let one = entry(input, 0, at)?;
                let positions: Vec<usize> = (0..length).collect();
                own.push(if index < form.states { one } else { super::elements::take(&one, 0, &positions)? });
            }
            let results = self.scan_one(body, form, own, limit)?;
            for (index, (all, result)) in all.iter_mut().zip(results).enumerate() {
                all.push(if index < form.states { result } else { padded(&result, steps)? });
            }
        }
        all.iter().map(|parts| stack(parts, 0)).collect()
    }
}

/// `tensor` with zeros up to `length` entries of its first dim.
fn padded(tensor: &Tensor, length: usize) -> Evaluated<Tensor> {
    let mut shape = tensor.shape().to_vec();
    let first = shape.first_mut().ok_or("a scan output without steps")?;
    *first = length;
    let mut bytes = tensor.data().to_le_bytes();
    let whole = Tensor::zeros(tensor.dtype(), shape.clone()).map_err(|error| error.to_string())?;
    bytes.resize(whole.data().to_le_bytes().len(), 0);
    Tensor::from_le_bytes(tensor.dtype(), shape, &bytes).map_err(|error| error.to_string())
}

/// A scalar in the shape that the body declares for its input: `[]`, or `[1]`.
fn shaped(graph: &Graph, index: usize, scalar: Tensor) -> Evaluated<Tensor> {
    let declared = graph.inputs.get(index).and_then(|info| info.tensor_type());
    let rank = declared.and_then(|ty| ty.shape.as_ref()).map_or(0, Vec::len);
    let one = |dim: &Dim| !matches!(dim, Dim::Known(size) if *size != 1);
    let fits = declared.and_then(|ty| ty.shape.as_ref()).is_none_or(|dims| dims.iter().all(one));
    if rank > 1 || !fits {
        return Err(format!("input {index} of the body is not a scalar"));
    }
    scalar.reshaped(vec![1; rank]).map_err(|error| error.to_string())
}

/// How a Scan goes over its operands.
struct Form {
    states: usize,
    outputs: usize,
    input_axes: Vec<i64>,
    input_backwards: Vec<bool>,
    output_axes: Vec<i64>,
    output_backwards: Vec<bool>,
}

impl Form {
    fn of(node: &Node, body: &Body<'_>, inputs: usize) -> Evaluated<Form> {
        let attributes = node.attributes();
        let text = |error: crate::AttributeError| error.to_string();
        let sequences = attributes.required_int("num_scan_inputs").map_err(text)?;
        let sequences = usize::try_from(sequences).ok().filter(|&count| (1..=inputs).contains(&count));
        let sequences = sequences.ok_or("the number of scan inputs")?;
        let states = inputs - sequences;
        let outputs = body.outputs().checked_sub(states).ok_or("the body has fewer outputs than states")?;
        let list = |name: &str, count: usize| -> Evaluated<Vec<i64>> {
            let given = attributes.optional_ints(name).map_err(text)?;
            let list = given.map_or_else(|| vec![0; count], <[i64]>::to_vec);
            if list.len() == count { Ok(list) } else { Err(format!("{} of {count} {name}", list.len())) }
        };
        let backwards = |list: Vec<i64>| list.into_iter().map(|direction| direction != 0).collect();
        let directions = if node.opset < 9 { "directions" } else { "scan_input_directions" };
        Ok(Form {
            states,
            outputs,
            input_axes: list("scan_input_axes", sequences)?,
            input_backwards: backwards(list(directions, sequences)?),
            output_axes: list("scan_output_axes", outputs)?,
            output_backwards: backwards(list("scan_output_directions", outputs)?),
        })
    }
}
