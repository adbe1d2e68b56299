//! A wrong value is traced to the ONNX node that made it, and values inside the ranks can be looked at.

use crate::draft::Draft;
use crate::support::*;
use crate::words;
use tpshard_ir::{Node, Op, Scalar};

/// Changes one node in the program of rank 1 of 4 and expects to be led to it.
#[track_caller]
fn traced(wanted: impl Fn(&Node) -> bool, change: impl FnOnce(&mut Node)) {
    let scratch = scratch();
    let folder = copy_of_sharded(4, &scratch);
    let mut draft = Draft::open(&folder);
    let step = draft.step(|_, node| wanted(node));
    let origin = draft.graph(1).nodes()[step.index()].origin.to_string();
    assert!(!origin.is_empty());
    draft.edit(1, step, change);
    draft.save();

    end(&mut tpshard(words!["verify", folder, "--golden", golden()])).fails(4, &["out of tolerance"]);
    let bisect = || tpshard(words!["verify", folder, "--bisect", "--golden", golden()]);
    end(&mut bisect()).fails(4, &[&format!("node {origin}, {step} = ")]);
    let ended = end(bisect().arg("--json"));
    assert_eq!(ended.code, Some(4));
    assert_eq!(ended.json()["node"], origin.as_str());
    assert_eq!(ended.json()["step"], step.0);
}

#[test]
fn a_wrong_attention_scale_is_traced_to_its_node() {
    let wanted = |node: &Node| matches!(node.op, Op::Attention { .. }) && node.origin.contains("layers.2/");
    traced(wanted, |node| {
        let Op::Attention { scale, .. } = &mut node.op else { panic!("{}", node.op.name()) };
        scale.0 *= 2.0;
    });
}

#[test]
fn a_wrong_activation_is_traced_to_its_node() {
    let wanted =
        |node: &Node| matches!(node.op, Op::Map(Scalar::Sigmoid)) && node.origin.contains("layers.1/");
    traced(wanted, |node| node.op = Op::Map(Scalar::Tanh));
}

/// Addition before an all-reduce: the wrong rank holds only a part of the value.
#[test]
fn a_wrong_epsilon_on_one_rank_is_traced_to_its_node() {
    let wanted = |node: &Node| matches!(node.op, Op::Norm { .. }) && node.origin.contains("layers.3/");
    traced(wanted, |node| {
        let Op::Norm { epsilon, .. } = &mut node.op else { panic!("{}", node.op.name()) };
        epsilon.0 = 1.0;
    });
}

#[test]
fn tapped_values_are_those_of_one_rank() {
    let (scratch, draft) = (scratch(), Draft::open(&sharded(4)));
    let named = |wanted: &dyn Fn(&Node) -> bool| {
        let step = draft.step(|_, node| wanted(node));
        draft.graph(0).nodes()[step.index()].origin.to_string()
    };
    // Split over heads, a sum spread over the ranks, and a value that every rank holds.
    let nodes = [
        named(&|node| matches!(node.op, Op::Attention { .. })),
        named(&|node| node.origin.ends_with("layers.2/mlp/down_proj/MatMul") && !node.op.is_leaf()),
        named(&|node| matches!(node.op, Op::Norm { .. }) && node.origin.contains("layers.3/")),
    ];
    let tapped = |ranks: usize| {
        let path = scratch.path().join(format!("tapped{ranks}.npz"));
        let mut run = tpshard(words!["run", sharded(ranks), "--inputs", prompt(), "--outputs", path]);
        for node in &nodes {
            run.args(["--tap", node]);
        }
        end(&mut run).ok();
        read(&path)
    };
    let (alone, together) = (tapped(1), tapped(4));
    for node in &nodes {
        let name = format!("tap:{node}");
        assert!(distance(&alone[&name], &together[&name]) < 1e-4, "{name}");
        assert!(!alone[&name].is_empty(), "{name}");
    }
    assert_eq!(together.len(), alone.len());
    assert!(together.contains_key("logits"));

    // Without a file the names and shapes are said.
    let said = end(&mut tpshard(words!["run", sharded(4), "--inputs", prompt(), "--tap", nodes[0]])).ok();
    assert!(said.stdout.contains(&nodes[0]), "{said:?}");
    end(&mut tpshard(words!["run", sharded(4), "--inputs", prompt(), "--tap", "/no/such/node"]))
        .fails(2, &["/no/such/node", "help: "]);
}

#[test]
fn bisecting_needs_the_model() {
    let scratch = scratch();
    std::fs::copy(prompt(), scratch.path().join("inputs.npz")).unwrap();
    std::fs::copy(golden().join("outputs.npz"), scratch.path().join("outputs.npz")).unwrap();
    end(&mut tpshard(words!["verify", sharded(2), "--bisect", "--golden", scratch.path()]))
        .fails(2, &["--bisect", "help: "]);
}
