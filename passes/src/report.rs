//! The plan for people: what is split how, which collectives run, where the time goes.
//!
//! Everything in it follows from the program and the prices, so equal builds print equal text.

use crate::balance::Balance;
use crate::cost::price::Entry;
use crate::cost::{Cost, Parts, Pricer, Profile};
use crate::counters::Counters;
use crate::extract::Extraction;
use crate::layout_graph::{LayoutGraph, StoredName};
use crate::memory::{self, Holdings, Part};
use crate::plan::{Emitted, PlanOptions};
use std::collections::BTreeMap;
use std::fmt::{self, Write};
pub use tpshard_ir::wording::{Bytes, Seconds, without_numbers};
use tpshard_ir::{Graph, Layout, Mesh, Spmd, SpmdOutput, Step, StepId, StepKind};

/// Whether to shard at all, as far as time goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// There is one rank.
    OneRank,
    /// The ranks are faster than one would be.
    Faster,
    /// The ranks are no faster than one, and the model fits it.
    DoNotShard,
    /// The ranks are no faster than one would be, but the model does not fit it.
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
    /// Bytes per rank: of an all-reduce the tensor, of an all-gather and an all-to-all what is received, of a
    /// reduce-scatter what is sent.
    pub payload: u64,
    /// Without anything that it hides behind.
    pub seconds: f64,
    /// Pieces in which it is made, each while the next is computed; 1 if it is made in one.
    pub pieces: usize,
    /// Seconds that are hidden so.
    pub hidden: f64,
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

/// What collectives have in common that are one line of a report.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct CollectiveKind {
    pub kind: &'static str,
    /// The name with numbers left open.
    pub origin: String,
    pub ranks: usize,
    pub payload: u64,
    pub pieces: usize,
}

/// What one step takes on rank 0.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepReport {
    pub parts: Parts,
    /// Of what it makes.
    pub bytes: u64,
}

/// What one entry takes.
#[derive(Clone, Debug, PartialEq)]
pub struct EntryReport {
    pub entry: Entry,
    /// In the order of the program's steps.
    pub steps: Vec<StepReport>,
    /// Where its time goes; collecting outputs on rank 0 is communication, too.
    pub parts: Parts,
    /// How many values of each operation are computed, and what they take: seconds.
    pub operations: BTreeMap<&'static str, (usize, f64)>,
    /// Seconds of communication and computing that run at the same time: so much less it takes than its parts.
    pub hidden: f64,
    pub collectives: Vec<Collective>,
    pub outputs: Vec<(String, Layout)>,
}

/// The best plan on one mesh.
#[derive(Clone, Debug, PartialEq)]
pub struct OnMesh {
    pub mesh: Mesh,
    /// Weighted over the entries.
    pub seconds: f64,
    /// Of weights and state, per rank.
    pub bytes: u64,
}

/// A graph of a model that chooses between several.
#[derive(Clone, Debug, PartialEq)]
pub struct GraphReport {
    /// The values of the inputs that choose it.
    pub case: String,
    /// Its entries, by name.
    pub entries: Vec<String>,
    /// How far its plan may be above the best one for what lies in memory.
    pub gap: f64,
    /// It decided what lies in memory.
    pub first: bool,
}

/// What a plan is and what it is predicted to cost.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanReport {
    pub profile: String,
    pub mesh: Mesh,
    pub entries: Vec<EntryReport>,
    /// Weighted over the entries, as the planner compares plans.
    pub seconds: f64,
    /// The same for one rank.
    pub seconds_alone: f64,
    pub verdict: Verdict,
    pub weight_bytes: u64,
    pub state_bytes: u64,
    /// What the buffers of a step take on rank 0, the most over all entries.
    pub activation_bytes: u64,
    /// Weights and state on one rank.
    pub bytes_alone: u64,
    pub budget: Option<u64>,
    pub least_bytes: u64,
    pub stored: Vec<StoredKind>,
    /// How far the plan may be above the optimum, as a share.
    pub gap: f64,
    /// Of a model of several graphs, each of them.
    pub graphs: Vec<GraphReport>,
    /// Everything was to be split, whatever time that takes.
    pub split_all: bool,
    pub segments: (usize, usize),
    pub counters: Counters,
    pub balance: Balance,
    /// What the best plan on each mesh takes, the chosen one included.
    pub meshes: Vec<OnMesh>,
}

