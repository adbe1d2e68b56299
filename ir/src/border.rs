//! What may be given besides what a graph says of its inputs. It is made into that before anything runs, at the border,
//! so that planner, programs and kernels know nothing of it.
//!
//! - *Stretch*: a mask over past and new entries may have one entry, as operators that broadcast would take it, or any
//!   number of them if nothing reads it.
//! - *Buffer*: a past may be a buffer with room behind what it holds. Other inputs say how many entries there are with
//!   the new ones; the rest is cut off, and the present has zeros there. That is what ONNX Runtime does if past and
//!   present are not one buffer.
//! - *Rounded*: state is kept in a narrower type than the model declares. Past that is given in the declared type is
//!   rounded, and present is handed out in it.

use crate::dim::Dim;
use crate::dtype::DType;
use crate::graph::{Graph, Type};
use crate::interp::solve;
use crate::tensor::{Data, Tensor, element_count};
use half::{bf16, f16};
use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Most elements of an input that is stretched.
const LARGEST: usize = 1 << 28;

/// What may be given besides what the graph says of an input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Border {
    /// One entry along an axis, whatever its size; or any number of entries.
    Stretch { input: Arc<str>, axis: usize, filling: Filling },
    /// A past of any length from `total` on, which counts what it holds and what is new. The output is as long as it.
    Buffer { input: Arc<str>, output: Arc<str>, axis: usize, total: Dim },
    /// A past that is given, and an output that is handed out, in another type of floats than the graph's.
    Rounded { input: Arc<str>, output: Arc<str>, given: DType },
}

/// What takes the place of one entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filling {
    /// The entry, as in broadcasting.
    Repeat,
    /// Ones, where an operator takes a mask of one entry for none.
    Ones,
    /// Anything, and for any number of entries: nothing reads them.
    Any,
}

impl Border {
    /// The name of the input.
    pub fn input(&self) -> &Arc<str> {
        match self {
            Border::Stretch { input, .. } | Border::Buffer { input, .. } | Border::Rounded { input, .. } => {
                input
            }
        }
    }

    /// The axis of the input, if it is about one.
    pub fn axis(&self) -> Option<usize> {
        match self {
            Border::Stretch { axis, .. } | Border::Buffer { axis, .. } => Some(*axis),
            Border::Rounded { .. } => None,
        }
    }
}

/// What is done to one input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    pub input: Arc<str>,
    pub axis: usize,
    /// The extent that the graph takes.
    pub extent: usize,
    pub filling: Filling,
    /// The output that gets the extent that was given, if it is the present of a buffer.
    pub present: Option<Present>,
}

/// An output that is filled up with zeros.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Present {
    pub output: Arc<str>,
    pub axis: usize,
    pub extent: usize,
}

/// What has to be done to inputs of these types; nothing where they contradict each other, which binding them says.
pub fn changes(graph: &Graph, input_type: &dyn Fn(&str) -> Option<Type>) -> Vec<Change> {
    if graph.borders.is_empty() {
        return Vec::new();
    }
    // Where nothing else says how much of a past is used, all of it is.
    let found = changes_if(graph, input_type, true).or_else(|| changes_if(graph, input_type, false));
    found.unwrap_or_default()
}

/// As [`changes`], with pasts that may be longer than what is used, or not; `None` if nothing says how much that is.
fn changes_if(
    graph: &Graph,
    input_type: &dyn Fn(&str) -> Option<Type>,
    with_room: bool,
) -> Option<Vec<Change>> {
    let mut dims: Vec<(&Dim, i64, &str)> = Vec::new();
    let mut open: Vec<(&Border, &Dim, usize)> = Vec::new();
    for (_, name, ty) in graph.inputs() {
        let found = input_type(name).filter(|found| found.rank() == ty.rank())?;
        for (axis, (dim, extent)) in ty.shape.iter().zip(&found.shape).enumerate() {
            let border = graph.borders.iter().find(|b| **b.input() == **name && b.axis() == Some(axis));
            let extent = extent.as_const()?;
            match (border, usize::try_from(extent)) {
                (Some(border @ Border::Stretch { filling: Filling::Any, .. }), Ok(given)) => {
                    open.push((border, dim, given));
                }
                (Some(border @ Border::Stretch { .. }), Ok(1)) => open.push((border, dim, 1)),
                (Some(border @ Border::Buffer { .. }), Ok(given)) if with_room => {
                    open.push((border, dim, given));
                }
                _ => dims.push((dim, extent, &**name)),
            }
        }
    }
    let bindings = solve(&dims, graph).ok()?;
    let size = |dim: &Dim| dim.eval(&bindings).ok().and_then(|size| usize::try_from(size).ok());
    let mut found = Vec::new();
    for (border, dim, given) in open {
        let extent = size(dim)?;
        let (input, Some(axis)) = (border.input().clone(), border.axis()) else { continue };
        match border {
            Border::Stretch { filling, .. } if extent != given => {
                found.push(Change { input, axis, extent, filling: *filling, present: None });
            }
            Border::Buffer { output, total, .. } if extent < given && size(total)? <= given => {
                let present = Some(Present { output: output.clone(), axis, extent: given });
                found.push(Change { input, axis, extent, filling: Filling::Repeat, present });
            }
            Border::Stretch { .. } | Border::Buffer { .. } | Border::Rounded { .. } => {}
        }
    }
    Some(found)
}

