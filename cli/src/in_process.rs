//! All ranks of a folder in this process, one thread each: for looking at values inside a program.

use crate::failure::{Classify, Failure, Kind, Outcome};
use crate::folder::Folder;
use crate::rank_program::{RankFile, open_weights};
use crate::runner::session_failure;
use std::collections::BTreeMap;
use std::thread;
use tpshard_ir::interp::{Domain, Real, decode};
use tpshard_ir::{Mesh, StepId, Tensor};
use tpshard_runtime::comm::{CommOptions, Communicator, threads};
use tpshard_runtime::io::NamedTensors;
use tpshard_runtime::session::{Results, Session, SessionOptions, entry_for};

/// Outputs, and the logical values of tapped steps (or why the ranks' parts do not make one).
pub(crate) struct Observed {
    pub(crate) outputs: NamedTensors,
    pub(crate) taps: BTreeMap<StepId, Result<Tensor, String>>,
}

/// Runs all ranks once and decodes the values of `taps`.
pub(crate) fn observe(folder: &Folder, inputs: &NamedTensors, taps: &[StepId]) -> Outcome<Observed> {
    let communicators = threads(folder.ranks, &CommOptions::default()).or_fail(Kind::Resource)?;
    let inputs: BTreeMap<String, Tensor> = inputs.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
    let results: Vec<Outcome<(Results, RankSummary)>> = thread::scope(|scope| {
        let handles: Vec<_> = communicators
            .into_iter()
            .enumerate()
            .map(|(rank, communicator)| {
                scope.spawn({
                    let inputs = &inputs;
                    move || run_rank(folder, rank, communicator, inputs, taps)
                })
            })
            .collect();
        let joined = handles.into_iter().map(|h| {
            h.join().unwrap_or_else(|_| Err(Failure::new(Kind::Internal, "a rank's thread panicked")))
        });
        joined.collect()
    });
    let mut ranks = Vec::with_capacity(results.len());
    let mut failures: Vec<Failure> = Vec::new();
    for result in results {
        match result {
            Ok(rank) => ranks.push(rank),
            Err(failure) => failures.push(failure),
        }
    }
    // The rank that failed by itself says more than those that heard of it.
    failures.sort_by_key(|f| f.kind == Kind::Rank);
    if let Some(first) = failures.into_iter().next() {
        return Err(first);
    }
    gather(ranks, taps)
}

struct RankSummary {
    mesh: Mesh,
    output_names: Vec<String>,
}

fn run_rank(
    folder: &Folder,
    rank: usize,
    communicator: Box<dyn Communicator>,
    inputs: &BTreeMap<String, Tensor>,
    taps: &[StepId],
) -> Outcome<(Results, RankSummary)> {
    let file = RankFile::read(&folder.executable(rank))?;
    let summary = RankSummary { mesh: file.program.mesh.clone(), output_names: file.output_names };
    let mut weights = open_weights(&folder.path, rank)?;
    let options = SessionOptions {
        threads: Some(1),
        device: folder.device.choice(),
        evaluator: crate::runner::evaluator(),
        ..SessionOptions::default()
    };
    let mut session =
        Session::open(file.program, &mut weights, communicator, &options).map_err(|e| session_failure(&e))?;
    let results = session.run_tapped(inputs, taps).map_err(|e| session_failure(&e))?;
    session.close().map_err(|e| session_failure(&e))?;
    Ok((results, summary))
}

fn gather(ranks: Vec<(Results, RankSummary)>, taps: &[StepId]) -> Outcome<Observed> {
    let Some((first, summary)) = ranks.first() else {
        return Err(Failure::new(Kind::Internal, "no ranks"));
    };
    let mut outputs = NamedTensors::new();
    for name in &summary.output_names {
        if let Some(output) = first.outputs.get(name) {
            outputs.insert(name.clone(), output.tensor.clone());
        }
    }
    let mut decoded = BTreeMap::new();
    for &step in taps {
        let parts: Vec<_> =
            ranks.iter().filter_map(|(results, _)| results.taps.iter().find(|t| t.step == step)).collect();
        let Some(layout) = parts.first().map(|t| t.layout.clone()) else { continue };
        let family: Vec<_> = parts.iter().map(|t| Real.import(&t.tensor)).collect();
        let value = decode(&Real, &family, &layout, &summary.mesh)
            .and_then(|array| Real.export(&array))
            .map_err(|e| e.to_string());
        decoded.insert(step, value);
    }
    Ok(Observed { outputs, taps: decoded })
}

/// The program of the entry that takes these inputs, from the certificates in rank 0's payload.
pub(crate) fn program_for(folder: &Folder, inputs: &NamedTensors) -> Outcome<tpshard_ir::Spmd> {
    let file = RankFile::read(&folder.executable(0))?;
    let inputs: BTreeMap<String, Tensor> = inputs.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
    let entry = entry_for(&file.program, &inputs).map_err(|e| session_failure(&e))?;
    let name = file.program.entries.get(entry).map(|e| e.name.clone());
    let found = programs_of(folder)?.into_iter().find(|(own, _)| Some(own) == name.as_ref());
    let missing = || Failure::new(Kind::Mismatch, format!("rank0 holds no certificate of entry {entry}"));
    found.map(|(_, program)| program).ok_or_else(missing)
}

/// The programs of all entries by name, from the certificates in rank 0's payload.
pub(crate) fn programs_of(folder: &Folder) -> Outcome<Vec<(String, tpshard_ir::Spmd)>> {
    let payload = crate::rank_program::payload(&folder.executable(0))?;
    let parts = tpshard_ir::container::decode(&payload).or_fail(Kind::Mismatch)?;
    let rank = tpshard_ir::program::RankProgram::from_payload(&parts).or_fail(Kind::Mismatch)?;
    let mut programs = Vec::new();
    for entry in rank.entries.into_iter().map(|entry| entry.name) {
        let name = tpshard_codegen::build::certificate_part(&entry);
        let text = parts.part(&name).and_then(|bytes| std::str::from_utf8(bytes).ok());
        let text = text.ok_or_else(|| Failure::new(Kind::Mismatch, format!("rank0 holds no {name}")))?;
        let program = tpshard_ir::text::parse_program(text).or_fail(Kind::Mismatch)?;
        let program = tpshard_ir::verify::verify_program(program).or_fail(Kind::Mismatch)?.into_inner();
        programs.push((entry, program));
    }
    Ok(programs)
}
