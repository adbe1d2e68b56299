//! One pass over the model's weights into all shard files.
//!
//! What ranks want is grouped by initializer and taken in the order of the model file. Within a group all readers move
//! forward together, each by one chunk where it is furthest behind, so that ranks that share pages read them at about
//! the same time. A part that several ranks hold alike is evaluated and hashed once. What has been
//! touched of the source is released now and then, and after each group.

use super::hash::{hex, weights_hash};
use super::region::{Loader, RegionReader};
use super::{ShardLayout, Span, WeightError, WeightSource};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use serde::{Serialize, Serializer};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use tpshard_ir::DType;
use tpshard_ir::weight::WeightExpr;

/// What was written of one tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TensorRecord {
    pub name: String,
    #[serde(serialize_with = "dtype_name")]
    pub dtype: DType,
    pub global_shape: Vec<usize>,
    /// Which part of the global shape it is.
    #[serde(serialize_with = "spans")]
    pub region: Vec<Span>,
    /// Where its bytes start in the file.
    pub offset: u64,
    pub length: u64,
    pub sha256: String,
}

fn dtype_name<S: Serializer>(dtype: &DType, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(dtype.name())
}

fn spans<S: Serializer>(region: &[Span], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(region.iter().map(|span| [span.start, span.length]))
}

/// What was written of all ranks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct WrittenWeights {
    pub weights_hash: String,
    /// In the order of the layouts, each in the order of its file.
    pub ranks: Vec<Vec<TensorRecord>>,
}

/// Writes the shard files laid out by `layouts`, one empty file each, calling `progress` with the number of bytes
/// written since the last call.
///
/// # Errors
/// A source without the bytes that the expressions ask for, or a file that cannot be written. The files are then to be
/// thrown away.
pub fn write_shards(
    layouts: &[ShardLayout],
    files: &[File],
    source: &dyn WeightSource,
    progress: &mut dyn FnMut(u64),
) -> Result<WrittenWeights, WeightError> {
    if layouts.len() != files.len() {
        return Err(WeightError::FileCount { layouts: layouts.len(), files: files.len() });
    }
    for (layout, file) in layouts.iter().zip(files) {
        reserve(file, layout.file_length()).map_err(write_error(layout))?;
    }
    let mut hashes: Vec<Vec<String>> =
        layouts.iter().map(|layout| vec![String::new(); layout.placed().len()]).collect();
    let mut writer = Writer { layouts, files, loader: Loader::new(source), buffer: Vec::new(), progress };
    for parts in groups(layouts, source).into_values() {
        for (destinations, hash) in writer.write_group(parts)? {
            for Destination { file, tensor } in destinations {
                hashes[file][tensor].clone_from(&hash);
            }
        }
    }
    let ranks: Vec<Vec<TensorRecord>> =
        layouts.iter().zip(hashes).map(|(layout, hashes)| records(layout, hashes)).collect();
    let all =
        layouts.iter().zip(&ranks).flat_map(|(layout, tensors)| tensors.iter().map(|t| (layout.rank(), t)));
    let weights_hash = weights_hash(layouts.first().map_or(0, ShardLayout::ranks), all);
    for ((layout, file), records) in layouts.iter().zip(files).zip(&ranks) {
        let header = layout.header(records, &weights_hash)?;
        file.write_all_at(&header, 0).map_err(write_error(layout))?;
    }
    Ok(WrittenWeights { weights_hash, ranks })
}

fn write_error(layout: &ShardLayout) -> impl FnOnce(io::Error) -> WeightError + use<> {
    let rank = layout.rank();
    move |error| WeightError::Write { rank, error }
}

/// Takes the space now, so that a full disk is found before the work and not after it.
fn reserve(file: &File, length: u64) -> io::Result<()> {
    match fallocate(file, FallocateFlags::empty(), 0, length) {
        Ok(()) => Ok(()),
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => file.set_len(length),
        Err(error) => Err(error.into()),
    }
}

