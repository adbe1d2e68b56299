//! Conversions between layouts on device memory, as [`crate::cpu::convert`] makes them of values on the host: the same
//! pieces to the same places, counted alike.
//!
//! NCCL knows whole pieces of memory, of equal size on all ranks. Runs along an inner dim are laid end to end by copies on
//! the device, before or after; pieces of different sizes are sent from rank to rank, and where they are combined, padded
//! to the largest.

use super::staging::{Blocks, dealing, gathering, scattering};
use super::{Links, Members, Trouble, Way};
use crate::comm::{CommError, Communicator, Group, Kind, Monoid, Record, Tag};
use crate::cpu::convert::{Place, carried, extents, held};
use tpshard_driver::cuda::{Lane, Memory, Rows};
use tpshard_driver::nccl::{Element, Operation, Span};
use tpshard_ir::program::Family;
use tpshard_ir::{Conversion, DType};

/// A value that lies densely in device memory.
#[derive(Clone, Copy)]
pub(in crate::cuda) struct Operand<'a> {
    memory: &'a Memory,
    offset: u64,
    dtype: DType,
    shape: &'a [usize],
}

impl<'a> Operand<'a> {
    /// The value from byte `offset` on.
    pub(in crate::cuda) fn new(
        memory: &'a Memory,
        offset: u64,
        dtype: DType,
        shape: &'a [usize],
    ) -> Operand<'a> {
        Operand { memory, offset, dtype, shape }
    }

    fn bytes(&self) -> Result<u64, String> {
        let elements = self.shape.iter().try_fold(1u64, |n, &extent| n.checked_mul(extent as u64));
        let bytes = elements.and_then(|n| self.dtype.byte_len(n));
        bytes.ok_or_else(|| format!("{}{:?} is larger than memory", self.dtype, self.shape))
    }

    fn span(&self) -> Result<Span<'_>, String> {
        Ok(Span { memory: self.memory, offset: self.offset, bytes: self.bytes()? })
    }
}

/// How NCCL combines what the ranks' communicator combines, if it comes to the same. It does not for the largest of floats,
/// of which NCCL loses those that are no numbers. Sums of 16 bits round at every addition.
fn combination(dtype: DType, monoid: Monoid) -> Option<(Element, Operation)> {
    let element = match dtype {
        DType::F32 => Element::F32,
        DType::F64 => Element::F64,
        DType::F16 => Element::F16,
        DType::BF16 => Element::BF16,
        DType::I8 => Element::I8,
        DType::I32 => Element::I32,
        DType::I64 => Element::I64,
        DType::U8 | DType::Bool => Element::U8,
        DType::U32 => Element::U32,
        DType::U64 => Element::U64,
        _ => return None,
    };
    let operation = match (monoid, dtype) {
        // Of zeros and ones, *or* is the largest and *and* the smallest.
        (Monoid::Sum | Monoid::Max, DType::Bool) => Operation::Max,
        (Monoid::Prod | Monoid::Min, DType::Bool) => Operation::Min,
        (Monoid::Sum, _) => Operation::Sum,
        (Monoid::Prod, _) => Operation::Prod,
        (Monoid::Max | Monoid::Min, _) if dtype.is_float() => return None,
        (Monoid::Max, _) => Operation::Max,
        (Monoid::Min, _) => Operation::Min,
    };
    Some((element, operation))
}

/// Whether a conversion of values of this type is made between devices: known to all ranks, of which all do the same.
pub(in crate::cuda) fn carries(conversion: &Conversion, dtype: DType) -> bool {
    match conversion {
        Conversion::AllReduce { monoid, .. } | Conversion::ReduceScatter { monoid, .. } => {
            combination(dtype, carried(*monoid)).is_some()
        }
        Conversion::AllGather { .. } | Conversion::AllToAll { .. } | Conversion::Redeal { .. } => {
            dtype.bits().is_multiple_of(8)
        }
        Conversion::ShardSlice { .. }
        | Conversion::OnlyFirst { .. }
        | Conversion::TreeReduce { .. }
        | Conversion::Transfer => false,
    }
}

/// A tensor seen along one dim: `outer` rows of runs, `inner` bytes for each index of the dim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cut {
    outer: u64,
    inner: u64,
}

