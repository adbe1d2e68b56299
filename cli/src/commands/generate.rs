//! `tpshard generate`: continues a prompt with a sharded decoder, text as it comes, or several prompts at once.

pub(crate) mod lead;
mod sampling;
mod stop;

use super::run::{add_flags, spawn};
use crate::arguments::{GenerateArguments, TensorArguments};
use crate::decoder::Decoder;
use crate::failure::{Classify, Failure, Kind, Outcome};
use crate::folder::Folder;
use crate::job::{Job, JobKind, Results};
use crate::output;
use crate::rank_program::RankFile;
use lead::{Sampling, result_file};
use std::path::Path;
use tokenizers::Tokenizer;

pub(crate) fn generate(arguments: &GenerateArguments, json: bool, quiet: bool) -> Outcome<()> {
    let folder = Folder::open(&arguments.folder)?;
    // What the model is not is said before any rank is started.
    Decoder::new(&RankFile::read(&folder.executable(0))?.program)?;
    let prompts = prompts(arguments)?;
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let state = Some((prompts.len(), longest.saturating_add(arguments.max_tokens)));
    let results = Results::new()?;
    let kind = JobKind::Generate {
        most: arguments.max_tokens,
        stop: stop::tokens(arguments)?,
        sampling: Sampling {
            temperature: arguments.temperature,
            top_k: arguments.top_k,
            top_p: arguments.top_p,
            seed: arguments.seed,
        },
        tokenizer: arguments.tokenizer.as_deref().map(absolute),
        silent: json,
        prompts,
    };
    let job = Job { kind, state, results: results.0.clone() };
    let flags = TensorArguments { inputs: None, outputs: None, ranks: arguments.ranks.clone() };
    spawn(job.commands(&folder, |command| add_flags(command, &flags, false))?)?;
    let path = result_file(&results.0);
    let text =
        std::fs::read(&path).map_err(|e| Failure::new(Kind::Rank, format!("rank 0 left nothing: {e}")))?;
    let found: serde_json::Value = serde_json::from_slice(&text).or_fail(Kind::Internal)?;
    if json {
        return output::line(found);
    }
    if !quiet {
        let number = |path: &str| found.pointer(path).and_then(serde_json::Value::as_f64).unwrap_or(0.0);
        output::say(format_args!(
            "prompt: {} tokens, {:.1} tokens/s; generated: {} tokens, {:.1} tokens/s",
            number("/prompt_tokens"),
            number("/prompt_tokens_per_second"),
            number("/generated_tokens"),
            number("/tokens_per_second"),
        ));
    }
    Ok(())
}

fn absolute(path: &Path) -> std::path::PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf())
}

/// The token ids of the prompts.
fn prompts(arguments: &GenerateArguments) -> Outcome<Vec<Vec<i64>>> {
    let prompts: Vec<Vec<i64>> = match (arguments.prompt.as_slice(), &arguments.tokenizer) {
        ([], _) => arguments.prompt_ids.iter().map(|ids| ids.0.clone()).collect(),
        (texts, Some(path)) => {
            let tokenizer = tokenizer(path)?;
            let encode = |text: &String| {
                let encoded = tokenizer.encode(text.as_str(), true).map_err(|e| {
                    Failure::new(Kind::Usage, format!("{}: cannot encode the prompt: {e}", path.display()))
                })?;
                Ok(encoded.get_ids().iter().map(|&id| id.into()).collect())
            };
            texts.iter().map(encode).collect::<Outcome<_>>()?
        }
        (_, None) => {
            let message = "a prompt of text needs a tokenizer\nhelp: --tokenizer FILE, or --prompt-ids 1,2,3";
            return Err(Failure::new(Kind::Usage, message));
        }
    };
    match prompts.iter().position(Vec::is_empty) {
        None => Ok(prompts),
        Some(at) => {
            let which = if prompts.len() > 1 { format!("prompt {}", at + 1) } else { "the prompt".into() };
            Err(Failure::new(Kind::Usage, format!("{which} has no tokens\nhelp: give one that has")))
        }
    }
}

pub(crate) fn tokenizer(path: &Path) -> Outcome<Tokenizer> {
    Tokenizer::from_file(path).map_err(|error| {
        let help = "help: name a tokenizer.json as Hugging Face's tokenizers write it";
        Failure::new(Kind::Usage, format!("{}: {error}\n{help}", path.display()))
    })
}
