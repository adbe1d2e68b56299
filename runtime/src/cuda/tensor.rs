//! Tensors in device memory.

use crate::comm::{Filled, bytes};
use std::sync::Arc;
use tpshard_driver::cuda::{Device, Memory};
use tpshard_ir::tensor::element_count;
use tpshard_ir::{DType, Tensor};

/// A tensor that has device memory to itself; clones share it.
#[derive(Clone)]
pub(crate) struct DeviceTensor {
    pub(super) memory: Arc<Memory>,
    dtype: DType,
    shape: Vec<usize>,
}

impl DeviceTensor {
    fn empty(device: &Device, dtype: DType, shape: Vec<usize>) -> Result<DeviceTensor, String> {
        let elements = element_count(&shape).and_then(|n| dtype.byte_len(n as u64));
        let size = elements.ok_or_else(|| format!("{dtype}{shape:?} is larger than memory"))?;
        let memory = Arc::new(device.allocate(size).map_err(|e| e.to_string())?);
        Ok(DeviceTensor { memory, dtype, shape })
    }

    pub(crate) fn zeros(device: &Device, dtype: DType, shape: Vec<usize>) -> Result<DeviceTensor, String> {
        let tensor = DeviceTensor::empty(device, dtype, shape)?;
        tensor.memory.clear(0, tensor.memory.len()).map_err(|e| e.to_string())?;
        Ok(tensor)
    }

    pub(crate) fn from_tensor(device: &Device, from: &Tensor) -> Result<DeviceTensor, String> {
        let tensor = DeviceTensor::empty(device, from.dtype(), from.shape().to_vec())?;
        tensor.memory.upload(0, bytes(from.data())).map_err(|e| e.to_string())?;
        Ok(tensor)
    }

    /// A copy on the host.
    pub(crate) fn to_tensor(&self) -> Result<Tensor, String> {
        download(&self.memory, 0, self.dtype, &self.shape)
    }
}

/// Elements that lie densely from byte `offset` on.
pub(super) fn download(
    memory: &Memory,
    offset: u64,
    dtype: DType,
    shape: &[usize],
) -> Result<Tensor, String> {
    let count = element_count(shape).ok_or_else(|| format!("{shape:?} is larger than memory"))?;
    let mut filled = Filled::zeros(dtype, count);
    memory.download(offset, filled.bytes_mut()).map_err(|e| e.to_string())?;
    filled.finish(shape.to_vec()).map_err(|e| e.to_string())
}
