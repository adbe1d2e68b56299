//! Contractions as batched matrix products.
//!
//! The letters of an einsum fall into four groups: in both operands and the result (batch), in the first and the result
//! (rows), in the second and the result (columns), in both operands only (depth). Where each group is walked with one
//! stride in all that hold it, a library can do the product; our own kernels take groups of any number of dims. Results
//! of few rows ([`narrow`]) are bound by reading the second operand once, others ([`tiled`]) pass through shared memory.
//!
//! A second operand that is made from quantised blocks is read as it is stored and made on the way: it never lies in memory
//! as floats.

mod narrow;
mod tiled;

use super::emit::{Emitter, Made, Operand};
use super::space::Offsets;
use super::text::{Call, load};
use super::views::dense;
use tpshard_ir::op::EinsumSpec;
use tpshard_ir::program::device::pieces::{PIECE_ROWS, PIECE_START};
use tpshard_ir::program::device::{How, Launch, Matrix, Pieces, Product};
use tpshard_ir::{DType, Dim, Graph, Node, Op, ValueId};

/// Most rows that count as few.
const FEW: i64 = 4;
const THREADS: u32 = 256;

/// The second operand of a product.
enum Right {
    Plain(Operand),
    Quantised(Box<Quantised>),
}

/// `(q - zero) * scale`, with a scale for each block of elements along one letter.
struct Quantised {
    q: Operand,
    scale: Operand,
    zero: Option<Operand>,
    block: usize,
    /// The letter along which the blocks lie is one of the depth; else one of the columns.
    along_depth: bool,
    /// How far the next block's scale and zero are.
    steps: [Dim; 2],
}

impl Right {
    /// What lies in memory.
    fn stored(&self) -> &Operand {
        match self {
            Right::Plain(operand) => operand,
            Right::Quantised(quantised) => &quantised.q,
        }
    }
}

/// The groups of letters, with strides in the left operand, the right one, the result, scales and zeros; 0 where a letter
/// is absent.
struct Groups {
    batch: Offsets,
    rows: Offsets,
    columns: Offsets,
    depth: Offsets,
}

const LEFT: usize = 0;
const RIGHT: usize = 1;
const RESULT: usize = 2;
const SCALE: usize = 3;
const ZERO: usize = 4;

/// A product to be written.
struct Task {
    value: ValueId,
    /// Type of the left operand and the result.
    dtype: DType,
    left: Operand,
    right: Right,
    /// Where the result begins in its memory.
    offset: Dim,
    groups: Groups,
}

/// Letters sorted into groups: batch, rows, columns, depth.
fn letters(spec: &EinsumSpec) -> Option<[Vec<u8>; 4]> {
    let [a, b] = spec.inputs.as_slice() else { return None };
    let out = &spec.output;
    let pick = |test: &dyn Fn(u8) -> bool, of: &[u8]| -> Vec<u8> {
        of.iter().copied().filter(|&l| test(l)).collect()
    };
    Some([
        pick(&|l| a.contains(&l) && b.contains(&l), out),
        pick(&|l| !b.contains(&l), out),
        pick(&|l| !a.contains(&l), out),
        pick(&|l| b.contains(&l) && !out.contains(&l), a),
    ])
}

/// True if a letter is summed over within one operand.
fn has_lone_letters(spec: &EinsumSpec) -> bool {
    let [a, b] = spec.inputs.as_slice() else { return true };
    let lone = |a: &[u8], b: &[u8]| a.iter().any(|l| !b.contains(l) && !spec.output.contains(l));
    lone(a, b) || lone(b, a)
}

