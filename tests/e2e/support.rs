//! What all themes use: running the tool, folders to run it in, and folders it made earlier.

use serde_json::Value;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tpshard_ir::{Data, Tensor};
use tpshard_runtime::io::{NamedTensors, read_npz, write_npz};

/// Largest file of tensors that a test reads.
const TENSOR_LIMIT: u64 = 1 << 30;
/// No command of a test takes this long; one that does hangs.
const PATIENCE: Duration = Duration::from_secs(120);

/// Variables by which launchers name ranks; a test may itself run under one.
const LAUNCHER_VARIABLES: [&str; 12] = [
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_RANK",
    "PMI_SIZE",
    "PMIX_RANK",
    "SLURM_PROCID",
];

/// How a command ended and what it said.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ended {
    fn of(output: Output) -> Ended {
        Ended {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Expects success.
    #[track_caller]
    pub(crate) fn ok(self) -> Ended {
        assert_eq!(self.code, Some(0), "{self:#?}");
        self.never_panicked()
    }

    /// Expects this exit code and all of these words on standard error.
    #[track_caller]
    pub(crate) fn fails(self, code: i32, words: &[&str]) -> Ended {
        assert_eq!(self.code, Some(code), "{}\n{}", self.stdout, self.stderr);
        for word in words {
            assert!(self.stderr.contains(word), "`{word}` is not in\n{}", self.stderr);
        }
        self.never_panicked()
    }

    #[track_caller]
    fn never_panicked(self) -> Ended {
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        self
    }

    /// Standard output as one JSON value.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error} in {}", self.stdout))
    }
}

/// A command with a clean environment.
pub(crate) fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    for name in LAUNCHER_VARIABLES {
        command.env_remove(name);
    }
    command.env_remove("TPSHARD_TIMEOUT").env_remove("TPSHARD_RENDEZVOUS").stdin(Stdio::null());
    command
}

/// The tool with these words.
pub(crate) fn tpshard<I: IntoIterator<Item: AsRef<OsStr>>>(words: I) -> Command {
    let mut command = command(env!("CARGO_BIN_EXE_tpshard"));
    command.args(words);
    command
}

/// Runs a command to its end; one that hangs is killed and fails the test.
#[track_caller]
pub(crate) fn end(command: &mut Command) -> Ended {
    wait(start(command))
}

pub(crate) fn start(command: &mut Command) -> Child {
    let piped = command.stdout(Stdio::piped()).stderr(Stdio::piped());
    piped.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

#[track_caller]
pub(crate) fn wait(mut child: Child) -> Ended {
    let deadline = Instant::now() + PATIENCE;
    let (mut out, mut err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let read = |stream: &mut dyn Read| {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).map(|_| bytes)
    };
    let (stdout, stderr) = std::thread::scope(|scope| {
        let out = scope.spawn(move || read(&mut out));
        let err = scope.spawn(move || read(&mut err));
        while child.try_wait().unwrap().is_none() {
            if Instant::now() > deadline {
                child.kill().unwrap();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        (out.join().unwrap().unwrap(), err.join().unwrap().unwrap())
    });
    let status = child.wait().unwrap();
    assert!(Instant::now() <= deadline, "hung: {}", String::from_utf8_lossy(&stderr));
    Ended::of(Output { status, stdout, stderr })
}

/// Words of a command line from strings and paths.
#[macro_export]
macro_rules! words {
    ($($word:expr),* $(,)?) => { [$(std::ffi::OsString::from(&$word)),*] };
}

/// The committed model with its golden inputs and outputs.
pub(crate) fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/tiny-llama")
}

pub(crate) fn model() -> PathBuf {
    golden().join("model.onnx")
}

/// The prompt of the golden pair.
pub(crate) fn prompt() -> PathBuf {
    golden().join("inputs.npz")
}

pub(crate) fn scratch() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// Shards the model into `folder`.
#[track_caller]
pub(crate) fn shard(ranks: usize, folder: &Path, more: &[&str]) {
    let mut command = tpshard(words![model(), "--tp", ranks.to_string(), "-o", folder]);
    end(command.args(more)).ok();
}

/// The model sharded over `ranks`, made once for all tests; nobody may change it.
pub(crate) fn sharded(ranks: usize) -> PathBuf {
    static MADE: OnceLock<Mutex<BTreeMap<usize, PathBuf>>> = OnceLock::new();
    let mut made = MADE.get_or_init(Mutex::default).lock().unwrap_or_else(|poison| poison.into_inner());
    let path = made.entry(ranks).or_insert_with(|| {
        // Inside the target folder, under a name that the next run takes over: nothing piles up.
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("tiny-llama-tp{ranks}"));
        shard(ranks, &path, &["--overwrite"]);
        path
    });
    path.clone()
}

/// A copy of [`sharded`] that the test may break.
pub(crate) fn copy_of_sharded(ranks: usize, scratch: &TempDir) -> PathBuf {
    let (from, to) = (sharded(ranks), scratch.path().join("out"));
    copy_folder(&from, &to);
    to
}

pub(crate) fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for name in names(from) {
        std::fs::copy(from.join(&name), to.join(&name)).unwrap();
    }
}

/// The names in a folder, sorted.
pub(crate) fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

pub(crate) fn read(path: &Path) -> NamedTensors {
    read_npz(path, TENSOR_LIMIT).unwrap()
}

pub(crate) fn write(path: &Path, tensors: &NamedTensors) {
    write_npz(path, tensors).unwrap();
}

/// The largest difference between two tensors of floats of one shape.
#[track_caller]
pub(crate) fn distance(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.shape(), b.shape());
    let (Data::F32(a), Data::F32(b)) = (a.data(), b.data()) else {
        panic!("{} and {} are not both f32", a.dtype(), b.dtype())
    };
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Expects the golden outputs in `got`.
#[track_caller]
pub(crate) fn assert_golden(got: &Path, expected: &str) {
    end(&mut tpshard(words!["compare", got, golden().join(expected)])).ok();
}
