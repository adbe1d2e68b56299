//! `tpshard verify` compares all that is there to compare, says what it could not, and believes no rewrite.

use crate::draft::changed;
use crate::support::*;
use crate::words;
use prost::Message;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};
use tpshard_frontend::proto::TensorProto;
use tpshard_ir::{Data, Node, Op, Tensor, ValueId};

fn verify(folder: &Path, golden: &Path) -> Ended {
    end(&mut tpshard(words!["verify", folder, "--golden", golden]))
}

fn bisect(folder: &Path) -> Ended {
    end(&mut tpshard(words!["verify", folder, "--bisect", "--golden", golden()]))
}

/// Golden files of one pair, in a folder of their own.
fn golden_of(scratch: &Path, name: &str, change: impl FnOnce(&mut Tensor)) -> std::path::PathBuf {
    let folder = scratch.join(name);
    fs::create_dir(&folder).unwrap();
    fs::copy(prompt(), folder.join("inputs.npz")).unwrap();
    let mut outputs = read(&golden().join("outputs.npz"));
    change(outputs.get_mut("logits").unwrap());
    write(&folder.join("outputs.npz"), &outputs);
    folder
}

/// All ranks do what the certificate says, and the certificate says that attention with another scale is the model's.
#[test]
fn a_wrong_rewrite_is_traced_to_its_node() {
    let mut origin = String::new();
    let (_scratch, folder) = changed(|draft| {
        let wanted = |_: usize, node: &Node| {
            matches!(node.op, Op::Attention { .. }) && node.origin.contains("layers.1/")
        };
        let step = draft.step(wanted);
        let value = draft.certificate.steps[step.index()].value;
        origin = draft.certificate.logical.node(value).origin.to_string();
        draft.edit_logical(value, |node| {
            let Op::Attention { scale, .. } = &mut node.op else { panic!("{}", node.op.name()) };
            scale.0 *= 2.0;
        });
        draft.follow_certificate();
    });
    assert!(!origin.is_empty());
    verify(&folder, &golden()).fails(4, &["out of tolerance"]);
    bisect(&folder).fails(4, &["inputs.npz: the first value that differs", &format!("node {origin}, $")]);
}

/// The imported part of the certificate is not the model: it would agree with itself.
#[test]
fn a_certificate_of_another_model_is_not_bisected() {
    let mut value = ValueId(0);
    let (_scratch, folder) = changed(|draft| {
        let found =
            draft.certificate.logical.values().find(|(_, node)| node.origin.ends_with("act_fn/Sigmoid"));
        value = found.unwrap().0;
        draft.edit_logical(value, |node| node.op = Op::Map(tpshard_ir::Scalar::Tanh));
        draft.follow_certificate();
    });
    bisect(&folder)
        .fails(4, &["does not start from the model", &format!("{value} (tanh)"), "act_fn/Sigmoid"]);

    let scratch = scratch();
    let folder = copy_of_sharded(4, &scratch);
    let text = fs::read_to_string(folder.join("model.tir")).unwrap();
    let line = 1 + text.lines().position(|line| line.contains("sigmoid")).unwrap();
    fs::write(folder.join("model.tir"), text.replacen("sigmoid", "tanh", 1)).unwrap();
    bisect(&folder).fails(4, &[&format!("line {line} is the first"), "tanh", "sigmoid", "help: "]);
}

/// Inside, everything is right; two outputs of one type leave under each other's names.
#[test]
fn a_value_lost_on_its_way_out_is_found() {
    let (_scratch, folder) = changed(|draft| {
        for program in &mut draft.programs {
            let entry = &mut program.entries[0];
            let at = |name: &str| entry.graph.outputs.iter().position(|o| o.name.as_ref() == name).unwrap();
            let (a, b) = (at("present.1.key"), at("present.1.value"));
            let (x, y) = (entry.graph.outputs[a].value, entry.graph.outputs[b].value);
            (entry.graph.outputs[a].value, entry.graph.outputs[b].value) = (y, x);
            entry.lowering = tpshard_ir::program::lower(&entry.graph);
        }
    });
    bisect(&folder).fails(4, &["output `present.1.key`", "on its way out"]);
}

