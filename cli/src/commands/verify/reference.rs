//! One rank running the model: the reference interpreter on the imported graph.

use crate::failure::{Failure, Kind, Outcome};
use std::collections::BTreeMap;
use std::sync::Arc;
use tpshard_frontend::Imported;
use tpshard_frontend::deferred::OnnxEvaluator;
use tpshard_ir::interp::{InterpError, OpError, run_tensors_with};
use tpshard_ir::{Graph, Tensor};
use tpshard_runtime::io::NamedTensors;

/// Most elements that the reference interpreter may hold.
pub(super) const LIMIT: usize = 1 << 30;

/// The outputs of `graph`, whose weights are the initializers of `imported`.
pub(super) fn evaluate(imported: &Imported, graph: &Graph, inputs: &NamedTensors) -> Outcome<NamedTensors> {
    let inputs: BTreeMap<Arc<str>, Tensor> =
        inputs.iter().map(|(name, t)| (Arc::from(name.as_str()), t.clone())).collect();
    let initializer = |name: &str| -> Result<Tensor, OpError> {
        let missing = |what: String| OpError::Other(what);
        let tensor = imported.tensors.get(name).ok_or_else(|| missing(format!("no initializer `{name}`")))?;
        imported.model.storage.to_tensor(tensor).map_err(|e| missing(e.to_string()))
    };
    let evaluator = OnnxEvaluator::default();
    let outputs = run_tensors_with(graph, &inputs, &initializer, LIMIT, Some(&evaluator));
    let outputs = outputs.map_err(|error| failure(&error))?;
    Ok(outputs.into_iter().map(|(name, t)| (name.to_string(), t)).collect())
}

/// What cannot be held is a matter of resources, what cannot be computed from these inputs one of usage.
fn failure(error: &InterpError) -> Failure {
    let by_operation = |error: &OpError| match error {
        OpError::Limit { .. } | OpError::TooLarge => Kind::Resource,
        OpError::Infer(_) => Kind::Internal,
        OpError::Eval(_) | OpError::Other(_) => Kind::Usage,
    };
    let kind = match error {
        InterpError::Node { error, .. }
        | InterpError::Encode { error, .. }
        | InterpError::Decode { error, .. } => by_operation(error),
        InterpError::MissingInput { .. }
        | InterpError::InputType { .. }
        | InterpError::Conflict { .. }
        | InterpError::Range { .. }
        | InterpError::Guard { .. } => Kind::Usage,
        InterpError::MissingOutput { .. }
        | InterpError::Ranks(_)
        | InterpError::Verify(_)
        | InterpError::Instantiate(_) => Kind::Internal,
    };
    Failure::new(kind, format!("one rank running the model: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tpshard_ir::{DType, Dim, Op, Type};

    /// Runs `broadcast(x)` to `rows` rows of a million.
    fn stretched(rows: i64, given: Vec<f32>) -> Failure {
        let mut graph = Graph::new("");
        let x = graph.input("x", Type::new(DType::F32, vec![Dim::constant(1), Dim::constant(2)]));
        let shape = vec![Dim::constant(rows), Dim::constant(2)];
        let y = graph.add(Op::Broadcast { shape }, &[x]).unwrap();
        graph.outputs.push(tpshard_ir::Output { name: "y".into(), value: y });
        let x = Tensor::from_vec(vec![1, given.len()], given).unwrap();
        let none = |_: &str| Err(OpError::Other("none".into()));
        let error =
            tpshard_ir::interp::run_tensors(&graph, &[("x".into(), x)].into(), &none, LIMIT).unwrap_err();
        failure(&error)
    }

    #[test]
    fn too_much_is_a_matter_of_resources_and_wrong_inputs_are_not() {
        assert_eq!(stretched(1 << 40, vec![1.0, 2.0]).kind, Kind::Resource);
        assert_eq!(stretched(1, vec![1.0]).kind, Kind::Usage);
    }
}
