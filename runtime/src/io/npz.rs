//! The `.npz` format: a zip archive of `.npy` files. Stored and deflated entries are read; stored ones are written,
//! without times, so that equal tensors give equal files.

use super::npy;
use super::{IoError, NamedTensors};
use crate::comm::bytes;
use std::fs::File;
use std::io::{BufReader, BufWriter, Write};
use std::path::Path;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, DateTime, ZipArchive, ZipWriter};

const ENTRY_LIMIT: usize = 1 << 16;
const NAME_LIMIT: usize = 4096;

/// Reads all arrays of an archive, which take at most `limit` bytes together.
///
/// # Errors
/// [`IoError`] with the file, the entry and what is wrong with it.
pub fn read_npz(path: &Path, limit: u64) -> Result<NamedTensors, IoError> {
    let file = File::open(path).map_err(IoError::system(path))?;
    let place = path.display().to_string();
    let mut archive = ZipArchive::new(BufReader::new(file)).map_err(|e| IoError::invalid(&place, e))?;
    if archive.len() > ENTRY_LIMIT {
        return Err(IoError::invalid(&place, format!("{} entries", archive.len())));
    }
    let mut tensors = NamedTensors::new();
    let mut left = limit;
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index).map_err(|e| IoError::invalid(&place, e))?;
        // NumPy leaves out what does not end in .npy, too.
        let file_name = entry.name().map_err(|e| IoError::invalid(&place, e))?;
        let Some(name) = file_name.strip_suffix(".npy").map(str::to_owned) else { continue };
        if name.len() > NAME_LIMIT {
            return Err(IoError::invalid(&place, format!("an entry's name has {} bytes", name.len())));
        }
        let place = format!("{place}: {name}");
        let needed = entry.size();
        if needed > left {
            return Err(IoError::TooLarge { place, needed, limit });
        }
        // What an entry holds is bounded by `read`, whatever its directory says.
        let tensor = npy::read(&mut entry, &place, left)?;
        left = left.saturating_sub(tensor.dtype().byte_len(tensor.len() as u64).unwrap_or(u64::MAX));
        if tensors.insert(name, tensor).is_some() {
            return Err(IoError::invalid(&place, "is there twice"));
        }
    }
    Ok(tensors)
}

/// Writes an archive; it appears under its name only when it is complete.
///
/// # Errors
/// [`IoError::Unsupported`] for types without a NumPy form; [`IoError::System`].
pub fn write_npz(path: &Path, tensors: &NamedTensors) -> Result<(), IoError> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = Path::new(&partial);
    let result =
        write(partial, tensors).and_then(|()| std::fs::rename(partial, path).map_err(IoError::system(path)));
    if result.is_err() {
        // The first error is the one to tell.
        let _ = std::fs::remove_file(partial);
    }
    result
}

fn write(path: &Path, tensors: &NamedTensors) -> Result<(), IoError> {
    let file = File::create(path).map_err(IoError::system(path))?;
    let mut archive = ZipWriter::new(BufWriter::new(file));
    let system = |e: zip::result::ZipError| IoError::invalid(path.display(), e);
    for (name, tensor) in tensors {
        let (header, widened) = npy::encode(tensor, &format!("{}: {name}", path.display()))?;
        let data = bytes(widened.as_ref().unwrap_or(tensor.data()));
        let options = SimpleFileOptions::default()
            .compression_method(CompressionMethod::Stored)
            .last_modified_time(DateTime::default())
            .unix_permissions(0o644)
            .large_file(header.len() + data.len() >= 1 << 32);
        archive.start_file(format!("{name}.npy"), options).map_err(system)?;
        archive.write_all(&header).and_then(|()| archive.write_all(data)).map_err(IoError::system(path))?;
    }
    let mut file = archive.finish().map_err(system)?;
    file.flush().map_err(IoError::system(path))
}
