//! Plans of known models come out as people know them.

mod common;

use common::{LLAMA_8B, Sizes, decode, llama};
use std::time::Instant;
use tpshard_ir::op::NormKind;
use tpshard_ir::{DType, Op};
use tpshard_passes::cost::Profile;
use tpshard_passes::extended::Extended;
use tpshard_passes::extract::ExtractError;
use tpshard_passes::report::Verdict;
use tpshard_passes::{MemoryGoal, Plan, PlanError, PlanOptions, plan};

fn options(ranks: usize, profile: &str) -> PlanOptions {
    let mut options = PlanOptions::new(ranks, Profile::built_in(profile).unwrap());
    options.entries = vec![decode()];
    options.memory = MemoryGoal::Least;
    options
}

fn plan_llama(layers: usize, ranks: usize) -> Plan {
    let graph = llama(Sizes { layers, ..LLAMA_8B }, DType::BF16);
    let start = Instant::now();
    let plan = plan(Extended::new(graph), &options(ranks, "h100-sxm")).unwrap();
    println!("{layers} layers, {ranks} ranks: {:?}\n{}", start.elapsed(), plan.report);
    plan
}

#[test]
fn llama_decodes_with_two_all_reduces_per_layer() {
    for layers in [2, 12, 32] {
        for ranks in [2, 4] {
            let report = plan_llama(layers, ranks).report;
            let inside: Vec<_> =
                report.collectives.iter().filter(|c| c.origin.starts_with("model.layers.")).collect();
            assert_eq!(inside.len(), 2 * layers, "{report}");
            assert!(inside.iter().all(|c| c.kind == "all_reduce"), "{report}");
            for kind in report.stored.iter().filter(|k| k.name.contains("proj") || k.is_state) {
                assert!(!kind.layout.is_replicated(), "{report}");
            }
            assert_eq!(report.gap, 0.0);
        }
    }
}

#[test]
#[ignore = "measures time; run it with --release --nocapture"]
fn planning_thirty_two_layers_takes_a_moment() {
    for (seq, ranks) in [(1, 8), (2048, 2), (2048, 4), (2048, 8)] {
        let graph = llama(Sizes { layers: 32, ..LLAMA_8B }, DType::BF16);
        let mut o = options(ranks, "h100-sxm");
        o.entries = vec![common::entry(
            "p",
            &[("batch", 1), ("seq", seq), ("past", if seq == 1 { 2048 } else { 1 })],
        )];
        for memory in [MemoryGoal::Least, MemoryGoal::Free] {
            o.memory = memory;
            let start = Instant::now();
            let plan = plan(Extended::new(graph.clone()), &o).unwrap();
            if seq == 1 {
                assert!(start.elapsed().as_millis() < 1000, "{:?}", start.elapsed());
            }
            println!(
                "seq {seq} ranks {ranks} {memory:?}: {:?} gap {} {:?}",
                start.elapsed(),
                plan.report.gap,
                plan.report.collective_counts()
            );
        }
    }
}

