//! `tpshard check` looks at every file of a folder, and `config.json` says what went into the build.

use crate::draft::Draft;
use crate::support::*;
use crate::words;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use tpshard_codegen::elf;
use tpshard_ir::container;

fn check(folder: &Path) -> Ended {
    end(&mut tpshard(words!["check", folder]))
}

/// The lines that say what was checked, and what was found.
fn report(folder: &Path, more: &[&Path]) -> (Vec<String>, Vec<String>) {
    let mut command = tpshard(words!["check", folder, "--json"]);
    if let [model] = more {
        command.arg("--model").arg(model);
    }
    let report = end(&mut command).json();
    let list = |key: &str| -> Vec<String> {
        report[key].as_array().unwrap().iter().map(|l| l.as_str().unwrap().to_owned()).collect()
    };
    (list("checked"), list("findings"))
}

fn config_of(folder: &Path) -> Value {
    serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap()
}

#[test]
fn a_launcher_of_another_build_is_found() {
    let scratch = scratch();
    let folder = copy_of_sharded(2, &scratch);
    let run = fs::read(folder.join("run")).unwrap();
    let payload = container::encode(&[("launcher", b"3")]).unwrap();
    fs::write(folder.join("run"), elf::with_program(&run, &payload).unwrap()).unwrap();
    check(&folder).fails(4, &["run: starts \"3\" ranks, the folder has 2"]);
    // A rank's executable, no executable at all, and nothing.
    fs::copy(folder.join("rank1"), folder.join("run")).unwrap();
    check(&folder).fails(4, &["run: is not the launcher"]);
    fs::write(folder.join("run"), "#!/bin/sh\n").unwrap();
    check(&folder).fails(4, &["run: "]);
    fs::remove_file(folder.join("run")).unwrap();
    check(&folder).fails(4, &["run: "]);
}

#[test]
fn a_plan_text_that_was_changed_is_found() {
    let scratch = scratch();
    let folder = copy_of_sharded(2, &scratch);
    let plan = folder.join("plan.txt");
    let text = fs::read_to_string(&plan).unwrap();
    fs::write(&plan, text.replacen("plan for 2 ranks", "plan for 4 ranks", 1)).unwrap();
    check(&folder).fails(4, &["plan.txt: is not the text"]);
    fs::write(&plan, "").unwrap();
    check(&folder).fails(4, &["plan.txt: is empty"]);
    fs::write(&plan, [0xff, 0xfe]).unwrap();
    check(&folder).fails(4, &["plan.txt"]);
    fs::remove_file(&plan).unwrap();
    check(&folder).fails(4, &["plan.txt"]);
}

/// Everything in `config.json` that follows from the certificate is derived from it again.
#[test]
fn a_config_that_contradicts_the_certificate_is_found_by_pointer() {
    let changes = [
        ("/entries/0/name", json!("other")),
        ("/entries/0/inputs/0/name", json!("tokens")),
        ("/entries/0/inputs/0/type", json!("f32[1]")),
        ("/entries/0/inputs/3/layout", json!("R")),
        ("/entries/0/outputs/0/type", json!("f32[batch, seq, 511]")),
        ("/entries/0/outputs/0/layout", json!("S(0)")),
        ("/entries/0/states/1/axis", json!(1)),
        ("/entries/0/ranges/batch/1", json!(7)),
        ("/mesh/0", json!(4)),
        ("/ranks/1/weights", json!("rank0.safetensors")),
        ("/ranks/1/executable", json!("rank0")),
        ("/ranks/0/tensors/3/dtype", json!("f16")),
        ("/ranks/0/tensors/3/global_shape/0", json!(1)),
        ("/ranks/0/tensors/3/region/0/0", json!(1)),
        ("/ranks/0/tensors/3/offset", json!(0)),
    ];
    let scratch = scratch();
    let folder = copy_of_sharded(2, &scratch);
    let config = config_of(&folder);
    for (pointer, value) in changes {
        let mut changed = config.clone();
        let place =
            changed.pointer_mut(pointer).unwrap_or_else(|| panic!("{pointer} in {}", config["entries"]));
        assert_ne!(*place, value, "{pointer}");
        *place = value;
        fs::write(folder.join("config.json"), changed.to_string()).unwrap();
        check(&folder).fails(4, &["config.json", pointer]);
    }
    // Values that are missing, and values that nobody reads.
    let mut changed = config.clone();
    changed["entries"][0].as_object_mut().unwrap().remove("ranges");
    changed["entries"][0]["note"] = json!(1);
    changed["entries"].as_array_mut().unwrap()[0]["inputs"].as_array_mut().unwrap().pop();
    fs::write(folder.join("config.json"), changed.to_string()).unwrap();
    check(&folder).fails(
        4,
        &["/entries/0/ranges is missing", "/entries/0/note should not be there", "/entries/0/inputs has"],
    );
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    check(&folder).ok();
}

#[test]
fn a_folder_of_another_version_is_refused_with_what_to_do() {
    let scratch = scratch();
    let folder = copy_of_sharded(2, &scratch);
    let mut config = config_of(&folder);
    for version in [json!(99), json!(0), json!("1"), Value::Null] {
        config["version"] = version;
        fs::write(folder.join("config.json"), config.to_string()).unwrap();
        for command in ["check", "inspect", "run", "verify"] {
            end(&mut tpshard(words![command, folder])).fails(
                4,
                &["config.json", "version", "this tpshard reads 1 to 1", "help: build the folder again"],
            );
        }
    }
    config.as_object_mut().unwrap().remove("version");
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    check(&folder).fails(4, &["no version"]);
}

