//! Temporary folders and whose they are.
//!
//! A workspace is a lock file and the folders named after it. The lock is taken before the folder is made and the lock
//! file is removed after it, so a folder whose lock file is missing or can be locked belongs to no living process.

use super::FolderError;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

const MARK: &[u8] = b".tpshard-";
const LOCK: &[u8] = b".lock";
const OLD: &[u8] = b".old";
/// More names than one process can hold at a time.
const ATTEMPTS: u32 = 10_000;

/// A temporary folder with its lock; removed when dropped.
#[derive(Debug)]
pub(super) struct Workspace {
    /// Path of the temporary folder; the other paths extend it.
    base: PathBuf,
    /// Holding it open holds the lock.
    _lock: File,
}

impl Workspace {
    /// A new workspace for `name` in `parent`.
    pub(super) fn create(parent: &Path, name: &OsStr) -> Result<Workspace, FolderError> {
        for attempt in 0..ATTEMPTS {
            let id = format!("{}-{attempt}", std::process::id());
            let base = parent.join(join(&[b".", name.as_bytes(), MARK, id.as_bytes()]));
            let lock_path = extend(&base, LOCK);
            let lock = match OpenOptions::new().write(true).create_new(true).open(&lock_path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(FolderError::io("creating", &lock_path)(error)),
            };
            // A build that cleans up may have taken the new file for a stale one.
            if !locks(&lock) || !is_still(&lock, &lock_path) {
                continue;
            }
            let workspace = Workspace { base, _lock: lock };
            fs::create_dir(workspace.folder()).map_err(FolderError::io("creating", workspace.folder()))?;
            return Ok(workspace);
        }
        let error = io::Error::from(io::ErrorKind::AlreadyExists);
        Err(FolderError::io("finding a temporary name in", parent)(error))
    }

    pub(super) fn folder(&self) -> &Path {
        &self.base
    }

    pub(super) fn old_folder(&self) -> PathBuf {
        extend(&self.base, OLD)
    }
}

impl Drop for Workspace {
    /// What cannot be removed now is removed by the next build, as that of a dead process.
    fn drop(&mut self) {
        remove_all(&self.base);
    }
}

/// Removes what dead builds of `name` left in `parent`. What cannot be removed stays; it is in nobody's way.
pub(super) fn remove_stale(parent: &Path, name: &OsStr) {
    let start = join(&[b".", name.as_bytes(), MARK]);
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    let bases: BTreeSet<PathBuf> = entries
        .filter_map(|entry| base_name(entry.file_name().as_bytes(), start.as_bytes()))
        .map(|base| parent.join(base))
        .collect();
    for base in bases {
        let lock_path = extend(&base, LOCK);
        // Without a lock file the folder has no owner; making one keeps new owners off the name meanwhile.
        let lock = match OpenOptions::new().write(true).open(&lock_path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                OpenOptions::new().write(true).create_new(true).open(&lock_path)
            }
            found => found,
        };
        // The lock is held until everything is gone, so that nobody else removes or takes it meanwhile.
        if let Ok(lock) = lock
            && can_lock(&lock)
            && is_still(&lock, &lock_path)
        {
            remove_all(&base);
        }
    }
}

/// The name of the workspace that a file belongs to, if it is one of `start` process `-` number.
fn base_name(file: &[u8], start: &[u8]) -> Option<OsString> {
    let rest = file.strip_prefix(start)?;
    let id = rest.strip_suffix(LOCK).or_else(|| rest.strip_suffix(OLD)).unwrap_or(rest);
    let mut numbers = id.split(|&byte| byte == b'-');
    let is_number = |part: Option<&[u8]>| {
        part.is_some_and(|part| !part.is_empty() && part.iter().all(u8::is_ascii_digit))
    };
    let ours = is_number(numbers.next()) && is_number(numbers.next()) && numbers.next().is_none();
    ours.then(|| join(&[start, id]))
}

/// Folders first and the lock file last: as long as anything is left, the lock file tells whose it is.
fn remove_all(base: &Path) {
    let _ = fs::remove_dir_all(extend(base, OLD));
    let _ = fs::remove_dir_all(base);
    if fs::symlink_metadata(base).is_err() {
        let _ = fs::remove_file(extend(base, LOCK));
    }
}

fn can_lock(file: &File) -> bool {
    flock(file, FlockOperation::NonBlockingLockExclusive).is_ok()
}

/// As [`can_lock`], but true on file systems without locks: there nobody can take the folder for a stale one, and a
/// dead build's folder stays until someone removes it.
fn locks(file: &File) -> bool {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => true,
        Err(error) => [Errno::NOLCK, Errno::NOSYS, Errno::OPNOTSUPP].contains(&error),
    }
}

/// True if `path` still names the open `file`.
fn is_still(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(open), Ok(named)) => (open.dev(), open.ino()) == (named.dev(), named.ino()),
        _ => false,
    }
}

fn join(parts: &[&[u8]]) -> OsString {
    OsString::from_vec(parts.concat())
}

fn extend(base: &Path, suffix: &[u8]) -> PathBuf {
    PathBuf::from(join(&[base.as_os_str().as_bytes(), suffix]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_names_are_taken_for_workspaces() {
        let base = |file: &str| base_name(file.as_bytes(), b".out.tpshard-");
        let ours = Some(OsString::from(".out.tpshard-47-0"));
        assert_eq!(base(".out.tpshard-47-0"), ours);
        assert_eq!(base(".out.tpshard-47-0.lock"), ours);
        assert_eq!(base(".out.tpshard-47-0.old"), ours);
        for other in ["out", ".out.tpshard-", ".out.tpshard-47", ".out.tpshard-47-x", ".out.tpshard-1-2-3"] {
            assert_eq!(base(other), None, "{other}");
        }
        // The workspace of the folder `out.tpshard-1`.
        assert_eq!(base(".out.tpshard-1.tpshard-47-0"), None);
    }
}
