//! What sessions make of inputs that are given in another form than their types say, and of outputs that follow.

use std::collections::BTreeMap;
use tpshard_ir::program::RankProgram;
use tpshard_ir::{
    AxisLayout, Border, DType, Dim, Filling, Graph, Layout, Mesh, Op, Output, Scalar, Spmd, SpmdOutput,
    StatePair, Step, StepId, StepKind, SymbolRange, Tensor, Type, ValueId,
};
use tpshard_runtime::comm::solo;
use tpshard_runtime::cpu::MemoryWeights;
use tpshard_runtime::session::{Results, Session, SessionError, SessionOptions};
use tpshard_runtime::state::{SlotId, StateOptions};

/// `present = append(past, x)` and `y = present + mask`, where the mask may have one entry and the past room.
fn program() -> RankProgram {
    let mut g = Graph::new("borders");
    let (past, seq) = (Dim::symbol("past"), Dim::symbol("seq"));
    let sizes = SymbolRange { low: 0, high: 64 };
    g.symbols = [("past".into(), sizes), ("seq".into(), sizes)].into();
    let total = &past + &seq;
    let ty = |length: Dim| Type::new(DType::F32, vec![1i64.into(), length, 2i64.into()]);
    let past = g.input("past", ty(past));
    let x = g.input("x", ty(seq));
    let mask = g.input("mask", Type::new(DType::F32, vec![1i64.into(), total.clone(), 1i64.into()]));
    let present = g.add(Op::Append { axis: 1 }, &[past, x]).unwrap();
    let y = g.add(Op::Map(Scalar::Add), &[present, mask]).unwrap();
    g.outputs =
        [("present", present), ("y", y)].map(|(name, value)| Output { name: name.into(), value }).to_vec();
    g.states.push(StatePair { input: "past".into(), output: "present".into(), axis: 1 });
    g.borders = vec![
        Border::Stretch { input: "mask".into(), axis: 1, filling: Filling::Repeat },
        Border::Buffer { input: "past".into(), output: "present".into(), axis: 1, total },
    ];
    tpshard_ir::verify(g.clone()).unwrap();
    let mesh = Mesh::flat(1);
    let step = |value: ValueId, args: &[u32]| Step {
        value,
        layout: Layout::replicated(&mesh),
        kind: StepKind::Compute,
        args: args.iter().copied().map(StepId).collect(),
    };
    let steps =
        vec![step(past, &[]), step(x, &[]), step(mask, &[]), step(present, &[0, 1]), step(y, &[3, 2])];
    let outputs = [("present", 3), ("y", 4)]
        .map(|(name, step)| SpmdOutput { name: name.into(), step: StepId(step) })
        .to_vec();
    let spmd = Spmd { mesh, imported: g.len(), logical: g, equations: vec![], steps, outputs };
    RankProgram::from_spmd(&spmd, 0).unwrap()
}

fn tensor(shape: [usize; 3], values: &[f32]) -> Tensor {
    Tensor::from_vec(shape.to_vec(), values.to_vec()).unwrap()
}

fn inputs(given: &[(&str, Tensor)]) -> BTreeMap<String, Tensor> {
    given.iter().map(|(name, tensor)| ((*name).to_owned(), tensor.clone())).collect()
}

fn run(program: RankProgram, given: &[(&str, Tensor)]) -> Result<Results, SessionError> {
    let options = SessionOptions { threads: Some(1), ..SessionOptions::default() };
    let mut session = Session::open(program, &mut MemoryWeights::default(), solo(), &options).unwrap();
    session.run(&inputs(given))
}

#[test]
fn a_mask_is_stretched_and_a_past_cut_and_filled_up() {
    let x = ("x", tensor([1, 1, 2], &[5.0, 6.0]));
    let past = ("past", tensor([1, 2, 2], &[1.0, 2.0, 3.0, 4.0]));
    let results = run(program(), &[x.clone(), past, ("mask", tensor([1, 1, 1], &[10.0]))]).unwrap();
    assert_eq!(results.outputs["y"].tensor, tensor([1, 3, 2], &[11.0, 12.0, 13.0, 14.0, 15.0, 16.0]));

    let buffer = ("past", tensor([1, 4, 2], &[1.0, 2.0, 3.0, 4.0, 9.0, 9.0, 9.0, 9.0]));
    let given = [x.clone(), buffer, ("mask", tensor([1, 3, 1], &[0.0, 10.0, 20.0]))];
    let results = run(program(), &given).unwrap();
    assert_eq!(results.outputs["y"].tensor, tensor([1, 3, 2], &[1.0, 2.0, 13.0, 14.0, 25.0, 26.0]));
    let present = tensor([1, 4, 2], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.0, 0.0]);
    assert_eq!(results.outputs["present"].tensor, present);

    // Five entries do not fit a past of three and one that is new.
    let past = ("past", tensor([1, 3, 2], &[0.0; 6]));
    let error = run(program(), &[x, past, ("mask", tensor([1, 5, 1], &[0.0; 5]))]).unwrap_err();
    assert!(error.to_string().contains("`mask`"), "{error}");
}

#[test]
fn a_present_that_stays_sharded_is_not_filled_up() {
    let mut program = program();
    let port = &mut program.entries[0].outputs[0];
    (port.keep_sharded, port.layout) = (true, Layout(vec![AxisLayout::shard(2, 1usize)]));
    let given = [
        ("x", tensor([1, 1, 2], &[5.0, 6.0])),
        ("past", tensor([1, 4, 2], &[0.0; 8])),
        ("mask", tensor([1, 3, 1], &[0.0; 3])),
    ];
    let error = run(program, &given).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    let text = error.to_string();
    assert!(text.contains("`present` stays sharded") && text.contains("help: "), "{text}");
}

#[test]
fn a_mask_of_one_entry_goes_with_state_that_stays() {
    let state = Some(StateOptions { capacity: 6, slots: 1 });
    let options = SessionOptions { threads: Some(1), state, ..SessionOptions::default() };
    let mut session = Session::open(program(), &mut MemoryWeights::default(), solo(), &options).unwrap();
    let mut step = |mask: f32| {
        let given = [("x", tensor([1, 1, 2], &[1.0, 2.0])), ("mask", tensor([1, 1, 1], &[mask]))];
        session.run_step(&[SlotId(0)], &inputs(&given)).unwrap().outputs["y"].tensor.clone()
    };
    assert_eq!(step(3.0), tensor([1, 1, 2], &[4.0, 5.0]));
    assert_eq!(step(4.0), tensor([1, 2, 2], &[5.0, 6.0, 5.0, 6.0]));
}