/// What the report needs besides the program.
pub(crate) struct Summary<'a> {
    pub(crate) extraction: &'a Extraction,
    pub(crate) layouts: &'a LayoutGraph,
    pub(crate) reserved: u64,
    pub(crate) activations: u64,
    pub(crate) cost: Cost,
    pub(crate) bound: Cost,
    pub(crate) alone: Cost,
    pub(crate) meshes: &'a [OnMesh],
    pub(crate) options: &'a PlanOptions,
}

pub(crate) fn report(
    graph: &Graph,
    programs: &[Emitted],
    pricer: &Pricer<'_>,
    summary: &Summary<'_>,
) -> PlanReport {
    let Summary { extraction, layouts, options, .. } = *summary;
    let mesh = &layouts.mesh;
    let of_entry = |(index, (entry, program)): (usize, (&Entry, &Emitted))| {
        let mut found = EntryReport {
            entry: entry.clone(),
            steps: Vec::new(),
            parts: pricer.overhead_parts(index),
            operations: BTreeMap::new(),
            hidden: 0.0,
            collectives: Vec::new(),
            outputs: outputs(program),
        };
        let priced = priced_steps(graph, &program.steps, &program.outputs, pricer, mesh, index);
        let made = program.steps.iter().map(|s| pricer.result_bytes(s.value, &s.layout, mesh, index));
        found.steps = made.zip(&priced).map(|(bytes, p)| StepReport { parts: p.parts, bytes }).collect();
        for (step, priced) in program.steps.iter().zip(&priced).filter(|(s, _)| s.kind == StepKind::Compute) {
            let spent = found.operations.entry(graph.node(step.value).op.name()).or_default();
            *spent = (spent.0 + 1, spent.1 + priced.parts.total());
        }
        for priced in priced {
            found.parts.add(&priced.parts, 1.0);
            found.collectives.extend(priced.collective);
        }
        found
    };
    let entries = options.entries.iter().zip(programs).enumerate().map(of_entry).collect();
    let stored = stored(graph, programs, pricer, mesh);
    let bytes = |state| stored.iter().filter(|s| s.is_state == state).map(|s| s.bytes).sum();
    let bytes_alone = layouts
        .groups
        .iter()
        .filter_map(|g| g.productions.first())
        .map(|p| p.bytes)
        .fold(summary.reserved, u64::saturating_add);
    let steps = programs.iter().flat_map(|p| &p.steps).collect();
    let holdings = Holdings::of(&[Part { graph, steps, sizes: pricer.largest_bindings().to_vec() }]);
    PlanReport {
        profile: options.profile.name.clone(),
        mesh: mesh.clone(),
        entries,
        seconds: summary.cost.seconds(),
        seconds_alone: summary.alone.seconds(),
        verdict: Verdict::of(options, summary.cost.seconds(), summary.alone.seconds(), bytes_alone),
        weight_bytes: bytes(false),
        state_bytes: bytes(true),
        activation_bytes: summary.activations,
        bytes_alone,
        budget: extraction.budget.map(|b| b.saturating_add(summary.reserved)),
        least_bytes: extraction.least_bytes.saturating_add(summary.reserved),
        balance: Balance::of(&holdings, mesh),
        meshes: summary.meshes.to_vec(),
        stored,
        gap: gap(summary.cost, summary.bound),
        graphs: Vec::new(),
        split_all: options.split_all,
        segments: extraction.segments,
        counters: Counters {
            values: graph.len(),
            sizes: layouts.sizes(),
            distinct: extraction.distinct,
            effort: extraction.effort,
        },
    }
}

