//! The functions of `libcublasLt`.
#![allow(unsafe_code)] // What a C library exports.

use crate::memory;
use half::{bf16, f16};
use std::ffi::{c_int, c_void};

const SUCCESS: c_int = 0;
const INVALID_VALUE: c_int = 7;
const NOT_SUPPORTED: c_int = 15;

/// A product: whether its operands are transposed.
#[derive(Default)]
struct Product {
    transposed: [bool; 2],
}

/// Matrices of columns that lie one after another.
#[derive(Clone, Copy)]
struct Layout {
    dtype: c_int,
    rows: usize,
    columns: usize,
    stride: usize,
    batches: usize,
    batch: usize,
}

/// An algorithm as the library describes it; there is one.
#[repr(C)]
pub struct Algorithm {
    code: [u64; 8],
    workspace: usize,
    state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

/// What the code of the algorithm holds.
const CODE: [u64; 8] = [7, 6, 5, 4, 3, 2, 1, 0];

impl Layout {
    fn bytes(&self) -> Option<usize> {
        match self.dtype {
            0 => Some(4),
            1 => Some(8),
            2 | 14 => Some(2),
            _ => None,
        }
    }

    /// Bytes from the first element to behind the last.
    fn extent(&self) -> Option<usize> {
        let matrix = (self.columns - 1) * self.stride + self.rows;
        Some(((self.batches - 1) * self.batch + matrix) * self.bytes()?)
    }

    fn index(&self, batch: usize, row: usize, column: usize) -> usize {
        batch * self.batch + column * self.stride + row
    }

    /// # Safety
    /// The element lies in memory.
    unsafe fn read(&self, at: u64, index: usize) -> f64 {
        let at = at as usize;
        // SAFETY: by the caller.
        unsafe {
            match self.dtype {
                0 => f64::from((at as *const f32).add(index).read()),
                1 => (at as *const f64).add(index).read(),
                2 => f64::from((at as *const f16).add(index).read()),
                _ => f64::from((at as *const bf16).add(index).read()),
            }
        }
    }

