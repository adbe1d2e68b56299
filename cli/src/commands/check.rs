//! `tpshard check`: is a folder what its certificate says, and does the certificate prove what the model says?
//!
//! Every file is read anew: containers with all hashes, the certificate against the imported graph, every rank's graph
//! against the certificate, every weight's bytes against its hash and its place in the certificate. With the model,
//! the imported graph and every shard are compared with the original as well.

use super::planning::import_model;
use super::shard::ModelWeights;
use super::verify::as_built;
use crate::arguments::CheckArguments;
use crate::failure::{Classify, Failure, Kind, Outcome};
use crate::folder::Folder;
use crate::output;
use crate::rank_program::payload;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use tpshard_codegen::build::{
    MODEL_TEXT, certificate_part, entry, planned_shards, planned_weights, program_hash, weight_file,
};
use tpshard_codegen::folder::CONFIG;
use tpshard_codegen::weights::hash::weights_hash;
use tpshard_codegen::weights::region::{Loader, RegionReader};
use tpshard_codegen::weights::{ShardTensor, TensorRecord};
use tpshard_ir::container;
use tpshard_ir::program::RankProgram;
use tpshard_ir::{Graph, Spmd};
use tpshard_runtime::io::SafeTensorsFile;

/// Findings that are listed; the rest is counted.
const LISTED: usize = 20;

pub(crate) fn check(arguments: &CheckArguments, json: bool) -> Outcome<()> {
    let folder = Folder::open(&arguments.folder)?;
    let mut findings = Vec::new();
    let mut summary = Vec::new();
    examine(&folder, arguments, &mut findings, &mut summary)?;
    let result = json.then(
        || serde_json::json!({ "passed": findings.is_empty(), "findings": findings, "checked": summary }),
    );
    if findings.is_empty() {
        return match result {
            Some(result) => output::line(result),
            None => {
                summary.push(format!("{}: everything holds", folder.path.display()));
                output::line(summary.join("\n"))
            }
        };
    }
    let listed: Vec<String> = findings.iter().take(LISTED).map(|f| format!("  {f}")).collect();
    let more = findings.len().saturating_sub(LISTED);
    let more = if more > 0 { format!("\n  and {more} more") } else { String::new() };
    Err(Failure::new(
        Kind::Mismatch,
        format!("{} does not hold\n{}{more}", folder.path.display(), listed.join("\n")),
    )
    .with_result(result))
}

fn examine(
    folder: &Folder,
    arguments: &CheckArguments,
    findings: &mut Vec<String>,
    summary: &mut Vec<String>,
) -> Outcome<()> {
    let model_text = folder.text(MODEL_TEXT)?;
    let imported = match tpshard_ir::text::parse_graph(&model_text) {
        Ok(graph) => graph,
        Err(error) => {
            findings.push(format!("{MODEL_TEXT}: {error}"));
            return Ok(());
        }
    };
    let mut programs: Vec<RankProgram> = Vec::new();
    let mut certificate: Option<String> = None;
    for rank in 0..folder.ranks {
        let name = format!("rank{rank}");
        match rank_payload(folder, rank) {
            Ok((program, text)) => {
                if program.rank != rank || program.mesh.ranks() != folder.ranks {
                    findings.push(format!(
                        "{name}: holds the program of rank {} of {}",
                        program.rank,
                        program.mesh.ranks()
                    ));
                }
                match &certificate {
                    None => certificate = Some(text),
                    Some(first) if *first != text => {
                        findings.push(format!("{name}: its certificate is not that of rank0"))
                    }
                    Some(_) => {}
                }
                programs.push(program);
            }
            Err(failure) => findings.push(format!("{name}: {failure}")),
        }
    }
    let Some(text) = certificate.filter(|_| programs.len() == folder.ranks) else { return Ok(()) };
    let program = match tpshard_ir::text::parse_program(&text) {
        Ok(program) => program,
        Err(error) => {
            findings.push(format!("the certificate: {error}"));
            return Ok(());
        }
    };
    check_certificate(&program, &imported, &programs, findings, summary);
    if !findings.is_empty() {
        // What follows instantiates the program and may rely on what was just refuted.
        return Ok(());
    }
    let expected = program_hash(&model_text, &[(certificate_part("main"), text)]);
    for program in &programs {
        if program.program_hash != expected {
            findings.push(format!("rank{}: its program hash is not that of the certificate", program.rank));
        }
    }
    for rank_program in &programs {
        check_tables(&program, rank_program, findings);
    }
    check_config(folder, "program_hash", &expected, findings);
    let shards = check_weights(folder, &program, &programs, findings, summary)?;
    if let Some(model) = &arguments.model {
        let original = import_model(model, &as_built(folder), true)?;
        if tpshard_ir::text::print_graph(&original.graph) != model_text {
            findings.push(format!("{MODEL_TEXT}: is not what {} imports to", model.display()));
        }
        compare_with_model(&ModelWeights { imported: &original }, &shards, findings, summary);
    }
    Ok(())
}

