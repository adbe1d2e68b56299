//! Driving a decoder model token by token: what its inputs mean, and what its next token is.
//!
//! Nothing is told about a model but its types: the dim of its state that grows says which inputs are as long as the
//! new tokens and which as long as all of them.

use crate::failure::{Classify, Failure, Kind, Outcome};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tpshard_ir::program::{Entry, Port, RankProgram, StateSpec};
use tpshard_ir::{Case, DType, Data, Dim, Tensor};
use tpshard_runtime::session::Results;
use tpshard_runtime::state::grows;

/// What an input is fed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Feed {
    Tokens,
    /// The number of tokens before each new one.
    Positions,
    /// Ones, for the new tokens only or for all.
    Mask {
        all: bool,
    },
}

/// How to step a decoder.
#[derive(Debug)]
pub(crate) struct Decoder {
    /// The steps there are, those that begin first.
    steps: Vec<StepInputs>,
    /// The output that holds logits, or tokens already.
    output: String,
    /// True if sequences of different lengths can step together.
    pub(crate) together: bool,
}

/// What one kind of step is given.
#[derive(Debug, PartialEq)]
struct StepInputs {
    /// What the state holds grows; else it begins, whatever was there.
    grows: bool,
    fed: Vec<(Arc<str>, DType, usize, Feed)>,
    /// The values that choose the graph.
    chosen: Vec<Case>,
}

impl Decoder {
    /// # Errors
    /// The program is no decoder that keeps state, or has inputs whose meaning is not known.
    pub(crate) fn new(program: &RankProgram) -> Outcome<Decoder> {
        let refuse = |what: String| {
            let help = "help: decoding needs a model with past and present inputs and outputs, token ids, and at most an \
                        attention mask and positions besides";
            Failure::new(Kind::Usage, format!("{what}\n{help}"))
        };
        let (Some(entry), Some(state)) = (program.entries.first(), program.states.first()) else {
            return Err(refuse("the model keeps no state between steps".into()));
        };
        let mut steps: Vec<StepInputs> = Vec::new();
        for entry in &program.entries {
            let step = step_inputs(entry, program, state).map_err(refuse)?;
            if !steps.contains(&step) {
                steps.push(step);
            }
        }
        if !steps.iter().any(|step| step.grows) {
            return Err(refuse("no graph of the model adds to the state it keeps".into()));
        }
        steps.sort_by_key(|step| step.grows);
        let output = output_of(entry, program).ok_or_else(|| {
            let names: Vec<&str> = entry.outputs.iter().map(|p| &*p.name).collect();
            refuse(format!("none of the outputs {} holds the next token", names.join(", ")))
        })?;
        let slots = state.slot_axis.and_then(|axis| state.ty.shape.get(axis));
        let is_present = |port: &Port| program.states.iter().any(|s| s.output == port.name);
        let mut results = entry.outputs.iter().filter(|port| !is_present(port));
        let together = slots.is_some()
            && steps.iter().flat_map(|step| &step.fed).all(|(_, _, rank, _)| *rank == 2)
            && results.all(|port| port.ty.shape.first() == slots);
        Ok(Decoder { steps, output, together })
    }

    /// What a step behind `past` tokens is given: a state that holds nothing begins where the model can begin one.
    fn step(&self, past: usize) -> Outcome<&StepInputs> {
        let found = self.steps.iter().find(|step| step.grows || past == 0);
        found.ok_or_else(|| Failure::new(Kind::Internal, "the decoder has no step"))
    }

