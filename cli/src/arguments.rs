//! The flags of every command, once: parsing and help both derive from these types.

use crate::failure::{Failure, Kind, Outcome};
use crate::output;
use crate::target::Target;
use clap::builder::RangedU64ValueParser;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::PathBuf;
use tpshard_frontend::Limits;
use tpshard_ir::DType;
use tpshard_ir::program::Determinism;
use tpshard_passes::overlap::Overlap;
use tpshard_runtime::session::{CommChoice, DeviceChoice};

/// Shards an ONNX model over N ranks and runs it.
#[derive(Debug, Parser)]
#[command(name = "tpshard", version, max_term_width = 100, subcommand_required = true)]
#[command(override_usage = "tpshard MODEL --tp N [OPTIONS]\n       tpshard COMMAND [OPTIONS]")]
#[command(
    after_help = "Exit codes: 0 ok, 1 internal, 2 usage, 3 model invalid or not supported, 4 mismatch, \
                  5 resources, 6 a rank or collective failed. A closed pipe (`| head`) only ends the output."
)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
    /// Print one JSON object on standard output instead of text; errors too.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// No progress bars.
    #[arg(long, short, global = true)]
    pub(crate) quiet: bool,
}

impl Arguments {
    /// Parses a command line. Its first word may be a model instead of a command.
    pub(crate) fn of(mut words: Vec<OsString>) -> Result<Arguments, clap::Error> {
        let global = |word: &OsString| word == "--json" || word == "--quiet" || word == "-q";
        let first = words.iter().skip(1).position(|word| !global(word)).map(|i| i + 1);
        if let Some(first) = first {
            let command = Arguments::command();
            let about = ["help", "--help", "-h", "--version", "-V"].iter().any(|w| words[first] == *w);
            if !about && !command.get_subcommands().any(|c| words[first] == c.get_name()) {
                words.insert(first, "shard".into());
            }
        }
        Arguments::try_parse_from(words)
    }
}

/// What was parsed; nothing if help or the version was asked for and printed.
pub(crate) fn parsed<T>(arguments: Result<T, clap::Error>) -> Outcome<Option<T>> {
    match arguments {
        Ok(arguments) => Ok(Some(arguments)),
        Err(error) if error.use_stderr() => {
            let _ = error.print();
            let text = error.render().to_string();
            Err(Failure::told(Kind::Usage, text.trim_start_matches("error: ").trim_end()))
        }
        // Help and version: with colours on terminals only.
        Err(error) if std::io::stdout().is_terminal() => output::text(error.render().ansi()).map(|()| None),
        Err(error) => output::text(error.render()).map(|()| None),
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Shard a model; the word may be left out.
    Shard(ShardArguments),
    /// Run all ranks of a sharded model on this machine.
    Run(RunArguments),
    /// Check programs, certificates, weight files and hashes of a sharded model.
    Check(CheckArguments),
    /// Run a sharded model and compare with golden outputs, or with one rank.
    Verify(VerifyArguments),
    /// Predict time and memory for 1, 2, 4 and 8 ranks without writing anything.
    Plan(PlanArguments),
    /// Say why a tensor is laid out as it is, and what other layouts would cost.
    Explain(ExplainArguments),
    /// Show what a model or a sharded model consists of.
    Inspect(InspectArguments),
    /// Run a sharded model with this executable, where the folder's own cannot be started (noexec, stores).
    ///
    /// All ranks as `run` does, or one rank if a launcher (torchrun, mpirun, srun) says which.
    Exec(ExecArguments),
    /// Compare two files of tensors.
    Compare(CompareArguments),
    /// Measure how long a sharded model takes on this machine, and where the time goes.
    Bench(BenchArguments),
    /// Continue a prompt with a sharded decoder model.
    Generate(GenerateArguments),
    /// Measure this machine and write its hardware profile.
    Calibrate(CalibrateArguments),
}

/// Most nodes that can be allowed.
pub(crate) const MOST_NODES: u64 = 100_000_000;

#[derive(Debug, Args)]
pub(crate) struct ModelArguments {
    /// Fix an input to a value before anything else, e.g. `use_cache=0`.
    #[arg(long, value_name = "INPUT=VALUE")]
    pub(crate) bind: Vec<String>,
    /// Outputs to compute: `NAME`, `NAME[:, -1]`, `NAME=argmax`, `NAME=topk:K`. Default: all of the model's.
    #[arg(long, value_name = "SELECTION")]
    pub(crate) output: Vec<String>,
    /// What a dim means: `SYMBOL=batch|seq|past|total`.
    #[arg(long, value_name = "SYMBOL=ROLE")]
    pub(crate) role: Vec<String>,
    /// Multiply and store in 16 bits what the model does in `f32`: weights of products, embedding tables, state and what
    /// flows between products. Sums, norms, softmax and rotary tables stay in `f32`, and so do inputs and outputs. See
    /// docs/precision.md. Default: as the model says.
    #[arg(long, value_name = "bf16|f16", value_enum)]
    pub(crate) dtype: Option<Precision>,
    /// Most nodes of a model, functions written out; more are taken for an attack.
    #[arg(long, value_name = "N", default_value_t = Limits::default().nodes)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=MOST_NODES))]
    pub(crate) max_nodes: u64,
}

/// What `--dtype` converts to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Precision {
    Bf16,
    F16,
}

