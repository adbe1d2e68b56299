//! The checker's own table: which parts of the operands give which part of the result.
//!
//! Written as index arithmetic on what one rank actually holds, without factors, granules or deals: for each operation,
//! given the region of the result and the regions of the operands, is the operation restricted to the one computed from
//! the others? A dim that is combined may be held in part; it is then reported, and the result is partial.
//!
//! This repeats knowledge of `tpshard_passes::sharding` on purpose and shares no code with it.

use crate::holding::{Part, Region, combines};
use tpshard_ir::op::{EinsumSpec, PadMode, PoolKind};
use tpshard_ir::{Dim, Monoid, Op, Scalar, Type};

/// A dim of an operand that is combined and held in part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reduced {
    pub(crate) operand: usize,
    pub(crate) dim: usize,
    pub(crate) monoid: Monoid,
}

type Verdict = Result<Vec<Reduced>, String>;

/// One rank's view of an operation.
pub(crate) struct View<'a> {
    pub(crate) args: &'a [&'a Type],
    pub(crate) result: &'a Type,
    /// What the rank holds of each operand.
    pub(crate) held: &'a [Region],
    /// What it is to make of the result.
    pub(crate) made: &'a Region,
}

impl View<'_> {
    fn extent(&self, operand: usize, dim: usize) -> Result<&Dim, String> {
        let shape = self.args.get(operand).map(|ty| &ty.shape);
        shape.and_then(|s| s.get(dim)).ok_or_else(|| format!("operand {operand} has no dim {dim}"))
    }

    fn held(&self, operand: usize, dim: usize) -> Result<&Part, String> {
        let region = self.held.get(operand);
        region.and_then(|r| r.get(dim)).ok_or_else(|| format!("operand {operand} has no dim {dim}"))
    }

    fn made(&self, dim: usize) -> Result<&Part, String> {
        self.made.get(dim).ok_or_else(|| format!("the result has no dim {dim}"))
    }

    /// The operand is needed whole along `dim`.
    fn whole(&self, operand: usize, dim: usize) -> Result<(), String> {
        if self.held(operand, dim)?.is_whole(self.extent(operand, dim)?) {
            return Ok(());
        }
        Err(format!("operand {operand} is needed whole along dim {dim}"))
    }

    fn made_whole(&self, dim: usize) -> Result<(), String> {
        let extent = self.result.shape.get(dim).ok_or_else(|| format!("the result has no dim {dim}"))?;
        if self.made(dim)?.is_whole(extent) {
            return Ok(());
        }
        Err(format!("the result cannot be made in parts along dim {dim}"))
    }

    /// Position `i` of the operand's dim belongs to position `i` of the result's.
    fn follows(&self, operand: usize, dim: usize, result: usize) -> Result<(), String> {
        self.same(self.held(operand, dim)?, self.made(result)?, operand, dim)
    }

    fn same(&self, held: &Part, needed: &Part, operand: usize, dim: usize) -> Result<(), String> {
        if held == needed {
            return Ok(());
        }
        Err(format!(
            "of dim {dim} of operand {operand}, {} from {} is held, {} from {} is needed",
            held.length, held.start, needed.length, needed.start
        ))
    }

    /// All operands follow the result along every dim but `axes`, along which everything is whole.
    fn along_all_but(&self, axes: &[usize]) -> Verdict {
        for dim in 0..self.result.rank() {
            for operand in 0..self.args.len() {
                if axes.contains(&dim) {
                    self.whole(operand, dim)?;
                } else {
                    self.follows(operand, dim, dim)?;
                }
            }
            if axes.contains(&dim) {
                self.made_whole(dim)?;
            }
        }
        Ok(vec![])
    }

    /// NumPy: `operand` follows the result where it is not stretched. True per result dim that it follows.
    fn stretched(&self, operand: usize, dims: usize) -> Result<Vec<bool>, String> {
        let rank = self.args.get(operand).map_or(0, |ty| ty.rank());
        let missing = dims.checked_sub(rank).ok_or_else(|| format!("operand {operand} has too many dims"))?;
        let mut follows = vec![false; dims];
        for dim in 0..rank {
            if self.extent(operand, dim)?.is_one() {
                self.whole(operand, dim)?;
            } else {
                self.follows(operand, dim, dim + missing)?;
                follows[dim + missing] = true;
            }
        }
        Ok(follows)
    }
}

