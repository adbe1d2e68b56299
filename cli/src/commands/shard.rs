//! `tpshard MODEL --tp N`: the main job.

use super::planning::{check_ranks, findings_text, import_model, plan_model};
use super::reporting::{report_json, summary, warn};
use crate::arguments::ShardArguments;
use crate::failure::{Classify, Failure, Kind, Outcome};
use crate::progress;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use tpshard_codegen::build::{Build, build};
use tpshard_codegen::folder::OutputFolder;
use tpshard_codegen::weights::{SourceError, WeightSource};
use tpshard_frontend::Imported;
use tpshard_passes::Plan;

/// A runner and the texts, per rank, beside the weights.
const OVERHEAD_PER_RANK: u64 = 64 << 20;

pub(crate) fn shard(arguments: &ShardArguments, json: bool, quiet: bool) -> Outcome<()> {
    check_ranks(arguments.tp)?;
    let target = match &arguments.out {
        Some(out) => out.clone(),
        None => default_folder(&arguments.model, arguments.tp),
    };
    let runner = read_runner(arguments.runner.as_deref())?;
    let model_folder =
        arguments.model.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Everything that can be refused is refused before any work; the space is checked again with the real sizes.
    let overhead = (runner.len() as u64 + OVERHEAD_PER_RANK).saturating_mul(arguments.tp as u64 + 1);
    let folder = OutputFolder::create(&target, arguments.overwrite, overhead, &[model_folder]);
    let folder = folder.or_fail(Kind::Resource)?;
    let imported = import_model(&arguments.model, &arguments.from, true)?;
    let plan = plan_model(&imported, arguments.tp, &arguments.pricing)?;
    check(&plan, &imported)?;
    let plan_text = plan.report.to_string();
    let source = ModelWeights { imported: &imported };
    let inputs = build_inputs(arguments, &imported, &plan)?;
    let request = Build {
        imported: &imported.graph,
        entries: &plan.programs,
        plan_text: &plan_text,
        runner: &runner,
        source: &source,
        inputs,
    };
    let bar = progress::bytes(
        plan.report.weight_bytes.saturating_mul(arguments.tp as u64),
        "writing weights",
        quiet || json,
    );
    let built = build(folder, &request, &mut |bytes| bar.inc(bytes)).or_fail(Kind::Resource)?;
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
        println!("{result}");
    } else {
        println!("{}", summary(&plan.report));
        println!("wrote {}", target.display());
    }
    warn(&plan.report);
    Ok(())
}

fn default_folder(model: &Path, ranks: usize) -> PathBuf {
    let stem = model.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    PathBuf::from(format!("{stem}-tp{ranks}"))
}

fn read_runner(path: Option<&Path>) -> Outcome<Vec<u8>> {
    let path = path.unwrap_or(Path::new("/proc/self/exe"));
    std::fs::read(path).map_err(|e| Failure::new(Kind::Resource, format!("{}: {e}", path.display())))
}

/// The certificate is checked before anything is written: a planner's mistake never leaves the house.
fn check(plan: &Plan, imported: &Imported) -> Outcome<()> {
    for (_, program) in &plan.programs {
        tpshard_checker::check(program, &imported.graph).map_err(|findings| {
            let message = format!(
                "the plan does not pass its own check; nothing was written\n{}\nhelp: please report this model",
                findings_text(&findings)
            );
            Failure::new(Kind::Internal, message)
        })?;
    }
    Ok(())
}

/// Everything that decided what was built, apart from the model's weights.
fn build_inputs(arguments: &ShardArguments, imported: &Imported, plan: &Plan) -> Outcome<Map<String, Value>> {
    let file_name = arguments.model.file_name().map(|n| n.to_string_lossy().into_owned());
    let value = json!({
        "tool": env!("CARGO_PKG_VERSION"),
        "model": { "file": file_name, "ir_version": imported.model.ir_version, "opsets": imported.model.opsets },
        "target": "cpu",
        "bind": arguments.from.bind,
        "outputs": arguments.from.output,
        "roles": arguments.from.role,
        "profile": plan.report.profile,
        "plan": report_json(&plan.report),
    });
    match value {
        Value::Object(map) => Ok(map),
        _ => Err(Failure::new(Kind::Internal, "the build inputs are not an object")),
    }
}

/// The model's initializers, mapped on demand.
pub(crate) struct ModelWeights<'a> {
    pub(crate) imported: &'a Imported,
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
