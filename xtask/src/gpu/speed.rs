//! How fast a decoder of the shape of Llama 8B runs in `bf16`: a prompt, and tokens behind it, for what rank 0 of 1, 2, 4
//! and 8 ranks computes. Beside it the card's own limits, measured now, and PyTorch on the same shapes.
//!
//! Rank 0's share is a model of its own with its part of the heads, of the hidden layer and of the vocabulary, and without
//! collectives (`bench/gpu`): so one GPU measures what each of eight would compute, and only that.

use super::Surroundings;
use super::process::{said, said_within};
use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Seconds after which PyTorch starts nothing more, and after which it is ended.
const TORCH: [u64; 2] = [150, 210];
const TORCH_SMALL: [u64; 2] = [10, 90];
/// Tokens decoded after each prompt, and prompts.
const DECODED: &str = "32";
const SAMPLES: &str = "4";

/// A line of the table.
struct Row {
    ranks: u64,
    by: String,
    /// Seconds of a token and of the prompt, or why there are none.
    times: Result<[f64; 2], String>,
}

pub(super) fn run(surroundings: &Surroundings) -> Result<()> {
    let Surroundings { root, tpshard, bench, work, options } = surroundings;
    let folder = work.join("speed");
    let small = options.small.then_some("--small");
    let json = |command: &mut Command| -> Result<Value> {
        let text = said(command).map_err(|what| anyhow!("{what}"))?;
        serde_json::from_str(&text).context("its output is not JSON")
    };
    let card = json(Command::new(bench).arg("ceilings").args(small))?;
    let layers = options.layers.iter().flat_map(|layers| ["--layers", layers]);
    let shapes = json(Command::new(bench).arg("models").arg(&folder).args(layers).args(small))?;
    let shares = shapes["shares"].as_array().context("no shapes")?;
    let list = folder.join("shapes.json");
    std::fs::write(&list, shapes.to_string())?;
    let mut rows = Vec::new();
    for share in shares {
        let ranks = share["ranks"].as_u64().context("a shape without ranks")?;
        rows.push(Row { ranks, by: "tpshard".into(), times: measured(tpshard, &folder, share) });
    }
    rows.extend(torch(root, &list, options.small));
    rows.sort_by_key(|row| row.ranks);
    println!("{}", heading(&card, &shapes));
    for row in &rows {
        println!("{}", line(row, shares, &card));
    }
    std::fs::remove_dir_all(&folder)?;
    let failed = rows.iter().filter(|row| row.by == "tpshard" && row.times.is_err()).count();
    if failed > 0 { bail!("{failed} shares were not measured") } else { Ok(()) }
}

/// Shards a share for one rank and measures it: seconds of a token and of the prompt.
fn measured(tpshard: &Path, folder: &Path, share: &Value) -> Result<[f64; 2], String> {
    let model = share["model"].as_str().ok_or("a shape without model")?;
    let out = folder.join("out");
    let mut shard = Command::new(tpshard);
    shard.arg(folder.join(model)).args(["--tp", "1", "--dtype", "bf16", "--target", "cuda"]);
    // The logits of the last position, of which the best is chosen on the device.
    shard.args(["--output", "logits[:, -1]=argmax", "--overwrite", "--quiet", "-o"]).arg(&out);
    said(&mut shard)?;
    let mut bench = Command::new(tpshard);
    bench.arg("bench").arg(&out).arg("--inputs").arg(folder.join("inputs"));
    bench.args(["--decode", DECODED, "--samples", SAMPLES, "--warm-up", "2", "--json"]);
    let text = said_within(&mut bench, Duration::from_secs(120))?;
    std::fs::remove_dir_all(&out).map_err(|error| error.to_string())?;
    let result: Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    let seconds = |phase: &str| {
        let median = result["phases"][phase]["median_seconds"].as_f64();
        median.ok_or_else(|| format!("the bench says nothing of a {phase}"))
    };
    Ok([seconds("token")?, seconds("prompt")?])
}