impl Precision {
    pub(crate) const ALL: [Precision; 2] = [Precision::Bf16, Precision::F16];

    pub(crate) fn dtype(self) -> DType {
        match self {
            Precision::Bf16 => DType::BF16,
            Precision::F16 => DType::F16,
        }
    }

    /// By how much of its range an output may differ from that of `f32` where nothing else is asked for: what rounding
    /// adds up to in the models seen, with some room.
    pub(crate) fn tolerance(self) -> f64 {
        match self {
            Precision::Bf16 => 5e-2,
            Precision::F16 => 1e-2,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct PricingArguments {
    /// The dims to plan for: `batch=1,seq=128`, by role, symbol or `input[axis]`. Given several times, the program has
    /// an entry for each, e.g. `--dim decode*100:seq=1 --dim prefill:seq=2..2048`: name and weight may come first.
    /// A range LOW..HIGH is a limit; numbers are what is planned for, and results are right for all others. Where a bool
    /// input chooses between graphs, `INPUT=true` or `INPUT=false` among the dims means only that graph.
    #[arg(long, value_name = "[NAME[*WEIGHT]:]DIM=N,…")]
    pub(crate) dim: Vec<String>,
    /// Hardware to plan for: a built-in profile or a file.
    #[arg(long, value_name = "NAME|FILE", default_value = "h100-sxm")]
    pub(crate) profile: String,
    /// Bytes per rank for weights and state: a number with its unit such as 80GiB or 500MB, `min` (the least that is
    /// possible), or `free` (no limit).
    #[arg(long, value_name = "SIZE|min|free")]
    pub(crate) memory: Option<String>,
    /// Split every tensor that a rule can split, whatever time it takes: for tests of the rules.
    #[arg(long)]
    pub(crate) split_all: bool,
    /// How equal results are: `fast` (within a tolerance), `run` (bit for bit, for one plan) or `tp` (bit for bit, for
    /// every number of ranks: no sum of floats is split).
    #[arg(long, value_name = "LEVEL", default_value_t = Determinism::Fast)]
    pub(crate) determinism: Determinism,
    /// In how many pieces GPUs make products that are summed over ranks, so that each is summed while the next is multiplied:
    /// `auto` (as the profile says), `off`, or a number from 2 to 64. At `--determinism fast` only; see docs/cost-model.md.
    #[arg(long, value_name = "auto|off|N", default_value_t = Overlap::Auto)]
    pub(crate) overlap: Overlap,
    /// Layouts that are not to be decided: a text file with lines such as `tensor model.layers.*.weight = S(1)`. May
    /// be repeated. See docs/pins.md.
    #[arg(long, value_name = "FILE")]
    pub(crate) pin: Vec<PathBuf>,
    /// Do not read the sharding annotations of the model (ONNX IR version 11) as pins.
    #[arg(long)]
    pub(crate) ignore_annotations: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ShardArguments {
    /// The ONNX model.
    pub(crate) model: PathBuf,
    /// Number of ranks, 1 to 1024.
    #[arg(long, value_name = "N")]
    pub(crate) tp: usize,
    /// Folder to write. Default: the model's name with `-tpN`.
    #[arg(long, short, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Replace an existing folder.
    #[arg(long)]
    pub(crate) overwrite: bool,
    /// What the programs run on: `cpu`; or `cuda`, NVIDIA GPUs, with machine code for the architectures listed, such as
    /// `cuda:sm_80,sm_90`, if their compiler is found (see docs/cuda.md), else made when the ranks first start. `auto` is
    /// `cpu`.
    #[arg(long, value_name = "TARGET", default_value = "auto")]
    pub(crate) target: Target,
    /// An executable of another machine type to put the programs into. Default: this one.
    #[arg(long, value_name = "FILE")]
    pub(crate) runner: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) from: ModelArguments,
    #[command(flatten)]
    pub(crate) pricing: PricingArguments,
}

#[derive(Debug, Args)]
pub(crate) struct ToleranceArguments {
    /// Absolute tolerance: `1e-4`, or `OUTPUT:1e-3` for one output. Default: 1e-4; in folders built with `--dtype bf16`
    /// and `f16`, 0.05 and 0.01 times the largest element of the output.
    #[arg(long, value_name = "[OUTPUT:]X")]
    pub(crate) atol: Vec<String>,
    /// Relative tolerance, likewise.
    #[arg(long, value_name = "[OUTPUT:]X")]
    pub(crate) rtol: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct RunArguments {
    /// The folder that `tpshard MODEL --tp N` wrote.
    pub(crate) folder: PathBuf,
    /// Also write what this ONNX node computes, put together from the ranks, as output `tap:NODE`. All ranks run in
    /// this process, with one thread each. May be repeated.
    #[arg(long, value_name = "NODE", requires = "inputs", conflicts_with_all = ["threads", "timeout"])]
    pub(crate) tap: Vec<String>,
    #[command(flatten)]
    pub(crate) tensors: TensorArguments,
}

/// Longest time without progress that can be asked for.
const MOST_SECONDS: u64 = 7 * 24 * 60 * 60;
/// Most threads per rank that can be asked for.
const MOST_THREADS: u64 = 1024;

/// Where ranks run.
#[derive(Clone, Copy, Debug, Default, Args)]
pub(crate) struct DeviceArgument {
    /// Where to run: `auto`, what the folder was built for; `cpu`, also if it was built for GPUs; `cuda`.
    #[arg(long, value_name = "DEVICE", value_enum, default_value_t = Device::Auto)]
    pub(crate) device: Device,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Device {
    #[default]
    Auto,
    Cpu,
    Cuda,
}

impl Device {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Device::Auto => "auto",
            Device::Cpu => "cpu",
            Device::Cuda => "cuda",
        }
    }

    pub(crate) fn choice(self) -> DeviceChoice {
        match self {
            Device::Auto => DeviceChoice::Program,
            Device::Cpu => DeviceChoice::Cpu,
            Device::Cuda => DeviceChoice::Cuda,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Comm {
    #[default]
    Auto,
    Nccl,
    Shm,
}

impl Comm {
    pub(crate) fn choice(self) -> CommChoice {
        match self {
            Comm::Auto => CommChoice::Auto,
            Comm::Nccl => CommChoice::Nccl,
            Comm::Shm => CommChoice::Shm,
        }
    }
}

/// How ranks run.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct RankArguments {
    #[command(flatten)]
    pub(crate) on: DeviceArgument,
    /// What carries collectives between GPUs: `auto`, NCCL if every rank finds it and has a GPU of its own; `nccl`; `shm`,
    /// host memory.
    #[arg(long, value_name = "COMM", value_enum, default_value_t = Comm::Auto)]
    pub(crate) comm: Comm,
    /// Seconds without progress after which the ranks give up, 1 to 604800 (a week). Default: 30.
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=MOST_SECONDS))]
    pub(crate) timeout: Option<u64>,
    /// Threads per rank, 1 to 1024. Default: the cores shared out among the ranks.
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..=MOST_THREADS))]
    pub(crate) threads: Option<usize>,
    /// Give every thread a processor of its own. Faster where nothing else runs on the machine, slower where it does.
    #[arg(long)]
    pub(crate) own_processors: bool,
}

