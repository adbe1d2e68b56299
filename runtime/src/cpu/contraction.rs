//! Contractions as (batched) matrix products.
//!
//! The letters of an einsum fall into four groups: in both operands and the result (batch), in the first and the
//! result (rows), in the second and the result (columns), in both operands only (depth). Operands are read through
//! their strides and copied only if a group of dims cannot be walked with one stride; the result is row-major in
//! (batch, rows, columns) and handed on as a view in the order of the spec. A constant second operand is packed once,
//! when the session opens.

use super::dequant;
use super::gemm::{Half, Matrix, Packed, Right, multiply};
use super::value::{Value, merged};
use crate::team;
use tpshard_ir::DType;
use tpshard_ir::op::EinsumSpec;
use tpshard_ir::tensor::Element;

/// The groups of letters of a contraction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Contraction {
    spec: EinsumSpec,
    /// True if the second operand plays the rows.
    swapped: bool,
    batch: Vec<u8>,
    rows: Vec<u8>,
    columns: Vec<u8>,
    depth: Vec<u8>,
}

impl Contraction {
    /// `constant` says which operands are known when the session opens.
    pub(crate) fn new(spec: &EinsumSpec, constant: [bool; 2]) -> Result<Contraction, String> {
        let [first, second] = spec.inputs.as_slice() else {
            return Err(format!("{spec} has not two operands"));
        };
        let keep = |test: &dyn Fn(u8) -> bool, of: &[u8]| {
            of.iter().copied().filter(|&l| test(l)).collect::<Vec<u8>>()
        };
        let out = &spec.output;
        let batch = keep(&|l| first.contains(&l) && second.contains(&l), out);
        let rows = keep(&|l| !second.contains(&l), out);
        let columns = keep(&|l| !first.contains(&l), out);
        let depth = keep(&|l| second.contains(&l) && !out.contains(&l), first);
        // With nothing constant, the operand whose letters come first in the result plays the rows.
        let place = |group: &[u8]| group.iter().filter_map(|l| out.iter().position(|o| o == l)).max();
        let later = place(&rows) > place(&columns) && !columns.is_empty();
        let swapped = match constant {
            [true, false] => true,
            [false, true] => false,
            _ => later,
        };
        let (rows, columns) = if swapped { (columns, rows) } else { (rows, columns) };
        Ok(Contraction { spec: spec.clone(), swapped, batch, rows, columns, depth })
    }

    /// Which operand plays the columns.
    pub(crate) fn column_operand(&self) -> usize {
        usize::from(!self.swapped)
    }

    /// Which dims of the operand that plays the columns are depth and which are columns, in order; none with a batch.
    pub(crate) fn column_dims(&self) -> Option<(Vec<usize>, Vec<usize>)> {
        let letters = self.letters(self.column_operand());
        let places = |group: &[u8]| -> Option<Vec<usize>> {
            group.iter().map(|l| letters.iter().position(|o| o == l)).collect()
        };
        self.batch.is_empty().then(|| Some((places(&self.depth)?, places(&self.columns)?)))?
    }

    fn letters(&self, operand: usize) -> &[u8] {
        &self.spec.inputs[operand]
    }

    /// Packs the operand that plays the columns, if there is no batch.
    pub(crate) fn pack(&self, value: &Value) -> Result<Option<Packed>, String> {
        if !self.batch.is_empty() || value.len() == 0 {
            return Ok(None);
        }
        let (letters, groups) = (self.letters(self.column_operand()), [&[][..], &self.depth, &self.columns]);
        let halves = |half: Half| -> Result<Packed, String> {
            let operand = Matrices::new(value, letters, groups)?;
            match half {
                Half::F16 => operand.halves(half, |x: half::f16| x.to_bits()),
                Half::Bf16 => operand.halves(half, |x: half::bf16| x.to_bits()),
            }
        };
        Ok(Some(match value.dtype() {
            DType::F16 => halves(Half::F16)?,
            DType::BF16 => halves(Half::Bf16)?,
            _ => Packed::new(&Matrices::new(&value.as_f32()?, letters, groups)?.matrix(0)?),
        }))
    }

    /// Packs the operand that plays the columns from what it is dequantised from, if its layout allows that.
    pub(crate) fn pack_quantised(
        &self,
        axis: usize,
        block: usize,
        operands: &[Value],
    ) -> Result<Option<Packed>, String> {
        let in_order = |dims: &[usize]| dims.is_sorted();
        match self.column_dims() {
            Some((depth, columns)) if depth == [axis] && in_order(&columns) => {
                dequant::pack(axis, block, operands)
            }
            _ => Ok(None),
        }
    }

