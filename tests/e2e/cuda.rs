//! Programs for GPUs where there is none: a library of our own stands in for NVIDIA's, and runs the same kernels on the
//! processor.

use crate::support::*;
use crate::words;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};
use tpshard_ir::program::RankProgram;
use tpshard_ir::{Data, Tensor};
use tpshard_runtime::comm::{CommOptions, threads};
use tpshard_runtime::cpu::FileWeights;
use tpshard_runtime::elf::read_section;
use tpshard_runtime::io::{NamedTensors, SafeTensorsFile};
use tpshard_runtime::session::{DeviceChoice, Session, SessionOptions};
use tpshard_runtime::state::{SlotId, StateOptions};

/// Largest difference from the processor's results, relative to their range.
const TOLERANCE: f32 = 1e-5;

/// The names of the driver, of the compiler and of what multiplies matrices.
pub(crate) const DRIVER: &str = "libcuda.so.1";
pub(crate) const COMPILER: &str = "libnvrtc.so.12";
pub(crate) const PRODUCTS: &str = "libcublasLt.so.12";

/// Whether kernels can be compiled; says so if not.
pub(crate) fn has_compiler() -> bool {
    let found = command("g++").arg("--version").output().is_ok_and(|output| output.status.success());
    if !found {
        eprintln!("SKIPPED: `g++` is not installed");
        assert!(
            !std::env::var("TPSHARD_REQUIRE").is_ok_and(|list| list.split(',').any(|tool| tool == "g++"))
        );
    }
    found
}

/// A folder in which the library that was built with this test has these names.
pub(crate) fn libraries(folder: &Path, names: &[&str]) -> PathBuf {
    let executable = std::env::current_exe().unwrap();
    let library = executable.parent().unwrap().join("libtpshard_standin.so");
    assert!(library.is_file(), "{} is not there", library.display());
    std::fs::create_dir_all(folder).unwrap();
    for name in names {
        std::fs::remove_file(folder.join(name)).ok();
        std::os::unix::fs::symlink(&library, folder.join(name)).unwrap();
    }
    folder.to_path_buf()
}

/// The driver and the compiler.
pub(crate) fn standin() -> PathBuf {
    static MADE: OnceLock<PathBuf> = OnceLock::new();
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("standin");
    MADE.get_or_init(|| libraries(&folder, &[DRIVER, COMPILER])).clone()
}

/// The same command, which finds the libraries of `folder`; what it compiles is forgotten.
pub(crate) fn with_libraries<'a>(command: &'a mut Command, folder: &Path) -> &'a mut Command {
    command.env("TPSHARD_CUDA_PATH", folder).env("XDG_CACHE_HOME", "/proc/none").env_remove("TPSHARD_STANDIN")
}

#[track_caller]
fn shard_for(target: &str, ranks: usize, folder: &Path, libraries: &Path) -> Ended {
    let more = words!["--target", target, "--split-all", "--overwrite"];
    let mut command = tpshard(words![model(), "--tp", ranks.to_string(), "-o", folder]);
    end(with_libraries(command.args(more), libraries)).ok()
}

/// The model for the stand-in device, split wherever that is possible; made once for all tests.
pub(crate) fn sharded_for_gpu(ranks: usize) -> PathBuf {
    static MADE: OnceLock<Mutex<BTreeMap<usize, PathBuf>>> = OnceLock::new();
    let mut made = MADE.get_or_init(Mutex::default).lock().unwrap_or_else(|poison| poison.into_inner());
    let path = made.entry(ranks).or_insert_with(|| {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("tiny-llama-cuda-tp{ranks}"));
        shard_for("cuda:sm_90", ranks, &path, &standin());
        path
    });
    path.clone()
}

/// Runs a folder on the inputs; where its outputs are.
fn run(folder: &Path, inputs: &Path, device: &str, outputs: &Path) -> Ended {
    let words = words!["run", folder, "--inputs", inputs, "--outputs", outputs, "--device", device];
    end(with_libraries(&mut tpshard(words), &standin()))
}

