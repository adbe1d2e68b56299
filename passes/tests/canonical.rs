//! Canonicalisation against the reference interpreter: what is rewritten computes the same, and has the form that the
//! planner needs.

use std::collections::BTreeMap;
use std::sync::Arc;
use tpshard_ir::graph::Output;
use tpshard_ir::interp::{DEFAULT_ELEMENT_LIMIT, OpError, run_tensors};
use tpshard_ir::layout::Monoid;
use tpshard_ir::op::{EinsumSpec, Literal, Op, Scalar};
use tpshard_ir::weight::WeightExpr;
use tpshard_ir::{DType, Dim, Graph, Tensor, Type, ValueId};
use tpshard_passes::canonical::canonicalise;
use tpshard_passes::extended::Extended;

fn einsum(text: &str) -> Op {
    Op::Einsum(EinsumSpec::parse(text).expect("a spec"))
}

fn weight(g: &mut Graph, name: &str, shape: &[usize]) -> ValueId {
    let expr = WeightExpr::initializer(name, DType::F32, shape.to_vec()).expect("a weight");
    g.add(Op::Weight(expr), &[]).expect("a leaf")
}

fn number(g: &mut Graph, value: f32) -> ValueId {
    g.add(Op::Literal(Literal(Arc::new(Tensor::scalar(value)))), &[]).expect("a leaf")
}

fn add(g: &mut Graph, op: Op, args: &[ValueId]) -> ValueId {
    g.add(op, args).unwrap_or_else(|e| panic!("{e}"))
}

fn reshape(g: &mut Graph, x: ValueId, shape: &[Dim]) -> ValueId {
    add(g, Op::Reshape { shape: shape.to_vec() }, &[x])
}

fn dims<const N: usize>(sizes: [i64; N]) -> [Dim; N] {
    sizes.map(Dim::from)
}

/// Small values that differ everywhere.
fn pattern(shape: &[usize], seed: usize) -> Tensor {
    let count = shape.iter().product();
    let values = (0..count).map(|i| (((i * 37 + seed * 11) % 23) as f32 - 11.0) / 16.0).collect();
    Tensor::from_vec::<f32>(shape.to_vec(), values).expect("a tensor")
}

fn run(graph: &Graph, x: &Tensor) -> Vec<Tensor> {
    let inputs = BTreeMap::from([(Arc::from("x"), x.clone())]);
    let shapes: BTreeMap<String, Vec<usize>> = graph
        .nodes()
        .iter()
        .filter_map(|n| match &n.op {
            Op::Weight(e) => Some(e),
            _ => None,
        })
        .flat_map(initializers)
        .collect();
    let initializer = |name: &str| -> Result<Tensor, OpError> { Ok(pattern(&shapes[name], name.len())) };
    let outputs =
        run_tensors(graph, &inputs, &initializer, DEFAULT_ELEMENT_LIMIT).unwrap_or_else(|e| panic!("{e}"));
    outputs.into_iter().map(|(_, t)| t).collect()
}

fn initializers(expr: &WeightExpr) -> Vec<(String, Vec<usize>)> {
    use tpshard_ir::weight::WeightKind as K;
    match expr.kind() {
        K::Initializer { name } => vec![(name.clone(), expr.shape().to_vec())],
        K::Slice { source, .. }
        | K::Transpose { source, .. }
        | K::Reshape { source }
        | K::Cast { source } => initializers(source),
        K::Concat { sources, .. } => sources.iter().flat_map(initializers).collect(),
    }
}

/// Canonicalises, checks that the outputs stay what they were, and returns the live part as a graph.
fn canonical(mut graph: Graph, output: ValueId, x: &Tensor) -> Graph {
    graph.outputs = vec![Output { name: "y".into(), value: output }];
    let expected = run(&graph, x);
    let mut extended = Extended::new(graph);
    canonicalise(&mut extended);
    let mut rewritten = Graph::new("rewritten");
    let mut place = BTreeMap::new();
    for id in extended.live() {
        let mut node = extended.graph.node(id).clone();
        node.args.iter_mut().for_each(|a| *a = place[a]);
        place.insert(id, rewritten.push(node));
    }
    rewritten.symbols.clone_from(&extended.graph.symbols);
    rewritten.outputs = vec![Output { name: "y".into(), value: place[&extended.outputs[0].value] }];
    let got = run(&rewritten, x);
    for (a, b) in got.iter().zip(&expected) {
        assert_eq!(a.shape(), b.shape());
        let (a, b) = (a.as_slice::<f32>().expect("f32"), b.as_slice::<f32>().expect("f32"));
        let worst = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-5, "values moved by {worst}");
    }
    rewritten
}

fn count(graph: &Graph, name: &str) -> usize {
    graph.nodes().iter().filter(|n| n.op.name() == name).count()
}

