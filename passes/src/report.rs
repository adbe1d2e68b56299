//! The plan for people: what is split how, which collectives run, where the time goes.
//!
//! Everything in it follows from the program and the prices, so equal builds print equal text.

use crate::cost::price::Entry;
use crate::cost::{Cost, Parts, Pricer};
use crate::extract::Extraction;
use crate::layout_graph::LayoutGraph;
use crate::plan::PlanOptions;
use std::collections::BTreeMap;
use std::fmt::{self, Write};
use tpshard_ir::op::Op;
use tpshard_ir::weight::WeightExpr;
use tpshard_ir::{Graph, Layout, Mesh, SpmdOutput, Step, StepId, StepKind};

/// Whether to shard at all, as far as time goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// There is one rank.
    OneRank,
    /// The ranks are faster than one would be.
    Faster,
    /// One rank would be as fast, and the model fits it.
    DoNotShard,
    /// One rank would be as fast, but the model does not fit it.
    ForMemory,
}

/// A collective of the program.
#[derive(Clone, Debug, PartialEq)]
pub struct Collective {
    pub step: StepId,
    pub kind: &'static str,
    /// What is exchanged, by the name of the ONNX node it came from.
    pub origin: String,
    pub ranks: usize,
    /// Bytes per rank, one number per entry: of an all-reduce the tensor, of an all-gather and an all-to-all what is
    /// received, of a reduce-scatter what is sent.
    pub payload: Vec<u64>,
    pub seconds: Vec<f64>,
}

/// Stored tensors that are alike: the same place in different layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredKind {
    /// The name with numbers left open.
    pub name: String,
    pub is_state: bool,
    pub shape: String,
    pub layout: Layout,
    pub count: usize,
    /// Of all of them, on rank 0.
    pub bytes: u64,
}

/// The time of one entry.
#[derive(Clone, Debug, PartialEq)]
pub struct EntryTime {
    pub entry: Entry,
    pub parts: Parts,
}

/// What a plan is and what it is predicted to cost.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanReport {
    pub profile: String,
    pub mesh: Mesh,
    pub times: Vec<EntryTime>,
    /// Weighted over the entries, as the planner compares plans.
    pub seconds: f64,
    /// The same for one rank.
    pub seconds_alone: f64,
    pub verdict: Verdict,
    pub weight_bytes: u64,
    pub state_bytes: u64,
    /// Weights and state on one rank.
    pub bytes_alone: u64,
    pub budget: Option<u64>,
    pub least_bytes: u64,
    pub collectives: Vec<Collective>,
    pub stored: Vec<StoredKind>,
    pub outputs: Vec<(String, Layout)>,
    /// How far the plan may be above the optimum, as a share.
    pub gap: f64,
    pub segments: (usize, usize),
    /// True if some rank owns no part of a split tensor.
    pub idle_ranks: bool,
}

/// What the report needs besides the program.
pub(crate) struct Summary<'a> {
    pub(crate) extraction: &'a Extraction,
    pub(crate) layouts: &'a LayoutGraph,
    pub(crate) reserved: u64,
    pub(crate) alone: Cost,
    pub(crate) options: &'a PlanOptions,
}

