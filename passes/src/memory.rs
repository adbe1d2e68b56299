//! What every rank holds of a plan. Deals need not be even, so ranks may hold different amounts; rank 0 never holds
//! less than another.

use crate::cost::price::{complete, extents};
use crate::plan::Plan;
use std::collections::{BTreeMap, BTreeSet};
use tpshard_ir::program::lower;
use tpshard_ir::spmd::instantiate;
use tpshard_ir::{AxisLayout, Bindings, DType, Graph, Layout, Mesh, Op, Spmd, Step, StepKind, Type, ValueId};

/// Most steps that are lowered to learn what the buffers of ranks unlike rank 0 take.
const LOWERED: usize = 200_000;

/// Bytes of one rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RankMemory {
    pub weights: u64,
    pub state: u64,
    /// The buffers of a step, the most over all entries.
    pub activations: u64,
}

impl RankMemory {
    pub fn total(&self) -> u64 {
        self.weights.saturating_add(self.state).saturating_add(self.activations)
    }
}

/// A tensor of known size and how it is dealt out on every mesh axis: dim and unit.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Dealt {
    bits: usize,
    extents: Vec<u64>,
    deals: Vec<Option<(usize, u64)>>,
}

impl Dealt {
    fn new(graph: &Graph, ty: &Type, layout: &Layout, sizes: &Bindings) -> Dealt {
        let deal = |part: &AxisLayout| match part {
            AxisLayout::Shard { dim, unit } => {
                let unit = unit.eval(sizes).ok().and_then(|u| u64::try_from(u).ok()).unwrap_or(1);
                Some((*dim, unit.max(1)))
            }
            AxisLayout::Replicated | AxisLayout::Partial(_) => None,
        };
        Dealt {
            bits: ty.dtype.bits(),
            extents: extents(graph, ty, sizes),
            deals: layout.0.iter().map(deal).collect(),
        }
    }

    fn bytes(&self, mesh: &Mesh, coordinates: &[usize]) -> u64 {
        let mut local = self.extents.clone();
        for ((deal, &ranks), &at) in self.deals.iter().zip(&mesh.0).zip(coordinates) {
            if let Some((dim, unit)) = deal
                && let Some(extent) = local.get_mut(*dim)
            {
                let (units, ranks) = (*extent / unit, ranks.max(1) as u64);
                *extent = (units / ranks + u64::from((at as u64) < units % ranks)).saturating_mul(*unit);
            }
        }
        let bits = local.into_iter().fold(self.bits as u64, u64::saturating_mul);
        bits.div_ceil(8)
    }
}

/// A tensor that a plan keeps between steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Stored<'a> {
    pub(crate) value: ValueId,
    pub(crate) layout: &'a Layout,
    pub(crate) is_state: bool,
}

/// The weights and the state that `steps` read, each once however many entries share it.
pub(crate) fn stored<'a>(graph: &Graph, steps: impl Iterator<Item = &'a Step>) -> BTreeSet<Stored<'a>> {
    let of_step = |step: &'a Step| {
        let is_state = match &graph.node(step.value).op {
            Op::Weight(_) => false,
            Op::Input { name } if graph.states.iter().any(|s| s.input == *name) => true,
            _ => return None,
        };
        Some(Stored { value: step.value, layout: &step.layout, is_state })
    };
    steps.filter(|s| s.kind == StepKind::Compute).filter_map(of_step).collect()
}

/// A stored tensor under every entry.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Kind {
    is_state: bool,
    by_entry: Vec<Dealt>,
}

/// What ranks hold between steps, alike tensors together with their number.
pub(crate) struct Holdings(BTreeMap<Kind, u64>);

