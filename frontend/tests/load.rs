//! Whole files: what loads, what is refused, and how it is said.

mod common;

use common::*;
use prost::Message;
use tpshard_frontend::proto::*;
use tpshard_frontend::{ErrorKind, Limits, TensorSource, load};

fn relu() -> ModelProto {
    model(graph(&["x"], vec![node("Relu", &["x"], &["y"])], &["y"]))
}

fn tensor(name: &str, dims: &[i64], values: &[f32]) -> TensorProto {
    let raw: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    TensorProto {
        name: name.into(),
        data_type: 1,
        dims: dims.to_vec(),
        raw_data: Some(raw.into()),
        ..TensorProto::default()
    }
}

#[test]
fn weights_are_readable_inline_and_outside() {
    let folder = tempfile::tempdir().unwrap();
    let mut proto = relu();
    let entry = |key: &str, value: &str| StringStringEntryProto { key: key.into(), value: value.into() };
    let outside = TensorProto {
        raw_data: None,
        data_location: 1,
        external_data: vec![entry("location", "w.bin"), entry("offset", "4")],
        ..tensor("outside", &[1], &[])
    };
    let graph = proto.graph.as_mut().unwrap();
    graph.initializer = vec![tensor("inline", &[2], &[1.0, 2.0]), outside];
    std::fs::write(folder.path().join("w.bin"), [0, 0, 0, 0, 0, 0, 64, 64]).unwrap();
    let path = folder.path().join("m.onnx");
    std::fs::write(&path, proto.encode_to_vec()).unwrap();
    let model = load(&path, &Limits::default()).unwrap();
    let values = |name: &str| {
        let tensor = model.storage.to_tensor(&model.graph.initializers[name]).unwrap();
        tensor.as_slice::<f32>().unwrap().to_vec()
    };
    assert_eq!(values("inline"), [1.0, 2.0]);
    assert_eq!(values("outside"), [3.0]);
    let TensorSource::External { file, offset, length } = &model.graph.initializers["outside"].source else {
        panic!("expected external data");
    };
    assert_eq!((*offset, *length), (4, 4));
    assert!(file.is_absolute());
}

#[test]
fn large_raw_data_is_not_copied() {
    let mut proto = relu();
    let graph = proto.graph.as_mut().unwrap();
    graph.initializer =
        vec![tensor("a", &[1 << 18], &[1.0; 1 << 18]), tensor("b", &[1 << 18], &[2.0; 1 << 18])];
    let model = load_proto(&proto).unwrap();
    let at = |name: &str| model.storage.bytes(&model.graph.initializers[name]).unwrap().as_ptr() as usize;
    // Both lie in one map of the file, a megabyte and a few bytes of framing apart.
    let distance = at("b") - at("a");
    assert!((1 << 20..(1 << 20) + 64).contains(&distance), "{distance}");
}

#[test]
fn an_input_with_an_initializer_is_a_default() {
    let mut proto = relu();
    let graph = proto.graph.as_mut().unwrap();
    graph.input.push(value("w"));
    graph.initializer = vec![tensor("w", &[2], &[1.0, 2.0])];
    let model = load_proto(&proto).unwrap();
    assert_eq!(model.graph.inputs.len(), 1);
    assert_eq!(model.graph.defaults[0].name, "w");
}

