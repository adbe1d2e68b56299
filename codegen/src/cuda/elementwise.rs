//! Kernels that compute every element of a result on its own: fused elementwise functions, copies, gathers, pads.
//!
//! One thread takes one element at a time, from a linear index over the dims of the result, as many of them joined as the
//! operands allow ([`Offsets`]).

use super::emit::{Emitter, Made, Operand};
use super::scalar;
use super::space::Offsets;
use super::text::{Call, c_type, load, store, wide_type};
use super::views::{View, dense};
use std::collections::BTreeMap;
use tpshard_ir::layout::Monoid;
use tpshard_ir::op::{PadMode, TableWindow};
use tpshard_ir::program::Region;
use tpshard_ir::program::device::Launch;
use tpshard_ir::{DType, Data, Dim, Node, Op, Scalar, ValueId};

/// A value that need not be read from memory, as an expression of its wide type.
fn immediate(emitter: &Emitter<'_>, call: &mut Call, value: ValueId) -> Option<String> {
    if let Op::Size(dim) = &emitter.graph.node(value).op {
        return Some(call.variable(dim));
    }
    Some(match emitter.literal(value)?.0.data() {
        Data::F32(v) => call.real(*v.first()?),
        Data::F16(v) => call.real(v.first()?.to_f32()),
        Data::BF16(v) => call.real(v.first()?.to_f32()),
        Data::I64(v) => call.variable(&Dim::constant(*v.first()?)),
        Data::I32(v) => call.variable(&Dim::constant(i64::from(*v.first()?))),
        Data::Bool(v) => v.first()?.to_string(),
        _ => return None,
    })
}

/// A region of `Map` nodes: one pass that loads every operand once and keeps what lies between in registers.
pub(super) fn fused(emitter: &mut Emitter<'_>, region: &Region) -> Made {
    let graph = emitter.graph;
    let result = region.result();
    let shape = &graph.ty(result).shape;
    let known = |&id: &ValueId| {
        let node = graph.node(id);
        match node.op {
            Op::Map(function) => scalar::is_known(function, operand_type(emitter, node), node.ty.dtype),
            _ => false,
        }
    };
    if !region.nodes.iter().all(known) {
        return Made::Not;
    }
    let mut call = Call::new();
    let mut names: BTreeMap<ValueId, String> = BTreeMap::new();
    let mut loaded: Vec<(ValueId, Operand, String)> = Vec::new();
    for value in region.operands(graph) {
        if let Some(text) = immediate(emitter, &mut call, value) {
            names.insert(value, text);
            continue;
        }
        let operand = emitter.operand(value);
        let name =
            call.read(&format!("a{}", loaded.len()), operand.dtype, operand.view.base, &operand.view.offset);
        loaded.push((value, operand, name));
    }
    let ty = graph.ty(result);
    let out = call.write("y", ty.dtype, result, &Dim::constant(0));
    let mut strides: Vec<Vec<Dim>> =
        loaded.iter().map(|(_, operand, _)| operand.strides_over(shape)).collect();
    strides.push(dense(shape));
    let offsets = Offsets::new(shape, &strides.iter().map(Vec::as_slice).collect::<Vec<_>>());
    call.for_each("i", &offsets.count());
    let places = call.places(&offsets, "i");
    for ((value, operand, array), place) in loaded.iter().zip(&places) {
        let name = call.fresh("x");
        let (ty, element) = (wide_type(operand.dtype), load(operand.dtype, array, place));
        call.line(format!("{ty} {name} = {element};"));
        names.insert(*value, name);
    }
    let round_each = emitter.round_each();
    for &id in &region.nodes {
        let name = function(&mut call, emitter, id, result, &names, round_each);
        names.insert(id, name);
    }
    let value = names.get(&result).cloned().unwrap_or_default();
    let place = places.last().cloned().unwrap_or_default();
    call.line(store(&out, &place, &value));
    call.line("}");
    let family = family(emitter, region);
    Made::Calls(vec![call.over(emitter.kernels, &family, &offsets.count())])
}

