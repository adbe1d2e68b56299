//! What is asked for and cannot be had: flags that contradict the model or each other, results that cannot be written,
//! and how machines are told.

use crate::support::*;
use crate::words;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use tpshard_ir::{Data, Tensor};

/// Sharding with these flags is refused as wrong usage, with these words and a remedy, and leaves nothing.
#[track_caller]
fn refused(flags: &[&str], words: &[&str]) {
    let scratch = scratch();
    let mut shard = tpshard(words![model(), "--tp", "2", "-o", scratch.path().join("out")]);
    let ended = end(shard.args(flags)).fails(2, words);
    assert!(ended.stderr.contains("help: "), "{}", ended.stderr);
    assert!(ended.stdout.is_empty(), "{}", ended.stdout);
    assert!(names(scratch.path()).is_empty(), "{flags:?}");
}

/// Runs a command whose standard output nobody reads.
#[track_caller]
fn unread(command: &mut Command) -> (Option<i32>, String) {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn a_closed_pipe_ends_the_output_quietly() {
    let (folder, scratch) = (sharded(2), scratch());
    let other = scratch.path().join("other.npz");
    let mut inputs = read(&prompt());
    inputs["input_ids"] = Tensor::zeros(tpshard_ir::DType::I64, vec![2, 7]).unwrap();
    write(&other, &inputs);
    let cases = [
        (tpshard(words!["inspect", folder, "--tir"]), 0),
        (tpshard(words!["plan", model(), "--ranks", "1"]), 0),
        (tpshard(["--help"]), 0),
        (tpshard(words!["run", folder, "--inputs", prompt()]), 0),
        // What nobody reads still counts.
        (tpshard(words!["compare", prompt(), other]), 4),
    ];
    for (mut command, code) in cases {
        let (found, stderr) = unread(&mut command);
        assert_eq!(found, Some(code), "{command:?}: {stderr}");
        assert!(!stderr.contains("panicked") && !stderr.contains("ipe"), "{stderr}");
    }
}

#[test]
fn a_full_disk_is_a_matter_of_resources() {
    let folder = sharded(2);
    let inspected = [folder.clone(), folder.join("rank1"), folder.join("run"), model()];
    let mut commands: Vec<Command> = inspected.iter().map(|path| tpshard(words!["inspect", path])).collect();
    commands.push(tpshard(words!["check", folder]));
    commands.push(tpshard(words!["compare", prompt(), prompt()]));
    commands.push(tpshard(words!["run", folder, "--inputs", prompt()]));
    commands.push(tpshard(["--help"]));
    for mut command in commands {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let output = command.stdout(full).stderr(Stdio::piped()).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(5), "{command:?}: {stderr}");
        assert!(stderr.contains("standard output") && stderr.contains("help: "), "{stderr}");
        assert!(!stderr.contains("panicked"), "{stderr}");
    }
}