#[test]
fn versions_are_checked() {
    let with = |ir, version| {
        let mut proto = relu();
        proto.ir_version = ir;
        proto.opset_import = vec![opset("ai.onnx", version)];
        proto
    };
    load_proto(&with(Some(14), 26)).unwrap();
    load_proto(&with(Some(3), 1)).unwrap();
    for version in [0, 27, 1_000_000_000, -1] {
        let text = refused(&with(Some(8), version));
        assert!(text.contains(&format!("opset {version} is not supported; 1 to 26 are")), "{text}");
    }
    for ir in [0, 2, 15, i64::MAX] {
        assert!(refused(&with(Some(ir), 17)).contains("versions 3 to 14 are understood"));
    }
    assert!(refused(&with(None, 17)).contains("no IR version"));
    let mut none = relu();
    none.opset_import.clear();
    assert!(refused(&none).contains("opset_import is empty"));
    let mut unknown = relu();
    unknown.graph.as_mut().unwrap().node[0].domain = "my.domain".into();
    let text = refused(&unknown);
    assert!(text.contains("node making `y` (Relu, my.domain)") && text.contains("not imported"), "{text}");
    // ONNX Runtime's own tools leave this import out.
    unknown.graph.as_mut().unwrap().node[0].domain = "com.microsoft".into();
    assert_eq!(load_proto(&unknown).unwrap().graph.nodes[0].opset, 1);
}

#[test]
fn files_that_are_no_models_are_told_apart() {
    assert!(load_bytes(b"").unwrap_err().to_string().contains("empty"));
    assert!(load_bytes(&[0; 4096]).unwrap_err().to_string().contains("number 0"));
    // With one import, which comes last, no prefix is a model.
    let good = ModelProto { opset_import: vec![opset("", 20)], ..relu() }.encode_to_vec();
    for cut in 1..good.len() {
        let error = load_bytes(&good[..cut]).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Invalid), "{cut}: {error}");
        assert!(error.to_string().contains("help: "), "{cut}: {error}");
    }
    let folder = tempfile::tempdir().unwrap();
    let of = |path: &std::path::Path| load(path, &Limits::default()).unwrap_err();
    assert!(of(folder.path()).to_string().contains("folder"));
    assert_eq!(of(&folder.path().join("none")).kind(), ErrorKind::Io);
    assert!(of("/dev/null".as_ref()).to_string().contains("regular file"));
}

#[test]
fn every_single_bit_flip_is_survived() {
    let mut proto = relu();
    let graph = proto.graph.as_mut().unwrap();
    graph.node[0].attribute = vec![int("axis", 3), body("b", common::graph(&[], vec![], &["x"]))];
    graph.initializer = vec![tensor("w", &[2], &[1.0, 2.0])];
    let good = proto.encode_to_vec();
    load_bytes(&good).unwrap();
    for bit in 0..good.len() * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        if let Err(error) = load_bytes(&bad) {
            assert!(!error.faults.is_empty());
        }
    }
}

