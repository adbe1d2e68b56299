//! A right program passes; every way of making it wrong is found, and the finding names the place.

use std::sync::Arc;
use tpshard_checker::{Finding, Report, check, check_ranks};
use tpshard_ir::op::{EinsumSpec, Literal, TableWindow};
use tpshard_ir::spmd::instantiate;
use tpshard_ir::weight::WeightExpr;
use tpshard_ir::{
    AxisLayout, Conversion, DType, Dim, Equation, Graph, Layout, Mesh, Monoid, Op, Output, Scalar, Spmd,
    SpmdOutput, Step, StepId, StepKind, SymbolRange, Tensor, Type, ValueId,
};

fn weight(name: &str, shape: &[usize]) -> Op {
    Op::Weight(WeightExpr::initializer(name, DType::F32, shape.to_vec()).unwrap())
}

fn einsum(text: &str) -> Op {
    Op::Einsum(EinsumSpec::parse(text).unwrap())
}

/// `h = table[ids]; out = h + (exp(h w1) w2) * 2`.
fn model() -> (Graph, [ValueId; 10]) {
    let mut g = Graph::new("model");
    g.symbols.insert("s".into(), SymbolRange { low: 1, high: 100 });
    let ids = g.input("ids", Type::new(DType::I64, vec![Dim::symbol("s")]));
    let table = g.add(weight("table", &[10, 6]), &[]).unwrap();
    let h = g.add(Op::Gather { axis: 0, window: None }, &[table, ids]).unwrap();
    let w1 = g.add(weight("w1", &[6, 8]), &[]).unwrap();
    let up = g.add(einsum("sk,kn->sn"), &[h, w1]).unwrap();
    let exp = g.add(Op::Map(Scalar::Exp), &[up]).unwrap();
    let w2 = g.add(weight("w2", &[8, 6]), &[]).unwrap();
    let down = g.add(einsum("sk,kn->sn"), &[exp, w2]).unwrap();
    let two = g.add(Op::Literal(Literal(Arc::new(Tensor::scalar(2f32)))), &[]).unwrap();
    let scaled = g.add(Op::Map(Scalar::Mul), &[down, two]).unwrap();
    let out = g.add(Op::Map(Scalar::Add), &[h, scaled]).unwrap();
    g.outputs.push(Output { name: "out".into(), value: out });
    (g, [ids, table, h, w1, up, exp, w2, two, scaled, out])
}

const R: AxisLayout = AxisLayout::Replicated;
const P: AxisLayout = AxisLayout::Partial(Monoid::Sum);

fn s(dim: usize, unit: usize) -> AxisLayout {
    AxisLayout::shard(dim, unit)
}

/// The model on two ranks, the factor 2 moved in front of the second product.
fn program() -> Spmd {
    let (imported, [ids, table, h, w1, up, exp, w2, two, scaled, out]) = model();
    let mut logical = imported.clone();
    let early = logical.add(Op::Map(Scalar::Mul), &[exp, two]).unwrap();
    let moved = logical.add(einsum("sk,kn->sn"), &[early, w2]).unwrap();
    let mut steps: Vec<Step> = Vec::new();
    let mut step = |value: ValueId, layout: AxisLayout, conversion: Option<Conversion>, args: &[u32]| {
        let kind = conversion.map_or(StepKind::Compute, StepKind::Convert);
        let args = args.iter().map(|&a| StepId(a)).collect();
        steps.push(Step { value, layout: Layout(vec![layout]), kind, args });
    };
    let all = vec![0];
    let unit = Dim::constant(1);
    step(ids, R, None, &[]);
    step(table, s(0, 1), None, &[]);
    step(h, P, None, &[1, 0]);
    step(h, R, Some(Conversion::AllReduce { axes: all.clone(), monoid: Monoid::Sum }), &[2]);
    step(w1, s(1, 1), None, &[]);
    step(up, s(1, 1), None, &[3, 4]);
    step(exp, s(1, 1), None, &[5]);
    step(two, R, None, &[]);
    step(early, s(1, 1), None, &[6, 7]);
    step(w2, s(0, 1), None, &[]);
    step(moved, P, None, &[8, 9]);
    let scatter =
        Conversion::ReduceScatter { axes: all.clone(), monoid: Monoid::Sum, dim: 0, unit: unit.clone() };
    step(moved, s(0, 1), Some(scatter), &[10]);
    step(moved, R, Some(Conversion::AllGather { axes: all, dim: 0, unit }), &[11]);
    step(out, R, None, &[3, 12]);
    Spmd {
        mesh: Mesh::flat(2),
        imported: imported.len(),
        logical,
        equations: vec![Equation { rule: "scale through einsum".into(), left: scaled, right: moved }],
        steps,
        outputs: vec![SpmdOutput { name: "out".into(), step: StepId(13) }],
    }
}

