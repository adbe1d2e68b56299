//! Whole programs on one to four ranks: results equal the interpreter's, and errors are values on every rank.

mod executor;

use executor::*;
use std::collections::BTreeMap;
use tpshard_ir::layout::{AxisLayout, Layout, Mesh};
use tpshard_ir::op::{EinsumSpec, NormKind, Op, Real};
use tpshard_ir::{
    Conversion, DType, Dim, Graph, Guard, Monoid, Relation, Scalar, Spmd, SymbolRange, Tensor, Type, ValueId,
};
use tpshard_runtime::comm::solo;
use tpshard_runtime::session::SessionOptions;

const F32: DType = DType::F32;

fn einsum(graph: &mut Graph, spec: &str, a: ValueId, b: ValueId) -> ValueId {
    graph.add(Op::Einsum(EinsumSpec::parse(spec).unwrap()), &[a, b]).unwrap()
}

fn map(graph: &mut Graph, scalar: Scalar, args: &[ValueId]) -> ValueId {
    graph.add(Op::Map(scalar), args).unwrap()
}

/// A two-layer perceptron, its middle split over the ranks, the sum reduced.
fn perceptron(ranks: usize, scatter: bool) -> Spmd {
    let mut g = Graph::new("mlp");
    let x = g.input("x", Type::new(F32, vec![dim("rows"), 8usize.into()]));
    let w1 = weight(&mut g, "w1", F32, &[8, 10]);
    let b1 = weight(&mut g, "b1", F32, &[10]);
    let h = einsum(&mut g, "rk,kn->rn", x, w1);
    let h1 = map(&mut g, Scalar::Add, &[h, b1]);
    let h2 = map(&mut g, Scalar::Tanh, &[h1]);
    let w2 = weight(&mut g, "w2", F32, &[10, 6]);
    let y = einsum(&mut g, "rn,nm->rm", h2, w2);
    let scale = weight(&mut g, "scale", F32, &[6]);
    let z = g.add(Op::Norm { kind: NormKind::Rms, axis: 1, epsilon: Real(1e-5) }, &[y, scale]).unwrap();
    output(&mut g, "z", z);
    output(&mut g, "hidden", h2);
    g.symbols.insert("rows".into(), SymbolRange { low: 0, high: 100 });

    let mesh = Mesh::flat(ranks);
    let r = Layout::replicated(&mesh);
    let p = Layout(vec![AxisLayout::Partial(Monoid::Sum)]);
    let mut b = Builder::new(g, mesh);
    b.compute(x, r.clone());
    b.compute(w1, shard(1, 1));
    b.compute(b1, shard(0, 1));
    b.compute(h, shard(1, 1));
    b.compute(h1, shard(1, 1));
    b.compute(h2, shard(1, 1));
    b.compute(w2, shard(0, 1));
    b.compute(y, p);
    b.compute(scale, r.clone());
    let (axes, unit) = (vec![0], Dim::constant(1));
    if scatter {
        let by_rows = shard(0, 1);
        let conversion = Conversion::ReduceScatter { axes, monoid: Monoid::Sum, dim: 0, unit };
        b.convert(y, by_rows.clone(), conversion);
        b.compute(z, by_rows);
    } else {
        b.convert(y, r.clone(), Conversion::AllReduce { axes, monoid: Monoid::Sum });
        b.compute(z, r);
    }
    b.finish()
}

#[test]
fn a_split_perceptron_equals_the_whole() {
    let mut random = Random::new(1);
    for ranks in 1..=4 {
        for scatter in [false, true] {
            let spmd = perceptron(ranks, scatter);
            let weights = random_weights(&spmd.logical, &mut random);
            // 10 columns over 3 or 4 ranks, and fewer rows than ranks, are uneven and empty shares.
            for rows in [0, 1, 2, 7] {
                let inputs = [("x".to_string(), random.tensor(F32, &[rows, 8]))].into();
                let results = run(&spmd, &weights, &inputs).unwrap();
                for (name, expected) in reference(&spmd.logical, &weights, &inputs) {
                    let what = format!("{name} on {ranks} ranks, {rows} rows, scatter: {scatter}");
                    assert_close(&results.outputs[&*name].tensor, &expected, &what);
                }
            }
        }
    }
}

#[test]
fn runs_are_bit_stable() {
    let spmd = perceptron(3, false);
    let weights = random_weights(&spmd.logical, &mut Random::new(2));
    let inputs = [("x".to_string(), Random::new(3).tensor(F32, &[17, 8]))].into();
    let first = run(&spmd, &weights, &inputs).unwrap();
    for _ in 0..5 {
        assert_eq!(run(&spmd, &weights, &inputs).unwrap(), first);
    }
}

