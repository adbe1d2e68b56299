//! Conversions between layouts, on one rank: the calls to the communicator, with the extents that the deals give.

use super::value::{Value, wrap};
use crate::comm::{self, CommError, Communicator, Group, Sharding, Tag};
use tpshard_ir::dim::{Bindings, Dim};
use tpshard_ir::layout::{Layout, Mesh, Monoid, local_runs};
use tpshard_ir::program::Family;
use tpshard_ir::{AxisLayout, Conversion, DType, Data, Tensor};

/// Why a step of this rank failed.
#[derive(Debug)]
pub(crate) enum StepError {
    /// Here only; other ranks go on and have to be told.
    Local(String),
    /// Here only: an index that comes from the inputs is not below `extent`.
    Index { index: i64, extent: i64 },
    /// In a collective; all ranks know.
    Collective(CommError),
}

impl From<String> for StepError {
    fn from(what: String) -> StepError {
        StepError::Local(what)
    }
}

impl From<&str> for StepError {
    fn from(what: &str) -> StepError {
        StepError::Local(what.into())
    }
}

impl From<CommError> for StepError {
    fn from(error: CommError) -> StepError {
        StepError::Collective(error)
    }
}

/// Where a rank stands, for conversions.
pub(crate) struct Place<'a> {
    pub(crate) mesh: &'a Mesh,
    pub(crate) rank: usize,
    pub(crate) bindings: &'a Bindings,
}

/// The part of a family that one rank holds: start and length along each dim.
pub(crate) fn held(family: &Family, place: &Place<'_>, rank: usize) -> Result<Vec<(usize, usize)>, String> {
    let constant = |dim: &Dim| -> Result<Dim, String> {
        dim.eval(place.bindings).map(Dim::constant).map_err(|e| e.to_string())
    };
    let shape = family.ty.shape.iter().map(constant).collect::<Result<Vec<_>, _>>()?;
    let fixed = family.layout.0.iter().map(|axis| match axis {
        AxisLayout::Shard { dim, unit } => Ok(AxisLayout::Shard { dim: *dim, unit: constant(unit)? }),
        other => Ok(other.clone()),
    });
    let layout = Layout(fixed.collect::<Result<Vec<_>, String>>()?);
    local_runs(&shape, &layout, place.mesh, rank)
        .iter()
        .map(|run| {
            run.start.as_size().zip(run.length.as_size()).ok_or_else(|| "a share of negative size".into())
        })
        .collect()
}

/// What every member of `group` holds of `dim`.
pub(crate) fn extents(
    family: &Family,
    place: &Place<'_>,
    group: &Group,
    dim: usize,
) -> Result<Vec<usize>, String> {
    let one = |&rank: &usize| -> Result<usize, String> {
        held(family, place, rank)?
            .get(dim)
            .map(|run| run.1)
            .ok_or_else(|| format!("no dim {dim} to deal out"))
    };
    group.ranks().iter().map(one).collect()
}

pub(crate) fn carried(monoid: Monoid) -> comm::Monoid {
    match monoid {
        Monoid::Sum => comm::Monoid::Sum,
        Monoid::Prod => comm::Monoid::Prod,
        Monoid::Max => comm::Monoid::Max,
        Monoid::Min => comm::Monoid::Min,
    }
}

/// As [`convert`], if the conversion needs no other rank.
pub(crate) fn convert_alone(
    conversion: &Conversion,
    value: &Value,
    [from, to]: [&Family; 2],
    place: &Place<'_>,
) -> Result<Option<Value>, StepError> {
    Ok(match conversion {
        Conversion::ShardSlice { dim, .. } => {
            let outer = held(from, place, place.rank)?;
            let inner = held(to, place, place.rank)?;
            let (Some(outer), Some(inner)) = (outer.get(*dim), inner.get(*dim)) else {
                return Err(format!("no dim {dim} to slice").into());
            };
            let start = inner.0.checked_sub(outer.0).ok_or("a share outside of what is held".to_string())?;
            Some(value.sliced(*dim, start, inner.1, 1)?)
        }
        Conversion::OnlyFirst { monoid, .. } => {
            let group = Group::new(place.mesh.group(place.rank, conversion.axes()))?;
            if group.position(place.rank) == Some(0) {
                Some(value.clone())
            } else {
                Some(Value::new(identity(*monoid, value.dtype(), value.shape())?))
            }
        }
        Conversion::AllGather { .. }
        | Conversion::AllReduce { .. }
        | Conversion::ReduceScatter { .. }
        | Conversion::AllToAll { .. }
        | Conversion::Redeal { .. }
        | Conversion::TreeReduce { .. }
        | Conversion::Transfer => None,
    })
}

