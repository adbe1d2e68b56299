//! The sharding annotations that models carry since IR version 11.
//!
//! They are suggestions by the author about devices and splits. A wrong one says that the file is not what it seems,
//! so it is refused rather than ignored. [`annotations`] reads the right ones: an annotation that splits one axis over
//! all devices in their order, or puts the whole tensor on all of them, is a [`Sharding`]; any other says what it asks
//! for instead.

use crate::error::{Fault, Faults, NodeSite, quote};
use crate::model::{Graph, Model, Node, ValueType};
use crate::proto::{DimensionValue, ShardedDimProto, ShardingSpecProto};
use std::collections::{BTreeMap, BTreeSet};

const HELP: &str = "correct the annotation, or remove the device configurations from the model";

/// How a tensor lies on all devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharding {
    /// Every device holds the whole.
    Whole,
    /// The devices hold consecutive parts of this axis, which counts from the end if it is negative.
    Split { axis: i64 },
}

/// One tensor at one node under one device configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Annotation {
    pub configuration: String,
    /// The devices of the configuration.
    pub devices: i64,
    pub node: NodeSite,
    pub tensor: String,
    /// What is asked for, or why it is none of the shardings there are here.
    pub sharding: Result<Sharding, String>,
}

/// The annotations of a model in the order of its nodes, those of nested graphs after their node's.
pub fn annotations(model: &Model) -> Vec<Annotation> {
    let count = |c: &crate::proto::DeviceConfigurationProto| (c.name.clone(), i64::from(c.num_devices));
    let devices: BTreeMap<String, i64> = model.device_configurations.iter().map(count).collect();
    let mut found = Vec::new();
    if !devices.is_empty() {
        read_graph(&model.graph, &devices, &mut found);
    }
    found
}

/// The pipeline stages that nodes are put into, in any configuration.
pub fn pipeline_stages(model: &Model) -> BTreeSet<i32> {
    let mut stages = BTreeSet::new();
    read_stages(&model.graph, &mut stages);
    stages
}

fn read_stages(graph: &Graph, stages: &mut BTreeSet<i32>) {
    for node in &graph.nodes {
        stages.extend(node.device_configurations.iter().filter_map(|c| c.pipeline_stage));
        node.subgraphs().for_each(|subgraph| read_stages(subgraph, stages));
    }
}

/// Recurses over the nesting of graphs only, which loading bounds.
fn read_graph(graph: &Graph, devices: &BTreeMap<String, i64>, found: &mut Vec<Annotation>) {
    for node in &graph.nodes {
        for configuration in &node.device_configurations {
            let Some(&count) = devices.get(&configuration.configuration_id) else { continue };
            found.extend(configuration.sharding_spec.iter().map(|spec| Annotation {
                configuration: configuration.configuration_id.clone(),
                devices: count,
                node: node.site(),
                tensor: spec.tensor_name.clone(),
                sharding: sharding(spec, count),
            }));
        }
        node.subgraphs().for_each(|subgraph| read_graph(subgraph, devices, found));
    }
}

/// What a specification asks of `count` devices.
fn sharding(spec: &ShardingSpecProto, count: i64) -> Result<Sharding, String> {
    let split: Vec<(&ShardedDimProto, i64)> = spec
        .sharded_dim
        .iter()
        .map(|dim| (dim, dim.simple_sharding.iter().map(|s| s.num_shards).fold(1, i64::saturating_mul)))
        .filter(|&(_, shards)| shards != 1)
        .collect();
    match split.as_slice() {
        [] if spec.device.is_empty() || members(spec).len() as i64 == count => Ok(Sharding::Whole),
        [] => Err(format!("it is on {} of {count} devices", members(spec).len())),
        [(dim, shards)] if *shards == count => {
            // Of an axis that is several dims merged, the first is split.
            let first = dim.simple_sharding.first().is_some_and(|s| s.num_shards == count);
            let in_order = spec.device.is_empty() || spec.device.iter().copied().eq(0..count);
            match (first, in_order && spec.index_to_device_group_map.is_empty()) {
                (false, _) => Err(format!("axis {} is split inside, not into consecutive parts", dim.axis)),
                (true, false) => Err(format!("axis {} is dealt to devices in another order", dim.axis)),
                (true, true) => Ok(Sharding::Split { axis: dim.axis }),
            }
        }
        [(dim, shards)] => Err(format!("axis {} is split into {shards} parts for {count} devices", dim.axis)),
        several => {
            let axes: Vec<String> = several.iter().map(|(dim, _)| dim.axis.to_string()).collect();
            Err(format!("axes {} are split at once", axes.join(", ")))
        }
    }
}

/// The devices that a specification names, alone or in groups.
fn members(spec: &ShardingSpecProto) -> BTreeSet<i64> {
    let groups: BTreeMap<i64, &Vec<i64>> =
        spec.index_to_device_group_map.iter().map(|entry| (entry.key, &entry.value)).collect();
    let of = |device: &i64| groups.get(device).map_or_else(|| vec![*device], |group| (*group).clone());
    spec.device.iter().flat_map(of).collect()
}

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
