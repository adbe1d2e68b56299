//! State that stays with the ranks: decoding with it equals running everything at once, slots step together whatever
//! their lengths, and what cannot be done leaves them as they were.

mod executor;

use executor::*;
use std::collections::BTreeMap;
use tpshard_ir::layout::{AxisLayout, Layout, Mesh};
use tpshard_ir::op::{EinsumSpec, Op, Real};
use tpshard_ir::{
    Conversion, DType, Dim, Graph, Guard, Monoid, Relation, Spmd, StatePair, SymbolRange, Tensor, Type,
    ValueId,
};
use tpshard_runtime::session::{Session, SessionError, SessionOptions};
use tpshard_runtime::state::{SlotId, StateOptions};

const F32: DType = DType::F32;

fn einsum(graph: &mut Graph, spec: &str, a: ValueId, b: ValueId) -> ValueId {
    graph.add(Op::Einsum(EinsumSpec::parse(spec).unwrap()), &[a, b]).unwrap()
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

/// State that is appended to, an attention mask over all entries, indices into a table, and a scale for all slots.
fn recorder(ranks: usize, batch: &Dim, more_outputs: bool) -> Spmd {
    let mut g = Graph::new("recorder");
    let ty = |dtype, dims: &[Dim]| Type::new(dtype, [std::slice::from_ref(batch), dims].concat());
    let two = Dim::from(2usize);
    let past = g.input("past", ty(F32, &[dim("past"), two.clone()]));
    let x = g.input("x", ty(F32, &[dim("seq"), two.clone()]));
    let mask = g.input("mask", ty(F32, &[dim("total")]));
    let ids = g.input("ids", ty(DType::I64, &[dim("seq")]));
    let scale = g.input("scale", Type::new(F32, vec![two]));
    let table = weight(&mut g, "table", F32, &[6, 2]);
    let present = g.add(Op::Append { axis: 1 }, &[past, x]).unwrap();
    let scaled = g.add(Op::Map(tpshard_ir::Scalar::Mul), &[present, scale]).unwrap();
    let seen = g.add(Op::Map(tpshard_ir::Scalar::Neg), &[mask]).unwrap();
    let found = g.add(Op::Gather { axis: 0, window: None }, &[table, ids]).unwrap();
    output(&mut g, "present", present);
    output(&mut g, "scaled", scaled);
    output(&mut g, "seen", seen);
    output(&mut g, "found", found);
    if more_outputs {
        let without_rows = g.add(Op::Map(tpshard_ir::Scalar::Neg), &[scale]).unwrap();
        output(&mut g, "without_rows", without_rows);
    }
    g.states.push(StatePair { input: "past".into(), output: "present".into(), axis: 1 });
    g.symbols.insert("past".into(), SymbolRange { low: 0, high: 100 });
    g.guards.push(Guard {
        left: dim("total"),
        relation: Relation::Equal,
        right: dim("past") + dim("seq"),
        reason: "`mask` and `past`".into(),
    });
    replicated(g, ranks)
}

fn filled(shape: &[usize], value: impl Fn(usize) -> f32) -> Tensor {
    Tensor::from_vec(shape.to_vec(), (0..shape.iter().product()).map(value).collect()).unwrap()
}

/// One new entry for each slot; the mask says which slot a row is for.
fn recorded(slots: &[usize], total: usize, ids: &[i64]) -> BTreeMap<String, Tensor> {
    let n = slots.len();
    BTreeMap::from([
        ("x".into(), filled(&[n, 1, 2], |i| (10 * slots[i / 2] + i % 2) as f32)),
        ("mask".into(), filled(&[n, total], |i| (100 * slots[i / total] + i % total) as f32)),
        ("ids".into(), Tensor::from_vec(vec![n, 1], ids.to_vec()).unwrap()),
        ("scale".into(), filled(&[2], |_| 2.0)),
    ])
}

fn lead(
    spmd: &Spmd,
    capacity: usize,
    slots: usize,
    body: impl Fn(&mut Session, &dyn Fn(&Session) -> String) + Sync,
) {
    let weights = random_weights(&spmd.logical, &mut Random::new(18));
    on_ranks(spmd, &weights, &with_state(capacity, slots), |rank, session| {
        let mut session = session.unwrap();
        if rank != 0 {
            return session.follow().unwrap();
        }
        let held = |session: &Session| {
            let lengths =
                (0..6).map(|s| session.slot_length(SlotId(s)).map_or("-".into(), |l| l.to_string()));
            lengths.collect::<Vec<String>>().join(" ")
        };
        body(&mut session, &held);
        session.close().unwrap();
    });
}

#[test]
fn slots_of_different_lengths_step_together() {
    for batch in [dim("batch"), Dim::from(1usize)] {
        for ranks in [1, 2, 3] {
            lead(&recorder(ranks, &batch, false), 8, 4, |session, held| {
                // Slot 1 gets two entries, slot 2 one, slot 0 none.
                session.run_step(&[SlotId(1)], &recorded(&[1], 1, &[0])).unwrap();
                session.run_step(&[SlotId(1)], &recorded(&[1], 2, &[0])).unwrap();
                session.run_step(&[SlotId(2)], &recorded(&[2], 1, &[0])).unwrap();
                assert_eq!(held(session), "- 2 1 - - -");
                let slots = [2, 1, 0, 3].map(SlotId);
                let found = session.run_step(&slots, &recorded(&[2, 1, 0, 3], 3, &[5, 4, 3, 2])).unwrap();
                assert_eq!(held(session), "1 3 2 1 - -");
                let floats = |name: &str| {
                    let tensor = &found.outputs[name].tensor;
                    (tensor.shape().to_vec(), tensor.as_slice::<f32>().unwrap().to_vec())
                };
                // What shorter slots do not reach is zero.
                assert_eq!(
                    floats("scaled"),
                    (
                        vec![4, 3, 2],
                        [
                            [40., 42., 40., 42., 0., 0.],
                            [20., 22., 20., 22., 20., 22.],
                            [0., 2., 0., 0., 0., 0.],
                            [60., 62., 0., 0., 0., 0.],
                        ]
                        .concat()
                    )
                );
                assert_eq!(
                    floats("seen"),
                    (vec![4, 3], vec![-200., -201., 0., -100., -101., -102., 0., 0., 0., -300., 0., 0.])
                );
                assert_eq!(found.outputs["found"].tensor.shape(), [4, 1, 2]);
                // The others go on where they were.
                session.drop_slot(SlotId(1)).unwrap();
                session.truncate(SlotId(2), 1).unwrap();
                session.run_step(&[SlotId(0), SlotId(2)], &recorded(&[0, 2], 2, &[0, 1])).unwrap();
                assert_eq!(held(session), "2 - 2 1 - -");
            });
        }
    }
}

#[test]
fn a_step_that_fails_changes_no_slot() {
    let text = |r: Result<tpshard_runtime::session::Results, SessionError>| r.unwrap_err().to_string();
    for ranks in [1, 2] {
        lead(&recorder(ranks, &dim("batch"), false), 3, 3, |session, held| {
            for length in 1..4 {
                session.run_step(&[SlotId(0)], &recorded(&[0], length, &[0])).unwrap();
            }
            session.run_step(&[SlotId(1)], &recorded(&[1], 1, &[0])).unwrap();
            let before = "3 1 - - - -";
            // Slot 0 is full, so that slot 1 may not step either.
            let full = text(session.run_step(&[SlotId(1), SlotId(0)], &recorded(&[1, 0], 4, &[0, 0])));
            assert!(full.contains("from 3 to 4") && full.contains("capacity is 3"), "{full}");
            assert_eq!(held(session), before);
            // Slot 2 is new and runs first; what fails is the part of slot 1.
            let both = [SlotId(1), SlotId(2)];
            let index = text(session.run_step(&both, &recorded(&[1, 2], 2, &[77, 0])));
            assert!(index.contains("77"), "{index}");
            assert_eq!(held(session), before);
            let found = session.run_step(&both, &recorded(&[1, 2], 2, &[1, 0])).unwrap();
            assert_eq!(held(session), "3 2 1 - - -");
            let scaled = found.outputs["scaled"].tensor.as_slice::<f32>().unwrap();
            assert_eq!(scaled, [20., 22., 20., 22., 40., 42., 0., 0.]);

            let twice = text(session.run_step(&[SlotId(1), SlotId(1)], &recorded(&[1, 1], 3, &[0, 0])));
            assert!(twice.contains("slot 1 is named twice") && twice.contains("help: "), "{twice}");
            let none = text(session.run_step(&[], &recorded(&[1], 3, &[0])));
            assert!(none.contains("without slots"), "{none}");
            let rows = text(session.run_step(&[SlotId(1), SlotId(2)], &recorded(&[1, 2, 2], 3, &[0, 0, 0])));
            assert!(rows.contains("has 3 rows for 2 slots") && rows.contains("help: "), "{rows}");
            let short = text(session.run_step(&[SlotId(1), SlotId(2)], &recorded(&[1, 2], 2, &[0, 0])));
            assert!(short.contains("mask"), "{short}");
            let many = text(session.run_step(&[SlotId(0), SlotId(3)], &recorded(&[0, 3], 3, &[0, 0])));
            assert!(many.contains("1 more exceed the 3 declared"), "{many}");
            assert_eq!(held(session), "3 2 1 - - -");
        });
    }
}

#[test]
fn a_model_that_always_takes_so_many_slots_gets_so_many() {
    lead(&recorder(2, &Dim::from(2usize), false), 8, 4, |session, held| {
        let all = [0, 1, 2, 3].map(SlotId);
        session.run_step(&all[..2], &recorded(&[0, 1], 1, &[0, 0])).unwrap();
        assert_eq!(held(session), "1 1 - - - -");
        // Two of one length and two of another, in any order.
        let mixed = [2, 0, 3, 1].map(SlotId);
        let found = session.run_step(&mixed, &recorded(&[2, 0, 3, 1], 2, &[0, 0, 0, 0])).unwrap();
        assert_eq!(held(session), "2 2 1 1 - -");
        let seen = found.outputs["seen"].tensor.as_slice::<f32>().unwrap();
        assert_eq!(seen, [-200., 0., 0., -1., -300., 0., -100., -101.]);
        let error = session.run_step(&all[1..3], &recorded(&[1, 2], 3, &[0, 0])).unwrap_err().to_string();
        assert!(error.contains("always steps 2 slots at once") && error.contains("help: "), "{error}");
        assert_eq!(held(session), "2 2 1 1 - -");
    });
}

#[test]
fn outputs_without_rows_keep_ragged_slots_apart() {
    lead(&recorder(2, &dim("batch"), true), 8, 3, |session, held| {
        session.run_step(&[SlotId(0)], &recorded(&[0], 1, &[0])).unwrap();
        let error = session.run_step(&[SlotId(0), SlotId(1)], &recorded(&[0, 1], 2, &[0, 0])).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("`without_rows`") && text.contains("help: step them one after another"),
            "{text}"
        );
        assert_eq!(held(session), "1 - - - - -");
    });
}

