//! Random regions of random expressions against evaluating everything, element by element.

use super::*;
use std::cell::RefCell;
use tpshard_ir::tensor::{Data, element_count};

/// Hands out initializers and counts how it is used.
#[derive(Default)]
struct Memory {
    tensors: BTreeMap<String, Vec<u8>>,
    released: RefCell<Vec<String>>,
}

impl WeightSource for Memory {
    fn bytes(&self, initializer: &str) -> Result<Bytes, SourceError> {
        let found = self.tensors.get(initializer).ok_or("there is none of this name")?;
        Ok(Bytes::copy_from_slice(found))
    }

    fn release(&self, initializer: &str) {
        self.released.borrow_mut().push(initializer.into());
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % bound
    }

    fn pick<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len())]
    }

    fn permutation(&mut self, length: usize) -> Vec<usize> {
        let mut perm: Vec<usize> = (0..length).collect();
        (1..length).for_each(|i| perm.swap(i, self.below(i + 1)));
        perm
    }

    /// A shape with `count` elements.
    fn shape_of(&mut self, count: usize) -> Vec<usize> {
        let mut shape = vec![count];
        for _ in 0..self.below(3) {
            let axis = self.below(shape.len());
            let divisors: Vec<usize> = (1..=shape[axis]).filter(|d| shape[axis].is_multiple_of(*d)).collect();
            if !divisors.is_empty() {
                let divisor = self.pick(&divisors);
                shape[axis] /= divisor;
                shape.insert(axis, divisor);
            }
        }
        shape
    }

    fn span(&mut self, dim: usize) -> Span {
        let start = self.below(dim + 1);
        Span { start, length: self.below(dim - start + 1) }
    }
}

const DTYPES: [DType; 6] = [DType::F32, DType::F16, DType::F64, DType::I64, DType::I8, DType::U16];

fn random_initializer(
    random: &mut Random,
    memory: &mut Memory,
    dtype: DType,
    shape: Vec<usize>,
) -> WeightExpr {
    let name = format!("w{}", memory.tensors.len());
    let bytes = dtype.byte_len(element_count(&shape).unwrap() as u64).unwrap();
    // Small whole numbers, which every type holds.
    let bytes = match dtype.is_packed() {
        true => (0..bytes).map(|_| random.below(256) as u8).collect(),
        false => {
            let numbers = (0..element_count(&shape).unwrap()).map(|_| random.below(100) as i64).collect();
            let mut out = vec![0; bytes as usize];
            assert!(convert(DType::I64, &Data::I64(numbers).to_le_bytes(), dtype, &mut out));
            out
        }
    };
    memory.tensors.insert(name.clone(), bytes);
    WeightExpr::initializer(name, dtype, shape).unwrap()
}

fn random_expression(random: &mut Random, memory: &mut Memory) -> WeightExpr {
    let rank = random.below(5);
    let shape: Vec<usize> = (0..rank).map(|_| random.pick(&[1, 2, 3, 4, 6])).collect();
    let dtype = random.pick(&DTYPES);
    let mut expr = random_initializer(random, memory, dtype, shape);
    for _ in 0..random.below(7) {
        let shape = expr.shape().to_vec();
        expr = match random.below(5) {
            0 if !shape.is_empty() => {
                let axis = random.below(shape.len());
                let span = random.span(shape[axis]);
                expr.slice(axis, span.start, span.length).unwrap()
            }
            1 if !shape.is_empty() => {
                let axis = random.below(shape.len());
                let mut other = shape.clone();
                other[axis] = random.below(4);
                let other = random_initializer(random, memory, expr.dtype(), other);
                let mut sources = vec![expr.clone(), other, expr];
                sources.truncate(2 + random.below(2));
                WeightExpr::concat(sources, axis).unwrap()
            }
            2 => expr.transpose(random.permutation(shape.len())).unwrap(),
            3 => expr.reshape(random.shape_of(element_count(&shape).unwrap())).unwrap(),
            _ => expr.cast(random.pick(&DTYPES)).unwrap(),
        };
        if element_count(expr.shape()).unwrap() > 5000 {
            break;
        }
    }
    expr
}

fn coordinates(mut flat: usize, shape: &[usize]) -> Vec<usize> {
    let mut found = vec![0; shape.len()];
    for d in (0..shape.len()).rev() {
        found[d] = flat % shape[d];
        flat /= shape[d];
    }
    found
}

fn flat(coordinates: &[usize], shape: &[usize]) -> usize {
    coordinates.iter().zip(shape).fold(0, |flat, (&c, &dim)| flat * dim + c)
}

