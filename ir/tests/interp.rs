//! The interpreter: hand-written programs over N ranks against one, composites against their decompositions, limits
//! and messages.

use std::collections::BTreeMap;
use std::sync::Arc;
use tpshard_ir::interp::{
    Array, Domain, Field, Inputs, InterpError, Interpreter, Num, OpError, Outputs, Real, Split, decode,
    encode, random_array, random_family, random_weight, tree_reduce,
};
use tpshard_ir::layout::AxisLayout;
use tpshard_ir::op::{Conversion, EinsumSpec, NormKind, Real as Attribute};
use tpshard_ir::weight::WeightExpr;
use tpshard_ir::*;

const LIMIT: usize = 1 << 20;

fn ty(dtype: DType, shape: &[Dim]) -> Type {
    Type::new(dtype, shape.to_vec())
}

fn dims(shape: &[usize]) -> Vec<Dim> {
    shape.iter().map(|&d| Dim::from(d)).collect()
}

fn run<D: Domain>(domain: &D, graph: &Graph, inputs: &Inputs<D::Element>) -> Outputs<D::Element> {
    let weights = |expr: &WeightExpr| random_weight(domain, expr, 1, LIMIT);
    Interpreter { domain, weights: &weights, element_limit: LIMIT, deferred: None }
        .run(graph, inputs)
        .unwrap()
}

fn run_program<D: Domain>(
    domain: &D,
    program: &Spmd,
    inputs: &Inputs<D::Element>,
) -> Result<Outputs<D::Element>, InterpError> {
    let weights = |expr: &WeightExpr| random_weight(domain, expr, 1, LIMIT);
    let interpreter = Interpreter { domain, weights: &weights, element_limit: LIMIT, deferred: None };
    interpreter.run_program(program, inputs, Split::Random(3))
}

/// A program under construction: each step names a value, its layout and how it is made.
struct Steps {
    program: Spmd,
}

impl Steps {
    fn new(logical: Graph, mesh: Mesh) -> Steps {
        let imported = logical.len();
        Steps { program: Spmd { mesh, logical, imported, equations: vec![], steps: vec![], outputs: vec![] } }
    }

    fn compute(&mut self, value: ValueId, layout: AxisLayout, args: &[StepId]) -> StepId {
        self.push(value, layout, StepKind::Compute, args)
    }

    fn convert(&mut self, conversion: Conversion, layout: AxisLayout, arg: StepId) -> StepId {
        let value = self.program.steps[arg.index()].value;
        self.push(value, layout, StepKind::Convert(conversion), &[arg])
    }

    fn push(&mut self, value: ValueId, layout: AxisLayout, kind: StepKind, args: &[StepId]) -> StepId {
        let layout = Layout(vec![layout]);
        self.program.steps.push(Step { value, layout, kind, args: args.to_vec() });
        StepId(self.program.steps.len() as u32 - 1)
    }

    fn output(&mut self, name: &str, step: StepId) {
        self.program.outputs.push(SpmdOutput { name: name.into(), step });
    }
}

fn sum_axes() -> Vec<usize> {
    vec![0]
}

/// A Megatron MLP over `hidden` units, with `seq` symbolic.
fn mlp(hidden: usize) -> (Graph, [ValueId; 6]) {
    let mut graph = Graph::new("mlp");
    graph.symbols.insert("seq".into(), SymbolRange { low: 0, high: 64 });
    let x = graph.input("x", ty(DType::F32, &[Dim::symbol("seq"), 3usize.into()]));
    let weight = |name: &str, shape: &[usize]| {
        Op::Weight(WeightExpr::initializer(name, DType::F32, shape.to_vec()).unwrap())
    };
    let up = graph.add(weight("up", &[3, hidden]), &[]).unwrap();
    let down = graph.add(weight("down", &[hidden, 4]), &[]).unwrap();
    let spec = |text| Op::Einsum(EinsumSpec::parse(text).unwrap());
    let h = graph.add(spec("sk,kn->sn"), &[x, up]).unwrap();
    let a = graph.add(Op::Map(Scalar::Tanh), &[h]).unwrap();
    let y = graph.add(spec("sn,nm->sm"), &[a, down]).unwrap();
    graph.outputs.push(Output { name: "y".into(), value: y });
    (graph, [x, up, down, h, a, y])
}

