//! How much longer kernels take in models than in the chains that their rates come from.
//!
//! A chain of one kernel finds what it reads in the caches, has threads that do the same again and again, and its ranks never
//! meet. A model has other kernels, other weights and other work on the next line, and everyone waits for the slowest rank.
//! So some small models are planned like any other, and what they take is held against the sum of their kernels.

use super::steps::{INPUT, filled, time_of};
use super::{Effort, Rounds};
use crate::failure::{Classify, Failure, Kind, Outcome};
use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use tpshard_ir::op::{EinsumSpec, NormKind, Real};
use tpshard_ir::weight::WeightExpr;
use tpshard_ir::{DType, Dim, Graph, InferError, Op, Output, Scalar, Spmd, Tensor, Type, ValueId};
use tpshard_passes::canonical::canonicalise;
use tpshard_passes::cost::Profile;
use tpshard_passes::cost::kernels::{Family, Measured};
use tpshard_passes::extended::Extended;
use tpshard_passes::report::{Predicted, predicted};
use tpshard_passes::{MemoryGoal, PlanOptions, plan};

/// Transformers of so many layers.
const LAYERS: usize = 3;
/// Their tokens, width, heads, inner width, and how long the past is that they attend to.
const SHAPES: [Shape; 4] = [
    Shape { tokens: 128, width: 256, heads: 4, inner: 1024, past: 0 },
    Shape { tokens: 128, width: 512, heads: 8, inner: 1536, past: 0 },
    Shape { tokens: 16, width: 512, heads: 8, inner: 2048, past: 0 },
    Shape { tokens: 1, width: 512, heads: 8, inner: 2048, past: 1024 },
];
/// Of what is tried, in percent. What takes longer has met other work on the machine.
const FACTORS: RangeInclusive<u32> = 80..=160;

#[derive(Clone, Copy, Debug)]
struct Shape {
    tokens: usize,
    width: usize,
    heads: usize,
    inner: usize,
    past: usize,
}

/// A model as it ran.
pub(crate) struct Model {
    pub(crate) name: String,
    /// Seconds.
    pub(crate) took: f64,
    /// What the profile says, but for ranks that wait for one another.
    pub(crate) said: Predicted,
}

/// The models of some number of ranks.
#[derive(Default)]
pub(crate) struct Compared {
    pub(crate) models: Vec<Model>,
    /// How many times kernels take in models what they take in chains.
    pub(crate) factor: f64,
    /// What ranks wait for one another at a collective: seconds.
    pub(crate) meeting: f64,
}

impl Compared {
    /// What the profile says in the end.
    pub(crate) fn said(&self, model: &Model) -> f64 {
        let Predicted { kernels, others, collectives } = model.said;
        kernels + collectives as f64 * self.meeting + others
    }
}

/// The programs of the models for some number of ranks, and what they took.
pub(crate) struct Models {
    ranks: usize,
    programs: Vec<(Shape, Spmd, BTreeMap<String, Tensor>, Rounds)>,
}

impl Models {
    pub(crate) fn new(ranks: usize) -> Outcome<Models> {
        let program = |shape: Shape| -> Outcome<_> {
            let mut extended = Extended::new(transformer(shape)?);
            canonicalise(&mut extended);
            // Whatever the machine is, everything is split.
            let profile = Profile::built_in("cpu-shm").or_fail(Kind::Internal)?;
            let options = PlanOptions { memory: MemoryGoal::Least, ..PlanOptions::new(ranks, profile) };
            let planned = plan(extended, &options).or_fail(Kind::Internal)?;
            let program = planned.programs.into_iter().next().map(|(_, program)| program);
            let program = program.ok_or_else(|| Failure::new(Kind::Internal, "a plan without a program"))?;
            let given = filled(DType::F32, vec![shape.tokens, shape.width])?;
            Ok((shape, program, BTreeMap::from([(INPUT.to_owned(), given)]), Rounds::default()))
        };
        Ok(Models { ranks, programs: SHAPES.into_iter().map(program).collect::<Outcome<_>>()? })
    }

    pub(crate) fn round(&mut self, effort: Effort) -> Outcome<()> {
        for (_, program, given, rounds) in &mut self.programs {
            rounds.add(time_of(program, given, self.ranks, effort.samples)?);
        }
        Ok(())
    }

    /// What the models took, and by what factor the rates in `profile` and what wait at a collective they are explained best:
    /// with the least squares of the relative error.
    pub(crate) fn compared(&self, profile: &Profile) -> Compared {
        let mut best = (f64::INFINITY, Compared::default());
        for factor in FACTORS.map(|percent| f64::from(percent) / 100.0) {
            let found = self.with_factor(profile, factor);
            let error = found.models.iter().map(|m| (found.said(m) / m.took - 1.0).powi(2)).sum();
            if error < best.0 {
                best = (error, found);
            }
        }
        best.1
    }

    fn with_factor(&self, profile: &Profile, factor: f64) -> Compared {
        let mut raised = profile.clone();
        raised.kernels.values_mut().for_each(|families| raise(families, factor));
        let model = |(shape, program, _, rounds): &(Shape, Spmd, BTreeMap<String, Tensor>, Rounds)| {
            let Shape { tokens, width, heads, inner, past } = shape;
            let name = format!(
                "transformer of {LAYERS} layers, {tokens} tokens after {past}, {width} wide, {heads} heads, {inner} inside"
            );
            Model { name, took: rounds.fastest(), said: predicted(program, &raised) }
        };
        let models: Vec<Model> = self.programs.iter().map(model).collect();
        let row = |m: &Model| {
            let weight = m.said.collectives as f64 / m.took;
            (weight * (1.0 - (m.said.kernels + m.said.others) / m.took), weight * weight)
        };
        let [above, below] = models.iter().map(row).fold([0.0; 2], |[a, b], (x, y)| [a + x, b + y]);
        let meeting = if below > 0.0 { (above / below).max(0.0) } else { 0.0 };
        Compared { models, factor, meeting }
    }
}

