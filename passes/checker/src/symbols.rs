//! Small values for dim symbols that keep all guards.

use std::collections::BTreeSet;
use std::sync::Arc;
use tpshard_ir::{Bindings, Dim, Graph, Relation};

/// A dim is raised by less than two to the power of this.
const MOST_DOUBLINGS: u32 = 32;

/// Extents looked at, in all attempts together: a hostile graph can have very many.
const MOST_RAISES: usize = 1 << 18;

/// A well mixed function of its argument (the finaliser of SplitMix64).
pub(crate) fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Up to `wanted` different assignments; fewer if they are hard to find, one without symbols.
pub(crate) fn assignments(graph: &Graph, wanted: usize) -> Vec<Bindings> {
    let mut symbols: BTreeSet<Arc<str>> = graph.symbols.keys().cloned().collect();
    for node in graph.nodes() {
        node.ty.shape.iter().for_each(|dim| symbols.extend(dim.symbols()));
    }
    for guard in &graph.guards {
        symbols.extend(guard.left.symbols());
        symbols.extend(guard.right.symbols());
    }
    let extents = graph.nodes().iter().flat_map(|node| &node.ty.shape);
    let extents: BTreeSet<&Dim> = extents.filter(|dim| dim.as_const().is_none()).collect();
    let mut raises = MOST_RAISES;
    let mut found: Vec<Bindings> = Vec::new();
    for attempt in 0..400 {
        let drawn = draw(graph, &symbols, &extents, (attempt, &mut raises));
        if graph.broken_guards(&drawn).is_empty()
            && in_range(graph, &drawn)
            && extents.iter().all(|dim| dim.eval(&drawn).is_ok_and(|extent| extent >= 0))
            && !found.contains(&drawn)
        {
            found.push(drawn);
            if found.len() == wanted || symbols.is_empty() {
                break;
            }
        }
    }
    found
}

fn draw(
    graph: &Graph,
    symbols: &BTreeSet<Arc<str>>,
    extents: &BTreeSet<&Dim>,
    (attempt, raises): (u64, &mut usize),
) -> Bindings {
    // A window over nothing has no result: what is left by windows is at least one entry, if that can be. In every fourth
    // attempt it may be none.
    let least = Dim::constant(i64::from(attempt % 4 != 3));
    let mut drawn: Bindings = symbols
        .iter()
        .enumerate()
        .map(|(i, name)| {
            let (low, high) = graph.symbols.get(name).map_or((1, i64::MAX), |r| (r.low.max(1), r.high));
            let spread = 1 + (attempt / 100) as i64 * 4 + 3;
            let offset = (mix(attempt * 1009 + i as u64) % spread as u64) as i64;
            (name.clone(), low.saturating_add(offset).min(high.max(low)))
        })
        .collect();
    // What guards say equals something takes its value; what has to be large is raised.
    for round in 0..3u64 {
        let unequal = graph.guards.iter().filter(|g| g.relation == Relation::LessEqual);
        for (i, guard) in unequal.enumerate() {
            let spread = (mix(attempt * 1013 + i as u64 + round) % 3) as i64;
            raise(graph, &guard.left, &guard.right, spread, &mut drawn);
        }
        for (i, extent) in extents.iter().filter(|extent| !extent.is_nonnegative()).enumerate() {
            if *raises == 0 {
                break;
            }
            *raises -= 1;
            let spread = (mix(attempt * 1019 + i as u64 + round) % 3) as i64;
            raise(graph, &least, extent, spread, &mut drawn);
        }
        for guard in graph.guards.iter().filter(|g| g.relation == Relation::Equal) {
            let (symbol, value) = match (guard.left.as_symbol(), guard.right.as_symbol()) {
                (Some(symbol), _) => (symbol, guard.right.eval(&drawn)),
                (None, Some(symbol)) => (symbol, guard.left.eval(&drawn)),
                (None, None) => continue,
            };
            if let Ok(value) = value {
                drawn.insert(symbol.clone(), value);
            }
        }
    }
    drawn
}

