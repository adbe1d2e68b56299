//! Deals: in which units a dim may be split.
//!
//! A factor can be split in granules of any number of its steps; on a dim of `inner` elements per step that is a unit
//! of `granule · inner`. Units that put the cuts in the same places are one class and have one name, so that layouts
//! can be compared by `==`. Which units matter in a graph follows from its factors: a merge of dims forces the unit on
//! the merged dim, and from there it spreads through every factor that has the dim.

use super::{Deals, Factor, FactorDim, FactorResult, factors};
use std::collections::BTreeSet;
use tpshard_ir::{Dim, Graph, Type, ValueId};

/// The name of the class of `unit` on a dim of `extent` elements over `ranks` ranks: 1 where all ranks get equal parts,
/// else `unit` itself, because then a part shows the unit.
pub fn canonical(extent: &Dim, unit: &Dim, ranks: usize) -> Dim {
    let units = extent.exact_div(unit);
    let even = units.is_some_and(|units| is_even(&units, ranks));
    if even { Dim::constant(1) } else { unit.clone() }
}

/// True if `ranks` divides the number of units for every value of its symbols.
pub(super) fn is_even(units: &Dim, ranks: usize) -> bool {
    units.exact_div(&Dim::from(ranks)).is_some()
}

/// Most units kept per dim; what is beyond is not offered.
const MAX_UNITS: usize = 16;

/// The units in which the dims of a graph's values may be dealt out, before classes for some number of ranks are
/// taken.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Units {
    /// Per value, per dim; empty for values that were not asked about.
    by_value: Vec<Vec<BTreeSet<Dim>>>,
}

impl Units {
    /// Per dim of `value`, its units; empty for a value that was not asked about.
    pub fn of(&self, value: ValueId) -> &[BTreeSet<Dim>] {
        self.by_value.get(value.index()).map_or(&[], Vec::as_slice)
    }

    /// Per dim of `value`, one name per class of units for `ranks` ranks.
    pub fn canonical(&self, graph: &Graph, value: ValueId, ranks: usize) -> Vec<BTreeSet<Dim>> {
        let shape = &graph.ty(value).shape;
        let of_dim = |(extent, units): (&Dim, &BTreeSet<Dim>)| {
            units.iter().map(|unit| canonical(extent, unit, ranks)).collect()
        };
        shape.iter().zip(self.of(value)).map(of_dim).collect()
    }

    /// What [`super::squares`] needs to know about the node that makes `value`.
    pub fn deals(&self, graph: &Graph, value: ValueId) -> Deals {
        let operands = graph.node(value).args.iter().map(|&a| self.of(a).to_vec()).collect();
        Deals { operands, result: self.of(value).to_vec() }
    }

    fn offer(&mut self, value: ValueId, dim: usize, unit: Dim) -> bool {
        let Some(units) = self.by_value.get_mut(value.index()).and_then(|dims| dims.get_mut(dim)) else {
            return false;
        };
        units.len() < MAX_UNITS && units.insert(unit)
    }
}

/// The units of `live` values: 1 everywhere, what factors force, and what follows through other factors, in both
/// directions, until nothing changes.
pub fn candidate_units(graph: &Graph, live: &[ValueId]) -> Units {
    let one: BTreeSet<Dim> = [Dim::constant(1)].into();
    let mut by_value = vec![Vec::new(); graph.len()];
    live.iter().for_each(|&v| by_value[v.index()] = vec![one.clone(); graph.ty(v).rank()]);
    let mut units = Units { by_value };
    let links: Vec<Link> = live.iter().flat_map(|&value| links(graph, value)).collect();
    for link in &links {
        link.spread(&mut units, &Dim::constant(1), |_| {});
    }
    // Sets of units only grow, so a link has nothing new to say until one of its values has changed.
    let (mut changed, mut visited) = (vec![0usize; graph.len()], vec![0usize; links.len()]);
    let mut time = 0;
    let mut settled = false;
    while !settled {
        settled = true;
        for index in (0..links.len()).chain((0..links.len()).rev()) {
            time += 1;
            let link = &links[index];
            if link.dims.iter().all(|(value, _)| changed[value.index()] < visited[index]) {
                continue;
            }
            visited[index] = time;
            for granule in link.granules(&units) {
                link.spread(&mut units, &granule, |value| {
                    changed[value.index()] = time;
                    settled = false;
                });
            }
        }
    }
    units
}

