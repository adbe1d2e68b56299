//! Comparisons with tools nobody here wrote: ONNX Runtime on the committed model, NVIDIA's compiler, the launchers and the
//! browser people use.

use crate::chromium::check_pages;
use crate::conformance;
use anyhow::{Context, Result};
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Packages of the Python oracles, pinned.
const PACKAGES: [&str; 3] = ["numpy==2.4.6", "onnx==1.23.2", "onnxruntime==1.31.1"];

/// NVIDIA's compiler, pinned: code of version 12 loads on the most drivers.
const NVRTC: &str = "nvidia-cuda-nvrtc-cu12==12.9.86";

/// Names of the browser.
const BROWSERS: [&str; 4] = ["chromium", "chromium-browser", "google-chrome-stable", "google-chrome"];

/// What the checks came to.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    pub(crate) skipped: usize,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// Where oracles are kept.
fn kept(root: &Path) -> Result<PathBuf> {
    let work = crate::target(root).join("oracles");
    std::fs::create_dir_all(&work).with_context(|| format!("cannot make {}", work.display()))?;
    Ok(work)
}

/// Runs every check whose tool is here or can be fetched. `nvrtc` is what [`nvrtc`] found before the tests.
pub(crate) fn run(root: &Path, nvrtc: &Result<PathBuf, String>) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    let work = kept(root)?;
    let tpshard = crate::target(root).join("release").join("tpshard");
    match python(&work) {
        Ok(python) => outcome.record("onnxruntime", onnxruntime(root, &work, &tpshard, &python)),
        Err(why) => outcome.skip("onnxruntime", &why),
    }
    match conformance::wheels(root) {
        Ok(wheels) => outcome.record("onnx-suite", conformance::run(root, &wheels, &[])),
        Err(why) => outcome.skip("onnx-suite", &why),
    }
    match nvrtc {
        // The tests have passed with it.
        Ok(_) => outcome.record("nvrtc", Ok(())),
        Err(why) => outcome.skip("nvrtc", why),
    }
    match find("mpirun") {
        Some(mpirun) => outcome.record("mpirun", mpirun_ranks(root, &work, &tpshard, &mpirun)),
        None => outcome.skip("mpirun", "no mpirun on PATH (Debian: apt-get install openmpi-bin)"),
    }
    match find("torchrun") {
        Some(torchrun) => outcome.record("torchrun", torchrun_ranks(root, &work, &tpshard, &torchrun)),
        None => outcome.skip("torchrun", "no torchrun on PATH (pip install torch)"),
    }
    match BROWSERS.into_iter().find_map(find) {
        Some(chromium) => outcome.record("chromium", report_pages(root, &work, &tpshard, &chromium)),
        None => outcome.skip("chromium", "chromium not found (apt-get install chromium)"),
    }
    Ok(outcome)
}

impl Outcome {
    fn record(&mut self, name: &str, result: Result<()>) {
        match result {
            Ok(()) => {
                println!("oracle {name}: ok");
                self.passed += 1;
            }
            Err(error) => {
                println!("oracle {name}: FAILED: {error:#}");
                self.failed += 1;
            }
        }
    }

    fn skip(&mut self, name: &str, why: &str) {
        let required = std::env::var("TPSHARD_REQUIRE").unwrap_or_default();
        if required.split(',').any(|r| r == name) {
            println!("oracle {name}: FAILED: required but missing: {why}");
            self.failed += 1;
        } else {
            println!("oracle {name}: SKIPPED: {why}");
            self.skipped += 1;
        }
    }
}

fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// A Python with the pinned packages, made once under the target folder.
fn python(work: &Path) -> Result<PathBuf, String> {
    let environment = work.join("python");
    let python = environment.join("bin").join("python");
    let stamp = environment.join("packages");
    let wanted = PACKAGES.join("\n");
    if std::fs::read_to_string(&stamp).is_ok_and(|found| found == wanted) {
        return Ok(python);
    }
    let base = find("python3").ok_or("no python3 on PATH")?;
    quietly(Command::new(base).args(["-m", "venv", "--clear"]).arg(&environment))?;
    quietly(Command::new(&python).args(["-m", "pip", "install", "--quiet"]).args(PACKAGES))?;
    std::fs::write(stamp, wanted).map_err(|e| e.to_string())?;
    Ok(python)
}

