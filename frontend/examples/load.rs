//! Loads models and prints one line for each, or what is wrong with it.
//!
//! `cargo run -p tpshard-frontend --example load -- MODEL…`

use std::path::Path;
use std::process::ExitCode;
use tpshard_frontend::{Limits, load};

fn main() -> ExitCode {
    let mut failed = false;
    for path in std::env::args().skip(1) {
        match load(Path::new(&path), &Limits::default()) {
            Ok(model) => {
                let weights: u64 = model.graph.initializers.values().map(|tensor| tensor.byte_len()).sum();
                println!(
                    "ok {path}: {} nodes, {} inputs, {} initializers of {weights} bytes, opset {}",
                    model.graph.nodes.len(),
                    model.graph.inputs.len(),
                    model.graph.initializers.len(),
                    model.opsets.get("").copied().unwrap_or(0),
                );
            }
            Err(error) => {
                failed = true;
                println!("{:?} {error}", error.kind());
            }
        }
    }
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
