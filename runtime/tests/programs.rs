//! Whole programs on one to four ranks: results equal the interpreter's, errors are values on every rank, and decoding
//! with state equals running everything at once.

mod executor;

use executor::*;
use std::collections::BTreeMap;
use tpshard_ir::layout::{AxisLayout, Layout, Mesh};
use tpshard_ir::op::{EinsumSpec, NormKind, Op, Real};
use tpshard_ir::{
    Conversion, DType, Dim, Graph, Guard, Monoid, Relation, Scalar, Spmd, StatePair, SymbolRange, Tensor,
    Type, ValueId,
};
use tpshard_runtime::comm::solo;
use tpshard_runtime::session::{SessionError, SessionOptions};
use tpshard_runtime::state::{SlotId, StateOptions};

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

/// One attention layer with a KV cache, heads split over the ranks.
fn decoder(ranks: usize) -> Spmd {
    let mut g = Graph::new("decoder");
    let open = |heads: usize| Type::new(F32, vec![dim("batch"), heads.into(), dim("past"), 3usize.into()]);
    let x = g.input("x", Type::new(F32, vec![dim("batch"), dim("seq"), 8usize.into()]));
    let past_k = g.input("past_k", open(4));
    let past_v = g.input("past_v", open(4));
    let project = |g: &mut Graph, name: &str| {
        let w = weight(g, name, F32, &[4, 8, 3]);
        (w, einsum(g, "bsk,hkd->bhsd", x, w))
    };
    let ((wq, q), (wk, k), (wv, v)) = (project(&mut g, "wq"), project(&mut g, "wk"), project(&mut g, "wv"));
    let all_k = g.add(Op::Append { axis: 2 }, &[past_k, k]).unwrap();
    let all_v = g.add(Op::Append { axis: 2 }, &[past_v, v]).unwrap();
    let op = Op::Attention {
        scale: Real(0.5),
        softcap: None,
        kv_of_head: vec![0, 1, 2, 3],
        empty_rows_zero: false,
    };
    let mixed = g.add(op, &[q, all_k, all_v]).unwrap();
    let wo = weight(&mut g, "wo", F32, &[4, 3, 8]);
    // Heads and widths are contracted one after another, since each einsum has two operands.
    let y = einsum(&mut g, "bhsd,hdk->bsk", mixed, wo);
    output(&mut g, "y", y);
    output(&mut g, "present_k", all_k);
    output(&mut g, "present_v", all_v);
    for name in ["k", "v"] {
        g.states.push(StatePair {
            input: format!("past_{name}").into(),
            output: format!("present_{name}").into(),
            axis: 2,
        });
    }
    let mesh = Mesh::flat(ranks);
    let r = Layout::replicated(&mesh);
    let mut b = Builder::new(g, mesh);
    b.compute(x, r.clone());
    for value in [past_k, past_v] {
        b.compute(value, shard(1, 1));
    }
    for value in [wq, wk, wv] {
        b.compute(value, shard(0, 1));
    }
    for value in [q, k, v, all_k, all_v, mixed] {
        b.compute(value, shard(1, 1));
    }
    b.compute(wo, shard(0, 1));
    b.compute(y, Layout(vec![AxisLayout::Partial(Monoid::Sum)]));
    b.convert(y, r, Conversion::AllReduce { axes: vec![0], monoid: Monoid::Sum });
    b.finish()
}

fn tokens(random: &mut Random, batch: usize, seq: usize) -> BTreeMap<String, Tensor> {
    [("x".to_string(), random.tensor(F32, &[batch, seq, 8]))].into()
}

fn with_state(capacity: usize, slots: usize) -> SessionOptions {
    SessionOptions { state: Some(StateOptions { capacity, slots }), ..options() }
}

