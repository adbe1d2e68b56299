//! `cargo xtask gpu-test`: the GPU of this machine, in one go: models compared with their golden outputs, collectives by
//! NCCL, and speed beside what the card can do and what PyTorch does with it.
//!
//! What stands in for a GPU (`TPSHARD_CUDA_PATH`) serves as well, for all but the numbers; `--small` measures tiny shapes.
//! What is not there is skipped aloud. A section that fails does not keep the others from running.

mod models;
mod nccl;
mod process;
mod speed;

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// How to run it.
#[derive(Debug, Default, PartialEq, Eq)]
struct Options {
    /// Tiny shapes, and the tool built for development.
    small: bool,
    /// Only these sections.
    only: Option<String>,
    /// Layers of the decoder that is measured.
    layers: Option<String>,
    /// More models.
    folders: Vec<PathBuf>,
}

/// What sections have in common.
struct Surroundings {
    root: PathBuf,
    tpshard: PathBuf,
    bench: PathBuf,
    /// A folder to work in.
    work: PathBuf,
    options: Options,
}

type Section = fn(&Surroundings) -> Result<()>;
const SECTIONS: [(&str, Section); 3] = [("models", models::run), ("nccl", nccl::run), ("speed", speed::run)];

/// Builds the tool and runs the sections.
pub(crate) fn run(root: &Path, words: &[&str]) -> Result<()> {
    let options = parse(words)?;
    let profile = if options.small { "debug" } else { "release" };
    let mut build = vec!["build", "--quiet", "-p", "tpshard", "-p", "bench-gpu"];
    build.extend((!options.small).then_some("--release"));
    crate::cargo(root, &build)?;
    let built = crate::target(root).join(profile);
    let work = crate::target(root).join("gpu-test");
    std::fs::create_dir_all(&work).with_context(|| format!("cannot make {}", work.display()))?;
    let surroundings = Surroundings {
        root: root.to_path_buf(),
        tpshard: built.join("tpshard"),
        bench: built.join("bench-gpu"),
        work,
        options,
    };
    let mut failed = Vec::new();
    for (name, section) in SECTIONS {
        if surroundings.options.only.as_ref().is_some_and(|only| !only.split(',').any(|one| one == name)) {
            continue;
        }
        println!("\n== {name}");
        let start = Instant::now();
        if let Err(error) = section(&surroundings) {
            println!("{name}: FAILED: {error:#}");
            failed.push(name);
        }
        println!("== {name}: {:.0} s", start.elapsed().as_secs_f64());
    }
    if failed.is_empty() { Ok(()) } else { bail!("failed: {}", failed.join(", ")) }
}

fn parse(words: &[&str]) -> Result<Options> {
    let mut options = Options::default();
    let mut words = words.iter();
    while let Some(&word) = words.next() {
        let mut value =
            || words.next().map(|value| value.to_string()).with_context(|| format!("{word} needs a value"));
        match word {
            "--small" => options.small = true,
            "--only" => {
                let list = value()?;
                let known = SECTIONS.map(|(name, _)| name);
                if let Some(unknown) = list.split(',').find(|one| !known.contains(one)) {
                    bail!("--only {unknown}: the sections are {}", known.join(", "));
                }
                options.only = Some(list);
            }
            "--layers" => options.layers = Some(value()?),
            flag if flag.starts_with("--") => bail!("{flag}: no such flag"),
            folder => options.folders.push(folder.into()),
        }
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_flags_or_folders() {
        let found = parse(&["a", "--small", "--only", "speed,nccl", "--layers", "4", "b"]).unwrap();
        let expected = Options {
            small: true,
            only: Some("speed,nccl".into()),
            layers: Some("4".into()),
            folders: vec!["a".into(), "b".into()],
        };
        assert_eq!(found, expected);
        for wrong in [&["--only"][..], &["--only", "spead"], &["--fast"]] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