/// Declares the result of one function; its name.
fn function(
    call: &mut Call,
    emitter: &Emitter<'_>,
    id: ValueId,
    result: ValueId,
    names: &BTreeMap<ValueId, String>,
    round_each: bool,
) -> String {
    let node = emitter.graph.node(id);
    let Op::Map(function) = node.op else { return String::new() };
    let (from, to) = (operand_type(emitter, node), node.ty.dtype);
    let args: Vec<&str> = node.args.iter().filter_map(|arg| names.get(arg).map(String::as_str)).collect();
    let fault = if scalar::may_fault(function, from) { call.fault(result) } else { String::new() };
    let mut value = scalar::expression(function, from, to, &args, &fault);
    if (round_each || matches!(function, Scalar::Cast(_))) && id != result {
        value = scalar::rounded(to, &value);
    }
    let name = call.fresh("x");
    call.line(format!("{} {name} = {value};", wide_type(to)));
    name
}

/// The type that the operands of a function have; of a selection, what is selected.
fn operand_type(emitter: &Emitter<'_>, node: &Node) -> DType {
    let place = usize::from(node.op == Op::Map(Scalar::Select));
    node.args.get(place).map_or(node.ty.dtype, |&arg| emitter.graph.ty(arg).dtype)
}

/// What a fused kernel is called: its functions, as long as they are few.
fn family(emitter: &Emitter<'_>, region: &Region) -> String {
    let functions: Vec<&str> = region.nodes.iter().map(|&id| emitter.graph.node(id).op.name()).collect();
    let dtype = emitter.graph.ty(region.result()).dtype;
    match functions.as_slice() {
        few if few.len() <= 3 => format!("{}_{dtype}", few.join("_")),
        [first, .., last] => format!("{first}_to_{last}_{dtype}"),
        _ => format!("fused_{dtype}"),
    }
}

/// Copies `from` into memory of `value`, to where `to` says.
fn copy_into(emitter: &mut Emitter<'_>, from: &Operand, value: ValueId, to: &View) -> Launch {
    let mut call = Call::new();
    let source = call.read("a", from.dtype, from.view.base, &from.view.offset);
    let target = call.write("y", from.dtype, value, &to.offset);
    let offsets = Offsets::new(&from.shape, &[&from.view.strides, &to.strides]);
    call.for_each("i", &offsets.count());
    let places = call.places(&offsets, "i");
    if let [source_place, target_place] = places.as_slice() {
        call.line(format!("{target}[{target_place}] = {source}[{source_place}];"));
    }
    call.line("}");
    call.over(emitter.kernels, &format!("copy_{}", from.dtype), &offsets.count())
}

/// Copies `from`, as memory of `value`.
pub(super) fn copy(emitter: &mut Emitter<'_>, from: &Operand, value: ValueId, own: &View) -> Launch {
    copy_into(emitter, from, value, own)
}

/// A movement that strides cannot say: the operand's elements in its own order, one after another.
pub(super) fn copied(emitter: &mut Emitter<'_>, value: ValueId, node: &Node) -> Made {
    let Some(&from) = node.args.first() else { return Made::Not };
    let operand = emitter.operand(from);
    if operand.dtype.is_packed() || !matches!(node.op, Op::Reshape { .. }) {
        return Made::Not;
    }
    let to = View::whole(value, &operand.shape);
    Made::Calls(vec![copy_into(emitter, &operand, value, &to)])
}

pub(super) fn concat(emitter: &mut Emitter<'_>, value: ValueId, node: &Node, axis: usize) -> Made {
    if node.ty.dtype.is_packed() {
        return Made::Not;
    }
    let to = View::whole(value, &node.ty.shape);
    let mut at = Dim::constant(0);
    let mut calls = Vec::new();
    for &arg in &node.args {
        let operand = emitter.operand(arg);
        calls.push(copy_into(emitter, &operand, value, &to.sliced(axis, &at, 1)));
        at = at + operand.shape.get(axis).cloned().unwrap_or_else(|| Dim::constant(0));
    }
    if calls.is_empty() { Made::Not } else { Made::Calls(calls) }
}