fn locals(program: &Spmd) -> Vec<Graph> {
    (0..program.mesh.ranks()).map(|rank| instantiate(program, rank).unwrap()).collect()
}

/// The findings on a program with one change.
fn findings(change: impl Fn(&mut Spmd)) -> Vec<Finding> {
    let mut program = program();
    change(&mut program);
    check(&program, &model().0).expect_err("a wrong program passed")
}

/// The change is found in these steps.
fn found_in(steps: &[u32], change: impl Fn(&mut Spmd)) {
    let found = findings(change);
    let named: Vec<u32> = found
        .iter()
        .filter_map(|f| if let Finding::Step { step, .. } = f { Some(step.0) } else { None })
        .collect();
    assert_eq!(named, steps, "{found:?}");
}

fn local_findings(change: impl Fn(&mut Vec<Graph>)) -> Vec<(usize, u32)> {
    let program = program();
    let mut graphs = locals(&program);
    change(&mut graphs);
    let found = check_ranks(&program, &graphs).expect_err("wrong rank graphs passed");
    found
        .iter()
        .filter_map(|f| if let Finding::Rank { rank, step, .. } = f { Some((*rank, step.0)) } else { None })
        .collect()
}

/// A graph with the operation of one node replaced.
fn with_op(graph: &Graph, at: usize, op: Op) -> Graph {
    let mut changed = Graph::new(&graph.name);
    for (id, node) in graph.values() {
        let op = if id.index() == at { op.clone() } else { node.op.clone() };
        changed.push(tpshard_ir::Node { op, ..node.clone() });
    }
    changed.outputs.clone_from(&graph.outputs);
    changed
}

#[test]
fn the_right_program_passes() {
    let program = program();
    let report = check(&program, &model().0).unwrap_or_else(|e| panic!("{e:?}"));
    let expected = Report {
        values: 13,
        squares: 11,
        distinct_squares: 11,
        conversions: 3,
        equations: 1,
        executed_in_field: 1,
        ..Report::default()
    };
    assert_eq!(report, expected);
    let report = check_ranks(&program, &locals(&program)).unwrap_or_else(|e| panic!("{e:?}"));
    assert_eq!((report.ranks, report.collectives), (2, 3));
}

#[test]
fn wrong_layouts_are_found() {
    found_in(&[5, 6], |p| p.steps[5].layout = Layout(vec![R]));
    found_in(&[6, 8], |p| p.steps[6].layout = Layout(vec![s(0, 1)]));
    found_in(&[5, 6], |p| p.steps[5].layout = Layout(vec![P]));
    found_in(&[2], |p| p.steps[1].layout = Layout(vec![s(1, 1)]));
    found_in(&[2, 3], |p| p.steps[2].layout = Layout(vec![AxisLayout::Partial(Monoid::Max)]));
    found_in(&[10, 11], |p| p.steps[10].layout = Layout(vec![R]));
    found_in(&[6, 8], |p| p.steps[6].layout = Layout(vec![R, R]));
}

#[test]
fn wrong_units_and_dims_are_found() {
    found_in(&[9, 10], |p| p.steps[9].layout = Layout(vec![s(0, 3)]));
    found_in(&[10], |p| p.steps[9].layout = Layout(vec![s(0, 8)]));
    found_in(&[9, 10], |p| p.steps[9].layout = Layout(vec![s(2, 1)]));
    found_in(&[9, 10], |p| p.steps[9].layout = Layout(vec![s(0, 0)]));
    let other = AxisLayout::Shard { dim: 0, unit: Dim::symbol("s") };
    found_in(&[11, 12], move |p| p.steps[11].layout = Layout(vec![other.clone()]));
}

