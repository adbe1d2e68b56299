//! The payload of a rank executable: a few named byte strings behind one validated table.
//!
//! The section `.tpshard` of a rank executable holds exactly one container: the rank program, its kernel text, its
//! cubins. A reader trusts nothing before [`decode`] returned: magic, version, bounds, order, padding and every hash are
//! checked first, so that code behind it never meets a truncated or altered part.
//!
//! All integers are little-endian.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic `TPSHARD\0` |
//! | 8 | 4 | format version |
//! | 12 | 4 | number of parts |
//! | 16 | 8 | length of the whole container |
//! | 24 | 8 | length of the table |
//! | 32 | 32 | SHA-256 of bytes 0..32 and the table |
//! | 64 | … | table: per part offset u64, length u64, SHA-256, name length u32, name |
//! | … | … | parts in table order, each at the next multiple of 64, gaps zero |
//!
//! The table holds the hash of each part, so the hash in the header covers everything and each byte is hashed once.

use sha2::{Digest, Sha256};
use std::collections::BTreeSet;

/// The first bytes of every container.
pub const MAGIC: [u8; 8] = *b"TPSHARD\0";
/// The format version [`encode`] writes.
pub const VERSION: u32 = 1;
/// The oldest format version [`decode`] accepts: the one before [`VERSION`], once there is one.
pub const OLDEST_VERSION: u32 = if VERSION > 1 { VERSION - 1 } else { 1 };
/// Most parts a container may hold.
pub const MAX_PARTS: usize = 4096;
/// Longest part name in bytes.
pub const MAX_NAME: usize = 255;
/// Parts start at multiples of this.
pub const ALIGNMENT: u64 = 64;

const HEADER: usize = 64;
const HASHED_HEADER: usize = 32;
const HASH: usize = 32;

/// Why bytes are not a container, or parts cannot become one.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ContainerError {
    #[error(
        "the program section does not start with the mark of a tpshard program\nhelp: build the rank again"
    )]
    Magic,
    #[error(
        "the program section has format version {found}, this runner reads {OLDEST_VERSION} to {VERSION}\n\
         help: `tpshard rewrap` puts in a matching runner"
    )]
    Version { found: u32 },
    #[error(
        "the program section ends early: {needed} bytes needed for {what}, {found} present\n\
         help: the file was cut off; copy or build it again"
    )]
    Truncated { what: &'static str, needed: u64, found: u64 },
    #[error("the program section is damaged: {what}\nhelp: copy or build the file again")]
    Corrupt { what: String },
    #[error(
        "part `{part}` of the program section does not match its hash\nhelp: copy or build the file again"
    )]
    PartHash { part: String },
    #[error("{found} parts, at most {MAX_PARTS} fit into one program section")]
    TooManyParts { found: u64 },
    #[error("`{name}` cannot name a part: 1 to {MAX_NAME} bytes without control characters are allowed")]
    Name { name: String },
    #[error("two parts are named `{name}`")]
    Duplicate { name: String },
}

/// One named part of a decoded container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part<'a> {
    pub name: &'a str,
    pub bytes: &'a [u8],
    pub sha256: [u8; HASH],
}

/// A container whose every byte has been checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Payload<'a> {
    version: u32,
    hash: [u8; HASH],
    parts: Vec<Part<'a>>,
}

impl<'a> Payload<'a> {
    /// The format version it was written with.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The hash of the whole container: equal exactly when all parts and their names and order are.
    pub fn hash(&self) -> [u8; HASH] {
        self.hash
    }

    /// All parts in the order they were written.
    pub fn parts(&self) -> &[Part<'a>] {
        &self.parts
    }

    /// The bytes of the part called `name`.
    pub fn part(&self, name: &str) -> Option<&'a [u8]> {
        self.parts.iter().find(|part| part.name == name).map(|part| part.bytes)
    }
}

/// Writes `parts` (name, bytes) as a container. Equal parts give equal bytes.
///
/// # Errors
/// Too many parts, a bad name, or two equal names.
pub fn encode(parts: &[(&str, &[u8])]) -> Result<Vec<u8>, ContainerError> {
    if parts.len() > MAX_PARTS {
        return Err(ContainerError::TooManyParts { found: parts.len() as u64 });
    }
    let mut names = BTreeSet::new();
    for &(name, _) in parts {
        check_name(name)?;
        if !names.insert(name) {
            return Err(ContainerError::Duplicate { name: name.into() });
        }
    }
    let table_length: usize = parts.iter().map(|(name, _)| 8 + 8 + HASH + 4 + name.len()).sum();
    let mut table = Vec::with_capacity(table_length);
    let mut end = (HEADER + table_length) as u64;
    for &(name, bytes) in parts {
        let offset = end.next_multiple_of(ALIGNMENT);
        end = offset + bytes.len() as u64;
        table.extend_from_slice(&offset.to_le_bytes());
        table.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
        table.extend_from_slice(&Sha256::digest(bytes));
        table.extend_from_slice(&(name.len() as u32).to_le_bytes());
        table.extend_from_slice(name.as_bytes());
    }
    let mut out = Vec::with_capacity(end as usize);
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&(parts.len() as u32).to_le_bytes());
    out.extend_from_slice(&end.to_le_bytes());
    out.extend_from_slice(&(table_length as u64).to_le_bytes());
    out.extend_from_slice(&table_hash(&out, &table));
    out.extend_from_slice(&table);
    for (_, bytes) in parts {
        out.resize(out.len().next_multiple_of(ALIGNMENT as usize), 0);
        out.extend_from_slice(bytes);
    }
    Ok(out)
}

