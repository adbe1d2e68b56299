//! What is split where there is a choice between two dims: experts or what is inside them, output or input channels.
//! Both are plans, both hold, and the sizes decide which is cheaper.

mod common;

use common::{Net, dim, entry, simulated};
use std::collections::BTreeMap;
use tpshard_ir::op::{Literal, Window};
use tpshard_ir::{AxisLayout, Bindings, DType, Dim, Graph, Op, Scalar, Tensor, ValueId};
use tpshard_passes::cost::Profile;
use tpshard_passes::extended::Extended;
use tpshard_passes::{MemoryGoal, Pin, PlanOptions, PlanReport, plan};

#[derive(Clone, Copy)]
struct Experts {
    tokens: usize,
    width: usize,
    count: usize,
    inner: usize,
    /// Per token.
    chosen: usize,
}

/// The router: indices `[tokens, chosen]` of the experts of each token, and their weights.
fn route(net: &mut Net, x: ValueId, sizes: Experts) -> (ValueId, ValueId) {
    let w = net.weight("router", &[sizes.width, sizes.count]);
    let scores = net.einsum("td,de->te", x, w, "router");
    let k = Dim::from(sizes.chosen);
    let indices = net.add(Op::TopK { axis: 1, k, largest: true }, &[scores], "top_k");
    let chosen = net.add(Op::GatherElements { axis: 1 }, &[scores, indices], "top_k");
    (indices, net.add(Op::Softmax { axis: 1 }, &[chosen], "weights"))
}

fn silu(net: &mut Net, x: ValueId) -> ValueId {
    let sigmoid = net.map(Scalar::Sigmoid, &[x], "act");
    net.map(Scalar::Mul, &[x, sigmoid], "act")
}

/// Every expert computes every token, and routing weights, most of them 0, choose.
fn stacked(sizes: Experts) -> Graph {
    let Experts { tokens, width, count, inner, .. } = sizes;
    let mut net = Net::new("stacked", DType::F32);
    let x = net.input("x", DType::F32, &[dim(tokens), dim(width)]);
    let (indices, weights) = route(&mut net, x, sizes);
    let zeros = Tensor::zeros(DType::F32, vec![tokens, count]).unwrap();
    let zeros = net.add(Op::Literal(Literal(std::sync::Arc::new(zeros))), &[], "zeros");
    let scatter = Op::ScatterElements { axis: 1, monoid: None };
    let weights = net.add(scatter, &[zeros, indices, weights], "scatter");
    let up = net.weight("up", &[count, width, inner]);
    let down = net.weight("down", &[count, inner, width]);
    let h = net.einsum("td,edf->tef", x, up, "up");
    let h = silu(&mut net, h);
    let y = net.einsum("tef,efd->ted", h, down, "down");
    let y = net.einsum("te,ted->td", weights, y, "combine");
    net.output("y", y);
    net.graph
}

/// The weights of the chosen experts are gathered per token.
fn gathered(sizes: Experts) -> Graph {
    let Experts { tokens, width, count, inner, .. } = sizes;
    let mut net = Net::new("gathered", DType::F32);
    let x = net.input("x", DType::F32, &[dim(tokens), dim(width)]);
    let (indices, weights) = route(&mut net, x, sizes);
    let of_tokens = |net: &mut Net, name: &str, shape: &[usize]| {
        let w = net.weight(name, shape);
        net.add(Op::Gather { axis: 0, window: None }, &[w, indices], name)
    };
    let up = of_tokens(&mut net, "up", &[count, width, inner]);
    let down = of_tokens(&mut net, "down", &[count, inner, width]);
    let h = net.einsum("td,tkdf->tkf", x, up, "up");
    let h = silu(&mut net, h);
    let y = net.einsum("tkf,tkfd->tkd", h, down, "down");
    let y = net.einsum("tk,tkd->td", weights, y, "combine");
    net.output("y", y);
    net.graph
}

/// A machine on which time is what is computed and read, and one on which it is mostly messages.
fn profiles() -> [Profile; 2] {
    let base = Profile::built_in("h100-sxm").unwrap();
    let cheap = common::with_link(&base.text, "base 1e-12 step 1e-12 bandwidth 1e15")
        .replace("memory_bandwidth = 3.35e12", "memory_bandwidth = 1e6")
        .replace("kernel_launch = 1.3e-6", "kernel_launch = 1e-9");
    [Profile::parse(&cheap).unwrap(), base]
}

