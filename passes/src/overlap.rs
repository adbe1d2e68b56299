//! Communication that hides behind computing: products whose only use is a sum over ranks are made in pieces of their rows
//! where that pays, and each piece is summed while the next is multiplied.
//!
//! With `C` equal pieces, a product of `p` seconds and a sum of `c` seconds take `p/C + (C-1)/C · max(p, c) + c/C`: the first
//! piece has nothing to hide behind, the last sum nothing to be hidden by. Every piece pays for its launch and for the
//! latency of its collective, is no faster than whole tiles of rows, and all but the first are slower by what the collective
//! takes from the device. Plans are found as if nothing overlapped; what is decided here is taken off afterwards.

use crate::cost::Profile;
use crate::cost::price::{complete, extents, local_extents};
use crate::cost::profile::{Collective, Span};
use crate::plan::{Plan, PlanOptions};
use crate::report::{EntryReport, Verdict};
use std::collections::{BTreeMap, BTreeSet};
use tpshard_ir::op::EinsumSpec;
use tpshard_ir::program::Determinism;
use tpshard_ir::program::device::pieces::{
    LEAST_PIECE, MOST_PIECES, PieceCounts, TILE_ROWS, pieces_of, row_pieces,
};
use tpshard_ir::{Bindings, Conversion, DType, Graph, Monoid, Op, Spmd, Step, StepId, StepKind, ValueId};

/// Fewest rows that are looked at: of fewer, no two pieces fill a tile each.
const LEAST_ROWS: u64 = 2 * TILE_ROWS;
/// Numbers of pieces that are tried.
const COUNTS: [u32; 9] = [2, 3, 4, 6, 8, 12, 16, 24, 32];
/// What has to be gained, as a share of what is spent: prices are not as exact as that.
const LEAST_GAIN: f64 = 0.02;
/// Most rows that are looked at.
const MOST_ROWS: u64 = 1 << 22;

/// In how many pieces products are made that are summed over ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Overlap {
    /// As the prices say, where the profile says that communication can hide at all.
    #[default]
    Auto,
    Off,
    /// In so many, whatever they cost.
    Pieces(u32),
}

impl std::fmt::Display for Overlap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Overlap::Auto => f.write_str("auto"),
            Overlap::Off => f.write_str("off"),
            Overlap::Pieces(count) => write!(f, "{count}"),
        }
    }
}

impl std::str::FromStr for Overlap {
    type Err = String;

    fn from_str(text: &str) -> Result<Overlap, String> {
        match text {
            "auto" => Ok(Overlap::Auto),
            "off" => Ok(Overlap::Off),
            count => match count.parse() {
                Ok(count) if (2..=MOST_PIECES).contains(&count) => Ok(Overlap::Pieces(count)),
                _ => Err(format!("say auto, off, or a number of pieces from 2 to {MOST_PIECES}")),
            },
        }
    }
}

/// The products of a program that are made in pieces, by their steps: those are the values of a rank's graph.
pub type Cuts = BTreeMap<ValueId, PieceCounts>;

/// A product and the sum over ranks that is all its use.
struct Summed<'a> {
    profile: &'a Profile,
    dtype: DType,
    rows: u64,
    columns: f64,
    depth: f64,
    /// Where the ranks lie that sum.
    span: Span,
}

