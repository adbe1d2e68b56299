//! Weights outside the model file.
//!
//! A model names its data files, and a model is hostile until read: a location must lead to a regular file below the
//! folder the model was given in, or below the folder its path resolves to (Hugging Face caches hold models and data
//! as symlinks into one folder of blobs). Symlinks are resolved first and the result is opened beneath the allowed
//! folder without following any, so that nothing can be swapped in between. Sizes are checked before anything is
//! mapped. The rules follow ONNX's `ExternalDataSecurity.md`, except that symlinks which stay inside are allowed.

use crate::error::{Fault, quote};
use crate::limits::Limits;
use crate::map;
use crate::proto::StringStringEntryProto;
use crate::tensor_data::{TensorRef, TensorSource};
use bytes::Bytes;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use tpshard_ir::Tensor;

/// The bytes of a model's tensors. External files are neither kept open nor mapped as a whole: a tensor is mapped when
/// it is asked for and unmapped when its bytes are dropped, so that a model may be larger than the address space.
#[derive(Clone, Debug, Default)]
pub struct Storage {
    files: BTreeMap<PathBuf, DataFile>,
}

/// An external file that was checked when the model was read.
#[derive(Clone, Debug)]
struct DataFile {
    /// The allowed folder and the way from there.
    folder: PathBuf,
    relative: PathBuf,
    length: u64,
    /// Device and inode: the file must still be the one that was checked.
    identity: (u64, u64),
}

impl DataFile {
    fn bytes(&self, offset: u64, length: u64) -> io::Result<Bytes> {
        let file = open_without_links(&self.folder, &self.relative)?;
        let metadata = file.metadata()?;
        if (metadata.dev(), metadata.ino()) != self.identity || metadata.len() < self.length {
            return Err(io::Error::other("the file was changed since the model was read"));
        }
        map::range_bytes(&file, offset, length)
    }
}

impl Storage {
    /// The bytes of a tensor of this model, without copying.
    ///
    /// # Errors
    /// If the reference belongs to another model.
    pub fn bytes(&self, tensor: &TensorRef) -> Result<Bytes, Fault> {
        let (file, offset, length) = match &tensor.source {
            TensorSource::Inline(bytes) => return Ok(bytes.clone()),
            TensorSource::External { file, offset, length } => (file, *offset, *length),
            TensorSource::Missing { location, .. } => {
                let error = io::Error::from(io::ErrorKind::NotFound);
                return Err(unreadable(location, &error).at_value(&tensor.name));
            }
        };
        let known = self.files.get(file).filter(|known| offset.saturating_add(length) <= known.length);
        let known = known.ok_or_else(|| {
            let message = format!("{} is not open in this storage", file.display());
            Fault::invalid(message, "use the storage of the model the tensor belongs to")
                .at_value(&tensor.name)
        })?;
        known
            .bytes(offset, length)
            .map_err(|error| unreadable(&file.to_string_lossy(), &error).at_value(&tensor.name))
    }

    /// The tensor's values, read into memory.
    ///
    /// # Errors
    /// As [`Storage::bytes`].
    pub fn to_tensor(&self, tensor: &TensorRef) -> Result<Tensor, Fault> {
        let bytes = self.bytes(tensor)?;
        let shape: Option<Vec<usize>> = tensor.dims.iter().map(|&dim| usize::try_from(dim).ok()).collect();
        let shape = shape
            .ok_or_else(|| Fault::invalid("a dim exceeds the address space", "export the model again"))?;
        Tensor::from_le_bytes(tensor.dtype, shape, &bytes).map_err(|error| {
            Fault::invalid(error.to_string(), "export the model again").at_value(&tensor.name)
        })
    }

    /// The external files, in order of their paths, with their lengths.
    pub fn files(&self) -> impl Iterator<Item = (&Path, u64)> {
        self.files.iter().map(|(path, file)| (path.as_path(), file.length))
    }
}

/// Resolves locations while a model is read.
pub(crate) struct Opener<'a> {
    /// The folder the model was given in; locations are relative to it.
    folder: PathBuf,
    /// Canonical folders that data may lie below.
    allowed: Vec<PathBuf>,
    limits: &'a Limits,
    /// What each location has led to, so that thousands of tensors open one file once.
    resolved: BTreeMap<String, PathBuf>,
    storage: Storage,
}

