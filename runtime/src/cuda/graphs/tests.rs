//! Graphs on the device that stands in for NVIDIA's.

use super::*;
use std::process::Command;
use std::sync::OnceLock;
use tpshard_driver::SearchPath;
use tpshard_driver::cuda::{Argument, Driver, Function, Memory, Submitted};
use tpshard_driver::nvrtc::Nvrtc;

/// Kernels whose order and arguments both show in the result.
const SOURCE: &str = r#"
extern "C" __global__ void __launch_bounds__(32) add(long long *to, long long by) {
    if (threadIdx.x == 0) to[0] += by;
}
extern "C" __global__ void __launch_bounds__(32) scale(long long *to, long long by) {
    if (threadIdx.x == 0) to[0] *= by;
}
"#;

struct Machine {
    device: Device,
    add: Function,
    scale: Function,
    memory: Memory,
}

/// A device with the kernels; nothing if they cannot be compiled here, which is said.
fn machine() -> Option<Machine> {
    if !Command::new("g++").arg("--version").output().is_ok_and(|output| output.status.success()) {
        eprintln!("SKIPPED: `g++` is not installed");
        return None;
    }
    static CODE: OnceLock<(SearchPath, Vec<u8>)> = OnceLock::new();
    let (search, code) = CODE.get_or_init(|| {
        let library = std::env::current_exe().unwrap().parent().unwrap().join("libtpshard_standin.so");
        assert!(library.is_file(), "{} is not there", library.display());
        let folder = library.with_file_name("standin-of-graphs");
        std::fs::create_dir_all(&folder).unwrap();
        for name in ["libcuda.so.1", "libnvrtc.so.12"] {
            std::fs::remove_file(folder.join(name)).ok();
            std::os::unix::fs::symlink(&library, folder.join(name)).unwrap();
        }
        let search = SearchPath::of(vec![folder]);
        let code = Nvrtc::load(&search).unwrap().compile(SOURCE, 90, &[]).unwrap();
        (search, code)
    });
    let device = Driver::load(search).unwrap().device(0).unwrap();
    let module = device.load(code).unwrap();
    let [add, scale] = ["add", "scale"].map(|name| module.function(name).unwrap());
    let memory = device.allocate(8).unwrap();
    Some(Machine { device, add, scale, memory })
}

const PIECE: Piece = Piece { entry: 0, number: 0 };

impl Machine {
    fn call(&self, kernel: &str, by: i64) -> Call {
        let function = if kernel == "add" { &self.add } else { &self.scale };
        let arguments = [Argument::Memory(&self.memory, 0), Argument::Size(by)];
        function.call([1, 1, 1], 32, 0, &arguments).unwrap()
    }

    /// `((x + a) * b + c) * d`
    fn calls(&self, [a, b, c, d]: [i64; 4]) -> Vec<Call> {
        vec![self.call("add", a), self.call("scale", b), self.call("add", c), self.call("scale", d)]
    }

    /// Puts the calls into the queue for x = 1: the result, and what the driver was asked for.
    fn run(&self, graphs: &mut Graphs, piece: Piece, calls: &[Call]) -> (i64, Submitted) {
        self.memory.upload(0, &1i64.to_le_bytes()).unwrap();
        let before = self.device.submitted();
        let calls: Vec<&Call> = calls.iter().collect();
        if !graphs.put(&self.device, piece, &calls) {
            for call in calls {
                call.launch().unwrap();
            }
        }
        let submitted = self.device.submitted().since(&before);
        let mut result = [0; 8];
        self.memory.download(0, &mut result).unwrap();
        (i64::from_le_bytes(result), submitted)
    }
}

fn expected([a, b, c, d]: [i64; 4]) -> i64 {
    ((1 + a) * b + c) * d
}

/// Launches, graphs, updates, captures.
fn counts(submitted: Submitted) -> [u64; 4] {
    [submitted.launches, submitted.graphs, submitted.updates, submitted.captures]
}

#[test]
fn what_is_done_again_becomes_one_launch_and_is_told_what_changed() {
    let Some(machine) = machine() else { return };
    let mut graphs = Graphs::default();
    for (numbers, asked) in [
        // At first one by one; then taken down; from then on as one.
        ([2, 3, 4, 5], [4, 0, 0, 0]),
        ([2, 3, 4, 6], [4, 1, 0, 1]),
        ([2, 3, 4, 6], [0, 1, 0, 0]),
        ([2, 3, 5, 7], [0, 1, 2, 0]),
        ([1, 2, 3, 7], [0, 1, 3, 0]),
        // More than three quarters are other than before: a graph of its own, if it comes again.
        ([7, 7, 9, 8], [4, 0, 0, 0]),
        ([7, 7, 9, 9], [4, 1, 0, 1]),
        ([1, 2, 3, 8], [0, 1, 1, 0]),
        ([7, 7, 9, 8], [0, 1, 1, 0]),
    ] {
        let (result, submitted) = machine.run(&mut graphs, PIECE, &machine.calls(numbers));
        assert_eq!((result, counts(submitted)), (expected(numbers), asked), "{numbers:?}");
    }
    assert_eq!(graphs.trouble(), None);
    // Another piece knows nothing of it.
    let other = Piece { entry: 0, number: 1 };
    let (_, submitted) = machine.run(&mut graphs, other, &machine.calls([1, 1, 9, 9]));
    assert_eq!(counts(submitted), [4, 0, 0, 0]);
}