impl Summed<'_> {
    fn product(&self, rows: u64) -> f64 {
        let tiles = rows.div_ceil(TILE_ROWS).saturating_mul(TILE_ROWS) as f64;
        let operations = 2.0 * tiles * self.columns * self.depth;
        let rows = rows as f64;
        let elements = rows * self.depth + self.depth * self.columns + rows * self.columns;
        let bytes = elements * self.dtype.bits() as f64 / 8.0;
        let seconds = (operations / self.profile.peak(self.dtype)).max(bytes / self.profile.bandwidth());
        self.profile.kernel_launch + seconds
    }

    fn sum(&self, rows: u64) -> f64 {
        let bytes = rows as f64 * self.columns * self.dtype.bits() as f64 / 8.0;
        self.profile.collective_over(Collective::AllReduce, self.span, bytes)
    }

    /// Seconds of these pieces: a sum begins when its piece is there and the sum before is done.
    fn seconds(&self, pieces: &[u64]) -> f64 {
        let rate = self.profile.overlap_rate.unwrap_or(1.0);
        let (mut computed, mut summed) = (0.0f64, 0.0f64);
        for (number, &rows) in pieces.iter().enumerate() {
            let product = self.product(rows);
            computed += if number == 0 { product } else { product / rate };
            summed = summed.max(computed) + self.sum(rows);
        }
        summed
    }

    /// In how many pieces so many rows are fastest; 1 if that gains too little.
    fn best(&self, rows: u64) -> u32 {
        let whole = self.seconds(&[rows]);
        let mut best = (whole * (1.0 - LEAST_GAIN), 1);
        for count in COUNTS {
            let pieces = row_pieces(rows, count);
            let full = pieces.iter().all(|&piece| piece >= TILE_ROWS);
            let seconds = self.seconds(&pieces);
            if full && pieces.len() == count as usize && seconds < best.0 {
                best = (seconds, count);
            }
        }
        best.1
    }

    /// From how many rows on how many pieces, up to as many rows as there may be.
    fn counts(&self, most: u64) -> PieceCounts {
        let mut counts = PieceCounts::new();
        let mut rows = LEAST_ROWS;
        while rows <= most.min(MOST_ROWS) {
            // Between two powers of two, one more: 256, 384, 512, 768, …
            for rows in [rows, rows + rows / 2] {
                let count = self.best(rows);
                if rows <= most && counts.last().map_or(1, |&(_, last)| last) != count {
                    counts.push((rows, count));
                }
            }
            rows *= 2;
        }
        counts
    }

    /// Seconds that are hidden at the planned rows.
    fn hidden(&self, counts: &PieceCounts) -> f64 {
        let pieces = pieces_of(counts, self.rows);
        if pieces.len() < 2 { 0.0 } else { self.seconds(&[self.rows]) - self.seconds(&pieces) }
    }
}

/// Cuts the products of a plan into pieces where that is wanted and pays, and takes off what is hidden.
pub(crate) fn apply(plan: &mut Plan, options: &PlanOptions) {
    let ranks = plan.report.mesh.ranks();
    // Libraries choose how they sum by the rows and the bytes, so other levels have none.
    if ranks < 2 || options.overlap == Overlap::Off || options.determinism != Determinism::Fast {
        return;
    }
    let profile = options.profile.shared_between(ranks);
    let total: f64 = plan.report.entries.iter().map(|found| found.entry.weight).sum();
    let mut all = Vec::with_capacity(plan.programs.len());
    for ((_, program), found) in plan.programs.iter().zip(&mut plan.report.entries) {
        let cuts = of_program(program, found, &profile, options.overlap);
        if total > 0.0 {
            plan.report.seconds -= found.hidden * found.entry.weight / total;
        }
        all.push(cuts);
    }
    if all.iter().any(|cuts| !cuts.is_empty()) {
        plan.cuts = all;
    }
    let report = &mut plan.report;
    report.verdict = Verdict::of(options, report.seconds, report.seconds_alone, report.bytes_alone);
}

fn of_program(program: &Spmd, found: &mut EntryReport, profile: &Profile, overlap: Overlap) -> Cuts {
    let graph = &program.logical;
    let constant = constants(graph);
    let uses = uses(program);
    let planned = complete(graph, &found.entry.bindings);
    let most = complete(graph, &found.entry.largest);
    let mut cuts = Cuts::new();
    for (index, step) in program.steps.iter().enumerate() {
        let Some(product) = summed(program, step).filter(|at| uses.get(at.index()) == Some(&1)) else {
            continue;
        };
        let task = Task { program, constant: &constant, profile };
        let Some(summed) = task.at(product, step, &planned) else { continue };
        let counts = match overlap {
            Overlap::Pieces(count) => vec![(2 * LEAST_PIECE, count)],
            // Without, nobody has said that communication can hide.
            Overlap::Auto if profile.overlap_rate.is_none() => continue,
            Overlap::Auto => summed.counts(task.at(product, step, &most).map_or(0, |summed| summed.rows)),
            Overlap::Off => continue,
        };
        if counts.is_empty() {
            continue;
        }
        let hidden = if profile.overlap_rate.is_some() { summed.hidden(&counts) } else { 0.0 };
        let pieces = pieces_of(&counts, summed.rows).len();
        if let Some(collective) = found.collectives.iter_mut().find(|c| c.step.index() == index) {
            collective.pieces = pieces;
            collective.hidden = hidden;
        }
        found.hidden += hidden;
        cuts.insert(ValueId(product.0), counts);
    }
    cuts
}