/// The keys of `external_data`, checked.
#[derive(Debug, PartialEq, Eq)]
struct Keys<'a> {
    location: &'a str,
    offset: u64,
    length: Option<u64>,
}

impl<'a> Opener<'a> {
    /// For the model at `path`.
    pub(crate) fn new(path: &Path, limits: &'a Limits) -> io::Result<Opener<'a>> {
        let folder = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
            _ => PathBuf::from("."),
        };
        let mut allowed = vec![folder.canonicalize()?];
        if let Some(resolved) = path.canonicalize()?.parent()
            && allowed[0] != resolved
        {
            allowed.push(resolved.to_path_buf());
        }
        Ok(Opener { folder, allowed, limits, resolved: BTreeMap::new(), storage: Storage::default() })
    }

    /// For what has no files: everything external is refused.
    pub(crate) fn detached(limits: &'a Limits) -> Opener<'a> {
        Opener {
            folder: PathBuf::new(),
            allowed: Vec::new(),
            limits,
            resolved: BTreeMap::new(),
            storage: Storage::default(),
        }
    }

    /// Checks one tensor's `external_data` against its byte length and opens its file.
    pub(crate) fn source(
        &mut self,
        entries: &[StringStringEntryProto],
        needed: u64,
    ) -> Result<TensorSource, Fault> {
        let keys = read_keys(entries)?;
        check_location(keys.location)?;
        if let Some(length) = keys.length
            && length != needed
        {
            let message = format!("the tensor needs {needed} bytes, its external data has length {length}");
            return Err(Fault::invalid(message, MISMATCH));
        }
        if self.limits.allow_missing_data && self.is_missing(keys.location) {
            return Ok(TensorSource::Missing { location: keys.location.into(), length: needed });
        }
        let file = self.open(keys.location)?;
        let size = self.storage.files.get(&file).map_or(0, |known| known.length);
        match keys.offset.checked_add(needed) {
            Some(end) if end <= size => {
                Ok(TensorSource::External { file, offset: keys.offset, length: needed })
            }
            _ => Err(Fault::invalid(
                format!(
                    "{needed} bytes at offset {} are beyond the end of {}, which has {size}",
                    keys.offset,
                    quote(keys.location)
                ),
                MISMATCH,
            )),
        }
    }

    pub(crate) fn into_storage(self) -> Storage {
        self.storage
    }

    fn open(&mut self, location: &str) -> Result<PathBuf, Fault> {
        if let Some(file) = self.resolved.get(location) {
            return Ok(file.clone());
        }
        let file = self.resolve(location)?;
        if !self.storage.files.contains_key(&file) {
            if self.storage.files.len() >= self.limits.external_files {
                let message = format!("the model has more than {} data files", self.limits.external_files);
                return Err(Fault::resource(message, "save it again with all external data in one file"));
            }
            let known = self.check_beneath(&file).map_err(|problem| match problem {
                Open::Io(error) => unreadable(location, &error),
                Open::Fault(fault) => *fault,
            })?;
            self.storage.files.insert(file.clone(), known);
        }
        self.resolved.insert(location.to_owned(), file.clone());
        Ok(file)
    }

    /// True if nothing of that name is beside the model.
    fn is_missing(&self, location: &str) -> bool {
        let absent = |folder: &PathBuf| {
            folder.join(location).symlink_metadata().is_err_and(|e| e.kind() == io::ErrorKind::NotFound)
        };
        std::iter::once(&self.folder).chain(&self.allowed).all(absent)
    }

    /// The canonical path of a location, below an allowed folder.
    fn resolve(&self, location: &str) -> Result<PathBuf, Fault> {
        let mut missing = None;
        for base in std::iter::once(&self.folder).chain(&self.allowed) {
            match base.join(location).canonicalize() {
                Ok(file) if self.allowed.iter().any(|folder| file.starts_with(folder)) => return Ok(file),
                Ok(_) => return Err(outside(location)),
                Err(error) => {
                    missing.get_or_insert(error);
                }
            }
        }
        Err(missing.map_or_else(|| outside(location), |error| unreadable(location, &error)))
    }

    fn check_beneath(&self, file: &Path) -> Result<DataFile, Open> {
        let relative = self.allowed.iter().find_map(|folder| Some((folder, file.strip_prefix(folder).ok()?)));
        let Some((folder, relative)) = relative else {
            return Err(Open::Io(io::Error::from(io::ErrorKind::PermissionDenied)));
        };
        let handle = open_without_links(folder, relative)?;
        let metadata = handle.metadata()?;
        if !metadata.is_file() {
            let fault = Fault::invalid(
                format!("external data {} is not a regular file", quote(&relative.to_string_lossy())),
                "external data must be an ordinary file beside the model",
            );
            return Err(Open::Fault(Box::new(fault)));
        }
        if metadata.nlink() > 1 && !self.limits.allow_hard_links {
            let fault = Fault::invalid(
                format!("external data {} is a hard link", quote(&relative.to_string_lossy())),
                "a hard link can lead to any file of this file system; copy the file, or allow hard links if the \
                 folder is yours",
            );
            return Err(Open::Fault(Box::new(fault)));
        }
        Ok(DataFile {
            folder: folder.clone(),
            relative: relative.to_path_buf(),
            length: metadata.len(),
            identity: (metadata.dev(), metadata.ino()),
        })
    }
}

enum Open {
    Io(io::Error),
    Fault(Box<Fault>),
}

impl From<io::Error> for Open {
    fn from(error: io::Error) -> Open {
        Open::Io(error)
    }
}

const MISMATCH: &str =
    "model and data file do not belong together, or the data file is cut off; get both again";

/// Opens `relative` below `folder` without following a symlink anywhere. `NONBLOCK` keeps a FIFO from hanging us.
fn open_without_links(folder: &Path, relative: &Path) -> io::Result<File> {
    let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let regular = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let base = rustix::fs::open(folder, directory, Mode::empty())?;
    let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    match rustix::fs::openat2(&base, relative, regular, Mode::empty(), beneath) {
        Ok(file) => return Ok(File::from(file)),
        // Kernels before 5.6 lack the call, and some sandboxes forbid it.
        Err(rustix::io::Errno::NOSYS | rustix::io::Errno::PERM) => {}
        Err(error) => return Err(error.into()),
    }
    open_by_steps(base, relative, directory | OFlags::NOFOLLOW, regular)
}

/// The same, one component at a time.
fn open_by_steps(
    base: rustix::fd::OwnedFd,
    relative: &Path,
    directory: OFlags,
    regular: OFlags,
) -> io::Result<File> {
    let mut at = base;
    let mut components = relative.components().peekable();
    while let Some(component) = components.next() {
        let Component::Normal(name) = component else {
            return Err(io::Error::from(io::ErrorKind::PermissionDenied));
        };
        let flags = if components.peek().is_some() { directory } else { regular };
        at = rustix::fs::openat(&at, name, flags, Mode::empty())?;
    }
    Ok(File::from(at))
}

fn read_keys(entries: &[StringStringEntryProto]) -> Result<Keys<'_>, Fault> {
    let (mut location, mut offset, mut length) = (None, None, None);
    for entry in entries {
        let slot = match entry.key.as_str() {
            "location" => &mut location,
            "offset" => &mut offset,
            "length" => &mut length,
            // `checksum` and `basepath` are known and not needed; others have no meaning and, as in ONNX, no effect.
            _ => continue,
        };
        if slot.replace(entry.value.as_str()).is_some() {
            let message = format!("external data has the key {} twice", quote(&entry.key));
            return Err(Fault::invalid(message, "save the model again"));
        }
    }
    let location = location.ok_or_else(|| {
        Fault::invalid("external data has no location", "save the model and its data again")
    })?;
    let offset = offset.map(|text| number("offset", text)).transpose()?.unwrap_or(0);
    let length = length.map(|text| number("length", text)).transpose()?;
    Ok(Keys { location, offset, length })
}