/// Reads a container, checking everything before returning any of it.
///
/// # Errors
/// What is wrong with the bytes, and what to do about it.
pub fn decode(bytes: &[u8]) -> Result<Payload<'_>, ContainerError> {
    let mut header = Reader { bytes, at: 0 };
    if header.array::<8>("the magic")? != MAGIC {
        return Err(ContainerError::Magic);
    }
    let version = header.u32("the version")?;
    if !(OLDEST_VERSION..=VERSION).contains(&version) {
        return Err(ContainerError::Version { found: version });
    }
    let count = header.u32("the part count")? as usize;
    let length = header.u64("the length")?;
    let table_length = header.u64("the table length")?;
    let hash = header.array::<HASH>("the hash")?;
    let found = bytes.len() as u64;
    if found < length {
        return Err(ContainerError::Truncated { what: "the container", needed: length, found });
    }
    if found > length {
        return Err(corrupt(format!("{} bytes follow its end", found - length)));
    }
    if count > MAX_PARTS {
        return Err(ContainerError::TooManyParts { found: count as u64 });
    }
    let table = usize::try_from(table_length)
        .ok()
        .and_then(|n| bytes.get(HEADER..HEADER.checked_add(n)?))
        .ok_or(ContainerError::Truncated { what: "the table", needed: table_length, found })?;
    if table_hash(header.prefix(HASHED_HEADER), table) != hash {
        return Err(corrupt("its table does not match its hash".into()));
    }
    let parts = read_parts(bytes, table, count)?;
    Ok(Payload { version, hash, parts })
}

/// Reads the table and the parts it names; they must tile the rest of the container exactly.
fn read_parts<'a>(bytes: &'a [u8], table: &'a [u8], count: usize) -> Result<Vec<Part<'a>>, ContainerError> {
    let mut reader = Reader { bytes: table, at: 0 };
    let mut names = BTreeSet::new();
    let mut parts = Vec::with_capacity(count);
    let mut end = HEADER + table.len();
    for _ in 0..count {
        let offset = reader.u64("a part's offset")?;
        let length = reader.u64("a part's length")?;
        let sha256 = reader.array::<HASH>("a part's hash")?;
        let name_length = reader.u32("a part's name length")? as usize;
        let name = std::str::from_utf8(reader.take(name_length, "a part's name")?)
            .map_err(|_| corrupt("a part's name is not UTF-8".into()))?;
        check_name(name)?;
        if !names.insert(name) {
            return Err(ContainerError::Duplicate { name: name.into() });
        }
        let start = end.next_multiple_of(ALIGNMENT as usize);
        if offset != start as u64 {
            return Err(corrupt(format!("part `{name}` is at byte {offset}, its place is {start}")));
        }
        let part = usize::try_from(length)
            .ok()
            .and_then(|n| bytes.get(start..start.checked_add(n)?))
            .ok_or_else(|| corrupt(format!("part `{name}` reaches past the end")))?;
        if bytes.get(end..start).is_none_or(|gap| gap.iter().any(|&byte| byte != 0)) {
            return Err(corrupt(format!("the bytes before part `{name}` are not zero")));
        }
        if <[u8; HASH]>::from(Sha256::digest(part)) != sha256 {
            return Err(ContainerError::PartHash { part: name.into() });
        }
        end = start + part.len();
        parts.push(Part { name, bytes: part, sha256 });
    }
    if reader.at != table.len() || end != bytes.len() {
        return Err(corrupt("its table does not describe all of it".into()));
    }
    Ok(parts)
}

fn corrupt(what: String) -> ContainerError {
    ContainerError::Corrupt { what }
}

fn check_name(name: &str) -> Result<(), ContainerError> {
    if name.is_empty() || name.len() > MAX_NAME || name.chars().any(char::is_control) {
        let name = name.chars().take(MAX_NAME).flat_map(char::escape_default).collect();
        return Err(ContainerError::Name { name });
    }
    Ok(())
}

fn table_hash(header: &[u8], table: &[u8]) -> [u8; HASH] {
    Sha256::new().chain_update(header).chain_update(table).finalize().into()
}

