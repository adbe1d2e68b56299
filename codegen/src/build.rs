//! From typed programs to the finished folder.
//!
//! Weights are laid out first, for all ranks together: a family of a weight has the same name on every rank, and the
//! region that the layout gives it. They are streamed in one pass; then the hashes are known, the rank programs are
//! encoded around them and put into copies of the runner. `config.json` comes last, because it marks the folder as
//! complete.

use crate::cubins::{Cubins, CudaTarget};
use crate::cuda;
use crate::elf::{self, ElfError};
use crate::folder::{CONFIG, CONFIG_FORMAT, FolderError, OutputFolder};
use crate::weights::hash::hex;
use crate::weights::{ShardLayout, ShardTensor, Span, TensorRecord, WeightError, WeightSource, write_shards};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Write;
use tpshard_driver::DriverError;
use tpshard_ir::container::{self, ContainerError};
use tpshard_ir::layout::{Layout, local_runs};
use tpshard_ir::program::device::pieces::PieceCounts;
use tpshard_ir::program::{Determinism, Entry, ProgramError, RankProgram, WeightTensor};
use tpshard_ir::spmd::{InstantiateError, Spmd, SpmdOutput};
use tpshard_ir::weight::WeightExpr;
use tpshard_ir::{Graph, Op, StepId, ValueId};

/// The version of `config.json`; readers accept the last two.
pub const CONFIG_VERSION: u32 = 1;
/// The oldest version of `config.json` that is read: the one before [`CONFIG_VERSION`], once there is one.
pub const OLDEST_CONFIG_VERSION: u32 = if CONFIG_VERSION > 1 { CONFIG_VERSION - 1 } else { 1 };
/// The part of a rank's payload that holds the certificate of one entry, as `.tir` text.
pub fn certificate_part(entry: &str) -> String {
    format!("certificate/{entry}.tir")
}

/// The entry whose certificate a part of this name holds.
pub fn certified_entry(part: &str) -> Option<String> {
    part.strip_prefix("certificate/")?.strip_suffix(".tir").map(str::to_owned)
}

/// The part that marks `run`, which starts the rank's own executable.
pub const PART_LAUNCHER: &str = "launcher";
/// The imported logical graph; the first, where the model chooses between several.
pub const MODEL_TEXT: &str = "model.tir";
/// Most graphs of a model.
pub const MAX_GRAPHS: usize = 4;

/// The file of the imported graph number `index`.
pub fn model_text(index: usize) -> String {
    if index == 0 { MODEL_TEXT.to_owned() } else { format!("model-{index}.tir") }
}

/// The plan for people.
pub const PLAN_TEXT: &str = "plan.txt";
/// The plan for browsers.
pub const REPORT_PAGE: &str = "report.html";

/// Everything that goes into a folder.
pub struct Build<'a> {
    /// The graphs as imported, which the certificates start from: one, or one for each case of the model.
    pub imported: &'a [&'a Graph],
    /// The programs, by entry name; all have the same mesh, and are for one of the graphs each.
    pub entries: &'a [(String, Spmd)],
    pub plan_text: &'a str,
    /// What the plan promises about equal results.
    pub determinism: Determinism,
    /// The page about the plan.
    pub report_html: &'a str,
    /// The executable to copy for every rank.
    pub runner: &'a [u8],
    pub source: &'a dyn WeightSource,
    /// GPUs to write kernels for, if the programs are to run on any.
    pub cuda: Option<&'a CudaTarget<'a>>,
    /// By entry, the products that GPUs are to make in pieces which are summed over ranks one by one.
    pub pieces: &'a [BTreeMap<ValueId, PieceCounts>],
    /// Resolved inputs of the build for `config.json`: versions, hashes, flags.
    pub inputs: Map<String, Value>,
}

