//! The registers of a fused elementwise kernel, and its instructions.

use super::super::rows;
use super::super::scalar::{self, FloatOp};
use super::super::value::Value;
use super::{BLOCK, Bank, Instruction, Register, Work};
use half::{bf16, f16};
use std::cell::Cell;
use tpshard_ir::layout::Monoid;
use tpshard_ir::tensor::Element;
use tpshard_ir::{DType, Data, Scalar};

/// The registers of one task, used again by the next of the same thread.
pub(super) struct Registers(Blocks);

thread_local! {
    static LAST: Cell<Blocks> = const { Cell::new(Blocks::EMPTY) };
}

impl Registers {
    pub(super) fn new(counts: [usize; 3]) -> Registers {
        let mut blocks = LAST.replace(Blocks::EMPTY);
        grow(&mut blocks.floats, counts[0]);
        grow(&mut blocks.ints, counts[1]);
        grow(&mut blocks.bools, counts[2]);
        Registers(blocks)
    }

    pub(super) fn blocks(&mut self) -> &mut Blocks {
        &mut self.0
    }
}

impl Drop for Registers {
    fn drop(&mut self) {
        LAST.set(std::mem::replace(&mut self.0, Blocks::EMPTY));
    }
}

/// What is in a register before it is written makes no difference.
fn grow<T: Copy + Default>(bank: &mut Vec<Vec<T>>, count: usize) {
    if bank.len() < count {
        bank.resize_with(count, || vec![T::default(); BLOCK]);
    }
}

pub(super) struct Blocks {
    floats: Vec<Vec<f32>>,
    ints: Vec<Vec<i64>>,
    bools: Vec<Vec<bool>>,
}

impl Blocks {
    const EMPTY: Blocks = Blocks { floats: Vec::new(), ints: Vec::new(), bools: Vec::new() };

    /// Loads `run` elements from `offset` on, `step` apart.
    pub(super) fn load(
        &mut self,
        from: &Value,
        offset: usize,
        step: isize,
        to: Register,
        run: usize,
    ) -> Result<(), String> {
        macro_rules! ints {
            ($v:expr) => {
                read($v, offset, step, &mut self.ints[to.index][..run], |x| i64::from(x))
            };
        }
        match from.data() {
            Data::F32(v) => read(v, offset, step, &mut self.floats[to.index][..run], |x| x),
            Data::F16(v) => read(v, offset, step, &mut self.floats[to.index][..run], f16::to_f32),
            Data::BF16(v) => read(v, offset, step, &mut self.floats[to.index][..run], bf16::to_f32),
            Data::I8(v) => ints!(v),
            Data::I16(v) => ints!(v),
            Data::I32(v) => ints!(v),
            Data::I64(v) => ints!(v),
            Data::U8(v) => ints!(v),
            Data::U16(v) => ints!(v),
            Data::U32(v) => ints!(v),
            Data::Bool(v) => read(v, offset, step, &mut self.bools[to.index][..run], |x| x),
            other => return Err(format!("elementwise work on {}", other.dtype())),
        }
        Ok(())
    }

    /// Executes an instruction for `run` results, with `row` elements to a row.
    #[inline(always)]
    pub(super) fn execute(
        &mut self,
        i: &Instruction,
        run: usize,
        row: usize,
        round_each: bool,
    ) -> Result<(), String> {
        let scalar = match i.work {
            Work::Map(scalar) => scalar,
            Work::Reduce(monoid) => return self.reduce(monoid, i, run, row),
            Work::Spread => return self.spread(i, run, row),
        };
        match i.to.bank {
            Bank::Float => {
                let mut to = std::mem::take(&mut self.floats[i.to.index]);
                let done = self.execute_float(scalar, i, &mut to[..run]);
                let rounds = round_each || matches!(scalar, Scalar::Cast(_));
                if matches!(i.dtype, DType::F16 | DType::BF16) && rounds {
                    round_to(i.dtype, &mut to[..run]);
                }
                self.floats[i.to.index] = to;
                done
            }
            Bank::Int => {
                let mut to = std::mem::take(&mut self.ints[i.to.index]);
                let done = self.execute_int(scalar, i, &mut to[..run]);
                scalar::wrap_to(i.dtype, &mut to[..run]);
                self.ints[i.to.index] = to;
                done
            }
            Bank::Bool => {
                let mut to = std::mem::take(&mut self.bools[i.to.index]);
                let done = self.execute_bool(scalar, i, &mut to[..run]);
                self.bools[i.to.index] = to;
                done
            }
        }
    }

