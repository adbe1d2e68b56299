//! Kernels that only move elements: concatenation, gathers, constant pads, appends in place. They work on every element
//! type that is at least a byte wide.

use super::collect::{Row, collected};
use super::convert::StepError;
use super::gemm::Packed;
use super::value::{Value, copy_strided, row_major, with_elements, wrap};
use half::{bf16, f16};
use tpshard_ir::tensor::Element;
use tpshard_ir::{Data, Tensor};

/// The typed elements behind several values of one type.
trait Parts: Element + Default {
    fn all(values: &[Value]) -> Result<Vec<&[Self]>, String> {
        values.iter().map(|v| v.elements::<Self>()).collect()
    }
}
impl<T: Element + Default> Parts for T {}

/// One after another along `axis`.
pub(crate) fn concat(parts: &[Value], axis: usize, spare: Vec<f32>) -> Result<Value, String> {
    let first = parts.first().ok_or("nothing to concatenate")?;
    let mut shape = first.shape().to_vec();
    if axis >= shape.len() {
        return Err("concatenation along a dim that does not exist".into());
    }
    shape[axis] = 0;
    for part in parts {
        let fits = part.dtype() == first.dtype()
            && part.shape().len() == shape.len()
            && (0..shape.len()).all(|d| d == axis || part.shape()[d] == shape[d]);
        if !fits {
            return Err(format!("{:?} does not fit next to {:?}", part.shape(), first.shape()));
        }
        shape[axis] += part.shape()[axis];
    }
    fn join<T: Element + Default>(
        parts: &[Value],
        shape: &[usize],
        axis: usize,
        spare: Vec<T>,
    ) -> Result<Data, String> {
        let mut out = spare;
        out.resize(shape.iter().product(), T::default());
        let strides = row_major(shape);
        let mut at = 0;
        for (part, elements) in parts.iter().zip(T::all(parts)?) {
            let offset = at * strides[axis] as usize;
            copy_strided(
                part.shape(),
                (elements, part.offset(), part.strides()),
                (&mut out, offset, &strides),
            );
            at += part.shape()[axis];
        }
        Ok(wrap(out))
    }
    let data = match first.data() {
        Data::F32(_) => join(parts, &shape, axis, spare)?,
        other => with_elements!(other, v => join(parts, &shape, axis, none_like(v))?,
            dtype, _b => return Err(format!("concatenation of the storage type {dtype}"))),
    };
    Tensor::new(shape, data).map(Value::new).map_err(|e| e.to_string())
}

/// Which of `held` rows each index names; with a window, `start` is the global index of the first row held here, `extent`
/// the global number of rows, and rows held elsewhere are none.
fn places(indices: &Value, held: usize, window: Option<(i64, i64)>) -> Result<Vec<Option<usize>>, StepError> {
    let (start, extent) = window.unwrap_or((0, held as i64));
    let place = |index: i64| -> Result<Option<usize>, StepError> {
        let row = if index < 0 { index + extent } else { index };
        if !(0..extent).contains(&row) {
            return Err(StepError::Index { index, extent });
        }
        Ok(usize::try_from(row - start).ok().filter(|&r| r < held))
    };
    match indices.data() {
        Data::I64(_) => indices.slice::<i64>()?.iter().map(|&i| place(i)).collect(),
        Data::I32(_) => indices.slice::<i32>()?.iter().map(|&i| place(i.into())).collect(),
        other => Err(format!("indices of type {}", other.dtype()).into()),
    }
}

/// [`gather`] from a table whose rows are the columns of a packed matrix.
pub(crate) fn gather_packed(
    table: &Packed,
    indices: &Value,
    window: Option<(i64, i64)>,
    spare: Vec<f32>,
) -> Result<Value, StepError> {
    let rows = places(indices, table.columns, window)?;
    let mut out = spare;
    out.clear();
    out.reserve_exact(rows.len() * table.rows);
    for row in &rows {
        match row {
            Some(row) => out.extend(table.column(*row)),
            None => out.resize(out.len() + table.rows, NOT_HELD),
        }
    }
    let shape = [indices.shape(), &[table.rows]].concat();
    Ok(Value::from_vec(&shape, out)?)
}

/// What a row that another rank holds reads as: a zero that leaves every number as it is when ranks add theirs, -0 too.
const NOT_HELD: f32 = -0.0;

