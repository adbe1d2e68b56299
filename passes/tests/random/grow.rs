//! What a gene adds to a graph.

use super::Words;
use std::sync::Arc;
use tpshard_ir::graph::Output;
use tpshard_ir::op::{EinsumSpec, Literal, NormKind, PadMode, PoolKind, Real, Window};
use tpshard_ir::weight::WeightExpr;
use tpshard_ir::{DType, Dim, Graph, Monoid, Op, Scalar, SymbolRange, Tensor, Type, ValueId};

/// Most elements of a value, symbols counted as this many.
const ELEMENTS: i64 = 3000;
const SYMBOL: i64 = 4;

/// A graph under construction; `pool` are the `f32` values genes choose among.
struct Grown {
    graph: Graph,
    pool: Vec<ValueId>,
    weights: usize,
    words: Words,
}

/// The graph of a list of genes; its outputs are the last values.
pub(super) fn graph(genes: &[u64]) -> Graph {
    let mut grown = Grown { graph: Graph::new("random"), pool: Vec::new(), weights: 0, words: Words::of(0) };
    for name in ["b", "s"] {
        grown.graph.symbols.insert(name.into(), SymbolRange { low: 1, high: 64 });
    }
    let (b, s) = (Dim::symbol("b"), Dim::symbol("s"));
    let fixed = |sizes: [i64; 3]| sizes.map(Dim::constant).to_vec();
    let shapes = [
        ("x", vec![b.clone(), s.clone(), Dim::constant(6)]),
        ("y", vec![Dim::constant(4), s, Dim::constant(5)]),
        ("z", fixed([3, 4, 5])),
    ];
    for (name, shape) in shapes {
        let value = grown.graph.input(name, Type::new(DType::F32, shape));
        grown.pool.push(value);
    }
    let ids = grown.graph.input("ids", Type::new(DType::I64, vec![b, Dim::constant(3)]));
    for &gene in genes {
        grown.words = Words::of(gene);
        // What does not fit what is there adds nothing.
        if let Some(value) = grown.gene(ids).filter(|&value| grown.fits(value)) {
            grown.pool.push(value);
        }
    }
    let last = grown.pool.len().saturating_sub(2);
    for (index, &value) in grown.pool.iter().skip(last).enumerate() {
        grown.graph.outputs.push(Output { name: format!("out{index}").into(), value });
    }
    grown.graph
}

fn constant(dim: &Dim) -> Option<usize> {
    dim.as_size().filter(|&size| size > 0)
}

fn window(kernel: usize, rank: usize, words: &mut Words) -> Window {
    Window {
        kernel: vec![kernel; rank],
        strides: vec![1 + words.below(2); rank],
        dilations: vec![1; rank],
        pads_low: vec![words.below(kernel); rank],
        pads_high: vec![words.below(kernel); rank],
        ceil: false,
    }
}

/// `0, 1, 2` as `abc`.
fn letters(rank: usize) -> Vec<u8> {
    (b'a'..).take(rank).collect()
}

impl Grown {
    fn gene(&mut self, ids: ValueId) -> Option<ValueId> {
        match self.words.below(24) {
            0 => self.unary(),
            1 | 2 => self.binary(),
            3 => self.select(),
            4..=6 => self.linear(),
            7 => self.product(),
            8 => self.reduce(),
            9 => self.running(),
            10 => self.normalized(),
            11 => self.transposed(),
            12 => self.reshaped(),
            13 => self.cut(),
            14 => self.padded(),
            15 => self.joined(),
            16 => self.embedded(ids),
            17 => self.gathered(),
            18 => self.scattered(),
            19 => self.dequantized(),
            20 => self.pooled(),
            21 => self.convolved(),
            22 => self.attended(),
            _ => self.turned(),
        }
    }

    fn fits(&self, value: ValueId) -> bool {
        let ty = self.graph.ty(value);
        let bindings = [("b".into(), SYMBOL), ("s".into(), SYMBOL)].into();
        let sizes = ty.shape.iter().map(|dim| dim.eval(&bindings).ok());
        let elements = sizes.reduce(|a, b| a?.checked_mul(b?)).unwrap_or(Some(1));
        ty.dtype == DType::F32 && ty.rank() <= 5 && elements.is_some_and(|n| n > 0 && n <= ELEMENTS)
    }

