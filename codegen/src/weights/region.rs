//! Evaluates a region (one span per dimension) of a weight expression, in row-major order, chunk by chunk.
//!
//! A chunk is a smaller region, and regions are pushed down to the initializers: a slice shifts them, a transpose
//! permutes them, a concatenation splits them, a cast converts what comes back. A reshape keeps a region rectangular
//! where groups of dimensions correspond, and otherwise takes it apart into runs of consecutive elements, each of which
//! is a few rectangles of the source. Results are written through strides, so only casts and reshapes need memory of
//! their own, and chunks are made small enough for all of it to stay below [`WORKING_BYTES`].

use super::cast::convert;
use super::packed::as_bytes;
use super::{SourceError, WeightError, WeightSource};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::fmt;
use tpshard_ir::DType;
use tpshard_ir::weight::{WeightExpr, WeightKind};

use super::strided::{Dim, copy, dense_strides, odometer};

/// Most memory that evaluating one chunk takes, apart from the source's own.
pub const WORKING_BYTES: usize = 8 << 20;
/// Most of the source brought into memory before it is released, and most that one copy brings in.
pub const RELEASE_BYTES: u64 = 64 << 20;
/// A page fault on a mapped file brings in about this much around it.
const FAULT_BYTES: u64 = 64 << 10;

/// Consecutive indices of one dimension.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Span {
    pub start: usize,
    pub length: usize,
}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.start.saturating_add(self.length))
    }
}

/// The region that is all of `shape`.
pub fn whole(shape: &[usize]) -> Vec<Span> {
    shape.iter().map(|&length| Span { start: 0, length }).collect()
}

/// Refuses spans that are not within `shape`, one per dimension.
pub(crate) fn check(region: &[Span], shape: &[usize]) -> Result<(), WeightError> {
    let inside =
        |(span, &dim): (&Span, &usize)| span.start.checked_add(span.length).is_some_and(|end| end <= dim);
    if region.len() == shape.len() && region.iter().zip(shape).all(inside) {
        return Ok(());
    }
    Err(WeightError::Region { region: region.to_vec(), shape: shape.to_vec() })
}

fn lengths(region: &[Span]) -> Vec<usize> {
    region.iter().map(|span| span.length).collect()
}

fn count(region: &[Span]) -> usize {
    region.iter().map(|span| span.length).product()
}

/// Bytes of one element; packed types have become bytes before they are evaluated.
fn width(dtype: DType) -> usize {
    dtype.bits().div_ceil(8)
}

/// The initializers in use. What has been brought into memory of them is released before it exceeds [`RELEASE_BYTES`].
pub struct Loader<'a> {
    source: &'a dyn WeightSource,
    held: BTreeMap<String, Bytes>,
    /// An upper estimate of the source's bytes brought into memory since the last release.
    touched: u64,
}

impl<'a> Loader<'a> {
    /// A loader that holds nothing yet.
    pub fn new(source: &'a dyn WeightSource) -> Loader<'a> {
        Loader { source, held: BTreeMap::new(), touched: 0 }
    }

    /// Gives back everything held.
    pub fn release(&mut self) {
        for (name, bytes) in std::mem::take(&mut self.held) {
            drop(bytes);
            self.source.release(&name);
        }
        self.touched = 0;
    }

    /// The bytes of an initializer, of which `touches` bytes will be brought into memory.
    fn load(
        &mut self,
        name: &str,
        dtype: DType,
        shape: &[usize],
        touches: u64,
    ) -> Result<&[u8], WeightError> {
        if self.touched.saturating_add(touches) > RELEASE_BYTES {
            self.release();
        }
        self.touched += touches;
        if !self.held.contains_key(name) {
            let source_error = |error| WeightError::Source { initializer: name.into(), error };
            let bytes = self.source.bytes(name).map_err(source_error)?;
            self.held.insert(name.into(), bytes);
        }
        let Some(bytes) = self.held.get(name) else {
            let error = SourceError::from("was not kept");
            return Err(WeightError::Source { initializer: name.into(), error });
        };
        // Checked at every use: two expressions may claim different shapes for one initializer.
        let needed = tpshard_ir::tensor::element_count(shape).and_then(|count| dtype.byte_len(count as u64));
        if needed != Some(bytes.len() as u64) {
            return Err(WeightError::Length {
                initializer: name.into(),
                dtype,
                shape: shape.to_vec(),
                needed: needed.unwrap_or(u64::MAX),
                found: bytes.len() as u64,
            });
        }
        Ok(bytes)
    }
}

/// A region on its way through memory.
#[derive(Debug)]
pub struct RegionReader {
    weight: WeightExpr,
    region: Vec<Span>,
    /// Elements of the whole region, those returned so far, and the most per chunk.
    total: usize,
    done: usize,
    chunk: usize,
}

impl RegionReader {
    /// Starts at the first element of `region` of `weight`.
    ///
    /// # Errors
    /// It is not a region of the weight, or one of a packed type that does not fall on whole bytes.
    pub fn new(weight: &WeightExpr, region: &[Span]) -> Result<RegionReader, WeightError> {
        check(region, weight.shape())?;
        let (weight, region) = as_bytes(weight, region)?;
        let per_element = width(weight.dtype()).saturating_add(working_bytes(&weight));
        let chunk = (WORKING_BYTES / per_element).max(1);
        let total = count(&region);
        Ok(RegionReader { weight, region, total, done: 0, chunk })
    }

