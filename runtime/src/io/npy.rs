//! The `.npy` format: a magic number, a header that is a Python dict literal, and the elements.
//!
//! The dict has three known keys, so a strict reader of strings, booleans and a tuple of integers suffices. Fortran
//! order and big-endian elements are brought into our order; object arrays are pickles and never read.

use super::IoError;
use crate::comm::bytes;
use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::path::Path;
use tpshard_ir::{DType, Data, Tensor};

const MAGIC: &[u8] = b"\x93NUMPY";
/// NumPy itself refuses headers above 10 000 bytes unless told otherwise.
const HEADER_LIMIT: usize = 64 << 10;
const RANK_LIMIT: usize = 64;

#[derive(Debug, PartialEq, Eq)]
struct Header {
    dtype: DType,
    big_endian: bool,
    fortran_order: bool,
    shape: Vec<usize>,
}

/// Reads one array.
///
/// # Errors
/// [`IoError`] with the file and what is wrong with it.
pub fn read_npy(path: &Path, limit: u64) -> Result<Tensor, IoError> {
    let file = File::open(path).map_err(IoError::system(path))?;
    read(&mut BufReader::new(file), &path.display().to_string(), limit)
}

/// Writes one array.
///
/// # Errors
/// [`IoError::Unsupported`] for types without a NumPy form; [`IoError::System`].
pub fn write_npy(path: &Path, tensor: &Tensor) -> Result<(), IoError> {
    let place = path.display().to_string();
    let mut file = File::create(path).map_err(IoError::system(path))?;
    let (header, widened) = encode(tensor, &place)?;
    let data = bytes(widened.as_ref().unwrap_or(tensor.data()));
    file.write_all(&header).and_then(|()| file.write_all(data)).map_err(IoError::system(path))
}

/// Header bytes, and the elements if they need another type.
pub(super) fn encode(tensor: &Tensor, place: &str) -> Result<(Vec<u8>, Option<Data>), IoError> {
    let descr = match tensor.dtype() {
        DType::F32 | DType::BF16 => "<f4",
        DType::F16 => "<f2",
        DType::F64 => "<f8",
        DType::I8 => "|i1",
        DType::I16 => "<i2",
        DType::I32 => "<i4",
        DType::I64 => "<i8",
        DType::U8 => "|u1",
        DType::U16 => "<u2",
        DType::U32 => "<u4",
        DType::U64 => "<u8",
        DType::Bool => "|b1",
        other => return Err(IoError::unsupported(place, format!("{other} has no NumPy form"))),
    };
    let widened = match tensor.data() {
        Data::BF16(values) => Some(Data::F32(values.iter().map(|v| v.to_f32()).collect())),
        _ => None,
    };
    let mut shape: String = tensor.shape().iter().map(|d| format!("{d}, ")).collect();
    if tensor.shape().len() > 1 {
        shape.truncate(shape.len() - 2);
    } else {
        shape.truncate(shape.trim_end().len());
    }
    let mut text = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({shape}), }}");
    // The elements start at a multiple of 64.
    let padded = (MAGIC.len() + 4 + text.len() + 1).next_multiple_of(64);
    text.extend(std::iter::repeat_n(' ', padded - (MAGIC.len() + 4 + text.len() + 1)));
    text.push('\n');
    let mut header = MAGIC.to_vec();
    header.extend([1, 0]);
    header.extend((text.len() as u16).to_le_bytes());
    header.extend(text.as_bytes());
    Ok((header, widened))
}

/// Reads an array that takes at most `limit` bytes; the reader must end with it.
pub(super) fn read(reader: &mut dyn Read, place: &str, limit: u64) -> Result<Tensor, IoError> {
    let header = parse_header(&header_text(reader, place)?, place)?;
    let count = header.shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d as u64));
    let needed = count.and_then(|count| header.dtype.byte_len(count)).unwrap_or(u64::MAX);
    if needed > limit {
        return Err(IoError::TooLarge { place: place.into(), needed, limit });
    }
    let mut data = Vec::new();
    // Grows with what is there, not with what the header promises. The byte more finds trailing data, and makes a
    // zip entry check its sum.
    let read = reader.take(needed + 1).read_to_end(&mut data);
    read.map_err(|cause| IoError::System { place: place.into(), cause })?;
    if data.len() as u64 != needed {
        let relation = if data.len() as u64 > needed { "more" } else { "fewer" };
        let what = format!(
            "shape {:?} of {} takes {needed} bytes; there are {relation}",
            header.shape, header.dtype
        );
        return Err(IoError::invalid(place, what));
    }
    let width = header.dtype.bits() / 8;
    if header.big_endian {
        data.chunks_exact_mut(width).for_each(<[u8]>::reverse);
    }
    if header.fortran_order {
        data = to_row_major(&data, &header.shape, width);
    }
    Tensor::from_le_bytes(header.dtype, header.shape, &data).map_err(|e| IoError::invalid(place, e))
}

