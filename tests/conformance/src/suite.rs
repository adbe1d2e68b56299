//! The tests that a wheel of the `onnx` package holds: models, inputs, expected outputs and tolerances, as files.

use crate::tier::Tier;
use anyhow::{Context, Result, bail};
use prost::Message;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use tpshard_frontend::proto::ModelProto;

/// Where the tests are inside the wheel.
const DATA: &str = "onnx/backend/test/data/";
/// The kinds of tests that come with their data; `real` ones are links.
const KINDS: [&str; 4] = ["node", "simple", "pytorch-converted", "pytorch-operator"];
/// Models without stored inputs: one file each, inputs by a rule.
const LIGHT: &str = "light";
/// What the suite allows where a test says nothing else.
const RTOL: f64 = 1e-3;
const ATOL: f64 = 1e-7;
/// The exception, as `data/real/*/data.json` states it.
const LOOSE: (&str, f64) = ("light_densenet121", 2e-3);

/// Tests of old versions whose expected outputs are wrong: version and part of the name.
const SUPERSEDED: [(&str, &str); 1] = [
    // Made by cutting mantissas off; the specification rounds, as newer versions do.
    ("1.11.0", "FLOAT_to_BFLOAT16"),
];

/// Tests whose expected outputs hold noise: part of the name, and the absolute tolerance that covers it. Where the exact
/// result is 0, those of the inverse transforms are what a fast transform in 32 bits leaves.
const NOISY: [(&str, f64); 1] = [("dft_inverse", 1e-5)];

/// One test.
#[derive(Clone, Debug)]
pub(crate) struct Test {
    /// The version of the package.
    pub(crate) suite: String,
    pub(crate) kind: String,
    pub(crate) name: String,
    pub(crate) model: PathBuf,
    /// Folders of `input_*.pb` and `output_*.pb`.
    pub(crate) data: Vec<PathBuf>,
    pub(crate) rtol: f64,
    pub(crate) atol: f64,
    /// The share of an output's largest finite element that counts as absolute tolerance.
    pub(crate) share: Option<f64>,
    pub(crate) operator: Operator,
    /// The version of `ai.onnx` the model imports, 0 if none.
    pub(crate) opset: i64,
    pub(crate) tier: Tier,
}

/// The operator a test is about, with the opset it is written in.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Operator {
    pub(crate) name: String,
    pub(crate) opset: i64,
    /// The operator's function body instead of the operator.
    pub(crate) expanded: bool,
}

impl Test {
    pub(crate) fn is_light(&self) -> bool {
        self.kind == LIGHT
    }

    /// The expected outputs of a light model.
    pub(crate) fn light_output(&self, index: usize) -> PathBuf {
        self.model.with_file_name(format!("{}_output_{index}.pb", self.name))
    }
}

/// Unpacks the tests of a wheel beside it, unless that was done before.
pub(crate) fn unpack(wheel: &Path) -> Result<PathBuf> {
    let folder = wheel.with_extension("data");
    let stamp = folder.join("complete");
    if stamp.exists() {
        return Ok(folder);
    }
    let file = File::open(wheel).with_context(|| wheel.display().to_string())?;
    let mut archive = zip::ZipArchive::new(file).with_context(|| wheel.display().to_string())?;
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index)?;
        let Some(name) = entry.enclosed_name() else { bail!("{}: a name that leaves it", wheel.display()) };
        if !entry.is_file() || !name.starts_with(DATA) {
            continue;
        }
        let target = folder.join(name);
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)?;
        }
        let mut file = File::create(&target).with_context(|| target.display().to_string())?;
        io::copy(&mut entry, &mut file)?;
    }
    File::create(stamp)?;
    Ok(folder)
}

/// What makes two versions of a test the same one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Identity {
    /// Written in the same opset: what differs was corrected.
    Name(String, String, i64),
    /// The model and its inputs.
    Contents([u8; 32]),
}

