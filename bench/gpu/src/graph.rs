//! A decoder as exporters write it, in `f32`: rotary embeddings from positions, a causal mask, norms written out, key and
//! value caches.

use crate::shape::Shape;
use prost::Message;
use tpshard_frontend::proto::{
    AttributeProto, DimensionProto, DimensionValue, GraphProto, ModelProto, NodeProto, OperatorSetIdProto,
    StringStringEntryProto, TensorProto, TensorShapeProto, TensorTypeProto, TypeProto, TypeValue,
    ValueInfoProto,
};

/// The file that holds all weights.
pub(crate) const WEIGHTS: &str = "weights.bin";

const FLOAT: i32 = 1;
const INT64: i32 = 7;
const BOOL: i32 = 9;
/// The opset that brought `Attention`.
const OPSET: i64 = 23;

/// The bytes of the model.
pub(crate) fn model(shape: &Shape) -> Vec<u8> {
    let mut builder =
        Builder { shape: *shape, graph: GraphProto { name: "decoder".into(), ..GraphProto::default() } };
    builder.build();
    ModelProto {
        ir_version: Some(10),
        opset_import: vec![OperatorSetIdProto { domain: String::new(), version: OPSET }],
        graph: Some(Box::new(builder.graph)),
        ..ModelProto::default()
    }
    .encode_to_vec()
}

/// A size of an input or output.
#[derive(Clone, Copy)]
enum Size<'a> {
    Named(&'a str),
    Of(usize),
}

struct Builder {
    shape: Shape,
    graph: GraphProto,
}

impl Builder {
    fn build(&mut self) {
        use Size::{Named, Of};
        let Shape { layers, hidden, kv_heads, depth, vocabulary, .. } = self.shape;
        let tokens = [Named("batch"), Named("seq")];
        self.input("input_ids", INT64, &tokens);
        self.input("attention_mask", INT64, &[Named("batch"), Named("total")]);
        self.input("position_ids", INT64, &tokens);
        for layer in 0..layers {
            for part in ["key", "value"] {
                let past = [Named("batch"), Of(kv_heads), Named("past"), Of(depth)];
                self.input(&format!("past_key_values.{layer}.{part}"), FLOAT, &past);
            }
        }
        let mask = self.mask();
        let (cos, sin) = self.angles();
        let table = self.weight("embed_tokens", &[vocabulary, hidden]);
        let mut x = self.op("Gather", &[&table, "input_ids"], vec![]);
        for layer in 0..layers {
            let normal = self.norm(&x, &format!("layers.{layer}.input_norm"));
            let mixed = self.attention(layer, &normal, [&mask, &cos, &sin]);
            x = self.op("Add", &[&x, &mixed], vec![]);
            let normal = self.norm(&x, &format!("layers.{layer}.post_norm"));
            let mixed = self.gated(layer, &normal);
            x = self.op("Add", &[&x, &mixed], vec![]);
        }
        let x = self.norm(&x, "norm");
        let head = self.weight("lm_head", &[hidden, vocabulary]);
        self.named("MatMul", &[&x, &head], "logits", vec![]);
        self.output("logits", &[Named("batch"), Named("seq"), Of(vocabulary)]);
        for layer in 0..layers {
            for part in ["key", "value"] {
                let present = [Named("batch"), Of(kv_heads), Named("total"), Of(depth)];
                self.output(&format!("present.{layer}.{part}"), &present);
            }
        }
    }

    /// What is added to scores: nothing for keys up to the position of the query that the input mask has, the least number
    /// for others.
    fn mask(&mut self) -> String {
        let shape = self.op("Shape", &["attention_mask"], vec![]);
        let one = self.numbers(&[1]);
        let total = self.op("Gather", &[&shape, &one], vec![]);
        let none = self.numbers(&[]);
        let total = self.op("Reshape", &[&total, &none], vec![]);
        let (zero, step) = (self.number(0), self.number(1));
        let keys = self.op("Range", &[&zero, &total, &step], vec![]);
        let rows = self.numbers(&[1, 3]);
        let queries = self.op("Unsqueeze", &["position_ids", &rows], vec![]);
        let before = self.op("LessOrEqual", &[&keys, &queries], vec![]);
        let columns = self.numbers(&[1, 2]);
        let given = self.op("Unsqueeze", &["attention_mask", &columns], vec![]);
        let given = self.op("Cast", &[&given], vec![integer("to", BOOL.into())]);
        let seen = self.op("And", &[&before, &given], vec![]);
        let (nothing, least) = (self.real(&[], &[0.0]), self.real(&[], &[f32::MIN]));
        self.op("Where", &[&seen, &nothing, &least], vec![])
    }

