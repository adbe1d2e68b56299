//! Several graphs of one model: one plan, one layout for what they share, and programs that compute what each says.

mod common;

use common::simulated::{assert_checked, assert_exact};
use common::{Sizes, entry, gpt2, llama};
use std::collections::{BTreeMap, BTreeSet};
use tpshard_ir::{Bindings, Case, DType, Dim, Graph, Layout, Op, StepKind, Type, ValueId, verify};
use tpshard_passes::cost::Profile;
use tpshard_passes::extended::Extended;
use tpshard_passes::extract::ExtractError;
use tpshard_passes::{CasePlanning, Entry, MemoryGoal, Plan, PlanError, PlanOptions, plan, plan_cases};

const SMALL: Sizes =
    Sizes { layers: 2, width: 24, heads: 6, kv_heads: 3, head: 4, hidden: 32, vocabulary: 40 };
const LARGE: Sizes =
    Sizes { layers: 2, width: 1024, heads: 8, kv_heads: 8, head: 128, hidden: 4096, vocabulary: 8000 };

fn with_case(mut graph: Graph, value: bool) -> Graph {
    let ty = Type::new(DType::Bool, vec![Dim::constant(1)]);
    graph.input("cached", ty.clone());
    graph.cases.push(Case { input: "cached".into(), ty, value });
    verify(graph).unwrap().into_inner()
}

/// The decoder without its past: what was appended is all there is.
fn begins(graph: &Graph) -> Graph {
    let without = |name: &str| (name == "past").then(|| Dim::constant(0));
    let mut begins = Graph::new(&graph.name);
    let mut names: Vec<ValueId> = Vec::new();
    for (_, node) in graph.values() {
        let mut node = node.clone();
        node.args.iter_mut().for_each(|a| *a = names[a.index()]);
        if matches!(node.op, Op::Append { .. }) {
            names.push(node.args[1]);
            continue;
        }
        let is_past = matches!(&node.op, Op::Input { name } if name.starts_with("past"));
        if !is_past {
            node.ty.shape.iter_mut().for_each(|d| *d = d.substitute(&without));
            node.op.for_each_dim_mut(&|d| *d = d.substitute(&without));
        }
        names.push(begins.push(node));
    }
    begins.outputs = graph.outputs.clone();
    begins.outputs.iter_mut().for_each(|output| output.value = names[output.value.index()]);
    (begins.states, begins.symbols) = (graph.states.clone(), graph.symbols.clone());
    begins
}

fn both(sizes: Sizes, dtype: DType) -> [Graph; 2] {
    let grows = llama(sizes, dtype);
    let begins = begins(&grows);
    [with_case(grows, true), with_case(begins, false)]
}

fn planning(graph: &Graph, entry: Entry) -> CasePlanning {
    let mut extended = Extended::new(graph.clone());
    tpshard_passes::canonical::canonicalise(&mut extended);
    CasePlanning { extended, entries: vec![entry], pins: Vec::new() }
}

fn cases(graphs: &[Graph; 2], seq: i64, past: i64) -> [CasePlanning; 2] {
    let sizes = |seq| [("batch", 1), ("seq", seq), ("past", past)];
    [planning(&graphs[0], entry("step", &sizes(1))), planning(&graphs[1], entry("prompt", &sizes(seq)))]
}

fn options(ranks: usize, memory: MemoryGoal) -> PlanOptions {
    let mut options = PlanOptions::new(ranks, Profile::built_in("h100-sxm").unwrap());
    options.memory = memory;
    options
}

/// The layouts in which a plan has weights and state in memory.
fn layouts(plan: &Plan) -> BTreeMap<String, BTreeSet<Layout>> {
    let mut found: BTreeMap<String, BTreeSet<Layout>> = BTreeMap::new();
    for (_, program) in &plan.programs {
        for step in program.steps.iter().filter(|step| step.kind == StepKind::Compute) {
            let node = program.logical.node(step.value);
            let name = match &node.op {
                Op::Weight(expression) => expression.to_string(),
                Op::Input { name } if name.starts_with("past") => name.to_string(),
                _ => continue,
            };
            // Vectors are whole, and cut where they are needed.
            if node.ty.rank() > 1 {
                found.entry(name).or_default().insert(step.layout.clone());
            }
        }
    }
    found
}

#[test]
fn graphs_compute_what_they_say_and_share_what_lies_in_memory() {
    for ranks in [1, 2, 3, 4] {
        for memory in [MemoryGoal::Least, MemoryGoal::Free] {
            let graphs = both(SMALL, DType::F32);
            let plan = plan_cases(&cases(&graphs, 4, 3), &options(ranks, memory)).unwrap();
            let names: Vec<&str> = plan.programs.iter().map(|(name, _)| name.as_str()).collect();
            assert_eq!(names, ["step", "prompt"]);
            let sizes: Bindings = [("batch", 2), ("seq", 3), ("past", 2)]
                .map(|(name, size)| (name.into(), size))
                .into_iter()
                .collect();
            for (graph, program) in graphs.iter().zip(&plan.programs) {
                let one = Plan { programs: vec![program.clone()], report: plan.report.clone(), cuts: vec![] };
                assert_checked(&one, graph);
                assert_exact(&one, graph, &sizes);
                // The past that nothing reads has its place in the program, too.
                let pasts = graph.states.len();
                let read = program.1.steps.iter().filter(|step| {
                    let node = program.1.logical.node(step.value);
                    matches!(&node.op, Op::Input { name } if name.starts_with("past"))
                });
                assert_eq!(read.filter(|step| step.kind == StepKind::Compute).count(), pasts);
            }
            for (name, layouts) in layouts(&plan) {
                assert_eq!(layouts.len(), 1, "{name}: {layouts:?}\n{}", plan.report);
            }
        }
    }
}