/// Expects the same tensors of floats, up to what another order of sums changes.
#[track_caller]
pub(crate) fn within_tolerance(got: &NamedTensors, expected: &NamedTensors) {
    assert_eq!(got.len(), expected.len());
    for (name, expected) in expected {
        let Data::F32(elements) = expected.data() else { panic!("{name} is not f32") };
        let range = elements.iter().fold(0f32, |range, x| range.max(x.abs()));
        let distance = distance(&got[name], expected);
        assert!(distance <= TOLERANCE * range.max(1.0), "{name}: {distance}");
    }
}

#[test]
fn a_gpu_gives_what_the_processor_gives() {
    if !has_compiler() {
        return;
    }
    let scratch = scratch();
    for ranks in [1, 2, 3] {
        let folder = sharded_for_gpu(ranks);
        for inputs in ["inputs.npz", "inputs_decode.npz"] {
            let [gpu, cpu] = ["auto", "cpu"].map(|device| {
                let outputs = scratch.path().join(format!("{device}.npz"));
                let ended = run(&folder, &golden().join(inputs), device, &outputs).ok();
                for rank in 0..ranks {
                    let said =
                        format!("rank {rank}: GPU 0 (stand-in, sm_90), kernels of the program for sm_90");
                    assert_eq!(ended.stderr.contains(&said), device == "auto", "{}", ended.stderr);
                }
                read(&outputs)
            });
            within_tolerance(&gpu, &cpu);
        }
    }
}

#[test]
fn generate_keeps_its_state_on_the_gpu() {
    if !has_compiler() {
        return;
    }
    let [gpu, cpu] = ["auto", "cpu"].map(|device| {
        let mut words =
            words!["generate", sharded_for_gpu(2), "--max-tokens", "9", "--device", device].to_vec();
        // Prompts of different lengths, which step in parts.
        words.extend(words!["--prompt-ids", "5,100,7,42", "--prompt-ids", "3,9", "--ignore-stop"]);
        let mut command = tpshard(words);
        let ended = end(with_libraries(&mut command, &standin())).ok();
        assert_eq!(ended.stderr.contains("stand-in"), device == "auto", "{}", ended.stderr);
        ended.stdout
    });
    assert_eq!(gpu, cpu);
}

#[test]
fn several_graphs_and_entries_share_weights_and_state_on_the_gpu() {
    if !has_compiler() {
        return;
    }
    let scratch = scratch();
    let merged = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/merged-decoder/model.onnx");
    let dims = ["--dim", "decode*9:seq=1,past=0..64", "--dim", "prefill:seq=2..64,past=0"];
    // The first begins its state anew in one of its graphs.
    for (name, model, more) in [("merged", merged, &[][..]), ("entries", model(), &dims)] {
        let folder = scratch.path().join(name);
        let words = words![model, "--tp", "2", "--target", "cuda:sm_90", "--split-all", "-o", folder];
        end(with_libraries(tpshard(words).args(more), &standin())).ok();
        let [gpu, cpu] = ["auto", "cpu"].map(|device| {
            let mut words = words!["generate", folder, "--max-tokens", "5", "--device", device].to_vec();
            words.extend(words!["--prompt-ids", "5,10,7,42", "--prompt-ids", "3,9", "--ignore-stop"]);
            end(with_libraries(&mut tpshard(words), &standin())).ok().stdout
        });
        assert_eq!(gpu, cpu, "{name}");
    }
}

#[test]
fn products_are_left_to_the_matrix_library_where_it_is() {
    if !has_compiler() {
        return;
    }
    let scratch = scratch();
    let folder = scratch.path().join("out");
    let all = libraries(&scratch.path().join("all"), &[DRIVER, COMPILER, PRODUCTS]);
    shard_for("cuda:sm_90", 2, &folder, &all);
    // Prompts of as many tokens as the library is asked for; it has nothing for 17.
    let prompts = [16, 17, 40].map(|length| {
        let tokens: Vec<String> = (0..length).map(|i| ((31 * i + 5) % 512).to_string()).collect();
        tokens.join(",")
    });
    let [gpu, cpu] = ["auto", "cpu"].map(|device| {
        let mut words = words!["generate", folder, "--max-tokens", "4", "--device", device].to_vec();
        words.extend(prompts.iter().flat_map(|prompt| words!["--prompt-ids", prompt]));
        let ended = end(with_libraries(tpshard(words).arg("--ignore-stop"), &all)).ok();
        assert_eq!(ended.stderr.contains("products by cuBLASLt"), device == "auto", "{}", ended.stderr);
        ended.stdout
    });
    assert_eq!(gpu, cpu);
}

