//! `--determinism tp`: the same bits for every number of ranks, of threads, of rows in a batch, and on every machine.

use crate::support::*;
use crate::words;
use std::path::Path;

/// Prompt and decode step of the golden folder.
fn outputs(folder: &Path, more: &[&str], isa: Option<&str>) -> Vec<Vec<u8>> {
    let scratch = scratch();
    let mut all = Vec::new();
    for inputs in ["inputs.npz", "inputs_decode.npz"] {
        let got = scratch.path().join("got.npz");
        let mut run = tpshard(words!["run", folder, "--inputs", golden().join(inputs), "--outputs", got]);
        run.args(more);
        if let Some(isa) = isa {
            run.env("TPSHARD_ISA", isa);
        }
        end(&mut run).ok();
        all.push(std::fs::read(&got).unwrap());
        std::fs::remove_file(&got).unwrap();
    }
    all
}

#[test]
fn outputs_do_not_depend_on_ranks_threads_or_instructions() {
    let scratch = scratch();
    let folder = |ranks: usize| scratch.path().join(ranks.to_string());
    shard(1, &folder(1), &["--determinism", "tp"]);
    let expected = outputs(&folder(1), &[], None);
    assert!(outputs(&folder(1), &["--threads", "3"], None) == expected, "threads");
    assert!(outputs(&folder(1), &[], Some("portable")) == expected, "instructions");
    end(&mut tpshard(words!["verify", folder(1), "--golden", golden()])).ok();
    for ranks in [2, 3, 4, 8] {
        shard(ranks, &folder(ranks), &["--determinism", "tp", "--memory", "min"]);
        assert!(outputs(&folder(ranks), &[], None) == expected, "{ranks} ranks");
        end(&mut tpshard(words!["check", folder(ranks), "--model", model()])).ok();
    }
    let inspected = end(&mut tpshard(words!["inspect", folder(2), "--json"])).ok().json();
    assert_eq!(inspected["build"]["determinism"], "tp");
}

#[test]
fn unknown_levels_and_instructions_are_refused() {
    let scratch = scratch();
    let folder = scratch.path().join("out");
    end(&mut tpshard(words![model(), "--tp", "2", "-o", folder, "--determinism", "exact"]))
        .fails(2, &["exact", "determinism"]);
    assert!(!folder.exists());
    let mut run = tpshard(words!["run", sharded(2), "--inputs", prompt()]);
    end(run.env("TPSHARD_ISA", "mmx")).fails(2, &["TPSHARD_ISA=mmx", "portable"]);
}
