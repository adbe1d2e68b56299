//! `tpshard inspect`: what a model, a folder or an executable consists of.

use super::planning::import_model;
use crate::arguments::{InspectArguments, ModelArguments};
use crate::failure::{Failure, Kind, Outcome};
use crate::folder::Folder;
use crate::in_process::program_of;
use crate::rank_program::RankFile;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use tpshard_codegen::build::PLAN_TEXT;
use tpshard_frontend::Imported;
use tpshard_ir::Op;
use tpshard_passes::report::Bytes;

pub(crate) fn inspect(arguments: &InspectArguments, json: bool) -> Outcome<()> {
    let path = &arguments.path;
    if path.is_dir() {
        return folder(arguments, json);
    }
    if is_elf(path) {
        return executable(path, arguments.tir, json);
    }
    model(path, arguments.tir, json)
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
        print!("{}", tpshard_ir::text::print_program(&program_of(&folder)?));
        return Ok(());
    }
    if json {
        println!("{}", folder.config);
        return Ok(());
    }
    let field = |key: &str| folder.config.get(key).and_then(Value::as_str).unwrap_or("?").to_owned();
    println!("{} ranks, weights {}, program {}", folder.ranks, field("weights_hash"), field("program_hash"));
    for (kind, list) in [("input ", "inputs"), ("output", "outputs")] {
        let ports = folder.config.pointer(&format!("/entries/0/{list}")).and_then(Value::as_array);
        for port in ports.into_iter().flatten() {
            let text = |key: &str| port.get(key).and_then(Value::as_str).unwrap_or("?");
            println!("{kind} {}: {}", text("name"), text("type"));
        }
    }
    print!("{}", folder.text(PLAN_TEXT)?);
    Ok(())
}

fn executable(path: &Path, tir: bool, json: bool) -> Outcome<()> {
    let file = RankFile::read(path)?;
    let program = &file.program;
    let entry = program.entries.first();
    if tir {
        if let Some(entry) = entry {
            print!("{}", tpshard_ir::text::print_graph(&entry.graph));
        }
        return Ok(());
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
    });
    if json {
        println!("{summary}");
    } else {
        println!(
            "rank {} of {} (mesh {}): {} weights, {}",
            program.rank,
            file.ranks(),
            program.mesh,
            program.weights.len(),
            Bytes(weight_bytes)
        );
        println!("inputs  {}", file.input_names.join(", "));
        println!("outputs {}", file.output_names.join(", "));
    }
    Ok(())
}

fn model(path: &Path, tir: bool, json: bool) -> Outcome<()> {
    let none = ModelArguments { bind: vec![], output: vec![], role: vec![] };
    let imported = import_model(path, &none, false)?;
    if tir {
        print!("{}", tpshard_ir::text::print_graph(&imported.graph));
        return Ok(());
    }
    let summary = summary(&imported).ok_or_else(|| Failure::new(Kind::Internal, "no summary"))?;
    if json {
        println!("{summary}");
        return Ok(());
    }
    let graph = &imported.graph;
    println!(
        "{} ONNX nodes, {} values, {} weights",
        imported.report.nodes,
        graph.len(),
        imported.tensors.len()
    );
    for (_, name, ty) in graph.inputs() {
        println!("input  {name}: {ty}");
    }
    for output in &graph.outputs {
        println!("output {}: {}", output.name, graph.ty(output.value));
    }
    for (symbol, range) in &graph.symbols {
        let role = imported.report.roles.get(symbol).map_or(String::new(), |r| format!(" ({})", r.name()));
        println!("dim    {symbol}{role}: {} to {}", range.low, range.high);
    }
    for state in &graph.states {
        println!("state  {} -> {} along axis {}", state.input, state.output, state.axis);
    }
    for equality in &imported.report.equalities {
        println!("guard  {} = {} ({})", equality.symbol, equality.equals, equality.reason);
    }
    for note in &imported.report.notes {
        println!("note   {note}");
    }
    Ok(())
}

fn summary(imported: &Imported) -> Option<Value> {
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
    Some(json!({
        "onnx_nodes": imported.report.nodes,
        "values": graph.len(),
        "ops": ops,
        "weight_bytes": weights,
        "inputs": ports(graph.inputs().map(|(_, n, t)| (n.to_string(), t.to_string())).collect()),
        "outputs": ports(graph.outputs.iter().map(|o| (o.name.to_string(), graph.ty(o.value).to_string())).collect()),
        "roles": imported.report.roles.iter().map(|(s, r)| (s.to_string(), Value::from(r.name()))).collect::<Value>(),
        "states": graph.states.iter().map(|s| json!([s.input.as_ref(), s.output.as_ref()])).collect::<Vec<_>>(),
    }))
}