/// How far a plan is above what no plan is below, as a share of the latter.
fn gap(cost: Cost, bound: Cost) -> f64 {
    let (cost, bound) = (cost.picoseconds(), bound.picoseconds());
    match bound {
        0 => f64::from(u8::from(cost > 0)),
        bound => cost.saturating_sub(bound) as f64 / bound as f64,
    }
}

/// Where the time of a step goes, and how often ranks meet in it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Predicted {
    /// Seconds.
    pub kernels: f64,
    /// Seconds of collectives, and of the step as such.
    pub others: f64,
    pub collectives: usize,
}

/// What a step of `program` takes on one of its ranks.
pub fn predicted(program: &Spmd, profile: &Profile) -> Predicted {
    let profile = profile.shared_between(program.mesh.ranks());
    let entries = [Entry::new("default", Default::default())];
    let pricer = Pricer::new(&profile, &program.logical, &entries);
    let mut found = Predicted { others: pricer.overhead_parts(0).total(), ..Predicted::default() };
    for priced in priced_steps(&program.logical, &program.steps, &program.outputs, &pricer, &program.mesh, 0)
    {
        found.others += priced.parts.communication;
        found.kernels += priced.parts.total() - priced.parts.communication;
        found.collectives += usize::from(priced.collective.is_some());
    }
    found
}

/// What a step takes.
struct Priced {
    parts: Parts,
    collective: Option<Collective>,
}

/// Prices the steps of a program under one entry, and then collecting its outputs.
fn priced_steps(
    graph: &Graph,
    steps: &[Step],
    outputs: &[SpmdOutput],
    pricer: &Pricer<'_>,
    mesh: &Mesh,
    entry: usize,
) -> Vec<Priced> {
    let of_step = |(index, step): (usize, &Step)| {
        let operands: Vec<&Layout> =
            step.args.iter().filter_map(|a| steps.get(a.index())).map(|s| &s.layout).collect();
        match (&step.kind, operands.first()) {
            (StepKind::Convert(conversion), Some(from)) => {
                let (parts, payload) =
                    pricer.convert_parts(step.value, conversion, from, &step.layout, mesh, entry);
                let collective = conversion.communicates().then(|| Collective {
                    step: StepId(index as u32),
                    kind: conversion.name(),
                    origin: graph.node(step.value).origin.to_string(),
                    ranks: conversion.axes().iter().filter_map(|&a| mesh.0.get(a)).product(),
                    payload,
                    seconds: parts.communication,
                    pieces: 1,
                    hidden: 0.0,
                });
                Priced { parts, collective }
            }
            _ => {
                let parts = pricer.compute_parts(step.value, &operands, &step.layout, mesh, entry);
                Priced { parts, collective: None }
            }
        }
    };
    let mut all: Vec<Priced> = steps.iter().enumerate().map(of_step).collect();
    let stays = |output: &&SpmdOutput| !graph.states.iter().any(|s| s.output == output.name);
    let collected = outputs.iter().filter(stays).filter_map(|o| steps.get(o.step.index()));
    all.extend(collected.map(|step| Priced {
        parts: pricer.collect_parts(step.value, &step.layout, mesh, entry),
        collective: None,
    }));
    all
}

/// What a program takes: its steps, and collecting its outputs.
pub(crate) fn program_cost(
    graph: &Graph,
    steps: &[Step],
    outputs: &[SpmdOutput],
    pricer: &Pricer<'_>,
    mesh: &Mesh,
    entry: usize,
) -> Cost {
    let share = pricer.share(entry);
    let cost = |priced: &Priced| {
        let seconds = share * priced.parts.total();
        match &priced.collective {
            Some(collective) => Cost::collective(seconds, collective.payload),
            None => Cost::local(seconds),
        }
    };
    priced_steps(graph, steps, outputs, pricer, mesh, entry).iter().map(cost).sum()
}

fn outputs(program: &Emitted) -> Vec<(String, Layout)> {
    let layout =
        |o: &SpmdOutput| Some((o.name.to_string(), program.steps.get(o.step.index())?.layout.clone()));
    program.outputs.iter().filter_map(layout).collect()
}

