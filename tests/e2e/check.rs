//! `tpshard check` finds what is wrong with a folder even if every hash in it is right, and says where.

use crate::draft::{Draft, changed, communicates};
use crate::support::*;
use crate::words;
use std::fs;
use std::path::Path;
use tpshard_ir::layout::AxisLayout;
use tpshard_ir::weight::WeightExpr;
use tpshard_ir::{Conversion, Dim, Equation, Layout, Node, Op, Scalar, StepId, StepKind};

fn check(folder: &Path) -> Ended {
    end(&mut tpshard(words!["check", folder]))
}

fn check_with_model(folder: &Path) -> Ended {
    end(&mut tpshard(words!["check", folder, "--model", model()]))
}

/// Expects `check` to refuse the changed folder with these words.
#[track_caller]
fn refused(words: &[&str], change: impl FnOnce(&mut Draft)) {
    let (_scratch, folder) = changed(change);
    check(&folder).fails(4, words);
}

/// The step of layer 1 whose ONNX node ends like this.
fn at(node: &str) -> impl Fn(usize, &Node) -> bool {
    move |_, found| found.origin.ends_with(node) && found.origin.contains("layers.1/") && !found.op.is_leaf()
}

/// The first collective of this kind.
fn collective(draft: &Draft, kind: &str) -> StepId {
    let named = |node: &Node| matches!(&node.op, Op::Convert(c) if c.name() == kind);
    let found = draft.graph(0).nodes().iter().position(named).expect("the plan has no such collective");
    StepId(found as u32)
}

#[test]
fn a_fresh_folder_holds() {
    for ranks in [1, 3, 4] {
        check(&sharded(ranks)).ok();
        let said = check_with_model(&sharded(ranks)).ok();
        assert!(said.stdout.contains("everything holds"), "{said:?}");
    }
}

/// The other tests would pass if taking a folder apart and putting it together broke it.
#[test]
fn a_folder_put_together_again_holds() {
    let (_scratch, folder) = changed(Draft::follow_certificate);
    check_with_model(&folder).ok();
    end(&mut tpshard(words!["verify", folder, "--golden", golden()])).ok();
}

#[test]
fn a_wrong_layout_is_found_at_its_step() {
    let mut place = String::new();
    let (_scratch, folder) = changed(|draft| {
        let step = draft.step(at("mlp/act_fn/Sigmoid"));
        place = format!("{step} (sigmoid)");
        draft.certificate.steps[step.index()].layout = Layout(vec![AxisLayout::shard(1, 1usize)]);
        draft.follow_certificate();
    });
    check(&folder).fails(4, &[&place, "certificate"]);
}

#[test]
fn a_wrong_deal_is_found_at_its_step() {
    let mut place = String::new();
    let (_scratch, folder) = changed(|draft| {
        // 176 columns in units of 16 are dealt 3, 3, 3, 2; in units of 1 they are dealt 44 each.
        let step = draft.step(at("mlp/act_fn/Sigmoid"));
        place = format!("{step} (sigmoid)");
        draft.certificate.steps[step.index()].layout = Layout(vec![AxisLayout::shard(2, 16usize)]);
        draft.follow_certificate();
    });
    check(&folder).fails(4, &[&place, "certificate"]);

    let (_scratch, folder) = changed(|draft| {
        let step = collective(draft, "all_gather");
        place = format!("{step} ");
        let StepKind::Convert(Conversion::AllGather { unit, .. }) =
            &mut draft.certificate.steps[step.index()].kind
        else {
            panic!("{step} is no all-gather")
        };
        *unit = Dim::from(2usize);
        draft.follow_certificate();
    });
    check(&folder).fails(4, &[&place, "certificate"]);
}

#[test]
fn a_dropped_collective_is_found_at_its_user() {
    let mut place = String::new();
    let (_scratch, folder) = changed(|draft| {
        let reduced = collective(draft, "all_reduce");
        let partial = draft.certificate.steps[reduced.index()].args[0];
        let user = draft.certificate.steps.iter().position(|step| step.args.contains(&reduced)).unwrap();
        for step in &mut draft.certificate.steps {
            step.args.iter_mut().filter(|arg| **arg == reduced).for_each(|arg| *arg = partial);
        }
        place = format!("${user} (add)");
        draft.follow_certificate();
    });
    check(&folder).fails(4, &[&place, "an operand is partial"]);

    // On one rank only, behind the certificate's back.
    let (_scratch, folder) = changed(|draft| {
        let reduced = collective(draft, "all_reduce");
        let partial = draft.graph(1).nodes()[reduced.index()].args[0];
        let uses = |node: &Node| node.args.iter().any(|arg| arg.0 == reduced.0);
        let user = StepId(draft.graph(1).nodes().iter().position(uses).unwrap() as u32);
        place = format!("rank 1, {user} (add)");
        draft.edit(1, user, |node| {
            node.args.iter_mut().filter(|arg| arg.0 == reduced.0).for_each(|arg| *arg = partial);
        });
    });
    check(&folder).fails(4, &[&place]);
}