#[test]
fn verify_and_bisect_look_at_what_the_gpu_computed() {
    if !has_compiler() {
        return;
    }
    let folder = sharded_for_gpu(2);
    end(with_libraries(&mut tpshard(words!["verify", folder, "--golden", golden()]), &standin())).ok();
    let words = words!["verify", folder, "--bisect", "--model", model(), "--inputs", prompt()];
    end(with_libraries(&mut tpshard(words), &standin())).ok();
    end(with_libraries(&mut tpshard(words!["check", folder, "--model", model()]), &standin())).ok();
    // On the processor no library is needed.
    let words = words!["verify", folder, "--golden", golden(), "--device", "cpu"];
    end(with_libraries(&mut tpshard(words), Path::new("/proc/none"))).ok();
}

#[test]
fn inspect_lists_kernels_and_machine_code_of_every_rank() {
    if !has_compiler() {
        return;
    }
    let folder = sharded_for_gpu(2);
    let listed = end(&mut tpshard(words!["inspect", folder, "--json"])).ok().json();
    assert_eq!(listed["build"]["target"], "cuda:sm_90");
    assert_eq!(listed["build"]["nvrtc"], "12.8");
    for rank in 0..2 {
        let device = &listed["ranks"][rank]["device"];
        assert!(device["kernels"].as_array().is_some_and(|kernels| kernels.len() > 5), "{device}");
        assert_eq!(device["cubins"][0]["arch"], "sm_90");
        assert_eq!(device["cubins"][0]["nvrtc"], "12.8");
        assert!(device["cubins"][0]["bytes"].as_u64().is_some_and(|bytes| bytes > 1000), "{device}");
    }
    let text = end(&mut tpshard(words!["inspect", folder.join("rank1")])).ok();
    assert!(text.stdout.contains("kernels, sm_90"), "{}", text.stdout);
    let none = end(&mut tpshard(words!["inspect", sharded(2).join("rank1"), "--json"])).ok().json();
    assert!(none["device"].is_null(), "{none}");
}

#[test]
fn equal_builds_are_equal_byte_for_byte_and_strip_changes_nothing() {
    if !has_compiler() {
        return;
    }
    let scratch = scratch();
    let (first, second) = (sharded_for_gpu(2), scratch.path().join("again"));
    shard_for("cuda:sm_90", 2, &second, &standin());
    for name in names(&first) {
        let bytes = [&first, &second].map(|folder| std::fs::read(folder.join(&name)).unwrap());
        assert!(bytes[0] == bytes[1], "{name} differs");
    }
    if !command("strip").arg("--version").output().is_ok_and(|output| output.status.success()) {
        eprintln!("SKIPPED: `strip` is not installed");
        return;
    }
    for rank in ["rank0", "rank1"] {
        end(command("strip").arg(second.join(rank))).ok();
    }
    let outputs = scratch.path().join("out.npz");
    run(&second, &prompt(), "auto", &outputs).ok();
    assert_golden(&outputs, "outputs.npz");
}

