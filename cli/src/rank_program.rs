//! A rank's payload and weight file, as the commands use them.

use crate::failure::{Classify, Failure, Kind, Outcome};
use std::path::Path;
use tpshard_codegen::build::weight_file;
use tpshard_ir::program::{Entry, Port, RankProgram};
use tpshard_runtime::cpu::FileWeights;
use tpshard_runtime::io::SafeTensorsFile;

/// A decoded rank program.
pub(crate) struct RankFile {
    pub(crate) program: RankProgram,
    /// Of all entries.
    pub(crate) input_names: Vec<String>,
    pub(crate) output_names: Vec<String>,
}

impl RankFile {
    pub(crate) fn decode(payload: &[u8]) -> Outcome<RankFile> {
        let program = RankProgram::decode(payload).or_fail(Kind::Mismatch)?;
        let names = |ports: fn(&Entry) -> &[Port]| {
            let mut names: Vec<String> = Vec::new();
            for port in program.entries.iter().flat_map(ports) {
                if !names.contains(&port.name.to_string()) {
                    names.push(port.name.to_string());
                }
            }
            names
        };
        let input_names = names(|entry| &entry.inputs);
        let output_names = names(|entry| &entry.outputs);
        Ok(RankFile { program, input_names, output_names })
    }

    /// Reads the payload of an executable.
    pub(crate) fn read(executable: &Path) -> Outcome<RankFile> {
        RankFile::decode(&payload(executable)?)
    }

    pub(crate) fn ranks(&self) -> usize {
        self.program.mesh.ranks()
    }
}

/// The payload in an executable's section.
pub(crate) fn payload(executable: &Path) -> Outcome<Vec<u8>> {
    let found = tpshard_runtime::elf::read_section(executable).or_fail(Kind::Resource)?;
    found.ok_or_else(|| {
        let message = format!(
            "{}: holds no program\nhelp: name an executable that `tpshard MODEL --tp N` wrote",
            executable.display()
        );
        Failure::new(Kind::Mismatch, message)
    })
}

/// The weights of a rank, mapped.
pub(crate) fn open_weights(folder: &Path, rank: usize) -> Outcome<FileWeights> {
    let file = SafeTensorsFile::open(&folder.join(weight_file(rank))).or_fail(Kind::Resource)?;
    Ok(FileWeights::new(file))
}
