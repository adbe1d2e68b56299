//! What travels beside what, on tables as `codegen` writes them.

use super::*;
use crate::cuda::plan::Plan;
use tpshard_ir::program::device::pieces::PieceCounts;
use tpshard_ir::program::device::{Argument, Launch};
use tpshard_ir::program::{RankProgram, Stage};
use tpshard_ir::{
    AxisLayout, Conversion, DType, Layout, Mesh, Monoid, Op, Scalar, Spmd, SpmdOutput, Step, StepId,
    StepKind, Type,
};

/// Calls of a kernel that read values.
fn launch(reads: &[u32]) -> How {
    let one = || Dim::constant(1);
    let read = |&value: &u32| Argument::Value { value: ValueId(value), offset: Dim::constant(0) };
    let arguments = reads.iter().map(read).collect();
    How::Launch(vec![Launch { kernel: 0, blocks: [one(), one(), one()], threads: 32, shared: 0, arguments }])
}

/// A step of a program: an input, a sum over ranks, or something computed.
enum Made {
    Given,
    Summed(u32),
    Computed(&'static [u32]),
    OnHost(&'static [u32]),
    Shown(u32),
}

use Made::{Computed, Given, OnHost, Shown, Summed};

struct Tables {
    prepared: Prepared,
}

/// Values of `s` rows of 64, of which the last is the output.
fn tables(made: &[Made], pieces: Option<(u32, PieceCounts)>) -> Tables {
    let mut g = Graph::new("steps");
    let ty = || Type::new(DType::F32, vec![Dim::symbol("s"), 64i64.into()]);
    let mesh = Mesh::flat(2);
    let (replicated, partial) = (Layout::replicated(&mesh), Layout(vec![AxisLayout::Partial(Monoid::Sum)]));
    let mut logical: Vec<ValueId> = Vec::new();
    let mut steps = Vec::new();
    let mut hows = Vec::new();
    let summed = |index: usize| made.iter().any(|made| matches!(made, Summed(of) if *of as usize == index));
    for (index, step) in made.iter().enumerate() {
        let args: Vec<u32> = match step {
            Given => vec![],
            Summed(of) | Shown(of) => vec![*of],
            Computed(args) | OnHost(args) => args.to_vec(),
        };
        let of = |args: &[u32]| args.iter().map(|&a| logical[a as usize]).collect::<Vec<_>>();
        let (value, kind, how) = match step {
            Given => (g.input(&format!("x{index}"), ty()), StepKind::Compute, How::Leaf),
            Summed(from) => {
                let reduce = Conversion::AllReduce { axes: vec![0], monoid: Monoid::Sum };
                (logical[*from as usize], StepKind::Convert(reduce), How::Convert)
            }
            Computed(_) | OnHost(_) | Shown(_) => {
                let scalar = if args.len() == 2 { Scalar::Add } else { Scalar::Neg };
                let value = g.add(Op::Map(scalar), &of(&args)).unwrap();
                let how = match step {
                    Shown(of) => How::Alias(ValueId(*of)),
                    OnHost(_) => How::Host,
                    _ => launch(&args),
                };
                (value, StepKind::Compute, how)
            }
        };
        logical.push(value);
        let layout = if summed(index) { partial.clone() } else { replicated.clone() };
        steps.push(Step { value, layout, kind, args: args.into_iter().map(StepId).collect() });
        hows.push(how);
    }
    g.outputs.push(tpshard_ir::Output { name: "y".into(), value: *logical.last().unwrap() });
    let outputs = vec![SpmdOutput { name: "y".into(), step: StepId(steps.len() as u32 - 1) }];
    let spmd = Spmd { mesh, imported: g.len(), logical: g, equations: vec![], steps, outputs };
    let program = RankProgram::from_spmd(&spmd, 0).unwrap();
    let step = |(value, how)| DeviceStep {
        value: ValueId(value),
        stage: Stage::Step,
        scratch: Dim::constant(0),
        how,
    };
    let steps: Vec<DeviceStep> = (0..).zip(hows).map(step).collect();
    let cut = |(value, counts): (u32, PieceCounts)| {
        let how = steps[value as usize].how.clone();
        (ValueId(value), Pieces { rows: Dim::symbol("s"), row: Dim::constant(64), counts, how })
    };
    let lowering = DeviceLowering { pieces: pieces.into_iter().map(cut).collect(), steps };
    let prepared = Prepared::new(&program.entries[0], &lowering, &program.states).unwrap();
    Tables { prepared }
}

impl Tables {
    fn beside(&self, rows: i64) -> Beside {
        let bindings = [("s".into(), rows)].into();
        Beside::new(&self.prepared, &bindings, &|_| true, true)
    }

    /// Where every value lies.
    fn places(&self, beside: Beside) -> Vec<Option<u64>> {
        let bindings: Bindings = [("s".into(), 256)].into();
        let plan = Plan::new(&self.prepared, (bindings, beside), &|_| false, false).unwrap();
        plan.places
    }
}

fn all(set: &BTreeSet<usize>) -> Vec<usize> {
    set.iter().copied().collect()
}

#[test]
fn what_is_computed_before_the_first_use_hides_a_collective() {
    // x, a = -x, r = sum a, b = -x, shown r, y = r + b
    let tables =
        tables(&[Given, Computed(&[0]), Summed(1), Computed(&[0]), Shown(2), Computed(&[4, 3])], None);
    let beside = tables.beside(256);
    assert_eq!((all(&beside.aside), all(&beside.joins)), (vec![2], vec![5]));
    // What the collective reads is not overwritten before it is done; alone, `b` takes its place.
    let [apart, alone] = [beside, Beside::default()].map(|beside| tables.places(beside));
    assert_ne!(apart[1], apart[3]);
    assert_eq!(alone[1], alone[3]);
}

#[test]
fn where_nothing_is_computed_in_between_there_is_one_queue() {
    // x, b = -x, a = -x, r = sum a, y = r + b
    let after = tables(&[Given, Computed(&[0]), Computed(&[0]), Summed(2), Computed(&[3, 1])], None);
    assert_eq!(after.beside(256), Beside::default());
    // The host waits for everything that comes before what it computes.
    let host = tables(&[Given, Computed(&[0]), Summed(1), OnHost(&[0]), Computed(&[2, 3])], None);
    assert_eq!(host.beside(256), Beside::default());
    // To show a value in another shape is no use of it, and no work.
    let shown = tables(&[Given, Computed(&[0]), Summed(1), Shown(2), Computed(&[3, 0])], None);
    assert_eq!(shown.beside(256), Beside::default());
}

#[test]
fn collectives_keep_their_order() {
    // The second is used at once, but must not overtake the first.
    let made =
        [Given, Computed(&[0]), Summed(1), Computed(&[0]), Summed(3), Computed(&[4, 0]), Computed(&[2, 5])];
    let tables = tables(&made, None);
    let beside = tables.beside(256);
    assert_eq!((all(&beside.aside), all(&beside.joins)), (vec![2, 4], vec![5]));
    // What has to be in the main queue comes when the other is empty; step 3 is computed beside the first.
    let beside = Beside::new(&tables.prepared, &[("s".into(), 256)].into(), &|step| step != 4, true);
    assert_eq!((all(&beside.aside), all(&beside.joins)), (vec![2], vec![4]));
}

#[test]
fn an_output_is_waited_for_at_the_end() {
    let made = [Given, Computed(&[0]), Summed(1), Computed(&[0])];
    let tables = tables(&made, None);
    let beside = tables.beside(256);
    assert_eq!((all(&beside.aside), all(&beside.joins)), (vec![2], vec![4]));
}

#[test]
fn pieces_are_taken_from_as_many_rows_on_as_the_table_says() {
    let made = || [Given, Computed(&[0]), Computed(&[1]), Summed(2), Computed(&[3, 0])];
    let tables = tables(&made(), Some((2, vec![(256, 2), (1024, 4)])));
    assert_eq!(tables.beside(255), Beside::default());
    for (rows, pieces) in [(256, vec![128; 2]), (1000, vec![384, 616]), (1024, vec![256; 4])] {
        let beside = tables.beside(rows);
        assert_eq!(beside.pieces(3), Some(pieces.as_slice()), "{rows}");
        assert_eq!((all(&beside.aside), all(&beside.joins)), (vec![3], vec![4]));
    }
    // The operand of a product in pieces is read while they are summed.
    let [cut, whole] = [tables.beside(256), Beside::default()].map(|beside| tables.places(beside));
    assert_ne!(cut[1], cut[3]);
    assert_eq!(whole[1], whole[3]);
    // All ranks take pieces, or none.
    let bindings = [("s".into(), 1024)].into();
    assert_eq!(Beside::new(&tables.prepared, &bindings, &|_| true, false), Beside::default());
    assert_eq!(described("main", &tables.prepared), "main/%3 [(256, 2), (1024, 4)]\n");
}

#[test]
fn it_can_be_switched_off() {
    for (said, wanted) in [(None, true), (Some(""), true), (Some("on"), true), (Some("off"), false)] {
        assert_eq!(is_wanted(said).unwrap(), wanted);
    }
    let error = is_wanted(Some("no")).unwrap_err().to_string();
    assert!(error.contains("TPSHARD_CUDA_OVERLAP=no") && error.contains("help: say on or off"), "{error}");
}
