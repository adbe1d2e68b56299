//! One list of collective checks, run by every transport: each compares a collective with a computation on the whole
//! tensors, which every rank makes again from the seed.

use tpshard_ir::{DType, Data, Tensor};
use tpshard_runtime::comm::{Communicator, Group, Kind, Monoid, Sharding, Tag};

pub(crate) const MONOIDS: [Monoid; 4] = [Monoid::Sum, Monoid::Prod, Monoid::Max, Monoid::Min];
const ARITHMETIC: [DType; 13] = [
    DType::F32,
    DType::F64,
    DType::F16,
    DType::BF16,
    DType::I8,
    DType::I16,
    DType::I32,
    DType::I64,
    DType::U8,
    DType::U16,
    DType::U32,
    DType::U64,
    DType::Bool,
];

struct Checks<'a> {
    comm: &'a dyn Communicator,
    sequence: u64,
}

impl Checks<'_> {
    fn tag(&mut self) -> Tag {
        self.sequence += 1;
        Tag { sequence: self.sequence, node: self.sequence as u32 + 100 }
    }
}

/// Small positive integers (exact in every type, also as products of five), different for every seed and place.
fn numbers(seed: usize, count: usize) -> Vec<u8> {
    (0..count).map(|i| ((i * 7 + seed * 13 + i * seed) % 3 + 1) as u8).collect()
}

fn tensor(dtype: DType, shape: &[usize], numbers: &[u8]) -> Tensor {
    let bytes: Vec<u8> = numbers
        .iter()
        .flat_map(|&n| match dtype {
            DType::F32 => f32::from(n).to_le_bytes().to_vec(),
            DType::F64 => f64::from(n).to_le_bytes().to_vec(),
            DType::F16 => half::f16::from_f32(f32::from(n)).to_le_bytes().to_vec(),
            DType::BF16 => half::bf16::from_f32(f32::from(n)).to_le_bytes().to_vec(),
            DType::Bool => vec![n % 2],
            _ => {
                let mut bytes = vec![0; dtype.bits() / 8];
                bytes[0] = n;
                bytes
            }
        })
        .collect();
    Tensor::from_le_bytes(dtype, shape.to_vec(), &bytes).unwrap()
}

fn combine(dtype: DType, monoid: Monoid, a: u8, b: u8) -> u8 {
    match (dtype, monoid) {
        (DType::Bool, Monoid::Sum | Monoid::Max) => (a % 2) | (b % 2),
        (DType::Bool, Monoid::Prod | Monoid::Min) => (a % 2) & (b % 2),
        (_, Monoid::Sum) => a + b,
        (_, Monoid::Prod) => a.wrapping_mul(b),
        (_, Monoid::Max) => a.max(b),
        (_, Monoid::Min) => a.min(b),
    }
}

fn combined(dtype: DType, monoid: Monoid, members: usize, count: usize) -> Vec<u8> {
    let mut all = (0..members).map(|seed| numbers(seed, count));
    let first = all.next().unwrap();
    all.fold(first, |sum, x| sum.iter().zip(&x).map(|(&a, &b)| combine(dtype, monoid, a, b)).collect())
}

/// The run `start .. start + extent` along `dim`, element by element.
fn slice(whole: &[u8], shape: &[usize], dim: usize, start: usize, extent: usize) -> Vec<u8> {
    let inner: usize = shape[dim + 1..].iter().product();
    let keep = |i: &usize| (start..start + extent).contains(&(i / inner.max(1) % shape[dim].max(1)));
    (0..whole.len()).filter(keep).map(|i| whole[i]).collect()
}

fn with(shape: &[usize], dim: usize, size: usize) -> Vec<usize> {
    let mut shape = shape.to_vec();
    shape[dim] = size;
    shape
}

/// Uneven extents, some empty.
fn extents(members: usize, variant: usize) -> Vec<usize> {
    (0..members)
        .map(|i| match variant {
            0 => 2,
            1 => (members - i) / 2,
            2 => usize::from(i == members - 1) * 5,
            _ => 0,
        })
        .collect()
}