/// The bytes of one element, by the definition of each operation.
fn element(expr: &WeightExpr, at: &[usize], memory: &Memory) -> Vec<u8> {
    match expr.kind() {
        WeightKind::Initializer { name } => {
            let width = width(expr.dtype());
            let start = flat(at, expr.shape()) * width;
            memory.tensors[name][start..start + width].to_vec()
        }
        WeightKind::Slice { source, axis, start, .. } => {
            let mut at = at.to_vec();
            at[*axis] += start;
            element(source, &at, memory)
        }
        WeightKind::Concat { sources, axis } => {
            let mut at = at.to_vec();
            for source in sources {
                if at[*axis] < source.shape()[*axis] {
                    return element(source, &at, memory);
                }
                at[*axis] -= source.shape()[*axis];
            }
            unreachable!()
        }
        WeightKind::Transpose { source, perm } => {
            let mut inner = at.to_vec();
            (0..perm.len()).for_each(|i| inner[perm[i]] = at[i]);
            element(source, &inner, memory)
        }
        WeightKind::Reshape { source } => {
            element(source, &coordinates(flat(at, expr.shape()), source.shape()), memory)
        }
        WeightKind::Cast { source } => {
            let mut out = vec![0; width(expr.dtype())];
            assert!(convert(source.dtype(), &element(source, at, memory), expr.dtype(), &mut out));
            out
        }
    }
}

fn naive(expr: &WeightExpr, region: &[Span], memory: &Memory) -> Vec<u8> {
    let lengths = lengths(region);
    let mut out = Vec::new();
    for index in 0..count(region) {
        let at: Vec<usize> =
            coordinates(index, &lengths).iter().zip(region).map(|(c, span)| c + span.start).collect();
        out.extend(element(expr, &at, memory));
    }
    out
}

fn read(
    expr: &WeightExpr,
    region: &[Span],
    chunk: Option<usize>,
    memory: &Memory,
) -> Result<Vec<u8>, WeightError> {
    let mut reader = RegionReader::new(expr, region)?;
    reader.chunk = chunk.unwrap_or(reader.chunk);
    let (mut loader, mut buffer, mut out) = (Loader::new(memory), Vec::new(), Vec::new());
    while reader.next_chunk(&mut loader, &mut buffer)? {
        assert!(!buffer.is_empty() && buffer.len() <= reader.chunk * width(reader.weight.dtype()));
        out.extend_from_slice(&buffer);
        assert_eq!(reader.bytes_done(), out.len());
    }
    assert_eq!(reader.byte_len(), out.len());
    Ok(out)
}

#[test]
fn random_regions_equal_the_definition() {
    let mut random = Random(1);
    let mut sizes = 0;
    for case in 0..4000 {
        let mut memory = Memory::default();
        let expr = random_expression(&mut random, &mut memory);
        let region: Vec<Span> = match case % 3 {
            0 => whole(expr.shape()),
            _ => expr.shape().iter().map(|&dim| random.span(dim)).collect(),
        };
        let expected = naive(&expr, &region, &memory);
        sizes += expected.len();
        for chunk in [None, Some(1 + random.below(20))] {
            let found = read(&expr, &region, chunk, &memory).unwrap();
            assert!(found == expected, "case {case}: {region:?} of {expr}, chunks {chunk:?}");
        }
        let parsed: WeightExpr = expr.to_string().parse().unwrap();
        assert_eq!(parsed, expr);
    }
    assert!(sizes > 100_000, "{sizes}");
}

#[test]
fn reshapes_of_whole_heads_stay_rectangular() {
    let spans = |region: &[(usize, usize)]| -> Vec<Span> {
        region.iter().map(|&(start, length)| Span { start, length }).collect()
    };
    // hidden × (heads · size) seen as hidden × heads × size: two heads.
    let heads = rectangular(&[512, 8, 64], &spans(&[(0, 512), (2, 2), (0, 64)]), &[512, 512]);
    assert_eq!(heads, Some(spans(&[(0, 512), (128, 128)])));
    let joined = rectangular(&[512, 512], &spans(&[(3, 5), (128, 128)]), &[512, 8, 64]);
    assert_eq!(joined, Some(spans(&[(3, 5), (2, 2), (0, 64)])));
    let ones = rectangular(&[1, 4, 1], &spans(&[(0, 1), (1, 2), (0, 1)]), &[4, 1, 1, 1]);
    assert_eq!(ones, Some(spans(&[(1, 2), (0, 1), (0, 1), (0, 1)])));
    assert_eq!(rectangular(&[512, 8, 64], &spans(&[(0, 512), (0, 8), (0, 32)]), &[512, 512]), None);
    assert_eq!(rectangular(&[6, 4], &spans(&[(1, 2), (0, 4)]), &[8, 3]), None);
}