/// Raises one symbol so that `left <= right` holds, with some room to spare. Nothing else can repair a condition that
/// small values break: symbols on the left are as small as they may be, or will be in another attempt.
fn raise(graph: &Graph, left: &Dim, right: &Dim, spare: i64, drawn: &mut Bindings) {
    let holds = |drawn: &Bindings| left.eval(drawn).is_ok_and(|l| right.eval(drawn).is_ok_and(|r| l <= r));
    if holds(drawn) {
        return;
    }
    for name in right.symbols() {
        let Some(&value) = drawn.get(&name) else { continue };
        let high = graph.symbols.get(&name).map_or(i64::MAX, |range| range.high);
        let reaches = |steps: i64| {
            let mut raised = drawn.clone();
            raised.insert(name.clone(), value.saturating_add(steps).min(high));
            holds(&raised)
        };
        // More is better wherever sizes shrink on the way; elsewhere a point is lost.
        if !reaches(1 << (MOST_DOUBLINGS - 1)) {
            continue;
        }
        // Divisions round, so that single steps may show nothing.
        let Some(mut enough) = (0..MOST_DOUBLINGS).map(|power| 1i64 << power).find(|&steps| reaches(steps))
        else {
            continue;
        };
        let mut short = enough / 2;
        while enough - short > 1 {
            let middle = short + (enough - short) / 2;
            if reaches(middle) { enough = middle } else { short = middle }
        }
        let wanted = value.saturating_add(enough).saturating_add(spare).min(high);
        drawn.insert(name, wanted);
        return;
    }
}

fn in_range(graph: &Graph, drawn: &Bindings) -> bool {
    graph
        .symbols
        .iter()
        .all(|(name, range)| drawn.get(name).is_none_or(|&value| (range.low..=range.high).contains(&value)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tpshard_ir::{DType, Guard, SymbolRange, Type};

    fn with_guard(left: Dim, right: Dim) -> Graph {
        let mut graph = Graph::new("guarded");
        graph.input("x", Type::new(DType::F32, vec![Dim::symbol("batch"), Dim::symbol("seq")]));
        for name in ["batch", "seq"] {
            graph.symbols.insert(name.into(), SymbolRange { low: 0, high: i64::from(i32::MAX) });
        }
        graph.guards.push(Guard { left, relation: Relation::LessEqual, right, reason: "".into() });
        graph
    }

    #[test]
    fn dims_that_must_be_large_are_as_large_as_they_must_be() {
        for (left, right) in [
            (Dim::constant(100_000), Dim::symbol("seq")),
            (Dim::constant(7), Dim::symbol("seq") - Dim::constant(99_993)),
            (Dim::constant(200_000), Dim::constant(2) * Dim::symbol("seq")),
        ] {
            let graph = with_guard(left, right);
            let found = assignments(&graph, 2);
            assert_eq!(found.len(), 2, "{found:?}");
            for point in found {
                assert!((100_000..100_100).contains(&point["seq"]), "{point:?}");
                assert!(point["batch"] < 100, "{point:?}");
            }
        }
    }

    /// How the importer writes down that `seq` is 1 or 4.
    #[test]
    fn dims_that_must_be_one_of_two_are_either() {
        let mut graph = with_guard(Dim::constant(0), Dim::symbol("seq"));
        let steps = Dim::symbol("seq").floor_div(&Dim::constant(4));
        let right = Dim::constant(4).minimum(&(Dim::constant(1) + Dim::constant(3) * steps));
        let left = Dim::symbol("seq");
        graph.guards.push(Guard { left, relation: Relation::Equal, right, reason: "".into() });
        let found = assignments(&graph, 8);
        let sizes: BTreeSet<i64> = found.iter().map(|point| point["seq"]).collect();
        assert_eq!(sizes, [1, 4].into());
    }

    /// What convolutions with strides leave of a signal.
    #[test]
    fn dims_that_windows_shorten_are_long_enough() {
        let mut graph = with_guard(Dim::constant(0), Dim::symbol("seq"));
        let mut left = Dim::symbol("seq");
        for (reach, stride) in [(10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2)] {
            left = (left - Dim::constant(reach)).floor_div(&Dim::constant(stride)) + Dim::constant(1);
            graph.input("x", Type::new(DType::F32, vec![left.clone()]));
        }
        let found = assignments(&graph, 2);
        assert_eq!(found.len(), 2, "{found:?}");
        for point in found {
            assert!(left.eval(&point).unwrap() >= 1, "{point:?}");
            assert!(point["seq"] < 2000, "{point:?}");
        }
    }

    #[test]
    fn dims_that_can_only_be_zero_are_zero() {
        let mut graph = with_guard(Dim::symbol("s"), Dim::symbol("t"));
        graph.input("x", Type::new(DType::F32, vec![Dim::symbol("s") - Dim::symbol("t")]));
        let found = assignments(&graph, 1);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0]["s"], found[0]["t"]);
    }

    #[test]
    fn guards_that_cannot_hold_have_no_assignment() {
        let graph = with_guard(Dim::constant(1 << 40), Dim::symbol("seq"));
        assert!(assignments(&graph, 2).is_empty());
    }
}
