//! Puts a rank program into a copy of the runner: one extra section `.tpshard` that is not loaded into memory.
//!
//! Program headers and everything they map stay where they are, byte for byte. After the runner's last byte follow the
//! program at a page boundary, a copy of the section name table with one more name, and a section header table with one
//! more entry; the ELF header points there. `strip`, `objcopy` and `patchelf` keep such a section, unlike bytes that
//! merely follow the end. Equal inputs give equal bytes, and replacing a program gives what packing afresh would give.

use std::ops::Range;

/// The name of the section that holds a rank's program.
pub const SECTION: &str = ".tpshard";

/// The program starts at a multiple of this in the file.
pub const PAGE: usize = 4096;

const HEADER: usize = 64;
const SECTION_HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const NO_BITS: u32 = 8;
const PROGRAM_BITS: u32 = 1;

/// Why a runner cannot take a program.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ElfError {
    #[error(
        "{what}\nhelp: a runner is a 64-bit little-endian ELF executable for x86-64 or aarch64 (--runner FILE)"
    )]
    Unsupported { what: &'static str },
    #[error("the runner is damaged: {what}\nhelp: install tpshard again, or name another file with --runner")]
    Corrupt { what: &'static str },
    #[error(
        "the runner has no section table, so a program cannot be found in it\n\
         help: `strip` without --strip-section-headers keeps it; executable packers remove it"
    )]
    NoSections,
    #[error("the runner has {count} sections, one more does not fit")]
    TooManySections { count: usize },
}

/// A copy of the executable `runner` that holds `program`, in place of the program it may hold already.
///
/// # Errors
/// `runner` is not an executable this understands.
pub fn with_program(runner: &[u8], program: &[u8]) -> Result<Vec<u8>, ElfError> {
    let elf = Elf::read(runner)?;
    let old = elf.find(SECTION);
    let (names, name) = elf.names_with(SECTION, old)?;
    let start = elf.free_from(old).next_multiple_of(PAGE);

    let mut out =
        Vec::with_capacity(start + program.len() + names.len() + elf.table.len() + 3 * SECTION_HEADER);
    out.extend_from_slice(runner.get(..start.min(runner.len())).unwrap_or(runner));
    out.resize(start, 0);
    out.extend_from_slice(program);
    let names_at = out.len();
    out.extend_from_slice(&names);
    out.resize(out.len().next_multiple_of(8), 0);
    let table_at = out.len();

    let mut sections = elf.sections.clone();
    if let Some(section) = sections.get_mut(elf.names) {
        section.offset = names_at as u64;
        section.size = names.len() as u64;
    }
    let new = Section { name, kind: PROGRAM_BITS, offset: start as u64, size: program.len() as u64 };
    match old.and_then(|index| sections.get_mut(index)) {
        Some(section) => *section = new,
        None => sections.push(new),
    }
    for (index, section) in sections.iter().enumerate() {
        out.extend_from_slice(&section.header(elf.header(index), section == &new));
    }
    patch(&mut out, 40, &(table_at as u64).to_le_bytes());
    patch(&mut out, 60, &(sections.len() as u16).to_le_bytes());
    Ok(out)
}

/// The program that `executable` holds, if it holds one.
///
/// # Errors
/// `executable` is not an executable this understands.
pub fn program(executable: &[u8]) -> Result<Option<&[u8]>, ElfError> {
    let elf = Elf::read(executable)?;
    let section = elf.find(SECTION).and_then(|index| elf.sections.get(index));
    Ok(section.and_then(|section| executable.get(section.range())))
}

/// The fields of a section header that packing reads or changes.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Section {
    name: u32,
    kind: u32,
    offset: u64,
    size: u64,
}

impl Section {
    fn read(header: &[u8]) -> Section {
        Section {
            name: le32(header, 0),
            kind: le32(header, 4),
            offset: le64(header, 24),
            size: le64(header, 32),
        }
    }

    /// Its bytes in the file; checked by [`Elf::read`] to lie within it.
    fn range(&self) -> Range<usize> {
        let size = if self.kind == NO_BITS { 0 } else { self.size as usize };
        self.offset as usize..(self.offset as usize).saturating_add(size)
    }

    /// The header as bytes: `original` with the fields changed here, or all of it for the program section.
    fn header(&self, original: &[u8], is_program: bool) -> [u8; SECTION_HEADER] {
        let mut header = [0; SECTION_HEADER];
        if is_program {
            patch(&mut header, 48, &(PAGE as u64).to_le_bytes());
        } else {
            patch(&mut header, 0, original);
        }
        patch(&mut header, 0, &self.name.to_le_bytes());
        patch(&mut header, 4, &self.kind.to_le_bytes());
        patch(&mut header, 24, &self.offset.to_le_bytes());
        patch(&mut header, 32, &self.size.to_le_bytes());
        header
    }
}

/// An executable whose tables have been checked to lie within it.
struct Elf<'a> {
    bytes: &'a [u8],
    /// The section header table.
    table: &'a [u8],
    table_end: usize,
    sections: Vec<Section>,
    /// Which section holds the names.
    names: usize,
    /// End of the ELF header, the program headers and all they map.
    loaded: usize,
}

