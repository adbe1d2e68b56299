//! Our message definitions against independently generated ones: what one writes the other reads.

use onnx_protobuf as oracle;
use onnx_protobuf::Message as _;
use prost::Message as _;
use tpshard_frontend::proto::*;

fn tensor() -> TensorProto {
    TensorProto {
        dims: vec![2, -3],
        data_type: 7,
        segment: Some(SegmentProto { begin: 1, end: 2 }),
        float_data: vec![1.5, -2.5],
        int32_data: vec![-1, 2],
        string_data: vec!["s".into()],
        int64_data: vec![i64::MIN, 3],
        name: "tensor".into(),
        raw_data: Some(vec![1, 2, 3].into()),
        double_data: vec![0.25],
        uint64_data: vec![u64::MAX],
        external_data: vec![entry("location", "w")],
        data_location: 1,
    }
}

fn entry(key: &str, value: &str) -> StringStringEntryProto {
    StringStringEntryProto { key: key.into(), value: value.into() }
}

fn types() -> Vec<TypeProto> {
    let shape = TensorShapeProto {
        dim: vec![
            DimensionProto { value: Some(DimensionValue::Value(4)) },
            DimensionProto { value: Some(DimensionValue::Param("batch".into())) },
            DimensionProto { value: None },
        ],
    };
    let tensor = TensorTypeProto { elem_type: 1, shape: Some(shape) };
    let of = |value| TypeProto { value: Some(value), denotation: "d".into() };
    let plain = of(TypeValue::Tensor(tensor.clone()));
    let element = || Box::new(ElementTypeProto { elem_type: Some(Box::new(plain.clone())) });
    vec![
        plain.clone(),
        of(TypeValue::Sequence(element())),
        of(TypeValue::Optional(element())),
        of(TypeValue::Map(Box::new(MapTypeProto { key_type: 7, value_type: Some(Box::new(plain.clone())) }))),
        of(TypeValue::SparseTensor(tensor)),
    ]
}

fn graph(attribute: Vec<AttributeProto>) -> GraphProto {
    let value = |name: &str, declared| ValueInfoProto {
        name: name.into(),
        r#type: Some(Box::new(declared)),
        metadata_props: vec![],
    };
    let sparse = SparseTensorProto {
        values: Some(Box::new(tensor())),
        indices: Some(Box::new(tensor())),
        dims: vec![5],
    };
    GraphProto {
        node: vec![NodeProto {
            input: vec!["a".into(), String::new()],
            output: vec!["b".into()],
            name: "n".into(),
            op_type: "Op".into(),
            attribute,
            domain: "d".into(),
            ..NodeProto::default()
        }],
        name: "g".into(),
        initializer: vec![tensor()],
        input: types().into_iter().map(|declared| value("in", declared)).collect(),
        output: vec![value("out", types().remove(0))],
        value_info: vec![value("inner", types().remove(0))],
        sparse_initializer: vec![sparse],
        metadata_props: vec![],
    }
}

fn attribute() -> AttributeProto {
    AttributeProto {
        name: "a".into(),
        f: Some(0.5),
        i: Some(-1),
        s: Some("text".into()),
        t: Some(Box::new(tensor())),
        g: Some(Box::new(graph(vec![]))),
        floats: vec![1.0],
        ints: vec![1, 2],
        strings: vec!["x".into()],
        tensors: vec![tensor()],
        graphs: vec![graph(vec![])],
        tp: Some(Box::new(types().remove(0))),
        type_protos: types(),
        r#type: 2,
        ref_attr_name: "r".into(),
        sparse_tensor: Some(Box::new(SparseTensorProto { dims: vec![1], ..Default::default() })),
        sparse_tensors: vec![SparseTensorProto { dims: vec![2], ..Default::default() }],
    }
}

fn model() -> ModelProto {
    let opset = OperatorSetIdProto { domain: "d".into(), version: 17 };
    ModelProto {
        ir_version: Some(9),
        producer_name: "p".into(),
        producer_version: "1".into(),
        graph: Some(Box::new(graph(vec![attribute()]))),
        opset_import: vec![opset.clone()],
        metadata_props: vec![entry("k", "v")],
        functions: vec![FunctionProto {
            name: "F".into(),
            input: vec!["i".into()],
            output: vec!["o".into()],
            attribute: vec!["alpha".into()],
            node: graph(vec![]).node,
            opset_import: vec![opset],
            domain: "fd".into(),
            attribute_proto: vec![attribute()],
            ..FunctionProto::default()
        }],
        configuration: vec![],
    }
}

