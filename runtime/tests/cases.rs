//! Entries of several graphs: values choose, and state goes from one graph to the other.

use std::collections::BTreeMap;
use tpshard_ir::program::RankProgram;
use tpshard_ir::{
    Case, DType, Data, Dim, Graph, Layout, Mesh, Op, Output, Scalar, Spmd, SpmdOutput, StatePair, Step,
    StepId, StepKind, Tensor, Type, ValueId,
};
use tpshard_runtime::comm::solo;
use tpshard_runtime::cpu::MemoryWeights;
use tpshard_runtime::session::{Session, SessionOptions};
use tpshard_runtime::state::{SlotId, StateOptions};

/// `present = x` where the state begins, `present = append(past, x)` where it grows; `anew` chooses.
fn of_two_graphs() -> RankProgram {
    let graph = |anew: bool| {
        let mut g = Graph::new("state");
        let ty = |grows: &str| Type::new(DType::F32, vec![Dim::symbol("b"), Dim::symbol(grows), 2i64.into()]);
        let past = g.input("past", ty("past"));
        let x = g.input("x", ty("seq"));
        let choice = Type::new(DType::Bool, vec![1i64.into()]);
        g.input("anew", choice.clone());
        let (op, args) = match anew {
            true => (Op::Map(Scalar::Neg), vec![x]),
            false => (Op::Append { axis: 1 }, vec![past, x]),
        };
        let present = g.add(op, &args).unwrap();
        let seen = g.add(Op::Map(Scalar::Neg), &[present]).unwrap();
        g.outputs.push(Output { name: "present".into(), value: present });
        g.outputs.push(Output { name: "seen".into(), value: seen });
        g.states.push(StatePair { input: "past".into(), output: "present".into(), axis: 1 });
        g.cases.push(Case { input: "anew".into(), ty: choice, value: anew });
        let mesh = Mesh::flat(1);
        let step = |value: ValueId, args: Vec<StepId>| Step {
            value,
            layout: Layout::replicated(&mesh),
            kind: StepKind::Compute,
            args,
        };
        let own = if anew { vec![StepId(1)] } else { vec![StepId(0), StepId(1)] };
        let steps =
            vec![step(past, vec![]), step(x, vec![]), step(present, own), step(seen, vec![StepId(2)])];
        let outputs = [("present", 2), ("seen", 3)]
            .map(|(name, step)| SpmdOutput { name: name.into(), step: StepId(step) })
            .to_vec();
        let spmd = Spmd { mesh, imported: g.len(), logical: g, equations: vec![], steps, outputs };
        RankProgram::from_spmd(&spmd, 0).unwrap()
    };
    let (mut program, other) = (graph(false), graph(true));
    assert_eq!(program.states, other.states);
    program.entries.extend(other.entries);
    program
}

fn ones(seq: usize) -> Tensor {
    Tensor::from_vec(vec![1, seq, 2], vec![1f32; 2 * seq]).unwrap()
}

fn choice(anew: bool) -> Tensor {
    Tensor::new(vec![1], Data::Bool(vec![anew])).unwrap()
}

#[test]
fn state_begins_by_one_graph_and_grows_by_the_other() {
    let state = Some(StateOptions { capacity: 6, slots: 1 });
    let options = SessionOptions { threads: Some(1), state, ..SessionOptions::default() };
    let weights = &mut MemoryWeights::default();
    let mut session = Session::open(of_two_graphs(), weights, solo(), &options).unwrap();
    let slots = [SlotId(0)];
    let mut step = |anew: bool, seq: usize| {
        let inputs = [("x".to_string(), ones(seq)), ("anew".to_string(), choice(anew))].into();
        let seen = session.run_step(&slots, &inputs).map(|results| results.outputs["seen"].tensor.clone());
        (seen.map(|seen| seen.as_slice::<f32>().unwrap().to_vec()), session.slot_length(SlotId(0)))
    };
    let (seen, length) = step(true, 3);
    assert_eq!((seen.unwrap(), length), (vec![1.0; 6], Some(3)));
    let (seen, length) = step(false, 2);
    assert_eq!((seen.unwrap(), length), ([[1.0; 6].as_slice(), &[-1.0; 4]].concat(), Some(5)));
    let (error, length) = step(true, 3);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("anew") && error.contains("5 entries") && error.contains("help: "), "{error}");
    assert_eq!(length, Some(5));
    // What was refused changed nothing.
    let (seen, length) = step(false, 1);
    assert_eq!((seen.unwrap(), length), ([[1.0; 6].as_slice(), &[-1.0; 6]].concat(), Some(6)));
}

#[test]
fn values_choose_the_entry_and_others_say_nothing_of_its_inputs() {
    let options = SessionOptions { threads: Some(1), ..SessionOptions::default() };
    let weights = &mut MemoryWeights::default();
    let mut session = Session::open(of_two_graphs(), weights, solo(), &options).unwrap();
    let mut run = |anew: Option<Tensor>, past: usize| {
        let mut inputs: BTreeMap<String, Tensor> =
            [("x".to_string(), ones(2)), ("past".to_string(), ones(past))].into();
        inputs.extend(anew.map(|anew| ("anew".to_string(), anew)));
        session.run(&inputs).map(|results| results.outputs["present"].tensor.shape().to_vec())
    };
    assert_eq!(run(Some(choice(true)), 3).unwrap(), [1, 2, 2]);
    assert_eq!(run(Some(choice(false)), 3).unwrap(), [1, 5, 2]);
    let missing = run(None, 3).unwrap_err().to_string();
    assert!(missing.contains("`anew` is missing") && missing.contains("bool[1]"), "{missing}");
    let number = Tensor::new(vec![1], Data::I64(vec![1])).unwrap();
    let wrong = run(Some(number), 3).unwrap_err().to_string();
    assert!(wrong.contains("i64[1]") && wrong.contains("bool[1]"), "{wrong}");
    // A program that lacks the graph for a value says so.
    let mut program = of_two_graphs();
    program.entries.truncate(1);
    let mut session = Session::open(program, weights, solo(), &options).unwrap();
    let inputs = [("x", ones(2)), ("past", ones(1)), ("anew", choice(true))];
    let inputs = inputs.map(|(name, tensor)| (name.to_string(), tensor)).into();
    let error = session.run(&inputs).unwrap_err().to_string();
    assert!(error.contains("`anew` is true"), "{error}");
}