#[test]
fn decoding_with_state_equals_single_shots() {
    for ranks in [1, 2, 3, 4] {
        let spmd = decoder(ranks);
        let weights = random_weights(&spmd.logical, &mut Random::new(14));
        on_ranks(&spmd, &weights, &with_state(16, 3), |rank, session| {
            let mut session = session.unwrap();
            if rank != 0 {
                return session.follow().unwrap();
            }
            let mut random = Random::new(15);
            let slots = [SlotId(7), SlotId(9)];
            let mut past: Vec<Tensor> = vec![random.tensor(F32, &[2, 4, 0, 3]); 2];
            for seq in [5, 1, 1, 3, 1] {
                let x = tokens(&mut random, 2, seq);
                let mut inputs = x.clone();
                inputs.insert("past_k".into(), past[0].clone());
                inputs.insert("past_v".into(), past[1].clone());
                let whole = session.run(&inputs).unwrap();
                let expected = reference(&spmd.logical, &weights, &inputs);
                assert_close(&whole.outputs["y"].tensor, &expected[0].1, "single shot");
                past = ["present_k", "present_v"].map(|n| whole.outputs[n].tensor.clone()).to_vec();
                let step = session.run_step(&slots, &x).unwrap();
                assert_eq!(step.outputs.keys().collect::<Vec<_>>(), ["y"]);
                assert_close(
                    &step.outputs["y"].tensor,
                    &expected[0].1,
                    &format!("step of {seq} on {ranks} ranks"),
                );
            }
            assert_eq!(session.slot_length(SlotId(9)), Some(11));
            session.close().unwrap();
        });
    }
}

#[test]
fn slots_are_truncated_forked_and_dropped_apart() {
    let spmd = decoder(2);
    let weights = random_weights(&spmd.logical, &mut Random::new(16));
    on_ranks(&spmd, &weights, &with_state(8, 3), |rank, session| {
        let mut session = session.unwrap();
        if rank != 0 {
            return session.follow().unwrap();
        }
        let mut random = Random::new(17);
        let (a, b, c) = (SlotId(1), SlotId(2), SlotId(3));
        let both = tokens(&mut random, 2, 4);
        session.run_step(&[a, b], &both).unwrap();
        session.fork(a, c).unwrap();
        session.truncate(a, 2).unwrap();
        assert_eq!([a, b, c].map(|s| session.slot_length(s)), [Some(2), Some(4), Some(4)]);
        // The fork goes on as its origin would have; so does the slot whose neighbour left.
        let next = tokens(&mut random, 2, 1);
        let joined = session.run_step(&[c, b], &next).unwrap();
        let mut inputs = next.clone();
        let empty = random.tensor(F32, &[2, 4, 0, 3]);
        let mut first = both.clone();
        first.insert("past_k".into(), empty.clone());
        first.insert("past_v".into(), empty);
        let past = session.run(&first).unwrap();
        inputs.insert("past_k".into(), past.outputs["present_k"].tensor.clone());
        inputs.insert("past_v".into(), past.outputs["present_v"].tensor.clone());
        let expected = session.run(&inputs).unwrap();
        assert_close(&joined.outputs["y"].tensor, &expected.outputs["y"].tensor, "regrouped");

        let text = |r: Result<_, SessionError>| r.map(|_: ()| ()).unwrap_err().to_string();
        let ragged = session.run_step(&[a, b], &next).map(|_| ());
        assert!(text(ragged).contains("different lengths"));
        let full = session.run_step(&[b], &tokens(&mut random, 1, 4)).map(|_| ());
        let full = text(full);
        assert!(full.contains("from 5 to 9") && full.contains("capacity is 8"), "{full}");
        let many = text(session.run_step(&[SlotId(4)], &tokens(&mut random, 1, 1)).map(|_| ()));
        assert!(many.contains("3 slots are in use"), "{many}");
        assert!(text(session.truncate(a, 5)).contains("holds 2"));
        assert!(text(session.fork(a, b)).contains("in use"));
        session.drop_slot(b).unwrap();
        assert!(text(session.drop_slot(b)).contains("holds nothing"));
        session.run_step(&[SlotId(4)], &tokens(&mut random, 1, 1)).unwrap();
        session.close().unwrap();
        assert!(matches!(session.run(&next), Err(SessionError::Closed)));
    });
}
