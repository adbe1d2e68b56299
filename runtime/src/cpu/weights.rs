//! Where weights come from: memory, or a rank's mapped file.

use crate::io::SafeTensorsFile;
use std::collections::BTreeMap;
use tpshard_ir::Tensor;
use tpshard_ir::program::WeightTensor;

/// The metadata key under which a weight file says what it was written with.
const WEIGHTS_HASH: &str = "weights_hash";

/// Where a session gets its weights from.
pub trait WeightSource {
    /// The file it reads, for messages.
    fn place(&self) -> Option<String> {
        None
    }

    /// The hash the weights were written with, if the source knows one.
    fn weights_hash(&self) -> Option<String>;

    /// The tensor of that name, of the type and shape the program states; called once per tensor, so that a source may
    /// release what it has handed out.
    ///
    /// # Errors
    /// The tensor is missing or another one; the message names tensor and file.
    fn tensor(&mut self, weight: &WeightTensor) -> Result<Tensor, String>;
}

/// Weights in memory, by name.
#[derive(Clone, Debug, Default)]
pub struct MemoryWeights {
    pub tensors: BTreeMap<String, Tensor>,
    pub hash: Option<String>,
}

impl WeightSource for MemoryWeights {
    fn weights_hash(&self) -> Option<String> {
        self.hash.clone()
    }

    fn tensor(&mut self, weight: &WeightTensor) -> Result<Tensor, String> {
        let found = self.tensors.get(&weight.name).ok_or_else(|| {
            format!("weight `{}` is missing\n  help: give the weights of this rank", weight.name)
        })?;
        check_weight(weight, found, "the given weights")?;
        Ok(found.clone())
    }
}

/// The weight file of a rank. The memory of every tensor is given back once it has been copied.
pub struct FileWeights {
    file: SafeTensorsFile,
}

impl FileWeights {
    pub fn new(file: SafeTensorsFile) -> FileWeights {
        FileWeights { file }
    }
}

impl WeightSource for FileWeights {
    fn place(&self) -> Option<String> {
        Some(self.file.place().to_owned())
    }

    fn weights_hash(&self) -> Option<String> {
        self.file.metadata().get(WEIGHTS_HASH).cloned()
    }

    fn tensor(&mut self, weight: &WeightTensor) -> Result<Tensor, String> {
        let view = self.file.view(&weight.name).map_err(|e| format!("weight `{}`: {e}", weight.name))?;
        let tensor = view
            .to_tensor()
            .map_err(|e| format!("weight `{}` of {}: {e}", weight.name, self.file.place()))?;
        check_weight(weight, &tensor, self.file.place())?;
        self.file.release(&weight.name);
        Ok(tensor)
    }
}

/// Checks type and shape of a weight read from `place`.
///
/// # Errors
/// Names the tensor, the place, and what was expected and found.
pub fn check_weight(weight: &WeightTensor, found: &Tensor, place: &str) -> Result<(), String> {
    if found.dtype() == weight.dtype && found.shape() == weight.shape {
        return Ok(());
    }
    Err(format!(
        "weight `{}` of {place} is {}{:?}, the program expects {}{:?}\n  help: use the weights written with this program",
        weight.name,
        found.dtype(),
        found.shape(),
        weight.dtype,
        weight.shape
    ))
}