#[test]
fn kernels_are_compiled_at_the_first_start_and_kept() {
    if !has_compiler() {
        return;
    }
    let scratch = scratch();
    let folder = scratch.path().join("out");
    let driver_only = libraries(&scratch.path().join("driver"), &[DRIVER]);
    let ended = shard_for("cuda", 1, &folder, &driver_only);
    assert!(ended.stderr.contains("compiled when the ranks first start"), "{}", ended.stderr);
    let listed = end(&mut tpshard(words!["inspect", folder, "--json"])).ok().json();
    assert_eq!(listed["ranks"][0]["device"]["cubins"].as_array().map(Vec::len), Some(0));
    assert!(listed["build"]["nvrtc"].is_null());

    let start = |libraries: &Path, cache: &str| {
        let words = words!["run", folder, "--inputs", prompt(), "--outputs", scratch.path().join("o.npz")];
        end(with_libraries(&mut tpshard(words), libraries).env("XDG_CACHE_HOME", cache))
    };
    let help = ["cannot be compiled here", "libnvrtc.so.12", "TPSHARD_CUDA_PATH", "--device cpu"];
    start(&driver_only, "/proc/none").fails(5, &help);
    let cache = scratch.path().join("cache");
    let cache = cache.to_str().unwrap();
    for (cache, said) in [
        // Nothing can be kept there.
        ("/proc/none", "kernels compiled by NVRTC 12.8"),
        (cache, "kernels compiled by NVRTC 12.8"),
        (cache, "kernels compiled earlier by NVRTC 12.8"),
    ] {
        let ended = start(&standin(), cache).ok();
        assert!(ended.stderr.contains(said), "{}", ended.stderr);
        assert_golden(&scratch.path().join("o.npz"), "outputs.npz");
    }
}

/// What a run says with a device of which something is wrong.
fn run_with(settings: &str, libraries: &Path, inputs: &Path) -> Ended {
    let scratch = scratch();
    let outputs = scratch.path().join("out.npz");
    let words = words!["run", sharded_for_gpu(2), "--inputs", inputs, "--outputs", outputs];
    // Whatever else this machine has, such as NCCL, is not looked for.
    let mut command = tpshard(words);
    end(with_libraries(command.args(["--comm", "shm"]), libraries).env("TPSHARD_STANDIN", settings))
}

#[test]
fn what_is_missing_is_said() {
    if !has_compiler() {
        return;
    }
    let scratch = scratch();
    let driver_only = libraries(&scratch.path().join("driver"), &[DRIVER]);
    let none = Path::new("/proc/none");
    if !Path::new("/dev/nvidiactl").exists() {
        run_with("", none, &prompt()).fails(5, &["libcuda.so.1", "TPSHARD_CUDA_PATH", "--device cpu"]);
    }
    run_with("devices=0", &driver_only, &prompt()).fails(5, &["CUDA_ERROR_NO_DEVICE", "--device cpu"]);
    let old = ["sm_90 by NVRTC 12.8", "for CUDA 11.4", "libnvrtc.so.12"];
    run_with("driver=11040", &driver_only, &prompt()).fails(5, &old);
    run_with("memory=300000", &driver_only, &prompt()).fails(5, &["weights do not fit", "OUT_OF_MEMORY"]);
    run_with("memory=600000", &driver_only, &prompt()).fails(5, &["bytes on rank", "the limit is"]);
    run_with("devices=2", &driver_only, &prompt()).ok();

    let cpu_folder = sharded(2);
    let words = words!["run", cpu_folder, "--inputs", prompt(), "--device", "cuda"];
    end(with_libraries(&mut tpshard(words), &standin())).fails(2, &["no kernels", "--target cuda"]);
    let target = |target: &str, more: &[&str]| {
        let mut command =
            tpshard(words![model(), "--tp", "1", "--target", target, "-o", scratch.path().join("x")]);
        end(command.args(more))
    };
    target("cuda:90", &[]).fails(2, &["not an architecture such as sm_90"]);
    target("cuda", &["--determinism", "tp"]).fails(2, &["--target cpu"]);
}