/// Writes what is new behind the state, in its room.
pub(super) fn append(
    emitter: &mut Emitter<'_>,
    value: ValueId,
    state: ValueId,
    new: &[ValueId],
    axis: usize,
) -> Vec<Launch> {
    let mut at = emitter.ty(state).shape.get(axis).cloned().unwrap_or_else(|| Dim::constant(0));
    let mut calls = Vec::new();
    for &arg in new {
        let operand = emitter.operand(arg);
        let to = emitter.own(value).sliced(axis, &at, 1);
        calls.push(copy_into(emitter, &operand, value, &to));
        at = at + operand.shape.get(axis).cloned().unwrap_or_else(|| Dim::constant(0));
    }
    calls
}

/// The identity of a monoid, everywhere.
pub(super) fn fill(emitter: &mut Emitter<'_>, value: ValueId, monoid: Monoid) -> Option<Launch> {
    let ty = emitter.ty(value);
    c_type(ty.dtype).filter(|_| !ty.dtype.is_packed())?;
    let mut call = Call::new();
    let out = call.write("y", ty.dtype, value, &Dim::constant(0));
    call.for_each("i", &ty.elements());
    call.line(format!("{out}[i] = {};", stored_identity(monoid, ty.dtype)));
    call.line("}");
    Some(call.over(emitter.kernels, &format!("fill_{monoid}_{}", ty.dtype), &ty.elements()))
}

/// The identity of a monoid as an expression of the wide type.
pub(super) fn identity(monoid: Monoid, dtype: DType) -> String {
    let float = dtype.is_float();
    let wide = wide_type(dtype);
    let bits = dtype.bits() as u32;
    let (least, greatest) = match dtype.class() {
        tpshard_ir::DTypeClass::Int => {
            let greatest = i64::MAX >> (64 - bits);
            (format!("(-{greatest}LL - 1)"), format!("{greatest}LL"))
        }
        tpshard_ir::DTypeClass::Uint => ("0".into(), format!("{}ULL", u64::MAX >> (64 - bits))),
        tpshard_ir::DTypeClass::Bool => ("false".into(), "true".into()),
        tpshard_ir::DTypeClass::Float => ("-INFINITE".into(), "INFINITE".into()),
    };
    let value = match monoid {
        Monoid::Sum if float => "0.0f".into(),
        Monoid::Prod if float => "1.0f".into(),
        Monoid::Sum => "0".into(),
        Monoid::Prod => "1".into(),
        Monoid::Max => least,
        Monoid::Min => greatest,
    };
    format!("({wide})({value})")
}

/// The identity as it lies in memory.
fn stored_identity(monoid: Monoid, dtype: DType) -> String {
    let wide = identity(monoid, dtype);
    match dtype {
        DType::F16 => format!("narrow_f16({wide})"),
        DType::BF16 => format!("narrow_bf16({wide})"),
        _ => format!("({}){wide}", c_type(dtype).unwrap_or("unsigned char")),
    }
}

pub(super) fn iota(emitter: &mut Emitter<'_>, value: ValueId, start: &Dim) -> Made {
    let mut call = Call::new();
    let count = emitter.ty(value).elements();
    let out = call.write("y", DType::I64, value, &Dim::constant(0));
    let start = call.variable(start);
    call.for_each("i", &count);
    call.line(format!("{out}[i] = {start} + i;"));
    call.line("}");
    Made::Calls(vec![call.over(emitter.kernels, "iota", &count)])
}

