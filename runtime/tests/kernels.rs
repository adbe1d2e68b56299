//! Every kernel against the reference interpreter, on ordinary, stretched and empty shapes.

mod executor;

use DType::{BF16, Bool, F16, F32, F64, I8, I32, I64, U8};
use executor::*;
use std::collections::BTreeMap;
use std::sync::Arc;
use tpshard_ir::op::{EinsumSpec, Literal, NormKind, Op, PadMode, PoolKind, Real, TableWindow, Window};
use tpshard_ir::program::{Kernel, lower};
use tpshard_ir::{DType, Dim, Graph, Monoid, Scalar, Tensor};

#[test]
fn elementwise_functions() {
    let mut random = Random::new(1);
    for &scalar in Scalar::ALL {
        for dtype in [F32, F16, F64, I64, I32, U8, Bool] {
            let operands: Vec<(DType, &[usize])> = match (scalar, scalar.arity()) {
                (Scalar::Select, _) => vec![(Bool, &[3, 1]), (dtype, &[5]), (dtype, &[2, 3, 5])],
                (_, 1) => vec![(dtype, &[2, 3, 5])],
                _ => vec![(dtype, &[2, 1, 5]), (dtype, &[3, 1])],
            };
            let mut graph = Graph::new("op");
            let args: Vec<_> = operands
                .iter()
                .enumerate()
                .map(|(i, (d, s))| graph.input(&format!("x{i}"), ty(*d, s)))
                .collect();
            // Not every function is defined for every type; division by a random zero is an error.
            let partial =
                matches!(scalar, Scalar::Div | Scalar::Mod | Scalar::Rem | Scalar::Pow | Scalar::Reciprocal)
                    && !dtype.is_float();
            if partial || graph.add(Op::Map(scalar), &args).is_err() {
                continue;
            }
            check_op(Op::Map(scalar), &operands, &mut random);
        }
    }
    for (from, to) in
        [(F32, F16), (I64, F32), (Bool, I32), (I32, U8), (F32, I64), (F32, Bool), (F16, F32), (I64, Bool)]
    {
        check_op(Op::Map(Scalar::Cast(to)), &[(from, &[4, 3])], &mut random);
    }
    check_op(Op::Map(Scalar::Add), &[(F32, &[0, 3]), (F32, &[1, 3])], &mut random);
}

#[test]
fn fused_chains_equal_their_parts() {
    let mut random = Random::new(2);
    for (b, s) in [(1, 1), (3, 700), (0, 5), (2, 0)] {
        let mut g = Graph::new("gelu");
        let x = g.input("x", tpshard_ir::Type::new(F32, vec![dim("b"), dim("s"), 33usize.into()]));
        let bias = weight(&mut g, "bias", F32, &[33]);
        let half = g.add(Op::Literal(Literal(Arc::new(Tensor::scalar(0.5f32)))), &[]).unwrap();
        let sum = g.add(Op::Map(Scalar::Add), &[x, bias]).unwrap();
        let cube = g.add(Op::Map(Scalar::Mul), &[sum, sum]).unwrap();
        let cube = g.add(Op::Map(Scalar::Mul), &[cube, half]).unwrap();
        let t = g.add(Op::Map(Scalar::Tanh), &[cube]).unwrap();
        let low = g.add(Op::Map(Scalar::Less), &[t, half]).unwrap();
        let picked = g.add(Op::Map(Scalar::Select), &[low, sum, t]).unwrap();
        let back = g.add(Op::Transpose { perm: vec![2, 0, 1] }, &[picked]).unwrap();
        let more = g.add(Op::Map(Scalar::Exp), &[back]).unwrap();
        output(&mut g, "y", more);
        output(&mut g, "low", low);
        let inputs = [("x".to_string(), random.tensor(F32, &[b, s, 33]))].into();
        check(g, &inputs, &format!("b={b} s={s}"));
    }
}