#[test]
fn a_failing_step_is_told_on_all_ranks() {
    if !has_compiler() {
        return;
    }
    let said = ["rank 1: %", "CUDA_ERROR_LAUNCH_FAILED"];
    run_with("fail=20 rank=1", &standin(), &prompt()).fails(6, &said);
    // An index out of range is found by a kernel, and told as the processor tells it.
    let scratch = scratch();
    let mut inputs = read(&prompt());
    let shape = inputs["input_ids"].shape().to_vec();
    let count = shape.iter().product();
    inputs.insert("input_ids".into(), Tensor::new(shape, Data::I64(vec![70_000; count])).unwrap());
    let path = scratch.path().join("in.npz");
    write(&path, &inputs);
    let gpu = run_with("", &standin(), &path).fails(2, &["index 70000 is outside of a table of 512"]);
    let outputs = scratch.path().join("out.npz");
    let cpu = run(&sharded_for_gpu(2), &path, "cpu", &outputs).fails(2, &[]);
    let line = |ended: &Ended| ended.stderr.lines().find(|line| line.contains("error: ")).map(str::to_owned);
    assert_eq!(line(&gpu), line(&cpu));
}

#[test]
fn the_end_of_a_rank_ends_the_others() {
    if !has_compiler() {
        return;
    }
    sharded_for_gpu(2);
    let started = Instant::now();
    run_with("end=20 rank=1", &standin(), &prompt()).fails(6, &["rank 1"]);
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
}

#[test]
fn bench_names_the_kernels_that_ran() {
    if !has_compiler() {
        return;
    }
    let folder = sharded_for_gpu(2);
    let kernels = |device: &str| {
        let mut words = words!["bench", folder, "--inputs", prompt(), "--device", device].to_vec();
        words.extend(words!["--samples", "2", "--warm-up", "1", "--by-op", "--json"]);
        let found = end(with_libraries(&mut tpshard(words), &standin())).ok().json();
        let phases = found["phases"].as_object().unwrap().values().cloned();
        let names = phases.flat_map(|phase| phase["kernels"].as_array().cloned().unwrap_or_default());
        names.map(|kernel| kernel["name"].as_str().unwrap().to_owned()).collect::<Vec<String>>()
    };
    let listed = end(&mut tpshard(words!["inspect", folder.join("rank0"), "--json"])).ok().json();
    let known = listed["device"]["kernels"].as_array().unwrap();
    let [gpu, cpu] = ["auto", "cpu"].map(kernels);
    let of_table = |name: &&String| known.iter().any(|kernel| kernel == name.as_str());
    assert!(gpu.iter().filter(of_table).count() > 5, "{gpu:?}");
    assert!(gpu.iter().any(|name| name == "all_reduce"), "{gpu:?}");
    assert!(cpu.iter().any(|name| name == "einsum"), "{cpu:?}");
}

/// Settings for sessions that keep the state of a few short slots.
fn options(device: DeviceChoice) -> SessionOptions {
    SessionOptions {
        threads: Some(1),
        device,
        libraries: vec![standin()],
        state: Some(StateOptions { capacity: 12, slots: 4 }),
        ..SessionOptions::default()
    }
}

/// All ranks of a folder on threads; `body` is rank 0.
fn with_session<T: Send>(
    folder: &Path,
    ranks: usize,
    options: &SessionOptions,
    body: impl Fn(&mut Session) -> T + Sync,
) -> T {
    let ends = threads(ranks, &CommOptions::default()).unwrap();
    let results: Vec<Option<T>> = std::thread::scope(|scope| {
        let start = |(rank, end)| {
            let body = &body;
            scope.spawn(move || {
                let payload = read_section(&folder.join(format!("rank{rank}"))).unwrap().unwrap();
                let program = RankProgram::decode(&payload).unwrap();
                let file = SafeTensorsFile::open(&folder.join(format!("rank{rank}.safetensors"))).unwrap();
                let mut session = Session::open(program, &mut FileWeights::new(file), end, options).unwrap();
                assert_eq!(session.device().is_some(), options.device == DeviceChoice::Program);
                if rank != 0 {
                    session.follow().unwrap();
                    return None;
                }
                let found = body(&mut session);
                session.close().unwrap();
                Some(found)
            })
        };
        let handles: Vec<_> = ends.into_iter().enumerate().map(start).collect();
        handles.into_iter().map(|handle| handle.join().unwrap()).collect()
    });
    results.into_iter().flatten().next().unwrap()
}

