//! Prints the rate of a packed matrix product, 128 x 768 by 768 x 3072, run as a whole program.
//!
//! `cargo run --release -p tpshard-runtime --example gemm_rate [rows [depth columns]]`

use std::collections::BTreeMap;
use std::time::Instant;
use tpshard_ir::layout::{Layout, Mesh};
use tpshard_ir::op::{EinsumSpec, Op};
use tpshard_ir::program::RankProgram;
use tpshard_ir::weight::WeightExpr;
use tpshard_ir::{DType, Dim, Graph, Output, Spmd, SpmdOutput, Step, StepId, StepKind, Tensor, Type};
use tpshard_runtime::comm::solo;
use tpshard_runtime::cpu::MemoryWeights;
use tpshard_runtime::session::{Session, SessionOptions};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let sizes: Vec<usize> = std::env::args().skip(1).map(|a| a.parse()).collect::<Result<_, _>>()?;
    let size = |i: usize, default: usize| sizes.get(i).copied().unwrap_or(default);
    let (rows, depth, columns) = (size(0, 128), size(1, 768), size(2, 3072));
    let program = RankProgram::from_spmd(&product(rows, depth, columns)?, 0)?;
    let w = Tensor::from_vec(vec![depth, columns], vec![0.5f32; depth * columns])?;
    let mut weights = MemoryWeights { tensors: BTreeMap::from([("w0".to_string(), w)]), hash: None };
    let x = Tensor::from_vec(vec![rows, depth], vec![0.25f32; rows * depth])?;
    let inputs = BTreeMap::from([("x".to_string(), x)]);
    for threads in [1, std::thread::available_parallelism()?.get()] {
        let options = SessionOptions { threads: Some(threads), ..SessionOptions::default() };
        let mut session = Session::open(program.clone(), &mut weights, solo(), &options)?;
        let mut best = f64::INFINITY;
        for _ in 0..200 {
            let start = Instant::now();
            session.run(&inputs)?;
            best = best.min(start.elapsed().as_secs_f64());
        }
        let rate = 2.0 * (rows * depth * columns) as f64 / best / 1e9;
        println!("{rows}x{depth}x{columns}, {threads} threads: {rate:.0} GF/s ({:.3} ms)", best * 1e3);
    }
    Ok(())
}

fn product(rows: usize, depth: usize, columns: usize) -> Result<Spmd, Box<dyn std::error::Error>> {
    let mut logical = Graph::new("product");
    let dims = [rows, depth].map(Dim::from).to_vec();
    let x = logical.input("x", Type::new(DType::F32, dims));
    let expr = WeightExpr::initializer("w", DType::F32, vec![depth, columns])?;
    let w = logical.add(Op::Weight(expr), &[])?;
    let spec = EinsumSpec::parse("rk,kn->rn").ok_or("a bad spec")?;
    let y = logical.add(Op::Einsum(spec), &[x, w])?;
    logical.outputs.push(Output { name: "y".into(), value: y });
    let mesh = Mesh::flat(1);
    let layout = Layout::replicated(&mesh);
    let step = |value, args: &[u32]| Step {
        value,
        layout: layout.clone(),
        kind: StepKind::Compute,
        args: args.iter().map(|&a| StepId(a)).collect(),
    };
    let steps = vec![step(x, &[]), step(w, &[]), step(y, &[0, 1])];
    let outputs = vec![SpmdOutput { name: "y".into(), step: StepId(2) }];
    Ok(Spmd { mesh, imported: logical.len(), logical, equations: vec![], steps, outputs })
}
