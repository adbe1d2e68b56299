//! A shared library with a table of functions, each of which may be missing.
#![allow(unsafe_code)] // Opening a library runs its initialisers, and what its symbols are cannot be checked.

use crate::error::DriverError;
use crate::search::SearchPath;
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};

/// An open library. It is never closed: threads that it started may still run.
#[derive(Debug)]
pub(crate) struct Library {
    handle: ManuallyDrop<libloading::Library>,
    path: PathBuf,
}

impl Library {
    /// The first of `names` that is found along `search`, and at last by name alone.
    pub(crate) fn find(
        library: &'static str,
        names: &[&str],
        search: &SearchPath,
        help: &'static str,
    ) -> Result<Library, DriverError> {
        let mut reasons = String::new();
        let mut places: Vec<String> = Vec::new();
        for folder in search.existing() {
            for path in names.iter().map(|name| folder.join(name)).filter(|path| path.is_file()) {
                match Library::open(&path) {
                    Ok(found) => return Ok(found),
                    Err(error) => reasons.push_str(&format!("; {}: {error}", path.display())),
                }
            }
            places.push(folder.display().to_string());
        }
        if let Some(found) = names.iter().find_map(|name| Library::open(Path::new(name)).ok()) {
            return Ok(found);
        }
        let places = if places.is_empty() { "no folder".to_owned() } else { places.join(", ") };
        Err(DriverError::NotFound { library, names: names.join(", "), places, reasons, help })
    }

    pub(crate) fn open(path: &Path) -> Result<Library, String> {
        // SAFETY: the libraries asked for are NVIDIA's, whose initialisers may be run at any time on any thread.
        let opened = unsafe { libloading::Library::new(path) };
        let handle = opened.map_err(|error| error.to_string())?;
        Ok(Library { handle: ManuallyDrop::new(handle), path: path.to_path_buf() })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The function `symbol`, if there is one.
    ///
    /// # Safety
    /// `F` is the type of the function that NVIDIA documents under this name.
    pub(crate) unsafe fn function<F: Copy>(&self, symbol: &'static str) -> Option<F> {
        // SAFETY: by the caller; the library is never closed, so that the pointer stays valid.
        unsafe { self.handle.get::<F>(symbol.as_bytes()) }.ok().map(|found| *found)
    }
}

/// Declares a table of functions of a library: all return a status, all may be missing.
macro_rules! functions {
    ($(#[$doc:meta])* $table:ident { $($name:ident $symbol:literal ($($arg:ident: $ty:ty),*);)* }) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub(crate) struct $table {
            path: std::path::PathBuf,
            $($name: Option<unsafe extern "C" fn($($ty),*) -> i32>,)*
        }

        impl $table {
            pub(crate) fn of(library: &$crate::library::Library) -> $table {
                $table {
                    path: library.path().to_path_buf(),
                    // SAFETY: the types are those of NVIDIA's headers, which keep functions of a name as they are.
                    $($name: unsafe { library.function($symbol) },)*
                }
            }

            pub(crate) fn path(&self) -> &std::path::Path {
                &self.path
            }

            $(
                /// Calls the function; gives its name and status.
                ///
                /// # Safety
                /// As its documentation demands of the arguments.
                #[allow(clippy::too_many_arguments, reason = "as many as NVIDIA's functions have")]
                pub(crate) unsafe fn $name(
                    &self,
                    $($arg: $ty),*
                ) -> Result<(&'static str, i32), $crate::DriverError> {
                    let function = self.$name.ok_or_else(|| $crate::DriverError::Symbol {
                        library: self.path.clone(),
                        symbol: $symbol,
                    })?;
                    // SAFETY: by the caller.
                    Ok(($symbol, unsafe { function($($arg),*) }))
                }
            )*
        }
    };
}
pub(crate) use functions;
