//! `cargo xtask gpu-test`: models on the GPU of this machine, compared with their golden outputs, as one table.
//!
//! One rank has the GPU for itself; two and four share it, or have one each where there are as many. A last run of two
//! ranks asks for NCCL, which from version 2.30 on may let them share a GPU. What stands in for a GPU
//! (`TPSHARD_CUDA_PATH`) serves as well.

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

const RANKS: [usize; 3] = [1, 2, 4];
/// Ranks of the run that asks for NCCL.
const NCCL_RANKS: usize = 2;
/// What lets ranks share a GPU, and keeps them from using more of it than there is.
const NCCL_SETTINGS: [(&str, &str); 3] =
    [("NCCL_MULTI_RANK_GPU_ENABLE", "1"), ("NCCL_NVLS_ENABLE", "0"), ("NCCL_MAX_CTAS", "4")];
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
    let columns = RANKS.map(|ranks| format!("{:>12}", format!("N={ranks}"))).concat();
    println!("{:40} {columns}{:>12}", "model", format!("N={NCCL_RANKS} NCCL"));
    let mut reasons = Vec::new();
    for model in &models {
        let name = model.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let mut line = format!("{name:40} ");
        for (ranks, by_nccl) in RANKS.map(|ranks| (ranks, false)).into_iter().chain([(NCCL_RANKS, true)]) {
            let run = if by_nccl { run_by_nccl } else { verify };
            match attempt(&tpshard, model, ranks, &work.join(format!("{name}-{ranks}")), run) {
                Ok(seconds) => line.push_str(&format!("{:>12}", format!("{seconds:.2} s"))),
                Err(reason) if by_nccl && reason.contains("libnccl was not found") => {
                    line.push_str(&format!("{:>12}", "no NCCL"));
                }
                Err(reason) => {
                    wrong += 1;
                    line.push_str(&format!("{:>12}", "FAILED"));
                    let nccl = if by_nccl { " by NCCL" } else { "" };
                    reasons.push(format!("{name} N={ranks}{nccl}: {reason}"));
                }
            }
        }
        println!("{line}");
    }
    reasons.iter().for_each(|reason| println!("{reason}"));
    if wrong > 0 { bail!("{wrong} of {} runs failed", models.len() * (RANKS.len() + 1)) } else { Ok(()) }
}

/// Folders with a model and golden outputs.
fn models_of(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut found: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    found.retain(|model| model.join("model.onnx").is_file() && model.join("outputs.npz").is_file());
    found.sort();
    Ok(found)
}

/// Runs the ranks of a folder on the inputs of a model, and compares with its outputs.
type Runs = fn(&Path, &Path, &Path) -> Result<(), String>;

fn verify(tpshard: &Path, model: &Path, out: &Path) -> Result<(), String> {
    said(Command::new(tpshard).arg("verify").arg(out).arg("--golden").arg(model))
}

fn run_by_nccl(tpshard: &Path, model: &Path, out: &Path) -> Result<(), String> {
    let got = out.with_extension("npz");
    let mut run = Command::new(tpshard);
    run.arg("run").arg(out).arg("--inputs").arg(model.join("inputs.npz")).arg("--outputs").arg(&got);
    said(run.args(["--comm", "nccl"]).envs(NCCL_SETTINGS))?;
    let compared = said(Command::new(tpshard).arg("compare").arg(&got).arg(model.join("outputs.npz")));
    std::fs::remove_file(&got).map_err(|error| format!("{}: {error}", got.display()))?;
    compared
}

/// Shards and runs; how long running took.
fn attempt(tpshard: &Path, model: &Path, ranks: usize, out: &Path, run: Runs) -> Result<f64, String> {
    let mut shard = Command::new(tpshard);
    shard.arg(model.join("model.onnx")).args(["--tp", &ranks.to_string(), "--target", "cuda", "--split-all"]);
    said(shard.args(["--overwrite", "--quiet", "-o"]).arg(out))?;
    let start = Instant::now();
    let result = run(tpshard, model, out);
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