pub(crate) fn report(
    graph: &Graph,
    steps: &[Step],
    outputs: &[SpmdOutput],
    pricer: &Pricer<'_>,
    summary: &Summary<'_>,
) -> PlanReport {
    let Summary { extraction, layouts, options, .. } = *summary;
    let mesh = &layouts.mesh;
    let mut times: Vec<EntryTime> =
        options.entries.iter().map(|e| EntryTime { entry: e.clone(), parts: Parts::default() }).collect();
    let mut collectives = Vec::new();
    let layout_of = |id: &StepId| steps.get(id.index()).map(|s| &s.layout);
    for (index, step) in steps.iter().enumerate() {
        let operands: Vec<&Layout> = step.args.iter().filter_map(layout_of).collect();
        match &step.kind {
            StepKind::Compute => {
                for (entry, time) in times.iter_mut().enumerate() {
                    let parts = pricer.compute_parts(step.value, &operands, &step.layout, mesh, entry);
                    time.parts.add(&parts, 1.0);
                }
            }
            StepKind::Convert(conversion) => {
                let Some(from) = operands.first() else { continue };
                let priced: Vec<(Parts, u64)> = (0..times.len())
                    .map(|e| pricer.convert_parts(step.value, conversion, from, &step.layout, mesh, e))
                    .collect();
                times.iter_mut().zip(&priced).for_each(|(t, (parts, _))| t.parts.add(parts, 1.0));
                if conversion.communicates() {
                    collectives.push(Collective {
                        step: StepId(index as u32),
                        kind: conversion.name(),
                        origin: graph.node(step.value).origin.to_string(),
                        ranks: conversion.axes().iter().filter_map(|&a| mesh.0.get(a)).product(),
                        payload: priced.iter().map(|p| p.1).collect(),
                        seconds: priced.iter().map(|p| p.0.communication).collect(),
                    });
                }
            }
        }
    }
    let stored = stored(graph, steps, pricer, mesh);
    let bytes = |state| stored.iter().filter(|s| s.is_state == state).map(|s| s.bytes).sum();
    let bytes_alone = layouts
        .groups
        .iter()
        .filter_map(|g| g.productions.first())
        .map(|p| p.bytes)
        .fold(summary.reserved, u64::saturating_add);
    let seconds = extraction.cost.seconds();
    let seconds_alone = summary.alone.seconds();
    PlanReport {
        profile: options.profile.name.clone(),
        mesh: mesh.clone(),
        times,
        seconds,
        seconds_alone,
        verdict: verdict(options, extraction.cost, summary.alone, bytes_alone),
        weight_bytes: bytes(false),
        state_bytes: bytes(true),
        bytes_alone,
        budget: extraction.budget.map(|b| b.saturating_add(summary.reserved)),
        least_bytes: extraction.least_bytes.saturating_add(summary.reserved),
        collectives,
        idle_ranks: steps.iter().any(|s| leaves_ranks_idle(graph, s, pricer, mesh)),
        stored,
        outputs: outputs
            .iter()
            .filter_map(|o| Some((o.name.to_string(), layout_of(&o.step)?.clone())))
            .collect(),
        gap: extraction.gap(),
        segments: extraction.segments,
    }
}

fn verdict(options: &PlanOptions, cost: Cost, alone: Cost, bytes_alone: u64) -> Verdict {
    let fits = bytes_alone.saturating_add(options.reserve) as f64 <= options.profile.memory_bytes;
    match () {
        () if options.ranks == 1 => Verdict::OneRank,
        () if cost.picoseconds() < alone.picoseconds() => Verdict::Faster,
        () if fits => Verdict::DoNotShard,
        () => Verdict::ForMemory,
    }
}

/// True if a weight or state is dealt out in fewer units than there are ranks.
fn leaves_ranks_idle(graph: &Graph, step: &Step, pricer: &Pricer<'_>, mesh: &Mesh) -> bool {
    let node = graph.node(step.value);
    if !matches!(node.op, Op::Weight(_)) || step.kind != StepKind::Compute {
        return false;
    }
    let Some(extents) = pricer.extents_of(step.value).first() else { return false };
    step.layout.0.iter().zip(&mesh.0).any(|(part, &ranks)| match part {
        tpshard_ir::AxisLayout::Shard { dim, unit } => {
            let unit = unit.as_const().map_or(1, |u| u.max(1).unsigned_abs());
            extents.get(*dim).is_some_and(|extent| extent / unit < ranks as u64)
        }
        tpshard_ir::AxisLayout::Replicated | tpshard_ir::AxisLayout::Partial(_) => false,
    })
}

fn stored(graph: &Graph, steps: &[Step], pricer: &Pricer<'_>, mesh: &Mesh) -> Vec<StoredKind> {
    let mut kinds: BTreeMap<(bool, String, String, Layout), (usize, u64)> = BTreeMap::new();
    for step in steps.iter().filter(|s| s.kind == StepKind::Compute) {
        let node = graph.node(step.value);
        let (name, is_state) = match &node.op {
            Op::Weight(expression) => (weight_name(expression), false),
            Op::Input { name } if graph.states.iter().any(|s| s.input == *name) => (name.to_string(), true),
            _ => continue,
        };
        let key = (is_state, without_numbers(&name), node.ty.to_string(), step.layout.clone());
        let entry = kinds.entry(key).or_default();
        entry.0 += 1;
        entry.1 = entry.1.saturating_add(pricer.local_bytes(step.value, &step.layout, mesh));
    }
    let kind = |((is_state, name, shape, layout), (count, bytes))| StoredKind {
        name,
        is_state,
        shape,
        layout,
        count,
        bytes,
    };
    kinds.into_iter().map(kind).collect()
}

fn weight_name(expression: &WeightExpr) -> String {
    let names: Vec<&str> = expression.initializers().into_iter().collect();
    names.join("+")
}

/// `layers.12.w` and `layers.3.w` are one kind: runs of digits become `*`.
fn without_numbers(name: &str) -> String {
    let mut text = String::new();
    for c in name.chars() {
        match (c.is_ascii_digit(), text.ends_with('*')) {
            (true, true) => {}
            (true, false) => text.push('*'),
            (false, _) => text.push(c),
        }
    }
    text
}