#[test]
fn steps_of_decoding_are_a_few_graphs_with_the_same_bits() {
    if !has_compiler() {
        return;
    }
    for ranks in [1, 2] {
        let folder = sharded_for_gpu(ranks);
        let story = |session: &mut Session| {
            let mut logits = step(session, &[1], &[5, 9, 7]);
            let mut steps = Vec::new();
            let mut before = session.submitted().unwrap();
            for token in 0..7 {
                logits.extend(step(session, &[1], &[token]));
                let now = session.submitted().unwrap();
                assert_eq!(now.trouble, None);
                steps.push([
                    now.launches - before.launches,
                    now.graphs - before.graphs,
                    now.updates - before.updates,
                    now.captures - before.captures,
                ]);
                before = now;
            }
            (logits, steps)
        };
        let with = options(DeviceChoice::Program);
        let without = SessionOptions { no_graphs: true, ..with.clone() };
        let (logits, steps) = with_session(&folder, ranks, &with, story);
        let (expected, plain) = with_session(&folder, ranks, &without, story);
        assert!(logits == expected, "{ranks} ranks: graphs change bits");
        eprintln!("{ranks} ranks: without graphs {plain:?}, with graphs {steps:?}");
        // Launches, graphs, updates, graphs made.
        let [alone, 0, 0, 0] = plain[0] else { panic!("{plain:?}") };
        assert!(plain.iter().all(|step| *step == [alone, 0, 0, 0]), "{plain:?}");
        // Graphs are made in the second step at the latest.
        let made: u64 = steps[..2].iter().map(|step| step[3]).sum();
        assert!(made > 0, "{steps:?}");
        for step in &steps[2..] {
            let [launches, graphs, updates, 0] = *step else { panic!("{steps:?}") };
            assert!(graphs >= 1 && graphs <= made, "{steps:?}");
            assert!(4 * (launches + graphs) < alone, "{steps:?}");
            assert!(2 * updates < alone, "{steps:?}");
        }
    }
}

#[test]
fn graphs_can_be_switched_off_and_are_given_up_if_the_driver_fails_with_them() {
    if !has_compiler() {
        return;
    }
    let generate = |settings: &str, graphs: &str| {
        let words = words!["generate", sharded_for_gpu(1), "--max-tokens", "6", "--prompt-ids", "5,100,7,42"];
        let mut command = tpshard(words);
        let command = with_libraries(command.arg("--ignore-stop"), &standin());
        end(command.env("TPSHARD_STANDIN", settings).env("TPSHARD_CUDA_GRAPHS", graphs))
    };
    let expected = generate("", "on").ok();
    let given_up = "rank 0: CUDA graphs were given up: ";
    for word in [given_up, "without CUDA graphs"] {
        assert!(!expected.stderr.contains(word), "{}", expected.stderr);
    }
    let off = generate("spoil=1", "off").ok();
    assert!(off.stderr.contains("without CUDA graphs"), "{}", off.stderr);
    assert!(!off.stderr.contains(given_up), "{}", off.stderr);
    assert_eq!(off.stdout, expected.stdout);
    for (settings, why) in [
        ("spoil=1", "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"),
        ("spoil=2", "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"),
        ("refuse-graph=1", "cuGraphLaunch failed: CUDA_ERROR_OUT_OF_MEMORY"),
        ("refuse-graph=3", "cuGraphLaunch failed: CUDA_ERROR_OUT_OF_MEMORY"),
    ] {
        let ended = generate(settings, "on").ok();
        let said: Vec<&str> = ended.stderr.lines().filter(|line| line.contains(given_up)).collect();
        assert!(said.len() == 1 && said[0].contains(why), "{settings}: {}", ended.stderr);
        assert_eq!(ended.stdout, expected.stdout, "{settings}");
    }
    generate("", "perhaps").fails(2, &["TPSHARD_CUDA_GRAPHS=perhaps", "on or off"]);
    // A kernel that fails in a graph ends the run with an error, as one that fails by itself.
    generate("fail=250", "on").fails(6, &["CUDA_ERROR_LAUNCH_FAILED"]);
}

