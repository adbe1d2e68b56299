//! Which outputs to make, and which part of each: `logits`, `logits[:, -1]`, `logits=argmax`, `logits[:, -1]=topk:64`.
//!
//! The part becomes operations of the graph before anything is planned, so that a plan can push a slice through the
//! layers before it.

use super::context::{Lowered, Lowering, invalid};
use super::value::Value;
use super::{ImportReport, axis_of};
use crate::error::{Fault, quote};
use std::str::FromStr;
use tpshard_ir::{Dim, Op, Output, ValueId};

/// One entry of an index: a range, or one position whose dim goes away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Range { start: Option<i64>, end: Option<i64> },
    At(i64),
}

/// What is made of the selected part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Selection {
    Values,
    /// The index of the largest along the last axis.
    ArgMax,
    /// The `k` largest along the last axis: `NAME.values` and `NAME.indices`.
    TopK(u32),
    /// The values, left on their ranks; a matter for the planner.
    Sharded,
}

/// A wanted output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutputRequest {
    pub name: String,
    pub parts: Vec<Part>,
    pub selection: Selection,
}

/// The text is not an output request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("output request {}: {what}\n  help: write NAME, NAME[:, -1], NAME=argmax, NAME=topk:64 or NAME=sharded", quote(.text))]
pub struct OutputRequestError {
    pub text: String,
    pub what: &'static str,
}

impl FromStr for OutputRequest {
    type Err = OutputRequestError;

    fn from_str(text: &str) -> Result<OutputRequest, OutputRequestError> {
        let error = |what| OutputRequestError { text: text.to_owned(), what };
        let (rest, selection) = match text.rsplit_once('=') {
            None => (text, Selection::Values),
            Some((rest, "argmax")) => (rest, Selection::ArgMax),
            Some((rest, "sharded")) => (rest, Selection::Sharded),
            Some((rest, other)) => {
                let count = other.strip_prefix("topk:").ok_or_else(|| error("unknown selection"))?;
                let count: u32 = count.parse().map_err(|_| error("topk needs a count"))?;
                if count == 0 {
                    return Err(error("topk needs a count of at least 1"));
                }
                (rest, Selection::TopK(count))
            }
        };
        let (name, parts) = match rest.split_once('[') {
            None => (rest, Vec::new()),
            Some((name, index)) => {
                let index = index.strip_suffix(']').ok_or_else(|| error("`]` is missing"))?;
                let parts = index.split(',').map(|part| parse_part(part.trim()));
                (
                    name,
                    parts
                        .collect::<Option<Vec<_>>>()
                        .ok_or_else(|| error("an index is not a:b or a number of 31 bits"))?,
                )
            }
        };
        if name.is_empty() {
            return Err(error("the name is missing"));
        }
        Ok(OutputRequest { name: name.to_owned(), parts, selection })
    }
}

fn parse_part(text: &str) -> Option<Part> {
    let bound =
        |text: &str| if text.trim().is_empty() { Some(None) } else { position(text.trim()).map(Some) };
    match text.split_once(':') {
        None => position(text).map(Part::At),
        Some((start, end)) => Some(Part::Range { start: bound(start)?, end: bound(end)? }),
    }
}

/// A position in a dim; no dim is larger than 31 bits.
fn position(text: &str) -> Option<i64> {
    text.parse::<i32>().ok().map(i64::from)
}