    /// Bytes of the whole region.
    pub fn byte_len(&self) -> usize {
        self.total * width(self.weight.dtype())
    }

    /// Bytes returned so far.
    pub fn bytes_done(&self) -> usize {
        self.done * width(self.weight.dtype())
    }

    /// Fills `buffer` with the next bytes; false, and nothing in it, when there are none left.
    ///
    /// # Errors
    /// An initializer cannot be read or has another length than its shape asks for.
    pub fn next_chunk(&mut self, loader: &mut Loader<'_>, buffer: &mut Vec<u8>) -> Result<bool, WeightError> {
        buffer.clear();
        if self.done >= self.total {
            return Ok(false);
        }
        let region = self.block();
        let elements = count(&region);
        buffer.resize(elements * width(self.weight.dtype()), 0);
        let strides = dense_strides(&lengths(&region));
        evaluate(&self.weight, &region, Target { bytes: buffer, at: 0, strides: &strides }, loader)?;
        self.done += elements;
        Ok(true)
    }

    /// The next block: single indices of the leading dimensions, some of the next, all of the rest.
    fn block(&self) -> Vec<Span> {
        let mut block = self.region.clone();
        let mut inner = self.total;
        let mut rest = self.done;
        for span in &mut block {
            let dim = span.length;
            inner /= dim;
            let index = rest / inner;
            rest %= inner;
            if inner <= self.chunk {
                // All that follows fits and starts at its beginning: blocks never end within an index here.
                let length = (self.chunk / inner).min(dim - index);
                *span = Span { start: span.start + index, length };
                break;
            }
            *span = Span { start: span.start + index, length: 1 };
        }
        block
    }
}

/// Bytes of intermediate results per element of a result.
fn working_bytes(expr: &WeightExpr) -> usize {
    let sources = expr.kind().sources().iter().map(working_bytes).max().unwrap_or(0);
    sources
        + match expr.kind() {
            WeightKind::Cast { source } => width(source.dtype()) + width(expr.dtype()),
            WeightKind::Reshape { .. } => width(expr.dtype()),
            WeightKind::Initializer { .. }
            | WeightKind::Slice { .. }
            | WeightKind::Concat { .. }
            | WeightKind::Transpose { .. } => 0,
        }
}

/// Where a result goes: element `i` of dimension `d` lies `i * strides[d]` elements from `at`.
struct Target<'a> {
    bytes: &'a mut [u8],
    at: usize,
    strides: &'a [usize],
}

impl Target<'_> {
    /// Copies `values`, a dense row-major region of these lengths, to its place.
    fn store(self, values: &[u8], lengths: &[usize], width: usize) {
        let from = dense_strides(lengths);
        let dims = dims(lengths, &from, self.strides);
        copy(width, &dims, (values, 0), (self.bytes, self.at));
    }
}

fn dims(lengths: &[usize], from: &[usize], to: &[usize]) -> Vec<Dim> {
    lengths.iter().zip(from).zip(to).map(|((&length, &from), &to)| Dim { length, from, to }).collect()
}