#[test]
fn machines_are_told_of_errors_too() {
    let (folder, scratch) = (sharded(2), scratch());
    let missing = scratch.path().join("missing");
    let cases = [
        (tpshard(words!["inspect", missing, "--json"]), 5, "resource"),
        (tpshard(words!["plan", missing, "--json"]), 5, "resource"),
        (tpshard(words!["--json", missing, "--tp", "2"]), 5, "resource"),
        (tpshard(words!["run", missing, "--json"]), 5, "resource"),
        (tpshard(words!["check", missing, "--json"]), 5, "resource"),
        (tpshard(words!["compare", missing, missing, "--json"]), 5, "resource"),
        (tpshard(words!["verify", folder, "--json"]), 2, "usage"),
        (tpshard(words!["exec", folder, "--json", "--threads", "none"]), 2, "usage"),
        (tpshard(words!["--json", model(), "--tp", "0"]), 2, "usage"),
        // The ranks say it, the launcher reports it, once.
        (tpshard(words!["run", folder, "--json"]), 2, "usage"),
        (tpshard(words!["exec", folder, "--json"]), 2, "usage"),
    ];
    for (mut line, code, kind) in cases {
        let ended = end(&mut line).fails(code, &["error: "]);
        let error = &ended.json()["error"];
        assert_eq!((&error["kind"], &error["exit_code"]), (&kind.into(), &code.into()), "{error}");
        let message = error["message"].as_str().unwrap();
        let first = message.lines().next().unwrap();
        assert!(first.len() > 8 && ended.stderr.contains(first), "{message} / {}", ended.stderr);
    }
    let error = end(&mut tpshard(words!["run", folder, "--json"])).json()["error"]["message"].to_string();
    assert!(error.contains("no inputs") && error.contains("input_ids"), "{error}");
    // A rank under a launcher of its own has nobody to report for it.
    let mut rank = command(folder.join("rank1"));
    let error = end(rank.arg("--json")).fails(2, &["no launcher"]).json();
    assert_eq!(error["error"]["kind"], "usage");
    let texts = [folder.clone(), folder.join("rank1"), model()];
    for path in &texts {
        let plain = end(&mut tpshard(words!["inspect", path, "--tir"])).ok().stdout;
        assert_eq!(end(&mut tpshard(words!["inspect", path, "--tir", "--json"])).ok().json()["tir"], plain);
    }
}

#[test]
fn results_that_differ_are_told_with_the_error() {
    let scratch = scratch();
    let mut inputs = read(&prompt());
    inputs["input_ids"] = Tensor::new(vec![2, 7], Data::I64(vec![1; 14])).unwrap();
    let other = scratch.path().join("other.npz");
    write(&other, &inputs);
    let ended = end(&mut tpshard(words!["compare", prompt(), other, "--json"])).fails(4, &["differ"]);
    let report = ended.json();
    assert_eq!((&report["passed"], &report["error"]["exit_code"]), (&false.into(), &4.into()), "{report}");
}

#[test]
fn threads_and_time_have_bounds() {
    let folder = sharded(2);
    for (flag, value) in [
        ("--threads", "0"),
        ("--threads", "1025"),
        ("--threads", "18446744073709551616"),
        ("--threads", "-1"),
        ("--timeout", "0"),
        ("--timeout", "604801"),
        ("--timeout", "soon"),
    ] {
        for mut line in [
            tpshard(words!["run", folder]),
            tpshard(words!["exec", folder]),
            command(folder.join("run")),
            command(folder.join("rank1")),
        ] {
            end(line.arg("--inputs").arg(prompt()).arg(format!("{flag}={value}"))).fails(2, &[flag, value]);
        }
    }
    let most = ["--threads", "8", "--timeout", "604800"];
    end(tpshard(words!["run", folder, "--inputs", prompt()]).args(most)).ok();
}

#[test]
fn outputs_that_the_model_does_not_have() {
    refused(&["--output", "lodgings"], &["lodgings", "the outputs are logits"]);
    refused(&["--output", "logits", "--output", "logits"], &["logits", "twice"]);
    refused(&["--output", "logits=topk:0"], &["logits=topk:0", "at least 1"]);
    refused(&["--output", "logits=topk:513"], &["513 exceeds 512", "logits"]);
    refused(&["--output", "logits[:, :, 512]"], &["513 exceeds 512", "logits"]);
    refused(&["--output", "logits[0, 0, 0, 0]"], &["logits", "f32[batch, "]);
    refused(&["--output", "logits[:, 99999999999]"], &["31 bits"]);
}

/// The plan is made and checked with dims for which the position exists, or the request is refused.
#[test]
fn positions_far_from_the_start() {
    let scratch = scratch();
    let out = scratch.path().join("out");
    shard(2, &out, &["--output", "logits[:, 40]"]);
    // The prompt has 7 tokens.
    let run = end(&mut tpshard(words!["run", out, "--inputs", prompt()]));
    run.fails(2, &["41 <= ", "logits", "help: "]);
    refused(&["--output", "logits[:, 99999999]"], &["logits[:, 99999999]", "too large to check"]);
}