/// Converts `value` of the family `from` to the family `to`.
pub(crate) fn convert(
    conversion: &Conversion,
    value: Value,
    [from, to]: [&Family; 2],
    place: &Place<'_>,
    communicator: &dyn Communicator,
    tag: Tag,
) -> Result<Value, StepError> {
    if let Some(converted) = convert_alone(conversion, &value, [from, to], place)? {
        return Ok(converted);
    }
    let group = Group::new(place.mesh.group(place.rank, conversion.axes()))?;
    Ok(match conversion {
        Conversion::AllGather { dim, .. } => {
            let extents = extents(from, place, &group, *dim)?;
            Value::new(communicator.all_gather(&group, tag, *dim, &extents, &*value.tensor()?)?)
        }
        Conversion::AllReduce { monoid, .. } => {
            let mut tensor = value.into_tensor()?;
            communicator.all_reduce(&group, tag, carried(*monoid), &mut tensor)?;
            Value::new(tensor)
        }
        Conversion::ReduceScatter { monoid, dim, .. } => {
            let extents = extents(to, place, &group, *dim)?;
            let tensor = value.tensor()?;
            Value::new(communicator.reduce_scatter(&group, tag, carried(*monoid), *dim, &extents, &tensor)?)
        }
        Conversion::AllToAll { from: gathered, to: split, .. } => {
            let split_extents = extents(to, place, &group, *split)?;
            let concat_extents = extents(from, place, &group, *gathered)?;
            let split = Sharding { dim: *split, extents: &split_extents };
            let concat = Sharding { dim: *gathered, extents: &concat_extents };
            Value::new(communicator.all_to_all(&group, tag, split, concat, &*value.tensor()?)?)
        }
        Conversion::Redeal { dim, .. } => {
            let extents = extents(from, place, &group, *dim)?;
            let whole = communicator.all_gather(&group, tag, *dim, &extents, &*value.tensor()?)?;
            let own = |family: &Family, rank: usize| -> Result<(usize, usize), String> {
                held(family, place, rank)?
                    .get(*dim)
                    .copied()
                    .ok_or_else(|| format!("no dim {dim} to deal out"))
            };
            // What the group holds together starts where its first member's share does.
            let first = group.ranks().first().copied().unwrap_or(place.rank);
            let (start, length) = own(to, place.rank)?;
            let base = own(from, first)?.0;
            let start =
                start.checked_sub(base).ok_or("a share outside of what the group holds".to_string())?;
            Value::new(whole).sliced(*dim, start, length, 1)?
        }
        Conversion::TreeReduce { axis, .. } => {
            let extents = extents(from, place, &group, *axis)?;
            let whole = communicator.all_gather(&group, tag, *axis, &extents, &*value.tensor()?)?;
            tree_reduce(&Value::new(whole), *axis)?
        }
        Conversion::ShardSlice { .. } | Conversion::OnlyFirst { .. } => {
            return Err("a conversion that needs no other rank".to_string().into());
        }
        Conversion::Transfer => {
            return Err("transfers between device sets cannot be executed".to_string().into());
        }
    })
}

/// The tensor that changes nothing when combined.
pub(crate) fn identity(monoid: Monoid, dtype: DType, shape: &[usize]) -> Result<Tensor, String> {
    let count = shape.iter().product();
    macro_rules! typed {
        ($($variant:ident $ty:ty: $one:expr, $low:expr, $high:expr;)*) => {
            match dtype {
                $(DType::$variant => {
                    let element: $ty = match monoid {
                        Monoid::Sum => Default::default(),
                        Monoid::Prod => $one,
                        Monoid::Max => $low,
                        Monoid::Min => $high,
                    };
                    wrap(vec![element; count])
                })*
                other => return Err(format!("no {monoid} over {other}")),
            }
        };
    }
    use half::{bf16, f16};
    let data: Data = typed! {
        F32 f32: 1.0, f32::NEG_INFINITY, f32::INFINITY;
        F64 f64: 1.0, f64::NEG_INFINITY, f64::INFINITY;
        F16 f16: f16::ONE, f16::NEG_INFINITY, f16::INFINITY;
        BF16 bf16: bf16::ONE, bf16::NEG_INFINITY, bf16::INFINITY;
        I8 i8: 1, i8::MIN, i8::MAX;
        I16 i16: 1, i16::MIN, i16::MAX;
        I32 i32: 1, i32::MIN, i32::MAX;
        I64 i64: 1, i64::MIN, i64::MAX;
        U8 u8: 1, u8::MIN, u8::MAX;
        U16 u16: 1, u16::MIN, u16::MAX;
        U32 u32: 1, u32::MIN, u32::MAX;
        U64 u64: 1, u64::MIN, u64::MAX;
        Bool bool: true, false, true;
    };
    Tensor::new(shape.to_vec(), data).map_err(|e| e.to_string())
}

/// Sums the entries of `axis` in the canonical tree: more than one are split at the largest power of two below their
/// number. The result has extent 1 and does not depend on who held what.
pub(crate) fn tree_reduce(x: &Value, axis: usize) -> Result<Value, String> {
    let extent = *x.shape().get(axis).ok_or("a tree over a dim that does not exist")?;
    let mut shape = x.shape().to_vec();
    shape[axis] = 1;
    if extent == 0 {
        return identity(Monoid::Sum, x.dtype(), &shape).map(Value::new);
    }
    macro_rules! reduce {
        ($($variant:ident $ty:ty, $add:expr;)*) => {
            match x.data() {
                $(Data::$variant(_) => {
                    let rows = (0..extent)
                        .map(|i| Ok(x.sliced(axis, i, 1, 1)?.slice::<$ty>()?.into_owned()))
                        .collect::<Result<Vec<Vec<$ty>>, String>>()?;
                    Value::from_vec(&shape, tree(&rows, &$add))
                })*
                other => Err(format!("no tree sum over {}", other.dtype())),
            }
        };
    }
    reduce! {
        F32 f32, |a: f32, b: f32| a + b;
        F64 f64, |a: f64, b: f64| a + b;
        F16 half::f16, |a: half::f16, b: half::f16| half::f16::from_f32(a.to_f32() + b.to_f32());
        BF16 half::bf16, |a: half::bf16, b: half::bf16| half::bf16::from_f32(a.to_f32() + b.to_f32());
        I32 i32, i32::wrapping_add;
        I64 i64, i64::wrapping_add;
    }
}

fn tree<T: Copy>(rows: &[Vec<T>], add: &impl Fn(T, T) -> T) -> Vec<T> {
    match rows {
        [] => Vec::new(),
        [row] => row.clone(),
        rows => {
            let (left, right) = rows.split_at(rows.len().next_power_of_two() / 2);
            tree(left, add).into_iter().zip(tree(right, add)).map(|(a, b)| add(a, b)).collect()
        }
    }
}