/// Column-major elements in row-major order.
fn to_row_major(data: &[u8], shape: &[usize], width: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(data.len());
    let mut index = vec![0; shape.len()];
    for _ in 0..data.len() / width {
        let source = index.iter().zip(shape).rev().fold(0, |at, (i, size)| at * size + i);
        out.extend_from_slice(&data[source * width..(source + 1) * width]);
        for (i, &size) in index.iter_mut().zip(shape).rev() {
            *i += 1;
            if *i < size {
                break;
            }
            *i = 0;
        }
    }
    out
}

fn header_text(reader: &mut dyn Read, place: &str) -> Result<String, IoError> {
    let mut read = |len: usize| -> Result<Vec<u8>, IoError> {
        let mut bytes = vec![0; len];
        reader.read_exact(&mut bytes).map_err(|_| IoError::invalid(place, "ends within the npy header"))?;
        Ok(bytes)
    };
    let start = read(8)?;
    if !start.starts_with(MAGIC) {
        return Err(IoError::invalid(place, "not an npy array"));
    }
    let len = match start.last() {
        _ if start[6] == 1 => read(2)?.iter().rev().fold(0, |len, &b| len << 8 | usize::from(b)),
        _ if start[6] == 2 || start[6] == 3 => {
            read(4)?.iter().rev().fold(0, |len, &b| len << 8 | usize::from(b))
        }
        _ => return Err(IoError::unsupported(place, format!("npy version {}", start[6]))),
    };
    if len > HEADER_LIMIT {
        return Err(IoError::invalid(place, format!("npy header of {len} bytes")));
    }
    String::from_utf8(read(len)?).map_err(|_| IoError::invalid(place, "npy header is not text"))
}

/// What is left of a header.
struct Cursor<'a>(&'a str);

impl<'a> Cursor<'a> {
    fn eat(&mut self, token: &str) -> bool {
        self.0 = self.0.trim_start();
        match self.0.strip_prefix(token) {
            Some(rest) => {
                self.0 = rest;
                true
            }
            None => false,
        }
    }

    fn string(&mut self) -> Option<&'a str> {
        let quote = if self.eat("'") { '\'' } else { self.eat("\"").then_some('"')? };
        let (text, rest) = self.0.split_once(quote)?;
        self.0 = rest;
        Some(text)
    }

    fn integer(&mut self) -> Option<usize> {
        self.0 = self.0.trim_start();
        let end = self.0.find(|c: char| !c.is_ascii_digit()).unwrap_or(self.0.len());
        let (digits, rest) = self.0.split_at(end);
        // Python 2 wrote long integers with an L.
        self.0 = rest.strip_prefix('L').unwrap_or(rest);
        digits.parse().ok()
    }

    fn boolean(&mut self) -> Option<bool> {
        if self.eat("True") { Some(true) } else { self.eat("False").then_some(false) }
    }

    fn shape(&mut self) -> Option<Vec<usize>> {
        let mut shape = vec![];
        if !self.eat("(") {
            return None;
        }
        while !self.eat(")") {
            shape.push(self.integer()?);
            if shape.len() > RANK_LIMIT || !self.eat(",") {
                return self.eat(")").then_some(shape);
            }
        }
        Some(shape)
    }
}

fn parse_header(text: &str, place: &str) -> Result<Header, IoError> {
    let broken = || IoError::invalid(place, "npy header is not what NumPy writes");
    let mut cursor = Cursor(text);
    let (mut descr, mut fortran_order, mut shape) = (None, None, None);
    if !cursor.eat("{") {
        return Err(broken());
    }
    while !cursor.eat("}") {
        let key = cursor.string().ok_or_else(broken)?;
        if !cursor.eat(":") {
            return Err(broken());
        }
        match key {
            "descr" if cursor.eat("[") => return Err(IoError::unsupported(place, "structured arrays")),
            "descr" if descr.is_none() => descr = Some(cursor.string().ok_or_else(broken)?),
            "fortran_order" if fortran_order.is_none() => {
                fortran_order = Some(cursor.boolean().ok_or_else(broken)?);
            }
            "shape" if shape.is_none() => shape = Some(cursor.shape().ok_or_else(broken)?),
            _ => return Err(broken()),
        }
        if !cursor.eat(",") && !cursor.0.trim_start().starts_with('}') {
            return Err(broken());
        }
    }
    let (Some(descr), Some(fortran_order), Some(shape)) = (descr, fortran_order, shape) else {
        return Err(broken());
    };
    let (dtype, big_endian) = parse_descr(descr, place)?;
    Ok(Header { dtype, big_endian, fortran_order, shape })
}