/// With an empty cache it makes no difference which cache is appended to; the second golden pair has a full one.
#[test]
fn every_pair_is_compared() {
    let (_scratch, folder) = changed(|draft| {
        let grows = |node: &Node| matches!(node.op, Op::Append { .. });
        let appends: Vec<usize> =
            (0..draft.graph(1).len()).filter(|&i| grows(&draft.graph(1).nodes()[i])).collect();
        let first = draft.graph(1).nodes()[appends[0]].args[0];
        let step = tpshard_ir::StepId(appends[2] as u32);
        draft.edit(1, step, |node| node.args[0] = first);
    });
    end(&mut tpshard(words!["verify", folder, "--bisect", "--model", model(), "--inputs", prompt()])).ok();
    bisect(&folder).fails(4, &["inputs_decode.npz: the first value that differs", "(append)"]);
    let ended =
        end(&mut tpshard(words!["verify", folder, "--model", model(), "--golden", golden(), "--json"]));
    assert_eq!(ended.code, Some(4), "{ended:?}");
    let passed: Vec<bool> =
        ended.json()["results"].as_array().unwrap().iter().map(|r| r["passed"] == true).collect();
    assert_eq!(passed, [true, false]);
}

#[test]
fn what_was_compared_is_counted() {
    let report = end(&mut tpshard(words!["verify", sharded(3), "--bisect", "--golden", golden(), "--json"]))
        .ok()
        .json();
    let number = |key: &str| report[key].as_u64().unwrap();
    assert_eq!((number("pairs"), number("outputs")), (2, 2 * 9));
    assert!(number("compared") > 2 * 50, "{report}");
    // Some values exist in the program only, but not many.
    assert!(number("by_certificate") < number("compared") / 2, "{report}");
    assert_eq!(number("not_compared"), 0);
}

/// A golden of the model serves folders built for a part of it.
#[test]
fn selections_are_made_of_the_golden_too() {
    let scratch = scratch();
    let flip = |tensor: &mut Tensor| {
        let Data::F32(values) = tensor.data().clone() else { panic!("{}", tensor.dtype()) };
        let flipped = values.into_iter().map(|v| -v).collect();
        *tensor = Tensor::new(tensor.shape().to_vec(), Data::F32(flipped)).unwrap();
    };
    let wrong = golden_of(scratch.path(), "wrong", flip);
    let selections = [
        ("logits[:, -1]", "logits"),
        ("logits[0, 1:]", "logits"),
        ("logits=argmax", "logits"),
        ("logits[:, -1]=argmax", "logits"),
        ("logits[:, -1]=topk:5", "logits.indices"),
    ];
    // The position must exist in both golden pairs, and only the prompt has more than one.
    let right = golden_of(scratch.path(), "right", |_| ());
    for (number, (selection, name)) in selections.into_iter().enumerate() {
        let folder = scratch.path().join(format!("out{number}"));
        shard(2, &folder, &["--output", selection]);
        let said = verify(&folder, &right).ok();
        if selection.contains('=') {
            assert!(said.stdout.contains("note: logits") && said.stdout.contains("ties"), "{said:?}");
        }
        let ended = verify(&folder, &wrong).fails(4, &["out of tolerance"]);
        assert!(ended.stdout.contains(name), "{ended:?}");
        end(&mut tpshard(words!["verify", folder, "--model", model(), "--golden", right])).ok();
        end(&mut tpshard(words!["verify", folder, "--bisect", "--model", model(), "--inputs", prompt()]))
            .ok();
    }
}