/// GPT-2's attention as exporters write it: merged batch and sequence, one fused projection, split, heads, masks.
fn fused_attention(g: &mut Graph, x: ValueId, h: i64, d: i64) -> ValueId {
    let (batch, seq, width) = (Dim::symbol("batch"), Dim::symbol("seq"), Dim::from(h * d));
    let flat = reshape(g, x, &[&batch * &seq, width.clone()]);
    let (w, b) = ((h * d) as usize, (3 * h * d) as usize);
    let projection = weight(g, "qkv", &[w, b]);
    let bias = weight(g, "qkv_bias", &[b]);
    let fused = add(g, einsum("mk,kn->mn"), &[flat, projection]);
    let fused = add(g, Op::Map(Scalar::Add), &[fused, bias]);
    let fused = reshape(g, fused, &[batch.clone(), seq.clone(), Dim::from(3 * h * d)]);
    let parts: Vec<ValueId> = (0..3)
        .map(|i| {
            let (start, length) = (Dim::from(i * h * d), Dim::from(h * d));
            let part = add(g, Op::Slice { axis: 2, start, length, step: 1 }, &[fused]);
            let heads = reshape(g, part, &[batch.clone(), seq.clone(), Dim::from(h), Dim::from(d)]);
            add(g, Op::Transpose { perm: vec![0, 2, 1, 3] }, &[heads])
        })
        .collect();
    let keys = add(g, Op::Transpose { perm: vec![0, 1, 3, 2] }, &[parts[1]]);
    let scores = add(g, einsum("bhsd,bhdt->bhst"), &[parts[0], keys]);
    let scale = number(g, (d as f32).sqrt());
    let scores = add(g, Op::Map(Scalar::Div), &[scores, scale]);
    let weights = add(g, Op::Softmax { axis: 3 }, &[scores]);
    let mixed = add(g, einsum("bhst,bhtd->bhsd"), &[weights, parts[2]]);
    let mixed = add(g, Op::Transpose { perm: vec![0, 2, 1, 3] }, &[mixed]);
    reshape(g, mixed, &[batch, seq, width])
}

#[test]
fn fused_projections_are_cut_and_attention_is_found() {
    let mut g = Graph::new("gpt2");
    for symbol in ["batch", "seq"] {
        g.symbols.insert(symbol.into(), tpshard_ir::SymbolRange { low: 0, high: 64 });
    }
    let ty = Type::new(DType::F32, vec![Dim::symbol("batch"), Dim::symbol("seq"), Dim::from(12i64)]);
    let x = g.input("x", ty);
    let y = fused_attention(&mut g, x, 3, 4);
    let done = canonical(g, y, &pattern(&[2, 5, 12], 1));
    assert_eq!(count(&done, "attention"), 1);
    assert_eq!(count(&done, "softmax"), 0);
    assert_eq!(count(&done, "slice"), 0, "the slices moved into the weights");
    assert_eq!(count(&done, "einsum"), 3, "three projections");
    let kept_batch = done.nodes().iter().filter(|n| n.op.name() == "einsum").all(|n| n.ty.rank() == 3);
    assert!(kept_batch, "batch and sequence are dims of their own");
}

/// `f32` does not hold the reciprocal of the root of 5, but the scale of the composite is a real number.
#[test]
fn attention_is_found_where_scores_are_divided_and_the_checker_agrees() {
    let build = || {
        let mut g = Graph::new("divided");
        for symbol in ["batch", "seq"] {
            g.symbols.insert(symbol.into(), tpshard_ir::SymbolRange { low: 0, high: 64 });
        }
        let ty = Type::new(DType::F32, vec![Dim::symbol("batch"), Dim::symbol("seq"), Dim::from(10i64)]);
        let x = g.input("x", ty);
        let y = fused_attention(&mut g, x, 2, 5);
        (g, y)
    };
    let (g, y) = build();
    let done = canonical(g, y, &pattern(&[2, 5, 10], 1));
    assert_eq!(count(&done, "attention"), 1);
    let (mut g, y) = build();
    g.outputs.push(tpshard_ir::Output { name: "y".into(), value: y });
    let mut extended = tpshard_passes::extended::Extended::new(g.clone());
    tpshard_passes::canonical::canonicalise(&mut extended);
    let profile = tpshard_passes::cost::Profile::built_in("h100-sxm").unwrap();
    let plan = tpshard_passes::plan(extended, &tpshard_passes::PlanOptions::new(2, profile)).unwrap();
    let program = &plan.programs[0].1;
    assert!(program.equations.iter().any(|e| &*e.rule == "real:attention-divided"));
    tpshard_checker::check(program, &g).unwrap();
}