impl Lowering<'_> {
    /// The wanted outputs as values of the graph.
    pub(super) fn outputs(
        &mut self,
        requests: &[OutputRequest],
        report: &mut ImportReport,
    ) -> Lowered<Vec<Output>> {
        let all: Vec<String> = self.model.graph.outputs.iter().map(|output| output.name.clone()).collect();
        let mut made: Vec<(String, ValueId)> = Vec::new();
        for name in &all {
            let value = self
                .lookup(name)
                .cloned()
                .ok_or_else(|| invalid("nothing makes this output").at_value(name))?;
            let value = self.data(&value).map_err(|fault| fault.at_value(name))?;
            self.check_declared(name, value, report)?;
            made.push((name.clone(), value));
        }
        if requests.is_empty() {
            return Ok(made
                .into_iter()
                .map(|(name, value)| Output { name: name.as_str().into(), value })
                .collect());
        }
        let mut outputs = Vec::new();
        for request in requests {
            let Some((name, value)) = made.iter().find(|(name, _)| *name == request.name) else {
                let help = format!("the outputs are {}", all.join(", ").escape_debug());
                return Err(Fault::request("the model has no such output", help).at_value(&request.name));
            };
            self.site = format!("output {}", quote(name));
            self.select(name, *value, request, &mut outputs).map_err(|fault| {
                // The model is right; what is asked of its output is not.
                let help = format!("the output is {}", self.graph.ty(*value));
                Fault::request(fault.message, help).at_value(name)
            })?;
        }
        for (at, output) in outputs.iter().enumerate() {
            if outputs[..at].iter().any(|other| other.name == output.name) {
                let fault = Fault::request(
                    "the output is asked for twice",
                    "ask once, or add =topk:N to one of them",
                );
                return Err(fault.at_value(&output.name));
            }
        }
        // State goes on whether it is asked for or not.
        for output in self.state_inputs.values().cloned().collect::<Vec<_>>() {
            if let Some((name, value)) = made.iter().find(|(name, _)| *name == output)
                && !outputs.iter().any(|other| *other.name == **name)
            {
                outputs.push(Output { name: name.as_str().into(), value: *value });
            }
        }
        Ok(outputs)
    }

    fn select(
        &mut self,
        name: &str,
        value: ValueId,
        request: &OutputRequest,
        outputs: &mut Vec<Output>,
    ) -> Lowered<()> {
        let mut value = value;
        let mut axis = 0;
        for part in &request.parts {
            axis_of(i64::try_from(axis).unwrap_or(i64::MAX), self.graph.ty(value).rank())?;
            let extent = self.graph.ty(value).shape[axis].clone();
            let at = |position: i64| {
                if position < 0 { &extent + &Dim::constant(position) } else { Dim::constant(position) }
            };
            match *part {
                Part::At(position) => {
                    let start = at(position);
                    let inside = if position < 0 {
                        Dim::constant(position.saturating_neg())
                    } else {
                        &start + &Dim::constant(1)
                    };
                    self.assume_at_most(&inside, &extent)?;
                    let Value::Data(picked) = self.pick(&Value::Data(value), axis, &start)? else {
                        return Err(invalid("the output is constant"));
                    };
                    value = picked;
                }
                Part::Range { start, end } => {
                    let (start, end) = (at(start.unwrap_or(0)), end.map_or_else(|| extent.clone(), at));
                    self.assume_at_most(&Dim::constant(0), &start)?;
                    self.assume_at_most(&start, &end)?;
                    self.assume_at_most(&end, &extent)?;
                    value = self.slice(value, axis, start.clone(), &end - &start, 1)?;
                    axis += 1;
                }
            }
        }
        let rank = self.graph.ty(value).rank();
        match request.selection {
            Selection::Values | Selection::Sharded => {
                outputs.push(Output { name: name.into(), value });
            }
            Selection::ArgMax => {
                let axis = axis_of(-1, rank)?;
                let best = self.add(Op::TopK { axis, k: Dim::constant(1), largest: true }, &[value])?;
                let shape = self.graph.ty(best).shape[..axis].to_vec();
                let value = self.reshape(best, &shape)?;
                outputs.push(Output { name: name.into(), value });
            }
            Selection::TopK(count) => {
                let axis = axis_of(-1, rank)?;
                let k = Dim::constant(i64::from(count));
                let extent = self.graph.ty(value).shape[axis].clone();
                self.assume_at_most(&k, &extent)?;
                let indices = self.add(Op::TopK { axis, k, largest: true }, &[value])?;
                let values = self.add(Op::GatherElements { axis }, &[value, indices])?;
                outputs.push(Output { name: format!("{name}.values").into(), value: values });
                outputs.push(Output { name: format!("{name}.indices").into(), value: indices });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_read_and_nonsense_is_refused() {
        let all = Part::Range { start: None, end: None };
        let parse = |text: &str| OutputRequest::from_str(text);
        assert_eq!(
            parse("logits[:, -1]=topk:64").unwrap(),
            OutputRequest {
                name: "logits".into(),
                parts: vec![all, Part::At(-1)],
                selection: Selection::TopK(64)
            }
        );
        assert_eq!(parse("y[2:-1]").unwrap().parts, [Part::Range { start: Some(2), end: Some(-1) }]);
        assert_eq!(parse("y=argmax").unwrap().selection, Selection::ArgMax);
        for text in ["", "y[", "y[a]", "y=topk", "y=topk:x", "y=topk:0", "y=nothing", "[0]"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