pub(super) fn pad(
    emitter: &mut Emitter<'_>,
    value: ValueId,
    node: &Node,
    low: &[Dim],
    mode: PadMode,
) -> Made {
    let Some(&arg) = node.args.first() else { return Made::Not };
    let operand = emitter.operand(arg);
    if operand.dtype.is_packed() {
        return Made::Not;
    }
    let shape = &node.ty.shape;
    let mut call = Call::new();
    let source = call.read("a", operand.dtype, operand.view.base, &operand.view.offset);
    let out = call.write("y", operand.dtype, value, &Dim::constant(0));
    let filler = match mode {
        PadMode::Constant(number) => filler(&mut call, operand.dtype, number.0),
        PadMode::Reflect | PadMode::Edge | PadMode::Wrap => Some(String::new()),
    };
    let Some(filler) = filler else { return Made::Not };
    let count = node.ty.elements();
    call.for_each("i", &count);
    let coordinates = call.coordinates(shape, "i");
    let (mut places, mut inside) = (Vec::new(), Vec::new());
    for (((coordinate, low), extent), to) in coordinates.iter().zip(low).zip(&operand.shape).zip(shape) {
        if low.is_zero() && extent == to {
            places.push(coordinate.clone());
            continue;
        }
        let name = call.fresh("p");
        let (low, extent) = (call.size(low), call.variable(extent));
        let place = match mode {
            PadMode::Constant(_) => format!("{coordinate} - {low}"),
            PadMode::Edge => format!("pad_edge({coordinate} - {low}, {extent})"),
            PadMode::Wrap => format!("pad_wrap({coordinate} - {low}, {extent})"),
            PadMode::Reflect => format!("pad_reflect({coordinate} - {low}, {extent})"),
        };
        call.line(format!("i64 {name} = {place};"));
        inside.push(format!("{name} >= 0 && {name} < {extent}"));
        places.push(name);
    }
    let place = call.sum(&places, &operand.view.strides);
    let is_constant = matches!(mode, PadMode::Constant(_));
    if is_constant && !inside.is_empty() {
        call.line(format!("bool inside = {};", inside.join(" && ")));
        call.line(format!("if (inside) {out}[i] = {source}[{place}]; else {filler}"));
    } else {
        call.line(format!("{out}[i] = {source}[{place}];"));
    }
    call.line("}");
    Made::Calls(vec![call.over(emitter.kernels, &format!("pad_{}", operand.dtype), &count)])
}

/// Writes `number` to element `i` of `y`.
fn filler(call: &mut Call, dtype: DType, number: f64) -> Option<String> {
    let value = match dtype {
        DType::F32 | DType::F16 | DType::BF16 => call.real(number as f32),
        // Exact, or the reference interpreter's business.
        _ if number.fract() == 0.0 && number.abs() < 1e15 => call.variable(&Dim::constant(number as i64)),
        _ => return None,
    };
    Some(store("y", "i", &value))
}

/// The index operands of a gather that starts at dim `axis` of `x`.
pub(super) fn gather(
    emitter: &mut Emitter<'_>,
    value: ValueId,
    node: &Node,
    axis: usize,
    window: Option<&TableWindow>,
) -> Made {
    let &[table, indices] = node.args.as_slice() else { return Made::Not };
    let (table, indices) = (emitter.operand(table), emitter.operand(indices));
    if table.dtype.is_packed() || indices.dtype.is_packed() || table.shape.len() <= axis {
        return Made::Not;
    }
    let shape = &node.ty.shape;
    let zero = || Dim::constant(0);
    // Strides over the result's dims: those before the axis, those of the indices, those behind the axis.
    let (rank, inner) = (indices.shape.len(), axis + indices.shape.len());
    let over = |dim: usize| -> (Dim, Dim) {
        let stride = |strides: &[Dim], at: usize| strides.get(at).cloned().unwrap_or_else(zero);
        match dim {
            _ if dim < axis => (stride(&table.view.strides, dim), zero()),
            _ if dim < inner => (zero(), stride(&indices.view.strides, dim - axis)),
            _ => (stride(&table.view.strides, dim + 1 - rank), zero()),
        }
    };
    let (of_table, of_indices): (Vec<Dim>, Vec<Dim>) = (0..shape.len()).map(over).unzip();
    let along = table.view.strides.get(axis).cloned().unwrap_or_else(zero);
    let held = table.shape.get(axis).cloned().unwrap_or_else(zero);
    let mut call = Call::new();
    let fault = call.fault(value);
    let source = call.read("a", table.dtype, table.view.base, &table.view.offset);
    let index = call.read("index", indices.dtype, indices.view.base, &indices.view.offset);
    let out = call.write("y", table.dtype, value, &zero());
    let offsets = Offsets::new(shape, &[&of_table, &of_indices, &dense(shape)]);
    call.for_each("i", &offsets.count());
    let places = call.places(&offsets, "i");
    let [table_place, index_place, out_place] = places.as_slice() else { return Made::Not };
    let extent = call.variable(window.map_or(&held, |w| &w.extent));
    let element = load(indices.dtype, &index, index_place);
    call.line(format!("i64 row = resolve({element}, {extent}, {fault});"));
    let along = call.size(&along);
    let element = |row: &str| format!("{source}[{table_place} + {row} * {along}]");
    match window {
        None => call.line(format!("{out}[{out_place}] = {};", element("row"))),
        Some(window) => {
            let (start, held) = (call.size(&window.start), call.variable(&held));
            call.line(format!("row -= {start};"));
            let zero = stored_identity(Monoid::Sum, table.dtype);
            let here = element("row");
            call.line(format!(
                "if (row >= 0 && row < {held}) {out}[{out_place}] = {here}; else {out}[{out_place}] = {zero};"
            ));
        }
    }
    call.line("}");
    let family = if window.is_some() { "gather_window" } else { "gather" };
    Made::Calls(vec![call.over(emitter.kernels, &format!("{family}_{}", table.dtype), &offsets.count())])
}