/// The computed operand of a step that sums it over ranks.
fn summed(program: &Spmd, step: &Step) -> Option<StepId> {
    match (&step.kind, step.args.first()) {
        (StepKind::Convert(Conversion::AllReduce { monoid: Monoid::Sum, .. }), Some(&from)) => {
            let computed = program.steps.get(from.index())?.kind == StepKind::Compute;
            computed.then_some(from)
        }
        _ => None,
    }
}

/// How often each step is used.
fn uses(program: &Spmd) -> Vec<usize> {
    let mut uses = vec![0; program.steps.len()];
    let outputs = program.outputs.iter().map(|output| output.step);
    for used in program.steps.iter().flat_map(|step| step.args.iter().copied()).chain(outputs) {
        if let Some(count) = uses.get_mut(used.index()) {
            *count += 1;
        }
    }
    uses
}

/// What follows from weights alone.
fn constants(graph: &Graph) -> Vec<bool> {
    let mut constant = Vec::with_capacity(graph.len());
    for node in graph.nodes() {
        let known = |arg: &ValueId| constant.get(arg.index()).copied().unwrap_or(false);
        let is = match node.op {
            Op::Weight(_) | Op::Literal(_) => true,
            _ => !node.args.is_empty() && node.args.iter().all(known),
        };
        constant.push(is);
    }
    constant
}

/// The letters of the operand that is computed alone, of the weight alone, and of both, of a product of rows of one by a
/// whole of the other; the first is operand number `left`.
fn letters(spec: &EinsumSpec, left: usize) -> Option<[Vec<u8>; 3]> {
    let [_, _] = spec.inputs.as_slice() else { return None };
    let (a, b) = (spec.inputs.get(left)?, spec.inputs.get(1 - left)?);
    let of = |own: &[u8], other: &[u8]| -> Vec<u8> {
        own.iter().copied().filter(|letter| !other.contains(letter)).collect()
    };
    let (rows, columns) = (of(a, b), of(b, a));
    let depth: Vec<u8> = a.iter().copied().filter(|letter| b.contains(letter)).collect();
    let in_order: Vec<u8> = rows.iter().chain(&columns).copied().collect();
    let distinct = in_order.iter().collect::<BTreeSet<_>>().len() == in_order.len();
    (spec.output == in_order && distinct && !rows.is_empty()).then_some([rows, columns, depth])
}

struct Task<'a> {
    program: &'a Spmd,
    constant: &'a [bool],
    profile: &'a Profile,
}

impl<'a> Task<'a> {
    /// The product of a step and its sum, for these dims.
    fn at(&self, product: StepId, sum: &Step, bindings: &Bindings) -> Option<Summed<'a>> {
        let Spmd { logical: graph, mesh, steps, .. } = self.program;
        let step = steps.get(product.index())?;
        let node = graph.node(step.value);
        let Op::Einsum(spec) = &node.op else { return None };
        let is_constant = |arg: usize| {
            let arg = node.args.get(arg)?;
            self.constant.get(arg.index()).copied()
        };
        let left = usize::from(is_constant(0)? && !is_constant(1)?);
        let [rows, columns, depth] = letters(spec, left)?;
        let operand = |at: usize| -> Option<(&[u8], Vec<u64>)> {
            let step = steps.get(step.args.get(at)?.index())?;
            let whole = extents(graph, graph.ty(step.value), bindings);
            let own = local_extents(&whole, &step.layout, mesh, bindings);
            Some((spec.inputs.get(at)?.as_slice(), own))
        };
        let (left, right) = (operand(left)?, operand(1 - left)?);
        let extent = |letters: &[u8], (own, extents): &(&[u8], Vec<u64>)| -> Vec<u64> {
            let of =
                |letter: &u8| own.iter().position(|l| l == letter).and_then(|at| extents.get(at).copied());
            letters.iter().filter_map(of).collect()
        };
        let StepKind::Convert(conversion) = &sum.kind else { return None };
        Some(Summed {
            profile: self.profile,
            dtype: node.ty.dtype,
            rows: count(&extent(&rows, &left)),
            columns: count(&extent(&columns, &right)) as f64,
            depth: count(&extent(&depth, &left)) as f64,
            span: self.profile.span_of_axes(&mesh.0, conversion.axes()),
        })
        .filter(|summed| summed.rows > 0 && summed.dtype.is_float())
    }
}

