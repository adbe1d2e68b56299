//! What the border may take besides what the inputs' types say.
//!
//! *Masks of one entry.* A mask over past and new entries has a size that is a sum of others, `past + seq`, because the
//! operators that use it need it to agree. Those that broadcast would take one entry just as well. The mask is followed
//! through the model as having one entry along that axis: where every use broadcasts it against something of the full
//! size, stretching it beforehand gives the same, and the axis is marked. Where its shape is read, or its entries are
//! summed, joined or moved, it is not. Attention of ONNX Runtime takes a mask of one entry for none. A mask that nothing
//! reads may have any number of entries.
//!
//! *Buffers.* GroupQueryAttention takes a past that is longer than what it holds, if `total_sequence_length` is no more
//! than that. Where the rest of the model cannot see how long the past is, cutting it to `total - seq` entries beforehand
//! and filling up the present afterwards gives the same.

use super::context::Lowering;
use super::value::{Element, Value};
use crate::model::{Graph as ModelGraph, Node};
use std::collections::{BTreeSet, HashMap};
use tpshard_ir::{Border, Dim, Filling, Graph};

/// Most axes that are followed.
const MOST: usize = 16;

/// Elementwise functions of one operand.
const UNARY: &[&str] = &[
    "Abs",
    "Cast",
    "Ceil",
    "Clip",
    "Exp",
    "Floor",
    "Identity",
    "IsInf",
    "IsNaN",
    "Log",
    "Neg",
    "Not",
    "Reciprocal",
    "Relu",
    "Round",
    "Sigmoid",
    "Sign",
    "Sqrt",
    "Tanh",
];
/// Elementwise functions whose operands broadcast.
const BROADCASTING: &[&str] = &[
    "Add",
    "And",
    "BitwiseAnd",
    "BitwiseOr",
    "BitwiseXor",
    "Div",
    "Equal",
    "Greater",
    "GreaterOrEqual",
    "Less",
    "LessOrEqual",
    "Max",
    "Min",
    "Mod",
    "Mul",
    "Or",
    "Pow",
    "Sub",
    "Where",
    "Xor",
];

/// A value that has one entry along an axis if inputs have.
#[derive(Clone)]
struct Thin {
    axis: usize,
    /// The candidates that decide it.
    origins: BTreeSet<usize>,
    /// It is the input itself, or a cast of it.
    plain: bool,
}

/// An axis of an input.
struct Candidate {
    input: String,
    axis: usize,
    /// How its uses take one entry; `None` if there is no use.
    filling: Option<Filling>,
}

/// The candidates that cannot be stretched.
type Refused = BTreeSet<usize>;