/// All checks, on the world and on its sub-groups. `large` adds tensors of several slots.
pub(crate) fn check_all(comm: &dyn Communicator, large: usize) {
    let mut checks = Checks { comm, sequence: 0 };
    let world = comm.world_size();
    let mut groups = vec![Group::world(world), Group::new((0..world).rev().collect()).unwrap()];
    if world > 2 {
        // A 2 x k mesh: rows of even and odd ranks side by side, then a group that leaves rank 0 out.
        let part = |odd| Group::new((0..world).filter(|r| r % 2 == odd).collect()).unwrap();
        groups.push(part(comm.rank() % 2));
        groups.push(Group::new((1..world).collect()).unwrap());
    }
    for (index, group) in groups.iter().enumerate().filter(|(_, g)| g.position(comm.rank()).is_some()) {
        // Groups of different size make different numbers of calls.
        checks.sequence = (index as u64) << 20;
        checks.reductions(group, large);
        checks.gathers(group, large);
        checks.reduce_scatters(group, large);
        checks.all_to_alls(group, large);
        checks.blobs(group, large);
    }
    checks.sequence = 1 << 40;
    let tag = checks.tag();
    comm.barrier(&Group::world(world), tag).unwrap();
    assert!(comm.history().records.iter().all(|r| r.done));
}

