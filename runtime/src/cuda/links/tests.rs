//! Every conversion on device memory against the same on the host, with libraries that stand in for NVIDIA's.

use super::{Links, Operand, carries, goes_aside, staged, told_not_to_wait};
use crate::comm::{CommOptions, Communicator, Tag, bytes, threads};
use crate::cpu::convert::{Place, convert, held};
use crate::cpu::value::Value;
use crate::cuda::tensor::{DeviceTensor, download};
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};
use tpshard_driver::SearchPath;
use tpshard_driver::cuda::{Device, Driver, Lane};
use tpshard_driver::nccl::Nccl;
use tpshard_ir::dim::{Bindings, Dim};
use tpshard_ir::layout::{Layout, Mesh, Monoid};
use tpshard_ir::program::Family;
use tpshard_ir::{AxisLayout, Conversion, DType, Tensor, Type};

/// The variable by which the stand-in is told what it is like; this test runs itself again with it.
const SETTINGS: &str = "TPSHARD_STANDIN";

fn search(folder: &Path) -> SearchPath {
    let library = std::env::current_exe().unwrap().parent().unwrap().join("libtpshard_standin.so");
    assert!(library.is_file(), "{} is not there", library.display());
    for name in ["libcuda.so.1", "libnccl.so.2"] {
        std::os::unix::fs::symlink(&library, folder.join(name)).unwrap();
    }
    SearchPath::of(vec![folder.to_path_buf()])
}

/// A conversion of a family.
struct Case {
    conversion: Conversion,
    shape: Vec<usize>,
    dtype: DType,
    from: AxisLayout,
    to: AxisLayout,
}

fn cases(axes: &[usize]) -> Vec<Case> {
    let one = || Dim::constant(1);
    let shard = |dim: usize| AxisLayout::shard(dim, 1i64);
    let mut cases = Vec::new();
    let mut case = |conversion, shape: &[usize], dtype, from, to| {
        cases.push(Case { conversion, shape: shape.to_vec(), dtype, from, to });
    };
    let axes = || axes.to_vec();
    // Some extents are shared out evenly, some not, and of one some ranks have nothing.
    let shapes: [&[usize]; 4] = [&[12, 6, 4], &[7, 5, 3], &[1, 12, 2], &[3, 1, 5]];
    for shape in shapes {
        for dtype in [DType::F32, DType::BF16, DType::I64, DType::U8, DType::I16, DType::Bool] {
            for dim in 0..shape.len() {
                let gather = Conversion::AllGather { axes: axes(), dim, unit: one() };
                case(gather, shape, dtype, shard(dim), AxisLayout::Replicated);
                for to in (0..shape.len()).filter(|&to| to != dim) {
                    let change = Conversion::AllToAll {
                        axes: axes(),
                        from: dim,
                        from_unit: one(),
                        to,
                        to_unit: one(),
                    };
                    case(change, shape, dtype, shard(dim), shard(to));
                }
            }
            for monoid in [Monoid::Sum, Monoid::Prod, Monoid::Max, Monoid::Min] {
                let reduce = Conversion::AllReduce { axes: axes(), monoid };
                case(reduce, shape, dtype, AxisLayout::Partial(monoid), AxisLayout::Replicated);
                for dim in 0..shape.len() {
                    let scatter = Conversion::ReduceScatter { axes: axes(), monoid, dim, unit: one() };
                    case(scatter, shape, dtype, AxisLayout::Partial(monoid), shard(dim));
                }
            }
        }
    }
    for dim in 0..2 {
        let shape = if dim == 0 { [12, 5] } else { [5, 12] };
        let units = |unit: i64| (AxisLayout::shard(dim, unit), Dim::constant(unit));
        for (from, to) in [(1, 4), (4, 1), (3, 2)] {
            let ((before, from_unit), (after, to_unit)) = (units(from), units(to));
            let redeal = Conversion::Redeal { axes: axes(), dim, from_unit, to_unit };
            case(redeal, &shape, DType::F32, before, after);
        }
    }
    cases
}

/// Small whole numbers that depend on everything, so that sums are exact and nothing is where it should not be.
fn tensor(dtype: DType, shape: Vec<usize>, seed: usize) -> Tensor {
    let count = shape.iter().product::<usize>();
    let number = |i: usize| (i * 7 + seed * 13) % 5;
    let raw: Vec<u8> = (0..count)
        .flat_map(|i| match dtype {
            DType::F32 => (number(i) as f32 - 2.0).to_le_bytes().to_vec(),
            DType::BF16 => half::bf16::from_f32(number(i) as f32 - 2.0).to_le_bytes().to_vec(),
            DType::I64 => (number(i) as i64 - 2).to_le_bytes().to_vec(),
            DType::I16 => (number(i) as i16 - 2).to_le_bytes().to_vec(),
            DType::Bool => vec![u8::from(number(i) > 2)],
            _ => vec![number(i) as u8],
        })
        .collect();
    Tensor::from_le_bytes(dtype, shape, &raw).unwrap()
}

