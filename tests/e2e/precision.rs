//! `--dtype`: models of `f32` that multiply and store in 16 bits.

use crate::cuda::{has_compiler, standin, with_libraries};
use crate::support::*;
use crate::words;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use tpshard_ir::Data;

/// The tiny decoder in a precision, for so many ranks, split wherever that is possible.
#[track_caller]
fn narrow(scratch: &Path, dtype: &str, ranks: usize, more: &[&str]) -> PathBuf {
    let folder = scratch.join(format!("{dtype}-{ranks}"));
    shard(ranks, &folder, &[&["--dtype", dtype, "--split-all", "--overwrite"], more].concat());
    folder
}

fn weight_bytes(folder: &Path, ranks: usize) -> u64 {
    (0..ranks).map(|rank| fs::metadata(folder.join(format!("rank{rank}.safetensors"))).unwrap().len()).sum()
}

#[test]
fn a_narrow_model_is_near_and_half_as_large() {
    let scratch = scratch();
    for ranks in [1, 2] {
        let whole = scratch.path().join("f32");
        shard(ranks, &whole, &["--split-all", "--overwrite"]);
        for dtype in ["bf16", "f16"] {
            let folder = narrow(scratch.path(), dtype, ranks, &[]);
            // What is left are headers and vectors.
            let (narrow, wide) = (weight_bytes(&folder, ranks), weight_bytes(&whole, ranks));
            assert!(narrow * 100 <= wide * 56, "{dtype} on {ranks} ranks: {narrow} of {wide} bytes");
            end(&mut tpshard(words!["verify", &folder, "--golden", golden()])).ok();
            // It is not the model itself.
            let exact = words!["verify", &folder, "--golden", golden(), "--atol", "1e-6", "--rtol", "1e-6"];
            end(&mut tpshard(exact)).fails(4, &["out of tolerance"]);
            end(&mut tpshard(words!["check", &folder, "--model", model()])).ok();
        }
    }
}

#[test]
fn inputs_and_outputs_keep_their_types_and_state_goes_in_and_out_as_declared() {
    let scratch = scratch();
    let folder = narrow(scratch.path(), "f16", 2, &[]);
    let got = scratch.path().join("got.npz");
    let inputs = golden().join("inputs_decode.npz");
    end(&mut tpshard(words!["run", &folder, "--inputs", inputs, "--outputs", &got])).ok();
    let (got, expected) = (read(&got), read(&golden().join("outputs_decode.npz")));
    assert_eq!(got.len(), expected.len());
    for (name, expected) in &expected {
        assert!(matches!(got[name].data(), Data::F32(_)), "{name} is {}", got[name].dtype());
        let Data::F32(elements) = expected.data() else { panic!("{name} is not f32") };
        let range = elements.iter().fold(0f32, |range, x| range.max(x.abs()));
        assert!(distance(&got[name], expected) < 5e-3 * range, "{name}");
    }
    let text = end(&mut tpshard(words!["inspect", model(), "--dtype", "f16"])).ok().stdout;
    assert!(text.contains("may be given as f32"), "{text}");
}

#[test]
fn state_that_stays_is_narrow() {
    let scratch = scratch();
    let bytes = |dtype: &[&str]| {
        let mut command = tpshard(words!["plan", model(), "--ranks", "1", "--json"]);
        let json = end(command.args(dtype)).ok().json();
        let plan = json.pointer("/plans/0/plan").cloned().unwrap_or_default();
        ["weight_bytes_per_rank", "state_bytes_per_rank"]
            .map(|key| plan.get(key).and_then(Value::as_u64).unwrap_or(0))
    };
    let ([weights, state], [narrow_weights, narrow_state]) = (bytes(&[]), bytes(&["--dtype", "bf16"]));
    assert_eq!(narrow_state * 2, state);
    assert!(narrow_weights * 100 <= weights * 56 && narrow_weights * 2 >= weights);
    // Tokens that are decoded one by one pass through it.
    let folder = narrow(scratch.path(), "bf16", 2, &[]);
    let decode =
        words!["bench", &folder, "--inputs", prompt(), "--decode", "2", "--samples", "1", "--warm-up", "0"];
    end(&mut tpshard(decode)).ok();
}

#[test]
fn a_model_is_compared_with_itself_in_the_same_precision() {
    let scratch = scratch();
    let folder = narrow(scratch.path(), "bf16", 2, &[]);
    let config: Value = serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
    assert_eq!(config.pointer("/build/dtype"), Some(&"bf16".into()));
    let inputs = golden().join("inputs_decode.npz");
    end(&mut tpshard(words!["verify", &folder, "--model", model(), "--inputs", &inputs])).ok();
    end(&mut tpshard(words!["verify", &folder, "--bisect", "--golden", golden()])).ok();
}

#[test]
fn what_makes_no_sense_is_refused() {
    let scratch = scratch();
    let words = words![model(), "--tp", "1", "--dtype", "f32", "-o", scratch.path().join("out")];
    end(&mut tpshard(words)).fails(2, &["--dtype", "bf16", "f16"]);
    end(&mut tpshard(words!["inspect", sharded(1), "--dtype", "f16"])).fails(2, &["--dtype", "help: "]);
}

#[test]
fn a_gpu_computes_in_the_same_precision() {
    if !has_compiler() {
        return;
    }
    let scratch = scratch();
    let folder = scratch.path().join("out");
    let flags = ["--target", "cuda:sm_90", "--dtype", "bf16", "--split-all"];
    let mut shard = tpshard(words![model(), "--tp", "2", "-o", &folder]);
    end(with_libraries(shard.args(flags), &standin())).ok();
    let mut verify = tpshard(words!["verify", &folder, "--golden", golden()]);
    end(with_libraries(&mut verify, &standin())).ok();
}
