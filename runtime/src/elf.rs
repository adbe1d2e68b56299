//! Finds the program inside a rank executable: the ELF section `.tpshard` of the file this process was started from.
//!
//! The section is not part of the memory image, so it is read through the section header table of the file. It is read
//! into memory, not mapped: it holds at most a few megabytes, and bytes that were checked must not change afterwards,
//! which a mapping of a file cannot promise. Every number in the file is checked before it is used.
//!
//! `/proc/self/exe` names the executable even when it was renamed or removed. Only when the process was started through
//! the dynamic loader (`ld-linux-x86-64.so.2 ./rank0`) does it name the loader; then the program is taken from the
//! loader's command line, and where that does not work `--program FILE` names it.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The name of the section that holds a rank's program.
pub const SECTION: &str = ".tpshard";

const HEADER: usize = 64;
const SECTION_HEADER: usize = 64;

/// Why a file cannot be searched for a program.
#[derive(Debug, thiserror::Error)]
pub enum ElfError {
    #[error("{what}\nhelp: rank programs are 64-bit little-endian ELF executables for x86-64 or aarch64")]
    Unsupported { what: &'static str },
    #[error("the executable is damaged: {what}\nhelp: copy or build it again")]
    Corrupt { what: &'static str },
    #[error("{}: {error}", path.display())]
    Read { path: PathBuf, error: io::Error },
    #[error("{}: {error}", path.display())]
    Search { path: PathBuf, error: Box<ElfError> },
}

/// The place of the program section in the bytes of an executable, `None` if it has none.
///
/// # Errors
/// The bytes are not an executable this understands, or point outside themselves.
pub fn find_section(bytes: &[u8]) -> Result<Option<Range<usize>>, ElfError> {
    let found = find(bytes).map_err(|problem| match problem {
        Problem::Elf(error) => error,
        Problem::Io(_) => ElfError::Corrupt { what: "it ends early" },
    })?;
    // Both ends are at most the slice's length, so they fit.
    Ok(found.map(|range| range.start as usize..range.end as usize))
}

/// The program section of the executable at `path`, `None` if it has none.
///
/// # Errors
/// As [`find_section`], or the file cannot be read; the error names the file.
pub fn read_section(path: &Path) -> Result<Option<Vec<u8>>, ElfError> {
    let io_error = |error| ElfError::Read { path: path.into(), error };
    let file = File::open(path).map_err(io_error)?;
    let source = FileBytes { len: file.metadata().map_err(io_error)?.len(), file: &file };
    let found = find(&source).map_err(|problem| match problem {
        Problem::Elf(error) => ElfError::Search { path: path.into(), error: Box::new(error) },
        Problem::Io(error) => io_error(error),
    })?;
    let Some(range) = found else { return Ok(None) };
    // The range lies within the file, so a hostile header cannot ask for more memory than the file has bytes.
    let mut bytes = vec![0; (range.end - range.start) as usize];
    source.read(range.start, &mut bytes).map_err(io_error)?;
    Ok(Some(bytes))
}

/// The program section this process carries, or that of `program` if given.
///
/// `None` means that the executable is a plain `tpshard` without a program.
///
/// # Errors
/// As [`read_section`].
pub fn own_section(program: Option<&Path>) -> Result<Option<Vec<u8>>, ElfError> {
    if let Some(path) = program {
        return read_section(path);
    }
    let own = Path::new("/proc/self/exe");
    if let Some(bytes) = read_section(own)? {
        return Ok(Some(bytes));
    }
    let name = std::fs::read_link(own).unwrap_or_default();
    if !is_dynamic_loader(&name) {
        return Ok(None);
    }
    let command = std::fs::read("/proc/self/cmdline").unwrap_or_default();
    program_after_loader(&command).map_or(Ok(None), |path| read_section(&path))
}

fn is_dynamic_loader(path: &Path) -> bool {
    let name = path.file_name().map(OsStrExt::as_bytes).unwrap_or_default();
    [&b"ld-"[..], b"ld.so", b"ld64.so"].iter().any(|start| name.starts_with(start))
}

/// The program in the command line of a dynamic loader: the first argument that is neither an option nor its value.
fn program_after_loader(command: &[u8]) -> Option<PathBuf> {
    const WITH_VALUE: [&[u8]; 7] = [
        b"--library-path",
        b"--inhibit-rpath",
        b"--audit",
        b"--preload",
        b"--argv0",
        b"--glibc-hwcaps-prepend",
        b"--glibc-hwcaps-mask",
    ];
    let mut arguments = command.split(|&byte| byte == 0).skip(1);
    while let Some(argument) = arguments.next() {
        if WITH_VALUE.contains(&argument) {
            arguments.next();
        } else if !argument.is_empty() && !argument.starts_with(b"--") {
            return Some(PathBuf::from(std::ffi::OsStr::from_bytes(argument)));
        }
    }
    None
}

enum Problem {
    Elf(ElfError),
    Io(io::Error),
}

impl From<ElfError> for Problem {
    fn from(error: ElfError) -> Self {
        Problem::Elf(error)
    }
}

/// Bytes at known offsets: a slice or a file.
trait Source {
    fn len(&self) -> u64;
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()>;
}

impl Source for [u8] {
    fn len(&self) -> u64 {
        <[u8]>::len(self) as u64
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let found = self.get(start..start.saturating_add(out.len())).ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(found);
        Ok(())
    }
}

struct FileBytes<'a> {
    file: &'a File,
    len: u64,
}

impl Source for FileBytes<'_> {
    fn len(&self) -> u64 {
        self.len
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(out, offset)
    }
}

/// Where a section's bytes and name are; the fields of its header that matter here.
struct Section {
    name: u32,
    kind: u32,
    offset: u64,
    size: u64,
}