#[test]
fn dropped_and_wrong_conversions_are_found() {
    found_in(&[13], |p| p.steps[13].args[1] = StepId(10));
    found_in(&[13], |p| p.steps[13].args[1] = StepId(11));
    found_in(&[5], |p| p.steps[5].args[0] = StepId(2));
    let max = StepKind::Convert(Conversion::AllReduce { axes: vec![0], monoid: Monoid::Max });
    found_in(&[3], move |p| p.steps[3].kind = max.clone());
    let other = StepKind::Convert(Conversion::AllReduce { axes: vec![1], monoid: Monoid::Sum });
    found_in(&[3], move |p| p.steps[3].kind = other.clone());
    found_in(&[12], |p| p.steps[12].args[0] = StepId(3));
    found_in(&[11], |p| p.steps[11].kind = StepKind::Compute);
    found_in(&[8], |p| p.steps[8].args.swap(0, 1));
    found_in(&[8], |p| p.steps[8].args.truncate(1));
}

#[test]
fn illegal_equations_are_found() {
    let wrong = |right: u32| {
        move |p: &mut Spmd| {
            p.equations[0] = Equation { rule: "wrong".into(), left: ValueId(9), right: ValueId(right) }
        }
    };
    for right in [2, 7, 10] {
        let found = findings(wrong(right));
        assert!(
            matches!(&found[0], Finding::Equation { index: 0, rule, .. } if rule == "wrong"),
            "{right}: {found:?}"
        );
        // Without it the last sum has an operand that nothing says is right.
        assert!(matches!(&found[1], Finding::Step { step: StepId(13), .. }), "{found:?}");
    }
    found_in(&[13], |p| p.equations.clear());
}

#[test]
fn other_models_are_found() {
    let change = |change: &dyn Fn(&mut Graph)| {
        let (mut other, _) = model();
        change(&mut other);
        check(&program(), &other).expect_err("another model passed")
    };
    assert!(matches!(change(&|g| *g = with_op(g, 3, weight("other", &[6, 8])))[0], Finding::Program { .. }));
    let (g, _) = model();
    let mut renamed = with_op(&g, 3, weight("other", &[6, 8]));
    renamed.symbols.clone_from(&g.symbols);
    let found = check(&program(), &renamed).unwrap_err();
    assert!(matches!(found[0], Finding::Value { value: ValueId(3), .. }), "{found:?}");
    assert!(!change(&|g| g.outputs.clear()).is_empty());
    assert!(!change(&|g| { g.symbols.clear() }).is_empty());
}

#[test]
fn wrong_outputs_are_found() {
    let is_output = |found: Vec<Finding>| assert!(matches!(&found[0], Finding::Output { .. }), "{found:?}");
    is_output(findings(|p| p.outputs[0].step = StepId(12)));
    is_output(findings(|p| p.outputs[0].name = "other".into()));
    is_output(findings(|p| p.outputs.clear()));
    // A partial family of the right value is not a result.
    let (g, _) = model();
    let mut partial = program();
    partial.logical.outputs[0].value = ValueId(2);
    partial.outputs[0].step = StepId(2);
    let mut other = g;
    other.outputs[0].value = ValueId(2);
    is_output(check(&partial, &other).unwrap_err());
}

#[test]
fn broken_references_are_found_before_they_are_used() {
    for change in [
        (|p| p.steps[5].args[0] = StepId(5)) as fn(&mut Spmd),
        |p| p.steps[5].args[0] = StepId(99),
        |p| p.steps[5].value = ValueId(99),
        |p| p.outputs[0].step = StepId(99),
        |p| p.equations[0].right = ValueId(99),
        |p| p.mesh = Mesh(vec![]),
        |p| p.mesh = Mesh(vec![0]),
        |p| p.mesh = Mesh(vec![usize::MAX, 2]),
        |p| p.imported = 99,
    ] {
        assert!(matches!(findings(change)[0], Finding::Program { .. }));
    }
    let untyped = |p: &mut Spmd| {
        p.logical.push(tpshard_ir::Node {
            op: Op::Map(Scalar::Exp),
            args: vec![ValueId(2)],
            ty: Type::new(DType::F32, vec![]),
            origin: "".into(),
        });
    };
    assert!(matches!(findings(untyped)[0], Finding::Value { .. }));
    let smuggled = |p: &mut Spmd| {
        p.logical.input("extra", Type::new(DType::F32, vec![]));
    };
    assert!(matches!(findings(smuggled)[0], Finding::Value { .. }));
}

