//! Rank programs: what one rank executes, as a value.
//!
//! A program holds one local graph per entry (the authority on what is computed), for every value of it the logical
//! type and layout of the family it belongs to, and a [`Lowering`] that says in which regions a CPU executes the graph.
//! Weights are named tensors of the rank's shard file. Everything here is pure data; [`RankProgram::encode`] and
//! [`RankProgram::decode`] carry it in a [`container`](crate::container).

mod codec;
pub mod device;
mod fused;
mod lines;
mod lowering;
mod memory;

pub use codec::{PART_PROGRAM, ProgramError, graph_part};
pub use device::{DeviceCode, DeviceError, DeviceLowering};
pub use fused::{MAX_ROW, Pass, Space};
pub use lowering::{Kernel, Lowering, LoweringError, Region, Stage, lower, lower_keeping};
pub use memory::{Buffer, MemoryPlan, PlanError, plan_known};

use crate::dtype::DType;
use crate::graph::{Graph, SymbolRange, Type, ValueId};
use crate::layout::{Layout, Mesh};
use crate::op::Op;
use crate::spmd::{InstantiateError, Spmd, instantiate};
use crate::weight::WeightExpr;
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// The version of the program's own tables, written by [`RankProgram::encode`].
pub const FORMAT_VERSION: u32 = 1;
/// The oldest version [`RankProgram::decode`] accepts: the one before [`FORMAT_VERSION`], once there is one.
pub const OLDEST_FORMAT_VERSION: u32 = if FORMAT_VERSION > 1 { FORMAT_VERSION - 1 } else { 1 };

/// How reproducible results are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Determinism {
    /// Equal within a tolerance.
    #[default]
    Fast,
    /// Bit-stable for one plan on one machine.
    Run,
    /// Bit-equal for every number of ranks.
    Tp,
}

impl Determinism {
    pub const ALL: [Determinism; 3] = [Determinism::Fast, Determinism::Run, Determinism::Tp];

    pub fn name(self) -> &'static str {
        match self {
            Determinism::Fast => "fast",
            Determinism::Run => "run",
            Determinism::Tp => "tp",
        }
    }
}

impl fmt::Display for Determinism {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Determinism {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Determinism::ALL
            .into_iter()
            .find(|d| d.name() == text)
            .ok_or_else(|| format!("`{text}` is not a level of determinism"))
    }
}

/// What one rank executes.
#[derive(Clone, Debug, PartialEq)]
pub struct RankProgram {
    pub rank: usize,
    pub mesh: Mesh,
    pub determinism: Determinism,
    /// Tried in order; the first whose cases hold the values and whose ranges hold the dims of the inputs runs.
    pub entries: Vec<Entry>,
    /// Past inputs and the present outputs that succeed them, the same in all entries.
    pub states: Vec<StateSpec>,
    /// The tensors of this rank's weight file, in the order of the file.
    pub weights: Vec<WeightTensor>,
    /// Kernels for a GPU, if the program is for one.
    pub device: Option<DeviceCode>,
    /// Hash of model bytes, slices and types: equal on all ranks and in every weight file that fits.
    pub weights_hash: String,
    /// Hash of the whole plan, equal on all ranks.
    pub program_hash: String,
}

/// A graph for one range of dims.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    pub name: String,
    pub ranges: BTreeMap<Arc<str>, SymbolRange>,
    /// What this rank computes; value `i` is step `i` of the SPMD program.
    pub graph: Graph,
    /// For every value of the graph, what the ranks' values stand for together.
    pub families: Vec<Family>,
    pub inputs: Vec<Port>,
    pub outputs: Vec<Port>,
    pub lowering: Lowering,
    /// How a GPU executes the graph, if the program is for one.
    pub device: Option<DeviceLowering>,
}

/// The logical value that the ranks' local values stand for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Family {
    pub ty: Type,
    pub layout: Layout,
}

/// A named input or output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    pub name: Arc<str>,
    /// The logical type.
    pub ty: Type,
    pub layout: Layout,
    /// An output that stays on its ranks instead of being gathered to rank 0.
    pub keep_sharded: bool,
}