#[test]
fn swapped_collectives_on_one_rank_are_found() {
    let mut place = String::new();
    let (_scratch, folder) = changed(|draft| {
        let (gather, reduce) = (collective(draft, "all_gather"), collective(draft, "all_reduce"));
        let op = |step: StepId| draft.graph(2).nodes()[step.index()].op.clone();
        let (first, second) = (op(gather), op(reduce));
        draft.edit(2, gather, |node| node.op = second);
        draft.edit(2, reduce, |node| node.op = first);
        place = format!("rank 2, {gather} (all_reduce)");
    });
    check(&folder).fails(4, &[&place, "issues all_reduce", "rank 0 issues all_gather"]);
}

/// The slice of a weight in the program of rank 1 begins one column late.
#[test]
fn a_wrong_slice_on_one_rank_is_found() {
    let mut place = String::new();
    let (_scratch, folder) = changed(|draft| {
        let weight = |_: usize, node: &Node| matches!(&node.op, Op::Weight(w) if w.shape() == [64, 176]);
        let step = draft.step(weight);
        let value = draft.certificate.steps[step.index()].value;
        let Op::Weight(whole) = draft.certificate.logical.node(value).op.clone() else { panic!("{value}") };
        let moved: WeightExpr = whole.slice(1, 45, 44).unwrap();
        let Op::Weight(old) = draft.graph(1).nodes()[step.index()].op.clone() else { panic!("{step}") };
        draft.programs[1].weights.iter_mut().filter(|w| w.expr == old).for_each(|w| w.expr = moved.clone());
        draft.edit(1, step, |node| node.op = Op::Weight(moved));
        place = format!("rank 1, {step} (weight)");
    });
    check(&folder).fails(4, &[&place, "slice"]);
}

#[test]
fn an_operation_changed_on_one_rank_is_found() {
    let mut place = String::new();
    let (_scratch, folder) = changed(|draft| {
        let step = draft.step(at("mlp/act_fn/Sigmoid"));
        draft.edit(3, step, |node| node.op = Op::Map(Scalar::Tanh));
        place = format!("rank 3, {step} (tanh)");
    });
    check(&folder).fails(4, &[&place, "sigmoid"]);
    let report = end(&mut tpshard(words!["check", folder, "--json"])).fails(4, &[&place]).json();
    assert_eq!(report["passed"], false);
    assert!(report["findings"][0].as_str().unwrap().contains(&place), "{report}");
}

/// Two equal-shaped weights trade places in the table by which a rank's program finds them in its file.
#[test]
fn a_weight_under_another_name_is_found() {
    let mut names = Vec::new();
    let (_scratch, folder) = changed(|draft| {
        let program = &mut draft.programs[2];
        let same: Vec<usize> =
            (0..program.weights.len()).filter(|&i| program.weights[i].shape == [64, 44]).collect();
        let (a, b) = (same[0], same[1]);
        names = vec![program.weights[a].name.clone(), program.weights[b].name.clone()];
        program.weights[a].name = names[1].clone();
        program.weights[b].name = names[0].clone();
    });
    check(&folder).fails(4, &["rank 2", &names[0], &names[1]]);
}

/// What is gathered for an output is said in the program's tables, not in its graph.
#[test]
fn a_table_that_contradicts_the_certificate_is_found() {
    refused(&["rank 1", "outputs"], |draft| {
        draft.programs[1].entries[0].outputs[0].layout = Layout(vec![AxisLayout::Replicated]);
    });
    refused(&["rank 0", "inputs"], |draft| {
        draft.programs[0].entries[0].inputs.swap(0, 2);
    });
    refused(&["rank 3", "states"], |draft| {
        draft.programs[3].states[0].axis = 1;
    });
}