pub(super) fn gather_elements(emitter: &mut Emitter<'_>, value: ValueId, node: &Node, axis: usize) -> Made {
    let &[x, indices] = node.args.as_slice() else { return Made::Not };
    let (x, indices) = (emitter.operand(x), emitter.operand(indices));
    if x.dtype.is_packed() || indices.dtype.is_packed() {
        return Made::Not;
    }
    // Off the axis, indices that reach beyond the operand are an error that the CPU's executor words.
    let smaller = |dim: usize| {
        let (own, other) = (x.shape.get(dim), indices.shape.get(dim));
        dim == axis || own.zip(other).is_some_and(|(own, other)| (own - other).is_nonnegative())
    };
    if !(0..x.shape.len()).all(smaller) {
        return Made::Not;
    }
    let mut of_x = x.view.strides.clone();
    let Some(slot) = of_x.get_mut(axis) else { return Made::Not };
    let along = std::mem::replace(slot, Dim::constant(0));
    let shape = &node.ty.shape;
    let mut call = Call::new();
    let fault = call.fault(value);
    let source = call.read("a", x.dtype, x.view.base, &x.view.offset);
    let index = call.read("index", indices.dtype, indices.view.base, &indices.view.offset);
    let out = call.write("y", x.dtype, value, &Dim::constant(0));
    let offsets = Offsets::new(shape, &[&of_x, &indices.view.strides, &dense(shape)]);
    call.for_each("i", &offsets.count());
    let places = call.places(&offsets, "i");
    let [x_place, index_place, out_place] = places.as_slice() else { return Made::Not };
    let Some(extent) = x.shape.get(axis) else { return Made::Not };
    let (extent, along) = (call.variable(extent), call.size(&along));
    let element = load(indices.dtype, &index, index_place);
    call.line(format!("i64 row = resolve({element}, {extent}, {fault});"));
    call.line(format!("{out}[{out_place}] = {source}[{x_place} + row * {along}];"));
    call.line("}");
    Made::Calls(vec![call.over(emitter.kernels, &format!("gather_elements_{}", x.dtype), &offsets.count())])
}