impl Lowering<'_> {
    /// The borders of the finished graph.
    pub(super) fn borders(&self, graph: &Graph) -> Vec<Border> {
        let mut borders = self.stretches(graph);
        borders.extend(self.buffers(graph));
        borders
    }

    fn stretches(&self, graph: &Graph) -> Vec<Border> {
        let mut candidates = candidates(graph);
        if candidates.is_empty() || candidates.len() > MOST {
            return Vec::new();
        }
        // Every round takes a candidate away, or is the last.
        loop {
            let refused = match self.follow(&mut candidates) {
                Ok(()) => break,
                Err(refused) => refused,
            };
            let mut at = 0;
            candidates.retain(|_| {
                at += 1;
                !refused.contains(&(at - 1))
            });
        }
        let stretch = |candidate: Candidate| {
            let (input, axis) = (candidate.input.as_str().into(), candidate.axis);
            let filling =
                candidate.filling.or_else(|| self.is_unread(&candidate.input).then_some(Filling::Any))?;
            Some(Border::Stretch { input, axis, filling })
        };
        candidates.into_iter().filter_map(stretch).collect()
    }

    /// True if no node and no output of the model has an input for its operand.
    fn is_unread(&self, input: &str) -> bool {
        let graph = &self.model.graph;
        let own = Thin { axis: 0, origins: BTreeSet::from([0]), plain: true };
        refuse_inner(graph, &HashMap::from([(input, own)])).is_ok()
    }

    /// Follows all candidates through the model.
    fn follow(&self, candidates: &mut [Candidate]) -> Result<(), Refused> {
        let mut thin: HashMap<&str, Thin> = HashMap::new();
        let model = self.model;
        for (at, candidate) in candidates.iter_mut().enumerate() {
            candidate.filling = None;
            let own = Thin { axis: candidate.axis, origins: [at].into(), plain: true };
            let input = model.graph.inputs.iter().find(|input| input.name == candidate.input);
            let Some(input) = input.filter(|input| !thin.contains_key(input.name.as_str())) else {
                return Err([at].into());
            };
            thin.insert(&input.name, own);
        }
        for node in &model.graph.nodes {
            for inner in node.subgraphs() {
                refuse_inner(inner, &thin)?;
            }
            let operands: Vec<(usize, &Thin)> = (0..node.inputs.len())
                .filter_map(|index| Some((index, thin.get(node.input(index)?)?)))
                .collect();
            let Some((index, first)) = operands.first().map(|&(index, first)| (index, first.clone())) else {
                continue;
            };
            let all: Refused = operands.iter().flat_map(|(_, thin)| thin.origins.iter().copied()).collect();
            let alone = operands.len() == 1;
            if alone && takes_one_for_none(node, index, &first) {
                use_as(candidates, &first.origins, Filling::Ones)?;
                continue;
            }
            if node.op_type == "Shape" && node.domain.is_empty() && self.reads_other_dims(node, first.axis) {
                continue;
            }
            let result = if alone && index == 0 { self.moved(node, &first) } else { None };
            let (result, broadcast) = match result {
                Some(result) => (result, BTreeSet::new()),
                None => self.combined(node, &operands).ok_or(all)?,
            };
            use_as(candidates, &broadcast, Filling::Repeat)?;
            if let (Some(result), Some(name)) = (result, node.output(0)) {
                thin.insert(name, result);
            }
        }
        let outputs = model.graph.outputs.iter().filter_map(|output| thin.get(output.name.as_str()));
        let seen: Refused = outputs.flat_map(|thin| thin.origins.iter().copied()).collect();
        if seen.is_empty() { Ok(()) } else { Err(seen) }
    }

    /// The result of a node of one operand that keeps the axis, perhaps in another place; `None` for other nodes.
    fn moved(&self, node: &Node, from: &Thin) -> Option<Option<Thin>> {
        if !node.domain.is_empty() || node.outputs.len() != 1 {
            return None;
        }
        let rank = self.rank(node.input(0)?)?;
        let op = node.op_type.as_str();
        let cast = matches!(op, "Cast" | "Identity");
        let axis = match op {
            _ if UNARY.contains(&op) => from.axis,
            "Unsqueeze" => {
                let rank = self.rank(node.output(0)?)?;
                let added = self.axes(node, rank)?;
                (0..rank).filter(|axis| !added.contains(axis)).nth(from.axis)?
            }
            "Squeeze" => {
                let gone = self.axes(node, rank)?;
                let before = gone.iter().filter(|&&axis| axis < from.axis).count();
                (!gone.contains(&from.axis)).then_some(from.axis - before)?
            }
            "Transpose" => {
                let perm = node.attributes().optional_ints("perm").ok()?;
                match perm {
                    Some(perm) => perm.iter().position(|&axis| usize::try_from(axis) == Ok(from.axis))?,
                    None => rank.checked_sub(1 + from.axis)?,
                }
            }
            "Expand" => return self.expanded(node, from, rank),
            _ => return None,
        };
        Some(Some(Thin { axis, origins: from.origins.clone(), plain: from.plain && cast }))
    }

    /// An Expand: to the full size, or it leaves the axis as it is.
    fn expanded(&self, node: &Node, from: &Thin, rank: usize) -> Option<Option<Thin>> {
        let target = self.known(self.lookup(node.input(1)?)?)?;
        let lead = target.elements.len().checked_sub(rank);
        let (axis, wanted) = match lead {
            Some(lead) => (from.axis + lead, target.elements.get(from.axis + lead)?.dim()?.clone()),
            // Dims before the target's own stay.
            None => {
                let own = from.axis.checked_sub(rank - target.elements.len());
                let wanted = own.and_then(|own| target.elements.get(own)).and_then(Element::dim).cloned();
                (from.axis, wanted.unwrap_or_else(|| Dim::constant(1)))
            }
        };
        // To any other size only one entry could be expanded, which is found out elsewhere.
        wanted.is_one().then(|| Some(Thin { axis, origins: from.origins.clone(), plain: false }))
    }

    /// The result of a function whose operands broadcast, if it has one entry as well, and the candidates that are
    /// stretched by it; `None` for any other node.
    fn combined(&self, node: &Node, operands: &[(usize, &Thin)]) -> Option<(Option<Thin>, BTreeSet<usize>)> {
        let op = node.op_type.as_str();
        if !node.domain.is_empty() || node.outputs.len() != 1 {
            return None;
        }
        if op == "Expand" {
            return self.filled_by_expand(node, operands);
        }
        // Before opset 7 an attribute said how operands broadcast.
        if !BROADCASTING.contains(&op) || node.opset < 7 {
            return None;
        }
        let result = self.dims_of_name(node.output(0)?)?;
        let shapes: Vec<Vec<Dim>> = (0..node.inputs.len())
            .map(|index| self.dims_of_name(node.input(index)?))
            .collect::<Option<_>>()?;
        let mut broadcast = BTreeSet::new();
        let mut left: Option<Thin> = None;
        for &(index, thin) in operands {
            let from_end = shapes.get(index)?.len().checked_sub(thin.axis)?;
            let axis = result.len().checked_sub(from_end)?;
            let is_thin = |other: usize| {
                let has = |&&(index, thin): &&(usize, &Thin)| {
                    index == other && shapes.get(index).map(|shape| shape.len() - thin.axis) == Some(from_end)
                };
                operands.iter().any(|operand| has(&operand))
            };
            let mut others = shapes.iter().enumerate().filter(|(other, _)| !is_thin(*other));
            let dim =
                |shape: &Vec<Dim>| shape.len().checked_sub(from_end).and_then(|at| shape.get(at)).cloned();
            if others.clone().any(|(_, shape)| dim(shape).as_ref() == result.get(axis)) {
                broadcast.extend(thin.origins.iter().copied());
                continue;
            }
            if others.any(|(_, shape)| dim(shape).is_some_and(|dim| !dim.is_one())) {
                return None;
            }
            match &mut left {
                Some(left) if left.axis != axis => return None,
                Some(left) => left.origins.extend(&thin.origins),
                None => left = Some(Thin { axis, origins: thin.origins.clone(), plain: false }),
            }
        }
        Some((left, broadcast))
    }

    /// An Expand of the operand to the full size.
    fn filled_by_expand(
        &self,
        node: &Node,
        operands: &[(usize, &Thin)],
    ) -> Option<(Option<Thin>, BTreeSet<usize>)> {
        let [(0, thin)] = operands else { return None };
        let own = self.dims_of_name(node.input(0)?)?;
        let target = self.known(self.lookup(node.input(1)?)?)?;
        let from_end = own.len().checked_sub(thin.axis)?;
        let wanted = target.elements.len().checked_sub(from_end).and_then(|at| target.elements.get(at))?;
        (wanted.dim() == own.get(thin.axis)).then(|| (None, thin.origins.clone()))
    }

    /// True if all that is read of the shape that a node gives are dims other than `axis`.
    fn reads_other_dims(&self, node: &Node, axis: usize) -> bool {
        let Some(name) = node.output(0) else { return true };
        let Some(rank) = node.input(0).and_then(|input| self.rank(input)) else { return false };
        let (Ok(start), Ok(end)) = (node.attributes().int("start", 0), node.attributes().optional_int("end"))
        else {
            return false;
        };
        if start != 0 || end.is_some() {
            return false;
        }
        let graph = &self.model.graph;
        let mut inner = HashMap::new();
        inner.insert(name, Thin { axis: 0, origins: BTreeSet::from([0]), plain: false });
        let picks = |user: &Node| {
            let at_start = user.attributes().int("axis", 0).is_ok_and(|axis| axis == 0);
            let indices = user.input(1).and_then(|indices| self.known(self.lookup(indices)?));
            let other = |element: &Element| {
                let index =
                    element.integer().map(|index| if index < 0 { index + rank as i64 } else { index });
                index.is_some_and(|index| usize::try_from(index) != Ok(axis))
            };
            user.op_type == "Gather"
                && user.domain.is_empty()
                && at_start
                && user.input(1) != Some(name)
                && indices.is_some_and(|indices| indices.elements.iter().all(other))
        };
        let users = |user: &&Node| user.inputs.iter().any(|input| input == name);
        graph.nodes.iter().filter(users).all(picks)
            && graph.nodes.iter().flat_map(Node::subgraphs).all(|graph| refuse_inner(graph, &inner).is_ok())
            && graph.outputs.iter().all(|output| output.name != name)
    }

    /// The pasts that may be buffers, if none of the rest can see their lengths.
    fn buffers(&self, graph: &Graph) -> Vec<Border> {
        let mut found = Vec::new();
        let Some(first) = graph.states.first() else { return Vec::new() };
        let total = graph.outputs.iter().find(|output| output.name == first.output);
        let total = total.and_then(|output| graph.ty(output.value).shape.get(first.axis)).cloned();
        let past = graph.inputs().find(|(_, name, _)| **name == first.input);
        let past = past.and_then(|(_, _, ty)| ty.shape.get(first.axis)).and_then(|dim| dim.as_symbol());
        let (Some(total), Some(past)) = (total, past) else { return Vec::new() };
        for state in &graph.states {
            if !self.is_of_buffers(&state.input, &state.output, &total) {
                return Vec::new();
            }
            let (input, output) = (state.input.clone(), state.output.clone());
            found.push(Border::Buffer { input, output, axis: state.axis, total: total.clone() });
        }
        // Other sizes by which the past could be told: none, but the total, from which its length is found.
        let mut told = false;
        for (_, name, ty) in graph.inputs() {
            let state = graph.states.iter().find(|state| state.input == *name);
            for (axis, dim) in ty.shape.iter().enumerate().filter(|(_, dim)| dim.symbols().contains(past)) {
                let own = state.is_some_and(|state| state.axis == axis) && dim.as_symbol() == Some(past);
                if !own && *dim != total {
                    return Vec::new();
                }
                told |= !own;
            }
        }
        if told { found } else { Vec::new() }
    }

    /// True if one GroupQueryAttention alone reads the past, and nothing its present, of which it is told the length.
    fn is_of_buffers(&self, input: &str, output: &str, total: &Dim) -> bool {
        let model = &self.model.graph;
        let reads = |node: &Node, name: &str| node.inputs.iter().any(|input| input == name);
        let names: HashMap<&str, Thin> = [input, output]
            .map(|name| (name, Thin { axis: 0, origins: BTreeSet::from([0]), plain: false }))
            .into();
        let hidden =
            model.nodes.iter().flat_map(Node::subgraphs).all(|graph| refuse_inner(graph, &names).is_ok());
        if !hidden
            || model.nodes.iter().any(|node| reads(node, output))
            || model.outputs.iter().any(|declared| declared.name == input)
        {
            return false;
        }
        let mut users = model.nodes.iter().filter(|node| reads(node, input));
        let (Some(node), None) = (users.next(), users.next()) else { return false };
        let pairs = [(3, 1), (4, 2)];
        let paired = |&(past, present): &(usize, usize)| {
            node.input(past) == Some(input) && node.output(present) == Some(output)
        };
        let once = node.inputs.iter().filter(|name| *name == input).count() == 1;
        let told = node.input(6).and_then(|name| self.known(self.lookup(name)?));
        let told = told.and_then(|told| told.single().and_then(Element::dim).cloned());
        node.op_type == "GroupQueryAttention"
            && node.domain == "com.microsoft"
            && once
            && pairs.iter().any(paired)
            && told.as_ref() == Some(total)
    }

    fn rank(&self, name: &str) -> Option<usize> {
        self.dims_of_name(name).map(|dims| dims.len())
    }

    fn dims_of_name(&self, name: &str) -> Option<Vec<Dim>> {
        match self.lookup(name)? {
            Value::Poison => None,
            value => Some(self.current_all(&self.shape(value))),
        }
    }

    /// The axes of a Squeeze or Unsqueeze, which are an attribute before opset 13.
    fn axes(&self, node: &Node, rank: usize) -> Option<BTreeSet<usize>> {
        let given: Vec<i64> = match node.input(1) {
            Some(name) => {
                let known = self.known(self.lookup(name)?)?;
                known.elements.iter().map(Element::integer).collect::<Option<_>>()?
            }
            None => node.attributes().optional_ints("axes").ok()??.to_vec(),
        };
        let axis = |axis: i64| {
            let axis = if axis < 0 { axis.checked_add(i64::try_from(rank).ok()?)? } else { axis };
            usize::try_from(axis).ok().filter(|&axis| axis < rank)
        };
        given.into_iter().map(axis).collect()
    }
}