/// Writes `region` of `expr` to `out`. `region` is within the shape of `expr`, `out` has room for it.
fn evaluate(
    expr: &WeightExpr,
    region: &[Span],
    out: Target<'_>,
    loader: &mut Loader<'_>,
) -> Result<(), WeightError> {
    if count(region) == 0 {
        return Ok(());
    }
    match expr.kind() {
        WeightKind::Initializer { name } => initializer(expr, name, region, out, loader),
        WeightKind::Slice { source, axis, start, .. } => {
            let shift = |(index, &span): (usize, &Span)| match index == *axis {
                true => Span { start: span.start + start, ..span },
                false => span,
            };
            evaluate(source, &region.iter().enumerate().map(shift).collect::<Vec<_>>(), out, loader)
        }
        WeightKind::Transpose { source, perm } => {
            let (mut permuted, mut strides) = (region.to_vec(), out.strides.to_vec());
            for (&axis, (&span, &stride)) in perm.iter().zip(region.iter().zip(out.strides)) {
                permuted[axis] = span;
                strides[axis] = stride;
            }
            evaluate(source, &permuted, Target { strides: &strides, ..out }, loader)
        }
        WeightKind::Concat { sources, axis } => concat(sources, *axis, region, out, loader),
        WeightKind::Reshape { source } => reshape(expr, source, region, out, loader),
        WeightKind::Cast { source } => {
            let mut from = vec![0; count(region) * width(source.dtype())];
            let strides = dense_strides(&lengths(region));
            evaluate(source, region, Target { bytes: &mut from, at: 0, strides: &strides }, loader)?;
            let mut to = vec![0; count(region) * width(expr.dtype())];
            if !convert(source.dtype(), &from, expr.dtype(), &mut to) {
                // Such expressions cannot be built; asking to build one gives the reason.
                return source.cast(expr.dtype()).map(|_| ()).map_err(WeightError::from);
            }
            out.store(&to, &lengths(region), width(expr.dtype()));
            Ok(())
        }
    }
}

fn initializer(
    expr: &WeightExpr,
    name: &str,
    region: &[Span],
    out: Target<'_>,
    loader: &mut Loader<'_>,
) -> Result<(), WeightError> {
    let strides = dense_strides(expr.shape());
    let width = width(expr.dtype());
    let dims = dims(&lengths(region), &strides, out.strides);
    let touches = touched_bytes(&dims, width);
    let longer = region.iter().position(|span| span.length > 1);
    if let Some(axis) = longer.filter(|_| touches > RELEASE_BYTES) {
        let Span { start, length } = region[axis];
        let mut half = region.to_vec();
        half[axis] = Span { start, length: length / 2 };
        let first = Target { bytes: &mut *out.bytes, ..out };
        initializer(expr, name, &half, first, loader)?;
        half[axis] = Span { start: start + length / 2, length: length - length / 2 };
        let at = out.at + length / 2 * out.strides[axis];
        return initializer(expr, name, &half, Target { at, ..out }, loader);
    }
    let start: usize = region.iter().zip(&strides).map(|(span, stride)| span.start * stride).sum();
    let bytes = loader.load(name, expr.dtype(), expr.shape(), touches)?;
    copy(width, &dims, (bytes, start), (out.bytes, out.at));
    Ok(())
}

/// How much of the source a copy brings into memory: each run of consecutive bytes with its surroundings, but all of
/// them no more than what they span.
fn touched_bytes(dims: &[Dim], width: usize) -> u64 {
    let last: usize = dims.iter().map(|dim| (dim.length - 1) * dim.from).sum();
    let spanned = ((last + 1) * width) as u64 + FAULT_BYTES;
    let run = dims.last().filter(|dim| dim.from == 1).map_or(1, |dim| dim.length);
    let runs = dims.iter().map(|dim| dim.length).product::<usize>() / run;
    spanned.min((runs as u64).saturating_mul((run * width) as u64 + FAULT_BYTES))
}

fn concat(
    sources: &[WeightExpr],
    axis: usize,
    region: &[Span],
    out: Target<'_>,
    loader: &mut Loader<'_>,
) -> Result<(), WeightError> {
    let wanted = region[axis];
    let mut before = 0;
    for source in sources {
        let dim = source.shape()[axis];
        let start = wanted.start.max(before);
        let end = (wanted.start + wanted.length).min(before + dim);
        if start < end {
            let mut part = region.to_vec();
            part[axis] = Span { start: start - before, length: end - start };
            let at = out.at + (start - wanted.start) * out.strides[axis];
            evaluate(source, &part, Target { bytes: out.bytes, at, strides: out.strides }, loader)?;
        }
        before += dim;
    }
    Ok(())
}

