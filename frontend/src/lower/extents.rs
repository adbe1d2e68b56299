//! What can be said of the types of results whose shape depends on data: rank and element type, and the extents that
//! data does not touch. One rule per operator; operators without one rely on what the model declares.

use super::{Lowering, Value};
use crate::model::{AttributeValue, Node};
use tpshard_ir::{DType, Dim, Type};

/// An extent: this, or whatever data says, at most so many.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Extent {
    Is(Dim),
    Open(Option<Dim>),
}

/// Element type and extents of a result.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Ranked {
    pub(super) dtype: DType,
    pub(super) extents: Vec<Extent>,
}

const OPEN: Extent = Extent::Open(None);

fn is(dims: &[Dim]) -> Vec<Extent> {
    dims.iter().cloned().map(Extent::Is).collect()
}

fn same(ty: &Type) -> Ranked {
    Ranked { dtype: ty.dtype, extents: is(&ty.shape) }
}

fn open(dtype: DType, rank: usize) -> Ranked {
    Ranked { dtype, extents: vec![OPEN; rank] }
}

/// A type with some dims open.
fn opened(ty: &Type, dims: impl IntoIterator<Item = usize>) -> Ranked {
    let mut ranked = same(ty);
    for dim in dims {
        if let Some(extent) = ranked.extents.get_mut(dim) {
            *extent = OPEN;
        }
    }
    ranked
}

fn at(axis: i64, rank: usize) -> Option<usize> {
    let length = i64::try_from(rank).ok()?;
    usize::try_from(if axis < 0 { axis.checked_add(length)? } else { axis }).ok().filter(|&at| at < rank)
}

