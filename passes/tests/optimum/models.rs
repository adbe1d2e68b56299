//! Layout graphs of models, written down for the integer linear program: one case per line, as JSON.

use crate::common::{Net, Sizes, dim, entry, gpt2, llama, resnet};
use crate::random::Random;
use std::io::Write;
use std::path::Path;
use tpshard_ir::op::{NormKind, Window};
use tpshard_ir::{DType, Graph, Mesh, Monoid, Op, Scalar, ValueId};
use tpshard_passes::Entry;
use tpshard_passes::cost::{Cost, Pricer, Profile};
use tpshard_passes::extended::Extended;
use tpshard_passes::extract::{Budget, Extraction, Limits, extract, extract_entries};
use tpshard_passes::layout_graph::{Classes, LayoutGraph, Model, Operand, build};
use tpshard_passes::logical::alternatives;
use tpshard_passes::sharding::candidate_units;

/// The layout graphs of a model, one per entry.
pub(crate) fn layout_graphs(graph: &Graph, entries: &[Entry], mesh: &Mesh) -> Vec<LayoutGraph> {
    let found = alternatives(Extended::new(graph.clone())).unwrap();
    let graph = &found.extended.graph;
    let profile = Profile::built_in("h100-sxm").unwrap();
    let pricer = Pricer::new(&profile, graph, entries);
    let values: Vec<ValueId> = found.extended.outputs.iter().map(|o| o.value).collect();
    let classes = Classes::new(graph, &values, &found.equal, &pricer, mesh);
    let units = candidate_units(graph, &found.live());
    let outputs = &found.extended.outputs;
    let focused = (0..entries.len()).map(|e| pricer.focused(e));
    let one = |pricer: Pricer<'_>| {
        build(&Model { graph, outputs, classes: &classes, units: &units, pricer: &pricer, mesh }).unwrap()
    };
    focused.map(one).collect()
}

/// No two layers alike: a convolution, then projections that narrow and widen, with and without norms, residuals and
/// a gate.
fn mixed() -> Graph {
    let mut net = Net::new("mixed", DType::F32);
    let batch = net.symbol("batch");
    let image = net.input("image", DType::F32, &[batch.clone(), dim(3), dim(16), dim(16)]);
    let window = Window {
        kernel: vec![3; 2],
        strides: vec![2; 2],
        dilations: vec![1; 2],
        pads_low: vec![1; 2],
        pads_high: vec![1; 2],
        ceil: false,
    };
    let w = net.weight("conv.weight", &[1536, 3, 3, 3]);
    let x = net.add(Op::Conv { window, groups: 1 }, &[image, w], "conv");
    let x = net.add(Op::Reduce { monoid: Monoid::Sum, axes: vec![2, 3] }, &[x], "pool");
    let x = net.reshape(x, &[batch.clone(), dim(1), dim(1536)], "flat");
    let x = net.norm(NormKind::Layer, x, "norm.0", 1536);
    let up = net.linear(x, "up.0", 1536, 6144, true);
    let up = net.map(Scalar::Tanh, &[up], "act.0");
    let y = net.linear(up, "down.0", 6144, 1536, false);
    let x = net.map(Scalar::Add, &[x, y], "residual.0");
    let x = net.linear(x, "narrow.1", 1536, 768, false);
    let gate = net.linear(x, "gate.2", 768, 2304, false);
    let other = net.linear(x, "other.2", 768, 2304, false);
    let both = net.map(Scalar::Mul, &[gate, other], "gated.2");
    let y = net.linear(both, "down.2", 2304, 768, false);
    let x = net.map(Scalar::Add, &[x, y], "residual.2");
    let x = net.norm(NormKind::Rms, x, "norm.3", 768);
    let y = net.linear(x, "widen.3", 768, 3000, true);
    net.output("widened", y);
    let y = net.linear(x, "head.4", 768, 12_000, false);
    net.output("logits", y);
    net.graph
}

const SMALL: Sizes =
    Sizes { layers: 1, width: 1024, heads: 8, kv_heads: 2, head: 128, hidden: 4096, vocabulary: 32_000 };

fn models() -> Vec<(&'static str, Graph, Vec<Entry>)> {
    let decode = entry("decode", &[("batch", 1), ("seq", 1), ("past", 2048)]);
    let prefill = entry("prefill", &[("batch", 4), ("seq", 512), ("past", 1)]);
    let images = entry("images", &[("batch", 64)]);
    let three = Sizes { heads: 6, kv_heads: 3, ..SMALL };
    vec![
        ("llama-1", llama(SMALL, DType::BF16), vec![decode.clone(), prefill.clone()]),
        ("llama-2", llama(Sizes { layers: 2, ..SMALL }, DType::BF16), vec![decode.clone()]),
        ("llama-1 6:3", llama(three, DType::BF16), vec![prefill.clone()]),
        ("gpt2-1 tied", gpt2(SMALL, DType::BF16), vec![prefill]),
        ("mixed", mixed(), vec![images.clone()]),
        ("resnet", resnet(96, 1000), vec![images]),
    ]
}

