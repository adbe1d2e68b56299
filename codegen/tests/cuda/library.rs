//! Kernel text as a library of this process.
#![allow(unsafe_code)] // Opens a library and calls into it.

use libloading::{Library, Symbol};
use std::ffi::{CString, c_char, c_int, c_longlong, c_uint, c_void};
use std::path::Path;
use std::process::Command;
use tpshard_codegen::cuda::host_source;

type Launch =
    unsafe extern "C" fn(*const c_char, *const c_uint, *const c_uint, c_uint, *mut *mut c_void) -> c_int;
type Order = unsafe extern "C" fn(c_longlong);

/// Compiled kernels.
pub(crate) struct Kernels {
    library: Library,
}

impl Kernels {
    /// Compiles `source` with `g++` below `folder`; what the compiler says if it does not take it.
    pub(crate) fn compile(source: &str, folder: &Path) -> Result<Kernels, String> {
        let (text, file) = (folder.join("kernels.cc"), folder.join("kernels.so"));
        std::fs::write(&text, host_source(source)).unwrap();
        let output = Command::new("g++")
            .args(["-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-o"])
            .args([&file, &text])
            .output()
            .expect("g++ is installed");
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        // SAFETY: the library's initialisers reserve shared memory, nothing else.
        let library = unsafe { Library::new(&file) }.map_err(|e| e.to_string())?;
        Ok(Kernels { library })
    }

    /// None: one thread a block; else fibers in the order of this seed.
    pub(crate) fn set_order(&self, seed: Option<u32>) {
        // SAFETY: a function of the shim with this type.
        unsafe {
            let order: Symbol<'_, Order> = self.library.get(b"tpshard_shim_order\0").unwrap();
            order(seed.map_or(-1, c_longlong::from));
        }
    }

    /// Runs a kernel; `arguments` point to what its parameters are.
    pub(crate) fn launch(
        &self,
        name: &str,
        grid: [u32; 3],
        threads: u32,
        shared: u32,
        arguments: &mut [*mut c_void],
    ) -> i32 {
        let name = CString::new(name).unwrap();
        let block = [threads, 1, 1];
        // SAFETY: a function of the shim with this type; pointers live through the call, and tables were checked.
        unsafe {
            let launch: Symbol<'_, Launch> = self.library.get(b"tpshard_launch\0").unwrap();
            launch(name.as_ptr(), grid.as_ptr(), block.as_ptr(), shared, arguments.as_mut_ptr())
        }
    }
}