/// The tests of an unpacked wheel in order of their names, without those that `seen` has from a newer one.
pub(crate) fn tests(suite: &str, folder: &Path, seen: &mut BTreeSet<Identity>) -> Result<Vec<Test>> {
    let data = folder.join(DATA);
    let mut tests = Vec::new();
    for kind in KINDS {
        for path in sorted(&data.join(kind))? {
            let model = path.join("model.onnx");
            if !model.is_file() {
                continue;
            }
            let sets = sorted(&path)?.into_iter().filter(|p| p.is_dir()).collect();
            tests.extend(test(suite, kind, file_name(&path), model, sets)?);
        }
    }
    // Old packages have links instead.
    let light = data.join(LIGHT);
    for path in if light.is_dir() { sorted(&light)? } else { Vec::new() } {
        if path.extension().is_some_and(|e| e == "onnx") {
            let name = path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
            tests.extend(test(suite, LIGHT, name, path, Vec::new())?);
        }
    }
    written_out(&mut tests);
    let mut fresh = Vec::new();
    for test in tests {
        let name = Identity::Name(test.kind.clone(), test.name.clone(), test.operator.opset);
        let (name, contents) = (seen.insert(name), seen.insert(Identity::Contents(hash(&test)?)));
        let superseded =
            SUPERSEDED.iter().any(|(suite, part)| test.suite == *suite && test.name.contains(part));
        if name && contents && !superseded {
            fresh.push(test);
        }
    }
    Ok(fresh)
}

pub(crate) fn test(
    suite: &str,
    kind: &str,
    name: String,
    model: PathBuf,
    data: Vec<PathBuf>,
) -> Result<Option<Test>> {
    let bytes = fs::read(&model).with_context(|| model.display().to_string())?;
    let proto = ModelProto::decode(bytes.as_slice()).with_context(|| model.display().to_string())?;
    // A pointer to a file that is not in the wheel.
    let Some(graph) = proto.graph else { return Ok(None) };
    let opset =
        |domain: &str| proto.opset_import.iter().find(|o| o.domain == domain).map_or(0, |o| o.version);
    let first = graph.node.iter().find(|node| node.op_type != "Constant").or(graph.node.first());
    let operator = first.map_or_else(
        || Operator { name: "no operator".into(), opset: opset(""), expanded: false },
        |node| {
            let domain = if node.domain == "ai.onnx" { "" } else { node.domain.as_str() };
            let name = match domain {
                "" => node.op_type.clone(),
                domain => format!("{domain}.{}", node.op_type),
            };
            Operator { name, opset: opset(domain), expanded: false }
        },
    );
    let rtol = if name == LOOSE.0 { LOOSE.1 } else { RTOL };
    let atol = NOISY.iter().find(|(part, _)| name.contains(part)).map_or(ATOL, |(_, atol)| *atol);
    let (suite, kind) = (suite.to_owned(), kind.to_owned());
    let (opset, tier) = (opset(""), Tier::of(&graph));
    Ok(Some(Test { suite, kind, name, model, data, rtol, atol, share: None, operator, opset, tier }))
}

/// `test_x_expanded` is `test_x` with the function body of its operator in place of the operator.
fn written_out(tests: &mut [Test]) {
    let known: BTreeMap<String, String> =
        tests.iter().map(|test| (test.name.clone(), test.operator.name.clone())).collect();
    for test in tests {
        if let Some((base, _)) = test.name.rsplit_once("_expanded") {
            test.operator.expanded = true;
            if let Some(name) = known.get(base) {
                test.operator.name.clone_from(name);
            }
        }
    }
}

/// The hash of the model and its inputs, not of the expected outputs.
fn hash(test: &Test) -> Result<[u8; 32]> {
    let mut hash = Sha256::new();
    hash.update(test.name.as_bytes());
    hash.update(fs::read(&test.model)?);
    for set in &test.data {
        for file in sorted(set)? {
            if !file_name(&file).starts_with("output") {
                hash.update(fs::read(file)?);
            }
        }
    }
    Ok(hash.finalize().into())
}

pub(crate) fn sorted(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut paths = entries.map(|e| Ok(e?.path())).collect::<io::Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}