#[test]
fn mlp_is_exact_on_every_number_of_ranks() {
    for ranks in 1..=5 {
        for (hidden, unit, seq) in [(8usize, 1usize, 5usize), (6, 2, 1), (4, 4, 2), (7, 1, 0)] {
            let (graph, [x, up, down, h, a, y]) = mlp(hidden);
            let mut steps = Steps::new(graph, Mesh::flat(ranks));
            let shard = |dim| AxisLayout::shard(dim, unit);
            let r = AxisLayout::Replicated;
            let p = AxisLayout::Partial(Monoid::Sum);
            let sx = steps.compute(x, r.clone(), &[]);
            let su = steps.compute(up, shard(1), &[]);
            let sd = steps.compute(down, shard(0), &[]);
            let sh = steps.compute(h, shard(1), &[sx, su]);
            let sa = steps.compute(a, shard(1), &[sh]);
            let sy = steps.compute(y, p, &[sa, sd]);
            let all = Conversion::AllReduce { axes: sum_axes(), monoid: Monoid::Sum };
            let reduced = steps.convert(all, r.clone(), sy);
            let seq_unit = Dim::constant(1);
            let scatter = Conversion::ReduceScatter {
                axes: sum_axes(),
                monoid: Monoid::Sum,
                dim: 0,
                unit: seq_unit.clone(),
            };
            let scattered = steps.convert(scatter, AxisLayout::shard(0, 1usize), sy);
            let gather = Conversion::AllGather { axes: sum_axes(), dim: 0, unit: seq_unit };
            let gathered = steps.convert(gather, r, scattered);
            for (name, step) in [("r", reduced), ("s", scattered), ("g", gathered), ("h", sh)] {
                steps.output(name, step);
            }
            let x_value = random_array(&Field, DType::F32, &[seq, 3], 7).unwrap();
            let inputs: Inputs<u64> = [("x".into(), x_value)].into();
            let expected = run(&Field, &steps.program.logical, &inputs);
            let found = run_program(&Field, &steps.program, &inputs).unwrap();
            for (name, value) in &found[..3] {
                assert_eq!(
                    *value, expected[0].1,
                    "{name}: {ranks} ranks, {hidden} units of {unit}, seq {seq}"
                );
            }
            assert_eq!(found[3].1.shape(), [seq, hidden]);
        }
    }
}

#[test]
fn every_conversion_keeps_the_value() {
    for ranks in 1..=5 {
        for rows in [0usize, 1, 4, 6, 12] {
            let mut graph = Graph::new("");
            let x = graph.input("x", ty(DType::F32, &dims(&[rows, 6])));
            let mut steps = Steps::new(graph, Mesh::flat(ranks));
            let axes = sum_axes;
            let one = || Dim::constant(1);
            let r = AxisLayout::Replicated;
            let whole = steps.compute(x, r.clone(), &[]);
            let by_row = Conversion::ShardSlice { axes: axes(), dim: 0, unit: one() };
            let rows_step = steps.convert(by_row, AxisLayout::shard(0, 1usize), whole);
            let to_columns = Conversion::AllToAll {
                axes: axes(),
                from: 0,
                from_unit: one(),
                to: 1,
                to_unit: Dim::constant(3),
            };
            let columns = steps.convert(to_columns, AxisLayout::shard(1, 3usize), rows_step);
            let redeal = Conversion::Redeal {
                axes: axes(),
                dim: 1,
                from_unit: Dim::constant(3),
                to_unit: Dim::constant(2),
            };
            let redealt = steps.convert(redeal, AxisLayout::shard(1, 2usize), columns);
            let back = Conversion::AllGather { axes: axes(), dim: 1, unit: Dim::constant(2) };
            let gathered = steps.convert(back, r.clone(), redealt);
            let mut partials = vec![];
            for monoid in Monoid::ALL {
                let first = Conversion::OnlyFirst { axes: axes(), monoid };
                let partial = steps.convert(first, AxisLayout::Partial(monoid), gathered);
                let reduce = Conversion::AllReduce { axes: axes(), monoid };
                partials.push(partial);
                partials.push(steps.convert(reduce, r.clone(), partial));
            }
            let all: Vec<StepId> =
                [rows_step, columns, redealt, gathered].into_iter().chain(partials).collect();
            for step in all {
                steps.output(&format!("{step}"), step);
            }
            let value = random_array(&Field, DType::F32, &[rows, 6], 5).unwrap();
            let inputs: Inputs<u64> = [("x".into(), value.clone())].into();
            for (name, found) in run_program(&Field, &steps.program, &inputs).unwrap() {
                assert_eq!(found, value, "{name} on {ranks} ranks with {rows} rows");
            }
        }
    }
}

