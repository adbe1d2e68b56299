//! Machine code that was compiled at an earlier start, in the user's folder for such: `$XDG_CACHE_HOME/tpshard`, else
//! `~/.cache/tpshard`.
//!
//! A file is found by a hash of everything that decided its bytes, and begins with a hash of them. Whatever goes wrong
//! with the folder only means that code is compiled again.

use sha2::{Digest, Sha256};
use std::path::PathBuf;

/// Changes when what is compiled, or how, changes in ways that the key does not hold.
const VERSION: &str = "tpshard cubin 1";
const HASH: usize = 32;

/// What a piece of code was made of.
pub(super) struct Key(String);

impl Key {
    pub(super) fn new(source: &str, arch: u32, compiler: (u32, u32)) -> Key {
        let mut hash = Sha256::new();
        for part in [VERSION, &arch.to_string(), &format!("{}.{}", compiler.0, compiler.1), source] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part.as_bytes());
        }
        Key(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    fn file(&self, folder: &std::path::Path) -> PathBuf {
        folder.join(format!("{}.cubin", self.0))
    }

    /// The code, if it is there whole.
    pub(super) fn read(&self, folder: &std::path::Path) -> Option<Vec<u8>> {
        let held = std::fs::read(self.file(folder)).ok()?;
        let (hash, code) = held.split_at_checked(HASH)?;
        (Sha256::digest(code).as_slice() == hash).then(|| code.to_vec())
    }

    /// Keeps the code if that is possible: it appears whole or not at all.
    pub(super) fn write(&self, folder: &std::path::Path, code: &[u8]) {
        let temporary = folder.join(format!(".{}.{}", self.0, std::process::id()));
        let whole = [Sha256::digest(code).as_slice(), code].concat();
        let kept = std::fs::create_dir_all(folder)
            .and_then(|()| std::fs::write(&temporary, whole))
            .and_then(|()| std::fs::rename(&temporary, self.file(folder)));
        if kept.is_err() {
            let _ = std::fs::remove_file(&temporary);
        }
    }
}

/// The folder, if the environment names one.
pub(super) fn folder() -> Option<PathBuf> {
    let absolute = |path: PathBuf| path.is_absolute().then_some(path);
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from).and_then(absolute);
    let base = variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")))?;
    Some(base.join("tpshard"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_comes_back_unless_it_was_damaged() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("below");
        let key = Key::new("text", 90, (12, 9));
        assert_eq!(key.read(&place), None);
        key.write(&place, b"code");
        assert_eq!(key.read(&place).as_deref(), Some(&b"code"[..]));
        for other in
            [Key::new("text ", 90, (12, 9)), Key::new("text", 80, (12, 9)), Key::new("text", 90, (13, 0))]
        {
            assert_eq!(other.read(&place), None);
        }
        let file = key.file(&place);
        let mut bytes = std::fs::read(&file).unwrap();
        bytes.pop();
        std::fs::write(&file, &bytes).unwrap();
        assert_eq!(key.read(&place), None);
        std::fs::write(&file, b"short").unwrap();
        assert_eq!(key.read(&place), None);
        // A folder that cannot be written is no error.
        std::fs::write(folder.path().join("file"), b"").unwrap();
        key.write(&folder.path().join("file"), b"code");
    }
}
