//! Every plan computes what its model computes: N simulated ranks against the logical graph, in the field modulo
//! 2^61 - 1, where equal means equal. And the checker, which shares no rules with the planner, agrees.

mod common;

use common::{Sizes, entry, gpt2, llama, resnet, simulated};
use std::sync::Arc;
use tpshard_ir::{Bindings, DType, Graph};
use tpshard_passes::cost::Profile;
use tpshard_passes::extended::Extended;
use tpshard_passes::{MemoryGoal, Plan, PlanOptions, plan};

/// Machines that make different plans the best ones.
fn profiles() -> Vec<Profile> {
    let base = Profile::built_in("h100-sxm").unwrap();
    let cheap_links = common::with_link(&base.text, "base 1e-12 step 1e-12 bandwidth 1e15")
        .replace("memory_bandwidth = 3.35e12", "memory_bandwidth = 1e6")
        .replace("kernel_launch = 1.3e-6", "kernel_launch = 1e-9");
    vec![base, Profile::parse(&cheap_links).unwrap()]
}

fn check(graph: &Graph, options: &PlanOptions, bindings: &Bindings) -> Plan {
    let plan = plan(Extended::new(graph.clone()), options).unwrap();
    simulated::assert_checked(&plan, graph);
    simulated::assert_exact(&plan, graph, bindings);
    plan
}

/// Plans and runs `graph` for several rank counts, machines and budgets.
fn check_everywhere(graph: &Graph, ranks: &[usize], plan_for: &[(&str, i64)], run_with: &[(&str, i64)]) {
    let bindings: Bindings = run_with.iter().map(|&(n, v)| (Arc::from(n), v)).collect();
    for &ranks in ranks {
        for profile in profiles() {
            for memory in [MemoryGoal::Least, MemoryGoal::Free] {
                let mut options = PlanOptions::new(ranks, profile.clone());
                options.entries = vec![entry("e", plan_for)];
                options.memory = memory;
                let plan = check(graph, &options, &bindings);
                // Where collectives are all that a tiny model pays for, a tight budget leaves thousands of plans within
                // reach of each other, and the search is cut short.
                if memory == MemoryGoal::Free {
                    assert!(plan.report.gap < 0.1, "{}", plan.report);
                }
            }
        }
    }
}

const TINY: Sizes =
    Sizes { layers: 2, width: 12, heads: 4, kv_heads: 2, head: 4, hidden: 24, vocabulary: 257 };

#[test]
fn llama_in_every_phase() {
    let decode = [("batch", 1), ("seq", 1), ("past", 6)];
    let prefill = [("batch", 2), ("seq", 6), ("past", 1)];
    let graph = llama(TINY, DType::F32);
    check_everywhere(&graph, &[1, 2, 3, 4, 5], &decode, &decode);
    check_everywhere(&graph, &[4], &prefill, &prefill);
    // Plans hold for other dims than they were made for.
    check_everywhere(&graph, &[2, 3], &decode, &prefill);
}

#[test]
fn five_heads_over_one_and_fourteen_over_two() {
    for (heads, kv_heads) in [(5, 1), (14, 2)] {
        let sizes = Sizes { heads, kv_heads, width: 10, hidden: 15, layers: 1, ..TINY };
        let dims = [("batch", 1), ("seq", 2), ("past", 3)];
        check_everywhere(&llama(sizes, DType::F32), &[3, 4, 5], &dims, &dims);
    }
}

#[test]
fn gpt2_with_tied_weights() {
    let dims = [("batch", 1), ("seq", 5)];
    check_everywhere(&gpt2(TINY, DType::F32), &[2, 3, 5], &dims, &dims);
}

#[test]
fn resnet_block() {
    let dims = [("batch", 2)];
    check_everywhere(&resnet(6, 7), &[2, 3, 4], &dims, &dims);
}
