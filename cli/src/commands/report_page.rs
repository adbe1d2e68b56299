//! What `report.html` is told: the plan, the steps of its programs, and plans for other numbers of ranks.

use super::planning::Planning;
use tpshard_codegen::report_html::{
    Collective, Entry, Memory, RankBytes, Report, Role, Scaling, Step, Stored, Time, render,
};
use tpshard_ir::{Op, Spmd, StepKind};
use tpshard_passes::cost::Parts;
use tpshard_passes::extract::ExtractError;
use tpshard_passes::memory::rank_memory;
use tpshard_passes::report::{Bytes, EntryReport, StepReport, Verdict};
use tpshard_passes::{Plan, PlanError, PlanReport};

/// The numbers of ranks that the plan is compared with.
const COMPARED: [usize; 4] = [1, 2, 4, 8];
/// Most steps of a program, over all entries, for which plans for other numbers of ranks are made, too.
const COMPARABLE: usize = 10_000;

/// The page about `plan`.
pub(crate) fn report_page(model: &str, planning: &Planning, plan: &Plan) -> String {
    let report = &plan.report;
    let steps: usize = plan.programs.iter().map(|(_, program)| program.steps.len()).sum();
    let (scaling, scaling_note) = scaling(planning, report, steps <= COMPARABLE);
    let entries = report.entries.iter().zip(&plan.programs).map(|(e, (_, program))| entry(e, program));
    let of_rank = |m: tpshard_passes::memory::RankMemory| RankBytes {
        weights: m.weights,
        state: m.state,
        activations: m.activations,
    };
    render(&Report {
        model: model.into(),
        profile: report.profile.clone(),
        mesh: report.mesh.clone(),
        seconds: report.seconds,
        seconds_alone: report.seconds_alone,
        verdict: verdict(report),
        gap: report.gap,
        warnings: warnings(report),
        scaling,
        scaling_note,
        memory: Memory {
            ranks: rank_memory(plan).into_iter().map(of_rank).collect(),
            budget: report.budget,
            device: planning.device_bytes(),
            least: report.least_bytes,
            alone: report.bytes_alone,
        },
        stored: report.stored.iter().map(stored).collect(),
        entries: entries.collect(),
    })
}

fn time(parts: &Parts) -> Time {
    let Parts { compute, memory, launch, communication } = *parts;
    Time { compute, memory, launch, communication }
}

fn verdict(report: &PlanReport) -> String {
    let ranks = report.mesh.ranks();
    let ratio = report.seconds_alone / report.seconds.max(1e-12);
    match report.verdict {
        Verdict::OneRank => "There is one rank.".into(),
        Verdict::Faster => format!("{ranks} ranks are predicted to be {ratio:.2}x as fast as one."),
        Verdict::DoNotShard => {
            format!(
                "Do not shard for speed: {ranks} ranks are predicted to be {ratio:.2}x as fast as one, which has room for the model."
            )
        }
        Verdict::ForMemory => {
            format!(
                "Sharded for memory: {ranks} ranks are predicted to be {ratio:.2}x as fast as one would be, which has no room for the model."
            )
        }
    }
}

fn warnings(report: &PlanReport) -> Vec<String> {
    let (idle, ranks) = (report.balance.idle, report.balance.ranks);
    let warning =
        || format!("{idle} of {ranks} ranks own no part of some split tensor; fewer ranks would do.");
    (idle > 0).then(warning).into_iter().collect()
}

/// The plan among plans for other numbers of ranks, and why some are missing. Whether they are made depends on the
/// program alone, so that equal builds write equal pages.
fn scaling(planning: &Planning, report: &PlanReport, compare: bool) -> (Vec<Scaling>, Option<String>) {
    let times = |report: &PlanReport| report.entries.iter().map(|e| time(&e.visible())).collect();
    let own = report.mesh.ranks();
    let mut all = vec![Scaling { ranks: own, chosen: true, outcome: Ok(times(report)) }];
    if !compare {
        let note = format!(
            "The program has more than {COMPARABLE} steps, so other numbers of ranks were not planned; \
             tpshard plan compares them."
        );
        return (all, Some(note));
    }
    for ranks in COMPARED.into_iter().filter(|ranks| *ranks != own) {
        let outcome = match planning.sketch(ranks) {
            Ok(plan) => Ok(times(&plan.report)),
            Err(PlanError::Extract(ExtractError::Budget { least, .. })) => {
                Err(format!("does not fit: needs {} per rank", Bytes(least)))
            }
            Err(error) => Err(format!("no plan: {}", error.to_string().lines().next().unwrap_or_default())),
        };
        all.push(Scaling { ranks, chosen: false, outcome });
    }
    all.sort_by_key(|scaling| scaling.ranks);
    (all, None)
}

fn stored(kind: &tpshard_passes::report::StoredKind) -> Stored {
    Stored {
        name: kind.name.clone(),
        is_state: kind.is_state,
        shape: kind.shape.clone(),
        layout: kind.layout.clone(),
        count: kind.count,
        bytes: kind.bytes,
    }
}

fn entry(found: &EntryReport, program: &Spmd) -> Entry {
    let dims: Vec<String> =
        found.entry.bindings.iter().map(|(name, size)| format!("{name}={size}")).collect();
    let steps = program.steps.iter().zip(&found.steps).map(|(s, priced)| step(program, s, priced));
    let collective =
        |(kind, count, seconds): (tpshard_passes::report::CollectiveKind, usize, f64)| Collective {
            kind: kind.kind.into(),
            origin: kind.origin,
            ranks: kind.ranks,
            count,
            payload: kind.payload,
            seconds,
        };
    Entry {
        name: found.entry.name.clone(),
        dims: dims.join(", "),
        weight: found.entry.weight,
        time: time(&found.visible()),
        steps: steps.collect(),
        collectives: found.collective_kinds().into_iter().map(collective).collect(),
        outputs: found.outputs.clone(),
    }
}

fn step(program: &Spmd, step: &tpshard_ir::Step, priced: &StepReport) -> Step {
    let node = program.logical.node(step.value);
    let is_state = |name: &str| program.logical.states.iter().any(|s| *s.input == *name);
    let (role, operation, name) = match (&step.kind, &node.op) {
        (StepKind::Convert(conversion), _) if conversion.communicates() => {
            (Role::Communicates, conversion.name().into(), String::new())
        }
        (StepKind::Convert(conversion), _) => (Role::Converts, conversion.name().into(), String::new()),
        (StepKind::Compute, op) => match op {
            Op::Weight(expression) => {
                let names: Vec<&str> = expression.initializers().into_iter().collect();
                (Role::Stored, "weight".into(), names.join("+"))
            }
            Op::Input { name } if is_state(name) => (Role::Stored, "state".into(), name.to_string()),
            Op::Input { name } => (Role::Given, "input".into(), name.to_string()),
            Op::Literal(_) | Op::Size(_) => (Role::Given, op.name().into(), String::new()),
            Op::Einsum(spec) => (Role::Computes, format!("einsum {spec}"), String::new()),
            op => (Role::Computes, op.name().into(), String::new()),
        },
    };
    Step {
        role,
        operation,
        name,
        origin: node.origin.to_string(),
        ty: node.ty.to_string(),
        layout: step.layout.clone(),
        bytes: priced.bytes,
        time: time(&priced.parts),
    }
}
