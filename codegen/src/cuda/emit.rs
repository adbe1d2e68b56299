//! From the regions of an entry to its steps.

use super::PRELUDE;
use super::text::{Kernels, c_type};
use super::views::View;
use super::{attention, elementwise, indexed, movement, product, rows, windows};
use std::collections::BTreeMap;
use std::sync::Arc;
use tpshard_ir::layout::{Mesh, local_runs};
use tpshard_ir::op::Literal;
use tpshard_ir::program::device::Pieces;
use tpshard_ir::program::device::pieces::{PieceCounts, summed};
use tpshard_ir::program::device::{DeviceLowering, DeviceStep, How, Launch, Product, capacity_symbol};
use tpshard_ir::program::{Entry, Family, RankProgram, Region, Stage};
use tpshard_ir::{Conversion, DType, Dim, Graph, Node, Op, Type, ValueId};

/// Gives `program` kernels for a GPU, and every entry the calls of them. `pieces` are the products of each entry that are to
/// be made in pieces where that can be.
pub fn attach(program: &mut RankProgram, pieces: &[BTreeMap<ValueId, PieceCounts>]) {
    let mut kernels = Kernels::default();
    let states: Vec<Arc<str>> = program.states.iter().map(|state| state.input.clone()).collect();
    let lowerings: Vec<DeviceLowering> = program
        .entries
        .iter()
        .enumerate()
        .map(|(index, entry)| {
            let context = Context { states: &states, mesh: &program.mesh, rank: program.rank };
            let mut emitter = Emitter::new(entry, &context, &mut kernels);
            emitter.wanted = pieces.get(index);
            emitter.run()
        })
        .collect();
    for (entry, lowering) in program.entries.iter_mut().zip(lowerings) {
        entry.device = Some(lowering);
    }
    program.device = Some(kernels.finish(PRELUDE));
}

/// What a program says besides its entries.
struct Context<'a> {
    states: &'a [Arc<str>],
    mesh: &'a Mesh,
    rank: usize,
}

/// An operand: where its elements lie, and their type.
#[derive(Clone, Debug)]
pub(super) struct Operand {
    pub(super) view: View,
    pub(super) dtype: DType,
    pub(super) shape: Vec<Dim>,
}

impl Operand {
    /// The strides of this operand stretched to `shape`.
    pub(super) fn strides_over(&self, shape: &[Dim]) -> Vec<Dim> {
        self.view.stretched(&self.shape, shape).strides
    }
}

/// How a value is computed on the device.
pub(super) enum Made {
    Calls(Vec<Launch>),
    Product(Box<Product>),
    /// No kernel here does it.
    Not,
}

pub(super) struct Emitter<'a> {
    pub(super) graph: &'a Graph,
    entry: &'a Entry,
    context: &'a Context<'a>,
    pub(super) kernels: &'a mut Kernels,
    constant: Vec<bool>,
    views: Vec<Option<View>>,
    made: Vec<bool>,
    /// The room of values whose memory is spaced for what grows in it.
    rooms: BTreeMap<ValueId, Vec<Dim>>,
    /// Regions that are computed when something reads them, which may be never.
    pending: BTreeMap<ValueId, Region>,
    /// Bytes that the calls of the step under construction need.
    scratch: Dim,
    users: Vec<Vec<ValueId>>,
    steps: Vec<DeviceStep>,
    /// Products that are to be made in pieces.
    wanted: Option<&'a BTreeMap<ValueId, PieceCounts>>,
    pieces: BTreeMap<ValueId, Pieces>,
}

