//! `tpshard inspect`: what a model, a folder or an executable consists of.

use super::cases;
use super::planning::import_graphs;
use super::shard::version_text;
use crate::arguments::{InspectArguments, ModelArguments};
use crate::failure::{Classify, Failure, Kind, Outcome};
use crate::folder::Folder;
use crate::in_process::programs_of;
use crate::output;
use crate::rank_program::{RankFile, payload};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use tpshard_codegen::build::{PART_LAUNCHER, PLAN_TEXT};
use tpshard_frontend::{Imported, Limits};
use tpshard_ir::program::RankProgram;
use tpshard_ir::program::device::How;
use tpshard_ir::{Border, Filling, Op};
use tpshard_passes::report::Bytes;

pub(crate) fn inspect(arguments: &InspectArguments, json: bool) -> Outcome<()> {
    let path = &arguments.path;
    if let (Some(precision), true) = (arguments.dtype, path.is_dir() || is_elf(path)) {
        let message = format!(
            "--dtype {}: {} is no model but was made of one\nhelp: --dtype is for models; a folder has the types it was \
             built with",
            precision.dtype(),
            path.display()
        );
        return Err(Failure::new(Kind::Usage, message));
    }
    if path.is_dir() {
        return folder(arguments, json);
    }
    if let Some(rank) = arguments.rank {
        let message = format!(
            "--rank {rank}: {} is not a folder\nhelp: --rank chooses an executable of a folder that `tpshard MODEL --tp N` wrote",
            path.display()
        );
        return Err(Failure::new(Kind::Usage, message));
    }
    if is_elf(path) {
        return executable(path, arguments.tir, json);
    }
    model(arguments, json)
}

fn is_elf(path: &Path) -> bool {
    use std::io::Read;
    let mut magic = [0u8; 4];
    std::fs::File::open(path).and_then(|mut f| f.read_exact(&mut magic)).is_ok() && magic == *b"\x7fELF"
}

fn folder(arguments: &InspectArguments, json: bool) -> Outcome<()> {
    let folder = Folder::open(&arguments.path)?;
    if let Some(rank) = arguments.rank {
        if rank >= folder.ranks {
            let message = format!(
                "--rank {rank}: {} has {} ranks\nhelp: the first is 0",
                folder.path.display(),
                folder.ranks
            );
            return Err(Failure::new(Kind::Usage, message));
        }
        return executable(&folder.executable(rank), arguments.tir, json);
    }
    if arguments.tir {
        let programs = programs_of(&folder)?;
        let text: Vec<String> =
            programs.iter().map(|(_, program)| tpshard_ir::text::print_program(program)).collect();
        return tir_text(&text.join("\n"), json);
    }
    if json {
        return output::line(with_devices(&folder)?);
    }
    let field = |key: &str| folder.config.get(key).and_then(Value::as_str).unwrap_or("?").to_owned();
    let mut lines = format!(
        "{} ranks, weights {}, program {}\n",
        folder.ranks,
        field("weights_hash"),
        field("program_hash")
    );
    for (kind, list) in [("input ", "inputs"), ("output", "outputs")] {
        let ports = folder.config.pointer(&format!("/entries/0/{list}")).and_then(Value::as_array);
        for port in ports.into_iter().flatten() {
            let text = |key: &str| port.get(key).and_then(Value::as_str).unwrap_or("?");
            let _ = writeln!(lines, "{kind} {}: {}", text("name"), text("type"));
        }
    }
    lines.push_str(&folder.text(PLAN_TEXT)?);
    output::text(lines)
}

/// A text in the form `.tir`, or for machines an object with it.
fn tir_text(text: &str, json: bool) -> Outcome<()> {
    if json { output::line(json!({ "tir": text })) } else { output::text(text) }
}

/// `out/run` holds no program of its own; what it says is the number of ranks that it starts.
fn launcher(ranks: &[u8], tir: bool, path: &Path, json: bool) -> Outcome<()> {
    let ranks = std::str::from_utf8(ranks).ok().and_then(|text| text.parse::<usize>().ok());
    let ranks = ranks.ok_or_else(|| {
        let message =
            format!("{}: the launcher does not know its ranks\nhelp: build the folder again", path.display());
        Failure::new(Kind::Mismatch, message)
    })?;
    if tir {
        let message = format!(
            "{}: is the launcher of {ranks} ranks and holds no program\nhelp: name the folder or one of its rank0, rank1, …",
            path.display()
        );
        return Err(Failure::new(Kind::Usage, message));
    }
    if json {
        return output::line(json!({ "launcher": true, "ranks": ranks }));
    }
    output::line(format_args!(
        "the launcher of {ranks} ranks: starts all of them, or becomes the one that torchrun, mpirun or srun ask for"
    ))
}

