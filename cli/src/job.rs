//! What ranks do besides running once: the same description reaches every rank, rank 0 leads, the others follow.

use crate::commands::bench::lead as bench;
use crate::commands::generate::lead::{self as generate, Sampling};
use crate::failure::{Classify, Failure, Kind, Outcome};
use crate::folder::Folder;
use crate::runner::session_failure;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use tpshard_ir::Tensor;
use tpshard_runtime::session::{Session, SessionOptions};
use tpshard_runtime::state::StateOptions;

/// A job of all ranks of a program.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Job {
    pub(crate) kind: JobKind,
    /// Sequences whose state stays with the ranks, and how many entries each has room for; none where state enters and
    /// leaves as tensors.
    pub(crate) state: Option<(usize, usize)>,
    /// The folder that ranks write what they found out into.
    pub(crate) results: PathBuf,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum JobKind {
    /// Runs, `warm_up` of them unmeasured. With `decode`, each run is a prompt and so many tokens after it.
    Bench {
        warm_up: usize,
        samples: usize,
        decode: usize,
        /// Time every step too.
        steps: bool,
    },
    /// Continues prompts.
    Generate {
        prompts: Vec<Vec<i64>>,
        most: usize,
        stop: Vec<i64>,
        sampling: Sampling,
        tokenizer: Option<PathBuf>,
        /// Say nothing until the end.
        silent: bool,
    },
}

impl Job {
    pub(crate) fn read(path: &Path) -> Outcome<Job> {
        let text = std::fs::read_to_string(path)
            .map_err(|e| Failure::new(Kind::Resource, format!("{}: {e}", path.display())))?;
        serde_json::from_str(&text).or_fail(Kind::Usage)
    }

    /// One command per rank, made by `command`, that does this job.
    pub(crate) fn commands(&self, folder: &Folder, command: impl Fn(&mut Command)) -> Outcome<Vec<Command>> {
        let path = self.results.join("job.json");
        let text = serde_json::to_string(self).or_fail(Kind::Internal)?;
        std::fs::write(&path, text)
            .map_err(|e| Failure::new(Kind::Resource, format!("{}: {e}", path.display())))?;
        let of_rank = |rank| {
            let mut ranks = Command::new(folder.executable(rank));
            command(&mut ranks);
            ranks.arg("--job").arg(&path);
            ranks
        };
        Ok((0..folder.ranks).map(of_rank).collect())
    }

    /// True if rank 0 is given inputs.
    pub(crate) fn takes_inputs(&self) -> bool {
        matches!(self.kind, JobKind::Bench { .. })
    }

    pub(crate) fn options(&self, options: SessionOptions) -> SessionOptions {
        let state = self.state.map(|(slots, capacity)| StateOptions { capacity, slots });
        SessionOptions { timeline: matches!(self.kind, JobKind::Bench { steps: true, .. }), state, ..options }
    }

    /// Does it on this rank.
    pub(crate) fn work(&self, session: &mut Session, inputs: &BTreeMap<String, Tensor>) -> Outcome<()> {
        if session.rank() != 0 {
            session.follow().map_err(|e| session_failure(&e))?;
        }
        match &self.kind {
            JobKind::Bench { warm_up, samples, decode, .. } => {
                bench::work(session, inputs, [*warm_up, *samples, *decode], &self.results)
            }
            JobKind::Generate { prompts, most, stop, sampling, tokenizer, silent } if session.rank() == 0 => {
                let continued = generate::Continuation { prompts, most: *most, stop, sampling: *sampling };
                let text = generate::Printer::new(tokenizer.as_deref(), *silent)?;
                generate::work(session, &continued, text, &self.results)
            }
            JobKind::Generate { .. } => Ok(()),
        }
    }
}

/// Names that are tried for it.
const MOST_ATTEMPTS: usize = 100;

/// A folder for what ranks write down, which goes with the command.
pub(crate) struct Results(pub(crate) PathBuf);

impl Results {
    pub(crate) fn new() -> Outcome<Results> {
        let base = format!("tpshard-{}", std::process::id());
        let mut path = std::env::temp_dir().join(&base);
        // A process of the same number may have been killed before it could clean up.
        let mut made = std::fs::create_dir(&path);
        for attempt in 1..MOST_ATTEMPTS {
            if made.is_ok() || path.metadata().is_err() {
                break;
            }
            path = std::env::temp_dir().join(format!("{base}-{attempt}"));
            made = std::fs::create_dir(&path);
        }
        made.map_err(|e| Failure::new(Kind::Resource, format!("{}: {e}", path.display())))?;
        Ok(Results(path))
    }
}

impl Drop for Results {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
