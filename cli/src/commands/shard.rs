//! `tpshard MODEL --tp N`: the main job.

use super::cases;
use super::pins;
use super::planning::{Planning, check_ranks, findings_text, import_graphs, profile_text};
use super::report_page::report_page;
use super::reporting::{report_json, summary, warn};
use crate::arguments::ShardArguments;
use crate::failure::{Classify, Failure, Kind, Outcome};
use crate::target::Target;
use crate::{output, progress};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::io::Read;
use std::path::{Path, PathBuf};
use tpshard_checker::Finding;
use tpshard_codegen::build::{Build, BuildError, build};
use tpshard_codegen::cubins::CudaTarget;
use tpshard_codegen::elf::with_program;
use tpshard_codegen::folder::{FolderError, OutputFolder};
use tpshard_codegen::weights::{SourceError, WeightError, WeightSource};
use tpshard_driver::SearchPath;
use tpshard_driver::nvrtc::Nvrtc;
use tpshard_frontend::Imported;
use tpshard_ir::graph::Node;
use tpshard_ir::program::Determinism;
use tpshard_ir::{Graph, Op, Spmd};
use tpshard_passes::Plan;

pub(crate) fn shard(arguments: &ShardArguments, json: bool, quiet: bool) -> Outcome<()> {
    check_ranks(arguments.tp)?;
    let target = match &arguments.out {
        Some(out) => out.clone(),
        None => default_folder(&arguments.model, arguments.tp),
    };
    let runner = read_runner(arguments.runner.as_deref())?;
    let model_folder =
        arguments.model.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Everything that can be refused is refused before any work; the space is checked again when sizes are known.
    let runners = (runner.len() as u64).saturating_mul(arguments.tp as u64 + 1);
    let folder = OutputFolder::create(&target, arguments.overwrite, runners, &[model_folder]);
    let folder = folder.or_fail(Kind::Resource)?;
    let graphs = import_graphs(&arguments.model, &arguments.from, true)?;
    let planning = Planning::new(&graphs, &arguments.pricing, &[arguments.tp])?;
    let plan = planning.plan(arguments.tp).map_err(|error| planning.failure(arguments.tp, &error))?;
    check(&plan, &graphs, arguments)?;
    let plan_text = plan.report.to_string();
    let report_html = report_page(&file_name(&arguments.model), &planning, &plan);
    let needed = Sizes::of(&plan, &graphs, &runner, &arguments.target).folder(arguments.tp);
    let needed = needed.saturating_add(report_html.len() as u64);
    folder.require_space(needed).or_fail(Kind::Resource)?;
    let source = ModelWeights::of(&graphs)?;
    let compiler = compiler(&arguments.target, arguments.pricing.determinism)?;
    let cuda = match &arguments.target {
        Target::Cpu => None,
        Target::Cuda(all) => Some(CudaTarget { architectures: all.clone(), compiler: compiler.as_ref() }),
    };
    let inputs = build_inputs(arguments, source.imported, &plan, &runner, compiler.as_ref())?;
    let imported: Vec<&Graph> = graphs.iter().map(|imported| &imported.graph).collect();
    let request = Build {
        imported: &imported,
        entries: &plan.programs,
        plan_text: &plan_text,
        determinism: arguments.pricing.determinism,
        report_html: &report_html,
        runner: &runner,
        source: &source,
        cuda: cuda.as_ref(),
        pieces: &plan.cuts,
        inputs,
    };
    let bar = progress::bytes(
        plan.report.weight_bytes.saturating_mul(arguments.tp as u64),
        "writing weights",
        quiet || json,
    );
    let built = build(folder, &request, &mut |bytes| bar.inc(bytes)).map_err(build_failure)?;
    bar.finish_and_clear();
    if json {
        let result = json!({
            "folder": target.display().to_string(),
            "ranks": arguments.tp,
            "weights_hash": built.weights_hash,
            "program_hash": built.program_hash,
            "weight_bytes": built.weight_bytes,
            "plan": report_json(&plan.report),
        });
        output::line(result)?;
    } else {
        output::line(format_args!("{}\nwrote {}", summary(&plan.report), target.display()))?;
    }
    warn(&plan.report);
    Ok(())
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

fn default_folder(model: &Path, ranks: usize) -> PathBuf {
    let stem = model.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    PathBuf::from(format!("{stem}-tp{ranks}"))
}

/// NVIDIA's compiler, if the target needs it and it is there.
fn compiler(target: &Target, determinism: Determinism) -> Outcome<Option<Nvrtc>> {
    if *target == Target::Cpu {
        return Ok(None);
    }
    if determinism == Determinism::Tp {
        let message = "--determinism tp: kernels for GPUs give equal bits for one number of ranks only\n\
                       help: --determinism run, or --target cpu";
        return Err(Failure::new(Kind::Usage, message));
    }
    match Nvrtc::load(&SearchPath::from_environment()) {
        Ok(compiler) => Ok(Some(compiler)),
        Err(error) => {
            output::say(format_args!(
                "note: the kernels are compiled when the ranks first start, since this machine has no compiler for \
                 them: {error}"
            ));
            Ok(None)
        }
    }
}

pub(crate) fn version_text((major, minor): (u32, u32)) -> String {
    format!("{major}.{minor}")
}

/// Largest file that is taken for a runner.
const MAX_RUNNER: u64 = 1 << 30;

/// The executable to copy, after trying whether a program can be put into it.
fn read_runner(path: Option<&Path>) -> Outcome<Vec<u8>> {
    let (path, kind) = match path {
        Some(path) => (path, Kind::Usage),
        None => (Path::new("/proc/self/exe"), Kind::Resource),
    };
    let refuse = |what: String| Failure::new(kind, format!("--runner {}: {what}", path.display()));
    let help = "help: name a tpshard executable for the machines that are to run the ranks";
    let found = std::fs::metadata(path).map_err(|e| refuse(format!("{e}\n{help}")))?;
    if !found.is_file() || found.len() > MAX_RUNNER {
        return Err(refuse(format!("is not an executable file of at most {MAX_RUNNER} bytes\n{help}")));
    }
    let runner = std::fs::read(path).map_err(|e| refuse(format!("{e}\n{help}")))?;
    with_program(&runner, &[]).map_err(|e| refuse(e.to_string()))?;
    Ok(runner)
}

/// What is lost at the ends of a rank's files, which are padded to pages.
const ROOM_PER_RANK: u64 = 16 << 10;
/// A tensor's line in the header of a weight file, in the program's table and in `config.json`.
const ROOM_PER_TENSOR: u64 = 2 << 10;
/// The kernels of a model as text, or as machine code for one architecture.
const ROOM_PER_CUBIN: u64 = 1 << 20;

/// Bytes of what a folder is made of.
struct Sizes {
    runner: u64,
    /// The certificates, which every rank has.
    certificate: u64,
    /// The model's graphs.
    model: u64,
    /// Tensors of a weight file.
    tensors: u64,
    /// The tensors' bytes on one rank.
    weights: u64,
    /// Kernels of one rank.
    kernels: u64,
}

impl Sizes {
    fn of(plan: &Plan, graphs: &[Imported], runner: &[u8], target: &Target) -> Sizes {
        let is_weight = |node: &&Node| matches!(node.op, Op::Weight(_));
        let sum = |size: &dyn Fn(&Spmd) -> u64| plan.programs.iter().map(|(_, program)| size(program)).sum();
        Sizes {
            runner: runner.len() as u64,
            certificate: sum(&|program| tpshard_ir::text::print_program(program).len() as u64),
            model: graphs.iter().map(|i| tpshard_ir::text::print_graph(&i.graph).len() as u64).sum(),
            tensors: sum(&|program| program.logical.nodes().iter().filter(is_weight).count() as u64),
            weights: plan.report.weight_bytes,
            kernels: match target {
                Target::Cpu => 0,
                Target::Cuda(all) => (all.len() as u64 + 1).saturating_mul(ROOM_PER_CUBIN),
            },
        }
    }

    /// What the folder takes, and a hundredth more.
    fn folder(&self, ranks: usize) -> u64 {
        // A rank's graph and tables are about as long as its certificate; the folder has the model's graph once more.
        let programs = self.certificate.saturating_mul(2).saturating_add(ROOM_PER_RANK);
        let tables = self.tensors.saturating_mul(ROOM_PER_TENSOR);
        let parts = [programs, tables, self.weights, self.kernels, self.runner];
        let rank = parts.into_iter().fold(0, u64::saturating_add);
        let whole = rank.saturating_mul(ranks as u64).saturating_add(self.runner).saturating_add(self.model);
        whole.saturating_add(whole / 100)
    }
}

/// The exit code that fits what went wrong while the folder was written.
fn build_failure(error: BuildError) -> Failure {
    let kind = match &error {
        BuildError::Folder(FolderError::FileName { .. } | FolderError::Unmarked) => Kind::Internal,
        BuildError::Folder(_) | BuildError::Write { .. } => Kind::Resource,
        BuildError::Weights(error) => weight_kind(error),
        // Also an architecture that this compiler does not know.
        BuildError::Kernels(_) => Kind::Resource,
        // The runner has been tried before; a rank's program must fit.
        BuildError::Elf(_)
        | BuildError::Container(_)
        | BuildError::Program(_)
        | BuildError::Instantiate(_)
        | BuildError::Empty => Kind::Internal,
    };
    let text = error.to_string();
    let help = match kind {
        Kind::Internal if !text.contains("help: ") => "\nhelp: please report this model",
        _ => "",
    };
    Failure::new(kind, format!("{text}{help}"))
}

fn weight_kind(error: &WeightError) -> Kind {
    match error {
        WeightError::Tensor { error, .. } => weight_kind(error),
        WeightError::Source { .. } | WeightError::Write { .. } | WeightError::FileTooLarge { .. } => {
            Kind::Resource
        }
        WeightError::Length { .. } | WeightError::Name { .. } | WeightError::Unaligned { .. } => Kind::Model,
        WeightError::Region { .. }
        | WeightError::Expression(_)
        | WeightError::Duplicate { .. }
        | WeightError::FileCount { .. } => Kind::Internal,
    }
}

/// The certificate is checked before anything is written: a planner's mistake never leaves the house.
fn check(plan: &Plan, graphs: &[Imported], arguments: &ShardArguments) -> Outcome<()> {
    for (name, program) in &plan.programs {
        let imported = cases::of(graphs, |imported| &imported.graph, &program.logical.cases);
        let missing = || Failure::new(Kind::Internal, format!("entry {name} is for no graph of the model"));
        tpshard_checker::check(program, &imported.ok_or_else(missing)?.graph)
            .map_err(|findings| refuted(&findings, &arguments.from.output))?;
    }
    Ok(())
}

fn refuted(findings: &[Finding], outputs: &[String]) -> Failure {
    if let Some(finding) = too_large(findings).filter(|_| !outputs.is_empty()) {
        let message = format!(
            "--output {}: the dims that the model needs for this are too large to check a plan with
{}
\
             help: name positions closer to the start, or from the end, such as NAME[:, -1]",
            outputs.join(" --output "),
            findings_text(&[finding])
        );
        return Failure::new(Kind::Usage, message);
    }
    let message = format!(
        "the plan does not pass its own check; nothing was written
{}
help: please report this model",
        findings_text(findings)
    );
    Failure::new(Kind::Internal, message)
}

/// An equation that could not be executed because its dims are too large, if that is all that is wrong.
fn too_large(findings: &[Finding]) -> Option<&Finding> {
    // Outputs are found not to follow because of such equations.
    let known = |finding: &Finding| finding.is_about_size() || matches!(finding, Finding::Output { .. });
    findings.iter().find(|finding| finding.is_about_size()).filter(|_| findings.iter().all(known))
}

/// Everything that decided what was built, and nothing that says where it lay. The bytes of external data are covered
/// by the hashes of the tensors made of them.
fn build_inputs(
    arguments: &ShardArguments,
    imported: &Imported,
    plan: &Plan,
    runner: &[u8],
    compiler: Option<&Nvrtc>,
) -> Outcome<Map<String, Value>> {
    let pricing = &arguments.pricing;
    let value = json!({
        "tool": env!("CARGO_PKG_VERSION"),
        "model": {
            "file": file_name(&arguments.model),
            "sha256": file_sha256(&arguments.model)?,
            "ir_version": imported.model.ir_version,
            "opsets": imported.model.opsets,
            "outputs": imported.model.graph.outputs.iter().map(|output| &output.name).collect::<Vec<_>>(),
        },
        "target": arguments.target.to_string(),
        "nvrtc": compiler.map(|compiler| version_text(compiler.version())),
        // This tool is the runner unless another was given.
        "runner_sha256": arguments.runner.as_ref().map(|_| hex(&Sha256::digest(runner))),
        "bind": arguments.from.bind,
        "outputs": arguments.from.output,
        "roles": arguments.from.role,
        "dtype": arguments.from.dtype.map(|precision| precision.dtype().name()),
        "dim": pricing.dim,
        "memory": { "given": pricing.memory, "budget_bytes": plan.report.budget },
        "split_all": pricing.split_all,
        "determinism": pricing.determinism.name(),
        "overlap": pricing.overlap.to_string(),
        "pins": pins::record(&arguments.pricing)?,
        "profile": plan.report.profile,
        "profile_text": profile_text(&pricing.profile)?,
        "plan": report_json(&plan.report),
    });
    match value {
        Value::Object(map) => Ok(map),
        _ => Err(Failure::new(Kind::Internal, "the build inputs are not an object")),
    }
}

/// The hash of a file, read piece by piece.
pub(crate) fn file_sha256(path: &Path) -> Outcome<String> {
    let unreadable = |e: std::io::Error| Failure::new(Kind::Resource, format!("{}: {e}", path.display()));
    let mut file = std::fs::File::open(path).map_err(unreadable)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(hex(&hash.finalize())),
            Ok(length) => hash.update(buffer.get(..length).unwrap_or_default()),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(unreadable(error)),
        }
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The model's initializers, mapped on demand.
pub(crate) struct ModelWeights<'a> {
    pub(crate) imported: &'a Imported,
}

