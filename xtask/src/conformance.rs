//! `cargo xtask conformance`: fetches the versions of the `onnx` package whose tests are run, and runs them.

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Pinned, newest first: the last version that ships its node tests, the one before it, and one with the older opsets.
const VERSIONS: [&str; 3] = ["1.22.0", "1.21.0", "1.11.0"];
/// What a wheel is picked for; only its test data are read. Older versions have no wheels for newer Pythons.
const PICKED: [(&str, &[&str]); 2] =
    [("3.12", &["manylinux_2_28_x86_64", "manylinux2014_x86_64"]), ("3.9", &["manylinux2010_x86_64"])];
const DOCUMENT: &str = "docs/onnx-support.md";

/// The wheels, fetched if they are not there.
pub(crate) fn wheels(root: &Path) -> Result<Vec<(&'static str, PathBuf)>, String> {
    let folder = crate::target(root).join("oracles").join("onnx");
    std::fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    VERSIONS.into_iter().map(|version| Ok((version, wheel(&folder, version)?))).collect()
}

fn wheel(folder: &Path, version: &str) -> Result<PathBuf, String> {
    if let Some(found) = find(folder, version) {
        return Ok(found);
    }
    let mut why = String::new();
    for (python, platforms) in PICKED {
        let mut pip = Command::new("python3");
        pip.args(["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]);
        pip.args(["--python-version", python]).arg("--dest").arg(folder);
        pip.args(platforms.iter().flat_map(|platform| ["--platform", platform]));
        let output = pip.arg(format!("onnx=={version}")).stdin(Stdio::null()).output();
        match output {
            Err(error) => return Err(format!("no python3: {error}")),
            Ok(output) if output.status.success() => {
                return find(folder, version).ok_or_else(|| format!("pip left no wheel of onnx {version}"));
            }
            Ok(output) => why = String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        }
    }
    Err(format!("pip finds no onnx {version}: {}", why.lines().last().unwrap_or("no message")))
}

fn find(folder: &Path, version: &str) -> Option<PathBuf> {
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(folder).ok()?.filter_map(|e| Some(e.ok()?.path())).collect();
    files.sort();
    let start = format!("onnx-{version}-");
    let is_it = |path: &PathBuf| {
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        name.starts_with(&start) && name.ends_with(".whl")
    };
    files.into_iter().find(is_it)
}

/// Runs the tests of `wheels`; further words go to the runner.
pub(crate) fn run(root: &Path, wheels: &[(&str, PathBuf)], words: &[&str]) -> Result<()> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let mut command = Command::new(cargo);
    command.current_dir(root).args(["run", "--quiet", "--release", "--package", "conformance", "--"]);
    command.args(words).arg(root.join(DOCUMENT));
    for (version, wheel) in wheels {
        let mut word = std::ffi::OsString::from(format!("{version}="));
        word.push(wheel);
        command.arg(word);
    }
    if command.status().context("cannot start cargo")?.success() {
        Ok(())
    } else {
        bail!("the tests of onnx failed")
    }
}
