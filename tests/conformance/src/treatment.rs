//! One run of a test: import, plan, check the certificate, execute all ranks as threads, compare with the suite.

use crate::data::Pair;
use crate::outcome::{Form, Outcome, Verdict};
use crate::suite::Test;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use tpshard_codegen::build::{entry, planned_weights};
use tpshard_frontend::deferred::OnnxEvaluator;
use tpshard_frontend::error::ErrorKind;
use tpshard_frontend::{ImportError, ImportOptions, Imported, import};
use tpshard_ir::deferred::SharedEvaluator;
use tpshard_ir::interp::{Domain, OpError, Real, eval_weight};
use tpshard_ir::program::{Determinism, RankProgram};
use tpshard_ir::{DType, Spmd, StepKind, Tensor};
use tpshard_passes::cost::Profile;
use tpshard_passes::extended::Extended;
use tpshard_passes::{Plan, PlanOptions, canonical, plan};
use tpshard_runtime::comm::{CommOptions, Communicator, threads};
use tpshard_runtime::cpu::MemoryWeights;
use tpshard_runtime::io::{NamedTensors, Tolerance, Tolerances, compare};
use tpshard_runtime::session::{Results, Session, SessionOptions};

/// The machine that is planned for; with everything split it does not matter.
const PROFILE: &str = "cpu-shm";
/// Most elements of a weight, and most bytes of a run.
const ELEMENT_LIMIT: usize = 1 << 30;
const MEMORY_LIMIT: u64 = 6 << 30;

/// What stands in the way of a comparison.
pub(crate) struct Obstacle(Verdict, String);

fn failed(error: impl std::fmt::Display) -> Obstacle {
    Obstacle(Verdict::Failed, error.to_string())
}

/// Imports the model of one form of a test.
pub(crate) fn imported(model: &Path) -> Result<Imported, Obstacle> {
    import(model, &ImportOptions::default()).map_err(|error| refusal(&error))
}

/// The importer's first reason. Models of the suite are valid: to call one invalid is a failure, not a refusal.
fn refusal(error: &ImportError) -> Obstacle {
    let Some(fault) = error.faults.first() else { return failed(error) };
    let node = fault.site.node.as_ref().map_or_else(String::new, |node| format!("{}: ", node.op_type));
    let verdict = if fault.kind == ErrorKind::Unsupported { Verdict::Refused } else { Verdict::Failed };
    Obstacle(verdict, format!("{node}{}", fault.message))
}

/// Runs an imported model on `ranks` ranks with every pair, on a GPU if `cuda` says so.
pub(crate) fn run(
    imported: &Imported,
    test: &Test,
    pairs: &[Pair],
    form: Form,
    ranks: usize,
    cuda: bool,
) -> Outcome {
    let mut outcome = Outcome::new(form, ranks, Verdict::Pass, "");
    let done = planned(imported, ranks).and_then(|plan| {
        for (_, program) in &plan.programs {
            count(program, &mut outcome);
        }
        pairs.iter().try_for_each(|pair| compared(imported, &plan, test, pair, cuda))
    });
    match done {
        Ok(()) => outcome,
        Err(obstacle) => obstacle.outcome(form, ranks),
    }
}

impl Obstacle {
    pub(crate) fn outcome(&self, form: Form, ranks: usize) -> Outcome {
        Outcome::new(form, ranks, self.0, &self.1)
    }
}

fn planned(imported: &Imported, ranks: usize) -> Result<Plan, Obstacle> {
    let profile = Profile::built_in(PROFILE).map_err(failed)?;
    let options = PlanOptions { split_all: ranks > 1, ..PlanOptions::new(ranks, profile) };
    let mut extended = Extended::new(imported.graph.clone());
    canonical::canonicalise(&mut extended);
    let plan = plan(extended, &options).map_err(|e| failed(format!("planner: {e}")))?;
    for (_, program) in &plan.programs {
        tpshard_checker::check(program, &imported.graph).map_err(|findings| {
            failed(format!("checker: {}", findings.first().map(ToString::to_string).unwrap_or_default()))
        })?;
    }
    Ok(plan)
}

fn count(program: &Spmd, outcome: &mut Outcome) {
    for step in &program.steps {
        outcome.split += usize::from(!step.layout.is_replicated());
        if let StepKind::Convert(conversion) = &step.kind {
            outcome.collectives += usize::from(conversion.communicates());
        }
    }
}

fn compared(imported: &Imported, plan: &Plan, test: &Test, pair: &Pair, cuda: bool) -> Result<(), Obstacle> {
    let ranks = plan.programs.first().map_or(1, |(_, program)| program.mesh.ranks());
    let mut programs = (0..ranks).map(|rank| rank_program(plan, rank)).collect::<Result<Vec<_>, _>>()?;
    if cuda {
        programs.iter_mut().for_each(|program| tpshard_codegen::cuda::attach(program, &[]));
    }
    let mut inputs = BTreeMap::new();
    let graph = &imported.model.graph;
    // Data may be given for the inputs that have no default.
    let given =
        |name: &str| pair.inputs.len() == graph.inputs.len() || !graph.initializers.contains_key(name);
    let declared = graph.inputs.iter().filter(|declared| given(&declared.name));
    for (declared, tensor) in declared.zip(&pair.inputs) {
        let used = |program: &RankProgram| {
            program.entries.iter().any(|e| e.inputs.iter().any(|p| *p.name == *declared.name))
        };
        if programs.iter().any(used) {
            inputs.insert(declared.name.clone(), tensor.clone());
        }
    }
    let results = execute(imported, programs, &inputs)?;
    let got: NamedTensors = results.outputs.into_iter().map(|(name, output)| (name, output.tensor)).collect();
    let names = imported.model.graph.outputs.iter().map(|o| o.name.clone());
    let expected: NamedTensors = names.zip(pair.outputs.iter().cloned()).collect();
    let compared = compare(&got, &expected, &tolerances(test, &expected));
    match compared.outputs.iter().find(|output| !output.passed()) {
        None if compared.passed() => Ok(()),
        None => Err(Obstacle(Verdict::Failed, "no outputs to compare".into())),
        Some(output) => Err(Obstacle(Verdict::Wrong, output.to_string())),
    }
}

