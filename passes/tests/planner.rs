//! Plans of known models come out as people know them.

mod common;

use common::{LLAMA_8B, Sizes, decode, llama};
use tpshard_ir::op::NormKind;
use tpshard_ir::{DType, Op};
use tpshard_passes::cost::Profile;
use tpshard_passes::extended::Extended;
use tpshard_passes::extract::ExtractError;
use tpshard_passes::fit;
use tpshard_passes::report::Verdict;
use tpshard_passes::{Entry, MemoryGoal, Pin, PinError, Plan, PlanError, PlanOptions, PlanReport, plan};

fn options(ranks: usize, profile: &str) -> PlanOptions {
    let mut options = PlanOptions::new(ranks, Profile::built_in(profile).unwrap());
    options.entries = vec![decode()];
    options.memory = MemoryGoal::Least;
    options
}

fn plan_llama(layers: usize, ranks: usize) -> Plan {
    let graph = llama(Sizes { layers, ..LLAMA_8B }, DType::BF16);
    plan(Extended::new(graph), &options(ranks, "h100-sxm")).unwrap()
}

#[test]
fn llama_decodes_with_two_all_reduces_per_layer() {
    for layers in [2, 12, 32] {
        for ranks in [2, 4] {
            let report = plan_llama(layers, ranks).report;
            let inside: Vec<_> =
                report.collectives().filter(|c| c.origin.starts_with("model.layers.")).collect();
            assert_eq!(inside.len(), 2 * layers, "{report}");
            assert!(inside.iter().all(|c| c.kind == "all_reduce"), "{report}");
            for kind in report.stored.iter().filter(|k| k.name.contains("proj") || k.is_state) {
                assert!(!kind.layout.is_replicated(), "{report}");
            }
            assert!(report.gap < 1e-4, "{report}");
        }
    }
}

/// Seconds of the report are the weighted sum of its parts, and the parts are those that plans were compared by: else
/// the bound, which comes from the search, would be off.
/// Layers that are alike are collapsed: what is searched does not grow with their number.
#[test]
fn alike_layers_are_searched_once() {
    let (few, many) = (plan_llama(12, 8).report.counters, plan_llama(96, 8).report.counters);
    assert!(many.sizes.classes > 7 * few.sizes.classes, "{many:?}");
    assert_eq!(many.distinct, few.distinct);
    assert!(many.effort.states < 2 * few.effort.states, "{few:?} {many:?}");
    assert!(many.effort.labels < 2 * few.effort.labels, "{few:?} {many:?}");
}

fn assert_adds_up(report: &PlanReport) {
    let total: f64 = report.entries.iter().map(|e| e.entry.weight).sum();
    let sum: f64 = report.entries.iter().map(|e| e.entry.weight / total * e.parts.total()).sum();
    assert!((sum - report.seconds).abs() <= 1e-4 * sum, "{sum} {report}");
    let carried: f64 = report.collectives().map(|c| c.seconds).sum();
    let communication: f64 = report.entries.iter().map(|e| e.parts.communication).sum();
    assert!(carried <= communication * (1.0 + 1e-9), "{report}");
    assert!(report.gap < 1e-4, "{report}");
}

fn prefill(seq: i64) -> Entry {
    common::entry("prefill", &[("batch", 1), ("seq", seq), ("past", 0)])
}

#[test]
fn predicted_time_is_the_sum_of_its_parts() {
    let graph = || Extended::new(llama(Sizes { layers: 2, ..LLAMA_8B }, DType::BF16));
    for ranks in [1, 2, 4] {
        for entries in [vec![decode()], vec![prefill(2048)], vec![decode(), prefill(512)]] {
            let mut options = options(ranks, "h100-sxm");
            options.entries = entries;
            assert_adds_up(&plan(graph(), &options).unwrap().report);
        }
    }
}

