//! Squares: the typings `l(op(x1 …)) = op'(l1 x1 …)`, generated from factors and linear sets.
//!
//! On one axis there is the square with everything replicated, one per factor and granule, and one per linear set.
//! On several axes, axis 1 splits the operation that axis 0 left on each rank; a square must hold on all of them.

use super::deal::{granule, is_even};
use super::{Factor, FactorDim, FactorResult, factors, linear_sets};
use std::collections::BTreeSet;
use tpshard_ir::layout::deal;
use tpshard_ir::{AxisLayout, Dim, Layout, Mesh, Op, Type};

/// A typing of an operation on one mesh axis.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Square {
    pub operands: Vec<AxisLayout>,
    pub result: AxisLayout,
}

/// A typing of an operation on a mesh.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MeshSquare {
    pub operands: Vec<Layout>,
    pub result: Layout,
}

/// The units in which the dims of operands and result may be dealt out. Besides these, every factor can be dealt out
/// in single steps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Deals {
    /// Per operand, per dim.
    pub operands: Vec<Vec<BTreeSet<Dim>>>,
    /// Per dim.
    pub result: Vec<BTreeSet<Dim>>,
}

/// The squares of `op` on one axis of `ranks` ranks, all-replicated first, each once. Parts may be empty: a caller who
/// wants none leaves out dims with fewer units than ranks.
pub fn squares(op: &Op, args: &[&Type], result: &Type, ranks: usize, deals: &Deals) -> Vec<Square> {
    axis_squares(&[Instance::new(op, args, result)], ranks, deals)
}

/// The squares of `op` on `mesh`, all-replicated first, each once.
pub fn squares_on_mesh(
    op: &Op,
    args: &[&Type],
    result: &Type,
    mesh: &Mesh,
    deals: &Deals,
) -> Vec<MeshSquare> {
    let start = MeshSquare { operands: vec![Layout(vec![]); args.len()], result: Layout(vec![]) };
    let mut partial = vec![(start, vec![Instance::new(op, args, result)])];
    for (axis, &ranks) in mesh.0.iter().enumerate() {
        let last = axis + 1 == mesh.axes();
        let mut longer = Vec::new();
        for (prefix, instances) in &partial {
            for square in axis_squares(instances, ranks, deals) {
                let next = prefix.then(&square);
                if next.mixes_monoids() {
                    continue;
                }
                if let Some(local) = local_instances(instances, &square, ranks, last) {
                    longer.push((next, local));
                }
            }
        }
        partial = longer;
    }
    partial.into_iter().map(|(square, _)| square).collect()
}

impl MeshSquare {
    fn then(&self, next: &Square) -> MeshSquare {
        let push =
            |layout: &Layout, axis: &AxisLayout| Layout(layout.0.iter().chain([axis]).cloned().collect());
        MeshSquare {
            operands: self.operands.iter().zip(&next.operands).map(|(l, a)| push(l, a)).collect(),
            result: push(&self.result, &next.result),
        }
    }

    fn mixes_monoids(&self) -> bool {
        self.operands.iter().chain([&self.result]).any(mixes_monoids)
    }
}

/// A sum of maxima is not a maximum of sums: such layouts cannot be left in any order, so there are none.
pub(super) fn mixes_monoids(layout: &Layout) -> bool {
    let monoids: BTreeSet<_> = layout
        .0
        .iter()
        .filter_map(|a| if let AxisLayout::Partial(m) = a { Some(*m) } else { None })
        .collect();
    monoids.len() > 1
}

/// An operation as some ranks see it.
#[derive(Clone, Debug, PartialEq)]
struct Instance {
    op: Op,
    args: Vec<Type>,
    result: Type,
}

impl Instance {
    fn new(op: &Op, args: &[&Type], result: &Type) -> Instance {
        Instance { op: op.clone(), args: args.iter().map(|&ty| ty.clone()).collect(), result: result.clone() }
    }

    fn types(&self) -> Vec<&Type> {
        self.args.iter().collect()
    }

    fn factors(&self) -> Vec<Factor> {
        factors(&self.op, &self.types(), &self.result)
    }
}

/// The squares that hold for every instance.
fn axis_squares(instances: &[Instance], ranks: usize, deals: &Deals) -> Vec<Square> {
    let Some((first, others)) = instances.split_first() else { return vec![] };
    let replicated =
        Square { operands: vec![AxisLayout::Replicated; first.args.len()], result: AxisLayout::Replicated };
    let mut found = vec![replicated];
    let mut add = |square: Square| {
        if !found.contains(&square) {
            found.push(square);
        }
    };
    let elsewhere: Vec<Vec<Factor>> = others.iter().map(Instance::factors).collect();
    for factor in first.factors() {
        let Some(counts) = counts(&factor, &elsewhere) else { continue };
        for granule in granules(&factor, &counts, deals) {
            add(split(&factor, &counts, &granule, ranks));
        }
    }
    let sets = linear_sets(&first.op, &first.types(), &first.result);
    for set in sets {
        let holds = |i: &Instance| linear_sets(&i.op, &i.types(), &i.result).contains(&set);
        if others.iter().all(holds) {
            let partial = AxisLayout::Partial(set.monoid);
            let of = |&member: &bool| if member { partial.clone() } else { AxisLayout::Replicated };
            add(Square { operands: set.operands.iter().map(of).collect(), result: partial.clone() });
        }
    }
    found
}

