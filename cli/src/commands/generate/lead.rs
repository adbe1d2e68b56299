//! Rank 0's side: the prompt, then token after token, printed as text as far as it is complete.

use super::sampling::Sampler;
pub(crate) use super::sampling::Sampling;
use super::tokenizer;
use crate::decoder::{Decoder, Next};
use crate::failure::{Classify, Failure, Kind, Outcome};
use crate::output;
use crate::runner::session_failure;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tokenizers::Tokenizer;
use tpshard_runtime::session::{Session, now};
use tpshard_runtime::state::SlotId;

/// What is to be continued, and how far.
pub(crate) struct Continuation<'a> {
    pub(crate) prompts: &'a [Vec<i64>],
    pub(crate) most: usize,
    pub(crate) stop: &'a [i64],
    pub(crate) sampling: Sampling,
}

pub(crate) fn result_file(folder: &Path) -> PathBuf {
    folder.join("generated.json")
}

/// A prompt on its way.
struct Sequence {
    slot: SlotId,
    sampler: Sampler,
    /// What the state holds.
    past: usize,
    tokens: Vec<i64>,
}

impl Sequence {
    /// Takes the next token; false if there is none, or none is wanted after it.
    fn goes_on(
        &mut self,
        next: &Next,
        wanted: &Continuation<'_>,
        said: &mut impl FnMut(i64) -> Outcome<()>,
    ) -> Outcome<bool> {
        let token = self.sampler.choose(next);
        if wanted.stop.contains(&token) || wanted.most == 0 {
            return Ok(false);
        }
        self.tokens.push(token);
        said(token)?;
        Ok(self.tokens.len() < wanted.most)
    }
}

pub(crate) fn work(
    session: &mut Session,
    wanted: &Continuation<'_>,
    mut printer: Printer,
    results: &Path,
) -> Outcome<()> {
    let decoder = Decoder::new(session.program())?;
    let alone = wanted.prompts.len() == 1;
    let mut said = |token| if alone { printer.token(token) } else { Ok(()) };
    let start = now();
    let mut sequences = Vec::with_capacity(wanted.prompts.len());
    let mut going: Vec<usize> = Vec::new();
    let mut first = Vec::with_capacity(wanted.prompts.len());
    for (id, prompt) in wanted.prompts.iter().enumerate() {
        let slot = SlotId(id as u64);
        let sampler = Sampler::new(wanted.sampling);
        let mut sequence = Sequence { slot, sampler, past: 0, tokens: Vec::new() };
        first.extend(step(session, &decoder, &mut [&mut sequence], std::slice::from_ref(prompt))?);
        sequences.push(sequence);
    }
    let prompted = now();
    for (id, next) in first.iter().enumerate() {
        if let Some(sequence) = sequences.get_mut(id)
            && sequence.goes_on(next, wanted, &mut said)?
        {
            going.push(id);
        }
    }
    while !going.is_empty() {
        let mut stepping: Vec<&mut Sequence> = Vec::new();
        for (id, sequence) in sequences.iter_mut().enumerate() {
            if going.contains(&id) {
                stepping.push(sequence);
            }
        }
        let most = if decoder.together { stepping.len() } else { 1 };
        let mut ended = Vec::new();
        for (stepping, ids) in stepping.chunks_mut(most).zip(going.chunks(most)) {
            let rows: Vec<Vec<i64>> =
                stepping.iter().map(|s| s.tokens.last().copied().into_iter().collect()).collect();
            let found = step(session, &decoder, stepping, &rows)?;
            for ((sequence, next), id) in stepping.iter_mut().zip(&found).zip(ids) {
                if !sequence.goes_on(next, wanted, &mut said)? {
                    ended.push(*id);
                }
            }
        }
        going.retain(|id| !ended.contains(id));
    }
    let end = now();
    session.close().map_err(|e| session_failure(&e))?;
    let tokens: Vec<&[i64]> = sequences.iter().map(|s| s.tokens.as_slice()).collect();
    let texts = printer.finish(&tokens)?;
    let found = report(wanted, &tokens, &texts, [start, prompted, end]);
    let path = result_file(results);
    std::fs::write(&path, found.to_string())
        .map_err(|e| Failure::new(Kind::Resource, format!("{}: {e}", path.display())))
}

/// Steps sequences by a row of tokens each, equally many.
fn step(
    session: &mut Session,
    decoder: &Decoder,
    sequences: &mut [&mut Sequence],
    rows: &[Vec<i64>],
) -> Outcome<Vec<Next>> {
    let past: Vec<usize> = sequences.iter().map(|s| s.past).collect();
    let slots: Vec<SlotId> = sequences.iter().map(|s| s.slot).collect();
    let inputs = decoder.inputs(rows, &past)?;
    let results = session.run_step(&slots, &inputs).map_err(|e| session_failure(&e))?;
    for (sequence, row) in sequences.iter_mut().zip(rows) {
        sequence.past += row.len();
    }
    decoder.next(&results, rows.len())
}

