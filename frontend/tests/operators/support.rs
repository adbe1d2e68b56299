//! Building small models in memory and running them in the reference interpreter.

use bytes::Bytes;
use std::collections::BTreeMap;
use std::sync::Arc;
use tpshard_frontend::{
    Attribute, AttributeValue, Dim as Extent, Graph, ImportError, ImportOptions, Imported, Model, Node,
    Storage, TensorRef, TensorSource, TensorType, ValueInfo, ValueType, lower,
};
use tpshard_ir::interp::run_tensors;
use tpshard_ir::{DType, Data, Tensor};

/// A model under construction.
pub(crate) struct Builder {
    pub(crate) opset: i64,
    pub(crate) graph: Graph,
}

pub(crate) fn builder(opset: i64) -> Builder {
    Builder { opset, graph: Graph { name: "test".into(), ..Graph::default() } }
}

/// `4`, `batch` or `?`.
pub(crate) fn extents(text: &str) -> Vec<Extent> {
    text.split(' ')
        .filter(|part| !part.is_empty())
        .map(|part| match part.parse() {
            Ok(size) => Extent::Known(size),
            Err(_) if part == "?" => Extent::Unknown,
            Err(_) => Extent::Symbol(part.into()),
        })
        .collect()
}

pub(crate) fn info(name: &str, dtype: DType, shape: Option<&str>) -> ValueInfo {
    let tensor = TensorType { dtype, shape: shape.map(extents) };
    ValueInfo { name: name.into(), value_type: Some(ValueType::Tensor(tensor)), metadata: BTreeMap::new() }
}

pub(crate) fn stored(tensor: &Tensor) -> TensorRef {
    TensorRef {
        name: String::new(),
        dtype: tensor.dtype(),
        dims: tensor.shape().iter().map(|&dim| dim as u64).collect(),
        source: TensorSource::Inline(Bytes::from(tensor.data().to_le_bytes())),
    }
}

pub(crate) fn f32s(shape: &[usize], values: &[f32]) -> Tensor {
    Tensor::from_vec(shape.to_vec(), values.to_vec()).unwrap()
}

pub(crate) fn i64s(values: &[i64]) -> Tensor {
    Tensor::from_vec(vec![values.len()], values.to_vec()).unwrap()
}

/// 0, 1, 2, … in a shape.
pub(crate) fn counting(shape: &[usize]) -> Tensor {
    let count: usize = shape.iter().product();
    f32s(shape, &(0..count).map(|i| i as f32).collect::<Vec<_>>())
}

impl Builder {
    pub(crate) fn input(mut self, name: &str, dtype: DType, shape: &str) -> Builder {
        self.graph.inputs.push(info(name, dtype, Some(shape)));
        self
    }

    pub(crate) fn weight(mut self, name: &str, tensor: &Tensor) -> Builder {
        self.graph.initializers.insert(name.into(), stored(tensor));
        self
    }

    pub(crate) fn node(
        self,
        op_type: &str,
        inputs: &str,
        outputs: &str,
        attributes: &[(&str, AttributeValue)],
    ) -> Builder {
        self.node_of("", op_type, inputs, outputs, attributes)
    }

    /// Names are separated by spaces; `_` is an absent input or output.
    pub(crate) fn node_of(
        mut self,
        domain: &str,
        op_type: &str,
        inputs: &str,
        outputs: &str,
        attributes: &[(&str, AttributeValue)],
    ) -> Builder {
        let names = |text: &str| -> Vec<String> {
            text.split(' ')
                .filter(|n| !n.is_empty())
                .map(|n| if n == "_" { String::new() } else { n.into() })
                .collect()
        };
        self.graph.nodes.push(Node {
            name: format!("node_{}", self.graph.nodes.len()),
            op_type: op_type.into(),
            domain: domain.into(),
            opset: if domain.is_empty() { self.opset } else { 1 },
            inputs: names(inputs),
            outputs: names(outputs),
            attributes: attributes
                .iter()
                .map(|(name, value)| Attribute { name: (*name).into(), value: value.clone() })
                .collect(),
            ..Node::default()
        });
        self
    }

    pub(crate) fn output(mut self, name: &str, dtype: DType) -> Builder {
        self.graph.outputs.push(info(name, dtype, None));
        self
    }

    pub(crate) fn import_with(self, options: &ImportOptions) -> Result<Imported, ImportError> {
        let model = Model {
            path: "test.onnx".into(),
            ir_version: 10,
            opsets: [(String::new(), self.opset)].into(),
            producer: String::new(),
            graph: self.graph,
            metadata: BTreeMap::new(),
            device_configurations: Vec::new(),
            storage: Storage::default(),
        };
        lower(model, options)
    }

    pub(crate) fn import(self) -> Result<Imported, ImportError> {
        self.import_with(&ImportOptions::default())
    }

    pub(crate) fn run(self, inputs: &[(&str, Tensor)]) -> Vec<Tensor> {
        run(&self.import().unwrap(), inputs)
    }
}

pub(crate) fn run(imported: &Imported, inputs: &[(&str, Tensor)]) -> Vec<Tensor> {
    let inputs: BTreeMap<Arc<str>, Tensor> =
        inputs.iter().map(|(name, tensor)| ((*name).into(), tensor.clone())).collect();
    let initializer = |name: &str| Ok(imported.model.storage.to_tensor(&imported.tensors[name]).unwrap());
    let outputs = run_tensors(&imported.graph, &inputs, &initializer, 1 << 20).unwrap();
    outputs.into_iter().map(|(_, tensor)| tensor).collect()
}

pub(crate) fn close(found: &Tensor, shape: &[usize], wanted: &[f32]) {
    assert_eq!(found.shape(), shape);
    let Data::F32(found) = found.data() else { panic!("{found:?}") };
    for (a, b) in found.iter().zip(wanted) {
        assert!((a - b).abs() <= 1e-5 * (1.0 + b.abs()), "{found:?} is not {wanted:?}");
    }
    assert_eq!(found.len(), wanted.len());
}

pub(crate) fn int(value: i64) -> AttributeValue {
    AttributeValue::Int(value)
}

pub(crate) fn ints(values: &[i64]) -> AttributeValue {
    AttributeValue::Ints(values.to_vec())
}

pub(crate) fn first_fault(error: &ImportError) -> String {
    error.faults.first().map(ToString::to_string).unwrap_or_default()
}
