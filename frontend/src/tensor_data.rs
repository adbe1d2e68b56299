//! Stored tensors: their type, shape and where their bytes are.
//!
//! ONNX has a dozen ways to store numbers. Here they become one: little-endian bytes in ONNX's packing, either in
//! memory (a slice of the mapped model file when the model uses `raw_data`) or a checked range of an external file.
//! The byte count always matches type and shape exactly.

use crate::error::Fault;
use crate::limits::Limits;
use crate::proto::TensorProto;
use bytes::Bytes;
use std::path::PathBuf;
use tpshard_ir::{DType, Tensor};

/// A tensor whose bytes are known to exist.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorRef {
    /// Empty for most tensors in attributes.
    pub name: String,
    pub dtype: DType,
    pub dims: Vec<u64>,
    pub source: TensorSource,
}

/// Where a tensor's bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TensorSource {
    Inline(Bytes),
    External {
        /// Canonical.
        file: PathBuf,
        offset: u64,
        length: u64,
    },
    /// In a data file that is not there; only where the limits allow it.
    Missing {
        location: String,
        length: u64,
    },
}

impl TensorRef {
    /// Number of elements. Checked when the reference was made.
    pub fn element_count(&self) -> u64 {
        element_count(&self.dims).unwrap_or(0)
    }

    /// Number of bytes.
    pub fn byte_len(&self) -> u64 {
        match &self.source {
            TensorSource::Inline(bytes) => bytes.len() as u64,
            TensorSource::External { length, .. } | TensorSource::Missing { length, .. } => *length,
        }
    }
}

/// `TensorProto.DataType`: ONNX's name and ours.
const DATA_TYPES: &[(&str, Option<DType>)] = &[
    ("undefined", None),
    ("float", Some(DType::F32)),
    ("uint8", Some(DType::U8)),
    ("int8", Some(DType::I8)),
    ("uint16", Some(DType::U16)),
    ("int16", Some(DType::I16)),
    ("int32", Some(DType::I32)),
    ("int64", Some(DType::I64)),
    ("string", None),
    ("bool", Some(DType::Bool)),
    ("float16", Some(DType::F16)),
    ("double", Some(DType::F64)),
    ("uint32", Some(DType::U32)),
    ("uint64", Some(DType::U64)),
    ("complex64", None),
    ("complex128", None),
    ("bfloat16", Some(DType::BF16)),
    ("float8e4m3fn", Some(DType::F8E4M3FN)),
    ("float8e4m3fnuz", Some(DType::F8E4M3FNUZ)),
    ("float8e5m2", Some(DType::F8E5M2)),
    ("float8e5m2fnuz", Some(DType::F8E5M2FNUZ)),
    ("uint4", Some(DType::U4)),
    ("int4", Some(DType::I4)),
    ("float4e2m1", Some(DType::F4E2M1)),
    ("float8e8m0", Some(DType::F8E8M0)),
    ("uint2", Some(DType::U2)),
    ("int2", Some(DType::I2)),
    ("float6e2m3", None),
    ("float6e3m2", None),
];

/// ONNX's name of a data type code, for messages.
pub(crate) fn data_type_name(code: i32) -> Option<&'static str> {
    usize::try_from(code).ok().and_then(|at| DATA_TYPES.get(at)).map(|(name, _)| *name)
}

/// Our element type for a `TensorProto.DataType` code, as operators like `Cast` hold it in an attribute.
///
/// # Errors
/// Strings, complex numbers and codes this version does not know.
pub fn dtype_from_onnx(code: i64) -> Result<DType, Fault> {
    let row = usize::try_from(code).ok().and_then(|at| DATA_TYPES.get(at));
    match row {
        Some((_, Some(dtype))) => Ok(*dtype),
        Some(("undefined", None)) => {
            Err(Fault::invalid("the element type is not given", "export the model again"))
        }
        Some((name, None)) => Err(Fault::unsupported(
            format!("tensors of {name} are not supported"),
            "keep pre- and postprocessing of such values outside the model",
        )),
        None => Err(Fault::invalid(
            format!("{code} is not an element type of ONNX"),
            "the model is damaged or newer than this tool; export it for opset 26 or lower",
        )),
    }
}

