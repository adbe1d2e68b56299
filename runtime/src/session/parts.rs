//! Steps of slots of different lengths, made of parts that one run of the program can take.
//!
//! A dim that is called as the slot dim of the state has a row for every slot; a part is given the rows of its slots.
//! Dims that depend on the length of the slots, such as that of an attention mask over past and new entries, are given
//! for the longest slots; shorter ones take the leading entries. Results are put together in the order of the slots,
//! what shorter slots do not reach is zero. Inputs without a row for every slot are given to every part.

use super::{Output, SessionError};
use crate::cpu::value::Value;
use crate::cpu::write_row;
use crate::state::{Batch, StepPart};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tpshard_ir::dim::{Bindings, Dim};
use tpshard_ir::program::{Entry, Port};
use tpshard_ir::{AxisLayout, Relation, Tensor};

fn refuse(what: String) -> SessionError {
    SessionError::State { what }
}

/// The dim of a port that has a row for every slot.
fn slot_axis(port: &Port, batch: &Batch) -> Option<usize> {
    match batch {
        Batch::Symbol(symbol) => port.ty.shape.iter().position(|dim| dim.symbols().contains(symbol)),
        Batch::Fixed(most) => (port.ty.shape.first()?.as_size() == Some(*most)).then_some(0),
    }
}

/// The inputs of every part, as far as rows go.
pub(super) fn split_rows(
    entry: &Entry,
    batch: &Batch,
    inputs: &BTreeMap<String, Tensor>,
    parts: &[StepPart],
) -> Result<Vec<BTreeMap<String, Tensor>>, SessionError> {
    let slots: usize = parts.iter().map(|part| part.rows.len()).sum();
    let mut split = vec![BTreeMap::new(); parts.len()];
    for (name, tensor) in inputs {
        let port = entry.inputs.iter().find(|port| *port.name == **name);
        let axis = port.and_then(|port| slot_axis(port, batch));
        let extent = axis.and_then(|axis| tensor.shape().get(axis)).copied();
        let whole = match (batch, extent) {
            (_, None) => true,
            // What fits one run as it is belongs to all of them.
            (Batch::Fixed(most), Some(extent)) => extent == *most && slots != *most,
            (Batch::Symbol(_), Some(_)) => false,
        };
        let (Some(axis), Some(extent), false) = (axis, extent, whole) else {
            split.iter_mut().for_each(|inputs| _ = inputs.insert(name.clone(), tensor.clone()));
            continue;
        };
        if extent % slots != 0 {
            return Err(refuse(format!(
                "input `{name}` of shape {:?} has {extent} rows for {slots} slots\n  \
                 help: give a row for every slot, in the order of the slots",
                tensor.shape()
            )));
        }
        let value = Value::new(tensor.clone());
        for (part, inputs) in parts.iter().zip(&mut split) {
            inputs.insert(name.clone(), take_rows(&value, axis, &part.rows, extent / slots).map_err(refuse)?);
        }
    }
    Ok(split)
}

fn take_rows(from: &Value, axis: usize, rows: &[usize], per_slot: usize) -> Result<Tensor, String> {
    let mut shape = from.shape().to_vec();
    if let Some(extent) = shape.get_mut(axis) {
        *extent = rows.len() * per_slot;
    }
    let mut taken = Tensor::zeros(from.dtype(), shape).map_err(|e| e.to_string())?;
    for (at, row) in rows.iter().enumerate() {
        let row = from.sliced(axis, row * per_slot, per_slot, 1)?;
        write_row(&mut taken, axis, at * per_slot, &row)?;
    }
    Ok(taken)
}

/// Cuts the inputs of a part to the entries that its shorter slots have. `longest` are the dims of the longest part.
pub(super) fn cut_lengths(
    entry: &Entry,
    batch: &Batch,
    length_symbols: &BTreeSet<Arc<str>>,
    longest: &Bindings,
    part: &StepPart,
    inputs: &mut BTreeMap<String, Tensor>,
) -> Result<(), SessionError> {
    let (bindings, changed) = shorter(entry, length_symbols, longest, part.length);
    for (name, tensor) in inputs {
        let Some(port) = entry.inputs.iter().find(|port| *port.name == **name) else { continue };
        let batch_axis = slot_axis(port, batch);
        let mut value = Value::new(tensor.clone());
        for (axis, dim) in port.ty.shape.iter().enumerate() {
            if Some(axis) == batch_axis || dim.symbols().is_disjoint(&changed) {
                continue;
            }
            let wanted = dim.eval(&bindings).ok().and_then(|extent| usize::try_from(extent).ok());
            // Another extent than this is said to be wrong when the part's dims are found.
            if let Some(wanted) =
                wanted.filter(|wanted| value.shape().get(axis).is_some_and(|has| has > wanted))
            {
                value = value.sliced(axis, 0, wanted, 1).map_err(refuse)?;
            }
        }
        if value.shape() != tensor.shape() {
            *tensor = value.into_tensor().map_err(refuse)?;
        }
    }
    Ok(())
}

