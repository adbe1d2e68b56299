//! Machine code for kernels, made while a folder is built if NVIDIA's compiler is there.
//!
//! Ranks whose kernels are equal are compiled for once. The same text and the same compiler give the same bytes.

use std::collections::{BTreeMap, BTreeSet};
use tpshard_driver::DriverError;
use tpshard_driver::nvrtc::Nvrtc;
use tpshard_ir::program::device::{Cubin, DeviceCode};

/// Kernels for GPUs.
pub struct CudaTarget<'a> {
    /// Compute capabilities that machine code is made for: 90 for `sm_90`.
    pub architectures: BTreeSet<u32>,
    /// Without it, programs carry only the text, which is compiled when the ranks first start.
    pub compiler: Option<&'a Nvrtc>,
}

/// What was compiled so far, by its text.
pub(crate) struct Cubins<'a> {
    target: &'a CudaTarget<'a>,
    known: BTreeMap<String, Vec<Cubin>>,
}

impl<'a> Cubins<'a> {
    pub(crate) fn new(target: &'a CudaTarget<'a>) -> Cubins<'a> {
        Cubins { target, known: BTreeMap::new() }
    }

    /// Gives `code` its machine code.
    ///
    /// # Errors
    /// Text that does not compile, or an architecture that the compiler does not know.
    pub(crate) fn add(&mut self, code: &mut DeviceCode) -> Result<(), DriverError> {
        let Some(compiler) = self.target.compiler else { return Ok(()) };
        if let Some(cubins) = self.known.get(&code.source) {
            code.cubins.clone_from(cubins);
            return Ok(());
        }
        for &arch in &self.target.architectures {
            let bytes = compiler.compile(&code.source, arch, &[])?;
            code.cubins.push(Cubin { arch, nvrtc: compiler.version(), bytes });
        }
        self.known.insert(code.source.clone(), code.cubins.clone());
        Ok(())
    }
}