/// Why a folder could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    #[error("{0}")]
    Folder(#[from] FolderError),
    #[error("{0}")]
    Weights(#[from] WeightError),
    #[error("{0}")]
    Elf(#[from] ElfError),
    #[error("{0}")]
    Container(#[from] ContainerError),
    #[error("{0}")]
    Program(#[from] ProgramError),
    #[error("{0}")]
    Instantiate(#[from] InstantiateError),
    #[error("writing {name}: {error}")]
    Write { name: String, error: std::io::Error },
    #[error("{0}")]
    Kernels(#[from] DriverError),
    #[error("no entry to build")]
    Empty,
}

/// What was built, for reports.
#[derive(Clone, Debug)]
pub struct Built {
    pub weights_hash: String,
    pub program_hash: String,
    /// Bytes of every rank's weight file.
    pub weight_bytes: Vec<u64>,
}

/// Writes everything into `folder` and commits it. `progress` is told the number of weight bytes written.
///
/// # Errors
/// Nothing is left behind if any file cannot be written.
pub fn build(
    folder: OutputFolder,
    build: &Build<'_>,
    progress: &mut dyn FnMut(u64),
) -> Result<Built, BuildError> {
    let ranks = build.entries.first().ok_or(BuildError::Empty)?.1.mesh.ranks();
    let plans = (0..ranks).map(|rank| plan_weights(build.entries, rank)).collect::<Result<Vec<_>, _>>()?;
    let layouts = plans
        .iter()
        .enumerate()
        .map(|(rank, plan)| ShardLayout::new(rank, ranks, plan.iter().map(|p| p.shard.clone()).collect()))
        .collect::<Result<Vec<_>, _>>()?;
    let files = (0..ranks).map(|rank| folder.file(&weight_file(rank))).collect::<Result<Vec<_>, _>>()?;
    let written = write_shards(&layouts, &files, build.source, progress)?;

    let model_texts: Vec<String> =
        build.imported.iter().map(|graph| tpshard_ir::text::print_graph(graph)).collect();
    let certificates: Vec<(String, String)> = build
        .entries
        .iter()
        .map(|(name, program)| (certificate_part(name), tpshard_ir::text::print_program(program)))
        .collect();
    let program_hash = program_hash(&model_texts, &certificates);
    let mut programs = Vec::with_capacity(ranks);
    let mut cubins = build.cuda.map(Cubins::new);
    for (rank, plan) in plans.iter().enumerate() {
        let mut program = rank_program(build, rank, plan, &written.weights_hash, &program_hash)?;
        if let Some(cubins) = &mut cubins {
            cuda::attach(&mut program, build.pieces);
            program.device.as_mut().map_or(Ok(()), |code| cubins.add(code))?;
        }
        let payload = payload(&program, &certificates)?;
        write(
            folder.executable(&format!("rank{rank}"))?,
            &format!("rank{rank}"),
            &elf::with_program(build.runner, &payload)?,
        )?;
        programs.push(sha256(&payload));
    }
    let launcher = container::encode(&[(PART_LAUNCHER, ranks.to_string().as_bytes())])?;
    write(folder.executable("run")?, "run", &elf::with_program(build.runner, &launcher)?)?;
    for (index, text) in model_texts.iter().enumerate() {
        let name = model_text(index);
        write(folder.file(&name)?, &name, text.as_bytes())?;
    }
    write(folder.file(PLAN_TEXT)?, PLAN_TEXT, build.plan_text.as_bytes())?;
    write(folder.file(REPORT_PAGE)?, REPORT_PAGE, build.report_html.as_bytes())?;
    let contents = Contents {
        weights: &written.ranks,
        weights_hash: &written.weights_hash,
        program_hash: &program_hash,
        payloads: &programs,
        plan_sha256: &sha256(build.plan_text.as_bytes()),
        report_sha256: &sha256(build.report_html.as_bytes()),
    };
    let config = config(&build.inputs, build.entries, &contents);
    let mut text = serde_json::to_string_pretty(&config).unwrap_or_default();
    text.push('\n');
    write(folder.file(CONFIG)?, CONFIG, text.as_bytes())?;
    folder.commit()?;
    let weight_bytes = layouts.iter().map(ShardLayout::file_length).collect();
    Ok(Built { weights_hash: written.weights_hash, program_hash, weight_bytes })
}

/// The name of a rank's weight file.
pub fn weight_file(rank: usize) -> String {
    format!("rank{rank}.safetensors")
}

/// One tensor of a rank's weight file, and the expression by which its program asks for it.
struct PlannedWeight {
    local: WeightExpr,
    shard: ShardTensor,
}

impl PlannedWeight {
    fn tensor(&self) -> WeightTensor {
        WeightTensor {
            expr: self.local.clone(),
            name: self.shard.name.clone(),
            dtype: self.shard.dtype(),
            shape: self.shard.shape(),
        }
    }
}

/// The weights of `rank`: every family of a weight in any entry once, named after the initializer it comes from.
fn plan_weights(entries: &[(String, Spmd)], rank: usize) -> Result<Vec<PlannedWeight>, BuildError> {
    let mut names: BTreeMap<(WeightExpr, Layout), String> = BTreeMap::new();
    let mut taken: BTreeSet<String> = BTreeSet::new();
    let mut planned: Vec<PlannedWeight> = Vec::new();
    for (_, program) in entries {
        let local = tpshard_ir::spmd::instantiate(program, rank)?;
        for (index, step) in program.steps.iter().enumerate() {
            let Some(Op::Weight(global)) = program.logical.nodes().get(step.value.index()).map(|n| &n.op)
            else {
                continue;
            };
            let Some(Op::Weight(expr)) = local.nodes().get(index).map(|n| &n.op) else { continue };
            let key = (global.clone(), step.layout.clone());
            if names.contains_key(&key) {
                continue;
            }
            let name = free_name(global, &mut taken);
            names.insert(key, name.clone());
            let region = region(program, StepId(index as u32), rank);
            let shard = ShardTensor { name, weight: global.clone(), region, metadata: BTreeMap::new() };
            planned.push(PlannedWeight { local: expr.clone(), shard });
        }
    }
    Ok(planned)
}

/// What the weight file of `rank` holds for these programs.
///
/// # Errors
/// A step without a local form; a checked program has none.
pub fn planned_shards(entries: &[(String, Spmd)], rank: usize) -> Result<Vec<ShardTensor>, BuildError> {
    Ok(plan_weights(entries, rank)?.into_iter().map(|planned| planned.shard).collect())
}

/// The table by which the program of `rank` finds its weights in the file.
///
/// # Errors
/// As [`planned_shards`].
pub fn planned_weights(entries: &[(String, Spmd)], rank: usize) -> Result<Vec<WeightTensor>, BuildError> {
    Ok(plan_weights(entries, rank)?.iter().map(PlannedWeight::tensor).collect())
}

fn free_name(expr: &WeightExpr, taken: &mut BTreeSet<String>) -> String {
    let initializers = expr.initializers();
    let base = initializers.iter().next().copied().unwrap_or("weight");
    let name = std::iter::once(base.to_owned())
        .chain((2u64..).map(|i| format!("{base}#{i}")))
        .find(|name| !taken.contains(name) && name != "__metadata__" && !name.is_empty())
        .unwrap_or_default();
    taken.insert(name.clone());
    name
}

/// The part of a weight that `rank` holds. Weights have constant extents, so their runs are constant.
fn region(program: &Spmd, step: StepId, rank: usize) -> Vec<Span> {
    let step = &program.steps[step.index()];
    let shape = &program.logical.ty(step.value).shape;
    local_runs(shape, &step.layout, &program.mesh, rank)
        .iter()
        .map(|run| Span {
            start: run.start.as_size().unwrap_or(0),
            length: run.length.as_size().unwrap_or(0),
        })
        .collect()
}

fn rank_program(
    build: &Build<'_>,
    rank: usize,
    weights: &[PlannedWeight],
    weights_hash: &str,
    program_hash: &str,
) -> Result<RankProgram, BuildError> {
    let entries = build
        .entries
        .iter()
        .map(|(name, program)| entry(program, rank, name))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(RankProgram {
        rank,
        mesh: build.entries.first().ok_or(BuildError::Empty)?.1.mesh.clone(),
        determinism: build.determinism,
        states: entries.first().map(Entry::states).unwrap_or_default(),
        entries,
        weights: weights.iter().map(PlannedWeight::tensor).collect(),
        device: None,
        weights_hash: weights_hash.into(),
        program_hash: program_hash.into(),
    })
}

/// What `rank` executes for `program`, with its inputs in the model's order, by which numbered files are matched.
///
/// # Errors
/// A step without a local form; a checked program has none.
pub fn entry(program: &Spmd, rank: usize, name: &str) -> Result<Entry, InstantiateError> {
    let mut entry = Entry::from_spmd(program, rank, name)?;
    let place = |name: &str| program.logical.inputs().position(|(_, known, _)| known.as_ref() == name);
    entry.inputs.sort_by_key(|port| place(&port.name));
    Ok(entry)
}

/// The program's own parts, then the certificates.
fn payload(program: &RankProgram, certificates: &[(String, String)]) -> Result<Vec<u8>, BuildError> {
    let extra: Vec<(&str, &[u8])> =
        certificates.iter().map(|(name, text)| (name.as_str(), text.as_bytes())).collect();
    Ok(program.encode(&extra)?)
}

/// The hash of the plan: the same on all ranks, independent of the weights' bytes.
pub fn program_hash(model_texts: &[String], certificates: &[(String, String)]) -> String {
    let mut hash = Sha256::new();
    for text in model_texts.iter().chain(certificates.iter().map(|(_, text)| text)) {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text.as_bytes());
    }
    hex(&hash.finalize())
}

fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn write(mut file: File, name: &str, bytes: &[u8]) -> Result<(), BuildError> {
    file.write_all(bytes).map_err(|error| BuildError::Write { name: name.into(), error })
}

/// What `config.json` says of the folder's other files.
#[derive(Clone, Copy, Debug)]
pub struct Contents<'a> {
    /// The tensors of every rank's weight file, in the order of the file.
    pub weights: &'a [Vec<TensorRecord>],
    pub weights_hash: &'a str,
    pub program_hash: &'a str,
    /// The hash of every rank's payload.
    pub payloads: &'a [String],
    pub plan_sha256: &'a str,
    pub report_sha256: &'a str,
}

/// `config.json`: all of it but the build's `inputs` follows from the programs and the files.
pub fn config(inputs: &Map<String, Value>, entries: &[(String, Spmd)], contents: &Contents<'_>) -> Value {
    let ports: Vec<Value> = entries.iter().map(|(name, program)| entry_config(name, program)).collect();
    let ranks: Vec<Value> = contents
        .weights
        .iter()
        .zip(contents.payloads)
        .enumerate()
        .map(|(rank, (tensors, payload))| {
            json!({
                "executable": format!("rank{rank}"),
                "payload_sha256": payload,
                "weights": weight_file(rank),
                "tensors": tensors,
            })
        })
        .collect();
    json!({
        "format": CONFIG_FORMAT,
        "version": CONFIG_VERSION,
        "build": inputs,
        "mesh": entries.first().map(|(_, p)| p.mesh.0.clone()),
        "weights_hash": contents.weights_hash,
        "program_hash": contents.program_hash,
        "plan_sha256": contents.plan_sha256,
        "report_sha256": contents.report_sha256,
        "entries": ports,
        "ranks": ranks,
    })
}

fn entry_config(name: &str, program: &Spmd) -> Value {
    // The first family of an input is the one that enters.
    let entering =
        |value| program.steps.iter().find(|step| step.value == value).map(|s| s.layout.to_string());
    let inputs: Vec<Value> = program
        .logical
        .inputs()
        .filter(|(value, _, _)| value.index() < program.imported)
        .map(|(value, name, ty)| {
            // What chooses the entry is read before any step.
            let chooses = program.logical.cases.iter().any(|case| case.input == *name);
            let whole = || Layout::replicated(&program.mesh).to_string();
            let layout = entering(value).or_else(|| chooses.then(whole));
            json!({ "name": name.as_ref(), "type": ty.to_string(), "layout": layout })
        })
        .collect();
    let leaving = |output: &SpmdOutput| {
        let step = program.steps.get(output.step.index())?;
        let ty = &program.logical.nodes().get(step.value.index())?.ty;
        Some((ty.to_string(), step.layout.to_string()))
    };
    let outputs: Vec<Value> = program
        .outputs
        .iter()
        .map(|output| {
            let (ty, layout) = leaving(output).unzip();
            json!({ "name": output.name.as_ref(), "type": ty, "layout": layout })
        })
        .collect();
    let states: Vec<Value> = program
        .logical
        .states
        .iter()
        .map(|s| json!({ "input": s.input.as_ref(), "output": s.output.as_ref(), "axis": s.axis }))
        .collect();
    let ranges: Map<String, Value> = program
        .logical
        .symbols
        .iter()
        .map(|(symbol, range)| (symbol.to_string(), json!([range.low, range.high])))
        .collect();
    let mut entry =
        json!({ "name": name, "ranges": ranges, "inputs": inputs, "outputs": outputs, "states": states });
    let cases: Map<String, Value> =
        program.logical.cases.iter().map(|case| (case.input.to_string(), case.value.into())).collect();
    if !cases.is_empty() {
        entry["cases"] = Value::Object(cases);
    }
    entry
}