impl Groups {
    fn new(graph: &Graph, node: &Node, spec: &EinsumSpec, left: &Operand, right: &Right) -> Option<Groups> {
        let [a, b] = spec.inputs.as_slice() else { return None };
        let extent = |letter: u8| -> Option<Dim> {
            let of = |letters: &[u8], value: ValueId| {
                letters
                    .iter()
                    .position(|&l| l == letter)
                    .and_then(|at| graph.ty(value).shape.get(at).cloned())
            };
            of(a, *node.args.first()?).or_else(|| of(b, *node.args.get(1)?))
        };
        let mut operands: Vec<(&[u8], Vec<Dim>)> = vec![
            (a, left.view.strides.clone()),
            (b, right.stored().view.strides.clone()),
            (&spec.output, dense(&node.ty.shape)),
        ];
        if let Right::Quantised(quantised) = right {
            // Along the blocks, scales and zeros are walked apart.
            let without = |operand: &Operand| -> Vec<Dim> {
                let axis = quantised.axis(spec);
                let kept = |(dim, stride): (usize, &Dim)| {
                    if Some(dim) == axis { Dim::constant(0) } else { stride.clone() }
                };
                operand.view.strides.iter().enumerate().map(kept).collect()
            };
            operands.push((b, without(&quantised.scale)));
            operands.extend(quantised.zero.as_ref().map(|zero| (b.as_slice(), without(zero))));
        }
        let group = |letters: &[u8]| -> Option<Offsets> {
            let extents = letters.iter().map(|&l| extent(l)).collect::<Option<Vec<Dim>>>()?;
            let over = |(own, strides): &(&[u8], Vec<Dim>)| -> Vec<Dim> {
                let stride = |l: &u8| own.iter().position(|o| o == l).and_then(|at| strides.get(at).cloned());
                letters.iter().map(|l| stride(l).unwrap_or_else(|| Dim::constant(0))).collect()
            };
            let strides: Vec<Vec<Dim>> = operands.iter().map(over).collect();
            Some(Offsets::new(&extents, &strides.iter().map(Vec::as_slice).collect::<Vec<_>>()))
        };
        let [batch, rows, columns, depth] = letters(spec)?;
        Some(Groups {
            batch: group(&batch)?,
            rows: group(&rows)?,
            columns: group(&columns)?,
            depth: group(&depth)?,
        })
    }

    /// The one stride of an operand along a group.
    fn step(group: &Offsets, operand: usize) -> Option<Dim> {
        group.line().and_then(|line| line.get(operand).cloned())
    }
}

impl Quantised {
    /// The dim of the right operand along which the blocks lie.
    fn axis(&self, spec: &EinsumSpec) -> Option<usize> {
        let [_, _, columns, depth] = letters(spec)?;
        let letter = if self.along_depth { depth.first() } else { columns.first() };
        spec.inputs.get(1)?.iter().position(|l| Some(l) == letter)
    }
}

/// The right operand as it is stored, if `arg` is made from quantised blocks that a product can make on the way.
fn quantised(emitter: &mut Emitter<'_>, arg: ValueId, spec: &EinsumSpec) -> Option<Quantised> {
    let graph = emitter.graph;
    let (axis, block) = blocks_of(graph, arg, spec)?;
    let mut operands = graph.node(arg).args.iter().map(|&a| emitter.operand(a));
    let (q, scale, zero) = (operands.next()?, operands.next()?, operands.next());
    drop(operands);
    let starts = |operand: &Operand| operand.view.offset.is_zero() || !operand.dtype.is_packed();
    if !starts(&q) || !zero.as_ref().is_none_or(starts) {
        return None;
    }
    let step = |operand: &Operand| operand.view.strides.get(axis).cloned();
    let steps = [step(&scale)?, zero.as_ref().map_or(Some(Dim::constant(0)), step)?];
    let [.., depth] = letters(spec)?;
    let letter = spec.inputs.get(1)?.get(axis)?;
    Some(Quantised { q, scale, zero, block, along_depth: depth.contains(letter), steps })
}

/// The axis and the length of the blocks that `arg` is made from, if the letter of that axis has its group alone.
fn blocks_of(graph: &Graph, arg: ValueId, spec: &EinsumSpec) -> Option<(usize, usize)> {
    let node = graph.node(arg);
    let Op::Dequant { axis, block } = node.op else { return None };
    let integer = |d: DType| d.is_integer() && d.bits() <= 8;
    let types: Vec<DType> = node.args.iter().map(|&a| graph.ty(a).dtype).collect();
    let packed_zero = types.get(2).is_some_and(|d| !integer(*d) && !d.is_float());
    if !types.first().is_some_and(|&d| integer(d)) || packed_zero || node.ty.dtype == DType::F64 {
        return None;
    }
    let letter = spec.inputs.get(1)?.get(axis)?;
    let [_, _, columns, depth] = letters(spec)?;
    (columns == [*letter] || depth == [*letter]).then_some((axis, block))
}

