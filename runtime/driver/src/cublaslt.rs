//! The matrix library `libcublasLt`: batched products of matrices that lie in device memory, row by row or column by
//! column.
//!
//! What the library cannot say (other strides, no algorithm for it) is left to the caller. Algorithms are asked for once
//! per shape.
#![allow(unsafe_code)] // Calls into a C library.

use crate::cuda::{Device, Memory};
use crate::error::DriverError;
use crate::library::{Library, functions};
use crate::search::SearchPath;
use std::collections::BTreeMap;
use std::ffi::{c_int, c_void};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

const NAMES: [&str; 3] = ["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"];

/// Memory that algorithms may use, as NVIDIA advises for its newer cards.
const WORKSPACE: u64 = 32 << 20;
/// Shapes whose algorithms are kept.
const MOST_KEPT: usize = 1 << 12;

// NVIDIA's numbers, held against the headers of cuBLAS 13.1 by a C program.
const TRANSPOSE_A: c_int = 3;
const TRANSPOSE_B: c_int = 4;
const BATCH_COUNT: c_int = 5;
const BATCH_STRIDE: c_int = 6;
const MOST_WORKSPACE: c_int = 1;
/// Of the matrices a, b, c and d.
const ALIGNMENTS: [c_int; 4] = [5, 6, 7, 8];
/// Alignment beyond which no algorithm asks for more.
const MOST_ALIGNMENT: u64 = 256;
const COMPUTE_F32: c_int = 68;
const COMPUTE_F64: c_int = 70;
const NOT_SUPPORTED: c_int = 15;

functions! {
    /// The functions of `libcublasLt` that are used.
    Functions {
        create "cublasLtCreate" (handle: *mut *mut c_void);
        destroy "cublasLtDestroy" (handle: *mut c_void);
        create_product "cublasLtMatmulDescCreate" (product: *mut *mut c_void, compute: c_int, scale: c_int);
        set_product "cublasLtMatmulDescSetAttribute" (product: *mut c_void, attribute: c_int, value: *const c_void, bytes: usize);
        destroy_product "cublasLtMatmulDescDestroy" (product: *mut c_void);
        create_layout "cublasLtMatrixLayoutCreate" (layout: *mut *mut c_void, dtype: c_int, rows: u64, columns: u64, stride: i64);
        set_layout "cublasLtMatrixLayoutSetAttribute" (layout: *mut c_void, attribute: c_int, value: *const c_void, bytes: usize);
        destroy_layout "cublasLtMatrixLayoutDestroy" (layout: *mut c_void);
        create_preference "cublasLtMatmulPreferenceCreate" (preference: *mut *mut c_void);
        set_preference "cublasLtMatmulPreferenceSetAttribute" (preference: *mut c_void, attribute: c_int, value: *const c_void, bytes: usize);
        destroy_preference "cublasLtMatmulPreferenceDestroy" (preference: *mut c_void);
        heuristic "cublasLtMatmulAlgoGetHeuristic" (handle: *mut c_void, product: *mut c_void, a: *mut c_void,
            b: *mut c_void, c: *mut c_void, d: *mut c_void, preference: *mut c_void, wanted: c_int,
            found: *mut Algorithm, count: *mut c_int);
        multiply "cublasLtMatmul" (handle: *mut c_void, product: *mut c_void, alpha: *const c_void,
            a: u64, a_layout: *mut c_void, b: u64, b_layout: *mut c_void, beta: *const c_void,
            c: u64, c_layout: *mut c_void, d: u64, d_layout: *mut c_void, algorithm: *const [u64; 8],
            workspace: u64, workspace_bytes: usize, stream: *mut c_void);
    }
}

/// An algorithm as the library describes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Algorithm {
    code: [u64; 8],
    workspace: usize,
    state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

/// Types of elements; sums are made in `f32`, those of `f64` in `f64`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Element {
    F32,
    F64,
    F16,
    BF16,
}

impl Element {
    fn code(self) -> c_int {
        match self {
            Element::F32 => 0,
            Element::F64 => 1,
            Element::F16 => 2,
            Element::BF16 => 14,
        }
    }

    fn bytes(self) -> u64 {
        match self {
            Element::F64 => 8,
            Element::F32 => 4,
            Element::F16 | Element::BF16 => 2,
        }
    }
}

/// A matrix in device memory: element `(b, i, j)` is `b * batch + i * row + j * column` elements behind byte `offset`.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    pub memory: &'a Memory,
    pub offset: u64,
    pub batch: i64,
    pub row: i64,
    pub column: i64,
}