/// Plans and compares with one rank; says by which dim each weight is split.
fn splits(graph: &Graph, options: &PlanOptions) -> (BTreeMap<String, Option<usize>>, PlanReport) {
    let plan = plan(Extended::new(graph.clone()), options).unwrap();
    simulated::assert_checked(&plan, graph);
    simulated::assert_exact(&plan, graph, &Bindings::new());
    let program = &plan.programs[0].1;
    let of_weight = |step: &tpshard_ir::Step| {
        let node = program.logical.node(step.value);
        let Op::Weight(expr) = &node.op else { return None };
        // Conversions follow what lies in memory.
        if step.kind != tpshard_ir::StepKind::Compute {
            return None;
        }
        let name = expr.initializers().into_iter().next()?.to_owned();
        Some((name, step.layout.0.first().and_then(AxisLayout::sharded_dim)))
    };
    (program.steps.iter().filter_map(of_weight).collect(), plan.report)
}

fn options(ranks: usize, profile: &Profile, memory: MemoryGoal) -> PlanOptions {
    let mut options = PlanOptions::new(ranks, profile.clone());
    options.entries = vec![entry("e", &[])];
    options.memory = memory;
    options
}

fn weight(graph: &Graph, name: &str) -> ValueId {
    let is_it = |op: &Op| matches!(op, Op::Weight(expr) if expr.initializers().contains(name));
    graph.values().find(|(_, node)| is_it(&node.op)).unwrap().0
}

/// Many experts on few ranks are dealt out evenly, 5 or 3 are not, and what is inside them is.
const MANY: Experts = Experts { tokens: 3, width: 5, count: 8, inner: 7, chosen: 2 };
const FEW: Experts = Experts { tokens: 3, width: 5, count: 3, inner: 8, chosen: 2 };

#[test]
fn stacked_and_gathered_experts_are_split_by_what_is_cheaper() {
    for model in [stacked, gathered] {
        for ranks in [2, 4] {
            for (sizes, up, down) in [(MANY, 0, 0), (FEW, 2, 1)] {
                let graph = model(sizes);
                for profile in profiles() {
                    let (found, report) = splits(&graph, &options(ranks, &profile, MemoryGoal::Least));
                    assert_eq!(
                        (found["up"], found["down"]),
                        (Some(up), Some(down)),
                        "{}{report}",
                        graph.name
                    );
                }
            }
        }
    }
}

/// The plan that stores these weights split along these dims.
fn pinned(graph: &Graph, mut options: PlanOptions, pins: [(&str, usize); 2]) -> PlanReport {
    let pin =
        |(name, dim): (&str, usize)| Pin { value: weight(graph, name), dim: Some(dim), name: name.into() };
    options.pins = pins.map(pin).to_vec();
    let (found, report) = splits(graph, &options);
    pins.iter().for_each(|&(name, dim)| assert_eq!(found[name], Some(dim), "{name} {report}"));
    report
}

/// Both have their price, the sizes say which is lower, and the best plan is no dearer than either.
#[test]
fn by_expert_and_inside_experts_are_both_priced() {
    let [cheap, dear] = profiles();
    for ranks in [2, 4] {
        for (sizes, experts_pay) in [(MANY, true), (FEW, false)] {
            let graph = stacked(sizes);
            let options = options(ranks, &cheap, MemoryGoal::Free);
            let by_expert = pinned(&graph, options.clone(), [("up", 0), ("down", 0)]).seconds;
            let inside = pinned(&graph, options.clone(), [("up", 2), ("down", 1)]).seconds;
            assert_eq!(by_expert < inside, experts_pay, "{ranks} ranks: {by_expert} or {inside}");
            let best = splits(&graph, &options).1.seconds;
            assert!(best <= by_expert.min(inside), "{best}");
        }
        // What is gathered per token can also be dealt out by token and choice. By expert every rank would compute all of
        // it, most of it zeros.
        let (found, report) = splits(&gathered(MANY), &options(ranks, &cheap, MemoryGoal::Free));
        assert_ne!((found["up"], found["down"]), (Some(0), Some(0)), "{report}");
        // Where messages are dear and there is room, nothing is split.
        let (found, report) = splits(&stacked(MANY), &options(ranks, &dear, MemoryGoal::Free));
        assert!(found.values().all(Option::is_none), "{report}");
    }
}

