//! Where state lies: in tensors of the host, or in memory of the device that steps it.

use crate::cpu::value::Value;
use crate::cuda::DeviceTensor;
use tpshard_driver::cuda::Device;
use tpshard_ir::{DType, Tensor};

/// A tensor where its state lies.
pub(crate) enum Stored {
    Host(Tensor),
    Device(DeviceTensor),
}

/// Where new state is put.
pub(crate) enum Home {
    Host,
    Device(Device),
}

impl Stored {
    /// What it holds, on the host.
    pub(super) fn value(&self) -> Result<Value, String> {
        Ok(Value::new(match self {
            Stored::Host(tensor) => tensor.clone(),
            Stored::Device(tensor) => tensor.to_tensor()?,
        }))
    }
}

impl Home {
    pub(super) fn keep(&self, tensor: Tensor) -> Result<Stored, String> {
        Ok(match self {
            Home::Host => Stored::Host(tensor),
            Home::Device(device) => Stored::Device(DeviceTensor::from_tensor(device, &tensor)?),
        })
    }

    pub(super) fn zeros(&self, dtype: DType, shape: Vec<usize>) -> Result<Stored, String> {
        Ok(match self {
            Home::Host => Stored::Host(Tensor::zeros(dtype, shape).map_err(|e| e.to_string())?),
            Home::Device(device) => Stored::Device(DeviceTensor::zeros(device, dtype, shape)?),
        })
    }
}
