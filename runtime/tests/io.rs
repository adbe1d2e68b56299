//! Files made by NumPy (`fixtures/make.py`), our own files, and files that lie.

use safetensors::tensor::{Dtype, TensorView as Source, serialize};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use tpshard_ir::weight::{logical_dtype_key, logical_shape_key};
use tpshard_ir::{DType, Data, Tensor};
use tpshard_runtime::io::{
    DEFAULT_LIMIT, SafeTensorsFile, read_npy, read_npz, read_tensors, write_npy, write_npz,
};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn as_f64(tensor: &Tensor) -> Vec<f64> {
    macro_rules! numbers {
        ($($variant:ident)*) => {
            match tensor.data() {
                $(Data::$variant(v) => v.iter().map(|&x| f64::from(x)).collect(),)*
                Data::I64(v) => v.iter().map(|&x| x as f64).collect(),
                Data::U64(v) => v.iter().map(|&x| x as f64).collect(),
                Data::Bool(v) => v.iter().map(|&x| f64::from(u8::from(x))).collect(),
                Data::Raw(..) => vec![],
            }
        };
    }
    numbers!(F32 F16 BF16 F64 I8 I16 I32 U8 U16 U32)
}

#[test]
fn numpy_archives_are_read() {
    for name in ["stored.npz", "deflated.npz"] {
        let tensors = read_npz(&fixture(name), DEFAULT_LIMIT).unwrap();
        let names: Vec<&String> = tensors.keys().collect();
        assert_eq!(names[..3], ["f4", "f2", "f8"], "the order of the file is kept");
        for (name, dtype) in [
            ("f4", DType::F32),
            ("f2", DType::F16),
            ("f8", DType::F64),
            ("i1", DType::I8),
            ("i2", DType::I16),
            ("i4", DType::I32),
            ("i8", DType::I64),
            ("u1", DType::U8),
            ("u2", DType::U16),
            ("u4", DType::U32),
            ("u8", DType::U64),
            ("big endian", DType::I32),
        ] {
            let tensor = &tensors[name];
            assert_eq!((tensor.dtype(), tensor.shape()), (dtype, [2, 3].as_slice()), "{name}");
            assert_eq!(as_f64(tensor), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], "{name}");
        }
        assert_eq!(tensors["bool"].as_slice::<bool>().unwrap(), [false, true, false, true, false, true]);
        assert_eq!(tensors["scalar"], Tensor::scalar(7f32));
        assert_eq!(tensors["empty"].shape(), [0, 3]);
        let counted: Vec<f64> = (0..24).map(f64::from).collect();
        assert_eq!(tensors["fortran/order"].shape(), [2, 3, 4]);
        assert_eq!(as_f64(&tensors["fortran/order"]), counted);
    }
    let tensor = &read_tensors(&fixture("fortran_big.npy"), DEFAULT_LIMIT).unwrap()["fortran_big"];
    assert_eq!((tensor.shape(), as_f64(tensor)), ([3, 2].as_slice(), vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0]));
}

#[test]
fn archives_round_trip_and_are_reproducible() {
    let folder = tempfile::tempdir().unwrap();
    let mut tensors = read_npz(&fixture("stored.npz"), DEFAULT_LIMIT).unwrap();
    let (one, two) = (folder.path().join("one.npz"), folder.path().join("two.npz"));
    write_npz(&one, &tensors).unwrap();
    assert_eq!(read_npz(&one, DEFAULT_LIMIT).unwrap(), tensors);
    write_npz(&two, &tensors).unwrap();
    assert_eq!(std::fs::read(&one).unwrap(), std::fs::read(&two).unwrap());

    let brain = vec![half::bf16::from_f32(1.5)];
    tensors.insert("brain".into(), Tensor::from_vec(vec![1], brain).unwrap());
    write_npz(&one, &tensors).unwrap();
    let back = read_npz(&one, DEFAULT_LIMIT).unwrap();
    assert_eq!(back["brain"], Tensor::from_vec(vec![1], vec![1.5f32]).unwrap());

    tensors.insert("packed".into(), Tensor::zeros(DType::U4, vec![2]).unwrap());
    let error = write_npz(&two, &tensors).unwrap_err().to_string();
    assert!(error.contains("packed: u4 has no NumPy form"), "{error}");
    assert!(read_npz(&two, DEFAULT_LIMIT).is_ok(), "a failed write leaves the old file");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2, "and nothing else");

    let single = folder.path().join("x.npy");
    write_npy(&single, &tensors["fortran/order"]).unwrap();
    assert_eq!(read_npy(&single, DEFAULT_LIMIT).unwrap(), tensors["fortran/order"]);
}