/// Decimal digits only: no sign, no space, nothing that another reader would take for a different number.
fn number(key: &str, text: &str) -> Result<u64, Fault> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten().ok_or_else(|| {
        let message = format!("the {key} of external data, {}, is not a byte count", quote(text));
        Fault::invalid(message, "save the model and its data again")
    })
}

fn check_location(location: &str) -> Result<(), Fault> {
    let drive = location.as_bytes().get(1) == Some(&b':')
        && location.as_bytes().first().is_some_and(u8::is_ascii_alphabetic);
    let problem = if location.is_empty() {
        "is empty"
    } else if location.contains('\0') {
        "contains a NUL"
    } else if location.starts_with("*/") {
        "is an address in another process's memory"
    } else if location.contains('\\') {
        "contains a backslash"
    } else if location.starts_with('/') || drive {
        "is an absolute path"
    } else if location.split('/').any(|part| part == "..") {
        "leaves the model's folder"
    } else if location.len() > 4096 {
        "is too long"
    } else {
        return Ok(());
    };
    Err(Fault::invalid(
        format!("the location of external data, {}, {problem}", quote(location)),
        "external data must be named by a relative path below the model's folder, with / between folders; save the \
         model again with `onnx.save(…, save_as_external_data=True, location='name.data')`",
    ))
}

