//! The table of the trusted base in docs/architecture.md: how many lines must be right for a checked program to be.

use anyhow::{Context, Result, bail};
use std::fmt::Write;
use std::fs;
use std::path::Path;

const DOCUMENT: &str = "docs/architecture.md";
const FIRST: &str = "| part | lines |\n|---|---|\n";

/// Parts and the files and folders they consist of.
const PARTS: [(&str, &[&str]); 5] = [
    (
        "the importer: `frontend/src/lower`, `frontend/src/ops`, `frontend/src/deferred`",
        &["frontend/src/lower", "frontend/src/ops", "frontend/src/deferred"],
    ),
    ("what `--dtype` makes of a model: `passes/src/precision`", &["passes/src/precision"]),
    (
        "what operations mean: `ir/src/interp`, `ir/src/border.rs`, `ir/src/spmd.rs`",
        &["ir/src/interp", "ir/src/border.rs", "ir/src/spmd.rs"],
    ),
    ("the kernels: `runtime/src/cpu`", &["runtime/src/cpu"]),
    ("the checker: `passes/checker/src`", &["passes/checker/src"]),
];

/// Writes the table anew.
pub(crate) fn write(root: &Path) -> Result<()> {
    let path = root.join(DOCUMENT);
    let text = fs::read_to_string(&path).context(DOCUMENT)?;
    fs::write(&path, renewed(root, &text)?).context(DOCUMENT)
}

/// Fails if the table is not what the sources say.
pub(crate) fn check(root: &Path) -> Result<()> {
    let text = fs::read_to_string(root.join(DOCUMENT)).context(DOCUMENT)?;
    if renewed(root, &text)? == text {
        return Ok(());
    }
    bail!("the trusted base in {DOCUMENT} is counted wrong\nhelp: cargo xtask trusted-base writes it")
}

fn renewed(root: &Path, text: &str) -> Result<String> {
    let (before, rest) =
        text.split_once(FIRST).with_context(|| format!("{DOCUMENT} has no table of parts"))?;
    let after = rest.split_once("\n\n").map_or("", |(_, after)| after);
    let mut table = String::new();
    for (part, places) in PARTS {
        let mut lines = 0;
        for place in places {
            lines += count(&root.join(place))?;
        }
        writeln!(table, "| {part} | {lines} |")?;
    }
    Ok(format!("{before}{FIRST}{table}\n{after}"))
}

fn count(path: &Path) -> Result<usize> {
    if path.is_dir() {
        let mut lines = 0;
        for entry in fs::read_dir(path).with_context(|| path.display().to_string())? {
            lines += count(&entry?.path())?;
        }
        return Ok(lines);
    }
    if path.extension().is_none_or(|extension| extension != "rs") {
        return Ok(0);
    }
    Ok(fs::read_to_string(path).with_context(|| path.display().to_string())?.lines().count())
}