impl Cut {
    pub(super) fn of(dtype: DType, shape: &[usize], dim: usize) -> Result<Cut, String> {
        let (before, rest) = shape.split_at_checked(dim).ok_or_else(|| no_dim(dim, shape))?;
        let (_, after) = rest.split_first().ok_or_else(|| no_dim(dim, shape))?;
        let product = |dims: &[usize]| dims.iter().try_fold(1u64, |n, &d| n.checked_mul(d as u64));
        let bytes = dtype.bits() as u64 / 8;
        let inner = product(after).and_then(|n| n.checked_mul(bytes));
        let whole = || format!("{dtype}{shape:?} is larger than memory");
        Ok(Cut { outer: product(before).ok_or_else(whole)?, inner: inner.ok_or_else(whole)? })
    }

    /// Whether rows lie end to end, since there is one.
    pub(super) fn is_dense(&self) -> bool {
        self.outer == 1
    }

    /// Bytes of a run of this extent, all rows together.
    pub(super) fn piece(&self, extent: usize) -> Result<u64, String> {
        let bytes = self.outer.checked_mul(self.inner).and_then(|n| n.checked_mul(extent as u64));
        bytes.ok_or_else(|| format!("a piece of {extent} is larger than memory"))
    }

    /// The rows of a run, from where they lie apart in a tensor of extent `whole` to where they lie end to end.
    fn packing(&self, extent: usize, whole: usize) -> Rows {
        let (bytes, stride) = (self.inner * extent as u64, self.inner * whole as u64);
        Rows { count: self.outer, bytes, to_stride: bytes, from_stride: stride }
    }

    /// And back.
    fn unpacking(&self, extent: usize, whole: usize) -> Rows {
        let Rows { count, bytes, to_stride, from_stride } = self.packing(extent, whole);
        Rows { count, bytes, to_stride: from_stride, from_stride: to_stride }
    }
}

fn no_dim(dim: usize, shape: &[usize]) -> String {
    format!("dim {dim} does not exist in a tensor of shape {shape:?}")
}

/// Where every member's run begins, and the sum of all.
pub(super) fn starts(extents: &[usize]) -> (Vec<usize>, usize) {
    let mut total = 0usize;
    let mut starts = Vec::with_capacity(extents.len());
    for &extent in extents {
        starts.push(total);
        total = total.saturating_add(extent);
    }
    (starts, total)
}

pub(super) fn are_equal(extents: &[usize]) -> bool {
    extents.windows(2).all(|pair| pair[0] == pair[1])
}

/// A conversion to be made, as this rank sees it.
struct Task<'a> {
    group: &'a Group,
    from: Operand<'a>,
    to: Operand<'a>,
    tag: Tag,
    communicator: &'a dyn Communicator,
    way: Way,
    /// Bytes of every piece, if there are several; all together are those of the value.
    pieces: &'a [u64],
}