// What a rank's executable takes as well.
#[derive(Debug, Args)]
pub(crate) struct TensorArguments {
    /// Inputs: an `.npz`, a folder of `.npy`, or an ONNX `test_data_set_*` folder.
    #[arg(long, value_name = "FILE")]
    pub(crate) inputs: Option<PathBuf>,
    /// Where to write the outputs, as `.npz`.
    #[arg(long, value_name = "FILE")]
    pub(crate) outputs: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) ranks: RankArguments,
}

#[derive(Debug, Args)]
pub(crate) struct CheckArguments {
    /// The folder that `tpshard MODEL --tp N` wrote.
    pub(crate) folder: PathBuf,
    /// Compare every shard with the original model's bytes.
    #[arg(long, value_name = "FILE")]
    pub(crate) model: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct VerifyArguments {
    /// The folder that `tpshard MODEL --tp N` wrote.
    pub(crate) folder: PathBuf,
    /// A folder with `inputs*.npz` and `outputs*.npz`, or with ONNX `test_data_set_*` folders.
    #[arg(long, value_name = "DIR")]
    pub(crate) golden: Option<PathBuf>,
    /// Compare with one rank running this model. Needs --inputs, or --golden for the inputs.
    #[arg(long, value_name = "FILE")]
    pub(crate) model: Option<PathBuf>,
    /// Inputs for --model: an `.npz`, a folder of `.npy`, or an ONNX `test_data_set_*` folder.
    #[arg(long, value_name = "FILE", conflicts_with = "golden")]
    pub(crate) inputs: Option<PathBuf>,
    /// Name the first ONNX node whose value differs from one rank's.
    #[arg(long)]
    pub(crate) bisect: bool,
    #[command(flatten)]
    pub(crate) on: DeviceArgument,
    #[command(flatten)]
    pub(crate) tolerance: ToleranceArguments,
}

#[derive(Debug, Args)]
pub(crate) struct PlanArguments {
    /// The ONNX model.
    #[arg(required_unless_present = "diff")]
    pub(crate) model: Option<PathBuf>,
    /// Numbers of ranks: `1,2,4,8` or `1-8`.
    #[arg(long, value_name = "LIST", default_value = "1,2,4,8")]
    pub(crate) ranks: String,
    /// Instead: what differs between two plans, each a folder that `tpshard MODEL --tp N` wrote, its `config.json`, or
    /// what `plan --json` printed.
    #[arg(long, num_args = 2, value_names = ["A", "B"], conflicts_with = "model")]
    #[arg(conflicts_with_all = ["ranks", "bind", "output", "role", "dim", "profile", "memory", "pin", "ignore_annotations"])]
    pub(crate) diff: Option<Vec<PathBuf>>,
    /// With --diff: exit with 4 if the plans differ.
    #[arg(long)]
    pub(crate) exit_code: bool,
    #[command(flatten)]
    pub(crate) from: ModelArguments,
    #[command(flatten)]
    pub(crate) pricing: PricingArguments,
}

#[derive(Debug, Args)]
pub(crate) struct ExplainArguments {
    /// The ONNX model.
    pub(crate) model: PathBuf,
    /// Number of ranks, 2 to 1024.
    #[arg(long, value_name = "N")]
    pub(crate) tp: usize,
    /// An initializer, input, output, or any other tensor of the model.
    #[arg(long, value_name = "NAME", required_unless_present = "node", conflicts_with = "node")]
    pub(crate) tensor: Option<String>,
    /// A node of the model: its result.
    #[arg(long, value_name = "NAME")]
    pub(crate) node: Option<String>,
    #[command(flatten)]
    pub(crate) from: ModelArguments,
    #[command(flatten)]
    pub(crate) pricing: PricingArguments,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArguments {
    /// A model, a folder that tpshard wrote, or one of its executables.
    pub(crate) path: PathBuf,
    /// Print the model's graph, the program of a folder, or the graph of a rank, as text.
    #[arg(long)]
    pub(crate) tir: bool,
    /// Of a model: what `tpshard MODEL --dtype` makes of it.
    #[arg(long, value_name = "bf16|f16", value_enum)]
    pub(crate) dtype: Option<Precision>,
    /// Of a folder: show this rank's executable.
    #[arg(long, value_name = "RANK")]
    pub(crate) rank: Option<usize>,
}

#[derive(Debug, Args)]
pub(crate) struct ExecArguments {
    /// The folder that `tpshard MODEL --tp N` wrote.
    pub(crate) folder: PathBuf,
    #[command(flatten)]
    pub(crate) tensors: TensorArguments,
}

/// Runs one rank of a sharded model, or, as `run`, all of them.
///
/// Start `run` alone to run all ranks on this machine, or `run` or `rankN` under torchrun, mpirun or srun. The command
/// `tpshard inspect` shows the inputs and outputs of the folder this file is in.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
#[command(
    after_help = "Exit codes: 0 ok, 1 internal, 2 usage, 4 mismatch, 5 resources, 6 a rank or collective failed."
)]
pub(crate) struct RunnerArguments {
    /// This process's rank. Default: from the launcher's variables.
    #[arg(long, value_name = "RANK")]
    pub(crate) rank: Option<usize>,
    /// Number of ranks. Default: from the launcher's variables.
    #[arg(long, value_name = "N")]
    pub(crate) world_size: Option<usize>,
    #[command(flatten)]
    pub(crate) tensors: TensorArguments,
    /// Print one JSON object on standard output instead of text; errors too.
    #[arg(long)]
    pub(crate) json: bool,
    // What to do instead of running once; written by the commands that start ranks.
    #[arg(long, hide = true, value_name = "FILE")]
    pub(crate) job: Option<PathBuf>,
}