    /// # Safety
    /// The element lies in memory that is not borrowed.
    unsafe fn write(&self, at: u64, index: usize, value: f64) {
        let at = at as usize;
        // SAFETY: by the caller.
        unsafe {
            match self.dtype {
                0 => (at as *mut f32).add(index).write(value as f32),
                1 => (at as *mut f64).add(index).write(value),
                2 => (at as *mut f16).add(index).write(f16::from_f64(value)),
                _ => (at as *mut bf16).add(index).write(bf16::from_f64(value)),
            }
        }
    }
}

/// Makes something behind a handle.
///
/// # Safety
/// The place of the handle may be written.
unsafe fn make<T>(place: *mut *mut c_void, made: T) -> c_int {
    // SAFETY: by the caller.
    unsafe { place.write(Box::into_raw(Box::new(made)).cast()) };
    SUCCESS
}

/// # Safety
/// The handle is of a `T` and is not used again.
unsafe fn end<T>(handle: *mut c_void) -> c_int {
    // SAFETY: by the caller.
    drop(unsafe { Box::from_raw(handle.cast::<T>()) });
    SUCCESS
}

/// # Safety
/// As NVIDIA documents it; so are all others.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtCreate(handle: *mut *mut c_void) -> c_int {
    // SAFETY: by the caller, as in all functions.
    unsafe { make(handle, 0u8) }
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtDestroy(handle: *mut c_void) -> c_int {
    // SAFETY: see above.
    unsafe { end::<u8>(handle) }
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulDescCreate(
    product: *mut *mut c_void,
    compute: c_int,
    scale: c_int,
) -> c_int {
    if ![(68, 0), (70, 1)].contains(&(compute, scale)) {
        return INVALID_VALUE;
    }
    // SAFETY: see above.
    unsafe { make(product, Product::default()) }
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulDescSetAttribute(
    product: *mut c_void,
    attribute: c_int,
    value: *const c_void,
    bytes: usize,
) -> c_int {
    let (at, true) = (attribute - 3, bytes == 4) else { return INVALID_VALUE };
    // SAFETY: see above; the value has four bytes.
    let (product, value) = unsafe { (&mut *product.cast::<Product>(), value.cast::<c_int>().read()) };
    match usize::try_from(at).ok().and_then(|at| product.transposed.get_mut(at)) {
        Some(transposed) if value == 0 || value == 1 => {
            *transposed = value == 1;
            SUCCESS
        }
        _ => INVALID_VALUE,
    }
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulDescDestroy(product: *mut c_void) -> c_int {
    // SAFETY: see above.
    unsafe { end::<Product>(product) }
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatrixLayoutCreate(
    layout: *mut *mut c_void,
    dtype: c_int,
    rows: u64,
    columns: u64,
    stride: i64,
) -> c_int {
    let size = |n: u64| usize::try_from(n).ok().filter(|&n| n > 0);
    let stride = u64::try_from(stride).ok().and_then(size);
    let (Some(rows), Some(columns), Some(stride)) = (size(rows), size(columns), stride) else {
        return INVALID_VALUE;
    };
    if stride < rows {
        return INVALID_VALUE;
    }
    // SAFETY: see above.
    unsafe { make(layout, Layout { dtype, rows, columns, stride, batches: 1, batch: 0 }) }
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatrixLayoutSetAttribute(
    layout: *mut c_void,
    attribute: c_int,
    value: *const c_void,
    bytes: usize,
) -> c_int {
    // SAFETY: see above.
    let layout = unsafe { &mut *layout.cast::<Layout>() };
    match (attribute, bytes) {
        // SAFETY: the value has as many bytes as was said.
        (5, 4) => layout.batches = unsafe { value.cast::<c_int>().read() }.unsigned_abs() as usize,
        // SAFETY: as above.
        (6, 8) => layout.batch = unsafe { value.cast::<i64>().read() }.unsigned_abs() as usize,
        _ => return INVALID_VALUE,
    }
    SUCCESS
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatrixLayoutDestroy(layout: *mut c_void) -> c_int {
    // SAFETY: see above.
    unsafe { end::<Layout>(layout) }
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulPreferenceCreate(preference: *mut *mut c_void) -> c_int {
    // SAFETY: see above.
    unsafe { make(preference, 0u8) }
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulPreferenceSetAttribute(
    _preference: *mut c_void,
    attribute: c_int,
    _value: *const c_void,
    bytes: usize,
) -> c_int {
    if matches!((attribute, bytes), (1, 8) | (5..=8, 4)) { SUCCESS } else { INVALID_VALUE }
}

/// # Safety
/// See above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulPreferenceDestroy(preference: *mut c_void) -> c_int {
    // SAFETY: see above.
    unsafe { end::<u8>(preference) }
}

/// The rows, columns and depth of a product that fits together.
fn sizes(product: &Product, a: &Layout, b: &Layout, d: &Layout) -> Option<[usize; 3]> {
    let [of_a, of_b] = product.transposed;
    let (rows, depth) = if of_a { (a.columns, a.rows) } else { (a.rows, a.columns) };
    let (inner, columns) = if of_b { (b.columns, b.rows) } else { (b.rows, b.columns) };
    let fits = inner == depth && (d.rows, d.columns) == (rows, columns);
    let alike = a.dtype == b.dtype && b.dtype == d.dtype && a.batches == b.batches && b.batches == d.batches;
    (fits && alike).then_some([rows, columns, depth])
}

/// # Safety
/// See above.
#[allow(clippy::too_many_arguments, reason = "as many as the library's function has")]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulAlgoGetHeuristic(
    _handle: *mut c_void,
    product: *mut c_void,
    a: *mut c_void,
    b: *mut c_void,
    _c: *mut c_void,
    d: *mut c_void,
    _preference: *mut c_void,
    wanted: c_int,
    found: *mut Algorithm,
    count: *mut c_int,
) -> c_int {
    // SAFETY: see above.
    let (product, a, b, d) = unsafe {
        (&*product.cast::<Product>(), &*a.cast::<Layout>(), &*b.cast::<Layout>(), &*d.cast::<Layout>())
    };
    if wanted < 1 || sizes(product, a, b, d).is_none() {
        return INVALID_VALUE;
    }
    // Some shapes have no algorithm, as with the library itself.
    if a.rows == 17 || a.columns == 17 {
        return NOT_SUPPORTED;
    }
    let algorithm = Algorithm { code: CODE, workspace: 0, state: 0, waves: 1.0, reserved: [0; 4] };
    // SAFETY: see above.
    unsafe {
        found.write(algorithm);
        count.write(1);
    }
    SUCCESS
}

/// # Safety
/// See above.
#[allow(clippy::too_many_arguments, reason = "as many as the library's function has")]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmul(
    _handle: *mut c_void,
    product: *mut c_void,
    alpha: *const c_void,
    a_at: u64,
    a: *mut c_void,
    b_at: u64,
    b: *mut c_void,
    beta: *const c_void,
    _c_at: u64,
    _c: *mut c_void,
    d_at: u64,
    d: *mut c_void,
    algorithm: *const [u64; 8],
    _workspace: u64,
    _workspace_bytes: usize,
    stream: *mut c_void,
) -> c_int {
    if crate::streams::forbid(stream.addr()).is_some() {
        return NOT_SUPPORTED;
    }
    // SAFETY: see above.
    let (product, a, b, d) = unsafe {
        (&*product.cast::<Product>(), &*a.cast::<Layout>(), &*b.cast::<Layout>(), &*d.cast::<Layout>())
    };
    let Some([rows, columns, depth]) = sizes(product, a, b, d) else { return INVALID_VALUE };
    // SAFETY: the factors are of the type of the scale.
    let factors = unsafe {
        match d.dtype {
            1 => [alpha.cast::<f64>().read(), beta.cast::<f64>().read()],
            _ => [alpha, beta].map(|factor| f64::from(factor.cast::<f32>().read())),
        }
    };
    let held = [(a_at, a), (b_at, b), (d_at, d)]
        .into_iter()
        .all(|(at, layout)| layout.extent().is_some_and(|bytes| memory::holds(at, bytes)));
    // SAFETY: the algorithm is the caller's copy of what the heuristic gave.
    if !held || factors != [1.0, 0.0] || unsafe { algorithm.read() } != CODE {
        return INVALID_VALUE;
    }
    let (transposed, [a, b, d]) = (product.transposed, [*a, *b, *d]);
    crate::streams::perform(stream.addr(), move || {
        multiply(transposed, [(a_at, a), (b_at, b), (d_at, d)], [rows, columns, depth]);
        SUCCESS
    })
}

/// Matrices that are held, as the library's function found them.
fn multiply(
    [of_a, of_b]: [bool; 2],
    [(a_at, a), (b_at, b), (d_at, d)]: [(u64, Layout); 3],
    [rows, columns, depth]: [usize; 3],
) {
    for batch in 0..d.batches {
        for column in 0..columns {
            for row in 0..rows {
                let mut sum = 0f64;
                for k in 0..depth {
                    let left = if of_a { a.index(batch, k, row) } else { a.index(batch, row, k) };
                    let right = if of_b { b.index(batch, column, k) } else { b.index(batch, k, column) };
                    // SAFETY: within what was found to be held, which is freed when streams are done.
                    sum += unsafe { a.read(a_at, left) * b.read(b_at, right) };
                }
                // SAFETY: as above.
                unsafe { d.write(d_at, d.index(batch, row, column), sum) };
            }
        }
    }
}
