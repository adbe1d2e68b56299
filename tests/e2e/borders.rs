//! Inputs that may be given in another form than their types say: masks of one entry, pasts with room behind what they hold.

use crate::support::*;
use crate::words;
use std::path::PathBuf;

/// A model with the outputs of ONNX Runtime.
fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../frontend/tests/fixtures/contrib").join(name)
}

#[test]
fn other_forms_give_what_onnx_runtime_does_on_any_number_of_ranks() {
    for name in ["attention_mask_of_one", "mask_of_one", "group_query_buffer", "group_query_buffer_prompt"] {
        let golden = fixture(name);
        let model = golden.join("model.onnx");
        for ranks in 1..=3 {
            let scratch = scratch();
            let folder = scratch.path().join("out");
            let words = words![model, "--tp", ranks.to_string(), "-o", folder, "--memory", "min", "--quiet"];
            end(&mut tpshard(words)).ok();
            end(&mut tpshard(words!["check", folder, "--model", model])).ok();
            end(&mut tpshard(words!["verify", folder, "--golden", golden])).ok();
            end(&mut tpshard(words!["verify", folder, "--golden", golden, "--model", model])).ok();
            end(&mut tpshard(words!["verify", folder, "--golden", golden, "--bisect"])).ok();
        }
        let said = end(&mut tpshard(words!["inspect", model])).ok();
        assert!(said.stdout.contains("\nborder "), "{}", said.stdout);
    }
}

#[test]
fn other_sizes_are_refused_as_ever() {
    let scratch = scratch();
    let folder = scratch.path().join("out");
    let model = fixture("group_query_buffer").join("model.onnx");
    end(&mut tpshard(words![model, "--tp", "2", "-o", folder, "--quiet"])).ok();
    // Five entries are in the past, and one is new: seven are too many.
    let mut inputs = read(&fixture("group_query_buffer").join("inputs.npz"));
    let mask = tpshard_ir::Tensor::from_vec(vec![2, 7], vec![1i64; 14]).unwrap();
    inputs.insert("mask".into(), mask);
    let given = scratch.path().join("in.npz");
    write(&given, &inputs);
    end(&mut tpshard(words!["run", folder, "--inputs", given])).fails(2, &["`mask`"]);
}