/// Rows of a table; rows held elsewhere read as zero.
pub(crate) fn gather(
    table: &Value,
    indices: &Value,
    axis: usize,
    window: Option<(i64, i64)>,
    spare: Vec<f32>,
) -> Result<Value, StepError> {
    let held = *table.shape().get(axis).ok_or("a gather along a dim that does not exist")?;
    let rows = places(indices, held, window)?;
    let mut shape = table.shape().to_vec();
    shape.splice(axis..=axis, indices.shape().iter().copied());
    let table = table.contiguous()?;
    let inner: usize = table.shape()[axis + 1..].iter().product();
    let outer: usize = table.shape()[..axis].iter().product();
    fn pick<T: Element + Send + Sync>(
        table: &Value,
        rows: &[Option<usize>],
        [outer, held, inner]: [usize; 3],
        spare: Vec<T>,
        not_held: T,
    ) -> Result<Data, String> {
        let elements = table.slice::<T>()?;
        if elements.len() < outer * held * inner {
            return Err("a row leaves its table".into());
        }
        Ok(wrap(collected(spare, [outer * rows.len(), inner], |at| match rows[at % rows.len()] {
            Some(row) => Row::Of(&elements[(at / rows.len() * held + row) * inner..][..inner]),
            None => Row::All(not_held),
        })))
    }
    let sizes = [outer, held, inner];
    let data = match table.data() {
        Data::F32(_) => pick(&table, &rows, sizes, spare, NOT_HELD)?,
        Data::F64(_) => pick(&table, &rows, sizes, Vec::new(), f64::from(NOT_HELD))?,
        Data::F16(_) => pick(&table, &rows, sizes, Vec::new(), f16::from_f32(NOT_HELD))?,
        Data::BF16(_) => pick(&table, &rows, sizes, Vec::new(), bf16::from_f32(NOT_HELD))?,
        other => with_elements!(other, v => pick(&table, &rows, sizes, Vec::new(), zero_like(v))?,
            dtype, _b => return Err(format!("a gather of the storage type {dtype}").into())),
    };
    Tensor::new(shape, data).map(Value::new).map_err(|e| StepError::Local(e.to_string()))
}

fn none_like<T>(_: &[T]) -> Vec<T> {
    Vec::new()
}

fn zero_like<T: Default>(_: &[T]) -> T {
    T::default()
}

/// `x` within a larger tensor of `value`; negative pads cut.
pub(crate) fn pad(x: &Value, low: &[i64], high: &[i64], value: f32) -> Result<Value, String> {
    let x = x.as_f32()?;
    let mut view = x.clone();
    let (mut shape, mut offset) = (Vec::new(), 0usize);
    let mut starts = Vec::new();
    for (axis, (&low, &high)) in low.iter().zip(high).enumerate() {
        let extent = x.shape()[axis] as i64;
        let total = extent.checked_add(low).and_then(|t| t.checked_add(high)).filter(|&t| t >= 0);
        let total = total.ok_or_else(|| format!("pads {low} and {high} of a dim of {extent}"))?;
        let cut = (-low).clamp(0, extent);
        let kept = (extent - cut + high.min(0)).clamp(0, total);
        view = view.sliced(axis, cut as usize, kept as usize, 1)?;
        shape.push(total as usize);
        starts.push(low.max(0) as usize);
    }
    let strides = row_major(&shape);
    for (start, stride) in starts.iter().zip(&strides) {
        offset += start * *stride as usize;
    }
    let count = tpshard_ir::tensor::element_count(&shape).ok_or("a padded tensor beyond memory")?;
    let mut out = vec![value; count];
    copy_strided(
        view.shape(),
        (view.elements::<f32>()?, view.offset(), view.strides()),
        (&mut out, offset, &strides),
    );
    Value::from_vec(&shape, out)
}

/// Copies `new` into `buffer` (a row-major tensor) at `at` along `axis`, and from the start of the other dims on.
pub(crate) fn write_into(buffer: &mut Tensor, axis: usize, at: usize, new: &Value) -> Result<(), String> {
    let shape = buffer.shape().to_vec();
    let fits = shape.len() == new.shape().len()
        && axis < shape.len()
        && at + new.shape()[axis] <= shape[axis]
        && (0..shape.len()).all(|d| d == axis || new.shape()[d] <= shape[d]);
    if !fits {
        return Err(format!("{:?} does not fit into {shape:?} at {at}", new.shape()));
    }
    let strides = row_major(&shape);
    let offset = at * strides[axis] as usize;
    fn write<T: Element>(
        buffer: &mut Tensor,
        new: &Value,
        offset: usize,
        strides: &[isize],
        _: &[T],
    ) -> Result<(), String> {
        let to = buffer.as_mut_slice::<T>().map_err(|e| e.to_string())?;
        copy_strided(new.shape(), (new.elements::<T>()?, new.offset(), new.strides()), (to, offset, strides));
        Ok(())
    }
    with_elements!(new.data(), v => write(buffer, new, offset, &strides, v),
        dtype, _b => Err(format!("state of the storage type {dtype}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two ranks hold a row of a table each; what they gather adds up to the table, the signs of zeros included.
    #[test]
    fn parts_of_a_table_add_up_bit_for_bit() {
        let table = [-0.0f32, 0.0, 1.5, -0.0, f32::NEG_INFINITY, 3.0];
        let indices = Value::from_vec(&[2], vec![1i64, 0]).unwrap();
        let part = |row: usize| {
            let held = Value::from_vec(&[1, 3], table[3 * row..3 * row + 3].to_vec()).unwrap();
            let got = gather(&held, &indices, 0, Some((row as i64, 2)), Vec::new()).ok().unwrap();
            got.slice::<f32>().unwrap().to_vec()
        };
        let sums: Vec<u32> = part(0).iter().zip(part(1)).map(|(a, b)| (a + b).to_bits()).collect();
        let expected: Vec<u32> = table[3..].iter().chain(&table[..3]).map(|x| x.to_bits()).collect();
        assert_eq!(sums, expected);
    }
}
