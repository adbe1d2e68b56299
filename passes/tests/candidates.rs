//! Units that a block of grouped-query attention forces, and that squares stay within them.

mod instances;

use instances::ty;
use std::collections::BTreeSet;
use tpshard_ir::op::{EinsumSpec, Real};
use tpshard_ir::weight::WeightExpr;
use tpshard_ir::{AxisLayout, DType, Dim, Graph, Mesh, Op, Type, ValueId};
use tpshard_passes::sharding::{Deals, Units, candidate_units, squares, squares_on_mesh};

const HEADS: usize = 6;
const KV_HEADS: usize = 3;
const HEAD: usize = 8;

struct Block {
    graph: Graph,
    weights: [ValueId; 4],
    attention: ValueId,
}

fn block() -> Block {
    let mut graph = Graph::new("attention");
    let x = graph.input("x", ty("f32[b, s, 12]"));
    let product = || Op::Einsum(EinsumSpec::parse("bsk,kn->bsn").unwrap());
    let mut weights = Vec::new();
    let mut heads = Vec::new();
    for (name, count) in [("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)] {
        let expr = WeightExpr::initializer(name, DType::F32, vec![12, count * HEAD]).unwrap();
        let w = graph.add(Op::Weight(expr), &[]).unwrap();
        let flat = graph.add(product(), &[x, w]).unwrap();
        let shape = ty(&format!("f32[b, s, {count}, {HEAD}]")).shape;
        let split = graph.add(Op::Reshape { shape }, &[flat]).unwrap();
        heads.push(graph.add(Op::Transpose { perm: vec![0, 2, 1, 3] }, &[split]).unwrap());
        weights.push(w);
    }
    let kv_of_head = (0..HEADS as u32).map(|h| h / 2).collect();
    let op = Op::Attention { scale: Real(1.0), softcap: None, kv_of_head, empty_rows_zero: false };
    let attention = graph.add(op, &heads).unwrap();
    let back = graph.add(Op::Transpose { perm: vec![0, 2, 1, 3] }, &[attention]).unwrap();
    let joined = Op::Reshape { shape: ty("f32[b, s, 48]").shape };
    let flat = graph.add(joined, &[back]).unwrap();
    let expr = WeightExpr::initializer("o", DType::F32, vec![48, 12]).unwrap();
    let w = graph.add(Op::Weight(expr), &[]).unwrap();
    graph.add(product(), &[flat, w]).unwrap();
    weights.push(w);
    Block { graph, weights: weights.try_into().unwrap(), attention }
}

fn constants(units: &BTreeSet<Dim>) -> Vec<i64> {
    units.iter().filter_map(Dim::as_const).collect()
}

fn live(graph: &Graph) -> Vec<ValueId> {
    graph.values().map(|(id, _)| id).collect()
}

#[test]
fn heads_and_groups_of_heads_are_units_of_the_projections() {
    let Block { graph, weights: [q, k, v, o], .. } = block();
    let units = candidate_units(&graph, &live(&graph));
    // A head is 8 columns, the two heads of a KV head are 16.
    assert_eq!(constants(&units.of(q)[1]), [1, 8, 16]);
    assert_eq!(constants(&units.of(k)[1]), [1, 8]);
    assert_eq!(constants(&units.of(v)[1]), [1, 8]);
    assert_eq!(constants(&units.of(o)[0]), [1, 8, 16]);
    assert_eq!(constants(&units.of(o)[1]), [1]);
    // Over 2 ranks 6 heads are even, 3 KV heads are not; over 3 ranks both are.
    assert_eq!(constants(&units.canonical(&graph, q, 2)[1]), [1, 16]);
    assert_eq!(constants(&units.canonical(&graph, k, 2)[1]), [1, 8]);
    assert_eq!(constants(&units.canonical(&graph, q, 3)[1]), [1]);
}

#[test]
fn grouped_heads_split_with_their_keys() {
    let Block { graph, attention, .. } = block();
    let units = candidate_units(&graph, &live(&graph));
    let node = graph.node(attention);
    let args: Vec<&Type> = node.args.iter().map(|&a| graph.ty(a)).collect();
    let of = |ranks| squares(&node.op, &args, &node.ty, ranks, &units.deals(&graph, attention));
    let has = |ranks: usize, q: AxisLayout, kv: AxisLayout| {
        of(ranks).iter().any(|s| s.operands == [q.clone(), kv.clone(), kv.clone()] && s.result == q)
    };
    let shard = |unit: usize| AxisLayout::shard(1, unit);
    assert!(has(3, shard(1), shard(1)));
    // Two KV heads to rank 0, one to rank 1, and the query heads with them.
    assert!(has(2, shard(2), shard(1)));
    assert!(!has(2, shard(1), shard(1)));
    // Or even query heads over keys that every rank has.
    assert!(has(2, shard(1), AxisLayout::Replicated));
}

fn within(graph: &Graph, units: &Units, value: ValueId, layout: &AxisLayout, ranks: usize) -> bool {
    match layout {
        AxisLayout::Shard { dim, unit } => units.canonical(graph, value, ranks)[*dim].contains(unit),
        _ => true,
    }
}

#[test]
fn squares_stay_within_the_candidates() {
    let Block { graph, .. } = block();
    let units = candidate_units(&graph, &live(&graph));
    for ranks in [2, 3, 4, 5, 8] {
        for (value, node) in graph.values() {
            let args: Vec<&Type> = node.args.iter().map(|&a| graph.ty(a)).collect();
            for square in squares(&node.op, &args, &node.ty, ranks, &units.deals(&graph, value)) {
                let named = node.args.iter().zip(&square.operands).chain([(&value, &square.result)]);
                for (&value, layout) in named {
                    assert!(within(&graph, &units, value, layout, ranks), "{value} {layout} on {ranks}");
                }
            }
        }
    }
}

#[test]
fn two_axes_split_what_one_cannot() {
    let Block { graph, attention, .. } = block();
    let node = graph.node(attention);
    let args: Vec<&Type> = node.args.iter().map(|&a| graph.ty(a)).collect();
    let found = squares_on_mesh(&node.op, &args, &node.ty, &Mesh(vec![3, 2]), &Deals::default());
    let text: Vec<String> =
        found.iter().map(|s| format!("{} {} {}", s.operands[0], s.operands[1], s.result)).collect();
    // KV heads over axis 0, the query heads of each over axis 1.
    assert!(text.contains(&"S(1)·S(1) S(1)·R S(1)·S(1)".to_string()), "{text:#?}");
    assert!(!text.iter().any(|t| t.starts_with("S(1)·S(1) S(1)·S(1)")), "{text:#?}");
}
