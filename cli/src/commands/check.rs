//! `tpshard check`: is a folder what its certificate says, and does the certificate prove what the model says?
//!
//! Every file is read anew: containers with all hashes, the certificate against the imported graph, every rank's graph
//! against the certificate, every weight's bytes against its hash and its place in the certificate, the launcher, and
//! `config.json` against what follows from all of them. With the model, the imported graph and every shard are compared
//! with the original as well.

mod files;
mod graphs;

use super::cases;
use super::planning::import_graphs;
use super::shard::{ModelWeights, file_sha256, hex};
use super::verify::as_built;
use crate::arguments::CheckArguments;
use crate::failure::{Failure, Kind, Outcome};
use crate::folder::Folder;
use crate::output;
use crate::rank_program::payload;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use tpshard_codegen::build::{
    Contents, certificate_part, certified_entry, config, entry, model_text, planned_shards, planned_weights,
    program_hash, weight_file,
};
use tpshard_codegen::folder::CONFIG;
use tpshard_codegen::weights::hash::weights_hash;
use tpshard_codegen::weights::region::{Loader, RegionReader};
use tpshard_codegen::weights::{ShardLayout, ShardTensor, TensorRecord};
use tpshard_ir::container;
use tpshard_ir::program::RankProgram;
use tpshard_ir::verify::verify_program;
use tpshard_ir::{Graph, Spmd};
use tpshard_runtime::io::SafeTensorsFile;

/// Findings that are listed; the rest is counted.
const LISTED: usize = 20;

