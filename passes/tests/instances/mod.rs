//! Small instances of every operation and attribute variant. Extents are chosen so that some meshes split them evenly,
//! some unevenly, and some leave ranks with nothing.

// Each test uses its own part of this.
#![allow(dead_code)]

pub(crate) mod execute;

use std::sync::Arc;
use tpshard_ir::op::{EinsumSpec, Literal, NormKind, PadMode, PoolKind, Real, Window};
use tpshard_ir::weight::WeightExpr;
use tpshard_ir::{Bindings, DType, Dim, Monoid, Op, Scalar, Tensor, Type, infer};

/// An operation on operands of given types.
pub(crate) struct Instance {
    pub(crate) name: String,
    pub(crate) op: Op,
    pub(crate) args: Vec<Type>,
    pub(crate) result: Type,
    /// Per operand, the number of things it indexes, if it holds indices.
    pub(crate) indexes: Vec<Option<usize>>,
}

/// The values symbols have when instances are executed.
pub(crate) fn bindings() -> Bindings {
    [("b".into(), 3), ("s".into(), 5)].into()
}

/// A type from text such as `f32[5, b*s, 4]`.
pub(crate) fn ty(text: &str) -> Type {
    let (dtype, rest) = text.split_once('[').unwrap();
    let dims = rest.strip_suffix(']').unwrap();
    let factor = |t: &str| t.trim().parse::<i64>().map_or_else(|_| Dim::symbol(t.trim()), Dim::constant);
    let dim = |t: &str| t.split('*').fold(Dim::constant(1), |product, t| product * factor(t));
    let shape = if dims.is_empty() { vec![] } else { dims.split(',').map(dim).collect() };
    Type::new(dtype.parse().unwrap(), shape)
}

struct List(Vec<Instance>);

impl List {
    fn add(&mut self, name: &str, op: Op, args: &[&str]) {
        self.indexed(name, op, args, &[]);
    }

    /// As `add`; `indexes` are pairs of an operand and the number of things it indexes.
    fn indexed(&mut self, name: &str, op: Op, args: &[&str], indexes: &[(usize, usize)]) {
        let args: Vec<Type> = args.iter().map(|t| ty(t)).collect();
        let result = infer(&op, &args.iter().collect::<Vec<_>>()).unwrap_or_else(|e| panic!("{name}: {e}"));
        let mut bounds = vec![None; args.len()];
        for &(operand, bound) in indexes {
            bounds[operand] = Some(bound);
        }
        self.0.push(Instance { name: name.into(), op, args, result, indexes: bounds });
    }
}

fn window(kernel: &[usize]) -> Window {
    let n = kernel.len();
    Window {
        kernel: kernel.to_vec(),
        strides: vec![1; n],
        dilations: vec![1; n],
        pads_low: vec![0; n],
        pads_high: vec![0; n],
        ceil: false,
    }
}

pub(crate) fn all() -> Vec<Instance> {
    let mut list = List(Vec::new());
    leaves(&mut list);
    pointwise(&mut list);
    contractions(&mut list);
    movement(&mut list);
    indices(&mut list);
    composites(&mut list);
    list.0
}

fn leaves(list: &mut List) {
    let values: Vec<f32> = (0u8..15).map(f32::from).collect();
    let literal = Tensor::from_vec(vec![5, 3], values).unwrap();
    list.add("literal", Op::Literal(Literal(Arc::new(literal))), &[]);
    list.add("literal_scalar", Op::Literal(Literal(Arc::new(Tensor::scalar(2f32)))), &[]);
    list.add("size", Op::Size(Dim::symbol("s")), &[]);
    list.add("iota", Op::Iota { start: Dim::constant(2), length: Dim::constant(7) }, &[]);
    list.add("iota_symbolic", Op::Iota { start: Dim::symbol("b"), length: Dim::symbol("s") }, &[]);
    let weight = WeightExpr::initializer("w", DType::F32, vec![5, 6]).unwrap();
    list.add("weight", Op::Weight(weight.transpose(vec![1, 0]).unwrap()), &[]);
}