/// Checks that `op`, restricted to what is made, needs exactly what is held, and says what it combines in part.
pub(crate) fn restricts(op: &Op, view: &View<'_>) -> Verdict {
    let rank = view.result.rank();
    match op {
        Op::Input { .. } | Op::Weight(_) | Op::Size(_) | Op::Iota { .. } => Ok(vec![]),
        Op::Literal(literal) if literal.0.dtype().is_packed() => {
            (0..rank).try_for_each(|dim| view.made_whole(dim)).map(|()| vec![])
        }
        Op::Literal(_) => Ok(vec![]),
        Op::Map(_) => {
            let mut driven = vec![false; rank];
            for operand in 0..view.args.len() {
                for (all, own) in driven.iter_mut().zip(view.stretched(operand, rank)?) {
                    *all |= own;
                }
            }
            // Where every operand is stretched, each rank makes the one entry there is.
            (0..rank).filter(|&dim| !driven[dim]).try_for_each(|dim| view.made_whole(dim))?;
            Ok(vec![])
        }
        Op::Broadcast { .. } => view.stretched(0, rank).map(|_| vec![]),
        Op::Einsum(spec) => einsum(spec, view),
        Op::Reduce { monoid, axes } => reduce(*monoid, axes, view),
        Op::Scan { axis, .. } | Op::TopK { axis, .. } | Op::Softmax { axis } | Op::Slice { axis, .. } => {
            view.along_all_but(&[*axis])
        }
        Op::Concat { axis } | Op::Append { axis } => view.along_all_but(&[*axis]),
        Op::Pad { low, high, .. } => {
            let grows = |i: &usize| !low[*i].is_zero() || !high[*i].is_zero();
            view.along_all_but(&(0..low.len().min(high.len())).filter(grows).collect::<Vec<_>>())
        }
        Op::Pool { .. } => view.along_all_but(&(2..rank).collect::<Vec<_>>()),
        Op::Conv { groups, .. } => conv(*groups, view),
        Op::Reshape { .. } => reshape(view),
        Op::Transpose { perm } => {
            perm.iter().enumerate().try_for_each(|(to, &from)| view.follows(0, from, to)).map(|()| vec![])
        }
        Op::Gather { axis, window } => gather(*axis, window.is_some(), view),
        Op::GatherElements { axis } => {
            for dim in 0..rank {
                if dim == *axis {
                    view.whole(0, dim)?;
                    view.follows(1, dim, dim)?;
                } else if view.extent(0, dim)? == view.extent(1, dim)? {
                    view.follows(0, dim, dim)?;
                    view.follows(1, dim, dim)?;
                } else {
                    view.whole(0, dim)?;
                    view.whole(1, dim)?;
                    view.made_whole(dim)?;
                }
            }
            Ok(vec![])
        }
        Op::GatherNd { batch_dims } => gather_nd(*batch_dims, view),
        Op::ScatterElements { axis, .. } => {
            for dim in 0..rank {
                let apart = dim == *axis || view.extent(0, dim)? != view.extent(1, dim)?;
                for operand in 0..3 {
                    if apart {
                        view.whole(operand, dim)?;
                    } else {
                        view.follows(operand, dim, dim)?;
                    }
                }
                if apart {
                    view.made_whole(dim)?;
                }
            }
            Ok(vec![])
        }
        Op::ScatterNd { .. } => scatter_nd(view),
        Op::Dequant { axis, block } => dequant(*axis, *block, view),
        Op::Norm { axis, .. } => {
            for dim in 0..rank {
                view.follows(0, dim, dim)?;
                if dim >= *axis {
                    view.whole(0, dim)?;
                    (1..view.args.len()).try_for_each(|operand| view.whole(operand, dim - axis))?;
                }
            }
            Ok(vec![])
        }
        Op::Attention { kv_of_head, .. } => attention(kv_of_head, view),
        Op::Rotary { .. } => {
            for dim in 0..rank {
                view.follows(0, dim, dim)?;
            }
            let pairs = rank.checked_sub(1).ok_or("a scalar has no pairs")?;
            view.whole(0, pairs)?;
            for operand in 1..view.args.len() {
                let own = view.args[operand].rank();
                for dim in 0..own {
                    let at = dim + rank - own.min(rank);
                    if at == pairs || view.extent(operand, dim)?.is_one() {
                        view.whole(operand, dim)?;
                    } else {
                        view.follows(operand, dim, at)?;
                    }
                }
            }
            Ok(vec![])
        }
        // An unknown function of whole operands.
        Op::Deferred { .. } => {
            for operand in 0..view.args.len() {
                (0..view.args[operand].rank()).try_for_each(|dim| view.whole(operand, dim))?;
            }
            (0..rank).try_for_each(|dim| view.made_whole(dim)).map(|()| vec![])
        }
        Op::Convert(_) => Err("a logical value is not made by a conversion".into()),
    }
}