/// `12.3 MB`.
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scales = [(1e9, "GB"), (1e6, "MB"), (1e3, "kB")];
        match scales.iter().find(|(scale, _)| self.0 as f64 >= *scale) {
            Some((scale, unit)) => write!(f, "{:.2} {unit}", self.0 as f64 / scale),
            None => write!(f, "{} B", self.0),
        }
    }
}

/// `12.3 µs`.
struct Seconds(f64);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (value, unit) = match self.0 {
            s if s >= 1.0 => (s, "s"),
            s if s >= 1e-3 => (s * 1e3, "ms"),
            s => (s * 1e6, "µs"),
        };
        write!(f, "{value:.2} {unit}")
    }
}

impl fmt::Display for PlanReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ranks = self.mesh.ranks();
        let noun = if ranks == 1 { "rank" } else { "ranks" };
        writeln!(f, "plan for {ranks} {noun} (mesh {}) on {}", self.mesh, self.profile)?;
        self.write_time(f)?;
        self.write_memory(f)?;
        self.write_stored(f)?;
        self.write_collectives(f)
    }
}

impl PlanReport {
    fn write_time(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\npredicted time")?;
        for time in &self.times {
            let mut bindings = String::new();
            for (name, value) in &time.entry.bindings {
                write!(bindings, " {name}={value}")?;
            }
            let p = &time.parts;
            writeln!(f, "  {}{bindings}: {}", time.entry.name, Seconds(p.total()))?;
            writeln!(
                f,
                "    compute {}, memory {}, launches {}, communication {}",
                Seconds(p.compute),
                Seconds(p.memory),
                Seconds(p.launch),
                Seconds(p.communication)
            )?;
        }
        writeln!(f, "  one rank: {}", Seconds(self.seconds_alone))?;
        let verdict = match self.verdict {
            Verdict::OneRank => return writeln!(f, "  gap {:.2} %", self.gap * 100.0),
            Verdict::Faster => format!("{:.2}x one rank", self.seconds_alone / self.seconds.max(1e-12)),
            Verdict::DoNotShard => "do not shard: one rank is predicted to be as fast, and holds it".into(),
            Verdict::ForMemory => "slower than one rank would be, which cannot hold it".into(),
        };
        writeln!(f, "  verdict: {verdict}")?;
        if self.idle_ranks {
            writeln!(f, "  warning: some ranks own no part of a split weight")?;
        }
        writeln!(
            f,
            "  gap {:.2} %, {} segments, {} different",
            self.gap * 100.0,
            self.segments.0,
            self.segments.1
        )
    }

    fn write_memory(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\nmemory of rank 0")?;
        writeln!(f, "  weights {}, state {}", Bytes(self.weight_bytes), Bytes(self.state_bytes))?;
        let budget = self.budget.map_or_else(|| "free".to_owned(), |b| Bytes(b).to_string());
        writeln!(
            f,
            "  budget {budget}, least possible {}, on one rank {}",
            Bytes(self.least_bytes),
            Bytes(self.bytes_alone)
        )
    }

    fn write_stored(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\nweights and state")?;
        for kind in &self.stored {
            let role = if kind.is_state { "state " } else { "" };
            writeln!(
                f,
                "  {:4}x {role}{} {}: {}, {}",
                kind.count,
                kind.name,
                kind.shape,
                kind.layout,
                Bytes(kind.bytes)
            )?;
        }
        writeln!(f, "\noutputs")?;
        self.outputs.iter().try_for_each(|(name, layout)| writeln!(f, "  {name}: {layout}"))
    }

    fn write_collectives(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let entries: Vec<&str> = self.times.iter().map(|t| t.entry.name.as_str()).collect();
        writeln!(
            f,
            "\ncollectives: {} (bytes per rank under {})",
            self.collectives.len(),
            entries.join(", ")
        )?;
        let mut kinds: BTreeMap<(&str, String, usize, &[u64]), usize> = BTreeMap::new();
        for c in &self.collectives {
            *kinds.entry((c.kind, without_numbers(&c.origin), c.ranks, &c.payload)).or_default() += 1;
        }
        for ((kind, origin, ranks, payload), count) in kinds {
            let bytes: Vec<String> = payload.iter().map(|&b| Bytes(b).to_string()).collect();
            writeln!(f, "  {count:4}x {kind} over {ranks} of {origin}: {}", bytes.join(", "))?;
        }
        Ok(())
    }

    /// How many collectives of each kind run.
    pub fn collective_counts(&self) -> BTreeMap<&'static str, usize> {
        let mut counts = BTreeMap::new();
        self.collectives.iter().for_each(|c| *counts.entry(c.kind).or_default() += 1);
        counts
    }
}