fn pointwise(list: &mut List) {
    for (name, scalar) in [
        ("neg", Scalar::Neg),
        ("exp", Scalar::Exp),
        ("reciprocal", Scalar::Reciprocal),
        ("cast_narrower", Scalar::Cast(DType::F16)),
        ("cast_wider", Scalar::Cast(DType::F64)),
        ("cast_int", Scalar::Cast(DType::I32)),
        ("is_nan", Scalar::IsNan),
    ] {
        list.add(name, Op::Map(scalar), &["f32[5, 4]"]);
    }
    for (name, scalar) in [
        ("add", Scalar::Add),
        ("sub", Scalar::Sub),
        ("mul", Scalar::Mul),
        ("div", Scalar::Div),
        ("pow", Scalar::Pow),
        ("min", Scalar::Min),
        ("max", Scalar::Max),
        ("less", Scalar::Less),
    ] {
        list.add(name, Op::Map(scalar), &["f32[6, 5]", "f32[6, 5]"]);
    }
    list.add("add_row", Op::Map(Scalar::Add), &["f32[6, 5]", "f32[5]"]);
    list.add("mul_column", Op::Map(Scalar::Mul), &["f32[6, 1]", "f32[6, 5]"]);
    list.add("mul_outer", Op::Map(Scalar::Mul), &["f32[6, 1]", "f32[1, 5]"]);
    list.add("add_scalar", Op::Map(Scalar::Add), &["f32[2, 3, 4]", "f32[]"]);
    list.add("add_symbolic", Op::Map(Scalar::Add), &["f32[b, s, 4]", "f32[s, 4]"]);
    list.add("mul_integers", Op::Map(Scalar::Mul), &["i64[6]", "i64[6]"]);
    list.add("div_integers", Op::Map(Scalar::Div), &["i64[6]", "i64[6]"]);
    list.add("and", Op::Map(Scalar::And), &["bool[3, 4]", "bool[4]"]);
    list.add("not", Op::Map(Scalar::Not), &["bool[4]"]);
    list.add("select", Op::Map(Scalar::Select), &["bool[4, 1]", "f32[4, 5]", "f32[5]"]);
    list.add("scalar_neg", Op::Map(Scalar::Neg), &["f32[]"]);
    for monoid in Monoid::ALL {
        for (exclusive, reverse) in [(false, false), (true, true)] {
            let name = format!("scan_{monoid}{}", if exclusive { "_exclusive_reverse" } else { "" });
            list.add(&name, Op::Scan { monoid, axis: 1, exclusive, reverse }, &["f32[3, 4]"]);
        }
    }
    list.add("top_k", Op::TopK { axis: 1, k: Dim::constant(3), largest: true }, &["f32[5, 6]"]);
    list.add("top_k_least", Op::TopK { axis: 0, k: Dim::constant(2), largest: false }, &["f32[5, 6]"]);
}

fn contractions(list: &mut List) {
    for (spec, a, b) in [
        ("mk,kn->mn", "f32[4, 6]", "f32[6, 5]"),
        ("bsk,kn->bsn", "f32[b, s, 6]", "f32[6, 8]"),
        ("bhsd,bhtd->bhst", "f32[2, 3, 4, 2]", "f32[2, 3, 5, 2]"),
        ("ij,kj->ik", "f32[3, 5]", "f32[4, 5]"),
        ("i,j->ij", "f32[3]", "f32[4]"),
        ("i,i->", "f32[7]", "f32[7]"),
        ("ij,j->", "f32[3, 4]", "f32[4]"),
        ("bij,bjk->kib", "f32[4, 2, 3]", "f32[4, 3, 5]"),
    ] {
        list.add(&format!("einsum {spec}"), Op::Einsum(EinsumSpec::parse(spec).unwrap()), &[a, b]);
    }
    let integers = EinsumSpec::parse("mk,kn->mn").unwrap();
    list.add("einsum integers", Op::Einsum(integers), &["i32[2, 5]", "i32[5, 3]"]);
    for monoid in Monoid::ALL {
        list.add(&format!("reduce_{monoid}"), Op::Reduce { monoid, axes: vec![1] }, &["f32[4, 5, 3]"]);
    }
    list.add("reduce_all", Op::Reduce { monoid: Monoid::Sum, axes: vec![0, 1] }, &["f32[4, 5]"]);
    list.add("reduce_integers", Op::Reduce { monoid: Monoid::Max, axes: vec![0] }, &["i64[5, 2]"]);
    list.add("reduce_bool", Op::Reduce { monoid: Monoid::Max, axes: vec![0] }, &["bool[5, 2]"]);
    list.add("reduce_symbolic", Op::Reduce { monoid: Monoid::Sum, axes: vec![1] }, &["f32[b, s]"]);
    let conv = |groups| Op::Conv { window: window(&[2, 2]), groups };
    list.add("conv", conv(1), &["f32[3, 4, 3, 3]", "f32[5, 4, 2, 2]"]);
    list.add("conv_grouped", conv(3), &["f32[2, 6, 3, 3]", "f32[9, 2, 2, 2]"]);
    list.add("conv_depthwise", conv(4), &["f32[1, 4, 3, 3]", "f32[4, 1, 2, 2]"]);
    let strided = Window {
        strides: vec![2],
        dilations: vec![2],
        pads_low: vec![1],
        pads_high: vec![2],
        ..window(&[3])
    };
    list.add(
        "conv_strided",
        Op::Conv { window: strided.clone(), groups: 1 },
        &["f32[2, 3, 9]", "f32[4, 3, 3]"],
    );
    for (name, kind) in [
        ("pool_max", PoolKind::Max),
        ("pool_average", PoolKind::Average { count_padding: false }),
        ("pool_average_padding", PoolKind::Average { count_padding: true }),
        ("pool_lp", PoolKind::Lp { p: 2 }),
    ] {
        list.add(name, Op::Pool { kind, window: strided.clone() }, &["f32[3, 4, 9]"]);
    }
    list.add("dequant", Op::Dequant { axis: 0, block: 4 }, &["i8[12, 5]", "f32[3, 5]", "i8[3, 5]"]);
    list.add("dequant_no_zero", Op::Dequant { axis: 1, block: 2 }, &["u8[3, 10]", "f32[3, 5]"]);
    list.add("dequant_ragged", Op::Dequant { axis: 0, block: 4 }, &["i8[10, 3]", "f32[3, 3]"]);
    list.add("dequant_channel", Op::Dequant { axis: 0, block: 6 }, &["i8[6, 4]", "f32[1, 4]", "i8[1, 4]"]);
}

