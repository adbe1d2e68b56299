//! Kernels over rows: softmax, norms, reductions, scans, the best entries.
//!
//! A block takes one row at a time; its threads walk the row in strides and combine what they found. Rows may lie in any
//! way: the dims of a row and the dims that number the rows are two iteration spaces. Short rows are taken by one thread.

use super::emit::{Emitter, Made, Operand};
use super::movement::identity;
use super::space::Offsets;
use super::text::{Call, THREADS, load, store, wide_type};
use super::views::dense;
use tpshard_ir::layout::Monoid;
use tpshard_ir::op::NormKind;
use tpshard_ir::{DType, Dim, Node, ValueId};

/// Rows up to this length are reduced by one thread each.
const SHORT: usize = 64;
/// Most entries that are picked one by one.
const MOST_PICKS: usize = 256;

/// A shape cut into the dims that number rows and the dims of a row.
struct Rows {
    rows: Offsets,
    inner: Offsets,
}

impl Rows {
    /// `operands` are strides over all of `shape`.
    fn new(shape: &[Dim], is_inner: &dyn Fn(usize) -> bool, operands: &[&[Dim]]) -> Rows {
        let part = |wanted: bool| {
            let pick = |of: &[Dim]| -> Vec<Dim> {
                of.iter()
                    .enumerate()
                    .filter(|(dim, _)| is_inner(*dim) == wanted)
                    .map(|(_, d)| d.clone())
                    .collect()
            };
            let strides: Vec<Vec<Dim>> = operands.iter().map(|o| pick(o)).collect();
            Offsets::new(&pick(shape), &strides.iter().map(Vec::as_slice).collect::<Vec<_>>())
        };
        Rows { rows: part(false), inner: part(true) }
    }
}

/// The pieces of a loop of a block's threads over a row: after this, `places` say where operands are.
fn walk(call: &mut Call, inner: &Offsets, bases: &[String]) -> Vec<String> {
    let count = call.variable(&inner.count());
    call.line(format!("for (i64 j = threadIdx.x; j < {count}; j += blockDim.x) {{"));
    let places = call.places(inner, "j");
    bases.iter().zip(places).map(|(base, place)| sum(base, &place)).collect()
}

fn sum(base: &str, place: &str) -> String {
    match (base, place) {
        ("0", place) => place.into(),
        (base, "0") => base.into(),
        (base, place) => format!("{base} + {place}"),
    }
}

/// Names for the first places of a row.
fn bases(call: &mut Call, rows: &Offsets, names: &[&str]) -> Vec<String> {
    let places = call.places(rows, "row");
    for (name, place) in names.iter().zip(&places) {
        call.line(format!("i64 {name} = {place};"));
    }
    names.iter().map(|&name| name.to_string()).collect()
}

/// `float` or `double`, and the suffix of C's functions for it.
fn real(dtype: DType) -> (&'static str, &'static str) {
    if dtype == DType::F64 { ("double", "") } else { ("float", "f") }
}

fn is_real(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F16 | DType::BF16 | DType::F64)
}

/// Threads for rows of `length`: a warp where rows are known to be short.
fn threads(length: &Dim) -> u32 {
    match length.as_size() {
        Some(..=128) => 32,
        Some(..=1024) => 128,
        _ => THREADS,
    }
}

