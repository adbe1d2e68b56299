//! Imports models and prints what came out, one line each: `cargo run --example import -- [--graph] MODEL…`.

use std::path::Path;
use std::time::Instant;
use tpshard_frontend::{ImportOptions, Imported, import};

fn main() {
    let mut whole = false;
    let mut failed = false;
    for argument in std::env::args().skip(1) {
        if argument == "--graph" {
            whole = true;
            continue;
        }
        let start = Instant::now();
        let result = import(Path::new(&argument), &ImportOptions::default());
        let seconds = start.elapsed().as_secs_f64();
        match result {
            Ok(imported) => print(&argument, &imported, seconds, whole),
            Err(error) => {
                failed = true;
                println!("FAIL {argument} ({seconds:.2} s, {:?})\n{error}", error.kind());
            }
        }
    }
    std::process::exit(i32::from(failed));
}

fn print(path: &str, imported: &Imported, seconds: f64, whole: bool) {
    let (graph, report) = (&imported.graph, &imported.report);
    println!(
        "ok {path}: {} nodes to {} values, {} states, symbols {:?}, {seconds:.2} s",
        report.nodes,
        graph.len(),
        graph.states.len(),
        graph.symbols.keys().collect::<Vec<_>>(),
    );
    if !whole {
        return;
    }
    for equality in &report.equalities {
        println!("  {} = {}, {}", equality.symbol, equality.equals, equality.reason);
    }
    for guard in &graph.guards {
        println!("  guard {} {:?} {}, {}", guard.left, guard.relation, guard.right, guard.reason);
    }
    println!("  roles {:?}", report.roles);
    report.notes.iter().for_each(|note| println!("  note: {note}"));
    for (id, node) in graph.values() {
        let args: Vec<String> = node.args.iter().map(ToString::to_string).collect();
        let mut op = format!("{:?}", node.op);
        if op.len() > 160 {
            op = format!("{}…", op.chars().take(160).collect::<String>());
        }
        println!("  {id} = {op}({}) : {}   # {}", args.join(", "), node.ty, node.origin);
    }
    for output in &graph.outputs {
        println!("  output {} = {} : {}", output.name, output.value, graph.ty(output.value));
    }
}
