//! A finished folder, taken apart, changed, and put together again with every hash refreshed: what somebody who knows
//! the format could make of it. Only reading the content can tell that it is wrong.

use crate::support::{copy_of_sharded, scratch};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use tpshard_codegen::build::{
    MODEL_TEXT, certificate_part, entry, planned_shards, program_hash, weight_file,
};
use tpshard_codegen::weights::TensorRecord;
use tpshard_codegen::weights::hash::weights_hash;
use tpshard_ir::program::{RankProgram, lower};
use tpshard_ir::{Graph, Node, Op, Spmd, StepId, ValueId, container};
use tpshard_runtime::io::SafeTensorsFile;

/// A folder for 4 ranks, changed and with all hashes refreshed.
pub(crate) fn changed(change: impl FnOnce(&mut Draft)) -> (TempDir, PathBuf) {
    let scratch = scratch();
    let folder = copy_of_sharded(4, &scratch);
    let mut draft = Draft::open(&folder);
    change(&mut draft);
    draft.save();
    (scratch, folder)
}

pub(crate) struct Draft {
    folder: PathBuf,
    pub(crate) certificate: Spmd,
    pub(crate) programs: Vec<RankProgram>,
    pub(crate) config: Value,
}

impl Draft {
    pub(crate) fn open(folder: &Path) -> Draft {
        let config: Value = serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
        let ranks = config["ranks"].as_array().unwrap().len();
        let payloads: Vec<Vec<u8>> = (0..ranks).map(|rank| payload(folder, rank)).collect();
        let parts = container::decode(&payloads[0]).unwrap();
        let text = std::str::from_utf8(parts.part(&certificate_part("main")).unwrap()).unwrap();
        Draft {
            folder: folder.into(),
            certificate: tpshard_ir::text::parse_program(text).unwrap(),
            programs: payloads.iter().map(|bytes| RankProgram::decode(bytes).unwrap()).collect(),
            config,
        }
    }

    /// The first step for which `wanted` holds.
    #[track_caller]
    pub(crate) fn step(&self, wanted: impl Fn(usize, &Node) -> bool) -> StepId {
        let steps = &self.certificate.steps;
        let found = steps
            .iter()
            .enumerate()
            .position(|(index, step)| wanted(index, self.certificate.logical.node(step.value)));
        StepId(found.expect("the plan has no such step") as u32)
    }

    pub(crate) fn graph(&self, rank: usize) -> &Graph {
        &self.programs[rank].entries[0].graph
    }

    /// Changes one node of what `rank` executes, and how it is executed with it.
    pub(crate) fn edit(&mut self, rank: usize, step: StepId, change: impl FnOnce(&mut Node)) {
        let entry = &mut self.programs[rank].entries[0];
        entry.graph = with_node(&entry.graph, step.index(), change);
        entry.lowering = lower(&entry.graph);
    }

    /// Changes one node of the certificate's logical graph.
    pub(crate) fn edit_logical(&mut self, value: ValueId, change: impl FnOnce(&mut Node)) {
        self.certificate.logical = with_node(&self.certificate.logical, value.index(), change);
    }

    /// Makes every rank execute what the changed certificate says, so that only the certificate can be at fault.
    pub(crate) fn follow_certificate(&mut self) {
        for program in &mut self.programs {
            let entry = entry(&self.certificate, program.rank, "main").unwrap();
            program.states = entry.states();
            program.entries = vec![entry];
            for weight in &mut program.weights {
                let (dtype, shape) = (weight.expr.dtype(), weight.expr.shape().to_vec());
                (weight.dtype, weight.shape) = (dtype, shape);
            }
        }
    }

    /// Flips one bit in the middle of a weight on disk and returns its name. No hash is refreshed.
    pub(crate) fn flip_weight_bit(&self, rank: usize, index: usize) -> String {
        let record = &self.config["ranks"][rank]["tensors"][index];
        let number = |key: &str| record[key].as_u64().unwrap() as usize;
        let path = self.folder.join(weight_file(rank));
        let mut bytes = fs::read(&path).unwrap();
        bytes[number("offset") + number("length") / 2] ^= 1;
        fs::write(&path, bytes).unwrap();
        record["name"].as_str().unwrap().into()
    }