pub(crate) fn check(arguments: &CheckArguments, json: bool) -> Outcome<()> {
    let folder = Folder::open(&arguments.folder)?;
    let mut found = Found::default();
    examine(&folder, arguments, &mut found)?;
    let Found { findings, mut summary } = found;
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

/// What is wrong, and a line for each subject in which nothing is.
#[derive(Default)]
struct Found {
    findings: Vec<String>,
    summary: Vec<String>,
}

impl Found {
    /// Checks one subject; what it says about it counts only if it finds nothing.
    fn subject<T>(&mut self, examine: impl FnOnce(&mut Vec<String>) -> (T, Option<String>)) -> T {
        let before = self.findings.len();
        let (value, line) = examine(&mut self.findings);
        if self.findings.len() == before {
            self.summary.extend(line);
        }
        value
    }
}

fn examine(folder: &Folder, arguments: &CheckArguments, found: &mut Found) -> Outcome<()> {
    found.subject(|findings| {
        files::check_launcher(folder, findings);
        files::check_plan(folder, findings);
        ((), Some(format!("launcher: starts {} ranks; plan.txt: as it was written", folder.ranks)))
    });
    found.subject(|findings| ((), files::check_strays(folder, findings)));
    let Some(graphs) = graphs::read(folder, &mut found.findings)? else { return Ok(()) };
    let (programs, certificates) = read_programs(folder, &mut found.findings);
    if certificates.is_empty() {
        return Ok(());
    }
    let before = found.findings.len();
    let mut entries: Vec<(String, Spmd)> = Vec::new();
    for (name, text) in &certificates {
        let program = tpshard_ir::text::parse_program(text).map_err(|e| e.to_string());
        match program.and_then(|p| Ok(verify_program(p).map_err(|e| e.to_string())?.into_inner())) {
            Ok(program) => entries.push((name.clone(), program)),
            Err(error) => {
                let of = if certificates.len() > 1 { format!(" of entry {name}") } else { String::new() };
                found.findings.extend(error.lines().map(|line| format!("the certificate{of}: {line}")));
            }
        }
    }
    for (index, (name, program)) in entries.iter().enumerate() {
        let several = (entries.len() > 1).then_some(name.as_str());
        match cases::of(&graphs, |(graph, _)| graph, &program.logical.cases) {
            Some((imported, _)) => check_certificate(several, index, program, imported, &programs, found),
            None => found.findings.push(format!(
                "entry {name}: is for {}, of which the folder has no graph",
                cases::text(&program.logical.cases)
            )),
        }
    }
    graphs::check_cases(&graphs, &entries, &mut found.findings);
    if found.findings.len() > before || programs.len() != folder.ranks {
        // What follows instantiates the programs and may rely on what was just refuted.
        return Ok(());
    }
    check_agreement(&entries, &mut found.findings);
    let parts: Vec<(String, String)> =
        certificates.into_iter().map(|(name, text)| (certificate_part(&name), text)).collect();
    let texts: Vec<String> = graphs.iter().map(|(_, text)| text.clone()).collect();
    let expected = program_hash(&texts, &parts);
    for rank_program in &programs {
        if rank_program.program_hash != expected {
            let rank = rank_program.rank;
            found.findings.push(format!("rank{rank}: its program hash is not that of the certificate"));
        }
        check_tables(&entries, rank_program, &mut found.findings);
    }
    check_hash(folder, "program_hash", &expected, &mut found.findings);
    let shards = found.subject(|findings| check_weights(folder, &entries, &programs, findings));
    found.subject(|findings| {
        check_config(folder, &entries, &shards, &expected, findings);
        ((), Some(format!("{CONFIG}: as it follows from the certificate and the files")))
    });
    if let Some(model) = &arguments.model {
        let originals = import_graphs(model, &as_built(folder)?, true)?;
        let source = ModelWeights::of(&originals)?;
        found.subject(|findings| {
            if originals.len() != graphs.len() {
                let (own, other) = (graphs.len(), originals.len());
                findings
                    .push(format!("{}: imports to {other} graphs, the folder has {own}", model.display()));
            }
            for (index, (original, text)) in originals.iter().zip(&texts).enumerate() {
                if tpshard_ir::text::print_graph(&original.graph) != *text {
                    findings.push(format!(
                        "{}: is not what {} imports to",
                        model_text(index),
                        model.display()
                    ));
                }
            }
            let compared = compare_with_model(&source, &shards, findings);
            ((), Some(format!("model: {compared} shards are its own bytes")))
        });
        let same = folder.config.pointer("/build/model/sha256").and_then(Value::as_str)
            == Some(file_sha256(model)?.as_str());
        let relation = if same { "is the very file" } else { "is another file than the one" };
        found.summary.push(format!("model: {relation} the folder was built from"));
    }
    Ok(())
}

/// Texts of certificates by the names of their entries, in order.
type Certificates = Vec<(String, String)>;

/// The programs that can be read, and the certificates in them; they may be right where a program is not.
fn read_programs(folder: &Folder, findings: &mut Vec<String>) -> (Vec<RankProgram>, Certificates) {
    let mut programs: Vec<RankProgram> = Vec::new();
    let mut certificates: Option<Certificates> = None;
    for rank in 0..folder.ranks {
        let mut wrong = |what: String| findings.push(format!("rank{rank}: {what}"));
        let bytes = match payload(&folder.executable(rank)) {
            Ok(bytes) => bytes,
            Err(failure) => {
                wrong(failure.to_string());
                continue;
            }
        };
        let stated = folder.config.pointer(&format!("/ranks/{rank}/payload_sha256")).and_then(Value::as_str);
        if stated != Some(hex(&Sha256::digest(&bytes)).as_str()) {
            wrong(format!("its payload is not the one {CONFIG} states"));
            continue;
        }
        match (certificates_of(&bytes), &certificates) {
            (Ok(own), None) => certificates = Some(own),
            (Ok(own), Some(first)) if *first != own => {
                wrong("its certificate is not that of the ranks before it".into());
            }
            (Ok(_), Some(_)) => {}
            (Err(what), _) => wrong(what),
        }
        match RankProgram::decode(&bytes) {
            Ok(program) if (program.rank, program.mesh.ranks()) != (rank, folder.ranks) => {
                wrong(format!("holds the program of rank {} of {}", program.rank, program.mesh.ranks()))
            }
            Ok(program) => programs.push(program),
            Err(error) => wrong(error.to_string()),
        }
    }
    (programs, certificates.unwrap_or_default())
}

fn certificates_of(payload: &[u8]) -> Result<Certificates, String> {
    let parts = container::decode(payload).map_err(|error| error.to_string())?;
    let entries: Vec<String> = match RankProgram::from_payload(&parts) {
        Ok(program) => program.entries.into_iter().map(|entry| entry.name).collect(),
        // The program is found wrong elsewhere; its certificates may still be looked at.
        Err(_) => parts.parts().iter().filter_map(|part| certified_entry(part.name)).collect(),
    };
    let text = |entry: String| {
        let name = certificate_part(&entry);
        let text = parts.part(&name).and_then(|bytes| std::str::from_utf8(bytes).ok());
        let text = text.map(str::to_owned).ok_or_else(|| format!("holds no {name}"))?;
        Ok((entry, text))
    };
    entries.into_iter().map(text).collect()
}

fn check_certificate(
    entry: Option<&str>,
    index: usize,
    program: &Spmd,
    imported: &Graph,
    programs: &[RankProgram],
    found: &mut Found,
) {
    let of = entry.map_or_else(String::new, |name| format!(" of entry {name}"));
    match tpshard_checker::check(program, imported) {
        Ok(report) => found.summary.push(format!(
            "certificate{of}: {} steps that compute ({} kinds), {} conversions, {} equations ({} executed exactly, {} in reals)",
            report.squares,
            report.distinct_squares,
            report.conversions,
            report.equations,
            report.executed_in_field,
            report.executed_in_reals
        )),
        Err(wrong) => found.findings.extend(wrong.iter().map(|f| format!("the certificate{of}: {f}"))),
    }
    if programs.len() != program.mesh.ranks() {
        // Those that cannot be read have been named.
        return;
    }
    let graphs: Vec<Graph> =
        programs.iter().filter_map(|p| p.entries.get(index)).map(|e| e.graph.clone()).collect();
    match tpshard_checker::check_ranks(program, &graphs) {
        Ok(report) => found.summary.push(format!(
            "programs{of}: {} ranks, {} collectives in one order",
            report.ranks, report.collectives
        )),
        Err(wrong) => found.findings.extend(wrong.iter().map(|f| format!("the programs{of}: {f}"))),
    }
}

/// Entries run on one mesh and leave the state to each other.
fn check_agreement(entries: &[(String, Spmd)], findings: &mut Vec<String>) {
    let states = |program: &Spmd| entry(program, 0, "").map(|e| e.states()).map_err(|e| e.to_string());
    let Some(((first, program), rest)) = entries.split_first() else { return };
    for (name, other) in rest {
        if other.mesh != program.mesh {
            findings.push(format!("entries {first} and {name} run on different meshes"));
        }
        if states(other) != states(program) {
            findings.push(format!("entries {first} and {name} hold the state in different layouts"));
        }
    }
}

/// A rank's tables say what its inputs, outputs and weights are; they must be those that follow from the certificate.
fn check_tables(entries: &[(String, Spmd)], found: &RankProgram, findings: &mut Vec<String>) {
    let rank = found.rank;
    let weights = match planned_weights(entries, rank) {
        Ok(weights) => weights,
        Err(error) => return findings.push(format!("rank {rank}: {error}")),
    };
    if found.entries.len() != entries.len() {
        let (own, wanted) = (found.entries.len(), entries.len());
        return findings.push(format!("rank {rank}: has {own} entries, not {wanted}"));
    }
    for (own, (name, program)) in found.entries.iter().zip(entries) {
        let derived = match entry(program, rank, name) {
            Ok(derived) => derived,
            Err(error) => return findings.push(format!("rank {rank}: {error}")),
        };
        let tables = [
            ("entries", own.name == derived.name),
            ("inputs", own.inputs == derived.inputs),
            ("outputs", own.outputs == derived.outputs),
            ("layouts", own.families == derived.families),
            ("ranges of dims", own.ranges == derived.ranges),
            ("guards", own.graph.guards == derived.graph.guards),
            ("cases", own.graph.cases == derived.graph.cases),
            ("borders", own.graph.borders == derived.graph.borders),
            ("states", found.states == derived.states()),
            ("mesh", found.mesh == program.mesh),
        ];
        for (what, _) in tables.iter().filter(|(_, same)| !same) {
            findings.push(format!("rank {rank}: its table of {what} is not that of the certificate"));
        }
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

fn check_hash(folder: &Folder, key: &str, hash: &str, findings: &mut Vec<String>) {
    if folder.config.get(key).and_then(Value::as_str) != Some(hash) {
        findings.push(format!("{CONFIG}: its {key} is not that of what is in the folder"));
    }
}

/// Derives `config.json` from the certificate, as the build did, and compares value by value.
fn check_config(
    folder: &Folder,
    entries: &[(String, Spmd)],
    shards: &Shards,
    program_hash: &str,
    findings: &mut Vec<String>,
) {
    let Some(inputs) = folder.config.get("build").and_then(Value::as_object) else {
        return findings.push(format!("{CONFIG}: /build, the inputs of the build, is missing"));
    };
    let mut weights = Vec::new();
    for rank in 0..folder.ranks {
        let found = shards.iter().find(|(of, _)| *of == rank).map(|(_, tensors)| tensors.as_slice());
        let hashes =
            found.unwrap_or_default().iter().map(|(s, hash)| (s.name.clone(), hash.clone())).collect();
        let layout = planned_shards(entries, rank).map_err(|e| e.to_string());
        let layout = layout
            .and_then(|tensors| ShardLayout::new(rank, folder.ranks, tensors).map_err(|e| e.to_string()));
        match layout {
            Ok(layout) => weights.push(layout.records(&hashes)),
            Err(error) => return findings.push(format!("{}: {error}", weight_file(rank))),
        }
    }
    let payloads = vec![String::new(); folder.ranks];
    let contents = Contents {
        weights: &weights,
        weights_hash: "",
        program_hash,
        payloads: &payloads,
        plan_sha256: "",
        report_sha256: "",
    };
    files::differences(&folder.config, &config(inputs, entries, &contents), "", findings);
}

/// What the certificate says every rank holds, with the hashes of the bytes that are there.
type Shards = Vec<(usize, Vec<(ShardTensor, String)>)>;

fn check_weights(
    folder: &Folder,
    entries: &[(String, Spmd)],
    programs: &[RankProgram],
    findings: &mut Vec<String>,
) -> (Shards, Option<String>) {
    let mut shards: Shards = Vec::new();
    let mut records: Vec<(usize, TensorRecord)> = Vec::new();
    let mut bytes = 0u64;
    let mut builds: Vec<(usize, Option<String>)> = Vec::new();
    for rank in 0..folder.ranks {
        let planned = match planned_shards(entries, rank) {
            Ok(planned) => planned,
            Err(error) => {
                findings.push(format!("rank {rank}: {error}"));
                continue;
            }
        };
        let file = match SafeTensorsFile::open(&folder.path.join(weight_file(rank))) {
            Ok(file) => file,
            Err(error) => {
                findings.push(error.to_string());
                continue;
            }
        };
        builds.push((rank, file.metadata().get("weights_hash").cloned()));
        let names: BTreeSet<String> = planned.iter().map(|shard| shard.name.clone()).collect();
        for extra in file.names().iter().filter(|name| !names.contains(name.as_str())) {
            findings.push(format!("{}, weight `{extra}`: belongs to no step", weight_file(rank)));
        }
        let stated = stated_hashes(folder, rank);
        let mut present = Vec::new();
        for shard in planned {
            match check_shard(&file, &shard, rank) {
                Ok((sha256, length)) => {
                    bytes += length;
                    if stated.get(&shard.name) != Some(&sha256) {
                        findings.push(format!(
                            "{}, weight `{}`: its bytes are not those whose hash {CONFIG} states",
                            weight_file(rank),
                            shard.name
                        ));
                    }
                    records.push((rank, record(&shard, &sha256)));
                    present.push((shard, sha256));
                }
                Err(finding) => findings.push(finding),
            }
        }
        shards.push((rank, present));
    }
    let hash = weights_hash(folder.ranks, records.iter().map(|(rank, r)| (*rank, r)));
    for (rank, _) in builds.iter().filter(|(_, build)| build.as_ref() != Some(&hash)) {
        let file = weight_file(*rank);
        findings.push(format!("{file}: is of another build, by the weights hash in its header"));
    }
    check_hash(folder, "weights_hash", &hash, findings);
    for program in programs.iter().filter(|program| program.weights_hash != hash) {
        findings.push(format!("rank{}: its weights hash is not that of the weight files", program.rank));
    }
    (shards, Some(format!("weights: {} tensors, {bytes} bytes", records.len())))
}

/// Hash and length of a shard's bytes.
fn check_shard(file: &SafeTensorsFile, shard: &ShardTensor, rank: usize) -> Result<(String, u64), String> {
    let place = format!("{}, weight `{}`", weight_file(rank), shard.name);
    let view = file.view(&shard.name).map_err(|error| format!("{place}: {error}"))?;
    if view.dtype != shard.dtype() || view.shape != shard.shape() {
        return Err(format!(
            "{place}: is {}{:?}, the certificate says {}{:?}",
            view.dtype,
            view.shape,
            shard.dtype(),
            shard.shape()
        ));
    }
    Ok((hex(&Sha256::digest(view.bytes)), view.bytes.len() as u64))
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

/// Evaluates every shard from the model again; returns how many.
fn compare_with_model(source: &ModelWeights<'_>, shards: &Shards, findings: &mut Vec<String>) -> usize {
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
    compared
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