/// The same graph with every price times something between a half and two.
fn perturbed(graph: &LayoutGraph, seed: u64) -> LayoutGraph {
    let mut random = Random(seed);
    let mut change = |cost: &mut Cost| {
        let picoseconds = cost.picoseconds() / 1000 * random.range(500, 2000);
        *cost = Cost::local(picoseconds as f64 * 1e-12);
    };
    let mut graph = graph.clone();
    for group in &mut graph.groups {
        group.productions.iter_mut().for_each(|p| change(&mut p.cost));
        group.conversions.iter_mut().for_each(|e| change(&mut e.cost));
        group.exits.iter_mut().for_each(|e| change(&mut e.cost));
    }
    graph
}

fn list(items: impl Iterator<Item = String>) -> String {
    format!("[{}]", items.collect::<Vec<_>>().join(","))
}

fn json(graph: &LayoutGraph) -> String {
    let cost = |c: Cost| c.picoseconds();
    let operands = |all: &[Operand]| list(all.iter().map(|o| format!("[{},{}]", o.group, o.slot)));
    let groups = graph.groups.iter().enumerate().map(|(index, group)| {
        let productions = group
            .productions
            .iter()
            .map(|p| format!("[{},{},{},{}]", p.out, cost(p.cost), p.bytes, operands(&p.operands)));
        let conversions = group.conversions.iter().map(|e| format!("[{},{},{}]", e.from, e.to, cost(e.cost)));
        let exits = group.exits.iter().map(|e| format!("[{},{},{}]", e.slot, cost(e.cost), operands(&e.also)));
        format!(
            r#"{{"planned":{},"stored":{},"single":{},"slots":{},"productions":{},"conversions":{},"exits":{}}}"#,
            graph.is_planned(index as u32),
            group.kind == tpshard_passes::layout_graph::GroupKind::Stored,
            group.single,
            group.slots(),
            list(productions),
            list(conversions),
            list(exits),
        )
    });
    list(groups)
}

fn line(name: &str, kind: &str, graphs: &[LayoutGraph], found: &Extraction) -> String {
    let budget = found.budget.map_or("null".to_owned(), |b| b.to_string());
    let least = if kind == "single" { found.least_bytes.to_string() } else { "null".into() };
    format!(
        "{{\"name\":\"{name}\",\"kind\":\"{kind}\",\"exact\":{},\"budget\":{budget},\"least\":{least},\"cost\":{},\
         \"bound\":{},\"graphs\":{}}}\n",
        kind == "single",
        found.cost.picoseconds(),
        found.bound.picoseconds(),
        list(graphs.iter().map(json)),
    )
}

/// Entries side by side have many plans of nearly the same time; what is found within these limits is found soon.
const JOINT: Limits = Limits { states: 256, labels: 256 };

/// Writes all cases to `file`.
pub(crate) fn write(file: &Path) {
    let mut file = std::fs::File::create(file).unwrap();
    for (name, model, entries) in models() {
        for mesh in [vec![2], vec![3], vec![4], vec![2, 2]] {
            let mesh = Mesh(mesh);
            let graphs = layout_graphs(&model, &entries, &mesh);
            for seed in 0..6 {
                let change = |g: &LayoutGraph| if seed == 0 { g.clone() } else { perturbed(g, seed) };
                let graphs: Vec<LayoutGraph> = graphs.iter().map(change).collect();
                let prices = if seed == 0 { "true prices".to_owned() } else { format!("prices {seed}") };
                let free = extract(&graphs[0], Budget::Free, Limits::default()).unwrap();
                // Between the fewest bytes and those of the fastest plan.
                let middle = free.least_bytes + free.bytes.saturating_sub(free.least_bytes) / 2;
                for budget in [Budget::Free, Budget::Least, Budget::Bytes(middle)] {
                    let start = std::time::Instant::now();
                    let found = extract(&graphs[0], budget, Limits::default()).unwrap();
                    let what = match budget {
                        Budget::Free => "free",
                        Budget::Least => "least",
                        _ => "middle",
                    };
                    let name = format!("{name} on {mesh}, {prices}, {what}");
                    println!(
                        "{name}: {:?}, gap {}, {} of {} bytes",
                        start.elapsed(),
                        found.gap(),
                        found.bytes,
                        found.least_bytes
                    );
                    crate::replay(&graphs[0], &found).unwrap();
                    file.write_all(line(&name, "single", &graphs[..1], &found).as_bytes()).unwrap();
                    if graphs.len() > 1 && seed < 2 {
                        let start = std::time::Instant::now();
                        let found = extract_entries(&graphs, budget, JOINT).unwrap().total;
                        println!("  of all entries: {:?}, gap {}", start.elapsed(), found.gap());
                        file.write_all(line(&name, "joint", &graphs, &found).as_bytes()).unwrap();
                    }
                }
            }
        }
    }
}
