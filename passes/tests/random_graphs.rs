//! Whatever the graph, the number of ranks, the machine and the pins: the checker accepts the plan, and all ranks
//! together compute what one computes, exactly.
//!
//! `TPSHARD_SEEDS=from..to` runs other seeds than the usual ones.

mod common;
mod random;

use common::{entry, simulated, with_link};
use random::{Case, Machine, Words};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use tpshard_ir::{Bindings, Graph};
use tpshard_passes::cost::Profile;
use tpshard_passes::extended::Extended;
use tpshard_passes::extract::{ExtractError, Limits};
use tpshard_passes::{MemoryGoal, Pin, PlanError, PlanOptions, canonical, plan};

/// Seeds that failed once.
const REMEMBERED: &[u64] = &[
    // A transpose undone by another: the value equals one that is computed from it.
    2032, // Two pins that contradict each other through what lies between them.
    1451, 4923, // Two ranks share one group of a convolution's channels.
    19430,
];
/// Seeds that are run after those.
const SEEDS: std::ops::Range<u64> = 0..6_000;

fn profile(machine: Machine) -> Profile {
    let base = Profile::built_in("h100-sxm").unwrap();
    match machine {
        Machine::Usual | Machine::SplitAll => base,
        Machine::FreeLinks => {
            let text = with_link(&base.text, "base 1e-12 step 1e-12 bandwidth 1e15")
                .replace("memory_bandwidth = 3.35e12", "memory_bandwidth = 1e6")
                .replace("kernel_launch = 1.3e-6", "kernel_launch = 1e-9");
            Profile::parse(&text).unwrap()
        }
    }
}

fn options(case: &Case) -> PlanOptions {
    let mut options = PlanOptions::new(case.ranks, profile(case.machine));
    let [b, s] = case.sizes;
    options.entries = vec![entry("e", &[("b", b), ("s", s)])];
    options.memory = if case.genes.len().is_multiple_of(2) { MemoryGoal::Least } else { MemoryGoal::Free };
    options.limits = Limits { states: 64, labels: 32 };
    options.split_all = case.machine == Machine::SplitAll && case.ranks > 1;
    options
}

/// A pin of any value along any of its dims, or whole.
fn pin(graph: &Graph, word: u64) -> Pin {
    let mut words = Words::of(word);
    let values: Vec<_> = graph.values().collect();
    let (value, node) = values[words.below(values.len())];
    let dim = words.below(node.ty.rank() + 1);
    let dim = (dim < node.ty.rank()).then_some(dim);
    Pin { value, dim, name: format!("value {value}") }
}

/// What a case came to: how many pins were kept.
fn run(case: &Case) -> usize {
    let graph = case.graph();
    let extended = || {
        let mut extended = Extended::new(graph.clone());
        if case.canonical {
            canonical::canonicalise(&mut extended);
        }
        extended
    };
    let mut options = options(case);
    for &word in &case.pins {
        // A pin that cannot be kept is refused, and the others stand.
        options.pins.push(pin(&graph, word));
        match plan(extended(), &options) {
            Err(PlanError::Pin(_) | PlanError::Extract(ExtractError::Impossible)) => drop(options.pins.pop()),
            Err(error) => panic!("{error}"),
            Ok(_) => {}
        }
    }
    let plan = plan(extended(), &options).unwrap_or_else(|error| panic!("{error}"));
    simulated::assert_checked(&plan, &graph);
    let [b, s] = case.sizes;
    let bindings: Bindings = [("b".into(), b), ("s".into(), s)].into();
    simulated::assert_exact(&plan, &graph, &bindings);
    options.pins.len()
}

fn fails(case: &Case) -> Option<String> {
    catch_unwind(AssertUnwindSafe(|| run(case))).err().map(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        text.or_else(|| panic.downcast_ref::<&str>().map(|t| (*t).to_owned())).unwrap_or_default()
    })
}

fn seeds() -> Vec<u64> {
    let range = std::env::var("TPSHARD_SEEDS").ok().and_then(|text| {
        let (from, to) = text.split_once("..")?;
        Some(from.parse().ok()?..to.parse().ok()?)
    });
    REMEMBERED.iter().copied().chain(range.unwrap_or(SEEDS)).collect()
}

#[test]
fn ranks_compute_what_one_computes() {
    let seeds = seeds();
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    let (pins, operations) = (AtomicUsize::new(0), Mutex::new(BTreeMap::<String, usize>::new()));
    // Cases that fail say so once, when they are small.
    std::panic::set_hook(Box::new(|_| {}));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(&seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let case = Case::of(seed);
                    for (_, node) in case.graph().values() {
                        *operations.lock().unwrap().entry(node.op.name().to_owned()).or_default() += 1;
                    }
                    match catch_unwind(AssertUnwindSafe(|| run(&case))) {
                        Ok(kept) => drop(pins.fetch_add(kept, Ordering::Relaxed)),
                        Err(_) => drop(failed.lock().unwrap().insert(seed, case)),
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap();
    let report = |(seed, case): (&u64, &Case)| {
        let what = fails(case).unwrap_or_default();
        let (case, what) = case.clone().shrunk(what, &fails);
        let graph = tpshard_ir::text::print_graph(&case.graph());
        format!("seed {seed}: add it to REMEMBERED\n{case:?}\n{graph}\n{what}")
    };
    let texts: Vec<String> = failed.iter().take(3).map(report).collect();
    let _ = std::panic::take_hook();
    assert!(failed.is_empty(), "{:?} fail\n{}", failed.keys(), texts.join("\n\n"));
    let (pins, operations) = (pins.into_inner(), operations.into_inner().unwrap());
    println!("{} graphs, {pins} pins, {operations:?}", seeds.len());
    if seeds.len() >= SEEDS.count() {
        assert!(pins > 1000, "{pins} pins were kept");
        // All of the list but a symbol's value, deferred calls and changes of layout.
        assert!(operations.len() >= 41, "{operations:?}");
    }
}

/// What shrinking leaves is as small as the failure allows.
#[test]
fn cases_shrink_to_what_fails() {
    let case = Case::of(7);
    let wanted = case.genes[1];
    let fails =
        |case: &Case| (case.genes.contains(&wanted) && case.ranks > 1).then(|| "as it should".to_owned());
    let (small, what) = Case { ranks: 6, ..case }.shrunk(String::new(), &fails);
    assert_eq!((small.genes, small.ranks, small.pins), (vec![wanted], 2, vec![]));
    assert_eq!(what, "as it should");
}