/// Takes fields off the front of a byte string, never past its end.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize, what: &'static str) -> Result<&'a [u8], ContainerError> {
        let end = self.at.saturating_add(length);
        let taken = self.bytes.get(self.at..end).ok_or(ContainerError::Truncated {
            what,
            needed: end as u64,
            found: self.bytes.len() as u64,
        })?;
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], ContainerError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N, what)?);
        Ok(out)
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, ContainerError> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &'static str) -> Result<u64, ContainerError> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// The first `length` bytes, fewer if there are not as many.
    fn prefix(&self, length: usize) -> &'a [u8] {
        self.bytes.get(..length).unwrap_or(self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        encode(&[("program", b"ops"), ("kernels.cu", &[7; 100]), ("empty", b"")]).unwrap()
    }

    #[test]
    fn parts_come_back_in_order_and_aligned() {
        let bytes = sample();
        let payload = decode(&bytes).unwrap();
        assert_eq!(payload.version(), VERSION);
        let names: Vec<&str> = payload.parts().iter().map(|part| part.name).collect();
        assert_eq!(names, ["program", "kernels.cu", "empty"]);
        assert_eq!(payload.part("program"), Some(&b"ops"[..]));
        assert_eq!(payload.part("kernels.cu"), Some(&[7; 100][..]));
        assert_eq!(payload.part("empty"), Some(&b""[..]));
        assert_eq!(payload.part("absent"), None);
        assert_eq!(bytes, sample());
        assert!(decode(&encode(&[]).unwrap()).unwrap().parts().is_empty());
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let good = sample();
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                assert!(decode(&bad).is_err(), "byte {at} bit {bit}");
            }
        }
    }

    #[test]
    fn every_cut_and_every_addition_is_noticed() {
        let good = sample();
        for length in 0..good.len() {
            assert!(decode(&good[..length]).is_err(), "{length} bytes");
        }
        let mut longer = good;
        longer.push(0);
        assert!(matches!(decode(&longer), Err(ContainerError::Corrupt { .. })));
    }

    #[test]
    fn other_versions_are_named() {
        let mut bytes = sample();
        bytes[8..12].copy_from_slice(&(VERSION + 1).to_le_bytes());
        assert_eq!(decode(&bytes), Err(ContainerError::Version { found: VERSION + 1 }));
        assert_eq!(decode(b"\x7fELF\x02\x01\x01\0"), Err(ContainerError::Magic));
    }

    /// Changes the table behind the header's back and makes the hash in the header fit again.
    fn rehashed(change: impl Fn(&mut Vec<u8>)) -> Vec<u8> {
        let mut bytes = sample();
        change(&mut bytes);
        let length = u64::from_le_bytes(bytes[24..32].try_into().unwrap()) as usize;
        let table = bytes.get(HEADER..HEADER.saturating_add(length)).unwrap_or_default();
        let hash = table_hash(&bytes[..HASHED_HEADER], table);
        bytes[32..64].copy_from_slice(&hash);
        bytes
    }

    #[test]
    fn a_lying_table_is_refused_although_its_hash_fits() {
        type Lie<'a> = &'a dyn Fn(&mut Vec<u8>);
        let lies: [Lie<'_>; 7] = [
            &|b| b[HEADER..HEADER + 8].copy_from_slice(&0u64.to_le_bytes()),
            &|b| b[HEADER..HEADER + 8].copy_from_slice(&u64::MAX.to_le_bytes()),
            &|b| b[HEADER + 8..HEADER + 16].copy_from_slice(&u64::MAX.to_le_bytes()),
            &|b| b[HEADER + 48..HEADER + 52].copy_from_slice(&u32::MAX.to_le_bytes()),
            &|b| b[12..16].copy_from_slice(&2u32.to_le_bytes()),
            &|b| b[12..16].copy_from_slice(&u32::MAX.to_le_bytes()),
            &|b| b[24..32].copy_from_slice(&u64::MAX.to_le_bytes()),
        ];
        for (index, lie) in lies.iter().enumerate() {
            assert!(decode(&rehashed(lie)).is_err(), "lie {index}");
        }
        assert!(decode(&rehashed(|_| {})).is_ok());
    }

    #[test]
    fn bad_names_are_refused() {
        let long = "x".repeat(MAX_NAME + 1);
        for name in ["", "a\nb", long.as_str()] {
            assert!(matches!(encode(&[(name, b"")]), Err(ContainerError::Name { .. })));
        }
        let twice = encode(&[("a", b""), ("a", b"")]);
        assert_eq!(twice, Err(ContainerError::Duplicate { name: "a".into() }));
        let names: Vec<String> = (0..=MAX_PARTS).map(|i| i.to_string()).collect();
        let parts: Vec<(&str, &[u8])> = names.iter().map(|name| (name.as_str(), &b""[..])).collect();
        assert!(matches!(encode(&parts), Err(ContainerError::TooManyParts { .. })));
        assert!(encode(&parts[1..]).is_ok());
    }
}