/// Activations rounded with a scale per block, from a gated product with the blocks joined.
fn rounded_by_blocks(monoid: Monoid, [blocks, block]: [usize; 2]) -> Graph {
    let mut g = Graph::new("rounded");
    let joined = vec![dim("b"), dim("s"), (blocks * block).into()];
    let x = g.input("x", tpshard_ir::Type::new(F32, joined.clone()));
    let gate = weight(&mut g, "gate", F32, &[blocks * block]);
    let of_rows = weight(&mut g, "rows", F32, &[blocks, 1]);
    let scalar =
        |g: &mut Graph, x: f32| g.add(Op::Literal(Literal(Arc::new(Tensor::scalar(x)))), &[]).unwrap();
    let (zero, largest) = (scalar(&mut g, 0.0), scalar(&mut g, 127.0));
    let map = |g: &mut Graph, scalar: Scalar, args: &[_]| g.add(Op::Map(scalar), args).unwrap();
    let sum = map(&mut g, Scalar::Add, &[x, gate]);
    let gated = map(&mut g, Scalar::Mul, &[sum, gate]);
    let apart = vec![dim("b"), dim("s"), blocks.into(), block.into()];
    let cut = g.add(Op::Reshape { shape: apart }, &[gated]).unwrap();
    let size = map(&mut g, Scalar::Abs, &[cut]);
    let most = g.add(Op::Reduce { monoid, axes: vec![3] }, &[size]).unwrap();
    let most = map(&mut g, Scalar::Add, &[most, of_rows]);
    let none = map(&mut g, Scalar::Equal, &[most, zero]);
    let inverse = map(&mut g, Scalar::Div, &[largest, most]);
    let inverse = map(&mut g, Scalar::Select, &[none, zero, inverse]);
    let scaled = map(&mut g, Scalar::Mul, &[cut, inverse]);
    let rounded = map(&mut g, Scalar::Round, &[scaled]);
    let scale = map(&mut g, Scalar::Div, &[most, largest]);
    let back = map(&mut g, Scalar::Mul, &[rounded, scale]);
    // Another use of what was spread to the elements of rows.
    let back = map(&mut g, Scalar::Sub, &[back, scale]);
    let y = g.add(Op::Reshape { shape: joined }, &[back]).unwrap();
    output(&mut g, "y", y);
    g
}

#[test]
fn short_rows_are_reduced_within_elementwise_regions() {
    let mut random = Random::new(12);
    for (cut, is_one) in [
        ([3, 32], true),
        ([2, 5], true),
        ([1, 512], true),
        ([7, 33], true),
        ([2, 600], false),
        ([4, 1], false),
    ] {
        for monoid in Monoid::ALL {
            let g = rounded_by_blocks(monoid, cut);
            let steps = lower(&g).regions.into_iter().filter(|r| r.kernel != Kernel::Leaf).count();
            assert_eq!(steps == 1, is_one, "{cut:?}: {steps} regions");
            for (b, s) in [(1, 1), (3, 200), (0, 5)] {
                let shape = [b, s, cut[0] * cut[1]];
                let inputs = [("x".to_string(), random.tensor(F32, &shape))].into();
                let what = format!("{monoid:?} of {cut:?}, b={b} s={s}");
                check_fusion(g.clone(), &inputs, &what);
                if b * s < 2 {
                    check(g.clone(), &inputs, &what);
                }
            }
        }
    }
}

#[test]
fn what_others_use_too_is_not_within_a_region() {
    let mut random = Random::new(13);
    let inputs = [("x".to_string(), random.tensor(F32, &[2, 3, 64]))].into();
    let whole = rounded_by_blocks(Monoid::Max, [2, 32]);
    let values: Vec<_> = whole.values().map(|(value, node)| (value, node.op.is_leaf())).collect();
    for (value, _) in values.into_iter().filter(|(_, leaf)| !leaf) {
        let mut g = whole.clone();
        if g.ty(value).dtype == F32 && !g.outputs.iter().any(|o| o.value == value) {
            output(&mut g, "more", value);
            assert!(lower(&g).regions.iter().filter(|r| r.kernel != Kernel::Leaf).count() > 1);
            check_fusion(g, &inputs, &format!("{value} is an output"));
        }
    }
}