impl Holdings {
    /// `sizes` are the largest of every entry.
    pub(crate) fn of<'a>(
        graph: &Graph,
        steps: impl Iterator<Item = &'a Step>,
        sizes: &[Bindings],
    ) -> Holdings {
        let mut kinds: BTreeMap<Kind, u64> = BTreeMap::new();
        for Stored { value, layout, is_state } in stored(graph, steps) {
            let by_entry = sizes.iter().map(|s| Dealt::new(graph, graph.ty(value), layout, s)).collect();
            *kinds.entry(Kind { is_state, by_entry }).or_default() += 1;
        }
        Holdings(kinds)
    }

    /// Of one tensor of every kind, the most over all entries: whether it is state, its bytes on the rank at
    /// `coordinates`, and how many tensors are of that kind.
    pub(crate) fn on(&self, mesh: &Mesh, coordinates: &[usize]) -> impl Iterator<Item = (bool, u64, u64)> {
        self.0.iter().map(move |(kind, &count)| {
            let bytes = kind.by_entry.iter().map(|d| d.bytes(mesh, coordinates)).max().unwrap_or(0);
            (kind.is_state, bytes, count)
        })
    }
}

/// What each rank holds, rank 0 first.
pub fn rank_memory(plan: &Plan) -> Vec<RankMemory> {
    let mesh = &plan.report.mesh;
    let holdings = plan.programs.first().map(|(_, first)| {
        let sizes = plan.report.entries.iter().map(|e| complete(&first.logical, &e.entry.largest));
        let steps = plan.programs.iter().flat_map(|(_, program)| &program.steps);
        Holdings::of(&first.logical, steps, &sizes.collect::<Vec<_>>())
    });
    let buffers = buffers(plan);
    // The bytes of all kinds of buffers tell what the buffers of a rank take.
    let mut known: BTreeMap<Vec<u64>, u64> = BTreeMap::new();
    let steps: usize = plan.programs.iter().map(|(_, program)| program.steps.len()).sum();
    let mut left = LOWERED;
    let of_rank = |rank: usize| {
        let coordinates = mesh.coordinates(rank);
        let mut memory = RankMemory::default();
        for (is_state, bytes, count) in holdings.iter().flat_map(|h| h.on(mesh, &coordinates)) {
            let sum = if is_state { &mut memory.state } else { &mut memory.weights };
            *sum = sum.saturating_add(bytes.saturating_mul(count));
        }
        let sizes: Vec<u64> = buffers.iter().map(|b| b.bytes(mesh, &coordinates)).collect();
        memory.activations = *known.entry(sizes).or_insert_with(|| {
            let afford = rank > 0 && left >= steps;
            left -= if afford { steps } else { 0 };
            afford.then(|| activations(plan, rank)).flatten().unwrap_or(plan.report.activation_bytes)
        });
        memory
    };
    (0..mesh.ranks()).map(of_rank).collect()
}

/// Every kind of tensor that steps make.
fn buffers(plan: &Plan) -> BTreeSet<Dealt> {
    let mut shapes: BTreeSet<(usize, DType, &[tpshard_ir::Dim], &Layout)> = BTreeSet::new();
    let mut kinds = BTreeSet::new();
    for (index, ((_, program), entry)) in plan.programs.iter().zip(&plan.report.entries).enumerate() {
        let sizes = complete(&program.logical, &entry.entry.largest);
        for step in &program.steps {
            let ty = program.logical.ty(step.value);
            if shapes.insert((index, ty.dtype, &ty.shape, &step.layout)) {
                kinds.insert(Dealt::new(&program.logical, ty, &step.layout, &sizes));
            }
        }
    }
    kinds
}

/// What the buffers of `rank` take, the most over all entries.
fn activations(plan: &Plan, rank: usize) -> Option<u64> {
    let of_entry = |((_, program), entry): (&(String, Spmd), &crate::report::EntryReport)| {
        let local = instantiate(program, rank).ok()?;
        let sizes = complete(&program.logical, &entry.entry.largest);
        Some(lower(&local).plan(&local, &sizes).ok()?.bytes)
    };
    plan.programs.iter().zip(&plan.report.entries).map(of_entry).try_fold(0, |most, b| Some(most.max(b?)))
}