/// A pair of past input and present output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateSpec {
    pub input: Arc<str>,
    pub output: Arc<str>,
    /// The dim that grows.
    pub axis: usize,
    /// The dim whose entries are independent slots, if the model has one.
    pub slot_axis: Option<usize>,
    /// The logical type of the past input.
    pub ty: Type,
    pub layout: Layout,
}

/// A tensor of the rank's weight file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightTensor {
    /// What the nodes of the graphs say.
    pub expr: WeightExpr,
    /// Its name in the weight file.
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<usize>,
}

impl Entry {
    /// The entry that `rank` executes for `program`, with a CPU lowering. All ranges are those of the graph's symbols,
    /// and all outputs are gathered.
    ///
    /// # Errors
    /// A step without a local form; a verified program has none.
    pub fn from_spmd(program: &Spmd, rank: usize, name: &str) -> Result<Entry, InstantiateError> {
        let graph = instantiate(program, rank)?;
        let families: Vec<Family> = program
            .steps
            .iter()
            .map(|s| Family { ty: program.logical.ty(s.value).clone(), layout: s.layout.clone() })
            .collect();
        let port = |name: &Arc<str>, value: ValueId| Port {
            name: name.clone(),
            ty: families[value.index()].ty.clone(),
            layout: families[value.index()].layout.clone(),
            keep_sharded: false,
        };
        let mut inputs: Vec<Port> = Vec::new();
        for (value, name, _) in graph.inputs() {
            if inputs.iter().all(|p| p.name != *name) {
                inputs.push(port(name, value));
            }
        }
        // What chooses the entry is given like any input, though no step reads it.
        inputs.extend(graph.cases.iter().map(|case| Port {
            name: case.input.clone(),
            ty: case.ty.clone(),
            layout: Layout::replicated(&program.mesh),
            keep_sharded: false,
        }));
        let outputs = graph.outputs.iter().map(|o| port(&o.name, o.value)).collect();
        let lowering = lower(&graph);
        let ranges = graph.symbols.clone();
        Ok(Entry { name: name.into(), ranges, graph, families, inputs, outputs, lowering, device: None })
    }

    /// The state pairs of this entry.
    pub fn states(&self) -> Vec<StateSpec> {
        let port = |name: &Arc<str>| self.inputs.iter().find(|p| p.name == *name);
        self.graph
            .states
            .iter()
            .filter_map(|pair| {
                let past = port(&pair.input)?;
                Some(StateSpec {
                    input: pair.input.clone(),
                    output: pair.output.clone(),
                    axis: pair.axis,
                    slot_axis: (pair.axis != 0).then_some(0),
                    ty: past.ty.clone(),
                    layout: past.layout.clone(),
                })
            })
            .collect()
    }
}

impl RankProgram {
    /// A program of one entry for tests and tools: weights are named by their position, both hashes are empty.
    ///
    /// # Errors
    /// As [`Entry::from_spmd`].
    pub fn from_spmd(program: &Spmd, rank: usize) -> Result<RankProgram, InstantiateError> {
        let entry = Entry::from_spmd(program, rank, "main")?;
        let mut weights: Vec<WeightTensor> = Vec::new();
        for node in entry.graph.nodes() {
            if let Op::Weight(expr) = &node.op
                && weights.iter().all(|w| w.expr != *expr)
            {
                let name = format!("w{}", weights.len());
                let (dtype, shape) = (expr.dtype(), expr.shape().to_vec());
                weights.push(WeightTensor { expr: expr.clone(), name, dtype, shape });
            }
        }
        Ok(RankProgram {
            rank,
            mesh: program.mesh.clone(),
            determinism: Determinism::Fast,
            states: entry.states(),
            entries: vec![entry],
            weights,
            device: None,
            weights_hash: String::new(),
            program_hash: String::new(),
        })
    }

    /// The tensor of the weight file that `expr` names.
    pub fn weight(&self, expr: &WeightExpr) -> Option<&WeightTensor> {
        self.weights.iter().find(|w| w.expr == *expr)
    }
}
