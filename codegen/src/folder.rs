//! The output folder: it appears complete, or it does not appear.
//!
//! Everything is written into a temporary folder beside the wanted one, synced, and renamed at the end, so that after a
//! kill at any moment the wanted folder is absent, complete, or still the old one. A lock file beside the temporary
//! folder is held with `flock` while its owner lives: the next build removes what a dead one left and leaves the living
//! alone. All refusals come before any work.
//!
//! ```text
//! out/                        the wanted folder
//! .out.tpshard-4711-0/        where process 4711 writes
//! .out.tpshard-4711-0.lock    locked while it does
//! .out.tpshard-4711-0.old/    the replaced folder, only on file systems that cannot exchange two names
//! ```
//!
//! Replacing exchanges the two names in one step. A file system without that (`RENAME_EXCHANGE`) gets two renames; a
//! kill between them leaves the wanted folder absent.

mod checks;
mod lock;

use rustix::fs::{CWD, RenameFlags, renameat_with};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path, PathBuf};

use lock::Workspace;

/// The file that every finished folder holds.
pub const CONFIG: &str = "config.json";
/// The value of the key `format` in [`CONFIG`], by which a folder is known to be ours to replace.
pub const CONFIG_FORMAT: &str = "tpshard-folder";

/// Why an output folder cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    #[error("{}: cannot be an output folder\nhelp: name a folder to be made, such as -o out", path.display())]
    Name { path: PathBuf },
    #[error("{}: exists already\nhelp: --overwrite replaces it, -o DIR writes elsewhere", path.display())]
    Exists { path: PathBuf },
    #[error("{}: is not a folder\nhelp: -o DIR writes elsewhere", path.display())]
    NotAFolder { path: PathBuf },
    #[error(
        "{}: was not written by tpshard ({reason}), so it is not replaced\n\
         help: remove it yourself, or -o DIR writes elsewhere", path.display()
    )]
    Foreign { path: PathBuf, reason: String },
    #[error(
        "{}: replacing it would remove {}\nhelp: -o DIR writes elsewhere",
        path.display(), holds.display()
    )]
    Holds { path: PathBuf, holds: PathBuf },
    #[error(
        "{}: {needed} bytes are needed, {free} are free\n\
         help: make room, or -o DIR on another disk; --overwrite needs room for both folders at once",
        path.display()
    )]
    Space { path: PathBuf, needed: u64, free: u64 },
    #[error("`{name}` cannot be a file of an output folder")]
    FileName { name: String },
    #[error("the finished folder has no {CONFIG}")]
    Unmarked,
    #[error("{action} {}: {error}", path.display())]
    Io { action: &'static str, path: PathBuf, error: io::Error },
}

impl FolderError {
    fn io<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> FolderError + use<'a> {
        move |error| FolderError::Io { action, path: path.into(), error }
    }
}

/// A folder in the making. Dropping it without [`OutputFolder::commit`] removes all that was written.
#[derive(Debug)]
pub struct OutputFolder {
    target: PathBuf,
    overwrite: bool,
    workspace: Workspace,
}

impl OutputFolder {
    /// Starts the folder `path`, after checking that it may be made and that `estimate` bytes are free.
    ///
    /// With `overwrite`, an existing folder is replaced at the end if it is ours (its `config.json` says so) or empty.
    /// `protected` paths, such as the model's folder, must not lie in what would be replaced.
    ///
    /// # Errors
    /// Everything that can be known to go wrong before work begins.
    pub fn create(
        path: &Path,
        overwrite: bool,
        estimate: u64,
        protected: &[&Path],
    ) -> Result<OutputFolder, FolderError> {
        let (parent, name) = checks::resolve(path)?;
        let target = parent.join(&name);
        checks::may_be_made(&target, overwrite, protected)?;
        lock::remove_stale(&parent, &name);
        checks::has_space(&parent, estimate)?;
        let workspace = Workspace::create(&parent, &name)?;
        Ok(OutputFolder { target, overwrite, workspace })
    }

    /// Checks that `needed` bytes are free, once it is known how many will be written.
    ///
    /// # Errors
    /// [`FolderError::Space`].
    pub fn require_space(&self, needed: u64) -> Result<(), FolderError> {
        checks::has_space(self.target.parent().unwrap_or(&self.target), needed)
    }