/// PyTorch, if a Python has it.
fn torch(root: &Path, shapes: &Path, small: bool) -> Vec<Row> {
    let python = std::env::var_os("TPSHARD_PYTHON").map_or_else(|| PathBuf::from("python3"), PathBuf::from);
    if said(Command::new(&python).args(["-c", "import torch"])).is_err() {
        println!("SKIPPED: {} has no torch (TPSHARD_PYTHON names another Python)", python.display());
        return Vec::new();
    }
    let [start, end] = if small { TORCH_SMALL } else { TORCH };
    let mut command = Command::new(python);
    command.arg(root.join("bench/gpu_torch.py")).arg(shapes).args(["--seconds", &start.to_string()]);
    // Small shapes are for machines without GPUs.
    command.args(small.then_some(["--device", "cpu"]).into_iter().flatten());
    let told = said_within(&mut command, Duration::from_secs(end))
        .and_then(|text| serde_json::from_str::<Value>(&text).map_err(|error| error.to_string()));
    let results = match &told {
        Ok(told) => told["results"].as_array().cloned().unwrap_or_default(),
        Err(what) => {
            println!("SKIPPED: PyTorch: {what}");
            return Vec::new();
        }
    };
    let row = |result: &Value| {
        let times = match (result["token_seconds"].as_f64(), result["prompt_seconds"].as_f64()) {
            (Some(token), Some(prompt)) => Ok([token, prompt]),
            _ => Err(result["missing"].as_str().unwrap_or("no result").to_owned()),
        };
        let by = format!("torch {}", result["mode"].as_str().unwrap_or("?"));
        Row { ranks: result["ranks"].as_u64().unwrap_or(0), by, times }
    };
    results.iter().map(row).collect()
}

fn heading(card: &Value, shapes: &Value) -> String {
    let copy = card["copy_bytes_per_second"].as_f64().unwrap_or(0.0) / 1e9;
    let products = card["bf16_operations_per_second"].as_f64();
    let products = products.map_or("not measured".into(), |rate| format!("{:.1} TFLOP/s", rate / 1e12));
    let first = &shapes["shares"][0];
    format!(
        "{}: copies on the device {copy:.0} GB/s (read and written), products of bf16 {products}\n\
         decoder of {} layers, hidden {}, {} heads ({} of keys), ffn {}, vocabulary {}; one sequence, a prompt of {} tokens\n\
         {:>5} {:14} {:>10} {:>9} {:>8} {:>11} {:>9} {:>11}",
        card["device"].as_str().unwrap_or("?"),
        first["layers"],
        first["hidden"],
        first["heads"],
        first["kv_heads"],
        first["ffn"],
        first["vocabulary"],
        first["prompt"],
        "share",
        "by",
        "token ms",
        "GB/s",
        "of copy",
        "prompt ms",
        "TFLOP/s",
        "of products"
    )
}

fn line(row: &Row, shares: &[Value], card: &Value) -> String {
    let start = format!("{:>5} {:14}", format!("1/{}", row.ranks), row.by);
    let [token, prompt] = match &row.times {
        Ok(times) => *times,
        Err(what) => return format!("{start} {what}"),
    };
    let share = shares.iter().find(|share| share["ranks"].as_u64() == Some(row.ranks));
    let of = |key: &str| share.and_then(|share| share[key].as_f64()).unwrap_or(0.0);
    let (bytes, operations) = (of("token_bytes") / token, of("prompt_operations") / prompt);
    let part = |rate: f64, key: &str| {
        card[key]
            .as_f64()
            .filter(|most| *most > 0.0)
            .map_or("-".into(), |most| format!("{:.0} %", 100.0 * rate / most))
    };
    format!(
        "{start} {:>10.3} {:>9.1} {:>8} {:>11.2} {:>9.2} {:>11}",
        token * 1e3,
        bytes / 1e9,
        part(bytes, "copy_bytes_per_second"),
        prompt * 1e3,
        operations / 1e12,
        part(operations, "bf16_operations_per_second")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_line_holds_rates_beside_what_the_card_can_do() {
        let shares = [json!({ "ranks": 2, "token_bytes": 4e9, "prompt_operations": 5e12 })];
        let card = json!({ "copy_bytes_per_second": 4e12, "bf16_operations_per_second": 8e14 });
        let row = |times| Row { ranks: 2, by: "tpshard".into(), times };
        let text = line(&row(Ok([0.002, 0.0125])), &shares, &card);
        let words: Vec<&str> = text.split_whitespace().collect();
        let expected = ["1/2", "tpshard", "2.000", "2000.0", "50", "%", "12.50", "400.00", "50", "%"];
        assert_eq!(words, expected);
        let unknown = line(&row(Ok([0.002, 0.0125])), &shares, &json!({}));
        assert!(unknown.ends_with('-'), "{unknown}");
        assert!(line(&row(Err("no time left".into())), &shares, &card).ends_with("no time left"));
    }
}
