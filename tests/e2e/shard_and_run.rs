//! Any number of ranks gives PyTorch's outputs, and equal builds give equal folders.

use crate::support::*;
use crate::words;
use serde_json::Value;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use tpshard_ir::{DType, Data, Tensor};

/// The model has 8 heads and 4 KV heads; 3 and 5 divide neither, and 5 ranks are more than KV heads.
#[test]
fn every_number_of_ranks_gives_the_golden_outputs() {
    for ranks in 1..=5 {
        let (folder, scratch) = (sharded(ranks), scratch());
        // Prompt and decode step from one folder: other batch sizes and cache lengths need no other build.
        let verified = end(&mut tpshard(words!["verify", folder, "--golden", golden(), "--json"])).ok();
        let report = verified.json();
        assert_eq!(report["passed"], true, "{ranks} ranks: {report}");
        assert_eq!(report["results"].as_array().unwrap().len(), 2, "{ranks} ranks: {report}");

        let got = scratch.path().join("got.npz");
        let mut run = tpshard(words!["run", folder, "--inputs", prompt(), "--outputs", got]);
        end(&mut run).ok();
        assert_golden(&got, "outputs.npz");
        let expected = read(&golden().join("outputs.npz"));
        assert_eq!(read(&got).keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    }
}

#[test]
fn one_rank_of_the_interpreter_agrees_with_the_folder() {
    let mut verify =
        tpshard(words!["verify", sharded(4), "--model", model(), "--golden", golden(), "--json"]);
    assert_eq!(end(&mut verify).ok().json()["passed"], true);
    let mut bisect = tpshard(words!["verify", sharded(4), "--golden", golden(), "--bisect", "--json"]);
    let report = end(&mut bisect).ok().json();
    assert_eq!(report["passed"], true);
    assert!(report["compared"].as_u64().unwrap() > 100, "{report}");
}

#[test]
fn threads_can_have_processors_of_their_own() {
    let scratch = scratch();
    let got = scratch.path().join("got.npz");
    let run = |more: &[&str]| {
        let mut run = tpshard(words!["run", sharded(1), "--inputs", prompt(), "--outputs", got]);
        run.args(["--own-processors"]).args(more);
        end(&mut run)
    };
    run(&["--threads", "1"]).ok();
    assert_golden(&got, "outputs.npz");
    run(&["--threads", "1024"]).fails(5, &["1024 processors of their own", "help: fewer --threads"]);
}

#[test]
fn outputs_appear_complete_or_not_at_all() {
    let scratch = scratch();
    let got = scratch.path().join("got.npz");
    end(&mut tpshard(words!["run", sharded(2), "--inputs", prompt(), "--outputs", got])).ok();
    assert_eq!(names(scratch.path()), ["got.npz"]);
    let before = fs::read(&got).unwrap();

    // A run that fails leaves the earlier result alone and nothing beside it.
    let wrong = scratch.path().join("wrong.npz");
    let mut inputs = read(&prompt());
    inputs.shift_remove("attention_mask");
    write(&wrong, &inputs);
    end(&mut tpshard(words!["run", sharded(2), "--inputs", wrong, "--outputs", got]))
        .fails(2, &["attention_mask"]);
    assert_eq!(names(scratch.path()), ["got.npz", "wrong.npz"]);
    assert_eq!(fs::read(&got).unwrap(), before);

    // The place of the outputs is a folder: nothing is replaced, nothing stays beside it.
    let taken = scratch.path().join("taken");
    fs::create_dir(&taken).unwrap();
    end(&mut tpshard(words!["run", sharded(2), "--inputs", prompt(), "--outputs", taken]))
        .fails(5, &["taken", "help: "]);
    let missing = scratch.path().join("no/such/got.npz");
    end(&mut tpshard(words!["run", sharded(2), "--inputs", prompt(), "--outputs", missing]))
        .fails(5, &["no/such", "help: "]);
    assert_eq!(names(scratch.path()), ["got.npz", "taken", "wrong.npz"]);
    assert!(names(&taken).is_empty());
}

#[test]
fn a_selection_gives_the_last_position() {
    let scratch = scratch();
    let (folder, got) = (scratch.path().join("out"), scratch.path().join("got.npz"));
    shard(4, &folder, &["--output", "logits[:, -1]"]);
    end(&mut tpshard(words!["run", folder, "--inputs", prompt(), "--outputs", got])).ok();
    let got = &selected(&got);
    assert!(distance(&last_position(got.shape()), got) < 1e-3);
    end(&mut tpshard(words!["check", folder, "--model", model()])).ok();
}

/// The selected output. The cache goes on whether it is asked for or not.
fn selected(path: &Path) -> Tensor {
    let mut outputs = read(path);
    assert!(outputs.keys().skip(1).all(|name| name.starts_with("present.")), "{:?}", outputs.keys());
    outputs.swap_remove("logits").unwrap()
}

/// The golden logits of the last position, with the dims of `shape`.
fn last_position(shape: &[usize]) -> Tensor {
    let golden = read(&golden().join("outputs.npz"));
    let logits = &golden["logits"];
    let [batch, length, vocabulary] = logits.shape() else { panic!("{:?}", logits.shape()) };
    let Data::F32(values) = logits.data() else { panic!("{}", logits.dtype()) };
    let rows = (0..*batch).flat_map(|b| {
        let start = (b * length + length - 1) * vocabulary;
        values[start..start + vocabulary].to_vec()
    });
    Tensor::new(shape.to_vec(), Data::F32(rows.collect())).unwrap()
}

#[test]
fn a_selection_gives_the_likeliest_token() {
    let scratch = scratch();
    let (folder, got) = (scratch.path().join("out"), scratch.path().join("got.npz"));
    shard(4, &folder, &["--output", "logits[:, -1]=argmax"]);
    end(&mut tpshard(words!["run", folder, "--inputs", prompt(), "--outputs", got])).ok();
    let got = selected(&got);
    assert_eq!(got.dtype(), DType::I64);
    let Data::I64(tokens) = got.data() else { panic!("{}", got.dtype()) };
    let rows = last_position(&[tokens.len(), 512]);
    let Data::F32(values) = rows.data() else { panic!("{}", rows.dtype()) };
    let largest = |row: &[f32]| {
        let best = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        row.iter().position(|v| *v == best).unwrap() as i64
    };
    assert_eq!(*tokens, values.chunks(512).map(largest).collect::<Vec<_>>());
}

#[test]
fn folders_whose_files_cannot_be_executed_run_with_exec() {
    let scratch = scratch();
    let (folder, got) = (copy_of_sharded(4, &scratch), scratch.path().join("got.npz"));
    for name in names(&folder) {
        fs::set_permissions(folder.join(name), fs::Permissions::from_mode(0o644)).unwrap();
    }
    end(&mut tpshard(words!["run", folder, "--inputs", prompt(), "--outputs", got]))
        .fails(5, &["rank0", "tpshard exec"]);
    assert!(!got.exists());
    end(&mut tpshard(words!["exec", folder, "--inputs", prompt(), "--outputs", got])).ok();
    assert_golden(&got, "outputs.npz");
}

#[test]
fn every_command_speaks_json() {
    let scratch = scratch();
    let (folder, got) = (scratch.path().join("out"), scratch.path().join("got.npz"));
    let made = end(&mut tpshard(words!["--json", model(), "--tp", "2", "-o", folder])).ok().json();
    assert_eq!(made["ranks"], 2);
    let ran = end(&mut tpshard(words!["run", folder, "--inputs", prompt(), "--outputs", got, "--json"]));
    let ran = ran.ok().json();
    assert_eq!(ran["outputs"][0]["name"], "logits");
    assert_eq!(ran["outputs"][0]["shape"], serde_json::json!([2, 7, 512]));
    let json = |line: &mut std::process::Command| -> Value { end(line.arg("--json")).ok().json() };
    assert_eq!(json(&mut tpshard(words!["check", folder]))["passed"], true);
    assert_eq!(json(&mut tpshard(words!["verify", folder, "--golden", golden()]))["passed"], true);
    assert_eq!(json(&mut tpshard(words!["plan", model(), "--ranks", "2"]))["plans"][0]["ranks"], 2);
    assert_eq!(
        json(&mut tpshard(words!["inspect", folder]))["format"],
        tpshard_codegen::folder::CONFIG_FORMAT
    );
    assert_eq!(json(&mut tpshard(words!["inspect", folder.join("rank1")]))["rank"], 1);
    assert!(json(&mut tpshard(words!["inspect", model()]))["onnx_nodes"].as_u64().unwrap() > 100);
    assert_eq!(
        json(&mut tpshard(words!["exec", folder, "--inputs", prompt()]))["outputs"][0]["name"],
        "logits"
    );
    assert_eq!(json(&mut tpshard(words!["compare", got, golden().join("outputs.npz")]))["passed"], true);
}

#[test]
fn a_folder_remembers_how_its_model_was_imported() {
    let scratch = scratch();
    let folder = scratch.path().join("out");
    shard(2, &folder, &["--role", "seq=seq", "--output", "logits[:, -1]=topk:3"]);
    let config = end(&mut tpshard(words!["inspect", folder, "--json"])).ok().json();
    assert_eq!(config["build"]["roles"], serde_json::json!(["seq=seq"]));
    end(&mut tpshard(words!["check", folder, "--model", model()])).ok();
    end(&mut tpshard(words!["verify", folder, "--model", model(), "--inputs", prompt()])).ok();
    let said = end(&mut tpshard(words!["inspect", folder])).ok().stdout;
    assert!(said.contains("input  input_ids: i64[batch, seq]"), "{said}");
    assert!(said.contains("output logits.values: f32[batch, 3]"), "{said}");
}

#[test]
fn a_rank_of_a_folder_can_be_looked_at() {
    let inspect = |more: &[&str]| end(tpshard(words!["inspect", sharded(2)]).args(more));
    assert_eq!(inspect(&["--rank", "1", "--json"]).ok().json()["rank"], 1);
    let (whole, part) = (inspect(&["--tir"]).ok().stdout, inspect(&["--tir", "--rank", "1"]).ok().stdout);
    assert!(whole.contains("equation ") && !part.contains("equation "), "{part}");
    inspect(&["--rank", "2"]).fails(2, &["--rank 2", "help: "]);
}

/// Files of ONNX test sets are matched with inputs by number, which is the model's order and not the plan's.
#[test]
fn inputs_are_in_the_order_of_the_model() {
    let folder = sharded(2);
    let config = end(&mut tpshard(words!["inspect", folder, "--json"])).ok().json();
    let ports = config["entries"][0]["inputs"].as_array().unwrap();
    let order: Vec<&str> = ports.iter().map(|port| port["name"].as_str().unwrap()).collect();
    assert_eq!(order[..3], ["input_ids", "attention_mask", "position_ids"]);
    let said = end(&mut tpshard(words!["inspect", folder.join("rank0")])).ok().stdout;
    assert!(said.contains(&format!("inputs  {}\n", order.join(", "))), "{said}");
}

#[test]
fn equal_builds_are_equal_byte_for_byte() {
    let scratch = scratch();
    let folder = scratch.path().join("again");
    shard(4, &folder, &[]);
    let first = sharded(4);
    assert_eq!(names(&folder), names(&first));
    for name in names(&folder) {
        assert!(fs::read(folder.join(&name)).unwrap() == fs::read(first.join(&name)).unwrap(), "{name}");
    }
}

#[test]
fn an_existing_folder_is_replaced_only_when_asked() {
    let scratch = scratch();
    let folder = scratch.path().join("out");
    shard(1, &folder, &[]);
    let before = fs::read(folder.join("config.json")).unwrap();
    let again = || tpshard(words![model(), "--tp", "2", "-o", folder]);
    end(&mut again()).fails(5, &["out", "--overwrite"]);
    assert_eq!(fs::read(folder.join("config.json")).unwrap(), before);
    end(again().arg("--overwrite")).ok();
    assert!(folder.join("rank1").exists());
    assert_eq!(names(scratch.path()), ["out"]);

    // A folder of somebody else's is not replaced even then.
    let foreign = scratch.path().join("foreign");
    fs::create_dir(&foreign).unwrap();
    fs::write(foreign.join("letters.txt"), "dear").unwrap();
    end(&mut tpshard(words![model(), "--tp", "2", "-o", foreign, "--overwrite"])).fails(5, &["foreign"]);
    assert_eq!(names(Path::new(&foreign)), ["letters.txt"]);
}

#[test]
fn the_launcher_starts_all_ranks_by_itself() {
    let scratch = scratch();
    let got = scratch.path().join("got.npz");
    let mut run = command(sharded(3).join("run"));
    end(run.arg("--inputs").arg(prompt()).arg("--outputs").arg(&got)).ok();
    assert_golden(&got, "outputs.npz");
}

#[test]
fn a_folder_works_where_it_was_moved() {
    let scratch = scratch();
    let (folder, got) = (copy_of_sharded(2, &scratch), scratch.path().join("got.npz"));
    let moved = scratch.path().join("else where");
    fs::rename(&folder, &moved).unwrap();
    let mut run = tpshard(words!["run", "else where", "--inputs", prompt(), "--outputs", "got.npz"]);
    end(run.current_dir(scratch.path())).ok();
    assert_golden(&got, "outputs.npz");
}
