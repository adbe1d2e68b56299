//! ONNX Runtime's operators, and those of new opsets, against its results: each folder of `fixtures/contrib` holds a model
//! of one operator, inputs, and the outputs that were recorded. `generate.py` beside them writes the folders.

use npyz::npz::NpzArchive;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tpshard_frontend::{
    AttributeValue, Graph, ImportError, ImportOptions, Imported, Model, import, load, lower,
};
use tpshard_ir::interp::run_tensors;
use tpshard_ir::{Data, Op, Scalar, Tensor};

const TOLERANCE: f32 = 1e-5;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/contrib").join(name)
}

fn read(path: &Path) -> BTreeMap<Arc<str>, Tensor> {
    let mut archive = NpzArchive::new(BufReader::new(File::open(path).unwrap())).unwrap();
    let names: Vec<String> = archive.array_names().map(str::to_owned).collect();
    let mut tensors = BTreeMap::new();
    for name in names {
        let array = archive.by_name(&name).unwrap().unwrap();
        let shape: Vec<usize> = array.shape().iter().map(|&extent| extent as usize).collect();
        let tensor = match array.dtype().descr().trim_matches(|c: char| !c.is_ascii_alphanumeric()) {
            "f4" => Tensor::from_vec(shape, array.into_vec::<f32>().unwrap()),
            "i8" => Tensor::from_vec(shape, array.into_vec::<i64>().unwrap()),
            "i4" => Tensor::from_vec(shape, array.into_vec::<i32>().unwrap()),
            "u1" => Tensor::from_vec(shape, array.into_vec::<u8>().unwrap()),
            other => panic!("{name} is of type {other}"),
        };
        tensors.insert(name.as_str().into(), tensor.unwrap());
    }
    tensors
}

fn run(imported: &Imported, inputs: &BTreeMap<Arc<str>, Tensor>) -> BTreeMap<Arc<str>, Tensor> {
    let mut inputs = inputs.clone();
    // An input that no node reads is not one of the graph.
    inputs.retain(|name, _| imported.graph.inputs().any(|(_, other, _)| other == name));
    let initializer = |name: &str| Ok(imported.model.storage.to_tensor(&imported.tensors[name]).unwrap());
    run_tensors(&imported.graph, &inputs, &initializer, 1 << 20).unwrap().into_iter().collect()
}

/// The model of a fixture after a change, which may be none.
fn changed(name: &str, change: impl FnOnce(&mut Graph)) -> Model {
    let mut model = load(&fixture(name).join("model.onnx"), &ImportOptions::default().limits).unwrap();
    change(&mut model.graph);
    model
}

fn check(name: &str) {
    let imported = import(&fixture(name).join("model.onnx"), &ImportOptions::default()).unwrap();
    let found = run(&imported, &read(&fixture(name).join("inputs.npz")));
    let wanted = read(&fixture(name).join("outputs.npz"));
    assert_eq!(found.keys().collect::<Vec<_>>(), wanted.keys().collect::<Vec<_>>(), "{name}");
    for (output, wanted) in &wanted {
        let found = &found[output];
        assert_eq!(found.shape(), wanted.shape(), "{name}: {output}");
        let (Data::F32(found), Data::F32(wanted)) = (found.data(), wanted.data()) else {
            panic!("{name}: {output} is of type {}", found.dtype());
        };
        for (at, (a, b)) in found.iter().zip(wanted).enumerate() {
            assert!((a - b).abs() <= TOLERANCE * (1.0 + b.abs()), "{name}: {output}[{at}] is {a}, not {b}");
        }
    }
}

