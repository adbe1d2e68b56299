//! Checks the sharding annotations that models carry since IR version 11.
//!
//! They are suggestions by the author about devices and splits. A wrong one says that the file is not what it seems,
//! so it is refused rather than ignored.

use crate::error::{Fault, Faults, quote};
use crate::model::{Graph, Model, Node, ValueType};
use crate::proto::{DimensionValue, ShardingSpecProto};
use std::collections::{BTreeMap, BTreeSet};

const HELP: &str = "correct the annotation, or remove the device configurations from the model";

/// Checks all annotations of a model against its device configurations.
pub(crate) fn check(model: &Model, faults: &mut Faults) {
    let mut devices = BTreeMap::new();
    for configuration in &model.device_configurations {
        let count = i64::from(configuration.num_devices);
        if devices.insert(configuration.name.as_str(), count).is_some() {
            let message = format!("the device configuration {} is defined twice", quote(&configuration.name));
            faults.push(Fault::invalid(message, HELP));
        }
        let named = configuration.device.len();
        if count <= 0 || (named > 0 && named as i64 != count) {
            let message = format!(
                "the device configuration {} has {count} devices and names {named}",
                quote(&configuration.name)
            );
            faults.push(Fault::invalid(message, HELP));
        }
    }
    check_graph(&model.graph, &devices, faults);
}

/// Recurses over the nesting of graphs only, which loading bounds.
fn check_graph(graph: &Graph, devices: &BTreeMap<&str, i64>, faults: &mut Faults) {
    for node in &graph.nodes {
        for configuration in &node.device_configurations {
            let mut refuse = |message: String, value: &str| {
                faults.push(Fault::invalid(message, HELP).at_value(value).at_node(node.site()));
            };
            let id = &configuration.configuration_id;
            let Some(&count) = devices.get(id.as_str()) else {
                refuse(format!("the device configuration {} is not defined", quote(id)), id);
                continue;
            };
            for spec in &configuration.sharding_spec {
                if let Err(message) = check_spec(spec, node, graph, count) {
                    refuse(message, &spec.tensor_name);
                }
            }
        }
        for subgraph in node.subgraphs() {
            check_graph(subgraph, devices, faults);
        }
    }
}

fn check_spec(spec: &ShardingSpecProto, node: &Node, graph: &Graph, count: i64) -> Result<(), String> {
    let name = &spec.tensor_name;
    if name.is_empty() || !node.inputs.iter().chain(&node.outputs).any(|value| value == name) {
        return Err("the sharding names a tensor that the node neither takes nor makes".into());
    }
    let groups: BTreeSet<i64> = spec.index_to_device_group_map.iter().map(|entry| entry.key).collect();
    let mut seen = BTreeSet::new();
    for &device in &spec.device {
        if !seen.insert(device) {
            return Err(format!("the sharding names device {device} twice"));
        }
        // A negative number, or one with an entry in the map, stands for a group.
        if !groups.contains(&device) && !(0..count).contains(&device) {
            return Err(format!("the sharding names device {device} of {count}"));
        }
    }
    let members = spec.index_to_device_group_map.iter().flat_map(|entry| &entry.value);
    if let Some(device) = members.copied().find(|device| !(0..count).contains(device)) {
        return Err(format!("a device group names device {device} of {count}"));
    }
    let shape = known_shape(graph, name);
    for sharded in &spec.sharded_dim {
        if let Some(rank) = shape.map(|rank| rank as i64)
            && !(-rank..rank).contains(&sharded.axis)
        {
            return Err(format!("the sharding splits axis {} of a tensor of rank {rank}", sharded.axis));
        }
        for split in &sharded.simple_sharding {
            if split.num_shards <= 0 {
                return Err(format!(
                    "the sharding splits axis {} into {} shards",
                    sharded.axis, split.num_shards
                ));
            }
            if matches!(split.dim, Some(DimensionValue::Value(size)) if size < 0) {
                return Err(format!("the sharding gives axis {} a negative size", sharded.axis));
            }
        }
    }
    Ok(())
}

/// The rank of a value where the file states it.
fn known_shape(graph: &Graph, name: &str) -> Option<usize> {
    if let Some(tensor) = graph.initializers.get(name) {
        return Some(tensor.dims.len());
    }
    let declared = graph.value_types.get(name).or_else(|| {
        let info = graph.inputs.iter().chain(&graph.outputs).find(|info| info.name == name)?;
        info.value_type.as_ref()
    })?;
    match declared {
        ValueType::Tensor(tensor) => tensor.shape.as_ref().map(Vec::len),
        ValueType::Other(_) => None,
    }
}