#[test]
fn every_conversion_brings_the_value_into_its_layout() {
    let mut random = Random::new(4);
    let u = |v: i64| Dim::constant(v);
    for ranks in 1..=4 {
        let mut g = Graph::new("conversions");
        let x = g.input("x", ty(F32, &[12, 6]));
        let y = map(&mut g, Scalar::Neg, &[x]);
        output(&mut g, "y", y);
        let mesh = Mesh::flat(ranks);
        let r = Layout::replicated(&mesh);
        let axes = || vec![0];
        let mut b = Builder::new(g, mesh);
        b.compute(x, r.clone());
        b.convert(x, shard(0, 3), Conversion::ShardSlice { axes: axes(), dim: 0, unit: u(3) });
        let redeal = Conversion::Redeal { axes: axes(), dim: 0, from_unit: u(3), to_unit: u(4) };
        b.convert(x, shard(0, 4), redeal);
        let across = Conversion::AllToAll { axes: axes(), from: 0, from_unit: u(4), to: 1, to_unit: u(1) };
        b.convert(x, shard(1, 1), across);
        b.convert(x, r.clone(), Conversion::AllGather { axes: axes(), dim: 1, unit: u(1) });
        let p = Layout(vec![AxisLayout::Partial(Monoid::Max)]);
        b.convert(x, p, Conversion::OnlyFirst { axes: axes(), monoid: Monoid::Max });
        let scatter = Conversion::ReduceScatter { axes: axes(), monoid: Monoid::Max, dim: 1, unit: u(2) };
        b.convert(x, shard(1, 2), scatter);
        b.compute(y, shard(1, 2));
        let spmd = b.finish();
        let inputs = [("x".to_string(), random.tensor(F32, &[12, 6]))].into();
        let expected = reference(&spmd.logical, &BTreeMap::new(), &inputs);
        // Taps show each family's local part.
        let parts = on_ranks(&spmd, &BTreeMap::new(), &options(), |rank, session| {
            let mut session = session.unwrap();
            let none = BTreeMap::new();
            let taps = [tpshard_ir::StepId(1), tpshard_ir::StepId(2)];
            session.run_tapped(if rank == 0 { &inputs } else { &none }, &taps).unwrap()
        });
        assert_close(&parts[0].outputs["y"].tensor, &expected[0].1, &format!("{ranks} ranks"));
        for (tap, unit) in [(0, 3), (1, 4)] {
            let rows: Vec<usize> = parts.iter().map(|p| p.taps[tap].tensor.shape()[0]).collect();
            assert_eq!(rows.iter().sum::<usize>(), 12);
            assert!(rows.iter().all(|r| r % unit == 0), "{rows:?} in units of {unit}");
            assert_eq!(parts[0].taps[tap].layout, shard(0, unit));
        }
    }
}

#[test]
fn tree_sums_do_not_depend_on_the_ranks() {
    let inputs: BTreeMap<_, _> = [("x".to_string(), Random::new(5).tensor(F32, &[13, 4]))].into();
    let mut seen: Option<Tensor> = None;
    for ranks in 1..=4 {
        let mut g = Graph::new("tree");
        let x = g.input("x", ty(F32, &[13, 4]));
        let y = g.add(Op::Reduce { monoid: Monoid::Sum, axes: vec![0] }, &[x]).unwrap();
        output(&mut g, "y", y);
        let mesh = Mesh::flat(ranks);
        let r = Layout::replicated(&mesh);
        let mut b = Builder::new(g, mesh);
        b.compute(x, shard(0, 1));
        // The reduction's value is made from the blocks by the tree.
        let blocks = b.of[&x];
        b.of.insert(y, blocks);
        b.convert(y, r, Conversion::TreeReduce { axes: vec![0], axis: 0, unit: Dim::constant(1) });
        let spmd = b.finish();
        let found = run(&spmd, &BTreeMap::new(), &inputs).unwrap().outputs["y"].tensor.clone();
        assert_close(&found, &reference(&spmd.logical, &BTreeMap::new(), &inputs)[0].1, "tree");
        assert_eq!(*seen.get_or_insert(found.clone()), found, "{ranks} ranks");
    }
}

fn run_error(inputs: BTreeMap<String, Tensor>) -> String {
    let mut spmd = perceptron(2, false);
    spmd.logical.guards.push(Guard {
        left: dim("rows"),
        relation: Relation::LessEqual,
        right: Dim::constant(50),
        reason: "`x` and `mask`".into(),
    });
    let weights = random_weights(&spmd.logical, &mut Random::new(6));
    let results = on_ranks(&spmd, &weights, &options(), |rank, session| {
        let mut session = session.unwrap();
        let none = BTreeMap::new();
        let error = session.run(if rank == 0 { &inputs } else { &none }).unwrap_err().to_string();
        // An error is no end: the next run works.
        let good = [("x".to_string(), Random::new(7).tensor(F32, &[2, 8]))].into();
        session.run(if rank == 0 { &good } else { &none }).unwrap();
        error
    });
    assert!(results[1].contains(&results[0]), "{results:?}");
    results.into_iter().next().unwrap()
}