/// A slot after some steps on `ranks` ranks, saved, and the result of one step more.
fn saved(ranks: usize, loaded: Option<&[u8]>) -> (Vec<u8>, Tensor) {
    let spmd = decoder(ranks);
    let weights = random_weights(&spmd.logical, &mut Random::new(19));
    let results = on_ranks(&spmd, &weights, &with_state(9, 3), |rank, session| {
        let mut session = session.unwrap();
        if rank != 0 {
            session.follow().unwrap();
            return None;
        }
        let mut random = Random::new(20);
        let (a, b) = (SlotId(1), SlotId(2));
        let first = tokens(&mut random, 2, 4);
        let next = tokens(&mut random, 1, 1);
        match loaded {
            Some(bytes) => {
                session.load_slot(b, bytes).unwrap();
                let text = session.load_slot(b, bytes).unwrap_err().to_string();
                assert!(text.contains("slot 2 is in use"), "{text}");
            }
            None => _ = session.run_step(&[a, b], &first).unwrap(),
        }
        assert_eq!(session.slot_length(b), Some(4));
        let bytes = session.save_slot(b).unwrap();
        let text = session.save_slot(SlotId(5)).unwrap_err().to_string();
        assert!(text.contains("slot 5 holds nothing"), "{text}");
        let y = session.run_step(&[b], &next).unwrap().outputs["y"].tensor.clone();
        session.close().unwrap();
        Some((bytes, y))
    });
    results.into_iter().next().unwrap().unwrap()
}