/// `result[b, m, n] = sum over k of left[b, m, k] * right[b, k, n]`.
#[derive(Clone, Copy, Debug)]
pub struct Product<'a> {
    pub element: Element,
    pub batch: i64,
    pub rows: i64,
    pub columns: i64,
    pub depth: i64,
    pub left: Matrix<'a>,
    pub right: Matrix<'a>,
    pub result: Matrix<'a>,
}

/// A matrix as the library takes it: columns one after another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Layout {
    rows: i64,
    columns: i64,
    /// Elements from one column to the next.
    stride: i64,
    batch: i64,
    transposed: bool,
}

impl Layout {
    /// The matrix of `rows` by `columns` whose elements are so far apart; `None` if the library cannot say that.
    fn of(rows: i64, columns: i64, [down, right]: [i64; 2], batch: i64) -> Option<Layout> {
        // Along a dim of one element, nothing is ever stepped.
        let along = |stride: i64, extent: i64| extent == 1 || stride == 1;
        if along(down, rows) && (columns == 1 || right >= rows) {
            return Some(Layout { rows, columns, stride: right.max(rows), batch, transposed: false });
        }
        (along(right, columns) && (rows == 1 || down >= columns)).then_some(Layout {
            rows: columns,
            columns: rows,
            stride: down.max(columns),
            batch,
            transposed: true,
        })
    }

    /// Elements from the first to behind the last, in `count` matrices.
    fn extent(&self, count: i64) -> Option<i64> {
        let last = |steps: i64, stride: i64| steps.checked_sub(1)?.checked_mul(stride);
        let matrix = last(self.columns, self.stride)?.checked_add(self.rows)?;
        last(count, self.batch)?.checked_add(matrix)
    }
}

/// What decides an algorithm.
type Key = (Element, i64, i64, [Layout; 3], [u32; 3]);

/// An open library.
#[derive(Debug)]
pub struct CublasLt {
    functions: Functions,
    handle: usize,
    device: Device,
    workspace: Memory,
    known: Mutex<BTreeMap<Key, Option<Algorithm>>>,
}

/// A description of the library, destroyed with this.
struct Described<'a> {
    functions: &'a Functions,
    handle: *mut c_void,
    destroy: Destroy,
}

type Destroy = unsafe fn(&Functions, *mut c_void) -> Result<(&'static str, i32), DriverError>;

impl Drop for Described<'_> {
    fn drop(&mut self) {
        // SAFETY: made by the function that belongs to `destroy`, and destroyed once.
        let _ = unsafe { (self.destroy)(self.functions, self.handle) };
    }
}

