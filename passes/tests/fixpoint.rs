//! The direct construction of layout graphs and the saturated e-graph agree: same classes, same productions, same
//! conversions.

mod common;

use common::{Sizes, entry, gpt2, llama, resnet};
use tpshard_ir::{DType, Graph, Layout, Mesh, ValueId};
use tpshard_passes::Entry;
use tpshard_passes::cost::{Pricer, Profile};
use tpshard_passes::egraph::layouts::{constructed, saturated};
use tpshard_passes::extended::Extended;
use tpshard_passes::layout_graph::{Classes, Model, build};
use tpshard_passes::logical::alternatives;
use tpshard_passes::sharding::candidate_units;

fn check(graph: &Graph, entries: &[Entry], ranks: usize) {
    let found = alternatives(Extended::new(graph.clone())).unwrap();
    let graph = &found.extended.graph;
    let profile = Profile::built_in("h100-sxm").unwrap();
    let pricer = Pricer::new(&profile, graph, entries);
    let mesh = Mesh::flat(ranks);
    let outputs: Vec<ValueId> = found.extended.outputs.iter().map(|o| o.value).collect();
    let classes = Classes::new(graph, &outputs, &found.equal, &pricer, &mesh);
    let units = candidate_units(graph, &found.live());
    let model = Model {
        graph,
        outputs: &found.extended.outputs,
        classes: &classes,
        units: &units,
        pricer: &pricer,
        mesh: &mesh,
        one_order: false,
    };
    let start = std::time::Instant::now();
    let layouts = build(&model).unwrap();
    let direct = start.elapsed();
    let whole = |l: &&Layout| !l.has_partial();
    let universe: Vec<Vec<Layout>> =
        layouts.groups.iter().map(|g| g.layouts.iter().filter(whole).cloned().collect()).collect();
    let start = std::time::Instant::now();
    let egg = saturated(&model, &universe, 1_000_000, 100).expect("limits suffice");
    println!("{}: direct {direct:?}, saturated {:?}, {:?}", graph.name, start.elapsed(), layouts.sizes());
    let direct = constructed(&layouts);
    let lost: Vec<_> = direct.classes.difference(&egg.classes).collect();
    let more: Vec<_> = egg.classes.difference(&direct.classes).collect();
    assert!(lost.is_empty() && more.is_empty(), "only direct: {lost:?}, only saturated: {more:?}");
    let lost: Vec<_> = direct.productions.difference(&egg.productions).collect();
    let more: Vec<_> = egg.productions.difference(&direct.productions).collect();
    assert!(lost.is_empty() && more.is_empty(), "only direct: {lost:?}, only saturated: {more:?}");
    assert_eq!(direct.conversions, egg.conversions);
    assert!(direct.productions.len() > direct.classes.len() / 4);
}

const SIZES: Sizes =
    Sizes { layers: 2, width: 64, heads: 6, kv_heads: 2, head: 8, hidden: 96, vocabulary: 257 };

#[test]
fn decoders() {
    let dims = [entry("prefill", &[("batch", 2), ("seq", 16), ("past", 4)])];
    for ranks in [2, 3, 4] {
        check(&llama(SIZES, DType::F32), &dims, ranks);
        check(&gpt2(SIZES, DType::F32), &dims, ranks);
    }
    check(&llama(Sizes { layers: 8, ..SIZES }, DType::BF16), &dims, 2);
}

#[test]
fn convolutions() {
    check(&resnet(8, 10), &[entry("e", &[("batch", 4)])], 2);
}