fn outside(location: &str) -> Fault {
    Fault::invalid(
        format!("external data {} is a link that leads out of the model's folder", quote(location)),
        "put the data file itself beside the model",
    )
}

fn unreadable(location: &str, error: &io::Error) -> Fault {
    let help = if error.kind() == io::ErrorKind::NotFound {
        "the model comes in several files; put its data file beside it under this name"
    } else {
        "check that the data file is an ordinary file that you may read"
    };
    Fault::io(format!("cannot open external data {}: {error}", quote(location)), help)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use std::os::unix::fs::symlink;

    fn entries(pairs: &[(&str, &str)]) -> Vec<StringStringEntryProto> {
        pairs
            .iter()
            .map(|(key, value)| StringStringEntryProto { key: (*key).into(), value: (*value).into() })
            .collect()
    }

    /// A folder with `model.onnx`, `w.bin` of 24 bytes and `sub/w.bin`; beside it `outside.bin`.
    fn folder() -> (tempfile::TempDir, PathBuf) {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("model");
        std::fs::create_dir_all(folder.join("sub")).unwrap();
        std::fs::write(folder.join("model.onnx"), b"").unwrap();
        std::fs::write(folder.join("w.bin"), (0..24).collect::<Vec<u8>>()).unwrap();
        std::fs::write(folder.join("sub/w.bin"), [1; 24]).unwrap();
        std::fs::write(root.path().join("outside.bin"), [2; 24]).unwrap();
        let model = folder.join("model.onnx");
        (root, model)
    }

    fn source(model: &Path, pairs: &[(&str, &str)], needed: u64) -> Result<TensorSource, Fault> {
        let limits = Limits::default();
        Opener::new(model, &limits).unwrap().source(&entries(pairs), needed)
    }

    fn refused(model: &Path, location: &str) -> String {
        source(model, &[("location", location)], 24).unwrap_err().message
    }

    #[test]
    fn legal_locations_open_without_copying() {
        let (_root, model) = folder();
        let limits = Limits::default();
        let mut opener = Opener::new(&model, &limits).unwrap();
        let pairs =
            [("location", "w.bin"), ("offset", "8"), ("length", "4"), ("checksum", "x"), ("other", "y")];
        let source = opener.source(&entries(&pairs), 4).unwrap();
        let tensor = TensorRef { name: "w".into(), dtype: tpshard_ir::DType::U8, dims: vec![4], source };
        opener.source(&entries(&[("location", "./w.bin")]), 24).unwrap();
        opener.source(&entries(&[("location", "sub/w.bin")]), 24).unwrap();
        let storage = opener.into_storage();
        assert_eq!(storage.files().count(), 2);
        assert_eq!(storage.bytes(&tensor).unwrap().as_ref(), [8, 9, 10, 11]);
        assert_eq!(storage.to_tensor(&tensor).unwrap().as_slice::<u8>().unwrap(), [8, 9, 10, 11]);
        assert!(Storage::default().bytes(&tensor).is_err());
    }

    #[test]
    fn locations_that_leave_the_folder_are_refused() {
        let (_root, model) = folder();
        for location in ["../outside.bin", "sub/../../outside.bin", "a/..", ".."] {
            assert!(refused(&model, location).contains("leaves the model's folder"), "{location}");
        }
        assert!(refused(&model, "/etc/passwd").contains("absolute"));
        assert!(refused(&model, "C:/w.bin").contains("absolute"));
        assert!(refused(&model, "..\\outside.bin").contains("backslash"));
        assert!(refused(&model, "w.bin\0x").contains("NUL"));
        assert!(refused(&model, "").contains("empty"));
        assert!(refused(&model, "*/_ORT_MEM_ADDR_/*").contains("memory"));
    }

    #[test]
    fn links_may_not_lead_out() {
        let (root, model) = folder();
        let inside = model.parent().unwrap();
        symlink("../outside.bin", inside.join("link.bin")).unwrap();
        assert!(refused(&model, "link.bin").contains("leads out"));
        symlink(root.path(), inside.join("up")).unwrap();
        assert!(refused(&model, "up/outside.bin").contains("leads out"));
        symlink("w.bin", inside.join("same.bin")).unwrap();
        source(&model, &[("location", "same.bin")], 24).unwrap();
        std::fs::hard_link(root.path().join("outside.bin"), inside.join("hard.bin")).unwrap();
        assert!(refused(&model, "hard.bin").contains("hard link"));
        let limits = Limits { allow_hard_links: true, ..Limits::default() };
        let mut opener = Opener::new(&model, &limits).unwrap();
        opener.source(&entries(&[("location", "hard.bin")]), 24).unwrap();
    }

    #[test]
    fn a_hugging_face_cache_loads() {
        let root = tempfile::tempdir().unwrap();
        let (blobs, snapshot) = (root.path().join("blobs"), root.path().join("snapshots/abc/onnx"));
        std::fs::create_dir_all(&blobs).unwrap();
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::write(blobs.join("1111"), b"model").unwrap();
        std::fs::write(blobs.join("2222"), [3; 24]).unwrap();
        symlink("../../../blobs/1111", snapshot.join("model.onnx")).unwrap();
        symlink("../../../blobs/2222", snapshot.join("model.onnx_data")).unwrap();
        source(&snapshot.join("model.onnx"), &[("location", "model.onnx_data")], 24).unwrap();
    }

    #[test]
    fn data_beside_the_resolved_model_loads() {
        let (root, model) = folder();
        let link = root.path().join("elsewhere");
        std::fs::create_dir(&link).unwrap();
        symlink(&model, link.join("m.onnx")).unwrap();
        source(&link.join("m.onnx"), &[("location", "w.bin")], 24).unwrap();
    }

    #[test]
    fn only_regular_files_are_read() {
        let (_root, model) = folder();
        assert!(refused(&model, "sub").contains("not a regular file"));
        let fifo = model.with_file_name("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
            .unwrap();
        assert!(refused(&model, "fifo").contains("not a regular file"));
        let missing = source(&model, &[("location", "none.bin")], 24).unwrap_err();
        assert_eq!(missing.kind, ErrorKind::Io);
    }

    #[test]
    fn ranges_are_checked_before_use() {
        let (_root, model) = folder();
        let with = |offset: &str, length: &str, needed| {
            let pairs = [("location", "w.bin"), ("offset", offset), ("length", length)];
            source(&model, &pairs, needed).unwrap_err().message
        };
        assert!(with("8", "24", 24).contains("beyond the end"));
        assert!(with("18446744073709551615", "24", 24).contains("beyond the end"));
        assert!(with("18446744073709551616", "24", 24).contains("not a byte count"));
        for text in ["-1", "+1", " 1", "1 ", "0x1", "", "1e3", "١"] {
            assert!(with(text, "24", 24).contains("not a byte count"), "{text}");
        }
        assert!(with("0", "4611686018427387904", 24).contains("has length 4611686018427387904"));
        assert!(with("0", "8", 24).contains("has length 8"));
        let twice = source(&model, &[("location", "w.bin"), ("location", "x")], 24).unwrap_err();
        assert!(twice.message.contains("twice"));
        let none = source(&model, &[("offset", "0")], 24).unwrap_err();
        assert!(none.message.contains("no location"));
    }

    #[test]
    fn the_fallback_does_not_follow_links_either() {
        let (root, model) = folder();
        let inside = model.parent().unwrap();
        symlink(root.path(), inside.join("up")).unwrap();
        let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let regular = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let open = |relative: &str| {
            let base = rustix::fs::open(inside, directory, Mode::empty()).unwrap();
            open_by_steps(base, Path::new(relative), directory | OFlags::NOFOLLOW, regular)
        };
        open("sub/w.bin").unwrap();
        assert!(open("up/outside.bin").is_err());
        assert!(open("../outside.bin").is_err());
    }
}