/// How many times the spacing of its element type an output may be off, as a share of the largest element: in narrow
/// types that is more than the share a test asks for. What the exact result is rounded to on the way depends on where an
/// implementation keeps more bits than the model says.
const SPACINGS: f64 = 2.0;

/// The distance from 1 to the next number of the type.
fn spacing(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 2f64.powi(-10),
        DType::BF16 => 2f64.powi(-7),
        _ => 0.0,
    }
}

/// The test's tolerances, with absolute ones by the size of what is expected where the test asks for them.
fn tolerances(test: &Test, expected: &NamedTensors) -> Tolerances {
    let mut tolerances = Tolerances::new(test.atol, test.rtol);
    for (name, tensor) in expected.iter().filter(|(_, tensor)| tensor.dtype().is_float()) {
        let Some(share) = test.share else { break };
        let numbers = Real.import(tensor);
        let sizes = numbers.elements().iter().map(|n| n.float().abs()).filter(|size| size.is_finite());
        let share = share.max(SPACINGS * spacing(tensor.dtype()));
        let value = test.atol.max(share * sizes.fold(0.0, f64::max));
        tolerances.set_atol(Tolerance { output: Some(name.clone()), value });
    }
    tolerances
}

fn rank_program(plan: &Plan, rank: usize) -> Result<RankProgram, Obstacle> {
    let entries = plan
        .programs
        .iter()
        .map(|(name, program)| entry(program, rank, name).map_err(failed))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(RankProgram {
        rank,
        mesh: plan.report.mesh.clone(),
        determinism: Determinism::Fast,
        states: entries.first().map(tpshard_ir::program::Entry::states).unwrap_or_default(),
        entries,
        weights: planned_weights(&plan.programs, rank).map_err(failed)?,
        device: None,
        weights_hash: String::new(),
        program_hash: String::new(),
    })
}

/// Runs all ranks once, each on a thread; the results of rank 0.
fn execute(
    imported: &Imported,
    programs: Vec<RankProgram>,
    inputs: &BTreeMap<String, Tensor>,
) -> Result<Results, Obstacle> {
    let ends = threads(programs.len(), &CommOptions::default()).map_err(failed)?;
    let results: Vec<Result<Results, Obstacle>> = thread::scope(|scope| {
        let ranks = programs.into_iter().zip(ends);
        let handles: Vec<_> =
            ranks.map(|(program, end)| scope.spawn(|| rank(imported, program, end, inputs))).collect();
        let joined = handles.into_iter().map(|handle| {
            handle.join().unwrap_or_else(|panic| Err(Obstacle(Verdict::Crash, panic_text(&*panic))))
        });
        joined.collect()
    });
    // A rank that panicked leaves the others with a failed collective only.
    let mut first = None;
    for (index, result) in results.into_iter().enumerate() {
        match result {
            Ok(result) if index == 0 => first = Some(Ok(result)),
            Ok(_) => {}
            Err(obstacle) if obstacle.0 == Verdict::Crash => return Err(obstacle),
            Err(obstacle) => first = first.filter(Result::is_err).or(Some(Err(obstacle))),
        }
    }
    first.unwrap_or_else(|| Err(failed("no ranks")))
}

fn rank(
    imported: &Imported,
    program: RankProgram,
    end: Box<dyn Communicator>,
    inputs: &BTreeMap<String, Tensor>,
) -> Result<Results, Obstacle> {
    let initializer = |name: &str| -> Result<Tensor, OpError> {
        let missing = |what: String| OpError::Other(what);
        let tensor = imported.tensors.get(name).ok_or_else(|| missing(format!("no initializer `{name}`")))?;
        imported.model.storage.to_tensor(tensor).map_err(|e| missing(e.to_string()))
    };
    let mut weights = MemoryWeights::default();
    for weight in &program.weights {
        let tensor = eval_weight(&weight.expr, &initializer, ELEMENT_LIMIT).map_err(failed)?;
        weights.tensors.insert(weight.name.clone(), tensor);
    }
    let options = SessionOptions {
        threads: Some(1),
        memory_limit: Some(MEMORY_LIMIT),
        evaluator: SharedEvaluator(Some(Arc::new(OnnxEvaluator::default()))),
        ..SessionOptions::default()
    };
    let mut session = Session::open(program, &mut weights, end, &options).map_err(failed)?;
    let results = session.run(inputs).map_err(failed)?;
    session.close().map_err(failed)?;
    Ok(results)
}

/// What a panic said.
pub(crate) fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    format!("panic: {}", text.unwrap_or("without message"))
}