    fn add(&mut self, op: Op, args: &[ValueId]) -> Option<ValueId> {
        let value = self.graph.add(op, args).ok()?;
        self.graph.set_origin(value, &format!("node{}", value.0));
        Some(value)
    }

    fn shape(&self, value: ValueId) -> Vec<Dim> {
        self.graph.ty(value).shape.clone()
    }

    /// A new weight, perhaps stored in another order than it is used in.
    fn weight(&mut self, shape: &[usize]) -> Option<ValueId> {
        self.stored(DType::F32, shape)
    }

    fn stored(&mut self, dtype: DType, shape: &[usize]) -> Option<ValueId> {
        let name = format!("w{}", self.weights);
        self.weights += 1;
        let weight = if shape.len() == 2 && self.words.chance(3) {
            let stored = WeightExpr::initializer(name, dtype, vec![shape[1], shape[0]]).ok()?;
            stored.transpose(vec![1, 0]).ok()?
        } else {
            WeightExpr::initializer(name, dtype, shape.to_vec()).ok()?
        };
        self.add(Op::Weight(weight), &[])
    }

    fn indices(&mut self, shape: &[usize], bound: usize, distinct: bool) -> Option<ValueId> {
        let start = self.words.below(bound);
        let count = shape.iter().product::<usize>();
        let value = |i: usize| if distinct { (start + i) % bound } else { self.words.below(bound) };
        let values: Vec<i64> = (0..count).map(value).map(|v| v as i64).collect();
        let tensor = Tensor::from_vec(shape.to_vec(), values).ok()?;
        self.add(Op::Literal(Literal(Arc::new(tensor))), &[])
    }

    /// One of the values; later ones more often.
    fn any(&mut self) -> Option<ValueId> {
        let from = if self.words.chance(3) { 0 } else { self.pool.len().saturating_sub(3) };
        let rest = self.pool.get(from..)?.to_vec();
        self.words.pick(&rest)
    }

    /// A value and one of its dims.
    fn dim(&mut self) -> Option<(ValueId, usize)> {
        let x = self.any()?;
        let rank = self.shape(x).len();
        (rank > 0).then(|| (x, self.words.below(rank)))
    }

    /// A value and one of its dims with a fixed extent.
    fn fixed(&mut self) -> Option<(ValueId, usize, usize)> {
        let x = self.any()?;
        let shape = self.shape(x);
        let dims: Vec<(usize, usize)> =
            shape.iter().enumerate().filter_map(|(i, dim)| Some((i, constant(dim)?))).collect();
        let (dim, size) = self.words.pick(&dims)?;
        Some((x, dim, size))
    }

    /// Another value of the same shape, or the same one.
    fn like(&mut self, x: ValueId) -> Option<ValueId> {
        let shape = self.shape(x);
        let all: Vec<ValueId> = self.pool.iter().copied().filter(|&y| self.shape(y) == shape).collect();
        self.words.pick(&all)
    }

    fn unary(&mut self) -> Option<ValueId> {
        let x = self.any()?;
        let functions = [Scalar::Neg, Scalar::Exp, Scalar::Tanh, Scalar::Reciprocal, Scalar::Erf];
        if self.words.chance(4) {
            let half = self.add(Op::Map(Scalar::Cast(DType::F16)), &[x])?;
            return self.add(Op::Map(Scalar::Cast(DType::F32)), &[half]);
        }
        let function = self.words.pick(&functions)?;
        self.add(Op::Map(function), &[x])
    }

    /// With another value, a weight along the last fixed dims, or the positions along a dim.
    fn binary(&mut self) -> Option<ValueId> {
        let functions = [Scalar::Add, Scalar::Sub, Scalar::Mul, Scalar::Div, Scalar::Max, Scalar::Min];
        let function = self.words.pick(&functions)?;
        let x = self.any()?;
        let y = match self.words.below(3) {
            0 => self.like(x)?,
            1 => {
                let shape: Vec<usize> =
                    self.shape(x).iter().rev().map_while(constant).take(1 + self.words.below(2)).collect();
                let shape: Vec<usize> = shape.into_iter().rev().collect();
                self.weight(&shape)?
            }
            _ => {
                let length = self.shape(x).last()?.clone();
                let positions = self.add(Op::Iota { start: Dim::constant(1), length }, &[])?;
                self.add(Op::Map(Scalar::Cast(DType::F32)), &[positions])?
            }
        };
        let args = if self.words.chance(3) { [y, x] } else { [x, y] };
        self.add(Op::Map(function), &args)
    }