#[test]
fn the_gap_is_measured_against_the_graphs_alone() {
    let graphs = both(LARGE, DType::BF16);
    let options = options(4, MemoryGoal::Least);
    let cases = cases(&graphs, 512, 2048);
    let found = plan_cases(&cases, &options).unwrap().report;
    let alone = |case: &CasePlanning| {
        let options = PlanOptions { entries: case.entries.clone(), ..options.clone() };
        plan(case.extended.clone(), &options).unwrap().report
    };
    let [step, prompt] = [alone(&cases[0]), alone(&cases[1])];
    let bound = (step.seconds / (1.0 + step.gap) + prompt.seconds / (1.0 + prompt.gap)) / 2.0;
    assert!(found.seconds >= bound, "{found}");
    assert!((found.gap - (found.seconds - bound) / bound).abs() < 1e-9, "{found}");
    assert!(found.gap < 0.02, "{found}");
    assert!(found.graphs.iter().all(|graph| graph.gap < 1e-4), "{found}");
    assert_eq!(found.graphs.iter().filter(|graph| graph.first).count(), 1);
    // Both graphs read the same, so memory is that of one of them.
    assert_eq!(found.weight_bytes, step.weight_bytes);
    assert_eq!(found.state_bytes, step.state_bytes);
    assert_eq!(found.bytes_alone, step.bytes_alone);
    let sum: f64 = found.entries.iter().map(|e| 0.5 * e.parts.total()).sum();
    assert!((sum - found.seconds).abs() < 1e-4 * sum, "{found}");
}

#[test]
fn one_graph_is_planned_as_ever_and_a_budget_is_for_all() {
    let graphs = both(LARGE, DType::BF16);
    let cases = cases(&graphs, 16, 128);
    let one = plan_cases(&cases[..1], &options(2, MemoryGoal::Least)).unwrap();
    let entries = cases[0].entries.clone();
    let same =
        plan(cases[0].extended.clone(), &PlanOptions { entries, ..options(2, MemoryGoal::Least) }).unwrap();
    assert_eq!(one, same);
    assert!(one.report.graphs.is_empty());
    let all = plan_cases(&cases, &options(2, MemoryGoal::Least)).unwrap().report;
    let needed = all.weight_bytes + all.state_bytes + all.activation_bytes;
    let fits = plan_cases(&cases, &options(2, MemoryGoal::Bytes(needed + needed / 50))).unwrap().report;
    assert!(fits.weight_bytes + fits.state_bytes + fits.activation_bytes <= needed + needed / 50, "{fits}");
    let error = plan_cases(&cases, &options(2, MemoryGoal::Bytes(needed / 2))).unwrap_err();
    assert!(matches!(error, PlanError::Extract(ExtractError::Budget { .. })), "{error}");
    assert!(matches!(plan_cases(&[], &options(2, MemoryGoal::Free)), Err(PlanError::NoEntry)));
}

#[test]
fn a_weight_lies_there_in_one_form() {
    // Its projections can be read whole or as three slices, and which is faster depends on the length.
    let graphs = [true, false].map(|value| with_case(gpt2(LARGE, DType::BF16), value));
    for ranks in [1, 2] {
        let options = options(ranks, MemoryGoal::Free);
        let lengths = |a: i64, b: i64| {
            let sized = |name, seq| entry(name, &[("batch", 1), ("seq", seq)]);
            [planning(&graphs[0], sized("short", a)), planning(&graphs[1], sized("long", b))]
        };
        let found = plan_cases(&lengths(1, 2048), &options).unwrap();
        let alone = plan_cases(&lengths(1, 2048)[..1], &options).unwrap();
        let mut forms: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (index, (_, program)) in found.programs.iter().enumerate() {
            assert_checked(
                &Plan {
                    programs: vec![found.programs[index].clone()],
                    report: found.report.clone(),
                    cuts: vec![],
                },
                &graphs[index],
            );
            for step in &program.steps {
                if let Op::Weight(expression) = &program.logical.node(step.value).op {
                    for name in expression.initializers() {
                        forms.entry(name.to_owned()).or_default().insert(expression.to_string());
                    }
                }
            }
        }
        assert!(forms.values().any(|forms| forms.len() == 3), "nothing was sliced: {forms:?}");
        assert_eq!(found.report.weight_bytes, alone.report.weight_bytes, "{}", found.report);
    }
}