#[test]
fn attributes_hold_what_they_declare() {
    let with = |attribute: AttributeProto| {
        let mut proto = relu();
        proto.graph.as_mut().unwrap().node[0].attribute = vec![attribute];
        proto
    };
    load_proto(&with(AttributeProto { r#type: 0, ..int("a", 1) })).unwrap();
    // Encoders that leave out zeros leave this.
    load_proto(&with(AttributeProto { i: None, ..int("a", 0) })).unwrap();
    let text = refused(&with(AttributeProto { r#type: 1, ..int("a", 1) }));
    assert!(text.contains("declared as float and holds int"), "{text}");
    let text = refused(&with(AttributeProto { r#type: 0, i: None, ..int("a", 1) }));
    assert!(text.contains("neither type nor value"), "{text}");
    assert!(refused(&with(AttributeProto { r#type: 99, ..int("a", 1) })).contains("unknown type 99"));
    assert!(refused(&with(AttributeProto { r#type: 5, i: None, ..int("a", 1) })).contains("no graph value"));
    assert!(refused(&with(AttributeProto { name: String::new(), ..int("a", 1) })).contains("no name"));
    let sparse = SparseTensorProto::default();
    let sparse = AttributeProto { r#type: 11, i: None, sparse_tensor: Some(Box::new(sparse)), ..int("a", 1) };
    assert_eq!(load_proto(&with(sparse)).unwrap_err().kind(), ErrorKind::Unsupported);
}

#[test]
fn a_broken_tensor_names_its_place() {
    let mut proto = relu();
    let graph = proto.graph.as_mut().unwrap();
    graph.initializer =
        vec![tensor("short", &[3], &[1.0]), tensor("twice", &[], &[1.0]), tensor("twice", &[], &[1.0])];
    let constant = AttributeProto {
        name: "value".into(),
        r#type: 4,
        t: Some(Box::new(tensor("", &[-1], &[]))),
        ..AttributeProto::default()
    };
    graph.node[0].attribute = vec![constant];
    let text = refused(&proto);
    for part in [
        "`short`: dims [3] of f32 need 12 bytes",
        "`twice`: the initializer is defined twice",
        "negative dim",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(text.contains("node making `y` (Relu, ai.onnx 20), `value`"), "{text}");
}

#[test]
fn a_hundred_thousand_nodes_load_and_drop() {
    let nodes = (0..100_000).map(|i| node("Relu", &[&format!("v{i}")], &[&format!("v{}", i + 1)])).collect();
    let proto = model(graph(&["v0"], nodes, &["v100000"]));
    assert!(refused(&proto).contains("more than 65536 nodes"));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.onnx");
    std::fs::write(&path, proto.encode_to_vec()).unwrap();
    let loaded = load(&path, &Limits { nodes: 100_000, ..Limits::default() }).unwrap();
    assert_eq!(loaded.graph.nodes.len(), 100_000);
}

#[test]
fn a_node_of_very_many_inputs_is_refused() {
    let names: Vec<String> = (0..16_385).map(|i| format!("x{i}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let text = refused(&model(graph(&names, vec![node("Sum", &names, &["y"])], &["y"])));
    assert!(text.contains("16385 inputs, 16384 are possible") && text.contains("help: "), "{text}");
    let fewer = &names[..16_384];
    load_proto(&model(graph(fewer, vec![node("Sum", fewer, &["y"])], &["y"]))).unwrap();
}

fn sharded(change: impl Fn(&mut ShardingSpecProto, &mut NodeDeviceConfigurationProto)) -> ModelProto {
    let mut proto = relu();
    proto.configuration =
        vec![DeviceConfigurationProto { name: "tp2".into(), num_devices: 2, device: strings(&["a", "b"]) }];
    let split = SimpleShardedDimProto { dim: Some(DimensionValue::Value(2)), num_shards: 2 };
    let mut spec = ShardingSpecProto {
        tensor_name: "x".into(),
        device: vec![0, 1],
        index_to_device_group_map: vec![],
        sharded_dim: vec![ShardedDimProto { axis: 0, simple_sharding: vec![split] }],
    };
    let mut configuration =
        NodeDeviceConfigurationProto { configuration_id: "tp2".into(), ..Default::default() };
    change(&mut spec, &mut configuration);
    configuration.sharding_spec = vec![spec];
    proto.graph.as_mut().unwrap().node[0].device_configurations = vec![configuration];
    proto
}

#[test]
fn sharding_annotations_are_checked() {
    let loaded = load_proto(&sharded(|_, _| {})).unwrap();
    assert_eq!(loaded.graph.nodes[0].device_configurations[0].sharding_spec[0].device, [0, 1]);
    assert!(refused(&sharded(|spec, _| spec.tensor_name = "z".into())).contains("neither takes nor makes"));
    assert!(refused(&sharded(|spec, _| spec.device = vec![1, 1])).contains("device 1 twice"));
    assert!(refused(&sharded(|spec, _| spec.device = vec![0, 2])).contains("device 2 of 2"));
    assert!(
        refused(&sharded(|spec, _| spec.sharded_dim[0].axis = 1)).contains("axis 1 of a tensor of rank 1")
    );
    let shards =
        |spec: &mut ShardingSpecProto, _: &mut _| spec.sharded_dim[0].simple_sharding[0].num_shards = 0;
    assert!(refused(&sharded(shards)).contains("into 0 shards"));
    assert!(refused(&sharded(|_, c| c.configuration_id = "tp4".into())).contains("`tp4` is not defined"));
}