    fn angles(&mut self) -> (String, String) {
        let half = self.shape.depth / 2;
        let frequencies: Vec<f32> =
            (0..half).map(|i| 500_000f64.powf(-(i as f64) / half as f64) as f32).collect();
        let frequencies = self.real(&[half], &frequencies);
        let axes = self.numbers(&[1, 3]);
        let positions = self.op("Unsqueeze", &["position_ids", &axes], vec![]);
        let positions = self.op("Cast", &[&positions], vec![integer("to", FLOAT.into())]);
        let angles = self.op("Mul", &[&positions, &frequencies], vec![]);
        let angles = self.op("Concat", &[&angles, &angles], vec![integer("axis", 3)]);
        (self.op("Cos", &[&angles], vec![]), self.op("Sin", &[&angles], vec![]))
    }

    fn norm(&mut self, x: &str, name: &str) -> String {
        let two = self.real(&[], &[2.0]);
        let square = self.op("Pow", &[x, &two], vec![]);
        let last = self.numbers(&[-1]);
        let mean = self.op("ReduceMean", &[&square, &last], vec![]);
        let epsilon = self.real(&[], &[1e-5]);
        let sum = self.op("Add", &[&mean, &epsilon], vec![]);
        let root = self.op("Sqrt", &[&sum], vec![]);
        let normal = self.op("Div", &[x, &root], vec![]);
        let scale = self.weight(name, &[self.shape.hidden]);
        self.op("Mul", &[&normal, &scale], vec![])
    }

    fn linear(&mut self, x: &str, name: &str, shape: [usize; 2]) -> String {
        let weight = self.weight(name, &shape);
        self.op("MatMul", &[x, &weight], vec![])
    }

    fn heads(&mut self, x: &str, count: usize) -> String {
        let shape = self.numbers(&[0, 0, count as i64, self.shape.depth as i64]);
        let parted = self.op("Reshape", &[x, &shape], vec![]);
        self.op("Transpose", &[&parted], vec![integers("perm", &[0, 2, 1, 3])])
    }

    fn rotated(&mut self, x: &str, cos: &str, sin: &str) -> String {
        let half = self.shape.depth as i64 / 2;
        let mut part = |from: i64, to: i64| {
            let bounds = [self.numbers(&[from]), self.numbers(&[to]), self.numbers(&[3])];
            self.op("Slice", &[x, &bounds[0], &bounds[1], &bounds[2]], vec![])
        };
        let (low, high) = (part(0, half), part(half, 2 * half));
        let high = self.op("Neg", &[&high], vec![]);
        let turned = self.op("Concat", &[&high, &low], vec![integer("axis", 3)]);
        let left = self.op("Mul", &[x, cos], vec![]);
        let right = self.op("Mul", &[&turned, sin], vec![]);
        self.op("Add", &[&left, &right], vec![])
    }

    fn attention(&mut self, layer: usize, x: &str, [mask, cos, sin]: [&str; 3]) -> String {
        let Shape { hidden, heads, kv_heads, depth, .. } = self.shape;
        let mut projected = |part: &str, count: usize| {
            let x = self.linear(x, &format!("layers.{layer}.{part}_proj"), [hidden, count * depth]);
            self.heads(&x, count)
        };
        let (q, k, v) = (projected("q", heads), projected("k", kv_heads), projected("v", kv_heads));
        let (q, k) = (self.rotated(&q, cos, sin), self.rotated(&k, cos, sin));
        let mut appended = |part: &str, new: &str| {
            let (past, present) =
                (format!("past_key_values.{layer}.{part}"), format!("present.{layer}.{part}"));
            self.named("Concat", &[&past, new], &present, vec![integer("axis", 2)]);
            present
        };
        let (k, v) = (appended("key", &k), appended("value", &v));
        let mixed = self.op("Attention", &[&q, &k, &v, mask], vec![]);
        let mixed = self.op("Transpose", &[&mixed], vec![integers("perm", &[0, 2, 1, 3])]);
        let shape = self.numbers(&[0, 0, (heads * depth) as i64]);
        let mixed = self.op("Reshape", &[&mixed, &shape], vec![]);
        self.linear(&mixed, &format!("layers.{layer}.o_proj"), [heads * depth, hidden])
    }