/// The inputs with those rounded that may be given in another type than the graph's; `None` if nothing changes.
pub fn rounded<K: Ord + Clone + Borrow<str>>(
    graph: &Graph,
    inputs: &BTreeMap<K, Tensor>,
) -> Option<BTreeMap<K, Tensor>> {
    let mut changed: Option<BTreeMap<K, Tensor>> = None;
    for border in &graph.borders {
        let Border::Rounded { input, given, .. } = border else { continue };
        let Some((_, _, ty)) = graph.inputs().find(|(_, name, _)| *name == input) else { continue };
        let Some(tensor) = inputs.get::<str>(input).filter(|tensor| tensor.dtype() == *given) else {
            continue;
        };
        let Some(rounded) = as_float(tensor, ty.dtype) else { continue };
        if let Some(slot) = changed.get_or_insert_with(|| inputs.clone()).get_mut::<str>(input) {
            *slot = rounded;
        }
    }
    changed
}

/// An output of the graph as it is handed out, if that is in another type than the graph's.
pub fn handed_out(graph: &Graph, output: &str, tensor: &Tensor) -> Option<Tensor> {
    graph.borders.iter().find_map(|border| match border {
        Border::Rounded { output: own, given, .. } if **own == *output && tensor.dtype() != *given => {
            as_float(tensor, *given)
        }
        _ => None,
    })
}

/// Floats of up to 32 bits as another such type.
fn as_float(tensor: &Tensor, to: DType) -> Option<Tensor> {
    let singles: Vec<f32> = match tensor.data() {
        Data::F32(values) => values.clone(),
        Data::F16(values) => values.iter().map(|x| x.to_f32()).collect(),
        Data::BF16(values) => values.iter().map(|x| x.to_f32()).collect(),
        _ => return None,
    };
    let data = match to {
        DType::F32 => Data::F32(singles),
        DType::F16 => Data::F16(singles.into_iter().map(f16::from_f32).collect()),
        DType::BF16 => Data::BF16(singles.into_iter().map(bf16::from_f32).collect()),
        _ => return None,
    };
    Tensor::new(tensor.shape().to_vec(), data).ok()
}

/// The inputs as the graph takes them and the outputs that are filled up afterwards; `None` if nothing changes.
pub fn adapted<K: Ord + Clone + Borrow<str>>(
    inputs: &BTreeMap<K, Tensor>,
    changes: &[Change],
) -> Option<(BTreeMap<K, Tensor>, Vec<Present>)> {
    if changes.is_empty() {
        return None;
    }
    let mut adapted = inputs.clone();
    for change in changes {
        let tensor = adapted.get_mut::<str>(&change.input)?;
        *tensor = change.applied(tensor)?;
    }
    Some((adapted, changes.iter().filter_map(|change| change.present.clone()).collect()))
}

impl Change {
    /// The input as the graph takes it; `None` for what has no such form or is too large.
    fn applied(&self, tensor: &Tensor) -> Option<Tensor> {
        let given = *tensor.shape().get(self.axis)?;
        let mut shape = tensor.shape().to_vec();
        *shape.get_mut(self.axis)? = self.extent;
        element_count(&shape).filter(|&count| self.extent <= given || count <= LARGEST)?;
        let filling = (self.extent > given && self.filling != Filling::Any).then_some(self.filling);
        resized(tensor, self.axis, shape, filling)
    }
}

impl Present {
    /// The output with zeros behind what it holds.
    ///
    /// # Errors
    /// A tensor that cannot be filled up.
    pub fn filled(&self, tensor: &Tensor) -> Result<Tensor, String> {
        let mut shape = tensor.shape().to_vec();
        match shape.get_mut(self.axis) {
            Some(extent) if *extent == self.extent => return Ok(tensor.clone()),
            Some(extent) if *extent < self.extent => *extent = self.extent,
            _ => return Err(format!("{shape:?} does not fit a buffer of {} entries", self.extent)),
        }
        let filled = resized(tensor, self.axis, shape, None);
        filled.ok_or_else(|| format!("a buffer of {} cannot be filled up", tensor.dtype()))
    }
}

