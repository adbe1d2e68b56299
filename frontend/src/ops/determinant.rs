//! [Det](https://onnx.ai/onnx/operators/onnx__Det.html) 11, by elimination with partial pivoting: in every step the row
//! with the largest first entry is exchanged with the first one, and its multiples are taken off the others.

use crate::lower::{Call, Lowered, Lowering, Value, invalid, unsupported};
use tpshard_ir::{Dim, Op, Scalar, ValueId};

/// Largest matrix that is written out.
const ROWS: usize = 64;

pub(super) fn det(l: &mut Lowering<'_>, call: &Call<'_>) -> Lowered<Vec<Value>> {
    let x = l.data(call.input(0)?)?;
    let ty = l.graph.ty(x).clone();
    let [lead @ .., rows, columns] = ty.shape.as_slice() else { return Err(invalid(format!("Det of {ty}"))) };
    let size = rows.as_size().filter(|&size| size <= ROWS && rows == columns && size > 0);
    let size =
        size.ok_or_else(|| unsupported(format!("Det of {ty}; square ones of 1 to {ROWS} rows are")))?;
    let count = Dim::product(lead);
    let mut rest = l.reshape(x, &[count.clone(), rows.clone(), columns.clone()])?;
    let mut product = None;
    for size in (1..=size).rev() {
        let (pivot, next) = eliminate(l, rest, &count, size)?;
        product = Some(match product {
            None => pivot,
            Some(product) => l.map(Scalar::Mul, &[product, pivot])?,
        });
        if let Some(next) = next {
            rest = next;
        }
    }
    let product = product.ok_or_else(|| invalid("a matrix without rows"))?;
    Ok(vec![Value::Data(l.reshape(product, lead)?)])
}

/// The signed pivot of `[P, n, n]` as `[P, 1, 1]`, and what is left of the other rows and columns.
fn eliminate(
    l: &mut Lowering<'_>,
    x: ValueId,
    count: &Dim,
    size: usize,
) -> Lowered<(ValueId, Option<ValueId>)> {
    if size == 1 {
        return Ok((x, None));
    }
    let dtype = l.graph.ty(x).dtype;
    let column = l.cut(x, 2, 0, 1)?;
    let magnitude = l.map(Scalar::Abs, &[column])?;
    let best = l.add(Op::TopK { axis: 1, k: Dim::constant(1), largest: true }, &[magnitude])?;
    let index = l.broadcast(best, &[count.clone(), Dim::constant(1), Dim::from(size)])?;
    let row = l.add(Op::GatherElements { axis: 1 }, &[x, index])?;
    let pivot = l.cut(row, 2, 0, 1)?;
    let first = l.cut(x, 1, 0, 1)?;
    let place = l.positions(&Dim::from(size), 1, 3)?;
    let taken = l.map(Scalar::Equal, &[place, best])?;
    let exchanged = l.map(Scalar::Select, &[taken, first, x])?;
    let others = l.cut(exchanged, 1, 1, size - 1)?;
    // A pivot of 0 makes the determinant 0, whatever is left.
    let none = l.map_number(Scalar::Equal, pivot, 0.0)?;
    let one = l.scalar(dtype, 1.0)?;
    let divisor = l.map(Scalar::Select, &[none, one, pivot])?;
    let heads = l.cut(others, 2, 0, 1)?;
    let factor = l.map(Scalar::Div, &[heads, divisor])?;
    let (others, tail) = (l.cut(others, 2, 1, size - 1)?, l.cut(row, 2, 1, size - 1)?);
    let taken_off = l.map(Scalar::Mul, &[factor, tail])?;
    let next = l.map(Scalar::Sub, &[others, taken_off])?;
    let stays = l.map_number(Scalar::Equal, best, 0.0)?;
    let negative = l.map(Scalar::Neg, &[pivot])?;
    Ok((l.map(Scalar::Select, &[stays, pivot, negative])?, Some(next)))
}