    fn gated(&mut self, layer: usize, x: &str) -> String {
        let Shape { hidden, ffn, .. } = self.shape;
        let gate = self.linear(x, &format!("layers.{layer}.gate_proj"), [hidden, ffn]);
        let up = self.linear(x, &format!("layers.{layer}.up_proj"), [hidden, ffn]);
        let open = self.op("Sigmoid", &[&gate], vec![]);
        let gate = self.op("Mul", &[&gate, &open], vec![]);
        let mixed = self.op("Mul", &[&gate, &up], vec![]);
        self.linear(&mixed, &format!("layers.{layer}.down_proj"), [ffn, hidden])
    }

    fn op(&mut self, op_type: &str, inputs: &[&str], attribute: Vec<AttributeProto>) -> String {
        let name = format!("v{}", self.graph.node.len());
        self.named(op_type, inputs, &name, attribute);
        name
    }

    fn named(&mut self, op_type: &str, inputs: &[&str], output: &str, attribute: Vec<AttributeProto>) {
        let name = format!("/{op_type}_{}", self.graph.node.len());
        self.graph.node.push(NodeProto {
            op_type: op_type.into(),
            name,
            input: inputs.iter().map(|input| (*input).to_owned()).collect(),
            output: vec![output.to_owned()],
            attribute,
            ..NodeProto::default()
        });
    }

    /// The beginning of the file of weights.
    fn weight(&mut self, name: &str, shape: &[usize]) -> String {
        let length = 4 * shape.iter().product::<usize>();
        let entry = |key: &str, value: String| StringStringEntryProto { key: key.into(), value };
        self.graph.initializer.push(TensorProto {
            name: name.into(),
            data_type: FLOAT,
            dims: shape.iter().map(|&dim| dim as i64).collect(),
            data_location: 1,
            external_data: vec![
                entry("location", WEIGHTS.into()),
                entry("offset", "0".into()),
                entry("length", length.to_string()),
            ],
            ..TensorProto::default()
        });
        name.to_owned()
    }

    fn constant(&mut self, data_type: i32, dims: Vec<i64>, raw: Vec<u8>) -> String {
        let name = format!("c{}", self.graph.initializer.len());
        let raw_data = Some(bytes::Bytes::from(raw));
        self.graph.initializer.push(TensorProto {
            name: name.clone(),
            data_type,
            dims,
            raw_data,
            ..TensorProto::default()
        });
        name
    }

    fn numbers(&mut self, values: &[i64]) -> String {
        let raw = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.constant(INT64, vec![values.len() as i64], raw)
    }

    fn number(&mut self, value: i64) -> String {
        self.constant(INT64, vec![], value.to_le_bytes().to_vec())
    }

    fn real(&mut self, shape: &[usize], values: &[f32]) -> String {
        let raw = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.constant(FLOAT, shape.iter().map(|&dim| dim as i64).collect(), raw)
    }

    fn input(&mut self, name: &str, elements: i32, sizes: &[Size<'_>]) {
        self.graph.input.push(value_info(name, elements, sizes));
    }

    fn output(&mut self, name: &str, sizes: &[Size<'_>]) {
        self.graph.output.push(value_info(name, FLOAT, sizes));
    }
}

fn value_info(name: &str, elem_type: i32, sizes: &[Size<'_>]) -> ValueInfoProto {
    let dim = sizes.iter().map(|size| DimensionProto {
        value: Some(match *size {
            Size::Named(name) => DimensionValue::Param(name.into()),
            Size::Of(extent) => DimensionValue::Value(extent as i64),
        }),
    });
    let tensor = TensorTypeProto { elem_type, shape: Some(TensorShapeProto { dim: dim.collect() }) };
    let ty = TypeProto { value: Some(TypeValue::Tensor(tensor)), denotation: String::new() };
    ValueInfoProto { name: name.into(), r#type: Some(Box::new(ty)), metadata_props: vec![] }
}

fn integer(name: &str, value: i64) -> AttributeProto {
    AttributeProto { name: name.into(), i: Some(value), r#type: 2, ..AttributeProto::default() }
}

fn integers(name: &str, values: &[i64]) -> AttributeProto {
    AttributeProto { name: name.into(), ints: values.to_vec(), r#type: 7, ..AttributeProto::default() }
}