fn reshape(
    expr: &WeightExpr,
    source: &WeightExpr,
    region: &[Span],
    out: Target<'_>,
    loader: &mut Loader<'_>,
) -> Result<(), WeightError> {
    let width = width(expr.dtype());
    let mut dense = vec![0; count(region) * width];
    if let Some(mapped) = rectangular(expr.shape(), region, source.shape()) {
        let strides = dense_strides(&lengths(&mapped));
        evaluate(source, &mapped, Target { bytes: &mut dense, at: 0, strides: &strides }, loader)?;
    } else {
        let runs = Runs::of(expr.shape(), region);
        let mut at = 0;
        odometer(&runs.outer, |offset, _| {
            for rectangle in rectangles(source.shape(), runs.first + offset, runs.length) {
                let strides = dense_strides(&lengths(&rectangle));
                evaluate(source, &rectangle, Target { bytes: &mut dense, at, strides: &strides }, loader)?;
                at += count(&rectangle);
            }
            Ok::<(), WeightError>(())
        })?;
    }
    out.store(&dense, &lengths(region), width);
    Ok(())
}

/// The region of `to` that holds the elements of `region` of `from` in the same order, if there is one and it is found
/// by matching groups of dimensions with equal products.
fn rectangular(from: &[usize], region: &[Span], to: &[usize]) -> Option<Vec<Span>> {
    let (mut i, mut j) = (0, 0);
    let mut mapped = Vec::with_capacity(to.len());
    while i < from.len() || j < to.len() {
        // The shortest non-empty groups from here with equal products; neither shape holds a zero.
        let (start_i, start_j) = (i, j);
        let (mut a, mut b) = (1usize, 1usize);
        loop {
            if a <= b && i < from.len() {
                a *= from[i];
                i += 1;
            } else if j < to.len() {
                b *= to[j];
                j += 1;
            } else if i < from.len() {
                a *= from[i];
                i += 1;
            }
            if a == b || (i == from.len() && j == to.len()) {
                break;
            }
        }
        let group = &region[start_i..i];
        let runs = Runs::of(&from[start_i..i], group);
        if runs.outer.iter().any(|dim| dim.length != 1) {
            return None;
        }
        let mut found = rectangles(&to[start_j..j], runs.first, runs.length);
        match (found.pop(), found.is_empty()) {
            (Some(only), true) => mapped.extend(only),
            _ => return None,
        }
    }
    Some(mapped)
}

/// The runs of consecutive elements that a region consists of, all of one length: the first starts at `first` in
/// row-major order, the others at the offsets that `outer` runs through.
struct Runs {
    first: usize,
    length: usize,
    outer: Vec<Dim>,
}

impl Runs {
    fn of(shape: &[usize], region: &[Span]) -> Runs {
        let strides = dense_strides(shape);
        let mut length = 1;
        let mut outer = region.len();
        for (span, &dim) in region.iter().zip(shape).rev() {
            outer -= 1;
            length *= span.length;
            if span.length != dim {
                break;
            }
        }
        let first = region.iter().zip(&strides).map(|(span, stride)| span.start * stride).sum();
        let dim = |(span, &stride): (&Span, &usize)| Dim { length: span.length, from: stride, to: 0 };
        Runs { first, length, outer: region[..outer].iter().zip(&strides).map(dim).collect() }
    }
}

/// The regions of `shape` that together, in order, are the `length` elements from `start` in row-major order. There are
/// at most two per dimension.
fn rectangles(shape: &[usize], mut start: usize, mut length: usize) -> Vec<Vec<Span>> {
    let strides = dense_strides(shape);
    let mut found = Vec::new();
    while length > 0 {
        // The outermost dimension of which whole indices are wanted from here on.
        let fits = |&axis: &usize| start.is_multiple_of(strides[axis]) && length >= strides[axis];
        let Some(axis) = (0..shape.len()).find(fits) else {
            // A shape without dimensions has one element.
            found.push(Vec::new());
            return found;
        };
        let index = |d: usize| start / strides[d] % shape[d];
        let taken = (length / strides[axis]).min(shape[axis] - index(axis));
        let span = |d: usize| match d.cmp(&axis) {
            std::cmp::Ordering::Less => Span { start: index(d), length: 1 },
            std::cmp::Ordering::Equal => Span { start: index(axis), length: taken },
            std::cmp::Ordering::Greater => Span { start: 0, length: shape[d] },
        };
        found.push((0..shape.len()).map(span).collect());
        start += taken * strides[axis];
        length -= taken * strides[axis];
    }
    found
}

#[cfg(test)]
mod tests;