/// The tensors of a file with their hashes, both in the order of the file.
pub(super) fn records(layout: &ShardLayout, hashes: impl IntoIterator<Item = String>) -> Vec<TensorRecord> {
    let record = |(placed, sha256): (&super::safetensors::Placed, String)| TensorRecord {
        name: placed.tensor.name.clone(),
        dtype: placed.tensor.dtype(),
        global_shape: placed.tensor.weight.shape().to_vec(),
        region: placed.tensor.region.clone(),
        offset: layout.data_start() + placed.offset,
        length: placed.length,
        sha256,
    };
    layout.placed().iter().zip(hashes).map(record).collect()
}

/// One tensor of one file.
#[derive(Clone, Copy)]
struct Destination {
    file: usize,
    tensor: usize,
}

/// The distinct parts that ranks want, each with where it goes.
type Parts<'a> = BTreeMap<(&'a WeightExpr, &'a [Span]), Vec<Destination>>;

/// Parts by the first of their initializers in the source's order.
fn groups<'a>(layouts: &'a [ShardLayout], source: &dyn WeightSource) -> BTreeMap<(u64, &'a str), Parts<'a>> {
    let mut positions: BTreeMap<&str, u64> = BTreeMap::new();
    let mut groups: BTreeMap<(u64, &str), Parts<'_>> = BTreeMap::new();
    for (file, layout) in layouts.iter().enumerate() {
        for (tensor, placed) in layout.placed().iter().enumerate() {
            let weight = &placed.tensor.weight;
            let first = weight
                .initializers()
                .into_iter()
                .map(|name| (*positions.entry(name).or_insert_with(|| source.position(name)), name))
                .min()
                .unwrap_or((0, ""));
            let part = (weight, placed.tensor.region.as_slice());
            groups.entry(first).or_default().entry(part).or_default().push(Destination { file, tensor });
        }
    }
    groups
}

/// A part on its way into its files.
struct Job<'a> {
    name: &'a str,
    reader: RegionReader,
    hash: Sha256,
    destinations: Vec<Destination>,
}

impl Job<'_> {
    /// How far it is, comparable between jobs; `None` when done.
    fn progress(&self) -> Option<u64> {
        let (done, all) = (self.reader.bytes_done() as u128, self.reader.byte_len() as u128);
        (done < all).then(|| ((done << 32) / all) as u64)
    }
}

struct Writer<'a, 'p> {
    layouts: &'a [ShardLayout],
    files: &'a [File],
    loader: Loader<'a>,
    buffer: Vec<u8>,
    progress: &'p mut dyn FnMut(u64),
}

impl<'a> Writer<'a, '_> {
    /// Writes the parts of one group side by side and returns their hashes.
    fn write_group(&mut self, parts: Parts<'a>) -> Result<Vec<(Vec<Destination>, String)>, WeightError> {
        let mut jobs = Vec::with_capacity(parts.len());
        for ((weight, region), destinations) in parts {
            let name = self.name(&destinations);
            let reader = RegionReader::new(weight, region).map_err(WeightError::of(name))?;
            jobs.push(Job { name, reader, hash: Sha256::new(), destinations });
        }
        let mut unfinished: BTreeSet<(u64, usize)> =
            jobs.iter().enumerate().filter_map(|(index, job)| Some((job.progress()?, index))).collect();
        while let Some((_, index)) = unfinished.pop_first() {
            let job = &mut jobs[index];
            self.write_chunk(job)?;
            unfinished.extend(job.progress().map(|progress| (progress, index)));
        }
        self.loader.release();
        Ok(jobs.into_iter().map(|job| (job.destinations, hex(&job.hash.finalize()))).collect())
    }

    fn name(&self, destinations: &[Destination]) -> &'a str {
        let placed = destinations.first().and_then(|to| self.layouts.get(to.file)?.placed().get(to.tensor));
        placed.map_or("", |placed| placed.tensor.name.as_str())
    }

    fn write_chunk(&mut self, job: &mut Job<'a>) -> Result<(), WeightError> {
        let done = job.reader.bytes_done() as u64;
        job.reader.next_chunk(&mut self.loader, &mut self.buffer).map_err(WeightError::of(job.name))?;
        job.hash.update(&self.buffer);
        for to in &job.destinations {
            let (layout, file) = (&self.layouts[to.file], &self.files[to.file]);
            let at = layout.data_start() + layout.placed()[to.tensor].offset + done;
            file.write_all_at(&self.buffer, at).map_err(write_error(layout))?;
            (self.progress)(self.buffer.len() as u64);
        }
        Ok(())
    }
}