    /// The inputs of a step that adds the tokens of each row, equally many, behind as many others as `past` says for it.
    pub(crate) fn inputs(&self, rows: &[Vec<i64>], past: &[usize]) -> Outcome<BTreeMap<String, Tensor>> {
        let new = rows.first().map_or(0, Vec::len);
        let longest = past.iter().copied().max().unwrap_or(0);
        let mut all = BTreeMap::new();
        let step = self.step(longest)?;
        for case in &step.chosen {
            let value = Tensor::new(vec![1; case.ty.rank()], Data::Bool(vec![case.value]));
            all.insert(case.input.to_string(), value.or_fail(Kind::Internal)?);
        }
        for (name, dtype, rank, feed) in &step.fed {
            // Inputs without rows are the same for all of them.
            let repeated = if *rank < 2 { 1 } else { rows.len() };
            let positions = |&past: &usize| (past..past + new).map(|p| p as i64);
            let values: Vec<i64> = match feed {
                Feed::Tokens => rows.concat(),
                Feed::Positions => past.iter().take(repeated).flat_map(positions).collect(),
                // Shorter sequences take the leading entries.
                Feed::Mask { all } => vec![1; (new + if *all { longest } else { 0 }) * repeated],
            };
            let mut shape = vec![repeated; *rank];
            if let Some(last) = shape.last_mut() {
                *last = values.len() / repeated.max(1);
            }
            let tensor = Tensor::new(shape, numbers(*dtype, &values)?);
            let tensor = tensor.map_err(|e| Failure::new(Kind::Internal, format!("input `{name}`: {e}")))?;
            all.insert(name.to_string(), tensor);
        }
        Ok(all)
    }

    /// The token ids among the inputs of a model, a row for each sequence.
    pub(crate) fn tokens_of(&self, inputs: &BTreeMap<String, Tensor>) -> Outcome<Vec<Vec<i64>>> {
        let fed = &self.step(0)?.fed;
        let name = fed.iter().find(|(_, _, _, feed)| *feed == Feed::Tokens).map(|(name, ..)| &**name);
        let tensor = name.and_then(|name| inputs.get(name));
        let tensor = tensor.ok_or_else(|| {
            let name = name.unwrap_or("token ids");
            Failure::new(
                Kind::Usage,
                format!("the inputs lack `{name}`\nhelp: decoding starts from a prompt"),
            )
        })?;
        let tokens: Vec<i64> = match tensor.data() {
            Data::I64(ids) => ids.clone(),
            Data::I32(ids) => ids.iter().map(|&id| id.into()).collect(),
            _ => Vec::new(),
        };
        let length = tensor.shape().last().copied().unwrap_or(0);
        if tokens.is_empty() {
            let found = format!("{}{:?} holds no token ids", tensor.dtype(), tensor.shape());
            return Err(Failure::new(Kind::Usage, format!("{found}\nhelp: decoding starts from a prompt")));
        }
        Ok(tokens.chunks(length).map(<[i64]>::to_vec).collect())
    }

    /// For each of `rows` sequences the logits of the last position, or the token itself if the model chooses it.
    pub(crate) fn next(&self, results: &Results, rows: usize) -> Outcome<Vec<Next>> {
        let wrong = |what: &str| Failure::new(Kind::Mismatch, format!("output `{}` {what}", self.output));
        let tensor =
            results.outputs.get(&self.output).map(|o| &o.tensor).ok_or_else(|| wrong("is missing"))?;
        let width = tensor.shape().last().copied().unwrap_or(1);
        let per_row = tensor.len() / rows.max(1);
        if per_row == 0 || width == 0 || per_row * rows != tensor.len() {
            return Err(wrong(&format!("of shape {:?} is not for {rows} sequences", tensor.shape())));
        }
        let next = |row: usize| -> Option<Next> {
            let (start, end) = (row * per_row, (row + 1) * per_row);
            let logits = end.saturating_sub(width).max(start)..end;
            Some(match tensor.data() {
                Data::I64(ids) => Next::Token(*ids.get(end - 1)?),
                Data::I32(ids) => Next::Token((*ids.get(end - 1)?).into()),
                Data::F32(all) => Next::Logits(all.get(logits)?.to_vec()),
                Data::F16(all) => Next::Logits(all.get(logits)?.iter().map(|x| x.to_f32()).collect()),
                Data::BF16(all) => Next::Logits(all.get(logits)?.iter().map(|x| x.to_f32()).collect()),
                _ => return None,
            })
        };
        let all: Option<Vec<Next>> = (0..rows).map(next).collect();
        all.ok_or_else(|| wrong("holds neither logits nor tokens"))
    }
}