#[test]
fn inputs_without_outputs_are_reported() {
    let scratch = scratch();
    let golden = golden_of(scratch.path(), "golden", |_| ());
    fs::copy(prompt(), golden.join("inputs_more.npz")).unwrap();
    let said = verify(&sharded(2), &golden).ok();
    assert!(said.stderr.contains("inputs_more.npz: there are no outputs"), "{said:?}");
    let ended = end(&mut tpshard(words!["verify", sharded(2), "--golden", golden, "--json"])).ok();
    assert_eq!(ended.json()["not_compared"], serde_json::json!(["inputs_more.npz"]));
    fs::remove_file(golden.join("outputs.npz")).unwrap();
    verify(&sharded(2), &golden).fails(2, &["no pair was compared", "help: "]);
}

#[test]
fn inputs_that_do_not_fit_are_a_matter_of_usage() {
    let scratch = scratch();
    let mut inputs = read(&prompt());
    inputs.shift_remove("attention_mask").unwrap();
    let path = scratch.path().join("inputs.npz");
    write(&path, &inputs);
    for more in [&[][..], &["--bisect"]] {
        end(tpshard(words!["verify", sharded(2), "--model", model(), "--inputs", path]).args(more))
            .fails(2, &["attention_mask"]);
    }
}

/// Files `PREFIX_0.pb` … of tensors without names, in this order.
fn numbered(folder: &Path, prefix: &str, tensors: impl Iterator<Item = Tensor>) {
    for (index, tensor) in tensors.enumerate() {
        let data_type = match tensor.data() {
            Data::F32(_) => 1,
            Data::I64(_) => 7,
            other => panic!("{}", other.dtype()),
        };
        let proto = TensorProto {
            dims: tensor.shape().iter().map(|&extent| extent as i64).collect(),
            data_type,
            raw_data: Some(tensor.data().to_le_bytes().into()),
            ..TensorProto::default()
        };
        fs::write(folder.join(format!("{prefix}_{index}.pb")), proto.encode_to_vec()).unwrap();
    }
}

/// The numbers count the model's outputs, also where a folder makes some of them, and others first.
#[test]
fn numbered_outputs_are_those_of_the_model() {
    let scratch = scratch();
    let set = scratch.path().join("golden/test_data_set_0");
    fs::create_dir_all(&set).unwrap();
    let folder = scratch.path().join("out");
    shard(2, &folder, &["--output", "present.1.value"]);
    let port = |kind: &str, name: &str| -> Vec<String> {
        let config = end(&mut tpshard(words!["inspect", folder, "--json"])).ok().json();
        let list = config.pointer(&format!("{kind}/{name}")).unwrap().as_array().unwrap().clone();
        list.iter().map(|p| p.as_str().or(p["name"].as_str()).unwrap().to_owned()).collect()
    };
    let (given, made) = (read(&prompt()), read(&golden().join("outputs.npz")));
    numbered(&set, "input", port("/entries/0", "inputs").iter().map(|name| given[name].clone()));
    verify(&folder, &scratch.path().join("golden")).fails(2, &["no pair was compared"]);
    let outputs = port("/build/model", "outputs");
    assert_ne!(outputs[0], port("/entries/0", "outputs")[0]);
    numbered(&set, "output", outputs.iter().map(|name| made[name].clone()));
    verify(&folder, &scratch.path().join("golden")).ok();
}

/// What a model is given and makes is nobody else's business.
#[test]
fn the_files_between_the_processes_are_private() {
    let scratch = scratch();
    let mut command = tpshard(words!["verify", sharded(2), "--golden", golden()]);
    let child = start(command.env("TMPDIR", scratch.path()));
    let deadline = Instant::now() + Duration::from_secs(60);
    let mode = loop {
        let found = fs::read_dir(scratch.path()).unwrap().flatten().next();
        if let Some(mode) = found.and_then(|entry| entry.metadata().ok()).map(|m| m.permissions().mode()) {
            break mode;
        }
        assert!(Instant::now() < deadline, "nothing was written");
        std::thread::sleep(Duration::from_millis(1));
    };
    assert_eq!(mode & 0o777, 0o700);
    wait(child).ok();
    assert!(names(scratch.path()).is_empty());
}