/// The dims of a part whose slots have `length` entries, and those that are not as in the longest part. Sizes that are
/// stated to equal others follow them.
fn shorter(
    entry: &Entry,
    length_symbols: &BTreeSet<Arc<str>>,
    longest: &Bindings,
    length: usize,
) -> (Bindings, BTreeSet<Arc<str>>) {
    let mut bindings = longest.clone();
    let mut changed = length_symbols.clone();
    for symbol in length_symbols {
        bindings.insert(symbol.clone(), i64::try_from(length).unwrap_or(i64::MAX));
    }
    let equal = || entry.graph.guards.iter().filter(|guard| guard.relation == Relation::Equal);
    // Every round finds another symbol, or is the last.
    loop {
        let follows = |from: &Dim, to: &Dim| {
            let symbol = to.as_symbol().filter(|symbol| !changed.contains(*symbol))?;
            let value = from.eval(&bindings).ok().filter(|_| !from.symbols().is_disjoint(&changed))?;
            Some((symbol.clone(), value))
        };
        let found = equal().find_map(|guard| {
            follows(&guard.left, &guard.right).or_else(|| follows(&guard.right, &guard.left))
        });
        let Some((symbol, value)) = found else { return (bindings, changed) };
        bindings.insert(symbol.clone(), value);
        changed.insert(symbol);
    }
}

/// Refuses programs whose results cannot be put together again.
pub(super) fn check_outputs(entry: &Entry, batch: &Batch) -> Result<(), SessionError> {
    let is_state = |port: &Port| entry.graph.states.iter().any(|pair| pair.output == port.name);
    for port in entry.outputs.iter().filter(|port| !is_state(port)) {
        let axis = slot_axis(port, batch);
        let dealt = |layout: &AxisLayout| layout.sharded_dim().is_some() && layout.sharded_dim() == axis;
        let what = match axis {
            None => "no row for every slot",
            Some(_) if port.keep_sharded && port.layout.0.iter().any(dealt) => {
                "its slots dealt out to the ranks"
            }
            Some(_) => continue,
        };
        return Err(refuse(format!(
            "output `{}` of type {} has {what}, so that slots of different lengths cannot step together\n  \
             help: step them one after another",
            port.name, port.ty
        )));
    }
    Ok(())
}

/// An output of the whole step from those of its parts.
pub(super) fn join_rows(
    port: &Port,
    batch: &Batch,
    parts: &[(Output, &[usize])],
) -> Result<Tensor, SessionError> {
    let local = |what: String| refuse(format!("output `{}`: {what}", port.name));
    let axis = slot_axis(port, batch).ok_or_else(|| local("it has no row for every slot".into()))?;
    let Some((first, _)) = parts.first() else { return Err(local("no part has it".into())) };
    let mut shape = vec![0; first.tensor.shape().len()];
    for (Output { tensor, .. }, rows) in parts {
        let extents = tensor.shape();
        if extents.len() != shape.len()
            || extents.get(axis).is_none_or(|extent| extent % rows.len().max(1) != 0)
        {
            return Err(local(format!("{extents:?} are not rows of {} slots", rows.len())));
        }
        for (d, (whole, &extent)) in shape.iter_mut().zip(extents).enumerate() {
            *whole = if d == axis { *whole + extent } else { extent.max(*whole) };
        }
    }
    let mut joined = Tensor::zeros(first.tensor.dtype(), shape).map_err(|e| local(e.to_string()))?;
    for (Output { tensor, .. }, rows) in parts {
        let per_slot = tensor.shape().get(axis).map_or(0, |extent| extent / rows.len().max(1));
        let value = Value::new(tensor.clone());
        for (at, row) in rows.iter().enumerate() {
            let own = value.sliced(axis, at * per_slot, per_slot, 1).map_err(local)?;
            write_row(&mut joined, axis, row * per_slot, &own).map_err(local)?;
        }
    }
    Ok(joined)
}