pub(super) fn gather_nd(emitter: &mut Emitter<'_>, value: ValueId, node: &Node, batch_dims: usize) -> Made {
    let &[x, indices] = node.args.as_slice() else { return Made::Not };
    let (x, indices) = (emitter.operand(x), emitter.operand(indices));
    let Some((depth, lead)) = indices.shape.split_last() else { return Made::Not };
    let Some(depth) = depth.as_size() else { return Made::Not };
    if x.dtype.is_packed() || indices.dtype.is_packed() || depth > 8 {
        return Made::Not;
    }
    let shape = &node.ty.shape;
    let zero = || Dim::constant(0);
    let over = |dim: usize| -> (Dim, Dim) {
        let stride = |strides: &[Dim], at: usize| strides.get(at).cloned().unwrap_or_else(zero);
        let of_indices = if dim < lead.len() { stride(&indices.view.strides, dim) } else { zero() };
        let of_x = match dim {
            _ if dim < batch_dims => stride(&x.view.strides, dim),
            _ if dim < lead.len() => zero(),
            _ => stride(&x.view.strides, dim - lead.len() + batch_dims + depth),
        };
        (of_x, of_indices)
    };
    let (of_x, of_indices): (Vec<Dim>, Vec<Dim>) = (0..shape.len()).map(over).unzip();
    let mut call = Call::new();
    let fault = call.fault(value);
    let source = call.read("a", x.dtype, x.view.base, &x.view.offset);
    let index = call.read("index", indices.dtype, indices.view.base, &indices.view.offset);
    let out = call.write("y", x.dtype, value, &zero());
    let offsets = Offsets::new(shape, &[&of_x, &of_indices, &dense(shape)]);
    call.for_each("i", &offsets.count());
    let places = call.places(&offsets, "i");
    let [x_place, index_place, out_place] = places.as_slice() else { return Made::Not };
    call.line(format!("i64 place = {x_place};"));
    let step = indices.view.strides.last().cloned().unwrap_or_else(zero);
    for part in 0..depth {
        let (Some(extent), Some(along)) =
            (x.shape.get(batch_dims + part), x.view.strides.get(batch_dims + part))
        else {
            return Made::Not;
        };
        let (extent, along) = (call.variable(extent), call.size(along));
        let at = call.size(&(&step * &Dim::from(part)));
        let element = load(indices.dtype, &index, &format!("{index_place} + {at}"));
        call.line(format!("place += resolve({element}, {extent}, {fault}) * {along};"));
    }
    call.line(format!("{out}[{out_place}] = {source}[place];"));
    call.line("}");
    Made::Calls(vec![call.over(emitter.kernels, &format!("gather_nd_{}", x.dtype), &offsets.count())])
}

/// `(q - zero) * scale`, a scale for each block of elements along `axis`.
pub(super) fn dequant(
    emitter: &mut Emitter<'_>,
    value: ValueId,
    node: &Node,
    axis: usize,
    block: usize,
) -> Made {
    let operands: Vec<Operand> = node.args.iter().map(|&arg| emitter.operand(arg)).collect();
    let (Some(q), Some(scale)) = (operands.first(), operands.get(1)) else { return Made::Not };
    let unknown = q.dtype.is_float() || q.dtype.bits() > 32 || node.ty.dtype == DType::F64;
    if unknown || operands.iter().any(|o| o.dtype.is_packed() && !o.view.offset.is_zero()) {
        return Made::Not;
    }
    let shape = &node.ty.shape;
    let mut call = Call::new();
    let arrays: Vec<String> = operands
        .iter()
        .zip(["q", "scale", "zero"])
        .map(|(o, name)| call.read(name, o.dtype, o.view.base, &o.view.offset))
        .collect();
    let out = call.write("y", node.ty.dtype, value, &Dim::constant(0));
    call.for_each("i", &node.ty.elements());
    let mut coordinates = call.coordinates(shape, "i");
    let q_place = call.sum(&coordinates, &q.view.strides);
    if let Some(along) = coordinates.get_mut(axis) {
        let block = call.variable(&Dim::from(block));
        *along = format!("({along} / {block})");
    }
    let (Some(q_array), Some(scale_array)) = (arrays.first(), arrays.get(1)) else { return Made::Not };
    let mut number = format!("(float){}", load(q.dtype, q_array, &q_place));
    if let (Some(zero), Some(array)) = (operands.get(2), arrays.get(2)) {
        let place = call.sum(&coordinates, &zero.view.strides);
        number = format!("({number} - (float){})", load(zero.dtype, array, &place));
    }
    let scale_place = call.sum(&coordinates, &scale.view.strides);
    let factor = load(scale.dtype, scale_array, &scale_place);
    call.line(store(&out, "i", &format!("{number} * {factor}")));
    call.line("}");
    let family = format!("dequant_{}_{}", q.dtype, node.ty.dtype);
    Made::Calls(vec![call.over(emitter.kernels, &family, &node.ty.elements())])
}