impl Checks<'_> {
    fn reductions(&mut self, group: &Group, large: usize) {
        let me = group.position(self.comm.rank()).unwrap();
        for dtype in ARITHMETIC {
            for monoid in MONOIDS {
                for shape in [vec![], vec![0, 3], vec![3, 5], vec![large]] {
                    let count = shape.iter().product();
                    let mut data = tensor(dtype, &shape, &numbers(me, count));
                    let tag = self.tag();
                    self.comm.all_reduce(group, tag, monoid, &mut data).unwrap();
                    let expected = tensor(dtype, &shape, &combined(dtype, monoid, group.len(), count));
                    assert_eq!(data, expected, "{dtype} {monoid:?} {shape:?} {group:?}");
                }
            }
        }
    }

    fn gathers(&mut self, group: &Group, large: usize) {
        let me = group.position(self.comm.rank()).unwrap();
        for dtype in [DType::F32, DType::F16, DType::Bool, DType::U8] {
            for (variant, dim) in (0..4).flat_map(|v| [(v, 0), (v, 1), (v, 2)]) {
                for outer in [3, large / 16] {
                    let extents = extents(group.len(), variant);
                    let shape = with(&[outer, 2, 2], dim, extents.iter().sum());
                    let whole = numbers(variant, shape.iter().product());
                    let start = extents[..me].iter().sum();
                    let local = slice(&whole, &shape, dim, start, extents[me]);
                    let local = tensor(dtype, &with(&shape, dim, extents[me]), &local);
                    let tag = self.tag();
                    let got = self.comm.all_gather(group, tag, dim, &extents, &local).unwrap();
                    assert_eq!(got, tensor(dtype, &shape, &whole), "{dtype} dim {dim} {extents:?}");
                }
            }
        }
    }

    fn reduce_scatters(&mut self, group: &Group, large: usize) {
        let me = group.position(self.comm.rank()).unwrap();
        for (dtype, monoid) in
            [(DType::F32, Monoid::Sum), (DType::BF16, Monoid::Max), (DType::I64, Monoid::Prod)]
        {
            for (variant, dim) in (0..4).flat_map(|v| [(v, 0), (v, 1)]) {
                for other in [3, large / 8] {
                    let extents = extents(group.len(), variant);
                    let shape = with(&[other, other.min(8)], dim, extents.iter().sum());
                    let count = shape.iter().product();
                    let data = tensor(dtype, &shape, &numbers(me, count));
                    let tag = self.tag();
                    let got = self.comm.reduce_scatter(group, tag, monoid, dim, &extents, &data).unwrap();
                    let all = combined(dtype, monoid, group.len(), count);
                    let own = slice(&all, &shape, dim, extents[..me].iter().sum(), extents[me]);
                    assert_eq!(
                        got,
                        tensor(dtype, &with(&shape, dim, extents[me]), &own),
                        "{dtype} {extents:?}"
                    );
                }
            }
        }
    }

    fn all_to_alls(&mut self, group: &Group, large: usize) {
        let me = group.position(self.comm.rank()).unwrap();
        for (split_variant, concat_variant) in (0..4).flat_map(|a| (0..4).map(move |b| (a, b))) {
            for (split_dim, concat_dim, outer) in [(0, 2, 3), (2, 0, 3), (1, 2, large / 16)] {
                let (split, concat) =
                    (extents(group.len(), split_variant), extents(group.len(), concat_variant));
                let shape = with(&[outer, 2, 2], split_dim, split.iter().sum());
                let shape = with(&shape, concat_dim, concat.iter().sum());
                let whole = numbers(split_variant, shape.iter().product());
                let start = concat[..me].iter().sum();
                let local = slice(&whole, &shape, concat_dim, start, concat[me]);
                let local = tensor(DType::F32, &with(&shape, concat_dim, concat[me]), &local);
                let cut = |dim, extents| Sharding { dim, extents };
                let tag = self.tag();
                let (from, to) = (cut(split_dim, &split), cut(concat_dim, &concat));
                let got = self.comm.all_to_all(group, tag, from, to, &local).unwrap();
                let own = slice(&whole, &shape, split_dim, split[..me].iter().sum(), split[me]);
                let expected = tensor(DType::F32, &with(&shape, split_dim, split[me]), &own);
                assert_eq!(got, expected, "{split:?} at {split_dim}, {concat:?} at {concat_dim}");
            }
        }
    }

    fn blobs(&mut self, group: &Group, large: usize) {
        let me = group.position(self.comm.rank()).unwrap();
        for (position, &root) in group.ranks().iter().enumerate() {
            for size in [0, 7, large] {
                let blob = |i: usize| numbers(i, (size + 3 * i) * usize::from(i != 1));
                let all: Vec<Vec<u8>> = (0..group.len()).map(blob).collect();
                let is_root = me == position;
                let tag = self.tag();
                let sent = if is_root { all[position].as_slice() } else { &[] };
                assert_eq!(self.comm.broadcast_bytes(group, tag, root, sent).unwrap(), all[position]);
                let tag = self.tag();
                let blobs = is_root.then_some(all.as_slice());
                assert_eq!(self.comm.scatter_bytes(group, tag, root, blobs).unwrap(), all[me]);
                let tag = self.tag();
                let gathered = self.comm.gather_bytes(group, tag, root, &all[me]).unwrap();
                assert_eq!(gathered, is_root.then_some(all));
                let mut data = tensor(DType::Bool, &[size], &numbers(me, size));
                let tag = self.tag();
                self.comm.broadcast(group, tag, root, &mut data).unwrap();
                assert_eq!(data, tensor(DType::Bool, &[size], &numbers(position, size)));
            }
        }
    }
}

/// Sums whose value depends on the order: all ranks must have the same bits, those of rank order.
pub(crate) fn check_order(comm: &dyn Communicator) {
    let world = comm.world_size();
    let value =
        |rank: usize, i: usize| ((rank * 37 + i * 11) as f32 * 0.37).sin() * 10f32.powi(rank as i32 * 3);
    let group = Group::world(world);
    for (sequence, count) in [5, 1000, 40_000].into_iter().enumerate() {
        let own: Vec<f32> = (0..count).map(|i| value(comm.rank(), i)).collect();
        let mut data = Tensor::from_vec(vec![count], own).unwrap();
        let tag = Tag { sequence: (1 << 41) + sequence as u64, node: 0 };
        comm.all_reduce(&group, tag, Monoid::Sum, &mut data).unwrap();
        let expected: Vec<f32> =
            (0..count).map(|i| (1..world).fold(value(0, i), |sum, rank| sum + value(rank, i))).collect();
        assert_eq!(data.data(), &Data::F32(expected));
        if world > 1 {
            assert!(comm.stats().of(Kind::AllReduce).bytes >= 4 * count as u64);
        }
    }
}