/// The number of steps of `factor` in every instance; `None` if one lacks it.
fn counts(factor: &Factor, elsewhere: &[Vec<Factor>]) -> Option<Vec<Dim>> {
    let same = |other: &&Factor| other.operands == factor.operands && other.result == factor.result;
    let others = elsewhere.iter().map(|fs| fs.iter().find(same).map(|f| f.count.clone()));
    std::iter::once(Some(factor.count.clone())).chain(others).collect()
}

/// Single steps, and the granules that all dims of the factor are allowed to be dealt out in.
fn granules(factor: &Factor, counts: &[Dim], deals: &Deals) -> BTreeSet<Dim> {
    let mut named: Vec<(&FactorDim, Option<&BTreeSet<Dim>>)> = Vec::new();
    for (i, found) in factor.operands.iter().enumerate() {
        if let Some(f) = found {
            named.push((f, deals.operands.get(i).and_then(|dims| dims.get(f.dim))));
        }
    }
    if let FactorResult::Dim(f) = &factor.result {
        named.push((f, deals.result.get(f.dim)));
    }
    let mut all: BTreeSet<Dim> = [Dim::constant(1)].into();
    if let Some((f, Some(units))) = named.first() {
        all.extend(units.iter().filter_map(|unit| granule(unit, f, &factor.count)).filter(|g| {
            counts.iter().all(|count| count.exact_div(g).is_some())
                && named.iter().all(|(f, units)| units.is_some_and(|u| u.contains(&(g * &f.inner))))
        }));
    }
    all
}

/// The square that deals out `factor` in granules of so many steps.
fn split(factor: &Factor, counts: &[Dim], granule: &Dim, ranks: usize) -> Square {
    let even = counts.iter().all(|count| count.exact_div(granule).is_some_and(|u| is_even(&u, ranks)));
    let shard = |f: &FactorDim| AxisLayout::Shard {
        dim: f.dim,
        unit: if even { Dim::constant(1) } else { granule * &f.inner },
    };
    Square {
        operands: factor.operands.iter().map(|f| f.as_ref().map_or(AxisLayout::Replicated, shard)).collect(),
        result: match &factor.result {
            FactorResult::Dim(f) => shard(f),
            FactorResult::Reduced(monoid) => AxisLayout::Partial(*monoid),
        },
    }
}

/// What the next axis sees: every instance at every coordinate, each once; nothing after the last axis. `None` if the
/// operation has no local form.
fn local_instances(
    instances: &[Instance],
    square: &Square,
    ranks: usize,
    last: bool,
) -> Option<Vec<Instance>> {
    let mut local: Vec<Instance> = Vec::new();
    for instance in instances {
        if last {
            // Only these may have none, by constant numbers of heads and channels.
            if matches!(instance.op, Op::Attention { .. } | Op::Conv { .. }) {
                (0..ranks).try_for_each(|c| localise(instance, square, ranks, c).map(drop))?;
            }
            continue;
        }
        for coordinate in 0..ranks {
            let next = localise(instance, square, ranks, coordinate)?;
            if !local.contains(&next) {
                local.push(next);
            }
        }
    }
    Some(local)
}

fn localise(instance: &Instance, square: &Square, ranks: usize, coordinate: usize) -> Option<Instance> {
    let cut = |ty: &Type, layout: &AxisLayout| {
        let mut ty = ty.clone();
        if let AxisLayout::Shard { dim, unit } = layout {
            ty.shape[*dim] = deal(&ty.shape[*dim], unit, ranks, coordinate).length;
        }
        ty
    };
    // The run of `dim` at this coordinate.
    let run = |ty: &Type, layout: &AxisLayout, dim: usize| {
        let extent = &ty.shape[dim];
        let run = match layout {
            AxisLayout::Shard { dim: split, unit } if *split == dim => deal(extent, unit, ranks, coordinate),
            _ => tpshard_ir::layout::Run { start: Dim::constant(0), length: extent.clone() },
        };
        Some((run.start.as_size()?, run.length.as_size()?))
    };
    let args: Vec<Type> = instance.args.iter().zip(&square.operands).map(|(ty, l)| cut(ty, l)).collect();
    let result = cut(&instance.result, &square.result);
    let op = match &instance.op {
        Op::Reshape { .. } => Op::Reshape { shape: result.shape.clone() },
        Op::Broadcast { .. } => Op::Broadcast { shape: result.shape.clone() },
        Op::Attention { scale, softcap, kv_of_head, empty_rows_zero } => {
            let (start, length) = run(&instance.result, &square.result, 1)?;
            let keys = run(&instance.args[1], &square.operands[1], 1)?;
            let own = kv_of_head.get(start..start + length)?;
            let shifted = own.iter().map(|&h| h.checked_sub(u32::try_from(keys.0).ok()?));
            Op::Attention {
                scale: *scale,
                softcap: *softcap,
                kv_of_head: shifted.collect::<Option<_>>()?,
                empty_rows_zero: *empty_rows_zero,
            }
        }
        Op::Conv { window, groups } if *groups > 1 => {
            let (_, channels) = run(&instance.result, &square.result, 1)?;
            let all = instance.result.shape[1].as_size()?;
            Op::Conv { window: window.clone(), groups: (groups * channels / all.max(1)).max(1) }
        }
        // Only the first split of a table makes a window; further ones narrow it.
        op => op.clone(),
    };
    Some(Instance { op, args, result })
}