fn count(extents: &[u64]) -> u64 {
    extents.iter().fold(1, |all, &extent| all.saturating_mul(extent))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(text: &str) -> Profile {
        Profile::built_in(text).unwrap()
    }

    /// The second product of a layer of Llama 70B between so many ranks.
    fn of_llama<'a>(profile: &'a Profile, ranks: usize, rows: u64) -> Summed<'a> {
        let span = profile.span(ranks);
        let depth = 28672.0 / ranks as f64;
        Summed { profile, dtype: DType::BF16, rows, columns: 8192.0, depth, span }
    }

    /// The formula in `docs/cost-model.md`, for equal pieces.
    #[test]
    fn pieces_take_as_long_as_the_formula_says() {
        let mut h100 = profile("h100-sxm");
        h100.overlap_rate = Some(1.0);
        let summed = of_llama(&h100, 4, 8192);
        for count in [1, 2, 4, 8] {
            let rows = 8192 / u64::from(count);
            let (product, sum) = (summed.product(rows), summed.sum(rows));
            let expected = product + f64::from(count - 1) * product.max(sum) + sum;
            let found = summed.seconds(&row_pieces(8192, count));
            assert!((found - expected).abs() < 1e-12, "{count}: {found} {expected}");
        }
    }

    #[test]
    fn pieces_pay_for_long_prompts_only() {
        for name in ["h100-sxm", "h800-sxm", "a100-pcie-80"] {
            let profile = profile(name);
            let summed = of_llama(&profile, 4, 4096);
            let counts = summed.counts(1 << 14);
            let (from, _) = *counts.first().unwrap();
            assert!((LEAST_ROWS..=4096).contains(&from), "{name}: {counts:?}");
            assert!(summed.hidden(&counts) > 0.0, "{name}");
            // No more is hidden than there is of either.
            assert!(summed.hidden(&counts) < summed.sum(4096).min(summed.product(4096)), "{name}");
            assert_eq!(of_llama(&profile, 4, 1).hidden(&counts), 0.0);
            assert!(of_llama(&profile, 4, 4096).counts(128).is_empty());
        }
        // Next to a slow link, any piece that fills a tile is worth it; where links are free, none is.
        let mut free = profile("h100-sxm");
        free.protocols.iter_mut().for_each(|p| (p.base, p.step, p.bandwidth) = (0.0, 0.0, 1e30));
        assert_eq!(of_llama(&free, 4, 4096).counts(1 << 14), []);
    }

    /// What communication takes from the device may be more than it hides.
    #[test]
    fn products_that_get_slower_are_left_whole() {
        let mut slow = profile("h100-sxm");
        slow.overlap_rate = Some(0.05);
        assert_eq!(of_llama(&slow, 4, 4096).best(4096), 1);
    }

    #[test]
    fn products_of_rows_are_told_from_others() {
        let spec = |text: &str| EinsumSpec::parse(text).unwrap();
        let found = |text: &str, left| letters(&spec(text), left).is_some();
        assert!(found("bsk,kn->bsn", 0));
        assert!(found("bshd,hdn->bsn", 0));
        assert!(found("kn,bsk->bsn", 1));
        // Rows that lie within the result, batches, and what is turned.
        assert!(!found("kn,bsk->bsn", 0));
        assert!(!found("bsk,bkn->bsn", 0));
        assert!(!found("sk,kn->ns", 0));
    }

    #[test]
    fn what_is_asked_for_is_read() {
        assert_eq!("auto".parse(), Ok(Overlap::Auto));
        assert_eq!("off".parse(), Ok(Overlap::Off));
        assert_eq!("4".parse(), Ok(Overlap::Pieces(4)));
        for wrong in ["", "on", "1", "65", "-2", "4.5"] {
            assert!(wrong.parse::<Overlap>().unwrap_err().contains("from 2 to 64"), "{wrong}");
        }
        for overlap in [Overlap::Auto, Overlap::Off, Overlap::Pieces(7)] {
            assert_eq!(overlap.to_string().parse(), Ok(overlap));
        }
    }
}