/// The logits of one step in which each slot gets these tokens.
fn step(session: &mut Session, slots: &[u64], tokens: &[i64]) -> Vec<f32> {
    let slots: Vec<SlotId> = slots.iter().map(|&slot| SlotId(slot)).collect();
    let past: Vec<usize> = slots.iter().map(|&slot| session.slot_length(slot).unwrap_or(0)).collect();
    let new = tokens.len();
    let longest = past.iter().max().unwrap() + new;
    let ids =
        |columns: usize, values: Vec<i64>| Tensor::from_vec(vec![slots.len(), columns], values).unwrap();
    let positions = past.iter().flat_map(|&past| past..past + new).map(|p| p as i64).collect();
    let rows = slots.iter().flat_map(|_| tokens).copied().collect();
    let inputs = BTreeMap::from([
        ("input_ids".to_string(), ids(new, rows)),
        ("position_ids".to_string(), ids(new, positions)),
        ("attention_mask".to_string(), ids(longest, vec![1; slots.len() * longest])),
    ]);
    let results = session.run_step(&slots, &inputs).unwrap();
    results.outputs["logits"].tensor.as_slice::<f32>().unwrap().to_vec()
}

#[test]
fn slots_change_hands_on_the_gpu_as_on_the_processor() {
    if !has_compiler() {
        return;
    }
    let folder = sharded_for_gpu(2);
    let story = |session: &mut Session| {
        let mut logits = Vec::new();
        logits.extend(step(session, &[1, 2], &[5, 9, 7]));
        logits.extend(step(session, &[1, 2], &[11]));
        logits.extend(step(session, &[2], &[3, 4]));
        // Slots of different lengths together, regrouped, in another order.
        logits.extend(step(session, &[2, 1], &[8]));
        session.truncate(SlotId(1), 2).unwrap();
        session.fork(SlotId(2), SlotId(3)).unwrap();
        logits.extend(step(session, &[3, 1, 2], &[6]));
        let saved = session.save_slot(SlotId(3)).unwrap();
        session.drop_slot(SlotId(3)).unwrap();
        session.load_slot(SlotId(9), &saved).unwrap();
        logits.extend(step(session, &[9, 2], &[6]));
        // What does not fit is refused, and nothing has changed.
        let before = session.slot_length(SlotId(9));
        let full =
            BTreeMap::from([("input_ids".to_string(), Tensor::from_vec(vec![1, 9], vec![1i64; 9]).unwrap())]);
        session.run_step(&[SlotId(9)], &full).unwrap_err();
        assert_eq!(session.slot_length(SlotId(9)), before);
        // Nor by a step that fails while it runs.
        let wrong = |columns: usize, id: i64| Tensor::from_vec(vec![1, columns], vec![id; columns]).unwrap();
        let held = before.unwrap() as i64;
        let outside = BTreeMap::from([
            ("input_ids".to_string(), wrong(1, 70_000)),
            ("position_ids".to_string(), wrong(1, held)),
            ("attention_mask".to_string(), wrong(held as usize + 1, 1)),
        ]);
        let error = session.run_step(&[SlotId(9)], &outside).unwrap_err();
        assert!(error.to_string().contains("index 70000 is outside of a table of 512"), "{error}");
        assert_eq!(session.slot_length(SlotId(9)), before);
        logits.extend(step(session, &[9], &[2]));
        logits
    };
    let gpu = with_session(&folder, 2, &options(DeviceChoice::Program), story);
    let cpu = with_session(&folder, 2, &options(DeviceChoice::Cpu), story);
    let no_graphs = SessionOptions { no_graphs: true, ..options(DeviceChoice::Program) };
    assert_eq!(gpu, with_session(&folder, 2, &no_graphs, story));
    assert_eq!(gpu.len(), cpu.len());
    let range = cpu.iter().fold(0f32, |range, x| range.max(x.abs()));
    let most = gpu.iter().zip(&cpu).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    assert!(most <= TOLERANCE * range.max(1.0), "{most} of {range}");
}