    /// One result for every row of the operand.
    #[inline(always)]
    fn reduce(&mut self, monoid: Monoid, i: &Instruction, rows: usize, row: usize) -> Result<(), String> {
        let (&[from], Bank::Float) = (i.from.as_slice(), i.to.bank) else {
            return Err("a reduction of other than floats".into());
        };
        let mut to = std::mem::take(&mut self.floats[i.to.index]);
        for (to, from) in to[..rows].iter_mut().zip(self.floats[from.index].chunks_exact(row)) {
            *to = rows::fold(monoid, from);
        }
        self.floats[i.to.index] = to;
        Ok(())
    }

    /// As many results for every element of the operand as a row has.
    #[inline(always)]
    fn spread(&mut self, i: &Instruction, run: usize, row: usize) -> Result<(), String> {
        let &[from] = i.from.as_slice() else { return Err("more than one operand to spread".into()) };
        macro_rules! fill {
            ($bank:ident) => {{
                let mut to = std::mem::take(&mut self.$bank[i.to.index]);
                let parts = to[..run].chunks_exact_mut(row);
                parts.zip(&self.$bank[from.index]).for_each(|(to, &x)| to.fill(x));
                self.$bank[i.to.index] = to;
            }};
        }
        match i.to.bank {
            Bank::Float => fill!(floats),
            Bank::Int => fill!(ints),
            Bank::Bool => fill!(bools),
        }
        Ok(())
    }

    #[inline(always)]
    fn execute_float(&self, scalar: Scalar, i: &Instruction, to: &mut [f32]) -> Result<(), String> {
        let run = to.len();
        match (scalar, i.from.as_slice()) {
            (Scalar::Cast(_), [a]) => match a.bank {
                Bank::Float => to.copy_from_slice(&self.floats[a.index][..run]),
                Bank::Int => to.iter_mut().zip(&self.ints[a.index]).for_each(|(t, &x)| *t = x as f32),
                Bank::Bool => {
                    to.iter_mut().zip(&self.bools[a.index]).for_each(|(t, &x)| *t = f32::from(u8::from(x)))
                }
            },
            (Scalar::Select, [c, a, b]) => {
                select(&self.bools[c.index], &self.floats[a.index], &self.floats[b.index], to);
            }
            (scalar, [a]) => {
                to.copy_from_slice(&self.floats[a.index][..run]);
                FloatOp::unary(scalar, to)?;
            }
            (scalar, [a, b]) => {
                FloatOp::binary(scalar, &self.floats[a.index][..run], &self.floats[b.index][..run], to)?;
            }
            _ => return Err(format!("{} on floats", scalar.name())),
        }
        Ok(())
    }

    #[inline(always)]
    fn execute_int(&self, scalar: Scalar, i: &Instruction, to: &mut [i64]) -> Result<(), String> {
        let run = to.len();
        match (scalar, i.from.as_slice()) {
            (Scalar::Cast(_), [a]) => match a.bank {
                Bank::Int => to.copy_from_slice(&self.ints[a.index][..run]),
                Bank::Bool => to.iter_mut().zip(&self.bools[a.index]).for_each(|(t, &x)| *t = i64::from(x)),
                Bank::Float => return Err("a cast from floats to integers".into()),
            },
            (Scalar::Select, [c, a, b]) => {
                select(&self.bools[c.index], &self.ints[a.index], &self.ints[b.index], to);
            }
            (scalar, [a]) => scalar::int_unary(scalar, &self.ints[a.index][..run], to)?,
            (scalar, [a, b]) => {
                scalar::int_binary(scalar, &self.ints[a.index][..run], &self.ints[b.index][..run], to)?;
            }
            _ => return Err(format!("{} on integers", scalar.name())),
        }
        Ok(())
    }