/// What a step says about the token after it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Next {
    Token(i64),
    Logits(Vec<f32>),
}

impl Next {
    /// The most probable token, the lowest of equals.
    pub(crate) fn greedy(&self) -> i64 {
        match self {
            Next::Token(token) => *token,
            Next::Logits(logits) => {
                let better = |best: (usize, f32), (at, &x): (usize, &f32)| {
                    if x > best.1 { (at, x) } else { best }
                };
                logits.iter().enumerate().fold((0, f32::NEG_INFINITY), better).0 as i64
            }
        }
    }
}

/// What the steps of an entry are given besides state.
fn step_inputs(entry: &Entry, program: &RankProgram, state: &StateSpec) -> Result<StepInputs, String> {
    let past = state.ty.shape.get(state.axis).cloned().unwrap_or_else(|| Dim::from(0usize));
    let present = entry.outputs.iter().find(|port| port.name == state.output);
    let chosen = entry.graph.cases.clone();
    let is_fed = |port: &&Port| {
        let is_state = program.states.iter().any(|s| s.input == port.name);
        !is_state && !chosen.iter().any(|case| case.input == port.name)
    };
    let mut fed = Vec::new();
    for port in entry.inputs.iter().filter(is_fed) {
        let feed = feed_of(port, &past).ok_or_else(|| {
            format!("input `{}: {}` is none a decoder is known to have", port.name, port.ty)
        })?;
        fed.push((port.name.clone(), port.ty.dtype, port.ty.rank(), feed));
    }
    if fed.iter().filter(|(_, _, _, feed)| *feed == Feed::Tokens).count() != 1 {
        return Err("the model does not have one input of token ids".into());
    }
    Ok(StepInputs { grows: present.is_none_or(|present| grows(state, &present.ty)), fed, chosen })
}

fn feed_of(port: &Port, past: &Dim) -> Option<Feed> {
    if port.ty.dtype != DType::I64 && port.ty.dtype != DType::I32 && port.ty.dtype != DType::F32 {
        return None;
    }
    let last = port.ty.shape.last()?;
    if port.ty.rank() > 2 || last.as_size().is_some() {
        return None;
    }
    let symbols: BTreeSet<Arc<str>> = past.symbols().into_iter().collect();
    let all = last.symbols().iter().any(|symbol| symbols.contains(symbol));
    match (all, port.name.contains("pos"), port.name.contains("mask")) {
        (true, false, _) => Some(Feed::Mask { all: true }),
        (false, true, false) => Some(Feed::Positions),
        (false, false, true) => Some(Feed::Mask { all: false }),
        (false, false, false) if port.ty.dtype != DType::F32 => Some(Feed::Tokens),
        _ => None,
    }
}

/// The first output that is not state: tokens, or logits.
fn output_of(entry: &Entry, program: &RankProgram) -> Option<String> {
    let free = |port: &&Port| !program.states.iter().any(|s| s.output == port.name) && !port.keep_sharded;
    let fits = |port: &&Port| {
        matches!(port.ty.dtype, DType::F32 | DType::F16 | DType::BF16 | DType::I64 | DType::I32)
    };
    let candidates = || entry.outputs.iter().filter(free).filter(fits);
    let named = candidates().find(|port| port.name.contains("logits"));
    named.or_else(|| candidates().next()).map(|port| port.name.to_string())
}

fn numbers(dtype: DType, values: &[i64]) -> Outcome<Data> {
    match dtype {
        DType::I64 => Ok(Data::I64(values.to_vec())),
        DType::I32 => {
            let narrow = values.iter().map(|&v| i32::try_from(v)).collect::<Result<Vec<i32>, _>>();
            narrow.map(Data::I32).map_err(|e| Failure::new(Kind::Usage, format!("a token id: {e}")))
        }
        _ => Ok(Data::F32(values.iter().map(|&v| v as f32).collect())),
    }
}