/// Most runs, and most tokens per run, that a bench can be asked for.
const MOST_SAMPLES: u64 = 1_000_000;

#[derive(Debug, Args)]
pub(crate) struct BenchArguments {
    /// The folder that `tpshard MODEL --tp N` wrote.
    pub(crate) folder: PathBuf,
    /// Of a decoder: take the token ids of the inputs as a prompt, keep the state with the ranks, and decode so many
    /// tokens after it, each the most probable one. Default: the inputs are run as they are.
    #[arg(long, value_name = "N")]
    #[arg(value_parser = RangedU64ValueParser::<usize>::new().range(1..=MOST_SAMPLES))]
    pub(crate) decode: Option<usize>,
    /// Runs before measuring begins.
    #[arg(long, value_name = "N", default_value_t = 3)]
    #[arg(value_parser = RangedU64ValueParser::<usize>::new().range(0..=MOST_SAMPLES))]
    pub(crate) warm_up: usize,
    /// Runs that are measured.
    #[arg(long, value_name = "N", default_value_t = 20)]
    #[arg(value_parser = RangedU64ValueParser::<usize>::new().range(1..=MOST_SAMPLES))]
    pub(crate) samples: usize,
    /// Also list what kernels and nodes of the model take.
    #[arg(long)]
    pub(crate) by_op: bool,
    /// Write a trace of the measured steps that ui.perfetto.dev opens, one track per rank.
    #[arg(long, value_name = "FILE")]
    pub(crate) trace: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) tensors: TensorArguments,
}