    /// The contraction of two operands in the order of the spec. `shape` is the result's.
    pub(crate) fn run(
        &self,
        operands: [&Value; 2],
        packed: Option<&Packed>,
        spare: Vec<f32>,
    ) -> Result<Value, String> {
        let (r, c) = (1 - self.column_operand(), self.column_operand());
        let left =
            Matrices::new(&operands[r].as_f32()?, self.letters(r), [&self.batch, &self.rows, &self.depth])?;
        let extent = |letter: &u8| -> Result<usize, String> {
            (0..2)
                .find_map(|o| {
                    let at = self.letters(o).iter().position(|l| l == letter)?;
                    operands[o].shape().get(at).copied()
                })
                .ok_or_else(|| format!("`{}` has no extent", *letter as char))
        };
        let group = |letters: &[u8]| letters.iter().map(extent).collect::<Result<Vec<usize>, String>>();
        let (batch, rows, columns) = (group(&self.batch)?, group(&self.rows)?, group(&self.columns)?);
        let shape: Vec<usize> = [&batch[..], &rows, &columns].concat();
        let size = |dims: &[usize]| dims.iter().product::<usize>();
        let depth = size(&group(&self.depth)?);
        let mut out = spare;
        out.resize(size(&shape), 0.0);
        if depth == 0 {
            out.fill(0.0);
        } else if let Some(packed) = packed {
            multiply(&mut out, left.matrix(0)?, Right::Packed(packed))?;
        } else if !out.is_empty() {
            let right = Matrices::new(
                &operands[c].as_f32()?,
                self.letters(c),
                [&self.batch, &self.depth, &self.columns],
            )?;
            let one = |(): &mut (), (i, out): (usize, &mut [f32])| {
                multiply(out, left.matrix(i)?, Right::Matrix(right.matrix(i)?))
            };
            team::try_for_each_init(out.chunks_mut(size(&rows) * size(&columns)).enumerate(), || (), one)?;
        }
        let result = Value::from_vec(&shape, out)?;
        let order: Vec<u8> = [&self.batch[..], &self.rows, &self.columns].concat();
        let perm: Option<Vec<usize>> =
            self.spec.output.iter().map(|l| order.iter().position(|o| o == l)).collect();
        Ok(result.permuted(&perm.ok_or("a letter of the result is lost")?))
    }
}

/// A tensor as a list of matrices: dims grouped into batch, first and second dim of each matrix.
struct Matrices {
    value: Value,
    batch: (Vec<usize>, Vec<isize>),
    shape: [usize; 2],
    strides: [usize; 2],
}

impl Matrices {
    fn new(value: &Value, letters: &[u8], groups: [&[u8]; 3]) -> Result<Matrices, String> {
        let place = |l: &u8| letters.iter().position(|o| o == l).ok_or("a letter is lost");
        let perm = groups.concat().iter().map(place).collect::<Result<Vec<usize>, _>>()?;
        if perm.len() != value.shape().len() {
            return Err(format!("{:?} does not fit a contraction", value.shape()));
        }
        let view = value.permuted(&perm);
        let cut = [groups[0].len(), groups[0].len() + groups[1].len()];
        Matrices::of(&view, cut).map_or_else(
            || {
                // Strides are lost; a row-major copy always has them.
                Matrices::of(&Value::new(view.clone().into_tensor()?), cut)
                    .ok_or_else(|| "a copy without strides".into())
            },
            Ok,
        )
    }

    fn of(view: &Value, cut: [usize; 2]) -> Option<Matrices> {
        let one = |range: std::ops::Range<usize>| -> Option<(usize, usize)> {
            let (dims, [strides]) = merged(&view.shape()[range.clone()], [&view.strides()[range]]);
            match (dims.as_slice(), strides.as_slice()) {
                ([], _) => Some((1, 1)),
                ([extent], [stride]) => Some((*extent, usize::try_from(*stride).ok()?)),
                _ => None,
            }
        };
        let (rows, row_stride) = one(cut[0]..cut[1])?;
        let (columns, column_stride) = one(cut[1]..view.shape().len())?;
        let batch = (view.shape()[..cut[0]].to_vec(), view.strides()[..cut[0]].to_vec());
        Some(Matrices {
            value: view.clone(),
            batch,
            shape: [rows, columns],
            strides: [row_stride, column_stride],
        })
    }

    /// The first matrix, of halves.
    fn halves<T: Element>(&self, half: Half, bits: impl Fn(T) -> u16 + Sync) -> Result<Packed, String> {
        let elements = self.value.elements::<T>()?.get(self.value.offset()..);
        let elements = elements.ok_or("a matrix leaves its tensor")?;
        let ([rows, columns], [row, column]) = (self.shape, self.strides);
        let last = rows.saturating_sub(1) * row + columns.saturating_sub(1) * column;
        if last >= elements.len() {
            return Err("a matrix leaves its tensor".into());
        }
        Ok(Packed::halves(half, self.shape, |r, c| bits(elements[r * row + c * column])))
    }

    fn matrix(&self, index: usize) -> Result<Matrix<'_>, String> {
        let (dims, strides) = &self.batch;
        let (mut rest, mut offset) = (index, self.value.offset() as isize);
        for (&extent, &stride) in dims.iter().zip(strides).rev() {
            offset += (rest % extent.max(1)) as isize * stride;
            rest /= extent.max(1);
        }
        let elements = self.value.elements::<f32>()?;
        let from = elements.get(offset as usize..).ok_or("a matrix leaves its tensor")?;
        Matrix::new(from, self.shape, self.strides)
    }
}
