//! The plan of a known model is the one people write by hand, and stays it.

use crate::support::*;
use crate::words;
use serde_json::Value;
use std::path::Path;

const FLAGS: [&str; 4] = ["--memory", "min", "--dim", "batch=1,seq=1,past=128"];
const LAYERS: usize = 4;

/// The plan without how far the search got in proving that there is no better one, which the plan does not depend on.
fn without_gap(text: &str) -> String {
    let mask = |line: &str| match line.trim_start().strip_prefix("gap ").and_then(|l| l.split_once(" %")) {
        Some((_, rest)) => format!("  gap * %{rest}\n"),
        None => format!("{line}\n"),
    };
    text.lines().map(mask).collect()
}

#[test]
fn the_search_proves_the_plan_nearly_the_best() {
    for ranks in [2, 4] {
        let gap = plan(ranks)["gap"].as_f64().unwrap();
        assert!(gap <= 0.05, "{ranks} ranks: a plan up to {:.0} % faster is not ruled out", gap * 100.0);
    }
}

/// `TPSHARD_BLESS=1` writes the text instead of comparing with it.
#[test]
fn the_plan_is_the_committed_one() {
    for ranks in [2, 4] {
        let scratch = scratch();
        let folder = scratch.path().join("out");
        shard(ranks, &folder, &FLAGS);
        let found = without_gap(&std::fs::read_to_string(folder.join("plan.txt")).unwrap());
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join(format!("../tests/e2e/golden/tiny-llama-tp{ranks}.txt"));
        if std::env::var_os("TPSHARD_BLESS").is_some() {
            std::fs::write(&path, &found).unwrap();
        }
        let expected = std::fs::read_to_string(&path).unwrap();
        assert!(found == expected, "{ranks} ranks: TPSHARD_BLESS=1 accepts this plan:\n{found}");
    }
}

/// The plan for `--memory min`.
fn plan(ranks: usize) -> Value {
    let mut plan = tpshard(words!["plan", model(), "--json", "--ranks", ranks.to_string()]);
    end(plan.args(FLAGS)).ok().json()["plans"][0]["plan"].take()
}

/// Column then row, per attention and per MLP: what Megatron-LM does by hand.
#[test]
fn every_layer_has_two_all_reduces_and_nothing_else() {
    for ranks in [2, 4] {
        let plan = plan(ranks);
        let collectives: Vec<(&str, &str)> = plan["entries"][0]["collectives"]
            .as_array()
            .unwrap()
            .iter()
            .map(|c| (c["kind"].as_str().unwrap(), c["node"].as_str().unwrap()))
            .collect();
        for layer in 0..LAYERS {
            let place = format!("/layers.{layer}/");
            let of_layer: Vec<_> = collectives.iter().filter(|(_, node)| node.contains(&place)).collect();
            let prefix = format!("/model/model/layers.{layer}");
            let expected = [
                ("all_reduce", format!("{prefix}/self_attn/o_proj/MatMul")),
                ("all_reduce", format!("{prefix}/mlp/down_proj/MatMul")),
            ];
            let found: Vec<_> = of_layer.iter().map(|(kind, node)| (*kind, (*node).to_owned())).collect();
            assert_eq!(found, expected, "{ranks} ranks");
        }
        // Apart from the layers: at most the embedding before them and the logits after them.
        assert!(collectives.len() <= 2 * LAYERS + 2, "{ranks} ranks: {collectives:?}");
    }
}

#[test]
fn every_matrix_is_split_over_all_ranks() {
    for ranks in [2usize, 4] {
        let plan = plan(ranks);
        let (mut all, mut vectors) = (0.0, 0.0);
        for stored in plan["stored"].as_array().unwrap().iter().filter(|s| s["state"] == false) {
            let shape = stored["shape"].as_str().unwrap();
            let dims: Vec<f64> = shape
                .trim_start_matches("f32[")
                .trim_end_matches(']')
                .split(',')
                .map(|dim| dim.trim().parse().unwrap())
                .collect();
            let bytes = stored["bytes"].as_f64().unwrap();
            let whole = dims.iter().product::<f64>() * 4.0 * stored["count"].as_f64().unwrap();
            if dims.len() < 2 {
                vectors += bytes;
                continue;
            }
            all += whole;
            assert!(bytes <= 1.02 * whole / ranks as f64, "{ranks} ranks: {stored}");
        }
        assert!(all > 9e5, "the model's matrices are missing: {plan}");
        let held = plan["weight_bytes_per_rank"].as_f64().unwrap();
        assert!(held <= 1.02 * all / ranks as f64 + vectors, "{ranks} ranks hold {held} of {all}");
    }
}
