//! Shard files written from a counted source, read back with another implementation of the format.

use bytes::Bytes;
use safetensors::{Dtype, SafeTensors};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::{self, File};
use tpshard_codegen::weights::{
    ShardLayout, ShardTensor, SourceError, Span, WeightError, WeightSource, WrittenWeights, write_shards,
};
use tpshard_ir::DType;
use tpshard_ir::weight::WeightExpr;

/// A model in memory that notes what is asked of it.
#[derive(Default)]
struct Model {
    initializers: Vec<(&'static str, Vec<u8>)>,
    asked: RefCell<Vec<String>>,
    released: RefCell<Vec<String>>,
}

impl WeightSource for Model {
    fn bytes(&self, initializer: &str) -> Result<Bytes, SourceError> {
        self.asked.borrow_mut().push(initializer.into());
        let found = self.initializers.iter().find(|(name, _)| *name == initializer);
        Ok(Bytes::copy_from_slice(&found.ok_or("is not in the model")?.1))
    }

    fn release(&self, initializer: &str) {
        self.released.borrow_mut().push(initializer.into());
    }

    fn position(&self, initializer: &str) -> u64 {
        self.initializers.iter().position(|(name, _)| *name == initializer).unwrap_or(usize::MAX) as u64
    }
}

const RANKS: usize = 3;
const ROWS: usize = 40;
/// Columns of the fused projection: three times 7 heads of 16.
const HEAD: usize = 16;
const HEADS: [usize; RANKS] = [3, 2, 2];
const COLUMNS: usize = 3 * 7 * HEAD;

fn model() -> Model {
    let qkv = (0..ROWS * COLUMNS).flat_map(|i| (i as f32).to_le_bytes()).collect();
    let table = (0..64u32).map(|i| i as u8).collect();
    let norm = (0..5).flat_map(|i| (i as f32 + 0.5).to_le_bytes()).collect();
    Model { initializers: vec![("z/qkv", qkv), ("packed", table), ("a norm", norm)], ..Model::default() }
}

fn span(start: usize, length: usize) -> Span {
    Span { start, length }
}

fn layouts() -> Vec<ShardLayout> {
    let qkv = WeightExpr::initializer("z/qkv", DType::F32, vec![ROWS, COLUMNS]).unwrap();
    let packed = WeightExpr::initializer("packed", DType::U4, vec![8, 16]).unwrap();
    let norm = WeightExpr::initializer("a norm", DType::F32, vec![5]).unwrap();
    let mut first = 0;
    let layout = |(rank, heads): (usize, usize)| {
        let mut tensors = Vec::new();
        for (index, name) in ["q", "k", "v"].into_iter().enumerate() {
            let third = qkv.slice(1, index * COLUMNS / 3, COLUMNS / 3).unwrap();
            let weight = third.transpose(vec![1, 0]).unwrap().cast(DType::F16).unwrap();
            let region = vec![span(first * HEAD, heads * HEAD), span(0, ROWS)];
            tensors.push(ShardTensor { name: name.into(), weight, region, metadata: BTreeMap::new() });
        }
        first += heads;
        let mut table = ShardTensor::whole("table", packed.clone());
        table.region[1] = span(rank * 4, 4);
        table.metadata.insert("block".into(), "32".into());
        tensors.push(table);
        tensors.push(ShardTensor::whole("norm", norm.clone()));
        tensors.push(ShardTensor { region: vec![span(5, 0)], ..ShardTensor::whole("empty", norm.clone()) });
        ShardLayout::new(rank, RANKS, tensors).unwrap()
    };
    HEADS.into_iter().enumerate().map(layout).collect()
}

fn write(model: &Model, layouts: &[ShardLayout]) -> (Result<WrittenWeights, WeightError>, Vec<Vec<u8>>) {
    let folder = tempfile::tempdir().unwrap();
    let path = |rank: usize| folder.path().join(format!("rank{rank}.safetensors"));
    let files: Vec<File> = (0..layouts.len()).map(|rank| File::create_new(path(rank)).unwrap()).collect();
    let mut progress = 0;
    let written = write_shards(layouts, &files, model, &mut |bytes| progress += bytes);
    let bytes: Vec<Vec<u8>> = (0..layouts.len()).map(|rank| fs::read(path(rank)).unwrap()).collect();
    if let Ok(written) = &written {
        assert_eq!(progress, written.ranks.iter().flatten().map(|tensor| tensor.length).sum::<u64>());
    }
    (written, bytes)
}

#[test]
fn another_reader_finds_every_slice() {
    let (model, layouts) = (model(), layouts());
    let (written, files) = write(&model, &layouts);
    let written = written.unwrap();
    let mut first = 0;
    for (rank, bytes) in files.iter().enumerate() {
        assert_eq!(bytes.len() as u64, layouts[rank].file_length());
        let tensors = SafeTensors::deserialize(bytes).unwrap();
        assert_eq!(tensors.len(), 6);
        for (third, name) in ["q", "k", "v"].into_iter().enumerate() {
            let view = tensors.tensor(name).unwrap();
            assert_eq!((view.dtype(), view.shape()), (Dtype::F16, &[HEADS[rank] * HEAD, ROWS][..]));
            let mut expected = Vec::new();
            for column in 0..HEADS[rank] * HEAD {
                for row in 0..ROWS {
                    let at = row * COLUMNS + third * COLUMNS / 3 + first * HEAD + column;
                    expected.extend(half::f16::from_f32(at as f32).to_le_bytes());
                }
            }
            assert!(view.data() == expected, "{name} of rank {rank}");
        }
        first += HEADS[rank];
        let table = tensors.tensor("table").unwrap();
        assert_eq!((table.dtype(), table.shape()), (Dtype::U8, &[8, 2][..]));
        let expected: Vec<u8> =
            (0..8).flat_map(|row| [row * 8 + rank as u8 * 2, row * 8 + rank as u8 * 2 + 1]).collect();
        assert_eq!(table.data(), expected);
        assert_eq!(tensors.tensor("norm").unwrap().data(), model.initializers[2].1);
        assert_eq!(tensors.tensor("empty").unwrap().shape(), [0]);
        for record in &written.ranks[rank] {
            let data = &bytes[record.offset as usize..][..record.length as usize];
            assert_eq!(data, tensors.tensor(&record.name).unwrap().data());
            assert_eq!(record.sha256, sha256(data));
            let divisor = 1 << record.length.trailing_zeros().min(6);
            assert!(record.offset.is_multiple_of(divisor), "{record:?}");
        }
    }
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn metadata_says_which_slice_of_what_it_is() {
    let (written, files) = write(&model(), &layouts());
    let written = written.unwrap();
    let (_, header) = SafeTensors::read_metadata(&files[1]).unwrap();
    let metadata = header.metadata().as_ref().unwrap();
    assert_eq!((metadata["rank"].as_str(), metadata["ranks"].as_str()), ("1", "3"));
    assert_eq!(metadata["weights_hash"], written.weights_hash);
    let tensors: serde_json::Value = serde_json::from_str(&metadata["tensors"]).unwrap();
    let table = &tensors["table"];
    assert_eq!(table["dtype"], "u4");
    assert_eq!(table["global_shape"], serde_json::json!([8, 16]));
    assert_eq!(table["slice"], serde_json::json!([[0, 8], [4, 4]]));
    assert_eq!(table["block"], "32");
    assert_eq!(table["source"], r#"init("packed", u4, [8, 16])"#);
    let hash = written.ranks[1].iter().find(|tensor| tensor.name == "table").unwrap();
    assert_eq!(table["sha256"], hash.sha256);
    assert_eq!(serde_json::to_value(hash).unwrap()["region"], serde_json::json!([[0, 8], [4, 4]]));
}

#[test]
fn equal_models_give_equal_files_and_others_another_hash() {
    let (one, files) = write(&model(), &layouts());
    let (two, again) = write(&model(), &layouts());
    assert!(files == again);
    let one = one.unwrap();
    assert_eq!(one, two.unwrap());
    let mut other = model();
    other.initializers[2].1[3] ^= 1;
    assert_ne!(write(&other, &layouts()).0.unwrap().weights_hash, one.weights_hash);
    let two_ranks = layouts().swap_remove(0);
    assert_ne!(write(&model(), &[two_ranks]).0.unwrap().weights_hash, one.weights_hash);
}

#[test]
fn the_model_is_read_once_in_its_own_order() {
    let model = model();
    write(&model, &layouts()).0.unwrap();
    assert_eq!(*model.asked.borrow(), ["z/qkv", "packed", "a norm"]);
    assert_eq!(*model.released.borrow(), ["z/qkv", "packed", "a norm"]);
}

#[test]
fn large_initializers_are_released_on_the_way() {
    let rows = 1 << 12;
    let large = Model { initializers: vec![("w", vec![0; rows << 16])], ..Model::default() };
    let weight = WeightExpr::initializer("w", DType::F32, vec![rows, 1 << 14]).unwrap();
    let layout = |rank: usize| {
        // Columns, of which every rank touches every page.
        let region = vec![span(0, rows), span(rank * 16, 16)];
        let tensor = ShardTensor { region, ..ShardTensor::whole("w", weight.clone()) };
        ShardLayout::new(rank, 2, vec![tensor]).unwrap()
    };
    write(&large, &[layout(0), layout(1)]).0.unwrap();
    assert!(large.released.borrow().len() >= 3, "{:?}", large.released.borrow());
}

#[test]
fn mistakes_are_named() {
    let norm = WeightExpr::initializer("a norm", DType::F32, vec![5]).unwrap();
    let lost = WeightExpr::initializer("lost", DType::F32, vec![5]).unwrap();
    let layout = |name: &str, weight: &WeightExpr| {
        ShardLayout::new(
            0,
            1,
            vec![ShardTensor::whole("ok", norm.clone()), ShardTensor::whole(name, weight.clone())],
        )
    };
    let error = write(&model(), &[layout("b", &lost).unwrap()]).0.unwrap_err().to_string();
    assert_eq!(error, "weight `b`: initializer `lost`: is not in the model");
    assert!(matches!(layout("ok", &norm), Err(WeightError::Duplicate { rank: 0, .. })));
    assert!(matches!(layout("__metadata__", &norm), Err(WeightError::Name { .. })));
    assert!(matches!(layout("", &norm), Err(WeightError::Name { .. })));
    let outside = ShardTensor { region: vec![span(3, 3)], ..ShardTensor::whole("x", norm.clone()) };
    let error = ShardLayout::new(0, 1, vec![outside]).unwrap_err().to_string();
    assert_eq!(error, "weight `x`: [3..6] is not a region of shape [5]");

    let good = [layout("b", &norm).unwrap()];
    let count = write_shards(&good, &[], &model(), &mut |_| {});
    assert!(matches!(count, Err(WeightError::FileCount { layouts: 1, files: 0 })));
    let read_only = File::open(std::env::current_exe().unwrap()).unwrap();
    let error = write_shards(&good, &[read_only], &model(), &mut |_| {}).unwrap_err();
    assert!(error.to_string().starts_with("rank 0: writing weights: "), "{error}");
    let full = File::options().write(true).open("/dev/full").unwrap();
    assert!(write_shards(&good, &[full], &model(), &mut |_| {}).is_err());
}
