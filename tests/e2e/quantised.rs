//! A model whose weights are codes of four and eight bits and whose activations are rounded to bytes.

use crate::support::*;
use crate::words;
use std::path::{Path, PathBuf};

fn packed() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/packed-llama")
}

#[test]
fn codes_and_bytes_give_what_onnx_runtime_does_on_any_number_of_ranks() {
    for ranks in 1..=4 {
        let scratch = scratch();
        let folder = scratch.path().join("out");
        let model = packed().join("model.onnx");
        end(&mut tpshard(words![model, "--tp", ranks.to_string(), "-o", folder, "--quiet"])).ok();
        end(&mut tpshard(words!["check", folder, "--model", model])).ok();
        end(&mut tpshard(words!["verify", folder, "--golden", packed()])).ok();
    }
}

/// Sums of bytes are exact, so that it makes no difference which instructions add them.
#[test]
fn integers_and_floats_give_the_same_bits_for_every_number_of_ranks() {
    let scratch = scratch();
    let mut first = None;
    for ranks in [1, 3] {
        let folder = scratch.path().join(ranks.to_string());
        let model = packed().join("model.onnx");
        let words = words![model, "--tp", ranks.to_string(), "-o", folder, "--quiet", "--determinism", "tp"];
        end(&mut tpshard(words)).ok();
        for instructions in [None, Some("portable")] {
            let got = scratch.path().join(format!("{ranks}-{}.npz", instructions.unwrap_or("best")));
            let inputs = packed().join("inputs.npz");
            let mut run = tpshard(words!["run", folder, "--inputs", inputs, "--outputs", got]);
            instructions.map(|name| run.env("TPSHARD_ISA", name));
            end(&mut run).ok();
            let outputs = read(&got);
            assert_eq!(outputs.len(), 5);
            match &first {
                None => first = Some(outputs),
                Some(first) => assert!(*first == outputs, "{ranks} ranks, {instructions:?}"),
            }
        }
    }
}