#[test]
fn limits_damage_and_pickles_are_refused() {
    let error = |path: &Path, limit| read_tensors(path, limit).unwrap_err().to_string();
    let text = error(&fixture("bomb.npz"), 1 << 20);
    assert!(text.contains("zeros: needs 4194432 bytes, the limit is 1048576"), "{text}");
    assert!(error(&fixture("object.npy"), 1 << 20).contains("never read"));
    assert!(error(Path::new("nowhere.npz"), 1).contains("nowhere.npz: No such file"));
    assert!(error(Path::new("model.onnx"), 1).contains("neither in .npz nor in .npy"));

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.npz");
    for name in ["stored.npz", "deflated.npz"] {
        let whole = std::fs::read(fixture(name)).unwrap();
        for end in [0, 10, whole.len() / 2, whole.len() - 1] {
            std::fs::write(&path, &whole[..end]).unwrap();
            assert!(read_npz(&path, DEFAULT_LIMIT).is_err(), "{name} cut at {end}");
        }
        // Every damaged byte is either refused or harmless; none may panic.
        for at in (0..whole.len()).step_by(7) {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x55;
            std::fs::write(&path, &damaged).unwrap();
            let _ = read_npz(&path, 1 << 20);
        }
    }
    // The sum of an entry is checked: 3.0 in the middle of "f4" becomes something else.
    let mut whole = std::fs::read(fixture("stored.npz")).unwrap();
    let at = whole.windows(4).position(|w| w == 3f32.to_le_bytes()).unwrap();
    whole[at] ^= 1;
    std::fs::write(&path, &whole).unwrap();
    assert!(read_npz(&path, DEFAULT_LIMIT).is_err());
}

fn write_safetensors(path: &Path, tensors: &[(&str, Dtype, Vec<usize>, &[u8])], metadata: &[(String, &str)]) {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        ((*name).to_owned(), Source::new(*dtype, shape.clone(), bytes).unwrap())
    });
    let metadata: HashMap<String, String> =
        metadata.iter().map(|(k, v)| (k.clone(), (*v).to_owned())).collect();
    std::fs::write(path, serialize(views, Some(metadata)).unwrap()).unwrap();
}

#[test]
fn safetensors_are_views_with_logical_types() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rank0.safetensors");
    let values: Vec<u8> = [1f32, 2.0].iter().flat_map(|v| v.to_le_bytes()).collect();
    let metadata = [
        (logical_dtype_key("packed"), "u4"),
        (logical_shape_key("packed"), "3,2"),
        (logical_dtype_key("short"), "u4"),
        (logical_shape_key("short"), "9,2"),
        (logical_dtype_key("odd"), "nothing"),
        (logical_shape_key("negative"), "-1"),
        ("slice".into(), "0 of 2"),
    ];
    let byte = |name| (name, Dtype::U8, vec![3], [1u8, 2, 3].as_slice());
    let plain = ("w", Dtype::F32, vec![2], values.as_slice());
    write_safetensors(
        &path,
        &[plain, byte("packed"), byte("short"), byte("odd"), byte("negative")],
        &metadata,
    );

    let file = SafeTensorsFile::open(&path).unwrap();
    assert_eq!(file.metadata()["slice"], "0 of 2");
    assert_eq!(file.names().len(), 5);
    let view = file.view("w").unwrap();
    assert_eq!(
        (view.dtype, view.shape.as_slice(), view.bytes),
        (DType::F32, [2].as_slice(), values.as_slice())
    );
    assert_eq!(view.to_tensor().unwrap().as_slice::<f32>().unwrap(), [1.0, 2.0]);
    let packed = file.view("packed").unwrap().to_tensor().unwrap();
    assert_eq!((packed.dtype(), packed.shape()), (DType::U4, [3, 2].as_slice()));
    let error = |name| file.view(name).unwrap_err().to_string();
    assert!(error("short").contains("3 bytes cannot be [9, 2] of u4"), "{}", error("short"));
    assert!(error("odd").contains("`nothing` is not an element type"));
    assert!(error("negative").contains("`-1` is not a shape"));
    assert!(error("absent").ends_with("absent: no such tensor"));
}

#[test]
fn damaged_safetensors_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    write_safetensors(&path, &[("w", Dtype::U8, vec![4], &[1, 2, 3, 4])], &[]);
    let whole = std::fs::read(&path).unwrap();
    let refused = |bytes: &[u8], why: &str| {
        std::fs::write(&path, bytes).unwrap();
        assert!(SafeTensorsFile::open(&path).is_err(), "{why}");
    };
    refused(&[], "empty");
    refused(&whole[..whole.len() - 1], "cut");
    refused(&[whole.as_slice(), &[0]].concat(), "trailing bytes");
    refused(&[&u64::MAX.to_le_bytes(), &whole[8..]].concat(), "huge header");
    refused(&[&200_000_000u64.to_le_bytes(), &whole[8..]].concat(), "header above the cap");
    let header = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes(), &[0; 4]].concat();
    refused(&header(r#"{"w":{"dtype":"U8","shape":[5],"data_offsets":[0,4]}}"#), "shape against offsets");
    refused(&header(r#"{"w":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}"#), "gap");
    let huge = r#"{"w":{"dtype":"F32","shape":[4611686018427387904,16],"data_offsets":[0,4]}}"#;
    refused(&header(huge), "overflow");
    let overlap = r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}"#;
    refused(&header(overlap), "overlap");
    std::fs::write(&path, &whole).unwrap();
    assert!(SafeTensorsFile::open(&path).is_ok());
}