    /// Writes everything back, with all hashes as they have to be.
    pub(crate) fn save(mut self) {
        let entries = [("main".to_owned(), self.certificate.clone())];
        let mut records: Vec<(usize, TensorRecord)> = Vec::new();
        for rank in 0..self.programs.len() {
            let file = SafeTensorsFile::open(&self.folder.join(weight_file(rank))).unwrap();
            for shard in planned_shards(&entries, rank).unwrap() {
                let Ok(view) = file.view(&shard.name) else { continue };
                let record = TensorRecord {
                    dtype: shard.dtype(),
                    global_shape: shard.weight.shape().to_vec(),
                    sha256: hex(view.bytes),
                    offset: 0,
                    length: 0,
                    name: shard.name,
                    region: shard.region,
                };
                records.push((rank, record));
            }
        }
        let weights = weights_hash(self.programs.len(), records.iter().map(|(rank, r)| (*rank, r)));
        for rank in 0..self.programs.len() {
            let mine = records.iter().filter(|(r, _)| *r == rank).map(|(_, record)| record);
            self.refresh_weight_file(rank, mine, &weights);
        }
        self.write_programs(&weights);
        self.config["weights_hash"] = weights.into();
        fs::write(self.folder.join("config.json"), self.config.to_string()).unwrap();
    }

    /// Hashes have a fixed length, so they are replaced in place in the file's header.
    fn refresh_weight_file<'a>(
        &mut self,
        rank: usize,
        records: impl Iterator<Item = &'a TensorRecord>,
        weights: &str,
    ) {
        let path = self.folder.join(weight_file(rank));
        let mut bytes = fs::read(&path).unwrap();
        let end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut header = String::from_utf8(bytes[8..end].to_vec()).unwrap();
        header = header.replace(self.config["weights_hash"].as_str().unwrap(), weights);
        let stated = self.config["ranks"][rank]["tensors"].as_array_mut().unwrap();
        for record in records {
            let Some(old) = stated.iter_mut().find(|t| t["name"] == record.name.as_str()) else { continue };
            header = header.replace(old["sha256"].as_str().unwrap(), &record.sha256);
            old["sha256"] = record.sha256.clone().into();
        }
        bytes[8..end].copy_from_slice(header.as_bytes());
        fs::write(&path, bytes).unwrap();
    }

    fn write_programs(&mut self, weights: &str) {
        let text = tpshard_ir::text::print_program(&self.certificate);
        let certificate = (certificate_part("main"), text);
        let model = fs::read_to_string(self.folder.join(MODEL_TEXT)).unwrap();
        let hash = program_hash(std::slice::from_ref(&model), std::slice::from_ref(&certificate));
        for (rank, program) in self.programs.iter_mut().enumerate() {
            program.weights_hash = weights.into();
            program.program_hash = hash.clone();
            let payload = program.encode(&[(&certificate.0, certificate.1.as_bytes())]).unwrap();
            self.config["ranks"][rank]["payload_sha256"] = hex(&payload).into();
            let path = self.folder.join(format!("rank{rank}"));
            let runner = fs::read(&path).unwrap();
            fs::write(&path, tpshard_codegen::elf::with_program(&runner, &payload).unwrap()).unwrap();
        }
        self.config["program_hash"] = hash.into();
    }
}

fn with_node(old: &Graph, index: usize, change: impl FnOnce(&mut Node)) -> Graph {
    let mut graph = Graph::new(&old.name);
    let mut nodes = old.nodes().to_vec();
    change(&mut nodes[index]);
    for node in nodes {
        graph.push(node);
    }
    (graph.outputs, graph.states) = (old.outputs.clone(), old.states.clone());
    (graph.symbols, graph.guards) = (old.symbols.clone(), old.guards.clone());
    (graph.cases, graph.borders) = (old.cases.clone(), old.borders.clone());
    graph
}

/// True for a step that makes ranks exchange data.
pub(crate) fn communicates(node: &Node) -> bool {
    matches!(&node.op, Op::Convert(conversion) if conversion.communicates())
}

fn payload(folder: &Path, rank: usize) -> Vec<u8> {
    let file = fs::read(folder.join(format!("rank{rank}"))).unwrap();
    tpshard_codegen::elf::program(&file).unwrap().unwrap().to_vec()
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