/// True if `value` is made from quantised blocks and only read by products that make it on the way.
pub(super) fn is_made_on_the_way(graph: &Graph, value: ValueId, users: &[ValueId]) -> bool {
    let by_product = |&user: &ValueId| {
        let node = graph.node(user);
        let Op::Einsum(spec) = &node.op else { return false };
        node.args.first() != Some(&value)
            && node.args.get(1) == Some(&value)
            && blocks_of(graph, value, spec).is_some()
    };
    let is_output = graph.outputs.iter().any(|o| o.value == value);
    !users.is_empty() && !is_output && users.iter().all(by_product)
}

pub(super) fn einsum(emitter: &mut Emitter<'_>, value: ValueId, node: &Node, spec: &EinsumSpec) -> Made {
    let &[a, b] = node.args.as_slice() else { return Made::Not };
    let dtype = node.ty.dtype;
    let computed = dtype != DType::Bool && !dtype.is_packed();
    if !computed || has_lone_letters(spec) {
        return Made::Not;
    }
    // What is known when a session opens plays the columns.
    if emitter.is_constant(a) && !emitter.is_constant(b) {
        let [first, second] = spec.inputs.as_slice() else { return Made::Not };
        let inputs = vec![second.clone(), first.clone()];
        let turned = EinsumSpec { inputs, output: spec.output.clone() };
        let node = Node { args: vec![b, a], ..node.clone() };
        return product(emitter, value, &node, &turned);
    }
    product(emitter, value, node, spec)
}

fn product(emitter: &mut Emitter<'_>, value: ValueId, node: &Node, spec: &EinsumSpec) -> Made {
    let &[a, b] = node.args.as_slice() else { return Made::Not };
    let dtype = node.ty.dtype;
    let right = match quantised(emitter, b, spec) {
        Some(quantised) => Right::Quantised(Box::new(quantised)),
        None => Right::Plain(emitter.operand(b)),
    };
    let left = emitter.operand(a);
    let Some(groups) = Groups::new(emitter.graph, node, spec, &left, &right) else { return Made::Not };
    let mut task = Task { value, dtype, left, right, offset: Dim::constant(0), groups };
    let rows = task.groups.rows.count();
    let one = || Dim::constant(1);
    let calls = match rows.as_const() {
        Some(few) if few <= FEW => narrow::narrow(emitter, &task, &one()),
        Some(_) => vec![tiled::tiled(emitter, &task, &one())],
        None => {
            // 1 where there are few rows, else 0: the other calls have no block then.
            let is_few = (Dim::constant(FEW + 1) - &rows).maximum(&Dim::constant(0)).minimum(&one());
            let mut calls = narrow::narrow(emitter, &task, &is_few);
            calls.push(tiled::tiled(emitter, &task, &(one() - &is_few)));
            calls
        }
    };
    let made = task.made(calls);
    if let Some(counts) = emitter.wanted_pieces(value)
        && let Some(row) = task.become_piece()
    {
        let calls = vec![tiled::tiled(emitter, &task, &one())];
        let how = match task.made(calls) {
            Made::Product(product) => How::Product(product),
            Made::Calls(calls) => How::Launch(calls),
            Made::Not => return made,
        };
        emitter.put_pieces(value, Pieces { rows, row, counts, how });
    }
    made
}

impl Task {
    /// The product that a library takes, if it can be said to one, else the calls.
    fn made(&self, calls: Vec<Launch>) -> Made {
        let Some([left, right, result]) = self.matrices() else { return Made::Calls(calls) };
        let Groups { batch, rows, columns, depth } = &self.groups;
        Made::Product(Box::new(Product {
            batch: batch.count(),
            rows: rows.count(),
            columns: columns.count(),
            depth: depth.count(),
            left,
            right,
            result,
            dtype: self.dtype,
            fallback: calls,
        }))
    }

    /// Makes of the product that of a piece of its rows, if they follow one another in the left operand, and in the result
    /// end to end. The number of elements of a row.
    fn become_piece(&mut self) -> Option<Dim> {
        let [left, row] = [LEFT, RESULT].map(|operand| Groups::step(&self.groups.rows, operand));
        let (left, row) = (left?, row?);
        let groups = &mut self.groups;
        let is_line = groups.rows.extents.len() == 1 && groups.batch.extents.is_empty();
        if !is_line || row != groups.columns.count() || self.left.dtype.is_packed() {
            return None;
        }
        let start = Dim::symbol(PIECE_START);
        groups.rows.extents = vec![Dim::symbol(PIECE_ROWS)];
        self.left.view.offset = &self.left.view.offset + &(&start * &left);
        self.offset = &start * &row;
        Some(row)
    }

