//! Fused elementwise kernels.
//!
//! A region of `Map` nodes becomes a straight-line program over register blocks of a few hundred elements: operands are
//! loaded (and stretched) into registers, every node is one instruction over whole blocks, and only the result is
//! written. Floats of 16 and 32 bits are computed in `f32`, integers in `i64` and wrapped to their type after each
//! instruction.

use super::scalar::{self, FloatOp};
use super::value::{Value, wrap};
use super::vector::vectorised;
use crate::team;
use half::{bf16, f16};
use std::cell::Cell;
use tpshard_ir::program::Region;
use tpshard_ir::tensor::Element;
use tpshard_ir::{DType, Data, Graph, Op, Scalar, ValueId};

/// Elements per register.
const BLOCK: usize = 512;
/// Elements per task.
const CHUNK: usize = 32 * BLOCK;

/// Which bank a register is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bank {
    Float,
    Int,
    Bool,
}

fn bank(dtype: DType) -> Option<Bank> {
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 => Some(Bank::Float),
        DType::I8 | DType::I16 | DType::I32 | DType::I64 | DType::U8 | DType::U16 | DType::U32 => {
            Some(Bank::Int)
        }
        DType::Bool => Some(Bank::Bool),
        _ => None,
    }
}

#[derive(Clone, Copy, Debug)]
struct Register {
    bank: Bank,
    index: usize,
}

#[derive(Clone, Debug)]
struct Instruction {
    scalar: Scalar,
    /// The element type of the result.
    dtype: DType,
    from: Vec<Register>,
    to: Register,
}

/// A compiled region.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    operands: Vec<(ValueId, Register)>,
    instructions: Vec<Instruction>,
    result: Register,
    dtype: DType,
    /// Registers per bank: float, int, bool.
    counts: [usize; 3],
    /// 16-bit results are rounded after every instruction, not only where they are stored: what is fused with what then
    /// makes no difference.
    round_each: bool,
}

impl Program {
    /// Compiles a region of `Map` nodes.
    pub(crate) fn compile(graph: &Graph, region: &Region, round_each: bool) -> Result<Program, String> {
        let mut counts = [0usize; 3];
        let mut new = |dtype: DType| -> Result<Register, String> {
            let bank = bank(dtype).ok_or_else(|| format!("elementwise work on {dtype}"))?;
            let count = &mut counts[bank as usize];
            *count += 1;
            Ok(Register { bank, index: *count - 1 })
        };
        let mut operands = Vec::new();
        for operand in region.operands(graph) {
            operands.push((operand, new(graph.ty(operand).dtype)?));
        }
        let mut made: Vec<(ValueId, Register)> = operands.clone();
        let mut instructions = Vec::new();
        for &id in &region.nodes {
            let node = graph.node(id);
            let Op::Map(scalar) = node.op else {
                return Err(format!("{} is not elementwise", node.op.name()));
            };
            let from = node
                .args
                .iter()
                .map(|a| made.iter().find(|(v, _)| v == a).map(|(_, r)| *r).ok_or("an operand is missing"))
                .collect::<Result<Vec<_>, _>>()?;
            let to = new(node.ty.dtype)?;
            instructions.push(Instruction { scalar, dtype: node.ty.dtype, from, to });
            made.push((id, to));
        }
        let result = made.last().map(|(_, r)| *r).ok_or("an empty region")?;
        let dtype = graph.ty(region.result()).dtype;
        Ok(Program { operands, instructions, result, dtype, counts, round_each })
    }

    /// The operands, in the order [`Program::run`] wants them.
    pub(crate) fn operands(&self) -> impl Iterator<Item = ValueId> + '_ {
        self.operands.iter().map(|(id, _)| *id)
    }

    /// Computes the result, of `shape`. `spare` is memory that may be used for it.
    pub(crate) fn run(&self, operands: &[Value], shape: &[usize], spare: Vec<f32>) -> Result<Value, String> {
        let stretched = operands.iter().map(|v| v.stretched(shape)).collect::<Result<Vec<_>, _>>()?;
        let count: usize = shape.iter().product();
        macro_rules! run {
            ($ty:ty) => {{
                let mut out = vec![<$ty>::default(); count];
                self.fill(&stretched, shape, &mut out)?;
                wrap(out)
            }};
        }
        let data = match self.dtype {
            DType::F32 => {
                let mut out = spare;
                out.resize(count, 0.0);
                self.fill(&stretched, shape, &mut out)?;
                wrap(out)
            }
            DType::F16 => run!(f16),
            DType::BF16 => run!(bf16),
            DType::I8 => run!(i8),
            DType::I16 => run!(i16),
            DType::I32 => run!(i32),
            DType::I64 => run!(i64),
            DType::U8 => run!(u8),
            DType::U16 => run!(u16),
            DType::U32 => run!(u32),
            DType::Bool => run!(bool),
            other => return Err(format!("elementwise work on {other}")),
        };
        tpshard_ir::Tensor::new(shape.to_vec(), data).map(Value::new).map_err(|e| e.to_string())
    }

    fn fill<T: Stored>(&self, operands: &[Value], shape: &[usize], out: &mut [T]) -> Result<(), String> {
        if out.is_empty() {
            return Ok(());
        }
        let walk = Walk::new(operands, shape);
        team::try_for_each_init(
            out.chunks_mut(CHUNK).enumerate(),
            || Registers::new(self.counts),
            |registers, (chunk, out)| {
                vectorised(
                    #[inline(always)]
                    |_| self.chunk(operands, &walk, &mut registers.0, chunk * CHUNK, out),
                )
            },
        )
    }

    /// Computes the elements from `first` on.
    #[inline(always)]
    fn chunk<T: Stored>(
        &self,
        operands: &[Value],
        walk: &Walk,
        blocks: &mut Blocks,
        first: usize,
        out: &mut [T],
    ) -> Result<(), String> {
        let mut done = 0;
        while done < out.len() {
            let at = first + done;
            let run = BLOCK.min(out.len() - done).min(walk.inner - at % walk.inner);
            for ((i, operand), (_, register)) in operands.iter().enumerate().zip(&self.operands) {
                blocks.load(operand, walk.offset(i, at), walk.step(i), *register, run)?;
            }
            for instruction in &self.instructions {
                blocks.execute(instruction, run, self.round_each)?;
            }
            T::store(blocks, self.result, &mut out[done..done + run])?;
            done += run;
        }
        Ok(())
    }
}