fn movement(list: &mut List) {
    let shape = |text: &str| ty(&format!("f32[{text}]")).shape;
    for (name, to, from) in [
        ("broadcast_new", "3, 4, 5", "f32[4, 5]"),
        ("broadcast_stretch", "4, 5", "f32[4, 1]"),
        ("broadcast_scalar", "5", "f32[]"),
        ("broadcast_symbolic", "b, s, 4", "f32[s, 4]"),
    ] {
        list.add(name, Op::Broadcast { shape: shape(to) }, &[from]);
    }
    for (name, to, from) in [
        ("reshape_split", "5, 16", "f32[80]"),
        ("reshape_merge", "80", "f32[5, 16]"),
        ("reshape_heads", "b, s, 6, 2", "f32[b, s, 12]"),
        ("reshape_heads_back", "b, s, 12", "f32[b, s, 6, 2]"),
        ("reshape_tokens", "b*s, 8", "f32[b, s, 8]"),
        ("reshape_tokens_back", "b, s, 4, 2", "f32[b*s, 8]"),
        ("reshape_regroup", "4, 6", "f32[6, 4]"),
        ("reshape_ones", "1, 6, 1", "f32[6]"),
        ("reshape_three", "2, 3, 4, 5", "f32[6, 20]"),
        ("reshape_repeat", "2, 3, 2", "f32[6, 2]"),
        ("reshape_empty", "0, 3", "f32[3, 0]"),
        ("reshape_scalar", "1, 1", "f32[]"),
    ] {
        list.add(name, Op::Reshape { shape: shape(to) }, &[from]);
    }
    list.add("transpose", Op::Transpose { perm: vec![2, 0, 1] }, &["f32[3, 4, 5]"]);
    let slice = |start: i64, length: i64, step| Op::Slice {
        axis: 1,
        start: Dim::constant(start),
        length: Dim::constant(length),
        step,
    };
    list.add("slice", slice(1, 3, 2), &["f32[5, 7]"]);
    list.add("slice_back", slice(6, 3, -2), &["f32[5, 7]"]);
    let pad = |low: [i64; 2], high: [i64; 2], mode| Op::Pad {
        low: low.map(Dim::constant).to_vec(),
        high: high.map(Dim::constant).to_vec(),
        mode,
    };
    list.add("pad_zero", pad([0, 1], [0, 2], PadMode::Constant(Real(0.0))), &["f32[5, 4]"]);
    list.add("pad_one", pad([0, 1], [0, 0], PadMode::Constant(Real(1.0))), &["f32[5, 4]"]);
    list.add("pad_reflect", pad([0, 1], [0, 2], PadMode::Reflect), &["f32[5, 4]"]);
    list.add("pad_edge", pad([0, 1], [0, 2], PadMode::Edge), &["f32[5, 4]"]);
    list.add("pad_wrap", pad([0, 1], [0, 2], PadMode::Wrap), &["f32[5, 4]"]);
    list.add("concat", Op::Concat { axis: 1 }, &["f32[5, 2]", "f32[5, 3]", "f32[5, 1]"]);
    list.add("append", Op::Append { axis: 2 }, &["f32[2, 3, s, 2]", "f32[2, 3, 1, 2]"]);
}