#[test]
fn wrong_local_graphs_are_found() {
    let w1 = WeightExpr::initializer("w1", DType::F32, vec![6, 8]).unwrap();
    let shifted = Op::Weight(w1.slice(1, 0, 4).unwrap());
    assert_eq!(local_findings(|g| g[1] = with_op(&g[1], 4, shifted.clone())), [(1, 4)]);
    let longer = Op::Weight(w1.slice(1, 4, 3).unwrap());
    assert_eq!(local_findings(|g| g[1] = with_op(&g[1], 4, longer.clone())), [(1, 4)]);
    let other = Op::Weight(WeightExpr::initializer("w3", DType::F32, vec![6, 4]).unwrap());
    assert_eq!(local_findings(|g| g[0] = with_op(&g[0], 4, other.clone())), [(0, 4)]);
    let window = |start: i64| {
        let window = TableWindow { start: Dim::constant(start), extent: Dim::constant(10) };
        Op::Gather { axis: 0, window: Some(window) }
    };
    assert_eq!(local_findings(|g| g[1] = with_op(&g[1], 2, window(4))), [(1, 2)]);
    assert_eq!(local_findings(|g| g[1] = with_op(&g[1], 2, Op::Gather { axis: 0, window: None })), [(1, 2)]);
    let three = Op::Literal(Literal(Arc::new(Tensor::scalar(3f32))));
    assert_eq!(local_findings(|g| g[0] = with_op(&g[0], 7, three.clone())), [(0, 7)]);
    assert_eq!(local_findings(|g| g[0] = with_op(&g[0], 6, Op::Map(Scalar::Log))), [(0, 6)]);
}

#[test]
fn collectives_in_another_order_are_found() {
    let swapped = |graph: &Graph| {
        let (a, b) = (graph.nodes()[3].op.clone(), graph.nodes()[12].op.clone());
        with_op(&with_op(graph, 3, b), 12, a)
    };
    let found = local_findings(|g| g[1] = swapped(&g[1]));
    assert!(found.contains(&(1, 3)) && found.contains(&(1, 12)), "{found:?}");
    let found = local_findings(|g| g[1] = with_op(&g[1], 3, Op::Map(Scalar::Neg)));
    assert!(found.contains(&(1, 3)), "{found:?}");
    // All ranks alike, and still not the program.
    let found = local_findings(|g| g.iter_mut().for_each(|g| *g = swapped(g)));
    assert!(found.contains(&(0, 3)) && found.contains(&(1, 12)), "{found:?}");
    assert!(local_findings(|g| g.truncate(1)).is_empty());
}

/// A program that computes the second of two values by way of the first.
fn equal(
    rule: &str,
    make: impl Fn(&mut Graph, ValueId, ValueId) -> (ValueId, ValueId),
) -> Result<Report, Vec<Finding>> {
    let mut graph = Graph::new("equal");
    let ty = Type::new(DType::F32, vec![Dim::symbol("s"), Dim::constant(4)]);
    let (x, y) = (graph.input("x", ty.clone()), graph.input("y", ty));
    let (left, right) = make(&mut graph, x, y);
    let program = Spmd {
        mesh: Mesh::flat(1),
        imported: graph.len(),
        logical: graph.clone(),
        equations: vec![Equation { rule: rule.into(), left, right }],
        steps: vec![],
        outputs: vec![],
    };
    check(&program, &graph)
}