    fn select(&mut self) -> Option<ValueId> {
        let (x, y) = (self.any()?, self.weight(&[])?);
        let condition = self.add(Op::Map(Scalar::Less), &[x, y])?;
        let condition =
            if self.words.chance(2) { self.add(Op::Map(Scalar::Not), &[condition])? } else { condition };
        let other = self.like(x)?;
        self.add(Op::Map(Scalar::Select), &[condition, x, other])
    }

    /// A dim contracted with a weight and replaced.
    fn linear(&mut self) -> Option<ValueId> {
        let (x, dim, size) = self.fixed()?;
        let rank = self.shape(x).len();
        let to = 2 + self.words.below(7);
        let w = self.weight(&[size, to])?;
        let input = letters(rank);
        let mut output = input.clone();
        *output.get_mut(dim)? = b'n';
        let spec = EinsumSpec { inputs: vec![input.clone(), vec![*input.get(dim)?, b'n']], output };
        self.add(Op::Einsum(spec), &[x, w])
    }

    /// The product of two values of one shape over one dim; another dim of each stays, the rest are batch dims.
    fn product(&mut self) -> Option<ValueId> {
        let (x, summed) = self.dim()?;
        let y = self.like(x)?;
        let a = letters(self.shape(x).len());
        let kept = self.words.below(a.len());
        let mut b = a.clone();
        let mut output: Vec<u8> = a.clone();
        if kept != summed {
            *b.get_mut(kept)? = b'z';
            output.push(b'z');
        }
        output.retain(|letter| *letter != a[summed]);
        self.add(Op::Einsum(EinsumSpec { inputs: vec![a, b], output }), &[x, y])
    }

    fn reduce(&mut self) -> Option<ValueId> {
        let (x, dim) = self.dim()?;
        let monoid = self.words.pick(&Monoid::ALL)?;
        let y = self.add(Op::Reduce { monoid, axes: vec![dim] }, &[x])?;
        if self.words.chance(2) {
            return Some(y);
        }
        let mut shape = self.shape(y);
        if self.words.chance(2) {
            shape.remove(dim);
            return self.add(Op::Reshape { shape }, &[y]);
        }
        let shape = self.shape(x);
        self.add(Op::Broadcast { shape }, &[y])
    }

    fn running(&mut self) -> Option<ValueId> {
        let (x, axis) = self.dim()?;
        let monoid = self.words.pick(&Monoid::ALL)?;
        let (exclusive, reverse) = (self.words.chance(2), self.words.chance(2));
        self.add(Op::Scan { monoid, axis, exclusive, reverse }, &[x])
    }

    fn normalized(&mut self) -> Option<ValueId> {
        let (x, axis) = self.dim()?;
        if self.words.chance(2) {
            return self.add(Op::Softmax { axis }, &[x]);
        }
        let shape: Vec<usize> = self.shape(x).get(axis..)?.iter().map(constant).collect::<Option<_>>()?;
        let kind = if self.words.chance(2) { NormKind::Rms } else { NormKind::Layer };
        let mut args = vec![x, self.weight(&shape)?];
        if self.words.chance(2) {
            args.push(self.weight(&shape)?);
        }
        self.add(Op::Norm { kind, axis, epsilon: Real(0.5) }, &args)
    }

    fn transposed(&mut self) -> Option<ValueId> {
        let (x, first) = self.dim()?;
        let rank = self.shape(x).len();
        let mut perm: Vec<usize> = (0..rank).collect();
        perm.swap(first, self.words.below(rank));
        perm.rotate_left(self.words.below(rank));
        self.add(Op::Transpose { perm }, &[x])
    }

    /// A dim split in two, or two neighbours merged.
    fn reshaped(&mut self) -> Option<ValueId> {
        let (x, dim) = self.dim()?;
        let mut shape = self.shape(x);
        if let Some(size) = constant(shape.get(dim)?)
            && self.words.chance(2)
        {
            let factors: Vec<usize> = (1..=size).filter(|f| size.is_multiple_of(*f)).collect();
            let outer = self.words.pick(&factors)?;
            shape.splice(dim..=dim, [Dim::from(outer), Dim::from(size / outer)]);
        } else {
            let merged = shape.get(dim)? * shape.get(dim + 1)?;
            shape.splice(dim..dim + 2, [merged]);
        }
        self.add(Op::Reshape { shape }, &[x])
    }

