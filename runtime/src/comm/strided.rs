//! A run along one dim of a row-major tensor, as bytes: `outer` pieces of `run` bytes, `stride` bytes apart.
//!
//! Packing lays the pieces end to end; any byte range of the packed form can be read or written, so that a tensor can
//! go through bounded slots without ever being packed as a whole.

use super::CommError;
use tpshard_ir::DType;

/// Where the bytes of a run along a dim lie in a tensor's buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Strided {
    outer: usize,
    stride: usize,
    offset: usize,
    run: usize,
}

impl Strided {
    /// The run `start .. start + extent` along `dim` of a tensor of this shape.
    pub(super) fn new(
        dtype: DType,
        shape: &[usize],
        dim: usize,
        start: usize,
        extent: usize,
    ) -> Result<Strided, CommError> {
        let usage = |what: String| CommError::Usage { what };
        let size = *shape
            .get(dim)
            .ok_or_else(|| usage(format!("dim {dim} does not exist in a tensor of shape {shape:?}")))?;
        if start.checked_add(extent).is_none_or(|end| end > size) {
            return Err(usage(format!("run {start}+{extent} leaves dim {dim} of shape {shape:?}")));
        }
        let outer = shape[..dim].iter().product();
        let inner: usize = shape[dim + 1..].iter().product();
        let bytes = |count: usize| {
            let bits = count.checked_mul(inner).and_then(|n| n.checked_mul(dtype.bits()));
            bits.filter(|bits| bits % 8 == 0).map(|bits| bits / 8).ok_or_else(|| {
                usage(format!("a run of {count} along dim {dim} of {shape:?} {dtype} is not whole bytes"))
            })
        };
        Ok(Strided { outer, stride: bytes(size)?, offset: bytes(start)?, run: bytes(extent)? })
    }

    /// Bytes of the packed form.
    pub(super) fn len(&self) -> usize {
        self.outer * self.run
    }

    /// Calls `copy(in tensor, in packed range, count)` for every contiguous piece of packed bytes `at .. at + len`.
    fn pieces(&self, at: usize, len: usize, mut copy: impl FnMut(usize, usize, usize)) {
        let mut done = 0;
        while done < len && self.run > 0 {
            let (row, within) = ((at + done) / self.run, (at + done) % self.run);
            let count = (self.run - within).min(len - done);
            copy(row * self.stride + self.offset + within, done, count);
            done += count;
        }
    }

    /// Copies packed bytes from `at` on into `packed`.
    pub(super) fn pack(&self, tensor: &[u8], at: usize, packed: &mut [u8]) {
        self.pieces(at, packed.len(), |source, to, count| {
            packed[to..to + count].copy_from_slice(&tensor[source..source + count]);
        });
    }

    /// Writes packed bytes, which start at `at`, to their places.
    pub(super) fn unpack(&self, packed: &[u8], at: usize, tensor: &mut [u8]) {
        self.pieces(at, packed.len(), |target, from, count| {
            tensor[target..target + count].copy_from_slice(&packed[from..from + count]);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_chunking_packs_the_same_bytes() {
        let tensor: Vec<u8> = (0..24).collect();
        let run = Strided::new(DType::U8, &[2, 4, 3], 1, 1, 2).unwrap();
        let expected = [3, 4, 5, 6, 7, 8, 15, 16, 17, 18, 19, 20];
        assert_eq!(run.len(), 12);
        for chunk in 1..=12 {
            let mut packed = vec![0; 12];
            for (i, part) in packed.chunks_mut(chunk).enumerate() {
                run.pack(&tensor, i * chunk, part);
            }
            assert_eq!(packed, expected);
            let mut back = vec![0; 24];
            for (i, part) in packed.chunks(chunk).enumerate() {
                run.unpack(part, i * chunk, &mut back);
            }
            assert_eq!(back.iter().map(|&b| usize::from(b != 0)).sum::<usize>(), 12);
        }
    }

    #[test]
    fn packed_types_need_whole_bytes() {
        assert!(Strided::new(DType::I4, &[2, 3], 1, 0, 1).is_err());
        assert_eq!(Strided::new(DType::I4, &[3, 2], 0, 1, 2).unwrap().len(), 2);
    }
}
