//! Rank 0's side: the prompt, then token after token, printed as text as far as it is complete.

use super::sampling::Sampler;
pub(crate) use super::sampling::Sampling;
use super::tokenizer;
use crate::decoder::Decoder;
use crate::failure::{Classify, Failure, Kind, Outcome};
use crate::output;
use crate::runner::session_failure;
use serde_json::json;
use std::path::{Path, PathBuf};
use tokenizers::Tokenizer;
use tpshard_runtime::session::{Session, now};
use tpshard_runtime::state::SlotId;

/// What is to be continued, and how far.
pub(crate) struct Continuation<'a> {
    pub(crate) prompt: &'a [i64],
    pub(crate) most: usize,
    pub(crate) stop: &'a [i64],
    pub(crate) sampling: Sampling,
}

pub(crate) fn result_file(folder: &Path) -> PathBuf {
    folder.join("generated.json")
}

pub(crate) fn work(
    session: &mut Session,
    wanted: &Continuation<'_>,
    mut printer: Printer,
    results: &Path,
) -> Outcome<()> {
    let decoder = Decoder::new(session.program())?;
    let mut sampler = Sampler::new(wanted.sampling);
    let slot = [SlotId(0)];
    let mut step = |tokens: &[i64], past: usize| {
        session.run_step(&slot, &decoder.inputs(&[tokens.to_vec()], past)?).map_err(|e| session_failure(&e))
    };
    let start = now();
    let mut found = step(wanted.prompt, 0)?;
    let prompted = now();
    let mut tokens = Vec::new();
    while tokens.len() < wanted.most {
        let next = decoder.next(&found, 1)?;
        let token = next.first().map_or(0, |next| sampler.choose(next));
        if wanted.stop.contains(&token) {
            break;
        }
        tokens.push(token);
        printer.token(token)?;
        if tokens.len() < wanted.most {
            found = step(&[token], wanted.prompt.len() + tokens.len() - 1)?;
        }
    }
    let end = now();
    session.close().map_err(|e| session_failure(&e))?;
    let text = printer.finish(&tokens)?;
    let seconds = |from: u64, to: u64| to.saturating_sub(from) as f64 / 1e9;
    // The first token comes out of the prompt's step.
    let stepped = tokens.len().saturating_sub(1) as f64;
    let found = json!({
        "text": text,
        "tokens": tokens,
        "prompt_tokens": wanted.prompt.len(),
        "prompt_seconds": seconds(start, prompted),
        "prompt_tokens_per_second": wanted.prompt.len() as f64 / seconds(start, prompted).max(1e-9),
        "generated_tokens": tokens.len(),
        "seconds": seconds(prompted, end),
        "tokens_per_second": stepped / seconds(prompted, end).max(1e-9),
    });
    let path = result_file(results);
    std::fs::write(&path, found.to_string())
        .map_err(|e| Failure::new(Kind::Resource, format!("{}: {e}", path.display())))
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

    /// Prints what is left and gives the whole text.
    fn finish(&mut self, tokens: &[i64]) -> Outcome<Option<String>> {
        let ids: Vec<u32> = tokens.iter().map(|&t| u32::try_from(t).unwrap_or(u32::MAX)).collect();
        let text = self.tokenizer.as_ref().map(|tokenizer| decode(tokenizer, &ids)).transpose()?;
        if !self.silent {
            let rest = text.as_deref().and_then(|text| text.get(self.printed..)).unwrap_or_default();
            output::line(rest)?;
        }
        Ok(text)
    }
}

fn decode(tokenizer: &Tokenizer, tokens: &[u32]) -> Outcome<String> {
    tokenizer.decode(tokens, true).or_fail(Kind::Mismatch)
}