/// The folder of NVIDIA's compiler, which needs no GPU: a package of 90 MB, fetched once. The tests that compile kernels
/// skip themselves without it.
pub(crate) fn nvrtc(root: &Path) -> Result<PathBuf, String> {
    let packages = kept(root).map_err(|error| format!("{error:#}"))?.join("nvrtc");
    let stamp = packages.join("package");
    let folder = packages.join("nvidia/cuda_nvrtc/lib");
    if std::fs::read_to_string(&stamp).is_ok_and(|found| found == NVRTC) {
        return Ok(folder);
    }
    println!("oracle nvrtc: fetching {NVRTC} (90 MB)");
    let base = find("python3").ok_or("no python3 on PATH")?;
    let mut pip = Command::new(base);
    pip.args(["-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target"]).arg(&packages);
    quietly(pip.arg(NVRTC))?;
    std::fs::write(stamp, NVRTC).map_err(|e| e.to_string())?;
    Ok(folder)
}

fn quietly(command: &mut Command) -> Result<(), String> {
    let output = command.stdin(Stdio::null()).output().map_err(|e| format!("{command:?}: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let last = text.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or("no message");
    Err(format!("{command:?} failed: {last}"))
}

fn run_checked(command: &mut Command) -> Result<()> {
    quietly(command).map_err(anyhow::Error::msg)
}

/// The model that is in the repository.
fn model(root: &Path) -> PathBuf {
    root.join("tests").join("models").join("tiny-llama").join("model.onnx")
}

fn shard(tpshard: &Path, model: &Path, ranks: usize, out: &Path) -> Result<()> {
    let mut command = Command::new(tpshard);
    command.arg(model).args(["--tp", &ranks.to_string(), "--overwrite", "--quiet", "-o"]).arg(out);
    run_checked(&mut command)
}

fn verify(tpshard: &Path, out: &Path, golden: &Path) -> Result<()> {
    run_checked(Command::new(tpshard).args(["verify"]).arg(out).arg("--golden").arg(golden))
}

/// ONNX Runtime's outputs for fresh inputs of several shapes, against ours on 1, 2, 3 and 4 ranks.
fn onnxruntime(root: &Path, work: &Path, tpshard: &Path, python: &Path) -> Result<()> {
    let golden = work.join("onnxruntime-golden");
    let script = root.join("tests").join("oracles").join("onnxruntime_golden.py");
    run_checked(Command::new(python).arg(script).arg(model(root)).arg(&golden))?;
    for ranks in [1, 2, 3, 4] {
        let out = work.join(format!("onnxruntime-tp{ranks}"));
        shard(tpshard, &model(root), ranks, &out)?;
        verify(tpshard, &out, &golden)?;
    }
    Ok(())
}

fn launched(root: &Path, work: &Path, tpshard: &Path, launcher: &mut Command, name: &str) -> Result<()> {
    let out = work.join(name);
    let golden = root.join("tests").join("models").join("tiny-llama");
    let got = work.join(format!("{name}-got.npz"));
    shard(tpshard, &model(root), 4, &out)?;
    let launched = launcher.arg(out.join("run")).arg("--inputs").arg(golden.join("inputs.npz"));
    run_checked(launched.arg("--outputs").arg(&got))?;
    run_checked(Command::new(tpshard).arg("compare").arg(&got).arg(golden.join("outputs.npz")))
}

fn mpirun_ranks(root: &Path, work: &Path, tpshard: &Path, mpirun: &Path) -> Result<()> {
    let mut launcher = Command::new(mpirun);
    launcher.args(["--allow-run-as-root", "--oversubscribe", "-np", "4"]);
    launched(root, work, tpshard, &mut launcher, "mpirun")
}

fn torchrun_ranks(root: &Path, work: &Path, tpshard: &Path, torchrun: &Path) -> Result<()> {
    let mut launcher = Command::new(torchrun);
    launcher.args(["--no-python", "--nproc-per-node", "4"]);
    launched(root, work, tpshard, &mut launcher, "torchrun")
}

/// The page of an even plan, and of an uneven one with several entries.
fn report_pages(root: &Path, work: &Path, tpshard: &Path, chromium: &Path) -> Result<()> {
    let (even, uneven) = (work.join("chromium-tp4"), work.join("chromium-tp3"));
    shard(tpshard, &model(root), 4, &even)?;
    let mut command = Command::new(tpshard);
    command.arg(model(root)).args(["--tp", "3", "--dim", "decode*100:seq=1", "--dim", "prefill:seq=64"]);
    run_checked(command.args(["--memory", "min", "--overwrite", "--quiet", "-o"]).arg(&uneven))?;
    check_pages(chromium, work, &[even, uneven].map(|folder| folder.join("report.html")))
}