#[test]
fn repeated_heads_become_a_head_map() {
    let mut g = Graph::new("gqa");
    let x = g.input("x", Type::new(DType::F32, dims([2, 4, 3, 8]).to_vec()));
    let narrow = add(&mut g, Op::Slice { axis: 1, start: 0i64.into(), length: 2i64.into(), step: 1 }, &[x]);
    let wide = reshape(&mut g, narrow, &dims([2, 2, 1, 3, 8]));
    let wide = add(&mut g, Op::Broadcast { shape: dims([2, 2, 2, 3, 8]).to_vec() }, &[wide]);
    let wide = reshape(&mut g, wide, &dims([2, 4, 3, 8]));
    let scores = add(&mut g, einsum("bhsd,bhtd->bhst"), &[x, wide]);
    let mask = weight(&mut g, "mask", &[1, 1, 3, 3]);
    let scores = add(&mut g, Op::Map(Scalar::Add), &[scores, mask]);
    let weights = add(&mut g, Op::Softmax { axis: 3 }, &[scores]);
    let y = add(&mut g, einsum("bhst,bhtd->bhsd"), &[weights, wide]);
    let done = canonical(g, y, &pattern(&[2, 4, 3, 8], 3));
    let head_map = done.nodes().iter().find_map(|n| match &n.op {
        Op::Attention { kv_of_head, .. } => Some((kv_of_head.clone(), n.args.len())),
        _ => None,
    });
    assert_eq!(head_map, Some((vec![0, 0, 1, 1], 4)));
    assert_eq!(count(&done, "broadcast"), 0);
}

#[test]
fn norms_written_out_become_composites() {
    for layer in [false, true] {
        let mut g = Graph::new("norm");
        let x = g.input("x", Type::new(DType::F32, dims([2, 3, 8]).to_vec()));
        let mean = |g: &mut Graph, v: ValueId| {
            let sum = add(g, Op::Reduce { monoid: Monoid::Sum, axes: vec![2] }, &[v]);
            let n = number(g, 8.0);
            add(g, Op::Map(Scalar::Div), &[sum, n])
        };
        let centred = if layer {
            let m = mean(&mut g, x);
            add(&mut g, Op::Map(Scalar::Sub), &[x, m])
        } else {
            x
        };
        let two = number(&mut g, 2.0);
        let square = add(&mut g, Op::Map(Scalar::Pow), &[centred, two]);
        let variance = mean(&mut g, square);
        let epsilon = number(&mut g, 1e-5);
        let radicand = add(&mut g, Op::Map(Scalar::Add), &[variance, epsilon]);
        let root = add(&mut g, Op::Map(Scalar::Sqrt), &[radicand]);
        let normal = add(&mut g, Op::Map(Scalar::Div), &[centred, root]);
        let scale = weight(&mut g, "scale", &[8]);
        let scaled = add(&mut g, Op::Map(Scalar::Mul), &[scale, normal]);
        let bias = weight(&mut g, "bias!", &[8]);
        let y = add(&mut g, Op::Map(Scalar::Add), &[scaled, bias]);
        let done = canonical(g, y, &pattern(&[2, 3, 8], 2));
        assert_eq!(count(&done, "norm"), 1, "layer norm: {layer}");
        assert_eq!(done.len(), 4, "input, scale, bias, norm");
    }
}

#[test]
fn overlapping_slices_are_left_alone() {
    let mut g = Graph::new("overlap");
    let x = g.input("x", Type::new(DType::F32, dims([2, 4]).to_vec()));
    let w = weight(&mut g, "w", &[4, 6]);
    let product = add(&mut g, einsum("mk,kn->mn"), &[x, w]);
    let slice = |g: &mut Graph, start: i64| {
        add(g, Op::Slice { axis: 1, start: start.into(), length: 4i64.into(), step: 1 }, &[product])
    };
    let (a, b) = (slice(&mut g, 0), slice(&mut g, 2));
    let y = add(&mut g, Op::Map(Scalar::Mul), &[a, b]);
    let done = canonical(g, y, &pattern(&[2, 4], 2));
    assert_eq!((count(&done, "einsum"), count(&done, "slice")), (1, 2), "nothing is computed twice");
}

/// Rows of packed weights that end inside a byte stay as they are stored: what is cut is made when they are read.
#[test]
fn packed_weights_are_cut_at_whole_bytes_only() {
    for (length, cut) in [(3i64, false), (2, true)] {
        let mut g = Graph::new("packed");
        let expr = WeightExpr::initializer("zeros", DType::U4, vec![6, 4]).expect("a weight");
        let packed = g.add(Op::Weight(expr), &[]).expect("a leaf");
        let wide = add(&mut g, Op::Map(Scalar::Cast(DType::U8)), &[packed]);
        let slice = Op::Slice { axis: 1, start: Dim::from(0i64), length: Dim::from(length), step: 1 };
        let output = add(&mut g, slice, &[wide]);
        g.outputs.push(Output { name: "y".into(), value: output });
        let mut extended = Extended::new(g);
        canonicalise(&mut extended);
        let shapes: Vec<Vec<usize>> = extended
            .graph
            .nodes()
            .iter()
            .filter_map(
                |node| if let Op::Weight(expr) = &node.op { Some(expr.shape().to_vec()) } else { None },
            )
            .collect();
        let part = vec![6, usize::try_from(length).expect("a size")];
        assert_eq!(shapes.contains(&part), cut, "{shapes:?}");
    }
}
