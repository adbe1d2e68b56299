//! Steps with state change their buffers in place.

use super::*;
use crate::comm::solo;
use crate::cpu::MemoryWeights;
use crate::session::{Session, SessionOptions};
use tpshard_ir::layout::Layout;
use tpshard_ir::{DType, Graph, Op, Output, Spmd, SpmdOutput, StatePair, Step, StepId, StepKind, ValueId};

/// `present = append(past, x)`, and its transpose, which only looks.
fn program() -> RankProgram {
    let mut g = Graph::new("state");
    let ty = |grows: &str| Type::new(DType::F32, vec![Dim::symbol("b"), Dim::symbol(grows), 2i64.into()]);
    let past = g.input("past", ty("past"));
    let x = g.input("x", ty("seq"));
    let present = g.add(Op::Append { axis: 1 }, &[past, x]).unwrap();
    let y = g.add(Op::Transpose { perm: vec![0, 2, 1] }, &[present]).unwrap();
    g.outputs.push(Output { name: "present".into(), value: present });
    g.outputs.push(Output { name: "y".into(), value: y });
    g.states.push(StatePair { input: "past".into(), output: "present".into(), axis: 1 });
    let mesh = Mesh::flat(1);
    let step = |value: u32, args: &[u32]| Step {
        value: ValueId(value),
        layout: Layout::replicated(&mesh),
        kind: StepKind::Compute,
        args: args.iter().map(|&a| StepId(a)).collect(),
    };
    let steps = vec![step(0, &[]), step(1, &[]), step(2, &[0, 1]), step(3, &[2])];
    let outputs =
        [("present", 2), ("y", 3)].map(|(n, s)| SpmdOutput { name: n.into(), step: StepId(s) }).to_vec();
    let spmd = Spmd { mesh, imported: g.len(), logical: g, equations: vec![], steps, outputs };
    RankProgram::from_spmd(&spmd, 0).unwrap()
}

fn address(session: &Session) -> *const f32 {
    match &session.state().unwrap().groups[0].tensors[0] {
        Stored::Host(tensor) => tensor.as_slice::<f32>().unwrap().as_ptr(),
        Stored::Device(_) => std::ptr::null(),
    }
}

#[test]
fn steps_append_in_place() {
    let options = SessionOptions {
        threads: Some(1),
        state: Some(StateOptions { capacity: 6, slots: 2 }),
        ..SessionOptions::default()
    };
    let mut session = Session::open(program(), &mut MemoryWeights::default(), solo(), &options).unwrap();
    let slots = [SlotId(0), SlotId(1)];
    let mut first = None;
    for step in 0..3 {
        let x = Tensor::from_vec(vec![2, 2, 2], (0..8).map(|i| (8 * step + i) as f32).collect()).unwrap();
        let inputs = BTreeMap::from([("x".to_string(), x)]);
        let results = session.run_step(&slots, &inputs).unwrap();
        let y = &results.outputs["y"].tensor;
        assert_eq!(y.shape(), [2, 2, 2 * (step + 1)]);
        assert_eq!(y.as_slice::<f32>().unwrap()[2 * step], (8 * step) as f32);
        assert_eq!(*first.get_or_insert(address(&session)), address(&session));
    }
    let x = Tensor::from_vec(vec![2, 1, 2], vec![0f32; 4]).unwrap();
    let error = session.run_step(&slots, &BTreeMap::from([("x".to_string(), x)])).unwrap_err();
    assert!(error.to_string().contains("capacity is 6"), "{error}");
}