pub(super) fn softmax(emitter: &mut Emitter<'_>, value: ValueId, node: &Node, axis: usize) -> Made {
    let Some(&arg) = node.args.first() else { return Made::Not };
    let x = emitter.operand(arg);
    if !is_real(x.dtype) {
        return Made::Not;
    }
    let (real, suffix) = real(x.dtype);
    let shape = &node.ty.shape;
    let space = Rows::new(shape, &|dim| dim == axis, &[&x.view.strides, &dense(shape)]);
    let mut call = Call::new();
    let source = call.read("x", x.dtype, x.view.base, &x.view.offset);
    let out = call.write("y", x.dtype, value, &Dim::constant(0));
    let rows = space.rows.count();
    call.for_each_row("row", &rows);
    let bases = bases(&mut call, &space.rows, &["from", "to"]);
    call.line(format!("{real} top = -INFINITE;"));
    let places = walk(&mut call, &space.inner, &bases);
    let [from, _] = places.as_slice() else { return Made::Not };
    call.line(format!("top = maximum(top, {});", load(x.dtype, &source, from)));
    call.line("}");
    call.line("top = block_reduce(top, Maximum());");
    call.line(format!("{real} sum = 0;"));
    let places = walk(&mut call, &space.inner, &bases);
    let [from, _] = places.as_slice() else { return Made::Not };
    call.line(format!("sum += exp{suffix}({} - top);", load(x.dtype, &source, from)));
    call.line("}");
    call.line("sum = block_reduce(sum, Add());");
    let places = walk(&mut call, &space.inner, &bases);
    let [from, to] = places.as_slice() else { return Made::Not };
    let share = format!("exp{suffix}({} - top) / sum", load(x.dtype, &source, from));
    call.line(store(&out, to, &share));
    call.line("}");
    call.line("}");
    let threads = threads(&space.inner.count());
    Made::Calls(vec![call.over_rows(emitter.kernels, &format!("softmax_{}", x.dtype), &rows, threads)])
}

pub(super) fn norm(
    emitter: &mut Emitter<'_>,
    value: ValueId,
    node: &Node,
    kind: NormKind,
    axis: usize,
    epsilon: f64,
) -> Made {
    let operands: Vec<Operand> = node.args.iter().map(|&arg| emitter.operand(arg)).collect();
    let Some(x) = operands.first() else { return Made::Not };
    if !is_real(x.dtype) || x.dtype == DType::F64 {
        return Made::Not;
    }
    let shape = &node.ty.shape;
    let mut strides: Vec<Vec<Dim>> = vec![x.view.strides.clone(), dense(shape)];
    strides.extend(operands.iter().skip(1).map(|o| o.strides_over(shape)));
    let space = Rows::new(shape, &|dim| dim >= axis, &strides.iter().map(Vec::as_slice).collect::<Vec<_>>());
    let mut call = Call::new();
    let source = call.read("x", x.dtype, x.view.base, &x.view.offset);
    let mut parameters = Vec::new();
    for (operand, name) in operands.iter().skip(1).zip(["scale", "bias"]) {
        parameters.push(call.read(name, operand.dtype, operand.view.base, &operand.view.offset));
    }
    let out = call.write("y", x.dtype, value, &Dim::constant(0));
    let epsilon = call.real(epsilon as f32);
    let (rows, length) = (space.rows.count(), space.inner.count());
    call.for_each_row("row", &rows);
    let mut bases = bases(&mut call, &space.rows, &["from", "to"]);
    bases.extend(parameters.iter().map(|_| "0".to_string()));
    let count = call.variable(&length);
    if kind == NormKind::Layer {
        call.line("float mean = 0;");
        let places = walk(&mut call, &space.inner, &bases);
        let Some(from) = places.first() else { return Made::Not };
        call.line(format!("mean += {};", load(x.dtype, &source, from)));
        call.line("}");
        call.line(format!("mean = block_reduce(mean, Add()) / {count};"));
    }
    let centred = |from: &str| match kind {
        NormKind::Layer => format!("{} - mean", load(x.dtype, &source, from)),
        NormKind::Rms => load(x.dtype, &source, from),
    };
    call.line("float squares = 0;");
    let places = walk(&mut call, &space.inner, &bases);
    let Some(from) = places.first() else { return Made::Not };
    call.line(format!("float d = {};", centred(from)));
    call.line("squares += d * d;");
    call.line("}");
    call.line("squares = block_reduce(squares, Add());");
    call.line(format!("float factor = 1 / sqrtf(squares / {count} + {epsilon});"));
    let places = walk(&mut call, &space.inner, &bases);
    let [from, to, at @ ..] = places.as_slice() else { return Made::Not };
    let mut result = format!("({}) * factor", centred(from));
    if let (Some(array), Some(place)) = (parameters.first(), at.first()) {
        result = format!("{result} * {}", load(x.dtype, array, place));
    }
    if let (Some(array), Some(place)) = (parameters.get(1), at.get(1)) {
        result = format!("{result} + {}", load(x.dtype, array, place));
    }
    call.line(store(&out, to, &result));
    call.line("}");
    call.line("}");
    let name = match kind {
        NormKind::Layer => "layer_norm",
        NormKind::Rms => "rms_norm",
    };
    let threads = threads(&length);
    Made::Calls(vec![call.over_rows(emitter.kernels, &format!("{name}_{}", x.dtype), &rows, threads)])
}

