//! Fused elementwise kernels.
//!
//! A region of `Map` nodes becomes a straight-line program over register blocks of a few hundred elements: operands are
//! loaded (and stretched) into registers, every node is one instruction over whole blocks, and only the result is
//! written. Floats of 16 and 32 bits are computed in `f32`, integers in `i64` and wrapped to their type after each
//! instruction. Where a region reduces rows, a block is made of whole ones, and what there is one of per row is in registers
//! of as many elements as the block has rows.

mod registers;

use super::value::{Value, wrap};
use super::vector::vectorised;
use crate::team;
use half::{bf16, f16};
use registers::{Blocks, Registers, Stored};
use tpshard_ir::layout::Monoid;
use tpshard_ir::program::{MAX_ROW, Pass, Region, Space};
use tpshard_ir::{DType, Graph, Op, Scalar, ValueId};

/// Elements per register.
const BLOCK: usize = 512;
/// Elements per task.
const CHUNK: usize = 32 * BLOCK;

const _: () = assert!(MAX_ROW <= BLOCK, "a register holds a row");

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

#[derive(Clone, Copy, Debug)]
enum Work {
    Map(Scalar),
    /// From the elements of a row to one.
    Reduce(Monoid),
    /// From one element per row to one for each of its elements.
    Spread,
}

#[derive(Clone, Debug)]
struct Instruction {
    work: Work,
    /// The element type of the result.
    dtype: DType,
    from: Vec<Register>,
    to: Register,
    /// There is one element per row.
    of_rows: bool,
}

/// An operand, and how its elements lie along the pass.
#[derive(Clone, Copy, Debug)]
struct Operand {
    value: ValueId,
    space: Space,
    to: Register,
}

/// A compiled region.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    /// Those of rows last.
    operands: Vec<Operand>,
    instructions: Vec<Instruction>,
    result: Register,
    dtype: DType,
    /// Registers per bank: float, int, bool.
    counts: [usize; 3],
    /// 16-bit results are rounded after every instruction, not only where they are stored: what is fused with what then
    /// makes no difference.
    round_each: bool,
    /// Elements of a row, if anything is done by rows.
    row: Option<usize>,
    /// The last two dims of the pass, if something has them joined.
    last_two: Option<[usize; 2]>,
    /// The result has them joined.
    joins: bool,
}

/// A program as far as it is compiled.
struct Compiling<'a> {
    graph: &'a Graph,
    counts: [usize; 3],
    operands: Vec<Operand>,
    /// What nodes made, and whether there is one element per row.
    made: Vec<(ValueId, Register, bool)>,
    /// What was spread to the elements of rows.
    spread: Vec<(ValueId, Register)>,
    instructions: Vec<Instruction>,
}

impl Compiling<'_> {
    fn register(&mut self, dtype: DType) -> Result<Register, String> {
        let bank = bank(dtype).ok_or_else(|| format!("elementwise work on {dtype}"))?;
        let count = &mut self.counts[bank as usize];
        *count += 1;
        Ok(Register { bank, index: *count - 1 })
    }

    /// The register that holds a value for an instruction in some space.
    fn taken(&mut self, value: ValueId, space: Space) -> Result<Register, String> {
        let dtype = self.graph.ty(value).dtype;
        let made =
            self.made.iter().find(|(v, ..)| *v == value).map(|&(_, register, of_rows)| (register, of_rows));
        match made {
            Some((register, of_rows)) if !of_rows || space == Space::Row => Ok(register),
            Some((from, _)) => {
                if let Some((_, register)) = self.spread.iter().find(|(v, _)| *v == value) {
                    return Ok(*register);
                }
                let to = self.register(dtype)?;
                let work = Work::Spread;
                self.instructions.push(Instruction { work, dtype, from: vec![from], to, of_rows: false });
                self.spread.push((value, to));
                Ok(to)
            }
            None => {
                let same = |o: &&Operand| o.value == value && o.space == space;
                if let Some(operand) = self.operands.iter().find(same) {
                    return Ok(operand.to);
                }
                let to = self.register(dtype)?;
                self.operands.push(Operand { value, space, to });
                Ok(to)
            }
        }
    }
}

impl Program {
    /// Compiles an elementwise region.
    pub(crate) fn compile(graph: &Graph, region: &Region, round_each: bool) -> Result<Program, String> {
        let (root, pass) = (region.result(), Pass::new(graph, region.result()));
        let (operands, made, spread, instructions) = Default::default();
        let mut c = Compiling { graph, counts: [0; 3], operands, made, spread, instructions };
        for &id in &region.nodes {
            let node = graph.node(id);
            let space = pass.place(graph, id, root);
            let space = space.ok_or_else(|| format!("{} is not elementwise", node.op.name()))?;
            let of_rows = space == Space::Row;
            // Where the operands lie.
            let (work, from_space) = match &node.op {
                Op::Map(scalar) => (Some(Work::Map(*scalar)), space),
                Op::Reduce { monoid, .. } => (Some(Work::Reduce(*monoid)), Space::Pass),
                // The elements are the same in the same order.
                _ if id == root => (None, Space::Pass),
                _ => (None, Space::Joined),
            };
            let from: Result<Vec<Register>, String> =
                node.args.iter().map(|&a| c.taken(a, from_space)).collect();
            let from = from?;
            let to = match (work, from.first()) {
                (None, Some(&same)) => same,
                (None, None) => return Err("a reshape of nothing".into()),
                (Some(work), _) => {
                    let to = c.register(node.ty.dtype)?;
                    c.instructions.push(Instruction { work, dtype: node.ty.dtype, from, to, of_rows });
                    to
                }
            };
            c.made.push((id, to, of_rows));
        }
        let result = c.made.last().map(|(_, register, _)| *register).ok_or("an empty region")?;
        let by_rows = c.made.iter().any(|(.., of_rows)| *of_rows);
        let row = by_rows.then(|| pass.row()).flatten();
        let joins = matches!(graph.node(root).op, Op::Reshape { .. });
        c.operands.sort_by_key(|operand| operand.space);
        let Compiling { operands, instructions, counts, .. } = c;
        let (dtype, last_two) = (graph.ty(root).dtype, pass.last_two());
        Ok(Program { operands, instructions, result, dtype, counts, round_each, row, last_two, joins })
    }

