//! The compiler `libnvrtc`: from CUDA C++ text to machine code, without a GPU and without a driver.
#![allow(unsafe_code)] // Calls into a C library.

use crate::error::DriverError;
use crate::library::{Library, functions};
use crate::search::SearchPath;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;

/// Newest first; packages hold versioned names only.
const NAMES: [&str; 4] = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so.11.2", "libnvrtc.so"];
/// Most bytes of compiler messages that are kept.
const MAX_LOG: usize = 8 << 10;
/// Most bytes of machine code.
const MAX_CUBIN: usize = 1 << 30;

functions! {
    /// The functions of `libnvrtc` that are used.
    Functions {
        version "nvrtcVersion" (major: *mut c_int, minor: *mut c_int);
        create "nvrtcCreateProgram" (program: *mut *mut c_void, source: *const c_char, name: *const c_char,
            headers: c_int, texts: *const *const c_char, names: *const *const c_char);
        compile "nvrtcCompileProgram" (program: *mut c_void, count: c_int, options: *const *const c_char);
        cubin_size "nvrtcGetCUBINSize" (program: *mut c_void, size: *mut usize);
        cubin "nvrtcGetCUBIN" (program: *mut c_void, code: *mut c_char);
        log_size "nvrtcGetProgramLogSize" (program: *mut c_void, size: *mut usize);
        log "nvrtcGetProgramLog" (program: *mut c_void, log: *mut c_char);
        destroy "nvrtcDestroyProgram" (program: *mut *mut c_void);
    }
}

/// An open compiler.
#[derive(Debug)]
pub struct Nvrtc {
    functions: Functions,
    version: (u32, u32),
}

/// A program of the compiler, destroyed with this.
struct Program<'a> {
    functions: &'a Functions,
    handle: *mut c_void,
}

impl Drop for Program<'_> {
    fn drop(&mut self) {
        // SAFETY: the handle came from `create` and is destroyed once. Nothing can be done about a failure.
        let _ = unsafe { self.functions.destroy(&mut self.handle) };
    }
}