/// The type in which elements are combined, and the name of the operation in the prelude.
pub(super) fn combination(monoid: Monoid, dtype: DType) -> Option<(&'static str, &'static str)> {
    if dtype == DType::Bool || dtype.is_packed() || dtype.is_float() && !is_real(dtype) {
        return None;
    }
    let operation = match monoid {
        Monoid::Sum => "Add",
        Monoid::Prod => "Multiply",
        Monoid::Max => "Maximum",
        Monoid::Min => "Minimum",
    };
    Some((wide_type(dtype), operation))
}

pub(super) fn reduce(
    emitter: &mut Emitter<'_>,
    value: ValueId,
    node: &Node,
    monoid: Monoid,
    axes: &[usize],
) -> Made {
    let Some(&arg) = node.args.first() else { return Made::Not };
    let x = emitter.operand(arg);
    let Some((wide, operation)) = combination(monoid, x.dtype) else { return Made::Not };
    // The result has extent 1 along the axes, so its own strides do for the dims that number rows.
    let space = Rows::new(&x.shape, &|dim| axes.contains(&dim), &[&x.view.strides, &dense(&node.ty.shape)]);
    let inner = Offsets {
        extents: space.inner.extents.clone(),
        strides: space.inner.strides.iter().take(1).cloned().collect(),
    };
    let mut call = Call::new();
    let source = call.read("x", x.dtype, x.view.base, &x.view.offset);
    let out = call.write("y", x.dtype, value, &Dim::constant(0));
    let (rows, length) = (space.rows.count(), inner.count());
    let short = length.as_size().is_some_and(|length| length <= SHORT);
    if short {
        call.for_each("row", &rows);
    } else {
        call.for_each_row("row", &rows);
    }
    let bases = bases(&mut call, &space.rows, &["from", "to"]);
    call.line(format!("{wide} all = {};", identity(monoid, x.dtype)));
    let place = if short {
        let count = call.variable(&length);
        call.line(format!("for (i64 j = 0; j < {count}; j++) {{"));
        let place = call.places(&inner, "j").into_iter().next().unwrap_or_else(|| "0".into());
        sum("from", &place)
    } else {
        walk(&mut call, &inner, &bases).into_iter().next().unwrap_or_else(|| "from".into())
    };
    call.line(format!("all = {operation}()(all, {});", load(x.dtype, &source, &place)));
    call.line("}");
    if short {
        call.line(store(&out, "to", "all"));
        call.line("}");
        let family = format!("reduce_{monoid}_short_{}", x.dtype);
        return Made::Calls(vec![call.over(emitter.kernels, &family, &rows)]);
    }
    call.line(format!("all = block_reduce(all, {operation}());"));
    call.line(format!("if (threadIdx.x == 0) {}", store(&out, "to", "all")));
    call.line("}");
    let family = format!("reduce_{monoid}_{}", x.dtype);
    Made::Calls(vec![call.over_rows(emitter.kernels, &family, &rows, threads(&length))])
}

