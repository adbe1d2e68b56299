//! Models on the GPU, compared with their golden outputs, as one table.
//!
//! One rank has the GPU for itself; two and four share it, or have one each where there are as many.

use super::Surroundings;
use super::process::said;
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

const RANKS: [usize; 3] = [1, 2, 4];
/// The models of the repository.
pub(super) const OWN: &str = "tests/models";

/// Tries all models of the repository, and of the folders that were named.
pub(super) fn run(surroundings: &Surroundings) -> Result<()> {
    let Surroundings { root, tpshard, work, options, .. } = surroundings;
    let mut models = Vec::new();
    for folder in [&root.join(OWN)].into_iter().chain(&options.folders) {
        models.extend(models_of(folder)?);
    }
    let mut wrong = 0;
    println!("{:40} {}", "model", RANKS.map(|ranks| format!("{:>12}", format!("N={ranks}"))).concat());
    let mut reasons = Vec::new();
    for model in &models {
        let name = model.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let mut line = format!("{name:40} ");
        for ranks in RANKS {
            match attempt(tpshard, model, ranks, &work.join(format!("{name}-{ranks}"))) {
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
    result.map(|_| seconds)
}