#[test]
fn equations_hold_where_they_should() {
    let map = |g: &mut Graph, f: Scalar, args: &[ValueId]| g.add(Op::Map(f), args).unwrap();
    let exponentials = |g: &mut Graph, x: ValueId, y: ValueId| {
        let (a, b) = (map(g, Scalar::Exp, &[x]), map(g, Scalar::Exp, &[y]));
        let sum = map(g, Scalar::Add, &[x, y]);
        (map(g, Scalar::Mul, &[a, b]), map(g, Scalar::Exp, &[sum]))
    };
    assert_eq!(equal("real: exp of a sum", exponentials).unwrap().executed_in_reals, 1);
    assert!(equal("exp of a sum", exponentials).is_err());
    let near = |g: &mut Graph, x: ValueId, _: ValueId| {
        let small = g.add(Op::Literal(Literal(Arc::new(Tensor::scalar(1e-6f32)))), &[]).unwrap();
        (map(g, Scalar::Add, &[x, small]), x)
    };
    assert!(equal("real: nearly", near).is_err());
    // Truncation is not undone.
    let truncated = |g: &mut Graph, x: ValueId, _: ValueId| {
        let whole = map(g, Scalar::Cast(DType::I32), &[x]);
        (map(g, Scalar::Cast(DType::F32), &[whole]), x)
    };
    assert!(equal("cast and back", truncated).is_err());
    // A weight's slice is known to belong to the weight.
    let sliced = |g: &mut Graph, x: ValueId, _: ValueId| {
        let w = WeightExpr::initializer("w", DType::F32, vec![4, 6]).unwrap();
        let (whole, part) = (
            g.add(Op::Weight(w.clone()), &[]).unwrap(),
            g.add(Op::Weight(w.slice(1, 2, 3).unwrap()), &[]).unwrap(),
        );
        let product = g.add(einsum("sk,kn->sn"), &[x, whole]).unwrap();
        let slice = Op::Slice { axis: 1, start: Dim::constant(2), length: Dim::constant(3), step: 1 };
        (g.add(slice, &[product]).unwrap(), g.add(einsum("sk,kn->sn"), &[x, part]).unwrap())
    };
    assert_eq!(equal("slice into weight", sliced).unwrap().executed_in_field, 1);
    let softmax = |g: &mut Graph, x: ValueId, _: ValueId| {
        let direct = g.add(Op::Softmax { axis: 1 }, &[x]).unwrap();
        let max = g.add(Op::Reduce { monoid: Monoid::Max, axes: vec![1] }, &[x]).unwrap();
        let shifted = map(g, Scalar::Sub, &[x, max]);
        let exp = map(g, Scalar::Exp, &[shifted]);
        let sum = g.add(Op::Reduce { monoid: Monoid::Sum, axes: vec![1] }, &[exp]).unwrap();
        (direct, map(g, Scalar::Div, &[exp, sum]))
    };
    assert_eq!(equal("softmax", softmax).unwrap().executed_in_field, 1);
    let too_large = |g: &mut Graph, x: ValueId, _: ValueId| {
        let wide = g.add(
            Op::Broadcast { shape: vec![Dim::constant(1 << 40), Dim::symbol("s"), Dim::constant(4)] },
            &[x],
        );
        let wide = wide.unwrap();
        (map(g, Scalar::Neg, &[wide]), wide)
    };
    let found = equal("large", too_large).unwrap_err();
    assert!(found[0].to_string().contains("too"), "{found:?}");
    let pad = |g: &mut Graph, x: ValueId, y: ValueId| {
        let zero = g.add(Op::Literal(Literal(Arc::new(Tensor::scalar(0f32)))), &[]).unwrap();
        let none = map(g, Scalar::Mul, &[y, zero]);
        (map(g, Scalar::Add, &[x, none]), x)
    };
    assert_eq!(equal("times zero", pad).unwrap().executed_in_field, 1);
}

#[test]
fn a_program_for_other_values_of_the_inputs_is_found() {
    let case = |value: bool| {
        let ty = Type::new(DType::Bool, vec![]);
        tpshard_ir::Case { input: "cached".into(), ty, value }
    };
    let (mut imported, _) = model();
    let mut program = program();
    for (own, found) in [(vec![case(true)], vec![case(false)]), (vec![case(true)], vec![])] {
        (imported.cases, program.logical.cases) = (own, found);
        let findings = tpshard_checker::check(&program, &imported).unwrap_err();
        assert!(findings.iter().any(|f| f.to_string().contains("other values")), "{findings:?}");
    }
    program.logical.cases = imported.cases.clone();
    tpshard_checker::check(&program, &imported).unwrap();
}

#[test]
fn a_program_that_takes_other_inputs_at_its_border_is_found() {
    let stretch = |axis: usize| {
        let filling = tpshard_ir::Filling::Repeat;
        tpshard_ir::Border::Stretch { input: "x".into(), axis, filling }
    };
    let (mut imported, _) = model();
    let mut program = program();
    for (own, found) in [(vec![stretch(0)], vec![stretch(1)]), (vec![], vec![stretch(0)])] {
        (imported.borders, program.logical.borders) = (own, found);
        let findings = tpshard_checker::check(&program, &imported).unwrap_err();
        assert!(findings.iter().any(|f| f.to_string().contains("other inputs")), "{findings:?}");
    }
}