/// The `TensorProto.DataType` code of an element type; 0 for none.
pub(crate) fn onnx_from_dtype(dtype: DType) -> i32 {
    let at = DATA_TYPES.iter().position(|(_, own)| *own == Some(dtype));
    at.and_then(|at| i32::try_from(at).ok()).unwrap_or(0)
}

/// Element type, dims and byte length of a tensor, checked against the limits before anything is allocated.
pub(crate) fn describe(proto: &TensorProto, limits: &Limits) -> Result<(DType, Vec<u64>, u64), Fault> {
    let dtype = dtype_from_onnx(i64::from(proto.data_type))?;
    if proto.dims.len() > limits.rank {
        let message = format!("a tensor of rank {}; the limit is {}", proto.dims.len(), limits.rank);
        return Err(Fault::resource(message, "reshape it"));
    }
    let mut dims = Vec::with_capacity(proto.dims.len());
    for &dim in &proto.dims {
        let Ok(dim) = u64::try_from(dim) else {
            return Err(Fault::invalid(format!("a stored tensor has the negative dim {dim}"), AGAIN));
        };
        dims.push(dim);
    }
    let Some(count) = element_count(&dims).filter(|&count| count <= limits.elements) else {
        let message = format!("a tensor of shape {dims:?} has more than {} elements", limits.elements);
        return Err(Fault::invalid(message, "no such tensor can be stored; the model is damaged"));
    };
    let Some(bytes) = dtype.byte_len(count) else {
        return Err(Fault::invalid(format!("a tensor of shape {dims:?} is too large to address"), AGAIN));
    };
    Ok((dtype, dims, bytes))
}

const AGAIN: &str = "the model is damaged or was written by a faulty tool; export it again";

/// Product of dims; a zero anywhere makes it zero, however large the others are.
fn element_count(dims: &[u64]) -> Option<u64> {
    if dims.contains(&0) {
        return Some(0);
    }
    dims.iter().try_fold(1u64, |count, &dim| count.checked_mul(dim))
}

/// Reads a tensor from a file of its own, as ONNX's test data sets hold them: its name, which may be empty, and value.
///
/// # Errors
/// The bytes are not a tensor, or one of a type that has no values here, or its data lies in another file.
pub fn read_tensor(bytes: &[u8]) -> Result<(String, Tensor), Fault> {
    let mut proto = <TensorProto as prost::Message>::decode(bytes)
        .map_err(|error| Fault::invalid(format!("not an ONNX tensor: {error}"), AGAIN))?;
    if proto.data_location != 0 {
        return Err(Fault::unsupported(
            "the tensor's data lies in another file",
            "save the tensor with its data",
        ));
    }
    let (dtype, dims, needed) = describe(&proto, &crate::limits::Limits::default())?;
    let content = inline_bytes(&mut proto, dtype, needed)?;
    let shape: Option<Vec<usize>> = dims.iter().map(|&dim| usize::try_from(dim).ok()).collect();
    let shape = shape.ok_or_else(|| Fault::invalid("a dim exceeds the address space", AGAIN))?;
    let tensor = Tensor::from_le_bytes(dtype, shape, &content)
        .map_err(|error| Fault::invalid(error.to_string(), AGAIN))?;
    Ok((proto.name, tensor))
}

/// The bytes of a tensor that is stored in the model file. Takes them out of `proto`.
pub(crate) fn inline_bytes(proto: &mut TensorProto, dtype: DType, needed: u64) -> Result<Bytes, Fault> {
    if proto.segment.is_some() {
        return Err(Fault::unsupported("the tensor is stored in segments", AGAIN));
    }
    let raw = proto.raw_data.take().filter(|raw| !raw.is_empty());
    let filled = [
        ("raw_data", raw.is_some()),
        ("float_data", !proto.float_data.is_empty()),
        ("int32_data", !proto.int32_data.is_empty()),
        ("int64_data", !proto.int64_data.is_empty()),
        ("double_data", !proto.double_data.is_empty()),
        ("uint64_data", !proto.uint64_data.is_empty()),
        ("string_data", !proto.string_data.is_empty()),
    ];
    let mut filled = filled.iter().filter(|(_, is)| *is).map(|(name, _)| *name);
    let (field, second) = (filled.next(), filled.next());
    if let (Some(first), Some(second)) = (field, second) {
        return Err(Fault::invalid(format!("the tensor has data in both {first} and {second}"), AGAIN));
    }
    let bytes = match (field, raw) {
        (None, _) if needed == 0 => Bytes::new(),
        (None, _) => {
            return Err(Fault::invalid(format!("the tensor needs {needed} bytes and has none"), AGAIN));
        }
        (Some(_), Some(raw)) => raw,
        (Some(field), None) => typed_bytes(proto, dtype, field)?,
    };
    if bytes.len() as u64 != needed {
        let message = format!(
            "dims {:?} of {dtype} need {needed} bytes, {} holds {}",
            proto.dims,
            field.unwrap_or("the tensor"),
            bytes.len()
        );
        return Err(Fault::invalid(message, AGAIN));
    }
    Ok(bytes)
}

