//! What one rank needs of a folder: its program, and its weights, mapped.

use crate::fail::{Code, Fail, Outcome};
use std::path::Path;
use tpshard_codegen::build::weight_file;
use tpshard_ir::program::RankProgram;
use tpshard_runtime::cpu::FileWeights;
use tpshard_runtime::elf::read_section;
use tpshard_runtime::io::SafeTensorsFile;

pub(crate) struct RankFiles {
    pub(crate) program: RankProgram,
    pub(crate) weights: FileWeights,
}

impl RankFiles {
    pub(crate) fn open(folder: &Path, rank: usize) -> Outcome<RankFiles> {
        let program = program(folder, rank)?;
        let path = folder.join(weight_file(rank));
        let file = SafeTensorsFile::open(&path).map_err(|error| Fail::new(Code::Resources, error))?;
        Ok(RankFiles { program, weights: FileWeights::new(file) })
    }
}

/// The program of a rank.
pub(crate) fn program(folder: &Path, rank: usize) -> Outcome<RankProgram> {
    let path = folder.join(format!("rank{rank}"));
    let help = "help: name a folder that `tpshard MODEL --tp N` wrote";
    let fail = |what: String| Fail::new(Code::Mismatch, format!("{}: {what}\n  {help}", path.display()));
    let payload =
        read_section(&path).map_err(|error| Fail::new(Code::Resources, format!("{error}\n  {help}")))?;
    let payload = payload.ok_or_else(|| fail("holds no program".into()))?;
    RankProgram::decode(&payload).map_err(|error| fail(error.to_string()))
}
