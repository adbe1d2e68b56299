//! Ports and tensors with the layout that the header gives them. What they point to lives beside them.

use crate::dtype::number;
use crate::fail::c_text;
use std::ffi::{CString, c_char, c_void};
use std::sync::Arc;
use tpshard_ir::program::Port;
use tpshard_ir::{Data, Tensor};

/// An input or output, as the header says it.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct CPort {
    name: *const c_char,
    dtype: i32,
    ndim: i32,
    shape: *const i64,
    dims: *const *const c_char,
    state: i32,
}

/// A tensor, as the header says it.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct CTensor {
    pub(crate) name: *const c_char,
    pub(crate) dtype: i32,
    pub(crate) ndim: i32,
    pub(crate) shape: *const i64,
    pub(crate) data: *const c_void,
    pub(crate) bytes: u64,
}

/// A port and what its C form points to.
pub(crate) struct PortView {
    name: String,
    c_name: CString,
    dtype: i32,
    shape: Vec<i64>,
    /// Kept for `pointers`.
    _dims: Vec<CString>,
    pointers: Vec<*const c_char>,
    state: bool,
}

impl PortView {
    pub(crate) fn name_of(port: &Port) -> &Arc<str> {
        &port.name
    }

    pub(crate) fn new(port: &Port, state: bool) -> PortView {
        let dims: Vec<CString> = port.ty.shape.iter().map(|dim| c_text(&dim.to_string())).collect();
        PortView {
            name: port.name.to_string(),
            c_name: c_text(&port.name),
            dtype: number(port.ty.dtype),
            shape: port.ty.shape.iter().map(|dim| dim.as_const().unwrap_or(-1)).collect(),
            pointers: dims.iter().map(|dim| dim.as_ptr()).collect(),
            _dims: dims,
            state,
        }
    }

    pub(crate) fn c(&self) -> CPort {
        CPort {
            name: self.c_name.as_ptr(),
            dtype: self.dtype,
            ndim: i32::try_from(self.shape.len()).unwrap_or(i32::MAX),
            shape: self.shape.as_ptr(),
            dims: self.pointers.as_ptr(),
            state: self.state.into(),
        }
    }
}

struct Named {
    name: CString,
    shape: Vec<i64>,
    tensor: Tensor,
}

/// What a run gave, in the order of the model's outputs.
pub(crate) struct Results(Vec<Named>);

impl Results {
    pub(crate) fn new(results: tpshard_runtime::session::Results, outputs: &[PortView]) -> Results {
        let mut found = results.outputs;
        let named = |port: &PortView| {
            let tensor = found.remove(&port.name)?.tensor;
            let shape = tensor.shape().iter().map(|&d| i64::try_from(d).unwrap_or(i64::MAX)).collect();
            Some(Named { name: port.c_name.clone(), shape, tensor })
        };
        Results(outputs.iter().filter_map(named).collect())
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn position(&self, name: &str) -> Option<usize> {
        self.0.iter().position(|own| own.name.as_bytes() == name.as_bytes())
    }

    pub(crate) fn names(&self) -> String {
        self.0.iter().map(|own| own.name.to_string_lossy()).collect::<Vec<_>>().join(", ")
    }

    pub(crate) fn c(&self, index: usize) -> Option<CTensor> {
        let Named { name, shape, tensor } = self.0.get(index)?;
        Some(CTensor {
            name: name.as_ptr(),
            dtype: number(tensor.dtype()),
            ndim: i32::try_from(shape.len()).unwrap_or(i32::MAX),
            shape: shape.as_ptr(),
            data: elements(tensor.data()),
            bytes: tensor.dtype().byte_len(tensor.len() as u64).unwrap_or(0),
        })
    }
}

/// Where the elements lie.
fn elements(data: &Data) -> *const c_void {
    match data {
        Data::F32(v) => v.as_ptr().cast(),
        Data::F64(v) => v.as_ptr().cast(),
        Data::F16(v) => v.as_ptr().cast(),
        Data::BF16(v) => v.as_ptr().cast(),
        Data::I8(v) => v.as_ptr().cast(),
        Data::I16(v) => v.as_ptr().cast(),
        Data::I32(v) => v.as_ptr().cast(),
        Data::I64(v) => v.as_ptr().cast(),
        Data::U8(v) => v.as_ptr().cast(),
        Data::U16(v) => v.as_ptr().cast(),
        Data::U32(v) => v.as_ptr().cast(),
        Data::U64(v) => v.as_ptr().cast(),
        Data::Bool(v) => v.as_ptr().cast(),
        Data::Raw(_, v) => v.as_ptr().cast(),
    }
}