#[test]
fn entries_share_weights_and_state_and_nothing_else() {
    let graph = || Extended::new(llama(Sizes { layers: 2, ..LLAMA_8B }, DType::BF16));
    let mut options = options(4, "h100-sxm");
    options.entries = vec![decode(), prefill(8192)];
    let joint = plan(graph(), &options).unwrap();
    let stored = |program: &tpshard_ir::Spmd| -> std::collections::BTreeSet<String> {
        let is_stored = |op: &Op| matches!(op, Op::Weight(_)) || matches!(op, Op::Input { .. });
        program
            .steps
            .iter()
            .filter(|s| {
                s.kind == tpshard_ir::StepKind::Compute && is_stored(&program.logical.node(s.value).op)
            })
            .filter(|s| program.logical.ty(s.value).rank() > 1)
            .map(|s| format!("{:?} {}", program.logical.node(s.value).op, s.layout))
            .collect()
    };
    let (a, b) = (stored(&joint.programs[0].1), stored(&joint.programs[1].1));
    assert_eq!(a, b, "{}", joint.report);
    // Decoding wants all-reduces, long prefill reduce-scatters and all-gathers around norms that stay split.
    let kinds = |entry: usize| -> std::collections::BTreeSet<&str> {
        joint.report.entries[entry].collectives.iter().map(|c| c.kind).collect()
    };
    assert!(kinds(0).contains("all_reduce"), "{}", joint.report);
    assert!(kinds(1).contains("reduce_scatter"), "{}", joint.report);
    // No entry alone is better served than by its own plan, and together they cost at least what both cost apart.
    let alone: f64 = (0..2)
        .map(|entry| {
            let mut options = options.clone();
            options.entries = vec![options.entries[entry].clone()];
            plan(graph(), &options).unwrap().report.seconds
        })
        .sum();
    assert!(joint.report.seconds * 2.0 >= alone * (1.0 - 1e-6), "{} {alone}", joint.report);
    for (_, program) in &joint.programs {
        tpshard_checker::check(program, &llama(Sizes { layers: 2, ..LLAMA_8B }, DType::BF16)).unwrap();
    }
}