#[test]
fn saved_slots_load_on_any_number_of_ranks() {
    let (alone, y) = saved(1, None);
    for ranks in 1..=4 {
        let (again, next) = saved(ranks, Some(&alone));
        assert!(again == alone, "what was loaded on {ranks} ranks is saved as it was");
        assert_close(&next, &y, &format!("loaded on {ranks} ranks"));
        let (there, _) = saved(ranks, None);
        assert_eq!(there.len(), alone.len());
        let (_, next) = saved(1, Some(&there));
        assert_close(&next, &y, &format!("saved on {ranks} ranks"));
    }
}

#[test]
fn what_is_no_saved_slot_is_refused() {
    let (bytes, _) = saved(2, None);
    let spmd = decoder(2);
    let weights = random_weights(&spmd.logical, &mut Random::new(21));
    let load = |capacity: usize, bytes: &[u8]| {
        let errors = on_ranks(&spmd, &weights, &with_state(capacity, 1), |rank, session| {
            let mut session = session.unwrap();
            if rank != 0 {
                session.follow().unwrap();
                return String::new();
            }
            let error = session.load_slot(SlotId(0), bytes).err().map(|e| e.to_string()).unwrap_or_default();
            assert_eq!(session.slot_length(SlotId(0)).is_none(), !error.is_empty());
            session.close().unwrap();
            error
        });
        errors.into_iter().next().unwrap()
    };
    assert_eq!(load(4, &bytes), "");
    let small = load(3, &bytes);
    assert!(small.contains("4 entries were saved, the capacity is 3") && small.contains("help: "), "{small}");
    for broken in [&b""[..], b"no", &bytes[..40], &bytes[..bytes.len() - 1]] {
        assert!(load(4, broken).contains("cannot be loaded"));
    }
    let header = String::from_utf8_lossy(&bytes[..200]).into_owned();
    assert!(header.contains("past_k") && header.contains("tpshard_state_length"), "{header}");
    let change = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
        let mut changed = bytes.clone();
        changed[at..at + from.len()].copy_from_slice(to.as_bytes());
        load(4, &changed)
    };
    assert!(change("past_k", "past_q").contains("lacks `past_k`"));
    assert!(change("tpshard_state_length", "tpshard_state_lenght").contains("no saved slot"));
    assert!(change("\"4\"", "\"3\"").contains("`past_k` is f32[1, 4, 4, 3]"));
    assert!(change("\"4\"", "\"x\"").contains("`x` is not a number"));
    assert!(change("\"F32\"", "\"I32\"").contains("`past_k` is i32"));
}

#[test]
fn sessions_without_state_say_so() {
    let spmd = decoder(1);
    let weights = random_weights(&spmd.logical, &mut Random::new(22));
    let mut session = open(&spmd, 0, &weights, tpshard_runtime::comm::solo(), &options()).unwrap();
    for error in [session.save_slot(SlotId(0)).map(|_| ()), session.load_slot(SlotId(0), b"")] {
        assert!(error.unwrap_err().to_string().contains("keeps no state"));
    }
}