/// Where the elements of every operand are, by position in the result.
struct Walk {
    outer: Vec<usize>,
    inner: usize,
    /// Per operand: base offset and strides, the innermost last.
    strides: Vec<(isize, Vec<isize>)>,
}

impl Walk {
    fn new(operands: &[Value], shape: &[usize]) -> Walk {
        // Neighbouring dims join if they do for every operand; the result, row-major, always agrees.
        let mut dims: Vec<usize> = Vec::new();
        let mut strides: Vec<(isize, Vec<isize>)> =
            operands.iter().map(|v| (v.offset() as isize, Vec::new())).collect();
        for (i, &extent) in shape.iter().enumerate() {
            if extent == 1 {
                continue;
            }
            let joins = !dims.is_empty()
                && operands.iter().zip(&strides).all(|(v, (_, s))| {
                    s.last().is_some_and(|&outer| outer == v.strides()[i] * extent as isize)
                });
            match dims.last_mut() {
                Some(last) if joins => *last *= extent,
                _ => dims.push(extent),
            }
            for (v, (_, s)) in operands.iter().zip(&mut strides) {
                if joins {
                    s.pop();
                }
                s.push(v.strides()[i]);
            }
        }
        let inner = dims.pop().unwrap_or(1);
        Walk { outer: dims, inner, strides }
    }

    fn step(&self, operand: usize) -> isize {
        self.strides[operand].1.last().copied().unwrap_or(0)
    }

    fn offset(&self, operand: usize, at: usize) -> usize {
        let (base, strides) = &self.strides[operand];
        let mut rest = at / self.inner;
        let mut offset = base + (at % self.inner) as isize * self.step(operand);
        for (&extent, &stride) in self.outer.iter().zip(strides).rev() {
            offset += (rest % extent) as isize * stride;
            rest /= extent;
        }
        offset as usize
    }
}

/// The registers of one task, used again by the next of the same thread.
struct Registers(Blocks);

thread_local! {
    static LAST: Cell<Blocks> = const { Cell::new(Blocks::EMPTY) };
}

impl Registers {
    fn new(counts: [usize; 3]) -> Registers {
        let mut blocks = LAST.replace(Blocks::EMPTY);
        grow(&mut blocks.floats, counts[0]);
        grow(&mut blocks.ints, counts[1]);
        grow(&mut blocks.bools, counts[2]);
        Registers(blocks)
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

struct Blocks {
    floats: Vec<Vec<f32>>,
    ints: Vec<Vec<i64>>,
    bools: Vec<Vec<bool>>,
}

impl Blocks {
    const EMPTY: Blocks = Blocks { floats: Vec::new(), ints: Vec::new(), bools: Vec::new() };

    /// Loads `run` elements from `offset` on, `step` apart.
    fn load(
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

    #[inline(always)]
    fn execute(&mut self, i: &Instruction, run: usize, round_each: bool) -> Result<(), String> {
        match i.to.bank {
            Bank::Float => {
                let mut to = std::mem::take(&mut self.floats[i.to.index]);
                let done = self.execute_float(i, &mut to[..run]);
                let rounds = round_each || matches!(i.scalar, Scalar::Cast(_));
                if matches!(i.dtype, DType::F16 | DType::BF16) && rounds {
                    round_to(i.dtype, &mut to[..run]);
                }
                self.floats[i.to.index] = to;
                done
            }
            Bank::Int => {
                let mut to = std::mem::take(&mut self.ints[i.to.index]);
                let done = self.execute_int(i, &mut to[..run]);
                scalar::wrap_to(i.dtype, &mut to[..run]);
                self.ints[i.to.index] = to;
                done
            }
            Bank::Bool => {
                let mut to = std::mem::take(&mut self.bools[i.to.index]);
                let done = self.execute_bool(i, &mut to[..run]);
                self.bools[i.to.index] = to;
                done
            }
        }
    }

    #[inline(always)]
    fn execute_float(&self, i: &Instruction, to: &mut [f32]) -> Result<(), String> {
        let run = to.len();
        match (i.scalar, i.from.as_slice()) {
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
            _ => return Err(format!("{} on floats", i.scalar.name())),
        }
        Ok(())
    }

    #[inline(always)]
    fn execute_int(&self, i: &Instruction, to: &mut [i64]) -> Result<(), String> {
        let run = to.len();
        match (i.scalar, i.from.as_slice()) {
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
            _ => return Err(format!("{} on integers", i.scalar.name())),
        }
        Ok(())
    }

    #[inline(always)]
    fn execute_bool(&self, i: &Instruction, to: &mut [bool]) -> Result<(), String> {
        let run = to.len();
        let bools = |r: &Register| &self.bools[r.index][..run];
        match (i.scalar, i.from.as_slice()) {
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
            _ => return Err(format!("{} to bool", i.scalar.name())),
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
trait Stored: Element + Default {
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
