//! Weights from a safetensors file: read, checked, refused.

mod executor;

use executor::*;
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use std::collections::{BTreeMap, HashMap};
use tpshard_ir::op::{EinsumSpec, Op};
use tpshard_ir::program::RankProgram;
use tpshard_ir::{DType, Graph};
use tpshard_runtime::comm::solo;
use tpshard_runtime::cpu::FileWeights;
use tpshard_runtime::io::SafeTensorsFile;
use tpshard_runtime::session::Session;

#[test]
fn a_program_runs_from_its_weight_file_and_from_no_other() {
    let mut g = Graph::new("product");
    let x = g.input("x", ty(DType::F32, &[2, 300]));
    let w = weight(&mut g, "w", DType::F32, &[300, 70]);
    let y = g.add(Op::Einsum(EinsumSpec::parse("ik,kn->in").unwrap()), &[x, w]).unwrap();
    output(&mut g, "y", y);
    let mut random = Random::new(1);
    let weights = random_weights(&g, &mut random);
    let inputs: BTreeMap<_, _> = [("x".to_string(), random.tensor(DType::F32, &[2, 300]))].into();
    let mut program = RankProgram::from_spmd(&replicated(g.clone(), 1), 0).unwrap();
    program.weights_hash = "right".into();

    let folder = tempfile::tempdir().unwrap();
    let open = |hash: &str, name: &str, shape: Vec<usize>| {
        let path = folder.path().join("rank0.safetensors");
        let bytes = weights["w"].data().to_le_bytes();
        let view = TensorView::new(Dtype::F32, shape, &bytes).unwrap();
        let metadata = HashMap::from([("weights_hash".to_string(), hash.to_string())]);
        serialize_to_file([(name, view)], Some(metadata), &path).unwrap();
        let mut source = FileWeights::new(SafeTensorsFile::open(&path).unwrap());
        Session::open(program.clone(), &mut source, solo(), &options()).map_err(|e| e.to_string())
    };
    let results = open("right", "w0", vec![300, 70]).unwrap().run(&inputs).unwrap();
    assert_close(&results.outputs["y"].tensor, &reference(&g, &weights, &inputs)[0].1, "from a file");

    let error = |hash: &str, name: &str, shape: Vec<usize>| open(hash, name, shape).err().unwrap();
    assert!(error("wrong", "w0", vec![300, 70]).contains("hash wrong"));
    let missing = error("right", "other", vec![300, 70]);
    assert!(missing.contains("`w0`") && missing.contains("rank0.safetensors"), "{missing}");
    let other = error("right", "w0", vec![70, 300]);
    assert!(
        other.contains("`w0`") && other.contains("[70, 300]") && other.contains("rank0.safetensors"),
        "{other}"
    );
}