fn find<S: Source + ?Sized>(source: &S) -> Result<Option<Range<u64>>, Problem> {
    let mut header = [0; HEADER];
    if source.len() < HEADER as u64 {
        return Err(ElfError::Unsupported { what: "the file is not an ELF executable" }.into());
    }
    source.read(0, &mut header).map_err(Problem::Io)?;
    check_identity(&header)?;
    let table = le64(&header, 40);
    let (size, count, names) = (le16(&header, 58), le16(&header, 60), le16(&header, 62));
    if table == 0 || count == 0 {
        return Ok(None);
    }
    if usize::from(size) != SECTION_HEADER || names >= count {
        return Err(ElfError::Corrupt { what: "its header does not describe a section table" }.into());
    }
    let length = u64::from(count) * SECTION_HEADER as u64;
    if table.checked_add(length).is_none_or(|end| end > source.len()) {
        return Err(ElfError::Corrupt { what: "its section table reaches past the end" }.into());
    }
    // At most 65535 headers of 64 bytes.
    let mut headers = vec![0; length as usize];
    source.read(table, &mut headers).map_err(Problem::Io)?;
    let sections: Vec<Section> = headers.chunks_exact(SECTION_HEADER).map(section).collect();
    let Some(name_table) = sections.get(usize::from(names)) else { return Ok(None) };
    let name_table = contents(name_table, source.len())?;
    for section in &sections {
        if has_name(source, &name_table, section.name)? {
            const NO_BITS: u32 = 8;
            if section.kind == NO_BITS {
                return Err(ElfError::Corrupt { what: "its program section has no contents" }.into());
            }
            return Ok(Some(contents(section, source.len())?));
        }
    }
    Ok(None)
}

fn check_identity(header: &[u8; HEADER]) -> Result<(), ElfError> {
    const X86_64: u16 = 62;
    const AARCH64: u16 = 183;
    let unsupported = |what| Err(ElfError::Unsupported { what });
    match header {
        [0x7f, b'E', b'L', b'F', 2, 1, ..] => match le16(header, 18) {
            X86_64 | AARCH64 => Ok(()),
            _ => unsupported("the executable is for another processor"),
        },
        [0x7f, b'E', b'L', b'F', 2, ..] => unsupported("the executable is big-endian"),
        [0x7f, b'E', b'L', b'F', ..] => unsupported("the executable is not 64-bit"),
        _ => unsupported("the file is not an ELF executable"),
    }
}

fn section(header: &[u8]) -> Section {
    Section { name: le32(header, 0), kind: le32(header, 4), offset: le64(header, 24), size: le64(header, 32) }
}

fn contents(section: &Section, length: u64) -> Result<Range<u64>, ElfError> {
    match section.offset.checked_add(section.size) {
        Some(end) if end <= length => Ok(section.offset..end),
        _ => Err(ElfError::Corrupt { what: "a section reaches past its end" }),
    }
}

/// True if the string at `name` in the name table is [`SECTION`], with its terminating zero.
fn has_name<S: Source + ?Sized>(source: &S, names: &Range<u64>, name: u32) -> Result<bool, Problem> {
    let mut found = [0; SECTION.len() + 1];
    let start = names.start.saturating_add(u64::from(name));
    if start.checked_add(found.len() as u64).is_none_or(|end| end > names.end) {
        return Ok(false);
    }
    source.read(start, &mut found).map_err(Problem::Io)?;
    Ok(found.strip_suffix(&[0]) == Some(SECTION.as_bytes()))
}

// Callers pass headers of full length; a missing byte would read as zero.
fn le<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..at + N).and_then(|field| field.try_into().ok()).unwrap_or([0; N])
}

fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(le(bytes, at))
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(le(bytes, at))
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(le(bytes, at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_test_carries_no_program() {
        assert!(own_section(None).unwrap().is_none());
        let own = std::env::current_exe().unwrap();
        assert!(find_section(&std::fs::read(&own).unwrap()).unwrap().is_none());
        assert!(own_section(Some(&own)).unwrap().is_none());
        let missing = own_section(Some(Path::new("/nonexistent/rank0"))).unwrap_err();
        assert!(missing.to_string().starts_with("/nonexistent/rank0: "), "{missing}");
    }

    #[test]
    fn other_files_are_refused_with_a_reason() {
        let error = |bytes: &[u8]| find_section(bytes).unwrap_err().to_string();
        assert!(error(b"").contains("not an ELF"));
        assert!(error(&[0; 100]).contains("not an ELF"));
        let mut header = std::fs::read("/proc/self/exe").unwrap();
        header.truncate(HEADER);
        assert!(error(&header).contains("past the end"));
        let changed = |at: usize, byte: u8| {
            let mut bytes = header.clone();
            bytes[at] = byte;
            error(&bytes)
        };
        assert!(changed(4, 1).contains("not 64-bit"));
        assert!(changed(5, 2).contains("big-endian"));
        assert!(changed(18, 3).contains("another processor"));
        assert!(changed(58, 63).contains("section table"));
    }

    #[test]
    fn the_loader_s_command_line_names_the_program() {
        let program = |line: &str| program_after_loader(line.replace(' ', "\0").as_bytes());
        assert_eq!(program("/lib/ld-linux.so.2 ./rank0 --json"), Some("./rank0".into()));
        let options = "ld.so --library-path /a --inhibit-cache --argv0 x rank1 -v";
        assert_eq!(program(options), Some("rank1".into()));
        assert_eq!(program("ld.so --list"), None);
        assert_eq!(program(""), None);
        assert!(is_dynamic_loader(Path::new("/lib/ld-musl-aarch64.so.1")));
        assert!(!is_dynamic_loader(Path::new("/usr/bin/ldd")));
    }
}