#[test]
fn files_that_do_not_belong_are_found_or_named() {
    let scratch = scratch();
    let folder = copy_of_sharded(2, &scratch);
    fs::write(folder.join("notes.md"), "mine").unwrap();
    let said = check(&folder).ok();
    assert!(said.stdout.contains("notes.md"), "{said:?}");
    fs::copy(folder.join("rank1"), folder.join("rank2")).unwrap();
    check(&folder).fails(4, &["rank2: does not belong to a folder of 2 ranks"]);
    fs::rename(folder.join("rank2"), folder.join("rank17.safetensors")).unwrap();
    check(&folder).fails(4, &["rank17.safetensors: does not belong"]);
}

/// The header of a weight file with one more tensor, of no bytes, under `name`.
fn add_tensor(path: &Path, name: &str) {
    let bytes = fs::read(path).unwrap();
    let end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..end]).unwrap();
    let data = bytes.len() - end;
    header[name] = json!({ "dtype": "F32", "shape": [0], "data_offsets": [data, data] });
    let mut text = header.to_string();
    text.extend(std::iter::repeat_n(' ', (8 + text.len()).next_multiple_of(64) - 8 - text.len()));
    let mut changed = (text.len() as u64).to_le_bytes().to_vec();
    changed.extend(text.as_bytes());
    changed.extend(&bytes[end..]);
    fs::write(path, changed).unwrap();
}

/// An extra weight is found by its name, also where another finding happens to contain it.
#[test]
fn a_weight_that_belongs_to_no_step_is_found() {
    let scratch = scratch();
    let folder = copy_of_sharded(2, &scratch);
    add_tensor(&folder.join("rank1.safetensors"), "bytes");
    check(&folder).fails(4, &["rank1.safetensors, weight `bytes`: belongs to no step"]);
    let name = Draft::open(&folder).flip_weight_bit(0, 1);
    check(&folder).fails(
        4,
        &[
            "rank1.safetensors, weight `bytes`: belongs to no step",
            &format!("rank0.safetensors, weight `{name}`: its bytes"),
        ],
    );
}

/// A line about a subject in which something was found would contradict the finding.
#[test]
fn nothing_is_claimed_of_what_does_not_hold() {
    let scratch = scratch();
    let folder = copy_of_sharded(2, &scratch);
    let model = model();
    let claims = |checked: &[String], start: &str| checked.iter().any(|line| line.starts_with(start));
    let (checked, findings) = report(&folder, &[&model]);
    assert!(findings.is_empty(), "{findings:?}");
    for subject in ["launcher:", "certificate:", "programs:", "weights:", "config.json:", "model:"] {
        assert!(claims(&checked, subject), "{subject} {checked:?}");
    }
    let _ = Draft::open(&folder).flip_weight_bit(1, 5);
    Draft::open(&folder).save();
    let (checked, findings) = report(&folder, &[&model]);
    assert_eq!(findings.len(), 1, "{findings:?}");
    assert!(!checked.iter().any(|line| line.contains("shards are its own bytes")), "{checked:?}");
    assert!(claims(&checked, "weights:"));
    let _ = Draft::open(&folder).flip_weight_bit(1, 5);
    let (checked, _) = report(&folder, &[&model]);
    assert!(!claims(&checked, "weights:"), "{checked:?}");
}

/// `config.json` holds every resolved input of the build and nothing of where it was made.
#[test]
fn the_inputs_of_the_build_are_recorded() {
    let scratch = scratch();
    let profile = scratch.path().join("mine.txt");
    let text = include_str!("../../passes/profiles/l4.txt").replace("name = l4", "name = mine");
    fs::write(&profile, &text).unwrap();
    let build = |name: &str, more: &[&str]| {
        let place = scratch.path().join(name);
        fs::create_dir(&place).unwrap();
        fs::copy(model(), place.join("model.onnx")).unwrap();
        let folder = place.join("out");
        let mut command = tpshard(words![place.join("model.onnx"), "--tp", "2", "-o", folder]);
        end(command.args(more)).ok();
        folder
    };
    let runner = env!("CARGO_BIN_EXE_tpshard");
    let flags =
        ["--memory", "1GiB", "--profile", profile.to_str().unwrap(), "--runner", runner, "--dim", "batch=2"];
    let (here, there) = (build("here", &flags), build("there", &flags));
    let bytes = fs::read(here.join("config.json")).unwrap();
    assert_eq!(bytes, fs::read(there.join("config.json")).unwrap());
    let said = String::from_utf8(bytes).unwrap();
    assert!(!said.contains(scratch.path().to_str().unwrap()), "{said}");

    let inputs = config_of(&here)["build"].clone();
    let sha256 = |path: &Path| {
        use sha2::{Digest, Sha256};
        let hash = Sha256::digest(fs::read(path).unwrap());
        hash.iter().map(|byte| format!("{byte:02x}")).collect::<String>()
    };
    assert_eq!(inputs["memory"]["given"], "1GiB");
    assert_eq!(inputs["memory"]["budget_bytes"], 1u64 << 30);
    assert_eq!(inputs["profile_text"], text.as_str());
    assert_eq!(inputs["dim"], json!(["batch=2"]));
    assert_eq!(inputs["model"]["sha256"], sha256(&model()).as_str());
    assert_eq!(inputs["runner_sha256"], sha256(Path::new(runner)).as_str());

    // Without flags, what was resolved is there all the same.
    let inputs = config_of(&sharded(2))["build"].clone();
    assert_eq!(inputs["memory"]["given"], Value::Null);
    assert!(inputs["memory"]["budget_bytes"].as_u64().is_some());
    assert_eq!(inputs["runner_sha256"], Value::Null);
    assert_eq!(inputs["profile"], "h100-sxm");
    assert_eq!(inputs["profile_text"], include_str!("../../passes/profiles/h100-sxm.txt"));
}