#[test]
fn families_decode_to_what_they_encode_on_meshes_of_two_axes() {
    let value = random_array(&Field, DType::F32, &[5, 6], 9).unwrap();
    let layouts = |monoid| {
        [
            AxisLayout::Replicated,
            AxisLayout::shard(0, 1usize),
            AxisLayout::shard(1, 2usize),
            AxisLayout::Partial(monoid),
        ]
    };
    for monoid in Monoid::ALL {
        for mesh in [Mesh(vec![2, 3]), Mesh(vec![4, 2]), Mesh(vec![1, 7])] {
            for first in layouts(monoid) {
                for second in layouts(monoid) {
                    let layout = Layout(vec![first.clone(), second]);
                    let none = Default::default();
                    for family in [
                        random_family(&Field, &value, &layout, &mesh, &none, 4),
                        encode(&Field, &value, &layout, &mesh, &none, Split::First),
                    ] {
                        let family = family.unwrap();
                        let shapes = |rank| layout::local_shape(&dims(&[5, 6]), &layout, &mesh, rank);
                        for (rank, array) in family.iter().enumerate() {
                            assert_eq!(dims(array.shape()), shapes(rank), "{layout} on {mesh}");
                        }
                        assert_eq!(
                            decode(&Field, &family, &layout, &mesh).unwrap(),
                            value,
                            "{layout} on {mesh}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn multi_axis_conversions_follow_the_nested_deal() {
    for rows in [0usize, 3, 6, 11] {
        let mesh = Mesh(vec![2, 2]);
        let mut graph = Graph::new("");
        let x = graph.input("x", ty(DType::F32, &dims(&[rows])));
        let layout = |a: &AxisLayout| Layout(vec![a.clone(), a.clone()]);
        let (r, s) = (AxisLayout::Replicated, AxisLayout::shard(0, 1usize));
        let axes = vec![0, 1];
        let slice = Conversion::ShardSlice { axes: axes.clone(), dim: 0, unit: Dim::constant(1) };
        let gather = Conversion::AllGather { axes, dim: 0, unit: Dim::constant(1) };
        let steps = vec![
            Step { value: x, layout: layout(&r), kind: StepKind::Compute, args: vec![] },
            Step { value: x, layout: layout(&s), kind: StepKind::Convert(slice), args: vec![StepId(0)] },
            Step { value: x, layout: layout(&r), kind: StepKind::Convert(gather), args: vec![StepId(1)] },
        ];
        let outputs = vec![
            SpmdOutput { name: "s".into(), step: StepId(1) },
            SpmdOutput { name: "r".into(), step: StepId(2) },
        ];
        let program = Spmd { mesh, logical: graph, imported: 1, equations: vec![], steps, outputs };
        let value = random_array(&Field, DType::F32, &[rows], 9).unwrap();
        for (_, found) in run_program(&Field, &program, &[("x".into(), value.clone())].into()).unwrap() {
            assert_eq!(found, value);
        }
    }
}

#[test]
fn vocabulary_parallel_lookup_reads_zero_for_rows_held_elsewhere() {
    for ranks in 1..=5 {
        let mut graph = Graph::new("");
        let table = WeightExpr::initializer("table", DType::F32, vec![7, 3]).unwrap();
        let table = graph.add(Op::Weight(table), &[]).unwrap();
        let indices = graph.input("i", ty(DType::I64, &dims(&[4])));
        let rows = graph.add(Op::Gather { axis: 0, window: None }, &[table, indices]).unwrap();
        graph.outputs.push(Output { name: "y".into(), value: rows });
        let mut steps = Steps::new(graph, Mesh::flat(ranks));
        let table = steps.compute(table, AxisLayout::shard(0, 1usize), &[]);
        let indices = steps.compute(indices, AxisLayout::Replicated, &[]);
        let partial = steps.compute(rows, AxisLayout::Partial(Monoid::Sum), &[table, indices]);
        steps.output("y", partial);
        let indices = Tensor::from_vec(vec![4], vec![0i64, -1, 6, 3]).unwrap();
        let inputs: Inputs<u64> = [("i".into(), Field.import(&indices))].into();
        let expected = run(&Field, &steps.program.logical, &inputs);
        assert_eq!(run_program(&Field, &steps.program, &inputs).unwrap(), expected);
    }
}

#[test]
fn tree_reduce_does_not_depend_on_the_number_of_ranks() {
    for blocks in [0usize, 1, 2, 3, 5, 8, 13] {
        let values: Vec<f32> = (0..blocks * 2).map(|i| 1.0 / (i as f32 + 1.0)).collect();
        let x = Real.import(&Tensor::from_vec(vec![blocks, 2], values).unwrap());
        let expected = tree_reduce(&Real, &x, 0).unwrap();
        for ranks in 1..=5usize {
            let layout = Layout(vec![AxisLayout::shard(0, 1usize)]);
            let mesh = Mesh::flat(ranks);
            let none = Default::default();
            let family = encode(&Real, &x, &layout, &mesh, &none, Split::First).unwrap();
            let parts: Vec<&Array<Num>> = family.iter().collect();
            let conversion = Conversion::TreeReduce { axes: vec![0], axis: 0, unit: Dim::constant(1) };
            let found = interp::convert(&Real, &conversion, &[ranks], &parts, &none).unwrap();
            assert!(found.iter().all(|array| *array == expected), "{blocks} blocks on {ranks} ranks");
        }
    }
}

fn composite_graphs() -> Vec<(Graph, ValueId)> {
    let mut all = vec![];
    for dtype in [DType::F32, DType::F64, DType::F16] {
        let mut add = |op: Op, shapes: &[&[usize]]| {
            let mut graph = Graph::new("");
            let args: Vec<ValueId> = shapes
                .iter()
                .enumerate()
                .map(|(i, shape)| graph.input(&format!("x{i}"), ty(dtype, &dims(shape))))
                .collect();
            let value = graph.add(op, &args).unwrap();
            all.push((graph, value));
        };
        add(Op::Softmax { axis: 1 }, &[&[2, 5, 3]]);
        add(Op::Softmax { axis: 0 }, &[&[0, 3]]);
        for kind in [NormKind::Layer, NormKind::Rms] {
            let norm = |axis| Op::Norm { kind, axis, epsilon: Attribute(1e-5) };
            add(norm(2), &[&[2, 3, 6], &[6]]);
            add(norm(1), &[&[2, 3, 2], &[3, 2], &[3, 2]]);
        }
        let attention = |map: &[u32], cap: Option<f64>, zero| Op::Attention {
            scale: Attribute(0.3),
            softcap: cap.map(Attribute),
            kv_of_head: map.to_vec(),
            empty_rows_zero: zero,
        };
        let (q, kv): (&[usize], &[usize]) = (&[2, 4, 3, 5], &[2, 2, 6, 5]);
        add(attention(&[0, 0, 1, 1], None, false), &[q, kv, &[2, 2, 6, 4]]);
        add(attention(&[1, 0, 0, 1], Some(2.0), true), &[q, kv, &[2, 2, 6, 4], &[3, 6]]);
        add(attention(&[0, 1], None, true), &[&[2, 2, 3, 5], kv, kv, &[2, 1, 3, 1]]);
        add(attention(&[0, 1], None, false), &[&[1, 2, 3, 5], &[1, 2, 0, 5], &[1, 2, 0, 5]]);
        for interleaved in [false, true] {
            add(Op::Rotary { interleaved }, &[&[2, 3, 6], &[3, 3], &[3, 3]]);
        }
    }
    all
}

fn random_inputs<D: Domain>(domain: &D, graph: &Graph, seed: u64) -> Inputs<D::Element> {
    let inputs = graph.inputs().enumerate();
    inputs
        .map(|(i, (_, name, ty))| {
            let shape: Vec<usize> = ty.shape.iter().map(|d| d.as_size().unwrap()).collect();
            (Arc::clone(name), random_array(domain, ty.dtype, &shape, seed + i as u64).unwrap())
        })
        .collect()
}

#[test]
fn composites_equal_their_decompositions() {
    for (mut graph, value) in composite_graphs() {
        let opened = decompose(&mut graph, value).unwrap().unwrap();
        assert_eq!(graph.ty(opened), graph.ty(value));
        for (name, value) in [("whole", value), ("opened", opened)] {
            graph.outputs.push(Output { name: name.into(), value });
        }
        let op = format!("{:?}", graph.node(value).op);
        let exact = run(&Field, &graph, &random_inputs(&Field, &graph, 11));
        assert_eq!(exact[0].1, exact[1].1, "{op}");
        let mut inputs = random_inputs(&Real, &graph, 12);
        for array in inputs.values_mut() {
            let eighths = array.elements().iter().map(|x| Num::Float(x.float() / 8.0)).collect();
            *array = Array::new(array.dtype, array.shape().to_vec(), eighths).unwrap();
        }
        let real = run(&Real, &graph, &inputs);
        let tolerance = match graph.ty(value).dtype {
            DType::F16 => 1e-3,
            DType::F64 => 1e-12,
            _ => 1e-6,
        };
        for (a, b) in real[0].1.elements().iter().zip(real[1].1.elements()) {
            let (a, b) = (a.float(), b.float());
            assert!((a - b).abs() <= tolerance * a.abs().max(1.0), "{op}: {a} {b}");
        }
    }
}

#[test]
fn rows_of_minus_infinity_are_nan_unless_zeros_are_asked_for() {
    for empty_rows_zero in [false, true] {
        let mut graph = Graph::new("");
        let kv = graph.input("x", ty(DType::F32, &dims(&[1, 1, 2, 2])));
        let bias = graph.input("b", ty(DType::F32, &dims(&[2, 2])));
        let op = Op::Attention { scale: Attribute(1.0), softcap: None, kv_of_head: vec![0], empty_rows_zero };
        let whole = graph.add(op, &[kv, kv, kv, bias]).unwrap();
        let opened = decompose(&mut graph, whole).unwrap().unwrap();
        for value in [whole, opened] {
            graph.outputs.push(Output { name: format!("{value}").into(), value });
        }
        let low = f32::NEG_INFINITY;
        let x = Tensor::from_vec(vec![1, 1, 2, 2], vec![1f32, 2.0, 3.0, 4.0]).unwrap();
        let bias = Tensor::from_vec(vec![2, 2], vec![low, low, low, 0.0]).unwrap();
        let inputs: Inputs<Num> = [("x".into(), Real.import(&x)), ("b".into(), Real.import(&bias))].into();
        for (_, found) in run(&Real, &graph, &inputs) {
            let found: Vec<f64> = found.elements().iter().map(|x| x.float()).collect();
            assert_eq!(found[2..], [3.0, 4.0]);
            assert!(found[..2].iter().all(|x| if empty_rows_zero { *x == 0.0 } else { x.is_nan() }));
        }
    }
}

fn error_of(graph: &Graph, inputs: &[(&str, Tensor)], limit: usize) -> String {
    let inputs: BTreeMap<Arc<str>, Tensor> = inputs.iter().map(|(n, t)| ((*n).into(), t.clone())).collect();
    let none = |name: &str| Err(OpError::Other(format!("no initializer {name}")));
    interp::run_tensors(graph, &inputs, &none, limit).unwrap_err().to_string()
}

#[test]
fn messages_name_the_inputs_and_nodes() {
    let mut graph = Graph::new("");
    let s = Dim::symbol("s");
    let x = graph.input("x", ty(DType::F32, std::slice::from_ref(&s)));
    let i = graph.input("i", ty(DType::I64, &[&s + Dim::constant(1)]));
    let y = graph.add(Op::Gather { axis: 0, window: None }, &[x, i]).unwrap();
    graph.set_origin(y, "/Gather_3");
    graph.outputs.push(Output { name: "y".into(), value: y });
    graph.symbols.insert("s".into(), SymbolRange { low: 1, high: 3 });
    let floats = |n: usize| Tensor::from_vec(vec![n], vec![1f32; n]).unwrap();
    let indices = |v: Vec<i64>| Tensor::from_vec(vec![v.len()], v).unwrap();
    let error = error_of(&graph, &[("x", floats(2)), ("i", indices(vec![0, 1, -3]))], LIMIT);
    assert_eq!(error, "rank 0, %2 = gather (/Gather_3): index -3 of a dim of 2");
    let error = error_of(&graph, &[("x", floats(2))], LIMIT);
    assert!(error.starts_with("input `i` is missing"), "{error}");
    let error = error_of(&graph, &[("x", floats(2)), ("i", indices(vec![0]))], LIMIT);
    assert!(error.contains("input `i` is i64[1], the graph expects i64[s + 1]"), "{error}");
    let error = error_of(&graph, &[("x", floats(4)), ("i", indices(vec![0; 5]))], LIMIT);
    assert_eq!(error, "dim `s` of input `x` is 4, allowed are 1 to 3");
    let error = error_of(&graph, &[("x", floats(3)), ("i", indices(vec![0; 4]))], 8);
    assert!(error.contains("exceeds the limit of 1"), "{error}");
    graph.guards.push(Guard {
        left: s.clone(),
        relation: Relation::LessEqual,
        right: Dim::constant(2),
        reason: "input `x`".into(),
    });
    let error = error_of(&graph, &[("x", floats(3)), ("i", indices(vec![0; 4]))], LIMIT);
    assert_eq!(error, "`s <= 2` does not hold: 3 and 2 (input `x`)");
    let mut twice = Graph::new("");
    twice.input("a", ty(DType::F32, std::slice::from_ref(&s)));
    twice.input("b", ty(DType::F32, std::slice::from_ref(&s)));
    let error = error_of(&twice, &[("a", floats(3)), ("b", floats(4))], LIMIT);
    assert!(error.starts_with("dim `s` is 3 by input `a`, but 4 by input `b`"), "{error}");
}

#[test]
fn ranks_that_disagree_are_refused() {
    let mut graph = Graph::new("");
    let x = graph.input("x", ty(DType::F32, &dims(&[2])));
    let mut other = graph.clone();
    let reduce = Op::Convert(Conversion::AllReduce { axes: vec![0], monoid: Monoid::Sum });
    graph.add_typed(reduce, &[x], ty(DType::F32, &dims(&[2])));
    other.add(Op::Map(Scalar::Neg), &[x]).unwrap();
    let weights = |_: &WeightExpr| Err(OpError::Other("none".into()));
    let interpreter = Interpreter { domain: &Field, weights: &weights, element_limit: LIMIT, deferred: None };
    let input = |_, _, _: &str| random_array(&Field, DType::F32, &[2], 1).ok();
    let run = |graphs: &[Graph], ranks| {
        interpreter.run_ranks(graphs, &Mesh::flat(ranks), &Default::default(), &input)
    };
    let error = run(&[graph.clone(), other], 2).unwrap_err().to_string();
    assert!(error.contains("%1 is neg on rank 1, all_reduce on rank 0"), "{error}");
    assert!(run(std::slice::from_ref(&graph), 2).is_err());
    assert!(run(&[graph.clone(), graph], 2).is_ok());
}