#[test]
fn contractions() {
    let mut random = Random::new(3);
    let specs: [(&str, &[usize], &[usize]); 14] = [
        ("bsk,kn->bsn", &[2, 5, 7], &[7, 33]),
        ("bsk,nk->bsn", &[1, 1, 64], &[9, 64]),
        ("bhsd,bhtd->bhst", &[2, 3, 4, 8], &[2, 3, 5, 8]),
        ("bshd,bthd->bhst", &[2, 4, 3, 8], &[2, 5, 3, 8]),
        ("bhst,bthd->bshd", &[2, 3, 4, 5], &[2, 5, 3, 8]),
        ("ij,jk->ki", &[6, 7], &[7, 4]),
        ("i,j->ij", &[6], &[4]),
        ("i,i->", &[50], &[50]),
        ("i,i->i", &[9], &[9]),
        ("kn,bsk->bsn", &[7, 3], &[2, 4, 7]),
        ("bk,kn->bn", &[0, 7], &[7, 3]),
        ("bk,kn->bn", &[2, 0], &[0, 3]),
        ("abk,ck->bca", &[2, 3, 5], &[4, 5]),
        ("ij,jk->k", &[2, 3], &[3, 4]),
    ];
    for (spec, a, b) in specs {
        for dtype in [F32, F16, BF16, F64] {
            check_op(Op::Einsum(EinsumSpec::parse(spec).unwrap()), &[(dtype, a), (dtype, b)], &mut random);
        }
        // The same with constant operands, which are packed.
        for constant in [0, 1] {
            let mut g = Graph::new("packed");
            let shapes = [a, b];
            let values: Vec<_> = (0..2)
                .map(|i| match i == constant {
                    true => weight(&mut g, "w", F32, shapes[i]),
                    false => g.input("x", ty(F32, shapes[i])),
                })
                .collect();
            let y = g.add(Op::Einsum(EinsumSpec::parse(spec).unwrap()), &values).unwrap();
            output(&mut g, "y", y);
            let inputs = [("x".to_string(), random.tensor(F32, shapes[1 - constant]))].into();
            check(g, &inputs, &format!("{spec} with operand {constant} packed"));
        }
    }
}

#[test]
fn rows() {
    let mut random = Random::new(4);
    for dtype in [F32, F16, F64, I64] {
        for monoid in Monoid::ALL {
            for axes in [vec![1], vec![0, 2], vec![0, 1, 2], vec![]] {
                check_op(Op::Reduce { monoid, axes }, &[(dtype, &[3, 4, 5])], &mut random);
            }
        }
    }
    check_op(Op::Reduce { monoid: Monoid::Sum, axes: vec![1] }, &[(F32, &[3, 0])], &mut random);
    check_op(Op::Reduce { monoid: Monoid::Max, axes: vec![1] }, &[(F32, &[3, 0])], &mut random);
    for axis in 0..3 {
        check_op(Op::Softmax { axis }, &[(F32, &[3, 4, 50])], &mut random);
        check_op(Op::Softmax { axis }, &[(F16, &[2, 4, 3])], &mut random);
        check_op(Op::Softmax { axis }, &[(F32, &[3, 0, 5])], &mut random);
        for kind in [NormKind::Layer, NormKind::Rms] {
            let tail = &[3, 4, 5][axis..];
            let op = || Op::Norm { kind, axis, epsilon: Real(1e-5) };
            check_op(op(), &[(F32, &[3, 4, 5]), (F32, tail)], &mut random);
            check_op(op(), &[(F32, &[3, 4, 5]), (F32, tail), (F32, tail)], &mut random);
        }
    }
    for interleaved in [false, true] {
        let op = || Op::Rotary { interleaved };
        check_op(op(), &[(F32, &[2, 3, 4, 8]), (F32, &[4, 4]), (F32, &[4, 4])], &mut random);
        check_op(op(), &[(F32, &[2, 3, 4, 8]), (F32, &[2, 1, 4, 4]), (F32, &[2, 1, 4, 4])], &mut random);
    }
}

