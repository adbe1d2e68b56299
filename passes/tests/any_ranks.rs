//! Any number of ranks for any number of heads: head counts that ranks do not divide are dealt out unevenly, KV heads
//! that are fewer than ranks are replicated, split in part over a factored mesh, or left to some of the ranks.

mod common;

use common::{Sizes, entry, llama, simulated};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tpshard_ir::{AxisLayout, Bindings, DType, Graph, Layout, Mesh, Op, ValueId};
use tpshard_passes::cost::{Cost, Pricer, Profile};
use tpshard_passes::extended::Extended;
use tpshard_passes::extract::Limits;
use tpshard_passes::layout_graph::{Classes, Model, build};
use tpshard_passes::logical::alternatives;
use tpshard_passes::sharding::candidate_units;
use tpshard_passes::{Balance, MemoryGoal, Pin, PlanOptions, PlanReport, plan};

const HEADS: [usize; 8] = [5, 6, 12, 14, 25, 40, 52, 64];
const KV_HEADS: [usize; 5] = [1, 2, 3, 4, 8];
const RANKS: [usize; 10] = [1, 2, 3, 4, 5, 6, 7, 8, 12, 16];
const DIMS: [(&str, i64); 3] = [("batch", 1), ("seq", 2), ("past", 3)];

/// All head counts with the KV head counts that divide them.
fn pairs() -> Vec<(usize, usize)> {
    let with = |heads: usize| {
        KV_HEADS.into_iter().filter(move |kv| heads.is_multiple_of(*kv)).map(move |kv| (heads, kv))
    };
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
    options.limits = Limits { states: 128, labels: 64 };
    options
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

fn bindings() -> Bindings {
    DIMS.iter().map(|&(n, v)| (Arc::from(n), v)).collect()
}

/// Plans, asks the checker, and compares all ranks with one.
fn assert_holds(graph: &Graph, options: &PlanOptions) -> PlanReport {
    let plan = plan(Extended::new(graph.clone()), options).unwrap();
    simulated::assert_checked(&plan, graph);
    simulated::assert_exact(&plan, graph, &bindings());
    plan.report
}

fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

/// The mesh whose first axis splits KV heads evenly and whose second splits the query heads of each further.
fn factored(ranks: usize, kv_heads: usize) -> Option<Mesh> {
    let common = greatest_common_divisor(ranks, kv_heads);
    (common > 1 && common < ranks).then(|| Mesh(vec![common, ranks / common]))
}

#[test]
fn every_pair_of_head_counts_on_every_number_of_ranks() {
    let cases: Vec<(usize, usize, usize)> =
        pairs().into_iter().flat_map(|(heads, kv)| RANKS.map(|ranks| (heads, kv, ranks))).collect();
    assert_eq!(cases.len(), 220);
    let [on_factored, uneven, idle] = [0; 3].map(AtomicUsize::new);
    in_parallel(&cases, |&(heads, kv, ranks)| {
        let report = assert_holds(&decoder(heads, kv), &options(ranks, MemoryGoal::Least));
        // Every mesh was planned for, and none of the plans is better than the chosen one.
        let meshes: Vec<Mesh> =
            [Some(Mesh::flat(ranks)), factored(ranks, kv)].into_iter().flatten().collect();
        assert!(report.meshes.iter().map(|m| &m.mesh).eq(&meshes), "{report}");
        assert!(report.meshes.iter().all(|m| m.seconds >= report.seconds), "{report}");
        let Balance { largest, total, idle: without, .. } = report.balance;
        assert_eq!(largest, report.weight_bytes + report.state_bytes, "rank 0 holds most\n{report}");
        assert!(largest * ranks as u64 >= total && without < ranks, "{report}");
        if ranks > 1 {
            let printed = format!("imbalance {:.2}", report.balance.ratio());
            assert!(report.to_string().contains(&printed), "{report}");
        }
        for (counter, found) in [
            (&on_factored, report.mesh.axes() > 1),
            (&uneven, report.balance.ratio() > 1.01),
            (&idle, without > 0),
        ] {
            counter.fetch_add(usize::from(found), Ordering::Relaxed);
        }
    });
    let counts = [&on_factored, &uneven, &idle].map(|c| c.load(Ordering::Relaxed));
    println!(
        "{} plans: {} on a factored mesh, {} uneven, {} with idle ranks",
        cases.len(),
        counts[0],
        counts[1],
        counts[2]
    );
    assert!(counts.iter().all(|&count| count > 0), "{counts:?}");
}

/// Where links cost nothing, plans split what they can.
#[test]
fn without_a_budget_on_machines_with_free_links() {
    let base = Profile::built_in("h100-sxm").unwrap();
    let cheap = common::with_link(&base.text, "base 1e-12 step 1e-12 bandwidth 1e15")
        .replace("memory_bandwidth = 3.35e12", "memory_bandwidth = 1e6")
        .replace("kernel_launch = 1.3e-6", "kernel_launch = 1e-9");
    let cheap = Profile::parse(&cheap).unwrap();
    let cases: Vec<(usize, usize, usize)> = pairs()
        .into_iter()
        .enumerate()
        .flat_map(|(i, (heads, kv))| [(heads, kv, RANKS[1 + i % 9]), (heads, kv, RANKS[1 + (i + 4) % 9])])
        .collect();
    in_parallel(&cases, |&(heads, kv, ranks)| {
        let mut options = options(ranks, MemoryGoal::Free);
        options.profile = cheap.clone();
        let report = assert_holds(&decoder(heads, kv), &options);
        assert!(report.seconds < report.seconds_alone, "{report}");
    });
    println!("{} plans", cases.len());
}

/// How attention can be computed with all query heads dealt out: the layouts of its keys, with the cost on the largest
/// rank.
fn ways(graph: &Graph, mesh: &Mesh) -> BTreeMap<Layout, Cost> {
    let found = alternatives(Extended::new(graph.clone())).unwrap();
    let graph = &found.extended.graph;
    let profile = Profile::built_in("h100-sxm").unwrap();
    let entries = [entry("e", &DIMS)];
    let pricer = Pricer::new(&profile, graph, &entries);
    let outputs: Vec<ValueId> = found.extended.outputs.iter().map(|o| o.value).collect();
    let classes = Classes::new(graph, &outputs, &found.equal, &pricer, mesh);
    let units = candidate_units(graph, &found.live());
    let outputs = &found.extended.outputs;
    let model =
        Model { graph, outputs, classes: &classes, units: &units, pricer: &pricer, mesh, one_order: false };
    let layouts = build(&model).unwrap();
    let is_attention = |value: ValueId| matches!(graph.node(value).op, Op::Attention { .. });
    let mut ways = BTreeMap::new();
    for group in &layouts.groups {
        for production in group.productions.iter().filter(|p| is_attention(p.value)) {
            let by_heads = |part: &AxisLayout| part.sharded_dim() == Some(1);
            if group.layout(production.out).0.iter().all(by_heads) {
                let keys = production.operands[1];
                let keys = layouts.groups[keys.group as usize].layout(keys.slot).clone();
                ways.insert(keys, production.cost);
            }
        }
    }
    ways
}

/// Query heads can always be dealt out, evenly or not, over replicated keys; keys can be dealt out as well where there
/// are several, and in part over a factored mesh. All of it has a price, which is that of the largest rank.
#[test]
fn uneven_heads_replicated_keys_and_factored_meshes_are_priced() {
    let whole = AxisLayout::Replicated;
    let mut counts = [0; 3];
    for (heads, kv) in pairs() {
        let graph = decoder(heads, kv);
        let mut price_of_largest: BTreeMap<usize, Cost> = BTreeMap::new();
        for ranks in RANKS.into_iter().filter(|&ranks| ranks > 1) {
            let flat = ways(&graph, &Mesh::flat(ranks));
            let replicated = flat[&Layout(vec![whole.clone()])];
            assert!(replicated > Cost::ZERO);
            let largest = heads.div_ceil(ranks);
            assert_eq!(*price_of_largest.entry(largest).or_insert(replicated), replicated, "{heads} {ranks}");
            let with_keys = flat.keys().filter(|l| l.0[0].sharded_dim() == Some(1)).count();
            assert_eq!(with_keys > 0, kv > 1, "{heads} heads over {kv} on {ranks} ranks: {:?}", flat.keys());
            counts[0] += usize::from(heads % ranks != 0);
            counts[1] += usize::from(ranks > kv);
            if let Some(mesh) = factored(ranks, kv) {
                let partly = |l: &&Layout| l.0[0].sharded_dim() == Some(1) && l.0[1] == whole;
                let ways = ways(&graph, &mesh);
                let found =
                    ways.keys().find(partly).unwrap_or_else(|| panic!("{heads} {kv} {mesh}: {ways:?}"));
                assert!(ways[found] > Cost::ZERO);
                counts[2] += 1;
            }
        }
        // More heads on the largest rank never take less.
        assert!(price_of_largest.values().is_sorted(), "{price_of_largest:?}");
    }
    println!(
        "{} with uneven heads, {} with more ranks than keys, {} factored",
        counts[0], counts[1], counts[2]
    );
}

/// A cache that is replicated and one that leaves ranks idle: both hold, and the report says what they cost.
#[test]
fn replicated_and_idle_caches_are_both_to_be_had() {
    for (heads, kv, ranks) in [(6, 2, 4), (12, 3, 8), (25, 1, 3), (40, 4, 6), (64, 8, 12)] {
        let graph = decoder(heads, kv);
        let pinned = |dim: Option<usize>| {
            let mut options = options(ranks, MemoryGoal::Free);
            let caches = graph.inputs().filter(|(_, name, _)| name.starts_with("past."));
            options.pins =
                caches.map(|(value, name, _)| Pin { value, dim, name: name.to_string() }).collect();
            assert_holds(&graph, &options)
        };
        let replicated = pinned(None);
        let one_head = replicated.state_bytes / kv as u64;
        assert!(replicated.seconds > 0.0);
        if kv > 1 {
            let split = pinned(Some(1));
            assert_eq!(split.state_bytes, one_head * kv.div_ceil(ranks) as u64, "{split}");
            assert!(split.seconds > 0.0 && split.balance.idle >= ranks.saturating_sub(kv), "{split}");
            assert_ne!(split.seconds, replicated.seconds);
        }
    }
}