macro_rules! fixtures {
    ($($name:ident)*) => {
        $(#[test] fn $name() { check(stringify!($name)); })*

        #[test]
        fn every_folder_is_tested() {
            let mut folders: Vec<String> = std::fs::read_dir(fixture("")).unwrap()
                .map(|entry| entry.unwrap())
                .filter(|entry| entry.path().is_dir())
                .map(|entry| entry.file_name().into_string().unwrap())
                .collect();
            folders.sort();
            assert_eq!(folders, [$(stringify!($name)),*]);
        }
    };
}

fixtures! {
    attention_causal attention_mask attention_mask_of_one attention_packed_past causal_conv causal_conv_begin cdist_euclidean dynamic_quantize_matmul
    experts_4_bits experts_8_bits_gated experts_gated experts_gelu fused_conv fused_conv_clip fused_conv_hard_sigmoid
    fused_gemm fused_matmul_batch_first fused_matmul_batch_first_swapped group_query_buffer group_query_buffer_prompt group_query_decode
    group_query_prompt group_query_softcap group_query_window layer_norm mask_of_one
    matmul_2_bits_small_block_level_4 matmul_2_bits_zeros matmul_4_bits_float_zeros_level_4
    matmul_4_bits_padded matmul_4_bits_padded_level_4 matmul_4_bits_zeros_level_4
    matmul_8_bits_level_4 matmul_8_bits_zeros matmul_integer_to_float quantised_add quantised_attention quantised_attention_by_column
    quantised_average_pool quantised_concat quantised_gemm quantised_global_average_pool
    quantised_leaky_relu quantised_mul quantised_sigmoid quantised_softmax
    quantised_softmax_flattened quantised_softmax_middle quantised_where rotary_halves
    rotary_microsoft_interleaved rotary_microsoft_partial skip_simplified
}

fn roundings(imported: &Imported) -> usize {
    imported.graph.nodes().iter().filter(|node| matches!(node.op, Op::Map(Scalar::Round))).count()
}

#[test]
fn products_of_one_operand_round_it_once() {
    let model = changed("matmul_4_bits_padded_level_4", |graph| {
        // The same product again, and one that does not round.
        for (suffix, level) in [("again", 4), ("exact", 0)] {
            let mut node = graph.nodes[0].clone();
            node.outputs = vec![format!("y_{suffix}")];
            for attribute in &mut node.attributes {
                if attribute.name == "accuracy_level" {
                    attribute.value = AttributeValue::Int(level);
                }
            }
            graph.nodes.push(node);
            let mut output = graph.outputs[0].clone();
            output.name = format!("y_{suffix}");
            output.value_type = None;
            graph.outputs.push(output);
        }
    });
    let imported = lower(model, &ImportOptions::default()).unwrap();
    assert_eq!(roundings(&imported), 1);
    let found = run(&imported, &read(&fixture("matmul_4_bits_padded_level_4").join("inputs.npz")));
    assert_eq!(found["y"], found["y_again"]);
    assert_ne!(found["y"], found["y_exact"]);
}

#[test]
fn blocks_of_zeros_stay_zero() {
    let imported = lower(changed("matmul_8_bits_level_4", |_| {}), &ImportOptions::default()).unwrap();
    let zeros = Tensor::from_vec(vec![1, 1, 64], vec![0.0f32; 64]).unwrap();
    let found = run(&imported, &BTreeMap::from([("a".into(), zeros)]));
    assert_eq!(found["y"].data(), &Data::F32(vec![0.0; 8]));
}

/// The first fault of a fixture whose node has an attribute set to something else.
fn refused(name: &str, attribute: &str, value: i64) -> String {
    let model = changed(name, |graph| {
        let attributes = &mut graph.nodes[0].attributes;
        attributes.retain(|other| other.name != attribute);
        let value = AttributeValue::Int(value);
        attributes.push(tpshard_frontend::Attribute { name: attribute.into(), value });
    });
    first_fault(&lower(model, &ImportOptions::default()).unwrap_err())
}

fn first_fault(error: &ImportError) -> String {
    error.faults.first().map(ToString::to_string).unwrap_or_default()
}

#[test]
fn wrong_attributes_are_refused() {
    let cases = [
        ("matmul_4_bits_padded", "bits", 3, "weights of 3 bits"),
        ("matmul_4_bits_padded", "bits", 8, "bytes do not hold"),
        ("matmul_4_bits_padded", "block_size", 24, "block_size is 24"),
        ("matmul_4_bits_padded", "K", 0, "K is 0"),
        ("matmul_4_bits_padded", "K", 71, "sizes 72 and 71"),
        ("matmul_4_bits_padded", "N", 1 << 39, "bytes do not hold"),
        ("group_query_decode", "num_heads", 0, "num_heads is 0"),
        ("group_query_decode", "kv_num_heads", 3, "3 heads"),
        ("group_query_decode", "smooth_softmax", 1, "smooth"),
        ("rotary_halves", "num_heads", 3, "3 heads"),
        ("attention_causal", "q_num_heads", -1, "q_num_heads is -1"),
        ("attention_causal", "qk_matmul_output_mode", 4, "qk_matmul_output_mode is 4"),
        ("layer_norm", "axis", 3, "axis 3 of a tensor of rank 3"),
    ];
    for (name, attribute, value, wanted) in cases {
        let fault = refused(name, attribute, value);
        assert!(fault.contains(wanted), "{name} with {attribute} = {value}: {fault}");
    }
}

#[test]
fn missing_and_extra_inputs_are_refused() {
    let with_inputs = |name: &str, change: &dyn Fn(&mut Vec<String>)| {
        let model = changed(name, |graph| change(&mut graph.nodes[0].inputs));
        first_fault(&lower(model, &ImportOptions::default()).unwrap_err())
    };
    let fault = with_inputs("matmul_4_bits_padded", &|inputs| inputs.extend(["".into(), "scales".into()]));
    assert!(fault.contains("g_idx"), "{fault}");
    let fault = with_inputs("group_query_decode", &|inputs| inputs[4].clear());
    assert!(fault.contains("together or not at all"), "{fault}");
    let fault = with_inputs("layer_norm", &|inputs| inputs.truncate(1));
    assert!(fault.contains("LayerNormalization"), "{fault}");
}

#[test]
fn misspelt_attributes_are_passed_over_where_onnx_runtime_does() {
    let import_at = |opset: i64| {
        let model = changed("layer_norm", |graph| {
            let node = &mut graph.nodes[0];
            node.opset = opset;
            node.attributes.iter_mut().for_each(|attribute| attribute.name = "epsion".into());
        });
        lower(model, &ImportOptions::default())
    };
    assert!(import_at(16).is_ok());
    assert!(first_fault(&import_at(17).unwrap_err()).contains("epsion"));
}

#[test]
fn norms_take_parameters_with_leading_dims() {
    let run_with = |dims: &[u64]| {
        let model = changed("layer_norm", |graph| {
            for name in ["scale", "bias"] {
                if let Some(tensor) = graph.initializers.get_mut(name) {
                    tensor.dims = dims.to_vec();
                }
            }
        });
        lower(model, &ImportOptions::default())
    };
    let inputs = read(&fixture("layer_norm").join("inputs.npz"));
    let plain = run(&run_with(&[16]).unwrap(), &inputs);
    assert_eq!(run(&run_with(&[1, 1, 16]).unwrap(), &inputs)["y"], plain["y"]);
    let fault = first_fault(&run_with(&[2, 8]).unwrap_err());
    assert!(fault.contains("sizes 8 and 16"), "{fault}");
}

/// What docs/adding-an-op.md shows is what is there.
#[test]
fn the_example_of_the_documentation_is_the_code() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &str| std::fs::read_to_string(root.join(path)).unwrap();
    let (guide, code) = (read("../docs/adding-an-op.md"), read("src/ops/reduction.rs"));
    let start = code.find("/// CDist").unwrap();
    let function = &code[start..start + code[start..].find("\n}\n").unwrap() + 2];
    let shown: Vec<String> = function.lines().map(|line| format!("    {line}")).collect();
    assert!(guide.contains(&shown.join("\n")), "docs/adding-an-op.md shows another function");
    let row = read("src/ops/mod.rs").lines().find(|line| line.contains("\"CDist\"")).map(str::to_owned);
    assert!(guide.contains(&row.unwrap()), "docs/adding-an-op.md shows another row");
}