fn einsum(spec: &EinsumSpec, view: &View<'_>) -> Verdict {
    let mut reduced = Vec::new();
    let mut inner: Vec<(u8, Part)> = Vec::new();
    for (operand, letters) in spec.inputs.iter().enumerate() {
        for (dim, letter) in letters.iter().enumerate() {
            if let Some(to) = spec.output.iter().position(|l| l == letter) {
                view.follows(operand, dim, to)?;
                continue;
            }
            let held = view.held(operand, dim)?;
            match inner.iter().find(|(l, _)| l == letter) {
                Some((_, other)) => view.same(held, other, operand, dim)?,
                None => inner.push((*letter, held.clone())),
            }
            if !held.is_whole(view.extent(operand, dim)?) {
                reduced.push(Reduced { operand, dim, monoid: Monoid::Sum });
            }
        }
    }
    Ok(reduced)
}

fn reduce(monoid: Monoid, axes: &[usize], view: &View<'_>) -> Verdict {
    let mut reduced = Vec::new();
    for dim in 0..view.result.rank() {
        if !axes.contains(&dim) {
            view.follows(0, dim, dim)?;
            continue;
        }
        view.made_whole(dim)?;
        if !view.held(0, dim)?.is_whole(view.extent(0, dim)?) {
            reduced.push(Reduced { operand: 0, dim, monoid });
        }
    }
    Ok(reduced)
}

fn conv(groups: usize, view: &View<'_>) -> Verdict {
    view.follows(0, 0, 0)?;
    for dim in 2..view.result.rank() {
        view.whole(0, dim)?;
        view.whole(1, dim)?;
        view.made_whole(dim)?;
    }
    view.follows(1, 0, 1)?;
    if groups == 1 {
        let (x, w) = (view.held(0, 1)?, view.held(1, 1)?);
        view.same(w, x, 1, 1)?;
        let cut = |operand| Ok::<bool, String>(!view.held(operand, 1)?.is_whole(view.extent(operand, 1)?));
        let mut reduced = Vec::new();
        for operand in 0..2 {
            if cut(operand)? {
                reduced.push(Reduced { operand, dim: 1, monoid: Monoid::Sum });
            }
        }
        return Ok(reduced);
    }
    view.whole(1, 1)?;
    let per_group =
        view.extent(1, 0)?.exact_div(&Dim::from(groups)).ok_or("channels do not fall into groups")?;
    let made = view.made(1)?;
    let whole = match (made.start.exact_div(&per_group), made.length.exact_div(&per_group)) {
        (Some(start), Some(length)) => Some(Part { start, length }),
        _ => group_of(made, &per_group),
    };
    let needed = whole.ok_or("a group of channels is cut")?.times(view.extent(1, 1)?);
    view.same(view.held(0, 1)?, &needed, 0, 1)?;
    Ok(vec![])
}

/// The one group that all of a part belongs to: its channels need all that the group reads, and nothing else.
fn group_of(made: &Part, per_group: &Dim) -> Option<Part> {
    let ((start, length), size) = (made.constant()?, per_group.as_size()?);
    let (first, last) = (start.checked_div(size)?, (start + length.checked_sub(1)?).checked_div(size)?);
    (first == last).then(|| Part { start: Dim::from(first), length: Dim::constant(1) })
}

/// Dim `i` of a shape selects flat positions by `(position / stride) mod extent`. Two dims select alike if as much lies
/// before them and their runs times their strides agree.
fn reshape(view: &View<'_>) -> Verdict {
    let x = view.args.first().ok_or("reshape without operand")?;
    let held = view.held.first().ok_or("reshape without operand")?;
    let mut left: Vec<(Dim, Part)> = cuts(&view.result.shape, view.made);
    for (before, run) in cuts(&x.shape, held) {
        let Some(at) = left.iter().position(|(b, r)| *b == before && *r == run) else {
            return Err(format!(
                "the operand is cut to {} from {} in row-major order, the result is not",
                run.length, run.start
            ));
        };
        left.swap_remove(at);
    }
    match left.first() {
        None => Ok(vec![]),
        Some((_, run)) => Err(format!(
            "the result is cut to {} from {} in row-major order, the operand is not",
            run.length, run.start
        )),
    }
}