    fn cut(&mut self) -> Option<ValueId> {
        let (x, axis, size) = self.fixed()?;
        let step = 1 + self.words.below(2);
        let start = self.words.below(size);
        if self.words.chance(3) {
            let (start, length) = (Dim::from(size - 1), Dim::from(size.div_ceil(step)));
            return self.add(Op::Slice { axis, start, length, step: -(step as i64) }, &[x]);
        }
        let length = 1 + self.words.below((size - start).div_ceil(step));
        let (start, length) = (Dim::from(start), Dim::from(length));
        self.add(Op::Slice { axis, start, length, step: step as i64 }, &[x])
    }

    fn padded(&mut self) -> Option<ValueId> {
        let (x, axis, _) = self.fixed()?;
        let rank = self.shape(x).len();
        let (mut low, mut high) = (vec![Dim::constant(0); rank], vec![Dim::constant(0); rank]);
        *low.get_mut(axis)? = Dim::from(self.words.below(2));
        *high.get_mut(axis)? = Dim::from(self.words.below(2));
        let modes =
            [PadMode::Constant(Real(0.0)), PadMode::Constant(Real(2.0)), PadMode::Edge, PadMode::Wrap];
        let mode = self.words.pick(&modes)?;
        self.add(Op::Pad { low, high, mode }, &[x])
    }

    fn joined(&mut self) -> Option<ValueId> {
        let (x, axis) = self.dim()?;
        let y = self.like(x)?;
        if self.words.chance(3) {
            return self.add(Op::Append { axis }, &[x, y]);
        }
        let args = if self.words.chance(3) { vec![x, y, x] } else { vec![x, y] };
        self.add(Op::Concat { axis }, &args)
    }

    fn embedded(&mut self, ids: ValueId) -> Option<ValueId> {
        // Ids are below 13.
        let width = 2 + self.words.below(6);
        let table = self.weight(&[13, width])?;
        self.add(Op::Gather { axis: 0, window: None }, &[table, ids])
    }

    fn gathered(&mut self) -> Option<ValueId> {
        let (x, axis, size) = self.fixed()?;
        let count = 1 + self.words.below(4);
        match self.words.below(4) {
            0 => {
                let indices = self.indices(&[count], size, false)?;
                self.add(Op::Gather { axis, window: None }, &[x, indices])
            }
            1 => {
                let first = constant(self.shape(x).first()?)?;
                let indices = self.indices(&[count, 1], first, false)?;
                self.add(Op::GatherNd { batch_dims: 0 }, &[x, indices])
            }
            2 => {
                let shape: Vec<usize> = self.shape(x).iter().map(constant).collect::<Option<_>>()?;
                let indices = self.indices(&shape, size, false)?;
                self.add(Op::GatherElements { axis }, &[x, indices])
            }
            _ => {
                let k = Dim::from(1 + self.words.below(size));
                let largest = self.words.chance(2);
                let best = self.add(Op::TopK { axis, k, largest }, &[x])?;
                self.add(Op::GatherElements { axis }, &[x, best])
            }
        }
    }

    fn scattered(&mut self) -> Option<ValueId> {
        let (x, axis, size) = self.fixed()?;
        let shape: Vec<usize> = self.shape(x).iter().map(constant).collect::<Option<_>>()?;
        let monoid = self.words.pick(&[None, Some(Monoid::Sum), Some(Monoid::Max)])?;
        if self.words.chance(2) {
            let first = *shape.first()?;
            let count = 1 + self.words.below(first);
            let indices = self.indices(&[count, 1], first, true)?;
            let mut updates = shape;
            *updates.first_mut()? = count;
            let updates = self.weight(&updates)?;
            return self.add(Op::ScatterNd { monoid }, &[x, indices, updates]);
        }
        let mut part = vec![1; shape.len()];
        *part.get_mut(axis)? = 1 + self.words.below(size);
        let indices = self.indices(&part, size, true)?;
        let updates = self.weight(&part)?;
        self.add(Op::ScatterElements { axis, monoid }, &[x, indices, updates])
    }