#[test]
fn attention() {
    let mut random = Random::new(5);
    let cases: [(usize, usize, usize, usize, &[u32]); 10] = [
        (2, 1, 9, 2, &[0, 0, 0, 0, 1, 1, 1, 1]),
        (1, 1, 33, 3, &[2, 2, 1, 1, 0, 0]),
        (3, 1, 17, 1, &[0, 0, 0, 0, 0, 0]),
        (1, 1, 5, 2, &[0, 0, 1]),
        (2, 3, 5, 3, &[0, 1, 2]),
        (1, 1, 9, 2, &[0, 0, 1, 1]),
        (2, 4, 0, 1, &[0, 0]),
        (2, 0, 4, 1, &[0]),
        (1, 2, 3, 2, &[1, 0, 1]),
        (1, 700, 200, 1, &[0]),
    ];
    for (b, s, t, g, heads) in cases {
        for (softcap, zero) in [(None, false), (Some(Real(3.0)), true)] {
            let op = || Op::Attention {
                scale: Real(0.25),
                softcap,
                kv_of_head: heads.to_vec(),
                empty_rows_zero: zero,
            };
            let (q, k, v) = ([b, heads.len(), s, 8], [b, g, t, 8], [b, g, t, 6]);
            check_op(op(), &[(F32, &q), (F32, &k), (F32, &v)], &mut random);
            check_op(op(), &[(F32, &q), (F32, &k), (F32, &v), (F32, &[b, 1, s, t])], &mut random);
            check_op(op(), &[(F32, &q), (F32, &k), (F32, &v), (F32, &[t])], &mut random);
            let every = [b, heads.len(), s, t];
            check_op(op(), &[(F32, &q), (F32, &k), (F32, &v), (F32, &every)], &mut random);
        }
    }
}

#[test]
fn rows_of_minus_infinity_are_nan_or_zero() {
    for empty_rows_zero in [false, true] {
        let mut g = Graph::new("masked");
        let x = g.input("x", ty(F32, &[1, 1, 2, 4]));
        let bias = g.input("bias", ty(F32, &[2, 2]));
        let op = Op::Attention { scale: Real(1.0), softcap: None, kv_of_head: vec![0], empty_rows_zero };
        let y = g.add(op, &[x, x, x, bias]).unwrap();
        let soft = g.add(Op::Softmax { axis: 1 }, &[bias]).unwrap();
        output(&mut g, "y", y);
        output(&mut g, "soft", soft);
        let low = f32::NEG_INFINITY;
        let bias = Tensor::from_vec(vec![2, 2], vec![low, low, 0.0, low]).unwrap();
        let inputs = [("x".into(), Random::new(6).tensor(F32, &[1, 1, 2, 4])), ("bias".into(), bias)].into();
        check(g, &inputs, &format!("empty_rows_zero: {empty_rows_zero}"));
    }
}

