//! Safetensors files, mapped: tensors are views of the file.
//!
//! The format has no 2- and 4-bit integers. Such tensors are stored as `U8`, and the file's metadata names their
//! logical type and shape under [`logical_dtype_key`] and [`logical_shape_key`].

use super::IoError;
use super::map::{map, release};
use ::safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorInfo, TensorView as StoredView};
use memmap2::Mmap;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use tpshard_ir::weight::{logical_dtype_key, logical_shape_key};
use tpshard_ir::{DType, Tensor, tensor::element_count};

/// What a file says besides its tensors.
pub type KeyValues = BTreeMap<String, String>;

/// Length of the field in front of the header.
const PREFIX: usize = 8;

/// An open file.
pub struct SafeTensorsFile {
    place: String,
    mapping: Mmap,
    /// Where the tensors' bytes start.
    data: usize,
    header: Metadata,
    metadata: KeyValues,
}

/// A tensor in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorView<'a> {
    pub dtype: DType,
    pub shape: Vec<usize>,
    /// Little-endian elements, packed as in [`Tensor`].
    pub bytes: &'a [u8],
}

impl TensorView<'_> {
    /// A copy.
    ///
    /// # Errors
    /// As [`Tensor::from_le_bytes`].
    pub fn to_tensor(&self) -> Result<Tensor, tpshard_ir::TensorError> {
        Tensor::from_le_bytes(self.dtype, self.shape.clone(), self.bytes)
    }
}

impl SafeTensorsFile {
    /// Maps a file and checks its header: that is at most 100 MB, and the tensors must fill the rest exactly, without
    /// gaps or overlaps.
    ///
    /// # Errors
    /// [`IoError`] with the file and what is wrong with it.
    pub fn open(path: &Path) -> Result<SafeTensorsFile, IoError> {
        let place = path.display().to_string();
        let file = File::open(path).map_err(IoError::system(path))?;
        let mapping = map(&file).map_err(IoError::system(path))?;
        let (len, header) = SafeTensors::read_metadata(&mapping).map_err(|e| IoError::invalid(&place, e))?;
        let metadata = header.metadata().iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect();
        Ok(SafeTensorsFile { place, mapping, data: PREFIX + len, header, metadata })
    }

    /// The file's own key-value pairs.
    pub fn metadata(&self) -> &KeyValues {
        &self.metadata
    }

    /// Where the file is, for messages.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// Gives the memory behind a tensor's bytes back to the system; it can still be read.
    pub fn release(&self, name: &str) {
        if let Some(info) = self.header.info(name) {
            let (start, end) = info.data_offsets;
            release(&self.mapping, self.data + start..self.data + end);
        }
    }

    /// Names of the tensors, in the order of the file.
    pub fn names(&self) -> Vec<String> {
        self.header.offset_keys()
    }

    /// A tensor by name.
    ///
    /// # Errors
    /// [`IoError::Invalid`] if there is none, or if type, shape and bytes do not go together.
    pub fn view(&self, name: &str) -> Result<TensorView<'_>, IoError> {
        let invalid = |what: String| IoError::invalid(format!("{}: {name}", self.place), what);
        let info = self.header.info(name).ok_or_else(|| invalid("no such tensor".into()))?;
        let range = info.data_offsets.0 + self.data..info.data_offsets.1 + self.data;
        let bytes = self.mapping.get(range).ok_or_else(|| invalid("lies outside the file".into()))?;
        let (dtype, shape) = self.logical(name, info).map_err(invalid)?;
        let needed = element_count(&shape).and_then(|count| dtype.byte_len(count as u64));
        if needed != Some(bytes.len() as u64) {
            return Err(invalid(format!("{} bytes cannot be {shape:?} of {dtype}", bytes.len())));
        }
        Ok(TensorView { dtype, shape, bytes })
    }

    fn logical(&self, name: &str, info: &TensorInfo) -> Result<(DType, Vec<usize>), String> {
        let dtype = match self.metadata.get(&logical_dtype_key(name)) {
            Some(text) if info.dtype == Dtype::U8 => text.parse::<DType>().map_err(|e| e.to_string())?,
            Some(text) => return Err(format!("stored as {}, which cannot hold {text}", info.dtype)),
            None => {
                stored_dtype(info.dtype).ok_or_else(|| format!("type {} is not supported", info.dtype))?
            }
        };
        let shape = match self.metadata.get(&logical_shape_key(name)) {
            Some(text) => parse_shape(text).ok_or_else(|| format!("`{text}` is not a shape"))?,
            None => info.shape.clone(),
        };
        Ok((dtype, shape))
    }
}

