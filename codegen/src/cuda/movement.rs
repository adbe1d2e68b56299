//! Copies, concatenations, pads, and what is written without reading: elements move, none is computed.

use super::emit::{Emitter, Made, Operand};
use super::space::Offsets;
use super::text::{Call, c_type, store, wide_type};
use super::views::View;
use tpshard_ir::layout::Monoid;
use tpshard_ir::op::PadMode;
use tpshard_ir::program::device::Launch;
use tpshard_ir::{DType, DTypeClass, Dim, Node, Op, ValueId};

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
        DTypeClass::Int => {
            let greatest = i64::MAX >> (64 - bits);
            (format!("(-{greatest}LL - 1)"), format!("{greatest}LL"))
        }
        DTypeClass::Uint => ("0".into(), format!("{}ULL", u64::MAX >> (64 - bits))),
        DTypeClass::Bool => ("false".into(), "true".into()),
        DTypeClass::Float => ("-INFINITE".into(), "INFINITE".into()),
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
pub(super) fn stored_identity(monoid: Monoid, dtype: DType) -> String {
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