#[test]
fn packed_types_are_cut_between_bytes() {
    let mut random = Random(3);
    let mut memory = Memory::default();
    let weight = random_initializer(&mut random, &mut memory, DType::U4, vec![3, 4, 8]);
    let bytes = memory.tensors["w0"].clone();
    let part = [Span { start: 1, length: 2 }, Span { start: 3, length: 1 }, Span { start: 2, length: 4 }];
    let expected = [&bytes[4 * 4 + 3 * 4 + 1..][..2], &bytes[2 * 16 + 3 * 4 + 1..][..2]].concat();
    assert_eq!(read(&weight, &part, None, &memory).unwrap(), expected);
    let turned = weight.transpose(vec![1, 0, 2]).unwrap().slice(2, 2, 4).unwrap();
    let turned_part = [part[1], part[0], Span { start: 0, length: 4 }];
    assert_eq!(read(&turned, &turned_part, Some(1), &memory).unwrap(), expected);
    let flat = weight.reshape(vec![12, 8]).unwrap();
    let rows = [Span { start: 7, length: 1 }, Span { start: 0, length: 8 }];
    assert_eq!(read(&flat, &rows, None, &memory).unwrap(), bytes[28..32]);

    let error =
        |expr: &WeightExpr, region: &[Span]| read(expr, region, None, &memory).unwrap_err().to_string();
    let odd = [part[0], part[1], Span { start: 1, length: 4 }];
    assert!(error(&weight, &odd).contains("u4, of which 2 share a byte\nhelp: split another dimension"));
    assert!(error(&weight, &[part[0], part[1], Span { start: 2, length: 3 }]).contains("a slice of 3"));
    assert!(
        error(&weight.transpose(vec![2, 1, 0]).unwrap(), &whole(&[8, 4, 3])).contains("transpose([2, 1, 0])")
    );
    assert!(error(&weight.slice(2, 1, 4).unwrap(), &whole(&[3, 4, 4])).contains("slice(2, 1, 4)"));
    assert!(error(&weight.reshape(vec![32, 3]).unwrap(), &[rows[0], whole(&[3])[0]]).contains("[32, 3]"));

    // Whole weights need no cut, however odd their shape.
    let odd = random_initializer(&mut random, &mut memory, DType::I2, vec![3, 3]);
    assert_eq!(read(&odd, &whole(&[3, 3]), None, &memory).unwrap(), memory.tensors["w1"]);
    let reshaped = odd.reshape(vec![9]).unwrap();
    assert_eq!(read(&reshaped, &whole(&[9]), None, &memory).unwrap(), memory.tensors["w1"]);
    assert!(
        read(&odd, &[Span { start: 0, length: 2 }, Span { start: 0, length: 3 }], None, &memory).is_err()
    );
    let scalar = random_initializer(&mut random, &mut memory, DType::U4, vec![]);
    assert_eq!(read(&scalar, &[], None, &memory).unwrap(), memory.tensors["w2"]);
}

#[test]
fn wrong_regions_and_wrong_sources_are_refused() {
    let mut memory = Memory::default();
    memory.tensors.insert("short".into(), vec![0; 15]);
    let short = WeightExpr::initializer("short", DType::F32, vec![4]).unwrap();
    let error = read(&short, &whole(&[4]), None, &memory).unwrap_err().to_string();
    assert_eq!(error, "initializer `short`: [4] of f32 has 16 bytes, the model holds 15");
    let missing = WeightExpr::initializer("missing", DType::F32, vec![4]).unwrap();
    let error = read(&missing, &whole(&[4]), None, &memory).unwrap_err().to_string();
    assert_eq!(error, "initializer `missing`: there is none of this name");
    let far = Span { start: usize::MAX, length: 2 };
    for region in [&[Span { start: 2, length: 3 }][..], &[], &[far], &whole(&[4, 1])] {
        assert!(matches!(read(&short, region, None, &memory), Err(WeightError::Region { .. })), "{region:?}");
    }
}

#[test]
fn working_memory_covers_all_intermediate_results() {
    let mut memory = Memory::default();
    let shape = vec![64, 1000];
    let weight = random_initializer(&mut Random(5), &mut memory, DType::I8, shape);
    let mut deep = weight.clone();
    for _ in 0..20 {
        deep =
            deep.cast(DType::F64).unwrap().reshape(vec![1000, 64]).unwrap().reshape(vec![64, 1000]).unwrap();
    }
    // Per level: two casts' worth of f64 (the first from i8) and two reshapes; and the result.
    let per_element = 20 * (8 + 8 + 8 + 8) - 7 + 8;
    let reader = RegionReader::new(&deep, &whole(&[64, 1000])).unwrap();
    assert_eq!(reader.chunk, WORKING_BYTES / per_element);
    let expected = naive(&weight.cast(DType::F64).unwrap(), &whole(&[64, 1000]), &memory);
    assert!(read(&deep, &whole(&[64, 1000]), None, &memory).unwrap() == expected);
}

#[test]
fn the_loader_counts_and_releases_what_it_touched() {
    let mut memory = Memory::default();
    let weight = random_initializer(&mut Random(6), &mut memory, DType::F32, vec![1000, 1000]);
    let mut loader = Loader::new(&memory);
    let columns = [Span { start: 0, length: 1000 }, Span { start: 10, length: 2 }];
    let mut reader = RegionReader::new(&weight, &columns).unwrap();
    assert!(reader.next_chunk(&mut loader, &mut Vec::new()).unwrap());
    // A few bytes of every page are the whole page.
    assert!(loader.touched > 3_900_000, "{}", loader.touched);
    loader.release();
    assert_eq!(loader.touched, 0);
    assert_eq!(*memory.released.borrow(), ["w0"]);
    let row = [Span { start: 5, length: 1 }, Span { start: 0, length: 1000 }];
    RegionReader::new(&weight, &row).unwrap().next_chunk(&mut loader, &mut Vec::new()).unwrap();
    assert!(loader.touched < 100_000, "{}", loader.touched);
}