impl<'a> Emitter<'a> {
    fn new(entry: &'a Entry, context: &'a Context<'a>, kernels: &'a mut Kernels) -> Emitter<'a> {
        let graph = &entry.graph;
        Emitter {
            graph,
            entry,
            context,
            kernels,
            constant: entry.lowering.constant_values(graph),
            views: vec![None; graph.len()],
            made: vec![false; graph.len()],
            rooms: rooms(entry, context.states),
            pending: BTreeMap::new(),
            scratch: Dim::constant(0),
            users: graph.users(),
            steps: vec![],
            wanted: None,
            pieces: BTreeMap::new(),
        }
    }

    fn run(mut self) -> DeviceLowering {
        for region in self.entry.lowering.regions.iter().flat_map(|region| region.plain(self.graph)) {
            self.region(region);
        }
        for output in &self.graph.outputs {
            self.materialise(output.value);
        }
        DeviceLowering { steps: self.steps, pieces: self.pieces }
    }

    /// In how many pieces a product is to be made, if it is and nothing but a sum over ranks follows.
    pub(super) fn wanted_pieces(&self, value: ValueId) -> Option<PieceCounts> {
        let counts = self.wanted?.get(&value)?;
        let users = self.users.get(value.index()).map_or(&[][..], Vec::as_slice);
        let &[user] = users else { return None };
        let is_output = self.graph.outputs.iter().any(|output| output.value == value);
        (!is_output && summed(self.graph, user) == Some(value)).then(|| counts.clone())
    }

    pub(super) fn put_pieces(&mut self, value: ValueId, pieces: Pieces) {
        self.pieces.insert(value, pieces);
    }

    pub(super) fn ty(&self, value: ValueId) -> &'a Type {
        self.graph.ty(value)
    }

    /// The memory of a value that has its own.
    pub(super) fn own(&self, value: ValueId) -> View {
        View::whole(value, self.rooms.get(&value).unwrap_or(&self.ty(value).shape))
    }

    fn region(&mut self, region: Region) {
        let value = region.result();
        let node = self.graph.node(value);
        if let Some(view) = self.as_view(node) {
            self.set(value, view);
            return;
        }
        let own = self.own(value);
        if region.stage == Stage::Load || is_stored(&node.op) {
            // Made when something reads it.
            self.set(value, own);
            return;
        }
        let users = self.users.get(value.index()).map_or(&[][..], Vec::as_slice);
        if product::is_made_on_the_way(self.graph, value, users) {
            self.pending.insert(value, region);
            self.set(value, own);
            return;
        }
        self.compute(&region);
    }

    /// The step of a region.
    fn compute(&mut self, region: &Region) {
        let value = region.result();
        let node = self.graph.node(value);
        let own = self.own(value);
        let how = match &node.op {
            Op::Convert(Conversion::OnlyFirst { monoid, .. }) => match movement::fill(self, value, *monoid) {
                Some(launch) => How::Launch(vec![launch]),
                None => How::Convert,
            },
            Op::Convert(_) => How::Convert,
            Op::Append { axis } if self.rooms.contains_key(&value) => match node.args.split_first() {
                Some((&state, new)) => {
                    self.materialise(state);
                    How::Append { state, launches: movement::append(self, value, state, new, *axis) }
                }
                None => How::Host,
            },
            _ => match self.computed(region, node) {
                Made::Calls(launches) => How::Launch(launches),
                Made::Product(product) => How::Product(product),
                Made::Not => How::Host,
            },
        };
        if matches!(how, How::Host | How::Convert) {
            for &arg in &node.args {
                self.materialise(arg);
            }
        }
        self.push(value, Stage::Step, how);
        self.set(value, own);
    }

    fn computed(&mut self, region: &Region, node: &Node) -> Made {
        let known = |value: &ValueId| c_type(self.ty(*value).dtype).is_some();
        if !node.args.iter().chain([&region.result()]).all(known) {
            return Made::Not;
        }
        let value = region.result();
        match &node.op {
            Op::Map(_) => elementwise::fused(self, region),
            Op::Iota { start, .. } => movement::iota(self, value, start),
            Op::Reshape { .. } | Op::Slice { .. } | Op::Transpose { .. } | Op::Broadcast { .. } => {
                movement::copied(self, value, node)
            }
            Op::Concat { axis } | Op::Append { axis } => movement::concat(self, value, node, *axis),
            Op::Pad { low, mode, .. } => movement::pad(self, value, node, low, *mode),
            Op::Gather { axis, window } => indexed::gather(self, value, node, *axis, window.as_ref()),
            Op::GatherElements { axis } => indexed::gather_elements(self, value, node, *axis),
            Op::GatherNd { batch_dims } => indexed::gather_nd(self, value, node, *batch_dims),
            Op::ScatterElements { axis, monoid } => {
                indexed::scatter_elements(self, value, node, *axis, *monoid)
            }
            Op::ScatterNd { monoid } => indexed::scatter_nd(self, value, node, *monoid),
            Op::TopK { axis, k, largest } => rows::top_k(self, value, node, *axis, k, *largest),
            Op::Dequant { axis, block } => elementwise::dequant(self, value, node, *axis, *block),
            Op::Softmax { axis } => rows::softmax(self, value, node, *axis),
            Op::Norm { kind, axis, epsilon } => rows::norm(self, value, node, *kind, *axis, epsilon.0),
            Op::Reduce { monoid, axes } => rows::reduce(self, value, node, *monoid, axes),
            Op::Scan { monoid, axis, exclusive, reverse } => {
                rows::scan(self, value, node, *monoid, *axis, [*exclusive, *reverse])
            }
            Op::Einsum(spec) => product::einsum(self, value, node, spec),
            Op::Attention { .. } => attention::attention(self, value, node),
            Op::Rotary { interleaved } => attention::rotary(self, value, node, *interleaved),
            Op::Conv { window, groups } => windows::conv(self, value, node, window, *groups),
            Op::Pool { kind, window } => windows::pool(self, value, node, *kind, window),
            Op::Input { .. }
            | Op::Weight(_)
            | Op::Literal(_)
            | Op::Size(_)
            | Op::Deferred { .. }
            | Op::Convert(_) => Made::Not,
        }
    }

    /// The value as a view of memory that is there, if it needs no memory of its own.
    fn as_view(&self, node: &Node) -> Option<View> {
        let (&first, _) = node.args.split_first()?;
        let from = self.views.get(first.index())?.as_ref()?;
        let shape = &self.ty(first).shape;
        let packed = node.ty.dtype.is_packed();
        match &node.op {
            Op::Reshape { shape: to } => from.reshaped(shape, to),
            _ if packed => None,
            Op::Transpose { perm } => Some(from.transposed(perm)),
            Op::Broadcast { shape: to } => Some(from.stretched(shape, to)),
            Op::Slice { axis, start, step, .. } => Some(from.sliced(*axis, start, *step)),
            Op::Convert(Conversion::ShardSlice { dim, .. }) => {
                let start = self.share(node, first, *dim)?;
                Some(from.sliced(*dim, &start, 1))
            }
            Op::Convert(Conversion::OnlyFirst { axes, .. }) => {
                let group = self.context.mesh.group(self.context.rank, axes);
                (group.first() == Some(&self.context.rank)).then(|| from.clone())
            }
            _ => None,
        }
    }

    /// Where along `dim` the share that a rank keeps begins in what it had.
    fn share(&self, node: &Node, from: ValueId, dim: usize) -> Option<Dim> {
        let to = self.graph.nodes().iter().position(|n| std::ptr::eq(n, node))?;
        let start = |family: &Family| {
            let runs = local_runs(&family.ty.shape, &family.layout, self.context.mesh, self.context.rank);
            runs.get(dim).map(|run| run.start.clone())
        };
        let families = &self.entry.families;
        Some(start(families.get(to)?)? - start(families.get(from.index())?)?)
    }

    fn set(&mut self, value: ValueId, view: View) {
        if let Some(slot) = self.views.get_mut(value.index()) {
            *slot = Some(view);
        }
    }

    fn push(&mut self, value: ValueId, stage: Stage, how: How) {
        if let Some(made) = self.made.get_mut(value.index()) {
            *made = true;
        }
        let scratch = match how.launches().is_empty() {
            true => Dim::constant(0),
            false => std::mem::replace(&mut self.scratch, Dim::constant(0)),
        };
        self.steps.push(DeviceStep { value, stage, scratch, how });
    }

    /// The calls of the step under construction need so many bytes. There is a little more, so that there is a place to name
    /// where sizes make it none.
    pub(super) fn need_scratch(&mut self, bytes: Dim) {
        self.scratch = bytes + Dim::constant(16);
    }

    fn is_made(&self, value: ValueId) -> bool {
        self.made.get(value.index()).copied().unwrap_or(false)
    }

    pub(super) fn is_constant(&self, value: ValueId) -> bool {
        self.constant.get(value.index()).copied().unwrap_or(false)
    }

    /// An operand of a kernel.
    pub(super) fn operand(&mut self, value: ValueId) -> Operand {
        let view = self.views.get(value.index()).cloned().flatten().unwrap_or_else(|| self.own(value));
        self.need(view.base);
        let ty = self.ty(value);
        Operand { view, dtype: ty.dtype, shape: ty.shape.clone() }
    }

    /// Sees to it that a value with memory of its own is made.
    fn need(&mut self, value: ValueId) {
        if self.is_made(value) {
            return;
        }
        match self.pending.remove(&value) {
            Some(region) => self.compute(&region),
            None => self.leaf(value),
        }
    }

    fn leaf(&mut self, value: ValueId) {
        let stage = if self.is_constant(value) { Stage::Load } else { Stage::Step };
        self.push(value, stage, How::Leaf);
    }

    /// Sees to it that a value has memory of its own, in which it lies row by row.
    fn materialise(&mut self, value: ValueId) {
        if self.is_made(value) {
            return;
        }
        let own = self.own(value);
        let view = self.views.get(value.index()).cloned().flatten().unwrap_or_else(|| own.clone());
        if view.base == value || self.is_constant(value) {
            self.need(value);
        } else {
            let operand = self.operand(value);
            let base = view.base;
            let same = view.is_dense(&operand.shape)
                && self.ty(base).elements() == self.ty(value).elements()
                && !self.rooms.contains_key(&base);
            let how = match same {
                true => How::Alias(base),
                false if operand.dtype.is_packed() || c_type(operand.dtype).is_none() => {
                    // Views of packed values are whole.
                    How::Host
                }
                false => How::Launch(vec![movement::copy(self, &operand, value, &own)]),
            };
            if how == How::Host {
                for &arg in &self.graph.node(value).args {
                    self.materialise(arg);
                }
            }
            self.push(value, Stage::Step, how);
        }
        self.set(value, own);
    }

    /// The literal that a value is, if it is one element.
    pub(super) fn literal(&self, value: ValueId) -> Option<&'a Literal> {
        match &self.graph.node(value).op {
            Op::Literal(literal) if literal.0.shape().iter().product::<usize>() == 1 => Some(literal),
            _ => None,
        }
    }
}