/// A head over a large vocabulary whose probabilities are wanted, not its logits.
fn classifier(width: usize, vocabulary: usize) -> tpshard_ir::Graph {
    let mut net = common::Net::new("classifier", DType::BF16);
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

#[test]
fn softmax_stays_split_over_the_vocabulary() {
    let graph = classifier(1024, 131_072);
    let mut options = options(4, "h100-sxm");
    options.entries = vec![common::entry("e", &[("rows", 64)])];
    let plan = plan(Extended::new(graph), &options).unwrap();
    let report = &plan.report;
    let all_reduces = |origin: &str| {
        report.collectives.iter().filter(|c| c.origin == origin && c.kind == "all_reduce").collect::<Vec<_>>()
    };
    // The maximum and the sum of each row, then the contraction with the values.
    let small = all_reduces("softmax");
    assert_eq!(small.len(), 2, "{report}");
    assert!(small.iter().all(|c| c.payload[0] <= 64 * 4), "{report}");
    assert_eq!(all_reduces("mean").len() + all_reduces("softmax").len(), 3, "{report}");
    assert!(plan.program.equations.iter().any(|e| &*e.rule == "decompose"));
    for equation in &plan.program.equations {
        let ty = |v| plan.program.logical.ty(v);
        assert_eq!(ty(equation.left), ty(equation.right));
    }
}

#[test]
fn norm_stays_split_over_the_hidden_dim_where_links_are_cheap() {
    let profile = Profile::built_in("h100-sxm").unwrap();
    // All but no latency, and little bandwidth: two numbers per row are cheap, whole rows are not.
    let text = profile
        .text
        .replace("base 6.6e-6 step 0.6e-6 bandwidth 141e9", "base 1e-9 step 1e-9 bandwidth 1e9")
        .replace("base 8.4e-6 step 3.4e-6 bandwidth 370e9", "base 1e-9 step 1e-9 bandwidth 1e9");
    let mut net = common::Net::new("norm", DType::F32);
    let rows = net.symbol("rows");
    let x = net.input("x", DType::F32, &[rows.clone(), common::dim(8192)]);
    let w = net.weight("in", &[8192, 8192]);
    let y = net.einsum("sk,kn->sn", x, w, "in");
    let y = net.norm(NormKind::Layer, y, "norm", 8192);
    let w = net.weight("out", &[8192, 64]);
    let y = net.einsum("sk,kn->sn", y, w, "out");
    net.output("y", y);
    let mut options = PlanOptions::new(4, Profile::parse(&text).unwrap());
    options.entries = vec![common::entry("e", &[("rows", 2048)])];
    options.memory = MemoryGoal::Least;
    let report = plan(Extended::new(net.graph), &options).unwrap().report;
    let inside: Vec<_> = report.collectives.iter().filter(|c| c.origin == "norm").collect();
    assert_eq!(inside.len(), 2, "the mean and the variance\n{report}");
    assert!(inside.iter().all(|c| c.kind == "all_reduce" && c.payload[0] == 2048 * 4), "{report}");
}

#[test]
fn equal_inputs_give_equal_plans() {
    let graph = || llama(Sizes { layers: 3, ..LLAMA_8B }, DType::BF16);
    let first = plan(Extended::new(graph()), &options(4, "h100-pcie")).unwrap();
    let second = plan(Extended::new(graph()), &options(4, "h100-pcie")).unwrap();
    assert_eq!(first, second);
    assert_eq!(first.report.to_string(), second.report.to_string());
}

#[test]
fn layers_are_split_alike() {
    let report = plan_llama(12, 4).report;
    let projections = report.stored.iter().filter(|k| k.name.contains("layers"));
    assert!(projections.clone().all(|k| k.count == 12), "{report}");
    assert_eq!(projections.count(), 9, "{report}");
}

#[test]
fn what_cannot_be_planned_is_refused() {
    let graph = || Extended::new(llama(Sizes { layers: 1, ..LLAMA_8B }, DType::BF16));
    let with = |change: &dyn Fn(&mut PlanOptions)| {
        let mut options = options(2, "l4");
        change(&mut options);
        plan(graph(), &options)
    };
    assert!(matches!(with(&|o| o.ranks = 0), Err(PlanError::Ranks { found: 0 })));
    assert!(matches!(with(&|o| o.ranks = 1025), Err(PlanError::Ranks { found: 1025 })));
    assert!(matches!(with(&|o| o.entries.clear()), Err(PlanError::NoEntry)));
    let error = with(&|o| o.memory = MemoryGoal::Bytes(1 << 20)).unwrap_err();
    assert!(matches!(error, PlanError::Extract(ExtractError::Budget { .. })));
    assert!(error.to_string().contains("help: "), "{error}");
    let mut lost = graph();
    lost.graph.states[0].input = "nowhere".into();
    assert!(matches!(plan(lost, &options(2, "l4")), Err(PlanError::Build(_))));
}

#[test]
fn small_models_are_not_worth_sharding() {
    let sizes =
        Sizes { layers: 2, width: 256, heads: 4, kv_heads: 4, head: 64, hidden: 512, vocabulary: 1000 };
    let graph = llama(sizes, DType::F32);
    let report = plan(Extended::new(graph.clone()), &options(2, "h100-pcie")).unwrap().report;
    assert_eq!(report.verdict, Verdict::DoNotShard, "{report}");
    let report = plan(Extended::new(graph), &options(1, "h100-pcie")).unwrap().report;
    assert_eq!(report.verdict, Verdict::OneRank, "{report}");
    assert!(report.collectives.is_empty());
}