impl Lowering<'_> {
    /// What is known of each result; nothing for those without rule.
    pub(super) fn extents(&mut self, node: &Node, inputs: &[Option<Value>]) -> Vec<Option<Ranked>> {
        if !node.domain.is_empty() {
            return Vec::new();
        }
        match node.op_type.as_str() {
            "If" => self.branches(node).unwrap_or_default(),
            "Loop" => self.repeated(node, inputs).unwrap_or_default(),
            "Scan" => self.scanned(node, inputs).unwrap_or_default(),
            "Unique" => self.unique_extents(node, inputs).unwrap_or_default(),
            "TopK" => self.top_k_extents(node, inputs).unwrap_or_default(),
            "RNN" | "GRU" | "LSTM" => self.recurrent_extents(node, inputs).unwrap_or_default(),
            "Split" => self.split_extents(node, inputs).unwrap_or_default(),
            _ => vec![self.single_extents(node, inputs)],
        }
    }

    /// The NumPy broadcast of the operands, open where it is not known which of them stretch.
    fn elementwise_extents(&self, node: &Node, inputs: &[Option<Value>]) -> Option<Ranked> {
        let types: Vec<Type> =
            inputs.iter().map(|value| Some(self.ty(value.as_ref()?))).collect::<Option<_>>()?;
        let dtype = match node.op_type.as_str() {
            "Equal" | "Less" | "LessOrEqual" | "Greater" | "GreaterOrEqual" => DType::Bool,
            "Where" => types.get(1)?.dtype,
            _ => types.first()?.dtype,
        };
        let rank = types.iter().map(Type::rank).max()?;
        let extent = |axis: usize| {
            let own = |ty: &Type| ty.shape.get((axis + ty.rank()).checked_sub(rank)?).cloned();
            let facing: Vec<Dim> = types.iter().filter_map(own).filter(|dim| !dim.is_one()).collect();
            match facing.as_slice() {
                [] => Extent::Is(Dim::constant(1)),
                [first, rest @ ..] if rest.iter().all(|dim| dim == first) => Extent::Is(first.clone()),
                // A number other than 1 stays whatever the others are.
                dims => dims.iter().find(|dim| dim.as_const().is_some()).cloned().map_or(OPEN, Extent::Is),
            }
        };
        Some(Ranked { dtype, extents: (0..rank).map(extent).collect() })
    }

    /// `Y` of all steps, then the last states; both with a dim for the directions.
    fn recurrent_extents(&self, node: &Node, inputs: &[Option<Value>]) -> Option<Vec<Option<Ranked>>> {
        let ty = |index: usize| inputs.get(index).and_then(Option::as_ref).map(|value| self.ty(value));
        let (x, weights) = (ty(0)?, ty(2)?);
        let batch_first = node.attributes().int("layout", 0).ok()? != 0;
        let [first, second, _] = x.shape.as_slice() else { return None };
        let [directions, _, hidden] = weights.shape.as_slice() else { return None };
        let (steps, batch) = if batch_first { (second, first) } else { (first, second) };
        let (all, last) = if batch_first {
            ([batch, steps, directions, hidden], [batch, directions, hidden])
        } else {
            ([steps, directions, batch, hidden], [directions, batch, hidden])
        };
        let ranked = |dims: &[&Dim]| {
            Some(Ranked {
                dtype: x.dtype,
                extents: dims.iter().map(|&dim| Extent::Is(dim.clone())).collect(),
            })
        };
        Some(vec![ranked(&all), ranked(&last), ranked(&last)])
    }

    /// Operators of one result.
    fn single_extents(&self, node: &Node, inputs: &[Option<Value>]) -> Option<Ranked> {
        let value = |index: usize| inputs.get(index).and_then(Option::as_ref);
        let ty = |index: usize| value(index).map(|value| self.ty(value));
        // The number of entries of a list.
        let count = |index: usize| ty(index)?.shape.first()?.as_size();
        let int = |name: &str, default: i64| node.attributes().int(name, default).ok();
        Some(match node.op_type.as_str() {
            "Reshape" => open(ty(0)?.dtype, count(1)?),
            "Expand" => open(ty(0)?.dtype, ty(0)?.rank().max(count(1)?)),
            "ConstantOfShape" => open(constant_type(node), count(0)?),
            "Tile" | "Resize" | "Upsample" | "CenterCropPad" => {
                let x = ty(0)?;
                opened(&x, 0..x.rank())
            }
            "Conv" => {
                let (x, weights) = (ty(0)?, ty(1)?);
                let mut ranked = opened(&x, 2..x.rank());
                *ranked.extents.get_mut(1)? = Extent::Is(weights.shape.first()?.clone());
                ranked
            }
            "ConvTranspose" => {
                let x = ty(0)?;
                opened(&x, 1..x.rank())
            }
            "MaxPool" | "AveragePool" | "LpPool" if node.outputs.len() < 2 => {
                let x = ty(0)?;
                opened(&x, 2..x.rank())
            }
            "GridSample" => {
                let (x, grid) = (ty(0)?, ty(1)?);
                let mut extents = is(x.shape.get(..2)?);
                extents.extend(is(grid.shape.get(1..grid.rank().checked_sub(1)?)?));
                Ranked { dtype: x.dtype, extents }
            }
            "RoiAlign" => {
                let (x, boxes) = (ty(0)?, ty(1)?);
                let size = |name| int(name, 1).map(|size| Extent::Is(Dim::constant(size)));
                let (rows, channels) = (boxes.shape.first()?.clone(), x.shape.get(1)?.clone());
                let extents = vec![
                    Extent::Is(rows),
                    Extent::Is(channels),
                    size("output_height")?,
                    size("output_width")?,
                ];
                Ranked { dtype: x.dtype, extents }
            }
            "DFT" | "STFT" => {
                let rank = if node.op_type == "STFT" { 4 } else { ty(0)?.rank() };
                open(ty(0)?.dtype, rank)
            }
            "Slice" => self.along(&ty(0)?, value(3)),
            "Pad" => self.along(&ty(0)?, value(3)),
            "Trilu" | "CumSum" | "Clip" | "ReverseSequence" | "Dropout" | "ScatterND" | "ScatterElements" => {
                same(&ty(0)?)
            }
            "MatMul" => product_extents(&ty(0)?, &ty(1)?)?,
            "Gemm" => open(ty(0)?.dtype, 2),
            "Einsum" => {
                let equation = node.attributes().required_string("equation").ok()?;
                // What an ellipsis stands for, or what is left out, the model may declare.
                let (_, result) = equation.split_once("->").filter(|_| !equation.contains('.'))?;
                open(ty(0)?.dtype, result.chars().filter(char::is_ascii_alphabetic).count())
            }
            "Concat" => {
                let types = (0..inputs.len()).map(&ty).collect::<Option<Vec<Type>>>()?;
                let first = types.first()?;
                let axis = at(int("axis", 0)?, first.rank())?;
                let mut ranked = opened(first, [axis]);
                for (dim, extent) in ranked.extents.iter_mut().enumerate() {
                    if types.iter().any(|ty| ty.shape.get(dim) != first.shape.get(dim)) {
                        *extent = OPEN;
                    }
                }
                ranked
            }
            "Range" => open(ty(0)?.dtype, 1),
            "Squeeze" => open(ty(0)?.dtype, ty(0)?.rank().checked_sub(count(1)?)?),
            "Unsqueeze" => open(ty(0)?.dtype, ty(0)?.rank() + count(1)?),
            "OneHot" => {
                let (indices, values) = (ty(0)?, ty(2)?);
                let axis = at(int("axis", -1)?, indices.rank() + 1)?;
                let mut extents = is(&indices.shape);
                extents.insert(axis, OPEN);
                Ranked { dtype: values.dtype, extents }
            }
            "ReduceSum" | "ReduceMean" | "ReduceMax" | "ReduceMin" | "ReduceProd" | "ReduceL1"
            | "ReduceL2" | "ReduceLogSum" | "ReduceLogSumExp" | "ReduceSumSquare" => {
                let x = ty(0)?;
                let dropped = if int("keepdims", 1)? == 0 { count(1)? } else { 0 };
                open(x.dtype, x.rank().checked_sub(dropped)?)
            }
            "NonZero" => {
                let x = ty(0)?;
                Ranked {
                    dtype: DType::I64,
                    extents: vec![Extent::Is(x.rank().into()), Extent::Open(Some(x.elements()))],
                }
            }
            "Compress" => {
                let x = ty(0)?;
                match node.attributes().optional_int("axis").ok()? {
                    Some(axis) => {
                        let axis = at(axis, x.rank())?;
                        let mut ranked = same(&x);
                        ranked.extents[axis] = Extent::Open(Some(x.shape[axis].clone()));
                        ranked
                    }
                    None => Ranked { dtype: x.dtype, extents: vec![Extent::Open(Some(x.elements()))] },
                }
            }
            "NonMaxSuppression" => {
                let scores = ty(1)?;
                let rows = Extent::Open(Some(scores.elements()));
                Ranked { dtype: DType::I64, extents: vec![rows, Extent::Is(Dim::constant(3))] }
            }
            "AffineGrid" => {
                let size = count(1)?;
                let mut ranked = open(ty(0)?.dtype, size);
                *ranked.extents.last_mut()? = Extent::Is(Dim::from(size.checked_sub(2)?));
                ranked
            }
            "Col2Im" => open(ty(0)?.dtype, count(1)?.checked_add(2)?),
            "MaxUnpool" => open(ty(0)?.dtype, ty(0)?.rank()),
            "HannWindow" | "HammingWindow" | "BlackmanWindow" => {
                open(type_attribute(node, "output_datatype"), 1)
            }
            "Add" | "Sub" | "Mul" | "Div" | "Pow" | "Mod" | "Max" | "Min" | "Sum" | "Mean" | "PRelu"
            | "And" | "Or" | "Xor" | "BitwiseAnd" | "BitwiseOr" | "BitwiseXor" | "Equal" | "Less"
            | "LessOrEqual" | "Greater" | "GreaterOrEqual" | "Where" => {
                self.elementwise_extents(node, inputs)?
            }
            "MelWeightMatrix" => open(type_attribute(node, "output_datatype"), 2),
            _ => return None,
        })
    }

    /// Open along the axes that a value lists, everywhere if it is not known.
    fn along(&self, x: &Type, axes: Option<&Value>) -> Ranked {
        let axes = axes.and_then(|axes| self.ints(axes, "").ok());
        let axes = axes.map(|axes| axes.iter().map(|&axis| at(axis, x.rank())).collect::<Option<Vec<_>>>());
        match axes {
            Some(Some(axes)) => opened(x, axes),
            _ => opened(x, 0..x.rank()),
        }
    }

    fn top_k_extents(&self, node: &Node, inputs: &[Option<Value>]) -> Option<Vec<Option<Ranked>>> {
        let x = self.ty(inputs.first()?.as_ref()?);
        let axis = at(node.attributes().int("axis", -1).ok()?, x.rank())?;
        let mut ranked = same(&x);
        ranked.extents[axis] = Extent::Open(Some(x.shape[axis].clone()));
        let indices = Ranked { dtype: DType::I64, ..ranked.clone() };
        Some(vec![Some(ranked), Some(indices)])
    }

    fn split_extents(&self, node: &Node, inputs: &[Option<Value>]) -> Option<Vec<Option<Ranked>>> {
        let x = self.ty(inputs.first()?.as_ref()?);
        let axis = at(node.attributes().int("axis", 0).ok()?, x.rank())?;
        let mut ranked = same(&x);
        ranked.extents[axis] = Extent::Open(Some(x.shape[axis].clone()));
        Some(vec![Some(ranked); node.outputs.len()])
    }

    fn unique_extents(&self, node: &Node, inputs: &[Option<Value>]) -> Option<Vec<Option<Ranked>>> {
        let x = self.ty(inputs.first()?.as_ref()?);
        let (first, most) = match node.attributes().optional_int("axis").ok()? {
            Some(axis) => {
                let axis = at(axis, x.rank())?;
                let mut ranked = same(&x);
                ranked.extents[axis] = Extent::Open(Some(x.shape[axis].clone()));
                (ranked, x.shape[axis].clone())
            }
            None => {
                let extents = vec![Extent::Open(Some(x.elements()))];
                (Ranked { dtype: x.dtype, extents }, x.elements())
            }
        };
        let list = |extent: Extent| Ranked { dtype: DType::I64, extents: vec![extent] };
        let some = list(Extent::Open(Some(most.clone())));
        Some(vec![Some(first), Some(some.clone()), Some(list(Extent::Is(most))), Some(some)])
    }

    /// What both branches give.
    fn branches(&mut self, node: &Node) -> Option<Vec<Option<Ranked>>> {
        let attributes = node.attributes();
        let then_branch = attributes.required_graph("then_branch").ok()?;
        let else_branch = attributes.required_graph("else_branch").ok()?;
        let (a, b) = (self.probe(then_branch, &[])?, self.probe(else_branch, &[])?);
        let joined = a.into_iter().zip(b).map(|((dtype, a), (other, b))| {
            if dtype != other || a.len() != b.len() {
                return None;
            }
            let extents = a.into_iter().zip(b).map(|(a, b)| match (a, b) {
                (Some(a), Some(b)) if a == b => Extent::Is(a),
                _ => OPEN,
            });
            Some(Ranked { dtype, extents: extents.collect() })
        });
        Some(joined.collect())
    }

    /// Carried values keep the extents that no round changes; scan outputs have a row per round.
    fn repeated(&mut self, node: &Node, inputs: &[Option<Value>]) -> Option<Vec<Option<Ranked>>> {
        let body = node.attributes().required_graph("body").ok()?;
        let flag = |index: usize| -> usize {
            let declared = body.inputs.get(index).and_then(|info| info.tensor_type());
            declared.and_then(|ty| ty.shape.as_ref()).map_or(0, |dims| dims.len().min(1))
        };
        let one = |dtype: DType, rank: usize| Type::new(dtype, vec![Dim::constant(1); rank]);
        let mut types = vec![one(DType::I64, flag(0)), one(DType::Bool, flag(1))];
        for index in 2..node.inputs.len() {
            types.push(self.ty(inputs.get(index)?.as_ref()?));
        }
        let states = types.len() - 2;
        let results = self.settled(body, &mut types, 2..2 + states, 1)?;
        let trips = inputs.first().and_then(Option::as_ref).and_then(|value| self.ints(value, "").ok());
        // Without condition the rounds are counted; a body may always end earlier if it computes one.
        let rows = match (trips.as_deref(), self.goes_on(body, node)) {
            (Some([trips]), true) => Extent::Is(Dim::constant((*trips).max(0))),
            _ => OPEN,
        };
        let carried = types.iter().skip(2).map(|ty| Some(self.with_open(ty)));
        let mut all: Vec<Option<Ranked>> = carried.collect();
        for (dtype, shape) in results.into_iter().skip(1 + states) {
            let mut extents = vec![rows.clone()];
            extents.extend(shape.into_iter().map(|dim| dim.map_or(OPEN, Extent::Is)));
            all.push(Some(Ranked { dtype, extents }));
        }
        Some(all)
    }

    /// True if no condition ends a loop: none is given, and the body passes on the one it gets.
    fn goes_on(&self, body: &crate::model::Graph, node: &Node) -> bool {
        let (Some(given), Some(next)) = (body.inputs.get(1), body.outputs.first()) else { return false };
        let start = match node.input(1) {
            None => true,
            Some(name) => {
                let known = self.lookup(name).and_then(|value| self.known(value));
                known.is_some_and(|known| known.elements.iter().all(|e| e.integer().is_some_and(|v| v != 0)))
            }
        };
        let passed = body.nodes.iter().find(|node| node.outputs.contains(&next.name));
        let same = match passed {
            None => next.name == given.name,
            Some(node) => node.op_type == "Identity" && node.input(0) == Some(&given.name),
        };
        start && same
    }

    /// The types of a body's results once the types of what it carries do not change any more: extents that do become
    /// symbols of their own. `types` are those of its inputs, `carried` says which of them are carried; their
    /// successors start at result `result`.
    fn settled(
        &mut self,
        body: &crate::model::Graph,
        types: &mut [Type],
        carried: std::ops::Range<usize>,
        result: usize,
    ) -> Option<Vec<(DType, Vec<Option<Dim>>)>> {
        let dims: usize = types.get(carried.clone())?.iter().map(Type::rank).sum();
        for _ in 0..=dims {
            let results = self.probe(body, types)?;
            let mut settled = true;
            for (ty, (dtype, shape)) in
                types.get_mut(carried.clone())?.iter_mut().zip(results.iter().skip(result))
            {
                if ty.dtype != *dtype || ty.rank() != shape.len() {
                    return None;
                }
                for (dim, next) in ty.shape.iter_mut().zip(shape) {
                    let placeholder = dim.symbols().iter().any(|s| s.starts_with(CHANGING));
                    if next.as_ref() != Some(dim) && !placeholder {
                        *dim = Dim::symbol(&format!("{CHANGING}{}", self.changing));
                        self.changing += 1;
                        settled = false;
                    }
                }
            }
            if settled {
                return Some(results);
            }
        }
        None
    }

    /// A type with its changing dims open.
    fn with_open(&self, ty: &Type) -> Ranked {
        let extent = |dim: &Dim| {
            let changes = dim.symbols().iter().any(|symbol| symbol.starts_with(CHANGING));
            if changes { OPEN } else { Extent::Is(dim.clone()) }
        };
        Ranked { dtype: ty.dtype, extents: ty.shape.iter().map(extent).collect() }
    }

    /// States, then scan outputs with as many rows as the sequences have.
    fn scanned(&mut self, node: &Node, inputs: &[Option<Value>]) -> Option<Vec<Option<Ranked>>> {
        let attributes = node.attributes();
        let body = attributes.required_graph("body").ok()?;
        let batched = usize::from(node.opset < 9);
        let given: Vec<Type> =
            inputs.iter().skip(batched).map(|value| Some(self.ty(value.as_ref()?))).collect::<Option<_>>()?;
        let sequences = usize::try_from(attributes.required_int("num_scan_inputs").ok()?).ok()?;
        let states = given.len().checked_sub(sequences)?;
        let list = |name: &str, count: usize| -> Option<Vec<i64>> {
            let list = attributes.optional_ints(name).ok()?;
            let list = list.map_or_else(|| vec![0; count], <[i64]>::to_vec);
            (list.len() == count).then_some(list)
        };
        let axes = list("scan_input_axes", sequences)?;
        let (mut types, mut lead, mut length) = (Vec::new(), Vec::new(), None);
        for (index, ty) in given.iter().enumerate() {
            let mut ty = ty.clone();
            if batched == 1 {
                lead = vec![ty.shape.first()?.clone()];
                ty.shape.remove(0);
            }
            if let Some(sequence) = index.checked_sub(states) {
                let axis = at(*axes.get(sequence)?, ty.rank())?;
                length.get_or_insert(ty.shape.remove(axis));
            }
            types.push(ty);
        }
        let length = length?;
        let results = self.settled(body, &mut types, 0..states, 0)?;
        let outputs = list("scan_output_axes", results.len().checked_sub(states)?)?;
        let mut all: Vec<Option<Ranked>> = Vec::new();
        for ty in types.iter().take(states) {
            let mut ranked = self.with_open(ty);
            ranked.extents.splice(0..0, is(&lead));
            all.push(Some(ranked));
        }
        for ((dtype, shape), axis) in results.into_iter().skip(states).zip(outputs) {
            let mut extents: Vec<Extent> =
                shape.into_iter().map(|dim| dim.map_or(OPEN, Extent::Is)).collect();
            let axis = at(axis, extents.len() + 1)?;
            extents.insert(axis, Extent::Is(length.clone()));
            extents.splice(0..0, is(&lead));
            all.push(Some(Ranked { dtype, extents }));
        }
        Some(all)
    }
}

/// How the names of extents begin that change from round to round.
const CHANGING: &str = "changing.";

/// NumPy's `matmul`: what leads is stretched.
fn product_extents(a: &Type, b: &Type) -> Option<Ranked> {
    let (rows, columns) = (a.rank() > 1, b.rank() > 1);
    let lead = a.rank().saturating_sub(2).max(b.rank().saturating_sub(2));
    let mut extents = vec![OPEN; lead];
    if rows {
        extents.push(Extent::Is(a.shape.get(a.rank() - 2)?.clone()));
    }
    if columns {
        extents.push(Extent::Is(b.shape.last()?.clone()));
    }
    Some(Ranked { dtype: a.dtype, extents })
}

fn constant_type(node: &Node) -> DType {
    node.attributes
        .iter()
        .find_map(|attribute| match &attribute.value {
            AttributeValue::Tensor(tensor) if attribute.name == "value" => Some(tensor.dtype),
            _ => None,
        })
        .unwrap_or(DType::F32)
}

fn type_attribute(node: &Node, name: &str) -> DType {
    let code = node.attributes().int(name, 1).unwrap_or(1);
    crate::tensor_data::dtype_from_onnx(code).unwrap_or(DType::F32)
}