#[test]
fn other_kernels_are_another_graph_and_few_are_kept() {
    let Some(machine) = machine() else { return };
    let mut graphs = Graphs::default();
    let calls = |adds: usize| vec![machine.call("add", 1); adds];
    let lengths: Vec<usize> = (LEAST_CALLS..=LEAST_CALLS + MOST_KEPT).collect();
    for _ in 0..2 {
        for &adds in &lengths {
            let (result, submitted) = machine.run(&mut graphs, PIECE, &calls(adds));
            // Each is forgotten before it comes again.
            assert_eq!((result, submitted.captures), (1 + adds as i64, 0));
        }
    }
    assert_eq!(graphs.kept[&PIECE].len(), MOST_KEPT);
    // What came last is still known.
    let (_, submitted) = machine.run(&mut graphs, PIECE, &calls(lengths[MOST_KEPT]));
    assert_eq!(submitted.captures, 1);
    // Too few are not worth it, however often they come.
    for _ in 0..3 {
        let (_, submitted) = machine.run(&mut graphs, PIECE, &calls(LEAST_CALLS - 1));
        assert_eq!(counts(submitted), [LEAST_CALLS as u64 - 1, 0, 0, 0]);
    }
}

#[test]
fn a_capture_that_is_spoiled_or_dropped_does_nothing_and_leaves_the_queue_as_it_was() {
    let Some(machine) = machine() else { return };
    let Machine { device, memory, .. } = &machine;
    memory.upload(0, &1i64.to_le_bytes()).unwrap();
    for kind in 0..3 {
        let capture = device.capture().unwrap();
        machine.call("add", 5).launch().unwrap();
        let spoiled = match kind {
            0 => device.synchronize(),
            1 => memory.upload(0, &[0; 8]),
            _ => memory.download(0, &mut [0; 8]),
        };
        let error = spoiled.unwrap_err();
        assert!(error.to_string().contains("CAPTURE_UNSUPPORTED"), "{error}");
        let error = machine.call("add", 5).launch().unwrap_err();
        assert!(error.to_string().contains("CAPTURE_INVALIDATED"), "{error}");
        capture.last().unwrap_err();
        let error = capture.finish().unwrap_err();
        assert!(error.to_string().contains("cuStreamEndCapture failed"), "{error}");
    }
    let capture = device.capture().unwrap();
    capture.last().unwrap_err();
    machine.call("add", 5).launch().unwrap();
    // Memory may be had while a queue is taken down, and what was recorded has not passed.
    device.allocate(8).map(std::mem::forget).unwrap();
    let event = device.event().unwrap();
    event.record().unwrap();
    assert!(event.has_passed().unwrap_err().to_string().contains("CAPTURED_EVENT"));
    device.capture().unwrap_err();
    drop(capture);
    let mut result = [0; 8];
    memory.download(0, &mut result).unwrap();
    assert_eq!(i64::from_le_bytes(result), 1);
}

#[test]
fn a_graph_keeps_the_arguments_it_was_made_with() {
    let Some(machine) = machine() else { return };
    machine.memory.upload(0, &1i64.to_le_bytes()).unwrap();
    let capture = machine.device.capture().unwrap();
    let call = machine.call("add", 5);
    call.launch().unwrap();
    let node = capture.last().unwrap();
    machine.memory.copy(0, &machine.memory, 0, 8).unwrap();
    let copy = capture.last().unwrap();
    assert_ne!(node, copy);
    drop(call);
    let mut graph = capture.finish().unwrap();
    graph.launch().unwrap();
    graph.set(node, &machine.call("scale", 7)).unwrap();
    graph.launch().unwrap();
    // A copy calls no kernel.
    graph.set(copy, &machine.call("scale", 7)).unwrap_err();
    let mut result = [0; 8];
    machine.memory.download(0, &mut result).unwrap();
    assert_eq!(i64::from_le_bytes(result), (1 + 5) * 7);
}

#[test]
fn the_variable_is_on_or_off() {
    for (variable, wanted) in [(None, true), (Some(""), true), (Some("on"), true), (Some("off"), false)] {
        assert_eq!(are_wanted(variable).unwrap(), wanted);
    }
    let error = are_wanted(Some("perhaps")).unwrap_err();
    assert!(error.to_string().contains("TPSHARD_CUDA_GRAPHS=perhaps"), "{error}");
    assert_eq!(error.exit_code(), 2);
}