#[test]
fn an_illegal_equation_is_found_by_number() {
    // All ranks agree on the wrong scale, and only the equation to the imported graph stands against it.
    let mut place = String::new();
    let (_scratch, folder) = changed(|draft| {
        let step = draft.step(at("self_attn/Transpose_4"));
        let value = draft.certificate.steps[step.index()].value;
        let index = draft.certificate.equations.iter().position(|e| e.right == value).unwrap();
        place = format!("equation {index} ({})", draft.certificate.equations[index].rule);
        draft.edit_logical(value, |node| {
            let Op::Attention { scale, .. } = &mut node.op else { panic!("{}", node.op.name()) };
            scale.0 *= 2.0;
        });
        draft.follow_certificate();
    });
    check(&folder).fails(4, &[&place]);

    // Two values of one type that are not equal, by a rule that exists and by one that does not.
    for rule in ["transpose-einsum", "because"] {
        let (_scratch, folder) = changed(|draft| {
            let value = |name| draft.certificate.steps[draft.step(at(name)).index()].value;
            let (left, right) = (value("mlp/gate_proj/MatMul"), value("mlp/up_proj/MatMul"));
            place = format!("equation {} ({rule}), {left} = {right}", draft.certificate.equations.len());
            draft.certificate.equations.push(Equation { rule: rule.into(), left, right });
        });
        check(&folder).fails(4, &[&place]);
    }
}

#[test]
fn a_changed_weight_is_found_by_hash_or_by_the_model() {
    let scratch = scratch();
    let folder = copy_of_sharded(4, &scratch);
    let name = Draft::open(&folder).flip_weight_bit(1, 5);
    check(&folder).fails(4, &[&format!("rank1.safetensors, weight `{name}`"), "hash"]);
    // With the hash refreshed everything agrees, except with the model.
    Draft::open(&folder).save();
    check(&folder).ok();
    check_with_model(&folder).fails(4, &[&format!("rank1.safetensors, weight `{name}`"), "not the model's"]);
}

#[test]
fn a_weight_file_of_another_build_is_found() {
    let scratch = scratch();
    let folder = copy_of_sharded(4, &scratch);
    let place = "rank1.safetensors";
    fs::copy(sharded(2).join(place), folder.join(place)).unwrap();
    check(&folder).fails(4, &[place]);
    end(&mut tpshard(words!["run", folder, "--inputs", prompt()])).fails(4, &["rank 1", "help: "]);

    // Of a build that differs in another rank's weights only: every byte of this file is right, and yet the ranks
    // would refuse to run together.
    let (_other, changed) = changed(|draft| drop(draft.flip_weight_bit(2, 5)));
    fs::copy(changed.join(place), folder.join(place)).unwrap();
    check(&folder).fails(4, &[place, "another build"]);
    end(&mut tpshard(words!["run", folder, "--inputs", prompt()])).fails(4, &["rank 1", "help: "]);
}

#[test]
fn executables_that_changed_places_are_found() {
    let scratch = scratch();
    let folder = copy_of_sharded(4, &scratch);
    fs::rename(folder.join("rank1"), folder.join("x")).unwrap();
    fs::rename(folder.join("rank2"), folder.join("rank1")).unwrap();
    fs::rename(folder.join("x"), folder.join("rank2")).unwrap();
    check(&folder).fails(4, &["rank1: ", "rank2: ", "config.json"]);
    end(&mut tpshard(words!["run", folder, "--inputs", prompt()])).fails(2, &["rank 2", "rank 1"]);
}

#[test]
fn a_file_that_was_cut_off_is_found() {
    for name in ["rank1", "rank1.safetensors", "model.tir", "config.json"] {
        for (numerator, denominator) in [(0, 1), (1, 2), (99, 100)] {
            let scratch = scratch();
            let folder = copy_of_sharded(2, &scratch);
            let bytes = fs::read(folder.join(name)).unwrap();
            fs::write(folder.join(name), &bytes[..bytes.len() * numerator / denominator]).unwrap();
            check(&folder).fails(4, &[name]);
        }
    }
}

#[test]
fn a_missing_file_is_named() {
    for name in ["rank1", "rank1.safetensors", "model.tir", "config.json"] {
        let scratch = scratch();
        let folder = copy_of_sharded(2, &scratch);
        fs::remove_file(folder.join(name)).unwrap();
        let ended = check(&folder);
        assert!(matches!(ended.code, Some(4 | 5)), "{ended:?}");
        assert!(ended.stderr.contains(name), "{ended:?}");
    }
}

/// The certificate is checked by the step with which communication begins; a check that looked at nothing would say 0.
#[test]
fn the_report_says_what_was_checked() {
    let report = end(&mut tpshard(words!["check", sharded(4), "--model", model(), "--json"])).ok().json();
    let lines: Vec<&str> = report["checked"].as_array().unwrap().iter().filter_map(|l| l.as_str()).collect();
    let collectives = Draft::open(&sharded(4)).graph(0).nodes().iter().filter(|n| communicates(n)).count();
    assert!(lines.iter().any(|l| l.contains(&format!("4 ranks, {collectives} collectives"))), "{lines:?}");
    assert!(lines.iter().any(|l| l.starts_with("model: 128 shards")), "{lines:?}");
}
