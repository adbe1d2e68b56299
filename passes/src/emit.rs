//! From the choices of a plan to the steps of a typed program.
//!
//! Groups are taken in dependency order. Each chosen production becomes a step, each conversion another; a family in a
//! layout is made once. What plans do not decide about is made whole on every rank where it is needed, and cut there.

use crate::extract::Choice;
use crate::layout_graph::{Classes, GroupKind, LayoutGraph};
use crate::sharding::conversions;
use std::collections::{BTreeMap, BTreeSet};
use tpshard_ir::graph::Output;
use tpshard_ir::{AxisLayout, Dim, Graph, Layout, Op, SpmdOutput, Step, StepId, StepKind, ValueId};

/// The choices do not make a program: a fault of the planner.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
#[error(
    "the plan lacks {value} in {layout}\nhelp: this is a fault of the planner, please report it with the model"
)]
pub struct EmitError {
    pub value: String,
    pub layout: String,
}

/// What the choices are about.
pub(crate) struct Source<'a> {
    pub graph: &'a Graph,
    pub outputs: &'a [Output],
    pub classes: &'a Classes,
    pub layouts: &'a LayoutGraph,
    pub choices: &'a BTreeMap<u32, Choice>,
}

struct Emitter<'a> {
    source: &'a Source<'a>,
    steps: Vec<Step>,
    /// The step that makes a group in a slot.
    families: BTreeMap<(u32, u8), StepId>,
    /// The same for groups that are not planned.
    free: BTreeMap<(u32, Layout), StepId>,
}

/// The steps of a plan and where they leave the outputs.
///
/// # Errors
/// The choices do not fit together.
pub(crate) fn emit(source: &Source<'_>) -> Result<(Vec<Step>, Vec<SpmdOutput>), EmitError> {
    let needed = needed_free(source);
    let mut emitter = Emitter { source, steps: Vec::new(), families: BTreeMap::new(), free: BTreeMap::new() };
    for group in 0..source.layouts.groups.len() as u32 {
        match source.layouts.groups[group as usize].kind {
            GroupKind::Free if needed.contains(&group) => emitter.whole(group)?,
            GroupKind::Free => {}
            GroupKind::Stored | GroupKind::Computed => emitter.planned(group)?,
        }
    }
    let outputs = emitter.outputs()?;
    Ok(without_dead_steps(emitter.steps, outputs))
}

/// The groups outside the plan that some chosen production or output needs, with what they need themselves.
fn needed_free(source: &Source<'_>) -> BTreeSet<u32> {
    let Source { graph, layouts, classes, .. } = *source;
    let is_free = |group: &u32| !layouts.is_planned(*group);
    let mut needed: BTreeSet<u32> = BTreeSet::new();
    for (&group, choice) in source.choices {
        let productions = &layouts.groups[group as usize].productions;
        let chosen = choice.productions.iter().filter_map(|&p| productions.get(usize::from(p)));
        needed.extend(chosen.flat_map(|p| p.operands.iter().map(|o| o.group)).filter(is_free));
    }
    let outputs = source.outputs.iter().filter_map(|o| classes.of[o.value.index()]);
    needed.extend(outputs.filter(is_free));
    for group in (0..layouts.groups.len() as u32).rev().filter(is_free) {
        if needed.contains(&group) {
            let args = &graph.node(layouts.groups[group as usize].value).args;
            needed.extend(args.iter().filter_map(|a| classes.of[a.index()]));
        }
    }
    needed
}

