//! Foreign pointers, and what may be believed of them: the header says what callers must give, and everything else that
//! can be seen (null, alignment, sizes, text that is not UTF-8) is checked here.
#![allow(unsafe_code)] // Pointers come from C.

use crate::dtype::dtype;
use crate::fail::{Fail, Outcome};
use crate::open::Options;
use crate::tensors::CTensor;
use std::collections::BTreeMap;
use std::ffi::{CStr, OsStr, c_char};
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use tpshard_ir::Tensor;
use tpshard_ir::tensor::element_count;

/// More dims than any tensor has.
const MOST_DIMS: i32 = 64;

fn checked<T>(pointer: *const T, what: &str) -> Outcome<()> {
    if pointer.is_null() {
        return Err(Fail::usage(format!("{what} is NULL\n  help: see tpshard.h for what may be NULL")));
    }
    if !pointer.is_aligned() {
        return Err(Fail::usage(format!("{what} is not aligned as its type is")));
    }
    Ok(())
}

/// What a pointer points to.
///
/// # Safety
/// If it is neither null nor misaligned, it points to a `T` that nobody changes or frees during `'a`.
pub(crate) unsafe fn shared<'a, T>(pointer: *const T, what: &str) -> Outcome<&'a T> {
    checked(pointer, what)?;
    // SAFETY: not null and aligned; the rest is the caller's promise.
    Ok(unsafe { &*pointer })
}

/// Where a result goes.
///
/// # Safety
/// If it is neither null nor misaligned, it points to room for a `T` that nobody else uses during `'a`.
pub(crate) unsafe fn out<'a, T>(pointer: *mut T, what: &str) -> Outcome<&'a mut MaybeUninit<T>> {
    checked(pointer, what)?;
    // SAFETY: not null and aligned; `MaybeUninit` asks for nothing more than room.
    Ok(unsafe { &mut *pointer.cast::<MaybeUninit<T>>() })
}

/// `count` values; null is none.
///
/// # Safety
/// If the pointer is neither null nor misaligned, it points to as many `T`, which nobody changes or frees during `'a`.
pub(crate) unsafe fn slice<'a, T>(pointer: *const T, count: u64, what: &str) -> Outcome<&'a [T]> {
    if count == 0 {
        return Ok(&[]);
    }
    checked(pointer, what)?;
    let count = usize::try_from(count).ok().filter(|count| {
        count.checked_mul(size_of::<T>()).is_some_and(|bytes| isize::try_from(bytes).is_ok())
    });
    let count = count.ok_or_else(|| Fail::usage(format!("{what} has more elements than memory holds")))?;
    // SAFETY: not null, aligned, and no larger than an object can be; the rest is the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts(pointer, count) })
}

/// Text that ends in a zero.
///
/// # Safety
/// If the pointer is not null, it points to such text, which nobody changes or frees during `'a`.
pub(crate) unsafe fn text<'a>(pointer: *const c_char, what: &str) -> Outcome<&'a str> {
    checked(pointer, what)?;
    // SAFETY: not null; that it ends is the caller's promise.
    let text = unsafe { CStr::from_ptr(pointer) };
    text.to_str().map_err(|_| Fail::usage(format!("{what} is not UTF-8: {}", text.to_string_lossy())))
}

/// A path, which need not be UTF-8.
///
/// # Safety
/// As [`text`].
pub(crate) unsafe fn path<'a>(pointer: *const c_char, what: &str) -> Outcome<&'a Path> {
    checked(pointer, what)?;
    // SAFETY: not null; that it ends is the caller's promise.
    let text = unsafe { CStr::from_ptr(pointer) };
    Ok(Path::new(OsStr::from_bytes(text.to_bytes())))
}

/// The options, or the default ones for null. Later versions may know more options than this one: those must be zero.
///
/// # Safety
/// If the pointer is neither null nor misaligned, it points to as many bytes as its first field says.
pub(crate) unsafe fn options(pointer: *const Options) -> Outcome<Options> {
    if pointer.is_null() {
        return Ok(Options::default());
    }
    checked(pointer, "options")?;
    let own = size_of::<Options>() as u64;
    // SAFETY: the first field is there in every version.
    let size = unsafe { *pointer.cast::<u64>() };
    if size < own || size > 1 << 16 {
        return Err(Fail::usage(format!(
            "options.size is {size}, not {own}\n  help: set it to sizeof(tpshard_options)"
        )));
    }
    // SAFETY: the caller says that so many bytes are there, and bytes are always aligned.
    let bytes = unsafe { slice(pointer.cast::<u8>(), size, "options")? };
    if bytes.iter().skip(size_of::<Options>()).any(|&byte| byte != 0) {
        return Err(Fail::usage(
            "options that this version does not know are set\n  help: use the header of the library",
        ));
    }
    // SAFETY: at least so many bytes are there, and numbers have no wrong bits.
    Ok(unsafe { *pointer })
}

/// Named tensors, copied.
///
/// # Safety
/// As [`slice`], for the tensors, and for what each of them points to.
pub(crate) unsafe fn tensors(pointer: *const CTensor, count: u64) -> Outcome<BTreeMap<String, Tensor>> {
    let mut all = BTreeMap::new();
    // SAFETY: the caller's promise.
    for (index, tensor) in unsafe { slice(pointer, count, "inputs")? }.iter().enumerate() {
        // SAFETY: the caller's promise.
        let name = unsafe { text(tensor.name, &format!("the name of input {index}"))? };
        // SAFETY: the caller's promise.
        let copy = unsafe { copy(tensor) };
        let copy =
            copy.map_err(|fail| Fail { message: format!("input `{name}`: {}", fail.message), ..fail })?;
        if all.insert(name.to_owned(), copy).is_some() {
            return Err(Fail::usage(format!("input `{name}` is given twice\n  help: give it once")));
        }
    }
    Ok(all)
}

/// # Safety
/// As [`slice`], for the shape and the data of the tensor.
unsafe fn copy(tensor: &CTensor) -> Outcome<Tensor> {
    let number = tensor.dtype;
    let dtype = dtype(number).ok_or_else(|| {
        Fail::usage(format!("{number} is no element type\n  help: see tpshard_dtype in tpshard.h"))
    })?;
    if !(0..=MOST_DIMS).contains(&tensor.ndim) {
        return Err(Fail::usage(format!("ndim is {}, at most {MOST_DIMS} are possible", tensor.ndim)));
    }
    // SAFETY: the caller's promise.
    let dims = unsafe { slice(tensor.shape, tensor.ndim.unsigned_abs().into(), "shape")? };
    let shape: Option<Vec<usize>> = dims.iter().map(|&dim| usize::try_from(dim).ok()).collect();
    let shape = shape.ok_or_else(|| Fail::usage(format!("shape {dims:?} has a negative extent")))?;
    let needed = element_count(&shape).and_then(|count| dtype.byte_len(count as u64));
    if needed != Some(tensor.bytes) {
        let needed = needed.map_or("more than memory holds".into(), |needed| needed.to_string());
        let what = format!("{dtype}{shape:?} takes {needed} bytes, {} are given", tensor.bytes);
        return Err(Fail::usage(format!("{what}\n  help: give row-major elements without gaps")));
    }
    // SAFETY: the caller's promise.
    let bytes = unsafe { slice(tensor.data.cast::<u8>(), tensor.bytes, "data")? };
    Tensor::from_le_bytes(dtype, shape, bytes).map_err(Fail::usage)
}