fn executable(path: &Path, tir: bool, json: bool) -> Outcome<()> {
    let payload = payload(path)?;
    let parts = tpshard_ir::container::decode(&payload).or_fail(Kind::Mismatch)?;
    if let Some(ranks) = parts.part(PART_LAUNCHER) {
        return launcher(ranks, tir, path, json);
    }
    let file = RankFile::decode(&payload)?;
    let program = &file.program;
    let entry = program.entries.first();
    if tir {
        return tir_text(&entry.map(|e| tpshard_ir::text::print_graph(&e.graph)).unwrap_or_default(), json);
    }
    let weight_bytes: u64 = program
        .weights
        .iter()
        .filter_map(|w| w.dtype.byte_len(w.shape.iter().product::<usize>() as u64))
        .sum();
    let summary = json!({
        "rank": program.rank,
        "ranks": file.ranks(),
        "mesh": program.mesh.0,
        "determinism": program.determinism.name(),
        "entries": program.entries.iter().map(|e| e.name.clone()).collect::<Vec<_>>(),
        "nodes": entry.map(|e| e.graph.len()),
        "weights": program.weights.len(),
        "weight_bytes": weight_bytes,
        "weights_hash": program.weights_hash,
        "program_hash": program.program_hash,
        "device": device(program),
    });
    if json {
        return output::line(summary);
    }
    output::line(format_args!(
        "rank {} of {} (mesh {}): {} weights, {}\ninputs  {}\noutputs {}",
        program.rank,
        file.ranks(),
        program.mesh,
        program.weights.len(),
        Bytes(weight_bytes),
        file.input_names.join(", "),
        file.output_names.join(", ")
    ))?;
    device_line(program).map_or(Ok(()), output::line)
}

/// `config.json`, with what the programs of the ranks hold for GPUs.
fn with_devices(folder: &Folder) -> Outcome<Value> {
    let mut config = folder.config.clone();
    for rank in 0..folder.ranks {
        let file = RankFile::read(&folder.executable(rank))?;
        let described = device(&file.program);
        if let (Some(described), Some(entry)) = (described, config.pointer_mut(&format!("/ranks/{rank}"))) {
            entry["device"] = described;
        }
    }
    Ok(config)
}

/// The kernels of a rank, and the machine code that it has of them.
fn device(program: &RankProgram) -> Option<Value> {
    let code = program.device.as_ref()?;
    let cubins = code.cubins.iter().map(|cubin| {
        json!({
            "arch": format!("sm_{}", cubin.arch),
            "nvrtc": version_text(cubin.nvrtc),
            "bytes": cubin.bytes.len(),
        })
    });
    Some(json!({
        "target": "cuda",
        "source_bytes": code.source.len(),
        "kernels": code.kernels.iter().map(|kernel| &kernel.name).collect::<Vec<_>>(),
        "cubins": cubins.collect::<Vec<_>>(),
        "on_host": on_host(program),
    }))
}

/// Operations that no kernel does, and how many steps of all entries they are.
fn on_host(program: &RankProgram) -> BTreeMap<&'static str, usize> {
    let mut found = BTreeMap::new();
    for entry in &program.entries {
        let steps = entry.device.iter().flat_map(|device| &device.steps);
        for step in steps.filter(|step| step.how == How::Host) {
            *found.entry(entry.graph.node(step.value).op.name()).or_default() += 1;
        }
    }
    found
}

/// A line about it for people.
fn device_line(program: &RankProgram) -> Option<String> {
    let code = program.device.as_ref()?;
    let cubins: Vec<String> = code
        .cubins
        .iter()
        .map(|c| format!("sm_{} ({}, NVRTC {})", c.arch, Bytes(c.bytes.len() as u64), version_text(c.nvrtc)))
        .collect();
    let cubins = if cubins.is_empty() { "compiled at the first start".to_owned() } else { cubins.join(", ") };
    let on_host: Vec<String> = on_host(program).iter().map(|(op, n)| format!("{n} {op}")).collect();
    let rest =
        if on_host.is_empty() { String::new() } else { format!("; on the host: {}", on_host.join(", ")) };
    Some(format!("cuda    {} kernels, {cubins}{rest}", code.kernels.len()))
}

