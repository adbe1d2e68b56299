//! A rank's payload and weight file, as the commands use them.

use crate::failure::{Classify, Failure, Kind, Outcome};
use std::path::Path;
use tpshard_codegen::build::weight_file;
use tpshard_ir::Tensor;
use tpshard_ir::program::{Entry, Port, RankProgram, WeightTensor};
use tpshard_runtime::cpu::WeightSource;
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
pub(crate) struct ShardFile {
    file: SafeTensorsFile,
    place: String,
}

impl ShardFile {
    pub(crate) fn open(folder: &Path, rank: usize) -> Outcome<ShardFile> {
        let path = folder.join(weight_file(rank));
        let file = SafeTensorsFile::open(&path).or_fail(Kind::Resource)?;
        Ok(ShardFile { file, place: path.display().to_string() })
    }
}

impl WeightSource for ShardFile {
    fn place(&self) -> Option<String> {
        Some(self.place.clone())
    }

    fn weights_hash(&self) -> Option<String> {
        self.file.metadata().get("weights_hash").cloned()
    }

    fn tensor(&mut self, weight: &WeightTensor) -> Result<Tensor, String> {
        let wrong = |what: String| format!("{}: weight `{}`: {what}", self.place, weight.name);
        let view = self.file.view(&weight.name).map_err(|e| e.to_string())?;
        if view.dtype != weight.dtype || view.shape != weight.shape {
            let (found, wanted) = ((view.dtype, &view.shape), (weight.dtype, &weight.shape));
            return Err(wrong(format!(
                "is {}{:?}, the program needs {}{:?}\n  help: programs and weight files are of different builds",
                found.0, found.1, wanted.0, wanted.1
            )));
        }
        view.to_tensor().map_err(|e| wrong(e.to_string()))
    }
}
