//! Machine code of the stand-in: a shared object behind a header, and how it is opened.
#![allow(unsafe_code)] // Code is run that the stand-in compiler has made.

use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::io::Write;
use std::os::fd::AsRawFd;

const MAGIC: &[u8; 16] = b"\x7fELF-of-standin\n";
/// Magic, architecture, length.
const HEADER: usize = 16 + 4 + 8;

/// A shared object as machine code for an architecture.
pub(crate) fn wrap(object: &[u8], arch: u32) -> Vec<u8> {
    let mut image = MAGIC.to_vec();
    image.extend(arch.to_le_bytes());
    image.extend((object.len() as u64).to_le_bytes());
    image.extend(object);
    image
}

type Launch =
    unsafe extern "C" fn(*const c_char, *const c_uint, *const c_uint, c_uint, *mut *mut c_void) -> c_int;

type Parameters = unsafe extern "C" fn(*const c_char) -> c_int;

/// Opened code; never closed.
pub(crate) struct Module {
    library: libloading::Library,
    launch: Launch,
    parameters: Parameters,
}

/// A kernel of a module.
pub(crate) struct Kernel {
    module: &'static Module,
    name: CString,
    /// How many arguments it takes, each of at most eight bytes.
    parameters: usize,
}

impl Module {
    /// Opens an image.
    ///
    /// # Safety
    /// The image is as long as it says, or shorter than a header and ends with a byte that the magic lacks.
    pub(crate) unsafe fn open(image: *const u8) -> Option<Module> {
        // SAFETY: by the caller; the comparison ends at the first byte that differs.
        let is_own = (0..MAGIC.len()).all(|i| unsafe { *image.add(i) } == MAGIC[i]);
        if !is_own {
            return None;
        }
        // SAFETY: images that start with the magic were made by `wrap`.
        let header = unsafe { std::slice::from_raw_parts(image, HEADER) };
        let length = u64::from_le_bytes(header[20..].try_into().ok()?);
        // SAFETY: as above.
        let object = unsafe { std::slice::from_raw_parts(image.add(HEADER), usize::try_from(length).ok()?) };
        let memory = rustix::fs::memfd_create("standin", rustix::fs::MemfdFlags::empty()).ok()?;
        let mut file = std::fs::File::from(memory);
        file.write_all(object).ok()?;
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        // SAFETY: the object holds kernels and the shim, which do nothing when opened.
        let library = unsafe { libloading::Library::new(path) }.ok()?;
        // SAFETY: the shim defines the launcher with this type.
        let launch = *unsafe { library.get::<Launch>(b"tpshard_launch") }.ok()?;
        // SAFETY: as above.
        let parameters = *unsafe { library.get::<Parameters>(b"tpshard_parameters") }.ok()?;
        // The path names this file while it is open; another module must not get the same name, which the loader would
        // take for the same file.
        std::mem::forget(file);
        Some(Module { library, launch, parameters })
    }

    pub(crate) fn kernel(&'static self, name: &std::ffi::CStr) -> Option<Kernel> {
        // SAFETY: the address is not used.
        let known = unsafe { self.library.get::<*const c_void>(name.to_bytes()) }.is_ok();
        let count = self.parameters;
        // SAFETY: the name ends with zero.
        let parameters = usize::try_from(unsafe { count(name.as_ptr()) }).ok()?;
        known.then(|| Kernel { module: self, name: name.to_owned(), parameters })
    }
}

impl Kernel {
    pub(crate) fn parameters(&self) -> usize {
        self.parameters
    }

    /// Runs the kernel to its end; false if the shim refuses.
    ///
    /// # Safety
    /// The arguments are those of the kernel, and what it reaches through them is memory.
    pub(crate) unsafe fn launch(
        &self,
        blocks: [c_uint; 3],
        threads: [c_uint; 3],
        shared: c_uint,
        arguments: *mut *mut c_void,
    ) -> bool {
        let launch = self.module.launch;
        // SAFETY: by the caller.
        unsafe { launch(self.name.as_ptr(), blocks.as_ptr(), threads.as_ptr(), shared, arguments) == 0 }
    }
}
