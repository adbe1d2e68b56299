//! Layouts that the user fixes: what does not keep a pin is taken out of the layout graph before plans are chosen.
//!
//! A pinned weight or state lies in memory in the pinned layout. A pinned computed value is first made in the pinned
//! layout, at most by reducing partial values into it; its users may convert it further.

use super::{GroupKind, LayoutGraph, Operand};
use tpshard_ir::{Layout, ValueId};

/// What is wanted of one value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pin {
    pub value: ValueId,
    /// The dim that is split over the ranks; none if every rank is to hold the whole.
    pub dim: Option<usize>,
    /// How messages call the value.
    pub name: String,
}

/// A pin that cannot be kept.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum PinError {
    #[error(
        "pin of {name}: the plan does not compute this value\n\
         help: it was folded into others; pin an operand of it, or what it is an operand of"
    )]
    Unknown { name: String },
    #[error(
        "pin of {name}: inputs and small constants are held whole on every rank\nhelp: pin them as R, or not at all"
    )]
    Whole { name: String },
    #[error("pin of {name} as {wanted}: it can be had in {possible}\nhelp: pin it in one of these layouts")]
    Layout { name: String, wanted: String, possible: String },
    #[error(
        "pin of {name} as {wanted}: no operation makes it in that layout\nhelp: pin its operands, or another layout"
    )]
    Operation { name: String, wanted: String },
    #[error(
        "pin of {name} as {wanted} contradicts the pin of {other} as {others}: they are one value\nhelp: remove one of them"
    )]
    Contradiction { name: String, wanted: String, other: String, others: String },
}

impl Pin {
    fn wanted(&self) -> String {
        self.dim.map_or_else(|| "R".into(), |dim| format!("S({dim})"))
    }

    fn keeps(&self, layout: &Layout) -> bool {
        !layout.has_partial() && layout.0.iter().all(|part| part.sharded_dim() == self.dim)
    }
}

/// Takes everything out of `graph` that does not keep all of `pins`.
///
/// # Errors
/// A pin that cannot be kept, or two that contradict each other.
pub(crate) fn apply(graph: &mut LayoutGraph, pins: &[Pin]) -> Result<(), PinError> {
    let mut done: Vec<(u32, &Pin)> = Vec::new();
    for pin in pins {
        let name = || pin.name.clone();
        let found = graph.group_of.get(pin.value.index()).copied().flatten();
        let group = found.ok_or_else(|| PinError::Unknown { name: name() })?;
        if let Some((_, other)) = done.iter().find(|(g, other)| *g == group && other.dim != pin.dim) {
            return Err(PinError::Contradiction {
                name: name(),
                wanted: pin.wanted(),
                other: other.name.clone(),
                others: other.wanted(),
            });
        }
        done.push((group, pin));
        keep(graph, group, pin)?;
    }
    Ok(())
}

fn keep(graph: &mut LayoutGraph, index: u32, pin: &Pin) -> Result<(), PinError> {
    let name = pin.name.clone();
    let group = &mut graph.groups[index as usize];
    if group.kind == GroupKind::Free {
        return if pin.dim.is_none() { Ok(()) } else { Err(PinError::Whole { name }) };
    }
    if !group.layouts.iter().any(|l| pin.keeps(l)) {
        let whole = |l: &&Layout| !l.has_partial();
        let possible: Vec<String> = group.layouts.iter().filter(whole).map(Layout::to_string).collect();
        return Err(PinError::Layout { name, wanted: pin.wanted(), possible: possible.join(", ") });
    }
    let layouts = group.layouts.clone();
    let layout = |slot: u8| &layouts[usize::from(slot) % layouts.len()];
    let stored = group.kind == GroupKind::Stored;
    group.productions.retain(|p| pin.keeps(layout(p.out)) || (!stored && layout(p.out).has_partial()));
    if group.productions.is_empty() {
        return Err(PinError::Operation { name, wanted: pin.wanted() });
    }
    if !stored {
        group.conversions.retain(|e| !layout(e.from).has_partial() || pin.keeps(layout(e.to)));
        let partial = |o: &Operand| o.group == index && layout(o.slot).has_partial();
        for other in &mut graph.groups {
            other.productions.retain(|p| !p.operands.iter().any(partial));
        }
    }
    Ok(())
}