impl Links {
    /// Makes a conversion that [`carries`] says. `from` and `to` are what this rank holds before and after; in another
    /// queue than the main one, only what [`goes_aside`](super::goes_aside). An all-reduce may be made in `pieces` of so
    /// many bytes, each from when it is [ready](Links::ready) on.
    ///
    /// # Errors
    /// All ranks know of it.
    pub(in crate::cuda) fn convert(
        &self,
        conversion: &Conversion,
        [from, to]: [Operand<'_>; 2],
        families: [&Family; 2],
        place: &Place<'_>,
        (lane, pieces): (Lane, &[u64]),
        (communicator, tag): (&dyn Communicator, Tag),
    ) -> Result<(), CommError> {
        let group = Group::new(place.mesh.group(place.rank, conversion.axes()))?;
        let way = Way { lane, pieces: pieces.len() };
        let task = Task { group: &group, from, to, tag, communicator, way, pieces };
        let prepared = self.prepared(conversion, &task, families, place);
        match prepared {
            Ok(()) => Ok(()),
            Err(Trouble::Failed(error)) => Err(error),
            // Nothing of this collective was put into the queue, and the others wait for it.
            Err(Trouble::Here(what)) => Err(self.give_up(communicator, what)),
        }
    }

    fn prepared(
        &self,
        conversion: &Conversion,
        task: &Task<'_>,
        [from, to]: [&Family; 2],
        place: &Place<'_>,
    ) -> Result<(), Trouble> {
        let parts = |family: &Family, dim: usize| extents(family, place, task.group, dim);
        match conversion {
            Conversion::AllReduce { monoid, .. } => self.all_reduce(task, carried(*monoid)),
            Conversion::AllGather { dim, .. } => self.all_gather(task, *dim, &parts(from, *dim)?),
            Conversion::ReduceScatter { monoid, dim, .. } => {
                self.reduce_scatter(task, carried(*monoid), *dim, &parts(to, *dim)?)
            }
            Conversion::AllToAll { from: gathered, to: split, .. } => {
                let (split_parts, gathered_parts) = (parts(to, *split)?, parts(from, *gathered)?);
                self.all_to_all(task, (*split, &split_parts), (*gathered, &gathered_parts))
            }
            Conversion::Redeal { dim, .. } => {
                let own = |family: &Family, rank: usize| -> Result<(usize, usize), String> {
                    held(family, place, rank)?
                        .get(*dim)
                        .copied()
                        .ok_or_else(|| format!("no dim {dim} to deal"))
                };
                // What the group holds together starts where its first member's share does.
                let first = task.group.ranks().first().copied().unwrap_or(place.rank);
                let (start, length) = own(to, place.rank)?;
                let start = start.checked_sub(own(from, first)?.0);
                let start = start.ok_or_else(|| "a share outside of what the group holds".to_owned())?;
                self.redeal(task, *dim, &parts(from, *dim)?, (start, length))
            }
            Conversion::ShardSlice { .. }
            | Conversion::OnlyFirst { .. }
            | Conversion::TreeReduce { .. }
            | Conversion::Transfer => Err("no conversion between devices".to_owned().into()),
        }
    }

    fn run(
        &self,
        task: &Task<'_>,
        kind: Kind,
        monoid: Option<Monoid>,
        bytes: u64,
        body: impl FnOnce(&Members<'_>) -> Result<(), Trouble>,
    ) -> Result<(), Trouble> {
        let ranks = task.group.len();
        let bytes = if ranks > 1 { bytes } else { 0 };
        let dtype = Some(task.from.dtype);
        let record = Record { kind, tag: task.tag, monoid, dtype, bytes, ranks, done: false };
        Ok(self.carry(task.communicator, record, task.group, task.way, body)?)
    }

    fn all_reduce(&self, task: &Task<'_>, monoid: Monoid) -> Result<(), Trouble> {
        let (from, to) = (task.from.span()?, task.to.span()?);
        let (element, operation) = combined(task, monoid)?;
        self.run(task, Kind::AllReduce, Some(monoid), from.bytes, |members| {
            if members.is_alone() {
                return Ok(to.memory.copy(to.offset, from.memory, from.offset, fitting(from.bytes, &to)?)?);
            }
            if task.pieces.len() < 2 {
                return members.call(|clique, lane| clique.all_reduce(lane, element, operation, from, to));
            }
            let whole = task.pieces.iter().try_fold(0u64, |sum, &bytes| sum.checked_add(bytes));
            fitting(whole.unwrap_or(u64::MAX), &from)?;
            let mut done = 0;
            for (piece, &bytes) in task.pieces.iter().enumerate() {
                if piece > 0 {
                    members.begin(piece)?;
                }
                let [from, to] = [from, to].map(|span| Span { offset: span.offset + done, bytes, ..span });
                members.call(|clique, lane| clique.all_reduce(lane, element, operation, from, to))?;
                done += bytes;
            }
            Ok(())
        })
    }

    fn all_gather(&self, task: &Task<'_>, dim: usize, extents: &[usize]) -> Result<(), Trouble> {
        let cut = Cut::of(task.to.dtype, task.to.shape, dim)?;
        let (from, to) = (task.from.span()?, task.to.span()?);
        fitting(cut.piece(starts(extents).1)?, &to)?;
        self.run(task, Kind::AllGather, None, to.bytes.saturating_sub(from.bytes), |members| {
            let staged = gathering(&cut, to.bytes, members.is_alone());
            let staging = self.staging(staged)?;
            self.gather(
                members,
                cut,
                extents,
                [from, to],
                Span { memory: &staging, offset: 0, bytes: staged },
            )
        })
    }

    /// All members' runs, in `to`; `staging` is as large if rows lie apart.
    fn gather(
        &self,
        members: &Members<'_>,
        cut: Cut,
        extents: &[usize],
        [from, to]: [Span<'_>; 2],
        staging: Span<'_>,
    ) -> Result<(), Trouble> {
        let (starts, total) = starts(extents);
        let own = members.own(extents)?;
        fitting(cut.piece(own)?, &from)?;
        if members.is_alone() {
            return Ok(to.memory.copy(to.offset, from.memory, from.offset, from.bytes)?);
        }
        // Where rows lie end to end, every piece has its place in the result already.
        let dense = cut.is_dense();
        let gathered = if dense { to } else { staging };
        if are_equal(extents) {
            members.call(|clique, lane| clique.all_gather(lane, extents.len(), from, gathered))?;
        } else {
            let mut receives = Vec::with_capacity(extents.len());
            let mut sends = Vec::with_capacity(extents.len());
            for (member, (&start, &extent)) in starts.iter().zip(extents).enumerate() {
                let offset = gathered.offset + cut.piece(start)?;
                let span = Span { memory: gathered.memory, offset, bytes: cut.piece(extent)? };
                if member == members.me {
                    span.memory.copy(span.offset, from.memory, from.offset, from.bytes)?;
                } else {
                    receives.push((member, span));
                    sends.push((member, from));
                }
            }
            members.call(|clique, _| clique.exchange(&sends, &receives))?;
        }
        if dense {
            return Ok(());
        }
        for (&start, &extent) in starts.iter().zip(extents) {
            let (offset, packed) = (to.offset + cut.inner * start as u64, staging.offset + cut.piece(start)?);
            to.memory.copy_rows(offset, staging.memory, packed, cut.unpacking(extent, total))?;
        }
        Ok(())
    }

    fn reduce_scatter(
        &self,
        task: &Task<'_>,
        monoid: Monoid,
        dim: usize,
        extents: &[usize],
    ) -> Result<(), Trouble> {
        let cut = Cut::of(task.from.dtype, task.from.shape, dim)?;
        let (from, to) = (task.from.span()?, task.to.span()?);
        let (element, operation) = combined(task, monoid)?;
        let (starts, total) = starts(extents);
        fitting(cut.piece(total)?, &from)?;
        let bytes = from.bytes.saturating_sub(to.bytes);
        self.run(task, Kind::ReduceScatter, Some(monoid), bytes, |members| {
            fitting(cut.piece(members.own(extents)?)?, &to)?;
            if members.is_alone() {
                return Ok(to.memory.copy(to.offset, from.memory, from.offset, from.bytes)?);
            }
            let even = are_equal(extents);
            let ranks = extents.len();
            let Some(layout) = scattering(&cut, extents)? else {
                return members
                    .call(|clique, lane| clique.reduce_scatter(lane, ranks, element, operation, from, to));
            };
            // Behind the blocks, what comes back, of which a smaller share is the beginning.
            let staging = self.staging(layout.bytes())?;
            let Blocks { block, sent: blocks } = layout;
            if !even {
                staging.clear(0, blocks)?;
            }
            for (member, (&start, &extent)) in starts.iter().zip(extents).enumerate() {
                let source = from.offset + cut.inner * start as u64;
                let rows = cut.packing(extent, total);
                staging.copy_rows(block * member as u64, from.memory, source, rows)?;
            }
            let packed = Span { memory: &staging, offset: 0, bytes: blocks };
            if even {
                return members
                    .call(|clique, lane| clique.reduce_scatter(lane, ranks, element, operation, packed, to));
            }
            let combined = Span { memory: &staging, offset: blocks, bytes: block };
            members.call(|clique, lane| {
                clique.reduce_scatter(lane, ranks, element, operation, packed, combined)
            })?;
            Ok(to.memory.copy(to.offset, &staging, blocks, to.bytes)?)
        })
    }

    fn all_to_all(
        &self,
        task: &Task<'_>,
        (split_dim, split): (usize, &[usize]),
        (gathered_dim, gathered): (usize, &[usize]),
    ) -> Result<(), Trouble> {
        let outgoing = Cut::of(task.from.dtype, task.from.shape, split_dim)?;
        let incoming = Cut::of(task.to.dtype, task.to.shape, gathered_dim)?;
        let (from, to) = (task.from.span()?, task.to.span()?);
        let (split_starts, split_total) = starts(split);
        let (gathered_starts, gathered_total) = starts(gathered);
        fitting(outgoing.piece(split_total)?, &from)?;
        fitting(incoming.piece(gathered_total)?, &to)?;
        let me = task.group.position(self.rank).unwrap_or_default();
        let kept = outgoing.piece(split.get(me).copied().unwrap_or(0))?;
        self.run(task, Kind::AllToAll, None, to.bytes.saturating_sub(kept), |members| {
            members.own(split)?;
            members.own(gathered)?;
            let staging = self.staging(from.bytes.saturating_add(to.bytes))?;
            let (mut sends, mut receives) = (Vec::new(), Vec::new());
            for (member, (&start, &extent)) in split_starts.iter().zip(split).enumerate() {
                let (offset, bytes) = (outgoing.piece(start)?, outgoing.piece(extent)?);
                let source = from.offset + outgoing.inner * start as u64;
                // What stays here goes straight to where the others' pieces arrive.
                let target = match gathered_starts.get(member) {
                    Some(&own) if member == members.me => from.bytes + incoming.piece(own)?,
                    _ => offset,
                };
                let rows = outgoing.packing(extent, split_total);
                staging.copy_rows(target, from.memory, source, rows)?;
                if member != members.me {
                    sends.push((member, Span { memory: &staging, offset, bytes }));
                }
            }
            for (member, (&start, &extent)) in gathered_starts.iter().zip(gathered).enumerate() {
                let (offset, bytes) = (from.bytes + incoming.piece(start)?, incoming.piece(extent)?);
                if member != members.me {
                    receives.push((member, Span { memory: &staging, offset, bytes }));
                }
            }
            if !members.is_alone() {
                members.call(|clique, _| clique.exchange(&sends, &receives))?;
            }
            for (&start, &extent) in gathered_starts.iter().zip(gathered) {
                let source = from.bytes + incoming.piece(start)?;
                let rows = incoming.unpacking(extent, gathered_total);
                to.memory.copy_rows(to.offset + incoming.inner * start as u64, &staging, source, rows)?;
            }
            Ok(())
        })
    }

    /// Gathers what the group holds, of which this rank keeps a run.
    fn redeal(
        &self,
        task: &Task<'_>,
        dim: usize,
        extents: &[usize],
        (start, length): (usize, usize),
    ) -> Result<(), Trouble> {
        let cut = Cut::of(task.from.dtype, task.from.shape, dim)?;
        let (from, to) = (task.from.span()?, task.to.span()?);
        let total = starts(extents).1;
        let whole = cut.piece(total)?;
        fitting(cut.piece(length)?, &to)?;
        if start.checked_add(length).is_none_or(|end| end > total) {
            return Err(format!("a run of {length} from {start} on leaves {total}").into());
        }
        self.run(task, Kind::AllGather, None, whole.saturating_sub(from.bytes), |members| {
            let staged = dealing(&cut, whole);
            let staging = self.staging(staged)?;
            let gathered = Span { memory: &staging, offset: 0, bytes: whole };
            let pieces = Span { memory: &staging, offset: whole, bytes: staged - whole };
            self.gather(members, cut, extents, [from, gathered], pieces)?;
            let rows = cut.packing(length, total);
            Ok(to.memory.copy_rows(to.offset, &staging, cut.inner * start as u64, rows)?)
        })
    }
}

impl Members<'_> {
    fn is_alone(&self) -> bool {
        self.group.len() < 2
    }

    /// This rank's of one number for each member.
    fn own(&self, of_members: &[usize]) -> Result<usize, String> {
        let members = self.group.len();
        let own = of_members.get(self.me).filter(|_| of_members.len() == members).copied();
        own.ok_or_else(|| format!("{} extents for a group of {members}", of_members.len()))
    }
}

fn combined(task: &Task<'_>, monoid: Monoid) -> Result<(Element, Operation), String> {
    let found = combination(task.from.dtype, monoid);
    found.ok_or_else(|| format!("no {} of {} between devices", monoid.name(), task.from.dtype))
}

/// `bytes`, if memory has exactly as many.
fn fitting(bytes: u64, memory: &Span<'_>) -> Result<u64, String> {
    if memory.bytes == bytes {
        return Ok(bytes);
    }
    Err(format!("{bytes} bytes where there are {}", memory.bytes))
}