fn model(arguments: &InspectArguments, json: bool) -> Outcome<()> {
    let as_it_is = ModelArguments {
        bind: vec![],
        output: vec![],
        role: vec![],
        dtype: arguments.dtype,
        max_nodes: Limits::default().nodes,
    };
    let graphs = import_graphs(&arguments.path, &as_it_is, false)?;
    if arguments.tir {
        let texts: Vec<String> =
            graphs.iter().map(|imported| tpshard_ir::text::print_graph(&imported.graph)).collect();
        return tir_text(&texts.join("\n"), json);
    }
    if json {
        let all: Vec<Value> = graphs.iter().map(summary).collect();
        return match <[Value; 1]>::try_from(all) {
            Ok([only]) => output::line(only),
            Err(all) => output::line(json!({ "graphs": all })),
        };
    }
    let texts: Vec<String> = graphs.iter().map(description).collect();
    output::text(texts.join("\n"))
}

/// What a model consists of, for people.
fn description(imported: &Imported) -> String {
    let graph = &imported.graph;
    let mut text = String::new();
    if !graph.cases.is_empty() {
        let _ = writeln!(text, "graph for {}", cases::text(&graph.cases));
    }
    let _ = writeln!(
        text,
        "{} ONNX nodes, {} values, {} weights",
        imported.report.nodes,
        graph.len(),
        imported.tensors.len()
    );
    for (_, name, ty) in graph.inputs() {
        let _ = writeln!(text, "input  {name}: {ty}");
    }
    for output in &graph.outputs {
        let _ = writeln!(text, "output {}: {}", output.name, graph.ty(output.value));
    }
    for (symbol, range) in &graph.symbols {
        let role = imported.report.roles.get(symbol).map_or(String::new(), |r| format!(" ({})", r.name()));
        let _ = writeln!(text, "dim    {symbol}{role}: {} to {}", range.low, range.high);
    }
    for state in &graph.states {
        let _ = writeln!(text, "state  {} -> {} along axis {}", state.input, state.output, state.axis);
    }
    for border in &graph.borders {
        let may = match border {
            Border::Stretch { axis, filling: Filling::Any, .. } => {
                format!("may have any number of entries along axis {axis}")
            }
            Border::Stretch { axis, .. } => format!("may have one entry along axis {axis}"),
            Border::Buffer { axis, total, .. } => {
                format!("may be a buffer along axis {axis}, of which {total} entries are used")
            }
            Border::Rounded { output, given, .. } => {
                format!("may be given as {given}; {output} is handed out as {given} where it leaves")
            }
        };
        let _ = writeln!(text, "border {} {may}", border.input());
    }
    for equality in &imported.report.equalities {
        let _ = writeln!(text, "guard  {} = {} ({})", equality.symbol, equality.equals, equality.reason);
    }
    for note in &imported.report.notes {
        let _ = writeln!(text, "note   {note}");
    }
    text
}

fn summary(imported: &Imported) -> Value {
    let graph = &imported.graph;
    let mut ops: BTreeMap<&str, usize> = BTreeMap::new();
    for node in graph.nodes() {
        *ops.entry(node.op.name()).or_default() += 1;
    }
    let weights: u64 = graph
        .nodes()
        .iter()
        .filter_map(|n| match &n.op {
            Op::Weight(expr) => expr.dtype().byte_len(expr.shape().iter().product::<usize>() as u64),
            _ => None,
        })
        .sum();
    let ports = |list: Vec<(String, String)>| -> Value {
        list.into_iter().map(|(name, ty)| json!({ "name": name, "type": ty })).collect()
    };
    let mut summary = json!({
        "onnx_nodes": imported.report.nodes,
        "values": graph.len(),
        "ops": ops,
        "weight_bytes": weights,
        "inputs": ports(graph.inputs().map(|(_, n, t)| (n.to_string(), t.to_string())).collect()),
        "outputs": ports(graph.outputs.iter().map(|o| (o.name.to_string(), graph.ty(o.value).to_string())).collect()),
        "roles": imported.report.roles.iter().map(|(s, r)| (s.to_string(), Value::from(r.name()))).collect::<Value>(),
        "states": graph.states.iter().map(|s| json!([s.input.as_ref(), s.output.as_ref()])).collect::<Vec<_>>(),
    });
    let cases: serde_json::Map<String, Value> =
        graph.cases.iter().map(|case| (case.input.to_string(), case.value.into())).collect();
    if !cases.is_empty() {
        summary["cases"] = Value::Object(cases);
    }
    summary
}
