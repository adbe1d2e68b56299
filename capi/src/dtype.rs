//! Element types and their numbers, which are those of ONNX.

use tpshard_ir::DType;

const NUMBERS: [(i32, DType); 23] = [
    (1, DType::F32),
    (2, DType::U8),
    (3, DType::I8),
    (4, DType::U16),
    (5, DType::I16),
    (6, DType::I32),
    (7, DType::I64),
    (9, DType::Bool),
    (10, DType::F16),
    (11, DType::F64),
    (12, DType::U32),
    (13, DType::U64),
    (16, DType::BF16),
    (17, DType::F8E4M3FN),
    (18, DType::F8E4M3FNUZ),
    (19, DType::F8E5M2),
    (20, DType::F8E5M2FNUZ),
    (21, DType::U4),
    (22, DType::I4),
    (23, DType::F4E2M1),
    (24, DType::F8E8M0),
    (25, DType::U2),
    (26, DType::I2),
];

pub(crate) fn number(dtype: DType) -> i32 {
    NUMBERS.iter().find(|(_, known)| *known == dtype).map_or(0, |(number, _)| *number)
}

pub(crate) fn dtype(number: i32) -> Option<DType> {
    NUMBERS.iter().find(|(known, _)| *known == number).map(|(_, dtype)| *dtype)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_has_one_number() {
        for &known in DType::ALL {
            assert_eq!(dtype(number(known)), Some(known));
        }
        assert_eq!(NUMBERS.len(), DType::ALL.len());
    }

    /// The numbers of the header are these.
    #[test]
    fn the_header_says_the_same() {
        let header = include_str!("../include/tpshard.h");
        let (_, list) = header.split_once("typedef enum tpshard_dtype {").unwrap();
        let (list, _) = list.split_once('}').unwrap();
        let stated: Vec<(String, i32)> = list
            .split(',')
            .map(|line| {
                let (name, number) = line.split_once('=').unwrap();
                (name.trim().to_owned(), number.trim().parse().unwrap())
            })
            .collect();
        let expected: Vec<(String, i32)> = NUMBERS
            .iter()
            .map(|&(number, dtype)| {
                let name = dtype.name();
                let (kind, rest) = match name.as_bytes() {
                    [b'f', b'8' | b'4', ..] => ("FLOAT", &name[1..]),
                    [b'b', b'f', ..] => ("BFLOAT", &name[2..]),
                    [b'b', ..] => ("BOOL", ""),
                    [b'f', ..] => ("FLOAT", &name[1..]),
                    [b'u', ..] => ("UINT", &name[1..]),
                    _ => ("INT", &name[1..]),
                };
                (format!("TPSHARD_{kind}{}", rest.to_uppercase()), number)
            })
            .collect();
        assert_eq!(stated, expected);
    }
}