fn checked((function, code): (&'static str, i32)) -> Result<(), DriverError> {
    if code == 0 {
        return Ok(());
    }
    let name = match code {
        1 => "out of memory",
        3 => "invalid input",
        5 => "invalid option",
        6 => "compilation error",
        7 => "builtin operation failure",
        _ => "error",
    };
    Err(DriverError::Call { function, code, name: name.into(), detail: String::new() })
}

impl Nvrtc {
    /// Opens the compiler.
    ///
    /// # Errors
    /// It is not there, or not usable.
    pub fn load(search: &SearchPath) -> Result<Nvrtc, DriverError> {
        let help = "install the Python package nvidia-cuda-nvrtc or the CUDA toolkit";
        let library = Library::find("the compiler libnvrtc", &NAMES, search, help)?;
        let functions = Functions::of(&library);
        let (mut major, mut minor) = (0, 0);
        // SAFETY: both point to integers that live through the call.
        checked(unsafe { functions.version(&mut major, &mut minor) }?)?;
        let version = (u32::try_from(major).unwrap_or(0), u32::try_from(minor).unwrap_or(0));
        // The compiler opens its built-in functions by name alone, which only works if they are open already.
        if let Some(folder) = library.path().parent() {
            let builtins = folder.join(format!("libnvrtc-builtins.so.{}.{}", version.0, version.1));
            if builtins.is_file() {
                // If it cannot be opened, the compiler says so with its own words.
                let _ = Library::open(&builtins);
            }
        }
        Ok(Nvrtc { functions, version })
    }

    pub fn version(&self) -> (u32, u32) {
        self.version
    }

    /// The file that was opened.
    pub fn path(&self) -> &Path {
        self.functions.path()
    }

    /// Machine code of `source` for the architecture `sm_<arch>`. Options are those of the compiler, such as
    /// `--fmad=false`.
    ///
    /// # Errors
    /// Text that does not compile, or an architecture that the compiler does not know.
    pub fn compile(&self, source: &str, arch: u32, options: &[&str]) -> Result<Vec<u8>, DriverError> {
        let nul = |_| DriverError::Compile { arch, log: "the text holds a zero byte".into() };
        let text = CString::new(source).map_err(nul)?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: the strings end with zero and live through the call; no headers are given.
        let created = unsafe {
            let none = std::ptr::null();
            self.functions.create(&mut handle, text.as_ptr(), c"kernels.cu".as_ptr(), 0, none, none)
        };
        checked(created?)?;
        let program = Program { functions: &self.functions, handle };
        let options: Vec<String> = [format!("--gpu-architecture=sm_{arch}"), "--std=c++17".into()]
            .into_iter()
            .chain(options.iter().map(|&o| o.to_owned()))
            .collect();
        let options: Vec<CString> =
            options.into_iter().map(CString::new).collect::<Result<_, _>>().map_err(nul)?;
        let pointers: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
        let count = c_int::try_from(pointers.len()).unwrap_or(0);
        // SAFETY: the program is alive, and so are `count` strings that end with zero.
        let compiled = unsafe { self.functions.compile(program.handle, count, pointers.as_ptr()) }?;
        if compiled.1 != 0 {
            let status = checked(compiled).err().map(|e| e.to_string()).unwrap_or_default();
            return Err(DriverError::Compile { arch, log: self.log(&program).unwrap_or(status) });
        }
        self.machine_code(&program)
    }

    fn machine_code(&self, program: &Program<'_>) -> Result<Vec<u8>, DriverError> {
        let mut size = 0usize;
        // SAFETY: the program is alive and compiled, `size` lives through the call.
        checked(unsafe { self.functions.cubin_size(program.handle, &mut size) }?)?;
        if size > MAX_CUBIN {
            let detail = format!(": {size} bytes of machine code");
            return Err(DriverError::Call {
                function: "nvrtcGetCUBINSize",
                code: 0,
                name: "too large".into(),
                detail,
            });
        }
        let mut code = vec![0u8; size];
        // SAFETY: there is room for as many bytes as the compiler has just said.
        checked(unsafe { self.functions.cubin(program.handle, code.as_mut_ptr().cast()) }?)?;
        Ok(code)
    }

    /// What the compiler says of the program, cut to a length that can be read.
    fn log(&self, program: &Program<'_>) -> Option<String> {
        let mut size = 0usize;
        // SAFETY: the program is alive, `size` lives through the call.
        checked(unsafe { self.functions.log_size(program.handle, &mut size) }.ok()?).ok()?;
        let mut log = vec![0u8; size.saturating_add(1)];
        // SAFETY: there is room for what the compiler has just said, and a zero.
        checked(unsafe { self.functions.log(program.handle, log.as_mut_ptr().cast()) }.ok()?).ok()?;
        let text = CStr::from_bytes_until_nul(&log).ok()?.to_bytes();
        let text = String::from_utf8_lossy(text.get(..MAX_LOG).unwrap_or(text)).trim().to_owned();
        (!text.is_empty()).then_some(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_compile_or_say_why_not() {
        let compiler = match Nvrtc::load(&SearchPath::from_environment()) {
            Ok(compiler) => compiler,
            Err(error) => {
                eprintln!("SKIPPED: {error}");
                let required = std::env::var("TPSHARD_REQUIRE").unwrap_or_default();
                assert!(required.split(',').all(|tool| tool != "nvrtc"));
                return;
            }
        };
        let source = "extern \"C\" __global__ void twice(float *x) { x[threadIdx.x] *= 2.0f; }";
        let code = compiler.compile(source, 90, &["--fmad=false"]).unwrap();
        assert!(code.starts_with(b"\x7fELF"));
        assert_eq!(code, compiler.compile(source, 90, &["--fmad=false"]).unwrap());
        let error = compiler.compile("void broken(", 90, &[]).unwrap_err();
        assert!(matches!(&error, DriverError::Compile { log, .. } if log.contains("kernels.cu")), "{error}");
        assert!(compiler.compile(source, 1, &[]).is_err());
        assert!(compiler.compile("zero \0", 90, &[]).is_err());
    }
}