/// Has kernels take so many times what they did.
pub(crate) fn raise(families: &mut Measured, factor: f64) {
    let kernels = families.iter_mut().filter(|(family, _)| **family != Family::Step);
    kernels.for_each(|(_, rates)| *rates = rates.over(1.0 / factor));
}

/// Layers of attention and a function of two products, with norms before and sums behind.
fn transformer(shape: Shape) -> Outcome<Graph> {
    let Shape { tokens, width, heads, inner, past } = shape;
    let mut layer = Layer { graph: Graph::new("calibrate"), weights: 0 };
    let mut x = layer.graph.input(INPUT, Type::new(DType::F32, dims(&[tokens, width])));
    for _ in 0..LAYERS {
        let normed = layer.norm(x, width)?;
        let split = |layer: &mut Layer, x: ValueId| -> Outcome<ValueId> {
            let y = layer.product(x, width, width)?;
            let y = layer.add(Op::Reshape { shape: dims(&[1, tokens, heads, width / heads]) }, &[y])?;
            layer.add(Op::Transpose { perm: vec![0, 2, 1, 3] }, &[y])
        };
        let queries = split(&mut layer, normed)?;
        let [keys, values] = if past == 0 {
            [split(&mut layer, normed)?, split(&mut layer, normed)?]
        } else {
            let held = [1, heads, past, width / heads];
            [layer.weight(&held)?, layer.weight(&held)?]
        };
        let attention = Op::Attention {
            scale: Real(0.1),
            softcap: None,
            kv_of_head: (0..heads as u32).collect(),
            empty_rows_zero: false,
        };
        let y = layer.add(attention, &[queries, keys, values])?;
        let y = layer.add(Op::Transpose { perm: vec![0, 2, 1, 3] }, &[y])?;
        let y = layer.add(Op::Reshape { shape: dims(&[tokens, width]) }, &[y])?;
        let y = layer.product(y, width, width)?;
        x = layer.add(Op::Map(Scalar::Add), &[x, y])?;
        let normed = layer.norm(x, width)?;
        let up = layer.product(normed, width, inner)?;
        let gate = layer.add(Op::Map(Scalar::Sigmoid), &[up])?;
        let gated = layer.add(Op::Map(Scalar::Mul), &[up, gate])?;
        let down = layer.product(gated, inner, width)?;
        x = layer.add(Op::Map(Scalar::Add), &[x, down])?;
    }
    layer.graph.outputs.push(Output { name: "y".into(), value: x });
    Ok(layer.graph)
}

fn dims(shape: &[usize]) -> Vec<Dim> {
    shape.iter().map(|&s| Dim::from(s)).collect()
}

struct Layer {
    graph: Graph,
    weights: usize,
}

impl Layer {
    fn add(&mut self, op: Op, args: &[ValueId]) -> Outcome<ValueId> {
        let added: Result<ValueId, InferError> = self.graph.add(op, args);
        added.or_fail(Kind::Internal)
    }

    fn weight(&mut self, shape: &[usize]) -> Outcome<ValueId> {
        self.weights += 1;
        let name = format!("w{}", self.weights);
        let weight = WeightExpr::initializer(name, DType::F32, shape.to_vec()).or_fail(Kind::Internal)?;
        self.add(Op::Weight(weight), &[])
    }

    /// With a sum behind it.
    fn product(&mut self, x: ValueId, depth: usize, columns: usize) -> Outcome<ValueId> {
        let spec = EinsumSpec::parse("mk,kn->mn").ok_or_else(|| Failure::new(Kind::Internal, "a spec"))?;
        let (weight, bias) = (self.weight(&[depth, columns])?, self.weight(&[columns])?);
        let y = self.add(Op::Einsum(spec), &[x, weight])?;
        self.add(Op::Map(Scalar::Add), &[y, bias])
    }

    fn norm(&mut self, x: ValueId, width: usize) -> Outcome<ValueId> {
        let (scale, bias) = (self.weight(&[width])?, self.weight(&[width])?);
        self.add(Op::Norm { kind: NormKind::Layer, axis: 1, epsilon: Real(1e-5) }, &[x, scale, bias])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tpshard_ir::StepKind;

    #[test]
    fn models_are_split_and_run_on_every_number_of_ranks() {
        let effort = Effort { samples: 1, growth: 2, largest: 1024 };
        let profile = Profile::built_in("cpu-shm").unwrap();
        for ranks in [1, 2, 3] {
            let mut models = Models::new(ranks).unwrap();
            for (shape, program, ..) in &models.programs {
                let meets = |kind: &StepKind| matches!(kind, StepKind::Convert(c) if c.communicates());
                assert_eq!(program.steps.iter().any(|s| meets(&s.kind)), ranks > 1, "{shape:?}");
            }
            // The one that is soonest done.
            models.programs.drain(..SHAPES.len() - 1);
            models.round(effort).unwrap();
            let compared = models.compared(&profile);
            for model in &compared.models {
                assert!(model.took > 0.0 && model.said.kernels > 0.0 && model.said.others >= 0.0);
                assert_eq!(model.said.collectives > 0, ranks > 1);
                assert!(compared.said(model) > 0.0);
            }
            assert!((0.8..=1.6).contains(&compared.factor) && compared.meeting >= 0.0);
        }
    }
}
