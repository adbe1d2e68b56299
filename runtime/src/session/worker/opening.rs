//! What a rank makes sure of before it runs anything: that the program holds together, that all ranks run the same one,
//! and how much memory there is.

use super::agree;
use crate::comm::{Communicator, Group, Tag};
use crate::cpu::WeightSource;
use crate::session::SessionError;
use tpshard_ir::deferred::{SharedEvaluator, no_evaluator};
use tpshard_ir::layout::Monoid;
use tpshard_ir::program::{Determinism, Entry, RankProgram};
use tpshard_ir::{AxisLayout, Op, Tensor, ValueId};

/// All ranks hold rank 0's program and weights hashes against their own.
pub(super) fn same_program(
    program: &RankProgram,
    communicator: &dyn Communicator,
    sequence: &mut u64,
) -> Result<(), SessionError> {
    let own = format!(
        "program {} weights {} mesh {} entries {}",
        program.program_hash,
        program.weights_hash,
        program.mesh,
        program.entries.len()
    );
    *sequence += 1;
    let tag = Tag { sequence: *sequence, node: u32::MAX };
    let group = Group::world(communicator.world_size());
    let root = communicator.broadcast_bytes(&group, tag, 0, own.as_bytes())?;
    let verdict = if root == own.as_bytes() {
        Ok(())
    } else {
        let what = format!(
            "rank {} runs {own}, rank 0 runs {}\n  help: start all ranks from one folder",
            communicator.rank(),
            String::from_utf8_lossy(&root)
        );
        Err(SessionError::Usage { what })
    };
    agree(communicator, sequence, verdict)
}

/// Refuses operations that wait for their operands where nothing can evaluate them.
pub(super) fn check_evaluator(
    program: &RankProgram,
    evaluator: &SharedEvaluator,
) -> Result<(), SessionError> {
    let nodes = program.entries.iter().flat_map(|entry| entry.graph.nodes());
    let call = nodes.filter_map(|node| match &node.op {
        Op::Deferred { call, .. } => Some((call, &node.origin)),
        _ => None,
    });
    match call.into_iter().next() {
        Some((call, origin)) if evaluator.0.is_none() => {
            let what =
                format!("{} ({origin})\n  help: open the session with an evaluator", no_evaluator(call));
            Err(SessionError::Usage { what })
        }
        _ => Ok(()),
    }
}

/// The least memory limit of all ranks; each its own where no size depends on data.
pub(super) fn least_limit(
    program: &RankProgram,
    communicator: &dyn Communicator,
    sequence: &mut u64,
    own: u64,
) -> Result<u64, SessionError> {
    let decides = program.entries.iter().any(|entry| !entry.graph.data_symbols().is_empty());
    if !decides || communicator.world_size() == 1 {
        return Ok(own);
    }
    let mut least = Tensor::scalar(i64::try_from(own).unwrap_or(i64::MAX));
    *sequence += 1;
    let tag = Tag { sequence: *sequence, node: u32::MAX };
    communicator.all_reduce(
        &Group::world(communicator.world_size()),
        tag,
        crate::comm::Monoid::Min,
        &mut least,
    )?;
    Ok(least.as_slice::<i64>().ok().and_then(|v| v.first()).map_or(own, |&limit| limit.unsigned_abs()))
}

/// Checks a program before anything of it is used.
pub(super) fn check(
    program: &RankProgram,
    weights: &dyn WeightSource,
    communicator: &dyn Communicator,
) -> Result<(), SessionError> {
    let fail = |what: String| Err(SessionError::Program { what });
    let (rank, world) = (communicator.rank(), communicator.world_size());
    if program.rank != rank || program.mesh.ranks() != world {
        return Err(SessionError::Usage {
            what: format!(
                "this is the program of rank {} of {}, started as rank {rank} of {world}\n  \
                 help: start every rank with its own program",
                program.rank,
                program.mesh.ranks()
            ),
        });
    }
    if let Some(found) = weights.weights_hash().filter(|h| *h != program.weights_hash) {
        let place = weights.place();
        return Err(SessionError::Weights {
            what: format!(
                "{}the weights have hash {found}, the program expects {}\n  help: use the weights written with this program",
                place.map(|place| format!("{place}: ")).unwrap_or_default(),
                program.weights_hash
            ),
        });
    }
    for entry in &program.entries {
        let graph = &entry.graph;
        if let Some((value, _)) = graph.values().find(|(v, n)| n.args.iter().any(|a| a >= v)) {
            return fail(format!("entry `{}`: {value} uses a later value", entry.name));
        }
        if entry.families.len() != graph.len() || graph.outputs.iter().any(|o| o.value.index() >= graph.len())
        {
            return fail(format!("entry `{}`: layouts or outputs do not fit its graph", entry.name));
        }
        for (family, (value, node)) in entry.families.iter().zip(graph.values()) {
            let dims_exist =
                family.layout.0.iter().all(|a| a.sharded_dim().is_none_or(|d| d < family.ty.rank()));
            if family.layout.0.len() != program.mesh.axes()
                || !dims_exist
                || family.ty.rank() != node.ty.rank()
            {
                return fail(format!("entry `{}`: the layout of {value} does not fit", entry.name));
            }
        }
        if program.determinism == Determinism::Tp
            && let Some(step) = rounded_apart(entry)
        {
            return fail(format!(
                "entry `{}`: {step} is summed over ranks, which rounds, but the program is to give the same bits for \
                 every number of ranks",
                entry.name
            ));
        }
        let checked = entry.lowering.check(graph);
        checked.map_err(|error| SessionError::Lowering { entry: entry.name.clone(), error })?;
    }
    Ok(())
}

/// The first step of which ranks hold parts whose combination rounds. Rows gathered from a part of a table are held by one
/// rank, and the others add zeros.
fn rounded_apart(entry: &Entry) -> Option<ValueId> {
    let partial = |value: ValueId| {
        let family = &entry.families[value.index()];
        let sums = |part: &AxisLayout| matches!(part, AxisLayout::Partial(Monoid::Sum | Monoid::Prod));
        family.ty.dtype.is_float() && family.layout.0.iter().any(sums)
    };
    let mut exact = vec![false; entry.graph.len()];
    for (value, node) in entry.graph.values().filter(|(v, _)| partial(*v)) {
        exact[value.index()] = match &node.op {
            Op::Gather { window: Some(_), .. } => !node.args.iter().any(|&a| partial(a)),
            Op::Convert(_) => node.args.iter().all(|&a| partial(a) && exact[a.index()]),
            _ => false,
        };
        if !exact[value.index()] {
            return Some(value);
        }
    }
    None
}