fn checked((function, code): (&'static str, i32)) -> Result<(), DriverError> {
    if code == 0 {
        return Ok(());
    }
    let name = match code {
        1 => "not initialised",
        3 => "out of memory",
        7 => "invalid value",
        8 => "the device has not what is needed",
        13 => "the execution failed",
        NOT_SUPPORTED => "not supported",
        _ => "error",
    };
    Err(DriverError::Call { function, code, name: name.into(), detail: String::new() })
}

impl CublasLt {
    /// Opens the library for a device.
    ///
    /// # Errors
    /// It is not there, or does not work with the device.
    pub fn load(search: &SearchPath, device: &Device) -> Result<CublasLt, DriverError> {
        let help = "install the Python package nvidia-cublas or the CUDA toolkit";
        let library = Library::find("the matrix library libcublasLt", &NAMES, search, help)?;
        let functions = Functions::of(&library);
        device.enter()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: the pointer lives through the call; the device is that of this thread.
        checked(unsafe { functions.create(&mut handle) }?)?;
        let workspace = device.allocate(WORKSPACE)?;
        let known = Mutex::default();
        Ok(CublasLt { functions, handle: handle as usize, device: device.clone(), workspace, known })
    }

    /// The file that was opened.
    pub fn path(&self) -> &Path {
        self.functions.path()
    }

    /// Puts a product into the device's queue; false if the library cannot say it.
    ///
    /// # Errors
    /// A matrix that leaves its memory, or the library fails.
    pub fn multiply(&self, product: &Product<'_>) -> Result<bool, DriverError> {
        let Product { element, batch, rows, columns, depth, left, right, result } = *product;
        if [batch, rows, columns, depth].into_iter().any(|extent| extent < 1) {
            return Ok(false);
        }
        // Columns come first for the library: it is given the transposed product, right before left.
        let layouts = [
            Layout::of(columns, depth, [right.column, right.row], right.batch),
            Layout::of(depth, rows, [left.column, left.row], left.batch),
            Layout::of(columns, rows, [result.column, result.row], result.batch),
        ];
        let [Some(a), Some(b), Some(d)] = layouts else { return Ok(false) };
        if d.transposed || [a, b, d].iter().any(|layout| layout.batch < 0) {
            return Ok(false);
        }
        let mut addresses = [0u64; 3];
        for ((address, matrix), layout) in addresses.iter_mut().zip([right, left, result]).zip([a, b, d]) {
            let elements = layout.extent(batch).and_then(|n| u64::try_from(n).ok());
            let bytes = elements.and_then(|n| n.checked_mul(element.bytes())).unwrap_or(u64::MAX);
            *address = matrix.memory.at(matrix.offset, bytes)?;
        }
        self.device.enter()?;
        let compute = if element == Element::F64 { COMPUTE_F64 } else { COMPUTE_F32 };
        let scale = if element == Element::F64 { Element::F64.code() } else { Element::F32.code() };
        let described = self.product(compute, scale, [a.transposed, b.transposed])?;
        let [a_layout, b_layout, d_layout] = [
            self.layout(element, &a, batch)?,
            self.layout(element, &b, batch)?,
            self.layout(element, &d, batch)?,
        ];
        let alignments = addresses.map(|at| 1u32 << at.trailing_zeros().min(MOST_ALIGNMENT.trailing_zeros()));
        let key = (element, batch, depth, [a, b, d], alignments);
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner).get(&key).copied();
        let algorithm = match known {
            Some(known) => known,
            None => {
                let found = self.algorithm(&described, [&a_layout, &b_layout, &d_layout], alignments)?;
                let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
                if known.len() < MOST_KEPT {
                    known.insert(key, found);
                }
                found
            }
        };
        let Some(algorithm) = algorithm else { return Ok(false) };
        let (one, zero) = (1f32, 0f32);
        let (one_double, zero_double) = (1f64, 0f64);
        let [alpha, beta]: [*const c_void; 2] = match element {
            Element::F64 => [(&raw const one_double).cast(), (&raw const zero_double).cast()],
            _ => [(&raw const one).cast(), (&raw const zero).cast()],
        };
        let [a, b, d] = addresses;
        // SAFETY: the descriptions are alive; the matrices lie within their memory, the workspace is as large as said;
        // the factors have the type of the scale and are read before the call returns.
        let called = unsafe {
            self.functions.multiply(
                self.handle as *mut c_void,
                described.handle,
                alpha,
                a,
                a_layout.handle,
                b,
                b_layout.handle,
                beta,
                d,
                d_layout.handle,
                d,
                d_layout.handle,
                &algorithm.code,
                self.workspace.at(0, WORKSPACE)?,
                usize::try_from(WORKSPACE).unwrap_or(0),
                self.device.stream(),
            )
        }?;
        if called.1 == NOT_SUPPORTED {
            return Ok(false);
        }
        checked(called).map(|()| true)
    }

    fn product(
        &self,
        compute: c_int,
        scale: c_int,
        transposed: [bool; 2],
    ) -> Result<Described<'_>, DriverError> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: the pointer lives through the call.
        checked(unsafe { self.functions.create_product(&mut handle, compute, scale) }?)?;
        let described = Described { functions: &self.functions, handle, destroy: Functions::destroy_product };
        for (attribute, transposed) in [TRANSPOSE_A, TRANSPOSE_B].into_iter().zip(transposed) {
            let value = c_int::from(transposed);
            let (at, bytes) = ((&raw const value).cast(), size_of_val(&value));
            // SAFETY: the description is alive, the value has as many bytes as said.
            checked(unsafe { self.functions.set_product(handle, attribute, at, bytes) }?)?;
        }
        Ok(described)
    }

    fn layout(&self, element: Element, layout: &Layout, batch: i64) -> Result<Described<'_>, DriverError> {
        let size = |extent: i64| u64::try_from(extent).unwrap_or(0);
        let mut handle = std::ptr::null_mut();
        // SAFETY: the pointer lives through the call.
        let made = unsafe {
            let (rows, columns) = (size(layout.rows), size(layout.columns));
            self.functions.create_layout(&mut handle, element.code(), rows, columns, layout.stride)
        };
        checked(made?)?;
        let described = Described { functions: &self.functions, handle, destroy: Functions::destroy_layout };
        if batch > 1 {
            let count = c_int::try_from(batch).unwrap_or(c_int::MAX);
            let stride = layout.batch;
            let values: [(c_int, *const c_void, usize); 2] = [
                (BATCH_COUNT, (&raw const count).cast(), size_of_val(&count)),
                (BATCH_STRIDE, (&raw const stride).cast(), size_of_val(&stride)),
            ];
            for (attribute, at, bytes) in values {
                // SAFETY: the description is alive, the values have as many bytes as said.
                checked(unsafe { self.functions.set_layout(handle, attribute, at, bytes) }?)?;
            }
        }
        Ok(described)
    }

    /// The library's first choice, if it has any.
    fn algorithm(
        &self,
        product: &Described<'_>,
        [a, b, d]: [&Described<'_>; 3],
        alignments: [u32; 3],
    ) -> Result<Option<Algorithm>, DriverError> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: the pointer lives through the call.
        checked(unsafe { self.functions.create_preference(&mut handle) }?)?;
        let preference =
            Described { functions: &self.functions, handle, destroy: Functions::destroy_preference };
        let (at, bytes) = ((&raw const WORKSPACE_BYTES).cast(), size_of_val(&WORKSPACE_BYTES));
        // SAFETY: the description is alive, the value has as many bytes as said.
        checked(unsafe { self.functions.set_preference(handle, MOST_WORKSPACE, at, bytes) }?)?;
        let [of_a, of_b, of_d] = alignments;
        for (attribute, alignment) in ALIGNMENTS.into_iter().zip([of_a, of_b, of_d, of_d]) {
            let (at, bytes) = ((&raw const alignment).cast(), size_of_val(&alignment));
            // SAFETY: as above.
            checked(unsafe { self.functions.set_preference(handle, attribute, at, bytes) }?)?;
        }
        let (mut found, mut count) = (Algorithm::default(), 0);
        // SAFETY: all descriptions are alive, and there is room for the one algorithm that is asked for.
        let (function, code) = unsafe {
            self.functions.heuristic(
                self.handle as *mut c_void,
                product.handle,
                a.handle,
                b.handle,
                d.handle,
                d.handle,
                preference.handle,
                1,
                &mut found,
                &mut count,
            )
        }?;
        if code == NOT_SUPPORTED {
            return Ok(None);
        }
        checked((function, code))?;
        Ok((count > 0 && found.state == 0).then_some(found))
    }
}

