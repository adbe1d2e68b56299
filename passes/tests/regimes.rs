//! The plans that people wrote by hand each come out where they are best: one machine, one model, and only the sizes,
//! the memory and the links differ. Every plan is pinned by a golden text.
//!
//! `TPSHARD_BLESS=1 cargo test -p tpshard-passes --test regimes` writes the texts instead of comparing with them.

mod common;

use common::{LLAMA_8B, Net, Sizes, entry, gpt2, llama};
use std::collections::BTreeMap;
use std::path::Path;
use tpshard_ir::{DType, Graph, Op};
use tpshard_passes::cost::Profile;
use tpshard_passes::extended::Extended;
use tpshard_passes::{Entry, MemoryGoal, PlanOptions, PlanReport, plan};

const LAYERS: usize = 4;

fn decoder() -> Graph {
    llama(Sizes { layers: LAYERS, ..LLAMA_8B }, DType::BF16)
}

/// Without state: nothing but weights ties a plan to one layout.
fn encoder() -> Graph {
    gpt2(Sizes { layers: LAYERS, kv_heads: 32, hidden: 16384, vocabulary: 50_257, ..LLAMA_8B }, DType::BF16)
}

fn report(graph: Graph, ranks: usize, profile: &str, memory: MemoryGoal, entry: Entry) -> PlanReport {
    let mut options = PlanOptions::new(ranks, Profile::built_in(profile).unwrap());
    options.entries = vec![entry];
    options.memory = memory;
    plan(Extended::new(graph), &options).unwrap().report
}

/// How often each kind of collective occurs for nodes whose names start like this.
fn counts(report: &PlanReport, origin: &str) -> BTreeMap<&'static str, usize> {
    let mut counts = BTreeMap::new();
    for collective in report.collectives().filter(|c| c.origin.starts_with(origin)) {
        *counts.entry(collective.kind).or_default() += 1;
    }
    counts
}

#[track_caller]
fn assert_golden(name: &str, report: &PlanReport) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{name}.txt"));
    let found = report.to_string();
    if std::env::var_os("TPSHARD_BLESS").is_some() {
        std::fs::write(&path, &found).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(found == expected, "{name}: TPSHARD_BLESS=1 accepts this plan:\n{found}");
}

fn tokens(batch: i64, seq: i64, past: i64) -> Entry {
    entry("tokens", &[("batch", batch), ("seq", seq), ("past", past)])
}

fn sequences(batch: i64, seq: i64) -> Entry {
    entry("sequences", &[("batch", batch), ("seq", seq)])
}

#[test]
fn decoding_is_megatrons_two_all_reduces_per_layer() {
    let report = report(decoder(), 4, "h100-sxm", MemoryGoal::Least, tokens(1, 1, 2048));
    assert_eq!(counts(&report, "model.layers"), BTreeMap::from([("all_reduce", 2 * LAYERS)]), "{report}");
    assert_golden("megatron", &report);
}

/// The all-reduces come apart, and the norms between the halves run on a part of the sequence each.
#[test]
fn long_prefill_is_sequence_parallel() {
    let report = report(decoder(), 4, "a100-sxm-80", MemoryGoal::Least, tokens(1, 2048, 0));
    let inside = counts(&report, "model.layers");
    assert_eq!(inside["reduce_scatter"], 2 * LAYERS, "{report}");
    assert!(!inside.contains_key("all_reduce"), "{report}");
    // The first layer's input is gathered at the embedding.
    assert!(inside["all_gather"] >= 2 * LAYERS - 1, "{report}");
    assert_golden("sequence-parallel", &report);
}

/// A head over a large vocabulary whose probabilities are wanted, not its logits.
fn classifier() -> Graph {
    let (width, vocabulary) = (1024, 131_072);
    let mut net = Net::new("classifier", DType::BF16);
    let rows = net.symbol("rows");
    let ids = net.input("ids", DType::I64, std::slice::from_ref(&rows));
    let table = net.weight("table", &[1000, width]);
    let x = net.add(Op::Gather { axis: 0, window: None }, &[table, ids], "embed");
    let w = net.weight("head.weight", &[width, vocabulary]);
    let logits = net.einsum("sk,kn->sn", x, w, "head");
    let shares = net.add(Op::Softmax { axis: 1 }, &[logits], "softmax");
    let values = net.weight("values", &[vocabulary, width]);
    let mean = net.einsum("sn,nk->sk", shares, values, "mean");
    net.output("mean", mean);
    net.graph
}

/// The maximum and the sum of each row are reduced, and then the contraction with the values.
#[test]
fn softmax_stays_split_over_a_large_vocabulary() {
    let rows = 64;
    let entry = entry("rows", &[("rows", rows)]);
    let mut options = PlanOptions::new(4, Profile::built_in("h100-sxm").unwrap());
    options.entries = vec![entry];
    options.memory = MemoryGoal::Least;
    let plan = plan(Extended::new(classifier()), &options).unwrap();
    let report = &plan.report;
    assert_eq!(counts(report, "softmax"), BTreeMap::from([("all_reduce", 2)]), "{report}");
    assert_eq!(counts(report, "mean"), BTreeMap::from([("all_reduce", 1)]), "{report}");
    let small = report.collectives().filter(|c| c.origin == "softmax");
    assert!(small.into_iter().all(|c| c.payload <= rows as u64 * 4), "{report}");
    let program = &plan.programs[0].1;
    assert!(program.equations.iter().any(|e| &*e.rule == "decompose"));
    for equation in &program.equations {
        assert_eq!(program.logical.ty(equation.left), program.logical.ty(equation.right));
    }
    assert_golden("vocabulary-parallel-softmax", report);
}

/// Weights are replicated; of every layer only the keys and the values are gathered.
#[test]
fn without_a_budget_long_prefill_is_context_parallel() {
    let report = report(decoder(), 2, "a100-sxm-80", MemoryGoal::Free, tokens(1, 2048, 0));
    assert_eq!(counts(&report, "model.layers"), BTreeMap::from([("all_gather", 2 * LAYERS)]), "{report}");
    let proj = report.stored.iter().filter(|k| k.name.contains("mlp"));
    assert!(proj.into_iter().all(|k| k.layout.is_replicated()), "{report}");
    assert_golden("context-parallel", &report);
}

/// Between more ranks it is cheaper to exchange heads for sequence than to gather: Ulysses.
#[test]
fn without_a_budget_many_ranks_exchange_heads_for_sequence() {
    let report = report(decoder(), 8, "a100-sxm-80", MemoryGoal::Free, tokens(1, 2048, 0));
    let all = counts(&report, "");
    assert_eq!(all.keys().copied().collect::<Vec<_>>(), ["all_to_all"], "{report}");
    assert!(all["all_to_all"] >= 3 * LAYERS, "{report}");
    assert_golden("ulysses", &report);
}

/// Many tokens, little memory: weights travel, activations do not.
#[test]
fn large_batches_in_little_memory_gather_weights() {
    let report = report(encoder(), 4, "h100-sxm", MemoryGoal::Least, sequences(8, 4096));
    let inside = counts(&report, "h.");
    assert_eq!(inside, BTreeMap::from([("all_gather", 6 * LAYERS)]), "{report}");
    assert_golden("gathered-weights", &report);
}

#[test]
fn large_batches_without_a_budget_need_no_collective() {
    let report = report(encoder(), 4, "h100-sxm", MemoryGoal::Free, sequences(8, 4096));
    assert!(counts(&report, "").is_empty(), "{report}");
    assert!(report.stored.iter().all(|k| k.layout.is_replicated()), "{report}");
    assert_golden("batch-parallel", &report);
}