#[test]
fn movement() {
    let mut random = Random::new(8);
    let c = |v: i64| Dim::constant(v);
    for dtype in [F32, F16, F64, I64, U8, Bool] {
        let x: (DType, &[usize]) = (dtype, &[3, 4, 5]);
        check_op(Op::Transpose { perm: vec![2, 0, 1] }, &[x], &mut random);
        check_op(Op::Reshape { shape: vec![c(5), c(12)] }, &[x], &mut random);
        check_op(Op::Slice { axis: 1, start: c(3), length: c(2), step: -2 }, &[x], &mut random);
        check_op(Op::Slice { axis: 1, start: c(0), length: c(0), step: 1 }, &[x], &mut random);
        check_op(Op::Broadcast { shape: vec![c(2), c(3), c(4), c(5)] }, &[(dtype, &[3, 1, 5])], &mut random);
        check_op(Op::Concat { axis: 1 }, &[x, (dtype, &[3, 0, 5]), (dtype, &[3, 2, 5])], &mut random);
        check_op(Op::Append { axis: 2 }, &[x, (dtype, &[3, 4, 1])], &mut random);
        check_op(Op::Gather { axis: 1, window: None }, &[x, (I64, &[2, 3])], &mut random);
        check_op(Op::Gather { axis: 0, window: None }, &[x, (I32, &[])], &mut random);
        let window = TableWindow { start: c(2), extent: c(9) };
        check_op(Op::Gather { axis: 1, window: Some(window) }, &[x, (I64, &[6])], &mut random);
    }
    for mode in [PadMode::Constant(Real(1.5)), PadMode::Reflect, PadMode::Edge, PadMode::Wrap] {
        let op = |low: [i64; 2], high: [i64; 2]| Op::Pad {
            low: low.map(Dim::constant).to_vec(),
            high: high.map(Dim::constant).to_vec(),
            mode,
        };
        check_op(op([1, 2], [0, 1]), &[(F32, &[3, 4])], &mut random);
        check_op(op([-1, 0], [1, -2]), &[(F32, &[3, 4])], &mut random);
    }
    check_op(Op::GatherElements { axis: 1 }, &[(F32, &[3, 4]), (I64, &[3, 2])], &mut random);
    check_op(
        Op::Scan { monoid: Monoid::Sum, axis: 1, exclusive: true, reverse: false },
        &[(F32, &[3, 4])],
        &mut random,
    );
    check_op(Op::TopK { axis: 1, k: c(2), largest: true }, &[(F32, &[3, 4])], &mut random);
}

#[test]
fn windows() {
    let mut random = Random::new(9);
    let window = |kernel: &[usize], stride: usize, dilation: usize, pad: usize, ceil: bool| Window {
        kernel: kernel.to_vec(),
        strides: vec![stride; kernel.len()],
        dilations: vec![dilation; kernel.len()],
        pads_low: vec![pad; kernel.len()],
        pads_high: vec![pad; kernel.len()],
        ceil,
    };
    for (stride, dilation, pad) in [(1, 1, 0), (2, 1, 1), (1, 2, 2)] {
        for (groups, m) in [(1, 6), (2, 6), (4, 8)] {
            let w = window(&[3, 2], stride, dilation, pad, false);
            let op = Op::Conv { window: w, groups };
            check_op(op, &[(F32, &[2, 4, 9, 8]), (F32, &[m, 4 / groups, 3, 2])], &mut random);
        }
        let one = Op::Conv { window: window(&[3], stride, dilation, pad, false), groups: 1 };
        check_op(one, &[(F32, &[1, 2, 11]), (F32, &[3, 2, 3])], &mut random);
        let three = Op::Conv { window: window(&[2, 2, 2], stride, dilation, pad, false), groups: 1 };
        check_op(three, &[(F16, &[1, 2, 5, 4, 6]), (F16, &[3, 2, 2, 2, 2])], &mut random);
        for ceil in [false, true] {
            for kind in [
                PoolKind::Max,
                PoolKind::Average { count_padding: false },
                PoolKind::Average { count_padding: true },
                PoolKind::Lp { p: 2 },
                PoolKind::Lp { p: 3 },
            ] {
                let pad = pad.min(1);
                let op = Op::Pool { kind, window: window(&[3, 3], stride, dilation, pad, ceil) };
                check_op(op, &[(F32, &[2, 3, 10, 9])], &mut random);
            }
        }
    }
    let w = window(&[3, 2], 1, 1, 0, false);
    check_op(
        Op::Conv { window: w.clone(), groups: 1 },
        &[(F32, &[0, 4, 9, 8]), (F32, &[5, 4, 3, 2])],
        &mut random,
    );
    check_op(Op::Conv { window: w, groups: 1 }, &[(F32, &[2, 0, 9, 8]), (F32, &[5, 0, 3, 2])], &mut random);
}