#[derive(Debug, Args)]
pub(crate) struct GenerateArguments {
    /// The folder that `tpshard MODEL --tp N` wrote.
    pub(crate) folder: PathBuf,
    /// The text to continue. Several are continued at once, and printed when all are done.
    #[arg(long, value_name = "TEXT", required_unless_present = "prompt_ids", conflicts_with = "prompt_ids")]
    pub(crate) prompt: Vec<String>,
    /// The text to continue, as token ids. May be repeated as well.
    #[arg(long, value_name = "ID,…", value_parser = token_ids)]
    pub(crate) prompt_ids: Vec<TokenIds>,
    /// The model's `tokenizer.json`. Without it, tokens are printed as numbers.
    #[arg(long, value_name = "FILE")]
    pub(crate) tokenizer: Option<PathBuf>,
    /// Most tokens to add.
    #[arg(long, value_name = "N", default_value_t = 128)]
    #[arg(value_parser = RangedU64ValueParser::<usize>::new().range(1..=MOST_SAMPLES))]
    pub(crate) max_tokens: usize,
    /// Divides the logits before a token is drawn; 0 takes the most probable token.
    #[arg(long, value_name = "T", default_value_t = 0.0, value_parser = temperature)]
    pub(crate) temperature: f64,
    /// Draw from the K most probable tokens only; 0 for all.
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub(crate) top_k: usize,
    /// Draw from the most probable tokens that together have this probability only.
    #[arg(long, value_name = "P", default_value_t = 1.0, value_parser = probability)]
    pub(crate) top_p: f64,
    /// What the drawing starts from: the same seed gives the same text.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
    /// A token that ends the text, and is not printed. May be repeated. Default: `eos_token_id` of the
    /// `generation_config.json` and `config.json` beside the tokenizer.
    #[arg(long, value_name = "ID")]
    pub(crate) stop_token: Vec<i64>,
    /// Go on until there are as many tokens as asked for.
    #[arg(long, conflicts_with = "stop_token")]
    pub(crate) ignore_stop: bool,
    #[command(flatten)]
    pub(crate) ranks: RankArguments,
}