fn parse_descr(descr: &str, place: &str) -> Result<(DType, bool), IoError> {
    let kind = descr.trim_start_matches(['<', '>', '|', '=']);
    let dtype = match kind {
        "f4" => DType::F32,
        "f2" => DType::F16,
        "f8" => DType::F64,
        "i1" => DType::I8,
        "i2" => DType::I16,
        "i4" => DType::I32,
        "i8" => DType::I64,
        "u1" => DType::U8,
        "u2" => DType::U16,
        "u4" => DType::U32,
        "u8" => DType::U64,
        "b1" => DType::Bool,
        "O" => return Err(IoError::unsupported(place, "object arrays are pickles, which are never read")),
        "V2" => return Err(IoError::unsupported(place, "type `V2`; bfloat16 is exchanged as float32")),
        _ => return Err(IoError::unsupported(place, format!("array type `{descr}`"))),
    };
    Ok((dtype, descr.starts_with('>')))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn array(header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend([1, 0]);
        bytes.extend((header.len() as u16).to_le_bytes());
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        bytes
    }

    fn parse(bytes: &[u8]) -> Result<Tensor, String> {
        read(&mut &*bytes, "x.npy", 1 << 20).map_err(|e| e.to_string())
    }

    #[test]
    fn what_is_written_is_read_back() {
        for &dtype in DType::ALL {
            let size = dtype.byte_len(6).unwrap_or(0) as usize;
            let tensor = Tensor::from_le_bytes(dtype, vec![2, 3], &vec![1; size]).unwrap();
            match encode(&tensor, "x") {
                Ok((mut bytes, widened)) => {
                    assert_eq!(bytes.len() % 64, 0);
                    bytes.extend(widened.as_ref().unwrap_or(tensor.data()).to_le_bytes());
                    let back = parse(&bytes).unwrap();
                    assert_eq!(back.shape(), [2, 3]);
                    assert!(back == tensor || dtype == DType::BF16, "{dtype}");
                }
                Err(error) => assert!(error.to_string().contains("has no NumPy form"), "{dtype}"),
            }
        }
    }

    #[test]
    fn scalars_and_vectors_have_python_tuples() {
        let header = |shape: Vec<usize>| {
            let tensor = Tensor::zeros(DType::F32, shape).unwrap();
            String::from_utf8_lossy(&encode(&tensor, "x").unwrap().0[10..]).trim_end().to_owned()
        };
        assert!(header(vec![]).ends_with("'shape': (), }"), "{}", header(vec![]));
        assert!(header(vec![3]).ends_with("'shape': (3,), }"));
        assert!(header(vec![3, 4]).ends_with("'shape': (3, 4), }"));
    }

    #[test]
    fn other_orders_are_brought_into_ours() {
        let header = "{'descr': '>i2', 'fortran_order': True, 'shape': (2, 3), }\n";
        let column_major: Vec<u8> = [1i16, 4, 2, 5, 3, 6].iter().flat_map(|v| v.to_be_bytes()).collect();
        let tensor = parse(&array(header, &column_major)).unwrap();
        assert_eq!(tensor.as_slice::<i16>().unwrap(), [1, 2, 3, 4, 5, 6]);
        let empty = "{'descr': '<f4', 'fortran_order': True, 'shape': (0, 3), }";
        assert_eq!(parse(&array(empty, &[])).unwrap().shape(), [0, 3]);
    }

    #[test]
    fn hostile_headers_are_refused() {
        let header = |descr: &str, shape: &str| {
            format!("{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}")
        };
        for (text, expected) in [
            (header("'<f4'", "(4,)"), "there are fewer"),
            (header("'<f4'", "()"), "there are more"),
            (header("'<f4'", "(4611686018427387904, 4)"), "the limit is"),
            (header("'<f4'", "(1000000000000,)"), "the limit is"),
            (header("'<f4'", "(99999999999999999999,)"), "not what NumPy writes"),
            (header("'<f4'", "(-1,)"), "not what NumPy writes"),
            (header("'<f4'", &format!("({})", "1,".repeat(70))), "not what NumPy writes"),
            (header("'|O'", "(2,)"), "never read"),
            (header("'<U4'", "(2,)"), "array type `<U4`"),
            (header("[('a', '<f4')]", "(2,)"), "structured arrays"),
            ("{'descr': '<f4', 'descr': '<f4'}".into(), "not what NumPy writes"),
            ("{".into(), "not what NumPy writes"),
            ("((((((((".into(), "not what NumPy writes"),
        ] {
            let error = parse(&array(&text, &[0; 8])).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
        assert!(parse(b"PK\x03\x04....").unwrap_err().contains("not an npy array"));
        assert!(parse(&MAGIC[..4]).unwrap_err().contains("ends within"));
        let mut long = MAGIC.to_vec();
        long.extend([2, 0, 255, 255, 255, 255]);
        assert!(parse(&long).unwrap_err().contains("header of 4294967295 bytes"));
    }
}
