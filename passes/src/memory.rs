//! What every rank holds of a plan. Deals need not be even, so ranks may hold different amounts; rank 0 never holds
//! less than another.

use crate::cost::price::{complete, extents};
use crate::plan::Plan;
use std::collections::{BTreeMap, BTreeSet};
use tpshard_ir::program::lower;
use tpshard_ir::spmd::instantiate;
use tpshard_ir::{AxisLayout, DType, Layout, Mesh, Op, Spmd, StepKind, Type, ValueId};

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
    fn new(program: &Spmd, ty: &Type, layout: &Layout, sizes: &tpshard_ir::Bindings) -> Dealt {
        let deal = |part: &AxisLayout| match part {
            AxisLayout::Shard { dim, unit } => {
                let unit = unit.eval(sizes).ok().and_then(|u| u64::try_from(u).ok()).unwrap_or(1);
                Some((*dim, unit.max(1)))
            }
            AxisLayout::Replicated | AxisLayout::Partial(_) => None,
        };
        Dealt {
            bits: ty.dtype.bits(),
            extents: extents(&program.logical, ty, sizes),
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

/// A stored tensor under every entry.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Stored {
    is_state: bool,
    by_entry: Vec<Dealt>,
}

/// What each rank holds, rank 0 first.
pub fn rank_memory(plan: &Plan) -> Vec<RankMemory> {
    let mesh = &plan.report.mesh;
    let kinds = stored(plan);
    let buffers = buffers(plan);
    // The bytes of all kinds of buffers tell what the buffers of a rank take.
    let mut known: BTreeMap<Vec<u64>, u64> = BTreeMap::new();
    let steps: usize = plan.programs.iter().map(|(_, program)| program.steps.len()).sum();
    let mut left = LOWERED;
    let of_rank = |rank: usize| {
        let coordinates = mesh.coordinates(rank);
        let mut memory = RankMemory::default();
        for (kind, count) in &kinds {
            let bytes = kind.by_entry.iter().map(|d| d.bytes(mesh, &coordinates)).max().unwrap_or(0);
            let sum = if kind.is_state { &mut memory.state } else { &mut memory.weights };
            *sum = sum.saturating_add(bytes.saturating_mul(*count));
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

/// What is stored, alike tensors together with their number.
fn stored(plan: &Plan) -> BTreeMap<Stored, u64> {
    let mut seen: BTreeSet<(ValueId, &Layout)> = BTreeSet::new();
    let mut kinds: BTreeMap<Stored, u64> = BTreeMap::new();
    for (_, program) in &plan.programs {
        for step in program.steps.iter().filter(|s| s.kind == StepKind::Compute) {
            let node = program.logical.node(step.value);
            let is_state = match &node.op {
                Op::Weight(_) => false,
                Op::Input { name } if program.logical.states.iter().any(|s| s.input == *name) => true,
                _ => continue,
            };
            // Entries share what they store.
            if !seen.insert((step.value, &step.layout)) {
                continue;
            }
            let dealt = |entry: &crate::report::EntryReport| {
                let sizes = complete(&program.logical, &entry.entry.largest);
                Dealt::new(program, &node.ty, &step.layout, &sizes)
            };
            let by_entry = plan.report.entries.iter().map(dealt).collect();
            *kinds.entry(Stored { is_state, by_entry }).or_default() += 1;
        }
    }
    kinds
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
                kinds.insert(Dealt::new(program, ty, &step.layout, &sizes));
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