/// For every cut: how many positions lie before it, and its run in flat positions. Where a dim is cut to a single entry,
/// a cut of the next dim is a cut within that entry, and the two are one.
fn cuts(shape: &[Dim], region: &Region) -> Vec<(Dim, Part)> {
    let mut all = Vec::new();
    let mut single: Option<(Dim, Part)> = None;
    for dim in 0..shape.len().min(region.len()) {
        let run = region[dim].times(&Dim::product(&shape[dim + 1..]));
        let cut = match single.take() {
            Some((before, entry)) => (before, Part { start: entry.start + &run.start, length: run.length }),
            None if region[dim].is_whole(&shape[dim]) => continue,
            None => (Dim::product(&shape[..dim]), run),
        };
        if region[dim].length.is_one() {
            single = Some(cut);
        } else {
            all.push(cut);
        }
    }
    all.extend(single);
    all
}

fn gather(axis: usize, windowed: bool, view: &View<'_>) -> Verdict {
    let [x, indices] = view.args else { return Err("gather takes two operands".into()) };
    for dim in 0..indices.rank() {
        view.follows(1, dim, axis + dim)?;
    }
    for dim in (0..x.rank()).filter(|&dim| dim != axis) {
        let to = if dim < axis { dim } else { dim + indices.rank() - 1 };
        view.follows(0, dim, to)?;
    }
    if view.held(0, axis)?.is_whole(view.extent(0, axis)?) {
        return Ok(vec![]);
    }
    if windowed {
        return Err("the table is windowed already".into());
    }
    Ok(vec![Reduced { operand: 0, dim: axis, monoid: Monoid::Sum }])
}

fn gather_nd(batch_dims: usize, view: &View<'_>) -> Verdict {
    let [x, indices] = view.args else { return Err("gather takes two operands".into()) };
    let lead = indices.rank().checked_sub(1).ok_or("indices have rank 0")?;
    let depth = indices.shape[lead].as_size().ok_or("the index depth is symbolic")?;
    view.whole(1, lead)?;
    for dim in 0..lead {
        view.follows(1, dim, dim)?;
    }
    for dim in 0..x.rank() {
        if dim < batch_dims {
            view.follows(0, dim, dim)?;
        } else if dim < batch_dims + depth {
            view.whole(0, dim)?;
        } else {
            view.follows(0, dim, lead + dim - batch_dims - depth)?;
        }
    }
    Ok(vec![])
}

fn scatter_nd(view: &View<'_>) -> Verdict {
    let [x, indices, _] = view.args else { return Err("scatter takes three operands".into()) };
    let lead = indices.rank().checked_sub(1).ok_or("indices have rank 0")?;
    let depth = indices.shape[lead].as_size().ok_or("the index depth is symbolic")?;
    for dim in 0..indices.rank() {
        view.whole(1, dim)?;
    }
    for dim in 0..lead {
        view.whole(2, dim)?;
    }
    for dim in 0..x.rank() {
        view.follows(0, dim, dim)?;
        if dim < depth {
            view.whole(0, dim)?;
        } else {
            view.follows(2, lead + dim - depth, dim)?;
        }
    }
    Ok(vec![])
}

fn dequant(axis: usize, block: usize, view: &View<'_>) -> Verdict {
    for dim in 0..view.result.rank() {
        view.follows(0, dim, dim)?;
        let uncut = view.held(0, dim)?.is_whole(view.extent(0, dim)?);
        for operand in 1..view.args.len() {
            if dim != axis {
                view.follows(operand, dim, dim)?;
            } else if uncut || view.extent(operand, dim)?.is_one() {
                view.whole(operand, dim)?;
            } else {
                let covered = view.held(operand, dim)?.times(&Dim::from(block));
                view.same(&covered, view.held(0, dim)?, operand, dim)?;
            }
        }
    }
    Ok(vec![])
}

fn attention(kv_of_head: &[u32], view: &View<'_>) -> Verdict {
    for operand in 0..3 {
        view.follows(operand, 0, 0)?;
    }
    view.follows(0, 1, 1)?;
    view.follows(0, 2, 2)?;
    view.follows(2, 3, 3)?;
    for (operand, dim) in [(0, 3), (1, 3), (1, 2), (2, 2)] {
        view.whole(operand, dim)?;
    }
    view.same(view.held(2, 1)?, view.held(1, 1)?, 2, 1)?;
    let heads = view.made(1)?.constant().ok_or("the number of heads is symbolic")?;
    let keys = view.held(1, 1)?.constant().ok_or("the number of KV heads is symbolic")?;
    let own = kv_of_head.get(heads.0..heads.0.saturating_add(heads.1)).ok_or("there are fewer heads")?;
    if let Some(&absent) = own.iter().find(|&&h| !(keys.0..keys.0 + keys.1).contains(&(h as usize))) {
        return Err(format!("KV head {absent} is needed and not held"));
    }
    let Some(bias) = view.args.get(3) else { return Ok(vec![]) };
    let missing = 4usize.checked_sub(bias.rank()).ok_or("the bias has too many dims")?;
    for dim in 0..bias.rank() {
        if view.extent(3, dim)?.is_one() || dim + missing == 3 {
            view.whole(3, dim)?;
        } else {
            view.follows(3, dim, dim + missing)?;
        }
    }
    Ok(vec![])
}

