//! `cargo xtask gpu-test`: models on the GPU of this machine, compared with their golden outputs, as one table.
//!
//! One rank has the GPU for itself; two and four share it, or have one each where there are as many. What stands in for
//! a GPU (`TPSHARD_CUDA_PATH`) serves as well.

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

const RANKS: [usize; 3] = [1, 2, 4];
const OWN_MODELS: &str = "tests/models";

/// Builds the tool and tries all models of `folders`, and those of the repository.
pub(crate) fn run(root: &Path, folders: &[&str]) -> Result<()> {
    crate::cargo(root, &["build", "--quiet", "--release", "-p", "tpshard"])?;
    let tpshard = crate::target(root).join("release").join("tpshard");
    let work = crate::target(root).join("gpu-test");
    std::fs::create_dir_all(&work).with_context(|| format!("cannot make {}", work.display()))?;
    let mut models = Vec::new();
    for folder in [root.join(OWN_MODELS)].into_iter().chain(folders.iter().map(PathBuf::from)) {
        models.extend(models_of(&folder)?);
    }
    let mut wrong = 0;
    println!("{:40} {}", "model", RANKS.map(|ranks| format!("{:>12}", format!("N={ranks}"))).concat());
    let mut reasons = Vec::new();
    for model in &models {
        let name = model.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let mut line = format!("{name:40} ");
        for ranks in RANKS {
            match attempt(&tpshard, model, ranks, &work.join(format!("{name}-{ranks}"))) {
                Ok(seconds) => line.push_str(&format!("{:>12}", format!("{seconds:.2} s"))),
                Err(reason) => {
                    wrong += 1;
                    line.push_str(&format!("{:>12}", "FAILED"));
                    reasons.push(format!("{name} N={ranks}: {reason}"));
                }
            }
        }
        println!("{line}");
    }
    reasons.iter().for_each(|reason| println!("{reason}"));
    if wrong > 0 { bail!("{wrong} of {} runs failed", models.len() * RANKS.len()) } else { Ok(()) }
}

/// Folders with a model and golden outputs.
fn models_of(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut found: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    found.retain(|model| model.join("model.onnx").is_file() && model.join("outputs.npz").is_file());
    found.sort();
    Ok(found)
}

/// Shards and verifies; how long running took.
fn attempt(tpshard: &Path, model: &Path, ranks: usize, out: &Path) -> Result<f64, String> {
    let mut shard = Command::new(tpshard);
    shard.arg(model.join("model.onnx")).args(["--tp", &ranks.to_string(), "--target", "cuda", "--split-all"]);
    said(shard.args(["--overwrite", "--quiet", "-o"]).arg(out))?;
    let start = Instant::now();
    let mut verify = Command::new(tpshard);
    let result = said(verify.arg("verify").arg(out).arg("--golden").arg(model));
    let seconds = start.elapsed().as_secs_f64();
    std::fs::remove_dir_all(out).map_err(|error| format!("{}: {error}", out.display()))?;
    result.map(|()| seconds)
}

/// Runs a command; the line of what it says that tells most of a failure.
fn said(command: &mut Command) -> Result<(), String> {
    let output = command.stdin(Stdio::null()).output().map_err(|error| error.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    let telling = text.lines().find(|line| line.contains("FAILED") || line.contains("error"));
    Err(telling.unwrap_or("no message").to_owned())
}
