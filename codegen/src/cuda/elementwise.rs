//! Fused elementwise functions, and blocks of quantised numbers.
//!
//! One thread takes one element at a time, from a linear index over the dims of the result, as many of them joined as the
//! operands allow ([`Offsets`]).

use super::emit::{Emitter, Made, Operand};
use super::scalar;
use super::space::Offsets;
use super::text::{Call, load, store, wide_type};
use super::views::dense;
use std::collections::BTreeMap;
use tpshard_ir::program::Region;
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
    for &id in &region.nodes {
        let name = function(&mut call, emitter, id, result, &names);
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
) -> String {
    let node = emitter.graph.node(id);
    let Op::Map(function) = node.op else { return String::new() };
    let (from, to) = (operand_type(emitter, node), node.ty.dtype);
    let args: Vec<&str> = node.args.iter().filter_map(|arg| names.get(arg).map(String::as_str)).collect();
    let fault = if scalar::may_fault(function, from) { call.fault(result) } else { String::new() };
    let mut value = scalar::expression(function, from, to, &args, &fault);
    if matches!(function, Scalar::Cast(_)) && id != result {
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