impl ModelWeights<'_> {
    /// The graphs of a model name their weights alike, so the first has those of all.
    pub(crate) fn of(graphs: &[Imported]) -> Outcome<ModelWeights<'_>> {
        let first = graphs.first().ok_or_else(|| Failure::new(Kind::Internal, "a model without a graph"))?;
        Ok(ModelWeights { imported: first })
    }
}

impl WeightSource for ModelWeights<'_> {
    fn bytes(&self, initializer: &str) -> Result<bytes::Bytes, SourceError> {
        self.imported.initializer_bytes(initializer).map_err(|fault| fault.to_string().into())
    }

    fn position(&self, initializer: &str) -> u64 {
        use tpshard_frontend::TensorSource;
        match self.imported.tensors.get(initializer).map(|t| &t.source) {
            Some(TensorSource::External { offset, .. }) => *offset,
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_ranks_of_a_small_model_need_little_more_than_their_runners() {
        let runner = 10 << 20;
        let sizes = Sizes {
            runner,
            certificate: 100 << 10,
            model: 50 << 10,
            tensors: 40,
            weights: 1 << 20,
            kernels: 0,
        };
        let (needed, runners) = (sizes.folder(1024), 1025 * runner);
        assert!(needed > runners + (1 << 30) && needed < runners + runners / 4, "{needed}");
        assert!(Sizes { kernels: 1 << 20, ..sizes }.folder(2) >= sizes.folder(2) + (2 << 20));
        assert_eq!(Sizes { weights: u64::MAX, ..sizes }.folder(2), u64::MAX);
    }

    #[test]
    fn what_goes_wrong_inside_is_not_a_matter_of_resources() {
        assert_eq!(build_failure(BuildError::Empty).kind, Kind::Internal);
        let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
        let write = BuildError::Write { name: "rank0".into(), error: full };
        assert_eq!(build_failure(write).kind, Kind::Resource);
        let file = BuildError::Folder(FolderError::FileName { name: "a/b".into() });
        assert_eq!(build_failure(file).kind, Kind::Internal);
        let twice = WeightError::Duplicate { rank: 0, name: "w".into() };
        let within = WeightError::Tensor { tensor: "w".into(), error: Box::new(twice) };
        assert_eq!(build_failure(BuildError::Weights(within)).kind, Kind::Internal);
    }
}
