//! What is refused before any work begins, and again before anything is replaced.

use super::{CONFIG, CONFIG_FORMAT, FolderError};
use serde::Deserialize;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

/// Largest `config.json` that is looked into.
const MAX_CONFIG: u64 = 1 << 30;

/// The existing folder that `path` is to lie in, without symbolic links, and its name there.
pub(super) fn resolve(path: &Path) -> Result<(PathBuf, OsString), FolderError> {
    let name = path.file_name().ok_or_else(|| FolderError::Name { path: path.into() })?;
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    // Room for `.NAME.tpshard-PID-COUNT.lock` within the 255 bytes of a file name.
    if name.len() > 200 {
        return Err(FolderError::Name { path: path.into() });
    }
    let parent = fs::canonicalize(parent).map_err(FolderError::io("looking for", parent))?;
    if !parent.is_dir() {
        return Err(FolderError::NotAFolder { path: parent });
    }
    Ok((parent, name.into()))
}

/// Refuses a `target` that exists, or, with `overwrite`, one that should not be replaced.
pub(super) fn may_be_made(target: &Path, overwrite: bool, protected: &[&Path]) -> Result<(), FolderError> {
    match fs::symlink_metadata(target) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(FolderError::io("looking at", target)(error)),
        Ok(found) if !found.is_dir() => return Err(FolderError::NotAFolder { path: target.into() }),
        Ok(_) if !overwrite => return Err(FolderError::Exists { path: target.into() }),
        Ok(_) => {}
    }
    let current = std::env::current_dir().ok();
    for &holds in protected.iter().chain(current.as_deref().iter()) {
        // A protected path that does not exist cannot be removed.
        if fs::canonicalize(holds).is_ok_and(|holds| holds.starts_with(target)) {
            return Err(FolderError::Holds { path: target.into(), holds: holds.into() });
        }
    }
    is_ours(target)
}

/// Refuses a folder that is neither empty nor marked as ours by its `config.json`.
pub(super) fn is_ours(target: &Path) -> Result<(), FolderError> {
    let foreign = |reason: String| FolderError::Foreign { path: target.into(), reason };
    let mut entries = fs::read_dir(target).map_err(FolderError::io("reading", target))?;
    if entries.next().is_none() {
        return Ok(());
    }
    let config = target.join(CONFIG);
    // Opening a pipe or a device could block.
    if !fs::symlink_metadata(&config).is_ok_and(|found| found.is_file()) {
        return Err(foreign(format!("no {CONFIG}")));
    }
    let file = File::open(&config).map_err(FolderError::io("opening", &config))?;
    match serde_json::from_reader::<_, Mark>(BufReader::new(file.take(MAX_CONFIG))) {
        Ok(mark) if mark.format == CONFIG_FORMAT => Ok(()),
        Ok(_) => Err(foreign(format!("its {CONFIG} has another `format`"))),
        Err(error) => Err(foreign(format!("its {CONFIG}: {error}"))),
    }
}

/// The one field of `config.json` that marks a folder as ours.
#[derive(Deserialize)]
struct Mark {
    format: String,
}

/// Refuses a file system with fewer than `needed` bytes free for this user.
pub(super) fn has_space(parent: &Path, needed: u64) -> Result<(), FolderError> {
    let found = rustix::fs::statvfs(parent)
        .map_err(|error| FolderError::io("looking at free space in", parent)(error.into()))?;
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    if free < needed {
        return Err(FolderError::Space { path: parent.into(), needed, free });
    }
    Ok(())
}