/// True for what is not computed but given.
fn is_stored(op: &Op) -> bool {
    matches!(op, Op::Input { .. } | Op::Weight(_) | Op::Literal(_) | Op::Size(_))
}

/// The room of state and of what is appended to it in place.
fn rooms(entry: &Entry, states: &[Arc<str>]) -> BTreeMap<ValueId, Vec<Dim>> {
    let graph = &entry.graph;
    let mut rooms = BTreeMap::new();
    let mut room = |value: ValueId, pair: usize, axis: usize| {
        let mut shape = graph.ty(value).shape.clone();
        if let Some(extent) = shape.get_mut(axis) {
            *extent = Dim::symbol(&capacity_symbol(pair));
        }
        rooms.insert(value, shape);
    };
    for pair in &graph.states {
        let Some(index) = states.iter().position(|name| *name == pair.input) else { continue };
        let input = graph.inputs().find(|(_, name, _)| **name == pair.input).map(|(value, ..)| value);
        let Some(input) = input else { continue };
        room(input, index, pair.axis);
        let output = graph.outputs.iter().find(|o| o.name == pair.output).map(|o| o.value);
        let Some(output) = output else { continue };
        let node = graph.node(output);
        if node.op == (Op::Append { axis: pair.axis }) && node.args.first() == Some(&input) {
            room(output, index, pair.axis);
        }
    }
    rooms
}