fn report(
    wanted: &Continuation<'_>,
    tokens: &[&[i64]],
    texts: &[Option<String>],
    [start, prompted, end]: [u64; 3],
) -> Value {
    let seconds = |from: u64, to: u64| to.saturating_sub(from) as f64 / 1e9;
    let prompt_tokens: usize = wanted.prompts.iter().map(Vec::len).sum();
    // The first token of each comes out of the prompt's step.
    let stepped: usize = tokens.iter().map(|tokens| tokens.len().saturating_sub(1)).sum();
    let one = |((prompt, tokens), text): ((&Vec<i64>, &&[i64]), &Option<String>)| {
        json!({
            "text": text,
            "tokens": tokens,
            "prompt_tokens": prompt.len(),
            "generated_tokens": tokens.len(),
        })
    };
    let continuations: Vec<Value> = wanted.prompts.iter().zip(tokens).zip(texts).map(one).collect();
    let mut found = json!({
        "prompt_tokens": prompt_tokens,
        "prompt_seconds": seconds(start, prompted),
        "prompt_tokens_per_second": prompt_tokens as f64 / seconds(start, prompted).max(1e-9),
        "generated_tokens": tokens.iter().map(|tokens| tokens.len()).sum::<usize>(),
        "seconds": seconds(prompted, end),
        "tokens_per_second": stepped as f64 / seconds(prompted, end).max(1e-9),
    });
    if let ([only], Value::Object(found)) = (continuations.as_slice(), &mut found) {
        found.insert("text".into(), only["text"].clone());
        found.insert("tokens".into(), only["tokens"].clone());
    }
    found["continuations"] = continuations.into();
    found
}

/// Prints tokens as they come: as text if there is a tokenizer, else as numbers.
pub(crate) struct Printer {
    tokenizer: Option<Tokenizer>,
    silent: bool,
    tokens: Vec<u32>,
    /// Bytes of the text of `tokens` that have been printed.
    printed: usize,
}

impl Printer {
    pub(crate) fn new(path: Option<&Path>, silent: bool) -> Outcome<Printer> {
        Ok(Printer { tokenizer: path.map(tokenizer).transpose()?, silent, tokens: Vec::new(), printed: 0 })
    }

    fn token(&mut self, token: i64) -> Outcome<()> {
        if self.silent {
            return Ok(());
        }
        let Some(tokenizer) = &self.tokenizer else {
            let gap = if self.tokens.is_empty() { "" } else { " " };
            self.tokens.push(0);
            return output::text(format_args!("{gap}{token}"));
        };
        self.tokens.push(u32::try_from(token).unwrap_or(u32::MAX));
        let text = decode(tokenizer, &self.tokens)?;
        // A character may need several tokens: what is incomplete ends in a replacement character.
        if !text.ends_with('\u{fffd}')
            && let Some(new) = text.get(self.printed..)
        {
            output::text(new)?;
            self.printed = text.len();
        }
        Ok(())
    }

    /// Prints what is left, or the whole texts if there are several, and gives them.
    fn finish(&mut self, tokens: &[&[i64]]) -> Outcome<Vec<Option<String>>> {
        let whole = |tokens: &&[i64]| {
            let ids: Vec<u32> = tokens.iter().map(|&t| u32::try_from(t).unwrap_or(u32::MAX)).collect();
            self.tokenizer.as_ref().map(|tokenizer| decode(tokenizer, &ids)).transpose()
        };
        let texts = tokens.iter().map(whole).collect::<Outcome<Vec<_>>>()?;
        if self.silent {
            return Ok(texts);
        }
        if let [text] = texts.as_slice() {
            let rest = text.as_deref().and_then(|text| text.get(self.printed..)).unwrap_or_default();
            output::line(rest)?;
            return Ok(texts);
        }
        for (at, (text, tokens)) in texts.iter().zip(tokens).enumerate() {
            let gap = if at == 0 { "" } else { "\n" };
            output::line(format_args!("{gap}==> prompt {} <==", at + 1))?;
            let numbers = || tokens.iter().map(i64::to_string).collect::<Vec<_>>().join(" ");
            output::line(text.clone().unwrap_or_else(numbers))?;
        }
        Ok(texts)
    }
}

fn decode(tokenizer: &Tokenizer, tokens: &[u32]) -> Outcome<String> {
    tokenizer.decode(tokens, true).or_fail(Kind::Mismatch)
}