    /// What a library takes: every group one dim, and in every matrix one of its two dims dense.
    fn matrices(&self) -> Option<[Matrix; 3]> {
        let Right::Plain(right) = &self.right else { return None };
        if !self.dtype.is_float() {
            return None;
        }
        let matrix = |operand: usize, base: ValueId, offset: &Dim, row: &Offsets, column: &Offsets| {
            let (row, column) = (Groups::step(row, operand)?, Groups::step(column, operand)?);
            let fits = row.is_one() || column.is_one();
            let batch = Groups::step(&self.groups.batch, operand)?;
            fits.then(|| Matrix { value: base, offset: offset.clone(), batch, row, column })
        };
        let Groups { rows, columns, depth, .. } = &self.groups;
        Some([
            matrix(LEFT, self.left.view.base, &self.left.view.offset, rows, depth)?,
            matrix(RIGHT, right.view.base, &right.view.offset, depth, columns)?,
            matrix(RESULT, self.value, &self.offset, rows, columns)?,
        ])
    }

    /// Declares the operands in memory: `left`, `right`, `y`, and of quantised blocks `scale` and `zero`.
    fn arrays(&self, call: &mut Call) {
        let stored = self.right.stored();
        call.read("left", self.left.dtype, self.left.view.base, &self.left.view.offset);
        call.read("right", stored.dtype, stored.view.base, &stored.view.offset);
        if let Right::Quantised(quantised) = &self.right {
            let Quantised { scale, zero, .. } = &**quantised;
            call.read("scale", scale.dtype, scale.view.base, &scale.view.offset);
            if let Some(zero) = zero {
                call.read("zero", zero.dtype, zero.view.base, &zero.view.offset);
            }
        }
    }

    /// Declares the places of all operands at a batch.
    fn batch_places(&self, call: &mut Call) {
        let places = call.places(&self.groups.batch, "batch");
        let names = ["left_batch", "right_batch", "y_batch", "scale_batch", "zero_batch"];
        for (name, place) in names.iter().zip(places) {
            call.line(format!("i64 {name} = {place};"));
        }
    }

    /// The element of the right operand at `column` and `k`, whose places are given, as an expression.
    fn right_element(
        &self,
        call: &mut Call,
        columns: &[String],
        depth: &[String],
        [column, k]: [&str; 2],
    ) -> String {
        let part = |operand: usize| [place(columns, operand).to_string(), place(depth, operand).to_string()];
        let at = |base: &str, operand: usize, more: &str| -> String {
            let [a, b] = part(operand);
            at(base, &[&a, &b, more])
        };
        let element = load(self.right.stored().dtype, "right", &at("right_batch", RIGHT, "0"));
        let Right::Quantised(quantised) = &self.right else { return element };
        let index = if quantised.along_depth { k } else { column };
        let block = call.variable(&Dim::from(quantised.block));
        let mut more = |step: &Dim| match call.size(step).as_str() {
            "0" => "0".to_string(),
            "1" => format!("{index} / {block}"),
            step => format!("{index} / {block} * {step}"),
        };
        let [scale_more, zero_more] = quantised.steps.each_ref().map(&mut more);
        let mut number = format!("(float){element}");
        if let Some(zero) = &quantised.zero {
            let zero = load(zero.dtype, "zero", &at("zero_batch", ZERO, &zero_more));
            number = format!("({number} - (float){zero})");
        }
        format!("{number} * {}", load(quantised.scale.dtype, "scale", &at("scale_batch", SCALE, &scale_more)))
    }

    /// What kernels of this task are called after: the type, and what the right operand is made from.
    fn suffix(&self) -> String {
        match &self.right {
            Right::Plain(_) => self.dtype.to_string(),
            Right::Quantised(quantised) => format!("{}_{}", quantised.q.dtype, self.dtype),
        }
    }
}

fn at(base: &str, parts: &[&str]) -> String {
    let parts: Vec<&str> = parts.iter().copied().filter(|&part| part != "0").collect();
    if parts.is_empty() { base.into() } else { format!("{base} + {}", parts.join(" + ")) }
}

fn place(places: &[String], operand: usize) -> &str {
    places.get(operand).map_or("0", String::as_str)
}