    /// A product with a weight that is stored in few bits.
    fn dequantized(&mut self) -> Option<ValueId> {
        let (x, dim, size) = self.fixed()?;
        if dim + 1 != self.shape(x).len() {
            return None;
        }
        let (to, block) = (2 + self.words.below(6), 1 + self.words.below(3));
        let blocks = size.div_ceil(block);
        let q = self.stored(DType::I8, &[size, to])?;
        let mut args = vec![q, self.weight(&[blocks, to])?];
        if self.words.chance(2) {
            args.push(self.stored(DType::I8, &[blocks, to])?);
        }
        let w = self.add(Op::Dequant { axis: 0, block }, &args)?;
        let input = letters(dim + 1);
        let mut output = input.clone();
        *output.last_mut()? = b'n';
        let spec = EinsumSpec { inputs: vec![input.clone(), vec![*input.last()?, b'n']], output };
        self.add(Op::Einsum(spec), &[x, w])
    }

    fn pooled(&mut self) -> Option<ValueId> {
        let x = self.any()?;
        let spatial = self.shape(x).len().checked_sub(2).filter(|n| (1..=2).contains(n))?;
        let kernel = 1 + self.words.below(2);
        let kinds = [PoolKind::Max, PoolKind::Average { count_padding: true }, PoolKind::Lp { p: 2 }];
        let kind = self.words.pick(&kinds)?;
        let window = window(kernel, spatial, &mut self.words);
        self.add(Op::Pool { kind, window }, &[x])
    }

    fn convolved(&mut self) -> Option<ValueId> {
        let x = self.any()?;
        let shape = self.shape(x);
        let spatial = shape.len().checked_sub(2).filter(|n| (1..=2).contains(n))?;
        let channels = constant(shape.get(1)?)?;
        let divisors: Vec<usize> = (1..=channels).filter(|g| channels.is_multiple_of(*g)).collect();
        let groups = self.words.pick(&divisors)?;
        let kernel = 1 + self.words.below(2);
        let mut weight = vec![groups * (1 + self.words.below(3)), channels / groups];
        weight.extend(vec![kernel; spatial]);
        let w = self.weight(&weight)?;
        let window = window(kernel, spatial, &mut self.words);
        self.add(Op::Conv { window, groups }, &[x, w])
    }

    /// Projections, heads, attention among the rows of a value of rank 3, and the heads merged again.
    fn attended(&mut self) -> Option<ValueId> {
        let x = self.any()?;
        let shape = self.shape(x);
        let [batch, rows, width] = shape.as_slice() else { return None };
        let width = constant(width)?;
        let kv = 1 + self.words.below(3);
        let (heads, size) = (kv * (1 + self.words.below(2)), 1 + self.words.below(3));
        let project = |grown: &mut Grown, heads: usize| {
            let w = grown.weight(&[width, heads * size])?;
            let spec = EinsumSpec::parse("bsk,kn->bsn")?;
            let y = grown.add(Op::Einsum(spec), &[x, w])?;
            let shape = vec![batch.clone(), rows.clone(), heads.into(), size.into()];
            let y = grown.add(Op::Reshape { shape }, &[y])?;
            grown.add(Op::Transpose { perm: vec![0, 2, 1, 3] }, &[y])
        };
        let args = [project(self, heads)?, project(self, kv)?, project(self, kv)?];
        let kv_of_head = (0..heads).map(|head| (head * kv / heads) as u32).collect();
        let softcap = self.words.chance(3).then_some(Real(3.0));
        let op = Op::Attention { scale: Real(0.5), softcap, kv_of_head, empty_rows_zero: false };
        let y = self.add(op, &args)?;
        let y = self.add(Op::Transpose { perm: vec![0, 2, 1, 3] }, &[y])?;
        let shape = vec![batch.clone(), rows.clone(), (heads * size).into()];
        self.add(Op::Reshape { shape }, &[y])
    }

    fn turned(&mut self) -> Option<ValueId> {
        let x = self.any()?;
        let half = constant(self.shape(x).last()?)?.checked_div(2).filter(|&half| half > 0)?;
        let (cos, sin) = (self.weight(&[half])?, self.weight(&[half])?);
        let interleaved = self.words.chance(2);
        self.add(Op::Rotary { interleaved }, &[x, cos, sin])
    }
}
