//! What the comparisons once found, as small as it can be.

use crate::random::{blank, finish};
use crate::{Tally, compare, exhaustive::trade_offs};
use tpshard_ir::Conversion;
use tpshard_passes::cost::Cost;
use tpshard_passes::extract::{Budget, Limits};
use tpshard_passes::layout_graph::{Edge, Exit, Group, GroupKind, LayoutGraph, Operand, Production};

fn cost(picoseconds: u64) -> Cost {
    Cost::local(picoseconds as f64 * 1e-12)
}

fn make(group: &mut Group, out: u8, operands: &[(u32, u8)], picoseconds: u64, bytes: u64) {
    let operands = operands.iter().map(|&(group, slot)| Operand { group, slot }).collect();
    let (value, cost) = (group.value, cost(picoseconds));
    group.productions.push(Production { out, operands, value, cost, bytes });
}

fn convert(group: &mut Group, from: u8, to: u8, picoseconds: u64) {
    let conversion = Some(Conversion::Transfer);
    group.conversions.push(Edge { from, to, conversion, cost: cost(picoseconds) });
}

fn leave(group: &mut Group, slot: u8) {
    group.exits.push(Exit { slot, cost: Cost::ZERO, collected: 0, also: Vec::new() });
}

fn check(groups: Vec<Group>, budget: Budget, picoseconds: u64) {
    let graph: LayoutGraph = finish(groups);
    let points = trade_offs(&graph);
    let mut tally = Tally::default();
    compare(&graph, &points, budget, Limits::default(), true, &mut tally).unwrap();
    let bytes = if let Budget::Bytes(bytes) = budget { bytes } else { u64::MAX };
    assert_eq!(crate::fastest(&points, bytes), Some(cost(picoseconds)));
}

/// A group of `layouts` layouts, all of which the output after it wants.
fn all_wanted(mut group: Group, layouts: u8) -> Vec<Group> {
    let mut output = blank(GroupKind::Computed, 1);
    let operands: Vec<(u32, u8)> = (0..layouts).map(|slot| (0, slot)).collect();
    make(&mut output, 0, &operands, 0, 0);
    leave(&mut output, 0);
    group.exits.clear();
    vec![group, output]
}

#[test]
fn three_productions_where_no_conversion_leads() {
    let mut group = blank(GroupKind::Computed, 3);
    (0..3).for_each(|slot| make(&mut group, slot, &[], 5, 0));
    check(all_wanted(group, 3), Budget::Free, 15);
}

/// Two productions are best although nothing wants the slot that one of them makes.
#[test]
fn a_second_production_that_is_converted() {
    let mut group = blank(GroupKind::Computed, 3);
    make(&mut group, 0, &[], 5, 0);
    make(&mut group, 2, &[], 5, 0);
    convert(&mut group, 0, 1, 100);
    convert(&mut group, 2, 1, 1);
    check(all_wanted(group, 2), Budget::Free, 11);
}

#[test]
fn conversions_over_many_slots() {
    let mut group = blank(GroupKind::Computed, 5);
    make(&mut group, 4, &[], 5, 0);
    convert(&mut group, 4, 0, 100);
    [(4, 3), (3, 2), (2, 1), (1, 0)].iter().for_each(|&(from, to)| convert(&mut group, from, to, 2));
    check(all_wanted(group, 1), Budget::Free, 13);
}

/// More wanted slots than are solved together: what is found need not be the best, but is a plan, and says so.
#[test]
fn more_slots_than_are_solved_together() {
    for conversions in [false, true] {
        let mut group = blank(GroupKind::Computed, 10);
        (0..10).for_each(|slot| make(&mut group, slot, &[], 5, 0));
        if conversions {
            (1..10).for_each(|slot| convert(&mut group, slot - 1, slot, 1));
        }
        let graph = finish(all_wanted(group, 10));
        let points = trade_offs(&graph);
        let mut tally = Tally::default();
        compare(&graph, &points, Budget::Free, Limits::default(), false, &mut tally).unwrap();
        assert_eq!(tally.compared - tally.impossible, 1);
        assert!(tally.cut_short == 1 || tally.suboptimal == 0, "{tally:?}");
    }
}

/// Bytes of a weight that a plan does without are not set aside for it.
#[test]
fn a_weight_that_the_best_plan_does_not_use() {
    let mut used = blank(GroupKind::Stored, 2);
    make(&mut used, 0, &[], 0, 10);
    make(&mut used, 1, &[], 0, 4);
    let mut unused = blank(GroupKind::Stored, 1);
    make(&mut unused, 0, &[], 0, 20);
    let mut output = blank(GroupKind::Computed, 1);
    make(&mut output, 0, &[(1, 0)], 7, 0);
    make(&mut output, 0, &[(1, 1)], 100, 0);
    make(&mut output, 0, &[(0, 0)], 1, 0);
    leave(&mut output, 0);
    check(vec![unused, used, output], Budget::Bytes(12), 7);
}

/// A few bytes of many make a great difference in time: the price of all of them does not fit into 64 bits.
#[test]
fn prices_that_overflow() {
    for (bytes, more) in (30..44).flat_map(|shift| (1..20).map(move |more| (1u64 << shift, more))) {
        let mut weight = blank(GroupKind::Stored, 2);
        make(&mut weight, 0, &[], 0, bytes + more);
        make(&mut weight, 1, &[], 0, bytes);
        let other = weight.clone();
        let mut output = blank(GroupKind::Computed, 1);
        for (slots, picoseconds) in [([0, 0], 1), ([0, 1], 1 << 38), ([1, 0], 1 << 39), ([1, 1], 1 << 40)] {
            make(&mut output, 0, &[(0, slots[0]), (1, slots[1])], picoseconds, 0);
        }
        leave(&mut output, 0);
        check(vec![weight, other, output], Budget::Bytes(2 * bytes + more), 1 << 38);
    }
}
