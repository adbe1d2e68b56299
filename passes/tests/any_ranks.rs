//! Any number of ranks for any number of heads: head counts that ranks do not divide are dealt out unevenly, KV heads
//! that are fewer than ranks are replicated, split in part over a factored mesh, or left to some of the ranks.

mod common;

use common::{Sizes, entry, llama, simulated};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tpshard_ir::{Bindings, DType, Graph};
use tpshard_passes::cost::Profile;
use tpshard_passes::extended::Extended;
use tpshard_passes::extract::Limits;
use tpshard_passes::{MemoryGoal, Plan, PlanOptions, plan};

const HEADS: [usize; 8] = [5, 6, 12, 14, 25, 40, 52, 64];
const KV_HEADS: [usize; 5] = [1, 2, 3, 4, 8];
const RANKS: [usize; 10] = [1, 2, 3, 4, 5, 6, 7, 8, 12, 16];
const DIMS: [(&str, i64); 3] = [("batch", 1), ("seq", 2), ("past", 3)];

/// All head counts with the KV head counts that divide them.
fn pairs() -> Vec<(usize, usize)> {
    let with = |heads: usize| KV_HEADS.into_iter().filter(move |kv| heads % kv == 0).map(move |kv| (heads, kv));
    HEADS.into_iter().flat_map(with).collect()
}

fn decoder(heads: usize, kv_heads: usize) -> Graph {
    let head = if heads > 14 { 2 } else { 4 };
    let sizes = Sizes { layers: 1, width: 10, heads, kv_heads, head, hidden: 15, vocabulary: 17 };
    llama(sizes, DType::F32)
}

fn options(ranks: usize, memory: MemoryGoal) -> PlanOptions {
    let mut options = PlanOptions::new(ranks, Profile::built_in("h100-sxm").unwrap());
    options.entries = vec![entry("e", &DIMS)];
    options.memory = memory;
    options.limits = Limits { states: 256, labels: 256 };
    options
}

fn planned(graph: &Graph, options: &PlanOptions) -> Plan {
    plan(Extended::new(graph.clone()), options).unwrap()
}

/// Does `work` for all `items` on two threads.
fn in_parallel<T: Sync>(items: &[T], work: impl Fn(&T) + Sync) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                    work(item);
                }
            });
        }
    });
}

#[test]
fn every_pair_of_head_counts_on_every_number_of_ranks() {
    let bindings: Bindings = DIMS.iter().map(|&(n, v)| (Arc::from(n), v)).collect();
    let cases: Vec<(usize, usize, usize)> =
        pairs().into_iter().flat_map(|(heads, kv)| RANKS.map(|ranks| (heads, kv, ranks))).collect();
    in_parallel(&cases, |&(heads, kv, ranks)| {
        let graph = decoder(heads, kv);
        let t = std::time::Instant::now();
        let plan = planned(&graph, &options(ranks, MemoryGoal::Least));
        let t1 = t.elapsed();
        simulated::assert_checked(&plan, &graph);
        let t2 = t.elapsed();
        simulated::assert_exact(&plan, &graph, &bindings);
        println!("{heads} {kv} {ranks}: {t1:?} {:?} {:?} mesh {} gap {:.3}", t2 - t1, t.elapsed() - t2, plan.report.mesh, plan.report.gap);
    });
}