fn rank_payload(folder: &Folder, rank: usize) -> Outcome<(RankProgram, String)> {
    let bytes = payload(&folder.executable(rank))?;
    let stated = folder.config.pointer(&format!("/ranks/{rank}/payload_sha256")).and_then(Value::as_str);
    if stated != Some(hex(&Sha256::digest(&bytes)).as_str()) {
        return Err(Failure::new(Kind::Mismatch, "its payload is not the one config.json states"));
    }
    let parts = container::decode(&bytes).or_fail(Kind::Mismatch)?;
    let name = certificate_part("main");
    let text = parts.part(&name).and_then(|b| std::str::from_utf8(b).ok());
    let text = text.ok_or_else(|| Failure::new(Kind::Mismatch, format!("holds no {name}")))?;
    Ok((RankProgram::decode(&bytes).or_fail(Kind::Mismatch)?, text.to_owned()))
}

fn check_certificate(
    program: &Spmd,
    imported: &Graph,
    programs: &[RankProgram],
    findings: &mut Vec<String>,
    summary: &mut Vec<String>,
) {
    match tpshard_checker::check(program, imported) {
        Ok(report) => summary.push(format!(
            "certificate: {} steps that compute ({} kinds), {} conversions, {} equations ({} executed exactly, {} in reals)",
            report.squares,
            report.distinct_squares,
            report.conversions,
            report.equations,
            report.executed_in_field,
            report.executed_in_reals
        )),
        Err(found) => findings.extend(found.iter().map(|f| format!("the certificate: {f}"))),
    }
    let graphs: Vec<Graph> =
        programs.iter().filter_map(|p| p.entries.first()).map(|e| e.graph.clone()).collect();
    match tpshard_checker::check_ranks(program, &graphs) {
        Ok(report) => summary.push(format!(
            "programs: {} ranks, {} collectives in one order",
            report.ranks, report.collectives
        )),
        Err(found) => findings.extend(found.iter().map(|f| format!("the programs: {f}"))),
    }
}

/// A rank's tables say what its inputs, outputs and weights are; they must be those that follow from the certificate.
fn check_tables(program: &Spmd, found: &RankProgram, findings: &mut Vec<String>) {
    let rank = found.rank;
    let entries = [("main".to_owned(), program.clone())];
    let derived = entry(program, rank, "main").map_err(|e| e.to_string());
    let weights = planned_weights(&entries, rank).map_err(|e| e.to_string());
    let (entry, weights) = match (derived, weights) {
        (Ok(entry), Ok(weights)) => (entry, weights),
        (Err(error), _) | (_, Err(error)) => return findings.push(format!("rank {rank}: {error}")),
    };
    let [own] = found.entries.as_slice() else {
        return findings.push(format!("rank {rank}: has {} entries, not one", found.entries.len()));
    };
    let tables = [
        ("inputs", own.inputs == entry.inputs),
        ("outputs", own.outputs == entry.outputs),
        ("layouts", own.families == entry.families),
        ("ranges of dims", own.ranges == entry.ranges),
        ("guards", own.graph.guards == entry.graph.guards),
        ("states", found.states == entry.states()),
        ("mesh", found.mesh == program.mesh),
    ];
    for (what, _) in tables.iter().filter(|(_, same)| !same) {
        findings.push(format!("rank {rank}: its table of {what} is not that of the certificate"));
    }
    if found.weights.len() != weights.len() {
        let (found, needed) = (found.weights.len(), weights.len());
        findings.push(format!("rank {rank}: its table lists {found} weights, the certificate {needed}"));
    }
    for (own, derived) in found.weights.iter().zip(&weights).filter(|(own, derived)| own != derived) {
        findings.push(format!(
            "rank {rank}: its table has weight `{}` ({}) where the certificate has `{}` ({})",
            own.name, own.expr, derived.name, derived.expr
        ));
    }
}

fn check_config(folder: &Folder, key: &str, hash: &str, findings: &mut Vec<String>) {
    if folder.config.get(key).and_then(Value::as_str) != Some(hash) {
        findings.push(format!("{CONFIG}: its {key} is not that of what is in the folder"));
    }
}

/// What the certificate says every rank holds, with the bytes that are there.
type Shards = Vec<(usize, Vec<(ShardTensor, String)>)>;

