//! How much longer kernels take in programs whose ranks meet: everyone waits for the slowest, and each time another rank
//! is that.
//!
//! A program of products with a small collective after each is held against one without the collectives, and against
//! the two with next to no products, which differ by what the collectives cost as such.

use super::steps::{INPUT, filled, on_all, time_of};
use super::{Effort, Rounds};
use crate::failure::{Classify, Failure, Kind, Outcome};
use std::collections::BTreeMap;
use tpshard_ir::op::EinsumSpec;
use tpshard_ir::weight::WeightExpr;
use tpshard_ir::{
    AxisLayout, Conversion, DType, Dim, Graph, Layout, Op, Output, Spmd, SpmdOutput, Step, StepId, StepKind,
    Tensor, Type, ValueId,
};

/// Products, each followed by a collective.
const LINKS: usize = 12;
/// Rows and width of products of about a millisecond, and of nearly nothing.
const LARGE: (usize, usize) = (256, 512);
const SMALL: (usize, usize) = (256, 8);
/// Waiting of more than this share of the computing is some other work on the machine.
const MOST: f64 = 0.5;

/// The four programs, and what they took.
pub(crate) struct Skew {
    ranks: usize,
    programs: Vec<(Spmd, BTreeMap<String, Tensor>, Rounds)>,
}

impl Skew {
    pub(crate) fn new(ranks: usize) -> Outcome<Skew> {
        let mut programs = Vec::new();
        for (rows, width) in [LARGE, SMALL] {
            let given = BTreeMap::from([(INPUT.to_owned(), filled(DType::F32, vec![rows, width])?)]);
            for meet in [false, true] {
                programs.push((meeting((rows, width), ranks, meet)?, given.clone(), Rounds::default()));
            }
        }
        Ok(Skew { ranks, programs })
    }

    pub(crate) fn round(&mut self, effort: Effort) -> Outcome<()> {
        for (program, given, rounds) in &mut self.programs {
            rounds.add(time_of(program, given, self.ranks, effort.samples)?);
        }
        Ok(())
    }

    /// The share of the computing time that ranks wait for one another.
    pub(crate) fn share(&self) -> f64 {
        let [apart, met, few, few_met] =
            [0, 1, 2, 3].map(|i| self.programs.get(i).map_or(0.0, |p| p.2.fastest()));
        (((met - apart) - (few_met - few)) / apart).clamp(0.0, MOST)
    }
}

/// A chain of products; after each, one column of the result is dealt out and, if ranks are to `meet`, gathered again.
fn meeting((rows, width): (usize, usize), ranks: usize, meet: bool) -> Outcome<Spmd> {
    let mut graph = Graph::new("calibrate");
    let spec = EinsumSpec::parse("mk,kn->mn").ok_or_else(|| Failure::new(Kind::Internal, "a spec"))?;
    let mut x = graph.input(INPUT, Type::new(DType::F32, vec![Dim::from(rows), Dim::from(width)]));
    let mut columns = Vec::new();
    for link in 0..LINKS {
        let weight = WeightExpr::initializer(format!("w{link}"), DType::F32, vec![width, width]);
        let weight = graph.add(Op::Weight(weight.or_fail(Kind::Internal)?), &[]).or_fail(Kind::Internal)?;
        x = graph.add(Op::Einsum(spec.clone()), &[x, weight]).or_fail(Kind::Internal)?;
        let (start, length) = (Dim::from(0usize), Dim::from(1usize));
        let column =
            graph.add(Op::Slice { axis: 1, start, length, step: 1 }, &[x]).or_fail(Kind::Internal)?;
        graph.outputs.push(Output { name: format!("y{link}").as_str().into(), value: column });
        columns.push(column);
    }
    let mut program = on_all(graph, ranks);
    if meet {
        gather(&mut program, &columns);
    }
    Ok(program)
}

/// Deals the values out and gathers them again; nothing reads them but the outputs.
fn gather(program: &mut Spmd, values: &[ValueId]) {
    let whole = Layout::replicated(&program.mesh);
    let (dim, unit, axes) = (0, Dim::from(1usize), vec![0]);
    let dealt = Layout(vec![AxisLayout::Shard { dim, unit: unit.clone() }]);
    let mut steps = Vec::new();
    // Where each of the old steps went, and what it is called from then on.
    let mut places: Vec<StepId> = Vec::new();
    for step in std::mem::take(&mut program.steps) {
        let args = step.args.iter().filter_map(|a| places.get(a.index()).copied()).collect();
        let value = step.value;
        steps.push(Step { args, ..step });
        let mut place = StepId(steps.len() as u32 - 1);
        if values.contains(&value) {
            let cut = Conversion::ShardSlice { axes: axes.clone(), dim, unit: unit.clone() };
            let join = Conversion::AllGather { axes: axes.clone(), dim, unit: unit.clone() };
            for (conversion, layout) in [(cut, &dealt), (join, &whole)] {
                let kind = StepKind::Convert(conversion);
                steps.push(Step { value, layout: layout.clone(), kind, args: vec![place] });
                place = StepId(steps.len() as u32 - 1);
            }
        }
        places.push(place);
    }
    let moved = |o: &SpmdOutput| {
        let step = places.get(o.step.index()).copied().unwrap_or(o.step);
        SpmdOutput { step, ..o.clone() }
    };
    program.outputs = program.outputs.iter().map(moved).collect();
    program.steps = steps;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_meet_after_every_product() {
        let program = meeting(SMALL, 2, true).unwrap();
        let met = program.steps.iter().filter(|s| match &s.kind {
            StepKind::Convert(conversion) => conversion.communicates(),
            StepKind::Compute => false,
        });
        assert_eq!(met.count(), LINKS);
        let given = BTreeMap::from([(INPUT.to_owned(), filled(DType::F32, vec![SMALL.0, SMALL.1]).unwrap())]);
        assert!(time_of(&program, &given, 2, 1).unwrap() > 0.0);
        let effort = Effort { samples: 1, growth: 2, largest: 1024 };
        let mut skew = Skew::new(2).unwrap();
        skew.round(effort).unwrap();
        assert!((0.0..=MOST).contains(&skew.share()));
    }
}
