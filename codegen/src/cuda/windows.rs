//! Convolution and pooling: every thread sums the window of one element of the result, directly.

use super::emit::{Emitter, Made};
use super::text::{Call, load, store, wide_type};
use tpshard_ir::op::{PoolKind, Window};
use tpshard_ir::{DType, Dim, Node, ValueId};

/// Most spatial dims.
const MAX_SPATIAL: usize = 3;

fn is_real(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F16 | DType::BF16 | DType::F64)
}

/// Begins the loops over the taps of a window. Behind them, `p0`, `p1`, … say which element a tap reads (it may lie outside),
/// and the expression that comes back is true if it lies inside.
fn taps(call: &mut Call, window: &Window, out: &[String], spatial: &[Dim]) -> (Vec<String>, String) {
    let (mut places, mut inside) = (Vec::new(), Vec::new());
    for (d, (coordinate, extent)) in out.iter().zip(spatial).enumerate() {
        let of = |list: &[usize]| list.get(d).copied().unwrap_or(1);
        let (kernel, stride, dilation) = (of(&window.kernel), of(&window.strides), of(&window.dilations));
        let low = window.pads_low.get(d).copied().unwrap_or(0);
        call.line(format!("for (int k{d} = 0; k{d} < {kernel}; k{d}++) {{"));
        call.line(format!("i64 p{d} = {coordinate} * {stride}LL + k{d} * {dilation}LL - {low}LL;"));
        let extent = call.variable(extent);
        inside.push(format!("p{d} >= 0 && p{d} < {extent}"));
        places.push(format!("p{d}"));
    }
    (places, inside.join(" && "))
}

pub(super) fn conv(
    emitter: &mut Emitter<'_>,
    value: ValueId,
    node: &Node,
    window: &Window,
    groups: usize,
) -> Made {
    let &[x, w] = node.args.as_slice() else { return Made::Not };
    let (x, w) = (emitter.operand(x), emitter.operand(w));
    let (Some(spatial), Some(channels)) = (x.shape.get(2..), w.shape.get(1)) else { return Made::Not };
    let Some(per_group) = w.shape.first().and_then(|m| m.exact_div(&Dim::from(groups.max(1)))) else {
        return Made::Not;
    };
    if !is_real(x.dtype) || spatial.len() > MAX_SPATIAL || per_group.is_zero() {
        return Made::Not;
    }
    let wide = wide_type(x.dtype);
    let mut call = Call::new();
    let source = call.read("x", x.dtype, x.view.base, &x.view.offset);
    let weights = call.read("w", w.dtype, w.view.base, &w.view.offset);
    let out = call.write("y", x.dtype, value, &Dim::constant(0));
    let count = node.ty.elements();
    call.for_each("i", &count);
    let coordinates = call.coordinates(&node.ty.shape, "i");
    let [n, m, place @ ..] = coordinates.as_slice() else { return Made::Not };
    let (per_group, channels) = (call.variable(&per_group), call.variable(channels));
    call.line(format!("i64 first = {m} / {per_group} * {channels};"));
    call.line(format!("{wide} sum = 0;"));
    call.line(format!("for (i64 c = 0; c < {channels}; c++) {{"));
    let (places, inside) = taps(&mut call, window, place, spatial);
    let x_at: Vec<String> =
        [n.clone(), "(first + c)".into()].into_iter().chain(places.iter().cloned()).collect();
    let w_at: Vec<String> =
        [m.clone(), "c".into()].into_iter().chain((0..places.len()).map(|d| format!("k{d}"))).collect();
    let (x_place, w_place) = (call.sum(&x_at, &x.view.strides), call.sum(&w_at, &w.view.strides));
    let (element, weight) = (load(x.dtype, &source, &x_place), load(w.dtype, &weights, &w_place));
    call.line(format!("if ({inside}) sum += {element} * {weight};"));
    places.iter().for_each(|_| call.line("}"));
    call.line("}");
    call.line(store(&out, "i", "sum"));
    call.line("}");
    let family = format!("conv{}d_{}", spatial.len(), x.dtype);
    Made::Calls(vec![call.over(emitter.kernels, &family, &count)])
}

pub(super) fn pool(
    emitter: &mut Emitter<'_>,
    value: ValueId,
    node: &Node,
    kind: PoolKind,
    window: &Window,
) -> Made {
    let Some(&arg) = node.args.first() else { return Made::Not };
    let x = emitter.operand(arg);
    let Some(spatial) = x.shape.get(2..) else { return Made::Not };
    if !is_real(x.dtype) || spatial.len() > MAX_SPATIAL || matches!(kind, PoolKind::Lp { .. }) {
        return Made::Not;
    }
    let wide = wide_type(x.dtype);
    let mut call = Call::new();
    let source = call.read("x", x.dtype, x.view.base, &x.view.offset);
    let out = call.write("y", x.dtype, value, &Dim::constant(0));
    let count = node.ty.elements();
    call.for_each("i", &count);
    let coordinates = call.coordinates(&node.ty.shape, "i");
    let [n, c, place @ ..] = coordinates.as_slice() else { return Made::Not };
    let first = if kind == PoolKind::Max { "-INFINITE" } else { "0" };
    call.line(format!("{wide} all = {first};"));
    call.line("i64 taps = 0;");
    let (places, inside) = taps(&mut call, window, place, spatial);
    let x_at: Vec<String> = [n.clone(), c.clone()].into_iter().chain(places.iter().cloned()).collect();
    let x_place = call.sum(&x_at, &x.view.strides);
    let element = load(x.dtype, &source, &x_place);
    match kind {
        PoolKind::Max => call.line(format!("if ({inside}) all = maximum(all, {element});")),
        PoolKind::Average { count_padding } => {
            // With padding, taps count that lie in the data or the stated padding, not past it.
            let counted: Vec<String> = spatial
                .iter()
                .enumerate()
                .map(|(d, extent)| {
                    let high = window.pads_high.get(d).copied().unwrap_or(0);
                    format!("p{d} < {} + {high}LL", call.variable(extent))
                })
                .collect();
            let counted = if count_padding { counted.join(" && ") } else { inside.clone() };
            call.line(format!("if ({counted}) taps++;"));
            call.line(format!("if ({inside}) all += {element};"));
        }
        PoolKind::Lp { .. } => {}
    }
    places.iter().for_each(|_| call.line("}"));
    let result = if kind == PoolKind::Max { "all".to_string() } else { format!("all / ({wide})taps") };
    call.line(store(&out, "i", &result));
    call.line("}");
    let name = if kind == PoolKind::Max { "max_pool" } else { "average_pool" };
    Made::Calls(vec![call.over(emitter.kernels, &format!("{name}_{}", x.dtype), &count)])
}