/// What is not the cheapest holds all the same.
#[test]
fn any_split_of_experts_can_be_asked_for() {
    for model in [stacked, gathered] {
        for (sizes, up, down) in [(MANY, 2, 1), (FEW, 0, 0), (FEW, 0, 1), (FEW, 1, 2)] {
            let graph = model(sizes);
            for ranks in [2, 4] {
                let options = options(ranks, &profiles()[0], MemoryGoal::Free);
                let best = splits(&graph, &options).1;
                let report = pinned(&graph, options, [("up", up), ("down", down)]);
                assert!(report.seconds >= best.seconds, "{best}{report}");
            }
        }
    }
}

/// Two convolutions after each other, `from` to `inner` to `to` channels, the first in groups.
fn convolutions(from: usize, inner: usize, to: usize, groups: usize) -> Graph {
    let mut net = Net::new("convolutions", DType::F32);
    let image = net.input("image", DType::F32, &[dim(2), dim(from), dim(6), dim(6)]);
    let window = |k: usize| Window {
        kernel: vec![k; 2],
        strides: vec![1; 2],
        dilations: vec![1; 2],
        pads_low: vec![k / 2; 2],
        pads_high: vec![k / 2; 2],
        ceil: false,
    };
    let w = net.weight("first", &[inner, from / groups, 3, 3]);
    let y = net.add(Op::Conv { window: window(3), groups }, &[image, w], "first");
    let y = net.map(Scalar::Tanh, &[y], "act");
    let w = net.weight("second", &[to, inner, 3, 3]);
    let y = net.add(Op::Conv { window: window(3), groups: 1 }, &[y, w], "second");
    net.output("y", y);
    net.graph
}

/// Column then row, for channels: the first is split by output, the second by input channels, and one all-reduce ends
/// the pair.
#[test]
fn convolutions_are_split_by_output_and_then_input_channels() {
    for ranks in [2, 3, 4] {
        let graph = convolutions(3, 12, 5, 1);
        let (found, report) = splits(&graph, &options(ranks, &profiles()[1], MemoryGoal::Least));
        assert_eq!((found["first"], found["second"]), (Some(0), Some(1)), "{report}");
        let kinds: Vec<&str> = report.collectives().map(|c| c.kind).collect();
        assert_eq!(kinds, ["all_reduce"], "{report}");
    }
}

/// Where the sum is larger than what is summed, output channels are dealt out twice.
#[test]
fn a_wide_result_is_split_by_output_channels_twice() {
    for ranks in [2, 4] {
        let graph = convolutions(3, 4, 64, 1);
        let profile = Profile::built_in("h100-sxm").unwrap();
        let narrow = common::with_link(&profile.text, "base 1e-9 step 1e-9 bandwidth 1e9");
        let profile = Profile::parse(&narrow).unwrap();
        let (found, report) = splits(&graph, &options(ranks, &profile, MemoryGoal::Least));
        assert_eq!((found["first"], found["second"]), (Some(0), Some(0)), "{report}");
        assert!(report.collectives().all(|c| c.kind == "all_gather"), "{report}");
    }
}

/// Groups are dealt out whole, each with its channels; depthwise convolutions are groups of one channel.
#[test]
fn grouped_and_depthwise_convolutions_are_split_by_groups() {
    for (from, inner, groups, ranks) in
        [(6, 6, 6, 2), (6, 6, 6, 3), (12, 24, 12, 4), (8, 8, 4, 2), (8, 8, 4, 4), (6, 6, 3, 3)]
    {
        let graph = convolutions(from, inner, 4, groups);
        let [cheap, dear] = profiles();
        let (found, report) = splits(&graph, &options(ranks, &dear, MemoryGoal::Least));
        assert_eq!((found["first"], found["second"]), (Some(0), Some(1)), "{report}");
        assert_eq!(report.collectives().count(), 1, "{report}");
        let (found, report) = splits(&graph, &options(ranks, &cheap, MemoryGoal::Least));
        assert_eq!(found["first"], Some(0), "{report}");
    }
}

/// Either split can be asked for, also where ranks do not divide channels or groups.
#[test]
fn both_splits_of_a_convolution_hold() {
    for (first, second) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        for ranks in [2, 3, 5] {
            for (from, inner, groups) in [(3, 7, 1), (10, 5, 5), (10, 10, 5), (4, 6, 2)] {
                let graph = convolutions(from, inner, 5, groups);
                let options = options(ranks, &profiles()[0], MemoryGoal::Free);
                pinned(&graph, options, [("first", first), ("second", second)]);
            }
        }
    }
}