impl Emitter<'_> {
    fn push(&mut self, value: ValueId, layout: Layout, kind: StepKind, args: Vec<StepId>) -> StepId {
        let id = StepId(self.steps.len() as u32);
        self.steps.push(Step { value, layout, kind, args });
        id
    }

    fn lacks(&self, group: u32, layout: &Layout) -> EmitError {
        let value = self.source.layouts.groups[group as usize].value;
        EmitError { value: value.to_string(), layout: layout.to_string() }
    }

    /// The whole value of a group outside the plan.
    fn whole(&mut self, group: u32) -> Result<(), EmitError> {
        let layouts = self.source.layouts;
        let layout = Layout::replicated(&layouts.mesh);
        let args = self.whole_operands(group)?;
        let value = layouts.groups[group as usize].value;
        let step = self.push(value, layout.clone(), StepKind::Compute, args);
        self.free.insert((group, layout), step);
        Ok(())
    }

    fn whole_operands(&mut self, group: u32) -> Result<Vec<StepId>, EmitError> {
        let Source { graph, layouts, classes, .. } = *self.source;
        let layout = Layout::replicated(&layouts.mesh);
        let mut args = Vec::new();
        for arg in &graph.node(layouts.groups[group as usize].value).args {
            let operand = classes.of[arg.index()].ok_or_else(|| self.lacks(group, &layout))?;
            args.push(self.free_family(operand, &layout)?);
        }
        Ok(args)
    }

    fn free_family(&mut self, group: u32, layout: &Layout) -> Result<StepId, EmitError> {
        if let Some(&known) = self.free.get(&(group, layout.clone())) {
            return Ok(known);
        }
        let Source { graph, layouts, .. } = *self.source;
        let value = layouts.groups[group as usize].value;
        let node = graph.node(value);
        let constant = matches!(node.op, Op::Weight(_) | Op::Literal(_) | Op::Iota { .. });
        let step = if constant && !layout.has_partial() {
            self.push(value, layout.clone(), StepKind::Compute, Vec::new())
        } else if is_stretched(graph, value, layout) {
            // A part of what is stretched is the same, stretched less; as such it is known before anything runs, if what is
            // stretched is.
            let args = self.whole_operands(group)?;
            self.push(value, layout.clone(), StepKind::Compute, args)
        } else {
            self.cut(group, layout)?
        };
        self.free.insert((group, layout.clone()), step);
        Ok(step)
    }

    /// Cuts a whole value to a layout, one mesh axis after the other.
    fn cut(&mut self, group: u32, layout: &Layout) -> Result<StepId, EmitError> {
        let Source { graph, layouts, .. } = *self.source;
        let value = layouts.groups[group as usize].value;
        let mut at = Layout::replicated(&layouts.mesh);
        let mut step = *self.free.get(&(group, at.clone())).ok_or_else(|| self.lacks(group, &at))?;
        for (axis, part) in layout.0.iter().enumerate() {
            if at.0[axis] == *part {
                continue;
            }
            let mut next = at.clone();
            next.0[axis] = part.clone();
            let conversion = conversions(graph.ty(value), &at, &next, &layouts.mesh)
                .ok_or_else(|| self.lacks(group, layout))?;
            step = self.push(value, next.clone(), StepKind::Convert(conversion), vec![step]);
            at = next;
        }
        Ok(step)
    }

    fn planned(&mut self, index: u32) -> Result<(), EmitError> {
        let Source { layouts, choices, .. } = *self.source;
        let Some(choice) = choices.get(&index) else { return Ok(()) };
        let group = &layouts.groups[index as usize];
        for production in choice.productions.iter().filter_map(|&p| group.productions.get(usize::from(p))) {
            let mut args = Vec::new();
            for operand in &production.operands {
                let source = &layouts.groups[operand.group as usize];
                let layout = source.layout(operand.slot);
                args.push(match source.kind {
                    GroupKind::Free => self.free_family(operand.group, layout)?,
                    GroupKind::Stored | GroupKind::Computed => {
                        let family = self.families.get(&(operand.group, operand.slot));
                        *family.ok_or_else(|| self.lacks(operand.group, layout))?
                    }
                });
            }
            let layout = group.layout(production.out).clone();
            let step = self.push(production.value, layout, StepKind::Compute, args);
            self.families.insert((index, production.out), step);
        }
        for edge in choice.conversions.iter().filter_map(|&c| group.conversions.get(usize::from(c))) {
            let from = self.families.get(&(index, edge.from));
            let from = *from.ok_or_else(|| self.lacks(index, group.layout(edge.from)))?;
            let step = match &edge.conversion {
                None => from,
                Some(conversion) => {
                    let value = self.steps[from.index()].value;
                    let layout = group.layout(edge.to).clone();
                    self.push(value, layout, StepKind::Convert(conversion.clone()), vec![from])
                }
            };
            self.families.insert((index, edge.to), step);
        }
        Ok(())
    }

    fn outputs(&mut self) -> Result<Vec<SpmdOutput>, EmitError> {
        let Source { layouts, classes, choices, outputs, .. } = *self.source;
        let mut found = Vec::new();
        for output in outputs {
            let whole = Layout::replicated(&layouts.mesh);
            let missing =
                || EmitError { value: format!("output `{}`", output.name), layout: whole.to_string() };
            let index = classes.of[output.value.index()].ok_or_else(missing)?;
            let group = &layouts.groups[index as usize];
            let step = if group.kind == GroupKind::Free {
                self.free_family(index, &whole)?
            } else {
                let exit = choices.get(&index).and_then(|c| group.exits.get(usize::from(c.exit?)));
                let slot = exit.ok_or_else(missing)?.slot;
                *self.families.get(&(index, slot)).ok_or_else(|| self.lacks(index, group.layout(slot)))?
            };
            found.push(SpmdOutput { name: output.name.clone(), step });
        }
        Ok(found)
    }
}

/// True for a broadcast whose sharded dims are all stretched.
fn is_stretched(graph: &Graph, value: ValueId, layout: &Layout) -> bool {
    let node = graph.node(value);
    let (Op::Broadcast { .. }, Some(&shown)) = (&node.op, node.args.first()) else { return false };
    let shown = graph.ty(shown);
    // Shapes are aligned right.
    let lead = node.ty.rank().saturating_sub(shown.rank());
    let stretches = |dim: usize| match dim.checked_sub(lead) {
        None => true,
        Some(place) => shown.shape.get(place).is_some_and(Dim::is_one) && !node.ty.shape[dim].is_one(),
    };
    let sharded = layout.0.iter().filter_map(AxisLayout::sharded_dim);
    !layout.has_partial() && !layout.is_replicated() && sharded.into_iter().all(stretches)
}

fn without_dead_steps(steps: Vec<Step>, mut outputs: Vec<SpmdOutput>) -> (Vec<Step>, Vec<SpmdOutput>) {
    let mut live = vec![false; steps.len()];
    outputs.iter().for_each(|o| live[o.step.index()] = true);
    for (index, step) in steps.iter().enumerate().rev() {
        if live[index] {
            step.args.iter().for_each(|a| live[a.index()] = true);
        }
    }
    let mut next = 0;
    let names: Vec<StepId> = live
        .iter()
        .map(|&live| {
            let name = StepId(next);
            next += u32::from(live);
            name
        })
        .collect();
    let kept = steps.into_iter().zip(&live).filter(|(_, live)| **live).map(|(mut step, _)| {
        step.args.iter_mut().for_each(|a| *a = names[a.index()]);
        step
    });
    let kept = kept.collect();
    outputs.iter_mut().for_each(|o| o.step = names[o.step.index()]);
    (kept, outputs)
}