fn indices(list: &mut List) {
    let gather = |axis| Op::Gather { axis, window: None };
    list.indexed("gather_rows", gather(0), &["f32[7, 4]", "i64[2, 3]"], &[(1, 7)]);
    list.indexed("gather_columns", gather(1), &["f32[3, 7, 2]", "i64[5]"], &[(1, 7)]);
    list.indexed("gather_scalar", gather(1), &["f32[3, 7]", "i32[]"], &[(1, 7)]);
    list.indexed("gather_bool", gather(0), &["bool[7, 4]", "i64[3]"], &[(1, 7)]);
    list.indexed("gather_storage", gather(0), &["u4[7, 4]", "i64[3]"], &[(1, 7)]);
    let elements = |axis| Op::GatherElements { axis };
    list.indexed("gather_elements", elements(1), &["f32[4, 5]", "i64[4, 3]"], &[(1, 5)]);
    list.indexed("gather_elements_part", elements(0), &["f32[6, 5]", "i64[4, 3]"], &[(1, 6)]);
    let nd = |batch_dims| Op::GatherNd { batch_dims };
    list.indexed("gather_nd", nd(0), &["f32[4, 3, 5]", "i64[6, 2]"], &[(1, 3)]);
    list.indexed("gather_nd_batch", nd(1), &["f32[4, 3, 5]", "i64[4, 2, 1]"], &[(1, 3)]);
    for monoid in [None, Some(Monoid::Sum), Some(Monoid::Max), Some(Monoid::Prod)] {
        let name = monoid.map_or("replace", Monoid::name);
        list.indexed(
            &format!("scatter_elements_{name}"),
            Op::ScatterElements { axis: 1, monoid },
            &["f32[4, 5]", "i64[4, 3]", "f32[4, 3]"],
            &[(1, 5)],
        );
        list.indexed(
            &format!("scatter_nd_{name}"),
            Op::ScatterNd { monoid },
            &["f32[3, 5, 4]", "i64[2, 1]", "f32[2, 5, 4]"],
            &[(1, 3)],
        );
    }
    list.indexed(
        "scatter_elements_part",
        Op::ScatterElements { axis: 0, monoid: None },
        &["f32[6, 5]", "i64[4, 3]", "f32[4, 3]"],
        &[(1, 6)],
    );
}

fn composites(list: &mut List) {
    list.add("softmax", Op::Softmax { axis: 1 }, &["f32[4, 5, 3]"]);
    let norm = |kind, axis| Op::Norm { kind, axis, epsilon: Real(1e-5) };
    list.add("layer_norm", norm(NormKind::Layer, 1), &["f32[5, 6]", "f32[6]", "f32[6]"]);
    list.add("rms_norm", norm(NormKind::Rms, 2), &["f32[b, s, 6]", "f32[6]"]);
    list.add("layer_norm_two_dims", norm(NormKind::Layer, 1), &["f32[5, 2, 3]", "f32[2, 3]", "f32[2, 3]"]);
    let attention = |map: &[u32], softcap: Option<f64>| Op::Attention {
        scale: Real(0.5),
        softcap: softcap.map(Real),
        kv_of_head: map.to_vec(),
        empty_rows_zero: false,
    };
    list.add(
        "attention",
        attention(&[0, 1, 2, 3], None),
        &["f32[2, 4, 3, 2]", "f32[2, 4, 5, 2]", "f32[2, 4, 5, 3]"],
    );
    list.add(
        "attention_grouped",
        attention(&[0, 0, 1, 1, 2, 2], Some(3.0)),
        &["f32[2, 6, 3, 2]", "f32[2, 3, 4, 2]", "f32[2, 3, 4, 5]", "f32[2, 6, 3, 4]"],
    );
    list.add(
        "attention_one_kv_head",
        attention(&[0, 0, 0, 0], None),
        &["f32[3, 4, 2, 2]", "f32[3, 1, 4, 2]", "f32[3, 1, 4, 2]", "f32[2, 4]"],
    );
    list.add(
        "attention_irregular",
        attention(&[0, 1, 0, 1], None),
        &["f32[1, 4, 2, 2]", "f32[1, 2, 3, 2]", "f32[1, 2, 3, 2]", "f32[1, 1, 2, 3]"],
    );
    list.add(
        "attention_symbolic",
        attention(&[0, 0, 1, 1], None),
        &["f32[b, 4, s, 2]", "f32[b, 2, s, 2]", "f32[b, 2, s, 2]", "f32[b, 1, s, s]"],
    );
    list.add("rotary", Op::Rotary { interleaved: false }, &["f32[2, 3, 5, 4]", "f32[5, 2]", "f32[5, 2]"]);
    list.add(
        "rotary_interleaved",
        Op::Rotary { interleaved: true },
        &["f32[b, 3, s, 4]", "f32[b, 1, s, 2]", "f32[b, 1, s, 2]"],
    );
}