/// A factor of a node, with the values it ties together.
struct Link {
    count: Dim,
    dims: Vec<(ValueId, FactorDim)>,
}

fn links(graph: &Graph, value: ValueId) -> Vec<Link> {
    let node = graph.node(value);
    let types: Vec<&Type> = node.args.iter().map(|&a| graph.ty(a)).collect();
    let link = |factor: Factor| {
        let mut dims: Vec<(ValueId, FactorDim)> =
            node.args.iter().zip(factor.operands).filter_map(|(&arg, f)| Some((arg, f?))).collect();
        if let FactorResult::Dim(named) = factor.result {
            dims.push((value, named));
        }
        Link { count: factor.count, dims }
    };
    factors(&node.op, &types, &node.ty).into_iter().map(link).collect()
}

impl Link {
    /// The granules of more than one step in which some dim of the link can already be dealt out.
    fn granules(&self, units: &Units) -> BTreeSet<Dim> {
        let mut found = BTreeSet::new();
        for (value, named) in &self.dims {
            let known = units.of(*value).get(named.dim).into_iter().flatten();
            let several = known.filter(|unit| **unit != named.inner);
            found.extend(several.filter_map(|unit| granule(unit, named, &self.count)));
        }
        found
    }

    /// Lets all dims be dealt out in this granule, and names the values for which that is new.
    fn spread(&self, units: &mut Units, granule: &Dim, mut is_new: impl FnMut(ValueId)) {
        for (value, named) in &self.dims {
            let unit = if granule.is_one() { named.inner.clone() } else { granule * &named.inner };
            if units.offer(*value, named.dim, unit) {
                is_new(*value);
            }
        }
    }
}

/// The granule of a factor of `count` steps that gives `named` this unit.
pub(super) fn granule(unit: &Dim, named: &FactorDim, count: &Dim) -> Option<Dim> {
    let granule = if named.inner.is_one() { unit.clone() } else { unit.exact_div(&named.inner)? };
    count.exact_div(&granule).is_some().then_some(granule)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tpshard_ir::{DType, Op};

    fn d(value: i64) -> Dim {
        Dim::constant(value)
    }

    #[test]
    fn even_deals_have_one_name() {
        assert_eq!(canonical(&d(64), &d(16), 4), d(1));
        assert_eq!(canonical(&d(80), &d(16), 4), d(16));
        assert_eq!(canonical(&d(80), &d(1), 4), d(1));
        assert_eq!(canonical(&d(2), &d(1), 4), d(1));
        let s = Dim::symbol("s");
        assert_eq!(canonical(&(d(8) * &s), &s, 4), d(1));
        assert_eq!(canonical(&(d(5) * &s), &s, 4), s);
        assert_eq!(canonical(&s, &d(1), 4), d(1));
    }

    #[test]
    fn a_merge_forces_its_unit_backwards_and_forwards() {
        let mut graph = Graph::new("g");
        let x = graph.input("x", Type::new(DType::F32, vec![d(5), d(16)]));
        let merged = graph.add(Op::Reshape { shape: vec![d(80)] }, &[x]).unwrap();
        let exp = graph.add(Op::Map(tpshard_ir::Scalar::Exp), &[merged]).unwrap();
        let y = graph.input("y", Type::new(DType::F32, vec![d(80)]));
        let sum = graph.add(Op::Map(tpshard_ir::Scalar::Add), &[y, exp]).unwrap();
        let units = candidate_units(&graph, &[x, merged, exp, y, sum]);
        let set = |values: &[i64]| values.iter().map(|&v| d(v)).collect::<BTreeSet<_>>();
        assert_eq!(units.of(y), [set(&[1, 16])]);
        assert_eq!(units.of(x), [set(&[1]), set(&[1])]);
        assert_eq!(units.canonical(&graph, y, 5), [set(&[1])]);
        assert_eq!(units.canonical(&graph, y, 4), [set(&[1, 16])]);
    }
}
