//! From a path to a validated model.

use crate::convert::{self, Converter, Imports};
use crate::error::{Fault, Faults, LoadError};
use crate::external::Opener;
use crate::functions::{self, FunctionKey};
use crate::limits::Limits;
use crate::model::Model;
use crate::proto::ModelProto;
use crate::{devices, map, sniff, structure, wire};
use bytes::Bytes;
use prost::Message;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::ops::RangeInclusive;
use std::path::Path;

/// Versions of the default operator set that are understood.
pub const OPSETS: RangeInclusive<i64> = 1..=26;

/// Versions of the file format that are understood. Version 3 introduced the opset import.
pub const IR_VERSIONS: RangeInclusive<i64> = 3..=14;

/// Reads, validates and sorts the model at `path`. Weights are mapped, not read.
///
/// # Errors
/// Everything wrong with the file that one pass can find.
pub fn load(path: &Path, limits: &Limits) -> Result<Model, LoadError> {
    let whole = |fault: Fault| LoadError::new(path, fault);
    let content = open(path).map_err(whole)?;
    sniff::refuse_other_formats(&content).map_err(whole)?;
    wire::scan(&content, limits).map_err(whole)?;
    let heap = limits.heap(content.len() as u64);
    let proto = ModelProto::decode(content).map_err(|error| {
        let message = format!("the file cannot be decoded: {error}");
        whole(Fault::invalid(message, "download or export the model again"))
    })?;
    assemble(proto, path, limits, heap)
}

fn open(path: &Path) -> Result<Bytes, Fault> {
    let failed = |error: io::Error| {
        let help = match error.kind() {
            io::ErrorKind::NotFound => "check the path",
            io::ErrorKind::PermissionDenied => {
                "check the permissions of the file and of the folders above it"
            }
            _ => "check that the file is readable",
        };
        Fault::io(format!("cannot open the model: {error}"), help)
    };
    let metadata = std::fs::metadata(path).map_err(failed)?;
    if metadata.is_dir() {
        return Err(Fault::io("this is a folder, not a model", "pass the .onnx file inside it"));
    }
    if !metadata.is_file() {
        return Err(Fault::io("this is not a regular file", "save the model to a file first"));
    }
    let file = File::open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    map::file_bytes(&file, metadata.len()).map_err(failed)
}

fn assemble(proto: ModelProto, path: &Path, limits: &Limits, heap: u64) -> Result<Model, LoadError> {
    let whole = |fault: Fault| LoadError::new(path, fault);
    let ir_version = check_ir_version(proto.ir_version).map_err(whole)?;
    let mut faults = Faults::default();
    let opsets = convert::opsets(proto.opset_import);
    check_opsets(&opsets, &mut faults);
    let Some(graph) = proto.graph else {
        let message = "the file holds no graph: it is not an ONNX model, or an empty one";
        return Err(whole(Fault::invalid(message, "export the model again")));
    };
    let opener = Opener::new(path, limits).map_err(|error| {
        whole(Fault::io(
            format!("cannot resolve the model's folder: {error}"),
            "check the folder's permissions",
        ))
    })?;
    let local: BTreeSet<FunctionKey> = proto
        .functions
        .iter()
        .map(|function| FunctionKey {
            domain: convert::normal_domain(function.domain.clone()),
            name: function.name.clone(),
            overload: function.overload.clone(),
        })
        .collect();
    let mut converter = Converter { opener, limits, faults, local };
    let functions: Vec<_> =
        proto.functions.into_iter().map(|function| converter.function(function, &opsets)).collect();
    let graph = converter.graph(*graph, &Imports::of_model(&opsets));
    let Converter { opener, mut faults, .. } = converter;
    let functions = functions::collect(functions, &mut faults);
    let mut model = Model {
        path: path.to_path_buf(),
        ir_version,
        opsets,
        producer: format!("{} {}", proto.producer_name, proto.producer_version).trim().to_owned(),
        graph,
        metadata: convert::metadata(proto.metadata_props),
        device_configurations: proto.configuration,
        storage: opener.into_storage(),
    };
    // Later stages would only report the consequences of what is wrong so far.
    faults.finish(path)?;
    let mut faults = Faults::default();
    functions::inline(&mut model.graph, &functions, limits, heap, &mut faults).map_err(whole)?;
    faults.finish(path)?;
    let mut faults = Faults::default();
    structure::check(&mut model.graph, &mut faults);
    devices::check(&model, &mut faults);
    faults.finish(path)?;
    Ok(model)
}

fn check_ir_version(version: Option<i64>) -> Result<i64, Fault> {
    let (low, high) = (IR_VERSIONS.start(), IR_VERSIONS.end());
    match version {
        Some(version) if IR_VERSIONS.contains(&version) => Ok(version),
        None => Err(Fault::invalid(
            "the file has no IR version: it is not an ONNX model, or it is damaged",
            "download or export the model again",
        )),
        Some(version) if version > *high => Err(Fault::unsupported(
            format!("the file has IR version {version}; versions {low} to {high} are understood"),
            "a newer format may mean things this tool would overlook; export with an older onnx package",
        )),
        Some(version) => Err(Fault::unsupported(
            format!("the file has IR version {version}; versions {low} to {high} are understood"),
            "convert the model with `onnx.version_converter`, or export it again",
        )),
    }
}

fn check_opsets(opsets: &BTreeMap<String, i64>, faults: &mut Faults) {
    if opsets.is_empty() {
        let message = "the model does not say which operator sets it uses (opset_import is empty)";
        faults.push(Fault::invalid(message, "export the model again"));
    }
    let Some(&version) = opsets.get("") else { return };
    if !OPSETS.contains(&version) {
        let message =
            format!("ai.onnx opset {version} is not supported; {} to {} are", OPSETS.start(), OPSETS.end());
        let help =
            "convert the model with `onnx.version_converter.convert_version(model, 17)`, or export it again";
        faults.push(Fault::unsupported(message, help));
    }
}