fn check_weights(
    folder: &Folder,
    program: &Spmd,
    programs: &[RankProgram],
    findings: &mut Vec<String>,
    summary: &mut Vec<String>,
) -> Outcome<Shards> {
    let entries = [("main".to_owned(), program.clone())];
    let mut shards: Shards = Vec::new();
    let mut records: Vec<(usize, TensorRecord)> = Vec::new();
    let mut bytes = 0u64;
    let mut builds: Vec<(usize, Option<String>)> = Vec::new();
    for rank in 0..folder.ranks {
        let planned = planned_shards(&entries, rank).or_fail(Kind::Mismatch)?;
        let path = folder.path.join(weight_file(rank));
        let file = match SafeTensorsFile::open(&path) {
            Ok(file) => file,
            Err(error) => {
                findings.push(error.to_string());
                continue;
            }
        };
        builds.push((rank, file.metadata().get("weights_hash").cloned()));
        let stated = stated_hashes(folder, rank);
        let mut present = Vec::new();
        for shard in planned {
            let place = format!("{}, weight `{}`", weight_file(rank), shard.name);
            let view = match file.view(&shard.name) {
                Ok(view) => view,
                Err(error) => {
                    findings.push(format!("{place}: {error}"));
                    continue;
                }
            };
            if view.dtype != shard.dtype() || view.shape != shard.shape() {
                findings.push(format!(
                    "{place}: is {}{:?}, the certificate says {}{:?}",
                    view.dtype,
                    view.shape,
                    shard.dtype(),
                    shard.shape()
                ));
                continue;
            }
            let sha256 = hex(&Sha256::digest(view.bytes));
            bytes += view.bytes.len() as u64;
            if stated.get(&shard.name) != Some(&sha256) {
                findings.push(format!("{place}: its bytes are not those whose hash config.json states"));
            }
            records.push((rank, record(&shard, &sha256)));
            present.push((shard, sha256));
        }
        let known: Vec<&String> = present.iter().map(|(s, _)| &s.name).collect();
        for extra in file.names().iter().filter(|n| !known.contains(n)) {
            if present.len() == known.len() && !findings.iter().any(|f| f.contains(extra.as_str())) {
                findings.push(format!("{}: weight `{extra}` belongs to no step", weight_file(rank)));
            }
        }
        shards.push((rank, present));
    }
    let hash = weights_hash(folder.ranks, records.iter().map(|(rank, r)| (*rank, r)));
    for (rank, _) in builds.iter().filter(|(_, build)| build.as_ref() != Some(&hash)) {
        let file = weight_file(*rank);
        findings.push(format!("{file}: is of another build, by the weights hash in its header"));
    }
    check_config(folder, "weights_hash", &hash, findings);
    for program in programs {
        if program.weights_hash != hash {
            findings.push(format!("rank{}: its weights hash is not that of the weight files", program.rank));
        }
    }
    summary.push(format!("weights: {} tensors, {bytes} bytes", records.len()));
    Ok(shards)
}

fn record(shard: &ShardTensor, sha256: &str) -> TensorRecord {
    TensorRecord {
        name: shard.name.clone(),
        dtype: shard.dtype(),
        global_shape: shard.weight.shape().to_vec(),
        region: shard.region.clone(),
        offset: 0,
        length: 0,
        sha256: sha256.into(),
    }
}

fn stated_hashes(folder: &Folder, rank: usize) -> BTreeMap<String, String> {
    let list = folder.config.pointer(&format!("/ranks/{rank}/tensors")).and_then(Value::as_array);
    list.into_iter()
        .flatten()
        .filter_map(|t| Some((t.get("name")?.as_str()?.to_owned(), t.get("sha256")?.as_str()?.to_owned())))
        .collect()
}

/// Evaluates every shard from the model again.
fn compare_with_model(
    source: &ModelWeights<'_>,
    shards: &Shards,
    findings: &mut Vec<String>,
    summary: &mut Vec<String>,
) {
    let mut compared = 0usize;
    let mut known: BTreeMap<String, String> = BTreeMap::new();
    for (rank, tensors) in shards {
        for (shard, found) in tensors {
            let key = format!("{} {:?}", shard.weight, shard.region);
            let expected = match known.get(&key) {
                Some(hash) => Ok(hash.clone()),
                None => shard_hash(source, shard),
            };
            compared += 1;
            match expected {
                Ok(expected) if expected == *found => drop(known.insert(key, expected)),
                Ok(_) => findings.push(format!(
                    "{}, weight `{}`: its bytes are not the model's",
                    weight_file(*rank),
                    shard.name
                )),
                Err(error) => findings.push(format!("weight `{}`: {error}", shard.name)),
            }
        }
    }
    summary.push(format!("model: {compared} shards are its own bytes"));
}

fn shard_hash(source: &ModelWeights<'_>, shard: &ShardTensor) -> Result<String, String> {
    let mut loader = Loader::new(source);
    let mut reader = RegionReader::new(&shard.weight, &shard.region).map_err(|e| e.to_string())?;
    let mut hash = Sha256::new();
    let mut buffer = Vec::new();
    while reader.next_chunk(&mut loader, &mut buffer).map_err(|e| e.to_string())? {
        hash.update(&buffer);
    }
    Ok(hex(&hash.finalize()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