/// Reads with the oracle, refuses fields it does not know under these numbers, and writes again.
fn through_oracle(content: &[u8]) -> oracle::ModelProto {
    let model = oracle::ModelProto::parse_from_bytes(content).unwrap();
    let unknown = |fields: &protobuf::UnknownFields| fields.iter().count();
    assert_eq!(unknown(model.special_fields.unknown_fields()), 0);
    let graph = model.graph.as_ref().unwrap();
    assert_eq!(unknown(graph.special_fields.unknown_fields()), 0);
    assert_eq!(unknown(graph.initializer[0].special_fields.unknown_fields()), 0);
    assert_eq!(unknown(graph.node[0].special_fields.unknown_fields()), 0);
    assert_eq!(unknown(graph.node[0].attribute[0].special_fields.unknown_fields()), 0);
    assert_eq!(unknown(model.functions[0].special_fields.unknown_fields()), 0);
    model
}

#[test]
fn what_we_write_the_oracle_reads_field_by_field() {
    let read = through_oracle(&model().encode_to_vec());
    assert_eq!((read.ir_version, read.producer_name.as_str()), (9, "p"));
    assert_eq!((read.opset_import[0].domain.as_str(), read.opset_import[0].version), ("d", 17));
    let graph = read.graph.as_ref().unwrap();
    let node = &graph.node[0];
    assert_eq!((node.op_type.as_str(), node.domain.as_str(), node.name.as_str()), ("Op", "d", "n"));
    assert_eq!((&node.input[..], &node.output[..]), (&["a".into(), String::new()][..], &["b".into()][..]));
    let attribute = &node.attribute[0];
    assert_eq!(
        (attribute.i, attribute.s.as_slice(), attribute.ref_attr_name.as_str()),
        (-1, &b"text"[..], "r")
    );
    let tensor = &graph.initializer[0];
    assert_eq!((&tensor.dims[..], tensor.data_type, &tensor.raw_data[..]), (&[2, -3][..], 7, &[1, 2, 3][..]));
    assert_eq!((&tensor.int64_data[..], &tensor.uint64_data[..]), (&[i64::MIN, 3][..], &[u64::MAX][..]));
    assert_eq!(tensor.external_data[0].key, "location");
    assert_eq!(graph.sparse_initializer[0].dims, [5]);
    assert_eq!(read.functions[0].domain, "fd");
}

#[test]
fn what_the_oracle_writes_we_read_back_unchanged() {
    let written = through_oracle(&model().encode_to_vec()).write_to_bytes().unwrap();
    assert!(ModelProto::decode(written.as_slice()).unwrap() == model());
}

/// Newer than the oracle: the bytes are written out by hand from the field numbers of `onnx.proto`.
#[test]
fn device_configurations_have_the_published_field_numbers() {
    let configuration = [0x0a, 0x01, b'c', 0x10, 0x02, 0x1a, 0x01, b'x'];
    let read = DeviceConfigurationProto::decode(&configuration[..]).unwrap();
    assert_eq!((read.name.as_str(), read.num_devices, read.device.len()), ("c", 2, 1));
    let split = [0x08, 0x08, 0x18, 0x02];
    let dim = [&[0x08, 0x01, 0x12, 0x04][..], &split].concat();
    let spec = [&[0x0a, 0x01, b't', 0x12, 0x02, 0x00, 0x01, 0x22, 0x08][..], &dim].concat();
    let node = [&[0x0a, 0x01, b'c', 0x12, spec.len() as u8][..], &spec, &[0x18, 0x03]].concat();
    let read = NodeDeviceConfigurationProto::decode(node.as_slice()).unwrap();
    assert_eq!((read.configuration_id.as_str(), read.pipeline_stage), ("c", Some(3)));
    let spec = &read.sharding_spec[0];
    assert_eq!((spec.tensor_name.as_str(), &spec.device[..]), ("t", &[0, 1][..]));
    let split = &spec.sharded_dim[0].simple_sharding[0];
    assert_eq!(
        (spec.sharded_dim[0].axis, &split.dim, split.num_shards),
        (1, &Some(DimensionValue::Value(8)), 2)
    );
}