impl<'a> Elf<'a> {
    fn read(bytes: &'a [u8]) -> Result<Elf<'a>, ElfError> {
        let header = bytes
            .get(..HEADER)
            .ok_or(ElfError::Unsupported { what: "the runner is not an ELF executable" })?;
        check_identity(header)?;
        let count = usize::from(le16(header, 60));
        let table_at = le64(header, 40);
        if table_at == 0 || count == 0 {
            return Err(ElfError::NoSections);
        }
        // Indices from 0xff00 are reserved, and counts beyond are written elsewhere.
        if count >= 0xff00 - 1 {
            return Err(ElfError::TooManySections { count });
        }
        let names = usize::from(le16(header, 62));
        if usize::from(le16(header, 58)) != SECTION_HEADER || names == 0 || names >= count {
            return Err(ElfError::Corrupt { what: "its header does not describe a section table" });
        }
        let past_end = ElfError::Corrupt { what: "its section table reaches past the end" };
        let range = within(bytes, table_at, (count * SECTION_HEADER) as u64).ok_or(past_end)?;
        let table_end = range.end;
        let table = bytes.get(range).unwrap_or_default();
        let sections: Vec<Section> = table.chunks_exact(SECTION_HEADER).map(Section::read).collect();
        for section in sections.iter().filter(|section| section.kind != NO_BITS) {
            within(bytes, section.offset, section.size)
                .ok_or(ElfError::Corrupt { what: "a section reaches past its end" })?;
        }
        let loaded = loaded_end(bytes, header)?;
        Ok(Elf { bytes, table, table_end, sections, names, loaded })
    }

    fn header(&self, index: usize) -> &'a [u8] {
        self.table.chunks_exact(SECTION_HEADER).nth(index).unwrap_or_default()
    }

    fn name_table(&self) -> &'a [u8] {
        self.sections.get(self.names).and_then(|names| self.bytes.get(names.range())).unwrap_or_default()
    }

    fn find(&self, name: &str) -> Option<usize> {
        let names = self.name_table();
        self.sections.iter().position(|section| {
            let rest = names.get(section.name as usize..).unwrap_or_default();
            rest.strip_prefix(name.as_bytes()).is_some_and(|rest| rest.first() == Some(&0))
        })
    }

    /// The name table with `name` in it, and where in it `name` is.
    fn names_with(&self, name: &str, old: Option<usize>) -> Result<(Vec<u8>, u32), ElfError> {
        let mut names = self.name_table().to_vec();
        if names.is_empty() || names.last() != Some(&0) {
            return Err(ElfError::Corrupt { what: "its section names do not end" });
        }
        if let Some(section) = old.and_then(|index| self.sections.get(index)) {
            return Ok((names, section.name));
        }
        let at = u32::try_from(names.len())
            .map_err(|_| ElfError::Corrupt { what: "its section names are too long" })?;
        names.extend_from_slice(name.as_bytes());
        names.push(0);
        Ok((names, at))
    }

    /// The offset from which on nothing in the file is needed any more: the old program, name table and section table
    /// are written anew, bytes after the last of everything that the file describes are kept.
    fn free_from(&self, old: Option<usize>) -> usize {
        let needed = self
            .sections
            .iter()
            .enumerate()
            .filter(|&(index, section)| index != self.names && Some(index) != old && section.kind != NO_BITS)
            .map(|(_, section)| section.range().end)
            .fold(self.loaded, usize::max);
        let rewritten = [Some(self.names), old];
        let described = rewritten
            .into_iter()
            .flatten()
            .filter_map(|index| self.sections.get(index))
            .map(|section| section.range().end)
            .fold(needed.max(self.table_end), usize::max);
        if described < self.bytes.len() {
            return self.bytes.len();
        }
        match old.and_then(|index| self.sections.get(index)) {
            // Whatever precedes our own program was kept when it was put there, and is kept again.
            Some(section) => needed.max(section.offset as usize),
            None => needed,
        }
    }
}

fn check_identity(header: &[u8]) -> Result<(), ElfError> {
    const X86_64: u16 = 62;
    const AARCH64: u16 = 183;
    let unsupported = |what| Err(ElfError::Unsupported { what });
    match header {
        [0x7f, b'E', b'L', b'F', 2, 1, ..] => match le16(header, 18) {
            X86_64 | AARCH64 => Ok(()),
            _ => unsupported("the runner is for another processor"),
        },
        [0x7f, b'E', b'L', b'F', 2, ..] => unsupported("the runner is big-endian"),
        [0x7f, b'E', b'L', b'F', ..] => unsupported("the runner is not 64-bit"),
        _ => unsupported("the runner is not an ELF executable"),
    }
}

/// The end of the ELF header, the program headers and every segment.
fn loaded_end(bytes: &[u8], header: &[u8]) -> Result<usize, ElfError> {
    let count = usize::from(le16(header, 56));
    if count > 0 && usize::from(le16(header, 54)) != PROGRAM_HEADER {
        return Err(ElfError::Corrupt { what: "its program headers have an unknown size" });
    }
    let table = within(bytes, le64(header, 32), (count * PROGRAM_HEADER) as u64)
        .ok_or(ElfError::Corrupt { what: "its program headers reach past the end" })?;
    let mut end = table.end.max(HEADER);
    for segment in bytes.get(table).unwrap_or_default().chunks_exact(PROGRAM_HEADER) {
        let range = within(bytes, le64(segment, 8), le64(segment, 32))
            .ok_or(ElfError::Corrupt { what: "a segment reaches past its end" })?;
        end = end.max(range.end);
    }
    Ok(end)
}

fn within(bytes: &[u8], offset: u64, size: u64) -> Option<Range<usize>> {
    let end = offset.checked_add(size).filter(|&end| end <= bytes.len() as u64)?;
    Some(offset as usize..end as usize)
}

/// Overwrites bytes of `out` from `at`; what does not fit is left out.
fn patch(out: &mut [u8], at: usize, field: &[u8]) {
    out.iter_mut().skip(at).zip(field).for_each(|(byte, &new)| *byte = new);
}

// Headers have full length where these are used; a missing byte would read as zero.
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