/// The tokens of a prompt.
#[derive(Clone, Debug)]
pub(crate) struct TokenIds(pub(crate) Vec<i64>);

fn token_ids(text: &str) -> Result<TokenIds, String> {
    let id = |word: &str| word.trim().parse().map_err(|e| format!("`{word}` is no token id: {e}"));
    text.split(',').map(id).collect::<Result<_, _>>().map(TokenIds)
}

fn temperature(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && value >= 0.0 => Ok(value),
        _ => Err("a temperature is a number that is not negative".into()),
    }
}

fn probability(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value <= 1.0 => Ok(value),
        _ => Err("a probability is above 0 and at most 1".into()),
    }
}

#[derive(Debug, Args)]
pub(crate) struct CompareArguments {
    /// What was computed.
    pub(crate) got: PathBuf,
    /// What was expected.
    pub(crate) expected: PathBuf,
    #[command(flatten)]
    pub(crate) tolerance: ToleranceArguments,
}

#[derive(Debug, Args)]
pub(crate) struct CalibrateArguments {
    /// The profile to write, for --profile. Default: only show what was measured.
    #[arg(long, short, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
    /// Ranks that run at once. Default: one per core, from 2 to 8.
    #[arg(long, value_name = "N")]
    pub(crate) ranks: Option<usize>,
    /// Fewer samples and sizes.
    #[arg(long)]
    pub(crate) quick: bool,
    /// Measure nothing new: hold a profile's prices, and the time predicted for these sharded models, against what
    /// is measured now.
    #[arg(long, value_name = "DIR", num_args = 1.., requires = "profile", conflicts_with_all = ["out", "ranks"])]
    pub(crate) against: Vec<PathBuf>,
    /// The profile to hold against.
    #[arg(long, value_name = "NAME|FILE", requires = "against")]
    pub(crate) profile: Option<String>,
    /// What the ranks that are started by this command write.
    #[arg(long, value_name = "FILE", hide = true)]
    pub(crate) worker: Option<PathBuf>,
}