    /// The operands, in the order [`Program::run`] wants them.
    pub(crate) fn operands(&self) -> impl Iterator<Item = ValueId> + '_ {
        self.operands.iter().map(|operand| operand.value)
    }

    /// Computes the result, of `shape`. `spare` is memory that may be used for it.
    pub(crate) fn run(&self, operands: &[Value], shape: &[usize], spare: Vec<f32>) -> Result<Value, String> {
        let walks = self.walks(operands, shape)?;
        let count: usize = shape.iter().product();
        macro_rules! run {
            ($ty:ty) => {{
                let mut out = vec![<$ty>::default(); count];
                self.fill(&walks, &mut out)?;
                wrap(out)
            }};
        }
        let data = match self.dtype {
            DType::F32 => {
                let mut out = spare;
                out.resize(count, 0.0);
                self.fill(&walks, &mut out)?;
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

    /// How operands are walked for a result of `shape`: those along the pass, and those along its rows.
    fn walks(&self, operands: &[Value], shape: &[usize]) -> Result<[Walk; 2], String> {
        let mut pass: Extents = shape.into();
        let two = || self.last_two.ok_or("the last dims of a region are not constant");
        if self.joins {
            pass.pop();
            pass.extend(two()?);
        }
        let mut rows = pass.clone();
        if let Some(last) = rows.last_mut() {
            *last = 1;
        }
        let mut joined = pass.clone();
        if self.operands.iter().any(|operand| operand.space == Space::Joined) {
            joined.truncate(pass.len().saturating_sub(2));
            joined.push(two()?.iter().product());
        }
        let (mut along, mut by_rows) = (Vec::new(), Vec::new());
        for (value, operand) in operands.iter().zip(&self.operands) {
            match operand.space {
                Space::Pass => along.push(value.stretched(&pass)?),
                // To take a dim apart moves nothing.
                Space::Joined => along.push(value.stretched(&joined)?.reshaped(&pass)?),
                Space::Row => by_rows.push(value.stretched(&rows)?),
            }
        }
        Ok([Walk::new(along, &pass), Walk::new(by_rows, &rows)])
    }

    fn fill<T: Stored>(&self, walks: &[Walk; 2], out: &mut [T]) -> Result<(), String> {
        if out.is_empty() {
            return Ok(());
        }
        let row = self.row.unwrap_or(1);
        let task = CHUNK / row * row;
        team::try_for_each_init(
            out.chunks_mut(task).enumerate(),
            || Registers::new(self.counts),
            |registers, (number, out)| {
                vectorised(
                    #[inline(always)]
                    |_| self.chunk(walks, registers.blocks(), number * task, out),
                )
            },
        )
    }

    /// Computes the elements from `first` on, which begin with a row.
    #[inline(always)]
    fn chunk<T: Stored>(
        &self,
        [along, by_rows]: &[Walk; 2],
        blocks: &mut Blocks,
        first: usize,
        out: &mut [T],
    ) -> Result<(), String> {
        let row = self.row.unwrap_or(1);
        let mut done = 0;
        while done < out.len() {
            let at = first + done;
            let mut run = (BLOCK / row * row).min(out.len() - done).min(along.rest(at));
            if !by_rows.operands.is_empty() {
                run = run.min(by_rows.rest(at / row) * row);
            }
            let (operands, of_rows) = self.operands.split_at(along.operands.len());
            along.load(operands, blocks, at, run)?;
            by_rows.load(of_rows, blocks, at / row, run / row)?;
            for instruction in &self.instructions {
                let count = if instruction.of_rows { run / row } else { run };
                blocks.execute(instruction, count, row, self.round_each)?;
            }
            T::store(blocks, self.result, &mut out[done..done + run])?;
            done += run;
        }
        Ok(())
    }
}

type Extents = smallvec::SmallVec<[usize; 6]>;

/// Where the elements of operands are, by position in a shape.
struct Walk {
    operands: Vec<Value>,
    outer: Vec<usize>,
    inner: usize,
    /// Per operand: base offset and strides, the innermost last.
    strides: Vec<(isize, Vec<isize>)>,
}

impl Walk {
    /// Of operands that are stretched to `shape`.
    fn new(operands: Vec<Value>, shape: &[usize]) -> Walk {
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
        Walk { operands, outer: dims, inner, strides }
    }

    /// Loads `run` elements of every operand from `at` on.
    #[inline(always)]
    fn load(&self, operands: &[Operand], blocks: &mut Blocks, at: usize, run: usize) -> Result<(), String> {
        for ((i, value), operand) in self.operands.iter().enumerate().zip(operands) {
            blocks.load(value, self.offset(i, at), self.step(i), operand.to, run)?;
        }
        Ok(())
    }

    /// Elements from `at` on that are one stride apart.
    fn rest(&self, at: usize) -> usize {
        self.inner - at % self.inner
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