#[test]
fn norm_stays_split_over_the_hidden_dim_where_links_are_cheap() {
    let profile = Profile::built_in("h100-sxm").unwrap();
    // All but no latency, and little bandwidth: two numbers per row are cheap, whole rows are not.
    let text = common::with_link(&profile.text, "base 1e-9 step 1e-9 bandwidth 1e9");
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
    let inside: Vec<_> = report.collectives().filter(|c| c.origin == "norm").collect();
    assert_eq!(inside.len(), 2, "the mean and the variance\n{report}");
    assert!(inside.iter().all(|c| c.kind == "all_reduce" && c.payload == 2048 * 4), "{report}");
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
fn a_budget_holds_with_activations_or_says_what_would_fit() {
    let extended = || Extended::new(llama(Sizes { layers: 2, ..LLAMA_8B }, DType::BF16));
    let mut options = options(2, "h100-sxm");
    options.entries = vec![common::entry("prefill", &[("batch", 4), ("seq", 256), ("past", 1)])];
    let least = fit::least_bytes(&extended(), &options).unwrap();
    let stored = plan(extended(), &options).unwrap().report;
    assert!(stored.activation_bytes > 0 && least > stored.weight_bytes + stored.state_bytes);
    for budget in [least, least + least / 10, 2 * least] {
        options.memory = MemoryGoal::Bytes(budget);
        let report = plan(extended(), &options).unwrap().report;
        let used = report.weight_bytes + report.state_bytes + report.activation_bytes;
        assert!(used <= budget, "{used} of {budget}\n{report}");
    }
    // Weights and state alone would fit, activations do not.
    let budget = stored.weight_bytes + stored.state_bytes + stored.activation_bytes / 2;
    options.memory = MemoryGoal::Bytes(budget);
    let error = plan(extended(), &options).unwrap_err();
    assert!(matches!(error, PlanError::Extract(ExtractError::Budget { .. })), "{error}");
    let ranks = fit::smallest_ranks(&extended(), &options, budget).unwrap().unwrap();
    let with = |ranks| fit::least_bytes(&extended(), &PlanOptions { ranks, ..options.clone() }).unwrap();
    assert!(with(ranks) <= budget && with(ranks - 1) > budget, "{ranks}");
    let seq = fit::largest_size(&extended(), &options, &"seq".into(), budget).unwrap().unwrap();
    let at = |seq| {
        let entries = vec![common::entry("prefill", &[("batch", 4), ("seq", seq), ("past", 1)])];
        fit::least_bytes(&extended(), &PlanOptions { entries, ..options.clone() }).unwrap()
    };
    assert!(at(seq) <= budget && at(seq + 1) > budget, "{seq}");
}

/// The value of the first weight whose name ends like this.
fn weight_named(graph: &tpshard_ir::Graph, end: &str) -> tpshard_ir::ValueId {
    let is_it = |op: &Op| match op {
        Op::Weight(w) => w.initializers().iter().any(|n| n.ends_with(end)),
        _ => false,
    };
    graph.values().find(|(_, n)| is_it(&n.op)).unwrap().0
}

#[test]
fn pins_are_kept_priced_and_refused_where_they_cannot_be() {
    let graph = || llama(Sizes { layers: 2, ..LLAMA_8B }, DType::BF16);
    let base = graph();
    let down = weight_named(&base, "layers.0.mlp.down_proj.weight");
    let best = plan(Extended::new(graph()), &options(2, "h100-sxm")).unwrap().report;
    let pinned = |value, dim| {
        let mut options = options(2, "h100-sxm");
        options.pins = vec![Pin { value, dim, name: "it".into() }];
        plan(Extended::new(graph()), &options)
    };
    let held = |plan: &Plan| {
        let program = &plan.programs[0].1;
        program.steps.iter().find(|s| s.value == down).unwrap().layout.to_string()
    };
    let same = pinned(down, Some(0)).unwrap();
    assert_eq!(same.report.seconds, best.seconds);
    let other = pinned(down, Some(1)).unwrap();
    assert_eq!(held(&other), "S(1)");
    assert!(other.report.seconds > best.seconds, "{}", other.report);
    tpshard_checker::check(&other.programs[0].1, &base).unwrap();
    // A computed value: the result of the projection is made whole, or cut along the hidden dim.
    let (result, _) = base.values().find(|(_, n)| n.args.contains(&down)).unwrap();
    for dim in [None, Some(2)] {
        let plan = pinned(result, dim).unwrap();
        let steps = &plan.programs[0].1.steps;
        let kinds: Vec<String> =
            steps.iter().filter(|s| s.value == result).map(|s| s.layout.to_string()).collect();
        let wanted = dim.map_or("R".to_owned(), |d| format!("S({d})"));
        let first_whole = kinds.iter().find(|k| !k.starts_with('P')).unwrap();
        assert_eq!(*first_whole, wanted, "{kinds:?}");
    }
    assert!(matches!(pinned(down, Some(5)), Err(PlanError::Pin(PinError::Layout { .. }))));
    let (ids, ..) = base.inputs().next().unwrap();
    assert!(matches!(pinned(ids, Some(0)), Err(PlanError::Pin(PinError::Whole { .. }))));
    let mut both = options(2, "h100-sxm");
    both.pins = [Some(0), Some(1)].map(|dim| Pin { value: down, dim, name: format!("{dim:?}") }).to_vec();
    let error = plan(Extended::new(graph()), &both).unwrap_err();
    assert!(matches!(error, PlanError::Pin(PinError::Contradiction { .. })), "{error}");
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
    assert!(report.collectives().count() == 0);
}

/// What a weight is dequantised with is there before anything runs on every rank, also where one number is the zero point of
/// all blocks: else it would be dequantised in every step.
#[test]
fn zero_points_of_split_weights_are_constants() {
    let (depth, width, block) = (256usize, 512usize, 32usize);
    let mut graph = tpshard_ir::Graph::new("quantised");
    let shape = |dims: &[usize]| dims.iter().map(|&d| d.into()).collect::<Vec<tpshard_ir::Dim>>();
    let weight = |graph: &mut tpshard_ir::Graph, name: &str, dtype: DType, dims: &[usize]| {
        let expr = tpshard_ir::weight::WeightExpr::initializer(name, dtype, dims.to_vec()).unwrap();
        graph.add(Op::Weight(expr), &[]).unwrap()
    };
    let x = graph.input("x", tpshard_ir::Type::new(DType::F32, shape(&[1, depth])));
    let q = weight(&mut graph, "q", DType::U4, &[width, depth]);
    let scale = weight(&mut graph, "scale", DType::F32, &[width, depth / block]);
    let one = tpshard_ir::op::Literal(tpshard_ir::Tensor::scalar(8u8).into());
    let one = graph.add(Op::Literal(one), &[]).unwrap();
    let zero = graph.add(Op::Broadcast { shape: shape(&[width, depth / block]) }, &[one]).unwrap();
    let w = graph.add(Op::Dequant { axis: 1, block }, &[q, scale, zero]).unwrap();
    let spec = tpshard_ir::op::EinsumSpec::parse("ik,nk->in").unwrap();
    let y = graph.add(Op::Einsum(spec), &[x, w]).unwrap();
    graph.outputs.push(tpshard_ir::Output { name: "y".into(), value: y });
    let plan = plan(Extended::new(graph.clone()), &options(2, "h100-sxm")).unwrap();
    let program = &plan.programs[0].1;
    tpshard_checker::check(program, &graph).unwrap();
    for rank in 0..2 {
        let local = tpshard_ir::spmd::instantiate(program, rank).unwrap();
        let constant = tpshard_ir::program::lower(&local).constant_values(&local);
        let widened = local.values().find(|(_, node)| matches!(node.op, Op::Dequant { .. })).unwrap();
        assert_eq!(widened.1.ty.elements().as_size(), Some(width * depth / 2), "it is split");
        assert!(constant[widened.0.index()], "rank {rank}: {}", tpshard_ir::text::print_graph(&local));
    }
}
