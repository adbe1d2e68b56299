//! Plans of known models come out as people know them.

mod common;

use common::{LLAMA_8B, Sizes, decode, llama};
use std::time::Instant;
use tpshard_ir::DType;
use tpshard_passes::cost::Profile;
use tpshard_passes::extended::Extended;
use tpshard_passes::{MemoryGoal, Plan, PlanOptions, plan};

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
#[ignore]
fn timing() {
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
            println!(
                "seq {seq} ranks {ranks} {memory:?}: {:?} gap {} {:?}",
                start.elapsed(),
                plan.report.gap,
                plan.report.collective_counts()
            );
        }
    }
}