#[test]
fn quantised_weights() {
    let mut random = Random::new(10);
    for q in [I8, U8, DType::I4, DType::U4, DType::F8E4M3FN] {
        for zero in [false, true] {
            if zero && !q.is_integer() {
                continue;
            }
            let mut g = Graph::new("dequant");
            let x = g.input("x", ty(F32, &[3, 8]));
            let mut args = vec![weight(&mut g, "q", q, &[8, 6]), weight(&mut g, "scale", F32, &[2, 6])];
            if zero {
                args.push(weight(&mut g, "zero", q, &[2, 6]));
            }
            let w = g.add(Op::Dequant { axis: 0, block: 4 }, &args).unwrap();
            let y = g.add(Op::Einsum(EinsumSpec::parse("ik,kn->in").unwrap()), &[x, w]).unwrap();
            output(&mut g, "y", y);
            output(&mut g, "w", w);
            let inputs: BTreeMap<_, _> = [("x".to_string(), random.tensor(F32, &[3, 8]))].into();
            check(g, &inputs, &format!("{q}, zero points: {zero}"));
        }
    }
}

/// Blocks that are packed as they are, with zero points of the codes' type, of another, and none.
#[test]
fn quantised_weights_that_stay_quantised() {
    let mut random = Random::new(11);
    let (depth, columns, block) = (96, 50, 32);
    let blocks = depth / block;
    for (q, centre) in [(I8, 0u8), (U8, 128), (DType::I4, 0), (DType::U4, 8)] {
        for (depth_first, rows) in [(false, 1), (true, 1), (false, 3), (true, 20)] {
            for zero in ["none", "own", "stretched"] {
                if zero == "stretched" && !matches!(q, U8 | DType::U4) {
                    continue;
                }
                let shape = |depth: usize| if depth_first { [depth, columns] } else { [columns, depth] };
                let mut g = Graph::new("quantised");
                let x = g.input("x", ty(F32, &[rows, depth]));
                let scale = weight(&mut g, "scale", F32, &shape(blocks));
                let mut args = vec![weight(&mut g, "q", q, &shape(depth)), scale];
                match zero {
                    "own" => args.push(weight(&mut g, "zero", q, &shape(blocks))),
                    "stretched" => {
                        let one = Tensor::scalar(centre);
                        let one = g.add(Op::Literal(Literal(one.into())), &[]).unwrap();
                        let shape = shape(blocks).map(Dim::from).to_vec();
                        args.push(g.add(Op::Broadcast { shape }, &[one]).unwrap());
                    }
                    _ => {}
                }
                let axis = usize::from(!depth_first);
                let w = g.add(Op::Dequant { axis, block }, &args).unwrap();
                let spec = if depth_first { "ik,kn->in" } else { "ik,nk->in" };
                let y = g.add(Op::Einsum(EinsumSpec::parse(spec).unwrap()), &[x, w]).unwrap();
                output(&mut g, "y", y);
                let constant = lower(&g).constant_values(&g);
                assert!(constant[w.index()], "{q}, {zero}: widened in every step");
                let inputs: BTreeMap<_, _> = [("x".to_string(), random.tensor(F32, &[rows, depth]))].into();
                let weights = random_weights(&g, &mut random);
                let expected = reference(&g, &weights, &inputs).remove(0).1;
                let found = run(&replicated(g, 1), &weights, &inputs).unwrap().outputs.remove("y").unwrap();
                // Terms of either sign are summed in another order: what counts is their size, not that of the sum.
                let (found, expected) =
                    (found.tensor.as_slice::<f32>().unwrap(), expected.as_slice::<f32>().unwrap());
                let largest = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
                for (i, (a, b)) in found.iter().zip(expected).enumerate() {
                    let close = (a - b).abs() <= 1e-6 * largest;
                    assert!(
                        close,
                        "{q}, {spec}, {rows} rows, zero points {zero}, element {i}: {a}, expected {b}"
                    );
                }
            }
        }
    }
}
