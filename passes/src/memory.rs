//! What every rank holds of a plan. Deals need not be even, so ranks may hold different amounts; rank 0 never holds
//! less than another.

use crate::cost::price::{complete, extents};
use crate::layout_graph::StoredName;
use crate::plan::Plan;
use crate::report::EntryReport;
use std::collections::{BTreeMap, BTreeSet};
use tpshard_ir::program::lower;
use tpshard_ir::spmd::instantiate;
use tpshard_ir::{AxisLayout, Bindings, DType, Graph, Layout, Mesh, Spmd, Step, StepKind, Type, ValueId};

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
pub(crate) struct Dealt {
    bits: usize,
    extents: Vec<u64>,
    deals: Vec<Option<(usize, u64)>>,
}

impl Dealt {
    pub(crate) fn new(graph: &Graph, ty: &Type, layout: &Layout, sizes: &Bindings) -> Dealt {
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

    pub(crate) fn bytes(&self, mesh: &Mesh, coordinates: &[usize]) -> u64 {
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

/// Weights and state that lie in memory between steps, each in every layout in which it does, with a value that it is.
pub(crate) type Stored<'a> = BTreeMap<(StoredName, &'a Layout), ValueId>;

/// The weights and the state that `steps` read, each once however many entries share it.
pub(crate) fn stored<'a>(graph: &Graph, steps: impl Iterator<Item = &'a Step>) -> Stored<'a> {
    let mut stored = Stored::new();
    for step in steps.filter(|s| s.kind == StepKind::Compute) {
        if let Some(name) = StoredName::of(graph, step.value) {
            stored.entry((name, &step.layout)).or_insert(step.value);
        }
    }
    stored
}

/// Steps of one graph, and the sizes under which they run.
pub(crate) struct Part<'a> {
    pub(crate) graph: &'a Graph,
    pub(crate) steps: Vec<&'a Step>,
    /// The largest of every entry.
    pub(crate) sizes: Vec<Bindings>,
}

impl<'a> Part<'a> {
    /// A part for every program of a plan.
    pub(crate) fn of_programs(programs: &'a [(String, Spmd)], entries: &[EntryReport]) -> Vec<Part<'a>> {
        let part = |((_, program), found): (&'a (String, Spmd), &EntryReport)| Part {
            graph: &program.logical,
            steps: program.steps.iter().collect(),
            sizes: vec![complete(&program.logical, &found.entry.largest)],
        };
        programs.iter().zip(entries).map(part).collect()
    }
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
    /// What several parts read lies there once.
    pub(crate) fn of(parts: &[Part<'_>]) -> Holdings {
        let mut all: BTreeMap<(StoredName, &Layout), Vec<Dealt>> = BTreeMap::new();
        for Part { graph, steps, sizes } in parts {
            for ((name, layout), value) in stored(graph, steps.iter().copied()) {
                let by_entry = sizes.iter().map(|s| Dealt::new(graph, graph.ty(value), layout, s));
                all.entry((name, layout)).or_default().extend(by_entry);
            }
        }
        let mut kinds: BTreeMap<Kind, u64> = BTreeMap::new();
        for ((name, _), by_entry) in all {
            let is_state = matches!(name, StoredName::State(_));
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
    let holdings = Holdings::of(&Part::of_programs(&plan.programs, &plan.report.entries));
    let buffers = buffers(plan);
    // The bytes of all kinds of buffers tell what the buffers of a rank take.
    let mut known: BTreeMap<Vec<u64>, u64> = BTreeMap::new();
    let steps: usize = plan.programs.iter().map(|(_, program)| program.steps.len()).sum();
    let mut left = LOWERED;
    let of_rank = |rank: usize| {
        let coordinates = mesh.coordinates(rank);
        let mut memory = RankMemory::default();
        for (is_state, bytes, count) in holdings.on(mesh, &coordinates) {
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
    let of_entry = |((_, program), entry): (&(String, Spmd), &EntryReport)| {
        let local = instantiate(program, rank).ok()?;
        let sizes = complete(&program.logical, &entry.entry.largest);
        Some(lower(&local).plan(&local, &sizes).ok()?.bytes)
    };
    plan.programs.iter().zip(&plan.report.entries).map(of_entry).try_fold(0, |most, b| Some(most.max(b?)))
}