fn one_rank(mesh: &Mesh, rank: usize, end: &dyn Communicator, device: &Device, library: &Arc<Nccl>) {
    let mut sequence = 0;
    let all_axes: Vec<Vec<usize>> = match mesh.axes() {
        1 => vec![vec![0]],
        _ => vec![vec![0], vec![0, 1], vec![1]],
    };
    let groups = all_axes.iter().map(|axes| mesh.group(rank, axes)).collect();
    let links = Links::join(groups, device, library, end, &mut sequence).unwrap();
    let mut carried = BTreeSet::new();
    let mut most_staged = 0;
    for axes in &all_axes {
        for (index, case) in cases(axes).into_iter().enumerate() {
            let Case { conversion, shape, dtype, from, to } = case;
            let on_host = !carries(&conversion, dtype);
            if on_host {
                continue;
            }
            // Several axes at once are dealt out as one only where the ranks along them follow one another.
            if axes.len() > 1 && !matches!(conversion, Conversion::AllReduce { .. }) {
                continue;
            }
            let layout = |of: &AxisLayout| {
                let along = |axis| if axes.contains(&axis) { of.clone() } else { AxisLayout::Replicated };
                Layout((0..mesh.axes()).map(along).collect())
            };
            let ty = Type::new(dtype, shape.iter().map(|&n| Dim::constant(n as i64)).collect());
            let families = [&from, &to].map(|of| Family { ty: ty.clone(), layout: layout(of) });
            let families = [&families[0], &families[1]];
            let bindings = Bindings::new();
            let place = Place { mesh, rank, bindings: &bindings };
            let local = |family| -> Vec<usize> {
                held(family, &place, rank).unwrap().into_iter().map(|(_, length)| length).collect()
            };
            let what = format!("{conversion:?} of {dtype}{shape:?} on {mesh}, rank {rank}");
            let brought = tensor(dtype, local(families[0]), 31 * index + rank);
            let mut tag = || {
                sequence += 1;
                Tag { sequence, node: index as u32 }
            };

            let before = end.stats();
            let value = Value::new(brought.clone());
            let expected = convert(&conversion, value, families, &place, end, tag()).unwrap();
            let expected = expected.into_tensor().unwrap();
            let counted = end.stats().since(&before);

            let source = DeviceTensor::from_tensor(device, &brought).unwrap();
            let shapes = [local(families[0]), local(families[1])];
            assert_eq!(expected.shape(), shapes[1], "{what}");
            let target = device.allocate(bytes(expected.data()).len() as u64).unwrap();
            let operands = [
                Operand::new(&source.memory, 0, dtype, &shapes[0]),
                Operand::new(&target, 0, dtype, &shapes[1]),
            ];
            let before = end.stats();
            let aside = goes_aside(&conversion, families, &place).unwrap();
            let lane = if aside { Lane::Side } else { Lane::Main };
            if aside {
                links.ready(0).unwrap();
            }
            links.convert(&conversion, operands, families, &place, (lane, &[]), (end, tag())).unwrap();
            if aside {
                links.join_side().unwrap();
            }
            let got = download(&target, 0, dtype, &shapes[1]).unwrap();
            assert_eq!(got, expected, "{what}");
            assert_eq!(end.stats().since(&before), counted, "{what}");
            // What was planned for is what was taken.
            most_staged = staged(&conversion, families, &place).unwrap().max(most_staged);
            assert_eq!(links.staging.borrow().len(), most_staged, "{what}");
            // Of an empty share, nothing was waited for.
            device.synchronize().unwrap();
            links.note(end);
            assert!(end.history().unfinished().is_none(), "{what}");
            carried.insert(conversion.name());
        }
    }
    assert_eq!(carried.len(), 5, "{carried:?}");
    assert!(links.failure().is_none());
}

/// Whether this process has devices; if not, the test `name` has run in one that has them.
fn has_devices(name: &str, settings: &str) -> bool {
    if std::env::var_os(SETTINGS).is_some() {
        return true;
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", &format!("cuda::links::tests::{name}")]).env(SETTINGS, settings);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(120);
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            child.kill().unwrap();
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && said.contains("1 passed"), "{}: {said}", output.status);
    false
}