fn parse_shape(text: &str) -> Option<Vec<usize>> {
    if text.is_empty() {
        return Some(vec![]);
    }
    text.split(',').map(|dim| dim.trim().parse().ok()).collect()
}

/// Element types and what the format calls them.
const STORED: [(Dtype, DType); 19] = [
    (Dtype::BOOL, DType::Bool),
    (Dtype::F4, DType::F4E2M1),
    (Dtype::U8, DType::U8),
    (Dtype::I8, DType::I8),
    (Dtype::F8_E5M2, DType::F8E5M2),
    (Dtype::F8_E4M3, DType::F8E4M3FN),
    (Dtype::F8_E8M0, DType::F8E8M0),
    (Dtype::F8_E4M3FNUZ, DType::F8E4M3FNUZ),
    (Dtype::F8_E5M2FNUZ, DType::F8E5M2FNUZ),
    (Dtype::I16, DType::I16),
    (Dtype::U16, DType::U16),
    (Dtype::F16, DType::F16),
    (Dtype::BF16, DType::BF16),
    (Dtype::I32, DType::I32),
    (Dtype::U32, DType::U32),
    (Dtype::F32, DType::F32),
    (Dtype::F64, DType::F64),
    (Dtype::I64, DType::I64),
    (Dtype::U64, DType::U64),
];

fn stored_dtype(dtype: Dtype) -> Option<DType> {
    STORED.iter().find(|(stored, _)| *stored == dtype).map(|(_, dtype)| *dtype)
}

/// The bytes of a file with these tensors and one key-value pair. More than one would come in no fixed order.
///
/// # Errors
/// [`IoError::Unsupported`] for element types that the format does not have.
pub fn write_safetensors(
    tensors: &BTreeMap<String, Tensor>,
    metadata: (String, String),
) -> Result<Vec<u8>, IoError> {
    let bytes: Vec<Vec<u8>> = tensors.values().map(|tensor| tensor.data().to_le_bytes()).collect();
    let mut views = Vec::with_capacity(tensors.len());
    for ((name, tensor), bytes) in tensors.iter().zip(&bytes) {
        let dtype = STORED.iter().find(|(_, dtype)| *dtype == tensor.dtype()).map(|(stored, _)| *stored);
        let dtype = dtype
            .ok_or_else(|| IoError::unsupported(name, format!("the format has no {}", tensor.dtype())))?;
        let view = StoredView::new(dtype, tensor.shape().to_vec(), bytes);
        views.push((name, view.map_err(|e| IoError::invalid(name, e))?));
    }
    ::safetensors::serialize(views, Some([metadata].into())).map_err(|e| IoError::invalid("safetensors", e))
}

/// What [`write_safetensors`] wrote: tensors and key-value pairs. The bytes are hostile until read.
///
/// # Errors
/// [`IoError`] if they are not of the format, or hold what [`Tensor`]s cannot.
pub fn read_safetensors(bytes: &[u8]) -> Result<(BTreeMap<String, Tensor>, KeyValues), IoError> {
    let invalid = |e: ::safetensors::SafeTensorError| IoError::invalid("safetensors", e);
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(invalid)?;
    let metadata = header.metadata().iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect();
    let mut tensors = BTreeMap::new();
    for (name, view) in SafeTensors::deserialize(bytes).map_err(invalid)?.iter() {
        let dtype = stored_dtype(view.dtype());
        let dtype = dtype
            .ok_or_else(|| IoError::unsupported(name, format!("type {} is not supported", view.dtype())))?;
        let tensor = Tensor::from_le_bytes(dtype, view.shape().to_vec(), view.data());
        tensors.insert(name.to_owned(), tensor.map_err(|e| IoError::invalid(name, e))?);
    }
    Ok((tensors, metadata))
}
