//! `cargo xtask test-all`: everything that CI runs, on any machine.
//!
//! Formatting, lints and `cargo test` need cargo and gcc only. The oracles need more: they are fetched into the target
//! folder where that is possible, and skipped aloud where it is not. `TPSHARD_REQUIRE=name,name` turns a skip into a
//! failure.

mod chromium;
mod conformance;
mod gpu;
mod oracles;
mod trusted;

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

const USAGE: &str = "usage: cargo xtask test-all | conformance [--write] [--only TEXT] | gpu-test [FLAG…] [DIR…] | trusted-base\n\
                     \n\
                     test-all      formatting, lints, all tests, and comparisons with tools nobody here wrote\n\
                     conformance   ONNX's own backend tests; --write writes docs/onnx-support.md\n\
                     gpu-test      models on the GPU of this machine, collectives by NCCL, and speed; DIR holds more models;\n\
                     \x20             --only models,nccl,speed; --layers N of the decoder measured; --small for toy shapes\n\
                     trusted-base  writes the table of what must be right into docs/architecture.md";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["test-all"] => test_all(),
        ["conformance", words @ ..] => conform(words),
        ["gpu-test", words @ ..] => root().and_then(|root| gpu::run(&root, words)),
        ["trusted-base"] => root().and_then(|root| trusted::write(&root)),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn test_all() -> Result<()> {
    let root = root()?;
    cargo(&root, &["fmt", "--all", "--check"])?;
    trusted::check(&root)?;
    cargo(&root, &["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"])?;
    let nvrtc = oracles::nvrtc(&root);
    let found = nvrtc.as_ref().ok().map(|folder| ("TPSHARD_CUDA_PATH", folder.as_path()));
    cargo_with(&root, &["test", "--quiet", "--workspace", "--release"], found)?;
    let outcome = oracles::run(&root, &nvrtc)?;
    println!("{outcome}");
    if outcome.failed > 0 { bail!("{} oracle checks failed", outcome.failed) } else { Ok(()) }
}

fn conform(words: &[&str]) -> Result<()> {
    let root = root()?;
    let wheels = conformance::wheels(&root).map_err(anyhow::Error::msg)?;
    conformance::run(&root, &wheels, words)
}

/// The root of the workspace.
fn root() -> Result<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().map(Path::to_path_buf).context("the xtask crate has no parent folder")
}

/// Where cargo builds, and where oracles are kept.
fn target(root: &Path) -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |folder| root.join(folder))
}

fn cargo(root: &Path, arguments: &[&str]) -> Result<()> {
    cargo_with(root, arguments, None)
}

/// Runs cargo with a variable.
fn cargo_with(root: &Path, arguments: &[&str], variable: Option<(&str, &Path)>) -> Result<()> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    println!("xtask: cargo {}", arguments.join(" "));
    let mut command = Command::new(cargo);
    let status = command.current_dir(root).args(arguments).envs(variable).status();
    let status = status.context("cannot start cargo")?;
    if status.success() { Ok(()) } else { bail!("cargo {} failed", arguments.join(" ")) }
}