/// True if combining the members' parts with `monoid`, the other operands being the same everywhere, combines the
/// result, whatever the parts are.
pub(crate) fn distributes(op: &Op, monoid: Monoid, members: &[bool], args: &[&Type], result: &Type) -> bool {
    let numbers = |ty: &Type| combines(ty.dtype);
    if !numbers(result) || args.iter().zip(members).any(|(ty, &member)| member && !numbers(ty)) {
        return false;
    }
    let only = |operand: usize| members.iter().enumerate().all(|(i, &m)| m == (i == operand));
    let pair = |a: usize, b: usize| members.iter().enumerate().all(|(i, &m)| m == (i == a || i == b));
    let every = || members.iter().all(|&m| m);
    let sum = monoid == Monoid::Sum;
    let idempotent = matches!(monoid, Monoid::Max | Monoid::Min);
    match op {
        // Each entry of the result is an entry of the operand.
        Op::Broadcast { .. } | Op::Reshape { .. } | Op::Transpose { .. } | Op::Slice { .. } => only(0),
        Op::Gather { window: None, .. } | Op::GatherElements { .. } | Op::GatherNd { .. } => only(0),
        Op::Gather { window: Some(_), .. } => only(0) && sum,
        Op::Concat { .. } | Op::Append { .. } => every(),
        Op::Pad { mode, .. } => match mode {
            PadMode::Reflect | PadMode::Edge | PadMode::Wrap => only(0),
            PadMode::Constant(fill) => only(0) && (idempotent || (sum && fill.0 == 0.0)),
        },
        Op::ScatterElements { monoid: combined, .. } | Op::ScatterNd { monoid: combined } => {
            pair(0, 2) && combined.is_none_or(|m| m == monoid)
        }
        // The same monoid, in another order.
        Op::Reduce { monoid: own, .. } | Op::Scan { monoid: own, .. } => only(0) && *own == monoid,
        Op::Pool { kind: PoolKind::Max, .. } => only(0) && monoid == Monoid::Max,
        // Linear in one operand.
        Op::Pool { kind: PoolKind::Average { .. }, .. } | Op::Rotary { .. } => only(0) && sum,
        Op::Einsum(_) | Op::Conv { .. } => (only(0) || only(1)) && sum,
        Op::Dequant { .. } => only(1) && sum,
        Op::Attention { .. } => only(2) && sum,
        Op::Map(scalar) => match scalar {
            Scalar::Neg => only(0) && sum,
            Scalar::Add | Scalar::Sub => every() && sum,
            Scalar::Mul => ((only(0) || only(1)) && sum) || (every() && monoid == Monoid::Prod),
            Scalar::Div => {
                result.dtype.is_float() && ((only(0) && sum) || (every() && monoid == Monoid::Prod))
            }
            Scalar::Max => monoid == Monoid::Max && members.contains(&true),
            Scalar::Min => monoid == Monoid::Min && members.contains(&true),
            Scalar::Select => pair(1, 2),
            Scalar::Cast(to) => only(0) && args.first().is_some_and(|from| keeps_values(from, *to)),
            _ => false,
        },
        Op::Pool { kind: PoolKind::Lp { .. }, .. }
        | Op::Input { .. }
        | Op::Weight(_)
        | Op::Literal(_)
        | Op::Size(_)
        | Op::Iota { .. }
        | Op::TopK { .. }
        | Op::Softmax { .. }
        | Op::Norm { .. }
        | Op::Deferred { .. }
        | Op::Convert(_) => false,
    }
}

/// True if every value of `from` is one of `to`: more bits of the same or a wider kind of float.
fn keeps_values(from: &Type, to: tpshard_ir::DType) -> bool {
    from.dtype == to || (from.dtype.is_float() && to.is_float() && to.bits() >= 2 * from.dtype.bits())
}
