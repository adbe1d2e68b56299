//! Gathers and scatters. An index out of range is noted, and the kernel goes on with the first entry.
//!
//! Scatters that may write an element twice do it in the order of their indices: what one thread writes, no other does.

use super::emit::{Emitter, Made, Operand};
use super::movement::{copy, stored_identity};
use super::rows::combination;
use super::space::Offsets;
use super::text::{Call, load, store};
use super::views::dense;
use tpshard_ir::layout::Monoid;
use tpshard_ir::op::TableWindow;
use tpshard_ir::{DType, Dim, Node, ValueId};

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
    if !is_smaller(&x, &indices, axis) {
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

/// True if indices lie within `x` off the axis; otherwise the CPU's executor says what is wrong.
fn is_smaller(x: &Operand, indices: &Operand, axis: usize) -> bool {
    let smaller = |dim: usize| {
        let (own, other) = (x.shape.get(dim), indices.shape.get(dim));
        dim == axis || own.zip(other).is_some_and(|(own, other)| (own - other).is_nonnegative())
    };
    (0..x.shape.len()).all(smaller)
}

/// The line that writes `update` to element `place` of `y`, which holds a value of `dtype`; `None` if it cannot be combined.
fn update(call: &mut Call, dtype: DType, monoid: Option<Monoid>, place: &str, element: &str) -> Option<()> {
    match monoid {
        None => call.line(format!("y[{place}] = {element};")),
        Some(monoid) => {
            let (_, operation) = combination(monoid, dtype)?;
            call.line(format!("i64 at = {place};"));
            let (own, other) = (load(dtype, "y", "at"), format!("wide({element})"));
            call.line(store("y", "at", &format!("{operation}()({own}, {other})")));
        }
    }
    Some(())
}

/// Lines along the axis are independent of each other: a thread walks one.
pub(super) fn scatter_elements(
    emitter: &mut Emitter<'_>,
    value: ValueId,
    node: &Node,
    axis: usize,
    monoid: Option<Monoid>,
) -> Made {
    let &[x, indices, updates] = node.args.as_slice() else { return Made::Not };
    let [x, indices, updates] = [x, indices, updates].map(|arg| emitter.operand(arg));
    if x.dtype.is_packed() || indices.dtype.is_packed() || !is_smaller(&x, &indices, axis) {
        return Made::Not;
    }
    let own = emitter.own(value);
    let without = |list: &[Dim]| -> Vec<Dim> {
        list.iter().enumerate().filter(|(dim, _)| *dim != axis).map(|(_, d)| d.clone()).collect()
    };
    let strides = [&indices.view.strides, &updates.view.strides, &own.strides];
    let along = strides.map(|s| s.get(axis).cloned().unwrap_or_else(|| Dim::constant(0)));
    let lines = strides.map(|s| without(s));
    let offsets = Offsets::new(&without(&indices.shape), &lines.each_ref().map(Vec::as_slice));
    let (Some(extent), Some(length)) = (x.shape.get(axis), indices.shape.get(axis)) else { return Made::Not };
    let mut call = Call::new();
    let fault = call.fault(value);
    call.read("index", indices.dtype, indices.view.base, &indices.view.offset);
    call.read("updates", updates.dtype, updates.view.base, &updates.view.offset);
    call.write("y", x.dtype, value, &Dim::constant(0));
    let [index_step, update_step, out_step] = along.each_ref().map(|step| call.size(step));
    let (extent, length) = (call.variable(extent), call.variable(length));
    call.for_each("line", &offsets.count());
    let places = call.places(&offsets, "line");
    let [index_line, update_line, out_line] = places.as_slice() else { return Made::Not };
    call.line(format!("for (i64 j = 0; j < {length}; j++) {{"));
    let index = load(indices.dtype, "index", &format!("{index_line} + j * {index_step}"));
    call.line(format!("i64 row = resolve({index}, {extent}, {fault});"));
    let element = format!("updates[{update_line} + j * {update_step}]");
    let place = format!("{out_line} + row * {out_step}");
    if update(&mut call, x.dtype, monoid, &place, &element).is_none() {
        return Made::Not;
    }
    call.line("}");
    call.line("}");
    let first = copy(emitter, &x, value, &own);
    let family = format!("scatter_elements_{}", x.dtype);
    let second = call.over(emitter.kernels, &family, &offsets.count());
    Made::Calls(vec![first, second])
}

/// A thread walks all indices for one place of the slices that are written; where slices are single elements, that is the
/// CPU's work.
pub(super) fn scatter_nd(
    emitter: &mut Emitter<'_>,
    value: ValueId,
    node: &Node,
    monoid: Option<Monoid>,
) -> Made {
    let &[x, indices, updates] = node.args.as_slice() else { return Made::Not };
    let [x, indices, updates] = [x, indices, updates].map(|arg| emitter.operand(arg));
    let Some((depth, lead)) = indices.shape.split_last() else { return Made::Not };
    let Some(depth) = depth.as_size().filter(|&d| d <= x.shape.len() && d <= 8) else { return Made::Not };
    let (scattered, inner) = x.shape.split_at(depth);
    if x.dtype.is_packed() || indices.dtype.is_packed() || Dim::product(inner).is_one() {
        return Made::Not;
    }
    let own = emitter.own(value);
    let (Some(index_lead), Some(step)) =
        (indices.view.strides.get(..lead.len()), indices.view.strides.last())
    else {
        return Made::Not;
    };
    let update_strides = updates.view.strides.split_at(lead.len().min(updates.view.strides.len()));
    let (own_outer, own_inner) = own.strides.split_at(depth);
    let tuples = Offsets::new(lead, &[index_lead, update_strides.0]);
    let slices = Offsets::new(inner, &[update_strides.1, own_inner]);
    let mut call = Call::new();
    let fault = call.fault(value);
    call.read("index", indices.dtype, indices.view.base, &indices.view.offset);
    call.read("updates", updates.dtype, updates.view.base, &updates.view.offset);
    call.write("y", x.dtype, value, &Dim::constant(0));
    let count = call.variable(&tuples.count());
    call.for_each("i", &slices.count());
    let places = call.places(&slices, "i");
    let [update_inner, out_inner] = places.as_slice() else { return Made::Not };
    call.line(format!("for (i64 j = 0; j < {count}; j++) {{"));
    let places = call.places(&tuples, "j");
    let [index_place, update_place] = places.as_slice() else { return Made::Not };
    call.line(format!("i64 place = {out_inner};"));
    for (part, (extent, along)) in scattered.iter().zip(own_outer).enumerate() {
        let (extent, along) = (call.variable(extent), call.size(along));
        let at = call.size(&(step * &Dim::from(part)));
        let element = load(indices.dtype, "index", &format!("{index_place} + {at}"));
        call.line(format!("place += resolve({element}, {extent}, {fault}) * {along};"));
    }
    let element = format!("updates[{update_place} + {update_inner}]");
    if update(&mut call, x.dtype, monoid, "place", &element).is_none() {
        return Made::Not;
    }
    call.line("}");
    call.line("}");
    let first = copy(emitter, &x, value, &own);
    let second = call.over(emitter.kernels, &format!("scatter_nd_{}", x.dtype), &slices.count());
    Made::Calls(vec![first, second])
}