#[test]
fn conversions_between_devices_are_those_of_the_host() {
    if !has_devices("conversions_between_devices_are_those_of_the_host", "devices=6") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let search = search(folder.path());
    let driver = Driver::load(&search).unwrap();
    let library = Arc::new(Nccl::load(&search).unwrap());
    for mesh in [vec![2], vec![3], vec![4], vec![2, 3], vec![1, 2]] {
        let mesh = Mesh(mesh);
        let ends = threads(mesh.ranks(), &CommOptions::default()).unwrap();
        std::thread::scope(|scope| {
            for (rank, end) in ends.into_iter().enumerate() {
                let (mesh, driver, library) = (&mesh, &driver, &library);
                scope.spawn(move || {
                    one_rank(mesh, rank, &*end, &driver.device(rank).unwrap(), library);
                });
            }
        });
    }
}

/// A rank of four in two rows, of which the last does not come to any collective and gives up.
fn rank_of_two_cliques(
    rank: usize,
    end: &dyn Communicator,
    device: &Device,
    library: &Arc<Nccl>,
    met: &Barrier,
) {
    let mesh = Mesh(vec![2, 2]);
    let groups = [[0], [1]].map(|axes| mesh.group(rank, &axes)).to_vec();
    let links = Links::join(groups, device, library, end, &mut 0).unwrap();
    let cliques: Vec<_> = links.cliques.values().map(Arc::downgrade).collect();
    assert_eq!(cliques.len(), 2);
    met.wait();
    match rank {
        3 => {
            std::thread::sleep(Duration::from_millis(300));
            end.abort("rank 3 has had enough");
        }
        // The second of its cliques is the one with rank 3.
        1 | 2 => {
            let axes = if rank == 1 { vec![0] } else { vec![1] };
            let memory = device.allocate(16).unwrap();
            let (bindings, ty) = (Bindings::new(), Type::new(DType::F32, vec![Dim::constant(4)]));
            let layout = |along: AxisLayout| {
                let of = |axis| if axes.contains(&axis) { along.clone() } else { AxisLayout::Replicated };
                Layout((0..2).map(of).collect())
            };
            let families = [AxisLayout::Partial(Monoid::Sum), AxisLayout::Replicated]
                .map(|along| Family { ty: ty.clone(), layout: layout(along) });
            let operand = Operand::new(&memory, 0, DType::F32, &[4]);
            let place = Place { mesh: &mesh, rank, bindings: &bindings };
            let reduce = Conversion::AllReduce { axes: axes.clone(), monoid: Monoid::Sum };
            let tag = Tag { sequence: 100, node: 0 };
            let families = [&families[0], &families[1]];
            links.convert(&reduce, [operand; 2], families, &place, (Lane::Main, &[]), (end, tag)).unwrap();
            // The driver waits for the collective, where nobody can be asked whether that makes sense.
            let _ = memory.clear(0, 16);
            let failure = links.failure().unwrap().to_string();
            assert!(failure.contains("rank 3 has had enough"), "{failure}");
        }
        _ => {}
    }
    drop(links);
    // The device is still there, and keeps nothing of them.
    let deadline = Instant::now() + Duration::from_secs(10);
    while cliques.iter().any(|clique| clique.strong_count() > 0) {
        assert!(Instant::now() < deadline, "cliques of rank {rank} are left");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_rank_that_is_gone_ends_all_cliques_while_the_host_is_in_the_driver() {
    if !has_devices("a_rank_that_is_gone_ends_all_cliques_while_the_host_is_in_the_driver", "devices=4") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let search = search(folder.path());
    let driver = Driver::load(&search).unwrap();
    let library = Arc::new(Nccl::load(&search).unwrap());
    let (ends, met) = (threads(4, &CommOptions::default()).unwrap(), Barrier::new(4));
    std::thread::scope(|scope| {
        for (rank, end) in ends.into_iter().enumerate() {
            let (driver, library, met) = (&driver, &library, &met);
            scope.spawn(move || {
                rank_of_two_cliques(rank, &*end, &driver.device(rank).unwrap(), library, met);
            });
        }
    });
}

/// A sum over two ranks in the side queue, of ones that the main queue makes and with a copy that it takes. Without `waits`,
/// one of the two queues does not wait for the other: the one that is late if stream number `late` is.
fn sum_aside(
    rank: usize,
    end: &dyn Communicator,
    device: &Device,
    library: &Arc<Nccl>,
    waits: bool,
    late: u64,
) {
    let mesh = Mesh(vec![2]);
    let links = Links::join(vec![vec![0, 1]], device, library, end, &mut 0).unwrap();
    let memory = || {
        let memory = device.allocate(16).unwrap();
        memory.clear(0, 16).unwrap();
        memory
    };
    let [ones, own, sum, copy] = [memory(), memory(), memory(), memory()];
    ones.upload(0, bytes(tensor_of_ones().data())).unwrap();
    device.synchronize().unwrap();

    own.copy(0, &ones, 0, 16).unwrap();
    if waits || late == 2 {
        links.ready(0).unwrap();
    }
    let ty = Type::new(DType::F32, vec![Dim::constant(4)]);
    let families = [AxisLayout::Partial(Monoid::Sum), AxisLayout::Replicated]
        .map(|layout| Family { ty: ty.clone(), layout: Layout(vec![layout]) });
    let bindings = Bindings::new();
    let place = Place { mesh: &mesh, rank, bindings: &bindings };
    let reduce = Conversion::AllReduce { axes: vec![0], monoid: Monoid::Sum };
    let operands = [&own, &sum].map(|memory| Operand::new(memory, 0, DType::F32, &[4]));
    let tag = Tag { sequence: 100, node: 0 };
    let families = [&families[0], &families[1]];
    links.convert(&reduce, operands, families, &place, (Lane::Side, &[]), (end, tag)).unwrap();
    // As fast as the device can be, where it waits for nothing.
    let deadline = Instant::now() + Duration::from_secs(20);
    while late == 1 && links.lookout.take_settled().is_empty() {
        assert!(Instant::now() < deadline, "the collective is never done");
        std::thread::sleep(Duration::from_millis(1));
    }
    if waits || late == 1 {
        links.join_side().unwrap();
    }
    copy.copy(0, &sum, 0, 16).unwrap();
    let got = download(&copy, 0, DType::F32, &[4]).unwrap();
    let expected = if waits { 2f32 } else { 0.0 };
    let expected = Tensor::from_le_bytes(DType::F32, vec![4], &expected.to_le_bytes().repeat(4)).unwrap();
    assert_eq!(got, expected, "rank {rank}, waits: {waits}");
}

fn tensor_of_ones() -> Tensor {
    Tensor::from_le_bytes(DType::F32, vec![4], &1f32.to_le_bytes().repeat(4)).unwrap()
}

fn sums_aside(late: u64) {
    let folder = tempfile::tempdir().unwrap();
    let search = search(folder.path());
    let library = Arc::new(Nccl::load(&search).unwrap());
    for waits in [true, false] {
        let ends = threads(2, &CommOptions::default()).unwrap();
        std::thread::scope(|scope| {
            for (rank, end) in ends.into_iter().enumerate() {
                let (library, search) = (&library, &search);
                scope.spawn(move || {
                    // Devices count their streams, and these two are new.
                    let ordinal = 2 * usize::from(waits) + rank;
                    let device = Driver::load(search).unwrap().device(ordinal).unwrap();
                    sum_aside(rank, &*end, &device, library, waits, late);
                });
            }
        });
    }
}

/// What computes is late: a collective that does not wait for it sums what was there before.
#[test]
fn a_collective_that_does_not_wait_is_seen_to_come_too_early() {
    if has_devices("a_collective_that_does_not_wait_is_seen_to_come_too_early", "devices=4 delay=1") {
        sums_aside(1);
    }
}

/// Collectives are late: what does not wait for them reads what was there before.
#[test]
fn a_use_that_does_not_wait_is_seen_to_come_too_early() {
    if has_devices("a_use_that_does_not_wait_is_seen_to_come_too_early", "devices=4 delay=2") {
        sums_aside(2);
    }
}

#[test]
fn a_library_that_would_wait_is_not_used() {
    for value in [None, Some(""), Some("0"), Some(" 0")] {
        assert_eq!(told_not_to_wait(value.map(OsStr::new)), Ok(()));
    }
    for value in ["1", "2", "0x1", "yes"] {
        let refused = told_not_to_wait(Some(OsStr::new(value))).unwrap_err();
        assert_eq!(refused, format!("NCCL_COMM_BLOCKING={value} is set\n  help: unset it"));
    }
}

#[test]
fn what_nccl_would_do_otherwise_goes_through_the_host() {
    let reduce = |monoid| Conversion::AllReduce { axes: vec![0], monoid };
    let gather = Conversion::AllGather { axes: vec![0], dim: 0, unit: Dim::constant(1) };
    for (conversion, dtype, expected) in [
        (reduce(Monoid::Sum), DType::BF16, true),
        (reduce(Monoid::Prod), DType::Bool, true),
        (reduce(Monoid::Max), DType::I32, true),
        // NCCL's largest of a number and none is the number.
        (reduce(Monoid::Max), DType::F32, false),
        (reduce(Monoid::Sum), DType::I16, false),
        (reduce(Monoid::Sum), DType::U4, false),
        (gather.clone(), DType::I16, true),
        (gather, DType::I4, false),
        (Conversion::TreeReduce { axes: vec![0], axis: 0, unit: Dim::constant(1) }, DType::F32, false),
    ] {
        assert_eq!(carries(&conversion, dtype), expected, "{conversion:?} of {dtype}");
    }
}