#[test]
fn wrong_inputs_are_errors_on_every_rank_that_say_what_is_wrong() {
    let x = |dtype, shape: &[usize]| -> BTreeMap<String, Tensor> {
        [("x".to_string(), Random::new(8).tensor(dtype, shape))].into()
    };
    assert!(run_error(BTreeMap::new()).contains("input `x` is missing"));
    let error = run_error(x(DType::I64, &[2, 8]));
    assert!(error.contains("`x`") && error.contains("i64") && error.contains("f32"), "{error}");
    let error = run_error(x(F32, &[2, 9]));
    assert!(error.contains("`x`") && error.contains('9') && error.contains('8'), "{error}");
    assert!(run_error(x(F32, &[8])).contains("`x`"));
    let error = run_error(x(F32, &[101, 8]));
    assert!(error.contains("rows") && error.contains("101") && error.contains("100"), "{error}");
    assert!(run_error(x(F32, &[60, 8])).contains("`x` and `mask`"));
    let mut extra = x(F32, &[2, 8]);
    extra.insert("typo".into(), Tensor::scalar(1f32));
    let error = run_error(extra);
    assert!(error.contains("`typo`") && error.contains("the inputs are x"), "{error}");
}

#[test]
fn a_step_that_fails_on_one_rank_is_an_error_on_all() {
    let mut g = Graph::new("lookup");
    let table = weight(&mut g, "table", F32, &[6, 4]);
    let ids = g.input("ids", ty(DType::I64, &[4]));
    let y = g.add(Op::Gather { axis: 0, window: None }, &[table, ids]).unwrap();
    output(&mut g, "y", y);
    let mesh = Mesh::flat(2);
    let r = Layout::replicated(&mesh);
    let mut b = Builder::new(g, mesh);
    b.compute(table, r);
    b.compute(ids, shard(0, 1));
    b.compute(y, shard(0, 1));
    let axes = vec![0];
    b.convert(
        y,
        Layout(vec![AxisLayout::Replicated]),
        Conversion::AllGather { axes, dim: 0, unit: 1i64.into() },
    );
    let spmd = b.finish();
    let weights = random_weights(&spmd.logical, &mut Random::new(9));
    let run = |ids: [i64; 4]| {
        let inputs: BTreeMap<_, _> =
            [("ids".to_string(), Tensor::from_vec(vec![4], ids.to_vec()).unwrap())].into();
        on_ranks(&spmd, &weights, &options(), |rank, session| {
            let mut session = session.unwrap();
            let none = BTreeMap::new();
            session.run(if rank == 0 { &inputs } else { &none }).map_err(|e| e.to_string())
        })
    };
    assert!(run([0, 1, -1, 5]).iter().all(Result::is_ok));
    // Only rank 1 holds the bad index; what the inputs did is told alike by all.
    for result in run([0, 1, 2, 77]) {
        let error = result.unwrap_err();
        assert!(error.contains("gather") && error.contains("77") && error.contains("0 to 5"), "{error}");
    }
}

#[test]
fn memory_is_bounded_before_anything_runs() {
    let spmd = perceptron(2, false);
    let weights = random_weights(&spmd.logical, &mut Random::new(10));
    let inputs: BTreeMap<_, _> = [("x".to_string(), Random::new(11).tensor(F32, &[50, 8]))].into();
    let options = SessionOptions { memory_limit: Some(1000), ..options() };
    let errors = on_ranks(&spmd, &weights, &options, |rank, session| {
        let none = BTreeMap::new();
        session.unwrap().run(if rank == 0 { &inputs } else { &none }).unwrap_err()
    });
    for error in errors {
        let text = error.to_string();
        assert!(text.contains("bytes") && text.contains("limit is 1000"), "{text}");
    }
}

#[test]
fn bad_weights_are_refused_by_name() {
    let spmd = perceptron(1, false);
    let good = random_weights(&spmd.logical, &mut Random::new(12));
    let program = tpshard_ir::program::RankProgram::from_spmd(&spmd, 0).unwrap();
    let open = |change: &dyn Fn(&mut tpshard_runtime::cpu::MemoryWeights)| {
        let mut source = rank_weights(&program, &good);
        change(&mut source);
        let session =
            tpshard_runtime::session::Session::open(program.clone(), &mut source, solo(), &options());
        session.err().map(|e| e.to_string()).unwrap_or_default()
    };
    assert_eq!(open(&|_| {}), "");
    let error = open(&|s| {
        s.tensors.remove("w1");
    });
    assert!(error.contains("`w1` is missing"), "{error}");
    let error = open(&|s| {
        s.tensors.insert("w0".into(), Tensor::scalar(1f32));
    });
    assert!(error.contains("`w0`") && error.contains("f32[8, 10]"), "{error}");
    assert!(open(&|s| s.hash = Some("other".into())).contains("hash other"));
}

#[test]
fn a_program_of_another_rank_is_refused_on_all_ranks() {
    let spmd = perceptron(2, false);
    let weights = random_weights(&spmd.logical, &mut Random::new(13));
    let ends = tpshard_runtime::comm::threads(2, &Default::default()).unwrap();
    let errors: Vec<String> = std::thread::scope(|scope| {
        let handles: Vec<_> = ends
            .into_iter()
            .map(|end| scope.spawn(|| open(&spmd, 1, &weights, end, &options()).err().unwrap().to_string()))
            .collect();
        handles.into_iter().map(|h| h.join().unwrap()).collect()
    });
    assert!(errors.iter().all(|e| e.contains("started as rank 0")), "{errors:?}");
}