/// The dims of inputs that are sums of sizes which other inputs give, and are no state.
fn candidates(graph: &Graph) -> Vec<Candidate> {
    let data = graph.data_symbols();
    let mut found = Vec::new();
    for (value, name, ty) in graph.inputs() {
        if graph.states.iter().any(|state| state.input == *name) {
            continue;
        }
        let others = || graph.inputs().filter(|(other, ..)| *other != value).flat_map(|(_, _, ty)| &ty.shape);
        for (axis, dim) in ty.shape.iter().enumerate() {
            let symbols = dim.symbols();
            let given = |symbol: &std::sync::Arc<str>| {
                !data.contains(symbol) && others().any(|other| other.as_symbol() == Some(symbol))
            };
            if symbols.len() > 1 && symbols.iter().all(given) {
                found.push(Candidate { input: name.to_string(), axis, filling: None });
            }
        }
    }
    found
}

/// Attention of ONNX Runtime takes a mask of rank 2 with one column for no mask at all.
fn takes_one_for_none(node: &Node, index: usize, thin: &Thin) -> bool {
    node.op_type == "Attention"
        && node.domain == "com.microsoft"
        && index == 3
        && thin.axis == 1
        && thin.plain
        && thin.origins.len() == 1
}

/// Notes a use; an input whose uses take one entry in different ways cannot be stretched.
fn use_as(candidates: &mut [Candidate], origins: &BTreeSet<usize>, filling: Filling) -> Result<(), Refused> {
    for &origin in origins {
        let Some(candidate) = candidates.get_mut(origin) else { continue };
        match candidate.filling {
            Some(other) if other != filling => return Err([origin].into()),
            _ => candidate.filling = Some(filling),
        }
    }
    Ok(())
}

/// Refuses what a graph inside a node uses by name.
fn refuse_inner(graph: &ModelGraph, thin: &HashMap<&str, Thin>) -> Result<(), Refused> {
    let mut open = vec![graph];
    while let Some(graph) = open.pop() {
        let read = graph.nodes.iter().flat_map(|node| &node.inputs);
        let given = graph.outputs.iter().map(|output| &output.name);
        if let Some(used) = read.chain(given).find_map(|name| thin.get(name.as_str())) {
            return Err(used.origins.clone());
        }
        open.extend(graph.nodes.iter().flat_map(Node::subgraphs));
    }
    Ok(())
}