fn typed_bytes(proto: &TensorProto, dtype: DType, field: &str) -> Result<Bytes, Fault> {
    let wrong_field = || {
        let message = format!("a tensor of {dtype} cannot be stored in {field}");
        Fault::invalid(message, AGAIN)
    };
    let out: Vec<u8> = match (dtype, field) {
        (DType::F32, "float_data") => proto.float_data.iter().flat_map(|x| x.to_le_bytes()).collect(),
        (DType::F64, "double_data") => proto.double_data.iter().flat_map(|x| x.to_le_bytes()).collect(),
        (DType::I64, "int64_data") => proto.int64_data.iter().flat_map(|x| x.to_le_bytes()).collect(),
        (DType::U64, "uint64_data") => proto.uint64_data.iter().flat_map(|x| x.to_le_bytes()).collect(),
        (DType::U32, "uint64_data") => {
            let mut out = Vec::with_capacity(proto.uint64_data.len() * 4);
            for &value in &proto.uint64_data {
                let narrow = u32::try_from(value).map_err(|_| out_of_range(value, dtype))?;
                out.extend_from_slice(&narrow.to_le_bytes());
            }
            out
        }
        (DType::I32, "int32_data") => proto.int32_data.iter().flat_map(|x| x.to_le_bytes()).collect(),
        (_, "int32_data") => narrow_int32(&proto.int32_data, dtype).ok_or_else(wrong_field)??,
        _ => return Err(wrong_field()),
    };
    Ok(Bytes::from(out))
}

/// `int32_data` of narrower types: one element, or one byte of packed elements, per entry. `None` for types that are
/// not stored there.
fn narrow_int32(values: &[i32], dtype: DType) -> Option<Result<Vec<u8>, Fault>> {
    // Writers disagree on sign extension of bit patterns, so those accept both readings of the same bits.
    let (width, range) = match dtype {
        DType::I8 => (1, -0x80..=0x7f),
        DType::U8 => (1, 0..=0xff),
        DType::Bool => (1, 0..=1),
        DType::I16 => (2, -0x8000..=0x7fff),
        DType::U16 => (2, 0..=0xffff),
        DType::F16 | DType::BF16 => (2, -0x8000..=0xffff),
        DType::I4
        | DType::U4
        | DType::I2
        | DType::U2
        | DType::F4E2M1
        | DType::F8E4M3FN
        | DType::F8E4M3FNUZ
        | DType::F8E5M2
        | DType::F8E5M2FNUZ
        | DType::F8E8M0 => (1, -0x80..=0xff),
        DType::F32 | DType::F64 | DType::I32 | DType::I64 | DType::U32 | DType::U64 => return None,
    };
    let mut out = Vec::with_capacity(values.len() * width);
    for value in values {
        if !range.contains(value) {
            return Some(Err(out_of_range(value, dtype)));
        }
        out.extend(value.to_le_bytes().iter().take(width));
    }
    Some(Ok(out))
}

