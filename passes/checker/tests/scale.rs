//! Deep models: equations of equal layers are executed once, and checking grows with the number of layers only.

use tpshard_checker::check;
use tpshard_ir::op::EinsumSpec;
use tpshard_ir::weight::WeightExpr;
use tpshard_ir::{
    AxisLayout, Conversion, DType, Dim, Equation, Graph, Layout, Mesh, Monoid, Op, Output, Scalar, Spmd,
    SpmdOutput, Step, StepId, StepKind, SymbolRange, Type, ValueId,
};

const LAYERS: usize = 96;

fn weight(
    g: &mut Graph,
    name: &str,
    layer: usize,
    shape: &[usize],
    slice: Option<(usize, usize)>,
) -> ValueId {
    let mut expr = WeightExpr::initializer(format!("{name}{layer}"), DType::F32, shape.to_vec()).unwrap();
    if let Some((start, length)) = slice {
        expr = expr.slice(1, start, length).unwrap();
    }
    g.add(Op::Weight(expr), &[]).unwrap()
}

/// Layers `x + (x W)[.., 0..32] V`, with the slice moved into the weight.
#[test]
fn layers_are_checked_by_their_kind() {
    let product = || Op::Einsum(EinsumSpec::parse("sk,kn->sn").unwrap());
    let mut g = Graph::new("deep");
    g.symbols.insert("s".into(), SymbolRange { low: 1, high: 4096 });
    let x = g.input("x", Type::new(DType::F32, vec![Dim::symbol("s"), Dim::constant(16)]));
    let (mut h, mut layers) = (x, Vec::new());
    for layer in 0..LAYERS {
        let w = weight(&mut g, "w", layer, &[16, 64], None);
        let up = g.add(product(), &[h, w]).unwrap();
        let part = Op::Slice { axis: 1, start: Dim::constant(0), length: Dim::constant(32), step: 1 };
        let part = g.add(part, &[up]).unwrap();
        let exp = g.add(Op::Map(Scalar::Exp), &[part]).unwrap();
        let v = weight(&mut g, "v", layer, &[32, 16], None);
        let down = g.add(product(), &[exp, v]).unwrap();
        let next = g.add(Op::Map(Scalar::Add), &[h, down]).unwrap();
        layers.push((part, v));
        h = next;
    }
    g.outputs.push(Output { name: "y".into(), value: h });
    let imported = g.clone();
    let mut equations = Vec::new();
    let mut steps: Vec<Step> = Vec::new();
    let mut step = |value: ValueId, layout: AxisLayout, kind: StepKind, args: &[StepId]| {
        steps.push(Step { value, layout: Layout(vec![layout]), kind, args: args.to_vec() });
        StepId(steps.len() as u32 - 1)
    };
    let shard = |dim| AxisLayout::shard(dim, 1usize);
    let mut own = x;
    let mut last = step(x, AxisLayout::Replicated, StepKind::Compute, &[]);
    for (layer, &(part, v)) in layers.iter().enumerate() {
        let w = weight(&mut g, "w", layer, &[16, 64], Some((0, 32)));
        let up = g.add(product(), &[own, w]).unwrap();
        equations.push(Equation { rule: "slice into weight".into(), left: part, right: up });
        let exp = g.add(Op::Map(Scalar::Exp), &[up]).unwrap();
        let down = g.add(product(), &[exp, v]).unwrap();
        let next = g.add(Op::Map(Scalar::Add), &[own, down]).unwrap();
        let weights = [step(w, shard(1), StepKind::Compute, &[]), step(v, shard(0), StepKind::Compute, &[])];
        let a = step(up, shard(1), StepKind::Compute, &[last, weights[0]]);
        let b = step(exp, shard(1), StepKind::Compute, &[a]);
        let sum = AxisLayout::Partial(Monoid::Sum);
        let c = step(down, sum, StepKind::Compute, &[b, weights[1]]);
        let reduce = Conversion::AllReduce { axes: vec![0], monoid: Monoid::Sum };
        let d = step(down, AxisLayout::Replicated, StepKind::Convert(reduce), &[c]);
        last = step(next, AxisLayout::Replicated, StepKind::Compute, &[last, d]);
        own = next;
    }
    let program = Spmd {
        mesh: Mesh::flat(4),
        imported: imported.len(),
        logical: g,
        equations,
        steps,
        outputs: vec![SpmdOutput { name: "y".into(), step: last }],
    };
    let report = check(&program, &imported).unwrap_or_else(|e| panic!("{:?}", e[0]));
    assert_eq!((report.equations, report.executed_in_field), (LAYERS, 1));
    assert_eq!(report.conversions, LAYERS);
}