/// `tensor` in `shape`, which differs along `axis`: cut, filled up with zeros, or one entry as often as needed.
fn resized(tensor: &Tensor, axis: usize, shape: Vec<usize>, filling: Option<Filling>) -> Option<Tensor> {
    let outer = element_count(shape.get(..axis)?)?;
    let inner = element_count(shape.get(axis + 1..)?)?;
    let from = tensor.shape().get(axis)?.checked_mul(inner)?;
    let to = shape.get(axis)?.checked_mul(inner)?;
    macro_rules! resize {
        ($($variant:ident $one:expr),*) => {
            match tensor.data() {
                $(Data::$variant(values) => {
                    let one = (filling == Some(Filling::Ones)).then_some($one);
                    Data::$variant(rows(values, outer, from, to, filling.is_some(), one)?)
                })*
                Data::Raw(..) => return None,
            }
        };
    }
    let data = resize!(
        F32 1.0, F64 1.0, F16 f16::ONE, BF16 bf16::ONE, I8 1, I16 1, I32 1, I64 1, U8 1, U16 1, U32 1, U64 1, Bool true
    );
    Tensor::new(shape, data).ok()
}

/// `outer` rows of `from` elements as such of `to`: all the element `one`, or the row repeated, or the row cut or
/// followed by zeros.
fn rows<T: Copy + Default>(
    values: &[T],
    outer: usize,
    from: usize,
    to: usize,
    repeat: bool,
    one: Option<T>,
) -> Option<Vec<T>> {
    let count = outer.checked_mul(to)?;
    if let Some(one) = one {
        return Some(vec![one; count]);
    }
    let mut resized = Vec::new();
    resized.try_reserve_exact(count).ok()?;
    for row in 0..outer {
        let row = values.get(row.checked_mul(from)?..row.checked_add(1)?.checked_mul(from)?)?;
        let end = resized.len().checked_add(to)?;
        if repeat && !row.is_empty() {
            resized.extend(row.iter().copied().cycle().take(to));
        } else {
            resized.extend(row.iter().copied().take(to));
            resized.resize(end, T::default());
        }
    }
    Some(resized)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn s(name: &str) -> Dim {
        Dim::symbol(name)
    }

    fn graph() -> Graph {
        let mut graph = Graph::new("");
        graph.input("ids", Type::new(DType::I64, vec![s("b"), s("seq")]));
        graph.input("mask", Type::new(DType::I64, vec![s("b"), s("past") + s("seq")]));
        graph.input("past", Type::new(DType::F32, vec![s("b"), s("past"), 2i64.into()]));
        let total = s("past") + s("seq");
        graph.borders = vec![
            Border::Stretch { input: "mask".into(), axis: 1, filling: Filling::Repeat },
            Border::Buffer { input: "past".into(), output: "present".into(), axis: 1, total },
        ];
        graph
    }

    fn given(ids: [usize; 2], mask: [usize; 2], past: [usize; 3]) -> Vec<(Arc<str>, usize, usize)> {
        let shape = |name: &str| match name {
            "ids" => ids.to_vec(),
            "mask" => mask.to_vec(),
            _ => past.to_vec(),
        };
        let ty = |name: &str| {
            let dtype = if name == "past" { DType::F32 } else { DType::I64 };
            Some(Type::new(dtype, shape(name).into_iter().map(Dim::from).collect()))
        };
        let found = changes(&graph(), &ty);
        found.into_iter().map(|change| (change.input, change.axis, change.extent)).collect()
    }

    #[test]
    fn a_past_is_cut_where_the_mask_says_that_it_holds_less() {
        assert_eq!(given([1, 2], [1, 5], [1, 3, 2]), []);
        assert_eq!(given([1, 2], [1, 5], [1, 8, 2]), [("past".into(), 1, 3)]);
        assert_eq!(given([1, 2], [1, 2], [1, 8, 2]), [("past".into(), 1, 0)]);
        // Six entries do not fit a buffer of five, and less than the new ones make no sense.
        assert_eq!(given([1, 2], [1, 6], [1, 5, 2]), []);
        assert_eq!(given([1, 3], [1, 2], [1, 5, 2]), []);
    }

    #[test]
    fn a_mask_of_one_entry_says_nothing_of_the_past() {
        assert_eq!(given([1, 2], [1, 1], [1, 3, 2]), [("mask".into(), 1, 5)]);
    }

    #[test]
    fn a_mask_of_one_entry_is_stretched_only_where_the_past_is_given_otherwise() {
        let mut graph = graph();
        graph.borders.truncate(1);
        let ty = |mask: i64| {
            move |name: &str| {
                let shape: &[i64] = match name {
                    "ids" => &[1, 2],
                    "mask" => return Some(Type::new(DType::I64, vec![1i64.into(), mask.into()])),
                    _ => &[1, 3, 2],
                };
                Some(Type::new(DType::I64, shape.iter().map(|&d| d.into()).collect()))
            }
        };
        let found = changes(&graph, &ty(1));
        assert_eq!(found.iter().map(|c| (&*c.input, c.extent)).collect::<Vec<_>>(), [("mask", 5)]);
        assert_eq!(changes(&graph, &ty(5)), []);
        assert_eq!(changes(&graph, &ty(2)), []);
        graph.borders = vec![Border::Stretch { input: "mask".into(), axis: 1, filling: Filling::Any }];
        for given in [0, 2, 7] {
            let found = changes(&graph, &ty(given));
            assert_eq!(found.iter().map(|c| (&*c.input, c.extent)).collect::<Vec<_>>(), [("mask", 5)]);
        }
        assert_eq!(changes(&graph, &ty(5)), []);
    }

    #[test]
    fn tensors_are_repeated_cut_and_filled_up_along_their_axis() {
        let change =
            |axis, extent, filling| Change { input: "x".into(), axis, extent, filling, present: None };
        let ints =
            |shape: &[usize], values: &[i32]| Tensor::from_vec(shape.to_vec(), values.to_vec()).unwrap();
        let x = ints(&[2, 1, 2], &[1, 2, 3, 4]);
        let found = change(1, 3, Filling::Repeat).applied(&x).unwrap();
        assert_eq!(found, ints(&[2, 3, 2], &[1, 2, 1, 2, 1, 2, 3, 4, 3, 4, 3, 4]));
        let found = change(1, 2, Filling::Ones).applied(&x).unwrap();
        assert_eq!(found, ints(&[2, 2, 2], &[1; 8]));
        assert_eq!(change(2, 1, Filling::Repeat).applied(&x).unwrap(), ints(&[2, 1, 1], &[1, 3]));
        assert_eq!(change(1, 0, Filling::Repeat).applied(&x).unwrap(), ints(&[2, 0, 2], &[]));
        assert_eq!(
            change(1, 2, Filling::Any).applied(&x).unwrap(),
            ints(&[2, 2, 2], &[1, 2, 0, 0, 3, 4, 0, 0])
        );
        assert_eq!(change(1, 1 << 40, Filling::Repeat).applied(&x), None);
        assert_eq!(change(3, 2, Filling::Repeat).applied(&x), None);
    }

    #[test]
    fn state_is_rounded_on_its_way_in_and_handed_out_as_declared() {
        let mut graph = Graph::new("");
        graph.input("past", Type::new(DType::BF16, vec![s("n")]));
        graph.borders =
            vec![Border::Rounded { input: "past".into(), output: "present".into(), given: DType::F32 }];
        let exact = Tensor::from_vec(vec![2], vec![1.0f32, 1.0 + 1.0 / 512.0]).unwrap();
        let held = Tensor::from_vec(vec![2], vec![bf16::ONE, bf16::ONE]).unwrap();
        let given: BTreeMap<String, Tensor> = [("past".to_owned(), exact)].into();
        assert_eq!(rounded(&graph, &given).unwrap()["past"], held);
        // What has the graph's type is taken as it is, and what has a third one is not touched.
        assert_eq!(rounded(&graph, &BTreeMap::from([("past".to_owned(), held.clone())])), None);
        let double = Tensor::from_vec(vec![1], vec![1.0f64]).unwrap();
        assert_eq!(rounded(&graph, &BTreeMap::from([("past".to_owned(), double)])), None);
        let out = handed_out(&graph, "present", &held).unwrap();
        assert_eq!(out, Tensor::from_vec(vec![2], vec![1.0f32, 1.0]).unwrap());
        assert_eq!(handed_out(&graph, "present", &out), None);
        assert_eq!(handed_out(&graph, "logits", &held), None);
    }

    #[test]
    fn presents_are_filled_up_with_zeros() {
        let ints =
            |shape: &[usize], values: &[i32]| Tensor::from_vec(shape.to_vec(), values.to_vec()).unwrap();
        let x = ints(&[2, 1, 2], &[1, 2, 3, 4]);
        let present = Present { output: "y".into(), axis: 1, extent: 2 };
        assert_eq!(present.filled(&x).unwrap(), ints(&[2, 2, 2], &[1, 2, 0, 0, 3, 4, 0, 0]));
        assert_eq!(present.filled(&ints(&[1, 0, 1], &[])).unwrap(), ints(&[1, 2, 1], &[0, 0]));
        assert!(present.filled(&ints(&[1, 3], &[1, 2, 3])).unwrap_err().contains("[1, 3]"));
    }
}