    #[inline(always)]
    fn execute_bool(&self, scalar: Scalar, i: &Instruction, to: &mut [bool]) -> Result<(), String> {
        let run = to.len();
        let bools = |r: &Register| &self.bools[r.index][..run];
        match (scalar, i.from.as_slice()) {
            (Scalar::Select, [c, a, b]) => select(bools(c), bools(a), bools(b), to),
            (Scalar::Cast(_), [a]) if a.bank == Bank::Bool => to.copy_from_slice(bools(a)),
            (Scalar::Cast(_), [a]) if a.bank == Bank::Int => {
                to.iter_mut().zip(&self.ints[a.index]).for_each(|(t, &x)| *t = x != 0);
            }
            (Scalar::Not, [a]) => to.iter_mut().zip(bools(a)).for_each(|(t, &x)| *t = !x),
            (Scalar::IsNan, [a]) => {
                to.iter_mut().zip(&self.floats[a.index]).for_each(|(t, x)| *t = x.is_nan())
            }
            (Scalar::IsInf, [a]) => {
                to.iter_mut().zip(&self.floats[a.index]).for_each(|(t, x)| *t = x.is_infinite())
            }
            (scalar, [a, b]) => match a.bank {
                Bank::Bool => scalar::bool_binary(scalar, bools(a), bools(b), to)?,
                Bank::Int => compare(scalar, &self.ints[a.index][..run], &self.ints[b.index][..run], to)?,
                Bank::Float => {
                    compare(scalar, &self.floats[a.index][..run], &self.floats[b.index][..run], to)?
                }
            },
            _ => return Err(format!("{} to bool", scalar.name())),
        }
        Ok(())
    }
}

#[inline(always)]
fn read<T: Copy, U>(from: &[T], offset: usize, step: isize, to: &mut [U], convert: impl Fn(T) -> U)
where
    U: Copy,
{
    match step {
        1 => to.iter_mut().zip(&from[offset..]).for_each(|(t, &x)| *t = convert(x)),
        0 => to.fill(convert(from[offset])),
        _ => {
            for (i, t) in to.iter_mut().enumerate() {
                *t = convert(from[(offset as isize + i as isize * step) as usize]);
            }
        }
    }
}

#[inline(always)]
fn select<T: Copy>(condition: &[bool], a: &[T], b: &[T], to: &mut [T]) {
    for (((t, &c), &a), &b) in to.iter_mut().zip(condition).zip(a).zip(b) {
        *t = if c { a } else { b };
    }
}

#[inline(always)]
fn compare<T: PartialOrd + Copy>(scalar: Scalar, a: &[T], b: &[T], to: &mut [bool]) -> Result<(), String> {
    let zipped = to.iter_mut().zip(a).zip(b);
    match scalar {
        Scalar::Equal => zipped.for_each(|((t, a), b)| *t = a == b),
        Scalar::Less => zipped.for_each(|((t, a), b)| *t = a < b),
        Scalar::LessEqual => zipped.for_each(|((t, a), b)| *t = a <= b),
        Scalar::Greater => zipped.for_each(|((t, a), b)| *t = a > b),
        Scalar::GreaterEqual => zipped.for_each(|((t, a), b)| *t = a >= b),
        other => return Err(format!("{} is not a comparison", other.name())),
    }
    Ok(())
}

#[inline(always)]
fn round_to(dtype: DType, values: &mut [f32]) {
    match dtype {
        DType::F16 => values.iter_mut().for_each(|x| *x = f16::from_f32(*x).to_f32()),
        DType::BF16 => values.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32()),
        _ => {}
    }
}

/// An element type results are stored as.
pub(super) trait Stored: Element + Default {
    fn store(blocks: &Blocks, from: Register, to: &mut [Self]) -> Result<(), String>;
}

impl Stored for f32 {
    fn store(blocks: &Blocks, from: Register, to: &mut [f32]) -> Result<(), String> {
        to.copy_from_slice(&blocks.floats[from.index][..to.len()]);
        Ok(())
    }
}

macro_rules! stored {
    ($bank:ident: $($ty:ty = $convert:expr),*) => {$(
        impl Stored for $ty {
            fn store(blocks: &Blocks, from: Register, to: &mut [$ty]) -> Result<(), String> {
                to.iter_mut().zip(&blocks.$bank[from.index]).for_each(|(t, &x)| *t = $convert(x));
                Ok(())
            }
        }
    )*};
}
stored!(floats: f16 = f16::from_f32, bf16 = bf16::from_f32);
// Values were wrapped to the type before.
stored!(ints: i8 = |x| x as i8, i16 = |x| x as i16, i32 = |x| x as i32, i64 = |x| x, u8 = |x| x as u8, u16 = |x| x as u16, u32 = |x| x as u32);
stored!(bools: bool = |x| x);