impl Verdict {
    /// About a plan that takes so many seconds, and so many on one rank, which needs so many bytes.
    pub(crate) fn of(options: &PlanOptions, seconds: f64, alone: f64, bytes_alone: u64) -> Verdict {
        let fits = bytes_alone.saturating_add(options.reserve) as f64 <= options.profile.memory_bytes;
        match () {
            () if options.ranks == 1 => Verdict::OneRank,
            () if seconds < alone => Verdict::Faster,
            () if fits => Verdict::DoNotShard,
            () => Verdict::ForMemory,
        }
    }
}

fn stored(graph: &Graph, programs: &[Emitted], pricer: &Pricer<'_>, mesh: &Mesh) -> Vec<StoredKind> {
    let mut kinds: BTreeMap<(bool, String, String, Layout), (usize, u64)> = BTreeMap::new();
    let steps = programs.iter().flat_map(|p| &p.steps);
    for ((name, layout), value) in memory::stored(graph, steps) {
        let is_state = matches!(name, StoredName::State(_));
        let key = (is_state, without_numbers(&name.to_string()), graph.ty(value).to_string(), layout.clone());
        let entry = kinds.entry(key).or_default();
        entry.0 += 1;
        entry.1 = entry.1.saturating_add(pricer.local_bytes(value, layout, mesh));
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

impl EntryReport {
    /// What it takes.
    pub fn seconds(&self) -> f64 {
        self.parts.total() - self.hidden
    }

    /// Where its time goes, without communication that is hidden.
    pub fn visible(&self) -> Parts {
        Parts { communication: self.parts.communication - self.hidden, ..self.parts }
    }

    /// The collectives with alike ones together: how many there are, and the seconds of all of them that are not hidden.
    pub fn collective_kinds(&self) -> Vec<(CollectiveKind, usize, f64)> {
        let mut kinds: BTreeMap<CollectiveKind, (usize, f64)> = BTreeMap::new();
        for c in &self.collectives {
            let origin = without_numbers(&c.origin);
            let kind =
                CollectiveKind { kind: c.kind, origin, ranks: c.ranks, payload: c.payload, pieces: c.pieces };
            let (count, seconds) = kinds.entry(kind).or_default();
            *count += 1;
            *seconds += c.seconds - c.hidden;
        }
        kinds.into_iter().map(|(kind, (count, seconds))| (kind, count, seconds)).collect()
    }
}

impl PlanReport {
    fn write_time(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\npredicted time")?;
        for found in &self.entries {
            let EntryReport { entry, parts, hidden, .. } = found;
            let mut bindings = String::new();
            for (name, value) in &entry.bindings {
                write!(bindings, " {name}={value}")?;
            }
            let weight =
                if self.entries.len() > 1 { format!(" (weight {})", entry.weight) } else { String::new() };
            writeln!(f, "  {}{bindings}{weight}: {}", entry.name, Seconds(found.seconds()))?;
            writeln!(
                f,
                "    compute {}, memory {}, launches {}, communication {}",
                Seconds(parts.compute),
                Seconds(parts.memory),
                Seconds(parts.launch),
                Seconds(parts.communication)
            )?;
            match *hidden {
                hidden if hidden > 0.0 => {
                    writeln!(f, "    of communication, {} are hidden behind computing", Seconds(hidden))?;
                }
                hidden if hidden < 0.0 => {
                    writeln!(f, "    products in pieces, as was asked for, take {} more", Seconds(-hidden))?;
                }
                _ => {}
            }
        }
        if self.entries.len() > 1 {
            writeln!(f, "  weighted: {}", Seconds(self.seconds))?;
        }
        writeln!(f, "  one rank: {}", Seconds(self.seconds_alone))?;
        let ratio = self.seconds_alone / self.seconds.max(1e-12);
        let verdict = match self.verdict {
            Verdict::OneRank => return writeln!(f, "  gap {:.2} %", self.gap * 100.0),
            Verdict::Faster => format!("{ratio:.2}x as fast as one rank"),
            Verdict::DoNotShard => {
                format!("do not shard: {ratio:.2}x as fast as one rank, which has room for the model")
            }
            Verdict::ForMemory => {
                format!(
                    "for memory: {ratio:.2}x as fast as one rank would be, which has no room for the model"
                )
            }
        };
        writeln!(f, "  verdict: {verdict}")?;
        if self.split_all {
            writeln!(f, "  everything is split where a rule allows (--split-all): the gap says nothing")?;
        }
        if let [_, _, ..] = self.meshes.as_slice() {
            let one = |m: &OnMesh| format!("{} in {} ({})", m.mesh, Seconds(m.seconds), Bytes(m.bytes));
            let all: Vec<String> = self.meshes.iter().map(one).collect();
            writeln!(f, "  meshes: {}", all.join(", "))?;
        }
        writeln!(
            f,
            "  gap {:.2} %, {} segments, {} different",
            self.gap * 100.0,
            self.segments.0,
            self.segments.1
        )?;
        self.write_graphs(f)
    }

    /// Several graphs are planned one after the other, so each has a gap of its own besides that of all together.
    fn write_graphs(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.graphs.is_empty() {
            writeln!(f, "  graphs, and the gap of each for weights and state as they lie in memory:")?;
        }
        for GraphReport { case, entries, gap, first } in &self.graphs {
            let first = if *first { ", decided how they lie" } else { "" };
            writeln!(f, "    {case} ({}): gap {:.2} %{first}", entries.join(", "), gap * 100.0)?;
        }
        Ok(())
    }

    fn write_memory(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\nmemory of rank 0")?;
        writeln!(
            f,
            "  weights {}, state {}, activations {}",
            Bytes(self.weight_bytes),
            Bytes(self.state_bytes),
            Bytes(self.activation_bytes)
        )?;
        let budget = self.budget.map_or_else(|| "free".to_owned(), |b| Bytes(b).to_string());
        writeln!(
            f,
            "  budget {budget}, least possible {}, on one rank {}",
            Bytes(self.least_bytes),
            Bytes(self.bytes_alone)
        )?;
        let Balance { ranks, largest, total, idle } = self.balance;
        if ranks > 1 {
            let (largest, mean, ratio) = (Bytes(largest), Bytes(total / ranks as u64), self.balance.ratio());
            writeln!(f, "  imbalance {ratio:.2}: the largest rank holds {largest}, the mean is {mean}")?;
        }
        if idle > 0 {
            writeln!(f, "  warning: {idle} of {ranks} ranks own no part of some split tensor")?;
        }
        Ok(())
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
        for found in &self.entries {
            let entry = self.entry_suffix(found);
            found.outputs.iter().try_for_each(|(name, layout)| writeln!(f, "  {name}: {layout}{entry}"))?;
        }
        Ok(())
    }

    /// Names the entry where there are several.
    fn entry_suffix(&self, entry: &EntryReport) -> String {
        if self.entries.len() > 1 { format!(" ({})", entry.entry.name) } else { String::new() }
    }

    fn write_collectives(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for found in &self.entries {
            let entry = self.entry_suffix(found);
            writeln!(f, "\ncollectives{entry}: {} (bytes per rank)", found.collectives.len())?;
            for (CollectiveKind { kind, origin, ranks, payload, pieces }, count, _) in
                found.collective_kinds()
            {
                let cut = if pieces > 1 { format!(", in {pieces} pieces") } else { String::new() };
                writeln!(f, "  {count:4}x {kind} over {ranks} of {origin}: {}{cut}", Bytes(payload))?;
            }
        }
        Ok(())
    }

    /// The collectives of all entries.
    pub fn collectives(&self) -> impl Iterator<Item = &Collective> {
        self.entries.iter().flat_map(|e| &e.collectives)
    }

    /// How many collectives of each kind run.
    pub fn collective_counts(&self) -> BTreeMap<&'static str, usize> {
        let mut counts = BTreeMap::new();
        self.collectives().for_each(|c| *counts.entry(c.kind).or_default() += 1);
        counts
    }
}