/// [`WORKSPACE`], where its address is taken.
static WORKSPACE_BYTES: u64 = WORKSPACE;

impl Drop for CublasLt {
    fn drop(&mut self) {
        // Work that uses it is waited for, if that makes sense.
        if !matches!(self.device.synchronize(), Err(DriverError::Abandoned { .. })) {
            // SAFETY: made by `create`, destroyed once.
            let _ = unsafe { self.functions.destroy(self.handle as *mut c_void) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strides_become_columns_one_after_another() {
        let layout = |rows, columns, strides| {
            Layout::of(rows, columns, strides, 0).map(|l| (l.rows, l.columns, l.stride, l.transposed))
        };
        assert_eq!(layout(3, 4, [1, 3]), Some((3, 4, 3, false)));
        assert_eq!(layout(3, 4, [1, 10]), Some((3, 4, 10, false)));
        assert_eq!(layout(3, 4, [4, 1]), Some((4, 3, 4, true)));
        assert_eq!(layout(3, 4, [9, 1]), Some((4, 3, 9, true)));
        // One row, or one column: its other stride is never used.
        assert_eq!(layout(1, 4, [77, 5]), Some((1, 4, 5, false)));
        assert_eq!(layout(3, 1, [1, 0]), Some((3, 1, 3, false)));
        assert_eq!(layout(3, 1, [7, 0]), Some((1, 3, 7, true)));
        // Neither dim lies densely, or columns overlap.
        assert_eq!(layout(3, 4, [2, 8]), None);
        assert_eq!(layout(3, 4, [1, 2]), None);
        assert_eq!(layout(3, 4, [1, -3]), None);
        let wide = Layout::of(3, 4, [1, 10], 100).unwrap();
        assert_eq!((wide.extent(1), wide.extent(2)), (Some(33), Some(133)));
        assert_eq!(Layout::of(3, 4, [1, i64::MAX], 0).unwrap().extent(1), None);
        assert_eq!(size_of::<Algorithm>(), 96);
    }
}