#[test]
fn inputs_and_dims_that_the_model_does_not_have() {
    refused(&["--bind", "colour=1"], &["colour", "the inputs are input_ids"]);
    refused(&["--bind", "input_ids=1"], &["input_ids", "i64"]);
    refused(&["--bind", "a=1", "--bind", "a=2"], &["--bind a=2", "already"]);
    refused(&["--role", "colour=seq"], &["colour", "batch"]);
    refused(&["--role", "batch=colour"], &["--role batch=colour", "seq"]);
    refused(&["--role", "batch=batch", "--role", "batch=seq"], &["--role batch=seq", "already"]);
}

#[test]
fn dims_that_contradict_themselves_or_the_model() {
    refused(&["--dim", "batch=1,batch=2"], &["--dim batch=2", "already"]);
    refused(&["--dim", "batch=1,input_ids[0]=2"], &["input_ids[0]=2", "batch=1 is the same dim"]);
    refused(&["--dim", "attention_mask[1]=9"], &["attention_mask[1]=9", "follows from others"]);
    refused(&["--dim", "past_key_values.0.key[1]=4"], &["always 4"]);
    refused(&["--dim", "input_ids[7]=4"], &["input_ids[7]", "i64["]);
    refused(&["--dim", "colours[0]=4"], &["colours[0]", "its symbols are batch"]);
    refused(&["--dim", "batch=0"], &["--dim batch=0", "from 1"]);
    refused(&["--dim", "batch=2147483648"], &["batch=2147483648", "2147483647"]);
    refused(&["--dim", "batch=99999999999999999999"], &["not a size"]);
    refused(&["--dim", "batch=1,,seq=2"], &["--dim"]);
    // A cache may be empty, and one dim may be said in two ways that agree.
    let dims = "past=0,seq=4,batch=2,input_ids[0]=2";
    end(&mut tpshard(words!["plan", model(), "--ranks", "1", "--dim", dims])).ok();
}

#[test]
fn sizes_of_memory_have_units() {
    refused(&["--memory", "0.5"], &["--memory 0.5", "whole", "GiB"]);
    refused(&["--memory", "0"], &["--memory 0", "GiB"]);
    refused(&["--memory", "99999999999TiB"], &["more than can be addressed"]);
    refused(&["--memory", "10parsec"], &["--memory 10parsec", "not a size"]);
}

#[test]
fn flags_that_would_be_ignored_are_refused() {
    let folder = sharded(2);
    let refused = |words: &[std::ffi::OsString], said: &[&str]| {
        end(&mut tpshard(words)).fails(2, said);
    };
    refused(&words!["verify", folder, "--golden", golden(), "--inputs", prompt()], &["--golden", "--inputs"]);
    refused(&words!["inspect", model(), "--rank", "1"], &["--rank 1", "not a folder"]);
    refused(&words!["inspect", folder.join("rank0"), "--rank", "1"], &["--rank 1", "not a folder"]);
    let tap = words!["run", folder, "--inputs", prompt(), "--tap", "/model/model/embed_tokens/Gather"];
    end(&mut tpshard(&tap)).ok();
    for flag in [["--threads", "2"], ["--timeout", "9"]] {
        end(tpshard(&tap).args(flag)).fails(2, &["--tap", flag[0]]);
    }
    refused(&words!["run", folder, "--tap", "x"], &["--inputs"]);
    let unknown = ["colours:1e-3"];
    let compare = words!["compare", prompt(), prompt(), "--atol", unknown[0]];
    refused(&compare, &["`colours`", "the outputs are", "input_ids"]);
    let verify = words!["verify", folder, "--golden", golden(), "--rtol", unknown[0]];
    refused(&verify, &["`colours`", "the outputs are logits"]);
}

