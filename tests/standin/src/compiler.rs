//! The functions of `libnvrtc`.
#![allow(unsafe_code)] // What a C library exports.

use crate::modules;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::Path;
use std::process::Command;

const SUCCESS: c_int = 0;
const INVALID_INPUT: c_int = 3;
const INVALID_OPTION: c_int = 5;
const COMPILATION: c_int = 6;

struct Program {
    source: String,
    code: Vec<u8>,
    log: Vec<u8>,
}

/// # Safety
/// As NVIDIA documents it; so are all others.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcVersion(major: *mut c_int, minor: *mut c_int) -> c_int {
    // SAFETY: by the caller, as in all functions.
    unsafe {
        major.write(12);
        minor.write(8);
    }
    SUCCESS
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcCreateProgram(
    program: *mut *mut c_void,
    source: *const c_char,
    _name: *const c_char,
    _headers: c_int,
    _texts: *const *const c_char,
    _names: *const *const c_char,
) -> c_int {
    // SAFETY: see above; the text ends with zero.
    let source = unsafe { CStr::from_ptr(source) }.to_string_lossy().into_owned();
    let made = Box::new(Program { source, code: Vec::new(), log: vec![0] });
    // SAFETY: see above.
    unsafe { program.write(Box::into_raw(made).cast()) };
    SUCCESS
}

/// The program behind a handle.
///
/// # Safety
/// The handle came from `nvrtcCreateProgram`, is not destroyed, and is used by one thread at a time.
unsafe fn behind<'a>(program: *mut c_void) -> &'a mut Program {
    // SAFETY: by the caller.
    unsafe { &mut *program.cast::<Program>() }
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcCompileProgram(
    program: *mut c_void,
    count: c_int,
    options: *const *const c_char,
) -> c_int {
    // SAFETY: see above.
    let program = unsafe { behind(program) };
    let mut arch = None;
    for at in 0..usize::try_from(count).unwrap_or(0) {
        // SAFETY: there are `count` texts that end with zero.
        let option = unsafe { CStr::from_ptr(*options.add(at)) }.to_string_lossy();
        if let Some(number) = option.strip_prefix("--gpu-architecture=sm_") {
            arch = number.parse().ok();
        }
    }
    let Some(arch) = arch else { return INVALID_OPTION };
    match compile(&program.source) {
        Ok(object) => {
            program.code = modules::wrap(&object, arch);
            SUCCESS
        }
        Err(log) => {
            program.log = log.into_bytes();
            program.log.push(0);
            COMPILATION
        }
    }
}

/// The shared object that `g++` makes of kernels.
fn compile(source: &str) -> Result<Vec<u8>, String> {
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    let text = tpshard_codegen::cuda::host_source(source);
    std::fs::write(folder.path().join("kernels.cpp"), text).map_err(|error| error.to_string())?;
    // Names without a path, so that equal text gives equal bytes.
    let mut compiler = Command::new("g++");
    compiler.current_dir(folder.path()).args(["-std=c++17", "-O1", "-w", "-ffp-contract=off"]);
    compiler.args(["-fPIC", "-shared", "-o", "kernels.so", "kernels.cpp"]);
    let output = compiler.output().map_err(|error| format!("g++: {error}"))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    std::fs::read(Path::join(folder.path(), "kernels.so")).map_err(|error| error.to_string())
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetCUBINSize(program: *mut c_void, size: *mut usize) -> c_int {
    // SAFETY: see above.
    unsafe { size.write(behind(program).code.len()) };
    SUCCESS
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetCUBIN(program: *mut c_void, code: *mut c_char) -> c_int {
    // SAFETY: there is room for as many bytes as was said.
    unsafe {
        let own = &behind(program).code;
        std::ptr::copy_nonoverlapping(own.as_ptr(), code.cast(), own.len());
    }
    SUCCESS
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetProgramLogSize(program: *mut c_void, size: *mut usize) -> c_int {
    // SAFETY: see above.
    unsafe { size.write(behind(program).log.len()) };
    SUCCESS
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetProgramLog(program: *mut c_void, log: *mut c_char) -> c_int {
    // SAFETY: there is room for as many bytes as was said.
    unsafe {
        let own = &behind(program).log;
        std::ptr::copy_nonoverlapping(own.as_ptr(), log.cast(), own.len());
    }
    SUCCESS
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcDestroyProgram(program: *mut *mut c_void) -> c_int {
    // SAFETY: see above.
    let handle = unsafe { program.replace(std::ptr::null_mut()) };
    if handle.is_null() {
        return INVALID_INPUT;
    }
    // SAFETY: made by `nvrtcCreateProgram`, destroyed once.
    drop(unsafe { Box::from_raw(handle.cast::<Program>()) });
    SUCCESS
}
