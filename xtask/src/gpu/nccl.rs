//! Collectives by NCCL on the one GPU there is. NCCL does not let ranks share a GPU unless it takes them for other machines
//! (`NCCL_HOSTID`, any version) or is told to (`NCCL_MULTI_RANK_GPU_ENABLE`, from 2.30 on): both ways are tried, each as
//! two ranks that are started like by a launcher.

use super::Surroundings;
use super::models::OWN;
use super::process::{ended, said, started};
use anyhow::{Result, anyhow, bail};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const RANKS: usize = 2;
const MODEL: &str = "tiny-llama";
const PATIENCE: Duration = Duration::from_secs(90);

/// What a way is called, and what every rank is told.
type Way = (&'static str, &'static [(&'static str, &'static str)]);
const WAYS: [Way; 2] = [
    (
        "NCCL_HOSTID",
        &[
            ("NCCL_HOSTID", "rank"),
            ("NCCL_SOCKET_IFNAME", "lo"),
            ("NCCL_NET", "Socket"),
            ("NCCL_IB_DISABLE", "1"),
            ("NCCL_P2P_DISABLE", "1"),
            ("NCCL_SHM_DISABLE", "1"),
            ("NCCL_MAX_CTAS", "2"),
        ],
    ),
    (
        "NCCL_MULTI_RANK_GPU_ENABLE",
        &[("NCCL_MULTI_RANK_GPU_ENABLE", "1"), ("NCCL_NVLS_ENABLE", "0"), ("NCCL_MAX_CTAS", "4")],
    ),
];

pub(super) fn run(surroundings: &Surroundings) -> Result<()> {
    let Surroundings { root, tpshard, work, .. } = surroundings;
    let model = root.join(OWN).join(MODEL);
    let folder = work.join("nccl");
    let mut shard = Command::new(tpshard);
    shard.arg(model.join("model.onnx")).args(["--tp", &RANKS.to_string(), "--target", "cuda", "--split-all"]);
    said(shard.args(["--overwrite", "--quiet", "-o"]).arg(&folder)).map_err(|what| anyhow!("{what}"))?;
    let mut working = 0;
    for (name, variables) in WAYS {
        match attempt(tpshard, &model, &folder, &work.join("nccl.npz"), variables) {
            Ok(()) => {
                working += 1;
                println!("{name:32} {RANKS} ranks on the GPU agree with the golden outputs");
            }
            Err(what) if what.contains("libnccl was not found") || what.contains("library libnccl") => {
                println!("SKIPPED: {what}");
                return Ok(());
            }
            Err(what) => println!("{name:32} does not work here: {what}"),
        }
    }
    std::fs::remove_dir_all(&folder)?;
    if working == 0 { bail!("NCCL carried nothing in any way") } else { Ok(()) }
}

fn attempt(
    tpshard: &Path,
    model: &Path,
    folder: &Path,
    got: &Path,
    variables: &[(&str, &str)],
) -> Result<(), String> {
    // Tells jobs apart; nothing listens on it.
    let port = (20_000 + std::process::id() % 20_000).to_string();
    let mut ranks = Vec::new();
    for rank in 0..RANKS {
        let mut command = Command::new(folder.join(format!("rank{rank}")));
        command.arg("--inputs").arg(model.join("inputs.npz")).arg("--outputs").arg(got);
        command.args(["--comm", "nccl"]);
        let place =
            [("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", RANKS), ("LOCAL_WORLD_SIZE", RANKS)];
        command.envs(place.map(|(name, value)| (name, value.to_string())));
        command.env("MASTER_ADDR", "localhost").env("MASTER_PORT", &port);
        for (name, value) in variables {
            let value = if *value == "rank" { format!("rank{rank}") } else { (*value).to_owned() };
            command.env(name, value);
        }
        ranks.push(started(&mut command)?);
    }
    ended(ranks, PATIENCE).into_iter().collect::<Result<Vec<_>, String>>()?;
    let mut compare = Command::new(tpshard);
    compare.arg("compare").arg(got).arg(model.join("outputs.npz")).args(["--atol", "1e-4", "--rtol", "1e-4"]);
    said(&mut compare).map(|_| ())
}