#[test]
fn the_launcher_is_known_for_what_it_is() {
    let run = sharded(2).join("run");
    let inspected = end(&mut tpshard(words!["inspect", run])).ok();
    assert!(inspected.stdout.contains("launcher of 2 ranks"), "{}", inspected.stdout);
    assert_eq!(end(&mut tpshard(words!["inspect", run, "--json"])).ok().json()["ranks"], 2);
    end(&mut tpshard(words!["inspect", run, "--tir"])).fails(2, &["launcher of 2 ranks", "rank0"]);
}

#[test]
fn a_file_that_is_no_runner_is_refused_before_any_work() {
    let scratch = scratch();
    let (file, out) = (scratch.path().join("runner"), scratch.path().join("out"));
    let whole = fs::read(env!("CARGO_BIN_EXE_tpshard")).unwrap();
    let refuse = |runner: &Path, model: &Path| {
        let mut line = tpshard(words![model, "--tp", "2", "-o", out, "--runner", runner]);
        end(&mut line).fails(2, &["--runner", &runner.display().to_string(), "help: "]);
    };
    for bytes in [&b""[..], b"#!/bin/sh\n", &whole[..200], &whole[..whole.len() / 2]] {
        fs::write(&file, bytes).unwrap();
        // Not even the model has been looked at.
        refuse(&file, &scratch.path().join("missing.onnx"));
    }
    refuse(scratch.path(), &model());
    refuse(&scratch.path().join("missing"), &model());
    assert_eq!(names(scratch.path()), ["runner"]);
}

#[test]
fn places_that_outputs_cannot_go_to_are_refused_before_any_work() {
    let (folder, scratch) = (sharded(2), scratch());
    let nowhere = scratch.path().join("missing/got.npz");
    for outputs in [nowhere.as_path(), scratch.path()] {
        for mut line in
            [tpshard(words!["run", folder]), tpshard(words!["exec", folder]), command(folder.join("run"))]
        {
            // The inputs are missing as well, which would be found later.
            let ended = end(line.arg("--outputs").arg(outputs));
            let ended = ended.fails(5, &[&format!("error: {}: ", outputs.display()), "help: --outputs"]);
            assert!(!ended.stderr.contains("tmp:") && !ended.stderr.contains("[rank"), "{}", ended.stderr);
        }
    }
    assert!(names(scratch.path()).is_empty());
}

#[test]
fn weights_of_another_build_are_named_by_file() {
    let scratch = scratch();
    let folder = copy_of_sharded(2, &scratch);
    let path = folder.join("rank1.safetensors");
    let whole = fs::read(&path).unwrap();
    let length = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let header = String::from_utf8(whole[8..8 + length].to_vec()).unwrap();
    let at = header.find("\"weights_hash\":\"").unwrap() + 16;
    let mut foreign = whole.clone();
    let digit = &mut foreign[8 + at + 8];
    *digit = if *digit == b'0' { b'1' } else { b'0' };
    fs::write(&path, foreign).unwrap();
    let run = end(&mut tpshard(words!["run", folder, "--inputs", prompt()]));
    run.fails(4, &["rank1.safetensors", "hash", "help: "]);
}

#[test]
fn help_is_for_people() {
    let folder = sharded(2);
    let help = |line: &mut Command| end(line.arg("--help")).ok().stdout;
    let runner = help(&mut command(folder.join("rank1")));
    assert!(runner.contains("Runs one rank of a sharded model"), "{runner}");
    assert!(!runner.contains("takes as well"), "{runner}");
    for name in ["run", "check", "verify", "exec"] {
        let text = help(&mut tpshard([name]));
        assert!(text.contains("The folder that `tpshard MODEL --tp N` wrote"), "{text}");
        assert!(!text.contains("takes as well"), "{text}");
    }
    assert!(help(&mut tpshard(["plan"])).contains("The ONNX model"));
    assert!(help(&mut tpshard(["verify"])).contains("Inputs for --model"));
}