    /// Where the folder will appear.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Where the files are until then.
    pub fn temporary(&self) -> &Path {
        self.workspace.folder()
    }

    /// A new file of the folder, open for reading and writing.
    ///
    /// # Errors
    /// `name` is not a plain file name, is taken, or the file cannot be made.
    pub fn file(&self, name: &str) -> Result<File, FolderError> {
        self.open(name, 0o666)
    }

    /// As [`OutputFolder::file`], with the permission to execute it.
    ///
    /// # Errors
    /// As [`OutputFolder::file`].
    pub fn executable(&self, name: &str) -> Result<File, FolderError> {
        self.open(name, 0o777)
    }

    fn open(&self, name: &str, mode: u32) -> Result<File, FolderError> {
        let plain = matches!(
            Path::new(name).components().collect::<Vec<_>>()[..],
            [Component::Normal(only)] if only == name
        );
        if !plain || name.contains('\0') {
            return Err(FolderError::FileName { name: name.escape_default().to_string() });
        }
        let path = self.temporary().join(name);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(mode);
        options.open(&path).map_err(FolderError::io("creating", &path))
    }

    /// Makes the folder appear: syncs every file, renames, and removes what was replaced.
    ///
    /// # Errors
    /// Nothing has appeared, and the temporary folder is removed. [`FolderError::Exists`] if the target came into being
    /// meanwhile.
    pub fn commit(self) -> Result<(), FolderError> {
        let folder = self.temporary();
        if !folder.join(CONFIG).is_file() {
            return Err(FolderError::Unmarked);
        }
        sync_all_below(folder)?;
        self.appear()?;
        if let Some(parent) = self.target.parent() {
            sync(parent)?;
        }
        Ok(())
    }

    fn appear(&self) -> Result<(), FolderError> {
        let folder = self.temporary();
        match renameat_with(CWD, folder, CWD, &self.target, RenameFlags::NOREPLACE) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::EXIST) if self.overwrite => {}
            Err(rustix::io::Errno::EXIST) => return Err(FolderError::Exists { path: self.target.clone() }),
            Err(error) if not_supported(error) => return self.appear_by_plain_renames(),
            Err(error) => return Err(FolderError::io("renaming to", &self.target)(error.into())),
        }
        // The folder may have changed since the work began.
        checks::is_ours(&self.target)?;
        match renameat_with(CWD, folder, CWD, &self.target, RenameFlags::EXCHANGE) {
            // The old folder now has the temporary name and goes with the workspace.
            Ok(()) => Ok(()),
            Err(error) if not_supported(error) => self.appear_by_plain_renames(),
            Err(error) => Err(FolderError::io("replacing", &self.target)(error.into())),
        }
    }

    /// For file systems that can neither refuse to replace nor exchange. A plain rename replaces nothing but an empty
    /// folder.
    fn appear_by_plain_renames(&self) -> Result<(), FolderError> {
        let exists = fs::symlink_metadata(&self.target).is_ok();
        if exists && !self.overwrite {
            return Err(FolderError::Exists { path: self.target.clone() });
        }
        let old = self.workspace.old_folder();
        if exists {
            checks::is_ours(&self.target)?;
            fs::rename(&self.target, &old).map_err(FolderError::io("moving aside", &self.target))?;
        }
        fs::rename(self.temporary(), &self.target).map_err(|error| {
            if exists {
                // If this fails too, both folders are still there under names the error's path leads to.
                let _ = fs::rename(&old, &self.target);
            }
            FolderError::io("renaming to", &self.target)(error)
        })
    }
}

fn not_supported(error: rustix::io::Errno) -> bool {
    use rustix::io::Errno;
    [Errno::INVAL, Errno::NOSYS, Errno::OPNOTSUPP].contains(&error)
}

fn sync_all_below(folder: &Path) -> Result<(), FolderError> {
    let reading = FolderError::io("reading", folder);
    let entries =
        fs::read_dir(folder).and_then(|entries| entries.collect::<Result<Vec<_>, _>>()).map_err(reading)?;
    for entry in entries {
        sync(&entry.path())?;
    }
    sync(folder)
}

fn sync(path: &Path) -> Result<(), FolderError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(FolderError::io("syncing", path))
}
