//! Sharding a weight takes the same memory however large the weight is. A test of its own process, which it measures.

use bytes::Bytes;
use std::fs::{self, File};
use tpshard_codegen::weights::{ShardLayout, ShardTensor, SourceError, Span, WeightSource, write_shards};
use tpshard_ir::DType;
use tpshard_ir::weight::WeightExpr;

const ROWS: usize = 1 << 13;
const COLUMNS: usize = 1 << 13;

/// Zeros that were never written take no memory when read.
struct Zeros(Bytes);

impl WeightSource for Zeros {
    fn bytes(&self, _: &str) -> Result<Bytes, SourceError> {
        Ok(self.0.clone())
    }
}

/// The most memory this process ever had resident, in bytes.
fn peak() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").trim().parse::<usize>().unwrap() * 1024
}

#[test]
fn memory_does_not_grow_with_the_weight() {
    let source = Zeros(Bytes::from(vec![0; ROWS * COLUMNS * 4]));
    let weight = WeightExpr::initializer("w", DType::F32, vec![ROWS, COLUMNS]).unwrap();
    let turned = weight.transpose(vec![1, 0]).unwrap().cast(DType::F16).unwrap();
    let layouts: Vec<ShardLayout> = (0..2)
        .map(|rank| {
            let half = |dim: usize| Span { start: rank * dim / 2, length: dim / 2 };
            let mut columns = ShardTensor::whole("columns", weight.clone());
            columns.region[1] = half(COLUMNS);
            let mut heads = ShardTensor::whole("turned", turned.clone());
            heads.region[0] = half(COLUMNS);
            ShardLayout::new(rank, 2, vec![columns, heads]).unwrap()
        })
        .collect();
    let folder = tempfile::tempdir().unwrap();
    let files: Vec<File> =
        (0..2).map(|rank| File::create_new(folder.path().join(rank.to_string())).unwrap()).collect();
    let before = peak();
    write_shards(&layouts, &files, &source, &mut |_| {}).unwrap();
    let grown = peak() - before;
    assert!(grown < 24 << 20, "{grown} bytes for a weight of {}", source.0.len());
}
