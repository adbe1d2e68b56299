//! What can be wrong with a tensor file.

use std::fmt::Display;
use std::io;
use std::path::Path;

/// Why tensors could not be read or written. `place` is the file, with the entry where there is one.
#[derive(Debug, thiserror::Error)]
pub enum IoError {
    #[error("{place}: {cause}")]
    System { place: String, cause: io::Error },
    #[error("{place}: {what}")]
    Invalid { place: String, what: String },
    #[error("{place}: {what}\n  help: convert it with NumPy first")]
    Unsupported { place: String, what: String },
    #[error(
        "{place}: needs {needed} bytes, the limit is {limit}\n  help: raise the limit if the file is to be trusted"
    )]
    TooLarge { place: String, needed: u64, limit: u64 },
}

impl IoError {
    pub(super) fn system(path: &Path) -> impl FnOnce(io::Error) -> IoError {
        let place = path.display().to_string();
        move |cause| IoError::System { place, cause }
    }

    pub(super) fn invalid(place: impl Display, what: impl Display) -> IoError {
        IoError::Invalid { place: place.to_string(), what: what.to_string() }
    }

    pub(super) fn unsupported(place: impl Display, what: impl Display) -> IoError {
        IoError::Unsupported { place: place.to_string(), what: what.to_string() }
    }
}
