//! Inputs and expected outputs of a test, and its model with constants in place of inputs.

use crate::suite::Test;
use anyhow::{Context, Result, bail};
use prost::Message;
use std::fs;
use std::path::{Path, PathBuf};
use tpshard_frontend::proto::{DimensionValue, ModelProto, TensorProto, TypeValue, ValueInfoProto};
use tpshard_frontend::read_tensor;
use tpshard_ir::{DType, Tensor};

/// The IR version from which on initializers need not be inputs.
const FREE_INITIALIZERS: i64 = 4;

/// `TensorProto.BFLOAT16`.
const BFLOAT16: i32 = 16;

/// One pair of inputs and outputs by position.
pub(crate) struct Pair {
    pub(crate) inputs: Vec<Tensor>,
    pub(crate) outputs: Vec<Tensor>,
}

/// The pairs of a test. `inputs` are the declared inputs.
pub(crate) fn pairs(test: &Test, proto: &ModelProto) -> Result<Vec<Pair>> {
    if test.is_light() {
        return Ok(vec![light_pair(test, proto)?]);
    }
    test.data
        .iter()
        .map(|folder| {
            let graph = proto.graph.as_ref().context("no graph")?;
            let inputs = numbered(folder, "input")?;
            let outputs = numbered(folder, "output")?;
            Ok(Pair { inputs: typed(inputs, &graph.input)?, outputs: typed(outputs, &graph.output)? })
        })
        .collect()
}

/// Old versions of the package write `bf16` as `u16`, for lack of a type in NumPy.
fn typed(tensors: Vec<Tensor>, declared: &[ValueInfoProto]) -> Result<Vec<Tensor>> {
    let mut declared = declared.iter();
    let typed = |tensor: Tensor| {
        let declared = declared.next().is_some_and(|value| element_type(value) == Some(BFLOAT16));
        if !declared || tensor.dtype() != DType::U16 {
            return Ok(tensor);
        }
        let bytes = tensor.data().to_le_bytes();
        Ok(Tensor::from_le_bytes(DType::BF16, tensor.shape().to_vec(), &bytes)?)
    };
    tensors.into_iter().map(typed).collect()
}

fn element_type(value: &ValueInfoProto) -> Option<i32> {
    match value.r#type.as_ref()?.value.as_ref()? {
        TypeValue::Tensor(tensor) => Some(tensor.elem_type),
        _ => None,
    }
}

fn numbered(folder: &Path, what: &str) -> Result<Vec<Tensor>> {
    files(folder, what)
        .map(|path| {
            let bytes = fs::read(&path)?;
            let (_, tensor) = read_tensor(&bytes).map_err(|fault| anyhow::anyhow!("{}", fault.message))?;
            Ok(tensor)
        })
        .collect()
}

/// `what_0.pb`, `what_1.pb`, … as far as they go.
fn files(folder: &Path, what: &str) -> impl Iterator<Item = PathBuf> {
    (0..).map(move |i| folder.join(format!("{what}_{i}.pb"))).take_while(|path| path.is_file())
}

/// Light models take `0/n, 1/n, …` in their only input.
fn light_pair(test: &Test, proto: &ModelProto) -> Result<Pair> {
    let graph = proto.graph.as_ref().context("no graph")?;
    let mut inputs = Vec::new();
    for input in &graph.input {
        if graph.initializer.iter().all(|i| i.name != input.name) {
            let shape = shape(input).context("an input without shape")?;
            let count: usize = shape.iter().product();
            let values = (0..count).map(|i| (i as f64 / count as f64) as f32).collect();
            inputs.push(Tensor::from_vec(shape, values)?);
        }
    }
    let mut outputs = Vec::new();
    for index in 0..graph.output.len() {
        let bytes = fs::read(test.light_output(index))?;
        outputs.push(read_tensor(&bytes).map_err(|fault| anyhow::anyhow!("{}", fault.message))?.1);
    }
    Ok(Pair { inputs, outputs })
}

/// The declared shape; dims without a number are 1.
fn shape(input: &ValueInfoProto) -> Option<Vec<usize>> {
    let Some(TypeValue::Tensor(tensor)) = input.r#type.as_ref()?.value.as_ref() else { return None };
    let dims = &tensor.shape.as_ref()?.dim;
    dims.iter()
        .map(|dim| match dim.value {
            Some(DimensionValue::Value(value)) => usize::try_from(value).ok(),
            Some(DimensionValue::Param(_)) | None => Some(1),
        })
        .collect()
}

/// The model with all inputs but the first as initializers; `None` if it has one input only or values other than
/// tensors.
pub(crate) fn constantified(test: &Test, proto: &ModelProto) -> Result<Option<ModelProto>> {
    let mut proto = proto.clone();
    let Some(graph) = &mut proto.graph else { bail!("no graph") };
    let [folder] = test.data.as_slice() else { return Ok(None) };
    let is_tensor = |input: &ValueInfoProto| {
        matches!(input.r#type.as_ref().and_then(|t| t.value.as_ref()), Some(TypeValue::Tensor(_)))
    };
    let given: Vec<PathBuf> = files(folder, "input").collect();
    if given.len() < 2 || given.len() != graph.input.len() || !graph.input.iter().all(is_tensor) {
        return Ok(None);
    }
    for (input, path) in graph.input.drain(1..).zip(given.iter().skip(1)) {
        let mut tensor = TensorProto::decode(fs::read(path)?.as_slice())?;
        if element_type(&input) == Some(BFLOAT16) {
            tensor.data_type = BFLOAT16;
        }
        tensor.name = input.name;
        graph.initializer.push(tensor);
    }
    proto.ir_version = proto.ir_version.map(|version| version.max(FREE_INITIALIZERS));
    Ok(Some(proto))
}