/// One thread walks a line.
pub(super) fn scan(
    emitter: &mut Emitter<'_>,
    value: ValueId,
    node: &Node,
    monoid: Monoid,
    axis: usize,
    [exclusive, reverse]: [bool; 2],
) -> Made {
    let Some(&arg) = node.args.first() else { return Made::Not };
    let x = emitter.operand(arg);
    let Some((wide, operation)) = combination(monoid, x.dtype) else { return Made::Not };
    let shape = &node.ty.shape;
    let space = Rows::new(shape, &|dim| dim == axis, &[&x.view.strides, &dense(shape)]);
    let Some(steps) = space.inner.line() else { return Made::Not };
    let [from_step, to_step] = steps.as_slice() else { return Made::Not };
    let mut call = Call::new();
    let source = call.read("x", x.dtype, x.view.base, &x.view.offset);
    let out = call.write("y", x.dtype, value, &Dim::constant(0));
    let (rows, length) = (space.rows.count(), space.inner.count());
    call.for_each("row", &rows);
    bases(&mut call, &space.rows, &["from", "to"]);
    let (count, from_step, to_step) = (call.variable(&length), call.size(from_step), call.size(to_step));
    call.line(format!("{wide} all = {};", identity(monoid, x.dtype)));
    call.line(format!("for (i64 k = 0; k < {count}; k++) {{"));
    call.line(if reverse { format!("i64 j = {count} - 1 - k;") } else { "i64 j = k;".into() });
    let here = store(&out, &format!("to + j * {to_step}"), "all");
    if exclusive {
        call.line(format!(
            "{wide} element = {};",
            load(x.dtype, &source, &format!("from + j * {from_step}"))
        ));
        call.line(&here);
        call.line(format!("all = {operation}()(all, element);"));
    } else {
        let element = load(x.dtype, &source, &format!("from + j * {from_step}"));
        call.line(format!("all = {operation}()(all, {element});"));
        call.line(&here);
    }
    call.line("}");
    call.line("}");
    Made::Calls(vec![call.over(emitter.kernels, &format!("scan_{monoid}_{}", x.dtype), &rows)])
}

/// The best of what is left, over and over: a block finds its key, then its first place.
pub(super) fn top_k(
    emitter: &mut Emitter<'_>,
    value: ValueId,
    node: &Node,
    axis: usize,
    k: &Dim,
    largest: bool,
) -> Made {
    let Some(&arg) = node.args.first() else { return Made::Not };
    let x = emitter.operand(arg);
    let Some(extent) = x.shape.get(axis).cloned() else { return Made::Not };
    let ordered = is_real(x.dtype) || x.dtype.is_integer() && !x.dtype.is_packed() && x.dtype != DType::U64;
    // More than there are is an error, which the CPU's executor words.
    if !ordered || !(&extent - k).is_nonnegative() || k.as_size().is_none_or(|k| k > MOST_PICKS) {
        return Made::Not;
    }
    let mut shape = x.shape.clone();
    if let Some(slot) = shape.get_mut(axis) {
        *slot = k.clone();
    }
    let out_strides = dense(&shape);
    let space = Rows::new(&x.shape, &|dim| dim == axis, &[&x.view.strides, &out_strides]);
    let step = |strides: &[Dim]| strides.get(axis).cloned().unwrap_or_else(|| Dim::constant(0));
    let mut call = Call::new();
    let source = call.read("x", x.dtype, x.view.base, &x.view.offset);
    call.write("y", DType::I64, value, &Dim::constant(0));
    let rows = space.rows.count();
    let (length, count) = (call.variable(&extent), call.variable(k));
    let (x_step, out_step) = (call.size(&step(&x.view.strides)), call.size(&step(&out_strides)));
    call.for_each_row("row", &rows);
    bases(&mut call, &space.rows, &["from", "to"]);
    let element = load(x.dtype, &source, &format!("from + j * {x_step}"));
    let turned = if largest { "" } else { "~" };
    call.lines(&format!(
        "i64 last = LARGEST, last_place = -1;
        for (i64 pick = 0; pick < {count}; pick++) {{
        i64 best = ~LARGEST;
        for (i64 j = threadIdx.x; j < {length}; j += blockDim.x) {{
        i64 key = {turned}sort_key({element});
        if (key < last || key == last && j > last_place) best = maximum(best, key);
        }}
        best = block_reduce(best, Maximum());
        i64 place = {length};
        for (i64 j = threadIdx.x; j < {length}; j += blockDim.x) {{
        if ({turned}sort_key({element}) == best && (best < last || j > last_place)) place = minimum(place, j);
        }}
        place = block_reduce(place, Minimum());
        if (threadIdx.x == 0) y[to + pick * {out_step}] = place;
        last = best;
        last_place = place;
        }}
        }}"
    ));
    Made::Calls(vec![call.over_rows(emitter.kernels, &format!("top_k_{}", x.dtype), &rows, threads(&extent))])
}