fn out_of_range(value: impl std::fmt::Display, dtype: DType) -> Fault {
    Fault::invalid(format!("the stored value {value} does not fit {dtype}"), AGAIN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn read(mut proto: TensorProto) -> Result<(DType, Vec<u8>), Fault> {
        let (dtype, _, needed) = describe(&proto, &Limits::default())?;
        inline_bytes(&mut proto, dtype, needed).map(|bytes| (dtype, bytes.to_vec()))
    }

    fn tensor(data_type: i32, dims: &[i64]) -> TensorProto {
        TensorProto { data_type, dims: dims.to_vec(), ..TensorProto::default() }
    }

    fn message(proto: TensorProto) -> String {
        read(proto).unwrap_err().message
    }

    #[test]
    fn every_typed_field_becomes_bytes() {
        let f = TensorProto { float_data: vec![1.0, -2.0], ..tensor(1, &[2]) };
        assert_eq!(read(f).unwrap().1, [0, 0, 128, 63, 0, 0, 0, 192]);
        let half = TensorProto { int32_data: vec![0x3c00, 0xbc00], ..tensor(10, &[2]) };
        assert_eq!(read(half).unwrap(), (DType::F16, vec![0, 0x3c, 0, 0xbc]));
        let i8s = TensorProto { int32_data: vec![-1, 5], ..tensor(3, &[2]) };
        assert_eq!(read(i8s).unwrap(), (DType::I8, vec![0xff, 5]));
        let bools = TensorProto { int32_data: vec![1, 0], ..tensor(9, &[2]) };
        assert_eq!(read(bools).unwrap(), (DType::Bool, vec![1, 0]));
        let u32s = TensorProto { uint64_data: vec![7], ..tensor(12, &[]) };
        assert_eq!(read(u32s).unwrap(), (DType::U32, vec![7, 0, 0, 0]));
        let int4 = TensorProto { int32_data: vec![0x21, 0x03], ..tensor(22, &[3]) };
        assert_eq!(read(int4).unwrap(), (DType::I4, vec![0x21, 0x03]));
        let doubles = TensorProto { double_data: vec![1.0], ..tensor(11, &[1]) };
        assert_eq!(read(doubles).unwrap().1, 1f64.to_le_bytes());
    }

    #[test]
    fn byte_counts_must_match_exactly() {
        let raw = |data_type, dims: &[i64], len: usize| TensorProto {
            raw_data: Some(vec![0; len].into()),
            ..tensor(data_type, dims)
        };
        assert!(message(raw(1, &[2], 9)).contains("need 8 bytes, raw_data holds 9"));
        assert!(message(raw(1, &[2], 4)).contains("need 8 bytes, raw_data holds 4"));
        assert!(message(raw(1, &[2], 0)).contains("has none"));
        read(raw(22, &[3], 2)).unwrap();
        assert!(message(raw(22, &[3], 1)).contains("need 2 bytes"));
        read(raw(1, &[0, i64::MAX], 0)).unwrap();
        let short = TensorProto { float_data: vec![1.0], ..tensor(1, &[3]) };
        assert!(message(short).contains("float_data holds 4"));
    }

    #[test]
    fn impossible_shapes_are_refused_before_allocation() {
        assert!(message(tensor(1, &[-1])).contains("negative dim -1"));
        let huge = read(tensor(1, &[1 << 40, 1 << 40])).unwrap_err();
        assert_eq!(huge.kind, ErrorKind::Invalid);
        assert_eq!(read(tensor(1, &[1; 65])).unwrap_err().kind, ErrorKind::Resource);
    }

    #[test]
    fn wrong_fields_and_values_are_refused() {
        let wrong = TensorProto { int32_data: vec![1], ..tensor(1, &[1]) };
        assert!(message(wrong).contains("f32 cannot be stored in int32_data"));
        let large = TensorProto { int32_data: vec![256], ..tensor(2, &[1]) };
        assert!(message(large).contains("256 does not fit u8"));
        let both =
            TensorProto { float_data: vec![1.0], raw_data: Some(vec![0; 4].into()), ..tensor(1, &[1]) };
        assert!(message(both).contains("both raw_data and float_data"));
    }

    #[test]
    fn types_without_a_counterpart_say_so() {
        for code in [8, 14, 15, 27] {
            assert_eq!(dtype_from_onnx(code).unwrap_err().kind, ErrorKind::Unsupported, "{code}");
        }
        for code in [0, 29, -1, i64::MAX] {
            assert_eq!(dtype_from_onnx(code).unwrap_err().kind, ErrorKind::Invalid, "{code}");
        }
    }
}
